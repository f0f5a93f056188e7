//! A live migration with everything that can go wrong watched: established connections, a running counter, payload that arrives
//! during the rounds, memory that changes, a connection that is revoked meanwhile, and what was never allowed.
use super::moving::{Migrated, Move, Pace};
use super::status::{Asker, FlowStatus, now_ms};
use super::{
    DENIED_PORT, HOLD_PORT, Side, TwoHosts, VM, guest_address, guest_address6, peer_address, peer_address6, policy,
};
use crate::agent::{Agent, Pending, verify};
use crate::qemu::Guest;
use crate::scratch::Scratch;
use anyhow::{Result, bail, ensure};
use ferry_guest::protocol::{Command, Direction, Reply, SECOND_ECHO_PORT, UDP_ECHO_PORT, UdpReport};
use ferry_guest::stream;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

/// Bound for commands that take a while in emulated guests.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bound for a window of connections that are expected to live.
const ALIVE: Duration = Duration::from_secs(15);
/// Bound for connections that are expected to hang: far above a round trip under load, and above the first retransmissions.
const HANGING: Duration = Duration::from_millis(1000);
/// Datagrams that the guest receives during the rounds and leaves unread.
const HELD: u32 = 60;
/// Seed of their content.
const HELD_SEED: u64 = 4242;
/// Length of a paced stream towards the guest that begins before the last rounds and ends after the migration, at 1 MB/s.
const STREAM_BYTES: u64 = 4_000_000;
/// How long the counter is watched after the migration: above the first retransmissions.
const OBSERVED: Duration = Duration::from_secs(2);
/// Seed of the stream's content.
const STREAM_SEED: u64 = 99;

/// Which protocol connections use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// How much of what.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections; four of five opened by the peer, the others by the guest, spread over the NICs.
    pub connections: u32,
    /// Their protocol.
    pub family: Family,
    /// Memory that the guest rewrites, MB.
    pub dirty_mb: u32,
    /// How fast, MB/s: faster than QEMU copies it, so that the rounds go on until the guest stops.
    pub dirty_mb_per_s: u32,
    /// After so many memory rounds the guest stops rewriting memory.
    pub rounds: u32,
    /// How fast QEMU copies memory, and when it stops.
    pub pace: Pace,
    /// Between two ticks of the counter, and two datagrams of the probe.
    pub tick: Duration,
}

impl Load {
    /// Many rounds.
    pub fn full(connections: u32) -> Self {
        Self {
            connections,
            family: Family::V4,
            dirty_mb: 24,
            dirty_mb_per_s: 130,
            rounds: 20,
            pace: Pace::default(),
            tick: Duration::from_millis(5),
        }
    }

    /// A few rounds.
    pub fn short(connections: u32) -> Self {
        Self { rounds: 6, ..Self::full(connections) }
    }
}

/// Connections that stand.
pub struct Connections {
    /// Opened by the peer: handles of its agent.
    from_peer: Vec<u64>,
    /// Opened by the guest: handles of its agent.
    from_guest: Vec<u64>,
    /// How many all told.
    pub count: u32,
}

