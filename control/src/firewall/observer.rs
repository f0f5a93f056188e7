//! Takes what the switch reports of single connections, for the history and the flow log.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::flow_log::{FlowLog, FlowLogCounters};
use super::history::{DropLine, History};
use super::record::FirewallRecord;
use crate::config::{Config, FlowLogConfig};
use crate::core::WeakCore;

/// How often reports are fetched.
const INTERVAL: Duration = Duration::from_millis(100);
/// How often it is looked whether connection tables need memory: what is ready lasts for that long at a million new connections a second.
const LOOK: Duration = Duration::from_millis(33);
/// The same while one of them grows fast, or did a moment ago.
const LOOK_AT_GROWTH: Duration = Duration::from_millis(1);
/// Such moments.
const GROWTH: Duration = Duration::from_millis(200);

/// History and flow log, shared by the thread that feeds them and the API.
#[derive(Clone)]
pub struct Observer(Arc<Mutex<Inner>>);

struct Inner {
    history: History,
    flow_log: FlowLog,
    lost: u64,
}

impl Default for Observer {
    fn default() -> Self {
        Self::new()
    }
}

impl Observer {
    /// Nothing seen yet; the flow log is off.
    pub fn new() -> Self {
        let inner = Inner { history: History::new(), flow_log: FlowLog::new(Instant::now()), lost: 0 };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What it holds is consistent between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what the flow log holds and where it goes.
    ///
    /// # Errors
    /// Its file cannot be opened; the former settings stay.
    pub fn configure(&self, config: &FlowLogConfig) -> Result<(), String> {
        self.lock().flow_log.configure(config)
    }

    /// Opens the flow log's file again.
    ///
    /// # Errors
    /// It cannot be opened; the one before stays in use.
    pub fn reopen(&self) -> Result<(), String> {
        self.lock().flow_log.reopen()
    }

    /// Learns which VMs there are, and which of them take no part in the flow log.
    pub fn set_vms(&self, config: &Config) {
        let vms = config.vms();
        let mut inner = self.lock();
        inner.history.retain(|name| vms.contains_key(name));
        inner.flow_log.set_silent(vms.values().filter(|v| !v.flow_log).map(|v| v.name.clone()).collect());
    }

    /// Takes reports, and how many were lost before.
    pub fn take(&self, records: &[FirewallRecord], lost: u64) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.lost += lost;
        inner.flow_log.note_lost(lost);
        for record in records {
            inner.history.note(record);
            inner.flow_log.write(record, now);
        }
    }

    /// What was denied lately, in one VM or all; the latest first.
    pub fn drops(&self, vm: Option<&str>) -> Vec<DropLine> {
        self.lock().history.lines(vm)
    }

    /// Reports that were lost because they came faster than they were fetched.
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    /// What the flow log has done.
    pub fn flow_log(&self) -> FlowLogCounters {
        self.lock().flow_log.counters()
    }
}

/// Feeds the observer of `core`, and keeps connection tables' memory ready, until the core is gone.
pub fn run(core: &WeakCore) {
    let mut records = Vec::new();
    let jobs = core.upgrade().map(|core| {
        let core = core.lock();
        (core.engine().housekeeper(), core.engine().provider())
    });
    let Some((housekeeper, provider)) = jobs else { return };
    let mut grew: Option<Instant> = None;
    loop {
        let Some(shared) = core.upgrade() else { return };
        records.clear();
        let (observer, lost) = {
            let mut core = shared.lock();
            let lost = core.engine_mut().take_firewall_events(&mut records);
            (core.observer().clone(), lost)
        };
        drop(shared);
        if !records.is_empty() || lost > 0 {
            observer.take(&records, lost);
        }
        housekeeper();
        let next = Instant::now() + INTERVAL;
        loop {
            if provider() {
                grew = Some(Instant::now());
            }
            let grows = grew.is_some_and(|at| at.elapsed() < GROWTH);
            let pause = if grows { LOOK_AT_GROWTH } else { LOOK };
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(pause.min(left));
        }
    }
}
