//! Frames into chains of the guest's receive queue.
//!
//! A frame either goes in whole or leaves the ring as it was: buffers are looked for first, and taken only when they
//! suffice. The one exception are malformed chains, which go back to the guest unused so that they cannot block the ring.
#![allow(unsafe_code)] // Its job: writing into guest buffers.
use ferry_dataplane::copy::copy;
use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, Body, Frames, TxFrame};
use ferry_dataplane::port::TxReport;

use super::{Chain, Core, Fault, Format, MAX_BURST_DESCRIPTORS, Sink, VringCounters};
use crate::net_header::{self, RawHeader, feature};

/// Most pieces of guest memory, and most chains, that one frame is spread over.
const MAX_PIECES: usize = 1024;

/// A writable piece of a guest buffer.
#[derive(Clone, Copy)]
struct Piece {
    addr: *mut u8,
    gpa: u64,
    len: u32,
}

/// Room for what a frame needs beyond its first piece and its first chain, allocated once.
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
/// The first piece, usually the only one, stays in registers.
struct RoomSink<'a> {
    first: Piece,
    more: &'a mut Vec<Piece>,
    need: u32,
    have: u32,
}

impl Sink for RoomSink<'_> {
    const WRITABLE: bool = true;
    const BAD: DropReason = DropReason::TxBadDescriptor;

    #[inline(always)]
    fn piece(&mut self, addr: *mut u8, gpa: u64, len: u32) -> Result<(), DropReason> {
        if self.have == 0 {
            let len = len.min(self.need);
            self.first = Piece { addr, gpa, len };
            self.have = len;
            return Ok(());
        }
        if self.have < self.need {
            if self.more.len() == MAX_PIECES {
                return Err(DropReason::TxBadDescriptor);
            }
            let len = len.min(self.need - self.have);
            self.more.push(Piece { addr, gpa, len });
            self.have += len;
        }
        Ok(())
    }
}

/// Writes bytes one after another into pieces.
struct Writer<'a> {
    more: core::slice::Iter<'a, Piece>,
    addr: *mut u8,
    left: u32,
}

impl<'a> Writer<'a> {
    fn new(first: Piece, more: &'a [Piece]) -> Self {
        Self { more: more.iter(), addr: first.addr, left: first.len }
    }

