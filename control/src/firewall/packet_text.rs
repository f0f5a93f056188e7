//! Packets described in words: `tcp 10.0.0.1:40000 > 10.0.0.2:22 syn`. For `ferry trace` and `ferry policy explain`.
//!
//! ```text
//! tcp|udp|sctp SOURCE:PORT > DESTINATION:PORT     TCP: syn ack fin rst psh urg ece cwr, seq N, ackno N, win N
//! icmp|icmpv6 SOURCE > DESTINATION                echo-request | echo-reply | type N [code N], id N, seq N
//! icmpv6 SOURCE > DESTINATION                     neighbour-solicitation | neighbour-advertisement, target ADDRESS
//! gre|esp|ah|...|proto N SOURCE > DESTINATION
//! arp who-has ADDRESS tell ADDRESS  |  arp ADDRESS is-at MAC
//! hex:...                                         a whole Ethernet frame
//! ```
//! Anywhere: `in` (towards the VM) or `out`, `vlan N`, `smac MAC`, `dmac MAC`, `ttl N`, `len N` (bytes of payload). IPv6 addresses with
//! a port stand in brackets. What is left out is filled in: TCP begins a connection, MAC addresses are those of the ports that have
//! the addresses. The result is a real frame with right checksums.
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use ferry_dataplane::firewall::Direction;
use ferry_dataplane::firewall::policy::Protocol;
use ferry_dataplane::offload::checksum::{Sum, crc32c, internet_checksum, pseudo_v4, pseudo_v6};
use ferry_dataplane::packet::arp::{ArpPacket, Operation};
use ferry_dataplane::packet::ethernet::EthernetHeader;
use ferry_dataplane::packet::icmp::IcmpHeader;
use ferry_dataplane::packet::ipv4::Ipv4Header;
use ferry_dataplane::packet::ipv6::Ipv6Header;
use ferry_dataplane::packet::tcp::{Flags, TcpHeader};
use ferry_dataplane::packet::udp::UdpHeader;
use ferry_dataplane::packet::vlan::{Tci, VlanTag};
use ferry_dataplane::packet::{EtherType, IpProto, MacAddr};

/// Longest description, bytes.
pub const MAX_TEXT_BYTES: usize = 8192;
/// Longest frame, bytes.
pub const MAX_FRAME_BYTES: usize = 1514;
/// Longest payload that `len` can ask for, bytes.
const MAX_PAYLOAD_BYTES: u16 = 1400;
/// Stands for stations that no port is known to have.
const SOMEONE: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);

/// A description that cannot be understood: what is wrong, at which word, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketError {
    /// What was described.
    pub text: String,
    /// The word at fault: bytes of `text`.
    pub at: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub fix: String,
}

impl fmt::Display for PacketError {
    /// The message, and the description with the word underlined.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.text.get(..self.at.start).map_or(0, |t| t.chars().count());
        let width = self.text.get(self.at.clone()).map_or(1, |t| t.chars().count().max(1));
        write!(f, "{}\n  {}\n  {}{}", self.message, self.text, " ".repeat(before), "^".repeat(width))
    }
}

impl std::error::Error for PacketError {}

/// What is known about the VM and its neighbours, to fill in what a description leaves out.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Addresses of the VM, with the MAC address that goes with each.
    pub own: Vec<(ferry_dataplane::firewall::Cidr, Option<MacAddr>)>,
    /// Addresses of other ports.
    pub others: Vec<(ferry_dataplane::firewall::Cidr, Option<MacAddr>)>,
}

impl Surroundings {
    fn owns(&self, address: IpAddr) -> bool {
        self.own.iter().any(|(cidr, _)| cidr.contains(address))
    }

    fn own_mac(&self, address: Option<IpAddr>) -> Option<MacAddr> {
        let exact = address.and_then(|a| self.own.iter().find(|(cidr, mac)| mac.is_some() && cidr.contains(a)));
        exact.or_else(|| self.own.iter().find(|(_, mac)| mac.is_some())).and_then(|(_, mac)| *mac)
    }

    fn other_mac(&self, address: Option<IpAddr>) -> Option<MacAddr> {
        let address = address?;
        self.others.iter().find(|(cidr, mac)| mac.is_some() && cidr.contains(address)).and_then(|(_, mac)| *mac)
    }
}

/// A packet as described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketText {
    text: String,
    direction: Option<Direction>,
    vlan: Option<u16>,
    smac: Option<MacAddr>,
    dmac: Option<MacAddr>,
    ttl: u8,
    payload: u16,
    body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Ip { src: IpAddr, dst: IpAddr, upper: Upper },
    WhoHas { target: Ipv4Addr, tell: Ipv4Addr },
    IsAt { address: Ipv4Addr, mac: MacAddr },
    Raw(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Upper {
    Tcp { sport: u16, dport: u16, flags: Flags, seq: u32, ack: u32, window: u16 },
    Udp { sport: u16, dport: u16 },
    Sctp { sport: u16, dport: u16 },
    Icmp { kind: u8, code: u8, id: u16, seq: u16, target: Option<Ipv6Addr> },
    Other(u8),
}

/// A frame made of a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Which way it goes.
    pub direction: Direction,
    /// The Ethernet frame.
    pub frame: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    start: usize,
}

