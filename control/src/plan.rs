//! From the running state to a desired one: the steps, their order, and how each is undone.
//!
//! Pure: nothing here touches the switch. The order serves "whole or not at all": steps that may fail and harm
//! nothing come first (new threads, bridges, ports), what cannot be had back unharmed comes last (removals).
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use ferry_dataplane::firewall::PolicyDocument;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{
    self, BridgeConfig, Config, DpdkConfig, FlowLogConfig, MAX_PORTS, MigrationConfig, PmdSpec, PortConfig, VmSpec,
};

/// Lists of named entries in the configuration.
const LISTS: [&str; 3] = ["vm", "bridge", "port"];
/// Tables of named entries.
const NAMED: [&str; 2] = ["security_group", "address_set"];

/// Which PMD thread serves which receive queue: `(port, queue)` to thread.
pub type Placement = BTreeMap<(String, u32), usize>;

/// What runs: the configuration in effect and where the queues are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// In effect.
    pub config: Config,
    /// PMD threads that exist; empty only before the first start.
    pub pmds: Vec<PmdSpec>,
    /// Queues on them.
    pub placement: Placement,
}

/// One change to the switch.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Sets what DPDK will be started with.
    SetDpdk {
        /// Before.
        from: DpdkConfig,
        /// After.
        to: DpdkConfig,
    },
    /// Starts PMD thread `index`, the next one.
    AddPmd {
        /// Its position.
        index: usize,
        /// Its settings.
        spec: PmdSpec,
    },
    /// Replaces PMD thread `index` by one with other settings; its queues move along.
    UpdatePmd {
        /// Its position.
        index: usize,
        /// Before.
        from: PmdSpec,
        /// After.
        to: PmdSpec,
    },
    /// Ends PMD thread `index`, the last one. It serves no queue any more.
    RemovePmd {
        /// Its position.
        index: usize,
        /// Its settings.
        spec: PmdSpec,
    },
    /// Adds a bridge.
    AddBridge(BridgeConfig),
    /// Changes a bridge's settings.
    UpdateBridge {
        /// Before.
        from: BridgeConfig,
        /// After.
        to: BridgeConfig,
    },
    /// Removes a bridge without ports.
    RemoveBridge(BridgeConfig),
    /// Adds a VM: its connection table, empty.
    AddVm(VmSpec),
    /// Changes a VM's settings.
    UpdateVm {
        /// Before.
        from: VmSpec,
        /// After.
        to: VmSpec,
    },
    /// Removes a VM without ports, and its connections.
    RemoveVm(VmSpec),
    /// Replaces security groups and address sets, for all ports at once.
    SetPolicy {
        /// Before.
        from: Box<PolicyDocument>,
        /// After.
        to: Box<PolicyDocument>,
    },
    /// Sets what the flow log holds and where it goes.
    SetFlowLog {
        /// Before.
        from: FlowLogConfig,
        /// After.
        to: FlowLogConfig,
    },
    /// Sets how VMs' connections migrate.
    SetMigration {
        /// Before.
        from: Box<MigrationConfig>,
        /// After.
        to: Box<MigrationConfig>,
    },
    /// Adds a port.
    AddPort {
        /// What it is.
        port: PortConfig,
        /// PMD thread of each receive queue.
        placed: Vec<usize>,
    },
    /// Changes what the switch keeps of a port; the port itself is not disturbed.
    UpdatePort {
        /// Before.
        from: Box<PortConfig>,
        /// After.
        to: Box<PortConfig>,
    },
    /// Removes a port.
    RemovePort {
        /// What it was.
        port: PortConfig,
        /// PMD thread of each receive queue.
        placed: Vec<usize>,
    },
    /// Moves a receive queue to another PMD thread.
    Assign {
        /// The port.
        port: String,
        /// The queue.
        queue: u32,
        /// The thread before.
        from: usize,
        /// The thread after.
        to: usize,
    },
    /// Sets the log filter.
    SetLogLevel {
        /// Before.
        from: String,
        /// After.
        to: String,
    },
}

