//! The session against DPDK's virtio-user (dpdk-testpmd sending as fast as it can), split and packed. Skipped where it is not installed.
mod session_support;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::signals::NoObserver;
use ferry_vhost::socket::Role;
use session_support::*;

struct Testpmd(Child);

impl Testpmd {
    fn start(prefix: &str, device: &str, queues: u16) -> Option<Self> {
        let child = Command::new("dpdk-testpmd")
            // Both lcores on any processor: the machine may have one only.
            .arg(format!("--lcores=0@(0-{0}),1@(0-{0})", thread::available_parallelism().map_or(0, |n| n.get() - 1)))
            .args(["--no-huge", "--no-shconf", "-m", "256", "--no-pci", "--no-telemetry"])
            .args(["--file-prefix", prefix, "--vdev", device, "--"])
            .args(["--forward-mode=txonly", "--auto-start", "--total-num-mbufs=4096", "--stats-period", "100"])
            .args([format!("--rxq={queues}"), format!("--txq={queues}"), "--no-mlockall".into()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        match child {
            Ok(child) => Some(Self(child)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: dpdk-testpmd is not installed");
                None
            }
            Err(e) => panic!("starting dpdk-testpmd: {e}"),
        }
    }

    /// Ends it and returns what it said.
    fn output(mut self) -> String {
        use std::io::Read;
        let _ = self.0.kill();
        let mut text = String::new();
        let _ = self.0.stdout.take().unwrap().read_to_string(&mut text);
        let _ = self.0.stderr.take().unwrap().read_to_string(&mut text);
        text
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(name: &str, options: &str, role: Role, queues: u16) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let domain = Domain::new();
    let mut config = VhostPortConfig::new("t", &path, role);
    config.queue_pairs = queues;
    let mut port = VhostPort::start(config, Arc::clone(&domain), Arc::new(NoObserver)).unwrap();
    let pmd = Pmd::start(&domain, &mut port);
    let server = if role == Role::Client { ",server=1" } else { "" };
    let device = format!("net_virtio_user0,path={}{server},queues={queues},{options}", path.display());
    let Some(testpmd) = Testpmd::start(name, &device, queues) else { return };
    let end = Instant::now() + Duration::from_secs(30);
    while pmd.frames.load(Ordering::Relaxed) < 5000 {
        if Instant::now() > end {
            panic!("{options}: no frames: {:#?}\n{}", port.status(), testpmd.output());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let s = port.status();
    assert_eq!(s.state, "running", "{s:#?}");
    assert!(s.rings.iter().all(|r| r.running), "{s:#?}");
    assert_eq!((s.relay.refused, s.relay.unknown_codes), (0, 0), "{s:#?}");
    let packed = options.contains("packed_vq=1");
    assert!(s.rings.iter().all(|r| r.kind == if packed { "packed" } else { "split" }));
    assert_eq!(s.features.contains(&"in_order"), options.contains("in_order=1"), "{options}: {:?}", s.features);
}

#[test]
fn virtio_user_split_and_packed_in_both_roles() {
    run("fs1", "packed_vq=0,in_order=0,mrg_rxbuf=1", Role::Server, 1);
    run("fs2", "packed_vq=1,in_order=1,mrg_rxbuf=0", Role::Server, 1);
    run("fs3", "packed_vq=1,in_order=0,mrg_rxbuf=1", Role::Client, 2);
    run("fs4", "packed_vq=0,in_order=1,mrg_rxbuf=0", Role::Client, 2);
}
