//! Running workloads: all switches of a workload are up at once, one of them awake at a time, and take turns in short windows.
use crate::affinity::{self, SchedStat, Urgency};
use crate::exchange::Pair;
use crate::frame::{MTU, Transport};
use crate::generator::{Generator, Tally};
use crate::guest::ring::{DriverRing, RingFormat};
use crate::guest::{GuestSpec, packed::PackedRing, split::SplitRing};
use crate::histogram::{Histogram, Quantiles};
use crate::regime;
use crate::regime::Placement;
use crate::results::{Figure, MOST_WAITED, Measurement, Metric, Series, Window, prefer};
use crate::stream::Step;
use crate::system::{Kind, Setup, System};
use crate::virtio_user::VirtioUser;
use crate::workload::Workload;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::time::{Duration, Instant};

/// Length of a slice of a window.
const SLICE: Duration = Duration::from_millis(100);

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Core of the generator.
    pub generator_core: usize,
    /// Core of the switch's PMD thread.
    pub switch_core: usize,
    /// Length of a window.
    pub window: Duration,
    /// Undisturbed windows per switch that are wanted, all in the same placement.
    pub wanted: usize,
    /// Most time for one workload's windows; opening connections comes on top.
    pub budget: Duration,
}

impl Plan {
    /// For a quick look: about 10 s per workload.
    pub fn quick(generator_core: usize, switch_core: usize) -> Self {
        Self {
            generator_core,
            switch_core,
            window: Duration::from_millis(400),
            wanted: 5,
            budget: Duration::from_secs(10),
        }
    }

    /// For a full run.
    pub fn full(generator_core: usize, switch_core: usize) -> Self {
        Self {
            window: Duration::from_millis(700),
            wanted: 5,
            budget: Duration::from_secs(30),
            ..Self::quick(generator_core, switch_core)
        }
    }
}

impl Plan {
    /// About how long a workload takes, if nothing disturbs it: its windows, with the probes around them, and the opening of
    /// its connections.
    pub fn estimate(&self, workload: &Workload) -> Duration {
        let turns = (self.wanted * workload.systems.len()) as u32;
        // Each window is preceded by a warm-up of an eighth and surrounded by two probes and a drain.
        let windows = (self.window * 9 / 8 + Duration::from_millis(150)) * turns;
        let frames = u64::from(workload.connections) * workload.busy_pairs as u64 * workload.systems.len() as u64;
        windows.min(self.budget) + Duration::from_secs(4) + Duration::from_micros(frames * 2)
    }
}

/// Switches that are up, each for one setup.
pub struct Bench {
    plan: Plan,
    folder: tempfile::TempDir,
    running: BTreeMap<Kind, Box<dyn System>>,
    setup: Option<(usize, usize, usize, u32)>,
}

impl Bench {
    /// Nothing is up yet.
    ///
    /// # Errors
    /// When there is no place for files.
    pub fn new(plan: Plan) -> Result<Self> {
        // Short: the paths of Unix sockets are limited to 107 bytes.
        let folder = tempfile::Builder::new().prefix("ferry-perf.").tempdir()?;
        Ok(Self { plan, folder, running: BTreeMap::new(), setup: None })
    }

    /// How long and how often it measures.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Measures one workload. A switch that cannot be measured is reported as such; the others are measured all the same.
    ///
    /// # Errors
    /// When the generator itself fails.
    pub fn measure(&mut self, workload: &Workload, most_connections: u32) -> Result<Measurement> {
        // Two ports are given room for the largest workload, so that they need not be started anew for it; many are not.
        let connections =
            if workload.ports > 2 { workload.connections } else { most_connections.max(workload.connections) };
        let failures = self.ensure(&workload.systems, (workload.ports, workload.mtu(), workload.rules, connections));
        let systems: Vec<&mut Box<dyn System>> =
            self.running.iter_mut().filter(|(k, _)| workload.systems.contains(k)).map(|(_, s)| s).collect();
        let plan = self.plan;
        // A thread of its own: its core and priority must not be inherited by the next switch that is started.
        let measured = std::thread::scope(|s| {
            let thread = s.spawn(move || {
                affinity::pin_self(plan.generator_core)?;
                match workload.rings {
                    RingFormat::Split => interleave::<SplitRing>(&plan, workload, systems),
                    RingFormat::Packed => interleave::<PackedRing>(&plan, workload, systems),
                }
            });
            thread.join().ok().context("the generator panicked")?
        })?;
        let mut series: Vec<Series> = workload
            .systems
            .iter()
            .map(|&system| {
                measured.iter().find(|s| s.system == system).cloned().unwrap_or_else(|| Series {
                    system,
                    windows: Vec::new(),
                    tracked: None,
                    failure: failures.get(&system).cloned().or(Some("not started".into())),
                })
            })
            .collect();
        // What has failed is not used again.
        for s in series.iter_mut().filter(|s| s.failure.is_some()) {
            self.running.remove(&s.system);
        }
        Ok(Measurement { workload: workload.clone(), series })
    }

