//! The driver's side of a packed virtqueue (virtio 1.3, section 2.8).
#![allow(unsafe_code)] // Its job: shared memory is reached through raw pointers.
use super::memory::{Area, GuestMemory};
use super::pool::Pool;
use super::ring::{DESC_NEXT, DESC_WRITE, DriverRing, RingSpec, descriptor_lens};
use anyhow::Result;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;
const EVENT_DISABLE: u16 = 1;

/// A packed ring and its buffers.
#[derive(Debug)]
pub struct PackedRing {
    pool: Pool,
    desc: Area,
    driver_event: Area,
    device_event: Area,
    /// Lengths of a buffer's descriptors; those of no bytes are left out.
    lens: Vec<u32>,
    /// Where buffers of one descriptor differ: their lengths. Else empty.
    own_lens: Vec<u32>,
    /// Descriptor where the next buffer is published, and the wrap counter there.
    next_avail: u16,
    avail_wrap: bool,
    /// Descriptor where the next used element is expected, and the wrap counter there.
    next_used: u16,
    used_wrap: bool,
}

// SAFETY: the areas belong to this ring alone on the driver's side, and may be used by one thread at a time, whichever.
unsafe impl Send for PackedRing {}

impl PackedRing {
    fn at(&self, i: u16) -> *mut u8 {
        debug_assert!(i < self.pool.spec().size);
        // SAFETY: i < size; 16 bytes per descriptor.
        unsafe { self.desc.start.as_ptr().add(usize::from(i) * 16) }
    }

    fn event_flags(area: &Area) -> &AtomicU16 {
        // SAFETY: an event area has 4 bytes, page-aligned: the flags are the second half. The device accesses it concurrently,
        // which atomics allow.
        unsafe { AtomicU16::from_ptr(area.start.as_ptr().add(2).cast()) }
    }

    /// The second half of a descriptor: length, id and flags.
    #[inline]
    fn state(&self, i: u16) -> &AtomicU64 {
        // SAFETY: offset 8 of a 16-byte descriptor of a page-aligned table: 8-aligned and inside. The device accesses it
        // concurrently, which atomics allow.
        unsafe { AtomicU64::from_ptr(self.at(i).add(8).cast()) }
    }

    /// Position and wrap counter `by` descriptors after one; `by` at most the ring's size.
    #[inline]
    fn advance(&self, at: u16, wrap: bool, by: u16) -> (u16, bool) {
        let (next, size) = (at + by, self.pool.spec().size);
        if next >= size { (next - size, !wrap) } else { (next, wrap) }
    }
}

impl DriverRing for PackedRing {
    fn new(spec: RingSpec, memory: &mut GuestMemory) -> Result<Self> {
        spec.check()?;
        let desc = memory.take(16 * usize::from(spec.size), 4096)?;
        let driver_event = memory.take(4, 4096)?;
        let device_event = memory.take(4, 64)?;
        let pool = Pool::new(spec, memory)?;
        Self::event_flags(&driver_event).store(EVENT_DISABLE, Ordering::Relaxed);
        let lens = descriptor_lens(&spec, pool.buffer_len()).collect();
        Ok(Self {
            pool,
            desc,
            driver_event,
            device_event,
            lens,
            own_lens: Vec::new(),
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
        })
    }

    #[inline]
    fn pool(&self) -> &Pool {
        &self.pool
    }

    #[inline]
    fn collect(&mut self, max: u16) -> Option<u16> {
        self.pool.begin();
        let used = self.lens.len() as u16;
        let mut count = 0;
        while count < max && self.pool.outstanding() != 0 {
            let word = self.state(self.next_used).load(Ordering::Acquire);
            let flags = (word >> 48) as u16;
            let (avail, is_used) = (flags & DESC_AVAIL != 0, flags & DESC_USED != 0);
            if avail != is_used || is_used != self.used_wrap {
                break;
            }
            self.pool.take_back((word >> 32) as u16, word as u32)?;
            (self.next_used, self.used_wrap) = self.advance(self.next_used, self.used_wrap, used);
            count += 1;
        }
        Some(count)
    }

    /// Hands over from the last buffer back to the first, so that the device sees all of them or none.
    #[inline]
    fn publish(&mut self, count: u16) {
        debug_assert!(count <= self.pool.free());
        let per = self.lens.len() as u16;
        let write = if self.pool.spec().device_writes { DESC_WRITE } else { 0 };
        let step = u64::from(self.pool.spec().descriptor_bytes);
        for k in (0..count).rev() {
            let buffer = self.pool.next_free(k);
            self.pool.lend(buffer);
            let start = self.pool.guest_address(buffer);
            let (first, wrap) = self.advance(self.next_avail, self.avail_wrap, k * per);
            for i in (0..per).rev() {
                let (slot, wrap) = self.advance(first, wrap, i);
                // SAFETY: inside the table; the device does not look at it before the flags say so.
                unsafe { self.at(slot).cast::<u64>().write(start + u64::from(i) * step) };
                let len = self.own_lens.get(usize::from(buffer)).copied().unwrap_or(self.lens[usize::from(i)]);
                let more = if i + 1 < per { DESC_NEXT } else { 0 };
                let flags = write | more | if wrap { DESC_AVAIL } else { DESC_USED };
                let word = u64::from(len) | u64::from(buffer) << 32 | u64::from(flags) << 48;
                self.state(slot).store(word, Ordering::Release);
            }
        }
        (self.next_avail, self.avail_wrap) = self.advance(self.next_avail, self.avail_wrap, count * per);
        self.pool.advance(count);
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        Self::event_flags(&self.device_event).load(Ordering::Relaxed) & 3 != EVENT_DISABLE
    }

    fn set_len(&mut self, bytes: usize) {
        self.check_len(bytes);
        self.own_lens.clear();
        self.lens = descriptor_lens(self.pool.spec(), bytes).take_while(|&l| l > 0).collect();
    }

    #[inline]
    fn set_buffer_len(&mut self, buffer: u16, bytes: usize) {
        debug_assert!(self.lens.len() == 1 && bytes <= self.pool.buffer_len());
        if self.own_lens.is_empty() {
            self.own_lens = vec![self.lens[0]; usize::from(self.pool.buffers())];
        }
        self.own_lens[usize::from(buffer)] = bytes as u32;
    }

    fn areas(&self) -> [Area; 3] {
        [self.desc, self.driver_event, self.device_event]
    }

    /// Bit 15 is the wrap counter, which begins as one.
    fn base(&self) -> u16 {
        1 << 15
    }
}
