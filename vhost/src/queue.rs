//! A port's vrings as PMD threads see them: receive queues, the transmit side, and starting and stopping under traffic.
//!
//! The session thread [`start`](PortQueues::start)s and [`stop`](PortQueues::stop)s rings; PMD threads find a running
//! ring through [`Published`] and use it until their next quiescent state. `stop` returns after a grace period, so
//! nothing of the ring, nor of the guest memory behind it, is in use any more when the session takes it away.
//!
//! vring 2i is the receive queue of the guest's queue pair i (this port transmits into it), vring 2i+1 its transmit queue
//! (this port receives from it); virtio 1.3, 5.1.2.
#![allow(unsafe_code)] // Its job: exclusive access to a ring by ownership (receive) or by a claim (transmit).
use std::cell::UnsafeCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, Frames, RxBurst, TxFrame};
use ferry_dataplane::packet;
use ferry_dataplane::port::{Armed, RxQueue, TxCapabilities, TxPort, TxReport, Wake};
use ferry_dataplane::qsbr::{Domain, Guard, Published};

use crate::eventfd;
use crate::net_header;
use crate::ring::{FaultKind, Ring, RingError, RingFault, VringCounters};

/// Most queue pairs of a port.
pub const MAX_PAIRS: usize = 32;

/// Tries to claim a busy transmit ring: so many in a tight loop, then so many giving the processor away.
const CLAIM_SPINS: u32 = 256;
const CLAIM_YIELDS: u32 = 64;

/// A running ring.
struct Running {
    /// Receive rings: used by the one [`VhostRx`] of the pair. Transmit rings: by the thread that holds `claim`.
    ring: UnsafeCell<Ring>,
    claim: AtomicBool,
    /// Set under the claim when the guest wants a notification; taken by the next flush of any lane.
    notify_due: AtomicBool,
    features: u64,
    call: Option<RawFd>,
}

// SAFETY: the fields but `ring` are atomics or never change; `ring` is accessed by one thread at a time as described there.
unsafe impl Sync for Running {}
// SAFETY: Ring is Send.
unsafe impl Send for Running {}

/// One vring's place, which outlives the rings that run in it.
#[derive(Default)]
#[repr(align(64))]
struct Slot {
    ring: Cell,
    enabled: AtomicBool,
    /// Counts finished stops: tells a holder of a ring pointer that its grace period is over.
    generation: AtomicU64,
    /// A fault not yet fetched: `(kind + 1) << 32 | detail`; 0: none.
    fault: AtomicU64,
    /// A [`VhostRx`] for this vring exists.
    taken: AtomicBool,
    counters: VringCounters,
}

struct Cell(Published<Running>);

impl Default for Cell {
    fn default() -> Self {
        Self(Published::empty())
    }
}

/// What only control threads touch.
struct Control {
    wakers: Box<[Option<Arc<dyn Wake>>]>,
}

/// All vrings of a port. Shared by the session thread and the PMD threads; lives as long as the port, across
/// reconnects of the guest.
pub struct PortQueues {
    slots: Box<[Slot]>,
    domain: Arc<Domain>,
    /// Bit i: the transmit ring of pair i is running and enabled.
    tx_ready: AtomicU32,
    /// Bit i: the transmit ring of pair i is running.
    tx_running: AtomicU32,
    fault_event: OwnedFd,
    control: Mutex<Control>,
}

impl PortQueues {
    /// Queues for `pairs` queue pairs (clamped to 1..=[`MAX_PAIRS`]), none of them running or enabled. Fails when no
    /// eventfd is to be had.
    pub fn new(pairs: usize, domain: Arc<Domain>) -> io::Result<Arc<Self>> {
        let pairs = pairs.clamp(1, MAX_PAIRS);
        Ok(Arc::new(Self {
            slots: (0..2 * pairs).map(|_| Slot::default()).collect(),
            domain,
            tx_ready: AtomicU32::new(0),
            tx_running: AtomicU32::new(0),
            fault_event: eventfd::new()?,
            control: Mutex::new(Control { wakers: vec![None; pairs].into_boxed_slice() }),
        }))
    }

