//! The protocol under every interleaving and every order that the memory model allows, up to a number of preemptions.
use std::collections::HashSet;

use loom::sync::Arc;
use loom::thread;

use super::super::entry::{Decision, Tally, Traffic};
use super::super::key::Way;
use super::super::table::ConnTable;
use super::sync::EVERY_ACCESS;
use super::*;

const SEED: [u64; 2] = [3, 5];
/// Samples expire before.
const LATE_MS: u64 = 4_000_000;

/// Counts what goes. Not the model checker's atomics: a count is no part of the protocol.
#[derive(Default)]
struct Count(std::sync::atomic::AtomicUsize);

impl Count {
    fn get(&self) -> usize {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

impl Observer for Count {
    fn removed(&self, connection: &Connection, _: Removal) {
        assert_whole(connection);
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

/// What the threads of a model share.
struct Shared {
    map: ConnMap,
    count: Count,
    /// The entry that is there from the start, if there is one.
    copy: Option<Connection>,
}

impl Shared {
    /// A map with or without an entry of the first sample.
    fn new(capacity: u32, occupied: bool) -> Self {
        let map = ConnMap::new(capacity, SEED).unwrap();
        let copy = occupied.then(|| {
            map.handle(&(), 0).insert(&marked(1, 1), 0).unwrap();
            map.get(&sample(1).key).unwrap()
        });
        Self { map, count: Count::default(), copy }
    }

    fn copy(&self) -> Connection {
        self.copy.unwrap()
    }

    fn handle(&self, thread: usize) -> ConnHandle<'_> {
        self.map.handle(&self.count, thread)
    }

    fn inserts(&self, c: &Connection, now_ms: u64, thread: usize) -> u32 {
        match self.handle(thread).insert(c, now_ms) {
            Ok(()) => 1,
            Err(InsertError::Exists) => 0,
            Err(InsertError::Full) => panic!("full"),
        }
    }
}

type Role = fn(&Shared) -> u32;

/// Checks all executions in which threads do `roles` at the same time, and then `after` with what they returned.
///
/// Twice: with weak memory, and with every interleaving (see [`EVERY_ACCESS`]), each with up to so many preemptions. What the checker tries
/// in the first depends on who goes first, so every role has its turn on the main thread, which does.
fn race<const N: usize>(
    preemptions: [usize; 2],
    setup: fn() -> Shared,
    roles: [Role; N],
    after: fn(&Shared, [u32; N]),
) {
    for (first, every_access) in (0..N).map(|n| (n, false)).chain([(0, true)]) {
        EVERY_ACCESS.set(every_access);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions[usize::from(every_access)]);
        let executions = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = std::sync::Arc::clone(&executions);
        builder.check(move || {
            counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let shared = Arc::new(setup());
            let threads: Vec<_> = (0..N)
                .filter(|&n| n != first)
                .map(|n| {
                    let (shared, role) = (Arc::clone(&shared), roles[n]);
                    (n, thread::spawn(move || role(&shared)))
                })
                .collect();
            let mut results = [0; N];
            results[first] = roles[first](&shared);
            for (n, thread) in threads {
                results[n] = thread.join().unwrap();
            }
            after(&shared, results);
        });
        println!("{} executions", executions.load(std::sync::atomic::Ordering::Relaxed));
    }
}

/// Length of the packets that are counted.
const IP_LEN: u32 = 100;

/// A sample whose two words of payload tell of each other and of the key.
fn marked(n: u32, mark: u16) -> Connection {
    let mut c = sample(n);
    c.policy_generation = n << 8 | u32::from(mark);
    c.decision = Decision::from_bits((n as u16) << 8 | mark);
    let packets = Tally::from_raw(c.policy_generation).unwrap();
    c.set_traffic([Traffic { packets, bytes: Tally::default() }, Traffic::default()]);
    c
}

fn versioned(mut c: Connection, version: u32) -> Connection {
    c.version = version;
    c
}

fn assert_whole(c: &Connection) {
    assert_eq!(c.policy_generation, u32::from(c.decision.bits()), "torn");
    assert_eq!(c.decision.bits() >> 8, c.key.remote_port, "another connection's");
    // Packets begin at the mark.
    let Traffic { packets, bytes } = c.traffic(Way::Original);
    let counted = packets.get() - u64::from(c.policy_generation);
    assert_eq!(bytes.get(), counted * u64::from(IP_LEN), "torn");
}

/// When all threads have come to rest: every entry in the index once, no key twice, every slot an entry or free, and the count right.
fn assert_sound(map: &ConnMap) -> Vec<Connection> {
    let mut entries = Vec::new();
    for number in 0..map.slab.used() {
        if let Some((_, connection)) = map.slab.slot(number).unwrap().read_any().expect("at rest") {
            assert_whole(&connection);
            let places = map.index.places(map.hash(&connection.key));
            let mut entered = 0;
            let _: Option<()> = map.index.find(&places, |n, _| {
                entered += u32::from(n == number);
                None
            });
            assert_eq!(entered, 1, "in the index {entered} times");
            entries.push(connection);
        }
    }
    let keys: HashSet<_> = entries.iter().map(|c| c.key).collect();
    assert_eq!(keys.len(), entries.len(), "a key twice");
    assert_eq!(map.len(), entries.len());
    let mut free = HashSet::new();
    while free.len() + entries.len() < map.slab.used() as usize {
        assert!(free.insert(map.slab.take(0).expect("a slot was lost")), "a slot was given twice");
    }
    for &slot in &free {
        map.slab.give(0, slot);
    }
    entries
}

/// Stored or stale as a number.
fn done(stored: Stored) -> u32 {
    u32::from(stored == Stored::Done)
}

#[test]
fn loom_two_insertions_of_one_key_are_one() {
    race(
        [4, 2],
        || Shared::new(3, false),
        [|s| s.inserts(&marked(1, 1), 0, 0), |s| s.inserts(&marked(1, 2), 0, 1)],
        |s, won| {
            assert_eq!(won.iter().sum::<u32>(), 1, "{won:?}");
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len(), 1);
            assert_eq!(entries[0].decision.bits() & 0xff, if won[0] == 1 { 1 } else { 2 });
        },
    );
}

/// Stores the first sample where nothing is found. Returns 1 if it did.
fn fills(s: &Shared, mark: u16, thread: usize) -> u32 {
    let words = slot::to_words(&marked(1, mark));
    let &[a, b, c, d, e, ..] = &words;
    let key = [a, b, c, d, e];
    let whereabouts = s.map.prefetch_places(s.map.ends(&key), e, false);
    let Some(vacancy) = s.map.vacancy(whereabouts, &key) else { return 0 };
    match s.map.fill(&vacancy, &words, 0, &s.count, thread) {
        Ok(()) => 1,
        Err(InsertError::Exists) => 0,
        Err(InsertError::Full) => panic!("full"),
    }
}

/// Who finds a key nowhere and stores it is no more alone than who looks in the course of it.
#[test]
fn loom_a_vacancy_is_filled_once() {
    fn one_is_left(s: &Shared, won: [u32; 2]) {
        // Where one sees the other on its way, and the other it, the lower place decides: one of them gets in.
        assert_eq!(won.iter().sum::<u32>(), 1, "{won:?}");
        assert_eq!(assert_sound(&s.map).len(), 1);
    }
    race([3, 1], || Shared::new(3, false), [|s| fills(s, 1, 0), |s| s.inserts(&marked(1, 2), 0, 1)], one_is_left);
}

/// The same against a removal: an entry or none, and versions rise.
#[test]
fn loom_a_vacancy_behind_a_removal() {
    race(
        [2, 1],
        || Shared::new(3, true),
        [|s| done(s.handle(0).remove(&s.copy())), |s| fills(s, 2, 1)],
        |s, [removed, filled]| {
            assert_eq!(removed, 1);
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len() as u32, filled);
            assert!(entries.iter().all(|entry| newer(entry.version, s.copy().version)));
        },
    );
}

