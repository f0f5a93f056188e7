//! The firewall through the API and the command line, with a switch that really judges frames between wires in memory.
mod common;

use std::process::{Command, Output};

use common::{TestDaemon, eventually};
use ferry_control::firewall::explain;
use ferry_control::firewall::packet_text;
use serde_json::{Value, json};

const CONFIG: &str = r#"
metrics = { enabled = true, listen = "127.0.0.1:0" }
flow_log = { enabled = true, to = "file", file = "DIR/flows.jsonl", per_second = 1000, burst = 1000 }
[switch]
idle_spin_us = 10
[security_group.web]
description = "Web servers"
rules = [
  { name = "http", direction = "ingress", protocol = "tcp", ports = [80] },
  { name = "peers", direction = "ingress", protocol = "udp", ports = [5000], remote_group = "web" },
  { name = "no-telnet", direction = "egress", protocol = "tcp", ports = [23], action = "drop" },
]
[address_set.admins]
addresses = ["192.0.2.0/24"]
[[vm]]
name = "guest"
connections = 4096
limits = { max_half_open = 100 }
[[bridge]]
name = "br0"
[[port]]
name = "a"
type = "vhost-user"
bridge = "br0"
socket = "DIR/a.sock"
vm = "guest"
[port.firewall]
anti_spoofing = { mac = "52:54:00:00:00:0a", addresses = ["10.0.0.1"] }
security_groups = ["web"]
[[port]]
name = "b"
type = "vhost-user"
bridge = "br0"
socket = "DIR/b.sock"
[port.firewall]
anti_spoofing = { mac = "52:54:00:00:00:0b", addresses = ["10.0.0.2", "fd00::2"] }
security_groups = ["web"]
limits = { max_connections = 1000 }
[[port]]
name = "up"
type = "dpdk"
bridge = "br0"
device = "net_null0"
"#;

/// Sends a packet in words from a port.
fn send(d: &TestDaemon, port: &str, text: &str) {
    let config: ferry_control::config::Config = serde_json::from_value(d.get("/v1/config")).unwrap();
    let near = explain::surroundings(&config, |p| p.name == port);
    let packet = packet_text::parse(text).and_then(|p| p.frame(&near)).unwrap_or_else(|e| panic!("{e}"));
    d.wires.get(port).put(&packet.frame);
}

fn arrives(d: &TestDaemon, port: &str, what: &str) {
    eventually(what, || !d.wires.get(port).take().is_empty());
}

/// `ferry` as a process, against the daemon.
fn ferry(d: &TestDaemon, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
    command.arg("--socket").arg(d.socket()).args(args).output().unwrap()
}