    /// Number of queue pairs.
    pub fn pairs(&self) -> usize {
        self.slots.len() / 2
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        // The guarded data is consistent at every point where a panic could leave the lock.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, vring: usize) -> Result<&Slot, RingError> {
        self.slots.get(vring).ok_or(RingError::NoSuchRing { vring, vrings: self.slots.len() })
    }

    /// Recomputes which transmit rings may be chosen. Called with the control lock held.
    fn update_tx_ready(&self) {
        let (mut running, mut ready) = (0u32, 0u32);
        for (pair, slot) in self.slots.iter().step_by(2).enumerate() {
            if slot.ring.0.is_some() {
                running |= 1 << pair;
                ready |= u32::from(slot.enabled.load(Ordering::Relaxed)) << pair;
            }
        }
        self.tx_running.store(running, Ordering::Release);
        self.tx_ready.store(ready, Ordering::Release);
    }

    fn wake_receiver(&self, control: &Control, vring: usize) {
        if vring % 2 == 1
            && let Some(Some(waker)) = control.wakers.get(vring / 2)
        {
            waker.wake();
        }
    }

    /// Starts polling `ring` as `vring`. The guest is asked not to kick from here on, and notified once: a notification
    /// that got lost before (the previous device crashed, the call eventfd changed) would otherwise be waited for for ever.
    pub fn start(&self, vring: usize, mut ring: Ring) -> Result<(), RingError> {
        let slot = self.slot(vring)?;
        let control = self.control();
        if slot.ring.0.is_some() {
            return Err(RingError::AlreadyRunning { vring });
        }
        ring.disarm();
        slot.fault.store(0, Ordering::Relaxed);
        let running = Running {
            features: ring.config().features,
            call: ring.call_fd(),
            ring: UnsafeCell::new(ring),
            claim: AtomicBool::new(false),
            notify_due: AtomicBool::new(false),
        };
        let call = running.call;
        slot.ring.0.replace(Some(Box::new(running)), &self.domain);
        if let Some(fd) = call {
            // The number stays open: only `stop` closes it, which waits for the control lock.
            eventfd::signal(fd);
        }
        self.update_tx_ready();
        self.wake_receiver(&control, vring);
        Ok(())
    }

    /// Stops `vring` and hands the ring back: no PMD thread uses it any more. Everything received was released (or will
    /// be received again by whoever goes on from [`Ring::base`]), everything sent is visible and notified.
    ///
    /// Waits for a grace period: must not be called by a PMD thread that is online.
    pub fn stop(&self, vring: usize) -> Option<Box<Ring>> {
        let slot = self.slots.get(vring)?;
        let control = self.control();
        let running = slot.ring.0.replace(None, &self.domain)?;
        // A receive queue compares the generation before it follows its pointer in `release`. Who saw the old one did so
        // in a quiescent interval that ends before the second grace period does.
        slot.generation.fetch_add(1, Ordering::SeqCst);
        self.domain.synchronize();
        self.update_tx_ready();
        // A PMD thread that sleeps on the old kick descriptor lets go of it.
        self.wake_receiver(&control, vring);
        if running.notify_due.load(Ordering::Acquire)
            && let Some(fd) = running.call
        {
            eventfd::signal(fd);
        }
        Some(Box::new(running.ring.into_inner()))
    }

    /// True while `vring` is started (and not stopped; a faulted ring counts as started until it is stopped).
    pub fn is_running(&self, vring: usize) -> bool {
        self.slots.get(vring).is_some_and(|s| s.ring.0.is_some())
    }

    /// SET_VRING_ENABLE. A disabled receive queue is not polled, a disabled transmit queue takes no frames. Rings are
    /// disabled at first, and the state is independent of [`Self::start`] and [`Self::stop`].
    pub fn set_enabled(&self, vring: usize, enabled: bool) {
        let Some(slot) = self.slots.get(vring) else { return };
        let control = self.control();
        slot.enabled.store(enabled, Ordering::Release);
        self.update_tx_ready();
        self.wake_receiver(&control, vring);
    }

    /// Whether `vring` is enabled.
    pub fn is_enabled(&self, vring: usize) -> bool {
        self.slots.get(vring).is_some_and(|s| s.enabled.load(Ordering::Acquire))
    }

