//! One entry in shared memory, and the seqlock under which it is copied in and out.
//!
//! A slot is 120 bytes of atomic words: the words of a [`Connection`], of which the one that has version and expiry is the control word
//! ([`Meta`]). Whoever moves the control word out of `Live` or `Free` by compare-and-swap owns the other words until it moves it back.
//! Readers copy the words and keep the copy only if the control word is the same before and after; so they never see a torn entry, nor
//! one of another connection that took the slot meanwhile.
//!
//! All words are atomics, read and written with relaxed order; the fences are those of Boehm, "Can seqlocks get along with programming
//! language memory models?", 2012.
#![allow(unsafe_code)] // Its job: an entry as words and back.
use super::super::entry::Connection;
use super::super::key::Key;
use super::meta::{Meta, State, next};
use super::sync::{AtomicU64, Ordering, fence, spin};

/// A key as words.
pub(crate) type KeyWords = [u64; 5];
/// A connection as words.
pub(crate) type EntryWords = [u64; 15];
type Words = EntryWords;

/// Where the control word lies among an entry's words.
const META: usize = 5;

/// Words of a slot that are really kept: all of them, except in the model checker, for which each word more is another dimension. There
/// the addresses are implied, those of the samples, and the protocols' words are lost.
#[cfg(not(loom))]
const KEY: [usize; 5] = [0, 1, 2, 3, 4];
#[cfg(not(loom))]
const REST: [usize; 9] = [6, 7, 8, 9, 10, 11, 12, 13, 14];
#[cfg(loom)]
const KEY: [usize; 1] = [4];
#[cfg(loom)]
const REST: [usize; 2] = [6, 7];

/// Looks at a slot under change before giving up, about 10 us of them: a writer needs nanoseconds unless it was preempted.
#[cfg(not(loom))]
const PATIENCE: u32 = 256;
// Of three threads two can change a slot three times while the third looks: it withdraws, goes, and is taken again for the same key.
#[cfg(loom)]
const PATIENCE: u32 = 4;

const _: () = assert!(cfg!(target_endian = "little"), "the control word's halves are those of a little-endian machine");
const _: () = assert!(core::mem::offset_of!(Connection, key) == 0 && core::mem::offset_of!(Connection, version) == 44);

#[inline]
pub(super) fn to_words(connection: &Connection) -> Words {
    // SAFETY: `Connection` is `repr(C)`, 120 bytes of integers without padding (40 of key, 19 words of 4 bytes, a word of 2 + 1 + 1),
    // so every byte is initialised; the sizes are equal or this does not compile.
    unsafe { core::mem::transmute::<Connection, Words>(*connection) }
}

#[inline]
fn from_words(words: Words) -> Connection {
    // SAFETY: as above; every field of `Connection` and of what it contains is an integer or an array of them, for which all bit patterns
    // are valid.
    unsafe { core::mem::transmute::<Words, Connection>(words) }
}

/// The key that has these words.
#[inline]
pub(super) fn key(words: KeyWords) -> Key {
    let [a, b, c, d, e] = words;
    from_words([a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).key
}

/// What a slot has to say to a reader that looks for a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Read {
    /// The entry.
    Live(Connection),
    /// Not this key's, or no entry.
    Absent,
    /// This key's, but it was under change all the time that one may wait.
    Busy,
}

/// One entry, or room for it.
#[repr(C)]
pub(super) struct Slot {
    key: [AtomicU64; KEY.len()],
    meta: AtomicU64,
    rest: [AtomicU64; REST.len()],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == 120);

