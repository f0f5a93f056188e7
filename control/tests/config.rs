//! Configuration files: what is accepted, and that every message names the place and the fix.
use std::collections::BTreeSet;

use ferry_control::config::{self, PortKind, VlanKind, schema};

const EXAMPLE: &str = include_str!("../../etc/ferry.toml.example");

fn errors(text: &str) -> String {
    config::parse("ferry.toml", text).expect_err("the file is wrong").to_string()
}

/// The example with its commented-out keys in effect.
fn uncommented() -> String {
    let enable = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest.to_owned(),
        _ => line.to_owned(),
    };
    EXAMPLE.lines().map(enable).collect::<Vec<_>>().join("\n")
}

#[test]
fn example_is_accepted() {
    let c = config::parse("example", EXAMPLE).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(c.port.len(), 3);
    assert_eq!(c.vms().keys().collect::<Vec<_>>(), ["guest1", "vm2"]);
    assert_eq!(c.port[1].vlan.mode, VlanKind::NativeUntagged);
    assert_eq!(c.port[1].vlan.trunk_vids().len(), 101);
    config::parse("example", &uncommented()).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn example_names_every_key_of_the_schema() {
    let table: toml::Table = uncommented().parse().unwrap();
    let mut found = BTreeSet::new();
    fn walk(v: &toml::Value, at: &str, found: &mut BTreeSet<String>) {
        match v {
            toml::Value::Table(t) => {
                for (k, v) in t {
                    // Entries under a name of their own are in the schema once.
                    if matches!(at, "security_group" | "address_set") {
                        walk(v, &format!("{at}.{}", schema::ANY_NAME), found);
                        continue;
                    }
                    let path = if at.is_empty() { k.clone() } else { format!("{at}.{k}") };
                    found.insert(path.clone());
                    walk(v, &path, found);
                }
            }
            toml::Value::Array(items) => items.iter().for_each(|v| walk(v, at, found)),
            _ => {}
        }
    }
    walk(&toml::Value::Table(table), "", &mut found);
    let known: BTreeSet<String> = schema::all_keys().into_iter().map(|(path, ..)| path).collect();
    assert_eq!(found, known, "left: the example, right: the schema");
}

/// The documented defaults are the ones in effect: shown defaults written out change nothing.
#[test]
fn example_shows_the_true_defaults() {
    let minimal = r#"
        [[bridge]]
        name = "b"
        [[port]]
        name = "v"
        type = "vhost-user"
        bridge = "b"
        socket = "/run/v.sock"
        [port.firewall]
        anti_spoofing = { mac = "52:54:00:00:00:01", allowed_address_pairs = [{ address = "192.0.2.1" }] }
        [port.firewall.limits]
        [[port]]
        name = "d"
        type = "dpdk"
        bridge = "b"
        device = "net_null0"
        [[vm]]
        name = "x"
        [security_group.NAME]
        rules = [{ direction = "ingress" }]
        [address_set.NAME]
        [[migration.rule]]
        vm = "*"
        peer = "*"
        roles = ["send"]
    "#;
    let bare = config::parse("t", minimal).unwrap();
    let mut tree = config::to_tree(&bare);
    for (path, key, variant) in schema::all_keys() {
        if key.default.is_empty() {
            continue;
        }
        let value: toml::Table = format!("x = {}", key.default).parse().unwrap();
        let value = serde_json::to_value(&value["x"]).unwrap();
        let (parents, name) = path.rsplit_once('.').unwrap();
        // These lists are not empty here, so that the defaults of what is in them can be tried.
        if matches!(name, "rules" | "allowed_address_pairs") {
            continue;
        }
        let mut at = &mut tree;
        for part in parents.split('.') {
            at = &mut at[part];
            if at.is_array() {
                at = &mut at[if variant == Some("dpdk") { 1 } else { 0 }];
            }
        }
        at[name] = value;
    }
    assert_eq!(config::from_tree(tree).unwrap(), bare);
}

#[test]
fn reference_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CONFIG.md");
    let generated = schema::reference_markdown();
    if std::env::var_os("FERRY_BLESS").is_some() {
        std::fs::write(path, &generated).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), generated, "run this test with FERRY_BLESS=1");
}

