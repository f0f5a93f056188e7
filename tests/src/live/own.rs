//! Ferry's side: tracking and a compiled policy, on a clock that stands still.
use super::{Profile, Side, Step};
use anyhow::{Result, anyhow};
use ferry_dataplane::conntrack::{CtState, Flow, ModelTable, Toward, TrackConfig, Tracked, Tracker};
use ferry_dataplane::firewall::{
    Action, AddressBook, AddressIndex, CompileOptions, CompiledPolicy, Direction, FlowKey, L4Key, PolicyDocument,
    PortPolicy, compile,
};
use ferry_dataplane::packet::EtherType;
use ferry_dataplane::testing::replay::{StepResult, run_step};
use serde_json::json;
use std::sync::Arc;

/// The recordings' policy as a security group: the VM may open anything but SMTP; from outside only web, DNS and ping.
pub struct Policy {
    compiled: CompiledPolicy,
    sets: AddressIndex,
}

impl Policy {
    /// Compiles it.
    ///
    /// # Errors
    /// When it is refused.
    pub fn standard() -> Result<Self> {
        let document: PolicyDocument = serde_json::from_value(json!({"security_groups": {"std": {"rules": [
            {"direction": "egress", "protocol": "tcp", "ports": [25], "action": "drop"},
            {"direction": "egress"},
            {"direction": "ingress", "protocol": "tcp", "ports": [80, 443]},
            {"direction": "ingress", "protocol": "udp", "ports": [53]},
            {"direction": "ingress", "ethertype": "ipv4", "protocol": "icmp", "icmp_type": 8},
            {"direction": "ingress", "ethertype": "ipv6", "protocol": "icmpv6", "icmp_type": 128},
        ]}}}))?;
        let port: PortPolicy = serde_json::from_value(json!({
            "security_groups": ["std"],
            "default_egress": "drop",
            // The kernel's rules have no exception for DHCP.
            "builtin": {"dhcp_client": false},
            "anti_spoofing": {"enabled": false},
        }))?;
        let mut book = AddressBook::new();
        let compiled = compile(&Arc::new(document), &port, "port", &mut book, CompileOptions::default())
            .map_err(|errors| anyhow!("{errors:?}"))?;
        Ok(Self { compiled, sets: book.snapshot(0) })
    }

    /// Whether frames of an EtherType that is not IP's may pass.
    pub fn passes_ethertype(&self, ethertype: EtherType) -> bool {
        self.compiled.passes_ethertype(ethertype)
    }

    /// Whether the packet may pass.
    pub fn allows(&self, tracked: &Tracked) -> bool {
        match tracked.state {
            CtState::Invalid => false,
            CtState::Established | CtState::Related => true,
            CtState::New | CtState::Untracked => tracked.flow.as_ref().is_some_and(|flow| {
                let (direction, key) = flow_key(flow);
                self.compiled.lookup(direction, &key, &self.sets).action == Action::Allow
            }),
        }
    }
}

/// What the policy looks at.
pub fn flow_key(flow: &Flow) -> (Direction, FlowKey) {
    let direction = match flow.toward {
        Toward::Ingress => Direction::Ingress,
        Toward::Egress => Direction::Egress,
    };
    let ports = L4Key::Ports { source: flow.src_port(), destination: flow.dst_port() };
    let l4 = flow.icmp.map_or(ports, |(kind, code)| L4Key::Icmp { kind, code });
    let key = FlowKey { remote: flow.key.remote(), protocol: flow.key.proto().0, l4: Some(l4) };
    (direction, key.consistent())
}

/// One conversation's tracking.
pub struct Own<'p> {
    tracker: Tracker<ModelTable>,
    policy: &'p Policy,
}

impl<'p> Own<'p> {
    /// With an empty table.
    pub fn new(profile: Profile, policy: &'p Policy) -> Self {
        let mut config = TrackConfig::default();
        for (name, on) in profile.switches() {
            match name {
                "nf_conntrack_tcp_loose" => config.tcp_loose = on,
                "nf_conntrack_tcp_be_liberal" => config.tcp_be_liberal = on,
                _ => config.tcp_ignore_invalid_rst = on,
            }
        }
        Self { tracker: Tracker::new(ModelTable::new(1 << 16), config), policy }
    }

    /// Judges a frame.
    pub fn step(&mut self, step: &Step) -> StepResult {
        let toward = if step.from == Side::A { Toward::Egress } else { Toward::Ingress };
        run_step(&mut self.tracker, &step.frame, toward, 0, |tracked| self.policy.allows(tracked))
    }
}
