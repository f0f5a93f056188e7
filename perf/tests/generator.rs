//! The generator against a switch that forwards, loses, duplicates, reorders and corrupts: whatever a switch does to frames
//! must be found. Needs no peers, no huge pages and no root.
mod fake_switch;

use fake_switch::{FakeSwitch, Fault};
use ferry_perf::check::Findings;
use ferry_perf::exchange::Pair;
use ferry_perf::frame::{FrameKind, IMIX, Shape, Station, Transport};
use ferry_perf::generator::Generator;
use ferry_perf::guest::GuestSpec;
use ferry_perf::guest::packed::PackedRing;
use ferry_perf::guest::ring::{DriverRing, RingFormat};
use ferry_perf::guest::split::SplitRing;
use ferry_perf::run;
use ferry_perf::stream::{Spread, Step, StreamSpec};
use ferry_perf::workload::Workload;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_millis(300);
const COUNT: u64 = 1000;

fn streams(kind: FrameKind, connections: u32) -> Vec<(usize, usize, StreamSpec)> {
    let (a, b) = (Station::new(1), Station::new(2));
    let forth =
        StreamSpec { kind, from: a, to: b, opener: true, connections, spread: Spread::Uniform, shape: Shape::Plain };
    let back = StreamSpec { from: b, to: a, opener: false, ..forth.clone() };
    vec![(0, 1, forth), (1, 0, back)]
}

fn udp(bytes: usize) -> FrameKind {
    FrameKind { bytes, transport: Transport::Udp, ipv6: false }
}

/// Sends `COUNT` frames through a switch with this fault and tells what was found.
fn findings<R: DriverRing>(format: RingFormat, fault: Fault, bytes: usize, sample: u32) -> Findings {
    let switch = FakeSwitch::start(fault);
    let spec = GuestSpec::new(bytes).format(format);
    let mut g = Generator::<R>::attach(&switch.sockets(), &spec).expect("attach").sample(sample);
    g.streams(streams(udp(bytes), 7));
    let complete = g.phase(0, Step::Data, COUNT, PATIENCE);
    let f = g.findings();
    assert_eq!(complete.is_ok(), f.frames >= COUNT, "{complete:?}, {f:?}");
    f
}

fn both(fault: Fault, bytes: usize, check: impl Fn(Findings)) {
    check(findings::<SplitRing>(RingFormat::Split, fault, bytes, 1));
    check(findings::<PackedRing>(RingFormat::Packed, fault, bytes, 1));
}

#[test]
fn a_switch_that_forwards_is_found_sound() {
    for bytes in [64, 1518, 9000, 20_000] {
        both(Fault::None, bytes, |f| {
            let expected =
                Findings { frames: COUNT, bytes: COUNT * bytes as u64, sampled: COUNT, ..Findings::default() };
            assert_eq!(f, expected);
        });
    }
}

#[test]
fn losses_are_counted_one_by_one() {
    both(Fault::Drop(7), 64, |f| {
        assert_eq!((f.lost, f.frames), (COUNT / 7, COUNT - COUNT / 7));
        assert!(f.sound(), "{f:?}");
    });
}

#[test]
fn losses_are_counted_from_samples_too() {
    let f = findings::<SplitRing>(RingFormat::Split, Fault::Drop(7), 64, 4);
    assert!(f.sampled < f.frames, "{f:?}: everything was looked into");
    assert!(f.lost > 0 && f.lost <= COUNT / 7 && f.sound(), "{f:?}");
}

#[test]
fn duplicates_are_found() {
    both(Fault::Duplicate(10), 64, |f| {
        assert_eq!(f.duplicated, f.frames / 11, "{f:?}");
        assert_eq!((f.lost, f.reordered, f.corrupted), (0, 0, 0));
    });
}

