//! The look-up: which rule decides about a new connection, in bounded time.
use core::net::IpAddr;

use serde::Serialize;

use super::address_sets::{AddressIndex, SetId, SetLists};
use super::compile::{BUILTIN_GROUP, CompiledPolicy, NO_PROTOCOL, Node, Outcome, ProtocolEntry, Table, set_slot};
use super::policy::{Action, Direction, FlowKey, L4Key, Rule};
use super::prefix_index::{Address, NO_PREFIX, Steps};
use super::ranges::NO_RANK;
use crate::packet::{EtherType, Headers, IpProto, L3, be16, chunk};

/// Number of a rule within one [`CompiledPolicy`]: its rank, the first to decide being 0. Means nothing in another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct RuleId(pub u32);

/// The policy's word on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What happens.
    pub action: Action,
    /// An allowed packet is not to be tracked.
    pub stateless: bool,
    /// Worth a line in the flow log.
    pub log: bool,
    /// Who decided; `None`: the port's default.
    pub rule: Option<RuleId>,
}

/// A rule, and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct RuleInfo<'a> {
    /// Its security group; `None` for built-in rules.
    pub group: Option<&'a str>,
    /// Its position in the group, from 0.
    pub index: usize,
    /// The rule itself.
    pub rule: &'a Rule,
}

impl FlowKey {
    /// The key without ports or types that its protocol does not have. [`Self::of`] gives only such keys, and only such are to
    /// be looked up.
    pub fn consistent(self) -> Self {
        let l4 = self.l4.filter(|l4| match (l4, self.protocol) {
            (L4Key::Ports { .. }, number) => IpProto(number).has_ports(),
            (L4Key::Icmp { .. }, 1) => self.remote.is_ipv4(),
            (L4Key::Icmp { .. }, 58) => self.remote.is_ipv6(),
            (L4Key::Icmp { .. }, _) => false,
        });
        Self { l4, ..self }
    }

    /// The key of the IP packet that begins with `head`, whose headers were found there. `None` without IP.
    #[inline]
    pub fn of(head: &[u8], headers: &Headers, direction: Direction) -> Option<Self> {
        let remote = match (headers.l3, direction) {
            (L3::Ipv4 { offset }, Direction::Ingress) => IpAddr::from(*chunk::<4>(head, usize::from(offset) + 12)?),
            (L3::Ipv4 { offset }, Direction::Egress) => IpAddr::from(*chunk::<4>(head, usize::from(offset) + 16)?),
            (L3::Ipv6 { offset }, Direction::Ingress) => IpAddr::from(*chunk::<16>(head, usize::from(offset) + 8)?),
            (L3::Ipv6 { offset }, Direction::Egress) => IpAddr::from(*chunk::<16>(head, usize::from(offset) + 24)?),
            _ => return None,
        };
        let l4 = headers.l4.and_then(|l4| {
            let at = usize::from(l4.offset);
            match l4.proto {
                // Over the other family these are numbers like any other.
                IpProto::ICMP if remote.is_ipv6() => None,
                IpProto::ICMPV6 if remote.is_ipv4() => None,
                IpProto::ICMP | IpProto::ICMPV6 => chunk::<2>(head, at).map(|&[kind, code]| L4Key::Icmp { kind, code }),
                // The others' headers are not checked by the parser: ports must lie inside the packet.
                proto if proto.has_ports() && at + 4 <= headers.l3_end() as usize => {
                    Some(L4Key::Ports { source: be16(head, at)?, destination: be16(head, at + 2)? })
                }
                _ => None,
            }
        });
        Some(Self { remote, protocol: headers.ip_proto.0, l4 })
    }
}

/// A key's ports as the tables have them.
#[derive(Clone, Copy)]
struct Ports {
    source: u16,
    /// Destination port, or ICMP type and code.
    destination: u16,
}

impl CompiledPolicy {
    /// Judges a new connection, or a packet that is not tracked. `sets` is the current index of memberships.
    #[inline]
    pub fn lookup(&self, direction: Direction, key: &FlowKey, sets: &AddressIndex) -> Verdict {
        self.lookup_counting(direction, key, sets, &mut ())
    }

    /// [`Self::lookup`], counting its elementary steps (dependent memory accesses).
    #[inline]
    pub fn lookup_counting(
        &self,
        direction: Direction,
        key: &FlowKey,
        sets: &AddressIndex,
        steps: &mut impl Steps,
    ) -> Verdict {
        let ports = key.l4.map(|l4| match l4 {
            L4Key::Ports { source, destination } => Ports { source, destination },
            L4Key::Icmp { kind, code } => Ports { source: 0, destination: u16::from_be_bytes([kind, code]) },
        });
        let [v4_in, v4_out] = &self.v4;
        let [v6_in, v6_out] = &self.v6;
        let rank = match (key.remote, direction) {
            (IpAddr::V4(a), Direction::Ingress) => v4_in.lookup(a.to_bits(), key, ports, sets, steps),
            (IpAddr::V4(a), Direction::Egress) => v4_out.lookup(a.to_bits(), key, ports, sets, steps),
            (IpAddr::V6(a), Direction::Ingress) => v6_in.lookup(a.to_bits(), key, ports, sets, steps),
            (IpAddr::V6(a), Direction::Egress) => v6_out.lookup(a.to_bits(), key, ports, sets, steps),
        };
        self.verdict(direction, rank)
    }

    #[inline]
    fn verdict(&self, direction: Direction, rank: u32) -> Verdict {
        let (outcome, rule) = match self.outcomes.get(rank as usize) {
            Some(outcome) => (*outcome, Some(RuleId(rank))),
            None => (self.default_of(direction), None),
        };
        Verdict { action: outcome.action, stateless: outcome.stateless, log: outcome.log, rule }
    }

