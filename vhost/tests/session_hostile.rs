//! The vhost-user session against frontends that break the rules. In every case the session thread goes on (or ends that
//! session with a clear text) and no descriptor leaks.
mod session_support;

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ferry_vhost::signals::PortEvent;
use session_support::*;

/// Every case leaves the port able to serve the next frontend.
fn still_serves(f: &Fixture) {
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    f.wait_running(2);
    offer_frame(&memory, 1, 0);
    eventually("a frame", || used_index(&memory, 1) == 1);
}

#[test]
fn unknown_codes_are_answered_where_asked_and_otherwise_ignored() {
    let f = Fixture::new();
    let mut p = f.peer();
    p.greet();
    assert_eq!(p.ack(99, b"what?"), 1);
    p.send(u32::MAX, &[]);
    p.send(0, &[1, 2, 3]);
    assert_eq!(p.ack(33, &[]), 1, "GPU_SET_SOCKET");
    assert_eq!(p.ack(25, &[0; 12]), 1, "SET_CONFIG");
    // The only message with a negative answer of its own: no payload.
    assert_eq!(p.ask(GET_CONFIG, &[0; 12]).payload.len(), 0);
    p.sync();
    let s = f.status();
    assert_eq!(s.relay.unknown_codes, 6);
    assert_eq!(s.relay.messages["UNKNOWN"], 3);
    assert!(s.last_error.unwrap().contains("SET_CONFIG refused"));
    // Whoever waits for a payload that cannot be given must not wait for ever.
    p.send(GET_INFLIGHT_FD, &[0; 24]);
    assert!(p.is_closed());
    eventually("the text", || f.status().last_error.is_some_and(|e| e.contains("GET_INFLIGHT_FD: not offered")));
    still_serves(&f);
}

#[test]
fn features_that_were_not_offered_are_refused_or_end_the_session() {
    let f = Fixture::with(|c| c.features.packed = false);
    let mut p = f.peer();
    p.greet();
    assert_eq!(p.ack(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL | PACKED])), 1);
    assert_eq!(p.ack(SET_PROTOCOL_FEATURES, &words(&[u64::MAX])), 1);
    assert_eq!(p.ack(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL])), 0);
    p.send(SET_FEATURES, &words(&[1 << 63]));
    assert!(p.is_closed());
    eventually("the text", || f.status().last_error.is_some_and(|e| e.contains("were not offered")));
    still_serves(&f);
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let f = Fixture::new();
    let mut p = f.peer();
    p.greet();
    p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL]));
    let (short, good, event) = (memfd(MEMORY_BYTES - 1), memfd(MEMORY_BYTES), eventfd());
    assert_eq!(p.set_memory(&short), 1);
    assert!(f.status().last_error.unwrap().contains("memory file has"));
    let fd = good.as_raw_fd();
    let mut refuse =
        |table: &[[u64; 4]], fds: &[RawFd]| assert_eq!(p.ack_fds(SET_MEM_TABLE, &memory_table(table), fds), 1);
    refuse(&[region(0, MEMORY_BYTES, 0)], &[event.as_raw_fd()]);
    refuse(&[region(0, MEMORY_BYTES, 1)], &[fd]);
    refuse(&[region(0, MEMORY_BYTES, u64::MAX - 4096)], &[fd]);
    refuse(&[[u64::MAX - 4096, MEMORY_BYTES, USER_BASE, 0]], &[fd]);
    refuse(&[[GUEST_BASE, MEMORY_BYTES, u64::MAX - 4096, 0]], &[fd]);
    refuse(&[[GUEST_BASE, 0, USER_BASE, 0]], &[fd]);
    refuse(&[[GUEST_BASE, u64::MAX, USER_BASE, 0]], &[fd]);
    refuse(&[region(0, 8192, 0), region(4096, 8192, 0)], &[fd, fd]);
    refuse(&[region(0, 4096, 0), region(4096, 4096, 0)], &[fd]);
    refuse(&[region(0, 4096, 0)], &[fd, fd]);
    refuse(&[], &[]);
    assert_eq!(f.status().memory.regions, 0);
    assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(region(0, MEMORY_BYTES, 0)), &[short.as_raw_fd()]), 1);
    assert_eq!(p.ack(REM_MEM_REG, &single_region(region(0, MEMORY_BYTES, 0))), 1);
    assert_eq!(p.set_memory(&good), 0, "the session is fine after all that");
    assert_eq!(f.status().memory.bytes, MEMORY_BYTES);
}

