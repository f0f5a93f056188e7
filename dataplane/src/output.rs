//! The way out: sends the batches that routing made, finishing whatever work a frame still owes and its output does
//! not take over (VLAN tags, checksums, segmentation), and settles the burst's ledger.
use arrayvec::ArrayVec;

use crate::bridge::fdb::PortId;
use crate::bridge::{Forwarding, PortEntry};
use crate::counters::{DropReason, RxLedger, TxLedger};
use crate::frame::{BURST, FrameMeta, Frames, Gso, MAX_FRAME_BYTES, Offload, RxBurst, TxFrame};
use crate::offload::{REWRITE_BYTES, Segment, SegmentChecksum, Segmenter, VlanAction, finish_checksum, rewrite_l2};
use crate::packet;
use crate::port::{TxCapabilities, TxPort, TxReport};
use crate::qsbr::Guard;

/// A private header under construction.
#[repr(C, align(64))]
#[derive(Clone)]
struct Head([u8; REWRITE_BYTES]);

/// Frames of the current burst that go to one output, in their order in the burst.
pub struct Batch {
    /// Bit i: frame i.
    frames: u64,
    /// Bit i: something is done to frame i's tags, namely that action.
    edited: u64,
    actions: [VlanAction; BURST],
}

impl Default for Batch {
    fn default() -> Self {
        Self { frames: 0, edited: 0, actions: [VlanAction::Keep; BURST] }
    }
}

impl Batch {
    /// True when nothing was added.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }
    /// Adds the frames whose bits are set; each frame goes at most once to an output.
    #[inline(always)]
    pub fn push(&mut self, frames: u64, action: VlanAction) {
        self.frames |= frames;
        if action != VlanAction::Keep {
            self.edit(frames, action);
        }
    }
    #[inline(never)]
    fn edit(&mut self, frames: u64, action: VlanAction) {
        self.edited |= frames;
        for i in Frames(frames) {
            if let Some(to) = self.actions.get_mut(i) {
                *to = action;
            }
        }
    }
    #[inline]
    fn action(&self, i: usize) -> VlanAction {
        if self.edited >> (i % BURST) & 1 == 0 {
            return VlanAction::Keep;
        }
        self.actions.get(i).copied().unwrap_or(VlanAction::Keep)
    }
    #[inline]
    fn clear(&mut self) {
        self.frames = 0;
        self.edited = 0;
    }
}

/// How one frame of a batch is to be sent.
#[derive(Clone, Copy)]
enum Plan {
    /// The snapshot as it is, then the body.
    AsIs,
    /// The rewritten header of this many bytes, replacing this many bytes of the source.
    Rewritten { head_len: u16, replaced: u16, offload: Offload },
    /// As [`Plan::Rewritten`], to be segmented first.
    Segment { head_len: u16, replaced: u16, offload: Offload },
    /// Not at all.
    Refuse(DropReason),
}

/// Per-thread scratch and the verdicts of the burst under way.
pub struct Sender {
    /// Bit i: frame i reached at least one output.
    delivered: u64,
    /// Bit i: frame i is a fragment that was kept.
    held: u64,
    /// Why frame i did not, if it did not.
    reasons: [DropReason; BURST],
    heads: Box<[Head]>,
    segment_heads: Box<[Head]>,
    report: TxReport,
}

impl Default for Sender {
    fn default() -> Self {
        let heads = || vec![Head([0; REWRITE_BYTES]); BURST].into_boxed_slice();
        Self {
            delivered: 0,
            held: 0,
            reasons: [DropReason::NoDestination; BURST],
            heads: heads(),
            segment_heads: heads(),
            report: TxReport::default(),
        }
    }
}

impl Sender {
    /// Starts a burst: no frame is decided.
    #[inline]
    pub(crate) fn begin(&mut self) {
        self.delivered = 0;
        self.held = 0;
    }

