//! Which connections are meant: the filters of `conntrack(8)`, on the direction of the packet that opened the connection.
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ferry_dataplane::conntrack::{Connection, SctpState, TcpState};
use ferry_dataplane::firewall::Cidr;
use ferry_dataplane::firewall::policy::{PortRange, Protocol};
use serde::{Deserialize, Serialize};

use super::connection::{Family, original, state_name, vlan};

/// A filter as it is typed or stands in a query. What is absent matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct FilterText {
    /// Only this transport protocol: tcp, udp, icmp, icmpv6, sctp, gre ... or a number.
    #[arg(long, short, value_name = "PROTOCOL")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proto: Option<String>,
    /// Only from this address or prefix (the sender of the first packet).
    #[arg(long, short, value_name = "ADDRESS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src: Option<String>,
    /// Only to this address or prefix (the receiver of the first packet).
    #[arg(long, short, value_name = "ADDRESS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dst: Option<String>,
    /// Only from this port, or range of ports such as 1024-2047.
    #[arg(long, value_name = "PORT")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sport: Option<String>,
    /// Only to this port, or range of ports.
    #[arg(long, value_name = "PORT")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dport: Option<String>,
    /// Only in this state of TCP or SCTP, such as ESTABLISHED or SYN_SENT.
    #[arg(long, value_name = "STATE")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Only with this status: assured, unassured, replied or unreplied.
    #[arg(long, short = 'u', value_name = "STATUS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Only this family: ipv4 or ipv6.
    #[arg(long, short, value_name = "FAMILY")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Only this VLAN of the bridge; 0: untagged.
    #[arg(long, short = 'w', visible_alias = "vlan", value_name = "VLAN")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
}

/// A filter that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: \"{value}\" {what}")]
pub struct FilterError {
    /// Which part of it.
    pub key: &'static str,
    /// As written.
    pub value: String,
    /// What is wrong.
    pub what: &'static str,
    /// What would be right.
    pub fix: String,
}

/// What can be known of a connection besides its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Assured,
    Unassured,
    Replied,
    Unreplied,
}

/// A filter, ready for use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    proto: Option<Protocol>,
    src: Option<Cidr>,
    dst: Option<Cidr>,
    sport: Option<PortRange>,
    dport: Option<PortRange>,
    state: Option<&'static str>,
    status: Option<Status>,
    family: Option<Family>,
    zone: Option<u16>,
}

fn read<T: FromStr>(
    key: &'static str,
    value: &Option<String>,
    what: &'static str,
    fix: &str,
) -> Result<Option<T>, FilterError> {
    let Some(text) = value else { return Ok(None) };
    let parsed = text.parse().ok();
    parsed.map(Some).ok_or_else(|| FilterError { key, value: text.clone(), what, fix: fix.to_owned() })
}

impl FilterText {
    /// True when nothing is filtered.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The filter.
    ///
    /// # Errors
    /// The first part that cannot be understood.
    pub fn parse(&self) -> Result<Filter, FilterError> {
        let address = "write an address or a prefix, such as 192.0.2.7 or 2001:db8::/32";
        let port = "give a number from 0 to 65535, or a range such as 1024-2047";
        let wrong = |key, value: &str, what, fix: String| FilterError { key, value: value.to_owned(), what, fix };
        let state = match &self.state {
            None => None,
            Some(text) => {
                let names: Vec<&'static str> =
                    TcpState::ALL.iter().map(|s| s.name()).chain(SctpState::ALL.iter().map(|s| s.name())).collect();
                let found = names.iter().find(|n| n.eq_ignore_ascii_case(text)).copied();
                let known = || {
                    let mut tcp: Vec<_> = TcpState::ALL.iter().map(|s| s.name()).collect();
                    tcp.retain(|n| *n != "NONE");
                    format!("TCP's are {}", tcp.join(", "))
                };
                Some(found.ok_or_else(|| wrong("state", text, "is not a state of TCP or SCTP", known()))?)
            }
        };
        let status = match self.status.as_deref() {
            None => None,
            Some("assured" | "ASSURED") => Some(Status::Assured),
            Some("unassured") => Some(Status::Unassured),
            Some("replied" | "seen-reply" | "SEEN_REPLY") => Some(Status::Replied),
            Some("unreplied" | "UNREPLIED") => Some(Status::Unreplied),
            Some(other) => {
                let fix = "use assured, unassured, replied or unreplied".to_owned();
                return Err(wrong("status", other, "is not a status", fix));
            }
        };
        let family = match self.family.as_deref() {
            None => None,
            Some("ipv4" | "inet" | "4") => Some(Family::Ipv4),
            Some("ipv6" | "inet6" | "6") => Some(Family::Ipv6),
            Some(other) => return Err(wrong("family", other, "is not a family", "use ipv4 or ipv6".to_owned())),
        };
        let zone: Option<u16> = read("zone", &self.zone, "is not a VLAN", "give a number from 0 to 4094")?;
        Ok(Filter {
            proto: read(
                "proto",
                &self.proto,
                "is not a protocol",
                "use tcp, udp, icmp, icmpv6, sctp, gre ... or a number",
            )?,
            src: read("src", &self.src, "is not an address or prefix", address)?,
            dst: read("dst", &self.dst, "is not an address or prefix", address)?,
            sport: read("sport", &self.sport, "is not a port or range of ports", port)?,
            dport: read("dport", &self.dport, "is not a port or range of ports", port)?,
            state,
            status,
            family,
            zone,
        })
    }