#[test]
fn corruption_is_found() {
    for bytes in [64, 9000] {
        both(Fault::Corrupt(9), bytes, |f| {
            // Of longer frames only the first of each burst is read to its end, unless they are scattered.
            assert_eq!(f.corrupted, COUNT / 9, "{f:?}");
            assert_eq!((f.lost, f.duplicated, f.reordered), (0, 0, 0));
        });
    }
}

#[test]
fn wrong_lengths_are_found() {
    both(Fault::Truncate(9), 1518, |f| {
        assert_eq!((f.corrupted, f.lost), (COUNT / 9, 0), "{f:?}");
    });
}

#[test]
fn reordering_is_found() {
    both(Fault::Swap(10), 64, |f| {
        // The last one is still held back.
        assert_eq!(f.reordered, COUNT / 10 - 1, "{f:?}");
        assert_eq!((f.lost, f.duplicated, f.corrupted), (0, 0, 0));
    });
}

/// Frames of a workload's own shape through a switch with this fault, all looked into.
fn shaped<R: DriverRing>(workload: &Workload, format: RingFormat, fault: Fault, count: u64) -> Findings {
    let switch = FakeSwitch::start(fault);
    let spec = workload.guests().format(format);
    let mut g = Generator::<R>::attach(&switch.sockets(), &spec).expect("attach").sample(1);
    g.streams(workload.streams());
    let complete = g.phase(0, Step::Data, count, PATIENCE);
    let f = g.findings();
    assert_eq!(complete.is_ok(), f.frames >= count, "{complete:?}, {f:?}");
    f
}

fn both_shaped(workload: &Workload, fault: Fault, count: u64, check: impl Fn(Findings)) {
    check(shaped::<SplitRing>(workload, RingFormat::Split, fault, count));
    check(shaped::<PackedRing>(workload, RingFormat::Packed, fault, count));
}

#[test]
fn a_mix_of_lengths_is_followed_frame_by_frame() {
    let imix = Workload::stateful(Transport::Udp, 1518, 7).imix();
    let sum = |count: u64| (0..count as usize).map(|i| IMIX[i % IMIX.len()] as u64).sum::<u64>();
    both_shaped(&imix, Fault::None, COUNT, |f| {
        let expected = Findings { frames: COUNT, bytes: sum(COUNT), sampled: COUNT, ..Findings::default() };
        assert_eq!(f, expected);
    });
    both_shaped(&imix, Fault::Drop(7), COUNT, |f| {
        assert_eq!((f.lost, f.frames), (COUNT / 7, COUNT - COUNT / 7));
        assert!(f.sound(), "{f:?}");
    });
    both_shaped(&imix, Fault::Duplicate(10), COUNT, |f| {
        assert_eq!((f.duplicated, f.lost, f.reordered, f.corrupted), (f.frames / 11, 0, 0, 0));
    });
    both_shaped(&imix, Fault::Truncate(9), COUNT, |f| assert_eq!((f.corrupted, f.lost), (COUNT / 9, 0), "{f:?}"));
    both_shaped(&imix, Fault::Swap(10), COUNT, |f| {
        assert_eq!((f.reordered, f.duplicated, f.corrupted), (COUNT / 10 - 1, 0, 0), "{f:?}");
    });
    both_shaped(&imix, Fault::Corrupt(9), COUNT, |f| {
        // Three of four that are hit have 64 bytes; of longer ones only the first of each burst is read to its end.
        assert!((COUNT / 9 * 3 / 4..=COUNT / 9).contains(&f.corrupted), "{f:?}");
        assert_eq!((f.lost, f.duplicated, f.reordered), (0, 0, 0));
    });
}

#[test]
fn losses_in_a_mix_are_counted_from_samples_too() {
    let switch = FakeSwitch::start(Fault::Drop(5));
    let imix = Workload::l2(1518).imix();
    let mut g = Generator::<SplitRing>::attach(&switch.sockets(), &imix.guests()).expect("attach").sample(4);
    g.streams(imix.streams());
    assert!(g.phase(0, Step::Data, COUNT, PATIENCE).is_err());
    let f = g.findings();
    assert!(f.sampled < f.frames && f.lost > 0 && f.lost <= COUNT / 5 && f.sound(), "{f:?}");
}

