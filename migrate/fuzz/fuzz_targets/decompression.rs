//! Arbitrary bytes decompressed, and compressed.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_migrate::fuzzing::decompression(data));
