//! A guest's memory as the frontend shares it: regions mapped from file descriptors, and the translation of guest
//! physical and frontend user addresses into pointers.
//!
//! Everything in a region description comes from the frontend and is checked before it is mapped: sums that overflow,
//! files shorter than what they are said to hold (touching the missing part would be a SIGBUS later), overlapping
//! regions. What cannot be checked is that the file stays that long; see [`GuestRegion::poisoned`].
#![allow(unsafe_code)] // Its job: mapping guest memory and handing out raw pointers into it.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sigbus::{self, Registration};

/// Most regions of one guest: QEMU's limit for CONFIGURE_MEM_SLOTS (`VHOST_USER_MAX_RAM_SLOTS` is 512 on x86, three are
/// never hot-plugged).
pub const MAX_REGIONS: usize = 509;

/// Why a guest's memory was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("memory region at guest address {guest_addr:#x} is empty")]
    Empty {
        /// Guest physical address of the region.
        guest_addr: u64,
    },
    /// An address plus the size exceeds 64 bits.
    #[error("{what} {addr:#x} plus size {size:#x} overflows")]
    Overflow {
        /// Which address.
        what: &'static str,
        /// The address or offset.
        addr: u64,
        /// The size, bytes.
        size: u64,
    },
    /// The file is shorter than the region says.
    #[error("memory file has {file_size:#x} bytes, the region needs {needed:#x}")]
    ShortFile {
        /// Length of the file, bytes.
        file_size: u64,
        /// Length the region needs, bytes.
        needed: u64,
    },
    /// Only regular files (memfd, hugetlbfs, tmpfs) have a length that can be checked.
    #[error("memory file is not a regular file (mode {mode:#o})")]
    NotAFile {
        /// File mode from fstat.
        mode: u32,
    },
    /// Two regions share guest physical addresses.
    #[error("memory regions at guest addresses {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest address of the lower region.
        first: u64,
        /// Guest address of the region that begins inside the lower one.
        second: u64,
    },
    /// More than [`MAX_REGIONS`].
    #[error("{0} memory regions exceed the limit of {MAX_REGIONS}")]
    TooMany(usize),
    /// A system call failed.
    #[error("{call} of guest memory failed: {source}")]
    System {
        /// Which call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// A memory mapping of a file, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Start of the mapping (aligned for the file's page size).
    map: NonNull<u8>,
    map_len: usize,
    /// Where the wanted bytes begin.
    start: NonNull<u8>,
    len: usize,
    /// Contains a SIGBUS inside. `None` only while the mapping is made and unmade.
    protection: Option<Registration>,
}

