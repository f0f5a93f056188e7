//! Policies as operators write them: reading, writing, and what is said about mistakes.
use std::sync::Arc;

use ferry_dataplane::firewall::explain::{Explainer, Stage};
use ferry_dataplane::firewall::limits::{LimitsConfig, VmLimits};
use ferry_dataplane::firewall::policy::{MAX_RULES_PER_PORT, PortRange, Protocol};
use ferry_dataplane::firewall::spoof::{SpoofConfig, SpoofTable};
use ferry_dataplane::firewall::{
    Action, AddressBook, CompileOptions, Direction, FlowKey, L4Key, PolicyDocument, PolicyError, PortPolicy, Rule,
    SecurityGroup, SetKey, compile,
};
use ferry_dataplane::packet::parse;

const DOCUMENT: &str = r#"{
  "security_groups": {
    "web": {
      "description": "front ends",
      "rules": [
        {"direction": "ingress", "protocol": "tcp", "ports": [80, 443, "8000-8099"]},
        {"direction": "ingress", "ethertype": "ipv4", "protocol": "icmp", "icmp_type": 8, "icmp_code": 0},
        {"direction": "egress"},
        {"name": "no mail", "direction": "egress", "protocol": "tcp", "ports": [25], "action": "reject", "log": true}
      ]
    },
    "db": {
      "rules": [
        {"direction": "ingress", "protocol": 6, "ports": ["5432"], "remote_group": "web"},
        {"direction": "ingress", "protocol": "tcp", "ports": [22], "remote_cidr": "192.0.2.0/24", "priority": 2000},
        {"direction": "ingress", "protocol": "udp", "source_ports": [123], "remote_address_set": "ntp", "stateless": true}
      ]
    }
  },
  "address_sets": {"ntp": {"addresses": ["198.51.100.1", "2001:db8::/64"]}}
}"#;

fn document() -> PolicyDocument {
    serde_json::from_str(DOCUMENT).unwrap()
}

#[test]
fn reads_what_operators_write() {
    let document = document();
    document.validate().unwrap();
    let rules = &document.security_groups["web"].rules;
    assert_eq!(rules[0].ports, [PortRange::single(80), PortRange::single(443), PortRange { first: 8000, last: 8099 }]);
    assert_eq!((rules[0].action, rules[0].priority, rules[0].protocol), (Action::Allow, 1000, Protocol::TCP));
    let lines: Vec<String> = document.security_groups.values().flat_map(|g| &g.rules).map(Rule::to_string).collect();
    assert_eq!(
        lines,
        [
            "ingress tcp ports 5432 from group web allow",
            "ingress tcp ports 22 from 192.0.2.0/24 allow priority 2000",
            "ingress udp source-ports 123 from set ntp allow stateless",
            "ingress tcp ports 80,443,8000-8099 allow",
            "ingress ipv4 icmp type 8 code 0 allow",
            "egress allow",
            "egress tcp ports 25 reject log",
        ]
    );
}

#[test]
fn what_is_written_reads_back() {
    let document = document();
    let text = serde_json::to_string(&document).unwrap();
    assert_eq!(serde_json::from_str::<PolicyDocument>(&text).unwrap(), document);
    // What is not stated is not written.
    let rule = serde_json::to_string(&document.security_groups["web"].rules[0]).unwrap();
    assert_eq!(
        rule,
        r#"{"direction":"ingress","ethertype":"any","protocol":"tcp","ports":[80,443,"8000-8099"],"action":"allow"}"#
    );
    let port = PortPolicy { security_groups: vec!["web".into()], ..PortPolicy::default() };
    let text = serde_json::to_string(&port).unwrap();
    assert_eq!(serde_json::from_str::<PortPolicy>(&text).unwrap(), port);
    assert_eq!(serde_json::from_str::<PortPolicy>("{}").unwrap(), PortPolicy::default());
}

#[test]
fn defaults_are_strict() {
    let port = PortPolicy::default();
    assert_eq!((port.default_ingress, port.default_egress), (Action::Drop, Action::Allow));
    assert!(port.anti_spoofing.enabled);
    assert!(!port.anti_spoofing.allow_dhcp_server && !port.anti_spoofing.allow_router_advertisements);
}