struct Words<'a> {
    text: &'a str,
    words: Vec<Word<'a>>,
    next: usize,
}

type Result<T> = std::result::Result<T, PacketError>;

impl<'a> Words<'a> {
    fn new(text: &'a str) -> Self {
        let mut words = Vec::new();
        let mut start = None;
        for (i, c) in text.char_indices().chain([(text.len(), ' ')]) {
            match (c.is_whitespace(), start) {
                (false, None) => start = Some(i),
                (true, Some(s)) => {
                    words.push(Word { text: &text[s..i], start: s });
                    start = None;
                }
                _ => {}
            }
        }
        Self { text, words, next: 0 }
    }

    fn error(&self, word: Word<'_>, message: impl Into<String>, fix: impl Into<String>) -> PacketError {
        let at = word.start..word.start + word.text.len();
        PacketError { text: self.text.to_owned(), at, message: message.into(), fix: fix.into() }
    }

    fn peek(&self) -> Option<Word<'a>> {
        self.words.get(self.next).copied()
    }

    fn take(&mut self) -> Option<Word<'a>> {
        let word = self.peek()?;
        self.next += 1;
        Some(word)
    }

    /// The next word; `what` is said when there is none.
    fn need(&mut self, what: &str, fix: &str) -> Result<Word<'a>> {
        self.take().ok_or_else(|| PacketError {
            text: self.text.to_owned(),
            at: self.text.len()..self.text.len(),
            message: format!("{what} is missing at the end"),
            fix: fix.to_owned(),
        })
    }

    fn keyword(&mut self, keyword: &str, fix: &str) -> Result<()> {
        let word = self.need(&format!("\"{keyword}\""), fix)?;
        match word.text == keyword {
            true => Ok(()),
            false => Err(self.error(word, format!("\"{}\" stands where \"{keyword}\" should be", word.text), fix)),
        }
    }

    fn number(&mut self, what: &str, most: u32) -> Result<u32> {
        let fix = format!("give a number from 0 to {most}");
        let word = self.need(&format!("the number of {what}"), &fix)?;
        let digits = word.text.strip_prefix("0x");
        let number = match digits {
            Some(hex) => u32::from_str_radix(hex, 16).ok().filter(|_| !hex.starts_with('+')),
            None => word.text.parse().ok().filter(|_| !word.text.starts_with('+')),
        };
        let number = number.filter(|n| *n <= most);
        number.ok_or_else(|| self.error(word, format!("\"{}\" is not a number for {what}", word.text), fix))
    }

    fn mac(&mut self) -> Result<MacAddr> {
        let fix = "write it as 52:54:00:12:34:56";
        let word = self.need("the MAC address", fix)?;
        word.text.parse().map_err(|_| self.error(word, format!("\"{}\" is not a MAC address", word.text), fix))
    }

    fn ipv4(&mut self) -> Result<Ipv4Addr> {
        let fix = "write it as 10.0.0.1";
        let word = self.need("the IPv4 address", fix)?;
        word.text.parse().map_err(|_| self.error(word, format!("\"{}\" is not an IPv4 address", word.text), fix))
    }

    fn ipv6(&mut self) -> Result<Ipv6Addr> {
        let fix = "write it as fd00::1";
        let word = self.need("the IPv6 address", fix)?;
        word.text.parse().map_err(|_| self.error(word, format!("\"{}\" is not an IPv6 address", word.text), fix))
    }

    /// An address, with its port when `ports`.
    fn endpoint(&mut self, what: &str, ports: bool) -> Result<(IpAddr, u16, Word<'a>)> {
        let example = if ports { "10.0.0.1:80 or [fd00::1]:80" } else { "10.0.0.1 or fd00::1" };
        let fix = format!("write it as {example}");
        let word = self.need(what, &fix)?;
        let text = word.text;
        let bracketed = text.strip_prefix('[').and_then(|t| t.split_once(']'));
        let (address, port) = match bracketed {
            Some((address, rest)) => (address, rest.strip_prefix(':')),
            // More than one colon: an IPv6 address without brackets, so without a port.
            None if text.matches(':').count() > 1 => (text, None),
            None => text.split_once(':').map_or((text, None), |(a, p)| (a, Some(p))),
        };
        let Ok(parsed) = address.parse::<IpAddr>() else {
            return Err(self.error(word, format!("\"{address}\" is not an IP address"), fix));
        };
        if bracketed.is_some_and(|(_, rest)| !rest.is_empty() && !rest.starts_with(':')) {
            return Err(self.error(word, format!("\"{text}\" is not an address"), fix));
        }
        let digits = |p: &str| p.bytes().all(|b| b.is_ascii_digit()).then(|| p.parse::<u16>().ok()).flatten();
        match (ports, port) {
            (true, Some(p)) => match digits(p) {
                Some(port) => Ok((parsed, port, word)),
                None => Err(self.error(word, format!("\"{p}\" is not a port"), "give a number from 0 to 65535")),
            },
            (true, None) => Err(self.error(word, format!("{what} has no port"), fix)),
            (false, Some(_)) => {
                Err(self.error(word, "this protocol has no ports", format!("write {address} without a port")))
            }
            (false, None) => Ok((parsed, 0, word)),
        }
    }
}

