//! The API over its real Unix socket, with a switch that really forwards between wires in memory.
mod common;

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{TestDaemon, eventually};
use ferry_control::events::Event;
use serde_json::{Value, json};

const TWO_PORTS: &str = r#"
[switch]
idle_spin_us = 10
[[switch.pmd]]
[[switch.pmd]]
[[bridge]]
name = "br0"
[[bridge]]
name = "br1"
[[port]]
name = "a"
type = "vhost-user"
bridge = "br0"
socket = "DIR/a.sock"
[[port]]
name = "b"
type = "vhost-user"
bridge = "br0"
socket = "DIR/b.sock"
queue_pairs = 2
"#;

/// An Ethernet frame of 60 bytes from `src` to `dst` (last byte of the address).
fn frame(dst: u8, src: u8) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, src, 0x08, 0x00];
    f.resize(60, 0xaa);
    f
}

#[test]
fn status_lists_and_effective_configuration() {
    let d = TestDaemon::start(TWO_PORTS);
    let s = d.get("/v1/status");
    assert_eq!((s["pmds"].as_u64(), s["bridges"].as_u64(), s["ports"]["up"].as_u64()), (Some(2), Some(2), Some(2)));
    assert_eq!(s["not_in_file"], json!([]));
    assert_eq!(s["pid"], std::process::id());
    let ports = d.get("/v1/ports");
    assert_eq!(ports["ports"][0]["name"], "a");
    assert_eq!(ports["ports"][1]["rxq_pmd"].as_array().unwrap().len(), 2);
    assert_eq!(d.get("/v1/bridges")["bridges"][0]["ports"], json!(["a", "b"]));
    assert_eq!(d.get("/v1/pmds")["pmds"].as_array().unwrap().len(), 2);
    assert_eq!(d.get("/v1/config")["port"][1]["queue_pairs"], 2);
    let toml = d.client.text(hyper::Method::GET, "/v1/config?format=toml", None).unwrap();
    let toml = String::from_utf8(toml.to_vec()).unwrap();
    assert_eq!(serde_json::to_value(ferry_control::config::parse("x", &toml).unwrap()).unwrap(), d.get("/v1/config"));
}

#[test]
fn changes_take_effect_on_traffic_without_disturbing_other_ports() {
    let d = TestDaemon::start(TWO_PORTS);
    let (a, b) = (d.wires.get("a"), d.wires.get("b"));
    a.put(&frame(9, 1));
    eventually("a frame floods from a to b", || b.take() == [frame(9, 1)]);

    // A port added at run time sees the flood, and is gone when removed.
    let c = json!({"name": "c", "type": "vhost-user", "bridge": "br0", "socket": format!("{}/c.sock", d.dir.path().display())});
    let outcome = d.ok("POST", "/v1/ports", c);
    assert_eq!(outcome["changes"], json!([{"what": "port", "name": "c", "change": "added"}]));
    assert_eq!(d.get("/v1/ports/c")["origin"], "runtime");
    a.put(&frame(9, 1));
    eventually("the flood reaches c", || d.wires.get("c").take().len() == 1);
    eventually("and b", || b.take().len() == 1);

    // VLANs and bridges separate, the ports stay open.
    let outcome = d.ok("PUT", "/v1/ports/b/vlan", json!({"mode": "access", "tag": 7}));
    assert_eq!(outcome["restarted_ports"], json!([]));
    assert_eq!(d.get("/v1/ports/b")["origin"], "changed");
    a.put(&frame(9, 1));
    eventually("c still gets it", || d.wires.get("c").take().len() == 1);
    assert!(b.take().is_empty(), "VLAN 7 is isolated");
    d.ok("PATCH", "/v1/ports/b", json!({"vlan": null, "bridge": "br1"}));
    a.put(&frame(9, 1));
    eventually("c gets it again", || d.wires.get("c").take().len() == 1);
    assert!(b.take().is_empty(), "another bridge is isolated");

    d.ok("DELETE", "/v1/ports/c", json!({}));
    assert!(!d.wires.is_open("c"));
    assert!(std::sync::Arc::ptr_eq(&a, &d.wires.get("a")) && std::sync::Arc::ptr_eq(&b, &d.wires.get("b")));

    // Everything that came in is accounted for; the removed port's share is kept.
    let check = || {
        let s: ferry_control::engine::Stats = serde_json::from_value(d.get("/v1/stats")).unwrap();
        let received: u64 = s.inputs().map(|r| r.frames).sum();
        received == 4 && s.inputs().all(|r| r.imbalance() == 0)
    };
    eventually("the ledger balances", check);
    assert_eq!(d.get("/v1/stats?port=a")["ports"].as_array().unwrap().len(), 1);
}

