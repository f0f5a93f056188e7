//! Telling a sender that its packet was rejected: a TCP reset (RFC 9293), or ICMP (RFC 792, RFC 1812) or ICMPv6 (RFC 4443)
//! "destination unreachable".
//!
//! The answer seems to come from the packet's destination, as with Linux's bridged reject, since a switch has no address of its
//! own. It goes back the way the packet came: addresses swapped, VLAN tags kept. Packets that nothing may be sent in answer to are
//! recognised ([`NoAnswer`]), and answers are limited in rate, so that nobody can use them to flood a third party.
use core::net::{Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::token_bucket::{MAX_RATE, Rate, TokenBucket};
use super::validate::Errors;
use crate::offload::checksum::{internet_checksum, pseudo_v4, pseudo_v6};
use crate::packet::icmp::{Icmp, IcmpHeader, v4, v6};
use crate::packet::ipv4::Ipv4;
use crate::packet::ipv6::Ipv6;
use crate::packet::tcp::{self, Flags, Tcp, TcpMut};
use crate::packet::{Fragment, Headers, IpProto, L3, L4, ethernet, icmp, ipv4, ipv6};

/// Bytes that hold any answer: two tags and the longest ICMPv6 error.
pub const MAX_ANSWER_BYTES: usize = ethernet::HEADER_BYTES + 8 + MAX_V6_BYTES;
/// Longest ICMP error, IP header included (RFC 1812, 4.3.2.3).
const MAX_V4_BYTES: usize = 576;
/// Longest ICMPv6 error, IP header included (RFC 4443, 2.4 (c)): the least MTU of IPv6.
const MAX_V6_BYTES: usize = 1280;
/// Of the rejected packet's payload at least this much is quoted (RFC 792).
const LEAST_QUOTE_BYTES: usize = 8;
const TTL: u8 = 64;
/// Precedence "internetwork control" (RFC 1812, 4.3.2.5).
const ICMP_TOS: u8 = 0xc0;
/// "Don't fragment"; with it the identification means nothing (RFC 6864) and stays 0.
const DF: u16 = 0x4000;
/// Highest ICMP type that Linux and RFC 1122 know; who knows whether others are errors.
const LAST_KNOWN_ICMP: u8 = 18;

/// What the ICMP answers say. TCP is always answered by a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unreachable {
    /// Port unreachable: looks like a host on which nobody listens (ICMP code 3, ICMPv6 code 4).
    #[default]
    Port,
    /// Communication administratively prohibited (ICMP code 13, RFC 1812, 5.2.7.1; ICMPv6 code 1).
    AdminProhibited,
}

impl Unreachable {
    const fn code(self, v4: bool) -> u8 {
        match (self, v4) {
            (Self::Port, true) => 3,
            (Self::AdminProhibited, true) => 13,
            (Self::Port, false) => 4,
            (Self::AdminProhibited, false) => 1,
        }
    }
}

/// How a port rejects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RejectConfig {
    /// What ICMP says.
    pub icmp: Unreachable,
    /// Answers per second, on average; beyond them rejected packets are dropped silently. 0: no limit.
    pub per_second: u32,
    /// Answers at once.
    pub burst: u32,
}

impl Default for RejectConfig {
    fn default() -> Self {
        Self { icmp: Unreachable::Port, per_second: 1000, burst: 50 }
    }
}

impl RejectConfig {
    pub(crate) fn check(&self, errors: &mut Errors, path: &str) {
        let path = format!("{path}.per_second");
        errors.at_most(path, self.per_second as usize, MAX_RATE as usize, "answers per second");
    }
}

macro_rules! no_answers {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a rejected packet gets no answer. The names are part of the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum NoAnswer { $($(#[$doc])* $variant,)* }
        impl NoAnswer {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [NoAnswer] = &[$(NoAnswer::$variant,)*];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in stats, metrics and explanations.
            pub const fn name(self) -> &'static str {
                match self { $(NoAnswer::$variant => $name,)* }
            }
        }
    };
}

no_answers! {
    /// Neither IPv4 nor IPv6.
    NotIp = "not_ip",
    /// To several stations, or from none (RFC 1122, 3.2.2: no error for a link-layer broadcast).
    LinkAddress = "link_address",
    /// The IP source is no single host's address (RFC 1122, 3.2.2; RFC 4443, 2.4 (e.6)).
    SourceAddress = "source_address",
    /// The IP destination is no single host's address (RFC 4443, 2.4 (e.3)).
    DestinationAddress = "destination_address",
    /// A fragment other than the first (RFC 1122, 3.2.2).
    LaterFragment = "later_fragment",
    /// An ICMP error or redirect (RFC 1122, 3.2.2; RFC 4443, 2.4 (e.1), (e.2)), or a message of unknown kind.
    IcmpError = "icmp_error",
    /// Neighbour or multicast listener discovery: nobody would read the answer.
    Discovery = "discovery",
    /// A TCP reset (RFC 9293, 3.10.7.1).
    TcpReset = "tcp_reset",
    /// The IPv4 header's checksum is wrong: the addresses cannot be trusted.
    HeaderChecksum = "header_checksum",
    /// Too little of the packet is at hand to be quoted.
    Truncated = "truncated",
    /// The answer does not fit into the buffer.
    BufferTooSmall = "buffer_too_small",
    /// Too many answers lately.
    RateLimited = "rate_limited",
}

/// One port's answers: rate and counters. Several threads may use it at once.
#[derive(Debug, Default)]
pub struct Rejector {
    bucket: TokenBucket,
    answered: AtomicU64,
    unanswered: [AtomicU64; NoAnswer::COUNT],
}

/// What [`Rejector::status`] tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RejectStatus {
    /// Answers built.
    pub answered: u64,
    /// Rejected packets that got none, by [`NoAnswer`].
    pub unanswered: [u64; NoAnswer::COUNT],
}

