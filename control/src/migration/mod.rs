//! Drives the migration of VMs' connections: connects the machines of `ferry-migrate` with the ports' signals, the switch, the channel,
//! the audit log, and operators.
//!
//! | module | job |
//! |---|---|
//! | `guest` | what a VM's ports say; holds QEMU where the protocol wants it |
//! | `actor` | a VM's task, which owns both of its machines |
//! | `source_side`, `destination_side` | carry out what the machines decide |
//! | `link`, `dial`, `intake` | the channel, from both ends; pre-flight checks |
//! | `judge` | may a VM come here? |
//! | `diverts` | frames for a VM between two hosts |
//! | `monitor` | QEMU's own monitor, where one is configured |
//! | `record`, `view` | what is told of a migration |
//! | `auditor` | the audit log |
//! | `settings`, `switch` | the configuration and the switch, as the others see them |
mod actor;
mod auditor;
mod check;
mod destination_side;
mod dial;
mod diverts;
mod guest;
mod intake;
mod judge;
mod link;
mod monitor;
mod record;
mod services;
mod settings;
mod source_side;
pub mod switch;
pub mod view;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use ferry_migrate::audit::Event;
use ferry_migrate::authz::AuthzError;
use ferry_migrate::channel::Dialer;
use ferry_migrate::message::Offer;
use ferry_vhost::signals::PortEvent;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::mpsc::{channel, unbounded_channel};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::actor::{Input, Inputs, Place};
use self::auditor::unix_ms;
use self::dial::DialError;
use self::guest::Guest;
use self::services::Services;
use self::settings::Settings;
use self::switch::VmSwitch;
use self::view::{ExpectedView, HostView, MigrationView, MigrationsView};
use crate::config::{Config, MigrationConfig};
use crate::engine::EngineError;

pub use self::check::CheckError;

/// Migrations kept in the history.
const HISTORY: usize = 1000;
/// Longest that a VM is expected, seconds.
pub const MAX_EXPECT_S: u64 = 7 * 24 * 3600;
/// Signals of a VM's ports that wait for its task.
const SIGNALS: usize = 256;
/// How long migrations that are under way get to end in order.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Most VMs expected at a time.
const MAX_EXPECTED: usize = 4096;

/// A counter for metrics.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Sums over all migrations since the start.
#[derive(Debug, Default)]
pub struct Totals {
    /// Rounds that this host sent.
    pub rounds: Count,
    /// Bytes of records sent.
    pub sent_bytes: Count,
    /// Bytes of records received.
    pub received_bytes: Count,
    /// Late frames redirected or delivered.
    pub late_frames: Count,
    /// Times that the final delta was not acknowledged within the limit.
    pub holds_exceeded: Count,
    /// Migrations that ended, by role and outcome.
    pub ended: Mutex<BTreeMap<(String, String), u64>>,
    /// Holds of migrations away that had one: sum in microseconds, and number.
    pub hold_us: (Count, Count),
    /// Final deltas: sum in microseconds, and number.
    pub final_delta_us: (Count, Count),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all VMs share.
pub struct Hub {
    switch: OnceLock<Arc<dyn VmSwitch>>,
    settings: RwLock<Arc<Settings>>,
    guests: RwLock<Guests>,
    /// Threads for migrations alone, so that no request to the API is in their way; none until migration is switched on.
    runtime: Mutex<Option<Runtime>>,
    services: Mutex<Option<Services>>,
    expected: Mutex<BTreeMap<String, ExpectedView>>,
    latest: Mutex<BTreeMap<String, MigrationView>>,
    history: Mutex<VecDeque<MigrationView>>,
    totals: Totals,
    /// The configuration is in effect, ports included: a VM may be offered.
    ready: watch::Sender<bool>,
}

#[derive(Default)]
struct Guests {
    by_vm: BTreeMap<String, Arc<Guest>>,
    by_port: HashMap<String, Arc<Guest>>,
    tasks: Vec<JoinHandle<()>>,
}

/// Migrations of this host's VMs. A clone is another handle.
#[derive(Clone)]
pub struct Migration(Arc<Hub>);

impl std::fmt::Debug for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Migration").field(&self.host()).finish()
    }
}