#[test]
fn effective_toml_reads_back_the_same() {
    let c = config::parse("example", &uncommented()).unwrap();
    let text = c.to_toml();
    assert_eq!(config::parse("effective", &text).unwrap_or_else(|e| panic!("{e}\n{text}")), c);
}

#[test]
fn unknown_key_names_place_and_likely_key() {
    let text = "[switch]\nidle_latency_ms = 5\n";
    assert_eq!(
        errors(text),
        "ferry.toml:2:1: error: switch.idle_latency_ms: unknown key `idle_latency_ms`\n    \
         2 | idle_latency_ms = 5\n      | ^^^^^^^^^^^^^^^\n  fix: did you mean `idle_latency_us`?"
    );
}

#[test]
fn wrong_value_names_place_within_an_inline_table() {
    let text = "[[bridge]]\nname = \"br0\"\n[[port]]\nname = \"a\"\ntype = \"vhost-user\"\nbridge = \"br0\"\n\
                socket = \"/run/a.sock\"\nvlan = { mode = \"access\", tag = 5000 }\n";
    assert_eq!(
        errors(text),
        "ferry.toml:8:33: error: port[0].vlan.tag: must be 1 to 4094, is 5000\n    \
         8 | vlan = { mode = \"access\", tag = 5000 }\n      |                                 ^^^^\n  \
         fix: give a number from 1 to 4094"
    );
}

#[test]
fn several_problems_come_in_the_order_of_the_file() {
    let text = "[log]\nlevel = 3\nformat = \"jsn\"\n[bridge]\nname = \"x\"\n";
    let all = errors(text);
    let lines: Vec<&str> = all.lines().filter(|l| l.starts_with("ferry.toml:")).collect();
    assert_eq!(
        lines,
        [
            "ferry.toml:2:9: error: log.level: must be a string, is 3",
            "ferry.toml:3:10: error: log.format: must be one of \"text\", \"json\", is \"jsn\"",
            "ferry.toml:4:1: error: bridge: must be an array of tables, is a table",
        ]
    );
    assert!(all.contains("fix: did you mean \"json\"?"));
    assert!(all.contains("fix: write [[bridge]], with double brackets"));
}

#[test]
fn syntax_error_names_the_place() {
    let e = errors("[log]\nlevel = \"info\nformat = 1\n");
    assert!(e.starts_with("ferry.toml:2:"), "{e}");
    assert!(e.contains("level = \"info"), "{e}");
}

fn with_port(port: &str) -> String {
    format!("[[bridge]]\nname = \"br0\"\n[[port]]\nname = \"a\"\nbridge = \"br0\"\n{port}\n")
}

