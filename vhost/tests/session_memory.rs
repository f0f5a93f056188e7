//! Changes of memory, log and features under running rings.
mod session_support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ferry_vhost::signals::PortEvent;
use session_support::*;

const BASIC: u64 = VERSION_1 | PROTOCOL;

fn bit(log: &std::fs::File, gpa: u64) -> bool {
    let page = gpa / 4096;
    let mut byte = [0u8];
    log.read_exact_at(&mut byte, page / 8).unwrap();
    byte[0] & (1 << (page % 8)) != 0
}

#[test]
fn a_new_memory_table_takes_the_rings_and_the_log_along() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let log = memfd(4096);
    let mut p = f.peer();
    p.start(BASIC, &memory, 1);
    p.send_fds(SET_LOG_BASE, 0, &words(&[4096, 0]), &[log.as_raw_fd()]);
    assert_eq!(p.receive().unwrap().code, SET_LOG_BASE);
    p.send(SET_FEATURES, &words(&[BASIC | LOG_ALL]));
    let used = GUEST_BASE + RING_STRIDE + 0x8000;
    assert_eq!(p.ack(SET_VRING_ADDR, &ring_address(1, Some(used))), 0);
    assert_eq!(f.running(), 2);
    offer_frame(&memory, 1, 0);
    eventually("the used ring marked", || bit(&log, used));
    log.write_all_at(&[0; 4096], 0).unwrap();
    assert_eq!(p.set_memory(&memory), 0);
    assert_eq!(f.running(), 2);
    offer_frame(&memory, 1, 1);
    eventually("marked after SET_MEM_TABLE", || bit(&log, used));
    assert_eq!(used_index(&memory, 1), 2);
    assert!(f.status().logging && f.status().log_bytes == 4096);
    // Cancelled: logging ends on running rings.
    p.send(SET_FEATURES, &words(&[BASIC]));
    p.sync();
    log.write_all_at(&[0; 4096], 0).unwrap();
    offer_frame(&memory, 1, 2);
    eventually("3 used", || used_index(&memory, 1) == 3);
    assert!(!bit(&log, used));
    assert_eq!((f.status().logging, f.status().log_bytes), (false, 0));
    let names = f.events.names();
    let order: Vec<_> = names.iter().filter(|n| n.starts_with("Log") || *n == "VringLogAddress").collect();
    assert_eq!(order, ["LogBase", "LogStarted", "VringLogAddress", "LogStopped"]);
}

#[test]
fn stop_and_cont_during_a_migration_wait_for_the_new_log() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let (old, new) = (memfd(4096), memfd(4096));
    let used = GUEST_BASE + RING_STRIDE + 0x8000;
    let mut p = f.peer();
    p.start(BASIC, &memory, 1);
    let set_log = |p: &mut Peer, log: &std::fs::File| {
        p.send_fds(SET_LOG_BASE, 0, &words(&[4096, 0]), &[log.as_raw_fd()]);
        assert_eq!(p.receive().unwrap().code, SET_LOG_BASE);
    };
    set_log(&mut p, &old);
    p.send(SET_FEATURES, &words(&[BASIC | LOG_ALL]));
    p.sync();
    assert_eq!(f.running(), 2);
    for index in 0..2 {
        p.ask(GET_VRING_BASE, &state(index, 0));
    }
    assert!(f.events.any(|e| matches!(e, PortEvent::VringStopped { index: 1, logging: true, last: true, .. })));
    // `cont`: rings first, the new log last. A write in between must not get lost in the old log.
    offer_frame(&memory, 1, 0);
    for index in 0..2 {
        p.set_up_ring(index, 0);
    }
    p.sync();
    assert_eq!(f.running(), 0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(used_index(&memory, 1), 0);
    set_log(&mut p, &new);
    assert_eq!(f.running(), 2);
    eventually("used", || used_index(&memory, 1) == 1);
    eventually("marked in the new log", || bit(&new, used));
    assert!(!bit(&old, used));
}

#[test]
fn log_all_without_a_log_does_not_stop_a_port_for_good() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    let t = Instant::now();
    p.start(BASIC | LOG_ALL, &memory, 1);
    assert_eq!(f.running(), 0);
    f.wait_running(2);
    let waited = t.elapsed();
    assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(3), "{waited:?}");
    offer_frame(&memory, 1, 0);
    eventually("used", || used_index(&memory, 1) == 1);
}

#[test]
fn a_held_get_vring_base_holds_only_its_own_port() {
    use ferry_dataplane::qsbr::Domain;
    use ferry_vhost::port::{VhostPort, VhostPortConfig};
    use ferry_vhost::signals::PortObserver;
    use std::sync::Arc;
    struct Hold;
    impl PortObserver for Hold {
        fn event(&self, event: &PortEvent) {
            if matches!(event, PortEvent::VringStopped { .. }) {
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("h");
    let domain = Domain::new();
    let config = VhostPortConfig::new("h", &path, ferry_vhost::socket::Role::Server);
    let mut port = VhostPort::start(config, Arc::clone(&domain), Arc::new(Hold)).unwrap();
    let _pmd = Pmd::start(&domain, &mut port);
    let memory = memfd(MEMORY_BYTES);
    let mut p = Peer::connect(&path);
    p.start(BASIC, &memory, 1);
    let t = Instant::now();
    p.ask(GET_VRING_BASE, &state(1, 0));
    assert!(t.elapsed() >= Duration::from_millis(200));
    assert!(port.status().connected);
}
