//! Batches: what travels on the bulk connection. A header with checksums, then records, compressed or not. `FORMAT.md` says it byte by byte.
//!
//! Writer and reader allocate when they are made and never again. The checksums find accidents, nothing else: whoever can change bytes
//! on purpose is kept out by the connection.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use ferry_dataplane::conntrack::Portable;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::compress::{Codec, Compressor, decompress};
use crate::record::{
    CONNECTION_BYTES, PortableTombstone, Record, RecordError, TOMBSTONE_BYTES, UNIT_BYTES, decode, encode_connection,
    encode_tombstone, skip_extensions,
};

/// The first bytes of every batch.
pub const MAGIC: [u8; 4] = *b"FRYB";
/// Major version of the format: others are refused.
pub const MAJOR: u8 = 1;
/// Minor version of the format: what a higher one adds is optional.
pub const MINOR: u8 = 0;
/// Bytes of a header without extensions.
pub const HEADER_BYTES: usize = 64;
/// Most bytes of a header.
pub const MAX_HEADER_BYTES: usize = 512;
/// Most records of a batch.
pub const MAX_RECORDS: u32 = 8192;
/// Most bytes of a batch's records, decompressed.
pub const MAX_RAW_BYTES: u32 = 1 << 20;
/// Most bytes of a batch.
pub const MAX_BATCH_BYTES: usize = MAX_HEADER_BYTES + MAX_RAW_BYTES as usize;
/// Header flags with these bits must be understood; the others need not be.
const MANDATORY_FLAGS: u16 = 0x00ff;
/// Header flag: everything before this batch is void.
const FLAG_CLEAR: u16 = 0x0001;

/// How large batches may be. More than the format's own limits is cut to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Records, at most [`MAX_RECORDS`].
    pub records: u32,
    /// Bytes of records, decompressed, at most [`MAX_RAW_BYTES`].
    pub raw_bytes: u32,
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self { records: MAX_RECORDS, raw_bytes: MAX_RAW_BYTES }
    }
}

impl BatchLimits {
    fn cut(self) -> Self {
        Self { records: self.records.min(MAX_RECORDS), raw_bytes: self.raw_bytes.min(MAX_RAW_BYTES) }
    }
}

/// Where a batch belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchPlace {
    /// The migration, as the control connection knows it.
    pub migration: u128,
    /// The round: 0 is the walk of the whole table.
    pub round: u32,
    /// The batch's number within the migration, from 0 without gaps.
    pub sequence: u64,
    /// Everything before this batch is void: the reader forgets all connections of the migration first.
    pub clear: bool,
}

/// What a header says that a reader needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Where the batch belongs.
    pub place: BatchPlace,
    /// The writer's minor version.
    pub minor: u8,
    /// Compression of the payload.
    pub codec: Codec,
    /// Number of records.
    pub records: u32,
    /// Bytes of records.
    pub raw_bytes: u32,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// Bytes of the header.
    pub header_bytes: u16,
    raw_crc: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHeader {
    magic: [u8; 4],
    major: u8,
    minor: u8,
    header_bytes: U16,
    flags: U16,
    codec: u8,
    zero: u8,
    records: U32,
    migration: U128,
    sequence: U64,
    round: U32,
    payload_bytes: U32,
    raw_bytes: U32,
    raw_crc: U32,
    zero_too: U32,
    /// Of the whole header with zeros here.
    header_crc: U32,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_BYTES && core::mem::offset_of!(WireHeader, header_crc) == 60);

/// CRC-32 (IEEE 802.3) of a header whose checksum field counts as zero.
fn header_crc(wire: &WireHeader, extensions: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(WireHeader { header_crc: 0.into(), ..*wire }.as_bytes());
    crc.update(extensions);
    crc.finalize()
}

/// How many bytes the batch has that begins with `head`, at most [`MAX_BATCH_BYTES`]: for reading from a stream.
///
/// # Errors
/// [`RecordError::Magic`], [`RecordError::Version`], [`RecordError::HeaderLength`], [`RecordError::PayloadLength`].
pub fn batch_bytes(head: &[u8; HEADER_BYTES]) -> Result<usize, RecordError> {
    let wire: WireHeader = zerocopy::transmute!(*head);
    if wire.magic != MAGIC {
        return Err(RecordError::Magic);
    }
    if wire.major != MAJOR {
        return Err(RecordError::Version { major: wire.major, minor: wire.minor });
    }
    let header_bytes = usize::from(wire.header_bytes.get());
    if !(HEADER_BYTES..=MAX_HEADER_BYTES).contains(&header_bytes) || !header_bytes.is_multiple_of(UNIT_BYTES) {
        return Err(RecordError::HeaderLength(wire.header_bytes.get()));
    }
    let (payload, raw) = (wire.payload_bytes.get(), wire.raw_bytes.get());
    if raw > MAX_RAW_BYTES || payload > raw {
        return Err(RecordError::PayloadLength { payload, raw });
    }
    Ok(header_bytes + payload as usize)
}

