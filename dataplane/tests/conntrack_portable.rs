//! Connections that are handed to another host: nothing that they decide changes, and nothing that a hostile host may say does harm.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ferry_dataplane::conntrack::{
    Checksum, ConnTable, Connection, Judgement, MAX_TCP_WINDOW, ModelTable, Packet, Portable, PortableError,
    PortableKey, PortableSctp, PortableSide, PortableState, PortableTcp, Tally, Timeouts, Toward, TrackConfig, Tracker,
    Traffic, VERSION_MAX, Way,
};
use ferry_dataplane::offload::checksum::{internet_checksum, pseudo_v4};
use ferry_dataplane::packet::IpProto;
use ferry_dataplane::testing::replay::{read, replay_scenario, replay_scenario_with, run_step};
use proptest::prelude::*;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/firewall").join(name)
}

/// Moves all that is alive to a tracker of its own whose clock is `later_ms` ahead. Returns how many connections moved.
fn move_away(tracker: &mut Tracker<ModelTable>, now_ms: u64, later_ms: u64) -> usize {
    let config = *tracker.config();
    let there_ms = now_ms.wrapping_add(later_ms);
    let mut table = ModelTable::new(1 << 16);
    for conn in tracker.table().iter().filter(|c| !c.is_expired(now_ms)) {
        let portable = conn.to_portable(now_ms);
        let there = portable.to_connection(there_ms, &config.timeouts).unwrap_or_else(|e| panic!("{e}: {portable:?}"));
        assert_eq!(there.key, conn.key);
        assert_eq!(there.remaining_ms(there_ms), conn.remaining_ms(now_ms), "{conn:?}");
        assert_eq!(there.to_portable(there_ms), portable, "nothing is lost on the way");
        assert_eq!((there.policy_generation, there.decision), Default::default());
        table.insert(&there, there_ms).unwrap();
    }
    let moved = table.len();
    *tracker = Tracker::new(table, config);
    moved
}

/// Every recorded conversation, moved between any two of its steps and between all of them at once, is judged as if it had stayed.
fn moves(file: &str) {
    let doc = read(&data(file)).unwrap();
    let (mut runs, mut connections) = (0u32, 0usize);
    let mut clock = 0x9e37_79b9_7f4a_7c15u64;
    for scenario in doc["scenarios"].as_array().unwrap() {
        let steps = scenario["steps"].as_array().unwrap().len();
        let stayed = replay_scenario(&doc, scenario).unwrap();
        // Long ones: some places only.
        let stride = steps.div_ceil(24).max(1);
        let places = (1..steps).filter(|k| k % stride == 0).map(Some).chain([None]);
        for place in places {
            let moved = replay_scenario_with(&doc, scenario, |step, tracker, now_ms| {
                // Fragments stay behind: a datagram that is only half there is sent again.
                if place.is_some_and(|p| p != step) || tracker.fragments().bytes_held() != 0 {
                    return 0;
                }
                clock = clock.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let later_ms = clock >> 20;
                connections += move_away(tracker, now_ms, later_ms);
                later_ms
            })
            .unwrap();
            for (step, (a, b)) in stayed.iter().zip(&moved).enumerate() {
                assert_eq!(a, b, "{} step {step}, moved before {place:?}", scenario["name"]);
            }
            runs += 1;
        }
    }
    eprintln!("{file}: {runs} runs, {connections} connections moved");
    assert!(runs > 100 && connections > 100, "{runs} runs, {connections} connections");
}

#[test]
fn recorded_conversations_go_on() {
    moves("kernel-vectors.json.gz");
}

#[test]
fn recorded_walks_go_on() {
    moves("kernel-walks.json.gz");
}

const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// A TCP frame between A and B, checksums right. `options` are whole words.
fn tcp_frame(a_to_b: bool, numbers: (u32, u32), flags: u8, window: u16, options: &[u8], payload: usize) -> Vec<u8> {
    let (src, dst, ports) = if a_to_b { (A, B, [0x13, 0x88, 0, 80]) } else { (B, A, [0, 80, 0x13, 0x88]) };
    let mut t = ports.to_vec();
    t.extend(numbers.0.to_be_bytes());
    t.extend(numbers.1.to_be_bytes());
    t.extend([((20 + options.len()) as u8) << 2, flags]);
    t.extend(window.to_be_bytes());
    t.extend([0; 4]);
    t.extend(options);
    t.extend(vec![7; payload]);
    let mut sum = pseudo_v4(src, dst, IpProto::TCP, t.len() as u32);
    sum.add_bytes(&t);
    let sum = sum.finish();
    t[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + t.len()) as u16).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 6, 0, 0]);
    ip.extend(src.octets());
    ip.extend(dst.octets());
    let sum = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    f.extend(ip);
    f.extend(t);
    f
}

