//! The switch as the control side sees it: bridges, ports, PMD threads, and the pictures that the threads forward by.
//!
//! All methods may be called from any control thread; none may be called from a PMD thread. A method that takes
//! something away returns when no PMD thread can touch it any more.
pub mod firewall;
pub mod trace;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;
use thiserror::Error;

use crate::bridge::fdb::{
    DEFAULT_AGEING_S, DEFAULT_CAPACITY, DEFAULT_PORT_LIMIT, Fdb, FdbEntry, FdbStats, MAX_PORTS, PortId,
};
use crate::bridge::vlan::{BadVlan, VlanMode, VlanPolicy};
use crate::bridge::{BridgeEntry, BridgeId, Forwarding, MAX_BRIDGES, PictureId, PortEntry};
use crate::clock::Clock;
use crate::counters::{DropReason, RxLedger, TxLedger};
use crate::divert::Divert;
use crate::enforce::VmId;
use crate::firewall::PolicyError;
use crate::frame::MAX_FRAME_BYTES;
use crate::pmd::{Command, IdleTuning, Kinds, Mailbox, PmdCounters, PmdId, PmdStats, PolledQueue, Sleeper, mailbox};
use crate::qsbr::{Domain, MAX_THREADS, Published};
use crate::worker::{Parts, Worker};
pub use firewall::FirewallOptions;

/// Longest frame that can be injected, bytes.
pub const MAX_INJECTED_BYTES: usize = 1514;

/// Why a request could not be carried out. Nothing was changed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SwitchError {
    /// No such bridge.
    #[error("there is no bridge number {0}")]
    NoBridge(BridgeId),
    /// No such port.
    #[error("there is no port number {0}")]
    NoPort(PortId),
    /// No such receive queue.
    #[error("port {port} has no receive queue {queue}")]
    NoQueue {
        /// The port.
        port: PortId,
        /// The queue asked for.
        queue: u16,
    },
    /// No such PMD thread.
    #[error("there is no PMD thread number {0}")]
    NoPmd(PmdId),
    /// A bridge is removed only when its ports have gone.
    #[error("bridge {name} still has {ports} port(s): remove or move them first")]
    BridgeInUse {
        /// The bridge.
        name: String,
        /// How many ports it has.
        ports: usize,
    },
    /// Names are unique among ports and among bridges.
    #[error("the name {0} is taken")]
    NameTaken(String),
    /// A limit of the switch is reached.
    #[error("no more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A VLAN number out of range.
    #[error(transparent)]
    Vlan(#[from] BadVlan),
    /// The last PMD thread cannot go while there are ports.
    #[error("this is the last PMD thread and there are receive queues to poll")]
    LastPmd,
    /// A frame to be sent has an impossible length.
    #[error("a frame of {0} bytes cannot be sent: 14 to {MAX_INJECTED_BYTES} (or to the port's MTU)")]
    BadFrame(usize),
    /// No such VM.
    #[error("there is no VM number {0}")]
    NoVm(VmId),
    /// A VM is removed or renamed only when its ports have gone.
    #[error("VM {name} still has {ports} port(s): remove them first")]
    VmInUse {
        /// The VM.
        name: String,
        /// How many ports it has.
        ports: usize,
    },
    /// The firewall's rules are invalid.
    #[error("invalid policy: {}", list(.0))]
    Policy(Vec<PolicyError>),
    /// A group or set has too many addresses.
    #[error("{0} would have too many addresses")]
    TooManyAddresses(String),
    /// No memory for a connection table.
    #[error("cannot make the connection table: {0}")]
    Table(String),
    /// The operating system refused a thread.
    #[error("cannot start a PMD thread: {0}")]
    Thread(String),
}

