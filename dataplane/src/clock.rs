//! Time for the packet path: a monotonic clock that tests can replace, and the cycle counter.
#![allow(unsafe_code)] // Its job: reading the time-stamp counter.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Source of monotonic time.
#[derive(Clone)]
pub enum Clock {
    /// The machine's monotonic clock, counted from the switch's start.
    Monotonic(Instant),
    /// A clock that a test moves by hand; nanoseconds.
    Virtual(Arc<AtomicU64>),
}

impl Default for Clock {
    fn default() -> Self {
        Clock::Monotonic(Instant::now())
    }
}

impl Clock {
    /// Nanoseconds since the clock was made.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        match self {
            Clock::Monotonic(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Clock::Virtual(ns) => ns.load(Ordering::Relaxed),
        }
    }

    /// A virtual clock and the handle that moves it.
    pub fn simulated() -> (Clock, Arc<AtomicU64>) {
        let ns = Arc::new(AtomicU64::new(0));
        (Clock::Virtual(Arc::clone(&ns)), ns)
    }
}

/// The processor's cycle counter (time-stamp counter; constant rate on every x86-64 processor of the last decade).
#[inline]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: RDTSC is available on every x86-64 processor and has no side effect.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}