    #[inline]
    pub(crate) fn default_of(&self, direction: Direction) -> Outcome {
        let [ingress, egress] = self.defaults;
        if direction == Direction::Ingress { ingress } else { egress }
    }

    /// A packet that is neither IPv4 nor IPv6 passes. ARP does; others as the port allows.
    #[inline]
    pub fn passes_ethertype(&self, ethertype: EtherType) -> bool {
        ethertype == EtherType::ARP || self.ethertypes.binary_search(&ethertype.0).is_ok()
    }

    /// The rule of that number.
    pub fn rule(&self, id: RuleId) -> Option<RuleInfo<'_>> {
        let at = self.rules.get(id.0 as usize)?;
        let index = at.index as usize;
        if at.group == BUILTIN_GROUP {
            return Some(RuleInfo { group: None, index, rule: self.builtin.get(index)? });
        }
        let group = self.groups.get(at.group as usize)?;
        let rule = self.document.security_groups.get(group)?.rules.get(index)?;
        Some(RuleInfo { group: Some(group), index, rule })
    }
}

impl<A: Address> Table<A> {
    /// The best rank among the rules that match, or [`NO_RANK`].
    #[inline]
    fn lookup(
        &self,
        address: A,
        key: &FlowKey,
        ports: Option<Ports>,
        sets: &AddressIndex,
        steps: &mut impl Steps,
    ) -> u32 {
        let mut best = NO_RANK;
        let mut at = self.index.lookup(address, steps);
        while let Some(node) = self.nodes.get(at as usize) {
            steps.add(1);
            if node.chain_best >= best {
                break;
            }
            if node.best < best {
                best = best.min(self.judge(node, key.protocol, ports, best, steps));
            }
            at = node.parent;
        }
        if self.sets_best < best {
            best = self.judge_sets(sets.lists(key.remote, steps), key.protocol, ports, best, steps);
        }
        best
    }

    fn judge_sets(
        &self,
        lists: SetLists<'_>,
        protocol: u8,
        ports: Option<Ports>,
        mut best: u32,
        steps: &mut impl Steps,
    ) -> u32 {
        let judge = |node: u32, best: &mut u32, steps: &mut _| {
            if let Some(node) = self.nodes.get(node as usize).filter(|node| node.best < *best) {
                *best = (*best).min(self.judge(node, protocol, ports, *best, steps));
            }
        };
        for list in lists {
            // Whichever is shorter is gone through; so no number of sets elsewhere makes this longer.
            if list.len() <= self.sets.len() {
                for id in list {
                    if let Some(node) = self.node_of(*id, steps) {
                        judge(node, &mut best, steps);
                    }
                }
            } else {
                for (id, node) in &self.sets {
                    steps.add(1 + list.len().ilog2());
                    if list.binary_search(id).is_ok() {
                        judge(*node, &mut best, steps);
                    }
                }
            }
        }
        best
    }

    /// The node of a set.
    #[inline]
    fn node_of(&self, id: SetId, steps: &mut impl Steps) -> Option<u32> {
        let size = self.set_slots.len();
        let mut at = set_slot(id, size);
        // At most a quarter of the slots is taken: there is an empty one.
        for _ in 0..size {
            steps.add(1);
            match *self.set_slots.get(at)? {
                (_, NO_PREFIX) => return None,
                (set, node) if set == id => return Some(node),
                _ => at = (at + 1) & (size - 1),
            }
        }
        None
    }

    /// The best rank in one node; ranks that are not below `bound` need not be found.
    #[inline]
    fn judge(&self, node: &Node, protocol: u8, ports: Option<Ports>, bound: u32, steps: &mut impl Steps) -> u32 {
        let best = node.any;
        if node.single != NO_PROTOCOL {
            let (first, last) = node.range;
            let inside = match ports {
                Some(ports) => first <= ports.destination && ports.destination <= last,
                None => (first, last) == (0, u16::MAX),
            };
            let matches = inside && node.single == u16::from(protocol);
            return if matches { best.min(node.first) } else { best };
        }
        let first = node.first as usize;
        let entries = self.protocols.get(first..first + usize::from(node.count)).unwrap_or_default();
        let entry = if entries.len() <= 4 {
            steps.add(entries.len() as u32);
            entries.iter().find(|e| e.protocol == protocol)
        } else {
            steps.add(entries.len().ilog2() + 1);
            entries.binary_search_by_key(&protocol, |e| e.protocol).ok().and_then(|i| entries.get(i))
        };
        let Some(entry) = entry.filter(|e| e.best < best.min(bound)) else { return best };
        let Some(ports) = ports else { return best.min(entry.portless) };
        let best = best.min(self.maps.lookup(entry.map, ports.destination, steps));
        if entry.tree == NO_RANK { best } else { self.judge_tree(entry, ports, best, steps) }
    }

    /// From the destination port's leaf up to the root: the rules on the way are those whose destination range contains it.
    fn judge_tree(&self, entry: &ProtocolEntry, ports: Ports, mut best: u32, steps: &mut impl Steps) -> u32 {
        let Some(tree) = self.trees.get(entry.tree as usize) else { return best };
        let leaf = self.maps.lookup(tree.leaves, ports.destination, steps);
        let mut at = leaf + tree.leaf_count;
        while at > 0 {
            steps.add(1);
            let map = self.tree_maps.get((tree.offset + at) as usize).copied();
            if let Some(map) = map.filter(|map| map.best < best) {
                best = best.min(self.maps.lookup(map, ports.source, steps));
            }
            at >>= 1;
        }
        best
    }
}
