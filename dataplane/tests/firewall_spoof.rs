//! What a VM may send, case by case.
use std::net::{Ipv4Addr, Ipv6Addr};

use ferry_dataplane::firewall::spoof::{
    AddressPair, LinkLocal, SpoofConfig, SpoofReason, SpoofTable, eui64_link_local,
};
use ferry_dataplane::packet::{MacAddr, parse};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x0a];
const VIRTUAL_MAC: [u8; 6] = [0, 0, 0x5e, 0, 1, 5];
const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x0b];
const LINK_LOCAL: &str = "fe80::5054:ff:fe00:a";

fn config() -> SpoofConfig {
    SpoofConfig {
        mac: Some(MacAddr::new(MAC)),
        addresses: ["10.0.0.5", "2001:db8::5", "172.16.0.0/24"].map(|a| a.parse().unwrap()).into(),
        allowed_address_pairs: vec![
            AddressPair { address: "10.0.0.100".parse().unwrap(), mac: Some(MacAddr::new(VIRTUAL_MAC)) },
            AddressPair { address: "2001:db8::100".parse().unwrap(), mac: Some(MacAddr::new(VIRTUAL_MAC)) },
            AddressPair { address: "10.0.0.101".parse().unwrap(), mac: None },
        ],
        ..SpoofConfig::default()
    }
}

fn frame(src: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 0xff];
    frame.extend(src);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

fn tagged(mut frame: Vec<u8>) -> Vec<u8> {
    frame.splice(12..12, [0x88, 0xa8, 0, 7, 0x81, 0, 0, 9]);
    frame
}

fn ipv4(src: &str, dst: &str, proto: u8, payload: &[u8]) -> Vec<u8> {
    let (src, dst): (Ipv4Addr, Ipv4Addr) = (src.parse().unwrap(), dst.parse().unwrap());
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0];
    packet[2..4].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
    packet.extend(src.octets());
    packet.extend(dst.octets());
    packet.extend(payload);
    packet
}

fn ipv6(src: &str, dst: &str, proto: u8, payload: &[u8]) -> Vec<u8> {
    let (src, dst): (Ipv6Addr, Ipv6Addr) = (src.parse().unwrap(), dst.parse().unwrap());
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, proto, 255];
    packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend(src.octets());
    packet.extend(dst.octets());
    packet.extend(payload);
    packet
}

fn udp(src: u16, dst: u16) -> Vec<u8> {
    [src.to_be_bytes(), dst.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat()
}

fn arp(operation: u8, mac: [u8; 6], ip: &str, target_mac: [u8; 6], target: &str) -> Vec<u8> {
    let (ip, target): (Ipv4Addr, Ipv4Addr) = (ip.parse().unwrap(), target.parse().unwrap());
    [&[0, 1, 8, 0, 6, 4, 0, operation][..], &mac, &ip.octets(), &target_mac, &target.octets()].concat()
}

/// A neighbour solicitation or advertisement with options.
fn nd(kind: u8, target: &str, options: &[u8]) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), options].concat()
}