    /// Starts what is not up yet. `key` is ports, MTU, rules, connections. Returns what has failed, and why.
    fn ensure(&mut self, kinds: &[Kind], key: (usize, usize, usize, u32)) -> BTreeMap<Kind, String> {
        if self.setup != Some(key) {
            self.running.clear();
            self.setup = Some(key);
        }
        // Each holds huge pages.
        self.running.retain(|k, _| kinds.contains(k));
        let setup = Setup {
            folder: self.folder.path().to_path_buf(),
            ports: key.0,
            switch_core: self.plan.switch_core,
            generator_core: self.plan.generator_core,
            mtu: key.1,
            connections: key.3,
            rules: key.2,
        };
        let mut failures = BTreeMap::new();
        for &kind in kinds {
            if self.running.contains_key(&kind) {
                continue;
            }
            // A folder that an earlier instance has left would hold its sockets.
            let _ = std::fs::remove_dir_all(setup.folder.join(kind.name()));
            match kind.start(&setup) {
                Ok(mut system) => {
                    system.process().pause();
                    self.running.insert(kind, system);
                }
                Err(e) => {
                    failures.insert(kind, format!("{e:#}"));
                }
            }
        }
        failures
    }

    /// Measures what two guests that answer each other see: `rounds` turns of each switch. Returns the metrics, and what
    /// could not be measured.
    ///
    /// # Errors
    /// When the generator itself fails.
    pub fn exchange(
        &mut self,
        job: Exchange,
        kinds: &[Kind],
        rounds: usize,
        most_connections: u32,
    ) -> Result<(Vec<Metric>, BTreeMap<Kind, String>)> {
        let mut failures = self.ensure(kinds, (2, MTU, 0, most_connections.max(job.connections())));
        let plan = self.plan;
        let systems: Vec<&mut Box<dyn System>> =
            self.running.iter_mut().filter(|(k, _)| kinds.contains(k)).map(|(_, s)| s).collect();
        let (metrics, failed) = std::thread::scope(|s| {
            let thread = s.spawn(move || {
                affinity::pin_self(plan.generator_core)?;
                anyhow::Ok(exchange_rounds(&plan, job, rounds, systems))
            });
            thread.join().ok().context("the generator panicked")?
        })?;
        for kind in failed.keys() {
            self.running.remove(kind);
        }
        failures.extend(failed);
        Ok((metrics, failures))
    }

    /// Throughput with DPDK's virtio-user as the generator, both directions.
    ///
    /// # Errors
    /// When the probe fails.
    pub fn virtio_user(
        &mut self,
        job: VirtioUserJob,
        kinds: &[Kind],
        rounds: usize,
    ) -> Result<(Vec<Metric>, BTreeMap<Kind, String>)> {
        // Whatever is up already will do: there is one connection.
        let fits = |k: &(usize, usize, usize, u32)| k.0 == 2 && k.2 == 0 && k.1 + 14 >= job.frame_bytes;
        let key = self.setup.filter(fits).unwrap_or((2, MTU, 0, 1));
        let mut failures = self.ensure(kinds, key);
        let plan = self.plan;
        let folder = self.folder.path().to_path_buf();
        let mut turns: BTreeMap<Kind, Vec<(Option<Placement>, f64)>> = BTreeMap::new();
        let mut generators: BTreeMap<Kind, VirtioUser> = BTreeMap::new();
        for _ in 0..rounds {
            for (&kind, system) in self.running.iter_mut().filter(|(k, _)| kinds.contains(k)) {
                if failures.contains_key(&kind) {
                    continue;
                }
                system.process().resume();
                match virtio_user_turn(&plan, job, system, generators.entry(kind), &folder) {
                    Ok(turn) => turns.entry(kind).or_default().push(turn),
                    Err(e) => {
                        failures.insert(kind, format!("{e:#}"));
                        generators.remove(&kind);
                    }
                }
                system.process().pause();
            }
        }
        // The generators go first; switches notice when they wake.
        drop(generators);
        let least = |p| turns.values().map(|t| t.iter().filter(|t| t.0 == Some(p)).count()).min().unwrap_or(0);
        let placement = prefer(least(Placement::Near), least(Placement::Far));
        let metrics = turns.iter().filter_map(|(&system, turns)| {
            let counted = turns.iter().filter(|t| placement.is_none() || t.0 == placement).map(|t| t.1);
            let figure = Figure::of(&counted.collect::<Vec<_>>())?;
            Some(Metric { name: job.name(), system, unit: "Mpps".into(), higher_is_better: true, figure, placement })
        });
        Ok((metrics.collect(), failures))
    }

