//! What the API shows, besides [`Stats`](crate::engine::Stats), [`FdbEntry`](crate::engine::FdbEntry) and
//! [`Outcome`](crate::core::Outcome).
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use ferry_dataplane::firewall::SecurityGroup;
use ferry_dataplane::firewall::policy::AddressSet;

use crate::config::{BridgeConfig, FirewallConfig, PmdSpec, PortConfig, VmConfig};
use crate::core::Core;
use crate::engine::{PmdStats, PortState, VmStats};
use crate::plan::{Change, Kind};

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of ferryd.
    pub version: String,
    /// Version of the API.
    pub api: String,
    /// Process id of ferryd.
    pub pid: u32,
    /// Seconds since it came up.
    pub uptime_s: u64,
    /// The configuration file.
    pub config_file: Option<String>,
    /// Changes made at run time: how what runs differs from the file.
    pub not_in_file: Vec<Change>,
    /// Keys of the file that take effect at the next start.
    pub restart_required: Vec<String>,
    /// What an earlier failed change could not put back; empty: nothing.
    pub damage: String,
    /// How many PMD threads there are.
    pub pmds: usize,
    /// How many bridges there are.
    pub bridges: usize,
    /// How many ports are in which state.
    pub ports: BTreeMap<String, usize>,
    /// Frames received by the switch since its start.
    pub received: u64,
    /// Of those: forwarded.
    pub forwarded: u64,
    /// Of those: fragments kept until their datagram is complete.
    #[serde(default)]
    pub held: u64,
    /// Of those: dropped.
    pub dropped: u64,
    /// Log filter.
    pub log_level: String,
    /// True once DPDK runs.
    pub dpdk_started: bool,
}

/// Where a port's or bridge's configuration comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// As in the file.
    File,
    /// In the file, changed at run time.
    Changed,
    /// Added at run time.
    Runtime,
}

/// One entry of `GET /v1/ports`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortView {
    /// Its configuration.
    #[serde(flatten)]
    pub config: PortConfig,
    /// Where that comes from.
    pub origin: Origin,
    /// How it is doing.
    #[serde(flatten)]
    pub state: PortState,
    /// PMD thread of each receive queue.
    pub rxq_pmd: Vec<usize>,
}

/// One entry of `GET /v1/bridges`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BridgeView {
    /// Its configuration.
    #[serde(flatten)]
    pub config: BridgeConfig,
    /// Where that comes from.
    pub origin: Origin,
    /// Its ports.
    pub ports: Vec<String>,
    /// Addresses learned.
    pub fdb_entries: u64,
}

/// One entry of `GET /v1/vms`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmView {
    /// Its configuration.
    #[serde(flatten)]
    pub config: VmConfig,
    /// Where that comes from: of a port that is a VM of its own, where the port's does.
    pub origin: Origin,
    /// Its ports.
    pub ports: Vec<String>,
    /// Its table and limits.
    pub stats: VmStats,
}

/// `GET /v1/policy`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// Security groups by name.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// Address sets by name.
    pub address_sets: BTreeMap<String, AddressSet>,
    /// Ports with a firewall.
    pub ports: Vec<PortPolicyView>,
}

/// What a port makes of the policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortPolicyView {
    /// The port.
    pub port: String,
    /// Its VM.
    pub vm: String,
    /// Its settings.
    pub firewall: FirewallConfig,
}

/// One entry of `GET /v1/pmds`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PmdView {
    /// Its settings.
    #[serde(flatten)]
    pub spec: PmdSpec,
    /// Its counters.
    pub stats: PmdStats,
}

impl Status {
    /// The daemon's status now.
    pub fn of(core: &Core) -> Self {
        let config = core.config();
        let mut ports = BTreeMap::new();
        for p in &config.port {
            *ports.entry(state(core, p).state).or_default() += 1;
        }
        let stats = core.engine().stats();
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            api: super::VERSION.into(),
            pid: std::process::id(),
            uptime_s: core.started().elapsed().as_secs(),
            config_file: core.file().map(|f| f.path.display().to_string()),
            not_in_file: core.not_in_file(),
            restart_required: core.restart_required().to_vec(),
            damage: core.damage().to_owned(),
            pmds: core.state().pmds.len(),
            bridges: config.bridge.len(),
            ports,
            received: stats.inputs().map(|r| r.frames).sum(),
            forwarded: stats.inputs().map(|r| r.forwarded).sum(),
            held: stats.inputs().map(|r| r.held).sum(),
            dropped: stats.inputs().map(|r| r.dropped_total()).sum(),
            log_level: config.log.level.clone(),
            dpdk_started: core.engine().dpdk_started(),
        }
    }
}

