//! A burst's writes into guest memory on their way into the dirty log.
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::stage::One;
use crate::dirty_log::{DirtyLog, LOG_PAGE_BYTES};

/// Bursts that go by before it is tried again whether the pages of all frames can be looked at together.
const SCATTERED_BURSTS: u32 = 15;

/// Writes of a burst waiting for their marks in the dirty log.
pub(super) struct LogBatch {
    log: Arc<DirtyLog>,
    ranges: Vec<(u64, u32)>,
    /// Bursts for which the pages are to be looked at one by one.
    scattered: u32,
    /// Guest address of the device area.
    device_gpa: u64,
    /// All of it lies in one page.
    device_in_page: bool,
    /// Guest address of the descriptor ring (packed: used descriptors are written there).
    desc_gpa: u64,
}

impl LogBatch {
    const CAPACITY: usize = 512;

    /// `device`: guest address and length of the device area. `desc_gpa`: guest address of the descriptor area.
    pub fn new(log: Arc<DirtyLog>, device: (u64, u64), desc_gpa: u64) -> Self {
        let (device_gpa, device_len) = device;
        Self {
            log,
            ranges: Vec::with_capacity(Self::CAPACITY),
            scattered: 0,
            device_gpa,
            device_in_page: device_gpa % LOG_PAGE_BYTES + device_len <= LOG_PAGE_BYTES,
            desc_gpa,
        }
    }

    /// The log's memory is lost.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.log.poisoned().load(Ordering::Relaxed)
    }

    /// Remembers a write into the device area at `offset`.
    #[inline]
    pub fn add_device(&mut self, offset: u64, len: u32) {
        self.add(self.device_gpa.wrapping_add(offset), len);
    }

    /// Remembers a write into the descriptor area at `offset`.
    #[inline]
    pub fn add_desc(&mut self, offset: u64, len: u32) {
        self.add(self.desc_gpa.wrapping_add(offset), len);
    }

    /// Remembers a write.
    #[inline]
    pub fn add(&mut self, gpa: u64, len: u32) {
        // Used descriptors follow one another in few pages: one range for each page is enough.
        if let Some(&(last, _)) = self.ranges.last()
            && last / LOG_PAGE_BYTES == gpa / LOG_PAGE_BYTES
            && gpa % LOG_PAGE_BYTES + u64::from(len) <= LOG_PAGE_BYTES
            && len > 0
        {
            return;
        }
        if self.ranges.len() == Self::CAPACITY {
            fence(Ordering::SeqCst);
            self.mark();
        }
        self.ranges.push((gpa, len));
    }

    /// Marks what was written into chains, [`One::len`] bytes each, at least one. The caller has passed a sequentially consistent fence since.
    #[inline(always)]
    pub fn mark_chains(&mut self, chains: &[One]) {
        if chains.is_empty() {
            return;
        }
        // The buffers of a guest mostly lie together in a pool, all of whose pages were soon written since the log was last taken. That is
        // quickly told.
        if let Some(left) = self.scattered.checked_sub(1) {
            self.scattered = left;
        } else {
            let (mut low, mut end) = (u64::MAX, 0);
            for one in chains {
                // No overflow: a region's end fits in 64 bits.
                (low, end) = (low.min(one.gpa), end.max(one.gpa.wrapping_add(u64::from(one.len))));
            }
            if self.log.has_all_fenced(low, end.wrapping_sub(1)) {
                return;
            }
            self.scattered = SCATTERED_BURSTS;
        }
        self.log.mark_all_fenced(chains.iter().map(|one| (one.gpa, one.len)));
    }

    /// Marks everything collected. The caller has passed a sequentially consistent fence since the last write.
    pub fn mark(&mut self) {
        if !self.ranges.is_empty() {
            self.log.mark_all_fenced(self.ranges.iter().copied());
            self.ranges.clear();
        }
    }

    /// Marks writes into the device area, of so many bytes at these offsets. As [`Self::mark`].
    #[inline(always)]
    pub fn mark_device(&self, writes: [(u64, u32); 3]) {
        // One page, one mark.
        let writes = writes.into_iter().take(if self.device_in_page { 1 } else { 3 }).filter(|&(_, len)| len > 0);
        self.log.mark_all_fenced(writes.map(|(offset, len)| (self.device_gpa.wrapping_add(offset), len)));
    }
}

