//! The firewall on the packet path: real PMD threads, ports in private memory, a clock that the tests move.
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::bridge::fdb::PortId;
use ferry_dataplane::bridge::vlan::VlanMode;
use ferry_dataplane::clock::Clock;
use ferry_dataplane::conntrack::{Connection, Cursor, TrackConfig};
use ferry_dataplane::divert::Divert;
use ferry_dataplane::enforce::{EventKind, VmId, VmOptions};
use ferry_dataplane::firewall::limits::LimitsConfig;
use ferry_dataplane::firewall::policy::{
    Action, Direction, PolicyDocument, PortPolicy, PortRange, Protocol, Rule, SecurityGroup,
};
use ferry_dataplane::packet::MacAddr;
use ferry_dataplane::pmd::IdleTuning;
use ferry_dataplane::qsbr::Domain;
use ferry_dataplane::switch::{BridgeOptions, FirewallOptions, PmdOptions, PortOptions, Switch, SwitchError};
use ferry_dataplane::testing::{MemKinds, NapSleeper, Wire};

const A_MAC: u64 = 0x0200_0000_000a;
const B_MAC: u64 = 0x0200_0000_000b;
const OUT_MAC: u64 = 0x0200_0000_00ff;
const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const OUT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 99);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const RST_ACK: u8 = 0x14;

/// A switch with VM A, VM B and an uplink without firewall.
struct Net {
    switch: Arc<Switch<MemKinds>>,
    now_ns: Arc<AtomicU64>,
    bridge: u16,
    a: Arc<Wire>,
    b: Arc<Wire>,
    out: Arc<Wire>,
    ports: [PortId; 3],
    vms: [VmId; 2],
    sent: std::cell::Cell<u64>,
}

fn policy(mac: u64, address: Ipv4Addr, groups: &[&str]) -> PortPolicy {
    let security_groups = groups.iter().map(|g| (*g).into()).collect();
    let mut policy = PortPolicy { security_groups, ..PortPolicy::default() };
    policy.anti_spoofing.mac = Some(MacAddr::from_u64(mac));
    policy.anti_spoofing.addresses = vec![address.to_string().parse().unwrap()];
    policy
}

/// Group `web` lets TCP 80 in from anywhere, and all from its own members.
fn document() -> PolicyDocument {
    let mut document = PolicyDocument::default();
    let web = Rule {
        protocol: Protocol::TCP,
        ports: vec![PortRange::single(80)],
        name: Some("http".into()),
        ..Rule::allow(Direction::Ingress)
    };
    let members = Rule { remote_group: Some("friends".into()), ..Rule::allow(Direction::Ingress) };
    document.security_groups.insert("web".into(), SecurityGroup { rules: vec![web], ..SecurityGroup::default() });
    document
        .security_groups
        .insert("friends".into(), SecurityGroup { rules: vec![members], ..SecurityGroup::default() });
    document
}

impl Net {
    fn new(groups: &[&str], change: impl Fn(&mut VmOptions, &mut PortPolicy)) -> Self {
        let (clock, now_ns) = Clock::simulated();
        now_ns.store(1_000_000_000, Ordering::Relaxed);
        let switch = Switch::new(Domain::new(), clock);
        for i in 0..2 {
            let options = PmdOptions {
                name: format!("pmd{i}"),
                idle: Arc::new(IdleTuning::new(50, 200)),
                sleeper: Box::new(NapSleeper::default()),
                on_start: Box::new(|| {}),
            };
            switch.add_pmd(options).unwrap();
        }
        let bridge = switch.add_bridge("br0", BridgeOptions::default()).unwrap();
        switch.set_policy(document()).unwrap();
        let mut ports = Vec::new();
        let mut wires = Vec::new();
        let mut vms = Vec::new();
        for (name, mac, address) in [("a", A_MAC, A), ("b", B_MAC, B)] {
            let mut vm = VmOptions { capacity: 4096, ..VmOptions::named(name) };
            let mut policy = policy(mac, address, groups);
            change(&mut vm, &mut policy);
            let vm = switch.add_vm(vm).unwrap();
            let wire = Wire::new();
            let firewall = Some(FirewallOptions { vm, policy });
            let options = PortOptions { name: name.into(), bridge: Some(bridge), firewall, ..PortOptions::default() };
            ports.push(switch.add_port(options, wire.tx(), vec![wire.rx()], &[]).unwrap());
            wires.push(wire);
            vms.push(vm);
        }
        let out = Wire::new();
        let options = PortOptions { name: "uplink".into(), bridge: Some(bridge), ..PortOptions::default() };
        ports.push(switch.add_port(options, out.tx(), vec![out.rx()], &[]).unwrap());
        let [a, b]: [_; 2] = wires.try_into().map_err(|_| ()).unwrap();
        let net = Self {
            switch,
            now_ns,
            bridge,
            a,
            b,
            out,
            ports: ports.try_into().unwrap(),
            vms: vms.try_into().unwrap(),
            sent: 0.into(),
        };
        // Everybody's place becomes known.
        net.send(&net.out, &arp(OUT_MAC, OUT, A));
        net.send(&net.a, &arp(A_MAC, A, B));
        net.send(&net.b, &arp(B_MAC, B, A));
        for wire in [&net.a, &net.b, &net.out] {
            assert_eq!(wire.take().len(), 2, "ARP passes under default deny");
        }
        net
    }

    /// Sends one frame and waits until the switch is done with it and all that follows from it.
    fn send(&self, wire: &Wire, frame: &[u8]) {
        wire.put(frame);
        self.sent.set(self.sent.get() + 1);
        self.settle();
    }

    /// The same with several frames, which the switch finds at once.
    fn send_all(&self, wire: &Wire, frames: &[Vec<u8>]) {
        wire.put_all(frames);
        self.sent.set(self.sent.get() + frames.len() as u64);
        self.settle();
    }

    fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let s = self.switch.stats();
            let received: u64 = s.ports.iter().map(|p| p.rx.frames).sum();
            let balanced = s.received() == s.forwarded() + s.dropped() + s.held();
            if received >= self.sent.get() && balanced {
                // Held fragments and answers are sent behind the burst that caused them.
                let iterations = |s: &ferry_dataplane::switch::SwitchStats| -> Vec<u64> {
                    s.pmds.iter().map(|p| p.stats.iterations).collect()
                };
                let before = iterations(&s);
                while iterations(&self.switch.stats()).iter().zip(&before).any(|(now, then)| *now < then + 2) {
                    std::thread::yield_now();
                }
                return;
            }
            assert!(Instant::now() < end, "{s:#?}");
            std::thread::yield_now();
        }
    }

    fn later(&self, ms: u64) {
        self.now_ns.fetch_add(ms * 1_000_000, Ordering::Relaxed);
        // The threads have looked at the clock.
        std::thread::sleep(Duration::from_millis(5));
        self.settle();
    }

    fn connections(&self, vm: usize) -> Vec<Connection> {
        let vm = self.switch.vm(self.vms[vm]).unwrap();
        let mut all = Vec::new();
        let mut cursor = Cursor::default();
        while vm.map().walk(&mut cursor, 7, &mut |c| all.push(*c)) {}
        all
    }

    fn denied(&self, port: usize, direction: Direction, reason: &str) -> u64 {
        let stats = self.switch.firewall_stats();
        let stats = &stats[&self.ports[port]];
        let of = if direction == Direction::Ingress { &stats.ingress } else { &stats.egress };
        of.denied.get(reason).copied().unwrap_or(0)
    }

    /// Three-way handshake from the uplink's station to A, port 80.
    fn connect_to_a(&self, port: u16) {
        self.send(&self.out, &tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), SYN, 100, 0, b""));
        assert_eq!(self.a.take().len(), 1);
        self.send(&self.a, &tcp((A_MAC, A, 80), (OUT_MAC, OUT, port), SYN_ACK, 500, 101, b""));
        assert_eq!(self.out.take().len(), 1);
        self.send(&self.out, &tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), ACK, 101, 501, b""));
        assert_eq!(self.a.take().len(), 1);
    }
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut s = start;
    for pair in bytes.chunks(2) {
        s += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    !(s as u16)
}

fn ethernet(dst: u64, src: u64, ethertype: u16) -> Vec<u8> {
    let mut f = dst.to_be_bytes()[2..].to_vec();
    f.extend_from_slice(&src.to_be_bytes()[2..]);
    f.extend_from_slice(&ethertype.to_be_bytes());
    f
}

fn arp(mac: u64, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut f = ethernet(0xffff_ffff_ffff, mac, 0x0806);
    f.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend_from_slice(&mac.to_be_bytes()[2..]);
    f.extend_from_slice(&sender.octets());
    f.extend_from_slice(&[0; 6]);
    f.extend_from_slice(&target.octets());
    f
}

/// `fragment`: the header's flags and offset field; its payload is cut out by the caller.
fn ipv4(macs: (u64, u64), src: Ipv4Addr, dst: Ipv4Addr, proto: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut f = ethernet(macs.1, macs.0, 0x0800);
    let mut h = vec![0x45, 0];
    h.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    h.extend_from_slice(&[0x12, 0x34]);
    h.extend_from_slice(&fragment.to_be_bytes());
    h.extend_from_slice(&[64, proto, 0, 0]);
    h.extend_from_slice(&src.octets());
    h.extend_from_slice(&dst.octets());
    let c = sum(&h, 0);
    h[10..12].copy_from_slice(&c.to_be_bytes());
    f.extend_from_slice(&h);
    f.extend_from_slice(payload);
    f
}

fn pseudo(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, len: usize) -> u32 {
    let words = |a: Ipv4Addr| a.octets().chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum::<u32>();
    words(src) + words(dst) + u32::from(proto) + len as u32
}

type Side = (u64, Ipv4Addr, u16);

fn tcp(src: Side, dst: Side, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Vec<u8> {
    let mut t = src.2.to_be_bytes().to_vec();
    t.extend_from_slice(&dst.2.to_be_bytes());
    t.extend_from_slice(&seq.to_be_bytes());
    t.extend_from_slice(&ack.to_be_bytes());
    t.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    t.extend_from_slice(data);
    let c = sum(&t, pseudo(src.1, dst.1, 6, t.len()));
    t[16..18].copy_from_slice(&c.to_be_bytes());
    ipv4((src.0, dst.0), src.1, dst.1, 6, 0x4000, &t)
}

fn udp_payload(src: Side, dst: Side, data: &[u8]) -> Vec<u8> {
    let mut u = src.2.to_be_bytes().to_vec();
    u.extend_from_slice(&dst.2.to_be_bytes());
    u.extend_from_slice(&(8 + data.len() as u16).to_be_bytes());
    u.extend_from_slice(&[0, 0]);
    u.extend_from_slice(data);
    let c = sum(&u, pseudo(src.1, dst.1, 17, u.len()));
    u[6..8].copy_from_slice(&c.to_be_bytes());
    u
}

fn udp(src: Side, dst: Side, data: &[u8]) -> Vec<u8> {
    ipv4((src.0, dst.0), src.1, dst.1, 17, 0, &udp_payload(src, dst, data))
}

#[test]
fn default_deny_lets_in_what_rules_allow_and_answers_to_what_the_vm_asked() {
    let net = Net::new(&["web"], |_, _| {});
    net.connect_to_a(4000);
    // Another port of the VM: denied, under its name.
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4001), (A_MAC, A, 22), SYN, 1, 0, b""));
    assert!(net.a.take().is_empty());
    assert_eq!(net.denied(0, Direction::Ingress, "fw_denied"), 1);
    // What A asks is allowed, and so are the answers.
    net.send(&net.a, &udp((A_MAC, A, 5000), (OUT_MAC, OUT, 53), b"question"));
    assert_eq!(net.out.take().len(), 1);
    net.send(&net.out, &udp((OUT_MAC, OUT, 53), (A_MAC, A, 5000), b"answer"));
    assert_eq!(net.a.take().len(), 1);
    net.send(&net.out, &udp((OUT_MAC, OUT, 53), (A_MAC, A, 5001), b"no answer"));
    assert!(net.a.take().is_empty());
    let connections = net.connections(0);
    assert_eq!(connections.len(), 2);
    let tcp = connections.iter().find(|c| c.key.local_port == 80).unwrap();
    assert!(tcp.assured() && tcp.key.remote() == IpAddr::V4(OUT) && tcp.decision.allowed());
    let limits = net.switch.vm_status(net.vms[0]).unwrap().limits;
    assert_eq!((limits.connections, limits.half_open), (2, 0));
    let mut events = Vec::new();
    assert_eq!(net.switch.take_firewall_events(&mut events), 0);
    let denials: Vec<_> = events.iter().filter(|e| matches!(e.kind, EventKind::Denied(_))).collect();
    assert_eq!(denials.len(), 2);
    assert_eq!(denials[0].flow.unwrap().dst_port(), 22);
}