impl Connections {
    /// Opens connections, four of five from the peer, spread over the guest's NICs.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open(hosts: &TwoHosts, guest: &Agent, count: u32, family: Family) -> Result<Self> {
        let nics = u32::from(hosts.plan.nics);
        let mut all = Self { from_peer: Vec::new(), from_guest: Vec::new(), count };
        for nic in 1..=hosts.plan.nics {
            let share = count / nics + u32::from(u32::from(nic) <= count % nics);
            let out = share / 5;
            let (to_guest, to_peer) = addresses(nic, family);
            if share > out {
                all.from_peer.push(hosts.peer.open_connections(to_guest, share - out)?);
            }
            if out > 0 {
                all.from_guest.push(guest.open_connections(to_peer, out)?);
            }
        }
        Ok(all)
    }

    /// How many echo; `guest` is the guest's agent now. The bound holds for each 256 connections.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn count_alive(&self, hosts: &TwoHosts, guest: &Agent, timeout: Duration) -> Result<u32> {
        let mut alive = 0;
        for handle in &self.from_peer {
            alive += hosts.peer.count_alive(*handle, timeout)?.0;
        }
        for handle in &self.from_guest {
            alive += guest.count_alive(*handle, timeout)?.0;
        }
        Ok(alive)
    }

    /// Checks that all of them echo.
    ///
    /// # Errors
    /// When one does not.
    pub fn check_all_alive(&self, hosts: &TwoHosts, guest: &Agent) -> Result<()> {
        let alive = self.count_alive(hosts, guest, ALIVE)?;
        ensure!(alive == self.count, "{alive} of {} connections are alive", self.count);
        Ok(())
    }

    /// Checks that none of them echoes.
    ///
    /// # Errors
    /// When one does.
    pub fn check_all_hang(&self, hosts: &TwoHosts, guest: &Agent) -> Result<()> {
        let alive = self.count_alive(hosts, guest, HANGING)?;
        ensure!(alive == 0, "{alive} of {} connections are alive", self.count);
        Ok(())
    }

    /// Closes them.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn close(self, hosts: &TwoHosts, guest: &Agent) -> Result<()> {
        self.from_peer.into_iter().try_for_each(|handle| hosts.peer.close_connections(handle))?;
        self.from_guest.into_iter().try_for_each(|handle| guest.close_connections(handle))
    }
}

/// Guest's and peer's address.
fn addresses(nic: u8, family: Family) -> (IpAddr, IpAddr) {
    match family {
        Family::V4 => (guest_address(nic), peer_address(nic)),
        Family::V6 => (guest_address6(nic), peer_address6(nic)),
    }
}

/// One round of the transfer of connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Its number, from 0.
    pub round: u32,
    /// Records sent.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Rounds of the transfer of connections, the final delta last. None without flow migration.
    pub rounds: Vec<Round>,
    /// From the VM's stop to the destination's acknowledgement, milliseconds.
    pub final_delta_ms: Option<f64>,
    /// How long QEMU waited for the switch, milliseconds.
    pub hold_ms: Option<f64>,
    /// QEMU's own figure.
    pub qemu_downtime_ms: u64,
    /// Longest silence of the counter seen by the peer; when the connection hangs: until the end of the observation.
    pub peer_gap_ms: u64,
    /// Connections that worked before.
    pub connections_before: u32,
    /// Connections that worked afterwards.
    pub connections_after: u32,
    /// What the table does not show.
    #[serde(skip)]
    pub more: Details,
}

/// What else is of interest.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// Memory rounds that QEMU made.
    pub memory_rounds: u64,
    /// Longest silence of datagrams echoed by the guest, milliseconds: that of the migration itself, whatever becomes of connections.
    pub probe_gap_ms: u64,
    /// Those connections that were used while the rounds ran all worked; without flow migration they may have been caught by its end.
    pub used_alive: bool,
    /// The counter still runs.
    pub counter_runs: bool,
    /// The stream arrived as it was sent; false: it hung.
    pub stream_intact: bool,
    /// What the source's switch says.
    pub source: FlowStatus,
    /// What the destination's switch says.
    pub destination: FlowStatus,
}

/// What an observer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All connections stand and work; load begins.
    Established,
    /// QEMU was told to migrate.
    Begun,
    /// A rule was taken away during the rounds, and the connection that it allowed is cut.
    Revoked,
    /// Payload was written during the rounds.
    Written,
    /// The guest runs on the destination.
    Arrived,
}

/// A guest, where it is, and its connections.
pub struct Subject {
    /// The guest.
    pub guest: Guest,
    /// Where it runs.
    pub at: Side,
    /// Its connections.
    pub connections: Connections,
}

impl Subject {
    /// Boots the guest on node A and opens its connections.
    ///
    /// # Errors
    /// When it does not boot, or a connection cannot be opened.
    pub fn boot(hosts: &TwoHosts, scratch: &Scratch, load: &Load) -> Result<Self> {
        let guest = hosts.boot(scratch)?;
        let connections =
            Connections::open(hosts, &guest, load.connections, load.family).map_err(|e| guest.explain(e))?;
        Ok(Self { guest, at: Side::A, connections })
    }
}

