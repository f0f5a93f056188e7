//! Properties of connection tracking that hold for any traffic.
use ferry_dataplane::conntrack::{
    Checksum, ConnTable, CtState, Judgement, ModelTable, Packet, Toward, TrackConfig, Tracked, Tracker,
};
use ferry_dataplane::offload::checksum::{internet_checksum, pseudo_v4, pseudo_v6};
use ferry_dataplane::packet::IpProto;
use proptest::prelude::*;

const A4: [u8; 4] = [10, 0, 0, 1];
const B4: [u8; 4] = [10, 0, 0, 2];

/// Ethernet and IPv4 around `l4`, checksums right.
fn v4(src: [u8; 4], dst: [u8; 4], proto: u8, fragment: u16, id: u16, l4: &[u8]) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + l4.len()) as u16).to_be_bytes());
    ip.extend(id.to_be_bytes());
    ip.extend(fragment.to_be_bytes());
    ip.extend([64, proto, 0, 0]);
    ip.extend(src);
    ip.extend(dst);
    let sum = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f.extend(ip);
    f.extend(l4);
    f
}

fn tcp(a_to_b: bool, port: u16, seq: u32, ack: u32, flags: u8, window: u16, payload: usize) -> Vec<u8> {
    let (src, dst, sp, dp) = if a_to_b { (A4, B4, port, 80) } else { (B4, A4, 80, port) };
    let mut t = Vec::new();
    t.extend(u16::to_be_bytes(sp));
    t.extend(u16::to_be_bytes(dp));
    t.extend(seq.to_be_bytes());
    t.extend(ack.to_be_bytes());
    t.extend([0x50, flags]);
    t.extend(window.to_be_bytes());
    t.extend([0, 0, 0, 0]);
    t.extend(vec![7; payload]);
    let mut sum = pseudo_v4(src.into(), dst.into(), IpProto::TCP, t.len() as u32);
    sum.add_bytes(&t);
    let sum = sum.finish();
    t[16..18].copy_from_slice(&sum.to_be_bytes());
    v4(src, dst, 6, 0, 1, &t)
}

fn judge(tracker: &mut Tracker<ModelTable>, frame: &[u8], toward: Toward, now_ms: u64) -> Option<Tracked> {
    match tracker.track(&Packet::whole(frame, toward, Checksum::Verify), now_ms) {
        Judgement::Tracked(tracked) => {
            let _ = tracker.confirm(&tracked, now_ms);
            Some(tracked)
        }
        _ => None,
    }
}

/// State and the packet's flow, the direction left out.
fn seen(tracked: &Option<Tracked>) -> Option<CtState> {
    tracked.as_ref().map(|t| t.state)
}

fn toward() -> impl Strategy<Value = Toward> {
    prop_oneof![Just(Toward::Ingress), Just(Toward::Egress)]
}

