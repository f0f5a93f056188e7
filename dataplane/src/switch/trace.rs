//! One packet through all stages of the switch, without sending it: what `ofproto/trace` is to OVS.
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::{Inner, Switch, SwitchError};
use crate::bridge::fdb::PortId;
use crate::bridge::vlan::Egress;
use crate::conntrack::Toward;
use crate::counters::DropReason;
use crate::enforce::trace::EndTrace;
use crate::packet::{self, MacAddr};
use crate::pmd::Kinds;

/// Where the traced packet begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFrom {
    /// It comes in through this port.
    Port(PortId),
    /// It is on its way to this port already: only that port's end is looked at.
    Towards(PortId),
}

/// One stage of the packet's way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum TraceStage {
    /// Where it comes in.
    Input {
        /// Port.
        port: String,
        /// Bytes.
        bytes: usize,
    },
    /// Link header and VLAN.
    Link {
        /// Source address.
        source: MacAddr,
        /// Destination address.
        destination: MacAddr,
        /// EtherType behind the tags.
        ethertype: u16,
        /// VLAN of the frame's tag.
        tag: Option<u16>,
        /// VLAN of the bridge it belongs to; `None`: the port does not carry it.
        vlan: Option<u16>,
    },
    /// A firewall's end.
    Firewall {
        /// The port.
        port: String,
        /// What it did.
        #[serde(flatten)]
        end: EndTrace,
    },
    /// Where the destination is.
    Fdb {
        /// The port that it was learned on; `None`: unknown or a group address: flooded.
        port: Option<String>,
    },
    /// Where it goes out.
    Output {
        /// The port.
        port: String,
        /// With this tag.
        tag: Option<u16>,
    },
    /// Firewalled ports that a flooded frame is not shown to: it is for another station.
    Foreign {
        /// The ports.
        ports: Vec<String>,
    },
    /// Where it does not go out.
    Refused {
        /// The port.
        port: String,
        /// Why.
        reason: &'static str,
    },
}

/// The whole way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    /// Stages in order.
    pub stages: Vec<TraceStage>,
    /// Ports it would leave through.
    pub outputs: Vec<String>,
    /// Why it goes nowhere; `None` when it goes somewhere.
    pub dropped: Option<&'static str>,
}

impl fmt::Display for TraceStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input { port, bytes } => write!(f, "input: port {port}, {bytes} bytes"),
            Self::Link { source, destination, ethertype, tag, vlan } => {
                write!(f, "link: {source} > {destination}, ethertype 0x{ethertype:04x}, ")?;
                match tag {
                    Some(tag) => write!(f, "tag {tag}, ")?,
                    None => f.write_str("untagged, ")?,
                }
                match vlan {
                    Some(vlan) => write!(f, "VLAN {vlan} of the bridge"),
                    None => f.write_str("not carried by the port"),
                }
            }
            Self::Firewall { port, end } => {
                let way = if end.direction == crate::firewall::Direction::Egress { "from" } else { "towards" };
                writeln!(f, "firewall {way} VM {} (port {port}, rules generation {}):", end.vm, end.generation)?;
                let text = end.to_string();
                let mut lines = text.lines().peekable();
                while let Some(line) = lines.next() {
                    write!(f, "  {line}")?;
                    if lines.peek().is_some() {
                        writeln!(f)?;
                    }
                }
                Ok(())
            }
            Self::Fdb { port: Some(port) } => write!(f, "fdb: destination learned on port {port}"),
            Self::Fdb { port: None } => f.write_str("fdb: destination unknown or a group: flooded"),
            Self::Output { port, tag: Some(tag) } => write!(f, "output: port {port}, tag {tag}"),
            Self::Output { port, tag: None } => write!(f, "output: port {port}, untagged"),
            Self::Foreign { ports } if ports.len() > 8 => {
                write!(f, "not shown to {} firewalled ports: not for their stations", ports.len())
            }
            Self::Foreign { ports } => write!(f, "not shown to {}: not for their stations", ports.join(", ")),
            Self::Refused { port, reason } => write!(f, "no output to port {port}: {reason}"),
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for stage in &self.stages {
            writeln!(f, "{stage}")?;
        }
        match self.dropped {
            Some(reason) => write!(f, "verdict: dropped, {reason}"),
            None => write!(f, "verdict: goes out through {}", self.outputs.join(", ")),
        }
    }
}

impl<K: Kinds> Switch<K> {
    /// Walks `frame` through the switch as it is now, changing nothing: no connection is made, no station learned, nothing counted.
    ///
    /// # Errors
    /// No such port.
    pub fn trace(&self, from: TraceFrom, frame: &[u8]) -> Result<Trace, SwitchError> {
        let now_ns = self.clock.now_ns();
        let inner = self.lock();
        let mut trace = Trace { stages: Vec::new(), outputs: Vec::new(), dropped: None };
        let result = match from {
            TraceFrom::Port(port) => inner.trace_from(&mut trace, port, frame, now_ns)?,
            TraceFrom::Towards(port) => {
                let record = inner.ports.get(&port).ok_or(SwitchError::NoPort(port))?;
                let vlan = packet::parse_l2(frame, frame.len() as u32).ok().and_then(|l2| {
                    // A packet for an access port is described as the VM would see it.
                    record.vlan.ingress(l2.vlan.map(|t| t.tci.vid().get()))
                });
                match vlan {
                    Some(vlan) => inner.trace_to(&mut trace, port, vlan, frame, now_ns),
                    None => Err(DropReason::VlanNotAllowed),
                }
            }
        };
        trace.dropped = match result {
            Ok(()) if trace.outputs.is_empty() => Some(DropReason::NoDestination.name()),
            Ok(()) => None,
            Err(reason) => Some(reason.name()),
        };
        Ok(trace)
    }
}