/// Reads a header; returns it and the payload behind it, which must end where `bytes` do.
fn read_header(bytes: &[u8], limits: BatchLimits) -> Result<(BatchHeader, &[u8]), RecordError> {
    let (head, rest) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(RecordError::Truncated { need: HEADER_BYTES, have: bytes.len() })?;
    let need = batch_bytes(head)?;
    let wire: WireHeader = zerocopy::transmute!(*head);
    let surplus = bytes.len().checked_sub(need).ok_or(RecordError::Truncated { need, have: bytes.len() })?;
    if surplus != 0 {
        return Err(RecordError::Surplus(surplus));
    }
    let (extensions, payload) = rest
        .split_at_checked(usize::from(wire.header_bytes.get()).saturating_sub(HEADER_BYTES))
        .ok_or(RecordError::HeaderLength(wire.header_bytes.get()))?;
    if wire.header_crc.get() != header_crc(&wire, extensions) {
        return Err(RecordError::HeaderChecksum);
    }
    let unknown = wire.flags.get() & MANDATORY_FLAGS & !FLAG_CLEAR;
    if unknown != 0 {
        return Err(RecordError::BatchFlags(unknown));
    }
    if wire.zero != 0 || wire.zero_too.get() != 0 {
        return Err(RecordError::Reserved);
    }
    let codec = Codec::from_number(wire.codec).ok_or(RecordError::Codec(wire.codec))?;
    let (payload_bytes, raw_bytes) = (wire.payload_bytes.get(), wire.raw_bytes.get());
    // What was compressed has become shorter, or it would not have been sent compressed.
    if raw_bytes > limits.raw_bytes || (codec == Codec::None) != (payload_bytes == raw_bytes) {
        return Err(RecordError::PayloadLength { payload: payload_bytes, raw: raw_bytes });
    }
    let records = wire.records.get();
    if records > limits.records || u64::from(records) * UNIT_BYTES as u64 > u64::from(raw_bytes) {
        return Err(RecordError::Records(records));
    }
    skip_extensions(extensions)?;
    let header = BatchHeader {
        place: BatchPlace {
            migration: wire.migration.get(),
            round: wire.round.get(),
            sequence: wire.sequence.get(),
            clear: wire.flags.get() & FLAG_CLEAR != 0,
        },
        minor: wire.minor,
        codec,
        records,
        raw_bytes,
        payload_bytes,
        header_bytes: wire.header_bytes.get(),
        raw_crc: wire.raw_crc.get(),
    };
    Ok((header, payload))
}

/// No room for another record: the batch is to be finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the batch is full")]
pub struct BatchFull;

/// Collects records into batches.
pub struct BatchWriter {
    raw: Vec<u8>,
    records: u32,
    limits: BatchLimits,
}

impl BatchWriter {
    /// An empty batch; takes memory for the largest.
    pub fn new(limits: BatchLimits) -> Self {
        let limits = limits.cut();
        Self { raw: Vec::with_capacity(limits.raw_bytes as usize), records: 0, limits }
    }

    /// Records so far.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// No record.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// The records' bytes so far, as they are before compression.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    #[inline]
    fn push_bytes(&mut self, record: &[u8]) -> Result<(), BatchFull> {
        if self.records >= self.limits.records || self.raw.len() + record.len() > self.limits.raw_bytes as usize {
            return Err(BatchFull);
        }
        self.raw.extend_from_slice(record);
        self.records += 1;
        Ok(())
    }

    /// Adds a connection.
    ///
    /// # Errors
    /// [`BatchFull`]: finish the batch first.
    #[inline]
    pub fn connection(&mut self, connection: &Portable) -> Result<(), BatchFull> {
        self.push_bytes(&encode_connection(connection))
    }

