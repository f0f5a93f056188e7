//! What was denied lately, per VM: bounded, and one line for what differs in its source port alone.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::record::{FirewallRecord, FlowView};

/// Most lines kept per VM; beyond them the one that was silent for longest goes.
pub const MAX_LINES_PER_VM: usize = 512;

/// Denials that are told apart by nothing but their source port and time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropLine {
    /// The VM.
    pub vm: String,
    /// Port of the last one.
    pub port: String,
    /// `ingress` (towards the VM) or `egress`.
    pub direction: String,
    /// `denied`, `rejected`, `spoofed`, `limited`, `invalid` ...
    pub kind: String,
    /// The reason by name, as in counters.
    pub reason: String,
    /// The rule that decided, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// MAC addresses and EtherType, of frames without IP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Addresses and destination port; absent when the frames have no IP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowView>,
    /// How many were reported.
    pub count: u64,
    /// When the first one was, milliseconds since 1970-01-01 UTC.
    pub first_unix_ms: u64,
    /// When the last one was.
    pub last_unix_ms: u64,
    /// Source port of the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sport: Option<u16>,
}

type Key = (String, String, String, Option<String>, Option<String>, Option<FlowView>);

/// The history of all VMs.
#[derive(Debug, Default)]
pub struct History {
    vms: BTreeMap<String, BTreeMap<Key, DropLine>>,
}

impl History {
    /// Nothing denied yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a denial; other records are none of the history's business.
    pub fn note(&mut self, record: &FirewallRecord) {
        if record.is_new() {
            return;
        }
        let lines = self.vms.entry(record.vm.clone()).or_default();
        let flow = record.flow.as_ref().map(FlowView::without_ephemeral);
        let key = (
            record.direction.clone(),
            record.kind.clone(),
            record.reason.clone(),
            record.rule.clone(),
            record.link.clone(),
            flow.clone(),
        );
        if !lines.contains_key(&key) && lines.len() >= MAX_LINES_PER_VM {
            let oldest = lines.iter().min_by_key(|(_, l)| l.last_unix_ms).map(|(k, _)| k.clone());
            if let Some(k) = oldest {
                lines.remove(&k);
            }
        }
        let line = lines.entry(key).or_insert_with(|| DropLine {
            vm: record.vm.clone(),
            port: record.port.clone(),
            direction: record.direction.clone(),
            kind: record.kind.clone(),
            reason: record.reason.clone(),
            rule: record.rule.clone(),
            link: record.link.clone(),
            flow,
            count: 0,
            first_unix_ms: record.time_unix_ms,
            last_unix_ms: record.time_unix_ms,
            last_sport: None,
        });
        line.count += 1;
        line.last_unix_ms = line.last_unix_ms.max(record.time_unix_ms);
        line.port.clone_from(&record.port);
        line.last_sport = record.flow.as_ref().and_then(|f| f.sport);
    }

    /// The lines of one VM, or of all; the latest first.
    pub fn lines(&self, vm: Option<&str>) -> Vec<DropLine> {
        let wanted = self.vms.iter().filter(|(name, _)| vm.is_none_or(|vm| vm == name.as_str()));
        let mut out: Vec<DropLine> = wanted.flat_map(|(_, lines)| lines.values().cloned()).collect();
        out.sort_by(|a, b| b.last_unix_ms.cmp(&a.last_unix_ms).then_with(|| b.count.cmp(&a.count)));
        out
    }

    /// Forgets VMs that `exists` does not know.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.vms.retain(|name, _| exists(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(time: u64, vm: &str, reason: &str, sport: u16, dst: u8) -> FirewallRecord {
        FirewallRecord {
            time_unix_ms: time,
            vm: vm.into(),
            port: "p".into(),
            direction: "ingress".into(),
            kind: "denied".into(),
            reason: reason.into(),
            rule: None,
            log: false,
            link: None,
            flow: Some(FlowView {
                protocol_number: 6,
                src: [10, 0, 0, 1].into(),
                dst: [10, 0, 0, dst].into(),
                sport: Some(sport),
                dport: Some(23),
                icmp: None,
                zone: 0,
            }),
        }
    }

    #[test]
    fn attempts_that_differ_in_their_source_port_are_one_line() {
        let mut h = History::new();
        for i in 0..10 {
            h.note(&record(100 + u64::from(i), "a", "policy", 40_000 + i, 2));
        }
        h.note(&record(50, "b", "policy", 1, 2));
        h.note(&record(300, "a", "limit_rate", 1, 2));
        h.note(&FirewallRecord { kind: "new".into(), ..record(400, "a", "", 1, 2) });
        let lines = h.lines(Some("a"));
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].reason.as_str(), lines[0].count), ("limit_rate", 1), "the latest first");
        assert_eq!((lines[1].count, lines[1].first_unix_ms, lines[1].last_unix_ms), (10, 100, 109));
        assert_eq!((lines[1].last_sport, lines[1].flow.as_ref().unwrap().sport), (Some(40_009), None));
        assert_eq!(h.lines(None).len(), 3);
        h.retain(|vm| vm == "b");
        assert_eq!(h.lines(None).len(), 1);
    }

    #[test]
    fn the_history_is_bounded_and_forgets_what_is_oldest() {
        let mut h = History::new();
        for i in 0..2000u64 {
            let reason = format!("r{i}");
            h.note(&record(i, "a", &reason, 1, 2));
            h.note(&record(i, "a", "r0", 1, 2));
        }
        let lines = h.lines(None);
        assert_eq!(lines.len(), MAX_LINES_PER_VM);
        assert!(lines.iter().any(|l| l.reason == "r0" && l.count == 2001), "what goes on is kept");
        assert!(lines.iter().all(|l| l.last_unix_ms >= 2000 - MAX_LINES_PER_VM as u64));
    }
}
