//! The connection table: what insertions, lookups and updates cost, how much memory a connection takes, and what dirty tracking adds;
//! beside it the obvious alternatives, in the same run. One thread; figures per operation.
//!
//! The bytes per connection are printed first.
use std::collections::hash_map::RandomState;
use std::sync::Mutex;

use dashmap::DashMap;
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use ferry_dataplane::conntrack::{
    Change, ConnHandle, ConnMap, ConnTable, Connection, Cursor, DEFAULT_CAPACITY, Key, sample,
};
use hashbrown::HashMap;

const CONNECTIONS: [u32; 3] = [1, 10_000, 1_000_000];
const BURST: usize = 64;
/// A sample's lifetime.
const NOW_MS: u64 = 1000;

fn main() {
    let map = filled(DEFAULT_CAPACITY);
    println!(
        "memory at {DEFAULT_CAPACITY} connections: {:.1} bytes each; with tracking on {:.1}",
        map.memory_bytes() as f64 / f64::from(DEFAULT_CAPACITY),
        {
            map.set_tracking(true);
            map.memory_bytes() as f64 / f64::from(DEFAULT_CAPACITY)
        }
    );
    drop(map);
    divan::main();
}

fn empty(capacity: u32) -> ConnMap {
    ConnMap::new(capacity, [0x1357_9bdf_0246_8ace, 0x0f1e_2d3c_4b5a_6978]).expect("memory for the table")
}

fn filled(connections: u32) -> ConnMap {
    let map = empty(connections);
    let mut handle = map.handle(&(), 0);
    for n in 0..connections {
        handle.insert(&sample(n), 0).expect("room");
        if n % 65_536 == 0 {
            map.populate_ahead();
        }
    }
    map
}

/// Keys in an order that no prefetcher guesses.
struct Keys {
    keys: Vec<Key>,
    at: usize,
}

impl Keys {
    fn new(connections: u32) -> Self {
        let mut keys: Vec<Key> = (0..connections).map(|n| sample(n).key).collect();
        let mut random = 1u64;
        for n in (1..keys.len()).rev() {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            keys.swap(n, ((random >> 33) as usize) % (n + 1));
        }
        Self { keys, at: 0 }
    }

    fn next(&mut self) -> Key {
        self.at = if self.at + 1 < self.keys.len() { self.at + 1 } else { 0 };
        self.keys[self.at]
    }

    fn burst(&mut self) -> [Key; BURST] {
        core::array::from_fn(|_| self.next())
    }
}

/// One key after the other, as without batches.
#[divan::bench(args = CONNECTIONS, sample_count = 40, sample_size = 500)]
fn lookup(bencher: Bencher<'_, '_>, connections: u32) {
    let (map, mut keys) = (filled(connections), Keys::new(connections));
    let mut handle = map.handle(&(), 0);
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
        for key in &keys.burst() {
            black_box(handle.lookup(key, NOW_MS).expect("stored"));
        }
    });
}

/// A burst at a time: hashes and buckets, then entries, then lookups.
fn burst(handle: &mut ConnHandle<'_>, keys: &[Key; BURST], mut each: impl FnMut(&mut ConnHandle<'_>, Connection)) {
    let map = handle.map();
    let hashes = keys.map(|key| {
        let hash = map.hash(&key);
        map.prefetch_bucket(hash);
        hash
    });
    for hash in hashes {
        map.prefetch_entries(hash);
    }
    for (key, hash) in keys.iter().zip(hashes) {
        let connection = handle.lookup_hashed(key, hash, NOW_MS).expect("stored");
        each(handle, connection);
    }
}

#[divan::bench(args = CONNECTIONS, sample_count = 40, sample_size = 500)]
fn lookup_burst(bencher: Bencher<'_, '_>, connections: u32) {
    let (map, mut keys) = (filled(connections), Keys::new(connections));
    let mut handle = map.handle(&(), 0);
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
        burst(&mut handle, &keys.burst(), |_, connection| {
            black_box(connection);
        });
    });
}

#[derive(Clone, Copy, Debug)]
enum Tracking {
    Off,
    /// Changes that are not to be noted: time, windows, counters.
    OnBookkeeping,
    /// Changes that are noted, collected every 64 bursts.
    OnSemantic,
}