impl Default for Migration {
    fn default() -> Self {
        Self::new()
    }
}

impl Migration {
    /// Nothing migrates until it is configured.
    pub fn new() -> Self {
        Self(Arc::new(Hub {
            switch: OnceLock::new(),
            settings: RwLock::default(),
            guests: RwLock::default(),
            runtime: Mutex::default(),
            services: Mutex::default(),
            expected: Mutex::default(),
            latest: Mutex::default(),
            history: Mutex::default(),
            totals: Totals::default(),
            ready: watch::Sender::new(false),
        }))
    }

    /// Gives it the switch; once.
    pub fn attach(&self, switch: Arc<dyn VmSwitch>) {
        // A second one would be a daemon's mistake, and changes nothing.
        let _ = self.0.switch.set(switch);
    }

    /// Takes `[migration]`: loads credentials, opens the audit log, listens. On failure everything is as before.
    ///
    /// # Errors
    /// What cannot be used, and what to do about it.
    pub fn configure(&self, config: &MigrationConfig) -> Result<(), EngineError> {
        let hub = &self.0;
        if !config.enabled {
            self.shut_down();
            return Ok(());
        }
        let mut runtime = lock(&hub.runtime);
        if runtime.is_none() {
            let made = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(16)
                .thread_name("ferry-migrate")
                .enable_all()
                .build();
            *runtime = Some(made.map_err(|e| EngineError::new(format!("no threads for migrations: {e}"), ""))?);
        }
        let Some(runtime) = runtime.as_ref() else { return Ok(()) };
        let mut services = lock(&hub.services);
        match services.as_mut() {
            Some(services) => services.reconfigure(config, runtime.handle(), hub)?,
            None => *services = Some(Services::start(config, runtime.handle(), hub)?),
        }
        hub.update_guests(runtime.handle());
        Ok(())
    }

    /// Takes the rest of the configuration: VMs, their ports, rules. To be called before ports are opened and after a change.
    ///
    /// # Errors
    /// A rule that cannot be used; then everything is as before.
    pub fn set_config(&self, config: &Config) -> Result<(), AuthzError> {
        let settings = Settings::new(config)?;
        *self.0.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        if let Some(runtime) = lock(&self.0.runtime).as_ref() {
            self.0.update_guests(runtime.handle());
        }
        Ok(())
    }

    /// The configuration is in effect: from now on hosts that wait are heard.
    pub fn ready(&self) {
        self.0.ready.send_replace(true);
    }

    /// Loads certificates again.
    ///
    /// # Errors
    /// They cannot be used; the former ones stay.
    pub fn reload_credentials(&self) -> Result<(), EngineError> {
        let config = self.0.settings().config.clone();
        match lock(&self.0.services).as_mut() {
            Some(services) => services.reload_credentials(&config),
            None => Ok(()),
        }
    }

    /// What a port reports: called on its session thread, which waits here where the protocol wants it; bounded.
    pub fn observe(&self, port: &Arc<str>, event: &PortEvent) {
        let guests = self.0.guests.read().unwrap_or_else(PoisonError::into_inner);
        let guest = guests.by_port.get(&**port).cloned();
        drop(guests);
        if let Some(guest) = guest {
            guest.observe(port, event);
        }
    }

    /// A migration of the VM's connections is under way.
    pub fn is_migrating(&self, vm: &str) -> bool {
        lock(&self.0.latest).get(vm).is_some_and(|view| view.ended_at_ms.is_none())
    }

    /// The latest migrations, and who is expected.
    pub fn status(&self) -> MigrationsView {
        self.0.forget_expected();
        MigrationsView {
            migrations: lock(&self.0.latest).values().cloned().collect(),
            expected: lock(&self.0.expected).values().cloned().collect(),
        }
    }

    /// The latest migration of a VM.
    pub fn latest(&self, vm: &str) -> Option<MigrationView> {
        lock(&self.0.latest).get(vm).cloned()
    }