/// Each wrong piece: where it is reported, a part of the message, a part of the fix.
#[test]
fn catalogue_of_errors() {
    let vhost = |more: &str| with_port(&format!("type = \"vhost-user\"\nsocket = \"/run/a.sock\"\n{more}"));
    let dpdk = |more: &str| with_port(&format!("type = \"dpdk\"\ndevice = \"net_null0\"\n{more}"));
    let cases: Vec<(String, &str, &str, &str)> = vec![
        (vhost("bogus = 1"), "8:1", "unknown key `bogus`", "known here: name, type"),
        (vhost("device = \"x\""), "8:1", "a key of ports of type \"dpdk\"", "change `type`"),
        (with_port("socket = \"/run/a.sock\""), "3:1", "the key `type` is missing", "add it"),
        (with_port("type = \"vhost-user\""), "3:1", "the key `socket` is missing", "add it"),
        (with_port("type = \"vhost\""), "6:8", "must be one of", "did you mean \"vhost-user\"?"),
        (with_port("type = \"vhost-user\"\nsocket = \"a.sock\""), "7:10", "not an absolute path", "start it with '/'"),
        (vhost("socket_mode = \"999\""), "8:15", "not an octal mode", "\"0660\""),
        (vhost("queue_pairs = 9"), "8:15", "must be 1 to 8, is 9", "from 1 to 8"),
        (vhost("admin_up = \"yes\""), "8:12", "must be true or false", "without quotes"),
        (vhost("rxq_affinity = [0, 1]"), "8:20", "there is no PMD thread 1", "numbered 0 to 0"),
        (vhost("vlan = { mode = \"trunk\", tag = 3 }"), "8:32", "no VLAN for untagged", "native-tagged"),
        (vhost("vlan = { mode = \"native-tagged\" }"), "8:1", "native VLAN is missing", "add `tag`"),
        (vhost("vlan = { mode = \"access\" }"), "8:1", "access VLAN is missing", "add `tag`"),
        (
            vhost("vlan = { mode = \"access\", tag = 2, trunks = [3] }"),
            "8:45",
            "carries one VLAN only",
            "mode \"trunk\"",
        ),
        (vhost("vlan = { mode = \"trunk\", trunks = [3, \"9-4\"] }"), "8:39", "\"9-4\" is not a VLAN", "100-199"),
        (vhost("vlan = { mode = \"native-tagged\", tag = 2, trunks = [0] }"), "8:53", "VLAN 0 stands for", "remove it"),
        (vhost("features = { csum = false }"), "8:1", "needs checksum offload", "features.tso = false"),
        (dpdk("rx_descriptors = 1000"), "8:18", "power of two", "use 1024"),
        (dpdk("mbufs = 512"), "8:9", "do not fill", "at least 1024, or 0"),
        (dpdk("mtu = 9001"), "8:7", "must be 68 to 9000", "9000"),
        ("[metrics]\nlisten = \"0.0.0.0:9477\"".into(), "2:10", "reached from other hosts", "allow_remote = true"),
        ("[metrics]\nlisten = \"localhost\"".into(), "2:10", "not an address with port", "127.0.0.1:9477"),
        ("[log]\nlevel = \"inof\"".into(), "2:9", "not a level", "did you mean \"info\"?"),
        ("[dpdk]\nextra_args = [\"--vdev=net_tap0\"]".into(), "2:15", "sets --vdev itself", "type \"dpdk\""),
        ("[[switch.pmd]]\ncore = 1\n[[switch.pmd]]\ncore = 1".into(), "4:8", "core 1 is used by two", "of its own"),
        ("[[bridge]]\nname = \"x y\"".into(), "2:8", "not a valid name", "letters, digits"),
        ("[[bridge]]\nname = \"b\"\n[[bridge]]\nname = \"b\"".into(), "4:8", "(first at f:2:8)", "its own name"),
        ("[log]\nlevel = 1979-05-27".into(), "2:9", "a date or time", "quote it"),
        ("port = 5".into(), "1:8", "must be an array of tables", "[[port]]"),
        (
            vhost("[[port]]\nname = \"b\"\ntype = \"vhost-user\"\nbridge = \"br1\"\nsocket = \"/run/a.sock\""),
            "11:10",
            "bridge \"br1\", which does not exist",
            "did you mean \"br0\"?",
        ),
    ];
    for (text, place, message, fix) in cases {
        let e = config::parse("f", &text).expect_err(&text).to_string();
        let hit = e.split("\nf:").any(|one| {
            let one = one.strip_prefix("f:").unwrap_or(one);
            one.starts_with(&format!("{place}: error: ")) && one.contains(message) && one.contains(fix)
        });
        assert!(hit, "expected {place}: {message} / {fix} for\n{text}\ngot\n{e}");
    }
}

#[test]
fn two_ports_cannot_share_a_socket_or_take_the_apis() {
    let two = "[[bridge]]\nname = \"b\"\n[[port]]\nname = \"x\"\ntype = \"vhost-user\"\nbridge = \"b\"\nsocket = \"/run/x\"\n\
               [[port]]\nname = \"y\"\ntype = \"vhost-user\"\nbridge = \"b\"\nsocket = \"/run/x\"\n";
    assert!(errors(two).contains(
        "ferry.toml:12:10: error: port[1].socket: the socket /run/x is used twice (first at ferry.toml:7:10)"
    ));
    let api = "[api]\nsocket = \"/run/x\"\n".to_owned() + &two.replacen("/run/x", "/run/z", 1);
    assert!(errors(&api).contains("(first at ferry.toml:2:10)"));
}

