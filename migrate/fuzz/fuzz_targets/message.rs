//! Arbitrary bytes as a control message.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ferry_migrate::fuzzing::message(data);
});
