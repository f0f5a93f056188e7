//! A bandwidth cap that all bulk connections share, so that state does not fight the VM's memory for the wire.
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least cap, bytes per second: below, connections would look dead.
pub const MIN_RATE_BYTES_PER_S: u64 = 64 * 1024;
/// Greatest cap, bytes per second; what is above is no cap in practice.
const MAX_RATE_BYTES_PER_S: u64 = 1 << 40;
/// How much may go at once after a pause, as time at the full rate.
const BURST_MS: u64 = 20;

/// A token bucket without a clock; it may go into debt, which the next ones wait for.
#[derive(Debug)]
struct TokenBucket {
    rate_bytes_per_s: u64,
    /// Bytes times 1,000,000, so that nothing is lost to rounding.
    level: i128,
    updated_us: u64,
}

impl TokenBucket {
    fn burst(&self) -> i128 {
        i128::from(self.rate_bytes_per_s) * i128::from(BURST_MS) * 1000
    }

    /// Takes `bytes`; how long the taker has to wait before sending them, microseconds.
    fn take(&mut self, bytes: usize, now_us: u64) -> u64 {
        let rate = i128::from(self.rate_bytes_per_s);
        let passed = i128::from(now_us.saturating_sub(self.updated_us));
        self.updated_us = self.updated_us.max(now_us);
        self.level = (self.level + passed * rate).min(self.burst());
        self.level -= bytes as i128 * 1_000_000;
        let debt = (-self.level).max(0);
        u64::try_from((debt + rate - 1) / rate).unwrap_or(u64::MAX)
    }
}

/// A cap that can be changed at any time.
#[derive(Debug)]
pub struct Pace {
    start: Instant,
    /// None: no cap.
    bucket: Mutex<Option<TokenBucket>>,
}

impl Pace {
    /// `rate`: bytes per second, none: no cap. Less than [`MIN_RATE_BYTES_PER_S`] is taken as that.
    pub fn new(rate: Option<u64>) -> Self {
        let pace = Self { start: Instant::now(), bucket: Mutex::new(None) };
        pace.set_rate(rate);
        pace
    }

    /// Changes the cap. Debts of the old one are forgiven.
    pub fn set_rate(&self, rate: Option<u64>) {
        let bucket = rate.map(|rate| TokenBucket {
            rate_bytes_per_s: rate.clamp(MIN_RATE_BYTES_PER_S, MAX_RATE_BYTES_PER_S),
            level: 0,
            updated_us: self.now_us(),
        });
        *self.bucket.lock().unwrap_or_else(PoisonError::into_inner) = bucket;
    }

    /// Takes leave to send `bytes`; how long to wait before sending them.
    pub(crate) fn take(&self, bytes: usize) -> Duration {
        let now_us = self.now_us();
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.as_mut().map_or(Duration::ZERO, |bucket| Duration::from_micros(bucket.take(bytes, now_us)))
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate_bytes_per_s: u64) -> TokenBucket {
        TokenBucket { rate_bytes_per_s, level: 0, updated_us: 0 }
    }

    #[test]
    fn the_rate_is_exact_over_time_whoever_takes() {
        for rate in [65_536u64, 1_000_003, 12_500_000_000] {
            let mut bucket = bucket(rate);
            let (mut now_us, mut sent) = (0u64, 0u64);
            while now_us < 3_000_000 {
                sent += 16_384;
                now_us += bucket.take(16_384, now_us);
                if sent > 40_000_000_000 {
                    break;
                }
                now_us += 1;
            }
            let expected = rate as f64 * now_us as f64 / 1e6;
            assert!(
                (sent as f64 - expected).abs() <= 0.01 * expected + 16_384.0 + rate as f64 * 0.02,
                "{rate}: {sent} {expected}"
            );
        }
    }

    #[test]
    fn a_pause_earns_no_more_than_the_burst() {
        let mut bucket = bucket(1_000_000);
        assert_eq!(bucket.take(20_000, 3_600_000_000), 0);
        assert_eq!(bucket.take(1, 3_600_000_000), 1);
        // A clock that goes back earns nothing and breaks nothing.
        assert_eq!(bucket.take(1_000_000, 0), 1_000_001);
        assert!(bucket.take(usize::MAX, u64::MAX) > 1_000_000);
    }

    #[test]
    fn no_cap_and_changes() {
        let pace = Pace::new(None);
        assert_eq!(pace.take(usize::MAX), Duration::ZERO);
        pace.set_rate(Some(0));
        assert!(pace.take(65_536) > Duration::from_millis(900));
        pace.set_rate(Some(u64::MAX));
        assert!(pace.take(65_536) < Duration::from_millis(1));
    }
}