#[test]
fn an_established_connection_asks_the_policy_once() {
    let net = Net::new(&["web"], |_, _| {});
    net.connect_to_a(4000);
    let lookups = |net: &Net| net.switch.firewall_stats()[&net.ports[0]].ingress.policy_lookups;
    assert_eq!(lookups(&net), 1);
    for i in 0..10 {
        net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 101 + i * 5, 501, b"hello"));
    }
    assert_eq!(net.a.take().len(), 10);
    assert_eq!(lookups(&net), 1);
    // Rules that change nothing for this port change nothing for its connections.
    let mut document = document();
    document.security_groups.insert("other".into(), SecurityGroup::default());
    net.switch.set_policy(document).unwrap();
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 151, 501, b"hello"));
    assert_eq!((net.a.take().len(), lookups(&net)), (1, 1));
}

#[test]
fn a_revoked_rule_cuts_its_connections_both_ways_and_no_others() {
    let net = Net::new(&["web"], |_, _| {});
    net.connect_to_a(4000);
    net.send(&net.a, &udp((A_MAC, A, 5000), (OUT_MAC, OUT, 53), b"question"));
    net.out.take();
    let mut revoked = document();
    revoked.security_groups.get_mut("web").unwrap().rules.clear();
    net.switch.set_policy(revoked).unwrap();
    let data = tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 101, 501, b"hello");
    net.send(&net.out, &data);
    assert!(net.a.take().is_empty());
    assert_eq!(net.denied(0, Direction::Ingress, "fw_revoked"), 1);
    // Not from the side that may open connections either, however often it tries.
    for _ in 0..3 {
        net.send(&net.a, &tcp((A_MAC, A, 80), (OUT_MAC, OUT, 4000), ACK, 501, 101, b"still here"));
    }
    assert!(net.out.take().is_empty());
    assert_eq!(net.denied(0, Direction::Egress, "fw_revoked"), 3);
    // The other connection never paused.
    net.send(&net.out, &udp((OUT_MAC, OUT, 53), (A_MAC, A, 5000), b"answer"));
    assert_eq!(net.a.take().len(), 1);
    // With the rule back the connection goes on.
    net.switch.set_policy(document()).unwrap();
    net.send(&net.out, &data);
    assert_eq!(net.a.take().len(), 1);
    // Revoked and left alone, it is forgotten in minutes rather than in five days.
    let mut revoked = document();
    revoked.security_groups.get_mut("web").unwrap().rules.clear();
    net.switch.set_policy(revoked).unwrap();
    net.send(&net.out, &data);
    net.later(121_000);
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), SYN, 9000, 0, b""));
    assert!(net.a.take().is_empty());
    assert!(!net.connections(0).iter().any(|c| c.key.local_port == 80 && c.remaining_ms(0) > 0 && c.assured()));
}

#[test]
fn between_two_local_vms_both_judge() {
    let net = Net::new(&["web"], |_, _| {});
    net.send(&net.a, &tcp((A_MAC, A, 6000), (B_MAC, B, 80), SYN, 1, 0, b""));
    assert_eq!(net.b.take().len(), 1);
    net.send(&net.b, &tcp((B_MAC, B, 80), (A_MAC, A, 6000), SYN_ACK, 9, 2, b""));
    assert_eq!(net.a.take().len(), 1);
    assert_eq!((net.connections(0).len(), net.connections(1).len()), (1, 1));
    // A may ask, B does not let it in.
    net.send(&net.a, &tcp((A_MAC, A, 6001), (B_MAC, B, 22), SYN, 1, 0, b""));
    assert!(net.b.take().is_empty());
    assert_eq!(net.denied(1, Direction::Ingress, "fw_denied"), 1);
    assert_eq!((net.connections(0).len(), net.connections(1).len()), (2, 1));
}

#[test]
fn group_members_know_each_other_and_joining_takes_effect_at_once() {
    let net = Net::new(&["friends"], |_, _| {});
    net.send(&net.a, &tcp((A_MAC, A, 6000), (B_MAC, B, 22), SYN, 1, 0, b""));
    assert_eq!(net.b.take().len(), 1, "A is a member of the group that B lets in");
    net.send(&net.out, &tcp((OUT_MAC, OUT, 6000), (B_MAC, B, 22), SYN, 1, 0, b""));
    assert!(net.b.take().is_empty());
    // A leaves the group: its connection is cut.
    let options = PortOptions {
        name: "a".into(),
        bridge: Some(net.bridge),
        firewall: Some(FirewallOptions { vm: net.vms[0], policy: policy(A_MAC, A, &[]) }),
        ..PortOptions::default()
    };
    net.switch.update_port(net.ports[0], options).unwrap();
    net.send(&net.a, &tcp((A_MAC, A, 6000), (B_MAC, B, 22), SYN, 1, 0, b""));
    assert!(net.b.take().is_empty());
    assert_eq!(net.denied(1, Direction::Ingress, "fw_revoked"), 1);
}

#[test]
fn spoofed_frames_are_dropped_and_named() {
    let net = Net::new(&["web"], |_, _| {});
    net.send(&net.a, &udp((B_MAC, A, 1), (OUT_MAC, OUT, 1), b""));
    net.send(&net.a, &udp((A_MAC, B, 1), (OUT_MAC, OUT, 1), b""));
    net.send(&net.a, &arp(A_MAC, B, OUT));
    net.send(&net.a, &udp((A_MAC, A, 67), (OUT_MAC, OUT, 68), b"offer"));
    assert!(net.out.take().is_empty() && net.b.take().is_empty());
    for reason in ["spoof_source_mac", "spoof_source_ipv4", "spoof_arp_sender_address", "spoof_dhcp_server"] {
        assert_eq!(net.denied(0, Direction::Egress, reason), 1, "{reason}");
    }
    let mut events = Vec::new();
    net.switch.take_firewall_events(&mut events);
    let spoofed = events.iter().filter_map(|e| e.flow).find(|f| f.src() == IpAddr::V4(B));
    assert_eq!(spoofed.map(|f| f.dst_port()), Some(1), "told with its addresses");
    // Nor did the switch learn the stolen address.
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (B_MAC, B, 80), SYN, 100, 0, b""));
    assert_eq!((net.a.take().len(), net.b.take().len()), (0, 1));
}

#[test]
fn frames_for_others_are_not_shown_to_a_vm() {
    let net = Net::new(&["web"], |_, _| {});
    net.send(&net.out, &udp((OUT_MAC, OUT, 1), (0x0200_0000_0077, A, 80), b"unknown station"));
    assert!(net.a.take().is_empty() && net.b.take().is_empty());
    let stats = net.switch.stats();
    let uplink = stats.ports.iter().find(|p| p.name == "uplink").unwrap();
    assert_eq!(uplink.rx.drops.get("no_destination"), Some(&1));
}

