//! What the daemon asks of the switch, and what it is told.
mod firewall_view;
pub mod sleeper;
mod switch_engine;

pub use switch_engine::{Opened, Opener, PortHandle, SwitchEngine};

use std::collections::BTreeMap;
use std::sync::Arc;

use ferry_dataplane::firewall::PolicyDocument;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{BridgeConfig, DpdkConfig, PmdSpec, PortConfig, VmSpec};
use crate::firewall::connection::ConnectionView;
use crate::firewall::filter::Filter;
use crate::firewall::packet_text::Described;
use crate::firewall::record::FirewallRecord;
use crate::migration::switch::VmSwitch;

/// Why the switch could not do a step.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// What went wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
}

impl EngineError {
    /// An error with a remedy.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

/// The switch as the control side sees it. Each method does its change wholly or not at all, and may block for some
/// milliseconds (grace periods, sockets, devices). Never called from a PMD thread.
pub trait Engine: Send {
    /// Sets what DPDK will be started with. Fails once DPDK runs.
    fn set_dpdk(&mut self, dpdk: &DpdkConfig) -> Result<(), EngineError>;
    /// True once DPDK runs.
    fn dpdk_started(&self) -> bool;
    /// Starts PMD thread `index`, which is the next one.
    fn add_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError>;
    /// Replaces PMD thread `index`; its queues move along.
    fn update_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError>;
    /// Ends PMD thread `index`, which is the last one and serves no queue.
    fn remove_pmd(&mut self, index: usize) -> Result<(), EngineError>;
    /// Adds a bridge.
    fn add_bridge(&mut self, bridge: &BridgeConfig) -> Result<(), EngineError>;
    /// Changes a bridge.
    fn update_bridge(&mut self, bridge: &BridgeConfig) -> Result<(), EngineError>;
    /// Removes a bridge without ports.
    fn remove_bridge(&mut self, name: &str) -> Result<(), EngineError>;
    /// Adds a VM, with an empty connection table.
    fn add_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError>;
    /// Changes a VM; its connections stay, as far as a smaller table holds them.
    fn update_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError>;
    /// Removes a VM without ports, and its connections.
    fn remove_vm(&mut self, name: &str) -> Result<(), EngineError>;
    /// Replaces security groups and address sets for all ports at once.
    fn set_policy(&mut self, policy: &PolicyDocument) -> Result<(), EngineError>;
    /// Adds a port, whose VM exists if it has a firewall; `placed[i]` is the PMD thread of receive queue i.
    fn add_port(&mut self, port: &PortConfig, placed: &[usize]) -> Result<(), EngineError>;
    /// Changes what the switch keeps of a port, without disturbing it.
    fn update_port(&mut self, port: &PortConfig) -> Result<(), EngineError>;
    /// Removes a port; its socket or device is free afterwards.
    fn remove_port(&mut self, name: &str) -> Result<(), EngineError>;
    /// Moves receive queue `queue` of `port` to PMD thread `pmd`.
    fn assign(&mut self, port: &str, queue: u32, pmd: usize) -> Result<(), EngineError>;
    /// Sends a frame of the switch's own as if it had come in from the port `ingress`.
    fn inject(&mut self, ingress: &str, frame: &[u8]) -> Result<(), EngineError>;
    /// The bridge's learned addresses.
    fn fdb(&self, bridge: &str) -> Result<Vec<FdbEntry>, EngineError>;
    /// Forgets learned addresses, all or those behind `port`; returns how many.
    fn fdb_flush(&mut self, bridge: &str, port: Option<&str>) -> Result<usize, EngineError>;
    /// A page of a VM's connections that `filter` means, from `cursor` (0: the beginning): at most `limit` of them, found by
    /// looking at no more than [`PAGE_BUDGET`] places of the table.
    fn connections(&self, vm: &str, filter: &Filter, cursor: u64, limit: usize) -> Result<Page, EngineError>;
    /// Forgets a VM's connections that `filter` means; returns how many.
    fn flush_connections(&mut self, vm: &str, filter: &Filter) -> Result<u64, EngineError>;
    /// How a VM's connection table and limits are doing.
    fn vm_stats(&self, vm: &str) -> Result<VmStats, EngineError>;
    /// What the firewall counted, by port; ports without a firewall are left out.
    fn firewall_stats(&self) -> BTreeMap<String, FirewallStats>;
    /// Takes what was reported of single connections since the last call; returns how many reports were lost.
    fn take_firewall_events(&mut self, out: &mut Vec<FirewallRecord>) -> u64;
    /// What is to be called about ten times a second, not under the daemon's lock.
    fn housekeeper(&self) -> Box<dyn Fn() + Send>;
    /// What gets memory ready before traffic needs it. To be called some thirty times a second, not under the daemon's lock, and again within
    /// one if it returns true.
    fn provider(&self) -> Box<dyn Fn() -> bool + Send>;
    /// Walks a packet through every stage, as if it came from or went to `port`, without any effect.
    fn trace(&self, port: &str, packet: &Described) -> Result<Trace, EngineError>;
    /// The switch as migrations see it; none: this engine has no guests.
    fn vm_switch(&self) -> Option<Arc<dyn VmSwitch>> {
        None
    }
    /// How a port is doing.
    fn port_state(&self, name: &str) -> Result<PortState, EngineError>;
    /// All counters.
    fn stats(&self) -> Stats;
    /// Ends everything in order: ports closed, sockets removed, threads stopped.
    fn shutdown(&mut self);
}

/// Most places of a connection table that are looked at for one page.
pub const PAGE_BUDGET: usize = 65_536;

/// A page of connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The connections.
    pub connections: Vec<ConnectionView>,
    /// Where the next page begins; absent: this was the last one.
    #[serde(default)]
    pub next: Option<u64>,
}

