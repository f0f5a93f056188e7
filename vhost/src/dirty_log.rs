//! The dirty-page log of a live migration: one bit per 4 KiB page of guest memory, in memory shared with the frontend,
//! which clears it as it copies (vhost-user: SET_LOG_BASE, VHOST_F_LOG_ALL).
//!
//! Order matters. The frontend takes the bits with an atomic exchange and then copies the pages, so a page must be
//! written first and marked afterwards. A mark is skipped when the bit is already there; that look may not overtake the
//! write, or the frontend could clear the bit and copy the old page in between. Hence a full fence stands between the
//! last write and the first look: once per burst in the rings, once per call of [`DirtyLog::mark`].
#![allow(unsafe_code)] // Its job: atomic access to the shared bitmap.
use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use crate::memory::{Mapping, MemoryError, MemoryMap};

/// Bytes of guest memory per bit of the log (vhost: VHOST_LOG_PAGE).
pub const LOG_PAGE_BYTES: u64 = 4096;

/// Why a log was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// A log of no bytes.
    #[error("the dirty log is empty")]
    Empty,
    /// The file cannot be mapped as described.
    #[error("dirty log: {0}")]
    Memory(#[from] MemoryError),
}

/// A mapped dirty log. Shared by all rings of the port.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    out_of_range: AtomicU64,
    poisoned: Arc<AtomicBool>,
}

impl DirtyLog {
    /// Maps `size` bytes of `file` from `offset` on, after checking that the file holds them.
    pub fn map(file: &File, offset: u64, size: u64) -> Result<Arc<Self>, LogError> {
        if size == 0 {
            return Err(LogError::Empty);
        }
        let poisoned = Arc::default();
        let mapping = Mapping::new(file, offset, size, &poisoned)?;
        Ok(Arc::new(Self { mapping, out_of_range: AtomicU64::new(0), poisoned }))
    }

    /// Marks the pages of `len` bytes at guest physical address `gpa`, which were written before the call by this thread.
    /// Pages beyond the log are counted ([`Self::out_of_range`]), not marked.
    pub fn mark(&self, gpa: u64, len: u64) {
        fence(Ordering::SeqCst);
        self.mark_fenced(gpa, len);
    }

    /// As [`Self::mark`]; the caller has passed a sequentially consistent fence since its last write to the range.
    #[inline]
    pub(crate) fn mark_fenced(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = gpa / LOG_PAGE_BYTES;
        let last = gpa.saturating_add(len - 1) / LOG_PAGE_BYTES;
        for page in first..=last {
            match self.cell(page) {
                Some(byte) => {
                    let bit = 1u8 << (page % 8);
                    if byte.load(Ordering::Relaxed) & bit == 0 {
                        byte.fetch_or(bit, Ordering::Release);
                    }
                }
                None => {
                    self.out_of_range.fetch_add(1, Ordering::Relaxed);
                    // Everything above is out of range as well.
                    return;
                }
            }
        }
    }

    #[inline]
    fn cell(&self, page: u64) -> Option<&AtomicU8> {
        let byte = page / 8;
        if byte >= self.mapping.len() as u64 {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as self; AtomicU8 has no alignment, and all access to the log,
        // here and in the frontend, is atomic.
        Some(unsafe { AtomicU8::from_ptr(self.mapping.start().as_ptr().add(byte as usize)) })
    }

    /// True when the page with guest physical address `gpa` is marked now.
    pub fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE_BYTES;
        self.cell(page).is_some_and(|b| b.load(Ordering::Acquire) & (1 << (page % 8)) != 0)
    }

    /// True when every page of `memory` has its bit. vhost-user: a log smaller than the memory must be refused.
    pub fn covers(&self, memory: &MemoryMap) -> bool {
        memory.regions().iter().all(|r| {
            // No overflow and size > 0: checked when the region was mapped.
            let last_page = (r.guest_addr() + (r.size() - 1)) / LOG_PAGE_BYTES;
            last_page / 8 < self.mapping.len() as u64
        })
    }

    /// Calls of [`Self::mark`] that touched a page beyond the log. Not zero means that the migration has lost writes.
    pub fn out_of_range(&self) -> u64 {
        self.out_of_range.load(Ordering::Relaxed)
    }

    /// First byte of the bitmap, for a caller that looks at bits of its own (canary).
    pub fn base(&self) -> NonNull<u8> {
        self.mapping.start()
    }

    /// Length of the bitmap, bytes.
    pub fn size(&self) -> usize {
        self.mapping.len()
    }

    /// Addresses of the whole mapping in this process, for whoever has to recognise a fault in it.
    pub fn host_range(&self) -> Range<usize> {
        self.mapping.host_range()
    }

    /// Set when an access faulted because the log's file was truncated; the rings above stop at their next burst.
    pub fn poisoned(&self) -> &Arc<AtomicBool> {
        &self.poisoned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRegion, RegionSpec};
    use std::os::fd::FromRawFd;

    fn memfd(len: u64) -> File {
        // SAFETY: creates a new descriptor, owned by the File from here on.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ferry-test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn refuses_short_files_and_overflow() {
        assert!(DirtyLog::map(&memfd(4096), 0, 0).is_err());
        assert!(DirtyLog::map(&memfd(4096), 0, 4097).is_err());
        assert!(DirtyLog::map(&memfd(4096), 4096, 1).is_err());
        assert!(DirtyLog::map(&memfd(4096), u64::MAX, 2).is_err());
        assert!(DirtyLog::map(&memfd(8192), 4096, 4096).is_ok());
    }

    #[test]
    fn marks_every_touched_page_and_no_other() {
        let log = DirtyLog::map(&memfd(4096), 0, 64).unwrap(); // 512 pages
        log.mark(4096 * 9 + 4095, 2);
        log.mark(4096 * 20, 4096);
        log.mark(4096 * 30, 0);
        for page in 0..512 {
            assert_eq!(log.is_marked(page * 4096), matches!(page, 9 | 10 | 20), "page {page}");
        }
        log.mark(4096 * 511, 1);
        assert!(log.is_marked(4096 * 511));
        assert_eq!(log.out_of_range(), 0);
        log.mark(4096 * 511, 4097);
        log.mark(u64::MAX - 1, 100);
        assert_eq!(log.out_of_range(), 2);
        assert!(!log.is_marked(4096 * 512));
    }

    #[test]
    fn knows_what_it_covers() {
        let region = |guest_addr, size| {
            GuestRegion::map(RegionSpec { guest_addr, user_addr: 0, size, mmap_offset: 0, file: memfd(size) }).unwrap()
        };
        let log = DirtyLog::map(&memfd(4096), 0, 1).unwrap();
        assert!(log.covers(&MemoryMap::new(vec![region(0, 8 * 4096)]).unwrap()));
        assert!(!log.covers(&MemoryMap::new(vec![region(0, 8 * 4096 + 1)]).unwrap()));
        assert!(!log.covers(&MemoryMap::new(vec![region(0, 4096), region(1 << 32, 4096)]).unwrap()));
    }
}
