//! Where a packet's connection was found last, at both of its ends: one look instead of one in each table.
//!
//! A place says that packets with some 15 bits of a hash between two ports have their entries in these slots of the two tables (as the
//! signature match cache of OVS says which flow such packets have). It is a guess: who follows it compares the connection's key, which is
//! in the entry, and asks the tables if the guess was wrong. Both directions of a connection share a place. Each PMD thread has its own
//! cache, that grows while connections often make room for others, up to [`MOST_SETS`], and now and then tries a smaller one: what is
//! spread over less memory is in the processor's cache more often.
#![allow(unsafe_code)] // States a fact.
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bridge::fdb::PortId;
use crate::conntrack::{Ends, Plain};
use crate::memory::{Memory, Zeroed, prefetch};

/// Places that a flow can be in.
const WAYS: usize = 4;
/// Sets of places in use: 4096 flows at least, 2 million (16 MB) at most.
const FEWEST_SETS: u32 = if cfg!(miri) { 2 } else { 1 << 10 };
const MOST_SETS: u32 = if cfg!(miri) { 16 } else { 1 << 19 };
/// After so many looks for known connections it is seen whether the size is right.
const PERIOD: u32 = 1 << 14;
/// The cache is too small when after one look in this many somebody had to make room.
const TOLERATED: u32 = 8;
/// A smaller one is tried after this many periods.
const TRIED_EVERY: u32 = 1 << 10;
/// Bits of a slot's number; there are not more slots in a table.
const SLOT_BITS: u32 = 24;
const _: () = assert!(crate::conntrack::MAX_CAPACITY as u64 <= 1 << SLOT_BITS);

/// `tag << 48 | slot in the table of the first port << 24 | slot in that of the second`; 0 when empty. Tags are odd.
#[derive(Default)]
#[repr(C, align(32))]
struct Set([AtomicU64; WAYS]);

// SAFETY: atomic integers.
unsafe impl Zeroed for Set {}

/// The two ports between which packets go, and their VLAN.
#[derive(Clone, Copy)]
pub(crate) struct Between {
    key: u64,
    /// They go from the second port to the first.
    is_back: bool,
}

impl Between {
    /// From the port `near` to `far`, where they have firewalls.
    #[inline(always)]
    pub fn new(near: Option<PortId>, far: Option<PortId>, vlan: u16) -> Self {
        let [near, far] = [near, far].map(|port| port.unwrap_or(PortId::MAX));
        let key = u64::from(near.min(far)) << 16 | u64::from(near.max(far)) << 32 | u64::from(vlan) << 48;
        Self { key, is_back: near > far }
    }
}

/// What is looked for: a hash of a packet's ends, its protocol and where it goes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FlowHash(u64);