#[test]
fn admin_down_is_shown_and_drops() {
    let d = TestDaemon::start(TWO_PORTS);
    d.ok("PATCH", "/v1/ports/b", json!({"admin_up": false}));
    assert_eq!(d.get("/v1/ports/b")["state"], "disabled");
    d.wires.get("a").put(&frame(9, 1));
    eventually("the frame is dropped", || {
        let s = d.get("/v1/stats?port=a");
        s["ports"][0]["rx"][0]["dropped"].as_object().is_some_and(|m| !m.is_empty())
    });
    assert!(d.wires.get("b").take().is_empty());
}

#[test]
fn queues_move_between_threads() {
    let d = TestDaemon::start(TWO_PORTS);
    let places = || d.get("/v1/ports/b")["rxq_pmd"].clone();
    let target = 1 - places()[1].as_u64().unwrap();
    let before = places()[0].clone();
    d.ok("PUT", "/v1/ports/b/rxqs/1", json!({"pmd": target}));
    assert_eq!(places(), json!([before, target]));
    let pmds = d.get("/v1/pmds");
    assert!(pmds["pmds"][target as usize]["stats"]["queues"].as_array().unwrap().contains(&json!("b/1")));
    d.wires.get("b").put(&frame(9, 2));
    eventually("frames still come through", || d.wires.get("a").take().len() == 1);
    assert_eq!(d.refused("PUT", "/v1/ports/b/rxqs/2", json!({"pmd": 0})).0, 404);
    let (status, code, message, hint) = d.refused("PUT", "/v1/ports/b/rxqs/1", json!({"pmd": 2}));
    assert_eq!((status, code.as_str()), (422, "invalid"));
    assert_eq!(message, "port b: rxq_affinity[1]: there is no PMD thread 2");
    assert_eq!(hint, "the 2 configured in switch.pmd are numbered 0 to 1");
}

#[test]
fn addresses_are_shown_and_forgotten() {
    let d = TestDaemon::start(TWO_PORTS);
    d.wires.get("a").put(&frame(9, 1));
    let fdb = || d.get("/v1/bridges/br0/fdb")["fdb"].clone();
    eventually("the address is learned", || fdb().as_array().unwrap().len() == 1);
    assert_eq!(fdb()[0]["mac"], "02:00:00:00:00:01");
    assert_eq!(fdb()[0]["port"], "a");
    assert_eq!(d.get("/v1/bridges")["bridges"][0]["fdb_entries"], 1);
    assert_eq!(d.ok("DELETE", "/v1/bridges/br0/fdb?port=b", json!({}))["flushed"], 0);
    assert_eq!(d.ok("DELETE", "/v1/bridges/br0/fdb", json!({}))["flushed"], 1);
    assert_eq!(fdb(), json!([]));
    assert_eq!(d.refused("DELETE", "/v1/bridges/nope/fdb", json!({})).1, "not_found");
}

#[test]
fn a_vm_that_has_arrived_is_announced_in_its_vlans() {
    let d = TestDaemon::start(TWO_PORTS);
    let mac = [0x52, 0x54, 0, 0, 0, 1];
    let out = || d.wires.get("b").take();
    d.event("a", Event::Announce(mac));
    let mut got = Vec::new();
    eventually("the announcement floods", || {
        got.extend(out());
        !got.is_empty()
    });
    assert_eq!(got, [ferry_migrate::announce::rarp(mac, None)]);
    // The bridge has learned where the VM is.
    eventually("learned", || d.get("/v1/bridges/br0/fdb")["fdb"][0]["port"] == "a");

    d.ok("PUT", "/v1/ports/a/vlan", json!({"mode": "trunk", "trunks": [10, 20]}));
    got.clear();
    d.event("a", Event::Announce(mac));
    eventually("one per VLAN", || {
        got.extend(out());
        got.len() == 2
    });
    assert_eq!(got, [10, 20].map(|v| ferry_migrate::announce::rarp(mac, Some(v))));
    // Nobody can be announced under a group address.
    d.event("a", Event::Announce([0xff; 6]));
    d.event("a", Event::Announce(mac));
    got.clear();
    eventually("only the second", || {
        got.extend(out());
        got.len() == 2
    });
    let s = d.get("/v1/stats");
    assert_eq!(s["originated"]["frames"], 5);
}

