use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;
use crate::conntrack::{ConnTable, ModelTable};

const SEED: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
/// Sizes that the interpreter gets through.
const fn scaled(n: u32, miri: u32) -> u32 {
    if cfg!(miri) { miri } else { n }
}

fn map(capacity: u32) -> ConnMap {
    ConnMap::new(capacity, SEED).unwrap()
}

/// Remembers what went.
#[derive(Default)]
struct Diary(RefCell<Vec<(Key, Removal)>>);

impl Diary {
    fn take(&self) -> Vec<(Key, Removal)> {
        self.0.take()
    }
}

impl Observer for Diary {
    fn removed(&self, connection: &Connection, why: Removal) {
        self.0.borrow_mut().push((connection.key, why));
    }
}

fn expiring(n: u32, at_ms: u32) -> Connection {
    let mut c = sample(n);
    c.refresh(0, at_ms);
    c
}

fn all(map: &ConnMap) -> Vec<Connection> {
    let (mut cursor, mut found) = (Cursor::default(), Vec::new());
    while map.walk(&mut cursor, 1000, &mut |c| found.push(*c)) {}
    found
}

#[test]
fn capacity_has_bounds() {
    assert!(matches!(ConnMap::new(0, SEED), Err(MapError::Capacity(0))));
    assert!(matches!(ConnMap::new(MAX_CAPACITY + 1, SEED), Err(MapError::Capacity(_))));
    let one = map(1);
    let mut h = one.handle(&(), 0);
    h.insert(&sample(1), 0).unwrap();
    assert_eq!(one.len(), 1);
    let mut second = sample(2);
    second.set_assured();
    h.insert(&second, 0).unwrap();
    assert_eq!(h.insert(&sample(3), 0), Err(InsertError::Full));
}

#[test]
#[cfg_attr(miri, ignore = "a million connections")]
fn at_capacity_a_connection_takes_no_more_than_128_bytes() {
    for capacity in [10_000, DEFAULT_CAPACITY, (1 << 19) + 1] {
        let map = map(capacity);
        map.set_tracking(true);
        let bytes = map.memory_bytes();
        assert!(bytes <= 128 * capacity as usize, "{bytes} for {capacity}");
        let mut h = map.handle(&(), 0);
        for n in 0..capacity {
            h.insert(&sample(n), 0).unwrap();
        }
        let stats = map.stats();
        assert_eq!((stats.len, stats.bucket_full, stats.evicted), (u64::from(capacity), 0, 0));
        assert_eq!(map.memory_bytes(), bytes);
        for n in 0..capacity {
            assert_eq!(h.lookup(&sample(n).key, 0).map(|c| c.key), Some(sample(n).key));
        }
        assert!(h.lookup(&sample(capacity).key, 0).is_none());
    }
}

#[test]
fn every_change_raises_the_version_and_outdates_copies() {
    let map = map(100);
    let diary = Diary::default();
    let mut h = map.handle(&diary, 0);
    let c = sample(1);
    assert_eq!(h.update(&c, Change::Semantic), Stored::Stale, "not there");
    assert_eq!(h.remove(&c), Stored::Stale);
    h.insert(&c, 0).unwrap();
    assert_eq!(h.insert(&c, 0), Err(InsertError::Exists));
    let first = h.lookup(&c.key, 0).unwrap();
    let mut second = first;
    second.set_assured();
    assert_eq!(h.update(&second, Change::Semantic), Stored::Done);
    assert_eq!(h.update(&second, Change::Semantic), Stored::Stale);
    assert_eq!(h.remove(&first), Stored::Stale);
    let now = h.lookup(&c.key, 0).unwrap();
    assert!(newer(now.version, first.version) && now.assured());
    assert_eq!(map.get(&c.key), Some(now));
    // A handle that has not looked it up, or something else since.
    let mut other = map.handle(&diary, 1);
    assert_eq!(other.update(&now, Change::None), Stored::Done);
    h.insert(&sample(2), 0).unwrap();
    h.lookup(&sample(2).key, 0).unwrap();
    let now = map.get(&c.key).unwrap();
    assert_eq!(h.remove(&now), Stored::Done);
    assert_eq!(h.remove(&now), Stored::Stale);
    assert_eq!(diary.take(), [(c.key, Removal::Finished)]);
    h.insert(&c, 0).unwrap();
    assert!(newer(map.get(&c.key).unwrap().version, now.version), "through deletion too");
    assert_eq!(map.len(), 2);
}