/// Reads a description.
///
/// # Errors
/// The first word that cannot be understood.
pub fn parse(text: &str) -> Result<PacketText> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(PacketError {
            text: String::new(),
            at: 0..0,
            message: format!("the description has {} bytes, at most {MAX_TEXT_BYTES} are read", text.len()),
            fix: "describe one packet".into(),
        });
    }
    let mut words = Words::new(text);
    let mut packet = PacketText {
        text: text.to_owned(),
        direction: None,
        vlan: None,
        smac: None,
        dmac: None,
        ttl: 64,
        payload: 0,
        body: Body::Raw(Vec::new()),
    };
    while common(&mut words, &mut packet)? {}
    let fix = "begin with tcp, udp, icmp, icmpv6, sctp, gre, arp, proto N or hex:...";
    let first = words.need("the protocol", fix)?;
    packet.body = if let Some(hex) = first.text.strip_prefix("hex:") {
        Body::Raw(raw(&words, first, hex)?)
    } else if first.text == "arp" {
        arp(&mut words)?
    } else {
        ip(&mut words, first)?
    };
    while let Some(word) = words.peek() {
        if !common(&mut words, &mut packet)? && !option(&mut words, &mut packet)? {
            let known = match &packet.body {
                Body::Ip { upper: Upper::Tcp { .. }, .. } => {
                    "syn, ack, fin, rst, psh, urg, ece, cwr, seq N, ackno N, win N, "
                }
                Body::Ip { upper: Upper::Icmp { .. }, .. } => {
                    "echo-request, echo-reply, type N, code N, id N, seq N, target ADDRESS, "
                }
                _ => "",
            };
            let fix = format!("known here: {known}in, out, vlan N, smac MAC, dmac MAC, ttl N, len N");
            return Err(words.error(word, format!("\"{}\" has no meaning here", word.text), fix));
        }
    }
    if let Body::Ip { upper: Upper::Tcp { flags, .. }, .. } = &mut packet.body
        && flags.is_empty()
    {
        *flags = Flags::SYN;
    }
    Ok(packet)
}

