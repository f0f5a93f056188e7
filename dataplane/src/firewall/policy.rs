//! The policy as operators write it: security groups, named address sets, and what a port does with them.
//!
//! # Which rule decides
//! All rules of all groups of a port are pooled. A new connection (or, for stateless rules, a packet) is judged by the
//! *first* of the matching rules in this order:
//! 1. the higher `priority` first (every rule has [`DEFAULT_PRIORITY`] unless it says otherwise);
//! 2. at equal priority, by action: `drop`, then `reject`, then stateful `allow`, then stateless `allow`;
//! 3. at equal priority and action the verdict is the same; the group that the port names first, and in it the rule that
//!    stands first, gets the credit.
//!
//! So without priorities the rules mean what they mean in Neutron: it does not matter in which order allow rules stand, any
//! match allows. A drop or reject rule wins over them, and an allow rule of higher priority makes an exception to it. A
//! stateless rule never takes anything away from what a stateful one allows. Where no rule matches, the port's
//! `default_ingress` or `default_egress` decides.
//!
//! Names are those of cloud APIs: *ingress* is towards the VM, *egress* away from it; *remote* is the other end; `ports` are
//! destination ports in both directions.
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::cidr::Cidr;
use super::limits::LimitsConfig;
use super::reject::RejectConfig;
use super::spoof::SpoofConfig;
use crate::packet::IpProto;

/// Priority of a rule that does not state one.
pub const DEFAULT_PRIORITY: u16 = 1000;
/// Priority of the built-in rules ([`BuiltinServices`]): a rule that is to override them needs a higher one.
pub const BUILTIN_PRIORITY: u16 = 60_000;
/// Most security groups in a document.
pub const MAX_GROUPS: usize = 16_384;
/// Most rules in one group.
pub const MAX_RULES_PER_GROUP: usize = 16_384;
/// Most groups on one port.
pub const MAX_GROUPS_PER_PORT: usize = 64;
/// Most rules, over all its groups, on one port.
pub const MAX_RULES_PER_PORT: usize = 32_768;
/// Most port ranges, source and destination each, in one rule.
pub const MAX_RANGES_PER_RULE: usize = 64;
/// Most table entries one port's rules may come to: a rule counts once per family, and per pair of its port ranges.
pub const MAX_ENTRIES_PER_PORT: usize = 131_072;
/// Most different remote groups and address sets that one port's rules may name.
pub const MAX_REMOTE_SETS_PER_PORT: usize = 256;
/// Most named address sets in a document.
pub const MAX_ADDRESS_SETS: usize = 16_384;
/// Most prefixes in one address set, and addresses of one group's members.
pub const MAX_ADDRESSES_PER_SET: usize = 262_144;
/// Most bytes in a name.
pub const MAX_NAME_BYTES: usize = 128;
/// Most bytes in a description.
pub const MAX_DESCRIPTION_BYTES: usize = 1024;
/// Most EtherTypes in [`PortPolicy::allowed_ethertypes`].
pub const MAX_ETHERTYPES: usize = 64;

/// Which way a packet goes, seen from the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the VM.
    Ingress,
    /// Away from the VM.
    Egress,
}

impl Direction {
    /// `ingress` or `egress`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Network protocols that a rule is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ethertype {
    /// IPv4 and IPv6.
    #[default]
    Any,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It passes.
    #[default]
    Allow,
    /// It vanishes.
    Drop,
    /// It vanishes, and its sender is told: a TCP reset, or an ICMP error (see [`super::reject`]).
    Reject,
}

impl Action {
    /// `allow`, `drop` or `reject`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Drop => "drop",
            Self::Reject => "reject",
        }
    }
}

/// Transport protocol of a rule: a name (`tcp`, `udp`, `icmp`, `icmpv6`, `sctp`, `gre` ...), a number from 0 to 255, or `any`.
///
/// `icmp` stands for ICMP over IPv4 and ICMPv6 over IPv6; `icmpv6` (also `ipv6-icmp`) for the latter alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// All.
    #[default]
    Any,
    /// ICMP or ICMPv6, as the family has it.
    Icmp,
    /// An IANA protocol number.
    Number(u8),
}

