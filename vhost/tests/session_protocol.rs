//! The vhost-user session over a real socket, as well-behaved frontends speak it.
mod session_support;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{PortError, VhostPort, VhostPortConfig};
use ferry_vhost::signals::{NoObserver, PortEvent};
use ferry_vhost::socket::{Role, SocketError};
use session_support::*;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

#[test]
fn qemus_order_with_early_enables_reaches_running_rings() {
    let f = Fixture::with(|c| {
        c.queue_pairs = 2;
        c.mtu = 9000;
    });
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    let (features, protocol) = p.greet();
    assert_eq!(features & (LOG_ALL | PROTOCOL | VERSION_1 | PACKED), LOG_ALL | PROTOCOL | VERSION_1 | PACKED);
    assert_eq!(protocol & 0x801f, 0x801f);
    assert_eq!(p.ask(GET_QUEUE_NUM, &[]).u64(), 2);
    assert!(p.ask(GET_MAX_MEM_SLOTS, &[]).u64() >= 32);
    // QEMU 7.2 enables the first queue pair at device realize, with and without asking for an answer.
    assert_eq!(p.ack(SET_VRING_ENABLE, &state(0, 1)), 0);
    p.send(SET_VRING_ENABLE, &state(1, 1));
    assert_eq!(p.ack(NET_SET_MTU, &words(&[1500])), 0);
    assert_eq!(p.ack(NET_SET_MTU, &words(&[9001])), 1);
    let mac = [0x52, 0x54, 0, 0, 0, 0x0a];
    p.send(SEND_RARP, &[&mac[..], &[0, 0]].concat());
    p.send(SET_FEATURES, &words(&[VERSION_1 | PROTOCOL]));
    assert_eq!(p.set_memory(&memory), 0);
    for index in 0..2 {
        p.set_up_ring(index, 0);
    }
    f.wait_running(2);
    let s = f.status();
    assert_eq!((s.state.as_str(), s.link_up, s.connected), ("running", true, true));
    assert_eq!(s.features, ["protocol_features", "version_1"]);
    assert_eq!(s.relay.early_enables, 2);
    assert_eq!(s.relay.rarps, 1);
    assert_eq!(s.mtu, Some(1500));
    assert_eq!((s.memory.regions, s.memory.bytes), (1, MEMORY_BYTES));
    assert_eq!((s.rings[0].kicks, s.rings[0].size, s.rings[0].kind), (1, 256, "split"));
    assert!(f.events.any(|e| matches!(e, PortEvent::Rarp { mac: m } if *m == mac)));
    let names = f.events.names();
    let at = |n: &str| names.iter().position(|x| x == n).unwrap_or_else(|| panic!("{n} in {names:?}"));
    assert!(at("Connected") < at("Rarp") && at("Rarp") < at("Memory") && at("Kicked") < at("LinkUp"));
    assert!(serde_json::to_string(&s).unwrap().contains("\"SET_VRING_KICK\":2"));

    // Frames go through.
    for n in 0..100 {
        offer_frame(&memory, 1, n);
    }
    eventually("100 frames", || f.pmd.frames.load(Ordering::Relaxed) == 100);
    eventually("all given back", || used_index(&memory, 1) == 100);

    // GET_VRING_BASE: the base is the used index, and answering twice is the same.
    assert_eq!(p.ask(GET_VRING_BASE, &state(1, 0)).state(), (1, 100));
    assert_eq!(p.ask(GET_VRING_BASE, &state(1, 0)).state(), (1, 100));
    assert_eq!(p.ask(GET_VRING_BASE, &state(77, 0)).state(), (77, 0));
    let s = f.status();
    assert!(!s.link_up && !s.rings[1].running && s.rings[0].running);
    offer_frame(&memory, 1, 100);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(used_index(&memory, 1), 100, "a stopped ring is not touched");
    // Set up again, it goes on.
    p.set_up_ring(1, 100);
    eventually("the frame that waited", || used_index(&memory, 1) == 101);
    assert!(f.status().link_up);
}

