//! Forwarding database: which port a MAC address was last seen on, per VLAN (IEEE 802.1Q, 8.8).
//!
//! Lookups and refreshes are lock-free. Structural changes (a new address, a move, ageing, a flush) are made by one
//! thread at a time under a try-lock: a PMD thread that does not get it at once goes on without learning, and the
//! next frame of that station tries again. So nothing on the packet path ever waits.
//!
//! An entry is a `(key, value)` pair of words in a bucket of one cache line. A writer that reuses an entry first
//! clears the key, then stores the value, then the new key; a reader takes a value only if the key was the same
//! before and after.
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use crate::packet::ethernet::MacAddr;

/// Identifies a port within a switch; stable while the port exists.
pub type PortId = u16;
/// Most ports of one switch.
pub const MAX_PORTS: usize = 1024;
/// Entries a bridge's database holds by default.
pub const DEFAULT_CAPACITY: u32 = 8192;
/// Most entries that can be configured.
pub const MAX_CAPACITY: u32 = 1 << 20;
/// Seconds after which a silent station is forgotten, by default (IEEE 802.1Q, table 8-6).
pub const DEFAULT_AGEING_S: u32 = 300;
/// Addresses one guest port may occupy by default.
pub const DEFAULT_PORT_LIMIT: u32 = 256;

const WAYS: usize = 4;
const EMPTY: u64 = 0;

struct Entry {
    /// `vlan << 48 | mac`; [`EMPTY`] when free (the all-zero address is never learned).
    key: AtomicU64,
    /// `port << 32 | last seen, seconds`.
    value: AtomicU64,
}

#[repr(align(64))]
struct Bucket([Entry; WAYS]);

/// What became of an address that was to be learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// Known at this port already.
    Known,
    /// New, stored.
    New,
    /// Was behind another port; moved.
    Moved,
    /// The port holds as many addresses as it may.
    PortLimit,
    /// No room; every candidate entry is live and belongs to ports that hold no more than this one.
    Full,
    /// Another thread is changing the table: try again with the next frame.
    Busy,
}

/// One station, as shown to operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FdbEntry {
    /// Its address.
    pub mac: MacAddr,
    /// Its VLAN; 0 is untagged.
    pub vlan: u16,
    /// Where it was last seen.
    pub port: PortId,
    /// Seconds since then.
    pub age_s: u32,
}

/// A bridge's forwarding database.
pub struct Fdb {
    buckets: Box<[Bucket]>,
    mask: u64,
    capacity: u32,
    ageing_s: AtomicU32,
    writer: AtomicBool,
    used: AtomicU32,
    per_port: Box<[AtomicU32]>,
    sweep_at: AtomicU32,
    /// Raised whenever an address comes, goes or moves, or goes sooner or later than before.
    changes: AtomicU64,
    counts: FdbCounters,
}

/// Learning events since the bridge was made.
#[derive(Default)]
struct FdbCounters {
    learned: AtomicU64,
    moved: AtomicU64,
    aged: AtomicU64,
    evicted: AtomicU64,
    port_limit: AtomicU64,
    full: AtomicU64,
}

/// Learning events since the bridge was made, and the fill level.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct FdbStats {
    /// Entries in use.
    pub entries: u32,
    /// Most entries.
    pub capacity: u32,
    /// Ageing time, seconds.
    pub ageing_s: u32,
    /// Addresses learned.
    pub learned: u64,
    /// Addresses that moved from one port to another.
    pub moved: u64,
    /// Entries forgotten by age.
    pub aged: u64,
    /// Entries that gave way to a new one of a port with fewer addresses.
    pub evicted: u64,
    /// Frames whose source was not learned because its port is at its limit.
    pub port_limit: u64,
    /// Frames whose source was not learned because the table is full.
    pub full: u64,
}

#[inline]
fn key_of(vlan: u16, mac: MacAddr) -> u64 {
    (u64::from(vlan) << 48) | mac.as_u64()
}

#[inline]
fn value_of(port: PortId, now_s: u32) -> u64 {
    (u64::from(port) << 32) | u64::from(now_s)
}

#[inline]
fn port_of(value: u64) -> PortId {
    (value >> 32) as u16
}

impl Fdb {
    /// An empty database for about `capacity` stations (rounded up to a power of two, at most [`MAX_CAPACITY`]).
    pub fn new(capacity: u32, ageing_s: u32) -> Self {
        let capacity = capacity.clamp(16, MAX_CAPACITY);
        // Twice the room: with two candidate buckets of four, an insert below half load practically always finds a place.
        let buckets = (capacity as usize * 2).next_power_of_two() / WAYS;
        Self::with_buckets(buckets, capacity, ageing_s)
    }