impl Rejector {
    /// Builds the answer to the rejected frame that begins with `head`, in which `headers` were found, into `out`
    /// ([`MAX_ANSWER_BYTES`] suffice), and returns its length, bytes. The frame is complete: checksums are filled in.
    ///
    /// ICMP quotes what of the packet is in `head`, up to the length that the RFCs allow. Transport checksums of the
    /// packet are not verified: its payload need not be at hand.
    ///
    /// # Errors
    /// Why there is no answer; it is counted.
    pub fn reject(
        &self,
        config: &RejectConfig,
        head: &[u8],
        headers: &Headers,
        out: &mut [u8],
        now_ns: u64,
    ) -> Result<usize, NoAnswer> {
        let rate = Rate::new(config.per_second, config.burst);
        let result = answerable(head, headers).and_then(|subject| {
            if !self.bucket.take(rate, now_ns) {
                return Err(NoAnswer::RateLimited);
            }
            build(&subject, config.icmp, head, headers, out)
        });
        match result {
            Ok(_) => self.answered.fetch_add(1, Relaxed),
            Err(reason) => self.unanswered.get(reason as usize).map_or(0, |c| c.fetch_add(1, Relaxed)),
        };
        result
    }

    /// Counters so far.
    pub fn status(&self) -> RejectStatus {
        RejectStatus {
            answered: self.answered.load(Relaxed),
            unanswered: core::array::from_fn(|i| self.unanswered.get(i).map_or(0, |c| c.load(Relaxed))),
        }
    }
}

/// Whether the packet may be answered at all; the rate is not asked.
///
/// # Errors
/// Why not.
pub fn check(head: &[u8], headers: &Headers) -> Result<(), NoAnswer> {
    answerable(head, headers).map(|_| ())
}

/// A packet that may be answered.
struct Subject<'a> {
    ip: Ip<'a>,
    /// The packet, as far as it is at hand, without padding.
    packet: &'a [u8],
    tcp: Option<(Tcp<'a>, L4)>,
}

