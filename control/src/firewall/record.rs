//! What the firewall reports of single connections and frames: new, denied, refused.
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::connection::{IcmpTuple, protocol_name};

/// Addresses and ports of a packet as it travelled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FlowView {
    /// IANA protocol number.
    pub protocol_number: u8,
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
    /// ICMP type and code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<(u8, u8)>,
    /// VLAN of the bridge; 0: untagged.
    #[serde(default)]
    pub zone: u16,
}

impl FlowView {
    /// Without what changes from one attempt to the next: the source port.
    pub fn without_ephemeral(&self) -> Self {
        Self { sport: None, ..self.clone() }
    }
}

impl fmt::Display for FlowView {
    /// `tcp 10.0.0.1:40000 > 10.0.0.2:22`, as `ferry trace` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match protocol_name(self.protocol_number) {
            "unknown" => write!(f, "proto {}", self.protocol_number)?,
            name => f.write_str(name)?,
        }
        let end = |f: &mut fmt::Formatter<'_>, a: IpAddr, port: Option<u16>| match (a, port) {
            (a, None) => write!(f, " {a}"),
            (IpAddr::V4(a), Some(p)) => write!(f, " {a}:{p}"),
            (IpAddr::V6(a), Some(p)) => write!(f, " [{a}]:{p}"),
        };
        end(f, self.src, self.sport)?;
        f.write_str(" >")?;
        end(f, self.dst, self.dport)?;
        if let Some((kind, code)) = self.icmp {
            write!(f, " type {kind}")?;
            if code != 0 {
                write!(f, " code {code}")?;
            }
        }
        if self.zone != 0 {
            write!(f, " vlan {}", self.zone)?;
        }
        Ok(())
    }
}

impl From<IcmpTuple> for (u8, u8) {
    fn from(i: IcmpTuple) -> Self {
        (i.kind, i.code)
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallRecord {
    /// When, milliseconds since 1970-01-01 UTC.
    pub time_unix_ms: u64,
    /// The VM.
    pub vm: String,
    /// The port.
    pub port: String,
    /// `ingress` (towards the VM) or `egress`.
    pub direction: String,
    /// What happened: `new`; or `denied`, `rejected`, `revoked` (by changed rules), `spoofed`, `limited`, `invalid`, `fragment`.
    pub kind: String,
    /// The reason by name, as in counters; empty for new connections.
    #[serde(default)]
    pub reason: String,
    /// The rule that decided, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The rule, or the port's default, asks for the flow log.
    #[serde(default)]
    pub log: bool,
    /// MAC addresses and EtherType, of a frame without IP or with spoofed addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Whose packet it was; absent when the frame has no IP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowView>,
}

impl FirewallRecord {
    /// Something was let through rather than refused.
    pub fn is_new(&self) -> bool {
        self.kind == "new"
    }
}
