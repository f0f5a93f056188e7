//! Anti-spoofing: what a VM sends must carry its own addresses.
//!
//! Checked on every frame from the VM, before anything else looks at it: source MAC and IP addresses, the addresses claimed in
//! ARP and IPv6 neighbour discovery, and services that no VM offers unless allowed to: router advertisements, redirects, DHCP.
//! On by default; every refusal has a name of its own ([`SpoofReason`]).
//!
//! Evasions that are closed: neighbour discovery in fragments (RFC 6980) or behind extension headers (RFC 7113: the parser walks
//! them or refuses the packet), VLAN tags (the parser looks behind two; a third is no IP and subject to the EtherType policy).
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cidr::Cidr;
use super::prefix_index::{NO_PREFIX, PrefixIndex};
use super::validate::Errors;
use crate::packet::arp::{Arp, Operation};
use crate::packet::icmp::{Icmp, v6};
use crate::packet::ipv4::Ipv4;
use crate::packet::ipv6::Ipv6;
use crate::packet::{EtherType, Fragment, Headers, IpProto, L3, MacAddr, be16};

/// Most allowed addresses and pairs of one port.
pub const MAX_ADDRESSES: usize = 1024;
/// Most different MAC addresses of one port.
pub const MAX_MACS: usize = 64;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DHCPV6_CLIENT: u16 = 546;
const DHCPV6_SERVER: u16 = 547;
/// RFC 4861, 7.1.1: so that no router can have forwarded it.
const ND_HOP_LIMIT: u8 = 255;

/// An address (or prefix) that the VM may use besides its own, perhaps with a MAC address of its own: for VRRP, containers, routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressPair {
    /// Address or prefix.
    pub address: Cidr,
    /// The MAC address that goes with it; the port's own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// Which IPv6 link-local source addresses a VM may use without their being listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkLocal {
    /// The one made from the MAC address (RFC 4291, appendix A), for each of the port's MAC addresses.
    #[default]
    Eui64,
    /// All of fe80::/64, for guests with stable opaque identifiers (RFC 7217).
    Any,
    /// None.
    None,
}

/// A port's anti-spoofing settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpoofConfig {
    /// Check at all.
    pub enabled: bool,
    /// The port's MAC address; required when enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Addresses of the VM with the port's MAC address.
    pub addresses: Vec<Cidr>,
    /// Further pairs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_address_pairs: Vec<AddressPair>,
    /// Link-local addresses.
    pub ipv6_link_local: LinkLocal,
    /// The VM may advertise itself as an IPv6 router, and redirect.
    pub allow_router_advertisements: bool,
    /// The VM may answer DHCP requests.
    pub allow_dhcp_server: bool,
    /// The VM may answer DHCPv6 requests.
    pub allow_dhcpv6_server: bool,
}

impl Default for SpoofConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            mac: None,
            addresses: Vec::new(),
            allowed_address_pairs: Vec::new(),
            ipv6_link_local: LinkLocal::default(),
            allow_router_advertisements: false,
            allow_dhcp_server: false,
            allow_dhcpv6_server: false,
        }
    }
}

impl SpoofConfig {
    /// All pairs, with the port's own MAC address filled in.
    fn pairs(&self) -> impl Iterator<Item = (MacAddr, Cidr)> + '_ {
        let own = self.addresses.iter().filter_map(|address| Some((self.mac?, *address)));
        own.chain(self.allowed_address_pairs.iter().filter_map(|pair| Some((pair.mac.or(self.mac)?, pair.address))))
    }

    fn macs(&self) -> Vec<MacAddr> {
        let mut macs: Vec<MacAddr> = self.pairs().map(|(mac, _)| mac).chain(self.mac).collect();
        macs.sort_unstable();
        macs.dedup();
        macs
    }

    pub(crate) fn check(&self, errors: &mut Errors, path: &str) {
        if self.enabled && self.mac.is_none() {
            errors.add(format_args!("{path}.mac"), "anti-spoofing needs the port's MAC address (or enabled = false)");
        }
        if self.mac.is_some_and(|mac| !mac.is_valid_source()) {
            errors.add(format_args!("{path}.mac"), "not the address of a station: it is zero or a group address");
        }
        for (i, pair) in self.allowed_address_pairs.iter().enumerate() {
            if pair.mac.is_some_and(|mac| !mac.is_valid_source()) {
                let path = format!("{path}.allowed_address_pairs[{i}].mac");
                errors.add(path, "not the address of a station: it is zero or a group address");
            }
        }
        let count = self.addresses.len() + self.allowed_address_pairs.len();
        errors.at_most(path, count, MAX_ADDRESSES, "addresses and pairs");
        errors.at_most(path, self.macs().len(), MAX_MACS, "different MAC addresses");
    }
}

