//! Copying between guests, tuned for frames: most copies are short, and a call per copy would cost more than the copy.
#![allow(unsafe_code)] // Its job: copying through raw pointers into memory that guests share.

/// Copies `len` bytes. The ranges may overlap (a guest may map one page twice); then the result is unspecified.
///
/// # Safety
/// `src..src+len` is readable and `dst..dst+len` writable. Others may write to both meanwhile; the bytes are not interpreted.
#[inline(always)]
pub unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the contract is the caller's; each helper is given a length in its range.
    unsafe {
        // Ordered by how often frames have such lengths.
        if (33..=64).contains(&len) {
            x86::two_to_four(dst, src, len);
        } else if (65..=128).contains(&len) {
            x86::four_to_eight(dst, src, len);
        } else if len > 128 {
            x86::long(dst, src, len);
        } else if len >= 16 {
            x86::one_or_two(dst, src, len);
        } else {
            short(dst, src, len);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the contract is the caller's; `copy` allows overlap.
    unsafe {
        core::ptr::copy(src, dst, len);
    }
}

/// Up to 15 bytes: two overlapping loads of the largest power of two that fits.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn short(dst: *mut u8, src: *const u8, len: usize) {
    macro_rules! pair {
        ($t:ty) => {{
            let last = len - size_of::<$t>();
            // SAFETY: both ends lie inside the ranges because len >= size_of::<$t>().
            unsafe {
                let a = src.cast::<$t>().read_unaligned();
                let b = src.add(last).cast::<$t>().read_unaligned();
                dst.cast::<$t>().write_unaligned(a);
                dst.add(last).cast::<$t>().write_unaligned(b);
            }
        }};
    }
    if len >= 8 {
        pair!(u64);
    } else if len >= 4 {
        pair!(u32);
    } else if len >= 2 {
        pair!(u16);
    } else if len == 1 {
        // SAFETY: one byte each.
        unsafe { dst.write(src.read()) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_storeu_si128, _mm256_loadu_si256, _mm256_storeu_si256,
        _mm512_loadu_si512, _mm512_storeu_si512,
    };

    /// Words of 16 bytes from the start and from the end, in registers: all loads come before the first store. SSE2 is part of x86-64.
    macro_rules! ends {
        ($name:ident, $words:literal, $($at:literal $head:ident $tail:ident),*) => {
            #[doc = concat!("# Safety\nAs `copy`, with `16 * ", $words, " <= len <= 32 * ", $words, "`.")]
            #[inline(always)]
            pub(super) unsafe fn $name(dst: *mut u8, src: *const u8, len: usize) {
                let last = len - 16 * $words;
                // SAFETY: all offsets stay within len.
                unsafe {
                    $(let $head: __m128i = _mm_loadu_si128(src.add($at).cast());)*
                    $(let $tail: __m128i = _mm_loadu_si128(src.add(last + $at).cast());)*
                    $(_mm_storeu_si128(dst.add($at).cast(), $head);)*
                    $(_mm_storeu_si128(dst.add(last + $at).cast(), $tail);)*
                }
            }
        };
    }
    ends!(one_or_two, 1, 0 a b);
    ends!(two_to_four, 2, 0 a b, 16 c d);
    ends!(four_to_eight, 4, 0 a b, 16 c d, 32 e f, 48 g h);

    /// More than 128 bytes.
    ///
    /// # Safety
    /// As `copy`, with `len > 128`.
    #[inline]
    pub(super) unsafe fn long(dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: the processor has what each variant needs; len > 128.
        unsafe {
            if std::arch::is_x86_feature_detected!("avx512f") {
                avx512(dst, src, len);
            } else if std::arch::is_x86_feature_detected!("avx2") {
                avx2(dst, src, len);
            } else {
                // Allows overlap.
                core::ptr::copy(src, dst, len);
            }
        }
    }

    /// 128 bytes a turn, and the last 128 bytes once more from the end.
    ///
    /// # Safety
    /// As `copy`, with AVX-512F and `len >= 128`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(dst: *mut u8, src: *const u8, len: usize) {
        let last = len - 128;
        let mut at = 0;
        // SAFETY: at < last, and 128 bytes from `last` are inside the ranges.
        unsafe {
            let c: __m512i = _mm512_loadu_si512(src.add(last).cast());
            let d: __m512i = _mm512_loadu_si512(src.add(last + 64).cast());
            while at < last {
                let a: __m512i = _mm512_loadu_si512(src.add(at).cast());
                let b: __m512i = _mm512_loadu_si512(src.add(at + 64).cast());
                _mm512_storeu_si512(dst.add(at).cast(), a);
                _mm512_storeu_si512(dst.add(at + 64).cast(), b);
                at += 128;
            }
            _mm512_storeu_si512(dst.add(last).cast(), c);
            _mm512_storeu_si512(dst.add(last + 64).cast(), d);
        }
    }

    /// 64 bytes a turn, and the last 64 bytes once more from the end.
    ///
    /// # Safety
    /// As `copy`, with AVX2 and `len >= 64`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2(dst: *mut u8, src: *const u8, len: usize) {
        let last = len - 64;
        let mut at = 0;
        // SAFETY: at < last and 64 bytes from `last` are inside the ranges.
        unsafe {
            while at < last {
                let a: __m256i = _mm256_loadu_si256(src.add(at).cast());
                let b: __m256i = _mm256_loadu_si256(src.add(at + 32).cast());
                _mm256_storeu_si256(dst.add(at).cast(), a);
                _mm256_storeu_si256(dst.add(at + 32).cast(), b);
                at += 64;
            }
            let a: __m256i = _mm256_loadu_si256(src.add(last).cast());
            let b: __m256i = _mm256_loadu_si256(src.add(last + 32).cast());
            _mm256_storeu_si256(dst.add(last).cast(), a);
            _mm256_storeu_si256(dst.add(last + 32).cast(), b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::copy;

    /// Whichever `long` would choose here, each variant the processor has is exact.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn wide_copies_agree() {
        let src: Vec<u8> = (0..9100u32).map(|i| (i * 37 + i / 256) as u8).collect();
        for len in (129..600).chain([1518, 4096, 9001]) {
            let mut dst = vec![0xee_u8; len + 16];
            let mut check = |variant: &str, f: unsafe fn(*mut u8, *const u8, usize)| {
                dst.fill(0xee);
                // SAFETY: both vectors hold the ranges, and the processor has the instructions.
                unsafe { f(dst.as_mut_ptr().add(3), src.as_ptr().add(1), len) };
                assert_eq!(&dst[3..3 + len], &src[1..1 + len], "{variant}, len {len}");
                assert!(
                    dst[..3].iter().chain(&dst[3 + len..]).all(|&b| b == 0xee),
                    "{variant}, len {len} wrote outside"
                );
            };
            if std::arch::is_x86_feature_detected!("avx2") {
                check("avx2", |d, s, n| {
                    // SAFETY: the caller's contract, and AVX2 is there.
                    unsafe { super::x86::avx2(d, s, n) }
                });
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                check("avx512", |d, s, n| {
                    // SAFETY: the caller's contract, and AVX-512F is there.
                    unsafe { super::x86::avx512(d, s, n) }
                });
            }
        }
    }

    #[test]
    fn copies_exactly_every_length_and_offset() {
        let src: Vec<u8> = (0..4096u32).map(|i| (i * 31 + i / 256) as u8).collect();
        for len in (0..700).chain([1023, 1518, 2047, 2048, 2049, 4000]) {
            for (from, to) in [(0, 0), (1, 3), (17, 5)] {
                let mut dst = vec![0xee_u8; len + 16];
                // SAFETY: both vectors hold the ranges.
                unsafe { copy(dst.as_mut_ptr().add(to), src.as_ptr().add(from), len) };
                assert_eq!(&dst[to..to + len], &src[from..from + len], "len {len}");
                assert!(dst[..to].iter().chain(&dst[to + len..]).all(|&b| b == 0xee), "len {len} wrote outside");
            }
        }
    }
}