#[test]
fn what_a_vm_sends_to_a_station_that_nobody_knows_goes_to_the_uplink_alone() {
    let net = Net::new(&["web"], |_, _| {});
    let unknown = (0x0200_0000_0077, OUT, 80);
    let talk = |n: u16| udp((A_MAC, A, 5000 + n % 3), unknown, &n.to_be_bytes());
    // A burst in which most frames go where the one before them went, and one that must not.
    let mut frames: Vec<_> = (0..40).map(talk).collect();
    frames.insert(20, udp((A_MAC, B, 5000), unknown, b"another's address"));
    net.send_all(&net.a, &frames);
    frames.remove(20);
    assert_eq!(net.out.take(), frames);
    assert!(net.b.take().is_empty() && net.a.take().is_empty());
    assert_eq!((net.connections(0).len(), net.denied(0, Direction::Egress, "spoof_source_ipv4")), (3, 1));
    // It answers, from where nobody expected it: from then on it is known there.
    net.send(&net.out, &udp(unknown, (A_MAC, A, 5001), b"answer"));
    assert_eq!(net.a.take().len(), 1);
    net.send(&net.a, &talk(1));
    assert_eq!(net.out.take(), [talk(1)]);
}

#[test]
fn rejected_senders_are_told() {
    let net = Net::new(&["web"], |_, policy| policy.default_ingress = Action::Reject);
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4001), (A_MAC, A, 22), SYN, 7, 0, b""));
    let answers = net.out.take();
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0][47], RST_ACK, "a reset: {:02x?}", answers[0]);
    net.send(&net.out, &udp((OUT_MAC, OUT, 4001), (A_MAC, A, 53), b"x"));
    let answers = net.out.take();
    assert_eq!((answers[0][23], answers[0][34], answers[0][35]), (1, 3, 3), "ICMP port unreachable");
    assert_eq!(net.denied(0, Direction::Ingress, "fw_rejected"), 2);
    // From a local VM: its own firewall lets the answer in, as one to its question, and its entry ends with it.
    net.send(&net.a, &tcp((A_MAC, A, 6001), (B_MAC, B, 22), SYN, 7, 0, b""));
    assert_eq!(net.a.take().len(), 1);
    assert!(net.b.take().is_empty());
    net.send(&net.a, &udp((A_MAC, A, 6002), (B_MAC, B, 53), b"x"));
    assert_eq!(net.a.take().len(), 1, "ICMP related to the connection");
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.half_open, net.connections(0).len() as u32);
}

#[test]
fn fragments_are_judged_whole_and_forwarded_unchanged() {
    let net = Net::new(&["friends"], |_, _| {});
    let whole = udp_payload((A_MAC, A, 7000), (B_MAC, B, 7001), &[0x5a; 1480]);
    let first = ipv4((A_MAC, B_MAC), A, B, 17, 0x2000, &whole[..1000]);
    let last = ipv4((A_MAC, B_MAC), A, B, 17, 1000 / 8, &whole[1000..]);
    // In the wrong order, through both VMs' firewalls.
    net.send(&net.a, &last);
    assert!(net.b.take().is_empty());
    net.send(&net.a, &first);
    assert_eq!(net.b.take(), [first.clone(), last.clone()]);
    assert_eq!(net.connections(1).len(), 1);
    let stats = net.switch.stats();
    assert_eq!((stats.held(), stats.originated.frames, stats.originated.held), (4, 4, 2), "{stats:#?}");
    // From outside the same is not allowed: the datagram as a whole is dropped.
    let whole = udp_payload((OUT_MAC, OUT, 7000), (B_MAC, B, 7001), &[0x5a; 1480]);
    net.send(&net.out, &ipv4((OUT_MAC, B_MAC), OUT, B, 17, 0x2000, &whole[..1000]));
    net.send(&net.out, &ipv4((OUT_MAC, B_MAC), OUT, B, 17, 1000 / 8, &whole[1000..]));
    assert!(net.b.take().is_empty());
    assert_eq!(net.denied(1, Direction::Ingress, "fw_denied"), 1);
    // Overlaps are refused by name.
    net.send(&net.a, &ipv4((A_MAC, B_MAC), A, B, 17, 0x2000, &whole[..1000]));
    net.send(&net.a, &ipv4((A_MAC, B_MAC), A, B, 17, 0x2000 | (500 / 8), &whole[..1000]));
    assert_eq!(net.denied(0, Direction::Egress, "fragment_overlap"), 1);
}

#[test]
fn one_vms_flood_leaves_the_others_alone() {
    let net = Net::new(&["web"], |vm, _| {
        vm.limits.max_connections = 100;
        vm.limits.max_half_open = 50;
    });
    for port in 0..200 {
        net.a.put(&tcp((A_MAC, A, 10_000 + port), (OUT_MAC, OUT, 80), SYN, 1, 0, b""));
    }
    net.sent.set(net.sent.get() + 200);
    net.settle();
    assert_eq!(net.out.take().len(), 50);
    assert_eq!(net.denied(0, Direction::Egress, "limit_half_open"), 150);
    // B is not concerned.
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (B_MAC, B, 80), SYN, 100, 0, b""));
    assert_eq!(net.b.take().len(), 1);
    // Expired connections make room, by and by, on the PMD threads (and faster with the control side's help).
    net.later(121_000);
    let end = Instant::now() + Duration::from_secs(10);
    while net.switch.vm_status(net.vms[0]).unwrap().limits.connections > 0 {
        assert!(Instant::now() < end, "expiry does not come round");
        net.later(2);
    }
    net.send(&net.a, &tcp((A_MAC, A, 9), (OUT_MAC, OUT, 80), SYN, 1, 0, b""));
    assert_eq!(net.out.take().len(), 1);
}

#[test]
fn half_open_connections_make_room_at_the_limit() {
    let net = Net::new(&["web"], |vm, _| vm.limits.max_connections = 20);
    net.connect_to_a(4000);
    for port in 0..60 {
        net.send(&net.out, &tcp((OUT_MAC, OUT, 10_000 + port), (A_MAC, A, 80), SYN, 1, 0, b""));
    }
    assert_eq!(net.a.take().len(), 60, "each found room");
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.connections, 20);
    assert!(net.connections(0).iter().any(|c| c.assured() && c.key.remote_port == 4000), "never the established one");
    // A flood that the rate limit refuses evicts nobody.
    let slow = Net::new(&["web"], |vm, _| {
        vm.limits.max_connections = 10;
        vm.limits.new_per_second = 1;
        vm.limits.burst = 10;
    });
    for port in 0..40 {
        slow.send(&slow.out, &tcp((OUT_MAC, OUT, 10_000 + port), (A_MAC, A, 80), SYN, 1, 0, b""));
    }
    let first = slow.connections(0).iter().filter(|c| c.key.remote_port < 10_010).count();
    assert_eq!((slow.a.take().len(), first), (10, 10));
    // Established ones do not give way.
    let full = Net::new(&["web"], |vm, _| vm.limits.max_connections = 3);
    (4000..4003).for_each(|port| full.connect_to_a(port));
    full.send(&full.out, &tcp((OUT_MAC, OUT, 4003), (A_MAC, A, 80), SYN, 1, 0, b""));
    assert!(full.a.take().is_empty());
    assert_eq!(full.denied(0, Direction::Ingress, "limit_connections"), 1);
}

