//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).
#![allow(unsafe_code)] // Its job: shared memory is reached through raw pointers.
use super::memory::{Area, GuestMemory};
use super::pool::Pool;
use super::ring::{DESC_NEXT, DESC_WRITE, DriverRing, RingSpec, descriptor_lens};
use anyhow::Result;
use std::sync::atomic::{AtomicU16, Ordering};

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A split ring and its buffers.
#[derive(Debug)]
pub struct SplitRing {
    pool: Pool,
    desc: Area,
    avail: Area,
    used: Area,
    mask: u16,
    /// What the available ring holds at each position.
    in_avail: Vec<u16>,
}

// SAFETY: the areas belong to this ring alone on the driver's side, and may be used by one thread at a time, whichever.
unsafe impl Send for SplitRing {}

impl SplitRing {
    fn atomic16(area: &Area, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= area.len && offset.is_multiple_of(2));
        // SAFETY: the offset lies in the area, is even, and the area is page-aligned; the device accesses it concurrently,
        // which atomics allow.
        unsafe { AtomicU16::from_ptr(area.start.as_ptr().add(offset).cast()) }
    }

    fn descriptor(&self, i: u16) -> *mut u8 {
        debug_assert!(usize::from(i) * 16 < self.desc.len);
        // SAFETY: i < size; the table has 16 bytes per descriptor and is page-aligned.
        unsafe { self.desc.start.as_ptr().add(usize::from(i) * 16) }
    }

    fn write_buffer(&self, buffer: u16, bytes: usize) {
        let spec = self.pool.spec();
        let write = if spec.device_writes { DESC_WRITE } else { 0 };
        let start = self.pool.guest_address(buffer);
        let mut lens = descriptor_lens(spec, bytes).take_while(|&l| l > 0).zip(0u16..).peekable();
        while let Some((len, i)) = lens.next() {
            let slot = buffer * spec.chain + i;
            let more = if lens.peek().is_some() { DESC_NEXT } else { 0 };
            let addr = start + u64::from(i) * u64::from(spec.descriptor_bytes);
            // SAFETY: inside the descriptor. The device reads it only after it was published, which comes later.
            unsafe {
                let d = self.descriptor(slot);
                d.cast::<u64>().write(addr);
                d.add(8).cast::<u32>().write(len);
                d.add(12).cast::<u16>().write(write | more);
                d.add(14).cast::<u16>().write(slot.wrapping_add(1));
            }
        }
    }
}

impl DriverRing for SplitRing {
    fn new(spec: RingSpec, memory: &mut GuestMemory) -> Result<Self> {
        spec.check()?;
        let n = usize::from(spec.size);
        let desc = memory.take(16 * n, 4096)?;
        let avail = memory.take(6 + 2 * n, 4096)?;
        let used = memory.take(6 + 8 * n, 4096)?;
        let pool = Pool::new(spec, memory)?;
        let ring = Self { pool, desc, avail, used, mask: spec.size - 1, in_avail: vec![u16::MAX; n] };
        (0..spec.buffers()).for_each(|b| ring.write_buffer(b, ring.pool.buffer_len()));
        Self::atomic16(&ring.avail, 0).store(AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        Ok(ring)
    }

    #[inline]
    fn pool(&self) -> &Pool {
        &self.pool
    }

    #[inline]
    fn collect(&mut self, max: u16) -> Option<u16> {
        let device = Self::atomic16(&self.used, 2).load(Ordering::Acquire);
        let count = device.wrapping_sub(self.pool.seen());
        if count > self.pool.outstanding() {
            return None;
        }
        let count = count.min(max);
        self.pool.begin();
        let chain = u32::from(self.pool.spec().chain);
        for _ in 0..count {
            let at = usize::from(self.pool.seen() & self.mask);
            // SAFETY: at < size; the used ring has 8 bytes per entry from offset 4 on. Offset 4 of a page-aligned area is
            // not 8-aligned, so the entry is read as two words.
            let (id, len) = unsafe {
                let entry = self.used.start.as_ptr().add(4 + 8 * at).cast::<u32>();
                (entry.read_volatile(), entry.add(1).read_volatile())
            };
            let buffer = if chain == 1 { id } else { id / chain };
            if chain != 1 && id % chain != 0 {
                return None;
            }
            self.pool.take_back(u16::try_from(buffer).ok()?, len)?;
        }
        Some(count)
    }

    #[inline]
    fn publish(&mut self, count: u16) {
        debug_assert!(count <= self.pool.free());
        for i in 0..count {
            let at = usize::from(self.pool.published().wrapping_add(i) & self.mask);
            let buffer = self.pool.next_free(i);
            self.pool.lend(buffer);
            let head = buffer * self.pool.spec().chain;
            if self.in_avail[at] != head {
                self.in_avail[at] = head;
                Self::atomic16(&self.avail, 4 + 2 * at).store(head, Ordering::Relaxed);
            }
        }
        self.pool.advance(count);
        Self::atomic16(&self.avail, 2).store(self.pool.published(), Ordering::Release);
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        Self::atomic16(&self.used, 0).load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
    }

    fn set_len(&mut self, bytes: usize) {
        self.check_len(bytes);
        (0..self.pool.buffers()).for_each(|b| self.write_buffer(b, bytes));
    }

    #[inline]
    fn set_buffer_len(&mut self, buffer: u16, bytes: usize) {
        debug_assert!(self.pool.spec().chain == 1 && bytes <= self.pool.buffer_len());
        // SAFETY: inside the descriptor, 4-aligned; the buffer is the driver's.
        unsafe {
            let len = self.descriptor(buffer).add(8).cast::<u32>();
            if len.read() != bytes as u32 {
                len.write(bytes as u32);
            }
        }
    }

    fn areas(&self) -> [Area; 3] {
        [self.desc, self.avail, self.used]
    }

    fn base(&self) -> u16 {
        0
    }
}
