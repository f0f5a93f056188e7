//! Longest-prefix match whose cost does not depend on the number of prefixes.
//!
//! Binary search on prefix lengths (Waldvogel, Varghese, Turner, Plattner: "Scalable High Speed IP Routing Lookups",
//! SIGCOMM '97): one hash table holds all prefixes, and *markers* where the search for a longer prefix must pass. A look-up
//! probes it once per halving of the list of lengths in use: at most 6 times for IPv4, 8 for IPv6, usually 1 to 3.
//! A marker knows the best prefix above it, so the search never backtracks.
//!
//! Whoever chooses prefixes could choose colliding ones; the hash is seeded, and a table in which any probe sequence gets
//! longer than [`MAX_PROBES`] is built again with another seed.

/// Longest probe sequence that is accepted. With a table at most half full, random ones stay far below.
const MAX_PROBES: u32 = 32;
/// Marks an empty slot.
const EMPTY: u8 = u8::MAX;
/// No prefix contains the address.
pub(crate) const NO_PREFIX: u32 = u32::MAX;

/// Counts elementary steps of a look-up. In the packet path this is `()`, and costs nothing; tests count.
pub trait Steps {
    /// `n` more memory accesses that depend on earlier ones.
    fn add(&mut self, n: u32);
}

impl Steps for () {
    #[inline(always)]
    fn add(&mut self, _: u32) {}
}

impl Steps for u32 {
    #[inline]
    fn add(&mut self, n: u32) {
        *self += n;
    }
}

/// Multiplies to 128 bits and folds: every input bit reaches every output bit.
#[inline(always)]
pub(crate) const fn fold(a: u64, b: u64) -> u64 {
    let product = (a as u128).wrapping_mul(b as u128);
    (product as u64) ^ ((product >> 64) as u64)
}

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xd6e8_feb8_6659_fd93;

/// An address as a number.
pub(crate) trait Address: Copy + Ord {
    /// Bits of an address.
    const BITS: u8;
    /// The first `len` bits.
    fn masked(self, len: u8) -> Self;
    /// Hash of a prefix.
    fn hash(self, len: u8, seed: u64) -> u64;
}

impl Address for u32 {
    const BITS: u8 = 32;
    #[inline(always)]
    fn masked(self, len: u8) -> Self {
        self & super::cidr::mask4(len)
    }
    #[inline(always)]
    fn hash(self, len: u8, seed: u64) -> u64 {
        fold((u64::from(self) | u64::from(len) << 32) ^ seed, K0)
    }
}

