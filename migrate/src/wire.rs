//! Where the machines' batches and late frames become the bytes of the bulk connection, and back.
//!
//! A message of the bulk connection is one byte that says what it is ([`BATCH`], [`CLEARING_BATCH`], [`LATE_FRAME`]) and then
//! the batch (FORMAT.md) or the frame.
use ferry_dataplane::conntrack::{PortableKey, Timeouts};

use crate::batch::{Batch, Item, MAX_BATCH_ITEMS};
use crate::compress::Compressor;
use crate::encoding::{BatchLimits, BatchPlace, BatchReader, BatchWriter};
use crate::record::{PortableTombstone, Record, RecordError};

/// A batch follows.
pub const BATCH: u8 = 0;
/// A batch follows, and everything before it is void ([`Batch::clear`]).
pub const CLEARING_BATCH: u8 = 1;
/// A frame for the VM follows.
pub const LATE_FRAME: u8 = 2;

/// As many records as the machines put into a batch.
const LIMITS: BatchLimits = BatchLimits { records: MAX_BATCH_ITEMS as u32, raw_bytes: crate::encoding::MAX_RAW_BYTES };

/// What is wrong with a message of the bulk connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No bytes.
    #[error("an empty message")]
    Empty,
    /// A first byte that this version does not know.
    #[error("a message of kind {0}, which this host does not know")]
    Kind(u8),
    /// The batch, or a record in it, is malformed.
    #[error("malformed batch: {0}")]
    Record(#[from] RecordError),
    /// A connection that tracking could not have made.
    #[error("impossible connection: {0}")]
    Connection(String),
    /// A batch of another migration.
    #[error("a batch of another migration")]
    Migration,
    /// More items than a batch may have.
    #[error("more than {MAX_BATCH_ITEMS} items in a batch")]
    TooMany,
}

/// A message of the bulk connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bulk {
    /// Connections and tombstones.
    Batch(Batch),
    /// A frame for the VM.
    LateFrame(Vec<u8>),
}

/// The source's end.
pub struct Encoder {
    migration: u128,
    writer: BatchWriter,
    compressor: Compressor,
}

impl Encoder {
    /// For one migration.
    pub fn new(migration: u128, compressor: Compressor) -> Self {
        Self { migration, writer: BatchWriter::new(LIMITS), compressor }
    }

    /// How compression did.
    pub fn compressor(&self) -> &Compressor {
        &self.compressor
    }

    /// A batch as a message. `now_ms`: the clock of the table that the connections are of.
    pub fn batch(&mut self, batch: &Batch, now_ms: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + crate::encoding::HEADER_BYTES + batch.wire_bytes());
        out.push(if batch.clear { CLEARING_BATCH } else { BATCH });
        for item in batch.items.iter().take(MAX_BATCH_ITEMS) {
            let record = match item {
                Item::Connection(connection) => {
                    let mut portable = connection.to_portable(now_ms);
                    // One that expires in this moment still counts in the round's digest; it expires there.
                    portable.remaining_ms = portable.remaining_ms.max(1);
                    Record::Connection(portable)
                }
                Item::Tombstone { key, version } => {
                    Record::Tombstone(PortableTombstone { key: PortableKey::of(key), version: *version })
                }
            };
            // There is room for as many items as a batch has.
            let _ = self.writer.push(&record);
        }
        let place = BatchPlace { migration: self.migration, round: batch.round, sequence: batch.sequence };
        self.writer.finish(place, &mut self.compressor, &mut out);
        out
    }

    /// A late frame as a message.
    pub fn late_frame(frame: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + frame.len());
        out.push(LATE_FRAME);
        out.extend_from_slice(frame);
        out
    }
}

/// The destination's end.
pub struct Decoder {
    migration: u128,
    reader: BatchReader,
    timeouts: Timeouts,
}

impl Decoder {
    /// For one migration. `timeouts`: the VM's here; no connection lives longer without a packet.
    pub fn new(migration: u128, timeouts: Timeouts) -> Self {
        Self { migration, reader: BatchReader::new(LIMITS), timeouts }
    }

