//! Ferry's side: tracking and a compiled policy, on a clock that stands still.
use super::packet::NETS;
use super::{Profile, Random, Side, Step};
use anyhow::{Result, anyhow};
use ferry_dataplane::conntrack::{CtState, Flow, ModelTable, Toward, TrackConfig, Tracked, Tracker};
use ferry_dataplane::firewall::{
    Action, AddressBook, AddressIndex, CompileOptions, CompiledPolicy, Direction, FlowKey, L4Key, PolicyDocument,
    PortPolicy, compile,
};
use ferry_dataplane::packet::EtherType;
use ferry_dataplane::testing::replay::{StepResult, run_step};
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::sync::Arc;

/// Conversations in a row under one policy.
const BLOCK: u64 = 20;

/// A policy, compiled, and in nftables' words.
pub struct Policy {
    compiled: CompiledPolicy,
    sets: AddressIndex,
    /// Rules on new connections for a chain whose policy is to drop.
    pub nft: Vec<String>,
}

/// How nftables knows who sends.
fn sender(direction: &str) -> &'static str {
    if direction == "egress" { "ether saddr 02:00:00:00:00:0a" } else { "ether saddr 02:00:00:00:00:0b" }
}

impl Policy {
    /// The recordings': the VM may open anything but SMTP; from outside only web, DNS and ping.
    ///
    /// # Errors
    /// When it is refused.
    pub fn standard() -> Result<Self> {
        let rules = json!([
            {"direction": "egress", "protocol": "tcp", "ports": [25], "action": "drop"},
            {"direction": "egress"},
            {"direction": "ingress", "protocol": "tcp", "ports": [80, 443]},
            {"direction": "ingress", "protocol": "udp", "ports": [53]},
            {"direction": "ingress", "ethertype": "ipv4", "protocol": "icmp", "icmp_type": 8},
            {"direction": "ingress", "ethertype": "ipv6", "protocol": "icmpv6", "icmp_type": 128},
        ]);
        let (a, b) = (sender("egress"), sender("ingress"));
        let nft = vec![
            format!("{a} tcp dport 25 drop"),
            format!("{a} accept"),
            format!("{b} tcp dport {{80,443}} accept"),
            format!("{b} udp dport 53 accept"),
            format!("{b} icmp type echo-request accept"),
            format!("{b} icmpv6 type echo-request accept"),
        ];
        Self::new(&rules, "drop", nft)
    }

    /// The policy of a conversation: every other block of seeds has the standard one, the others random ones.
    ///
    /// # Errors
    /// When it is refused.
    pub fn of(seed: u64) -> Result<Self> {
        let block = seed / BLOCK;
        if block.is_multiple_of(2) { Self::standard() } else { Self::random(&mut Random::new(block)) }
    }

    fn random(r: &mut Random) -> Result<Self> {
        let mut rules: Vec<RandomRule> = (0..r.range(2, 16)).map(|_| RandomRule::new(r)).collect();
        let default_egress = r.of(&["drop", "allow"]);
        let json: Vec<Value> = rules.iter().map(|rule| rule.json.clone()).collect();
        // The order that the policy's documentation states.
        rules.sort_by_key(|rule| (Reverse(rule.priority), !rule.drop));
        let mut nft: Vec<String> = rules.into_iter().map(|rule| rule.nft).collect();
        if default_egress == "allow" {
            nft.push(format!("{} accept", sender("egress")));
        }
        Self::new(&Value::Array(json), default_egress, nft)
    }

