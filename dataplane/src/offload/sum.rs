//! The raw sums: over private slices and over frame bytes in port memory.
//!
//! Port memory may be written by a guest while it is read. That can only make a sum wrong that the guest's own frame
//! carries: each byte is read once, and nothing but the sum depends on it.
#![allow(unsafe_code)] // Its job: reading port memory through raw pointers, and CPU instructions by feature.
use core::ptr::read_unaligned;

use crate::frame::Body;

/// Below this many bytes, wider instructions do not pay for the feature test and the call.
#[cfg(target_arch = "x86_64")]
const AVX2_LEAST_BYTES: usize = 256;

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
    if len >= AVX2_LEAST_BYTES && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just detected; the range is the caller's promise.
        return unsafe { raw_avx2(addr, len) };
    }
    // SAFETY: the caller's promise.
    unsafe { raw_generic(addr, len) }
}

/// The same loop, which the compiler turns into 256-bit instructions here.
///
/// # Safety
/// As [`raw`], and the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn raw_avx2(addr: *const u8, len: usize) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { raw_generic(addr, len) }
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
    let mut sum: u64 = lanes.iter().sum();
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
    fold(sum + u64::from(u32::from_ne_bytes(last.to_le_bytes())))
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
