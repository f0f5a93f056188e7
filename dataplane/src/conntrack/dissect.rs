//! From bytes to the facts that tracking needs.
//!
//! Stricter than a router, as strict as Linux's bridge filter: an IP header that is broken (version, lengths, checksum) is refused
//! outright; a transport header that is broken, or whose checksum is wrong, makes the packet invalid.
use core::net::IpAddr;

use arrayvec::ArrayVec;

use super::key::{Flow, Key, Toward};
use super::{Invalid, icmp, sctp, tcp};
use crate::frame::Body;
use crate::offload::checksum::{Crc32c, Sum, pseudo_v4, pseudo_v6};
use crate::packet::icmp::v6;
use crate::packet::ipv4::{self, Ipv4};
use crate::packet::ipv6::{self, Ipv6};
use crate::packet::sctp::ChunkType;
use crate::packet::tcp::Flags;
use crate::packet::{EtherType, IpProto, ParseError, be16, chunk, parse_l2};

/// Whether the transport checksum must be verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Verify it.
    Verify,
    /// Someone trusted vouches for it, or it is yet to be computed (virtio NEEDS_CSUM or DATA_VALID, a NIC's verdict).
    Vouched,
}

/// A frame to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Private copy of the frame's beginning, at least its headers.
    pub head: &'a [u8],
    /// What follows `head`.
    pub body: Body<'a>,
    /// Where the frame goes.
    pub toward: Toward,
    /// What is known of its transport checksum.
    pub checksum: Checksum,
    /// The zone its connection is in; `None`: the frame's VLAN identifier.
    pub zone: Option<u16>,
}

impl<'a> Packet<'a> {
    /// A frame that lies in private memory as a whole.
    #[inline]
    pub fn whole(frame: &'a [u8], toward: Toward, checksum: Checksum) -> Self {
        Self { head: frame, body: Body::EMPTY, toward, checksum, zone: None }
    }

    /// Length of the frame, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a length field, not a collection")]
    #[inline]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len() as usize
    }

    /// `N` bytes at `at`, wherever they lie.
    #[inline]
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        if let Some(bytes) = chunk::<N>(self.head, at) {
            return Some(*bytes);
        }
        let mut out = [0; N];
        let in_head = self.head.get(at..).unwrap_or_default();
        let (first, second) = out.split_at_mut_checked(in_head.len())?;
        first.copy_from_slice(in_head);
        let skip = at.saturating_sub(self.head.len());
        let n = self.body.slice(skip as u32, second.len() as u32).read(second);
        (n == second.len()).then_some(out)
    }

    /// The part of `at..at + len` that lies in the head, and the rest.
    #[inline]
    fn range(&self, at: usize, len: usize) -> (&'a [u8], Body<'a>) {
        let from_at = self.head.get(at..).unwrap_or_default();
        let in_head = from_at.get(..len).unwrap_or(from_at);
        let skip = at.saturating_sub(self.head.len());
        (in_head, self.body.slice(skip as u32, (len - in_head.len()) as u32))
    }
}

/// What makes a packet no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Malformed {
    /// Ethernet or VLAN header cut short.
    #[error("link header malformed")]
    Link,
    /// IP header cut short, of the wrong version, or with lengths that contradict the frame's.
    #[error("IP header malformed")]
    Header,
    /// IPv4 header checksum wrong.
    #[error("IPv4 header checksum wrong")]
    HeaderChecksum,
    /// IPv6 hop-by-hop options malformed, or a jumbogram.
    #[error("IPv6 hop-by-hop options malformed")]
    HopByHop,
    /// A fragment that cannot be part of any datagram.
    #[error("fragment malformed")]
    Fragment,
}

/// Why there are no facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Headers reach beyond [`Packet::head`]: call again with at least this many bytes in it, or drop.
    #[error("header copy too short: {bytes} bytes needed")]
    NeedMore {
        /// Bytes from the frame's start.
        bytes: u32,
    },
    /// Not a packet.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A packet whose transport layer is broken.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// What a frame is.
#[derive(Clone, Debug)]
pub enum Dissected<'a> {
    /// Not IP (ARP, LLDP, more than two VLAN tags ...): not for connection tracking.
    NotIp(EtherType),
    /// IPv6 neighbour or listener discovery.
    Untracked(Flow),
    /// A packet of a connection, or one that opens one.
    Flow(Facts<'a>),
    /// An ICMP error.
    Error(IcmpError),
    /// A piece of a packet.
    Fragment(FragmentFacts),
}