#[test]
fn loom_three_insertions_of_one_key_are_one() {
    race(
        [1, 1],
        || Shared::new(3, false),
        [|s| s.inserts(&marked(1, 1), 0, 0), |s| s.inserts(&marked(1, 2), 0, 1), |s| s.inserts(&marked(1, 3), 0, 2)],
        |s, won| {
            assert_eq!(won.iter().sum::<u32>(), 1, "{won:?}");
            assert_eq!(assert_sound(&s.map).len(), 1);
        },
    );
}

/// The two meet an expired entry of their key: it goes once, and one of the two follows.
#[test]
fn loom_insertions_over_an_expired_entry() {
    fn fresh(mark: u16) -> Connection {
        let mut c = marked(1, mark);
        c.refresh(LATE_MS, 1000);
        c
    }
    race(
        [1, 1],
        || Shared::new(3, true),
        [|s| s.inserts(&fresh(2), LATE_MS, 0), |s| s.inserts(&fresh(3), LATE_MS, 1)],
        |s, won| {
            assert_eq!(won.iter().sum::<u32>(), 1, "{won:?}");
            assert_eq!(s.count.get(), 1);
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len(), 1);
            assert!(newer(entries[0].version, s.copy().version));
        },
    );
}

/// As two insertions, but at places in different buckets: only the fence between entering and looking makes one see the other.
#[test]
fn loom_two_insertions_that_see_different_room() {
    /// Another key with the first sample's first bucket.
    fn neighbour(map: &ConnMap) -> u32 {
        let first = |n| map.index.places(map.hash(&sample(n).key)).buckets[0];
        (2..100).find(|&n| first(n) == first(1)).expect("half of them")
    }
    race(
        [3, 1],
        || {
            let mut shared = Shared::new(3, false);
            let n = neighbour(&shared.map);
            shared.map.handle(&(), 0).insert(&marked(n, 1), 0).unwrap();
            shared.copy = shared.map.get(&sample(n).key);
            shared
        },
        [
            |s| {
                assert_eq!(s.handle(0).remove(&s.copy()), Stored::Done);
                s.inserts(&marked(1, 1), 0, 0)
            },
            |s| s.inserts(&marked(1, 2), 0, 1),
        ],
        |s, won| {
            assert_eq!(won.iter().sum::<u32>(), 1, "{won:?}");
            assert_eq!(assert_sound(&s.map).len(), 1);
        },
    );
}

