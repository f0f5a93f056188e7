//! Entry points for fuzzers: bytes in, and whatever they say, no panic, no memory beyond the bounds, no lost invariant.
//!
//! The same functions run in the tests with inputs from a seeded generator.
mod batch;
mod message;

pub use batch::{Reached, batch, decompression, set_checksums};
pub use message::{conversation, message};