#[test]
fn a_ring_without_protocol_features_starts_enabled_and_a_kick_without_descriptor_starts_a_polled_ring() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.ask(GET_FEATURES, &[]);
    p.send(SET_FEATURES, &words(&[VERSION_1]));
    p.send_fds(SET_MEM_TABLE, 0, &memory_table(&[region(0, MEMORY_BYTES, 0)]), &[memory.as_raw_fd()]);
    for index in 0..2 {
        p.send(SET_VRING_NUM, &state(index, RING_SIZE));
        p.send(SET_VRING_BASE, &state(index, 0));
        p.send(SET_VRING_ADDR, &ring_address(index, None));
        p.send(SET_VRING_KICK, &words(&[u64::from(index) | 0x100]));
    }
    f.wait_running(2);
    assert!(f.status().rings.iter().all(|r| r.polled && r.enabled));
    offer_frame(&memory, 1, 0);
    eventually("a frame from a polled ring", || used_index(&memory, 1) == 1);
}

#[test]
fn disabling_stops_a_ring_and_enabling_goes_on() {
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL, &memory, 1);
    f.wait_running(2);
    for n in 0..7 {
        offer_frame(&memory, 1, n);
    }
    eventually("7 used", || used_index(&memory, 1) == 7);
    assert_eq!(p.ack(SET_VRING_ENABLE, &state(1, 0)), 0);
    assert_eq!(f.running(), 1);
    offer_frame(&memory, 1, 7);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(used_index(&memory, 1), 7);
    assert_eq!(p.ack(SET_VRING_ENABLE, &state(1, 1)), 0);
    eventually("8 used", || used_index(&memory, 1) == 8);
    assert_eq!(p.ack(SET_VRING_ENABLE, &state(1, 2)), 1);
    assert_eq!(p.ack(RESET_DEVICE, &[]), 0);
    assert_eq!(f.running(), 0);
    assert!(f.events.any(|e| matches!(e, PortEvent::Reset)));
}

#[test]
fn the_crates_own_frontend_drives_eight_queue_pairs() {
    let f = Fixture::with(|c| c.queue_pairs = 8);
    let memory = memfd(MEMORY_BYTES);
    let mut front = Frontend::connect(&f.path, 16).unwrap();
    let features = front.get_features().unwrap();
    front.set_features(features & !(LOG_ALL | PACKED)).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol & !VhostUserProtocolFeatures::LOG_SHMFD).unwrap();
    front.set_owner().unwrap();
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST_BASE,
        memory_size: MEMORY_BYTES,
        userspace_addr: USER_BASE,
        mmap_offset: 0,
        mmap_handle: memory.as_raw_fd(),
    };
    front.set_mem_table(&[info]).unwrap();
    for index in 0..16usize {
        let base = USER_BASE + index as u64 * RING_STRIDE;
        front.set_vring_num(index, 256).unwrap();
        front.set_vring_base(index, 0).unwrap();
        let data = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + 0x8000,
            avail_ring_addr: base + 0x4000,
            log_addr: None,
        };
        front.set_vring_addr(index, &data).unwrap();
        let (kick, call) =
            (vmm_sys_util::eventfd::EventFd::new(0).unwrap(), vmm_sys_util::eventfd::EventFd::new(0).unwrap());
        front.set_vring_call(index, &call).unwrap();
        front.set_vring_kick(index, &kick).unwrap();
        front.set_vring_enable(index, true).unwrap();
    }
    f.wait_running(16);
    assert_eq!(front.get_vring_base(5).unwrap(), 0);
    // Queue pairs, as QEMU and virtio-user count them for virtio-net; this frontend takes it for vrings, hence last.
    assert_eq!(front.get_queue_num().unwrap(), 8);
    f.wait_running(15);
    drop(front);
    eventually("disconnected", || !f.status().connected);
    assert_eq!(f.running(), 0);
}

#[test]
fn a_client_waits_for_its_server_and_stops_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let mut port =
        VhostPort::start(VhostPortConfig::new("c", &path, Role::Client), Domain::new(), Arc::new(NoObserver)).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let s = port.status();
    assert_eq!(s.state, "connecting");
    assert!(s.last_error.unwrap().contains("connect"));
    let listener = UnixListener::bind(&path).unwrap();
    let mut p = Peer::accept(&listener);
    p.sync();
    drop((p, listener));
    std::fs::remove_file(&path).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let t = Instant::now();
    port.shutdown();
    assert!(t.elapsed() < Duration::from_millis(500), "{:?}", t.elapsed());
}

#[test]
fn a_second_frontend_waits_for_the_first_to_leave() {
    let f = Fixture::new();
    let mut first = f.peer();
    first.sync();
    let mut second = f.peer();
    second.send(GET_FEATURES, &[]);
    first.sync();
    drop(first);
    assert_eq!(second.receive().unwrap().code, GET_FEATURES);
    assert_eq!(f.status().connections, 2);
}

