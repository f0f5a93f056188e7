//! The flow log: new and denied connections, limited in rate, to ferryd's own log or to a file.
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use serde_json::Value;

use super::connection::protocol_name;
use super::record::FirewallRecord;
use crate::config::{FlowLogConfig, FlowLogScope, FlowLogTarget};

/// What is written, where to, and how much of it.
#[derive(Debug)]
pub struct FlowLog {
    config: FlowLogConfig,
    file: Option<File>,
    /// VMs that do not take part.
    silent: BTreeSet<String>,
    tokens: f64,
    refilled: Instant,
    /// Lines that the rate limit held back since the last line about that.
    held_back: u64,
    written: u64,
    lost: u64,
    failed: bool,
}

/// What the flow log has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowLogCounters {
    /// Lines written.
    pub written: u64,
    /// Lines lost: to the rate limit, or because they could not be written.
    pub lost: u64,
}

impl FlowLog {
    /// A flow log that is off.
    pub fn new(now: Instant) -> Self {
        Self {
            config: FlowLogConfig::default(),
            file: None,
            silent: BTreeSet::new(),
            tokens: 0.0,
            refilled: now,
            held_back: 0,
            written: 0,
            lost: 0,
            failed: false,
        }
    }

    /// Takes other settings; opens the file when there is one.
    ///
    /// # Errors
    /// The file cannot be opened; the former settings stay.
    pub fn configure(&mut self, config: &FlowLogConfig) -> Result<(), String> {
        let file = open(config)?;
        self.file = file;
        self.tokens = f64::from(config.burst);
        self.config = config.clone();
        self.failed = false;
        Ok(())
    }

    /// Opens the file again, which somebody may have moved away.
    ///
    /// # Errors
    /// The file cannot be opened; the one before stays in use.
    pub fn reopen(&mut self) -> Result<(), String> {
        self.file = open(&self.config)?;
        self.failed = false;
        Ok(())
    }

    /// Sets which VMs do not take part.
    pub fn set_silent(&mut self, vms: BTreeSet<String>) {
        self.silent = vms;
    }

    /// What it has done.
    pub fn counters(&self) -> FlowLogCounters {
        FlowLogCounters { written: self.written, lost: self.lost }
    }

    /// Counts records that were lost before they came here.
    pub fn note_lost(&mut self, count: u64) {
        if self.config.enabled {
            self.held_back += count;
            self.lost += count;
        }
    }

    /// Writes a record, if it is wanted and the rate allows.
    pub fn write(&mut self, record: &FirewallRecord, now: Instant) {
        let wanted = if record.is_new() { self.config.new } else { self.config.denied };
        let asked = record.log || self.config.scope == FlowLogScope::All;
        if !self.config.enabled || !wanted || !asked || self.silent.contains(&record.vm) {
            return;
        }
        let seconds = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.refilled = now;
        self.tokens = (self.tokens + seconds * f64::from(self.config.per_second)).min(f64::from(self.config.burst));
        if self.tokens < 1.0 {
            self.held_back += 1;
            self.lost += 1;
            return;
        }
        self.tokens -= 1.0;
        if self.held_back > 0 {
            let lost = std::mem::take(&mut self.held_back);
            let time = timestamp(record.time_unix_ms);
            self.emit(&[("time", time.into()), ("event", "lost".into()), ("lines", lost.into())]);
        }
        if self.emit(&line(record)) {
            self.written += 1;
        } else {
            self.lost += 1;
        }
    }