/// Names of protocols; the first name of a number is the one that is written.
const PROTOCOLS: &[(&str, u8)] = &[
    ("tcp", 6),
    ("udp", 17),
    ("icmpv6", 58),
    ("ipv6-icmp", 58),
    ("sctp", 132),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("igmp", 2),
    ("ipip", 4),
    ("egp", 8),
    ("dccp", 33),
    ("ipv6-encap", 41),
    ("rsvp", 46),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("pgm", 113),
    ("udplite", 136),
];

/// The text names no protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a protocol: expected any, tcp, udp, icmp, icmpv6, sctp, gre, esp, ah ... or a number from 0 to 255"
)]
pub struct ProtocolSyntax(pub String);

impl Protocol {
    /// TCP.
    pub const TCP: Self = Self::Number(6);
    /// UDP.
    pub const UDP: Self = Self::Number(17);
    /// ICMPv6.
    pub const ICMPV6: Self = Self::Number(58);
    /// SCTP.
    pub const SCTP: Self = Self::Number(132);

    /// The number in one family; `None` for all.
    pub const fn number(self, v4: bool) -> Option<u8> {
        match self {
            Self::Any => None,
            Self::Icmp => Some(if v4 { IpProto::ICMP.0 } else { IpProto::ICMPV6.0 }),
            Self::Number(n) => Some(n),
        }
    }

    /// Has source and destination ports.
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::Number(n) if IpProto(n).has_ports())
    }

    /// Has ICMP types and codes.
    pub const fn has_icmp_types(self) -> bool {
        matches!(self, Self::Icmp | Self::Number(1 | 58))
    }
}

impl FromStr for Protocol {
    type Err = ProtocolSyntax;
    fn from_str(text: &str) -> Result<Self, ProtocolSyntax> {
        match text {
            "any" => return Ok(Self::Any),
            "icmp" => return Ok(Self::Icmp),
            _ => {}
        }
        if let Some((_, n)) = PROTOCOLS.iter().find(|(name, _)| *name == text) {
            return Ok(Self::Number(*n));
        }
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten().map(Self::Number).ok_or_else(|| ProtocolSyntax(text.into()))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Icmp => f.write_str("icmp"),
            Self::Number(n) => match PROTOCOLS.iter().find(|(_, number)| number == n) {
                Some((name, _)) => f.write_str(name),
                None => write!(f, "{n}"),
            },
        }
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrNumber;
        impl serde::de::Visitor<'_> for TextOrNumber {
            type Value = Protocol;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a protocol name or a number from 0 to 255")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Protocol, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Protocol, E> {
                u8::try_from(number).map(Protocol::Number).map_err(|_| E::custom(ProtocolSyntax(number.to_string())))
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Protocol, E> {
                u8::try_from(number).map(Protocol::Number).map_err(|_| E::custom(ProtocolSyntax(number.to_string())))
            }
        }
        deserializer.deserialize_any(TextOrNumber)
    }
}

/// Ports `first` to `last`, both included. Written `80` or `"8000-8099"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port; validation refuses one below `first`.
    pub last: u16,
}

/// The text is no port range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a port or a range of ports: expected a number from 0 to 65535, or FIRST-LAST with FIRST <= LAST"
)]
pub struct PortRangeSyntax(pub String);

impl PortRange {
    /// All ports.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// One port.
    pub const fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// `port` is inside.
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl FromStr for PortRange {
    type Err = PortRangeSyntax;
    fn from_str(text: &str) -> Result<Self, PortRangeSyntax> {
        let number = |part: &str| -> Option<u16> {
            (!part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())).then(|| part.parse().ok()).flatten()
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (number(first.trim()), number(last.trim())) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(PortRangeSyntax(text.into())),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.first == self.last { serializer.serialize_u16(self.first) } else { serializer.collect_str(self) }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrNumber;
        impl serde::de::Visitor<'_> for TextOrNumber {
            type Value = PortRange;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port such as 443 or a range such as \"8000-8099\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PortRange, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<PortRange, E> {
                let port = u16::try_from(number).map_err(|_| E::custom(PortRangeSyntax(number.to_string())))?;
                Ok(PortRange::single(port))
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<PortRange, E> {
                let port = u16::try_from(number).map_err(|_| E::custom(PortRangeSyntax(number.to_string())))?;
                Ok(PortRange::single(port))
            }
        }
        deserializer.deserialize_any(TextOrNumber)
    }
}

