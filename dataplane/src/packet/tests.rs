//! Against frames built by an independent implementation, by hand, and at random.
use core::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::arp::{Arp, ArpPacket, Operation};
use super::ethernet::{Ethernet, EthernetHeader, EthernetMut};
use super::icmp::{self, Icmp, IcmpHeader};
use super::ipv4::{Ipv4, Ipv4Header, Ipv4Mut, Ipv4Option};
use super::ipv6::{Ipv6, Ipv6Header};
use super::sctp::{ChunkType, Sctp};
use super::tcp::{Flags, Tcp, TcpHeader, TcpOption};
use super::testdata::{SAMPLES, sample};
use super::udp::{Udp, UdpHeader};
use super::vlan::Vlan;
use super::*;

fn headers(name: &str) -> (Vec<u8>, Headers) {
    let frame = sample(name);
    let headers = parse(&frame, frame.len() as u32).unwrap();
    (frame, headers)
}

fn l3(frame: &[u8], headers: &Headers) -> Vec<u8> {
    frame[usize::from(headers.l3_offset().unwrap())..].to_vec()
}

fn l4(name: &str) -> Vec<u8> {
    let (frame, headers) = headers(name);
    frame[usize::from(headers.l4.unwrap().offset)..headers.l3_end() as usize].to_vec()
}

fn mac(text: &str) -> MacAddr {
    text.parse().unwrap()
}

#[test]
fn every_sample_is_found_as_built() {
    for s in SAMPLES {
        let frame = s.bytes();
        let headers = parse(&frame, frame.len() as u32).unwrap_or_else(|e| panic!("{}: {e}", s.name));
        assert_eq!(headers.l2.len, s.l2_len, "{}", s.name);
        assert_eq!(headers.l4.map(|l| (l.proto.0, l.offset, l.header_len)), s.l4, "{}", s.name);
        assert_eq!(headers.fragment, s.fragment, "{}", s.name);
        assert_eq!(headers.l2.src_mac, mac("52:54:00:00:00:0a"), "{}", s.name);
        assert_eq!(parse_l2(&frame, frame.len() as u32), Ok(headers.l2));
    }
}

#[test]
fn truncation_at_every_byte_is_need_more_or_malformed() {
    for s in SAMPLES {
        let frame = s.bytes();
        let len = frame.len() as u32;
        let whole = parse(&frame, len).unwrap();
        // What parsing must see: up to the end of the last header known.
        let reach = whole.l4.map_or_else(
            || match whole.l3 {
                L3::None => whole.l2.len.into(),
                L3::Arp { .. } => whole.l3_end(),
                L3::Ipv4 { offset } => u32::from(offset) + 20,
                L3::Ipv6 { .. } => u32::from(whole.fragment_header) + 8,
            },
            |l4| l4.payload_offset(),
        );
        for cut in 0..frame.len() {
            let snapshot = &frame[..cut];
            // The snapshot is short, the frame is not.
            match parse(snapshot, len) {
                Err(ParseError::NeedMore { bytes }) => {
                    assert!((cut as u32) < reach && bytes > cut as u32 && bytes <= reach, "{} at {cut}", s.name);
                }
                other => {
                    assert!(cut as u32 >= reach, "{} at {cut}: {other:?}", s.name);
                    assert_eq!(other, Ok(whole), "{} at {cut}", s.name);
                }
            }
            // The frame itself ends there: malformed, unless only padding (or a body not looked into) is missing.
            match parse(snapshot, cut as u32) {
                Ok(_) => assert!(cut as u32 >= whole.l3_end().max(reach), "{} at {cut}", s.name),
                Err(e) => assert!(!e.is_need_more(), "{} at {cut}", s.name),
            }
            flow_hash(snapshot);
        }
        // Asking for what it says is needed gets there in a few steps.
        let (mut have, mut steps) = (0, 0);
        while let Err(ParseError::NeedMore { bytes }) = parse(&frame[..have], len) {
            have = bytes as usize;
            steps += 1;
        }
        assert!(steps <= 12, "{}: {steps}", s.name);
        assert_eq!(have as u32, reach, "{}", s.name);
    }
}

