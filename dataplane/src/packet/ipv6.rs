//! IPv6 and its extension headers (RFC 8200).
use core::net::Ipv6Addr;

use super::{Fragment, IpProto, ParseError, chunk};

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 40;
/// Most extension headers followed in one packet; real packets have at most a handful, and each costs a step.
pub const MAX_EXTENSION_HEADERS: usize = 8;
/// Bytes of a fragment header.
const FRAGMENT_BYTES: usize = 8;

/// View of an IPv6 packet, or of as much of it as is at hand (at least the fixed header).
#[derive(Clone, Copy, Debug)]
pub struct Ipv6<'a> {
    header: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Ipv6<'a> {
    /// Views `bytes`, which begin with the IPv6 header. Bytes beyond the payload length (padding) are cut off. A payload
    /// cut short is no error. Jumbograms (RFC 2675) are not supported: their payload length of 0 is taken at its word.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ParseError::Ipv6Truncated)?;
        if header[0] >> 4 != 6 {
            return Err(ParseError::Ipv6Version);
        }
        let payload_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        Ok(Self { header, payload: payload.get(..payload_len).unwrap_or(payload) })
    }

    /// Traffic class: DSCP and ECN.
    #[inline]
    pub fn traffic_class(&self) -> u8 {
        (self.header[0] << 4) | (self.header[1] >> 4)
    }

    /// Flow label, 20 bits.
    #[inline]
    pub fn flow_label(&self) -> u32 {
        u32::from_be_bytes([0, self.header[1] & 0xf, self.header[2], self.header[3]])
    }

    /// Length of everything after the fixed header, bytes, as the header says.
    #[inline]
    pub fn payload_len(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    /// Next header: an extension header or the upper protocol.
    #[inline]
    pub fn next_header(&self) -> IpProto {
        IpProto(self.header[6])
    }

    /// Hop limit.
    #[inline]
    pub fn hop_limit(&self) -> u8 {
        self.header[7]
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> Ipv6Addr {
        self.address::<8>()
    }

    /// Destination address. With a routing header it is the next hop rather than the last.
    #[inline]
    pub fn dst(&self) -> Ipv6Addr {
        self.address::<24>()
    }

    #[inline]
    fn address<const AT: usize>(&self) -> Ipv6Addr {
        // AT is 8 or 24: the sixteen bytes are always there.
        chunk::<16>(self.header, AT).map_or(Ipv6Addr::UNSPECIFIED, |b| Ipv6Addr::from(*b))
    }

    /// What follows the fixed header, up to the payload length or the end of the bytes at hand.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Walks the extension headers. Offsets in the result count from the IPv6 header.
    #[inline]
    pub fn walk(&self) -> Result<Upper, ParseError> {
        let end = usize::from(self.payload_len());
        let mut upper = walk(self.payload, 0, end, self.next_header()).map_err(|e| match e {
            ParseError::NeedMore { bytes } => ParseError::NeedMore { bytes: bytes + HEADER_BYTES as u32 },
            other => other,
        })?;
        upper.offset += HEADER_BYTES as u32;
        if let Some(fragment) = &mut upper.fragment {
            fragment.header_offset += HEADER_BYTES as u32;
        }
        Ok(upper)
    }
}

/// What a fragment header says (RFC 8200, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentHeader {
    /// Where the fragment header begins.
    pub header_offset: u32,
    /// Where this fragment's data belongs, bytes.
    pub data_offset: u32,
    /// M flag.
    pub more: bool,
    /// Identification: common to a packet's fragments.
    pub identification: u32,
}

impl FragmentHeader {
    /// Which kind of fragment this is. A first fragment without a second (an atomic one, RFC 6946) is a whole packet.
    #[inline]
    pub fn kind(&self) -> Fragment {
        match (self.data_offset, self.more) {
            (0, false) => Fragment::None,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        }
    }
}

/// Where a packet's extension headers end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    /// Upper protocol; in a later fragment, the kind of header that the first one continues with.
    pub proto: IpProto,
    /// Where the upper protocol's header (in a later fragment: its data) begins.
    pub offset: u32,
    /// The fragment header, when there is one.
    pub fragment: Option<FragmentHeader>,
    /// A routing header with segments left is there: upper checksums cover another destination than the header's.
    pub rerouted: bool,
}

/// Walks extension headers from `offset` of `bytes` on; the packet reaches to `end`, which may lie beyond `bytes`.
#[inline]
pub(crate) fn walk(bytes: &[u8], offset: usize, end: usize, first: IpProto) -> Result<Upper, ParseError> {
    if first.is_extension() {
        walk_extensions(bytes, offset, end, first)
    } else {
        Ok(Upper { proto: first, offset: offset as u32, fragment: None, rerouted: false })
    }
}