/// SYN options: none; SACK and a window scale of 7; a scale beyond what is allowed.
const OPTIONS: [&[u8]; 3] = [&[], &[4, 2, 3, 3, 7, 0, 0, 0], &[3, 3, 15, 0]];

type SegmentPlan = (bool, (u32, u32), u8, u16, usize, usize, u64);

fn segment() -> impl Strategy<Value = SegmentPlan> {
    let number = || prop_oneof![4 => 0u32..4000, 1 => any::<u32>(), 1 => 0x7fff_f000u32..0x8000_1000];
    (
        any::<bool>(),
        (number(), number()),
        prop_oneof![Just(2u8), Just(0x12), Just(0x10), Just(0x18), Just(0x11), Just(4), Just(0x14), any::<u8>()],
        prop_oneof![Just(0u16), Just(1000), Just(65535)],
        0usize..OPTIONS.len(),
        0usize..600,
        prop_oneof![8 => 0u64..3000, 1 => 0u64..400_000],
    )
}

fn frame_of(plan: &SegmentPlan) -> (Vec<u8>, Toward) {
    let (a_to_b, numbers, flags, window, options, payload, _) = *plan;
    let frame = tcp_frame(a_to_b, numbers, flags, window, OPTIONS[options], payload);
    (frame, if a_to_b { Toward::Egress } else { Toward::Ingress })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Any traffic at all, moved at any place.
    #[test]
    fn any_conversation_goes_on(
        plans in proptest::collection::vec(segment(), 1..60),
        moved_at in proptest::collection::btree_set(0usize..60, 1..5),
        later_ms in any::<u64>(),
        loose in any::<bool>(), liberal in any::<bool>(),
    ) {
        let config = TrackConfig { tcp_loose: loose, tcp_be_liberal: liberal, ..TrackConfig::default() };
        let mut stays = Tracker::new(ModelTable::new(100), config);
        let mut moves = Tracker::new(ModelTable::new(100), config);
        let (mut here_ms, mut there_ms) = (1000u64, 1000u64);
        for (step, plan) in plans.iter().enumerate() {
            here_ms += plan.6;
            there_ms = there_ms.wrapping_add(plan.6);
            if moved_at.contains(&step) {
                move_away(&mut moves, there_ms, later_ms);
                there_ms = there_ms.wrapping_add(later_ms);
            }
            let (frame, toward) = frame_of(plan);
            let one = run_step(&mut stays, &frame, toward, here_ms, |_| true);
            let other = run_step(&mut moves, &frame, toward, there_ms, |_| true);
            prop_assert_eq!(one, other);
        }
    }

    /// Whatever another host says: refused, or a connection that can be gone on with, that ends in time, and that is told again as it is.
    #[test]
    fn any_portable_is_survived(
        portable in portable(), now_ms in any::<u64>(), plans in proptest::collection::vec(segment(), 1..20),
    ) {
        let timeouts = Timeouts::default();
        match portable.to_connection(now_ms, &timeouts) {
            Ok(conn) => {
                let again = conn.to_portable(now_ms);
                prop_assert!(again.remaining_ms >= 1 && again.remaining_ms <= portable.remaining_ms);
                prop_assert!(again.remaining_ms <= timeouts.tcp_established_ms);
                prop_assert_eq!(Portable { remaining_ms: portable.remaining_ms, ..again }, portable);
                prop_assert!(!conn.decision.allowed() && conn.decision.admission().is_none());
                let end_ms = now_ms.wrapping_add(u64::from(again.remaining_ms));
                prop_assert!(conn.is_expired(end_ms));
                go_on(conn, now_ms, &plans);
            }
            Err(e) => prop_assert!(!e.to_string().is_empty()),
        }
    }
}