    /// Reads a message. `now_ms`: the clock of the table that the connections go into.
    ///
    /// # Errors
    /// [`WireError`]: the peer is not to be trusted with any more.
    pub fn read(&mut self, message: &[u8], now_ms: u64) -> Result<Bulk, WireError> {
        let (kind, rest) = message.split_first().ok_or(WireError::Empty)?;
        let clear = match *kind {
            BATCH => false,
            CLEARING_BATCH => true,
            LATE_FRAME => return Ok(Bulk::LateFrame(rest.to_vec())),
            other => return Err(WireError::Kind(other)),
        };
        let batch = self.reader.read(rest)?;
        let place = batch.header().place;
        if place.migration != self.migration {
            return Err(WireError::Migration);
        }
        let mut items = Vec::with_capacity((batch.header().records as usize).min(MAX_BATCH_ITEMS));
        for record in batch.records() {
            let item = match record? {
                Record::Connection(portable) => Item::Connection(
                    portable.to_connection(now_ms, &self.timeouts).map_err(|e| WireError::Connection(e.to_string()))?,
                ),
                Record::Tombstone(PortableTombstone { key, version }) => {
                    Item::Tombstone { key: key.to_key().map_err(|e| WireError::Connection(e.to_string()))?, version }
                }
            };
            if items.len() == MAX_BATCH_ITEMS {
                return Err(WireError::TooMany);
            }
            items.push(item);
        }
        Ok(Bulk::Batch(Batch { round: place.round, sequence: place.sequence, clear, items }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Digest;
    use ferry_dataplane::conntrack::Connection;

    const HERE_MS: u64 = 77_000;
    const THERE_MS: u64 = 5_000_000;

    fn connection(n: u32) -> Connection {
        let mut portable = ferry_dataplane::conntrack::sample(n).to_portable(0);
        portable.remaining_ms = 30_000;
        portable.to_connection(HERE_MS, &Timeouts::default()).expect("a connection that may exist")
    }

    #[test]
    fn batches_arrive_with_the_same_digest() {
        let items: Vec<Item> = (0..MAX_BATCH_ITEMS as u32)
            .map(|n| match n % 5 {
                0 => Item::Tombstone { key: connection(n).key, version: n },
                _ => Item::Connection(connection(n)),
            })
            .collect();
        let mut encoder = Encoder::new(7, Compressor::off());
        let mut decoder = Decoder::new(7, Timeouts::default());
        let digest = |batch: &Batch| {
            let mut digest = Digest::default();
            digest.add(batch);
            digest.value()
        };
        for (sequence, clear) in [(0, false), (1, true)] {
            let batch = Batch { round: 3, sequence, clear, items: items.clone() };
            let bytes = encoder.batch(&batch, HERE_MS);
            let Ok(Bulk::Batch(there)) = decoder.read(&bytes, THERE_MS) else { panic!("not a batch") };
            assert_eq!(digest(&there), digest(&batch));
            assert_eq!((there.clear, there.items.len()), (clear, MAX_BATCH_ITEMS));
            assert_eq!(Decoder::new(8, Timeouts::default()).read(&bytes, 0), Err(WireError::Migration));
            for cut in [1, 40, bytes.len() - 1] {
                assert!(decoder.read(&bytes[..cut], THERE_MS).is_err());
            }
        }
    }

    #[test]
    fn frames_and_nonsense() {
        let mut decoder = Decoder::new(7, Timeouts::default());
        assert_eq!(decoder.read(&Encoder::late_frame(b"frame"), 0), Ok(Bulk::LateFrame(b"frame".to_vec())));
        assert_eq!(decoder.read(&[], 0), Err(WireError::Empty));
        assert_eq!(decoder.read(&[9, 1, 2], 0), Err(WireError::Kind(9)));
        assert!(matches!(decoder.read(&[BATCH, 1, 2], 0), Err(WireError::Record(_))));
    }
}
