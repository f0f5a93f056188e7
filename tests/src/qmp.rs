//! QEMU's machine protocol (QMP): one monitor.
use crate::wait;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A monitor in command mode.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and negotiates capabilities. A QEMU that is just starting gets 10 s to listen: it binds the socket a moment before it
    /// listens, so that a socket that is there can still refuse.
    ///
    /// # Errors
    /// When nobody listens or the greeting fails.
    pub fn connect(path: &Path) -> Result<Self> {
        let monitor = format!("monitor {}", path.display());
        let writer = wait::for_some(&monitor, Duration::from_secs(10), || UnixStream::connect(path).ok())?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer, events: VecDeque::new() };
        let greeting = qmp.read(Instant::now() + Duration::from_secs(20))?;
        if greeting.get("QMP").is_none() {
            bail!("no QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QMP: no message in time");
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            // A line cut by the time-out stays in `line` and is continued.
            match self.reader.read_line(&mut line) {
                Ok(0) => bail!("QMP: the monitor was closed"),
                Ok(_) => return serde_json::from_str(&line).with_context(|| format!("QMP: {line}")),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("QMP"),
            }
        }
    }

    /// Executes a command, bounded by 30 s; events that come meanwhile are kept.
    ///
    /// # Errors
    /// When QEMU refuses, or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.writer.write_all(text.as_bytes()).with_context(|| format!("QMP {command}"))?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let mut message = self.read(deadline).with_context(|| format!("QMP {command}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("QMP {command}: {error}");
            } else if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// When the last event called `name` happened of those that have come so far, as time since 1970 by QEMU's clock, which is the host's.
    ///
    /// # Errors
    /// When none has.
    pub fn event_time(&self, name: &str) -> Result<Duration> {
        let event =
            self.events.iter().rev().find(|e| e["event"] == name).with_context(|| format!("no event {name}"))?;
        let part = |field| event["timestamp"][field].as_u64().context("event without a time");
        Ok(Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
    }

    /// Takes the next event called `name`, waiting for it; other events before it are dropped.
    ///
    /// # Errors
    /// When it does not come within `timeout`.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            let message = match self.events.pop_front() {
                Some(m) => m,
                None => self.read(deadline).with_context(|| format!("waiting for {name}"))?,
            };
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(message);
            }
        }
    }
}
