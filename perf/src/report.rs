//! The report: one HTML page with its plots inside, readable without a network.
use crate::regime::Placement;
use crate::results::{Figure, Measurement, Metric, Run};
use crate::system::Kind;
use crate::targets;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Text as it stands in HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn colour(kind: Kind) -> &'static str {
    match kind {
        Kind::TestpmdIo | Kind::TestpmdTso => "#8c8c8c",
        Kind::FerryL2 => "#1f77b4",
        Kind::FerryFirewall | Kind::FerryFirewallOpen => "#08519c",
        Kind::OvsL2 | Kind::OvsL2Tso => "#fdae6b",
        Kind::OvsCt | Kind::OvsCtTso => "#e6550d",
        Kind::OvsCtPerPort => "#a63603",
        Kind::Turnaround => "#bbbbbb",
        Kind::KernelL2 => "#a1d99b",
        Kind::KernelFirewall => "#31a354",
    }
}

/// Three significant digits, no exponent.
fn short_figure(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// One bar: label, colour, figure, remark.
struct Bar {
    label: String,
    colour: &'static str,
    figure: Figure,
    remark: String,
}

/// Horizontal bars from zero, with the range of the values behind each as a whisker.
fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    const LEFT: f64 = 150.0;
    const WIDTH: f64 = 420.0;
    const ROW: f64 = 22.0;
    let most = bars.iter().map(|b| b.figure.max).fold(f64::MIN_POSITIVE, f64::max);
    let height = 26.0 + ROW * bars.len() as f64;
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"1000\" height=\"{height}\" viewBox=\"0 0 1000 {height}\">\
         <title>{0}</title><text x=\"0\" y=\"15\" class=\"h\">{0}</text>",
        escape(title)
    );
    for (i, b) in bars.iter().enumerate() {
        let y = 24.0 + ROW * i as f64;
        // Losses may be negative: such have no bar, only their figure.
        let x = |v: f64| LEFT + v.max(0.0) / most * WIDTH;
        // Writing to a String cannot fail.
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"16\" fill=\"{}\"/>\
             <path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#000\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{} {}{}</text>",
            LEFT - 6.0,
            y + 13.0,
            escape(&b.label),
            y,
            x(b.figure.median) - LEFT,
            b.colour,
            x(b.figure.min),
            y + 8.0,
            x(b.figure.max),
            x(b.figure.max) + 8.0,
            y + 13.0,
            short_figure(b.figure.median),
            escape(unit),
            escape(&b.remark),
        );
    }
    s + "</svg>"
}

fn placement(p: Option<Placement>) -> &'static str {
    match p {
        Some(Placement::Near) => "near cores",
        Some(Placement::Far) => "far cores",
        None => "placements mixed",
    }
}

fn throughput(m: &Measurement) -> String {
    let rows = m.rows();
    let list: Vec<Bar> = m
        .series
        .iter()
        .filter_map(|s| {
            let figure = m.figure(s.system)?;
            let row = rows.iter().find(|r| r.system == s.system.name())?;
            let times = |r: Option<f64>, what: &str| r.map_or(String::new(), |r| format!(" · {r:.2}x {what}"));
            let ratios = format!("{}{}", times(row.ratio_vs_testpmd_io, "testpmd"), times(row.ratio_vs_ovs, "OVS"));
            let gbit = format!(" · {:.1} Gbit/s{ratios}", row.gbit_per_s_median);
            let remark = if row.lost > 0 { format!("{gbit} · {} lost", row.lost) } else { gbit };
            Some(Bar { label: s.system.name().into(), colour: colour(s.system), figure, remark })
        })
        .collect();
    let title = format!(
        "{} ({}, n = {})",
        m.workload.name,
        placement(m.placement()),
        rows.iter().map(|r| r.windows).min().unwrap_or(0)
    );
    let mut html = bars(&title, "Mpps", &list);
    for s in m.series.iter().filter(|s| s.failure.is_some()) {
        let why = s.failure.as_deref().unwrap_or_default();
        let _ = write!(html, "<p class=\"bad\">{}: not measured: {}</p>", s.system.name(), escape(why));
    }
    html
}

fn metric(name: &str, metrics: &[Metric]) -> String {
    let list: Vec<Bar> = metrics
        .iter()
        .filter(|m| m.name == name)
        .map(|m| Bar {
            label: m.system.name().into(),
            colour: colour(m.system),
            figure: m.figure,
            remark: format!(" · n = {}", m.figure.count),
        })
        .collect();
    let first = metrics.iter().find(|m| m.name == name);
    let (unit, better, place) = first.map_or(("", true, None), |m| (m.unit.as_str(), m.higher_is_better, m.placement));
    let better = if better { "more is better" } else { "less is better" };
    bars(&format!("{name} ({better}, {})", placement(place)), unit, &list)
}

