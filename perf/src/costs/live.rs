//! What a migration costs the traffic of a live switch: dirty-page logging, dirty tracking of connections, rounds towards another ferryd.
//!
//! The guests do as QEMU does: a log, the feature, a reader that empties the log. The source is the ferryd that is measured, the
//! destination a second one on this machine; everything of both but the source's PMD thread runs on the generator's core.
use super::switch::{Extras, PATIENCE, Switch};
use super::window::{Terms, lost_percent, window};
use super::{gauge, on_core};
use crate::affinity::{self, Urgency};
use crate::frame::Transport;
use crate::generator::Generator;
use crate::guest::GuestSpec;
use crate::guest::logging::PageLog;
use crate::guest::split::SplitRing;
use crate::results::{Figure, Metric, Window};
use crate::run::{self, Urgent};
use crate::system::{Kind, Setup};
use crate::workload::{Workload, short};
use anyhow::{Context, Result, ensure};
use ferry_tests::two_hosts::channel::issue;
use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// QEMU takes the log's bits in each of its rounds.
const LOG_IS_READ: Duration = Duration::from_millis(100);

/// Below this share of idle turns the generator may be what limits the figure.
const LEAST_IDLE: f64 = 0.02;

type Guests = Generator<SplitRing>;

/// Attaches guests to all ports of a switch, and opens the workload's connections.
pub(super) fn attach(switch: &Switch, terms: &Terms, workload: &Workload) -> Result<Guests> {
    let mut generator = Generator::attach(&switch.sockets, &GuestSpec::new(workload.frame_bytes))?;
    generator.streams(workload.streams());
    let _urgency = Urgent::new(switch.process.id(), terms.switch_core)?;
    run::open(&mut generator, workload)?;
    Ok(generator)
}

/// The guests' dirty logs, and how many pages their reader has found.
struct Logs {
    logs: Vec<PageLog>,
    dirty_pages: AtomicU64,
    end: AtomicBool,
}

impl Logs {
    fn new(guests: &mut Guests) -> Result<Self> {
        let logs = guests.guests().map(|guest| PageLog::new(guest.memory_end())).collect::<Result<Vec<_>>>()?;
        Ok(Self { logs, dirty_pages: AtomicU64::new(0), end: AtomicBool::new(false) })
    }

    /// What QEMU does while a migration runs, until the end.
    fn read(&self) {
        affinity::set_urgency(0, Urgency::Helper);
        while !self.end.load(Relaxed) {
            std::thread::sleep(LOG_IS_READ);
            self.dirty_pages.fetch_add(self.logs.iter().map(PageLog::take).sum(), Relaxed);
        }
    }

    fn start(&self, guests: &mut Guests) -> Result<()> {
        guests.guests().zip(&self.logs).try_for_each(|(guest, log)| guest.start_logging(log))
    }

    fn stop(&self, guests: &mut Guests) -> Result<()> {
        guests.guests().try_for_each(|guest| guest.stop_logging())?;
        for log in &self.logs {
            log.take();
        }
        Ok(())
    }

    /// Runs `job` with the reader beside it.
    fn with_reader<T>(&self, job: impl FnOnce() -> Result<T>) -> Result<T> {
        std::thread::scope(|s| {
            let reader = s.spawn(|| self.read());
            let result = job();
            self.end.store(true, Relaxed);
            reader.join().ok().context("the reader of the dirty log panicked")?;
            result
        })
    }

    /// A window in which the switch has to have logged something, or nothing at all.
    fn window(&self, guests: &mut Guests, terms: &Terms, pid: u32, others: &[u32], logs: bool) -> Result<Window> {
        self.dirty_pages.store(0, Relaxed);
        let window = window(guests, terms, pid, others)?;
        std::thread::sleep(LOG_IS_READ * 2);
        let pages = self.dirty_pages.load(Relaxed);
        // The bit by which the switch sees QEMU's rounds pass may be set once more after logging was stopped.
        let own = self.logs.len() as u64;
        ensure!(if logs { pages > own } else { pages <= own }, "{pages} pages were logged");
        Ok(window)
    }
}

