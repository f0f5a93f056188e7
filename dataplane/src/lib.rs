//! Ferry's packet path. No I/O, no sockets, no async: ports are given from outside (see [`port`]).
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

pub mod bridge;
pub mod clock;
pub mod conntrack;
pub mod copy;
pub mod counters;
pub mod divert;
pub mod enforce;
pub mod firewall;
pub mod frame;
pub mod fuzzing;
mod memory;
pub mod offload;
pub mod output;
pub mod packet;
pub mod pmd;
pub mod port;
pub mod qsbr;
mod router;
pub mod switch;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod worker;