    /// Where logs and sockets are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A job for DPDK's virtio-user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioUserJob {
    /// Length of each frame, bytes.
    pub frame_bytes: usize,
    /// Ring format of the guests.
    pub rings: RingFormat,
    /// Whether it is for switches that track connections.
    pub stateful: bool,
}

impl VirtioUserJob {
    /// Its name in results.
    pub fn name(self) -> String {
        let what = if self.stateful { "stateful" } else { "l2" };
        let rings = if self.rings == RingFormat::Packed { "-packed" } else { "" };
        format!("virtio-user {what}-{}{rings}", self.frame_bytes)
    }
}

/// One window: the placement of the cores, if it stayed, and million frames per second.
fn virtio_user_turn(
    plan: &Plan,
    job: VirtioUserJob,
    system: &mut Box<dyn System>,
    generator: Entry<'_, Kind, VirtioUser>,
    folder: &Path,
) -> Result<(Option<Placement>, f64)> {
    let generator = match generator {
        Entry::Occupied(e) => e.into_mut(),
        Entry::Vacant(e) => {
            let core = plan.generator_core;
            let log = folder.join(format!("virtio-user-{}.log", e.key().name()));
            e.insert(VirtioUser::start(system.sockets(), core, job.frame_bytes, job.rings, &log)?)
        }
    };
    generator.process().pause();
    let urgency = Urgent::switch(system.process().id(), plan.switch_core)?;
    let before = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
    generator.process().resume();
    let mpps = generator.mpps(plan.window);
    // Before the probe: it needs both cores.
    generator.process().pause();
    let mpps = mpps?;
    let after = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
    drop(urgency);
    if system.connections()? == Some(0) {
        bail!("it has tracked no connection");
    }
    let [before, after] = [before, after].map(Placement::of);
    Ok(((before == after).then_some(before), mpps))
}

/// One switch under the workload.
struct Subject<'a, R> {
    system: &'a mut Box<dyn System>,
    generator: Option<Generator<R>>,
    windows: Vec<Window>,
    tracked: Option<u64>,
    failure: Option<String>,
}

fn interleave<R: DriverRing>(
    plan: &Plan,
    workload: &Workload,
    systems: Vec<&mut Box<dyn System>>,
) -> Result<Vec<Series>> {
    let mut subjects: Vec<Subject<'_, R>> = systems
        .into_iter()
        .map(|system| Subject { system, generator: None, windows: Vec::new(), tracked: None, failure: None })
        .collect();
    for s in &mut subjects {
        s.awake(|s| s.open(plan, workload));
    }
    let deadline = Instant::now() + plan.budget;
    loop {
        for s in subjects.iter_mut().filter(|s| s.failure.is_none()) {
            s.awake(|s| s.window(plan, workload));
        }
        let series: Vec<Series> = subjects.iter().map(Subject::series).collect();
        let measurement = Measurement { workload: workload.clone(), series };
        let enough = measurement.placement().is_some_and(|p| {
            let mut ok = measurement.series.iter().filter(|s| s.failure.is_none());
            ok.all(|s| s.counted(p).len() >= plan.wanted)
        });
        if enough || Instant::now() > deadline || subjects.iter().all(|s| s.failure.is_some()) {
            break;
        }
    }
    for s in subjects.iter_mut().filter(|s| s.failure.is_none()) {
        s.awake(|s| {
            s.tracked = s.system.connections()?;
            // The guests go before the switch is put to sleep, and the next workload begins with empty tables.
            s.generator = None;
            s.system.flush()
        });
    }
    Ok(subjects.iter().map(Subject::series).collect())
}

