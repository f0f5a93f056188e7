//! ICMP (RFC 792), ICMPv6 (RFC 4443) and neighbour discovery (RFC 4861).
use core::net::{IpAddr, Ipv6Addr};

use super::ipv4::Ipv4;
use super::ipv6::Ipv6;
use super::{Fragment, IpProto, MacAddr, ParseError, be16, chunk};

/// Bytes of the header that all messages in use have: type, code, checksum, four bytes by type.
pub const HEADER_BYTES: usize = 8;
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: u16 = 2;

/// ICMP types (RFC 792 and later).
pub mod v4 {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Source quench (deprecated).
    pub const SOURCE_QUENCH: u8 = 4;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
    /// Timestamp request.
    pub const TIMESTAMP_REQUEST: u8 = 13;
    /// Timestamp reply.
    pub const TIMESTAMP_REPLY: u8 = 14;
    /// Code of [`UNREACHABLE`]: fragmentation needed and DF set (path MTU discovery).
    pub const CODE_FRAGMENTATION_NEEDED: u8 = 4;
}

/// ICMPv6 types (RFC 4443, RFC 4861, RFC 3810).
pub mod v6 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Multicast listener query.
    pub const MLD_QUERY: u8 = 130;
    /// Multicast listener report, version 1.
    pub const MLD_REPORT: u8 = 131;
    /// Multicast listener done.
    pub const MLD_DONE: u8 = 132;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;
    /// Multicast listener report, version 2.
    pub const MLD2_REPORT: u8 = 143;
}

/// View of an ICMP or ICMPv6 message, or of as much of it as is at hand (at least 8 bytes).
#[derive(Clone, Copy, Debug)]
pub struct Icmp<'a> {
    header: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Icmp<'a> {
    /// Views `bytes`, which begin with the type field.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk().ok_or(ParseError::IcmpTruncated)?;
        Ok(Self { header, payload })
    }

    /// Type: see [`v4`] and [`v6`].
    #[inline]
    pub fn kind(&self) -> u8 {
        self.header[0]
    }

    /// Code.
    #[inline]
    pub fn code(&self) -> u8 {
        self.header[1]
    }

    /// Checksum field.
    #[inline]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// The four bytes whose meaning depends on the type (identifier and sequence, MTU, pointer, gateway).
    #[inline]
    pub fn rest(&self) -> u32 {
        u32::from_be_bytes([self.header[4], self.header[5], self.header[6], self.header[7]])
    }

    /// Identifier of echo and timestamp messages.
    #[inline]
    pub fn identifier(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    /// Sequence number of echo and timestamp messages.
    #[inline]
    pub fn sequence(&self) -> u16 {
        u16::from_be_bytes([self.header[6], self.header[7]])
    }

    /// What follows the 8 bytes.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Taken as ICMP (IPv4): an error message, which carries the beginning of the packet it is about.
    #[inline]
    pub fn is_v4_error(&self) -> bool {
        matches!(
            self.kind(),
            v4::UNREACHABLE | v4::SOURCE_QUENCH | v4::REDIRECT | v4::TIME_EXCEEDED | v4::PARAMETER_PROBLEM
        )
    }

    /// Taken as ICMPv6: an error message (RFC 4443, 2.1: types below 128).
    #[inline]
    pub fn is_v6_error(&self) -> bool {
        self.kind() < 128
    }

    /// Taken as ICMPv6: a neighbour discovery message (RFC 4861).
    #[inline]
    pub fn is_nd(&self) -> bool {
        matches!(self.kind(), v6::ROUTER_SOLICITATION..=v6::REDIRECT)
    }

    /// The packet an ICMP error is about; `None` when it is no error.
    #[inline]
    pub fn inner_v4(&self) -> Option<Result<InnerPacket<'a>, ParseError>> {
        self.is_v4_error().then(|| InnerPacket::v4(self.payload))
    }

    /// The packet an ICMPv6 error is about; `None` when it is no error.
    #[inline]
    pub fn inner_v6(&self) -> Option<Result<InnerPacket<'a>, ParseError>> {
        self.is_v6_error().then(|| InnerPacket::v6(self.payload))
    }

    /// The neighbour discovery message; `None` when it is none (or no ICMPv6).
    #[inline]
    pub fn nd(&self) -> Option<Result<NdMessage<'a>, ParseError>> {
        self.is_nd().then(|| NdMessage::new(*self))
    }
}

/// The beginning of a packet inside an ICMP error: usually the IP header and at least 8 bytes.
#[derive(Clone, Copy, Debug)]
pub struct InnerPacket<'a> {
    /// Source address (the one that the error is sent to).
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Upper protocol.
    pub proto: IpProto,
    /// Whether it was a fragment; only a [`Fragment::Later`] has no upper header.
    pub fragment: Fragment,
    /// The upper protocol's bytes, as many as were sent along.
    pub l4: &'a [u8],
}

impl<'a> InnerPacket<'a> {
    fn v4(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let ip = Ipv4::new(bytes)?;
        let fragment = match (ip.fragment_offset(), ip.more_fragments()) {
            (0, false) => Fragment::None,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self { src: ip.src().into(), dst: ip.dst().into(), proto: ip.proto(), fragment, l4: ip.payload() })
    }

