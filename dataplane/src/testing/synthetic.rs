//! Ports without a far end, for measuring the packet path itself: the receive side lends the same frames again and
//! again, the transmit side copies them into a private buffer, as a real port would, and forgets them.
#![allow(unsafe_code)] // Its job: lending private buffers to a burst and copying from them.
pub mod tcp;

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::bridge::fdb::Fdb;
use crate::bridge::vlan::{VlanMode, VlanPolicy};
use crate::bridge::{BridgeEntry, Forwarding, PictureId, PortEntry};
use crate::clock::Clock;
use crate::conntrack::TrackConfig;
use crate::counters::{RxLedger, TxLedger};
use crate::enforce::port::FirewallLedger;
use crate::enforce::{PortFirewall, PortRules, VmFirewall, VmId, VmOptions};
use crate::firewall::limits::LimitsConfig;
use crate::firewall::policy::{PortRange, Protocol};
use crate::firewall::spoof::SpoofTable;
use crate::firewall::{
    AddressBook, CompileOptions, Direction, PolicyDocument, PortPolicy, Rule, SecurityGroup, compile,
};
use crate::frame::{BURST, Frames, Offload, RxBurst, TxFrame};
use crate::offload::checksum::Sum;
use crate::packet::ethernet::MacAddr;
use crate::pmd::{Command, IdleTuning, Kinds, PmdCounters, PolledQueue, Sleeper, mailbox};
use crate::port::{Armed, RxQueue, TxCapabilities, TxPort, TxReport, Wake};
use crate::qsbr::{Domain, Guard, Published};
use crate::testing::NapSleeper;
use crate::worker::{Parts, Worker};

/// Kinds of a synthetic switch.
pub struct SyntheticKinds;

impl Kinds for SyntheticKinds {
    type Rx = SyntheticRx;
    type Tx = SyntheticTx;
}

/// Lends frames that nobody else has.
pub enum SyntheticRx {
    /// So many frames per poll, going round.
    Round {
        /// The frames.
        frames: Vec<Vec<u8>>,
        /// How many, at most [`BURST`].
        burst: usize,
        /// Where it goes on.
        next: usize,
    },
    /// What a script says, at every poll.
    Script(Arc<Script>),
}

/// What a port receives at the next poll, and the ones after it.
#[derive(Default)]
pub struct Script(UnsafeCell<Vec<Vec<u8>>>);
// SAFETY: whoever writes the script owns the worker that reads it, and does one at a time.
unsafe impl Sync for Script {}
// SAFETY: it owns plain bytes.
unsafe impl Send for Script {}

impl Script {
    /// To be called between the steps of the worker that owns the queue, by its owner.
    fn write(&self, frames: impl Iterator<Item = Vec<u8>>) {
        // SAFETY: see `Sync`: nobody reads, and bursts have ended.
        let script = unsafe { &mut *self.0.get() };
        script.clear();
        script.extend(frames.take(BURST));
    }
}

fn lend(frame: &[u8], burst: &mut RxBurst) {
    let mark = burst.segment_mark();
    // SAFETY: the frames are neither changed nor dropped before the burst ends: rounds never, scripts between two steps.
    unsafe { burst.push_segment(frame.as_ptr(), frame.len() as u32) };
    burst.finish_frame(mark, Offload::default());
}

impl RxQueue for SyntheticRx {
    fn receive(&mut self, _guard: &Guard, burst: &mut RxBurst) {
        match self {
            Self::Round { frames, burst: count, next } => {
                while burst.len() < (*count).min(BURST) {
                    let Some(frame) = frames.get(*next) else { return };
                    *next = if *next + 1 == frames.len() { 0 } else { *next + 1 };
                    lend(frame, burst);
                }
            }
            Self::Script(script) => {
                // SAFETY: see `Sync`: nobody writes during a step.
                let frames = unsafe { &*script.0.get() };
                frames.iter().for_each(|frame| lend(frame, burst));
            }
        }
    }
    fn release(&mut self, _guard: &Guard) {}
    fn arm(&mut self, _guard: &Guard) -> Armed {
        Armed::Ready
    }
    fn disarm(&mut self, _guard: &Guard) {}
    fn set_waker(&mut self, _waker: Arc<dyn Wake>) {}
}

