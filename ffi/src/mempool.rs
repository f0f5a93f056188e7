//! Pools of packet buffers.
#![allow(unsafe_code)] // Its job: owning an rte_mempool.
use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use ferry_dpdk_sys as sys;

/// mbufs that a thread keeps at hand (per-lcore cache; see the `thread` module).
pub const CACHE_MBUFS: u32 = 256;
/// What one thread's cache can hold at most: DPDK flushes at one and a half times the cache's size.
pub const CACHE_FLUSH_MBUFS: u32 = CACHE_MBUFS * 3 / 2;
/// Ordinary room for data in an mbuf, bytes, without headroom.
pub const DATA_ROOM_BYTES: u16 = 2048;
/// Most room an mbuf can have for data (16-bit lengths), bytes.
pub const MAX_DATA_ROOM_BYTES: u16 = u16::MAX - sys::RTE_PKTMBUF_HEADROOM as u16;

/// A pool of mbufs of one size. Threads may take from it and return to it at once.
///
/// The pool's ring runs in *relaxed tail sync* mode: with the default mode a thread that is preempted between
/// reserving and publishing makes all others spin until it runs again, and PMD threads may have to share CPUs.
#[derive(Debug)]
pub struct Mempool {
    raw: NonNull<sys::rte_mempool>,
    mbufs: u32,
    data_room_bytes: u16,
}

// SAFETY: an rte_mempool is made for use by many threads; the handle has no state of its own.
unsafe impl Send for Mempool {}
// SAFETY: as above.
unsafe impl Sync for Mempool {}

impl Mempool {
    /// Creates a pool of `mbufs` buffers with `data_room_bytes` each, on NUMA node `socket` (negative: any).
    ///
    /// # Errors
    /// The errno value: ENOMEM when EAL's memory is used up.
    pub(crate) fn create(mbufs: u32, data_room_bytes: u16, socket: i32) -> Result<Self, i32> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let data_room_bytes = data_room_bytes.min(MAX_DATA_ROOM_BYTES);
        let name = CString::new(format!("ferry_mbufs_{}", NUMBER.fetch_add(1, Relaxed))).map_err(|_| libc::EINVAL)?;
        // SAFETY: both strings outlive the call, which copies what it needs; the other arguments are plain values.
        let raw = unsafe {
            sys::rte_pktmbuf_pool_create_by_ops(
                name.as_ptr(),
                mbufs,
                CACHE_MBUFS.min(mbufs * 2 / 3),
                0,
                data_room_bytes + sys::RTE_PKTMBUF_HEADROOM as u16,
                if socket < 0 { sys::FERRY_SOCKET_ID_ANY } else { socket },
                c"ring_mt_rts".as_ptr(),
            )
        };
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, mbufs, data_room_bytes }),
            // SAFETY: reads the thread's rte_errno.
            None => Err(unsafe { sys::ferry_errno() }),
        }
    }

    /// The pool as DPDK knows it; valid as long as `self`.
    pub(crate) fn as_ptr(&self) -> *mut sys::rte_mempool {
        self.raw.as_ptr()
    }

    /// Number of buffers.
    pub fn mbufs(&self) -> u32 {
        self.mbufs
    }

    /// Room for data in one buffer, bytes.
    pub fn data_room_bytes(&self) -> u16 {
        self.data_room_bytes
    }

    /// Buffers that are out: with devices, queues or packets under way. A snapshot while others take and return.
    pub fn in_use(&self) -> u32 {
        // SAFETY: the pool is alive; counting only reads.
        unsafe { sys::rte_mempool_in_use_count(self.as_ptr()) }
    }
}

impl Drop for Mempool {
    /// The pool must have got all its buffers back: [`crate::ethdev`] sees to that.
    fn drop(&mut self) {
        // SAFETY: created by this type and freed once. Buffers keep the pool's owner alive (see ethdev).
        unsafe { sys::rte_mempool_free(self.as_ptr()) };
    }
}
