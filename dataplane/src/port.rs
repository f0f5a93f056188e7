//! What the switch asks of a port. Implemented by `ferry-vhost` (guests) and `ferry-ffi` (DPDK devices);
//! the set of kinds is closed by an enum in `ferry-control`, so that nothing here is dispatched dynamically per packet.
use std::os::fd::RawFd;
use std::sync::Arc;

use arrayvec::ArrayVec;

use crate::counters::DropReason;
use crate::frame::{BURST, Frames, RxBurst, TxFrame};
use crate::packet;
use crate::qsbr::Guard;

/// Wakes a sleeping PMD thread; cheap when it is awake. Callable from any thread.
pub trait Wake: Send + Sync {
    /// Ends the sleep of the PMD thread, or makes its next one end at once.
    fn wake(&self);
}

/// What a receive queue can do for a PMD thread that wants to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// Work is waiting already: do not sleep.
    Ready,
    /// The descriptor becomes readable when work arrives.
    Fd(RawFd),
    /// Nothing will signal: poll at the idle interval.
    Poll,
    /// The queue is not running. Whoever starts it wakes the PMD thread.
    Off,
}

/// A receive queue (rxq). Owned by exactly one PMD thread at a time; moved, never shared.
pub trait RxQueue: Send {
    /// Appends waiting frames to `burst`, at most until it is full. Never blocks. Malformed input is
    /// counted with [`RxBurst::reject`]. The buffers stay the switch's until [`Self::release`],
    /// which follows under the same guard.
    fn receive(&mut self, guard: &Guard, burst: &mut RxBurst);

    /// Gives back the buffers of everything received (or rejected) since the last release and notifies the sender where it asked for that.
    fn release(&mut self, guard: &Guard);

    /// Asks for a signal on new work before the PMD thread sleeps.
    fn arm(&mut self, guard: &Guard) -> Armed;

    /// The PMD thread is awake: signals are not needed any more.
    fn disarm(&mut self, guard: &Guard);

    /// Called when the queue is handed to a PMD thread: whom to wake when the queue starts to run. The thread is offline
    /// meanwhile, so locks may be taken.
    fn set_waker(&mut self, waker: Arc<dyn Wake>);
}

/// Offloads that a transmit side takes over, and its frame limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxCapabilities {
    /// Takes frames whose L4 checksum is not finished (`Offload::needs_csum`).
    pub csum: bool,
    /// Takes TCP/IPv4 frames to be segmented.
    pub tso4: bool,
    /// Takes TCP/IPv6 frames to be segmented.
    pub tso6: bool,
    /// Takes TSO frames with `Offload::ecn`.
    pub ecn: bool,
    /// Has several queues to choose from by `TxFrame::flow_hash`.
    pub multiqueue: bool,
    /// Longest frame with Ethernet header and one VLAN tag, without segmentation owed; bytes. 0: no limit known.
    pub max_frame_bytes: u32,
}

/// Result of one [`TxPort::send`].
#[derive(Debug)]
pub struct TxReport {
    /// Bit i set: frame i was accepted.
    pub accepted: u64,
    /// For frames not accepted: why.
    pub reason: [DropReason; BURST],
}

impl Default for TxReport {
    fn default() -> Self {
        Self { accepted: 0, reason: [DropReason::TxNotReady; BURST] }
    }
}

impl TxReport {
    /// Starts over: nothing accepted, everything refused for `reason`.
    pub fn reset(&mut self, reason: DropReason) {
        self.accepted = 0;
        self.reason = [reason; BURST];
    }
    /// Frame `i` was accepted.
    #[inline]
    pub fn accept(&mut self, i: usize) {
        self.accepted |= 1u64 << (i & 63);
    }
    /// Frame `i` was refused.
    #[inline]
    pub fn refuse(&mut self, i: usize, reason: DropReason) {
        if let Some(r) = self.reason.get_mut(i) {
            *r = reason;
        }
    }
    /// The frames whose bits are set were refused.
    #[inline]
    pub fn refuse_all(&mut self, frames: u64, reason: DropReason) {
        Frames(frames).for_each(|i| self.refuse(i, reason));
    }
}

/// The transmit side of a port, shared by all PMD threads. `lane` is the PMD thread's number: an implementation
/// with enough queues gives each lane its own, otherwise lanes claim a queue for the time of a burst.
pub trait TxPort: Send + Sync {
    /// What may be left owed in frames given to [`Self::send`]. The most conservative answer when the port is not running.
    fn capabilities(&self, guard: &Guard) -> TxCapabilities;

    /// Sends at most [`BURST`] frames in order. Sets a verdict for each in `report` (which was reset by the caller).
    /// Copies before it returns: source buffers may be given back afterwards.
    fn send(&self, guard: &Guard, lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport);

    /// As [`Self::send`], for the frames of a burst whose bits are set, in their order, each as it was received. They are known to be there,
    /// and to owe nothing beyond the port's capabilities. In `report` they have the numbers that they have in the burst.
    fn send_received(&self, guard: &Guard, lane: usize, burst: &RxBurst, frames: u64, report: &mut TxReport) {
        let multiqueue = self.capabilities(guard).multiqueue;
        let mut list = ArrayVec::<TxFrame<'_>, BURST>::new();
        let mut numbers = ArrayVec::<u8, BURST>::new();
        for i in Frames(frames) {
            let Some(frame) = burst.as_received(i) else { continue };
            let flow_hash = if multiqueue { packet::flow_hash(frame.head) } else { 0 };
            list.push(TxFrame { flow_hash, ..frame });
            numbers.push(i as u8);
        }
        let mut own = TxReport::default();
        self.send(guard, lane, &list, &mut own);
        for (k, &i) in numbers.iter().enumerate() {
            match own.reason.get(k) {
                Some(&reason) if own.accepted >> k & 1 == 0 => report.refuse(usize::from(i), reason),
                _ => report.accept(usize::from(i)),
            }
        }
    }

    /// Publishes and notifies what `send` left for the end of the burst (once per burst and port).
    fn flush(&self, guard: &Guard, lane: usize);
}