/// A whole packet that can belong to a connection.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Addresses, ports, direction.
    pub flow: Flow,
    /// What its protocol's rules look at.
    pub transport: Transport<'a>,
    /// Length of the IP packet, bytes.
    pub ip_len: u32,
}

/// What a protocol's rules look at.
#[derive(Clone, Debug)]
pub enum Transport<'a> {
    /// TCP.
    Tcp(Segment<'a>),
    /// UDP.
    Udp,
    /// UDP-Lite.
    UdpLite,
    /// ICMP or ICMPv6 question or answer.
    Icmp {
        /// The question rather than the answer.
        question: bool,
    },
    /// SCTP.
    Sctp(SctpPacket),
    /// GRE.
    Gre,
    /// Anything else.
    Other,
}

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, whether or not ACK is set.
    pub ack: u32,
    /// Flags.
    pub flags: Flags,
    /// Window, not scaled.
    pub window: u16,
    /// Payload bytes.
    pub payload_len: u32,
    /// Options.
    pub options: &'a [u8],
}

impl Segment<'_> {
    /// The sequence number that follows the segment: SYN and FIN count as a byte each.
    #[inline]
    pub fn end(&self) -> u32 {
        let flags = u32::from(self.flags.contains(Flags::SYN)) + u32::from(self.flags.contains(Flags::FIN));
        self.seq.wrapping_add(self.payload_len).wrapping_add(flags)
    }
}

/// Chunks in one packet that are looked at.
const SCTP_CHUNKS: usize = 512;
/// Chunks with influence on the state in one packet; honest packets have one to three.
const SCTP_CONTROL_CHUNKS: usize = 32;

/// An SCTP packet.
#[derive(Clone, Debug)]
pub struct SctpPacket {
    /// Verification tag.
    pub tag: u32,
    /// Chunks that can move the state, with their flags.
    pub chunks: ArrayVec<(ChunkType, u8), SCTP_CONTROL_CHUNKS>,
    /// The tag that INIT or INIT ACK announces.
    pub init_tag: Option<u32>,
    /// A DATA chunk is there.
    pub has_data: bool,
    /// Chunks are there that cannot move the state (DATA included).
    pub has_others: bool,
    /// The last chunk is such a one.
    pub last_is_other: bool,
}

impl SctpPacket {
    /// A chunk of this type (one that can move the state) is there.
    #[inline]
    pub fn has(&self, kind: ChunkType) -> bool {
        self.chunks.iter().any(|(c, _)| *c == kind)
    }
}

/// An ICMP error and the packet it is about.
#[derive(Clone, Copy, Debug)]
pub struct IcmpError {
    /// The error message itself.
    pub flow: Flow,
    /// Key of the connection whose packet caused it.
    pub about: Key,
}

/// A piece of a packet.
#[derive(Clone, Copy, Debug)]
pub struct FragmentFacts {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// VLAN identifier.
    pub zone: u16,
    /// Identification.
    pub identification: u32,
    /// IPv4: upper protocol, which tells datagrams apart; IPv6: 0.
    pub proto: u8,
    /// Where its data belongs in the datagram's payload, bytes.
    pub offset: u32,
    /// Length of its data, bytes.
    pub data_len: u32,
    /// More fragments follow.
    pub more: bool,
    /// Where the network header begins, bytes from the frame's start.
    pub l3_offset: u16,
    /// Where its data begins, bytes from the frame's start.
    pub data_offset: u16,
    /// IPv6: where the octet is that announces the fragment header, bytes from the frame's start.
    pub announced_at: u16,
}

/// Finds what tracking needs to know about a frame. `verify_checksum`: transport checksums are verified at all.
///
/// # Errors
/// See [`Refusal`].
#[inline]
pub fn dissect<'a>(packet: &Packet<'a>, verify_checksum: bool) -> Result<Dissected<'a>, Refusal> {
    let l2 = parse_l2(packet.head, packet.len() as u32).map_err(|e| match e {
        ParseError::NeedMore { bytes } => Refusal::NeedMore { bytes },
        _ => Refusal::Malformed(Malformed::Link),
    })?;
    let zone = packet.zone.unwrap_or_else(|| l2.vlan.map_or(0, |tag| tag.tci.vid().get()));
    let verify = verify_checksum && packet.checksum == Checksum::Verify;
    match l2.ethertype {
        EtherType::IPV4 => dissect_v4(packet, usize::from(l2.len), zone, verify),
        EtherType::IPV6 => dissect_v6(packet, usize::from(l2.len), zone, verify),
        other => Ok(Dissected::NotIp(other)),
    }
}

