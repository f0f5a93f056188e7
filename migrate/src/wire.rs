//! Batches to bytes and back: the machines' items, which are by a host's own clock, in the record format, which knows only what remains.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use ferry_dataplane::conntrack::{Key, PortableError, PortableKey, Timeouts};

use crate::batch::{Batch, Item, MAX_BATCH_ITEMS};
use crate::compress::Compressor;
use crate::encoding::{BatchHeader, BatchLimits, BatchPlace, BatchReader, BatchWriter};
use crate::record::{CONNECTION_BYTES, PortableTombstone, Record, RecordError};

/// What a message of the bulk connection is: its first byte. The batch or frame follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkKind {
    /// A batch in the record format.
    Batch,
    /// A frame that came late: the number of the VM's port (one byte), then the Ethernet frame.
    LateFrame,
}

impl BulkKind {
    /// The first byte.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Batch => 0,
            Self::LateFrame => 1,
        }
    }

    /// A message's kind and the rest of it; `None`: neither.
    pub fn split(message: &[u8]) -> Option<(Self, &[u8])> {
        match message.split_first()? {
            (0, rest) => Some((Self::Batch, rest)),
            (1, rest) => Some((Self::LateFrame, rest)),
            _ => None,
        }
    }
}

/// What batches of the machines need of the format.
const LIMITS: BatchLimits =
    BatchLimits { records: MAX_BATCH_ITEMS as u32, raw_bytes: (MAX_BATCH_ITEMS * MAX_RECORD_BYTES) as u32 };
/// Records with extensions of a later minor version.
const MAX_RECORD_BYTES: usize = 2 * CONNECTION_BYTES;

/// Why bytes are no batch of this migration. The channel is of no more use then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not in the record format.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Of another migration.
    #[error("a batch of another migration")]
    Migration,
    /// A record whose identity no connection has.
    #[error("a record without a possible identity: {0}")]
    Key(PortableError),
}

/// Makes batches into bytes, for one migration.
pub struct BatchEncoder {
    migration: u128,
    writer: BatchWriter,
    compressor: Compressor,
}

impl BatchEncoder {
    /// `migration`: the id that both connections carry.
    pub fn new(migration: u128, compressor: Compressor) -> Self {
        Self { migration, writer: BatchWriter::new(LIMITS), compressor }
    }

    /// What compression does.
    pub fn compressor(&self) -> &Compressor {
        &self.compressor
    }

    /// Appends a batch's bytes to `out`. `now_ms`: the clock by which its connections expire.
    pub fn encode(&mut self, batch: &Batch, now_ms: u64, out: &mut Vec<u8>) -> BatchHeader {
        for item in batch.items.iter().take(MAX_BATCH_ITEMS) {
            // There is room for as many.
            let _ = match item {
                Item::Connection(connection) => self.writer.connection(&connection.to_portable(now_ms)),
                Item::Tombstone { key, version } | Item::Lapsed { key, version, .. } => {
                    self.writer.tombstone(&PortableTombstone { key: PortableKey::of(key), version: *version })
                }
            };
        }
        let place =
            BatchPlace { migration: self.migration, round: batch.round, sequence: batch.sequence, clear: batch.clear };
        self.writer.finish(place, &mut self.compressor, out)
    }
}

/// Makes bytes into batches, for one migration.
pub struct BatchDecoder {
    migration: u128,
    reader: BatchReader,
    timeouts: Timeouts,
}

impl BatchDecoder {
    /// `timeouts`: of the VM at this host; nothing lives longer.
    pub fn new(migration: u128, timeouts: Timeouts) -> Self {
        Self { migration, reader: BatchReader::new(LIMITS), timeouts }
    }

    /// The batch that `bytes` are, by the clock of `now_ms`.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(&mut self, bytes: &[u8], now_ms: u64) -> Result<Batch, WireError> {
        let batch = self.reader.read(bytes)?;
        let place = batch.header().place;
        if place.migration != self.migration {
            return Err(WireError::Migration);
        }
        // At most as many as the limits say.
        let mut items = Vec::with_capacity(batch.header().records as usize);
        for record in batch.records() {
            let key = |key: &PortableKey| -> Result<Key, WireError> { key.to_key().map_err(WireError::Key) };
            items.push(match record? {
                Record::Tombstone(gone) => Item::Tombstone { key: key(&gone.key)?, version: gone.version },
                Record::Connection(portable) => match portable.to_connection(now_ms, &self.timeouts) {
                    Ok(connection) => Item::Connection(connection),
                    Err(error) => Item::Lapsed {
                        key: key(&portable.key)?,
                        version: portable.version,
                        expired: error == PortableError::Expired,
                    },
                },
            });
        }
        Ok(Batch { round: place.round, sequence: place.sequence, clear: place.clear, items })
    }
}

#[cfg(test)]
mod tests {
    use ferry_dataplane::conntrack::sample;

    use super::*;
    use crate::batch::Digest;

    const HERE_MS: u64 = 5000;
    const THERE_MS: u64 = (1 << 32) - 100;

    fn batch() -> Batch {
        let mut lasting = sample(1);
        lasting.refresh(HERE_MS, 20_000);
        lasting.version = 7;
        let mut expired = sample(2);
        expired.refresh(HERE_MS - 100, 50);
        expired.version = 8;
        let items = vec![
            Item::Connection(lasting),
            Item::Tombstone { key: sample(3).key, version: 9 },
            Item::Connection(expired),
        ];
        Batch { round: 3, sequence: 4, clear: true, items }
    }

    #[test]
    fn a_batch_comes_out_by_the_other_clock_with_the_same_digest() {
        let batch = batch();
        let mut bytes = Vec::new();
        let header = BatchEncoder::new(11, Compressor::off()).encode(&batch, HERE_MS, &mut bytes);
        assert_eq!((header.records, bytes.len()), (3, batch.wire_bytes()));
        let mut decoder = BatchDecoder::new(11, Timeouts::default());
        let there = decoder.decode(&bytes, THERE_MS).unwrap();
        assert_eq!((there.round, there.sequence, there.clear), (3, 4, true));
        let [Item::Connection(lasting), gone, lapsed] = there.items.as_slice() else { panic!("{there:?}") };
        assert_eq!((lasting.key, lasting.version, lasting.remaining_ms(THERE_MS)), (sample(1).key, 7, 20_000));
        assert_eq!(*gone, batch.items[1]);
        assert_eq!(*lapsed, Item::Lapsed { key: sample(2).key, version: 8, expired: true });
        let digest = |batch: &Batch| {
            let mut digest = Digest::default();
            digest.add(batch);
            digest
        };
        assert_eq!(digest(&there), digest(&batch));
        assert_eq!(BatchDecoder::new(12, Timeouts::default()).decode(&bytes, THERE_MS), Err(WireError::Migration));
        for cut in 0..bytes.len() {
            assert!(matches!(decoder.decode(&bytes[..cut], THERE_MS), Err(WireError::Record(_))));
        }
    }

    #[test]
    fn the_largest_batch_fits() {
        let items = (0..MAX_BATCH_ITEMS as u32).map(|n| Item::Connection(sample(n))).collect();
        let batch = Batch { round: 0, sequence: 0, clear: false, items };
        let mut bytes = Vec::new();
        BatchEncoder::new(1, Compressor::off()).encode(&batch, 0, &mut bytes);
        assert_eq!(bytes.len(), batch.wire_bytes());
        let there = BatchDecoder::new(1, Timeouts::default()).decode(&bytes, 0).unwrap();
        assert_eq!(there.items.len(), MAX_BATCH_ITEMS);
    }
}
