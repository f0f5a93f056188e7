//! The configuration as the daemon uses it. Every key is documented in [`super::schema`], which also
//! holds the limits that are checked before a value gets here.
use ferry_dataplane::bridge::fdb::{DEFAULT_AGEING_S, DEFAULT_CAPACITY};
use ferry_dataplane::bridge::vlan::VlanMode;
use ferry_dataplane::firewall::SecurityGroup;
use ferry_dataplane::firewall::policy::AddressSet;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::firewall::{FirewallConfig, FlowLogConfig, VmConfig};
use super::migration::MigrationConfig;

/// Most ports of one switch.
pub const MAX_PORTS: usize = ferry_dataplane::bridge::fdb::MAX_PORTS;
/// Most bridges of one switch.
pub const MAX_BRIDGES: usize = ferry_dataplane::bridge::MAX_BRIDGES;
/// Most PMD threads: one reader slot of the quiescence domain is left for the control side.
pub const MAX_PMDS: usize = 63;
/// Longest name of a bridge or port, characters.
pub const MAX_NAME_CHARS: usize = 64;
/// Most queue pairs of a port.
pub const MAX_QUEUE_PAIRS: u32 = 8;
/// Where the API listens unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/ferry/ferry.sock";
/// Where the configuration is unless given otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/ferry/ferry.toml";

/// The whole desired state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// PMD threads.
    pub switch: SwitchConfig,
    /// The local API.
    pub api: ApiConfig,
    /// The Prometheus endpoint.
    pub metrics: MetricsConfig,
    /// Logging.
    pub log: LogConfig,
    /// DPDK's environment, used only when a DPDK port is configured.
    pub dpdk: DpdkConfig,
    /// Log of new and denied connections.
    pub flow_log: FlowLogConfig,
    /// Migration of VMs' connections.
    pub migration: MigrationConfig,
    /// Security groups by name.
    pub security_group: BTreeMap<String, SecurityGroup>,
    /// Address sets by name.
    pub address_set: BTreeMap<String, AddressSet>,
    /// VMs whose ports share one connection table.
    pub vm: Vec<VmConfig>,
    /// Bridges.
    pub bridge: Vec<BridgeConfig>,
    /// Ports.
    pub port: Vec<PortConfig>,
}

/// `[switch]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SwitchConfig {
    /// How long an idle PMD thread polls before it sleeps, microseconds.
    pub idle_spin_us: u32,
    /// Longest delay that sleeping may add to a frame, microseconds. 0: always poll.
    pub idle_latency_us: u32,
    /// PMD threads; none listed: one, not pinned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmd: Vec<PmdConfig>,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        Self { idle_spin_us: 50, idle_latency_us: 1000, pmd: Vec::new() }
    }
}

/// `[[switch.pmd]]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PmdConfig {
    /// CPU core the thread is pinned to; absent: not pinned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core: Option<u32>,
    /// Overrides `switch.idle_spin_us`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_spin_us: Option<u32>,
    /// Overrides `switch.idle_latency_us`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_latency_us: Option<u32>,
}

/// One PMD thread with all defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmdSpec {
    /// CPU core the thread is pinned to.
    pub core: Option<u32>,
    /// How long it polls without work before it sleeps, microseconds.
    pub idle_spin_us: u32,
    /// Longest delay that its sleep may add, microseconds; 0: it never sleeps.
    pub idle_latency_us: u32,
}

/// `[api]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ApiConfig {
    /// Path of the API's Unix socket.
    pub socket: PathBuf,
    /// Its permissions, octal.
    pub mode: FileMode,
    /// Its group; absent: the daemon's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<Owner>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self { socket: DEFAULT_SOCKET.into(), mode: FileMode(0o660), group: None }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MetricsConfig {
    /// Whether the endpoint is served.
    pub enabled: bool,
    /// Address and TCP port.
    pub listen: std::net::SocketAddr,
    /// Allows an address that other hosts reach.
    pub allow_remote: bool,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { enabled: false, listen: std::net::SocketAddr::from(([127, 0, 0, 1], 9477)), allow_remote: false }
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// Least severity that is logged, or a filter directive.
    pub level: String,
    /// Form of a log line.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `[dpdk]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DpdkConfig {
    /// Where its memory comes from.
    pub memory: DpdkMemory,
    /// Memory reserved for DPDK, MiB.
    pub memory_mb: u32,
    /// Looks for PCI devices.
    pub pci: bool,
    /// Further arguments for the EAL.
    pub extra_args: Vec<String>,
}

