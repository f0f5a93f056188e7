//! Migrations as text, for people. Pure functions of what the API tells, so that whoever has a view can show it in the same way.
use std::fmt::Write as _;

use ferry_migrate::audit::Report;
use ferry_migrate::pki::Utc;

use super::firewall::ago;
use super::table::{Table, state};
use crate::migration::view::{
    CheckView, EstimateView, ExpectedView, HostView, MigrationView, MigrationsView, QemuView, RoundView,
};

/// A number of bytes with a unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS.iter();
    let mut shown = unit.next().copied().unwrap_or_default();
    // What would be shown as 1024.0 has the next unit.
    while value >= 1023.95 {
        let Some(next) = unit.next() else { break };
        value /= 1024.0;
        shown = next;
    }
    format!("{value:.1} {shown}")
}

/// A time with a unit that suits it; milliseconds in.
pub fn time(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..100_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        100_000..7_200_000 => format!("{} min {} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

fn at(ms: u64) -> String {
    Utc(i64::try_from(ms / 1000).unwrap_or(i64::MAX)).to_string()
}

fn is_source(v: &MigrationView) -> bool {
    v.role == "source"
}

fn tenths(ms: Option<f64>) -> String {
    ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1}"))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.to_owned() }
}

/// "to host-b" or "from host-a", as far as it is known.
fn direction(v: &MigrationView) -> String {
    let peer = if v.peer.is_empty() { "another host" } else { &v.peer };
    if is_source(v) { format!("to {peer}") } else { format!("from {peer}") }
}

/// Connections that did not arrive as they were, if any.
fn losses(v: &MigrationView) -> String {
    let mut out = String::new();
    if v.refused_connections > 0 {
        let _ = write!(out, ", {} refused (not the VM's addresses)", v.refused_connections);
    }
    if v.dropped_connections > 0 {
        let _ = write!(out, ", {} without room", v.dropped_connections);
    }
    out
}

/// One round in one line: `round 1: 120 records (100 changed, 20 deleted), 12.0 KiB in 3 ms`.
pub fn round_line(v: &MigrationView, r: &RoundView) -> String {
    let name = if r.last { "final delta".to_owned() } else { format!("round {}", r.round) };
    let end = format!("{} in {}", bytes(r.bytes), time(r.duration_ms));
    if !is_source(v) {
        return format!("{name}: {} connections staged, {end}", r.entries);
    }
    let parts = [(r.changed, "changed"), (r.deleted, "deleted"), (r.lagging, "lagging"), (r.held_back, "held back")];
    let parts: Vec<String> = parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    let parts = if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) };
    format!("{name}: {} records{parts}, {end}", r.entries)
}

/// How a migration ended, in one line; what is known of one that has not.
pub fn end_line(v: &MigrationView) -> String {
    let mut out = match v.outcome.as_str() {
        "" => format!("under way {}: {}", direction(v), v.state),
        "migrated" => format!("migrated {}: {} connections", direction(v), v.connections),
        outcome => format!("{outcome}: {}", if v.text.is_empty() { "no reason given" } else { &v.text }),
    };
    if v.outcome == "migrated" {
        out += &losses(v);
        for (what, ms) in [("final delta", v.final_delta_ms), ("QEMU held", v.hold_ms)] {
            if let Some(ms) = ms {
                let _ = write!(out, ", {what} {ms:.1} ms");
            }
        }
        if let Some(downtime) = v.qemu.as_ref().and_then(|q| q.downtime_ms) {
            let _ = write!(out, ", QEMU's downtime {downtime} ms");
        }
        if let Some(began) = &v.began {
            let _ = write!(out, ", began {}", began_text(began));
        }
        if v.late_frames > 0 {
            let _ = write!(out, ", {} late frames", v.late_frames);
        }
    }
    out
}

/// How the VM began at the destination, in words.
fn began_text(began: &str) -> String {
    match began {
        "complete" => "with all connections".into(),
        "lagging" => "with all connections, some of older windows and counters".into(),
        "partial" => "with those connections that had arrived".into(),
        "empty" => "without connections".into(),
        "unconfirmed" => "(not confirmed)".into(),
        other => other.to_owned(),
    }
}