#[test]
fn tags_are_read_outside_in() {
    let (frame, headers) = headers("QINQ_TCP6");
    let outer = headers.l2.vlan.unwrap();
    assert_eq!((outer.tpid, outer.tci.pcp(), outer.tci.vid().get()), (Tpid::Service, 1, 200));
    let inner = headers.l2.inner_vlan.unwrap();
    assert_eq!((inner.tpid, inner.tci.pcp(), inner.tci.vid().get()), (Tpid::Customer, 7, 4094));
    assert_eq!(headers.l2.ethertype, EtherType::IPV6);
    let eth = Ethernet::new(&frame).unwrap();
    assert_eq!(eth.ethertype(), EtherType::SVLAN);
    let tag = Vlan::new(eth.payload()).unwrap();
    assert_eq!((tag.tci(), tag.ethertype()), (outer.tci, EtherType::VLAN));
    assert_eq!(Vlan::new(tag.payload()).unwrap().ethertype(), EtherType::IPV6);
    assert_eq!(outer.to_bytes(), frame[12..16]);

    // A third tag is not looked into.
    let mut three = frame[..12].to_vec();
    for _ in 0..3 {
        three.extend([0x81, 0, 0, 9]);
    }
    three.extend([8, 0, 0x45]);
    let h = parse(&three, 100).unwrap();
    assert_eq!((h.l2.ethertype, h.l3, h.l2.len), (EtherType::VLAN, L3::None, 22));

    let (_, h) = self::headers("VLAN_UDP4");
    let tci = h.l2.vlan.unwrap().tci;
    assert_eq!((tci.pcp(), tci.dei(), tci.vid()), (5, true, VlanId::new(100).unwrap()));
    assert_eq!(Tci::new(5, true, VlanId::new(100).unwrap()), tci);
    assert_eq!(tci.with_vid(VlanId::new(7).unwrap()).vid().get(), 7);
    assert!(h.l2.inner_vlan.is_none());
}

#[test]
fn vlan_ids_are_checked() {
    assert_eq!(VlanId::new(4096), None);
    assert!(VlanId::try_from(65_535).is_err());
    assert_eq!(VlanId::new(4095).map(VlanId::is_usable), Some(false));
    assert_eq!(VlanId::new(4094).map(VlanId::is_usable), Some(true));
    assert!(!VlanId::NONE.is_usable());
}

