//! Plain packets: TCP and UDP of the ordinary kind, read in a few loads.
//!
//! A packet that [`super::dissect`] would call a flow of TCP or UDP is plain when nothing about it needs a closer look: an untagged or
//! once-tagged frame, IPv4 without options or IPv6 without extension headers, not a fragment, all headers at hand, no DHCP, and for TCP
//! the flag ACK alone (and such as mean nothing to tracking), without options but time stamps. What is found of it is what `dissect`
//! finds; all that is not plain, everything malformed included, is left to it.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

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
    pub facts: Particulars,
}

/// Ports, protocol and family of a packet, and where its transport header begins: `source port | destination port << 16 | protocol << 32 |
/// family << 40 | offset << 48`. The family is a key's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Talk(u64);

impl Talk {
    #[inline(always)]
    const fn new(ports: (u16, u16), proto: u8, family: u8, at: usize) -> Self {
        let (source, destination) = ports;
        Self(
            source as u64
                | (destination as u64) << 16
                | (proto as u64) << 32
                | (family as u64) << 40
                | (at as u64) << 48,
        )
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
    seq: u32,
    ack: u32,
    window: u16,
    payload_len: u16,
}

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

/// What [`Plain::read`] makes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Not plain; what was read means nothing.
    Other,
    /// Not plain, but its connection can be named: what it says of addresses, ports and protocol is so.
    Named,
    /// Plain.
    Plain,
}

/// Headers of a frame, from the network header on.
type Window = [u8; WINDOW_BYTES];
/// As far as plain headers reach: IPv6 and TCP with a time stamp, and what is read along.
const WINDOW_BYTES: usize = 80;
const _: () = assert!(TAGGED + WINDOW_BYTES <= SNAPSHOT_BYTES);

#[inline(always)]
fn bytes<const N: usize>(window: &Window, at: usize) -> [u8; N] {
    // `at` is a constant wherever this is inlined.
    window.get(at..).and_then(|bytes| bytes.first_chunk::<N>()).copied().unwrap_or([0; N])
}

#[inline(always)]
fn u64_at(window: &Window, at: usize) -> u64 {
    u64::from_le_bytes(bytes(window, at))
}

#[inline(always)]
fn u32_at(window: &Window, at: usize) -> u32 {
    u32::from_le_bytes(bytes(window, at))
}

impl Plain {
    /// Reads the frame of `frame_len` bytes of which `head` has the first `have`, with the network header at `l3`.
    #[inline(always)]
    pub fn read(
        &mut self,
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        frame_len: usize,
        l3: usize,
        ethertype: EtherType,
    ) -> Reading {
        if l3 != UNTAGGED && l3 != TAGGED {
            return Reading::Other;
        }
        let Some(window) = head.get(l3..).and_then(|bytes| bytes.first_chunk::<WINDOW_BYTES>()) else {
            return Reading::Other;
        };
        let (have, len) = (have.saturating_sub(l3), frame_len.saturating_sub(l3));
        match ethertype {
            EtherType::IPV4 => self.ipv4(window, have, len, l3),
            EtherType::IPV6 => self.ipv6(window, have, len, l3),
            _ => Reading::Other,
        }
    }

