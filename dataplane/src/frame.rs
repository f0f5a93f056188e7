//! Frames on their way through the switch: where their bytes lie and what is still owed to them.
//!
//! A received frame stays in the memory of the port it came from (guest buffers, mbufs) until its
//! burst is released. Guest memory may change at any moment, so decisions are only ever taken on the
//! *snapshot*: a private copy of the frame's first bytes. Output is snapshot bytes (possibly
//! rewritten) followed by a copy of the remaining bytes straight from the source buffers.
#![allow(unsafe_code)] // Its job: reading port memory through raw pointers.
use crate::copy::copy;
use crate::counters::DropReason;
use crate::memory::prefetch_at;

/// Most frames handled in one go. Accepted frames of a burst are reported in a `u64` mask.
pub const BURST: usize = 64;
/// Private copy of a frame's beginning: enough for Ethernet + two tags + IPv6 with extension headers + TCP options.
pub const SNAPSHOT_BYTES: usize = 256;
/// Bytes copied eagerly per frame; [`RxBurst::extend_snapshot`] fetches the rest for the rare deep header. With a virtio-net header of 12
/// bytes before them, two cache lines.
pub const SNAPSHOT_EAGER_BYTES: usize = 116;
/// Segments that all frames of a burst may have together.
pub const BURST_SEGMENTS: usize = 4096;
/// Longest frame handled: 64 KiB of TSO payload plus headers and tags.
pub const MAX_FRAME_BYTES: u32 = 65_535 + 18 + 8;

/// A contiguous piece of a received frame in port memory.
///
/// Not `Clone`: it can only be reached through the burst that owns it, hence not after release.
#[derive(Debug)]
pub struct Segment {
    addr: *const u8,
    len: u32,
}

impl Segment {
    /// Start address.
    #[inline]
    pub fn addr(&self) -> *const u8 {
        self.addr
    }
    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }
    /// True for a zero-length segment.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

// SAFETY: a Segment is a plain address and length; who dereferences it upholds validity.
unsafe impl Send for Segment {}
// SAFETY: as above; there is no interior state.
unsafe impl Sync for Segment {}

/// Kind of segmentation a frame still needs (virtio 1.3, 5.1.6: `gso_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Gso {
    /// An ordinary frame.
    #[default]
    None = 0,
    /// TCP over IPv4, VIRTIO_NET_HDR_GSO_TCPV4.
    TcpV4 = 1,
    /// TCP over IPv6, VIRTIO_NET_HDR_GSO_TCPV6.
    TcpV6 = 4,
}

/// Checksum and segmentation work that a frame carries along, in the terms of `virtio_net_hdr`
/// (virtio 1.3, 5.1.6), whatever kind of port it came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct Offload {
    /// The L4 checksum field holds only the pseudo-header sum: someone must finish it (NEEDS_CSUM).
    pub needs_csum: bool,
    /// The L4 checksum was verified by someone trusted (DATA_VALID).
    pub csum_valid: bool,
    /// Segmentation owed.
    pub gso: Gso,
    /// GSO_ECN: the first segment alone carries CWR.
    pub ecn: bool,
    /// Length of all headers in front of the L4 payload, bytes (a hint of the sender; recomputed before use).
    pub hdr_len: u16,
    /// L4 payload bytes per segment.
    pub gso_size: u16,
    /// Where checksumming starts, bytes from the frame's start.
    pub csum_start: u16,
    /// Where the checksum is stored, bytes from `csum_start`.
    pub csum_offset: u16,
}

/// What the burst knows about one frame.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
pub struct FrameMeta {
    /// Frame length in bytes, without any virtio-net header.
    pub len: u32,
    /// First segment of this frame within the burst.
    pub first_segment: u16,
    /// Number of segments.
    pub segments: u16,
    /// Work owed.
    pub offload: Offload,
    /// Valid bytes in the snapshot.
    pub snapshot_len: u16,
}

/// Private header copy; its own cache lines.
#[repr(C, align(64))]
#[derive(Clone)]
struct Snapshot([u8; SNAPSHOT_BYTES]);

static NOTHING: [u8; SNAPSHOT_BYTES] = [0; SNAPSHOT_BYTES];