// SAFETY: a Mapping is an address range that belongs to no thread; accesses through it are the users' business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, shared and writable, after checking that the file holds them.
    /// `poisoned` is set when the file turns out to be shorter later (see [`sigbus`]).
    pub(crate) fn new(file: &File, offset: u64, len: u64, poisoned: &Arc<AtomicBool>) -> Result<Self, MemoryError> {
        let needed =
            offset.checked_add(len).ok_or(MemoryError::Overflow { what: "file offset", addr: offset, size: len })?;
        // SAFETY: fstat writes into the zeroed struct that it is given; all-zero is a valid `stat`.
        let stat = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(file.as_raw_fd(), &raw mut stat) != 0 {
                return Err(MemoryError::System { call: "fstat", source: io::Error::last_os_error() });
            }
            stat
        };
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(MemoryError::NotAFile { mode: stat.st_mode });
        }
        let file_size = u64::try_from(stat.st_size).unwrap_or(0);
        if file_size < needed {
            return Err(MemoryError::ShortFile { file_size, needed });
        }
        // Files on hugetlbfs are mapped and unmapped in huge pages only, whose size fstat tells as st_blksize.
        let page = match u64::try_from(stat.st_blksize) {
            Ok(b) if b.is_power_of_two() && (4096..=1 << 30).contains(&b) => b,
            _ => 4096,
        };
        let map_offset = offset & !(page - 1);
        let lead = offset - map_offset;
        let overflow = || MemoryError::Overflow { what: "mapping length", addr: lead, size: len };
        let map_len = len.checked_add(lead).and_then(|n| n.checked_next_multiple_of(page)).ok_or_else(overflow)?;
        let (Ok(map_len), Ok(lead), Ok(len), Ok(map_offset)) =
            (usize::try_from(map_len), usize::try_from(lead), usize::try_from(len), libc::off_t::try_from(map_offset))
        else {
            return Err(overflow());
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                map_offset,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(MemoryError::System { call: "mmap", source: io::Error::last_os_error() });
        }
        let map = NonNull::new(map.cast::<u8>())
            .ok_or_else(|| MemoryError::System { call: "mmap", source: io::ErrorKind::InvalidData.into() })?;
        // SAFETY: the range was mapped just now. A guest's memory does not belong in this process's core dump; failing is harmless.
        unsafe { libc::madvise(map.as_ptr().cast(), map_len, libc::MADV_DONTDUMP) };
        // SAFETY: lead < map_len by construction.
        let start = unsafe { map.add(lead) };
        let mut mapping = Self { map, map_len, start, len, protection: None };
        // SAFETY: exactly what was mapped just now, huge pages included; only raw pointers lead into it, and `drop` ends the
        // registration before it unmaps.
        let protection = unsafe { sigbus::register(map.as_ptr(), map_len, poisoned) };
        mapping.protection =
            Some(protection.map_err(|source| MemoryError::System { call: "fault protection", source })?);
        Ok(mapping)
    }

    /// First wanted byte.
    #[inline]
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Wanted length, bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The whole mapping as addresses.
    pub(crate) fn host_range(&self) -> Range<usize> {
        let start = self.map.as_ptr() as usize;
        start..start + self.map_len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.protection = None;
        // SAFETY: exactly what mmap returned; whoever could reach it (rings, published maps) held this value alive.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

/// What the frontend says about one region (vhost-user: memory region description of SET_MEM_TABLE and ADD_MEM_REG).
#[derive(Debug)]
pub struct RegionSpec {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Address in the frontend's own address space; ring addresses are given in these terms.
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region begins in `file`, bytes.
    pub mmap_offset: u64,
    /// The memory.
    pub file: File,
}

/// One mapped region of guest memory. Unmapped when the last user lets go.
#[derive(Debug)]
pub struct GuestRegion {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
    mmap_offset: u64,
    mapping: Mapping,
    poisoned: Arc<AtomicBool>,
    /// Kept: DEL_MEM_REG and inspection compare files, and an open descriptor keeps hugetlbfs pages reserved.
    file: File,
}

impl GuestRegion {
    /// Checks and maps a region.
    pub fn map(spec: RegionSpec) -> Result<Arc<Self>, MemoryError> {
        let RegionSpec { guest_addr, user_addr, size, mmap_offset, file } = spec;
        if size == 0 {
            return Err(MemoryError::Empty { guest_addr });
        }
        for (what, addr) in [("guest address", guest_addr), ("user address", user_addr), ("file offset", mmap_offset)] {
            addr.checked_add(size).ok_or(MemoryError::Overflow { what, addr, size })?;
        }
        let poisoned = Arc::new(AtomicBool::new(false));
        let mapping = Mapping::new(&file, mmap_offset, size, &poisoned)?;
        Ok(Arc::new(Self { guest_addr, user_addr, size, mmap_offset, mapping, poisoned, file }))
    }

    /// Guest physical address of the first byte.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }
    /// Frontend address of the first byte.
    pub fn user_addr(&self) -> u64 {
        self.user_addr
    }
    /// Size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Offset in the file, bytes.
    pub fn mmap_offset(&self) -> u64 {
        self.mmap_offset
    }
    /// The file behind the region.
    pub fn file(&self) -> &File {
        &self.file
    }
    /// Addresses of the whole mapping in this process, for whoever has to recognise a fault in it.
    pub fn host_range(&self) -> Range<usize> {
        self.mapping.host_range()
    }
    /// Set when an access faulted because the file was truncated; the rings above stop at their next burst.
    pub fn poisoned(&self) -> &Arc<AtomicBool> {
        &self.poisoned
    }
}

/// One region as translation needs it: plain numbers, side by side in memory.
#[derive(Clone, Copy, Debug)]
struct Window {
    guest_addr: u64,
    size: u64,
    host: NonNull<u8>,
    user_addr: u64,
}

impl Window {
    /// `len` bytes at `gpa`, when all of them lie inside.
    #[inline(always)]
    fn get(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        // One comparison covers "below" and "above": below wraps to a huge offset.
        let offset = gpa.wrapping_sub(self.guest_addr);
        if offset < self.size && len <= self.size - offset {
            // SAFETY: offset + len <= size, the length of the mapping behind `host`.
            Some(unsafe { self.host.add(offset as usize) })
        } else {
            None
        }
    }

    #[inline]
    fn get_user(&self, uva: u64, len: u64) -> Option<u64> {
        let offset = uva.wrapping_sub(self.user_addr);
        (offset < self.size && len <= self.size - offset).then_some(offset)
    }
}

/// All memory of one guest: regions sorted by guest address, without overlap. Immutable; a change of memory makes a new one.
#[derive(Debug)]
pub struct MemoryMap {
    windows: Box<[Window]>,
    regions: Box<[Arc<GuestRegion>]>,
}

// SAFETY: the pointers in `windows` point into the mappings that `regions` keeps alive; they are not dereferenced here.
unsafe impl Send for MemoryMap {}
// SAFETY: as above, and the map is immutable.
unsafe impl Sync for MemoryMap {}

impl MemoryMap {
    /// A map of at most [`MAX_REGIONS`] regions, in any order.
    pub fn new(mut regions: Vec<Arc<GuestRegion>>) -> Result<Arc<Self>, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.guest_addr);
        for (a, b) in regions.iter().zip(regions.iter().skip(1)) {
            // No overflow: checked when the region was mapped.
            if a.guest_addr + a.size > b.guest_addr {
                return Err(MemoryError::Overlap { first: a.guest_addr, second: b.guest_addr });
            }
        }
        let windows = regions
            .iter()
            .map(|r| Window { guest_addr: r.guest_addr, size: r.size, host: r.mapping.start(), user_addr: r.user_addr })
            .collect();
        Ok(Arc::new(Self { windows, regions: regions.into_boxed_slice() }))
    }

    /// The regions, by rising guest address.
    pub fn regions(&self) -> &[Arc<GuestRegion>] {
        &self.regions
    }

    #[inline]
    fn window(&self, gpa: u64) -> Option<&Window> {
        // The first region is where small guests have everything.
        let first = self.windows.first()?;
        if gpa.wrapping_sub(first.guest_addr) < first.size {
            return Some(first);
        }
        let after = self.windows.partition_point(|w| w.guest_addr <= gpa);
        let w = self.windows.get(after.checked_sub(1)?)?;
        (gpa.wrapping_sub(w.guest_addr) < w.size).then_some(w)
    }

    /// Where `len` bytes at guest physical address `gpa` are mapped; `None` unless one region holds them all.
    #[inline]
    pub fn translate(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        self.window(gpa)?.get(gpa, len)
    }

    /// As [`Self::translate`], for as many of the `len` bytes as the region at `gpa` holds: at least one.
    /// Call again behind them for a buffer that crosses into an adjacent region.
    #[inline]
    pub fn translate_prefix(&self, gpa: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let w = self.window(gpa)?;
        let room = w.size - gpa.wrapping_sub(w.guest_addr);
        let n = u64::from(len).min(room);
        Some((w.get(gpa, n)?, n as u32))
    }

    /// Where `len` bytes at the frontend's address `uva` are mapped; `None` unless one region holds them all.
    pub fn translate_user(&self, uva: u64, len: u64) -> Option<NonNull<u8>> {
        self.windows.iter().find_map(|w| {
            let offset = w.get_user(uva, len)?;
            w.get(w.guest_addr.wrapping_add(offset), len)
        })
    }

    /// The guest physical address of `len` bytes at the frontend's address `uva`.
    pub fn user_to_guest(&self, uva: u64, len: u64) -> Option<u64> {
        self.windows.iter().find_map(|w| Some(w.guest_addr.wrapping_add(w.get_user(uva, len)?)))
    }

    /// True when a region lost its backing file (see [`GuestRegion::poisoned`]).
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.poisoned.load(Ordering::Relaxed))
    }
}