/// How long a migration will still take, milliseconds: by what QEMU says of the memory that is left; else, for the first round, by how fast
/// it has gone so far. `None`: nobody knows.
pub fn eta_ms(v: &MigrationView, now_ms: u64) -> Option<u64> {
    if !v.outcome.is_empty() || v.state != "pre-copy" {
        return None;
    }
    if let Some(q) = &v.qemu
        && let (Some(left), Some(mbps)) = (q.remaining_bytes, q.mbps)
        && mbps > 0.0
    {
        return Some((left as f64 * 8.0 / (mbps * 1000.0)) as u64);
    }
    let left = v.estimate.as_ref()?.walk_left;
    let done = v.connections.checked_sub(left).filter(|done| *done > 0 && left > 0)?;
    let elapsed_ms = now_ms.checked_sub(v.began_at_ms)?;
    u64::try_from(u128::from(elapsed_ms) * u128::from(left) / u128::from(done)).ok()
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Share of the connections of which the other host has the present state, 0 to 1; `None` where it cannot be told.
    pub share: Option<f64>,
    /// The same in words.
    pub text: String,
}

/// How far a migration that is under way is.
pub fn progress(v: &MigrationView, now_ms: u64) -> Progress {
    if !is_source(v) {
        let text = format!("{}: {} connections staged {}", v.state, v.connections, direction(v));
        return Progress { share: None, text };
    }
    let Some(e) = v.estimate.as_ref().filter(|_| v.state == "pre-copy") else {
        let share = matches!(v.state.as_str(), "frozen" | "redirecting" | "gone").then_some(1.0);
        return Progress { share, text: format!("{}: {}", v.state, or_dash(&v.text)) };
    };
    let left = e.walk_left.max(e.entries_left).min(v.connections);
    let share = if v.connections == 0 { 1.0 } else { 1.0 - left as f64 / v.connections as f64 };
    let round = v.rounds.last().map_or(0, |r| r.round + 1);
    // What matters most comes first: a narrow terminal cuts the end off.
    let eta = eta_ms(v, now_ms).map(|ms| format!(", ETA {}", time(ms))).unwrap_or_default();
    Progress { share: Some(share), text: format!("round {round}{eta}: {}", estimate_text(e)) }
}

fn estimate_text(e: &EstimateView) -> String {
    let mut out = if e.walk_left > 0 {
        format!("{} connections not sent yet", e.walk_left)
    } else {
        format!("{} records ({}) left", e.entries_left, bytes(e.bytes_left))
    };
    let _ = write!(out, ", {} changes/s", e.dirty_per_s);
    if e.final_ms > 0 {
        let _ = write!(out, ", final delta about {} ({})", time(e.final_ms), bytes(e.final_bytes));
    }
    out
}

fn qemu_text(q: &QemuView) -> String {
    let mut out = format!("QEMU: {}, memory round {}", or_dash(&q.status), q.pass);
    out += if q.agrees { " (as seen in the dirty log)" } else { " (differs from the dirty log)" };
    if let Some(left) = q.remaining_bytes {
        let _ = write!(out, ", {} of memory left", bytes(left));
    }
    if let Some(mbps) = q.mbps {
        let _ = write!(out, " at {mbps:.0} Mbit/s");
    }
    match (q.downtime_ms, q.expected_downtime_ms) {
        (Some(ms), _) => {
            let _ = write!(out, ", downtime {ms} ms");
        }
        (None, Some(ms)) => {
            let _ = write!(out, ", downtime expected {ms} ms");
        }
        (None, None) => {}
    }
    if let Some(limit) = q.downtime_limit_ms {
        let _ = write!(out, " (limit {limit} ms)");
    }
    if let Some(problem) = &q.problem {
        let _ = write!(out, "; the monitor is of no use: {problem}");
    }
    out
}