impl Default for Slot {
    fn default() -> Self {
        Self {
            key: core::array::from_fn(|_| AtomicU64::new(0)),
            meta: AtomicU64::new(0),
            rest: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Slot {
    /// The control word; what was written before it was set is seen after.
    #[inline]
    pub fn meta(&self) -> Meta {
        Meta(self.meta.load(Ordering::Acquire))
    }

    /// Moves the control word, if it still is what it was.
    #[inline]
    pub fn shift(&self, from: Meta, to: Meta) -> bool {
        self.meta.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The slot's key is this one. Says nothing about the entry's state. A `false` is final for a key whose entry has been here all the
    /// time; a `true` holds if the control word is the same before and after.
    #[cfg(not(loom))]
    #[inline]
    pub fn holds(&self, key: &KeyWords) -> bool {
        let word = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let ([a, b, c, d, e], [f, g, h, i, j]) = (&self.key, key);
        (word(e) ^ j) | (word(d) ^ i) | (word(c) ^ h) | (word(b) ^ g) | (word(a) ^ f) == 0
    }

    /// As above.
    #[cfg(loom)]
    pub fn holds(&self, key: &KeyWords) -> bool {
        self.key.iter().zip(KEY).all(|(word, at)| word.load(Ordering::Relaxed) == key[at])
    }

    /// The control word, if this is the key's entry.
    #[inline]
    pub fn entry_of(&self, key: &KeyWords) -> Option<Meta> {
        let meta = self.meta();
        (matches!(meta.state(), State::Live | State::Writing) && self.holds(key)).then_some(meta)
    }

    /// The control word is still `meta`, hence all that was read since is of one piece.
    #[inline]
    pub fn is_still(&self, meta: Meta) -> bool {
        fence(Ordering::Acquire);
        self.meta.load(Ordering::Relaxed) == meta.0
    }

    #[cfg(not(loom))]
    #[inline]
    fn gather(&self, meta: Meta) -> Connection {
        let word = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let [a, b, c, d, e] = &self.key;
        let [f, g, h, i, j, k, l, m, n] = &self.rest;
        let control = u64::from(meta.version()) << 32 | u64::from(meta.expires_ms());
        // Written out: iterators over these few words cost more than the words.
        from_words([
            word(a),
            word(b),
            word(c),
            word(d),
            word(e),
            control,
            word(f),
            word(g),
            word(h),
            word(i),
            word(j),
            word(k),
            word(l),
            word(m),
            word(n),
        ])
    }

    #[cfg(loom)]
    fn gather(&self, meta: Meta) -> Connection {
        let mut words = to_words(&super::samples::sample(0));
        for (word, at) in self.key.iter().zip(KEY).chain(self.rest.iter().zip(REST)) {
            words[at] = word.load(Ordering::Relaxed);
        }
        words[META] = u64::from(meta.version()) << 32 | u64::from(meta.expires_ms());
        from_words(words)
    }

    /// This key's entry, unless it is being changed.
    #[inline(always)]
    pub fn look(&self, key: &KeyWords) -> Option<Look<'_>> {
        let meta = self.meta();
        (meta.is_live() && self.holds(key)).then_some(Look { slot: self, meta })
    }

    /// A copy of the entry as it was when its control word was `meta`; `None` if it has changed.
    #[inline]
    pub fn copy(&self, meta: Meta) -> Option<Connection> {
        let copy = self.gather(meta);
        self.is_still(meta).then_some(copy)
    }

    /// A copy of this key's entry.
    #[inline]
    pub fn read(&self, key: &KeyWords) -> Read {
        for _ in 0..PATIENCE {
            let meta = self.meta();
            if matches!(meta.state(), State::Free | State::Tentative) || !self.holds(key) {
                return Read::Absent;
            }
            if meta.is_live()
                && let Some(copy) = self.copy(meta)
            {
                return Read::Live(copy);
            }
            spin();
        }
        Read::Busy
    }

    /// A copy of whatever entry is here, with its control word; for walks.
    pub fn read_any(&self) -> Result<Option<(Meta, Connection)>, Busy> {
        for _ in 0..PATIENCE {
            let meta = self.meta();
            match meta.state() {
                State::Free | State::Tentative => return Ok(None),
                State::Live => {
                    if let Some(copy) = self.copy(meta) {
                        return Ok(Some((meta, copy)));
                    }
                }
                State::Writing => {}
            }
            spin();
        }
        Err(Busy)
    }

    /// Who has the key here, if anybody, and in what state: the entry, an insertion, a writer. `Err` if that changed all the time.
    #[inline]
    pub fn occupant(&self, key: &KeyWords) -> Result<Option<Meta>, Busy> {
        for _ in 0..PATIENCE {
            let meta = self.meta();
            if meta.state() == State::Free || !self.holds(key) {
                return Ok(None);
            }
            if self.is_still(meta) {
                return Ok(Some(meta));
            }
            spin();
        }
        Err(Busy)
    }

    #[cfg(not(loom))]
    #[inline]
    fn scatter(&self, words: &Words) {
        let store = |word: &AtomicU64, value: u64| word.store(value, Ordering::Relaxed);
        let [a, b, c, d, e, f, g, h, i] = &self.rest;
        let [_, _, _, _, _, _, va, vb, vc, vd, ve, vf, vg, vh, vi] = *words;
        store(a, va);
        store(b, vb);
        store(c, vc);
        store(d, vd);
        store(e, ve);
        store(f, vf);
        store(g, vg);
        store(h, vh);
        store(i, vi);
    }

    #[cfg(loom)]
    fn scatter(&self, words: &Words) {
        for (word, at) in self.rest.iter().zip(REST) {
            word.store(words[at], Ordering::Relaxed);
        }
    }

    /// Fills a free slot that belongs to the caller with the words of a connection; returns the control word, which is now `Tentative`.
    #[inline]
    pub fn prepare(&self, words: &Words) -> Meta {
        // Whoever sees one of the stores below also sees that the slot's former entry had gone.
        fence(Ordering::Release);
        for (word, at) in self.key.iter().zip(KEY) {
            if let Some(&value) = words.get(at) {
                word.store(value, Ordering::Relaxed);
            }
        }
        self.scatter(words);
        let before = Meta(self.meta.load(Ordering::Relaxed));
        let meta = Meta::new(State::Tentative, next(before.version()), expires_ms(words));
        self.meta.store(meta.0, Ordering::Release);
        meta
    }

    /// Begins to replace the entry whose control word is `meta` by `connection` under a new version. `None` if it has changed.
    #[inline]
    pub fn claim(&self, meta: Meta, connection: &Connection, version: u32) -> Option<Claim<'_>> {
        let writing = meta.with(State::Writing);
        if self.meta.compare_exchange(meta.0, writing.0, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return None;
        }
        let words = to_words(connection);
        Some(Claim { slot: self, words, before: meta, after: Meta::new(State::Live, version, expires_ms(&words)) })
    }

    /// Fetches the cache lines behind the first.
    #[inline]
    pub fn prefetch_rest(&self) {
        let [.., last] = &self.rest;
        crate::memory::prefetch(&self.meta);
        crate::memory::prefetch(last);
    }

    /// Fetches the cache line behind the first: with it, all that most packets need.
    #[inline(always)]
    pub fn prefetch_second(&self) {
        let [_, second, ..] = &self.rest;
        crate::memory::prefetch(second);
    }

    /// The free slot after this one in a free list.
    #[inline]
    pub fn link(&self) -> u32 {
        self.rest.first().map_or(0, |word| word.load(Ordering::Relaxed) as u32)
    }

    /// Sets it, in a free slot that belongs to the caller.
    #[inline]
    pub fn set_link(&self, slot: u32) {
        // As in `prepare`.
        fence(Ordering::Release);
        if let Some(word) = self.rest.first() {
            word.store(u64::from(slot), Ordering::Relaxed);
        }
    }
}

#[inline]
fn expires_ms(words: &Words) -> u32 {
    words.get(META).map_or(0, |&word| word as u32)
}

/// A key's entry, read word by word rather than copied; of one piece only if [`Self::claim`] says so in the end.
#[derive(Clone, Copy)]
pub(in super::super) struct Look<'a> {
    slot: &'a Slot,
    meta: Meta,
}

/// Where an entry's word lies among those that a slot keeps besides key and control word.
const fn kept(word: usize) -> Option<usize> {
    let mut rest: &[usize] = &REST;
    let mut at = 0;
    while let [first, others @ ..] = rest {
        if *first == word {
            return Some(at);
        }
        rest = others;
        at += 1;
    }
    None
}

impl<'a> Look<'a> {
    /// The entry's time is over.
    #[inline(always)]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.meta.is_expired(now_ms)
    }