    fn emit(&mut self, line: &[(&'static str, Value)]) -> bool {
        if self.config.to == FlowLogTarget::Log {
            let text = in_words(line);
            tracing::info!(target: "flow", "{text}");
            return true;
        }
        let Some(file) = &mut self.file else { return false };
        // One write per line: whole lines even where others append to the file.
        let done = file.write_all(in_json(line).as_bytes());
        match done {
            Ok(()) => self.failed = false,
            Err(e) if !self.failed => {
                self.failed = true;
                tracing::warn!("the flow log cannot be written: {e}");
            }
            Err(_) => {}
        }
        !self.failed
    }
}

fn open(config: &FlowLogConfig) -> Result<Option<File>, String> {
    let Some(path) = config.file.as_ref().filter(|_| config.enabled && config.to == FlowLogTarget::File) else {
        return Ok(None);
    };
    let opened = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    opened.map(Some).map_err(|e| format!("cannot open {}: {e}", path.display()))
}

/// A record's parts, in the order in which they are written.
fn line(r: &FirewallRecord) -> Vec<(&'static str, Value)> {
    let mut out = Vec::with_capacity(16);
    let mut put = |key, v: Value| out.push((key, v));
    put("time", timestamp(r.time_unix_ms).into());
    put("event", r.kind.as_str().into());
    put("vm", r.vm.as_str().into());
    put("port", r.port.as_str().into());
    put("direction", r.direction.as_str().into());
    if !r.reason.is_empty() {
        put("reason", r.reason.as_str().into());
    }
    if let Some(rule) = &r.rule {
        put("rule", rule.as_str().into());
    }
    if let Some(link) = &r.link {
        put("link", link.as_str().into());
    }
    if let Some(f) = &r.flow {
        let name = match protocol_name(f.protocol_number) {
            "unknown" => Value::from(f.protocol_number),
            name => Value::from(name),
        };
        put("protocol", name);
        put("src", f.src.to_string().into());
        put("dst", f.dst.to_string().into());
        for (key, port) in [("sport", f.sport), ("dport", f.dport)] {
            if let Some(p) = port {
                put(key, p.into());
            }
        }
        if let Some((kind, code)) = f.icmp {
            put("icmp_type", kind.into());
            put("icmp_code", code.into());
        }
        if f.zone != 0 {
            put("vlan", f.zone.into());
        }
    }
    out
}

/// One line of the file. (A `Map` would sort the keys.)
fn in_json(line: &[(&'static str, Value)]) -> String {
    let pairs: Vec<String> = line.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
    format!("{{{}}}\n", pairs.join(","))
}

/// The same as `key=value` for the log, whose own line has the time.
fn in_words(line: &[(&'static str, Value)]) -> String {
    let pairs = line.iter().filter(|(k, _)| *k != "time");
    let text = |v: &Value| match v {
        Value::String(s) if !s.contains([' ', '"', '=']) => s.clone(),
        v => v.to_string(),
    };
    pairs.map(|(k, v)| format!("{k}={}", text(v))).collect::<Vec<_>>().join(" ")
}

/// `2026-11-21T15:33:44.123Z` (RFC 3339).
pub fn timestamp(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    // Years that begin in March have their leap day last (Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::record::FlowView;
    use serde_json::json;
    use std::time::Duration;

    fn record(kind: &str) -> FirewallRecord {
        FirewallRecord {
            time_unix_ms: 1_795_275_224_123,
            vm: "web1".into(),
            port: "web1".into(),
            direction: "ingress".into(),
            kind: kind.into(),
            reason: if kind == "new" { String::new() } else { "policy_denied".into() },
            rule: Some("web rule 2: ingress tcp drop log".into()),
            log: true,
            link: None,
            flow: Some(FlowView {
                protocol_number: 6,
                src: [10, 0, 0, 1].into(),
                dst: [10, 0, 0, 2].into(),
                sport: Some(40_000),
                dport: Some(23),
                icmp: None,
                zone: 7,
            }),
        }
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(timestamp(1_709_251_199_999), "2024-02-29T23:59:59.999Z");
        assert_eq!(timestamp(4_102_444_800_000), "2100-01-01T00:00:00.000Z");
    }

    #[test]
    fn the_file_has_one_object_per_line_and_counts_what_the_rate_holds_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.jsonl");
        let start = Instant::now();
        let mut log = FlowLog::new(start);
        let config = FlowLogConfig {
            enabled: true,
            to: FlowLogTarget::File,
            file: Some(path.clone()),
            per_second: 10,
            burst: 2,
            ..FlowLogConfig::default()
        };
        log.configure(&config).unwrap();
        log.write(&record("denied"), start);
        log.write(&record("new"), start);
        for _ in 0..5 {
            log.write(&record("denied"), start);
        }
        log.write(&record("denied"), start + Duration::from_millis(110));
        assert_eq!(log.counters(), FlowLogCounters { written: 3, lost: 5 });
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(
            lines[0],
            json!({"time": "2026-11-21T15:33:44.123Z", "event": "denied", "vm": "web1", "port": "web1", "direction": "ingress",
                   "reason": "policy_denied", "rule": "web rule 2: ingress tcp drop log", "protocol": "tcp", "src": "10.0.0.1",
                   "dst": "10.0.0.2", "sport": 40000, "dport": 23, "vlan": 7})
        );
        assert_eq!((&lines[1]["event"], &lines[2]["lines"]), (&json!("new"), &json!(5)));
        assert!(
            text.starts_with(r#"{"time":"2026-11-21T15:33:44.123Z","event":"denied","vm":"web1","port""#),
            "{text}"
        );
        assert_eq!(
            in_words(&line(&record("denied"))),
            "event=denied vm=web1 port=web1 direction=ingress reason=policy_denied \
             rule=\"web rule 2: ingress tcp drop log\" protocol=tcp src=10.0.0.1 dst=10.0.0.2 sport=40000 dport=23 vlan=7"
        );

        // Moved away by logrotate, opened again.
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        log.reopen().unwrap();
        log.write(&record("denied"), start + Duration::from_secs(9));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn only_what_is_wanted_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let now = Instant::now();
        let mut log = FlowLog::new(now);
        log.write(&record("denied"), now);
        let config = FlowLogConfig {
            enabled: true,
            to: FlowLogTarget::File,
            file: Some(path.clone()),
            new: false,
            scope: FlowLogScope::Marked,
            ..FlowLogConfig::default()
        };
        log.configure(&config).unwrap();
        log.write(&record("new"), now);
        log.write(&FirewallRecord { log: false, ..record("denied") }, now);
        log.set_silent(["web1".to_owned()].into());
        log.write(&record("denied"), now);
        assert_eq!(log.counters(), FlowLogCounters::default());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        log.set_silent(BTreeSet::new());
        log.configure(&FlowLogConfig { scope: FlowLogScope::All, ..config.clone() }).unwrap();
        log.write(&FirewallRecord { log: false, ..record("denied") }, now);
        assert_eq!(log.counters().written, 1);
        let bad = FlowLogConfig { file: Some("/nonexistent/dir/f".into()), ..config };
        assert!(log.configure(&bad).unwrap_err().contains("/nonexistent/dir/f"));
    }
}