#[test]
fn what_a_vm_sends_is_judged_by_its_rules_too() {
    let net = Net::new(&["web"], |_, policy| policy.default_egress = Action::Drop);
    net.send(&net.a, &udp((A_MAC, A, 5000), (OUT_MAC, OUT, 53), b"question"));
    assert!(net.out.take().is_empty());
    assert_eq!(net.denied(0, Direction::Egress, "fw_denied"), 1);
    net.connect_to_a(4000);
}

#[test]
fn strict_tracking_and_invalid_packets() {
    let net = Net::new(&["web"], |vm, _| vm.track = TrackConfig { tcp_loose: false, ..TrackConfig::default() });
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 1, 1, b"mid-stream"));
    assert_eq!(net.denied(0, Direction::Ingress, "ct_no_connection"), 1);
    let mut broken = tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), SYN, 100, 0, b"");
    broken[50] ^= 1;
    net.send(&net.out, &broken);
    assert_eq!(net.denied(0, Direction::Ingress, "ct_invalid_checksum"), 1);
    net.connect_to_a(4000);
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 0x7000_0000, 501, b"far away"));
    assert_eq!(net.denied(0, Direction::Ingress, "ct_invalid_window"), 1);
    assert!(net.a.take().is_empty());
}

#[test]
fn a_vm_that_verifies_checksums_does_not_rely_on_one_that_does_not() {
    let net = Net::new(&["web"], |vm, _| vm.track.checksum = vm.name != "a");
    let mut broken = tcp((A_MAC, A, 6000), (B_MAC, B, 80), SYN, 1, 0, b"");
    broken[50] ^= 1;
    net.send(&net.a, &broken);
    assert!(net.b.take().is_empty());
    assert_eq!(net.denied(1, Direction::Ingress, "ct_invalid_checksum"), 1);
}

#[test]
fn two_ports_of_one_vm_share_a_table_but_not_their_networks() {
    let net = Net::new(&["web"], |_, _| {});
    let bridge = net.switch.add_bridge("br1", BridgeOptions::default()).unwrap();
    let mut wires = Vec::new();
    for (name, firewall) in
        [("a2", Some(FirewallOptions { vm: net.vms[0], policy: policy(A_MAC, A, &["web"]) })), ("up2", None)]
    {
        let wire = Wire::new();
        let options = PortOptions {
            name: name.into(),
            bridge: Some(bridge),
            vlan: VlanMode::Access { tag: 7 },
            firewall,
            ..PortOptions::default()
        };
        net.switch.add_port(options, wire.tx(), vec![wire.rx()], &[]).unwrap();
        wires.push(wire);
    }
    net.connect_to_a(4000);
    // The same addresses and ports on the other network are another connection.
    net.send(&wires[1], &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), SYN, 77, 0, b""));
    assert_eq!(wires[0].take().len(), 1);
    let zones: Vec<_> = net.connections(0).iter().map(|c| c.key.zone).collect();
    assert_eq!(zones.len(), 2);
    assert_ne!(zones[0], zones[1]);
    assert_eq!(net.switch.remove_vm(net.vms[0]), Err(SwitchError::VmInUse { name: "a".into(), ports: 2 }));
}

#[test]
fn flush_forgets_what_is_chosen() {
    let net = Net::new(&["web"], |_, _| {});
    net.connect_to_a(4000);
    net.connect_to_a(4001);
    let vm = net.switch.vm(net.vms[0]).unwrap();
    assert_eq!(vm.flush(&|c| c.key.remote_port == 4000), 1);
    assert_eq!(net.connections(0).len(), 1);
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.connections, 1);
    assert_eq!(vm.flush(&|_| true), 1);
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.connections, 0);
}

#[test]
fn a_table_changes_its_size_under_its_connections() {
    let net = Net::new(&["web"], |_, _| {});
    for port in 0..200 {
        net.send(&net.a, &udp((A_MAC, A, 20_000 + port), (OUT_MAC, OUT, 53), b"question"));
    }
    net.out.take();
    net.connect_to_a(4000);
    let options = |capacity| VmOptions { capacity, ..VmOptions::named("a") };
    net.switch.update_vm(net.vms[0], options(50_000)).unwrap();
    assert_eq!(net.connections(0).len(), 201);
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.connections, 201);
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.half_open, 200);
    net.send(&net.out, &udp((OUT_MAC, OUT, 53), (A_MAC, A, 20_007), b"answer"));
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 101, 501, b"hello"));
    assert_eq!(net.a.take().len(), 2);
    // Smaller than what is there: the established one stays.
    net.switch.update_vm(net.vms[0], options(50)).unwrap();
    assert!(net.connections(0).len() <= 50);
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 106, 501, b"hello"));
    assert_eq!(net.a.take().len(), 1);
    let limits = net.switch.vm_status(net.vms[0]).unwrap().limits;
    assert_eq!(limits.connections as usize, net.connections(0).len());
}

#[test]
fn an_invalid_policy_changes_nothing() {
    let net = Net::new(&["web"], |_, _| {});
    let mut document = document();
    document.security_groups.remove("web");
    assert!(matches!(net.switch.set_policy(document), Err(SwitchError::Policy(_))), "ports use the group");
    net.connect_to_a(4000);
}

#[test]
fn a_staged_table_takes_the_place_of_the_vms_own() {
    // B's connections as A's switch would send them: B is A on another host.
    let source = Net::new(&["web"], |vm, _| vm.track = TrackConfig { tcp_loose: false, ..TrackConfig::default() });
    source.connect_to_a(4000);
    source.connect_to_a(4001);
    let target = Net::new(&["web"], |vm, _| vm.track = TrackConfig { tcp_loose: false, ..TrackConfig::default() });
    let staged = target.switch.stage_vm(target.vms[0]).unwrap();
    let now_ms = target.now_ns.load(Ordering::Relaxed) / 1_000_000;
    for connection in source.connections(0) {
        let mut connection = connection;
        connection.policy_generation = 0;
        staged.import(&connection, now_ms);
    }
    let data = |port| tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), ACK, 101, 501, b"hello");
    target.send(&target.out, &data(4000));
    assert!(target.a.take().is_empty(), "unknown before");
    target.switch.activate_vm(target.vms[0], staged).unwrap();
    target.send(&target.out, &data(4000));
    target.send(&target.a, &tcp((A_MAC, A, 80), (OUT_MAC, OUT, 4001), ACK, 501, 101, b"hello"));
    assert_eq!((target.a.take().len(), target.out.take().len()), (1, 1));
    assert_eq!(target.switch.vm_status(target.vms[0]).unwrap().limits.connections, 2);
    // Judged by the rules here, not by those there.
    assert_eq!(target.switch.firewall_stats()[&target.ports[0]].ingress.reevaluated, 1);
    assert_eq!(target.switch.firewall_stats()[&target.ports[0]].egress.reevaluated, 1);
}

