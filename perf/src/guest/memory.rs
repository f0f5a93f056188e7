//! Memory that a generated guest shares with the switch: one memfd, of huge pages where the host has free ones.
#![allow(unsafe_code)] // Its job: mapping shared memory and handing out pointers into it.
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

/// Guest physical address of the region's first byte. Not zero, so that no valid buffer has the address zero.
pub const GUEST_BASE: u64 = 0x4000_0000;

const HUGE: usize = 2 << 20;

/// A shared, zeroed memory region. Handed out front to back and never given back before the guest ends.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    base: NonNull<u8>,
    len: usize,
    used: usize,
    huge: bool,
}

// SAFETY: the mapping belongs to no thread; who hands out parts of it keeps their users apart.
unsafe impl Send for GuestMemory {}

/// A part of the region.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Address in this process.
    pub start: NonNull<u8>,
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub len: usize,
}

impl GuestMemory {
    /// Maps at least `len` bytes, preferably as huge pages.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn new(len: usize) -> Result<Self> {
        let len = len.next_multiple_of(HUGE);
        Self::map(len, true).or_else(|_| Self::map(len, false)).context("guest memory")
    }

    fn map(len: usize, huge: bool) -> Result<Self> {
        let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
        // SAFETY: the name is a C string; the call touches nothing else.
        let fd = unsafe { libc::memfd_create(c"ferry-perf-guest".as_ptr(), flags) };
        if fd < 0 {
            bail!("memfd_create: {}", io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists. MAP_POPULATE makes a
        // lack of huge pages an error of this call instead of a SIGBUS later.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | if huge { libc::MAP_POPULATE } else { 0 },
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            bail!("mmap: {}", io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).context("mmap gave a null pointer")?;
        if !huge {
            // SAFETY: the range was mapped above. Refusal is harmless: ordinary pages then.
            unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { file, base, len, used: 0, huge })
    }

    /// Takes the next `len` bytes, aligned to `align` (a power of two).
    ///
    /// # Errors
    /// When the region is used up.
    pub fn take(&mut self, len: usize, align: usize) -> Result<Area> {
        let at = self.used.next_multiple_of(align);
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            bail!("guest memory of {} bytes is used up", self.len);
        }
        self.used = at + len;
        // SAFETY: at + len <= self.len, checked above.
        let start = unsafe { self.base.add(at) };
        Ok(Area { start, guest: GUEST_BASE + at as u64, len })
    }

    /// The memfd behind it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Address in this process, which is what vhost-user calls the user address.
    pub fn user_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it consists of huge pages.
    pub fn huge(&self) -> bool {
        self.huge
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; areas are used only while the memory lives (see `Guest`).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl Area {
    /// Guest address of the byte at `offset`.
    pub fn guest_at(&self, offset: usize) -> u64 {
        self.guest + offset as u64
    }

    /// Address in this process of the byte at `offset`, as the user address of vhost-user.
    pub fn user_at(&self, offset: usize) -> u64 {
        self.start.as_ptr() as u64 + offset as u64
    }
}
