//! A second eye on a guest's live migration: QEMU's own monitor, where one is configured.
//!
//! Flow migration follows signals of vhost-user alone. A monitor of the guest's QEMU (its second one, so that libvirt keeps the
//! first) adds what these cannot tell: the number of the memory round, the bandwidth, and the limit on the downtime. Where both
//! are there they must agree ([`CrossCheck`]); a monitor that is silent, slow or broken changes nothing.
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Longest message of QEMU's that is read, bytes. Its answers to the commands below are a few kilobytes.
const MAX_LINE_BYTES: u64 = 256 * 1024;
/// How long QEMU may take to answer. Its monitor stands still while the switch holds GET_VRING_BASE.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a monitor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens, or the connection broke.
    #[error("QMP {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// QEMU closed the monitor: it has ended.
    #[error("QMP {0}: closed by QEMU")]
    Closed(PathBuf),
    /// No answer in time.
    #[error("QMP {0}: no answer within {ANSWER_TIMEOUT:?}")]
    Silent(PathBuf),
    /// Not QMP, or a message longer than any of QEMU's.
    #[error("QMP {path}: {what}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// QEMU refused a command.
    #[error("QMP {path}: {command} refused: {why}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: &'static str,
        /// QEMU's words.
        why: String,
    },
}

/// What QEMU tells of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpEvent {
    /// MIGRATION: `setup`, `active`, `pre-switchover`, `device`, `completed`, `failed`, `cancelling`, `cancelled` ...
    Status(String),
    /// MIGRATION_PASS: memory round `n` has begun, from 1.
    Pass(u64),
    /// STOP: the guest stands still.
    Stopped,
    /// RESUME: it runs again.
    Resumed,
}

impl QmpEvent {
    fn read(message: &Value) -> Option<Self> {
        let data = message.get("data");
        Some(match message.get("event")?.as_str()? {
            "MIGRATION" => Self::Status(data?.get("status")?.as_str()?.chars().take(64).collect()),
            "MIGRATION_PASS" => Self::Pass(data?.get("pass")?.as_u64()?),
            "STOP" => Self::Stopped,
            "RESUME" => Self::Resumed,
            _ => return None,
        })
    }
}

/// QEMU's figures of a migration under way (`query-migrate`, `query-migrate-parameters`).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct QmpFigures {
    /// `none`, `setup`, `active`, `completed` ...
    pub status: String,
    /// Memory left to be sent, bytes.
    pub remaining_bytes: Option<u64>,
    /// Memory dirtied per second, pages.
    pub dirty_pages_per_second: Option<u64>,
    /// Speed, Mbit/s.
    pub mbps: Option<f64>,
    /// Downtime of a migration that has ended, milliseconds.
    pub downtime_ms: Option<u64>,
    /// What QEMU expects it to be, milliseconds.
    pub expected_downtime_ms: Option<u64>,
    /// Longest downtime that the operator allows, milliseconds.
    pub downtime_limit_ms: Option<u64>,
    /// Most bandwidth that the operator allows, bytes per second.
    pub max_bandwidth_bytes_per_second: Option<u64>,
}

/// A connection to one monitor.
pub struct Qmp {
    path: PathBuf,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// Events that came while an answer was awaited, bounded.
    waiting: std::collections::VecDeque<QmpEvent>,
    line: Vec<u8>,
}

impl Qmp {
    /// Connects to the monitor's socket and asks for events of migrations.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        let io = |source| QmpError::Io { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).await.map_err(io)?;
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            path: path.to_owned(),
            reader: BufReader::new(reader),
            writer,
            waiting: std::collections::VecDeque::new(),
            line: Vec::new(),
        };
        let greeting = qmp.message_in_time().await?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.protocol("the greeting is not QEMU's"));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        // MIGRATION and MIGRATION_PASS come only with this; it changes nothing else, and libvirt sets it, too.
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        qmp.execute("migrate-set-capabilities", events).await?;
        Ok(qmp)
    }

    fn protocol(&self, what: impl Into<String>) -> QmpError {
        QmpError::Protocol { path: self.path.clone(), what: what.into() }
    }

    /// The next message. Cancel-safe: a line cut short by a time-out is continued by the next call.
    async fn message(&mut self) -> Result<Value, QmpError> {
        loop {
            let left = MAX_LINE_BYTES.saturating_sub(self.line.len() as u64);
            if left == 0 {
                return Err(self.protocol(format!("a message longer than {MAX_LINE_BYTES} bytes")));
            }
            let mut limited = (&mut self.reader).take(left);
            let read = limited.read_until(b'\n', &mut self.line).await;
            let n = read.map_err(|source| QmpError::Io { path: self.path.clone(), source })?;
            if self.line.last() == Some(&b'\n') {
                let message = serde_json::from_slice(&self.line);
                self.line.clear();
                return message.map_err(|e| self.protocol(format!("not JSON: {e}")));
            }
            if n == 0 {
                return Err(QmpError::Closed(self.path.clone()));
            }
        }
    }

    async fn message_in_time(&mut self) -> Result<Value, QmpError> {
        match timeout(ANSWER_TIMEOUT, self.message()).await {
            Ok(message) => message,
            Err(_) => Err(QmpError::Silent(self.path.clone())),
        }
    }

    async fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        const MOST_WAITING: usize = 1024;
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        let sent = self.writer.write_all(text.as_bytes()).await;
        sent.map_err(|source| QmpError::Io { path: self.path.clone(), source })?;
        loop {
            let mut message = self.message_in_time().await?;
            if let Some(error) = message.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("without a reason").to_owned();
                return Err(QmpError::Refused { path: self.path.clone(), command, why });
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(event) = QmpEvent::read(&message) {
                self.waiting.push_back(event);
                if self.waiting.len() > MOST_WAITING {
                    self.waiting.pop_front();
                }
            }
        }
    }

    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn next_event(&mut self) -> Result<QmpEvent, QmpError> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(event);
        }
        loop {
            let message = self.message().await?;
            if let Some(event) = QmpEvent::read(&message) {
                return Ok(event);
            }
        }
    }

    /// QEMU's figures now.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn figures(&mut self) -> Result<QmpFigures, QmpError> {
        let state = self.execute("query-migrate", json!({})).await?;
        let limits = self.execute("query-migrate-parameters", json!({})).await?;
        let number = |v: &Value, key: &str| v.get(key).and_then(Value::as_u64);
        let ram = state.get("ram").cloned().unwrap_or_default();
        Ok(QmpFigures {
            status: state.get("status").and_then(Value::as_str).unwrap_or("none").to_owned(),
            remaining_bytes: number(&ram, "remaining"),
            dirty_pages_per_second: number(&ram, "dirty-pages-rate"),
            mbps: ram.get("mbps").and_then(Value::as_f64),
            downtime_ms: number(&state, "downtime"),
            expected_downtime_ms: number(&state, "expected-downtime"),
            downtime_limit_ms: number(&limits, "downtime-limit"),
            max_bandwidth_bytes_per_second: number(&limits, "max-bandwidth"),
        })
    }
}

