//! Plain packets: TCP and UDP of the ordinary kind, read in a few loads.
//!
//! A packet that [`super::dissect`] would call a flow of TCP or UDP is plain when nothing about it needs a closer look: an untagged or
//! once-tagged frame, IPv4 without options or IPv6 without extension headers, not a fragment, all headers at hand, no DHCP, and for TCP
//! the flag ACK alone (and such as mean nothing to tracking), without options but time stamps. What is found of it is what `dissect`
//! finds; all that is not plain, everything malformed included, is left to it.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[cfg(test)]
use super::dissect::Segment;
use super::key::{Toward, V6};
use super::map::KeyWords;
use crate::frame::{Body, Gso, Offload, SNAPSHOT_BYTES};
use crate::offload::checksum::{Sum, fold};
use crate::packet::tcp::Flags;
use crate::packet::{EtherType, IpProto, tcp, udp};

/// Bytes up to the network header: without a tag, and with one.
const UNTAGGED: usize = 14;
const TAGGED: usize = 18;
/// The upper half of an IPv4-mapped address as a word of a key, in memory order.
const MAPPED: u64 = 0xffff_0000;
/// Options that are one time stamp, as Linux and others send it (RFC 7323, appendix A).
const TIME_STAMP: u32 = u32::from_le_bytes([1, 1, 8, 10]);

/// A plain packet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plain {
    /// Addresses as they stand in a key.
    src: [u64; 2],
    dst: [u64; 2],
    talk: Talk,
    /// UDP without checksum.
    unsummed: bool,
    /// Length of transport header and payload, bytes.
    len: u16,
}

/// Ports, protocol and family of a packet, and where its transport header begins: `source port | destination port << 16 | protocol << 32 |
/// family << 40 | offset << 48`. The family is a key's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Talk(u64);

impl Talk {
    #[inline(always)]
    const fn new(ports: u32, proto: u8, family: u8, at: usize) -> Self {
        Self(ports as u64 | (proto as u64) << 32 | (family as u64) << 40 | (at as u64) << 48)
    }
    #[inline(always)]
    const fn proto(self) -> IpProto {
        IpProto((self.0 >> 32) as u8)
    }
    #[inline(always)]
    const fn is_ipv6(self) -> bool {
        (self.0 >> 40) as u8 == V6
    }
    #[inline(always)]
    const fn at(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// What differs between the packets of a conversation. Of a UDP datagram, only the length means anything.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Particulars {
    /// Length of the IP packet, bytes.
    pub ip_len: u32,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    pub payload_len: u16,
}

#[cfg(test)]
impl Particulars {
    /// The TCP segment, its options left out: they mean nothing here.
    #[inline(always)]
    pub fn segment(&self) -> Segment<'static> {
        Segment {
            seq: self.seq,
            ack: self.ack,
            flags: Flags::ACK,
            window: self.window,
            payload_len: u32::from(self.payload_len),
            options: &[],
        }
    }
}

// As far as plain headers reach: IPv6 and TCP with a time stamp, and what is read along.
const _: () = assert!(TAGGED + 80 <= SNAPSHOT_BYTES);

/// Two ports as [`Talk`] has them.
const fn ports(source: u16, destination: u16) -> u32 {
    source as u32 | (destination as u32) << 16
}

#[inline(always)]
fn bytes<const N: usize>(head: &[u8; SNAPSHOT_BYTES], at: usize) -> [u8; N] {
    // `at` is a constant wherever this is inlined.
    head.get(at..).and_then(|bytes| bytes.first_chunk::<N>()).copied().unwrap_or([0; N])
}

#[inline(always)]
fn u64_at(head: &[u8; SNAPSHOT_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes(head, at))
}

#[inline(always)]
fn u32_at(head: &[u8; SNAPSHOT_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes(head, at))
}

/// Where a frame's network header begins, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// IPv4 behind an untagged link header.
    V4,
    /// IPv6 behind one.
    V6,
    /// IPv4 behind one tag.
    TaggedV4,
    /// IPv6 behind one tag.
    TaggedV6,
}

