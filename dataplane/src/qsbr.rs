//! Quiescent-state-based reclamation: how memory, rings and tables go away without a lock on the packet path.
//!
//! A PMD thread owns a [`Guard`]. Everything it reads through [`Published::load`] stays valid until it passes its next
//! quiescent state ([`Guard::quiescent`], once per loop iteration). A control thread that wants to take something away
//! unpublishes it and calls [`Domain::synchronize`]: when that returns, every PMD thread has passed a quiescent state
//! (or sleeps, *offline*), so no one can still hold the old value. The scheme is the QSBR flavour of
//! Desnoyers et al., "User-Level Implementations of Read-Copy Update", IEEE TPDS 2012.
#![allow(unsafe_code)] // Its job: handing out references whose lifetime is the quiescent interval.
use std::sync::Arc;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence};

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence};

/// Most PMD threads of one switch.
pub const MAX_THREADS: usize = 64;

const OFFLINE: u64 = 0;

#[repr(align(64))]
struct Slot {
    /// [`OFFLINE`], or the global count this thread has last seen at a quiescent state.
    seen: AtomicU64,
    taken: AtomicBool,
}

/// All PMD threads of a switch and the grace periods among them.
pub struct Domain {
    global: AtomicU64,
    slots: Box<[Slot]>,
}

impl Domain {
    /// A domain for up to [`MAX_THREADS`] reader threads.
    pub fn new() -> Arc<Self> {
        Self::with_slots(MAX_THREADS)
    }

    fn with_slots(n: usize) -> Arc<Self> {
        let slots = (0..n).map(|_| Slot { seen: AtomicU64::new(OFFLINE), taken: AtomicBool::new(false) }).collect();
        Arc::new(Self { global: AtomicU64::new(1), slots })
    }