    /// An eventfd, readable when [`Self::take_fault`] has something to tell.
    pub fn fault_event_fd(&self) -> RawFd {
        self.fault_event.as_raw_fd()
    }

    /// The next fault of any ring. Call until `None`; then [`Self::fault_event_fd`] is no longer readable.
    /// The faulted ring does nothing until it is stopped and a new one started.
    pub fn take_fault(&self) -> Option<RingFault> {
        // Drained first: a fault that is stored after the scan signals again.
        eventfd::drain(self.fault_event.as_raw_fd());
        let (vring, packed) = self
            .slots
            .iter()
            .enumerate()
            .find_map(|(i, s)| Some(s.fault.swap(0, Ordering::AcqRel)).filter(|&f| f != 0).map(|f| (i, f)))?;
        let kind = FaultKind::ALL.get((packed >> 32) as usize - 1).copied()?;
        Some(RingFault { vring: vring as u16, kind, detail: packed as u32 })
    }

    #[cold]
    fn report_fault(&self, slot: &Slot, fault: RingFault) {
        slot.fault.store((fault.kind as u64 + 1) << 32 | u64::from(fault.detail), Ordering::Release);
        eventfd::signal(self.fault_event.as_raw_fd());
    }

    /// What `vring` did since the port exists.
    pub fn counters(&self, vring: usize) -> Option<&VringCounters> {
        self.slots.get(vring).map(|s| &s.counters)
    }

    /// The receive queue of `pair` (from vring 2·pair+1). `None` when the port has no such pair, or while another
    /// receive queue for it exists.
    pub fn rx(self: &Arc<Self>, pair: usize) -> Option<VhostRx> {
        let slot = self.slots.get(pair.checked_mul(2)? + 1)?;
        if slot.taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(VhostRx { queues: Arc::clone(self), pair, held: None, armed: None })
    }

    /// The transmit side, for any number of PMD threads.
    pub fn tx(self: &Arc<Self>) -> VhostTx {
        VhostTx { queues: Arc::clone(self) }
    }
}

/// Sends a notification if due, counting it either way.
#[inline]
fn notify_now(due: bool, call: Option<RawFd>, counters: &VringCounters) {
    match call {
        Some(fd) if due => {
            counters.calls_sent.add(1);
            eventfd::signal(fd);
        }
        _ => counters.calls_suppressed.add(1),
    }
}

/// A ring from which something was received that is not released yet.
#[derive(Clone, Copy)]
struct Held {
    running: *const Running,
    generation: u64,
}

/// Receive queue of one queue pair.
pub struct VhostRx {
    queues: Arc<PortQueues>,
    pair: usize,
    held: Option<Held>,
    /// The kick descriptor that a sleeping PMD thread waits on: kept open until it is awake.
    armed: Option<Arc<OwnedFd>>,
}

// SAFETY: `held` is only followed under the conditions that `release` checks, on whatever thread owns the queue.
unsafe impl Send for VhostRx {}

impl VhostRx {
    /// The queue pair's number.
    pub fn pair(&self) -> usize {
        self.pair
    }

    #[inline]
    fn slot(&self) -> Option<&Slot> {
        self.queues.slots.get(2 * self.pair + 1)
    }

    /// The ring, when it runs and is enabled.
    #[inline]
    fn running<'g>(&self, slot: &'g Slot, guard: &'g Guard) -> Option<&'g Running> {
        if !slot.enabled.load(Ordering::Acquire) {
            return None;
        }
        slot.ring.0.load(guard)
    }
}

impl Drop for VhostRx {
    fn drop(&mut self) {
        if let Some(slot) = self.slot() {
            slot.taken.store(false, Ordering::Release);
        }
    }
}

