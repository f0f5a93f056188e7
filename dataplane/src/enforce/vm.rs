//! What the ports of one VM share: its connections, its limits, its unfinished datagrams.
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, TryLockError};

use serde::Serialize;

use super::VmId;
use crate::conntrack::{
    Change, ConnHandle, ConnMap, Connection, Cursor, Dirt, FragmentQueue, FragmentStats, Imported, Key, MapError,
    MapStats, Observer, PickUp, Removal, TrackConfig,
};
use crate::firewall::limits::{LimitsConfig, LimitsStatus, VmLimits};
use crate::firewall::token_bucket::{Rate, TokenBucket};

/// Connections a VM's table holds unless configured.
pub const DEFAULT_CAPACITY: u32 = 1_000_000;
/// Events per second that one VM may cause; the rest is counted as lost, so that a flood against one VM hides no other's.
const EVENTS_PER_SECOND: u32 = 2000;
const EVENT_BURST: u32 = 1000;
/// How often a PMD thread tries for the fragment memory that another one uses.
const FRAGMENT_TRIES: u32 = 2000;
/// Entries looked at in one step of a flush.
const FLUSH_STEP: usize = 4096;

/// A VM's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmOptions {
    /// Unique name.
    pub name: String,
    /// Connections its table holds. The memory is reserved at once and taken as it is used.
    pub capacity: u32,
    /// How its connections are tracked.
    pub track: TrackConfig,
    /// How many connections it may have.
    pub limits: LimitsConfig,
    /// Every new connection is reported, not only those of rules that say so.
    pub log_new: bool,
}

impl VmOptions {
    /// The defaults, under a name.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            capacity: DEFAULT_CAPACITY,
            track: TrackConfig::default(),
            limits: LimitsConfig::default(),
            log_new: false,
        }
    }
}

impl VmOptions {
    /// No more connections than the table holds.
    fn effective_limits(&self) -> LimitsConfig {
        LimitsConfig { max_connections: self.limits.max_connections.min(self.capacity), ..self.limits }
    }
}

/// One VM's firewall state, shared by all PMD threads and the control side.
pub struct VmFirewall {
    id: VmId,
    name: String,
    map: ConnMap,
    limits: VmLimits,
    /// Fragments are no fast path; the lock is never waited for without bound.
    fragments: Mutex<FragmentQueue>,
    log_new: AtomicBool,
    pick_up: PickUp,
    events: TokenBucket,
}

/// What [`VmFirewall::status`] tells.
#[derive(Clone, Debug, Serialize)]
pub struct VmStatus {
    /// Its number.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// The table.
    pub table: MapStats,
    /// The limits, and how far they are used.
    pub limits: LimitsStatus,
    /// Fragments.
    pub fragments: FragmentStats,
    /// Bytes of fragments held now.
    pub fragment_bytes_held: usize,
}

impl VmFirewall {
    /// An empty table. `seed`: random, so that nobody outside can choose colliding connections.
    ///
    /// # Errors
    /// No memory.
    pub fn new(id: VmId, options: &VmOptions, seed: [u64; 2]) -> Result<Self, MapError> {
        Ok(Self {
            id,
            name: options.name.clone(),
            map: ConnMap::new(options.capacity, seed)?,
            limits: VmLimits::new(&options.effective_limits(), seed[0] ^ seed[1].rotate_left(32)),
            fragments: Mutex::new(FragmentQueue::new()),
            log_new: AtomicBool::new(options.log_new),
            pick_up: PickUp::default(),
            events: TokenBucket::default(),
        })
    }

    /// Changes what can be changed in place: limits and logging.
    pub(crate) fn reconfigure(&self, options: &VmOptions) {
        self.limits.reconfigure(&options.effective_limits());
        self.log_new.store(options.log_new, Relaxed);
    }

    /// Its number.
    pub fn id(&self) -> VmId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its connections.
    pub fn map(&self) -> &ConnMap {
        &self.map
    }

    /// Its limits.
    pub fn limits(&self) -> &VmLimits {
        &self.limits
    }