/// A burst of received frames. Allocated once per PMD thread and reused.
pub struct RxBurst {
    meta: Box<[FrameMeta; BURST]>,
    snapshots: Box<[Snapshot; BURST]>,
    segments: Vec<Segment>,
    len: usize,
    /// Bytes of all frames, and of the longest.
    bytes: u64,
    longest: u32,
    /// Some frames have no snapshot yet.
    unread: bool,
    /// Some frames may owe something.
    owing: bool,
    /// Frames the port refused before they became frames (malformed descriptors ...), by reason.
    rejected: [u32; DropReason::COUNT],
    any_rejected: bool,
    /// Bytes of frames that are not in a port's memory.
    private: Vec<u8>,
}

impl Default for RxBurst {
    fn default() -> Self {
        Self::new()
    }
}

impl RxBurst {
    /// An empty burst with room for [`BURST`] frames and [`BURST_SEGMENTS`] segments.
    pub fn new() -> Self {
        Self {
            meta: Box::new([FrameMeta::default(); BURST]),
            snapshots: Box::new([const { Snapshot([0; SNAPSHOT_BYTES]) }; BURST]),
            segments: Vec::with_capacity(BURST_SEGMENTS),
            len: 0,
            bytes: 0,
            longest: 0,
            unread: false,
            owing: false,
            rejected: [0; DropReason::COUNT],
            any_rejected: false,
            private: Vec::new(),
        }
    }

    /// Forgets all frames. The port must have released their buffers.
    #[inline]
    pub fn clear(&mut self) {
        self.len = 0;
        self.bytes = 0;
        self.longest = 0;
        self.unread = false;
        self.owing = false;
        self.segments.clear();
        if self.any_rejected {
            self.rejected = [0; DropReason::COUNT];
            self.any_rejected = false;
        }
    }