impl RxQueue for VhostRx {
    fn receive(&mut self, guard: &Guard, burst: &mut RxBurst) {
        let queues = Arc::as_ptr(&self.queues);
        // SAFETY: `self.queues` keeps the queues alive for the whole call; going around the borrow of `self` lets `held` be set.
        let queues = unsafe { &*queues };
        let Some(slot) = queues.slots.get(2 * self.pair + 1) else { return };
        let Some(running) = self.running(slot, guard) else { return };
        let generation = slot.generation.load(Ordering::Acquire);
        if self.held.is_some_and(|h| !core::ptr::eq(h.running, running)) {
            // The previous ring was stopped while frames of it were out; `release` comes first.
            self.release(guard);
        }
        // SAFETY: `rx` hands out one VhostRx per pair, `&mut self` makes this the only call on it, and the session takes the
        // ring only after a grace period that this thread's guard holds up.
        let ring = unsafe { &mut *running.ring.get() };
        if let Err(fault) = ring.receive(burst, &slot.counters) {
            queues.report_fault(slot, fault);
        }
        if ring.has_pending() {
            self.held = Some(Held { running, generation });
        }
    }

    fn release(&mut self, _guard: &Guard) {
        let Some(held) = self.held.take() else { return };
        let Some(slot) = self.slot() else { return };
        if slot.generation.load(Ordering::SeqCst) != held.generation {
            // Released too late, under another guard: the ring is gone, its base was set back to before these frames.
            return;
        }
        // SAFETY: the generation moves after a grace period that followed the ring's unpublishing, and a second grace
        // period follows before the ring is freed. Having seen the old generation while online, this thread reaches its
        // next quiescent state before that. Exclusive as in `receive`.
        let (ring, call) = unsafe { (&mut *(*held.running).ring.get(), (*held.running).call) };
        if ring.has_pending() {
            let due = ring.release(&slot.counters);
            notify_now(due, call, &slot.counters);
        }
    }

    fn arm(&mut self, guard: &Guard) -> Armed {
        let Some(slot) = self.slot() else { return Armed::Off };
        let Some(running) = self.running(slot, guard) else { return Armed::Off };
        // SAFETY: as in `receive`.
        let ring = unsafe { &mut *running.ring.get() };
        if ring.is_faulted() {
            return Armed::Off;
        }
        if ring.arm(&slot.counters) {
            return Armed::Ready;
        }
        match &ring.config().kick {
            Some(kick) => {
                let kick = Arc::clone(kick);
                let fd = kick.as_raw_fd();
                self.armed = Some(kick);
                Armed::Fd(fd)
            }
            None => Armed::Poll,
        }
    }

    fn disarm(&mut self, guard: &Guard) {
        if let Some(kick) = self.armed.take() {
            eventfd::drain(kick.as_raw_fd());
        }
        let Some(slot) = self.slot() else { return };
        let Some(running) = self.running(slot, guard) else { return };
        // SAFETY: as in `receive`.
        let ring = unsafe { &mut *running.ring.get() };
        if !ring.is_faulted() {
            ring.disarm();
        }
    }

    fn set_waker(&mut self, waker: Arc<dyn Wake>) {
        if let Some(w) = self.queues.control().wakers.get_mut(self.pair) {
            *w = Some(waker);
        }
    }
}

/// Transmit side of a port.
#[derive(Clone)]
pub struct VhostTx {
    queues: Arc<PortQueues>,
}

/// The exclusive right to use a transmit ring.
struct Claim<'a> {
    running: &'a Running,
}

impl<'a> Claim<'a> {
    #[inline]
    fn take(running: &'a Running) -> Option<Self> {
        if !running.claim.swap(true, Ordering::Acquire) {
            return Some(Self { running });
        }
        Self::take_contended(running)
    }

    #[cold]
    fn take_contended(running: &'a Running) -> Option<Self> {
        for turn in 0..CLAIM_SPINS + CLAIM_YIELDS {
            if turn < CLAIM_SPINS {
                core::hint::spin_loop();
            } else {
                // The holder may have lost its processor in the middle of a burst.
                std::thread::yield_now();
            }
            if !running.claim.load(Ordering::Relaxed) && !running.claim.swap(true, Ordering::Acquire) {
                return Some(Self { running });
            }
        }
        None
    }

    #[inline]
    fn ring(&mut self) -> &mut Ring {
        // SAFETY: the claim is held until drop, and only its holder comes here; the session takes the ring after a grace
        // period, when no PMD thread can hold a claim.
        unsafe { &mut *self.running.ring.get() }
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.running.claim.store(false, Ordering::Release);
    }
}

