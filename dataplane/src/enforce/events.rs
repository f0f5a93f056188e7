//! What operators are told of single packets: denials and new connections, through bounded rings that may lose some.
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam::queue::ArrayQueue;

use crate::bridge::fdb::PortId;
use crate::conntrack::{Flow, Toward};
use crate::counters::DropReason;
use crate::firewall::RuleId;
use crate::packet::{EtherType, MacAddr};

/// Events that one PMD thread can have waiting.
const RING_EVENTS: usize = 4096;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A connection began.
    New,
    /// A packet was dropped for this reason.
    Denied(DropReason),
}

/// One packet that an operator may want to know of.
#[derive(Clone, Copy, Debug)]
pub struct FirewallEvent {
    /// When, nanoseconds of the switch's clock.
    pub time_ns: u64,
    /// The port whose firewall judged.
    pub port: PortId,
    /// Which way the packet went, seen from the VM.
    pub toward: Toward,
    /// VLAN of the bridge; 0 untagged.
    pub vlan: u16,
    /// What happened.
    pub kind: EventKind,
    /// The rule that decided, of the rules of `generation`; `None`: a default, or no rule was asked.
    pub rule: Option<RuleId>,
    /// The rule, or the default, asks for a line in the flow log.
    pub log: bool,
    /// Generation of the port's rules.
    pub generation: u32,
    /// Who with whom, as the packet says (of a spoofed one, too); `None` where it is too broken, or not IP.
    pub flow: Option<Flow>,
    /// Source and destination MAC address.
    pub macs: (MacAddr, MacAddr),
    /// EtherType behind the tags.
    pub ethertype: EtherType,
}

/// One PMD thread's events on their way to the control side.
pub(crate) struct EventRing {
    queue: ArrayQueue<FirewallEvent>,
    lost: AtomicU64,
}

impl Default for EventRing {
    fn default() -> Self {
        Self { queue: ArrayQueue::new(RING_EVENTS), lost: AtomicU64::new(0) }
    }
}

impl EventRing {
    #[inline]
    pub(crate) fn push(&self, event: FirewallEvent) {
        if self.queue.push(event).is_err() {
            self.lose();
        }
    }

    #[inline]
    pub(crate) fn lose(&self) {
        // One writer.
        self.lost.store(self.lost.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Moves what waits to `out`; no more than the ring holds, however fast it is filled.
    pub(crate) fn drain(&self, out: &mut Vec<FirewallEvent>) {
        out.extend((0..RING_EVENTS).map_while(|_| self.queue.pop()));
    }

    /// Events that were not told, since the thread began.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }
}