fn link_option(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

fn check(table: &SpoofTable, frame: &[u8]) -> Result<(), SpoofReason> {
    let head = &frame[..frame.len().min(128)];
    let headers = parse(head, frame.len() as u32).unwrap_or_else(|e| panic!("{e}: {frame:02x?}"));
    table.check(head, &headers)
}

#[track_caller]
fn expect(table: &SpoofTable, frame: Vec<u8>, expected: Result<(), SpoofReason>) {
    assert_eq!(check(table, &frame), expected, "{frame:02x?}");
    // Tags change nothing.
    assert_eq!(check(table, &tagged(frame.clone())), expected, "tagged {frame:02x?}");
}

#[test]
fn source_addresses() {
    let table = &SpoofTable::new(&config(), 1);
    let v4 = |mac, src| frame(mac, 0x0800, &ipv4(src, "203.0.113.1", 17, &udp(1000, 53)));
    let v6 = |mac, src| frame(mac, 0x86dd, &ipv6(src, "2001:db8::1", 17, &udp(1000, 53)));
    use SpoofReason as R;
    for (mac, src, expected) in [
        (MAC, "10.0.0.5", Ok(())),
        (MAC, "172.16.0.77", Ok(())),
        (MAC, "10.0.0.101", Ok(())),
        (VIRTUAL_MAC, "10.0.0.100", Ok(())),
        (MAC, "10.0.0.100", Err(R::SourceIpv4)),
        (VIRTUAL_MAC, "10.0.0.5", Err(R::SourceIpv4)),
        (MAC, "10.0.0.6", Err(R::SourceIpv4)),
        (MAC, "172.16.1.0", Err(R::SourceIpv4)),
        (OTHER_MAC, "10.0.0.5", Err(R::SourceMac)),
        ([0; 6], "10.0.0.5", Err(R::SourceMac)),
        ([0xff; 6], "10.0.0.5", Err(R::SourceMac)),
        (MAC, "0.0.0.0", Err(R::UnspecifiedIpv4)),
        (MAC, "127.0.0.1", Err(R::MartianSource)),
        (MAC, "0.0.0.1", Err(R::MartianSource)),
        (MAC, "224.0.0.1", Err(R::MartianSource)),
        (MAC, "255.255.255.255", Err(R::MartianSource)),
    ] {
        expect(table, v4(mac, src), expected);
    }
    for (mac, src, expected) in [
        (MAC, "2001:db8::5", Ok(())),
        (MAC, LINK_LOCAL, Ok(())),
        (VIRTUAL_MAC, "2001:db8::100", Ok(())),
        (VIRTUAL_MAC, "fe80::200:5eff:fe00:105", Ok(())),
        (MAC, "2001:db8::100", Err(R::SourceIpv6)),
        (MAC, "2001:db8::6", Err(R::SourceIpv6)),
        (MAC, "fe80::1", Err(R::SourceIpv6)),
        (MAC, "fe80::5054:ff:fe00:b", Err(R::SourceIpv6)),
        (OTHER_MAC, "2001:db8::5", Err(R::SourceMac)),
        (MAC, "::", Err(R::UnspecifiedIpv6)),
        (MAC, "::1", Err(R::MartianSource)),
        (MAC, "ff02::1", Err(R::MartianSource)),
        (MAC, "::ffff:10.0.0.5", Err(R::MartianSource)),
    ] {
        expect(table, v6(mac, src), expected);
    }
    // Other protocols: the MAC address.
    expect(table, frame(MAC, 0x88cc, &[0; 46]), Ok(()));
    expect(table, frame(OTHER_MAC, 0x88cc, &[0; 46]), Err(R::SourceMac));
}

#[test]
fn link_local_choices() {
    assert_eq!(eui64_link_local(MacAddr::new(MAC)).to_string(), LINK_LOCAL);
    // RFC 4291, appendix A: the universal/local bit is inverted.
    assert_eq!(eui64_link_local("34:56:78:9a:bc:de".parse().unwrap()).to_string(), "fe80::3656:78ff:fe9a:bcde");
    let from = |src| frame(MAC, 0x86dd, &ipv6(src, "2001:db8::1", 17, &udp(1000, 53)));
    for (choice, own, random) in
        [(LinkLocal::Eui64, true, false), (LinkLocal::Any, true, true), (LinkLocal::None, false, false)]
    {
        let table = SpoofTable::new(&SpoofConfig { ipv6_link_local: choice, ..config() }, 1);
        assert_eq!(check(&table, &from(LINK_LOCAL)).is_ok(), own, "{choice:?}");
        assert_eq!(check(&table, &from("fe80::1234:5678:9abc:def0")).is_ok(), random, "{choice:?}");
        assert!(check(&table, &from("fe80:1::1")).is_err(), "outside of fe80::/64");
    }
}

#[test]
fn a_vm_without_an_address_may_ask_for_one() {
    let table = &SpoofTable::new(&config(), 1);
    let dhcp = |src, dst, from, to| frame(MAC, 0x0800, &ipv4(src, dst, 17, &udp(from, to)));
    expect(table, dhcp("0.0.0.0", "255.255.255.255", 68, 67), Ok(()));
    expect(table, dhcp("0.0.0.0", "10.0.0.1", 68, 67), Err(SpoofReason::UnspecifiedIpv4));
    expect(table, dhcp("0.0.0.0", "255.255.255.255", 68, 68), Err(SpoofReason::UnspecifiedIpv4));
    expect(table, dhcp("0.0.0.0", "255.255.255.255", 67, 68), Err(SpoofReason::UnspecifiedIpv4));
    expect(table, dhcp("10.0.0.5", "10.0.0.1", 68, 67), Ok(()));
    let tcp = [&udp(68, 67)[..4], &[0; 8], &[0x50, 2, 0, 0, 0, 0, 0, 0]].concat();
    expect(table, frame(MAC, 0x0800, &ipv4("0.0.0.0", "255.255.255.255", 6, &tcp)), Err(SpoofReason::UnspecifiedIpv4));
    // A DHCP request of another VM.
    expect(
        table,
        frame(OTHER_MAC, 0x0800, &ipv4("0.0.0.0", "255.255.255.255", 17, &udp(68, 67))),
        Err(SpoofReason::SourceMac),
    );
}

#[test]
fn servers_are_refused_unless_allowed() {
    let guarded = SpoofTable::new(&config(), 1);
    let open = SpoofConfig {
        allow_dhcp_server: true,
        allow_dhcpv6_server: true,
        allow_router_advertisements: true,
        ..config()
    };
    let open = SpoofTable::new(&open, 1);
    let offer = frame(MAC, 0x0800, &ipv4("10.0.0.5", "255.255.255.255", 17, &udp(67, 68)));
    let reply = frame(MAC, 0x86dd, &ipv6(LINK_LOCAL, "fe80::1", 17, &udp(547, 546)));
    let advertisement =
        [&[134, 0, 0, 0, 64, 0, 0, 30][..], &[0; 8], &link_option(1, MAC), &[5, 1, 0, 0, 0, 0, 5, 220]].concat();
    let advertisement = frame(MAC, 0x86dd, &ipv6(LINK_LOCAL, "ff02::1", 58, &advertisement));
    let redirect = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &[0x20; 32], &link_option(2, OTHER_MAC)].concat();
    let redirect = frame(MAC, 0x86dd, &ipv6(LINK_LOCAL, "2001:db8::9", 58, &redirect));
    for (frame, reason) in [
        (offer, SpoofReason::DhcpServer),
        (reply, SpoofReason::Dhcpv6Server),
        (advertisement.clone(), SpoofReason::RouterAdvertisement),
        (redirect, SpoofReason::Redirect),
    ] {
        expect(&guarded, frame.clone(), Err(reason));
        expect(&open, frame, Ok(()));
    }
    // A router that is allowed may still not give another's link-layer address.
    let mut forged = advertisement;
    let at = forged.windows(6).rposition(|w| w == MAC).unwrap();
    forged[at..at + 6].copy_from_slice(&OTHER_MAC);
    expect(&open, forged, Err(SpoofReason::NdLinkLayer));
    // Behind an extension header (RFC 7113).
    let hidden = [&[58, 0, 0, 0, 0, 0, 0, 0][..], &[134, 0, 0, 0, 64, 0, 0, 30], &[0; 8]].concat();
    expect(
        &guarded,
        frame(MAC, 0x86dd, &ipv6(LINK_LOCAL, "ff02::1", 60, &hidden)),
        Err(SpoofReason::RouterAdvertisement),
    );
    // In fragments (RFC 6980), also for those who may advertise.
    let first = [&[58, 0, 0, 1, 0, 0, 0, 9][..], &[134, 0, 0, 0, 64, 0, 0, 30], &[0; 8]].concat();
    let first = frame(MAC, 0x86dd, &ipv6(LINK_LOCAL, "ff02::1", 44, &first));
    expect(&guarded, first.clone(), Err(SpoofReason::NdFragmented));
    expect(&open, first, Err(SpoofReason::NdFragmented));
}

