//! Entry points for fuzzers: bytes in, and whatever they say, no panic, no access outside guest memory, no lost invariant.
//!
//! The same functions run in the tests with inputs from a seeded generator.
mod ring;
mod session;

pub use ring::ring;
pub use session::{Reached, session};
