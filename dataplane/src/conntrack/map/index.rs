//! From a key's hash to its slot: buckets of one cache line, two to choose from for each key.
//!
//! A place in a bucket is a 32-bit word, `tag << slot_bits | slot number + 1`, or 0 when empty. A word is put by compare-and-swap, never
//! moved, and cleared only by the thread that took the slot out of use, before the slot can be used again. So a slot number stands in at
//! most one place, and a reader that follows a word too late finds a slot whose control word tells it so.
#![allow(unsafe_code)] // Its job: comparing a bucket's words in vector registers.
use std::io;

use super::sync::{AtomicU32, Ordering};
use crate::memory::{Memory, Zeroed, prefetch};

/// Places in a bucket.
#[cfg(not(loom))]
pub(super) const PLACES: usize = 16;
#[cfg(loom)]
pub(super) const PLACES: usize = 2;

/// Connections per bucket when the table is full, in tenths: 70 % of the places. With two buckets to choose from, practically no key finds
/// both of its full.
#[cfg(not(loom))]
const FULL_TENTHS: u64 = 112;
#[cfg(loom)]
const FULL_TENTHS: u64 = 10;

/// A key's first bucket is preferred while it has at least this many places left: most lookups then end in the first bucket.
const ROOMY: u32 = 5;

#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Bucket([AtomicU32; PLACES]);

// SAFETY: atomic integers.
unsafe impl Zeroed for Bucket {}

/// Where a key may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) buckets: [u32; 2],
    /// Never 0.
    tag: u32,
}

/// A place: bucket number and place in it, in this order. Of two insertions of one key the one at the lower position wins.
pub(super) type Position = (u32, u32);

/// The buckets.
pub(super) struct Index {
    buckets: Memory<Bucket>,
    count: u32,
    slot_bits: u32,
}

impl Index {
    /// An index for slots 0 to `capacity` - 1, backed with memory.
    pub fn new(capacity: u32) -> io::Result<Self> {
        let count = (u64::from(capacity) * 10).div_ceil(FULL_TENTHS).max(2) as usize;
        let buckets = Memory::new(count)?;
        buckets.populate(0, count);
        Ok(Self { buckets, count: count as u32, slot_bits: u32::BITS - capacity.leading_zeros() })
    }

    pub fn bytes(&self) -> usize {
        self.buckets.bytes()
    }

    /// A key's places.
    #[inline]
    pub fn places(&self, hash: u64) -> Places {
        let first = self.first_bucket(hash);
        let mut second = self.bucket_of((hash >> 32) as u32);
        if second == first {
            second = if first + 1 == self.count { 0 } else { first + 1 };
        }
        Places { buckets: [first, second], tag: self.tag(hash) }
    }

    #[inline(always)]
    fn bucket_of(&self, half: u32) -> u32 {
        ((u64::from(half) * u64::from(self.count)) >> 32) as u32
    }

    #[inline(always)]
    fn first_bucket(&self, hash: u64) -> u32 {
        self.bucket_of(hash as u32)
    }

    /// The lowest bits have next to no part in the choice of the buckets.
    #[inline(always)]
    fn tag(&self, hash: u64) -> u32 {
        (hash as u32 & (u32::MAX >> self.slot_bits)).max(1)
    }

    #[inline(always)]
    fn bucket(&self, bucket: u32) -> Option<&[AtomicU32; PLACES]> {
        self.buckets.get(bucket).map(|b| &b.0)
    }

    /// Fetches one of a key's buckets (`which` 0 or 1) into the cache.
    #[inline]
    pub fn prefetch(&self, places: &Places, which: usize) {
        if let Some(bucket) = places.buckets.get(which).and_then(|&b| self.buckets.get(b)) {
            prefetch(bucket);
        }
    }

    /// Calls `f` for each slot that may have the key, until it returns something.
    #[inline]
    pub fn find<R>(&self, places: &Places, mut f: impl FnMut(u32, Position) -> Option<R>) -> Option<R> {
        places.buckets.into_iter().find_map(|b| {
            let bucket = self.bucket(b)?;
            let mut hits = matches(bucket, places.tag, self.slot_bits);
            while hits != 0 {
                let place = hits.trailing_zeros();
                hits &= hits - 1;
                let word = bucket.get(place as usize)?.load(Ordering::Acquire);
                // The word may have changed since.
                if word >> self.slot_bits == places.tag
                    && let found @ Some(_) = f(self.slot(word), (b, place))
                {
                    return found;
                }
            }
            None
        })
    }

