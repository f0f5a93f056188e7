//! Uplinks that end in the kernel: a tap device and a veth pair, with a network namespace as the peer.
mod common;

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::*;
use ferry_dataplane::port::{Armed, RxQueue, TxPort};
use ferry_ffi::uplink::Uplink;

const OURS: [u8; 4] = [10, 99, 0, 1];
const THEIRS: [u8; 4] = [10, 99, 0, 2];

/// The peer's side of an interface named `dev` in its namespace: address, up, and where we are.
fn peer(ns: &Netns, dev: &str, mtu: u16) {
    ns.run(&format!("ip addr add 10.99.0.2/24 dev {dev}"));
    ns.run(&format!("ip link set {dev} mtu {mtu} up"));
    ns.run(&format!("ip neigh add 10.99.0.1 lladdr 02:00:00:00:00:99 dev {dev}"));
}

/// Sends `payload` to the peer's socket with an unfinished checksum and expects it there; then the other way round.
/// The kernel drops datagrams with a wrong checksum.
fn exchange(port: &mut Port, socket: &std::net::UdpSocket, mac: [u8; 6], payload: &[u8]) -> bool {
    let number = socket.local_addr().unwrap().port();
    let (f, owed) = udp_frame(mac, OURS, THEIRS, number, payload);
    assert_eq!(port.send(&[(&f, owed)]).accepted, 1);
    let mut buffer = vec![0; 65536];
    let (n, from) = loop {
        // Between opening and directing its signals elsewhere, another test's tap may interrupt this.
        match socket.recv_from(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            other => break other.expect("the datagram did not reach the peer"),
        }
    };
    assert_eq!(&buffer[..n], payload);
    assert_eq!(from.to_string(), "10.99.0.1:4000");

    socket.send_to(payload, "10.99.0.1:4000").unwrap();
    let (got, offload) = port.receive_where(|f| f.len() > 42 && f[12..14] == [8, 0] && f[23] == 17);
    assert_eq!(&got[42..42 + payload.len()], payload);
    assert!(udp_sum_is_right(&got), "the frame carries an unfinished checksum");
    offload.csum_valid
}

/// Name of the thread that gets a descriptor's signals (fcntl(2), F_GETOWN_EX).
#[allow(unsafe_code)]
fn signal_owner(fd: i32) -> String {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [-1i32; 2];
    // SAFETY: struct f_owner_ex is two ints.
    assert_eq!(unsafe { libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr()) }, 0);
    assert_eq!(owner[0], 0, "F_OWNER_TID");
    std::fs::read_to_string(format!("/proc/self/task/{}/comm", owner[1])).unwrap().trim().to_owned()
}

#[test]
fn a_tap_device_talks_to_the_kernel_and_wakes_a_sleeper() {
    let ns = Netns::new();
    let dev = unique("ft");
    let mut port = Port::open(&config(&format!("{},iface={dev}", unique("net_tap"))));
    let status = port.uplink.status();
    assert_eq!(status.driver, "net_tap");
    assert!(status.mac.is_some() && status.link.is_some_and(|l| l.up), "{status:?}");
    run(&format!("ip link set {dev} netns {}", ns.0));
    peer(&ns, &dev, 1500);
    let socket = ns.udp("10.99.0.2:0");
    let mac = ns.mac(&dev);
    let caps = port.tx.capabilities(&port.guard);
    assert!(caps.csum, "the driver computes checksums");
    assert!(!caps.tso4 && !caps.tso6, "its segmentation is not to be trusted");
    assert_eq!(caps.max_frame_bytes, 1518);
    for len in [1, 2, 777, 1472] {
        let payload: Vec<u8> = (0..len).map(|i| i as u8).collect();
        assert!(exchange(&mut port, &socket, mac, &payload), "the driver verified the checksum");
    }

    // Sleep and wake by the descriptor.
    while !port.receive().is_empty() {}
    assert_eq!(port.uplink.status().rx_mode, "interrupt");
    let Armed::Fd(fd) = port.rx.arm(&port.guard) else { panic!("no descriptor") };
    assert_eq!(signal_owner(fd), "ferry-dpdk-sig", "no other thread is interrupted by the driver's signals");
    while readable(fd, 50) {
        port.receive(); // stray frames of the kernel's own
    }
    socket.send_to(b"wake", "10.99.0.1:4000").unwrap();
    assert!(readable(fd, 2000), "no wake-up");
    port.rx.disarm(&port.guard);
    let (got, _) = port.receive_where(|f| f.ends_with(b"wake"));
    assert_eq!(got.len(), 46);
    assert!(!readable(fd, 0), "readable without a frame");
    let stats = port.uplink.status().stats.unwrap();
    assert!(stats.rx_frames >= 5 && stats.tx_frames >= 4 && stats.rx_no_mbuf == 0, "{stats:?}");
    port.close();
    assert!(!interface_exists(&dev));
}

