//! What each round ships.
//!
//! - **Round 0** walks the whole table. What the walk hands over counts as collected, so nothing is sent twice without reason.
//! - **Each further round** sends what changed in meaning since: deletions as tombstones first (they make room), then new and changed
//!   entries. An entry that changed in several rounds running is *held back*: sending it again would be wasted. It goes when it
//!   comes to rest, that is, at the end of the first round in which it did not change, or in the final delta. Time left is used
//!   for entries of which only time, windows or counters changed (*lagging*), where that makes the final delta smaller: entries with
//!   traffic lag again at once, and reading them costs the PMD thread the cache lines that it writes ([`Refresh`]).
//! - **The final delta**, with the VM stopped, is the rest of all: what of round 0 is missing, deletions, changes, what was held back, and
//!   lagging entries as far as time allows.
//!
//! Deletions are drained into a list here all the time, since the table can note only one per 64 connections. If some are lost all the same,
//! what was sent is void: [`Rounds`] begins anew, and the next batch says so ([`Batch::clear`]).
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use ferry_dataplane::conntrack::{Connection, Cursor, Dirt, Key, Tombstone, newer};

use crate::batch::{BATCH_BYTES, Batch, CONNECTION_BYTES, Digest, Item, MAX_BATCH_ITEMS, TOMBSTONE_BYTES};
use crate::message::Mark;
use crate::table::SourceTable;

/// Bounds of what rounds remember and do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundLimits {
    /// Items of a batch, at most [`MAX_BATCH_ITEMS`].
    pub batch_items: usize,
    /// An entry that changed in this many rounds running is held back from the last of them on.
    pub hot_after: u32,
    /// Entries whose changes are remembered from round to round, and so most that are held back.
    pub hot_entries: usize,
    /// Deletions that wait to be sent.
    pub tombstones: usize,
    /// Lagging entries that one round sends beside its changes.
    pub lagging_per_round: usize,
    /// Lagging entries are sent again so long after the last of them were, however little it helps, milliseconds: what the destination has
    /// of windows and expiry is at most so old and the time that a pass over the table takes.
    pub lagging_interval_ms: u64,
}

impl Default for RoundLimits {
    fn default() -> Self {
        Self {
            batch_items: MAX_BATCH_ITEMS,
            hot_after: 2,
            hot_entries: 65_536,
            tombstones: 65_536,
            lagging_per_round: 16_384,
            lagging_interval_ms: 2000,
        }
    }
}

/// What one round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundReport {
    /// Its number.
    pub round: u32,
    /// It was the final delta.
    pub last: bool,
    /// Entries sent that are new or changed; in round 0, all.
    pub changed: u64,
    /// Deletions sent.
    pub deleted: u64,
    /// Lagging entries sent.
    pub lagging: u64,
    /// Entries that changed and were not sent.
    pub held: u64,
    /// Bytes of its batches on the wire, before compression.
    pub bytes: u64,
    /// From its beginning to its acknowledgement, milliseconds.
    pub duration_ms: u64,
}

/// How far the migration is from its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Entries that round 0 has not reached yet, about.
    pub walk_left: u64,
    /// Entries and deletions that a round would send now.
    pub entries_left: u64,
    /// Their bytes.
    pub bytes_left: u64,
    /// Entries that changed in meaning per second, in the last round.
    pub dirty_per_s: u64,
    /// Entries and deletions in the final delta if the VM stopped now.
    pub final_entries: u64,
    /// Their bytes.
    pub final_bytes: u64,
    /// How long the final delta would take, by the best rate seen so far, milliseconds rounded up; 0 while none is known.
    pub final_ms: u64,
}

/// What a round is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No round runs.
    Idle,
    /// Round 0.
    Walk,
    Dirty,
    /// Entries that were held back and have come to rest; in the final delta, all.
    Held,
    Lagging,
    /// All has been collected; tombstones may be left.
    Rest,
}

/// An entry that changed lately.
#[derive(Clone, Copy, Debug)]
struct Hot {
    /// The last round in which it changed.
    round: u32,
    /// How many rounds running it did.
    streak: u32,
}

/// When lagging entries are sent before the final delta: in passes over the table, of which each may take several rounds.
///
/// How many entries lag one round after a pass is how many will lag in the end, whatever is done: those with traffic all the time. As long
/// as there are not many more, another pass would be in vain.
#[derive(Clone, Copy, Debug, Default)]
struct Refresh {
    /// A pass is under way.
    runs: bool,
    /// When the last one came to its end.
    ended_ms: Option<u64>,
    /// How many lagged in the next round.
    since: Option<u32>,
}

impl Refresh {
    /// So many more than half of those that lag in any case are worth a pass.
    const FEW: u32 = 256;