macro_rules! spoof_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame from a VM was refused. The names are part of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum SpoofReason { $($(#[$doc])* $variant,)* }
        impl SpoofReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [SpoofReason] = &[$(SpoofReason::$variant,)*];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in stats, metrics and explanations.
            pub const fn name(self) -> &'static str {
                match self { $(SpoofReason::$variant => $name,)* }
            }
        }
    };
}

spoof_reasons! {
    /// The source MAC address is not one of the port's.
    SourceMac = "spoof_source_mac",
    /// The source IPv4 address is not allowed with this MAC address.
    SourceIpv4 = "spoof_source_ipv4",
    /// The source IPv6 address is not allowed with this MAC address.
    SourceIpv6 = "spoof_source_ipv6",
    /// No packet may have this source address: multicast, broadcast, loopback, reserved.
    MartianSource = "spoof_martian_source",
    /// Source 0.0.0.0 in something else than a DHCP request (RFC 2131, 4.1).
    UnspecifiedIpv4 = "spoof_unspecified_ipv4",
    /// Source :: in something else than duplicate address detection, router solicitation or listener reports.
    UnspecifiedIpv6 = "spoof_unspecified_ipv6",
    /// The ARP packet is not a request or reply, or cannot be read.
    ArpMalformed = "spoof_arp_malformed",
    /// The ARP (or RARP) sender's hardware address is not one of the port's.
    ArpSenderMac = "spoof_arp_sender_mac",
    /// The ARP sender's protocol address is not allowed with its hardware address.
    ArpSenderAddress = "spoof_arp_sender_address",
    /// A neighbour discovery message that cannot be read, or not to its end.
    NdMalformed = "spoof_nd_malformed",
    /// Neighbour discovery with a hop limit other than 255 (RFC 4861, 7.1).
    NdHopLimit = "spoof_nd_hop_limit",
    /// Neighbour discovery in fragments (RFC 6980).
    NdFragmented = "spoof_nd_fragmented",
    /// The target of a neighbour advertisement, or of duplicate address detection, is not an address of the VM.
    NdTarget = "spoof_nd_target",
    /// A link-layer address option does not name a MAC address of the port, or not one that goes with the address.
    NdLinkLayer = "spoof_nd_link_layer",
    /// A router advertisement (RFC 6105).
    RouterAdvertisement = "spoof_router_advertisement",
    /// An IPv6 redirect.
    Redirect = "spoof_redirect",
    /// An answer of a DHCP server.
    DhcpServer = "spoof_dhcp_server",
    /// An answer of a DHCPv6 server.
    Dhcpv6Server = "spoof_dhcpv6_server",
}

/// What goes with one prefix.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    /// Bit `i`: with MAC address `i`. Includes what shorter prefixes allow.
    macs: u64,
}

/// A port's anti-spoofing rules, ready for use. Immutable.
#[derive(Clone, Debug)]
pub struct SpoofTable {
    enabled: bool,
    macs: Box<[MacAddr]>,
    v4: PrefixIndex<u32>,
    v4_allowed: Box<[Allowed]>,
    v6: PrefixIndex<u128>,
    v6_allowed: Box<[Allowed]>,
    router: bool,
    dhcp: bool,
    dhcpv6: bool,
}

fn allowed<A>(prefixes: &BTreeMap<(A, u8), u64>, parents: &[u32]) -> Box<[Allowed]> {
    let mut all: Vec<Allowed> = Vec::with_capacity(prefixes.len());
    for (macs, parent) in prefixes.values().zip(parents) {
        // Parents come first.
        let above = all.get(*parent as usize).map_or(0, |a| a.macs);
        all.push(Allowed { macs: macs | above });
    }
    all.into()
}

/// The link-local address that a station makes of its MAC address (RFC 4291, appendix A; RFC 2464, 4).
pub fn eui64_link_local(mac: MacAddr) -> Ipv6Addr {
    let mac = mac.as_u64();
    let id = (mac & 0xffff_ff00_0000) << 16 | 0xff_fe00_0000 | mac & 0xff_ffff;
    Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(id ^ 1 << 57))
}