/// Insertion of a key while its entry is removed: what comes out is one entry or none, never two, and versions rise.
#[test]
fn loom_insertion_against_removal_and_lookup() {
    race(
        [2, 1],
        || Shared::new(3, true),
        [
            |s| done(s.handle(0).remove(&s.copy())),
            |s| s.inserts(&marked(1, 2), 0, 1),
            |s| {
                if let Some(c) = s.handle(2).lookup(&sample(1).key, 0) {
                    assert_whole(&c);
                }
                0
            },
        ],
        |s, [removed, inserted, _]| {
            assert_eq!((removed, s.count.get()), (1, 1));
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len(), inserted as usize);
            assert!(entries.iter().all(|c| newer(c.version, s.copy().version)));
        },
    );
}

#[test]
fn loom_of_two_updates_of_one_copy_one_is_stored() {
    race(
        [4, 2],
        || Shared::new(2, true),
        [
            |s| done(s.handle(0).update(&versioned(marked(1, 2), s.copy().version), Change::Semantic)),
            |s| done(s.handle(1).update(&versioned(marked(1, 3), s.copy().version), Change::Semantic)),
        ],
        |s, stored| {
            assert_eq!(stored.iter().sum::<u32>(), 1);
            let entries = assert_sound(&s.map);
            assert_eq!(entries[0].decision.bits() & 0xff, if stored[0] == 1 { 2 } else { 3 });
            assert_eq!(entries[0].version, next(s.copy().version));
        },
    );
}

/// Changes the entry twice.
fn update_twice(s: &Shared) -> u32 {
    update_twice_by(s, Change::Semantic)
}

fn update_twice_by(s: &Shared, change: Change) -> u32 {
    let mut handle = s.handle(0);
    let version = s.copy().version;
    for n in 0..2 {
        let c = versioned(marked(1, 2 + n), version + u32::from(n));
        assert_eq!(handle.update(&c, change), Stored::Done);
    }
    version + 2
}

#[test]
fn loom_a_copy_is_of_one_piece() {
    race(
        [2, 2],
        || Shared::new(2, true),
        [update_twice, |s| {
            if let Some(c) = s.handle(1).lookup(&sample(1).key, 0) {
                assert_whole(&c);
            }
            0
        }],
        |s, _| assert_eq!(assert_sound(&s.map).len(), 1),
    );
}

#[test]
fn loom_an_expired_entry_goes_once() {
    race(
        [1, 1],
        || Shared::new(2, true),
        [
            |s| s.map.sweep(LATE_MS, 2, &s.count) as u32,
            |s| done(s.handle(1).remove(&s.copy())),
            |s| u32::from(s.handle(0).lookup(&s.copy().key, LATE_MS).is_some()),
        ],
        |s, [swept, removed, found]| {
            assert_eq!(found, 0);
            assert!(swept + removed <= 1);
            assert_eq!(s.count.get(), 1);
            assert!(assert_sound(&s.map).is_empty());
        },
    );
}

