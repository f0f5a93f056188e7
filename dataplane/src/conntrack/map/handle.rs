//! A thread's access to the map.
use super::super::entry::Connection;
use super::super::key::Key;
use super::super::table::{Change, ConnTable, InsertError, Stored};
use super::slot::{KeyWords, Read, Slot};
use super::stats::Counters;
use super::{ConnMap, Observer, Removal};

/// One thread's way to the map, for the time of a burst or longer. Remembers where it found the last connection, so that
/// [`ConnTable::update`] and [`ConnTable::remove`] after a lookup do not search again.
pub struct ConnHandle<'a> {
    map: &'a ConnMap,
    observer: &'a dyn Observer,
    thread: usize,
    /// Where the last lookup ended; a guess.
    last: u32,
}

impl<'a> ConnHandle<'a> {
    pub(super) fn new(map: &'a ConnMap, observer: &'a dyn Observer, thread: usize) -> Self {
        Self { map, observer, thread, last: 0 }
    }

    /// The map.
    pub fn map(&self) -> &'a ConnMap {
        self.map
    }

    /// As [`ConnTable::lookup`], for a key whose hash is known. An expired entry is deleted and not found.
    ///
    /// `None` also for an entry that another thread has been changing for about ten microseconds, that is, when that thread was
    /// preempted in the middle of some twenty stores; it is as if the packet had come before the connection, and an insertion then says
    /// [`InsertError::Exists`].
    #[inline]
    pub fn lookup_hashed(&mut self, key: &Key, hash: u64, now_ms: u64) -> Option<Connection> {
        let words = key.words();
        let places = self.map.index.places(hash);
        let (number, slot, meta) = self.map.index.find(&places, |number, _| {
            let slot = self.map.slab.slot(number)?;
            slot.entry_of(&words).map(|meta| (number, slot, meta))
        })?;
        self.last = number;
        if meta.is_live()
            && !meta.is_expired(now_ms)
            && let found @ Some(_) = slot.copy(meta)
        {
            return found;
        }
        self.lookup_again(slot, &words, now_ms)
    }

    /// The entry that was found has expired, or is being changed.
    #[cold]
    fn lookup_again(&self, slot: &Slot, key: &KeyWords, now_ms: u64) -> Option<Connection> {
        match slot.read(key) {
            Read::Live(connection) if connection.is_expired(now_ms) => {
                self.map.remove_copied(self.last, &connection, Removal::Expired, self.observer, self.thread);
                None
            }
            Read::Live(connection) => Some(connection),
            Read::Absent => None,
            Read::Busy => {
                Counters::count(&self.map.counters(self.thread).busy);
                None
            }
        }
    }
}

impl ConnHandle<'_> {
    /// Evicts one connection as a full table would, because a limit below its capacity is reached. False when nothing may go.
    #[cold]
    pub fn make_room(&mut self, now_ms: u64) -> bool {
        self.map.evict(now_ms, self.observer, self.thread)
    }
}

impl ConnTable for ConnHandle<'_> {
    #[inline]
    fn lookup(&mut self, key: &Key, now_ms: u64) -> Option<Connection> {
        self.lookup_hashed(key, self.map.hash(key), now_ms)
    }

    #[inline]
    fn insert(&mut self, connection: &Connection, now_ms: u64) -> Result<(), InsertError> {
        self.last = self.map.insert(connection, None, now_ms, self.observer, self.thread)?;
        Ok(())
    }

    #[inline]
    fn update(&mut self, connection: &Connection, change: Change) -> Stored {
        if let Some(stored) = self.map.update_at(self.last, connection, change) {
            return stored;
        }
        self.map.update(connection, change)
    }

    #[inline]
    fn remove(&mut self, connection: &Connection) -> Stored {
        if self.map.remove_copied(self.last, connection, Removal::Finished, self.observer, self.thread) {
            return Stored::Done;
        }
        self.map.remove_found(connection, Removal::Finished, self.observer, self.thread)
    }

    fn expire(&mut self, now_ms: u64, budget: usize) -> usize {
        self.map.sweep_as(now_ms, budget, self.observer, self.thread)
    }

    fn len(&self) -> usize {
        self.map.len()
    }
}
