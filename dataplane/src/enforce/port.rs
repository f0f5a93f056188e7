//! One port's firewall: its rules as the packet path uses them, and its counters.
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::vm::VmFirewall;
use crate::conntrack::{CtState, Toward, TrackConfig};
use crate::counters::{Counter, DropReason};
use crate::firewall::reject::{RejectConfig, RejectStatus, Rejector};
use crate::firewall::spoof::SpoofTable;
use crate::firewall::{AddressIndex, CompiledPolicy, Direction};
use crate::qsbr::MAX_THREADS;

/// Bits of a zone that are the VLAN identifier.
const VLAN_BITS: u32 = 12;

/// A port's rules. Immutable; replaced as a whole.
#[derive(Debug)]
pub struct PortRules {
    /// Raised whenever a verdict may have changed: connections judged under another generation are judged again. Never 0.
    pub generation: u32,
    /// The rules.
    pub policy: Arc<CompiledPolicy>,
    /// Members of the groups and sets that they name.
    pub sets: Arc<AddressIndex>,
    /// Addresses the VM may use.
    pub spoof: Arc<SpoofTable>,
    /// How connections are tracked.
    pub track: TrackConfig,
    /// How senders are told.
    pub reject: RejectConfig,
    /// A rule passes packets untracked.
    pub stateless: bool,
}

/// A port's firewall as the packet path sees it.
#[derive(Clone)]
pub struct PortFirewall {
    /// The VM it protects.
    pub vm: Arc<VmFirewall>,
    /// The port's number within the VM, below [`super::MAX_VM_PORTS`]: ports on different networks may use the same addresses.
    pub index: u8,
    /// The rules in force.
    pub rules: Arc<PortRules>,
    /// One ledger per PMD thread.
    pub ledgers: Arc<[FirewallLedger; MAX_THREADS]>,
    /// Answers to rejected packets.
    pub rejector: Arc<Rejector>,
}

impl PortFirewall {
    /// The zone of connections of this port in one VLAN.
    #[inline]
    pub fn zone(&self, vlan: u16) -> u16 {
        u16::from(self.index) << VLAN_BITS | vlan & ((1 << VLAN_BITS) - 1)
    }

    /// The VLAN and the port's number that a zone stands for.
    pub const fn split_zone(zone: u16) -> (u8, u16) {
        ((zone >> VLAN_BITS) as u8, zone & ((1 << VLAN_BITS) - 1))
    }
}

/// What one PMD thread did for one port and one direction.
#[derive(Debug)]
pub struct FirewallCounters {
    /// Packets by [`CtState`], in its order.
    pub states: [Counter; 5],
    /// Packets that asked the policy: new connections, packets without connection, connections judged again.
    pub policy_lookups: Counter,
    /// Connections judged again because the rules had changed.
    pub reevaluated: Counter,
    /// Connections that began.
    pub opened: Counter,
    /// Packets dropped, by [`DropReason`].
    pub denied: [Counter; DropReason::COUNT],
}

impl Default for FirewallCounters {
    fn default() -> Self {
        Self {
            states: Default::default(),
            policy_lookups: Counter::default(),
            reevaluated: Counter::default(),
            opened: Counter::default(),
            denied: core::array::from_fn(|_| Counter::default()),
        }
    }
}

impl FirewallCounters {
    #[inline]
    pub(crate) fn count_state(&self, state: CtState) {
        self.count_states(state, 1);
    }

    #[inline]
    pub(crate) fn count_states(&self, state: CtState, packets: u64) {
        if let Some(counter) = self.states.get(state as usize) {
            counter.add(packets);
        }
    }

    pub(crate) fn deny(&self, reason: DropReason) {
        if let Some(counter) = self.denied.get(reason as usize) {
            counter.add(1);
        }
    }
}

/// What one PMD thread did for one port. Single writer.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct FirewallLedger {
    ingress: FirewallCounters,
    egress: FirewallCounters,
}

impl FirewallLedger {
    /// One direction's counters.
    #[inline]
    pub fn of(&self, toward: Toward) -> &FirewallCounters {
        match toward {
            Toward::Ingress => &self.ingress,
            Toward::Egress => &self.egress,
        }
    }
}

/// One direction of a port's firewall, summed over threads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DirectionStats {
    /// Packets by connection state.
    pub packets: BTreeMap<&'static str, u64>,
    /// Packets that asked the policy.
    pub policy_lookups: u64,
    /// Connections judged again because the rules had changed.
    pub reevaluated: u64,
    /// Connections that began.
    pub opened: u64,
    /// Packets dropped, by reason; zero ones left out.
    pub denied: BTreeMap<&'static str, u64>,
}

/// What [`PortFirewall::stats`] tells.
#[derive(Clone, Debug, Serialize)]
pub struct PortFirewallStats {
    /// The VM's name.
    pub vm: String,
    /// Generation of the rules in force.
    pub generation: u32,
    /// Rules, built-in ones included.
    pub rules: usize,
    /// Towards the VM.
    pub ingress: DirectionStats,
    /// From the VM.
    pub egress: DirectionStats,
    /// Answers to rejected packets.
    pub reject: RejectStatus,
}

/// All states, in the order of their numbers.
const STATES: [CtState; 5] =
    [CtState::New, CtState::Established, CtState::Related, CtState::Invalid, CtState::Untracked];

impl PortFirewall {
    /// Counters so far.
    pub fn stats(&self) -> PortFirewallStats {
        PortFirewallStats {
            vm: self.vm.name().to_owned(),
            generation: self.rules.generation,
            rules: self.rules.policy.rule_count(),
            ingress: self.sum(Toward::Ingress),
            egress: self.sum(Toward::Egress),
            reject: self.rejector.status(),
        }
    }

    fn sum(&self, toward: Toward) -> DirectionStats {
        let mut out = DirectionStats::default();
        for counters in self.ledgers.iter().map(|ledger| ledger.of(toward)) {
            for (state, counter) in STATES.iter().zip(&counters.states) {
                *out.packets.entry(state.name()).or_default() += counter.get();
            }
            out.policy_lookups += counters.policy_lookups.get();
            out.reevaluated += counters.reevaluated.get();
            out.opened += counters.opened.get();
            for (reason, counter) in DropReason::ALL.iter().zip(&counters.denied).filter(|(_, c)| c.get() > 0) {
                *out.denied.entry(reason.name()).or_default() += counter.get();
            }
        }
        out
    }
}

impl From<Toward> for Direction {
    fn from(toward: Toward) -> Self {
        match toward {
            Toward::Ingress => Self::Ingress,
            Toward::Egress => Self::Egress,
        }
    }
}