/// What every packet of an established connection does: look up, change, store. In bursts.
#[divan::bench(args = [
    (Tracking::Off, 1), (Tracking::OnBookkeeping, 1), (Tracking::OnSemantic, 1),
    (Tracking::Off, 10_000), (Tracking::OnBookkeeping, 10_000), (Tracking::OnSemantic, 10_000),
    (Tracking::Off, 1_000_000), (Tracking::OnBookkeeping, 1_000_000), (Tracking::OnSemantic, 1_000_000),
], sample_count = 40, sample_size = 500)]
fn lookup_and_update_burst(bencher: Bencher<'_, '_>, (tracking, connections): (Tracking, u32)) {
    let (map, mut keys) = (filled(connections), Keys::new(connections));
    map.set_tracking(!matches!(tracking, Tracking::Off));
    let change = if matches!(tracking, Tracking::OnSemantic) { Change::Semantic } else { Change::Bookkeeping };
    let mut handle = map.handle(&(), 0);
    let (mut cursor, mut bursts) = (Cursor::default(), 0u32);
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
        burst(&mut handle, &keys.burst(), |handle, mut connection| {
            connection.refresh(NOW_MS, 3_600_000);
            black_box(handle.update(&connection, change));
        });
        bursts += 1;
        if matches!(tracking, Tracking::OnSemantic) && bursts.is_multiple_of(64) {
            map.collect_dirty(&mut cursor, 4096, &mut |dirt| {
                black_box(dirt);
            });
        }
    });
}

/// Removes the oldest and stores a new one, in a table that is always this full.
#[divan::bench(args = [(Tracking::Off, 1), (Tracking::Off, 10_000), (Tracking::Off, 1_000_000), (Tracking::OnSemantic, 1_000_000)], sample_count = 40, sample_size = 500)]
fn remove_and_insert(bencher: Bencher<'_, '_>, (tracking, connections): (Tracking, u32)) {
    let map = filled(connections);
    map.set_tracking(matches!(tracking, Tracking::OnSemantic));
    let mut handle = map.handle(&(), 0);
    let (mut oldest, mut cursor) = (0, Cursor::default());
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
        for _ in 0..BURST {
            let old = handle.lookup(&sample(oldest).key, NOW_MS).expect("stored");
            black_box(handle.remove(&old));
            handle.insert(&sample(oldest + connections), NOW_MS).expect("room");
            oldest = oldest.wrapping_add(1);
        }
        if matches!(tracking, Tracking::OnSemantic) {
            map.collect_dirty(&mut cursor, 256, &mut |dirt| {
                black_box(dirt);
            });
        }
    });
}

/// A table filled from empty; its memory was populated ahead, as a control thread does.
#[divan::bench(args = [10_000, 1_000_000], sample_count = 5, sample_size = 1)]
fn insert(bencher: Bencher<'_, '_>, connections: u32) {
    let samples: Vec<Connection> =
        Keys::new(connections).keys.iter().enumerate().map(|(n, _)| sample(n as u32)).collect();
    bencher
        .counter(ItemsCount::new(connections))
        .with_inputs(|| {
            // Filled once and emptied again: every page is in place.
            let map = filled(connections);
            while map.sweep(4_000_000, 1 << 16, &()) > 0 {}
            map
        })
        .bench_local_refs(|map| {
            let mut handle = map.handle(&(), 0);
            for connection in &samples {
                handle.insert(connection, 0).expect("room");
            }
        });
}

/// Expiry in steps of 256 slots, none of which has expired.
#[divan::bench(args = [10_000, 1_000_000], sample_count = 40, sample_size = 500)]
fn sweep_slot(bencher: Bencher<'_, '_>, connections: u32) {
    let map = filled(connections);
    bencher.counter(ItemsCount::new(256u32)).bench_local(|| black_box(map.sweep(NOW_MS, 256, &())));
}

/// The alternatives: the same lookup and update, one key after the other.
mod peers {
    use super::*;

    #[divan::bench(args = CONNECTIONS, sample_count = 40, sample_size = 500)]
    fn mutex_hashbrown_lookup_and_update(bencher: Bencher<'_, '_>, connections: u32) {
        let map: HashMap<Key, Connection, RandomState> = (0..connections).map(|n| (sample(n).key, sample(n))).collect();
        let (map, mut keys) = (Mutex::new(map), Keys::new(connections));
        bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
            for key in &keys.burst() {
                let mut map = map.lock().expect("not poisoned");
                let connection = map.get_mut(key).expect("stored");
                connection.refresh(NOW_MS, 3_600_000);
                black_box(*connection);
            }
        });
    }

    #[divan::bench(args = CONNECTIONS, sample_count = 40, sample_size = 500)]
    fn dashmap_lookup_and_update(bencher: Bencher<'_, '_>, connections: u32) {
        let map: DashMap<Key, Connection> = (0..connections).map(|n| (sample(n).key, sample(n))).collect();
        let mut keys = Keys::new(connections);
        bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
            for key in &keys.burst() {
                let mut connection = map.get_mut(key).expect("stored");
                connection.refresh(NOW_MS, 3_600_000);
                black_box(*connection);
            }
        });
    }
}
