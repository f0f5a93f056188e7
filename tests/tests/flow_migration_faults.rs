//! Live migrations in which something goes wrong, with real processes: the source goes on exactly as before, or the destination has
//! everything; and QEMU's own migration is never less reliable for it.
use anyhow::{Context, ensure};
use ferry_guest::protocol::{Command, Direction};
use ferry_tests::hostile_peer::Identity;
use ferry_tests::two_hosts::moving::Pace;
use ferry_tests::two_hosts::session::{CONNECTIONS, Session};
use ferry_tests::two_hosts::{Plan, Side, VM, channel, guest_address};
use ferry_tests::{Outcome, hostile_peer, wait};
use serde_json::json;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn plan() -> Plan {
    // What is left of a migration is gone soon, so that the next row finds nothing of it.
    Plan { flow_migration: true, migration_keys: "redirect_ms = 1000".into(), ..Plan::default() }
}

fn paused() -> Pace {
    Pace { pause: true, ..Pace::default() }
}

/// Cancelled and failed attempts in a row on one pair of hosts, then one that succeeds at once after a cancelled one, and another back.
#[test]
fn the_source_goes_on_as_before_and_the_next_attempt_succeeds() -> Outcome {
    let (mut session, mut guest) = Session::new(plan())?;
    let before = session.large_memory(Side::B)?;

    let moving = session.begin(guest, Pace::default())?;
    guest = moving.cancel()?;
    let ended = session.stayed(&guest)?;
    assert_eq!(ended.outcome, "cancelled", "{ended:?}");

    // In the pause before the switch-over the guest is stopped, and the destination has everything.
    let mut moving = session.begin(guest, paused())?;
    session.calm(&moving.source)?;
    moving.wait_status("pre-switchover")?;
    guest = moving.cancel()?;
    session.stayed(&guest)?;

    let moving = session.begin(guest, Pace::default())?;
    guest = moving.kill_destination()?;
    session.stayed(&guest)?;

    let mut moving = session.begin(guest, paused())?;
    session.calm(&moving.source)?;
    moving.wait_status("pre-switchover")?;
    guest = moving.kill_destination()?;
    session.stayed(&guest)?;
    session.check_large_memory(Side::B, before)?;

    // An operator gives up the first attempt while it runs, and tries again at once.
    let moving = session.begin(guest, Pace::default())?;
    guest = moving.cancel()?;
    session.calm(&guest)?;
    let moving = session.begin(guest, Pace::default())?;
    session.calm(&moving.source)?;
    guest = session.moved(moving.finish()?)?;
    // And back, straight after.
    let moving = session.begin_quietly(guest, Pace::default())?;
    session.calm(&moving.source)?;
    guest = session.moved(moving.finish()?)?;
    assert_eq!(session.at, Side::A);
    session.check_empty(Side::B)?;
    session.check_ledgers()?;
    session.connections.check_all_alive(&session.hosts, &guest)?;
    Ok(())
}

/// Strangers try to get in at host B while it receives a VM; returns those that just stay.
fn knock(session: &Session) -> anyhow::Result<Vec<TcpStream>> {
    let (from, to) = (&session.hosts.a.home, channel::listener(Side::B));
    let before = session.destination().refused()?;
    let trust = session.hosts.channel.as_ref().context("no certificates")?.pki(Side::A).join("trust.pem");
    let nobody = hostile_peer::try_tls(from, to, "host-b", &trust, Identity::None)?;
    ensure!(nobody.contains("CertificateRequired"), "{nobody}");
    // The right name, certified by somebody else.
    let theirs = session.scratch.join("foreign-host-a");
    channel::issue(&session.scratch.join("foreign-authority"), &[("host-a", theirs.clone())])?;
    let foreign = hostile_peer::try_tls(from, to, "host-b", &trust, Identity::Foreign(&theirs.join("host-a.pem")))?;
    ensure!(foreign.contains("UnknownCA") || foreign.contains("BadCertificate"), "{foreign}");
    let garbage = Command::Transfer {
        to,
        direction: Direction::Send,
        seed: 1,
        bytes: 1_000_000,
        pace_mb_per_s: 0,
        timeout_ms: 10_000,
    };
    ensure!(from.call(garbage, PATIENCE).is_err(), "garbage was answered");
    let refused = session.destination().refused()? - before;
    ensure!(refused >= 3, "{refused} were counted");
    // Last: a listener takes only so many handshakes at a time from one address.
    hostile_peer::keep_silent(from, to)
}

