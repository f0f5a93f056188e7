//! Two QEMU guests exchange traffic through Ferry, with every combination of ring format, offload, queue count and socket
//! role that matters.
use anyhow::ensure;
use ferry_guest::protocol::{Direction, UdpReport};
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, Running, v4, v6};
use ferry_tests::{FerrydBuilder, Outcome, Scratch};
use std::time::Duration;

const BYTES: u64 = 100_000_000;

/// 100 MB each way, one way over IPv6; returns the counters after the ledger was checked.
fn exchange(running: &Running<2>) -> anyhow::Result<ferry_tests::ferryd::Stats> {
    let [a, b] = &running.guests;
    a.reach("10.0.0.2")?;
    let there = a.transfer(v4(2), Direction::Send, BYTES)?;
    let back = b.transfer(v6(1), Direction::Send, BYTES)?;
    eprintln!("there {} ms, back {} ms", there.elapsed_ms, back.elapsed_ms);
    let stats = running.ferryd.check_ledger()?;
    for port in ["vm1", "vm2"] {
        let bytes = stats.port(port).received().bytes;
        ensure!(bytes > BYTES, "{port}: {bytes} bytes received are less than were transferred");
    }
    Ok(stats)
}

/// Mean bytes per frame that a port received: tells whether segmentation was left to the other side.
fn mean_frame_bytes(stats: &ferry_tests::ferryd::Stats, port: &str) -> u64 {
    let rx = stats.port(port).received();
    rx.bytes / rx.frames.max(1)
}

fn lossless(udp: &UdpReport, count: u64) {
    assert_eq!((udp.sent, udp.received, udp.duplicates, udp.corrupted), (count, count, 0, 0), "{udp:?}");
}

#[test]
fn split_rings_with_offloads_in_both_roles() -> Outcome {
    let scratch = Scratch::new()?;
    let members = [Member::new(&scratch, 1, Role::Client), Member::new(&scratch, 2, Role::Server)];
    let running = scenario::start(&scratch, FerrydBuilder::new(), &members)?;
    running.ferryd.wait_state(&["vm1", "vm2"], "up")?;
    let [a, b] = &running.guests;
    a.reach("10.0.0.2")?;
    a.reach("fd00::2")?;
    // Link-local addresses, derived from 52:54:00:00:00:01 and :02.
    a.reach("fe80::5054:ff:fe00:2%eth0")?;
    b.reach("fe80::5054:ff:fe00:1%eth0")?;
    lossless(&a.udp_probe(v4(2), 200, 18, Duration::from_millis(2))?, 200);
    lossless(&b.udp_probe(v6(1), 200, 1400, Duration::from_millis(2))?, 200);
    // Larger than the MTU: fragments.
    lossless(&a.udp_probe(v4(2), 50, 8000, Duration::from_millis(5))?, 50);
    let kept = b.open_connections(v4(1), 50)?;
    assert_eq!(b.exercise_connections(kept)?, 50);
    let stats = exchange(&running)?;
    assert!(mean_frame_bytes(&stats, "vm1") > 2000, "segmentation was passed through: {stats:#?}");
    assert_eq!(b.exercise_connections(kept)?, 50);
    Ok(())
}

#[test]
fn without_offloads() -> Outcome {
    let scratch = Scratch::new()?;
    let members = [1, 2].map(|n| Member::new(&scratch, n, Role::Client).with_nic(|nic| nic.offloads = false));
    let running = scenario::start(&scratch, FerrydBuilder::new(), &members)?;
    let stats = exchange(&running)?;
    assert!(mean_frame_bytes(&stats, "vm1") < 1515, "nothing larger than the MTU: {stats:#?}");
    Ok(())
}

#[test]
fn segmentation_and_checksums_are_finished_for_a_guest_that_lacks_them() -> Outcome {
    let scratch = Scratch::new()?;
    let able = Member::new(&scratch, 1, Role::Client);
    let plain = Member::new(&scratch, 2, Role::Client).with_nic(|nic| {
        nic.offloads = false;
        nic.mrg_rxbuf = false;
    });
    let running = scenario::start(&scratch, FerrydBuilder::new(), &[able, plain])?;
    let stats = exchange(&running)?;
    assert!(mean_frame_bytes(&stats, "vm1") > 2000, "vm1 left segmentation to the switch: {stats:#?}");
    let sent = stats.port("vm2").tx;
    assert!(sent.bytes / sent.frames < 1515, "vm2 got frames of its size: {stats:#?}");
    Ok(())
}