/// Words that may stand anywhere. False: the next word is none of them.
fn common(words: &mut Words<'_>, packet: &mut PacketText) -> Result<bool> {
    let Some(word) = words.peek() else { return Ok(false) };
    match word.text {
        "in" | "ingress" | "out" | "egress" => {
            let direction = if word.text.starts_with("in") { Direction::Ingress } else { Direction::Egress };
            if packet.direction.is_some_and(|d| d != direction) {
                return Err(words.error(word, "it cannot go both ways", "say \"in\" or \"out\" once"));
            }
            words.next += 1;
            packet.direction = Some(direction);
        }
        "vlan" => {
            words.next += 1;
            packet.vlan = Some(words.number("the VLAN", 4094)? as u16);
        }
        "smac" => {
            words.next += 1;
            packet.smac = Some(words.mac()?);
        }
        "dmac" => {
            words.next += 1;
            packet.dmac = Some(words.mac()?);
        }
        "ttl" => {
            words.next += 1;
            packet.ttl = words.number("the time to live", 255)? as u8;
        }
        "len" => {
            words.next += 1;
            packet.payload = words.number("bytes of payload", u32::from(MAX_PAYLOAD_BYTES))? as u16;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn raw(words: &Words<'_>, word: Word<'_>, hex: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = hex.bytes().filter(|b| *b != b':').collect();
    let fix = format!("give 14 to {MAX_FRAME_BYTES} bytes, two hexadecimal digits each");
    let value = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let bytes: Option<Vec<u8>> = digits
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(value(*high)? << 4 | value(*low)?),
            _ => None,
        })
        .collect();
    match bytes {
        Some(b) if (14..=MAX_FRAME_BYTES).contains(&b.len()) => Ok(b),
        Some(b) => Err(words.error(word, format!("a frame of {} bytes is not possible", b.len()), fix)),
        None => Err(words.error(word, "these are not bytes in hexadecimal", fix)),
    }
}

fn arp(words: &mut Words<'_>) -> Result<Body> {
    let fix = "write arp who-has 10.0.0.2 tell 10.0.0.1, or arp 10.0.0.1 is-at 52:54:00:12:34:56";
    let Some(word) = words.peek() else {
        return Err(words.need("what ARP says", fix).err().unwrap_or_else(|| nothing(words)));
    };
    if word.text == "who-has" {
        words.next += 1;
        let target = words.ipv4()?;
        words.keyword("tell", fix)?;
        return Ok(Body::WhoHas { target, tell: words.ipv4()? });
    }
    if word.text == "reply" {
        words.next += 1;
    }
    let address = words.ipv4()?;
    words.keyword("is-at", fix)?;
    Ok(Body::IsAt { address, mac: words.mac()? })
}

fn nothing(words: &Words<'_>) -> PacketError {
    words.error(Word { text: "", start: words.text.len() }, "the description is not complete", "")
}

fn ip(words: &mut Words<'_>, first: Word<'_>) -> Result<Body> {
    let number = match first.text {
        "proto" => words.number("the protocol", 255)? as u8,
        "icmp6" => IpProto::ICMPV6.0,
        "icmp" => IpProto::ICMP.0,
        name => match name.parse::<Protocol>() {
            Ok(Protocol::Number(n)) => n,
            _ => {
                let fix = "begin with tcp, udp, icmp, icmpv6, sctp, gre, esp, ah ..., proto N, arp or hex:...";
                return Err(words.error(first, format!("\"{name}\" is not a protocol"), fix));
            }
        },
    };
    let ports = matches!(IpProto(number), IpProto::TCP | IpProto::UDP | IpProto::SCTP);
    let (src, sport, _) = words.endpoint("the source", ports)?;
    words.keyword(">", "write SOURCE > DESTINATION, with spaces around \">\"")?;
    let (dst, dport, word) = words.endpoint("the destination", ports)?;
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(words.error(word, "source and destination are of different families", "use IPv4 or IPv6 for both"));
    }
    // As in rules, "icmp" over IPv6 is ICMPv6.
    let number = if first.text == "icmp" && src.is_ipv6() { IpProto::ICMPV6.0 } else { number };
    if IpProto(number) == IpProto::ICMPV6 && src.is_ipv4() {
        return Err(words.error(first, "ICMPv6 does not occur over IPv4", "write icmp"));
    }
    let upper = match IpProto(number) {
        IpProto::TCP => Upper::Tcp { sport, dport, flags: Flags::empty(), seq: 1, ack: 0, window: 64_240 },
        IpProto::UDP => Upper::Udp { sport, dport },
        IpProto::SCTP => Upper::Sctp { sport, dport },
        IpProto::ICMP => Upper::Icmp { kind: 8, code: 0, id: 1, seq: 1, target: None },
        IpProto::ICMPV6 => Upper::Icmp { kind: 128, code: 0, id: 1, seq: 1, target: None },
        other => Upper::Other(other.0),
    };
    Ok(Body::Ip { src, dst, upper })
}

/// Words that belong to the protocol. False: the next word is none of them.
fn option(words: &mut Words<'_>, packet: &mut PacketText) -> Result<bool> {
    let Some(word) = words.peek() else { return Ok(false) };
    let Body::Ip { src, upper, .. } = &mut packet.body else { return Ok(false) };
    match upper {
        Upper::Tcp { flags, seq, ack, window, .. } => {
            if let Some(flag) = tcp_flag(word.text) {
                words.next += 1;
                *flags |= flag;
                return Ok(true);
            }
            let field: &mut dyn FnMut(u32) = match word.text {
                "seq" => &mut |n| *seq = n,
                "ackno" => &mut |n| *ack = n,
                "win" => {
                    words.next += 1;
                    *window = words.number("the window", 65_535)? as u16;
                    return Ok(true);
                }
                _ => return Ok(false),
            };
            words.next += 1;
            field(words.number("the sequence number", u32::MAX)?);
            Ok(true)
        }
        Upper::Icmp { kind, code, id, seq, target } => {
            if let Some(named) = icmp_kind(word.text, src.is_ipv4()) {
                words.next += 1;
                *kind = named;
                return Ok(true);
            }
            match word.text {
                "type" | "code" | "id" | "seq" | "target" => words.next += 1,
                "neighbour-solicitation" | "neighbour-advertisement" => {
                    return Err(words.error(word, "neighbour discovery is ICMPv6", "use IPv6 addresses, or arp"));
                }
                _ => return Ok(false),
            }
            match word.text {
                "type" => *kind = words.number("the ICMP type", 255)? as u8,
                "code" => *code = words.number("the ICMP code", 255)? as u8,
                "id" => *id = words.number("the identifier", 65_535)? as u16,
                "seq" => *seq = words.number("the sequence number", 65_535)? as u16,
                _ => *target = Some(words.ipv6()?),
            }
            Ok(true)
        }
        Upper::Udp { .. } | Upper::Sctp { .. } | Upper::Other(_) => Ok(false),
    }
}

fn tcp_flag(word: &str) -> Option<Flags> {
    Some(match word {
        "syn" => Flags::SYN,
        "ack" => Flags::ACK,
        "syn-ack" | "synack" => Flags::SYN | Flags::ACK,
        "fin" => Flags::FIN,
        "rst" => Flags::RST,
        "psh" => Flags::PSH,
        "urg" => Flags::URG,
        "ece" => Flags::ECE,
        "cwr" => Flags::CWR,
        _ => return None,
    })
}

