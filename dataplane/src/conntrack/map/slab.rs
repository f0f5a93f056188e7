//! The slots, and which of them are free.
//!
//! Slots that were never used are handed out in order; those given back lie in a few stacks (Treiber, "Systems Programming: Coping with
//! Parallelism", 1986), one per shard of threads, linked through the slots themselves. A thread takes from its own stack first, then from
//! the others', so that memory once touched is used again before new memory is. A stack's head carries a count that every taking moves, so
//! that a head which is the same has not been away meanwhile.
use std::io;

use crossbeam::utils::CachePadded;

use super::slot::Slot;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::memory::{Memory, Zeroed};

/// Stacks, and sets of counters.
#[cfg(not(loom))]
pub(super) const SHARDS: usize = 8;
#[cfg(loom)]
pub(super) const SHARDS: usize = 2;

/// Memory that is to be in place ahead of the first slot never used, bytes.
const AHEAD_BYTES: usize = 4 << 20;

#[allow(unsafe_code)] // States a fact.
// SAFETY: atomic integers.
unsafe impl Zeroed for Slot {}

pub(super) struct Slab {
    slots: Memory<Slot>,
    capacity: u32,
    /// Slots below were used. Grows up to the capacity.
    used: CachePadded<AtomicU32>,
    /// `count << 32 | slot number + 1`, 0 for none.
    heads: [CachePadded<AtomicU64>; SHARDS],
    /// Bytes backed with memory.
    populated: std::sync::Mutex<usize>,
}

impl Slab {
    pub fn new(capacity: u32) -> io::Result<Self> {
        Ok(Self {
            slots: Memory::new(capacity as usize)?,
            capacity,
            used: CachePadded::new(AtomicU32::new(0)),
            heads: core::array::from_fn(|_| CachePadded::new(AtomicU64::new(0))),
            populated: std::sync::Mutex::new(0),
        })
    }

    #[inline]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    pub fn bytes(&self) -> usize {
        self.slots.bytes()
    }

    #[inline]
    pub fn slot(&self, number: u32) -> Option<&Slot> {
        self.slots.get(number)
    }

    /// Slots that were ever used are below this number.
    #[inline]
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Acquire)
    }

    /// A free slot, for the caller alone.
    #[inline]
    pub fn take(&self, shard: usize) -> Option<u32> {
        // While nothing has been given back, as when a table fills: all heads at a glance.
        if self.heads.iter().fold(0, |tops, head| tops | head.load(Ordering::Relaxed) as u32) == 0 {
            return self.take_new();
        }
        self.take_old(shard).or_else(|| self.take_new())
    }

    #[inline(never)]
    fn take_old(&self, shard: usize) -> Option<u32> {
        let (before, from) = self.heads.split_at_checked(shard % SHARDS)?;
        from.iter().chain(before).find_map(|head| self.pop(head))
    }

    fn take_new(&self) -> Option<u32> {
        let mut used = self.used.load(Ordering::Relaxed);
        while used < self.capacity {
            match self.used.compare_exchange_weak(used, used + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(slot) => return Some(slot),
                Err(now) => used = now,
            }
        }
        None
    }

    #[inline]
    fn pop(&self, head: &AtomicU64) -> Option<u32> {
        let mut top = head.load(Ordering::Acquire);
        loop {
            let slot = (top as u32).checked_sub(1)?;
            // When another thread takes the slot first, this is anything; but then the head has changed too.
            let next = self.slot(slot)?.link();
            let count = (top >> 32).wrapping_add(1) << 32;
            match head.compare_exchange_weak(top, count | u64::from(next), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(slot),
                Err(now) => top = now,
            }
        }
    }

    /// Gives a slot back that the caller has to itself, whose control word says that it is free and which the index does not mention.
    #[inline]
    pub fn give(&self, shard: usize, slot: u32) {
        let (Some(head), Some(to)) = (self.heads.get(shard % SHARDS), self.slot(slot)) else { return };
        let mut top = head.load(Ordering::Relaxed);
        loop {
            to.set_link(top as u32);
            let new = top >> 32 << 32 | u64::from(slot + 1);
            match head.compare_exchange_weak(top, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    /// See [`super::ConnMap::populate_ahead`].
    pub fn populate_ahead(&self) -> bool {
        let mut populated = self.populated.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (used, ahead) = (self.used() as usize, AHEAD_BYTES / size_of::<Slot>());
        let left = populated.saturating_sub(used * size_of::<Slot>());
        let is_growing = *populated < self.bytes() && left < AHEAD_BYTES / 4 * 3;
        *populated = self.slots.populate(*populated, used.saturating_add(ahead));
        is_growing
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_handed_out_once_and_old_ones_first() {
        let slab = Slab::new(100).unwrap();
        let mut taken: Vec<u32> = (0..100).map(|n| slab.take(n).unwrap()).collect();
        taken.sort_unstable();
        assert_eq!(taken, (0..100).collect::<Vec<_>>());
        assert_eq!(slab.take(0), None);
        for slot in [5, 50, 7] {
            slab.give(slot as usize, slot);
        }
        let mut again: Vec<u32> = core::iter::from_fn(|| slab.take(3)).collect();
        again.sort_unstable();
        assert_eq!(again, [5, 7, 50]);
        let slab = Slab::new(100).unwrap();
        let first = slab.take(1).unwrap();
        slab.give(1, first);
        assert_eq!(slab.take(2), Some(first), "another thread's, before new memory");
        assert_eq!(slab.used(), 1);
    }

    #[test]
    #[cfg_attr(miri, ignore = "maps no memory")]
    fn memory_is_populated_up_to_the_end_and_no_further() {
        let slab = Slab::new(400_000).unwrap();
        assert!(slab.populate_ahead(), "nothing was there");
        let first = *slab.populated.lock().unwrap();
        assert!((AHEAD_BYTES - size_of::<Slot>()..AHEAD_BYTES + (4 << 20)).contains(&first), "{first}");
        assert!(!slab.populate_ahead());
        assert_eq!(*slab.populated.lock().unwrap(), first, "nothing was used");
        let most = first / size_of::<Slot>();
        for n in 0..400_000 {
            slab.take(0).unwrap();
            if n == most {
                assert!(slab.populate_ahead(), "all is used");
            }
        }
        assert!(slab.populate_ahead());
        assert_eq!(*slab.populated.lock().unwrap(), slab.bytes());
        assert!(!slab.populate_ahead(), "it cannot grow");
    }
}