impl Layout {
    /// Of a frame with its network header at `l3`. `None`: there are no plain packets in such frames.
    #[inline]
    pub const fn new(l3: u16, ethertype: EtherType) -> Option<Self> {
        const TAGS: (usize, usize) = (UNTAGGED, TAGGED);
        match (l3 as usize, ethertype) {
            (l3, EtherType::IPV4) if l3 == TAGS.0 => Some(Self::V4),
            (l3, EtherType::IPV6) if l3 == TAGS.0 => Some(Self::V6),
            (l3, EtherType::IPV4) if l3 == TAGS.1 => Some(Self::TaggedV4),
            (l3, EtherType::IPV6) if l3 == TAGS.1 => Some(Self::TaggedV6),
            _ => None,
        }
    }
}

impl Plain {
    /// Reads the frame of `frame_len` bytes of which `head` has the first `have`. False beside it: the packet is not plain, but its
    /// connection can be named: what it says of addresses, ports and protocol is so. `None`: neither. What differs between the packets of
    /// a conversation is written to `facts`, which means nothing unless the packet is plain.
    #[inline(always)]
    pub fn read(
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        frame_len: usize,
        layout: Layout,
        facts: &mut Particulars,
    ) -> Option<(Self, bool)> {
        match layout {
            Layout::V4 => Self::ipv4::<UNTAGGED>(head, have, frame_len, facts),
            Layout::V6 => Self::ipv6::<UNTAGGED>(head, have, frame_len, facts),
            Layout::TaggedV4 => Self::ipv4::<TAGGED>(head, have, frame_len, facts),
            Layout::TaggedV6 => Self::ipv6::<TAGGED>(head, have, frame_len, facts),
        }
    }

    #[inline(always)]
    fn ipv4<const L3: usize>(
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        frame_len: usize,
        facts: &mut Particulars,
    ) -> Option<(Self, bool)> {
        let (first, second, dst) = (u64_at(head, L3), u64_at(head, L3 + 8), u32_at(head, L3 + 16));
        let total_len = usize::from(((first >> 16) as u16).swap_bytes());
        // Neither flag nor offset of a fragment.
        let whole = first & 0xff3f << 48 == 0;
        // One's complement sum of the header, the checksum included: 2^16 - 1 divides it, and it is not 0.
        let low = |word: u64| word & 0xffff_ffff;
        let sum = low(first) + (first >> 32) + low(second) + (second >> 32) + u64::from(dst);
        let fits = total_len >= 28 && L3 + total_len <= frame_len && have >= L3 + 28;
        if first as u8 != 0x45 || !whole || !fits || !sum.is_multiple_of(0xffff) {
            return None;
        }
        facts.ip_len = total_len as u32;
        let src = [0, MAPPED | (second >> 32) << 32];
        let dst = [0, MAPPED | u64::from(dst) << 32];
        Self::transport::<L3, 20, 0>(head, have, total_len - 20, (second >> 8) as u8, src, dst, facts)
    }

    #[inline(always)]
    fn ipv6<const L3: usize>(
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        frame_len: usize,
        facts: &mut Particulars,
    ) -> Option<(Self, bool)> {
        let first = u64_at(head, L3);
        let payload_len = usize::from(((first >> 32) as u16).swap_bytes());
        let fits = payload_len >= 8 && L3 + 40 + payload_len <= frame_len && have >= L3 + 48;
        if first as u8 >> 4 != 6 || !fits {
            return None;
        }
        facts.ip_len = 40 + payload_len as u32;
        let src = [u64_at(head, L3 + 8), u64_at(head, L3 + 16)];
        let dst = [u64_at(head, L3 + 24), u64_at(head, L3 + 32)];
        Self::transport::<L3, 40, V6>(head, have, payload_len, (first >> 48) as u8, src, dst, facts)
    }

