//! What Ferry is to reach, and what a run has measured of it.
use crate::results::{Figure, Metric, Run};
use crate::system::Kind;
use std::fmt::Write;

/// Which side of its bound a figure has to be on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// Less than a peer's figure, which is what is given.
    Below(f64),
}

/// One target with its figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// What is measured.
    pub what: String,
    /// The bound; `None` when it is a peer's figure that was not measured.
    pub bound: Option<Bound>,
    /// The figure; `None` when the run does not have it.
    pub measured: Option<f64>,
    /// Where the figure's median lies with 95 % certainty ([`Figure::interval`]), and where a peer's does that is the bound.
    pub intervals: [Option<[f64; 2]>; 2],
    /// "x" for ratios.
    pub unit: &'static str,
    /// Where it comes from: workloads and metrics.
    pub from: String,
}

impl Target {
    /// Whether it is met; `None` when that was not measured.
    pub fn met(&self) -> Option<bool> {
        let measured = self.measured?;
        Some(match self.bound? {
            Bound::AtLeast(b) => measured >= b,
            Bound::AtMost(b) => measured <= b,
            Bound::Below(b) => measured < b,
        })
    }

    /// The bound as text.
    pub fn bound_text(&self) -> String {
        match self.bound {
            Some(Bound::AtLeast(b)) => format!(">= {}", figure(b, self.unit)),
            Some(Bound::AtMost(b)) => format!("<= {}", figure(b, self.unit)),
            Some(Bound::Below(b)) => format!("< {}", figure(b, self.unit)),
            None => "below the peer's".into(),
        }
    }

    /// The figure as text.
    pub fn measured_text(&self) -> String {
        self.measured.map_or("not measured".into(), |m| figure(m, self.unit))
    }

    /// Both sides of the bound lie within the figure's interval: the run cannot tell.
    pub fn is_open(&self) -> bool {
        let (Some(bound), [Some([low, high]), peer]) = (self.bound, self.intervals) else { return false };
        let (Bound::AtLeast(b) | Bound::AtMost(b) | Bound::Below(b)) = bound;
        let [bound_low, bound_high] = peer.unwrap_or([b, b]);
        low <= bound_high && bound_low <= high
    }

    /// "met", "not met" or "-"; with a question mark where the run cannot tell.
    pub fn met_text(&self) -> &'static str {
        match (self.met(), self.is_open()) {
            (Some(true), false) => "met",
            (Some(true), true) => "met?",
            (Some(false), false) => "not met",
            (Some(false), true) => "not met?",
            (None, _) => "-",
        }
    }
}

fn figure(value: f64, unit: &str) -> String {
    match unit {
        "x" => format!("{value:.2}x"),
        "M/s" => format!("{value:.1} {unit}"),
        "" => format!("{value:.2}"),
        _ => format!("{value:.2} {unit}"),
    }
}

/// A peer in ratios.
#[derive(Clone, Copy)]
enum Peer {
    Testpmd,
    Ovs,
}

struct Figures<'a>(&'a Run);

impl Figures<'_> {
    fn metric(&self, name: &str, system: Kind) -> Option<&Metric> {
        self.0.metrics.iter().find(|m| m.name == name && m.system == system)
    }

    fn figure(&self, name: &str, system: Kind) -> Option<Figure> {
        self.metric(name, system).map(|m| m.figure)
    }

    /// A figure of Ferry's alone, whichever system it is told of.
    fn own(&self, name: &str) -> Option<Figure> {
        let of = |m: &&Metric| m.name == name && m.system.is_ferry();
        self.0.metrics.iter().find(of).map(|m| m.figure)
    }

    /// Ferry's throughput divided by the peer's.
    fn ratio(&self, workload: &str, peer: Peer) -> Option<f64> {
        let m = self.0.throughput.iter().find(|m| m.workload.name == workload)?;
        let row = m.rows().into_iter().find(|r| {
            let kind = m.workload.systems.iter().find(|k| k.name() == r.system);
            kind.is_some_and(|k| k.is_ferry())
        })?;
        match peer {
            Peer::Testpmd => row.ratio_vs_testpmd_io,
            Peer::Ovs => row.ratio_vs_ovs,
        }
    }

    /// The least ratio of several workloads; all must be there.
    fn least(&self, workloads: &[String], peer: Peer) -> Option<f64> {
        let ratios: Option<Vec<f64>> = workloads.iter().map(|w| self.ratio(w, peer)).collect();
        ratios?.into_iter().reduce(f64::min)
    }

    /// Ratio of two systems' metrics.
    fn metric_ratio(&self, name: &str, system: Kind, peer: Kind) -> Option<f64> {
        Some(self.figure(name, system)?.median / self.figure(name, peer)?.median)
    }
}