/// What happens to the guest, to the channel and around it while rounds run does not stop connections from arriving; a channel that is
/// cut just before the stop costs no more than the hold.
#[test]
fn disturbances_during_the_rounds() -> Outcome {
    let (mut session, mut guest) = Session::new(plan())?;
    // The guest is stopped and goes on while rounds run; strangers knock at the listener meanwhile.
    let mut moving = session.begin(guest, Pace::default())?;
    // So slow that QEMU cannot complete while the guest changes nothing.
    moving.at_source("migrate-set-parameters", json!({"max-bandwidth": 10_000_000}))?;
    moving.at_source("stop", json!({}))?;
    thread::sleep(Duration::from_millis(200));
    moving.at_source("cont", json!({}))?;
    moving.at_source("migrate-set-parameters", json!({"max-bandwidth": Pace::default().bandwidth}))?;
    let strangers = knock(&session)?;
    session.calm(&moving.source)?;
    guest = session.moved(moving.finish()?)?;
    drop(strangers);

    // The channel is down for a while, and up again before the end.
    let moving = session.begin(guest, Pace::default())?;
    session.hosts.cut_channel()?;
    thread::sleep(Duration::from_millis(1500));
    session.hosts.mend_channel()?;
    let rounds = session.source().flow(VM)?.map_or(0, |m| m.rounds.len());
    session
        .source()
        .wait(VM, session.since_ms, "further rounds", |m| m.state == "pre-copy" && m.rounds.len() > rounds + 1)?;
    session.calm(&moving.source)?;
    guest = session.moved(moving.finish()?)?;

    // The channel is cut just before the stop: QEMU waits for the hold, and goes on.
    let moving = session.begin(guest, paused())?;
    session.hosts.cut_channel()?;
    session.calm(&moving.source)?;
    let mut moving = moving;
    moving.resume()?;
    let moved = moving.finish()?;
    eprintln!("cut before the stop: downtime {} ms\n{}", moved.downtime_ms, session.explain());
    assert!(moved.downtime_ms < 1000, "QEMU waited for {} ms", moved.downtime_ms);
    let (moved, alive) = session.arrived(moved)?;
    guest = moved;
    // With what the last round brought, and what is in the middle of things is taken up.
    assert_eq!(alive, CONNECTIONS, "cut before the stop: {}", session.explain());
    session.hosts.mend_channel()?;
    session.check_ledgers()?;

    // The guest is reset: what it had is gone, and nothing must wait for it.
    let mut moving = session.begin(guest, Pace::default())?;
    moving.at_source("set-action", json!({"reboot": "reset"}))?;
    moving.at_source("system_reset", json!({}))?;
    let moved = moving.finish()?;
    let guest = moved.guest;
    session.hosts.wait_up(session.at.other())?;
    wait::until("a guest that has booted", PATIENCE, || guest.call(Command::Ping, Duration::from_secs(2)).is_ok())?;
    session.hosts.configure(&guest)?;
    session.at = session.at.other();
    session.check_ledgers()?;
    let new = session.hosts.peer.open_connections(guest_address(1), 10)?;
    assert_eq!(session.hosts.peer.exercise_connections(new)?, 10);
    Ok(())
}

/// The switch that the guest leaves dies while rounds run. Connections may be lost; QEMU's migration and the guest are not.
#[test]
fn the_sources_switch_dies() -> Outcome {
    let (mut session, guest) = Session::new(plan())?;
    let moving = session.begin(guest, Pace::default())?;
    session.hosts.a.ferryd.kill();
    session.calm(&moving.source)?;
    let moved = moving.finish()?;
    // QEMU takes the link down when a switch goes away, and that state migrates with the NIC.
    moved.guest.qmp(0)?.execute("set_link", json!({"name": "nic0", "up": true}))?;
    let (_guest, alive) = session.arrived(moved)?;
    // It has moved: this node was the destination.
    let arrived = session.source().flow(VM)?.context("no migration")?;
    eprintln!("source's switch killed: {alive} of {CONNECTIONS} connections live\n{arrived:?}");
    if arrived.began.as_deref() == Some("partial") {
        assert_eq!(alive, CONNECTIONS, "{arrived:?}");
    }
    session.hosts.b.ferryd.check_ledger()?;
    Ok(())
}

/// The switch that the guest goes to dies while rounds run, and comes back. The guest notices nothing meanwhile. Either its connections
/// are copied anew, or the operator is told that they were not.
#[test]
fn the_destinations_switch_dies() -> Outcome {
    let (mut session, guest) = Session::new(plan())?;
    let moving = session.begin(guest, Pace::default())?;
    session.hosts.b.ferryd.kill();
    session.connections.check_all_alive(&session.hosts, &moving.source)?;
    session.hosts.restart(Side::B)?;
    session.hosts.b.ferryd.wait_state(&["vm1-1"], "connected")?;
    let source = session.source();
    let anew = source.wait(VM, session.since_ms, "copied anew", |m| {
        m.attempt > 1 && m.state == "pre-copy" && !m.rounds.is_empty()
    })?;
    session.calm(&moving.source)?;
    let moved = moving.finish()?;
    let (_guest, alive) = session.arrived(moved)?;
    eprintln!("destination's switch killed: {alive} of {CONNECTIONS} connections live\n{anew:?}");
    assert_eq!(alive, CONNECTIONS, "{anew:?}");
    session.check_ledgers()?;
    Ok(())
}
