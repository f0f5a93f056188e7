//! A PMD thread's loop: the life of a packet, top-down.
//!
//! Per iteration and receive queue: receive a burst; snapshot the headers; classify each frame (source checks, VLAN); judge
//! what comes from a VM; learn and look up the output; judge what goes to a VM; sort into one batch per output; send the
//! batches; give the source buffers back; count. Then what the firewall left to be sent (released fragments, answers). Then
//! housekeeping, and with nothing to do: spin, then sleep.
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bridge::Forwarding;
use crate::bridge::fdb::PortId;
use crate::clock::{Clock, cycles};
use crate::counters::{DropReason, RxLedger};
use crate::enforce::events::EventRing;
use crate::enforce::pending::{Next, PendingFrame};
use crate::enforce::stage::Stage;
use crate::frame::{BURST, RxBurst};
use crate::output::Sender;
use crate::packet;
use crate::pmd::{Command, IdleTuning, Inbox, Kinds, MAX_SLEEP, PmdCounters, PolledQueue, Sleeper};
use crate::port::{Armed, RxQueue};
use crate::qsbr::{Guard, Published};
use crate::router::Router;

/// Iterations between two looks at the clock while busy.
const CLOCK_INTERVAL: u32 = 32;
/// The same while there is nothing to do: a look takes longer than an iteration, and a frame that comes meanwhile would wait for it.
const IDLE_CLOCK_INTERVAL: u32 = 16;
/// Bursts of at least so many frames are timed stage by stage.
const TIMED_FRAMES: usize = 8;
/// Of smaller ones, one in so many.
const TIMED_SMALL: u64 = 32;
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
    /// The time-stamp counter when the thread turned to the next queue, if it was read then.
    mark: Option<u64>,
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
        let router = Router::new(stage);
        router.provide();
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
            router,
            sender: Sender::default(),
            now_ns,
            housekeeping_at_ns: now_ns,
            expiry_at_ns: now_ns,
            expiry_vm: 0,
            mark: None,
        }
    }

    /// Runs until told to stop.
    pub fn run(mut self, sleeper: &mut dyn Sleeper) {
        let mut last_work_ns = self.clock.now_ns();
        let (mut rounds, mut idle_rounds) = (0u32, 0u32);
        let mut fds = Vec::with_capacity(256);
        loop {
            let began = cycles();
            self.mark = Some(began);
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
                    idle_rounds = idle_rounds.wrapping_add(1);
                    if !idle_rounds.is_multiple_of(IDLE_CLOCK_INTERVAL) {
                        continue;
                    }
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
        if self.now_ns >= self.expiry_at_ns.min(self.housekeeping_at_ns) {
            self.tend();
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
        let timed = frames >= TIMED_FRAMES || self.counters.bursts.get().is_multiple_of(TIMED_SMALL);
        let began = self.mark.take().filter(|_| timed);
        let received = began.map(|_| cycles());
        let forwarding = self.forwarding.load(&self.guard);
        let source = self.router.decide(
            &mut self.burst,
            forwarding,
            queue.port,
            self.guard.index(),
            self.now_ns,
            &mut self.sender,
        );
        let routed = began.map(|_| cycles());
        if let Some(forwarding) = source {
            self.router.send(&self.guard, &self.burst, forwarding, &mut self.sender);
        }
        let sent = began.map(|_| cycles());
        queue.rx.release(&self.guard);
        self.sender.settle(&self.burst, &queue.ledger);
        if let (Some(began), Some(received), Some(routed), Some(sent)) = (began, received, routed, sent) {
            let stages = &self.counters.stages;
            stages.frames.add(frames as u64);
            stages.receive.add(received.wrapping_sub(began));
            stages.route.add(routed.wrapping_sub(received));
            stages.send.add(sent.wrapping_sub(routed));
            let released = cycles();
            stages.release.add(released.wrapping_sub(sent));
            self.mark = Some(released);
        }
        self.counters.bursts.add(1);
        self.counters.frames.add(frames as u64);
        self.count_flow_cache();
        if !self.router.stage.pending.is_empty() {
            self.send_pending();
        }
        frames.max(1)
    }

    /// Counts what became of the last burst's looks into the flow cache.
    #[inline(always)]
    fn count_flow_cache(&mut self) {
        let (hits, misses) = (&mut self.router.flow_cache_hits, &mut self.router.flow_cache_misses);
        if *hits | *misses != 0 {
            self.counters.flow_cache_hits.add(u64::from(core::mem::take(hits)));
            self.counters.flow_cache_misses.add(u64::from(core::mem::take(misses)));
        }
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

    /// What is to be done now and then.
    #[cold]
    fn tend(&mut self) {
        let began = cycles();
        if self.now_ns >= self.expiry_at_ns {
            self.expire();
        }
        if self.now_ns >= self.housekeeping_at_ns {
            self.housekeeping();
        }
        self.counters.stages.housekeeping.add(cycles().wrapping_sub(began));
    }

    /// Deletes a few connections that have expired, and fragments. Threads and VMs take turns.
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