impl<R: DriverRing> Subject<'_, R> {
    fn series(&self) -> Series {
        Series {
            system: self.system.kind(),
            windows: self.windows.clone(),
            tracked: self.tracked,
            failure: self.failure.clone(),
        }
    }

    /// Wakes the switch for one job. A failure ends its part.
    fn awake(&mut self, job: impl FnOnce(&mut Self) -> Result<()>) {
        self.system.process().resume();
        let result = job(self);
        if let Err(e) = result {
            let mut why = format!("{e:#}");
            if let Err(gone) = self.system.process().check() {
                why = format!("{why}; {gone:#}");
            }
            self.failure = Some(why);
            self.generator = None;
        }
        self.system.process().pause();
    }

    /// Attaches guests and opens all connections.
    fn open(&mut self, plan: &Plan, workload: &Workload) -> Result<()> {
        let spec = GuestSpec { listens: self.system.dials(), ..workload.guests() };
        let sockets = self.system.sockets();
        let mut generator = Generator::<R>::attach(sockets, &spec)?;
        generator.streams(workload.streams());
        // Noticing guests is the work of a switch's other threads, some of which it may only start for that.
        ready(&mut generator, workload)?;
        let _urgency = Urgent::new(self.system.process().id(), plan.switch_core)?;
        open(&mut generator, workload)?;
        self.generator = Some(generator);
        Ok(())
    }

    fn window(&mut self, plan: &Plan, workload: &Workload) -> Result<()> {
        let generator = self.generator.as_mut().context("no generator")?;
        let urgency = Urgent::new(self.system.process().id(), plan.switch_core)?;
        let threads = urgency.pmd.clone();
        generator.start(workload.both_directions)?;
        generator.run(plan.window / 8)?; // caches, branch predictors, the switch's own
        let before = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
        let steal = |p: &Plan| regime::steal_ms(p.generator_core) + regime::steal_ms(p.switch_core);
        let (stolen, own) = (steal(plan), affinity::own_id());
        generator.run(SLICE / 8)?; // the probe has left both cores idle
        let slices = (plan.window.as_millis() / SLICE.as_millis()).max(1) as usize;
        let mut measured = Vec::new();
        let mut sum = Window::begun(slices, before);
        for _ in 0..slices {
            let stats = (SchedStat::sum(&threads), SchedStat::of(own));
            let tally: Tally = generator.run(SLICE)?;
            let switch = SchedStat::sum(&threads).since(stats.0).waited_ns as f64 / 1e9;
            let generator = SchedStat::of(own).since(stats.1).waited_ns as f64 / 1e9;
            measured.push((switch.max(generator) / tally.seconds <= MOST_WAITED, tally.mpps()));
            sum.seconds += tally.seconds;
            sum.findings.add(&tally.findings);
            sum.switch_waited += switch;
            sum.generator_waited += generator;
            sum.generator_idle += tally.idle / slices as f64;
        }
        sum.round_trip_ns[1] = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
        sum.steal_ms = steal(plan).saturating_sub(stolen);
        sum.switch_waited /= sum.seconds;
        sum.generator_waited /= sum.seconds;
        sum.undisturbed = measured.iter().filter(|m| m.0).count();
        let counted = measured.iter().filter(|m| m.0 || sum.undisturbed == 0).map(|m| m.1);
        sum.mpps = Figure::of(&counted.collect::<Vec<_>>()).map_or(0.0, |f| f.median);
        self.windows.push(sum);
        generator.stop()?;
        drop(urgency);
        Ok(())
    }
}

/// The switch's threads, and the calling one if it is measured, urgent until dropped.
pub(crate) struct Urgent {
    /// The switch's PMD threads.
    pub(crate) pmd: Vec<u32>,
    others: Vec<u32>,
    own: bool,
}

impl Urgent {
    pub(crate) fn new(pid: u32, core: usize) -> Result<Self> {
        let mut this = Self::switch(pid, core)?;
        this.own = true;
        affinity::set_urgency(0, Urgency::Measured);
        Ok(this)
    }

