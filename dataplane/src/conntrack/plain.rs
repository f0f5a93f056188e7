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
use crate::offload::checksum::Sum;
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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain {
    /// Addresses as they stand in a key.
    src: [u64; 2],
    dst: [u64; 2],
    src_port: u16,
    dst_port: u16,
    pub proto: IpProto,
    ipv6: bool,
    /// UDP without checksum.
    unsummed: bool,
    /// Where addresses and transport header begin, bytes from the frame's start.
    addresses_at: u16,
    at: u16,
    /// Length of transport header and payload, bytes.
    len: u16,
    /// Length of the IP packet, bytes.
    pub ip_len: u32,
    seq: u32,
    ack: u32,
    window: u16,
    payload_len: u16,
}

impl Default for Plain {
    fn default() -> Self {
        Self {
            src: [0; 2],
            dst: [0; 2],
            src_port: 0,
            dst_port: 0,
            proto: IpProto(0),
            ipv6: false,
            unsummed: false,
            addresses_at: 0,
            at: 0,
            len: 0,
            ip_len: 0,
            seq: 0,
            ack: 0,
            window: 0,
            payload_len: 0,
        }
    }
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
    /// Reads the frame of `frame_len` bytes of which `head` has the first `have`, with the network header at `l3`. False: not plain, and
    /// what it holds now means nothing.
    #[inline(always)]
    pub fn read(
        &mut self,
        head: &[u8; SNAPSHOT_BYTES],
        have: usize,
        frame_len: usize,
        l3: usize,
        ethertype: EtherType,
    ) -> bool {
        if l3 != UNTAGGED && l3 != TAGGED {
            return false;
        }
        let Some(window) = head.get(l3..).and_then(|bytes| bytes.first_chunk::<WINDOW_BYTES>()) else { return false };
        let (have, len) = (have.saturating_sub(l3), frame_len.saturating_sub(l3));
        match ethertype {
            EtherType::IPV4 => self.ipv4(window, have, len, l3),
            EtherType::IPV6 => self.ipv6(window, have, len, l3),
            _ => false,
        }
    }

    /// `have` and `len`: bytes from the network header on that are at hand, and that the frame has.
    #[inline(always)]
    fn ipv4(&mut self, window: &Window, have: usize, len: usize, l3: usize) -> bool {
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
            return false;
        }
        self.src = [0, MAPPED | (second >> 32) << 32];
        self.dst = [0, MAPPED | u64::from(dst) << 32];
        self.proto = IpProto((second >> 8) as u8);
        self.ipv6 = false;
        self.addresses_at = l3 as u16 + 12;
        self.ip_len = total_len as u32;
        self.transport::<20>(window, have, total_len - 20, l3)
    }

    #[inline(always)]
    fn ipv6(&mut self, window: &Window, have: usize, len: usize, l3: usize) -> bool {
        let first = u64_at(window, 0);
        let payload_len = usize::from(((first >> 32) as u16).swap_bytes());
        if first as u8 >> 4 != 6 || payload_len < 8 || 40 + payload_len > len || have < 48 {
            return false;
        }
        self.src = [u64_at(window, 8), u64_at(window, 16)];
        self.dst = [u64_at(window, 24), u64_at(window, 32)];
        self.proto = IpProto((first >> 48) as u8);
        self.ipv6 = true;
        self.addresses_at = l3 as u16 + 8;
        self.ip_len = 40 + payload_len as u32;
        self.transport::<40>(window, have, payload_len, l3)
    }

    /// The transport header behind an IP header of `AT` bytes; at least 8 bytes behind that are at hand, and belong to the packet.
    #[inline(always)]
    fn transport<const AT: usize>(&mut self, window: &Window, have: usize, len: usize, l3: usize) -> bool {
        let first = u64_at(window, AT);
        let ports = ((first as u16).swap_bytes(), ((first >> 16) as u16).swap_bytes());
        (self.src_port, self.dst_port) = ports;
        self.at = (l3 + AT) as u16;
        self.len = len as u16;
        match self.proto {
            IpProto::UDP => {
                let udp_len = usize::from(((first >> 32) as u16).swap_bytes());
                self.unsummed = first >> 48 == 0;
                // What DHCP servers send is for the anti-spoofing rules to judge.
                udp_len >= 8 && udp_len <= len && ports != (67, 68) && ports != (547, 546)
            }
            IpProto::TCP => {
                const NO_MATTER: Flags = Flags::PSH.union(Flags::ECE).union(Flags::CWR).union(Flags::URG);
                let third = u64_at(window, AT + 12);
                let header_len = usize::from(third as u8 >> 4) * 4;
                let flags = Flags::from_bits_retain((third >> 8) as u8);
                let usual_options = header_len == 20 || header_len == 32 && u32_at(window, AT + 20) == TIME_STAMP;
                self.unsummed = false;
                self.seq = ((first >> 32) as u32).swap_bytes();
                self.ack = u32_at(window, AT + 8).swap_bytes();
                self.window = ((third >> 16) as u16).swap_bytes();
                self.payload_len = len.wrapping_sub(header_len) as u16;
                flags.difference(NO_MATTER) == Flags::ACK
                    && usual_options
                    && header_len <= len
                    && AT + header_len <= have
            }
            _ => false,
        }
    }

    /// `offload` says that the checksum is owed, where it is, and nothing else.
    #[inline(always)]
    pub fn owes_checksum(&self, offload: &Offload) -> bool {
        let field = if self.proto == IpProto::TCP { tcp::CHECKSUM_OFFSET } else { udp::CHECKSUM_OFFSET };
        offload.needs_csum && offload.gso == Gso::None && offload.csum_start == self.at && offload.csum_offset == field
    }

    /// The words of its key, seen from a VM that it goes to or comes from.
    #[inline(always)]
    pub fn key(&self, toward: Toward, zone: u16) -> KeyWords {
        let (local, remote, local_port, remote_port) = match toward {
            Toward::Ingress => (self.dst, self.src, self.dst_port, self.src_port),
            Toward::Egress => (self.src, self.dst, self.src_port, self.dst_port),
        };
        let flags = if self.ipv6 { V6 } else { 0 };
        let rest = u64::from(local_port)
            | u64::from(remote_port) << 16
            | u64::from(zone) << 32
            | u64::from(self.proto.0) << 48
            | u64::from(flags) << 56;
        let ([a, b], [c, d]) = (local, remote);
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
        if self.ipv6 {
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

    /// The transport checksum is right, or there is none. `head`: as was read; `body`: what follows it.
    #[inline]
    pub fn checksum_ok(&self, head: &[u8], body: &Body<'_>) -> bool {
        if self.unsummed {
            return true;
        }
        let (addresses_at, at, len) = (usize::from(self.addresses_at), usize::from(self.at), usize::from(self.len));
        let addresses = if self.ipv6 { 32 } else { 8 };
        let Some(addresses) = head.get(addresses_at..addresses_at + addresses) else { return false };
        let rest = head.get(at..).unwrap_or_default();
        let in_head = rest.get(..len).unwrap_or(rest);
        let mut sum = Sum::new();
        sum.add_bytes(addresses);
        sum.add_u16(u16::from(self.proto.0));
        sum.add_u16(self.len);
        sum.add_bytes(in_head);
        if in_head.len() < len {
            sum.add_body(&body.slice(0, (len - in_head.len()) as u32));
        }
        sum.is_valid()
    }
}