#[test]
fn arp_senders() {
    let table = &SpoofTable::new(&config(), 1);
    use SpoofReason as R;
    let send = |src, packet: Vec<u8>| frame(src, 0x0806, &packet);
    let none = [0; 6];
    for (src, packet, expected) in [
        (MAC, arp(1, MAC, "10.0.0.5", none, "10.0.0.1"), Ok(())),
        (MAC, arp(2, MAC, "10.0.0.5", OTHER_MAC, "10.0.0.1"), Ok(())),
        (MAC, arp(1, MAC, "172.16.0.3", none, "172.16.0.1"), Ok(())),
        // Gratuitous.
        (MAC, arp(1, MAC, "10.0.0.5", none, "10.0.0.5"), Ok(())),
        (MAC, arp(1, MAC, "10.0.0.1", none, "10.0.0.1"), Err(R::ArpSenderAddress)),
        (MAC, arp(2, MAC, "10.0.0.1", OTHER_MAC, "10.0.0.9"), Err(R::ArpSenderAddress)),
        (MAC, arp(2, OTHER_MAC, "10.0.0.5", OTHER_MAC, "10.0.0.9"), Err(R::ArpSenderMac)),
        // VRRP: the virtual address goes with the virtual MAC address, whichever one sends.
        (MAC, arp(2, VIRTUAL_MAC, "10.0.0.100", OTHER_MAC, "10.0.0.9"), Ok(())),
        (VIRTUAL_MAC, arp(2, VIRTUAL_MAC, "10.0.0.100", OTHER_MAC, "10.0.0.9"), Ok(())),
        (MAC, arp(2, MAC, "10.0.0.100", OTHER_MAC, "10.0.0.9"), Err(R::ArpSenderAddress)),
        // Probes (RFC 5227).
        (MAC, arp(1, MAC, "0.0.0.0", none, "10.0.0.5"), Ok(())),
        (MAC, arp(1, MAC, "0.0.0.0", none, "10.0.0.6"), Err(R::ArpSenderAddress)),
        (MAC, arp(2, MAC, "0.0.0.0", none, "10.0.0.5"), Err(R::ArpSenderAddress)),
        (MAC, arp(3, MAC, "10.0.0.5", MAC, "10.0.0.5"), Err(R::ArpMalformed)),
        (OTHER_MAC, arp(1, MAC, "10.0.0.5", none, "10.0.0.1"), Err(R::SourceMac)),
    ] {
        expect(table, send(src, packet), expected);
    }
    let rarp = |operation, sender, target| frame(MAC, 0x8035, &arp(operation, sender, "0.0.0.0", target, "0.0.0.0"));
    expect(table, rarp(3, MAC, MAC), Ok(()));
    expect(table, rarp(3, OTHER_MAC, MAC), Err(R::ArpSenderMac));
    expect(table, rarp(3, MAC, OTHER_MAC), Err(R::ArpSenderMac));
    expect(table, rarp(4, MAC, MAC), Err(R::ArpMalformed));
    expect(table, frame(MAC, 0x8035, &[0; 20]), Err(R::ArpMalformed));
}

