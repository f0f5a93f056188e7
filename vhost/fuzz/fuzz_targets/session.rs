//! Arbitrary vhost-user messages with descriptors, through relay and session.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ferry_vhost::fuzzing::session(data);
});
