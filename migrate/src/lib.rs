//! Flow-state migration: announcing a VM that has arrived.

pub mod announce;
