//! `ferry migrate` and `ferry pki` as programs, against a daemon that gives canned answers.
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;

/// What was asked: method and path, body.
type Asked = Arc<Mutex<Vec<(String, Value)>>>;

/// Answers requests one after the other; `answer` is given "METHOD PATH" and how often that has been asked before.
struct Canned {
    dir: TempDir,
    asked: Asked,
}

impl Canned {
    fn new(answer: impl Fn(&str, usize) -> (u16, Value) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let asked: Asked = Arc::default();
        let log = Arc::clone(&asked);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                let mut head = Vec::new();
                while reader.read_line(&mut line).unwrap() > 2 {
                    head.push(std::mem::take(&mut line).trim_end().to_ascii_lowercase());
                }
                let Some(first) = head.first() else { continue };
                let mut words = first.split(' ');
                let request = format!("{} {}", words.next().unwrap().to_uppercase(), words.next().unwrap());
                let length =
                    head.iter().find_map(|h| h.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let mut log = log.lock().unwrap();
                let before = log.iter().filter(|(r, _)| *r == request).count();
                log.push((request.clone(), serde_json::from_slice(&body).unwrap_or_default()));
                let (status, value) = answer(&request, before);
                let text = value.to_string();
                let answer = format!(
                    "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                    text.len()
                );
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        Self { dir, asked }
    }

    fn ferry(&self, args: &[&str]) -> Output {
        let socket = self.dir.path().join("api.sock");
        Command::new(env!("CARGO_BIN_EXE_ferry")).arg("--socket").arg(socket).args(args).output().unwrap()
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn not_found() -> (u16, Value) {
    (404, json!({"error": {"code": "not_found", "message": "VM web1 has had no migration"}}))
}

fn view(state: &str, rounds: u32, outcome: &str) -> Value {
    let rounds: Vec<Value> =
        (0..rounds).map(|n| json!({"round": n, "entries": 10, "bytes": 100, "duration_ms": 1})).collect();
    json!({
        "vm": "web1", "role": "source", "state": state, "peer": "host-b", "attempt": 1, "began_at_ms": 1000, "connections": 10,
        "rounds": rounds, "outcome": outcome, "text": "as it happened",
    })
}

#[test]
fn watching_waits_follows_and_ends_with_the_migration() {
    let daemon = Canned::new(|request, before| match (request, before) {
        ("GET /v1/migrations/web1", 0) => not_found(),
        ("GET /v1/vms/web1", _) => (200, json!({})),
        ("GET /v1/migrations/web1", 1) => (200, view("pre-copy", 1, "")),
        ("GET /v1/migrations/web1", 2) => (200, view("pre-copy", 1, "")),
        ("GET /v1/migrations/web1", 3) => (200, view("frozen", 3, "")),
        ("GET /v1/migrations/web1", _) => (200, view("gone", 3, "migrated")),
        _ => panic!("{request}"),
    });
    let out = daemon.ferry(&["migrate", "watch", "web1"]);
    assert_eq!(
        text(&out.stdout),
        "VM web1 goes to host-b, began 1970-01-01 00:00:01 UTC\n\
         round 0: 10 records, 100 B in 1 ms\n\
         round 1: 10 records, 100 B in 1 ms\n\
         round 2: 10 records, 100 B in 1 ms\n\
         the VM has stopped\n\
         migrated to host-b: 10 connections\n"
    );
    assert_eq!(text(&out.stderr), "no migration is under way; waiting for VM web1\n");
    assert_eq!(out.status.code(), Some(0));
}

#[test]
fn a_migration_that_fails_is_status_1_and_what_does_not_exist_4() {
    let daemon = Canned::new(|request, before| match (request, before) {
        ("GET /v1/migrations", 0) => (200, json!({"migrations": [view("pre-copy", 0, "")]})),
        ("GET /v1/migrations", _) => (200, json!({"migrations": [view("active", 0, "cancelled")]})),
        ("GET /v1/migrations/web1", _) => (200, view("active", 0, "cancelled")),
        ("GET /v1/migrations/web2", _) => not_found(),
        ("GET /v1/vms/web2", _) => (404, json!({"error": {"code": "not_found", "message": "there is no VM web2"}})),
        _ => panic!("{request}"),
    });
    let out = daemon.ferry(&["migrate", "watch"]);
    assert!(text(&out.stdout).ends_with("web1: cancelled: as it happened\n"), "{}", text(&out.stdout));
    assert_eq!(text(&out.stderr), "error: VM web1: cancelled: as it happened\n");
    assert_eq!(out.status.code(), Some(1));
    let out = daemon.ferry(&["migrate", "watch", "web1", "--once", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["outcome"], "cancelled");
    assert_eq!(out.status.code(), Some(1));
    let out = daemon.ferry(&["migrate", "watch", "web2"]);
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(4), "error: there is no VM web2\n"));
    assert_eq!(daemon.ferry(&["migrate", "status", "web2"]).status.code(), Some(4));
}

#[test]
fn objects_for_programs_are_one_per_line_and_change() {
    let daemon = Canned::new(|_, before| {
        let v = match before {
            0 | 1 => view("pre-copy", 0, ""),
            2 => view("pre-copy", 1, ""),
            _ => view("gone", 1, "migrated"),
        };
        (200, json!({ "migrations": [v] }))
    });
    let out = daemon.ferry(&["migrate", "watch", "--json"]);
    let objects: Vec<Value> = text(&out.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let rounds: Vec<usize> = objects.iter().map(|o| o["rounds"].as_array().unwrap().len()).collect();
    assert_eq!((rounds, out.status.code()), (vec![0, 1, 1], Some(0)));
}

#[test]
fn checks_end_with_their_verdict() {
    let daemon = Canned::new(|request, _| {
        let ok = request == "POST /v1/migrations/web1/check";
        let verdict = if ok { "ok" } else { "failed" };
        let items = json!([{"what": "reachability", "verdict": verdict, "found": "192.0.2.2:9478", "fix": if ok { "" } else { "start it" }}]);
        (200, json!({"vm": "web1", "to": "host-b", "ok": ok, "items": items}))
    });
    let out = daemon.ferry(&["migrate", "check", "web1", "--to", "host-b"]);
    assert_eq!(
        text(&out.stdout),
        "VERDICT  WHAT          FOUND\nok       reachability  192.0.2.2:9478\nVM web1 can migrate to host-b\n"
    );
    assert_eq!(out.status.code(), Some(0));
    let out = daemon.ferry(&["migrate", "check", "web2", "--to", "host-b"]);
    assert!(text(&out.stdout).contains("fix: start it\n"));
    assert_eq!(out.status.code(), Some(1));
    let out = daemon.ferry(&["migrate", "check", "web2", "--to", "host-b", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["ok"], false);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(daemon.asked()[0], ("POST /v1/migrations/web1/check".into(), json!({"to": "host-b"})));
}

#[test]
fn requests_are_those_of_the_api() {
    let daemon = Canned::new(|request, _| match request {
        "POST /v1/migrations/web1/expect" => (200, json!({"vm": "web1", "until_ms": 1})),
        "DELETE /v1/migrations/web1/expect" => (200, json!({})),
        "POST /v1/migrations/web1/cancel" => (200, view("active", 0, "cancelled")),
        "GET /v1/migration" => (200, json!({"enabled": false, "host": "host-a"})),
        "GET /v1/migrations" => (200, json!({"migrations": [], "expected": []})),
        "GET /v1/migrations/history?vm=web1&limit=2" => (200, json!({"history": [view("gone", 2, "migrated")]})),
        _ => panic!("{request}"),
    });
    let ok = |args: &[&str]| {
        let out = daemon.ferry(&[&["migrate"], args].concat());
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout).to_owned()
    };
    assert!(ok(&["expect", "web1"]).starts_with("VM web1 is expected from any host that the rules allow"));
    ok(&["expect", "web1", "--from", "host-a", "--for", "2h"]);
    assert_eq!(ok(&["expect", "web1", "--withdraw"]), "VM web1 is expected no more\n");
    assert_eq!(ok(&["cancel", "web1"]), "VM web1: cancelled: as it happened\n");
    assert_eq!(ok(&["status"]), "host host-a: migrations switched off\n");
    assert!(ok(&["status", "--json"]).contains("\"expected\": []"));
    assert_eq!(ok(&["list", "web1", "--limit", "2"]).lines().count(), 2);
    let asked = daemon.asked();
    assert_eq!(asked[0].1, json!({"from": null, "for_s": 600}));
    assert_eq!(asked[1].1, json!({"from": "host-a", "for_s": 7200}));
    for wrong in
        [&["expect", "web1", "--for", "0"][..], &["expect", "web1", "--withdraw", "--from", "x"], &["check", "web1"]]
    {
        assert_eq!(daemon.ferry(&[&["migrate"], wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn certificates_are_made_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let ferry = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
        command.current_dir(dir.path()).args(["--socket", "/nonexistent", "pki"]).args(args).output().unwrap()
    };
    for args in [&["init", "ca"][..], &["issue", "ca", "host-a", "--address", "192.0.2.1"], &["show", "ca"]] {
        let out = ferry(args);
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    }
    let out = ferry(&["issue", "ca", "host-a"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).contains("exists already; run: ferry pki rotate ca --host host-a"),
        "{}",
        text(&out.stderr)
    );
    for wrong in
        [&["issue", "ca", "192.0.2.7"][..], &["issue", "ca", "x", "--days", "0"], &["init", "ca2", "--name", ""]]
    {
        assert_eq!(ferry(wrong).status.code(), Some(2), "{wrong:?}");
    }
}