    fn new(rules: &Value, default_egress: &str, nft: Vec<String>) -> Result<Self> {
        let document: PolicyDocument = serde_json::from_value(json!({"security_groups": {"group": {"rules": rules}}}))?;
        let port: PortPolicy = serde_json::from_value(json!({
            "security_groups": ["group"],
            "default_egress": default_egress,
            // The kernel's rules have no exception for DHCP.
            "builtin": {"dhcp_client": false},
            "anti_spoofing": {"enabled": false},
        }))?;
        let mut book = AddressBook::new();
        let compiled = compile(&Arc::new(document), &port, "port", &mut book, CompileOptions::default())
            .map_err(|errors| anyhow!("{errors:?}"))?;
        Ok(Self { compiled, sets: book.snapshot(0), nft })
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

/// A rule in both languages.
struct RandomRule {
    priority: u16,
    drop: bool,
    json: Value,
    nft: String,
}

impl RandomRule {
    fn new(r: &mut Random) -> Self {
        let direction = r.of(&["ingress", "ingress", "egress"]);
        let mut json = json!({"direction": direction});
        let mut nft = vec![sender(direction).to_owned()];
        let family = r.of(&["any", "ipv4", "ipv6"]);
        json["ethertype"] = json!(family);
        if family != "any" {
            nft.push(format!("meta nfproto {family}"));
        }
        let protocol = r.of(&["any", "any", "tcp", "tcp", "udp", "udp", "sctp", "icmp", "gre", "103"]);
        let number = match (protocol, family) {
            ("any", _) => None,
            // Stands for two protocols when the family is not stated, which nftables cannot say in one rule.
            ("icmp", "ipv4") => Some("1"),
            ("icmp", "ipv6") => Some("58"),
            ("tcp" | "icmp", _) => Some("6"),
            ("udp", _) => Some("17"),
            ("sctp", _) => Some("132"),
            ("gre", _) => Some("47"),
            (other, _) => Some(other),
        };
        if let Some(number) = number {
            json["protocol"] = json!(number.parse::<u8>().unwrap_or_default());
            nft.push(format!("meta l4proto {number}"));
        }
        if let Some("6" | "17" | "132") = number {
            for (field, name) in [("ports", "dport"), ("source_ports", "sport")] {
                let percent = if field == "ports" { 70 } else { 15 };
                if !r.percent(percent) {
                    continue;
                }
                let ranges: Vec<String> = (0..r.range(1, 4))
                    .map(|_| match r.range(0, 5) {
                        0 => "1024-65535".to_owned(),
                        1 => "20-99".to_owned(),
                        _ => {
                            let port = r.of(&[22u16, 25, 53, 80, 443, 3868, 99]);
                            format!("{port}-{}", port + r.of(&[0, 0, 1, 400]))
                        }
                    })
                    .collect();
                json[field] = json!(ranges);
                let alternatives = ranges.join(",");
                // Overlapping intervals, merged.
                nft.push(format!("th {name} {{{}}}", merged(&alternatives)));
            }
        }
        if let Some("1" | "58") = number
            && r.percent(60)
        {
            let (kind, word) =
                if number == Some("1") { (r.of(&[8, 13, 17]), "icmp") } else { (r.of(&[128, 139]), "icmpv6") };
            json["icmp_type"] = json!(kind);
            nft.push(format!("{word} type {kind}"));
            if r.percent(30) {
                json["icmp_code"] = json!(0);
                nft.push(format!("{word} code 0"));
            }
        }
        if family != "any" && r.percent(35) {
            // Around the addresses that `Hosts` gives; seeds near each other share the longer prefixes.
            let net = r.of(&NETS);
            let at = if direction == "ingress" { "saddr" } else { "daddr" };
            let cidr = if family == "ipv4" {
                r.of(&[
                    format!("{net}.0.0.0/8"),
                    format!("{net}.0.0.0/20"),
                    format!("{net}.0.{}.0/25", r.clone().range(0, 8)),
                ]
                .each_ref())
                    .clone()
            } else {
                let net = format!("{net:x}");
                r.of(&[format!("fd00:{net}::/32"), format!("fd00:{net}::/117"), "fd00::/16".to_owned()].each_ref())
                    .clone()
            };
            json["remote_cidr"] = json!(cidr);
            nft.push(format!("{} {at} {cidr}", if family == "ipv4" { "ip" } else { "ip6" }));
        }
        let drop = r.percent(30);
        let priority = r.of(&[1000, 1000, 1000, 500, 2000]);
        json["priority"] = json!(priority);
        json["action"] = json!(if drop { "drop" } else { "allow" });
        nft.push(if drop { "drop" } else { "accept" }.to_owned());
        Self { priority, drop, json, nft: nft.join(" ") }
    }
}

/// `FIRST-LAST,...` without overlaps, which nftables' sets do not take.
fn merged(ranges: &str) -> String {
    let mut list: Vec<(u32, u32)> = ranges
        .split(',')
        .filter_map(|range| range.split_once('-'))
        .filter_map(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)))
        .collect();
    list.sort_unstable();
    let mut out: Vec<(u32, u32)> = Vec::new();
    for (first, last) in list {
        match out.last_mut() {
            Some(before) if first <= before.1 + 1 => before.1 = before.1.max(last),
            _ => out.push((first, last)),
        }
    }
    out.iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_are_merged() {
        assert_eq!(merged("80-80,22-22,20-99,443-500,100-100"), "20-100,443-500");
        assert_eq!(merged("80-80"), "80");
    }

    #[test]
    fn random_policies_are_valid() {
        for seed in 0..2000 {
            Policy::of(seed).unwrap();
        }
    }
}