#[test]
fn refusals_name_what_is_wrong_and_what_to_do() {
    let d = TestDaemon::start(TWO_PORTS);
    let before = d.get("/v1/config");
    let sock = |n: &str| format!("{}/{n}.sock", d.dir.path().display());
    let port = |name: &str, bridge: &str, socket: &str| json!({"name": name, "type": "vhost-user", "bridge": bridge, "socket": socket});
    let cases: Vec<(&str, &str, Value, u16, &str, &str, &str)> = vec![
        ("POST", "/v1/ports", port("a", "br0", &sock("x")), 409, "exists", "port a exists", "another name"),
        (
            "POST",
            "/v1/ports",
            port("c", "br", &sock("c")),
            422,
            "invalid",
            "port c: bridge: port \"c\" is in bridge \"br\"",
            "did you mean \"br0\"?",
        ),
        ("POST", "/v1/ports", port("c", "br0", &sock("a")), 422, "invalid", "is used twice", "its own"),
        ("POST", "/v1/ports", json!({"name": "c"}), 422, "invalid", "`type` is missing", "add it"),
        ("POST", "/v1/ports", json!([]), 400, "bad_request", "must be a JSON object", "{"),
        (
            "PATCH",
            "/v1/ports/a",
            json!({"mtuu": 1}),
            422,
            "invalid",
            "port a: mtuu: unknown key `mtuu`",
            "did you mean `mtu`?",
        ),
        ("PATCH", "/v1/ports/a", json!({"name": "z"}), 400, "bad_request", "cannot be renamed", "under the new name"),
        ("PATCH", "/v1/ports/nope", json!({"mtu": 1}), 404, "not_found", "no port nope", "ferry port list"),
        ("DELETE", "/v1/ports/nope", json!({}), 404, "not_found", "no port nope", "ferry port list"),
        ("DELETE", "/v1/bridges/br0", json!({}), 409, "conflict", "still has 2 port(s): a, b", "remove or move"),
        (
            "PUT",
            "/v1/log",
            json!({"level": "loud"}),
            422,
            "invalid",
            "log.level: \"loud\" is not a level",
            "use \"error\"",
        ),
        ("PUT", "/v1/log", json!({"lvl": "info"}), 400, "bad_request", "unknown key `lvl`", "level"),
        ("POST", "/v1/status", json!({}), 405, "method_not_allowed", "POST is not possible", "docs/API.md"),
        ("GET", "/v2/status", json!({}), 404, "not_found", "there is no /v2/status", "/v1"),
        (
            "POST",
            "/v1/ports",
            port("c", "br0", "/refuse"),
            500,
            "failed",
            "could not add port c: port c: the device refuses; the former state was restored",
            "use another",
        ),
    ];
    for (method, path, body, status, code, message, hint) in cases {
        let (s, c, m, h) = d.refused(method, path, body);
        assert_eq!((s, c.as_str()), (status, code), "{method} {path}: {m}");
        assert!(m.contains(message) && h.contains(hint), "{method} {path}: {m} / {h}");
    }
    assert_eq!(d.get("/v1/config"), before);
}

#[test]
fn dry_run_only_says_what_would_be_done() {
    let d = TestDaemon::start(TWO_PORTS);
    let o = d.ok("PATCH", "/v1/ports/b?dry_run=true", json!({"queue_pairs": 1}));
    assert_eq!(o["applied"], false);
    assert_eq!(o["steps"], json!(["remove port b", "add port b"]));
    assert_eq!(o["restarted_ports"], json!(["b"]));
    assert_eq!(d.get("/v1/ports/b")["queue_pairs"], 2);
}

#[test]
fn put_replaces_and_creates() {
    let d = TestDaemon::start(TWO_PORTS);
    d.ok("PUT", "/v1/bridges/br1", json!({"fdb_ageing_s": 60}));
    assert_eq!(d.get("/v1/bridges/br1")["fdb_ageing_s"], 60);
    d.ok("PUT", "/v1/bridges/br2", json!({}));
    assert_eq!(d.get("/v1/bridges/br2")["origin"], "runtime");
    d.ok("DELETE", "/v1/bridges/br2", json!({}));
    assert_eq!(d.refused("GET", "/v1/bridges/br2", json!({})).0, 404);
}