/// `N` bytes of headers at `at`, which must lie in the head.
#[inline]
fn header<'a, const N: usize>(packet: &Packet<'a>, at: usize, missing: Refusal) -> Result<&'a [u8; N], Refusal> {
    match chunk::<N>(packet.head, at) {
        Some(bytes) => Ok(bytes),
        None if at + N <= packet.len() => Err(Refusal::NeedMore { bytes: (at + N) as u32 }),
        None => Err(missing),
    }
}

const BAD_HEADER: Refusal = Refusal::Malformed(Malformed::Header);
const BAD_TRANSPORT: Refusal = Refusal::Invalid(Invalid::Header);

/// One IP packet, its transport part found.
struct Ip {
    src: IpAddr,
    dst: IpAddr,
    zone: u16,
    proto: IpProto,
    /// Where the transport header begins, bytes from the frame's start.
    at: usize,
    /// Where the packet ends.
    end: usize,
    ip_len: u32,
    /// IPv6 redirects are only believed from a neighbour (RFC 4861, 8.1).
    hop_limit: u8,
    verify: bool,
}

fn dissect_v4<'a>(packet: &Packet<'a>, l3: usize, zone: u16, verify: bool) -> Result<Dissected<'a>, Refusal> {
    let h = header::<{ ipv4::HEADER_BYTES }>(packet, l3, BAD_HEADER)?;
    let header_len = usize::from(h[0] & 0xf) * 4;
    if packet.head.len() < l3 + header_len && l3 + header_len <= packet.len() {
        return Err(Refusal::NeedMore { bytes: (l3 + header_len) as u32 });
    }
    let view = Ipv4::new(packet.head.get(l3..).unwrap_or_default()).map_err(|_| BAD_HEADER)?;
    let end = l3 + usize::from(view.total_len());
    if end > packet.len() {
        return Err(BAD_HEADER);
    }
    if !view.checksum_ok() {
        return Err(Malformed::HeaderChecksum.into());
    }
    let at = l3 + header_len;
    let (src, dst) = (IpAddr::V4(view.src()), IpAddr::V4(view.dst()));
    if view.is_fragment() {
        return Ok(Dissected::Fragment(FragmentFacts {
            src,
            dst,
            zone,
            identification: u32::from(view.identification()),
            proto: view.proto().0,
            offset: view.fragment_offset(),
            data_len: (end - at) as u32,
            more: view.more_fragments(),
            l3_offset: l3 as u16,
            data_offset: at as u16,
            announced_at: 0,
        }));
    }
    let ip_len = u32::from(view.total_len());
    transport(packet, &Ip { src, dst, zone, proto: view.proto(), at, end, ip_len, hop_limit: 0, verify })
}

fn dissect_v6<'a>(packet: &Packet<'a>, l3: usize, zone: u16, verify: bool) -> Result<Dissected<'a>, Refusal> {
    let fixed = header::<{ ipv6::HEADER_BYTES }>(packet, l3, BAD_HEADER)?;
    let view = Ipv6::new(fixed).map_err(|_| BAD_HEADER)?;
    let start = l3 + ipv6::HEADER_BYTES;
    let end = start + usize::from(view.payload_len());
    let next_header = view.next_header();
    if next_header == IpProto::HOP_BY_HOP {
        hop_by_hop(packet, start)?;
    }
    if end > packet.len() {
        return Err(BAD_HEADER);
    }
    let (src, dst) = (IpAddr::V6(view.src()), IpAddr::V6(view.dst()));
    let upper = walk(packet, start, end, next_header, l3 + 6)?;
    if let Some(f) = upper.fragment {
        return Ok(Dissected::Fragment(FragmentFacts {
            src,
            dst,
            zone,
            identification: f.identification,
            proto: 0,
            offset: f.offset,
            data_len: (end - f.data_offset) as u32,
            more: f.more,
            l3_offset: l3 as u16,
            data_offset: f.data_offset as u16,
            announced_at: f.announced_at as u16,
        }));
    }
    let ip_len = (end - l3) as u32;
    let hop_limit = view.hop_limit();
    transport(packet, &Ip { src, dst, zone, proto: upper.proto, at: upper.at, end, ip_len, hop_limit, verify })
}

/// Hop-by-hop options must be well-formed; a jumbo payload option (RFC 2675) is refused.
#[cold]
fn hop_by_hop(packet: &Packet<'_>, start: usize) -> Result<(), Refusal> {
    const BAD: Refusal = Refusal::Malformed(Malformed::HopByHop);
    let h = header::<8>(packet, start, BAD)?;
    let end = start + (usize::from(h[1]) + 1) * 8;
    if end > packet.len() {
        return Err(BAD);
    }
    let mut options = packet.head.get(start + 2..end).ok_or(Refusal::NeedMore { bytes: end as u32 })?;
    while let Some((&kind, rest)) = options.split_first() {
        if kind == 0 {
            options = rest;
            continue;
        }
        let (&len, rest) = rest.split_first().ok_or(BAD)?;
        let (_, rest) = rest.split_at_checked(usize::from(len)).ok_or(BAD)?;
        if kind == 0xc2 {
            return Err(BAD);
        }
        options = rest;
    }
    Ok(())
}

