//! One pass over a frame's private header copy: which headers are there, and where.
use core::fmt;

use super::ethernet::HEADER_BYTES as ETHERNET_BYTES;
use super::ipv4::MORE_FRAGMENTS;
use super::vlan::{TAG_BYTES, Tci, Tpid, VlanTag};
use super::{EtherType, MacAddr, ParseError, arp, chunk, icmp, ipv4, ipv6, sctp, tcp, udp};

/// An IP protocol number, or an IPv6 next-header value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct IpProto(pub u8);

impl IpProto {
    /// IPv6 hop-by-hop options (RFC 8200, 4.3).
    pub const HOP_BY_HOP: Self = Self(0);
    /// ICMP.
    pub const ICMP: Self = Self(1);
    /// IGMP.
    pub const IGMP: Self = Self(2);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// DCCP.
    pub const DCCP: Self = Self(33);
    /// IPv6 routing header (RFC 8200, 4.4).
    pub const ROUTING: Self = Self(43);
    /// IPv6 fragment header (RFC 8200, 4.5).
    pub const FRAGMENT: Self = Self(44);
    /// GRE.
    pub const GRE: Self = Self(47);
    /// ESP.
    pub const ESP: Self = Self(50);
    /// Authentication header (RFC 4302).
    pub const AUTHENTICATION: Self = Self(51);
    /// ICMPv6.
    pub const ICMPV6: Self = Self(58);
    /// IPv6: nothing follows (RFC 8200, 4.7).
    pub const NO_NEXT_HEADER: Self = Self(59);
    /// IPv6 destination options (RFC 8200, 4.6).
    pub const DESTINATION_OPTIONS: Self = Self(60);
    /// SCTP.
    pub const SCTP: Self = Self(132);
    /// Mobility header (RFC 6275).
    pub const MOBILITY: Self = Self(135);
    /// UDP-Lite.
    pub const UDP_LITE: Self = Self(136);
    /// Host identity protocol (RFC 7401).
    pub const HIP: Self = Self(139);
    /// Shim6 (RFC 5533).
    pub const SHIM6: Self = Self(140);

    /// An IPv6 extension header that is walked over (RFC 7045, 1.1; ESP hides what follows and ends the walk).
    #[inline(always)]
    pub const fn is_extension(self) -> bool {
        matches!(
            self,
            Self::HOP_BY_HOP
                | Self::ROUTING
                | Self::FRAGMENT
                | Self::AUTHENTICATION
                | Self::DESTINATION_OPTIONS
                | Self::MOBILITY
                | Self::HIP
                | Self::SHIM6
        )
    }

    /// The header begins with source and destination port, 16 bits each.
    #[inline(always)]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP | Self::DCCP | Self::UDP_LITE)
    }
}

impl fmt::Debug for IpProto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a plain switch needs of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2 {
    /// Destination address.
    pub dst_mac: MacAddr,
    /// Source address.
    pub src_mac: MacAddr,
    /// Outer tag.
    pub vlan: Option<VlanTag>,
    /// Second tag. Further tags are not looked into: [`Self::ethertype`] is then a TPID.
    pub inner_vlan: Option<VlanTag>,
    /// EtherType after the tags (a length when below 0x0600).
    pub ethertype: EtherType,
    /// Bytes up to the network header: 14, 18 or 22.
    pub len: u16,
}

/// Network layer: kind, and offset from the frame's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L3 {
    /// Something else.
    None,
    /// ARP for IPv4 over Ethernet.
    Arp {
        /// Offset of the ARP packet, bytes.
        offset: u16,
    },
    /// IPv4.
    Ipv4 {
        /// Offset of the IPv4 header, bytes.
        offset: u16,
    },
    /// IPv6.
    Ipv6 {
        /// Offset of the IPv6 header, bytes.
        offset: u16,
    },
}

/// Transport layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L4 {
    /// Protocol.
    pub proto: IpProto,
    /// Offset of its header from the frame's start, bytes.
    pub offset: u16,
    /// Length of its header, bytes: checked to lie inside packet and snapshot for TCP (with options), UDP, ICMP, ICMPv6 and
    /// SCTP; 0 for protocols that are not looked into.
    pub header_len: u16,
}

impl L4 {
    /// Where the payload begins, bytes from the frame's start.
    #[inline(always)]
    pub fn payload_offset(&self) -> u32 {
        u32::from(self.offset) + u32::from(self.header_len)
    }
}

