//! Where connections are kept.
use hashbrown::HashMap;

use super::entry::Connection;
use super::key::Key;

/// How much of an entry changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Nothing.
    None,
    /// Only time, windows and counters: what may lag behind elsewhere.
    Bookkeeping,
    /// State, answered, assured, agreed options: what another holder of the entry must know.
    Semantic,
}

/// Why a connection could not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// No room, and nothing that may be evicted.
    #[error("connection table full")]
    Full,
    /// Another thread stored one with this key meanwhile: look up again.
    #[error("connection exists already")]
    Exists,
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Stored.
    Done,
    /// The entry changed or went since it was looked up: look up again.
    Stale,
}

/// One VM's connections. A table shared between threads implements this for a handle.
pub trait ConnTable {
    /// The live entry with this key, copied. An entry whose time is over is not found.
    fn lookup(&mut self, key: &Key, now_ms: u64) -> Option<Connection>;

    /// Stores a new connection; raises its version.
    ///
    /// # Errors
    /// See [`InsertError`].
    fn insert(&mut self, connection: &Connection, now_ms: u64) -> Result<(), InsertError>;

    /// Replaces the entry from which `connection` was copied and changed (which still has the copy's version); raises its version by one.
    fn update(&mut self, connection: &Connection, change: Change) -> Stored;

    /// Deletes the entry from which `connection` was copied.
    fn remove(&mut self, connection: &Connection) -> Stored;

    /// Deletes entries whose time is over, looking at `budget` entries at most. Returns how many went.
    fn expire(&mut self, now_ms: u64, budget: usize) -> usize;

    /// Number of entries, those expired but not yet deleted included.
    fn len(&self) -> usize;

    /// No entry.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The plain table that says what any other must do: bounded, for one thread; for tests, replay and tools.
#[derive(Debug)]
pub struct ModelTable {
    entries: HashMap<Key, Connection>,
    capacity: usize,
    cursor: usize,
    /// Entries evicted for others.
    pub evicted: u64,
}

impl ModelTable {
    /// A table for `capacity` connections.
    pub fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), capacity, cursor: 0, evicted: 0 }
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.entries.values()
    }

    /// Makes room: an expired entry goes, else one that is not assured, else none.
    fn evict(&mut self, now_ms: u64) -> bool {
        let victim = self
            .entries
            .values()
            .filter(|c| c.is_expired(now_ms) || !c.assured())
            .min_by_key(|c| (!c.is_expired(now_ms), c.seen_reply(), c.remaining_ms(now_ms), c.key))
            .map(|c| c.key);
        let Some(key) = victim else { return false };
        self.evicted += 1;
        self.entries.remove(&key).is_some()
    }
}

impl ConnTable for ModelTable {
    fn lookup(&mut self, key: &Key, now_ms: u64) -> Option<Connection> {
        let found = *self.entries.get(key)?;
        if found.is_expired(now_ms) {
            self.entries.remove(key);
            return None;
        }
        Some(found)
    }

    fn insert(&mut self, connection: &Connection, now_ms: u64) -> Result<(), InsertError> {
        if let Some(old) = self.entries.get(&connection.key) {
            if !old.is_expired(now_ms) {
                return Err(InsertError::Exists);
            }
            self.entries.remove(&connection.key);
        }
        if self.entries.len() >= self.capacity && !self.evict(now_ms) {
            return Err(InsertError::Full);
        }
        let mut stored = *connection;
        stored.version = stored.version.wrapping_add(1);
        self.entries.insert(stored.key, stored);
        Ok(())
    }

    fn update(&mut self, connection: &Connection, _change: Change) -> Stored {
        match self.entries.get_mut(&connection.key) {
            Some(entry) if entry.version == connection.version => {
                *entry = *connection;
                entry.version = entry.version.wrapping_add(1);
                Stored::Done
            }
            _ => Stored::Stale,
        }
    }

    fn remove(&mut self, connection: &Connection) -> Stored {
        match self.entries.get(&connection.key) {
            Some(entry) if entry.version == connection.version => {
                self.entries.remove(&connection.key);
                Stored::Done
            }
            _ => Stored::Stale,
        }
    }

    fn expire(&mut self, now_ms: u64, budget: usize) -> usize {
        // Goes on where the last call stopped; the order changes only when entries come and go.
        let len = self.entries.len();
        let from = if self.cursor >= len { 0 } else { self.cursor };
        let to = from.saturating_add(budget).min(len);
        let mut at = 0;
        self.entries.retain(|_, c| {
            let looked_at = (from..to).contains(&at);
            at += 1;
            !(looked_at && c.is_expired(now_ms))
        });
        let gone = len - self.entries.len();
        self.cursor = to - gone;
        gone
    }

    fn len(&self) -> usize {
        self.entries.len()
    }
}
