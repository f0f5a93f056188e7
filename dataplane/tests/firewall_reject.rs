//! Answers to rejected packets: byte by byte against an independent implementation, and all the packets that get none.
use std::net::{Ipv4Addr, Ipv6Addr};

use ferry_dataplane::firewall::reject::{MAX_ANSWER_BYTES, NoAnswer, RejectConfig, Rejector, Unreachable, check};
use ferry_dataplane::packet::parse;

#[path = "firewall_data/answers.rs"]
mod answers;
use answers::ANSWERS;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

const UNLIMITED: RejectConfig = RejectConfig { icmp: Unreachable::Port, per_second: 0, burst: 0 };

fn answer_within(config: &RejectConfig, frame: &[u8], at_hand: usize, room: usize) -> Result<Vec<u8>, NoAnswer> {
    let head = &frame[..frame.len().min(at_hand)];
    let headers = parse(head, frame.len() as u32).unwrap();
    let mut out = vec![0xa5; MAX_ANSWER_BYTES];
    let len = Rejector::default().reject(config, head, &headers, &mut out[..room], 0)?;
    assert!(out[len..].iter().all(|b| *b == 0xa5), "nothing is written behind the answer");
    out.truncate(len);
    Ok(out)
}

fn answer(frame: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    answer_within(&UNLIMITED, frame, usize::MAX, MAX_ANSWER_BYTES)
}

fn sample(name: &str) -> Vec<u8> {
    hex(ANSWERS.iter().find(|(n, ..)| *n == name).unwrap_or_else(|| panic!("{name}")).2)
}

#[test]
fn every_byte_is_as_an_independent_implementation_has_it() {
    for (name, kind, frame, expected) in ANSWERS {
        let icmp = if *kind == "port" { Unreachable::Port } else { Unreachable::AdminProhibited };
        let got =
            answer_within(&RejectConfig { icmp, ..UNLIMITED }, &hex(frame), usize::MAX, MAX_ANSWER_BYTES).unwrap();
        assert_eq!(got, hex(expected), "{name}\n got {got:02x?}");
        verify(&got);
    }
}

/// RFC 1071, written down once more: sum of big-endian words, carries added back.
fn sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Lengths and checksums of an answer are consistent.
fn verify(frame: &[u8]) {
    let mut at = 12;
    while matches!(frame[at..at + 2], [0x81, 0] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = &frame[at + 2..];
    if frame[at..at + 2] == [8, 0] {
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        assert_eq!(sum(&[&ip[..20]]), 0xffff, "IPv4 header");
        let pseudo = [&ip[12..20], &[0, ip[9]], &((ip.len() - 20) as u16).to_be_bytes()].concat();
        let pseudo = if ip[9] == 1 { vec![] } else { pseudo };
        assert_eq!(sum(&[&pseudo, &ip[20..]]), 0xffff, "transport");
        assert!(ip.len() <= 576);
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40);
        let pseudo = [&ip[8..40], &((ip.len() - 40) as u32).to_be_bytes(), &[0, 0, 0, ip[6]]].concat();
        assert_eq!(sum(&[&pseudo, &ip[40..]]), 0xffff, "transport");
        assert!(ip.len() <= 1280);
    }
}