/// How a VM's connection table and limits are doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    /// The VM.
    pub vm: String,
    /// Connections now.
    pub connections: u64,
    /// Of these, such as only one side has been heard of.
    pub half_open: u64,
    /// Connections the table holds.
    pub capacity: u64,
    /// Memory of the table, bytes.
    pub memory_bytes: u64,
    /// Connections admitted so far.
    pub new: u64,
    /// Connections and frames denied so far, by reason; reasons that never occurred are left out.
    pub denied: BTreeMap<String, u64>,
    /// Invalid packets so far, by reason.
    pub invalid: BTreeMap<String, u64>,
    /// Connections removed so far, by reason: expired, evicted, finished ...
    pub removed: BTreeMap<String, u64>,
    /// Fragments: held now, and what became of others.
    pub fragments: BTreeMap<String, u64>,
    /// Everything else that is known, as the switch tells it.
    #[serde(default)]
    pub detail: Value,
}

/// What a port's firewall counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirewallStats {
    /// The VM.
    pub vm: String,
    /// Raised whenever the port's rules change: connections judged under another one are judged again.
    pub generation: u32,
    /// Rules, built-in ones included.
    pub rules: u64,
    /// Towards the VM.
    pub ingress: FirewallDirection,
    /// From the VM.
    pub egress: FirewallDirection,
    /// Answers to rejected packets, as the switch tells it.
    #[serde(default)]
    pub reject: Value,
}

/// One direction of a port's firewall.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirewallDirection {
    /// Packets by connection state: new, established, related, invalid, untracked.
    pub packets: BTreeMap<String, u64>,
    /// Packets for which the rules were asked.
    pub policy_lookups: u64,
    /// Connections judged again because the rules had changed.
    pub reevaluated: u64,
    /// Connections that began.
    pub opened: u64,
    /// Packets dropped, by reason; reasons that never occurred are left out.
    pub denied: BTreeMap<String, u64>,
}

/// A packet's way through the switch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The stages, for programs.
    pub report: Value,
    /// The same for people.
    pub text: String,
}

/// How a port is doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PortState {
    /// One word: `up`, `down`, `waiting` (no peer connected), `connected` (peer present, rings not running), `fault`.
    pub state: String,
    /// What is wrong or missing, in words; may be empty.
    #[serde(default)]
    pub detail: String,
    /// Details of the port's type (negotiated features, rings, link).
    #[serde(default)]
    pub status: Value,
}