/// Frames that look like something: right link and IP headers, anything after.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let l4 = proptest::collection::vec(any::<u8>(), 0..120);
    let protos = prop_oneof![
        Just(1u8),
        Just(6),
        Just(17),
        Just(47),
        Just(58),
        Just(132),
        Just(136),
        Just(0),
        Just(43),
        Just(44),
        Just(51),
        Just(60),
        any::<u8>()
    ];
    let v4_frames =
        (
            any::<bool>(),
            protos.clone(),
            prop_oneof![3 => Just(0u16), 2 => 0u16..40, 2 => 0x2000u16..0x2040],
            0u16..4,
            l4.clone(),
        )
            .prop_map(|(a, proto, fragment, id, l4)| {
                if a { v4(A4, B4, proto, fragment, id, &l4) } else { v4(B4, A4, proto, fragment, id, &l4) }
            });
    let v6_frames = (protos, l4.clone(), any::<bool>()).prop_map(|(proto, l4, tagged)| {
        let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        if tagged {
            f.extend([0x81, 0, 0, 10]);
        }
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        f.extend((l4.len() as u16).to_be_bytes());
        f.extend([proto, 64]);
        f.extend([0xfd; 16]);
        f.extend([0xfe; 16]);
        f.extend(l4);
        f
    });
    prop_oneof![
        2 => v4_frames,
        2 => v6_frames,
        1 => proptest::collection::vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Anything may come, in any order, at any time, cut anywhere: nothing panics, memory stays in its bounds.
    #[test]
    fn any_traffic_is_survived(
        frames in proptest::collection::vec((frame(), toward(), 0u64..40_000, any::<bool>(), 0usize..200), 1..120),
        capacity in 1usize..20,
    ) {
        let config = TrackConfig { fragment_bytes: 8 << 10, ..TrackConfig::default() };
        let mut tracker = Tracker::new(ModelTable::new(capacity), config);
        let mut now_ms = u64::from(u32::MAX) - 100_000;
        for (frame, toward, wait_ms, vouched, cut) in frames {
            now_ms += wait_ms;
            let checksum = if vouched { Checksum::Vouched } else { Checksum::Verify };
            let frame = frame.get(..frame.len().saturating_sub(cut % 13)).unwrap();
            if let Judgement::Tracked(t) = tracker.track(&Packet::whole(frame, toward, checksum), now_ms) {
                let _ = tracker.confirm(&t, now_ms);
                if let Some(datagram) = t.datagram {
                    tracker.fragments().release(datagram, |_| {});
                }
            }
            prop_assert!(tracker.table().len() <= capacity);
            prop_assert!(tracker.fragments().bytes_held() <= 8 << 10);
        }
        tracker.expire(now_ms + 100_000, 1000);
        tracker.fragments().expire(now_ms + 100_000, 1000);
        prop_assert_eq!(tracker.fragments().bytes_held(), 0);
        tracker.table_mut().expire(now_ms + 500_000_000, usize::MAX);
        prop_assert_eq!(tracker.table().len(), 0);
    }

    /// Which side is the VM does not matter: a conversation seen from both ends is judged alike.
    #[test]
    fn both_ends_see_the_same(
        segments in proptest::collection::vec(
            (any::<bool>(), 0u32..4000, 0u32..4000,
             prop_oneof![Just(2u8), Just(0x12), Just(0x10), Just(0x18), Just(0x11), Just(4), Just(0x14), any::<u8>()],
             prop_oneof![Just(0u16), Just(1000), Just(65535)], 0usize..600, 0u64..3000),
            1..60),
        loose in any::<bool>(), liberal in any::<bool>(),
    ) {
        let config = TrackConfig { tcp_loose: loose, tcp_be_liberal: liberal, ..TrackConfig::default() };
        let mut at_a = Tracker::new(ModelTable::new(100), config);
        let mut at_b = Tracker::new(ModelTable::new(100), config);
        let mut now_ms = 1_000;
        for (a_to_b, seq, ack, flags, window, payload, wait_ms) in segments {
            now_ms += wait_ms;
            let frame = tcp(a_to_b, 5000, seq, ack, flags, window, payload);
            let (from_a, from_b) =
                if a_to_b { (Toward::Egress, Toward::Ingress) } else { (Toward::Ingress, Toward::Egress) };
            let one = judge(&mut at_a, &frame, from_a, now_ms);
            let other = judge(&mut at_b, &frame, from_b, now_ms);
            prop_assert_eq!(seen(&one), seen(&other));
            let (one, other) = (one.unwrap(), other.unwrap());
            prop_assert_eq!(one.way, other.way);
            let facts = |c: ferry_dataplane::conntrack::Connection| (c.state(), c.seen_reply(), c.assured(), c.remaining_ms(now_ms));
            prop_assert_eq!(one.connection.map(facts), other.connection.map(facts));
        }
        prop_assert_eq!(at_a.table().len(), at_b.table().len());
    }

    /// However a datagram is cut and in whatever order its pieces come: it comes out as it went in, and only whole.
    #[test]
    fn fragments_come_out_as_they_came(
        payload in proptest::collection::vec(any::<u8>(), 40..3000),
        cuts in proptest::collection::btree_set(1usize..370, 1..8),
        order in any::<u64>(),
        ipv6 in any::<bool>(),
    ) {
        let mut udp = vec![0, 99, 0, 53];
        udp.extend(((8 + payload.len()) as u16).to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(&payload);
        let (a6, b6) = ([0xfd; 16], [0xfe; 16]);
        let mut sum = if ipv6 { pseudo_v6(a6.into(), b6.into(), IpProto::UDP, udp.len() as u32) }
            else { pseudo_v4(A4.into(), B4.into(), IpProto::UDP, udp.len() as u32) };
        sum.add_bytes(&udp);
        let sum = sum.finish();
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut edges: Vec<usize> = cuts.into_iter().map(|c| c * 8).filter(|c| *c < udp.len()).collect();
        prop_assume!(!edges.is_empty());
        edges.insert(0, 0);
        edges.push(udp.len());
        let mut pieces: Vec<Vec<u8>> = edges.windows(2).map(|w| {
            let (from, to) = (w[0], w[1]);
            let more = to < udp.len();
            if ipv6 {
                let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0];
                f.extend(((8 + to - from) as u16).to_be_bytes());
                f.extend([44, 64]);
                f.extend(a6);
                f.extend(b6);
                f.extend([17, 0]);
                f.extend((from as u16 | u16::from(more)).to_be_bytes());
                f.extend([0, 0, 0, 9]);
                f.extend(&udp[from..to]);
                f
            } else {
                v4(A4, B4, 17, (from / 8) as u16 | if more { 0x2000 } else { 0 }, 77, &udp[from..to])
            }
        }).collect();
        let in_order = pieces.clone();
        let mut x = order | 1;
        for i in (1..pieces.len()).rev() {
            x ^= x << 13; x ^= x >> 7; x ^= x << 17;
            pieces.swap(i, (x % (i as u64 + 1)) as usize);
        }
        let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
        let last = pieces.pop().unwrap();
        for piece in &pieces {
            let j = tracker.track(&Packet::whole(piece, Toward::Egress, Checksum::Verify), 5);
            prop_assert!(matches!(j, Judgement::Held), "{:?}", j);
        }
        let Judgement::Tracked(t) = tracker.track(&Packet::whole(&last, Toward::Egress, Checksum::Verify), 5) else { panic!() };
        prop_assert_eq!(t.state, CtState::New);
        let mut out = Vec::new();
        tracker.fragments().release(t.datagram.unwrap(), |f| out.push(f.to_vec()));
        prop_assert_eq!(out, in_order);
        prop_assert_eq!(tracker.fragments().bytes_held(), 0);
    }
}