#[test]
fn impossible_ports_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let start = |change: &dyn Fn(&mut VhostPortConfig)| {
        let mut c = VhostPortConfig::new("x", &path, Role::Server);
        change(&mut c);
        VhostPort::start(c, Domain::new(), Arc::new(NoObserver))
    };
    assert!(matches!(start(&|c| c.queue_pairs = 0), Err(PortError::QueuePairs(0))));
    assert!(matches!(start(&|c| c.queue_pairs = 9), Err(PortError::QueuePairs(9))));
    assert!(matches!(start(&|c| c.mtu = 67), Err(PortError::Mtu(67))));
    let first = start(&|_| {}).unwrap();
    assert!(matches!(start(&|_| {}), Err(PortError::Socket(SocketError::InUse(_)))));
    assert!(path.exists(), "the refused port did not take the socket away");
    drop(first);
    assert!(start(&|_| {}).is_ok());
}

/// Makes descriptor `i` of packed ring 1 available in the first lap.
fn offer_packed(memory: &std::fs::File, i: u64) {
    use std::os::unix::fs::FileExt;
    let buffer = 0x10_0000 + i * 256;
    let avail = 1u16 << 7;
    let address = (GUEST_BASE + buffer).to_le_bytes();
    let d = [&address[..], &72u32.to_le_bytes(), &(i as u16).to_le_bytes(), &avail.to_le_bytes()].concat();
    memory.write_all_at(&d, RING_STRIDE + i * 16).unwrap();
}

#[test]
fn a_packed_ring_goes_on_after_a_cut_connection_although_the_frontend_only_knows_the_old_base() {
    use std::os::unix::fs::FileExt;
    let f = Fixture::new();
    let memory = memfd(MEMORY_BYTES);
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL | PACKED, &memory, 1);
    for i in 0..5 {
        offer_packed(&memory, i);
    }
    eventually("5 frames", || f.pmd.frames.load(Ordering::Relaxed) == 5);
    drop(p);
    eventually("disconnected", || !f.status().connected);
    // QEMU sends the base of the last start.
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL | PACKED, &memory, 1);
    f.wait_running(2);
    assert_eq!(f.status().rings[1].base & 0x7fff, 5);
    offer_packed(&memory, 5);
    eventually("the sixth frame", || f.pmd.frames.load(Ordering::Relaxed) == 6);
    // The base that GET_VRING_BASE gives is the frontend's own from then on.
    assert_eq!(p.ask(GET_VRING_BASE, &state(1, 0)).state(), (1, 0x8006_8006));
    drop(p);
    // A guest that was reset in between has a fresh ring: the given base is right.
    memory.write_all_at(&[0; 256 * 16], RING_STRIDE).unwrap();
    let mut p = f.peer();
    p.start(VERSION_1 | PROTOCOL | PACKED, &memory, 1);
    f.wait_running(2);
    assert_eq!(f.status().rings[1].base, 0x8000_8000);
}

#[test]
fn a_packed_ring_goes_on_after_a_restart_of_the_switch_with_a_state_file_only() {
    for with_file in [true, false] {
        let state_dir = tempfile::tempdir().unwrap();
        let state_file = with_file.then(|| state_dir.path().join("state"));
        let memory = memfd(MEMORY_BYTES);
        let f = Fixture::with(|c| c.state_file = state_file.clone());
        let mut p = f.peer();
        p.start(VERSION_1 | PROTOCOL | PACKED, &memory, 1);
        for i in 0..5 {
            offer_packed(&memory, i);
        }
        eventually("5 frames", || f.pmd.frames.load(Ordering::Relaxed) == 5);
        // As a killed process leaves it: nothing is written at the end.
        let saved = state_file.as_ref().map(|path| std::fs::read(path).unwrap());
        drop((f, p));
        if let (Some(path), Some(saved)) = (&state_file, saved) {
            std::fs::write(path, saved).unwrap();
        }
        let f = Fixture::with(|c| c.state_file = state_file.clone());
        let mut p = f.peer();
        p.start(VERSION_1 | PROTOCOL | PACKED, &memory, 1);
        f.wait_running(2);
        offer_packed(&memory, 5);
        if with_file {
            eventually("the sixth frame", || f.pmd.frames.load(Ordering::Relaxed) == 1);
            assert_eq!(p.ask(GET_VRING_BASE, &state(1, 0)).state(), (1, 0x8006_8006));
        } else {
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(f.pmd.frames.load(Ordering::Relaxed), 0, "nobody knows where the ring stood");
        }
    }
}
