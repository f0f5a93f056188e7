//! Frames that tell the network where a VM is now, so that bridges and switches on the way learn its address
//! before the VM sends anything itself.
//!
//! Three forms, for what is known of the VM:
//! [`rarp`] for its MAC address alone (what QEMU's SEND_RARP asks for),
//! [`gratuitous_arp`] for an IPv4 address, [`unsolicited_na`] for an IPv6 address.
use std::net::{Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub type MacAddr = [u8; 6];

/// The broadcast address.
pub const BROADCAST: MacAddr = [0xff; 6];
/// Least length of a frame without its check sequence, bytes (IEEE 802.3, 3.2.8).
pub const MIN_FRAME_BYTES: usize = 60;

const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST_REVERSE: u16 = 3;
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const NA_OVERRIDE: u32 = 0x2000_0000;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;

/// True when a station may have this address: neither a group address nor all zero.
pub fn is_station(mac: &MacAddr) -> bool {
    mac[0] & 1 == 0 && mac != &[0; 6]
}

/// "Request reverse" (RFC 903), the station asking for its own protocol address, broadcast: 60 bytes, or 64 with a tag.
/// Nobody answers; every bridge on the way learns `mac`. The same frame as QEMU's own announcement, protocol addresses 0.
/// `vlan`: VLAN of an 802.1Q tag.
pub fn rarp(mac: MacAddr, vlan: Option<u16>) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    arp_like(ETHERTYPE_RARP, RARP_REQUEST_REVERSE, mac, (mac, none), (mac, none), vlan)
}

/// ARP announcement (RFC 5227, 3): a request with sender and target address both `ip`, target hardware address zero, broadcast.
pub fn gratuitous_arp(mac: MacAddr, ip: Ipv4Addr, vlan: Option<u16>) -> Vec<u8> {
    arp_like(ETHERTYPE_ARP, ARP_REQUEST, mac, (mac, ip), ([0; 6], ip), vlan)
}

/// Unsolicited neighbour advertisement (RFC 4861, 7.2.6) to all nodes: override set, solicited and router clear, with the target link-layer
/// address option. `ip` is also the source address.
pub fn unsolicited_na(mac: MacAddr, ip: Ipv6Addr, vlan: Option<u16>) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // RFC 2464, 7: group addresses map to 33:33 and the last four bytes.
    let mut icmp = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0];
    icmp.extend(NA_OVERRIDE.to_be_bytes());
    icmp.extend(ip.octets());
    icmp.extend([OPTION_TARGET_LINK_ADDRESS, 1]);
    icmp.extend(mac);
    let sum = checksum_ipv6(ip, all_nodes, ICMPV6, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, vlan, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((icmp.len() as u16).to_be_bytes());
    // RFC 4861, 7.1.2: a receiver discards the message unless the hop limit is 255.
    frame.extend([ICMPV6, 255]);
    frame.extend(ip.octets());
    frame.extend(all_nodes.octets());
    frame.extend(icmp);
    frame
}

fn ethernet(dst: MacAddr, src: MacAddr, vlan: Option<u16>, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(dst);
    frame.extend(src);
    if let Some(vid) = vlan {
        frame.extend(ETHERTYPE_VLAN.to_be_bytes());
        frame.extend((vid & 0x0fff).to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame
}

fn arp_like(
    ethertype: u16,
    operation: u16,
    src: MacAddr,
    sender: (MacAddr, Ipv4Addr),
    target: (MacAddr, Ipv4Addr),
    vlan: Option<u16>,
) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, src, vlan, ethertype);
    frame.extend(1u16.to_be_bytes()); // hardware: Ethernet
    frame.extend(0x0800u16.to_be_bytes()); // protocol: IPv4
    frame.extend([6, 4]);
    frame.extend(operation.to_be_bytes());
    for (mac, ip) in [sender, target] {
        frame.extend(mac);
        frame.extend(ip.octets());
    }
    frame.resize(MIN_FRAME_BYTES + if vlan.is_some() { 4 } else { 0 }, 0);
    frame
}

/// Internet checksum over the IPv6 pseudo-header (RFC 8200, 8.1) and `payload`.
fn checksum_ipv6(src: Ipv6Addr, dst: Ipv6Addr, next_header: u8, payload: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(40 + payload.len());
    bytes.extend(src.octets());
    bytes.extend(dst.octets());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, next_header]);
    bytes.extend(payload);
    let mut sum = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0)))
        .fold(0u32, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn rarp_is_qemus_frame() {
        // The layout of qemu_announce_self_create() in QEMU net/announce.c.
        let mut expected =
            hex("ffffffffffff 525400123456 8035 0001 0800 06 04 0003 525400123456 00000000 525400123456 00000000");
        expected.resize(60, 0);
        assert_eq!(rarp(MAC, None), expected);
    }

    #[test]
    fn a_tag_goes_between_source_and_type() {
        let plain = rarp(MAC, None);
        let tagged = rarp(MAC, Some(100));
        assert_eq!(tagged.len(), 64);
        assert_eq!(tagged[..12], plain[..12]);
        assert_eq!(tagged[12..16], hex("8100 0064"));
        assert_eq!(tagged[16..], plain[12..]);
    }

    #[test]
    fn gratuitous_arp_is_an_announcement() {
        let mut expected =
            hex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a000005 000000000000 0a000005");
        expected.resize(60, 0);
        assert_eq!(gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, 5), None), expected);
    }

    #[test]
    fn unsolicited_na_has_override_and_a_valid_checksum() {
        let ip: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        let frame = unsolicited_na(MAC, ip, None);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[..14], hex("333300000001 525400123456 86dd"));
        assert_eq!(frame[14..22], hex("60000000 0020 3a ff"));
        assert_eq!(frame[22..38], ip.octets());
        assert_eq!(frame[54..56], [136, 0]);
        assert_eq!(frame[58..62], hex("20000000"));
        assert_eq!(frame[62..78], ip.octets());
        assert_eq!(frame[78..], hex("0201 525400123456"));
        // A receiver sums everything, checksum included, to 0xffff.
        let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
        assert_eq!(checksum_ipv6(ip, all_nodes, ICMPV6, &frame[54..]), 0);
        let mut broken = frame.clone();
        broken[80] ^= 1;
        assert_ne!(checksum_ipv6(ip, all_nodes, ICMPV6, &broken[54..]), 0);
    }

    #[test]
    fn checksum_matches_a_known_message() {
        // RFC 1071's worked example, as the payload of an all-zero pseudo-header except length and next header.
        let payload = hex("0001 f203 f4f5 f6f7");
        let zero = Ipv6Addr::UNSPECIFIED;
        assert_eq!(checksum_ipv6(zero, zero, 0, &payload), !(0xddf2 + 8));
    }

    #[test]
    fn stations() {
        assert!(is_station(&MAC));
        assert!(!is_station(&BROADCAST));
        assert!(!is_station(&[0; 6]));
        assert!(!is_station(&[1, 0, 0x5e, 0, 0, 1]));
    }
}