    /// Number of frames.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Bit i: frame i is there.
    #[inline]
    pub fn all(&self) -> u64 {
        if self.len >= BURST { u64::MAX } else { (1 << self.len) - 1 }
    }
    /// Bytes of the frames whose bit is set.
    #[inline]
    pub fn bytes_of(&self, frames: u64) -> u64 {
        if frames & self.all() == self.all() {
            return self.bytes;
        }
        Frames(frames).filter_map(|i| self.meta(i)).map(|meta| u64::from(meta.len)).sum()
    }
    /// How many frames have their bit set.
    #[inline]
    pub fn count_of(&self, frames: u64) -> usize {
        // Mostly it is all of them. Not every processor that this is built for counts bits by itself.
        if frames & self.all() == self.all() { self.len } else { (frames & self.all()).count_ones() as usize }
    }
    /// Length of the longest frame.
    #[inline]
    pub fn longest(&self) -> u32 {
        self.longest
    }
    /// True when no frame is held.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// True when no further frame fits.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.len >= BURST
    }
    /// How many more frames of one piece fit.
    #[inline]
    pub fn room(&self) -> usize {
        (BURST - self.len.min(BURST)).min(self.segment_room())
    }
    /// How many more segments fit; a receive queue stops before a chain that might not.
    #[inline]
    pub fn segment_room(&self) -> usize {
        BURST_SEGMENTS - self.segments.len()
    }

    /// Adds one piece of the frame under construction. Ignored when the burst has no room (the caller
    /// checked [`Self::segment_room`]); zero-length pieces are skipped.
    ///
    /// # Safety
    /// `addr..addr+len` must stay mapped and readable until the burst is cleared (it may be written by others meanwhile).
    #[inline]
    pub unsafe fn push_segment(&mut self, addr: *const u8, len: u32) {
        if len != 0 && self.segments.len() < BURST_SEGMENTS {
            self.segments.push(Segment { addr, len });
        }
    }

    /// Takes in the bytes of frames that are not in a port's memory (the switch's own, released fragments): `bytes` and what the
    /// burst had change places. The burst must be empty; frames are made of them by [`Self::push_private`].
    pub fn load_private(&mut self, bytes: &mut Vec<u8>) {
        self.clear();
        core::mem::swap(&mut self.private, bytes);
    }

    /// Adds `range` of the private bytes as a piece; clipped to what there is.
    pub fn push_private(&mut self, range: core::ops::Range<usize>) {
        let bytes = self.private.get(range).unwrap_or_default();
        let (addr, len) = (bytes.as_ptr(), bytes.len() as u32);
        // SAFETY: the bytes belong to the burst and change only in `load_private`, which forgets all frames first.
        unsafe { self.push_segment(addr, len) };
    }

    /// Number of segments pushed so far: pass it to [`Self::abandon_frame`] or [`Self::finish_frame`].
    #[inline]
    pub fn segment_mark(&self) -> usize {
        self.segments.len()
    }

    /// Drops the segments pushed since `mark`.
    #[inline]
    pub fn abandon_frame(&mut self, mark: usize) {
        self.segments.truncate(mark);
    }

    /// Completes the frame whose segments were pushed since `mark`. Returns false, abandoning it, when the burst is full.
    #[inline]
    pub fn finish_frame(&mut self, mark: usize, offload: Offload) -> bool {
        let count = self.segments.len().saturating_sub(mark);
        let len = match self.segments.get(mark..).unwrap_or_default() {
            [one] => one.len,
            more => more.iter().map(|s| s.len).fold(0u32, u32::saturating_add),
        };
        let Some(meta) = self.meta.get_mut(self.len) else {
            self.abandon_frame(mark);
            return false;
        };
        *meta = FrameMeta { len, first_segment: mark as u16, segments: count as u16, snapshot_len: 0, offload };
        self.len += 1;
        self.bytes += u64::from(len);
        self.longest = self.longest.max(len);
        self.unread = true;
        self.owing |= offload != Offload::default();
        true
    }

    /// Adds frames of one piece each.
    #[inline(always)]
    pub fn fill(&mut self) -> Filler<'_> {
        Filler {
            metas: self.meta.as_mut_ptr(),
            snapshots: self.snapshots.as_mut_ptr(),
            segments: self.segments.as_mut_ptr(),
            at: self.len,
            first: self.len,
            end: self.len + self.room(),
            first_segment: self.segments.len(),
            bytes: self.bytes,
            longest: self.longest,
            owing: self.owing,
            burst: self,
        }
    }

    /// Some frame's [`FrameMeta::offload`] may be other than the default.
    #[inline]
    pub fn is_owing(&self) -> bool {
        self.owing
    }

    /// Counts a frame that the port had to refuse before it could be handed over. It counts as received and dropped.
    #[inline]
    pub fn reject(&mut self, reason: DropReason) {
        if let Some(n) = self.rejected.get_mut(reason as usize) {
            *n = n.saturating_add(1);
            self.any_rejected = true;
        }
    }

    /// Refused frames by reason, when there are any.
    #[inline]
    pub fn rejected(&self) -> Option<&[u32; DropReason::COUNT]> {
        self.any_rejected.then_some(&self.rejected)
    }

    /// Takes the private header copy of every frame that has none; header lines are prefetched a few frames ahead.
    #[inline]
    pub fn take_snapshots(&mut self) {
        if self.unread {
            self.take_missing_snapshots();
        }
    }

    fn take_missing_snapshots(&mut self) {
        const AHEAD: usize = 8;
        self.unread = false;
        for i in 0..self.len.min(AHEAD) {
            self.prefetch(i);
        }
        for i in 0..self.len {
            self.prefetch(i + AHEAD);
            self.fill_snapshot(i, SNAPSHOT_EAGER_BYTES);
        }
    }

    /// Enlarges frame `i`'s snapshot to [`SNAPSHOT_BYTES`] when its headers reach deeper. Bytes already taken are kept,
    /// so that nothing that was looked at can change.
    #[cold]
    pub fn extend_snapshot(&mut self, i: usize) {
        self.fill_snapshot(i, SNAPSHOT_BYTES);
    }

    #[inline]
    fn prefetch(&self, i: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(meta) = self.meta.get(i)
            && i < self.len
            && let Some(seg) = self.segments.get(meta.first_segment as usize)
        {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: prefetch has no architectural effect whatever the address.
            unsafe { _mm_prefetch(seg.addr.cast::<i8>(), _MM_HINT_T0) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = i;
    }

    #[inline(always)]
    fn fill_snapshot(&mut self, i: usize, want: usize) {
        let (Some(meta), Some(snap)) = (self.meta.get_mut(i), self.snapshots.get_mut(i)) else { return };
        let want = want.min(SNAPSHOT_BYTES).min(meta.len as usize);
        let have = usize::from(meta.snapshot_len);
        if want <= have {
            return;
        }
        if have == 0
            && let Some(seg) = self.segments.get(usize::from(meta.first_segment))
            && seg.len as usize >= want
        {
            // SAFETY: `push_segment`'s caller keeps the segment's bytes, at least `want`, mapped; the snapshot has as many, and port
            // memory is not private memory.
            unsafe { copy(snap.0.as_mut_ptr(), seg.addr, want) };
            meta.snapshot_len = want as u16;
            return;
        }
        let segs = self
            .segments
            .get(meta.first_segment as usize..meta.first_segment as usize + meta.segments as usize)
            .unwrap_or_default();
        let body = Body { segments: segs, skip: have as u32, len: (want - have) as u32 };
        if let Some(dst) = snap.0.get_mut(have..want) {
            let n = body.read(dst);
            meta.snapshot_len = (have + n) as u16;
        }
    }

    /// Frame `i`'s facts.
    #[inline]
    pub fn meta(&self, i: usize) -> Option<&FrameMeta> {
        if i < self.len { self.meta.get(i) } else { None }
    }
    /// Frame `i`'s facts, changeable. An offload that is the default must stay so ([`Self::is_owing`] would not know); validation only mends
    /// what a frame owes already.
    #[inline]
    pub fn meta_mut(&mut self, i: usize) -> Option<&mut FrameMeta> {
        if i < self.len { self.meta.get_mut(i) } else { None }
    }

    /// Frame `i`'s private header copy.
    #[inline]
    pub fn snapshot(&self, i: usize) -> &[u8] {
        match (self.meta.get(i), self.snapshots.get(i)) {
            (Some(m), Some(s)) if i < self.len => s.0.get(..usize::from(m.snapshot_len)).unwrap_or_default(),
            _ => &[],
        }
    }

    /// Frame `i`'s private header copy with the room behind it, and how many bytes of it are the frame's. A frame that is not there has none.
    #[inline(always)]
    pub fn head(&self, i: usize) -> (&[u8; SNAPSHOT_BYTES], usize) {
        match (self.meta.get(i), self.snapshots.get(i)) {
            (Some(m), Some(s)) if i < self.len => (&s.0, usize::from(m.snapshot_len)),
            _ => (&NOTHING, 0),
        }
    }

    /// Frame `i`'s private header copy with the room behind it, and its facts, changeable.
    #[inline(always)]
    pub fn frame_mut(&mut self, i: usize) -> Option<(&[u8; SNAPSHOT_BYTES], &mut FrameMeta)> {
        match (self.meta.get_mut(i), self.snapshots.get(i)) {
            (Some(meta), Some(snapshot)) if i < self.len => Some((&snapshot.0, meta)),
            _ => None,
        }
    }

    /// The frames from `from` on, one after the other: facts, changeable as by [`Self::meta_mut`], and private header copy with the room
    /// behind it.
    #[inline(always)]
    pub(crate) fn frames_mut(
        &mut self,
        from: usize,
    ) -> (impl Iterator<Item = (&mut FrameMeta, &[u8; SNAPSHOT_BYTES])>, Segments<'_>) {
        let range = from..self.len;
        let metas = self.meta.get_mut(range.clone()).unwrap_or_default();
        let snapshots = self.snapshots.get(range).unwrap_or_default();
        (metas.iter_mut().zip(snapshots.iter().map(|snapshot| &snapshot.0)), Segments(&self.segments))
    }

    /// Frame `i` as it is to be sent when nothing is done to it. Without [`TxFrame::flow_hash`].
    #[inline(always)]
    pub fn as_received(&self, i: usize) -> Option<TxFrame<'_>> {
        let (meta, head, body) = self.parts(i)?;
        // Not copied where nothing can be owed: the copy would be waited for.
        let offload = if self.owing { meta.offload } else { Offload::default() };
        Some(TxFrame { head, body, offload, flow_hash: 0 })
    }

    /// Frame `i`'s facts, its snapshot, and the bytes behind that.
    #[inline(always)]
    pub fn parts(&self, i: usize) -> Option<(&FrameMeta, &[u8], Body<'_>)> {
        if i >= self.len {
            return None;
        }
        let (meta, snapshot) = (self.meta.get(i)?, self.snapshots.get(i)?);
        let head = snapshot.0.get(..usize::from(meta.snapshot_len))?;
        let skip = u32::from(meta.snapshot_len);
        if skip == meta.len {
            return Some((meta, head, Body::EMPTY));
        }
        let first = usize::from(meta.first_segment);
        let segments = self.segments.get(first..first + usize::from(meta.segments))?;
        Some((meta, head, Body { segments, skip, len: meta.len.saturating_sub(skip) }))
    }

    /// The bytes of frame `i` from `skip` on, in port memory.
    #[inline]
    pub fn body(&self, i: usize, skip: u32) -> Body<'_> {
        let Some(m) = self.meta(i) else { return Body::EMPTY };
        let first = m.first_segment as usize;
        let segments = self.segments.get(first..first + m.segments as usize).unwrap_or_default();
        Body { segments, skip: skip.min(m.len), len: m.len.saturating_sub(skip) }
    }
}