    fn with_buckets(buckets: usize, capacity: u32, ageing_s: u32) -> Self {
        let entry = || Entry { key: AtomicU64::new(EMPTY), value: AtomicU64::new(0) };
        Self {
            buckets: (0..buckets).map(|_| Bucket([entry(), entry(), entry(), entry()])).collect(),
            mask: buckets as u64 - 1,
            capacity,
            ageing_s: AtomicU32::new(ageing_s.max(1)),
            writer: AtomicBool::new(false),
            used: AtomicU32::new(0),
            per_port: (0..if cfg!(loom) { 4 } else { MAX_PORTS }).map(|_| AtomicU32::new(0)).collect(),
            sweep_at: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            counts: FdbCounters::default(),
        }
    }

    /// Changes the ageing time.
    pub fn set_ageing_s(&self, ageing_s: u32) {
        self.ageing_s.store(ageing_s.max(1), Ordering::Relaxed);
        self.note_change();
    }

    /// A number that is another one after each change that [`Self::lookup`] may show. Within one second, and while this number is what it
    /// was before, lookups find what they found, and [`Self::learn`] has nothing to do for an address that was [`Learned::Known`].
    #[inline]
    pub fn changes(&self) -> u64 {
        // Pairs with `note_change`: who sees the number sees the change.
        self.changes.load(Ordering::Acquire)
    }

    fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    #[inline]
    fn candidates(&self, key: u64) -> impl Iterator<Item = &Entry> {
        // Fibonacci hashing; the two buckets come from independent bits of the product.
        let h = (key ^ (key >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let (a, b) = ((h >> 40) & self.mask, (h >> 16) & self.mask);
        let second = if a == b { (a ^ 1) & self.mask } else { b };
        let first = self.buckets.get(a as usize).map(|b| &b.0).into_iter().flatten();
        first.chain(self.buckets.get(second as usize).map(|b| &b.0).into_iter().flatten())
    }

    /// The entry of `key` and its value, read consistently.
    #[inline]
    fn find(&self, key: u64) -> Option<(&Entry, u64)> {
        for entry in self.candidates(key) {
            if entry.key.load(Ordering::Acquire) == key {
                let value = entry.value.load(Ordering::Relaxed);
                // Pairs with the writer's fence after it cleared the key: who sees the new value sees the key gone.
                fence(Ordering::Acquire);
                if entry.key.load(Ordering::Relaxed) == key {
                    return Some((entry, value));
                }
            }
        }
        None
    }

    #[inline]
    fn expired(&self, value: u64, now_s: u32) -> bool {
        now_s.saturating_sub(value as u32) > self.ageing_s.load(Ordering::Relaxed)
    }

    /// The port behind which `mac` was last seen, unless that is too long ago.
    #[inline]
    pub fn lookup(&self, vlan: u16, mac: MacAddr, now_s: u32) -> Option<PortId> {
        let (_, value) = self.find(key_of(vlan, mac))?;
        (!self.expired(value, now_s)).then(|| port_of(value))
    }

    /// Notes that `mac` was seen on `port`. At most one write a second per station that stays where it is.
    #[inline]
    pub fn learn(&self, vlan: u16, mac: MacAddr, port: PortId, port_limit: u32, now_s: u32) -> Learned {
        let key = key_of(vlan, mac);
        if let Some((entry, value)) = self.find(key)
            && port_of(value) == port
        {
            if value as u32 != now_s {
                // Fails harmlessly when a writer has just reused the entry.
                let _ = entry.value.compare_exchange(value, value_of(port, now_s), Ordering::AcqRel, Ordering::Relaxed);
            }
            return Learned::Known;
        }
        self.learn_slow(key, port, port_limit, now_s)
    }

    #[cold]
    fn learn_slow(&self, key: u64, port: PortId, port_limit: u32, now_s: u32) -> Learned {
        let Some(_writer) = self.try_write() else { return Learned::Busy };
        let held = self.port_count(port);
        if let Some((entry, value)) = self.find(key) {
            if port_of(value) == port {
                return Learned::Known; // another thread was faster
            }
            if held >= port_limit {
                self.bump(&self.counts.port_limit);
                return Learned::PortLimit;
            }
            self.adjust(port_of(value), -1);
            self.adjust(port, 1);
            entry.value.swap(value_of(port, now_s), Ordering::AcqRel);
            self.note_change();
            self.bump(&self.counts.moved);
            return Learned::Moved;
        }
        if held >= port_limit {
            self.bump(&self.counts.port_limit);
            return Learned::PortLimit;
        }
        let at_capacity = self.used.load(Ordering::Relaxed) >= self.capacity;
        let mut victim: Option<(&Entry, u64, u32)> = None;
        for entry in self.candidates(key) {
            let k = entry.key.load(Ordering::Relaxed);
            if k == EMPTY {
                if at_capacity {
                    continue;
                }
                self.store(entry, key, port, now_s);
                return Learned::New;
            }
            let value = entry.value.load(Ordering::Relaxed);
            if self.expired(value, now_s) {
                self.clear(entry, value);
                self.bump(&self.counts.aged);
                self.store(entry, key, port, now_s);
                return Learned::New;
            }
            let holder = self.port_count(port_of(value));
            if victim.is_none_or(|(_, _, most)| holder > most) {
                victim = Some((entry, value, holder));
            }
        }
        // Fairness: only a port that holds more addresses than this one gives one up.
        match victim {
            Some((entry, value, holder)) if holder > held + 1 => {
                self.clear(entry, value);
                self.bump(&self.counts.evicted);
                self.store(entry, key, port, now_s);
                Learned::New
            }
            _ => {
                self.bump(&self.counts.full);
                Learned::Full
            }
        }
    }

    /// Forgets aged entries in at most `buckets` buckets, going round. Cheap enough for a PMD thread's housekeeping.
    pub fn sweep(&self, buckets: usize, now_s: u32) {
        let Some(_writer) = self.try_write() else { return };
        let start = self.sweep_at.load(Ordering::Relaxed) as usize;
        for i in 0..buckets.min(self.buckets.len()) {
            let at = (start + i) & self.mask as usize;
            self.retain_bucket(at, |value| {
                let keep = !self.expired(value, now_s);
                if !keep {
                    self.bump(&self.counts.aged);
                }
                keep
            });
        }
        self.sweep_at.store(((start + buckets) & self.mask as usize) as u32, Ordering::Relaxed);
    }

    /// Forgets all entries, or those of one port. For control threads: waits for its turn.
    pub fn flush(&self, port: Option<PortId>) -> u32 {
        let _writer = self.write();
        let before = self.used.load(Ordering::Relaxed);
        for at in 0..self.buckets.len() {
            self.retain_bucket(at, |value| port.is_some_and(|p| port_of(value) != p));
        }
        before - self.used.load(Ordering::Relaxed)
    }

    fn retain_bucket(&self, at: usize, keep: impl Fn(u64) -> bool) {
        for entry in self.buckets.get(at).map(|b| &b.0).into_iter().flatten() {
            if entry.key.load(Ordering::Relaxed) != EMPTY {
                let value = entry.value.load(Ordering::Relaxed);
                if !keep(value) {
                    self.clear(entry, value);
                }
            }
        }
    }

    /// All live entries. A snapshot of a table in motion: an entry may be missing or shown twice, never garbled.
    pub fn entries(&self, now_s: u32) -> Vec<FdbEntry> {
        let mut out = Vec::new();
        for entry in self.buckets.iter().flat_map(|b| &b.0) {
            let key = entry.key.load(Ordering::Acquire);
            if key == EMPTY {
                continue;
            }
            if let Some((_, value)) = self.find(key)
                && !self.expired(value, now_s)
            {
                out.push(FdbEntry {
                    mac: MacAddr::from_u64(key & 0xffff_ffff_ffff),
                    vlan: (key >> 48) as u16,
                    port: port_of(value),
                    age_s: now_s.saturating_sub(value as u32),
                });
            }
        }
        out
    }

    /// Entries that `port` holds.
    pub fn port_count(&self, port: PortId) -> u32 {
        self.per_port.get(usize::from(port)).map_or(0, |c| c.load(Ordering::Relaxed))
    }

    /// Counters and fill level.
    pub fn stats(&self) -> FdbStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        FdbStats {
            entries: self.used.load(Ordering::Relaxed),
            capacity: self.capacity,
            ageing_s: self.ageing_s.load(Ordering::Relaxed),
            learned: get(&self.counts.learned),
            moved: get(&self.counts.moved),
            aged: get(&self.counts.aged),
            evicted: get(&self.counts.evicted),
            port_limit: get(&self.counts.port_limit),
            full: get(&self.counts.full),
        }
    }

    // The rest runs under the writer lock.

    fn store(&self, entry: &Entry, key: u64, port: PortId, now_s: u32) {
        // A swap, so that a refresh that slipped in between is ordered before it.
        entry.value.swap(value_of(port, now_s), Ordering::AcqRel);
        entry.key.store(key, Ordering::Release);
        self.note_change();
        self.adjust(port, 1);
        self.used.store(self.used.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.bump(&self.counts.learned);
    }

    fn clear(&self, entry: &Entry, value: u64) {
        entry.key.store(EMPTY, Ordering::Relaxed);
        // Before any new value: see `find`.
        fence(Ordering::Release);
        self.note_change();
        self.adjust(port_of(value), -1);
        self.used.store(self.used.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
    }

    fn adjust(&self, port: PortId, by: i32) {
        if let Some(c) = self.per_port.get(usize::from(port)) {
            c.store(c.load(Ordering::Relaxed).saturating_add_signed(by), Ordering::Relaxed);
        }
    }

    fn bump(&self, counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn try_write(&self) -> Option<WriterLock<'_>> {
        self.writer
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            .then(|| WriterLock(&self.writer))
    }

    fn write(&self) -> WriterLock<'_> {
        loop {
            if let Some(lock) = self.try_write() {
                return lock;
            }
            #[cfg(loom)]
            loom::thread::yield_now();
            #[cfg(not(loom))]
            std::thread::yield_now();
        }
    }
}

struct WriterLock<'a>(&'a AtomicBool);

impl Drop for WriterLock<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_number_tells_that_something_may_be_found_elsewhere() {
        let fdb = Fdb::new(64, 300);
        let [a, b] = [1, 2].map(|n| MacAddr::from_u64(0x0200_0000_0000 | n));
        let mut last = fdb.changes();
        let mut changed = |what: &str, expected: bool| {
            assert_eq!(fdb.changes() != last, expected, "{what}");
            last = fdb.changes();
        };
        assert_eq!(fdb.learn(0, a, 1, 10, 0), Learned::New);
        changed("learned", true);
        assert_eq!((fdb.learn(0, a, 1, 10, 0), fdb.lookup(0, a, 0)), (Learned::Known, Some(1)));
        changed("known", false);
        assert_eq!(fdb.learn(0, a, 1, 10, 5), Learned::Known);
        changed("refreshed", false);
        assert_eq!(fdb.learn(0, a, 2, 10, 5), Learned::Moved);
        changed("moved", true);
        assert_eq!(fdb.learn(0, b, 2, 1, 5), Learned::PortLimit);
        changed("refused", false);
        fdb.set_ageing_s(10);
        changed("ageing", true);
        fdb.sweep(64, 10);
        changed("swept in vain", false);
        fdb.sweep(64, 20);
        assert_eq!(fdb.lookup(0, a, 5), None);
        changed("aged", true);
        fdb.learn(0, a, 1, 10, 20);
        changed("learned again", true);
        fdb.flush(Some(1));
        changed("flushed", true);
    }