#[test]
fn packed_rings() -> Outcome {
    let scratch = Scratch::new()?;
    let packed = Member::new(&scratch, 1, Role::Client).with_nic(|nic| nic.packed = true);
    let packed_server = Member::new(&scratch, 2, Role::Server).with_nic(|nic| nic.packed = true);
    let running = scenario::start(&scratch, FerrydBuilder::new(), &[packed, packed_server])?;
    lossless(&running.guests[0].udp_probe(v4(2), 200, 100, Duration::from_millis(2))?, 200);
    exchange(&running)?;
    Ok(())
}

#[test]
fn packed_without_offloads_and_split_meet() -> Outcome {
    let scratch = Scratch::new()?;
    let packed = Member::new(&scratch, 1, Role::Server).with_nic(|nic| {
        nic.packed = true;
        nic.offloads = false;
    });
    let split = Member::new(&scratch, 2, Role::Client).with_nic(|nic| nic.mrg_rxbuf = false);
    let running = scenario::start(&scratch, FerrydBuilder::new(), &[packed, split])?;
    exchange(&running)?;
    Ok(())
}

#[test]
fn two_queue_pairs_on_two_pmd_threads() -> Outcome {
    let scratch = Scratch::new()?;
    let split = Member::new(&scratch, 1, Role::Client).queues(2);
    let packed = Member::new(&scratch, 2, Role::Client).queues(2).with_nic(|nic| nic.packed = true);
    let running = scenario::start(&scratch, FerrydBuilder::new().pmds(2), &[split, packed])?;
    let [a, b] = &running.guests;
    for guest in [a, b] {
        let queues = guest.shell("ls -d /sys/class/net/eth0/queues/tx-* | wc -l")?;
        assert_eq!(queues.trim(), "2");
    }
    // Transmit queue follows the CPU: connections from both CPUs use both.
    let kept = a.open_connections(v4(2), 40)?;
    assert_eq!(a.exercise_connections(kept)?, 40);
    let both = [
        a.start_transfer(v4(2), Direction::Send, 1, BYTES / 4, 0)?,
        b.start_transfer(v4(1), Direction::Send, 2, BYTES / 4, 0)?,
    ];
    for (seed, transfer) in (1..).zip(both) {
        let report = transfer.wait_transfer(Duration::from_secs(120))?;
        ferry_tests::agent::verify(&report, BYTES / 4, &ferry_guest::stream::digest(seed, BYTES / 4))?;
    }
    let stats = exchange(&running)?;
    let used = ["vm1", "vm2"].map(|p| stats.port(p).rx.iter().filter(|q| q.frames > 0).count());
    assert!(used.contains(&2), "two queues of one guest carried frames: {stats:#?}");
    Ok(())
}

#[test]
fn jumbo_frames() -> Outcome {
    let scratch = Scratch::new()?;
    let split = Member::new(&scratch, 1, Role::Client).mtu(9000);
    let packed = Member::new(&scratch, 2, Role::Client).mtu(9000).with_nic(|nic| {
        nic.packed = true;
        nic.offloads = false;
    });
    let small = Member::new(&scratch, 3, Role::Client).mtu(1500);
    let running = scenario::start(&scratch, FerrydBuilder::new(), &[split, packed, small])?;
    let [a, b, _] = &running.guests;
    a.reach("10.0.0.2")?;
    a.reach("10.0.0.3")?;
    // 8972 + 28 bytes of headers are exactly 9000: one unfragmented packet.
    lossless(&a.udp_probe(v4(2), 50, 8972, Duration::from_millis(2))?, 50);
    a.transfer(v4(2), Direction::Send, BYTES / 2)?;
    b.transfer(v4(1), Direction::Send, BYTES / 2)?;
    let before = running.ferryd.check_ledger()?;
    assert!(mean_frame_bytes(&before, "vm2") > 2000, "jumbo frames without segmentation offload: {before:#?}");
    // To a port of 1500 bytes such a frame does not fit: dropped under its reason, and nothing else happens.
    let lost = a.udp_probe(v4(3), 10, 8972, Duration::from_millis(2))?;
    assert_eq!((lost.sent, lost.received), (10, 0), "{lost:?}");
    let after = running.ferryd.check_ledger()?;
    let too_long = |s: &ferry_tests::ferryd::Stats| {
        s.port("vm1").received().dropped.get("tx_too_long").copied().unwrap_or_default()
    };
    assert_eq!(too_long(&after) - too_long(&before), 10, "{after:#?}");
    assert!(a.can_ping("10.0.0.3", 3)?);
    Ok(())
}
