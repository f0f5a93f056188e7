//! The daemon's state and the only way to change it: a whole new configuration is checked, planned and carried out, or
//! everything is put back as it was.
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use ferry_migrate::announce;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{self, Config, ConfigError, Problem};
use crate::engine::{Engine, EngineError};
use crate::firewall::observer::Observer;
use crate::migration::Migration;
use crate::plan::{Change, Plan, State, Step, describe, merge, plan};

/// Sets the log filter of the running process.
pub type SetLogLevel = Box<dyn FnMut(&str) -> Result<(), String> + Send>;

/// Why a change was not made. Nothing changed, unless `damage` says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The configuration asked for is not valid.
    #[error("{0}")]
    Invalid(ConfigError),
    /// What the request names does not exist.
    #[error("there is no {what} {name}")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// What the request adds exists already.
    #[error("the {what} {name} exists already")]
    Exists {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The request contradicts the present state.
    #[error("{message}")]
    Conflict {
        /// Why.
        message: String,
        /// What to do.
        hint: String,
    },
    /// A step failed; the former state is back.
    #[error("could not {step}: {cause}; the former state was restored{damage}")]
    Failed {
        /// The step.
        step: String,
        /// Why it failed.
        cause: EngineError,
        /// What could not be put back; empty: everything was.
        damage: String,
    },
}

impl ChangeError {
    /// What to do about it; may be empty.
    pub fn hint(&self) -> String {
        match self {
            Self::Invalid(e) => e.hint(),
            Self::NotFound { what: what @ ("port" | "bridge"), .. } => {
                format!("`ferry {what} list` shows those that exist")
            }
            Self::NotFound { what: "VM" | "vm", .. } => "`ferry conntrack stats` shows those that exist".into(),
            Self::NotFound { .. } => "`ferry policy show` shows those that exist".into(),
            Self::Exists { what: what @ ("port" | "bridge"), .. } => {
                format!("choose another name, or change it with `ferry {what} set`")
            }
            Self::Exists { .. } => "choose another name, or replace it with PUT".into(),
            Self::Conflict { hint, .. } => hint.clone(),
            Self::Failed { cause, .. } => cause.hint.clone(),
        }
    }

    fn problems(problems: Vec<Problem>, tree: &Value) -> Self {
        let named = problems.into_iter().map(|p| Problem { path: with_names(&p.path, tree), ..p }).collect();
        Self::Invalid(ConfigError::without_file(named))
    }
}

/// `port[3].vlan` as `port vm1: vlan`: a request does not know the position in the list.
fn with_names(path: &str, tree: &Value) -> String {
    for list in ["port", "bridge", "vm"] {
        let Some((index, rest)) =
            path.strip_prefix(list).and_then(|r| r.strip_prefix('[')).and_then(|r| r.split_once(']'))
        else {
            continue;
        };
        let name = index.parse().ok().and_then(|i: usize| tree[list][i]["name"].as_str());
        if let Some(name) = name {
            return format!("{list} {name}{}", rest.replacen('.', ": ", 1));
        }
    }
    path.to_owned()
}

/// What a change did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// False for a dry run.
    pub applied: bool,
    /// Differences to the configuration before.
    pub changes: Vec<Change>,
    /// The steps, in words.
    pub steps: Vec<String>,
    /// Ports that were interrupted, though they exist before and after.
    pub restarted_ports: Vec<String>,
    /// Keys whose change takes effect at the next start.
    pub restart_required: Vec<String>,
}

/// Where the configuration file is and what it said when it was last read.
#[derive(Clone, Debug)]
pub struct FileState {
    /// Its path.
    pub path: PathBuf,
    /// What it said.
    pub config: Config,
}

/// The daemon's state.
pub struct Core {
    engine: Box<dyn Engine>,
    state: State,
    file: Option<FileState>,
    restart_required: Vec<String>,
    damage: String,
    set_log_level: SetLogLevel,
    observer: Observer,
    migration: Migration,
    started: Instant,
}

/// The state shared by the API, the signal handlers and the port events. Held for the time of a change; never on a PMD thread.
#[derive(Clone)]
pub struct SharedCore(Arc<Mutex<Core>>);

/// A [`SharedCore`] that does not keep the state alive.
#[derive(Clone)]
pub struct WeakCore(Weak<Mutex<Core>>);

impl WeakCore {
    /// The state, while it is there.
    pub fn upgrade(&self) -> Option<SharedCore> {
        self.0.upgrade().map(SharedCore)
    }
}

impl SharedCore {
    /// A reference that does not keep the state alive.
    pub fn downgrade(&self) -> WeakCore {
        WeakCore(Arc::downgrade(&self.0))
    }

    /// Shares `core`.
    pub fn new(core: Core) -> Self {
        Self(Arc::new(Mutex::new(core)))
    }