    /// This round is to send lagging entries, of which there are so many.
    fn is_due(&mut self, lagging: u32, now_ms: u64, interval_ms: u64) -> bool {
        let Some(ended_ms) = self.ended_ms.filter(|_| !self.runs) else { return true };
        let since = *self.since.get_or_insert(lagging);
        lagging > since.saturating_add(since / 2).saturating_add(Self::FEW) || now_ms >= ended_ms + interval_ms
    }

    fn ended(&mut self, now_ms: u64) {
        *self = Self { runs: false, ended_ms: Some(now_ms), since: None };
    }
}

/// The sending side's rounds of one migration.
pub struct Rounds {
    limits: RoundLimits,
    stage: Stage,
    walk: Cursor,
    walked: u64,
    /// Round 0 has reached the table's end.
    complete: bool,
    dirty: Cursor,
    lagging: Cursor,
    lagging_left: usize,
    /// What this round is to do about them, once it is known.
    refreshes: Option<bool>,
    refresh: Refresh,
    /// No more lagging entries in the final delta.
    cut_lagging: bool,
    /// Where the search for entries that have come to rest goes on.
    rest_from: Option<Key>,
    tombstones: VecDeque<Tombstone>,
    hot: BTreeMap<Key, Hot>,
    /// Of [`Self::hot`], those whose last change was not sent.
    held: BTreeSet<Key>,
    begun: bool,
    clear: bool,
    restarts: u32,
    round: u32,
    last: bool,
    sequence: u64,
    items: u64,
    digest: Digest,
    report: RoundReport,
    began_ms: u64,
    /// Best bytes per millisecond of a round.
    best_rate: u64,
    dirty_per_s: u64,
    ready: Vec<Item>,
}

impl Rounds {
    /// Before round 0. The table's tracking must be on, and every PMD thread know it.
    pub fn new(limits: RoundLimits) -> Self {
        let limits = RoundLimits {
            batch_items: limits.batch_items.clamp(1, MAX_BATCH_ITEMS),
            tombstones: limits.tombstones.max(1),
            ..limits
        };
        Self {
            limits,
            stage: Stage::Idle,
            walk: Cursor::default(),
            walked: 0,
            complete: false,
            dirty: Cursor::default(),
            lagging: Cursor::default(),
            lagging_left: 0,
            refreshes: None,
            refresh: Refresh::default(),
            cut_lagging: false,
            rest_from: None,
            tombstones: VecDeque::new(),
            hot: BTreeMap::new(),
            held: BTreeSet::new(),
            begun: false,
            clear: false,
            restarts: 0,
            round: 0,
            last: false,
            sequence: 0,
            items: 0,
            digest: Digest::default(),
            report: RoundReport::default(),
            began_ms: 0,
            best_rate: 0,
            dirty_per_s: 0,
            ready: Vec::new(),
        }
    }

    /// The round that runs, or ran last.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// A round runs.
    pub fn is_running(&self) -> bool {
        self.stage != Stage::Idle
    }

    /// Round 0 has been sent, and nothing voided it since.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// How often it had to begin anew, because deletions were lost.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Begins a round; `last`: the final delta. May end one that runs: its items count to the new one.
    pub fn begin(&mut self, last: bool, now_ms: u64) {
        if self.begun {
            self.round += 1;
        }
        self.begun = true;
        self.last = last;
        self.cut_lagging = false;
        self.began_ms = now_ms;
        self.report = RoundReport { round: self.round, last, ..RoundReport::default() };
        self.lagging_left = self.limits.lagging_per_round;
        self.refreshes = last.then_some(true);
        self.rest_from = None;
        self.dirty = Cursor::default();
        if last {
            // Whatever a round left in the middle.
            self.lagging = Cursor::default();
        }
        self.stage = if self.complete { Stage::Dirty } else { Stage::Walk };
    }

    /// No lagging entries any more in this final delta.
    pub fn cut_lagging(&mut self) {
        self.cut_lagging = true;
    }

    /// Takes what the table noted of deletions; to be called every few milliseconds, whether a round runs or not.
    pub fn drain(&mut self, table: &impl SourceTable) {
        let room = self.limits.tombstones.saturating_sub(self.tombstones.len());
        let mut lost = false;
        table.deleted(room, &mut |dirt| note(dirt, &mut self.tombstones, &mut lost));
        if lost {
            self.restart();
        }
    }

    /// Deletions wait that should not wait much longer.
    pub fn is_pressed(&self) -> bool {
        self.tombstones.len() >= self.limits.tombstones / 2
    }

    fn restart(&mut self) {
        self.restarts += 1;
        self.complete = false;
        self.walk = Cursor::default();
        self.walked = 0;
        self.tombstones.clear();
        self.ready.clear();
        self.hot.clear();
        self.held.clear();
        self.rest_from = None;
        self.refresh = Refresh::default();
        self.clear = true;
        if self.is_running() {
            self.stage = Stage::Walk;
        }
    }

