//! The generator against a switch that forwards, loses, duplicates, reorders and corrupts: whatever a switch does to frames
//! must be found. Needs no peers, no huge pages and no root.
mod fake_switch;

use fake_switch::{FakeSwitch, Fault};
use ferry_perf::check::Findings;
use ferry_perf::exchange::Pair;
use ferry_perf::frame::{FrameKind, Shape, Station, Transport};
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
    for (first, close) in [(0, false), (30_000, true)] {
        let done = p.handshakes(first, 5000, close).expect("handshakes");
        assert!(done.setup_ns.count() + done.failed >= 5000 && done.per_second > 0.0, "{done:?}");
        // A loaded machine may keep the switch from answering in time; most connections are completed all the same.
        assert!(done.failed < 2500, "{done:?}");
    }
}

#[test]
fn handshakes_that_lose_a_frame_are_counted_as_failed() {
    let switch = FakeSwitch::start(Fault::Drop(500));
    let done = pair(&switch, Transport::Tcp).handshakes(0, 2000, false).expect("handshakes");
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