/// Tracks segments on a connection that came from outside.
fn go_on(conn: Connection, now_ms: u64, plans: &[SegmentPlan]) {
    let mut tracker = Tracker::new(ModelTable::new(10), TrackConfig::default());
    tracker.table_mut().insert(&conn, now_ms).unwrap();
    let mut now_ms = now_ms;
    for plan in plans {
        now_ms = now_ms.wrapping_add(plan.6);
        let (frame, toward) = frame_of(plan);
        if let Judgement::Tracked(t) = tracker.track(&Packet::whole(&frame, toward, Checksum::Verify), now_ms) {
            let _ = tracker.confirm(&t, now_ms);
        }
        for conn in tracker.table().iter() {
            assert!(conn.remaining_ms(now_ms) <= TrackConfig::default().timeouts.tcp_established_ms);
        }
    }
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        4 => Just(IpAddr::V4(A)),
        2 => Just(IpAddr::V4(B)),
        2 => Just(IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1))),
        1 => any::<u32>().prop_map(|a| IpAddr::V4(a.into())),
        1 => any::<u128>().prop_map(|a| IpAddr::V6(a.into())),
        // An IPv6 address that looks like an IPv4 one stays IPv6.
        1 => Just(IpAddr::V6(A.to_ipv6_mapped())),
    ]
}

fn key() -> impl Strategy<Value = PortableKey> {
    let port = || prop_oneof![3 => Just(0u16), 2 => Just(5000), 2 => Just(80), 1 => Just(0x0800), 1 => Just(0x8000), 1 => any::<u16>()];
    let proto = prop_oneof![
        4 => Just(6u8), 2 => Just(17), 2 => Just(132), 1 => Just(1), 1 => Just(58), 1 => Just(47), 1 => Just(136), 1 => any::<u8>()
    ];
    (address(), address(), port(), port(), any::<u16>(), proto, any::<bool>()).prop_map(
        |(local, remote, local_port, remote_port, zone, proto, asked_by_remote)| PortableKey {
            local,
            remote,
            local_port,
            remote_port,
            zone,
            proto: IpProto(proto),
            asked_by_remote,
        },
    )
}

fn side() -> impl Strategy<Value = PortableSide> {
    let near = || prop_oneof![3 => 0u32..100_000, 1 => any::<u32>()];
    (any::<u32>(), near(), near(), near(), 0u8..16, 0u8..66).prop_map(
        |(end, credit, max_window, max_ack, scale, flags)| PortableSide {
            end,
            max_end: end.wrapping_add(credit),
            max_window,
            max_ack: end.wrapping_sub(max_ack),
            scale: if flags & 1 == 0 && scale < 12 { 0 } else { scale },
            flags,
        },
    )
}

fn protocol() -> impl Strategy<Value = PortableState> {
    let tcp = (
        [side(), side()],
        (0u8..7, any::<bool>(), any::<u32>(), any::<u16>()),
        (any::<u32>(), any::<u16>(), 0u8..16, 0u8..17, any::<u8>()),
    )
        .prop_map(
            |(
                sides,
                (last_kind, last_reply, last_end, last_len),
                (last_ack, last_window, last_scale, last_flags, retrans),
            )| {
                PortableState::Tcp(PortableTcp {
                    sides,
                    last_kind,
                    last_reply,
                    last_end,
                    last_len,
                    last_ack,
                    last_window,
                    last_scale,
                    last_flags,
                    retrans,
                })
            },
        );
    let way = prop_oneof![Just(None), Just(Some(Way::Original)), Just(Some(Way::Reply))];
    let sctp = (any::<[u32; 2]>(), any::<[bool; 2]>(), way)
        .prop_map(|(tags, init, heartbeat_failed)| PortableState::Sctp(PortableSctp { tags, init, heartbeat_failed }));
    prop_oneof![
        3 => tcp,
        1 => any::<u16>().prop_map(|age_ms| PortableState::Udp { age_ms }),
        1 => sctp,
        1 => Just(PortableState::Plain),
    ]
}

/// Half of them fit together.
fn portable() -> impl Strategy<Value = Portable> {
    let tally = || any::<u32>().prop_map(|raw| Tally::from_raw(raw).unwrap_or_default());
    let traffic = (tally(), tally(), tally(), tally());
    let ms = prop_oneof![8 => 1u32..500_000_000, 1 => Just(0u32), 1 => any::<u32>()];
    let version = prop_oneof![8 => 0..=VERSION_MAX, 1 => any::<u32>()];
    (key(), any::<[bool; 4]>(), 0u8..12, protocol(), traffic, ms, version).prop_map(
        |(mut key, [opened_by_remote, seen_reply, assured, fit], mut state, protocol, t, remaining_ms, version)| {
            if fit {
                match protocol {
                    PortableState::Tcp(_) => key.proto = IpProto::TCP,
                    PortableState::Udp { .. } => key.proto = IpProto::UDP,
                    PortableState::Sctp(_) => key.proto = IpProto::SCTP,
                    PortableState::Plain => {}
                }
                if !matches!(key.proto, IpProto::TCP | IpProto::SCTP) {
                    state = 0;
                }
                key.asked_by_remote = matches!(key.proto, IpProto::ICMP | IpProto::ICMPV6) && opened_by_remote;
            }
            Portable {
                key,
                opened_by_remote,
                seen_reply,
                assured,
                state,
                protocol,
                traffic: [Traffic { packets: t.0, bytes: t.1 }, Traffic { packets: t.2, bytes: t.3 }],
                remaining_ms,
                version,
            }
        },
    )
}

