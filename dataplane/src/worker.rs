//! A PMD thread's loop: the life of a packet, top-down.
//!
//! Per iteration and receive queue: receive a burst; snapshot the headers; classify each frame (source checks, VLAN); judge
//! what comes from a VM; learn and look up the output; judge what goes to a VM; sort into one batch per output; send the
//! batches; give the source buffers back; count. Then what the firewall left to be sent (released fragments, answers). Then
//! housekeeping, and with nothing to do: spin, then sleep.
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bridge::fdb::{MAX_PORTS, PortId};
use crate::bridge::vlan::Egress;
use crate::bridge::{BridgeEntry, Forwarding, PortEntry};
use crate::clock::{Clock, cycles};
use crate::conntrack::Toward;
use crate::counters::{DropReason, RxLedger};
use crate::enforce::events::EventRing;
use crate::enforce::pending::{Next, PendingFrame};
use crate::enforce::stage::{End, Outcome, Stage};
use crate::enforce::{PortFirewall, hint};
use crate::frame::{BURST, Gso, RxBurst};
use crate::offload::{BadOffload, VlanAction, validate};
use crate::output::{Batch, Sender};
use crate::packet::MacAddr;
use crate::packet::{self, EtherType, ParseError, Tci, Tpid, VlanId, VlanTag};
use crate::pmd::{Command, IdleTuning, Inbox, Kinds, MAX_SLEEP, PmdCounters, PolledQueue, Sleeper};
use crate::port::{Armed, RxQueue, TxPort};
use crate::qsbr::{Guard, Published};

/// Iterations between two looks at the clock while busy.
const CLOCK_INTERVAL: u32 = 32;
/// Time between two rounds of housekeeping.
const HOUSEKEEPING_NS: u64 = 100_000_000;
/// Most FDB buckets swept per bridge and round.
const SWEEP_BUCKETS: usize = 1024;
/// Time between two steps of deleting expired connections.
const EXPIRY_NS: u64 = 1_000_000;
/// Connections looked at in one such step: about 10 us.
const EXPIRY_ENTRIES: usize = 1024;
/// Least that one VM gets of it.
const EXPIRY_LEAST: usize = 64;
/// Rounds of pending frames after a burst: fragments released by the sender's firewall are held, and released, by the receiver's.
const PENDING_ROUNDS: usize = 4;

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
    /// For frames that are not in a port's memory.
    private: RxBurst,
    private_bytes: Vec<u8>,
    private_frames: Vec<PendingFrame>,
    router: Router,
    sender: Sender,
    now_ns: u64,
    housekeeping_at_ns: u64,
    expiry_at_ns: u64,
    expiry_vm: usize,
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
    stage: Stage,
    /// What is known of each frame of the burst.
    places: Box<[Place; BURST]>,
}

/// What a worker is given by the switch.
pub(crate) struct Parts<K: Kinds> {
    pub guard: Guard,
    pub forwarding: Arc<Published<Forwarding<K::Tx>>>,
    pub inbox: Inbox<K::Rx>,
    /// Counts frames that came in through no port.
    pub injected: Arc<RxLedger>,
    pub clock: Clock,
    pub idle: Arc<IdleTuning>,
    pub counters: Arc<PmdCounters>,
    pub events: Arc<EventRing>,
}

