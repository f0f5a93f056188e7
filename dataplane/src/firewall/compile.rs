//! From a port's rules to tables whose look-up does not grow with their number.
//!
//! All rules are ranked in the order in which they decide (see [`policy`](super::policy)); a rank is the rule's
//! [`RuleId`], 0 the first to decide. Per direction and family there is a [`Table`]:
//! - a *node* per distinct remote (each CIDR, each remote group or address set; "anywhere" is the CIDR of length 0). The nodes
//!   of CIDRs are found by longest-prefix match and chained to the next shorter prefix; those of sets through the
//!   [`AddressIndex`](super::AddressIndex), which knows the sets of an address;
//! - in a node, per protocol, a map from destination port (or ICMP type and code) to the best rank;
//! - rules with source ports besides in a segment tree over destination ports, with such a map over source ports per tree node.
//!
//! Every rule is in one node only, so memory is proportional to the rules (times log n for rules with source ports). A
//! look-up visits the nodes of the prefixes that contain the address, and of its sets; each knows its best rank, so nodes
//! that cannot win are skipped.
use std::collections::BTreeMap;
use std::sync::Arc;

use super::address_sets::{AddressBook, SetId, SetKey};
use super::cidr::Cidr;
use super::policy::{
    Action, BUILTIN_PRIORITY, BuiltinServices, Direction, Ethertype, PolicyDocument, PortPolicy, PortRange, Protocol,
    Rule,
};
use super::prefix_index::{Address, NO_PREFIX, PrefixIndex};
use super::ranges::{NO_RANK, RangeMap, RangeMaps, Ranked, cuts, position};
use super::validate::PolicyError;
use crate::packet::icmp::v6;

#[cfg(doc)]
use super::matcher::RuleId;

/// What [`compile`] needs to know besides the policy.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompileOptions {
    /// Stands in [`CompiledPolicy::generation`]; cached verdicts of other generations are to be re-evaluated.
    pub generation: u64,
    /// Any random number, against chosen hash collisions. The verdicts do not depend on it.
    pub seed: u64,
}

/// What one rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub action: Action,
    pub stateless: bool,
    pub log: bool,
}

/// Where a ranked rule stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RuleRef {
    /// Index into the port's groups, or [`BUILTIN_GROUP`].
    pub group: u32,
    /// Index into the group's rules, or into the built-in ones.
    pub index: u32,
}

pub(crate) const BUILTIN_GROUP: u32 = u32::MAX;

/// All rules for one remote. 32 bytes, so that it is in one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(crate) struct Node {
    /// Node of the next shorter prefix, or [`NO_PREFIX`].
    pub parent: u32,
    /// Best rank in this node.
    pub best: u32,
    /// Best rank in this node and all above it.
    pub chain_best: u32,
    /// Best rule that is for all protocols.
    pub any: u32,
    /// Its first protocol. Where `single` is [`NO_PROTOCOL`]: index in [`Table::protocols`]; else that only rule's rank.
    pub first: u32,
    /// Number of entries in [`Table::protocols`].
    pub count: u16,
    /// The protocol of the only rule that is for one protocol: the usual case by far, which needs no further memory access.
    pub single: u16,
    /// Its range of destination ports.
    pub range: (u16, u16),
}

/// Not a protocol number.
pub(crate) const NO_PROTOCOL: u16 = u16::MAX;

/// All rules for one remote and protocol.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProtocolEntry {
    pub protocol: u8,
    /// Best rank in here.
    pub best: u32,
    /// Best rule that does not look at ports or types: all that matches where these are not known.
    pub portless: u32,
    /// Rules that do not look at source ports, by destination port or ICMP type and code.
    pub map: RangeMap,
    /// Rules that do: index of their tree, or [`NO_RANK`].
    pub tree: u32,
}

/// Rules for one remote and protocol that look at source ports: a segment tree over destination ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourceTree {
    /// From destination port to leaf.
    pub leaves: RangeMap,
    /// Number of leaves. The tree's node `n` has the children `2n` and `2n + 1`; leaf `i` is node `leaf_count + i`.
    pub leaf_count: u32,
    /// Where its nodes begin in [`Table::tree_maps`].
    pub offset: u32,
}