    /// Word `N` of the entry, one of those behind the control word.
    #[inline(always)]
    pub fn word<const N: usize>(&self) -> u64 {
        const { assert!(N > META && N < 15) };
        const { kept(N) }.and_then(|at| self.slot.rest.get(at)).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Word `M` of the entry if `second`, else word `N`; both are behind the control word.
    #[inline(always)]
    pub fn either<const N: usize, const M: usize>(&self, second: bool) -> Word<'a> {
        const { assert!(N > META && N < 15 && M > META && M < 15) };
        let word = |at: Option<usize>| at.and_then(|at| self.slot.rest.get(at));
        let (first, other) = (word(const { kept(N) }), word(const { kept(M) }));
        Word(if second { other } else { first })
    }

    /// Makes the entry the caller's alone, if it is still the one that was looked at. It will have the next version.
    #[inline(always)]
    pub fn claim(self, expires_ms: u32) -> Option<Amend<'a>> {
        // All words were read after the control word, which is found unchanged here.
        fence(Ordering::Acquire);
        let writing = self.meta.live_to_writing();
        let slot = self.slot;
        // Stronger than the claim needs: see `Marks::set_claimed`.
        slot.meta.compare_exchange(self.meta.0, writing.0, Ordering::SeqCst, Ordering::Relaxed).ok()?;
        // Whoever sees one of the stores that follow also sees that the slot was being written.
        fence(Ordering::Release);
        Some(Amend { slot, after: self.meta.live_to_next(expires_ms) })
    }
}