/// The pieces of a burst's frames.
#[derive(Clone, Copy)]
pub(crate) struct Segments<'a>(&'a [Segment]);

impl<'a> Segments<'a> {
    /// The bytes of a frame that are not in its private header copy.
    pub fn body(self, meta: &FrameMeta) -> Body<'a> {
        let (first, skip) = (usize::from(meta.first_segment), u32::from(meta.snapshot_len));
        let segments = self.0.get(first..first + usize::from(meta.segments)).unwrap_or_default();
        Body { segments, skip, len: meta.len.saturating_sub(skip) }
    }

    /// Fetches what the frame behind this one begins with, up to so many bytes.
    #[inline(always)]
    pub fn fetch_next(self, meta: &FrameMeta, most: u32) {
        let Some(next) = self.0.get(usize::from(meta.first_segment) + usize::from(meta.segments)) else { return };
        for at in (0..next.len.min(most) as usize).step_by(64) {
            prefetch_at(next.addr.wrapping_add(at));
        }
    }
}

/// A bit for each of the frames `first..end` of a burst, of which there is at least one.
#[inline(always)]
pub(crate) const fn run(first: u8, end: u8) -> u64 {
    u64::MAX << (first % 64) & u64::MAX >> (64u8.wrapping_sub(end) % 64)
}