#[test]
fn diverted_frames_wait_and_are_judged_when_they_are_delivered() {
    let net = Net::new(&["web"], |_, _| {});
    let divert = Arc::new(Divert::new(4, 2048));
    net.switch.set_divert(net.ports[0], Some(Arc::clone(&divert))).unwrap();
    let syn = |port| tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), SYN, 100, 0, b"");
    for port in 1..=5 {
        net.send(&net.out, &syn(port));
    }
    let mut denied = syn(6);
    denied.splice(.., tcp((OUT_MAC, OUT, 6), (A_MAC, A, 22), SYN, 100, 0, b""));
    assert!(net.a.take().is_empty());
    assert_eq!((divert.stats().waiting, divert.stats().lost), (4, 1));
    assert_eq!(net.connections(0).len(), 0, "not judged yet");
    net.switch.set_divert(net.ports[0], None).unwrap();
    let kept: Vec<_> = std::iter::from_fn(|| divert.pop()).collect();
    assert_eq!(kept, (1..=4).map(syn).collect::<Vec<_>>());
    for frame in kept.into_iter().chain([denied]) {
        net.switch.deliver(net.ports[0], frame).unwrap();
        net.sent.set(net.sent.get());
    }
    let end = Instant::now() + Duration::from_secs(10);
    while net.switch.stats().originated.frames < 5 && Instant::now() < end {
        std::thread::yield_now();
    }
    net.settle();
    assert_eq!(net.a.take().len(), 4);
    assert_eq!(net.connections(0).len(), 4);
    assert_eq!(net.denied(0, Direction::Ingress, "fw_denied"), 1);
    assert_eq!(divert.stats().waiting, 0);
}

fn strict(vm: &mut VmOptions) {
    vm.track = TrackConfig { tcp_loose: false, ..TrackConfig::default() };
}

#[test]
fn a_strict_vm_picks_up_for_a_while_what_policy_and_limits_allow() {
    let net = Net::new(&["web"], |vm, _| {
        strict(vm);
        vm.limits.max_connections = 3;
    });
    let vm = net.switch.vm(net.vms[0]).unwrap();
    let now_ms = || net.now_ns.load(Ordering::Relaxed) / 1_000_000;
    let segment = |port: u16, to: u16, flags: u8| tcp((OUT_MAC, OUT, port), (A_MAC, A, to), flags, 1, 1, b"mid-stream");
    let refused = |reason: &str| net.denied(0, Direction::Ingress, reason);
    net.send(&net.out, &segment(4000, 80, ACK));
    assert_eq!((net.a.take().len(), refused("ct_no_connection")), (0, 1), "before");

    vm.pick_up_until(now_ms() + 1000);
    net.send(&net.out, &segment(4000, 80, ACK));
    net.send(&net.a, &tcp((A_MAC, A, 80), (OUT_MAC, OUT, 4000), ACK, 1, 11, b"answer"));
    assert_eq!((net.a.take().len(), net.out.take().len()), (1, 1));
    assert!(net.connections(0)[0].decision.allowed() && net.connections(0)[0].key.remote_port == 4000);
    // Where the policy lets nothing in, nothing is picked up; what cannot be an open connection's neither.
    net.send(&net.out, &segment(4001, 22, ACK));
    net.send(&net.out, &segment(4002, 80, RST_ACK));
    net.send(&net.out, &segment(4003, 80, SYN_ACK));
    assert_eq!((net.a.take().len(), refused("fw_denied"), refused("ct_no_connection")), (0, 1, 3));
    // Other VMs stay as strict as they are.
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (B_MAC, B, 80), ACK, 1, 1, b"mid-stream"));
    assert_eq!((net.b.take().len(), net.denied(1, Direction::Ingress, "ct_no_connection")), (0, 1));
    // Limits hold.
    net.send(&net.out, &segment(4000, 80, ACK));
    for port in [5000, 5001] {
        net.send(&net.out, &segment(port, 80, ACK));
        net.send(&net.a, &tcp((A_MAC, A, 80), (OUT_MAC, OUT, port), ACK, 1, 11, b"answer"));
        net.send(&net.out, &segment(port, 80, ACK));
    }
    assert_eq!((net.a.take().len(), net.out.take().len()), (5, 2));
    net.send(&net.out, &segment(5002, 80, ACK));
    assert_eq!((net.a.take().len(), refused("limit_connections")), (0, 1));
    assert_eq!(net.switch.vm_status(net.vms[0]).unwrap().limits.connections, 3);

    // It ends by itself; what was picked up goes on.
    net.later(1000);
    vm.flush(&|c| c.key.remote_port != 4000);
    net.send(&net.out, &segment(6000, 80, ACK));
    assert_eq!((net.a.take().len(), refused("ct_no_connection")), (0, 4), "after");
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 11, 7, b"on"));
    assert_eq!(net.a.take().len(), 1);
    net.connect_to_a(7000);
}

#[test]
fn picking_up_stays_with_the_vm_when_its_settings_change_and_can_be_ended() {
    let net = Net::new(&["web"], |vm, _| strict(vm));
    let segment = |port: u16| tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), ACK, 1, 1, b"mid-stream");
    net.switch.vm(net.vms[0]).unwrap().pick_up_until(u64::MAX);
    let mut options = VmOptions { capacity: 8192, ..VmOptions::named("a") };
    strict(&mut options);
    net.switch.update_vm(net.vms[0], options).unwrap();
    net.send(&net.out, &segment(4000));
    assert_eq!(net.a.take().len(), 1, "in a table of another size");
    net.switch.vm(net.vms[0]).unwrap().pick_up_until(0);
    net.send(&net.out, &segment(4001));
    assert_eq!(net.a.take().len(), 0);
    // A table that takes the place of this one has nothing to do with it.
    net.switch.vm(net.vms[0]).unwrap().pick_up_until(u64::MAX);
    let staged = net.switch.stage_vm(net.vms[0]).unwrap();
    net.switch.activate_vm(net.vms[0], staged).unwrap();
    net.send(&net.out, &segment(4002));
    assert_eq!(net.a.take().len(), 0);
    assert_eq!(net.denied(0, Direction::Ingress, "ct_no_connection"), 2);
}