/// Where IPv6's extension headers lead to.
struct Upper {
    proto: IpProto,
    at: usize,
    fragment: Option<UpperFragment>,
}

struct UpperFragment {
    identification: u32,
    offset: u32,
    more: bool,
    data_offset: usize,
    announced_at: usize,
}

/// Extension headers that are looked behind.
#[inline]
fn is_walked(proto: IpProto) -> bool {
    matches!(
        proto,
        IpProto::HOP_BY_HOP
            | IpProto::ROUTING
            | IpProto::FRAGMENT
            | IpProto::AUTHENTICATION
            | IpProto::DESTINATION_OPTIONS
    )
}

/// Walks extension headers as Linux does, in any order: hop-by-hop, routing, destination options, authentication, fragment. They must
/// lie in the head, which bounds the walk.
#[inline]
fn walk(
    packet: &Packet<'_>,
    start: usize,
    end: usize,
    first: IpProto,
    first_announced_at: usize,
) -> Result<Upper, Refusal> {
    const DEEP: Refusal = Refusal::Invalid(Invalid::NoUpperProtocol);
    let mut at = start;
    let mut proto = first;
    let mut announced_at = first_announced_at;
    let mut after_fragment_header = false;
    loop {
        if proto == IpProto::NO_NEXT_HEADER {
            return Err(DEEP);
        }
        if !is_walked(proto) {
            return Ok(Upper { proto, at, fragment: None });
        }
        let first_fragment_header = proto == IpProto::FRAGMENT && !after_fragment_header;
        if first_fragment_header && at <= end && at + 8 > end {
            return Err(Malformed::Fragment.into());
        }
        if at + 2 > end {
            return Err(DEEP);
        }
        let &[next, len] = header::<2>(packet, at, DEEP)?;
        let header_len = match proto {
            IpProto::FRAGMENT => {
                if at + 8 > end {
                    return Err(DEEP);
                }
                let &[_, _, a, b, i0, i1, i2, i3] = header::<8>(packet, at, DEEP)?;
                let field = u16::from_be_bytes([a, b]);
                let (offset, more) = (u32::from(field & 0xfff8), field & 1 != 0);
                // RFC 6946: offset 0 and nothing following is a whole packet.
                if offset != 0 || more {
                    // A fragment of a fragment: nobody honest sends one.
                    if !first_fragment_header {
                        return Err(DEEP);
                    }
                    let identification = u32::from_be_bytes([i0, i1, i2, i3]);
                    let fragment = UpperFragment { identification, offset, more, data_offset: at + 8, announced_at };
                    if offset == 0 {
                        first_is_whole(packet, at + 8, end, IpProto(next))?;
                    }
                    return Ok(Upper { proto: IpProto(next), at: at + 8, fragment: Some(fragment) });
                }
                if first_fragment_header {
                    whole_fragment(packet, start, at + 8, end, IpProto(next))?;
                }
                after_fragment_header = true;
                8
            }
            IpProto::AUTHENTICATION => (usize::from(len) + 2) * 4,
            _ => (usize::from(len) + 1) * 8,
        };
        announced_at = at;
        at += header_len;
        proto = IpProto(next);
    }
}

/// A fragment that is the whole datagram (RFC 6946) is judged as if its header, which ends at `at`, were not there.
#[cold]
fn whole_fragment(packet: &Packet<'_>, start: usize, at: usize, end: usize, next: IpProto) -> Result<(), Refusal> {
    if at == end && (is_walked(next) || next == IpProto::NO_NEXT_HEADER) {
        // Nothing in it.
        return Err(Malformed::Fragment.into());
    }
    if at != start + 8 || next != IpProto::HOP_BY_HOP {
        return Ok(());
    }
    if let Some(&[upper, len]) = chunk::<2>(packet.head, at)
        && at + (usize::from(len) + 1) * 8 >= end
        && !is_walked(IpProto(upper))
        && IpProto(upper) != IpProto::NO_NEXT_HEADER
    {
        // No upper header in it: as in Linux it is not put together, and judged as it is.
        return Ok(());
    }
    hop_by_hop(packet, at)
}