    /// The slot in the first bucket of a key with this hash that is probably the key's.
    #[inline(always)]
    pub fn first(&self, hash: u64) -> Option<u32> {
        self.likely_in(self.first_bucket(hash), self.tag(hash))
    }

    /// The same in the second bucket.
    pub fn second(&self, hash: u64) -> Option<u32> {
        let Places { buckets: [_, second], tag } = self.places(hash);
        self.likely_in(second, tag)
    }

    #[inline(always)]
    fn likely_in(&self, bucket: u32, tag: u32) -> Option<u32> {
        let bucket = self.bucket(bucket)?;
        let hits = matches(bucket, tag, self.slot_bits);
        if hits == 0 {
            return None;
        }
        let word = bucket.get(hits.trailing_zeros() as usize)?.load(Ordering::Acquire);
        Some(self.slot(word))
    }

    /// Fetches the first bucket of keys with this hash into the cache.
    #[inline(always)]
    pub fn prefetch_first(&self, hash: u64) {
        if let Some(bucket) = self.buckets.get(self.first_bucket(hash)) {
            prefetch(bucket);
        }
    }

    /// Fetches the second.
    pub fn prefetch_second(&self, hash: u64) {
        self.prefetch(&self.places(hash), 1);
    }

    /// Every slot in a key's buckets.
    pub fn neighbours(&self, places: &Places) -> impl Iterator<Item = u32> {
        places
            .buckets
            .into_iter()
            .filter_map(|b| self.bucket(b))
            .flatten()
            .map(|word| word.load(Ordering::Acquire))
            .filter(|&word| word != 0)
            .map(|word| self.slot(word))
    }

    #[inline(always)]
    fn slot(&self, word: u32) -> u32 {
        (word & !(u32::MAX << self.slot_bits)).wrapping_sub(1)
    }

    #[inline]
    fn word(&self, places: &Places, slot: u32) -> u32 {
        places.tag << self.slot_bits | (slot + 1)
    }

    /// No slot may have the key, but for one at `own`: a look with [`Self::find`] would find none.
    #[inline(always)]
    pub fn is_nowhere(&self, places: &Places, own: Option<Position>) -> bool {
        let [first, second] = places.buckets;
        let (Some(a), Some(b)) = (self.bucket(first), self.bucket(second)) else { return false };
        let mut hits = [matches(a, places.tag, self.slot_bits), matches(b, places.tag, self.slot_bits)];
        if let Some((bucket, place)) = own {
            let [of_first, of_second] = &mut hits;
            let own = if bucket == first { of_first } else { of_second };
            *own &= !1u32.wrapping_shl(place);
        }
        let [a, b] = hits;
        a | b == 0
    }

    /// Enters a slot under a key. `None` when there is no place left.
    #[inline]
    pub fn put(&self, places: &Places, slot: u32) -> Option<Position> {
        let word = self.word(places, slot);
        let [first, second] = places.buckets;
        let (a, b) = (self.bucket(first)?, self.bucket(second)?);
        // Each failure means that another thread has put a word here.
        for _ in 0..4 * PLACES {
            let left_a = matches(a, 0, self.slot_bits);
            let (bucket, number, left) = if is_roomy(left_a) {
                (a, first, left_a)
            } else {
                let left_b = matches(b, 0, self.slot_bits);
                if left_a.count_ones() >= left_b.count_ones() { (a, first, left_a) } else { (b, second, left_b) }
            };
            if left == 0 {
                return None;
            }
            let place = left.trailing_zeros();
            let cell = bucket.get(place as usize)?;
            if cell.compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some((number, place));
            }
        }
        None
    }

    /// Clears a slot's place. To be called by the one thread that has taken the slot out of use.
    #[inline]
    pub fn clear(&self, places: &Places, slot: u32) {
        let word = self.word(places, slot);
        for cell in places.buckets.into_iter().filter_map(|b| self.bucket(b)).flatten() {
            if cell.load(Ordering::Relaxed) == word {
                cell.store(0, Ordering::Release);
                return;
            }
        }
    }
}

/// At least [`ROOMY`] bits are set.
#[inline(always)]
fn is_roomy(left: u32) -> bool {
    // Counting all of them takes more, where there is no instruction for it.
    let without_lowest = |bits: u32, _| bits & bits.wrapping_sub(1);
    (1..ROOMY).fold(left, without_lowest) != 0
}

/// Bit n is set when place n has this tag; for tag 0, when it is empty.
#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
#[inline]
fn matches(bucket: &[AtomicU32; PLACES], tag: u32, slot_bits: u32) -> u32 {
    matches_one_by_one(bucket, tag, slot_bits)
}

