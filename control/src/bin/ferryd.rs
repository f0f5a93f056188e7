//! The daemon.
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ferry_control::config::{self, Config};
use ferry_control::core::SetLogLevel;
use ferry_control::daemon::Daemon;
use ferry_control::notify::Notifier;
use ferry_control::ports::PortOpener;
use ferry_control::{logs, threads};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use tokio::signal::unix::{SignalKind, signal};

use ferry_control::cli::DaemonArgs as Args;

fn main() -> ExitCode {
    let args = Args::parse();
    let config = match config::load(&args.config) {
        Ok(c) => c,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(2);
        }
    };
    if args.check {
        println!("{}: OK: {} bridge(s), {} port(s)", args.config.display(), config.bridge.len(), config.port.len());
        return ExitCode::SUCCESS;
    }
    let set_log_level = match logs::init(&config.log) {
        Ok(set) => set,
        Err(e) => {
            eprintln!("ferryd: cannot start logging: {e}");
            return ExitCode::from(2);
        }
    };
    threads::install_panic_hook();
    // Sockets and locks are made for the owner alone; the configured permissions are given afterwards.
    umask(Mode::from_bits_truncate(0o077));
    raise_descriptor_limit();
    let cores: Vec<u32> = config.pmds().iter().filter_map(|p| p.core).collect();
    threads::avoid_cores(&cores);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_name("ferry-control")
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(config, args.config, set_log_level)),
        Err(e) => Err(e.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Every queue pair takes several descriptors (kick, call, memory regions).
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("at most {soft} open files: {e}");
    }
}

async fn run(config: Config, file: PathBuf, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    let notifier = Notifier::from_env();
    let (mut term, mut int, mut hup) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %file.display(), "ferryd starts");
    // The file may be named relative to a directory that is left later.
    let file = std::fs::canonicalize(&file).unwrap_or(file);
    let dpdk = config.dpdk.clone();
    // Beside the API's socket: in the runtime directory, which is in memory and survives a restart of the daemon only.
    let ring_state_dir = config.api.socket.parent().map(|dir| dir.join("rings"));
    let opener = move |events| PortOpener::new(events, dpdk, ring_state_dir);
    let daemon = Daemon::start(config, Some(file), opener, set_log_level).await?;
    if let Some(address) = daemon.metrics_address() {
        tracing::info!("metrics on http://{address}/metrics");
    }
    tracing::info!("ferryd serves: {}", daemon.summary());
    notifier.ready(&daemon.summary());
    loop {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
            _ = hup.recv() => {
                notifier.reloading();
                match daemon.reload().await {
                    Ok(outcome) => {
                        outcome.changes.iter().for_each(|c| tracing::info!("reload: {c}"));
                        for key in &outcome.restart_required {
                            tracing::warn!("reload: {key} takes effect at the next start");
                        }
                        tracing::info!("reloaded, {} change(s)", outcome.changes.len());
                    }
                    Err(e) => tracing::error!("reload refused, nothing was changed: {e}\n  fix: {}", e.hint()),
                }
                notifier.ready(&daemon.summary());
                continue;
            }
        };
        tracing::info!("{name}: ferryd stops");
        notifier.stopping();
        daemon.stop().await;
        tracing::info!("ferryd has stopped");
        return Ok(());
    }
}
