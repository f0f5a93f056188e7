//! Arbitrary sequences of control messages, batches and events, to both machines.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ferry_migrate::fuzzing::conversation(data);
});
