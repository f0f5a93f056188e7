//! Frames that go on after the burst under way: released fragments and answers to rejected packets.
//!
//! They are copies in private memory. The worker sends them as bursts of their own once the burst that caused them is done.
use core::ops::Range;

use crate::bridge::fdb::PortId;

/// Most bytes that wait at one time; what comes then is lost and counted. A burst's fragments can complete a few datagrams of 64 KiB.
const MAX_BYTES: usize = 4 << 20;

/// Memory taken at the beginning: a burst of answers, or a few datagrams.
const USUAL_BYTES: usize = 256 << 10;
const USUAL_FRAMES: usize = 256;

/// How a pending frame goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Behind the firewall of the port it came in through: to the FDB.
    Forward {
        /// That port.
        ingress: PortId,
    },
    /// To one port.
    ToPort {
        /// The port.
        output: PortId,
        /// The VLAN that it travels in.
        vlan: u16,
        /// The port's firewall has not judged it yet.
        judge: bool,
    },
}

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct PendingFrame {
    pub bytes: Range<usize>,
    pub next: Next,
}

/// All that wait.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// The frames' bytes, one behind the other.
    pub bytes: Vec<u8>,
    pub frames: Vec<PendingFrame>,
    /// Frames lost for lack of room since last asked.
    pub lost: u64,
}

impl Pending {
    /// Nothing waiting, and room for what bursts usually leave.
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::with_capacity(USUAL_BYTES), frames: Vec::with_capacity(USUAL_FRAMES), lost: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.lost == 0
    }

    pub(crate) fn push(&mut self, frame: &[u8], next: Next) {
        let start = self.bytes.len();
        if start + frame.len() > MAX_BYTES {
            self.lost += 1;
            return;
        }
        self.bytes.extend_from_slice(frame);
        self.frames.push(PendingFrame { bytes: start..self.bytes.len(), next });
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.frames.clear();
        self.lost = 0;
    }
}
