//! Flow-state migration: hosts' certificates and rights, the audit log, and announcing a VM that has arrived.

pub mod announce;
pub mod audit;
pub mod authz;
pub mod pki;
