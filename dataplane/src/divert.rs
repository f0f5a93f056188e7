//! Frames for a port that cannot take them now: kept until its guest has arrived, or passed on to where it has gone.
//!
//! During a live migration frames still come for a VM that has left (on the source), or come before it runs (on the
//! destination). A port with a [`Divert`] gets them there instead of into its rings: finished (checksums filled in, segmented),
//! as the guest would have received them, and not judged yet, because the side that delivers them will.
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam::queue::ArrayQueue;

use crate::counters::DropReason;
use crate::frame::TxFrame;
use crate::port::TxReport;

/// A bounded queue of frames, lock-free, with all its memory taken at the beginning.
pub struct Divert {
    free: ArrayQueue<Box<[u8]>>,
    full: ArrayQueue<(Box<[u8]>, usize)>,
    taken: AtomicU64,
    lost: AtomicU64,
}

/// How a [`Divert`] has been used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DivertStats {
    /// Frames taken in.
    pub taken: u64,
    /// Frames lost: there was no room, or they were too long.
    pub lost: u64,
    /// Frames that wait now.
    pub waiting: usize,
}

impl Divert {
    /// Room for `frames` frames of at most `frame_bytes` bytes each.
    pub fn new(frames: usize, frame_bytes: usize) -> Self {
        let frames = frames.max(1);
        let free = ArrayQueue::new(frames);
        for _ in 0..frames {
            // As many as there is room for.
            let _ = free.push(vec![0; frame_bytes].into_boxed_slice());
        }
        Self { free, full: ArrayQueue::new(frames), taken: AtomicU64::new(0), lost: AtomicU64::new(0) }
    }

    /// Takes frames in, as [`crate::port::TxPort::send`] does.
    pub(crate) fn send(&self, frames: &[TxFrame<'_>], report: &mut TxReport) {
        for (i, frame) in frames.iter().enumerate() {
            match self.push(frame) {
                Ok(()) => report.accept(i),
                Err(reason) => report.refuse(i, reason),
            }
        }
    }

    fn push(&self, frame: &TxFrame<'_>) -> Result<(), DropReason> {
        let lost = |reason| {
            self.lost.fetch_add(1, Relaxed);
            Err(reason)
        };
        let Some(mut buffer) = self.free.pop() else { return lost(DropReason::TxQueueFull) };
        let (head, body) = (frame.head, frame.body);
        let len = head.len() + body.len() as usize;
        let copied = match buffer.get_mut(..len).and_then(|to| to.split_at_mut_checked(head.len())) {
            Some((to_head, to_body)) => {
                to_head.copy_from_slice(head);
                body.read(to_body) == to_body.len()
            }
            None => false,
        };
        if !copied {
            // There is room for what was just taken.
            let _ = self.free.push(buffer);
            return lost(DropReason::TxTooLong);
        }
        self.taken.fetch_add(1, Relaxed);
        // As many places as buffers.
        let _ = self.full.push((buffer, len));
        Ok(())
    }

    /// The frame that has waited longest.
    pub fn pop(&self) -> Option<Vec<u8>> {
        let (buffer, len) = self.full.pop()?;
        let frame = buffer.get(..len).unwrap_or_default().to_vec();
        let _ = self.free.push(buffer);
        Some(frame)
    }

    /// Counters, and how many wait.
    pub fn stats(&self) -> DivertStats {
        DivertStats { taken: self.taken.load(Relaxed), lost: self.lost.load(Relaxed), waiting: self.full.len() }
    }
}