/// RFC 8200, 4.5: a first fragment must have the upper header. One that has not is never put together. One in which not even the
/// extension headers end is, as in Linux: what they announce is seen, and judged, in the whole datagram.
#[cold]
fn first_is_whole(packet: &Packet<'_>, start: usize, end: usize, first: IpProto) -> Result<(), Refusal> {
    let mut at = start;
    let mut proto = first;
    while is_walked(proto) {
        if proto == IpProto::FRAGMENT {
            // A fragment of a fragment: nobody honest sends one.
            return Err(Malformed::Fragment.into());
        }
        if at + 2 > end {
            return Ok(());
        }
        let &[next, len] = header::<2>(packet, at, BAD_TRANSPORT)?;
        at += if proto == IpProto::AUTHENTICATION { (usize::from(len) + 2) * 4 } else { (usize::from(len) + 1) * 8 };
        proto = IpProto(next);
    }
    let least = match proto {
        IpProto::TCP => 20,
        IpProto::UDP | IpProto::ICMPV6 => 8,
        IpProto::NO_NEXT_HEADER => return Ok(()),
        _ => 1,
    };
    if at + least > end { Err(BAD_TRANSPORT) } else { Ok(()) }
}

#[inline]
fn transport<'a>(packet: &Packet<'a>, ip: &Ip) -> Result<Dissected<'a>, Refusal> {
    let len = ip.end.saturating_sub(ip.at);
    let ports = || -> Result<(u16, u16), Refusal> {
        if len < 4 {
            return Err(BAD_TRANSPORT);
        }
        let &[a, b, c, d] = header::<4>(packet, ip.at, BAD_TRANSPORT)?;
        Ok((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    };
    let (transport, src_port, dst_port) = match ip.proto {
        IpProto::TCP => {
            let (s, d) = ports()?;
            (Transport::Tcp(segment(packet, ip, len)?), s, d)
        }
        IpProto::UDP => {
            let (s, d) = ports()?;
            check_udp(packet, ip, len)?;
            (Transport::Udp, s, d)
        }
        IpProto::ICMP | IpProto::ICMPV6 => return dissect_icmp(packet, ip, len),
        IpProto::SCTP => {
            let (s, d) = ports()?;
            (Transport::Sctp(sctp_packet(packet, ip, len)?), s, d)
        }
        IpProto::UDP_LITE => {
            let (s, d) = ports()?;
            check_udp_lite(packet, ip, len)?;
            (Transport::UdpLite, s, d)
        }
        IpProto::GRE => {
            let call = gre_call(packet, ip.at, ip.end)?;
            (Transport::Gre, 0, call)
        }
        // Tracked generically, but each pair of ports by itself: what a rule lets in for one port is not for all.
        IpProto::DCCP => {
            let (s, d) = ports()?;
            (Transport::Other, s, d)
        }
        _ => (Transport::Other, 0, 0),
    };
    let key = Key::new(packet.toward, ip.zone, ip.proto, (ip.src, src_port), (ip.dst, dst_port));
    let flow = Flow { key, toward: packet.toward, icmp: None };
    Ok(Dissected::Flow(Facts { flow, transport, ip_len: ip.ip_len }))
}

/// The transport checksum over `covered` bytes from the transport header on is right. Like Linux, IPv6's covers the destination in the
/// header even with a routing header.
#[inline]
fn checksum_ok(packet: &Packet<'_>, ip: &Ip, covered: usize, total: usize) -> bool {
    let mut sum = match (ip.src, ip.dst, ip.proto) {
        (IpAddr::V4(_), _, IpProto::ICMP) => Sum::new(),
        (IpAddr::V4(src), IpAddr::V4(dst), proto) => pseudo_v4(src, dst, proto, total as u32),
        (IpAddr::V6(src), IpAddr::V6(dst), proto) => pseudo_v6(src, dst, proto, total as u32),
        _ => return false,
    };
    let (head, body) = packet.range(ip.at, covered);
    sum.add_bytes(head);
    sum.add_body(&body);
    sum.is_valid()
}

#[inline]
fn segment<'a>(packet: &Packet<'a>, ip: &Ip, len: usize) -> Result<Segment<'a>, Refusal> {
    if len < 20 {
        return Err(BAD_TRANSPORT);
    }
    let h = header::<20>(packet, ip.at, BAD_TRANSPORT)?;
    let header_len = usize::from(h[12] >> 4) * 4;
    if header_len < 20 || header_len > len {
        return Err(BAD_TRANSPORT);
    }
    let end = ip.at + header_len;
    let options = packet.head.get(ip.at + 20..end).ok_or(Refusal::NeedMore { bytes: end as u32 })?;
    if ip.verify && !checksum_ok(packet, ip, len, len) {
        return Err(Invalid::Checksum.into());
    }
    let flags = Flags::from_bits_retain(h[13]);
    if !tcp::flags_possible(flags) {
        return Err(Invalid::Flags.into());
    }
    Ok(Segment {
        seq: u32::from_be_bytes([h[4], h[5], h[6], h[7]]),
        ack: u32::from_be_bytes([h[8], h[9], h[10], h[11]]),
        flags,
        window: u16::from_be_bytes([h[14], h[15]]),
        payload_len: (len - header_len) as u32,
        options,
    })
}

