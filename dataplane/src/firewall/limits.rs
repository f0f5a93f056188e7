//! Limits per VM: how many connections it may have, how many of them half-open, how many new ones per second; and the same for
//! each single source within them.
//!
//! Lock-free: several PMD threads admit and release connections of one VM at once. The source of a connection is the
//! address that opened it, whichever side of the VM it is on.
//!
//! Sources are kept in a table of bounded size. A source that has connections keeps its place; one that has none gives it up
//! to another when needed. When all places it could take are held, a source is *untracked*: only the VM's limits bind it.
//! Nobody gets around a limit on a single source so, except by having connections from many sources, which a limit per
//! source could not hold back in the first place; the VM's limits still do.
//!
//! The numbers are exact but for races: `n` threads that admit at the same moment may exceed a source's limit by at most `n - 1`.
//! The VM's own limits are never exceeded.
use core::net::IpAddr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::prefix_index::fold;
use super::token_bucket::{MAX_RATE, Rate, TokenBucket};
use super::validate::Errors;

/// Most connections of one source that can be told apart; a larger limit per source is refused.
pub const MAX_PER_SOURCE: u32 = 65_535;
/// Places one source may take.
const WAYS: usize = 8;
/// Most tracked sources.
pub const MAX_TRACKED_SOURCES: u32 = 1 << 20;
/// Races lost in a row before a source counts as untracked.
const MAX_RACES: u32 = 64;

/// Limits of one VM. 0 means no limit, except for `max_connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Connections of all kinds.
    pub max_connections: u32,
    /// Connections that only one side has been heard of (TCP: not established).
    pub max_half_open: u32,
    /// New connections per second, on average.
    pub new_per_second: u32,
    /// New connections at once; 0: as many as `new_per_second`.
    pub burst: u32,
    /// The same for each source.
    pub per_source: SourceLimits,
    /// Sources whose connections are counted one by one; rounded up to a power of two. 16 bytes each.
    pub tracked_sources: u32,
}

/// Limits of each single source of a VM's connections. 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceLimits {
    /// Connections of all kinds, at most [`MAX_PER_SOURCE`].
    pub max_connections: u32,
    /// Half-open connections, at most [`MAX_PER_SOURCE`].
    pub max_half_open: u32,
    /// New connections per second, on average.
    pub new_per_second: u32,
    /// New connections at once; 0: as many as `new_per_second`.
    pub burst: u32,
}

impl SourceLimits {
    const fn is_unlimited(&self) -> bool {
        self.max_connections == 0 && self.max_half_open == 0 && self.new_per_second == 0
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_connections: 1_000_000,
            max_half_open: 0,
            new_per_second: 0,
            burst: 0,
            per_source: SourceLimits::default(),
            tracked_sources: 4096,
        }
    }
}

impl LimitsConfig {
    pub(crate) fn check(&self, errors: &mut Errors, path: &str) {
        if self.max_connections == 0 {
            errors.add(format_args!("{path}.max_connections"), "must be at least 1");
        }
        for (path, rate) in [
            (format!("{path}.new_per_second"), self.new_per_second),
            (format!("{path}.per_source.new_per_second"), self.per_source.new_per_second),
        ] {
            errors.at_most(path, rate as usize, MAX_RATE as usize, "new connections per second");
        }
        for (path, most) in [
            (format!("{path}.per_source.max_connections"), self.per_source.max_connections),
            (format!("{path}.per_source.max_half_open"), self.per_source.max_half_open),
        ] {
            errors.at_most(path, most as usize, MAX_PER_SOURCE as usize, "connections of one source");
        }
        let path = format!("{path}.tracked_sources");
        errors.at_most(&path, self.tracked_sources as usize, MAX_TRACKED_SOURCES as usize, "sources");
        if self.tracked_sources == 0 && !self.per_source.is_unlimited() {
            errors.add(path, "limits per source need tracked sources");
        }
    }
}

macro_rules! limit_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Which limit refused a new connection. The names are part of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum LimitReason { $($(#[$doc])* $variant,)* }
        impl LimitReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [LimitReason] = &[$(LimitReason::$variant,)*];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in stats, metrics and explanations.
            pub const fn name(self) -> &'static str {
                match self { $(LimitReason::$variant => $name,)* }
            }
        }
    };
}