#[test]
fn limits_on_counts_and_sizes() {
    let many: String = (0..257).map(|i| format!("[[bridge]]\nname = \"b{i}\"\n")).collect();
    assert!(errors(&many).contains("has 257 entries, at most 256"));
    let long = format!("[[bridge]]\nname = \"{}\"\n", "n".repeat(65));
    assert!(errors(&long).contains("not a valid name"));
    let path = format!("type = \"vhost-user\"\nsocket = \"/{}\"", "p".repeat(107));
    assert!(errors(&with_port(&path)).contains("a Unix socket's has at most 107"));
    let ok = format!("type = \"vhost-user\"\nsocket = \"/{}\"", "p".repeat(106));
    assert!(config::parse("f", &with_port(&ok)).is_ok());
}

#[test]
fn columns_count_characters() {
    let e = errors("log = { level = \"ü\", nope = 1 }\n");
    assert!(e.starts_with("ferry.toml:1:22: error: log.nope"), "{e}");
}

#[test]
fn missing_file_is_named() {
    let e = config::load(std::path::Path::new("/nonexistent/ferry.toml")).unwrap_err().to_string();
    assert!(e.contains("/nonexistent/ferry.toml: No such file"), "{e}");
}

#[test]
fn defaults_of_an_empty_file() {
    let c = config::parse("f", "").unwrap();
    assert_eq!(c.pmds().len(), 1);
    assert_eq!(c.pmds()[0].core, None);
    assert_eq!(c.api.socket.to_str(), Some("/run/ferry/ferry.sock"));
    assert!(!c.metrics.enabled);
}

#[test]
fn vhost_port_defaults() {
    let c = config::parse("f", &with_port("type = \"vhost-user\"\nsocket = \"/run/a\"")).unwrap();
    assert_eq!(c.port[0].vlan.mode, VlanKind::Trunk);
    assert!(c.port[0].admin_up);
    let PortKind::VhostUser(v) = &c.port[0].kind else { panic!() };
    assert_eq!(v.queue_pairs, 1);
    assert!(v.features.packed && v.features.tso);
}

const FIREWALLED: &str = r#"
[security_group.web]
rules = [{ direction = "ingress", protocol = "tcp", ports = [80, "8000-8099"] }]
[[bridge]]
name = "br0"
[[port]]
name = "vm1"
type = "vhost-user"
bridge = "br0"
socket = "/run/vm1.sock"
[port.firewall]
security_groups = ["web"]
anti_spoofing = { mac = "52:54:00:00:00:01", addresses = ["192.0.2.7"] }
"#;

/// The first lines (place and message) of what is wrong with [`FIREWALLED`] after a replacement.
fn firewall_errors(replace: &str, with: &str) -> Vec<String> {
    assert!(FIREWALLED.contains(replace), "{replace}");
    let all = errors(&FIREWALLED.replacen(replace, with, 1));
    all.lines().filter(|l| l.starts_with("ferry.toml:") || l.starts_with("  fix:")).map(str::to_owned).collect()
}

#[test]
fn a_firewall_is_accepted_and_makes_its_port_a_vm() {
    let c = config::parse("f", FIREWALLED).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(c.port[0].vm_name(), Some("vm1"));
    assert_eq!(c.vms()["vm1"].connections, 1_000_000);
    assert_eq!(c.policy().security_groups["web"].rules[0].ports.len(), 2);
    assert_eq!(config::parse("g", &c.to_toml()).unwrap_or_else(|e| panic!("{e}\n{}", c.to_toml())), c);
    let shared = format!("{FIREWALLED}\n[[vm]]\nname = \"guest\"\nconnections = 4096\nlimits.max_half_open = 10\n")
        .replacen("socket =", "vm = \"guest\"\nsocket =", 1);
    let c = config::parse("f", &shared).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(c.vms().len(), 1);
    assert_eq!((c.vms()["guest"].connections, c.vms()["guest"].limits.max_half_open), (4096, 10));
    assert_eq!(c.ports_of("guest").count(), 1);
}

