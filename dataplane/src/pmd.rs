//! PMD threads: poll-mode threads that own receive queues, and how the control side talks to them.
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use serde::Serialize;

use crate::bridge::fdb::PortId;
use crate::counters::{Counter, RxLedger};
use crate::port::{RxQueue, Wake};

/// Identifies a PMD thread of a switch.
pub type PmdId = u16;

/// The kinds of ports a switch handles, chosen once (in `ferry-control`) so that the packet path is monomorphic.
pub trait Kinds: 'static {
    /// Any receive queue.
    type Rx: RxQueue + 'static;
    /// Any transmit side.
    type Tx: crate::port::TxPort + Clone + 'static;
}

/// How a PMD thread sleeps. Implemented outside (epoll), because this crate does no I/O.
pub trait Sleeper: Send {
    /// Returns when a descriptor is readable, the waker fired, or the time has passed.
    fn sleep(&mut self, fds: &[RawFd], timeout: Duration);
    /// Ends the current or the next sleep.
    fn waker(&self) -> Arc<dyn Wake>;
}

/// What a PMD thread does when there is nothing to do. Changeable at run time.
#[derive(Debug)]
pub struct IdleTuning {
    latency_us: AtomicU32,
    spin_us: AtomicU32,
}

/// Longest sleep, so that ageing goes on.
pub const MAX_SLEEP: Duration = Duration::from_secs(1);

impl IdleTuning {
    /// Spins for `spin_us` after the last frame, then sleeps. `latency_us` bounds the sleep where a port cannot signal
    /// (uplinks without receive interrupts); 0 means always poll, never sleep.
    pub fn new(spin_us: u32, latency_us: u32) -> Self {
        Self { latency_us: AtomicU32::new(latency_us), spin_us: AtomicU32::new(spin_us) }
    }
    /// Changes both.
    pub fn set(&self, spin_us: u32, latency_us: u32) {
        self.spin_us.store(spin_us, Ordering::Relaxed);
        self.latency_us.store(latency_us, Ordering::Relaxed);
    }
    /// Bound of a sleep without a signal, microseconds; 0: always poll.
    pub fn latency_us(&self) -> u32 {
        self.latency_us.load(Ordering::Relaxed)
    }
    /// Time of polling after the last frame, microseconds.
    pub fn spin_us(&self) -> u32 {
        self.spin_us.load(Ordering::Relaxed)
    }
}

/// What a PMD thread has done.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct PmdCounters {
    /// Rounds over all queues.
    pub iterations: Counter,
    /// Bursts that held at least one frame.
    pub bursts: Counter,
    /// Frames received.
    pub frames: Counter,
    /// Cycles of iterations that handled frames.
    pub busy_cycles: Counter,
    /// Cycles of iterations that found nothing.
    pub idle_cycles: Counter,
    /// Sleeps.
    pub sleeps: Counter,
    /// Time slept, nanoseconds.
    pub sleep_ns: Counter,
    /// Where the cycles go.
    pub stages: StageCounters,
    /// Connections of bursts, each counted once per burst and while its packets follow each other, of which the flow cache knew where the
    /// entries are.
    pub flow_cache_hits: Counter,
    /// Those that were searched for in the tables instead.
    pub flow_cache_misses: Counter,
}

/// Cycles by stage of the packet path, of bursts that were timed: reading the time-stamp counter costs as much as handling a frame or two,
/// so small bursts are sampled.
#[derive(Debug, Default)]
pub struct StageCounters {
    /// Frames of timed bursts.
    pub frames: Counter,
    /// Taking frames from the sender's queue, and finding others empty.
    pub receive: Counter,
    /// Header copies, judgement, look-up.
    pub route: Counter,
    /// Copying frames to their outputs.
    pub send: Counter,
    /// Giving the buffers back, and counting.
    pub release: Counter,
    /// Expiry and ageing: all rounds, whether or not frames came.
    pub housekeeping: Counter,
}

/// [`StageCounters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StageStats {
    /// Frames of timed bursts.
    pub frames: u64,
    /// Taking frames from the sender's queue.
    pub receive: u64,
    /// Header copies, judgement, look-up.
    pub route: u64,
    /// Copying frames to their outputs.
    pub send: u64,
    /// Giving the buffers back, and counting.
    pub release: u64,
    /// Expiry and ageing: all rounds, whether or not frames came.
    pub housekeeping: u64,
}

