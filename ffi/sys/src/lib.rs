//! Raw bindings to Debian's libdpdk (22.11 or newer): the control functions that `ferry-ffi` calls, and a C shim
//! for DPDK's inline data path (see `shim.h`). Nothing here is safe to call without reading DPDK's documentation;
//! the safe layer is `ferry-ffi`.
#![allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unsafe_code,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    unsafe_op_in_unsafe_fn,
    reason = "generated code"
)]
include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