impl Address for u128 {
    const BITS: u8 = 128;
    #[inline(always)]
    fn masked(self, len: u8) -> Self {
        self & super::cidr::mask6(len)
    }
    #[inline(always)]
    fn hash(self, len: u8, seed: u64) -> u64 {
        fold((self as u64) ^ seed, fold(((self >> 64) as u64) ^ seed.rotate_left(32), K0) ^ K1 ^ u64::from(len))
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot<A> {
    key: A,
    /// [`EMPTY`] or the prefix length.
    len: u8,
    /// The best prefix at or above this one, or [`NO_PREFIX`].
    best: u32,
}

/// The index. Prefixes are known by their position in the list that it was built from.
#[derive(Clone, Debug)]
pub(crate) struct PrefixIndex<A> {
    /// Lengths in use, ascending, without 0.
    lengths: Box<[u8]>,
    slots: Box<[Slot<A>]>,
    seed: u64,
    /// Longest probe sequence in this table.
    probes: u32,
    /// The prefix of length 0, or [`NO_PREFIX`].
    root: u32,
}

impl<A: Address> PrefixIndex<A> {
    /// Builds the index of `prefixes`, which must be canonical (no bits behind the prefix), sorted and without
    /// duplicates, and fewer than 2^31. Returns it with each prefix's parent: the next shorter prefix that contains it,
    /// or [`NO_PREFIX`].
    pub(crate) fn build(prefixes: &[(A, u8)], seed: u64) -> (Self, Vec<u32>) {
        let parents = parents(prefixes);
        let mut in_use = [false; 129];
        for (_, len) in prefixes {
            if let Some(flag) = in_use.get_mut(usize::from(*len)) {
                *flag = true;
            }
        }
        let lengths: Box<[u8]> = (1..=A::BITS).filter(|l| in_use.get(usize::from(*l)) == Some(&true)).collect();
        // Sorted order puts the prefix of length 0 first.
        let root = prefixes.first().filter(|(_, len)| *len == 0).map_or(NO_PREFIX, |_| 0);
        let mut entries: Vec<Slot<A>> = Vec::with_capacity(prefixes.len() * 2);
        for (i, &(key, len)) in prefixes.iter().enumerate() {
            if len == 0 {
                continue;
            }
            entries.push(Slot { key, len, best: i as u32 });
            add_markers(&mut entries, &lengths, prefixes, &parents, i);
        }
        // A marker that coincides with a prefix or another marker of its kind is the same entry: both know the same best.
        entries.sort_unstable_by_key(|e| (e.key, e.len));
        entries.dedup_by_key(|e| (e.key, e.len));
        let mut size = (entries.len() * 2).next_power_of_two().max(2);
        let mut attempt = 0u64;
        loop {
            let seed = fold(seed ^ K1, K0.wrapping_add(attempt));
            if let Some((slots, probes)) = fill(&entries, size, seed) {
                return (Self { lengths, slots, seed, probes, root }, parents);
            }
            attempt += 1;
            // Bad luck repeats only for absurdly crowded tables: give them room.
            if attempt.is_multiple_of(4) {
                size *= 2;
            }
        }
    }

    /// The longest prefix that contains `address`, or [`NO_PREFIX`].
    #[inline]
    pub(crate) fn lookup(&self, address: A, steps: &mut impl Steps) -> u32 {
        let mut best = self.root;
        let (mut low, mut high) = (0usize, self.lengths.len());
        while low < high {
            let mid = (low + high) / 2;
            let Some(&len) = self.lengths.get(mid) else { break };
            match self.find(address.masked(len), len, steps) {
                Some(found) => {
                    best = found;
                    low = mid + 1;
                }
                None => high = mid,
            }
        }
        best
    }

    /// The best prefix stored with this prefix or marker.
    #[inline]
    fn find(&self, key: A, len: u8, steps: &mut impl Steps) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = key.hash(len, self.seed) as usize & mask;
        for _ in 0..self.probes {
            steps.add(1);
            let slot = self.slots.get(at)?;
            if slot.len == len && slot.key == key {
                return Some(slot.best);
            }
            if slot.len == EMPTY {
                return None;
            }
            at = (at + 1) & mask;
        }
        None
    }

    /// Bytes of memory behind the index.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.lengths.len() + size_of_val(&*self.slots)
    }
}

/// For each prefix, the next shorter one that contains it. In sorted order it is the innermost that is still open.
fn parents<A: Address>(prefixes: &[(A, u8)]) -> Vec<u32> {
    let mut open: Vec<(u32, A, u8)> = Vec::new();
    let mut parents = Vec::with_capacity(prefixes.len());
    for (i, &(key, len)) in prefixes.iter().enumerate() {
        while open.last().is_some_and(|&(_, k, l)| l >= len || key.masked(l) != k) {
            open.pop();
        }
        parents.push(open.last().map_or(NO_PREFIX, |(p, ..)| *p));
        open.push((i as u32, key, len));
    }
    parents
}

/// The markers on the way of the binary search to prefix `i`.
fn add_markers<A: Address>(
    entries: &mut Vec<Slot<A>>,
    lengths: &[u8],
    prefixes: &[(A, u8)],
    parents: &[u32],
    i: usize,
) {
    let Some(&(key, len)) = prefixes.get(i) else { return };
    let (mut low, mut high) = (0usize, lengths.len());
    while low < high {
        let mid = (low + high) / 2;
        let Some(&at) = lengths.get(mid) else { return };
        match at.cmp(&len) {
            core::cmp::Ordering::Equal => return,
            core::cmp::Ordering::Greater => high = mid,
            core::cmp::Ordering::Less => {
                low = mid + 1;
                // The first ancestor that is not longer than the marker.
                let mut best = i as u32;
                while prefixes.get(best as usize).is_some_and(|(_, l)| *l > at) {
                    best = parents.get(best as usize).copied().unwrap_or(NO_PREFIX);
                }
                entries.push(Slot { key: key.masked(at), len: at, best });
            }
        }
    }
}