impl<K: Kinds> Worker<K> {
    pub(crate) fn new(parts: Parts<K>) -> Self {
        let Parts { guard, forwarding, inbox, injected, clock, idle, counters, events } = parts;
        let stage = Stage::new(guard.index(), events);
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
            private: RxBurst::new(),
            private_bytes: Vec::with_capacity(256 << 10),
            private_frames: Vec::with_capacity(256),
            router: Router {
                batches: (0..MAX_PORTS).map(|_| Batch::default()).collect(),
                active: Vec::with_capacity(MAX_PORTS),
                stage,
                places: Box::new([Place::default(); BURST]),
            },
            sender: Sender::default(),
            now_ns,
            housekeeping_at_ns: now_ns,
            expiry_at_ns: now_ns,
            expiry_vm: 0,
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

    /// Looks at the clock, as [`Self::run`] does now and then.
    pub fn refresh_clock(&mut self) {
        self.now_ns = self.clock.now_ns();
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
        if self.now_ns >= self.expiry_at_ns {
            self.expire();
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
        let forwarding = self.forwarding.load(&self.guard);
        self.router.forward(&self.guard, &mut self.burst, forwarding, queue.port, self.now_ns, &mut self.sender);
        queue.rx.release(&self.guard);
        self.sender.settle(&self.burst, &queue.ledger);
        self.counters.bursts.add(1);
        self.counters.frames.add(frames as u64);
        if !self.router.stage.pending.is_empty() {
            self.send_pending();
        }
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
                Command::Inject { ingress, frame } => self.start(&frame, Next::Forward { ingress }),
                Command::Deliver { output, frame } => self.deliver(output, &frame),
                Command::Stop { reply } => {
                    let _ = reply.send(std::mem::take(&mut self.queues));
                    return false;
                }
            }
        }
        true
    }

    /// Sends a frame that came in through no port: one that the switch itself originates (through the same path as received ones, but
    /// for the firewall of its port), or one that was kept for a port.
    fn start(&mut self, frame: &[u8], next: Next) {
        self.router.stage.pending.push(frame, next);
        self.send_pending();
    }

    /// Sends a frame to one port, whose firewall judges it.
    fn deliver(&mut self, output: PortId, frame: &[u8]) {
        let forwarding = self.forwarding.load(&self.guard);
        let tag = packet::parse_l2(frame, frame.len() as u32).map(|l2| l2.vlan.map(|t| t.tci.vid().get()));
        let port = forwarding.and_then(|f| f.port(output));
        // The frame is as the guest is to see it, and what the guest may send it may be sent.
        let vlan = match (port, tag) {
            (Some(port), Ok(tag)) => port.vlan.ingress(tag),
            _ => None,
        };
        match vlan {
            Some(vlan) => self.start(frame, Next::ToPort { output, vlan, judge: true }),
            None => {
                self.injected.frames.add(1);
                self.injected.drop_frames(DropReason::NoDestination, 1);
            }
        }
    }

    /// Sends the frames that the firewall left to be sent, and those that they lead to.
    #[cold]
    fn send_pending(&mut self) {
        for _ in 0..PENDING_ROUNDS {
            let pending = &mut self.router.stage.pending;
            if pending.is_empty() {
                return;
            }
            let lost = pending.lost;
            core::mem::swap(&mut self.private_bytes, &mut pending.bytes);
            core::mem::swap(&mut self.private_frames, &mut pending.frames);
            pending.clear();
            if lost > 0 {
                self.injected.frames.add(lost);
                self.injected.drop_frames(DropReason::FragmentMemory, lost);
            }
            self.private.load_private(&mut self.private_bytes);
            for frames in self.private_frames.chunks(BURST) {
                self.private.clear();
                for frame in frames {
                    let mark = self.private.segment_mark();
                    self.private.push_private(frame.bytes.clone());
                    self.private.finish_frame(mark, crate::frame::Offload::default());
                }
                let forwarding = self.forwarding.load(&self.guard);
                self.router.resume(&self.guard, &mut self.private, frames, forwarding, self.now_ns, &mut self.sender);
                self.sender.settle(&self.private, &self.injected);
            }
        }
    }

    /// Deletes a few connections that have expired, and fragments. Threads and VMs take turns.
    #[cold]
    fn expire(&mut self) {
        self.expiry_at_ns = self.now_ns + EXPIRY_NS;
        let Some(forwarding) = self.forwarding.load(&self.guard) else { return };
        let vms = &forwarding.vms;
        let share = (EXPIRY_ENTRIES / vms.len().max(1)).max(EXPIRY_LEAST);
        for _ in 0..vms.len().min(EXPIRY_ENTRIES / share) {
            self.expiry_vm = if self.expiry_vm + 1 < vms.len() { self.expiry_vm + 1 } else { 0 };
            if let Some(vm) = vms.get(self.expiry_vm) {
                vm.sweep(self.now_ns / 1_000_000, share);
            }
        }
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

/// Where a frame is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Target {
    /// Nowhere (any more).
    #[default]
    None,
    /// To one port.
    Port(PortId),
    /// To all other ports of its VLAN.
    Flood,
}

/// What is known of a frame on its way through the stages.
#[derive(Clone, Copy, Default)]
struct Place {
    src: MacAddr,
    dst: MacAddr,
    /// VLAN of the bridge.
    vlan: u16,
    tag: Option<VlanTag>,
    /// Where the network header begins, bytes.
    l3: u16,
    ethertype: EtherType,
    /// The frame's firewall at the source has verified its checksum.
    vouched: bool,
    target: Target,
    /// Hash of the key it probably has in the table it meets next.
    hash: u64,
}

/// The facts that all frames of a burst share.
struct Source<'a, T> {
    forwarding: &'a Forwarding<T>,
    port: &'a PortEntry<T>,
    bridge: &'a BridgeEntry,
    now_ns: u64,
}