struct Sink {
    bytes: UnsafeCell<Vec<u8>>,
    /// Frames taken.
    taken: AtomicU64,
}
// SAFETY: a synthetic switch has one worker, so one thread at a time sends.
unsafe impl Sync for Sink {}
// SAFETY: it owns plain bytes.
unsafe impl Send for Sink {}

/// Copies what it is given and forgets it.
#[derive(Clone)]
pub struct SyntheticTx(Arc<Sink>);

impl SyntheticTx {
    fn new() -> Self {
        Self(Arc::new(Sink { bytes: UnsafeCell::new(vec![0; BURST * SLOT_BYTES]), taken: AtomicU64::new(0) }))
    }

    /// Frames it has been given.
    fn taken(&self) -> u64 {
        self.0.taken.load(Relaxed)
    }
}

/// Room for a jumbo frame; an odd number of cache lines, so that slots do not fall into the same cache sets.
const SLOT_BYTES: usize = 149 * 64;

impl TxPort for SyntheticTx {
    fn capabilities(&self, _guard: &Guard) -> TxCapabilities {
        TxCapabilities { csum: true, tso4: true, tso6: true, ecn: true, ..TxCapabilities::default() }
    }
    fn send(&self, _guard: &Guard, _lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        // SAFETY: see `Sink`.
        let sink = unsafe { &mut *self.0.bytes.get() };
        for (i, (frame, slot)) in frames.iter().zip(sink.chunks_exact_mut(SLOT_BYTES)).enumerate() {
            let Some((head, rest)) = slot.split_at_mut_checked(frame.head.len()) else { continue };
            head.copy_from_slice(frame.head);
            frame.body.read(rest);
            report.accept(i);
        }
        self.0.taken.store(self.taken() + frames.len() as u64, Relaxed);
    }
    fn send_received(&self, _guard: &Guard, _lane: usize, burst: &RxBurst, frames: u64, report: &mut TxReport) {
        // SAFETY: see `Sink`.
        let sink = unsafe { &mut *self.0.bytes.get() };
        for (i, slot) in Frames(frames).zip(sink.chunks_exact_mut(SLOT_BYTES)) {
            let Some(frame) = burst.as_received(i) else { continue };
            let Some((head, rest)) = slot.split_at_mut_checked(frame.head.len()) else { continue };
            head.copy_from_slice(frame.head);
            frame.body.read(rest);
        }
        report.accepted |= frames;
        self.0.taken.store(self.taken() + u64::from(frames.count_ones()), Relaxed);
    }
    fn flush(&self, _guard: &Guard, _lane: usize) {}
}

/// A worker that switches frames of `frame_bytes` between `stations` pairs of stations from one port to another.
/// Each `step` handles one burst of [`BURST`] frames.
pub fn l2_worker(frame_bytes: usize, stations: u64) -> Option<Worker<SyntheticKinds>> {
    let frames = (0..stations.max(BURST as u64)).map(|n| {
        let n = n % stations;
        let mut f = ethernet(n, [0x88, 0xb5]);
        f.resize(frame_bytes.max(14), 0x5a);
        f
    });
    worker(frames.collect(), BURST, stations, [None, None], Clock::simulated().0)
}

/// What [`firewall_worker`] does.
#[derive(Clone, Copy, Debug)]
pub struct FirewallLoad {
    /// Bytes per frame, at least 46.
    pub frame_bytes: usize,
    /// UDP flows, each a connection.
    pub connections: u32,
    /// Rules of the VM besides the one that lets the flows in.
    pub rules: u32,
    /// The sending port belongs to a VM, too, so that each frame is judged twice.
    pub both_ends: bool,
    /// Frames per burst, at most [`BURST`].
    pub burst: usize,
    /// UDP datagrams carry checksums.
    pub summed: bool,
    /// Changes to the connections are tracked, as during a migration. Nobody collects them.
    pub tracked: bool,
}

