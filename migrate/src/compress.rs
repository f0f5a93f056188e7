//! Compression of batches where it pays: LZ4 blocks, chosen by what was measured.
//!
//! Compression pays when the time that it takes is less than the time that the saved bytes would take on the way. Both are known only by
//! trying: the ratio depends on the connections, the speed on the machine. So a batch is tried now and then; while it pays, every batch is
//! compressed and measured; when it does not, twice as many batches as before go uncompressed before the next try.
//!
//! One codec on purpose: a decompressor is what a hostile peer reaches first, and this one is safe Rust.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use serde::{Deserialize, Serialize};

use crate::encoding::MAX_RAW_BYTES;
use crate::record::RecordError;

/// Bandwidth that is assumed when none is configured, bytes per second: 10 Gbit/s.
pub const DEFAULT_BANDWIDTH_BYTES_PER_S: u64 = 1_250_000_000;
/// Batches shorter than this are not worth a try.
const MIN_BYTES: usize = 512;
/// Most batches that go uncompressed between two tries.
const MAX_PAUSE: u32 = 256;
/// What is saved must be this share of the time on the way at least, as a power of two: 1/16.
const MARGIN_SHIFT: u32 = 4;
/// How much a new measurement counts in the mean, as a power of two: 1/4.
const MEAN_SHIFT: u32 = 2;

/// How a payload is compressed. The numbers are the format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Codec {
    /// Not at all.
    None = 0,
    /// One LZ4 block, without frame and without its length in front.
    Lz4 = 1,
}

impl Codec {
    /// The codec of this number, if it is known.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// When to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompressMode {
    /// Never; also when the peer cannot read it.
    Off,
    /// When it pays.
    #[default]
    Adaptive,
    /// Whenever the result is shorter.
    Always,
}

/// What compression did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompressStats {
    /// Batches.
    pub batches: u64,
    /// Batches that were sent compressed.
    pub compressed: u64,
    /// Batches that were compressed and not sent so, since they became no shorter.
    pub in_vain: u64,
    /// Times that compression was found not to pay.
    pub not_worth_it: u64,
    /// Bytes before.
    pub raw_bytes: u64,
    /// Bytes after.
    pub sent_bytes: u64,
    /// Time that compression took, nanoseconds.
    pub cpu_ns: u64,
}

/// A running mean of a positive number.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<u64>);

impl Mean {
    fn add(&mut self, value: u64) -> u64 {
        let mean = self.0.map_or(value, |old| old - (old >> MEAN_SHIFT) + (value >> MEAN_SHIFT));
        self.0 = Some(mean);
        mean
    }

    fn forget(&mut self) {
        self.0 = None;
    }
}

/// Compresses batches of one migration.
pub struct Compressor {
    mode: CompressMode,
    bandwidth: u64,
    clock_ns: Box<dyn FnMut() -> u64 + Send>,
    table: CompressTable,
    out: Vec<u8>,
    /// Picoseconds per byte that compression takes.
    cpu: Mean,
    /// Bytes out of 2^16 bytes in.
    ratio: Mean,
    /// Batches to go uncompressed before the next try.
    pause: u32,
    next_pause: u32,
    stats: CompressStats,
}

impl Compressor {
    /// `bandwidth_bytes_per_s` of the way to the peer, [`DEFAULT_BANDWIDTH_BYTES_PER_S`] unless known. `clock_ns` measures what compression
    /// costs: any clock that runs forward, in nanoseconds; one that stands still says that it costs nothing.
    pub fn new(
        mode: CompressMode,
        bandwidth_bytes_per_s: Option<u64>,
        clock_ns: impl FnMut() -> u64 + Send + 'static,
    ) -> Self {
        let out = if mode == CompressMode::Off {
            Vec::new()
        } else {
            vec![0; get_maximum_output_size(MAX_RAW_BYTES as usize)]
        };
        Self {
            mode,
            bandwidth: bandwidth_bytes_per_s.unwrap_or(DEFAULT_BANDWIDTH_BYTES_PER_S).max(1),
            clock_ns: Box::new(clock_ns),
            table: CompressTable::large(),
            out,
            cpu: Mean::default(),
            ratio: Mean::default(),
            pause: 0,
            next_pause: 1,
            stats: CompressStats::default(),
        }
    }