impl Step {
    /// The step that takes this one back.
    pub fn undo(self) -> Step {
        match self {
            Step::SetDpdk { from, to } => Step::SetDpdk { from: to, to: from },
            Step::AddPmd { index, spec } => Step::RemovePmd { index, spec },
            Step::RemovePmd { index, spec } => Step::AddPmd { index, spec },
            Step::UpdatePmd { index, from, to } => Step::UpdatePmd { index, from: to, to: from },
            Step::AddBridge(b) => Step::RemoveBridge(b),
            Step::RemoveBridge(b) => Step::AddBridge(b),
            Step::UpdateBridge { from, to } => Step::UpdateBridge { from: to, to: from },
            Step::AddVm(vm) => Step::RemoveVm(vm),
            Step::RemoveVm(vm) => Step::AddVm(vm),
            Step::UpdateVm { from, to } => Step::UpdateVm { from: to, to: from },
            Step::SetPolicy { from, to } => Step::SetPolicy { from: to, to: from },
            Step::SetFlowLog { from, to } => Step::SetFlowLog { from: to, to: from },
            Step::SetMigration { from, to } => Step::SetMigration { from: to, to: from },
            Step::AddPort { port, placed } => Step::RemovePort { port, placed },
            Step::RemovePort { port, placed } => Step::AddPort { port, placed },
            Step::UpdatePort { from, to } => Step::UpdatePort { from: to, to: from },
            Step::Assign { port, queue, from, to } => Step::Assign { port, queue, from: to, to: from },
            Step::SetLogLevel { from, to } => Step::SetLogLevel { from: to, to: from },
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::SetDpdk { .. } => f.write_str("set DPDK's environment"),
            Step::AddPmd { index, .. } => write!(f, "start PMD thread {index}"),
            Step::UpdatePmd { index, .. } => write!(f, "replace PMD thread {index}"),
            Step::RemovePmd { index, .. } => write!(f, "stop PMD thread {index}"),
            Step::AddBridge(b) => write!(f, "add bridge {}", b.name),
            Step::UpdateBridge { to, .. } => write!(f, "change bridge {}", to.name),
            Step::RemoveBridge(b) => write!(f, "remove bridge {}", b.name),
            Step::AddVm(vm) => write!(f, "add VM {}", vm.name),
            Step::UpdateVm { to, .. } => write!(f, "change VM {}", to.name),
            Step::RemoveVm(vm) => write!(f, "remove VM {}", vm.name),
            Step::SetPolicy { .. } => f.write_str("set security groups and address sets"),
            Step::SetFlowLog { .. } => f.write_str("set the flow log"),
            Step::SetMigration { .. } => f.write_str("set up migration of VMs' connections"),
            Step::AddPort { port, .. } => write!(f, "add port {}", port.name),
            Step::UpdatePort { to, .. } => write!(f, "change port {}", to.name),
            Step::RemovePort { port, .. } => write!(f, "remove port {}", port.name),
            Step::Assign { port, queue, to, .. } => write!(f, "assign port {port} queue {queue} to PMD thread {to}"),
            Step::SetLogLevel { to, .. } => write!(f, "set the log level to {to}"),
        }
    }
}

/// How to get from one state to another.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// The state afterwards.
    pub target: State,
    /// Keys whose change takes effect only at the next start; the target keeps their running values.
    pub restart_required: Vec<String>,
    /// Ports that exist before and after and are interrupted.
    pub restarted_ports: Vec<String>,
}

