//! Where the packed rings of a port stand, kept in a small file so that a restarted switch can go on with them.
//!
//! A split ring tells by its used index how far the device got. A packed ring does not, and when the back-end dies without
//! GET_VRING_BASE, QEMU sends the base of the last start again, which is stale. So before a burst becomes visible to the
//! guest, its PMD thread stores two positions here: before and behind the burst. Whether the burst got out shows
//! in the ring itself, at the first position (see `resume.rs`); so killing the process at any instruction is harmless.
//!
//! The file belongs into a tmpfs (`/run`): on a disk, its write-back could stall a PMD thread.
//! Layout, native byte order: 64 bytes of header (magic, number of slots), then 64 bytes per vring (see `Offset`).
#![allow(unsafe_code)] // Atomic access to a shared mapping.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::Mapping;

const MAGIC: u64 = u64::from_ne_bytes(*b"FERRYVQ1");
const SLOT_BYTES: usize = 64;

/// Where a slot's words lie, bytes.
#[repr(usize)]
enum Offset {
    /// `old << 32 | new`: each bits 0 to 14 the index and 15 the wrap counter.
    Positions = 0,
    /// Guest physical address of the descriptor ring.
    Desc = 8,
    /// Device of the memory file.
    Device = 16,
    /// Inode of the memory file.
    Inode = 24,
    /// Ring size; 0: the slot holds nothing.
    Size = 32,
}

/// Which ring a slot is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingIdentity {
    /// Guest physical address of the descriptor ring.
    pub(crate) desc_gpa: u64,
    /// Descriptors.
    pub(crate) size: u16,
    /// Device and inode of the memory file: the same guest.
    pub(crate) file: (u64, u64),
}

/// What was stored last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) ring: RingIdentity,
    /// Before the last burst.
    pub(crate) old: u16,
    /// Behind it.
    pub(crate) new: u16,
}

/// The file of one port.
#[derive(Debug)]
pub(crate) struct MirrorFile {
    mapping: Mapping,
}

impl MirrorFile {
    /// Opens or makes the file for `vrings` vrings. What another number of vrings or version left is thrown away.
    pub(crate) fn open(path: &Path, vrings: usize) -> io::Result<Arc<Self>> {
        let file: File = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let bytes = (SLOT_BYTES * (vrings + 1)) as u64;
        let mut header = [0u8; 16];
        let expected = [MAGIC.to_ne_bytes(), (vrings as u64).to_ne_bytes()].concat();
        let known =
            file.metadata()?.len() == bytes && file.read_exact_at(&mut header, 0).is_ok() && header[..] == expected;
        if !known {
            file.set_len(0)?;
            file.set_len(bytes)?;
            file.write_all_at(&expected, 0)?;
        }
        let mapping = Mapping::new(&file, 0, bytes, &Arc::default()).map_err(io::Error::other)?;
        Ok(Arc::new(Self { mapping }))
    }

    fn word(&self, slot: usize, offset: Offset) -> Option<&AtomicU64> {
        let at = (slot + 1) * SLOT_BYTES + offset as usize;
        if at + 8 > self.mapping.len() {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as self; 8-aligned, because the mapping is and `at` is a multiple of
        // 8; accessed atomically only.
        Some(unsafe { AtomicU64::from_ptr(self.mapping.start().as_ptr().add(at).cast()) })
    }

    fn read(&self, slot: usize, offset: Offset) -> u64 {
        self.word(slot, offset).map_or(0, |w| w.load(Ordering::Acquire))
    }

    fn write(&self, slot: usize, offset: Offset, value: u64) {
        if let Some(word) = self.word(slot, offset) {
            word.store(value, Ordering::Release);
        }
    }

    /// What `slot` says.
    pub(crate) fn load(&self, slot: usize) -> Option<Stored> {
        let size = self.read(slot, Offset::Size);
        let positions = self.read(slot, Offset::Positions);
        (size != 0).then_some(Stored {
            ring: RingIdentity {
                desc_gpa: self.read(slot, Offset::Desc),
                size: u16::try_from(size).ok()?,
                file: (self.read(slot, Offset::Device), self.read(slot, Offset::Inode)),
            },
            old: (positions >> 32) as u16,
            new: positions as u16,
        })
    }

    /// The ring in `slot` is somebody else's business from now on (GET_VRING_BASE, reset).
    pub(crate) fn clear(&self, slot: usize) {
        self.write(slot, Offset::Size, 0);
    }

    /// A ring starts at `position`; its PMD thread reports to the result.
    pub(crate) fn begin(self: &Arc<Self>, slot: usize, ring: RingIdentity, position: u16) -> Option<Arc<BaseMirror>> {
        self.clear(slot);
        self.write(slot, Offset::Desc, ring.desc_gpa);
        self.write(slot, Offset::Device, ring.file.0);
        self.write(slot, Offset::Inode, ring.file.1);
        let mirror = BaseMirror { positions: self.word(slot, Offset::Positions)?.into(), _file: Arc::clone(self) };
        mirror.store(position, position);
        self.write(slot, Offset::Size, u64::from(ring.size));
        Some(Arc::new(mirror))
    }
}

/// One ring's place in the file.
#[derive(Debug)]
pub struct BaseMirror {
    positions: NonNull<AtomicU64>,
    /// Keeps `positions` mapped.
    _file: Arc<MirrorFile>,
}

// SAFETY: an atomic in a mapping that the value keeps alive.
unsafe impl Send for BaseMirror {}
// SAFETY: as above.
unsafe impl Sync for BaseMirror {}

impl BaseMirror {
    /// To be called before the burst from `old` to `new` becomes visible with a release store.
    #[inline]
    pub(crate) fn store(&self, old: u16, new: u16) {
        // SAFETY: `_file` keeps the mapping, in which `word` found the place.
        let positions = unsafe { self.positions.as_ref() };
        positions.store(u64::from(old) << 32 | u64::from(new), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_is_found_by_the_next_process_and_garbage_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let ring = RingIdentity { desc_gpa: 0x1234_5000, size: 256, file: (7, 9) };
        let file = MirrorFile::open(&path, 4).unwrap();
        assert_eq!(file.load(3), None);
        let mirror = file.begin(3, ring, 0x8000).unwrap();
        mirror.store(0x8010, 0x8020);
        drop((mirror, file));
        let file = MirrorFile::open(&path, 4).unwrap();
        assert_eq!(file.load(3), Some(Stored { ring, old: 0x8010, new: 0x8020 }));
        assert_eq!(file.load(2), None);
        file.clear(3);
        assert_eq!(file.load(3), None);
        assert!(file.begin(1, ring, 5).is_some() && file.begin(4, ring, 5).is_none());
        drop(file);
        assert_eq!(MirrorFile::open(&path, 2).unwrap().load(1), None, "another number of vrings");
        std::fs::write(&path, [0xff; 64 * 5]).unwrap();
        assert_eq!(MirrorFile::open(&path, 4).unwrap().load(1), None, "not this program's");
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(MirrorFile::open(&dir.path().join("link"), 4).is_err());
    }
}
