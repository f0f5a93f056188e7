//! Flow-state migration: the channel between hosts with their certificates and rights, the audit log, and announcing a VM that has arrived.

pub mod announce;
pub mod audit;
pub mod authz;
pub mod channel;
pub mod pki;
mod text;