const fn default_priority() -> u16 {
    DEFAULT_PRIORITY
}

fn is_default_priority(priority: &u16) -> bool {
    *priority == DEFAULT_PRIORITY
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// One rule of a security group. What is not stated matches everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Name for logs and explanations; need not be unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Which way.
    pub direction: Direction,
    /// Which family. A rule with a `remote_cidr` is for that CIDR's family alone.
    #[serde(default)]
    pub ethertype: Ethertype,
    /// Which transport protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Destination ports; any of the ranges matches. Only for protocols that have ports. Fragments whose ports are unknown match
    /// no rule that states ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
    /// Source ports, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_ports: Vec<PortRange>,
    /// ICMP type. Only for ICMP and ICMPv6, and only with one family, since the two number their types differently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_type: Option<u8>,
    /// ICMP code; needs a type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_code: Option<u8>,
    /// The other end is inside this prefix. At most one of the three `remote_*` may be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_cidr: Option<Cidr>,
    /// The other end is a member of this security group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_group: Option<String>,
    /// The other end is in this named address set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_address_set: Option<String>,
    /// Packets that match are not tracked: replies need a rule of their own. Only for `allow`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stateless: bool,
    /// What happens.
    #[serde(default)]
    pub action: Action,
    /// New and denied connections are reported to the flow log.
    #[serde(default, skip_serializing_if = "is_false")]
    pub log: bool,
    /// See the module's documentation. Higher goes first.
    #[serde(default = "default_priority", skip_serializing_if = "is_default_priority")]
    pub priority: u16,
}

impl Rule {
    /// Allows everything in one direction; a base for `..Rule::allow(...)`.
    pub fn allow(direction: Direction) -> Self {
        Self {
            name: None,
            direction,
            ethertype: Ethertype::Any,
            protocol: Protocol::Any,
            ports: Vec::new(),
            source_ports: Vec::new(),
            icmp_type: None,
            icmp_code: None,
            remote_cidr: None,
            remote_group: None,
            remote_address_set: None,
            stateless: false,
            action: Action::Allow,
            log: false,
            priority: DEFAULT_PRIORITY,
        }
    }

    /// The rule is for IPv4 (`true`) or IPv6 (`false`), taking its CIDR and protocol into account.
    pub fn covers_family(&self, v4: bool) -> bool {
        let stated = match self.ethertype {
            Ethertype::Any => true,
            Ethertype::Ipv4 => v4,
            Ethertype::Ipv6 => !v4,
        };
        stated && self.remote_cidr.is_none_or(|cidr| cidr.is_v4() == v4)
    }
}

impl fmt::Display for Rule {
    /// One line, for explanations: `ingress ipv4 tcp ports 80,443 from 10.0.0.0/8 allow`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.direction.name())?;
        match self.ethertype {
            Ethertype::Any => {}
            Ethertype::Ipv4 => f.write_str(" ipv4")?,
            Ethertype::Ipv6 => f.write_str(" ipv6")?,
        }
        if self.protocol != Protocol::Any {
            write!(f, " {}", self.protocol)?;
        }
        for (word, ranges) in [("ports", &self.ports), ("source-ports", &self.source_ports)] {
            for (i, range) in ranges.iter().enumerate() {
                if i == 0 { write!(f, " {word} {range}")? } else { write!(f, ",{range}")? }
            }
        }
        if let Some(kind) = self.icmp_type {
            write!(f, " type {kind}")?;
        }
        if let Some(code) = self.icmp_code {
            write!(f, " code {code}")?;
        }
        let word = if self.direction == Direction::Ingress { "from" } else { "to" };
        if let Some(cidr) = self.remote_cidr {
            write!(f, " {word} {cidr}")?;
        }
        if let Some(group) = &self.remote_group {
            write!(f, " {word} group {group}")?;
        }
        if let Some(set) = &self.remote_address_set {
            write!(f, " {word} set {set}")?;
        }
        write!(f, " {}", self.action.name())?;
        if self.stateless {
            f.write_str(" stateless")?;
        }
        if self.log {
            f.write_str(" log")?;
        }
        if self.priority != DEFAULT_PRIORITY {
            write!(f, " priority {}", self.priority)?;
        }
        Ok(())
    }
}

