//! The firewall's part of the configuration: VMs, security groups, address sets, what ports do with them, the flow log.
//!
//! The rules themselves are the dataplane's own types: what is written in the file is what is compiled.
use std::collections::BTreeMap;
use std::path::PathBuf;

use ferry_dataplane::conntrack::TrackConfig;
use ferry_dataplane::firewall::limits::LimitsConfig;
use ferry_dataplane::firewall::policy::BuiltinServices;
use ferry_dataplane::firewall::reject::RejectConfig;
use ferry_dataplane::firewall::spoof::SpoofConfig;
use ferry_dataplane::firewall::{Action, PolicyDocument, PortPolicy};
use serde::{Deserialize, Serialize};

use super::migration::VmMigrationConfig;
use super::model::{Config, PortConfig};

/// Connections a VM's table holds unless configured otherwise.
pub const DEFAULT_CONNECTIONS: u32 = 1_000_000;
/// Most connections a VM's table can hold.
pub const MAX_CONNECTIONS: u32 = ferry_dataplane::conntrack::MAX_CAPACITY;

/// `[[vm]]`: a name under which ports share one connection table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Its name.
    pub name: String,
    /// Connections its table holds.
    pub connections: u32,
    /// Its new and denied connections go to the flow log, when that is enabled.
    pub flow_log: bool,
    /// How many connections it may have.
    pub limits: LimitsConfig,
    /// How its connections are tracked.
    pub tracking: TrackConfig,
    /// How its connections migrate.
    pub migration: VmMigrationConfig,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            connections: DEFAULT_CONNECTIONS,
            flow_log: true,
            limits: LimitsConfig::default(),
            tracking: TrackConfig::default(),
            migration: VmMigrationConfig::default(),
        }
    }
}

/// A VM as the switch takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct VmSpec {
    /// Its name.
    pub name: String,
    /// Connections its table holds.
    pub connections: u32,
    /// How many connections it may have.
    pub limits: LimitsConfig,
    /// How its connections are tracked.
    pub tracking: TrackConfig,
    /// Every new connection is reported, not only those of rules that ask for the flow log.
    pub log_new: bool,
}

/// `[port.firewall]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FirewallConfig {
    /// Names of the port's security groups.
    pub security_groups: Vec<String>,
    /// Verdict on connections towards the VM that no rule matches.
    pub default_ingress: Action,
    /// Verdict on connections from the VM that no rule matches.
    pub default_egress: Action,
    /// Denials by default go to the flow log.
    pub log_default: bool,
    /// Built-in rules.
    pub builtin: BuiltinServices,
    /// EtherTypes besides IPv4, IPv6 and ARP that pass.
    pub allowed_ethertypes: Vec<u16>,
    /// Which addresses the VM may use.
    pub anti_spoofing: SpoofConfig,
    /// How senders are told that they were rejected.
    pub reject: RejectConfig,
    /// Limits of a port that is a VM of its own; absent: the defaults. A port with `vm` has that VM's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsConfig>,
}

impl Default for FirewallConfig {
    fn default() -> Self {
        let p = PortPolicy::default();
        Self {
            security_groups: p.security_groups,
            default_ingress: p.default_ingress,
            default_egress: p.default_egress,
            log_default: p.log_default,
            builtin: p.builtin,
            allowed_ethertypes: p.allowed_ethertypes,
            anti_spoofing: p.anti_spoofing,
            reject: p.reject,
            limits: None,
        }
    }
}

impl FirewallConfig {
    /// As the dataplane takes it. Limits are the VM's and stay at their defaults here.
    pub fn policy(&self) -> PortPolicy {
        PortPolicy {
            security_groups: self.security_groups.clone(),
            default_ingress: self.default_ingress,
            default_egress: self.default_egress,
            log_default: self.log_default,
            builtin: self.builtin,
            allowed_ethertypes: self.allowed_ethertypes.clone(),
            anti_spoofing: self.anti_spoofing.clone(),
            limits: LimitsConfig::default(),
            reject: self.reject,
        }
    }
}

/// Where the flow log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowLogTarget {
    /// ferryd's own log, target `flow`.
    #[default]
    Log,
    /// A file of its own, one JSON object per line.
    File,
}

/// What goes to the flow log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowLogScope {
    /// Whatever VMs with `flow_log` open and are denied.
    #[default]
    All,
    /// Of that, what rules with `log` and ports with `log_default` decide.
    Marked,
}

/// `[flow_log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowLogConfig {
    /// Whether anything is written.
    pub enabled: bool,
    /// Where to.
    pub to: FlowLogTarget,
    /// The file, for [`FlowLogTarget::File`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Which connections are written.
    pub scope: FlowLogScope,
    /// New connections are written.
    pub new: bool,
    /// Denied ones are written.
    pub denied: bool,
    /// Lines per second, on average; what goes beyond is counted.
    pub per_second: u32,
    /// Lines at once.
    pub burst: u32,
}

impl Default for FlowLogConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            to: FlowLogTarget::default(),
            file: None,
            scope: FlowLogScope::default(),
            new: true,
            denied: true,
            per_second: 100,
            burst: 200,
        }
    }
}

impl PortConfig {
    /// The VM whose connection table the port uses; `None` without a firewall.
    pub fn vm_name(&self) -> Option<&str> {
        self.firewall.as_ref().map(|_| self.vm.as_deref().unwrap_or(&self.name))
    }
}

impl Config {
    /// All VMs by name: those of `[[vm]]`, and each port with a firewall that names none.
    pub fn vms(&self) -> BTreeMap<String, VmConfig> {
        let own = self.port.iter().filter_map(|p| {
            let firewall = p.firewall.as_ref().filter(|_| p.vm.is_none())?;
            let limits = firewall.limits.unwrap_or_default();
            Some((p.name.clone(), VmConfig { name: p.name.clone(), limits, ..VmConfig::default() }))
        });
        self.vm.iter().map(|v| (v.name.clone(), v.clone())).chain(own).collect()
    }

    /// All VMs by name, as the switch takes them.
    pub fn vm_specs(&self) -> BTreeMap<String, VmSpec> {
        let log = &self.flow_log;
        let log_new = log.enabled && log.new && log.scope == FlowLogScope::All;
        let spec = |v: VmConfig| VmSpec {
            name: v.name,
            connections: v.connections,
            limits: v.limits,
            tracking: v.tracking,
            log_new: log_new && v.flow_log,
        };
        self.vms().into_iter().map(|(name, v)| (name, spec(v))).collect()
    }

    /// Groups and address sets as the dataplane takes them.
    pub fn policy(&self) -> PolicyDocument {
        PolicyDocument { security_groups: self.security_group.clone(), address_sets: self.address_set.clone() }
    }

    /// Ports of a VM.
    pub fn ports_of<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = &'a PortConfig> {
        self.port.iter().filter(move |p| p.vm_name() == Some(vm))
    }
}
