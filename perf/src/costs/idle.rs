//! Processor use of a switch with many attached ports and nothing to do.
use super::switch::{Extras, PATIENCE, Switch};
use super::window::Terms;
use crate::generator::Generator;
use crate::guest::GuestSpec;
use crate::guest::split::SplitRing;
use crate::results::{Figure, Metric};
use crate::system::{Kind, Setup};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PORTS: usize = 20;
/// Between the guests' arrival and the measurement.
const CALM: Duration = Duration::from_secs(2);
/// `/proc` counts in ticks of 10 ms: 5 s make that 0.2 %.
const WATCHED: Duration = Duration::from_secs(5);

/// Processor time of all threads of a process so far.
fn processor_time(pid: u32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("the switch is gone")?;
    // The name, in parentheses, may contain anything.
    let rest = text.rsplit_once(')').context("/proc/*/stat")?.1;
    let field = |n: usize| rest.split_whitespace().nth(n).and_then(|w| w.parse::<u64>().ok()).context("/proc/*/stat");
    let ticks = field(11)? + field(12)?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("clock ticks")?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Percent of one core over [`WATCHED`], with silent guests at all ports.
fn share(pid: u32, sockets: &[PathBuf]) -> Result<f64> {
    let guests = Generator::<SplitRing>::attach(sockets, &GuestSpec::new(64))?;
    std::thread::sleep(CALM);
    anyhow::ensure!(guests.alive(), "a port has closed its connection");
    let (before, begin) = (processor_time(pid)?, Instant::now());
    std::thread::sleep(WATCHED);
    let used = processor_time(pid)?.saturating_sub(before);
    let share = 100.0 * used.as_secs_f64() / begin.elapsed().as_secs_f64();
    drop(guests);
    Ok(share)
}

/// Percent of a core that a switch uses with 20 attached ports and no traffic: Ferry as it is by default, and beside it testpmd and OVS,
/// whose PMD threads never sleep. A peer that is not installed is left out.
///
/// # Errors
/// When Ferry does not come up.
pub fn idle(terms: &Terms, folder: &Path) -> Result<Vec<Metric>> {
    let setup = Setup {
        folder: folder.to_path_buf(),
        ports: PORTS,
        switch_core: terms.switch_core,
        generator_core: terms.generator_core,
        mtu: 1504,
        connections: 1,
        rules: 0,
    };
    let mut shares = Vec::new();
    {
        let mut switch = Switch::start(&setup, "idle", &Extras { sleeps: true, ..Extras::default() })?;
        switch.process.wait_for("quiet", PATIENCE, |_| true)?;
        shares.push((Kind::FerryL2, share(switch.process.id(), &switch.sockets)?));
    }
    for kind in [Kind::TestpmdIo, Kind::OvsL2] {
        let measured = kind.start(&setup).and_then(|mut system| {
            let pid = system.process().id();
            share(pid, system.sockets())
        });
        match measured {
            Ok(share) => shares.push((kind, share)),
            Err(e) => eprintln!("idle: {}: {e:#}", kind.name()),
        }
    }
    let metrics = shares.into_iter().filter_map(|(system, share)| {
        let figure = Figure::of(&[share])?;
        let name = format!("idle {PORTS} ports");
        Some(Metric { name, system, unit: "% core".into(), higher_is_better: false, figure, placement: None })
    });
    Ok(metrics.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_processor_time() {
        let own = std::process::id();
        let before = processor_time(own).unwrap();
        let mut x = 1u64;
        while processor_time(own).unwrap() < before + Duration::from_millis(20) {
            (0..1_000_000u64).for_each(|i| x = std::hint::black_box(x ^ i));
        }
        assert!(processor_time(u32::MAX).is_err());
    }
}
