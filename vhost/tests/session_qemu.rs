//! The session against a real QEMU whose firmware (iPXE's virtio-net driver, from QEMU's option ROM) sends DHCP requests.
//! No guest image is needed. Skipped where QEMU is not installed.
mod session_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::signals::{NoObserver, PortEvent};
use ferry_vhost::socket::Role;
use session_support::*;

struct Qemu(Child);

impl Qemu {
    fn start(chardev: &str) -> Option<Self> {
        Self::start_with(chardev, &[])
    }

    fn start_with(chardev: &str, more: &[&str]) -> Option<Self> {
        let accelerator = std::env::var("FERRY_QEMU_ACCEL").unwrap_or_else(|_| "tcg".into());
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-m", "64", "-boot", "n"])
            .args(["-accel", &accelerator])
            .args(["-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-machine", "memory-backend=ram0"])
            .args(["-chardev", chardev, "-netdev", "vhost-user,id=vn0,chardev=vc0"])
            .args(["-device", "virtio-net-pci,netdev=vn0,mac=52:54:00:00:00:0a,vectors=0"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self(child)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: qemu-system-x86_64 is not installed");
                None
            }
            Err(e) => panic!("starting QEMU: {e}"),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QMP monitor.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Self {
        let stream = Peer::connect(path).stream;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut qmp = Self(BufReader::new(stream));
        qmp.line();
        qmp.command(r#"{"execute":"qmp_capabilities"}"#);
        qmp
    }
    fn line(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
    fn command(&mut self, text: &str) -> serde_json::Value {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{text}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
    fn migration(&mut self) -> String {
        self.command(r#"{"execute":"query-migrate"}"#)["status"].as_str().unwrap_or_default().to_owned()
    }
}

fn open(path: &Path, role: Role) -> (VhostPort, Pmd) {
    let domain = Domain::new();
    let mut port =
        VhostPort::start(VhostPortConfig::new("q", path, role), Arc::clone(&domain), Arc::new(NoObserver)).unwrap();
    let pmd = Pmd::start(&domain, &mut port);
    (port, pmd)
}

/// Waits up to a minute: firmware under emulation on a busy machine takes its time.
fn frames_arrive(port: &VhostPort, pmd: &Pmd) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let first = pmd.frames.load(Ordering::Relaxed);
    while pmd.frames.load(Ordering::Relaxed) == first {
        assert!(std::time::Instant::now() < end, "no frames: {:#?}", port.status());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn qemu_connects_runs_its_rings_and_comes_back_after_a_restart_of_the_switch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (port, pmd) = open(&path, Role::Server);
    let Some(_qemu) = Qemu::start(&format!("socket,id=vc0,path={},reconnect=1", path.display())) else { return };
    frames_arrive(&port, &pmd);
    let s = port.status();
    assert!(s.link_up && s.rings.iter().all(|r| r.running), "{s:#?}");
    assert_eq!(s.state, "running");
    assert!(s.relay.early_enables >= 1, "QEMU 7.2 enables rings at device realize: {:?}", s.relay);
    assert_eq!((s.relay.refused, s.relay.unknown_codes), (0, 0), "{s:#?}");
    eprintln!("{}", serde_json::to_string(&s).unwrap());
    drop((port, pmd));
    let (port, pmd) = open(&path, Role::Server);
    frames_arrive(&port, &pmd);
    assert_eq!(port.status().state, "running");
    assert_eq!(port.status().relay.refused, 0);
}

#[test]
fn qemu_as_server_gets_its_switch_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let Some(qemu) = Qemu::start(&format!("socket,id=vc0,path={},server=on", path.display())) else { return };
    let (port, pmd) = open(&path, Role::Client);
    frames_arrive(&port, &pmd);
    assert!(port.status().link_up);
    drop((port, pmd));
    let (port, pmd) = open(&path, Role::Client);
    frames_arrive(&port, &pmd);
    assert!(port.status().link_up);
    drop(qemu);
    eventually("disconnected", || !port.status().connected);
    assert_eq!(port.status().state, "connecting");
}

#[test]
fn a_live_migration_cancelled_and_repeated_tells_its_story() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let path = |name: &str| from.dir.path().join(name);
    let monitor = |name: &str| format!("unix:{},server=on,wait=off", path(name).display());
    let chardev = |f: &Fixture| format!("socket,id=vc0,path={},reconnect=1", f.path.display());
    let Some(_source) = Qemu::start_with(&chardev(&from), &["-qmp", &monitor("q0")]) else { return };
    frames_arrive(&from.port, &from.pmd);
    let mut source = Qmp::connect(&path("q0"));

    // Cancelled while memory goes over at a crawl: logging starts and ends on running rings.
    let stall = path("stall");
    let _listener = std::os::unix::net::UnixListener::bind(&stall).unwrap();
    source.command(r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":65536}}"#);
    source.command(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"unix:{}"}}}}"#, stall.display()));
    eventually("logging", || from.status().logging && from.status().log_bytes > 0);
    assert!(from.status().link_up);
    source.command(r#"{"execute":"migrate_cancel"}"#);
    eventually("cancelled", || source.migration() == "cancelled");
    eventually("logging ends", || !from.status().logging);
    assert!(from.status().link_up && from.events.any(|e| matches!(e, PortEvent::LogStopped)));

    // For real.
    let _target = Qemu::start_with(&chardev(&to), &["-incoming", "defer", "-qmp", &monitor("q1")]).unwrap();
    let mut target = Qmp::connect(&path("q1"));
    let uri = path("m");
    target.command(&format!(r#"{{"execute":"migrate-incoming","arguments":{{"uri":"unix:{}"}}}}"#, uri.display()));
    source.command(r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1000000000}}"#);
    source.command(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"unix:{}"}}}}"#, uri.display()));
    eventually("completed", || source.migration() == "completed");
    for index in [0, 1] {
        assert!(
            from.events.any(|e| matches!(e, PortEvent::VringStopped { index: i, logging: true, .. } if *i == index))
        );
    }
    assert!(from.events.any(|e| matches!(e, PortEvent::VringStopped { logging: true, last: true, .. })));
    assert_eq!(from.running(), 0);
    eventually("the destination runs", || to.running() == 2);
    frames_arrive(&to.port, &to.pmd);
    for f in [&from, &to] {
        let s = f.status();
        assert_eq!((s.relay.refused, s.relay.unknown_codes, &s.fault), (0, 0, &None), "{s:#?}");
    }
    let names = from.events.names();
    let story: Vec<&str> =
        names.iter().map(String::as_str).filter(|n| n.starts_with("Log") || *n == "VringStopped").collect();
    assert_eq!(
        story,
        ["LogBase", "LogStarted", "LogStopped", "LogBase", "LogStarted", "VringStopped", "VringStopped"],
        "{names:?}"
    );
}
