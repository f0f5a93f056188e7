//! Descriptors: one private copy each, then the checks that both ring formats share, and indirect tables.
#![allow(unsafe_code)] // Its job: reading descriptors out of guest memory.
use core::ptr::read_volatile;

use ferry_dataplane::counters::DropReason;

use super::{Core, Fault, FaultKind, Sink};
use crate::memory::View;

/// Buffer continues in the next descriptor (VIRTQ_DESC_F_NEXT).
pub(super) const NEXT: u16 = 1;
/// Buffer is device-writable (VIRTQ_DESC_F_WRITE).
pub(super) const WRITE: u16 = 2;
/// Buffer holds a table of descriptors (VIRTQ_DESC_F_INDIRECT).
pub(super) const INDIRECT: u16 = 4;
/// Bytes of a descriptor in all tables and rings.
pub(super) const DESC_BYTES: u32 = 16;

/// A descriptor's 16 bytes, as two words: split `{addr, len | flags << 32 | next << 48}`,
/// packed `{addr, len | id << 32 | flags << 48}` (little-endian).
#[derive(Clone, Copy, Debug)]
pub(super) struct Words(pub u64, pub u64);

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned(u64);

impl Words {
    /// Reads a descriptor once.
    ///
    /// # Safety
    /// 16 bytes at `at` are mapped. Any alignment: indirect tables have none.
    #[inline(always)]
    pub(super) unsafe fn read(at: *const u8) -> Self {
        let at = at.cast::<Unaligned>();
        // SAFETY: mapped by contract; `Unaligned` has alignment 1. Volatile: the guest may write at the same time, and
        // what is judged must be what is used.
        unsafe { Self(u64::from_le(read_volatile(at).0), u64::from_le(read_volatile(at.add(1)).0)) }
    }
    #[inline(always)]
    pub(super) fn addr(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub(super) fn len(self) -> u32 {
        self.1 as u32
    }
    /// Bits 32..48: split flags, packed id.
    #[inline(always)]
    pub(super) fn third(self) -> u16 {
        (self.1 >> 32) as u16
    }
    /// Bits 48..64: split next, packed flags.
    #[inline(always)]
    pub(super) fn fourth(self) -> u16 {
        (self.1 >> 48) as u16
    }
}

/// Address, length and flags of a descriptor of a split ring, each read once.
///
/// # Safety
/// 16 aligned bytes at `at` are mapped.
#[inline(always)]
pub(super) unsafe fn read_fields(at: *const u8) -> (u64, u32, u16) {
    // SAFETY: mapped and aligned by contract. Volatile: the guest may write at the same time, and what is judged must be what is used.
    unsafe {
        let (addr, len, flags) = (at.cast::<u64>(), at.add(8).cast::<u32>(), at.add(12).cast::<u16>());
        (u64::from_le(read_volatile(addr)), u32::from_le(read_volatile(len)), u16::from_le(read_volatile(flags)))
    }
}

/// Checks one buffer descriptor's direction and address and gives its pieces to the sink.
#[inline(always)]
pub(super) fn buffer<S: Sink>(
    core: &mut Core,
    addr: u64,
    len: u32,
    flags: u16,
    sink: &mut S,
) -> Result<(), DropReason> {
    // 5.1.6.2, 5.1.6.3.1: transmitted frames are device-readable, receive buffers device-writable throughout.
    if (flags & WRITE != 0) != S::WRITABLE {
        return Err(S::BAD);
    }
    // Empty buffers are pointless but not forbidden; their address means nothing.
    if len == 0 {
        return Ok(());
    }
    match core.cursor.translate(addr, len) {
        Some(p) => sink.piece(p.as_ptr(), addr, len),
        None => crossing(core, addr, len, sink),
    }
}

/// A buffer that lies in several regions, adjacent in the guest's eyes, or not in memory at all.
#[cold]
#[inline(never)]
fn crossing<S: Sink>(core: &mut Core, mut addr: u64, mut len: u32, sink: &mut S) -> Result<(), DropReason> {
    while len > 0 {
        let (p, n) = core.cursor.translate_prefix(addr, len).ok_or(S::BAD)?;
        sink.piece(p.as_ptr(), addr, n)?;
        // No overflow: a region's end fits in 64 bits. n is at least 1.
        addr += u64::from(n);
        len -= n;
    }
    Ok(())
}

/// How an indirect table is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    /// 2.7.5.3: chained by `next`, starting at entry 0.
    Split,
    /// 2.8.7: all entries in order; NEXT and the ids are ignored.
    Packed,
}