fn list(errors: &[PolicyError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A bridge's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BridgeOptions {
    /// Stations the FDB holds. Fixed when the bridge is made.
    pub fdb_capacity: u32,
    /// Seconds after which a silent station is forgotten.
    pub fdb_ageing_s: u32,
}

impl Default for BridgeOptions {
    fn default() -> Self {
        Self { fdb_capacity: DEFAULT_CAPACITY, fdb_ageing_s: DEFAULT_AGEING_S }
    }
}

/// A port's settings; all can be changed while it carries traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOptions {
    /// Unique name.
    pub name: String,
    /// The bridge it belongs to; frames of a port in no bridge are dropped.
    pub bridge: Option<BridgeId>,
    /// Its part in VLANs.
    pub vlan: VlanMode,
    /// Administratively up.
    pub admin_up: bool,
    /// Addresses it may occupy in the FDB.
    pub fdb_limit: u32,
    /// Longest IP packet sent to the port, bytes; 0: no limit but the port's own. Frames may be 18 bytes longer
    /// (Ethernet header and one VLAN tag).
    pub mtu: u16,
    /// Its firewall; without one frames pass unjudged.
    pub firewall: Option<FirewallOptions>,
}

impl Default for PortOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            bridge: None,
            vlan: VlanMode::default(),
            admin_up: true,
            fdb_limit: DEFAULT_PORT_LIMIT,
            mtu: 0,
            firewall: None,
        }
    }
}

/// A PMD thread's settings.
pub struct PmdOptions {
    /// Thread name (shown by `ps -L`), at most 15 bytes are kept by Linux.
    pub name: String,
    /// Idle behaviour, changeable later through the same handle.
    pub idle: Arc<IdleTuning>,
    /// How it sleeps.
    pub sleeper: Box<dyn Sleeper>,
    /// Runs first on the new thread: pinning, scheduling class.
    pub on_start: Box<dyn FnOnce() + Send>,
}

/// Where a receive queue is polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RxqAssignment {
    /// The port.
    pub port: PortId,
    /// Its queue.
    pub queue: u16,
    /// The PMD thread; none while there is no PMD thread at all.
    pub pmd: Option<PmdId>,
}

/// Drops by reason, zero ones left out.
pub type Drops = BTreeMap<&'static str, u64>;

/// What became of received frames.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct RxStats {
    /// Frames received.
    pub frames: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Frames that reached at least one output.
    pub forwarded: u64,
    /// Fragments kept for their datagram; they are counted again when they go on (under "originated").
    pub held: u64,
    /// Frames dropped, all reasons.
    pub dropped: u64,
    /// Frames dropped, by reason.
    pub drops: Drops,
}

/// What was sent.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct TxStats {
    /// Frames sent.
    pub frames: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Copies refused by the port, all reasons.
    pub refused: u64,
    /// Copies refused, by reason.
    pub refusals: Drops,
}

/// One port's counters.
#[derive(Clone, Debug, Serialize)]
pub struct PortStats {
    /// Its number.
    pub id: PortId,
    /// Its name.
    pub name: String,
    /// Sum over its queues.
    pub rx: RxStats,
    /// Sum over PMD threads.
    pub tx: TxStats,
    /// Each receive queue.
    pub rx_queues: Vec<RxStats>,
    /// Addresses it holds in its bridge's FDB.
    pub fdb_entries: u32,
}

/// One PMD thread.
#[derive(Clone, Debug, Serialize)]
pub struct PmdReport {
    /// Its number.
    pub id: PmdId,
    /// Its name.
    pub name: String,
    /// What it has done.
    pub stats: PmdStats,
    /// What it polls.
    pub queues: Vec<RxqAssignment>,
    /// Idle: time of polling after the last frame, microseconds.
    pub spin_us: u32,
    /// Idle: bound of sleeps without a signal, microseconds; 0: always polls.
    pub latency_us: u32,
}

/// Everything that is counted, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct SwitchStats {
    /// Every port.
    pub ports: Vec<PortStats>,
    /// Frames that the switch originated itself: announcements, answers to rejected packets, released fragments.
    pub originated: RxStats,
    /// Ports that were removed: their counters are kept in these sums, so that totals never go back.
    pub removed: RxStats,
    /// Every PMD thread.
    pub pmds: Vec<PmdReport>,
}