#[test]
fn neighbour_discovery() {
    let table = &SpoofTable::new(&config(), 1);
    use SpoofReason as R;
    let send = |src, dst, message: &[u8]| frame(MAC, 0x86dd, &ipv6(src, dst, 58, message));
    let solicited = |last: &str| -> &str { format!("ff02::1:ff00:{last}").leak() };
    let (sll, other_sll) = (link_option(1, MAC), link_option(1, OTHER_MAC));
    let (tll, other_tll) = (link_option(2, MAC), link_option(2, OTHER_MAC));
    for (src, dst, message, expected) in [
        // Asking for a neighbour: any target.
        ("2001:db8::5", solicited("9"), nd(135, "2001:db8::9", &sll), Ok(())),
        ("2001:db8::5", "2001:db8::9", nd(135, "2001:db8::9", &[]), Ok(())),
        ("2001:db8::5", solicited("9"), nd(135, "2001:db8::9", &other_sll), Err(R::NdLinkLayer)),
        ("2001:db8::6", solicited("9"), nd(135, "2001:db8::9", &sll), Err(R::SourceIpv6)),
        // The second option is looked at as well.
        ("2001:db8::5", solicited("9"), nd(135, "2001:db8::9", &[&sll[..], &other_sll].concat()), Err(R::NdLinkLayer)),
        // Duplicate address detection: one's own, to the solicited-node address, without option.
        ("::", solicited("5"), nd(135, "2001:db8::5", &[]), Ok(())),
        ("::", solicited("a"), nd(135, LINK_LOCAL, &[]), Ok(())),
        ("::", solicited("100"), nd(135, "2001:db8::100", &[]), Ok(())),
        ("::", solicited("6"), nd(135, "2001:db8::6", &[]), Err(R::NdTarget)),
        ("::", "ff02::1", nd(135, "2001:db8::5", &[]), Err(R::UnspecifiedIpv6)),
        ("::", solicited("5"), nd(135, "2001:db8::5", &sll), Err(R::NdLinkLayer)),
        // Telling: only of one's own addresses, only one's own link-layer address that goes with it.
        ("2001:db8::5", "2001:db8::9", nd(136, "2001:db8::5", &tll), Ok(())),
        (LINK_LOCAL, "ff02::1", nd(136, "2001:db8::5", &tll), Ok(())),
        ("2001:db8::5", "2001:db8::9", nd(136, "2001:db8::1", &tll), Err(R::NdTarget)),
        ("2001:db8::5", "2001:db8::9", nd(136, "2001:db8::5", &other_tll), Err(R::NdLinkLayer)),
        ("2001:db8::5", "ff02::1", nd(136, "2001:db8::100", &link_option(2, VIRTUAL_MAC)), Ok(())),
        ("2001:db8::5", "ff02::1", nd(136, "2001:db8::100", &tll), Err(R::NdLinkLayer)),
        ("2001:db8::5", "ff02::1", nd(136, "2001:db8::5", &other_sll), Err(R::NdLinkLayer)),
        ("::", "ff02::1", nd(136, "2001:db8::5", &tll), Err(R::UnspecifiedIpv6)),
        // Routers are solicited with or without an address.
        (LINK_LOCAL, "ff02::2", [&[133, 0, 0, 0, 0, 0, 0, 0][..], &sll].concat(), Ok(())),
        ("::", "ff02::2", vec![133, 0, 0, 0, 0, 0, 0, 0], Ok(())),
        (LINK_LOCAL, "ff02::2", [&[133, 0, 0, 0, 0, 0, 0, 0][..], &other_sll].concat(), Err(R::NdLinkLayer)),
        ("::", "ff02::2", [&[133, 0, 0, 0, 0, 0, 0, 0][..], &sll].concat(), Err(R::NdLinkLayer)),
        // What cannot be read.
        ("2001:db8::5", "2001:db8::9", vec![135, 0, 0, 0, 0, 0, 0, 0, 1, 2], Err(R::NdMalformed)),
        ("2001:db8::5", "2001:db8::9", nd(135, "2001:db8::9", &[1, 0, 1, 2, 3, 4, 5, 6]), Err(R::NdMalformed)),
        ("2001:db8::5", "2001:db8::9", nd(135, "2001:db8::9", &[1, 9, 1, 2, 3, 4, 5, 6]), Err(R::NdMalformed)),
        (
            "2001:db8::5",
            "2001:db8::9",
            nd(136, "2001:db8::5", &[&[2, 2][..], &MAC, &[0; 8]].concat()),
            Err(R::NdLinkLayer),
        ),
        // Longer than the copy that is at hand: something may hide there.
        (
            "2001:db8::5",
            "2001:db8::9",
            nd(135, "2001:db8::9", &[[14, 1, 0, 0, 0, 0, 0, 0]; 9].concat()),
            Err(R::NdMalformed),
        ),
        // Reports before there is an address (RFC 3590).
        ("::", "ff02::16", vec![143, 0, 0, 0, 0, 0, 0, 0], Ok(())),
        ("::", "2001:db8::9", vec![128, 0, 0, 0, 0, 0, 0, 0], Err(R::UnspecifiedIpv6)),
        ("2001:db8::5", "2001:db8::9", vec![128, 0, 0, 0, 0, 0, 0, 0], Ok(())),
    ] {
        expect(table, send(src, dst, &message), expected);
    }
    let mut forwarded = send("2001:db8::5", "2001:db8::9", &nd(136, "2001:db8::5", &tll));
    forwarded[14 + 7] = 254;
    expect(table, forwarded, Err(R::NdHopLimit));
}

