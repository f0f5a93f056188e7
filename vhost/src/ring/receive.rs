//! Chains of the guest's transmit queue into frames.
#![allow(unsafe_code)] // Its job: reading the virtio-net header and passing segments on.
use core::ptr::read_volatile;

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, MAX_FRAME_BYTES, Offload, RxBurst};

use super::{Core, Fault, Format, MAX_BURST_DESCRIPTORS, MAX_FRAME_SEGMENTS, Sink, VringCounters};
use crate::net_header::{self, MAX_HEADER_BYTES, RawHeader, feature};

/// Shortest frame: an Ethernet header.
const MIN_FRAME_BYTES: u32 = 14;

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

/// The header at `addr`, in two parts: the second is needed only where something is owed. Each is read once.
#[derive(Clone, Copy)]
struct HeaderAt {
    addr: *const u8,
    len: u32,
}

impl HeaderAt {
    /// # Safety
    /// A header of 10 or 12 bytes at `self.addr`, at any alignment, is readable.
    #[inline(always)]
    unsafe fn low(self) -> u64 {
        // SAFETY: the caller's promise; `Unaligned` has alignment 1. Volatile: the guest may write at the same time, and what is judged must
        // be what is used.
        u64::from_le(unsafe { read_volatile(self.addr.cast::<Unaligned<u64>>()) }.0)
    }

    /// # Safety
    /// As [`Self::low`].
    #[inline(always)]
    unsafe fn high(self) -> u32 {
        // SAFETY: as above.
        unsafe {
            let rest = self.addr.add(8);
            if self.len == 12 {
                u32::from_le(read_volatile(rest.cast::<Unaligned<u32>>()).0)
            } else {
                u32::from(u16::from_le(read_volatile(rest.cast::<Unaligned<u16>>()).0))
            }
        }
    }
}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

/// The header at `addr`, read once.
///
/// # Safety
/// `header_len` bytes at `addr`, 12 or 10, are readable; any alignment.
#[inline(always)]
unsafe fn read_header(addr: *const u8, header_len: u32) -> RawHeader {
    let header = HeaderAt { addr, len: header_len };
    // SAFETY: the caller's promise.
    unsafe { RawHeader { low: header.low(), high: header.high() } }
}

/// Takes at most [`BURST`] chains, as far as they fit into the burst. On a fault the chains before it were taken.
pub(super) fn receive<F: Format>(
    queue: &mut F,
    core: &mut Core,
    burst: &mut RxBurst,
    counters: &VringCounters,
) -> Result<(), Fault> {
    let (mut taken, mut bad) = (0, 0);
    let mut result = Ok(());
    core.followed = 0;
    let mut dry = queue.stage::<FrameSink<'_>>(core, BURST as u16, true);
    let staged = queue.staged().len();
    queue.prefetch_used(staged as u16);
    loop {
        // Frames in one buffer each, which is what most are.
        taken += take_whole(queue, core, burst, BURST - taken);
        if taken >= BURST
            || dry && queue.staged().is_empty()
            || burst.is_full()
            || queue.room_to_hold() == 0
            || burst.segment_room() < MAX_FRAME_SEGMENTS
            || core.followed > MAX_BURST_DESCRIPTORS
        {
            break;
        }
        match take_any(queue, core, burst) {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(reason))) => {
                burst.reject(reason);
                bad += 1;
            }
            Ok(None) => break,
            Err(fault) => {
                result = Err(fault);
                break;
            }
        }
        taken += 1;
        if queue.staged().is_empty() {
            // Behind it there may be simple ones again.
            dry = queue.stage::<FrameSink<'_>>(core, (BURST - taken) as u16, false);
        }
    }
    if bad > 0 {
        counters.bad_chains.add(bad);
    }
    if result.is_ok() && taken > 0 {
        // The next burst's descriptors and headers come in while this one is worked on.
        queue.stage::<FrameSink<'_>>(core, BURST as u16, true);
    }
    result
}

/// Takes staged chains, at most so many, as long as each holds a frame that owes a checksum at most. Returns how many.
#[inline(always)]
fn take_whole<F: Format>(queue: &mut F, core: &Core, burst: &mut RxBurst, most: usize) -> usize {
    let header_len = core.header_len;
    let most_owed = if core.features & feature::CSUM != 0 { net_header::OWED_CHECKSUM } else { 0 };
    let mut filler = burst.fill();
    let most = most.min(filler.room()).min(queue.room_to_hold());
    let staged = queue.staged();
    let staged = staged.get(..most).unwrap_or(staged);
    for one in staged {
        // Of a buffer shorter than the header this wraps, and is too long.
        let len = one.len.wrapping_sub(header_len);
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&len) {
            break;
        }
        let header = HeaderAt { addr: one.addr, len: header_len };
        // SAFETY: the buffer is longer than the header.
        let low = unsafe { header.low() };
        let owed = net_header::owed(low);
        if owed > most_owed {
            break;
        }
        // SAFETY: there is room. The buffer has as many bytes behind its header; it lies in guest memory, which stays mapped until the ring is
        // stopped, which waits until the burst is over (grace period).
        unsafe { filler.push(one.addr.add(header_len as usize), len) };
        if owed != 0 {
            // Put in afterwards: passed along with every frame, it would go through memory in pieces, and be waited for.
            // SAFETY: one was added; as for the low part.
            unsafe { filler.owe(net_header::owed_checksum(RawHeader { low, high: header.high() })) };
        }
    }
    let taken = filler.added();
    drop(filler);
    queue.hold_staged(taken as u16);
    taken
}

/// Takes the next chain, whatever it is. `None`: there is none. An error within says why it holds no frame.
fn take_any<F: Format>(
    queue: &mut F,
    core: &mut Core,
    burst: &mut RxBurst,
) -> Result<Option<Result<(), DropReason>>, Fault> {
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
    let found = queue.peek(core, &mut at, &mut sink);
    let verdict = match &found {
        Ok(Some((_, result))) => result.and_then(|()| sink.finish(core.features)),
        _ => Err(DropReason::RxBadDescriptor),
    };
    match verdict {
        Ok(offload) => {
            burst.finish_frame(mark, offload);
        }
        Err(_) => burst.abandon_frame(mark),
    }
    let Some((chain, _)) = found? else { return Ok(None) };
    queue.hold(core, chain);
    queue.advance(at);
    Ok(Some(verdict.map(|_| ())))
}

/// Returns all chains that were received. True when the guest wants to be notified.
pub(super) fn release<F: Format>(queue: &mut F, core: &mut Core, counters: &VringCounters) -> bool {
    let held = queue.held();
    if held == 0 {
        return false;
    }
    counters.chains.add(held as u64);
    queue.release(core)
}