/// The page.
pub fn html(run: &Run) -> String {
    let e = &run.environment;
    let mut t = String::from(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Ferry and its peers</title><style>\
         body{font:15px/1.45 system-ui,sans-serif;max-width:67em;margin:2em auto;padding:0 1em}\
         svg{display:block;margin:.6em 0 1.2em;max-width:100%}svg text{font:12px system-ui,sans-serif}svg .h{font-weight:600;font-size:13px}\
         pre{font-size:11px;overflow-x:auto}table{border-collapse:collapse;font-size:13px}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}\
         td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}\
         .bad{color:#a00}.good{color:#070}.targets td:nth-child(2){color:#666;font-size:11px}.targets td:nth-child(n+3){white-space:nowrap}</style></head><body>\
         <h1>Ferry and its peers, side by side</h1>",
    );
    // Writing to a String cannot fail.
    let _ = write!(
        t,
        "<p>One generator on core {}, one PMD thread on core {}, the same vhost-user sockets for all. The switches take turns in \
         short windows; bars are medians, lines reach from the least to the greatest window. Only windows of the same placement of \
         the two cores are compared. Figures count frames delivered, all directions together; testpmd looks up nothing.</p>\
         <p>{} · {} cores · {} · Linux {} · cores' round trip at the start {:.0} ns · memory copy {:.1} GB/s · load {} · {}</p>",
        e.generator_core,
        e.switch_core,
        escape(&e.processor),
        e.cores,
        escape(&e.vectors),
        escape(&e.kernel),
        e.round_trip_ns,
        e.memory_gb_per_s,
        escape(&e.load),
        escape(&e.peers.join(", "))
    );
    t += "<h2>Targets</h2><p>Ratios are Ferry's figure divided by the peer's in the same run. Where several workloads are named, \
          the least ratio counts.</p>";
    t += &targets::html(&targets::targets(run));
    t += "<h2>Throughput</h2>";
    for m in &run.throughput {
        t += &throughput(m);
    }
    if !run.metrics.is_empty() {
        t += "<h2>Connections and latency</h2>";
        let names: BTreeSet<&str> = run.metrics.iter().map(|m| m.name.as_str()).collect();
        for name in names {
            t += &metric(name, &run.metrics);
        }
    }
    t += "<h2>All figures</h2><table><tr><th>workload</th><th>system</th><th>Mpps</th><th>min</th><th>max</th><th>windows</th>\
          <th>Gbit/s</th><th>x testpmd</th><th>x OVS</th><th>idle</th><th>lost</th><th>wrong</th></tr>";
    for r in run.rows() {
        let ratio = |r: Option<f64>| r.map_or("-".into(), |r| format!("{r:.2}"));
        let _ = write!(
            t,
            "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td><td>{:.3}</td><td>{}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{:.0} %</td><td>{}</td><td>{}</td></tr>",
            escape(&r.workload),
            r.system,
            r.mpps_median,
            r.mpps_min,
            r.mpps_max,
            r.windows,
            r.gbit_per_s_median,
            ratio(r.ratio_vs_testpmd_io),
            ratio(r.ratio_vs_ovs),
            r.generator_idle * 100.0,
            r.lost,
            r.wrong
        );
    }
    t += "</table>";
    if !run.micro.is_empty() {
        let _ = write!(t, "<h2>Micro-benchmarks</h2><pre>{}</pre>", escape(&run.micro));
    }
    t + "</body></html>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regime::Environment;
    use crate::results::Series;
    use crate::workload::Workload;

    #[test]
    fn the_page_holds_its_plots_and_no_reference_to_elsewhere() {
        let figure = Figure { median: 2.0, min: 1.0, max: 3.0, count: 5, interval: None };
        let metric = Metric {
            name: "ping-pong <64> p50".into(),
            system: Kind::FerryL2,
            unit: "us".into(),
            higher_is_better: false,
            figure,
            placement: None,
        };
        let failed =
            |system| Series { system, windows: Vec::new(), tracked: None, failure: Some("no <huge> pages".into()) };
        let workload = Workload::l2(64);
        let series = vec![failed(Kind::OvsL2)];
        let throughput = vec![Measurement { workload, series }];
        let run = Run {
            format: 1,
            environment: Environment::default(),
            throughput,
            metrics: vec![metric],
            micro: "table <1>".into(),
        };
        let page = html(&run);
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(page.contains("no &lt;huge&gt; pages") && page.contains("ping-pong &lt;64&gt; p50"));
        assert!(page.contains("<pre>table &lt;1&gt;</pre>"));
        for elsewhere in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(elsewhere), "{elsewhere}");
        }
    }
}
