//! The driver's side of a packed virtqueue (virtio 1.3, section 2.8).
#![allow(unsafe_code)] // Its job: shared memory is reached through raw pointers.
use super::memory::{Area, GuestMemory};
use super::ring::{Completion, DriverRing, HEADROOM, RingSpec, descriptor_lens};
use anyhow::Result;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;
const EVENT_DISABLE: u16 = 1;

/// A packed ring and its buffers.
#[derive(Debug)]
pub struct PackedRing {
    spec: RingSpec,
    desc: Area,
    driver_event: Area,
    device_event: Area,
    buffers: Area,
    stride: usize,
    /// Lengths of a buffer's descriptors; those of no bytes are left out.
    lens: Vec<u32>,
    /// Descriptor where the next buffer is published, and the wrap counter there.
    next_avail: u16,
    avail_wrap: bool,
    /// Descriptor where the next used element is expected, and the wrap counter there.
    next_used: u16,
    used_wrap: bool,
    /// Buffers in the order in which they came back (free-running positions, masked).
    order: Vec<Completion>,
    mask: u16,
    seen: u16,
    published: u16,
    collected_from: u16,
    lent: Vec<bool>,
}

// SAFETY: the areas belong to this ring alone on the driver's side, and may be used by one thread at a time, whichever.
unsafe impl Send for PackedRing {}

impl PackedRing {
    fn at(&self, i: u16) -> *mut u8 {
        debug_assert!(i < self.spec.size);
        // SAFETY: i < size; 16 bytes per descriptor.
        unsafe { self.desc.start.as_ptr().add(usize::from(i) * 16) }
    }

    fn event_flags(area: &Area) -> &AtomicU16 {
        // SAFETY: an event area has 4 bytes, page-aligned: the flags are the second half. The device accesses it concurrently,
        // which atomics allow.
        unsafe { AtomicU16::from_ptr(area.start.as_ptr().add(2).cast()) }
    }

    fn advance(&self, at: u16, wrap: bool, by: u16) -> (u16, bool) {
        let next = at + by;
        if next >= self.spec.size { (next - self.spec.size, !wrap) } else { (next, wrap) }
    }

    /// Writes the second half of a descriptor: length, id and flags, which hand it over.
    #[inline]
    fn hand_over(&self, i: u16, len: u32, id: u16, flags: u16) {
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        // SAFETY: offset 8 of a 16-byte descriptor of a page-aligned table: 8-aligned and inside.
        let at = unsafe { self.at(i).add(8) };
        super::split::store64(at, word);
    }
}

impl DriverRing for PackedRing {
    fn new(spec: RingSpec, memory: &mut GuestMemory) -> Result<Self> {
        spec.check()?;
        let n = usize::from(spec.size);
        let desc = memory.take(16 * n, 4096)?;
        let driver_event = memory.take(4, 4096)?;
        let device_event = memory.take(4, 64)?;
        let stride = spec.stride();
        let buffers = memory.take(stride * usize::from(spec.buffers()), 64)?;
        let mut order = vec![Completion { buffer: 0, len: 0 }; n];
        for b in 0..spec.buffers() {
            order[usize::from(b)].buffer = b;
        }
        Self::event_flags(&driver_event).store(EVENT_DISABLE, Ordering::Relaxed);
        let bytes = spec.descriptor_bytes as usize * usize::from(spec.chain);
        Ok(Self {
            spec,
            desc,
            driver_event,
            device_event,
            buffers,
            stride,
            lens: descriptor_lens(&spec, bytes).collect(),
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
            order,
            mask: spec.size - 1,
            seen: 0,
            published: 0,
            collected_from: 0,
            lent: vec![false; usize::from(spec.buffers())],
        })
    }

    fn buffers(&self) -> u16 {
        self.spec.buffers()
    }