/// A learned address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FdbEntry {
    /// VLAN.
    pub vlan: u16,
    /// Address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// Port behind which it is.
    pub port: String,
    /// Seconds since the last frame from it.
    pub age_s: u64,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// By port.
    pub ports: Vec<PortStats>,
    /// Frames that the switch originated itself: announcements, answers to rejected packets, released fragments.
    #[serde(default)]
    pub originated: RxStats,
    /// Sums over ports that were removed, so that totals never go back.
    #[serde(default)]
    pub removed: RxStats,
    /// By PMD thread.
    pub pmds: Vec<PmdStats>,
}

impl Stats {
    /// Every input: the queues of all ports, what was originated, and ports of the past.
    pub fn inputs(&self) -> impl Iterator<Item = &RxStats> {
        self.ports.iter().flat_map(|p| &p.rx).chain([&self.originated, &self.removed])
    }
}

/// Counters of a port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PortStats {
    /// The port.
    pub port: String,
    /// Its bridge.
    pub bridge: String,
    /// What came in, by receive queue.
    pub rx: Vec<RxStats>,
    /// What went out, all PMD threads together.
    pub tx: TxStats,
    /// Addresses learned behind it.
    #[serde(default)]
    pub fdb_entries: u32,
}

/// What came in through one receive queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RxStats {
    /// The queue.
    pub queue: u32,
    /// PMD thread that serves it.
    pub pmd: Option<usize>,
    /// Frames received.
    pub frames: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Frames that reached at least one output.
    pub forwarded: u64,
    /// Fragments kept until their datagram is complete; they are counted again, as originated frames, when they go on.
    #[serde(default)]
    pub held: u64,
    /// Frames dropped, by reason; reasons that never occurred are left out.
    pub dropped: BTreeMap<String, u64>,
}

impl RxStats {
    /// Frames dropped for whatever reason.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }
    /// `received - forwarded - held - dropped`: 0 unless a burst is under way.
    pub fn imbalance(&self) -> i128 {
        i128::from(self.frames) - i128::from(self.forwarded) - i128::from(self.held) - i128::from(self.dropped_total())
    }
}

/// What went out of a port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TxStats {
    /// Frames the port took.
    pub frames: u64,
    /// Bytes the port took.
    pub bytes: u64,
    /// Copies it refused, by reason; reasons that never occurred are left out.
    pub refused: BTreeMap<String, u64>,
}

/// Counters of a PMD thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PmdStats {
    /// Its position.
    pub pmd: usize,
    /// CPU core it is pinned to.
    pub core: Option<u32>,
    /// Cycles spent on rounds that moved frames.
    pub busy_cycles: u64,
    /// Cycles spent on rounds that found nothing.
    pub idle_cycles: u64,
    /// Rounds.
    pub iterations: u64,
    /// How often it went to sleep.
    pub sleeps: u64,
    /// Time slept, nanoseconds.
    pub sleep_ns: u64,
    /// Frames received.
    pub frames: u64,
    /// Bursts that held at least one frame.
    pub bursts: u64,
    /// Connections in bursts of which the flow cache knew where their entries are.
    #[serde(default)]
    pub flow_cache_hits: u64,
    /// Those that were searched for in the tables.
    #[serde(default)]
    pub flow_cache_misses: u64,
    /// Where its cycles went, by stage.
    #[serde(default)]
    pub stages: StageCycles,
    /// Queues it serves, as `port/queue`.
    pub queues: Vec<String>,
}

/// Cycles by stage of the packet path, of the bursts that were timed: all but the smallest, and a sample of those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageCycles {
    /// Frames of timed bursts.
    pub frames: u64,
    /// Taking frames from the sender's queue.
    pub receive: u64,
    /// Looking at headers, judging, finding outputs.
    pub route: u64,
    /// Copying frames to their outputs.
    pub send: u64,
    /// Giving buffers back, and counting.
    pub release: u64,
    /// Expiry and ageing, of all rounds.
    pub housekeeping: u64,
}