/// Rules of one direction and family.
#[derive(Clone, Debug)]
pub(crate) struct Table<A> {
    pub index: PrefixIndex<A>,
    /// Nodes of the prefixes, in the order of the index; then those of sets.
    pub nodes: Box<[Node]>,
    /// Sets that have a node, and where, by ascending number.
    pub sets: Box<[(SetId, u32)]>,
    /// The same as a hash table, at most a quarter full: its size is a power of two.
    pub set_slots: Box<[(SetId, u32)]>,
    /// Best rank in any set's node.
    pub sets_best: u32,
    pub protocols: Box<[ProtocolEntry]>,
    pub trees: Box<[SourceTree]>,
    /// Maps over source ports.
    pub tree_maps: Box<[RangeMap]>,
    pub maps: RangeMaps,
}

/// One port's rules, ready for look-ups. Immutable; replaced as a whole.
#[derive(Clone, Debug)]
pub struct CompiledPolicy {
    pub(crate) generation: u64,
    pub(crate) document: Arc<PolicyDocument>,
    pub(crate) groups: Box<[String]>,
    pub(crate) builtin: Box<[Rule]>,
    /// By rank.
    pub(crate) rules: Box<[RuleRef]>,
    /// By rank.
    pub(crate) outcomes: Box<[Outcome]>,
    /// Sets that rules name.
    pub(crate) sets: BTreeMap<SetKey, SetId>,
    /// By [`Direction`]: ingress, egress.
    pub(crate) v4: [Table<u32>; 2],
    pub(crate) v6: [Table<u128>; 2],
    pub(crate) defaults: [Outcome; 2],
    /// EtherTypes that pass unjudged, ascending.
    pub(crate) ethertypes: Box<[u16]>,
}

/// Compiles a port's rules. `document` is kept (shared) for explanations; `book` gives numbers to the sets that rules name. The
/// document is taken to be [valid](PolicyDocument::validate).
///
/// # Errors
/// What [`PolicyDocument::validate_port`] finds, with paths that begin with `path`.
pub fn compile(
    document: &Arc<PolicyDocument>,
    port: &PortPolicy,
    path: &str,
    book: &mut AddressBook,
    options: CompileOptions,
) -> Result<CompiledPolicy, Vec<PolicyError>> {
    document.validate_port(port, path)?;
    let builtin = builtin_rules(port.builtin);
    let ranked = rank(document, port, &builtin);
    let mut sets = BTreeMap::new();
    let mut tables = Builders::default();
    let mut outcomes = Vec::with_capacity(ranked.len());
    for (i, (_, rule, outcome)) in ranked.iter().enumerate() {
        outcomes.push(*outcome);
        let set = match (&rule.remote_group, &rule.remote_address_set) {
            (Some(name), _) => Some(SetKey::Group(name.clone())),
            (None, Some(name)) => Some(SetKey::AddressSet(name.clone())),
            (None, None) => None,
        };
        let set = set.map(|key| *sets.entry(key).or_insert_with_key(|key| book.intern(key)));
        tables.add(rule, set, i as u32);
    }
    let default = |direction| {
        let action = port.default_action(direction);
        Outcome { action, stateless: false, log: port.log_default && action != Action::Allow }
    };
    let mut ethertypes = port.allowed_ethertypes.clone();
    ethertypes.sort_unstable();
    let rules = ranked.iter().map(|(r, ..)| *r).collect();
    let seed = options.seed;
    let [v4_in, v4_out] = tables.v4;
    let [v6_in, v6_out] = tables.v6;
    Ok(CompiledPolicy {
        generation: options.generation,
        document: Arc::clone(document),
        groups: port.security_groups.clone().into(),
        rules,
        outcomes: outcomes.into(),
        sets,
        v4: [v4_in.finish(seed), v4_out.finish(seed)],
        v6: [v6_in.finish(seed), v6_out.finish(seed)],
        defaults: [default(Direction::Ingress), default(Direction::Egress)],
        ethertypes: ethertypes.into(),
        builtin: builtin.into(),
    })
}

