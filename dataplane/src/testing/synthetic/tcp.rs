//! TCP connections between two synthetic ports: opened by handshakes, then carrying data both ways with right sequence numbers.
//!
//! No state is kept per connection: they all take their turns, so that what one has sent follows from how often it has been its turn.
use std::sync::Arc;

use super::{
    FirewallLoad, Script, SyntheticKinds, SyntheticRx, SyntheticTx, ethernet_back, ipv4, port_firewall, switch,
};
use crate::clock::Clock;
use crate::enforce::{PortFirewall, VmFirewall};
use crate::frame::BURST;
use crate::offload::checksum::Sum;
use crate::packet::tcp::Flags;
use crate::worker::{Step, Worker};

/// Port of the connections' server side.
pub(super) const SERVER_PORT: u16 = 80;
const CLIENT_PORT: u16 = 5000;
/// Ethernet, IPv4 and TCP headers without options, bytes.
const HEADERS: usize = 54;
/// First sequence numbers; the second wraps soon.
const CLIENT_ISN: u32 = 1000;
const SERVER_ISN: u32 = u32::MAX - 5000;

/// What the frames of the next step are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A burst of connections' first packets.
    Syn,
    /// The answers to them.
    SynAck,
    /// What completes the handshakes.
    Ack,
    /// A burst of data from either side, all with acknowledgements.
    Data,
}

/// A switch with a client's port and a server's, and what passes between them.
///
/// [`Self::lay_out`] and [`Self::step`] take turns: the former writes the frames of the next step, so that their cache lines are at hand
/// as if they had just been received, and costs nothing that is to be measured.
pub struct TcpSwitch {
    worker: Worker<SyntheticKinds>,
    ends: [End; 2],
    frame_bytes: usize,
    burst: u32,
    connections: u32,
    /// Connections being opened or open.
    begun: u32,
    handshake: Option<Phase>,
    /// Bursts of data that each side has sent.
    bursts: u64,
}

struct End {
    script: Arc<Script>,
    tx: SyntheticTx,
    vm: Option<Arc<VmFirewall>>,
}

impl TcpSwitch {
    /// A switch for `load`; its connections, rounded up to whole bursts but for less than one, are yet to be opened. `None`: no memory.
    pub fn new(load: FirewallLoad) -> Option<Self> {
        let burst = load.burst.clamp(1, BURST) as u32;
        let connections =
            if load.connections < burst { load.connections.max(1) } else { load.connections.next_multiple_of(burst) };
        let load = FirewallLoad { connections, ..load };
        let receiver = port_firewall(0, &load)?;
        let sender = if load.both_ends { Some(port_firewall(1, &load)?) } else { None };
        let vm = |firewall: &PortFirewall| Arc::clone(&firewall.vm);
        let (vm_a, vm_b) = (sender.as_ref().map(vm), Some(vm(&receiver)));
        let scripts = [(); 2].map(|()| Arc::new(Script::default()));
        let rx = scripts.each_ref().map(|script| Some(SyntheticRx::Script(Arc::clone(script))));
        let (worker, txs) = switch(rx, 1, [sender, Some(receiver)], Clock::simulated().0)?;
        let [a, b] = scripts;
        let [tx_a, tx_b] = txs;
        Some(Self {
            worker,
            ends: [End { script: a, tx: tx_a, vm: vm_a }, End { script: b, tx: tx_b, vm: vm_b }],
            frame_bytes: load.frame_bytes.max(HEADERS),
            burst,
            connections,
            begun: 0,
            handshake: None,
            bursts: 0,
        })
    }

    /// Writes the frames of the next step: handshakes until all connections are open, data from then on.
    pub fn lay_out(&mut self) -> Phase {
        let phase = match self.handshake {
            Some(Phase::Syn) => Phase::SynAck,
            Some(Phase::SynAck) => Phase::Ack,
            _ if self.begun < self.connections => Phase::Syn,
            _ => Phase::Data,
        };
        let few = self.connections.min(self.burst);
        if phase == Phase::Syn {
            self.begun += few;
        }
        let Self { ends: [client, server], frame_bytes, burst, begun, bursts, connections, .. } = self;
        let opening = *begun - few..*begun;
        client.script.write(core::iter::empty());
        server.script.write(core::iter::empty());
        match phase {
            Phase::Syn => client.script.write(opening.map(|n| segment(n, true, Flags::SYN, CLIENT_ISN, 0, HEADERS))),
            Phase::SynAck => {
                server.script.write(opening.map(|n| {
                    segment(n, false, Flags::SYN | Flags::ACK, SERVER_ISN, CLIENT_ISN.wrapping_add(1), HEADERS)
                }))
            }
            Phase::Ack => client.script.write(opening.map(|n| {
                segment(n, true, Flags::ACK, CLIENT_ISN.wrapping_add(1), SERVER_ISN.wrapping_add(1), HEADERS)
            })),
            Phase::Data => {
                let (all, payload) = (u64::from(*connections), (*frame_bytes - HEADERS) as u32);
                let burst = u64::from(*burst);
                let first = *bursts * burst;
                // Bytes that connection n has carried one way in frames before `frame`.
                let carried = |n: u64, frame: u64| {
                    let turns = if frame > n { (frame - n).div_ceil(all) } else { 0 };
                    (turns as u32).wrapping_mul(payload)
                };
                let data = |frame: u64, from_client: bool| {
                    let n = frame % all;
                    let (mine, theirs) = if from_client { (CLIENT_ISN, SERVER_ISN) } else { (SERVER_ISN, CLIENT_ISN) };
                    // The client's burst goes first, so the server has seen it.
                    let seen = if from_client { first } else { first + burst };
                    let after = |isn: u32, bytes: u32| isn.wrapping_add(1).wrapping_add(bytes);
                    let (seq, ack) = (after(mine, carried(n, frame)), after(theirs, carried(n, seen)));
                    segment(n as u32, from_client, Flags::ACK, seq, ack, *frame_bytes)
                };
                client.script.write((first..first + burst).map(|frame| data(frame, true)));
                server.script.write((first..first + burst).map(|frame| data(frame, false)));
                *bursts += 1;
            }
        }
        self.handshake = Some(phase);
        phase
    }