fn icmp_kind(word: &str, v4: bool) -> Option<u8> {
    Some(match (word, v4) {
        ("echo-request", true) => 8,
        ("echo-reply", true) => 0,
        ("timestamp-request", true) => 13,
        ("timestamp-reply", true) => 14,
        ("router-solicitation", false) => 133,
        ("router-advertisement", false) => 134,
        ("neighbour-solicitation" | "neighbor-solicitation", false) => 135,
        ("neighbour-advertisement" | "neighbor-advertisement", false) => 136,
        ("echo-request", false) => 128,
        ("echo-reply", false) => 129,
        _ => return None,
    })
}

impl PacketText {
    /// The frame, with what was left out filled in from `surroundings`.
    ///
    /// # Errors
    /// The direction is neither said nor to be told from the addresses.
    pub fn frame(&self, surroundings: &Surroundings) -> Result<Described> {
        let (src, dst) = match &self.body {
            Body::Ip { src, dst, .. } => (Some(*src), Some(*dst)),
            Body::WhoHas { target, tell } => (Some(IpAddr::V4(*tell)), Some(IpAddr::V4(*target))),
            Body::IsAt { address, .. } => (Some(IpAddr::V4(*address)), None),
            Body::Raw(_) => (None, None),
        };
        let direction = match self.direction {
            Some(d) => d,
            None if src.is_some_and(|a| surroundings.owns(a)) => Direction::Egress,
            None if dst.is_some_and(|a| surroundings.owns(a)) => Direction::Ingress,
            None => {
                return Err(PacketError {
                    text: self.text.clone(),
                    at: 0..self.text.len(),
                    message: "none of the addresses is the VM's, so that its direction is not known".into(),
                    fix: "add \"in\" (towards the VM) or \"out\" (from the VM)".into(),
                });
            }
        };
        let mac = |address: Option<IpAddr>, own: bool| {
            let known = if own { surroundings.own_mac(address) } else { surroundings.other_mac(address) };
            known.unwrap_or(SOMEONE)
        };
        let from_vm = direction == Direction::Egress;
        let smac = self.smac.unwrap_or_else(|| mac(src, from_vm));
        let dmac = self.dmac.unwrap_or_else(|| match (&self.body, dst) {
            (Body::WhoHas { .. } | Body::IsAt { .. }, _) => MacAddr::BROADCAST,
            (_, Some(a)) => group_mac(a).unwrap_or_else(|| mac(dst, !from_vm)),
            (_, None) => MacAddr::BROADCAST,
        });
        let (ethertype, payload) = match &self.body {
            Body::Raw(frame) => return Ok(Described { direction, frame: frame.clone() }),
            Body::WhoHas { target, tell } => (EtherType::ARP, {
                let packet = ArpPacket {
                    operation: Operation::REQUEST,
                    sender_mac: smac,
                    sender_ip: *tell,
                    target_mac: MacAddr::ZERO,
                    target_ip: *target,
                };
                packet.to_bytes().to_vec()
            }),
            Body::IsAt { address, mac } => (EtherType::ARP, {
                let packet = ArpPacket {
                    operation: Operation::REPLY,
                    sender_mac: *mac,
                    sender_ip: *address,
                    target_mac: dmac,
                    target_ip: *address,
                };
                packet.to_bytes().to_vec()
            }),
            Body::Ip { src: IpAddr::V4(src), dst: IpAddr::V4(dst), upper } => {
                (EtherType::IPV4, self.ipv4(*src, *dst, upper))
            }
            Body::Ip { src, dst, upper } => {
                let v6 = |a: &IpAddr| match a {
                    IpAddr::V4(a) => a.to_ipv6_mapped(),
                    IpAddr::V6(a) => *a,
                };
                (EtherType::IPV6, self.ipv6(v6(src), v6(dst), upper, smac))
            }
        };
        let tagged = self.vlan.is_some();
        let outer = if tagged { EtherType::VLAN } else { ethertype };
        let mut frame = EthernetHeader { dst: dmac, src: smac, ethertype: outer }.to_bytes().to_vec();
        if let Some(vlan) = self.vlan {
            let [_, _, tci @ ..] = VlanTag::customer(Tci(vlan)).to_bytes();
            frame.extend_from_slice(&tci);
            frame.extend_from_slice(&ethertype.0.to_be_bytes());
        }
        frame.extend_from_slice(&payload);
        if frame.len() < 60 {
            frame.resize(60, 0);
        }
        Ok(Described { direction, frame })
    }

    fn ipv4(&self, src: Ipv4Addr, dst: Ipv4Addr, upper: &Upper) -> Vec<u8> {
        let (proto, l4) = self.l4(upper, true, None, |proto, len| pseudo_v4(src, dst, proto, len));
        let header = Ipv4Header {
            traffic_class: 0,
            total_len: 20 + l4.len() as u16,
            identification: 0,
            dont_fragment: true,
            more_fragments: false,
            fragment_offset: 0,
            ttl: self.ttl,
            proto,
            src,
            dst,
        };
        [&header.to_bytes()[..], &l4].concat()
    }