    /// The transport header behind an IP header of `IP` bytes; at least 8 bytes behind that are at hand, and belong to the packet.
    #[inline(always)]
    fn transport<const L3: usize, const IP: usize, const FAMILY: u8>(
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        len: usize,
        proto: u8,
        src: [u64; 2],
        dst: [u64; 2],
        facts: &mut Particulars,
    ) -> Option<(Self, bool)> {
        const DHCP: u32 = ports(67, 68);
        const DHCPV6: u32 = ports(547, 546);
        let at = L3 + IP;
        let first = u64_at(head, at);
        let ports = (first as u32).swap_bytes().rotate_left(16);
        let talk = Talk::new(ports, proto, FAMILY, at);
        match IpProto(proto) {
            IpProto::UDP => {
                let udp_len = usize::from(((first >> 32) as u16).swap_bytes());
                let unsummed = first >> 48 == 0;
                // What DHCP servers send is for the anti-spoofing rules to judge.
                let is_plain = udp_len >= 8 && udp_len <= len && ports != DHCP && ports != DHCPV6;
                Some((Self { src, dst, talk, unsummed, len: len as u16 }, is_plain))
            }
            IpProto::TCP => {
                const NO_MATTER: Flags = Flags::PSH.union(Flags::ECE).union(Flags::CWR).union(Flags::URG);
                let third = u64_at(head, at + 12);
                let header_len = usize::from(third as u8 >> 4) * 4;
                let flags = Flags::from_bits_retain((third >> 8) as u8);
                let usual_options = header_len == 20 || header_len == 32 && u32_at(head, at + 20) == TIME_STAMP;
                facts.seq = ((first >> 32) as u32).swap_bytes();
                facts.ack = u32_at(head, at + 8).swap_bytes();
                facts.window = ((third >> 16) as u16).swap_bytes();
                facts.payload_len = len.wrapping_sub(header_len) as u16;
                let is_plain = flags.difference(NO_MATTER) == Flags::ACK
                    && usual_options
                    && header_len <= len
                    && at + header_len <= have;
                Some((Self { src, dst, talk, unsummed: false, len: len as u16 }, is_plain))
            }
            _ => None,
        }
    }

    /// TCP or UDP.
    #[inline(always)]
    pub fn proto(&self) -> IpProto {
        self.talk.proto()
    }

    /// Protocol and family.
    #[inline(always)]
    pub fn kind(&self) -> u16 {
        (self.talk.0 >> 32) as u16
    }

    /// Between the same addresses and ports, and so of the same connection.
    #[inline(always)]
    pub fn same_talk(&self, other: &Self) -> bool {
        let ([a, b], [c, d]) = (self.src, other.src);
        let ([e, f], [g, h]) = (self.dst, other.dst);
        (a ^ c) | (b ^ d) | (e ^ g) | (f ^ h) | (self.talk.0 ^ other.talk.0) == 0
    }

    /// `offload` says that the checksum is owed, where it is, and nothing else.
    #[inline(always)]
    pub fn owes_checksum(&self, offload: &Offload) -> bool {
        let field = if self.proto() == IpProto::TCP { tcp::CHECKSUM_OFFSET } else { udp::CHECKSUM_OFFSET };
        offload.needs_csum
            && offload.gso == Gso::None
            && offload.csum_start == self.talk.at()
            && offload.csum_offset == field
    }

    /// Where the transport header begins, bytes from the frame's start.
    #[inline(always)]
    pub(super) fn transport_at(&self) -> usize {
        usize::from(self.talk.at())
    }

    /// Length of the IP header of a packet like this, bytes.
    #[inline(always)]
    pub(super) fn ip_header_len(&self) -> u32 {
        if self.talk.is_ipv6() { 40 } else { 20 }
    }

    /// The words of its key, seen from a VM that it goes to or comes from.
    #[inline(always)]
    pub fn key(&self, toward: Toward, zone: u16) -> KeyWords {
        let ports = self.talk.0 as u32;
        let ([a, b], [c, d], ports) = match toward {
            Toward::Ingress => (self.dst, self.src, ports.rotate_left(16)),
            Toward::Egress => (self.src, self.dst, ports),
        };
        let rest = u64::from(ports) | u64::from(zone) << 32 | (self.talk.0 >> 32 & 0xffff) << 48;
        [a, b, c, d, rest]
    }

