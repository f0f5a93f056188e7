//! Making room in a full table.
use super::meta::Meta;
use super::stats::Counters;
use super::sync::Ordering;
use super::{ConnMap, Observer, Removal};

/// Slots looked at for one that may go.
const SCAN: u32 = 256;
/// Half-open connections among which the one nearest to its end is chosen.
const CHOICE: u32 = 16;
/// Times that the chosen one may turn out to have changed.
const ATTEMPTS: usize = 3;

/// How far an entry has come; what comes first goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Unanswered,
    /// Answered, not assured: for TCP still half-open, for UDP one question and one answer.
    Answered,
}

struct Candidate {
    number: u32,
    meta: Meta,
    progress: Progress,
    remaining_ms: u32,
}

enum Choice {
    /// Expired, or the best to be had.
    Found(u32, Meta, Option<Progress>),
    Nothing,
}

impl ConnMap {
    fn choose(&self, slots: impl Iterator<Item = u32>, now_ms: u64) -> Choice {
        let mut best: Option<Candidate> = None;
        let mut half_open = 0;
        for number in slots {
            // An entry under change is in use; it stays.
            let Some(slot) = self.slab.slot(number) else { continue };
            let meta = slot.meta();
            if !meta.is_live() {
                continue;
            }
            if meta.is_expired(now_ms) {
                return Choice::Found(number, meta, None);
            }
            let Some(connection) = slot.copy(meta) else { continue };
            if connection.assured() {
                continue;
            }
            let progress = if connection.seen_reply() { Progress::Answered } else { Progress::Unanswered };
            let remaining_ms = connection.remaining_ms(now_ms);
            if best.as_ref().is_none_or(|b| (progress, remaining_ms) < (b.progress, b.remaining_ms)) {
                best = Some(Candidate { number, meta, progress, remaining_ms });
            }
            if progress == Progress::Unanswered {
                half_open += 1;
                if half_open == CHOICE {
                    break;
                }
            }
        }
        best.map_or(Choice::Nothing, |b| Choice::Found(b.number, b.meta, Some(b.progress)))
    }

    fn evict_from<I: Iterator<Item = u32>>(
        &self,
        slots: impl Fn() -> I,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> Result<bool, NothingToEvict> {
        for _ in 0..ATTEMPTS {
            let Choice::Found(number, meta, progress) = self.choose(slots(), now_ms) else {
                return Err(NothingToEvict);
            };
            let why = if progress.is_none() { Removal::Expired } else { Removal::Evicted };
            if self.unlink(number, meta, why, observer, thread) {
                let counters = self.counters(thread);
                Counters::count(match progress {
                    None => &counters.evicted_expired,
                    Some(Progress::Unanswered) => &counters.evicted_half_open,
                    Some(Progress::Answered) => &counters.evicted_answered,
                });
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes a slot free, if there is an entry among the next few hundred that may go: one that has expired, else an unanswered one,
    /// else one that is not assured, in each case that with the least time left among those seen. Never an assured one.
    #[cold]
    pub(super) fn evict(&self, now_ms: u64, observer: &dyn Observer, thread: usize) -> bool {
        // A table full of assured connections must not cost a search per packet: one in vain per millisecond.
        let stamp = u64::from(now_ms as u32) | 1 << 32;
        if self.nothing_at_ms.load(Ordering::Relaxed) == stamp {
            return false;
        }
        let used = self.slab.used();
        let Some(start) = self.evict_at.fetch_add(SCAN, Ordering::Relaxed).checked_rem(used) else { return false };
        // `used` and SCAN are far below 2^31: no overflow.
        let slots = || (start..start + SCAN.min(used)).map(|n| if n < used { n } else { n - used });
        self.evict_from(slots, now_ms, observer, thread).unwrap_or_else(|NothingToEvict| {
            self.nothing_at_ms.store(stamp, Ordering::Relaxed);
            false
        })
    }

    /// As [`Self::evict`], from among a key's neighbours.
    #[cold]
    pub(super) fn evict_neighbour(
        &self,
        places: &super::index::Places,
        now_ms: u64,
        observer: &dyn Observer,
        thread: usize,
    ) -> bool {
        self.evict_from(|| self.index.neighbours(places), now_ms, observer, thread).unwrap_or(false)
    }
}

struct NothingToEvict;
