//! Chains of the guest's transmit queue into frames.
#![allow(unsafe_code)] // Its job: reading the virtio-net header and passing segments on.
use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, MAX_FRAME_BYTES, Offload, RxBurst};

use super::stage::One;
use super::{Chain, Core, Fault, Format, MAX_BURST_DESCRIPTORS, MAX_FRAME_SEGMENTS, Sink, VringCounters};
use crate::net_header::{self, MAX_HEADER_BYTES, RawHeader};

/// Shortest frame: an Ethernet header.
const MIN_FRAME_BYTES: u32 = 14;

/// Chains received and not yet released, oldest first. Several calls of receive may come before one release.
pub(crate) struct Pending {
    chains: Box<[Chain; Self::CAPACITY]>,
    len: usize,
}

impl Pending {
    const CAPACITY: usize = 4 * BURST;

    pub(super) fn new() -> Self {
        Self { chains: Box::new([Chain::default(); Self::CAPACITY]), len: 0 }
    }
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
    #[inline]
    fn is_full(&self) -> bool {
        self.len == Self::CAPACITY
    }
    #[inline]
    fn room(&self) -> usize {
        Self::CAPACITY - self.len
    }
    #[inline]
    fn push(&mut self, chain: Chain) {
        if let Some(slot) = self.chains.get_mut(self.len) {
            *slot = chain;
            self.len += 1;
        }
    }
}

/// Takes a chain's pieces: the first bytes are the header, the rest is the frame.
struct FrameSink<'a> {
    burst: &'a mut RxBurst,
    /// The header, when it came in one piece.
    header: RawHeader,
    /// The header's bytes so far, when it came in several.
    scattered: [u8; MAX_HEADER_BYTES],
    /// Header bytes still to come.
    header_left: u32,
    header_len: u32,
    frame_len: u32,
    pieces: usize,
}

impl Sink for FrameSink<'_> {
    const WRITABLE: bool = false;
    const BAD: DropReason = DropReason::RxBadDescriptor;

    #[inline(always)]
    fn piece(&mut self, addr: *mut u8, _gpa: u64, len: u32) -> Result<(), DropReason> {
        let (mut addr, mut len) = (addr.cast_const(), len);
        if self.header_left > 0 {
            let n = self.header_left.min(len);
            if n == self.header_len {
                // The usual case: the whole header at once.
                // SAFETY: `addr` has n readable bytes, 12 or 10.
                self.header = unsafe { read_header(addr, n) };
            } else {
                // SAFETY: `addr` has n readable bytes.
                unsafe { self.gather(addr, n) };
            }
            self.header_left -= n;
            len -= n;
            if len == 0 {
                return Ok(());
            }
            addr = addr.wrapping_add(n as usize);
        }
        self.pieces += 1;
        if self.pieces > MAX_FRAME_SEGMENTS {
            return Err(DropReason::RxTooManySegments);
        }
        self.frame_len = self.frame_len.saturating_add(len);
        if self.frame_len > MAX_FRAME_BYTES {
            return Err(DropReason::RxTooLong);
        }
        // SAFETY: the piece lies in guest memory, which stays mapped until the ring is stopped, which waits until the
        // burst is over (grace period).
        unsafe { self.burst.push_segment(addr, len) };
        Ok(())
    }
}

impl FrameSink<'_> {
    /// 2.7.4, 5.1.6: the header may be spread over descriptors in any way.
    ///
    /// # Safety
    /// `addr` has `n` readable bytes.
    #[cold]
    #[inline(never)]
    unsafe fn gather(&mut self, addr: *const u8, n: u32) {
        let have = (self.header_len - self.header_left) as usize;
        if let Some(dst) = self.scattered.get_mut(have..have + n as usize) {
            // SAFETY: n readable bytes by contract; dst is private memory of that length.
            unsafe { core::ptr::copy_nonoverlapping(addr, dst.as_mut_ptr(), n as usize) };
        }
        self.header = RawHeader::from_bytes(self.scattered);
    }

    #[inline(always)]
    fn finish(&self, features: u64) -> Result<Offload, DropReason> {
        if self.header_left > 0 {
            return Err(DropReason::RxBadDescriptor);
        }
        if self.frame_len < MIN_FRAME_BYTES {
            return Err(DropReason::RxTooShort);
        }
        net_header::decode(self.header, features)
    }
}