impl SwitchStats {
    /// Frames received on all ports, past and present, and originated.
    pub fn received(&self) -> u64 {
        self.inputs().map(|rx| rx.frames).sum()
    }
    /// Frames forwarded.
    pub fn forwarded(&self) -> u64 {
        self.inputs().map(|rx| rx.forwarded).sum()
    }
    /// Fragments kept.
    pub fn held(&self) -> u64 {
        self.inputs().map(|rx| rx.held).sum()
    }
    /// Frames dropped.
    pub fn dropped(&self) -> u64 {
        self.inputs().map(|rx| rx.dropped).sum()
    }
    fn inputs(&self) -> impl Iterator<Item = &RxStats> {
        self.ports.iter().map(|p| &p.rx).chain([&self.originated, &self.removed])
    }
}

struct PortRecord<K: Kinds> {
    options: PortOptions,
    tx: K::Tx,
    divert: Option<Arc<Divert>>,
    vlan: Arc<VlanPolicy>,
    tx_ledgers: Arc<[TxLedger; MAX_THREADS]>,
    ledgers: Vec<Arc<RxLedger>>,
    /// Where each queue is polled.
    homes: Vec<Option<PmdId>>,
    /// Queues that no PMD thread polls (there is none).
    parked: Vec<PolledQueue<K::Rx>>,
}

struct BridgeRecord {
    name: String,
    options: BridgeOptions,
    fdb: Arc<Fdb>,
}

struct PmdRecord<K: Kinds> {
    name: String,
    mailbox: Mailbox<K::Rx>,
    counters: Arc<PmdCounters>,
    idle: Arc<IdleTuning>,
    thread: Option<JoinHandle<()>>,
}

struct Inner<K: Kinds> {
    ports: BTreeMap<PortId, PortRecord<K>>,
    bridges: BTreeMap<BridgeId, BridgeRecord>,
    pmds: BTreeMap<PmdId, PmdRecord<K>>,
    removed: RxStats,
    /// One per PMD thread number: ledgers have a single writer.
    originated: BTreeMap<PmdId, Arc<RxLedger>>,
    firewall: firewall::State,
}

/// The switch. See the module's documentation.
pub struct Switch<K: Kinds> {
    domain: Arc<Domain>,
    clock: Clock,
    forwarding: Arc<Published<Forwarding<K::Tx>>>,
    inner: Mutex<Inner<K>>,
    /// Which VM's table is tended first, so that all have their turn.
    tended: AtomicUsize,
}