#[test]
fn a_batch_of_lookups_in_steps() {
    let map = map(1000);
    let mut h = map.handle(&(), 0);
    for n in 0..100 {
        h.insert(&sample(n), 0).unwrap();
    }
    let hashes: Vec<u64> = (0..150).map(|n| map.hash(&sample(n).key)).collect();
    hashes.iter().for_each(|&hash| map.prefetch_bucket(hash));
    hashes.iter().for_each(|&hash| map.prefetch_entries(hash));
    for (n, &hash) in hashes.iter().enumerate() {
        let found = h.lookup_hashed(&sample(n as u32).key, hash, 0);
        assert_eq!(found.map(|c| c.key), (n < 100).then_some(sample(n as u32).key));
    }
}

#[test]
fn the_expired_are_not_found_and_go_by_whoever_meets_them() {
    let map = map(100);
    let diary = Diary::default();
    let mut h = map.handle(&diary, 0);
    for n in 0..4 {
        h.insert(&expiring(n, 1000), 0).unwrap();
    }
    h.insert(&expiring(4, 2000), 0).unwrap();
    assert!(h.lookup(&sample(0).key, 999).is_some());
    assert!(map.get(&sample(0).key).is_some());
    assert!(h.lookup(&sample(0).key, 1000).is_none());
    assert_eq!(diary.take(), [(sample(0).key, Removal::Expired)]);
    h.insert(&expiring(1, 5000), 1000).unwrap();
    assert_eq!(diary.take(), [(sample(1).key, Removal::Expired)]);
    // Two are left; slots used: five.
    let gone: usize = (0..5).map(|_| map.sweep(1000, 1, &diary)).sum();
    assert_eq!(gone, 2);
    assert_eq!(diary.take().len(), 2);
    assert_eq!(h.expire(1999, 100), 0);
    assert_eq!(h.expire(2000, 100), 1);
    assert_eq!(map.len(), 1);
    assert_eq!(map.stats().expired, 5);
}

#[test]
#[cfg_attr(miri, ignore = "slow, and nothing new to the interpreter")]
fn sweeping_goes_round_in_steps() {
    let map = map(1000);
    let mut h = map.handle(&(), 0);
    assert_eq!(map.sweep(0, 100, &()), 0);
    for n in 0..1000 {
        h.insert(&expiring(n, if n % 2 == 0 { 10 } else { 100 }), 0).unwrap();
    }
    for step in 0..100 {
        assert_eq!(map.sweep(50, 10, &()), 5, "step {step}");
    }
    assert_eq!(map.sweep(50, 1000, &()), 0);
    assert_eq!(map.sweep(100, usize::MAX, &()), 500);
}

#[test]
fn who_makes_room_for_others() {
    let map = map(6);
    let diary = Diary::default();
    let mut h = map.handle(&diary, 0);
    let store = |h: &mut ConnHandle<'_>, n: u32, at: u32, reply: bool, assured: bool, now: u64| {
        let mut c = expiring(n, at);
        if reply {
            c.set_seen_reply();
        }
        if assured {
            c.set_assured();
        }
        h.insert(&c, now)
    };
    store(&mut h, 0, 9000, true, true, 0).unwrap();
    store(&mut h, 1, 100, true, true, 0).unwrap();
    store(&mut h, 2, 2000, true, false, 0).unwrap();
    store(&mut h, 3, 8000, false, false, 0).unwrap();
    store(&mut h, 4, 7000, false, false, 0).unwrap();
    store(&mut h, 5, 6000, true, true, 0).unwrap();
    // The expired one, though assured; then the unanswered by remaining time; then the unassured; then nobody.
    for (n, (victim, why)) in
        [(1, Removal::Expired), (4, Removal::Evicted), (3, Removal::Evicted), (2, Removal::Evicted)]
            .into_iter()
            .enumerate()
    {
        store(&mut h, 10 + n as u32, 9000, true, true, 150).unwrap();
        assert_eq!(diary.take(), [(sample(victim).key, why)]);
    }
    assert_eq!(store(&mut h, 20, 9000, false, false, 150), Err(InsertError::Full));
    assert_eq!(store(&mut h, 20, 9000, false, false, 150), Err(InsertError::Full));
    assert_eq!(diary.take(), []);
    // Once one expires there is room.
    store(&mut h, 20, 9000, false, false, 6000).unwrap();
    assert_eq!(diary.take(), [(sample(5).key, Removal::Expired)]);
    let stats = map.stats();
    assert_eq!(
        (stats.evicted_expired, stats.evicted_half_open, stats.evicted_answered, stats.evicted, stats.full),
        (2, 2, 1, 3, 2)
    );
    assert_eq!(map.len(), 6);
}

