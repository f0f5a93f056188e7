//! Flow-state migration: a VM's connections travel to another host with it.
//!
//! - [`source`] and [`destination`]: the two state machines. They do no I/O and have no clock: events and the time go in, actions come out.
//! - [`rounds`]: what the source sends when. [`batch`]: what is in it. [`table`]: what both need of a connection table.
//! - [`message`]: what the two say to each other, and how they agree on a version.
//! - [`wire`]: batches to bytes and back, by [`record`], [`encoding`] and [`compress`]; `FORMAT.md` specifies them.
//! - [`announce`]: frames by which the network learns where the VM is.

pub mod announce;
pub mod batch;
pub mod compress;
pub mod destination;
pub mod encoding;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod message;
pub mod record;
pub mod rounds;
pub mod source;
pub mod table;
pub mod wire;