fn ok(d: &TestDaemon, args: &[&str]) -> String {
    let out = ferry(d, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(d: &TestDaemon, args: &[&str]) -> (Option<i32>, String) {
    let out = ferry(d, args);
    assert!(!out.status.success(), "{args:?}");
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

fn total(d: &TestDaemon, vm: &str) -> u64 {
    d.get(&format!("/v1/vms/{vm}"))["stats"]["connections"].as_u64().unwrap()
}

#[test]
fn connections_are_listed_filtered_paged_and_flushed() {
    let d = TestDaemon::start(CONFIG);
    send(&d, "a", "tcp 10.0.0.1:40000 > 10.0.0.2:80 syn seq 100");
    arrives(&d, "b", "what the groups allow");
    send(&d, "b", "tcp 10.0.0.2:80 > 10.0.0.1:40000 syn ack seq 7 ackno 101");
    arrives(&d, "a", "the answer");
    send(&d, "a", "tcp 10.0.0.1:40000 > 10.0.0.2:80 ack seq 101 ackno 8");
    arrives(&d, "b", "the handshake's end");
    for port in 6000..6010 {
        send(&d, "a", &format!("udp 10.0.0.1:{port} > 10.0.0.2:5000"));
        arrives(&d, "b", "a peer's datagram");
    }
    // Both ends know each connection.
    assert_eq!((total(&d, "guest"), total(&d, "b")), (11, 11));

    let list = ok(&d, &["conntrack", "list", "b", "-p", "tcp"]);
    let line = list.trim_end();
    let (head, tail) = line.split_once(" ESTABLISHED ").unwrap_or_else(|| panic!("{line}"));
    assert!(head.starts_with("tcp      6 43199") || head == "tcp      6 432000", "{head}");
    assert_eq!(
        tail,
        "src=10.0.0.1 dst=10.0.0.2 sport=40000 dport=80 packets=2 bytes=80 \
         src=10.0.0.2 dst=10.0.0.1 sport=80 dport=40000 packets=1 bytes=40 [ASSURED] mark=0 use=1 vm=b"
    );
    let guest = ok(&d, &["conntrack", "list", "guest", "--state", "established"]);
    assert!(guest.trim_end().ends_with("[ASSURED] mark=0 use=1 port=a vm=guest"), "{guest}");
    assert_eq!(ok(&d, &["conntrack", "list", "-u", "unreplied", "--dport", "5000"]).lines().count(), 20);
    assert_eq!(ok(&d, &["conntrack", "list", "--limit", "3"]).lines().count(), 3);
    let json: Value =
        serde_json::from_str(&ok(&d, &["--json", "conntrack", "list", "b", "--sport", "6001-6003"])).unwrap();
    let all = json.as_array().unwrap();
    assert_eq!(all.len(), 3);
    assert_eq!(
        (&all[0]["opened"], &all[0]["original"]["dport"], &all[0]["port"]),
        (&json!("ingress"), &json!(5000), &json!("b"))
    );
    assert_eq!(ok(&d, &["--json", "conntrack", "list", "-s", "10.9.0.0/16"]).replace('\n', ""), "[]");

    // Small pages see every connection once.
    let (mut cursor, mut seen) = (Some(0), Vec::new());
    while let Some(at) = cursor {
        let page = d.get(&format!("/v1/vms/b/connections?limit=2&cursor={at}"));
        let found = page["connections"].as_array().unwrap();
        assert!(found.len() <= 2);
        seen.extend(found.iter().map(|c| c["original"]["sport"].as_u64().unwrap()));
        cursor = page["next"].as_u64();
    }
    seen.sort_unstable();
    assert_eq!(seen, (6000..6010).chain([40000]).collect::<Vec<_>>());

    assert_eq!(ok(&d, &["conntrack", "flush", "guest", "-p", "udp"]), "10 connection(s) forgotten\n");
    assert_eq!((total(&d, "guest"), total(&d, "b")), (1, 11));
    let stats = ok(&d, &["conntrack", "stats", "b"]);
    assert!(stats.contains("connections: 11 of 1000000"), "{stats}");
    assert!(ok(&d, &["conntrack", "stats"]).lines().any(|l| l.starts_with("guest ") && l.contains("4096")));
    assert_eq!(ok(&d, &["conntrack", "flush", "--all"]), "12 connection(s) forgotten\n");

    let (code, text) = fails(&d, &["conntrack", "list", "nobody"]);
    assert_eq!((code, text.lines().next()), (Some(4), Some("error: there is no VM nobody")));
    let (status, code, message, _) = d.refused("GET", "/v1/vms/b/connections?dport=x", json!({}));
    assert_eq!(
        (status, code.as_str(), message.as_str()),
        (400, "bad_request", "dport: \"x\" is not a port or range of ports")
    );
    assert_eq!(d.refused("GET", "/v1/vms/b/connections?color=red", json!({})).0, 400);
    assert_eq!(d.refused("GET", "/v1/vms/b/connections?cursor=-1", json!({})).0, 400);
}

#[test]
fn denials_are_told_counted_and_logged() {
    let d = TestDaemon::start(CONFIG);
    for port in 40_000..40_003 {
        send(&d, "a", &format!("tcp 10.0.0.1:{port} > 10.0.0.2:8080 syn"));
    }
    send(&d, "a", "tcp 10.0.0.1:1 > 10.0.0.2:23 syn");
    send(&d, "a", "udp 10.0.0.9:1 > 10.0.0.2:5000 out");
    send(&d, "a", "tcp 10.0.0.1:50000 > 10.0.0.2:80 syn");
    arrives(&d, "b", "what is allowed");
    let drops = || d.get("/v1/firewall/drops")["drops"].as_array().unwrap().clone();
    eventually("three kinds of denial", || drops().len() == 3);
    let find = |reason: &str, direction: &str| {
        let found = drops().into_iter().find(|l| l["reason"] == reason && l["direction"] == direction);
        found.unwrap_or_else(|| panic!("{reason} {direction}: {:#?}", drops()))
    };
    let default = find("fw_denied", "ingress");
    assert_eq!((&default["vm"], &default["count"], &default["rule"]), (&json!("b"), &json!(3), &Value::Null));
    assert_eq!((&default["flow"]["dport"], &default["flow"]["sport"]), (&json!(8080), &Value::Null));
    let rule = find("fw_denied", "egress");
    assert_eq!((&rule["vm"], &rule["port"]), (&json!("guest"), &json!("a")));
    assert_eq!(rule["rule"], "web rule 2 (no-telnet): egress tcp ports 23 drop");
    assert_eq!(find("spoof_source_ipv4", "egress")["kind"], "spoofed");
    assert_eq!(d.get("/v1/firewall/drops?vm=b")["drops"].as_array().unwrap().len(), 1);
    assert_eq!(d.refused("GET", "/v1/firewall/drops?vm=x", json!({})).0, 404);
    let text = ok(&d, &["fw", "drops", "guest"]);
    assert!(text.contains("spoof_source_ipv4") && text.contains("52:54:00:00:00:0a > 52:54:00:00:00:0b"), "{text}");
    assert!(text.contains("udp 10.0.0.9 > 10.0.0.2:5000"), "{text}");
    assert!(text.contains("web rule 2 (no-telnet)"), "{text}");

    // The flow log has each of them, and new connections: of the VM that opened four, and of the one that took one of them.
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(d.dir.path().join("flows.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let count = |event: &str| lines().iter().filter(|l| l["event"] == event).count();
    eventually("the flow log", || count("new") == 5 && count("denied") == 4 && count("spoofed") == 1);
    let new = lines().into_iter().find(|l| l["event"] == "new" && l["vm"] == "b").unwrap();
    assert_eq!((&new["rule"], &new["dport"]), (&json!("web rule 0 (http): ingress tcp ports 80 allow"), &json!(80)));

    // Metrics.
    let text = scrape(&d);
    let value = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(value("ferry_vm_connections{vm=\"b\"}"), 1);
    assert_eq!(value("ferry_vm_half_open_connections{vm=\"b\"}"), 1);
    assert_eq!(value("ferry_vm_connection_capacity{vm=\"guest\"}"), 4096);
    assert_eq!(value("ferry_vm_new_connections_total{vm=\"guest\"}"), 4);
    assert_eq!(value("ferry_vm_denied_packets_total{vm=\"b\",reason=\"fw_denied\"}"), 3);
    assert_eq!(
        value(
            "ferry_port_firewall_denied_packets_total{port=\"a\",vm=\"guest\",direction=\"egress\",reason=\"spoof_source_ipv4\"}"
        ),
        1
    );
    assert_eq!(value("ferry_flow_log_lines_total"), 10);
    let stats = d.get("/v1/firewall/stats");
    assert_eq!(stats["ports"]["b"]["ingress"]["denied"]["fw_denied"], 3);
    assert!(stats["ports"].get("up").is_none());
}

fn scrape(d: &TestDaemon) -> String {
    use std::io::{Read, Write};
    let mut s = std::net::TcpStream::connect(d.metrics_address()).unwrap();
    s.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    s.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn rules_are_changed_by_the_api_and_by_reload_and_cut_what_they_no_longer_allow() {
    let d = TestDaemon::start(CONFIG);
    let exchange = |port: u16| {
        send(&d, "a", &format!("tcp 10.0.0.1:{port} > 10.0.0.2:80 syn seq 1"));
        arrives(&d, "b", "the SYN");
        send(&d, "b", &format!("tcp 10.0.0.2:80 > 10.0.0.1:{port} syn ack seq 1 ackno 2"));
        arrives(&d, "a", "the SYN-ACK");
    };
    exchange(40_000);
    // A group on a port of its own: the established connection goes on.
    let ssh = json!({"rules": [{"direction": "ingress", "protocol": "tcp", "ports": [22]}]});
    let outcome = d.ok("PUT", "/v1/security-groups/ssh", ssh.clone());
    assert_eq!(outcome["changes"], json!([{"what": "security_group", "name": "ssh", "change": "added"}]));
    d.ok("PATCH", "/v1/ports/b", json!({"firewall": {"security_groups": ["web", "ssh"]}}));
    send(&d, "a", "tcp 10.0.0.1:40000 > 10.0.0.2:80 ack seq 2 ackno 2");
    arrives(&d, "b", "what is still allowed");
    send(&d, "a", "tcp 10.0.0.1:41000 > 10.0.0.2:22 syn");
    arrives(&d, "b", "what is now allowed");

    // A group in use cannot go; nothing changed.
    let (status, code, message, _) = d.refused("DELETE", "/v1/security-groups/web", json!({}));
    assert_eq!((status, code.as_str()), (422, "invalid"));
    assert!(message.contains("there is no security group \"web\""), "{message}");
    assert_eq!(d.refused("DELETE", "/v1/security-groups/nothing", json!({})).0, 404);

    // The rule goes: the connection is cut on its next packet.
    let outcome = d.ok("PATCH", "/v1/security-groups/web?dry_run=true", json!({"rules": []}));
    assert_eq!(outcome["steps"], json!(["set security groups and address sets"]));
    d.ok("PATCH", "/v1/security-groups/web", json!({"rules": []}));
    send(&d, "a", "tcp 10.0.0.1:40000 > 10.0.0.2:80 ack seq 2 ackno 2");
    eventually("the connection is cut", || {
        d.get("/v1/firewall/stats")["ports"]["b"]["ingress"]["denied"]["fw_revoked"] == 1
    });
    assert!(d.wires.get("b").take().is_empty());

    // Reload: the file changed nothing, so that nothing changes; discarding puts the rules back.
    d.ok("POST", "/v1/reload", json!({}));
    assert_eq!(d.get("/v1/security-groups/web")["rules"], json!([]));
    d.ok("POST", "/v1/reload?discard_runtime=true", json!({}));
    assert_eq!(d.get("/v1/security-groups/web")["rules"].as_array().unwrap().len(), 3);
    assert_eq!(d.refused("GET", "/v1/security-groups/ssh", json!({})).0, 404);
    exchange(42_000);
    // A group renamed in the file, together with the ports in it.
    d.write(
        &CONFIG
            .replace("security_group.web", "security_group.www")
            .replace("[\"web\"]", "[\"www\"]")
            .replace("= \"web\"", "= \"www\""),
    );
    d.ok("POST", "/v1/reload", json!({}));
    send(&d, "a", "tcp 10.0.0.1:42000 > 10.0.0.2:80 ack seq 2 ackno 2");
    arrives(&d, "b", "the connection is allowed by the group's new name");
    // A port that leaves its VM, and the firewall of another that goes.
    d.write(&CONFIG.replace("vm = \"guest\"\n", ""));
    d.ok("POST", "/v1/reload", json!({}));
    let vms = d.get("/v1/vms");
    let names: Vec<&str> = vms["vms"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "guest"]);
    d.ok("PATCH", "/v1/ports/b", json!({"firewall": null}));
    assert_eq!(d.get("/v1/policy")["ports"].as_array().unwrap().len(), 1);
    send(&d, "a", "tcp 10.0.0.1:43000 > 10.0.0.2:8080 syn");
    arrives(&d, "b", "a port without a firewall gets everything");
}

#[test]
fn vms_are_added_changed_and_removed() {
    let d = TestDaemon::start(CONFIG);
    d.ok("POST", "/v1/vms", json!({"name": "new", "connections": 2048}));
    assert_eq!(d.get("/v1/vms/new")["stats"]["capacity"], 2048);
    assert_eq!(d.get("/v1/vms/new")["origin"], "runtime");
    send(&d, "a", "tcp 10.0.0.1:40000 > 10.0.0.2:80 syn");
    arrives(&d, "b", "the SYN");
    // Another size and other limits, under its connections.
    d.ok("PATCH", "/v1/vms/guest", json!({"connections": 8192, "limits": {"max_half_open": 1}}));
    let guest = d.get("/v1/vms/guest");
    assert_eq!((&guest["stats"]["capacity"], &guest["stats"]["connections"]), (&json!(8192), &json!(1)));
    send(&d, "a", "tcp 10.0.0.1:40001 > 10.0.0.2:80 syn");
    eventually("the limit holds", || d.get("/v1/vms/guest")["stats"]["denied"]["limit_half_open"] == 1);
    let (status, code, message, _) = d.refused("DELETE", "/v1/vms/guest", json!({}));
    assert_eq!((status, code.as_str(), message.as_str()), (409, "conflict", "VM guest still has 1 port(s): a"));
    d.ok("DELETE", "/v1/vms/new", json!({}));
    assert_eq!(d.refused("GET", "/v1/vms/new", json!({})).0, 404);
    let (status, _, message, _) = d.refused("POST", "/v1/vms", json!({"name": "x", "connections": 3}));
    assert_eq!(status, 422);
    assert!(message.starts_with("vm x: connections: must be 1024 to"), "{message}");
}

#[test]
fn explanations_and_traces_name_what_decides() {
    let d = TestDaemon::start(CONFIG);
    let text = ok(&d, &["policy", "explain", "b", "tcp 10.0.0.1:40000 > 10.0.0.2:80"]);
    assert!(text.contains("=> web rule 0 (http): ingress tcp ports 80 allow"), "{text}");
    let text = ok(&d, &["policy", "explain", "b", "udp 10.0.0.1:4 > 10.0.0.2:5000"]);
    assert!(text.contains("remote: in group web") && text.ends_with("verdict: allow\n"), "{text}");
    let json: Value =
        serde_json::from_str(&ok(&d, &["--json", "policy", "explain", "b", "tcp 10.0.0.7:4 > 10.0.0.2:81"])).unwrap();
    assert_eq!((&json["action"], &json["rule"]), (&json!("drop"), &Value::Null));
    assert_eq!(fails(&d, &["policy", "explain", "up", "tcp 10.0.0.7:4 > 10.0.0.2:81 in"]).0, Some(4));

    let text = ok(&d, &["trace", "guest", "tcp 10.0.0.1:40000 > 10.0.0.2:80 syn"]);
    for part in [
        "firewall from VM guest (port a",
        "tracking: new",
        "flooded",
        "firewall towards VM b (port b",
        "web rule 0 (http)",
        "output: port b",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let text = ok(&d, &["trace", "b", "tcp 10.0.0.9:40000 > 10.0.0.2:8080 syn"]);
    assert!(text.contains("firewall towards VM b") && text.contains("verdict: dropped, fw_denied"), "{text}");
    // A port without a firewall, by its name.
    let text = ok(&d, &["trace", "up", "out tcp 10.0.0.9:40000 > 10.0.0.2:80 syn"]);
    assert!(text.contains("input: port up") || text.contains("port up"), "{text}");
    // Nothing of it left a trace.
    assert_eq!((total(&d, "guest"), total(&d, "b")), (0, 0));
    let json: Value =
        serde_json::from_str(&ok(&d, &["--json", "trace", "guest", "tcp 10.0.0.1:40000 > 10.0.0.2:80 syn"])).unwrap();
    assert!(json["stages"].as_array().is_some_and(|s| s.len() >= 4), "{json:#}");

    let (code, text) = fails(&d, &["trace", "guest", "tcp 10.0.0.1 > 10.0.0.2:80"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("the source has no port") && text.contains("    ^^^^^^^^"), "{text}");
    let (status, _, message, hint) =
        d.refused("POST", "/v1/vms/guest/trace", json!({"packet": "tcp 1.1.1.1:1 > 2.2.2.2:2"}));
    assert_eq!(status, 400);
    assert!(message.starts_with("none of the addresses is the VM's") && hint.contains("\"in\""), "{message} {hint}");
    assert_eq!(d.refused("POST", "/v1/vms/nobody/trace", json!({"packet": "tcp 1.1.1.1:1 > 2.2.2.2:2 in"})).0, 404);
    assert_eq!(
        d.refused("POST", "/v1/vms/guest/trace", json!({"port": "b", "packet": "tcp 10.0.0.1:1 > 2.2.2.2:2"})).0,
        400
    );
    assert_eq!(d.refused("POST", "/v1/ports/b/explain", json!({"packet": 5})).0, 400);
}

#[test]
fn the_policy_is_shown_and_checked() {
    let d = TestDaemon::start(CONFIG);
    let all = ok(&d, &["policy", "show"]);
    assert!(all.lines().any(|l| l.starts_with("web ") && l.contains("Web servers")), "{all}");
    assert!(all.lines().any(|l| l.starts_with("b ") && l.contains("10.0.0.2,fd00::2")), "{all}");
    let group = ok(&d, &["policy", "show", "web"]);
    assert!(group.contains("0  ingress tcp ports 80 allow  (http)"), "{group}");
    assert!(group.ends_with("members: a (10.0.0.1), b (10.0.0.2, fd00::2)\n"), "{group}");
    let port = ok(&d, &["policy", "show", "b"]);
    assert!(port.contains("port b of VM b") && port.contains("anti-spoofing on: 52:54:00:00:00:0b"), "{port}");
    assert!(ok(&d, &["policy", "show", "admins"]).contains("192.0.2.0/24"));
    assert_eq!(fails(&d, &["policy", "show", "nothing"]).0, Some(4));

    let file = d.dir.path().join("ferry.toml");
    let file = file.to_str().unwrap();
    let text = ok(&d, &["policy", "check", file]);
    assert!(
        text.contains("1 security group(s) with 3 rule(s), 1 address set(s), 2 VM(s), 2 port(s) with a firewall"),
        "{text}"
    );
    assert!(text.contains("note: address sets that nothing uses: admins"), "{text}");
    let text = ok(&d, &["policy", "explain", "b", "tcp 10.0.0.1:40000 > 10.0.0.2:80", "--file", file]);
    assert!(text.ends_with("verdict: allow\n"), "{text}");
    let groups = d.dir.path().join("groups.toml");
    std::fs::write(&groups, "[security_group.x]\nrules = [{ direction = \"ingress\", ports = [80] }]\n").unwrap();
    let (code, text) = fails(&d, &["policy", "check", groups.to_str().unwrap()]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("groups.toml:2:43: error: security_group.x.rules[0].ports: protocol any has no ports"),
        "{text}"
    );
}