limit_reasons! {
    /// The VM has all its connections.
    Connections = "limit_connections",
    /// The VM has all its half-open connections.
    HalfOpen = "limit_half_open",
    /// The VM opens connections too fast.
    Rate = "limit_rate",
    /// The source has all its connections.
    SourceConnections = "limit_source_connections",
    /// The source has all its half-open connections.
    SourceHalfOpen = "limit_source_half_open",
    /// The source opens connections too fast.
    SourceRate = "limit_source_rate",
}

/// How an admitted connection is counted. To be kept with the connection (two bits) and handed back when it changes or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a connection that is not released counts for ever"]
pub struct Admission {
    /// Its source is counted.
    pub tracked_source: bool,
    /// It counts as half-open.
    pub half_open: bool,
}

/// A source's place: who, how many connections, how many half-open, in one word.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Part of the source's hash that its place in the table does not tell.
    tag: u32,
    connections: u16,
    half_open: u16,
}

impl Place {
    const fn from_bits(bits: u64) -> Self {
        Self { tag: (bits >> 32) as u32, connections: (bits >> 16) as u16, half_open: bits as u16 }
    }
    const fn to_bits(self) -> u64 {
        (self.tag as u64) << 32 | (self.connections as u64) << 16 | self.half_open as u64
    }
}

/// One VM's limits, and how far they are used. Survives changes of the limits.
#[derive(Debug)]
pub struct VmLimits {
    max_connections: AtomicU32,
    max_half_open: AtomicU32,
    rate: AtomicRate,
    source_connections: AtomicU32,
    source_half_open: AtomicU32,
    source_rate: AtomicRate,
    limit_sources: AtomicU32,

    connections: AtomicU32,
    half_open: AtomicU32,
    bucket: TokenBucket,
    places: Box<[AtomicU64]>,
    buckets: Box<[TokenBucket]>,
    seed: u64,

    admitted: AtomicU64,
    adopted: AtomicU64,
    untracked: AtomicU64,
    refused: [AtomicU64; LimitReason::COUNT],
}

/// A [`Rate`] that can be changed. A reader may see the parts of two different rates once; both are harmless to a bucket.
#[derive(Debug, Default)]
struct AtomicRate(AtomicU64, AtomicU64);

impl AtomicRate {
    /// True when it changed.
    fn store(&self, rate: Rate) -> bool {
        let (interval, tolerance) = rate.to_parts();
        let changed = self.load() != rate;
        self.1.store(tolerance, Relaxed);
        self.0.store(interval, Relaxed);
        changed
    }
    #[inline]
    fn load(&self) -> Rate {
        Rate::from_parts(self.0.load(Relaxed), self.1.load(Relaxed))
    }
}

fn rate(per_second: u32, burst: u32) -> Rate {
    Rate::new(per_second, if burst == 0 { per_second } else { burst })
}

/// A limit as it is compared: 0 is none.
const fn or_unlimited(limit: u32) -> u32 {
    if limit == 0 { u32::MAX } else { limit }
}

/// What [`VmLimits::status`] tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LimitsStatus {
    /// Connections now.
    pub connections: u32,
    /// Of these, half-open ones.
    pub half_open: u32,
    /// Limit on connections.
    pub max_connections: u32,
    /// Limit on half-open connections; `None`: no limit.
    pub max_half_open: Option<u32>,
    /// New connections that would be admitted at once; `None`: no limit.
    pub tokens: Option<u64>,
    /// Connections admitted so far.
    pub admitted: u64,
    /// Connections taken over without asking the limits.
    pub adopted: u64,
    /// Connections refused so far, by [`LimitReason`].
    pub refused: [u64; LimitReason::COUNT],
    /// Sources that have connections now, of those that are counted.
    pub sources: u32,
    /// Sources that can be counted.
    pub source_capacity: u32,
    /// Connections whose source could not be counted.
    pub untracked: u64,
    /// The most connections that any counted source has.
    pub largest_source: u32,
}

impl LimitsStatus {
    /// Refused for `reason` so far.
    pub fn refused_for(&self, reason: LimitReason) -> u64 {
        self.refused.get(reason as usize).copied().unwrap_or(0)
    }