/// With only a snapshot at hand, or little room, less is quoted, down to the header and 8 bytes; never less.
#[test]
fn quotes_are_as_long_as_they_can_be() {
    for (name, ip_header) in [("UDP longer than may be quoted", 20), ("UDP over IPv6 longer than may be quoted", 40)] {
        let frame = sample(name);
        let full = answer(&frame).unwrap();
        let overhead = 14 + ip_header + 8;
        for at_hand in ip_header + 22..200 {
            let got = answer_within(&UNLIMITED, &frame, at_hand, MAX_ANSWER_BYTES).unwrap();
            verify(&got);
            assert_eq!(got.len(), overhead + at_hand - 14, "{name} {at_hand}");
            assert_eq!(got[overhead..], frame[14..at_hand]);
        }
        for room in 0..full.len() {
            let got = answer_within(&UNLIMITED, &frame, usize::MAX, room);
            if room < overhead + ip_header + 8 {
                assert_eq!(got, Err(NoAnswer::BufferTooSmall), "{room}");
            } else {
                let got = got.unwrap();
                verify(&got);
                assert_eq!(got.len(), room);
            }
        }
    }
    // Resets need little.
    let syn = sample("SYN");
    assert_eq!(answer_within(&UNLIMITED, &syn, usize::MAX, 53), Err(NoAnswer::BufferTooSmall));
    assert_eq!(answer_within(&UNLIMITED, &syn, usize::MAX, 54).unwrap().len(), 54);
    // The length of what is not at hand counts in the acknowledgement.
    let long = sample("SYN with data over the wrap");
    assert_eq!(answer_within(&UNLIMITED, &long, 54, 100).unwrap(), answer(&long).unwrap());
}

