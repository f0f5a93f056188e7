//! A port's status as operators see it.
use std::path::PathBuf;

pub use crate::relay::RelayCounters;

/// A snapshot of one port.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VhostStatus {
    /// One word and, where something is wrong, why: `listening`, `connecting`, `connected`, `running`, `stopped: ...`, `closed`.
    pub state: String,
    /// The socket.
    pub socket: PathBuf,
    /// `server` or `client`.
    pub role: &'static str,
    /// A frontend is connected.
    pub connected: bool,
    /// At least one queue pair runs in both directions.
    pub link_up: bool,
    /// Negotiated virtio features, by name.
    pub features: Vec<&'static str>,
    /// Negotiated vhost-user protocol features, by name.
    pub protocol_features: Vec<&'static str>,
    /// MTU that the frontend announced (NET_SET_MTU), bytes.
    pub mtu: Option<u16>,
    /// VHOST_F_LOG_ALL is in force.
    pub logging: bool,
    /// Size of the mapped dirty log, bytes; 0 without one.
    pub log_bytes: u64,
    /// All vrings.
    pub rings: Vec<RingStatus>,
    /// Guest memory.
    pub memory: MemoryStatus,
    /// Connections so far.
    pub connections: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// What stopped the port or a ring, while it lasts.
    pub fault: Option<String>,
    /// The latest refused message, broken-off session or failed connection attempt.
    pub last_error: Option<String>,
    /// Messages by kind, and what the relay had to step in for.
    pub relay: RelayCounters,
}

/// One vring.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RingStatus {
    /// Number: even ones carry frames to the guest, odd ones from it.
    pub index: u16,
    /// `split` or `packed`.
    pub kind: &'static str,
    /// PMD threads use it.
    pub running: bool,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// The frontend gave no kick descriptor.
    pub polled: bool,
    /// Descriptors.
    pub size: u16,
    /// Base at the last start or stop, as in SET_VRING_BASE.
    pub base: u32,
    /// SET_VRING_KICK messages so far.
    pub kicks: u64,
    /// Starts so far.
    pub starts: u64,
}

/// Mapped guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryStatus {
    /// Regions.
    pub regions: usize,
    /// Bytes.
    pub bytes: u64,
}