impl<K: Kinds> Switch<K> {
    /// A switch without bridges, ports or threads. Its ports must synchronise on the same `domain`.
    pub fn new(domain: Arc<Domain>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            domain,
            clock,
            forwarding: Arc::new(Published::new(Box::new(Forwarding::default()))),
            inner: Mutex::new(Inner {
                ports: BTreeMap::new(),
                bridges: BTreeMap::new(),
                pmds: BTreeMap::new(),
                removed: RxStats::default(),
                originated: BTreeMap::new(),
                firewall: firewall::State::default(),
            }),
            tended: AtomicUsize::new(0),
        })
    }

    /// The grace-period domain that ports of this switch share.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        // A panic elsewhere leaves records that are each consistent: go on with them.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new picture from the records and waits until no thread uses the former one.
    fn publish(&self, inner: &Inner<K>) {
        let mut bridges: Vec<Option<Arc<BridgeEntry>>> = Vec::new();
        for (&id, record) in &inner.bridges {
            let members = inner.ports.iter().filter(|(_, p)| p.options.bridge == Some(id)).map(|(&id, _)| id).collect();
            let members: Vec<_> = members;
            let guarded = members.iter().any(|port| inner.firewall.ports.contains_key(port));
            put(&mut bridges, id, BridgeEntry { id, fdb: Arc::clone(&record.fdb), members, guarded });
        }
        let mut ports = Vec::new();
        for (&id, record) in &inner.ports {
            let bridge = record.options.bridge.and_then(|b| bridges.get(usize::from(b)).cloned().flatten());
            let entry = PortEntry {
                id,
                bridge,
                vlan: Arc::clone(&record.vlan),
                admin_up: record.options.admin_up,
                fdb_limit: record.options.fdb_limit,
                max_frame_bytes: match record.options.mtu {
                    0 => 0,
                    mtu => u32::from(mtu) + 18,
                },
                firewall: inner.firewall.ports.get(&id).map(|record| record.firewall.clone()),
                divert: record.divert.clone(),
                tx: record.tx.clone(),
                tx_ledgers: Arc::clone(&record.tx_ledgers),
            };
            put(&mut ports, id, entry);
        }
        let vms = inner.firewall.vms.values().map(|vm| Arc::clone(&vm.firewall)).collect();
        let picture = Forwarding { id: PictureId::new(), ports, bridges, vms };
        drop(self.forwarding.replace(Some(Box::new(picture)), &self.domain));
    }

    /// Starts a PMD thread. Queues that nobody polls yet are given to it.
    pub fn add_pmd(&self, options: PmdOptions) -> Result<PmdId, SwitchError> {
        let mut inner = self.lock();
        let id = free_number(&inner.pmds, MAX_THREADS)
            .ok_or(SwitchError::TooMany { what: "PMD threads", limit: MAX_THREADS })?;
        if inner.pmds.values().any(|p| p.name == options.name) {
            return Err(SwitchError::NameTaken(options.name));
        }
        let counters = Arc::new(PmdCounters::default());
        let originated = Arc::clone(inner.originated.entry(id).or_default());
        let events = Arc::clone(inner.firewall.events.entry(id).or_default());
        let (outbox, inbox) = mailbox(options.sleeper.waker());
        let PmdOptions { name, idle, mut sleeper, on_start } = options;
        let (domain, forwarding, clock) = (Arc::clone(&self.domain), Arc::clone(&self.forwarding), self.clock.clone());
        let (thread_idle, thread_counters) = (Arc::clone(&idle), Arc::clone(&counters));
        let (registered, answer) = crossbeam::channel::bounded(1);
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                on_start();
                let guard = domain.register();
                let _ = registered.send(guard.is_some());
                let Some(guard) = guard else { return };
                let parts = Parts {
                    guard,
                    forwarding,
                    inbox,
                    injected: originated,
                    clock,
                    idle: thread_idle,
                    counters: thread_counters,
                    events,
                };
                Worker::<K>::new(parts).run(sleeper.as_mut());
            })
            .map_err(|e| SwitchError::Thread(e.to_string()))?;
        if answer.recv() != Ok(true) {
            return Err(SwitchError::TooMany { what: "PMD threads", limit: MAX_THREADS });
        }
        inner.pmds.insert(id, PmdRecord { name, mailbox: outbox, counters, idle, thread: Some(thread) });
        let parked: Vec<_> = inner.ports.values_mut().flat_map(|p| p.parked.drain(..)).collect();
        for queue in parked {
            inner.place(queue, Some(id));
        }
        Ok(id)
    }

    /// Stops a PMD thread; the others take over its queues.
    pub fn remove_pmd(&self, id: PmdId) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        if !inner.pmds.contains_key(&id) {
            return Err(SwitchError::NoPmd(id));
        }
        if inner.pmds.len() == 1 && inner.ports.values().any(|p| !p.ledgers.is_empty()) {
            return Err(SwitchError::LastPmd);
        }
        for queue in inner.stop_pmd(id) {
            inner.place(queue, None);
        }
        Ok(())
    }

    /// Stops everything: threads first, then ports go with their records.
    pub fn shutdown(&self) {
        let mut inner = self.lock();
        let ids: Vec<_> = inner.pmds.keys().copied().collect();
        for id in ids {
            drop(inner.stop_pmd(id));
        }
        inner.ports.clear();
        inner.bridges.clear();
        inner.firewall = firewall::State::default();
        self.publish(&inner);
    }

    /// Adds a bridge.
    pub fn add_bridge(&self, name: &str, options: BridgeOptions) -> Result<BridgeId, SwitchError> {
        let mut inner = self.lock();
        if inner.bridges.values().any(|b| b.name == name) {
            return Err(SwitchError::NameTaken(name.to_owned()));
        }
        let id = free_number(&inner.bridges, MAX_BRIDGES)
            .ok_or(SwitchError::TooMany { what: "bridges", limit: MAX_BRIDGES })?;
        let fdb = Arc::new(Fdb::new(options.fdb_capacity, options.fdb_ageing_s));
        inner.bridges.insert(id, BridgeRecord { name: name.to_owned(), options, fdb });
        self.publish(&inner);
        Ok(id)
    }

    /// Changes a bridge. A new FDB capacity starts with an empty FDB (stations are learned again); the ageing time just changes.
    pub fn update_bridge(&self, id: BridgeId, options: BridgeOptions) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let record = inner.bridges.get_mut(&id).ok_or(SwitchError::NoBridge(id))?;
        if record.options.fdb_capacity == options.fdb_capacity {
            record.fdb.set_ageing_s(options.fdb_ageing_s);
            record.options = options;
        } else {
            record.options = options;
            record.fdb = Arc::new(Fdb::new(options.fdb_capacity, options.fdb_ageing_s));
            self.publish(&inner);
        }
        Ok(())
    }

    /// Removes a bridge that has no ports.
    pub fn remove_bridge(&self, id: BridgeId) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let name = inner.bridges.get(&id).ok_or(SwitchError::NoBridge(id))?.name.clone();
        let ports = inner.ports.values().filter(|p| p.options.bridge == Some(id)).count();
        if ports > 0 {
            return Err(SwitchError::BridgeInUse { name, ports });
        }
        inner.bridges.remove(&id);
        self.publish(&inner);
        Ok(())
    }

    /// Adds a port with its receive queues. `affinity[i]` names the PMD thread for queue i; queues without one go where there are fewest.
    pub fn add_port(
        &self,
        options: PortOptions,
        tx: K::Tx,
        rx: Vec<K::Rx>,
        affinity: &[PmdId],
    ) -> Result<PortId, SwitchError> {
        let mut inner = self.lock();
        let vlan = inner.check_port(&options, None)?;
        for id in affinity {
            if !inner.pmds.contains_key(id) {
                return Err(SwitchError::NoPmd(*id));
            }
        }
        let id =
            free_number(&inner.ports, MAX_PORTS).ok_or(SwitchError::TooMany { what: "ports", limit: MAX_PORTS })?;
        if let Some(change) = inner.plan_port(id, &options)? {
            inner.firewall.commit(change);
        }
        let ledgers: Vec<_> = rx.iter().map(|_| Arc::new(RxLedger::default())).collect();
        let queues: Vec<_> = rx
            .into_iter()
            .zip(&ledgers)
            .enumerate()
            .map(|(i, (rx, ledger))| PolledQueue { rx, port: id, queue: i as u16, ledger: Arc::clone(ledger) })
            .collect();
        inner.ports.insert(
            id,
            PortRecord {
                options,
                tx,
                divert: None,
                vlan: Arc::new(vlan),
                tx_ledgers: Arc::new(core::array::from_fn(|_| TxLedger::default())),
                homes: vec![None; ledgers.len()],
                ledgers,
                parked: Vec::new(),
            },
        );
        // First the picture, then the queues: a frame never meets a port that the picture does not know.
        self.publish(&inner);
        for (i, queue) in queues.into_iter().enumerate() {
            inner.place(queue, affinity.get(i).copied());
        }
        Ok(id)
    }

    /// Changes a port's settings; its traffic goes on. Moving it to another bridge or changing its VLANs forgets its stations.
    pub fn update_port(&self, id: PortId, options: PortOptions) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let vlan = inner.check_port(&options, Some(id))?;
        if !inner.ports.contains_key(&id) {
            return Err(SwitchError::NoPort(id));
        }
        if let Some(change) = inner.plan_port(id, &options)? {
            inner.firewall.commit(change);
        }
        let record = inner.ports.get_mut(&id).ok_or(SwitchError::NoPort(id))?;
        let moved = record.options.bridge != options.bridge || record.options.vlan != options.vlan;
        let former = record.options.bridge;
        record.vlan = Arc::new(vlan);
        record.options = options;
        self.publish(&inner);
        if moved && let Some(bridge) = former.and_then(|b| inner.bridges.get(&b)) {
            bridge.fdb.flush(Some(id));
        }
        Ok(())
    }

    /// Removes a port. When it returns no PMD thread touches the port; its queues and transmit side have been dropped.
    pub fn remove_port(&self, id: PortId) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let record = inner.ports.get(&id).ok_or(SwitchError::NoPort(id))?;
        let queues = record.ledgers.len() as u16;
        for queue in 0..queues {
            drop(inner.take_back(id, queue));
        }
        let Some(record) = inner.ports.remove(&id) else { return Err(SwitchError::NoPort(id)) };
        for ledger in &record.ledgers {
            inner.removed.add(&read_rx(ledger));
        }
        if record.options.firewall.is_some() {
            // Its addresses leave the groups. Fewer members cannot make valid rules invalid.
            inner.replan()?;
        }
        self.publish(&inner);
        if let Some(bridge) = record.options.bridge.and_then(|b| inner.bridges.get(&b)) {
            bridge.fdb.flush(Some(id));
        }
        Ok(())
    }

    /// Moves a receive queue to another PMD thread, between two bursts.
    pub fn assign_rxq(&self, port: PortId, queue: u16, pmd: PmdId) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        if !inner.pmds.contains_key(&pmd) {
            return Err(SwitchError::NoPmd(pmd));
        }
        let record = inner.ports.get(&port).ok_or(SwitchError::NoPort(port))?;
        match record.homes.get(usize::from(queue)) {
            None => return Err(SwitchError::NoQueue { port, queue }),
            Some(home) if *home == Some(pmd) => return Ok(()),
            Some(_) => {}
        }
        let taken = inner.take_back(port, queue).ok_or(SwitchError::NoQueue { port, queue })?;
        inner.place(taken, Some(pmd));
        Ok(())
    }

    /// Spreads all receive queues evenly over the PMD threads.
    pub fn rebalance(&self) {
        let mut inner = self.lock();
        let all: Vec<_> = inner.assignments();
        let pmds: Vec<_> = inner.pmds.keys().copied().collect();
        for (i, a) in all.iter().enumerate() {
            let Some(&target) = pmds.get(i % pmds.len().max(1)) else { return };
            if a.pmd != Some(target)
                && let Some(queue) = inner.take_back(a.port, a.queue)
            {
                inner.place(queue, Some(target));
            }
        }
    }

    /// Which thread polls what.
    pub fn rxq_assignments(&self) -> Vec<RxqAssignment> {
        self.lock().assignments()
    }

    /// Sends a frame that the switch itself originates, as if it had come in through `ingress` (so that it follows
    /// that port's bridge and VLAN). 14 to [`MAX_INJECTED_BYTES`] bytes.
    pub fn inject(&self, ingress: PortId, frame: &[u8]) -> Result<(), SwitchError> {
        if !(14..=MAX_INJECTED_BYTES).contains(&frame.len()) {
            return Err(SwitchError::BadFrame(frame.len()));
        }
        let inner = self.lock();
        if !inner.ports.contains_key(&ingress) {
            return Err(SwitchError::NoPort(ingress));
        }
        let pmd = inner.pmds.values().next().ok_or(SwitchError::NoPmd(0))?;
        pmd.mailbox.send(Command::Inject { ingress, frame: frame.to_vec() });
        Ok(())
    }

    /// Has a port's frames taken by `divert` instead of its transmit side, or no longer (`None`). When it returns no PMD thread uses
    /// what was there before.
    pub fn set_divert(&self, port: PortId, divert: Option<Arc<Divert>>) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        inner.ports.get_mut(&port).ok_or(SwitchError::NoPort(port))?.divert = divert;
        self.publish(&inner);
        Ok(())
    }

    /// Sends a frame to one port, as its guest is to receive it; the port's firewall judges it first. For frames that were kept in a
    /// [`Divert`], here or on another host.
    pub fn deliver(&self, output: PortId, frame: Vec<u8>) -> Result<(), SwitchError> {
        if frame.len() < 14 || frame.len() > MAX_FRAME_BYTES as usize {
            return Err(SwitchError::BadFrame(frame.len()));
        }
        let inner = self.lock();
        if !inner.ports.contains_key(&output) {
            return Err(SwitchError::NoPort(output));
        }
        let pmd = inner.pmds.values().next().ok_or(SwitchError::NoPmd(0))?;
        pmd.mailbox.send(Command::Deliver { output, frame });
        Ok(())
    }

    /// The stations of a bridge.
    pub fn fdb(&self, bridge: BridgeId) -> Result<Vec<FdbEntry>, SwitchError> {
        let fdb = self.fdb_of(bridge)?;
        Ok(fdb.entries(self.now_s()))
    }

    /// Fill level and learning events of a bridge.
    pub fn fdb_stats(&self, bridge: BridgeId) -> Result<FdbStats, SwitchError> {
        Ok(self.fdb_of(bridge)?.stats())
    }

    /// Forgets all stations of a bridge, or those behind one port. Returns how many.
    pub fn fdb_flush(&self, bridge: BridgeId, port: Option<PortId>) -> Result<u32, SwitchError> {
        Ok(self.fdb_of(bridge)?.flush(port))
    }

    fn fdb_of(&self, bridge: BridgeId) -> Result<Arc<Fdb>, SwitchError> {
        self.lock().bridges.get(&bridge).map(|b| Arc::clone(&b.fdb)).ok_or(SwitchError::NoBridge(bridge))
    }

    fn now_s(&self) -> u32 {
        (self.clock.now_ns() / 1_000_000_000) as u32
    }

    /// Reads all counters.
    pub fn stats(&self) -> SwitchStats {
        let inner = self.lock();
        let ports = inner
            .ports
            .iter()
            .map(|(&id, record)| {
                let rx_queues: Vec<_> = record.ledgers.iter().map(|l| read_rx(l)).collect();
                let mut rx = RxStats::default();
                rx_queues.iter().for_each(|q| rx.add(q));
                let bridge = record.options.bridge.and_then(|b| inner.bridges.get(&b));
                PortStats {
                    id,
                    name: record.options.name.clone(),
                    rx,
                    tx: read_tx(record.tx_ledgers.iter()),
                    rx_queues,
                    fdb_entries: bridge.map_or(0, |b| b.fdb.port_count(id)),
                }
            })
            .collect();
        let mut originated = RxStats::default();
        inner.originated.values().for_each(|l| originated.add(&read_rx(l)));
        let assignments = inner.assignments();
        let pmds = inner
            .pmds
            .iter()
            .map(|(&id, record)| PmdReport {
                id,
                name: record.name.clone(),
                stats: record.counters.stats(),
                queues: assignments.iter().filter(|a| a.pmd == Some(id)).copied().collect(),
                spin_us: record.idle.spin_us(),
                latency_us: record.idle.latency_us(),
            })
            .collect();
        SwitchStats { ports, originated, removed: inner.removed.clone(), pmds }
    }
}