#[test]
fn logs_that_do_not_hold_up_end_the_session() {
    let memory = memfd(MEMORY_BYTES);
    // GUEST_BASE + 2 MiB need 96 bytes of log.
    for (size, offset, file_len) in
        [(64, 0, 4096), (0, 0, 4096), (4097, 0, 4096), (96, u64::MAX - 50, 4096), (96, 4096, 4096), (u64::MAX, 2, 4096)]
    {
        let f = Fixture::new();
        let mut p = f.peer();
        p.greet();
        p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL | LOG_ALL]));
        assert_eq!(p.set_memory(&memory), 0);
        let log = memfd(file_len);
        p.send_fds(SET_LOG_BASE, 0, &words(&[size, offset]), &[log.as_raw_fd()]);
        assert!(p.is_closed(), "{size} at {offset}");
        eventually("the text", || f.status().last_error.is_some_and(|e| e.starts_with("SET_LOG_BASE")));
        still_serves(&f);
    }
}

#[test]
fn vring_settings_are_bounded() {
    let f = Fixture::with(|c| c.queue_pairs = 2);
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    f.wait_running(2);
    for num in [0, 3, 255, 32769, 65536, u32::MAX] {
        assert_eq!(p.ack(SET_VRING_NUM, &state(2, num)), 1, "{num}");
    }
    for _ in 0..100 {
        assert_eq!(p.ack(SET_VRING_NUM, &state(2, 1024)), 0);
    }
    assert_eq!(p.ack(SET_VRING_NUM, &state(0, 256)), 1, "the ring runs");
    assert_eq!(p.ack(SET_VRING_BASE, &state(0, 1)), 1, "the ring runs");
    assert_eq!(p.ack(SET_VRING_BASE, &state(2, 0x1_0000)), 1, "a split ring's base has 16 bits");
    let event = eventfd();
    for index in [4, 255, 256, u32::MAX] {
        assert_eq!(p.ack(SET_VRING_NUM, &state(index, 256)), 1);
        assert_eq!(p.ack(SET_VRING_BASE, &state(index, 0)), 1);
        assert_eq!(p.ack(SET_VRING_ENABLE, &state(index, 1)), 1);
        assert_eq!(p.ack(SET_VRING_ADDR, &ring_address(index, None)), 1);
        let fd_index = u64::from(index & 0xff).max(4);
        for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            assert_eq!(p.ack_fds(code, &words(&[fd_index]), &[event.as_raw_fd()]), 1);
        }
    }
    // Addresses that are unaligned, unmapped or wrap: the ring does not run with them.
    for bad in [USER_BASE + 1, 16, u64::MAX - 15, USER_BASE + MEMORY_BYTES - 16] {
        let address = [state(1, 0), words(&[bad, USER_BASE + 0x8000, USER_BASE + 0x4000, 0])].concat();
        assert_eq!(p.ack(SET_VRING_ADDR, &address), 1, "{bad:#x}");
    }
    // An unaligned address never reaches the ring; the others stopped it.
    assert_eq!(f.running(), 1);
    assert!(f.status().state.starts_with("stopped: vring 1"), "{}", f.status().state);
    assert_eq!(p.ack(SET_VRING_ADDR, &ring_address(1, None)), 0);
    assert_eq!(f.running(), 2);
    // Descriptors that are no eventfds could block a PMD thread.
    let pipe = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(p.ack_fds(SET_VRING_CALL, &words(&[0]), &[pipe.0.as_raw_fd()]), 1);
    assert_eq!(p.ack_fds(SET_VRING_CALL, &words(&[0x100]), &[event.as_raw_fd()]), 1, "says none, has one");
    assert_eq!(p.ack_fds(SET_VRING_CALL, &words(&[0]), &[]), 1, "says one, has none");
    assert_eq!(f.running(), 2);
}

