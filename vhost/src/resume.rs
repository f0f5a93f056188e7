//! Whether a packed ring can stand where it is believed to stand, judged by its descriptors' flags.
//!
//! virtio 1.3, 2.8.1: the driver makes a descriptor available by setting AVAIL to its wrap counter and USED to the
//! inverse; the device marks it used by setting both to its own wrap counter. So at a device position `(index, wrap)` with
//! nothing in flight, the descriptor at `index` has not been used in this lap (USED differs from `wrap`), and of those
//! in front of it, at least one was (chains and in-order batches leave others untouched). In a ring that the driver has
//! initialised anew, no descriptor was ever used.
#![allow(unsafe_code)] // Reads flags in guest memory.
use crate::memory::MemoryMap;

/// VIRTQ_DESC_F_USED.
const USED: u16 = 1 << 15;
/// Bytes of a packed descriptor; its flags are the last two.
const DESCRIPTOR_BYTES: u64 = 16;
const FLAGS_OFFSET: usize = 14;

/// Where the packed ring of `size` descriptors at guest address `desc_gpa` stands: at `new` if the burst from `old` to `new`
/// became visible to the driver, otherwise at `old` (each bits 0 to 14 the index, bit 15 the wrap counter). `None` when the
/// descriptors do not bear it out.
pub(crate) fn position(memory: &MemoryMap, desc_gpa: u64, size: u16, old: u16, new: u16) -> Option<u16> {
    // The first descriptor of a burst is marked used last.
    let out = used_bit(memory, desc_gpa, old & 0x7fff)? == (old & 0x8000 != 0);
    let position = if out { new } else { old };
    is_plausible(memory, desc_gpa, size, position).then_some(position)
}

fn used_bit(memory: &MemoryMap, desc_gpa: u64, index: u16) -> Option<bool> {
    let at = memory.translate(desc_gpa.checked_add(u64::from(index) * DESCRIPTOR_BYTES)?, DESCRIPTOR_BYTES)?;
    // SAFETY: `translate` vouches for 16 bytes; the guest may write them meanwhile, hence volatile, and by bytes in case the
    // ring is not aligned.
    let flags = unsafe {
        let p = at.as_ptr().add(FLAGS_OFFSET);
        u16::from_le_bytes([p.read_volatile(), p.add(1).read_volatile()])
    };
    Some(flags & USED != 0)
}

fn is_plausible(memory: &MemoryMap, desc_gpa: u64, size: u16, position: u16) -> bool {
    let (index, wrap) = (position & 0x7fff, position & 0x8000 != 0);
    let used = |i: u16| used_bit(memory, desc_gpa, i);
    if index >= size || used(index).is_none_or(|used| used == wrap) {
        return false;
    }
    match (index, wrap) {
        // The very first lap, or the whole previous lap lies in front.
        (0, true) => true,
        (0, false) => (0..size).any(|i| used(i) == Some(true)),
        (_, wrap) => (0..index).any(|i| used(i) == Some(wrap)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRegion, RegionSpec};
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    const AVAIL: u16 = 1 << 7;

    struct Ring(std::fs::File, Arc<MemoryMap>);

    impl Ring {
        fn new() -> Self {
            // SAFETY: creates a descriptor that the File owns.
            let file = unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"r".as_ptr(), libc::MFD_CLOEXEC)) };
            file.set_len(4096).unwrap();
            let spec =
                RegionSpec { guest_addr: 0, user_addr: 0, size: 4096, mmap_offset: 0, file: file.try_clone().unwrap() };
            Self(file, MemoryMap::new(vec![GuestRegion::map(spec).unwrap()]).unwrap())
        }
        fn flags(&self, i: u64, flags: u16) {
            self.0.write_all_at(&flags.to_le_bytes(), i * 16 + 14).unwrap();
        }
        fn ok(&self, base: u16) -> bool {
            is_plausible(&self.1, 0, 8, base)
        }
    }

    #[test]
    fn first_lap() {
        let r = Ring::new();
        assert!(r.ok(0x8000), "a fresh ring starts at 0, wrap 1");
        assert!(!r.ok(0x8003), "nothing was used yet");
        assert!(!r.ok(0x0000) && !r.ok(0x0003));
        for i in 0..3 {
            r.flags(i, AVAIL | USED);
        }
        assert!(r.ok(0x8003));
        assert!(!r.ok(0x8002), "descriptor 2 is used already");
        r.flags(3, AVAIL);
        assert!(r.ok(0x8003), "available descriptors do not matter");
    }

    #[test]
    fn a_burst_counts_once_its_first_descriptor_is_used() {
        let r = Ring::new();
        for i in 0..4 {
            r.flags(i, AVAIL);
        }
        // Killed before the burst of 0 to 4 got out: the flags of its first descriptor are still the driver's.
        for i in 1..4 {
            r.flags(i, AVAIL | USED);
        }
        assert_eq!(position(&r.1, 0, 8, 0x8000, 0x8004), Some(0x8000));
        r.flags(0, AVAIL | USED);
        assert_eq!(position(&r.1, 0, 8, 0x8000, 0x8004), Some(0x8004));
        assert_eq!(position(&r.1, 0, 8, 0x8004, 0x8004), Some(0x8004));
        assert_eq!(position(&r.1, 0, 8, 0x8002, 0x8002), None, "2 was used already");
        assert_eq!(position(&r.1, 0, 8, 0x8002, 0x0005), None, "the second lap has not begun");
        assert_eq!(position(&r.1, 1 << 40, 8, 0x8000, 0x8004), None);
    }

    #[test]
    fn later_laps_and_chains() {
        let r = Ring::new();
        for i in 0..8 {
            r.flags(i, AVAIL | USED);
        }
        assert!(r.ok(0x0000), "wrapped once");
        assert!(!r.ok(0x8000), "position 0 was used in the first lap");
        // A chain of three at 0: only its first descriptor is written back; 1 and 2 keep the driver's flags (USED == wrap inverse).
        r.flags(0, 0);
        r.flags(1, USED);
        r.flags(2, USED);
        assert!(r.ok(0x0003));
        assert!(!r.ok(0x8003));
        assert!(!r.ok(0x0008), "outside");
    }
}
