//! Results: what a run leaves behind, and how windows become one figure.
use crate::check::Findings;
use crate::regime::{Environment, Placement};
use crate::system::Kind;
use crate::workload::Workload;
use serde::{Deserialize, Serialize};

/// One turn of a switch: several timed slices with the placement probed around them.
///
/// On a busy machine the kernel gives other threads the measured cores for milliseconds at a time. A slice in which that
/// happened does not count; slices are short so that most are spared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Window {
    /// Median of the undisturbed slices (of all, when none was undisturbed), million frames delivered per second.
    pub mpps: f64,
    /// Length of all slices together, seconds.
    pub seconds: f64,
    /// Slices in all.
    pub slices: usize,
    /// Slices in which neither thread was kept off its core.
    pub undisturbed: usize,
    /// What was found.
    pub findings: Findings,
    /// Round trip between the cores before and after, nanoseconds.
    pub round_trip_ns: [f64; 2],
    /// Share of the time in which the switch's thread was ready but not on its core.
    pub switch_waited: f64,
    /// The same of the generator's.
    pub generator_waited: f64,
    /// Share of the generator's turns that found nothing to do; near zero, it is what limits the figure.
    pub generator_idle: f64,
    /// Time that the hypervisor kept from the two cores, milliseconds.
    pub steal_ms: u64,
}

impl Window {
    /// One of so many slices of which nothing is measured yet; `before`: the round trip at its beginning, nanoseconds.
    pub fn begun(slices: usize, before: f64) -> Self {
        Self {
            mpps: 0.0,
            seconds: 0.0,
            slices,
            undisturbed: 0,
            findings: Findings::default(),
            round_trip_ns: [before; 2],
            switch_waited: 0.0,
            generator_waited: 0.0,
            generator_idle: 0.0,
            steal_ms: 0,
        }
    }
}

/// From this share of a slice off the core on, a slice does not count.
pub const MOST_WAITED: f64 = 0.02;

/// The kernel counts stolen time in units of this.
const TICK_MS: f64 = 10.0;

impl Window {
    /// The placement, if it was the same before and after.
    pub fn placement(&self) -> Option<Placement> {
        let [before, after] = self.round_trip_ns.map(Placement::of);
        (before == after).then_some(before)
    }

    /// Whether it counts: cores that stayed where they were, two undisturbed slices at least.
    pub fn valid(&self) -> bool {
        self.placement().is_some()
            && self.undisturbed >= 2.min(self.slices)
            && (self.steal_ms as f64) <= TICK_MS + 2.0 * self.seconds * 1e3 * MOST_WAITED
    }
}

/// All windows of one switch under one workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    /// Which switch.
    pub system: Kind,
    /// Its windows, the discarded ones as well.
    pub windows: Vec<Window>,
    /// Connections in its tables at the end, over all ports.
    pub tracked: Option<u64>,
    /// Why it was not measured.
    pub failure: Option<String>,
}

impl Series {
    /// Windows that count under this placement.
    pub fn counted(&self, placement: Placement) -> Vec<&Window> {
        self.windows.iter().filter(|w| w.valid() && w.placement() == Some(placement)).collect()
    }
}

/// One workload through all its switches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// What was sent.
    pub workload: Workload,
    /// Per switch.
    pub series: Vec<Series>,
}

/// A figure with its spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Median.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
    /// Number of values.
    pub count: usize,
    /// Between these the median of what was sampled lies with 95 % certainty; `None` for fewer than six values, and more
    /// than 1000.
    #[serde(default)]
    pub interval: Option<[f64; 2]>,
}

impl Figure {
    /// Of these values; `None` when there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut v = values.to_vec();
        v.sort_by(f64::total_cmp);
        let (&min, &max) = (v.first()?, v.last()?);
        let n = v.len();
        let median = if n % 2 == 1 { v[n / 2] } else { (v[n / 2 - 1] + v[n / 2]) / 2.0 };
        Some(Self { median, min, max, count: n, interval: interval(&v) })
    }
}

/// The interval of a median by order statistics, which supposes nothing about the distribution (the sign test turned round). `sorted`: the
/// values, in order.
fn interval(sorted: &[f64]) -> Option<[f64; 2]> {
    // One end may be missed in one case of forty.
    const MISSED: f64 = 0.025;
    let n = sorted.len();
    // Beyond, the first probability would be none.
    if n > 1000 {
        return None;
    }
    // Probability that k of n values are less than the median, and that so many or fewer are.
    let mut exactly = 0.5f64.powi(i32::try_from(n).ok()?);
    let (mut at_most, mut left_out) = (exactly, None);
    for k in 0..n / 2 {
        if at_most > MISSED {
            break;
        }
        left_out = Some(k);
        exactly *= (n - k) as f64 / (k + 1) as f64;
        at_most += exactly;
    }
    let k = left_out?;
    Some([*sorted.get(k)?, *sorted.get(n - 1 - k)?])
}

