//! Two switches, one VM, one QEMU on each side of its migration, and the rules that must hold at every step.
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use ferry_dataplane::conntrack::{ConnMap, Connection, Cursor, Imported, Key, Portable, PortableState};
use ferry_migrate::destination::{self, Destination, DestinationLimits};
use ferry_migrate::message::{self, Abilities, Began, List, Message, Name, Note, Offer, Refuse, RefuseCode, WhenLate};
use ferry_migrate::rounds::RoundLimits;
use ferry_migrate::source::{self, Release, Source, SourceIdentity, SourceLimits};
use ferry_migrate::table::TargetTable;

use crate::network::{Channel, Frame, Hostility, Sent};
use crate::rng::Rng;
use crate::traffic::{self, Guest, entries, track};

/// A table at a host, counted.
#[derive(Clone)]
pub struct Table {
    map: Arc<ConnMap>,
    _alive: Rc<Alive>,
}

struct Alive(Rc<Cell<usize>>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl TargetTable for Table {
    fn accepts(&self, connection: &Connection) -> bool {
        traffic::is_ours(connection)
    }

    fn import(&self, connection: &Connection, now_ms: u64) -> Imported {
        self.map.import(connection, now_ms, &())
    }

    fn delete(&self, key: &Key, version: u32) -> bool {
        self.map.delete_matching(key, version, &())
    }

    fn has(&self, key: &Key) -> bool {
        self.map.get(key).is_some()
    }

    fn clear(&self) {
        let mut cursor = Cursor::default();
        while self.map.flush(&mut cursor, 4096, &(), &mut |_| true) {}
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn capacity(&self) -> u32 {
        self.map.capacity()
    }
}

struct Host {
    name: Name,
    clock_offset_ms: u64,
    up_at_ms: Option<u64>,
    tables: Rc<Cell<usize>>,
    table: Table,
    source: Source<Arc<ConnMap>>,
    destination: Destination<Table>,
    dialled: Option<usize>,
    accepted: Option<usize>,
    redirecting: bool,
    /// Things that the driver does take time.
    connect_at_ms: Option<u64>,
    tracking_at_ms: Option<u64>,
    judge_at_ms: Option<u64>,
}

/// What QEMU is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Qemu {
    Running {
        at: usize,
        next_ms: u64,
    },
    /// Rounds of memory.
    PreCopy {
        from: usize,
        rounds: u64,
        next_ms: u64,
    },
    /// Stopped; the reply of the last ring is asked for then.
    Stopping {
        from: usize,
        hold_ms: u64,
        why: Why,
    },
    /// It waits for the switch.
    Held {
        from: usize,
        since_ms: u64,
        why: Why,
    },
    /// The reply has come.
    Released {
        from: usize,
        until_ms: u64,
        why: Why,
    },
    Dead,
}

/// Why the VM has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The last round. `cancel`: revoked in pre-switchover.
    Final { cancel: bool },
    /// Stop and continue, or a reset, outside a migration.
    Pause,
    /// The same within one, with so many rounds left.
    PauseInPreCopy { rounds: u64 },
}

/// What the seeds together must have seen; each a count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Coverage {
    pub commits: u64,
    pub commits_with_all_windows: u64,
    pub rounds: u64,
    pub held_back: u64,
    pub lagging: u64,
    pub tombstones: u64,
    pub restarts: u64,
    pub began: [u64; 5],
    pub holds_expired: u64,
    pub holds_failed: u64,
    pub resumed: u64,
    pub cancelled: u64,
    pub refused: u64,
    pub dropped: u64,
    pub withdrawn: u64,
    pub forgotten: u64,
    pub late_frames: u64,
    pub crashes: u64,
    pub cuts: u64,
    pub repeated: u64,
    pub undecodable: u64,
    pub second_attempts: u64,
    pub quiet_runs: u64,
}

impl Coverage {
    pub fn add(&mut self, other: &Self) {
        let mine = [
            (&mut self.commits, other.commits),
            (&mut self.commits_with_all_windows, other.commits_with_all_windows),
            (&mut self.rounds, other.rounds),
            (&mut self.held_back, other.held_back),
            (&mut self.lagging, other.lagging),
            (&mut self.tombstones, other.tombstones),
            (&mut self.restarts, other.restarts),
            (&mut self.holds_expired, other.holds_expired),
            (&mut self.holds_failed, other.holds_failed),
            (&mut self.resumed, other.resumed),
            (&mut self.cancelled, other.cancelled),
            (&mut self.refused, other.refused),
            (&mut self.dropped, other.dropped),
            (&mut self.withdrawn, other.withdrawn),
            (&mut self.forgotten, other.forgotten),
            (&mut self.late_frames, other.late_frames),
            (&mut self.crashes, other.crashes),
            (&mut self.cuts, other.cuts),
            (&mut self.repeated, other.repeated),
            (&mut self.undecodable, other.undecodable),
            (&mut self.second_attempts, other.second_attempts),
            (&mut self.quiet_runs, other.quiet_runs),
        ];
        for (sum, n) in mine {
            *sum += n;
        }
        for (sum, n) in self.began.iter_mut().zip(other.began) {
            *sum += n;
        }
    }
}

/// How a seed's world is.
#[derive(Clone, Copy, Debug)]
struct Scene {
    hostility: Hostility,
    /// Per million milliseconds.
    faults: u64,
    flows: u16,
    capacity: u32,
    packets_per_ms: u64,
    when_late: [WhenLate; 2],
    migrations: u64,
    refuses: u64,
    slow_switch: u64,
    postmigrate: bool,
    bytes_per_ms: usize,
    /// More connections than the table holds.
    crowded: bool,
}

