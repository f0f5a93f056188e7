//! A token bucket that several threads draw from without a lock, on time that is passed in.
//!
//! The generic cell rate algorithm (ITU-T I.371, virtual scheduling): the bucket is one number, the time at which it would be full
//! again. Drawing a token moves that time on by one interval; when it lies further ahead than the burst allows, there is none.
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Time is kept in sixteenths of a nanosecond, so that rates of millions per second are exact to 0.01 %.
/// The count wraps after 36 years.
const UNITS_PER_NS: u64 = 16;
const UNITS_PER_SECOND: u64 = 1_000_000_000 * UNITS_PER_NS;
/// Highest rate, tokens per second.
pub const MAX_RATE: u32 = 100_000_000;
/// A draw that loses this many races in a row gives up.
const MAX_RACES: u32 = 64;

/// Rate and burst of a bucket, ready for use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Time per token; 0: no limit.
    interval: u64,
    /// How far ahead the full time may lie before a draw.
    tolerance: u64,
}

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self { interval: 0, tolerance: 0 };

    /// `per_second` tokens per second, at most [`MAX_RATE`] (more is taken as that), and up to `burst` (at least 1) at once.
    /// `per_second` 0: no limit.
    pub fn new(per_second: u32, burst: u32) -> Self {
        if per_second == 0 {
            return Self::UNLIMITED;
        }
        let interval = UNITS_PER_SECOND / u64::from(per_second.min(MAX_RATE));
        // Below 2^32 * 2^34: bounded, so that no sum with a time overflows.
        let tolerance = interval.saturating_mul(u64::from(burst.max(1)) - 1).min(1 << 62);
        Self { interval, tolerance }
    }

    /// True when there is no limit.
    pub const fn is_unlimited(&self) -> bool {
        self.interval == 0
    }

    pub(crate) const fn to_parts(self) -> (u64, u64) {
        (self.interval, self.tolerance)
    }

    pub(crate) const fn from_parts(interval: u64, tolerance: u64) -> Self {
        Self { interval, tolerance }
    }
}

/// The bucket; full at time 0.
#[derive(Debug, Default)]
pub struct TokenBucket(AtomicU64);

impl TokenBucket {
    /// Takes a token at `now_ns`; false when there is none. A draw that loses dozens of races in a row (others took tokens
    /// meanwhile) is refused too. Time that steps back (another thread's older reading) is harmless.
    #[inline]
    pub fn take(&self, rate: Rate, now_ns: u64) -> bool {
        if rate.is_unlimited() {
            return true;
        }
        let now = now_ns.wrapping_mul(UNITS_PER_NS);
        let mut full_at = self.0.load(Relaxed);
        for _ in 0..MAX_RACES {
            let from = full_at.max(now);
            if from - now > rate.tolerance {
                return false;
            }
            match self.0.compare_exchange_weak(full_at, from.saturating_add(rate.interval), Relaxed, Relaxed) {
                Ok(_) => return true,
                Err(changed) => full_at = changed,
            }
        }
        false
    }

    /// There is a token at `now_ns`, which another thread may take meanwhile.
    #[inline]
    pub fn has_token(&self, rate: Rate, now_ns: u64) -> bool {
        self.0.load(Relaxed).saturating_sub(now_ns.wrapping_mul(UNITS_PER_NS)) <= rate.tolerance || rate.is_unlimited()
    }

    /// Tokens at hand at `now_ns`; `u64::MAX` without limit.
    pub fn available(&self, rate: Rate, now_ns: u64) -> u64 {
        if rate.is_unlimited() {
            return u64::MAX;
        }
        let ahead = self.0.load(Relaxed).saturating_sub(now_ns.wrapping_mul(UNITS_PER_NS));
        (rate.tolerance + rate.interval).saturating_sub(ahead) / rate.interval
    }

    /// Makes the bucket full.
    #[inline]
    pub fn refill(&self) {
        self.0.store(0, Relaxed);
    }

    /// When it is full, in units of its own: larger is emptier.
    #[inline]
    pub(crate) fn emptiness(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_rate() {
        let (bucket, rate) = (TokenBucket::default(), Rate::new(1000, 5));
        let drawn = |from: u64, to: u64| (from..to).step_by(10_000).filter(|t| bucket.take(rate, *t)).count();
        assert_eq!(bucket.available(rate, 0), 5);
        // 5 at once, then one per millisecond.
        assert_eq!(drawn(0, 1_000_000), 5);
        assert_eq!(drawn(1_000_000, 11_000_000), 10);
        assert_eq!(bucket.available(rate, 1_000_000_000), 5);
        assert_eq!((0..10).filter(|_| bucket.take(rate, 1_000_000_000)).count(), 5);
        assert_eq!(bucket.available(rate, 1_000_000_000), 0);
    }

    #[test]
    fn exact_at_high_rates_and_low_ones() {
        for rate in [1, 3, 7_000, 3_000_000, MAX_RATE] {
            let (bucket, limit) = (TokenBucket::default(), Rate::new(rate, 4));
            let seconds = 1 + 1_000_000 / u64::from(rate);
            let step = (1_000_000_000 / u64::from(rate) / 4).max(1);
            let drawn = (0..seconds * 1_000_000_000).step_by(step as usize).take(8_000_000);
            let mut last = 0;
            let drawn = drawn.inspect(|t| last = *t).filter(|t| bucket.take(limit, *t)).count() as f64;
            let expected = f64::from(rate) * last as f64 / 1e9;
            assert!((drawn - expected).abs() <= 5.0 + expected * 0.001, "{rate}/s: {drawn} of {expected}");
        }
    }

    #[test]
    fn extremes_do_not_overflow() {
        let bucket = TokenBucket::default();
        let rate = Rate::new(1, u32::MAX);
        assert!(bucket.take(rate, u64::MAX / UNITS_PER_NS));
        assert!(bucket.take(rate, u64::MAX / UNITS_PER_NS - 1_000_000_000));
        assert!(Rate::new(0, 0).is_unlimited());
        assert!(TokenBucket::default().take(Rate::UNLIMITED, 5));
        assert!(Rate::new(u32::MAX, 0) == Rate::new(MAX_RATE, 1));
    }

    #[test]
    fn threads_share_it_exactly() {
        let (bucket, rate) = (TokenBucket::default(), Rate::new(1_000_000, 100));
        let taken: usize = std::thread::scope(|s| {
            let workers: Vec<_> =
                (0..4).map(|_| s.spawn(|| (0..100_000u64).filter(|t| bucket.take(rate, t * 100)).count())).collect();
            workers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        // 10 ms pass: 10 000 tokens and the burst. Each thread has its own notion of time, none is ahead of 10 ms.
        assert!(taken <= 10_100, "{taken}");
        assert!(taken >= 9_900, "{taken}");
    }
}