#[inline(never)]
fn walk_extensions(bytes: &[u8], start: usize, end: usize, first: IpProto) -> Result<Upper, ParseError> {
    let mut offset = start;
    let mut proto = first;
    let mut fragment = None;
    let mut rerouted = false;
    for _ in 0..MAX_EXTENSION_HEADERS {
        // The shortest extension header has 8 bytes; the fields needed are within them.
        let after = offset + FRAGMENT_BYTES;
        let Some(h) = chunk::<8>(bytes, offset).filter(|_| after <= end) else {
            return Err(ParseError::short(after, end, ParseError::Ipv6ExtensionTruncated));
        };
        let len = match proto {
            IpProto::HOP_BY_HOP if offset != start => return Err(ParseError::Ipv6ExtensionOrder),
            IpProto::FRAGMENT => {
                if fragment.is_some() {
                    return Err(ParseError::Ipv6ExtensionOrder);
                }
                let field = u16::from_be_bytes([h[2], h[3]]);
                let header = FragmentHeader {
                    header_offset: offset as u32,
                    data_offset: u32::from(field & 0xfff8),
                    more: field & 1 != 0,
                    identification: u32::from_be_bytes([h[4], h[5], h[6], h[7]]),
                };
                fragment = Some(header);
                if header.kind() == Fragment::Later {
                    return Ok(Upper { proto: IpProto(h[0]), offset: after as u32, fragment, rerouted });
                }
                FRAGMENT_BYTES
            }
            // RFC 4302, 2.2: in 4-byte units, minus 2.
            IpProto::AUTHENTICATION => (usize::from(h[1]) + 2) * 4,
            IpProto::ROUTING => {
                rerouted |= h[3] != 0;
                (usize::from(h[1]) + 1) * 8
            }
            _ => (usize::from(h[1]) + 1) * 8,
        };
        offset += len;
        if offset > end {
            return Err(ParseError::Ipv6ExtensionTruncated);
        }
        proto = IpProto(h[0]);
        if !proto.is_extension() {
            return Ok(Upper { proto, offset: offset as u32, fragment, rerouted });
        }
    }
    Err(ParseError::Ipv6TooManyExtensions)
}

/// Changes an IPv6 header in place.
#[derive(Debug)]
pub struct Ipv6Mut<'a>(&'a mut [u8; HEADER_BYTES]);

impl<'a> Ipv6Mut<'a> {
    /// Takes the header at the start of `bytes`.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, ParseError> {
        let header = bytes.first_chunk_mut::<HEADER_BYTES>().ok_or(ParseError::Ipv6Truncated)?;
        if header[0] >> 4 != 6 {
            return Err(ParseError::Ipv6Version);
        }
        Ok(Self(header))
    }

    /// Sets the payload length, bytes.
    #[inline]
    pub fn set_payload_len(&mut self, len: u16) {
        [self.0[4], self.0[5]] = len.to_be_bytes();
    }

    /// Sets the hop limit.
    #[inline]
    pub fn set_hop_limit(&mut self, limit: u8) {
        self.0[7] = limit;
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, addr: Ipv6Addr) {
        if let Some(to) = super::chunk_mut::<16>(self.0, 8) {
            *to = addr.octets();
        }
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, addr: Ipv6Addr) {
        if let Some(to) = super::chunk_mut::<16>(self.0, 24) {
            *to = addr.octets();
        }
    }
}

/// An IPv6 header as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Header {
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// Flow label; its low 20 bits are used.
    pub flow_label: u32,
    /// Length of everything after the header, bytes.
    pub payload_len: u16,
    /// Next header.
    pub next_header: IpProto,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
}

impl From<Ipv6<'_>> for Ipv6Header {
    fn from(view: Ipv6<'_>) -> Self {
        Self {
            traffic_class: view.traffic_class(),
            flow_label: view.flow_label(),
            payload_len: view.payload_len(),
            next_header: view.next_header(),
            hop_limit: view.hop_limit(),
            src: view.src(),
            dst: view.dst(),
        }
    }
}

impl Ipv6Header {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let word = 6 << 28 | u32::from(self.traffic_class) << 20 | self.flow_label & 0xf_ffff;
        [out[0], out[1], out[2], out[3]] = word.to_be_bytes();
        [out[4], out[5]] = self.payload_len.to_be_bytes();
        out[6] = self.next_header.0;
        out[7] = self.hop_limit;
        let mut view = Ipv6Mut(&mut out);
        view.set_src(self.src);
        view.set_dst(self.dst);
        out
    }
}
