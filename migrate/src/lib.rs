//! Flow-state migration: a VM's connections travel to another host with it.
//!
//! - [`source`] and [`destination`]: the two state machines. They do no I/O and have no clock: events and the time go in, actions come out.
//! - [`rounds`]: what the source sends when. [`batch`]: in what portions. [`table`]: what both need of a connection table.
//! - [`message`]: what the two say to each other, and how they agree on a version.
//! - [`record`], [`encoding`], [`compress`]: connections and batches as bytes (FORMAT.md); [`wire`]: both ends' use of them.
//! - [`channel`]: TLS 1.3 between two hosts; [`pki`]: their certificates; [`authz`]: who may send and receive which VM.
//! - [`audit`]: a signed log of every attempt, grant, refusal and outcome.
//! - [`announce`]: frames by which the network learns where the VM is.

pub mod announce;
pub mod audit;
pub mod authz;
pub mod batch;
pub mod channel;
pub mod compress;
pub mod destination;
pub mod encoding;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod message;
pub mod pki;
pub mod record;
pub mod rounds;
pub mod source;
pub mod table;
mod text;
pub mod wire;