/// Rounds as a table.
pub fn rounds(v: &MigrationView) -> String {
    let name = |r: &RoundView| if r.last { "final".to_owned() } else { r.round.to_string() };
    if !is_source(v) {
        let mut t = Table::new(&["ROUND", "STAGED", "BYTES", "MS"]);
        for r in &v.rounds {
            t.row([name(r), r.entries.to_string(), r.bytes.to_string(), r.duration_ms.to_string()]);
        }
        return t.render();
    }
    let mut t = Table::new(&["ROUND", "RECORDS", "CHANGED", "DELETED", "LAGGING", "HELD BACK", "BYTES", "MS"]);
    for r in &v.rounds {
        let numbers = [r.entries, r.changed, r.deleted, r.lagging, r.held_back, r.bytes, r.duration_ms];
        t.row([name(r)].into_iter().chain(numbers.iter().map(u64::to_string)));
    }
    t.render()
}

/// Everything about one migration.
pub fn details(v: &MigrationView, now_ms: u64, colours: bool) -> String {
    let mut out = String::new();
    let is = if v.outcome.is_empty() { &v.state } else { &v.outcome };
    let _ = writeln!(out, "VM {}: {} {}: {}", v.vm, or_dash(&v.role), direction(v), state(is, colours));
    if !v.text.is_empty() {
        let _ = writeln!(out, "  {}", v.text);
    }
    let _ = write!(out, "  began {} ({} ago)", at(v.began_at_ms), ago(now_ms.saturating_sub(v.began_at_ms)));
    if let Some(ended) = v.ended_at_ms {
        let _ = write!(out, ", took {}", time(ended.saturating_sub(v.began_at_ms)));
    }
    let _ = writeln!(out, ", attempt {}, id {}", v.attempt, or_dash(&v.id));
    let compressed = if v.wire_bytes == v.raw_bytes {
        String::new()
    } else {
        format!(" ({} before compression)", bytes(v.raw_bytes))
    };
    let _ = writeln!(
        out,
        "  {} connections{}; {} on the wire{compressed}; {} memory rounds",
        v.connections,
        losses(v),
        bytes(v.wire_bytes),
        v.memory_rounds
    );
    if let Some(e) = &v.estimate {
        let eta = eta_ms(v, now_ms).map(|ms| format!(", ETA {}", time(ms))).unwrap_or_default();
        let _ = writeln!(out, "  {}{eta}", estimate_text(e));
    }
    if let Some(q) = &v.qemu {
        let _ = writeln!(out, "  {}", qemu_text(q));
    }
    if v.final_delta_ms.is_some() || v.hold_ms.is_some() {
        let _ = writeln!(
            out,
            "  final delta: {} ms from the VM's stop to its acknowledgement; QEMU was held {} ms",
            tenths(v.final_delta_ms),
            tenths(v.hold_ms)
        );
    }
    if let Some(began) = &v.began {
        let _ = writeln!(out, "  the VM began {}", began_text(began));
    }
    if v.late_frames > 0 {
        let _ =
            writeln!(out, "  {} late frames {}", v.late_frames, if is_source(v) { "redirected" } else { "delivered" });
    }
    if !v.rounds.is_empty() {
        out.push('\n');
        out += &rounds(v);
    }
    out
}