    /// Migrations that have ended, oldest first; at most `limit`, the newest, of one VM or all.
    pub fn history(&self, vm: Option<&str>, limit: usize) -> Vec<MigrationView> {
        let history = lock(&self.0.history);
        let chosen = history.iter().rev().filter(|view| vm.is_none_or(|vm| view.vm == vm)).take(limit);
        let mut out: Vec<_> = chosen.cloned().collect();
        out.reverse();
        out
    }

    /// Announces that a VM is to come. `None`: no such VM, or too many.
    pub fn expect(&self, vm: &str, from: Option<String>, for_s: u64) -> Option<ExpectedView> {
        if !self.0.settings().vms.contains_key(vm) {
            return None;
        }
        self.0.forget_expected();
        let mut expected = lock(&self.0.expected);
        if expected.len() >= MAX_EXPECTED && !expected.contains_key(vm) {
            return None;
        }
        let until_ms = unix_ms() + for_s.min(MAX_EXPECT_S) * 1000;
        let view = ExpectedView { vm: vm.to_owned(), from: from.map(|f| f.to_lowercase()), until_ms };
        expected.insert(vm.to_owned(), view.clone());
        Some(view)
    }

    /// Takes that back. False: it was not announced.
    pub fn unexpect(&self, vm: &str) -> bool {
        lock(&self.0.expected).remove(vm).is_some()
    }

    /// Gives the migration of a VM's connections up; QEMU's own goes on. False: there is no such VM.
    pub fn cancel(&self, vm: &str) -> bool {
        self.0.guest(vm).map(|guest| guest.send(Input::Cancel)).is_some()
    }

    /// This host's part in migrations.
    pub fn host(&self) -> HostView {
        let settings = self.0.settings();
        let config = &settings.config;
        let mut view = HostView {
            enabled: config.enabled,
            host: settings.host.to_string(),
            peers: config.peer.iter().map(|p| (p.host.clone(), p.address.to_string())).collect(),
            ..HostView::default()
        };
        if let Some(services) = lock(&self.0.services).as_ref() {
            services.describe(&mut view);
        }
        view
    }

    /// Sums for metrics.
    pub fn totals(&self) -> &Totals {
        &self.0.totals
    }

    /// Ends everything: ferryd stops, or migration is switched off. Whatever was under way is given up in order.
    pub fn shut_down(&self) {
        let runtime = lock(&self.0.runtime).take();
        let tasks = self.0.end_guests();
        if let Some(runtime) = runtime {
            let all = async {
                for task in tasks {
                    // One that panicked has ended, too.
                    let _ = task.await;
                }
            };
            if runtime.block_on(async { tokio::time::timeout(END_LIMIT, all).await }).is_err() {
                tracing::warn!("some migrations did not end in time");
            }
            lock(&self.0.services).take();
            runtime.shutdown_background();
        }
    }
}

impl Hub {
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn switch(&self) -> Option<&Arc<dyn VmSwitch>> {
        self.switch.get()
    }

    fn guest(&self, vm: &str) -> Option<Arc<Guest>> {
        self.guests.read().unwrap_or_else(PoisonError::into_inner).by_vm.get(vm).cloned()
    }

    /// One task per VM, while migration is switched on.
    fn update_guests(self: &Arc<Self>, runtime: &Handle) {
        let settings = self.settings();
        let (Some(switch), true) = (self.switch(), settings.config.enabled) else { return };
        let mut guests = self.guests.write().unwrap_or_else(PoisonError::into_inner);
        guests.by_vm.retain(|vm, guest| {
            let stays = settings.vms.contains_key(vm);
            if !stays {
                guest.send(Input::End);
            }
            stays
        });
        guests.tasks.retain(|task| !task.is_finished());
        let Guests { by_vm, tasks, .. } = &mut *guests;
        for vm in settings.vms.keys() {
            let guest = by_vm.entry(vm.clone()).or_insert_with(|| {
                let (signals, from_ports) = channel(SIGNALS);
                let (sender, others) = unbounded_channel();
                let guest = Arc::new(Guest::new(signals, sender));
                let inputs = Inputs { signals: from_ports, others };
                tasks.push(runtime.spawn(actor::run(
                    Arc::clone(self),
                    Arc::clone(switch),
                    vm.clone(),
                    Arc::clone(&guest),
                    inputs,
                )));
                guest
            });
            guest.hold_limit_ms.store(u64::from(settings.config.hold_limit_ms), Relaxed);
        }
        guests.by_port = settings
            .vms
            .iter()
            .flat_map(|(vm, s)| s.ports.keys().map(move |port| (vm, port)))
            .filter_map(|(vm, port)| Some((port.clone(), Arc::clone(guests.by_vm.get(vm)?))))
            .collect();
    }