impl Default for DpdkConfig {
    fn default() -> Self {
        Self { memory: DpdkMemory::Auto, memory_mb: 256, pci: true, extra_args: Vec::new() }
    }
}

/// Where DPDK's memory comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DpdkMemory {
    /// Hugepages when enough are free, else ordinary memory.
    #[default]
    Auto,
    /// Hugepages.
    Hugepages,
    /// Ordinary memory.
    NoHuge,
}

/// `[[bridge]]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BridgeConfig {
    /// Its name.
    pub name: String,
    /// Most MAC addresses it learns.
    pub fdb_capacity: u32,
    /// After how many seconds without traffic an address is forgotten.
    pub fdb_ageing_s: u32,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self { name: String::new(), fdb_capacity: DEFAULT_CAPACITY, fdb_ageing_s: DEFAULT_AGEING_S }
    }
}

/// `[[port]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortConfig {
    /// Its name.
    pub name: String,
    /// What it is, with the keys of that type.
    #[serde(flatten)]
    pub kind: PortKind,
    /// The bridge it belongs to.
    pub bridge: String,
    /// VLAN membership.
    #[serde(default)]
    pub vlan: VlanConfig,
    /// False: no frame passes, in either direction.
    #[serde(default = "yes")]
    pub admin_up: bool,
    /// Longest IP packet, bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Most MAC addresses learned behind it.
    #[serde(default = "default_fdb_limit")]
    pub fdb_limit: u32,
    /// PMD thread (position in `switch.pmd`) of receive queue i: entry i modulo the list's length. Empty: chosen by load.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rxq_affinity: Vec<u32>,
    /// The VM whose connection table the firewall uses; absent: the port is a VM of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The port's firewall; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firewall: Option<FirewallConfig>,
}

fn yes() -> bool {
    true
}
fn default_mtu() -> u16 {
    1500
}
fn default_fdb_limit() -> u32 {
    ferry_dataplane::bridge::fdb::DEFAULT_PORT_LIMIT
}

/// The types of port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum PortKind {
    /// A guest's NIC over vhost-user.
    #[serde(rename = "vhost-user")]
    VhostUser(VhostUserConfig),
    /// A DPDK Ethernet device.
    #[serde(rename = "dpdk")]
    Dpdk(DpdkPortConfig),
}

/// Who listens on the vhost-user socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostRole {
    /// Ferry listens; QEMU connects (use `reconnect=1` there).
    #[default]
    Server,
    /// QEMU listens (`server=on`); Ferry connects, again and again.
    Client,
}

/// Keys of a `vhost-user` port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VhostUserConfig {
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// Who listens on it.
    #[serde(default)]
    pub role: VhostRole,
    /// Most queue pairs the guest may use.
    #[serde(default = "one")]
    pub queue_pairs: u32,
    /// Permissions of the socket, octal (role `server`).
    #[serde(default = "default_socket_mode")]
    pub socket_mode: FileMode,
    /// Owner of the socket (role `server`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_user: Option<Owner>,
    /// Group of the socket (role `server`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<Owner>,
    /// Virtio features offered to the guest.
    #[serde(default)]
    pub features: VirtioFeatures,
}

fn one() -> u32 {
    1
}
fn default_socket_mode() -> FileMode {
    FileMode(0o660)
}

