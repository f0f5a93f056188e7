//! Who talks to whom, from the VM's point of view.
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packet::IpProto;

/// Which way a packet travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Toward {
    /// To the VM.
    Ingress,
    /// From the VM.
    Egress,
}

impl Toward {
    /// The other way.
    #[inline]
    pub const fn reverse(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }
}

/// A packet's direction within its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// As the packet that opened the connection.
    Original,
    /// The opposite.
    Reply,
}

impl Way {
    #[inline]
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Original => 0,
            Self::Reply => 1,
        }
    }

    #[inline]
    pub(super) const fn reverse(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }
}

pub(super) const V6: u8 = 1;
const REMOTE_ASKED: u8 = 2;

/// A connection's identity, the same for both directions. 40 bytes without padding.
///
/// `local` is the VM's side. For ICMP questions and answers `local_port` is the identifier, `remote_port` the *question's* type
/// and the code, and who asked is part of the identity: pings both ways with one identifier are two connections. For GRE version 1
/// (PPTP, RFC 2637) the port of the packet's destination is the call identifier and the other 0. Other protocols have ports 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Key {
    local: [u8; 16],
    remote: [u8; 16],
    /// The VM's port.
    pub local_port: u16,
    /// The other side's port.
    pub remote_port: u16,
    /// VLAN identifier of the frames as the VM sees them; 0 untagged.
    pub zone: u16,
    /// Protocol.
    proto: u8,
    flags: u8,
}

const _: () = assert!(size_of::<Key>() == 40);

#[inline]
fn octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

impl Key {
    /// The key of a packet that travels `toward` with the given source and destination.
    #[inline]
    pub fn new(toward: Toward, zone: u16, proto: IpProto, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        let (local, remote) = match toward {
            Toward::Ingress => (dst, src),
            Toward::Egress => (src, dst),
        };
        Self {
            local: octets(local.0),
            remote: octets(remote.0),
            local_port: local.1,
            remote_port: remote.1,
            zone,
            proto: proto.0,
            flags: if local.0.is_ipv6() { V6 } else { 0 },
        }
    }

    /// Makes it the key of an ICMP question or answer: `question` is the question's type.
    #[inline]
    pub(super) fn with_icmp(mut self, id: u16, question: u8, code: u8, asked_by_remote: bool) -> Self {
        self.local_port = id;
        self.remote_port = u16::from_be_bytes([question, code]);
        if asked_by_remote {
            self.flags |= REMOTE_ASKED;
        }
        self
    }

    #[inline]
    fn address(&self, octets: [u8; 16]) -> IpAddr {
        if self.is_ipv6() {
            IpAddr::V6(Ipv6Addr::from(octets))
        } else {
            let [.., a, b, c, d] = octets;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
    }

    /// The VM's address.
    #[inline]
    pub fn local(&self) -> IpAddr {
        self.address(self.local)
    }

    /// The other side's address.
    #[inline]
    pub fn remote(&self) -> IpAddr {
        self.address(self.remote)
    }

    /// Upper protocol.
    #[inline]
    pub fn proto(&self) -> IpProto {
        IpProto(self.proto)
    }

    /// IPv6 rather than IPv4.
    #[inline]
    pub fn is_ipv6(&self) -> bool {
        self.flags & V6 != 0
    }

    /// For an ICMP question or answer: identifier, the question's type, code.
    #[inline]
    pub fn icmp(&self) -> (u16, u8, u8) {
        let [kind, code] = self.remote_port.to_be_bytes();
        (self.local_port, kind, code)
    }

    /// ICMP question and answer, and the other side asked.
    #[inline]
    pub fn asked_by_remote(&self) -> bool {
        self.flags & REMOTE_ASKED != 0
    }

    /// The key that has these [`Self::words`].
    #[inline]
    pub(super) fn from_words(words: [u64; 5]) -> Self {
        let [a, b, c, d, rest] = words;
        let address = |low: u64, high: u64| (u128::from(low) | u128::from(high) << 64).to_le_bytes();
        Self {
            local: address(a.to_le(), b.to_le()),
            remote: address(c.to_le(), d.to_le()),
            local_port: rest as u16,
            remote_port: (rest >> 16) as u16,
            zone: (rest >> 32) as u16,
            proto: (rest >> 48) as u8,
            flags: (rest >> 56) as u8,
        }
    }

    /// The key's 40 bytes as words, for hashing.
    #[inline]
    pub fn words(&self) -> [u64; 5] {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.local;
        let [q, r, s, t, u, v, w, x, y, z, aa, ab, ac, ad, ae, af] = self.remote;
        [
            u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
            u64::from_ne_bytes([q, r, s, t, u, v, w, x]),
            u64::from_ne_bytes([y, z, aa, ab, ac, ad, ae, af]),
            u64::from(self.local_port)
                | u64::from(self.remote_port) << 16
                | u64::from(self.zone) << 32
                | u64::from(self.proto) << 48
                | u64::from(self.flags) << 56,
        ]
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{{{} {}:{} <> {}:{} zone {} flags {}}}",
            self.proto,
            self.local(),
            self.local_port,
            self.remote(),
            self.remote_port,
            self.zone,
            self.flags
        )
    }
}

/// What a policy needs to know of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Addresses, protocol and ports. In ICMP errors and untracked packets the ports are 0.
    pub key: Key,
    /// The packet's direction.
    pub toward: Toward,
    /// Type and code of an ICMP or ICMPv6 message.
    pub icmp: Option<(u8, u8)>,
}

impl Flow {
    /// Source address.
    #[inline]
    pub fn src(&self) -> IpAddr {
        match self.toward {
            Toward::Ingress => self.key.remote(),
            Toward::Egress => self.key.local(),
        }
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self) -> IpAddr {
        match self.toward {
            Toward::Ingress => self.key.local(),
            Toward::Egress => self.key.remote(),
        }
    }

    /// Source port; meaningless for protocols without ports.
    #[inline]
    pub fn src_port(&self) -> u16 {
        match self.toward {
            Toward::Ingress => self.key.remote_port,
            Toward::Egress => self.key.local_port,
        }
    }

    /// Destination port; meaningless for protocols without ports.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        match self.toward {
            Toward::Ingress => self.key.local_port,
            Toward::Egress => self.key.remote_port,
        }
    }
}
