//! Header parsing and views on arbitrary bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_dataplane::fuzzing::parse(data));