    #[inline]
    fn collect(&mut self, max: u16) -> Option<u16> {
        self.collected_from = self.seen.wrapping_add(self.buffers());
        let used = self.lens.len() as u16;
        let mut count = 0;
        while count < max && self.published != self.seen {
            // SAFETY: offset 8 of a 16-byte descriptor of a page-aligned table: 8-aligned and inside. The device may
            // write it at any moment, which atomics allow.
            let word = unsafe { AtomicU64::from_ptr(self.at(self.next_used).add(8).cast()) }.load(Ordering::Acquire);
            let flags = (word >> 48) as u16;
            let (avail, is_used) = (flags & DESC_AVAIL != 0, flags & DESC_USED != 0);
            if avail != is_used || is_used != self.used_wrap {
                break;
            }
            let buffer = (word >> 32) as u16;
            let lent = self.lent.get_mut(usize::from(buffer))?;
            if !std::mem::replace(lent, false) {
                return None;
            }
            let to = usize::from(self.seen.wrapping_add(self.spec.buffers()) & self.mask);
            self.order[to] = Completion { buffer, len: word as u32 };
            self.seen = self.seen.wrapping_add(1);
            (self.next_used, self.used_wrap) = self.advance(self.next_used, self.used_wrap, used);
            count += 1;
        }
        Some(count)
    }

    #[inline]
    fn collected(&self, i: u16) -> Completion {
        self.order[usize::from(self.collected_from.wrapping_add(i) & self.mask)]
    }

    #[inline]
    fn free(&self) -> u16 {
        self.buffers() - self.published.wrapping_sub(self.seen)
    }

    #[inline]
    fn next_free(&self, i: u16) -> u16 {
        self.order[usize::from(self.published.wrapping_add(i) & self.mask)].buffer
    }

    /// Hands over from the last buffer back to the first, so that the device sees all of them or none.
    #[inline]
    fn publish(&mut self, count: u16) {
        debug_assert!(count <= self.free());
        let per = self.lens.len() as u16;
        let write = if self.spec.device_writes { DESC_WRITE } else { 0 };
        for k in (0..count).rev() {
            let buffer = self.next_free(k);
            self.lent[usize::from(buffer)] = true;
            let start = self.buffers.guest_at(usize::from(buffer) * self.stride + HEADROOM);
            let (first, wrap) = self.advance_far(k * per);
            for i in (0..per).rev() {
                let (slot, wrap) = self.advance(first, wrap, i);
                let addr = start + u64::from(i) * u64::from(self.spec.descriptor_bytes);
                // SAFETY: inside the table; the device does not look at it before the flags say so.
                unsafe { self.at(slot).cast::<u64>().write(addr) };
                let more = if i + 1 < per { DESC_NEXT } else { 0 };
                let state = if wrap { DESC_AVAIL } else { DESC_USED };
                self.hand_over(slot, self.lens[usize::from(i)], buffer, write | more | state);
            }
        }
        (self.next_avail, self.avail_wrap) = self.advance_far(count * per);
        self.published = self.published.wrapping_add(count);
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        Self::event_flags(&self.device_event).load(Ordering::Relaxed) & 3 != EVENT_DISABLE
    }

    #[inline]
    fn buffer(&self, buffer: u16) -> *mut u8 {
        debug_assert!(buffer < self.buffers());
        // SAFETY: within the area: buffer < buffers().
        unsafe { self.buffers.start.as_ptr().add(usize::from(buffer) * self.stride + HEADROOM) }
    }

    fn buffer_len(&self) -> usize {
        self.spec.descriptor_bytes as usize * usize::from(self.spec.chain)
    }

    fn set_len(&mut self, bytes: usize) {
        assert!(self.free() == self.buffers() && bytes <= self.buffer_len(), "buffers are on loan, or too short");
        self.lens = descriptor_lens(&self.spec, bytes).take_while(|&l| l > 0).collect();
    }

    fn areas(&self) -> [Area; 3] {
        [self.desc, self.driver_event, self.device_event]
    }

    /// Bit 15 is the wrap counter, which begins as one.
    fn base(&self) -> u16 {
        1 << 15
    }
}

impl PackedRing {
    /// Position and wrap counter `by` descriptors after the next available one; `by` at most the ring's size.
    #[inline]
    fn advance_far(&self, by: u16) -> (u16, bool) {
        self.advance(self.next_avail, self.avail_wrap, by)
    }
}