#[test]
fn switched_off_it_lets_everything_pass() {
    let table = SpoofTable::new(&SpoofConfig { enabled: false, ..SpoofConfig::default() }, 1);
    expect(&table, frame(OTHER_MAC, 0x0800, &ipv4("127.0.0.1", "203.0.113.1", 17, &udp(67, 68))), Ok(()));
}

/// Without any address a VM can still ask for one, and nothing else.
#[test]
fn a_port_without_addresses_is_silent() {
    let table = SpoofTable::new(&SpoofConfig { mac: Some(MacAddr::new(MAC)), ..SpoofConfig::default() }, 1);
    expect(&table, frame(MAC, 0x0800, &ipv4("10.0.0.5", "10.0.0.1", 17, &udp(1, 2))), Err(SpoofReason::SourceIpv4));
    expect(&table, frame(MAC, 0x0800, &ipv4("0.0.0.0", "255.255.255.255", 17, &udp(68, 67))), Ok(()));
}

/// Any prefix of any frame, and any byte changed: an answer, never a panic, and never a pass for a wrong MAC address.
#[test]
fn damaged_frames_are_judged_too() {
    let table = SpoofTable::new(&config(), 1);
    let frames = [
        frame(MAC, 0x86dd, &ipv6("2001:db8::5", "2001:db8::9", 58, &nd(136, "2001:db8::5", &link_option(2, MAC)))),
        frame(MAC, 0x0806, &arp(1, MAC, "10.0.0.5", [0; 6], "10.0.0.1")),
        tagged(frame(MAC, 0x0800, &ipv4("10.0.0.5", "10.0.0.1", 17, &udp(1, 2)))),
    ];
    let mut judged = 0;
    for frame in frames {
        for len in 0..=frame.len() {
            for i in 0..len {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut damaged = frame[..len].to_vec();
                    damaged[i] = value;
                    if let Ok(headers) = parse(&damaged, len as u32) {
                        judged += 1;
                        let passed = table.check(&damaged, &headers).is_ok();
                        assert!(!passed || [MAC, VIRTUAL_MAC].contains(&headers.l2.src_mac.octets()));
                    }
                }
            }
        }
    }
    assert!(judged > 1000);
}

#[test]
fn reasons_have_names_of_their_own() {
    let names: std::collections::BTreeSet<_> = SpoofReason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(names.len(), SpoofReason::COUNT);
    assert!(names.iter().all(|n| n.starts_with("spoof_")));
}