/// What follows an IPv4 fragment's last whole eight bytes is not judged, so it is not forwarded either: here it would put a SYN where
/// an ACK was judged, for a receiver that lets the first fragment's bytes win.
#[test]
fn odd_bytes_of_a_fragment_are_cut_off() {
    let whole = tcp(true, 5, 1, 1, 0x10, 1000, 30);
    let segment = &whole[34..];
    let mut odd = segment[..15].to_vec();
    odd[13] = 2;
    let pieces = [v4(A4, B4, 6, 0x2000, 3, &odd), v4(A4, B4, 6, 1, 3, &segment[8..])];
    let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
    let j = tracker.track(&Packet::whole(&pieces[0], Toward::Egress, Checksum::Verify), 0);
    assert!(matches!(j, Judgement::Held), "{j:?}");
    let j = tracker.track(&Packet::whole(&pieces[1], Toward::Egress, Checksum::Verify), 0);
    let Judgement::Tracked(t) = j else { panic!("{j:?}") };
    assert_eq!(t.state, CtState::New);
    let mut out = Vec::new();
    tracker.fragments().release(t.datagram.unwrap(), |f| out.push(f.to_vec()));
    assert_eq!(out, [v4(A4, B4, 6, 0x2000, 3, &segment[..8]), pieces[1].clone()]);
}