    fn ipv6(&self, src: Ipv6Addr, dst: Ipv6Addr, upper: &Upper, smac: MacAddr) -> Vec<u8> {
        let discovery = matches!(upper, Upper::Icmp { kind: 133..=137, .. });
        let target = match upper {
            Upper::Icmp { kind: 135, target, .. } => Some((target.unwrap_or(dst), 1u8, smac)),
            Upper::Icmp { kind: 136, target, .. } => Some((target.unwrap_or(src), 2u8, smac)),
            _ => None,
        };
        let (proto, l4) = self.l4(upper, false, target, |proto, len| pseudo_v6(src, dst, proto, len));
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: l4.len() as u16,
            next_header: proto,
            // RFC 4861, 7.1: anything else is refused.
            hop_limit: if discovery { 255 } else { self.ttl },
            src,
            dst,
        };
        [&header.to_bytes()[..], &l4].concat()
    }

    /// Transport header and payload with the right checksum. `discovery`: target, option type and link-layer address.
    fn l4(
        &self,
        upper: &Upper,
        v4: bool,
        discovery: Option<(Ipv6Addr, u8, MacAddr)>,
        pseudo: impl Fn(IpProto, u32) -> Sum,
    ) -> (IpProto, Vec<u8>) {
        let payload = vec![0u8; usize::from(self.payload)];
        let summed = |proto: IpProto, header: &[u8], at: usize| {
            let mut bytes = [header, &payload].concat();
            let mut sum = pseudo(proto, bytes.len() as u32);
            sum.add_bytes(&bytes);
            // UDP: 0 means "no checksum" (RFC 768).
            let checksum = match sum.finish() {
                0 if proto == IpProto::UDP => 0xffff,
                c => c,
            };
            if let Some(field) = bytes.get_mut(at..at + 2) {
                field.copy_from_slice(&checksum.to_be_bytes());
            }
            bytes
        };
        match upper {
            Upper::Tcp { sport, dport, flags, seq, ack, window } => {
                let header = TcpHeader {
                    src_port: *sport,
                    dst_port: *dport,
                    seq: *seq,
                    ack: *ack,
                    flags: *flags,
                    window: *window,
                };
                (IpProto::TCP, summed(IpProto::TCP, &header.to_bytes(), 16))
            }
            Upper::Udp { sport, dport } => {
                let header = UdpHeader { src_port: *sport, dst_port: *dport, length: 8 + self.payload };
                (IpProto::UDP, summed(IpProto::UDP, &header.to_bytes(), 6))
            }
            Upper::Sctp { sport, dport } => (IpProto::SCTP, sctp_init(*sport, *dport)),
            Upper::Icmp { kind, code, id, seq, .. } => {
                let rest = match kind {
                    // Solicited and override, as an answer has them (RFC 4861, 4.4).
                    136 if !v4 => 0x6000_0000,
                    133..=135 if !v4 => 0,
                    _ => u32::from(*id) << 16 | u32::from(*seq),
                };
                let mut bytes = IcmpHeader { kind: *kind, code: *code, rest }.to_bytes().to_vec();
                if let Some((target, option, mac)) = discovery {
                    bytes.extend_from_slice(&target.octets());
                    bytes.extend_from_slice(&[option, 1]);
                    bytes.extend_from_slice(&mac.octets());
                }
                if v4 {
                    bytes.extend_from_slice(&payload);
                    let checksum = internet_checksum(&bytes).to_be_bytes();
                    if let Some(field) = bytes.get_mut(2..4) {
                        field.copy_from_slice(&checksum);
                    }
                    (IpProto::ICMP, bytes)
                } else {
                    (IpProto::ICMPV6, summed(IpProto::ICMPV6, &bytes, 2))
                }
            }
            // GRE without options has four bytes of header (RFC 2784); the rest is for what other protocols make of it.
            Upper::Other(n) => {
                let header: &[u8] = if IpProto(*n) == IpProto::GRE { &[0, 0, 0x08, 0] } else { &[0; 8] };
                (IpProto(*n), [header, &payload].concat())
            }
        }
    }
}

/// The MAC address of a group (RFC 1112, 6.4; RFC 2464, 7), or of everybody; `None` for a single station.
fn group_mac(address: IpAddr) -> Option<MacAddr> {
    match address {
        IpAddr::V4(a) if a.is_broadcast() => Some(MacAddr::BROADCAST),
        IpAddr::V4(a) if a.is_multicast() => {
            let [_, b, c, d] = a.octets();
            Some(MacAddr::new([0x01, 0x00, 0x5e, b & 0x7f, c, d]))
        }
        IpAddr::V6(a) if a.is_multicast() => {
            let [.., w, x, y, z] = a.octets();
            Some(MacAddr::new([0x33, 0x33, w, x, y, z]))
        }
        _ => None,
    }
}