/// An update and a removal of one copy: one of them is stored.
#[test]
fn loom_update_against_removal() {
    race(
        [4, 2],
        || Shared::new(2, true),
        [|s| done(s.handle(0).remove(&s.copy())), |s| done(s.handle(1).update(&s.copy(), Change::Semantic))],
        |s, [removed, updated]| {
            assert_eq!(removed + updated, 1);
            assert_eq!(s.count.get(), removed as usize);
            assert_eq!(assert_sound(&s.map).len(), updated as usize);
        },
    );
}

/// Removes the first connection and stores the second.
fn exchange(s: &Shared) -> u32 {
    let mut handle = s.handle(0);
    let removed = handle.remove(&s.copy());
    if removed == Stored::Done {
        handle.insert(&marked(2, 2), 0).unwrap();
    }
    done(removed)
}

/// One slot, one connection after the other in it, a reader that looks for the first.
#[test]
fn loom_a_slow_reader_of_a_slot_used_again() {
    race(
        [2, 2],
        || Shared::new(1, true),
        [exchange, |s| {
            if let Some(c) = s.map.get(&s.copy().key) {
                assert_whole(&c);
                assert_eq!(c.key, s.copy().key);
            }
            0
        }],
        |s, [removed, _]| {
            assert_eq!((removed, s.map.slab.used()), (1, 1));
            assert_eq!(assert_sound(&s.map).len(), 1);
        },
    );
}

/// An update with a copy of the slot's former connection changes nothing.
#[test]
fn loom_a_late_update_of_a_slot_used_again() {
    race(
        [3, 2],
        || Shared::new(1, true),
        [exchange, |s| done(s.handle(1).update(&s.copy(), Change::Semantic))],
        |s, [exchanged, updated]| {
            assert_eq!(exchanged + updated, 1);
            let entries = assert_sound(&s.map);
            assert_eq!(entries[0].key, sample(if updated == 1 { 1 } else { 2 }).key);
        },
    );
}

fn tracked(capacity: u32) -> Shared {
    let shared = Shared::new(capacity, true);
    shared.map.set_tracking(true);
    shared
}

/// The version that is handed over last; 0 for none.
fn collect_versions(s: &Shared) -> u32 {
    let (mut cursor, mut last) = (Cursor::default(), 0);
    while s.map.collect_dirty(&mut cursor, 10, &mut |dirt| {
        let Dirt::Changed(c) = dirt else { panic!("{dirt:?}") };
        assert_whole(&c);
        last = c.version;
    }) {}
    last
}

/// Whatever the collector sees and when: the last state of the entry is among it.
#[test]
fn loom_no_change_is_lost_to_the_collector() {
    race(
        [3, 3],
        || tracked(1),
        [update_twice, collect_versions],
        |s, [newest, seen]| {
            let later = collect_versions(s);
            assert_eq!(if later == 0 { seen } else { later }, newest);
        },
    );
}

/// As `collect_versions`, of what may lag behind.
fn collect_lagging(s: &Shared) -> u32 {
    let (mut cursor, mut last) = (Cursor::default(), 0);
    while s.map.collect_lagging(&mut cursor, 10, &mut |c| {
        assert_whole(c);
        last = c.version;
    }) {}
    last
}

/// The same for what may lag behind.
#[test]
fn loom_no_lagging_change_is_lost_to_the_collector() {
    race(
        [3, 3],
        || tracked(1),
        [|s| update_twice_by(s, Change::Bookkeeping), collect_lagging],
        |s, [newest, seen]| {
            assert_eq!(collect_versions(s), 0, "nothing semantic");
            let later = collect_lagging(s);
            assert_eq!(if later == 0 { seen } else { later }, newest);
        },
    );
}

/// As `collect_versions`, by a walk.
fn walk_versions(s: &Shared) -> u32 {
    let (mut cursor, mut last) = (Cursor::default(), 0);
    while s.map.walk_collecting(&mut cursor, 10, &mut |c| {
        assert_whole(c);
        last = c.version;
    }) {}
    last
}