#[test]
fn full_buckets_make_room_among_themselves() {
    // Two buckets, which all keys share; fill them with words of a slot that is not in use.
    let map = map(20);
    let diary = Diary::default();
    let mut h = map.handle(&diary, 0);
    h.insert(&sample(0), 0).unwrap();
    let places = map.index.places(map.hash(&sample(99).key));
    let fillers = core::iter::from_fn(|| map.index.put(&places, 19)).count();
    assert_eq!(fillers, 2 * index::PLACES - 1);
    let mut assured = sample(1);
    assured.set_assured();
    h.insert(&assured, 0).unwrap();
    assert_eq!(diary.take(), [(sample(0).key, Removal::Evicted)]);
    assert_eq!(h.insert(&sample(2), 0), Err(InsertError::Full));
    let stats = map.stats();
    assert_eq!((stats.bucket_full, stats.evicted_half_open, stats.full, stats.len), (2, 1, 1, 1));
    assert_eq!(all(&map).len(), 1);
    // What could not be stored has left nothing behind.
    map.index.clear(&places, 19);
    h.insert(&sample(2), 0).unwrap();
    assert_eq!(map.slab.used(), 2);
}

#[test]
fn a_walk_sees_each_entry_once_in_steps() {
    let map = map(500);
    let mut h = map.handle(&(), 0);
    for n in 0..300 {
        h.insert(&sample(n), 0).unwrap();
    }
    let (mut cursor, mut seen, mut steps) = (Cursor::default(), HashMap::new(), 0);
    loop {
        let more = map.walk(&mut cursor, 7, &mut |c| *seen.entry(c.key).or_insert(0) += 1);
        // Traffic meanwhile.
        let c = h.lookup(&sample(steps * 11 % 300).key, 0).unwrap();
        h.update(&c, Change::Bookkeeping);
        let _ = h.insert(&sample(300 + steps), 0);
        steps += 1;
        if !more {
            break;
        }
    }
    for n in 0..300 {
        assert_eq!(seen.get(&sample(n).key), Some(&1));
    }
    assert_eq!(cursor, Cursor::default());
}

#[test]
fn flushing_takes_what_it_is_told_to() {
    let map = map(500);
    let diary = Diary::default();
    let mut h = map.handle(&(), 0);
    for n in 0..100 {
        h.insert(&sample(n), 0).unwrap();
    }
    let odd = |c: &Connection| c.key.remote_port % 2 == 1;
    let mut cursor = Cursor::default();
    while map.flush(&mut cursor, 13, &diary, &mut |c| odd(c)) {}
    assert_eq!(diary.take().len(), 50);
    assert!(all(&map).iter().all(|c| !odd(c)));
    assert!(map.remove_if(&sample(2).key, Removal::Flushed, &diary, |_| true));
    assert!(!map.remove_if(&sample(4).key, Removal::Flushed, &diary, |_| false));
    assert!(!map.remove_if(&sample(1).key, Removal::Flushed, &diary, |_| true));
    assert_eq!((map.len(), map.stats().flushed, diary.take().len()), (49, 51, 1));
}

#[test]
fn amending_changes_what_it_is_told_to_in_steps() {
    let map = map(1000);
    let mut h = map.handle(&(), 0);
    for n in 0..100 {
        h.insert(&sample(n), 0).unwrap();
    }
    let copy = map.get(&sample(1).key).unwrap();
    map.set_tracking(true);
    let amend = |change: Change| {
        let (mut cursor, mut changed) = (Cursor::default(), 0);
        loop {
            let (some, more) = map.amend(&mut cursor, 13, &mut |c| match c.key.remote_port % 2 {
                1 => {
                    c.policy_generation = 77;
                    change
                }
                _ => Change::None,
            });
            changed += some;
            if !more {
                return changed;
            }
        }
    };
    assert_eq!(amend(Change::None), 0);
    assert_eq!(amend(Change::Bookkeeping), 50);
    assert_eq!(map.uncollected(), Uncollected { lagging: 50, ..Uncollected::default() });
    assert!(all(&map).iter().all(|c| (c.policy_generation == 77) == (c.key.remote_port % 2 == 1)));
    assert_eq!(h.update(&copy, Change::Semantic), Stored::Stale, "an older copy changes nothing");
    assert!(newer(map.get(&copy.key).unwrap().version, copy.version));
}

