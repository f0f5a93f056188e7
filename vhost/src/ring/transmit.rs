//! Frames into chains of the guest's receive queue.
//!
//! A frame either goes in whole or leaves the ring as it was: buffers are looked for first, and taken only when they
//! suffice. The one exception are malformed chains, which go back to the guest unused so that they cannot block the ring.
#![allow(unsafe_code)] // Its job: writing into guest buffers.
use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, TxFrame};
use ferry_dataplane::port::TxReport;

use super::copy::copy;
use super::{Chain, Core, Fault, Format, Sink, VringCounters};
use crate::net_header::{self, MAX_HEADER_BYTES, feature};

/// Most pieces of guest memory, and most chains, that one frame is spread over.
const MAX_PIECES: usize = 1024;

/// A writable piece of a guest buffer.
#[derive(Clone, Copy)]
struct Piece {
    addr: *mut u8,
    gpa: u64,
    len: u32,
}

/// Room for one frame's pieces and chains, allocated once.
pub(crate) struct Scratch {
    pieces: Vec<Piece>,
    /// Chains with their capacities, bytes.
    chains: Vec<(Chain, u32)>,
}

// SAFETY: the pointers are valid during one call of `send` only and are forgotten before the next.
unsafe impl Send for Scratch {}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { pieces: Vec::with_capacity(MAX_PIECES), chains: Vec::with_capacity(MAX_PIECES) }
    }
}

/// Collects writable pieces until there is room for `need` bytes; what comes after is checked, but not recorded.
struct RoomSink<'a> {
    pieces: &'a mut Vec<Piece>,
    need: u32,
    have: u32,
}

impl Sink for RoomSink<'_> {
    const WRITABLE: bool = true;
    const BAD: DropReason = DropReason::TxBadDescriptor;

    #[inline(always)]
    fn piece(&mut self, addr: *mut u8, gpa: u64, len: u32) -> Result<(), DropReason> {
        if self.have < self.need {
            if self.pieces.len() == MAX_PIECES {
                return Err(DropReason::TxBadDescriptor);
            }
            let len = len.min(self.need - self.have);
            self.pieces.push(Piece { addr, gpa, len });
            self.have += len;
        }
        Ok(())
    }
}

/// Writes bytes one after another into pieces.
struct Writer<'a> {
    pieces: core::slice::Iter<'a, Piece>,
    addr: *mut u8,
    left: u32,
}

impl<'a> Writer<'a> {
    fn new(pieces: &'a [Piece]) -> Self {
        Self { pieces: pieces.iter(), addr: core::ptr::null_mut(), left: 0 }
    }

    /// # Safety
    /// `src` has `len` readable bytes; the pieces are mapped and writable.
    #[inline]
    unsafe fn write(&mut self, mut src: *const u8, mut len: u32) {
        while len > 0 {
            if self.left == 0 {
                // The pieces together hold the frame (checked before); should they not, the rest is cut off here.
                let Some(p) = self.pieces.next() else { return };
                (self.addr, self.left) = (p.addr, p.len);
                continue;
            }
            let n = len.min(self.left);
            // SAFETY: n bytes are left in the source and in the current piece.
            unsafe { copy(self.addr, src, n as usize) };
            self.addr = self.addr.wrapping_add(n as usize);
            src = src.wrapping_add(n as usize);
            self.left -= n;
            len -= n;
        }
    }
}

/// Why a frame was not placed.
enum Obstacle {
    Frame(DropReason),
    Ring(Fault),
}

impl From<Fault> for Obstacle {
    #[cold]
    fn from(fault: Fault) -> Self {
        Self::Ring(fault)
    }
}

