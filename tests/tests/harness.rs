//! The harness itself, with DPDK's own vhost library in the switch's place: what fails here is not Ferry's fault.
use ferry_guest::protocol::Direction;
use ferry_tests::qemu::{self, GuestBuilder, Nic, Role};
use ferry_tests::{Outcome, Scratch, TestpmdBuilder, VirtioUser};
use std::net::IpAddr;
use std::time::Duration;

fn addr(s: &str) -> IpAddr {
    s.parse().expect("an address")
}

#[test]
fn guests_talk_through_a_foreign_switch() -> Outcome {
    let scratch = Scratch::new()?;
    let (a_sock, b_sock) = (scratch.join("a.sock"), scratch.join("b.sock"));
    let mut switch = TestpmdBuilder::new()
        .device(&format!("net_vhost0,iface={}", a_sock.display()))
        .device(&format!("net_vhost1,iface={},client=1", b_sock.display()))
        .arg("--forward-mode=io")
        .start(scratch.path())?;
    let mut b_nic = Nic::new(&b_sock, 2);
    b_nic.role = Role::Server;
    let started = std::time::Instant::now();
    let [a, b] = qemu::boot_all(
        [GuestBuilder::new("a").nic(Nic::new(&a_sock, 1)), GuestBuilder::new("b").nic(b_nic)],
        scratch.path(),
    )?;
    eprintln!("booted in {:?}", started.elapsed());
    switch.start()?;
    a.configure("eth0", &["10.0.0.1/24", "fd00::1/64"], None)?;
    b.configure("eth0", &["10.0.0.2/24", "fd00::2/64"], None)?;
    a.reach("10.0.0.2")?;
    a.reach("fd00::2")?;
    for (to, direction) in [("10.0.0.2", Direction::Send), ("fd00::2", Direction::Receive)] {
        let report = a.transfer(addr(to), direction, 10_000_000)?;
        eprintln!("{report:?}");
    }
    let udp = a.udp_probe(addr("10.0.0.2"), 100, 200, Duration::from_millis(2))?;
    assert_eq!((udp.sent, udp.received, udp.corrupted, udp.duplicates), (100, 100, 0, 0), "{udp:?}");
    let ticks = b.start_ticks(addr("10.0.0.1"), Duration::from_millis(10))?;
    let kept = a.open_connections(addr("10.0.0.2"), 20)?;
    assert_eq!(a.exercise_connections(kept)?, 20);
    std::thread::sleep(Duration::from_millis(500));
    let report = b.ticks(ticks, true)?;
    assert!(report.received > 5 && report.error.is_none(), "{report:?}");
    let monitor = a.qmp(0)?.execute("query-status", serde_json::json!({}))?;
    assert_eq!(monitor["running"], true);
    Ok(())
}

#[test]
fn a_transfer_that_is_not_what_was_asked_for_is_noticed() -> Outcome {
    let scratch = Scratch::new()?;
    let ns = ferry_tests::Netns::new(scratch.path())?;
    let to = addr("127.0.0.1");
    let report = ns.transfer(to, Direction::Send, 1_000_000)?;
    let expected = ferry_guest::stream::digest(1, 1_000_000);
    assert!(ferry_tests::agent::verify(&report, 1_000_000, &expected).is_err(), "another seed's digest");
    assert!(ferry_tests::agent::verify(&report, 999_999, &report.digest).is_err(), "another length");
    Ok(())
}

#[test]
fn namespaces_talk_over_veth_and_vanish() -> Outcome {
    let scratch = Scratch::new()?;
    let (one, two) = (ferry_tests::Netns::new(scratch.path())?, ferry_tests::Netns::new(scratch.path())?);
    one.veth("v0", &two, "v0")?;
    one.configure("v0", &["10.9.0.1/24"], None)?;
    two.configure("v0", &["10.9.0.2/24"], None)?;
    one.reach("10.9.0.2")?;
    two.transfer(addr("10.9.0.1"), Direction::Send, 5_000_000)?;
    let name = one.name().to_string();
    drop(one);
    assert!(!std::path::Path::new("/run/netns").join(name).exists());
    // The kernel takes namespaces down in the background.
    ferry_tests::wait::until("end of the veth pair", Duration::from_secs(10), || !two.has_interface("v0"))?;
    Ok(())
}

#[test]
fn testpmd_counts_what_it_sends_and_receives() -> Outcome {
    let scratch = Scratch::new()?;
    let socket = scratch.join("p.sock");
    let mut server = TestpmdBuilder::new()
        .device(&format!("net_vhost0,iface={}", socket.display()))
        .arg("--forward-mode=rxonly")
        .start(scratch.path())?;
    let mut client = TestpmdBuilder::new()
        .port(&VirtioUser::new(&socket, 1).option("packed_vq", 1))
        .arg("--forward-mode=txonly")
        .start(scratch.path())?;
    server.start()?;
    client.start()?;
    std::thread::sleep(Duration::from_millis(500));
    client.stop()?;
    let sent = client.stats(0)?.tx_packets;
    assert!(sent > 1000, "{sent}");
    ferry_tests::wait::until("all packets", Duration::from_secs(5), || {
        server.stats(0).is_ok_and(|s| s.rx_packets + s.rx_missed > 0)
    })?;
    assert!(server.command("show no such thing").is_err());
    Ok(())
}
