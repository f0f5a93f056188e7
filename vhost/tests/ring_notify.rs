//! Notifications in both directions: sent when asked for, suppressed otherwise, never missed.
mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ferry_dataplane::port::{Armed, RxQueue, Wake};
use ferry_vhost::memory::MemoryMap;
use ferry_vhost::net_header::feature;
use support::{Buf, Driver, GuestMem, Switch, take_count};

const BASE: u64 = 0x10_0000;
const REGION: u64 = 1 << 20;
const DATA: u64 = BASE + 0x8_0000;

const KINDS: [u64; 4] = [
    feature::VERSION_1,
    feature::VERSION_1 | feature::EVENT_IDX,
    feature::VERSION_1 | feature::RING_PACKED,
    feature::VERSION_1 | feature::RING_PACKED | feature::EVENT_IDX,
];

fn setup(vring: u16, features: u64, size: u16) -> (Switch, Driver, Arc<MemoryMap>) {
    let mem = GuestMem::new(BASE, 1, REGION);
    let driver = Driver::new(&mem, vring, size, features, BASE);
    let map = mem.memory_map();
    let mut switch = Switch::new(1);
    switch.start(usize::from(vring), driver.config(&map, driver.fresh_base(), None));
    (switch, driver, map)
}

fn send_one(driver: &mut Driver) -> bool {
    assert!(driver.add(&[Buf { gpa: DATA, len: 72, writable: false }], false));
    driver.publish()
}

#[test]
fn a_polled_ring_asks_for_no_kicks_and_an_armed_one_for_exactly_one() {
    for features in KINDS {
        let (mut switch, mut tx, _map) = setup(1, features, 16);
        // With event index the first chain ever is announced: avail_event is zero until someone writes it.
        let first = send_one(&mut tx);
        assert_eq!(first, features & (feature::EVENT_IDX | feature::RING_PACKED) == feature::EVENT_IDX);
        for _ in 0..40 {
            assert_eq!(switch.receive().len(), 1);
            switch.release();
            while tx.poll_used().is_some() {}
            assert!(!send_one(&mut tx), "a kick while polled, features {features:#x}");
        }
        // Work is there: do not sleep.
        assert_eq!(switch.rx.arm(&switch.guard), Armed::Ready);
        switch.rx.disarm(&switch.guard);
        assert_eq!(switch.receive().len(), 1);
        switch.release();
        while tx.poll_used().is_some() {}
        for _ in 0..40 {
            let Armed::Fd(fd) = switch.rx.arm(&switch.guard) else {
                panic!("nothing waits, so the kick descriptor is due")
            };
            assert_eq!(fd, tx.kick.as_raw_fd());
            assert!(send_one(&mut tx), "no kick for an armed ring, features {features:#x}");
            support_signal(fd);
            switch.rx.disarm(&switch.guard);
            assert_eq!(take_count(&tx.kick), 0, "disarm takes the kick, or the next sleep ends at once");
            assert!(!send_one(&mut tx), "a kick after disarm, features {features:#x}");
            assert_eq!(switch.receive().len(), 2);
            switch.release();
            while tx.poll_used().is_some() {}
        }
        assert_eq!(switch.queues.counters(1).unwrap().kicks_armed.get(), 41);
    }
}

fn support_signal(fd: i32) {
    // SAFETY: eight bytes from a local.
    #[allow(unsafe_code)]
    unsafe {
        let one = 1u64;
        assert_eq!(libc::write(fd, (&raw const one).cast(), 8), 8);
    }
}

#[test]
fn release_notifies_once_per_burst_and_only_on_request() {
    for features in KINDS {
        let (mut switch, mut tx, _map) = setup(1, features, 16);
        for wanted in [true, false, true, true, false] {
            tx.want_calls(wanted);
            for _ in 0..5 {
                assert!(tx.add(&[Buf { gpa: DATA, len: 72, writable: false }], false));
            }
            tx.publish();
            assert_eq!(switch.receive().len(), 5);
            assert_eq!(take_count(&tx.call), 0, "nothing is returned yet");
            switch.release();
            assert_eq!(take_count(&tx.call), u64::from(wanted), "features {features:#x}");
            switch.release();
            switch.receive();
            switch.release();
            assert_eq!(take_count(&tx.call), 0, "nothing happened");
            while tx.poll_used().is_some() {}
        }
        let counters = switch.queues.counters(1).unwrap();
        assert_eq!((counters.calls_sent.get(), counters.calls_suppressed.get()), (3, 2));
    }
}

