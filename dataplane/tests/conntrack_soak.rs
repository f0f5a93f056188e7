//! Four threads, a million connections, random operations on one [`ConnMap`]: at the end no entry is lost or double, and every one that
//! went was told of exactly once.
//!
//! Each thread has connections of its own, whose state it knows exactly, and all threads contend for some that they share.
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::conntrack::{
    Change, ConnHandle, ConnMap, ConnTable, Connection, Cursor, Decision, Dirt, InsertError, Key, Observer, Removal,
    Stored, newer, sample,
};

const THREADS: u32 = 4;
/// Keys that all threads fight for.
const SHARED: u32 = 64;
/// Samples expire before.
const LATE_MS: u64 = 4_000_000;

struct Size {
    per_thread: u32,
    run: Duration,
}

/// A million connections and ten seconds, or what the environment says: `FERRY_SOAK_CONNECTIONS`, `FERRY_SOAK_MS`.
fn size() -> Size {
    let read = |name: &str, default: u64| {
        std::env::var(name).ok().map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    Size {
        per_thread: (read("FERRY_SOAK_CONNECTIONS", 1_000_000) / u64::from(THREADS)) as u32,
        run: Duration::from_millis(read("FERRY_SOAK_MS", 8_000)),
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next()) * u64::from(n)) >> 31) as u32
    }
}

/// A limit as a firewall keeps it: raised by who stores, lowered by what is told of as gone.
#[derive(Default)]
struct Limit {
    held: AtomicI64,
    low: AtomicI64,
    told: AtomicU64,
}

impl Observer for Limit {
    fn removed(&self, connection: &Connection, _: Removal) {
        assert_whole(connection);
        let left = self.held.fetch_sub(1, Ordering::SeqCst) - 1;
        self.low.fetch_min(left, Ordering::SeqCst);
        self.told.fetch_add(1, Ordering::SeqCst);
    }
}

/// Every writer puts one number at both ends of the entry.
fn mark(connection: &mut Connection, mark: u16) {
    connection.policy_generation = u32::from(mark);
    connection.decision = Decision::from_bits(mark);
}

fn assert_whole(c: &Connection) {
    assert_eq!(c.policy_generation, u32::from(c.decision.bits()), "torn: {c:?}");
}

/// The limit is raised before the entry can go.
fn insert(handle: &mut ConnHandle<'_>, limit: &Limit, c: &Connection, now_ms: u64) -> Result<(), InsertError> {
    limit.held.fetch_add(1, Ordering::SeqCst);
    let stored = handle.insert(c, now_ms);
    if stored.is_err() {
        limit.held.fetch_sub(1, Ordering::SeqCst);
    }
    stored
}

struct Worker<'a> {
    map: &'a ConnMap,
    limit: &'a Limit,
    thread: u32,
    per_thread: u32,
    /// What this thread's own connections are: `None` not there, else the mark stored last.
    mine: Vec<Option<u16>>,
    random: Random,
    shared_inserted: u64,
    inserted: u64,
}

impl Worker<'_> {
    fn own(&self, n: u32) -> Connection {
        sample(SHARED + n * THREADS + self.thread)
    }

    fn fill(&mut self) {
        let mut handle = self.map.handle(self.limit, self.thread as usize);
        for n in 0..self.per_thread {
            let mut c = self.own(n);
            c.refresh(0, 3_600_000);
            assert_eq!(insert(&mut handle, self.limit, &c, 0), Ok(()), "own {n}");
            self.inserted += 1;
            self.mine[n as usize] = Some(0);
        }
    }

    fn step_own(&mut self) {
        let n = self.random.below(self.per_thread);
        let mut handle = self.map.handle(self.limit, self.thread as usize);
        let key = self.own(n).key;
        let expected = self.mine[n as usize];
        let found = handle.lookup(&key, 0);
        assert_eq!(found.map(|c| c.decision.bits()), expected, "own {n} of thread {}", self.thread);
        let next = self.random.next() as u16;
        match found {
            Some(mut c) => {
                assert_whole(&c);
                assert_eq!(c.key, key);
                if self.random.below(4) == 0 {
                    assert_eq!(handle.remove(&c), Stored::Done);
                    assert_eq!(handle.remove(&c), Stored::Stale);
                    self.mine[n as usize] = None;
                } else {
                    mark(&mut c, next);
                    let change = if next & 1 == 0 { Change::Semantic } else { Change::Bookkeeping };
                    assert_eq!(handle.update(&c, change), Stored::Done);
                    assert_eq!(handle.update(&c, change), Stored::Stale);
                    self.mine[n as usize] = Some(next);
                }
            }
            None => {
                let mut c = self.own(n);
                mark(&mut c, next);
                assert_eq!(insert(&mut handle, self.limit, &c, 0), Ok(()));
                self.inserted += 1;
                self.mine[n as usize] = Some(next);
            }
        }
    }

    fn step_shared(&mut self) {
        let n = self.random.below(SHARED);
        let mut handle = self.map.handle(self.limit, self.thread as usize);
        let key = sample(n).key;
        // Half of the shared keys are only ever stored expired, as seen at LATE_MS.
        match self.random.below(3) {
            0 => {
                let mut c = sample(n);
                mark(&mut c, self.random.next() as u16);
                match insert(&mut handle, self.limit, &c, 0) {
                    Ok(()) => self.shared_inserted += 1,
                    Err(InsertError::Exists) => {}
                    Err(InsertError::Full) => panic!("full"),
                }
            }
            1 => {
                if let Some(mut c) = handle.lookup(&key, 0) {
                    assert_whole(&c);
                    assert_eq!(c.key, key);
                    mark(&mut c, self.random.next() as u16);
                    handle.update(&c, Change::Semantic);
                }
            }
            _ => {
                let now_ms = if self.random.below(2) == 0 { 0 } else { LATE_MS };
                if let Some(c) = handle.lookup(&key, now_ms) {
                    assert_whole(&c);
                    handle.remove(&c);
                }
            }
        }
    }
}

