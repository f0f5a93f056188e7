//! A PMD thread's loop: the life of a packet, top-down.
//!
//! Per iteration and receive queue: receive a burst; snapshot the headers; classify each frame (source checks, VLAN,
//! learning, look-up) into one batch per output; send the batches; give the source buffers back; count. Then
//! housekeeping, and with nothing to do: spin, then sleep.
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bridge::fdb::{MAX_PORTS, PortId};
use crate::bridge::vlan::Egress;
use crate::bridge::{Forwarding, PortEntry};
use crate::clock::{Clock, cycles};
use crate::counters::{DropReason, RxLedger};
use crate::frame::{BURST, Gso, RxBurst};
use crate::offload::{BadOffload, VlanAction, validate};
use crate::output::{Batch, Sender};
use crate::packet::MacAddr;
use crate::packet::{self, ParseError, Tci, Tpid, VlanId, VlanTag};
use crate::pmd::{Command, IdleTuning, Inbox, Kinds, MAX_SLEEP, PmdCounters, PolledQueue, Sleeper};
use crate::port::{Armed, RxQueue, TxPort};
use crate::qsbr::{Guard, Published};

/// Iterations between two looks at the clock while busy.
const CLOCK_INTERVAL: u32 = 32;
/// Time between two rounds of housekeeping.
const HOUSEKEEPING_NS: u64 = 100_000_000;
/// Most FDB buckets swept per bridge and round.
const SWEEP_BUCKETS: usize = 1024;

/// One PMD thread's state.
pub struct Worker<K: Kinds> {
    guard: Guard,
    forwarding: Arc<Published<Forwarding<K::Tx>>>,
    queues: Vec<PolledQueue<K::Rx>>,
    inbox: Inbox<K::Rx>,
    injected: Arc<RxLedger>,
    clock: Clock,
    idle: Arc<IdleTuning>,
    counters: Arc<PmdCounters>,
    burst: RxBurst,
    router: Router,
    sender: Sender,
    now_ns: u64,
    housekeeping_at_ns: u64,
}

/// Whether the loop goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Frames were handled.
    Busy,
    /// There was nothing to do.
    Idle,
    /// The thread was told to stop.
    Stop,
}

/// Verdicts of one burst, and the batches per output that it was sorted into.
struct Router {
    batches: Box<[Batch]>,
    /// Outputs with a batch that is not empty.
    active: Vec<PortId>,
}

impl<K: Kinds> Worker<K> {
    pub(crate) fn new(
        guard: Guard,
        forwarding: Arc<Published<Forwarding<K::Tx>>>,
        inbox: Inbox<K::Rx>,
        injected: Arc<RxLedger>,
        clock: Clock,
        idle: Arc<IdleTuning>,
        counters: Arc<PmdCounters>,
    ) -> Self {
        let now_ns = clock.now_ns();
        Self {
            guard,
            forwarding,
            queues: Vec::with_capacity(64),
            inbox,
            injected,
            clock,
            idle,
            counters,
            burst: RxBurst::new(),
            router: Router {
                batches: (0..MAX_PORTS).map(|_| Batch::default()).collect(),
                active: Vec::with_capacity(MAX_PORTS),
            },
            sender: Sender::default(),
            now_ns,
            housekeeping_at_ns: now_ns,
        }
    }

    /// Runs until told to stop.
    pub fn run(mut self, sleeper: &mut dyn Sleeper) {
        let mut last_work_ns = self.clock.now_ns();
        let mut rounds = 0u32;
        let mut fds = Vec::with_capacity(256);
        loop {
            let began = cycles();
            let step = self.step();
            let spent = cycles().wrapping_sub(began);
            match step {
                Step::Stop => return,
                Step::Busy => {
                    self.counters.busy_cycles.add(spent);
                    rounds = rounds.wrapping_add(1);
                    if rounds.is_multiple_of(CLOCK_INTERVAL) {
                        self.now_ns = self.clock.now_ns();
                    }
                    last_work_ns = self.now_ns;
                }
                Step::Idle => {
                    self.counters.idle_cycles.add(spent);
                    self.now_ns = self.clock.now_ns();
                    let latency_us = self.idle.latency_us();
                    let idle_ns = self.now_ns.saturating_sub(last_work_ns);
                    if latency_us == 0 || idle_ns < u64::from(self.idle.spin_us()) * 1000 {
                        core::hint::spin_loop();
                    } else {
                        self.sleep(sleeper, &mut fds, latency_us);
                    }
                }
            }
        }
    }