fn setup(terms: &Terms, folder: &Path, ports: usize, connections: u32) -> Setup {
    Setup {
        folder: folder.to_path_buf(),
        ports,
        switch_core: terms.switch_core,
        generator_core: terms.generator_core,
        mtu: 1504,
        connections,
        rules: 0,
    }
}

fn lost(name: String, system: Kind, pairs: &[(Window, Window)]) -> Option<Metric> {
    let (figure, placement) = lost_percent(pairs)?;
    let idle = Figure::of(&pairs.iter().map(|(without, _)| without.generator_idle).collect::<Vec<_>>())?.median;
    if idle < LEAST_IDLE {
        eprintln!("{name}: the generator was idle in {:.1} % of its turns only: it may hide a loss", idle * 100.0);
    }
    Some(Metric { name, system, unit: "%".into(), higher_is_better: false, figure, placement })
}

/// Throughput lost to dirty-page logging: 64 and 1518 bytes through the bridge, 64 bytes of 10,000 connections through firewalls.
///
/// # Errors
/// When the switch does not come up, forward or log.
pub fn logging(terms: &Terms, folder: &Path) -> Result<Vec<Metric>> {
    let jobs = [Workload::l2(64), Workload::l2(1518), Workload::stateful(Transport::Udp, 64, 10_000)];
    let mut metrics = Vec::new();
    for workload in jobs {
        let firewall = workload.stateful_systems();
        let extras = Extras { firewall, ..Extras::default() };
        let setup = setup(terms, folder, workload.ports, workload.connections);
        let switch = Switch::start(&setup, "logging", &extras)?;
        let pid = switch.process.id();
        let pairs = on_core(terms.generator_core, || {
            let mut guests = attach(&switch, terms, &workload)?;
            let logs = Logs::new(&mut guests)?;
            logs.with_reader(|| {
                let mut pairs = Vec::new();
                for round in 0..terms.rounds {
                    let mut both = [None, None];
                    // Which comes first alternates, so that a drift of the machine harms neither.
                    for i in 0..2 {
                        let on = (i + round) % 2 == 1;
                        if on {
                            logs.start(&mut guests)?;
                        }
                        both[usize::from(on)] = Some(logs.window(&mut guests, terms, pid, &[], on)?);
                        if on {
                            logs.stop(&mut guests)?;
                        }
                    }
                    if let [Some(off), Some(on)] = both {
                        pairs.push((off, on));
                    }
                }
                Ok(pairs)
            })
        })?;
        let system = if firewall { Kind::FerryFirewall } else { Kind::FerryL2 };
        metrics.extend(lost(format!("dirty-log-loss {}", workload.name), system, &pairs));
    }
    Ok(metrics)
}

/// Two hosts' part of the configuration: the first one's, and the second's.
fn migration(folder: &Path) -> Result<[String; 2]> {
    let names = ["host-a", "host-b"];
    let pki = names.map(|name| folder.join(format!("{name}-pki")));
    let authority = folder.join("authority");
    for old in pki.iter().chain([&authority]) {
        let _ = std::fs::remove_dir_all(old);
    }
    issue(&authority, &[(names[0], pki[0].clone()), (names[1], pki[1].clone())])?;
    // Both held until both are chosen, so that they differ.
    let free = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    let addresses = [free[0].local_addr()?, free[1].local_addr()?];
    Ok([0, 1].map(|this| {
        let peer = 1 - this;
        format!(
            "[migration]\nenabled = true\nhost = \"{}\"\nlisten = \"{}\"\npki = {:?}\naudit_log = {:?}\n\
             [[migration.peer]]\nhost = \"{}\"\naddress = \"{}\"\n\
             [[migration.rule]]\nvm = \"vm*\"\npeer = \"{}\"\nroles = [\"send\", \"receive\"]\n",
            names[this],
            addresses[this],
            pki[this],
            pki[this].join("audit.log"),
            names[peer],
            addresses[peer],
            names[peer],
        )
    }))
}