    /// Switches what [`Self::lay_out`] has written.
    pub fn step(&mut self) -> Step {
        self.worker.step()
    }

    /// Connections that are open or being opened, after rounding.
    pub fn connections(&self) -> u32 {
        self.connections
    }

    /// Frames that have come out: at the client's port, and at the server's.
    pub fn delivered(&self) -> [u64; 2] {
        self.ends.each_ref().map(|end| end.tx.taken())
    }

    /// Entries of the client's and of the server's table; 0 without one.
    pub fn entries(&self) -> [usize; 2] {
        self.ends.each_ref().map(|end| end.vm.as_ref().map_or(0, |vm| vm.map().len()))
    }
}

/// A segment of connection n: from 10.x.y.z, as [`super::udp`] has it, or back.
fn segment(n: u32, from_client: bool, flags: Flags, seq: u32, ack: u32, frame_bytes: usize) -> Vec<u8> {
    let mut f = if from_client { super::ethernet(0, [8, 0]) } else { ethernet_back(0, [8, 0]) };
    let l4_len = (frame_bytes - 34) as u16;
    let [_, x, y, z] = n.to_be_bytes();
    let (client, server) = ([10, x, y, z], [10, 255, 255, 254]);
    let (src, dst) = if from_client { (client, server) } else { (server, client) };
    f.extend(ipv4(src, dst, 6, l4_len));
    let (src_port, dst_port) = if from_client { (CLIENT_PORT, SERVER_PORT) } else { (SERVER_PORT, CLIENT_PORT) };
    let mut l4 = Vec::with_capacity(usize::from(l4_len));
    l4.extend([src_port.to_be_bytes(), dst_port.to_be_bytes()].as_flattened());
    l4.extend([seq.to_be_bytes(), ack.to_be_bytes()].as_flattened());
    l4.extend([5 << 4, flags.bits(), 0xff, 0xff, 0, 0, 0, 0]);
    l4.resize(usize::from(l4_len), 0x5a);
    let mut sum = Sum::new();
    sum.add_bytes(&src);
    sum.add_bytes(&dst);
    sum.add_u16(6);
    sum.add_u16(l4_len);
    sum.add_bytes(&l4);
    if let Some(field) = l4.get_mut(16..18) {
        field.copy_from_slice(&sum.finish().to_be_bytes());
    }
    f.extend(l4);
    f
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every segment passes both firewalls, and connections are there once each.
    #[test]
    fn all_segments_arrive() {
        for (connections, both_ends, burst) in
            [(1, true, 64), (1, false, 64), (640, true, 64), (1, true, 1), (10, true, 3)]
        {
            let load = FirewallLoad { rules: 3, burst, ..FirewallLoad::new(connections, both_ends) };
            let mut switch = TcpSwitch::new(load).unwrap();
            let (mut offered, mut phases) = ([0u64; 2], Vec::new());
            for _ in 0..if cfg!(miri) { 40 } else { 3000 } {
                let phase = switch.lay_out();
                let opening = u64::from(connections).min(burst as u64);
                let (to_client, to_server) = match phase {
                    Phase::Syn | Phase::Ack => (0, opening),
                    Phase::SynAck => (opening, 0),
                    Phase::Data => (burst as u64, burst as u64),
                };
                offered = [offered[0] + to_client, offered[1] + to_server];
                phases.push(phase);
                switch.step();
                assert_eq!(switch.delivered(), offered, "after {phase:?}, step {}", phases.len());
            }
            let n = (connections as usize).next_multiple_of(if connections as usize > burst { burst } else { 1 });
            assert_eq!(switch.entries(), [if both_ends { n } else { 0 }, n]);
            assert_eq!(phases[..3], [Phase::Syn, Phase::SynAck, Phase::Ack]);
            assert_eq!(phases.last(), Some(&Phase::Data));
        }
    }
}