#[inline]
fn check_udp(packet: &Packet<'_>, ip: &Ip, len: usize) -> Result<(), Refusal> {
    if len < 8 {
        return Err(BAD_TRANSPORT);
    }
    let &[_, _, _, _, l0, l1, c0, c1] = header::<8>(packet, ip.at, BAD_TRANSPORT)?;
    let udp_len = usize::from(u16::from_be_bytes([l0, l1]));
    if udp_len < 8 || udp_len > len {
        return Err(BAD_TRANSPORT);
    }
    // 0: none. Linux tracks such packets over IPv6 as well (RFC 6935 allows them for tunnels); the receiver decides.
    if ip.verify && (c0, c1) != (0, 0) && !checksum_ok(packet, ip, len, len) {
        return Err(Invalid::Checksum.into());
    }
    Ok(())
}

#[cold]
fn check_udp_lite(packet: &Packet<'_>, ip: &Ip, len: usize) -> Result<(), Refusal> {
    if len < 8 {
        return Err(BAD_TRANSPORT);
    }
    let &[_, _, _, _, l0, l1, c0, c1] = header::<8>(packet, ip.at, BAD_TRANSPORT)?;
    let covered = match usize::from(u16::from_be_bytes([l0, l1])) {
        0 => len,
        covered => covered,
    };
    if covered < 8 || covered > len {
        return Err(BAD_TRANSPORT);
    }
    // RFC 3828, 3.1: always there.
    if (c0, c1) == (0, 0) || (ip.verify && !checksum_ok(packet, ip, covered, len)) {
        return Err(Invalid::Checksum.into());
    }
    Ok(())
}

/// The call identifier of GRE version 1 (PPTP, RFC 2637, 4.1); 0 for any other GRE.
#[inline]
fn gre_call(packet: &Packet<'_>, at: usize, end: usize) -> Result<u16, Refusal> {
    let Some([_, version, p0, p1]) = packet.bytes::<4>(at).filter(|_| at + 4 <= end) else { return Ok(0) };
    if version & 7 != 1 {
        return Ok(0);
    }
    let Some([_, _, c0, c1]) = packet.bytes::<4>(at + 4).filter(|_| at + 8 <= end) else { return Ok(0) };
    // Version 1 carries PPP and nothing else.
    if (p0, p1) != (0x88, 0x0b) {
        return Err(Invalid::Header.into());
    }
    Ok(u16::from_be_bytes([c0, c1]))
}

#[cold]
fn sctp_packet(packet: &Packet<'_>, ip: &Ip, len: usize) -> Result<SctpPacket, Refusal> {
    if len < 12 {
        return Err(BAD_TRANSPORT);
    }
    let h = header::<12>(packet, ip.at, BAD_TRANSPORT)?;
    if ip.verify {
        let mut crc = Crc32c::new();
        let (head, _) = packet.range(ip.at, 8);
        crc.add_bytes(head);
        crc.add_bytes(&[0; 4]);
        let (head, body) = packet.range(ip.at + 12, len - 12);
        crc.add_bytes(head);
        crc.add_body(&body);
        if crc.finish() != u32::from_le_bytes([h[8], h[9], h[10], h[11]]) {
            return Err(Invalid::Checksum.into());
        }
    }
    let mut sctp = SctpPacket {
        tag: u32::from_be_bytes([h[4], h[5], h[6], h[7]]),
        chunks: ArrayVec::new(),
        init_tag: None,
        has_data: false,
        has_others: false,
        last_is_other: false,
    };
    let mut at = ip.at + 12;
    let mut alone = false;
    let mut count = 0;
    while at + 4 <= ip.end {
        let Some([kind, flags, l0, l1]) = packet.bytes::<4>(at) else { break };
        let kind = ChunkType(kind);
        let chunk_len = usize::from(u16::from_be_bytes([l0, l1]));
        alone |= matches!(kind, ChunkType::INIT | ChunkType::INIT_ACK | ChunkType::SHUTDOWN_COMPLETE);
        let first_only = alone || matches!(kind, ChunkType::COOKIE_ACK | ChunkType::COOKIE_ECHO);
        if (first_only && count != 0) || chunk_len == 0 || count == SCTP_CHUNKS {
            return Err(BAD_TRANSPORT);
        }
        sctp.last_is_other = sctp::row(kind).is_none();
        if sctp.last_is_other {
            sctp.has_others = true;
            sctp.has_data |= kind == ChunkType::DATA;
        } else if sctp.chunks.try_push((kind, flags)).is_err() {
            return Err(BAD_TRANSPORT);
        }
        if matches!(kind, ChunkType::INIT | ChunkType::INIT_ACK) && at + 20 <= ip.end {
            sctp.init_tag = packet.bytes::<4>(at + 4).map(u32::from_be_bytes);
        }
        count += 1;
        at += (chunk_len + 3) & !3;
    }
    if count == 0 {
        return Err(BAD_TRANSPORT);
    }
    Ok(sctp)
}

