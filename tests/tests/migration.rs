//! Live migration of a guest from one port to another, as QEMU does it, with the switch's dirty log put to the proof.
use anyhow::{Context, bail};
use ferry_guest::protocol::{Command, Direction, Reply, UdpReport};
use ferry_tests::qemu::{self, Guest, GuestBuilder, Nic, Role};
use ferry_tests::scenario::{self, Member, v4};
use ferry_tests::{Agent, FerrydBuilder, Outcome, Scratch, TestpmdBuilder, wait};
use serde_json::json;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

const HOLD_PORT: u16 = 9000;
const PACKETS: u32 = 60;
const SEED: u64 = 4242;
const PATIENCE: Duration = Duration::from_secs(60);

fn udp(reply: Reply) -> anyhow::Result<UdpReport> {
    match reply {
        Reply::Udp(r) => Ok(r),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn send_held(from: &Agent) -> anyhow::Result<UdpReport> {
    let to = SocketAddr::new(v4(1), HOLD_PORT);
    let command = Command::UdpSend { to, count: PACKETS, payload_bytes: 1000, interval_us: 20_000, seed: SEED };
    udp(from.call(command, PATIENCE)?)
}

/// Moves `source` to `destination` (launched with `incoming`) while `peer` sends datagrams that the guest leaves unread, and
/// checks that all of them arrived. Frames received into memory that QEMU has already copied must be copied again: only the
/// switch's dirty log tells QEMU. Nobody but the switch has touched those pages until the guest has moved.
fn migrate(scratch: &Scratch, mut source: Guest, destination: &mut Guest, peer: &Agent) -> Outcome {
    let uri = format!("unix:{}", scratch.join("migration.sock").display());
    let mut to = destination.qmp(0)?;
    to.execute("migrate-incoming", json!({"uri": uri}))?;
    let mut from = source.qmp(0)?;
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    from.execute("migrate-set-capabilities", events)?;
    from.execute("migrate-set-parameters", json!({"max-bandwidth": 60_000_000, "downtime-limit": 20}))?;

    source.call(Command::UdpHold { port: HOLD_PORT }, PATIENCE)?;
    let Reply::Handle(dirt) = source.call(Command::DirtyStart { size_mb: 24, mb_per_s: 100 }, PATIENCE)? else {
        panic!("no handle");
    };
    from.execute("migrate", json!({"uri": uri}))?;
    // The first round copies all memory; what arrives after it must be copied again.
    for _ in 0..2 {
        from.wait_event("MIGRATION_PASS", PATIENCE).context("first round")?;
    }
    let sent = send_held(peer)?;
    let status = from.execute("query-migrate", json!({}))?;
    assert!(status["status"] == "active", "the datagrams were to arrive during the rounds: {status}");
    source.call(Command::DirtyStop { handle: dirt }, PATIENCE)?;
    let end = wait::for_some("end of the migration", PATIENCE, || match from.execute("query-migrate", json!({})) {
        Ok(s) if s["status"] == "active" || s["status"] == "device" => None,
        other => Some(other),
    })??;
    assert!(end["status"] == "completed", "{end}");
    destination.adopt_agent(&mut source)?;
    drop(source);
    wait::until("guest on the destination", PATIENCE, || {
        to.execute("query-status", json!({})).is_ok_and(|s| s["status"] == "running")
    })?;
    let drained = udp(destination.call(Command::UdpDrain { port: HOLD_PORT, seed: SEED }, PATIENCE)?)?;
    assert_eq!((drained.received, drained.corrupted), (sent.sent, 0), "written during the rounds: {drained:?}");
    Ok(())
}

fn over_ferry(packed: bool) -> Outcome {
    let scratch = Scratch::new()?;
    let member = |n| Member::new(&scratch, n, Role::Client).with_nic(|nic| nic.packed = packed);
    let members = [member(1), member(2)];
    // The destination's port: another socket, the same guest with the same address.
    let mut target = member(3);
    target.nic.mac = members[0].nic.mac.clone();
    let running = scenario::start(&scratch, FerrydBuilder::new().port(target.port.clone()), &members)?;
    let [source, peer] = running.guests;
    let ferryd = running.ferryd;
    source.reach("10.0.0.2")?;
    let ticks = peer.start_ticks(v4(1), Duration::from_millis(10))?;
    let kept = peer.open_connections(v4(1), 10)?;
    let mut destination = target.builder().incoming().launch(scratch.path())?;
    migrate(&scratch, source, &mut destination, &peer)?;

    ferryd.wait_state(&["vm3"], "up")?;
    ferryd.wait_state(&["vm1"], "waiting")?;
    destination.reach("10.0.0.2")?;
    assert_eq!(peer.exercise_connections(kept)?, 10);
    destination.transfer(v4(2), Direction::Send, 20_000_000)?;
    let before = peer.ticks(ticks, false)?;
    thread::sleep(Duration::from_millis(500));
    let after = peer.ticks(ticks, true)?;
    eprintln!("longest silence seen by the peer: {} ms", after.max_gap_ms);
    assert!(after.error.is_none() && after.received > before.received, "the tick connection survived: {after:?}");
    ferryd.check_ledger()?;
    Ok(())
}

#[test]
fn a_guest_with_split_rings_moves_with_all_it_received() -> Outcome {
    over_ferry(false)
}

#[test]
fn a_guest_with_packed_rings_moves_with_all_it_received() -> Outcome {
    over_ferry(true)
}

/// The same with DPDK's own vhost library in the switch's place: what fails here is not Ferry's fault.
#[test]
fn the_same_move_over_a_foreign_switch() -> Outcome {
    let scratch = Scratch::new()?;
    let sockets: Vec<_> = (0..4).map(|n| scratch.join(format!("v{n}.sock"))).collect();
    let mut switch = TestpmdBuilder::new().arg("--forward-mode=io");
    for (n, socket) in sockets.iter().enumerate() {
        switch = switch.device(&format!("net_vhost{n},iface={}", socket.display()));
    }
    // Ports 0 and 1 are wired to each other, and ports 2 and 3: the destination hears nobody.
    let mut switch = switch.start(scratch.path())?;
    let guest = |name: &str, socket: usize, mac| GuestBuilder::new(name).nic(Nic::new(&sockets[socket], mac));
    let [source, peer] = qemu::boot_all([guest("vm1", 0, 1), guest("vm2", 1, 2)], scratch.path())?;
    switch.start()?;
    source.configure("eth0", &["10.0.0.1/24"], None)?;
    peer.configure("eth0", &["10.0.0.2/24"], None)?;
    source.reach("10.0.0.2")?;
    let mut destination = guest("vm3", 2, 1).incoming().launch(scratch.path())?;
    migrate(&scratch, source, &mut destination, &peer)?;
    destination.ping_agent()?;
    Ok(())
}
