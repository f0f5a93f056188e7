//! One PMD thread and two, with two busy pairs of guests.
//!
//! There are two cores, one of which the generator needs: the second PMD thread has to share it. So throughput says little; processor time per
//! frame shows what two threads cost each other by what they share, the switching between thread and generator included. Nothing is urgent
//! here, or one of the threads on the shared core would starve.
use super::on_core;
use super::switch::{Extras, Switch};
use super::window::Terms;
use crate::affinity::SchedStat;
use crate::frame::Transport;
use crate::generator::Generator;
use crate::guest::GuestSpec;
use crate::guest::split::SplitRing;
use crate::regime::{self, Placement};
use crate::results::{Figure, Metric};
use crate::run;
use crate::system::{Kind, Setup};
use crate::workload::Workload;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What a window has shown.
struct Window {
    mpps: f64,
    /// Processor time of the PMD threads' busy rounds per frame, nanoseconds.
    ns_per_frame: f64,
    placement: Option<Placement>,
}

/// One PMD thread's work so far.
#[derive(Clone, Copy, Debug)]
struct Work {
    busy_cycles: f64,
    idle_cycles: f64,
    frames: f64,
    ran_ns: f64,
}

impl Work {
    /// Processor time of its busy rounds since `before`, nanoseconds. A thread is kept off its core in busy and idle rounds alike.
    fn busy_ns_since(&self, before: &Self) -> f64 {
        let (busy, idle) = (self.busy_cycles - before.busy_cycles, self.idle_cycles - before.idle_cycles);
        (self.ran_ns - before.ran_ns) * busy / (busy + idle).max(1.0)
    }
}

/// Threads of the process whose names begin with `pmd` and a number, by that number.
fn pmd_threads(pid: u32) -> Result<BTreeMap<usize, u32>> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let digits = name.strip_prefix("pmd").map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        let Some(Some(index)) = digits.map(|d| d.and_then(|d| d.parse().ok())) else { continue };
        let id = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok()).context("thread id")?;
        threads.insert(index, id);
    }
    Ok(threads)
}

fn work(switch: &Switch) -> Result<Vec<Work>> {
    let threads = pmd_threads(switch.process.id())?;
    let said = switch.ask(&["pmd", "perf"])?;
    let field = |p: &Value, name: &str| p["stats"][name].as_f64().with_context(|| format!("{name}: {p}"));
    let pmds = said["pmds"].as_array().context("pmds")?.iter();
    pmds.map(|p| {
        let index = p["stats"]["pmd"].as_u64().context("number of a PMD thread")?;
        let thread = *threads.get(&usize::try_from(index)?).context("no thread of a PMD thread's name")?;
        Ok(Work {
            busy_cycles: field(p, "busy_cycles")?,
            idle_cycles: field(p, "idle_cycles")?,
            frames: field(p, "frames")?,
            ran_ns: SchedStat::of(thread).ran_ns as f64,
        })
    })
    .collect()
}

fn window(guests: &mut Generator<SplitRing>, switch: &Switch, terms: &Terms, threads: usize) -> Result<Window> {
    let probe = || regime::round_trip_ns(terms.generator_core, terms.switch_core).map(Placement::of);
    guests.start(true)?;
    guests.run(terms.window / 4)?;
    let round_trip = probe()?;
    let before = work(switch)?;
    let tally = guests.run(terms.window)?;
    let after = work(switch)?;
    let placement = (probe()? == round_trip).then_some(round_trip);
    guests.stop()?;
    let frames: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a.frames - b.frames).collect();
    ensure!(frames.len() == threads && frames.iter().all(|&n| n > 0.0), "frames of the PMD threads: {frames:?}");
    let busy_ns: f64 = after.iter().zip(&before).map(|(a, b)| a.busy_ns_since(b)).sum();
    Ok(Window { mpps: tally.mpps(), ns_per_frame: busy_ns / frames.iter().sum::<f64>(), placement })
}

/// Throughput and processor time per frame of two busy pairs, 64 bytes, through the bridge and through firewalls with 10,000 connections each.
///
/// # Errors
/// When a switch does not come up or forward, or one of its threads has nothing to do.
pub fn scaling(terms: &Terms, folder: &Path) -> Result<Vec<Metric>> {
    let mut metrics = Vec::new();
    for mut workload in [Workload::l2(64), Workload::stateful(Transport::Udp, 64, 10_000)] {
        (workload.ports, workload.busy_pairs) = (4, 2);
        let firewall = workload.stateful_systems();
        let setup = Setup {
            folder: folder.to_path_buf(),
            ports: workload.ports,
            switch_core: terms.switch_core,
            generator_core: terms.generator_core,
            mtu: 1504,
            connections: workload.connections,
            rules: 0,
        };
        let start = |name, second_pmd| {
            let switch = Switch::start(&setup, name, &Extras { firewall, second_pmd, ..Extras::default() })?;
            switch.process.pause();
            anyhow::Ok(switch)
        };
        let switches = [start("one-pmd", None)?, start("two-pmds", Some(terms.generator_core))?];
        let windows = on_core(terms.generator_core, || {
            let mut all: [Vec<Window>; 2] = Default::default();
            let mut guests = Vec::new();
            for switch in &switches {
                switch.process.resume();
                let mut generator = Generator::attach(&switch.sockets, &GuestSpec::new(workload.frame_bytes))?;
                generator.streams(workload.streams());
                run::open(&mut generator, &workload)?;
                guests.push(generator);
                switch.process.pause();
            }
            for _ in 0..terms.rounds {
                for (i, ((switch, guests), windows)) in switches.iter().zip(&mut guests).zip(&mut all).enumerate() {
                    switch.process.resume();
                    let window = window(guests, switch, terms, i + 1);
                    switch.process.pause();
                    windows.push(window?);
                }
            }
            switches.iter().for_each(|switch| switch.process.resume());
            Ok(all)
        })?;
        let near = windows.iter().flatten().filter(|w| w.placement == Some(Placement::Near)).count();
        let all = windows.iter().map(Vec::len).sum::<usize>();
        let placement = (2 * near >= all).then_some(Placement::Near);
        let system = if firewall { Kind::FerryFirewall } else { Kind::FerryL2 };
        for (threads, windows) in (1..).zip(&windows) {
            let counted = || windows.iter().filter(|w| placement.is_none() || w.placement == placement);
            let figures = [
                ("Mpps", true, counted().map(|w| w.mpps).collect::<Vec<_>>()),
                ("ns", false, counted().map(|w| w.ns_per_frame).collect()),
            ];
            for (unit, higher_is_better, values) in figures {
                let Some(figure) = Figure::of(&values) else { continue };
                let per = if unit == "ns" { " per frame" } else { "" };
                let name = format!("pmd-threads {threads}, 2 pairs of {}{per}", workload.name);
                metrics.push(Metric { name, system, unit: unit.into(), higher_is_better, figure, placement });
            }
        }
    }
    Ok(metrics)
}