impl FirewallLoad {
    /// Frames of 64 bytes in full bursts, ten rules, no checksums, nothing tracked.
    pub const fn new(connections: u32, both_ends: bool) -> Self {
        Self { frame_bytes: 64, connections, rules: 10, both_ends, burst: BURST, summed: false, tracked: false }
    }
}

/// A worker whose frames are UDP datagrams of `connections` flows towards a VM, and the clock it goes by (nanoseconds).
///
/// The connections are new in the first `connections / burst` steps, and again whenever the clock has moved by more than
/// [`crate::conntrack::Timeouts::udp_ms`].
pub fn firewall_worker(load: FirewallLoad) -> Option<(Worker<SyntheticKinds>, Arc<AtomicU64>)> {
    let frames = (0..load.connections.max(BURST as u32)).map(|n| udp(n % load.connections, &load));
    let (clock, now_ns) = Clock::simulated();
    let receiver = port_firewall(0, &load)?;
    let sender = if load.both_ends { Some(port_firewall(1, &load)?) } else { None };
    Some((worker(frames.collect(), load.burst, 1, [sender, Some(receiver)], clock)?, now_ns))
}

const SOURCE: u64 = 0x0200_0000_0000;
const TARGET: u64 = 0x0600_0000_0000;

fn ethernet(pair: u64, ethertype: [u8; 2]) -> Vec<u8> {
    let mac = |mac: u64| mac.to_be_bytes().into_iter().skip(2);
    mac(TARGET | pair).chain(mac(SOURCE | pair)).chain(ethertype).collect()
}

/// The other way round.
fn ethernet_back(pair: u64, ethertype: [u8; 2]) -> Vec<u8> {
    let mut f = ethernet(pair, ethertype);
    if let Some(macs) = f.get_mut(..12) {
        macs.rotate_left(6);
    }
    f
}

/// A header for `l4_len` bytes.
fn ipv4(src: [u8; 4], dst: [u8; 4], proto: u8, l4_len: u16) -> Vec<u8> {
    let [a, b] = (20 + l4_len).to_be_bytes();
    let mut ip = vec![0x45, 0, a, b, 0, 0, 0x40, 0, 64, proto, 0, 0];
    ip.extend(src);
    ip.extend(dst);
    if let Ok(mut header) = crate::packet::ipv4::Ipv4Mut::new(&mut ip) {
        header.fill_checksum();
    }
    ip
}

/// Flow n: to 10.x.y.z, from one address, as a VM's flows are. The UDP checksum need not be used (RFC 768).
fn udp(n: u32, load: &FirewallLoad) -> Vec<u8> {
    let frame_bytes = load.frame_bytes;
    let mut f = ethernet(0, [8, 0]);
    let l4_len = (frame_bytes.max(46) - 34) as u16;
    let [_, x, y, z] = n.to_be_bytes();
    f.extend(ipv4([10, 255, 255, 254], [10, x, y, z], 17, l4_len));
    let [a, b] = l4_len.to_be_bytes();
    f.extend([0x13, 0x88, 0, 53, a, b, 0, 0]);
    f.resize(frame_bytes.max(46), 0x5a);
    if load.summed {
        let mut sum = Sum::new();
        // The addresses and the datagram, and what else the pseudo-header has.
        sum.add_bytes(f.get(26..).unwrap_or_default());
        sum.add_u16(17);
        sum.add_u16(l4_len);
        if let Some(field) = f.get_mut(40..42) {
            field.copy_from_slice(&sum.finish().to_be_bytes());
        }
    }
    f
}