#[test]
fn amending_loses_no_change_that_threads_make_meanwhile() {
    const ENTRIES: u32 = 200;
    const TOUCHES: u32 = 20_000;
    let map = map(1000);
    for n in 0..ENTRIES {
        map.handle(&(), 0).insert(&sample(n), 0).unwrap();
    }
    let before: BTreeMap<Key, u32> = all(&map).iter().map(|c| (c.key, c.policy_generation)).collect();
    let touched = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2u32)
            .map(|thread| {
                let map = &map;
                scope.spawn(move || {
                    let mut h = map.handle(&(), thread as usize);
                    let mut done = 0;
                    for i in 0..TOUCHES {
                        let Some(mut c) = h.lookup(&sample((i * 7 + thread) % ENTRIES).key, 0) else { continue };
                        c.policy_generation += 2;
                        done += u32::from(h.update(&c, Change::Semantic) == Stored::Done);
                    }
                    done
                })
            })
            .collect();
        // Each pass sets and takes back the lowest bit.
        for bit in [1, 0] {
            let mut cursor = Cursor::default();
            while map
                .amend(&mut cursor, 17, &mut |c| {
                    if c.policy_generation & 1 == bit {
                        return Change::None;
                    }
                    c.policy_generation ^= 1;
                    Change::Bookkeeping
                })
                .1
            {}
        }
        threads.into_iter().map(|t| t.join().unwrap()).sum::<u32>()
    });
    let grown: u32 = all(&map).iter().map(|c| (c.policy_generation & !1) - (before[&c.key] & !1)).sum();
    assert_eq!(grown, touched * 2);
}

fn collect(map: &ConnMap, cursor: &mut Cursor) -> (Vec<Connection>, Vec<Tombstone>, u32) {
    let (mut changed, mut deleted, mut overflows) = (Vec::new(), Vec::new(), 0);
    loop {
        let more = map.collect_dirty(cursor, 10, &mut |dirt| match dirt {
            Dirt::Changed(c) => changed.push(c),
            Dirt::Deleted(t) => deleted.push(t),
            Dirt::Overflow => overflows += 1,
        });
        if !more {
            return (changed, deleted, overflows);
        }
    }
}

#[test]
fn only_what_changed_in_meaning_is_collected() {
    let map = map(1000);
    let mut h = map.handle(&(), 0);
    for n in 0..500 {
        h.insert(&sample(n), 0).unwrap();
    }
    let mut cursor = Cursor::default();
    assert_eq!(collect(&map, &mut cursor), (vec![], vec![], 0), "off");
    map.set_tracking(true);
    assert!(map.is_tracking());
    for n in 0..10 {
        let c = h.lookup(&sample(n).key, 0).unwrap();
        let change = if n % 2 == 0 { Change::Semantic } else { Change::Bookkeeping };
        assert_eq!(h.update(&c, change), Stored::Done);
    }
    h.insert(&sample(600), 0).unwrap();
    let gone = h.lookup(&sample(7).key, 0).unwrap();
    assert_eq!(h.remove(&gone), Stored::Done);
    let (changed, deleted, overflows) = collect(&map, &mut cursor);
    let mut keys: Vec<Key> = changed.iter().map(|c| c.key).collect();
    keys.sort_unstable();
    let mut expected: Vec<Key> = [0, 2, 4, 6, 8, 600].map(|n| sample(n).key).to_vec();
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(deleted, [Tombstone { key: sample(7).key, version: gone.version }]);
    assert_eq!(overflows, 0);
    assert_eq!(collect(&map, &mut cursor), (vec![], vec![], 0), "once");
    // More deletions than can be noted: said once.
    for n in 10..100 {
        let c = h.lookup(&sample(n).key, 0).unwrap();
        h.remove(&c);
    }
    let (_, deleted, overflows) = collect(&map, &mut cursor);
    assert_eq!((deleted.len(), overflows), (16, 1));
    assert_eq!(collect(&map, &mut cursor).2, 0);
    map.set_tracking(false);
    h.insert(&sample(700), 0).unwrap();
    map.set_tracking(true);
    assert_eq!(collect(&map, &mut cursor), (vec![], vec![], 0), "forgotten");
}

