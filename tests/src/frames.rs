//! Frames for tests that send what no network stack would.
use std::net::{Ipv4Addr, Ipv6Addr};

/// The MAC address of guest n's NIC.
pub const fn guest_mac(n: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, n]
}

/// To everyone.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// Internet checksum (RFC 1071) over `bytes`, beginning with `start`.
fn checksum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|p| u32::from(p[0]) << 8 | p.get(1).copied().map_or(0, u32::from));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn words(bytes: &[u8]) -> u32 {
    u32::from(!checksum(bytes, 0))
}

/// A frame of this EtherType.
pub fn ethernet(src: [u8; 6], dst: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&dst[..], &src, &ethertype.to_be_bytes(), payload].concat()
}

/// An ARP reply that claims `address` for `mac` (RFC 826).
pub fn arp_reply(src: [u8; 6], mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 2];
    let body = [&head[..], &mac, &address.octets(), &BROADCAST, &address.octets()].concat();
    ethernet(src, BROADCAST, 0x0806, &body)
}

/// An IPv4 packet (RFC 791) in a frame.
pub fn ipv4(macs: ([u8; 6], [u8; 6]), src: Ipv4Addr, dst: Ipv4Addr, proto: u8, payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len() as u16).to_be_bytes();
    let mut head = [&[0x45, 0][..], &len, &[0, 7, 0x40, 0, 64, proto, 0, 0], &src.octets(), &dst.octets()].concat();
    let sum = checksum(&head, 0);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    ethernet(macs.0, macs.1, 0x0800, &[&head[..], payload].concat())
}

/// A UDP datagram (RFC 768) over IPv4.
pub fn udp(macs: ([u8; 6], [u8; 6]), src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), data: &[u8]) -> Vec<u8> {
    let len = 8 + data.len() as u16;
    let mut datagram = [&src.1.to_be_bytes()[..], &dst.1.to_be_bytes(), &len.to_be_bytes(), &[0, 0], data].concat();
    let sum = checksum(&datagram, words(&src.0.octets()) + words(&dst.0.octets()) + 17 + u32::from(len));
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    ipv4(macs, src.0, dst.0, 17, &datagram)
}

/// Where a [`syn`] has its source port and its checksum, bytes from the frame's start.
pub const SYN_PORT_AND_CHECKSUM: (usize, usize) = (34, 50);

/// A TCP segment that opens a connection (RFC 9293) over IPv4.
pub fn syn(macs: ([u8; 6], [u8; 6]), src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16)) -> Vec<u8> {
    let ports = [src.1.to_be_bytes(), dst.1.to_be_bytes()].concat();
    let mut segment = [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]].concat();
    let sum = checksum(&segment, words(&src.0.octets()) + words(&dst.0.octets()) + 6 + 20);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    ipv4(macs, src.0, dst.0, 6, &segment)
}

/// An ICMPv6 message (RFC 4443) with this hop limit.
pub fn icmpv6(macs: ([u8; 6], [u8; 6]), src: Ipv6Addr, dst: Ipv6Addr, hop_limit: u8, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let len = message.len() as u16;
    let sum = checksum(&message, words(&src.octets()) + words(&dst.octets()) + 58 + u32::from(len));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let head = [&[0x60, 0, 0, 0][..], &len.to_be_bytes(), &[58, hop_limit], &src.octets(), &dst.octets()].concat();
    ethernet(macs.0, macs.1, 0x86dd, &[&head[..], &message].concat())
}