/// A translator for one ring: remembers the region of its last hit, where the next address almost always is.
#[derive(Debug)]
pub(crate) struct Cursor {
    last: Window,
    map: Arc<MemoryMap>,
}

// SAFETY: `last` points into a mapping that `map` keeps alive; plain numbers otherwise.
unsafe impl Send for Cursor {}
// SAFETY: as above.
unsafe impl Sync for Cursor {}

impl Cursor {
    pub(crate) fn new(map: Arc<MemoryMap>) -> Self {
        // An empty window never matches.
        let last = Window { guest_addr: 0, size: 0, host: NonNull::dangling(), user_addr: 0 };
        Self { last: map.windows.first().copied().unwrap_or(last), map }
    }

    pub(crate) fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// The region of its last hit, to look at without it. Valid as long as the cursor.
    #[inline(always)]
    pub(crate) fn view(&self) -> View {
        let Window { guest_addr, size, host, .. } = self.last;
        // No overflow of the sum: checked when the region was mapped. The difference is an address only with a guest address added.
        View { origin: host.as_ptr().wrapping_sub(guest_addr as usize), end: guest_addr.wrapping_add(size), size }
    }

    /// As [`MemoryMap::translate`].
    #[inline(always)]
    pub(crate) fn translate(&mut self, gpa: u64, len: u32) -> Option<NonNull<u8>> {
        match self.last.get(gpa, u64::from(len)) {
            Some(p) => Some(p),
            None => self.translate_slow(gpa, len),
        }
    }

