//! Who wants to know that a connection went.
use super::super::entry::Connection;

/// Why an entry went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Removal {
    /// Its protocol ended it, or its owner deleted it.
    Finished,
    /// Its time was over.
    Expired,
    /// It made room for another.
    Evicted,
    /// An operator deleted it.
    Flushed,
    /// An import brought a newer version, which is stored in its stead.
    Replaced,
    /// An import said that it is gone.
    Deleted,
}

impl Removal {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Finished, Self::Expired, Self::Evicted, Self::Flushed, Self::Replaced, Self::Deleted];
}

/// Told of every entry that goes, exactly once, by the thread that took it out: the place to release what the entry counted against.
///
/// Called on PMD threads: must not block, allocate or panic.
pub trait Observer {
    /// `connection` is the entry as it was stored last.
    fn removed(&self, connection: &Connection, why: Removal);
}

/// Nobody.
impl Observer for () {
    fn removed(&self, _: &Connection, _: Removal) {}
}
