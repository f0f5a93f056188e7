//! Flow-state migration: certificates, and announcing a VM that has arrived.

pub mod announce;
pub mod pki;