/// Numbers of the frames whose bits are set, in order.
#[derive(Clone, Copy, Debug)]
pub struct Frames(pub u64);

impl Iterator for Frames {
    type Item = usize;
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let i = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(i)
    }
}

/// Adds frames of one piece each to a burst, with their snapshots; the burst has them when this is dropped. Where the next one goes stays in
/// registers meanwhile.
pub struct Filler<'a> {
    burst: &'a mut RxBurst,
    /// The burst's arrays, of [`BURST`], [`BURST`] and [`BURST_SEGMENTS`].
    metas: *mut FrameMeta,
    snapshots: *mut Snapshot,
    segments: *mut Segment,
    /// Number of the next frame; that of the first one added; and at most so many.
    at: usize,
    first: usize,
    end: usize,
    /// Number of the first one's segment.
    first_segment: usize,
    bytes: u64,
    longest: u32,
    owing: bool,
}

impl Filler<'_> {
    /// How many more frames fit.
    #[inline(always)]
    pub fn room(&self) -> usize {
        self.end - self.at
    }

    /// How many were added.
    #[inline(always)]
    pub fn added(&self) -> usize {
        self.at - self.first
    }

    /// Adds a frame of `len` > 0 bytes that owes nothing.
    ///
    /// # Safety
    /// There is [`Self::room`], and `addr..addr+len` stays mapped and readable until the burst is cleared (it may be written by others
    /// meanwhile).
    #[inline(always)]
    pub unsafe fn push(&mut self, addr: *const u8, len: u32) {
        let segment = self.first_segment + self.added();
        debug_assert!(self.at < self.end && self.end <= BURST && segment < BURST_SEGMENTS);
        let eager = (len as usize).min(SNAPSHOT_EAGER_BYTES);
        // SAFETY: there is room by contract: `at` is below BURST and `segment` below BURST_SEGMENTS, the vector's capacity. The frame has
        // `eager` bytes, mapped by contract, and the snapshot has room; port memory is not private memory.
        unsafe {
            copy(self.snapshots.add(self.at).cast(), addr, eager);
            self.segments.add(segment).write(Segment { addr, len });
            self.metas.add(self.at).write(FrameMeta {
                len,
                first_segment: segment as u16,
                segments: 1,
                offload: Offload::default(),
                snapshot_len: eager as u16,
            });
        }
        self.at += 1;
        self.bytes += u64::from(len);
        self.longest = self.longest.max(len);
    }

    /// The frame added last owes this.
    ///
    /// # Safety
    /// One was added.
    #[inline(always)]
    pub unsafe fn owe(&mut self, offload: Offload) {
        // SAFETY: by contract the place is one that was filled.
        unsafe { (*self.metas.add(self.at - 1)).offload = offload };
        self.owing = true;
    }
}