    /// The switch's threads alone.
    fn switch(pid: u32, core: usize) -> Result<Self> {
        let (pmd, others) = affinity::threads(pid, core)?;
        let this = Self { pmd, others, own: false };
        this.others.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Helper));
        this.pmd.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Measured));
        Ok(this)
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if self.own {
            affinity::set_urgency(0, Urgency::Ordinary);
        }
        self.pmd.iter().chain(&self.others).for_each(|&t| affinity::set_urgency(t, Urgency::Ordinary));
    }
}

/// Waits until the switch forwards between the guests of each pair.
///
/// # Errors
/// When frames do not arrive within 10 s.
pub fn ready<R: DriverRing>(generator: &mut Generator<R>, workload: &Workload) -> Result<()> {
    let first = match workload.transport {
        Transport::Udp => Step::Data,
        Transport::Tcp => Step::Syn,
    };
    for pair in 0..workload.busy_pairs {
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(e) = generator.phase(2 * pair, first, 1, Duration::from_millis(100)) {
            if Instant::now() > deadline {
                return Err(e.context("the switch does not forward"));
            }
        }
    }
    Ok(())
}

/// Waits until the switch forwards and opens all connections of the workload.
///
/// # Errors
/// When frames do not arrive.
pub fn open<R: DriverRing>(generator: &mut Generator<R>, workload: &Workload) -> Result<()> {
    ready(generator, workload)?;
    let patience = Duration::from_secs(2);
    let n = u64::from(workload.connections);
    for pair in 0..workload.busy_pairs {
        let (forth, back) = (2 * pair, 2 * pair + 1);
        match workload.transport {
            Transport::Udp => {
                generator.phase(forth, Step::Data, n, patience)?;
                generator.phase(back, Step::Data, n.max(1), patience)?;
            }
            Transport::Tcp => {
                generator.phase(forth, Step::Syn, n, patience)?;
                generator.phase(back, Step::SynAck, n, patience)?;
                generator.phase(forth, Step::Ack, n, patience)?;
                // The window of a SYN-ACK is not scaled: without this, nobody may send more than 64 KB yet.
                generator.phase(back, Step::Ack, n, patience)?;
            }
        }
    }
    Ok(())
}

/// A job for two guests that answer each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// One frame of 64 bytes back and forth.
    PingPong,
    /// One direction at this share of what the switch can take in one direction, percent.
    Loaded(u8),
    /// New TCP connections.
    Handshakes {
        /// Connections per turn.
        count: u32,
        /// Connections under way at a time.
        under_way: u32,
        /// Closed at once by FIN.
        close: bool,
    },
}

impl Exchange {
    fn connections(self) -> u32 {
        match self {
            Self::Handshakes { count, .. } => count * 2,
            _ => 1,
        }
    }

    fn name(self) -> String {
        match self {
            Self::PingPong => "ping-pong-64".into(),
            Self::Loaded(percent) => format!("one-way-64-at-{percent}%"),
            Self::Handshakes { under_way: 1, .. } => "tcp-handshakes-one-at-a-time".into(),
            Self::Handshakes { close: false, .. } => "tcp-handshakes".into(),
            Self::Handshakes { close: true, .. } => "tcp-handshakes-with-fin".into(),
        }
    }

    /// One turn: connections per second if that is what it measures, and times.
    fn turn(self, pair: &mut Pair<SplitRing>) -> Result<(Option<f64>, Histogram)> {
        Ok(match self {
            Self::PingPong => (None, pair.ping_pong(Duration::from_millis(300))?),
            Self::Loaded(percent) => {
                let saturated = Duration::from_millis(100);
                let (taken, _) = pair.steady(200e6, saturated)?;
                let most = taken.count() as f64 / saturated.as_secs_f64();
                let (times, _) = pair.steady(most * f64::from(percent) / 100.0, Duration::from_millis(200))?;
                (None, times)
            }
            Self::Handshakes { count, under_way, close } => {
                let done = pair.handshakes(0, count, under_way, close)?;
                (Some(done.per_second), done.setup_ns)
            }
        })
    }
}

struct Turn {
    placement: Option<Placement>,
    rate: Option<f64>,
    times: Quantiles,
    /// How many times were taken.
    count: u64,
}

