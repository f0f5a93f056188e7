//! Arbitrary batches of records, read and stored. The golden files are good seeds: `migrate/tests/golden`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // Fuzzers do not guess checksums.
    let mut data = data.to_vec();
    ferry_migrate::fuzzing::set_checksums(&mut data);
    ferry_migrate::fuzzing::batch(&data);
});