enum Ip<'a> {
    V4(Ipv4<'a>),
    V6(Ipv6<'a>),
}

fn single_host4(address: Ipv4Addr) -> bool {
    // This network, loopback, multicast, reserved and broadcast (RFC 1122, 3.2.1.3).
    !matches!(address.octets(), [0 | 127 | 224.., ..])
}

fn single_host6(address: Ipv6Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

fn answerable<'a>(head: &'a [u8], headers: &Headers) -> Result<Subject<'a>, NoAnswer> {
    let (L3::Ipv4 { offset } | L3::Ipv6 { offset }) = headers.l3 else { return Err(NoAnswer::NotIp) };
    if headers.l2.dst_mac.is_multicast() || !headers.l2.src_mac.is_valid_source() {
        return Err(NoAnswer::LinkAddress);
    }
    let end = (headers.l3_end() as usize).min(head.len());
    let packet = head.get(usize::from(offset)..end).ok_or(NoAnswer::Truncated)?;
    let ip = if matches!(headers.l3, L3::Ipv4 { .. }) {
        let ip = Ipv4::new(packet).map_err(|_| NoAnswer::Truncated)?;
        if !ip.checksum_ok() {
            return Err(NoAnswer::HeaderChecksum);
        }
        if !single_host4(ip.src()) {
            return Err(NoAnswer::SourceAddress);
        }
        if !single_host4(ip.dst()) {
            return Err(NoAnswer::DestinationAddress);
        }
        Ip::V4(ip)
    } else {
        let ip = Ipv6::new(packet).map_err(|_| NoAnswer::Truncated)?;
        if !single_host6(ip.src()) {
            return Err(NoAnswer::SourceAddress);
        }
        if !single_host6(ip.dst()) {
            return Err(NoAnswer::DestinationAddress);
        }
        Ip::V6(ip)
    };
    if headers.fragment == Fragment::Later {
        return Err(NoAnswer::LaterFragment);
    }
    let l4 = headers.l4.ok_or(NoAnswer::Truncated)?;
    let transport = head.get(usize::from(l4.offset)..end).ok_or(NoAnswer::Truncated)?;
    let mut subject = Subject { ip, packet, tcp: None };
    match (l4.proto, &subject.ip) {
        (IpProto::TCP, _) => {
            let tcp = Tcp::new(transport).map_err(|_| NoAnswer::Truncated)?;
            if tcp.flags().contains(Flags::RST) {
                return Err(NoAnswer::TcpReset);
            }
            subject.tcp = Some((tcp, l4));
        }
        (IpProto::ICMP, Ip::V4(_)) => {
            let icmp = Icmp::new(transport).map_err(|_| NoAnswer::Truncated)?;
            if icmp.is_v4_error() || icmp.kind() > LAST_KNOWN_ICMP {
                return Err(NoAnswer::IcmpError);
            }
        }
        (IpProto::ICMPV6, Ip::V6(_)) => {
            let icmp = Icmp::new(transport).map_err(|_| NoAnswer::Truncated)?;
            match icmp.kind() {
                ..128 | v6::REDIRECT => return Err(NoAnswer::IcmpError),
                v6::MLD_QUERY..=v6::NEIGHBOUR_ADVERTISEMENT | v6::MLD2_REPORT => return Err(NoAnswer::Discovery),
                _ => {}
            }
        }
        _ => {}
    }
    Ok(subject)
}

/// Appends to a bounded buffer.
struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), NoAnswer> {
        let end = self.len + bytes.len();
        self.out.get_mut(self.len..end).ok_or(NoAnswer::BufferTooSmall)?.copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }

    fn room(&self) -> usize {
        self.out.len() - self.len
    }

    /// Stores `value` at `at`, which has been written.
    fn patch(&mut self, at: usize, value: u16) {
        if let Some(to) = self.out.get_mut(at..at + 2) {
            to.copy_from_slice(&value.to_be_bytes());
        }
    }

    fn written(&self, from: usize) -> &[u8] {
        self.out.get(from..self.len).unwrap_or_default()
    }
}

fn build(
    subject: &Subject<'_>,
    unreachable: Unreachable,
    head: &[u8],
    headers: &Headers,
    out: &mut [u8],
) -> Result<usize, NoAnswer> {
    let mut w = Writer { out, len: 0 };
    w.put(&headers.l2.src_mac.octets())?;
    w.put(&headers.l2.dst_mac.octets())?;
    // Tags and EtherType stay as they are.
    let rest = head.get(12..usize::from(headers.l2.len)).ok_or(NoAnswer::Truncated)?;
    w.put(rest)?;
    match (&subject.tcp, &subject.ip) {
        (Some((tcp, l4)), ip) => reset(&mut w, ip, tcp, payload_len(headers, l4))?,
        (None, Ip::V4(ip)) => unreachable4(&mut w, ip, subject.packet, unreachable)?,
        (None, Ip::V6(ip)) => unreachable6(&mut w, ip, subject.packet, unreachable)?,
    }
    Ok(w.len)
}

/// Bytes of payload as the IP header counts them: the payload itself need not be at hand.
fn payload_len(headers: &Headers, l4: &L4) -> u32 {
    headers.l3_end().saturating_sub(l4.payload_offset())
}

/// The header of an answer to `ip`, with `len` bytes to follow.
fn put_ipv4(w: &mut Writer<'_>, ip: &Ipv4<'_>, proto: IpProto, tos: u8, len: usize) -> Result<(), NoAnswer> {
    let total = ((ipv4::HEADER_BYTES + len) as u16).to_be_bytes();
    let flags = DF.to_be_bytes();
    let start = w.len;
    w.put(&[0x45, tos, total[0], total[1], 0, 0, flags[0], flags[1], TTL, proto.0, 0, 0])?;
    w.put(&ip.dst().octets())?;
    w.put(&ip.src().octets())?;
    let checksum = internet_checksum(w.written(start));
    w.patch(start + 10, checksum);
    Ok(())
}

/// The same for IPv6.
fn put_ipv6(w: &mut Writer<'_>, ip: &Ipv6<'_>, proto: IpProto, len: usize) -> Result<(), NoAnswer> {
    let payload = (len as u16).to_be_bytes();
    w.put(&[0x60, 0, 0, 0, payload[0], payload[1], proto.0, TTL])?;
    w.put(&ip.dst().octets())?;
    w.put(&ip.src().octets())
}