/// Changes bytes of a frame and repairs the IPv4 header's checksum.
fn changed(name: &str, changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut frame = sample(name);
    for (at, bytes) in changes {
        frame[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    if frame[12..14] == [8, 0] {
        let end = 14 + usize::from(frame[14] & 15) * 4;
        frame[24..26].fill(0);
        let checksum = !sum(&[&frame[14..end]]);
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
    frame
}

#[test]
fn some_packets_are_never_answered() {
    let v4 = |a: &str| a.parse::<Ipv4Addr>().unwrap().octets();
    let v6 = |a: &str| a.parse::<Ipv6Addr>().unwrap().octets();
    let mut cases: Vec<(Vec<u8>, NoAnswer)> = vec![
        (changed("UDP", &[(0, &[0xff; 6])]), NoAnswer::LinkAddress),
        (changed("SYN", &[(0, &[1, 0, 0x5e, 0, 0, 1])]), NoAnswer::LinkAddress),
        (changed("SYN", &[(6, &[0x53])]), NoAnswer::LinkAddress),
        (changed("SYN", &[(6, &[0; 6])]), NoAnswer::LinkAddress),
        (changed("UDP", &[(12, &[0x88, 0xcc])]), NoAnswer::NotIp),
        (changed("SYN", &[(47, &[0x04])]), NoAnswer::TcpReset),
        (changed("SYN ACK", &[(47, &[0x14])]), NoAnswer::TcpReset),
        (changed("SYN over IPv6", &[(67, &[0x14])]), NoAnswer::TcpReset),
        // Offset 8, with and without more to come.
        (changed("UDP", &[(20, &[0, 1])]), NoAnswer::LaterFragment),
        (changed("UDP", &[(20, &[0x20, 1])]), NoAnswer::LaterFragment),
        (changed("echo request", &[(34, &[19])]), NoAnswer::IcmpError),
        (changed("ICMPv6 echo request", &[(54, &[137])]), NoAnswer::IcmpError),
        (changed("ICMPv6 echo request", &[(54, &[135])]), NoAnswer::Discovery),
        (changed("ICMPv6 echo request", &[(54, &[143])]), NoAnswer::Discovery),
    ];
    for kind in [3, 4, 5, 11, 12] {
        cases.push((changed("echo request", &[(34, &[kind])]), NoAnswer::IcmpError));
    }
    for kind in [0, 1, 2, 3, 4, 100, 127] {
        cases.push((changed("ICMPv6 echo request", &[(54, &[kind])]), NoAnswer::IcmpError));
    }
    for address in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"] {
        for name in ["SYN", "UDP"] {
            cases.push((changed(name, &[(26, &v4(address))]), NoAnswer::SourceAddress));
            cases.push((changed(name, &[(30, &v4(address))]), NoAnswer::DestinationAddress));
        }
    }
    for address in ["::", "::1", "ff02::1", "ff0e::1234"] {
        for name in ["SYN over IPv6", "UDP over IPv6"] {
            cases.push((changed(name, &[(22, &v6(address))]), NoAnswer::SourceAddress));
            cases.push((changed(name, &[(38, &v6(address))]), NoAnswer::DestinationAddress));
        }
    }
    let mut damaged = sample("UDP");
    damaged[24] ^= 1;
    cases.push((damaged, NoAnswer::HeaderChecksum));
    for (frame, expected) in cases {
        assert_eq!(answer(&frame), Err(expected), "{frame:02x?}");
        let headers = parse(&frame, frame.len() as u32).unwrap();
        assert_eq!(check(&frame, &headers), Err(expected));
    }
    // And their neighbours are.
    for kind in [0, 8, 13, 17] {
        verify(&answer(&changed("echo request", &[(34, &[kind])])).unwrap());
    }
    verify(&answer(&changed("ICMPv6 echo request", &[(54, &[129])])).unwrap());
}

/// An answer is itself never answered: two firewalls do not talk to each other for ever.
#[test]
fn answers_are_not_answered() {
    for (name, _, _, reply) in ANSWERS {
        let got = answer(&hex(reply));
        assert!(matches!(got, Err(NoAnswer::TcpReset | NoAnswer::IcmpError)), "{name}: {got:?}");
    }
}

#[test]
fn answers_come_at_a_limited_rate() {
    let config = RejectConfig { per_second: 10, burst: 5, ..RejectConfig::default() };
    let rejector = Rejector::default();
    let (frame, reset) = (sample("UDP"), changed("SYN", &[(47, &[0x04])]));
    let headers = parse(&frame, frame.len() as u32).unwrap();
    let reset_headers = parse(&reset, reset.len() as u32).unwrap();
    let mut out = [0; MAX_ANSWER_BYTES];
    let mut answered = 0;
    // Ten seconds, a hundred packets in each; what is not to be answered takes no token.
    for ms in 0..10_000u64 {
        let now = ms * 1_000_000;
        if ms % 10 == 0 {
            match rejector.reject(&config, &frame, &headers, &mut out, now) {
                Ok(_) => answered += 1,
                Err(reason) => assert_eq!(reason, NoAnswer::RateLimited),
            }
        }
        assert_eq!(rejector.reject(&config, &reset, &reset_headers, &mut out, now), Err(NoAnswer::TcpReset));
    }
    assert!((103..=105).contains(&answered), "{answered}");
    let status = rejector.status();
    assert_eq!(status.answered, answered);
    assert_eq!(status.unanswered[NoAnswer::RateLimited as usize], 1000 - answered);
    assert_eq!(status.unanswered[NoAnswer::TcpReset as usize], 10_000);
}

/// Every prefix of every sample, every byte changed: an answer that is well formed, or none.
#[test]
fn damaged_packets_do_no_harm() {
    let mut answered = 0;
    for (_, _, frame, _) in ANSWERS {
        let frame = hex(frame);
        let most = frame.len().min(120);
        for i in 0..most {
            for value in [0, 0x7f, 0xff, frame[i] ^ 1] {
                let mut damaged = frame.clone();
                damaged[i] = value;
                for at_hand in [most, frame.len()] {
                    let head = &damaged[..at_hand];
                    let Ok(headers) = parse(head, damaged.len() as u32) else { continue };
                    let mut out = [0; MAX_ANSWER_BYTES];
                    if let Ok(len) = Rejector::default().reject(&UNLIMITED, head, &headers, &mut out, 0) {
                        verify(&out[..len]);
                        answered += 1;
                    }
                }
            }
        }
    }
    assert!(answered > 1000);
}

#[test]
fn reasons_have_names_of_their_own() {
    let names: std::collections::BTreeSet<_> = NoAnswer::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(names.len(), NoAnswer::COUNT);
}