/// How a port is doing, as shown: `disabled` when it is administratively down.
fn state(core: &Core, port: &PortConfig) -> PortState {
    match core.engine().port_state(&port.name) {
        Ok(s) if port.admin_up => s,
        Ok(s) => {
            PortState { state: "disabled".into(), detail: format!("admin_up is false; otherwise {}", s.state), ..s }
        }
        Err(e) => PortState { state: "unknown".into(), detail: e.message, ..PortState::default() },
    }
}

fn origin(changes: &[Change], what: &str, name: &str) -> Origin {
    match changes.iter().find(|c| c.what == what && c.name == name).map(|c| c.change) {
        None | Some(Kind::Removed) => Origin::File,
        Some(Kind::Added) => Origin::Runtime,
        Some(Kind::Changed) => Origin::Changed,
    }
}

/// All ports.
pub fn ports(core: &Core) -> Vec<PortView> {
    let changes = core.not_in_file();
    let view = |p: &PortConfig| PortView {
        config: p.clone(),
        origin: if core.file().is_none() { Origin::Runtime } else { origin(&changes, "port", &p.name) },
        state: state(core, p),
        rxq_pmd: (0..p.rx_queues()).filter_map(|q| core.state().placement.get(&(p.name.clone(), q)).copied()).collect(),
    };
    core.config().port.iter().map(view).collect()
}

/// All bridges.
pub fn bridges(core: &Core) -> Vec<BridgeView> {
    let changes = core.not_in_file();
    let stats = core.engine().stats();
    let view = |b: &BridgeConfig| BridgeView {
        config: b.clone(),
        origin: if core.file().is_none() { Origin::Runtime } else { origin(&changes, "bridge", &b.name) },
        ports: core.config().port.iter().filter(|p| p.bridge == b.name).map(|p| p.name.clone()).collect(),
        fdb_entries: stats.ports.iter().filter(|p| p.bridge == b.name).map(|p| u64::from(p.fdb_entries)).sum(),
    };
    core.config().bridge.iter().map(view).collect()
}

/// All VMs.
pub fn vms(core: &Core) -> Vec<VmView> {
    let changes = core.not_in_file();
    let config = core.config();
    let view = |v: VmConfig| {
        let listed = config.vm.iter().any(|l| l.name == v.name);
        let what = if listed { "vm" } else { "port" };
        let stats = core.engine().vm_stats(&v.name);
        VmView {
            origin: if core.file().is_none() { Origin::Runtime } else { origin(&changes, what, &v.name) },
            ports: config.ports_of(&v.name).map(|p| p.name.clone()).collect(),
            stats: stats.unwrap_or_else(|_| VmStats { vm: v.name.clone(), ..VmStats::default() }),
            config: v,
        }
    };
    config.vms().into_values().map(view).collect()
}

/// Groups, sets, and the ports that use them.
pub fn policy(core: &Core) -> PolicyView {
    let config = core.config();
    let port = |p: &PortConfig| {
        Some(PortPolicyView { port: p.name.clone(), vm: p.vm_name()?.to_owned(), firewall: p.firewall.clone()? })
    };
    PolicyView {
        security_groups: config.security_group.clone(),
        address_sets: config.address_set.clone(),
        ports: config.port.iter().filter_map(port).collect(),
    }
}

/// All PMD threads.
pub fn pmds(core: &Core) -> Vec<PmdView> {
    let stats = core.engine().stats();
    let view = |(i, spec): (usize, &PmdSpec)| PmdView {
        spec: *spec,
        stats: stats.pmds.iter().find(|s| s.pmd == i).cloned().unwrap_or_default(),
    };
    core.state().pmds.iter().enumerate().map(view).collect()
}
