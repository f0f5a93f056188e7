//! What a switch says of the migrations of connections.
use super::Host;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longer than late frames are redirected.
const PATIENCE: Duration = Duration::from_secs(20);

/// One migration as one host sees it, as far as tests look at it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowStatus {
    /// Id that both hosts share; empty before there is a channel.
    pub id: String,
    /// `source` or `destination`.
    pub role: String,
    /// State of the machine.
    pub state: String,
    /// The other host.
    pub peer: String,
    /// How often the channel was set up.
    pub attempt: u32,
    /// Milliseconds since 1970.
    pub began_at_ms: u64,
    /// Absent: under way.
    pub ended_at_ms: Option<u64>,
    /// Connections of the table, or staged.
    pub connections: u64,
    /// Rounds that have ended.
    pub rounds: Vec<FlowRound>,
    /// Memory rounds seen in the dirty log.
    pub memory_rounds: u64,
    /// From the VM's stop to the acknowledgement.
    pub final_delta_ms: Option<f64>,
    /// How long QEMU waited.
    pub hold_ms: Option<f64>,
    /// How the VM began at the destination.
    pub began: Option<String>,
    /// Refused by the destination.
    pub refused_connections: u64,
    /// No room at the destination.
    pub dropped_connections: u64,
    /// Frames that came late.
    pub late_frames: u64,
    /// `migrated`, `cancelled`, `failed`, `refused`; empty: under way.
    pub outcome: String,
    /// What happened last.
    pub text: String,
}

/// A round.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowRound {
    /// Its number, from 0.
    pub round: u32,
    /// It was the final delta.
    #[serde(rename = "final")]
    pub last: bool,
    /// Records.
    pub entries: u64,
    /// Bytes before compression.
    pub bytes: u64,
    /// From its beginning to its acknowledgement.
    pub duration_ms: u64,
}

/// Asks a switch from whatever thread, without the cost of a process: many times a second while a migration runs.
#[derive(Clone, Debug)]
pub struct Asker {
    api: PathBuf,
}

impl Asker {
    /// Asks this host's switch.
    pub fn new(host: &Host) -> Self {
        Self { api: host.ferryd.api().to_path_buf() }
    }

    /// `GET /v1` + path; `None`: there is no such thing.
    fn get(&self, path: &str) -> Result<Option<String>> {
        let mut stream = UnixStream::connect(&self.api).context("API")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET /v1{path} HTTP/1.1\r\nHost: ferry\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no HTTP: {answer}"))?;
        match head.split_whitespace().nth(1) {
            Some("200") => Ok(Some(body.to_string())),
            Some("404") => Ok(None),
            _ => bail!("GET {path}: {answer}"),
        }
    }

    /// The latest migration of a VM; `None` when it had none.
    ///
    /// # Errors
    /// When the switch does not answer.
    pub fn flow(&self, vm: &str) -> Result<Option<FlowStatus>> {
        let text = self.get(&format!("/migrations/{vm}"))?;
        text.map(|t| serde_json::from_str(&t).with_context(|| t)).transpose()
    }

    /// How many connections from other hosts the listener has refused, for whatever reason.
    ///
    /// # Errors
    /// When the switch does not answer.
    pub fn refused(&self) -> Result<u64> {
        let text = self.get("/migration")?.context("no migrations")?;
        let host: Value = serde_json::from_str(&text)?;
        let reasons = host["refused"].as_array().with_context(|| text.clone())?;
        Ok(reasons.iter().filter_map(|reason| reason[1].as_u64()).sum())
    }

    /// Waits until the VM's migration that began at `since_ms` (milliseconds since 1970) or later fulfils a condition.
    ///
    /// # Errors
    /// When it does not, or there is no such migration.
    pub fn wait(&self, vm: &str, since_ms: u64, what: &str, is: impl Fn(&FlowStatus) -> bool) -> Result<FlowStatus> {
        let mut last = None;
        wait::for_some(&format!("migration of connections: {what}"), PATIENCE, || {
            last = self.flow(vm).ok().flatten();
            last.clone().filter(|m| m.began_at_ms >= since_ms && is(m))
        })
        .with_context(|| format!("last seen: {last:?}"))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn ended(&self, vm: &str, since_ms: u64) -> Result<FlowStatus> {
        self.wait(vm, since_ms, "end", |m| m.ended_at_ms.is_some())
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