#[test]
fn sends_are_notified_by_flush_once_for_several() {
    for features in KINDS {
        let (mut switch, mut rx, _map) = setup(0, features, 16);
        let frame = [5u8; 60];
        for turn in 0..30 {
            let wanted = turn % 3 != 1;
            rx.want_calls(wanted);
            for i in 0..8 {
                rx.add(&[Buf { gpa: DATA + i * 256, len: 256, writable: true }], false);
            }
            rx.publish();
            assert_eq!(switch.send(&[&frame, &frame]), 3);
            assert_eq!(take_count(&rx.call), u64::from(wanted), "features {features:#x}, turn {turn}");
            // With event index only the first chain was asked about; without, every burst is notified.
            assert_eq!(switch.send(&[&frame]), 1);
            assert_eq!(take_count(&rx.call), u64::from(wanted && features & feature::EVENT_IDX == 0));
            let mut n = 0;
            while rx.poll_used().is_some() {
                n += 1;
            }
            assert_eq!(n, 3);
        }
    }
}

/// The driver names a descriptor in the middle of the burst, or behind it.
#[test]
fn event_index_is_honoured_to_the_very_descriptor() {
    for packed in [0, feature::RING_PACKED] {
        let features = feature::VERSION_1 | feature::EVENT_IDX | packed;
        let (mut switch, mut rx, _map) = setup(0, features, 8);
        let frame = [5u8; 60];
        for turn in 0..50u16 {
            for i in 0..8 {
                if !rx.add(&[Buf { gpa: DATA + i * 256, len: 256, writable: true }], false) {
                    break;
                }
            }
            rx.publish();
            // Ask about the chain `ahead` of the next one; three are sent.
            let ahead = turn % 5;
            if packed != 0 {
                let (mut slot, mut wrap) = (rx.next_used + ahead, rx.used_wrap);
                if slot >= rx.size {
                    (slot, wrap) = (slot - rx.size, !wrap);
                }
                let v = 2 << 16 | u32::from(slot) | u32::from(wrap) << 15;
                rx.mem.u32(rx.driver).store(v, Ordering::SeqCst);
            } else {
                rx.mem.u16(rx.driver + 4 + 2 * u64::from(rx.size)).store(rx.next_used + ahead, Ordering::SeqCst);
            }
            assert_eq!(switch.send(&[&frame, &frame, &frame]), 7);
            assert_eq!(take_count(&rx.call), u64::from(ahead < 3), "turn {turn} ahead {ahead} packed {packed:#x}");
            while rx.poll_used().is_some() {}
        }
    }
}

#[test]
fn a_notification_due_when_the_ring_stops_is_sent() {
    use ferry_dataplane::frame::{Body, TxFrame};
    use ferry_dataplane::port::{TxPort, TxReport};
    let (mut switch, mut rx, _map) = setup(0, feature::VERSION_1, 8);
    rx.add(&[Buf { gpa: DATA, len: 256, writable: true }], false);
    rx.publish();
    let frame = TxFrame { head: &[1; 60], body: Body::EMPTY, offload: Default::default(), flow_hash: 0 };
    switch.tx.send(&switch.guard, 0, &[frame], &mut TxReport::default());
    assert_eq!(take_count(&rx.call), 0);
    switch.stop(0);
    assert_eq!(take_count(&rx.call), 1);
}

