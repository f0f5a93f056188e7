//! The session against a real QEMU whose firmware (iPXE's virtio-net driver, from QEMU's option ROM) sends DHCP requests.
//! No guest image is needed. Skipped where QEMU is not installed.
mod frontend;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::signals::NoObserver;
use ferry_vhost::socket::Role;
use frontend::*;

struct Qemu(Child);

impl Qemu {
    fn start(chardev: &str) -> Option<Self> {
        let accelerator = std::env::var("FERRY_QEMU_ACCEL").unwrap_or_else(|_| "tcg".into());
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-m", "64", "-boot", "n"])
            .args(["-accel", &accelerator])
            .args(["-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-machine", "memory-backend=ram0"])
            .args(["-chardev", chardev, "-netdev", "vhost-user,id=vn0,chardev=vc0"])
            .args(["-device", "virtio-net-pci,netdev=vn0,mac=52:54:00:00:00:0a,vectors=0"])
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