#[test]
fn a_message_in_single_bytes_is_a_message() {
    let f = Fixture::new();
    let mut p = f.peer();
    p.greet();
    for byte in encode(SET_FEATURES, VERSION | NEED_REPLY, &words(&[VERSION_1])) {
        p.stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(p.receive().unwrap().u64(), 0);
    // Many in one write.
    let three = encode(GET_FEATURES, VERSION, &[]).repeat(3);
    p.stream.write_all(&three).unwrap();
    for _ in 0..3 {
        assert_eq!(p.receive().unwrap().code, GET_FEATURES);
    }
}

#[test]
fn half_a_message_blocks_nobody_and_the_port_stops_at_once() {
    let mut f = Fixture::new();
    let mut p = f.peer();
    p.greet();
    p.stream.write_all(&encode(SET_FEATURES, VERSION, &[0; 8])[..13]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let t = Instant::now();
    f.port.shutdown();
    assert!(t.elapsed() < Duration::from_millis(500));
    assert!(p.is_closed());
}

#[test]
fn broken_headers_end_the_session_with_a_text() {
    let f = Fixture::new();
    for (bytes, text) in [
        (encode(1, 3, &[]), "protocol version 3"),
        ([1u32, 1, 5000].map(u32::to_ne_bytes).concat(), "more than 4096"),
        (vec![0xff; 64], "protocol version 3"),
    ] {
        let mut p = f.peer();
        p.stream.write_all(&bytes).unwrap();
        assert!(p.is_closed());
        eventually(text, || f.status().last_error.is_some_and(|e| e.contains(text)));
    }
    still_serves(&f);
}

#[test]
fn a_frontend_that_never_reads_is_given_up() {
    let f = Fixture::new();
    let mut p = f.peer();
    p.stream.set_nonblocking(true).unwrap();
    let ask = encode(GET_FEATURES, VERSION, &[]).repeat(64);
    let end = Instant::now() + Duration::from_secs(25);
    // The pace limit (1000 a second) stretches it until the reply buffer is full; then the send time-out runs.
    let mut sent = 0;
    while f.status().connected || f.status().connections == 0 {
        sent += p.stream.write(&ask).unwrap_or_default();
        assert!(Instant::now() < end, "after {sent} bytes: {:?}", f.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(f.status().last_error.unwrap().contains("does not read its replies"));
    drop(p);
    std::thread::sleep(Duration::from_millis(100));
    still_serves(&f);
}

#[test]
fn a_flood_of_messages_is_slowed_down() {
    let f = Fixture::new();
    let mut p = f.peer();
    let t = Instant::now();
    let batch = encode(SET_OWNER, VERSION, &[]).repeat(100);
    for _ in 0..30 {
        p.stream.write_all(&batch).unwrap();
    }
    p.sync();
    let took = t.elapsed();
    assert!(took > Duration::from_millis(800) && took < Duration::from_secs(4), "{took:?}");
    assert_eq!(f.status().relay.messages["SET_OWNER"], 3000);
}

#[test]
fn a_truncated_memory_file_stops_its_port_and_no_other() {
    let (bad, good) = (Fixture::new(), Fixture::new());
    let (bad_memory, good_memory) = (memfd(MEMORY_BYTES), memfd(MEMORY_BYTES));
    let (mut bad_peer, mut good_peer) = (bad.peer(), good.peer());
    bad_peer.start(VERSION_1 | PROTOCOL, &bad_memory, 1);
    good_peer.start(VERSION_1 | PROTOCOL, &good_memory, 1);
    bad.wait_running(2);
    good.wait_running(2);
    offer_frame(&bad_memory, 1, 0);
    eventually("a frame", || used_index(&bad_memory, 1) == 1);
    // The PMD thread reads the rings all the time.
    bad_memory.set_len(0).unwrap();
    eventually("the port stopped", || bad.status().state == "stopped: guest memory file was truncated");
    let s = bad.status();
    assert!(s.connected && !s.link_up && s.rings.iter().all(|r| !r.running));
    assert_eq!(s.memory.regions, 0, "the memory is let go");
    assert!(bad.events.any(|e| matches!(e, PortEvent::Fault { text } if text.contains("truncated"))));
    assert_eq!(bad_peer.ask(GET_VRING_BASE, &state(0, 0)).state().0, 0, "the session still answers");
    for n in 0..50 {
        offer_frame(&good_memory, 1, n);
    }
    eventually("the other port's frames", || good.pmd.frames.load(Ordering::Relaxed) == 50);
    assert_eq!(good.status().state, "running");
    // With memory that is whole again, the port works.
    bad_memory.set_len(MEMORY_BYTES).unwrap();
    assert_eq!(bad_peer.set_memory(&bad_memory), 0);
    for index in 0..2 {
        bad_peer.set_up_ring(index, 0);
    }
    bad.wait_running(2);
    assert_eq!(bad.status().state, "running");
}

#[test]
fn a_truncated_log_stops_its_port() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    let log = memfd(4096);
    p.send_fds(SET_LOG_BASE, 0, &words(&[4096, 0]), &[log.as_raw_fd()]);
    assert_eq!(p.receive().unwrap().code, SET_LOG_BASE);
    p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL | LOG_ALL]));
    p.sync();
    f.wait_running(2);
    log.set_len(0).unwrap();
    for n in 0..10 {
        offer_frame(&memory, 1, n);
    }
    eventually("the port stopped", || f.status().state == "stopped: dirty log file was truncated");
    assert_eq!(f.running(), 0);
}