/// Frames of 64 KB.
const LARGE: u64 = 120;

#[test]
fn large_frames_are_known_whole_and_in_segments() {
    let tso = Workload::tso(false);
    for (fault, segments) in [(Fault::None, 1), (Fault::Segment, 45)] {
        both_shaped(&tso, fault, LARGE, |f| {
            let bytes = LARGE * (tso.average_bytes() as u64 + 54 * segments);
            let expected = Findings { frames: LARGE, bytes, sampled: LARGE * segments, ..Findings::default() };
            assert_eq!(f, expected);
        });
    }
}

#[test]
fn whatever_is_done_to_large_frames_is_found() {
    let tso = Workload::tso(false);
    both_shaped(&tso, Fault::Drop(7), LARGE, |f| {
        assert_eq!((f.lost, f.frames), (LARGE / 7, LARGE - LARGE / 7));
        assert!(f.sound(), "{f:?}");
    });
    both_shaped(&tso, Fault::Duplicate(10), LARGE, |f| {
        assert_eq!((f.duplicated, f.lost, f.reordered, f.corrupted), (f.frames / 11, 0, 0, 0), "{f:?}");
    });
    both_shaped(&tso, Fault::Corrupt(9), LARGE, |f| {
        assert_eq!((f.corrupted, f.lost, f.duplicated, f.reordered), (LARGE / 9, 0, 0, 0), "{f:?}");
    });
    both_shaped(&tso, Fault::Swap(10), LARGE, |f| {
        assert_eq!((f.reordered, f.duplicated, f.corrupted), (LARGE / 10 - 1, 0, 0), "{f:?}");
    });
    // Its receiver would take it for a frame of 64 KB on the wire, with a wrong checksum.
    both_shaped(&tso, Fault::Forget(9), LARGE, |f| assert_eq!((f.corrupted, f.lost), (LARGE / 9, 0), "{f:?}"));
    both_shaped(&tso, Fault::Truncate(9), LARGE, |f| assert_eq!(f.corrupted, LARGE / 9, "{f:?}"));
    both_shaped(&tso, Fault::SegmentAndDrop(1000), LARGE, |f| {
        assert_eq!((f.lost, f.corrupted), (LARGE * 45 / 1000, 0), "{f:?}");
    });
}

#[test]
fn large_frames_flow_both_ways_over_a_connection() {
    let switch = FakeSwitch::start(Fault::None);
    let tso = Workload::tso(true);
    let mut g = Generator::<SplitRing>::attach(&switch.sockets(), &tso.guests()).expect("attach").sample(1);
    g.streams(tso.streams());
    run::open(&mut g, &tso).expect("opens");
    for _ in 0..2 {
        g.start(true).expect("start");
        let tally = g.run(Duration::from_millis(20)).expect("run");
        g.stop().expect("stop");
        let f = g.findings();
        assert!(tally.findings.frames + f.frames > 0 && f.sound() && f.lost == 0, "{tally:?} {f:?}");
        assert!(tally.findings.sound() && tally.findings.lost == 0, "{tally:?}");
    }
}

#[test]
fn guests_listen_for_a_switch_that_dials() {
    let switch = FakeSwitch::dialing(Fault::None);
    let spec = GuestSpec { listens: true, ..GuestSpec::new(64) };
    // The second time the sockets are there already.
    for _ in 0..2 {
        let mut g = Generator::<SplitRing>::attach(&switch.sockets(), &spec).expect("attach").sample(1);
        g.streams(streams(udp(64), 1));
        g.phase(0, Step::Data, 100, PATIENCE).expect("forwards");
        assert!(g.findings().sound() && g.findings().frames == 100, "{:?}", g.findings());
    }
}

