//! The driver's side of a virtqueue, reduced to what a traffic generator needs (virtio 1.3, sections 2.7 and 2.8).
//!
//! A ring has a fixed set of buffers. They go to the device in the order in which they came back, so that nothing is
//! rewritten while the device completes buffers in order: publishing a split-ring buffer then is an index, no more.
use super::memory::{Area, GuestMemory};
use super::pool::Pool;
use anyhow::{Result, bail};

/// Which of the two ring formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RingFormat {
    /// Split virtqueues (section 2.7).
    #[default]
    Split,
    /// Packed virtqueues (section 2.8).
    Packed,
}

/// Where the virtio-net header lies in a buffer: directly before a cache line, so that the frame begins with the line, as
/// in DPDK's and Linux's drivers.
pub const HEADROOM: usize = 64 - NET_HEADER;

/// Bytes of the virtio-net header with `num_buffers` (section 5.1.6).
pub const NET_HEADER: usize = 12;

/// A descriptor is continued in the next one (VIRTQ_DESC_F_NEXT, sections 2.7.5 and 2.8.6).
pub(super) const DESC_NEXT: u16 = 1;
/// The device writes to the buffer (VIRTQ_DESC_F_WRITE).
pub(super) const DESC_WRITE: u16 = 2;

/// Geometry of one ring and its buffers.
#[derive(Clone, Copy, Debug)]
pub struct RingSpec {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Descriptors per buffer; divides `size`.
    pub chain: u16,
    /// Bytes of each descriptor (header included).
    pub descriptor_bytes: u32,
    /// Whether the device writes (receive ring).
    pub device_writes: bool,
}

impl RingSpec {
    /// Number of buffers.
    pub fn buffers(&self) -> u16 {
        self.size / self.chain
    }

    /// Bytes between two buffers: an odd number of cache lines, so that frames' first lines spread over all cache sets.
    pub fn stride(&self) -> usize {
        let bytes = HEADROOM + self.descriptor_bytes as usize * usize::from(self.chain);
        let lines = bytes.div_ceil(64);
        (lines | 1) * 64
    }

    /// Guest memory that the ring and its buffers take, bytes, alignment included.
    pub fn memory(&self) -> usize {
        self.stride() * usize::from(self.buffers()) + usize::from(self.size) * 32 + 3 * 4096
    }

    /// Checks the geometry.
    ///
    /// # Errors
    /// When it is none.
    pub fn check(&self) -> Result<()> {
        if !self.size.is_power_of_two() || self.size > 32768 {
            bail!("a ring has a power of two of descriptors, at most 32768, not {}", self.size);
        }
        if self.chain == 0 || !self.chain.is_power_of_two() || self.chain > self.size {
            bail!("{} descriptors per buffer do not divide a ring of {}", self.chain, self.size);
        }
        Ok(())
    }
}

/// A buffer that the device has given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which buffer.
    pub buffer: u16,
    /// Bytes that the device says it has written.
    pub len: u32,
}

/// What the generator's loop does with a ring. Generic, so that it is compiled for each format.
pub trait DriverRing: Send {
    /// Sets the ring up in guest memory. A receive ring's buffers are not published yet.
    ///
    /// # Errors
    /// When the memory is used up or the geometry is none.
    fn new(spec: RingSpec, memory: &mut GuestMemory) -> Result<Self>
    where
        Self: Sized;

    /// Its buffers.
    fn pool(&self) -> &Pool;

    /// Takes back what the device has completed, at most `max` buffers; says how many. `None`: what the device has written
    /// makes no sense (an id that it does not hold, more buffers than it was given).
    fn collect(&mut self, max: u16) -> Option<u16>;

    /// Hands the next `count` free buffers to the device, all at once. `count` must not exceed [`Self::free`].
    fn publish(&mut self, count: u16);

    /// Whether the device asks to be notified of published buffers.
    fn wants_kick(&self) -> bool;

    /// Sets the bytes that the device is to read of each buffer, header included. Only for transmit rings, and only while
    /// all buffers are in the driver's hands.
    fn set_len(&mut self, bytes: usize);

    /// The same of one buffer that is in the driver's hands; only where a buffer is one descriptor.
    fn set_buffer_len(&mut self, buffer: u16, bytes: usize);

    /// The three areas (descriptors, driver, device).
    fn areas(&self) -> [Area; 3];

    /// Position to tell the device at the start (SET_VRING_BASE).
    fn base(&self) -> u16;

    /// Buffers in all.
    #[inline]
    fn buffers(&self) -> u16 {
        self.pool().buffers()
    }

    /// The `i`-th of the buffers that [`Self::collect`] took back last.
    #[inline]
    fn collected(&self, i: u16) -> Completion {
        self.pool().collected(i)
    }

    /// Buffers in the driver's hands.
    #[inline]
    fn free(&self) -> u16 {
        self.pool().free()
    }

    /// The `i`-th buffer that [`Self::publish`] would hand over next; `i` below [`Self::free`].
    #[inline]
    fn next_free(&self, i: u16) -> u16 {
        self.pool().next_free(i)
    }

    /// Start of a buffer: where its virtio-net header begins. Valid for [`Self::buffer_len`] bytes while the guest's memory lives.
    #[inline]
    fn buffer(&self, buffer: u16) -> *mut u8 {
        self.pool().buffer(buffer)
    }

    /// Bytes of each buffer, header included.
    #[inline]
    fn buffer_len(&self) -> usize {
        self.pool().buffer_len()
    }

    /// What [`Self::set_len`] demands.
    #[doc(hidden)]
    fn check_len(&self, bytes: usize) {
        assert!(self.free() == self.buffers() && bytes <= self.buffer_len(), "buffers are on loan, or too short");
    }
}

/// Lengths of a chain's descriptors for a frame of `bytes` with header.
pub(super) fn descriptor_lens(spec: &RingSpec, bytes: usize) -> impl Iterator<Item = u32> {
    let per = spec.descriptor_bytes as usize;
    (0..usize::from(spec.chain)).map(move |i| bytes.saturating_sub(i * per).min(per) as u32)
}