    /// Source address in two words; for comparing only.
    #[inline(always)]
    pub fn source_words(&self) -> [u64; 2] {
        self.src
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        let [low, high] = self.src;
        if self.talk.is_ipv6() {
            let low = low.to_le_bytes();
            let high = high.to_le_bytes();
            let mut octets = [0; 16];
            for (to, from) in octets.iter_mut().zip(low.into_iter().chain(high)) {
                *to = from;
            }
            Ipv6Addr::from(octets).into()
        } else {
            let [_, _, _, _, a, b, c, d] = high.to_le_bytes();
            Ipv4Addr::new(a, b, c, d).into()
        }
    }

    /// It has a checksum.
    #[inline(always)]
    pub fn is_summed(&self) -> bool {
        !self.unsummed
    }

    /// The transport checksum is right, or there is none. `head`: as was read, of which the first `have` bytes are the frame's; `body`: what
    /// follows them.
    #[inline(always)]
    pub fn checksum_ok<'b>(&self, head: &[u8; SNAPSHOT_BYTES], have: usize, body: impl FnOnce() -> Body<'b>) -> bool {
        if self.unsummed {
            return true;
        }
        let (at, len) = (usize::from(self.talk.at()), usize::from(self.len));
        // The addresses end where the transport header begins.
        let addresses = if self.talk.is_ipv6() { 32 } else { 8 };
        let (from, to) = (at.saturating_sub(addresses), at + len);
        let pseudo = (u64::from(self.proto().0) + u64::from(self.len)) as u16;
        let at_hand = to.min(have);
        let (sum, rest) = (sum_of(head, from, at_hand), to - at_hand);
        if rest == 0 {
            // All that most short packets need: the sum in memory order, and what is not in memory, put in that order.
            return carrying(sum, u64::from(pseudo.to_be())).is_multiple_of(0xffff);
        }
        // What was read so far is an even number of bytes: the first byte of the rest is the first of a word.
        let is_even = (at_hand - from).is_multiple_of(2);
        rest_ok(u16::from_be(fold(sum)), pseudo, is_even, &body().slice(0, rest as u32))
    }
}

/// Two sums and what follows them make the sum of a right packet. `is_even`: the first byte that follows is the first of a word.
#[inline(never)]
fn rest_ok(sum: u16, pseudo: u16, is_even: bool, rest: &Body<'_>) -> bool {
    let mut whole = Sum::new();
    whole.add_u16(sum);
    whole.add_u16(pseudo);
    if is_even {
        whole.add_body(rest);
    } else {
        whole.add_body_at_odd(rest);
    }
    whole.is_valid()
}

/// Sum of 64-bit words in memory order of the bytes `from..to`, with zeros behind them, modulo 2^64 - 1 as [`carrying`] adds.
#[inline(always)]
fn sum_of(head: &[u8; SNAPSHOT_BYTES], from: usize, to: usize) -> u64 {
    let Some(bytes) = head.get(from..to) else { return 0 };
    let (words, tail) = bytes.as_chunks::<8>();
    let mut sum = 0;
    for word in words {
        sum = carrying(sum, u64::from_ne_bytes(*word));
    }
    if !tail.is_empty() {
        // A word that begins with the tail; what lies behind it is shifted out.
        let at = to - tail.len();
        let word = match head.get(at..).and_then(|bytes| bytes.first_chunk::<8>()) {
            Some(word) => u64::from_le_bytes(*word) << (8 * (8 - tail.len())) >> (8 * (8 - tail.len())),
            None => tail.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
        };
        sum = carrying(sum, u64::from_ne_bytes(word.to_le_bytes()));
    }
    sum
}

/// The sum modulo 2^64 - 1, which 2^16 - 1 divides: what is carried out at the top comes in at the bottom.
#[inline(always)]
const fn carrying(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    // What is left beside a carry is at most 2^64 - 2.
    sum.wrapping_add(carry as u64)
}
