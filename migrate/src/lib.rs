//! Flow-state migration: a VM's connections travel to another host with it.
//!
//! - [`source`] and [`destination`]: the two state machines. They do no I/O and have no clock: events and the time go in, actions come out.
//! - [`rounds`]: what the source sends when. [`batch`]: in what portions. [`table`]: what both need of a connection table.
//! - [`message`]: what the two say to each other, and how they agree on a version.
//! - [`record`], [`encoding`], [`compress`]: connections and batches as bytes (FORMAT.md); [`wire`]: both ends' use of them.
//! - [`channel`]: TLS 1.3 between two hosts; [`pki`]: their certificates; [`authz`]: who may send and receive which VM.
//! - [`audit`]: a signed log of every attempt, grant, refusal and outcome.
//! - [`announce`]: frames by which the network learns where the VM is.
//!
//! # What a driver owes the machines
//! One [`source::Source`] and one [`destination::Destination`] per VM and host, each told of everything in the order in which it happened.
//!
//! - **Actions** are carried out in their order. Control messages keep theirs, and so do batches and late frames; between the two
//!   connections there is none, and the machines count on none.
//! - **Ticks** come when `next_tick_ms` says, which is asked again after each event. A hold is as exact as these ticks.
//! - **Bytes** that cannot be decoded end the channel: close it and tell `Disconnected`. After `Action::Disconnect` nothing of that channel is
//!   told any more.
//! - **The destination has one channel per VM**: a new one takes the place of the old, which is closed before `Connected`. It is told `Connected`
//!   only for a peer whose certificate is known; who may send this VM is the answer to `Judge`.
//! - **QEMU**: `Stopped` at the first ring's GET_VRING_BASE, `ReplyHeld` when the last one's reply is held back; a KICK goes to both machines; after
//!   a restart of the switch, or of the connection, `LogOn` again if VHOST_F_LOG_ALL is set. `QemuGone` when the ports' connections close.
//! - **The table** of a VM that has arrived is another one than before (`Install`). So upon `Activate`, or a KICK of a VM that was not here, the
//!   former source is told `Kick`, its actions are carried out, and a new source begins with the table that is in place now. `Forget` is about
//!   the table that the source was made with.

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