/// The placement to compare in, by how many windows the switch with the fewest has in each; near if in doubt.
pub fn prefer(near: usize, far: usize) -> Option<Placement> {
    match near.max(far) {
        0 => None,
        _ if near >= far.min(3) => Some(Placement::Near),
        _ => Some(Placement::Far),
    }
}

impl Measurement {
    /// The placement under which the switches are compared: the one in which the switch with the fewest windows has the
    /// most; near if in doubt. `None` when no placement has windows of all switches: then all windows count, and the row
    /// says so.
    pub fn placement(&self) -> Option<Placement> {
        let least = |p| self.measured().map(|s| s.counted(p).len()).min().unwrap_or(0);
        let (near, far) = (least(Placement::Near), least(Placement::Far));
        prefer(near, far)
    }

    fn measured(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|s| s.failure.is_none())
    }

    /// A switch's figure under the placement of comparison.
    pub fn figure(&self, system: Kind) -> Option<Figure> {
        let series = self.series.iter().find(|s| s.system == system)?;
        let values: Vec<f64> = self.windows(series).iter().map(|w| w.mpps).collect();
        Figure::of(&values)
    }

    fn windows<'a>(&self, series: &'a Series) -> Vec<&'a Window> {
        match self.placement() {
            Some(p) => series.counted(p),
            None => series.windows.iter().collect(),
        }
    }

    fn generator_idle(&self, series: &Series) -> f64 {
        let idle: Vec<f64> = self.windows(series).iter().map(|w| w.generator_idle).collect();
        Figure::of(&idle).map_or(0.0, |f| f.median)
    }

    /// The rows of the summary.
    pub fn rows(&self) -> Vec<Row> {
        let first = |kinds: &[Kind]| kinds.iter().find_map(|&k| self.figure(k)).map(|f| f.median);
        let (base, ovs) = (first(&Kind::TESTPMD), first(&Kind::OVS));
        self.series
            .iter()
            .filter_map(|s| {
                let f = self.figure(s.system)?;
                let mut findings = Findings::default();
                s.windows.iter().for_each(|w| findings.add(&w.findings));
                Some(Row {
                    workload: self.workload.name.clone(),
                    frame_bytes: self.workload.average_bytes().round() as usize,
                    connections: self.workload.connections,
                    system: s.system.name().into(),
                    mpps_median: round(f.median),
                    gbit_per_s_median: round(f.median * self.workload.average_bytes() * 8.0 / 1e3),
                    ratio_vs_testpmd_io: base.map(|b| round(f.median / b)),
                    ratio_vs_ovs: ovs.map(|b| round(f.median / b)),
                    mpps_min: round(f.min),
                    mpps_max: round(f.max),
                    windows: f.count,
                    generator_idle: round(self.generator_idle(s)),
                    placement: self.placement(),
                    lost: findings.lost,
                    wrong: findings.duplicated + findings.reordered + findings.corrupted,
                })
            })
            .collect()
    }
}

fn round(x: f64) -> f64 {
    (x * 1e5).round() / 1e5
}

/// One line of the summary (`ferry-perf quick --json`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Workload's name.
    pub workload: String,
    /// Length of a frame, bytes; of a mix the average, of frames that are to be segmented their payload.
    pub frame_bytes: usize,
    /// Connections per pair of guests.
    pub connections: u32,
    /// Switch's name.
    pub system: String,
    /// Median over the windows that count, million frames delivered per second, all directions together.
    pub mpps_median: f64,
    /// The same in gigabits per second: of frames as `frame_bytes` counts them.
    #[serde(default)]
    pub gbit_per_s_median: f64,
    /// That divided by testpmd's.
    pub ratio_vs_testpmd_io: Option<f64>,
    /// That divided by OVS's with the same job.
    pub ratio_vs_ovs: Option<f64>,
    /// Least of the windows.
    pub mpps_min: f64,
    /// Greatest of the windows.
    pub mpps_max: f64,
    /// Number of windows that count.
    pub windows: usize,
    /// Share of the generator's turns that found nothing to do, median; near zero, it is what limits the figure.
    #[serde(default)]
    pub generator_idle: f64,
    /// Placement of the cores in them; `null` when no placement had windows of all switches, and all count.
    pub placement: Option<Placement>,
    /// Frames lost in all windows.
    pub lost: u64,
    /// Frames duplicated, reordered or corrupted in all windows.
    pub wrong: u64,
}

/// A figure that is not throughput: a rate of connections, a time, memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metric {
    /// What was measured.
    pub name: String,
    /// Which switch.
    pub system: Kind,
    /// Unit.
    pub unit: String,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// The figure.
    pub figure: Figure,
    /// Placement of the cores; `None`: all, because no placement had values of all switches.
    pub placement: Option<Placement>,
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Version of this layout.
    pub format: u32,
    /// Where it was measured.
    pub environment: Environment,
    /// Throughput.
    pub throughput: Vec<Measurement>,
    /// Everything else.
    #[serde(default)]
    pub metrics: Vec<Metric>,
    /// Output of the micro-benchmarks, as it was printed.
    #[serde(default)]
    pub micro: String,
}

