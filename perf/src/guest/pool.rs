//! The buffers of a ring, whichever format it has: which of them the device holds, and in which order the others came back.
#![allow(unsafe_code)] // Its job: addresses inside shared memory.
use super::memory::{Area, GuestMemory};
use super::ring::{Completion, HEADROOM, RingSpec};
use anyhow::Result;

/// A ring's fixed set of buffers. They go to the device in the order in which they came back.
#[derive(Debug)]
pub struct Pool {
    spec: RingSpec,
    area: Area,
    stride: usize,
    /// Mask of positions. A position stands for one buffer, so there are as many as descriptors, though at most
    /// `buffers` of them are in use at once.
    mask: u16,
    /// Buffers in the order in which they came back, by position; between `published` and `seen + buffers` lie the free ones.
    order: Vec<Completion>,
    /// Buffers taken back, free-running.
    seen: u16,
    /// Buffers handed over, free-running.
    published: u16,
    /// First position of the last collection.
    collected_from: u16,
    /// Whether the device holds each buffer.
    lent: Vec<bool>,
}

impl Pool {
    /// Takes the buffers' memory; all are in the driver's hands.
    ///
    /// # Errors
    /// When the memory is used up.
    pub fn new(spec: RingSpec, memory: &mut GuestMemory) -> Result<Self> {
        let (stride, buffers) = (spec.stride(), spec.buffers());
        let area = memory.take(stride * usize::from(buffers), 64)?;
        let mut order = vec![Completion { buffer: 0, len: 0 }; usize::from(spec.size)];
        for b in 0..buffers {
            order[usize::from(b)].buffer = b;
        }
        let lent = vec![false; usize::from(buffers)];
        let mask = spec.size - 1;
        Ok(Self { spec, area, stride, mask, order, seen: 0, published: 0, collected_from: 0, lent })
    }

    /// The geometry.
    pub fn spec(&self) -> &RingSpec {
        &self.spec
    }

    /// Buffers in all.
    #[inline]
    pub fn buffers(&self) -> u16 {
        self.spec.buffers()
    }

    /// Buffers in the driver's hands.
    #[inline]
    pub fn free(&self) -> u16 {
        self.buffers() - self.outstanding()
    }

    /// Buffers in the device's hands.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.seen)
    }

    /// How many have been handed over, free-running.
    #[inline]
    pub fn published(&self) -> u16 {
        self.published
    }

    /// How many have been taken back, free-running.
    #[inline]
    pub fn seen(&self) -> u16 {
        self.seen
    }

    /// Begins a collection: what [`Self::take_back`] takes from now on is what [`Self::collected`] tells of.
    #[inline]
    pub fn begin(&mut self) {
        self.collected_from = self.seen.wrapping_add(self.buffers());
    }

    /// Takes one buffer back. `None` when the device does not hold it.
    #[inline]
    pub fn take_back(&mut self, buffer: u16, len: u32) -> Option<()> {
        let lent = self.lent.get_mut(usize::from(buffer))?;
        if !std::mem::replace(lent, false) {
            return None;
        }
        let to = usize::from(self.seen.wrapping_add(self.buffers()) & self.mask);
        self.order[to] = Completion { buffer, len };
        self.seen = self.seen.wrapping_add(1);
        Some(())
    }

    /// The `i`-th buffer of the last collection.
    #[inline]
    pub fn collected(&self, i: u16) -> Completion {
        self.order[usize::from(self.collected_from.wrapping_add(i) & self.mask)]
    }

    /// The `i`-th buffer that is handed over next.
    #[inline]
    pub fn next_free(&self, i: u16) -> u16 {
        self.order[usize::from(self.published.wrapping_add(i) & self.mask)].buffer
    }

    /// Notes that a buffer is about to be handed over.
    #[inline]
    pub fn lend(&mut self, buffer: u16) {
        self.lent[usize::from(buffer)] = true;
    }

    /// Notes that the next `count` buffers have been handed over.
    #[inline]
    pub fn advance(&mut self, count: u16) {
        self.published = self.published.wrapping_add(count);
    }

    /// Start of a buffer: where its virtio-net header begins.
    #[inline]
    pub fn buffer(&self, buffer: u16) -> *mut u8 {
        debug_assert!(buffer < self.buffers());
        // SAFETY: within the area: buffer < buffers().
        unsafe { self.area.start.as_ptr().add(usize::from(buffer) * self.stride + HEADROOM) }
    }

    /// The same as a guest address.
    #[inline]
    pub fn guest_address(&self, buffer: u16) -> u64 {
        self.area.guest_at(usize::from(buffer) * self.stride + HEADROOM)
    }

    /// Bytes of each buffer, header included.
    #[inline]
    pub fn buffer_len(&self) -> usize {
        self.spec.descriptor_bytes as usize * usize::from(self.spec.chain)
    }
}