/// Refuses every chosen frame.
pub(super) fn refuse(frames: &[TxFrame<'_>], chosen: u64, report: &mut TxReport, reason: DropReason) {
    for i in 0..frames.len().min(BURST) {
        if chosen >> i & 1 != 0 {
            report.refuse(i, reason);
        }
    }
}

/// Sends the chosen frames in order and makes them visible. Returns whether the guest wants to be notified, and the
/// fault that ended the burst early.
pub(super) fn send<F: Format>(
    queue: &mut F,
    core: &mut Core,
    scratch: &mut Scratch,
    frames: &[TxFrame<'_>],
    chosen: u64,
    report: &mut TxReport,
    counters: &VringCounters,
) -> (bool, Option<Fault>) {
    queue.prefetch::<RoomSink<'_>>(core, frames.len().min(BURST) as u16);
    let mut used = 0u64;
    let mut fault = None;
    for (i, frame) in frames.iter().enumerate().take(BURST) {
        if chosen >> i & 1 == 0 {
            continue;
        }
        if fault.is_some() {
            report.refuse(i, DropReason::TxNotReady);
            continue;
        }
        match place(queue, core, scratch, frame, &mut used, counters) {
            Ok(()) => report.accept(i),
            Err(Obstacle::Frame(reason)) => report.refuse(i, reason),
            Err(Obstacle::Ring(f)) => {
                report.refuse(i, DropReason::TxBadDescriptor);
                fault = Some(f);
            }
        }
    }
    let notify = if used > 0 {
        counters.chains.add(used);
        queue.publish(core)
    } else {
        false
    };
    if fault.is_none() {
        // The buffers of the next burst come in while this one travels.
        queue.prefetch::<RoomSink<'_>>(core, BURST as u16);
    }
    (notify, fault)
}

/// Places one frame.
#[inline]
fn place<F: Format>(
    queue: &mut F,
    core: &mut Core,
    scratch: &mut Scratch,
    frame: &TxFrame<'_>,
    used: &mut u64,
    counters: &VringCounters,
) -> Result<(), Obstacle> {
    let header_len = core.header_len;
    let need = frame.len().saturating_add(header_len);
    let mergeable = core.features & feature::MRG_RXBUF != 0;
    scratch.pieces.clear();
    scratch.chains.clear();
    let mut at = queue.position();
    let mut sink = RoomSink { pieces: &mut scratch.pieces, need, have: 0 };
    loop {
        let before = sink.have;
        let Some((chain, result)) = queue.peek(core, &mut at, &mut sink)? else {
            return Err(Obstacle::Frame(DropReason::TxQueueFull));
        };
        let got = sink.have - before;
        if result.is_err() || got == 0 {
            // Returned in order, with those before it: otherwise the same chain would stop every frame of this size.
            for (good, _) in &scratch.chains {
                queue.put_used(core, *good, 0);
            }
            queue.put_used(core, chain, 0);
            *used += scratch.chains.len() as u64 + 1;
            queue.advance(at);
            counters.bad_chains.add(1);
            return Err(Obstacle::Frame(DropReason::TxBadDescriptor));
        }
        scratch.chains.push((chain, got));
        if sink.have >= need {
            break;
        }
        // 5.1.6.3.2: a frame is spread over several chains only with MRG_RXBUF.
        if !mergeable || scratch.chains.len() == MAX_PIECES {
            return Err(Obstacle::Frame(DropReason::TxTooLong));
        }
    }
    // 5.1.6.4.1: num_buffers is 1 without MRG_RXBUF.
    let header =
        net_header::encode(&frame.offload, scratch.chains.len() as u16, core.features).map_err(Obstacle::Frame)?;
    // SAFETY: the pieces were translated from checked descriptors, hold `need` bytes together, and stay mapped until the
    // ring is stopped; the frame's own bytes are readable until its burst is released.
    unsafe { write_frame(&scratch.pieces, &header, header_len, frame) };
    if core.log.is_some() {
        for piece in &scratch.pieces {
            core.log_data(piece.gpa, piece.len);
        }
    }
    for &(chain, got) in &scratch.chains {
        queue.put_used(core, chain, got);
    }
    *used += scratch.chains.len() as u64;
    queue.advance(at);
    Ok(())
}

/// Header, head and body into the pieces.
///
/// # Safety
/// The pieces are mapped, writable and hold header and frame; the frame's bytes are readable.
#[inline(always)]
unsafe fn write_frame(pieces: &[Piece], header: &[u8; MAX_HEADER_BYTES], header_len: u32, frame: &TxFrame<'_>) {
    if let [only] = pieces {
        let mut to = only.addr;
        // SAFETY: the one piece holds everything, so each part lies inside it.
        unsafe {
            if header_len == 12 {
                to.cast::<[u8; 12]>().write(*header);
            } else {
                copy(to, header.as_ptr(), header_len as usize);
            }
            to = to.add(header_len as usize);
            copy(to, frame.head.as_ptr(), frame.head.len());
            to = to.add(frame.head.len());
            for (src, len) in frame.body.pieces() {
                copy(to, src, len as usize);
                to = to.add(len as usize);
            }
        }
        return;
    }
    let mut writer = Writer::new(pieces);
    // SAFETY: as the caller vouches.
    unsafe {
        writer.write(header.as_ptr(), header_len);
        writer.write(frame.head.as_ptr(), frame.head.len() as u32);
        for (src, len) in frame.body.pieces() {
            writer.write(src, len);
        }
    }
}