impl Drop for Filler<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let segments = self.first_segment + self.added();
        let burst = &mut *self.burst;
        // SAFETY: `push` wrote all segments up to this one, which is within the capacity.
        unsafe { burst.segments.set_len(segments) };
        burst.len = self.at;
        burst.bytes = self.bytes;
        burst.longest = self.longest;
        burst.owing = self.owing;
    }
}

/// A range of bytes of a received frame, still in port memory: `len` bytes after the first `skip`.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a> {
    segments: &'a [Segment],
    skip: u32,
    len: u32,
}

impl<'a> Body<'a> {
    /// No bytes.
    pub const EMPTY: Body<'static> = Body { segments: &[], skip: 0, len: 0 };

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }
    /// True when there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The sub-range of `len` bytes after the first `offset`, clipped to what there is.
    #[inline]
    pub fn slice(&self, offset: u32, len: u32) -> Body<'a> {
        let offset = offset.min(self.len);
        Body { segments: self.segments, skip: self.skip.saturating_add(offset), len: len.min(self.len - offset) }
    }

    /// The contiguous pieces, in order.
    #[inline]
    pub fn pieces(&self) -> Pieces<'a> {
        Pieces { segments: self.segments.iter(), skip: self.skip, left: self.len }
    }

    /// Address and length, when the frame has but one segment.
    #[inline(always)]
    pub fn in_one_piece(&self) -> Option<(*const u8, u32)> {
        match self.segments {
            [only] if self.skip <= only.len && self.len <= only.len - self.skip => {
                Some((only.addr.wrapping_add(self.skip as usize), self.len))
            }
            _ => None,
        }
    }

    /// Copies into private memory; returns how many bytes were copied (`min` of both lengths).
    #[inline]
    pub fn read(&self, dst: &mut [u8]) -> usize {
        let mut done = 0usize;
        for (addr, len) in self.pieces() {
            let n = (len as usize).min(dst.len() - done);
            // SAFETY: `push_segment`'s caller keeps addr..addr+len mapped while the burst is borrowed;
            // dst has n bytes left at `done`; private and port memory do not overlap.
            unsafe { copy(dst.as_mut_ptr().add(done), addr, n) };
            done += n;
            if done == dst.len() {
                break;
            }
        }
        done
    }
}

/// Iterator over the contiguous pieces `(address, length)` of a [`Body`].
pub struct Pieces<'a> {
    segments: core::slice::Iter<'a, Segment>,
    skip: u32,
    left: u32,
}

impl Iterator for Pieces<'_> {
    type Item = (*const u8, u32);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let seg = self.segments.next()?;
            if self.skip >= seg.len {
                self.skip -= seg.len;
                continue;
            }
            let n = (seg.len - self.skip).min(self.left);
            // SAFETY: skip < seg.len, so the sum stays inside the segment.
            let addr = unsafe { seg.addr.add(self.skip as usize) };
            self.skip = 0;
            self.left -= n;
            return Some((addr, n));
        }
        None
    }
}