impl<K: Kinds> Drop for Switch<K> {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl<K: Kinds> Inner<K> {
    /// Gives a queue to a PMD thread: the one named, else the one with the fewest queues.
    fn place(&mut self, queue: PolledQueue<K::Rx>, pmd: Option<PmdId>) {
        let (port, number) = (queue.port, queue.queue);
        let target = pmd.filter(|id| self.pmds.contains_key(id)).or_else(|| {
            let load = |id: PmdId| self.ports.values().flat_map(|p| &p.homes).filter(|h| **h == Some(id)).count();
            self.pmds.keys().copied().min_by_key(|&id| load(id))
        });
        let home = match target.and_then(|id| self.pmds.get(&id)) {
            Some(record) => {
                record.mailbox.send(Command::Add(Box::new(queue)));
                target
            }
            None => {
                if let Some(record) = self.ports.get_mut(&port) {
                    record.parked.push(queue);
                }
                None
            }
        };
        if let Some(slot) = self.ports.get_mut(&port).and_then(|p| p.homes.get_mut(usize::from(number))) {
            *slot = home;
        }
    }

    /// Takes a queue from whoever polls it; returns when that thread has let go.
    fn take_back(&mut self, port: PortId, queue: u16) -> Option<PolledQueue<K::Rx>> {
        let record = self.ports.get_mut(&port)?;
        if let Some(at) = record.parked.iter().position(|q| q.queue == queue) {
            return Some(record.parked.swap_remove(at));
        }
        let home = record.homes.get_mut(usize::from(queue))?.take()?;
        let pmd = self.pmds.get(&home)?;
        pmd.mailbox.ask(|reply| Command::Remove { port, queue, reply }).flatten().map(|q| *q)
    }