/// Plans the way from `from` to the configuration `to`, which has been checked.
/// `dpdk_started`: DPDK runs already, so that its environment is fixed.
pub fn plan(from: &State, to: &Config, dpdk_started: bool) -> Plan {
    let mut to = to.clone();
    let running = &from.config;
    let mut restart_required = Vec::new();
    if !from.pmds.is_empty() {
        keep_fixed(running, &mut to, dpdk_started, &mut restart_required);
    }

    let mut steps = Vec::new();
    if running.log.level != to.log.level {
        steps.push(Step::SetLogLevel { from: running.log.level.clone(), to: to.log.level.clone() });
    }
    if running.dpdk != to.dpdk {
        steps.push(Step::SetDpdk { from: running.dpdk.clone(), to: to.dpdk.clone() });
    }

    if running.flow_log != to.flow_log {
        steps.push(Step::SetFlowLog { from: running.flow_log.clone(), to: to.flow_log.clone() });
    }
    if running.migration != to.migration {
        let (from, to) = (Box::new(running.migration.clone()), Box::new(to.migration.clone()));
        steps.push(Step::SetMigration { from, to });
    }

    let pmds = to.pmds();
    for (index, &spec) in pmds.iter().enumerate() {
        match from.pmds.get(index) {
            None => steps.push(Step::AddPmd { index, spec }),
            Some(&old) if old != spec => steps.push(Step::UpdatePmd { index, from: old, to: spec }),
            Some(_) => {}
        }
    }
    for bridge in &to.bridge {
        match running.bridge(&bridge.name) {
            None => steps.push(Step::AddBridge(bridge.clone())),
            Some(old) if old != bridge => steps.push(Step::UpdateBridge { from: old.clone(), to: bridge.clone() }),
            Some(_) => {}
        }
    }

    let (old_vms, new_vms) = (running.vm_specs(), to.vm_specs());
    for (name, vm) in &new_vms {
        match old_vms.get(name) {
            None => steps.push(Step::AddVm(vm.clone())),
            Some(old) if old != vm => steps.push(Step::UpdateVm { from: old.clone(), to: vm.clone() }),
            Some(_) => {}
        }
    }
    // Ports still refer to groups that go, others already to groups that come: both are there while ports change.
    let (old_policy, new_policy) = (running.policy(), to.policy());
    let meanwhile = union(&new_policy, &old_policy);
    let set_policy = |from: &PolicyDocument, to: &PolicyDocument| {
        (from != to).then(|| Step::SetPolicy { from: Box::new(from.clone()), to: Box::new(to.clone()) })
    };
    steps.extend(set_policy(&old_policy, &meanwhile));

    let added: Vec<&PortConfig> = to.port.iter().filter(|p| running.port(&p.name).is_none()).collect();
    let removed: Vec<&PortConfig> = running.port.iter().filter(|p| to.port(&p.name).is_none()).collect();
    let kept: Vec<(&PortConfig, &PortConfig)> = to
        .port
        .iter()
        .filter_map(|new| Some((running.port(&new.name)?, new)))
        .filter(|(old, new)| old != new)
        .collect();
    let (changed, recreated): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(old, new)| old.live_change(new));
    let fresh: BTreeSet<&str> =
        added.iter().map(|p| p.name.as_str()).chain(recreated.iter().map(|(_, new)| new.name.as_str())).collect();
    let placement = place(&from.placement, &fresh, &to, pmds.len());
    let remove = |port: &PortConfig| Step::RemovePort { port: port.clone(), placed: placed(&from.placement, port) };
    let add = |port: &PortConfig| Step::AddPort { port: port.clone(), placed: placed(&placement, port) };

    // What one port gives up and another takes must be free first.
    let wanted: BTreeSet<(String, &str)> = added
        .iter()
        .copied()
        .chain(recreated.iter().map(|(_, new)| *new))
        .map(|p| (p.resource(), p.name.as_str()))
        .collect();
    let full = running.port.len() + added.len() > MAX_PORTS;
    let contested = |old: &PortConfig| {
        full || wanted.iter().any(|(resource, name)| *resource == old.resource() && *name != old.name)
    };
    let (early, late): (Vec<&PortConfig>, Vec<&PortConfig>) = removed.into_iter().partition(|p| contested(p));
    let (recreated_early, recreated_late): (Vec<_>, Vec<_>) = recreated.iter().partition(|(old, _)| contested(old));

    steps.extend(early.into_iter().map(remove));
    steps.extend(recreated_early.iter().map(|(old, _)| remove(old)));
    steps.extend(added.iter().map(|p| add(p)));
    steps.extend(recreated_early.iter().map(|(_, new)| add(new)));
    let boxed = |port: &PortConfig| Box::new(port.clone());
    steps.extend(changed.iter().map(|(old, new)| Step::UpdatePort { from: boxed(old), to: boxed(new) }));
    for (old, new) in &recreated_late {
        steps.extend([remove(old), add(new)]);
    }

    for ((port, queue), &pmd) in &placement {
        match from.placement.get(&(port.clone(), *queue)) {
            Some(&before) if before != pmd && !fresh.contains(port.as_str()) => {
                steps.push(Step::Assign { port: port.clone(), queue: *queue, from: before, to: pmd });
            }
            _ => {}
        }
    }

    steps.extend(late.into_iter().map(remove));
    steps.extend(set_policy(&meanwhile, &new_policy));
    let gone = old_vms.into_iter().filter(|(name, _)| !new_vms.contains_key(name));
    steps.extend(gone.map(|(_, vm)| Step::RemoveVm(vm)));
    let gone = running.bridge.iter().filter(|b| to.bridge(&b.name).is_none());
    steps.extend(gone.map(|b| Step::RemoveBridge(b.clone())));
    for (index, &spec) in from.pmds.iter().enumerate().skip(pmds.len()).rev() {
        steps.push(Step::RemovePmd { index, spec });
    }

    let restarted_ports = recreated.iter().map(|(_, new)| new.name.clone()).collect();
    Plan { steps, target: State { config: to, pmds, placement }, restart_required, restarted_ports }
}