/// `ferry migrate status`: this host, the latest migration of each VM, and who is expected.
pub fn overview(host: &HostView, all: &MigrationsView, now_ms: u64, colours: bool) -> String {
    let mut out = String::new();
    let _ = write!(
        out,
        "host {}: migrations {}",
        or_dash(&host.host),
        if host.enabled { "enabled" } else { "switched off" }
    );
    if host.enabled {
        match &host.listen {
            Some(listen) => {
                let _ = write!(out, ", listening on {listen}");
            }
            None => out += ", not listening: VMs only leave",
        }
        if let Some(days) = host.certificate_days_left {
            let _ = write!(out, ", certificate valid for {days} day(s)");
        }
    }
    out.push('\n');
    if host.enabled {
        let peers: Vec<String> = host.peers.iter().map(|(name, address)| format!("{name} ({address})")).collect();
        let _ = writeln!(out, "peers: {}", if peers.is_empty() { "none".into() } else { peers.join(", ") });
        let lost = match host.audit_lost_lines {
            0 => String::new(),
            n => format!(", {n} could not be written"),
        };
        let _ = writeln!(out, "audit log: {} line(s){lost}", host.audit_lines);
    }
    if !host.refused.is_empty() {
        let reasons: Vec<String> = host.refused.iter().map(|(why, n)| format!("{why} {n}")).collect();
        let _ = writeln!(out, "connections refused: {}", reasons.join(", "));
    }
    for problem in &host.problems {
        let _ = writeln!(out, "{}: {problem}", state("problem", colours));
    }
    if !all.migrations.is_empty() {
        out.push('\n');
        out += &latest(&all.migrations, now_ms, colours);
    }
    if !all.expected.is_empty() {
        out.push('\n');
        let mut t = Table::new(&["EXPECTED", "FROM", "FOR"]);
        for e in &all.expected {
            let from = e.from.clone().unwrap_or_else(|| "any that rules allow".into());
            t.row([e.vm.clone(), from, time(e.until_ms.saturating_sub(now_ms))]);
        }
        out += &t.render();
    }
    out
}

fn latest(all: &[MigrationView], now_ms: u64, colours: bool) -> String {
    let heads = ["VM", "ROLE", "PEER", "BEGAN", "STATE", "ROUNDS", "CONNECTIONS", "SENT", "NOW"];
    let mut t = Table::new(&heads);
    for v in all {
        let now = match v.outcome.as_str() {
            "" => progress(v, now_ms).text,
            "migrated" => end_line(v),
            _ => v.text.clone(),
        };
        t.row([
            v.vm.clone(),
            or_dash(&v.role),
            or_dash(&v.peer),
            format!("{} ago", ago(now_ms.saturating_sub(v.began_at_ms))),
            state(if v.outcome.is_empty() { &v.state } else { &v.outcome }, colours),
            v.rounds.len().to_string(),
            v.connections.to_string(),
            bytes(v.wire_bytes),
            or_dash(&now),
        ]);
    }
    t.render()
}

/// `ferry migrate list`: one line per migration.
pub fn history(all: &[MigrationView], colours: bool) -> String {
    let heads = [
        "BEGAN",
        "VM",
        "ROLE",
        "PEER",
        "ROUNDS",
        "RECORDS",
        "SENT",
        "FINAL MS",
        "HELD MS",
        "CONNECTIONS",
        "BEGAN AS",
        "OUTCOME",
        "",
    ];
    let mut t = Table::new(&heads);
    for v in all {
        let records = match is_source(v) {
            true => v.rounds.iter().map(|r| r.entries).sum::<u64>().to_string(),
            false => "-".into(),
        };
        let outcome = if v.outcome.is_empty() { "under way" } else { &v.outcome };
        t.row([
            at(v.began_at_ms),
            v.vm.clone(),
            or_dash(&v.role),
            or_dash(&v.peer),
            v.rounds.len().to_string(),
            records,
            bytes(v.wire_bytes),
            tenths(v.final_delta_ms),
            tenths(v.hold_ms),
            v.connections.to_string(),
            v.began.clone().unwrap_or_else(|| "-".into()),
            state(outcome, colours),
            if matches!(v.outcome.as_str(), "" | "migrated") { String::new() } else { v.text.clone() },
        ]);
    }
    t.render()
}

/// `ferry migrate check`: each item with its verdict, the remedy below it, the sum at the end.
pub fn check(c: &CheckView, colours: bool) -> String {
    let mut t = Table::new(&["VERDICT", "WHAT", "FOUND"]);
    for item in &c.items {
        t.row([state(&item.verdict, colours), item.what.clone(), item.found.clone()]);
        if !item.fix.is_empty() {
            t.row([String::new(), String::new(), format!("fix: {}", item.fix)]);
        }
    }
    let mut out = t.render();
    let _ = writeln!(out, "{}", check_sum(c));
    out
}