    /// Ends a PMD thread and returns what it polled.
    fn stop_pmd(&mut self, id: PmdId) -> Vec<PolledQueue<K::Rx>> {
        let Some(mut record) = self.pmds.remove(&id) else { return Vec::new() };
        let queues = record.mailbox.ask(|reply| Command::Stop { reply }).unwrap_or_default();
        if let Some(thread) = record.thread.take() {
            // A panic on the thread aborts the process (see ferryd); nothing is left to report here.
            let _ = thread.join();
        }
        for home in self.ports.values_mut().flat_map(|p| &mut p.homes) {
            if *home == Some(id) {
                *home = None;
            }
        }
        queues
    }

    fn assignments(&self) -> Vec<RxqAssignment> {
        let of = |(&port, record): (&PortId, &PortRecord<K>)| {
            let homes = record.homes.clone();
            homes.into_iter().enumerate().map(move |(i, pmd)| RxqAssignment { port, queue: i as u16, pmd })
        };
        self.ports.iter().flat_map(of).collect()
    }

    fn check_port(&self, options: &PortOptions, own: Option<PortId>) -> Result<VlanPolicy, SwitchError> {
        if self.ports.iter().any(|(&id, p)| Some(id) != own && p.options.name == options.name) {
            return Err(SwitchError::NameTaken(options.name.clone()));
        }
        if let Some(bridge) = options.bridge
            && !self.bridges.contains_key(&bridge)
        {
            return Err(SwitchError::NoBridge(bridge));
        }
        Ok(VlanPolicy::new(&options.vlan)?)
    }
}

impl RxStats {
    fn add(&mut self, other: &RxStats) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.forwarded += other.forwarded;
        self.held += other.held;
        self.dropped += other.dropped;
        for (&reason, n) in &other.drops {
            *self.drops.entry(reason).or_default() += n;
        }
    }
}