/// All targets, in a fixed order.
pub fn targets(run: &Run) -> Vec<Target> {
    let f = Figures(run);
    let mut all = Vec::new();
    let mut push = |what: &str, bound: Option<Bound>, measured, intervals, unit, from: &str| {
        all.push(Target { what: what.into(), bound, measured, intervals, unit, from: from.into() });
    };
    const RATIO: [Option<[f64; 2]>; 2] = [None; 2];
    let mut throughput = |what: &str, workloads: &[String], peer, least: f64| {
        push(what, Some(Bound::AtLeast(least)), f.least(workloads, peer), RATIO, "x", &workloads.join(", "));
    };
    let one = |name: &str| vec![name.to_owned()];
    let both = |n: &str| ["udp", "tcp"].map(|t| format!("stateful-{t}-64-{n}")).to_vec();
    throughput("64 B, L2, against testpmd io", &one("l2-64"), Peer::Testpmd, 2.8);
    throughput("1518 B, L2, against testpmd io", &one("l2-1518"), Peer::Testpmd, 2.3);
    for (n, testpmd) in [("1", 1.7), ("10k", 1.5), ("1M", 1.1)] {
        let what = format!("64 B, stateful at both ends, connections: {n}, against testpmd io");
        throughput(&what, &both(n), Peer::Testpmd, testpmd);
    }
    for (n, ovs) in [("1", 4.0), ("10k", 6.0), ("1M", 8.0)] {
        let what = format!("64 B, stateful at both ends, connections: {n}, against OVS ct in one zone");
        throughput(&what, &both(n), Peer::Ovs, ovs);
    }
    throughput("1518 B UDP, stateful, against OVS ct", &one("stateful-udp-1518-1"), Peer::Ovs, 6.0);
    let tso = ["l2-tcp-tso", "stateful-tcp-tso-1"].map(str::to_owned);
    throughput("TCP with TSO passed through, against OVS with userspace-tso", &tso, Peer::Ovs, 2.0);

    let virtio_user: Vec<&Metric> =
        run.metrics.iter().filter(|m| m.name.starts_with("virtio-user ") && m.system.is_ferry()).collect();
    let ratios: Option<Vec<f64>> =
        virtio_user.iter().map(|m| f.metric_ratio(&m.name, m.system, Kind::TestpmdIo)).collect();
    let least = ratios.and_then(|r| r.into_iter().reduce(f64::min));
    let from = format!("the least of {} virtio-user figures", virtio_user.len());
    let what = "DPDK's virtio-user as generator, any size, against testpmd io";
    push(what, Some(Bound::AtLeast(1.0)), least, RATIO, "x", &from);

    let (ferry, ovs) = (Kind::FerryFirewall, Kind::OvsCt);
    let rate = f.metric_ratio("tcp-handshakes", ferry, ovs);
    push("new TCP connections/s, against OVS ct", Some(Bound::AtLeast(4.0)), rate, RATIO, "x", "tcp-handshakes");
    let mut below = |what: &str, name: &str, peer: Kind| {
        let (own, peer) = (f.figure(name, ferry), f.figure(name, peer));
        let intervals = [own, peer].map(|figure| figure.and_then(|f| f.interval));
        push(what, peer.map(|f| Bound::Below(f.median)), own.map(|f| f.median), intervals, "us", name);
    };
    below("time of set-up, 96 under way, p99, below OVS ct's", "tcp-handshakes p99", ovs);
    below("time of set-up, one at a time, p99, below OVS ct's", "tcp-handshakes-one-at-a-time p99", ovs);
    below("latency, unloaded, stateful, p50, below OVS L2's", "ping-pong-64 p50", Kind::OvsL2);
    below("latency, unloaded, stateful, p99, below OVS L2's", "ping-pong-64 p99", Kind::OvsL2);

    let mut own = |what: &str, name: &str, bound, unit, scale: f64| {
        let own = f.own(name);
        let interval = own.and_then(|f| f.interval).map(|interval| interval.map(|v| v * scale));
        push(what, Some(bound), own.map(|f| f.median * scale), [interval, None], unit, name);
    };
    let at_most = Bound::AtMost;
    own("lost to dirty tracking, 10 k connections", "tracking-loss 10k", at_most(3.0), "%", 1.0);
    own("lost to dirty tracking, 1 M connections", "tracking-loss 1M", at_most(8.0), "%", 1.0);
    for workload in ["l2-64", "l2-1518", "stateful-udp-64-10k"] {
        let what = format!("lost to dirty-page logging, {workload}");
        own(&what, &format!("dirty-log-loss {workload}"), at_most(8.0), "%", 1.0);
    }
    own("final delta, 1 M connections, 1 % changed", "final-delta 1M 1%", at_most(20.0), "ms", 1.0);
    own("full walk, records", "full-walk 1M", Bound::AtLeast(5.0), "M/s", 1e-6);
    own("memory per connection", "memory-per-connection table 1M", at_most(128.0), "B", 1.0);
    all
}

/// The table as Markdown.
pub fn markdown(targets: &[Target]) -> String {
    let mut t = String::from("| what | target | measured | |\n|---|---|---|---|\n");
    for target in targets {
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "| {} | {} | {} | {} |",
            target.what,
            target.bound_text(),
            target.measured_text(),
            target.met_text()
        );
    }
    t
}