/// RFC 3168, 5.3: fragments that are ECN-capable and ones that are not do not make a datagram.
#[test]
fn fragments_of_mixed_ecn_make_no_datagram() {
    for (first, second, whole) in [(0, 0, true), (1, 1, true), (2, 3, true), (0, 2, false), (3, 0, false)] {
        let udp = [0, 9, 0, 53, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        let piece = |ecn: u8, fragment, data: &[u8]| {
            let mut f = v4(A4, B4, 17, fragment, 3, data);
            f[15] = ecn;
            f[24..26].fill(0);
            let sum = internet_checksum(&f[14..34]);
            f[24..26].copy_from_slice(&sum.to_be_bytes());
            f
        };
        let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
        let one = piece(first, 0x2000, &udp[..8]);
        let j = tracker.track(&Packet::whole(&one, Toward::Egress, Checksum::Verify), 0);
        assert!(matches!(j, Judgement::Held), "{j:?}");
        let two = piece(second, 1, &udp[8..]);
        let j = tracker.track(&Packet::whole(&two, Toward::Egress, Checksum::Verify), 0);
        assert_eq!(matches!(j, Judgement::Tracked(_)), whole, "{first} {second}: {j:?}");
        assert!(whole || tracker.fragments().is_empty());
    }
}

/// An ICMPv6 error is related although it quotes no more than the first bytes of an extension header.
#[test]
fn errors_may_quote_part_of_an_extension_header() {
    let frame = |to_vm: bool, proto: u8, payload: &[u8]| {
        let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0];
        f.extend((payload.len() as u16).to_be_bytes());
        f.extend([proto, 64]);
        let (src, dst) = if to_vm { ([0xfe; 16], [0xfd; 16]) } else { ([0xfd; 16], [0xfe; 16]) };
        f.extend(src);
        f.extend(dst);
        f.extend(payload);
        f
    };
    let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
    // A routing header, and behind it a protocol that nobody looks into.
    let sent = frame(false, 43, &[253, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    assert_eq!(judge(&mut tracker, &sent, Toward::Egress, 0).unwrap().state, CtState::New);
    for (quoted, state) in [(4, CtState::Related), (2, CtState::Related), (1, CtState::Invalid)] {
        let mut error = vec![3, 0, 0, 0, 0, 0, 0, 0];
        error.extend(&sent[14..54 + quoted]);
        let mut sum = pseudo_v6([0xfe; 16].into(), [0xfd; 16].into(), IpProto::ICMPV6, error.len() as u32);
        sum.add_bytes(&error);
        error[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        let judged = judge(&mut tracker, &frame(true, 58, &error), Toward::Ingress, 0).unwrap();
        assert_eq!(judged.state, state, "{quoted}");
    }
}

/// IPv6: a fragment header of a whole datagram changes nothing, and nothing may hide behind it.
#[test]
fn fragment_headers_of_whole_datagrams_hide_nothing() {
    let frame = |headers: &[u8]| {
        let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0];
        f.extend((headers.len() as u16).to_be_bytes());
        f.extend([44, 64]);
        f.extend([0xfd; 16]);
        f.extend([0xfe; 16]);
        f.extend(headers);
        f
    };
    let track = |frame: &[u8]| {
        let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
        match tracker.track(&Packet::whole(frame, Toward::Ingress, Checksum::Verify), 0) {
            Judgement::Tracked(t) => format!("{:?} {:?}", t.state, t.invalid),
            other => format!("{other:?}"),
        }
    };
    let udp = [0u8, 9, 0, 53, 0, 8, 0, 0];
    let behind = |headers: &[u8]| track(&frame(&[headers, &udp].concat()));
    assert_eq!(behind(&[17, 0, 0, 0, 0, 0, 0, 1]), "New None");
    assert_eq!(behind(&[0, 0, 0, 0, 0, 0, 0, 1, 17, 0, 1, 4, 0, 0, 0, 0]), "New None");
    // A jumbo payload option in front, once the fragment header is taken away.
    assert_eq!(behind(&[0, 0, 0, 0, 0, 0, 0, 1, 17, 0, 0xc2, 4, 0, 1, 0, 0]), "Malformed(HopByHop)");
    // Options longer than the packet, with nothing behind them that could be judged.
    assert_eq!(behind(&[0, 0, 0, 0, 0, 0, 0, 1, 17, 31, 1, 4, 0, 0, 0, 0]), "Invalid Some(Header)");
    // A fragment within.
    assert_eq!(behind(&[44, 0, 0, 0, 0, 0, 0, 1, 17, 0, 0, 8, 0, 0, 0, 2]), "Invalid Some(NoUpperProtocol)");
    assert_eq!(behind(&[44, 0, 0, 0, 0, 0, 0, 1, 17, 0, 0, 1, 0, 0, 0, 2]), "Invalid Some(NoUpperProtocol)");
    // Nothing in it; not even a whole fragment header.
    assert_eq!(track(&frame(&[59, 0, 0, 0, 0, 0, 0, 1])), "Malformed(Fragment)");
    assert_eq!(track(&frame(&[59, 0, 0, 1, 0, 0, 0, 1])), "Refused(Misfit)");
    assert_eq!(track(&frame(&[17, 0, 0, 0, 0, 0, 0])), "Malformed(Fragment)");
}

#[test]
fn a_refused_connection_leaves_nothing() {
    let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
    let frame = tcp(true, 1, 1, 0, 2, 100, 0);
    let j = tracker.track(&Packet::whole(&frame, Toward::Egress, Checksum::Verify), 0);
    assert!(matches!(j, Judgement::Tracked(Tracked { state: CtState::New, fresh: true, .. })), "{j:?}");
    assert_eq!(tracker.table().len(), 0);
}

#[test]
fn a_spoofed_source_is_not_the_vms_connection() {
    let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
    assert_eq!(judge(&mut tracker, &tcp(true, 1, 1, 0, 2, 100, 0), Toward::Egress, 0).unwrap().state, CtState::New);
    let answer = tcp(false, 1, 9, 2, 0x12, 100, 0);
    assert_eq!(judge(&mut tracker, &answer, Toward::Ingress, 0).unwrap().state, CtState::Established);
    // The VM's own address as source, from outside: not the VM's segment.
    let spoofed = tcp(true, 1, 2, 10, 0x10, 100, 0);
    assert_ne!(judge(&mut tracker, &spoofed, Toward::Ingress, 0).unwrap().state, CtState::Established);
}

#[test]
fn a_full_table_refuses_rather_than_forget_what_is_assured() {
    let mut tracker = Tracker::new(ModelTable::new(2), TrackConfig::default());
    for port in [1, 2] {
        judge(&mut tracker, &tcp(true, port, 1, 0, 2, 1000, 0), Toward::Egress, 0).unwrap();
        judge(&mut tracker, &tcp(false, port, 9, 2, 0x12, 1000, 0), Toward::Ingress, 0).unwrap();
        judge(&mut tracker, &tcp(true, port, 2, 10, 0x10, 1000, 0), Toward::Egress, 0).unwrap();
    }
    let frame = tcp(true, 3, 1, 0, 2, 1000, 0);
    let Judgement::Tracked(t) = tracker.track(&Packet::whole(&frame, Toward::Egress, Checksum::Verify), 0) else {
        panic!()
    };
    assert!(tracker.confirm(&t, 0).is_err());
    assert_eq!(tracker.table().len(), 2);
}

#[test]
fn overdue_and_exhausted_fragments_give_their_memory_back() {
    let config = TrackConfig { fragment_bytes: 4096, ..TrackConfig::default() };
    let mut tracker = Tracker::new(ModelTable::new(10), config);
    let mut held = 0;
    for id in 0..100 {
        let f = v4(B4, A4, 17, 0x2000, id, &[0; 504]);
        match tracker.track(&Packet::whole(&f, Toward::Ingress, Checksum::Verify), 0) {
            Judgement::Held => held += 1,
            Judgement::Refused(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(held > 0 && held < 100);
    assert_eq!(tracker.fragments().len(), held);
    tracker.fragments().expire(30_000, 1000);
    assert!(tracker.fragments().is_empty());
    assert_eq!(tracker.fragments().bytes_held(), 0);
    let f = v4(B4, A4, 17, 0x2000, 7, &[0; 504]);
    assert!(matches!(tracker.track(&Packet::whole(&f, Toward::Ingress, Checksum::Verify), 30_001), Judgement::Held));
}
