//! A connection as the API shows it, and as `conntrack -L` would print it.
use std::fmt;
use std::net::IpAddr;

use ferry_dataplane::conntrack::{Connection, SctpState, TcpState, Toward, Way};
use ferry_dataplane::enforce::PortFirewall;
use ferry_dataplane::packet::IpProto;
use serde::{Deserialize, Serialize};

/// Network protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One direction of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sport: Option<u16>,
    /// Destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dport: Option<u16>,
    /// ICMP type, code and identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<IcmpTuple>,
    /// Packets.
    pub packets: u64,
    /// Bytes of IP packets.
    pub bytes: u64,
}

/// What tells one ICMP question from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IcmpTuple {
    /// Type.
    #[serde(rename = "type")]
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Identifier.
    pub id: u16,
}

/// A connection of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionView {
    /// The VM.
    pub vm: String,
    /// Its port; empty when that is gone.
    #[serde(default)]
    pub port: String,
    /// Network protocol.
    pub family: Family,
    /// Transport protocol by name, `unknown` for most.
    pub protocol: String,
    /// The same by number.
    pub protocol_number: u8,
    /// Seconds until it is forgotten, if no packet comes.
    pub timeout_s: u32,
    /// TCP's or SCTP's state, as Linux names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Which way its first packet went: `ingress` (towards the VM) or `egress`.
    pub opened: String,
    /// As the packet that opened it.
    pub original: Tuple,
    /// The opposite direction.
    pub reply: Tuple,
    /// A packet in the reply direction has been seen.
    pub replied: bool,
    /// Known to be a real connection.
    pub assured: bool,
    /// VLAN of the bridge; 0: untagged.
    pub zone: u16,
    /// Counts up with every change to the entry.
    pub version: u32,
}

/// The name `conntrack -L` uses.
pub fn protocol_name(number: u8) -> &'static str {
    match number {
        1 => "icmp",
        2 => "igmp",
        6 => "tcp",
        17 => "udp",
        33 => "dccp",
        47 => "gre",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        _ => "unknown",
    }
}

/// The state's name as Linux has it; `None` for protocols without.
pub fn state_name(c: &Connection) -> Option<&'static str> {
    match c.key.proto() {
        IpProto::TCP => Some(TcpState::from_number(c.state()).name()),
        IpProto::SCTP => Some(SctpState::from_number(c.state()).name()),
        _ => None,
    }
}

/// Source and destination of the packet that opened the connection: `((address, port), (address, port))`.
pub fn original(c: &Connection) -> ((IpAddr, u16), (IpAddr, u16)) {
    let (local, remote) = ((c.key.local(), c.key.local_port), (c.key.remote(), c.key.remote_port));
    match c.opened() {
        Toward::Ingress => (remote, local),
        Toward::Egress => (local, remote),
    }
}

/// VLAN of the bridge; 0: untagged.
pub fn vlan(c: &Connection) -> u16 {
    PortFirewall::split_zone(c.key.zone).1
}

/// The answer's type to an ICMP question's.
fn answer(question: u8, v6: bool) -> u8 {
    match (question, v6) {
        (8, false) => 0,
        (13, false) => 14,
        (15, false) => 16,
        (17, false) => 18,
        (128, true) => 129,
        (139, true) => 140,
        (other, _) => other,
    }
}

impl ConnectionView {
    /// `c` as it is at `now_ms`.
    pub fn new(vm: &str, port: &str, c: &Connection, now_ms: u64) -> Self {
        let v6 = c.key.is_ipv6();
        let proto = c.key.proto();
        let (src, dst) = original(c);
        let icmp = matches!(proto, IpProto::ICMP | IpProto::ICMPV6).then(|| c.key.icmp());
        let ports = proto.has_ports() || proto == IpProto::GRE;
        let tuple = |way: Way| {
            let traffic = c.traffic(way);
            let (src, dst) = if way == Way::Original { (src, dst) } else { (dst, src) };
            Tuple {
                src: src.0,
                dst: dst.0,
                sport: ports.then_some(src.1),
                dport: ports.then_some(dst.1),
                icmp: icmp.map(|(id, kind, code)| IcmpTuple {
                    kind: if way == Way::Original { kind } else { answer(kind, v6) },
                    code,
                    id,
                }),
                packets: traffic.packets.get(),
                bytes: traffic.bytes.get(),
            }
        };
        Self {
            vm: vm.to_owned(),
            port: port.to_owned(),
            family: if v6 { Family::Ipv6 } else { Family::Ipv4 },
            protocol: protocol_name(proto.0).to_owned(),
            protocol_number: proto.0,
            timeout_s: c.remaining_ms(now_ms) / 1000,
            state: state_name(c).map(str::to_owned),
            opened: if c.opened() == Toward::Ingress { "ingress" } else { "egress" }.to_owned(),
            original: tuple(Way::Original),
            reply: tuple(Way::Reply),
            replied: c.seen_reply(),
            assured: c.assured(),
            zone: vlan(c),
            version: c.version,
        }
    }