/// The hash table and its longest probe sequence; `None` when that is too long.
fn fill<A: Address>(entries: &[Slot<A>], size: usize, seed: u64) -> Option<(Box<[Slot<A>]>, u32)> {
    let blank = entries.first().map(|e| Slot { len: EMPTY, best: NO_PREFIX, ..*e });
    let Some(blank) = blank else { return Some((Box::default(), 0)) };
    let mut slots = vec![blank; size].into_boxed_slice();
    let mut longest = 1;
    for entry in entries {
        let mut at = entry.key.hash(entry.len, seed) as usize & (size - 1);
        let mut probes = 1;
        while slots.get(at)?.len != EMPTY {
            at = (at + 1) & (size - 1);
            probes += 1;
            if probes > MAX_PROBES {
                return None;
            }
        }
        *slots.get_mut(at)? = *entry;
        longest = longest.max(probes);
    }
    Some((slots, longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive<A: Address>(prefixes: &[(A, u8)], address: A) -> u32 {
        let inside = prefixes.iter().enumerate().filter(|(_, (key, len))| address.masked(*len) == *key);
        inside.max_by_key(|(_, (_, len))| *len).map_or(NO_PREFIX, |(i, _)| i as u32)
    }

    fn canonical<A: Address>(mut prefixes: Vec<(A, u8)>) -> Vec<(A, u8)> {
        for (key, len) in &mut prefixes {
            *key = key.masked(*len);
        }
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes
    }

    fn check<A: Address + core::fmt::Debug>(prefixes: Vec<(A, u8)>, probes: &[A], seed: u64) {
        let prefixes = canonical(prefixes);
        let (index, parents) = PrefixIndex::build(&prefixes, seed);
        for &probe in probes {
            assert_eq!(index.lookup(probe, &mut ()), naive(&prefixes, probe), "{probe:?} in {prefixes:?}");
        }
        for (i, &(key, len)) in prefixes.iter().enumerate() {
            assert_eq!(index.lookup(key.masked(len), &mut ()), naive(&prefixes, key), "{key:?}");
            let above: Vec<_> = prefixes.iter().copied().filter(|(_, l)| *l < len).collect();
            let expected = naive(&above, key);
            let expected = above.get(expected as usize).and_then(|p| prefixes.binary_search(p).ok());
            assert_eq!(parents[i], expected.map_or(NO_PREFIX, |p| p as u32));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Few different bits, so that prefixes nest and addresses hit them.
        #[test]
        fn v4_is_the_longest_match(
            prefixes in proptest::collection::vec((0u32..4096, 0u8..=32), 0..60),
            probes in proptest::collection::vec(0u32..4096, 30),
            shift in 0u32..21, seed: u64,
        ) {
            let spread = |v: u32| v << shift | v >> 7;
            check(prefixes.iter().map(|(k, l)| (spread(*k), *l)).collect(),
                &probes.iter().map(|p| spread(*p)).collect::<Vec<_>>(), seed);
        }

        #[test]
        fn v6_is_the_longest_match(
            prefixes in proptest::collection::vec((0u128..4096, 0u8..=128), 0..60),
            probes in proptest::collection::vec(0u128..4096, 30),
            shift in 0u32..117, seed: u64,
        ) {
            let spread = |v: u128| v << shift | v >> 7;
            check(prefixes.iter().map(|(k, l)| (spread(*k), *l)).collect(),
                &probes.iter().map(|p| spread(*p)).collect::<Vec<_>>(), seed);
        }
    }

    #[test]
    fn nothing_and_everything() {
        let (none, _) = PrefixIndex::<u32>::build(&[], 1);
        assert_eq!(none.lookup(5, &mut ()), NO_PREFIX);
        let (all, parents) = PrefixIndex::<u32>::build(&[(0, 0)], 1);
        assert_eq!((all.lookup(5, &mut ()), parents), (0, vec![NO_PREFIX]));
    }

    /// All lengths at once: the number of probed lengths stays logarithmic, however many prefixes there are.
    #[test]
    fn probes_do_not_grow_with_the_number_of_prefixes() {
        for (count, seed) in [(100u128, 1), (50_000, 2)] {
            let prefixes: Vec<_> =
                (0..count).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c), (i % 129) as u8)).collect();
            let prefixes = canonical(prefixes);
            let (index, _) = PrefixIndex::<u128>::build(&prefixes, seed);
            let mut total = 0u32;
            for i in 0..10_000u128 {
                index.lookup(i.wrapping_mul(0xd134_2543_de82_ef95_0123), &mut total);
            }
            assert!(total < 10_000 * 14, "{total} probes for 10 000 look-ups among {count}");
            assert!(index.probes <= MAX_PROBES);
        }
    }
}
