//! Shared by the integration tests: one EAL per process, frames, traffic through the port traits, kernel peers.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(unsafe_code, reason = "setns and poll")]
use std::net::UdpSocket;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{Body, Offload, RxBurst, TxFrame};
use ferry_dataplane::port::{RxQueue, TxPort, TxReport};
use ferry_dataplane::qsbr::{Domain, Guard};
use ferry_ffi::eal::{Eal, EalConfig, Memory};
use ferry_ffi::uplink::{EthRx, EthTx, Uplink, UplinkConfig};

pub const DEADLINE: Duration = Duration::from_secs(10);

/// The EAL of this test process, without hugepages.
pub fn eal() -> Eal {
    static EAL: OnceLock<Eal> = OnceLock::new();
    EAL.get_or_init(|| {
        let config = EalConfig { memory: Memory::NoHuge, memory_mb: 768, ..EalConfig::default() };
        Eal::start(&config).unwrap()
    })
    .clone()
}

/// A name that no other test uses, short enough for an interface.
pub fn unique(prefix: &str) -> String {
    static N: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}x{}", std::process::id(), N.fetch_add(1, Relaxed))
}

pub fn guard() -> Guard {
    Domain::new().register().unwrap()
}

pub fn config(device: &str) -> UplinkConfig {
    UplinkConfig::new(unique("up"), device)
}

/// An open uplink with one queue, split into what a test needs.
pub struct Port {
    pub uplink: Uplink,
    pub rx: EthRx,
    pub tx: EthTx,
    pub guard: Guard,
    pub burst: RxBurst,
}

impl Port {
    pub fn open(config: &UplinkConfig) -> Self {
        let mut uplink = Uplink::open(config, &eal()).unwrap_or_else(|e| panic!("{e}"));
        let rx = uplink.take_rx_queues().remove(0);
        assert!(uplink.take_rx_queues().is_empty());
        let tx = uplink.tx();
        Self { uplink, rx, tx, guard: guard(), burst: RxBurst::new() }
    }

    pub fn send<F: AsRef<[u8]>>(&self, frames: &[(F, Offload)]) -> TxReport {
        send_lane(&self.tx, &self.guard, 0, frames)
    }

    /// Receives until `wanted` says so of a frame, and returns that one with its offload. Others are dropped.
    pub fn receive_where(&mut self, mut wanted: impl FnMut(&[u8]) -> bool) -> (Vec<u8>, Offload) {
        let end = Instant::now() + DEADLINE;
        while Instant::now() < end {
            let mut found = None;
            for (frame, offload) in self.receive() {
                if found.is_none() && wanted(&frame) {
                    found = Some((frame, offload));
                }
            }
            if let Some(found) = found {
                return found;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        panic!("the frame did not come");
    }

    /// One burst, copied out and released.
    pub fn receive(&mut self) -> Vec<(Vec<u8>, Offload)> {
        self.burst.clear();
        self.rx.receive(&self.guard, &mut self.burst);
        let frames = (0..self.burst.len())
            .map(|i| {
                let meta = *self.burst.meta(i).unwrap();
                let mut bytes = vec![0; meta.len as usize];
                assert_eq!(self.burst.body(i, 0).read(&mut bytes), bytes.len());
                (bytes, meta.offload)
            })
            .collect();
        self.rx.release(&self.guard);
        frames
    }

    pub fn in_use(&self) -> u32 {
        self.uplink.status().mbufs.in_use
    }

    /// Gives everything back and closes: the device must be gone.
    pub fn close(self) {
        let Self { uplink, rx, tx, .. } = self;
        drop((rx, tx));
        uplink.close().unwrap();
    }
}

pub fn send_lane<F: AsRef<[u8]>>(tx: &EthTx, guard: &Guard, lane: usize, frames: &[(F, Offload)]) -> TxReport {
    let frames: Vec<TxFrame> = frames
        .iter()
        .map(|(bytes, offload)| TxFrame { head: bytes.as_ref(), body: Body::EMPTY, offload: *offload, flow_hash: 0 })
        .collect();
    let mut report = TxReport::default();
    report.reset(DropReason::TxNotReady);
    tx.send(guard, lane, &frames, &mut report);
    tx.flush(guard, lane);
    report
}

pub fn sum16(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum()
}

pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An Ethernet/IPv4/UDP frame whose UDP checksum holds only the pseudo-header's sum, and the offload that says so.
pub fn udp_frame(dst_mac: [u8; 6], src: [u8; 4], dst: [u8; 4], port: u16, payload: &[u8]) -> (Vec<u8>, Offload) {
    let udp_len = 8 + payload.len() as u16;
    let mut f = Vec::new();
    f.extend(dst_mac);
    f.extend([2, 0, 0, 0, 0, 0x99, 8, 0, 0x45, 0]);
    f.extend((20 + udp_len).to_be_bytes());
    f.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    f.extend(src);
    f.extend(dst);
    let ip_sum = !fold(sum16(&f[14..34]));
    f[24..26].copy_from_slice(&ip_sum.to_be_bytes());
    f.extend(4000u16.to_be_bytes());
    f.extend(port.to_be_bytes());
    f.extend(udp_len.to_be_bytes());
    let pseudo = fold(sum16(&src) + sum16(&dst) + 17 + u32::from(udp_len));
    f.extend(pseudo.to_be_bytes());
    f.extend(payload);
    (f, Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() })
}

/// Whether a UDP/IPv4 frame's UDP checksum is right.
pub fn udp_sum_is_right(f: &[u8]) -> bool {
    let udp_len = u16::from_be_bytes([f[38], f[39]]);
    let sum = sum16(&f[26..34]) + 17 + u32::from(udp_len) + sum16(&f[34..34 + usize::from(udp_len)]);
    fold(sum) == 0xffff
}

/// Runs a command; panics with its output unless it succeeds.
pub fn run(command: &str) {
    let mut words = command.split_whitespace();
    let out = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A network namespace, removed at the end.
pub struct Netns(pub String);

impl Netns {
    pub fn new() -> Self {
        let name = unique("fn");
        run(&format!("ip netns add {name}"));
        let ns = Self(name);
        ns.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        ns
    }

    pub fn run(&self, command: &str) {
        run(&format!("ip netns exec {} {command}", self.0));
    }

    /// Runs `f` on a thread inside the namespace.
    pub fn inside<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let path = format!("/run/netns/{}", self.0);
        std::thread::scope(|s| {
            s.spawn(move || {
                use std::os::fd::AsRawFd;
                let file = std::fs::File::open(path).unwrap();
                // SAFETY: a namespace descriptor; only this thread moves.
                assert_eq!(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
                f()
            })
            .join()
            .unwrap()
        })
    }

    /// A UDP socket inside the namespace.
    pub fn udp(&self, addr: &str) -> UdpSocket {
        let socket = self.inside(|| UdpSocket::bind(addr).unwrap());
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    pub fn mac(&self, interface: &str) -> [u8; 6] {
        let out = Command::new("ip")
            .args(["netns", "exec", &self.0, "ip", "-o", "link", "show", "dev", interface])
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let mac = text.split("link/ether ").nth(1).unwrap().split_whitespace().next().unwrap();
        let bytes: Vec<u8> = mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// True when `fd` becomes readable within `timeout_ms`.
pub fn readable(fd: i32, timeout_ms: i32) -> bool {
    let end = Instant::now() + Duration::from_millis(timeout_ms as u64);
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
        let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry.
        match unsafe { libc::poll(&mut p, 1, left) } {
            1 => return p.revents & libc::POLLIN != 0,
            -1 if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return false,
        }
    }
}

/// Socket and interface exist?
pub fn interface_exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}
