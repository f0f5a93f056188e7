//! DPDK for Ferry: safe, owning wrappers (EAL, mbuf pools, mbufs, Ethernet devices) and the uplink port made of them.
//!
//! A program that never calls [`eal::Eal::start`] pays for none of it: no hugepages, no threads, no privileges.
//!
//! * [`eal`]: the process-wide environment, initialised on its own thread, which stays as control lane;
//! * [`mempool`], [`mbuf`]: packet memory with owners;
//! * [`ethdev`]: a device from its devargs or PCI address to running queues, and back;
//! * [`queue`]: its receive and transmit queues;
//! * [`offload`]: how virtio's offload terms map to what a device is asked;
//! * [`uplink`]: the switch's port on such a device.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

pub mod eal;
pub mod ethdev;
mod log;
pub mod mbuf;
pub mod mempool;
mod netdev;
pub mod offload;
pub mod queue;
mod signals;
mod thread;
pub mod uplink;
