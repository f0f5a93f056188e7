//! Chains of one buffer that were read, checked and translated ahead of their use, while their buffers come into the cache.
//!
//! A staged chain is a private copy: what the guest does to the descriptor afterwards changes nothing. Nothing is taken by staging; a ring
//! that is stopped forgets what was staged.
use std::ops::Range;

use ferry_dataplane::frame::BURST;

/// A chain of one buffer, mapped in one piece, which takes one place in its ring.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct One {
    /// As [`super::Chain`] has it; in a word of 32 bits, so that it is loaded as it was stored.
    pub(super) id: u32,
    /// Bytes, not 0; when it is used, those that were written into it.
    pub(super) len: u32,
    /// Where it is mapped, and its guest address.
    pub(super) addr: *mut u8,
    pub(super) gpa: u64,
}

/// The next chains of a ring, oldest first, as far as they have but one buffer: those from `first` up to `end` of the places.
pub(super) struct Stage {
    places: Box<[One; BURST]>,
    first: usize,
    end: usize,
    /// Chains that were used and whose writes the dirty log is still to be told of, if there is one.
    unlogged: Range<usize>,
}

impl Stage {
    pub fn new() -> Self {
        let none = One { id: 0, len: 0, addr: core::ptr::null_mut(), gpa: 0 };
        Self { places: Box::new([none; BURST]), first: 0, end: 0, unlogged: 0..0 }
    }

    #[inline(always)]
    pub fn len(&self) -> u16 {
        (self.end - self.first) as u16
    }

    #[inline(always)]
    pub fn chains(&self) -> &[One] {
        self.places.get(self.first..self.end).unwrap_or_default()
    }
    #[inline(always)]
    pub fn chains_mut(&mut self) -> &mut [One] {
        self.places.get_mut(self.first..self.end).unwrap_or_default()
    }

    /// The places behind the last chain; to be filled from the first on. [`Self::add`] tells how many were.
    #[inline(always)]
    pub fn room(&mut self) -> &mut [One] {
        debug_assert!(self.unlogged.is_empty(), "chains are overwritten that the dirty log was not told of");
        if self.first != 0 {
            if self.first != self.end {
                self.places.copy_within(self.first..self.end, 0);
            }
            self.end -= self.first;
            self.first = 0;
        }
        self.places.get_mut(self.end..).unwrap_or_default()
    }

    /// So many places behind the last chain were filled.
    #[inline(always)]
    pub fn add(&mut self, chains: usize) {
        self.end = (self.end + chains).min(BURST);
    }

    /// The first `chains`, which were written into, are to be told to the dirty log. Only the last ones that were named so are remembered, until
    /// [`Self::room`] is asked for.
    #[inline(always)]
    pub fn log_first(&mut self, chains: u16) {
        self.unlogged = self.first..(self.first + usize::from(chains)).min(self.end);
    }

    /// The chains that were named in [`Self::log_first`], and forgets that they were.
    #[inline(always)]
    pub fn take_unlogged(&mut self) -> &[One] {
        let unlogged = core::mem::take(&mut self.unlogged);
        self.places.get(unlogged).unwrap_or_default()
    }

    /// Forgets the first `chains`, or as many as there are.
    #[inline(always)]
    pub fn forget(&mut self, chains: u16) {
        self.first = (self.first + usize::from(chains)).min(self.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_come_out_in_order() {
        let mut stage = Stage::new();
        let (mut put, mut got) = (0u16, 0u16);
        for round in 0..1000usize {
            let wanted = round % 70;
            let mut filled = 0;
            for place in stage.room().iter_mut().take(wanted) {
                place.id = u32::from(put);
                put += 1;
                filled += 1;
            }
            stage.add(filled);
            assert_eq!(stage.len(), put - got);
            let ids: Vec<u32> = stage.chains().iter().map(|one| one.id).collect();
            assert_eq!(ids, (u32::from(got)..u32::from(put)).collect::<Vec<_>>());
            let forgotten = (round * 7 % 40) as u16;
            got += stage.len().min(forgotten);
            stage.forget(forgotten);
        }
        assert!(got > 1000);
    }
}
