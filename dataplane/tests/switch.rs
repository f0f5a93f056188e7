//! The whole packet path over ports in private memory, with real PMD threads.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ferry_dataplane::bridge::vlan::VlanMode;
use ferry_dataplane::clock::Clock;
use ferry_dataplane::frame::{Gso, Offload};
use ferry_dataplane::pmd::{IdleTuning, PmdId};
use ferry_dataplane::port::TxCapabilities;
use ferry_dataplane::qsbr::Domain;
use ferry_dataplane::switch::{BridgeOptions, PmdOptions, PortOptions, Switch, SwitchError};
use ferry_dataplane::testing::{MemKinds, NapSleeper, Wire};

fn switch(pmds: usize) -> Arc<Switch<MemKinds>> {
    let switch = Switch::new(Domain::new(), Clock::default());
    for i in 0..pmds {
        add_pmd(&switch, i);
    }
    switch
}

fn add_pmd(switch: &Switch<MemKinds>, i: usize) -> PmdId {
    switch
        .add_pmd(PmdOptions {
            name: format!("pmd{i}"),
            idle: Arc::new(IdleTuning::new(50, 200)),
            sleeper: Box::new(NapSleeper::default()),
            on_start: Box::new(|| {}),
        })
        .unwrap()
}

fn port(switch: &Switch<MemKinds>, name: &str, bridge: u16, vlan: VlanMode) -> (u16, Arc<Wire>) {
    let wire = Wire::new();
    let options = PortOptions { name: name.into(), bridge: Some(bridge), vlan, ..PortOptions::default() };
    let id = switch.add_port(options, wire.tx(), vec![wire.rx()], &[]).unwrap();
    (id, wire)
}

fn frame(dst: u64, src: u64, tag: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut f = Vec::new();
    f.extend_from_slice(&dst.to_be_bytes()[2..]);
    f.extend_from_slice(&src.to_be_bytes()[2..]);
    if let Some(tci) = tag {
        f.extend_from_slice(&[0x81, 0x00]);
        f.extend_from_slice(&tci.to_be_bytes());
    }
    f.extend_from_slice(&[0x88, 0xb5]); // local experimental EtherType
    f.extend_from_slice(payload);
    f
}