/// A frame on its way out: private header bytes, then bytes of a source frame.
#[derive(Clone, Copy, Debug)]
pub struct TxFrame<'a> {
    /// Final header bytes.
    pub head: &'a [u8],
    /// What follows them.
    pub body: Body<'a>,
    /// Work still owed; only what the port's capabilities take.
    pub offload: Offload,
    /// Flow hash, to choose among a port's transmit queues.
    pub flow_hash: u32,
}

impl TxFrame<'_> {
    /// Whole length in bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        (self.head.len() as u32).saturating_add(self.body.len())
    }
    /// True for a frame without bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_the_bits_in_order() {
        assert_eq!(Frames(0).next(), None);
        assert_eq!(Frames(1 | 1 << 7 | 1 << 63).collect::<Vec<_>>(), [0, 7, 63]);
        assert_eq!(Frames(u64::MAX).collect::<Vec<_>>(), (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn a_filler_and_the_long_way_make_the_same_burst() {
        let bytes: Vec<u8> = (0..9100u32).map(|i| (i * 7 + i / 256) as u8).collect();
        let owed = Offload { needs_csum: true, csum_start: 14, csum_offset: 6, ..Offload::default() };
        let mut burst = RxBurst::new();
        for round in 0..3 {
            burst.clear();
            let mut lens = Vec::new();
            for part in 0..4 {
                // A frame of two pieces stands between those that are filled in.
                let mark = burst.segment_mark();
                for piece in [&bytes[..20], &bytes[20..1300]] {
                    // SAFETY: the bytes outlive the burst's use of them.
                    unsafe { burst.push_segment(piece.as_ptr(), piece.len() as u32) };
                }
                assert!(burst.finish_frame(mark, Offload::default()));
                lens.push(1300);
                let before = burst.len();
                let mut filler = burst.fill();
                for len in [14, 60, 64, 65, 115, 116, 117, 1514, 9100] {
                    if filler.room() == 0 {
                        break;
                    }
                    // SAFETY: as above; there is room, and one was added.
                    unsafe {
                        filler.push(bytes.as_ptr(), len);
                        if round == 1 && len == 64 {
                            filler.owe(owed);
                        }
                    }
                    lens.push(len);
                }
                let added = filler.added();
                drop(filler);
                assert_eq!(burst.len(), before + added, "part {part}");
            }
            assert_eq!((burst.len(), burst.is_owing()), (lens.len(), round == 1));
            burst.take_snapshots();
            assert_eq!(burst.longest(), 9100);
            assert_eq!(burst.bytes_of(u64::MAX), lens.iter().map(|&len| u64::from(len)).sum::<u64>());
            assert_eq!(burst.bytes_of(0b101), u64::from(lens[0] + lens[2]));
            assert_eq!([u64::MAX, 0b101, 0].map(|frames| burst.count_of(frames)), [lens.len(), 2, 0]);
            assert_eq!(burst.all().count_ones() as usize, lens.len());
            for (i, &len) in lens.iter().enumerate() {
                let eager = (len as usize).min(SNAPSHOT_EAGER_BYTES);
                assert_eq!(burst.snapshot(i), &bytes[..eager], "frame {i}");
                let frame = burst.as_received(i).unwrap();
                assert_eq!((frame.head.len(), frame.len()), (eager, len));
                let mut rest = vec![0; len as usize - eager];
                assert_eq!(frame.body.read(&mut rest), rest.len());
                assert_eq!(rest, bytes[eager..len as usize], "frame {i}");
                assert_eq!(frame.offload == owed, round == 1 && len == 64, "frame {i}");
            }
            assert!(burst.as_received(lens.len()).is_none());
        }
        let mut filler = burst.fill();
        while filler.room() > 0 {
            // SAFETY: as above.
            unsafe { filler.push(bytes.as_ptr(), 60) };
        }
        drop(filler);
        assert!(burst.is_full() && burst.all() == u64::MAX);
        assert_eq!(burst.fill().room(), 0);
    }
}