fn dissect_icmp<'a>(packet: &Packet<'a>, ip: &Ip, len: usize) -> Result<Dissected<'a>, Refusal> {
    let ipv6 = ip.src.is_ipv6();
    if ipv6 != (ip.proto == IpProto::ICMPV6) {
        return Err(Invalid::IcmpType.into());
    }
    if len < 8 {
        return Err(BAD_TRANSPORT);
    }
    let &[kind, code, _, _, i0, i1, ..] = header::<8>(packet, ip.at, BAD_TRANSPORT)?;
    if ip.verify && !checksum_ok(packet, ip, len, len) {
        return Err(Invalid::Checksum.into());
    }
    if !ipv6 && kind > icmp::HIGHEST_V4 {
        return Err(Invalid::IcmpType.into());
    }
    let key = Key::new(packet.toward, ip.zone, ip.proto, (ip.src, 0), (ip.dst, 0));
    let flow = Flow { key, toward: packet.toward, icmp: Some((kind, code)) };
    if ipv6 && icmp::is_untracked(kind) {
        return Ok(Dissected::Untracked(flow));
    }
    if icmp::is_error(ipv6, kind) {
        let about = about(packet, ip, ip.at + 8)?;
        return Ok(Dissected::Error(IcmpError { flow, about }));
    }
    if ipv6 && kind == v6::REDIRECT {
        let about = about(packet, ip, redirected(packet, ip, len, code)?)?;
        return Ok(Dissected::Error(IcmpError { flow, about }));
    }
    let (question_kind, question) = icmp::exchange(ipv6, kind).ok_or(Invalid::IcmpType)?;
    let id = u16::from_be_bytes([i0, i1]);
    let asked_by_remote = (packet.toward == Toward::Ingress) == question;
    let key = key.with_icmp(id, question_kind, code, asked_by_remote);
    let flow = Flow { key, ..flow };
    Ok(Dissected::Flow(Facts { flow, transport: Transport::Icmp { question }, ip_len: ip.ip_len }))
}

/// Where the packet begins that an IPv6 redirect (RFC 4861, 4.5) is about.
#[cold]
fn redirected(packet: &Packet<'_>, ip: &Ip, len: usize, code: u8) -> Result<usize, Refusal> {
    const NOT_TRACKED: Refusal = Refusal::Invalid(Invalid::IcmpType);
    // ICMPv6 header, reserved, target, destination; then options.
    const MESSAGE_BYTES: usize = 40;
    if len < MESSAGE_BYTES + 2 {
        return Err(BAD_TRANSPORT);
    }
    let link_local = matches!(ip.src, IpAddr::V6(a) if a.is_unicast_link_local());
    let [kind, units] = packet.bytes::<2>(ip.at + MESSAGE_BYTES).ok_or(BAD_TRANSPORT)?;
    // Only the redirected-header option as the first one is looked at, as in Linux.
    if code != 0 || ip.hop_limit != 255 || !link_local || units == 0 || kind != 4 {
        return Err(NOT_TRACKED);
    }
    Ok(ip.at + MESSAGE_BYTES + 8)
}