/// A named set of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecurityGroup {
    /// For people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// All allow rules of the group are stateless, whatever they say themselves.
    #[serde(skip_serializing_if = "is_false")]
    pub stateless: bool,
    /// The rules; their order does not matter to the verdict.
    pub rules: Vec<Rule>,
}

/// A named set of prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AddressSet {
    /// For people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The prefixes, of both families, in any order; they may overlap.
    pub addresses: Vec<Cidr>,
}

/// Everything that ports refer to by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyDocument {
    /// Security groups by name.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// Address sets by name.
    pub address_sets: BTreeMap<String, AddressSet>,
}

/// What a port allows of itself, so that a VM under default deny has an address and neighbours. Each is a set of stateless allow
/// rules of [`BUILTIN_PRIORITY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuiltinServices {
    /// IPv6 router and neighbour solicitation and advertisement (RFC 4861), both ways. (Advertising as a router is refused by
    /// [`super::spoof`] unless allowed there.)
    pub neighbour_discovery: bool,
    /// IPv6 multicast listener discovery (RFC 2710, RFC 3810), both ways.
    pub multicast_listener: bool,
    /// The VM as DHCP and DHCPv6 client (RFC 2131, RFC 8415): requests out, answers in.
    pub dhcp_client: bool,
}

impl Default for BuiltinServices {
    fn default() -> Self {
        Self { neighbour_discovery: true, multicast_listener: true, dhcp_client: true }
    }
}

/// What the firewall does for one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PortPolicy {
    /// Names of the port's security groups. None: the defaults and the built-in rules decide alone.
    pub security_groups: Vec<String>,
    /// Verdict on connections towards the VM that no rule matches.
    pub default_ingress: Action,
    /// Verdict on connections from the VM that no rule matches.
    pub default_egress: Action,
    /// Denials by default are reported to the flow log.
    pub log_default: bool,
    /// Built-in rules.
    pub builtin: BuiltinServices,
    /// EtherTypes other than IPv4, IPv6 and ARP that pass, both ways; all others are dropped. ARP always passes here
    /// (anti-spoofing checks it).
    pub allowed_ethertypes: Vec<u16>,
    /// Which addresses the VM may use.
    pub anti_spoofing: SpoofConfig,
    /// How many connections it may have.
    pub limits: LimitsConfig,
    /// How it tells senders that they were rejected.
    pub reject: RejectConfig,
}

impl Default for PortPolicy {
    fn default() -> Self {
        Self {
            security_groups: Vec::new(),
            default_ingress: Action::Drop,
            default_egress: Action::Allow,
            log_default: false,
            builtin: BuiltinServices::default(),
            allowed_ethertypes: Vec::new(),
            anti_spoofing: SpoofConfig::default(),
            limits: LimitsConfig::default(),
            reject: RejectConfig::default(),
        }
    }
}

impl PortPolicy {
    /// The default of one direction.
    pub const fn default_action(&self, direction: Direction) -> Action {
        match direction {
            Direction::Ingress => self.default_ingress,
            Direction::Egress => self.default_egress,
        }
    }
}

/// What the firewall's rules look at in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FlowKey {
    /// The other end: source address of ingress packets, destination of egress packets.
    pub remote: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Ports, or ICMP type and code; `None` when they are not known (a later fragment) or the protocol has none.
    pub l4: Option<L4Key>,
}

/// Ports or ICMP type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum L4Key {
    /// TCP, UDP, SCTP, DCCP, UDP-Lite.
    Ports {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP, ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
}