/// The header of the frame that a single buffer holds, if it holds a whole one behind its header.
#[inline(always)]
fn whole_frame(one: &One, header_len: u32) -> Option<RawHeader> {
    let frame_len = one.len.checked_sub(header_len)?;
    if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame_len) {
        return None;
    }
    // SAFETY: the buffer has `header_len` readable bytes.
    Some(unsafe { read_header(one.addr, header_len) })
}

/// The header at `addr`, read once.
///
/// # Safety
/// `header_len` bytes at `addr`, 12 or 10, are readable; any alignment.
#[inline(always)]
unsafe fn read_header(addr: *const u8, header_len: u32) -> RawHeader {
    // SAFETY: the caller's promise.
    unsafe {
        let low = u64::from_le(addr.cast::<u64>().read_unaligned());
        let rest = addr.add(8);
        let high = if header_len == 12 {
            u32::from_le(rest.cast::<u32>().read_unaligned())
        } else {
            u32::from(u16::from_le(rest.cast::<u16>().read_unaligned()))
        };
        RawHeader { low, high }
    }
}

/// Takes at most [`BURST`] chains, as far as they fit into the burst. On a fault the chains before it were taken.
pub(super) fn receive<F: Format>(
    queue: &mut F,
    core: &mut Core,
    pending: &mut Pending,
    burst: &mut RxBurst,
    counters: &VringCounters,
) -> Result<(), Fault> {
    let mut fault = None;
    let mut bad = 0;
    core.followed = 0;
    queue.stage::<FrameSink<'_>>(core, BURST as u16);
    // Frames in one buffer each, which is what most are; then whatever else there is, with care.
    let room = burst.room().min(pending.room());
    queue.prefetch_used(queue.staged().len() as u16);
    let header_len = core.header_len;
    let mut whole = 0;
    for one in queue.staged().iter().take(room) {
        let Some(header) = whole_frame(one, header_len) else { break };
        // Put in afterwards: passed along with every frame, it would go through memory in pieces, and be waited for.
        let owed = if header.owes_nothing() { None } else { Some(net_header::decode(header, core.features)) };
        if let Some(Err(_)) = owed {
            break;
        }
        // SAFETY: the buffer is longer than the header, and lies in guest memory, which stays mapped until the ring is stopped, which waits
        // until the burst is over (grace period).
        unsafe { burst.push_frame(one.addr.add(header_len as usize), one.len - header_len) };
        if let Some(Ok(offload)) = owed {
            burst.owe(offload);
        }
        pending.push(one.chain);
        whole += 1;
    }
    queue.take_staged(whole);
    for _ in usize::from(whole)..BURST {
        if burst.is_full()
            || pending.is_full()
            || burst.segment_room() < MAX_FRAME_SEGMENTS
            || core.followed > MAX_BURST_DESCRIPTORS
        {
            break;
        }
        let mut at = queue.position();
        let mark = burst.segment_mark();
        let mut sink = FrameSink {
            burst,
            header: RawHeader::default(),
            scattered: [0; MAX_HEADER_BYTES],
            header_left: core.header_len,
            header_len: core.header_len,
            frame_len: 0,
            pieces: 0,
        };
        match queue.peek(core, &mut at, &mut sink) {
            Ok(None) => break,
            Ok(Some((chain, result))) => {
                let verdict = result.and_then(|()| sink.finish(core.features));
                pending.push(chain);
                match verdict {
                    Ok(offload) => {
                        burst.finish_frame(mark, offload);
                    }
                    Err(reason) => {
                        burst.abandon_frame(mark);
                        burst.reject(reason);
                        bad += 1;
                    }
                }
            }
            Err(f) => {
                burst.abandon_frame(mark);
                fault = Some(f);
                break;
            }
        }
        queue.advance(at);
    }
    if bad > 0 {
        counters.bad_chains.add(bad);
    }
    match fault {
        Some(f) => Err(f),
        None => {
            // The next burst's descriptors and headers come in while this one is worked on.
            queue.stage::<FrameSink<'_>>(core, BURST as u16);
            Ok(())
        }
    }
}

/// Returns all pending chains. True when the guest wants to be notified.
pub(super) fn release<F: Format>(
    queue: &mut F,
    core: &mut Core,
    pending: &mut Pending,
    counters: &VringCounters,
) -> bool {
    if pending.len == 0 {
        return false;
    }
    for chain in pending.chains.iter().take(pending.len) {
        // Length 0: nothing was written into a device-readable buffer.
        queue.put_used(core, *chain, 0);
    }
    counters.chains.add(pending.len as u64);
    pending.len = 0;
    queue.publish(core)
}
