//! The raw sums: over private slices and over frame bytes in port memory.
//!
//! Port memory may be written by a guest while it is read. That can only make a sum wrong that the guest's own frame
//! carries: each byte is read once, and nothing but the sum depends on it.
#![allow(unsafe_code)] // Its job: reading port memory through raw pointers, and CPU instructions by feature.
use core::ptr::read_unaligned;

use crate::frame::Body;

/// Below this many bytes, wider instructions do not pay for the feature test and the call.
#[cfg(target_arch = "x86_64")]
const WIDE_LEAST_BYTES: usize = 256;

/// One's complement sum of `bytes`, taken as native-endian 16-bit words with a zero byte appended when odd, folded to 16 bits.
#[inline]
pub(super) fn slice(bytes: &[u8]) -> u16 {
    // SAFETY: the slice is readable for its length.
    unsafe { raw(bytes.as_ptr(), bytes.len()) }
}

/// Calls `f(sum, length)` with the [`slice`]-sum of every contiguous piece of `body`, in order.
#[inline]
pub(super) fn pieces(body: &Body<'_>, mut f: impl FnMut(u16, u32)) {
    for (addr, len) in body.pieces() {
        // SAFETY: whoever pushed the segment keeps it mapped and readable while the burst, hence the body, is borrowed.
        f(unsafe { raw(addr, len as usize) }, len);
    }
}

/// # Safety
/// `addr..addr + len` is mapped and readable.
#[inline]
unsafe fn raw(addr: *const u8, len: usize) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if (WIDE_LEAST_BYTES..=x86::MOST_BYTES).contains(&len) {
        if std::arch::is_x86_feature_detected!("avx512bw") {
            // SAFETY: the feature was just detected, and the length is in bounds; the range is the caller's promise.
            return fold(unsafe { x86::avx512(addr, len) });
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above; what was summed is no more than there is, and an even number of bytes.
            return unsafe {
                let (sum, done) = x86::avx2(addr, len);
                fold(sum + rest(addr.add(done), len - done))
            };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { raw_generic(addr, len) }
}

/// Sums with wide instructions. Words are added in pairs to lanes of 32 bits; the instruction that does so takes them for signed, so
/// 2^15 is taken away from each first (its top bit turned over), and added again at the end.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_shuffle_epi32, _mm256_add_epi32, _mm256_castsi256_si128,
        _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_set1_epi16, _mm256_setzero_si256,
        _mm256_xor_si256, _mm512_add_epi32, _mm512_loadu_si512, _mm512_madd_epi16, _mm512_maskz_loadu_epi8,
        _mm512_reduce_add_epi32, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_xor_si512,
    };

    /// Most bytes that can be summed at a time: 2^15 words of at most 2^15 each, with a sign, fit into a lane.
    pub(super) const MOST_BYTES: usize = 1 << 16;

    /// What was taken away from the words of so many bytes.
    fn bias(bytes: usize) -> i64 {
        (bytes as i64 / 2) << 15
    }

    /// The sum of the first bytes, and of how many: of all but at most 31. 128 bytes a turn, in four accumulators.
    ///
    /// # Safety
    /// As `raw`, the CPU has AVX2, and `len` is at most [`MOST_BYTES`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2(addr: *const u8, len: usize) -> (u64, usize) {
        let (ones, sign) = (_mm256_set1_epi16(1), _mm256_set1_epi16(i16::MIN));
        let plus = |sum: __m256i, at: usize| {
            // SAFETY: the callers below give an `at` with 32 bytes behind it that are inside the range.
            let words = unsafe { _mm256_loadu_si256(addr.add(at).cast()) };
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_xor_si256(words, sign), ones))
        };
        let [mut a, mut b, mut c, mut d] = [_mm256_setzero_si256(); 4];
        let mut at = 0;
        while len - at >= 128 {
            (a, b, c, d) = (plus(a, at), plus(b, at + 32), plus(c, at + 64), plus(d, at + 96));
            at += 128;
        }
        while len - at >= 32 {
            a = plus(a, at);
            at += 32;
        }
        let eight = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
        let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
        let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
        ((i64::from(_mm_cvtsi128_si32(one)) + bias(at)) as u64, at)
    }

    /// The sum of all bytes, 256 a turn.
    ///
    /// # Safety
    /// As `raw`, the CPU has AVX-512BW, and `len` is at most [`MOST_BYTES`].
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn avx512(addr: *const u8, len: usize) -> u64 {
        let (ones, sign) = (_mm512_set1_epi16(1), _mm512_set1_epi16(i16::MIN));
        let add = |sum, words| _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_xor_si512(words, sign), ones));
        let plus = |sum, at: usize| {
            // SAFETY: the callers below give an `at` with 64 bytes behind it that are inside the range.
            add(sum, unsafe { _mm512_loadu_si512(addr.add(at).cast()) })
        };
        let [mut a, mut b, mut c, mut d] = [_mm512_setzero_si512(); 4];
        let mut at = 0;
        while len - at >= 256 {
            (a, b, c, d) = (plus(a, at), plus(b, at + 64), plus(c, at + 128), plus(d, at + 192));
            at += 256;
        }
        while len - at >= 64 {
            a = plus(a, at);
            at += 64;
        }
        // At most 63 bytes, and zeros behind them.
        // SAFETY: only bytes inside the range are read.
        let last = unsafe { _mm512_maskz_loadu_epi8((1u64 << (len - at)) - 1, addr.add(at).cast()) };
        let all = _mm512_add_epi32(_mm512_add_epi32(add(a, last), b), _mm512_add_epi32(c, d));
        (i64::from(_mm512_reduce_add_epi32(all)) + bias(at + 64)) as u64
    }
}

