//! Batches of records from a hostile peer, up to the connections that come of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // A panic is how a fuzzer learns of a bug.
use std::sync::Mutex;

use ferry_dataplane::conntrack::{ConnTable, ModelTable, Portable, Timeouts, Tracker};

use crate::compress::{Codec, CompressMode, Compressor, decompress};
use crate::encoding::{
    BatchLimits, BatchPlace, BatchReader, BatchWriter, HEADER_BYTES, MAX_BATCH_BYTES, MAX_RAW_BYTES, batch_bytes,
};
use crate::record::{CONNECTION_BYTES, MAX_RECORD_BYTES, Record, RecordError, TOMBSTONE_BYTES, decode};

/// How far an input came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// The header was refused.
    Refused,
    /// The payload was refused.
    Payload,
    /// A record was refused.
    Record,
    /// All records were read, some of which can be no connection.
    Read,
    /// All records were read, and their connections stored.
    Stored,
}

/// A reader for all runs: it takes a megabyte.
static READER: Mutex<Option<BatchReader>> = Mutex::new(None);

/// Reads `data` as a batch, and stores the connections that it brings.
pub fn batch(data: &[u8]) -> Reached {
    if let Some(head) = data.first_chunk::<HEADER_BYTES>()
        && let Ok(bytes) = batch_bytes(head)
    {
        assert!((HEADER_BYTES..=MAX_BATCH_BYTES).contains(&bytes));
    }
    let mut reader = READER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let reader = reader.get_or_insert_with(|| BatchReader::new(BatchLimits::default()));
    let batch = match reader.read(data) {
        Ok(batch) => batch,
        Err(RecordError::PayloadChecksum | RecordError::Decompress) => return Reached::Payload,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Reached::Refused;
        }
    };
    assert_eq!(batch.raw().len(), batch.header().raw_bytes as usize);
    let records: Vec<Result<Record, RecordError>> = batch.records().collect();
    assert!(records.len() <= batch.header().records as usize + 1);
    assert_eq!(batch.check(), records.iter().copied().try_for_each(|record| record.map(|_| ())));
    each_record(batch.raw());
    let Ok(records) = records.into_iter().collect::<Result<Vec<Record>, _>>() else { return Reached::Record };
    write_again(&records, batch.header().place);
    store(&records)
}

/// What the reader says of single records is what the writer would write.
fn each_record(raw: &[u8]) {
    let mut rest = raw;
    while let Ok((record, behind)) = decode(rest) {
        let bytes = &rest[..rest.len() - behind.len()];
        assert!(!bytes.is_empty() && bytes.len() <= MAX_RECORD_BYTES);
        match record {
            None => assert!(bytes[0] & 0x80 != 0),
            Some(Record::Connection(c)) => {
                let written = crate::record::encode_connection(&c);
                // Extensions aside, which change the length.
                assert_eq!(written[2..], bytes[2..CONNECTION_BYTES]);
            }
            Some(Record::Tombstone(t)) => {
                let written = crate::record::encode_tombstone(&t);
                assert_eq!(written[2..], bytes[2..TOMBSTONE_BYTES]);
            }
        }
        rest = behind;
        if rest.is_empty() {
            break;
        }
    }
}

fn write_again(records: &[Record], place: BatchPlace) {
    let mut writer = BatchWriter::new(BatchLimits { raw_bytes: records.len() as u32 * 120, ..Default::default() });
    for record in records {
        writer.push(record).expect("there was room before");
    }
    let mut out = Vec::new();
    let mut compressor = Compressor::new(CompressMode::Always, None, || 0);
    let header = writer.finish(place, &mut compressor, &mut out);
    let mut reader = BatchReader::new(BatchLimits { raw_bytes: header.raw_bytes, ..Default::default() });
    let again = reader.read(&out).expect("what is written can be read");
    assert_eq!(again.header().place, place);
    assert!(again.records().eq(records.iter().map(|r| Ok(*r))), "as it was");
}

fn store(records: &[Record]) -> Reached {
    let timeouts = Timeouts::default();
    let longest_ms = timeouts.tcp_established_ms;
    let now_ms = u64::from(u32::MAX) - 5;
    let mut tracker = Tracker::new(ModelTable::new(64), Default::default());
    let mut reached = Reached::Stored;
    for record in records {
        match record {
            Record::Connection(portable) => match portable.to_connection(now_ms, &timeouts) {
                Ok(connection) => {
                    assert!((1..=longest_ms).contains(&connection.remaining_ms(now_ms)));
                    let again = connection.to_portable(now_ms);
                    assert_eq!(Portable { remaining_ms: portable.remaining_ms, ..again }, *portable);
                    let _ = tracker.table_mut().insert(&connection, now_ms);
                }
                Err(_) => reached = Reached::Read,
            },
            Record::Tombstone(tombstone) => match tombstone.key.to_key() {
                Ok(key) => assert!(tracker.table_mut().lookup(&key, now_ms).is_none_or(|c| c.key == key)),
                Err(_) => reached = Reached::Read,
            },
        }
    }
    tracker.expire(now_ms + u64::from(longest_ms), usize::MAX);
    assert!(tracker.table().is_empty(), "nobody makes an entry that stays for ever");
    reached
}