/// The table as HTML.
pub fn html(targets: &[Target]) -> String {
    let mut t = String::from(
        "<table class=\"targets\"><tr><th>what</th><th>from</th><th>target</th><th>measured</th><th></th></tr>",
    );
    for target in targets {
        let class = match target.met() {
            Some(true) => "good",
            Some(false) => "bad",
            None => "",
        };
        // Writing to a String cannot fail.
        let _ = write!(
            t,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{}</td></tr>",
            crate::report::escape(&target.what),
            crate::report::escape(&target.from),
            crate::report::escape(&target.bound_text()),
            crate::report::escape(&target.measured_text()),
            target.met_text()
        );
    }
    t + "</table>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::test_support::{measurement, metric, run};
    use crate::workload::{Workload, full};

    #[test]
    fn figures_are_judged_by_their_bounds_and_missing_ones_are_not() {
        let throughput = vec![
            measurement(Workload::l2(64), &[(Kind::TestpmdIo, 10.0), (Kind::FerryL2, 29.0), (Kind::OvsL2, 7.0)]),
            measurement(Workload::l2(1518), &[(Kind::TestpmdIo, 10.0), (Kind::FerryL2, 20.0)]),
        ];
        let metrics = vec![
            metric("ping-pong-64 p50", Kind::FerryFirewall, 1.0),
            metric("ping-pong-64 p50", Kind::OvsL2, 1.1),
            metric("full-walk 1M", Kind::FerryFirewall, 6e6),
            metric("virtio-user l2-64", Kind::FerryL2, 12.0),
            metric("virtio-user l2-64", Kind::TestpmdIo, 10.0),
            metric("virtio-user stateful-64", Kind::FerryFirewallOpen, 9.0),
            metric("virtio-user stateful-64", Kind::TestpmdIo, 10.0),
        ];
        let all = targets(&run(throughput, metrics));
        let of = |what: &str| all.iter().find(|t| t.what.starts_with(what)).expect("target").clone();
        assert_eq!((of("64 B, L2").measured_text(), of("64 B, L2").met()), ("2.90x".into(), Some(true)));
        assert_eq!((of("1518 B, L2").measured_text(), of("1518 B, L2").met()), ("2.00x".into(), Some(false)));
        assert_eq!(of("latency, unloaded, stateful, p50").met(), Some(true));
        assert_eq!(of("latency, unloaded, stateful, p99").met(), None);
        assert_eq!((of("full walk").measured_text(), of("full walk").met()), ("6.0 M/s".into(), Some(true)));
        assert_eq!(of("DPDK's virtio-user").measured_text(), "0.90x");
        assert_eq!(of("64 B, stateful at both ends, connections: 1,").measured, None);
        let text = markdown(&all);
        assert_eq!(text.lines().count(), all.len() + 2);
        assert!(text.contains("| 64 B, L2, against testpmd io | >= 2.80x | 2.90x | met |"), "{text}");
        assert!(html(&all).contains("&gt;= 2.80x"));
    }

    #[test]
    fn what_a_run_cannot_tell_has_a_question_mark() {
        let of = |values: &[f64]| {
            let mut metric = metric("tracking-loss 10k", Kind::FerryFirewall, 0.0);
            metric.figure = Figure::of(values).expect("values");
            let all = targets(&run(Vec::new(), vec![metric]));
            all.iter().find(|t| t.from == "tracking-loss 10k").expect("target").met_text()
        };
        assert_eq!(of(&[-5.0, -1.0, 0.0, 0.5, 1.0, 2.0]), "met");
        assert_eq!(of(&[-5.0, -1.0, 0.0, 0.5, 1.0, 4.0]), "met?");
        assert_eq!(of(&[2.0, 4.0, 4.0, 5.0, 6.0, 7.0]), "not met?");
        assert_eq!(of(&[4.0, 4.0, 4.0, 5.0, 6.0, 7.0]), "not met");
        assert_eq!(of(&[-5.0, 4.0, -5.0]), "met", "too few to say more");
        // Against a peer, whose figure is as uncertain.
        let latency = |own: f64, peer: f64| {
            let metrics = [(Kind::FerryFirewall, own), (Kind::OvsL2, peer)].map(|(system, first)| {
                let mut metric = metric("ping-pong-64 p50", system, 0.0);
                metric.figure = Figure::of(&[0, 1, 2, 3, 4, 5].map(|n| first + f64::from(n))).expect("values");
                metric
            });
            let all = targets(&run(Vec::new(), metrics.to_vec()));
            all.iter().find(|t| t.from == "ping-pong-64 p50").expect("target").met_text()
        };
        assert_eq!(
            [latency(1.0, 9.0), latency(1.0, 3.0), latency(3.0, 1.0), latency(9.0, 1.0)],
            ["met", "met?", "not met?", "not met"]
        );
    }

    #[test]
    fn throughput_targets_name_workloads_that_a_full_run_has() {
        let names: Vec<String> = full().into_iter().map(|w| w.name).collect();
        let all = targets(&run(Vec::new(), Vec::new()));
        for target in all.iter().filter(|t| t.unit == "x" && t.bound != Some(Bound::AtLeast(1.0))) {
            for name in target.from.split(", ").filter(|n| *n != "tcp-handshakes") {
                assert!(names.iter().any(|n| n == name), "{name}");
            }
        }
    }
}