    /// # Safety
    /// `src` has `len` readable bytes; the pieces are mapped and writable.
    #[inline]
    unsafe fn write(&mut self, mut src: *const u8, mut len: u32) {
        while len > 0 {
            if self.left == 0 {
                // The pieces together hold the frame (checked before); should they not, the rest is cut off here.
                let Some(p) = self.more.next() else { return };
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

/// Sends the chosen frames in order and makes them visible. Returns whether the guest wants to be notified, and the
/// fault that ended the burst early.
pub(super) fn send<'f, F: Format>(
    queue: &mut F,
    core: &mut Core,
    scratch: &mut Scratch,
    frames: impl Fn(usize) -> Option<TxFrame<'f>> + Copy,
    chosen: u64,
    report: &mut TxReport,
    counters: &VringCounters,
) -> (bool, Option<Fault>) {
    let count = chosen.count_ones() as u16;
    queue.stage::<RoomSink<'_>>(core, count, true);
    queue.prefetch_used(count);
    core.followed = 0;
    let (mut left, mut refused, mut used) = (chosen, 0, 0);
    let mut fault = None;
    loop {
        // Frames that fit into one buffer each, which is what most do.
        let sent = send_staged(queue, core, frames, &mut left);
        used += u64::from(sent);
        let Some(i) = Frames(left).next() else { break };
        left &= left - 1;
        let placed = if core.followed > MAX_BURST_DESCRIPTORS {
            Err(Obstacle::Frame(DropReason::TxQueueFull))
        } else if let Some(frame) = frames(i) {
            place(queue, core, scratch, &frame, &mut used, counters)
        } else {
            Err(Obstacle::Frame(DropReason::TxNotReady))
        };
        match placed {
            Ok(()) => {
                if queue.staged().is_empty() {
                    // The next ones may fit again.
                    queue.stage::<RoomSink<'_>>(core, left.count_ones() as u16, false);
                }
            }
            Err(Obstacle::Frame(reason)) => {
                report.refuse(i, reason);
                refused |= 1 << i;
            }
            Err(Obstacle::Ring(f)) => {
                report.refuse(i, DropReason::TxBadDescriptor);
                report.refuse_all(left, DropReason::TxNotReady);
                refused |= left | 1 << i;
                fault = Some(f);
                break;
            }
        }
    }
    report.accepted |= chosen & !refused;
    let notify = if used > 0 {
        counters.chains.add(used);
        queue.publish(core)
    } else {
        false
    };
    if fault.is_none() {
        // The buffers of the next burst come in while this one travels.
        queue.stage::<RoomSink<'_>>(core, BURST as u16, true);
    }
    (notify, fault)
}

/// Sends frames, those whose bits are set in `left`, as long as each fits into the next staged chain and is not to be segmented. Returns how
/// many; their bits are taken away.
#[inline(always)]
fn send_staged<'f, F: Format>(
    queue: &mut F,
    core: &mut Core,
    frames: impl Fn(usize) -> Option<TxFrame<'f>>,
    left: &mut u64,
) -> u16 {
    let header_len = core.header_len;
    let checksums = core.features & feature::GUEST_CSUM != 0;
    let mut rest = *left;
    let staged = queue.staged();
    let most = staged.len().min(rest.count_ones() as usize);
    for one in staged.get_mut(..most).unwrap_or_default() {
        let Some(frame) = frames(rest.trailing_zeros() as usize) else { break };
        let Some(header) = net_header::encode_simple(&frame.offload, checksums) else { break };
        let need = u64::from(header_len) + frame.head.len() as u64 + u64::from(frame.body.len());
        if u64::from(one.len) < need {
            break;
        }
        one.len = need as u32;
        // SAFETY: the buffer was translated from a checked descriptor, holds `need` bytes, and stays mapped until the ring is stopped; the
        // frame's own bytes are readable until its burst is released.
        unsafe { write_frame_at(one.addr, header, header_len, &frame) };
        rest &= rest.wrapping_sub(1);
    }
    let sent = (*left ^ rest).count_ones() as u16;
    *left = rest;
    queue.use_staged(core, sent);
    sent
}

/// Places one frame, into whatever chains there are.
#[inline(never)]
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
    let mut at = queue.position();
    scratch.pieces.clear();
    scratch.chains.clear();
    let none = Piece { addr: core::ptr::null_mut(), gpa: 0, len: 0 };
    let mut sink = RoomSink { first: none, more: &mut scratch.pieces, need, have: 0 };
    let Some((chain, result)) = queue.peek(core, &mut at, &mut sink)? else {
        return Err(Obstacle::Frame(DropReason::TxQueueFull));
    };
    if result.is_err() || sink.have == 0 {
        return Err(give_back(queue, core, &scratch.chains, chain, at, used, counters));
    }
    let first_got = sink.have;
    if first_got < need {
        // 5.1.6.3.2: a frame is spread over several chains only with MRG_RXBUF.
        if core.features & feature::MRG_RXBUF == 0 {
            return Err(Obstacle::Frame(DropReason::TxTooLong));
        }
        scratch.chains.push((chain, first_got));
        merge(queue, core, &mut scratch.chains, &mut at, &mut sink, used, counters)?;
    }
    let RoomSink { first, .. } = sink;
    // 5.1.6.4.1: num_buffers is 1 without MRG_RXBUF.
    let chains = scratch.chains.len().max(1);
    let header = net_header::encode(&frame.offload, chains as u16, core.features).map_err(Obstacle::Frame)?;
    // SAFETY: the pieces were translated from checked descriptors, hold `need` bytes together, and stay mapped until the
    // ring is stopped; the frame's own bytes are readable until its burst is released.
    unsafe { write_frame(first, &scratch.pieces, header, header_len, frame) };
    if core.log.is_some() {
        core.log_data(first.gpa, first.len);
        for piece in &scratch.pieces {
            core.log_data(piece.gpa, piece.len);
        }
    }
    if scratch.chains.is_empty() {
        queue.put_used(core, chain, first_got);
    } else {
        for &(chain, got) in &scratch.chains {
            queue.put_used(core, chain, got);
        }
    }
    *used += chains as u64;
    queue.advance(at);
    Ok(())
}

/// Looks for further chains until the frame has room. `chains` holds the first.
#[inline(never)]
fn merge<F: Format>(
    queue: &mut F,
    core: &mut Core,
    chains: &mut Vec<(Chain, u32)>,
    at: &mut F::Position,
    sink: &mut RoomSink<'_>,
    used: &mut u64,
    counters: &VringCounters,
) -> Result<(), Obstacle> {
    while sink.have < sink.need {
        if chains.len() == MAX_PIECES {
            return Err(Obstacle::Frame(DropReason::TxTooLong));
        }
        let before = sink.have;
        let Some((chain, result)) = queue.peek(core, at, sink)? else {
            return Err(Obstacle::Frame(DropReason::TxQueueFull));
        };
        let got = sink.have - before;
        if result.is_err() || got == 0 {
            return Err(give_back(queue, core, chains, chain, *at, used, counters));
        }
        chains.push((chain, got));
    }
    Ok(())
}

/// Returns a malformed chain, and in front of it those that were already collected for the frame: chains go back in
/// order, and otherwise the same chain would stop every frame of this size.
#[cold]
#[inline(never)]
fn give_back<F: Format>(
    queue: &mut F,
    core: &mut Core,
    chains: &[(Chain, u32)],
    bad: Chain,
    at: F::Position,
    used: &mut u64,
    counters: &VringCounters,
) -> Obstacle {
    for (good, _) in chains {
        queue.put_used(core, *good, 0);
    }
    queue.put_used(core, bad, 0);
    *used += chains.len() as u64 + 1;
    queue.advance(at);
    counters.bad_chains.add(1);
    Obstacle::Frame(DropReason::TxBadDescriptor)
}

/// Header, head and body into one buffer.
///
/// # Safety
/// The buffer at `to` is mapped, writable and holds header and frame; the frame's bytes are readable.
#[inline(always)]
unsafe fn write_frame_at(mut to: *mut u8, header: RawHeader, header_len: u32, frame: &TxFrame<'_>) {
    // SAFETY: each part lies inside the buffer.
    unsafe {
        to.cast::<u64>().write_unaligned(header.low.to_le());
        let rest = to.add(8);
        if header_len == 12 {
            rest.cast::<u32>().write_unaligned(header.high.to_le());
        } else {
            rest.cast::<u16>().write_unaligned((header.high as u16).to_le());
        }
        to = to.add(header_len as usize);
        copy(to, frame.head.as_ptr(), frame.head.len());
        if !frame.body.is_empty() {
            write_body(to.add(frame.head.len()), frame.body);
        }
    }
}

/// # Safety
/// The buffer at `to` is mapped, writable and holds the body, whose bytes are readable.
#[inline(never)]
unsafe fn write_body(mut to: *mut u8, body: Body<'_>) {
    if let Some((src, len)) = body.in_one_piece() {
        // SAFETY: as said.
        unsafe { copy(to, src, len as usize) };
        return;
    }
    for (src, len) in body.pieces() {
        // SAFETY: each piece lies inside the buffer.
        unsafe {
            copy(to, src, len as usize);
            to = to.add(len as usize);
        }
    }
}

/// Header, head and body into the pieces.
///
/// # Safety
/// The pieces are mapped, writable and hold header and frame; the frame's bytes are readable.
#[inline(always)]
unsafe fn write_frame(first: Piece, more: &[Piece], header: RawHeader, header_len: u32, frame: &TxFrame<'_>) {
    if more.is_empty() {
        // SAFETY: the one piece holds everything.
        unsafe { write_frame_at(first.addr, header, header_len, frame) };
        return;
    }
    let mut writer = Writer::new(first, more);
    // SAFETY: as the caller vouches.
    unsafe {
        writer.write(header.to_bytes().as_ptr(), header_len);
        writer.write(frame.head.as_ptr(), frame.head.len() as u32);
        for (src, len) in frame.body.pieces() {
            writer.write(src, len);
        }
    }
}
