//! Two runs against each other. Absolute figures of two runs are not comparable on a machine whose speed jumps; what is
//! compared is Ferry's ratio to a peer that was measured in the same run, or, where there is none, the figure itself.
use crate::results::{Metric, Run};
use crate::system::Kind;

/// How one figure changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Which workload or metric, of which system.
    pub name: String,
    /// What the figures are relative to: a peer's name, or "absolute".
    pub relative_to: String,
    /// Earlier figure.
    pub old: f64,
    /// Later figure.
    pub new: f64,
    /// Relative change, positive when it got better.
    pub better: f64,
    /// Relative spread of the measurements behind it; smaller changes mean nothing.
    pub noise: f64,
}

impl Change {
    /// Whether it got worse by more than `tolerance` and more than the noise.
    pub fn regression(&self, tolerance: f64) -> bool {
        self.better < -tolerance.max(self.noise)
    }
}

/// All of Ferry's figures that both runs have.
pub fn compare(old: &Run, new: &Run) -> Vec<Change> {
    let mut changes = Vec::new();
    for n in &new.throughput {
        let Some(o) = old.throughput.iter().find(|o| o.workload.name == n.workload.name) else { continue };
        for system in [Kind::FerryL2, Kind::FerryFirewall] {
            let (Some(of), Some(nf)) = (o.figure(system), n.figure(system)) else { continue };
            let both = |&kind: &Kind| Some((kind, o.figure(kind)?.median, n.figure(kind)?.median));
            let same_place = o.placement() == n.placement();
            let peer = Kind::TESTPMD.iter().find_map(both).filter(|_| same_place);
            let (by_old, by_new) = peer.map_or((1.0, 1.0), |p| (p.1, p.2));
            let (a, b) = (of.median / by_old, nf.median / by_new);
            let spread = |f: crate::results::Figure| (f.max - f.min) / f.median / 2.0 / (f.count as f64).sqrt();
            changes.push(Change {
                name: format!("{} {}", n.workload.name, system.name()),
                relative_to: peer.map_or("absolute", |p| p.0.name()).into(),
                old: a,
                new: b,
                better: b / a - 1.0,
                noise: spread(of) + spread(nf),
            });
        }
    }
    for n in new.metrics.iter().filter(|m| m.system.is_ferry()) {
        // Losses are near zero, and may be below it: points are compared, not ratios.
        if n.unit == "%" {
            let old = old.metrics.iter().find(|m| m.name == n.name && m.system == n.system);
            changes.extend(old.map(|o| points(o, n)));
            continue;
        }
        let find = |run: &Run, system: Kind| -> Option<Metric> {
            run.metrics.iter().find(|m| m.name == n.name && m.system == system).cloned()
        };
        let Some(o) = find(old, n.system) else { continue };
        let peer = find(old, Kind::TestpmdIo).zip(find(new, Kind::TestpmdIo));
        let (by_old, by_new) = peer.as_ref().map_or((1.0, 1.0), |(a, b)| (a.figure.median, b.figure.median));
        let (a, b) = (o.figure.median / by_old, n.figure.median / by_new);
        let spread =
            |m: &Metric| (m.figure.max - m.figure.min) / m.figure.median / 2.0 / (m.figure.count as f64).sqrt();
        changes.push(Change {
            name: format!("{} {}", n.name, n.system.name()),
            relative_to: if peer.is_some() { Kind::TestpmdIo.name() } else { "absolute" }.into(),
            old: a,
            new: b,
            better: if n.higher_is_better { b / a - 1.0 } else { a / b - 1.0 },
            noise: spread(&o) + spread(n),
        });
    }
    changes
}

/// A figure in percent against an earlier one: points, each as a hundredth.
fn points(old: &Metric, new: &Metric) -> Change {
    let spread = |m: &Metric| (m.figure.max - m.figure.min) / 200.0 / (m.figure.count as f64).sqrt();
    let (a, b) = (old.figure.median, new.figure.median);
    Change {
        name: format!("{} {}", new.name, new.system.name()),
        relative_to: "points".into(),
        old: a,
        new: b,
        better: if new.higher_is_better { b - a } else { a - b } / 100.0,
        noise: spread(old) + spread(new),
    }
}

/// The changes as text; regressions are marked.
pub fn table(changes: &[Change], tolerance: f64) -> String {
    use std::fmt::Write;
    let mut t =
        format!("{:<48} {:>12} {:>9} {:>9} {:>8} {:>7}\n", "figure", "relative to", "old", "new", "change", "noise");
    for c in changes {
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "{:<48} {:>12} {:>9.3} {:>9.3} {:>+7.1}% {:>6.1}%{}",
            c.name,
            c.relative_to,
            c.old,
            c.new,
            c.better * 100.0,
            c.noise * 100.0,
            if c.regression(tolerance) { "  REGRESSION" } else { "" }
        );
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::test_support::{self, measurement, metric};
    use crate::workload::Workload;

    fn run(testpmd: f64, ferry: f64, p99: f64) -> Run {
        let figures = [(Kind::TestpmdIo, testpmd), (Kind::FerryL2, ferry)];
        let throughput = vec![measurement(Workload::l2(64), &figures)];
        test_support::run(throughput, vec![metric("ping-pong-64 p99", Kind::FerryL2, p99)])
    }

    #[test]
    fn a_slower_machine_is_no_regression_but_a_slower_switch_is() {
        // Half as fast a machine: both systems at half their speed.
        let changes = compare(&run(10.0, 30.0, 2.0), &run(5.0, 15.0, 2.0));
        assert_eq!(changes.len(), 2);
        assert!(changes.iter().all(|c| !c.regression(0.05)), "{changes:?}");
        let changes = compare(&run(10.0, 30.0, 2.0), &run(10.0, 24.0, 3.0));
        assert!(changes.iter().all(|c| c.regression(0.05)), "{changes:?}");
        assert!((changes[0].better + 0.2).abs() < 1e-9 && table(&changes, 0.05).contains("REGRESSION"));
    }
    #[test]
    fn losses_are_compared_in_points() {
        let lost = |percent| {
            let metric = Metric {
                unit: "%".into(),
                higher_is_better: false,
                ..metric("tracking-loss 1M", Kind::FerryFirewall, percent)
            };
            test_support::run(Vec::new(), vec![metric])
        };
        let change = |old, new| compare(&lost(old), &lost(new)).remove(0);
        assert!(!change(-0.5, 0.5).regression(0.05) && !change(0.1, 3.0).regression(0.05));
        let worse = change(-1.0, 8.0);
        assert!(worse.regression(0.05) && (worse.better + 0.09).abs() < 1e-9, "{worse:?}");
        assert!(!change(8.0, -1.0).regression(0.05));
    }
}