    fn write_tuple(&self, f: &mut fmt::Formatter<'_>, t: &Tuple) -> fmt::Result {
        write!(f, "src={} dst={} ", t.src, t.dst)?;
        if let (Some(s), Some(d)) = (t.sport, t.dport) {
            match self.protocol_number {
                47 => write!(f, "srckey=0x{s:x} dstkey=0x{d:x} ")?,
                _ => write!(f, "sport={s} dport={d} ")?,
            }
        }
        if let Some(i) = t.icmp {
            write!(f, "type={} code={} id={} ", i.kind, i.code, i.id)?;
        }
        write!(f, "packets={} bytes={} ", t.packets, t.bytes)
    }
}

impl fmt::Display for ConnectionView {
    /// The line of `conntrack -L`, in its order, with `vm=NAME` at the end (before it the port, when it has another name).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {} {} ", self.protocol, self.protocol_number, self.timeout_s)?;
        if let Some(state) = &self.state {
            write!(f, "{state} ")?;
        }
        self.write_tuple(f, &self.original)?;
        if !self.replied {
            f.write_str("[UNREPLIED] ")?;
        }
        self.write_tuple(f, &self.reply)?;
        if self.assured {
            f.write_str("[ASSURED] ")?;
        }
        f.write_str("mark=0 ")?;
        if self.zone != 0 {
            write!(f, "zone={} ", self.zone)?;
        }
        f.write_str("use=1 ")?;
        if !self.port.is_empty() && self.port != self.vm {
            write!(f, "port={} ", self.port)?;
        }
        write!(f, "vm={}", self.vm)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::firewall::packet_text::{self, Surroundings};
    use ferry_dataplane::conntrack::{Checksum, Judgement, ModelTable, Packet, TrackConfig, Tracker};
    use ferry_dataplane::firewall::Direction;

    /// Connections that come of packets in words, through the real tracker, at time 0.
    pub(crate) fn tracked(packets: &[&str]) -> Vec<Connection> {
        let mut tracker = Tracker::new(ModelTable::new(100), TrackConfig::default());
        for text in packets {
            let d = packet_text::parse(text).and_then(|p| p.frame(&Surroundings::default()));
            let d = d.unwrap_or_else(|e| panic!("{e}"));
            let toward = if d.direction == Direction::Ingress { Toward::Ingress } else { Toward::Egress };
            match tracker.track(&Packet::whole(&d.frame, toward, Checksum::Verify), 0) {
                Judgement::Tracked(t) => {
                    assert!(t.invalid.is_none(), "{text}: {:?}", t.invalid);
                    tracker.confirm(&t, 0).unwrap();
                }
                other => panic!("{text}: {other:?}"),
            }
        }
        let mut all: Vec<Connection> = tracker.table().iter().copied().collect();
        all.sort_by_key(|c| c.key);
        all
    }

    fn lines(packets: &[&str]) -> Vec<String> {
        tracked(packets).iter().map(|c| ConnectionView::new("web1", "web1", c, 0).to_string()).collect()
    }

    #[test]
    fn lines_are_those_of_conntrack() {
        assert_eq!(
            lines(&[
                "in tcp 10.0.0.1:40000 > 10.0.0.2:22 syn seq 100",
                "out tcp 10.0.0.2:22 > 10.0.0.1:40000 syn ack seq 500 ackno 101",
                "in tcp 10.0.0.1:40000 > 10.0.0.2:22 ack seq 101 ackno 501",
            ]),
            ["tcp      6 432000 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=40000 dport=22 packets=2 bytes=80 \
                 src=10.0.0.2 dst=10.0.0.1 sport=22 dport=40000 packets=1 bytes=40 [ASSURED] mark=0 use=1 vm=web1"]
        );
        assert_eq!(
            lines(&["out udp [fd00::2]:53 > [fd00::1]:5353 vlan 5"]),
            ["udp      17 30 src=fd00::2 dst=fd00::1 sport=53 dport=5353 packets=1 bytes=48 [UNREPLIED] \
                 src=fd00::1 dst=fd00::2 sport=5353 dport=53 packets=0 bytes=0 mark=0 zone=5 use=1 vm=web1"]
        );
        assert_eq!(
            lines(&["out icmp 10.0.0.2 > 10.0.0.1 echo-request id 7", "in icmp 10.0.0.1 > 10.0.0.2 echo-reply id 7"]),
            ["icmp     1 30 src=10.0.0.2 dst=10.0.0.1 type=8 code=0 id=7 packets=1 bytes=28 \
                 src=10.0.0.1 dst=10.0.0.2 type=0 code=0 id=7 packets=1 bytes=28 mark=0 use=1 vm=web1"]
        );
        assert_eq!(
            lines(&["in proto 99 10.0.0.1 > 10.0.0.2"]),
            ["unknown  99 600 src=10.0.0.1 dst=10.0.0.2 packets=1 bytes=28 [UNREPLIED] \
                 src=10.0.0.2 dst=10.0.0.1 packets=0 bytes=0 mark=0 use=1 vm=web1"]
        );
    }

    #[test]
    fn json_reads_back() {
        let c = &tracked(&["in icmp fd00::1 > fd00::2 echo-request id 9"])[0];
        let view = ConnectionView::new("a", "p", c, 0);
        assert!(view.to_string().ends_with("mark=0 use=1 port=p vm=a"), "{view}");
        assert_eq!(view.reply.icmp, Some(IcmpTuple { kind: 129, code: 0, id: 9 }));
        assert_eq!(serde_json::from_value::<ConnectionView>(serde_json::to_value(&view).unwrap()).unwrap(), view);
    }
}