#[test]
fn what_may_lag_is_collected_apart_and_never_twice() {
    let map = map(1000);
    let mut h = map.handle(&(), 0);
    for n in 0..300 {
        h.insert(&sample(n), 0).unwrap();
    }
    let lagging = || {
        let (mut cursor, mut keys) = (Cursor::default(), Vec::new());
        while map.collect_lagging(&mut cursor, 7, &mut |c| keys.push(c.key)) {}
        keys.sort_unstable();
        keys
    };
    fn touch(map: &ConnMap, n: u32, change: Change) {
        let mut h = map.handle(&(), 0);
        let c = h.lookup(&sample(n).key, 0).unwrap();
        assert_eq!(h.update(&c, change), Stored::Done);
    }
    let keys = |numbers: &[u32]| {
        let mut keys: Vec<Key> = numbers.iter().map(|&n| sample(n).key).collect();
        keys.sort_unstable();
        keys
    };
    touch(&map, 1, Change::Bookkeeping);
    assert_eq!(lagging(), [], "off");
    map.set_tracking(true);
    touch(&map, 1, Change::None);
    assert_eq!(map.uncollected(), Uncollected::default());
    for n in [1, 2, 3, 200] {
        touch(&map, n, Change::Bookkeeping);
    }
    touch(&map, 4, Change::Semantic);
    let gone = map.get(&sample(200).key).unwrap();
    assert_eq!(h.remove(&gone), Stored::Done);
    assert_eq!(map.uncollected(), Uncollected { changed: 1, deleted: 1, lagging: 4 });
    assert_eq!(lagging(), keys(&[1, 2, 3]));
    assert_eq!(lagging(), []);
    // A semantic change takes the lagging one with it.
    touch(&map, 5, Change::Bookkeeping);
    touch(&map, 5, Change::Semantic);
    touch(&map, 6, Change::Bookkeeping);
    let (changed, deleted, _) = collect(&map, &mut Cursor::default());
    assert_eq!(changed.iter().map(|c| c.key).collect::<Vec<_>>(), keys(&[4, 5]));
    assert_eq!(deleted.len(), 1);
    assert_eq!(map.uncollected(), Uncollected { lagging: 1, ..Uncollected::default() });
    // So does a collecting walk, of all; another walk leaves the marks.
    touch(&map, 7, Change::Semantic);
    assert_eq!(all(&map).len(), 299);
    assert_eq!(map.uncollected(), Uncollected { changed: 1, lagging: 1, deleted: 0 });
    let (mut cursor, mut walked) = (Cursor::default(), 0);
    while map.walk_collecting(&mut cursor, 9, &mut |_| walked += 1) {}
    assert_eq!((walked, map.uncollected()), (299, Uncollected::default()));
    // Deletions alone.
    let gone = map.get(&sample(9).key).unwrap();
    assert_eq!(h.remove(&gone), Stored::Done);
    touch(&map, 10, Change::Semantic);
    let mut deleted = Vec::new();
    assert_eq!(map.collect_deleted(10, &mut |dirt| deleted.push(dirt)), 1);
    assert_eq!(deleted, [Dirt::Deleted(Tombstone { key: gone.key, version: gone.version })]);
    assert_eq!(map.uncollected().changed, 1);
}