fn key_of(proto: IpProto, local_port: u16, remote_port: u16) -> PortableKey {
    PortableKey { local: A.into(), remote: B.into(), local_port, remote_port, zone: 0, proto, asked_by_remote: false }
}

fn open_tcp() -> Portable {
    let side = PortableSide { end: 1000, max_end: 66_000, max_window: 65_000, max_ack: 900, scale: 7, flags: 0x23 };
    Portable {
        key: key_of(IpProto::TCP, 5000, 80),
        opened_by_remote: false,
        seen_reply: true,
        assured: true,
        state: 3,
        protocol: PortableState::Tcp(PortableTcp { sides: [side, side], last_kind: 3, ..PortableTcp::default() }),
        traffic: [Traffic::default(); 2],
        remaining_ms: 1000,
        version: 5,
    }
}

fn plain(key: PortableKey) -> Portable {
    Portable { key, state: 0, assured: false, protocol: PortableState::Plain, ..open_tcp() }
}

#[test]
fn each_impossibility_is_named() {
    let tcp = |change: &dyn Fn(&mut PortableTcp)| {
        let mut p = open_tcp();
        let PortableState::Tcp(t) = &mut p.protocol else { panic!() };
        change(t);
        p
    };
    let icmp = |question: u8, remote: bool| {
        let key = key_of(IpProto::ICMP, 7, u16::from(question) << 8);
        Portable { opened_by_remote: remote, ..plain(PortableKey { asked_by_remote: remote, ..key }) }
    };
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let asked = PortableKey { asked_by_remote: true, ..key_of(IpProto::UDP, 1, 2) };
    let udp = Portable { protocol: PortableState::Udp { age_ms: 5 }, ..plain(key_of(IpProto::UDP, 1, 2)) };
    use PortableError as E;
    let cases: Vec<(Portable, Result<(), E>)> = vec![
        (open_tcp(), Ok(())),
        (udp, Ok(())),
        (icmp(8, true), Ok(())),
        (icmp(8, false), Ok(())),
        (plain(key_of(IpProto::GRE, 0, 9)), Ok(())),
        (plain(key_of(IpProto(89), 0, 0)), Ok(())),
        (Portable { key: PortableKey { local: v6, ..open_tcp().key }, ..open_tcp() }, Err(E::MixedFamilies)),
        (plain(PortableKey { local: v6, remote: v6, ..icmp(8, false).key }), Err(E::IcmpFamily)),
        (plain(key_of(IpProto::ICMPV6, 7, 128 << 8)), Err(E::IcmpFamily)),
        // An answer's type, an error's.
        (icmp(0, false), Err(E::IcmpQuestion(0))),
        (icmp(3, true), Err(E::IcmpQuestion(3))),
        (Portable { opened_by_remote: false, ..icmp(8, true) }, Err(E::Asker)),
        (Portable { key: asked, ..udp }, Err(E::Asker)),
        (plain(key_of(IpProto(89), 0, 1)), Err(E::Ports)),
        (plain(key_of(IpProto::GRE, 1, 1)), Err(E::Ports)),
        (Portable { key: key_of(IpProto::UDP, 1, 2), ..open_tcp() }, Err(E::Protocol)),
        (Portable { protocol: PortableState::Plain, ..open_tcp() }, Err(E::Protocol)),
        (Portable { protocol: PortableState::Plain, ..udp }, Err(E::Protocol)),
        (Portable { protocol: udp.protocol, ..plain(key_of(IpProto::GRE, 0, 0)) }, Err(E::Protocol)),
        (Portable { state: 0, ..open_tcp() }, Err(E::State(0))),
        (Portable { state: 10, ..open_tcp() }, Err(E::State(10))),
        (Portable { state: 3 | 0x40, ..open_tcp() }, Err(E::State(0x43))),
        (Portable { state: 1, ..udp }, Err(E::State(1))),
        (Portable { seen_reply: false, ..open_tcp() }, Err(E::Assured)),
        (Portable { seen_reply: false, assured: true, ..udp }, Err(E::Assured)),
        (Portable { assured: true, ..icmp(8, true) }, Err(E::Assured)),
        (Portable { assured: true, ..plain(key_of(IpProto(89), 0, 0)) }, Err(E::Assured)),
        (tcp(&|t| t.sides[1].flags |= 0x40), Err(E::Flags(0x40))),
        (tcp(&|t| t.last_flags = 0x10), Err(E::Flags(0x10))),
        (tcp(&|t| t.last_kind = 6), Err(E::SegmentKind(6))),
        (tcp(&|t| t.sides[0].scale = 15), Err(E::Scale(15))),
        (tcp(&|t| t.sides[0].flags = 0), Err(E::Scale(7))),
        (tcp(&|t| t.last_scale = 15), Err(E::Scale(15))),
        (tcp(&|t| t.sides[0].max_window = MAX_TCP_WINDOW + 1), Err(E::Window)),
        (tcp(&|t| t.sides[1].max_end = 1000 + (1 << 30) + 1), Err(E::Window)),
        (Portable { remaining_ms: u32::MAX, ..open_tcp() }, Err(E::Lifetime(u32::MAX))),
        (Portable { remaining_ms: 0, ..open_tcp() }, Err(E::Expired)),
        (Portable { version: VERSION_MAX + 1, ..open_tcp() }, Err(E::Version(VERSION_MAX + 1))),
    ];
    for (portable, expected) in cases {
        let got = portable.to_connection(77, &Timeouts::default()).map(|_| ());
        assert_eq!(got, expected, "{portable:?}");
    }
    assert!(Tally::from_raw(5 << 27 | 1).is_none(), "counting never leads here");
    assert!(Tally::from_raw(u32::MAX).is_some());
}