    /// Waits for its turn. Blocking: not for async code.
    pub fn lock(&self) -> MutexGuard<'_, Core> {
        // Changes that panicked half-way are a bug, but status must still be readable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// Brings up `config` on an empty engine.
    ///
    /// # Errors
    /// A step failed; nothing is left running.
    pub fn start(
        engine: Box<dyn Engine>,
        config: Config,
        file: Option<PathBuf>,
        set_log_level: SetLogLevel,
        migration: Migration,
    ) -> Result<Self, ChangeError> {
        // What exists before the start: services with their settings, no thread, bridge or port.
        let initial = Config {
            api: config.api.clone(),
            metrics: config.metrics.clone(),
            log: config.log.clone(),
            ..Config::default()
        };
        let mut core = Self {
            engine,
            state: State { config: initial, ..State::default() },
            file: file.map(|path| FileState { path, config: config.clone() }),
            restart_required: Vec::new(),
            damage: String::new(),
            set_log_level,
            observer: Observer::new(),
            migration,
            started: Instant::now(),
        };
        if let Some(switch) = core.engine.vm_switch() {
            core.migration.attach(switch);
        }
        core.apply(&config, false)?;
        Ok(core)
    }

    /// The configuration in effect.
    pub fn config(&self) -> &Config {
        &self.state.config
    }
    /// The running state.
    pub fn state(&self) -> &State {
        &self.state
    }
    /// The configuration file, if there is one.
    pub fn file(&self) -> Option<&FileState> {
        self.file.as_ref()
    }
    /// The switch.
    pub fn engine(&self) -> &dyn Engine {
        self.engine.as_ref()
    }
    /// The switch, for what is no configuration (flushing the FDB).
    pub fn engine_mut(&mut self) -> &mut dyn Engine {
        self.engine.as_mut()
    }
    /// What was denied lately, and the flow log.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }
    /// Migrations of VMs' connections.
    pub fn migration(&self) -> &Migration {
        &self.migration
    }
    /// Keys that differ between file and daemon until the next start.
    pub fn restart_required(&self) -> &[String] {
        &self.restart_required
    }
    /// What an earlier failed change could not put back; empty: nothing.
    pub fn damage(&self) -> &str {
        &self.damage
    }
    /// When the daemon came up.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Differences between the file and what runs: changes made at run time.
    pub fn not_in_file(&self) -> Vec<Change> {
        match &self.file {
            // What waits for the next start is listed by `restart_required`.
            Some(f) => {
                let mut file = f.config.clone();
                file.api = self.state.config.api.clone();
                file.metrics = self.state.config.metrics.clone();
                file.log.format = self.state.config.log.format;
                if self.engine.dpdk_started() {
                    file.dpdk = self.state.config.dpdk.clone();
                }
                describe(&file, &self.state.config)
            }
            None => Vec::new(),
        }
    }

    /// Changes the configuration as `edit` changes its value tree (see [`config::to_tree`]).
    ///
    /// # Errors
    /// `edit`'s own, an invalid result, or a step that failed.
    pub fn edit(
        &mut self,
        dry_run: bool,
        edit: impl FnOnce(&mut Value) -> Result<(), ChangeError>,
    ) -> Result<Outcome, ChangeError> {
        let mut tree = config::to_tree(&self.state.config);
        edit(&mut tree)?;
        let target = config::from_tree(tree.clone()).map_err(|p| ChangeError::problems(p, &tree))?;
        let outcome = self.apply(&target, dry_run)?;
        if !outcome.restart_required.is_empty() {
            self.restart_required.clone_from(&outcome.restart_required);
        }
        Ok(outcome)
    }

    /// Reads the file again and applies what changed in it. Changes made at run time stay where the file did not change;
    /// with `discard_runtime` they go.
    ///
    /// # Errors
    /// There is no file, it is invalid, or a step failed: everything stays as it was.
    pub fn reload(&mut self, discard_runtime: bool, dry_run: bool) -> Result<Outcome, ChangeError> {
        let Some(file) = &self.file else {
            return Err(ChangeError::Conflict {
                message: "ferryd was started without a configuration file".into(),
                hint: "start it with --config FILE".into(),
            });
        };
        let path = file.path.clone();
        let new_file = config::load(&path).map_err(ChangeError::Invalid)?;
        let target = if discard_runtime {
            new_file.clone()
        } else {
            let tree = merge(&file.config, &new_file, &self.state.config);
            config::from_tree(tree.clone()).map_err(|problems| {
                let named: Vec<_> = problems.iter().map(|p| with_names(&p.path, &tree) + ": " + &p.message).collect();
                ChangeError::Conflict {
                    message: format!("the file does not go together with changes made at run time: {}", named.join("; ")),
                    hint: "adapt the file or the changes (`ferry status` lists them), or drop them: ferry reload --discard-runtime".into(),
                }
            })?
        };
        let outcome = self.apply(&target, dry_run)?;
        if !dry_run {
            self.restart_required.clone_from(&outcome.restart_required);
            if let Err(e) = self.observer.reopen() {
                tracing::warn!("flow log: {e}; the file opened before stays in use");
            }
            if let Err(e) = self.migration.reload_credentials() {
                tracing::warn!("migration certificates: {e}; the ones loaded before stay in use");
            }
            self.file = Some(FileState { path, config: new_file });
        }
        Ok(outcome)
    }

