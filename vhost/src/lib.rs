//! One vhost-user port: protocol session, guest memory, virtqueues, dirty-page log.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

pub mod dirty_log;
mod eventfd;
#[cfg(any(test, fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
pub mod memory;
pub mod net_header;
pub mod queue;
pub mod ring;