/// `features` of a `vhost-user` port: what is offered to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtioFeatures {
    /// Packed virtqueues.
    pub packed: bool,
    /// Mergeable receive buffers.
    pub mrg_rxbuf: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Notification suppression by event index.
    pub event_idx: bool,
    /// Descriptors used in order.
    pub in_order: bool,
    /// Unfinished L4 checksums.
    pub csum: bool,
    /// TCP segmentation offload, IPv4 and IPv6.
    pub tso: bool,
    /// The guest announces itself after a migration.
    pub guest_announce: bool,
    /// Dirty-page logging: QEMU refuses to migrate the guest without.
    pub migration: bool,
    /// Memory hot-plug region by region.
    pub mem_slots: bool,
}

impl Default for VirtioFeatures {
    fn default() -> Self {
        Self {
            packed: true,
            mrg_rxbuf: true,
            indirect: true,
            event_idx: true,
            in_order: true,
            csum: true,
            tso: true,
            guest_announce: true,
            migration: true,
            mem_slots: true,
        }
    }
}

/// Keys of a `dpdk` port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DpdkPortConfig {
    /// PCI address, or a virtual device with its arguments.
    pub device: String,
    /// Receive queues.
    #[serde(default = "one")]
    pub rx_queues: u32,
    /// Transmit queues; 0: as many as receive queues.
    #[serde(default)]
    pub tx_queues: u32,
    /// Descriptors per receive queue.
    #[serde(default = "default_descriptors")]
    pub rx_descriptors: u32,
    /// Descriptors per transmit queue.
    #[serde(default = "default_descriptors")]
    pub tx_descriptors: u32,
    /// Packet buffers in the port's pool; 0: chosen by the queues.
    #[serde(default)]
    pub mbufs: u32,
    /// Receives frames for every address: a bridge needs that.
    #[serde(default = "yes")]
    pub promiscuous: bool,
}

fn default_descriptors() -> u32 {
    512
}

/// How a port belongs to VLANs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VlanKind {
    /// Untagged frames only, all of VLAN `tag`.
    Access,
    /// Tagged frames of the VLANs `trunks`; VLAN 0 stands for untagged frames.
    #[default]
    Trunk,
    /// A trunk that takes untagged frames as VLAN `tag` and sends that VLAN tagged.
    NativeTagged,
    /// A trunk that takes untagged frames as VLAN `tag` and sends that VLAN untagged.
    NativeUntagged,
}

/// `vlan` of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VlanConfig {
    /// How the port belongs to VLANs.
    pub mode: VlanKind,
    /// Access or native VLAN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<u16>,
    /// VLANs of a trunk; empty: all, and untagged frames.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trunks: Vec<VlanItem>,
}

/// One entry of `trunks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VlanItem {
    /// A VLAN.
    Id(u16),
    /// A range, `"10-20"`, both ends included.
    Range(String),
}

impl VlanItem {
    /// First and last VLAN; `None` when one is above 4094 or the range runs backwards.
    pub fn bounds(&self) -> Option<(u16, u16)> {
        let (lo, hi) = match self {
            VlanItem::Id(id) => (*id, *id),
            VlanItem::Range(text) => match text.split_once('-') {
                Some((a, b)) => (a.trim().parse().ok()?, b.trim().parse().ok()?),
                None => {
                    let id = text.trim().parse().ok()?;
                    (id, id)
                }
            },
        };
        (lo <= hi && hi <= 4094).then_some((lo, hi))
    }
}

/// Most VLANs of a trunk in which a VM is announced.
const MAX_ANNOUNCED_VLANS: usize = 64;

impl VlanConfig {
    /// How frames that announce a port's VM are tagged; `None`: not at all. On a trunk the guest may use any of the VLANs: it is
    /// announced in each, as far as they are listed and few.
    pub fn announced(&self) -> Vec<Option<u16>> {
        let vids = self.trunk_vids();
        let untagged = self.mode != VlanKind::Trunk || vids.is_empty() || vids.contains(&0);
        let tagged = vids.into_iter().filter(|v| self.mode != VlanKind::Access && *v != 0 && Some(*v) != self.tag);
        untagged.then_some(None).into_iter().chain(tagged.take(MAX_ANNOUNCED_VLANS).map(Some)).collect()
    }