/// Moves the guest to the other node under load and measures. Returns it with what was measured.
///
/// # Errors
/// When QEMU's migration fails, when payload written during the rounds did not arrive intact, when what was denied or revoked
/// got through, or when a ledger does not balance. That connections hang is no error: it is measured.
pub fn run(
    hosts: &mut TwoHosts,
    scratch: &Scratch,
    subject: Subject,
    load: &Load,
    observe: &mut dyn FnMut(Step),
) -> Result<(Subject, Report)> {
    let Subject { guest, at, connections } = subject;
    let (address, _) = addresses(1, load.family);
    let lives = hosts.plan.flow_migration;
    let bound = if lives { ALIVE } else { HANGING };
    let connections_before = connections.count_alive(hosts, &guest, ALIVE)?;
    let revocable = hosts.peer.open_connections_to(SocketAddr::new(address, SECOND_ECHO_PORT), 1)?;
    ensure!(hosts.peer.exercise_connections(revocable)? == 1, "the revocable connection does not work");
    check_denied(hosts, address)?;
    observe(Step::Established);

    guest.call(Command::UdpHold { port: HOLD_PORT }, PATIENCE)?;
    let ticks = hosts.peer.start_ticks(address, load.tick)?;
    let probe = Probe::begin(hosts, load.family, load.tick)?;
    let dirt =
        handle(guest.call(Command::DirtyStart { size_mb: load.dirty_mb, mb_per_s: load.dirty_mb_per_s }, PATIENCE)?)?;
    let since_ms = now_ms();
    let mut moving = hosts.begin(scratch, guest, at.other(), load.pace)?;
    observe(Step::Begun);

    // The first round copies all memory; what arrives after it must be copied again.
    moving.wait_rounds(2)?;
    let held = write_payload(hosts, address)?;
    observe(Step::Written);
    // Connections are used, so that there are changes to send. Not before: bursts may overrun the guest's ring, and that costs datagrams.
    let used = connections.from_peer.first().map(|h| hosts.peer.start_counting_alive(*h, bound)).transpose()?;
    // Both hosts' rules change, as when a controller takes a rule from a group; the connection has been copied by now.
    hosts.change_policy(at, &policy(false))?;
    check_hangs(hosts, revocable)?;
    hosts.change_policy(at.other(), &policy(false))?;
    observe(Step::Revoked);
    ensure!(moving.active()?, "the rounds were over too early");
    wait_rounds(&mut moving, load.rounds)?;
    let stream = hosts.peer.start_transfer(address, Direction::Send, STREAM_SEED, STREAM_BYTES, 1)?;
    moving.source.call(Command::DirtyStop { handle: dirt }, PATIENCE)?;
    let Migrated { mut guest, downtime_ms, rounds, .. } = moving.finish()?;
    observe(Step::Arrived);
    let arrived = at.other();
    hosts.wait_up(arrived).map_err(|e| guest.explain(e))?;

    check_held(&mut guest, held)?;
    let before = hosts.peer.ticks(ticks, false)?;
    thread::sleep(OBSERVED);
    let after = hosts.peer.ticks(ticks, true)?;
    let probe_gap_ms = probe.end(hosts)?.max_gap_us / 1000;
    let used_alive = used.map(Pending::wait_alive).transpose()?.is_none_or(|(_, failed)| failed == 0);
    let connections_after = connections.count_alive(hosts, &guest, bound)?;
    check_hangs(hosts, revocable)?;
    hosts.peer.close_connections(revocable)?;
    check_denied(hosts, address)?;
    let stream_intact = match stream.wait_transfer(if lives { PATIENCE } else { HANGING }) {
        Ok(report) => verify(&report, STREAM_BYTES, &stream::digest(STREAM_SEED, STREAM_BYTES)).map(|()| true)?,
        Err(_) => false,
    };
    for side in [at, arrived] {
        hosts.host(side).ferryd.check_ledger()?;
    }
    // The next migration finds the same policy.
    hosts.change_policy(at, &policy(true))?;
    hosts.change_policy(arrived, &policy(true))?;

    let (source, destination) = if lives {
        (Asker::new(hosts.host(at)).ended(VM, since_ms)?, Asker::new(hosts.host(arrived)).ended(VM, since_ms)?)
    } else {
        Default::default()
    };
    let report = Report {
        rounds: source.rounds.iter().map(|r| Round { round: r.round, entries: r.entries, bytes: r.bytes }).collect(),
        final_delta_ms: source.final_delta_ms,
        hold_ms: source.hold_ms,
        qemu_downtime_ms: downtime_ms,
        peer_gap_ms: after.max_gap_ms.max(after.silent_ms),
        connections_before,
        connections_after,
        more: Details {
            memory_rounds: rounds,
            used_alive,
            probe_gap_ms,
            counter_runs: after.error.is_none() && after.received > before.received,
            stream_intact,
            source,
            destination,
        },
    };
    Ok((Subject { guest, at: arrived, connections }, report))
}