#[test]
fn mistakes_in_rules_name_place_and_fix() {
    for (replace, with, expected) in [
        (
            "ports = [80, \"8000-8099\"]",
            "ports = [80, \"9-8\"]",
            vec![
                "ferry.toml:3:66: error: security_group.web.rules[0].ports[1]: \"9-8\" is not a port or a range of ports",
                "  fix: give a number from 0 to 65535, or a range such as \"8000-8099\", the lower end first",
            ],
        ),
        (
            "protocol = \"tcp\"",
            "protocol = \"icmp\"",
            vec![
                "ferry.toml:3:62: error: security_group.web.rules[0].ports: protocol icmp has no ports; ports need tcp, udp, sctp, dccp or udplite",
            ],
        ),
        (
            "protocol = \"tcp\"",
            "protocol = \"tpc\"",
            vec![
                "ferry.toml:3:46: error: security_group.web.rules[0].protocol: \"tpc\" is not a protocol",
                "  fix: give \"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"sctp\", \"gre\", \"any\" ..., or a number from 0 to 255",
            ],
        ),
        (
            "direction = \"ingress\"",
            "direction = \"ingress\", remote_group = \"wep\"",
            vec![
                "ferry.toml:3:50: error: security_group.web.rules[0].remote_group: there is no security group \"wep\"",
                "  fix: did you mean \"web\"?",
            ],
        ),
        (
            "direction = \"ingress\"",
            "direction = \"ingress\", remote_cidr = \"10.0.0.1/8\"",
            vec![
                "ferry.toml:3:49: error: security_group.web.rules[0].remote_cidr: 10.0.0.1/8 has bits set behind the prefix; the network is 10.0.0.0/8",
                "  fix: write an address or a prefix, such as \"192.0.2.7\", \"192.0.2.0/24\" or \"2001:db8::/32\"",
            ],
        ),
        (
            "direction = \"ingress\"",
            "dirction = \"ingress\"",
            vec![
                "ferry.toml:3:12: error: security_group.web.rules[0].dirction: unknown key `dirction`",
                "  fix: did you mean `direction`?",
                "ferry.toml:3:10: error: security_group.web.rules[0].direction: the key `direction` is missing",
                "  fix: add it: \"ingress\": towards the VM. \"egress\": from the VM.",
            ],
        ),
        (
            "[security_group.web]",
            "[security_group.\"we b\"]",
            vec![
                "ferry.toml:2:17: error: security_group.we b: \"we b\" is not a valid name",
                "  fix: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
            ],
        ),
    ] {
        let mut found = firewall_errors(replace, with);
        found.sort();
        let mut expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
        expected.sort();
        assert_eq!(found, expected, "{with}");
    }
}