/// Nobody can make an entry live longer here than this host's time-outs say.
#[test]
fn lifetimes_are_cut_to_this_hosts_timeouts() {
    let t = Timeouts::default();
    let day_ms = 86_400_000;
    let udp = |assured| Portable {
        protocol: PortableState::Udp { age_ms: 5 },
        assured,
        remaining_ms: day_ms,
        ..plain(key_of(IpProto::UDP, 1, 2))
    };
    let sctp = Portable {
        state: 4,
        protocol: PortableState::Sctp(PortableSctp::default()),
        remaining_ms: day_ms,
        ..plain(key_of(IpProto::SCTP, 1, 2))
    };
    let ping = Portable { remaining_ms: day_ms, ..plain(key_of(IpProto::ICMP, 1, 0x0800)) };
    for (portable, longest_ms) in [
        (Portable { remaining_ms: day_ms, ..open_tcp() }, day_ms),
        (Portable { remaining_ms: day_ms * 20, ..open_tcp() }, t.tcp_established_ms),
        (Portable { remaining_ms: day_ms, state: 1, assured: false, ..open_tcp() }, t.tcp_syn_sent_ms),
        (Portable { remaining_ms: day_ms, state: 7, ..open_tcp() }, t.tcp_time_wait_ms),
        (udp(false), t.udp_ms),
        (udp(true), t.udp_stream_ms),
        (sctp, t.sctp_established_ms),
        (ping, t.icmp_ms),
        (Portable { remaining_ms: day_ms, ..plain(key_of(IpProto(89), 0, 0)) }, t.generic_ms),
    ] {
        for now_ms in [0, u64::from(u32::MAX) - 5, 1 << 40] {
            let conn = portable.to_connection(now_ms, &t).unwrap();
            assert_eq!(conn.remaining_ms(now_ms), longest_ms, "{portable:?}");
        }
    }
    let none = Timeouts { udp_ms: 0, ..t };
    assert_eq!(udp(false).to_connection(5, &none).unwrap_err(), PortableError::Expired);
}

