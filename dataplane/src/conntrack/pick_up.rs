//! Picking up TCP connections in the middle for a while, though the VM's settings say otherwise.
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Until when one VM's tracking behaves as if `tcp_loose` were on. Default: not at all.
///
/// After a migration that did not bring all connections along those that are missing can go on, each where the policy allows its
/// packet to open a connection. Read only for a packet that would otherwise be refused for want of a connection.
#[derive(Debug, Default)]
pub struct PickUp {
    /// Milliseconds of the packet path's clock; 0: off.
    until_ms: AtomicU64,
}

impl PickUp {
    /// Sets the end, exclusive, in milliseconds of the packet path's clock. One that has passed, such as 0, ends it.
    pub fn set_until(&self, until_ms: u64) {
        self.until_ms.store(until_ms, Relaxed);
    }

    /// The end that was set last.
    pub fn until_ms(&self) -> u64 {
        self.until_ms.load(Relaxed)
    }

    /// Whether it lasts.
    pub fn is_on(&self, now_ms: u64) -> bool {
        now_ms < self.until_ms()
    }
}