/// What a check comes to, in one line.
pub fn check_sum(c: &CheckView) -> String {
    let count = |verdict: &str| c.items.iter().filter(|i| i.verdict == verdict).count();
    let warnings = match count("warning") {
        0 => String::new(),
        n => format!("; {n} warning(s)"),
    };
    match c.ok {
        true => format!("VM {} can migrate to {}{warnings}", c.vm, c.to),
        false => {
            let (failed, all) = (count("failed"), c.items.len());
            format!("VM {} cannot migrate to {}: {failed} of {all} checks failed{warnings}", c.vm, c.to)
        }
    }
}

/// `ferry migrate expect`
pub fn expected(e: &ExpectedView, now_ms: u64) -> String {
    let from = e.from.as_ref().map_or_else(|| "any host that the rules allow".to_owned(), |from| from.clone());
    format!(
        "VM {} is expected from {from} until {} (for {})\n",
        e.vm,
        at(e.until_ms),
        time(e.until_ms.saturating_sub(now_ms))
    )
}

/// `ferry migrate audit`
pub fn audit(r: &Report) -> String {
    let mut out = String::new();
    for p in &r.problems {
        let _ = writeln!(out, "{p}");
    }
    if r.more_problems > 0 {
        let _ = writeln!(out, "and {} more problem(s)", r.more_problems);
    }
    let range = match (r.first_sequence, r.last) {
        (Some(first), Some(last)) => format!(", numbers {first} to {}", last.sequence),
        _ => String::new(),
    };
    let verdict = if r.is_intact() { "intact" } else { "NOT as it was written" };
    let _ = writeln!(out, "{verdict}: {} line(s) in {} file(s){range}", r.lines, r.files.len());
    if r.lost_lines > 0 {
        let _ = writeln!(out, "{} line(s) could not be written when they were due, says the log itself", r.lost_lines);
    }
    out
}

/// Turns what is seen of a migration from time to time into lines about what is new.
#[derive(Debug, Default)]
pub struct Follower {
    seen: Option<MigrationView>,
    /// The last round that was told of.
    round: Option<u32>,
}

impl Follower {
    /// What was seen last.
    pub fn seen(&self) -> Option<&MigrationView> {
        self.seen.as_ref()
    }

    /// Lines about what is new since the last view: the beginning, rounds that have ended, a new state, the end.
    pub fn news(&mut self, v: &MigrationView) -> Vec<String> {
        let mut lines = Vec::new();
        let before = self.seen.replace(v.clone());
        let before = before.filter(|b| b.began_at_ms == v.began_at_ms && b.role == v.role);
        match &before {
            None => {
                self.round = None;
                let verb = if is_source(v) { "goes" } else { "comes" };
                lines.push(format!("VM {} {verb} {}, began {}", v.vm, direction(v), at(v.began_at_ms)));
            }
            Some(b) => {
                if b.peer.is_empty() && !v.peer.is_empty() {
                    lines.push(format!("the other host is {}", v.peer));
                }
                if b.attempt != v.attempt && b.attempt > 0 {
                    // All over again, the rounds too.
                    self.round = None;
                    lines.push(format!("the channel is set up again: attempt {}", v.attempt));
                }
            }
        }
        for r in &v.rounds {
            if self.round.is_none_or(|told| r.round > told) {
                self.round = Some(r.round);
                lines.push(round_line(v, r));
            }
        }
        if before.as_ref().is_none_or(|b| b.state != v.state) {
            lines.extend(state_line(v).map(str::to_owned));
        }
        if !v.outcome.is_empty() && before.is_none_or(|b| b.outcome != v.outcome) {
            lines.push(end_line(v));
        }
        lines
    }
}