#[test]
fn mistakes_in_a_ports_firewall_name_place_and_fix() {
    let one = |replace: &str, with: &str| firewall_errors(replace, with).join("\n");
    assert_eq!(
        one("security_groups = [\"web\"]", "security_groups = [\"wev\"]"),
        "ferry.toml:12:20: error: port[0].firewall.security_groups[0]: there is no security group \"wev\"\n  \
         fix: did you mean \"web\"?"
    );
    assert_eq!(
        one("mac = \"52:54:00:00:00:01\", ", ""),
        "ferry.toml:13:1: error: port[0].firewall.anti_spoofing.mac: anti-spoofing needs the port's MAC address \
         (or enabled = false)\n  fix: add mac = \"52:54:00:12:34:56\" (the address of the guest's NIC), or set enabled = false"
    );
    assert_eq!(
        one(", addresses = [\"192.0.2.7\"]", ""),
        "ferry.toml:13:1: error: port[0].firewall.anti_spoofing.addresses: the addresses of port \"vm1\" are missing: without \
         them the VM may send nothing\n  fix: add `addresses` to anti_spoofing, such as addresses = [\"192.0.2.7\"], or set its \
         enabled = false"
    );
    assert_eq!(
        one("socket =", "vm = \"guest\"\nsocket ="),
        "ferry.toml:10:6: error: port[0].vm: port \"vm1\" belongs to VM \"guest\", which does not exist\n  \
         fix: add it: [[vm]] with name = \"guest\""
    );
    assert_eq!(
        one("[[bridge]]", "[[vm]]\nname = \"vm1\"\n[[bridge]]"),
        "ferry.toml:13:1: error: port[0].firewall: port \"vm1\" is a VM of its own, but a VM of this name is configured \
         (first at ferry.toml:5:8)\n  fix: add vm = \"vm1\" to the port if it belongs to that VM, or rename one of them"
    );
    let limits = FIREWALLED.replacen("socket =", "vm = \"g\"\nsocket =", 1)
        + "limits = { max_half_open = 5 }\n[[vm]]\nname = \"g\"\n";
    assert!(
        errors(&limits).starts_with("ferry.toml:15:1: error: port[0].firewall.limits: limits are the VM's"),
        "{}",
        errors(&limits)
    );
    let no_firewall = "[[vm]]\nname = \"g\"\n[[bridge]]\nname = \"b\"\n[[port]]\nname = \"p\"\ntype = \"dpdk\"\nbridge = \"b\"\ndevice = \"net_null0\"\nvm = \"g\"\n";
    assert!(errors(no_firewall).contains("port[0].vm: port \"p\" has no firewall"), "{}", errors(no_firewall));
    assert!(errors("[flow_log]\nto = \"file\"\n").contains("flow_log.file: the flow log goes to a file"));
}

const MIGRATING: &str = r#"
[migration]
enabled = true
host = "host-a"
listen = "192.0.2.1:9478"
[[migration.peer]]
host = "host-b"
address = "192.0.2.2:9478"
[[migration.rule]]
vm = "*"
peer = "host-*"
roles = ["send", "receive"]
[[vm]]
name = "web1"
migration = { when_late = "fail-closed", expect = false, qmp = "/run/web1-qmp.sock" }
"#;

/// What is wrong with [`MIGRATING`] after replacements: place, message and fix of each problem.
fn migration_errors(replacements: &[(&str, &str)]) -> String {
    let mut text = MIGRATING.to_owned();
    for (replace, with) in replacements {
        assert!(text.contains(replace), "{replace}");
        text = text.replacen(replace, with, 1);
    }
    let all = config::parse("f", &text).expect_err(&text).to_string();
    all.lines().filter(|l| l.starts_with("f:") || l.starts_with("  fix:")).collect::<Vec<_>>().join("\n")
}

#[test]
fn migration_is_read_and_written_again_the_same() {
    let c = config::parse("f", MIGRATING).unwrap_or_else(|e| panic!("{e}"));
    let m = &c.migration;
    assert!(m.enabled);
    assert_eq!((m.host_name(), m.hold_limit_ms, m.peer.len(), m.rule.len()), ("host-a".to_owned(), 50, 1, 1));
    assert_eq!(m.credentials().certificate.to_str(), Some("/etc/ferry/pki/host-a.pem"));
    let vm = &c.vms()["web1"].migration;
    assert_eq!((vm.when_late, vm.expect), (config::WhenLateConfig::FailClosed, false));
    assert_eq!(vm.qmp.as_deref().and_then(std::path::Path::to_str), Some("/run/web1-qmp.sock"));
    assert_eq!(config::parse("g", &c.to_toml()).unwrap_or_else(|e| panic!("{e}\n{}", c.to_toml())), c);
    assert_eq!(config::from_tree(config::to_tree(&c)).unwrap(), c);
    // Names are compared as those of certificates: without regard to case.
    let c = config::parse("f", &MIGRATING.replacen("\"host-a\"", "\"Host-A\"", 1)).unwrap();
    assert_eq!(c.migration.credentials().key.to_str(), Some("/etc/ferry/pki/host-a.pem"));
    assert_eq!(c.migration.peer("HOST-B").map(|p| p.address.port()), Some(9478));
}