/// Follows an indirect table of `len` bytes at `addr`.
#[inline(never)]
pub(super) fn indirect<S: Sink>(
    core: &mut Core,
    addr: u64,
    len: u32,
    kind: Table,
    sink: &mut S,
) -> Result<Result<(), DropReason>, Fault> {
    let count = len / DESC_BYTES;
    // 2.7.5.3.1, 2.8.7: only with the feature; whole descriptors, at least one.
    if !core.indirect || count == 0 || !len.is_multiple_of(DESC_BYTES) {
        return Ok(Err(S::BAD));
    }
    // "A driver MUST NOT create a descriptor chain longer than the Queue Size" (2.7.5.3.1) is ignored by Linux when the
    // ring is small; a bound on the work is all that is needed.
    let limit = u32::from(super::MAX_CHAIN_DESCRIPTORS);
    let mut index = 0u32;
    let mut followed = 0u32;
    loop {
        followed += 1;
        core.followed += 1;
        if followed > count.min(limit) {
            return Err((FaultKind::ChainTooLong, followed));
        }
        let Some(p) = addr
            .checked_add(u64::from(index) * u64::from(DESC_BYTES))
            .and_then(|a| core.cursor.translate(a, DESC_BYTES))
        else {
            return Ok(Err(S::BAD));
        };
        // SAFETY: translate vouches for 16 bytes.
        let words = unsafe { Words::read(p.as_ptr()) };
        let (flags, next) = match kind {
            Table::Split => (words.third(), words.fourth()),
            Table::Packed => (words.fourth(), 0),
        };
        // 2.7.5.3.1: "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag within an indirect descriptor"; 2.8.7 likewise.
        if flags & INDIRECT != 0 {
            return Err((FaultKind::NestedIndirect, index));
        }
        if let Err(reason) = buffer(core, words.addr(), words.len(), flags, sink) {
            return Ok(Err(reason));
        }
        match kind {
            Table::Split => {
                if flags & NEXT == 0 {
                    return Ok(Ok(()));
                }
                index = u32::from(next);
                if index >= count {
                    return Err((FaultKind::NextOutOfRange, index));
                }
            }
            Table::Packed => {
                index += 1;
                if index == count {
                    return Ok(Ok(()));
                }
            }
        }
    }
}

/// Brings a cache line in, for reading.
#[inline(always)]
pub(super) fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetch has no architectural effect whatever the address.
    unsafe {
        core::arch::x86_64::_mm_prefetch(at.cast::<i8>(), core::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Brings a cache line in, to be written.
#[inline(always)]
pub(super) fn prefetch_write(at: *const u8) {
    // Not `_mm_prefetch`: compiled for any x86-64, it would fetch the line for reading, and the store would wait for the other core all the
    // same. Processors that do not know the instruction take it for a hint without effect.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: prefetch has no architectural effect whatever the address.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// A buffer of the right direction that is a chain of its own and in one piece of memory, with its guest address; its beginning is
/// prefetched. `view`: of the memory that the buffer before it lies in.
#[inline(always)]
pub(super) fn one<S: Sink>(core: &mut Core, view: &mut View, gpa: u64, len: u32) -> Option<*mut u8> {
    let addr = match view.get(gpa, len) {
        Some(addr) => addr,
        None => another_region(core, view, gpa, len)?,
    };
    prefetch_lines::<S>(addr, len);
    Some(addr)
}

#[cold]
#[inline(never)]
fn another_region(core: &mut Core, view: &mut View, gpa: u64, len: u32) -> Option<*mut u8> {
    core.cursor.translate(gpa, len)?;
    *view = core.cursor.view();
    view.get(gpa, len)
}

/// Prefetches the beginning of a buffer: virtio-net header and first packet headers, or where they will be written.
#[inline(always)]
pub(super) fn prefetch_buffer<S: Sink>(core: &mut Core, addr: u64, len: u32) {
    if len == 0 {
        return;
    }
    let Some(p) = core.cursor.translate(addr, 1) else { return };
    prefetch_lines::<S>(p.as_ptr(), len);
}

#[inline(always)]
fn prefetch_lines<S: Sink>(at: *const u8, len: u32) {
    const LINE: u32 = 64;
    let fetch = if S::WRITABLE { prefetch_write } else { prefetch_read };
    fetch(at);
    if len > LINE {
        fetch(at.wrapping_add(LINE as usize));
    }
}