impl SpoofTable {
    /// From valid settings. `seed`: any random number.
    pub fn new(config: &SpoofConfig, seed: u64) -> Self {
        let mut macs = config.macs();
        macs.truncate(MAX_MACS);
        let (mut v4, mut v6) = (BTreeMap::<(u32, u8), u64>::new(), BTreeMap::<(u128, u8), u64>::new());
        let mut add = |mac: MacAddr, address: Cidr| {
            let bit = macs.binary_search(&mac).map_or(0, |i| 1u64 << i);
            match address {
                Cidr::V4(key, len) => *v4.entry((key, len)).or_default() |= bit,
                Cidr::V6(key, len) => *v6.entry((key, len)).or_default() |= bit,
            }
        };
        config.pairs().for_each(|(mac, address)| add(mac, address));
        for mac in &macs {
            match config.ipv6_link_local {
                LinkLocal::Eui64 => add(*mac, Cidr::host(eui64_link_local(*mac).into())),
                LinkLocal::Any => add(*mac, Cidr::V6(0xfe80 << 112, 64)),
                LinkLocal::None => {}
            }
        }
        let (v4_index, v4_parents) = PrefixIndex::build(&v4.keys().copied().collect::<Vec<_>>(), seed);
        let (v6_index, v6_parents) = PrefixIndex::build(&v6.keys().copied().collect::<Vec<_>>(), seed);
        Self {
            enabled: config.enabled,
            macs: macs.into(),
            v4: v4_index,
            v4_allowed: allowed(&v4, &v4_parents),
            v6: v6_index,
            v6_allowed: allowed(&v6, &v6_parents),
            router: config.allow_router_advertisements,
            dhcp: config.allow_dhcp_server,
            dhcpv6: config.allow_dhcpv6_server,
        }
    }

    /// `mac` is one of the port's.
    #[inline]
    pub fn has_mac(&self, mac: MacAddr) -> bool {
        self.mac_bit(mac) != 0
    }

    /// A TCP or UDP packet, DHCP aside, that comes from the VM with this source MAC and source address passes [`Self::check`].
    pub(crate) fn allows_source(&self, mac: MacAddr, address: IpAddr) -> bool {
        let station = match address {
            IpAddr::V4(a) => !is_martian_v4(a) && !a.is_unspecified(),
            IpAddr::V6(a) => !is_martian_v6(a) && !a.is_unspecified(),
        };
        station && self.allows(mac, address)
    }

    /// Anything is checked.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// `address` is one that the VM may use with the MAC address `mac`.
    #[inline]
    pub fn allows(&self, mac: MacAddr, address: IpAddr) -> bool {
        self.mac_bit(mac) & self.macs_of(address) != 0
    }

    /// `address` is one that the VM may use, with whichever of its MAC addresses. Migration accepts flow records by this.
    #[inline]
    pub fn owns(&self, address: IpAddr) -> bool {
        self.macs_of(address) != 0
    }

    #[inline]
    fn mac_bit(&self, mac: MacAddr) -> u64 {
        // Nearly always one.
        self.macs.iter().position(|m| *m == mac).map_or(0, |i| 1 << i)
    }

    #[inline]
    fn macs_of(&self, address: IpAddr) -> u64 {
        let allowed = match address {
            IpAddr::V4(a) => self.v4_allowed.get(self.v4.lookup(a.to_bits(), &mut ()) as usize),
            IpAddr::V6(a) => self.v6_allowed.get(self.v6.lookup(a.to_bits(), &mut ()) as usize),
        };
        // No prefix is position NO_PREFIX, which is never there.
        debug_assert!(NO_PREFIX as usize >= self.v4_allowed.len().max(self.v6_allowed.len()));
        allowed.map_or(0, |a| a.macs)
    }

    /// Checks a frame that came from the VM. `head` is the private copy of the frame's beginning in which `headers` were
    /// found; of neighbour discovery it must have the whole message, or the frame is refused.
    ///
    /// # Errors
    /// The first reason found.
    #[inline]
    pub fn check(&self, head: &[u8], headers: &Headers) -> Result<(), SpoofReason> {
        if !self.enabled {
            return Ok(());
        }
        let mac = self.mac_bit(headers.l2.src_mac);
        if mac == 0 {
            return Err(SpoofReason::SourceMac);
        }
        match headers.l3 {
            L3::Ipv4 { offset } => self.check_ipv4(head, headers, usize::from(offset), mac),
            L3::Ipv6 { offset } => self.check_ipv6(head, headers, usize::from(offset), mac),
            L3::Arp { offset } => self.check_arp(head, usize::from(offset)),
            L3::None if headers.l2.ethertype == EtherType::RARP => self.check_rarp(head, usize::from(headers.l2.len)),
            L3::None => Ok(()),
        }
    }