/// RFC 9293, 3.10.7.1: a segment with ACK is answered by a reset with that number as sequence number; one without by a reset with
/// sequence number 0 that acknowledges all of the segment.
fn reset(w: &mut Writer<'_>, ip: &Ip<'_>, tcp: &Tcp<'_>, payload_len: u32) -> Result<(), NoAnswer> {
    let flags = tcp.flags();
    let mut header = [0u8; tcp::HEADER_BYTES];
    [header[0], header[1]] = tcp.dst_port().to_be_bytes();
    [header[2], header[3]] = tcp.src_port().to_be_bytes();
    header[12] = ((tcp::HEADER_BYTES / 4) << 4) as u8;
    if let Ok(mut new) = TcpMut::new(&mut header) {
        if flags.contains(Flags::ACK) {
            new.set_seq(tcp.ack());
            new.set_flags(Flags::RST);
        } else {
            // SYN and FIN count as one byte each (RFC 9293, 3.4).
            let len = payload_len
                .wrapping_add(u32::from(flags.contains(Flags::SYN)))
                .wrapping_add(u32::from(flags.contains(Flags::FIN)));
            new.set_ack(tcp.seq().wrapping_add(len));
            new.set_flags(Flags::RST | Flags::ACK);
        }
    }
    let mut sum = match ip {
        Ip::V4(ip) => {
            put_ipv4(w, ip, IpProto::TCP, 0, tcp::HEADER_BYTES)?;
            pseudo_v4(ip.dst(), ip.src(), IpProto::TCP, tcp::HEADER_BYTES as u32)
        }
        Ip::V6(ip) => {
            put_ipv6(w, ip, IpProto::TCP, tcp::HEADER_BYTES)?;
            pseudo_v6(ip.dst(), ip.src(), IpProto::TCP, tcp::HEADER_BYTES as u32)
        }
    };
    sum.add_bytes(&header);
    [header[16], header[17]] = sum.finish().to_be_bytes();
    w.put(&header)
}

/// As much of `packet` as may and can be quoted, at least its header of `header_len` bytes and 8 more (or all of it).
fn quote<'a>(
    w: &Writer<'_>,
    packet: &'a [u8],
    header_len: usize,
    total_len: usize,
    most: usize,
    overhead: usize,
) -> Result<&'a [u8], NoAnswer> {
    let least = (header_len + LEAST_QUOTE_BYTES).min(total_len);
    if packet.len() < least {
        return Err(NoAnswer::Truncated);
    }
    let room = w.room().checked_sub(overhead).filter(|room| *room >= least).ok_or(NoAnswer::BufferTooSmall)?;
    packet.get(..packet.len().min(most - overhead).min(room)).ok_or(NoAnswer::Truncated)
}

fn unreachable4(w: &mut Writer<'_>, ip: &Ipv4<'_>, packet: &[u8], kind: Unreachable) -> Result<(), NoAnswer> {
    let overhead = ipv4::HEADER_BYTES + icmp::HEADER_BYTES;
    let quoted = quote(w, packet, ip.header_len(), usize::from(ip.total_len()), MAX_V4_BYTES, overhead)?;
    put_ipv4(w, ip, IpProto::ICMP, ICMP_TOS, icmp::HEADER_BYTES + quoted.len())?;
    let start = w.len;
    w.put(&IcmpHeader { kind: v4::UNREACHABLE, code: kind.code(true), rest: 0 }.to_bytes())?;
    w.put(quoted)?;
    let checksum = internet_checksum(w.written(start));
    w.patch(start + usize::from(icmp::CHECKSUM_OFFSET), checksum);
    Ok(())
}

fn unreachable6(w: &mut Writer<'_>, ip: &Ipv6<'_>, packet: &[u8], kind: Unreachable) -> Result<(), NoAnswer> {
    let overhead = ipv6::HEADER_BYTES + icmp::HEADER_BYTES;
    let total_len = ipv6::HEADER_BYTES + usize::from(ip.payload_len());
    let quoted = quote(w, packet, ipv6::HEADER_BYTES, total_len, MAX_V6_BYTES, overhead)?;
    let len = icmp::HEADER_BYTES + quoted.len();
    put_ipv6(w, ip, IpProto::ICMPV6, len)?;
    let start = w.len;
    w.put(&IcmpHeader { kind: v6::UNREACHABLE, code: kind.code(false), rest: 0 }.to_bytes())?;
    w.put(quoted)?;
    let mut sum = pseudo_v6(ip.dst(), ip.src(), IpProto::ICMPV6, len as u32);
    sum.add_bytes(w.written(start));
    w.patch(start + usize::from(icmp::CHECKSUM_OFFSET), sum.finish());
    Ok(())
}