    /// One iteration over all queues.
    pub fn step(&mut self) -> Step {
        self.guard.quiescent();
        if self.inbox.pending() && !self.obey() {
            return Step::Stop;
        }
        self.counters.iterations.add(1);
        let mut frames = 0;
        for i in 0..self.queues.len() {
            frames += self.poll(i);
        }
        if self.now_ns >= self.housekeeping_at_ns {
            self.housekeeping();
        }
        if frames == 0 { Step::Idle } else { Step::Busy }
    }

    /// Handles one burst of queue `index`; returns how many frames it held.
    #[inline]
    fn poll(&mut self, index: usize) -> usize {
        let Some(queue) = self.queues.get_mut(index) else { return 0 };
        self.burst.clear();
        queue.rx.receive(&self.guard, &mut self.burst);
        let frames = self.burst.len();
        if frames == 0 && self.burst.rejected().is_none() {
            return 0;
        }
        let now_s = (self.now_ns / 1_000_000_000) as u32;
        let forwarding = self.forwarding.load(&self.guard);
        self.router.forward(&self.guard, &mut self.burst, forwarding, queue.port, now_s, &mut self.sender);
        queue.rx.release(&self.guard);
        self.sender.settle(&self.burst, &queue.ledger);
        self.counters.bursts.add(1);
        self.counters.frames.add(frames as u64);
        frames.max(1)
    }

    /// Carries out what the control side asked for. False: stop.
    #[cold]
    fn obey(&mut self) -> bool {
        // Collected first: the commands need `self`.
        let commands: Vec<_> = self.inbox.take().collect();
        for command in commands {
            match command {
                Command::Add(mut queue) => {
                    // The port may take a lock whose holder waits for a grace period: this thread must not hold it up.
                    self.guard.offline();
                    queue.rx.set_waker(self.inbox.waker());
                    self.guard.online();
                    self.queues.push(*queue);
                }
                Command::Remove { port, queue, reply } => {
                    let at = self.queues.iter().position(|q| q.port == port && q.queue == queue);
                    let found = at.map(|i| Box::new(self.queues.swap_remove(i)));
                    // The asker may have gone; then the queue is dropped, as it would have been there.
                    let _ = reply.send(found);
                }
                Command::Inject { ingress, frame } => self.inject(ingress, &frame),
                Command::Stop { reply } => {
                    let _ = reply.send(std::mem::take(&mut self.queues));
                    return false;
                }
            }
        }
        true
    }

    /// Sends a frame that the switch itself originates through the same path as received ones.
    fn inject(&mut self, ingress: PortId, frame: &[u8]) {
        self.burst.clear();
        let mark = self.burst.segment_mark();
        self.burst.push_private(frame);
        if !self.burst.finish_frame(mark, crate::frame::Offload::default()) {
            return;
        }
        let now_s = (self.now_ns / 1_000_000_000) as u32;
        let forwarding = self.forwarding.load(&self.guard);
        self.router.forward(&self.guard, &mut self.burst, forwarding, ingress, now_s, &mut self.sender);
        self.sender.settle(&self.burst, &self.injected);
        self.burst.clear();
    }

    #[cold]
    fn housekeeping(&mut self) {
        let late_ns = self.now_ns.saturating_sub(self.housekeeping_at_ns);
        self.housekeeping_at_ns = self.now_ns + HOUSEKEEPING_NS;
        let Some(forwarding) = self.forwarding.load(&self.guard) else { return };
        let now_s = (self.now_ns / 1_000_000_000) as u32;
        // A thread that slept catches up, within the bound.
        let buckets = (64 * (1 + late_ns / HOUSEKEEPING_NS) as usize).min(SWEEP_BUCKETS);
        for bridge in forwarding.bridges.iter().flatten() {
            bridge.fdb.sweep(buckets, now_s);
        }
    }