    /// The limits that leave no room at this moment.
    pub fn exhausted(&self) -> Vec<LimitReason> {
        let full = [
            (self.connections >= self.max_connections, LimitReason::Connections),
            (self.max_half_open.is_some_and(|most| self.half_open >= most), LimitReason::HalfOpen),
            (self.tokens == Some(0), LimitReason::Rate),
        ];
        full.into_iter().filter(|(full, _)| *full).map(|(_, reason)| reason).collect()
    }
}

impl VmLimits {
    /// Nothing used yet. Memory is allocated here, once. `seed`: a random number, so that nobody can choose sources that
    /// compete for one place.
    pub fn new(config: &LimitsConfig, seed: u64) -> Self {
        let places = match config.tracked_sources {
            0 => 0,
            n => n.min(MAX_TRACKED_SOURCES).next_power_of_two().max(WAYS as u32) as usize,
        };
        let limits = Self {
            max_connections: AtomicU32::default(),
            max_half_open: AtomicU32::default(),
            rate: AtomicRate::default(),
            source_connections: AtomicU32::default(),
            source_half_open: AtomicU32::default(),
            source_rate: AtomicRate::default(),
            limit_sources: AtomicU32::default(),
            connections: AtomicU32::default(),
            half_open: AtomicU32::default(),
            bucket: TokenBucket::default(),
            places: (0..places).map(|_| AtomicU64::new(0)).collect(),
            buckets: (0..places).map(|_| TokenBucket::default()).collect(),
            seed,
            admitted: AtomicU64::default(),
            adopted: AtomicU64::default(),
            untracked: AtomicU64::default(),
            refused: Default::default(),
        };
        limits.reconfigure(config);
        limits
    }

    /// Changes the limits. Connections beyond the new ones stay; new ones are refused until there is room. The number of tracked
    /// sources stays as it was made. When limits per source are switched on, connections from before are not counted for them.
    pub fn reconfigure(&self, config: &LimitsConfig) {
        self.max_connections.store(config.max_connections, Relaxed);
        self.max_half_open.store(or_unlimited(config.max_half_open), Relaxed);
        // A bucket emptied under a slow rate would stay so for long under a fast one.
        if self.rate.store(rate(config.new_per_second, config.burst)) {
            self.bucket.refill();
        }
        let source = config.per_source;
        let most = |limit: u32| if limit == 0 { MAX_PER_SOURCE } else { limit.min(MAX_PER_SOURCE) };
        self.source_connections.store(most(source.max_connections), Relaxed);
        self.source_half_open.store(most(source.max_half_open), Relaxed);
        if self.source_rate.store(rate(source.new_per_second, source.burst)) {
            self.buckets.iter().for_each(TokenBucket::refill);
        }
        self.limit_sources.store(u32::from(!source.is_unlimited()), Relaxed);
    }

    /// A new connection would be refused only because the VM has all its connections: making room helps. Where the VM's other limits
    /// refuse it anyway, nobody is to make room for it.
    #[inline]
    pub fn wants_room(&self, now_ns: u64) -> bool {
        self.connections.load(Relaxed) >= self.max_connections.load(Relaxed)
            && self.half_open.load(Relaxed) < self.max_half_open.load(Relaxed)
            && self.bucket.has_token(self.rate.load(), now_ns)
    }

    /// Asks for a new, half-open connection opened by `source`.
    ///
    /// # Errors
    /// The limit that refuses it; nothing is counted then but the refusal. A source's limits are asked first, so that one
    /// that is over them takes nothing of the VM's.
    #[inline]
    pub fn admit(&self, source: IpAddr, now_ns: u64) -> Result<Admission, LimitReason> {
        let result = self.try_admit(source, now_ns);
        match result {
            Ok(_) => {
                self.admitted.fetch_add(1, Relaxed);
            }
            Err(reason) => {
                if let Some(counter) = self.refused.get(reason as usize) {
                    counter.fetch_add(1, Relaxed);
                }
            }
        }
        result
    }

