//! What a port tells the rest of the switch while it happens: the signals from which link state, announcements and
//! flow migration follow.
use std::sync::Arc;

use crate::dirty_log::DirtyLog;

/// Receives the events of a port.
///
/// Called on the port's session thread, in the order of the messages, before the message that caused the event is
/// answered. While the call lasts the frontend waits: for [`PortEvent::VringStopped`] this is how a GET_VRING_BASE reply
/// is held (QEMU's monitor is blocked meanwhile and QEMU has no time-out, so every hold must be bounded). The port's
/// [`status`](crate::port::VhostPort::status) may be called from here, `shutdown` may not (it waits for this thread).
pub trait PortObserver: Send + Sync {
    /// Something happened.
    fn event(&self, event: &PortEvent);
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl PortObserver for NoObserver {
    fn event(&self, _: &PortEvent) {}
}

/// An event of a port, with the vhost-user message behind it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PortEvent {
    /// A frontend is connected (before its first message).
    Connected,
    /// The connection ended; all rings were stopped and guest memory was released before.
    Disconnected {
        /// Why, in words.
        reason: String,
    },
    /// SET_FEATURES was accepted.
    Features {
        /// Virtio feature bits now in force.
        bits: u64,
    },
    /// SET_MEM_TABLE, ADD_MEM_REG or REM_MEM_REG was accepted.
    Memory {
        /// Regions now.
        regions: usize,
        /// Bytes now.
        bytes: u64,
    },
    /// The first queue pair runs in both directions.
    LinkUp,
    /// No queue pair runs in both directions any more.
    LinkDown,
    /// The port, or one of its rings, was stopped because of what the guest or the frontend did.
    Fault {
        /// What, in words.
        text: String,
    },
    /// SEND_RARP: the guest runs here now and does not announce itself; announce this address for it. Comes *before*
    /// memory and kicks on the destination of a migration, and four times more in the next 0.8 s.
    Rarp {
        /// The guest's address.
        mac: [u8; 6],
    },
    /// NET_SET_MTU was accepted.
    Mtu {
        /// Bytes.
        mtu: u16,
    },
    /// SET_LOG_BASE: a (new) dirty log was mapped. On the source of a migration this comes first.
    LogBase {
        /// The log.
        log: Arc<DirtyLog>,
    },
    /// SET_FEATURES switched VHOST_F_LOG_ALL on: a migration has begun (or rings are set up anew while it runs).
    LogStarted,
    /// SET_FEATURES switched VHOST_F_LOG_ALL off: the migration was cancelled or failed. A successful one ends with the connection.
    LogStopped,
    /// SET_VRING_ADDR: the used ring's log address was given or taken away.
    VringLogAddress {
        /// Vring index (even: guest receives, odd: guest transmits).
        index: u16,
        /// Guest physical address of the used ring, with VHOST_VRING_F_LOG.
        address: Option<u64>,
    },
    /// SET_VRING_KICK: the frontend handed a ring over. After [`Self::VringStopped`] while logging, this revokes a migration's hand-over.
    Kicked {
        /// Vring index.
        index: u16,
    },
    /// A ring began to run.
    VringStarted {
        /// Vring index.
        index: u16,
        /// Base it starts from, as in SET_VRING_BASE.
        base: u32,
    },
    /// GET_VRING_BASE: the ring is stopped, no PMD thread touches it, and the reply goes out when this call returns.
    VringStopped {
        /// Vring index.
        index: u16,
        /// The base that will be answered (packed rings: both halves).
        base: u32,
        /// VHOST_F_LOG_ALL is in force: under migration this is the VM's stop (also sent for `stop` and a guest reset).
        logging: bool,
        /// No other ring of this port runs any more.
        last: bool,
    },
    /// RESET_DEVICE or RESET_OWNER: all rings were stopped.
    Reset,
}
