//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).
#![allow(unsafe_code)] // Its job: shared memory is reached through raw pointers.
use super::memory::{Area, GuestMemory};
use super::ring::{Completion, DriverRing, HEADROOM, RingSpec, descriptor_lens};
use anyhow::Result;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A split ring and its buffers.
#[derive(Debug)]
pub struct SplitRing {
    spec: RingSpec,
    desc: Area,
    avail: Area,
    used: Area,
    buffers: Area,
    stride: usize,
    /// Mask of positions. A position stands for one buffer, so there are as many as descriptors, though at most
    /// `buffers` of them are in use at once.
    mask: u16,
    /// What the available ring holds at each position.
    in_avail: Vec<u16>,
    /// Buffers in the order in which they came back, by position; between `published` and `seen + buffers` lie the free ones.
    order: Vec<Completion>,
    /// Used entries taken, free-running.
    seen: u16,
    /// Available entries published, free-running.
    published: u16,
    /// First position of the last collection.
    collected_from: u16,
    /// Whether the device holds each buffer.
    lent: Vec<bool>,
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

    fn write_descriptor(&self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        // SAFETY: i < size; the table has 16 bytes per descriptor and is page-aligned. The device reads a descriptor only
        // after it was published, which comes later.
        unsafe {
            let d = self.desc.start.as_ptr().add(usize::from(i) * 16);
            d.cast::<u64>().write(addr);
            d.add(8).cast::<u32>().write(len);
            d.add(12).cast::<u16>().write(flags);
            d.add(14).cast::<u16>().write(next);
        }
    }

    fn fill_table(&mut self, bytes: usize) {
        let write = if self.spec.device_writes { DESC_WRITE } else { 0 };
        for buffer in 0..self.spec.buffers() {
            let start = self.buffers.guest_at(usize::from(buffer) * self.stride + HEADROOM);
            let lens: Vec<u32> = descriptor_lens(&self.spec, bytes).take_while(|&l| l > 0).collect();
            for (i, &len) in lens.iter().enumerate() {
                let slot = buffer * self.spec.chain + i as u16;
                let more = if i + 1 < lens.len() { DESC_NEXT } else { 0 };
                let addr = start + i as u64 * u64::from(self.spec.descriptor_bytes);
                self.write_descriptor(slot, addr, len, write | more, slot.wrapping_add(1));
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
        let stride = spec.stride();
        let buffers = memory.take(stride * usize::from(spec.buffers()), 64)?;
        let count = spec.buffers();
        let mut order = vec![Completion { buffer: 0, len: 0 }; n];
        let in_avail = vec![u16::MAX; n];
        for b in 0..count {
            order[usize::from(b)].buffer = b;
        }
        let mut ring = Self {
            spec,
            desc,
            avail,
            used,
            buffers,
            stride,
            mask: spec.size - 1,
            in_avail,
            order,
            seen: 0,
            published: 0,
            collected_from: 0,
            lent: vec![false; usize::from(count)],
        };
        ring.fill_table(ring.buffer_len());
        Self::atomic16(&ring.avail, 0).store(AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        Ok(ring)
    }

    fn buffers(&self) -> u16 {
        self.spec.buffers()
    }

    #[inline]
    fn collect(&mut self, max: u16) -> Option<u16> {
        let device = Self::atomic16(&self.used, 2).load(Ordering::Acquire);
        let count = device.wrapping_sub(self.seen);
        let outstanding = self.published.wrapping_sub(self.seen);
        if count > outstanding {
            return None;
        }
        let count = count.min(max);
        self.collected_from = self.seen.wrapping_add(self.buffers());
        for _ in 0..count {
            let at = usize::from(self.seen & self.mask);
            // SAFETY: at < size; the used ring has 8 bytes per entry from offset 4 on. Offset 4 of a page-aligned area is
            // not 8-aligned, so the entry is read as two words.
            let (id, len) = unsafe {
                let entry = self.used.start.as_ptr().add(4 + 8 * at).cast::<u32>();
                (entry.read_volatile(), entry.add(1).read_volatile())
            };
            let chain = u32::from(self.spec.chain);
            let buffer = if chain == 1 { id } else { id / chain };
            let lent = self.lent.get_mut(buffer as usize)?;
            if !std::mem::replace(lent, false) || (chain != 1 && id % chain != 0) {
                return None;
            }
            let to = usize::from(self.seen.wrapping_add(self.spec.buffers()) & self.mask);
            self.order[to] = Completion { buffer: buffer as u16, len };
            self.seen = self.seen.wrapping_add(1);
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

    #[inline]
    fn publish(&mut self, count: u16) {
        debug_assert!(count <= self.free());
        for _ in 0..count {
            let at = usize::from(self.published & self.mask);
            let buffer = self.order[at].buffer;
            self.lent[usize::from(buffer)] = true;
            let head = buffer * self.spec.chain;
            if self.in_avail[at] != head {
                self.in_avail[at] = head;
                Self::atomic16(&self.avail, 4 + 2 * at).store(head, Ordering::Relaxed);
            }
            self.published = self.published.wrapping_add(1);
        }
        Self::atomic16(&self.avail, 2).store(self.published, Ordering::Release);
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        Self::atomic16(&self.used, 0).load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
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
        self.fill_table(bytes);
    }

    fn areas(&self) -> [Area; 3] {
        [self.desc, self.avail, self.used]
    }

    fn base(&self) -> u16 {
        0
    }
}

/// A 64-bit store that the compiler keeps whole.
#[inline]
pub(super) fn store64(at: *mut u8, value: u64) {
    // SAFETY: the callers (packed ring) pass 8-aligned addresses within their descriptor area.
    unsafe { AtomicU64::from_ptr(at.cast()) }.store(value, Ordering::Release);
}