    /// Frame `i` was kept: it is neither forwarded nor dropped.
    #[inline]
    pub(crate) fn hold(&mut self, i: usize) {
        self.held |= 1 << i;
    }

    /// Frame `i` is dropped for `reason`, unless another copy arrives.
    #[inline]
    pub(crate) fn fail(&mut self, i: usize, reason: DropReason) {
        if let Some(slot) = self.reasons.get_mut(i) {
            *slot = reason;
        }
    }

    /// No frame of the burst goes anywhere.
    pub(crate) fn fail_all(&mut self, reason: DropReason) {
        self.reasons = [reason; BURST];
    }

    /// Sends all batches and empties them.
    #[inline]
    pub(crate) fn send_all<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &RxBurst,
        forwarding: &Forwarding<T>,
        batches: &mut [Batch],
        active: &mut Vec<PortId>,
    ) {
        for &output in active.iter() {
            let Some(batch) = batches.get_mut(usize::from(output)) else { continue };
            if let Some(port) = forwarding.port(output) {
                self.send_batch(guard, burst, port, batch);
            }
            batch.clear();
        }
        active.clear();
    }

    /// Counts the burst: every frame under exactly one heading.
    #[inline]
    pub(crate) fn settle(&mut self, burst: &RxBurst, ledger: &RxLedger) {
        let mask = burst.all();
        let delivered = self.delivered & mask;
        let mut frames = burst.len() as u64;
        ledger.forwarded.add(burst.count_of(delivered) as u64);
        let held = self.held & mask & !delivered;
        if held != 0 {
            ledger.held.add(u64::from(held.count_ones()));
        }
        for i in Frames(mask & !delivered & !held) {
            let reason = self.reasons.get(i).copied().unwrap_or(DropReason::NoDestination);
            ledger.drop_frames(reason, 1);
        }
        if let Some(rejected) = burst.rejected() {
            for (reason, &count) in DropReason::ALL.iter().zip(rejected) {
                if count > 0 {
                    ledger.drop_frames(*reason, u64::from(count));
                    frames += u64::from(count);
                }
            }
        }
        ledger.frames.add(frames);
        ledger.bytes.add(burst.bytes_of(mask));
        self.delivered = 0;
        self.held = 0;
    }

    fn send_batch<T: TxPort>(&mut self, guard: &Guard, burst: &RxBurst, port: &PortEntry<T>, batch: &Batch) {
        let Some(ledger) = port.tx_ledgers.get(guard.index()) else { return };
        if !port.admin_up {
            for i in Frames(batch.frames) {
                self.refuse(i, DropReason::TxAdminDown, ledger);
            }
            return;
        }
        let mut caps = port.capabilities(guard);
        caps.max_frame_bytes = match (caps.max_frame_bytes, port.max_frame_bytes) {
            (0, limit) | (limit, 0) => limit,
            (a, b) => a.min(b),
        };
        if port.divert.is_none() && goes_as_is(burst, batch, &caps) {
            self.send_as_is(guard, burst, port, ledger, batch.frames);
        } else {
            self.send_finished(guard, burst, port, ledger, batch, &caps);
        }
        if port.divert.is_none() {
            port.tx.flush(guard, guard.index());
        }
    }

    /// Sends frames to which nothing has to be done.
    #[inline]
    fn send_as_is<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &RxBurst,
        port: &PortEntry<T>,
        ledger: &TxLedger,
        frames: u64,
    ) {
        self.report.reset(DropReason::TxNotReady);
        port.tx.send_received(guard, guard.index(), burst, frames, &mut self.report);
        let sent = self.report.accepted & frames;
        self.delivered |= sent;
        ledger.frames.add(burst.count_of(sent) as u64);
        ledger.bytes.add(burst.bytes_of(sent));
        for i in Frames(frames & !sent) {
            let reason = self.report.reason.get(i).copied().unwrap_or(DropReason::TxNotReady);
            self.refuse(i, reason, ledger);
        }
    }

    /// Sends the batch, whatever has to be done to its frames.
    #[inline(never)]
    fn send_finished<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &RxBurst,
        port: &PortEntry<T>,
        ledger: &TxLedger,
        batch: &Batch,
        caps: &TxCapabilities,
    ) {
        let items: ArrayVec<u8, BURST> = Frames(batch.frames).map(|i| i as u8).collect();
        let mut plans = ArrayVec::<Plan, BURST>::new();
        for (slot, &i) in items.iter().enumerate() {
            let i = usize::from(i);
            plans.push(self.plan(burst, slot, i, batch.action(i), caps));
        }
        // Runs of ordinary frames go out in one piece; a frame to be segmented goes between them, so that order is kept.
        let mut from = 0;
        for (slot, plan) in plans.iter().enumerate() {
            if let Plan::Segment { head_len, replaced, offload } = *plan {
                self.send_run(guard, burst, port, ledger, &items, &plans, from..slot, caps);
                from = slot + 1;
                let i = items.get(slot).map_or(0, |&i| usize::from(i));
                self.send_segments(guard, burst, port, ledger, slot, i, head_len, replaced, offload, caps);
            }
        }
        self.send_run(guard, burst, port, ledger, &items, &plans, from..plans.len(), caps);
    }

    /// What has to be done to frame `i` (place `slot` in the batch) before this output can take it.
    fn plan(&mut self, burst: &RxBurst, slot: usize, i: usize, action: VlanAction, caps: &TxCapabilities) -> Plan {
        let Some(meta) = burst.meta(i) else { return Plan::Refuse(DropReason::RxBadHeader) };
        let owed = meta.offload;
        let plain = owed.gso == Gso::None;
        if action == VlanAction::Keep && takes_over(&owed, caps) {
            let too_long = too_long(wire_len(&owed, meta.len), caps);
            return if too_long { Plan::Refuse(DropReason::TxTooLong) } else { Plan::AsIs };
        }
        let snapshot = burst.snapshot(i);
        let Some(Head(head)) = self.heads.get_mut(slot) else { return Plan::Refuse(DropReason::OffloadFailed) };
        let mut offload = owed;
        let rewritten = packet::parse_l2(snapshot, meta.len)
            .ok()
            .and_then(|l2| rewrite_l2(snapshot, &l2, head, action, &mut offload));
        let Some(head_len) = rewritten else { return Plan::Refuse(DropReason::RxBadHeader) };
        let replaced = snapshot.len() as u16;
        let len = meta.len - u32::from(replaced) + head_len as u32;
        let head_len = head_len as u16;
        if plain {
            if too_long(len, caps) {
                return Plan::Refuse(DropReason::TxTooLong);
            }
            if offload.needs_csum && !caps.csum {
                let body = burst.body(i, u32::from(replaced));
                let Some(head) = head.get_mut(..usize::from(head_len)) else {
                    return Plan::Refuse(DropReason::OffloadFailed);
                };
                if !finish_checksum(head, body, &mut offload) {
                    return Plan::Refuse(DropReason::OffloadFailed);
                }
            }
            return Plan::Rewritten { head_len, replaced, offload };
        }
        if too_long(wire_len(&offload, len), caps) {
            return Plan::Refuse(DropReason::TxTooLong);
        }
        if takes_over(&offload, caps) {
            Plan::Rewritten { head_len, replaced, offload }
        } else {
            Plan::Segment { head_len, replaced, offload }
        }
    }

    /// Sends the frames `range` of the batch, none of which is to be segmented.
    #[expect(clippy::too_many_arguments, reason = "facts of one batch")]
    fn send_run<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &RxBurst,
        port: &PortEntry<T>,
        ledger: &TxLedger,
        items: &[u8],
        plans: &[Plan],
        range: core::ops::Range<usize>,
        caps: &TxCapabilities,
    ) {
        let mut frames = ArrayVec::<TxFrame<'_>, BURST>::new();
        let mut numbers = ArrayVec::<u8, BURST>::new();
        for slot in range {
            let (Some(plan), Some(&i)) = (plans.get(slot), items.get(slot)) else { continue };
            let snapshot = burst.snapshot(usize::from(i));
            let flow_hash = if caps.multiqueue { packet::flow_hash(snapshot) } else { 0 };
            let (head, skip, offload) = match *plan {
                Plan::AsIs => {
                    let offload = burst.meta(usize::from(i)).map(|m| m.offload).unwrap_or_default();
                    (snapshot, snapshot.len() as u32, offload)
                }
                Plan::Rewritten { head_len, replaced, offload } => {
                    let head = self.heads.get(slot).and_then(|h| h.0.get(..usize::from(head_len))).unwrap_or_default();
                    (head, u32::from(replaced), offload)
                }
                Plan::Refuse(reason) => {
                    refuse(&mut self.reasons, usize::from(i), reason, ledger);
                    continue;
                }
                Plan::Segment { .. } => continue,
            };
            frames.push(TxFrame { head, body: burst.body(usize::from(i), skip), offload, flow_hash });
            numbers.push(i);
        }
        if !frames.is_empty() {
            transmit(
                (&mut self.delivered, &mut self.reasons, &mut self.report),
                guard,
                port,
                ledger,
                &frames,
                &numbers,
            );
        }
    }

    /// Segments frame `i` in software and sends the pieces. It counts as forwarded when any of them was taken.
    #[expect(clippy::too_many_arguments, reason = "facts of one frame")]
    #[cold]
    fn send_segments<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &RxBurst,
        port: &PortEntry<T>,
        ledger: &TxLedger,
        slot: usize,
        i: usize,
        head_len: u16,
        replaced: u16,
        offload: Offload,
        caps: &TxCapabilities,
    ) {
        let head = self.heads.get(slot).and_then(|h| h.0.get(..usize::from(head_len))).unwrap_or_default();
        let body = burst.body(i, u32::from(replaced));
        let flow_hash = if caps.multiqueue { packet::flow_hash(head) } else { 0 };
        let checksum = if caps.csum { SegmentChecksum::Partial } else { SegmentChecksum::Finish };
        let frame_len = (head.len() as u32).saturating_add(body.len());
        let segmenter = packet::parse(head, frame_len)
            .ok()
            .and_then(|headers| Segmenter::new(head, &headers, body, &offload, checksum).ok());
        let Some(mut segmenter) = segmenter else {
            refuse(&mut self.reasons, i, DropReason::OffloadFailed, ledger);
            return;
        };
        let mut done = false;
        while !done {
            let mut pieces = ArrayVec::<Segment<'_>, BURST>::new();
            for Head(out) in self.segment_heads.iter_mut() {
                match segmenter.next_segment(out) {
                    Some(piece) => pieces.push(piece),
                    None => {
                        done = true;
                        break;
                    }
                }
            }
            let frames: ArrayVec<TxFrame<'_>, BURST> = pieces
                .iter()
                .zip(self.segment_heads.iter())
                .map(|(piece, out)| TxFrame {
                    head: out.0.get(..piece.head_len).unwrap_or_default(),
                    body: piece.body,
                    offload: piece.offload,
                    flow_hash,
                })
                .collect();
            if frames.is_empty() {
                break;
            }
            self.report.reset(DropReason::TxNotReady);
            port.send(guard, &frames, &mut self.report);
            for (k, frame) in frames.iter().enumerate() {
                if self.report.accepted >> k & 1 == 1 {
                    self.delivered |= 1 << i;
                    ledger.frames.add(1);
                    ledger.bytes.add(u64::from(frame.len()));
                } else {
                    let reason = self.report.reason.get(k).copied().unwrap_or(DropReason::TxNotReady);
                    refuse(&mut self.reasons, i, reason, ledger);
                }
            }
        }
    }

    fn refuse(&mut self, i: usize, reason: DropReason, ledger: &TxLedger) {
        refuse(&mut self.reasons, i, reason, ledger);
    }
}

