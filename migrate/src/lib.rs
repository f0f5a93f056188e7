//! Flow-state migration: a VM's connections travel to another host with it.
//!
//! - [`source`] and [`destination`]: the two state machines. They do no I/O and have no clock: events and the time go in, actions come out.
//! - [`rounds`]: what the source sends when. [`batch`]: in what form. [`table`]: what both need of a connection table.
//! - [`message`]: what the two say to each other, and how they agree on a version.
//! - [`announce`]: frames by which the network learns where the VM is.

pub mod announce;
pub mod batch;
pub mod destination;
pub mod message;
pub mod rounds;
pub mod source;
pub mod table;
