//! Dirty-page logging as QEMU does it while it migrates a guest: a bitmap that the switch fills and somebody else empties.
#![allow(unsafe_code)] // Its job: a bitmap that is shared with the switch.
use super::session::{F_LOG_ALL, FrontendHandle, Session};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

/// Bytes of guest memory per bit.
const PAGE: u64 = 4096;
/// VHOST_VRING_F_LOG: the used ring's writes are logged, too.
const RING_IS_LOGGED: u32 = 1;

/// A dirty log: one bit for each page from guest address 0 on.
#[derive(Debug)]
pub struct PageLog {
    file: File,
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: all access to the words is atomic; the mapping belongs to no thread.
unsafe impl Send for PageLog {}
// SAFETY: as above.
unsafe impl Sync for PageLog {}

impl PageLog {
    /// A log for guest memory that ends at this address.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn new(memory_end: u64) -> Result<Self> {
        let count = usize::try_from(memory_end.div_ceil(PAGE * 64))?.max(1);
        // SAFETY: the name is a C string; the call touches nothing else.
        let fd = unsafe { libc::memfd_create(c"ferry-perf-log".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            bail!("memfd_create: {}", io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(8 * count as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8 * count,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            bail!("mmap: {}", io::Error::last_os_error());
        }
        let words = NonNull::new(base.cast()).context("mmap gave a null pointer")?;
        Ok(Self { file, words, count })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped with this length until drop; zeroed memory is valid, and all access is atomic, here and in the switch.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// Takes all bits, as QEMU does in each of its rounds. Returns how many were set.
    pub fn take(&self) -> u64 {
        let dirty = self.words().iter().filter(|word| word.load(Ordering::Relaxed) != 0);
        dirty.map(|word| u64::from(word.swap(0, Ordering::AcqRel).count_ones())).sum()
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion { mmap_size: 8 * self.count as u64, mmap_offset: 0, mmap_handle: self.file.as_raw_fd() }
    }
}

impl Drop for PageLog {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; `words` lends it only while the log lives.
        unsafe { libc::munmap(self.words.as_ptr().cast(), 8 * self.count) };
    }
}

impl Session {
    /// QEMU's order: the log, then the feature, then the rings' addresses anew. `used`: guest addresses of the used rings.
    pub(super) fn start_logging(&mut self, log: &PageLog, used: [u64; 2]) -> Result<()> {
        ensure!(self.can_log, "the switch does not log what it writes");
        let FrontendHandle(frontend, rings) = &self.frontend;
        frontend.set_log_base(0, Some(log.region())).context("SET_LOG_BASE")?;
        frontend.set_features(self.features() | F_LOG_ALL).context("SET_FEATURES")?;
        for (i, ring) in rings.iter().enumerate() {
            let ring = VringConfigData { flags: RING_IS_LOGGED, log_addr: Some(used[i]), ..*ring };
            frontend.set_vring_addr(i, &ring).context("SET_VRING_ADDR")?;
        }
        Ok(())
    }

    pub(super) fn stop_logging(&mut self) -> Result<()> {
        let FrontendHandle(frontend, rings) = &self.frontend;
        frontend.set_features(self.features()).context("SET_FEATURES")?;
        for (i, ring) in rings.iter().enumerate() {
            frontend.set_vring_addr(i, ring).context("SET_VRING_ADDR")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_taken_once() {
        // 1 GiB and a page: the last word has one page.
        let log = PageLog::new((1 << 30) + PAGE).unwrap();
        assert_eq!(log.count, (1 << 30) / (64 * PAGE as usize) + 1);
        log.words()[0].store(0b1011, Ordering::Relaxed);
        log.words()[log.count - 1].store(1, Ordering::Relaxed);
        assert_eq!((log.take(), log.take()), (4, 0));
    }
}
