//! Workloads: what is sent, and which switches it is sent through.
use crate::frame::{FrameKind, Station, Transport};
use crate::guest::ring::RingFormat;
use crate::stream::{Spread, StreamSpec};
use crate::system::Kind;
use serde::{Deserialize, Serialize};

/// One row of a results table, before it is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Unique name.
    pub name: String,
    /// Length of each frame, bytes, without frame check sequence.
    pub frame_bytes: usize,
    /// Transport protocol.
    pub transport: Transport,
    /// IPv6.
    pub ipv6: bool,
    /// Connections per pair of guests.
    pub connections: u32,
    /// How frames are spread over them.
    pub spread: Spread,
    /// Ring format of the guests.
    pub rings: RingFormat,
    /// Both guests of each pair send, or only the first.
    pub both_directions: bool,
    /// Ports of the switch; pairs of guests on the first `2 * busy_pairs` of them.
    pub ports: usize,
    /// Pairs of guests that send.
    pub busy_pairs: usize,
    /// Rules that do not match, before the one that does.
    pub rules: usize,
    /// Which switches.
    pub systems: Vec<Kind>,
}

impl Workload {
    /// Both directions between two guests on split rings, one connection, through the systems that do not look at connections.
    pub fn l2(frame_bytes: usize) -> Self {
        Self {
            name: format!("l2-{frame_bytes}"),
            frame_bytes,
            transport: Transport::Udp,
            ipv6: false,
            connections: 1,
            spread: Spread::Uniform,
            rings: RingFormat::Split,
            both_directions: true,
            ports: 2,
            busy_pairs: 1,
            rules: 0,
            systems: vec![Kind::TestpmdIo, Kind::FerryL2, Kind::OvsL2],
        }
    }

    /// The same with connections, through stateful switches; testpmd beside them, which looks up nothing.
    pub fn stateful(transport: Transport, frame_bytes: usize, connections: u32) -> Self {
        let protocol = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        Self {
            name: format!("stateful-{protocol}-{frame_bytes}-{}", short(connections)),
            transport,
            connections,
            systems: vec![Kind::TestpmdIo, Kind::FerryFirewall, Kind::OvsCt],
            ..Self::l2(frame_bytes)
        }
    }

    /// With OVS also in its per-port form.
    pub fn per_port_zones(mut self) -> Self {
        self.systems.push(Kind::OvsCtPerPort);
        self
    }

    /// Changes something and appends what to the name.
    pub fn variant(mut self, suffix: &str, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self.name = format!("{}-{suffix}", self.name);
        self
    }

    /// Streams as (sender, receiver, description).
    pub fn streams(&self) -> Vec<(usize, usize, StreamSpec)> {
        let kind = FrameKind { bytes: self.frame_bytes, transport: self.transport, ipv6: self.ipv6 };
        let mut streams = Vec::new();
        for pair in 0..self.busy_pairs {
            let (a, b) = (2 * pair, 2 * pair + 1);
            let (first, second) = (Station::new(a as u8 + 1), Station::new(b as u8 + 1));
            let forth = StreamSpec {
                kind,
                from: first,
                to: second,
                opener: true,
                connections: self.connections,
                spread: self.spread,
            };
            let back = StreamSpec { from: second, to: first, opener: false, ..forth.clone() };
            streams.push((a, b, forth));
            // The other direction exists in any case: it opens connections, and its guest's address must be learned.
            streams.push((b, a, back));
        }
        streams
    }

    /// Whether its switches are stateful.
    pub fn stateful_systems(&self) -> bool {
        self.systems.iter().any(|s| matches!(s, Kind::FerryFirewall | Kind::OvsCt | Kind::OvsCtPerPort))
    }
}

/// A count in few letters.
pub fn short(n: u32) -> String {
    match n {
        n if n >= 1_000_000 && n % 1_000_000 == 0 => format!("{}M", n / 1_000_000),
        n if n >= 1000 && n % 1000 == 0 => format!("{}k", n / 1000),
        n => n.to_string(),
    }
}

/// What `ferry-perf quick` measures, in this order.
pub fn quick() -> Vec<Workload> {
    vec![
        Workload::l2(64),
        Workload::l2(1518),
        Workload::stateful(Transport::Udp, 64, 1),
        Workload::stateful(Transport::Udp, 64, 10_000),
        Workload::stateful(Transport::Udp, 64, 1_000_000),
        Workload::stateful(Transport::Udp, 1518, 1),
    ]
}

/// What `ferry-perf run` measures, in this order.
pub fn full() -> Vec<Workload> {
    let mut all = Vec::new();
    all.extend([64, 128, 256, 512, 1024, 1518].map(Workload::l2));
    all.extend([64, 1518].map(|bytes| Workload::l2(bytes).variant("packed", |w| w.rings = RingFormat::Packed)));
    all.extend([64, 1518].map(|bytes| Workload::l2(bytes).variant("one-way", |w| w.both_directions = false)));
    for transport in [Transport::Udp, Transport::Tcp] {
        all.extend(
            [1, 1000, 10_000, 100_000, 1_000_000].map(|n| Workload::stateful(transport, 64, n).per_port_zones()),
        );
    }
    all.extend([512, 1518].map(|bytes| Workload::stateful(Transport::Udp, bytes, 1)));
    all.push(Workload::stateful(Transport::Tcp, 1518, 1));
    all.push(Workload::stateful(Transport::Udp, 1518, 10_000));
    all.push(Workload::stateful(Transport::Udp, 64, 100_000).variant("skewed", |w| w.spread = Spread::Skewed));
    all.push(Workload::stateful(Transport::Udp, 128, 10_000).variant("ipv6", |w| w.ipv6 = true));
    all.push(Workload::stateful(Transport::Tcp, 128, 10_000).variant("ipv6", |w| w.ipv6 = true));
    all.push(Workload::stateful(Transport::Udp, 64, 10_000).variant("packed", |w| w.rings = RingFormat::Packed));
    // Each of these needs the switches to be started anew: last.
    all.push(Workload::l2(9000));
    all.push(Workload::l2(64).variant("16-ports", |w| w.ports = 16));
    all.push(Workload::l2(64).variant("64-ports", |w| w.ports = 64));
    for rules in [1000, 10_000] {
        all.push(Workload::stateful(Transport::Tcp, 64, 1).variant(&format!("{rules}-rules"), |w| {
            w.rules = rules;
            w.systems = vec![Kind::FerryFirewall, Kind::OvsCt];
        }));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn workloads_have_names_of_their_own_and_frames_that_hold_a_stamp() {
        for list in [quick(), full()] {
            let names: BTreeSet<&str> = list.iter().map(|w| w.name.as_str()).collect();
            assert_eq!(names.len(), list.len());
            for w in &list {
                let kind = FrameKind { bytes: w.frame_bytes, transport: w.transport, ipv6: w.ipv6 };
                assert!(w.frame_bytes >= kind.shortest() && w.ports >= 2 * w.busy_pairs, "{}", w.name);
                assert_eq!(w.streams().len(), 2 * w.busy_pairs);
            }
        }
    }
}
