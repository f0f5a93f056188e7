//! The firewall at work: connection tracking and policy together, on the frames of ports.
//!
//! Every VM has one [`VmFirewall`] (connection table, limits, fragments), every port with a firewall a [`PortFirewall`] (rules,
//! anti-spoofing, counters) that belongs to a VM. A frame is judged at both ends: where it leaves a VM and where it enters one.
//!
//! ```text
//! from a VM:  spoof -> dissect -> track -> cached verdict? ----------------------> FDB -> (towards a VM: the same without spoof) -> output
//!                         |                     | no: new connection, or new rules
//!                         |                     `-> policy -> limits -> entry
//!                         `-> fragment: held; a complete datagram goes on as `Pending` frames
//! ```
//!
//! Reading order: [`vm`], [`port`], [`stage`] (the judgement), [`quick`] and [`middle`] (the same with less work, where it takes less),
//! [`flow_cache`] (where entries were found last), [`pending`] (frames that go on later), [`events`] (what operators are told), [`trace`](mod@trace) (one packet, step by step).
pub mod events;
pub(crate) mod flow_cache;
pub(crate) mod hint;
pub(crate) mod middle;
pub(crate) mod pending;
pub mod port;
pub(crate) mod quick;
mod reasons;
pub(crate) mod stage;
pub mod trace;
pub mod vm;

pub use events::{EventKind, FirewallEvent};
pub use port::{FirewallCounters, PortFirewall, PortFirewallStats, PortRules};
pub use vm::{VmFirewall, VmOptions, VmStatus};

/// Identifies a VM within a switch.
pub type VmId = u16;
/// Most ports of one VM: their number is part of a connection's zone.
pub const MAX_VM_PORTS: u8 = 16;
