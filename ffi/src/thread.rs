//! Threads that call into the data path.
//!
//! A mempool keeps a cache per *lcore*, and a thread that EAL did not start has no lcore id: every mbuf it takes
//! or returns then goes through the pool's shared ring. So each PMD thread is registered with EAL the first time it
//! touches a device (`rte_thread_register`), which gives it an id, hence a cache of its own, and is unregistered
//! when it ends. EAL has 128 ids; a thread that gets none works all the same, through the shared ring.
//!
//! What a thread leaves in its cache stays there until another thread gets the same id: pools are sized for that
//! (see [`crate::mempool`]).
#![allow(unsafe_code)] // Its job: EAL's per-thread state.
use std::cell::{Cell, OnceCell};

use ferry_dpdk_sys as sys;

struct Registration;

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: only exists on a thread whose rte_thread_register succeeded; dropped by that thread as it ends.
        unsafe { sys::rte_thread_unregister() };
    }
}

thread_local! {
    /// Separate from the registration, whose destructor makes each access a little dearer.
    static SEEN: Cell<bool> = const { Cell::new(false) };
    static REGISTRATION: OnceCell<Registration> = const { OnceCell::new() };
}

/// Makes sure that the calling thread has its place in EAL. Costs a thread-local load after the first call.
/// EAL must have been started (whoever holds a device has that).
#[inline]
pub(crate) fn ensure_registered() {
    if !SEEN.get() {
        register();
    }
}

#[cold]
fn register() {
    SEEN.set(true);
    // SAFETY: reads the thread's lcore id.
    if unsafe { sys::ferry_thread_has_lcore() } != 0 {
        return; // EAL's own thread.
    }
    // SAFETY: EAL is initialised, and the thread is not registered yet.
    if unsafe { sys::rte_thread_register() } == 0 {
        let _ = REGISTRATION.try_with(|r| r.set(Registration));
    }
}
