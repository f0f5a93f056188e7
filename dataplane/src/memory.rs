//! Zeroed memory for a table: reserved at once, backed with pages when they are needed or a little before, and fetched into the cache.
#![allow(unsafe_code)] // Its job: typed arrays in anonymous mappings, and prefetching.
use core::ptr::NonNull;
use std::io;

use memmap2::{Advice, MmapMut};

/// Fetches a value's first cache line.
#[inline(always)]
pub(crate) fn prefetch<T>(value: &T) {
    prefetch_at(core::ptr::from_ref(value).cast());
}

/// Fetches the cache line at an address, which may be any.
#[inline(always)]
pub(crate) fn prefetch_at(addr: *const u8) {
    let _ = addr;
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetch has no architectural effect whatever the address.
        unsafe { _mm_prefetch(addr.cast::<i8>(), _MM_HINT_T0) };
    }
}

/// Types for which zeroed memory is a value.
///
/// # Safety
/// All bytes zero must be a valid value, and the type must not need dropping.
pub(crate) unsafe trait Zeroed: Default {}

/// Below this many bytes the heap does.
const MAP_FROM_BYTES: usize = 1 << 20;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// A fixed array of shared values. Large ones are mapped, so that they cost nothing before they are touched.
pub(crate) struct Memory<T: Zeroed> {
    base: NonNull<T>,
    len: usize,
    /// `None`: `base` is a leaked box.
    map: Option<MmapMut>,
}

// SAFETY: it owns its values and only ever hands out `&T`.
unsafe impl<T: Zeroed + Send + Sync> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroed + Send + Sync> Sync for Memory<T> {}

impl<T: Zeroed> Memory<T> {
    /// An array of `len` zeroed values.
    pub fn new(len: usize) -> io::Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        if cfg!(loom) || cfg!(miri) || bytes < MAP_FROM_BYTES {
            let values: Box<[T]> = (0..len).map(|_| T::default()).collect();
            let base = NonNull::from(Box::leak(values)).cast();
            return Ok(Self { base, len, map: None });
        }
        let map = MmapMut::map_anon(bytes)?;
        // Otherwise the first touch of each 2 MB would zero all of them, on the packet path. What is populated ahead gets huge pages.
        let _ = map.advise(Advice::NoHugePage);
        let base = NonNull::new(map.as_ptr().cast_mut().cast::<T>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, len, map: Some(map) })
    }

    /// The values.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `base` points to `len` values, mapped (pages are zero, which `Zeroed` says is a value; a mapping starts at a page
        // boundary, so it is aligned) or leaked from a box, alive as long as `self`.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The value at `index`.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&T> {
        self.as_slice().get(index as usize)
    }

    /// Bytes reserved.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Backs the first `end` values with memory, from where `populated` (bytes, of a former call) stands. Returns where it stands now.
    /// The contents do not change; other threads may use them meanwhile. Huge pages where the kernel has them.
    pub fn populate(&self, populated: usize, end: usize) -> usize {
        let Some(map) = &self.map else { return self.bytes() };
        let end = end.saturating_mul(size_of::<T>()).min(map.len());
        if end <= populated {
            return populated;
        }
        // Whole huge pages: where their boundaries lie depends on the address.
        let address = map.as_ptr() as usize;
        let end = ((address + end).next_multiple_of(HUGE_PAGE) - address).min(map.len());
        let _ = map.advise_range(Advice::HugePage, populated, end - populated);
        if map.advise_range(Advice::PopulateWrite, populated, end - populated).is_err() {
            self.touch(populated, end);
        }
        end
    }

    /// Where the kernel does not know how to populate (before 5.14): writes to each page, changing nothing.
    #[cold]
    fn touch(&self, from: usize, to: usize) {
        for at in (from..to).step_by(PAGE) {
            // SAFETY: `at` is a multiple of the page size below the mapping's length, so there is an aligned u64, made of
            // the atomic words of some T (all `Zeroed` types here are arrays of them); an atomic exchange of 0 for 0 changes nothing.
            // Arrays of other words than u64 are populated before they are shared.
            let word = unsafe { &*self.base.as_ptr().cast::<std::sync::atomic::AtomicU64>().byte_add(at) };
            let _ =
                word.compare_exchange(0, 0, std::sync::atomic::Ordering::Relaxed, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

impl<T: Zeroed> Drop for Memory<T> {
    fn drop(&mut self) {
        if self.map.is_none() {
            let values = core::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.len);
            // SAFETY: leaked by `new` from a box of this length, and given back only here.
            drop(unsafe { Box::from_raw(values) });
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[derive(Default)]
    struct Word(AtomicU64);
    // SAFETY: an atomic integer.
    unsafe impl Zeroed for Word {}

    #[test]
    fn small_and_large_are_zero_and_separate() {
        for len in [1, 3, if cfg!(miri) { 30 } else { 300_000 }] {
            let memory = Memory::<Word>::new(len).unwrap();
            assert_eq!(memory.bytes(), len * 8);
            assert!(memory.as_slice().iter().all(|w| w.0.load(Ordering::Relaxed) == 0));
            for (n, w) in memory.as_slice().iter().enumerate() {
                w.0.store(n as u64 + 1, Ordering::Relaxed);
            }
            assert!(memory.get(len as u32).is_none());
            let mut at = 0;
            while at < memory.bytes() {
                let next = memory.populate(at, at / 8 + 1);
                assert!(next > at);
                at = next;
            }
            if memory.map.is_some() {
                memory.touch(0, memory.bytes());
            }
            for (n, w) in memory.as_slice().iter().enumerate() {
                assert_eq!(w.0.load(Ordering::Relaxed), n as u64 + 1);
            }
        }
        assert!(Memory::<Word>::new(usize::MAX / 2).is_err());
    }
}