/// Memory rounds as the dirty log showed them beside those that QEMU told of.
///
/// Each clearing of the canary belongs to at least one round; under starvation several rounds may be one clearing, and the last
/// clearing belongs to the stop. So the log may be behind, and one ahead, but never more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CrossCheck {
    /// Rounds seen in the log.
    pub seen: u64,
    /// Rounds that QEMU told of.
    pub told: u64,
}

impl CrossCheck {
    /// The two agree, as far as they can.
    pub const fn agrees(&self) -> bool {
        self.seen <= self.told + 1
    }

    /// Rounds that passed unseen: merged with others in one clearing.
    pub const fn merged(&self) -> u64 {
        self.told.saturating_sub(self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Plays QEMU: greets, then answers each line by the next of `answers` (several lines each).
    async fn play(listener: UnixListener, greeting: &str, answers: Vec<String>) {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(greeting.as_bytes()).await.unwrap();
        let (reader, mut writer) = stream.split();
        let mut lines = BufReader::new(reader).lines();
        for answer in answers {
            if lines.next_line().await.unwrap().is_none() {
                return;
            }
            // In pieces, as a socket may deliver it.
            for piece in answer.as_bytes().chunks(7) {
                if writer.write_all(piece).await.is_err() {
                    return;
                }
            }
        }
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    const DONE: &str = "{\"return\": {}}\r\n";

    fn pair() -> (tempfile::TempDir, PathBuf, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        (dir, path, listener)
    }

    #[tokio::test]
    async fn events_before_and_between_answers_are_kept() {
        let (_dir, path, listener) = pair();
        let pass =
            |n| format!("{{\"event\": \"MIGRATION_PASS\", \"data\": {{\"pass\": {n}}}, \"timestamp\": {{}}}}\r\n");
        let status = "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\r\n";
        let figures = "{\"return\": {\"status\": \"active\", \"expected-downtime\": 30, \"ram\": {\"remaining\": 4096, \
                       \"dirty-pages-rate\": 7, \"mbps\": 12.5}}}\r\n";
        let limits = "{\"return\": {\"downtime-limit\": 20, \"max-bandwidth\": 1000}}\r\n";
        let answers = vec![
            DONE.to_owned(),
            format!("{status}{DONE}"),
            format!("{}{{\"event\": \"VSERPORT_CHANGE\"}}\r\n{figures}", pass(1)),
            format!("{limits}{}{{\"event\": \"STOP\"}}\r\n", pass(2)),
        ];
        let qemu = tokio::spawn(play(listener, GREETING, answers));
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let figures = qmp.figures().await.unwrap();
        assert_eq!((figures.remaining_bytes, figures.downtime_limit_ms), (Some(4096), Some(20)));
        assert_eq!((figures.status.as_str(), figures.mbps), ("active", Some(12.5)));
        let expected = [QmpEvent::Status("active".into()), QmpEvent::Pass(1), QmpEvent::Pass(2), QmpEvent::Stopped];
        for event in expected {
            assert_eq!(qmp.next_event().await.unwrap(), event);
        }
        qemu.await.unwrap();
        assert!(matches!(qmp.next_event().await, Err(QmpError::Closed(_))));
    }

    #[tokio::test]
    async fn what_is_not_qemu_is_refused() {
        for (greeting, answers) in [
            ("{\"hello\": 1}\n", vec![]),
            ("nonsense\n", vec![]),
            (GREETING, vec!["{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n".to_owned()]),
            ("", vec![]),
        ] {
            let (_dir, path, listener) = pair();
            tokio::spawn(play(listener, greeting, answers));
            assert!(Qmp::connect(&path).await.is_err(), "{greeting:?}");
        }
        let (_dir, path, listener) = pair();
        let endless = "x".repeat(MAX_LINE_BYTES as usize + 10);
        tokio::spawn(async move { play(listener, &endless, vec![]).await });
        assert!(matches!(Qmp::connect(&path).await, Err(QmpError::Protocol { .. })));
        assert!(matches!(Qmp::connect(Path::new("/nonexistent/qmp")).await, Err(QmpError::Io { .. })));
    }

    #[test]
    fn rounds_agree_within_what_starvation_and_the_stop_explain() {
        let check = |seen, told| CrossCheck { seen, told };
        assert!(check(5, 5).agrees() && check(6, 5).agrees() && check(3, 5).agrees());
        assert!(!check(7, 5).agrees());
        assert_eq!(check(3, 5).merged(), 2);
    }
}
