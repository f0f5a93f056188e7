//! Reconnects, memory slots and hostile descriptors leave no descriptor open. These tests count the descriptors of the whole
//! process, so each of them runs alone, in a test binary of their own.
mod session_support;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::signals::{NoObserver, PortEvent};
use ferry_vhost::socket::Role;
use session_support::*;

const BASIC: u64 = VERSION_1 | PROTOCOL;

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

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
fn server_and_client_survive_fifty_reconnects_with_counters_kept() {
    let _alone = alone();
    for role in [Role::Server, Role::Client] {
        let memory = memfd(MEMORY_BYTES);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = (role == Role::Client).then(|| UnixListener::bind(&path).unwrap());
        let domain = Domain::new();
        let mut port =
            VhostPort::start(VhostPortConfig::new("r", &path, role), Arc::clone(&domain), Arc::new(NoObserver))
                .unwrap();
        let pmd = Pmd::start(&domain, &mut port);
        let before = open_fds();
        for round in 0..50u16 {
            let mut p = listener.as_ref().map_or_else(|| Peer::connect(&path), Peer::accept);
            p.greet();
            p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL]));
            assert_eq!(p.set_memory(&memory), 0);
            for index in 0..2 {
                // As QEMU: a split ring's base is restored from the used index.
                p.set_up_ring(index, u32::from(used_index(&memory, index)));
                p.send(SET_VRING_ENABLE, &state(index, 1));
            }
            p.sync();
            offer_frame(&memory, 1, round);
            eventually("the round's frame", || used_index(&memory, 1) == round + 1);
            if round % 2 == 0 {
                p.ask(GET_VRING_BASE, &state(1, 0));
            }
            drop(p);
        }
        drop(listener);
        eventually("disconnected", || !port.status().connected);
        let s = port.status();
        // A client may have connected once more before its server went away.
        assert!(s.connections == 50 || (role == Role::Client && s.connections == 51), "{role:?}: {}", s.connections);
        assert_eq!(s.reconnects, s.connections - 1);
        assert_eq!(s.relay.messages["SET_VRING_KICK"], 100);
        assert_eq!((s.rings[1].kicks, s.rings[1].starts), (50, 50));
        assert_eq!(pmd.frames.load(Ordering::Relaxed), 50);
        assert_eq!(s.memory.regions, 0);
        // A client may be connecting again right now.
        assert!(open_fds() <= before + 2, "{} descriptors, {before} before", open_fds());
        let t = Instant::now();
        port.shutdown();
        port.shutdown();
        assert!(t.elapsed() < Duration::from_secs(1));
        assert_eq!(port.status().state, "closed");
        assert_eq!(path.exists(), role == Role::Client, "a server removes its socket");
    }
}

#[test]
fn descriptor_floods_leak_nothing() {
    let _alone = alone();
    let f = Fixture::new();
    let event = eventfd();
    let mut p = f.peer();
    p.greet();
    p.sync();
    let before = open_fds();
    for _ in 0..20 {
        let many = [event.as_raw_fd(); 200];
        assert_eq!(p.ack_fds(SET_VRING_KICK, &words(&[0]), &many), 1);
        assert_eq!(p.ack_fds(SET_OWNER, &[], &many[..3]), 1);
        assert_eq!(p.ack_fds(99, &[1; 100], &many[..30]), 1);
        assert_eq!(p.ack_fds(SET_VRING_CALL, &words(&[1]), &many[..2]), 1);
        assert_eq!(p.ack_fds(SET_MEM_TABLE, &memory_table(&[region(0, 4096, 0)]), &many[..32]), 1);
        // One descriptor with every byte.
        let bytes = encode(SET_VRING_ERR, VERSION | NEED_REPLY, &words(&[0]));
        for byte in bytes {
            p.raw(&[byte], &many[..16]).unwrap();
        }
        assert_eq!(p.receive().unwrap().u64(), 1);
    }
    p.sync();
    assert_eq!(open_fds(), before);
    assert_eq!(f.status().relay.unexpected_fds, 20 * 5);
    // A message cut short with descriptors in it.
    let bytes = encode(SET_VRING_KICK, VERSION, &words(&[0]));
    p.raw(&bytes[..14], &[event.as_raw_fd(); 5]).unwrap();
    drop(p);
    eventually("disconnected", || !f.status().connected);
    assert!(f.status().last_error.unwrap().contains("inside a message"));
    assert!(open_fds() < before);
    still_serves(&f);
}

#[test]
fn memory_slots_come_and_go_under_running_rings() {
    let _alone = alone();
    let f = Fixture::new();
    let (low, high) = (memfd(MEMORY_BYTES), memfd(MEMORY_BYTES));
    let mut p = f.peer();
    p.greet();
    p.send(SET_FEATURES, &words(&[BASIC]));
    let second = region(1 << 30, MEMORY_BYTES, 0);
    assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(region(0, MEMORY_BYTES, 0)), &[low.as_raw_fd()]), 0);
    for index in 0..2 {
        p.set_up_ring(index, 0);
        p.send(SET_VRING_ENABLE, &state(index, 1));
    }
    f.wait_running(2);
    for n in 0..5 {
        offer_frame(&low, 1, n);
    }
    eventually("5 used", || used_index(&low, 1) == 5);
    let before = open_fds();
    for _ in 0..10 {
        assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(second), &[high.as_raw_fd()]), 0);
        assert_eq!((f.running(), f.status().memory.regions), (2, 2));
        // QEMU 7.2 tells of a region once per queue pair: the same bytes of the same file are no second region.
        assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(second), &[high.as_raw_fd()]), 0);
        assert_eq!((f.running(), f.status().memory.regions), (2, 2));
        assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(second), &[low.as_raw_fd()]), 1, "another file: overlaps");
        // Older frontends attach a descriptor here.
        assert_eq!(p.ack_fds(REM_MEM_REG, &single_region(second), &[high.as_raw_fd()]), 0);
        assert_eq!((f.running(), f.status().memory.regions), (2, 1));
    }
    assert_eq!(open_fds(), before);
    offer_frame(&low, 1, 5);
    eventually("6 used", || used_index(&low, 1) == 6);
    // The region the rings are in goes: they stop, and come back with it.
    assert_eq!(p.ack(REM_MEM_REG, &single_region(region(0, MEMORY_BYTES, 0))), 0);
    assert_eq!(f.running(), 0);
    assert!(f.status().state.starts_with("stopped: vring"), "{}", f.status().state);
    assert_eq!(p.ack_fds(ADD_MEM_REG, &single_region(region(0, MEMORY_BYTES, 0)), &[low.as_raw_fd()]), 0);
    assert_eq!((f.running(), f.status().state.as_str()), (2, "running"));
    offer_frame(&low, 1, 6);
    eventually("7 used", || used_index(&low, 1) == 7);
    assert_eq!(f.events.count(|e| matches!(e, PortEvent::LinkUp)), 2);
}