    #[inline]
    fn check_ipv4(&self, head: &[u8], headers: &Headers, offset: usize, mac: u64) -> Result<(), SpoofReason> {
        let bytes = head.get(offset..).unwrap_or_default();
        let ip = Ipv4::new(bytes).map_err(|_| SpoofReason::SourceIpv4)?;
        let src = ip.src();
        let udp = udp_ports(head, headers);
        if src.is_unspecified() {
            // RFC 2131, 4.1: a client without an address broadcasts.
            let discover = udp == Some((DHCP_CLIENT, DHCP_SERVER)) && ip.dst() == Ipv4Addr::BROADCAST;
            return if discover { Ok(()) } else { Err(SpoofReason::UnspecifiedIpv4) };
        }
        if is_martian_v4(src) {
            return Err(SpoofReason::MartianSource);
        }
        if self.macs_of(src.into()) & mac == 0 {
            return Err(SpoofReason::SourceIpv4);
        }
        if udp == Some((DHCP_SERVER, DHCP_CLIENT)) && !self.dhcp {
            return Err(SpoofReason::DhcpServer);
        }
        Ok(())
    }

    #[inline]
    fn check_ipv6(&self, head: &[u8], headers: &Headers, offset: usize, mac: u64) -> Result<(), SpoofReason> {
        let bytes = head.get(offset..).unwrap_or_default();
        let ip = Ipv6::new(bytes).map_err(|_| SpoofReason::SourceIpv6)?;
        let src = ip.src();
        let unspecified = src.is_unspecified();
        if is_martian_v6(src) {
            return Err(SpoofReason::MartianSource);
        }
        if !unspecified && self.macs_of(src.into()) & mac == 0 {
            return Err(SpoofReason::SourceIpv6);
        }
        if headers.ip_proto == IpProto::ICMPV6
            && let Some(l4) = headers.l4
        {
            let end = headers.l3_end() as usize;
            // The whole message, or as much of it as is at hand.
            let message = head.get(usize::from(l4.offset)..end.min(head.len())).unwrap_or_default();
            let icmp = Icmp::new(message).map_err(|_| SpoofReason::NdMalformed)?;
            if icmp.is_nd() {
                let whole = end <= head.len();
                return self.check_nd(&icmp, &ip, headers.fragment, whole);
            }
            // RFC 3590: before it has an address a node reports with ::.
            if unspecified && !matches!(icmp.kind(), v6::MLD_REPORT | v6::MLD_DONE | v6::MLD2_REPORT) {
                return Err(SpoofReason::UnspecifiedIpv6);
            }
            return Ok(());
        }
        if unspecified {
            return Err(SpoofReason::UnspecifiedIpv6);
        }
        if !self.dhcpv6 && udp_ports(head, headers) == Some((DHCPV6_SERVER, DHCPV6_CLIENT)) {
            return Err(SpoofReason::Dhcpv6Server);
        }
        Ok(())
    }