#[test]
fn reload_applies_the_difference_and_keeps_runtime_changes() {
    let d = TestDaemon::start(TWO_PORTS);
    let a = d.wires.get("a");
    d.ok("POST", "/v1/bridges", json!({"name": "rt"}));
    d.ok("PATCH", "/v1/ports/a", json!({"fdb_limit": 5}));
    let file = TWO_PORTS.replace("queue_pairs = 2", "queue_pairs = 1\nadmin_up = false") + "[log]\nformat = \"json\"\n";
    d.write(&file);
    let dry = d.ok("POST", "/v1/reload?dry_run=true", json!({}));
    assert_eq!(dry["applied"], false);
    let o = d.ok("POST", "/v1/reload", json!({}));
    assert_eq!(o["restarted_ports"], json!(["b"]));
    assert_eq!(o["restart_required"], json!(["log.format"]));
    assert_eq!(d.get("/v1/ports/b")["queue_pairs"], 1);
    assert_eq!(d.get("/v1/ports/a")["fdb_limit"], 5);
    assert!(std::sync::Arc::ptr_eq(&a, &d.wires.get("a")), "a was not touched");
    let s = d.get("/v1/status");
    assert_eq!(s["restart_required"], json!(["log.format"]));
    assert_eq!(s["not_in_file"].as_array().unwrap().len(), 2, "{s}");

    // Again: nothing to do. Then without what was changed at run time.
    assert_eq!(d.ok("POST", "/v1/reload", json!({}))["changes"], json!([]));
    d.ok("POST", "/v1/reload?discard_runtime=true", json!({}));
    assert_eq!(d.get("/v1/status")["not_in_file"], json!([]));
    assert_eq!(d.get("/v1/ports/a")["fdb_limit"], 256);
}

#[test]
fn a_reload_that_cannot_be_done_changes_nothing() {
    let d = TestDaemon::start(TWO_PORTS);
    let (before, a, b) = (d.get("/v1/config"), d.wires.get("a"), d.wires.get("b"));
    // Not valid.
    d.write(&TWO_PORTS.replace("queue_pairs = 2", "queue_pairs = 20"));
    let (status, code, message, _) = d.refused("POST", "/v1/reload", json!({}));
    assert_eq!((status, code.as_str()), (422, "invalid"));
    assert!(message.contains("ferry.toml:21:15: error: port[1].queue_pairs: must be 1 to 8"), "{message}");
    // Valid, but the last of its steps fails: bridge, thread and port changes before it are taken back.
    d.write(
        &(TWO_PORTS.replace("[[bridge]]\nname = \"br1\"", "[[bridge]]\nname = \"br2\"").replacen(
            "[[switch.pmd]]",
            "[[switch.pmd]]\n[[switch.pmd]]",
            1,
        ) + "vlan = { mode = \"access\", tag = 3 }\n\
             [[port]]\nname = \"z\"\ntype = \"dpdk\"\nbridge = \"br2\"\ndevice = \"refuse0\"\n"),
    );
    let (status, code, message, hint) = d.refused("POST", "/v1/reload", json!({}));
    assert_eq!((status, code.as_str(), hint.as_str()), (500, "failed", "use another"));
    assert!(message.contains("the former state was restored"), "{message}");
    assert_eq!(d.get("/v1/config"), before);
    assert_eq!(d.get("/v1/pmds")["pmds"].as_array().unwrap().len(), 2);
    assert_eq!(d.get("/v1/status")["damage"], "");
    assert!(std::sync::Arc::ptr_eq(&a, &d.wires.get("a")) && std::sync::Arc::ptr_eq(&b, &d.wires.get("b")));
    // The file is still the old one as far as the daemon is concerned: a corrected one is applied in full.
    d.write(&TWO_PORTS.replace("queue_pairs = 2", "fdb_limit = 9"));
    d.ok("POST", "/v1/reload", json!({}));
    assert_eq!(d.get("/v1/ports/b")["fdb_limit"], 9);
    // What the file removes may be in use by what was added at run time.
    d.ok("POST", "/v1/ports", json!({"name": "rt", "type": "dpdk", "bridge": "br1", "device": "net_null0"}));
    d.write(&TWO_PORTS.replace("[[bridge]]\nname = \"br1\"\n", ""));
    let (status, code, message, hint) = d.refused("POST", "/v1/reload", json!({}));
    assert_eq!((status, code.as_str()), (409, "conflict"));
    assert!(message.contains("port rt: bridge: port \"rt\" is in bridge \"br1\""), "{message}");
    assert!(hint.contains("--discard-runtime"), "{hint}");
    d.ok("POST", "/v1/reload?discard_runtime=true", json!({}));
    assert!(!d.wires.is_open("rt"));
}