/// Both guests of a pair, whose VMs are copied to another host.
struct Copying<'a> {
    source: &'a Switch,
    vms: Vec<String>,
}

impl Copying<'_> {
    fn wait(&self, what: &str, is: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
        self.vms.iter().map(|vm| self.source.wait(&["migrate", "status", vm], what, &is)).collect()
    }

    /// A migration has begun: until the other host has all connections once. Returns what the source tells of it.
    fn wait_copied(&self) -> Result<Vec<Value>> {
        self.wait("first round", |m| {
            m.get("ended_at_ms").is_none_or(Value::is_null) && m["rounds"].as_array().is_some_and(|r| !r.is_empty())
        })
    }

    /// The VMs still migrate, without their connections.
    fn cancel(&self) -> Result<()> {
        self.vms.iter().try_for_each(|vm| self.source.tell(&["migrate", "cancel", vm]).map(drop))?;
        self.wait_ended()
    }

    fn wait_ended(&self) -> Result<()> {
        self.wait("end of the migration", |m| m["ended_at_ms"].is_number()).map(drop)
    }
}

/// What goes on beside the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing.
    Off,
    /// The VMs migrate without their connections.
    Log,
    /// The VMs migrate with them.
    Rounds,
}

/// Windows of a round: without anything, with the log alone, with tracking and rounds.
struct Round {
    off: Window,
    log: Window,
    rounds: Window,
}

/// What the source told.
#[derive(Default)]
struct Told {
    records_per_s: Vec<f64>,
    bytes_per_record: Vec<f64>,
}

/// Throughput lost to dirty tracking while another host is kept up to date, 64 bytes, both VMs of the pair tracked; and memory per connection.
///
/// # Errors
/// When a switch does not come up or forward, or connections do not reach the other host.
pub fn tracking(terms: &Terms, folder: &Path, connections: u32) -> Result<Vec<Metric>> {
    let workload = Workload::stateful(Transport::Udp, 64, connections);
    let setup = setup(terms, folder, 2, connections);
    let sections = migration(folder)?;
    let [here, there] = sections;
    let memory = memory_before(terms, folder)?;
    let source = Switch::start(&setup, "source", &Extras { firewall: true, sections: here, ..Extras::default() })?;
    let extras = Extras { firewall: true, sleeps: true, sections: there, ..Extras::default() };
    let destination = Switch::start(&setup, "destination", &extras)?;
    let (pid, others) = (source.process.id(), [destination.process.id()]);
    let copying = Copying { source: &source, vms: vec!["vm0".into(), "vm1".into()] };
    let mut told = Told::default();
    let mut entries = 0;
    let mut resident = 0;
    let rounds = on_core(terms.generator_core, || {
        let mut guests = attach(&source, terms, &workload)?;
        entries = table(&source)?.0;
        resident = source.resident_bytes()?;
        let logs = Logs::new(&mut guests)?;
        logs.with_reader(|| {
            let mut all = Vec::new();
            for round in 0..terms.rounds {
                let mut off = None;
                let (mut log, mut tracked) = (None, None);
                // The order is turned round from round to round, so that a drift of the machine harms no state.
                let mut order = [State::Off, State::Log, State::Rounds];
                if round % 2 == 1 {
                    order.reverse();
                }
                for state in order {
                    if state != State::Off {
                        logs.start(&mut guests)?;
                        for m in copying.wait_copied()? {
                            told.note(&m["rounds"][0], connections)?;
                        }
                    }
                    if state == State::Log {
                        copying.cancel()?;
                    }
                    let window = logs.window(&mut guests, terms, pid, &others, state != State::Off)?;
                    if state != State::Off {
                        logs.stop(&mut guests)?;
                        copying.wait_ended()?;
                        settle(&destination)?;
                    }
                    *match state {
                        State::Off => &mut off,
                        State::Log => &mut log,
                        State::Rounds => &mut tracked,
                    } = Some(window);
                }
                if let (Some(off), Some(log), Some(rounds)) = (off, log, tracked) {
                    all.push(Round { off, log, rounds });
                }
            }
            Ok(all)
        })
    })?;
    let n = short(connections);
    let pairs = |of: fn(&Round) -> (Window, Window)| rounds.iter().map(of).collect::<Vec<_>>();
    let mut metrics: Vec<Metric> = [
        (format!("tracking-loss {n}"), pairs(|r| (r.log.clone(), r.rounds.clone()))),
        (format!("migration-loss {n}"), pairs(|r| (r.off.clone(), r.rounds.clone()))),
        (format!("dirty-log-loss stateful-udp-64-{n} migrating"), pairs(|r| (r.off.clone(), r.log.clone()))),
    ]
    .into_iter()
    .filter_map(|(name, pairs)| lost(name, Kind::FerryFirewall, &pairs))
    .collect();
    metrics.extend(gauge(format!("live-first-round {n}"), "records/s", true, &told.records_per_s));
    metrics.extend(gauge(format!("live-bytes-per-record {n}"), "B", false, &told.bytes_per_record));
    if connections >= 100_000 {
        let per_entry = resident.saturating_sub(memory) as f64 / entries.max(1) as f64;
        metrics.extend(gauge(format!("memory-per-connection resident {n}"), "B", false, &[per_entry]));
        let (_, capacity, bytes) = table(&source)?;
        metrics.extend(gauge(
            format!("memory-per-connection table {n}"),
            "B",
            false,
            &[bytes as f64 / capacity.max(1) as f64],
        ));
    }
    Ok(metrics)
}