/// A walk that counts as collecting takes marks only of what it hands over.
#[test]
fn loom_no_change_is_lost_to_the_walk() {
    race(
        [3, 3],
        || tracked(1),
        [update_twice, walk_versions],
        |s, [newest, seen]| {
            let later = collect_versions(s);
            assert_eq!(if later == 0 { seen } else { later }, newest);
        },
    );
}

/// Applies what is collected to a copy, as another host would; returns the mark of what it then has, 0 for nothing.
fn follow(s: &Shared, mut follower: Option<Connection>) -> Option<Connection> {
    let mut cursor = Cursor::default();
    while s.map.collect_dirty(&mut cursor, 10, &mut |dirt| match dirt {
        Dirt::Changed(c) if follower.is_none_or(|f| newer(c.version, f.version)) => follower = Some(c),
        Dirt::Changed(_) => {}
        Dirt::Deleted(t) if follower.is_some_and(|f| newer(f.version, t.version)) => {}
        Dirt::Deleted(_) => follower = None,
        Dirt::Overflow => panic!("overflow"),
    }) {}
    follower
}

/// A follower that applies what is collected, in order, ends with what the table has.
#[test]
fn loom_a_follower_ends_up_with_the_same() {
    race(
        [3, 3],
        || tracked(2),
        [
            |s| {
                let mut handle = s.handle(0);
                assert_eq!(handle.remove(&s.copy()), Stored::Done);
                handle.insert(&marked(1, 2), 0).unwrap();
                0
            },
            // The version it then has.
            |s| follow(s, s.copy).map_or(0, |c| c.version),
        ],
        |s, [_, first]| {
            let had = match first {
                0 => None,
                version if version == s.copy().version => s.copy,
                version => Some(versioned(marked(1, 2), version)),
            };
            assert_eq!(follow(s, had), s.map.get(&sample(1).key));
            assert_eq!(assert_sound(&s.map).len(), 1);
        },
    );
}

#[test]
fn loom_import_against_insertion() {
    race(
        [2, 1],
        || Shared::new(3, false),
        [
            |s| s.inserts(&marked(1, 1), 0, 0),
            |s| match s.map.import(&versioned(marked(1, 2), 9), 0, &s.count) {
                Imported::Added => 0,
                Imported::Replaced => 1,
                Imported::Full => 2,
                Imported::Older => panic!("9 is newer"),
            },
        ],
        |s, [inserted, imported]| {
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len(), 1);
            // Full: it looked while the packet's insertion was not decided, too often.
            assert_eq!(inserted, u32::from(imported != 0));
            assert_eq!(s.count.get(), usize::from(imported == 1));
            if imported != 2 {
                assert_eq!((entries[0].version, entries[0].decision.bits() & 0xff), (9, 2));
            }
        },
    );
}

/// Two connections and room for one: the other is evicted, once.
#[test]
fn loom_eviction() {
    race(
        [3, 2],
        || Shared::new(1, false),
        [
            |s| u32::from(s.handle(0).insert(&marked(1, 1), 0).is_ok()),
            |s| u32::from(s.handle(1).insert(&marked(2, 2), 0).is_ok()),
        ],
        |s, stored| {
            let stored = stored.iter().sum::<u32>() as usize;
            assert!(stored >= 1);
            assert_eq!(stored - s.count.get(), 1);
            assert_eq!(assert_sound(&s.map).len(), 1);
        },
    );
}

/// Takes and gives on one stack; a head that comes back must not deceive the slow one.
#[test]
fn loom_a_free_slot_has_one_owner() {
    fn two_free() -> Shared {
        let shared = Shared::new(2, false);
        let slab = &shared.map.slab;
        let slots = [slab.take(0).unwrap(), slab.take(0).unwrap()];
        slots.iter().for_each(|&slot| slab.give(0, slot));
        shared
    }
    /// Slots kept, a bit each.
    fn bits(slots: [Option<u32>; 2]) -> u32 {
        slots.into_iter().flatten().fold(0, |bits, slot| {
            assert_eq!(bits & 1 << slot, 0, "taken twice");
            bits | 1 << slot
        })
    }
    race(
        [4, 3],
        two_free,
        [
            // The head is the same afterwards, what follows is not.
            |s| {
                let (a, b) = (s.map.slab.take(0), s.map.slab.take(0));
                bits([a, b]);
                if let Some(a) = a {
                    s.map.slab.give(0, a);
                }
                bits([b, None])
            },
            |s| bits([s.map.slab.take(0), s.map.slab.take(0)]),
        ],
        |s, [mine, theirs]| {
            assert_eq!(mine & theirs, 0, "two owners");
            let rest = core::iter::from_fn(|| s.map.slab.take(0)).fold(0, |rest, slot| {
                assert_eq!((rest | mine | theirs) & 1 << slot, 0, "two owners");
                rest | 1 << slot
            });
            assert_eq!(rest | mine | theirs, 3, "lost");
        },
    );
}

