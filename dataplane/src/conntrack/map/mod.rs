//! One VM's connections, shared by all PMD threads without a lock.
//!
//! # Parts
//! - [`slab`]: the entries, 120 bytes each, in memory that is reserved at once and never moves; free ones in stacks.
//! - [`slot`]: how one entry is copied in and out (a seqlock), under the control word of [`meta`].
//! - [`index`]: from key to slot, 5.7 bytes per connection at capacity.
//! - [`dirty`]: what changed, for migration. [`evict`]: making room. [`handle`]: a thread's [`super::ConnTable`].
//!
//! # Protocol
//! An entry is in the table from the moment its control word becomes `Live` until the moment it becomes `Free`; both are one
//! compare-and-swap, and each is won by one thread. All else follows:
//!
//! - **Lookup** goes through a key's two buckets and takes a copy that is of one piece.
//! - **Update** moves `Live(v)` to `Writing`, writes, and moves on to `Live(v + 1)`; it fails when the version is not the copy's.
//! - **Removal** moves `Live(v)` to `Free`, clears the index word, and only then gives the slot back.
//! - **Insertion** fills a slot, `Tentative`, enters it into the index, and then looks for other slots with its key. An entry means that
//!   it withdraws. Of two tentative ones that at the lower place takes the other's control word to `Free` and so out of the race, while
//!   the other withdraws by itself if it sees the lower one first. Since both enter the index before they look, with a sequentially
//!   consistent fence between, at least one sees the other: there are never two entries of one key. Whoever is left makes itself `Live`.
//!
//! Slots are never unmapped while the map exists, so a reader that comes too late reads a slot of another time, and the control word
//! tells it so. The map itself goes when its last `Arc` does.
mod dirty;
mod evict;
mod handle;
mod hash;
mod index;
mod meta;
mod observer;
#[cfg(any(test, feature = "testing"))]
mod samples;
mod slab;
mod slot;
mod stats;
mod sync;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;

use crossbeam::utils::CachePadded;

pub use dirty::Tombstone;
pub use handle::ConnHandle;
pub use meta::{VERSION_BITS, VERSION_MAX, newer};
pub use observer::{Observer, Removal};
#[cfg(any(test, feature = "testing"))]
pub use samples::sample;
pub use stats::MapStats;

use super::entry::Connection;
use super::key::Key;
use super::table::{Change, InsertError, Stored};
use crate::memory::prefetch;
use dirty::{Dirty, Marks};
pub(crate) use hash::Ends;
use hash::Hasher;
use index::{Index, Places, Position};
use meta::{Meta, State, newest, next};
use slab::{SHARDS, Slab};
use slot::Busy;
pub(crate) use slot::KeyWords;
pub(super) use slot::{Amend, EntryWords, Look, Word};
use stats::Counters;
use sync::{AtomicU32, AtomicU64, Ordering, fence, spin};

/// Connections of a VM by default.
pub const DEFAULT_CAPACITY: u32 = 1_000_000;
/// Most connections that can be configured.
pub const MAX_CAPACITY: u32 = 1 << 24;

/// Looks at a key's places before an insertion gives up; each look after the first means that another thread did something there.
const ROUNDS: usize = 64;
/// Times an eviction may be tried for one insertion: each but the last means that another thread took what was evicted.
const EVICTIONS: usize = 4;
/// The thread number of control threads.
const CONTROL: usize = SHARDS - 1;

/// Why there is no map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Capacity out of bounds.
    #[error("capacity {0} is not between 1 and {MAX_CAPACITY} connections")]
    Capacity(u32),
    /// No memory.
    #[error("cannot reserve memory for {capacity} connections")]
    Memory {
        /// Connections asked for.
        capacity: u32,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A place in a pass over the map; starts at the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    at: u32,
}

impl Cursor {
    /// The place that [`Self::position`] told, for passes that go on after a while.
    pub const fn new(position: u32) -> Self {
        Self { at: position }
    }

    /// The place as a number; 0 is the beginning.
    pub const fn position(&self) -> u32 {
        self.at
    }
}

/// What [`ConnMap::collect_dirty`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirt {
    /// An entry that is new or changed, as it is now.
    Changed(Connection),
    /// An entry that went.
    Deleted(Tombstone),
    /// More entries went than could be noted: what others hold must be compared with a new walk.
    Overflow,
}

/// What [`ConnMap::uncollected`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uncollected {
    /// Entries that are new or changed.
    pub changed: u32,
    /// Entries that went.
    pub deleted: u32,
    /// Entries of which only time, windows or counters changed.
    pub lagging: u32,
}

