//! Against sums and segments computed by an independent implementation, and at random.
use core::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::checksum::*;
use super::*;
use crate::frame::{BURST_SEGMENTS, Body, Gso, MAX_FRAME_BYTES, Offload, SNAPSHOT_BYTES};
use crate::fuzzing::{OwnedFrame, reference_pseudo_sum, reference_sum};
use crate::packet::ipv4::Ipv4Header;
use crate::packet::ipv6::Ipv6Header;
use crate::packet::tcp::{Flags, TcpHeader};
use crate::packet::testdata::{SAMPLES, TCP4_GSO, TCP4_SEGMENTS, TCP6_GSO, TCP6_SEGMENTS, hex, sample};
use crate::packet::vlan::VlanTag;
use crate::packet::{Headers, IpProto, L3, ParseError, Tci, parse, parse_l2};

fn parsed(frame: &[u8]) -> Headers {
    parse(frame, frame.len() as u32).unwrap()
}

fn owed(csum_start: u16, csum_offset: u16) -> Offload {
    Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() }
}

fn tso(gso: Gso, csum_start: u16, gso_size: u16) -> Offload {
    Offload { gso, gso_size, ecn: true, ..owed(csum_start, 16) }
}

/// The claim checked on the whole frame as snapshot.
fn check(offload: &Offload, frame: &[u8]) -> Result<Offload, BadOffload> {
    validate(offload, frame, frame.len() as u32)
}

#[test]
fn rfc1071_example() {
    // RFC 1071, section 3: the sum of these bytes is ddf2.
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(internet_checksum(&bytes), !0xddf2);
    assert_eq!(internet_checksum(&[]), 0xffff);
    assert_eq!(internet_checksum(&[0xab]), !0xab00);
}

#[test]
fn rfc1624_example() {
    // RFC 1624, section 4: checksum dd2f, field 5555 becomes 3285: the result is 0000, not ffff.
    assert_eq!(update_u16(0xdd2f, 0x5555, 0x3285), 0);
}

#[test]
fn crc32c_check_values() {
    // RFC 3720, B.4 and the catalogue's check value.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    let body = OwnedFrame::new(b"123456789", 2);
    let mut crc = Crc32c::new();
    crc.add_body(&body.body(0));
    assert_eq!(crc.finish(), 0xe306_9283);
}

#[test]
fn transport_checksums_of_all_samples_are_verified() {
    let mut valid = 0;
    for s in SAMPLES {
        let frame = s.bytes();
        let headers = parsed(&frame);
        let expected = match s.name {
            "UDP4_NO_CHECKSUM" | "VXLAN4" | "TCP6_ROUTING" | "GRE4" => Verdict::Unchecked,
            _ if s.l4.is_none() || headers.fragment != Default::default() => Verdict::Unchecked,
            _ => Verdict::Valid,
        };
        // Cut between head and body at every place behind the headers, body in odd pieces.
        let start = headers.l4.map_or(headers.l2.len.into(), |l4| l4.payload_offset() as usize);
        for cut in start..=frame.len() {
            let owned = OwnedFrame::new(&frame, 3);
            let body = owned.body(cut as u32);
            assert_eq!(verify_l4(&headers, &frame[..cut], &body), expected, "{} at {cut}", s.name);
        }
        if expected == Verdict::Valid {
            valid += 1;
            let mut bad = frame.clone();
            bad[headers.l3_end() as usize - 1] ^= 0x40;
            assert_eq!(verify_l4(&headers, &bad, &Body::EMPTY), Verdict::Invalid, "{}", s.name);
        }
    }
    assert!(valid >= 14, "{valid}");
    let mut none = sample("UDP6_EXTENSIONS");
    none[78 + 6..78 + 8].copy_from_slice(&[0, 0]);
    assert_eq!(verify_l4(&parsed(&none), &none, &Body::EMPTY), Verdict::Invalid);
}