/// Datagrams that the guest echoes to the peer. The policy lets them in at any time, so they show the gap of a migration itself.
pub struct Probe(u64);

impl Probe {
    /// Begins.
    ///
    /// # Errors
    /// When the peer's agent does not answer.
    pub fn begin(hosts: &TwoHosts, family: Family, interval: Duration) -> Result<Self> {
        let to = SocketAddr::new(addresses(1, family).0, UDP_ECHO_PORT);
        let interval_us = interval.as_micros() as u64;
        handle(hosts.peer.call(Command::UdpProbeBegin { to, payload_bytes: 64, interval_us }, PATIENCE)?).map(Self)
    }

    /// Ends, and tells what was seen.
    ///
    /// # Errors
    /// When the peer's agent does not answer.
    pub fn end(self, hosts: &TwoHosts) -> Result<UdpReport> {
        udp(hosts.peer.call(Command::UdpProbeEnd { handle: self.0 }, PATIENCE)?)
    }
}

/// Nothing gets in where no rule allows it.
fn check_denied(hosts: &TwoHosts, address: IpAddr) -> Result<()> {
    let to = SocketAddr::new(address, DENIED_PORT);
    let probe = Command::UdpProbe { to, count: 3, payload_bytes: 64, interval_us: 1000, linger_ms: 200 };
    let report = udp(hosts.peer.call(probe, PATIENCE)?)?;
    // An answer would be an echo, or the guest's "port unreachable", for which sending fails.
    ensure!((report.sent, report.received) == (3, 0), "what no rule allows got through: {report:?}");
    Ok(())
}

/// The connection behind this handle of the peer's is dead, without anybody being told.
fn check_hangs(hosts: &TwoHosts, handle: u64) -> Result<()> {
    let alive = hosts.peer.count_alive(handle, HANGING)?.0;
    ensure!(alive == 0, "the revoked connection is alive");
    Ok(())
}

/// Sends what must be intact at the destination; returns how much.
fn write_payload(hosts: &TwoHosts, address: IpAddr) -> Result<u64> {
    let to = SocketAddr::new(address, HOLD_PORT);
    let send = Command::UdpSend { to, count: HELD, payload_bytes: 1000, interval_us: 5000, seed: HELD_SEED };
    Ok(udp(hosts.peer.call(send, PATIENCE)?)?.sent)
}

fn check_held(guest: &mut Guest, sent: u64) -> Result<()> {
    let drained = udp(guest.call(Command::UdpDrain { port: HOLD_PORT, seed: HELD_SEED }, PATIENCE)?)?;
    ensure!(
        (drained.received, drained.corrupted) == (sent, 0),
        "written during the rounds: {sent}, arrived: {drained:?}"
    );
    Ok(())
}

/// Waits until QEMU has made `count` rounds, or has enough.
fn wait_rounds(moving: &mut Move, count: u32) -> Result<()> {
    crate::wait::until("memory rounds", PATIENCE, || match moving.query() {
        Ok(s) => s["status"] != "active" || s["ram"]["dirty-sync-count"].as_u64() >= Some(u64::from(count)),
        Err(_) => true,
    })
}

fn udp(reply: Reply) -> Result<UdpReport> {
    match reply {
        Reply::Udp(r) => Ok(r),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn handle(reply: Reply) -> Result<u64> {
    match reply {
        Reply::Handle(h) => Ok(h),
        other => bail!("unexpected answer {other:?}"),
    }
}