    #[cold]
    fn translate_slow(&mut self, gpa: u64, len: u32) -> Option<NonNull<u8>> {
        let w = *self.map.window(gpa)?;
        self.last = w;
        w.get(gpa, u64::from(len))
    }

    /// As [`MemoryMap::translate_prefix`].
    #[cold]
    pub(crate) fn translate_prefix(&mut self, gpa: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        self.map.translate_prefix(gpa, len)
    }
}

/// One region, as a loop over many addresses needs it: few numbers, which stay in registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// Where guest address 0 would be.
    origin: *mut u8,
    /// Guest address behind the last byte.
    end: u64,
    size: u64,
}

impl View {
    /// `len` bytes at `gpa`, when there are any and all of them lie inside.
    #[inline(always)]
    pub(crate) fn get(&self, gpa: u64, len: u32) -> Option<*mut u8> {
        // Bytes from `gpa` to the end: below the region more than it has, above it (wrapped) as well.
        let room = self.end.wrapping_sub(gpa);
        // Of no bytes the last would be at the end of all numbers.
        let last = u64::from(len).wrapping_sub(1);
        (room <= self.size && last < room).then(|| self.origin.wrapping_add(gpa as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    pub(crate) fn memfd(len: u64) -> File {
        // SAFETY: creates a new descriptor, owned by the File from here on.
        let file = unsafe {
            let fd = libc::memfd_create(c"ferry-test".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(len).unwrap();
        file
    }

    fn spec(guest_addr: u64, user_addr: u64, size: u64, mmap_offset: u64, file_len: u64) -> RegionSpec {
        RegionSpec { guest_addr, user_addr, size, mmap_offset, file: memfd(file_len) }
    }

    #[test]
    fn refuses_what_would_fault_later() {
        assert!(matches!(GuestRegion::map(spec(0, 0, 0, 0, 4096)), Err(MemoryError::Empty { .. })));
        assert!(matches!(GuestRegion::map(spec(0, 0, 8192, 0, 4096)), Err(MemoryError::ShortFile { .. })));
        assert!(matches!(GuestRegion::map(spec(0, 0, 4096, 1, 4096)), Err(MemoryError::ShortFile { .. })));
        assert!(matches!(GuestRegion::map(spec(u64::MAX - 1, 0, 4096, 0, 4096)), Err(MemoryError::Overflow { .. })));
        assert!(matches!(GuestRegion::map(spec(0, u64::MAX - 4094, 4096, 0, 4096)), Err(MemoryError::Overflow { .. })));
        assert!(matches!(GuestRegion::map(spec(0, 0, 4096, u64::MAX - 8, 4096)), Err(MemoryError::Overflow { .. })));
        let pipe = File::open("/dev/zero").unwrap();
        let s = RegionSpec { guest_addr: 0, user_addr: 0, size: 4096, mmap_offset: 0, file: pipe };
        assert!(matches!(GuestRegion::map(s), Err(MemoryError::NotAFile { .. })));
    }

    #[test]
    fn maps_at_the_offset() {
        use std::os::unix::fs::FileExt;
        let file = memfd(3 * 4096);
        file.write_all_at(b"here", 5000).unwrap();
        let r = GuestRegion::map(RegionSpec { guest_addr: 0x1000, user_addr: 0, size: 4096, mmap_offset: 5000, file })
            .unwrap();
        let map = MemoryMap::new(vec![r]).unwrap();
        let p = map.translate(0x1000, 4).unwrap();
        // SAFETY: translate vouches for four bytes.
        assert_eq!(unsafe { std::slice::from_raw_parts(p.as_ptr(), 4) }, b"here");
    }

    #[test]
    fn translates_inside_only() {
        let a = GuestRegion::map(spec(0x10_0000, 0x7000_0000, 0x4000, 0, 0x4000)).unwrap();
        let b = GuestRegion::map(spec(0x10_4000, 0x9000_0000, 0x4000, 0, 0x4000)).unwrap();
        let c = GuestRegion::map(spec(0x1_0000_0000, 0xa000_0000, 0x1000, 0, 0x1000)).unwrap();
        let map = MemoryMap::new(vec![c, b, a]).unwrap();
        assert!(map.translate(0x10_0000, 0x4000).is_some());
        assert!(map.translate(0x10_0000, 0x4001).is_none());
        assert!(map.translate(0x0f_ffff, 1).is_none());
        assert!(map.translate(0x10_3fff, 2).is_none(), "two mappings are not one pointer");
        assert!(map.translate(0x10_8000, 1).is_none());
        assert!(map.translate(u64::MAX, 2).is_none());
        assert!(map.translate(0x10_0010, u64::MAX - 4).is_none());
        assert!(map.translate(0x1_0000_0fff, 1).is_some());
        let (_, n) = map.translate_prefix(0x10_3ff0, 64).unwrap();
        assert_eq!(n, 16);
        let (_, n) = map.translate_prefix(0x10_4000, 48).unwrap();
        assert_eq!(n, 48);
        assert!(map.translate_prefix(0x10_8000, 1).is_none());
        assert_eq!(map.translate_user(0x9000_0010, 8), map.translate(0x10_4010, 8));
        assert!(map.translate_user(0x9000_3ff9, 8).is_none());
        assert_eq!(map.user_to_guest(0xa000_0004, 4), Some(0x1_0000_0004));

        let mut cursor = Cursor::new(Arc::clone(&map));
        for gpa in [0x10_0000, 0x1_0000_0000, 0x10_4000, 0x10_0800] {
            assert_eq!(cursor.translate(gpa, 16), map.translate(gpa, 16));
            assert!(cursor.translate(gpa, 0x5000).is_none());
        }
    }

    #[test]
    fn a_view_shows_what_its_region_holds() {
        let a = GuestRegion::map(spec(0x10_0000, 0, 0x4000, 0, 0x4000)).unwrap();
        let b = GuestRegion::map(spec(0x10_4000, 0, 0x4000, 0, 0x4000)).unwrap();
        let map = MemoryMap::new(vec![a, b]).unwrap();
        let mut cursor = Cursor::new(Arc::clone(&map));
        let same = |view: View, gpa, len| {
            let want = map.translate(gpa, u64::from(len)).map(NonNull::as_ptr);
            assert_eq!(view.get(gpa, len), want, "{len} bytes at {gpa:#x}");
        };
        let first = cursor.view();
        for (gpa, len) in [(0x10_0000, 1), (0x10_0000, 0x4000), (0x10_0000, 0x4001), (0x10_3fff, 1), (0x10_3fff, 2)] {
            same(first, gpa, len);
        }
        for (gpa, len) in
            [(0x0f_ffff, 1), (0x0f_ffff, 2), (0, 1), (u64::MAX, 1), (u64::MAX, u32::MAX), (0x10_0000, u32::MAX)]
        {
            same(first, gpa, len);
        }
        assert!(first.get(0x10_4000, 1).is_none(), "the next region's");
        assert!(first.get(0x10_0000, 0).is_none() && first.get(0x10_4000, 0).is_none(), "nothing is nowhere");
        assert!(cursor.translate(0x10_4000, 1).is_some());
        same(cursor.view(), 0x10_4000, 0x4000);
        same(cursor.view(), 0x10_7fff, 1);
        assert!(cursor.view().get(0x10_3fff, 1).is_none());
        let none = Cursor::new(MemoryMap::new(vec![]).unwrap());
        for gpa in [0, 1, u64::MAX] {
            assert!(none.view().get(gpa, 1).is_none());
        }
    }

    #[test]
    fn refuses_overlap_and_excess() {
        let a = GuestRegion::map(spec(0x1000, 0, 0x2000, 0, 0x2000)).unwrap();
        let b = GuestRegion::map(spec(0x2000, 0, 0x2000, 0, 0x2000)).unwrap();
        assert!(matches!(MemoryMap::new(vec![b, Arc::clone(&a)]), Err(MemoryError::Overlap { .. })));
        assert!(matches!(MemoryMap::new(vec![a; MAX_REGIONS + 1]), Err(MemoryError::TooMany(_))));
    }

    #[test]
    fn poison_shows_in_the_map() {
        let a = GuestRegion::map(spec(0x1000, 0, 0x1000, 0, 0x1000)).unwrap();
        let map = MemoryMap::new(vec![Arc::clone(&a)]).unwrap();
        assert!(!map.is_poisoned());
        a.poisoned().store(true, Ordering::Relaxed);
        assert!(map.is_poisoned());
    }
}
