//! Seeded pseudo-random byte streams. The receiver of a transfer proves by a digest that it got exactly the
//! stream that belongs to the seed; nobody has to store it.
use sha2::{Digest, Sha256};

/// An endless byte stream determined by its seed (SplitMix64, little-endian words).
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Stream {
    /// The stream that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, word: [0; 8], used: 8 }
    }

    fn next_word(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    }

    /// Writes the next `buf.len()` bytes of the stream.
    pub fn fill(&mut self, buf: &mut [u8]) {
        let left = (8 - self.used).min(buf.len());
        let (head, rest) = buf.split_at_mut(left);
        head.copy_from_slice(&self.word[self.used..self.used + left]);
        self.used += left;
        let mut words = rest.chunks_exact_mut(8);
        for chunk in &mut words {
            chunk.copy_from_slice(&self.next_word());
        }
        let tail = words.into_remainder();
        if !tail.is_empty() {
            self.word = self.next_word();
            self.used = tail.len();
            tail.copy_from_slice(&self.word[..tail.len()]);
        }
    }
}

/// SHA-256 of the first `bytes` bytes of the stream `seed`, in lower-case hexadecimal.
pub fn digest(seed: u64, bytes: u64) -> String {
    let mut stream = Stream::new(seed);
    let mut hash = Sha256::new();
    let mut buf = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let n = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.fill(&mut buf[..n]);
        hash.update(&buf[..n]);
        left -= n as u64;
    }
    hex(&hash.finalize())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 1000];
        Stream::new(7).fill(&mut whole);
        for step in [1, 3, 7, 8, 9, 64, 333] {
            let mut cut = vec![0; 1000];
            let mut s = Stream::new(7);
            for chunk in cut.chunks_mut(step) {
                s.fill(chunk);
            }
            assert_eq!(whole, cut, "cut into pieces of {step}");
        }
        let mut other = vec![0; 1000];
        Stream::new(8).fill(&mut other);
        assert_ne!(whole, other);
    }

    #[test]
    fn digests_are_sha256_and_differ_by_seed_and_length() {
        assert_eq!(digest(1, 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_ne!(digest(1, 100_000), digest(2, 100_000));
        assert_ne!(digest(1, 100_000), digest(1, 100_001));
    }
}