#[test]
fn mac_addresses_read_and_write_themselves() {
    let m = MacAddr::new([0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
    assert_eq!(m.to_string(), "52:54:00:ab:cd:ef");
    assert_eq!(mac("52-54-00-AB-CD-EF"), m);
    assert_eq!(MacAddr::from_u64(m.as_u64() | 1 << 60), m);
    assert!(m.is_valid_source() && m.is_local() && !m.is_multicast());
    for bad in
        ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:00", "+2:54:00:ab:cd:ef", "52:54:00:ab-cd:ef", "525:4:0:ab:cd:ef"]
    {
        assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
    }
    assert!(MacAddr::BROADCAST.is_multicast() && MacAddr::BROADCAST.is_broadcast());
    assert!(!MacAddr::ZERO.is_valid_source() && !MacAddr::BROADCAST.is_valid_source());
    assert!(mac("01:80:c2:00:00:0e").is_link_local() && !mac("01:80:c2:00:00:10").is_link_local());
}

#[test]
fn arp_request_and_its_words() {
    let (frame, h) = headers("ARP_REQUEST");
    assert_eq!((h.l3, h.l3_total_len), (L3::Arp { offset: 14 }, 28));
    let arp = Arp::new(&frame[14..]).unwrap();
    assert_eq!(arp.operation(), Operation::REQUEST);
    assert_eq!((arp.sender_mac(), arp.sender_ip()), (mac("52:54:00:00:00:0a"), Ipv4Addr::new(10, 1, 2, 3)));
    assert_eq!((arp.target_mac(), arp.target_ip()), (MacAddr::ZERO, Ipv4Addr::new(10, 9, 8, 7)));
    assert!(!arp.is_gratuitous());
    assert_eq!(ArpPacket::from(arp).to_bytes(), frame[14..42]);
    let mut bad = frame;
    bad[18] = 8;
    assert_eq!(parse(&bad, bad.len() as u32), Err(ParseError::ArpFormat));
    // RARP is no concern of the parser; the view reads it.
    let (rarp, h) = headers("RARP");
    assert_eq!((h.l3, h.l2.ethertype), (L3::None, EtherType::RARP));
    assert_eq!(Arp::new(&rarp[14..]).unwrap().operation(), Operation::REVERSE_REQUEST);
}

#[test]
fn ipv4_fields_and_options() {
    let (frame, h) = headers("TCP4_IP_OPTIONS");
    let ip_bytes = l3(&frame, &h);
    let ip = Ipv4::new(&ip_bytes).unwrap();
    assert_eq!((ip.header_len(), ip.identification(), ip.ttl()), (24, 0x1234, 63));
    assert!(ip.checksum_ok());
    let options: Vec<_> = ip.options_iter().map(Result::unwrap).collect();
    assert_eq!(options, [Ipv4Option { kind: Ipv4Option::ROUTER_ALERT, data: &[0, 0] }]);
    assert_eq!(ip.payload().len(), usize::from(ip.total_len()) - 24);
    for at in 0..24 {
        let mut bad = ip_bytes.clone();
        bad[at] ^= 0x10;
        if let Ok(ip) = Ipv4::new(&bad) {
            assert!(!ip.checksum_ok(), "byte {at}");
        }
    }
    // A change in place, and its checksum.
    let mut changed = ip_bytes.clone();
    let mut edit = Ipv4Mut::new(&mut changed).unwrap();
    edit.set_ttl(1);
    edit.set_src(Ipv4Addr::new(1, 2, 3, 4));
    edit.fill_checksum();
    let ip = Ipv4::new(&changed).unwrap();
    assert!(ip.checksum_ok() && ip.ttl() == 1 && ip.src() == Ipv4Addr::new(1, 2, 3, 4));

    let (frame, h) = headers("TCP4_SYN");
    let ip_bytes = l3(&frame, &h);
    let ip = Ipv4::new(&ip_bytes).unwrap();
    assert!(ip.dont_fragment() && !ip.is_fragment());
    assert_eq!(Ipv4Header::from(ip).to_bytes(), ip_bytes[..20]);
    // Malformed options end the iteration with an error.
    let mut bad = vec![0x46; 1];
    bad.extend([0, 0, 24, 0, 0, 0, 0, 9, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 148, 5, 0, 0]);
    let ip = Ipv4::new(&bad).unwrap();
    assert_eq!(ip.options_iter().collect::<Vec<_>>(), [Err(ParseError::Ipv4Option)]);
}

#[test]
fn ipv4_malformations_have_names() {
    let frame = sample("TCP4_DATA_ODD");
    let len = frame.len() as u32;
    let with = |at: usize, bytes: &[u8]| {
        let mut f = frame.clone();
        f[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&f, len).map(|_| ())
    };
    assert_eq!(with(14, &[0x55]), Err(ParseError::Ipv4Version));
    assert_eq!(with(14, &[0x44]), Err(ParseError::Ipv4HeaderLength));
    assert_eq!(with(16, &[0, 19]), Err(ParseError::Ipv4TotalLength));
    assert_eq!(with(16, &[0, 39]), Err(ParseError::TcpTruncated));
    assert_eq!(with(16, &[0xff, 0xff]), Err(ParseError::Ipv4TotalLength));
    assert_eq!(with(46, &[0x40]), Err(ParseError::TcpDataOffset));
    assert_eq!(with(20, &[0x1f, 0xff]), Err(ParseError::FragmentOffset));
    assert_eq!(with(20, &[0, 1]), Err(ParseError::FragmentOverlap));
    assert_eq!(with(20, &[0, 3]), Ok(()));
    // A first fragment without the whole TCP header.
    let mut tiny = frame.clone();
    tiny[16..18].copy_from_slice(&[0, 28]);
    tiny[20] = 0x20;
    assert_eq!(parse(&tiny, len), Err(ParseError::TcpTruncated));
    // Data offset beyond the packet.
    let mut short = frame.clone();
    short[16..18].copy_from_slice(&[0, 40]);
    short[46] = 0xf0;
    assert_eq!(parse(&short, len), Err(ParseError::TcpDataOffset));
    let udp = sample("UDP4");
    for bad in [[0, 7], [0xff, 0]] {
        let mut f = udp.clone();
        f[38..40].copy_from_slice(&bad);
        assert_eq!(parse(&f, f.len() as u32), Err(ParseError::UdpLength));
    }
}

#[test]
fn ipv6_extension_headers_are_walked_and_bounded() {
    let (frame, h) = headers("UDP6_EXTENSIONS");
    let ip_bytes = l3(&frame, &h);
    let ip = Ipv6::new(&ip_bytes).unwrap();
    assert_eq!((ip.traffic_class(), ip.flow_label(), ip.hop_limit()), (0xb8, 0x12345, 63));
    assert_eq!(ip.src(), "2001:db8::1".parse::<Ipv6Addr>().unwrap());
    assert_eq!(ip.dst(), "2001:db8:1:2::beef".parse::<Ipv6Addr>().unwrap());
    assert_eq!(Ipv6Header::from(ip).to_bytes(), ip_bytes[..40]);
    let upper = ip.walk().unwrap();
    assert_eq!((upper.proto, upper.offset, upper.rerouted), (IpProto::UDP, 64, false));
    let (frame, h) = headers("TCP6_ROUTING");
    assert!(Ipv6::new(&l3(&frame, &h)).unwrap().walk().unwrap().rerouted);

    let chain = |kinds: &[u8]| {
        let mut f = sample("TCP6")[..14].to_vec();
        let (first, rest) = kinds.split_first().unwrap();
        let ip = Ipv6Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: (rest.len() * 8 + 8) as u16,
            next_header: IpProto(*first),
            hop_limit: 1,
            src: Ipv6Addr::LOCALHOST,
            dst: Ipv6Addr::LOCALHOST,
        };
        f.extend(ip.to_bytes());
        for next in rest {
            f.extend([*next, 0, 0, 0, 0, 0, 0, 0]);
        }
        f.extend([0, 1, 0, 2, 0, 8, 0, 0]);
        parse(&f, f.len() as u32).map(|h| h.l4.map(|l| (l.proto.0, l.offset)))
    };
    let mut most = vec![60; ipv6::MAX_EXTENSION_HEADERS];
    most.push(17);
    assert_eq!(chain(&most), Ok(Some((17, 14 + 40 + 64))));
    most.insert(0, 60);
    assert_eq!(chain(&most), Err(ParseError::Ipv6TooManyExtensions));
    assert_eq!(chain(&[60, 0, 17]), Err(ParseError::Ipv6ExtensionOrder));
    assert_eq!(chain(&[0, 60, 17]), Ok(Some((17, 70))));
    assert_eq!(chain(&[44, 44, 17]), Err(ParseError::Ipv6ExtensionOrder));
    // An atomic fragment (offset 0, M clear) is a whole packet.
    assert_eq!(chain(&[44, 17]), Ok(Some((17, 62))));
    assert_eq!(chain(&[59]), Ok(Some((59, 54))));
    // An extension header longer than the packet.
    let mut long = sample("UDP6_EXTENSIONS");
    long[14 + 40 + 1] = 200;
    assert_eq!(parse(&long, long.len() as u32), Err(ParseError::Ipv6ExtensionTruncated));
    let mut short = sample("TCP6");
    short[18..20].copy_from_slice(&[0, 200]);
    assert_eq!(parse(&short, short.len() as u32), Err(ParseError::Ipv6PayloadLength));
    short[14] = 0x45;
    assert_eq!(parse(&short, short.len() as u32), Err(ParseError::Ipv6Version));
}

#[test]
fn ipv6_fragments() {
    for (name, more, offset) in [("UDP6_FRAGMENT_FIRST", true, 0), ("UDP6_FRAGMENT_LATER", false, 72)] {
        let (frame, h) = headers(name);
        assert_eq!((h.fragment_header, h.ip_proto), (54, IpProto::UDP));
        let f = Ipv6::new(&l3(&frame, &h)).unwrap().walk().unwrap().fragment.unwrap();
        assert_eq!((f.header_offset, f.more, f.data_offset, f.identification), (40, more, offset, 0xdead_beef));
    }
}

#[test]
fn tcp_fields_and_options() {
    let bytes = l4("TCP4_SYN");
    let tcp = Tcp::new(&bytes).unwrap();
    assert_eq!((tcp.src_port(), tcp.dst_port(), tcp.seq(), tcp.window()), (40_000, 443, 0xffff_fff0, 64_240));
    assert_eq!(tcp.flags(), Flags::SYN);
    let options: Result<Vec<_>, _> = tcp.options_iter().collect();
    assert_eq!(
        options.unwrap(),
        [
            TcpOption::Mss(1460),
            TcpOption::SackPermitted,
            TcpOption::Timestamps { value: 0x0102_0304, echo: 0x0506_0708 },
            TcpOption::WindowScale(7),
        ]
    );
    for bad in [[2, 3, 0, 0], [3, 0, 0, 0], [8, 40, 0, 0], [254, 1, 0, 0]] {
        let mut f = bytes.clone();
        f[20..24].copy_from_slice(&bad);
        let options: Vec<_> = Tcp::new(&f).unwrap().options_iter().collect();
        assert_eq!(options, [Err(ParseError::TcpOption)]);
    }
    let plain = l4("TCP4_DATA_ODD");
    let tcp = Tcp::new(&plain).unwrap();
    assert_eq!((tcp.flags(), tcp.payload().len()), (Flags::PSH | Flags::ACK, 77));
    let mut expected = plain[..20].to_vec();
    expected[16..18].copy_from_slice(&[0, 0]);
    assert_eq!(TcpHeader::from(tcp).to_bytes(), expected[..]);
}

#[test]
fn icmp_errors_show_their_inner_packet() {
    let bytes = l4("ICMP4_FRAG_NEEDED");
    let icmp = Icmp::new(&bytes).unwrap();
    assert_eq!((icmp.kind(), icmp.code(), icmp.rest()), (3, icmp::v4::CODE_FRAGMENTATION_NEEDED, 1400));
    let inner = icmp.inner_v4().unwrap().unwrap();
    assert_eq!(inner.src, Ipv4Addr::new(10, 1, 2, 3));
    assert_eq!((inner.proto, inner.ports()), (IpProto::TCP, Some((40_000, 443))));
    // Only 8 bytes of the inner transport header, as RFC 792 has it.
    let icmp = Icmp::new(&bytes[..8 + 20 + 8]).unwrap();
    assert_eq!(icmp.inner_v4().unwrap().unwrap().ports(), Some((40_000, 443)));

    let bytes = l4("ICMP6_TOO_BIG");
    let icmp = Icmp::new(&bytes).unwrap();
    assert_eq!((icmp.kind(), icmp.rest()), (icmp::v6::PACKET_TOO_BIG, 1280));
    let inner = icmp.inner_v6().unwrap().unwrap();
    assert_eq!(inner.dst, "2001:db8::1".parse::<Ipv6Addr>().unwrap());
    assert_eq!((inner.proto, inner.ports()), (IpProto::UDP, Some((7, 8))));

    let bytes = l4("ICMP4_ECHO");
    let icmp = Icmp::new(&bytes).unwrap();
    assert!(icmp.inner_v4().is_none());
    assert_eq!((icmp.identifier(), icmp.sequence()), (0x4242, 3));
    assert_eq!(IcmpHeader::from(icmp).to_bytes()[4..], bytes[4..8]);
}

#[test]
fn neighbour_discovery() {
    let bytes = l4("ND_SOLICITATION");
    let nd = Icmp::new(&bytes).unwrap().nd().unwrap().unwrap();
    assert_eq!(nd.kind(), icmp::v6::NEIGHBOUR_SOLICITATION);
    assert_eq!(nd.target(), Some("fe80::b".parse().unwrap()));
    assert_eq!(nd.link_layer_address(), Some(mac("52:54:00:00:00:0a")));
    let bytes = l4("ND_ADVERTISEMENT");
    let nd = Icmp::new(&bytes).unwrap().nd().unwrap().unwrap();
    assert!(nd.is_solicited() && nd.is_override() && !nd.is_router());
    assert_eq!(nd.link_layer_address(), Some(mac("52:54:00:00:00:0b")));
    assert!(Icmp::new(&bytes[..20]).unwrap().nd().unwrap().is_err());
    let mut zero = bytes.clone();
    zero[25] = 0;
    let nd = Icmp::new(&zero).unwrap().nd().unwrap().unwrap();
    assert_eq!(nd.options().collect::<Vec<_>>(), [Err(ParseError::NdMalformed)]);
    assert_eq!(nd.link_layer_address(), None);
}

#[test]
fn sctp_chunks() {
    let bytes = l4("SCTP4_DATA");
    let sctp = Sctp::new(&bytes).unwrap();
    assert_eq!((sctp.src_port(), sctp.dst_port(), sctp.verification_tag()), (5000, 6000, 0x5566_7788));
    let chunks: Result<Vec<_>, _> = sctp.chunks().collect();
    let chunks = chunks.unwrap();
    assert_eq!(chunks.iter().map(|c| c.kind).collect::<Vec<_>>(), [ChunkType::SACK, ChunkType::DATA]);
    assert_eq!(&chunks[1].value[12..], b"hello");
    let bytes = l4("SCTP4_INIT");
    let first = Sctp::new(&bytes).unwrap().chunks().next().unwrap().unwrap();
    assert_eq!((first.kind, &first.value[..4]), (ChunkType::INIT, &[0x11, 0x22, 0x33, 0x44][..]));
    let mut bad = bytes;
    bad[14..16].copy_from_slice(&[0, 3]);
    assert_eq!(Sctp::new(&bad).unwrap().chunks().collect::<Vec<_>>(), [Err(ParseError::SctpChunk)]);
}

#[test]
fn flow_hash_follows_the_flow() {
    let tcp = sample("TCP4_SYN");
    let base = flow_hash(&tcp);
    let changed = |at: usize| {
        let mut f = tcp.clone();
        f[at] ^= 1;
        flow_hash(&f)
    };
    // Addresses, protocol and ports count; MAC addresses, TTL, sequence number do not.
    for at in [26, 29, 30, 33, 34, 35, 36, 37] {
        assert_ne!(changed(at), base, "byte {at}");
    }
    for at in [0, 5, 11, 22, 40] {
        assert_eq!(changed(at), base, "byte {at}");
    }
    // All fragments of a packet go one way.
    assert_eq!(flow_hash(&sample("UDP4_FRAGMENT_FIRST")), flow_hash(&sample("UDP4_FRAGMENT_LATER")));
    assert_eq!(flow_hash(&sample("UDP6_FRAGMENT_FIRST")), flow_hash(&sample("UDP6_FRAGMENT_LATER")));
    let lldp = sample("LLDP");
    assert_eq!(flow_hash(&lldp), flow_hash(&lldp[..14]));
    assert_ne!(flow_hash(&lldp), flow_hash(&sample("STP_LLC")));
    assert_eq!(flow_hash(&[]), 0);
    // Consecutive ports spread over eight queues.
    let mut queues = [0; 8];
    for port in 0..800u16 {
        let mut f = tcp.clone();
        f[34..36].copy_from_slice(&port.to_be_bytes());
        queues[(flow_hash(&f) & 7) as usize] += 1;
    }
    assert!(queues.iter().all(|n| (60..=140).contains(n)), "{queues:?}");
}

#[test]
fn mac_address_serialises_as_text_and_as_bytes() {
    use serde::de::value::{Error, StrDeserializer};
    use serde::{Deserialize, de::IntoDeserializer};
    let d: StrDeserializer<'_, Error> = "52:54:00:00:00:0a".into_deserializer();
    assert_eq!(MacAddr::deserialize(d), Ok(mac("52:54:00:00:00:0a")));
    let d: StrDeserializer<'_, Error> = "nonsense".into_deserializer();
    let message = MacAddr::deserialize(d).unwrap_err().to_string();
    assert!(message.contains("nonsense"), "{message}");
}

proptest! {
    #[test]
    fn any_bytes_parse_without_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        crate::fuzzing::parse(&data);
    }

    #[test]
    fn macs_round_trip(octets: [u8; 6]) {
        let m = MacAddr::new(octets);
        prop_assert_eq!(m.octets(), octets);
        prop_assert_eq!(m.to_string().parse::<MacAddr>(), Ok(m));
        prop_assert_eq!(MacAddr::from_u64(m.as_u64()), m);
    }

    #[test]
    fn ethernet_round_trips(dst: [u8; 6], src: [u8; 6], ethertype: u16) {
        let h = EthernetHeader { dst: dst.into(), src: src.into(), ethertype: EtherType(ethertype) };
        let mut bytes = h.to_bytes();
        prop_assert_eq!(EthernetHeader::from(Ethernet::new(&bytes).unwrap()), h);
        let mut view = EthernetMut::new(&mut bytes).unwrap();
        view.set_src(h.dst);
        view.set_dst(h.src);
        prop_assert_eq!(&bytes[..6], &src);
        prop_assert_eq!(&bytes[6..12], &dst);
    }

    #[test]
    fn arp_round_trips(op: u16, macs: [[u8; 6]; 2], ips: [u32; 2]) {
        let p = ArpPacket {
            operation: Operation(op),
            sender_mac: macs[0].into(),
            sender_ip: Ipv4Addr::from_bits(ips[0]),
            target_mac: macs[1].into(),
            target_ip: Ipv4Addr::from_bits(ips[1]),
        };
        prop_assert_eq!(ArpPacket::from(Arp::new(&p.to_bytes()).unwrap()), p);
    }

    #[test]
    fn ipv4_round_trips(traffic_class: u8, total_len in 20u16.., identification: u16, flags: [bool; 2],
                        offset in 0u16..8192, ttl: u8, proto: u8, src: u32, dst: u32) {
        let h = Ipv4Header {
            traffic_class, total_len, identification,
            dont_fragment: flags[0], more_fragments: flags[1], fragment_offset: offset * 8,
            ttl, proto: IpProto(proto), src: Ipv4Addr::from_bits(src), dst: Ipv4Addr::from_bits(dst),
        };
        let bytes = h.to_bytes();
        let view = Ipv4::new(&bytes).unwrap();
        prop_assert!(view.checksum_ok());
        prop_assert_eq!(crate::fuzzing::reference_sum(&bytes), 0xffff);
        prop_assert_eq!(Ipv4Header::from(view), h);
    }

    #[test]
    fn ipv6_round_trips(traffic_class: u8, flow_label in 0u32..1 << 20, payload_len: u16, next: u8, hop_limit: u8, src: u128, dst: u128) {
        let h = Ipv6Header {
            traffic_class, flow_label, payload_len, next_header: IpProto(next), hop_limit,
            src: Ipv6Addr::from_bits(src), dst: Ipv6Addr::from_bits(dst),
        };
        prop_assert_eq!(Ipv6Header::from(Ipv6::new(&h.to_bytes()).unwrap()), h);
    }

    #[test]
    fn transport_headers_round_trip(src_port: u16, dst_port: u16, seq: u32, ack: u32, flags: u8, window: u16, length in 8u16..) {
        let t = TcpHeader { src_port, dst_port, seq, ack, flags: Flags::from_bits_retain(flags), window };
        prop_assert_eq!(TcpHeader::from(Tcp::new(&t.to_bytes()).unwrap()), t);
        let u = UdpHeader { src_port, dst_port, length };
        prop_assert_eq!(UdpHeader::from(Udp::new(&u.to_bytes()).unwrap()), u);
        let i = IcmpHeader { kind: flags, code: window as u8, rest: seq };
        prop_assert_eq!(IcmpHeader::from(Icmp::new(&i.to_bytes()).unwrap()), i);
    }
}
