//! One PMD thread and two, with two busy pairs of guests.
//!
//! There are two cores, one of which the generator needs: the second PMD thread has to share it. So throughput says little, and cycles per
//! frame are the figure to look at: they show what two threads cost each other by what they share. Nothing is urgent here, or one of the
//! threads on the shared core would starve.
use super::on_core;
use super::switch::{Extras, Switch};
use super::window::Terms;
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
use std::path::Path;

/// What a window has shown.
struct Window {
    mpps: f64,
    /// Time-stamp counter cycles of busy rounds per frame, over all PMD threads.
    cycles_per_frame: f64,
    placement: Option<Placement>,
}

/// Cycles of busy rounds and frames so far, over all PMD threads, and how many of these have had frames.
fn work(switch: &Switch) -> Result<(f64, f64, usize)> {
    let said = switch.ask(&["pmd", "perf"])?;
    let pmds = said["pmds"].as_array().context("pmds")?;
    let field = |p: &Value, name: &str| p["stats"][name].as_f64().with_context(|| format!("{name}: {p}"));
    let (mut cycles, mut frames, mut working) = (0.0, 0.0, 0);
    for pmd in pmds {
        cycles += field(pmd, "busy_cycles")?;
        frames += field(pmd, "frames")?;
        working += usize::from(field(pmd, "frames")? > 0.0);
    }
    Ok((cycles, frames, working))
}

fn window(guests: &mut Generator<SplitRing>, switch: &Switch, terms: &Terms, threads: usize) -> Result<Window> {
    let probe = || regime::round_trip_ns(terms.generator_core, terms.switch_core).map(Placement::of);
    guests.start(true)?;
    guests.run(terms.window / 4)?;
    let before = probe()?;
    let (cycles, frames, _) = work(switch)?;
    let tally = guests.run(terms.window)?;
    let (cycles_after, frames_after, working) = work(switch)?;
    let after = probe()?;
    guests.stop()?;
    ensure!(working == threads, "{working} of {threads} PMD threads have had frames");
    ensure!(frames_after > frames, "no frames");
    Ok(Window {
        mpps: tally.mpps(),
        cycles_per_frame: (cycles_after - cycles) / (frames_after - frames),
        placement: (before == after).then_some(before),
    })
}

/// Throughput and cycles per frame of two busy pairs, 64 bytes, through the bridge and through firewalls with 10,000 connections each.
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
                ("cycles", false, counted().map(|w| w.cycles_per_frame).collect()),
            ];
            for (unit, higher_is_better, values) in figures {
                let Some(figure) = Figure::of(&values) else { continue };
                let per = if unit == "cycles" { " per frame" } else { "" };
                let name = format!("pmd-threads {threads}, 2 pairs of {}{per}", workload.name);
                metrics.push(Metric { name, system, unit: unit.into(), higher_is_better, figure, placement });
            }
        }
    }
    Ok(metrics)
}
