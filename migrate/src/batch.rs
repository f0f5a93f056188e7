//! What travels on the bulk connection: items in batches, and the digest by which both sides know that they have the same.
//!
//! These are the contents; the bytes are made in [`crate::wire`].
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use ferry_dataplane::conntrack::{Connection, Key};

pub use crate::record::{CONNECTION_BYTES, TOMBSTONE_BYTES};

/// Bytes that a batch takes beside its items.
pub const BATCH_BYTES: usize = crate::encoding::HEADER_BYTES;
/// Most items of a batch.
pub const MAX_BATCH_ITEMS: usize = 1024;

/// One thing that the destination is to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A connection as it was when the batch was made. Its expiry is by the clock of the host that holds it: the wire has the time that
    /// remains.
    Connection(Connection),
    /// A connection has gone.
    Tombstone {
        /// Whose.
        key: Key,
        /// The version that it had.
        version: u32,
    },
    /// A connection that cannot be stored by whom it has reached: it has expired on the way, or is one that tracking there cannot make. Never
    /// sent.
    Lapsed {
        /// Whose.
        key: Key,
        /// Its version: what is older has lapsed too.
        version: u32,
        /// It has expired on the way.
        expired: bool,
    },
}

impl Item {
    /// Bytes on the wire.
    pub const fn wire_bytes(&self) -> usize {
        match self {
            Self::Connection(_) | Self::Lapsed { .. } => CONNECTION_BYTES,
            Self::Tombstone { .. } => TOMBSTONE_BYTES,
        }
    }
}

/// Items in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The round that they were collected in.
    pub round: u32,
    /// The batch's number since the migration began, from 0 without gaps.
    pub sequence: u64,
    /// Everything before this batch is void: the destination is to forget all connections first. Source and destination begin anew when
    /// the source could not note all deletions.
    pub clear: bool,
    /// At most [`MAX_BATCH_ITEMS`].
    pub items: Vec<Item>,
}

impl Batch {
    /// Bytes on the wire, at most.
    pub fn wire_bytes(&self) -> usize {
        BATCH_BYTES + self.items.iter().map(Item::wire_bytes).sum::<usize>()
    }
}

/// A running digest over batches: equal at both ends if the same batches with the same items came in the same order.
///
/// It finds mistakes: a batch lost, doubled or exchanged between encoder and decoder. It is no protection against an attacker, who has TLS
/// to overcome first, nor against damage, which the batches' checksums find. Covers identity and version of each item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    low: u64,
    high: u64,
}

impl Default for Digest {
    fn default() -> Self {
        Self { low: 0x243f_6a88_85a3_08d3, high: 0x1319_8a2e_0370_7344 }
    }
}

impl Digest {
    /// The digest so far.
    pub fn value(&self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }

    /// Adds a batch.
    pub fn add(&mut self, batch: &Batch) {
        self.word(u64::from(batch.round) << 1 | u64::from(batch.clear));
        self.word(batch.sequence);
        self.word(batch.items.len() as u64);
        for item in &batch.items {
            let (key, version, gone) = match item {
                Item::Connection(c) => (&c.key, c.version, false),
                Item::Lapsed { key, version, .. } => (key, *version, false),
                Item::Tombstone { key, version } => (key, *version, true),
            };
            self.key(key);
            self.word(u64::from(version) << 1 | u64::from(gone));
        }
    }

    fn key(&mut self, key: &Key) {
        // The addresses are in memory's order in the first four words; the last is a number.
        let [a, b, c, d, e] = key.words();
        for word in [a, b, c, d] {
            self.word(word.to_le());
        }
        self.word(e);
    }

    fn word(&mut self, word: u64) {
        // Two multiplications with different odd constants; each half takes in the other, so that order counts.
        let product = |a: u64, b: u64| {
            let wide = u128::from(a) * u128::from(b);
            (wide as u64) ^ (wide >> 64) as u64
        };
        let low = product(self.low ^ word, 0x9e37_79b9_7f4a_7c15).wrapping_add(self.high);
        self.high = product(self.high ^ word.rotate_left(32), 0xd6e8_feb8_6659_fd93) ^ self.low.rotate_left(23);
        self.low = low;
    }
}

#[cfg(test)]
mod tests {
    use ferry_dataplane::conntrack::sample;

    use super::*;

    #[test]
    fn the_digest_sees_loss_doubling_exchange_and_change() {
        let connection = |n: u32, version: u32| {
            let mut c = sample(n);
            c.version = version;
            Item::Connection(c)
        };
        let batch = |sequence, items| Batch { round: 1, sequence, clear: false, items };
        let digest = |batches: &[Batch]| {
            let mut digest = Digest::default();
            batches.iter().for_each(|batch| digest.add(batch));
            digest.value()
        };
        let gone = |version| Item::Tombstone { key: sample(9).key, version };
        let good = [batch(0, vec![connection(1, 1), connection(2, 1)]), batch(1, vec![connection(3, 1), gone(4)])];
        let variants: Vec<Vec<Batch>> = vec![
            vec![],
            good[..1].to_vec(),
            vec![good[0].clone(), good[0].clone(), good[1].clone()],
            vec![good[1].clone(), good[0].clone()],
            vec![batch(0, vec![connection(2, 1), connection(1, 1)]), good[1].clone()],
            vec![batch(0, vec![connection(1, 1), connection(2, 2)]), good[1].clone()],
            vec![batch(0, vec![connection(1, 1), connection(4, 1)]), good[1].clone()],
            vec![good[0].clone(), batch(1, vec![connection(3, 1), gone(5)])],
            vec![good[0].clone(), Batch { clear: true, ..good[1].clone() }],
            vec![good[0].clone(), Batch { round: 2, ..good[1].clone() }],
        ];
        let mut seen = std::collections::HashSet::from([digest(&good)]);
        for variant in variants {
            assert!(seen.insert(digest(&variant)), "{variant:?}");
        }
        // Time is each host's own.
        let mut later = sample(1);
        later.refresh(1_000_000, 5);
        later.version = 1;
        let lapsed = Item::Lapsed { key: sample(2).key, version: 1, expired: true };
        let same = [batch(0, vec![Item::Connection(later), lapsed]), good[1].clone()];
        assert_eq!(digest(&same), digest(&good));
    }
}