/// What a collector has learned of the table.
#[derive(Default)]
struct Follower {
    changes: u64,
    versions: std::collections::HashMap<Key, u32>,
}

impl Follower {
    fn collect(&mut self, map: &ConnMap, cursor: &mut Cursor) {
        while map.collect_dirty(cursor, 4096, &mut |dirt| match dirt {
            Dirt::Changed(c) => {
                assert_whole(&c);
                self.changes += 1;
                if let Some(&before) = self.versions.get(&c.key) {
                    assert!(!newer(before, c.version), "went back from {before} to {}", c.version);
                }
                self.versions.insert(c.key, c.version);
            }
            Dirt::Deleted(_) | Dirt::Overflow => {}
        }) {}
    }
}

#[test]
fn nothing_is_lost_or_doubled() {
    let size = size();
    let map = ConnMap::new(size.per_thread * THREADS + SHARED, [11, 12]).unwrap();
    let limit = Limit::default();
    let (start, stop) = (Barrier::new(THREADS as usize + 1), AtomicBool::new(false));
    let (workers, follower) = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mut worker = Worker {
                    map: &map,
                    limit: &limit,
                    thread,
                    per_thread: size.per_thread,
                    mine: vec![None; size.per_thread as usize],
                    random: Random(u64::from(thread) + 1),
                    shared_inserted: 0,
                    inserted: 0,
                };
                let (start, stop) = (&start, &stop);
                scope.spawn(move || {
                    worker.fill();
                    start.wait();
                    let mut steps = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        if steps.is_multiple_of(4) {
                            worker.step_shared()
                        } else {
                            worker.step_own()
                        }
                        steps += 1;
                    }
                    (worker, steps)
                })
            })
            .collect();
        start.wait();
        // A million are in; the control side does its work meanwhile.
        let until = Instant::now() + size.run;
        let (mut cursor, mut walk, mut round) = (Cursor::default(), Cursor::default(), 0u32);
        let mut follower = Follower::default();
        while Instant::now() < until {
            map.set_tracking(round.is_multiple_of(2));
            for _ in 0..50 {
                map.populate_ahead();
                map.sweep(0, 1000, &limit);
                map.walk(&mut walk, 1000, &mut |c| assert_whole(c));
                std::thread::sleep(Duration::from_millis(5));
            }
            follower.collect(&map, &mut cursor);
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let workers: Vec<_> = workers.into_iter().map(|w| w.join().unwrap()).collect();
        (workers, follower)
    });
    assert!(follower.changes > 0);

    // Nothing lost: what each thread knows of its own is there; nothing else is, but for the shared ones.
    let mut expected = 0u64;
    for (worker, steps) in &workers {
        assert!(*steps > 0);
        for n in 0..worker.per_thread {
            let found = map.get(&worker.own(n).key).map(|c| c.decision.bits());
            assert_eq!(found, worker.mine[n as usize], "own {n} of thread {}", worker.thread);
            expected += u64::from(found.is_some());
        }
    }
    let shared = (0..SHARED).filter(|&n| map.get(&sample(n).key).is_some()).count() as u64;
    expected += shared;
    // Nothing double: a pass over all slots sees as many.
    let (mut cursor, mut seen, mut keys) = (Cursor::default(), 0u64, std::collections::HashSet::new());
    while map.walk(&mut cursor, 1 << 16, &mut |c| {
        assert_whole(c);
        seen += 1;
        assert!(keys.insert(c.key), "{:?} twice", c.key);
    }) {}
    assert_eq!(seen, expected);

    let stats = map.stats();
    let inserted: u64 = workers.iter().map(|(w, _)| w.inserted + w.shared_inserted).sum();
    assert_eq!(stats.len, expected);
    assert_eq!(stats.inserted, inserted);
    assert_eq!(limit.told.load(Ordering::SeqCst), inserted - expected);
    assert_eq!(limit.held.load(Ordering::SeqCst), expected as i64, "the limit is exact");
    assert!(limit.low.load(Ordering::SeqCst) >= 0);
    assert_eq!((stats.full, stats.evicted, stats.bucket_full), (0, 0, 0));

    // All go once more, by expiry.
    while !map.is_empty() {
        assert!(map.sweep(LATE_MS, 1 << 16, &limit) <= 1 << 16);
    }
    assert_eq!(limit.held.load(Ordering::SeqCst), 0);
    let steps: u64 = workers.iter().map(|(_, steps)| steps).sum();
    println!("{steps} steps, {} collected, {stats:?}", follower.changes);
}