/// Whether a packet is whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// A whole packet (or an atomic fragment, RFC 6946).
    #[default]
    None,
    /// The first fragment: has the transport header.
    First,
    /// A later fragment: has none.
    Later,
}

/// Which headers a frame has, and where. Offsets are bytes from the frame's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Addresses, tags and EtherType.
    pub l2: L2,
    /// Network layer.
    pub l3: L3,
    /// Transport layer; `None` without IP and in later fragments.
    pub l4: Option<L4>,
    /// Whether the packet is whole.
    pub fragment: Fragment,
    /// Upper protocol; also known in later fragments. 0 without IP.
    pub ip_proto: IpProto,
    /// Offset of the IPv6 fragment header; 0 when there is none.
    pub fragment_header: u16,
    /// Length of the IP packet (or 28 for ARP) as its header says, bytes; inside the frame. What follows is padding. 0 for [`L3::None`].
    pub l3_total_len: u32,
}

impl Headers {
    /// Offset of the network header, when there is one.
    #[inline]
    pub fn l3_offset(&self) -> Option<u16> {
        match self.l3 {
            L3::None => None,
            L3::Arp { offset } | L3::Ipv4 { offset } | L3::Ipv6 { offset } => Some(offset),
        }
    }

    /// End of the network packet: padding follows.
    #[inline]
    pub fn l3_end(&self) -> u32 {
        u32::from(self.l2.len) + self.l3_total_len
    }
}

#[inline(always)]
fn clip(snapshot: &[u8], frame_len: u32) -> &[u8] {
    snapshot.get(..frame_len as usize).unwrap_or(snapshot)
}

/// Addresses, tags and EtherType of the frame of `frame_len` bytes that begins with `snapshot`.
///
/// # Errors
/// [`ParseError::NeedMore`], [`ParseError::FrameTooShort`], [`ParseError::VlanTruncated`].
#[inline]
pub fn parse_l2(snapshot: &[u8], frame_len: u32) -> Result<L2, ParseError> {
    l2(clip(snapshot, frame_len), frame_len as usize)
}

#[inline(always)]
fn l2(bytes: &[u8], frame_len: usize) -> Result<L2, ParseError> {
    let Some(h) = bytes.first_chunk::<ETHERNET_BYTES>() else {
        return Err(ParseError::short(ETHERNET_BYTES, frame_len, ParseError::FrameTooShort));
    };
    let l2 = L2 {
        dst_mac: MacAddr::new([h[0], h[1], h[2], h[3], h[4], h[5]]),
        src_mac: MacAddr::new([h[6], h[7], h[8], h[9], h[10], h[11]]),
        vlan: None,
        inner_vlan: None,
        ethertype: EtherType(u16::from_be_bytes([h[12], h[13]])),
        len: ETHERNET_BYTES as u16,
    };
    match Tpid::from_ethertype(l2.ethertype) {
        None => Ok(l2),
        Some(tpid) => tagged(bytes, frame_len, l2, tpid),
    }
}

#[inline]
fn tagged(bytes: &[u8], frame_len: usize, mut l2: L2, tpid: Tpid) -> Result<L2, ParseError> {
    let (tag, ethertype) = tag_at(bytes, frame_len, ETHERNET_BYTES, tpid)?;
    l2.vlan = Some(tag);
    l2.ethertype = ethertype;
    l2.len = (ETHERNET_BYTES + TAG_BYTES) as u16;
    if let Some(tpid) = Tpid::from_ethertype(ethertype) {
        let (tag, ethertype) = tag_at(bytes, frame_len, ETHERNET_BYTES + TAG_BYTES, tpid)?;
        l2.inner_vlan = Some(tag);
        l2.ethertype = ethertype;
        l2.len = (ETHERNET_BYTES + 2 * TAG_BYTES) as u16;
    }
    Ok(l2)
}

#[inline(always)]
fn tag_at(bytes: &[u8], frame_len: usize, at: usize, tpid: Tpid) -> Result<(VlanTag, EtherType), ParseError> {
    let Some(&[a, b, c, d]) = chunk::<TAG_BYTES>(bytes, at) else {
        return Err(ParseError::short(at + TAG_BYTES, frame_len, ParseError::VlanTruncated));
    };
    Ok((VlanTag { tpid, tci: Tci(u16::from_be_bytes([a, b])) }, EtherType(u16::from_be_bytes([c, d]))))
}