/// All groups and sets of both; of `first` where both have one of the same name.
fn union(first: &PolicyDocument, second: &PolicyDocument) -> PolicyDocument {
    let mut out = first.clone();
    for (name, group) in &second.security_groups {
        out.security_groups.entry(name.clone()).or_insert_with(|| group.clone());
    }
    for (name, set) in &second.address_sets {
        out.address_sets.entry(name.clone()).or_insert_with(|| set.clone());
    }
    out
}

fn placed(placement: &Placement, port: &PortConfig) -> Vec<usize> {
    (0..port.rx_queues()).filter_map(|q| placement.get(&(port.name.clone(), q)).copied()).collect()
}

/// Puts back what cannot change while the daemon runs, and names it.
fn keep_fixed(running: &Config, to: &mut Config, dpdk_started: bool, named: &mut Vec<String>) {
    fn differing(section: &str, a: &impl Serialize, b: &impl Serialize, named: &mut Vec<String>) {
        let (a, b) = (serde_json::to_value(a).unwrap_or_default(), serde_json::to_value(b).unwrap_or_default());
        named.extend(key_changes(&a, &b).into_iter().map(|c| format!("{section}.{}", c.key)));
    }
    differing("api", &running.api, &to.api, named);
    to.api = running.api.clone();
    differing("metrics", &running.metrics, &to.metrics, named);
    to.metrics = running.metrics.clone();
    if dpdk_started {
        differing("dpdk", &running.dpdk, &to.dpdk, named);
        to.dpdk = running.dpdk.clone();
    }
    if running.log.format != to.log.format {
        named.push("log.format".to_owned());
        to.log.format = running.log.format;
    }
}

/// Chooses PMD threads for all queues: as configured; else where they are; else where fewest are.
fn place(old: &Placement, fresh: &BTreeSet<&str>, config: &Config, pmds: usize) -> Placement {
    let mut out = Placement::new();
    let mut load = vec![0usize; pmds];
    let mut open = Vec::new();
    for port in &config.port {
        for queue in 0..port.rx_queues() {
            let key = (port.name.clone(), queue);
            let configured = match port.rxq_affinity.len() {
                0 => None,
                n => port.rxq_affinity.get(queue as usize % n).map(|p| *p as usize),
            };
            let stays = old.get(&key).copied().filter(|_| !fresh.contains(port.name.as_str()));
            match configured.or(stays).filter(|p| *p < pmds) {
                Some(pmd) => {
                    load[pmd] += 1;
                    out.insert(key, pmd);
                }
                None => open.push(key),
            }
        }
    }
    for key in open {
        let least = load.iter().enumerate().min_by_key(|(i, n)| (**n, *i)).map_or(0, |(i, _)| i);
        if let Some(n) = load.get_mut(least) {
            *n += 1;
        }
        out.insert(key, least);
    }
    out
}

/// What became of an entry of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// Keys of it differ.
    Changed,
}

/// One difference between two configurations, for people and for the API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// `port`, `bridge`, `vm`, `security_group`, `address_set`, or the name of a table such as `switch`.
    pub what: String,
    /// Name of the port, bridge ...; empty for tables.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// What became of it.
    pub change: Kind,
    /// The keys that differ, for [`Kind::Changed`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyChange>,
}