impl Run {
    /// The summary.
    pub fn rows(&self) -> Vec<Row> {
        self.throughput.iter().flat_map(Measurement::rows).collect()
    }
}

fn placement_text(placement: Option<Placement>) -> &'static str {
    match placement {
        Some(Placement::Near) => "near",
        Some(Placement::Far) => "far",
        None => "mixed",
    }
}

/// The summary as text, for terminals.
pub fn table(rows: &[Row]) -> String {
    use std::fmt::Write;
    let mut t = format!(
        "{:<32} {:<16} {:>8} {:>17} {:>7} {:>3} {:>5} {:>9} {:>7} {:>5} {:>8} {:>5}\n",
        "workload", "system", "Mpps", "min..max", "Gbit/s", "n", "cores", "x testpmd", "x OVS", "idle", "lost", "wrong"
    );
    let ratio = |r: Option<f64>| r.map_or("-".into(), |r| format!("{r:.2}"));
    for r in rows {
        let placement = placement_text(r.placement);
        // Frames of 64 KB are few.
        let digits = if r.mpps_median < 1.0 { 4 } else { 2 };
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "{:<32} {:<16} {:>8.digits$} {:>17} {:>7.2} {:>3} {:>5} {:>9} {:>7} {:>4.0}% {:>8} {:>5}",
            r.workload,
            r.system,
            r.mpps_median,
            format!("{:.digits$}..{:.digits$}", r.mpps_min, r.mpps_max),
            r.gbit_per_s_median,
            r.windows,
            placement,
            ratio(r.ratio_vs_testpmd_io),
            ratio(r.ratio_vs_ovs),
            r.generator_idle * 100.0,
            r.lost,
            r.wrong
        );
    }
    t
}

/// Metrics as text, for terminals, with the ratio to testpmd's and OVS's.
pub fn metrics_table(metrics: &[Metric]) -> String {
    use std::fmt::Write;
    let mut t = format!(
        "{:<48} {:<16} {:>12} {:>16} {:>23} {:>4} {:>5} {:>9} {:>7}\n",
        "what", "system", "median", "95 %", "min..max", "", "cores", "x testpmd", "x OVS"
    );
    for m in metrics {
        let ratio = |kinds: &[Kind]| {
            let of = |&kind: &Kind| metrics.iter().find(|o| o.name == m.name && o.system == kind);
            kinds.iter().find_map(of).map_or("-".into(), |o| format!("{:.2}", m.figure.median / o.figure.median))
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "{:<48} {:<16} {:>12.2} {:>16} {:>23} {:>4} {:>5} {:>9} {:>7}",
            m.name,
            m.system.name(),
            m.figure.median,
            m.figure.interval.map_or("-".into(), |[low, high]| format!("{low:.2}..{high:.2}")),
            format!("{:.2}..{:.2}", m.figure.min, m.figure.max),
            m.unit,
            placement_text(m.placement),
            ratio(&Kind::TESTPMD),
            ratio(&Kind::OVS)
        );
    }
    t
}

/// Results for tests.
#[cfg(test)]
pub(crate) mod test_support {
    use super::*;

    /// An undisturbed window.
    pub fn window(mpps: f64) -> Window {
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

    /// A workload with three windows about these figures.
    pub fn measurement(workload: Workload, figures: &[(Kind, f64)]) -> Measurement {
        let series = figures.iter().map(|&(system, mpps)| Series {
            system,
            windows: [0.99, 1.0, 1.01].map(|k| window(mpps * k)).to_vec(),
            tracked: None,
            failure: None,
        });
        Measurement { workload, series: series.collect() }
    }

    /// A metric of this value, less being better for times.
    pub fn metric(name: &str, system: Kind, value: f64) -> Metric {
        let figure = Figure { median: value, min: value, max: value, count: 3, interval: None };
        let higher_is_better = !name.contains(" p");
        Metric { name: name.into(), system, unit: "us".into(), higher_is_better, figure, placement: None }
    }

    /// A run of these.
    pub fn run(throughput: Vec<Measurement>, metrics: Vec<Metric>) -> Run {
        Run { format: 1, environment: Environment::default(), throughput, metrics, micro: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        let of = |n: usize| Figure::of(&(1..=n).rev().map(|v| v as f64).collect::<Vec<_>>()).expect("values").interval;
        // Ranks of Conover, "Practical Nonparametric Statistics", for 95 %.
        for (n, ranks) in [(6, [1, 6]), (10, [2, 9]), (20, [6, 15]), (25, [8, 18]), (60, [22, 39])] {
            assert_eq!(of(n), Some(ranks.map(f64::from)), "{n}");
        }
        assert_eq!([of(1), of(5), of(2000)], [None; 3]);
        assert!(of(1000).is_some_and(|[low, high]| (low, high) == (469.0, 532.0)), "{:?}", of(1000));
    }
}
