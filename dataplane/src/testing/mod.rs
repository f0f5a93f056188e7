//! Ports in private memory, for tests and micro-benchmarks of the packet path without I/O.
#![allow(unsafe_code)] // Its job: lending private buffers to a burst.
#[cfg(feature = "testing")]
pub mod replay;
pub mod synthetic;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::counters::DropReason;
use crate::frame::{Offload, RxBurst, TxFrame};
use crate::pmd::{Kinds, Sleeper};
use crate::port::{Armed, RxQueue, TxCapabilities, TxPort, TxReport, Wake};
use crate::qsbr::Guard;

/// The far end of a memory port: what a test puts in and takes out.
#[derive(Default)]
pub struct Wire {
    /// Frames for the switch to receive.
    pub to_switch: Mutex<VecDeque<(Vec<u8>, Offload)>>,
    /// Frames the switch has sent, with the work they still owe.
    pub from_switch: Mutex<Vec<(Vec<u8>, Offload)>>,
    /// What the port takes over.
    pub capabilities: Mutex<TxCapabilities>,
    /// Frames that fit before the port says that it is full.
    pub room: AtomicU32,
    /// Cut received frames into segments of this many bytes; 0: one segment.
    pub segment_bytes: AtomicU32,
    /// At most so many frames are received at a time; 0: as many as a burst takes.
    pub burst_frames: AtomicU32,
}

impl Wire {
    /// A wire with plenty of room.
    pub fn new() -> Arc<Self> {
        let wire = Self::default();
        wire.room.store(u32::MAX, Ordering::Relaxed);
        Arc::new(wire)
    }
    /// Queues a plain frame for the switch.
    pub fn put(&self, frame: &[u8]) {
        self.put_offload(frame, Offload::default());
    }
    /// Queues a frame that owes work.
    pub fn put_offload(&self, frame: &[u8], offload: Offload) {
        lock(&self.to_switch).push_back((frame.to_vec(), offload));
    }
    /// Queues plain frames for the switch, which finds all of them at once.
    pub fn put_all(&self, frames: &[Vec<u8>]) {
        lock(&self.to_switch).extend(frames.iter().map(|frame| (frame.clone(), Offload::default())));
    }
    /// Takes everything the switch has sent.
    pub fn take(&self) -> Vec<Vec<u8>> {
        self.take_offload().into_iter().map(|(f, _)| f).collect()
    }
    /// Takes everything the switch has sent, with the work still owed.
    pub fn take_offload(&self) -> Vec<(Vec<u8>, Offload)> {
        std::mem::take(&mut *lock(&self.from_switch))
    }
    /// Receive side.
    pub fn rx(self: &Arc<Self>) -> MemRx {
        MemRx { wire: Arc::clone(self), held: Vec::new() }
    }
    /// Transmit side.
    pub fn tx(self: &Arc<Self>) -> MemTx {
        MemTx(Arc::clone(self))
    }
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Receive side of a [`Wire`].
pub struct MemRx {
    wire: Arc<Wire>,
    held: Vec<Vec<u8>>,
}

impl RxQueue for MemRx {
    fn receive(&mut self, _guard: &Guard, burst: &mut RxBurst) {
        let cut = self.wire.segment_bytes.load(Ordering::Relaxed) as usize;
        let mut queue = lock(&self.wire.to_switch);
        let most = match self.wire.burst_frames.load(Ordering::Relaxed) {
            0 => usize::MAX,
            most => most as usize,
        };
        while !burst.is_full() && burst.len() < most && burst.segment_room() > 2048 {
            let Some((frame, offload)) = queue.pop_front() else { break };
            let mark = burst.segment_mark();
            let step = if cut == 0 { frame.len().max(1) } else { cut };
            for piece in frame.chunks(step) {
                // SAFETY: the frame's heap buffer is kept in `held`, unmoved, until release.
                unsafe { burst.push_segment(piece.as_ptr(), piece.len() as u32) };
            }
            burst.finish_frame(mark, offload);
            self.held.push(frame);
        }
    }
    fn release(&mut self, _guard: &Guard) {
        self.held.clear();
    }
    fn arm(&mut self, _guard: &Guard) -> Armed {
        if lock(&self.wire.to_switch).is_empty() { Armed::Poll } else { Armed::Ready }
    }
    fn disarm(&mut self, _guard: &Guard) {}
    fn set_waker(&mut self, _waker: Arc<dyn Wake>) {}
}

/// Transmit side of a [`Wire`].
#[derive(Clone)]
pub struct MemTx(Arc<Wire>);

impl TxPort for MemTx {
    fn capabilities(&self, _guard: &Guard) -> TxCapabilities {
        *lock(&self.0.capabilities)
    }
    fn send(&self, _guard: &Guard, _lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        let mut out = lock(&self.0.from_switch);
        for (i, frame) in frames.iter().enumerate() {
            if out.len() >= self.0.room.load(Ordering::Relaxed) as usize {
                report.refuse(i, DropReason::TxQueueFull);
                continue;
            }
            let mut bytes = frame.head.to_vec();
            let mut rest = vec![0; frame.body.len() as usize];
            let n = frame.body.read(&mut rest);
            rest.truncate(n);
            bytes.extend_from_slice(&rest);
            out.push((bytes, frame.offload));
            report.accept(i);
        }
    }
    fn flush(&self, _guard: &Guard, _lane: usize) {}
}

/// A switch whose ports are all [`Wire`]s.
pub struct MemKinds;

impl Kinds for MemKinds {
    type Rx = MemRx;
    type Tx = MemTx;
}

/// Sleeps by short naps; good enough where no one measures.
#[derive(Default)]
pub struct NapSleeper(Arc<Nudge>);

#[derive(Default)]
struct Nudge(AtomicBool);

impl Wake for Nudge {
    fn wake(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Sleeper for NapSleeper {
    fn sleep(&mut self, _fds: &[std::os::fd::RawFd], timeout: Duration) {
        let until = std::time::Instant::now() + timeout;
        while !self.0.0.swap(false, Ordering::AcqRel) && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_micros(100).min(timeout));
        }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.0) as Arc<dyn Wake>
    }
}
