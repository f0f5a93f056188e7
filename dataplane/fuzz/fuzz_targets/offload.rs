//! Offload claims, software checksums, segmentation and VLAN edits on arbitrary bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_dataplane::fuzzing::offload(data));