    /// Adds a tombstone.
    ///
    /// # Errors
    /// [`BatchFull`]: finish the batch first.
    #[inline]
    pub fn tombstone(&mut self, tombstone: &PortableTombstone) -> Result<(), BatchFull> {
        self.push_bytes(&encode_tombstone(tombstone))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// [`BatchFull`]: finish the batch first.
    #[inline]
    pub fn push(&mut self, record: &Record) -> Result<(), BatchFull> {
        match record {
            Record::Connection(connection) => self.connection(connection),
            Record::Tombstone(tombstone) => self.tombstone(tombstone),
        }
    }

    /// Appends the batch to `out`, compressed if `compressor` thinks that it pays, and begins the next one. Returns the header.
    pub fn finish(&mut self, place: BatchPlace, compressor: &mut Compressor, out: &mut Vec<u8>) -> BatchHeader {
        let (codec, payload) = compressor.compress(&self.raw);
        let (payload_bytes, raw_bytes) = (payload.len() as u32, self.raw.len() as u32);
        let raw_crc = crc32fast::hash(&self.raw);
        let mut wire = WireHeader {
            magic: MAGIC,
            major: MAJOR,
            minor: MINOR,
            header_bytes: (HEADER_BYTES as u16).into(),
            flags: if place.clear { FLAG_CLEAR } else { 0 }.into(),
            codec: codec as u8,
            zero: 0,
            records: self.records.into(),
            migration: place.migration.into(),
            sequence: place.sequence.into(),
            round: place.round.into(),
            payload_bytes: payload_bytes.into(),
            raw_bytes: raw_bytes.into(),
            raw_crc: raw_crc.into(),
            zero_too: 0.into(),
            header_crc: 0.into(),
        };
        wire.header_crc = header_crc(&wire, &[]).into();
        out.reserve(HEADER_BYTES + payload.len());
        out.extend_from_slice(wire.as_bytes());
        out.extend_from_slice(payload);
        let header = BatchHeader {
            place,
            minor: MINOR,
            codec,
            records: self.records,
            raw_bytes,
            payload_bytes,
            header_bytes: HEADER_BYTES as u16,
            raw_crc,
        };
        self.raw.clear();
        self.records = 0;
        header
    }
}

/// Most records of one kind that fit into a batch of `raw_bytes`.
pub const fn records_that_fit(raw_bytes: u32, tombstones: bool) -> u32 {
    raw_bytes / if tombstones { TOMBSTONE_BYTES as u32 } else { CONNECTION_BYTES as u32 }
}

/// Reads batches.
pub struct BatchReader {
    raw: Vec<u8>,
    limits: BatchLimits,
}

impl BatchReader {
    /// Takes memory for the largest batch.
    pub fn new(limits: BatchLimits) -> Self {
        let limits = limits.cut();
        Self { raw: vec![0; limits.raw_bytes as usize], limits }
    }

    /// Reads the batch that `bytes` are. Its records are looked at by [`Batch::records`] only.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn read<'a>(&'a mut self, bytes: &'a [u8]) -> Result<Batch<'a>, RecordError> {
        let (header, payload) = read_header(bytes, self.limits)?;
        let raw = match header.codec {
            Codec::None => payload,
            codec => {
                let room = self.raw.get_mut(..header.raw_bytes as usize).ok_or(RecordError::Decompress)?;
                decompress(codec, payload, room)?;
                room
            }
        };
        if crc32fast::hash(raw) != header.raw_crc {
            return Err(RecordError::PayloadChecksum);
        }
        Ok(Batch { header, raw })
    }
}

/// A batch that was read.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    header: BatchHeader,
    raw: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Its header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The records' bytes, decompressed.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// The records in order; ends with the first error. There are never more of them than the header says.
    pub fn records(&self) -> Records<'a> {
        Records { rest: self.raw, announced: self.header.records, found: 0, over: false }
    }

    /// All records have the right form and number: then [`Self::records`] gives no error.
    ///
    /// # Errors
    /// The first.
    pub fn check(&self) -> Result<(), RecordError> {
        self.records().try_for_each(|record| record.map(|_| ()))
    }
}

/// A batch's records; those that may be passed over are.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    announced: u32,
    found: u32,
    over: bool,
}

impl Iterator for Records<'_> {
    type Item = Result<Record, RecordError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            if self.rest.is_empty() {
                self.over = true;
                let (announced, found) = (self.announced, self.found);
                return (announced != found).then_some(Err(RecordError::Count { announced, found }));
            }
            if self.found >= self.announced {
                self.over = true;
                return Some(Err(RecordError::Count {
                    announced: self.announced,
                    found: self.found.saturating_add(1),
                }));
            }
            match decode(self.rest) {
                Ok((record, rest)) => {
                    self.rest = rest;
                    self.found += 1;
                    if let Some(record) = record {
                        return Some(Ok(record));
                    }
                }
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}