#[test]
fn finished_checksums_are_those_of_the_independent_implementation() {
    for (name, offset) in [
        ("TCP4_SYN", 16),
        ("TCP4_DATA_ODD", 16),
        ("TCP4_IP_OPTIONS", 16),
        ("UDP4", 6),
        ("VLAN_UDP4", 6),
        ("QINQ_TCP6", 16),
        ("TCP6", 16),
        ("UDP6_EXTENSIONS", 6),
        ("ICMP6_ECHO", 2),
        ("ND_SOLICITATION", 2),
        ("ICMP4_ECHO", 2),
    ] {
        let want = sample(name);
        let headers = parsed(&want);
        let l4 = headers.l4.unwrap();
        let mut frame = want.clone();
        let field = usize::from(l4.offset + offset);
        let pseudo = match (headers.l3, l4.proto) {
            (_, IpProto::ICMP) => 0,
            (L3::Ipv4 { .. }, _) => pseudo_v4(
                Ipv4Addr::new(10, 1, 2, 3),
                Ipv4Addr::new(10, 9, 8, 7),
                l4.proto,
                headers.l3_end() - u32::from(l4.offset),
            )
            .partial(),
            _ => {
                let ip = crate::packet::ipv6::Ipv6::new(&frame[headers.l2.len.into()..]).unwrap();
                pseudo_v6(ip.src(), ip.dst(), l4.proto, headers.l3_end() - u32::from(l4.offset)).partial()
            }
        };
        if l4.proto != IpProto::ICMP {
            assert_eq!(Some(pseudo), reference_pseudo_sum(&frame, &headers), "{name}");
        }
        frame[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
        for cut in (field + 2)..=frame.len() {
            let owned = OwnedFrame::new(&frame, 5);
            let mut head = frame[..cut].to_vec();
            let mut offload = check(&owed(l4.offset, offset), &frame).unwrap();
            assert!(finish_checksum(&mut head, owned.body(cut as u32), &mut offload));
            assert_eq!(head, want[..cut], "{name} at {cut}");
            assert!(!offload.needs_csum);
        }
        // The field beyond the head: refused, nothing changed.
        let mut head = frame[..field + 1].to_vec();
        let mut offload = owed(l4.offset, offset);
        assert!(!finish_checksum(&mut head, Body::EMPTY, &mut offload));
        assert_eq!((head.as_slice(), offload.needs_csum), (&frame[..field + 1], true));
    }
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ones() {
    // The bytes covered sum to ffff: the checksum is 0.
    let mut head = [0u8; 8];
    head[0..2].copy_from_slice(&[0xff, 0xff]);
    let mut offload = owed(0, 6);
    assert!(finish_checksum(&mut head, Body::EMPTY, &mut offload));
    assert_eq!(head[6..8], [0xff, 0xff]);
    let mut head = [0u8; 20];
    head[0..2].copy_from_slice(&[0xff, 0xff]);
    let mut offload = owed(0, 16);
    assert!(finish_checksum(&mut head, Body::EMPTY, &mut offload));
    assert_eq!(head[16..18], [0, 0]);
}

#[test]
fn frames_to_be_segmented_are_not_finished() {
    let mut head = hex(TCP4_GSO);
    let before = head.clone();
    let mut offload = tso(Gso::TcpV4, 38, 41);
    assert!(!finish_checksum(&mut head, Body::EMPTY, &mut offload));
    assert_eq!(head, before);
}

#[test]
fn honest_claims_pass() {
    let plain = sample("UDP4");
    let claim = Offload { csum_valid: true, hdr_len: 9, gso_size: 7, csum_start: 500, ..Offload::default() };
    assert_eq!(check(&claim, &plain), Ok(Offload::default()));
    // Nothing owed, nothing parsed: malformed frames are the forwarding's business.
    assert_eq!(check(&Offload::default(), &[0; 3]), Ok(Offload::default()));

    let frame = hex(TCP4_GSO);
    let claim = Offload { hdr_len: 1, csum_valid: true, ..tso(Gso::TcpV4, 38, 41) };
    assert_eq!(check(&claim, &frame), Ok(Offload { hdr_len: 70, ..tso(Gso::TcpV4, 38, 41) }));
    let frame6 = hex(TCP6_GSO);
    assert_eq!(check(&tso(Gso::TcpV6, 62, 50), &frame6), Ok(Offload { hdr_len: 94, ..tso(Gso::TcpV6, 62, 50) }));
    // One segment's worth of payload needs no segmentation, but the checksum.
    assert_eq!(check(&tso(Gso::TcpV4, 38, 101), &frame), Ok(owed(38, 16)));
    assert!(check(&tso(Gso::TcpV4, 38, 100), &frame).unwrap().gso == Gso::TcpV4);

    // The inner TCP of a guest's own VXLAN tunnel.
    let vxlan = sample("VXLAN4");
    assert_eq!(check(&owed(84, 16), &vxlan), Ok(owed(84, 16)));
    assert_eq!(validate(&owed(84, 16), &vxlan[..96], vxlan.len() as u32), Err(BadOffload::NeedMore { bytes: 102 }));
    // Inside GRE.
    assert_eq!(check(&owed(34 + 4 + 20, 6), &sample("GRE4")), Ok(owed(58, 6)));
}

#[test]
fn hostile_checksum_claims_are_refused() {
    use BadOffload::*;
    let udp = sample("UDP4");
    let len = udp.len() as u16;
    for (start, offset, error) in [
        (13, 6, ChecksumOutside),
        (0, 30, ChecksumOutside),
        // Beyond the end, and wrapping in 16 bits.
        (34, len - 34 - 1, ChecksumOutside),
        (len, 0, ChecksumOutside),
        (65_535, 65_535, ChecksumOutside),
        (20, 65_530, ChecksumOutside),
        // The source address, the ports, the length, another protocol's field.
        (14, 12, ChecksumMisplaced),
        (26, 0, ChecksumMisplaced),
        (34, 0, ChecksumMisplaced),
        (34, 4, ChecksumMisplaced),
        (34, 16, ChecksumMisplaced),
        (35, 6, ChecksumMisplaced),
        (33, 20, ChecksumMisplaced),
    ] {
        assert_eq!(check(&owed(start, offset), &udp), Err(error), "{start}+{offset}");
    }
    // In the payload of a datagram (a tunnel): allowed, up to the last byte.
    assert!(check(&owed(42, 0), &udp).is_ok());
    assert!(check(&owed(42, len - 42 - 2), &udp).is_ok());
    // Other payloads are looked at or carry no packets.
    for (name, start) in [("ND_SOLICITATION", 62), ("ICMP4_FRAG_NEEDED", 42), ("TCP4_DATA_ODD", 54), ("SCTP4_DATA", 46)]
    {
        assert_eq!(check(&owed(start, 2), &sample(name)), Err(ChecksumMisplaced), "{name}");
    }
    assert_eq!(check(&owed(34, 8), &sample("SCTP4_DATA")), Err(ChecksumMisplaced));
    assert_eq!(check(&owed(14, 14), &sample("ARP_REQUEST")), Err(ChecksumMisplaced));
    for name in ["UDP4_FRAGMENT_FIRST", "UDP4_FRAGMENT_LATER", "UDP6_FRAGMENT_FIRST"] {
        assert_eq!(check(&owed(34, 6), &sample(name)), Err(ChecksumOnFragment), "{name}");
    }
    // A tag is no place for a checksum.
    assert_eq!(check(&owed(14, 0), &sample("VLAN_UDP4")), Err(ChecksumMisplaced));
    let mut malformed = udp.clone();
    malformed[14] = 0x41;
    assert_eq!(check(&owed(34, 6), &malformed), Err(Headers(ParseError::Ipv4HeaderLength)));
    assert_eq!(check(&owed(34, 6), &udp[..10]), Err(Headers(ParseError::FrameTooShort)));
    assert_eq!(validate(&owed(34, 6), &udp[..38], u32::from(len)), Err(NeedMore { bytes: 42 }));
    for claim in [Offload::default(), owed(34, 6)] {
        assert_eq!(validate(&claim, &udp, MAX_FRAME_BYTES + 1), Err(TooLong));
    }
    assert!(validate(&owed(34, 6), &udp, MAX_FRAME_BYTES).is_ok());
}

#[test]
fn hostile_segmentation_claims_are_refused() {
    use BadOffload::*;
    let v4 = hex(TCP4_GSO);
    let v6 = hex(TCP6_GSO);
    let good = tso(Gso::TcpV4, 38, 41);
    assert_eq!(check(&Offload { needs_csum: false, ..good }, &v4), Err(GsoWithoutChecksum));
    assert_eq!(check(&Offload { gso_size: 0, ..good }, &v4), Err(GsoSize));
    assert_eq!(check(&Offload { gso_size: 65_535, ..good }, &v4), Err(GsoSize));
    assert_eq!(check(&Offload { gso: Gso::TcpV6, ..good }, &v4), Err(GsoMismatch));
    assert_eq!(check(&tso(Gso::TcpV4, 62, 50), &v6), Err(GsoMismatch));
    assert_eq!(check(&Offload { csum_start: 18, ..good }, &v4), Err(ChecksumMisplaced));
    assert_eq!(check(&Offload { csum_offset: 6, ..good }, &v4), Err(ChecksumMisplaced));
    let mut padded = v4.clone();
    padded.push(0);
    assert_eq!(check(&good, &padded), Err(GsoLength));
    let udp = sample("UDP4");
    assert_eq!(check(&Offload { csum_offset: 6, csum_start: 34, ..good }, &udp), Err(GsoMismatch));
    let lldp = sample("LLDP");
    assert_eq!(check(&Offload { csum_start: 14, csum_offset: 0, ..good }, &lldp), Err(GsoMismatch));
}

/// All segments of a frame as contiguous bytes, with what each still owes.
fn segments(frame: &[u8], head_len: usize, offload: &Offload, checksum: SegmentChecksum) -> Vec<(Vec<u8>, Offload)> {
    let owned = OwnedFrame::new(frame, 7);
    let head = &frame[..head_len];
    let headers = parse(head, frame.len() as u32).unwrap();
    let mut segmenter = Segmenter::new(head, &headers, owned.body(head_len as u32), offload, checksum).unwrap();
    let mut out = Vec::new();
    let mut buffer = vec![0xee; head_len];
    while let Some(segment) = segmenter.next_segment(&mut buffer) {
        let mut bytes = buffer[..segment.head_len].to_vec();
        bytes.resize(segment.head_len + segment.body.len() as usize, 0);
        segment.body.read(&mut bytes[segment.head_len..]);
        assert!(bytes.len() as u32 <= segmenter.longest());
        out.push((bytes, segment.offload));
    }
    assert_eq!(out.len(), segmenter.segments());
    out
}

#[test]
fn segments_are_those_of_the_independent_implementation() {
    for (frame, want, claim) in
        [(TCP4_GSO, TCP4_SEGMENTS, tso(Gso::TcpV4, 38, 41)), (TCP6_GSO, TCP6_SEGMENTS, tso(Gso::TcpV6, 62, 50))]
    {
        let frame = hex(frame);
        let offload = check(&claim, &frame).unwrap();
        // The head may end with the headers, or anywhere in the payload.
        for head_len in usize::from(offload.hdr_len)..=frame.len() {
            let got = segments(&frame, head_len, &offload, SegmentChecksum::Finish);
            assert_eq!(got.len(), want.len());
            for (i, ((bytes, owed), want)) in got.iter().zip(want).enumerate() {
                assert_eq!(*bytes, hex(want), "segment {i}, head {head_len}");
                assert_eq!(*owed, Offload::default());
            }
            // Left to the output, finished there.
            for ((mut bytes, mut left), want) in
                segments(&frame, head_len, &offload, SegmentChecksum::Partial).into_iter().zip(want)
            {
                assert_eq!(check(&left, &bytes), Ok(left));
                assert!(left.needs_csum && left.csum_start == offload.csum_start);
                assert!(finish_checksum(&mut bytes, Body::EMPTY, &mut left));
                assert_eq!(bytes, hex(want));
            }
        }
    }
}

#[test]
fn segmentation_is_bounded_and_picky() {
    let frame = hex(TCP4_GSO);
    let headers = parsed(&frame);
    let claim = check(&tso(Gso::TcpV4, 38, 1), &frame).unwrap();
    let new = |head: &'static [u8], offload: &Offload| {
        Segmenter::new(head, &headers, Body::EMPTY, offload, SegmentChecksum::Finish).map(|s| s.segments())
    };
    let whole: &'static [u8] = frame.clone().leak();
    assert_eq!(new(whole, &claim), Ok(101));
    assert_eq!(new(&whole[..60], &claim), Err(GsoError::HeadTooShort));
    assert_eq!(new(&whole[..80], &claim), Err(GsoError::Mismatch));
    assert_eq!(new(whole, &Offload { gso: Gso::TcpV6, ..claim }), Err(GsoError::Mismatch));
    assert_eq!(new(whole, &Offload { gso: Gso::None, ..claim }), Err(GsoError::Mismatch));
    assert_eq!(new(whole, &Offload { gso_size: 0, ..claim }), Err(GsoError::Mismatch));
    assert_eq!(new(whole, &Offload { needs_csum: false, ..claim }), Err(GsoError::Mismatch));
    assert_eq!(new(whole, &Offload { csum_start: 18, ..claim }), Err(GsoError::Mismatch));

    for (extra, want) in [(27, Ok(128)), (28, Err(GsoError::TooManySegments))] {
        let mut long = frame.clone();
        long.extend(vec![1; extra]);
        let total = (long.len() - 18) as u16;
        long[20..22].copy_from_slice(&total.to_be_bytes());
        let headers = parsed(&long);
        let got = Segmenter::new(&long, &headers, Body::EMPTY, &claim, SegmentChecksum::Finish).map(|s| s.segments());
        assert_eq!(got, want);
    }
    // A buffer too short for the headers yields nothing rather than a broken segment.
    let mut segmenter = Segmenter::new(whole, &headers, Body::EMPTY, &claim, SegmentChecksum::Finish).unwrap();
    assert!(segmenter.next_segment(&mut [0; 70]).is_none());
    assert!(segmenter.next_segment(&mut [0; 71]).is_some());
}

#[test]
fn vlan_edits() {
    let tagged = sample("QINQ_TCP6");
    let l2 = parse_l2(&tagged, tagged.len() as u32).unwrap();
    let mut out = [0; REWRITE_BYTES];
    let claim = owed(62, 16);

    let mut offload = claim;
    let len = rewrite_l2(&tagged, &l2, &mut out, VlanAction::Keep, &mut offload).unwrap();
    assert_eq!((&out[..len], offload), (&tagged[..], claim));

    let len = rewrite_l2(&tagged, &l2, &mut out, VlanAction::Pop, &mut offload).unwrap();
    let mut want = tagged[..12].to_vec();
    want.extend(&tagged[16..]);
    assert_eq!(out[..len], want);
    assert_eq!(offload, owed(58, 16));

    let mut offload = Offload { hdr_len: 102, ..claim };
    let len = rewrite_l2(&tagged, &l2, &mut out, VlanAction::Replace(Tci(0x6007)), &mut offload).unwrap();
    let mut want = tagged.clone();
    want[14..16].copy_from_slice(&[0x60, 0x07]);
    assert_eq!((&out[..len], offload.csum_start, offload.hdr_len), (&want[..], 62, 102));

    let tag = VlanTag::customer(Tci(0x0fff));
    let len = rewrite_l2(&tagged, &l2, &mut out, VlanAction::Push(tag), &mut offload).unwrap();
    let mut want = tagged[..12].to_vec();
    want.extend([0x81, 0, 0x0f, 0xff]);
    want.extend(&tagged[12..]);
    assert_eq!((&out[..len], offload.csum_start, offload.hdr_len), (&want[..], 66, 106));

    // Nothing owed: nothing moves.
    let mut none = Offload::default();
    rewrite_l2(&tagged, &l2, &mut out, VlanAction::Push(tag), &mut none).unwrap();
    assert_eq!(none, Offload::default());

    let plain = sample("UDP4");
    let l2 = parse_l2(&plain, plain.len() as u32).unwrap();
    for action in [VlanAction::Pop, VlanAction::Replace(Tci(1))] {
        assert_eq!(rewrite_l2(&plain, &l2, &mut out, action, &mut offload), None);
    }
    // The longest snapshot still fits, with its tag.
    let long = [7u8; SNAPSHOT_BYTES];
    let len = rewrite_l2(&long, &l2, &mut out, VlanAction::Push(tag), &mut none);
    assert_eq!(len, Some(REWRITE_BYTES));
    assert_eq!(rewrite_l2(&[7; SNAPSHOT_BYTES + 1], &l2, &mut out, VlanAction::Push(tag), &mut none), None);
    assert_eq!(rewrite_l2(&[7; 11], &l2, &mut out, VlanAction::Keep, &mut none), None);
}

/// A frame to be segmented, its checksum field filled as the sender would.
fn superframe(v6: bool, tags: usize, flags: u8, seq: u32, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for _ in 0..tags {
        frame.extend([0x81, 0, 0, 5]);
    }
    let tcp_len = 20 + payload.len() as u16;
    if v6 {
        frame.extend([0x86, 0xdd]);
        frame.extend(
            Ipv6Header {
                traffic_class: 1,
                flow_label: 2,
                payload_len: tcp_len,
                next_header: IpProto::TCP,
                hop_limit: 64,
                src: Ipv6Addr::LOCALHOST,
                dst: Ipv6Addr::from_bits(u128::from(seq) << 70),
            }
            .to_bytes(),
        );
    } else {
        frame.extend([8, 0]);
        frame.extend(
            Ipv4Header {
                traffic_class: 1,
                total_len: 20 + tcp_len,
                identification: id,
                dont_fragment: true,
                more_fragments: false,
                fragment_offset: 0,
                ttl: 64,
                proto: IpProto::TCP,
                src: Ipv4Addr::from_bits(seq),
                dst: Ipv4Addr::new(192, 0, 2, 1),
            }
            .to_bytes(),
        );
    }
    let at = frame.len();
    let tcp = TcpHeader { src_port: 1, dst_port: 2, seq, ack: 3, flags: Flags::from_bits_retain(flags), window: 4 };
    frame.extend(tcp.to_bytes());
    frame.extend(payload);
    let headers = parse(&frame, frame.len() as u32).unwrap();
    let pseudo = reference_pseudo_sum(&frame, &headers).unwrap();
    frame[at + 16..at + 18].copy_from_slice(&pseudo.to_be_bytes());
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_match_the_reference_whatever_the_pieces(
        bytes in proptest::collection::vec(any::<u8>(), 0..5000), head in 0usize..300, piece in 2usize..700,
    ) {
        let head = head.min(bytes.len());
        let owned = OwnedFrame::new(&bytes, piece);
        let mut sum = Sum::new();
        sum.add_bytes(&bytes[..head]);
        sum.add_body(&owned.body(head as u32));
        prop_assert_eq!(sum.partial(), reference_sum(&bytes));
        prop_assert_eq!(internet_checksum(&bytes), !reference_sum(&bytes));
        let mut crc = Crc32c::new();
        crc.add_bytes(&bytes[..head]);
        crc.add_body(&owned.body(head as u32));
        prop_assert_eq!(crc.finish(), crc32c(&bytes));
    }

    #[test]
    fn incremental_updates_match_recomputation(mut bytes in proptest::collection::vec(any::<u8>(), 40), at in 0usize..12, new: u128) {
        // An all-zero input cannot happen in packets and has two right answers.
        bytes[39] |= 1;
        let at = at * 2;
        let before = internet_checksum(&bytes);
        let old = u128::from_be_bytes(bytes[at..at + 16].try_into().unwrap());
        let updated = update_ipv6(before, Ipv6Addr::from_bits(old), Ipv6Addr::from_bits(new));
        let stepwise = [96, 64, 32, 0].iter().fold(before, |c, s| update_u32(c, (old >> s) as u32, (new >> s) as u32));
        prop_assert_eq!(updated, stepwise);
        bytes[at..at + 16].copy_from_slice(&new.to_be_bytes());
        prop_assert_eq!(updated, internet_checksum(&bytes));
    }

    #[test]
    fn segments_reassemble_and_verify(
        v6: bool, tags in 0usize..3, flags: u8, seq: u32, id: u16, len in 1usize..65_000, mss in 1u16..9000, piece in 1usize..5000, early in 0usize..150,
    ) {
        let mss = mss.max((len / MAX_GSO_SEGMENTS) as u16 + 1);
        let payload: Vec<u8> = (0..len).map(|i| (i * i / 7 + i) as u8).collect();
        let frame = superframe(v6, tags, flags, seq, id, &payload);
        let frame_len = frame.len() as u32;
        let headers = parse(&frame, frame_len).unwrap();
        let claim = tso(if v6 { Gso::TcpV6 } else { Gso::TcpV4 }, headers.l4.unwrap().offset, mss);
        let hdr_len = frame.len() - len;
        let offload = check(&claim, &frame).unwrap();
        if offload.gso == Gso::None {
            prop_assert!(len <= usize::from(mss));
            return Ok(());
        }
        let head_len = (hdr_len + early).min(SNAPSHOT_BYTES).min(frame.len());
        // A burst has room for so many pieces.
        let owned = OwnedFrame::new(&frame, piece.max(frame.len() / BURST_SEGMENTS + 1));
        let body = owned.body(head_len as u32);
        let mut segmenter = Segmenter::new(&frame[..head_len], &headers, body, &offload, SegmentChecksum::Finish).unwrap();
        prop_assert_eq!(segmenter.segments(), len.div_ceil(mss.into()));
        let mut buffer = [0; SNAPSHOT_BYTES];
        let mut got = Vec::new();
        while let Some(segment) = segmenter.next_segment(&mut buffer) {
            let mut bytes = buffer[..segment.head_len].to_vec();
            bytes.resize(segment.head_len + segment.body.len() as usize, 0);
            segment.body.read(&mut bytes[segment.head_len..]);
            let h = parse(&bytes, bytes.len() as u32).unwrap();
            let l4 = usize::from(h.l4.unwrap().offset);
            let sum = u32::from(reference_pseudo_sum(&bytes, &h).unwrap()) + u32::from(reference_sum(&bytes[l4..]));
            prop_assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
            prop_assert_eq!(verify_l4(&h, &bytes, &Body::EMPTY), Verdict::Valid);
            got.extend_from_slice(&bytes[hdr_len..]);
        }
        prop_assert!(got == payload);
    }

    #[test]
    fn any_claim_on_any_bytes(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        crate::fuzzing::offload(&data);
    }
}
