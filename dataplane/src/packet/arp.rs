//! ARP and RARP for IPv4 over Ethernet (RFC 826, RFC 903).
use core::net::Ipv4Addr;

use super::{MacAddr, ParseError};

/// Bytes of an ARP packet for IPv4 over Ethernet.
pub const PACKET_BYTES: usize = 28;
/// Hardware type 1, protocol 0x0800, address lengths 6 and 4: the only form handled.
const FORMAT: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// Operation field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Operation(pub u16);

impl Operation {
    /// ARP request.
    pub const REQUEST: Self = Self(1);
    /// ARP reply.
    pub const REPLY: Self = Self(2);
    /// RARP request ("reverse").
    pub const REVERSE_REQUEST: Self = Self(3);
    /// RARP reply.
    pub const REVERSE_REPLY: Self = Self(4);
}

/// View of an ARP packet.
#[derive(Clone, Copy, Debug)]
pub struct Arp<'a>(&'a [u8; PACKET_BYTES]);

impl<'a> Arp<'a> {
    /// Views `bytes`, which begin after the Ethernet header. Fails when shorter than 28 bytes or of another format.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let packet = bytes.first_chunk::<PACKET_BYTES>().ok_or(ParseError::ArpTruncated)?;
        if [packet[0], packet[1], packet[2], packet[3], packet[4], packet[5]] != FORMAT {
            return Err(ParseError::ArpFormat);
        }
        Ok(Self(packet))
    }

    /// Operation.
    #[inline]
    pub fn operation(&self) -> Operation {
        Operation(u16::from_be_bytes([self.0[6], self.0[7]]))
    }

    /// Sender hardware address.
    #[inline]
    pub fn sender_mac(&self) -> MacAddr {
        MacAddr::new([self.0[8], self.0[9], self.0[10], self.0[11], self.0[12], self.0[13]])
    }

    /// Sender protocol address.
    #[inline]
    pub fn sender_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.0[14], self.0[15], self.0[16], self.0[17])
    }

    /// Target hardware address.
    #[inline]
    pub fn target_mac(&self) -> MacAddr {
        MacAddr::new([self.0[18], self.0[19], self.0[20], self.0[21], self.0[22], self.0[23]])
    }

    /// Target protocol address.
    #[inline]
    pub fn target_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.0[24], self.0[25], self.0[26], self.0[27])
    }

    /// Announcement or probe of one's own address (sender and target protocol address equal; RFC 5227).
    #[inline]
    pub fn is_gratuitous(&self) -> bool {
        self.sender_ip() == self.target_ip()
    }
}

/// An ARP packet as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArpPacket {
    /// Operation.
    pub operation: Operation,
    /// Sender hardware address.
    pub sender_mac: MacAddr,
    /// Sender protocol address.
    pub sender_ip: Ipv4Addr,
    /// Target hardware address.
    pub target_mac: MacAddr,
    /// Target protocol address.
    pub target_ip: Ipv4Addr,
}

impl From<Arp<'_>> for ArpPacket {
    fn from(view: Arp<'_>) -> Self {
        Self {
            operation: view.operation(),
            sender_mac: view.sender_mac(),
            sender_ip: view.sender_ip(),
            target_mac: view.target_mac(),
            target_ip: view.target_ip(),
        }
    }
}

impl ArpPacket {
    /// The packet's bytes, to follow an Ethernet header.
    pub fn to_bytes(&self) -> [u8; PACKET_BYTES] {
        let mut out = [0; PACKET_BYTES];
        let fields: [&[u8]; 6] = [
            &FORMAT,
            &self.operation.0.to_be_bytes(),
            &self.sender_mac.octets(),
            &self.sender_ip.octets(),
            &self.target_mac.octets(),
            &self.target_ip.octets(),
        ];
        for (to, from) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        out
    }
}
