//! A guest's traffic: real packets through real tracking, into the table and into a shadow that no migration ever touches.
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ferry_dataplane::conntrack::{
    Checksum, ConnHandle, ConnMap, Connection, Cursor, Judgement, Key, Packet, Toward, TrackConfig, Tracker,
};
use ferry_dataplane::offload::checksum::internet_checksum;

use crate::rng::Rng;

pub const VM: [u8; 4] = [10, 0, 0, 1];
const SYN: u8 = 2;
const ACK: u8 = 16;
const FIN: u8 = 1;
const RST: u8 = 4;

fn frame(src: [u8; 4], dst: [u8; 4], proto: u8, l4: &[u8]) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + l4.len()) as u16).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, proto, 0, 0]);
    ip.extend(src);
    ip.extend(dst);
    let sum = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f.extend(ip);
    f.extend(l4);
    f
}

/// One conversation's state at its ends.
#[derive(Clone, Copy, Default)]
struct Peer {
    step: u8,
    /// What the VM and its peer have sent.
    sent: [u32; 2],
}

/// All conversations of a VM.
pub struct Guest {
    flows: u16,
    peers: BTreeMap<u16, Peer>,
    local: [u8; 4],
}

impl Guest {
    pub fn new(flows: u16, local: [u8; 4]) -> Self {
        Self { flows, peers: BTreeMap::new(), local }
    }

    /// The next packet of some conversation.
    pub fn packet(&mut self, rng: &mut Rng) -> (Vec<u8>, Toward) {
        // Some are hot.
        let flow = if rng.chance(300_000) { rng.range(1, 4) } else { rng.range(1, u64::from(self.flows)) } as u16;
        let remote = [192, 168, 0, (flow % 7) as u8];
        let local = self.local;
        let ends = |out: bool| if out { (local, remote, 1000, flow) } else { (remote, local, flow, 1000) };
        let way = |out: bool| if out { Toward::Egress } else { Toward::Ingress };
        if flow.is_multiple_of(3) {
            let out = rng.chance(500_000);
            let (src, dst, from, to) = ends(out);
            let mut udp = Vec::new();
            udp.extend(from.to_be_bytes());
            udp.extend(to.to_be_bytes());
            udp.extend([0, 12, 0, 0, 1, 2, 3, 4]);
            return (frame(src, dst, 17, &udp), way(out));
        }
        let peer = self.peers.entry(flow).or_insert(Peer { step: 0, sent: [1000, 5000] });
        let (out, flags, payload) = match peer.step {
            0 => (true, SYN, 0),
            1 => (false, SYN | ACK, 0),
            2 => (true, ACK, 0),
            _ if rng.chance(60_000) => (true, RST | ACK, 0),
            3 if rng.chance(80_000) => (true, FIN | ACK, 0),
            3 => (rng.chance(500_000), ACK, rng.range(0, 100) as usize),
            4 => (false, FIN | ACK, 0),
            _ => (true, ACK, 0),
        };
        let side = usize::from(!out);
        let (seq, ack) = (peer.sent[side], peer.sent[1 - side]);
        let control = flags & (SYN | FIN) != 0;
        peer.sent[side] = seq.wrapping_add(payload as u32 + u32::from(control));
        peer.step = match (peer.step, flags & RST != 0) {
            (_, true) | (5.., _) => 0,
            (3, _) if flags & FIN == 0 => 3,
            (step, _) => step + 1,
        };
        if peer.step == 0 {
            peer.sent = [rng.next() as u32, rng.next() as u32];
        }
        let (src, dst, from, to) = ends(out);
        let mut tcp = Vec::new();
        tcp.extend(from.to_be_bytes());
        tcp.extend(to.to_be_bytes());
        tcp.extend(seq.to_be_bytes());
        tcp.extend(if flags & ACK != 0 { ack } else { 0 }.to_be_bytes());
        tcp.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(vec![7; payload]);
        (frame(src, dst, 6, &tcp), way(out))
    }
}

/// Time-outs short enough to run out within a simulation.
pub fn config() -> TrackConfig {
    let mut config = TrackConfig { tcp_loose: false, ..TrackConfig::default() };
    let t = &mut config.timeouts;
    (t.udp_ms, t.udp_stream_ms) = (60, 400);
    (t.tcp_syn_sent_ms, t.tcp_syn_recv_ms, t.tcp_established_ms) = (80, 80, 3000);
    (t.tcp_fin_wait_ms, t.tcp_close_wait_ms, t.tcp_last_ack_ms, t.tcp_time_wait_ms, t.tcp_close_ms) =
        (100, 60, 40, 120, 30);
    config
}

/// Judges a packet as the switch does.
pub fn track(map: &ConnMap, frame: &[u8], toward: Toward, now_ms: u64) {
    let mut tracker: Tracker<ConnHandle<'_>> = Tracker::new(map.handle(&(), 0), config());
    if let Judgement::Tracked(tracked) = tracker.track(&Packet::whole(frame, toward, Checksum::Vouched), now_ms) {
        let _ = tracker.confirm(&tracked, now_ms);
    }
}

/// All entries, those that have expired too.
pub fn entries(map: &ConnMap) -> BTreeMap<Key, Connection> {
    let (mut cursor, mut found) = (Cursor::default(), BTreeMap::new());
    while map.walk(&mut cursor, 4096, &mut |c| {
        found.insert(c.key, *c);
    }) {}
    found
}

/// A table of its own with the same entries.
pub fn copy(map: &ConnMap, now_ms: u64) -> Arc<ConnMap> {
    let copy = ConnMap::new(map.capacity(), [1, 2]).unwrap();
    for connection in entries(map).values() {
        copy.import(connection, now_ms, &());
    }
    Arc::new(copy)
}

/// Has the address of the VM.
pub fn is_ours(connection: &Connection) -> bool {
    connection.key.local() == IpAddr::V4(Ipv4Addr::from(VM))
}
