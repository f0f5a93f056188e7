//! What changed since it was last asked: two bits per slot, and the keys of what was deleted. Switched off outside migration.
use std::sync::OnceLock;

use crossbeam::utils::CachePadded;

use super::super::key::Key;
use super::sync::{AtomicBool, AtomicU64, Ordering, after_exchange, fence};

/// An entry was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// Whose.
    pub key: Key,
    /// The version it had when it went.
    pub version: u32,
}

#[derive(Default)]
struct Cell {
    /// Whose turn it is: `position` to be filled, `position + 1` to be emptied.
    turn: AtomicU64,
    key: [AtomicU64; 5],
    version: AtomicU64,
}

/// A bounded queue without locks: Vyukov, "Bounded MPMC queue", 1024cores.net, 2011. Never waits: while a thread has taken a cell and not
/// yet filled it, the queue is empty there to readers; while one has not yet emptied it, full to writers.
struct Graves {
    cells: Box<[Cell]>,
    head: CachePadded<AtomicU64>,
    tail: CachePadded<AtomicU64>,
}

/// A queue cell's contents: the key's words and the version.
type Grave = ([u64; 5], u32);

impl Graves {
    fn new(len: usize) -> Self {
        let cells: Box<[Cell]> = (0..len).map(|_| Cell::default()).collect();
        for (turn, cell) in cells.iter().enumerate() {
            cell.turn.store(turn as u64, Ordering::Relaxed);
        }
        Self { cells, head: CachePadded::new(AtomicU64::new(0)), tail: CachePadded::new(AtomicU64::new(0)) }
    }

    #[inline]
    fn cell(&self, position: u64) -> Option<&Cell> {
        self.cells.get((position % self.cells.len() as u64) as usize)
    }

    /// False when full.
    fn push(&self, grave: Grave) -> bool {
        let mut tail = self.tail.load(Ordering::Relaxed);
        loop {
            let Some(cell) = self.cell(tail) else { return false };
            let turn = cell.turn.load(Ordering::Acquire);
            if turn == tail {
                match self.tail.compare_exchange_weak(tail, tail + 1, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => {
                        for (to, from) in cell.key.iter().zip(grave.0) {
                            to.store(from, Ordering::Relaxed);
                        }
                        cell.version.store(u64::from(grave.1), Ordering::Relaxed);
                        cell.turn.store(tail + 1, Ordering::Release);
                        return true;
                    }
                    Err(now) => tail = now,
                }
            } else if turn < tail {
                return false;
            } else {
                tail = self.tail.load(Ordering::Relaxed);
            }
        }
    }

    fn pop(&self) -> Option<Grave> {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            let cell = self.cell(head)?;
            let turn = cell.turn.load(Ordering::Acquire);
            if turn == head + 1 {
                match self.head.compare_exchange_weak(head, head + 1, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => {
                        let mut key = [0; 5];
                        for (to, from) in key.iter_mut().zip(&cell.key) {
                            *to = from.load(Ordering::Relaxed);
                        }
                        let version = cell.version.load(Ordering::Relaxed) as u32;
                        cell.turn.store(head + self.cells.len() as u64, Ordering::Release);
                        return Some((key, version));
                    }
                    Err(now) => head = now,
                }
            } else if turn <= head {
                return None;
            } else {
                head = self.head.load(Ordering::Relaxed);
            }
        }
    }
}

/// A bit per slot. Who changes an entry sets its bit afterwards, or while it holds the entry; who collects takes the bit first and then
/// reads the entry. So a change that the reader misses has its bit set again.
pub(super) struct Marks(Box<[AtomicU64]>);

