//! Flow-state migration: connection records and batches of them, announcing a VM that has arrived.

pub mod announce;
pub mod compress;
pub mod encoding;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod record;