#[test]
fn protocols_by_name_and_number() {
    for (text, protocol) in [
        ("any", Protocol::Any),
        ("tcp", Protocol::TCP),
        ("icmp", Protocol::Icmp),
        ("icmpv6", Protocol::ICMPV6),
        ("gre", Protocol::Number(47)),
        ("200", Protocol::Number(200)),
    ] {
        assert_eq!(text.parse::<Protocol>().unwrap(), protocol);
        assert_eq!(protocol.to_string(), text);
    }
    assert_eq!("ipv6-icmp".parse::<Protocol>().unwrap(), Protocol::ICMPV6);
    for bad in ["TCP", "", "256", "-1", "+6", "tcp "] {
        assert!(bad.parse::<Protocol>().is_err(), "{bad:?}");
    }
    for bad in ["", "1-", "-1", "2-1", "65536", "1-2-3", "+1", "http"] {
        assert!(bad.parse::<PortRange>().is_err(), "{bad:?}");
    }
}

/// Errors of the syntax stop at the text; the message says what would be right.
#[test]
fn syntax_errors_say_what_is_expected() {
    for (rule, expected) in [
        (r#"{"direction": "in"}"#, "unknown variant `in`, expected `ingress` or `egress`"),
        (r#"{"protocol": "tcp"}"#, "missing field `direction`"),
        (r#"{"direction": "ingress", "port": 80}"#, "unknown field `port`"),
        (r#"{"direction": "ingress", "ports": [70000]}"#, "\"70000\" is not a port or a range of ports"),
        (r#"{"direction": "ingress", "ports": ["90-80"]}"#, "FIRST <= LAST"),
        (r#"{"direction": "ingress", "protocol": "tpc"}"#, "\"tpc\" is not a protocol"),
        (r#"{"direction": "ingress", "protocol": 300}"#, "\"300\" is not a protocol"),
        (r#"{"direction": "ingress", "remote_cidr": "10.0.0.1/8"}"#, "the network is 10.0.0.0/8"),
    ] {
        let error = serde_json::from_str::<Rule>(rule).unwrap_err().to_string();
        assert!(error.contains(expected), "{rule}: {error}");
    }
}

fn errors(result: Result<(), Vec<PolicyError>>) -> Vec<String> {
    result.unwrap_err().iter().map(ToString::to_string).collect()
}

fn rule_error(rule: &str) -> String {
    let mut document = document();
    let rule = serde_json::from_str(rule).unwrap();
    document.security_groups.insert(
        "a b".into(),
        SecurityGroup { rules: vec![Rule::allow(Direction::Egress), rule], ..Default::default() },
    );
    let errors = errors(document.validate());
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].clone()
}

#[test]
fn each_mistake_has_its_path() {
    let at = "security_groups.\"a b\".rules[1]";
    for (rule, expected) in [
        (r#"{"direction":"ingress","remote_group":"nope"}"#, ".remote_group: there is no security group \"nope\""),
        (
            r#"{"direction":"ingress","remote_address_set":"web"}"#,
            ".remote_address_set: there is no address set \"web\"",
        ),
        (
            r#"{"direction":"ingress","remote_group":"web","remote_cidr":"10.0.0.0/8"}"#,
            ": more than one of remote_cidr, remote_group and remote_address_set; write one rule for each",
        ),
        (
            r#"{"direction":"ingress","ethertype":"ipv6","remote_cidr":"10.0.0.0/8"}"#,
            ".remote_cidr: 10.0.0.0/8 is not of the rule's ethertype",
        ),
        (
            r#"{"direction":"ingress","ports":[80]}"#,
            ".ports: protocol any has no ports; ports need tcp, udp, sctp, dccp or udplite",
        ),
        (
            r#"{"direction":"ingress","protocol":"gre","source_ports":[80]}"#,
            ".source_ports: protocol gre has no ports; ports need tcp, udp, sctp, dccp or udplite",
        ),
        (r#"{"direction":"ingress","protocol":"icmp","icmp_code":1}"#, ".icmp_code: a code needs an icmp_type"),
        (
            r#"{"direction":"ingress","protocol":"icmp","icmp_type":8}"#,
            ".icmp_type: ICMP and ICMPv6 number their types differently; state ethertype ipv4 or ipv6",
        ),
        (
            r#"{"direction":"ingress","protocol":"tcp","icmp_type":8}"#,
            ".icmp_type: protocol tcp has no ICMP types; write icmp or icmpv6",
        ),
        (
            r#"{"direction":"ingress","protocol":"icmpv6","ethertype":"ipv4"}"#,
            ".protocol: icmpv6 does not occur over IPv4; write icmp",
        ),
        (
            r#"{"direction":"ingress","action":"drop","stateless":true}"#,
            ".stateless: only allow rules can be stateless",
        ),
        (r#"{"direction":"ingress","name":""}"#, ".name: the name is empty"),
        (
            r#"{"direction":"ingress","priority":60000}"#,
            ".priority: 60000 is the priority of the built-in rules; choose a lower or a higher one",
        ),
    ] {
        assert_eq!(rule_error(rule), format!("{at}{expected}"));
    }
}

#[test]
fn a_port_is_checked_against_the_document() {
    let port: PortPolicy = serde_json::from_str(
        r#"{
            "security_groups": ["web", "nope", "web"],
            "allowed_ethertypes": [34916, 2048],
            "anti_spoofing": {"allowed_address_pairs": [{"address": "10.0.0.1", "mac": "01:00:00:00:00:01"}]},
            "limits": {"max_connections": 0, "per_source": {"max_connections": 70000}},
            "reject": {"per_second": 1000000000}
        }"#,
    )
    .unwrap();
    assert_eq!(
        errors(document().validate_port(&port, "ports.vm1.firewall")),
        [
            "ports.vm1.firewall.security_groups[1]: there is no security group \"nope\"",
            "ports.vm1.firewall.security_groups[2]: group \"web\" is named twice",
            "ports.vm1.firewall.allowed_ethertypes[1]: 0x0800 cannot be allowed here: rules are for IPv4 and IPv6, ARP always \
             passes, values below 0x0600 are lengths",
            "ports.vm1.firewall.anti_spoofing.mac: anti-spoofing needs the port's MAC address (or enabled = false)",
            "ports.vm1.firewall.anti_spoofing.allowed_address_pairs[0].mac: not the address of a station: it is zero or a group \
             address",
            "ports.vm1.firewall.limits.max_connections: must be at least 1",
            "ports.vm1.firewall.limits.per_source.max_connections: 70000 connections of one source; at most 65535 are allowed",
            "ports.vm1.firewall.reject.per_second: 1000000000 answers per second; at most 100000000 are allowed",
        ]
    );
}

#[test]
fn everything_has_a_limit() {
    let mut document = PolicyDocument::default();
    let group = SecurityGroup { rules: vec![Rule::allow(Direction::Ingress); 16_384], ..Default::default() };
    for name in ["a", "b", "c"] {
        document.security_groups.insert(name.into(), group.clone());
    }
    document.validate().unwrap();
    let off = SpoofConfig { enabled: false, ..SpoofConfig::default() };
    let mut port = PortPolicy { anti_spoofing: off, ..PortPolicy::default() };
    port.security_groups = vec!["a".into(), "b".into()];
    document.validate_port(&port, "p").unwrap();
    port.security_groups.push("c".into());
    assert_eq!(
        errors(document.validate_port(&port, "p")),
        [format!("p.security_groups: 49152 rules on the port; at most {MAX_RULES_PER_PORT} are allowed")]
    );
    document.security_groups.get_mut("a").unwrap().rules.push(Rule::allow(Direction::Egress));
    assert_eq!(errors(document.validate()), ["security_groups.a.rules: 16385 rules; at most 16384 are allowed"]);
    let many =
        Rule { protocol: Protocol::TCP, ports: vec![PortRange::single(1); 65], ..Rule::allow(Direction::Egress) };
    document.security_groups.insert("a".into(), SecurityGroup { rules: vec![many], ..Default::default() });
    assert_eq!(
        errors(document.validate()),
        ["security_groups.a.rules[0].ports: 65 port ranges; at most 64 are allowed"]
    );
    // A document of nothing but mistakes does not fill the memory with messages.
    let bad = Rule { remote_group: Some("x".into()), ..Rule::allow(Direction::Egress) };
    document.security_groups.insert("a".into(), SecurityGroup { rules: vec![bad; 10_000], ..Default::default() });
    assert_eq!(errors(document.validate()).len(), 100);
}

#[test]
fn source_ports_have_a_limit_of_their_own() {
    let ports: Vec<PortRange> = (0..64).map(|i| PortRange::single(i * 2)).collect();
    let rule =
        Rule { protocol: Protocol::UDP, ports: ports.clone(), source_ports: ports, ..Rule::allow(Direction::Egress) };
    let mut document = PolicyDocument::default();
    document.security_groups.insert("a".into(), SecurityGroup { rules: vec![rule], ..Default::default() });
    document.validate().unwrap();
    let off = SpoofConfig { enabled: false, ..SpoofConfig::default() };
    let port = PortPolicy { security_groups: vec!["a".into()], anti_spoofing: off, ..PortPolicy::default() };
    let error = &errors(document.validate_port(&port, "p"))[0];
    assert!(error.starts_with("p.security_groups: 8192 combinations"), "{error}");
}

fn tcp_key(remote: &str, destination: u16) -> FlowKey {
    FlowKey { remote: remote.parse().unwrap(), protocol: 6, l4: Some(L4Key::Ports { source: 40_000, destination }) }
}

#[test]
fn an_explanation_names_what_decides() {
    let document = Arc::new(document());
    let mac = "52:54:00:00:00:0a".parse().unwrap();
    let spoof = SpoofConfig { mac: Some(mac), addresses: vec!["10.1.2.3".parse().unwrap()], ..SpoofConfig::default() };
    let port =
        PortPolicy { security_groups: vec!["web".into(), "db".into()], anti_spoofing: spoof, ..PortPolicy::default() };
    let mut book = AddressBook::new();
    book.load_document(&document).unwrap();
    book.add(&SetKey::Group("web".into()), "10.0.0.7".parse().unwrap()).unwrap();
    let policy = compile(&document, &port, "port", &mut book, CompileOptions { generation: 7, seed: 1 }).unwrap();
    let index = book.snapshot(1);
    let limits = VmLimits::new(&LimitsConfig { max_connections: 1, ..LimitsConfig::default() }, 1);
    let spoof = SpoofTable::new(&port.anti_spoofing, 1);
    let _held = limits.admit("10.0.0.1".parse().unwrap(), 0).unwrap();
    let limits = limits.status(0);
    let explainer = Explainer { policy: &policy, sets: &index, spoof: Some(&spoof), limits: Some(&limits) };

    assert_eq!(
        explainer.flow(Direction::Ingress, &tcp_key("10.0.0.7", 5432)).to_string(),
        "remote: in group web\n\
         rules: 1 of 27 match\n  \
         => db rule 0: ingress tcp ports 5432 from group web allow\n\
         limits: a new connection is refused, limit_connections\n\
         verdict: allow"
    );
    assert_eq!(
        explainer.flow(Direction::Ingress, &tcp_key("10.0.0.8", 5432)).to_string(),
        "remote: in no set that rules name\nrules: 0 of 27 match\ndefault: drop\nverdict: drop"
    );
    let told = explainer.flow(Direction::Egress, &tcp_key("203.0.113.1", 25));
    assert_eq!(
        told.to_string(),
        "remote: in no set that rules name\n\
         rules: 2 of 27 match\n  \
         => web rule 3 (no mail): egress tcp ports 25 reject log\n     \
         web rule 2: egress allow\n\
         verdict: reject"
    );
    assert_eq!(told.rule.unwrap().name.as_deref(), Some("no mail"));

    // A frame from the VM with another's address: anti-spoofing ends it. 52:54:00:00:00:0a, 10.1.2.3 -> 10.9.8.7 port 443.
    let mut frame: Vec<u8> =
        hex("52540000000b52540000000a08004500003c123440003f060b750a0102030a0908079c4001bbfffffff000000000a002faf0\
         80fb0000020405b40402080a010203040506070801030307");
    let headers = parse(&frame, frame.len() as u32).unwrap();
    let told = explainer.frame(Direction::Egress, &frame, &headers);
    assert_eq!((told.action, told.rule.unwrap().index), (Action::Allow, 2));
    assert_eq!(told.stages[0], Stage::AntiSpoofing { enabled: true, refused: None });
    frame[11] = 0x0c;
    let headers = parse(&frame, frame.len() as u32).unwrap();
    let told = explainer.frame(Direction::Egress, &frame, &headers);
    assert_eq!(told.to_string(), "anti-spoofing: refused, spoof_source_mac\nverdict: drop");
    // The same frame inbound is a packet to a closed port; as JSON.
    let told = explainer.frame(Direction::Ingress, &frame, &headers);
    assert_eq!((told.action, told.rule.is_some()), (Action::Allow, true));
    let json = serde_json::to_value(&told).unwrap();
    assert_eq!(json["rule"]["group"], "web");
    assert_eq!(json["stages"][1]["stage"], "rules");
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}
