//! What migrating connections costs: pairs of live migrations of a guest with 10,000 established TCP connections, with flow migration and
//! without, alternating; medians of the downtime and their difference. As text, and as JSON in the file given by `--json`.
//!
//! Two equal pairs of hosts run side by side, one with flow migration and one without, and their guests move to and fro in turn: of each
//! pair of migrations the two are seconds apart. In the end all connections of the guest with flow migration are tried.
use anyhow::{Context, Result, bail, ensure};
use ferry_tests::Scratch;
use ferry_tests::two_hosts::experiment::{Family, Load, Probe, Subject};
use ferry_tests::two_hosts::moving::{Migrated, Pace};
use ferry_tests::two_hosts::status::{Asker, now_ms};
use ferry_tests::two_hosts::{Plan, TwoHosts, VM};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Datagrams by which the peer measures its gap come so often.
const PROBE: Duration = Duration::from_millis(2);

/// One migration.
#[derive(Clone, Debug, Default, Serialize)]
struct Sample {
    /// QEMU's figure.
    qemu_downtime_ms: u64,
    /// From the stop of one side's processors to the start of the other's, milliseconds.
    stopped_ms: f64,
    /// Longest silence of an echo seen by the peer.
    peer_gap_ms: u64,
    /// How long QEMU waited for the switch.
    #[serde(skip_serializing_if = "Option::is_none")]
    hold_ms: Option<f64>,
    /// From the VM's stop to the destination's acknowledgement.
    #[serde(skip_serializing_if = "Option::is_none")]
    final_delta_ms: Option<f64>,
}

/// Two migrations, seconds apart.
#[derive(Clone, Debug, Serialize)]
struct Pair {
    with: Sample,
    without: Sample,
}

/// Medians, milliseconds.
#[derive(Clone, Debug, Serialize)]
struct Medians {
    qemu_downtime_ms: f64,
    stopped_ms: f64,
    peer_gap_ms: f64,
}

#[derive(Debug, Serialize)]
struct Results {
    connections: u32,
    connections_after: u32,
    pairs: Vec<Pair>,
    with: Medians,
    without: Medians,
    /// Medians of the pairs' differences.
    added: Medians,
}

struct Arguments {
    pairs: u32,
    connections: u32,
    json: Option<PathBuf>,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let mut all = Self { pairs: 10, connections: 10_000, json: None };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word}: a value is missing"));
            match word.as_str() {
                "--pairs" => all.pairs = value()?.parse()?,
                "--connections" => all.connections = value()?.parse()?,
                "--json" => all.json = Some(value()?.into()),
                _ => bail!("usage: migration-downtime [--pairs N] [--connections N] [--json FILE]"),
            }
        }
        ensure!(all.pairs > 0, "--pairs: at least 1");
        Ok(all)
    }
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

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    match all.len() {
        0 => 0.0,
        n if n.is_multiple_of(2) => (all[n / 2 - 1] + all[n / 2]) / 2.0,
        n => all[n / 2],
    }
}

fn medians(pairs: &[Pair], of: impl Fn(&Pair, fn(&Sample) -> f64) -> f64) -> Medians {
    let one = |field: fn(&Sample) -> f64| median(pairs.iter().map(|p| of(p, field)));
    Medians {
        qemu_downtime_ms: one(|s| s.qemu_downtime_ms as f64),
        stopped_ms: one(|s| s.stopped_ms),
        peer_gap_ms: one(|s| s.peer_gap_ms as f64),
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse()?;
    let mut with = Bench::new(true, arguments.connections)?;
    let mut without = Bench::new(false, arguments.connections)?;
    println!(
        "{} connections each; downtime, ms: QEMU's figure / stop to start / gap seen by the peer\n",
        arguments.connections
    );
    println!("{:>4} {:>24} {:>24} {:>10} {:>12}", "pair", "with flow migration", "without", "hold", "final delta");
    let mut pairs = Vec::new();
    for n in 0..arguments.pairs {
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
        pairs.push(Pair { with: a, without: b });
    }
    let subject = with.subject.context("no guest")?;
    let connections_after = subject.connections.count_alive(&with.hosts, &subject.guest, Duration::from_secs(15))?;
    let results = Results {
        connections: arguments.connections,
        connections_after,
        with: medians(&pairs, |p, of| of(&p.with)),
        without: medians(&pairs, |p, of| of(&p.without)),
        added: medians(&pairs, |p, of| of(&p.with) - of(&p.without)),
        pairs,
    };
    let line = |what: &str, m: &Medians| {
        println!("{what:<24} {:>8.2} {:>8.2} {:>8.2}", m.qemu_downtime_ms, m.stopped_ms, m.peer_gap_ms);
    };
    println!("\n{:<24} {:>8} {:>8} {:>8}", "medians, ms", "QEMU's", "stopped", "peer's");
    line("with flow migration", &results.with);
    line("without", &results.without);
    line("added (of the pairs)", &results.added);
    println!(
        "\nconnections alive after {} migrations: {connections_after} of {}",
        arguments.pairs, arguments.connections
    );
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&results)? + "\n")
            .with_context(|| path.display().to_string())?;
    }
    ensure!(connections_after == arguments.connections, "connections were lost");
    Ok(())
}