#[test]
fn forgotten_windows_are_learned_from_one_packet_of_each_direction() {
    let net = Net::new(&["web"], |vm, _| strict(vm));
    net.connect_to_a(4000);
    net.connect_to_a(4001);
    // Not past its handshake, and no TCP: nothing to forget.
    net.send(&net.out, &tcp((OUT_MAC, OUT, 4002), (A_MAC, A, 80), SYN, 100, 0, b""));
    net.send(&net.a, &udp((A_MAC, A, 5000), (OUT_MAC, OUT, 53), b"question"));
    net.a.take();
    net.out.take();
    let vm = net.switch.vm(net.vms[0]).unwrap();
    // Far ahead: the connection went on elsewhere.
    let from_out = |port, seq, ack| tcp((OUT_MAC, OUT, port), (A_MAC, A, 80), ACK, seq, ack, b"hello");
    let from_a = |port, seq, ack| tcp((A_MAC, A, 80), (OUT_MAC, OUT, port), ACK, seq, ack, b"hello");
    const FAR: u32 = 0x3000_0000;
    let passes = |from_outside: bool, frame: &[u8]| {
        net.send(if from_outside { &net.out } else { &net.a }, frame);
        net.a.take().len() + net.out.take().len() == 1
    };
    assert!(!passes(true, &from_out(4000, FAR, FAR + 1)), "before");
    assert!(!passes(false, &from_a(4000, FAR + 1, FAR)), "before");
    assert_eq!(net.denied(0, Direction::Ingress, "ct_invalid_window"), 1);

    assert_eq!(vm.forget_windows(), 2);
    assert!(passes(true, &from_out(4000, FAR, FAR + 1)));
    assert!(passes(false, &from_a(4000, FAR + 1, FAR + 5)));
    assert!(passes(true, &from_out(4000, FAR + 5, FAR + 6)));
    // The other direction first.
    assert!(passes(false, &from_a(4001, FAR + 1, FAR)));
    assert!(passes(true, &from_out(4001, FAR, FAR + 6)));
    for port in [4000, 4001] {
        assert!(!passes(true, &from_out(port, 2 * FAR, FAR + 6)), "strict again");
        assert!(!passes(false, &from_a(port, 2 * FAR, FAR + 5)), "strict again");
    }
    // Nothing that the strict VM would not have let pass before: no connection, no pick-up.
    assert!(!passes(true, &from_out(4005, FAR, FAR)));
    let connections = net.connections(0);
    assert_eq!(connections.len(), 4);
    assert!(connections.iter().filter(|c| c.key.local_port == 80 && c.assured()).count() == 2);
}

