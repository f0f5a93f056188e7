//! The keyed hash of connection keys.

/// Hashes a key under a secret of 128 bits.
///
/// Multiply-and-fold over the key's five words, each under a secret of its own. Not a cryptographic function: what stands between a guest
/// and a bucket full of its own connections is that it can neither see hashes nor count probes; and should it succeed all the same, only
/// its own VM's table refuses connections, in bounded time.
#[derive(Clone, Copy)]
pub(super) struct Hasher {
    secrets: [u64; 6],
}

impl Hasher {
    pub fn new(seed: [u64; 2]) -> Self {
        let [mut state, increment] = seed;
        // SplitMix64 with a secret odd increment.
        let secrets = core::array::from_fn(|_| {
            state = state.wrapping_add(increment | 1).wrapping_add(0x9e37_79b9_7f4a_7c14);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        });
        Self { secrets }
    }

    /// All 64 bits are usable.
    #[inline]
    pub fn hash(&self, key: [u64; 5]) -> u64 {
        let [a, b, c, d, e] = key;
        let [k0, k1, k2, k3, k4, k5] = self.secrets;
        let local = fold(a ^ k0, b ^ k1);
        let remote = fold(c ^ k2, d ^ k3);
        let rest = fold(e ^ k4, local.wrapping_add(k5));
        fold(rest ^ k1, remote.wrapping_add(rest.rotate_left(32)) ^ k3)
    }
}

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::samples::sample;
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "arithmetic only, and much of it")]
    fn every_bit_of_the_key_moves_half_the_hash() {
        let hasher = Hasher::new([1, 2]);
        let (mut flips, mut pairs) = ([0u32; 64], 0);
        for n in 0..64 {
            let key = sample(n * 65_537).key.words();
            let base = hasher.hash(key);
            for word in 0..5 {
                for bit in 0..64 {
                    let mut other = key;
                    other[word] ^= 1 << bit;
                    let diff = base ^ hasher.hash(other);
                    assert_ne!(diff, 0);
                    pairs += 1;
                    for (n, flips) in flips.iter_mut().enumerate() {
                        *flips += (diff >> n & 1) as u32;
                    }
                }
            }
        }
        for flips in flips {
            let share = f64::from(flips) / f64::from(pairs);
            assert!((0.45..0.55).contains(&share), "{share}");
        }
    }

    #[test]
    fn another_seed_is_another_hash() {
        let key = sample(5).key.words();
        let hashes: std::collections::HashSet<u64> =
            (0..4u64).map(|n| Hasher::new([n / 2, n % 2 * 2]).hash(key)).collect();
        assert_eq!(hashes.len(), 4);
    }
}