/// Finds all headers of the frame of `frame_len` bytes that begins with `snapshot`, in one pass.
///
/// On success every header, the transport header with its options included, lies inside `snapshot`; lengths are
/// consistent with each other and with `frame_len`. Checksums and option contents are not looked at.
///
/// # Errors
/// [`ParseError::NeedMore`] when the headers may reach beyond the snapshot: enlarge it and call again (give up when
/// `bytes` is more than a snapshot holds). Any other value: malformed, for the reason given.
#[inline]
pub fn parse(snapshot: &[u8], frame_len: u32) -> Result<Headers, ParseError> {
    let bytes = clip(snapshot, frame_len);
    let frame_len = frame_len as usize;
    let l2 = l2(bytes, frame_len)?;
    match l2.ethertype {
        EtherType::IPV4 => parse_ipv4(bytes, frame_len, l2),
        EtherType::IPV6 => parse_ipv6(bytes, frame_len, l2),
        EtherType::ARP => parse_arp(bytes, frame_len, l2),
        _ => Ok(Headers {
            l2,
            l3: L3::None,
            l4: None,
            fragment: Fragment::None,
            ip_proto: IpProto(0),
            fragment_header: 0,
            l3_total_len: 0,
        }),
    }
}

#[inline]
fn parse_arp(bytes: &[u8], frame_len: usize, l2: L2) -> Result<Headers, ParseError> {
    let offset = usize::from(l2.len);
    let Some(packet) = chunk::<{ arp::PACKET_BYTES }>(bytes, offset) else {
        return Err(ParseError::short(offset + arp::PACKET_BYTES, frame_len, ParseError::ArpTruncated));
    };
    arp::Arp::new(packet)?;
    Ok(Headers {
        l2,
        l3: L3::Arp { offset: l2.len },
        l4: None,
        fragment: Fragment::None,
        ip_proto: IpProto(0),
        fragment_header: 0,
        l3_total_len: arp::PACKET_BYTES as u32,
    })
}

#[inline(always)]
fn parse_ipv4(bytes: &[u8], frame_len: usize, l2: L2) -> Result<Headers, ParseError> {
    let offset = usize::from(l2.len);
    let Some(h) = chunk::<{ ipv4::HEADER_BYTES }>(bytes, offset) else {
        return Err(ParseError::short(offset + ipv4::HEADER_BYTES, frame_len, ParseError::Ipv4Truncated));
    };
    // The common case (version 4, no options) needs one comparison.
    let header_len = if h[0] == 0x45 {
        ipv4::HEADER_BYTES
    } else if h[0] >> 4 != 4 {
        return Err(ParseError::Ipv4Version);
    } else {
        usize::from(h[0] & 0xf) * 4
    };
    if header_len < ipv4::HEADER_BYTES {
        return Err(ParseError::Ipv4HeaderLength);
    }
    let total_len = usize::from(u16::from_be_bytes([h[2], h[3]]));
    let end = offset + total_len;
    if total_len < header_len || end > frame_len {
        return Err(ParseError::Ipv4TotalLength);
    }
    let proto = IpProto(h[9]);
    let field = u16::from_be_bytes([h[6], h[7]]);
    let mut fragment = Fragment::None;
    if field & (MORE_FRAGMENTS | 0x1fff) != 0 {
        let data_offset = usize::from(field & 0x1fff) * 8;
        fragment = classify_fragment(proto, data_offset, total_len - header_len, header_len)?;
    }
    let l4 = parse_l4(bytes, proto, offset + header_len, end, fragment)?;
    Ok(Headers {
        l2,
        l3: L3::Ipv4 { offset: l2.len },
        l4,
        fragment,
        ip_proto: proto,
        fragment_header: 0,
        l3_total_len: total_len as u32,
    })
}