/// One key that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeyChange {
    /// Path of the key within its entry.
    pub key: String,
    /// Value before; null: absent.
    pub from: Value,
    /// Value after; null: absent.
    pub to: Value,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if !self.name.is_empty() {
            write!(f, " {}", self.name)?;
        }
        match self.change {
            Kind::Added => f.write_str(" added"),
            Kind::Removed => f.write_str(" removed"),
            Kind::Changed => {
                let show = |v: &Value| match v {
                    Value::Null => "(unset)".to_owned(),
                    Value::Array(items) if v.to_string().len() > MAX_SHOWN_BYTES => {
                        format!("[{} entries]", items.len())
                    }
                    v => v.to_string(),
                };
                let keys = self.keys.iter().map(|k| format!("{}: {} -> {}", k.key, show(&k.from), show(&k.to)));
                write!(f, " changed ({})", keys.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// Longest list that is written out in a line about a change, bytes.
const MAX_SHOWN_BYTES: usize = 200;

/// All differences between two configurations.
pub fn describe(from: &Config, to: &Config) -> Vec<Change> {
    let (a, b) = (config::to_tree(from), config::to_tree(to));
    let mut out = Vec::new();
    for table in ["switch", "api", "metrics", "log", "dpdk", "flow_log", "migration"] {
        let keys = key_changes(&a[table], &b[table]);
        if !keys.is_empty() {
            out.push(Change { what: table.into(), name: String::new(), change: Kind::Changed, keys });
        }
    }
    for what in NAMED.into_iter().chain(LISTS) {
        let (old, new) = (by_name(&a[what]), by_name(&b[what]));
        for (name, v) in &new {
            let (change, keys) = match old.get(name) {
                None => (Kind::Added, Vec::new()),
                Some(o) if o != v => (Kind::Changed, key_changes(o, v)),
                Some(_) => continue,
            };
            out.push(Change { what: what.into(), name: name.clone(), change, keys });
        }
        for name in old.keys().filter(|n| !new.contains_key(*n)) {
            out.push(Change { what: what.into(), name: name.clone(), change: Kind::Removed, keys: Vec::new() });
        }
    }
    out
}

fn key_changes(a: &Value, b: &Value) -> Vec<KeyChange> {
    fn walk(a: &Value, b: &Value, at: &str, out: &mut Vec<KeyChange>) {
        if a == b {
            return;
        }
        match (a, b) {
            (Value::Object(x), Value::Object(y)) => {
                let names: BTreeSet<&String> = x.keys().chain(y.keys()).collect();
                for n in names {
                    let path = if at.is_empty() { n.clone() } else { format!("{at}.{n}") };
                    walk(x.get(n).unwrap_or(&Value::Null), y.get(n).unwrap_or(&Value::Null), &path, out);
                }
            }
            _ => out.push(KeyChange { key: at.to_owned(), from: a.clone(), to: b.clone() }),
        }
    }
    let mut out = Vec::new();
    walk(a, b, "", &mut out);
    out
}

/// The entries of a list, or of a table, by their names.
fn by_name(list: &Value) -> Map<String, Value> {
    if let Value::Object(map) = list {
        return map.clone();
    }
    let items = list.as_array().into_iter().flatten();
    items.filter_map(|v| Some((v.get("name")?.as_str()?.to_owned(), v.clone()))).collect()
}

/// Carries the difference between two versions of the file over to what runs. Where the file did not change, changes made at run time
/// stay; where it did, the file wins. The result is a value tree still to be checked.
pub fn merge(old_file: &Config, new_file: &Config, running: &Config) -> Value {
    let keyed = |c: &Config| {
        let mut tree = config::to_tree(c);
        for list in LISTS {
            tree[list] = Value::Object(by_name(&tree[list]));
        }
        tree
    };
    let merged = merge_values(Some(keyed(old_file)), Some(keyed(new_file)), Some(keyed(running)));
    let mut tree = merged.unwrap_or_default();
    let order = |names: Vec<&String>| -> HashMap<String, usize> {
        let mut order = HashMap::new();
        for n in names {
            let next = order.len();
            order.entry(n.clone()).or_insert(next);
        }
        order
    };
    let orders = [
        ("vm", order(new_file.vm.iter().chain(&running.vm).map(|v| &v.name).collect())),
        ("bridge", order(new_file.bridge.iter().chain(&running.bridge).map(|b| &b.name).collect())),
        ("port", order(new_file.port.iter().chain(&running.port).map(|p| &p.name).collect())),
    ];
    for (list, order) in orders {
        if let Some(map) = tree[list].as_object() {
            let mut items: Vec<(&String, &Value)> = map.iter().collect();
            items.sort_by_key(|(name, _)| order.get(*name).copied());
            tree[list] = items.into_iter().map(|(_, v)| v.clone()).collect();
        }
    }
    tree
}

fn merge_values(old: Option<Value>, new: Option<Value>, running: Option<Value>) -> Option<Value> {
    if old == new {
        return running;
    }
    if running == old {
        return new;
    }
    match (old, new, running) {
        (Some(Value::Object(mut o)), Some(Value::Object(mut n)), Some(Value::Object(mut r))) => {
            let names: BTreeSet<String> = o.keys().chain(n.keys()).chain(r.keys()).cloned().collect();
            let merged = names.into_iter().filter_map(|k| {
                let v = merge_values(o.remove(&k), n.remove(&k), r.remove(&k))?;
                Some((k, v))
            });
            Some(Value::Object(merged.collect()))
        }
        (_, new, _) => new,
    }
}