    /// The source address, unless it is ::, was checked.
    fn check_nd(&self, icmp: &Icmp<'_>, ip: &Ipv6<'_>, fragment: Fragment, whole: bool) -> Result<(), SpoofReason> {
        // RFC 6980: all of neighbour discovery, router advertisements included.
        if fragment != Fragment::None {
            return Err(SpoofReason::NdFragmented);
        }
        if ip.hop_limit() != ND_HOP_LIMIT {
            return Err(SpoofReason::NdHopLimit);
        }
        match icmp.kind() {
            v6::ROUTER_ADVERTISEMENT if !self.router => return Err(SpoofReason::RouterAdvertisement),
            v6::REDIRECT if !self.router => return Err(SpoofReason::Redirect),
            _ => {}
        }
        let message = icmp.nd().ok_or(SpoofReason::NdMalformed)?.map_err(|_| SpoofReason::NdMalformed)?;
        if !whole || icmp.code() != 0 {
            return Err(SpoofReason::NdMalformed);
        }
        let unspecified = ip.src().is_unspecified();
        // Whose link-layer address the message tells.
        let (claimed, option_kind) = match icmp.kind() {
            v6::NEIGHBOUR_ADVERTISEMENT => {
                let target = message.target().ok_or(SpoofReason::NdMalformed)?;
                if unspecified {
                    return Err(SpoofReason::UnspecifiedIpv6);
                }
                if !self.owns(target.into()) {
                    return Err(SpoofReason::NdTarget);
                }
                (target, 2)
            }
            v6::NEIGHBOUR_SOLICITATION if unspecified => {
                // RFC 4861, 7.1.1: to the solicited-node address, without option; only for an address of one's own, since the
                // address's rightful owner would give it up.
                let target = message.target().ok_or(SpoofReason::NdMalformed)?;
                if ip.dst() != solicited_node(target) {
                    return Err(SpoofReason::UnspecifiedIpv6);
                }
                if !self.owns(target.into()) {
                    return Err(SpoofReason::NdTarget);
                }
                (target, 1)
            }
            v6::ROUTER_SOLICITATION | v6::NEIGHBOUR_SOLICITATION => (ip.src(), 1),
            // An allowed router: its own address. A redirect's option (type 2) tells another's.
            _ if unspecified => return Err(SpoofReason::UnspecifiedIpv6),
            _ => (ip.src(), 1),
        };
        for option in message.options() {
            let option = option.map_err(|_| SpoofReason::NdMalformed)?;
            // Redirects may tell others' addresses; in all other messages both kinds are held to the same rule.
            let judged = option.kind == option_kind || (matches!(option.kind, 1 | 2) && icmp.kind() != v6::REDIRECT);
            if !judged {
                continue;
            }
            // RFC 4861, 7.1.1 and 4.1: no source option from the unspecified address.
            if unspecified {
                return Err(SpoofReason::NdLinkLayer);
            }
            let &[a, b, c, d, e, f] = option.data else { return Err(SpoofReason::NdLinkLayer) };
            if !self.allows(MacAddr::new([a, b, c, d, e, f]), claimed.into()) {
                return Err(SpoofReason::NdLinkLayer);
            }
        }
        Ok(())
    }

    fn check_arp(&self, head: &[u8], offset: usize) -> Result<(), SpoofReason> {
        let arp = head.get(offset..).and_then(|b| Arp::new(b).ok()).ok_or(SpoofReason::ArpMalformed)?;
        if !matches!(arp.operation(), Operation::REQUEST | Operation::REPLY) {
            return Err(SpoofReason::ArpMalformed);
        }
        let bit = self.mac_bit(arp.sender_mac());
        if bit == 0 {
            return Err(SpoofReason::ArpSenderMac);
        }
        let sender = arp.sender_ip();
        if sender.is_unspecified() && arp.operation() == Operation::REQUEST {
            // RFC 5227, 2.1.1: a probe. It claims nothing, but makes the address's owner answer, and a newcomer give it up: only
            // for addresses of one's own.
            let own = self.macs_of(arp.target_ip().into()) & bit != 0;
            return if own { Ok(()) } else { Err(SpoofReason::ArpSenderAddress) };
        }
        if self.macs_of(sender.into()) & bit == 0 {
            return Err(SpoofReason::ArpSenderAddress);
        }
        Ok(())
    }

    /// A station asks for its address, or announces itself to switches after a migration.
    fn check_rarp(&self, head: &[u8], offset: usize) -> Result<(), SpoofReason> {
        let arp = head.get(offset..).and_then(|b| Arp::new(b).ok()).ok_or(SpoofReason::ArpMalformed)?;
        if arp.operation() != Operation::REVERSE_REQUEST {
            return Err(SpoofReason::ArpMalformed);
        }
        if self.mac_bit(arp.sender_mac()) == 0 || self.mac_bit(arp.target_mac()) == 0 {
            return Err(SpoofReason::ArpSenderMac);
        }
        Ok(())
    }
}

/// RFC 1122, 3.2.1.3: 0/8, 127/8, class D, class E with broadcast.
#[inline]
fn is_martian_v4(src: Ipv4Addr) -> bool {
    matches!(src.octets(), [0 | 127 | 224.., ..])
}

#[inline]
fn is_martian_v6(src: Ipv6Addr) -> bool {
    src.is_multicast() || src.is_loopback() || src.to_ipv4_mapped().is_some()
}

/// Source and destination port of a UDP packet.
#[inline]
fn udp_ports(head: &[u8], headers: &Headers) -> Option<(u16, u16)> {
    let l4 = headers.l4.filter(|l4| l4.proto == IpProto::UDP)?;
    Some((be16(head, usize::from(l4.offset))?, be16(head, usize::from(l4.offset) + 2)?))
}

/// ff02::1:ffXX:XXXX (RFC 4291, 2.7.1).
fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | target.to_bits() & 0xff_ffff)
}