    fn end_guests(&self) -> Vec<JoinHandle<()>> {
        let guests = std::mem::take(&mut *self.guests.write().unwrap_or_else(PoisonError::into_inner));
        guests.by_vm.values().for_each(|guest| guest.send(Input::End));
        guests.tasks
    }

    fn dialer(&self) -> Result<Dialer, DialError> {
        match lock(&self.services).as_ref() {
            Some(services) => Ok(services.dialer()),
            None => Err(DialError::Off("migration is not switched on".into())),
        }
    }

    /// Has a channel set up for a VM's connections; its task is told.
    fn dial(self: &Arc<Self>, place: &Place<'_>, dial: u64, offer: Offer) {
        let (hub, vm, guest) = (Arc::clone(self), place.vm.to_owned(), Arc::clone(place.guest));
        place.runtime.spawn(async move {
            let result = dial::find_and_dial(hub, vm, offer).await;
            guest.send(Input::Dialled(dial, Box::new(result)));
        });
    }

    /// Writes that a migration is to begin.
    fn begin(&self, event: Event) -> Result<(), String> {
        // The lock is not kept while the disk is waited for.
        let auditor = self.auditor().ok_or("migration is not switched on")?;
        auditor.begin(&event).map_err(|e| e.to_string())
    }

    fn auditor(&self) -> Option<Arc<auditor::Auditor>> {
        lock(&self.services).as_ref().map(Services::auditor)
    }

    fn note(&self, event: Event) {
        if let Some(auditor) = self.auditor() {
            auditor.note(event);
        }
    }

    fn note_refusal(&self, event: Event) {
        if let Some(auditor) = self.auditor() {
            auditor.note_refusal(event);
        }
    }

    /// Why migrations may not begin.
    fn audit_problem(&self) -> Option<String> {
        let refuse = self.settings().config.audit_on_failure == crate::config::AuditOnFailure::Refuse;
        let auditor = self.auditor()?;
        auditor.status().failing.filter(|_| refuse)
    }

    fn is_expected(&self, vm: &str, peer: &str) -> bool {
        self.forget_expected();
        let expected = lock(&self.expected);
        expected.get(vm).is_some_and(|e| e.from.as_deref().is_none_or(|from| from.eq_ignore_ascii_case(peer)))
    }

    fn forget_expected(&self) {
        let now_ms = unix_ms();
        lock(&self.expected).retain(|_, e| e.until_ms > now_ms);
    }

    fn show(&self, view: &MigrationView) {
        lock(&self.latest).insert(view.vm.clone(), view.clone());
    }

    /// A migration is over.
    fn ended(&self, view: &MigrationView) {
        self.show(view);
        let totals = &self.totals;
        *lock(&totals.ended).entry((view.role.clone(), view.outcome.clone())).or_default() += 1;
        totals.late_frames.add(view.late_frames);
        let bytes = if view.role == "source" { &totals.sent_bytes } else { &totals.received_bytes };
        bytes.add(view.wire_bytes);
        for (ms, (sum, n)) in [(view.hold_ms, &totals.hold_us), (view.final_delta_ms, &totals.final_delta_us)] {
            if let Some(ms) = ms {
                sum.add((ms * 1000.0) as u64);
                n.add(1);
            }
        }
        if view.outcome == "migrated" && view.role == "destination" {
            lock(&self.expected).remove(&view.vm);
        }
        let mut history = lock(&self.history);
        if history.len() >= HISTORY {
            history.pop_front();
        }
        history.push_back(view.clone());
    }
}