struct Bell(AtomicUsize);
impl Wake for Bell {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn sleepers_are_woken_when_their_ring_changes() {
    let mem = GuestMem::new(BASE, 1, REGION);
    let driver = Driver::new(&mem, 1, 16, feature::VERSION_1, BASE);
    let map = mem.memory_map();
    let mut switch = Switch::new(1);
    let bell = Arc::new(Bell(AtomicUsize::new(0)));
    switch.rx.set_waker(Arc::clone(&bell) as Arc<dyn Wake>);
    assert_eq!(switch.rx.arm(&switch.guard), Armed::Off);
    switch.start(1, driver.config(&map, 0, None));
    assert_eq!(bell.0.load(Ordering::SeqCst), 1, "started");
    switch.queues.set_enabled(1, false);
    assert_eq!(switch.rx.arm(&switch.guard), Armed::Off);
    switch.queues.set_enabled(1, true);
    assert_eq!(bell.0.load(Ordering::SeqCst), 3, "enabled");
    assert!(matches!(switch.rx.arm(&switch.guard), Armed::Fd(_)));
    let ring = switch.stop(1);
    assert_eq!(bell.0.load(Ordering::SeqCst), 4, "stopped: the kick descriptor is about to close");
    let mut config = ring.into_config();
    config.kick = None;
    switch.start(1, config);
    assert_eq!(switch.rx.arm(&switch.guard), Armed::Poll);
    switch.rx.disarm(&switch.guard);
}

/// Two PMD threads send into one ring at once: every accepted frame arrives, once and whole.
///
/// A lane goes on until so many of its frames were accepted, not offered: while the kernel keeps the driver or the lane that holds the ring
/// off its core, the other one is refused as often as it tries.
#[test]
fn lanes_share_a_ring() {
    use ferry_dataplane::counters::DropReason;
    use ferry_dataplane::frame::{Body, TxFrame};
    use ferry_dataplane::port::{TxPort, TxReport};
    const FRAMES: usize = 10_000;
    for packed in [0, feature::RING_PACKED] {
        let features = feature::VERSION_1 | feature::MRG_RXBUF | packed;
        let (switch, mut rx, _map) = setup(0, features, 256);
        let done = Arc::new(AtomicUsize::new(0));
        let lanes: Vec<_> = (0..2u32)
            .map(|lane| {
                let (tx, domain, done) = (switch.tx.clone(), Arc::clone(&switch.domain), Arc::clone(&done));
                std::thread::spawn(move || {
                    let mut guard = domain.register().unwrap();
                    let mut report = TxReport::default();
                    let mut next = 0u32;
                    let mut accepted = Vec::new();
                    while accepted.len() < FRAMES {
                        let heads: Vec<[u8; 40]> = (next..next + 16)
                            .map(|n| {
                                let mut h = [lane as u8; 40];
                                h[..4].copy_from_slice(&n.to_le_bytes());
                                h
                            })
                            .collect();
                        let frames: Vec<TxFrame<'_>> = heads
                            .iter()
                            .map(|h| TxFrame { head: h, body: Body::EMPTY, offload: Default::default(), flow_hash: 0 })
                            .collect();
                        report.reset(DropReason::TxNotReady);
                        tx.send(&guard, lane as usize, &frames, &mut report);
                        tx.flush(&guard, lane as usize);
                        for i in 0..16 {
                            if report.accepted >> i & 1 != 0 {
                                accepted.push(next + i);
                            } else {
                                assert!(matches!(
                                    report.reason[i as usize],
                                    DropReason::TxQueueFull | DropReason::TxBusy
                                ));
                            }
                        }
                        if report.accepted == 0 {
                            std::thread::yield_now();
                        }
                        next += 16;
                        guard.quiescent();
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                    accepted
                })
            })
            .collect();
        let mut got: [Vec<u32>; 2] = Default::default();
        let mut slot = 0u64;
        loop {
            let finished = done.load(Ordering::SeqCst) == 2;
            while rx.add(&[Buf { gpa: DATA + (slot % 512) * 128, len: 128, writable: true }], false) {
                slot += 1;
            }
            rx.publish();
            let mut any = false;
            while let Some((bufs, len)) = rx.poll_used() {
                any = true;
                assert_eq!(len, 52);
                let bytes = rx.mem.read(bufs[0].gpa + 12, 40);
                let lane = bytes[4];
                assert!(bytes[4..].iter().all(|&b| b == lane), "torn frame");
                got[usize::from(lane)].push(u32::from_le_bytes(bytes[..4].try_into().unwrap()));
            }
            if finished && !any {
                break;
            }
            if !any {
                std::thread::yield_now();
            }
        }
        for (lane, thread) in lanes.into_iter().enumerate() {
            let accepted = thread.join().unwrap();
            assert!(accepted == got[lane], "lane {lane}: accepted and arrived differ");
        }
    }
}