fn port_firewall(id: VmId, load: &FirewallLoad) -> Option<PortFirewall> {
    let options = VmOptions {
        capacity: load.connections.max(1000),
        limits: LimitsConfig { max_connections: u32::MAX, ..LimitsConfig::default() },
        ..VmOptions::named("synthetic")
    };
    let vm = VmFirewall::new(id, &options, [7, 11]).ok()?;
    vm.map().populate_ahead();
    vm.map().set_tracking(load.tracked);
    let rule = |n: u32| {
        let [_, x, y, z] = n.to_be_bytes();
        Some(Rule {
            protocol: Protocol::TCP,
            ports: vec![PortRange::single(1000 + (n % 60_000) as u16)],
            remote_cidr: Some(format!("192.{x}.{y}.{z}/32").parse().ok()?),
            ..Rule::allow(Direction::Ingress)
        })
    };
    let mut rules = (0..load.rules).map(rule).collect::<Option<Vec<_>>>()?;
    for (protocol, port) in [(Protocol::UDP, 53), (Protocol::TCP, tcp::SERVER_PORT)] {
        rules.push(Rule {
            protocol,
            ports: vec![PortRange::single(port)],
            remote_cidr: Some("10.0.0.0/8".parse().ok()?),
            ..Rule::allow(Direction::Ingress)
        });
    }
    let mut document = PolicyDocument::default();
    document.security_groups.insert("group".into(), SecurityGroup { rules, ..SecurityGroup::default() });
    let mut policy = PortPolicy { security_groups: vec!["group".into()], ..PortPolicy::default() };
    policy.anti_spoofing.mac = Some(MacAddr::from_u64(if id == 0 { TARGET } else { SOURCE }));
    policy.anti_spoofing.addresses = vec!["10.0.0.0/8".parse().ok()?];
    let mut book = AddressBook::new();
    let compiled =
        compile(&Arc::new(document), &policy, "synthetic", &mut book, CompileOptions { generation: 0, seed: 3 })
            .ok()?;
    Some(PortFirewall {
        vm: Arc::new(vm),
        index: 0,
        rules: Arc::new(PortRules {
            generation: 1,
            stateless: compiled.any_stateless(),
            policy: Arc::new(compiled),
            sets: Arc::new(book.snapshot(5)),
            spoof: Arc::new(SpoofTable::new(&policy.anti_spoofing, 3)),
            track: TrackConfig::default(),
            reject: policy.reject,
        }),
        ledgers: Arc::new(core::array::from_fn(|_| FirewallLedger::default())),
        rejector: Arc::default(),
    })
}

/// Port 0 sends `frames`, `burst` at a time, port 1 takes them.
fn worker(
    frames: Vec<Vec<u8>>,
    burst: usize,
    stations: u64,
    firewalls: [Option<PortFirewall>; 2],
    clock: Clock,
) -> Option<Worker<SyntheticKinds>> {
    let rx = SyntheticRx::Round { frames, burst, next: 0 };
    switch([Some(rx), None], stations, firewalls, clock).map(|(worker, _)| worker)
}

/// A worker that polls `rx` of ports 0 and 1, and what the two send to.
fn switch(
    rx: [Option<SyntheticRx>; 2],
    stations: u64,
    firewalls: [Option<PortFirewall>; 2],
    clock: Clock,
) -> Option<(Worker<SyntheticKinds>, [SyntheticTx; 2])> {
    let txs = [(); 2].map(|()| SyntheticTx::new());
    Some((between(&Domain::new(), rx, &txs, stations, firewalls, clock)?, txs))
}

/// A worker that polls `rx` of ports 0 and 1 and switches between them, without firewalls. [`frame`]s go from port 0 to port 1.
pub fn l2_switch<K: Kinds>(domain: &Arc<Domain>, rx: [Option<K::Rx>; 2], tx: &[K::Tx; 2]) -> Option<Worker<K>> {
    between(domain, rx, tx, 1, [None, None], Clock::simulated().0)
}

/// The VMs of a [`firewall_switch`].
pub struct Vms([Arc<VmFirewall>; 2]);

impl Vms {
    /// Tracks changes to their connections, as during a migration, or no longer does. To be called between the worker's steps, by its thread.
    pub fn set_tracking(&self, on: bool) {
        self.0.iter().for_each(|vm| vm.map().set_tracking(on));
    }