#[test]
fn a_collecting_walk_keeps_the_marks_of_what_it_cannot_read() {
    let map = map(10);
    map.handle(&(), 0).insert(&sample(1), 0).unwrap();
    let c = map.get(&sample(1).key).unwrap();
    let number = (0..map.slab.used()).find(|&n| map.slab.slot(n).unwrap().holds(&c.key.words())).unwrap();
    map.set_tracking(true);
    map.dirty.semantic.set(number);
    map.dirty.lagging.set(number);
    let slot = map.slab.slot(number).unwrap();
    let claim = slot.claim(slot.meta(), &c, 5).unwrap();
    let mut cursor = Cursor { at: number };
    assert!(map.walk_collecting(&mut cursor, 10, &mut |_| panic!("being written")));
    assert_eq!((cursor.at, map.uncollected()), (number, Uncollected { changed: 1, lagging: 1, deleted: 0 }));
    assert!(!map.collect_lagging(&mut Cursor::default(), 10, &mut |_| panic!("being written")));
    assert_eq!(map.uncollected().lagging, 1, "the mark has stayed");
    claim.commit();
    let mut walked = 0;
    while map.walk_collecting(&mut cursor, 10, &mut |_| walked += 1) {}
    assert_eq!((walked, map.uncollected()), (1, Uncollected::default()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: scaled(500, 4), failure_persistence: None, ..ProptestConfig::default() })]

    /// Whoever applies what a collecting walk, then the collectors in any order and any portions hand over, ends with the same.
    #[test]
    fn a_follower_of_all_collectors_has_everything(
        before in proptest::collection::vec(0..30u32, 0..30),
        steps in proptest::collection::vec((0..7u8, 0..30u32, 1..40usize), 1..150),
    ) {
        let (source, copy) = (map(256), map(256));
        let mut h = source.handle(&(), 0);
        for n in before {
            let _ = h.insert(&sample(n), 0);
        }
        source.set_tracking(true);
        let bring = |c: &Connection| { copy.import(c, 0, &()); };
        let apply = |dirt: Dirt| match dirt {
            Dirt::Changed(c) => bring(&c),
            Dirt::Deleted(t) => { copy.delete_matching(&t.key, t.version, &()); }
            Dirt::Overflow => panic!("so few"),
        };
        let (mut walk, mut walking) = (Cursor::default(), true);
        let [mut dirty, mut lagging] = [Cursor::default(); 2];
        let mut deletions = 0;
        let drain = [(6, 0, 1000), (4, 0, 1000), (5, 0, 1000), (4, 0, 1000)];
        for (what, n, budget) in steps.into_iter().chain(drain) {
            let found = h.lookup(&sample(n).key, 0);
            match (what, found) {
                (0, None) => prop_assert_eq!(h.insert(&sample(n), 0), Ok(())),
                (0 | 1, Some(mut c)) => {
                    c.refresh(0, 4_000_000 + budget as u32);
                    prop_assert_eq!(h.update(&c, Change::Bookkeeping), Stored::Done);
                }
                (2, Some(mut c)) => {
                    c.set_words([budget as u32; 12]);
                    prop_assert_eq!(h.update(&c, Change::Semantic), Stored::Done);
                }
                (3, Some(c)) if deletions < 15 => {
                    deletions += 1;
                    prop_assert_eq!(h.remove(&c), Stored::Done);
                }
                (4, _) if !walking => {
                    deletions = 0;
                    source.collect_dirty(&mut dirty, budget, &mut |dirt| apply(dirt));
                }
                (5, _) if !walking => { source.collect_lagging(&mut lagging, budget, &mut |c| bring(c)); }
                (6, _) if walking => walking = source.walk_collecting(&mut walk, budget, &mut |c| bring(c)),
                _ => {}
            }
        }
        while source.collect_dirty(&mut dirty, 100, &mut |dirt| apply(dirt)) {}
        while source.collect_dirty(&mut dirty, 100, &mut |dirt| apply(dirt)) {}
        while source.collect_lagging(&mut lagging, 100, &mut |c| bring(c)) {}
        while source.collect_lagging(&mut lagging, 100, &mut |c| bring(c)) {}
        let [mut a, mut b] = [all(&source), all(&copy)];
        a.sort_unstable_by_key(|c| c.key);
        b.sort_unstable_by_key(|c| c.key);
        prop_assert_eq!(a, b);
    }
}