/// A word of an entry, of those that are kept.
#[derive(Clone, Copy)]
pub(in super::super) struct Word<'a>(Option<&'a AtomicU64>);

impl Word<'_> {
    /// What is there.
    #[inline(always)]
    pub fn read(self) -> u64 {
        self.0.map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

/// An entry of which single words are being replaced; to be ended by [`Self::commit`] without delay, as [`Claim`].
#[must_use]
pub(in super::super) struct Amend<'a> {
    slot: &'a Slot,
    after: Meta,
}

impl Amend<'_> {
    /// Replaces word `N`.
    #[inline(always)]
    pub fn set<const N: usize>(&self, value: u64) {
        const { assert!(N > META && N < 15) };
        if let Some(word) = const { kept(N) }.and_then(|at| self.slot.rest.get(at)) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Replaces a word of this entry.
    #[inline(always)]
    pub fn put(&self, word: Word<'_>, value: u64) {
        if let Some(word) = word.0 {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Makes the entry an entry again.
    #[inline(always)]
    pub fn commit(self) {
        self.slot.meta.store(self.after.0, Ordering::Release);
    }
}

/// A slot was under change for longer than one may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

/// A slot that the caller alone may write; to be ended by [`Self::commit`] without delay: until then nobody else can use the entry.
#[must_use]
pub(super) struct Claim<'a> {
    slot: &'a Slot,
    words: Words,
    before: Meta,
    after: Meta,
}

impl Claim<'_> {
    /// The entry as it is until [`Self::commit`].
    pub fn before(&self) -> Connection {
        self.slot.gather(self.before)
    }

    /// Writes the new entry.
    #[inline]
    pub fn commit(self) {
        // Whoever sees one of the stores below also sees that the slot was being written.
        fence(Ordering::Release);
        self.slot.scatter(&self.words);
        self.slot.meta.store(self.after.0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::samples::sample;
    use super::*;

    #[test]
    fn an_entry_comes_back_as_it_was_but_for_its_version() {
        let slot = Slot::default();
        let mut c = sample(77);
        c.refresh(1000, 5000);
        c.set_words([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        c.set_assured();
        let key = c.key.words();
        let tentative = slot.prepare(&to_words(&c));
        assert!(matches!(slot.read(&key), Read::Absent));
        assert_eq!(slot.occupant(&key), Ok(Some(tentative)));
        assert!(slot.shift(tentative, Meta::new(State::Live, 9, tentative.expires_ms())));
        let Read::Live(copy) = slot.read(&key) else { panic!("not found") };
        c.version = 9;
        assert_eq!(copy, c);
        assert!(matches!(slot.read(&sample(78).key.words()), Read::Absent));
        for now in [0, 1000, 5999, 6000, 7000] {
            assert_eq!(slot.meta().is_expired(now), c.is_expired(now));
        }
    }

    #[test]
    fn a_writer_that_stands_still_makes_readers_give_up() {
        let slot = Slot::default();
        let c = sample(1);
        let key = c.key.words();
        let tentative = slot.prepare(&to_words(&c));
        let live = tentative.with(State::Live);
        assert!(slot.shift(tentative, live));
        let writing = slot.claim(live, &c, 5).unwrap();
        assert!(slot.claim(live, &c, 5).is_none());
        assert!(matches!(slot.read(&key), Read::Busy));
        assert!(matches!(slot.read(&sample(2).key.words()), Read::Absent));
        assert!(slot.read_any().is_err());
        writing.commit();
        assert!(slot.claim(live, &c, 6).is_none());
        assert!(matches!(slot.read(&key), Read::Live(Connection { version: 5, .. })));
    }
}
