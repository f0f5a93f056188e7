//! Running workloads: all switches of a workload are up at once, one of them awake at a time, and take turns in short windows.
use crate::affinity::{self, SchedStat, Urgency};
use crate::check::Findings;
use crate::frame::Transport;
use crate::generator::{Generator, Tally};
use crate::guest::ring::{DriverRing, RingFormat};
use crate::guest::{GuestSpec, packed::PackedRing, split::SplitRing};
use crate::regime;
use crate::results::{Figure, MOST_WAITED, Measurement, Series, Window};
use crate::stream::Step;
use crate::system::{Kind, Setup, System};
use crate::workload::Workload;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
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
            window: Duration::from_millis(1000),
            wanted: 7,
            budget: Duration::from_secs(60),
            ..Self::quick(generator_core, switch_core)
        }
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

    /// Measures one workload. A switch that cannot be measured is reported as such; the others are measured all the same.
    ///
    /// # Errors
    /// When the generator itself fails.
    pub fn measure(&mut self, workload: &Workload, most_connections: u32) -> Result<Measurement> {
        let mtu = (workload.frame_bytes.saturating_sub(14)).max(1504);
        let key = (workload.ports, mtu, workload.rules, most_connections.max(workload.connections));
        if self.setup != Some(key) {
            self.running.clear();
            self.setup = Some(key);
        }
        let setup = Setup {
            folder: self.folder.path().to_path_buf(),
            ports: workload.ports,
            switch_core: self.plan.switch_core,
            generator_core: self.plan.generator_core,
            mtu,
            connections: key.3,
            rules: workload.rules,
        };
        let mut failures = BTreeMap::new();
        for &kind in &workload.systems {
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

    /// Where logs and sockets are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
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
        let spec = GuestSpec::new(workload.frame_bytes).format(workload.rings);
        let sockets = self.system.sockets();
        let mut generator = Generator::<R>::attach(sockets, &spec)?;
        generator.streams(workload.streams());
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
        let mut sum = Window {
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
        };
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

/// The switch's threads and the calling one, urgent until dropped.
struct Urgent {
    pmd: Vec<u32>,
    others: Vec<u32>,
}

impl Urgent {
    fn new(pid: u32, core: usize) -> Result<Self> {
        let (pmd, others) = affinity::threads(pid, core)?;
        let this = Self { pmd, others };
        this.others.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Helper));
        this.pmd.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Measured));
        affinity::set_urgency(0, Urgency::Measured);
        Ok(this)
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        affinity::set_urgency(0, Urgency::Ordinary);
        self.pmd.iter().chain(&self.others).for_each(|&t| affinity::set_urgency(t, Urgency::Ordinary));
    }
}

/// Waits until the switch forwards and opens all connections of the workload.
///
/// # Errors
/// When frames do not arrive.
pub fn open<R: DriverRing>(generator: &mut Generator<R>, workload: &Workload) -> Result<()> {
    let patience = Duration::from_secs(2);
    let n = u64::from(workload.connections);
    for pair in 0..workload.busy_pairs {
        let (forth, back) = (2 * pair, 2 * pair + 1);
        let first = match workload.transport {
            Transport::Udp => Step::Data,
            Transport::Tcp => Step::Syn,
        };
        // Switches take a moment to notice guests.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(e) = generator.phase(forth, first, 1, Duration::from_millis(100)) {
            if Instant::now() > deadline {
                return Err(e.context("the switch does not forward"));
            }
        }
        match workload.transport {
            Transport::Udp => {
                generator.phase(forth, Step::Data, n, patience)?;
                generator.phase(back, Step::Data, n.max(1), patience)?;
            }
            Transport::Tcp => {
                generator.phase(forth, Step::Syn, n, patience)?;
                generator.phase(back, Step::SynAck, n, patience)?;
                generator.phase(forth, Step::Ack, n, patience)?;
            }
        }
    }
    Ok(())
}
