//! Packets in DPDK's buffers, with owners.
//!
//! An mbuf belongs to exactly one place: a device's ring, an [`MbufBurst`], or an [`Mbuf`]. The raw
//! pointers do not leave this crate.
#![allow(unsafe_code)] // Its job: owning mbufs.
use std::ptr::NonNull;

use ferry_dataplane::frame::BURST;
use ferry_dpdk_sys as sys;

use crate::mempool::Mempool;

/// One packet: a chain of mbufs, freed on drop.
///
/// `Send`, for a packet may change threads; not `Sync`.
#[derive(Debug)]
pub struct Mbuf(NonNull<sys::rte_mbuf>);

// SAFETY: mbufs are plain memory of a pool that any thread may return to; the owner is unique.
unsafe impl Send for Mbuf {}

impl Mbuf {
    /// Takes an empty one-segment packet from `pool`; `None` when there is none left.
    ///
    /// # Safety
    /// `pool` must outlive the packet.
    #[inline]
    pub(crate) unsafe fn alloc(pool: &Mempool) -> Option<Self> {
        let mut raw = core::ptr::null_mut();
        // SAFETY: room for one pointer; the pool is alive.
        if unsafe { sys::ferry_pktmbuf_alloc_bulk(pool.as_ptr(), &mut raw, 1) } != 0 {
            return None;
        }
        NonNull::new(raw).map(Self)
    }

    /// Takes over a packet.
    ///
    /// # Safety
    /// `raw` must be the first mbuf of a packet that nobody else owns.
    #[inline]
    pub(crate) unsafe fn from_raw(raw: *mut sys::rte_mbuf) -> Option<Self> {
        NonNull::new(raw).map(Self)
    }

    /// Gives the packet away without freeing it.
    #[inline]
    pub(crate) fn into_raw(self) -> *mut sys::rte_mbuf {
        let raw = self.0.as_ptr();
        core::mem::forget(self);
        raw
    }

    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut sys::rte_mbuf {
        self.0.as_ptr()
    }

    /// Facts of the packet and its first segment.
    #[inline]
    pub(crate) fn view(&self) -> sys::ferry_segment {
        let mut view = sys::ferry_segment::default();
        // SAFETY: `self` owns a valid packet.
        unsafe { sys::ferry_mbuf_view(self.as_ptr(), &mut view) };
        view
    }

    /// The first segment's bytes.
    #[inline]
    pub(crate) fn first_segment_mut(&mut self) -> &mut [u8] {
        let view = self.view();
        // SAFETY: data_len bytes of the owned mbuf, initialised by whoever set the length; borrowed with self.
        unsafe { core::slice::from_raw_parts_mut(sys::ferry_mbuf_data(self.as_ptr()), usize::from(view.data_len)) }
    }

    /// Calls `f` with the bytes of each segment in order.
    pub(crate) fn for_each_segment(&self, mut f: impl FnMut(&[u8])) {
        let mut view = self.view();
        loop {
            // SAFETY: a segment of the owned chain has data_len bytes at data.
            f(unsafe { core::slice::from_raw_parts(view.data, usize::from(view.data_len)) });
            if view.next.is_null() {
                break;
            }
            let next = view.next;
            // SAFETY: `next` is a segment of the same chain.
            unsafe { sys::ferry_mbuf_view(next, &mut view) };
        }
    }
}

impl Drop for Mbuf {
    #[inline]
    fn drop(&mut self) {
        let mut raw = self.as_ptr();
        // SAFETY: the packet is owned and given up here.
        unsafe { sys::ferry_pktmbuf_free_bulk(&mut raw, 1) };
    }
}

/// Up to [`BURST`] packets in a fixed array; freed in bulk on drop.
pub struct MbufBurst {
    /// The first `len` pointers are owned packets.
    raw: [*mut sys::rte_mbuf; BURST],
    len: usize,
}

// SAFETY: as for Mbuf.
unsafe impl Send for MbufBurst {}

impl Default for MbufBurst {
    fn default() -> Self {
        Self::new()
    }
}

impl MbufBurst {
    /// No packets.
    #[inline]
    pub const fn new() -> Self {
        Self { raw: [core::ptr::null_mut(); BURST], len: 0 }
    }

    /// Number of packets.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without packets.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many more packets fit.
    #[inline]
    pub fn room(&self) -> usize {
        BURST - self.len
    }

    /// Adds a packet; given back when the burst is full.
    #[inline]
    pub(crate) fn push(&mut self, packet: Mbuf) -> Result<(), Mbuf> {
        let Some(slot) = self.raw.get_mut(self.len) else { return Err(packet) };
        *slot = packet.into_raw();
        self.len += 1;
        Ok(())
    }

    /// Takes the last packet out.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Mbuf> {
        let last = self.len.checked_sub(1)?;
        let raw = *self.raw.get(last)?;
        self.len = last;
        // SAFETY: the pointer was an owned packet and is no longer counted.
        unsafe { Mbuf::from_raw(raw) }
    }

    /// Fills up to `n` packets from `pool`: all at once, or one by one as far as they go when the pool runs low.
    ///
    /// # Safety
    /// `pool` must outlive the packets.
    #[inline]
    pub(crate) unsafe fn alloc(&mut self, pool: &Mempool, n: usize) {
        let n = n.min(self.room());
        let Some(free) = self.raw.get_mut(self.len..self.len + n) else { return };
        // SAFETY: room for n pointers; the pool is alive.
        if n > 0 && unsafe { sys::ferry_pktmbuf_alloc_bulk(pool.as_ptr(), free.as_mut_ptr(), n as u16) } == 0 {
            self.len += n;
            return;
        }
        for _ in 0..n {
            // SAFETY: as the caller promises.
            let Some(packet) = (unsafe { Mbuf::alloc(pool) }) else { break };
            if self.push(packet).is_err() {
                break;
            }
        }
    }

    /// Free slots for a device to fill; see [`Self::grow`].
    #[inline]
    pub(crate) fn spare(&mut self) -> &mut [*mut sys::rte_mbuf] {
        self.raw.get_mut(self.len..).unwrap_or_default()
    }

    /// Takes over the first `n` pointers of [`Self::spare`].
    ///
    /// # Safety
    /// They must be packets that nobody else owns.
    #[inline]
    pub(crate) unsafe fn grow(&mut self, n: usize) {
        self.len = (self.len + n).min(BURST);
    }

    /// The packets, to be read or offered to a device. Ownership of those taken is given up by [`Self::forget`].
    #[inline]
    pub(crate) fn pointers(&mut self) -> &mut [*mut sys::rte_mbuf] {
        self.raw.get_mut(..self.len).unwrap_or_default()
    }

    /// Frees all packets in bulk.
    #[inline]
    pub fn free(&mut self) {
        if self.len > 0 {
            // SAFETY: `len` owned packets, given up here.
            unsafe { sys::ferry_pktmbuf_free_bulk(self.raw.as_mut_ptr(), self.len as u16) };
            self.len = 0;
        }
    }

    /// Forgets all packets from the point of view of ownership: a device has them, or they were freed otherwise.
    #[inline]
    pub(crate) fn forget(&mut self) {
        self.len = 0;
    }
}

impl Drop for MbufBurst {
    fn drop(&mut self) {
        self.free();
    }
}