#[test]
fn an_operators_own_authority_takes_the_place_of_the_directory() {
    let own = "trust = \"/t.pem\"\ncertificate = \"/c.pem\"\nkey = \"/k.pem\"\n[[migration.peer]]";
    let c = config::parse("f", &MIGRATING.replacen("[[migration.peer]]", own, 1)).unwrap_or_else(|e| panic!("{e}"));
    let files = c.migration.credentials();
    assert_eq!(
        [files.trust, files.certificate, files.key],
        ["/t.pem", "/c.pem", "/k.pem"].map(std::path::PathBuf::from)
    );
    assert_eq!(files.revocations, None);
    assert_eq!(
        migration_errors(&[("[[migration.peer]]", "key = \"/k.pem\"\n[[migration.peer]]")]),
        "f:2:2: error: migration.trust: `key` is given, but `trust` is missing: `trust`, `certificate` and `key` belong together (first at f:6:7)\n  \
         fix: add `trust`, or remove `key` to use the directory `pki`\n\
         f:2:2: error: migration.certificate: `key` is given, but `certificate` is missing: `trust`, `certificate` and `key` belong together (first at f:6:7)\n  \
         fix: add `certificate`, or remove `key` to use the directory `pki`"
    );
    assert!(
        migration_errors(&[("[[migration.peer]]", "revocations = \"/r.pem\"\n[[migration.peer]]")])
            .starts_with("f:6:1: error: migration.revocations: `revocations` is for an authority of your own")
    );
}

#[test]
fn mistakes_about_migrations_name_place_and_fix() {
    let one = |replace: &str, with: &str| migration_errors(&[(replace, with)]);
    for (replace, with, expected) in [
        (
            "\"192.0.2.1:9478\"",
            "\"192.0.2.1\"",
            "f:5:10: error: migration.listen: \"192.0.2.1\" is not an address with port\n  fix: write it as \"127.0.0.1:9477\"",
        ),
        (
            "\"host-a\"",
            "\"host_a\"",
            "f:4:8: error: migration.host: host name \"host_a\": only letters, digits, hyphens and dots are allowed\n  \
             fix: write a name as certificates have it, such as \"host-a\"",
        ),
        (
            "host = \"host-b\"",
            "host = \"192.0.2.2\"",
            "f:7:8: error: migration.peer[0].host: host name \"192.0.2.2\": is an address; a host is identified by a name\n  \
             fix: write a name as certificates have it, such as \"host-a\"",
        ),
        (
            "host = \"host-b\"",
            "host = \"HOST-A\"",
            "f:7:8: error: migration.peer[0].host: \"host-a\" is this host itself\n  fix: list the other hosts only",
        ),
        (
            "\"192.0.2.2:9478\"",
            "\"0.0.0.0:9478\"",
            "f:8:11: error: migration.peer[0].address: nobody can connect to 0.0.0.0:9478\n  \
             fix: give the address of that host, and the port of its `listen`",
        ),
        (
            "\"host-*\"",
            "\"host_*\"",
            "f:11:8: error: migration.rule[0].peer: is not a pattern of host names: letters, digits, hyphens, dots, * and ? only\n  \
             fix: give a host's name or a pattern such as \"host-*\"",
        ),
        (
            "\"host-*\"",
            "\"host-1.5\"",
            "f:11:8: error: migration.rule[0].peer: host name \"host-1.5\": the last part must not be a number\n  \
             fix: give a host's name or a pattern such as \"host-*\"",
        ),
        (
            "vm = \"*\"",
            "vm = \"a b\"",
            "f:10:6: error: migration.rule[0].vm: must not contain white space or control characters\n  \
             fix: give a VM's name or a pattern such as \"web-*\"",
        ),
        (
            "roles = [\"send\", \"receive\"]",
            "roles = []",
            "f:12:9: error: migration.rule[0].roles: is empty: name \"send\", \"receive\" or both\n  \
             fix: write roles = [\"send\", \"receive\"], or one of them",
        ),
        (
            "\"receive\"]",
            "\"recieve\"]",
            "f:12:18: error: migration.rule[0].roles[1]: must be one of \"send\", \"receive\", is \"recieve\"\n  \
             fix: did you mean \"receive\"?",
        ),
        (
            "\"fail-closed\"",
            "\"closed\"",
            "f:15:27: error: vm[0].migration.when_late: must be one of \"fail-open\", \"fail-closed\", is \"closed\"\n  \
             fix: use one of \"fail-open\", \"fail-closed\"",
        ),
    ] {
        assert_eq!(one(replace, with), expected, "{with}");
    }
    for (key, low, high) in [
        ("hold_limit_ms", 0, 10_000),
        ("redirect_ms", 0, 600_000),
        ("round_interval_ms", 10, 60_000),
        ("bandwidth_mbps", 0, 1_000_000),
    ] {
        let with = |n: i64| MIGRATING.replacen("[[migration.peer]]", &format!("{key} = {n}\n[[migration.peer]]"), 1);
        for good in [low, high] {
            config::parse("f", &with(good)).unwrap_or_else(|e| panic!("{e}"));
        }
        for bad in [low - 1, high + 1] {
            let e = config::parse("f", &with(bad)).unwrap_err().to_string();
            assert!(e.contains(&format!("migration.{key}: must be {low} to {high}, is {bad}")), "{e}");
        }
    }
}