/// [`PmdCounters`] at one moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PmdStats {
    /// Rounds over all queues.
    pub iterations: u64,
    /// Bursts that held at least one frame.
    pub bursts: u64,
    /// Frames received.
    pub frames: u64,
    /// Cycles of iterations that handled frames.
    pub busy_cycles: u64,
    /// Cycles of iterations that found nothing.
    pub idle_cycles: u64,
    /// Sleeps.
    pub sleeps: u64,
    /// Time slept, nanoseconds.
    pub sleep_ns: u64,
    /// Where the cycles went.
    pub stages: StageStats,
    /// Looks into the flow cache that knew the connection.
    pub flow_cache_hits: u64,
    /// Those after which it was searched for in the tables.
    pub flow_cache_misses: u64,
}

impl PmdCounters {
    /// Reads all.
    pub fn stats(&self) -> PmdStats {
        PmdStats {
            iterations: self.iterations.get(),
            bursts: self.bursts.get(),
            frames: self.frames.get(),
            busy_cycles: self.busy_cycles.get(),
            idle_cycles: self.idle_cycles.get(),
            sleeps: self.sleeps.get(),
            sleep_ns: self.sleep_ns.get(),
            flow_cache_hits: self.flow_cache_hits.get(),
            flow_cache_misses: self.flow_cache_misses.get(),
            stages: StageStats {
                frames: self.stages.frames.get(),
                receive: self.stages.receive.get(),
                route: self.stages.route.get(),
                send: self.stages.send.get(),
                release: self.stages.release.get(),
                housekeeping: self.stages.housekeeping.get(),
            },
        }
    }
}

/// A receive queue with its place in the switch and its ledger; moves between PMD threads as one.
pub struct PolledQueue<R> {
    /// The queue itself.
    pub rx: R,
    /// Whose it is.
    pub port: PortId,
    /// Its number within the port.
    pub queue: u16,
    /// What became of its frames.
    pub ledger: Arc<RxLedger>,
}

/// What the control side asks of a PMD thread.
pub(crate) enum Command<R> {
    Add(Box<PolledQueue<R>>),
    Remove {
        port: PortId,
        queue: u16,
        reply: Sender<Option<Box<PolledQueue<R>>>>,
    },
    /// A frame that the switch originates, as if it had come in through `ingress`.
    Inject {
        ingress: PortId,
        frame: Vec<u8>,
    },
    /// A frame for one port, as its guest is to receive it.
    Deliver {
        output: PortId,
        frame: Vec<u8>,
    },
    Stop {
        reply: Sender<Vec<PolledQueue<R>>>,
    },
}

/// The control side's end of a PMD thread.
pub(crate) struct Mailbox<R> {
    sender: Sender<Command<R>>,
    shared: Arc<MailboxShared>,
}

struct MailboxShared {
    pending: AtomicBool,
    waker: Arc<dyn Wake>,
    delivered: AtomicU64,
}

/// The PMD thread's end.
pub(crate) struct Inbox<R> {
    receiver: Receiver<Command<R>>,
    shared: Arc<MailboxShared>,
}

pub(crate) fn mailbox<R>(waker: Arc<dyn Wake>) -> (Mailbox<R>, Inbox<R>) {
    let (sender, receiver) = unbounded();
    let shared = Arc::new(MailboxShared { pending: AtomicBool::new(false), waker, delivered: AtomicU64::new(0) });
    (Mailbox { sender, shared: Arc::clone(&shared) }, Inbox { receiver, shared })
}

impl<R> Mailbox<R> {
    /// Hands a command over and wakes the thread. False when the thread is gone.
    pub(crate) fn send(&self, command: Command<R>) -> bool {
        if self.sender.send(command).is_err() {
            return false;
        }
        self.shared.delivered.fetch_add(1, Ordering::Relaxed);
        self.shared.pending.store(true, Ordering::Release);
        self.shared.waker.wake();
        true
    }

    /// Sends a command that carries a reply channel and waits for the answer.
    pub(crate) fn ask<T>(&self, make: impl FnOnce(Sender<T>) -> Command<R>) -> Option<T> {
        let (reply, answer) = bounded(1);
        if !self.send(make(reply)) {
            return None;
        }
        answer.recv().ok()
    }
}

impl<R> Inbox<R> {
    /// One load per loop iteration.
    #[inline]
    pub(crate) fn pending(&self) -> bool {
        self.shared.pending.load(Ordering::Relaxed)
    }

    /// All waiting commands.
    pub(crate) fn take(&self) -> impl Iterator<Item = Command<R>> + '_ {
        self.shared.pending.store(false, Ordering::SeqCst);
        self.receiver.try_iter()
    }

    pub(crate) fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared.waker)
    }
}