impl FlowHash {
    #[inline(always)]
    fn tag(self) -> u64 {
        (self.0 | 1) << (2 * SLOT_BITS)
    }
    /// Tells in which set it is; has nothing to do with the tag.
    #[inline(always)]
    fn half(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The cache. By default there is room for nothing.
#[derive(Default)]
pub(crate) struct FlowCache {
    sets: Option<Memory<Set>>,
    mask: u32,
    keys: [u64; 2],
    looks: u32,
    evictions: u32,
    periods: u32,
    /// Chooses what makes room.
    turn: u32,
}

impl FlowCache {
    /// An empty one; without memory for it, one that stays empty.
    pub fn new() -> Self {
        let random = RandomState::new();
        let keys = [0u8, 1].map(|n| random.hash_one(n));
        Self { sets: Memory::new(MOST_SETS as usize).ok(), mask: FEWEST_SETS - 1, keys, ..Self::default() }
    }

    /// Backs it with memory, that no packet has to wait for any later.
    pub fn provide(&self) {
        if let Some(sets) = &self.sets {
            sets.populate(0, MOST_SETS as usize);
        }
    }

    #[inline(always)]
    fn set(&self, flow: FlowHash) -> Option<&Set> {
        self.sets.as_ref()?.get(flow.half() & self.mask)
    }

    /// What packets with these ends, the source first, are looked for under that are of `packet`'s protocol; fetches where they would be.
    #[inline(always)]
    pub fn prepare(&self, ends: Ends, packet: &Plain, between: Between) -> FlowHash {
        let [k0, k1] = self.keys;
        let ends = if between.is_back { ends.turned() } else { ends };
        let flow = FlowHash(ends.hash(u64::from(packet.kind()), [k0, k1 ^ between.key]));
        if let Some(set) = self.set(flow) {
            prefetch(set);
        }
        flow
    }

    /// The slots in which their connection's entries probably are: in the table of the port that they come from, and in that of the one
    /// that they go to; where that has none, it means nothing.
    #[inline(always)]
    pub fn find(&self, flow: FlowHash, between: Between) -> Option<[u32; 2]> {
        let tag = flow.tag();
        // Where the tag is the same, the slots are left, and those are the lowest numbers.
        let [a, b, c, d] = self.set(flow)?.0.each_ref().map(|place| place.load(Ordering::Relaxed) ^ tag);
        let least = a.min(b).min(c.min(d));
        if least >> (2 * SLOT_BITS) != 0 {
            return None;
        }
        let [first, second] = [least >> SLOT_BITS, least & ((1 << SLOT_BITS) - 1)].map(|slot| slot as u32);
        Some(if between.is_back { [second, first] } else { [first, second] })
    }

    /// Their connection, which was not found here, has its entries in these slots.
    pub fn learn(&mut self, flow: FlowHash, between: Between, [near, far]: [u32; 2]) {
        if (near | far) >> SLOT_BITS != 0 {
            return;
        }
        self.looks += 1;
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn as usize % WAYS;
        // Where it was while the cache was half as large, it only takes room.
        self.forget_in(self.sets.as_ref().and_then(|sets| sets.get(flow.half() & (self.mask / 2))), flow);
        let [first, second] = if between.is_back { [far, near] } else { [near, far] };
        let word = flow.tag() | u64::from(first) << SLOT_BITS | u64::from(second);
        let Some(Set(places)) = self.set(flow) else { return };
        let value = |place: &AtomicU64| place.load(Ordering::Relaxed);
        let same = places.iter().find(|&place| (value(place) ^ word) >> (2 * SLOT_BITS) == 0);
        if let Some(place) = same.or_else(|| places.iter().find(|&place| value(place) == 0)) {
            place.store(word, Ordering::Relaxed);
        } else if let Some(place) = places.get(turn) {
            place.store(word, Ordering::Relaxed);
            self.evictions += 1;
        }
    }

    /// They are somewhere else.
    pub fn forget(&mut self, flow: FlowHash) {
        self.forget_in(self.set(flow), flow);
    }

    fn forget_in(&self, set: Option<&Set>, flow: FlowHash) {
        let tag = flow.tag();
        let Some(Set(places)) = set else { return };
        for place in places {
            if (place.load(Ordering::Relaxed) ^ tag) >> (2 * SLOT_BITS) == 0 {
                place.store(0, Ordering::Relaxed);
            }
        }
    }

    /// So many looks found what they were for.
    #[inline(always)]
    pub fn note_known(&mut self, count: u32) {
        self.looks += count;
        if self.looks >= PERIOD {
            self.fit();
        }
    }

    /// Finds the right size.
    #[cold]
    #[inline(never)]
    fn fit(&mut self) {
        let sets = self.mask + 1;
        self.periods += 1;
        if u64::from(self.evictions) * u64::from(TOLERATED) > u64::from(self.looks) {
            self.mask = (sets * 2).min(MOST_SETS) - 1;
        } else if self.periods.is_multiple_of(TRIED_EVERY) {
            self.mask = (sets / 2).max(FEWEST_SETS) - 1;
        }
        (self.looks, self.evictions) = (0, 0);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::conntrack::{ConnMap, Layout, Particulars, Toward};
    use crate::frame::SNAPSHOT_BYTES;

    const NEAR: PortId = 7;
    const FAR: PortId = 3;

    /// A datagram from 10.0.0.`from` to 10.0.0.`to`, between these ports.
    fn packet(from: (u8, u16), to: (u8, u16)) -> Plain {
        let mut head = [0; SNAPSHOT_BYTES];
        let mut ip = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, from.0, 10, 0, 0, to.0];
        let sum = crate::offload::checksum::internet_checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        head[14..34].copy_from_slice(&ip);
        head[34..36].copy_from_slice(&from.1.to_be_bytes());
        head[36..38].copy_from_slice(&to.1.to_be_bytes());
        head[38..40].copy_from_slice(&8u16.to_be_bytes());
        let (plain, is_plain) = Plain::read(&head, 42, 42, Layout::V4, &mut Particulars::default()).unwrap();
        assert!(is_plain);
        plain
    }

    struct Bench {
        map: ConnMap,
        cache: FlowCache,
    }

    impl Bench {
        fn new() -> Self {
            Self { map: ConnMap::new(16, [1, 2]).unwrap(), cache: FlowCache::new() }
        }
        /// As seen by the port that it comes from, or where that has no firewall.
        fn flow(&self, packet: &Plain, between: Between) -> FlowHash {
            self.cache.prepare(self.map.ends(&packet.key(Toward::Egress, 0)), packet, between)
        }
        fn find(&self, packet: &Plain, between: Between) -> Option<[u32; 2]> {
            self.cache.find(self.flow(packet, between), between)
        }
        fn learn(&mut self, packet: &Plain, between: Between, slots: [u32; 2]) {
            self.cache.learn(self.flow(packet, between), between, slots);
        }
    }

    #[test]
    fn both_directions_share_a_place() {
        let mut bench = Bench::new();
        let (there, back) = (packet((1, 1000), (2, 53)), packet((2, 53), (1, 1000)));
        for (near, far) in [(Some(NEAR), Some(FAR)), (Some(NEAR), None), (None, Some(FAR))] {
            let (between, behind) = (Between::new(near, far, 5), Between::new(far, near, 5));
            assert_eq!(bench.find(&there, between), None);
            bench.learn(&there, between, [(1 << 24) - 1, 77]);
            assert_eq!(bench.find(&there, between), Some([(1 << 24) - 1, 77]));
            assert_eq!(bench.find(&back, behind), Some([77, (1 << 24) - 1]));
            // The same ends elsewhere, turned round, or of another VLAN are something else.
            assert_eq!(bench.find(&back, between), None);
            assert_eq!(bench.find(&there, Between::new(near.map(|port| port + 1), far.map(|port| port + 1), 5)), None);
            assert_eq!(bench.find(&there, Between::new(near, far, 6)), None);
            bench.learn(&back, behind, [4, 5]);
            assert_eq!(bench.find(&there, between), Some([5, 4]), "what is newer counts");
            let flow = bench.flow(&there, between);
            bench.cache.forget(flow);
            assert_eq!((bench.find(&there, between), bench.find(&back, behind)), (None, None));
        }
        let between = Between::new(Some(NEAR), Some(FAR), 0);
        bench.learn(&there, between, [u32::MAX, 1]);
        assert_eq!(bench.find(&there, between), None, "no slot");
    }

    #[test]
    fn it_grows_until_it_knows_what_is_in_use_and_shrinks_again() {
        let mut bench = Bench::new();
        let between = Between::new(Some(NEAR), Some(FAR), 0);
        let flows = if cfg!(miri) { 40u32 } else { 20_000 };
        let packets: Vec<_> = (0..flows).map(|n| packet(((n >> 16) as u8, n as u16), (99, 53))).collect();
        let mut sizes = vec![bench.cache.mask];
        for round in 0..if cfg!(miri) { 2 } else { 60 } {
            let mut known = 0;
            for (n, packet) in packets.iter().enumerate() {
                match bench.find(packet, between) {
                    // Few of them share a tag.
                    Some(slots) => {
                        known += u32::from(slots == [n as u32, n as u32 + 1]);
                        bench.cache.note_known(1);
                    }
                    None => bench.learn(packet, between, [n as u32, n as u32 + 1]),
                }
            }
            sizes.push(bench.cache.mask);
            assert!(cfg!(miri) || round < 30 || known > flows / 10 * 8, "round {round}: {known}");
        }
        let largest = *sizes.iter().max().unwrap();
        assert!(cfg!(miri) || largest > flows / 4 && largest < flows, "{sizes:?}");
        // Nobody asks for most of them any more.
        for _ in 0..20 * TRIED_EVERY {
            bench.cache.note_known(PERIOD);
        }
        assert_eq!(bench.cache.mask, FEWEST_SETS - 1);
    }

    #[test]
    fn without_room_nothing_is_known() {
        let mut bench = Bench { cache: FlowCache::default(), ..Bench::new() };
        let (there, between) = (packet((1, 1), (2, 2)), Between::new(Some(NEAR), None, 0));
        bench.learn(&there, between, [1, 1]);
        let flow = bench.flow(&there, between);
        bench.cache.forget(flow);
        assert_eq!(bench.find(&there, between), None);
    }
}
