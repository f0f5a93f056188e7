//! What a map counts.
use core::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::observer::Removal;

/// Counters of the threads of one shard. Written when connections come and go, not when they are looked up.
#[derive(Default)]
pub(super) struct Counters {
    pub inserted: AtomicU64,
    pub imported: AtomicU64,
    pub removed: [AtomicU64; Removal::ALL.len()],
    pub evicted_expired: AtomicU64,
    pub evicted_half_open: AtomicU64,
    pub evicted_answered: AtomicU64,
    pub full: AtomicU64,
    pub bucket_full: AtomicU64,
    pub exists: AtomicU64,
    pub busy: AtomicU64,
}

impl Counters {
    #[inline]
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    pub fn removed(&self, why: Removal) -> &AtomicU64 {
        let [finished, expired, evicted, flushed, replaced, deleted] = &self.removed;
        match why {
            Removal::Finished => finished,
            Removal::Expired => expired,
            Removal::Evicted => evicted,
            Removal::Flushed => flushed,
            Removal::Replaced => replaced,
            Removal::Deleted => deleted,
        }
    }

    pub fn add_to(&self, stats: &mut MapStats) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        stats.inserted += read(&self.inserted);
        stats.imported += read(&self.imported);
        stats.finished += read(self.removed(Removal::Finished));
        stats.expired += read(self.removed(Removal::Expired));
        stats.evicted += read(self.removed(Removal::Evicted));
        stats.flushed += read(self.removed(Removal::Flushed));
        stats.replaced += read(self.removed(Removal::Replaced));
        stats.deleted += read(self.removed(Removal::Deleted));
        stats.evicted_expired += read(&self.evicted_expired);
        stats.evicted_half_open += read(&self.evicted_half_open);
        stats.evicted_answered += read(&self.evicted_answered);
        stats.full += read(&self.full);
        stats.bucket_full += read(&self.bucket_full);
        stats.exists += read(&self.exists);
        stats.busy += read(&self.busy);
    }
}

/// A map's figures. Counts are since the map was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MapStats {
    /// Entries, those expired but not yet deleted included.
    pub len: u64,
    /// Most entries.
    pub capacity: u64,
    /// Bytes reserved, everything included. Memory is used as entries come.
    pub memory_bytes: u64,
    /// Connections stored by packets.
    pub inserted: u64,
    /// Connections stored by import under a key that was not there.
    pub imported: u64,
    /// Deleted because the protocol or the policy ended them.
    pub finished: u64,
    /// Deleted because their time was over.
    pub expired: u64,
    /// Deleted before their time, to make room.
    pub evicted: u64,
    /// Deleted by an operator.
    pub flushed: u64,
    /// Overwritten by an import of a newer version.
    pub replaced: u64,
    /// Deleted by an import.
    pub deleted: u64,
    /// Searches for room that found an expired entry (counted in `expired` too).
    pub evicted_expired: u64,
    /// Evicted that had not been answered.
    pub evicted_half_open: u64,
    /// Evicted that had been answered, but were not assured.
    pub evicted_answered: u64,
    /// Connections refused for want of room.
    pub full: u64,
    /// Connections for which both buckets were full, whether room was made or not.
    pub bucket_full: u64,
    /// Connections not stored because another thread was first.
    pub exists: u64,
    /// Lookups given up because another thread stood still in the middle of a change.
    pub busy: u64,
}