fn named(counters: impl Iterator<Item = (DropReason, u64)>) -> (u64, Drops) {
    let mut drops = Drops::new();
    for (reason, n) in counters.filter(|(_, n)| *n > 0) {
        *drops.entry(reason.name()).or_default() += n;
    }
    (drops.values().sum(), drops)
}

fn read_rx(ledger: &RxLedger) -> RxStats {
    let (dropped, drops) = named(DropReason::ALL.iter().zip(&ledger.dropped).map(|(r, c)| (*r, c.get())));
    RxStats {
        frames: ledger.frames.get(),
        bytes: ledger.bytes.get(),
        forwarded: ledger.forwarded.get(),
        held: ledger.held.get(),
        dropped,
        drops,
    }
}

fn read_tx<'a>(ledgers: impl Iterator<Item = &'a TxLedger>) -> TxStats {
    let mut out = TxStats::default();
    for ledger in ledgers {
        let (refused, refusals) = named(DropReason::ALL.iter().zip(&ledger.refused).map(|(r, c)| (*r, c.get())));
        out.frames += ledger.frames.get();
        out.bytes += ledger.bytes.get();
        out.refused += refused;
        for (reason, n) in refusals {
            *out.refusals.entry(reason).or_default() += n;
        }
    }
    out
}

fn put<T>(list: &mut Vec<Option<Arc<T>>>, id: u16, value: T) {
    let at = usize::from(id);
    if list.len() <= at {
        list.resize_with(at + 1, || None);
    }
    if let Some(slot) = list.get_mut(at) {
        *slot = Some(Arc::new(value));
    }
}

fn free_number<V>(map: &BTreeMap<u16, V>, limit: usize) -> Option<u16> {
    (0..limit as u16).find(|id| !map.contains_key(id))
}