impl<K: Kinds> Inner<K> {
    fn trace_from(
        &self,
        trace: &mut Trace,
        ingress: PortId,
        frame: &[u8],
        now_ns: u64,
    ) -> Result<Result<(), DropReason>, SwitchError> {
        let record = self.ports.get(&ingress).ok_or(SwitchError::NoPort(ingress))?;
        trace.stages.push(TraceStage::Input { port: record.options.name.clone(), bytes: frame.len() });
        let bridge = record.options.bridge.and_then(|id| self.bridges.get(&id));
        let Some(bridge) = bridge.filter(|_| record.options.admin_up) else {
            return Ok(Err(DropReason::RxDisabled));
        };
        let Ok(l2) = packet::parse_l2(frame, frame.len() as u32) else { return Ok(Err(DropReason::RxBadHeader)) };
        let tag = l2.vlan.map(|t| t.tci.vid().get());
        let vlan = record.vlan.ingress(tag);
        trace.stages.push(TraceStage::Link {
            source: l2.src_mac,
            destination: l2.dst_mac,
            ethertype: l2.ethertype.0,
            tag,
            vlan,
        });
        let Some(vlan) = vlan else { return Ok(Err(DropReason::VlanNotAllowed)) };
        if let Some(fw) = self.firewall.ports.get(&ingress) {
            let end = EndTrace::of(&fw.firewall, Toward::Egress, vlan, frame, now_ns);
            let dropped = end.dropped;
            trace.stages.push(TraceStage::Firewall { port: record.options.name.clone(), end });
            if let Some(reason) = dropped.and_then(DropReason::from_name) {
                return Ok(Err(reason));
            }
        }
        if !l2.src_mac.is_valid_source() {
            return Ok(Err(DropReason::BadSourceMac));
        }
        if l2.dst_mac.is_link_local() {
            return Ok(Err(DropReason::LinkLocal));
        }
        let fdb = Arc::clone(&bridge.fdb);
        let known = (!l2.dst_mac.is_multicast())
            .then(|| fdb.lookup(vlan, l2.dst_mac, (now_ns / 1_000_000_000) as u32))
            .flatten();
        let name = |id: PortId| self.ports.get(&id).map_or_else(|| format!("number {id}"), |p| p.options.name.clone());
        trace.stages.push(TraceStage::Fdb { port: known.map(name) });
        Ok(match known {
            Some(output) if output == ingress => Err(DropReason::SamePort),
            Some(output) => self.trace_to(trace, output, vlan, frame, now_ns),
            None => {
                let members = self.ports.iter().filter(|(id, p)| {
                    **id != ingress && p.options.bridge == record.options.bridge && p.vlan.egress(vlan).is_some()
                });
                let mut last = Ok(());
                let mut others = Vec::new();
                for (&member, _) in members {
                    let foreign = self.firewall.ports.get(&member).is_some_and(|fw| {
                        let spoof = &fw.firewall.rules.spoof;
                        spoof.is_enabled() && !l2.dst_mac.is_multicast() && !spoof.has_mac(l2.dst_mac)
                    });
                    if foreign {
                        others.push(name(member));
                    } else if let Err(reason) = self.trace_to(trace, member, vlan, frame, now_ns) {
                        last = Err(reason);
                    }
                }
                if !others.is_empty() {
                    trace.stages.push(TraceStage::Foreign { ports: others });
                }
                if trace.outputs.is_empty() { last } else { Ok(()) }
            }
        })
    }

    fn trace_to(
        &self,
        trace: &mut Trace,
        output: PortId,
        vlan: u16,
        frame: &[u8],
        now_ns: u64,
    ) -> Result<(), DropReason> {
        let Some(record) = self.ports.get(&output) else { return Err(DropReason::NoDestination) };
        let port = record.options.name.clone();
        if let Some(fw) = self.firewall.ports.get(&output) {
            let end = EndTrace::of(&fw.firewall, Toward::Ingress, vlan, frame, now_ns);
            let dropped = end.dropped;
            trace.stages.push(TraceStage::Firewall { port: port.clone(), end });
            if let Some(reason) = dropped.and_then(DropReason::from_name) {
                return Err(reason);
            }
        }
        let refuse = |trace: &mut Trace, reason: DropReason| {
            trace.stages.push(TraceStage::Refused { port: port.clone(), reason: reason.name() });
            Err(reason)
        };
        if !record.options.admin_up {
            return refuse(trace, DropReason::TxAdminDown);
        }
        let Some(egress) = record.vlan.egress(vlan) else { return refuse(trace, DropReason::NoDestination) };
        let tag = (egress == Egress::Tagged).then_some(vlan);
        trace.outputs.push(port.clone());
        trace.stages.push(TraceStage::Output { port, tag });
        Ok(())
    }
}