/// What became of an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Imported {
    /// Stored; the key was not there.
    Added,
    /// Stored in place of an older version.
    Replaced,
    /// Not stored: the map has this version or a newer one.
    Older,
    /// Not stored: no room, and nothing that may be evicted; or other threads kept the key's places busy.
    Full,
}

/// Where a key is to be looked for in one map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whereabouts(u64);

impl Whereabouts {
    /// Nowhere in particular.
    pub(crate) const NONE: Self = Self(0);

    /// Nobody has asked yet. Where a key's hash is 0, nobody ever seems to have.
    #[inline(always)]
    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// The slot in which a key's entry probably is, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Likely(u32);

impl Likely {
    /// None.
    pub(crate) const NONE: Self = Self(u32::MAX);

    /// The slot's number.
    #[inline(always)]
    pub(crate) const fn slot(self) -> u32 {
        self.0
    }
}

/// Places in which a key was not found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vacancy(Places);

/// Another slot with a key.
struct Rival {
    number: u32,
    meta: Meta,
    position: Position,
}

/// One VM's connections, shared by all PMD threads by `Arc`, without locks. Threads work on it through [`ConnMap::handle`].
///
/// # Versions
/// [`Connection::version`] has 30 bits and is compared as a serial number ([`newer`]). Updates raise it by one. A new entry's is above
/// that of every entry removed before (the map keeps the highest), so the versions of one key rise through deletion and re-insertion
/// too. This holds while the versions in a map are less than 2^29 changes apart; an importer that applies changes and tombstones in the
/// order in which [`Self::collect_dirty`] gave them does not depend on it. [`Self::import`] keeps the version that it brings.
pub struct ConnMap {
    hasher: Hasher,
    index: Index,
    slab: Slab,
    dirty: Dirty,
    counters: [CachePadded<Counters>; SHARDS],
    /// The highest version among entries removed.
    floor: CachePadded<AtomicU32>,
    sweep_at: CachePadded<AtomicU64>,
    evict_at: AtomicU32,
    /// When the last search for room was in vain: the low 32 bits of the time, and 2^32 if ever.
    nothing_at_ms: AtomicU64,
}

impl ConnMap {
    /// A map for `capacity` connections, at most [`MAX_CAPACITY`]. `seed` is secret and random: the hash depends on it.
    ///
    /// Reserves [`Self::memory_bytes`] and backs the index and the first 4 MB of the entries with memory.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn new(capacity: u32, seed: [u64; 2]) -> Result<Self, MapError> {
        if capacity == 0 || capacity > MAX_CAPACITY {
            return Err(MapError::Capacity(capacity));
        }
        let memory = |source| MapError::Memory { capacity, source };
        let map = Self {
            hasher: Hasher::new(seed),
            index: Index::new(capacity).map_err(memory)?,
            slab: Slab::new(capacity).map_err(memory)?,
            dirty: Dirty::new(capacity),
            counters: Default::default(),
            floor: CachePadded::new(AtomicU32::new(0)),
            sweep_at: CachePadded::new(AtomicU64::new(0)),
            evict_at: AtomicU32::new(0),
            nothing_at_ms: AtomicU64::new(0),
        };
        map.populate_ahead();
        Ok(map)
    }

    /// A thread's access. `thread` is its number, to keep threads out of each other's way; two may have the same. `observer` is told of
    /// what this thread removes.
    #[inline]
    pub fn handle<'a>(&'a self, observer: &'a dyn Observer, thread: usize) -> ConnHandle<'a> {
        ConnHandle::new(self, observer, thread)
    }

    /// Most connections.
    pub fn capacity(&self) -> u32 {
        self.slab.capacity()
    }

    /// Number of entries, those expired but not yet deleted included. While threads insert and remove, a value of about now. A sum over
    /// all threads' counters: not for every packet.
    pub fn len(&self) -> usize {
        self.stats().len as usize
    }