pub struct World {
    now_ms: u64,
    rng: Rng,
    scene: Scene,
    limits: SourceLimits,
    destination_limits: DestinationLimits,
    hosts: [Host; 2],
    channels: Vec<Channel>,
    qemu: Qemu,
    /// The dirty log is on at this host.
    logging: Option<usize>,
    /// The source's QEMU goes then.
    leaves: Option<(usize, u64)>,
    guest: Guest,
    /// The VM's table as it would be without any migration; by the clock of the host that runs the VM.
    shadow: Option<Arc<ConnMap>>,
    /// The source's table when the VM stopped, and the source's clock.
    at_stop: Option<(usize, BTreeMap<Key, Connection>)>,
    /// What the source said last of entries whose windows it left behind.
    lagging: u32,
    late_sent: u32,
    /// The last one delivered at each host.
    late_seen: [u32; 2],
    migrations_left: u64,
    faults_left: u64,
    faulted: bool,
    finishing: bool,
    trace: bool,
    pub coverage: Coverage,
}

fn limits(rng: &mut Rng) -> (SourceLimits, DestinationLimits) {
    let rounds = RoundLimits {
        batch_items: rng.range(1, 40) as usize,
        hot_after: rng.range(1, 3) as u32,
        hot_entries: rng.range(0, 30) as usize,
        tombstones: rng.range(4, 64) as usize,
        lagging_per_round: rng.range(0, 60) as usize,
        lagging_interval_ms: rng.range(0, 300),
    };
    let source = SourceLimits {
        hold_limit_ms: 50,
        fence_ms: 50,
        final_lagging_ms: rng.range(0, 25),
        connect_timeout_ms: 200,
        reply_timeout_ms: 400,
        ping_interval_ms: 100,
        silence_timeout_ms: 350,
        attempts: 3,
        retry_delay_ms: rng.range(1, 60),
        round_interval_ms: rng.range(30, 200),
        step_entries: rng.range(8, 200) as usize,
        bytes_per_ms: rng.range(1000, 40_000),
        redirect_ms: rng.range(20, 200),
        redirect_bytes: 100_000,
        linger_ms: 600,
        history: 8,
        rounds,
    };
    let destination = DestinationLimits {
        step_timeout_ms: 400,
        silence_timeout_ms: 350,
        orphan_timeout_ms: 500,
        commit_timeout_ms: 2000,
        confirm_interval_ms: 5,
        confirmed_ms: 30,
        redirect_ms: 250,
        waiting_bytes: 4000,
        waiting_frames: 40,
        frame_bytes: 1600,
        crowd: 64,
    };
    (source, destination)
}

const HOSTS: [usize; 2] = [0, 1];

