//! `ferry-perf`: the command line of the benchmark suite.
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use ferry_perf::hugepages::HugePages;
use ferry_perf::regime::Environment;
use ferry_perf::results::{self, Run};
use ferry_perf::run::{Bench, Plan};
use ferry_perf::workload::{self, Workload};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
        systems: Vec<ferry_perf::system::Kind>,
        /// Length of a window, milliseconds.
        #[arg(long, value_name = "MS")]
        window_ms: Option<u64>,
        /// Windows wanted per system.
        #[arg(long)]
        windows: Option<usize>,
    },
    /// Shows the machine's regime.
    Probe,
}

/// Huge pages for two OVS, one testpmd and the guests, of 2 MiB.
const HUGE_PAGES: u64 = 1200;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ferry-perf: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(plan: Plan, workloads: &[Workload]) -> Result<Run> {
    let _pages = HugePages::reserve(HUGE_PAGES)?;
    let environment = Environment::probe(plan.generator_core, plan.switch_core, Vec::new())?;
    let mut bench = Bench::new(plan)?;
    let most = workloads.iter().map(|w| w.connections).max().unwrap_or(1);
    let mut throughput = Vec::new();
    for w in workloads {
        let m = bench.measure(w, most)?;
        for s in m.series.iter().filter(|s| s.failure.is_some()) {
            eprintln!("{}: {}: {}", w.name, s.system.name(), s.failure.as_deref().unwrap_or(""));
        }
        for s in &m.series {
            let all: Vec<String> = s
                .windows
                .iter()
                .map(|w| {
                    format!(
                        "{:.2}{}({:.0}-{:.0}ns,{}/{},idle {:.0}%,steal {})",
                        w.mpps,
                        if w.valid() { "" } else { "!" },
                        w.round_trip_ns[0],
                        w.round_trip_ns[1],
                        w.undisturbed,
                        w.slices,
                        w.generator_idle * 100.0,
                        w.steal_ms
                    )
                })
                .collect();
            eprintln!("  {:<15} tracked {:?}: {}", s.system.name(), s.tracked, all.join(" "));
        }
        print!("{}", results::table(&m.rows()));
        throughput.push(m);
    }
    Ok(Run { format: 1, environment, throughput })
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Quick { json, only, systems, window_ms, windows } => {
            let mut plan = Plan::quick(cli.generator_core, cli.switch_core);
            if let Some(ms) = window_ms {
                plan.window = Duration::from_millis(ms);
            }
            if let Some(n) = windows {
                plan.wanted = n;
            }
            let mut workloads = workload::quick();
            workloads.retain(|w| only.as_ref().is_none_or(|o| w.name.contains(o.as_str())));
            for w in &mut workloads {
                w.systems.retain(|s| systems.is_empty() || systems.contains(s));
            }
            let run = measure(plan, &workloads)?;
            if let Some(file) = json {
                let text = serde_json::to_string_pretty(&run.rows())?;
                std::fs::write(&file, text + "\n").with_context(|| file.display().to_string())?;
            }
            Ok(())
        }
        Command::Probe => {
            let e = Environment::probe(cli.generator_core, cli.switch_core, Vec::new())?;
            println!("{}", serde_json::to_string_pretty(&e)?);
            Ok(())
        }
    }
}