    /// `have` and `len`: bytes from the network header on that are at hand, and that the frame has.
    #[inline(always)]
    fn ipv4(&mut self, window: &Window, have: usize, len: usize, l3: usize) -> Reading {
        let (first, second, dst) = (u64_at(window, 0), u64_at(window, 8), u32_at(window, 16));
        let total_len = usize::from(((first >> 16) as u16).swap_bytes());
        let whole = ((first >> 48) as u16).swap_bytes() & 0x3fff == 0;
        // One's complement sum of the header, the checksum included: 2^16 - 1 divides it, and it is not 0.
        let low = |word: u64| word & 0xffff_ffff;
        let sum = low(first) + (first >> 32) + low(second) + (second >> 32) + u64::from(dst);
        let sum = low(sum) + (sum >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        if first as u8 != 0x45 || !whole || sum != 0xffff || total_len < 28 || total_len > len || have < 28 {
            return Reading::Other;
        }
        self.src = [0, MAPPED | (second >> 32) << 32];
        self.dst = [0, MAPPED | u64::from(dst) << 32];
        self.facts.ip_len = total_len as u32;
        self.transport::<20, 0>(window, have, total_len - 20, l3, (second >> 8) as u8)
    }

    #[inline(always)]
    fn ipv6(&mut self, window: &Window, have: usize, len: usize, l3: usize) -> Reading {
        let first = u64_at(window, 0);
        let payload_len = usize::from(((first >> 32) as u16).swap_bytes());
        if first as u8 >> 4 != 6 || payload_len < 8 || 40 + payload_len > len || have < 48 {
            return Reading::Other;
        }
        self.src = [u64_at(window, 8), u64_at(window, 16)];
        self.dst = [u64_at(window, 24), u64_at(window, 32)];
        self.facts.ip_len = 40 + payload_len as u32;
        self.transport::<40, V6>(window, have, payload_len, l3, (first >> 48) as u8)
    }

    /// The transport header behind an IP header of `AT` bytes; at least 8 bytes behind that are at hand, and belong to the packet.
    #[inline(always)]
    fn transport<const AT: usize, const FAMILY: u8>(
        &mut self,
        window: &Window,
        have: usize,
        len: usize,
        l3: usize,
        proto: u8,
    ) -> Reading {
        let first = u64_at(window, AT);
        let ports = ((first as u16).swap_bytes(), ((first >> 16) as u16).swap_bytes());
        self.talk = Talk::new(ports, proto, FAMILY, l3 + AT);
        self.len = len as u16;
        match IpProto(proto) {
            IpProto::UDP => {
                let udp_len = usize::from(((first >> 32) as u16).swap_bytes());
                self.unsummed = first >> 48 == 0;
                // What DHCP servers send is for the anti-spoofing rules to judge.
                let plain = udp_len >= 8 && udp_len <= len && ports != (67, 68) && ports != (547, 546);
                if plain { Reading::Plain } else { Reading::Named }
            }
            IpProto::TCP => {
                const NO_MATTER: Flags = Flags::PSH.union(Flags::ECE).union(Flags::CWR).union(Flags::URG);
                let third = u64_at(window, AT + 12);
                let header_len = usize::from(third as u8 >> 4) * 4;
                let flags = Flags::from_bits_retain((third >> 8) as u8);
                let usual_options = header_len == 20 || header_len == 32 && u32_at(window, AT + 20) == TIME_STAMP;
                self.unsummed = false;
                self.facts.seq = ((first >> 32) as u32).swap_bytes();
                self.facts.ack = u32_at(window, AT + 8).swap_bytes();
                self.facts.window = ((third >> 16) as u16).swap_bytes();
                self.facts.payload_len = len.wrapping_sub(header_len) as u16;
                let plain = flags.difference(NO_MATTER) == Flags::ACK
                    && usual_options
                    && header_len <= len
                    && AT + header_len <= have;
                if plain { Reading::Plain } else { Reading::Named }
            }
            _ => Reading::Other,
        }
    }

    /// TCP or UDP.
    #[inline(always)]
    pub fn proto(&self) -> IpProto {
        self.talk.proto()
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
    pub fn checksum_ok(&self, head: &[u8; SNAPSHOT_BYTES], have: usize, body: &Body<'_>) -> bool {
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
            return fold(sum + u64::from(pseudo.to_be())) == 0xffff;
        }
        let mut whole = Sum::new();
        whole.add_u16(u16::from_be(fold(sum)));
        whole.add_u16(pseudo);
        // What was read so far is an even number of bytes: the first byte of the rest is the first of a word.
        if (at_hand - from).is_multiple_of(2) {
            whole.add_body(&body.slice(0, rest as u32));
        } else {
            whole.add_body_at_odd(&body.slice(0, rest as u32));
        }
        whole.is_valid()
    }
}

/// Sum of 32-bit words in memory order of the bytes `from..to`, with zeros behind them; below 2^40.
#[inline(always)]
fn sum_of(head: &[u8; SNAPSHOT_BYTES], from: usize, to: usize) -> u64 {
    let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
    let Some(bytes) = head.get(from..to) else { return 0 };
    let (words, tail) = bytes.as_chunks::<8>();
    let mut sum = 0;
    for word in words {
        sum += halves(u64::from_ne_bytes(*word));
    }
    if !tail.is_empty() {
        // A word that begins with the tail; what lies behind it is shifted out.
        let at = to - tail.len();
        let word = match head.get(at..).and_then(|bytes| bytes.first_chunk::<8>()) {
            Some(word) => u64::from_le_bytes(*word) << (8 * (8 - tail.len())) >> (8 * (8 - tail.len())),
            None => tail.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
        };
        sum += halves(u64::from_ne_bytes(word.to_le_bytes()));
    }
    sum
}
