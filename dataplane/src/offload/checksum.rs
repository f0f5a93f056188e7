//! The internet checksum (RFC 1071), its incremental update (RFC 1624), pseudo-headers, and CRC32c for SCTP (RFC 9260).
use core::net::{Ipv4Addr, Ipv6Addr};

use super::sum;
pub(crate) use super::sum::fold;
use crate::frame::Body;
use crate::packet::ipv4::Ipv4;
use crate::packet::ipv6::Ipv6;
use crate::packet::{Fragment, Headers, IpProto, L3, chunk, icmp, sctp, tcp, udp};

/// A running one's complement sum over pieces of any length, odd ones included.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Native-endian 16-bit words, carries collected above.
    total: u64,
    /// An odd number of bytes so far: the next byte is the second of a word.
    odd: bool,
}

impl Sum {
    /// Nothing summed yet.
    #[inline]
    pub const fn new() -> Self {
        Self { total: 0, odd: false }
    }

    /// Adds one piece's folded sum. Byte order does not matter to the sum but for a final swap (RFC 1071, 2 (B)):
    /// so a piece that begins at an odd place is summed as if it did not, and swapped.
    #[inline(always)]
    fn add_piece(&mut self, sum: u16, len: usize) {
        self.total += u64::from(if self.odd { sum.swap_bytes() } else { sum });
        self.odd ^= len & 1 != 0;
    }

    /// Adds bytes.
    #[inline]
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.add_piece(sum::slice(bytes), bytes.len());
    }

    /// Adds frame bytes in port memory.
    #[inline]
    pub fn add_body(&mut self, body: &Body<'_>) {
        sum::pieces(body, |sum, len| self.add_piece(sum, len as usize));
    }

    /// Adds frame bytes in port memory of which the first is the second of a word, whatever was added before.
    #[inline]
    pub(crate) fn add_body_at_odd(&mut self, body: &Body<'_>) {
        self.odd = true;
        self.add_body(body);
    }

    /// Adds a 16-bit field's value.
    #[inline]
    pub fn add_u16(&mut self, value: u16) {
        self.add_piece(value.to_be(), 2);
    }

    /// Adds a 32-bit field's value.
    #[inline]
    pub fn add_u32(&mut self, value: u32) {
        self.add_u16((value >> 16) as u16);
        self.add_u16(value as u16);
    }

    /// The sum itself, not complemented: what virtio and NICs expect in the checksum field of a frame to be finished.
    #[inline]
    pub fn partial(&self) -> u16 {
        u16::from_be(sum::fold(self.total))
    }

    /// The checksum to be stored: the complement.
    #[inline]
    pub fn finish(&self) -> u16 {
        !self.partial()
    }

    /// The bytes summed contain their own right checksum.
    #[inline]
    pub fn is_valid(&self) -> bool {
        self.partial() == 0xffff
    }
}

/// The internet checksum of `bytes` (in which the checksum field is 0).
#[inline]
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = Sum::new();
    sum.add_bytes(bytes);
    sum.finish()
}

/// The checksum after a 16-bit field changed from `old` to `new` (RFC 1624, equation 3). A UDP checksum of 0 ("none")
/// must not be updated, and a result of 0 is to be stored as 0xffff there.
#[inline]
pub fn update_u16(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = u32::from(!checksum) + u32::from(!old) + u32::from(new);
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// [`update_u16`] for a 32-bit field, such as an IPv4 address.
#[inline]
pub fn update_u32(checksum: u16, old: u32, new: u32) -> u16 {
    let checksum = update_u16(checksum, (old >> 16) as u16, (new >> 16) as u16);
    update_u16(checksum, old as u16, new as u16)
}

/// [`update_u16`] for an IPv6 address.
#[inline]
pub fn update_ipv6(checksum: u16, old: Ipv6Addr, new: Ipv6Addr) -> u16 {
    old.segments().iter().zip(new.segments()).fold(checksum, |c, (&old, new)| update_u16(c, old, new))
}

/// Sum of the IPv4 pseudo-header (RFC 9293, 3.1; RFC 768). `len`: bytes of transport header and payload.
#[inline]
pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, proto: IpProto, len: u32) -> Sum {
    let mut sum = Sum::new();
    sum.add_u32(src.to_bits());
    sum.add_u32(dst.to_bits());
    sum.add_u16(u16::from(proto.0));
    sum.add_u32(len);
    sum
}

/// Sum of the IPv6 pseudo-header (RFC 8200, 8.1). `len`: bytes of transport header and payload; `dst`: the last destination.
#[inline]
pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, proto: IpProto, len: u32) -> Sum {
    let mut sum = Sum::new();
    sum.add_bytes(&src.octets());
    sum.add_bytes(&dst.octets());
    sum.add_u32(len);
    sum.add_u16(u16::from(proto.0));
    sum
}

