//! The channel between two hosts: TLS 1.3 with certificates on both sides, and per migration a *control* and a *bulk* connection,
//! so that control never waits behind bulk. Both carry messages: byte strings of bounded length whose meaning is the layer above's.
//!
//! | module | job |
//! |---|---|
//! | `frame` | messages on a stream of bytes; no I/O |
//! | `open` | a connection's first frames: purpose, migration id, token; no I/O |
//! | `tls` | who may speak: TLS configuration, peers' identities, new credentials while running |
//! | `connection` | an open connection: queues, keep-alive, time-outs, end |
//! | `dialer`, `listener` | how sessions come about on the source and on the destination |
//! | `pace` | the bandwidth cap of bulk connections |
//! | `limits` | what peers may use up |
//!
//! A peer that has not proven who it is can make the listener do no more than `max_handshakes` TLS handshakes of `handshake_ms`. One
//! that has can hold `max_connections` connections, whose messages are bounded in length and number.
//!
//! A connection that ends at any byte without a close frame ends with [`ChannelError::Cut`] (or what is more precise), after all
//! messages that came whole; half a message is never delivered.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

mod connection;
mod dialer;
mod error;
mod frame;
mod limits;
mod listener;
mod open;
mod pace;
#[cfg(test)]
mod tests;
mod tls;

pub use connection::{Connection, ConnectionStats, Receiver, Sender};
pub use dialer::Dialer;
pub use error::ChannelError;
pub use frame::{Frame, FrameDecoder, FrameError, FrameHeader, FrameKind, HEADER_BYTES};
pub use limits::ChannelLimits;
pub use listener::{Gate, Listener, ListenerStats, Refused, RefusedWhy};
pub use open::{Purpose, RefusalCode};
pub use pace::{MIN_RATE_BYTES_PER_S, Pace};
pub use tls::{ALPN, PeerIdentity, TlsContext};

/// The connections of one migration or one check.
#[derive(Debug)]
pub struct Session {
    /// Who is at the other end.
    pub peer: PeerIdentity,
    /// The migration's id, chosen by the dialler.
    pub migration: u128,
    /// For control messages.
    pub control: Connection,
    /// For batches of records; none in a check.
    pub bulk: Option<Connection>,
}