    /// Connections that each of them has.
    pub fn connections(&self) -> [usize; 2] {
        [0, 1].map(|n| self.0.get(n).map_or(0, |vm| vm.map().len()))
    }
}

/// A worker that polls `rx` of ports 0 and 1 and switches between them, past a firewall at each. [`datagram`]s go from port 0 to port 1, in as
/// many connections as `load` says.
pub fn firewall_switch<K: Kinds>(
    domain: &Arc<Domain>,
    rx: [Option<K::Rx>; 2],
    tx: &[K::Tx; 2],
    load: &FirewallLoad,
) -> Option<(Worker<K>, Vms)> {
    let (sender, receiver) = (port_firewall(1, load)?, port_firewall(0, load)?);
    let vms = Vms([Arc::clone(&sender.vm), Arc::clone(&receiver.vm)]);
    Some((between(domain, rx, tx, 1, [Some(sender), Some(receiver)], Clock::simulated().0)?, vms))
}

/// A datagram, with checksum if `summed`, that [`firewall_switch`] sends from port 0 to port 1, over IPv4 without a tag. Any other source port,
/// and any other destination in 10.0.0.0/8, is of another connection.
pub fn datagram(bytes: usize, summed: bool) -> Vec<u8> {
    udp(0, &FirewallLoad { frame_bytes: bytes, summed, ..FirewallLoad::new(1, true) })
}

/// A frame of `bytes`, at least 14, that [`l2_switch`] sends from port 0 to port 1.
pub fn frame(bytes: usize) -> Vec<u8> {
    let mut f = ethernet(0, [0x88, 0xb5]);
    f.resize(bytes.max(14), 0x5a);
    f
}

fn between<K: Kinds>(
    domain: &Arc<Domain>,
    rx: [Option<K::Rx>; 2],
    txs: &[K::Tx; 2],
    stations: u64,
    firewalls: [Option<PortFirewall>; 2],
    clock: Clock,
) -> Option<Worker<K>> {
    let fdb = Arc::new(Fdb::new((stations * 4).try_into().ok()?, 300));
    for n in 0..stations {
        fdb.learn(0, MacAddr::from_u64(TARGET | n), 1, u32::MAX, 0);
        fdb.learn(0, MacAddr::from_u64(SOURCE | n), 0, u32::MAX, 0);
    }
    let guarded = firewalls.iter().any(Option::is_some);
    let vms = firewalls.iter().flatten().map(|f| Arc::clone(&f.vm)).collect();
    let bridge = Arc::new(BridgeEntry { id: 0, fdb, members: vec![0, 1], guarded });
    let port = |id: u16, firewall| {
        Some(Arc::new(PortEntry {
            id,
            bridge: Some(Arc::clone(&bridge)),
            vlan: Arc::new(VlanPolicy::new(&VlanMode::default()).ok()?),
            admin_up: true,
            fdb_limit: u32::MAX,
            max_frame_bytes: 0,
            firewall,
            divert: None,
            tx: txs.get(usize::from(id))?.clone(),
            tx_ledgers: Arc::new(core::array::from_fn(|_| TxLedger::default())),
        }))
    };
    let [first, second] = firewalls;
    let forwarding = Forwarding {
        id: PictureId::new(),
        ports: vec![Some(port(0, first)?), Some(port(1, second)?)],
        bridges: vec![Some(Arc::clone(&bridge))],
        vms,
    };
    let (outbox, inbox) = mailbox(NapSleeper::default().waker());
    for (port, rx) in (0..).zip(rx) {
        let Some(rx) = rx else { continue };
        outbox.send(Command::Add(Box::new(PolledQueue { rx, port, queue: 0, ledger: Arc::new(RxLedger::default()) })));
    }
    Some(Worker::new(Parts {
        guard: domain.register()?,
        forwarding: Arc::new(Published::new(Box::new(forwarding))),
        inbox,
        injected: Arc::new(RxLedger::default()),
        clock,
        idle: Arc::new(IdleTuning::new(0, 0)),
        counters: Arc::new(PmdCounters::default()),
        events: Arc::default(),
    }))
}