/// What [`verify_l4`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The checksum is right.
    Valid,
    /// The checksum is wrong.
    Invalid,
    /// There is none to check: UDP over IPv4 with checksum 0, a protocol that is not looked into, a fragment, no IP; or it cannot
    /// be checked: an IPv6 routing header hides the last destination, `head` is too short.
    Unchecked,
}

/// Verifies the transport checksum (TCP, UDP, ICMP, ICMPv6, SCTP) of the frame that consists of `head` and `body`, whose
/// headers were parsed from `head`. Frames whose checksum is still owed (`Offload::needs_csum`) are not for this.
pub fn verify_l4(headers: &Headers, head: &[u8], body: &Body<'_>) -> Verdict {
    verify(headers, head, body).unwrap_or(Verdict::Unchecked)
}

fn verify(headers: &Headers, head: &[u8], body: &Body<'_>) -> Option<Verdict> {
    let l4 = headers.l4.filter(|_| headers.fragment == Fragment::None)?;
    let start = u32::from(l4.offset);
    let len = headers.l3_end().checked_sub(start)?;
    let mut sum = match (headers.l3, l4.proto) {
        (_, IpProto::SCTP) => return verify_sctp(head, body, start, len),
        (L3::Ipv4 { .. }, IpProto::ICMP) => Sum::new(),
        (L3::Ipv4 { offset }, IpProto::TCP | IpProto::UDP) => {
            let ip = Ipv4::new(head.get(usize::from(offset)..)?).ok()?;
            pseudo_v4(ip.src(), ip.dst(), l4.proto, len)
        }
        (L3::Ipv6 { offset }, IpProto::TCP | IpProto::UDP | IpProto::ICMPV6) => {
            let ip = Ipv6::new(head.get(usize::from(offset)..)?).ok()?;
            if ip.walk().ok()?.rerouted {
                return None;
            }
            pseudo_v6(ip.src(), ip.dst(), l4.proto, len)
        }
        _ => return None,
    };
    if l4.proto == IpProto::UDP && chunk(head, start as usize + usize::from(udp::CHECKSUM_OFFSET))? == &[0, 0] {
        // RFC 768: none. RFC 8200, 8.1: not allowed over IPv6.
        return Some(if matches!(headers.l3, L3::Ipv6 { .. }) { Verdict::Invalid } else { Verdict::Unchecked });
    }
    // What of the transport packet lies in head, and what in body; padding in neither.
    let in_head = head.get(start as usize..)?;
    let in_head = in_head.get(..len as usize).unwrap_or(in_head);
    sum.add_bytes(in_head);
    sum.add_body(&body.slice(0, len - in_head.len() as u32));
    Some(if sum.is_valid() { Verdict::Valid } else { Verdict::Invalid })
}

fn verify_sctp(head: &[u8], body: &Body<'_>, start: u32, len: u32) -> Option<Verdict> {
    let in_head = head.get(start as usize..)?;
    let in_head = in_head.get(..len as usize).unwrap_or(in_head);
    let (before, rest) = in_head.split_at_checked(usize::from(sctp::CHECKSUM_OFFSET))?;
    let (stored, after) = rest.split_first_chunk::<4>()?;
    let mut crc = Crc32c::new();
    crc.add_bytes(before);
    crc.add_bytes(&[0; 4]);
    crc.add_bytes(after);
    crc.add_body(&body.slice(0, len - in_head.len() as u32));
    Some(if crc.finish().to_le_bytes() == *stored { Verdict::Valid } else { Verdict::Invalid })
}

/// Where the checksum of `proto` lies, bytes from its header's start; `None` for protocols without a 16-bit internet checksum.
#[inline]
pub const fn checksum_offset(proto: IpProto) -> Option<u16> {
    match proto {
        IpProto::TCP => Some(tcp::CHECKSUM_OFFSET),
        IpProto::UDP => Some(udp::CHECKSUM_OFFSET),
        IpProto::ICMP | IpProto::ICMPV6 => Some(icmp::CHECKSUM_OFFSET),
        _ => None,
    }
}

/// A running CRC32c (Castagnoli), as SCTP uses it. In the packet it is stored least significant byte first.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(u32);

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

impl Crc32c {
    /// Nothing summed yet.
    #[inline]
    pub const fn new() -> Self {
        Self(!0)
    }

    /// Adds bytes.
    #[inline]
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.0 = sum::crc32c_slice(self.0, bytes);
    }

    /// Adds frame bytes in port memory.
    #[inline]
    pub fn add_body(&mut self, body: &Body<'_>) {
        self.0 = sum::crc32c_body(self.0, body);
    }

    /// The CRC.
    #[inline]
    pub fn finish(&self) -> u32 {
        !self.0
    }
}

/// CRC32c of `bytes`.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = Crc32c::new();
    crc.add_bytes(bytes);
    crc.finish()
}