#[cfg(any(test, not(all(target_arch = "x86_64", not(loom), not(miri)))))]
#[inline]
fn matches_one_by_one(bucket: &[AtomicU32; PLACES], tag: u32, slot_bits: u32) -> u32 {
    let hit = |n: usize, word: &AtomicU32| u32::from(word.load(Ordering::Acquire) >> slot_bits == tag) << n;
    bucket.iter().enumerate().fold(0, |hits, (n, word)| hits | hit(n, word))
}

/// As above, four words at a time.
#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
#[inline]
fn matches(bucket: &[AtomicU32; PLACES], tag: u32, slot_bits: u32) -> u32 {
    use core::arch::x86_64::{
        __m128i, _mm_cmpeq_epi32, _mm_cvtsi32_si128, _mm_movemask_epi8, _mm_packs_epi16, _mm_packs_epi32,
        _mm_set1_epi32, _mm_srl_epi32,
    };
    let (a, b, c, d): (__m128i, __m128i, __m128i, __m128i);
    // Assembly, because the language has no atomic load of a vector and a plain one would race with the writers. The processor reads each
    // aligned word of 4 bytes as a whole and no load passes an earlier one, so this is sixteen loads with acquire order (the block is a
    // barrier to the compiler, since it may read any memory).
    // SAFETY: reads the 64 bytes of `bucket`, which `Bucket` aligns to 64.
    unsafe {
        core::arch::asm!(
            "movdqa {a}, [{at}]",
            "movdqa {b}, [{at} + 16]",
            "movdqa {c}, [{at} + 32]",
            "movdqa {d}, [{at} + 48]",
            at = in(reg) bucket.as_ptr(),
            a = out(xmm_reg) a,
            b = out(xmm_reg) b,
            c = out(xmm_reg) c,
            d = out(xmm_reg) d,
            options(nostack, preserves_flags),
        );
    }
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let (shift, tag) = (_mm_cvtsi32_si128(slot_bits as i32), _mm_set1_epi32(tag as i32));
        let hits = |words: __m128i| _mm_cmpeq_epi32(_mm_srl_epi32(words, shift), tag);
        let (low, high) = (_mm_packs_epi32(hits(a), hits(b)), _mm_packs_epi32(hits(c), hits(d)));
        _mm_movemask_epi8(_mm_packs_epi16(low, high)) as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "there are no vectors")]
    fn vectors_see_what_single_words_are() {
        let bucket = Bucket::default();
        let mut x = 1u32;
        for round in 0..1000 {
            for word in &bucket.0 {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Few tags, so that there are hits; some empty.
                word.store(if x >> 30 == 0 { 0 } else { x >> 28 << 21 | (x & 0xfffff) | 1 }, Ordering::Relaxed);
            }
            for tag in 0..16 {
                assert_eq!(matches(&bucket.0, tag, 21), matches_one_by_one(&bucket.0, tag, 21), "round {round}");
            }
        }
    }

    #[test]
    fn room_is_counted() {
        for left in 0..1u32 << PLACES {
            assert_eq!(is_roomy(left), left.count_ones() >= ROOMY, "{left:b}");
        }
    }

    #[test]
    fn what_was_put_is_found_until_it_is_cleared() {
        let index = Index::new(100).unwrap();
        let hash = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut positions = std::collections::HashSet::new();
        for n in 0..100 {
            let at = index.put(&index.places(hash(n)), n as u32).unwrap();
            assert!(positions.insert(at));
        }
        for n in 0..100 {
            let places = index.places(hash(n));
            let find = || index.find(&places, |slot, at| (slot == n as u32).then_some(at));
            assert!(positions.contains(&find().unwrap()));
            assert!(index.neighbours(&places).any(|slot| slot == n as u32));
            let at = find().unwrap();
            assert!(!index.is_nowhere(&places, None));
            // Another key may have the tag.
            let others = |own| index.find(&places, |slot, _| (Some(slot) != own).then_some(())).is_none();
            assert_eq!(index.is_nowhere(&places, Some(at)), others(Some(n as u32)));
            index.clear(&places, n as u32);
            assert!(find().is_none());
            assert_eq!(index.is_nowhere(&places, None), others(None));
        }
    }

    #[test]
    fn a_bucket_pair_takes_as_many_as_it_has_places() {
        let index = Index::new(1000).unwrap();
        let places = index.places(u64::MAX / 3);
        for slot in 0..2 * PLACES as u32 {
            assert!(index.put(&places, slot).is_some());
        }
        assert!(index.put(&places, 999).is_none());
        index.clear(&places, 7);
        assert!(index.put(&places, 999).is_some());
        assert_eq!(index.neighbours(&places).count(), 2 * PLACES);
    }
}