    /// No entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes reserved, everything included: at most 128 per connection from some 10,000 connections on. Pages are used as entries come.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.index.bytes() + self.slab.bytes() + self.dirty.bytes()
    }

    /// The map's figures.
    pub fn stats(&self) -> MapStats {
        let mut stats = MapStats {
            capacity: u64::from(self.capacity()),
            memory_bytes: self.memory_bytes() as u64,
            ..MapStats::default()
        };
        for counters in &self.counters {
            counters.add_to(&mut stats);
        }
        let gone = stats.finished + stats.expired + stats.evicted + stats.flushed + stats.deleted;
        // A removal may be counted before its insertion.
        stats.len = (stats.inserted + stats.imported).saturating_sub(gone).min(stats.capacity);
        stats
    }

    #[inline]
    fn counters(&self, thread: usize) -> &Counters {
        let [first, ..] = &self.counters;
        self.counters.get(thread % SHARDS).unwrap_or(first)
    }

    /// Backs the next 4 MB of entries, 35,000 connections, with memory, in huge pages where there are any. A control thread should call
    /// it every few milliseconds, and again within one when it returns true: more than a quarter of what was ready has been used since.
    /// Otherwise PMD threads fault small pages in one by one, about a microsecond each, and the table stays on small pages there.
    pub fn populate_ahead(&self) -> bool {
        self.slab.populate_ahead()
    }

    /// A key's hash, for [`ConnHandle::lookup_hashed`].
    #[inline]
    pub fn hash(&self, key: &Key) -> u64 {
        self.hasher.hash(key.words())
    }

    /// First step of a batch of lookups: fetches the buckets into the cache.
    #[inline]
    pub fn prefetch_bucket(&self, hash: u64) {
        let places = self.index.places(hash);
        self.index.prefetch(&places, 0);
        self.index.prefetch(&places, 1);
    }

    /// Second step: reads the buckets and fetches the entries that may be the one.
    #[inline]
    pub fn prefetch_entries(&self, hash: u64) {
        let places = self.index.places(hash);
        let _: Option<()> = self.index.find(&places, |number, _| {
            let slot = self.slab.slot(number)?;
            prefetch(slot);
            slot.prefetch_rest();
            None
        });
    }

    /// The parts of a key's hash that are about its two ends: the same in any other map, and [`Ends::turned`] where the other is the VM's.
    #[inline(always)]
    pub(crate) fn ends(&self, key: &KeyWords) -> Ends {
        self.hasher.ends(key)
    }

    /// First step of a batch of looks: finds out where the key with these ends and this last word is to be looked for, and fetches the
    /// bucket where it most probably is. `both`: the other one, too.
    #[inline(always)]
    pub(crate) fn prefetch_places(&self, ends: Ends, rest: u64, both: bool) -> Whereabouts {
        let hash = self.hasher.whole(ends, rest);
        self.index.prefetch_first(hash);
        if both {
            self.index.prefetch_second(hash);
        }
        Whereabouts(hash)
    }

    /// Second step: reads the bucket, fetches the entry that is probably the key's, and tells its slot. [`Likely::NONE`], when there is
    /// none: then the second bucket is fetched, and [`Self::prefetch_less_likely`] is to be asked a little later.
    #[inline(always)]
    pub(crate) fn prefetch_likely(&self, Whereabouts(hash): Whereabouts) -> Likely {
        match self.index.first(hash) {
            Some(number) => self.prefetch_entry(number),
            None => {
                self.index.prefetch_second(hash);
                Likely::NONE
            }
        }
    }

    /// As the second step, in the second bucket.
    #[inline(never)]
    pub(crate) fn prefetch_less_likely(&self, Whereabouts(hash): Whereabouts) -> Likely {
        self.index.second(hash).map_or(Likely::NONE, |number| self.prefetch_entry(number))
    }

    /// All steps at once.
    pub(crate) fn likely(&self, whereabouts: Whereabouts) -> Likely {
        match self.prefetch_likely(whereabouts) {
            Likely::NONE => self.prefetch_less_likely(whereabouts),
            likely => likely,
        }
    }

    /// In place of the second step: fetches the entry in a slot of which somebody remembers that it was the key's.
    #[inline(always)]
    pub(crate) fn prefetch_entry(&self, number: u32) -> Likely {
        if let Some(slot) = self.slab.slot(number) {
            prefetch(slot);
            slot.prefetch_second();
        }
        Likely(number)
    }

    /// The slot has this key's entry, and nobody is changing it.
    #[inline(always)]
    pub(crate) fn is_there(&self, likely: Likely, key: &KeyWords) -> bool {
        self.look(likely, key).is_some()
    }

    /// Key `words`' entry in a slot that is probably its.
    #[inline(always)]
    pub(super) fn look(&self, likely: Likely, key: &KeyWords) -> Option<Look<'_>> {
        self.slab.slot(likely.0)?.look(key)
    }

    /// Makes the entry that was looked at in this slot the caller's alone, if nobody has touched it since, to make this kind of change. It
    /// will expire then, and have the next version. While changes are tracked, this one is noted.
    #[inline(always)]
    pub(super) fn claim<'a>(
        &self,
        likely: Likely,
        look: Look<'a>,
        expires_ms: u32,
        change: Change,
    ) -> Option<Amend<'a>> {
        let entry = look.claim(expires_ms)?;
        if self.dirty.is_on() {
            match change {
                Change::None => {}
                Change::Bookkeeping => self.dirty.lagging.set_claimed(likely.0),
                Change::Semantic => self.dirty.semantic.set_claimed(likely.0),
            }
        }
        Some(entry)
    }

    /// The entry with this key, expired or not; from any thread.
    pub fn get(&self, key: &Key) -> Option<Connection> {
        let words = key.words();
        self.index.find(&self.index.places(self.hash(key)), |number, _| match self.slab.slot(number)?.read(&words) {
            slot::Read::Live(connection) => Some(connection),
            slot::Read::Absent | slot::Read::Busy => None,
        })
    }

    // ---- insertion

    /// A slot other than `own` that has the key. `Err` when that changed too often to be told.
    #[inline]
    fn rival(&self, places: &Places, key: &KeyWords, own: Option<u32>) -> Result<Option<Rival>, Busy> {
        self.index
            .find(places, |number, position| {
                if Some(number) == own {
                    return None;
                }
                match self.slab.slot(number)?.occupant(key) {
                    Ok(None) => None,
                    Ok(Some(meta)) => Some(Ok(Rival { number, meta, position })),
                    Err(Busy) => Some(Err(Busy)),
                }
            })
            .transpose()
    }

    /// Stores a new connection; returns its slot. With `version`, under this version, else under one that is higher than any before.
    fn insert(
        &self,
        connection: &Connection,
        version: Option<u32>,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<u32, InsertError> {
        let key = connection.key.words();
        let places = self.index.places(self.hasher.hash(key));
        let words = slot::to_words(connection);
        let stored = self
            .make_way(&places, &key, now_ms, observer, thread)
            .and_then(|()| self.try_insert(&places, &words, version, now_ms, observer, thread));
        self.note_insertion(stored, version.is_some(), thread);
        stored
    }

    /// The key that is to be looked for at `whereabouts` is in no slot, or was not a moment ago: [`Self::fill`] need not look first.
    /// `None` also where nobody has asked for its whereabouts.
    #[inline(always)]
    pub(crate) fn vacancy(&self, whereabouts: Whereabouts, key: &KeyWords) -> Option<Vacancy> {
        if whereabouts.is_none() {
            return None;
        }
        let Whereabouts(hash) = whereabouts;
        let places = self.index.places(hash);
        (self.index.is_nowhere(&places, None) || matches!(self.rival(&places, key, None), Ok(None)))
            .then_some(Vacancy(places))
    }

    /// Stores a new connection where nothing was found: the words of a [`Connection`], of which that of version and expiry has no version.
    /// Else as [`super::ConnTable::insert`].
    #[inline]
    pub(crate) fn fill(
        &self,
        Vacancy(places): &Vacancy,
        words: &EntryWords,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<(), InsertError> {
        let stored = self.try_insert(places, words, None, now_ms, observer, thread);
        self.note_insertion(stored, false, thread);
        stored.map(|_| ())
    }

    #[inline]
    fn note_insertion(&self, stored: Result<u32, InsertError>, imported: bool, thread: usize) {
        let counters = self.counters(thread);
        Counters::count(match stored {
            Ok(_) if imported => &counters.imported,
            Ok(_) => &counters.inserted,
            Err(InsertError::Full) => &counters.full,
            Err(InsertError::Exists) => &counters.exists,
        });
        if let Ok(number) = stored {
            // What is new may be what can be evicted.
            if self.nothing_at_ms.load(Ordering::Relaxed) != 0 {
                self.nothing_at_ms.store(0, Ordering::Relaxed);
            }
            if self.dirty.is_on() {
                self.dirty.semantic.set(number);
            }
        }
    }

    /// Stores an entry, unless another thread has done so meanwhile. Whoever calls has found no entry of this key.
    #[inline]
    fn try_insert(
        &self,
        places: &Places,
        words: &EntryWords,
        version: Option<u32>,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<u32, InsertError> {
        let &[a, b, c, d, e, control, ..] = words;
        let key = [a, b, c, d, e];
        let number = self.free_slot(now_ms, observer, thread).ok_or(InsertError::Full)?;
        let slot = self.slab.slot(number).ok_or(InsertError::Full)?;
        let meta = slot.prepare(words);
        let withdraw = |error| {
            // If it was taken out of the race, it is free already.
            slot.shift(meta, meta.with(State::Free));
            self.index.clear(places, number);
            self.slab.give(thread, number);
            Err(error)
        };
        let Some(position) = self.enter(places, number, now_ms, observer, thread) else {
            return withdraw(InsertError::Full);
        };
        if let Err(error) = self.contend(places, &key, (number, position), now_ms, observer, thread) {
            return withdraw(error);
        }
        // Read only now: whoever removed this key's former entry has raised it before.
        let version = version.unwrap_or_else(|| {
            let highest = newest(self.floor.load(Ordering::Acquire), meta.version());
            next(newest(highest, (control >> 32) as u32 & VERSION_MAX))
        });
        if !slot.shift(meta, Meta::new(State::Live, version, meta.expires_ms())) {
            return withdraw(InsertError::Exists);
        }
        Ok(number)
    }

    /// Deletes an expired entry that has the key. An error if there is one that has not expired, or one about to be.
    #[inline]
    fn make_way(
        &self,
        places: &Places,
        key: &KeyWords,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<(), InsertError> {
        for _ in 0..ROUNDS {
            let Some(rival) = self.rival(places, key, None).map_err(|Busy| InsertError::Exists)? else { return Ok(()) };
            if !(rival.meta.is_live() && rival.meta.is_expired(now_ms)) {
                break;
            }
            self.unlink(rival.number, rival.meta, Removal::Expired, observer, thread);
        }
        Err(InsertError::Exists)
    }

    #[inline]
    fn free_slot(&self, now_ms: u64, observer: &dyn Observer, thread: usize) -> Option<u32> {
        for _ in 0..EVICTIONS {
            if let slot @ Some(_) = self.slab.take(thread) {
                return slot;
            }
            if !self.evict(now_ms, observer, thread) {
                return None;
            }
        }
        self.slab.take(thread)
    }

    #[inline]
    fn enter(
        &self,
        places: &Places,
        number: u32,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Option<Position> {
        if let position @ Some(_) = self.index.put(places, number) {
            return position;
        }
        self.enter_full(places, number, now_ms, observer, thread)
    }

    #[cold]
    fn enter_full(
        &self,
        places: &Places,
        number: u32,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Option<Position> {
        Counters::count(&self.counters(thread).bucket_full);
        for _ in 0..EVICTIONS {
            if !self.evict_neighbour(places, now_ms, observer, thread) {
                return None;
            }
            if let position @ Some(_) = self.index.put(places, number) {
                return position;
            }
        }
        None
    }

    /// Finds out whether the caller's tentative slot, which is in the index, is to be the key's only one.
    #[inline]
    fn contend(
        &self,
        places: &Places,
        key: &KeyWords,
        own: (u32, Position),
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<(), InsertError> {
        // Enter, then look: of two that do so, one at least sees the other.
        fence(Ordering::SeqCst);
        if self.index.is_nowhere(places, Some(own.1)) {
            return Ok(());
        }
        self.contend_with_rivals(places, key, own, now_ms, observer, thread)
    }

    #[inline(never)]
    fn contend_with_rivals(
        &self,
        places: &Places,
        key: &KeyWords,
        own: (u32, Position),
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<(), InsertError> {
        for _ in 0..ROUNDS {
            let rival = self.rival(places, key, Some(own.0)).map_err(|Busy| InsertError::Exists)?;
            let Some(rival) = rival else { return Ok(()) };
            match rival.meta.state() {
                State::Live if rival.meta.is_expired(now_ms) => {
                    self.unlink(rival.number, rival.meta, Removal::Expired, observer, thread);
                }
                State::Tentative if own.1 < rival.position => {
                    // Out of the race, unless it has become an entry in this moment; the next look tells. Its owner withdraws it.
                    if let Some(slot) = self.slab.slot(rival.number) {
                        slot.shift(rival.meta, rival.meta.with(State::Free));
                    }
                }
                _ => break,
            }
        }
        Err(InsertError::Exists)
    }

    // ---- change

    /// Replaces the entry in this slot if it is the one that `connection` was copied from. `None` when the slot is not this key's.
    #[inline]
    fn update_at(&self, number: u32, connection: &Connection, change: Change) -> Option<Stored> {
        let slot = self.slab.slot(number)?;
        let meta = slot.meta();
        if meta.state() == State::Free || !slot.holds(&connection.key.words()) {
            return None;
        }
        if !meta.is_live() || meta.version() != connection.version {
            return Some(Stored::Stale);
        }
        // The key was read after the control word, which the claim finds unchanged.
        fence(Ordering::Acquire);
        let Some(claim) = slot.claim(meta, connection, next(meta.version())) else { return Some(Stored::Stale) };
        claim.commit();
        if self.dirty.is_on() {
            match change {
                Change::None => {}
                Change::Bookkeeping => self.dirty.lagging.set(number),
                Change::Semantic => self.dirty.semantic.set(number),
            }
        }
        Some(Stored::Done)
    }

    /// As [`Self::update_at`], searching.
    fn update(&self, connection: &Connection, change: Change) -> Stored {
        let places = self.index.places(self.hash(&connection.key));
        self.index.find(&places, |number, _| self.update_at(number, connection, change)).unwrap_or(Stored::Stale)
    }

    // ---- removal

    #[inline]
    fn raise_floor(&self, version: u32) {
        let mut floor = self.floor.load(Ordering::Relaxed);
        while newer(version, floor) {
            match self.floor.compare_exchange_weak(floor, version, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => floor = now,
            }
        }
    }

    /// Takes out the entry in this slot whose control word is `meta`. False if it has changed or gone.
    fn unlink(&self, number: u32, meta: Meta, why: Removal, observer: &dyn Observer, thread: usize) -> bool {
        let Some(slot) = self.slab.slot(number) else { return false };
        if !meta.is_live() {
            return false;
        }
        let Some(connection) = slot.copy(meta) else { return false };
        // First: who sees the entry gone also sees its version.
        self.raise_floor(meta.version());
        if !slot.shift(meta, meta.with(State::Free)) {
            return false;
        }
        let key = connection.key.words();
        self.index.clear(&self.index.places(self.hasher.hash(key)), number);
        if self.dirty.is_on() {
            self.dirty.bury(key, meta.version());
        }
        Counters::count(self.counters(thread).removed(why));
        self.slab.give(thread, number);
        observer.removed(&connection, why);
        true
    }

    /// Takes out the entry in this slot if it is the one that `connection` was copied from.
    #[inline]
    fn remove_copied(
        &self,
        number: u32,
        connection: &Connection,
        why: Removal,
        observer: &dyn Observer,
        thread: usize,
    ) -> bool {
        let Some(slot) = self.slab.slot(number) else { return false };
        let meta = slot.meta();
        meta.is_live()
            && meta.version() == connection.version
            && slot.holds(&connection.key.words())
            // Reads the slot once more: an entry of another key cannot have the same control word.
            && self.unlink(number, meta, why, observer, thread)
    }

    fn remove_found(&self, connection: &Connection, why: Removal, observer: &dyn Observer, thread: usize) -> Stored {
        let places = self.index.places(self.hash(&connection.key));
        let done = self
            .index
            .find(&places, |number, _| self.remove_copied(number, connection, why, observer, thread).then_some(()));
        if done.is_some() { Stored::Done } else { Stored::Stale }
    }

    /// Deletes the entry with this key if `condition` agrees; from a control thread. Tries again while the entry changes, a bounded number
    /// of times. Returns whether it was deleted.
    pub fn remove_if(
        &self,
        key: &Key,
        why: Removal,
        observer: &dyn Observer,
        mut condition: impl FnMut(&Connection) -> bool,
    ) -> bool {
        for _ in 0..ROUNDS {
            let Some(connection) = self.get(key) else { return false };
            if !condition(&connection) {
                return false;
            }
            if self.remove_found(&connection, why, observer, CONTROL) == Stored::Done {
                return true;
            }
        }
        false
    }

    /// Deletes expired entries among the next `budget` slots, round and round; returns how many. Threads that call it share the work. An
    /// entry that is to go costs about 100 ns and the observer's time, one that stays a few.
    pub fn sweep(&self, now_ms: u64, budget: usize, observer: &dyn Observer) -> usize {
        self.sweep_as(now_ms, budget, observer, CONTROL)
    }

    fn sweep_as(&self, now_ms: u64, budget: usize, observer: &dyn Observer, thread: usize) -> usize {
        let used = self.slab.used();
        let budget = u32::try_from(budget).unwrap_or(u32::MAX).min(used);
        if budget == 0 {
            return 0;
        }
        let start = (self.sweep_at.fetch_add(u64::from(budget), Ordering::Relaxed) % u64::from(used)) as u32;
        let mut gone = 0;
        // Below 2^25: no overflow.
        for n in start..start + budget {
            let number = if n < used { n } else { n - used };
            let Some(slot) = self.slab.slot(number) else { continue };
            let meta = slot.meta();
            if meta.is_live()
                && meta.is_expired(now_ms)
                && self.unlink(number, meta, Removal::Expired, observer, thread)
            {
                gone += 1;
            }
        }
        gone
    }

    // ---- passes over the whole map

    /// The next `budget` slots of a pass. True when there is more; otherwise the cursor is at the beginning again.
    fn pass(&self, cursor: &mut Cursor, budget: usize, mut f: impl FnMut(u32, Meta, &Connection)) -> bool {
        for _ in 0..budget {
            let Some(slot) = (cursor.at < self.slab.used()).then(|| self.slab.slot(cursor.at)).flatten() else {
                cursor.at = 0;
                return false;
            };
            match slot.read_any() {
                Ok(Some((meta, connection))) => f(cursor.at, meta, &connection),
                Ok(None) => {}
                // Its writer stands still. It must not be left out: next time.
                Err(Busy) => return true,
            }
            cursor.at += 1;
        }
        true
    }

    /// Calls `f` with the entries in the next `budget` slots. True when there is more to come; with false the pass is over, and the next
    /// call begins another. In one pass every entry that exists all the time is seen exactly once; one that comes or goes meanwhile is
    /// seen or not; a key that goes and comes again may be seen twice.
    pub fn walk(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        self.pass(cursor, budget, |_, _, connection| f(connection))
    }

    /// Deletes the entries among the next `budget` slots that `condition` agrees to; true when there is more, as in [`Self::walk`].
    /// An entry that changes in the moment is asked about again, and may stay if it changes all the time.
    pub fn flush(
        &self,
        cursor: &mut Cursor,
        budget: usize,
        observer: &dyn Observer,
        condition: &mut dyn FnMut(&Connection) -> bool,
    ) -> bool {
        self.pass(cursor, budget, |number, meta, connection| {
            if condition(connection) && !self.unlink(number, meta, Removal::Flushed, observer, CONTROL) {
                self.remove_if(&connection.key, Removal::Flushed, observer, &mut *condition);
            }
        })
    }

    /// Shows the entries among the next `budget` slots to `f`, which may change all but their keys and says how much it changed. Returns
    /// how many were changed, and true when there is more, as in [`Self::walk`]. An entry that changes in the moment is shown
    /// again as it is then, and may stay as it is if it changes all the time.
    pub fn amend(
        &self,
        cursor: &mut Cursor,
        budget: usize,
        f: &mut dyn FnMut(&mut Connection) -> Change,
    ) -> (usize, bool) {
        let mut changed = 0;
        let more = self.pass(cursor, budget, |number, _, connection| {
            let mut connection = *connection;
            for _ in 0..ROUNDS {
                let change = f(&mut connection);
                if change == Change::None {
                    return;
                }
                match self.update_at(number, &connection, change) {
                    Some(Stored::Done) => {
                        changed += 1;
                        return;
                    }
                    Some(Stored::Stale) => {}
                    // The slot has been given to another, which is shown if it comes to the key's own.
                    None => return,
                }
                match self.get(&connection.key) {
                    Some(now) => connection = now,
                    None => return,
                }
            }
        });
        (changed, more)
    }

    // ---- migration

    /// Switches the tracking of changes on, forgetting what was tracked before, or off.
    ///
    /// A thread that is in the middle of a change may not yet know that tracking is on. So let every PMD thread pass a quiescent state
    /// ([`crate::qsbr::Domain::synchronize`]) before the first [`Self::walk`]: what changes after that walk has seen it is then noted.
    pub fn set_tracking(&self, on: bool) {
        self.dirty.set(on);
    }

    /// Changes are being tracked.
    pub fn is_tracking(&self) -> bool {
        self.dirty.is_on()
    }

    /// As [`Self::walk`], for a collector: what is handed over counts as collected. So a change is handed over here or by
    /// [`Self::collect_dirty`] or [`Self::collect_lagging`] afterwards. One collector at a time.
    pub fn walk_collecting(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        for _ in 0..budget {
            let number = cursor.at;
            let Some(slot) = (number < self.slab.used()).then(|| self.slab.slot(number)).flatten() else {
                cursor.at = 0;
                return false;
            };
            // First the marks, then the entry.
            let (word, bit) = (number / dirty::PER_WORD, 1 << (number % dirty::PER_WORD));
            let changed = self.dirty.semantic.take(word, bit) != 0;
            let lagging = self.dirty.lagging.take(word, bit) != 0;
            match slot.read_any() {
                Ok(Some((_, connection))) => f(&connection),
                // An insertion sets its mark when it is an entry.
                Ok(None) => {}
                // Its writer stands still. It must not be left out: next time.
                Err(Busy) => {
                    if changed {
                        self.dirty.semantic.set(number);
                    }
                    if lagging {
                        self.dirty.lagging.set(number);
                    }
                    return true;
                }
            }
            cursor.at += 1;
        }
        true
    }

    /// What is to be collected, about now. Looks at two bits per connection of the capacity: some tens of microseconds for a million.
    pub fn uncollected(&self) -> Uncollected {
        Uncollected {
            changed: self.dirty.semantic.count(),
            deleted: self.dirty.buried().min(u64::from(u32::MAX)) as u32,
            lagging: self.dirty.lagging.count(),
        }
    }

    /// Hands over at most `budget` deletions, and whether any were lost, as [`Self::collect_dirty`] does before all else. There is room for
    /// one deletion per 64 connections: who calls this every few milliseconds loses none.
    pub fn collect_deleted(&self, budget: usize, f: &mut dyn FnMut(Dirt)) -> usize {
        if self.dirty.take_lost() {
            f(Dirt::Overflow);
        }
        for spent in 0..budget {
            let Some((key, version)) = self.dirty.unearth() else { return spent };
            f(Dirt::Deleted(Tombstone { key: slot::key(key), version }));
        }
        budget
    }

    /// Hands over entries whose time, windows or counters changed since they were last handed over by whatever function; else as
    /// [`Self::collect_dirty`]. An entry may be handed over that has a semantic change too; that stays to be collected.
    pub fn collect_lagging(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        let mut spent = 0;
        while spent < budget {
            if cursor.at >= self.dirty.words() {
                cursor.at = 0;
                return false;
            }
            let bits = self.dirty.lagging.take(cursor.at, u64::MAX);
            spent += 1 + self.read_marked(&self.dirty.lagging, cursor.at, bits, f);
            cursor.at += 1;
        }
        true
    }

    /// Hands over what changed since it was last collected: deletions first, then the marks of the next slots, and returns whether there
    /// is more in this pass. `budget` is counted in entries handed over and in 64-slot groups looked at; it may be exceeded by 64.
    ///
    /// An entry that changes again after it was handed over is marked again. For each key the order is right: what is handed over later
    /// is later, or a deletion of an older version. One collector at a time.
    pub fn collect_dirty(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(Dirt)) -> bool {
        let mut spent = self.collect_deleted(budget, f);
        while spent < budget {
            if cursor.at >= self.dirty.words() {
                cursor.at = 0;
                return false;
            }
            let bits = self.dirty.semantic.take(cursor.at, u64::MAX);
            if bits != 0 {
                // The whole entry is handed over.
                self.dirty.lagging.take(cursor.at, bits);
            }
            spent += 1 + self
                .read_marked(&self.dirty.semantic, cursor.at, bits, &mut |connection| f(Dirt::Changed(*connection)));
            cursor.at += 1;
        }
        true
    }

    /// Hands over the entries of which `bits`, those of a word, were taken from `marks`.
    fn read_marked(&self, marks: &Marks, word: u32, mut bits: u64, f: &mut dyn FnMut(&Connection)) -> usize {
        let mut found = 0;
        while bits != 0 {
            let number = word * dirty::PER_WORD + bits.trailing_zeros();
            bits &= bits - 1;
            match self.slab.slot(number).map(slot::Slot::read_any) {
                Some(Ok(Some((_, connection)))) => {
                    f(&connection);
                    found += 1;
                }
                // Gone; there is a tombstone. Or another's insertion, which will mark it when it is an entry.
                Some(Ok(None)) | None => {}
                Some(Err(Busy)) => marks.set(number),
            }
        }
        found
    }

    /// Stores a connection under the version it brings, unless this map has the same or a newer one ([`newer`]). Doing so twice does no
    /// harm. Makes room as an insertion does. `observer` is told of what goes, the version replaced included ([`Removal::Replaced`]).
    pub fn import(&self, connection: &Connection, now_ms: u64, observer: &dyn Observer) -> Imported {
        let key = connection.key.words();
        let places = self.index.places(self.hasher.hash(key));
        let version = connection.version & VERSION_MAX;
        for _ in 0..ROUNDS {
            let rival = match self.rival(&places, &key, None) {
                Ok(rival) => rival,
                Err(Busy) => continue,
            };
            let Some(rival) = rival else {
                match self.insert(connection, Some(version), now_ms, observer, CONTROL) {
                    Ok(_) => return Imported::Added,
                    Err(InsertError::Full) => return Imported::Full,
                    Err(InsertError::Exists) => continue,
                }
            };
            if !rival.meta.is_live() {
                spin();
                continue;
            }
            if !newer(version, rival.meta.version()) {
                return Imported::Older;
            }
            let Some(slot) = self.slab.slot(rival.number) else { return Imported::Full };
            let Some(claim) = slot.claim(rival.meta, connection, version) else { continue };
            let before = claim.before();
            claim.commit();
            if self.dirty.is_on() {
                self.dirty.semantic.set(rival.number);
            }
            Counters::count(self.counters(CONTROL).removed(Removal::Replaced));
            observer.removed(&before, Removal::Replaced);
            return Imported::Replaced;
        }
        Imported::Full
    }

    /// Deletes the entry with this key unless its version is newer than `version`. Returns whether it was deleted.
    pub fn delete_matching(&self, key: &Key, version: u32, observer: &dyn Observer) -> bool {
        self.remove_if(key, Removal::Deleted, observer, |connection| !newer(connection.version, version))
    }
}