    /// Registers the calling thread as a reader, online. `None` when all slots are taken.
    pub fn register(self: &Arc<Self>) -> Option<Guard> {
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                let mut guard = Guard { domain: Arc::clone(self), index };
                guard.online();
                return Some(guard);
            }
        }
        None
    }

    /// Waits until every reader has passed a quiescent state since the call began. Must not be called by a reader that is online.
    pub fn synchronize(&self) {
        // The caller's unpublishing store comes before the count moves.
        fence(Ordering::SeqCst);
        let target = self.global.fetch_add(1, Ordering::SeqCst) + 1;
        for slot in &self.slots {
            let mut spins = 0u32;
            loop {
                let seen = slot.seen.load(Ordering::SeqCst);
                if seen == OFFLINE || seen >= target {
                    break;
                }
                spins += 1;
                #[cfg(loom)]
                loom::thread::yield_now();
                #[cfg(not(loom))]
                if spins < 256 {
                    core::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
        fence(Ordering::SeqCst);
    }
}

/// A reader's registration. References obtained under it live until `&mut` is taken for the next quiescent state.
pub struct Guard {
    domain: Arc<Domain>,
    index: usize,
}

impl Guard {
    #[inline]
    fn slot(&self) -> &Slot {
        // SAFETY: `index` was found by enumerating `slots`, whose length never changes.
        unsafe { self.domain.slots.get_unchecked(self.index) }
    }

    /// Passes a quiescent state: nothing loaded before is used after.
    #[inline]
    pub fn quiescent(&mut self) {
        let now = self.domain.global.load(Ordering::Acquire);
        if self.slot().seen.load(Ordering::Relaxed) != now {
            // Release: all reads of the old values are done. The fence keeps later loads behind the store.
            self.slot().seen.store(now, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Goes to sleep: grace periods no longer wait for this thread.
    pub fn offline(&mut self) {
        self.slot().seen.store(OFFLINE, Ordering::SeqCst);
    }

    /// Wakes up: grace periods wait for this thread again.
    pub fn online(&mut self) {
        let now = self.domain.global.load(Ordering::SeqCst);
        self.slot().seen.store(now, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The reader's number, unique among live readers, below [`MAX_THREADS`].
    #[inline]
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.offline();
        self.slot().taken.store(false, Ordering::Release);
    }
}

/// A value that PMD threads read and control threads replace.
///
/// It belongs to one [`Domain`]: guards given to [`Self::load`] and the domain given to [`Self::replace`] must be of the same one
/// (a switch and its ports share theirs), or a grace period would wait for the wrong threads.
pub struct Published<T> {
    ptr: AtomicPtr<T>,
}

impl<T> Published<T> {
    /// Nothing published yet.
    pub fn empty() -> Self {
        Self { ptr: AtomicPtr::new(core::ptr::null_mut()) }
    }

    /// Publishes `value` from the start.
    pub fn new(value: Box<T>) -> Self {
        Self { ptr: AtomicPtr::new(Box::into_raw(value)) }
    }

    /// The current value, if any; valid until the guard's next quiescent state.
    #[inline]
    pub fn load<'g>(&self, _guard: &'g Guard) -> Option<&'g T> {
        let p = self.ptr.load(Ordering::Acquire);
        // SAFETY: values are unpublished only by `replace`, which waits for a grace period before it hands the
        // box back. The guard is online and borrowed for 'g, so its thread cannot pass a quiescent state before 'g ends.
        unsafe { p.as_ref() }
    }

    /// True when a value is published.
    #[inline]
    pub fn is_some(&self) -> bool {
        !self.ptr.load(Ordering::Acquire).is_null()
    }

    /// Publishes `new` and returns the previous value once no reader can hold it. Callers are serialised by the
    /// exclusive access they have to `domain`'s control side (a mutex); concurrent replaces are safe, each gets its own old value.
    pub fn replace(&self, new: Option<Box<T>>, domain: &Domain) -> Option<Box<T>> {
        let raw = new.map_or(core::ptr::null_mut(), Box::into_raw);
        let old = self.ptr.swap(raw, Ordering::SeqCst);
        if old.is_null() {
            return None;
        }
        domain.synchronize();
        // SAFETY: `old` came from Box::into_raw, was taken out by this swap alone, and after the grace period no reader holds it.
        Some(unsafe { Box::from_raw(old) })
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        #[cfg(not(loom))]
        let p = *self.ptr.get_mut();
        #[cfg(loom)]
        let p = self.ptr.load(Ordering::SeqCst);
        if !p.is_null() {
            // SAFETY: `&mut self` proves that no reader can reach this cell any more; the pointer came from Box::into_raw.
            drop(unsafe { Box::from_raw(p) });
        }
    }
}

// SAFETY: Published hands out `&T` to several threads and drops `T` on any of them.
unsafe impl<T: Send + Sync> Sync for Published<T> {}
// SAFETY: it owns a T.
unsafe impl<T: Send> Send for Published<T> {}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// Counts its drops.
    struct Canary(Arc<AtomicUsize>, u64);
    impl Drop for Canary {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            self.1 = u64::MAX;
        }
    }

    #[test]
    fn sleeping_and_absent_readers_do_not_hold_up_a_grace_period() {
        let domain = Domain::new();
        domain.synchronize();
        let mut guard = domain.register().unwrap();
        guard.offline();
        domain.synchronize();
        guard.online();
        drop(guard);
        domain.synchronize();
    }

    #[test]
    fn an_online_reader_holds_it_up_until_its_quiescent_state() {
        let domain = Domain::new();
        let mut guard = domain.register().unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (domain, done) = (Arc::clone(&domain), Arc::clone(&done));
            std::thread::spawn(move || {
                domain.synchronize();
                done.store(true, Ordering::SeqCst);
            })
        };
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!done.load(Ordering::SeqCst));
        while !done.load(Ordering::SeqCst) {
            guard.quiescent();
        }
        waiter.join().unwrap();
    }

    #[test]
    fn values_are_dropped_once_and_never_under_a_reader() {
        let domain = Domain::new();
        let drops = Arc::new(AtomicUsize::new(0));
        let cell = Arc::new(Published::<Canary>::empty());
        let stop = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (domain, cell, stop) = (Arc::clone(&domain), Arc::clone(&cell), Arc::clone(&stop));
                std::thread::spawn(move || {
                    let mut guard = domain.register().unwrap();
                    let mut round = 0u32;
                    while !stop.load(Ordering::Relaxed) {
                        if let Some(c) = cell.load(&guard) {
                            assert_ne!(c.1, u64::MAX, "seen after it was dropped");
                        }
                        guard.quiescent();
                        round += 1;
                        if round.is_multiple_of(1000) {
                            guard.offline();
                            guard.online();
                        }
                    }
                })
            })
            .collect();
        for i in 0..2000 {
            cell.replace((i % 3 != 0).then(|| Box::new(Canary(Arc::clone(&drops), i))), &domain);
        }
        stop.store(true, Ordering::Relaxed);
        for r in readers {
            r.join().unwrap();
        }
        drop(cell);
        assert_eq!(drops.load(Ordering::SeqCst), (0..2000).filter(|i| i % 3 != 0).count());
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let domain = Domain::with_slots(2);
        let a = domain.register().unwrap();
        let b = domain.register().unwrap();
        assert!(domain.register().is_none());
        assert_ne!(a.index(), b.index());
        drop(a);
        assert!(domain.register().is_some());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    /// The writer takes the value away while a reader uses it, passes a quiescent state and looks again.
    #[test]
    fn a_reader_never_holds_a_reclaimed_value() {
        loom::model(|| {
            let domain = Domain::with_slots(1);
            let alive = loom::sync::Arc::new(AtomicBool::new(true));
            let cell = Arc::new(Published::new(Box::new(loom::sync::Arc::clone(&alive))));
            let mut guard = domain.register().unwrap();
            let reader = {
                let cell = Arc::clone(&cell);
                loom::thread::spawn(move || {
                    if let Some(value) = cell.load(&guard) {
                        assert!(value.load(Ordering::Relaxed), "reclaimed under the reader");
                    }
                    guard.quiescent();
                    if let Some(value) = cell.load(&guard) {
                        assert!(value.load(Ordering::Relaxed), "reclaimed under the reader");
                    }
                    guard.offline();
                })
            };
            let old = cell.replace(None, &domain).unwrap();
            // From here on no reader may look at it.
            old.store(false, Ordering::Relaxed);
            reader.join().unwrap();
        });
    }

    /// A reader that wakes up sees either the old value before the grace period ends, or not at all.
    #[test]
    fn waking_up_is_no_loophole() {
        loom::model(|| {
            let domain = Domain::with_slots(1);
            let alive = loom::sync::Arc::new(AtomicBool::new(true));
            let cell = Arc::new(Published::new(Box::new(loom::sync::Arc::clone(&alive))));
            let mut guard = domain.register().unwrap();
            guard.offline();
            let reader = {
                let cell = Arc::clone(&cell);
                loom::thread::spawn(move || {
                    guard.online();
                    if let Some(value) = cell.load(&guard) {
                        assert!(value.load(Ordering::Relaxed), "reclaimed under the reader");
                    }
                    guard.offline();
                })
            };
            let old = cell.replace(None, &domain).unwrap();
            old.store(false, Ordering::Relaxed);
            reader.join().unwrap();
        });
    }
}
