//! What a migration needs of a VM's connection table, on each side.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use std::sync::Arc;

use ferry_dataplane::conntrack::{ConnMap, Connection, Cursor, Decision, Dirt, Imported, Key, Uncollected};
use ferry_dataplane::enforce::VmFirewall;
use ferry_dataplane::firewall::limits::Admission;

/// The table at the source: read while traffic changes it, and never changed. Semantics are those of the functions of [`ConnMap`] that
/// the methods are named after.
pub trait SourceTable {
    /// As [`ConnMap::walk_collecting`].
    fn walk(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool;
    /// As [`ConnMap::collect_deleted`].
    fn deleted(&self, budget: usize, f: &mut dyn FnMut(Dirt)) -> usize;
    /// As [`ConnMap::collect_dirty`].
    fn dirty(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(Dirt)) -> bool;
    /// As [`ConnMap::collect_lagging`].
    fn lagging(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool;
    /// As [`ConnMap::get`].
    fn get(&self, key: &Key) -> Option<Connection>;
    /// As [`ConnMap::uncollected`].
    fn uncollected(&self) -> Uncollected;
    /// Entries.
    fn len(&self) -> usize;
    /// Most entries.
    fn capacity(&self) -> u32;
    /// No entry.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A table at the destination that nobody else uses before the commit. A clone is another handle to the same table.
pub trait TargetTable: Clone {
    /// The VM may have this connection: the local address and the zone are one of its ports'.
    fn accepts(&self, connection: &Connection) -> bool;
    /// As [`ConnMap::import`].
    fn import(&self, connection: &Connection, now_ms: u64) -> Imported;
    /// As [`ConnMap::delete_matching`].
    fn delete(&self, key: &Key, version: u32) -> bool;
    /// There is an entry with this key.
    fn has(&self, key: &Key) -> bool;
    /// Empties the table.
    fn clear(&self);
    /// Entries.
    fn len(&self) -> usize;
    /// Most entries.
    fn capacity(&self) -> u32;
    /// No entry.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl SourceTable for ConnMap {
    fn walk(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        self.walk_collecting(cursor, budget, f)
    }

    fn deleted(&self, budget: usize, f: &mut dyn FnMut(Dirt)) -> usize {
        self.collect_deleted(budget, f)
    }

    fn dirty(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(Dirt)) -> bool {
        self.collect_dirty(cursor, budget, f)
    }

    fn lagging(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        self.collect_lagging(cursor, budget, f)
    }

    fn get(&self, key: &Key) -> Option<Connection> {
        ConnMap::get(self, key)
    }

    fn uncollected(&self) -> Uncollected {
        ConnMap::uncollected(self)
    }

    fn len(&self) -> usize {
        ConnMap::len(self)
    }

    fn capacity(&self) -> u32 {
        ConnMap::capacity(self)
    }
}

impl SourceTable for VmFirewall {
    fn walk(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        self.map().walk_collecting(cursor, budget, f)
    }

    fn deleted(&self, budget: usize, f: &mut dyn FnMut(Dirt)) -> usize {
        self.map().collect_deleted(budget, f)
    }

    fn dirty(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(Dirt)) -> bool {
        self.map().collect_dirty(cursor, budget, f)
    }

    fn lagging(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        self.map().collect_lagging(cursor, budget, f)
    }

    fn get(&self, key: &Key) -> Option<Connection> {
        self.map().get(key)
    }

    fn uncollected(&self) -> Uncollected {
        self.map().uncollected()
    }

    fn len(&self) -> usize {
        self.map().len()
    }

    fn capacity(&self) -> u32 {
        self.map().capacity()
    }
}

impl<T: SourceTable + ?Sized> SourceTable for Arc<T> {
    fn walk(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        (**self).walk(cursor, budget, f)
    }

    fn deleted(&self, budget: usize, f: &mut dyn FnMut(Dirt)) -> usize {
        (**self).deleted(budget, f)
    }

    fn dirty(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(Dirt)) -> bool {
        (**self).dirty(cursor, budget, f)
    }

    fn lagging(&self, cursor: &mut Cursor, budget: usize, f: &mut dyn FnMut(&Connection)) -> bool {
        (**self).lagging(cursor, budget, f)
    }

    fn get(&self, key: &Key) -> Option<Connection> {
        (**self).get(key)
    }

    fn uncollected(&self) -> Uncollected {
        (**self).uncollected()
    }

    fn len(&self) -> usize {
        (**self).len()
    }

    fn capacity(&self) -> u32 {
        (**self).capacity()
    }
}

/// Who may have which connection, as [`TargetTable::accepts`] asks.
pub type Owns = dyn Fn(&Connection) -> bool + Send + Sync;

/// A firewall of its own for a VM that is to come, with the rule by which connections are accepted.
#[derive(Clone)]
pub struct Staging {
    firewall: Arc<VmFirewall>,
    owns: Arc<Owns>,
}

impl Staging {
    /// `owns`: the connection's local address and zone belong to the VM's ports
    /// ([`ferry_dataplane::firewall::spoof::SpoofTable::owns`]).
    pub fn new(firewall: Arc<VmFirewall>, owns: Arc<Owns>) -> Self {
        Self { firewall, owns }
    }

    /// The firewall.
    pub fn firewall(&self) -> &Arc<VmFirewall> {
        &self.firewall
    }
}

impl TargetTable for Staging {
    fn accepts(&self, connection: &Connection) -> bool {
        (self.owns)(connection)
    }

    fn import(&self, connection: &Connection, now_ms: u64) -> Imported {
        let mut unjudged = *connection;
        unjudged.policy_generation = 0;
        // How it is counted is this host's affair; whether it is half-open shows its state.
        let admission = Admission { tracked_source: false, half_open: connection.is_half_open() };
        unjudged.decision = Decision::default().with_admission(admission);
        self.firewall.import(&unjudged, now_ms)
    }

    fn delete(&self, key: &Key, version: u32) -> bool {
        self.firewall.delete(key, version)
    }

    fn has(&self, key: &Key) -> bool {
        self.firewall.map().get(key).is_some()
    }

    fn clear(&self) {
        self.firewall.flush(&|_| true);
    }

    fn len(&self) -> usize {
        self.firewall.map().len()
    }

    fn capacity(&self) -> u32 {
        self.firewall.map().capacity()
    }
}