#[inline(always)]
fn parse_ipv6(bytes: &[u8], frame_len: usize, l2: L2) -> Result<Headers, ParseError> {
    let offset = usize::from(l2.len);
    let Some(h) = chunk::<{ ipv6::HEADER_BYTES }>(bytes, offset) else {
        return Err(ParseError::short(offset + ipv6::HEADER_BYTES, frame_len, ParseError::Ipv6Truncated));
    };
    if h[0] >> 4 != 6 {
        return Err(ParseError::Ipv6Version);
    }
    let total_len = ipv6::HEADER_BYTES + usize::from(u16::from_be_bytes([h[4], h[5]]));
    let end = offset + total_len;
    if end > frame_len {
        return Err(ParseError::Ipv6PayloadLength);
    }
    let upper = ipv6::walk(bytes, offset + ipv6::HEADER_BYTES, end, IpProto(h[6]))?;
    let mut fragment = Fragment::None;
    let mut fragment_header = 0;
    if let Some(f) = upper.fragment {
        fragment_header = f.header_offset as u16;
        if f.kind() != Fragment::None {
            let data_len = end.saturating_sub(upper.offset as usize);
            fragment = classify_fragment(upper.proto, f.data_offset as usize, data_len, 0)?;
        }
    }
    let l4 = parse_l4(bytes, upper.proto, upper.offset as usize, end, fragment)?;
    Ok(Headers {
        l2,
        l3: L3::Ipv6 { offset: l2.len },
        l4,
        fragment,
        ip_proto: upper.proto,
        fragment_header,
        l3_total_len: total_len as u32,
    })
}

/// First or later, and refuses what only attackers send.
#[cold]
fn classify_fragment(
    proto: IpProto,
    data_offset: usize,
    data_len: usize,
    header_len: usize,
) -> Result<Fragment, ParseError> {
    if data_offset == 0 {
        return Ok(Fragment::First);
    }
    if header_len + data_offset + data_len > 65_535 {
        return Err(ParseError::FragmentOffset);
    }
    // First fragments have the whole TCP header (checked below), so none that is honest begins inside it.
    if proto == IpProto::TCP && data_offset < tcp::HEADER_BYTES {
        return Err(ParseError::FragmentOverlap);
    }
    Ok(Fragment::Later)
}

/// Options or extension headers in front of `offset` are wholly at hand.
#[inline(always)]
fn within(bytes: &[u8], offset: usize) -> Result<(), ParseError> {
    if offset > bytes.len() { Err(ParseError::NeedMore { bytes: offset as u32 }) } else { Ok(()) }
}

/// The transport header at `offset` of a packet that reaches to `end`.
#[inline(always)]
fn parse_l4(
    bytes: &[u8],
    proto: IpProto,
    offset: usize,
    end: usize,
    fragment: Fragment,
) -> Result<Option<L4>, ParseError> {
    if fragment == Fragment::Later {
        return within(bytes, offset).map(|()| None);
    }
    let (least, truncated) = match proto {
        IpProto::TCP => (tcp::HEADER_BYTES, ParseError::TcpTruncated),
        IpProto::UDP => (udp::HEADER_BYTES, ParseError::UdpTruncated),
        IpProto::ICMP | IpProto::ICMPV6 => (icmp::HEADER_BYTES, ParseError::IcmpTruncated),
        IpProto::SCTP => (sctp::HEADER_BYTES, ParseError::SctpTruncated),
        _ => return within(bytes, offset).map(|()| Some(L4 { proto, offset: offset as u16, header_len: 0 })),
    };
    let reach = offset + least;
    if reach > end || reach > bytes.len() {
        return Err(ParseError::short(reach, end, truncated));
    }
    let mut header_len = least;
    if proto == IpProto::TCP {
        header_len = chunk::<{ tcp::HEADER_BYTES }>(bytes, offset).map_or(0, |h| usize::from(h[12] >> 4) * 4);
        let reach = offset + header_len;
        if header_len < tcp::HEADER_BYTES || reach > end {
            return Err(ParseError::TcpDataOffset);
        }
        if reach > bytes.len() {
            return Err(ParseError::NeedMore { bytes: reach as u32 });
        }
    } else if proto == IpProto::UDP {
        let len =
            chunk::<{ udp::HEADER_BYTES }>(bytes, offset).map_or(0, |h| usize::from(u16::from_be_bytes([h[4], h[5]])));
        // A first fragment's length field counts all fragments.
        if len < udp::HEADER_BYTES || (len > end - offset && fragment == Fragment::None) {
            return Err(ParseError::UdpLength);
        }
    }
    Ok(Some(L4 { proto, offset: offset as u16, header_len: header_len as u16 }))
}
