//! A histogram of times with a relative error below 1.6 %, of fixed size.
use serde::{Deserialize, Serialize};

const SUB: u32 = 6;

/// Counts of values, in buckets whose width grows with the value.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; ((64 - SUB as usize) + 1) << SUB], total: 0, max: 0 }
    }
}

/// Not the thousands of buckets.
impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, p99] = [0.5, 0.99].map(|share| self.quantile(share));
        write!(f, "Histogram({} values, median {median}, p99 {p99}, most {})", self.total, self.max)
    }
}

fn bucket(value: u64) -> usize {
    if value < 1 << SUB {
        return value as usize;
    }
    let exponent = 63 - value.leading_zeros() - SUB;
    (((exponent + 1) as usize) << SUB) + ((value >> exponent) as usize & ((1 << SUB) - 1))
}

/// The middle of a bucket's values.
fn value(bucket: usize) -> u64 {
    if bucket < 1 << SUB {
        return bucket as u64;
    }
    let exponent = (bucket >> SUB) - 1;
    let low = ((1u64 << SUB) + (bucket as u64 & ((1 << SUB) - 1))) << exponent;
    low + (1 << exponent) / 2
}

impl Histogram {
    /// Counts a value.
    #[inline]
    pub fn add(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The value that a share of all values do not exceed; 0 when there are none.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return value(i).min(self.max);
            }
        }
        self.max
    }

    /// Adds another one's values.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// The usual quantiles of values in nanoseconds.
    pub fn quantiles(&self) -> Quantiles {
        let us = |share| self.quantile(share) as f64 / 1e3;
        Quantiles { p50_us: us(0.5), p99_us: us(0.99), p999_us: us(0.999), max_us: self.max as f64 / 1e3 }
    }
}

/// Quantiles of a time, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half of all values.
    pub p50_us: f64,
    /// 99 % of all values.
    pub p99_us: f64,
    /// 99.9 % of all values.
    pub p999_us: f64,
    /// All.
    pub max_us: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_within_the_promised_error() {
        let mut h = Histogram::default();
        for v in 1..=100_000u64 {
            h.add(v);
        }
        for share in [0.01, 0.5, 0.99, 0.999, 1.0] {
            let (got, exact) = (h.quantile(share) as f64, 100_000.0 * share);
            assert!((got - exact).abs() / exact < 0.016, "{share}: {got}, not {exact}");
        }
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }

    #[test]
    fn all_values_have_a_bucket() {
        for v in [0, 1, 63, 64, 65, 127, 128, 1 << 20, u64::MAX] {
            let middle = value(bucket(v)) as f64;
            assert!((middle - v as f64).abs() <= v as f64 / 64.0, "{v}: {middle}");
        }
    }
}