fn exchange_rounds(
    plan: &Plan,
    job: Exchange,
    rounds: usize,
    systems: Vec<&mut Box<dyn System>>,
) -> (Vec<Metric>, BTreeMap<Kind, String>) {
    let transport = match job {
        Exchange::Handshakes { .. } => Transport::Tcp,
        _ => Transport::Udp,
    };
    let mut failures = BTreeMap::new();
    let mut turns: BTreeMap<Kind, Vec<Turn>> = BTreeMap::new();
    let mut pairs: Vec<(&mut Box<dyn System>, Option<_>)> = systems.into_iter().map(|s| (s, None)).collect();
    for _ in 0..rounds {
        for (system, pair) in &mut pairs {
            let kind = system.kind();
            if failures.contains_key(&kind) {
                continue;
            }
            system.process().resume();
            match exchange_turn(plan, job, transport, system, pair) {
                // A switch that was stopped may not come round in time: a turn without a single answer says nothing.
                Ok(turn) if turn.count == 0 => {}
                Ok(turn) => turns.entry(kind).or_default().push(turn),
                Err(e) => {
                    failures.insert(kind, format!("{e:#}"));
                    *pair = None;
                }
            }
            system.process().pause();
        }
    }
    for (system, pair) in &mut pairs {
        system.process().resume();
        *pair = None;
        let _ = system.flush();
        system.process().pause();
    }
    (exchange_metrics(job, &turns), failures)
}

fn exchange_turn(
    plan: &Plan,
    job: Exchange,
    transport: Transport,
    system: &mut Box<dyn System>,
    pair: &mut Option<Pair<SplitRing>>,
) -> Result<Turn> {
    let fresh = pair.is_none();
    if fresh {
        let workload = Workload::stateful(transport, 64, 1);
        let streams: Vec<_> = workload.streams().into_iter().map(|(_, _, s)| s).collect();
        let [a, b] = system.sockets() else { bail!("two ports are needed") };
        let streams: [_; 2] = streams.try_into().ok().context("two streams")?;
        *pair = Some(Pair::attach([a, b], &GuestSpec::new(64), streams)?);
    }
    let pair = pair.as_mut().context("attached")?;
    let urgency = Urgent::new(system.process().id(), plan.switch_core)?;
    // Switches take a moment to notice guests.
    let deadline = Instant::now() + Duration::from_secs(10);
    let ready = |pair: &mut Pair<SplitRing>| match transport {
        Transport::Udp => pair.ping_pong(Duration::from_millis(20)).map(drop),
        Transport::Tcp => match pair.handshakes(0, 32, 32, false) {
            Ok(h) if h.failed > 0 => Err(anyhow::anyhow!("{} of 32 connections failed", h.failed)),
            other => other.map(drop),
        },
    };
    while let Err(e) = ready(pair) {
        if Instant::now() > deadline {
            return Err(e.context("the switch does not forward"));
        }
    }
    if transport == Transport::Tcp {
        system.flush()?;
    }
    let before = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
    let (rate, times) = job.turn(pair)?;
    let after = regime::round_trip_ns(plan.generator_core, plan.switch_core)?;
    drop(urgency);
    if transport == Transport::Tcp {
        system.flush()?;
    }
    let [before, after] = [before, after].map(Placement::of);
    Ok(Turn { placement: (before == after).then_some(before), rate, times: times.quantiles(), count: times.count() })
}

/// Only turns of one placement are compared: the one in which the switch with the fewest has the most.
fn exchange_metrics(job: Exchange, turns: &BTreeMap<Kind, Vec<Turn>>) -> Vec<Metric> {
    let least = |p| turns.values().map(|t| t.iter().filter(|t| t.placement == Some(p)).count()).min().unwrap_or(0);
    let (near, far) = (least(Placement::Near), least(Placement::Far));
    let placement = prefer(near, far);
    let mut metrics = Vec::new();
    for (&system, turns) in turns {
        let counted: Vec<&Turn> = turns.iter().filter(|t| placement.is_none() || t.placement == placement).collect();
        let mut push = |name: &str, unit: &str, higher_is_better, values: Vec<f64>| {
            if let Some(figure) = Figure::of(&values) {
                let name = if name.is_empty() { job.name() } else { format!("{} {name}", job.name()) };
                metrics.push(Metric { name, system, unit: unit.into(), higher_is_better, figure, placement });
            }
        };
        push("", "1/s", true, counted.iter().filter_map(|t| t.rate).collect());
        push("p50", "us", false, counted.iter().map(|t| t.times.p50_us).collect());
        push("p99", "us", false, counted.iter().map(|t| t.times.p99_us).collect());
        push("p99.9", "us", false, counted.iter().map(|t| t.times.p999_us).collect());
    }
    metrics
}
