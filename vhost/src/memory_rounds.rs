//! QEMU's memory rounds, seen in the dirty log itself: no monitor and no change to libvirt is needed.
//!
//! At the beginning of every round of a live migration QEMU takes the whole log and clears it (vhost-user: SET_LOG_BASE). So a bit
//! that is set here, the *canary*, is gone when a round has passed. Its page is copied once more per round and otherwise unharmed.
//! Measured with QEMU 7.2 and 10.0: one for one with QMP's MIGRATION_PASS; under starvation one clearing may stand for several
//! rounds; the last one belongs to the stop.
use std::sync::Arc;

use crate::dirty_log::{DirtyLog, LOG_PAGE_BYTES};

/// Pages that QEMU may take at a time; a canary in the same group as a used ring, which QEMU marks by itself, would
/// say less.
const GROUP_PAGES: u64 = 64;

/// Watches one VM's log. Several NICs of a VM share the log and need one of these.
#[derive(Debug)]
pub struct MemoryRounds {
    log: Arc<DirtyLog>,
    canary: u64,
    passed: u64,
}

impl MemoryRounds {
    /// Sets the canary. `used_rings`: guest physical addresses of the used rings. Page 0 is taken unless one of them is near it.
    pub fn new(log: Arc<DirtyLog>, used_rings: &[u64]) -> Self {
        let near = |page: u64| used_rings.iter().any(|at| at / LOG_PAGE_BYTES / GROUP_PAGES == page / GROUP_PAGES);
        let pages = log.size() as u64 * 8;
        let page = (0..pages).step_by(GROUP_PAGES as usize).find(|&page| !near(page)).unwrap_or(0);
        let rounds = Self { log, canary: page * LOG_PAGE_BYTES, passed: 0 };
        rounds.log.mark(rounds.canary, 1);
        rounds
    }

    /// Looks at the canary and sets it again if it has gone. True: at least one round has passed since the last look. To be called
    /// every millisecond or so.
    pub fn poll(&mut self) -> bool {
        if self.log.is_marked(self.canary) {
            return false;
        }
        self.log.mark(self.canary, 1);
        self.passed += 1;
        true
    }

    /// Rounds seen so far.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// The log that is watched.
    pub fn log(&self) -> &Arc<DirtyLog> {
        &self.log
    }
}

#[cfg(test)]
#[allow(unsafe_code)] // Makes memory files.
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::FromRawFd;

    fn log(bytes: u64) -> (Arc<DirtyLog>, File) {
        // SAFETY: creates a new descriptor, owned by the File from here on.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ferry-test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(bytes).unwrap();
        (DirtyLog::map(&file, 0, bytes).unwrap(), file)
    }

    /// As QEMU does at the beginning of a round.
    fn clear(log: &DirtyLog, file: &File) {
        use std::os::unix::fs::FileExt;
        file.write_all_at(&vec![0; log.size()], 0).unwrap();
    }

    #[test]
    fn each_clearing_is_a_round() {
        let (log, file) = log(4096);
        let mut rounds = MemoryRounds::new(Arc::clone(&log), &[]);
        assert!(log.is_marked(0));
        assert!(!rounds.poll());
        for n in 1..=3 {
            clear(&log, &file);
            assert!(rounds.poll());
            assert!(!rounds.poll());
            assert_eq!(rounds.passed(), n);
        }
        // Two clearings between two looks are one.
        clear(&log, &file);
        clear(&log, &file);
        assert!(rounds.poll() && !rounds.poll());
    }

    #[test]
    fn the_canary_keeps_away_from_used_rings() {
        let (log, _) = log(4096);
        let group = GROUP_PAGES * LOG_PAGE_BYTES;
        let rounds = MemoryRounds::new(Arc::clone(&log), &[10 * LOG_PAGE_BYTES, group + 5]);
        assert!(!log.is_marked(0));
        assert!(log.is_marked(2 * group));
        assert_eq!(rounds.passed(), 0);
        // Where there is nothing else, page 0 it is.
        let (small, _) = self::log(8);
        MemoryRounds::new(Arc::clone(&small), &[0]);
        assert!(small.is_marked(0));
    }
}