    fn v6(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let ip = Ipv6::new(bytes)?;
        let upper = ip.walk()?;
        Ok(Self {
            src: ip.src().into(),
            dst: ip.dst().into(),
            proto: upper.proto,
            fragment: upper.fragment.map_or(Fragment::None, |f| f.kind()),
            l4: ip
                .payload()
                .get((upper.offset as usize).saturating_sub(super::ipv6::HEADER_BYTES)..)
                .unwrap_or_default(),
        })
    }

    /// Source and destination port, for protocols with ports in their first four bytes.
    #[inline]
    pub fn ports(&self) -> Option<(u16, u16)> {
        if self.fragment == Fragment::Later || !self.proto.has_ports() {
            return None;
        }
        Some((be16(self.l4, 0)?, be16(self.l4, 2)?))
    }
}

/// View of a neighbour discovery message (RFC 4861, 4), wholly at hand up to its options.
#[derive(Clone, Copy, Debug)]
pub struct NdMessage<'a> {
    kind: u8,
    rest: u32,
    fixed: &'a [u8],
    options: &'a [u8],
}

impl<'a> NdMessage<'a> {
    fn new(icmp: Icmp<'a>) -> Result<Self, ParseError> {
        // Bytes of the fixed part that follow the 8 of the header.
        let fixed_len = match icmp.kind() {
            v6::ROUTER_SOLICITATION => 0,
            v6::ROUTER_ADVERTISEMENT => 8,
            v6::REDIRECT => 32,
            _ => 16,
        };
        let (fixed, options) = icmp.payload.split_at_checked(fixed_len).ok_or(ParseError::NdMalformed)?;
        Ok(Self { kind: icmp.kind(), rest: icmp.rest(), fixed, options })
    }

    /// Message type: one of [`v6`]'s 133 to 137.
    #[inline]
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// Target address of a neighbour solicitation, advertisement or redirect.
    #[inline]
    pub fn target(&self) -> Option<Ipv6Addr> {
        if self.kind < v6::NEIGHBOUR_SOLICITATION {
            return None;
        }
        chunk::<16>(self.fixed, 0).map(|b| Ipv6Addr::from(*b))
    }

    /// Neighbour advertisement: the sender is a router (R).
    #[inline]
    pub fn is_router(&self) -> bool {
        self.kind == v6::NEIGHBOUR_ADVERTISEMENT && self.rest & 0x8000_0000 != 0
    }

    /// Neighbour advertisement: solicited (S).
    #[inline]
    pub fn is_solicited(&self) -> bool {
        self.kind == v6::NEIGHBOUR_ADVERTISEMENT && self.rest & 0x4000_0000 != 0
    }

    /// Neighbour advertisement: overrides a cached address (O).
    #[inline]
    pub fn is_override(&self) -> bool {
        self.kind == v6::NEIGHBOUR_ADVERTISEMENT && self.rest & 0x2000_0000 != 0
    }

    /// The options.
    #[inline]
    pub fn options(&self) -> NdOptions<'a> {
        NdOptions(self.options)
    }

    /// The source (type 1) or target (type 2) link-layer address option, Ethernet form. The first one counts.
    pub fn link_layer_address(&self) -> Option<MacAddr> {
        self.options().map_while(Result::ok).find_map(|o| match (o.kind, o.data) {
            (1 | 2, &[a, b, c, d, e, f]) => Some(MacAddr::new([a, b, c, d, e, f])),
            _ => None,
        })
    }
}

/// One neighbour discovery option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NdOption<'a> {
    /// Option type: 1 source link-layer address, 2 target link-layer address, 3 prefix, 4 redirected header, 5 MTU.
    pub kind: u8,
    /// Data after type and length.
    pub data: &'a [u8],
}

/// Iterator over neighbour discovery options. Ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct NdOptions<'a>(&'a [u8]);

impl<'a> Iterator for NdOptions<'a> {
    type Item = Result<NdOption<'a>, ParseError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let parsed = self.0.split_first_chunk::<2>().and_then(|(&[kind, units], rest)| {
            // In units of 8 bytes, type and length included; 0 is invalid (RFC 4861, 4.6).
            let (data, rest) = rest.split_at_checked((usize::from(units) * 8).checked_sub(2)?)?;
            self.0 = rest;
            Some(NdOption { kind, data })
        });
        if parsed.is_none() {
            self.0 = &[];
        }
        Some(parsed.ok_or(ParseError::NdMalformed))
    }
}

/// An ICMP or ICMPv6 header as a value; the checksum is written as 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpHeader {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// The four bytes by type.
    pub rest: u32,
}

impl From<Icmp<'_>> for IcmpHeader {
    fn from(view: Icmp<'_>) -> Self {
        Self { kind: view.kind(), code: view.code(), rest: view.rest() }
    }
}

impl IcmpHeader {
    /// The header's bytes, checksum 0.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = self.rest.to_be_bytes();
        [self.kind, self.code, 0, 0, a, b, c, d]
    }
}
