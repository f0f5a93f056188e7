//! One guest that is migrated again and again while things go wrong: what must hold after each attempt.
use super::experiment::{Connections, Family};
use super::moving::{Migrated, Move, Pace};
use super::status::{Asker, FlowStatus, now_ms};
use super::{Plan, Side, TwoHosts, VM, guest_address};
use crate::qemu::Guest;
use crate::scratch::Scratch;
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use ferry_guest::protocol::{Command, Reply};
use std::thread;
use std::time::Duration;

/// Bound for what should happen soon.
const SOON: Duration = Duration::from_secs(20);
/// Longest silence of the counter in an attempt that fails: emulated guests on a busy machine, and an attempt to reach the channel.
const LONGEST_SILENCE_MS: u64 = 3000;
/// A table of a million connections has more.
const TABLE_BYTES: u64 = 100_000_000;
/// Connections that are open throughout.
pub const CONNECTIONS: u32 = 200;

/// See the module.
pub struct Session {
    /// The nodes.
    pub hosts: TwoHosts,
    /// Files.
    pub scratch: Scratch,
    /// Where the guest is.
    pub at: Side,
    /// Its connections.
    pub connections: Connections,
    /// When the last attempt began, milliseconds since 1970.
    pub since_ms: u64,
    counter: u64,
    dirt: Option<u64>,
}

impl Session {
    /// Boots a guest on node A and opens its connections.
    ///
    /// # Errors
    /// When anything does not come up.
    pub fn new(plan: Plan) -> Result<(Self, Guest)> {
        let scratch = Scratch::new()?;
        let hosts = TwoHosts::new(&scratch, plan)?;
        let guest = hosts.boot(&scratch)?;
        let connections = Connections::open(&hosts, &guest, CONNECTIONS, Family::V4)?;
        connections.check_all_alive(&hosts, &guest)?;
        let counter = hosts.peer.start_ticks(guest_address(1), Duration::from_millis(10))?;
        Ok((Self { hosts, scratch, at: Side::A, connections, since_ms: 0, counter, dirt: None }, guest))
    }

    /// Begins to move the guest to the other node, under load that keeps the rounds going, and waits until connections have been copied.
    ///
    /// # Errors
    /// When QEMU refuses, or no connections are copied.
    pub fn begin(&mut self, guest: Guest, pace: Pace) -> Result<Move> {
        let mut moving = self.begin_quietly(guest, pace)?;
        moving.wait_rounds(2)?;
        self.source().wait(VM, self.since_ms, "copied", |m| m.state == "pre-copy" && !m.rounds.is_empty())?;
        ensure!(moving.active()?, "the rounds are over");
        Ok(moving)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn begin_quietly(&mut self, guest: Guest, pace: Pace) -> Result<Move> {
        let dirty = Command::DirtyStart { size_mb: 24, mb_per_s: 130 };
        match guest.call(dirty, SOON)? {
            Reply::Handle(handle) => self.dirt = Some(handle),
            other => bail!("unexpected answer {other:?}"),
        }
        self.since_ms = now_ms();
        self.hosts.begin(&self.scratch, guest, self.at.other(), pace)
    }

    /// Ends the load, so that QEMU's rounds end, too.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn calm(&mut self, guest: &Guest) -> Result<()> {
        match self.dirt.take() {
            Some(handle) => guest.call(Command::DirtyStop { handle }, SOON).map(drop),
            None => Ok(()),
        }
    }

    /// Asks the switch that the guest leaves.
    pub fn source(&self) -> Asker {
        Asker::new(self.hosts.host(self.at))
    }

    /// Asks the switch that it goes to.
    pub fn destination(&self) -> Asker {
        Asker::new(self.hosts.host(self.at.other()))
    }

    /// The guest stayed. Checks that it goes on exactly as before: all connections live, the counter never stopped for long, and
    /// nothing is left behind on the other node. Returns what the source's switch says.
    ///
    /// # Errors
    /// When any of that does not hold.
    pub fn stayed(&mut self, guest: &Guest) -> Result<FlowStatus> {
        self.calm(guest)?;
        self.connections.check_all_alive(&self.hosts, guest)?;
        self.check_counter(LONGEST_SILENCE_MS)?;
        let ended = self.source().ended(VM, self.since_ms)?;
        ensure!(matches!(ended.outcome.as_str(), "cancelled" | "failed"), "{ended:?}");
        self.check_empty(self.at.other())?;
        self.check_ledgers()?;
        Ok(ended)
    }