/// All rules of the port, the first to decide first.
fn rank<'a>(document: &'a PolicyDocument, port: &PortPolicy, builtin: &'a [Rule]) -> Vec<(RuleRef, &'a Rule, Outcome)> {
    let outcome = |rule: &Rule, group_stateless: bool| Outcome {
        action: rule.action,
        stateless: rule.action == Action::Allow && (rule.stateless || group_stateless),
        log: rule.log,
    };
    let of_builtin = builtin.iter().enumerate().map(|(i, rule)| {
        let at = RuleRef { group: BUILTIN_GROUP, index: i as u32 };
        (at, rule, outcome(rule, false))
    });
    let groups = port.security_groups.iter().enumerate();
    let groups = groups.filter_map(|(g, name)| document.security_groups.get(name).map(|group| (g, group)));
    let of_groups = groups.flat_map(|(g, group)| {
        group.rules.iter().enumerate().map(move |(i, rule)| {
            let at = RuleRef { group: g as u32, index: i as u32 };
            (at, rule, outcome(rule, group.stateless))
        })
    });
    let mut all: Vec<_> = of_builtin.chain(of_groups).collect();
    // A stable sort: groups and rules stay in their order among equals.
    all.sort_by_key(|(_, rule, outcome)| {
        let class = match (outcome.action, outcome.stateless) {
            (Action::Drop, _) => 0,
            (Action::Reject, _) => 1,
            (Action::Allow, false) => 2,
            (Action::Allow, true) => 3u8,
        };
        (std::cmp::Reverse(rule.priority), class)
    });
    all
}

/// The rules that `services` stands for.
pub(crate) fn builtin_rules(services: BuiltinServices) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut add = |name: &str, rule: Rule| {
        rules.push(Rule { name: Some(name.into()), stateless: true, priority: BUILTIN_PRIORITY, ..rule });
    };
    let mut icmpv6 = |name: &str, kinds: &[u8]| {
        for direction in [Direction::Ingress, Direction::Egress] {
            for kind in kinds {
                let rule = Rule { protocol: Protocol::ICMPV6, icmp_type: Some(*kind), ..Rule::allow(direction) };
                add(name, Rule { ethertype: Ethertype::Ipv6, ..rule });
            }
        }
    };
    if services.neighbour_discovery {
        let kinds = [
            v6::ROUTER_SOLICITATION,
            v6::ROUTER_ADVERTISEMENT,
            v6::NEIGHBOUR_SOLICITATION,
            v6::NEIGHBOUR_ADVERTISEMENT,
        ];
        icmpv6("neighbour_discovery", &kinds);
    }
    if services.multicast_listener {
        icmpv6("multicast_listener", &[v6::MLD_QUERY, v6::MLD_REPORT, v6::MLD_DONE, v6::MLD2_REPORT]);
    }
    if services.dhcp_client {
        let mut dhcp = |ethertype, direction, source, destination| {
            let ports = vec![PortRange::single(destination)];
            let source_ports = vec![PortRange::single(source)];
            let rule = Rule { ethertype, protocol: Protocol::UDP, ports, source_ports, ..Rule::allow(direction) };
            add("dhcp_client", rule);
        };
        dhcp(Ethertype::Ipv4, Direction::Egress, 68, 67);
        dhcp(Ethertype::Ipv4, Direction::Ingress, 67, 68);
        dhcp(Ethertype::Ipv6, Direction::Egress, 546, 547);
        dhcp(Ethertype::Ipv6, Direction::Ingress, 547, 546);
    }
    rules
}

#[derive(Default)]
struct Builders {
    v4: [TableBuilder<u32>; 2],
    v6: [TableBuilder<u128>; 2],
}

impl Builders {
    fn add(&mut self, rule: &Rule, set: Option<SetId>, rank: u32) {
        let at = rule.direction as usize;
        if rule.covers_family(true)
            && let Some(table) = self.v4.get_mut(at)
        {
            let prefix = if let Some(Cidr::V4(key, len)) = rule.remote_cidr { (key, len) } else { (0, 0) };
            table.node(prefix, set).add(rule, true, rank);
        }
        if rule.covers_family(false)
            && let Some(table) = self.v6.get_mut(at)
        {
            let prefix = if let Some(Cidr::V6(key, len)) = rule.remote_cidr { (key, len) } else { (0, 0) };
            table.node(prefix, set).add(rule, false, rank);
        }
    }
}

struct TableBuilder<A> {
    prefixes: BTreeMap<(A, u8), NodeBuilder>,
    sets: BTreeMap<SetId, NodeBuilder>,
}

impl<A> Default for TableBuilder<A> {
    fn default() -> Self {
        Self { prefixes: BTreeMap::new(), sets: BTreeMap::new() }
    }
}

struct NodeBuilder {
    any: u32,
    protocols: BTreeMap<u8, ProtocolBuilder>,
}

