//! One vhost-user port: protocol session, guest memory, virtqueues, dirty-page log.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

pub mod base_mirror;
pub mod dirty_log;
mod eventfd;
mod fdio;
pub mod features;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod memory;
pub mod memory_rounds;
mod message;
pub mod net_header;
pub mod port;
pub mod queue;
mod relay;
mod resume;
pub mod ring;
mod session;
pub mod sigbus;
pub mod signals;
pub mod socket;
pub mod status;