#[inline]
fn refuse(reasons: &mut [DropReason; BURST], i: usize, reason: DropReason, ledger: &TxLedger) {
    if let Some(slot) = reasons.get_mut(i) {
        *slot = reason;
    }
    if let Some(c) = ledger.refused.get(reason as usize) {
        c.add(1);
    }
}

/// Sends frames, of which `numbers` are the places in the burst, and counts. `verdicts`: which were accepted, and why others were not.
#[inline]
fn transmit<T: TxPort>(
    verdicts: (&mut u64, &mut [DropReason; BURST], &mut TxReport),
    guard: &Guard,
    port: &PortEntry<T>,
    ledger: &TxLedger,
    frames: &[TxFrame<'_>],
    numbers: &[u8],
) {
    let (delivered, reasons, report) = verdicts;
    report.reset(DropReason::TxNotReady);
    port.send(guard, frames, report);
    settle(delivered, reasons, report, ledger, frames, numbers.iter().copied());
}

/// Counts what a port said about frames, of which `numbers` are the places in the burst.
#[inline]
fn settle(
    delivered: &mut u64,
    reasons: &mut [DropReason; BURST],
    report: &TxReport,
    ledger: &TxLedger,
    frames: &[TxFrame<'_>],
    numbers: impl Iterator<Item = u8>,
) {
    let (mut sent, mut bytes, mut arrived) = (0u64, 0u64, 0u64);
    for (k, (i, frame)) in numbers.zip(frames).enumerate() {
        if report.accepted >> k & 1 == 1 {
            arrived |= 1 << (i & 63);
            sent += 1;
            bytes += u64::from(frame.len());
        } else {
            let reason = report.reason.get(k).copied().unwrap_or(DropReason::TxNotReady);
            refuse(reasons, usize::from(i), reason, ledger);
        }
    }
    *delivered |= arrived;
    ledger.frames.add(sent);
    ledger.bytes.add(bytes);
}

/// Nothing has to be done to any frame of the batch.
#[inline(always)]
fn goes_as_is(burst: &RxBurst, batch: &Batch, caps: &TxCapabilities) -> bool {
    // Mostly that is seen at once.
    batch.edited == 0
        && (!burst.is_owing() && !too_long(burst.longest(), caps) || go_as_they_are(burst, batch.frames, caps))
}

#[inline(never)]
fn go_as_they_are(burst: &RxBurst, frames: u64, caps: &TxCapabilities) -> bool {
    Frames(frames).all(|i| {
        let goes =
            |meta: &FrameMeta| takes_over(&meta.offload, caps) && !too_long(wire_len(&meta.offload, meta.len), caps);
        burst.meta(i).is_some_and(goes)
    })
}

/// Nothing is owed that the output does not take over.
#[inline(always)]
fn takes_over(owed: &Offload, caps: &TxCapabilities) -> bool {
    let segments = match owed.gso {
        Gso::None => return !owed.needs_csum || caps.csum,
        Gso::TcpV4 => caps.tso4,
        Gso::TcpV6 => caps.tso6,
    };
    segments && caps.csum && (!owed.ecn || caps.ecn)
}

/// The size on the wire, after segmentation: it decides whether the output can carry a frame.
#[inline(always)]
fn wire_len(owed: &Offload, len: u32) -> u32 {
    match owed.gso {
        Gso::None => len,
        _ => len.min(u32::from(owed.hdr_len) + u32::from(owed.gso_size)),
    }
}

#[inline]
fn too_long(len: u32, caps: &TxCapabilities) -> bool {
    len > MAX_FRAME_BYTES || (caps.max_frame_bytes != 0 && len > caps.max_frame_bytes)
}
