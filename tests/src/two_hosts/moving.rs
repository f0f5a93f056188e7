//! QEMU's live migration, step by step, so that tests can interfere at each of them.
use crate::qemu::Guest;
use crate::qmp::Qmp;
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// Time for what QEMU does.
const PATIENCE: Duration = Duration::from_secs(60);

/// How QEMU is told to migrate.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Memory's bandwidth, bytes per second.
    pub bandwidth: u64,
    /// Longest expected downtime at which QEMU stops the guest, milliseconds.
    pub downtime_limit_ms: u64,
    /// Pause before the switch-over, as libvirt has it: the guest is stopped, and the destination does not run yet.
    pub pause: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bandwidth: 100_000_000, downtime_limit_ms: 20, pause: false }
    }
}

impl Pace {
    /// So slow that the rounds last until something else happens.
    pub fn endless() -> Self {
        Self { bandwidth: 20_000_000, downtime_limit_ms: 1, pause: false }
    }
}

/// A migration under way.
pub struct Move {
    /// QEMU on the node that the guest leaves.
    pub source: Guest,
    /// QEMU on the node it goes to.
    pub destination: Guest,
    from: Qmp,
    to: Qmp,
}

/// A guest that has moved.
pub struct Migrated {
    /// The guest where it is now.
    pub guest: Guest,
    /// QEMU's own figure, milliseconds.
    pub downtime_ms: u64,
    /// From the stop of the source's processors to the start of the destination's, by the time of QEMU's events.
    pub stopped: Duration,
    /// Memory rounds that QEMU made.
    pub rounds: u64,
}

impl Move {
    /// Tells both QEMUs to migrate over a Unix socket; the destination was launched with `incoming`.
    ///
    /// # Errors
    /// When one of them refuses.
    pub fn begin(source: Guest, destination: Guest, socket: &Path, pace: Pace) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let uri = format!("unix:{}", socket.display());
        let capabilities = json!({"capabilities": [
            {"capability": "events", "state": true},
            {"capability": "pause-before-switchover", "state": pace.pause},
        ]});
        let mut to = destination.qmp(0)?;
        to.execute("migrate-set-capabilities", capabilities.clone())?;
        to.execute("migrate-incoming", json!({"uri": uri}))?;
        let mut from = source.qmp(0)?;
        from.execute("migrate-set-capabilities", capabilities)?;
        let parameters = json!({"max-bandwidth": pace.bandwidth, "downtime-limit": pace.downtime_limit_ms});
        from.execute("migrate-set-parameters", parameters)?;
        from.execute("migrate", json!({"uri": uri}))?;
        Ok(Self { source, destination, from, to })
    }

    /// Waits until so many further memory rounds have begun.
    ///
    /// # Errors
    /// When they do not.
    pub fn wait_rounds(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            self.from.wait_event("MIGRATION_PASS", PATIENCE)?;
        }
        Ok(())
    }

    /// What QEMU says of the migration.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn query(&mut self) -> Result<Value> {
        self.from.execute("query-migrate", json!({}))
    }

    /// Whether rounds are still running.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn active(&mut self) -> Result<bool> {
        Ok(matches!(self.query()?["status"].as_str(), Some("active" | "setup")))
    }

    /// Waits for a status of the migration.
    ///
    /// # Errors
    /// When it does not come, or the migration ends with another one.
    pub fn wait_status(&mut self, wanted: &str) -> Result<()> {
        let last = wait::for_some(&format!("status {wanted}"), PATIENCE, || match self.query() {
            Ok(s) if s["status"] == wanted => Some(Ok(s)),
            Ok(s) if matches!(s["status"].as_str(), Some("completed" | "failed" | "cancelled")) => Some(Ok(s)),
            Ok(_) => None,
            Err(e) => Some(Err(e)),
        })??;
        ensure!(last["status"] == wanted, "waited for {wanted}: {last}");
        Ok(())
    }

    /// Executes a command at the source's monitor.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn at_source(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.from.execute(command, arguments)
    }

    /// Goes on after the pause before the switch-over.
    ///
    /// # Errors
    /// When QEMU refuses, or does not go on.
    pub fn resume(&mut self) -> Result<()> {
        self.wait_status("pre-switchover")?;
        self.from.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
        // The command has been answered before the migration's thread wakes up.
        wait::until("the end of the pause", PATIENCE, || self.query().is_ok_and(|s| s["status"] != "pre-switchover"))
    }

    /// Lets QEMU end the migration now: any downtime will do.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn hurry(&mut self) -> Result<()> {
        let parameters = json!({"max-bandwidth": 2_000_000_000u64, "downtime-limit": 2000});
        self.from.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Cancels, and ends the destination's QEMU. The guest goes on where it was.
    ///
    /// # Errors
    /// When it does not.
    pub fn cancel(mut self) -> Result<Guest> {
        self.from.execute("migrate_cancel", json!({}))?;
        self.wait_status("cancelled")?;
        self.back()
    }

    /// Kills the destination's QEMU. The guest goes on where it was.
    ///
    /// # Errors
    /// When it does not.
    pub fn kill_destination(mut self) -> Result<Guest> {
        self.destination.kill();
        if self.query()?["status"] == "pre-switchover" {
            // It notices when it writes again.
            self.from.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
        }
        self.wait_status("failed")?;
        self.back()
    }

    fn back(mut self) -> Result<Guest> {
        self.destination.kill();
        running(&mut self.from)?;
        Ok(self.source)
    }

    /// QEMU's own figure for the downtime. The status changes a moment before the figure is known: until then it is 0.
    fn downtime_ms(&mut self) -> Result<u64> {
        let known = wait::for_some("downtime", Duration::from_secs(2), || {
            self.query().ok().and_then(|s| s["downtime"].as_u64()).filter(|ms| *ms > 0)
        });
        // It may be less than a millisecond after all.
        known.or_else(|_| self.query()?["downtime"].as_u64().context("QEMU tells no downtime"))
    }

    /// Waits until the guest runs on the destination.
    ///
    /// # Errors
    /// When the migration fails.
    pub fn finish(mut self) -> Result<Migrated> {
        let end = wait::for_some("end of the migration", PATIENCE, || match self.query() {
            Ok(s) if matches!(s["status"].as_str(), Some("active" | "device" | "setup")) => None,
            other => Some(other),
        })??;
        if end["status"] != "completed" {
            bail!("QEMU's migration ended so: {end}");
        }
        let downtime_ms = self.downtime_ms()?;
        let rounds = end["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let stopped_at = self.from.event_time("STOP")?;
        self.destination.adopt_agent(&mut self.source)?;
        drop(self.source);
        running(&mut self.to)?;
        let stopped = self.to.event_time("RESUME")?.saturating_sub(stopped_at);
        Ok(Migrated { guest: self.destination, downtime_ms, stopped, rounds })
    }
}

fn running(monitor: &mut Qmp) -> Result<()> {
    wait::until("running guest", PATIENCE, || {
        monitor.execute("query-status", json!({})).is_ok_and(|s| s["status"] == "running")
    })
}