fn raw(d: &TestDaemon, request: &[u8]) -> String {
    let mut s = UnixStream::connect(d.socket()).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The daemon may answer and close before it has read everything.
    let _ = s.write_all(request);
    let mut answer = Vec::new();
    let _ = s.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn hostile_requests_are_bounded() {
    let d = TestDaemon::start(TWO_PORTS);
    let big = format!("POST /v1/ports HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", 5 << 20);
    let answer = raw(&d, &[big.as_bytes(), &vec![b'x'; 5 << 20]].concat());
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("\"too_large\""), "{answer}");
    let answer = raw(&d, b"POST /v1/ports HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\n{x}");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("not JSON"), "{answer}");
    let answer = raw(&d, b"\x16\x03\x01\x00 nonsense\r\n\r\n");
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    // A client that never finishes its request is cut off and harms nobody meanwhile.
    let start = Instant::now();
    let mut slow = UnixStream::connect(d.socket()).unwrap();
    slow.write_all(b"GET /v1/status HTTP/1.1\r\nHo").unwrap();
    d.get("/v1/status");
    assert!(start.elapsed() < Duration::from_secs(5));
    slow.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(start.elapsed() < Duration::from_secs(25));
}

#[test]
fn connections_beyond_the_limit_wait() {
    let d = TestDaemon::start(TWO_PORTS);
    let idle: Vec<_> =
        (0..ferry_control::api::MAX_CONNECTIONS).map(|_| UnixStream::connect(d.socket()).unwrap()).collect();
    let mut extra = UnixStream::connect(d.socket()).unwrap();
    extra.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    extra.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(extra.read(&mut [0; 16]).is_err(), "all places are taken");
    drop(idle);
    extra.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut head = [0; 12];
    extra.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
}

#[test]
fn metrics_are_scraped_over_loopback() {
    let d = TestDaemon::start(&format!("[metrics]\nenabled = true\nlisten = \"127.0.0.1:0\"\n{TWO_PORTS}"));
    d.wires.get("a").put(&frame(9, 1));
    eventually("the frame arrives", || d.wires.get("b").take().len() == 1);
    d.ok("PATCH", "/v1/ports/b", json!({"admin_up": false}));
    d.wires.get("a").put(&frame(9, 1));
    eventually("the second frame is counted", || d.get("/v1/stats?port=a")["ports"][0]["rx"][0]["frames"] == 2);
    let scrape = || {
        let mut s = std::net::TcpStream::connect(d.metrics_address()).unwrap();
        s.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        text
    };
    let text = scrape();
    assert!(text.contains("application/openmetrics-text"), "{text}");
    let value = |text: &str, line: &str| {
        let found = text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("no {line} in\n{text}"));
        found.trim().parse::<f64>().unwrap() as u64
    };
    assert_eq!(value(&text, "ferry_port_rx_frames_total{port=\"a\",queue=\"0\"}"), 2);
    assert_eq!(value(&text, "ferry_port_rx_forwarded_frames_total{port=\"a\",queue=\"0\"}"), 1);
    assert_eq!(value(&text, "ferry_port_tx_frames_total{port=\"b\"}"), 1);
    assert_eq!(value(&text, "ferry_port_state{port=\"a\",type=\"vhost-user\",bridge=\"br0\",state=\"up\"}"), 1);
    assert_eq!(value(&text, "ferry_bridge_fdb_entries{bridge=\"br0\"}"), 1);
    assert_eq!(value(&text, "ferry_runtime_changes"), 1);
    let dropped: u64 = text
        .lines()
        .filter(|l| l.starts_with("ferry_port_rx_dropped_frames_total{port=\"a\"") && l.contains("reason=\""))
        .map(|l| l.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(dropped, 1);
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn the_socket_has_its_permissions_and_goes_with_the_daemon() {
    let mut d = TestDaemon::start(&format!("api.mode = \"0600\"\n{TWO_PORTS}"));
    let m = std::fs::metadata(d.socket()).unwrap();
    assert_eq!(m.permissions().mode() & 0o777, 0o600);
    assert_eq!(m.uid(), nix::unistd::getuid().as_raw());
    d.stop();
    assert!(!d.socket().exists());
    assert!(!d.wires.is_open("a") && !d.wires.is_open("b"), "ports are closed");
}
