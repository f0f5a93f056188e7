//! The end-to-end test harness: real QEMU guests, DPDK's testpmd as a second kind of client, network namespaces, and
//! the switch itself as a child process. Everything that a test starts ends with it, also when it panics or is killed.
pub mod agent;
pub mod captures;
pub mod enter;
pub mod failure;
pub mod ferryd;
pub mod frames;
pub mod guest;
pub mod hostile_peer;
pub mod libvirt;
pub mod live;
pub mod netns;
pub mod paths;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod scenario;
pub mod scratch;
pub mod testpmd;
pub mod two_hosts;
pub mod wait;

pub use agent::Agent;
pub use failure::Outcome;
pub use ferryd::{Ferryd, FerrydBuilder, Port};

pub use netns::Netns;
pub use qemu::{Guest, GuestBuilder, Nic, Role};
pub use scratch::Scratch;

pub use testpmd::{Testpmd, TestpmdBuilder, VirtioUser};