    fn mac(n: u64) -> MacAddr {
        MacAddr::from_u64(0x0200_0000_0000 | n)
    }

    #[test]
    fn learns_moves_and_ages() {
        let fdb = Fdb::new(64, 10);
        assert_eq!(fdb.learn(0, mac(1), 3, 8, 100), Learned::New);
        assert_eq!(fdb.learn(0, mac(1), 3, 8, 101), Learned::Known);
        assert_eq!(fdb.lookup(0, mac(1), 111), Some(3), "refreshed at 101");
        assert_eq!(fdb.lookup(7, mac(1), 101), None, "another VLAN is another station");
        assert_eq!(fdb.learn(0, mac(1), 4, 8, 102), Learned::Moved);
        assert_eq!((fdb.port_count(3), fdb.port_count(4)), (0, 1));
        assert_eq!(fdb.lookup(0, mac(1), 113), None, "aged");
        fdb.sweep(usize::MAX, 113);
        assert_eq!(fdb.stats().entries, 0);
        assert_eq!(fdb.stats().aged, 1);
        assert_eq!(fdb.port_count(4), 0);
    }

    #[test]
    fn a_port_cannot_exceed_its_limit_or_push_out_others() {
        let fdb = Fdb::new(64, 300);
        for n in 0..16 {
            assert_eq!(fdb.learn(0, mac(n), 1, 32, 1), Learned::New);
        }
        let mut refused = 0;
        for n in 1000..3000 {
            if fdb.learn(0, mac(n), 2, 32, 1) == Learned::PortLimit {
                refused += 1;
            }
        }
        assert_eq!(fdb.port_count(2), 32);
        assert_eq!(refused, 2000 - 32);
        for n in 0..16 {
            assert_eq!(fdb.lookup(0, mac(n), 1), Some(1));
        }
    }