#[test]
fn a_ring_that_cannot_be_believed_is_stopped_and_comes_back_with_a_new_kick() {
    use std::os::unix::fs::FileExt;
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    f.wait_running(2);
    let err = eventfd();
    assert_eq!(p.ack_fds(SET_VRING_ERR, &words(&[1]), &[err.as_raw_fd()]), 0);
    // The available index jumps by more than the ring holds.
    memory.write_all_at(&300u16.to_le_bytes(), RING_STRIDE + 0x4000 + 2).unwrap();
    eventually("the ring stopped", || f.status().state.starts_with("stopped: vring 1"));
    assert_eq!(f.running(), 1, "only that ring");
    let mut count = [0u8; 8];
    std::io::Read::read_exact(&mut std::fs::File::from(err), &mut count).unwrap();
    assert!(u64::from_ne_bytes(count) >= 1, "SET_VRING_ERR's descriptor was signalled");
    assert_eq!(p.ask(GET_VRING_BASE, &state(1, 0)).state(), (1, 0));
    memory.write_all_at(&[0; 2], RING_STRIDE + 0x4000 + 2).unwrap();
    p.set_up_ring(1, 0);
    f.wait_running(2);
    assert_eq!(f.status().state, "running");
}

#[test]
fn an_observer_that_panics_costs_one_connection() {
    use ferry_dataplane::qsbr::Domain;
    use ferry_vhost::port::{VhostPort, VhostPortConfig};
    use ferry_vhost::signals::PortObserver;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    struct Once(AtomicBool);
    impl PortObserver for Once {
        fn event(&self, event: &PortEvent) {
            if matches!(event, PortEvent::Kicked { .. }) && !self.0.swap(true, Ordering::Relaxed) {
                panic!("a bug (expected by this test)");
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let domain = Domain::new();
    let config = VhostPortConfig::new("o", &path, ferry_vhost::socket::Role::Server);
    let mut port = VhostPort::start(config, Arc::clone(&domain), Arc::new(Once(AtomicBool::new(false)))).unwrap();
    let _pmd = Pmd::start(&domain, &mut port);
    let memory = memfd(MEMORY_BYTES);
    let mut p = Peer::connect(&path);
    p.greet();
    p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL]));
    p.set_memory(&memory);
    p.send_fds(SET_VRING_KICK, 0, &words(&[0]), &[eventfd().as_raw_fd()]);
    assert!(p.is_closed());
    eventually("the text", || port.status().last_error.is_some_and(|e| e == "internal error"));
    let mut p = Peer::connect(&path);
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    assert_eq!(port.status().state, "running");
}