/// What it means that a migration has come to its state, where that is worth a line.
fn state_line(v: &MigrationView) -> Option<&'static str> {
    match v.state.as_str() {
        "frozen" => Some("the VM has stopped"),
        "redirecting" => Some("handed over; late frames are redirected"),
        "committed" => Some("all has arrived; waiting for the VM"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A view as the API sends it.
    fn view(value: serde_json::Value) -> MigrationView {
        serde_json::from_value(value).unwrap()
    }

    fn under_way() -> MigrationView {
        view(json!({
            "vm": "web1", "id": "0123456789abcdef0123456789abcdef", "role": "source", "state": "pre-copy", "peer": "host-b",
            "attempt": 1, "began_at_ms": 1_795_000_000_000_u64, "connections": 10_000,
            "rounds": [
                {"round": 0, "entries": 10_000, "changed": 10_000, "bytes": 1_160_000, "duration_ms": 85},
                {"round": 1, "entries": 120, "changed": 100, "deleted": 20, "held_back": 7, "bytes": 12_288, "duration_ms": 3},
            ],
            "estimate": {"entries_left": 500, "bytes_left": 51_200, "dirty_per_s": 400, "final_entries": 900, "final_bytes": 2048, "final_ms": 2},
            "wire_bytes": 600_000, "raw_bytes": 1_172_288, "memory_rounds": 2,
            "qemu": {"status": "active", "pass": 2, "agrees": true, "remaining_bytes": 104_857_600, "mbps": 800.0, "downtime_limit_ms": 300},
        }))
    }

    fn migrated() -> MigrationView {
        let mut v = under_way();
        v.estimate = None;
        v.rounds.push(RoundView {
            round: 2,
            last: true,
            entries: 900,
            lagging: 800,
            changed: 100,
            bytes: 2048,
            duration_ms: 2,
            ..RoundView::default()
        });
        v.state = "gone".into();
        v.outcome = "migrated".into();
        v.text = "all connections have arrived".into();
        v.ended_at_ms = Some(v.began_at_ms + 12_345);
        (v.final_delta_ms, v.hold_ms, v.began, v.late_frames) = (Some(2.25), Some(4.5), Some("complete".into()), 3);
        v
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(
            [0, 1023, 1024, 1_048_575, 1_048_576, 5 << 40].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "5.0 TiB"]
        );
        assert_eq!(
            [0, 9999, 12_345, 600_000, 7_260_000].map(time),
            ["0 ms", "9999 ms", "12.3 s", "10 min 0 s", "2 h 1 min"]
        );
    }

    #[test]
    fn a_migration_is_followed_by_lines_about_what_is_new() {
        let mut follower = Follower::default();
        let mut v = under_way();
        let rounds = std::mem::take(&mut v.rounds);
        v.peer.clear();
        v.attempt = 0;
        assert_eq!(follower.news(&v), ["VM web1 goes to another host, began 2026-11-18 11:06:40 UTC"]);
        v.peer = "host-b".into();
        v.attempt = 1;
        assert_eq!(follower.news(&v), ["the other host is host-b"]);
        v.rounds = rounds;
        assert_eq!(
            follower.news(&v),
            [
                "round 0: 10000 records (10000 changed), 1.1 MiB in 85 ms",
                "round 1: 120 records (100 changed, 20 deleted, 7 held back), 12.0 KiB in 3 ms"
            ]
        );
        assert!(follower.news(&v).is_empty());
        v.state = "frozen".into();
        assert_eq!(follower.news(&v), ["the VM has stopped"]);
        // The channel broke; the next attempt counts its rounds from 0 again.
        v.attempt = 2;
        v.state = "pre-copy".into();
        v.rounds.truncate(1);
        assert_eq!(
            follower.news(&v),
            ["the channel is set up again: attempt 2", "round 0: 10000 records (10000 changed), 1.1 MiB in 85 ms"]
        );
        let mut end = migrated();
        end.attempt = 2;
        assert_eq!(
            follower.news(&end),
            [
                "round 1: 120 records (100 changed, 20 deleted, 7 held back), 12.0 KiB in 3 ms",
                "final delta: 900 records (100 changed, 800 lagging), 2.0 KiB in 2 ms",
                "migrated to host-b: 10000 connections, final delta 2.2 ms, QEMU held 4.5 ms, began with all connections, 3 late frames"
            ]
        );
        // The next migration of the same VM begins anew.
        let mut next = under_way();
        next.began_at_ms += 60_000;
        assert_eq!(follower.news(&next).len(), 3);
    }

    #[test]
    fn the_destination_tells_what_it_has() {
        let v = view(json!({
            "vm": "web1", "role": "destination", "state": "staging", "peer": "host-a", "connections": 9000,
            "rounds": [{"round": 0, "entries": 9000, "bytes": 2048, "duration_ms": 85}],
        }));
        let mut follower = Follower::default();
        assert_eq!(
            follower.news(&v)[..],
            [
                "VM web1 comes from host-a, began 1970-01-01 00:00:00 UTC",
                "round 0: 9000 connections staged, 2.0 KiB in 85 ms"
            ]
        );
        assert_eq!(
            progress(&v, 0),
            Progress { share: None, text: "staging: 9000 connections staged from host-a".into() }
        );
        assert_eq!(rounds(&v), "ROUND  STAGED  BYTES  MS\n    0    9000   2048  85\n");
        let mut v = v;
        (v.outcome, v.refused_connections, v.dropped_connections) = ("migrated".into(), 2, 1);
        v.began = Some("lagging".into());
        assert_eq!(
            end_line(&v),
            "migrated from host-a: 9000 connections, 2 refused (not the VM's addresses), 1 without room, began with all connections, \
             some of older windows and counters"
        );
    }

    #[test]
    fn progress_and_eta() {
        let mut v = under_way();
        let now_ms = v.began_at_ms + 2000;
        assert_eq!(
            progress(&v, now_ms),
            Progress {
                share: Some(0.95),
                text:
                    "round 2, ETA 1048 ms: 500 records (50.0 KiB) left, 400 changes/s, final delta about 2 ms (2.0 KiB)"
                        .into()
            }
        );
        // Without a monitor the first round tells by its own speed, later ones not at all.
        v.qemu = None;
        assert_eq!(eta_ms(&v, now_ms), None);
        v.rounds.clear();
        v.estimate = Some(EstimateView { walk_left: 7500, ..EstimateView::default() });
        assert_eq!(eta_ms(&v, now_ms), Some(6000));
        let p = progress(&v, now_ms);
        assert_eq!(
            (p.share, p.text.as_str()),
            (Some(0.25), "round 0, ETA 6000 ms: 7500 connections not sent yet, 0 changes/s")
        );
        for odd in [0, 10_000, 10_001, u64::MAX] {
            v.estimate = Some(EstimateView { walk_left: odd, ..EstimateView::default() });
            assert_eq!(eta_ms(&v, now_ms), None, "{odd}");
            assert!((0.0..=1.0).contains(&progress(&v, now_ms).share.unwrap()));
        }
        v.connections = 0;
        assert_eq!(progress(&v, now_ms).share, Some(1.0));
        v.state = "frozen".into();
        assert_eq!(progress(&v, now_ms), Progress { share: Some(1.0), text: "frozen: -".into() });
    }

    #[test]
    fn details_of_one_migration() {
        assert_eq!(
            details(&migrated(), 1_795_000_060_000, false),
            "VM web1: source to host-b: migrated\n  all connections have arrived\n  \
             began 2026-11-18 11:06:40 UTC (1min ago), took 12.3 s, attempt 1, id 0123456789abcdef0123456789abcdef\n  \
             10000 connections; 585.9 KiB on the wire (1.1 MiB before compression); 2 memory rounds\n  \
             QEMU: active, memory round 2 (as seen in the dirty log), 100.0 MiB of memory left at 800 Mbit/s (limit 300 ms)\n  \
             final delta: 2.2 ms from the VM's stop to its acknowledgement; QEMU was held 4.5 ms\n  \
             the VM began with all connections\n  3 late frames redirected\n\n\
             ROUND  RECORDS  CHANGED  DELETED  LAGGING  HELD BACK    BYTES  MS\n\
             0        10000    10000        0        0          0  1160000  85\n\
             1          120      100       20        0          7    12288   3\n\
             final      900      100        0      800          0     2048   2\n"
        );
    }

    #[test]
    fn history_is_a_line_each() {
        let mut failed = under_way();
        failed.outcome = "failed".into();
        failed.text = "host-b refuses: no rule fits".into();
        let text = history(&[migrated(), failed, under_way()], false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "BEGAN                    VM    ROLE    PEER    ROUNDS  RECORDS  SENT       FINAL MS  HELD MS  CONNECTIONS  BEGAN AS  OUTCOME",
                "2026-11-18 11:06:40 UTC  web1  source  host-b       3    11020  585.9 KiB       2.2      4.5        10000  complete  migrated",
                "2026-11-18 11:06:40 UTC  web1  source  host-b       2    10120  585.9 KiB         -        -        10000  -         failed     host-b refuses: no rule fits",
                "2026-11-18 11:06:40 UTC  web1  source  host-b       2    10120  585.9 KiB         -        -        10000  -         under way",
            ]
        );
    }

    #[test]
    fn the_overview_names_host_problems_vms_and_who_is_expected() {
        let host: HostView = serde_json::from_value(json!({
            "enabled": true, "host": "host-a", "listen": "192.0.2.1:9478", "certificate_days_left": 396,
            "peers": [["host-b", "192.0.2.2:9478"]], "refused": [["certificate", 3]], "audit_lines": 12, "audit_lost_lines": 1,
            "problems": ["the certificate of host-b expired"],
        }))
        .unwrap();
        let all = MigrationsView {
            migrations: vec![migrated()],
            expected: vec![ExpectedView {
                vm: "web2".into(),
                from: Some("host-b".into()),
                until_ms: 1_795_000_660_000,
            }],
        };
        assert_eq!(
            overview(&host, &all, 1_795_000_060_000, false),
            "host host-a: migrations enabled, listening on 192.0.2.1:9478, certificate valid for 396 day(s)\n\
             peers: host-b (192.0.2.2:9478)\n\
             audit log: 12 line(s), 1 could not be written\n\
             connections refused: certificate 3\n\
             problem: the certificate of host-b expired\n\n\
             VM    ROLE    PEER    BEGAN     STATE     ROUNDS  CONNECTIONS  SENT       NOW\n\
             web1  source  host-b  1min ago  migrated       3        10000  585.9 KiB  migrated to host-b: 10000 connections, \
             final delta 2.2 ms, QEMU held 4.5 ms, began with all connections, 3 late frames\n\n\
             EXPECTED  FROM    FOR\nweb2      host-b  10 min 0 s\n"
        );
        assert_eq!(
            overview(&HostView::default(), &MigrationsView::default(), 0, false),
            "host -: migrations switched off\n"
        );
        assert_eq!(
            expected(&all.expected[0], 1_795_000_060_000),
            "VM web2 is expected from host-b until 2026-11-18 11:17:40 UTC (for 10 min 0 s)\n"
        );
    }

    #[test]
    fn a_check_says_what_would_fail_and_how_to_fix_it() {
        let mut c: CheckView = serde_json::from_value(json!({
            "vm": "web1", "to": "host-b", "ok": false, "items": [
                {"what": "certificate", "verdict": "ok", "found": "host-b, 396 days left"},
                {"what": "capacity", "verdict": "warning", "found": "room for 1000", "fix": "raise connections"},
                {"what": "port web1-1", "verdict": "failed", "found": "MTU 1500 here, 9000 there", "fix": "set mtu = 1500 on host-b"},
            ],
        }))
        .unwrap();
        assert_eq!(
            check(&c, false),
            "VERDICT  WHAT         FOUND\n\
             ok       certificate  host-b, 396 days left\n\
             warning  capacity     room for 1000\n                      fix: raise connections\n\
             failed   port web1-1  MTU 1500 here, 9000 there\n                      fix: set mtu = 1500 on host-b\n\
             VM web1 cannot migrate to host-b: 1 of 3 checks failed; 1 warning(s)\n"
        );
        c.items.pop();
        c.ok = true;
        assert_eq!(check_sum(&c), "VM web1 can migrate to host-b; 1 warning(s)");
        assert!(check(&c, true).contains("\x1b[32mok\x1b[0m"));
    }
}
