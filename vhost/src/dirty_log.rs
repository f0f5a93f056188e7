//! The dirty-page log of a live migration: one bit per 4 KiB page of guest memory, in memory shared with the frontend,
//! which clears it as it copies (vhost-user: SET_LOG_BASE, VHOST_F_LOG_ALL).
//!
//! Order matters. The frontend takes the bits with an atomic exchange and then copies the pages, so a page must be
//! written first and marked afterwards. A mark is skipped when the bit is already there; that look may not overtake the
//! write, or the frontend could clear the bit and copy the old page in between. Hence a full fence stands between the
//! last write and the first look: once per burst in the rings, once per call of [`DirtyLog::mark`]. The exchange is a full
//! fence, too: if a bit was seen set, the frontend has yet to take it, and what it copies then holds the write.
//!
//! Most marks find the bit there: guests use the same buffers again and again, and the log is taken a few times a second.
//! So what counts is how fast a look is; atomic changes are few.
#![allow(unsafe_code)] // Its job: atomic access to the shared bitmap.
use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use crate::memory::{Mapping, MemoryError, MemoryMap};

/// Bytes of guest memory per bit of the log (vhost: VHOST_LOG_PAGE).
pub const LOG_PAGE_BYTES: u64 = 4096;

/// Pages whose bits share a word.
const WORD_PAGES: u64 = u64::BITS as u64;

/// Words of the log, 16 MiB of guest memory, that are looked at for all frames of a burst together: one per frame at most.
const QUICK_WORDS: usize = 64;

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
    /// So many words of 64 bits, from the beginning on, are accessed as words; what is behind them as bytes. All of it is bytes where the
    /// frontend has put the log at an odd place.
    words: usize,
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
        let is_aligned = mapping.start().cast::<AtomicU64>().is_aligned();
        let words = if is_aligned { mapping.len() / size_of::<u64>() } else { 0 };
        Ok(Arc::new(Self { mapping, words, out_of_range: AtomicU64::new(0), poisoned }))
    }

    /// Marks the pages of `len` bytes at guest physical address `gpa`, which were written before the call by this thread.
    /// Pages beyond the log are counted ([`Self::out_of_range`]), not marked.
    pub fn mark(&self, gpa: u64, len: u64) {
        fence(Ordering::SeqCst);
        self.mark_fenced(gpa, len);
    }

    /// As [`Self::mark`]; the caller has passed a sequentially consistent fence since its last write to the range.
    pub(crate) fn mark_fenced(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = gpa.saturating_add(len - 1) / LOG_PAGE_BYTES;
        let mut page = gpa / LOG_PAGE_BYTES;
        while page <= last {
            if let Some(word) = self.words().get((page / WORD_PAGES) as usize) {
                // All pages of the word at once.
                let end = (page | (WORD_PAGES - 1)).min(last);
                let bits = (u64::MAX >> (WORD_PAGES - 1 - (end - page))) << (page % WORD_PAGES);
                if word.load(Ordering::Relaxed) & bits.to_le() != bits.to_le() {
                    word.fetch_or(bits.to_le(), Ordering::Release);
                }
                page = end + 1;
            } else if let Some(byte) = self.byte(page) {
                let bit = 1u8 << (page % 8);
                if byte.load(Ordering::Relaxed) & bit == 0 {
                    byte.fetch_or(bit, Ordering::Release);
                }
                page += 1;
            } else {
                self.out_of_range.fetch_add(1, Ordering::Relaxed);
                // Everything above is out of range as well.
                return;
            }
        }
    }

    /// [`Self::mark_fenced`] for ranges that are mostly short and mostly marked already: one fence for all of them.
    #[inline(always)]
    pub(crate) fn mark_all_fenced(&self, ranges: impl Iterator<Item = (u64, u32)>) {
        let words = self.words();
        for (gpa, len) in ranges {
            if !has_short(words, gpa, len) {
                self.mark_one(gpa, len);
            }
        }
    }

    /// True when all pages from the one of `first` to that of `last` are marked, and are not too many to tell quickly. Order: as in
    /// [`Self::mark_fenced`].
    #[inline]
    pub(crate) fn has_all_fenced(&self, first: u64, last: u64) -> bool {
        let (first, last) = (first / LOG_PAGE_BYTES, last / LOG_PAGE_BYTES);
        let (a, b) = ((first / WORD_PAGES) as usize, (last / WORD_PAGES) as usize);
        if b.wrapping_sub(a) > QUICK_WORDS {
            return false;
        }
        let has = |word: &AtomicU64, bits: u64| !u64::from_le(word.load(Ordering::Relaxed)) & bits == 0;
        let (from, to) = (u64::MAX << (first % WORD_PAGES), u64::MAX >> (WORD_PAGES - 1 - last % WORD_PAGES));
        match self.words().get(a..=b) {
            Some([one]) => has(one, from & to),
            Some([low, between @ .., high]) => {
                has(low, from) && has(high, to) && between.iter().all(|word| has(word, u64::MAX))
            }
            _ => false,
        }
    }

    #[cold]
    #[inline(never)]
    fn mark_one(&self, gpa: u64, len: u32) {
        self.mark_fenced(gpa, u64::from(len));
    }

    #[inline(always)]
    fn words(&self) -> &[AtomicU64] {
        if self.words == 0 {
            // Where it begins may not be aligned.
            return &[];
        }
        // SAFETY: so many aligned words lie inside the mapping, which lives as long as self; any value is one of a u64. All access to them,
        // here and in the frontend, is atomic.
        unsafe { std::slice::from_raw_parts(self.mapping.start().cast().as_ptr(), self.words) }
    }

    /// The byte with a page's bit, if it is in the log and not in one of its words.
    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        let byte = page / 8;
        if byte >= self.mapping.len() as u64 || byte < (self.words * size_of::<u64>()) as u64 {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as self; AtomicU8 has no alignment, and all access to the log,
        // here and in the frontend, is atomic.
        Some(unsafe { AtomicU8::from_ptr(self.mapping.start().as_ptr().add(byte as usize)) })
    }

    /// True when the page with guest physical address `gpa` is marked now.
    pub fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE_BYTES;
        if let Some(word) = self.words().get((page / WORD_PAGES) as usize) {
            return u64::from_le(word.load(Ordering::Acquire)) & (1 << (page % WORD_PAGES)) != 0;
        }
        self.byte(page).is_some_and(|b| b.load(Ordering::Acquire) & (1 << (page % 8)) != 0)
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

/// True when the pages of a range are marked in `words`. False says nothing: the range may be empty, long, or not in the words.
#[inline(always)]
fn has_short(words: &[AtomicU64], gpa: u64, len: u32) -> bool {
    let first = gpa / LOG_PAGE_BYTES;
    let beyond = u64::from(len.wrapping_sub(1));
    // Two pages at most, and the second of them is in the words as well. Without a branch for frames that lie in one page: whether they do
    // is hard to foretell.
    if first + 1 >= WORD_PAGES * words.len() as u64 || beyond > LOG_PAGE_BYTES {
        return false;
    }
    let last = (gpa + beyond) / LOG_PAGE_BYTES;
    let is_set = |page: u64| {
        // SAFETY: `last` is at most `first + 1`, which is below the number of bits in the words.
        let word = unsafe { words.get_unchecked((page / WORD_PAGES) as usize) };
        u64::from_le(word.load(Ordering::Relaxed)) & (1 << (page % WORD_PAGES)) != 0
    };
    is_set(first) && is_set(last)
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