/// A conversation that went on while nobody watched: out of the window as it was last known; with the windows forgotten, taken up
/// with one segment of each side, and then as strict as ever.
#[test]
fn forgotten_windows_are_found_again() {
    const SYN: u8 = 2;
    const ACK: u8 = 0x10;
    const RST: u8 = 4;
    let options = OPTIONS[1];
    let config = TrackConfig { tcp_loose: false, ..TrackConfig::default() };
    let opened = || {
        let mut tracker = Tracker::new(ModelTable::new(10), config);
        for (a_to_b, numbers, flags, options) in [
            (true, (1000, 0), SYN, options),
            (false, (5000, 1001), SYN | ACK, options),
            (true, (1001, 5001), ACK, &[][..]),
        ] {
            let frame = tcp_frame(a_to_b, numbers, flags, 500, options, 0);
            let toward = if a_to_b { Toward::Egress } else { Toward::Ingress };
            assert_eq!(run_step(&mut tracker, &frame, toward, 10, |_| true).verdict, "pass");
        }
        tracker
    };
    // 100 MB later.
    let later = |a_to_b: bool, flags: u8, ahead: u32| {
        let far = 100_000_000 + ahead;
        let numbers = if a_to_b { (1001 + far, 5001 + far) } else { (5001 + far, 1001 + far) };
        let toward = if a_to_b { Toward::Egress } else { Toward::Ingress };
        (tcp_frame(a_to_b, numbers, flags, 500, &[], 100), toward)
    };
    let state_of = |tracker: &mut Tracker<ModelTable>, (frame, toward): (Vec<u8>, Toward)| {
        run_step(tracker, &frame, toward, 20, |_| true).ct_state
    };
    let mut strict = opened();
    assert_eq!(state_of(&mut strict, later(true, ACK, 0)), Some("inv"), "without forgetting");

    for first in [true, false] {
        let mut tracker = opened();
        let mut conn = *tracker.table().iter().next().unwrap();
        assert!(conn.forget_windows());
        assert!(!conn.forget_windows(), "nothing left to forget");
        let there = conn.to_portable(20).to_connection(20, &config.timeouts).unwrap();
        tracker = Tracker::new(ModelTable::new(10), config);
        tracker.table_mut().insert(&there, 20).unwrap();
        assert_eq!(state_of(&mut tracker, later(first, ACK, 0)), Some("est"));
        assert_eq!(state_of(&mut tracker, later(!first, ACK, 0)), Some("est"));
        assert_eq!(state_of(&mut tracker, later(first, ACK, 100)), Some("est"));
        for side in [true, false] {
            assert_eq!(state_of(&mut tracker, later(side, ACK, 50_000_000)), Some("inv"), "strict again");
        }
        // Scales are known still: the windows are 500 << 7 bytes.
        for (ahead, state) in [(60_000, "est"), (70_000 + 60_000, "inv")] {
            let far = 100_000_000;
            let numbers = if first { (1001 + far + ahead, 5001 + far) } else { (5001 + far + ahead, 1001 + far) };
            let toward = if first { Toward::Egress } else { Toward::Ingress };
            let segment = (tcp_frame(first, numbers, ACK, 500, &[], 100), toward);
            assert_eq!(state_of(&mut tracker, segment), Some(state), "{ahead} ahead");
        }
        assert_eq!(tracker.table().iter().next().unwrap().state(), 3);
    }
    // A RST that anybody could have sent does not end it, though it comes first.
    let mut tracker = opened();
    let mut conn = *tracker.table().iter().next().unwrap();
    assert!(conn.forget_windows());
    tracker = Tracker::new(ModelTable::new(10), config);
    tracker.table_mut().insert(&conn, 20).unwrap();
    let _ = state_of(&mut tracker, later(false, RST, 0));
    assert_eq!(tracker.table().iter().next().unwrap().state(), 3);

    // In the handshake nothing lags; other protocols have no windows.
    let mut half = Portable { state: 1, assured: false, ..open_tcp() }.to_connection(0, &config.timeouts).unwrap();
    assert!(!half.forget_windows());
    let udp = Portable { protocol: PortableState::Udp { age_ms: 5 }, ..plain(key_of(IpProto::UDP, 1, 2)) };
    assert!(!udp.to_connection(0, &config.timeouts).unwrap().forget_windows());
}

/// UDP: how long ago the first packet was survives the change of clocks, and so does the wait for the stream.
#[test]
fn udp_keeps_its_age() {
    let udp = |age_ms| Portable { protocol: PortableState::Udp { age_ms }, ..plain(key_of(IpProto::UDP, 1, 2)) };
    for now_ms in [0u64, 1000, u64::from(u32::MAX), 1 << 40] {
        for age_ms in [0u16, 1, 1999, 2000, 2001, u16::MAX] {
            let conn = udp(age_ms).to_connection(now_ms, &Timeouts::default()).unwrap();
            assert_eq!(conn.to_portable(now_ms).protocol, PortableState::Udp { age_ms });
            let later = conn.to_portable(now_ms + 10);
            assert_eq!(later.protocol, PortableState::Udp { age_ms: age_ms.saturating_add(10) });
        }
    }
}