    /// Arms all queues and sleeps, unless work came in meanwhile.
    #[cold]
    fn sleep(&mut self, sleeper: &mut dyn Sleeper, fds: &mut Vec<RawFd>, latency_us: u32) {
        fds.clear();
        let mut timeout = MAX_SLEEP;
        let mut ready = false;
        for queue in &mut self.queues {
            match queue.rx.arm(&self.guard) {
                Armed::Ready => {
                    ready = true;
                    break;
                }
                Armed::Fd(fd) => fds.push(fd),
                Armed::Poll => timeout = timeout.min(Duration::from_micros(u64::from(latency_us))),
                Armed::Off => {}
            }
        }
        if !ready && !self.inbox.pending() {
            let began = self.clock.now_ns();
            self.guard.offline();
            sleeper.sleep(fds, timeout);
            self.guard.online();
            self.now_ns = self.clock.now_ns();
            self.counters.sleeps.add(1);
            self.counters.sleep_ns.add(self.now_ns.saturating_sub(began));
        }
        for queue in &mut self.queues {
            queue.rx.disarm(&self.guard);
        }
    }
}

/// Where the frames of one source go: the last decision, because consecutive frames mostly share it.
#[derive(Clone, Copy)]
struct Recent {
    src: MacAddr,
    dst: MacAddr,
    vlan: u16,
    output: PortId,
}

