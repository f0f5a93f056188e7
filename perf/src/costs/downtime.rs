//! What migrating connections adds to a live migration: real QEMU guests, to and fro between two hosts.
//!
//! Two equal pairs of hosts run side by side, one with flow migration and one without, and their guests move in turn: of each
//! pair of migrations the two are seconds apart. In the end all connections of the guest with flow migration are tried.
use super::gauge;
use crate::results::Metric;
use anyhow::{Context, Result, ensure};
use ferry_tests::Scratch;
use ferry_tests::two_hosts::experiment::{Family, Load, Probe, Subject};
use ferry_tests::two_hosts::moving::{Migrated, Pace};
use ferry_tests::two_hosts::status::{Asker, now_ms};
use ferry_tests::two_hosts::{Plan, TwoHosts, VM};
use std::time::Duration;

/// Datagrams by which the peer measures its gap come so often.
const PROBE: Duration = Duration::from_millis(2);
/// Connections of each guest.
const CONNECTIONS: u32 = 10_000;

/// One migration.
#[derive(Clone, Debug, Default)]
struct Sample {
    /// QEMU's figure.
    qemu_downtime_ms: u64,
    /// From the stop of one side's processors to the start of the other's, milliseconds.
    stopped_ms: f64,
    /// Longest silence of an echo seen by the peer.
    peer_gap_ms: u64,
    /// How long QEMU waited for the switch.
    hold_ms: Option<f64>,
    /// From the VM's stop to the destination's acknowledgement.
    final_delta_ms: Option<f64>,
}

/// One of the clocks.
type Clock = fn(&Sample) -> f64;

/// Two migrations, seconds apart.
#[derive(Clone, Debug)]
struct Pair {
    with: Sample,
    without: Sample,
}

/// A pair of hosts and its guest.
struct Bench {
    scratch: Scratch,
    hosts: TwoHosts,
    subject: Option<Subject>,
}

impl Bench {
    fn new(flow_migration: bool, connections: u32) -> Result<Self> {
        let scratch = Scratch::new()?;
        // Late frames are redirected for less time than there is between two migrations of a guest.
        let plan =
            Plan { flow_migration, migration_keys: "redirect_ms = 500".into(), memory_mb: 192, ..Plan::default() };
        let hosts = TwoHosts::new(&scratch, plan)?;
        let subject = Subject::boot(&hosts, &scratch, &Load::full(connections))?;
        Ok(Self { scratch, hosts, subject: Some(subject) })
    }

    fn migrate(&mut self, flow_migration: bool) -> Result<Sample> {
        let Subject { guest, at, connections } = self.subject.take().context("no guest")?;
        let since_ms = now_ms();
        let probe = Probe::begin(&self.hosts, Family::V4, PROBE)?;
        let moving = self.hosts.begin(&self.scratch, guest, at.other(), Pace::default())?;
        let Migrated { guest, downtime_ms, stopped, .. } = moving.finish()?;
        self.hosts.wait_up(at.other())?;
        std::thread::sleep(Duration::from_millis(300));
        let peer_gap_ms = probe.end(&self.hosts)?.max_gap_us / 1000;
        let flow = if flow_migration {
            let flow = Asker::new(self.hosts.host(at)).ended(VM, since_ms)?;
            ensure!(flow.outcome == "migrated", "{flow:?}");
            flow
        } else {
            Default::default()
        };
        self.subject = Some(Subject { guest, at: at.other(), connections });
        Ok(Sample {
            qemu_downtime_ms: downtime_ms,
            stopped_ms: stopped.as_secs_f64() * 1000.0,
            peer_gap_ms,
            hold_ms: flow.hold_ms,
            final_delta_ms: flow.final_delta_ms,
        })
    }
}

/// So many pairs of live migrations of a guest with 10,000 established TCP connections, with flow migration and without, alternating: what
/// flow migration adds to the downtime, by three clocks, and its own parts. Each migration is printed. Boots guests; takes about 15 s per pair.
///
/// # Errors
/// When a guest does not boot or migrate, or a connection is lost.
pub fn downtime(pairs: usize) -> Result<Vec<Metric>> {
    let mut with = Bench::new(true, CONNECTIONS)?;
    let mut without = Bench::new(false, CONNECTIONS)?;
    println!("downtime, ms: QEMU's figure / stop to start / gap seen by the peer");
    println!("{:>4} {:>24} {:>24} {:>10} {:>12}", "pair", "with flow migration", "without", "hold", "final delta");
    let mut done = Vec::new();
    for n in 0..pairs.max(1) {
        // Which one goes first alternates, so that a drift of the machine harms neither.
        let (a, b) = if n.is_multiple_of(2) {
            let a = with.migrate(true)?;
            (a, without.migrate(false)?)
        } else {
            let b = without.migrate(false)?;
            (with.migrate(true)?, b)
        };
        let text = |s: &Sample| format!("{} / {:.2} / {}", s.qemu_downtime_ms, s.stopped_ms, s.peer_gap_ms);
        let ms = |v: Option<f64>| v.map_or_else(String::new, |v| format!("{v:.2}"));
        println!("{:>4} {:>24} {:>24} {:>10} {:>12}", n + 1, text(&a), text(&b), ms(a.hold_ms), ms(a.final_delta_ms));
        done.push(Pair { with: a, without: b });
    }
    let subject = with.subject.context("no guest")?;
    let alive = subject.connections.count_alive(&with.hosts, &subject.guest, Duration::from_secs(15))?;
    ensure!(alive == CONNECTIONS, "{alive} of {CONNECTIONS} connections are alive after {} migrations", done.len());
    let clocks: [(&str, Clock); 3] =
        [("QEMU", |s| s.qemu_downtime_ms as f64), ("stopped", |s| s.stopped_ms), ("peer", |s| s.peer_gap_ms as f64)];
    let mut metrics = Vec::new();
    for (clock, of) in clocks {
        let parts: [(&str, Vec<f64>); 3] = [
            ("with", done.iter().map(|p| of(&p.with)).collect()),
            ("without", done.iter().map(|p| of(&p.without)).collect()),
            ("added", done.iter().map(|p| of(&p.with) - of(&p.without)).collect()),
        ];
        for (what, values) in parts {
            metrics.extend(gauge(format!("downtime {clock} {what}"), "ms", false, &values));
        }
    }
    let hold: Vec<f64> = done.iter().filter_map(|p| p.with.hold_ms).collect();
    let delta: Vec<f64> = done.iter().filter_map(|p| p.with.final_delta_ms).collect();
    metrics.extend(gauge("downtime hold".into(), "ms", false, &hold));
    metrics.extend(gauge("downtime final delta".into(), "ms", false, &delta));
    Ok(metrics)
}