/// The connection that the packet quoted at `at` belongs to. Nothing of the quote is believed but its addresses and ports.
fn about(packet: &Packet<'_>, ip: &Ip, at: usize) -> Result<Key, Refusal> {
    const UNRELATED: Refusal = Refusal::Invalid(Invalid::Unrelated);
    let (src, dst, proto, l4) = if ip.src.is_ipv4() {
        let h = header::<{ ipv4::HEADER_BYTES }>(packet, at, UNRELATED)?;
        let header_len = usize::from(h[0] & 0xf) * 4;
        // A later fragment has no ports.
        if at + header_len > ip.end || header_len < ipv4::HEADER_BYTES || be16(h, 6).is_none_or(|f| f & 0x1fff != 0) {
            return Err(UNRELATED);
        }
        let src = core::net::Ipv4Addr::new(h[12], h[13], h[14], h[15]);
        let dst = core::net::Ipv4Addr::new(h[16], h[17], h[18], h[19]);
        (IpAddr::V4(src), IpAddr::V4(dst), IpProto(h[9]), at + header_len)
    } else {
        if at + ipv6::HEADER_BYTES > ip.end {
            return Err(UNRELATED);
        }
        let h = header::<{ ipv6::HEADER_BYTES }>(packet, at, UNRELATED)?;
        let view = Ipv6::new(h).map_err(|_| UNRELATED)?;
        let (proto, l4) = walk_quoted(packet, at + ipv6::HEADER_BYTES, ip.end, view.next_header())?;
        (IpAddr::V6(view.src()), IpAddr::V6(view.dst()), proto, l4)
    };
    if at + ipv4::HEADER_BYTES > ip.end {
        return Err(UNRELATED);
    }
    // The error goes back to whom the quoted packet came from.
    if src != ip.dst {
        return Err(UNRELATED);
    }
    let quoted_toward = packet.toward.reverse();
    let key = |s, d| Key::new(quoted_toward, ip.zone, proto, (src, s), (dst, d));
    match proto {
        IpProto::TCP | IpProto::UDP | IpProto::UDP_LITE | IpProto::SCTP | IpProto::DCCP => {
            let Some([a, b, c, d]) = packet.bytes::<4>(l4).filter(|_| l4 + 4 <= ip.end) else {
                return Err(UNRELATED);
            };
            Ok(key(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
        }
        IpProto::ICMP | IpProto::ICMPV6 => {
            let Some([kind, code, _, _, a, b, _, _]) = packet.bytes::<8>(l4).filter(|_| l4 + 8 <= ip.end) else {
                return Err(UNRELATED);
            };
            let (question_kind, question) = icmp::exchange(proto == IpProto::ICMPV6, kind).ok_or(UNRELATED)?;
            let asked_by_remote = (quoted_toward == Toward::Ingress) == question;
            Ok(key(0, 0).with_icmp(u16::from_be_bytes([a, b]), question_kind, code, asked_by_remote))
        }
        IpProto::GRE => Ok(key(0, gre_call(packet, l4, ip.end).map_err(|_| UNRELATED)?)),
        _ => Ok(key(0, 0)),
    }
}

/// Upper protocol of a quoted IPv6 packet, and where it begins. A first fragment will do, a later one has no ports.
fn walk_quoted(packet: &Packet<'_>, start: usize, end: usize, first: IpProto) -> Result<(IpProto, usize), Refusal> {
    const UNRELATED: Refusal = Refusal::Invalid(Invalid::Unrelated);
    let mut at = start;
    let mut proto = first;
    loop {
        let header_len = match proto {
            IpProto::NO_NEXT_HEADER => return Err(UNRELATED),
            IpProto::HOP_BY_HOP
            | IpProto::ROUTING
            | IpProto::FRAGMENT
            | IpProto::AUTHENTICATION
            | IpProto::DESTINATION_OPTIONS => {
                // No more of the header is needed than its first fields: errors may quote eight bytes and no more (RFC 792).
                if at + 2 > end {
                    return Err(UNRELATED);
                }
                let &[next, len] = header::<2>(packet, at, UNRELATED)?;
                let is_fragment = proto == IpProto::FRAGMENT;
                let is_authentication = proto == IpProto::AUTHENTICATION;
                if is_fragment {
                    if at + 4 > end {
                        return Err(UNRELATED);
                    }
                    let &[_, _, f0, f1] = header::<4>(packet, at, UNRELATED)?;
                    if u16::from_be_bytes([f0, f1]) & 0xfff8 != 0 {
                        return Err(UNRELATED);
                    }
                }
                proto = IpProto(next);
                if is_fragment {
                    8
                } else if is_authentication {
                    (usize::from(len) + 2) * 4
                } else {
                    (usize::from(len) + 1) * 8
                }
            }
            _ => return Ok((proto, at)),
        };
        at += header_len;
    }
}

impl Packet<'_> {
    /// Copies the bytes from `at` on into `to`, which must not reach beyond the frame.
    pub(super) fn copy(&self, at: usize, to: &mut [u8]) {
        let (head, body) = self.range(at, to.len());
        let (first, second) = to.split_at_mut(head.len());
        first.copy_from_slice(head);
        body.read(second);
    }
}
