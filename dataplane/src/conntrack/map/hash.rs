//! The keyed hash of connection keys.
//!
//! In two parts: those of the two ends are the same whichever of them is the VM's, and the same in every map of the process, so that the ends
//! of a packet that is judged at both are hashed once; the rest is each map's own. The order of the ends counts: two connections of one VM
//! whose ends are the same the other way round are not alike.
use std::hash::BuildHasher;
#[cfg(not(loom))]
use std::hash::RandomState;
use std::sync::LazyLock;

/// Secrets of the process. The model checker's are always the same ones, so that what it finds can be found again.
static PROCESS: LazyLock<[u64; 3]> = LazyLock::new(|| {
    #[cfg(not(loom))]
    let random = RandomState::new();
    #[cfg(loom)]
    let random = std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::new();
    // Odd factors lose nothing.
    [0u64, 1, 2].map(|n| random.hash_one(n) | 1)
});

/// The parts of a key's hash that are about its two ends: the VM's, and the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends(u64, u64);

impl Ends {
    /// Those of the same packet where the other end is the VM's.
    #[inline(always)]
    pub const fn turned(self) -> Self {
        Self(self.1, self.0)
    }

    /// A hash of the ends and of `rest`, under two secrets of whoever asks.
    #[inline(always)]
    pub fn hash(self, rest: u64, [k0, k1]: [u64; 2]) -> u64 {
        let Self(own, other) = self;
        fold(own.wrapping_add(other.rotate_left(32)) ^ k0, rest ^ k1)
    }
}

/// Hashes a key under secrets of the process and of the map.
///
/// Multiply-and-fold over addresses and ports of each end, then over both and the rest of the key. Not a cryptographic function: what
/// stands between a guest and a bucket full of its own connections is that it can neither see hashes nor count probes; and should it
/// succeed all the same, only its own VM's table refuses connections, in bounded time.
#[derive(Clone, Copy)]
pub(super) struct Hasher {
    process: [u64; 3],
    own: [u64; 2],
}

impl Hasher {
    pub fn new(seed: [u64; 2]) -> Self {
        let [mut state, increment] = seed;
        // SplitMix64 with a secret odd increment.
        let own = core::array::from_fn(|_| {
            state = state.wrapping_add(increment | 1).wrapping_add(0x9e37_79b9_7f4a_7c14);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        });
        Self { process: *PROCESS, own }
    }

    /// The parts that are about the key's ends; the same in any other map.
    #[inline(always)]
    pub fn ends(&self, key: &[u64; 5]) -> Ends {
        let &[a, b, c, d, e] = key;
        Ends(self.end(a, b, e as u16), self.end(c, d, (e >> 16) as u16))
    }

    #[inline(always)]
    fn end(&self, low: u64, high: u64, port: u16) -> u64 {
        let [k0, k1, k2] = self.process;
        fold((low ^ k0).wrapping_add(u64::from(port).wrapping_mul(k2)), high ^ k1)
    }

    /// The hash of a key with these ends, of which `rest` is the last word. All 64 bits are usable.
    #[inline(always)]
    pub fn whole(&self, ends: Ends, rest: u64) -> u64 {
        ends.hash(rest >> 32, self.own)
    }

    /// A key's hash.
    #[inline]
    pub fn hash(&self, key: [u64; 5]) -> u64 {
        let [.., rest] = key;
        self.whole(self.ends(&key), rest)
    }
}

#[inline(always)]
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

    #[test]
    fn ends_are_the_same_from_both_sides_and_for_all_maps() {
        let [one, other] = [[1, 2], [3, 4]].map(Hasher::new);
        for n in 0..100 {
            let key = sample(n * 977).key.words();
            let [a, b, c, d, e] = key;
            let turned = [c, d, a, b, e & !0xffff_ffff | (e & 0xffff) << 16 | e >> 16 & 0xffff];
            assert_eq!(one.ends(&key), one.ends(&turned).turned());
            assert_eq!(one.hash(turned), one.whole(one.ends(&key).turned(), turned[4]));
            assert_eq!(one.ends(&key), other.ends(&key));
            assert_ne!(one.hash(key), one.hash(turned), "two connections of one VM");
            assert_ne!(one.hash(key), other.hash(key));
            // A port belongs to its address.
            let crossed = [a, b, c, d, e & !0xffff_ffff | (e & 0xffff) << 16 | e >> 16 & 0xffff];
            assert!(crossed == key || one.ends(&key) != one.ends(&crossed));
        }
    }
}