impl World {
    pub fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        // A third of the seeds is quiet: there everything must go well.
        let quiet = rng.chance(330_000);
        let hostile = !quiet && rng.chance(500_000);
        let level = if hostile { rng.pick(&[300, 3000, 20_000]) } else { 0 };
        let hostility = Hostility {
            truncate: level / 2 * rng.range(0, 1),
            duplicate: level * rng.range(0, 1),
            lose: level / 2 * rng.range(0, 1),
            cut: level * rng.range(0, 1),
        };
        let crowded = rng.chance(150_000);
        let policies = [WhenLate::FailOpen, WhenLate::FailClosed];
        let scene = Scene {
            hostility,
            faults: if quiet { 0 } else { rng.pick(&[0, 2000, 10_000, 40_000]) },
            flows: rng.range(4, 120) as u16,
            capacity: if crowded { 48 } else { 1024 },
            packets_per_ms: rng.range(0, 8),
            when_late: [rng.pick(&policies), rng.pick(&policies)],
            migrations: rng.range(1, 3),
            refuses: if quiet { 0 } else { 60_000 },
            slow_switch: if quiet { 0 } else { rng.pick(&[0, 0, 30_000]) },
            postmigrate: rng.chance(200_000),
            bytes_per_ms: if quiet { 50_000 } else { rng.pick(&[150, 1000, 20_000, 400_000]) },
            crowded,
        };
        let (limits, destination_limits) = limits(&mut rng);
        let host = |name: &str, running: bool, rng: &mut Rng| {
            // Near the point where the tables' 32-bit clocks wrap, for some.
            let clock_offset_ms = rng.pick(&[0, 1_000_000, (1 << 32) - 300, (1 << 33) + 77]);
            let name = Name::new(name).unwrap();
            let tables = Rc::new(Cell::new(0));
            let table = new_table(&tables, scene.capacity);
            Host {
                source: Source::new(limits, identity(&name, scene.when_late[0]), Arc::clone(&table.map)),
                destination: Destination::new(destination_limits, name.clone(), Abilities::default(), running),
                name,
                clock_offset_ms,
                up_at_ms: None,
                tables,
                table,
                dialled: None,
                accepted: None,
                redirecting: false,
                connect_at_ms: None,
                tracking_at_ms: None,
                judge_at_ms: None,
            }
        };
        let hosts = [host("host-a", true, &mut rng), host("host-b", false, &mut rng)];
        let mut world = Self {
            now_ms: 0,
            scene,
            limits,
            destination_limits,
            hosts,
            channels: Vec::new(),
            qemu: Qemu::Running { at: 0, next_ms: rng.range(5, 60) },
            logging: None,
            leaves: None,
            guest: Guest::new(scene.flows, traffic::VM),
            shadow: Some(Arc::new(ConnMap::new(scene.capacity, [1, 2]).unwrap())),
            at_stop: None,
            lagging: 0,
            late_sent: 0,
            late_seen: [0; 2],
            migrations_left: scene.migrations,
            faults_left: rng.range(1, 4),
            faulted: false,
            finishing: false,
            trace,
            rng,
            coverage: Coverage::default(),
        };
        if trace {
            println!("{scene:?}\n{limits:?}");
        }
        if quiet {
            world.faults_left = 0;
            world.coverage.quiet_runs = 1;
        }
        world
    }

    fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:5} {}", self.now_ms, text());
        }
    }

    fn clock_ms(&self, host: usize) -> u64 {
        self.now_ms + self.hosts[host].clock_offset_ms
    }

    /// To the end: every end state must be reached in bounded time.
    pub fn run(&mut self) {
        while self.now_ms < 3000
            && !(self.migrations_left == 0 && matches!(self.qemu, Qemu::Running { .. } | Qemu::Dead))
        {
            self.step();
        }
        // No more troubles; QEMU comes to its end, whatever it is at.
        self.finishing = true;
        self.faults_left = 0;
        self.scene.migrations -= std::mem::take(&mut self.migrations_left);
        let patience_ms = self.now_ms + 12_000;
        while !self.is_settled() {
            assert!(self.now_ms < patience_ms, "not settled: {}", self.describe());
            self.step();
        }
        self.check_settled();
    }

    fn describe(&self) -> String {
        let host = |h: &Host| {
            format!(
                "{:?}/{:?} holding {} channels {:?} {:?}",
                h.source.state(),
                h.destination.state(),
                h.source.is_holding(),
                h.dialled,
                h.accepted
            )
        };
        format!("{:?}, a {}, b {}", self.qemu, host(&self.hosts[0]), host(&self.hosts[1]))
    }

    fn is_settled(&self) -> bool {
        let qemu =
            matches!(self.qemu, Qemu::Running { .. } | Qemu::Dead) && self.leaves.is_none() && self.logging.is_none();
        qemu && self.hosts.iter().all(|h| {
            h.up_at_ms.is_none()
                && !h.source.is_migrating()
                && h.destination.state() == destination::State::Empty
                && h.dialled.is_none()
                && h.accepted.is_none()
        })
    }

    fn check_settled(&mut self) {
        for host in HOSTS {
            let h = &self.hosts[host];
            assert_eq!(h.tables.get(), 1, "tables of host {host}");
            assert!(!h.source.is_holding() && !h.redirecting);
            assert!(!h.table.map.is_tracking(), "tracking costs time");
            assert_eq!(h.destination.memory_bytes(), 0);
            let runs = matches!(self.qemu, Qemu::Running { at, .. } if at == host);
            assert_eq!(h.source.state() == source::State::Active && runs, runs, "{}", self.describe());
        }
        self.check_shadow();
        if self.coverage.quiet_runs > 0 {
            // The VM may have stopped and gone on meanwhile, each time with a commit.
            assert!(self.coverage.commits >= self.scene.migrations, "{}", self.describe());
            let [complete, lagging, ..] = self.coverage.began;
            assert_eq!(complete + lagging, self.scene.migrations);
        }
    }

    // ---- one millisecond

    fn step(&mut self) {
        self.now_ms += 1;
        for host in HOSTS {
            self.restart(host);
        }
        self.traffic();
        self.faults();
        self.qemu();
        self.network();
        for host in HOSTS {
            self.driver(host);
        }
        self.check();
    }

    fn running_at(&self) -> Option<usize> {
        match self.qemu {
            Qemu::Running { at, .. } | Qemu::PreCopy { from: at, .. } => Some(at),
            _ => None,
        }
    }

    fn traffic(&mut self) {
        if let Some(at) = self.running_at()
            && self.hosts[at].up_at_ms.is_none()
        {
            let clock_ms = self.clock_ms(at);
            for _ in 0..self.rng.range(0, self.scene.packets_per_ms) {
                let (frame, toward) = self.guest.packet(&mut self.rng);
                for map in [&self.hosts[at].table.map].into_iter().chain(&self.shadow) {
                    track(map, &frame, toward, clock_ms);
                }
            }
            let shadow = self.shadow.clone();
            for map in [&self.hosts[at].table.map].into_iter().chain(&shadow) {
                // Whole passes: the two tables need not have their entries in the same places.
                map.sweep(clock_ms, 4096, &());
            }
            if self.now_ms.is_multiple_of(64) {
                self.check_shadow();
            }
        }
        for host in HOSTS {
            // A stopped VM's table is swept all the same, a committed one's too.
            if self.hosts[host].up_at_ms.is_none() && self.running_at() != Some(host) {
                self.hosts[host].table.map.sweep(self.clock_ms(host), 64, &());
            }
        }
    }

    /// The VM's table is as it would be had nobody looked at it.
    fn check_shadow(&self) {
        let (Some(at), Some(shadow)) = (self.running_at(), &self.shadow) else { return };
        if self.scene.crowded {
            // Which of the equals makes room depends on the places that entries have.
            return;
        }
        if self.hosts[at].up_at_ms.is_some() {
            return;
        }
        let clock_ms = self.clock_ms(at);
        let strip = |map: &ConnMap| -> BTreeMap<Key, Connection> {
            let mut all = entries(map);
            all.retain(|_, c| !c.is_expired(clock_ms));
            all.values_mut().for_each(|c| c.version = 0);
            all
        };
        let (real, expected) = (strip(&self.hosts[at].table.map), strip(shadow));
        assert_eq!(real, expected, "the VM's table at {at} is not what it would have been");
    }

    fn check(&self) {
        for host in HOSTS {
            let h = &self.hosts[host];
            assert!(h.tables.get() <= 2, "the VM's, and one staged");
            let rounds = self.limits.rounds;
            let most = (rounds.tombstones + 1200) * 64 + rounds.hot_entries * 160 + 4096 * 128;
            assert!(h.source.memory_bytes() <= most, "{}", h.source.memory_bytes());
            let d = self.destination_limits;
            assert!(h.destination.memory_bytes() <= d.waiting_bytes + d.crowd * 200);
            assert!(h.source.history().len() <= self.limits.history);
            // Active on one side only, the one where the VM runs.
            let runs = self.running_at() == Some(host);
            if h.up_at_ms.is_none() && !runs && self.running_at().is_some() {
                let state = h.source.state();
                assert!(
                    !matches!(state, source::State::PreCopy) && h.destination.state() != destination::State::Active
                        || self.leaves.is_some(),
                    "host {host} believes that the VM runs there: {}",
                    self.describe()
                );
            }
            if runs && h.up_at_ms.is_none() {
                let state = h.source.state();
                assert!(matches!(state, source::State::Active | source::State::PreCopy), "{}", self.describe());
                let committed =
                    matches!(h.destination.state(), destination::State::Committed | destination::State::Staging);
                assert!(!committed, "staging where the VM runs: {}", self.describe());
            }
        }
        if let Qemu::Held { since_ms, .. } = self.qemu {
            assert!(self.now_ms <= since_ms + self.limits.hold_limit_ms + 1, "held too long");
        }
    }

    // ---- QEMU

    fn qemu(&mut self) {
        if let Some((host, at_ms)) = self.leaves
            && self.now_ms >= at_ms
        {
            self.leaves = None;
            self.say(|| format!("QEMU at {host} exits"));
            self.tell_source(host, source::Event::QemuGone);
            self.tell_destination(host, destination::Event::QemuGone);
        }
        match self.qemu {
            Qemu::Running { at, next_ms } if self.now_ms >= next_ms && self.hosts[at].up_at_ms.is_none() => {
                if self.finishing || self.leaves.is_some() {
                    return;
                }
                if self.rng.chance(150_000) {
                    self.stop(at, Why::Pause);
                } else if self.migrations_left > 0 {
                    self.migrations_left -= 1;
                    self.begin_migration(at);
                }
            }
            Qemu::PreCopy { from, rounds, next_ms } if self.now_ms >= next_ms => {
                self.tell_source(from, source::Event::MemoryRound);
                if self.rng.chance(60_000) && !self.finishing {
                    self.stop(from, Why::PauseInPreCopy { rounds });
                } else if rounds == 0 {
                    let cancel = self.coverage.quiet_runs == 0 && self.rng.chance(120_000);
                    self.stop(from, Why::Final { cancel });
                } else {
                    let next_ms = self.now_ms + self.rng.range(1, 60);
                    self.qemu = Qemu::PreCopy { from, rounds: rounds - 1, next_ms };
                }
            }
            Qemu::Stopping { from, hold_ms, why } if self.now_ms >= hold_ms => {
                self.qemu = Qemu::Held { from, since_ms: self.now_ms, why };
                if self.hosts[from].up_at_ms.is_some() {
                    self.released(from);
                } else {
                    self.tell_source(from, source::Event::ReplyHeld);
                }
            }
            Qemu::Released { from, until_ms, why } if self.now_ms >= until_ms => self.go_on(from, why),
            _ => {}
        }
    }

    fn begin_migration(&mut self, from: usize) {
        self.say(|| format!("QEMU migrates from {from}"));
        // Enough time for round 0 in quiet seeds.
        let least = if self.coverage.quiet_runs > 0 { 12 } else { 0 };
        self.qemu =
            Qemu::PreCopy { from, rounds: self.rng.range(least, 18), next_ms: self.now_ms + self.rng.range(10, 60) };
        self.logging = Some(from);
        self.tell_source(from, source::Event::LogOn);
    }

    fn stop(&mut self, from: usize, why: Why) {
        self.say(|| format!("the VM stops at {from}: {why:?}"));
        self.qemu = Qemu::Stopping { from, hold_ms: self.now_ms + self.rng.range(0, 2), why };
        self.at_stop = Some((from, entries(&self.hosts[from].table.map)));
        self.tell_source(from, source::Event::Stopped);
    }

    fn released(&mut self, host: usize) {
        if let Qemu::Held { from, why, .. } = self.qemu
            && from == host
        {
            let pause = match why {
                Why::Final { .. } => self.rng.range(0, 20),
                _ => self.rng.range(0, 80),
            };
            self.qemu = Qemu::Released { from, until_ms: self.now_ms + pause, why };
        }
    }

    /// What was stopped goes on: there or here.
    fn go_on(&mut self, from: usize, why: Why) {
        let next_ms = self.now_ms + self.rng.range(5, 80);
        match why {
            Why::Final { cancel: false } => self.arrive(from),
            Why::Final { cancel: true } => {
                self.say(|| "revoked in pre-switchover".into());
                self.qemu = Qemu::Running { at: from, next_ms };
                self.coverage.cancelled += 1;
                self.kick_source(from);
                // Comes last.
                self.log_off();
            }
            Why::Pause => {
                self.qemu = Qemu::Running { at: from, next_ms };
                self.kick_source(from);
            }
            Why::PauseInPreCopy { mut rounds } => {
                let mut next_ms = next_ms;
                if self.faults_left > 0
                    && self.rng.chance(100_000)
                    && let Some(channel) = self.channels.last_mut()
                {
                    // What a commit is worth that is taken back unheard, with the last stop close behind.
                    channel.break_off(self.now_ms, &mut self.rng);
                    (rounds, next_ms) = (0, self.now_ms + self.rng.range(1, 8));
                }
                self.qemu = Qemu::PreCopy { from, rounds, next_ms };
                self.kick_source(from);
            }
        }
    }

    fn kick_source(&mut self, at: usize) {
        self.say(|| format!("KICK at {at}"));
        self.tell_source(at, source::Event::Kick);
        if self.hosts[at].up_at_ms.is_none() {
            if self.shadow.is_none() {
                self.shadow = Some(traffic::copy(&self.hosts[at].table.map, self.clock_ms(at)));
            }
            if self.logging == Some(at) {
                // A switch that was restarted has not heard.
                self.tell_source(at, source::Event::LogOn);
            }
        }
    }

    fn log_off(&mut self) {
        if let Some(host) = self.logging.take() {
            self.tell_source(host, source::Event::LogOff);
        }
    }

    fn arrive(&mut self, from: usize) {
        let to = 1 - from;
        self.say(|| format!("the VM arrives at {to}"));
        self.logging = None;
        let pause = if self.scene.postmigrate { 1500 } else { self.rng.range(0, 60) };
        self.leaves = Some((from, self.now_ms + pause));
        self.qemu = Qemu::Running { at: to, next_ms: self.now_ms + pause + self.rng.range(1, 100) };
        if self.hosts[to].up_at_ms.is_none() {
            if self.hosts[to].destination.state() == destination::State::Empty {
                assert!(self.hosts[to].table.map.is_empty(), "connections of an earlier stay");
            }
            self.tell_destination(to, destination::Event::Kick);
            self.adopt(to);
        } else {
            self.shadow = None;
        }
        self.at_stop = None;
    }

    /// A host where the VM begins to run: its own table is the one that a migration from there would read.
    fn adopt(&mut self, host: usize) {
        // Whatever the former source there still has to say.
        self.tell_source(host, source::Event::Kick);
        let h = &mut self.hosts[host];
        let identity = identity(&h.name, self.scene.when_late[host]);
        h.source = Source::new(self.limits, identity, Arc::clone(&h.table.map));
        self.shadow = Some(traffic::copy(&self.hosts[host].table.map, self.clock_ms(host)));
    }

    // ---- what goes wrong

    fn faults(&mut self) {
        if self.faults_left == 0 || !self.rng.chance(self.scene.faults) {
            return;
        }
        self.faults_left -= 1;
        self.faulted = true;
        match self.rng.range(0, 6) {
            0 | 1 => {
                if let Some(channel) = (0..self.channels.len()).rev().find(|&c| !self.channels[c].is_over()) {
                    self.say(|| format!("channel {channel} breaks"));
                    self.coverage.cuts += 1;
                    self.channels[channel].break_off(self.now_ms, &mut self.rng);
                }
            }
            2 => self.cancel(),
            3 => {
                let host = self.rng.pick(&HOSTS);
                self.crash(host);
            }
            4 => self.destination_dies(),
            5 => self.source_dies(),
            _ => {
                // An operator gives the connections up; QEMU goes on.
                let host = self.rng.pick(&HOSTS);
                self.tell_source(host, source::Event::Cancel);
                self.tell_destination(host, destination::Event::Cancel);
            }
        }
    }

    fn cancel(&mut self) {
        if let Qemu::PreCopy { from, .. } = self.qemu {
            self.say(|| "cancelled".into());
            self.coverage.cancelled += 1;
            self.qemu = Qemu::Running { at: from, next_ms: self.now_ms + self.rng.range(0, 40) };
            self.log_off();
            // Perhaps another at once.
            if self.rng.chance(300_000) {
                self.begin_migration(from);
            }
        }
    }

    fn destination_dies(&mut self) {
        let from = match self.qemu {
            Qemu::PreCopy { from, .. } => {
                self.qemu = Qemu::Running { at: from, next_ms: self.now_ms + 30 };
                from
            }
            Qemu::Released { from, why: Why::Final { .. }, .. } => {
                self.qemu = Qemu::Running { at: from, next_ms: self.now_ms + 30 };
                self.kick_source(from);
                from
            }
            _ => return,
        };
        self.say(|| "QEMU dies at the destination".into());
        self.log_off();
        self.tell_destination(1 - from, destination::Event::QemuGone);
    }

    fn source_dies(&mut self) {
        let (Qemu::PreCopy { from, .. }
        | Qemu::Held { from, .. }
        | Qemu::Released { from, .. }
        | Qemu::Stopping { from, .. }) = self.qemu
        else {
            return;
        };
        self.say(|| "QEMU dies at the source".into());
        self.qemu = Qemu::Dead;
        self.logging = None;
        self.shadow = None;
        self.migrations_left = 0;
        self.tell_source(from, source::Event::QemuGone);
        self.tell_destination(from, destination::Event::QemuGone);
        self.tell_destination(1 - from, destination::Event::QemuGone);
    }

    fn crash(&mut self, host: usize) {
        if self.hosts[host].up_at_ms.is_some() {
            return;
        }
        self.say(|| format!("switch {host} crashes"));
        self.coverage.crashes += 1;
        for channel in [self.hosts[host].dialled.take(), self.hosts[host].accepted.take()].into_iter().flatten() {
            let channel = &mut self.channels[channel];
            let side = usize::from(channel.ends[1] == host);
            channel.break_off(self.now_ms, &mut self.rng);
            channel.closed[side] = true;
        }
        let up_at_ms = self.now_ms + self.rng.range(1, 100);
        let scene = self.scene;
        let h = &mut self.hosts[host];
        h.up_at_ms = Some(up_at_ms);
        h.redirecting = false;
        (h.connect_at_ms, h.tracking_at_ms, h.judge_at_ms) = (None, None, None);
        h.destination = Destination::new(self.destination_limits, h.name.clone(), Abilities::default(), false);
        h.table = new_table(&h.tables, scene.capacity);
        h.source = Source::new(self.limits, identity(&h.name, scene.when_late[host]), Arc::clone(&h.table.map));
        // The VM's table is lost.
        let runs = match self.qemu {
            Qemu::Stopping { from, .. } | Qemu::Held { from, .. } | Qemu::Released { from, .. } => Some(from),
            _ => self.running_at(),
        };
        if runs == Some(host) {
            self.shadow = None;
        }
        // QEMU does not wait for a switch that is gone.
        self.released(host);
    }

    fn restart(&mut self, host: usize) {
        if self.hosts[host].up_at_ms.is_none_or(|at_ms| self.now_ms < at_ms) {
            return;
        }
        self.hosts[host].up_at_ms = None;
        if self.running_at() == Some(host) {
            self.say(|| format!("switch {host} is back, QEMU too"));
            self.tell_destination(host, destination::Event::Kick);
            self.adopt(host);
            if self.logging == Some(host) {
                self.tell_source(host, source::Event::LogOn);
            }
        } else if let Qemu::Stopping { from, .. } | Qemu::Held { from, .. } | Qemu::Released { from, .. } = self.qemu
            && from == host
        {
            // A stopped VM's rings are not started.
            self.tell_source(host, source::Event::Stopped);
        }
    }

    // ---- the network

    fn network(&mut self) {
        for id in 0..self.channels.len() {
            if self.channels[id].is_over() {
                continue;
            }
            for side in [0, 1] {
                let host = self.channels[id].ends[side];
                let open = |w: &Self| !w.channels[id].closed[side];
                for _ in 0..64 {
                    let Some(frame) = self.channels[id].receive(side, self.now_ms, &mut self.rng) else { break };
                    if open(self) {
                        self.frame(id, side, host, frame);
                    }
                }
                if open(self) && self.channels[id].notice_ms[side].is_some_and(|at_ms| self.now_ms >= at_ms) {
                    self.disconnected(id, side, host);
                }
            }
        }
    }

    fn disconnected(&mut self, id: usize, side: usize, host: usize) {
        self.channels[id].closed[side] = true;
        if side == 0 {
            self.hosts[host].dialled = None;
            self.tell_source(host, source::Event::Disconnected);
        } else {
            self.hosts[host].accepted = None;
            self.tell_destination(host, destination::Event::Disconnected);
        }
    }

    fn frame(&mut self, id: usize, side: usize, host: usize, frame: Frame) {
        match frame {
            Frame::End => self.disconnected(id, side, host),
            Frame::Control(bytes) => match message::decode(&bytes) {
                Ok(message) => {
                    if let Message::FinalEnd { lagging, .. } = message {
                        self.lagging = lagging;
                    }
                    self.say(|| format!("        {host} hears {message:?}"));
                    if side == 0 {
                        self.tell_source(host, source::Event::Message(message));
                    } else {
                        self.tell_destination(host, destination::Event::Message(message));
                    }
                }
                Err(_) => self.undecodable(id, side, host),
            },
            Frame::Batch(bytes) => {
                let clock_ms = self.clock_ms(host);
                match self.channels[id].decode(&bytes, clock_ms) {
                    Some(batch) => self.tell_destination(host, destination::Event::Batch(batch)),
                    None => self.undecodable(id, side, host),
                }
            }
            Frame::Late(frame) => self.tell_destination(host, destination::Event::LateFrame(frame)),
        }
    }

    /// A driver ends a conversation that it does not understand.
    fn undecodable(&mut self, id: usize, side: usize, host: usize) {
        self.coverage.undecodable += 1;
        self.channels[id].close(side, self.now_ms, &mut self.rng);
        self.disconnected(id, side, host);
    }

    // ---- the drivers

    fn driver(&mut self, host: usize) {
        if self.hosts[host].up_at_ms.is_some() {
            return;
        }
        let due = |at_ms: &mut Option<u64>, now_ms| at_ms.take_if(|at_ms| *at_ms <= now_ms).is_some();
        let now_ms = self.now_ms;
        if due(&mut self.hosts[host].connect_at_ms, now_ms) {
            self.dial(host);
        }
        if due(&mut self.hosts[host].tracking_at_ms, now_ms) {
            self.tell_source(host, source::Event::Tracking);
        }
        if due(&mut self.hosts[host].judge_at_ms, now_ms) {
            let event = if self.rng.chance(self.scene.refuses) {
                self.coverage.refused += 1;
                destination::Event::Denied(Refuse { code: RefuseCode::Unauthorized, note: Note::default() })
            } else {
                let table = new_table(&self.hosts[host].tables, self.scene.capacity);
                destination::Event::Admitted { table, when_late: self.scene.when_late[host] }
            };
            self.tell_destination(host, event);
        }
        // Frames for a VM that is not here any more.
        if self.hosts[host].redirecting && self.rng.chance(300_000) {
            self.late_sent += 1;
            let frame = self.late_sent.to_le_bytes().to_vec();
            self.tell_source(host, source::Event::LateFrame(frame));
        }
        if self.rng.chance(self.scene.slow_switch) {
            // The control thread did not come to it in this millisecond. Bounded holds are promised for one that does.
            if !self.hosts[host].source.is_holding() {
                return;
            }
        }
        let clock_ms = self.clock_ms(host);
        if self.hosts[host].source.next_tick_ms(clock_ms).is_some_and(|at_ms| at_ms <= clock_ms) {
            let room_bytes = self.hosts[host].dialled.map_or(0, |channel| self.channels[channel].room_bytes());
            self.tell_source(host, source::Event::Tick { room_bytes });
        }
        if self.hosts[host].destination.next_tick_ms().is_some_and(|at_ms| at_ms <= clock_ms) {
            self.tell_destination(host, destination::Event::Tick);
        }
    }

    fn dial(&mut self, host: usize) {
        let to = 1 - host;
        if self.hosts[to].up_at_ms.is_some() || self.rng.chance(self.scene.hostility.cut * 5) {
            self.tell_source(host, source::Event::Disconnected);
            return;
        }
        // The destination keeps one channel per VM: the latest.
        if let Some(old) = self.hosts[to].accepted.take() {
            self.channels[old].close(1, self.now_ms, &mut self.rng);
        }
        let id = self.channels.len();
        self.channels.push(Channel::new(id, [host, to], self.scene.hostility, self.scene.bytes_per_ms, &mut self.rng));
        self.hosts[host].dialled = Some(id);
        self.hosts[to].accepted = Some(id);
        let peer = self.hosts[host].name.clone();
        self.tell_destination(to, destination::Event::Connected { peer });
        self.tell_source(host, source::Event::Connected);
    }

    fn tell_source(&mut self, host: usize, event: source::Event) {
        if self.hosts[host].up_at_ms.is_some() {
            return;
        }
        if !matches!(event, source::Event::Tick { .. } | source::Event::Message(_)) {
            self.say(|| format!("    source {host}: {event:?}"));
        }
        let mut out = Vec::new();
        let clock_ms = self.clock_ms(host);
        self.hosts[host].source.handle(event, clock_ms, &mut out);
        for action in out {
            self.source_action(host, action);
        }
    }

    fn source_action(&mut self, host: usize, action: source::Action) {
        if !matches!(action, source::Action::SendBatch(_)) {
            self.say(|| format!("        source {host} -> {action:?}"));
        }
        let now_ms = self.now_ms;
        match action {
            source::Action::Track(on) => {
                self.hosts[host].table.map.set_tracking(on);
                self.hosts[host].tracking_at_ms = on.then(|| now_ms + self.rng.range(0, 3));
            }
            source::Action::Connect => self.hosts[host].connect_at_ms = Some(now_ms + self.rng.range(0, 5)),
            source::Action::Disconnect => {
                self.hosts[host].connect_at_ms = None;
                if let Some(channel) = self.hosts[host].dialled.take() {
                    self.channels[channel].close(0, now_ms, &mut self.rng);
                }
            }
            source::Action::Send(message) => self.send(self.hosts[host].dialled, 0, &message),
            source::Action::SendBatch(batch) => {
                assert!(batch.items.len() <= self.limits.rounds.batch_items);
                if let Some(channel) = self.hosts[host].dialled {
                    let clock_ms = self.clock_ms(host);
                    if self.channels[channel].send_batch(&batch, clock_ms, now_ms, &mut self.rng) == Sent::Cut {
                        self.channels[channel].break_off(now_ms, &mut self.rng);
                    }
                }
            }
            source::Action::SendLate(frame) => {
                if let Some(channel) = self.hosts[host].dialled {
                    self.channels[channel].send_late(frame, now_ms, &mut self.rng);
                }
            }
            source::Action::Release(why) => {
                match why {
                    Release::Expired => self.coverage.holds_expired += 1,
                    Release::Failed => self.coverage.holds_failed += 1,
                    _ => {}
                }
                assert!(
                    matches!(self.qemu, Qemu::Held { from, .. } if from == host) || why == Release::Unrelated,
                    "released what nobody held"
                );
                self.released(host);
            }
            source::Action::Redirect(on) => self.hosts[host].redirecting = on,
            source::Action::Forget => {
                assert_ne!(self.running_at(), Some(host), "the VM's own connections");
                self.coverage.forgotten += 1;
                let mut cursor = Cursor::default();
                while self.hosts[host].table.map.flush(&mut cursor, 4096, &(), &mut |_| true) {}
                assert!(self.hosts[host].table.map.is_empty());
            }
            source::Action::Report(report) => match report {
                source::Report::Round(round) => {
                    self.coverage.rounds += 1;
                    self.coverage.held_back += round.held;
                    self.coverage.lagging += round.lagging;
                    self.coverage.tombstones += round.deleted;
                }
                source::Report::Attempt(n) => self.coverage.second_attempts += u64::from(n > 1),
                source::Report::Committed { hold_ms, .. } => assert!(hold_ms <= self.limits.linger_ms),
                source::Report::Failed(_) => assert_eq!(self.coverage.quiet_runs, 0, "a quiet run"),
                source::Report::Resumed => self.coverage.resumed += 1,
                source::Report::Accepted(_) | source::Report::Refused(_) | source::Report::Activated(_) => {}
            },
        }
    }

    fn send(&mut self, channel: Option<usize>, side: usize, message: &Message) {
        if let Some(channel) = channel
            && self.channels[channel].send(side, message, self.now_ms, &mut self.rng) == Sent::Cut
        {
            self.coverage.cuts += 1;
            self.channels[channel].break_off(self.now_ms, &mut self.rng);
        }
    }

    fn tell_destination(&mut self, host: usize, event: destination::Event<Table>) {
        if self.hosts[host].up_at_ms.is_some() {
            return;
        }
        let mut out = Vec::new();
        let clock_ms = self.clock_ms(host);
        let before = self.hosts[host].destination.counts();
        let clears = matches!(&event, destination::Event::Batch(batch) if batch.clear);
        self.coverage.restarts += u64::from(clears);
        self.hosts[host].destination.handle(event, clock_ms, &mut out);
        let counts = self.hosts[host].destination.counts();
        self.coverage.repeated += counts.repeated_batches - before.repeated_batches;
        assert_eq!((counts.refused, counts.dropped), (0, 0));
        for action in out {
            self.destination_action(host, action);
        }
    }

    fn destination_action(&mut self, host: usize, action: destination::Action<Table>) {
        match action {
            destination::Action::Send(message) => {
                self.say(|| format!("        destination {host} -> {message:?}"));
                self.send(self.hosts[host].accepted, 1, &message);
            }
            destination::Action::Disconnect => {
                self.say(|| format!("        destination {host} disconnects"));
                self.hosts[host].judge_at_ms = None;
                if let Some(channel) = self.hosts[host].accepted.take() {
                    self.channels[channel].close(1, self.now_ms, &mut self.rng);
                }
            }
            destination::Action::Judge { peer, .. } => {
                assert_eq!(peer, self.hosts[1 - host].name);
                self.hosts[host].judge_at_ms = Some(self.now_ms + self.rng.range(0, 3));
            }
            destination::Action::Install(table) => {
                self.say(|| format!("        destination {host} installs"));
                self.hosts[host].table = table;
            }
            destination::Action::Withdraw => {
                self.coverage.withdrawn += 1;
                let h = &mut self.hosts[host];
                h.table = new_table(&h.tables, self.scene.capacity);
            }
            destination::Action::Activate { began, liberal } => {
                assert_eq!(self.running_at(), Some(host), "the VM does not run at {host}");
                self.say(|| format!("        destination {host} begins: {began:?}, liberal {liberal}"));
                self.coverage.began[began as usize] += 1;
                self.check_activation(host, began);
            }
            destination::Action::Deliver(frame) => {
                let number = u32::from_le_bytes(frame.try_into().unwrap());
                let seen = &mut self.late_seen[host];
                assert!(number > *seen && number <= self.late_sent, "late frames out of order, or twice");
                *seen = number;
                self.coverage.late_frames += 1;
            }
            destination::Action::Report(report) => match report {
                destination::Report::Committed(_) => self.check_commit(host),
                destination::Report::Dropped(_) => self.coverage.dropped += 1,
                _ => {}
            },
        }
    }

    // ---- the promises

    /// Everything that the source had at the stop and has not expired since is there; nothing else is.
    fn check_commit(&mut self, host: usize) {
        self.coverage.commits += 1;
        let (from, at_stop) = self.at_stop.as_ref().expect("committed without a stop");
        assert_eq!(*from, 1 - host);
        let (source_ms, destination_ms) = (self.clock_ms(*from), self.clock_ms(host));
        let installed = entries(&self.hosts[host].table.map);
        let mut missing = 0;
        for (key, there) in at_stop.iter().filter(|(_, c)| !c.is_expired(source_ms)) {
            let Some(here) = installed.get(key) else {
                // With an expiry that was left behind it may have expired.
                missing += 1;
                assert!(missing <= self.lagging, "{key:?} is missing at the destination: {there:?}");
                continue;
            };
            assert_eq!(
                (here.state(), here.assured(), here.seen_reply()),
                (there.state(), there.assured(), there.seen_reply())
            );
            assert_eq!(here.opened(), there.opened());
        }
        for (key, here) in installed.iter().filter(|(_, c)| !c.is_expired(destination_ms)) {
            assert!(at_stop.contains_key(key), "{key:?} is at the destination, and was not at the source: {here:?}");
        }
    }

    fn check_activation(&mut self, host: usize, began: Began) {
        let installed = entries(&self.hosts[host].table.map);
        let Some((from, at_stop)) = &self.at_stop else { panic!("no stop") };
        let (source_ms, destination_ms) = (self.clock_ms(*from), self.clock_ms(host));
        match began {
            Began::Empty => assert!(installed.is_empty(), "{} connections", installed.len()),
            Began::Partial => {
                assert_eq!(self.scene.when_late, [WhenLate::FailOpen; 2]);
            }
            // Of an earlier stop, perhaps.
            Began::Unconfirmed => {}
            Began::Complete | Began::Lagging => {
                for (key, there) in at_stop.iter().filter(|(_, c)| !c.is_expired(source_ms)) {
                    let here = installed.get(key);
                    // With windows left behind, so is the time.
                    if began == Began::Complete || here.is_some() {
                        let Some(here) = here else { panic!("{key:?} got lost") };
                        let same = content(here);
                        let expected = content(there);
                        if began == Began::Complete {
                            assert_eq!(same, expected);
                            let late =
                                i64::from(here.remaining_ms(destination_ms)) - i64::from(there.remaining_ms(source_ms));
                            assert!((0..2500).contains(&late), "expires {late} ms later");
                        } else {
                            assert!(here.version <= there.version);
                            assert_eq!(same.state, expected.state);
                        }
                    }
                }
                if began == Began::Complete {
                    self.coverage.commits_with_all_windows += 1;
                }
                for key in installed.iter().filter(|(_, c)| !c.is_expired(destination_ms)).map(|(key, _)| key) {
                    assert!(at_stop.contains_key(key));
                }
            }
        }
    }
}

/// A connection without its times, which are compared apart or, for UDP, go on on the way.
fn content(connection: &Connection) -> Portable {
    let mut portable = connection.to_portable(0);
    portable.remaining_ms = 0;
    if let PortableState::Udp { age_ms } = &mut portable.protocol {
        *age_ms = 0;
    }
    portable
}

fn new_table(tables: &Rc<Cell<usize>>, capacity: u32) -> Table {
    tables.set(tables.get() + 1);
    Table { map: Arc::new(ConnMap::new(capacity, [3, 5]).unwrap()), _alive: Rc::new(Alive(Rc::clone(tables))) }
}

fn identity(host: &Name, when_late: WhenLate) -> SourceIdentity {
    let vm = Offer { vm: Name::new("vm").unwrap(), nics: List::default(), capacity: 0, entries: 0, when_late };
    SourceIdentity { host: host.clone(), abilities: Abilities::default(), vm }
}