/// An INIT chunk (RFC 9260, 3.3.2): what begins an association.
fn sctp_init(sport: u16, dport: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(32);
    out.extend_from_slice(&sport.to_be_bytes());
    out.extend_from_slice(&dport.to_be_bytes());
    // The verification tag of an INIT is 0 (8.5.1); then the checksum's place.
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[1, 0, 0, 20]);
    // Initiate tag, receiver window, streams out and in, initial TSN.
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(&65_536u32.to_be_bytes());
    out.extend_from_slice(&[0, 10, 0, 10]);
    out.extend_from_slice(&1u32.to_be_bytes());
    let checksum = crc32c(&out).to_le_bytes();
    if let Some(field) = out.get_mut(8..12) {
        field.copy_from_slice(&checksum);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_dataplane::firewall::FlowKey;
    use ferry_dataplane::firewall::L4Key;
    use ferry_dataplane::frame::Body as FrameBody;
    use ferry_dataplane::offload::checksum::{Verdict, verify_l4};
    use ferry_dataplane::packet::{Headers, L3, arp::Arp, ipv4::Ipv4, parse as parse_headers, tcp::Tcp};

    fn vm() -> Surroundings {
        Surroundings {
            own: vec![
                ("10.0.0.2".parse().unwrap(), Some("52:54:00:00:00:02".parse().unwrap())),
                ("fd00::2".parse().unwrap(), Some("52:54:00:00:00:02".parse().unwrap())),
            ],
            others: vec![("10.0.0.3".parse().unwrap(), Some("52:54:00:00:00:03".parse().unwrap()))],
        }
    }

    fn described(text: &str) -> (Described, Headers) {
        let d = parse(text).unwrap_or_else(|e| panic!("{e}")).frame(&vm()).unwrap_or_else(|e| panic!("{e}"));
        let headers = parse_headers(&d.frame, d.frame.len() as u32).unwrap_or_else(|e| panic!("{text}: {e:?}"));
        (d, headers)
    }

    #[test]
    fn frames_are_what_was_described_and_their_checksums_are_right() {
        for (text, direction, protocol, l4) in [
            (
                "tcp 10.0.0.1:40000 > 10.0.0.2:22 syn",
                Direction::Ingress,
                6,
                Some(L4Key::Ports { source: 40000, destination: 22 }),
            ),
            (
                "out tcp 10.0.0.9:1 > 10.0.0.8:2 ack len 100 seq 7 ackno 9 win 3",
                Direction::Egress,
                6,
                Some(L4Key::Ports { source: 1, destination: 2 }),
            ),
            (
                "udp [fd00::2]:53 > [fd00::1]:5353 len 11",
                Direction::Egress,
                17,
                Some(L4Key::Ports { source: 53, destination: 5353 }),
            ),
            (
                "icmp 10.0.0.1 > 10.0.0.2 echo-request id 7",
                Direction::Ingress,
                1,
                Some(L4Key::Icmp { kind: 8, code: 0 }),
            ),
            ("icmp fd00::2 > fd00::1 echo-reply", Direction::Egress, 58, Some(L4Key::Icmp { kind: 129, code: 0 })),
            (
                "icmpv6 fd00::2 > ff02::1:ff00:1 neighbour-solicitation target fd00::1",
                Direction::Egress,
                58,
                Some(L4Key::Icmp { kind: 135, code: 0 }),
            ),
            (
                "sctp 10.0.0.2:5 > 10.0.0.1:6 vlan 7",
                Direction::Egress,
                132,
                Some(L4Key::Ports { source: 5, destination: 6 }),
            ),
            ("gre 10.0.0.1 > 10.0.0.2", Direction::Ingress, 47, None),
            ("proto 99 10.0.0.1 > 10.0.0.2 ttl 3", Direction::Ingress, 99, None),
        ] {
            let (d, headers) = described(text);
            assert_eq!(d.direction, direction, "{text}");
            let key = FlowKey::of(&d.frame, &headers, d.direction).unwrap();
            assert_eq!((key.protocol, key.l4), (protocol, l4), "{text}");
            if !matches!(protocol, 47 | 99) {
                assert_eq!(verify_l4(&headers, &d.frame, &FrameBody::EMPTY), Verdict::Valid, "{text}");
            }
        }
    }

    #[test]
    fn what_is_left_out_is_filled_in() {
        let (d, headers) = described("tcp 10.0.0.2:1 > 10.0.0.3:2");
        assert_eq!(&d.frame[..6], [0x52, 0x54, 0, 0, 0, 3], "the neighbour's address");
        assert_eq!(&d.frame[6..12], [0x52, 0x54, 0, 0, 0, 2], "the VM's");
        let L3::Ipv4 { .. } = headers.l3 else { panic!("no IPv4") };
        let ip = Ipv4::new(&d.frame[14..]).unwrap();
        assert!(ip.checksum_ok());
        assert_eq!(Tcp::new(&d.frame[34..]).unwrap().flags(), Flags::SYN);
        let (d, _) = described("udp 10.0.0.2:1 > 224.0.0.251:5353");
        assert_eq!(&d.frame[..6], [1, 0, 0x5e, 0, 0, 0xfb]);
        let (d, _) = described("smac 52:54:00:00:00:99 udp 10.0.0.2:1 > 10.0.0.3:5353 vlan 5");
        assert_eq!(&d.frame[6..18], [0x52, 0x54, 0, 0, 0, 0x99, 0x81, 0, 0, 5, 8, 0]);
    }

    #[test]
    fn arp_and_raw_frames() {
        let (d, _) = described("arp who-has 10.0.0.9 tell 10.0.0.2");
        let arp = Arp::new(&d.frame[14..]).unwrap();
        assert_eq!((arp.operation(), arp.sender_ip().to_string()), (Operation::REQUEST, "10.0.0.2".into()));
        assert_eq!(d.direction, Direction::Egress);
        let (d, _) = described("in arp reply 10.0.0.9 is-at 52:54:00:00:00:09");
        assert_eq!(Arp::new(&d.frame[14..]).unwrap().operation(), Operation::REPLY);
        let hex: String = d.frame.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(described(&format!("hex:{hex} in")).0, d);
    }

    #[test]
    fn errors_point_at_the_word() {
        let error = |text: &str| parse(text).and_then(|p| p.frame(&vm())).expect_err(text);
        let e = error("tcp 10.0.0.1 > 10.0.0.2:22");
        assert_eq!(e.to_string(), "the source has no port\n  tcp 10.0.0.1 > 10.0.0.2:22\n      ^^^^^^^^");
        assert_eq!(e.fix, "write it as 10.0.0.1:80 or [fd00::1]:80");
        for (text, at, message) in [
            ("tpc 10.0.0.1:1 > 10.0.0.2:22", "tpc", "\"tpc\" is not a protocol"),
            ("tcp 10.0.0.1:1 10.0.0.2:22", "10.0.0.2:22", "\"10.0.0.2:22\" stands where \">\" should be"),
            ("tcp 10.0.0.1:1 > fd00::1", "fd00::1", "the destination has no port"),
            ("tcp 10.0.0.1:1 > [fd00::1]:2", "[fd00::1]:2", "source and destination are of different families"),
            ("tcp 10.0.0.1:1 > 10.0.0.2:70000", "10.0.0.2:70000", "\"70000\" is not a port"),
            ("tcp 10.0.0.1:1 > 10.0.0.2:7 sin", "sin", "\"sin\" has no meaning here"),
            ("udp 10.0.0.1:1 > 10.0.0.2:7 syn", "syn", "\"syn\" has no meaning here"),
            ("icmp 10.0.0.1:1 > 10.0.0.2", "10.0.0.1:1", "this protocol has no ports"),
            ("icmp 10.0.0.1 > 10.0.0.2 type 300", "300", "\"300\" is not a number for the ICMP type"),
            ("icmpv6 10.0.0.1 > 10.0.0.2", "icmpv6", "ICMPv6 does not occur over IPv4"),
            ("in out tcp 10.0.0.1:1 > 10.0.0.2:7", "out", "it cannot go both ways"),
            (
                "tcp 1.2.3.4:1 > 1.2.3.5:7",
                "tcp 1.2.3.4:1 > 1.2.3.5:7",
                "none of the addresses is the VM's, so that its direction is not known",
            ),
            ("tcp 10.0.0.1:1 > 10.0.0.2:7 vlan 4095", "4095", "\"4095\" is not a number for the VLAN"),
            ("hex:0", "hex:0", "these are not bytes in hexadecimal"),
            ("hex:00", "hex:00", "a frame of 1 bytes is not possible"),
            ("", "", "the protocol is missing at the end"),
            ("arp", "", "what ARP says is missing at the end"),
            ("arp who-has 10.0.0.1", "", "\"tell\" is missing at the end"),
            ("tcp é:1 > 10.0.0.1:2", "é:1", "\"é\" is not an IP address"),
        ] {
            let e = error(text);
            assert_eq!((&e.text[e.at.clone()], e.message.as_str()), (at, message), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = parse(&text).and_then(|p| p.frame(&vm()));
        }

        #[test]
        fn no_words_panic(words in proptest::collection::vec(proptest::sample::select(vec![
            "tcp", "udp", "icmp", "icmpv6", "sctp", "gre", "proto", "arp", "who-has", "tell", "is-at", "10.0.0.1", "10.0.0.2:5",
            "[fd00::2]:3", "fd00::2", "[", "]", ":", ">", "in", "out", "vlan", "7", "99999", "smac", "52:54:00:00:00:01", "type",
            "target", "neighbour-solicitation", "len", "1400", "hex:", "syn", "seq",
        ]), 0..12)) {
            if let Ok(d) = parse(&words.join(" ")).and_then(|p| p.frame(&vm())) {
                proptest::prop_assert!(d.frame.len() <= MAX_FRAME_BYTES);
            }
        }
    }
}