/// # Safety
/// As [`raw`].
#[inline(always)]
unsafe fn raw_generic(addr: *const u8, len: usize) -> u16 {
    // 32-bit halves are added to 64-bit lanes: no carry is lost below 2^32 additions per lane, and lengths are
    // below 2^32 bytes. Sums of 32-bit words fold to the sum of their 16-bit words, since 2^16 = 1 modulo 2^16 - 1.
    let mut lanes = [0u64; 8];
    let mut at = 0usize;
    while len - at >= 64 {
        // SAFETY: at + 64 <= len, and `[[u32; 8]; 2]` has 64 bytes, any of whose values is valid.
        let block: [[u32; 8]; 2] = unsafe { read_unaligned(addr.add(at).cast()) };
        for eight in &block {
            for (lane, word) in lanes.iter_mut().zip(eight) {
                *lane += u64::from(*word);
            }
        }
        at += 64;
    }
    // SAFETY: at <= len.
    fold(lanes.iter().sum::<u64>() + unsafe { rest(addr.add(at), len - at) })
}

/// The sum of a few bytes, not folded: of fewer than 2^34.
///
/// # Safety
/// As [`raw`].
#[inline(always)]
unsafe fn rest(addr: *const u8, len: usize) -> u64 {
    let (mut sum, mut at) = (0, 0);
    while len - at >= 4 {
        // SAFETY: at + 4 <= len.
        sum += u64::from(unsafe { read_unaligned(addr.add(at).cast::<u32>()) });
        at += 4;
    }
    // Up to three bytes. Put together in a register: bytes written to memory one by one and read as a word would be waited for.
    let mut last = 0u32;
    for n in 0..3 {
        if at < len {
            // SAFETY: at < len.
            last |= u32::from(unsafe { addr.add(at).read() }) << (8 * n);
            at += 1;
        }
    }
    sum + u64::from(u32::from_ne_bytes(last.to_le_bytes()))
}

/// Folds to 16 bits with end-around carry; 0 only when every summand was 0.
#[inline(always)]
pub(crate) fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// CRC32c register after `bytes`.
#[inline]
pub(super) fn crc32c_slice(register: u32, bytes: &[u8]) -> u32 {
    // SAFETY: the slice is readable for its length.
    unsafe { crc32c_raw(register, bytes.as_ptr(), bytes.len()) }
}

/// CRC32c register after the bytes of `body`.
#[inline]
pub(super) fn crc32c_body(mut register: u32, body: &Body<'_>) -> u32 {
    for (addr, len) in body.pieces() {
        // SAFETY: as in `pieces`.
        register = unsafe { crc32c_raw(register, addr, len as usize) };
    }
    register
}