impl<T> Source<'_, T> {
    #[inline]
    fn now_s(&self) -> u32 {
        (self.now_ns / 1_000_000_000) as u32
    }
}

fn source<T>(forwarding: Option<&Forwarding<T>>, ingress: PortId, now_ns: u64) -> Option<Source<'_, T>> {
    let forwarding = forwarding?;
    let port = forwarding.port(ingress).filter(|port| port.admin_up)?;
    Some(Source { forwarding, port, bridge: port.bridge.as_deref()?, now_ns })
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
        now_ns: u64,
        sender: &mut Sender,
    ) {
        sender.begin();
        let Some(source) = source(forwarding, ingress, now_ns) else {
            return sender.fail_all(DropReason::RxDisabled);
        };
        burst.take_snapshots();
        if source.bridge.guarded {
            self.route_guarded(burst, &source, sender);
        } else {
            self.route(burst, &source, sender);
        }
        sender.send_all(guard, burst, source.forwarding, &mut self.batches, &mut self.active);
    }

    /// Decides for every frame of the burst where no firewall is involved: each goes straight through.
    fn route<T: TxPort>(&mut self, burst: &mut RxBurst, source: &Source<'_, T>, sender: &mut Sender) {
        let mut recent = None;
        for i in 0..burst.len().min(BURST) {
            if let Some(place) = classify(burst, i, source.port, sender) {
                match self.look_up(source, &place, i, &mut recent, sender) {
                    Target::None => {}
                    Target::Port(output) => self.output(source.forwarding, i, output, place.vlan, place.tag, sender),
                    Target::Flood => self.flood(burst, source, i, &place, sender),
                }
            }
        }
    }

    /// The same where ports of the bridge have firewalls: stage by stage over the whole burst, so that each stage's table lines are
    /// fetched while the others are judged.
    fn route_guarded<T: TxPort>(&mut self, burst: &mut RxBurst, source: &Source<'_, T>, sender: &mut Sender) {
        let frames = burst.len().min(BURST);
        let mut alive = 0u64;
        for i in 0..frames {
            let Some(mut place) = classify(burst, i, source.port, sender) else { continue };
            alive |= 1 << i;
            if let Some(firewall) = &source.port.firewall {
                place.hash = fetch_bucket(burst, i, &place, firewall, Toward::Egress);
            }
            self.set_place(i, place);
        }
        if let Some(firewall) = &source.port.firewall {
            for i in bits(alive) {
                firewall.vm.map().prefetch_entries(self.place(i).hash);
            }
            for i in bits(alive) {
                let mut place = self.place(i);
                let end = End {
                    firewall,
                    port: source.port.id,
                    ingress: source.port.id,
                    // An answer to what the VM's own rules reject concerns no connection of the VM.
                    ingress_guarded: false,
                    toward: Toward::Egress,
                    vlan: place.vlan,
                    now_ns: source.now_ns,
                };
                if judge(&mut self.stage, burst, i, &end, false, sender) {
                    // What was not verified there is not vouched for here.
                    place.vouched = firewall.rules.track.checksum;
                    self.set_place(i, place);
                } else {
                    alive &= !(1 << i);
                }
            }
        }
        self.route_judged(burst, source, alive, sender);
    }

    /// The second half of [`Self::route_guarded`]: frames that the source's firewall, if any, has let pass.
    fn route_judged<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        alive: u64,
        sender: &mut Sender,
    ) {
        let mut recent = None;
        let mut guarded = 0u64;
        for i in bits(alive) {
            let mut place = self.place(i);
            place.target = self.look_up(source, &place, i, &mut recent, sender);
            if let Target::Port(output) = place.target
                && let Some(firewall) = source.forwarding.port(output).and_then(|port| port.firewall.as_ref())
            {
                place.hash = fetch_bucket(burst, i, &place, firewall, Toward::Ingress);
                guarded |= 1 << i;
            }
            self.set_place(i, place);
        }
        for i in bits(guarded) {
            let place = self.place(i);
            if let Target::Port(output) = place.target
                && let Some(firewall) = source.forwarding.port(output).and_then(|port| port.firewall.as_ref())
            {
                firewall.vm.map().prefetch_entries(place.hash);
            }
        }
        for i in bits(alive) {
            let place = self.place(i);
            match place.target {
                Target::None => {}
                Target::Flood => self.flood(burst, source, i, &place, sender),
                Target::Port(output) => {
                    let port = source.forwarding.port(output);
                    if port.is_none_or(|port| self.admit(burst, source, i, &place, port, sender)) {
                        self.output(source.forwarding, i, output, place.vlan, place.tag, sender);
                    }
                }
            }
        }
    }

    /// The firewall of an output port, if it has one, lets frame `i` in.
    #[inline]
    fn admit<T>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        port: &PortEntry<T>,
        sender: &mut Sender,
    ) -> bool {
        // Who takes a diverted frame in judges it.
        let Some(firewall) = port.firewall.as_ref().filter(|_| port.divert.is_none()) else { return true };
        let end = End {
            firewall,
            port: port.id,
            ingress: source.port.id,
            ingress_guarded: source.port.firewall.is_some(),
            toward: Toward::Ingress,
            vlan: place.vlan,
            now_ns: source.now_ns,
        };
        judge(&mut self.stage, burst, i, &end, place.vouched, sender)
    }

    /// Goes on with frames that are not in a port's memory, each where [`PendingFrame::next`] says.
    #[cold]
    fn resume<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &mut RxBurst,
        frames: &[PendingFrame],
        forwarding: Option<&Forwarding<T>>,
        now_ns: u64,
        sender: &mut Sender,
    ) {
        sender.begin();
        sender.fail_all(DropReason::RxDisabled);
        burst.take_snapshots();
        for (i, frame) in frames.iter().enumerate().take(burst.len().min(BURST)) {
            match frame.next {
                Next::Forward { ingress } => {
                    if let Some(source) = source(forwarding, ingress, now_ns)
                        && let Some(place) = classify(burst, i, source.port, sender)
                    {
                        self.set_place(i, place);
                        self.route_judged(burst, &source, 1 << i, sender);
                    }
                }
                Next::ToPort { output, vlan, judge } => {
                    // The port itself stands for the source: an answer has none.
                    if let Some(source) = source(forwarding, output, now_ns) {
                        let tag = packet::parse_l2(burst.snapshot(i), burst.snapshot(i).len() as u32).ok();
                        let place = Place { vlan, tag: tag.and_then(|l2| l2.vlan), ..Place::default() };
                        if !judge || self.admit(burst, &source, i, &place, source.port, sender) {
                            self.output(source.forwarding, i, output, vlan, place.tag, sender);
                        }
                    }
                }
            }
        }
        if let Some(forwarding) = forwarding {
            sender.send_all(guard, burst, forwarding, &mut self.batches, &mut self.active);
        }
    }

    #[inline]
    fn place(&self, i: usize) -> Place {
        self.places.get(i).copied().unwrap_or_default()
    }

    #[inline]
    fn set_place(&mut self, i: usize, place: Place) {
        if let Some(slot) = self.places.get_mut(i) {
            *slot = place;
        }
    }

    /// Learns where frame `i` came from and finds where it goes.
    #[inline]
    fn look_up<T>(
        &self,
        source: &Source<'_, T>,
        place: &Place,
        i: usize,
        recent: &mut Option<Recent>,
        sender: &mut Sender,
    ) -> Target {
        let &Place { src, dst, vlan, .. } = place;
        if let Some(r) = *recent
            && r.src == src
            && r.dst == dst
            && r.vlan == vlan
        {
            return Target::Port(r.output);
        }
        if !src.is_valid_source() {
            sender.fail(i, DropReason::BadSourceMac);
            return Target::None;
        }
        let (fdb, ingress) = (&source.bridge.fdb, source.port.id);
        fdb.learn(vlan, src, ingress, source.port.fdb_limit, source.now_s());
        if dst.is_multicast() {
            if dst.is_link_local() {
                sender.fail(i, DropReason::LinkLocal);
                return Target::None;
            }
            return Target::Flood;
        }
        match fdb.lookup(vlan, dst, source.now_s()) {
            Some(output) if output == ingress => {
                sender.fail(i, DropReason::SamePort);
                Target::None
            }
            Some(output) => {
                *recent = Some(Recent { src, dst, vlan, output });
                Target::Port(output)
            }
            None => Target::Flood,
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

    /// Puts frame `i` into the batch of every other port of its VLAN that lets it in.
    fn flood<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        sender: &mut Sender,
    ) {
        let mut any = false;
        let mut refused = false;
        for &member in &source.bridge.members {
            let Some(port) = source.forwarding.port(member).filter(|_| member != source.port.id) else { continue };
            if let Some(firewall) = &port.firewall {
                // A frame for someone else is no business of this VM's, and no denial.
                let foreign = !place.dst.is_multicast()
                    && firewall.rules.spoof.is_enabled()
                    && !firewall.rules.spoof.has_mac(place.dst);
                if foreign || port.vlan.egress(place.vlan).is_none() {
                    continue;
                }
                if !self.admit(burst, source, i, place, port, sender) {
                    refused = true;
                    continue;
                }
            }
            any |= self.enqueue(port, i, place.vlan, place.tag);
        }
        if !any && !refused {
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

/// Reads frame `i`'s link header; checks VLAN and offload. `None`: dropped.
#[inline]
fn classify<T>(burst: &mut RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let len = burst.meta(i).map_or(0, |m| m.len);
    let l2 = match packet::parse_l2(burst.snapshot(i), len) {
        Ok(l2) => l2,
        Err(ParseError::FrameTooShort) => {
            sender.fail(i, DropReason::RxTooShort);
            return None;
        }
        Err(_) => {
            sender.fail(i, DropReason::RxBadHeader);
            return None;
        }
    };
    let Some(vlan) = port.vlan.ingress(l2.vlan.map(|t| t.tci.vid().get())) else {
        sender.fail(i, DropReason::VlanNotAllowed);
        return None;
    };
    if owes_work(burst, i) && !check_offload(burst, i) {
        sender.fail(i, DropReason::RxBadOffload);
        return None;
    }
    Some(Place {
        src: l2.src_mac,
        dst: l2.dst_mac,
        vlan,
        tag: l2.vlan,
        l3: l2.len,
        ethertype: l2.ethertype,
        vouched: false,
        target: Target::None,
        hash: 0,
    })
}

/// One end judges frame `i`. True: it goes on.
#[inline]
fn judge(stage: &mut Stage, burst: &mut RxBurst, i: usize, end: &End<'_>, vouched: bool, sender: &mut Sender) -> bool {
    match stage.judge(burst, i, end, vouched) {
        Outcome::Pass => true,
        Outcome::Drop(reason) => {
            sender.fail(i, reason);
            false
        }
        Outcome::Held => {
            sender.hold(i);
            false
        }
    }
}

/// Starts fetching the table line of the connection that frame `i` probably belongs to; returns its hash.
#[inline]
fn fetch_bucket(burst: &RxBurst, i: usize, place: &Place, firewall: &PortFirewall, toward: Toward) -> u64 {
    let key = hint::key(burst.snapshot(i), place.ethertype, usize::from(place.l3), toward, firewall.zone(place.vlan));
    let Some(key) = key else { return 0 };
    let hash = firewall.vm.map().hash(&key);
    firewall.vm.map().prefetch_bucket(hash);
    hash
}

/// The numbers of the bits that are set.
#[inline]
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let i = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(i)
    })
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