impl Router {
    /// Takes the burst from snapshot to output; what is left is to release and to settle.
    #[inline]
    fn forward<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &mut RxBurst,
        forwarding: Option<&Forwarding<T>>,
        ingress: PortId,
        now_s: u32,
        sender: &mut Sender,
    ) {
        sender.begin();
        let Some(forwarding) = forwarding else { return sender.fail_all(DropReason::RxDisabled) };
        burst.take_snapshots();
        self.route(burst, forwarding, ingress, now_s, sender);
        sender.send_all(guard, burst, forwarding, &mut self.batches, &mut self.active);
    }

    /// Decides for every frame of the burst, sorting it into the batches of its outputs or giving it a drop reason.
    fn route<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        forwarding: &Forwarding<T>,
        ingress: PortId,
        now_s: u32,
        sender: &mut Sender,
    ) {
        let Some(port) = forwarding.port(ingress) else {
            sender.fail_all(DropReason::RxDisabled);
            return;
        };
        let (true, Some(bridge)) = (port.admin_up, port.bridge.as_deref()) else {
            sender.fail_all(DropReason::RxDisabled);
            return;
        };
        let mut recent: Option<Recent> = None;
        for i in 0..burst.len().min(BURST) {
            let len = burst.meta(i).map_or(0, |m| m.len);
            let l2 = match packet::parse_l2(burst.snapshot(i), len) {
                Ok(l2) => l2,
                Err(ParseError::FrameTooShort) => {
                    sender.fail(i, DropReason::RxTooShort);
                    continue;
                }
                Err(_) => {
                    sender.fail(i, DropReason::RxBadHeader);
                    continue;
                }
            };
            let tag = l2.vlan;
            let Some(vlan) = port.vlan.ingress(tag.map(|t| t.tci.vid().get())) else {
                sender.fail(i, DropReason::VlanNotAllowed);
                continue;
            };
            if owes_work(burst, i) && !check_offload(burst, i) {
                sender.fail(i, DropReason::RxBadOffload);
                continue;
            }
            if let Some(r) = recent
                && r.src == l2.src_mac
                && r.dst == l2.dst_mac
                && r.vlan == vlan
            {
                self.output(forwarding, i, r.output, vlan, tag, sender);
                continue;
            }
            if !l2.src_mac.is_valid_source() {
                sender.fail(i, DropReason::BadSourceMac);
                continue;
            }
            bridge.fdb.learn(vlan, l2.src_mac, ingress, port.fdb_limit, now_s);
            if l2.dst_mac.is_multicast() {
                if l2.dst_mac.is_link_local() {
                    sender.fail(i, DropReason::LinkLocal);
                } else {
                    self.flood(forwarding, &bridge.members, i, ingress, vlan, tag, sender);
                }
                continue;
            }
            match bridge.fdb.lookup(vlan, l2.dst_mac, now_s) {
                Some(output) if output == ingress => sender.fail(i, DropReason::SamePort),
                Some(output) => {
                    recent = Some(Recent { src: l2.src_mac, dst: l2.dst_mac, vlan, output });
                    self.output(forwarding, i, output, vlan, tag, sender);
                }
                None => self.flood(forwarding, &bridge.members, i, ingress, vlan, tag, sender),
            }
        }
    }

    /// Puts frame `i` into the batch of one port.
    #[inline]
    fn output<T: TxPort>(
        &mut self,
        forwarding: &Forwarding<T>,
        i: usize,
        output: PortId,
        vlan: u16,
        tag: Option<VlanTag>,
        sender: &mut Sender,
    ) {
        let sent = forwarding.port(output).is_some_and(|port| self.enqueue(port, i, vlan, tag));
        if !sent {
            sender.fail(i, DropReason::NoDestination);
        }
    }

    /// Puts frame `i` into the batch of every other port of its VLAN.
    #[expect(clippy::too_many_arguments, reason = "facts of one frame, all in registers")]
    fn flood<T: TxPort>(
        &mut self,
        forwarding: &Forwarding<T>,
        members: &[PortId],
        i: usize,
        ingress: PortId,
        vlan: u16,
        tag: Option<VlanTag>,
        sender: &mut Sender,
    ) {
        let mut any = false;
        for &member in members {
            if member != ingress
                && let Some(port) = forwarding.port(member)
            {
                any |= self.enqueue(port, i, vlan, tag);
            }
        }
        if !any {
            sender.fail(i, DropReason::NoDestination);
        }
    }

    /// False when the port does not carry the VLAN.
    #[inline]
    fn enqueue<T>(&mut self, port: &PortEntry<T>, i: usize, vlan: u16, tag: Option<VlanTag>) -> bool {
        let Some(egress) = port.vlan.egress(vlan) else { return false };
        let action = match (egress, tag) {
            (Egress::Untagged, None) => VlanAction::Keep,
            (Egress::Untagged, Some(_)) => VlanAction::Pop,
            (Egress::Tagged, None) => {
                let vid = VlanId::new(vlan).unwrap_or_default();
                VlanAction::Push(VlanTag { tpid: Tpid::Customer, tci: Tci::new(0, false, vid) })
            }
            (Egress::Tagged, Some(tag)) if tag.tci.vid().get() == vlan => VlanAction::Keep,
            // A priority tag keeps its priority under the VLAN it now belongs to.
            (Egress::Tagged, Some(tag)) => VlanAction::Replace(tag.tci.with_vid(VlanId::new(vlan).unwrap_or_default())),
        };
        if let Some(batch) = self.batches.get_mut(usize::from(port.id)) {
            if batch.is_empty() {
                self.active.push(port.id);
            }
            batch.push(i, action);
        }
        true
    }
}

#[inline]
fn owes_work(burst: &RxBurst, i: usize) -> bool {
    burst.meta(i).is_some_and(|m| m.offload.needs_csum || m.offload.gso != Gso::None)
}

/// Checks what the sender claims about checksum and segmentation against the real headers, once, on the snapshot.
#[inline]
fn check_offload(burst: &mut RxBurst, i: usize) -> bool {
    let Some(&meta) = burst.meta(i) else { return false };
    let mut checked = validate(&meta.offload, burst.snapshot(i), meta.len);
    if matches!(checked, Err(BadOffload::NeedMore { .. })) {
        burst.extend_snapshot(i);
        checked = validate(&meta.offload, burst.snapshot(i), meta.len);
    }
    match (checked, burst.meta_mut(i)) {
        (Ok(offload), Some(m)) => {
            m.offload = offload;
            true
        }
        _ => false,
    }
}