    fn try_admit(&self, source: IpAddr, now_ns: u64) -> Result<Admission, LimitReason> {
        // Cheap and final: a VM under flood refuses here without touching the source's place.
        let max_half_open = self.max_half_open.load(Relaxed);
        let max_connections = self.max_connections.load(Relaxed);
        if self.half_open.load(Relaxed) >= max_half_open {
            return Err(LimitReason::HalfOpen);
        }
        if self.connections.load(Relaxed) >= max_connections {
            return Err(LimitReason::Connections);
        }
        let rate = self.rate.load();
        if !self.bucket.has_token(rate, now_ns) {
            return Err(LimitReason::Rate);
        }
        let tracked_source = self.limit_sources.load(Relaxed) != 0 && self.admit_source(source, now_ns)?;
        let admission = Admission { tracked_source, half_open: true };
        let counted = self.count(max_connections, max_half_open);
        let counted = counted.and_then(|()| {
            if self.bucket.take(rate, now_ns) {
                return Ok(());
            }
            self.connections.fetch_sub(1, Relaxed);
            self.half_open.fetch_sub(1, Relaxed);
            Err(LimitReason::Rate)
        });
        if let Err(reason) = counted {
            if tracked_source {
                self.uncount_source(source, true, true);
            }
            return Err(reason);
        }
        Ok(admission)
    }

    /// Counts one half-open connection of the VM, unless that is too many.
    fn count(&self, max_connections: u32, max_half_open: u32) -> Result<(), LimitReason> {
        if self.half_open.fetch_add(1, Relaxed) >= max_half_open {
            self.half_open.fetch_sub(1, Relaxed);
            return Err(LimitReason::HalfOpen);
        }
        if self.connections.fetch_add(1, Relaxed) >= max_connections {
            self.connections.fetch_sub(1, Relaxed);
            self.half_open.fetch_sub(1, Relaxed);
            return Err(LimitReason::Connections);
        }
        Ok(())
    }

    /// Counts a connection without asking: one that comes with a migrated VM.
    pub fn adopt(&self, source: IpAddr, half_open: bool) -> Admission {
        self.connections.fetch_add(1, Relaxed);
        if half_open {
            self.half_open.fetch_add(1, Relaxed);
        }
        self.adopted.fetch_add(1, Relaxed);
        let limited = self.limit_sources.load(Relaxed) != 0;
        let most = (MAX_PER_SOURCE as u16, MAX_PER_SOURCE as u16);
        let tracked_source = limited && matches!(self.count_source(source, most, half_open), Counted::At(_));
        Admission { tracked_source, half_open }
    }

    /// The connection is no longer half-open.
    #[inline]
    pub fn established(&self, source: IpAddr, admission: &mut Admission) {
        if core::mem::take(&mut admission.half_open) {
            self.half_open.fetch_sub(1, Relaxed);
            if admission.tracked_source {
                self.uncount_source(source, false, true);
            }
        }
    }

    /// The connection is gone. To be called once for each admission.
    #[inline]
    pub fn release(&self, source: IpAddr, admission: Admission) {
        self.connections.fetch_sub(1, Relaxed);
        if admission.half_open {
            self.half_open.fetch_sub(1, Relaxed);
        }
        if admission.tracked_source {
            self.uncount_source(source, true, admission.half_open);
        }
    }

    /// `Ok(false)`: cannot be counted.
    fn admit_source(&self, source: IpAddr, now_ns: u64) -> Result<bool, LimitReason> {
        let most_connections = self.source_connections.load(Relaxed) as u16;
        let most_half_open = self.source_half_open.load(Relaxed) as u16;
        let at = match self.count_source(source, (most_connections, most_half_open), true) {
            Counted::At(at) => at,
            Counted::Refused(reason) => return Err(reason),
            Counted::No => {
                self.untracked.fetch_add(1, Relaxed);
                return Ok(false);
            }
        };
        if self.buckets.get(at).is_some_and(|bucket| bucket.take(self.source_rate.load(), now_ns)) {
            return Ok(true);
        }
        self.uncount_source(source, true, true);
        Err(LimitReason::SourceRate)
    }

    /// First place a source may take, and its tag (never 0, which marks a place that nobody has had).
    #[inline]
    fn place_of(&self, source: IpAddr) -> (usize, u32) {
        let bits = match source {
            IpAddr::V4(a) => u128::from(a.to_bits()) | 0xffff << 32,
            IpAddr::V6(a) => a.to_bits(),
        };
        let low = fold(bits as u64 ^ self.seed, 0x9e37_79b9_7f4a_7c15);
        let hash = fold(low ^ (bits >> 64) as u64 ^ self.seed.rotate_left(29), 0xd6e8_feb8_6659_fd93);
        let first = (hash as usize & self.places.len().saturating_sub(1)) & !(WAYS - 1);
        (first, ((hash >> 32) as u32).max(1))
    }