#[test]
fn a_ring_that_makes_no_sense_is_an_error() {
    let switch = FakeSwitch::start(Fault::WrongId(20));
    let mut g = Generator::<SplitRing>::attach(&switch.sockets(), &GuestSpec::new(64)).expect("attach");
    g.streams(streams(udp(64), 1));
    let error = g.phase(0, Step::Data, COUNT, PATIENCE).expect_err("id 5000 in a ring of 256");
    assert!(error.to_string().contains("nonsense"), "{error:#}");
}

#[test]
fn connections_are_opened_and_data_flows_both_ways() {
    for transport in [Transport::Udp, Transport::Tcp] {
        let switch = FakeSwitch::start(Fault::None);
        let workload = Workload::stateful(transport, 64, 500);
        let mut g = Generator::<SplitRing>::attach(&switch.sockets(), &GuestSpec::new(64)).expect("attach").sample(1);
        g.streams(workload.streams());
        run::open(&mut g, &workload).expect("opens");
        for _ in 0..2 {
            g.start(true).expect("start");
            let tally = g.run(Duration::from_millis(20)).expect("run");
            g.stop().expect("stop");
            let f = g.findings();
            assert!(tally.findings.frames + f.frames > 0 && f.sound() && f.lost == 0, "{tally:?} {f:?}");
            assert!(tally.findings.sound() && tally.findings.lost == 0, "{tally:?}");
        }
        assert!(g.alive());
        drop(g);
    }
}

#[test]
fn nobody_listening_is_told() {
    let folder = tempfile::tempdir().expect("folder");
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("p0.sock")).expect("bind");
    // Someone who accepts and hangs up at once.
    let server = std::thread::spawn(move || drop(listener.accept()));
    let sockets = [folder.path().join("p0.sock")];
    let error = Generator::<SplitRing>::attach(&sockets, &GuestSpec::new(64)).err().expect("no switch");
    assert!(format!("{error:#}").contains("GET_FEATURES"), "{error:#}");
    server.join().expect("server");
}

fn pair(switch: &FakeSwitch, transport: Transport) -> Pair<SplitRing> {
    let streams = Workload::stateful(transport, 64, 1).streams();
    let streams = [streams[0].2.clone(), streams[1].2.clone()];
    let [a, b] = <[_; 2]>::try_from(switch.sockets()).expect("two");
    Pair::attach([&a, &b], &GuestSpec::new(64), streams).expect("attach")
}

#[test]
fn handshakes_are_completed_with_and_without_close() {
    let switch = FakeSwitch::start(Fault::None);
    let mut p = pair(&switch, Transport::Tcp);
    for (first, count, under_way, close) in [(0, 5000, 96, false), (10_000, 500, 1, false), (30_000, 5000, 96, true)] {
        let done = p.handshakes(first, count, under_way, close).expect("handshakes");
        let all = u64::from(count);
        assert!(done.setup_ns.count() + done.failed >= all && done.per_second > 0.0, "{done:?}");
        // A loaded machine may keep the switch from answering in time; most connections are completed all the same.
        assert!(done.failed < all / 2, "{done:?}");
    }
}

#[test]
fn handshakes_that_lose_a_frame_are_counted_as_failed() {
    let switch = FakeSwitch::start(Fault::Drop(500));
    let done = pair(&switch, Transport::Tcp).handshakes(0, 2000, 96, false).expect("handshakes");
    assert!(done.failed > 0 && done.setup_ns.count() < 2000, "{done:?}");
}

#[test]
fn latency_is_measured_frame_by_frame() {
    let switch = FakeSwitch::start(Fault::None);
    let mut p = pair(&switch, Transport::Udp);
    let times = p.ping_pong(Duration::from_millis(50)).expect("ping-pong");
    assert!(times.count() > 0 && times.quantile(0.5) > 0);
    let (times, lost) = p.steady(20_000.0, Duration::from_millis(50)).expect("steady");
    // How many are sent depends on how often this thread gets to run; all of them must arrive.
    assert!(times.count() > 0 && times.count() <= 1000 && lost == 0, "{} arrived, {lost} lost", times.count());
    drop(p);
}