    #[test]
    fn a_full_table_takes_from_the_port_that_holds_most() {
        let fdb = Fdb::new(64, 300);
        for n in 0..2000 {
            fdb.learn(0, mac(n), 1, u32::MAX, 1);
        }
        assert_eq!(fdb.stats().entries, 64);
        let got = (5000..5020).filter(|&n| fdb.learn(0, mac(n), 2, u32::MAX, 1) == Learned::New).count();
        assert_eq!(got, 20);
        assert_eq!(fdb.stats().entries, 64);
        assert_eq!(fdb.port_count(1), 44);
    }

    #[test]
    fn flush_takes_one_port_or_all() {
        let fdb = Fdb::new(64, 300);
        for n in 0..10 {
            fdb.learn(0, mac(n), (n % 2) as u16, 100, 1);
        }
        assert_eq!(fdb.flush(Some(1)), 5);
        assert_eq!(fdb.entries(1).len(), 5);
        assert_eq!(fdb.flush(None), 5);
        assert!(fdb.entries(1).is_empty());
    }

    #[test]
    fn concurrent_learning_never_mixes_stations_up() {
        // Every station n belongs to port n % 4 + 1, whoever learns it; a lookup must never say otherwise.
        let fdb = Arc::new(Fdb::new(64, 300));
        let threads: Vec<_> = (0..3u64)
            .map(|t| {
                let fdb = Arc::clone(&fdb);
                std::thread::spawn(move || {
                    let mut x = t + 1;
                    for i in 0..200_000u32 {
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        let n = x % 300;
                        let port = (n % 4 + 1) as u16;
                        if t == 2 {
                            if let Some(p) = fdb.lookup(0, mac(n), 1) {
                                assert_eq!(p, port, "station {n} after {i} steps");
                            }
                            if i % 1000 == 0 {
                                fdb.flush(Some(port));
                            }
                        } else {
                            fdb.learn(0, mac(n), port, u32::MAX, 1 + i / 50_000);
                        }
                    }
                })
            })
            .collect();
        for t in threads {
            t.join().unwrap();
        }
        let held: u32 = (0..8).map(|p| fdb.port_count(p)).sum();
        assert_eq!(held, fdb.stats().entries);
        assert_eq!(held as usize, fdb.entries(4).len());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;

    /// One writer replaces a station in a slot while a reader looks the old and the new one up and refreshes.
    #[test]
    fn a_reader_never_sees_one_stations_port_under_anothers_key() {
        loom::model(|| {
            let fdb = Arc::new(Fdb::with_buckets(1, 1, 10));
            let (a, b) = (MacAddr::from_u64(0x0200_0000_0001), MacAddr::from_u64(0x0200_0000_0002));
            fdb.learn(0, a, 1, 9, 1);
            let writer = {
                let fdb = Arc::clone(&fdb);
                loom::thread::spawn(move || {
                    fdb.flush(Some(1));
                    fdb.learn(0, b, 2, 9, 1);
                })
            };
            if let Some(p) = fdb.lookup(0, a, 1) {
                assert_eq!(p, 1);
            }
            fdb.learn(0, a, 1, 0, 2); // refresh only: the limit forbids an insert
            if let Some(p) = fdb.lookup(0, b, 1) {
                assert_eq!(p, 2);
            }
            writer.join().unwrap();
            assert_ne!(fdb.lookup(0, b, 1), Some(1));
        });
    }

    /// Two threads learn at once: the lock admits one, and the counts agree with the entries afterwards.
    #[test]
    fn there_is_one_writer_at_a_time() {
        loom::model(|| {
            let fdb = Arc::new(Fdb::with_buckets(1, 4, 10));
            let other = {
                let fdb = Arc::clone(&fdb);
                loom::thread::spawn(move || fdb.learn(0, MacAddr::from_u64(0x0200_0000_0001), 1, 9, 1))
            };
            // Twice: a refused first try must not open the door for the second.
            let first = fdb.learn(0, MacAddr::from_u64(0x0200_0000_0002), 2, 9, 1);
            let second = fdb.learn(0, MacAddr::from_u64(0x0200_0000_0003), 2, 9, 1);
            let there = other.join().unwrap();
            let learned = [first, second, there].iter().filter(|&&l| l == Learned::New).count() as u32;
            assert!(learned >= 1);
            assert_eq!(fdb.stats().entries, learned);
            assert_eq!(fdb.port_count(1) + fdb.port_count(2), learned);
            // A lock that was not got must not be given back.
            assert!(!fdb.writer.load(Ordering::SeqCst));
        });
    }
}