impl Marks {
    fn new(capacity: u32) -> Self {
        Self((0..capacity.div_ceil(PER_WORD)).map(|_| AtomicU64::new(0)).collect())
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    fn reset(&self) {
        for word in &self.0 {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Sets a slot's bit. To be called after the change.
    #[inline]
    pub fn set(&self, slot: u32) {
        // The change, then the look at the bit; in `take` the other way round. So a bit that is seen set here will be cleared before the
        // entry is read.
        fence(Ordering::SeqCst);
        self.set_claimed(slot);
    }

    /// Sets a slot's bit. To be called between the exchange by which the caller took the entry ([`super::slot::Look::claim`]) and the
    /// change. That exchange is the fence which [`Self::set`] needs: either the collector's look at the entry comes after it, and waits for
    /// the change; or it comes before, hence `take` as well, and the bit is seen clear here.
    #[inline(always)]
    pub fn set_claimed(&self, slot: u32) {
        after_exchange();
        let Some(word) = self.0.get((slot / PER_WORD) as usize) else { return };
        let bit = 1 << (slot % PER_WORD);
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Clears the bits in `mask` of slots 64 `word` and following, and returns those that were set. The entries are to be read after.
    pub fn take(&self, word: u32, mask: u64) -> u64 {
        let Some(word) = self.0.get(word as usize) else { return 0 };
        // A bit that is seen clear needs no order: its next change will set it.
        if word.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        let bits = word.fetch_and(!mask, Ordering::AcqRel) & mask;
        fence(Ordering::SeqCst);
        bits
    }

    /// Bits set, about now.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }
}

/// The tracking of changes.
pub(super) struct Dirty {
    on: AtomicBool,
    /// Tombstones were lost.
    lost: AtomicBool,
    /// What others must know.
    pub semantic: Marks,
    /// What may lag behind: windows, counters, expiry.
    pub lagging: Marks,
    graves: OnceLock<Graves>,
    graves_len: usize,
}

/// Deletions that can be noted, at least; one per 64 connections in large maps.
const MIN_GRAVES: usize = if cfg!(loom) { 2 } else { 16 };

/// Slots per word of the bitmap.
pub(super) const PER_WORD: u32 = u64::BITS;

impl Dirty {
    pub fn new(capacity: u32) -> Self {
        Self {
            on: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            semantic: Marks::new(capacity),
            lagging: Marks::new(capacity),
            graves: OnceLock::new(),
            graves_len: (capacity as usize / 64).max(MIN_GRAVES).next_power_of_two(),
        }
    }

    pub fn bytes(&self) -> usize {
        self.semantic.bytes() + self.lagging.bytes() + self.graves.get().map_or(0, |g| size_of_val(&*g.cells))
    }

    /// Switches tracking; forgets what was noted before.
    pub fn set(&self, on: bool) {
        self.on.store(false, Ordering::SeqCst);
        self.semantic.reset();
        self.lagging.reset();
        if on {
            let graves = self.graves.get_or_init(|| Graves::new(self.graves_len));
            for _ in 0..self.graves_len {
                if graves.pop().is_none() {
                    break;
                }
            }
            self.lost.store(false, Ordering::SeqCst);
            self.on.store(true, Ordering::SeqCst);
        }
    }

    /// Changes are to be noted.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Notes that an entry went. To be called after it has gone.
    pub fn bury(&self, key: [u64; 5], version: u32) {
        if !self.graves.get().is_some_and(|graves| graves.push((key, version))) {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// The next entry that went.
    pub fn unearth(&self) -> Option<Grave> {
        self.graves.get()?.pop()
    }

    /// Tombstones were lost since this was last asked.
    pub fn take_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) && self.lost.swap(false, Ordering::AcqRel)
    }

    /// Entries that went and were not asked for yet, about.
    pub fn buried(&self) -> u64 {
        self.graves.get().map_or(0, |graves| {
            let head = graves.head.load(Ordering::Relaxed);
            graves.tail.load(Ordering::Relaxed).saturating_sub(head)
        })
    }

    /// Words of the bitmaps.
    pub fn words(&self) -> u32 {
        self.semantic.0.len() as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_queue_keeps_order_and_says_when_it_is_full() {
        let graves = Graves::new(16);
        assert_eq!(graves.pop(), None);
        let mut next = 0;
        for round in 0..if cfg!(miri) { 20 } else { 100u32 } {
            let batch = round % 16 + 1;
            for n in 0..batch {
                assert!(graves.push(([u64::from(next + n); 5], next + n)));
            }
            if batch == 16 {
                assert!(!graves.push(([0; 5], 0)));
            }
            for n in 0..batch {
                assert_eq!(graves.pop(), Some(([u64::from(next + n); 5], next + n)));
            }
            assert_eq!(graves.pop(), None);
            next += batch;
        }
    }

    #[test]
    fn threads_lose_and_double_nothing() {
        let graves = Graves::new(64);
        let seen = std::sync::Mutex::new(Vec::new());
        let pushed = AtomicU64::new(0);
        let (per_thread, threads) = if cfg!(miri) { (50, 2) } else { (20_000, 3) };
        std::thread::scope(|scope| {
            for t in 0..threads {
                let (graves, pushed) = (&graves, &pushed);
                scope.spawn(move || {
                    for n in 0..per_thread {
                        let id = t * per_thread + n;
                        while !graves.push(([id; 5], id as u32)) {
                            std::thread::yield_now();
                        }
                        pushed.fetch_add(1, Ordering::Release);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let done = pushed.load(Ordering::Acquire) == per_thread * threads;
                        match graves.pop() {
                            Some((key, version)) => {
                                assert!(key.iter().all(|&w| w == u64::from(version)), "torn");
                                mine.push(version);
                            }
                            None if done => break,
                            None => std::thread::yield_now(),
                        }
                    }
                    seen.lock().unwrap().extend(mine);
                });
            }
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..(per_thread * threads) as u32).collect::<Vec<_>>());
    }
}
