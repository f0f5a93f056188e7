//! `ferry-perf`: the command line of the benchmark suite.
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use ferry_perf::exchange::MOST_UNDER_WAY;
use ferry_perf::guest::ring::RingFormat;
use ferry_perf::hugepages::HugePages;
use ferry_perf::regime::{self, Environment, Placement};
use ferry_perf::results::{self, Measurement, Metric, Run};
use ferry_perf::run::{Bench, Exchange, Plan, VirtioUserJob};
use ferry_perf::system::Kind;
use ferry_perf::workload::{self, Workload};
use ferry_perf::{ceiling, compare, costs, peers, report, targets};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Connections per turn when their rate is measured.
const HANDSHAKES: u32 = 200_000;

/// Measures Ferry and its peers side by side, through the same vhost-user sockets.
#[derive(Debug, Parser)]
#[command(name = "ferry-perf", version, max_term_width = 110)]
struct Cli {
    /// Core of the generator, and of everything of the switches but their PMD threads.
    #[arg(long, global = true, default_value_t = 0)]
    generator_core: usize,
    /// Core of the switches' PMD threads.
    #[arg(long, global = true, default_value_t = 1)]
    switch_core: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A few workloads in under three minutes.
    Quick {
        /// Writes the summary to this file: a list of {workload, frame_bytes, connections, system, mpps_median, ...}.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Only workloads whose name contains this.
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Only these systems.
        #[arg(long, value_delimiter = ',')]
        systems: Vec<Kind>,
        /// Length of a window, milliseconds.
        #[arg(long, value_name = "MS")]
        window_ms: Option<u64>,
        /// Windows wanted per system.
        #[arg(long)]
        windows: Option<usize>,
    },
    /// All workloads, with connection rate and latency. Takes about forty minutes.
    Run {
        /// Where the results go (JSON); the report goes beside it.
        #[arg(long, value_name = "FILE", default_value = "target/perf/results.json")]
        output: PathBuf,
        /// Only workloads whose name contains this.
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Only these systems.
        #[arg(long, value_delimiter = ',')]
        systems: Vec<Kind>,
        /// Most time for one workload's windows, seconds.
        #[arg(long, value_name = "S", default_value_t = 25)]
        budget_s: u64,
        /// Turns of each switch when latency and connection rate are measured.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// No latency and no rate of connections.
        #[arg(long)]
        throughput_only: bool,
        /// Output of the micro-benchmarks, for the report.
        #[arg(long, value_name = "FILE")]
        micro: Option<PathBuf>,
    },
    /// Latency, rate of new connections, and throughput with virtio-user only.
    Exchange {
        /// Turns of each switch.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Only jobs whose name contains this: ping-pong, load, handshakes, fin, virtio-user.
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Only these systems.
        #[arg(long, value_delimiter = ',')]
        systems: Vec<Kind>,
    },
    /// What operating a live switch costs: dirty logging and tracking, migrations of connections, memory, idle ports, PMD threads.
    Costs {
        /// Pairs of windows, or samples.
        #[arg(long, default_value_t = COST_ROUNDS)]
        rounds: usize,
        /// Only measurements whose name contains this: final-delta, dirty-log, tracking-10k, tracking-1M, idle, pmd-scaling,
        /// stage-counters, and downtime, which boots guests and runs only when asked for.
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Writes the metrics to this file, as in the results of a run.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Makes the HTML report of a run's results.
    Report {
        /// Results of `ferry-perf run`.
        results: PathBuf,
        /// The page.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Prints what Ferry is to reach and what a run has measured of it, as Markdown.
    Targets {
        /// Results of `ferry-perf run`.
        results: PathBuf,
    },
    /// Compares Ferry's figures of two runs; exit status 1 when one got worse.
    Compare {
        /// Earlier results.
        old: PathBuf,
        /// Later results.
        new: PathBuf,
        /// Loss that is not worth mentioning, percent.
        #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
        tolerance: f64,
    },
    /// Shows which peers are installed; with --install installs what is missing.
    Peers {
        /// Installs Debian packages (needs root).
        #[arg(long)]
        install: bool,
    },
    /// Shows what the generator could do if a switch cost nothing: the most that can be measured here.
    Ceiling {
        /// Windows of each kind.
        #[arg(long, default_value_t = 5)]
        windows: usize,
        /// Length of a window, milliseconds.
        #[arg(long, value_name = "MS", default_value_t = 300)]
        window_ms: u64,
    },
    /// Shows the machine's regime: watches how near the two cores are.
    Probe {
        /// Seconds to watch.
        #[arg(long, value_name = "S", default_value_t = 5)]
        seconds: u64,
    },
}

/// Pairs of windows of each cost.
const COST_ROUNDS: usize = 10;

/// Huge pages for two OVS, one testpmd and the guests, of 2 MiB.
const HUGE_PAGES: u64 = 1300;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("ferry-perf: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// All throughput workloads, each reported as it is done.
fn throughput(
    bench: &mut Bench,
    workloads: &[Workload],
    save: impl Fn(&[Measurement]) -> Result<()>,
) -> Result<Vec<Measurement>> {
    let most = workloads.iter().map(|w| w.connections).max().unwrap_or(1);
    let mut done = Vec::new();
    let estimate: Duration = workloads.iter().map(|w| bench.plan().estimate(w)).sum();
    eprintln!("{} workloads, about {} minutes", workloads.len(), estimate.as_secs().div_ceil(60));
    for (w, n) in workloads.iter().zip(1..) {
        eprintln!("[{n}/{}] {}", workloads.len(), w.name);
        let m = bench.measure(w, most)?;
        for s in m.series.iter().filter(|s| s.failure.is_some()) {
            eprintln!("{}: {}: {}", w.name, s.system.name(), s.failure.as_deref().unwrap_or(""));
        }
        let text = results::table(&m.rows());
        // One heading for all.
        let text = if done.is_empty() { text.as_str() } else { text.split_once('\n').map_or("", |(_, rest)| rest) };
        print!("{text}");
        done.push(m);
        save(&done)?;
    }
    Ok(done)
}

/// Latency and connection rate.
fn exchanges(bench: &mut Bench, rounds: usize, only: Option<&str>, systems: &[Kind]) -> Result<Vec<Metric>> {
    let latency = [Kind::TestpmdIo, Kind::FerryL2, Kind::FerryFirewall, Kind::OvsL2, Kind::OvsCt];
    let stateful = [Kind::TestpmdIo, Kind::FerryFirewall, Kind::OvsCt];
    let handshakes = |count, under_way, close| Exchange::Handshakes { count, under_way, close };
    let jobs: [(&str, Exchange, &[Kind]); 6] = [
        ("ping-pong", Exchange::PingPong, &latency),
        ("load-50", Exchange::Loaded(50), &latency),
        ("load-90", Exchange::Loaded(90), &latency),
        ("handshakes", handshakes(HANDSHAKES, MOST_UNDER_WAY, false), &stateful),
        ("handshakes-alone", handshakes(HANDSHAKES / 4, 1, false), &stateful),
        ("handshakes-fin", handshakes(HANDSHAKES, MOST_UNDER_WAY, true), &stateful),
    ];
    let mut all = Vec::new();
    for (name, job, kinds) in jobs {
        if only.is_some_and(|o| !name.contains(o)) {
            continue;
        }
        let kinds: Vec<Kind> = kinds.iter().copied().filter(|k| systems.is_empty() || systems.contains(k)).collect();
        let (metrics, failures) = bench.exchange(job, &kinds, rounds, 2 * HANDSHAKES)?;
        for (kind, why) in failures {
            eprintln!("{name}: {}: {why}", kind.name());
        }
        print!("{}", results::metrics_table(&metrics));
        all.extend(metrics);
    }
    all.extend(virtio_user(bench, rounds, only, systems)?);
    Ok(all)
}

/// Throughput with DPDK's own virtio driver.
fn virtio_user(bench: &mut Bench, rounds: usize, only: Option<&str>, systems: &[Kind]) -> Result<Vec<Metric>> {
    let mut all = Vec::new();
    for stateful in [false, true] {
        let kinds = [Kind::TestpmdIo, if stateful { Kind::FerryFirewallOpen } else { Kind::FerryL2 }];
        let kinds: Vec<Kind> = kinds.into_iter().filter(|k| systems.is_empty() || systems.contains(k)).collect();
        for rings in [RingFormat::Split, RingFormat::Packed] {
            for frame_bytes in [64, 512, 1518] {
                let job = VirtioUserJob { frame_bytes, rings, stateful };
                if only.is_some_and(|o| !job.name().contains(o)) {
                    continue;
                }
                let (metrics, failures) = bench.virtio_user(job, &kinds, rounds)?;
                for (kind, why) in failures {
                    eprintln!("{}: {}: {why}", job.name(), kind.name());
                }
                print!("{}", results::metrics_table(&metrics));
                all.extend(metrics);
            }
        }
    }
    Ok(all)
}

/// Leaves only these systems of each workload, if any are named.
fn select(workloads: &mut Vec<Workload>, systems: &[Kind]) {
    for w in &mut *workloads {
        w.systems.retain(|s| systems.is_empty() || systems.contains(s));
    }
    workloads.retain(|w| !w.systems.is_empty());
}

fn read(file: &Path) -> Result<Run> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| file.display().to_string())
}

fn write(file: &Path, text: &str) -> Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(file, text).with_context(|| file.display().to_string())
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let (generator_core, switch_core) = (cli.generator_core, cli.switch_core);
    let environment = || Environment::probe(generator_core, switch_core, peers::versions());
    match &cli.command {
        Command::Quick { json, only, systems, window_ms, windows } => {
            let mut plan = Plan::quick(generator_core, switch_core);
            if let Some(ms) = window_ms {
                plan.window = Duration::from_millis(*ms);
            }
            plan.wanted = windows.unwrap_or(plan.wanted);
            let mut workloads = workload::quick();
            workloads.retain(|w| only.as_ref().is_none_or(|o| w.name.contains(o.as_str())));
            select(&mut workloads, systems);
            let _pages = HugePages::reserve(HUGE_PAGES)?;
            let done = throughput(&mut Bench::new(plan)?, &workloads, |_| Ok(()))?;
            if let Some(file) = json {
                let rows: Vec<_> = done.iter().flat_map(Measurement::rows).collect();
                write(file, &(serde_json::to_string_pretty(&rows)? + "\n"))?;
            }
        }
        Command::Run { output, only, systems, budget_s, rounds, throughput_only, micro } => {
            let micro =
                micro.as_deref().map(std::fs::read_to_string).transpose().context("--micro")?.unwrap_or_default();
            let plan = Plan { budget: Duration::from_secs(*budget_s), ..Plan::full(generator_core, switch_core) };
            let mut workloads = workload::full();
            workloads.retain(|w| only.as_ref().is_none_or(|o| w.name.contains(o.as_str())));
            select(&mut workloads, systems);
            let _pages = HugePages::reserve(HUGE_PAGES)?;
            let environment = environment()?;
            let save = |throughput: &[Measurement], metrics: &[Metric]| {
                let run = Run {
                    format: 1,
                    environment: environment.clone(),
                    throughput: throughput.to_vec(),
                    metrics: metrics.to_vec(),
                    micro: micro.clone(),
                };
                write(output, &(serde_json::to_string_pretty(&run)? + "\n"))?;
                write(&output.with_extension("html"), &report::html(&run))
            };
            let mut bench = Bench::new(plan)?;
            let mut metrics = Vec::new();
            if !throughput_only {
                if only.as_ref().is_none_or(|o| "ceiling".contains(o.as_str())) {
                    metrics = ceiling::ceiling(generator_core, switch_core, *rounds, Duration::from_millis(300))?;
                    print!("{}", results::metrics_table(&metrics));
                }
                metrics.extend(exchanges(&mut bench, *rounds, only.as_deref(), systems)?);
            }
            save(&[], &metrics)?;
            let done = throughput(&mut bench, &workloads, |done| save(done, &metrics))?;
            // Its switches are in the way of others.
            drop(bench);
            if !*throughput_only && (systems.is_empty() || systems.iter().any(|s| s.is_ferry())) {
                let terms = costs::terms(generator_core, switch_core, 2 * rounds);
                let only = only.as_deref();
                costs::measure(&terms, only, |new| {
                    metrics.extend_from_slice(new);
                    save(&done, &metrics)
                })?;
            }
            print!("{}", targets::markdown(&targets::targets(&read(output)?)));
            println!("{}\n{}", output.display(), output.with_extension("html").display());
        }
        Command::Exchange { rounds, only, systems } => {
            let _pages = HugePages::reserve(HUGE_PAGES)?;
            let mut bench = Bench::new(Plan::quick(generator_core, switch_core))?;
            exchanges(&mut bench, *rounds, only.as_deref(), systems)?;
        }
        Command::Costs { rounds, only, json } => {
            let mut all = Vec::new();
            let terms = costs::terms(generator_core, switch_core, *rounds);
            let failed = costs::measure(&terms, only.as_deref(), |new| {
                all.extend_from_slice(new);
                let Some(file) = json else { return Ok(()) };
                write(file, &(serde_json::to_string_pretty(&all)? + "\n"))
            })?;
            if failed || all.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Report { results, output } => {
            let page = output.clone().unwrap_or_else(|| results.with_extension("html"));
            write(&page, &report::html(&read(results)?))?;
            println!("{}", page.display());
        }
        Command::Targets { results } => print!("{}", targets::markdown(&targets::targets(&read(results)?))),
        Command::Compare { old, new, tolerance } => {
            let changes = compare::compare(&read(old)?, &read(new)?);
            print!("{}", compare::table(&changes, tolerance / 100.0));
            if changes.iter().any(|c| c.regression(tolerance / 100.0)) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Peers { install } => {
            if *install {
                peers::install()?;
            }
            let lines = peers::check();
            for line in &lines {
                match line {
                    Ok(text) => println!("ok       {text}"),
                    Err(text) => println!("missing  {text}"),
                }
            }
            if lines.iter().any(Result::is_err) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Ceiling { windows, window_ms } => {
            let _pages = HugePages::reserve(16)?;
            let window = Duration::from_millis(*window_ms);
            let metrics = ceiling::ceiling(generator_core, switch_core, *windows, window)?;
            print!("{}", results::metrics_table(&metrics));
        }
        Command::Probe { seconds } => {
            println!("{}", serde_json::to_string_pretty(&environment()?)?);
            let end = Instant::now() + Duration::from_secs(*seconds);
            while Instant::now() < end {
                let ns = regime::round_trip_ns(generator_core, switch_core)?;
                println!("cores {:.0} ns apart: {:?}", ns, Placement::of(ns));
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