#[test]
fn a_tap_device_loses_no_buffer() {
    let dev = unique("ft");
    let mut port = Port::open(&config(&format!("{},iface={dev}", unique("net_tap"))));
    run(&format!("sysctl -qw net.ipv6.conf.{dev}.disable_ipv6=1"));
    while !port.receive().is_empty() {}
    let idle = port.in_use();
    let (f, owed) = udp_frame([0xff; 6], OURS, THEIRS, 9, &[7; 1400]);
    for _ in 0..20 {
        assert_eq!(port.send(&[(&f, owed); 32]).accepted, 0xffff_ffff);
        port.receive();
    }
    assert_eq!(port.in_use(), idle, "sent and returned");
    // Interface down: refused, freed, not lost.
    run(&format!("ip link set {dev} down"));
    assert_eq!(port.send(&[(&f, owed); 32]).accepted, 0);
    assert_eq!(port.in_use(), idle);
    assert!(!port.uplink.status().link.unwrap().up);
    port.close();
}

#[test]
fn tap_queues_come_in_pairs_and_all_carry_traffic() {
    let ns = Netns::new();
    let dev = unique("ft");
    let mut config = config(&format!("{},iface={dev}", unique("net_tap")));
    config.rx_queues = 4;
    config.tx_queues = 1;
    let mut uplink = Uplink::open(&config, &eal()).unwrap();
    assert_eq!(uplink.status().tx_queues, 4);
    run(&format!("ip link set {dev} netns {}", ns.0));
    peer(&ns, &dev, 1500);
    let mut queues = uplink.take_rx_queues();
    let guard = guard();
    let mut burst = ferry_dataplane::frame::RxBurst::new();
    let mut counts = [0usize; 4];
    // The kernel spreads flows over the queues by their hash.
    let sockets: Vec<_> = (0..64).map(|_| ns.udp("10.99.0.2:0")).collect();
    sockets.iter().for_each(|s| assert_eq!(s.send_to(b"hello", "10.99.0.1:4000").unwrap(), 5));
    let end = Instant::now() + DEADLINE;
    while counts.iter().sum::<usize>() < 64 && Instant::now() < end {
        for (queue, count) in queues.iter_mut().zip(&mut counts) {
            burst.clear();
            queue.receive(&guard, &mut burst);
            *count += (0..burst.len()).filter(|&i| burst.meta(i).unwrap().len == 47).count();
            queue.release(&guard);
        }
    }
    assert_eq!(counts.iter().sum::<usize>(), 64, "{counts:?}");
    assert!(counts.iter().filter(|&&n| n > 0).count() > 1, "{counts:?}");
    drop(queues);
    uplink.close().unwrap();
}

#[test]
fn a_tap_device_says_what_it_cannot() {
    let mut big = config(&format!("{},iface={}", unique("net_tap"), unique("ft")));
    big.mtu = 9000;
    let e = Uplink::open(&big, &eal()).unwrap_err().to_string();
    assert!(e.contains("9000") && e.contains("1504") && e.contains("net_af_packet"), "{e}");
    // A name that the kernel refuses.
    let e = Uplink::open(&config(&format!("{},iface=lo", unique("net_tap"))), &eal()).unwrap_err().to_string();
    assert!(e.contains("net_tap") && e.contains("attaching"), "{e}");
}

#[test]
fn the_mtu_of_a_running_tap_changes() {
    let dev = unique("ft");
    let port = Port::open(&config(&format!("{},iface={dev}", unique("net_tap"))));
    port.uplink.set_mtu(1400).unwrap();
    assert_eq!(port.uplink.mtu(), 1400);
    assert_eq!(port.tx.capabilities(&port.guard).max_frame_bytes, 1418);
    assert_eq!(std::fs::read_to_string(format!("/sys/class/net/{dev}/mtu")).unwrap().trim(), "1400");
    let e = port.uplink.set_mtu(9000).unwrap_err().to_string();
    assert!(e.contains("MTU"), "{e}");
    assert_eq!(port.uplink.mtu(), 1400);
    port.close();
}

/// A veth pair: ours here, the peer's in `ns`, without offloads on the peer's side (see the uplink's notes on drivers).
struct Veth {
    ours: String,
    theirs: String,
}

impl Veth {
    fn new(ns: &Netns, mtu: u16) -> Self {
        let (ours, theirs) = (unique("fv"), unique("fp"));
        run(&format!("ip link add {ours} mtu {mtu} type veth peer name {theirs} netns {} mtu {mtu}", ns.0));
        run(&format!("sysctl -qw net.ipv6.conf.{ours}.disable_ipv6=1"));
        run(&format!("ip link set {ours} up"));
        let v = Self { ours, theirs };
        peer(ns, &v.theirs, mtu);
        v
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "del", &self.ours]).status();
    }
}

