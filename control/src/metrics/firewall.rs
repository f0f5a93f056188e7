//! Metrics of the firewall: by VM, and by port.
use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::{Labels, counters, gauges, with};
use crate::core::Core;
use crate::engine::{FirewallDirection, FirewallStats, VmStats};
use crate::firewall::flow_log::FlowLogCounters;

/// Everything about firewalls that is exported, at one moment.
#[derive(Debug)]
pub(super) struct FirewallSnapshot {
    vms: Vec<VmStats>,
    ports: BTreeMap<String, FirewallStats>,
    lost_reports: u64,
    flow_log: FlowLogCounters,
}

impl FirewallSnapshot {
    pub(super) fn of(core: &Core) -> Self {
        let engine = core.engine();
        Self {
            vms: core.config().vms().keys().filter_map(|name| engine.vm_stats(name).ok()).collect(),
            ports: engine.firewall_stats(),
            lost_reports: core.observer().lost(),
            flow_log: core.observer().flow_log(),
        }
    }

    fn vms(&self) -> impl Iterator<Item = (Labels, &VmStats)> {
        self.vms.iter().map(|v| (vec![("vm", v.vm.clone())], v))
    }

    fn directions(&self) -> impl Iterator<Item = (Labels, &FirewallDirection)> {
        self.ports.iter().flat_map(|(port, s)| {
            [("ingress", &s.ingress), ("egress", &s.egress)].map(|(name, d)| {
                let labels = vec![("port", port.clone()), ("vm", s.vm.clone()), ("direction", name.to_owned())];
                (labels, d)
            })
        })
    }

    pub(super) fn encode(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let gauge = |f: fn(&VmStats) -> u64| self.vms().map(move |(l, v)| (l, f(v) as i64));
        gauges(e, "ferry_vm_connections", "Connections in the VM's table", gauge(|v| v.connections))?;
        gauges(
            e,
            "ferry_vm_half_open_connections",
            "Connections that only one side has been heard of",
            gauge(|v| v.half_open),
        )?;
        gauges(e, "ferry_vm_connection_capacity", "Connections the VM's table holds", gauge(|v| v.capacity))?;
        gauges(e, "ferry_vm_table_bytes", "Memory reserved for the VM's table", gauge(|v| v.memory_bytes))?;
        counters(e, "ferry_vm_new_connections", "Connections that began", self.vms().map(|(l, v)| (l, v.new)))?;
        let by = |label: &'static str, f: fn(&VmStats) -> &BTreeMap<String, u64>| {
            self.vms().flat_map(move |(l, v)| f(v).iter().map(move |(k, n)| (with(l.clone(), label, k), *n)))
        };
        counters(
            e,
            "ferry_vm_denied_packets",
            "Packets that the firewall denied, by reason; reasons that never occurred are left out",
            by("reason", |v| &v.denied),
        )?;
        counters(
            e,
            "ferry_vm_invalid_packets",
            "Packets that connection tracking found invalid, by reason; reasons that never occurred are left out",
            by("reason", |v| &v.invalid),
        )?;
        counters(
            e,
            "ferry_vm_removed_connections",
            "Connections that ended, by how: finished, expired, evicted ...",
            by("how", |v| &v.removed),
        )?;
        let fragments =
            || self.vms().flat_map(|(l, v)| v.fragments.iter().map(move |(k, n)| (with(l.clone(), "what", k), *n)));
        let held = "bytes_held";
        let is_held = move |l: &Labels| l.iter().any(|(_, v)| v == held);
        counters(
            e,
            "ferry_vm_fragments",
            "What became of fragments and their datagrams",
            fragments().filter(move |(l, _)| !is_held(l)),
        )?;
        gauges(
            e,
            "ferry_vm_fragment_bytes",
            "Fragments held now",
            self.vms().map(|(l, v)| (l, v.fragments.get(held).copied().unwrap_or(0) as i64)),
        )?;
        counters(
            e,
            "ferry_port_firewall_packets",
            "Packets that the port's firewall judged, by connection state",
            self.directions().flat_map(|(l, d)| d.packets.iter().map(move |(k, n)| (with(l.clone(), "state", k), *n))),
        )?;
        counters(
            e,
            "ferry_port_firewall_denied_packets",
            "Packets that the port's firewall dropped, by reason (spoof_...: anti-spoofing)",
            self.directions().flat_map(|(l, d)| d.denied.iter().map(move |(k, n)| (with(l.clone(), "reason", k), *n))),
        )?;
        counters(
            e,
            "ferry_port_firewall_policy_lookups",
            "Packets for which the rules were asked",
            self.directions().map(|(l, d)| (l, d.policy_lookups)),
        )?;
        counters(
            e,
            "ferry_port_firewall_reevaluated_connections",
            "Connections judged again because the rules had changed",
            self.directions().map(|(l, d)| (l, d.reevaluated)),
        )?;
        let one = |n| std::iter::once((Labels::new(), n));
        counters(
            e,
            "ferry_firewall_lost_reports",
            "Reports of single packets that came faster than they could be kept",
            one(self.lost_reports),
        )?;
        counters(e, "ferry_flow_log_lines", "Lines of the flow log that were written", one(self.flow_log.written))?;
        counters(e, "ferry_flow_log_lost_lines", "Lines of the flow log that were not written", one(self.flow_log.lost))
    }
}