#[test]
fn imports_let_the_newer_win_whatever_the_order() {
    let map = map(10);
    let diary = Diary::default();
    let versions = |version: u32| {
        let mut c = sample(1);
        c.version = version;
        c.policy_generation = version;
        c
    };
    assert_eq!(map.import(&versions(5), 0, &diary), Imported::Added);
    assert_eq!(map.get(&sample(1).key), Some(versions(5)));
    assert_eq!(map.import(&versions(5), 0, &diary), Imported::Older);
    assert_eq!(map.import(&versions(4), 0, &diary), Imported::Older);
    assert_eq!(diary.take(), []);
    assert_eq!(map.import(&versions(7), 0, &diary), Imported::Replaced);
    assert_eq!(map.get(&sample(1).key), Some(versions(7)));
    assert_eq!(diary.take(), [(sample(1).key, Removal::Replaced)]);
    assert!(!map.delete_matching(&sample(1).key, 6, &diary));
    assert!(map.delete_matching(&sample(1).key, 7, &diary));
    assert!(!map.delete_matching(&sample(1).key, 7, &diary));
    assert_eq!(diary.take(), [(sample(1).key, Removal::Deleted)]);
    // The wrap.
    assert_eq!(map.import(&versions(VERSION_MAX), 0, &diary), Imported::Added);
    assert_eq!(map.import(&versions(0), 0, &diary), Imported::Replaced);
    let mut h = map.handle(&diary, 0);
    let c = h.lookup(&sample(1).key, 0).unwrap();
    assert_eq!((c.version, h.update(&c, Change::None)), (0, Stored::Done));
    assert_eq!(map.len(), 1);
    for n in 2..11 {
        let mut c = sample(n);
        c.set_assured();
        assert_eq!(map.import(&c, 0, &diary), Imported::Added);
    }
    assert_eq!(map.import(&sample(99), 0, &diary), Imported::Added, "the unassured one went");
    let c = map.get(&sample(99).key).unwrap();
    let mut assured = c;
    assured.set_assured();
    assured.version += 1;
    assert_eq!(map.import(&assured, 1, &diary), Imported::Replaced);
    assert_eq!(map.import(&sample(100), 2, &diary), Imported::Full);
    let stats = map.stats();
    assert_eq!((stats.imported, stats.replaced, stats.deleted, stats.len), (12, 3, 1, 10));
}

#[test]
fn a_writer_that_stands_still_harms_nobody_but_its_own_connection() {
    let map = map(100);
    let mut h = map.handle(&(), 0);
    h.insert(&sample(1), 0).unwrap();
    h.insert(&sample(2), 0).unwrap();
    let c = h.lookup(&sample(1).key, 0).unwrap();
    let number = (0..map.slab.used()).find(|&n| map.slab.slot(n).unwrap().holds(&c.key.words())).unwrap();
    let slot = map.slab.slot(number).unwrap();
    map.set_tracking(true);
    map.dirty.semantic.set(number);
    let claim = slot.claim(slot.meta(), &c, 77).unwrap();
    assert!(h.lookup(&c.key, 0).is_none());
    assert_eq!(map.stats().busy, 1);
    assert_eq!(h.insert(&c, 0), Err(InsertError::Exists));
    assert_eq!(h.update(&c, Change::None), Stored::Stale);
    assert_eq!(h.remove(&c), Stored::Stale);
    assert_eq!(map.import(&sample(1), 0, &()), Imported::Full);
    assert!(h.lookup(&sample(2).key, 0).is_some());
    let (mut cursor, mut seen) = (Cursor { at: number }, 0);
    assert!(map.walk(&mut cursor, 10, &mut |_| seen += 1));
    assert_eq!((cursor.at, seen), (number, 0), "waits rather than leave it out");
    let mut dirty = Cursor::default();
    assert_eq!(collect(&map, &mut dirty).0, []);
    claim.commit();
    assert_eq!(collect(&map, &mut dirty).0.len(), 1, "the mark has stayed");
    assert_eq!(h.lookup(&c.key, 0).unwrap().version, 77);
}

// ---- against the model

#[derive(Clone, Debug)]
enum Op {
    Lookup(u32),
    Insert { n: u32, ttl_ms: u32, assured: bool, reply: bool },
    Update { n: u32, ttl_ms: u32 },
    StaleUpdate(u32),
    Remove(u32),
    Expire,
    Pass(u32),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let n = 0..24u32;
    let op = prop_oneof![
        3 => n.clone().prop_map(Op::Lookup),
        6 => (n.clone(), 1..400u32, any::<bool>(), any::<bool>())
            .prop_map(|(n, ttl_ms, assured, reply)| Op::Insert { n, ttl_ms, assured, reply }),
        3 => (n.clone(), 1..400u32).prop_map(|(n, ttl_ms)| Op::Update { n, ttl_ms }),
        1 => n.clone().prop_map(Op::StaleUpdate),
        2 => n.prop_map(Op::Remove),
        1 => Just(Op::Expire),
        2 => (1..60u32).prop_map(Op::Pass),
    ];
    proptest::collection::vec(op, 1..200)
}