    /// Makes `target` the running configuration, wholly or not at all.
    ///
    /// # Errors
    /// A step failed.
    pub fn apply(&mut self, target: &Config, dry_run: bool) -> Result<Outcome, ChangeError> {
        let Plan { steps, target, restart_required, restarted_ports } =
            plan(&self.state, target, self.engine.dpdk_started());
        let mut outcome = Outcome {
            applied: false,
            changes: describe(&self.state.config, &target.config),
            steps: steps.iter().map(ToString::to_string).collect(),
            restarted_ports,
            restart_required,
        };
        if dry_run {
            return Ok(outcome);
        }
        // Ports that are opened below have guests at once.
        self.tell_migration(&target.config);
        let mut done: Vec<Step> = Vec::with_capacity(steps.len());
        for step in steps {
            tracing::debug!("{step}");
            if let Err(cause) = self.perform(&step) {
                tracing::warn!("could not {step}: {cause}; restoring the former state");
                let damage = self.roll_back(done);
                self.tell_migration(&self.state.config);
                return Err(ChangeError::Failed { step: step.to_string(), cause, damage });
            }
            done.push(step);
        }
        self.state = target;
        self.tell_migration(&self.state.config);
        self.migration.ready();
        self.observer.set_vms(&self.state.config);
        outcome.applied = true;
        Ok(outcome)
    }

    fn tell_migration(&self, config: &Config) {
        if let Err(e) = self.migration.set_config(config) {
            // The checks of the configuration have found it.
            tracing::error!("{e}");
        }
    }

    fn roll_back(&mut self, done: Vec<Step>) -> String {
        let mut lost = Vec::new();
        for step in done.into_iter().rev().map(Step::undo) {
            if let Err(e) = self.perform(&step) {
                tracing::error!("could not {step} again: {e}");
                if let Step::AddPort { port, .. } = &step {
                    // The port is gone: the state must say so, that it can be added again.
                    self.state.config.port.retain(|p| p.name != port.name);
                    self.state.placement.retain(|(name, _), _| *name != port.name);
                }
                lost.push(format!("could not {step}: {e}"));
            }
        }
        if lost.is_empty() {
            return String::new();
        }
        self.damage = lost.join("; ");
        format!(", except: {}", self.damage)
    }

    fn perform(&mut self, step: &Step) -> Result<(), EngineError> {
        let e = &mut self.engine;
        match step {
            Step::SetDpdk { to, .. } => e.set_dpdk(to),
            Step::AddPmd { index, spec } => e.add_pmd(*index, spec),
            Step::UpdatePmd { index, to, .. } => e.update_pmd(*index, to),
            Step::RemovePmd { index, .. } => e.remove_pmd(*index),
            Step::AddBridge(b) => e.add_bridge(b),
            Step::UpdateBridge { to, .. } => e.update_bridge(to),
            Step::RemoveBridge(b) => e.remove_bridge(&b.name),
            Step::AddVm(vm) => e.add_vm(vm),
            Step::UpdateVm { from, to }
                if from.connections != to.connections && self.migration.is_migrating(&to.name) =>
            {
                let message = format!("the connections of {} are migrating", to.name);
                Err(EngineError::new(message, "change its table's size when that is over: ferry migrate status"))
            }
            Step::UpdateVm { to, .. } => e.update_vm(to),
            Step::SetMigration { to, .. } => self.migration.configure(to),
            Step::RemoveVm(vm) => e.remove_vm(&vm.name),
            Step::SetPolicy { to, .. } => e.set_policy(to),
            Step::SetFlowLog { to, .. } => {
                self.observer.configure(to).map_err(|m| EngineError::new(m, "check flow_log.file and its directory"))
            }
            Step::AddPort { port, placed } => e.add_port(port, placed),
            Step::UpdatePort { to, .. } => e.update_port(to),
            Step::RemovePort { port, .. } => e.remove_port(&port.name),
            Step::Assign { port, queue, to, .. } => e.assign(port, *queue, *to),
            Step::SetLogLevel { to, .. } => {
                (self.set_log_level)(to).map_err(|m| EngineError::new(m, "use a level such as \"info\""))
            }
        }
    }

    /// Announces a VM's address in its port's bridge, as QEMU asked for with SEND_RARP. Returns how many frames were sent.
    ///
    /// # Errors
    /// No such port, or an address no station can have.
    pub fn announce(&mut self, port: &str, mac: announce::MacAddr) -> Result<usize, EngineError> {
        if !announce::is_station(&mac) {
            return Err(EngineError::new("the address to announce is not a station's", ""));
        }
        let Some(config) = self.state.config.port(port) else {
            return Err(EngineError::new(format!("there is no port {port}"), ""));
        };
        let mut sent = 0;
        for vlan in config.vlan.announced() {
            self.engine.inject(port, &announce::rarp(mac, vlan))?;
            sent += 1;
        }
        Ok(sent)
    }

    /// Ends the switch in order.
    pub fn shutdown(&mut self) {
        // First: whoever holds a guest lets it go.
        self.migration.shut_down();
        self.engine.shutdown();
        self.state.config.port.clear();
        self.state.config.bridge.clear();
        self.state.config.vm.clear();
        self.state.placement.clear();
        self.state.pmds.clear();
    }
}
