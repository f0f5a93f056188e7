//! Split and packed rings with arbitrary contents, polled and sent to.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_vhost::fuzzing::ring(data));
