//! What a switch says of the migrations of connections, asked with its command-line tool.
use super::Host;
use crate::paths;
use crate::process;
use crate::wait;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

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

/// Asks a switch from whatever thread.
#[derive(Clone, Debug)]
pub struct Asker {
    api: PathBuf,
}

impl Asker {
    /// Asks this host's switch.
    pub fn new(host: &Host) -> Self {
        Self { api: host.ferryd.api().to_path_buf() }
    }

    /// The latest migration of a VM; `None` when it had none.
    ///
    /// # Errors
    /// When the switch does not answer.
    pub fn flow(&self, vm: &str) -> Result<Option<FlowStatus>> {
        let mut c = Command::new(paths::binary("ferry")?);
        c.arg("--socket").arg(&self.api).args(["migrate", "status", "--json"]);
        let text = process::run(c, PATIENCE)?;
        let all: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
        let list = all["migrations"].as_array().with_context(|| format!("no list of migrations: {text}"))?;
        let one = list.iter().find(|m| m["vm"] == vm).cloned();
        one.map(|m| serde_json::from_value(m).with_context(|| text)).transpose()
    }

    /// Waits until the VM's latest migration has ended.
    ///
    /// # Errors
    /// When it does not, or the VM had none.
    pub fn ended(&self, vm: &str) -> Result<FlowStatus> {
        let mut last = None;
        wait::for_some("end of the migration of connections", PATIENCE, || {
            last = self.flow(vm).ok().flatten();
            last.clone().filter(|m| m.ended_at_ms.is_some())
        })
        .with_context(|| format!("last seen: {last:?}"))
    }
}