/// Decompresses `data` behind a length of three bytes; and compresses it.
pub fn decompression(data: &[u8]) {
    let Some((&[a, b, c], data)) = data.split_first_chunk::<3>() else { return };
    let len = u32::from_le_bytes([a, b, c, 0]).min(MAX_RAW_BYTES) as usize;
    let mut out = vec![0; len];
    let _ = decompress(Codec::Lz4, data, &mut out);
    let mut compressor = Compressor::new(CompressMode::Always, None, || 0);
    let (codec, payload) = compressor.compress(data);
    assert!(payload.len() <= data.len());
    let payload = payload.to_vec();
    let mut out = vec![0; data.len()];
    decompress(codec, &payload, &mut out).expect("what was compressed can be decompressed");
    assert_eq!(out, data);
}

/// Makes the checksums of a batch right, if it is one, so that what lies behind them is reached.
pub fn set_checksums(bytes: &mut [u8]) {
    let field = |bytes: &[u8], at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
    let Some(header_bytes) = bytes.get(6..8).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))) else { return };
    if header_bytes < HEADER_BYTES || bytes.len() < header_bytes {
        return;
    }
    let raw_bytes = field(bytes, 48).unwrap_or(0).min(MAX_RAW_BYTES) as usize;
    let mut raw = vec![0; raw_bytes];
    let crc = match Codec::from_number(bytes[10]) {
        Some(Codec::Lz4) if decompress(Codec::Lz4, &bytes[header_bytes..], &mut raw).is_ok() => crc32fast::hash(&raw),
        _ => crc32fast::hash(&bytes[header_bytes..]),
    };
    bytes[52..56].copy_from_slice(&crc.to_le_bytes());
    bytes[60..64].fill(0);
    let crc = crc32fast::hash(&bytes[..header_bytes]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::Path;

    struct XorShift(u64);

    impl XorShift {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, n: usize) -> usize {
            (self.next() % n.max(1) as u64) as usize
        }
    }

    fn golden() -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        paths.retain(|p| p.extension().is_some_and(|e| e == "bin"));
        paths.sort();
        paths.iter().map(|p| std::fs::read(p).unwrap()).collect()
    }

    /// Batches with a few changes, mostly with checksums that fit again.
    #[test]
    fn mutated_batches_keep_every_invariant() {
        let seeds = golden();
        let readable: Vec<usize> = (0..seeds.len()).filter(|i| batch(&seeds[*i]) == Reached::Stored).collect();
        assert!(seeds.len() >= 10 && readable.len() >= 3);
        let mut rng = XorShift(0x5eed_0001_beef_cafe);
        let mut reached = BTreeMap::<Reached, u32>::new();
        for _ in 0..60_000 {
            let seed = if rng.below(8) == 0 { rng.below(seeds.len()) } else { readable[rng.below(readable.len())] };
            let mut data = seeds[seed].clone();
            for _ in 0..rng.below(4) {
                let at = if rng.below(4) == 0 { rng.below(HEADER_BYTES) } else { rng.below(data.len()) };
                data[at] = match rng.below(3) {
                    0 => rng.next() as u8,
                    1 => data[at] ^ (1 << rng.below(8)),
                    _ => [0, 1, 7, 15, 0x7f, 0x80, 0xff, 6, 17, 58, 132][rng.below(11)],
                };
            }
            match rng.below(24) {
                0 => data.truncate(rng.below(data.len())),
                1 => data.extend(std::iter::repeat_n(0x5a, rng.below(300))),
                _ => {}
            }
            if rng.below(8) != 0 {
                set_checksums(&mut data);
            }
            *reached.entry(batch(&data)).or_default() += 1;
        }
        // The run is worth something only when every end is reached often.
        for end in [Reached::Refused, Reached::Payload, Reached::Record, Reached::Read, Reached::Stored] {
            assert!(reached.get(&end).is_some_and(|n| *n >= 500), "{end:?}: {reached:?}");
        }
    }

    #[test]
    fn arbitrary_bytes_keep_every_invariant() {
        let mut rng = XorShift(77);
        for _ in 0..5000 {
            let data: Vec<u8> = (0..rng.below(400)).map(|_| rng.next() as u8).collect();
            batch(&data);
            let mut few: Vec<u8> = data.iter().map(|b| b & 0x81).collect();
            if let Some(high) = few.get_mut(2) {
                *high = 0;
            }
            decompression(&few);
        }
    }

    /// Nothing is read from a batch that was cut anywhere, or that something follows.
    #[test]
    fn a_cut_batch_is_refused_at_every_byte() {
        for seed in golden() {
            for cut in 0..seed.len() {
                assert_eq!(batch(&seed[..cut]), Reached::Refused, "cut at {cut}");
            }
            let mut longer = seed.clone();
            longer.push(0);
            assert_eq!(batch(&longer), Reached::Refused);
        }
    }
}