impl Told {
    fn note(&mut self, round: &Value, connections: u32) -> Result<()> {
        let field = |name: &str| round[name].as_f64().with_context(|| format!("{name}: {round}"));
        let (entries, bytes, ms) = (field("entries")?, field("bytes")?, field("duration_ms")?);
        ensure!(entries >= f64::from(connections), "the first round had {entries} of {connections} connections");
        self.records_per_s.push(entries / ms.max(1.0) * 1000.0);
        self.bytes_per_record.push(bytes / entries);
        Ok(())
    }
}

/// Waits until the destination has noticed that nothing comes any more.
fn settle(destination: &Switch) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let list = destination.ask(&["migrate", "status"])?;
        let under_way = |m: &Value| !m["ended_at_ms"].is_number();
        if !list["migrations"].as_array().context("migrations")?.iter().any(under_way) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the destination still waits: {list}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Entries in all tables of a switch, room for as many, and the memory set apart for them, bytes.
fn table(switch: &Switch) -> Result<(u64, u64, u64)> {
    let stats = switch.ask(&["conntrack", "stats"])?;
    let vms = stats["vms"].as_array().context("no list of VMs")?;
    let sum = |field: &str| vms.iter().filter_map(|vm| vm["stats"][field].as_u64()).sum::<u64>();
    Ok((sum("connections"), sum("capacity"), sum("memory_bytes")))
}

/// Resident bytes of the same switch with the smallest tables and the same guests, and no connections.
fn memory_before(terms: &Terms, folder: &Path) -> Result<u64> {
    let setup = setup(terms, folder, 2, 1);
    let switch = Switch::start(&setup, "small", &Extras { firewall: true, ..Extras::default() })?;
    on_core(terms.generator_core, || {
        let guests = attach(&switch, terms, &Workload::stateful(Transport::Udp, 64, 1))?;
        let resident = switch.resident_bytes();
        drop(guests);
        resident
    })
}