#[cfg(test)]
#[allow(unsafe_code)] // Makes a memory file, and takes the log as another process would.
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    /// Pages that buffers lie in.
    const PAGES: u64 = 5000;

    /// A log of so many bytes, beginning `offset` bytes into its file.
    fn log(offset: u64, bytes: u64) -> Arc<DirtyLog> {
        // SAFETY: creates a new descriptor, owned by the File from here on.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ferry-test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(offset + bytes).unwrap();
        DirtyLog::map(&file, offset, bytes).unwrap()
    }

    /// What the frontend does: takes all bits. Calls `f` with each page that had one.
    fn take(log: &DirtyLog, mut f: impl FnMut(u64)) {
        for byte in 0..log.size() as u64 / 8 {
            // SAFETY: inside the mapping, which begins at a page.
            let word = unsafe { AtomicU64::from_ptr(log.base().as_ptr().cast::<u64>().add(byte as usize)) };
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                f(64 * byte + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
        }

        /// A burst's chains: of buffers that lie together, or anywhere.
        fn chains(&mut self) -> Vec<One> {
            let (near, span) = match self.below(4) {
                0 => (0, PAGES * LOG_PAGE_BYTES - (1 << 18)),
                kind => (self.below((PAGES - 500) * LOG_PAGE_BYTES), kind * (1 << 18)),
            };
            let long = if self.below(8) == 0 { 1 << 18 } else { 9000 };
            let mut one = || One {
                id: 0,
                len: 1 + self.below(long) as u32,
                addr: core::ptr::null_mut(),
                gpa: near + self.below(span),
            };
            let count = 1 + near as usize % 64;
            (0..count).map(|_| one()).collect()
        }
    }

    fn pages(one: &One) -> std::ops::RangeInclusive<u64> {
        one.gpa / LOG_PAGE_BYTES..=(one.gpa + u64::from(one.len) - 1) / LOG_PAGE_BYTES
    }

    /// Marked together or one by one, on logs that are words, or words and bytes, or bytes alone, or too short.
    #[test]
    fn a_burst_is_marked_as_its_buffers_are_one_by_one() {
        let whole = PAGES / 8 + 8;
        for (offset, bytes) in [(0, whole), (8, whole + 5), (3, whole), (0, PAGES / 8 - 20)] {
            let (together, single) = (log(offset, bytes), log(0, bytes));
            let mut batch = LogBatch::new(Arc::clone(&together), (0, 4096), 0);
            let mut random = Random(0x10c + offset + bytes);
            let mut expected = vec![false; PAGES as usize + 100];
            for round in 0..3000 {
                let chains = random.chains();
                if round % 2 == 0 {
                    batch.mark_chains(&chains);
                } else {
                    chains.iter().for_each(|one| batch.add(one.gpa, one.len));
                    batch.mark();
                }
                for one in &chains {
                    single.mark(one.gpa, u64::from(one.len));
                    pages(one).for_each(|page| expected[page as usize] = true);
                }
                if round % 50 == 0 {
                    for (page, &is_expected) in expected.iter().enumerate() {
                        let at = page as u64 * LOG_PAGE_BYTES;
                        let is_expected = is_expected && (page as u64) < 8 * bytes;
                        assert_eq!(together.is_marked(at), is_expected, "page {page}, round {round}, log at {offset}");
                        assert_eq!(single.is_marked(at), is_expected, "page {page}, round {round}, log at {offset}");
                    }
                }
            }
            assert_eq!(together.out_of_range() > 0, bytes < PAGES / 8);
        }
    }

    /// While the frontend takes the log and copies pages, nothing that was written is lost: once the writer has stopped and the log was taken
    /// a last time, the copy is the memory.
    #[test]
    fn a_log_that_is_taken_meanwhile_loses_no_write() {
        let log = log(0, PAGES.div_ceil(64) * 8);
        let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let copies: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let copy = |page: u64| {
            copies[page as usize].store(memory[page as usize].load(Ordering::Relaxed), Ordering::Relaxed);
        };
        let mut batch = LogBatch::new(Arc::clone(&log), (0, 4096), 0);
        let mut random = Random(0x7a4e);
        let mut writes = 0;
        for _ in 0..60 {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Acquire) {
                        take(&log, copy);
                    }
                });
                for _ in 0..400 {
                    let chains = random.chains();
                    for page in chains.iter().flat_map(pages) {
                        writes += 1;
                        memory[page as usize].store(writes, Ordering::Relaxed);
                    }
                    fence(Ordering::SeqCst);
                    batch.mark_chains(&chains);
                }
                stop.store(true, Ordering::Release);
            });
            take(&log, copy);
            for (page, (memory, copy)) in memory.iter().zip(&copies).enumerate() {
                assert_eq!(memory.load(Ordering::Relaxed), copy.load(Ordering::Relaxed), "page {page} was lost");
            }
        }
    }
}