    /// No compression.
    pub fn off() -> Self {
        Self::new(CompressMode::Off, None, || 0)
    }

    /// What was done so far.
    pub fn stats(&self) -> CompressStats {
        self.stats
    }

    /// Another bandwidth, bytes per second: the next batch is tried.
    pub fn set_bandwidth(&mut self, bandwidth_bytes_per_s: u64) {
        self.bandwidth = bandwidth_bytes_per_s.max(1);
        (self.pause, self.next_pause) = (0, 1);
    }

    /// Nanoseconds that `bytes` take on the way.
    fn travel_ns(&self, bytes: u64) -> u64 {
        u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(self.bandwidth)).unwrap_or(u64::MAX)
    }

    /// The payload for these records. Longer ones than [`MAX_RAW_BYTES`] stay as they are.
    pub fn compress<'a>(&'a mut self, raw: &'a [u8]) -> (Codec, &'a [u8]) {
        self.stats.batches += 1;
        self.stats.raw_bytes += raw.len() as u64;
        let len = if self.is_tried(raw.len()) { self.try_lz4(raw) } else { None };
        match len.and_then(|len| self.out.get(..len)) {
            Some(payload) => {
                self.stats.compressed += 1;
                self.stats.sent_bytes += payload.len() as u64;
                (Codec::Lz4, payload)
            }
            None => {
                self.stats.sent_bytes += raw.len() as u64;
                (Codec::None, raw)
            }
        }
    }

    fn is_tried(&mut self, bytes: usize) -> bool {
        if bytes < MIN_BYTES {
            return false;
        }
        match self.mode {
            CompressMode::Off => false,
            CompressMode::Always => true,
            CompressMode::Adaptive => {
                let now = self.pause == 0;
                self.pause = self.pause.saturating_sub(1);
                now
            }
        }
    }

    /// Compresses into `out`; the length if it became shorter.
    fn try_lz4(&mut self, raw: &[u8]) -> Option<usize> {
        let room = self.out.get_mut(..get_maximum_output_size(raw.len()))?;
        let before_ns = (self.clock_ns)();
        let len = compress_into_with_table(raw, room, &mut self.table).ok().filter(|len| *len < raw.len());
        let cpu_ns = (self.clock_ns)().saturating_sub(before_ns);
        self.stats.cpu_ns += cpu_ns;
        if len.is_none() {
            self.stats.in_vain += 1;
        }
        self.judge(raw.len() as u64, len.unwrap_or(raw.len()) as u64, cpu_ns);
        len
    }

    /// Learns from a try, and pauses if it does not pay.
    fn judge(&mut self, raw: u64, sent: u64, cpu_ns: u64) {
        let cpu = self.cpu.add(cpu_ns.saturating_mul(1000) / raw.max(1));
        let ratio = self.ratio.add((sent << 16) / raw.max(1));
        let plain_ns = self.travel_ns(raw);
        let compressed_ns = self.travel_ns((raw * ratio) >> 16).saturating_add(cpu.saturating_mul(raw) / 1000);
        if compressed_ns.saturating_add(plain_ns >> MARGIN_SHIFT) < plain_ns {
            self.next_pause = 1;
            return;
        }
        self.stats.not_worth_it += 1;
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        // The next try is to speak for itself.
        self.cpu.forget();
        self.ratio.forget();
    }
}

