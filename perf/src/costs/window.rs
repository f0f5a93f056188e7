//! Windows of one switch whose state changes between them, compared in pairs.
use crate::affinity::{self, SchedStat};
use crate::generator::Generator;
use crate::guest::ring::DriverRing;
use crate::regime::{self, Placement};
use crate::results::{Figure, MOST_WAITED, Window, prefer};
use crate::run::Urgent;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Length of a slice.
const SLICE: Duration = Duration::from_millis(50);
/// From this share of a slice off its core on, the generator has not kept the switch busy.
const GENERATOR_WAITED: f64 = 0.2;

/// Where, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Core of the generator.
    pub generator_core: usize,
    /// Core of the PMD thread.
    pub switch_core: usize,
    /// Length of a window.
    pub window: Duration,
    /// Pairs of windows.
    pub rounds: usize,
}

/// One window of traffic in both directions through the switch with process id `pid`. The other processes are urgent enough to get a word in.
///
/// All of a migration but the PMD thread's part runs on the generator's core. The time that it takes there is the generator's loss, not the
/// switch's, and does not count: throughput is frames per second of the generator's presence.
///
/// # Errors
/// When a ring makes no sense, or nothing arrives.
pub fn window<R: DriverRing>(generator: &mut Generator<R>, terms: &Terms, pid: u32, others: &[u32]) -> Result<Window> {
    let cores = (terms.generator_core, terms.switch_core);
    let urgency = Urgent::new(pid, terms.switch_core)?;
    let _others = Helpers::new(others)?;
    generator.start(true)?;
    generator.run(terms.window / 4)?;
    let before = regime::round_trip_ns(cores.0, cores.1)?;
    let steal = || regime::steal_ms(cores.0) + regime::steal_ms(cores.1);
    let (stolen, own) = (steal(), affinity::own_id());
    generator.run(SLICE / 4)?;
    let slices = (terms.window.as_millis() / SLICE.as_millis()).max(1) as usize;
    let mut window = Window::begun(slices, before);
    let mut measured = Vec::with_capacity(slices);
    for _ in 0..slices {
        let (switch, this) = (SchedStat::sum(&urgency.pmd), SchedStat::of(own));
        let tally = generator.run(SLICE)?;
        let switch = SchedStat::sum(&urgency.pmd).since(switch).waited_ns as f64 / 1e9;
        let this = SchedStat::of(own).since(this).waited_ns as f64 / 1e9;
        let calm = switch / tally.seconds <= MOST_WAITED && this / tally.seconds <= GENERATOR_WAITED;
        measured.push((calm, tally.findings.frames as f64 / (tally.seconds - this).max(f64::MIN_POSITIVE) / 1e6));
        window.seconds += tally.seconds;
        window.findings.add(&tally.findings);
        window.switch_waited += switch;
        window.generator_waited += this;
        window.generator_idle += tally.idle / slices as f64;
    }
    window.round_trip_ns[1] = regime::round_trip_ns(cores.0, cores.1)?;
    window.steal_ms = steal().saturating_sub(stolen);
    window.switch_waited /= window.seconds;
    window.generator_waited /= window.seconds;
    window.undisturbed = measured.iter().filter(|m| m.0).count();
    let counted = measured.iter().filter(|m| m.0 || window.undisturbed == 0).map(|m| m.1);
    window.mpps = Figure::of(&counted.collect::<Vec<_>>()).map_or(0.0, |f| f.median);
    generator.stop()?;
    ensure!(window.mpps > 0.0, "nothing arrives");
    ensure!(
        window.findings.corrupted + window.findings.duplicated == 0,
        "frames are corrupted or duplicated: {:?}",
        window.findings
    );
    Ok(window)
}

/// All threads of other processes, urgent until dropped.
struct Helpers(Vec<u32>);

impl Helpers {
    fn new(processes: &[u32]) -> Result<Self> {
        let mut all = Vec::new();
        for &pid in processes {
            let (on, others) = affinity::threads(pid, usize::MAX)?;
            all.extend(on.into_iter().chain(others));
        }
        all.iter().for_each(|&t| affinity::set_urgency(t, affinity::Urgency::Helper));
        Ok(Self(all))
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.0.iter().for_each(|&t| affinity::set_urgency(t, affinity::Urgency::Ordinary));
    }
}

/// What changing something costs, from pairs of windows without and with it: percent of throughput lost; negative: gained.
///
/// Only pairs of valid windows in one placement count, and of these the placement with more of them. Where they are fewer than half, because
/// the machine moves its cores about, all pairs count, and the placement is `None`: which state a move meets is chance, and many pairs that
/// scatter more tell more than a few.
pub fn lost_percent(pairs: &[(Window, Window)]) -> Option<(Figure, Option<Placement>)> {
    let placement = |(without, with): &(Window, Window)| {
        let same = without.placement() == with.placement();
        (without.valid() && with.valid() && same).then(|| with.placement()).flatten()
    };
    let count = |p| pairs.iter().filter(|pair| placement(pair) == Some(p)).count();
    let chosen = prefer(count(Placement::Near), count(Placement::Far)).filter(|&p| 2 * count(p) >= pairs.len());
    let counted = pairs.iter().filter(|pair| chosen.is_none() || placement(pair) == chosen);
    let lost: Vec<f64> = counted.map(|(without, with)| 100.0 * (1.0 - with.mpps / without.mpps)).collect();
    Some((Figure::of(&lost)?, chosen))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(mpps: f64, round_trip: f64, undisturbed: usize) -> Window {
        Window {
            mpps,
            seconds: 1.0,
            slices: 10,
            undisturbed,
            findings: crate::check::Findings::default(),
            round_trip_ns: [round_trip; 2],
            switch_waited: 0.0,
            generator_waited: 0.0,
            generator_idle: 0.5,
            steal_ms: 0,
        }
    }

    #[test]
    fn pairs_of_one_placement_are_compared() {
        let near = (one(10.0, 100.0, 9), one(9.0, 100.0, 9));
        let far = (one(5.0, 330.0, 9), one(4.0, 330.0, 9));
        let flipped = (one(10.0, 100.0, 9), one(4.0, 330.0, 9));
        let disturbed = (one(10.0, 100.0, 9), one(1.0, 100.0, 0));
        let all = [near.clone(), near.clone(), far.clone(), flipped.clone(), disturbed];
        let (figure, placement) = lost_percent(&all[..4]).unwrap();
        assert_eq!((figure.count, placement), (2, Some(Placement::Near)));
        assert!((figure.median - 10.0).abs() < 1e-9);
        // Most cannot be compared.
        let (figure, placement) = lost_percent(&all).unwrap();
        assert_eq!((figure.count, placement), (5, None));
        // Nothing can be compared: all is told, and said so.
        let (figure, placement) = lost_percent(&[flipped.clone(), flipped]).unwrap();
        assert_eq!((figure.count, placement), (2, None));
        assert_eq!(lost_percent(&[]), None);
    }
}
