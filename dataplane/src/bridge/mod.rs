//! What a PMD thread needs to know to forward: an immutable picture of ports and bridges, replaced as a whole
//! by the control side (see [`crate::qsbr`]).
pub mod fdb;
pub mod vlan;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::counters::TxLedger;
use crate::divert::Divert;
use crate::enforce::{PortFirewall, VmFirewall};
use crate::frame::TxFrame;
use crate::port::{TxCapabilities, TxPort, TxReport};
use crate::qsbr::{Guard, MAX_THREADS};
use fdb::{Fdb, PortId};
use vlan::VlanPolicy;

/// Identifies a bridge within a switch.
pub type BridgeId = u16;
/// Most bridges of one switch.
pub const MAX_BRIDGES: usize = 256;

/// One isolated broadcast domain (per VLAN).
pub struct BridgeEntry {
    /// Its number.
    pub id: BridgeId,
    /// Who is where.
    pub fdb: Arc<Fdb>,
    /// Its ports, in the order of their numbers.
    pub members: Vec<PortId>,
    /// One of them has a firewall.
    pub guarded: bool,
}

/// One port as the packet path sees it.
pub struct PortEntry<T> {
    /// Its number.
    pub id: PortId,
    /// The bridge it belongs to.
    pub bridge: Option<Arc<BridgeEntry>>,
    /// Its part in VLANs.
    pub vlan: Arc<VlanPolicy>,
    /// Administratively up.
    pub admin_up: bool,
    /// Addresses it may occupy in the FDB.
    pub fdb_limit: u32,
    /// Longest frame sent to it, bytes; 0: no limit but the port's own.
    pub max_frame_bytes: u32,
    /// Its firewall; `None`: frames pass unjudged.
    pub firewall: Option<PortFirewall>,
    /// Takes its frames instead of its transmit side, while its VM is on the move.
    pub divert: Option<Arc<Divert>>,
    /// Its transmit side.
    pub tx: T,
    /// One transmit ledger per PMD thread.
    pub tx_ledgers: Arc<[TxLedger; MAX_THREADS]>,
}

impl<T: TxPort> PortEntry<T> {
    /// What whoever takes the port's frames now can do.
    #[inline]
    pub(crate) fn capabilities(&self, guard: &Guard) -> TxCapabilities {
        match &self.divert {
            None => self.tx.capabilities(guard),
            Some(_) => TxCapabilities::default(),
        }
    }

    /// Sends frames; [`TxPort::flush`] is still to come.
    #[inline]
    pub(crate) fn send(&self, guard: &Guard, frames: &[TxFrame<'_>], report: &mut TxReport) {
        match &self.divert {
            None => self.tx.send(guard, guard.index(), frames, report),
            Some(divert) => divert.send(frames, report),
        }
    }
}

/// Tells pictures apart: no two in a process have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureId(u64);

impl PictureId {
    /// No picture's.
    pub const NONE: Self = Self(0);

    /// That of a new picture.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// The whole picture.
pub struct Forwarding<T> {
    /// What is remembered of a picture holds for this one only.
    pub id: PictureId,
    /// Ports by number.
    pub ports: Vec<Option<Arc<PortEntry<T>>>>,
    /// Bridges by number.
    pub bridges: Vec<Option<Arc<BridgeEntry>>>,
    /// VMs, whose tables the PMD threads keep free of what has expired.
    pub vms: Vec<Arc<VmFirewall>>,
}

impl<T> Default for Forwarding<T> {
    fn default() -> Self {
        Self { id: PictureId::new(), ports: Vec::new(), bridges: Vec::new(), vms: Vec::new() }
    }
}

impl<T> Forwarding<T> {
    /// The port with this number.
    #[inline]
    pub fn port(&self, id: PortId) -> Option<&PortEntry<T>> {
        self.ports.get(usize::from(id))?.as_deref()
    }
}