    /// The table for one thread; `thread` tells apart the threads that use it at the same time.
    #[inline]
    pub fn table(&self, thread: usize) -> ConnHandle<'_> {
        self.map.handle(self, thread)
    }

    #[inline]
    pub(crate) fn pick_up(&self) -> &PickUp {
        &self.pick_up
    }

    #[inline]
    pub(crate) fn logs_new(&self) -> bool {
        self.log_new.load(Relaxed)
    }

    #[inline]
    pub(crate) fn may_report(&self, now_ns: u64) -> bool {
        self.events.take(Rate::new(EVENTS_PER_SECOND, EVENT_BURST), now_ns)
    }

    /// The fragments, unless another thread keeps them for long.
    pub(crate) fn try_fragments(&self) -> Option<MutexGuard<'_, FragmentQueue>> {
        for _ in 0..FRAGMENT_TRIES {
            match self.fragments.try_lock() {
                Ok(queue) => return Some(queue),
                // Whoever panicked left a queue that is consistent between its calls.
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => core::hint::spin_loop(),
            }
        }
        None
    }

    /// Deletes what is overdue, looking at `budget` entries. Returns how many went.
    pub(crate) fn sweep(&self, now_ms: u64, budget: usize) -> usize {
        if let Ok(mut queue) = self.fragments.try_lock()
            && !queue.is_empty()
        {
            queue.expire(now_ms, budget.min(16));
        }
        self.map.sweep(now_ms, budget, self)
    }

    /// Deletes the connections that `choose` picks, while traffic goes on. Returns how many. For the control side.
    pub fn flush(&self, choose: &dyn Fn(&Connection) -> bool) -> u64 {
        let mut cursor = Cursor::default();
        let mut gone = 0;
        let mut condition = |connection: &Connection| {
            let chosen = choose(connection);
            gone += u64::from(chosen);
            chosen
        };
        while self.map.flush(&mut cursor, FLUSH_STEP, self, &mut condition) {}
        gone
    }

    /// Until the packet path's clock shows `until_ms`, milliseconds, TCP connections are picked up in the middle as with
    /// [`TrackConfig::tcp_loose`], wherever the policy allows the packet to open a connection and the limits have room. Afterwards
    /// this VM's own settings hold again; what was picked up goes on. A time that has passed, such as 0, ends it at once. It stays
    /// with the VM when its settings change, not when another table takes the place of this one.
    pub fn pick_up_until(&self, until_ms: u64) {
        self.pick_up.set_until(until_ms);
    }

    /// Forgets the windows of all TCP connections that are past their handshake: each side's begins anew with its next packet, as if
    /// picked up in the middle, while states, scales and the policy's decisions stay ([`Connection::forget_windows`]). For a table
    /// whose connections went on elsewhere unseen. Packets may use the table meanwhile; before each connection's turn they are judged
    /// by the old windows. Returns how many had windows. For the control side: walks
    /// the whole table.
    pub fn forget_windows(&self) -> u64 {
        let mut cursor = Cursor::default();
        let mut forgotten = 0;
        let mut forget = |connection: &mut Connection| match connection.forget_windows() {
            true => Change::Bookkeeping,
            false => Change::None,
        };
        loop {
            let (changed, more) = self.map.amend(&mut cursor, FLUSH_STEP, &mut forget);
            forgotten += changed as u64;
            if !more {
                return forgotten;
            }
        }
    }

    /// Takes over the connections of another VM's table, step by step while traffic changes them.
    pub(crate) fn adopt_all(&self, other: &Self, now_ms: u64) {
        let mut cursor = Cursor::default();
        while other.map.walk(&mut cursor, FLUSH_STEP, &mut |c| self.adopt(c, now_ms)) {}
    }

    /// Takes over what changed in the other table since its changes are tracked.
    pub(crate) fn adopt_changes(&self, other: &Self, now_ms: u64) {
        let mut cursor = Cursor::default();
        while other.map.collect_dirty(&mut cursor, FLUSH_STEP, &mut |dirt| match dirt {
            Dirt::Changed(connection) => self.adopt(&connection, now_ms),
            Dirt::Deleted(gone) => {
                self.map.delete_matching(&gone.key, gone.version, self);
            }
            // More ended than could be noted: those that are not known to have ended expire here.
            Dirt::Overflow => {}
        }) {}
    }

    /// Takes over one connection, unless a newer version of it is here.
    fn adopt(&self, connection: &Connection, now_ms: u64) {
        if !connection.is_expired(now_ms) {
            self.import(connection, now_ms);
        }
    }

    /// Takes in a connection from elsewhere, counting it in this VM's limits without asking them. The caller has made sure that
    /// it is one of this VM's; the rules judge it on its next packet, when its generation is not theirs.
    pub fn import(&self, connection: &Connection, now_ms: u64) -> Imported {
        let source = connection.opener();
        let admission = self.limits.adopt(source, connection.decision.counts_half_open());
        let mut connection = *connection;
        connection.decision = connection.decision.with_admission(admission);
        let imported = self.map.import(&connection, now_ms, self);
        if matches!(imported, Imported::Older | Imported::Full) {
            self.limits.release(source, admission);
        }
        imported
    }

    /// Deletes a connection that has ended elsewhere, unless its version here is newer.
    pub fn delete(&self, key: &Key, version: u32) -> bool {
        self.map.delete_matching(key, version, self)
    }

    /// How it is.
    pub fn status(&self, now_ns: u64) -> VmStatus {
        let (fragments, fragment_bytes_held) = match self.fragments.lock() {
            Ok(queue) => (queue.stats(), queue.bytes_held()),
            Err(poisoned) => (poisoned.get_ref().stats(), poisoned.get_ref().bytes_held()),
        };
        VmStatus {
            id: self.id,
            name: self.name.clone(),
            table: self.map.stats(),
            limits: self.limits.status(now_ns),
            fragments,
            fragment_bytes_held,
        }
    }
}

impl Observer for VmFirewall {
    fn removed(&self, connection: &Connection, _why: Removal) {
        if let Some(admission) = connection.decision.admission() {
            self.limits.release(connection.opener(), admission);
        }
    }
}