/// What the two tables must agree on: everything but the numbers that versions have.
fn same(a: Option<Connection>, b: Option<Connection>) -> bool {
    let [a, b] = [a, b].map(|c| {
        c.map(|mut c| {
            c.version = 0;
            c
        })
    });
    a == b
}

proptest! {
    #![proptest_config(ProptestConfig { cases: scaled(2000, 4), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_thread_gets_the_model_tables_answers(ops in ops(), capacity in 1..20u32) {
        let map = ConnMap::new(capacity, SEED).unwrap();
        let diary = Diary::default();
        let mut real = map.handle(&diary, 0);
        let mut model = ModelTable::new(capacity as usize);
        let mut now_ms = 0;
        let mut last_version = BTreeMap::new();
        for op in ops {
            match op {
                Op::Lookup(n) => {
                    let key = sample(n).key;
                    prop_assert!(same(real.lookup(&key, now_ms), model.lookup(&key, now_ms)), "{op:?}");
                }
                Op::Insert { n, ttl_ms, assured, reply } => {
                    let mut c = sample(n);
                    c.refresh(now_ms, ttl_ms);
                    if assured { c.set_assured(); }
                    if reply { c.set_seen_reply(); }
                    let full = model.len() as u32 == capacity && !model.iter().any(|m| m.key == c.key);
                    // Which of the equals makes room is each table's own affair: let the model follow.
                    if full {
                        let class = |m: &Connection| (!m.is_expired(now_ms), !m.is_expired(now_ms) && m.seen_reply());
                        let may_go = |m: &&Connection| m.is_expired(now_ms) || !m.assured();
                        let best = model.iter().filter(may_go).map(class).min();
                        diary.take();
                        let inserted = real.insert(&c, now_ms);
                        prop_assert_eq!(inserted.is_ok(), best.is_some());
                        for (key, why) in diary.take() {
                            let gone = *model.iter().find(|m| m.key == key).unwrap();
                            prop_assert_eq!(Some(class(&gone)), best);
                            prop_assert_eq!(why == Removal::Expired, gone.is_expired(now_ms));
                            prop_assert_eq!(model.remove(&gone), Stored::Done);
                        }
                        if inserted.is_ok() {
                            prop_assert_eq!(model.insert(&c, now_ms), Ok(()));
                        }
                    } else {
                        prop_assert_eq!(real.insert(&c, now_ms), model.insert(&c, now_ms));
                    }
                }
                Op::Update { n, ttl_ms } => {
                    let key = sample(n).key;
                    if let (Some(mut a), Some(mut b)) = (real.lookup(&key, now_ms), model.lookup(&key, now_ms)) {
                        for c in [&mut a, &mut b] {
                            c.refresh(now_ms, ttl_ms);
                            c.set_words([ttl_ms; 12]);
                        }
                        prop_assert_eq!(real.update(&a, Change::Semantic), model.update(&b, Change::Semantic));
                    }
                }
                Op::StaleUpdate(n) => {
                    let mut c = sample(n);
                    c.version = VERSION_MAX / 2;
                    prop_assert_eq!(real.update(&c, Change::None), model.update(&c, Change::None));
                    prop_assert_eq!(real.remove(&c), model.remove(&c));
                }
                Op::Remove(n) => {
                    let key = sample(n).key;
                    if let (Some(a), Some(b)) = (real.lookup(&key, now_ms), model.lookup(&key, now_ms)) {
                        prop_assert_eq!(real.remove(&a), model.remove(&b));
                        last_version.insert(key, a.version);
                    }
                }
                // A call to the model stops at its end; the second begins at the start.
                Op::Expire => {
                    let gone = model.expire(now_ms, 100) + model.expire(now_ms, 100);
                    prop_assert_eq!(real.expire(now_ms, 100), gone);
                }
                Op::Pass(ms) => now_ms += u64::from(ms),
            }
            // Neither has what the other lacks.
            prop_assert_eq!(real.len(), model.len());
            let mut seen = 0;
            for c in all(&map) {
                prop_assert!(same(Some(c), model.iter().find(|m| m.key == c.key).copied()));
                prop_assert!(last_version.get(&c.key).is_none_or(|&v| newer(c.version, v)));
                seen += 1;
            }
            prop_assert_eq!(seen, model.len());
        }
    }
}
