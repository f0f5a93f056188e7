//! What the switch's firewall tells, in the words of the API.
use std::collections::BTreeMap;

use ferry_dataplane::conntrack::{Cursor, Flow, Toward};
use ferry_dataplane::enforce::port::DirectionStats;
use ferry_dataplane::enforce::{EventKind, FirewallEvent, PortFirewall, PortFirewallStats, VmFirewall, VmStatus};
use ferry_dataplane::firewall::limits::LimitReason;
use serde_json::json;

use super::{FirewallDirection, FirewallStats, PAGE_BUDGET, Page, VmStats};
use crate::firewall::connection::ConnectionView;
use crate::firewall::filter::Filter;
use crate::firewall::record::{FirewallRecord, FlowView};

/// Places of the table looked at in one step.
const STEP: usize = 4096;

/// A page of `firewall`'s connections. `ports`: names of the VM's ports by number.
pub(super) fn page(
    firewall: &VmFirewall,
    filter: &Filter,
    cursor: u64,
    limit: usize,
    ports: &BTreeMap<u8, String>,
    now_ms: u64,
) -> Page {
    let mut at = Cursor::new(u32::try_from(cursor).unwrap_or(u32::MAX));
    let mut connections = Vec::new();
    let mut looked_at = 0;
    let mut more = true;
    while more && connections.len() < limit && looked_at < PAGE_BUDGET {
        // A place holds one connection at most, so that a step never finds more than are wanted.
        let step = STEP.min(limit - connections.len());
        more = firewall.map().walk(&mut at, step, &mut |c| {
            if !c.is_expired(now_ms) && filter.matches(c) {
                let (number, _) = PortFirewall::split_zone(c.key.zone);
                let port = ports.get(&number).map(String::as_str).unwrap_or_default();
                connections.push(ConnectionView::new(firewall.name(), port, c, now_ms));
            }
        });
        looked_at += step;
    }
    Page { connections, next: more.then(|| u64::from(at.position())) }
}

/// A VM's state. `ports`: the counters of its ports.
pub(super) fn vm_stats(status: &VmStatus, ports: &[PortFirewallStats]) -> VmStats {
    let (mut denied, mut invalid) = (BTreeMap::new(), BTreeMap::new());
    for (reason, count) in ports.iter().flat_map(|p| p.ingress.denied.iter().chain(&p.egress.denied)) {
        let list = if reason.starts_with("ct_") && *reason != "ct_table_full" { &mut invalid } else { &mut denied };
        *list.entry((*reason).to_owned()).or_default() += count;
    }
    let (table, limits, fragments) = (&status.table, &status.limits, &status.fragments);
    let named = |pairs: &[(&str, u64)]| pairs.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect();
    let refused: BTreeMap<&str, u64> = LimitReason::ALL.iter().map(|r| (r.name(), limits.refused_for(*r))).collect();
    VmStats {
        vm: status.name.clone(),
        connections: table.len,
        half_open: u64::from(limits.half_open),
        capacity: table.capacity,
        memory_bytes: table.memory_bytes,
        new: table.inserted,
        denied,
        invalid,
        removed: named(&[
            ("finished", table.finished),
            ("expired", table.expired),
            ("evicted", table.evicted),
            ("flushed", table.flushed),
            ("replaced", table.replaced),
            ("deleted", table.deleted),
        ]),
        fragments: named(&[
            ("bytes_held", status.fragment_bytes_held as u64),
            ("held", fragments.held),
            ("completed", fragments.completed),
            ("timed_out", fragments.timed_out),
            ("refused", fragments.refused),
            ("exhausted", fragments.exhausted),
        ]),
        detail: json!({ "table": table, "limits": limits, "limits_refused": refused, "fragments": fragments }),
    }
}

/// A port's counters.
pub(super) fn port_stats(s: &PortFirewallStats) -> FirewallStats {
    let named = |map: &BTreeMap<&'static str, u64>| map.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect();
    let direction = |d: &DirectionStats| FirewallDirection {
        packets: named(&d.packets),
        policy_lookups: d.policy_lookups,
        reevaluated: d.reevaluated,
        opened: d.opened,
        denied: named(&d.denied),
    };
    FirewallStats {
        vm: s.vm.clone(),
        generation: s.generation,
        rules: s.rules as u64,
        ingress: direction(&s.ingress),
        egress: direction(&s.egress),
        reject: json!(s.reject),
    }
}

/// The kind of denial that a reason is, by its name.
fn kind(reason: &str) -> &'static str {
    match reason {
        "fw_rejected" => "rejected",
        "fw_revoked" => "revoked",
        "ct_table_full" => "limited",
        r if r.starts_with("spoof_") => "spoofed",
        r if r.starts_with("limit_") => "limited",
        r if r.starts_with("ct_") => "invalid",
        r if r.starts_with("fragment_") => "fragment",
        _ => "denied",
    }
}

/// An event with names instead of numbers.
pub(super) fn record(
    e: &FirewallEvent,
    time_unix_ms: u64,
    vm: &str,
    port: &str,
    rule: Option<String>,
) -> FirewallRecord {
    let reason = match e.kind {
        EventKind::New => "",
        EventKind::Denied(reason) => reason.name(),
    };
    FirewallRecord {
        time_unix_ms,
        vm: vm.to_owned(),
        port: port.to_owned(),
        direction: if e.toward == Toward::Ingress { "ingress" } else { "egress" }.to_owned(),
        kind: if e.kind == EventKind::New { "new" } else { kind(reason) }.to_owned(),
        reason: reason.to_owned(),
        rule,
        log: e.log,
        // Of a spoofed packet the addresses that it claims, and the station that sent it.
        link: (e.flow.is_none() || kind(reason) == "spoofed")
            .then(|| format!("{} > {} ethertype 0x{:04x}", e.macs.0, e.macs.1, e.ethertype.0)),
        flow: e.flow.map(|flow| flow_view(&flow, e.vlan)),
    }
}

fn flow_view(flow: &Flow, vlan: u16) -> FlowView {
    let proto = flow.key.proto();
    let port = |p: u16| proto.has_ports().then_some(p);
    FlowView {
        protocol_number: proto.0,
        src: flow.src(),
        dst: flow.dst(),
        sport: port(flow.src_port()),
        dport: port(flow.dst_port()),
        icmp: flow.icmp,
        zone: vlan,
    }
}