    /// Collects the next batch, looking at about `budget` slots at most, with at most `room_bytes`. `None`: nothing for now; if then
    /// [`Self::is_done`], nothing more in this round.
    pub fn next_batch(&mut self, table: &impl SourceTable, budget: usize, room_bytes: usize) -> Option<Batch> {
        if !self.is_running() {
            return None;
        }
        // What a collector hands over beyond the size of a batch: a word of the bitmap.
        let wanted = self.limits.batch_items.min(room_bytes.saturating_sub(BATCH_BYTES) / CONNECTION_BYTES);
        if wanted == 0 {
            return None;
        }
        let mut budget = budget.max(1);
        while self.ready.len() < wanted && budget > 0 && !self.is_exhausted() {
            let step = budget.min(wanted);
            budget -= step;
            self.collect(table, step);
        }
        if self.ready.is_empty() && !self.clear {
            return None;
        }
        let left = self.ready.split_off(self.ready.len().min(wanted));
        let items = std::mem::replace(&mut self.ready, left);
        let batch = Batch { round: self.round, sequence: self.sequence, clear: std::mem::take(&mut self.clear), items };
        self.sequence += 1;
        self.items += batch.items.len() as u64;
        self.digest.add(&batch);
        self.report.bytes += batch.wire_bytes() as u64;
        Some(batch)
    }

    /// All of this round has been handed over.
    pub fn is_done(&self) -> bool {
        self.is_exhausted() && self.ready.is_empty() && !self.clear
    }

    fn is_exhausted(&self) -> bool {
        self.stage == Stage::Rest && self.tombstones.is_empty()
    }

    /// Ends the round that [`Self::is_done`]: what the other side is told.
    pub fn end(&mut self) -> Mark {
        self.stage = Stage::Idle;
        Mark { round: self.round, batches: self.sequence, items: self.items, digest: self.digest.value() }
    }

    /// The round has been acknowledged.
    pub fn acknowledged(&mut self, now_ms: u64) -> RoundReport {
        let duration_ms = now_ms.saturating_sub(self.began_ms);
        self.report.duration_ms = duration_ms;
        self.best_rate = self.best_rate.max(self.report.bytes / duration_ms.max(1));
        if self.report.round > 0 {
            self.dirty_per_s = (self.report.changed + self.report.held) * 1000 / duration_ms.max(1);
        }
        self.report
    }

    /// Collects into `ready`, about `budget` slots' worth.
    fn collect(&mut self, table: &impl SourceTable, budget: usize) {
        self.send_tombstones(table, budget);
        match self.stage {
            Stage::Idle => {}
            Stage::Walk => {
                let (ready, report) = (&mut self.ready, &mut self.report);
                let before = ready.len();
                let more = table.walk(&mut self.walk, budget, &mut |c| ready.push(Item::Connection(*c)));
                let found = (ready.len() - before) as u64;
                report.changed += found;
                self.walked += found;
                if !more {
                    self.complete = true;
                    // The final delta takes what changed behind the walk, too.
                    self.stage = if self.last { Stage::Dirty } else { Stage::Rest };
                }
            }
            Stage::Dirty => self.collect_dirty(table, budget),
            Stage::Held => self.collect_held(table, budget),
            Stage::Lagging => self.collect_lagging(table, budget),
            Stage::Rest => {}
        }
    }

    fn send_tombstones(&mut self, table: &impl SourceTable, budget: usize) {
        for _ in 0..budget {
            let Some(gone) = self.tombstones.pop_front() else { return };
            self.hot.remove(&gone.key);
            // It may have come back already, with its new entry held back.
            if self.held.remove(&gone.key)
                && let Some(c) = table.get(&gone.key)
            {
                self.report.changed += 1;
                self.ready.push(Item::Connection(c));
                continue;
            }
            // The key lives again: its new entry is above this version, and marked.
            if table.get(&gone.key).is_some_and(|c| newer(c.version, gone.version)) {
                continue;
            }
            self.report.deleted += 1;
            self.ready.push(Item::Tombstone { key: gone.key, version: gone.version });
        }
    }

    fn collect_dirty(&mut self, table: &impl SourceTable, budget: usize) {
        let mut lost = false;
        let mut changed = Vec::new();
        let tombstones = &mut self.tombstones;
        let more = table.dirty(&mut self.dirty, budget, &mut |dirt| match dirt {
            Dirt::Changed(c) => changed.push(c),
            other => note(other, tombstones, &mut lost),
        });
        if lost {
            self.restart();
            return;
        }
        for connection in changed {
            if self.holds_back(&connection) {
                self.report.held += 1;
            } else {
                self.report.changed += 1;
                self.ready.push(Item::Connection(connection));
            }
        }
        if !more {
            self.stage = Stage::Held;
        }
    }

