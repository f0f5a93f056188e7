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
            let peer = match (o.figure(Kind::TestpmdIo), n.figure(Kind::TestpmdIo)) {
                (Some(a), Some(b)) if o.placement() == n.placement() => Some((a.median, b.median)),
                _ => None,
            };
            let (by_old, by_new) = peer.unwrap_or((1.0, 1.0));
            let (a, b) = (of.median / by_old, nf.median / by_new);
            let spread = |f: crate::results::Figure| (f.max - f.min) / f.median / 2.0 / (f.count as f64).sqrt();
            changes.push(Change {
                name: format!("{} {}", n.workload.name, system.name()),
                relative_to: if peer.is_some() { Kind::TestpmdIo.name() } else { "absolute" }.into(),
                old: a,
                new: b,
                better: b / a - 1.0,
                noise: spread(of) + spread(nf),
            });
        }
    }
    for n in new.metrics.iter().filter(|m| m.system.is_ferry()) {
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
    use crate::check::Findings;
    use crate::regime::Environment;
    use crate::results::{Figure, Measurement, Series, Window};
    use crate::workload::Workload;

    fn window(mpps: f64) -> Window {
        Window {
            mpps,
            seconds: 1.0,
            slices: 10,
            undisturbed: 10,
            findings: Findings::default(),
            round_trip_ns: [90.0; 2],
            switch_waited: 0.0,
            generator_waited: 0.0,
            generator_idle: 0.5,
            steal_ms: 0,
        }
    }

    fn run(testpmd: f64, ferry: f64, p99: f64) -> Run {
        let series = |system, mpps: f64| Series {
            system,
            windows: [0.99, 1.0, 1.01].map(|k| window(mpps * k)).to_vec(),
            tracked: None,
            failure: None,
        };
        let workload = Workload::l2(64);
        let series = vec![series(Kind::TestpmdIo, testpmd), series(Kind::FerryL2, ferry)];
        let metric = Metric {
            name: "ping-pong-64 p99".into(),
            system: Kind::FerryL2,
            unit: "us".into(),
            higher_is_better: false,
            figure: Figure { median: p99, min: p99, max: p99, count: 3 },
            placement: None,
        };
        let throughput = vec![Measurement { workload, series }];
        Run { format: 1, environment: Environment::default(), throughput, metrics: vec![metric], micro: String::new() }
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
}