impl Default for NodeBuilder {
    fn default() -> Self {
        Self { any: NO_RANK, protocols: BTreeMap::new() }
    }
}

struct ProtocolBuilder {
    portless: u32,
    /// In ascending order of rank, since rules are added so.
    ranges: Vec<Ranked>,
    /// Destination and source ranges.
    pairs: Vec<(Ranked, Ranked)>,
}

impl NodeBuilder {
    fn add(&mut self, rule: &Rule, v4: bool, rank: u32) {
        let Some(number) = rule.protocol.number(v4) else {
            self.any = self.any.min(rank);
            return;
        };
        let empty = || ProtocolBuilder { portless: NO_RANK, ranges: Vec::new(), pairs: Vec::new() };
        let protocol = self.protocols.entry(number).or_insert_with(empty);
        let ranked = |range: &PortRange| Ranked { first: range.first, last: range.last, rank };
        let icmp = rule.icmp_type.map(|kind| {
            let base = u16::from(kind) << 8;
            match rule.icmp_code {
                Some(code) => PortRange::single(base | u16::from(code)),
                None => PortRange { first: base, last: base | 0xff },
            }
        });
        let all = [icmp.unwrap_or(PortRange::ALL)];
        let destinations: &[PortRange] = if rule.ports.is_empty() { &all } else { &rule.ports };
        if rule.source_ports.is_empty() {
            protocol.ranges.extend(destinations.iter().map(ranked));
            if rule.ports.is_empty() && icmp.is_none() {
                protocol.portless = protocol.portless.min(rank);
            }
        } else {
            for destination in destinations {
                protocol.pairs.extend(rule.source_ports.iter().map(|source| (ranked(destination), ranked(source))));
            }
        }
    }
}

impl<A: Address> TableBuilder<A> {
    fn node(&mut self, prefix: (A, u8), set: Option<SetId>) -> &mut NodeBuilder {
        match set {
            Some(id) => self.sets.entry(id).or_default(),
            None => self.prefixes.entry(prefix).or_default(),
        }
    }

    fn finish(self, seed: u64) -> Table<A> {
        let prefixes: Vec<(A, u8)> = self.prefixes.keys().copied().collect();
        let (index, parents) = PrefixIndex::build(&prefixes, seed);
        let mut parts = Parts::default();
        for (builder, parent) in self.prefixes.into_values().zip(parents) {
            parts.add_node(builder, parent);
        }
        let first_set = parts.nodes.len() as u32;
        let sets: Box<[_]> = self.sets.keys().copied().zip(first_set..).collect();
        for builder in self.sets.into_values() {
            parts.add_node(builder, NO_PREFIX);
        }
        let of_sets = parts.nodes.get(first_set as usize..).unwrap_or_default();
        let sets_best = of_sets.iter().map(|n| n.best).min().unwrap_or(NO_RANK);
        parts.maps.shrink();
        Table {
            index,
            nodes: parts.nodes.into(),
            set_slots: set_slots(&sets),
            sets,
            sets_best,
            protocols: parts.protocols.into(),
            trees: parts.trees.into(),
            tree_maps: parts.tree_maps.into(),
            maps: parts.maps,
        }
    }
}

#[derive(Default)]
struct Parts {
    nodes: Vec<Node>,
    protocols: Vec<ProtocolEntry>,
    trees: Vec<SourceTree>,
    tree_maps: Vec<RangeMap>,
    maps: RangeMaps,
}

impl Parts {
    fn add_node(&mut self, builder: NodeBuilder, parent: u32) {
        let mut node = Node {
            parent,
            best: builder.any,
            chain_best: 0,
            any: builder.any,
            first: self.protocols.len() as u32,
            count: 0,
            single: NO_PROTOCOL,
            range: (0, 0),
        };
        let mut protocols = builder.protocols.iter();
        if let (Some((number, ProtocolBuilder { ranges, pairs, .. })), None) = (protocols.next(), protocols.next())
            && let ([only], []) = (ranges.as_slice(), pairs.as_slice())
        {
            node.best = node.best.min(only.rank);
            node.first = only.rank;
            node.single = u16::from(*number);
            node.range = (only.first, only.last);
        } else {
            for (number, protocol) in builder.protocols {
                let entry = self.protocol(number, protocol);
                node.best = node.best.min(entry.best);
                node.count += 1;
                self.protocols.push(entry);
            }
        }
        // Parents come before their children.
        node.chain_best = self.nodes.get(parent as usize).map_or(node.best, |p| p.chain_best.min(node.best));
        self.nodes.push(node);
    }