/// Decompresses `payload`, which must fill `out` exactly.
///
/// # Errors
/// [`RecordError::Decompress`].
pub fn decompress(codec: Codec, payload: &[u8], out: &mut [u8]) -> Result<(), RecordError> {
    let len = match codec {
        Codec::None => {
            if payload.len() != out.len() {
                return Err(RecordError::Decompress);
            }
            out.copy_from_slice(payload);
            payload.len()
        }
        Codec::Lz4 => decompress_into(payload, out).map_err(|_| RecordError::Decompress)?,
    };
    if len == out.len() { Ok(()) } else { Err(RecordError::Decompress) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// A clock that goes on by `step` with each look.
    fn ticking(step: Arc<AtomicU64>) -> impl FnMut() -> u64 + Send + 'static {
        let mut now = 0;
        move || {
            now += step.load(Relaxed);
            now
        }
    }

    /// Every fourth byte is random.
    fn half_empty(len: usize) -> Vec<u8> {
        let mut x = 7u32;
        (0..len)
            .map(|i| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if i % 16 < 4 { (x >> 24) as u8 } else { 0 }
            })
            .collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut x = 9u64;
        (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect()
    }

    #[test]
    fn what_is_compressed_comes_back() {
        for data in [half_empty(120 * 1024), half_empty(MAX_RAW_BYTES as usize), vec![5; 600]] {
            let mut c = Compressor::new(CompressMode::Always, None, || 0);
            let (codec, payload) = c.compress(&data);
            assert_eq!(codec, Codec::Lz4);
            assert!(payload.len() < data.len());
            let payload = payload.to_vec();
            let mut out = vec![0; data.len()];
            decompress(codec, &payload, &mut out).unwrap();
            assert_eq!(out, data);
            // Neither more nor less than announced.
            assert_eq!(decompress(codec, &payload, &mut vec![0; data.len() + 1]), Err(RecordError::Decompress));
            assert_eq!(decompress(codec, &payload, &mut vec![0; data.len() - 1]), Err(RecordError::Decompress));
            for cut in [0, 1, payload.len() / 2, payload.len() - 1] {
                assert!(decompress(codec, &payload[..cut], &mut out).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn noise_and_trifles_stay_as_they_are() {
        let mut c = Compressor::new(CompressMode::Always, None, || 0);
        let data = noise(10_000);
        assert_eq!(c.compress(&data), (Codec::None, data.as_slice()));
        assert_eq!(c.compress(&[0; MIN_BYTES - 1]).0, Codec::None);
        let too_long = vec![0; MAX_RAW_BYTES as usize + 2];
        assert_eq!(c.compress(&too_long).0, Codec::None);
        assert_eq!((c.stats().in_vain, c.stats().compressed), (1, 0));
        let mut off = Compressor::off();
        assert_eq!(off.compress(&[0; 5000]).0, Codec::None);
    }

    #[test]
    fn compressed_while_it_pays_and_tried_less_and_less_while_not() {
        let data = half_empty(100_000);
        let step = Arc::new(AtomicU64::new(0));
        // 100 kB take 1 ms on this way.
        let mut c = Compressor::new(CompressMode::Adaptive, Some(100_000_000), ticking(step.clone()));
        // 100 us of work for more than half of the bytes: pays.
        step.store(100_000, Relaxed);
        for _ in 0..100 {
            assert_eq!(c.compress(&data).0, Codec::Lz4);
        }
        // 10 ms of work do not.
        step.store(10_000_000, Relaxed);
        let before = c.stats();
        let tried: Vec<u32> = (0..1200).filter(|_| c.compress(&data).0 == Codec::Lz4).collect();
        assert_eq!(tried.iter().take(6).copied().collect::<Vec<_>>(), [0, 2, 5, 10, 19, 36]);
        assert_eq!(tried.windows(2).map(|w| w[1] - w[0]).max(), Some(MAX_PAUSE + 1));
        assert_eq!(c.stats().not_worth_it - before.not_worth_it, tried.len() as u64);
        // It gets cheap again: found out by the next try, and from then on.
        step.store(100_000, Relaxed);
        let plain = (0..2 * MAX_PAUSE).take_while(|_| c.compress(&data).0 == Codec::None).count();
        assert!(plain <= MAX_PAUSE as usize);
        for _ in 0..50 {
            assert_eq!(c.compress(&data).0, Codec::Lz4);
        }
        // A faster way changes the sum: 100 us are longer than 100 kB take.
        c.set_bandwidth(10_000_000_000);
        let sent = (0..100).filter(|_| c.compress(&data).0 == Codec::Lz4).count();
        assert!(sent < 10, "{sent}");
        let stats = c.stats();
        assert_eq!(stats.raw_bytes, stats.batches * 100_000);
        assert!(stats.sent_bytes < stats.raw_bytes && stats.cpu_ns > 0);
    }

    #[test]
    fn saving_little_does_not_pay_even_for_nothing() {
        // One part in forty can be saved; less than the margin.
        let mut data = noise(40_000);
        data[..1000].fill(0);
        let mut c = Compressor::new(CompressMode::Adaptive, Some(1000), || 0);
        assert_eq!(c.compress(&data).0, Codec::Lz4, "the try itself is sent: it was paid for");
        assert_eq!(c.stats().not_worth_it, 1);
        assert_eq!(c.compress(&data).0, Codec::None);
    }
}
