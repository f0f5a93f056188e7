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

/// True when the ring of `size` descriptors at guest address `desc_gpa` bears out `base` (as in GET_VRING_BASE:
/// bits 0 to 14 the index, bit 15 the wrap counter).
pub fn is_plausible(memory: &MemoryMap, desc_gpa: u64, size: u16, base: u32) -> bool {
    let index = (base & 0x7fff) as u16;
    let wrap = base & 0x8000 != 0;
    if index >= size {
        return false;
    }
    let used_bit = |i: u16| -> Option<bool> {
        let at = memory.translate(desc_gpa.checked_add(u64::from(i) * DESCRIPTOR_BYTES)?, DESCRIPTOR_BYTES)?;
        // SAFETY: `translate` vouches for 16 bytes; the guest may write them meanwhile, hence volatile, and unaligned in
        // case the ring is.
        let flags = unsafe {
            let p = at.as_ptr().add(FLAGS_OFFSET);
            u16::from_le_bytes([p.read_volatile(), p.add(1).read_volatile()])
        };
        Some(flags & USED != 0)
    };
    if used_bit(index).is_none_or(|used| used == wrap) {
        return false;
    }
    // At index 0 of the very first lap nothing is in front; of a later one, the whole previous lap is.
    match (index, wrap) {
        (0, true) => (0..size).any(|i| used_bit(i) == Some(true)) || (0..size).all(|i| used_bit(i) == Some(false)),
        (0, false) => (0..size).any(|i| used_bit(i) == Some(true)),
        (_, wrap) => (0..index).any(|i| used_bit(i) == Some(wrap)),
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
        fn ok(&self, base: u32) -> bool {
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
