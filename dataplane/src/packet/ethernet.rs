//! Ethernet II (IEEE 802.3): addresses, EtherTypes, header view.
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ParseError;

/// Bytes of an untagged Ethernet header.
pub const HEADER_BYTES: usize = 14;

/// A 48-bit MAC address, kept in the low 48 bits of a `u64` (first octet most significant), so that
/// comparing and hashing are single operations.
///
/// Written and read as `aa:bb:cc:dd:ee:ff` (also `aa-bb-...`); serialised so in human-readable formats, as six bytes in others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct MacAddr(u64);

impl MacAddr {
    /// 00:00:00:00:00:00.
    pub const ZERO: Self = Self(0);
    /// ff:ff:ff:ff:ff:ff.
    pub const BROADCAST: Self = Self(0xffff_ffff_ffff);

    /// From the octets in the order of transmission.
    #[inline(always)]
    pub const fn new(octets: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = octets;
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// From the low 48 bits of `value`; the others are ignored.
    #[inline(always)]
    pub const fn from_u64(value: u64) -> Self {
        Self(value & 0xffff_ffff_ffff)
    }

    /// The address as a number below 2^48.
    #[inline(always)]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The octets in the order of transmission.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// Group bit set: multicast or broadcast.
    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        self.0 & (1 << 40) != 0
    }

    /// ff:ff:ff:ff:ff:ff.
    #[inline(always)]
    pub const fn is_broadcast(self) -> bool {
        self.0 == Self::BROADCAST.0
    }

    /// All octets zero.
    #[inline(always)]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Locally administered (U/L bit).
    #[inline(always)]
    pub const fn is_local(self) -> bool {
        self.0 & (2 << 40) != 0
    }

    /// 01-80-C2-00-00-00 to -0F: reserved for the link, not forwarded by bridges (IEEE 802.1Q, 8.6.3).
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        self.0 & !0xf == 0x0180_c200_0000
    }

    /// May stand as a source address: neither zero nor a group address.
    #[inline(always)]
    pub const fn is_valid_source(self) -> bool {
        self.0 != 0 && !self.is_multicast()
    }
}

impl From<[u8; 6]> for MacAddr {
    fn from(octets: [u8; 6]) -> Self {
        Self::new(octets)
    }
}

impl From<MacAddr> for [u8; 6] {
    fn from(mac: MacAddr) -> Self {
        mac.octets()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.octets();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address: expected six two-digit hexadecimal octets separated by ':' or '-'")]
pub struct MacAddrSyntax;

impl FromStr for MacAddr {
    type Err = MacAddrSyntax;

    fn from_str(text: &str) -> Result<Self, MacAddrSyntax> {
        let separator = if text.contains(':') { ':' } else { '-' };
        let mut octets = [0u8; 6];
        let mut parts = text.split(separator);
        for octet in &mut octets {
            let part = parts.next().ok_or(MacAddrSyntax)?;
            // from_str_radix would accept a sign.
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(MacAddrSyntax);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| MacAddrSyntax)?;
        }
        if parts.next().is_some() { Err(MacAddrSyntax) } else { Ok(Self::new(octets)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.octets().serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = MacAddr;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a MAC address such as 52:54:00:12:34:56")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<MacAddr, E> {
                text.parse().map_err(|e| E::custom(format_args!("\"{text}\" is {e}")))
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(Text)
        } else {
            <[u8; 6]>::deserialize(deserializer).map(Self::new)
        }
    }
}

/// An EtherType, or, below 0x0600, the length field of an IEEE 802.3 frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4 (RFC 894).
    pub const IPV4: Self = Self(0x0800);
    /// ARP (RFC 826).
    pub const ARP: Self = Self(0x0806);
    /// Reverse ARP (RFC 903); QEMU announces migrated guests with it.
    pub const RARP: Self = Self(0x8035);
    /// IPv6 (RFC 2464).
    pub const IPV6: Self = Self(0x86dd);
    /// Customer VLAN tag (IEEE 802.1Q).
    pub const VLAN: Self = Self(0x8100);
    /// Service VLAN tag (IEEE 802.1ad).
    pub const SVLAN: Self = Self(0x88a8);
    /// LLDP (IEEE 802.1AB).
    pub const LLDP: Self = Self(0x88cc);

    /// Below 0x0600 the field is a length and an LLC header follows (IEEE 802.3, 3.2.6).
    #[inline(always)]
    pub const fn is_length(self) -> bool {
        self.0 < 0x0600
    }
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:04x}", self.0)
    }
}

impl fmt::Debug for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// View of an Ethernet header. Tags, if any, are part of [`Self::payload`].
#[derive(Clone, Copy, Debug)]
pub struct Ethernet<'a> {
    header: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// Views `bytes` as a frame. Fails below 14 bytes.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk().ok_or(ParseError::FrameTooShort)?;
        Ok(Self { header, payload })
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self) -> MacAddr {
        let h = self.header;
        MacAddr::new([h[0], h[1], h[2], h[3], h[4], h[5]])
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> MacAddr {
        let h = self.header;
        MacAddr::new([h[6], h[7], h[8], h[9], h[10], h[11]])
    }

    /// The field at offset 12: EtherType, TPID of the outermost tag, or length.
    #[inline]
    pub fn ethertype(&self) -> EtherType {
        EtherType(u16::from_be_bytes([self.header[12], self.header[13]]))
    }

    /// Everything after the 14 bytes.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// Changes an Ethernet header in place.
#[derive(Debug)]
pub struct EthernetMut<'a>(&'a mut [u8; HEADER_BYTES]);

impl<'a> EthernetMut<'a> {
    /// Fails below 14 bytes.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, ParseError> {
        bytes.first_chunk_mut().map(Self).ok_or(ParseError::FrameTooShort)
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, mac: MacAddr) {
        [self.0[0], self.0[1], self.0[2], self.0[3], self.0[4], self.0[5]] = mac.octets();
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, mac: MacAddr) {
        [self.0[6], self.0[7], self.0[8], self.0[9], self.0[10], self.0[11]] = mac.octets();
    }

    /// Sets the field at offset 12.
    #[inline]
    pub fn set_ethertype(&mut self, ethertype: EtherType) {
        [self.0[12], self.0[13]] = ethertype.0.to_be_bytes();
    }
}

/// An Ethernet header as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetHeader {
    /// Destination address.
    pub dst: MacAddr,
    /// Source address.
    pub src: MacAddr,
    /// EtherType.
    pub ethertype: EtherType,
}

impl From<Ethernet<'_>> for EthernetHeader {
    fn from(view: Ethernet<'_>) -> Self {
        Self { dst: view.dst(), src: view.src(), ethertype: view.ethertype() }
    }
}

impl EthernetHeader {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut view = EthernetMut(&mut out);
        view.set_dst(self.dst);
        view.set_src(self.src);
        view.set_ethertype(self.ethertype);
        out
    }
}
