//! Drives the migration of VMs' connections: see `ferry-migrate`.
pub mod view;