/// Changes of single words, which are noted before they are made: none is lost to the collector.
#[test]
fn loom_no_single_word_is_lost_to_the_collector() {
    race(
        [3, 3],
        || tracked(1),
        [counts_twice, collect_lagging],
        |s, [newest, seen]| {
            assert_eq!(collect_versions(s), 0, "nothing semantic");
            let later = collect_lagging(s);
            assert_eq!(if later == 0 { seen } else { later }, newest);
        },
    );
}

/// Nor to the walk.
#[test]
fn loom_no_single_word_is_lost_to_the_walk() {
    race(
        [3, 3],
        || tracked(1),
        [counts_twice, walk_versions],
        |s, [newest, seen]| {
            let later = collect_lagging(s);
            assert_eq!(if later == 0 { seen } else { later }, newest);
        },
    );
}

/// Returns the version that the entry then has.
fn counts_twice(s: &Shared) -> u32 {
    assert_eq!((counts(s), counts(s)), (1, 1));
    s.copy().version + 2
}

/// Counts one packet by the short way. Returns 1 if it went.
fn counts(s: &Shared) -> u32 {
    use super::super::entry::{expiry, word};
    let key = sample(1).key.words();
    let [.., rest] = key;
    let likely = s.map.likely(s.map.prefetch_places(s.map.ends(&key), rest, false));
    let Some(look) = s.map.look(likely, &key) else { return 0 };
    let traffic = Traffic::from_word(look.word::<{ word::ORIGINAL }>());
    let until = expiry(0, 3_600_000);
    let Some(entry) = s.map.claim(likely, look, until, Change::Bookkeeping) else { return 0 };
    entry.set::<{ word::ORIGINAL }>(traffic.plus(1, IP_LEN, 0).to_word());
    entry.commit();
    1
}

/// Changes of single words and of whole entries: none is lost, none is torn, and readers see entries of one piece.
#[test]
fn loom_single_words_against_updates_and_lookups() {
    fn remarked(s: &Shared) -> u32 {
        let mut handle = s.handle(1);
        let Some(mut c) = handle.lookup(&sample(1).key, 0) else { return 0 };
        let counted = c.traffic(Way::Original).packets.get() as u32 - c.policy_generation;
        let marked = marked(1, 9);
        (c.policy_generation, c.decision) = (marked.policy_generation, marked.decision);
        let packets = Tally::from_raw(marked.policy_generation + counted).unwrap();
        c.set_traffic([Traffic { packets, bytes: Tally::from_raw(counted * IP_LEN).unwrap() }, Traffic::default()]);
        done(handle.update(&c, Change::Semantic))
    }
    race(
        [2, 1],
        || Shared::new(3, true),
        [counts, remarked, |s| {
            if let Some(c) = s.handle(2).lookup(&sample(1).key, 0) {
                assert_whole(&c);
            }
            0
        }],
        |s, [counted, remarked, _]| {
            let entries = assert_sound(&s.map);
            let [c] = entries[..] else { panic!("{} entries", entries.len()) };
            let packets = c.traffic(Way::Original).packets.get() as u32 - c.policy_generation;
            assert_eq!(packets, counted, "lost");
            assert_eq!(c.decision.bits() & 0xff, if remarked == 1 { 9 } else { 1 });
            assert_eq!(c.version, s.copy().version + counted + remarked);
        },
    );
}

/// The same against removal and a new entry of the key in the slot.
#[test]
fn loom_single_words_against_removal_and_insertion() {
    race(
        [2, 1],
        || Shared::new(3, true),
        [counts, |s| done(s.handle(1).remove(&s.copy())), |s| s.inserts(&marked(1, 2), 0, 2)],
        |s, [_, removed, inserted]| {
            let entries = assert_sound(&s.map);
            assert_eq!(entries.len() as u32, 1 - removed + inserted);
        },
    );
}