/// Bursts from a port mostly go the way of the one before, which is remembered: no longer than what it rests on stays as it is.
#[test]
fn a_remembered_way_is_not_gone_when_something_has_changed() {
    let net = Net::new(&["web"], |_, _| {});
    net.connect_to_a(4000);
    let to_a = tcp((OUT_MAC, OUT, 4000), (A_MAC, A, 80), ACK, 101, 501, b"");
    let from_a = tcp((A_MAC, A, 80), (OUT_MAC, OUT, 4000), ACK, 501, 101, b"");
    let drain = |wires: &[&Arc<Wire>]| wires.iter().map(|wire| wire.take().len()).collect::<Vec<_>>();
    let both_pass = || {
        for _ in 0..3 {
            net.send(&net.out, &to_a);
            assert_eq!(drain(&[&net.a, &net.b, &net.out]), [1, 0, 0]);
            net.send(&net.a, &from_a);
            assert_eq!(drain(&[&net.a, &net.b, &net.out]), [0, 0, 1]);
        }
    };
    both_pass();
    let station = |mac| {
        let all = net.switch.fdb(net.bridge).unwrap();
        all.into_iter().find(|entry| entry.mac == MacAddr::from_u64(mac)).map(|entry| (entry.port, entry.age_s))
    };
    // Time passes: who speaks does not grow old.
    let both_known = (Some((net.ports[0], 0)), Some((net.ports[2], 0)));
    for _ in 0..4 {
        net.later(100_000);
        both_pass();
        assert_eq!((station(A_MAC), station(OUT_MAC)), both_known);
    }
    assert_eq!(station(B_MAC), None);
    // Stations are forgotten: they are learned again.
    net.switch.fdb_flush(net.bridge, None).unwrap();
    both_pass();
    assert_eq!((station(A_MAC), station(OUT_MAC)), both_known);
    // A station moves, and comes back.
    let second = Wire::new();
    let options = PortOptions { name: "second".into(), bridge: Some(net.bridge), ..PortOptions::default() };
    net.switch.add_port(options, second.tx(), vec![second.rx()], &[]).unwrap();
    for (here, there) in [(&second, &net.out), (&net.out, &second)] {
        net.send(&net.a, &from_a);
        assert_eq!(drain(&[&net.a, &net.b, here, there]), [0, 0, 0, 1]);
        net.send(here, &arp(OUT_MAC, OUT, A));
        drain(&[&net.a, &net.b, here, there]);
        for _ in 0..3 {
            net.send(&net.a, &from_a);
            assert_eq!(drain(&[&net.a, &net.b, here, there]), [0, 0, 1, 0]);
        }
    }
    // A station that a port may not occupy: it is tried again with each frame.
    let narrow = Wire::new();
    let options =
        PortOptions { name: "narrow".into(), bridge: Some(net.bridge), fdb_limit: 1, ..PortOptions::default() };
    net.switch.add_port(options, narrow.tx(), vec![narrow.rx()], &[]).unwrap();
    for n in [0x70, 0x71, 0x71, 0x71] {
        net.send(&narrow, &tcp((OUT_MAC + n, OUT, 4000), (A_MAC, A, 80), ACK, 101, 501, b""));
        assert_eq!(drain(&[&net.a, &net.out]), [1, 0]);
    }
    assert_eq!(net.switch.fdb_stats(net.bridge).unwrap().port_limit, 3);
    // The VM gets another address: the one that was accepted is refused.
    let update = |address: Option<Ipv4Addr>| {
        let firewall =
            address.map(|address| FirewallOptions { vm: net.vms[0], policy: policy(A_MAC, address, &["web"]) });
        let options = PortOptions { name: "a".into(), bridge: Some(net.bridge), firewall, ..PortOptions::default() };
        net.switch.update_port(net.ports[0], options).unwrap();
    };
    both_pass();
    update(Some(Ipv4Addr::new(10, 0, 0, 50)));
    net.send(&net.a, &from_a);
    assert_eq!(drain(&[&net.a, &net.b, &net.out]), [0, 0, 0]);
    assert_eq!(net.denied(0, Direction::Egress, "spoof_source_ipv4"), 1);
    update(Some(A));
    both_pass();
    // No rule lets the connection in any longer.
    let mut empty = document();
    empty.security_groups.values_mut().for_each(|group| *group = SecurityGroup::default());
    net.switch.set_policy(empty).unwrap();
    net.send(&net.out, &to_a);
    assert_eq!(drain(&[&net.a, &net.b, &net.out]), [0, 0, 0]);
    net.switch.set_policy(document()).unwrap();
    // Without a firewall, all pass; and with one again, what it does not know does not.
    update(None);
    let stranger = tcp((OUT_MAC, OUT, 4001), (A_MAC, A, 81), ACK, 101, 501, b"");
    for passes in [1, 0] {
        for _ in 0..3 {
            net.send(&net.out, &stranger);
            assert_eq!(drain(&[&net.a, &net.b, &net.out]), [passes, 0, 0]);
        }
        update(Some(A));
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()]
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

/// Some frame from station `from`, mostly like those before: `habit` is its last peer, port, and whether it was UDP.
fn some_frame(random: &mut Random, from: (u64, Ipv4Addr), habit: &mut (usize, u16, bool)) -> Vec<u8> {
    const STATIONS: [(u64, Ipv4Addr); 4] =
        [(A_MAC, A), (B_MAC, B), (OUT_MAC, OUT), (0x0200_0000_0077, Ipv4Addr::new(10, 0, 0, 77))];
    if random.one_in(4) {
        *habit = (random.pick(&[0, 1, 2, 2, 3]), random.pick(&[80, 1000, 1001, 1002]), random.one_in(2));
    }
    let &mut (peer, port, is_udp) = habit;
    let to = STATIONS[peer];
    let (own, other) = if from.0 == OUT_MAC { (port + 3000, port) } else { (port, port + 3000) };
    let (src, dst) = ((from.0, from.1, own), (to.0, to.1, other));
    let data = &[7; 90][..random.pick(&[0, 1, 18, 90])];
    let mut frame = if is_udp {
        udp(src, dst, data)
    } else {
        let flags = random.pick(&[SYN, ACK, ACK, ACK, ACK, SYN_ACK, 0x11, RST_ACK]);
        let number = 1000 + random.next() as u32 % 64;
        tcp(src, dst, flags, number, if flags == SYN { 0 } else { 1000 + random.next() as u32 % 64 }, data)
    };
    match random.next() % 40 {
        0 => frame[random.pick(&[0, 5, 6, 11])] ^= 0x40,
        1 => frame[26 + random.next() as usize % 8] ^= 1,
        2 => frame.truncate(random.pick(&[13, 14, 20, 34, 40])),
        3 => *frame.last_mut().unwrap() ^= 1,
        4 => {
            frame.splice(12..12, [0x81, 0, 0, random.pick(&[0, 9])]);
        }
        5 => frame = arp(from.0, from.1, to.1),
        6 => frame[20] = 0x20,
        7 => frame.resize(frame.len() + 8, 0),
        _ => {}
    }
    frame
}

/// What the switch makes of frames does not depend on which of them it finds together: the short ways through a burst, by stretches and
/// trains, lead where each frame by itself would come to.
#[test]
fn a_burst_is_judged_as_its_frames_one_by_one() {
    let nets = [0, 1].map(|_| {
        Net::new(&["web", "friends"], |vm, _| {
            vm.limits.new_per_second = 0;
        })
    });
    let [together, singly] = &nets;
    for wire in [&singly.a, &singly.b, &singly.out] {
        wire.burst_frames.store(1, Ordering::Relaxed);
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut arrived = 0;
    for round in 0..400 {
        let sender = round % 3;
        let from = [(A_MAC, A), (B_MAC, B), (OUT_MAC, OUT)][sender];
        let mut habit = (2, 80, true);
        let frames: Vec<_> = (0..random.next() % 64 + 1).map(|_| some_frame(&mut random, from, &mut habit)).collect();
        let wires = |net: &Net| [&net.a, &net.b, &net.out].map(Arc::clone);
        together.send_all(&wires(together)[sender], &frames);
        singly.send_all(&wires(singly)[sender], &frames);
        for (port, (one, other)) in wires(together).iter().zip(wires(singly)).enumerate() {
            let (one, other) = (one.take(), other.take());
            assert_eq!(one, other, "round {round}, port {port}");
            arrived += one.len();
        }
        for vm in 0..2 {
            let of = |net: &Net| {
                let mut all = net.connections(vm);
                all.sort_by_key(|c| format!("{:?}", c.key));
                // Each change is a version, and packets that come together are one change.
                all.iter_mut().for_each(|c| c.version = 0);
                all
            };
            assert_eq!(of(together), of(singly), "round {round}, VM {vm}");
        }
        if round % 4 == 3 {
            nets.iter().for_each(|net| net.later(if round % 40 == 39 { 31_000 } else { 200 }));
        }
        // Connections go, and others take their slots, which somebody may remember: they are not mistaken for them.
        if random.one_in(3) {
            let (vm, port) = (random.next() as usize % 2, random.pick(&[1000, 1001, 1002]));
            for net in &nets {
                let vm = net.switch.vm(net.vms[vm]).unwrap();
                vm.flush(&|c| c.key.local_port % 3000 == port || c.key.remote_port % 3000 == port);
            }
        }
        if random.one_in(50) {
            let options = |capacity| VmOptions {
                capacity,
                limits: LimitsConfig { new_per_second: 0, ..VmOptions::named("a").limits },
                ..VmOptions::named("a")
            };
            let capacity = random.pick(&[4096, 5000]);
            nets.iter().for_each(|net| net.switch.update_vm(net.vms[0], options(capacity)).unwrap());
        }
    }
    assert!(arrived > 3000, "{arrived}");
    let denials = |net: &Net| {
        let stats = net.switch.firewall_stats();
        net.ports.map(|port| stats.get(&port).map(|s| (s.ingress.denied.clone(), s.egress.denied.clone())))
    };
    assert_eq!(denials(together), denials(singly));
    // The flow cache has been asked, and has known.
    let looks: Vec<_> =
        together.switch.stats().pmds.iter().map(|p| (p.stats.flow_cache_hits, p.stats.flow_cache_misses)).collect();
    let (hits, misses) = looks.iter().fold((0, 0), |(a, b), (hits, misses)| (a + hits, b + misses));
    assert!(hits > 500 && misses > 100, "{looks:?}");
}