impl VhostTx {
    /// Sends the chosen ones of some frames through one ring.
    fn send_on<'f>(
        &self,
        guard: &Guard,
        pair: usize,
        frames: impl Fn(usize) -> Option<TxFrame<'f>> + Copy,
        chosen: u64,
        report: &mut TxReport,
    ) {
        let Some(slot) = self.queues.slots.get(2 * pair) else {
            return report.refuse_all(chosen, DropReason::TxNotReady);
        };
        let Some(running) = slot.ring.0.load(guard) else { return report.refuse_all(chosen, DropReason::TxNotReady) };
        let Some(mut claim) = Claim::take(running) else { return report.refuse_all(chosen, DropReason::TxBusy) };
        let ring = claim.ring();
        if ring.is_faulted() {
            return report.refuse_all(chosen, DropReason::TxNotReady);
        }
        let (due, fault) = ring.send(frames, chosen, report, &slot.counters);
        if due && running.call.is_some() && !running.notify_due.swap(true, Ordering::AcqRel) {
            slot.counters.calls_sent.add(1);
        } else {
            slot.counters.calls_suppressed.add(1);
        }
        if let Some(fault) = fault {
            self.queues.report_fault(slot, fault);
        }
    }

    /// Sends the frames of `all`, each through the ring that its flow has.
    #[inline(always)]
    fn spread<'f>(
        &self,
        guard: &Guard,
        frames: impl Fn(usize) -> Option<TxFrame<'f>> + Copy,
        all: u64,
        flow_hash: impl Fn(&TxFrame<'f>) -> u32,
        report: &mut TxReport,
    ) {
        let mut ready = self.queues.tx_ready.load(Ordering::Acquire);
        let rings = ready.count_ones();
        match rings {
            0 => report.refuse_all(all, DropReason::TxNotReady),
            1 => self.send_on(guard, ready.trailing_zeros() as usize, frames, all, report),
            _ => {
                // A flow stays on one ring as long as the set of rings does.
                let mut chosen = [0u64; MAX_PAIRS];
                for i in Frames(all) {
                    let hash = frames(i).map_or(0, |frame| flow_hash(&frame));
                    if let Some(mask) = chosen.get_mut((hash % rings) as usize) {
                        *mask |= 1 << i;
                    }
                }
                for mask in chosen.into_iter().take(rings as usize) {
                    let pair = ready.trailing_zeros() as usize;
                    ready &= ready - 1;
                    if mask != 0 {
                        self.send_on(guard, pair, frames, mask, report);
                    }
                }
            }
        }
    }
}

impl TxPort for VhostTx {
    fn capabilities(&self, guard: &Guard) -> TxCapabilities {
        let ready = self.queues.tx_ready.load(Ordering::Acquire);
        // All rings of a device have the same features.
        let first = self.queues.slots.get(2 * ready.trailing_zeros() as usize);
        match first.and_then(|slot| slot.ring.0.load(guard)) {
            Some(running) => {
                TxCapabilities { multiqueue: ready.count_ones() > 1, ..net_header::capabilities(running.features) }
            }
            None => TxCapabilities::default(),
        }
    }

    fn send(&self, guard: &Guard, _lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        let all = if frames.len() < BURST { (1 << frames.len()) - 1 } else { u64::MAX };
        self.spread(guard, |i| frames.get(i).copied(), all, |frame| frame.flow_hash, report);
    }

    fn send_received(&self, guard: &Guard, _lane: usize, burst: &RxBurst, frames: u64, report: &mut TxReport) {
        let all = frames & burst.all();
        self.spread(guard, |i| burst.as_received(i), all, |frame| packet::flow_hash(frame.head), report);
    }

    fn flush(&self, guard: &Guard, _lane: usize) {
        let mut running = self.queues.tx_running.load(Ordering::Acquire);
        while running != 0 {
            let pair = running.trailing_zeros() as usize;
            running &= running - 1;
            // A ring that was stopped in between was notified by `stop`.
            let Some(ring) = self.queues.slots.get(2 * pair).and_then(|slot| slot.ring.0.load(guard)) else {
                continue;
            };
            if ring.notify_due.load(Ordering::Relaxed)
                && ring.notify_due.swap(false, Ordering::AcqRel)
                && let Some(fd) = ring.call
            {
                eventfd::signal(fd);
            }
        }
    }
}
