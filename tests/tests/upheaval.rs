//! What operators and accidents do to a running switch: crash, restart, guests that vanish, ports that come and go.
use ferry_guest::protocol::Direction;
use ferry_guest::stream;
use ferry_tests::agent::verify;
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, v4};
use ferry_tests::{FerrydBuilder, Outcome, Scratch};
use std::thread;
use std::time::{Duration, Instant};

/// Paced, so that the upheaval hits in the middle: 5 s at 12 MB/s.
const BYTES: u64 = 60_000_000;
const PACE_MB_PER_S: u32 = 12;
const MIDDLE: Duration = Duration::from_secs(2);

#[test]
fn a_transfer_over_split_rings_survives_crashes_of_the_switch() -> Outcome {
    crash(false)
}

#[test]
fn a_transfer_over_packed_rings_survives_crashes_of_the_switch() -> Outcome {
    crash(true)
}

fn crash(packed: bool) -> Outcome {
    let scratch = Scratch::new()?;
    let members = [(1, Role::Client), (2, Role::Server)]
        .map(|(n, role)| Member::new(&scratch, n, role).with_nic(|nic| nic.packed = packed));
    let mut running = scenario::start(&scratch, FerrydBuilder::new(), &members)?;
    let [a, b] = &running.guests;
    a.reach("10.0.0.2")?;
    let kept = b.open_connections(v4(1), 20)?;
    let transfer = a.start_transfer(v4(2), Direction::Send, 77, BYTES, PACE_MB_PER_S)?;
    thread::sleep(MIDDLE);
    for _ in 0..2 {
        running.ferryd.restart()?;
        thread::sleep(MIDDLE);
    }
    let report = transfer.wait_transfer(Duration::from_secs(120))?;
    verify(&report, BYTES, &stream::digest(77, BYTES))?;
    assert!(report.max_stall_ms > 100, "the crash fell into the transfer: {report:?}");
    assert_eq!(b.exercise_connections(kept)?, 20);
    // An orderly stop and start is no different.
    running.ferryd.stop()?;
    running.ferryd.restart()?;
    assert_eq!(running.guests[1].exercise_connections(kept)?, 20);
    running.ferryd.check_ledger()?;
    Ok(())
}

#[test]
fn a_guest_that_dies_mid_transfer_is_replaced_and_others_notice_nothing() -> Outcome {
    let scratch = Scratch::new()?;
    let members = [
        Member::new(&scratch, 1, Role::Client),
        Member::new(&scratch, 2, Role::Client),
        Member::new(&scratch, 3, Role::Server).with_nic(|nic| nic.packed = true),
    ];
    let mut running = scenario::start(&scratch, FerrydBuilder::new(), &members)?;
    let [a, ..] = &running.guests;
    a.reach("10.0.0.2")?;
    a.reach("10.0.0.3")?;
    let bystanders = a.start_ticks(v4(2), Duration::from_millis(20))?;
    for _ in 0..2 {
        let doomed = running.guests[0].start_transfer(v4(3), Direction::Send, 1, BYTES, PACE_MB_PER_S)?;
        thread::sleep(Duration::from_secs(1));
        running.guests[2].kill();
        let killed = Instant::now();
        running.ferryd.wait_state(&["vm3"], "waiting")?;
        eprintln!("noticed after {:?}", killed.elapsed());
        running.guests[2] = members[2].builder().boot(scratch.path())?;
        running.guests[2].configure("eth0", &["10.0.0.3/24"], None)?;
        running.guests[0].reach("10.0.0.3")?;
        // The old connection is unknown to the new guest, which resets it.
        assert!(doomed.wait(Duration::from_secs(90)).is_err(), "a transfer to a dead guest cannot succeed");
        running.guests[0].transfer(v4(3), Direction::Send, 20_000_000)?;
        running.guests[2].transfer(v4(2), Direction::Send, 20_000_000)?;
    }
    let report = running.guests[0].ticks(bystanders, true)?;
    assert!(report.error.is_none() && report.received > 100, "{report:?}");
    running.ferryd.check_ledger()?;
    Ok(())
}

#[test]
fn ports_come_and_go_while_others_carry_traffic() -> Outcome {
    let scratch = Scratch::new()?;
    let members = [1, 2].map(|n| Member::new(&scratch, n, Role::Client));
    let mut running = scenario::start(&scratch, FerrydBuilder::new().pmds(2), &members)?;
    let [a, b] = &running.guests;
    a.reach("10.0.0.2")?;
    let ticks = a.start_ticks(v4(2), Duration::from_millis(20))?;
    let transfer = a.start_transfer(v4(2), Direction::Send, 5, BYTES, PACE_MB_PER_S)?;
    let newcomer = Member::new(&scratch, 3, Role::Client);
    running.ferryd.add_port(newcomer.port.clone())?;
    let third = newcomer.builder().boot(scratch.path())?;
    third.configure("eth0", &["10.0.0.3/24"], None)?;
    third.reach("10.0.0.1")?;
    let held = third.open_connections(v4(2), 5)?;
    for _ in 0..3 {
        running.ferryd.remove_port("vm3")?;
        assert!(running.ferryd.port_state("vm3").is_err(), "the port is gone");
        assert!(!third.can_ping("10.0.0.1", 1)?);
        running.ferryd.add_port(newcomer.port.clone())?;
        // Its QEMU reconnects every second.
        third.reach("10.0.0.1")?;
    }
    assert_eq!(third.exercise_connections(held)?, 5);
    let report = transfer.wait_transfer(Duration::from_secs(120))?;
    verify(&report, BYTES, &stream::digest(5, BYTES))?;
    let report = a.ticks(ticks, true)?;
    assert!(report.error.is_none() && report.received > 100, "{report:?}");
    b.ping_agent()?;
    let stats = running.ferryd.check_ledger()?;
    assert!(stats.removed.frames > 0, "removed ports stay in the books: {stats:#?}");
    Ok(())
}