/// Waits until the switch has received `n` frames in all, then returns its totals.
fn settled(switch: &Switch<MemKinds>, n: u64) -> (u64, u64, u64) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let s = switch.stats();
        if s.received() >= n || Instant::now() > end {
            let s = switch.stats();
            assert_eq!(s.received(), s.forwarded() + s.dropped(), "{s:#?}");
            return (s.received(), s.forwarded(), s.dropped());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

const A: u64 = 0x0200_0000_000a;
const B: u64 = 0x0200_0000_000b;
const ALL: u64 = 0xffff_ffff_ffff;

#[test]
fn floods_learns_and_isolates_bridges() {
    let sw = switch(2);
    let br0 = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let br1 = sw.add_bridge("br1", BridgeOptions::default()).unwrap();
    let (_, a) = port(&sw, "a", br0, VlanMode::default());
    let (pb, b) = port(&sw, "b", br0, VlanMode::default());
    let (_, c) = port(&sw, "c", br0, VlanMode::default());
    let (_, other) = port(&sw, "other", br1, VlanMode::default());

    a.put(&frame(ALL, A, None, b"hello"));
    settled(&sw, 1);
    assert_eq!(b.take(), [frame(ALL, A, None, b"hello")]);
    assert_eq!(c.take(), [frame(ALL, A, None, b"hello")]);
    assert!(a.take().is_empty() && other.take().is_empty());

    b.put(&frame(A, B, None, b"answer"));
    settled(&sw, 2);
    assert_eq!(a.take(), [frame(A, B, None, b"answer")]);
    assert!(c.take().is_empty(), "A is known: no flood");

    // Out of the port it came from: dropped, once, under its name.
    b.put(&frame(B, B, None, b"self"));
    assert_eq!(settled(&sw, 3), (3, 2, 1));
    let stats = sw.stats();
    let port_b = stats.ports.iter().find(|p| p.id == pb).unwrap();
    assert_eq!(port_b.rx.drops.get("same_port"), Some(&1));
    // Nobody else in br1: no destination.
    other.put(&frame(ALL, A, None, b"alone"));
    assert_eq!(settled(&sw, 4), (4, 2, 2));
    // Counters of a removed port stay in the totals.
    sw.remove_port(pb).unwrap();
    assert_eq!(settled(&sw, 4), (4, 2, 2));
    assert_eq!(sw.fdb(br0).unwrap().len(), 1, "its stations went with it");
}

#[test]
fn frames_for_nobody_known_go_to_every_port_that_may_have_them_even_if_it_is_one() {
    let sw = switch(1);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (pa, a) = port(&sw, "a10", br, VlanMode::Access { tag: 10 });
    let (_, b) = port(&sw, "b10", br, VlanMode::Access { tag: 10 });
    let (_, other) = port(&sw, "c20", br, VlanMode::Access { tag: 20 });
    let frames: Vec<_> = (0..40u8).map(|n| frame(B, A, None, &[n])).collect();
    a.put_all(&frames);
    assert_eq!(settled(&sw, 40), (40, 40, 0));
    assert_eq!(b.take(), frames);
    assert!(other.take().is_empty());
    // The station turns up behind the port that asked for it.
    a.put(&frame(ALL, B, None, b"here"));
    settled(&sw, 41);
    a.put(&frames[0]);
    assert_eq!(settled(&sw, 42), (42, 41, 1));
    let stats = sw.stats();
    assert_eq!(stats.ports.iter().find(|p| p.id == pa).unwrap().rx.drops.get("same_port"), Some(&1));
    b.take();
    // Nobody at all, and then two of them.
    other.put(&frame(B, A, None, b"alone"));
    assert_eq!(settled(&sw, 43), (43, 41, 2));
    let (_, trunk) = port(&sw, "trunk", br, VlanMode::Trunk { trunks: vec![10] });
    let unknown = frame(0x0200_0000_0077, A, None, b"for whom?");
    a.put_all(&[unknown.clone(), unknown.clone()]);
    assert_eq!(settled(&sw, 45), (45, 43, 2));
    assert_eq!((b.take(), trunk.take().len()), (vec![unknown.clone(), unknown], 2));
}

#[test]
fn vlans_are_kept_apart_and_tags_rewritten() {
    let sw = switch(1);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (_, a10) = port(&sw, "a10", br, VlanMode::Access { tag: 10 });
    let (_, b10) = port(&sw, "b10", br, VlanMode::Access { tag: 10 });
    let (_, c20) = port(&sw, "c20", br, VlanMode::Access { tag: 20 });
    let (_, trunk) = port(&sw, "trunk", br, VlanMode::Trunk { trunks: vec![10] });
    let (_, native) = port(&sw, "native", br, VlanMode::NativeUntagged { tag: 10, trunks: vec![20] });

    a10.put(&frame(ALL, A, None, b"x"));
    settled(&sw, 1);
    assert_eq!(b10.take(), [frame(ALL, A, None, b"x")]);
    assert_eq!(trunk.take(), [frame(ALL, A, Some(10), b"x")]);
    assert_eq!(native.take(), [frame(ALL, A, None, b"x")]);
    assert!(c20.take().is_empty());

    trunk.put(&frame(A, B, Some(10), b"back"));
    settled(&sw, 2);
    assert_eq!(a10.take(), [frame(A, B, None, b"back")]);
    // Not this trunk's VLAN, and an access port that receives a tag.
    trunk.put(&frame(A, B, Some(20), b"no"));
    a10.put(&frame(B, A, Some(10), b"no"));
    assert_eq!(settled(&sw, 4), (4, 2, 2));
    let drops: u64 = sw.stats().ports.iter().filter_map(|p| p.rx.drops.get("vlan_not_allowed")).sum();
    assert_eq!(drops, 2);
}

#[test]
fn every_frame_is_counted_once_whatever_happens_to_it() {
    let sw = switch(2);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (pa, a) = port(&sw, "a", br, VlanMode::default());
    let (_, b) = port(&sw, "b", br, VlanMode::default());
    b.put(&frame(ALL, B, None, b""));
    settled(&sw, 1);
    a.take();
    b.room.store(100, Ordering::Relaxed);
    let mut sent = 1;
    for i in 0..500u64 {
        a.put(&frame(B, A, None, &i.to_be_bytes()));
        sent += 1;
    }
    for bad in [frame(B, ALL, None, b""), frame(0x0180_c200_0000, A, None, b""), vec![1, 2, 3], frame(B, 0, None, b"")]
    {
        a.put(&bad);
        sent += 1;
    }
    let (received, forwarded, dropped) = settled(&sw, sent);
    assert_eq!((received, forwarded, dropped), (sent, 101, sent - 101));
    let stats = sw.stats();
    let drops = &stats.ports.iter().find(|p| p.id == pa).unwrap().rx.drops;
    assert_eq!(drops.get("tx_queue_full"), Some(&400));
    assert_eq!(drops.get("bad_source_mac"), Some(&2));
    assert_eq!(drops.get("link_local"), Some(&1));
    assert_eq!(drops.get("rx_too_short"), Some(&1));
    let frames = b.take();
    assert_eq!(frames.len(), 100);
    for (i, f) in frames.iter().enumerate() {
        assert_eq!(f, &frame(B, A, None, &(i as u64).to_be_bytes()), "in order");
    }
}

#[test]
fn queues_move_between_threads_and_ports_come_and_go_under_traffic() {
    let sw = switch(2);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (pa, a) = port(&sw, "a", br, VlanMode::default());
    let (_, b) = port(&sw, "b", br, VlanMode::default());
    b.put(&frame(ALL, B, None, b""));
    settled(&sw, 1);
    a.take();
    let mut next = 0u64;
    for round in 0..200u16 {
        for _ in 0..50 {
            a.put(&frame(B, A, None, &next.to_be_bytes()));
            next += 1;
        }
        sw.assign_rxq(pa, 0, round % 2).unwrap();
        let (extra, wire) = port(&sw, "extra", br, VlanMode::default());
        wire.put(&frame(B, A + 100, None, b"extra"));
        sw.remove_port(extra).unwrap();
        if round % 50 == 25 {
            sw.remove_pmd(1).unwrap();
            assert_eq!(add_pmd(&sw, 1), 1);
        }
    }
    settled(&sw, 1 + next);
    let end = Instant::now() + Duration::from_secs(10);
    let mut got: Vec<u64> = Vec::new();
    while (got.len() as u64) < next && Instant::now() < end {
        got.extend(
            b.take().iter().filter(|f| f.len() == 22).map(|f| u64::from_be_bytes(f[14..22].try_into().unwrap())),
        );
    }
    assert_eq!(got, (0..next).collect::<Vec<_>>(), "nothing lost, doubled or reordered");
}

#[test]
fn originated_frames_follow_the_ports_bridge_and_vlan() {
    let sw = switch(1);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (pa, a) = port(&sw, "a", br, VlanMode::Access { tag: 7 });
    let (_, trunk) = port(&sw, "trunk", br, VlanMode::default());
    sw.inject(pa, &frame(ALL, A, None, b"rarp")).unwrap();
    assert_eq!(sw.inject(pa, b"short"), Err(SwitchError::BadFrame(5)));
    settled(&sw, 1);
    assert_eq!(trunk.take(), [frame(ALL, A, Some(7), b"rarp")]);
    assert!(a.take().is_empty());
    assert_eq!(sw.stats().originated.forwarded, 1);
    assert_eq!(sw.fdb(br).unwrap()[0].port, pa, "announced stations are learned behind the port");
}

#[test]
fn refusals_change_nothing() {
    let sw = switch(1);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (pa, _a) = port(&sw, "a", br, VlanMode::default());
    assert!(matches!(sw.remove_bridge(br), Err(SwitchError::BridgeInUse { ports: 1, .. })));
    assert_eq!(sw.remove_pmd(0), Err(SwitchError::LastPmd));
    assert_eq!(sw.add_bridge("br0", BridgeOptions::default()), Err(SwitchError::NameTaken("br0".into())));
    let bad =
        PortOptions { name: "a".into(), bridge: Some(br), vlan: VlanMode::Access { tag: 4095 }, ..Default::default() };
    assert!(matches!(sw.update_port(pa, bad), Err(SwitchError::Vlan(_))));
    assert_eq!(sw.assign_rxq(pa, 3, 0), Err(SwitchError::NoQueue { port: pa, queue: 3 }));
    assert_eq!(sw.stats().ports.len(), 1);
}

/// A TCP/IPv4 frame whose checksum field holds the pseudo-header sum, as a guest with checksum offload sends it.
fn tcp_frame(payload: &[u8]) -> Vec<u8> {
    let mut f = frame(B, A, None, &[]);
    f[12..14].copy_from_slice(&[0x08, 0x00]);
    let total = 20 + 20 + payload.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = !ones(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = vec![0x30, 0x39, 0, 80, 0, 0, 0, 100, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0];
    let mut pseudo = vec![10, 0, 0, 1, 10, 0, 0, 2, 0, 6];
    pseudo.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    let sum = ones(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    f.extend(ip);
    f.extend(tcp);
    f.extend_from_slice(payload);
    f
}

/// One's complement sum, the slow and obvious way.
fn ones(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Checks both checksums of an untagged TCP/IPv4 frame and returns (sequence number, flags, payload).
fn check_tcp(f: &[u8]) -> (u32, u8, Vec<u8>) {
    let ip = &f[14..];
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    assert_eq!(total, ip.len());
    assert_eq!(ones(&ip[..20]), 0xffff, "IPv4 header checksum");
    let mut covered = ip[12..20].to_vec();
    covered.extend_from_slice(&[0, 6]);
    covered.extend_from_slice(&((total - 20) as u16).to_be_bytes());
    covered.extend_from_slice(&ip[20..]);
    assert_eq!(ones(&covered), 0xffff, "TCP checksum");
    (u32::from_be_bytes(ip[24..28].try_into().unwrap()), ip[33], ip[40..].to_vec())
}

#[test]
fn owed_work_is_passed_on_or_finished_in_software() {
    let sw = switch(1);
    let br = sw.add_bridge("br0", BridgeOptions::default()).unwrap();
    let (_, a) = port(&sw, "a", br, VlanMode::default());
    let (_, b) = port(&sw, "b", br, VlanMode::default());
    b.put(&frame(ALL, B, None, b""));
    settled(&sw, 1);
    a.take();
    let payload: Vec<u8> = (0..9000u32).map(|i| (i * 7) as u8).collect();
    let csum = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
    let tso = Offload { gso: Gso::TcpV4, gso_size: 1400, hdr_len: 54, ..csum };
    let small = tcp_frame(&payload[..333]);
    let large = tcp_frame(&payload);
    for cut in [0, 7, 13, 100] {
        a.segment_bytes.store(cut, Ordering::Relaxed);
        let n = sw.stats().received();
        // An output that takes everything gets the frames as they are.
        *b.capabilities.lock().unwrap() = TxCapabilities { csum: true, tso4: true, ..TxCapabilities::default() };
        a.put_offload(&small, csum);
        a.put_offload(&large, tso);
        settled(&sw, n + 2);
        let as_is = b.take_offload() == [(small.clone(), csum), (large.clone(), tso)];
        assert!(as_is, "{:#?}", sw.stats().ports[0]);
        // One that takes nothing gets finished ones, in order, within its frame limit.
        *b.capabilities.lock().unwrap() = TxCapabilities { max_frame_bytes: 1518, ..TxCapabilities::default() };
        a.put_offload(&large, tso);
        a.put_offload(&small, csum);
        a.put(&large);
        settled(&sw, n + 5);
        let out = b.take_offload();
        assert_eq!(out.len(), 8, "7 segments, the small frame; the long one without segmentation does not fit");
        let mut seen = Vec::new();
        for (i, (f, owed)) in out[..7].iter().enumerate() {
            assert_eq!(*owed, Offload::default());
            let (seq, flags, part) = check_tcp(f);
            assert_eq!(seq, 100 + seen.len() as u32);
            assert_eq!(flags & 0x08 != 0, i == 6, "PSH on the last alone");
            seen.extend(part);
        }
        assert_eq!(seen, payload);
        assert_eq!(check_tcp(&out[7].0).2, &payload[..333]);
    }
    let drops = sw.stats();
    assert_eq!(drops.ports[0].rx.drops.get("tx_too_long"), Some(&4));
    // Claims that do not fit the frame are refused.
    for lie in [
        Offload { csum_start: 9, ..csum },
        Offload { csum_start: 2000, ..csum },
        Offload { csum_offset: 4000, ..csum },
        Offload { csum_offset: 2, ..csum },
        Offload { gso: Gso::TcpV6, gso_size: 1400, ..csum },
        Offload { gso_size: 0, ..tso },
        Offload { needs_csum: false, ..tso },
    ] {
        a.put_offload(&small, lie);
    }
    let n = sw.stats().received();
    settled(&sw, n.max(drops.received() + 7));
    assert_eq!(sw.stats().ports[0].rx.drops.get("rx_bad_offload"), Some(&7));
    assert!(b.take().is_empty());
}
