//! From a 16-bit number (a port, or ICMP type and code) to the best of the rules whose range contains it.
//!
//! A [`RangeMap`] cuts the numbers into segments within which the answer is the same, and keeps the segments' first
//! numbers sorted. Maps of more than [`PAGED_ABOVE`] segments have an index by the number's high byte, so that a search is
//! within the segments of one page of 256 numbers: at most 9 steps, typically 1 to 5, whatever the number of rules.
//! Memory is proportional to the number of ranges. All maps of a table lie in one [`RangeMaps`].
use super::prefix_index::Steps;

/// No rule.
pub(crate) const NO_RANK: u32 = u32::MAX;
/// Maps of more segments have a page index; 514 bytes, hence never more than 17 per segment.
const PAGED_ABOVE: usize = 32;
const NO_PAGES: u32 = u32::MAX;

/// A range and the rank of its rule; the smaller rank wins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranked {
    pub first: u16,
    pub last: u16,
    pub rank: u32,
}

/// One map: where it lies in a [`RangeMaps`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RangeMap {
    /// First segment.
    offset: u32,
    /// Number of segments, at most 65 536. 0: the map is empty.
    len: u32,
    /// First page in the page index, or [`NO_PAGES`].
    pages: u32,
    /// Smallest rank in the map.
    pub best: u32,
}

impl RangeMap {
    /// The map without ranges.
    pub(crate) const EMPTY: Self = Self { offset: 0, len: 0, pages: NO_PAGES, best: NO_RANK };
}

/// Storage of maps.
#[derive(Clone, Debug, Default)]
pub(crate) struct RangeMaps {
    /// First number of each segment, ascending within a map, 0 first.
    starts: Vec<u16>,
    /// What each segment maps to.
    values: Vec<u32>,
    /// Per paged map 257 positions: which of its segments contains the first number of each page, and a last one.
    pages: Vec<u16>,
}

impl RangeMaps {
    /// Adds the map of `items`, which must be in ascending order of rank.
    pub(crate) fn add(&mut self, items: &[Ranked]) -> RangeMap {
        if items.is_empty() {
            return RangeMap::EMPTY;
        }
        let cuts = cuts(items);
        let mut values = vec![NO_RANK; cuts.len()];
        // The best rule takes its segments first; what is taken is skipped over from then on.
        let mut next: Vec<u32> = (0..=cuts.len() as u32).collect();
        for item in items {
            let mut at = find(&mut next, position(&cuts, item.first));
            while cuts.get(at).is_some_and(|start| *start <= item.last) {
                if let (Some(value), Some(skip)) = (values.get_mut(at), next.get_mut(at)) {
                    *value = item.rank;
                    *skip = at as u32 + 1;
                }
                at = find(&mut next, at + 1);
            }
        }
        // Neighbours with the same answer are one segment.
        let offset = self.starts.len();
        for (start, value) in cuts.iter().zip(&values) {
            if self.starts.len() == offset || self.values.last() != Some(value) {
                self.starts.push(*start);
                self.values.push(*value);
            }
        }
        let best = items.first().map_or(NO_RANK, |i| i.rank);
        self.seal(offset, best)
    }

    /// Adds the map from each number to the index of the last of `starts` (ascending, 0 first) that is not above it.
    pub(crate) fn add_positions(&mut self, starts: &[u16]) -> RangeMap {
        let offset = self.starts.len();
        self.starts.extend_from_slice(starts);
        self.values.extend(0..starts.len() as u32);
        self.seal(offset, 0)
    }

    fn seal(&mut self, offset: usize, best: u32) -> RangeMap {
        let segments = self.starts.get(offset..).unwrap_or_default();
        let mut pages = NO_PAGES;
        if segments.len() > PAGED_ABOVE {
            pages = self.pages.len() as u32;
            self.pages.extend((0..256u32).map(|high| {
                let containing = segments.partition_point(|start| u32::from(*start) <= high << 8);
                containing.saturating_sub(1) as u16
            }));
            self.pages.push((segments.len() - 1) as u16);
        }
        RangeMap { offset: offset as u32, len: segments.len() as u32, pages, best }
    }

