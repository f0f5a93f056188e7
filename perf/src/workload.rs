//! Workloads: what is sent, and which switches it is sent through.
use crate::frame::{FrameKind, IMIX, IMIX_AVERAGE_BYTES, MTU, Shape, Station, TSO_FRAME_BYTES, Transport};
use crate::guest::GuestSpec;
use crate::guest::ring::RingFormat;
use crate::stream::{Spread, StreamSpec};
use crate::system::Kind;
use serde::{Deserialize, Serialize};

/// One row of a results table, before it is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Unique name.
    pub name: String,
    /// Length of each frame (of a mix: of the longest), bytes, without frame check sequence.
    pub frame_bytes: usize,
    /// What frames are like besides.
    #[serde(default)]
    pub shape: Shape,
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
            shape: Shape::Plain,
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

    /// Frames of several lengths.
    pub fn imix(mut self) -> Self {
        self.name = self.name.replace(&self.frame_bytes.to_string(), "imix");
        self.shape = Shape::Imix;
        self.frame_bytes = IMIX.into_iter().max().unwrap_or_default();
        self
    }

    /// TCP between guests that leave the segmentation to the switch: frames of 64 KB, through the systems that pass them on.
    pub fn tso(stateful: bool) -> Self {
        let systems = match stateful {
            false => vec![Kind::TestpmdTso, Kind::FerryL2, Kind::OvsL2Tso],
            true => vec![Kind::TestpmdTso, Kind::FerryFirewall, Kind::OvsCtTso],
        };
        Self {
            name: if stateful { "stateful-tcp-tso-1" } else { "l2-tcp-tso" }.into(),
            shape: Shape::Tso,
            systems,
            ..Self::stateful(Transport::Tcp, TSO_FRAME_BYTES, 1)
        }
    }

    /// With OVS also in its per-port form.
    pub fn per_port_zones(mut self) -> Self {
        self.systems.push(Kind::OvsCtPerPort);
        self
    }

    /// With the kernel, in the form that does the same job.
    pub fn kernel(mut self) -> Self {
        self.systems.push(if self.stateful_systems() { Kind::KernelFirewall } else { Kind::KernelL2 });
        self
    }

    /// Whether some of its switches are stateful.
    pub fn stateful_systems(&self) -> bool {
        self.systems.iter().any(|s| s.stateful())
    }

    /// The first pairs of guests of 16 ports are busy.
    pub fn busy(self, pairs: usize) -> Self {
        self.variant(&format!("{pairs}-of-8-pairs"), |w| (w.ports, w.busy_pairs) = (16, pairs))
    }

    /// Longest IP packet that the switches are told, bytes.
    pub fn mtu(&self) -> usize {
        match self.shape {
            Shape::Tso => MTU,
            _ => self.frame_bytes.saturating_sub(14).max(MTU),
        }
    }

    /// Bytes that a frame carries on average: the whole frame; of one that is to be segmented, its payload.
    pub fn average_bytes(&self) -> f64 {
        match self.shape {
            Shape::Plain => self.frame_bytes as f64,
            Shape::Imix => IMIX_AVERAGE_BYTES,
            Shape::Tso => self.kind().payload_bytes() as f64,
        }
    }

    /// The guests that it needs.
    pub fn guests(&self) -> GuestSpec {
        let spec = GuestSpec::new(self.frame_bytes).format(self.rings);
        GuestSpec { offloads: self.shape == Shape::Tso, ..spec }
    }

    fn kind(&self) -> FrameKind {
        FrameKind { bytes: self.frame_bytes, transport: self.transport, ipv6: self.ipv6 }
    }

    /// Changes something and appends what to the name.
    pub fn variant(mut self, suffix: &str, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self.name = format!("{}-{suffix}", self.name);
        self
    }

    /// Streams as (sender, receiver, description).
    pub fn streams(&self) -> Vec<(usize, usize, StreamSpec)> {
        let kind = self.kind();
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
                shape: self.shape,
            };
            let back = StreamSpec { from: second, to: first, opener: false, ..forth.clone() };
            streams.push((a, b, forth));
            // The other direction exists in any case: it opens connections, and its guest's address must be learned.
            streams.push((b, a, back));
        }
        streams
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

/// What `ferry-perf run` measures, in this order: switches that the next workload has as well stay up.
pub fn full() -> Vec<Workload> {
    let packed = |w: &mut Workload| w.rings = RingFormat::Packed;
    let one_way = |w: &mut Workload| w.both_directions = false;
    let skewed = |w: &mut Workload| w.spread = Spread::Skewed;
    let ipv6 = |w: &mut Workload| w.ipv6 = true;
    let (udp, tcp) = (Transport::Udp, Transport::Tcp);

    let mut all = vec![Workload::l2(64).kernel(), Workload::l2(1518).kernel()];
    all.extend([128, 256, 512, 1024].map(Workload::l2));
    all.push(Workload::l2(1518).imix());
    all.extend([64, 1518].map(|bytes| Workload::l2(bytes).variant("packed", packed)));
    all.extend([64, 1518].map(|bytes| Workload::l2(bytes).variant("one-way", one_way)));
    all.push(Workload::l2(128).variant("ipv6", ipv6));

    for n in [1, 10_000] {
        all.push(Workload::stateful(udp, 64, n).kernel().per_port_zones());
    }
    all.extend([1000, 100_000, 1_000_000].map(|n| Workload::stateful(udp, 64, n).per_port_zones()));
    all.extend([1, 1000, 10_000, 100_000, 1_000_000].map(|n| Workload::stateful(tcp, 64, n).per_port_zones()));
    all.push(Workload::stateful(udp, 1518, 1).kernel());
    all.extend([128, 256, 512, 1024, 1518].map(|bytes| Workload::stateful(udp, bytes, 10_000)));
    all.push(Workload::stateful(udp, 512, 1));
    all.push(Workload::stateful(tcp, 1518, 1));
    all.push(Workload::stateful(tcp, 512, 10_000));
    all.extend([1, 10_000].map(|n| Workload::stateful(udp, 1518, n).imix()));
    all.extend([udp, tcp].map(|t| Workload::stateful(t, 64, 100_000).variant("skewed", skewed)));
    all.extend([udp, tcp].map(|t| Workload::stateful(t, 128, 10_000).variant("ipv6", ipv6)));
    all.extend([udp, tcp].map(|t| Workload::stateful(t, 64, 10_000).variant("packed", packed)));
    all.push(Workload::stateful(udp, 1518, 1).variant("packed", packed));
    all.extend([64, 1518].map(|bytes| Workload::stateful(udp, bytes, 10_000).variant("one-way", one_way)));

    // From here on the switches have to be started anew.
    all.extend([Workload::tso(false), Workload::tso(true)]);
    all.extend([Workload::l2(9000), Workload::stateful(udp, 9000, 1)]);
    all.extend([1, 2, 4, 8].map(|pairs| Workload::l2(64).busy(pairs)));
    all.extend([1, 2, 4, 8].map(|pairs| Workload::stateful(udp, 64, 1000).busy(pairs)));
    all.push(Workload::l2(64).variant("64-ports", |w| {
        w.ports = 64;
        // Debian's DPDK has at most 32 ports in one process; OVS's vhost ports do not count among them.
        w.systems.retain(|&s| s != Kind::TestpmdIo);
    }));
    for rules in [10, 1000, 10_000] {
        all.push(Workload::stateful(tcp, 64, 1).variant(&format!("{rules}-rules"), |w| {
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
                assert!(w.average_bytes() <= w.frame_bytes as f64 && w.mtu() >= 1504);
            }
        }
    }
}