    /// Whether a changed entry is left for later; notes its change.
    fn holds_back(&mut self, connection: &Connection) -> bool {
        let key = connection.key;
        if self.last {
            self.held.remove(&key);
            return false;
        }
        let round = self.round;
        let Some(hot) = self.hot.get_mut(&key) else {
            if self.hot.len() < self.limits.hot_entries {
                self.hot.insert(key, Hot { round, streak: 1 });
            }
            return false;
        };
        if hot.round != round {
            hot.streak = if hot.round + 1 == round { hot.streak + 1 } else { 1 };
            hot.round = round;
        }
        if hot.streak >= self.limits.hot_after {
            self.held.insert(key);
            return true;
        }
        self.held.remove(&key);
        false
    }

    /// Sends what was held back and did not change in this round, forgets what has come to rest.
    fn collect_held(&mut self, table: &impl SourceTable, budget: usize) {
        if self.last {
            for _ in 0..budget {
                let Some(key) = self.held.pop_first() else {
                    self.stage = Stage::Lagging;
                    return;
                };
                self.send_current(table, &key);
            }
            return;
        }
        let mut at = self.rest_from.take();
        for _ in 0..budget {
            let next = match at {
                None => self.hot.iter().next(),
                Some(key) => self.hot.range((Bound::Excluded(key), Bound::Unbounded)).next(),
            };
            let Some((&key, hot)) = next else {
                self.stage = Stage::Lagging;
                return;
            };
            at = Some(key);
            if hot.round != self.round {
                self.hot.remove(&key);
                if self.held.remove(&key) {
                    self.send_current(table, &key);
                }
            }
        }
        self.rest_from = at;
    }

    /// Sends what was held back. If it has gone, there is a tombstone.
    fn send_current(&mut self, table: &impl SourceTable, key: &Key) {
        if let Some(c) = table.get(key) {
            self.report.changed += 1;
            self.ready.push(Item::Connection(c));
        }
    }

    fn collect_lagging(&mut self, table: &impl SourceTable, budget: usize) {
        let (limits, refresh, began_ms) = (&self.limits, &mut self.refresh, self.began_ms);
        let refreshes = *self
            .refreshes
            .get_or_insert_with(|| refresh.is_due(table.uncollected().lagging, began_ms, limits.lagging_interval_ms));
        if !refreshes || if self.last { self.cut_lagging } else { self.lagging_left == 0 } {
            self.stage = Stage::Rest;
            return;
        }
        self.refresh.runs = true;
        let ready = &mut self.ready;
        let before = ready.len();
        let more = table.lagging(&mut self.lagging, budget, &mut |c| ready.push(Item::Connection(*c)));
        let found = ready.len() - before;
        self.report.lagging += found as u64;
        self.lagging_left = self.lagging_left.saturating_sub(found);
        if !more {
            self.refresh.ended(self.began_ms);
            self.stage = Stage::Rest;
        }
    }

    /// How much is left, and how long the rest would take.
    pub fn estimate(&self, table: &impl SourceTable) -> Estimate {
        let uncollected = table.uncollected();
        let walk_left = if self.complete { 0 } else { (table.len() as u64).saturating_sub(self.walked) };
        let deletions = self.tombstones.len() as u64 + u64::from(uncollected.deleted);
        let changed = u64::from(uncollected.changed) + walk_left;
        let bytes = |connections: u64, deletions: u64| {
            connections * CONNECTION_BYTES as u64 + deletions * TOMBSTONE_BYTES as u64
        };
        let last = changed + self.held.len() as u64 + u64::from(uncollected.lagging);
        let final_bytes = bytes(last, deletions);
        Estimate {
            walk_left,
            entries_left: changed + deletions,
            bytes_left: bytes(changed, deletions),
            dirty_per_s: self.dirty_per_s,
            final_entries: last + deletions,
            final_bytes,
            final_ms: if self.best_rate == 0 { 0 } else { final_bytes.div_ceil(self.best_rate) },
        }
    }

    /// Bytes of memory that grow with what happens: for the bound on it.
    pub fn memory_bytes(&self) -> usize {
        self.tombstones.len() * size_of::<Tombstone>()
            + self.hot.len() * (size_of::<Key>() + size_of::<Hot>())
            + self.held.len() * size_of::<Key>()
            + self.ready.len() * size_of::<Item>()
    }
}

fn note(dirt: Dirt, tombstones: &mut VecDeque<Tombstone>, lost: &mut bool) {
    match dirt {
        Dirt::Deleted(gone) => tombstones.push_back(gone),
        Dirt::Overflow => *lost = true,
        // Not among deletions.
        Dirt::Changed(_) => {}
    }
}