    fn set_of(&self, first: usize) -> &[AtomicU64] {
        self.places.get(first..first + WAYS).unwrap_or_default()
    }

    /// Counts one connection of `source`, unless it has `most` already.
    fn count_source(&self, source: IpAddr, most: (u16, u16), half_open: bool) -> Counted {
        let (first, tag) = self.place_of(source);
        let set = self.set_of(first);
        'race: for _ in 0..MAX_RACES {
            // Its own place, or the one that is missed least: never used, or without connections and fullest of tokens.
            let mut vacant: Option<(usize, u64, u64)> = None;
            for (i, cell) in set.iter().enumerate() {
                let bits = cell.load(Relaxed);
                let place = Place::from_bits(bits);
                if place.tag == tag {
                    if place.connections >= most.0 {
                        return Counted::Refused(LimitReason::SourceConnections);
                    }
                    if half_open && place.half_open >= most.1 {
                        return Counted::Refused(LimitReason::SourceHalfOpen);
                    }
                    let new = Place {
                        connections: place.connections + 1,
                        half_open: place.half_open + u16::from(half_open),
                        ..place
                    };
                    match cell.compare_exchange(bits, new.to_bits(), Relaxed, Relaxed) {
                        Ok(_) => return Counted::At(first + i),
                        Err(_) => continue 'race,
                    }
                }
                if place.connections == 0 {
                    let emptiness = self.buckets.get(first + i).map_or(0, TokenBucket::emptiness);
                    if vacant.is_none_or(|(_, _, least)| emptiness < least) {
                        vacant = Some((i, bits, emptiness));
                    }
                }
            }
            let Some((i, bits, _)) = vacant else { return Counted::No };
            let new = Place { tag, connections: 1, half_open: u16::from(half_open) };
            if set.get(i).is_some_and(|c| c.compare_exchange(bits, new.to_bits(), Relaxed, Relaxed).is_ok()) {
                if let Some(bucket) = self.buckets.get(first + i) {
                    bucket.refill();
                }
                return Counted::At(first + i);
            }
        }
        Counted::No
    }

    /// Takes back what [`Self::count_source`] counted: a connection, a half-open one, or both.
    fn uncount_source(&self, source: IpAddr, connection: bool, half_open: bool) {
        let (first, tag) = self.place_of(source);
        let (c, h) = (u16::from(connection), u16::from(half_open));
        for cell in self.set_of(first) {
            // Two threads that raced for a source's first place may have given it two: the count is in one of them. The retry
            // inside ends: each failure means that another thread got on.
            let taken = cell.fetch_update(Relaxed, Relaxed, |bits| {
                let place = Place::from_bits(bits);
                let place = Place {
                    connections: place.connections.checked_sub(c)?,
                    half_open: place.half_open.checked_sub(h)?,
                    ..place
                };
                (place.tag == tag && place.half_open <= place.connections).then(|| place.to_bits())
            });
            if taken.is_ok() {
                return;
            }
        }
    }

    /// How far the limits are used. Walks the table of sources: not for the packet path.
    pub fn status(&self, now_ns: u64) -> LimitsStatus {
        let rate = self.rate.load();
        let max_half_open = self.max_half_open.load(Relaxed);
        let places = || self.places.iter().map(|p| u32::from(Place::from_bits(p.load(Relaxed)).connections));
        LimitsStatus {
            connections: self.connections.load(Relaxed),
            half_open: self.half_open.load(Relaxed),
            max_connections: self.max_connections.load(Relaxed),
            max_half_open: (max_half_open != u32::MAX).then_some(max_half_open),
            tokens: (!rate.is_unlimited()).then(|| self.bucket.available(rate, now_ns)),
            admitted: self.admitted.load(Relaxed),
            adopted: self.adopted.load(Relaxed),
            refused: core::array::from_fn(|i| self.refused.get(i).map_or(0, |c| c.load(Relaxed))),
            sources: places().filter(|c| *c > 0).count() as u32,
            source_capacity: self.places.len() as u32,
            untracked: self.untracked.load(Relaxed),
            largest_source: places().max().unwrap_or(0),
        }
    }
}

enum Counted {
    /// At this place.
    At(usize),
    /// The source has too many.
    Refused(LimitReason),
    /// No place for it.
    No,
}