    fn protocol(&mut self, protocol: u8, builder: ProtocolBuilder) -> ProtocolEntry {
        let map = self.maps.add(&builder.ranges);
        let pairs_best = builder.pairs.iter().map(|(d, _)| d.rank).min().unwrap_or(NO_RANK);
        let tree = if builder.pairs.is_empty() { NO_RANK } else { self.tree(&builder.pairs) };
        ProtocolEntry { protocol, best: map.best.min(pairs_best), portless: builder.portless, map, tree }
    }

    /// Each pair goes to the O(log n) tree nodes whose destination ranges make up its own.
    fn tree(&mut self, pairs: &[(Ranked, Ranked)]) -> u32 {
        let destinations: Vec<Ranked> = pairs.iter().map(|(d, _)| *d).collect();
        let cuts = cuts(&destinations);
        let leaf_count = cuts.len();
        let mut sources: Vec<Vec<Ranked>> = vec![Vec::new(); leaf_count * 2];
        for (destination, source) in pairs {
            let mut low = leaf_count + position(&cuts, destination.first);
            let mut high = leaf_count + position(&cuts, destination.last) + 1;
            while low < high {
                if low & 1 == 1 {
                    sources.get_mut(low).into_iter().for_each(|s| s.push(*source));
                    low += 1;
                }
                if high & 1 == 1 {
                    high -= 1;
                    sources.get_mut(high).into_iter().for_each(|s| s.push(*source));
                }
                low >>= 1;
                high >>= 1;
            }
        }
        let offset = self.tree_maps.len() as u32;
        for items in &sources {
            let map = self.maps.add(items);
            self.tree_maps.push(map);
        }
        let leaves = self.maps.add_positions(&cuts);
        self.trees.push(SourceTree { leaves, leaf_count: leaf_count as u32, offset });
        self.trees.len() as u32 - 1
    }
}

/// Where the search for a set begins in a table of `size` slots.
#[inline(always)]
pub(crate) fn set_slot(id: SetId, size: usize) -> usize {
    // Numbers are given in sequence: nobody chooses them.
    (id.0.wrapping_mul(0x9e37_79b1) >> 16) as usize & size.wrapping_sub(1)
}

fn set_slots(sets: &[(SetId, u32)]) -> Box<[(SetId, u32)]> {
    let size = if sets.is_empty() { 0 } else { (sets.len() * 4).next_power_of_two() };
    let mut slots = vec![(SetId(u32::MAX), NO_PREFIX); size].into_boxed_slice();
    for set in sets {
        let mut at = set_slot(set.0, size);
        while slots.get(at).is_some_and(|(_, node)| *node != NO_PREFIX) {
            at = (at + 1) & (size - 1);
        }
        if let Some(slot) = slots.get_mut(at) {
            *slot = *set;
        }
    }
    slots
}

impl<A: Address> Table<A> {
    fn memory_bytes(&self) -> usize {
        self.index.memory_bytes()
            + size_of_val(&*self.nodes)
            + size_of_val(&*self.sets)
            + size_of_val(&*self.set_slots)
            + size_of_val(&*self.protocols)
            + size_of_val(&*self.trees)
            + size_of_val(&*self.tree_maps)
            + self.maps.memory_bytes()
    }
}

impl CompiledPolicy {
    /// Number of this version of the port's policy, as given to [`compile`].
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many rules decide here, built-in ones included.
    pub fn rule_count(&self) -> usize {
        self.rules.len()
    }

    /// One of the operator's rules passes packets untracked (the built-in ones, for protocols that need no tracking, do not count).
    pub fn any_stateless(&self) -> bool {
        self.rules.iter().zip(&self.outcomes).any(|(rule, outcome)| outcome.stateless && rule.group != BUILTIN_GROUP)
    }

    /// Bytes of memory that are this policy's own (the document is shared).
    pub fn memory_bytes(&self) -> usize {
        let v4: usize = self.v4.iter().map(Table::memory_bytes).sum();
        let v6: usize = self.v6.iter().map(Table::memory_bytes).sum();
        v4 + v6 + size_of_val(&*self.rules) + size_of_val(&*self.outcomes) + size_of::<Self>()
    }
}