    /// What `number` maps to.
    #[inline]
    pub(crate) fn lookup(&self, map: RangeMap, number: u16, steps: &mut impl Steps) -> u32 {
        let (mut low, mut len) = (map.offset as usize, map.len as usize);
        if len == 0 {
            return NO_RANK;
        }
        if map.pages != NO_PAGES {
            let at = map.pages as usize + usize::from(number >> 8);
            let (first, last) = match self.pages.get(at..at + 2) {
                Some(&[first, last]) => (usize::from(first), usize::from(last)),
                _ => return NO_RANK,
            };
            steps.add(1);
            low += first;
            len = last - first + 1;
        }
        // The last segment that begins at or below `number`; the first one always does.
        while len > 1 {
            let half = len / 2;
            steps.add(1);
            if self.starts.get(low + half).is_some_and(|start| *start <= number) {
                low += half;
            }
            len -= half;
        }
        steps.add(1);
        self.values.get(low).copied().unwrap_or(NO_RANK)
    }

    /// Bytes of memory behind the maps.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.starts.capacity() * 2 + self.values.capacity() * 4 + self.pages.capacity() * 2
    }

    /// Gives back what growing reserved.
    pub(crate) fn shrink(&mut self) {
        self.starts.shrink_to_fit();
        self.values.shrink_to_fit();
        self.pages.shrink_to_fit();
    }
}

/// The first numbers of the segments that the ranges cut the numbers into: sorted, unique, 0 first.
pub(crate) fn cuts(items: &[Ranked]) -> Vec<u16> {
    let mut cuts = Vec::with_capacity(items.len() * 2 + 1);
    cuts.push(0);
    for item in items {
        cuts.push(item.first);
        cuts.extend(item.last.checked_add(1));
    }
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// The segment that contains `number`.
pub(crate) fn position(cuts: &[u16], number: u16) -> usize {
    cuts.partition_point(|start| *start <= number).saturating_sub(1)
}

/// The first segment from `at` on that is not taken, by path halving.
fn find(next: &mut [u32], mut at: usize) -> usize {
    loop {
        let Some(&up) = next.get(at) else { return at };
        if up as usize == at {
            return at;
        }
        let beyond = next.get(up as usize).copied().unwrap_or(up);
        if let Some(n) = next.get_mut(at) {
            *n = beyond;
        }
        at = beyond as usize;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn finds_the_best_range(ranges in proptest::collection::vec((0u16.., 0u16..3000), 0..200), scale in 0u32..10) {
            let mut maps = RangeMaps::default();
            // Another map before and after: positions are relative.
            maps.add(&[Ranked { first: 1, last: 1, rank: 7 }]);
            let items: Vec<_> = ranges.iter().enumerate().map(|(i, (first, len))| {
                let first = first >> scale;
                Ranked { first, last: first.saturating_add(*len), rank: i as u32 * 3 }
            }).collect();
            let map = maps.add(&items);
            maps.add(&[Ranked { first: 0, last: 65535, rank: 8 }]);
            let mut probes: Vec<u16> = (0..=255).map(|i| i * 257).collect();
            for item in &items {
                probes.extend([item.first, item.last, item.first.saturating_sub(1), item.last.saturating_add(1)]);
            }
            for number in probes {
                let expected = items.iter().find(|i| i.first <= number && number <= i.last).map_or(NO_RANK, |i| i.rank);
                let mut steps = 0u32;
                prop_assert_eq!(maps.lookup(map, number, &mut steps), expected, "{}", number);
                prop_assert!(steps <= 11);
            }
        }
    }

    #[test]
    fn every_number_a_segment_of_its_own() {
        let items: Vec<_> = (0..=u16::MAX).map(|n| Ranked { first: n, last: n, rank: u32::from(n) }).collect();
        let mut maps = RangeMaps::default();
        let map = maps.add(&items);
        assert_eq!(map.len, 65_536);
        for n in 0..=u16::MAX {
            let mut steps = 0u32;
            assert_eq!(maps.lookup(map, n, &mut steps), u32::from(n));
            assert!(steps <= 11, "{steps}");
        }
    }

    #[test]
    fn neighbours_with_one_answer_are_merged() {
        let mut maps = RangeMaps::default();
        let range = |first, last, rank| Ranked { first, last, rank };
        let map = maps.add(&[range(0, 65535, 1), range(5, 9, 2), range(100, 200, 3)]);
        assert_eq!(map.len, 1);
        assert_eq!(maps.lookup(RangeMap::EMPTY, 0, &mut ()), NO_RANK);
    }
}