/// # Safety
/// `addr..addr + len` is mapped and readable.
#[inline]
unsafe fn crc32c_raw(register: u32, addr: *const u8, len: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the feature was just detected; the range is the caller's promise.
        return unsafe { crc32c_sse42(register, addr, len) };
    }
    // SAFETY: the caller's promise.
    unsafe { crc32c_table(register, addr, len) }
}

/// # Safety
/// As [`crc32c_raw`], and the CPU has SSE 4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
unsafe fn crc32c_sse42(register: u32, addr: *const u8, len: usize) -> u32 {
    use core::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};
    let mut wide = u64::from(register);
    let mut at = 0;
    while len - at >= 8 {
        // SAFETY: at + 8 <= len.
        wide = _mm_crc32_u64(wide, unsafe { read_unaligned(addr.add(at).cast::<u64>()) });
        at += 8;
    }
    let mut register = wide as u32;
    while at < len {
        // SAFETY: at < len.
        register = _mm_crc32_u8(register, unsafe { addr.add(at).read() });
        at += 1;
    }
    register
}

/// Byte-wise table for CPUs without the instruction.
const CRC32C_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut rest: &mut [u32] = &mut table;
    let mut n = 0u32;
    while let Some((entry, tail)) = rest.split_first_mut() {
        let mut crc = n;
        let mut bit = 0;
        while bit < 8 {
            // The Castagnoli polynomial, reflected (RFC 9260, appendix A).
            crc = if crc & 1 != 0 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        *entry = crc;
        rest = tail;
        n += 1;
    }
    table
};

/// # Safety
/// As [`crc32c_raw`].
unsafe fn crc32c_table(mut register: u32, addr: *const u8, len: usize) -> u32 {
    for at in 0..len {
        // SAFETY: at < len.
        let byte = unsafe { addr.add(at).read() };
        let entry = CRC32C_TABLE.get(usize::from(register as u8 ^ byte)).copied().unwrap_or(0);
        register = (register >> 8) ^ entry;
    }
    register
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    fn sample(len: usize, seed: u32) -> Vec<u8> {
        let mut x = seed | 1;
        (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                x as u8
            })
            .collect()
    }

    #[test]
    fn every_length_and_alignment_matches_the_naive_sum() {
        let bytes = sample(1200, 7);
        for start in 0..9 {
            for len in 0..700 {
                let part = &bytes[start..start + len];
                let want = naive(part);
                assert_eq!(slice(part), want, "start {start} len {len}");
                // SAFETY: `part` is readable.
                assert_eq!(unsafe { raw_generic(part.as_ptr(), len) }, want);
            }
        }
        // Whichever is chosen here, each variant that the processor has is exact; at the longest, too, where lanes are fullest.
        #[cfg(target_arch = "x86_64")]
        for (len, fill) in
            (0..1100).map(|len| (len, None)).chain([(x86::MOST_BYTES, Some(0)), (x86::MOST_BYTES, Some(0xff))])
        {
            let part = fill.map_or_else(|| bytes[9..].iter().copied().take(len).collect(), |byte| vec![byte; len]);
            let want = naive(&part);
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: `part` is readable, and the processor has the instructions.
                let (sum, done) = unsafe { x86::avx2(part.as_ptr(), len) };
                assert!(done.is_multiple_of(2) && len - done < 32);
                assert_eq!(sum == 0, part[..done].iter().all(|&b| b == 0));
                // SAFETY: the rest is readable.
                let rest = unsafe { rest(part.as_ptr().add(done), len - done) };
                assert_eq!(fold(sum + rest), want, "AVX2, len {len}");
            }
            if std::arch::is_x86_feature_detected!("avx512bw") {
                // SAFETY: as above.
                assert_eq!(fold(unsafe { x86::avx512(part.as_ptr(), len) }), want, "AVX-512, len {len}");
            }
        }
        // Nothing but ones: every carry happens, in every lane.
        let ones = vec![0xff; 70_001];
        assert_eq!(slice(&ones), naive(&ones));
        assert_eq!(slice(&[0; 500]), 0);
    }

    #[test]
    fn crc32c_instruction_and_table_agree() {
        for len in 0..100 {
            let bytes = sample(len, 99 + len as u32);
            // SAFETY: `bytes` is readable.
            let table = unsafe { crc32c_table(!0, bytes.as_ptr(), len) };
            assert_eq!(crc32c_slice(!0, &bytes), table, "len {len}");
        }
    }
}