    /// The VLANs listed in `trunks`, in order and once each; empty when none are listed (which means all).
    pub fn trunk_vids(&self) -> BTreeSet<u16> {
        self.trunks.iter().filter_map(VlanItem::bounds).flat_map(|(lo, hi)| lo..=hi).collect()
    }

    /// As the switch takes it. A missing `tag` was refused by the checks; 0 would be refused by the switch.
    pub fn mode(&self) -> VlanMode {
        let trunks: Vec<u16> = self.trunk_vids().into_iter().collect();
        let tag = self.tag.unwrap_or(0);
        match self.mode {
            VlanKind::Access => VlanMode::Access { tag },
            VlanKind::Trunk => VlanMode::Trunk { trunks },
            VlanKind::NativeTagged => VlanMode::NativeTagged { tag, trunks },
            VlanKind::NativeUntagged => VlanMode::NativeUntagged { tag, trunks },
        }
    }
}

/// File permissions, written as an octal string such as `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl FileMode {
    /// Reads three or four octal digits, at most `0777`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let ok = (3..=4).contains(&digits.len()) && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
        let mode = if ok { u32::from_str_radix(digits, 8).ok()? } else { return None };
        (mode <= 0o777).then_some(Self(mode))
    }
}

impl Serialize for FileMode {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for FileMode {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not an octal mode such as \"0660\""))
    }
}

/// A user or group: a name, or a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Owner {
    /// By number.
    Id(u32),
    /// By name, looked up when it is used.
    Name(String),
}

impl Config {
    /// The PMD threads with defaults filled in; at least one.
    pub fn pmds(&self) -> Vec<PmdSpec> {
        let spec = |p: &PmdConfig| PmdSpec {
            core: p.core,
            idle_spin_us: p.idle_spin_us.unwrap_or(self.switch.idle_spin_us),
            idle_latency_us: p.idle_latency_us.unwrap_or(self.switch.idle_latency_us),
        };
        if self.switch.pmd.is_empty() {
            return vec![spec(&PmdConfig::default())];
        }
        self.switch.pmd.iter().map(spec).collect()
    }

    /// The port of that name.
    pub fn port(&self, name: &str) -> Option<&PortConfig> {
        self.port.iter().find(|p| p.name == name)
    }

    /// The bridge of that name.
    pub fn bridge(&self, name: &str) -> Option<&BridgeConfig> {
        self.bridge.iter().find(|b| b.name == name)
    }

    /// The configuration as TOML, such as a file could hold.
    pub fn to_toml(&self) -> String {
        // Through a value tree: flattened enums do not keep scalars ahead of tables.
        let value = toml::Table::try_from(self);
        value.map_or_else(|e| format!("# {e}\n"), |t| toml::to_string(&t).unwrap_or_else(|e| format!("# {e}\n")))
    }
}

impl PortConfig {
    /// How many receive queues the port has.
    pub fn rx_queues(&self) -> u32 {
        match &self.kind {
            PortKind::VhostUser(v) => v.queue_pairs,
            PortKind::Dpdk(d) => d.rx_queues,
        }
    }

    /// The value of the key `type`.
    pub fn type_name(&self) -> &'static str {
        match self.kind {
            PortKind::VhostUser(_) => "vhost-user",
            PortKind::Dpdk(_) => "dpdk",
        }
    }

    /// What only this port may use: its socket or its device.
    pub fn resource(&self) -> String {
        match &self.kind {
            PortKind::VhostUser(v) => format!("socket {}", v.socket.display()),
            PortKind::Dpdk(d) => format!("device {}", d.device.split(',').next().unwrap_or_default()),
        }
    }

    /// True when turning into `to` takes no restart of the port. The MTU is part of what a guest negotiates and of how a device's buffers
    /// are cut, so that it takes one.
    pub fn live_change(&self, to: &PortConfig) -> bool {
        let kind = match (&self.kind, &to.kind) {
            (PortKind::Dpdk(a), PortKind::Dpdk(b)) => *a == DpdkPortConfig { promiscuous: a.promiscuous, ..b.clone() },
            (a, b) => a == b,
        };
        self.name == to.name && self.mtu == to.mtu && kind
    }
}