/// A UDP socket whose checksums the sender's stack finishes itself (what `ethtool -K PEER tx off` does for all).
fn finished(ns: &Netns, veth: &Veth) -> std::net::UdpSocket {
    ns.inside(|| tx_checksum_off(&veth.theirs));
    ns.udp("10.99.0.2:0")
}

/// ETHTOOL_STXCSUM and friends (ethtool(8)'s -K tx off) by ioctl: ethtool itself may not be installed.
#[allow(unsafe_code)]
fn tx_checksum_off(dev: &str) {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut value = [ETHTOOL_STXCSUM, 0u32];
    // SAFETY: an ifreq whose data points to an ethtool_value, alive during the call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (d, s) in request.ifr_name.iter_mut().zip(dev.bytes()) {
            *d = s as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        assert_eq!(libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw const request), 0);
    }
}

#[test]
fn a_packet_socket_on_a_veth_talks_to_the_kernel() {
    let ns = Netns::new();
    let veth = Veth::new(&ns, 1500);
    let socket = finished(&ns, &veth);
    let mac = ns.mac(&veth.theirs);
    let mut port = Port::open(&config(&format!("{},iface={}", unique("net_af_packet"), veth.ours)));
    let idle = port.in_use();
    assert_eq!(port.rx.arm(&port.guard), Armed::Poll);
    for len in [1, 777, 1472] {
        exchange(&mut port, &socket, mac, &vec![len as u8; len]);
    }
    assert_eq!(port.in_use(), idle);
    let status = port.uplink.status();
    assert_eq!((status.driver.as_str(), status.rx_mode, status.promiscuous), ("net_af_packet", "poll", Some(true)));
    assert!(port.uplink.if_index().is_some());
    port.close();
}

#[test]
fn a_packet_socket_takes_jumbo_frames() {
    let ns = Netns::new();
    let veth = Veth::new(&ns, 9000);
    let socket = finished(&ns, &veth);
    let mac = ns.mac(&veth.theirs);
    let mut config = config(&format!("{},iface={}", unique("net_af_packet"), veth.ours));
    config.mtu = 9000;
    // The interface's MTU follows the port's.
    run(&format!("ip link set {} mtu 2000", veth.ours));
    let mut port = Port::open(&config);
    let status = port.uplink.status();
    assert!(status.device.contains("framesz=16384") && status.warnings.is_empty(), "{status:?}");
    assert_eq!(std::fs::read_to_string(format!("/sys/class/net/{}/mtu", veth.ours)).unwrap().trim(), "9000");
    let payload: Vec<u8> = (0..8972).map(|i| (i / 7) as u8).collect();
    exchange(&mut port, &socket, mac, &payload);
    port.close();
}

/// Sends a raw frame out of `dev`; to be called inside its namespace (packet(7)).
#[allow(unsafe_code)]
fn send_raw(dev: &str, frame: &[u8]) {
    let name = std::ffi::CString::new(dev).unwrap();
    // SAFETY: plain system calls on local values.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(fd >= 0);
        let mut to: libc::sockaddr_ll = std::mem::zeroed();
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        to.sll_halen = 6;
        let sent = libc::sendto(
            fd,
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        );
        libc::close(fd);
        assert_eq!(sent, frame.len() as isize);
    }
}

#[test]
fn vlan_tags_arrive_in_the_frame_and_leave_in_it() {
    let ns = Netns::new();
    let veth = Veth::new(&ns, 1500);
    let mut port = Port::open(&config(&format!("{},iface={}", unique("net_af_packet"), veth.ours)));
    let idle = port.in_use();
    let (plain, _) = udp_frame([0xff; 6], THEIRS, OURS, 9, b"tagged");
    let mut tagged = plain[..12].to_vec();
    tagged.extend([0x81, 0, 0x60, 7]);
    tagged.extend(&plain[12..]);
    // The kernel takes the tag out of the frame on the way; it must be back in its place.
    ns.inside(|| send_raw(&veth.theirs, &tagged));
    let (got, _) = port.receive_where(|f| f.windows(6).any(|w| w == b"tagged"));
    assert_eq!(got, tagged);
    assert_eq!(port.in_use(), idle);
    port.close();
}

#[test]
fn an_idle_tap_uses_no_processor_time_for_its_signals() {
    // The driver has the kernel signal each packet; without packets there is nothing.
    let dev = unique("ft");
    let mut port = Port::open(&config(&format!("{},iface={dev}", unique("net_tap"))));
    run(&format!("sysctl -qw net.ipv6.conf.{dev}.disable_ipv6=1"));
    while !port.receive().is_empty() {}
    let Armed::Fd(fd) = port.rx.arm(&port.guard) else { panic!() };
    let start = Instant::now();
    while readable(fd, 20) {
        port.receive();
        assert!(start.elapsed() < Duration::from_secs(5), "never quiet");
    }
    port.close();
}