    /// As the query of an HTTP request, each part preceded by `&`.
    pub fn query(&self) -> String {
        let parts = [
            ("proto", &self.proto),
            ("src", &self.src),
            ("dst", &self.dst),
            ("sport", &self.sport),
            ("dport", &self.dport),
            ("state", &self.state),
            ("status", &self.status),
            ("family", &self.family),
            ("zone", &self.zone),
        ];
        let mut out = String::new();
        for (key, value) in parts {
            if let Some(v) = value {
                out.push('&');
                out.push_str(key);
                out.push('=');
                out.push_str(&escape(v));
            }
        }
        out
    }
}

/// A text as part of a URL's path or query (RFC 3986, 2.3).
pub fn escape(text: &str) -> String {
    use fmt::Write as _;
    let mut out = String::new();
    for b in text.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'~' => out.push(char::from(b)),
            _ => {
                let _ = write!(out, "%{b:02X}");
            }
        }
    }
    out
}

impl Filter {
    /// The connection is meant.
    pub fn matches(&self, c: &Connection) -> bool {
        let (src, dst) = original(c);
        let proto = c.key.proto();
        let v4 = !c.key.is_ipv6();
        let address = |cidr: Option<Cidr>, a: IpAddr| cidr.is_none_or(|cidr| cidr.contains(a));
        let port = |range: Option<PortRange>, p: u16| range.is_none_or(|r| proto.has_ports() && r.contains(p));
        self.family.is_none_or(|f| (f == Family::Ipv4) == v4)
            && self.proto.is_none_or(|p| p.number(v4).is_none_or(|n| n == proto.0))
            && self.zone.is_none_or(|z| z == vlan(c))
            && address(self.src, src.0)
            && address(self.dst, dst.0)
            && port(self.sport, src.1)
            && port(self.dport, dst.1)
            && self.state.is_none_or(|s| state_name(c) == Some(s))
            && self.status.is_none_or(|s| match s {
                Status::Assured => c.assured(),
                Status::Unassured => !c.assured(),
                Status::Replied => c.seen_reply(),
                Status::Unreplied => !c.seen_reply(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::connection::tests::tracked;

    #[test]
    fn each_part_filters_on_the_original_direction() {
        let all = tracked(&[
            "in tcp 10.0.0.1:40000 > 10.0.0.2:22 syn",
            "out udp 10.0.0.2:5353 > 10.1.0.1:53",
            "out udp [fd00::2]:5353 > [fd00::1]:53 vlan 5",
            "in udp [fd00::1]:53 > [fd00::2]:5353 vlan 5",
            "in icmp 10.0.0.9 > 10.0.0.2",
        ]);
        assert_eq!(all.len(), 4);
        let count = |set: fn(&mut FilterText)| {
            let mut text = FilterText::default();
            set(&mut text);
            let filter = text.parse().unwrap_or_else(|e| panic!("{e}"));
            all.iter().filter(|c| filter.matches(c)).count()
        };
        assert_eq!(count(|_| ()), 4);
        assert_eq!(count(|f| f.proto = Some("udp".into())), 2);
        assert_eq!(count(|f| f.proto = Some("6".into())), 1);
        assert_eq!(count(|f| f.proto = Some("icmp".into())), 1);
        assert_eq!(count(|f| f.src = Some("10.0.0.0/8".into())), 3);
        assert_eq!(count(|f| f.src = Some("10.0.0.2".into())), 1);
        assert_eq!(count(|f| f.dst = Some("10.0.0.2".into())), 2);
        assert_eq!(count(|f| f.dport = Some("53".into())), 2);
        assert_eq!(count(|f| f.sport = Some("5000-6000".into())), 2);
        assert_eq!(count(|f| f.sport = Some("0-65535".into())), 3, "ICMP has no ports");
        assert_eq!(count(|f| f.state = Some("syn_sent".into())), 1);
        assert_eq!(count(|f| f.status = Some("replied".into())), 1);
        assert_eq!(count(|f| f.status = Some("unreplied".into())), 3);
        assert_eq!(count(|f| f.status = Some("assured".into())), 0);
        assert_eq!(count(|f| f.family = Some("ipv6".into())), 1);
        assert_eq!(count(|f| f.zone = Some("5".into())), 1);
        assert_eq!(count(|f| f.zone = Some("0".into())), 3);
    }

    #[test]
    fn errors_name_the_part() {
        let text = FilterText { dport: Some("99999".into()), ..FilterText::default() };
        let e = text.parse().unwrap_err();
        assert_eq!(e.to_string(), "dport: \"99999\" is not a port or range of ports");
        for bad in [
            FilterText { state: Some("OPEN".into()), ..FilterText::default() },
            FilterText { status: Some("x".into()), ..FilterText::default() },
            FilterText { family: Some("ipx".into()), ..FilterText::default() },
            FilterText { src: Some("10.0.0.1/8".into()), ..FilterText::default() },
            FilterText { proto: Some("".into()), ..FilterText::default() },
        ] {
            assert!(bad.parse().is_err_and(|e| !e.fix.is_empty()), "{bad:?}");
        }
    }

    #[test]
    fn queries_are_escaped() {
        let text =
            FilterText { src: Some("2001:db8::/32".into()), proto: Some("a b&c".into()), ..FilterText::default() };
        assert_eq!(text.query(), "&proto=a%20b%26c&src=2001%3Adb8%3A%3A%2F32");
    }
}