#[test]
fn what_is_said_about_migrations_must_fit_together() {
    let peer = |more: &str| {
        migration_errors(&[("[[migration.rule]]", &format!("[[migration.peer]]\n{more}\n[[migration.rule]]"))])
    };
    assert_eq!(
        peer("host = \"Host-b\"\naddress = \"192.0.2.3:9478\""),
        "f:10:8: error: migration.peer[1].host: the peer \"Host-b\" is listed twice (first at f:7:8)\n  fix: remove one of them"
    );
    assert_eq!(
        peer("host = \"host-c\"\naddress = \"192.0.2.2:9478\""),
        "f:11:11: error: migration.peer[1].address: two peers have the address 192.0.2.2:9478 (first at f:8:11)\n  \
         fix: give each the address where it listens"
    );
    let alone = migration_errors(&[
        ("listen = \"192.0.2.1:9478\"\n", ""),
        ("[[migration.peer]]\nhost = \"host-b\"\naddress = \"192.0.2.2:9478\"\n", ""),
    ]);
    assert!(
        alone.starts_with("f:3:11: error: migration.enabled: migrations are enabled, but VMs can neither"),
        "{alone}"
    );
    let lawless = MIGRATING.split("[[migration.rule]]").next().unwrap();
    let e = errors(lawless);
    assert!(e.contains("migration.rule: migrations are enabled, but no rule allows any"), "{e}");
    assert!(
        config::parse("f", &lawless.replacen("true", "false", 1)).is_ok(),
        "nothing to object to while switched off"
    );
    let families = migration_errors(&[("listen", "bind = \"2001:db8::1\"\nlisten")]);
    assert!(families.contains("192.0.2.2:9478 cannot be reached from 2001:db8::1"), "{families}");
    let twice = MIGRATING.to_owned() + "[[vm]]\nname = \"web2\"\nmigration.qmp = \"/run/web1-qmp.sock\"\n";
    let e = config::parse("f", &twice).unwrap_err().to_string();
    assert!(e.contains("vm[1].migration.qmp: the socket /run/web1-qmp.sock is used twice (first at f:15:"), "{e}");
    let log = migration_errors(&[("[migration]", "[flow_log]\nfile = \"/var/lib/ferry/audit.log\"\n[migration]")]);
    assert!(log.contains("migration.audit_log: the flow log goes to the same file (first at f:3:8)"), "{log}");
}