    /// The guest has moved. Checks that the destination has everything, and the source nothing.
    ///
    /// # Errors
    /// When any of that does not hold.
    pub fn moved(&mut self, moved: Migrated) -> Result<Guest> {
        let guest = moved.guest;
        self.hosts.wait_up(self.at.other())?;
        self.calm(&guest)?;
        self.connections.check_all_alive(&self.hosts, &guest).with_context(|| self.explain())?;
        self.check_counter(LONGEST_SILENCE_MS)?;
        let arrived = self.destination().ended(VM, self.since_ms)?;
        ensure!(arrived.began.as_deref() == Some("complete"), "{arrived:?}");
        self.at = self.at.other();
        Ok(guest)
    }

    /// The guest has moved, and nobody promised that its connections do. Checks that it works with new ones; returns how many of the
    /// old ones live.
    ///
    /// # Errors
    /// When any of that does not hold.
    pub fn arrived(&mut self, moved: Migrated) -> Result<(Guest, u32)> {
        let guest = moved.guest;
        self.hosts.wait_up(self.at.other())?;
        self.calm(&guest)?;
        self.at = self.at.other();
        let new = Connections::open(&self.hosts, &guest, 10, Family::V4)?;
        new.check_all_alive(&self.hosts, &guest)?;
        new.close(&self.hosts, &guest)?;
        let alive = self.connections.count_alive(&self.hosts, &guest, Duration::from_secs(2))?;
        Ok((guest, alive))
    }

    /// What both switches say, for messages.
    pub fn explain(&self) -> String {
        format!("source: {:?}\ndestination: {:?}", self.source().flow(VM), self.destination().flow(VM))
    }

    fn check_counter(&self, longest_ms: u64) -> Result<()> {
        let before = self.hosts.peer.ticks(self.counter, false)?;
        thread::sleep(Duration::from_millis(100));
        let after = self.hosts.peer.ticks(self.counter, false)?;
        ensure!(after.error.is_none(), "{after:?}");
        ensure!(after.received > before.received && after.max_gap_ms < longest_ms, "{after:?}");
        Ok(())
    }

    /// This node has no connections of the VM, and no memory for them but its own table's.
    ///
    /// # Errors
    /// When it has.
    pub fn check_empty(&mut self, side: Side) -> Result<()> {
        let mut last = String::new();
        let ferryd = &self.hosts.host(side).ferryd;
        wait::until("no connections left behind", SOON, || match ferryd.json(&["conntrack", "stats", VM]) {
            Ok(stats) => {
                last = stats["stats"].to_string();
                stats["stats"]["connections"] == 0
            }
            Err(e) => {
                last = format!("{e:#}");
                false
            }
        })
        .context(last)
    }

    /// Both switches account for every frame.
    ///
    /// # Errors
    /// When one does not.
    pub fn check_ledgers(&self) -> Result<()> {
        for side in [Side::A, Side::B] {
            self.hosts.host(side).ferryd.check_ledger().with_context(|| format!("{side:?}"))?;
        }
        Ok(())
    }

    /// Memory of a node's switch that may be tables of connections, bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn large_memory(&mut self, side: Side) -> Result<u64> {
        self.hosts.host_mut(side).ferryd.process()?.large_memory(TABLE_BYTES)
    }

    /// Checks that a node's switch has given back the tables that migrations took.
    ///
    /// # Errors
    /// When it has not.
    pub fn check_large_memory(&mut self, side: Side, before: u64) -> Result<()> {
        let mut now = 0;
        wait::until("memory given back", SOON, || {
            now = self.large_memory(side).unwrap_or(u64::MAX);
            now < before + TABLE_BYTES
        })
        .with_context(|| format!("{before} bytes before, {now} now"))
    }
}
