//! IPv4 (RFC 791).
use core::net::Ipv4Addr;

use super::{IpProto, ParseError};
use crate::offload::checksum::{Sum, internet_checksum};

/// Bytes of a header without options.
pub const HEADER_BYTES: usize = 20;
/// "More fragments", in the flags-and-offset field.
pub(crate) const MORE_FRAGMENTS: u16 = 0x2000;
/// "Don't fragment", in the flags-and-offset field.
const DONT_FRAGMENT: u16 = 0x4000;

/// View of an IPv4 packet, or of as much of it as is at hand (at least the whole header).
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<'a> {
    header: &'a [u8; HEADER_BYTES],
    options: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Views `bytes`, which begin with the IPv4 header. Checks version, header length and total length against
    /// each other; bytes beyond the total length (padding) are cut off. A payload cut short is no error.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ParseError::Ipv4Truncated)?;
        if header[0] >> 4 != 4 {
            return Err(ParseError::Ipv4Version);
        }
        let header_len = usize::from(header[0] & 0xf) * 4;
        let options_len = header_len.checked_sub(HEADER_BYTES).ok_or(ParseError::Ipv4HeaderLength)?;
        let (options, payload) = rest.split_at_checked(options_len).ok_or(ParseError::Ipv4Truncated)?;
        let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let payload_len = total_len.checked_sub(header_len).ok_or(ParseError::Ipv4TotalLength)?;
        Ok(Self { header, options, payload: payload.get(..payload_len).unwrap_or(payload) })
    }

    /// Header length with options, bytes: 20 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        HEADER_BYTES + self.options.len()
    }

    /// DSCP and ECN.
    #[inline]
    pub fn traffic_class(&self) -> u8 {
        self.header[1]
    }

    /// Length of header and payload, bytes, as the header says.
    #[inline]
    pub fn total_len(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Identification: common to a packet's fragments.
    #[inline]
    pub fn identification(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    #[inline]
    fn flags_and_offset(&self) -> u16 {
        u16::from_be_bytes([self.header[6], self.header[7]])
    }

    /// DF.
    #[inline]
    pub fn dont_fragment(&self) -> bool {
        self.flags_and_offset() & DONT_FRAGMENT != 0
    }

    /// MF.
    #[inline]
    pub fn more_fragments(&self) -> bool {
        self.flags_and_offset() & MORE_FRAGMENTS != 0
    }

    /// Where this fragment's payload belongs, bytes.
    #[inline]
    pub fn fragment_offset(&self) -> u32 {
        u32::from(self.flags_and_offset() & 0x1fff) * 8
    }

    /// A piece of a packet rather than a whole one.
    #[inline]
    pub fn is_fragment(&self) -> bool {
        self.flags_and_offset() & (MORE_FRAGMENTS | 0x1fff) != 0
    }

    /// Time to live.
    #[inline]
    pub fn ttl(&self) -> u8 {
        self.header[8]
    }

    /// Upper protocol.
    #[inline]
    pub fn proto(&self) -> IpProto {
        IpProto(self.header[9])
    }

    /// Header checksum field.
    #[inline]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes([self.header[10], self.header[11]])
    }

    /// The header checksum is right (options included).
    #[inline]
    pub fn checksum_ok(&self) -> bool {
        let mut sum = Sum::new();
        sum.add_bytes(self.header);
        sum.add_bytes(self.options);
        sum.is_valid()
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.header[12], self.header[13], self.header[14], self.header[15])
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.header[16], self.header[17], self.header[18], self.header[19])
    }

    /// The options' raw bytes, 0 to 40.
    #[inline]
    pub fn options(&self) -> &'a [u8] {
        self.options
    }

    /// The options one by one, without padding.
    #[inline]
    pub fn options_iter(&self) -> Options<'a> {
        Options(self.options)
    }

    /// What follows the header, up to the total length or the end of the bytes at hand.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// One IPv4 option (RFC 791, 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Option<'a> {
    /// Type octet: copied flag, class and number.
    pub kind: u8,
    /// Data after the length octet.
    pub data: &'a [u8],
}

impl Ipv4Option<'_> {
    /// Loose source and record route: usually refused by firewalls.
    pub const LOOSE_SOURCE_ROUTE: u8 = 131;
    /// Strict source and record route.
    pub const STRICT_SOURCE_ROUTE: u8 = 137;
    /// Router alert (RFC 2113).
    pub const ROUTER_ALERT: u8 = 148;
}

/// Iterator over IPv4 options. Ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = Result<Ipv4Option<'a>, ParseError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (&kind, rest) = self.0.split_first()?;
            match kind {
                0 => return None,
                1 => self.0 = rest,
                _ => {
                    let parsed = rest.split_first().and_then(|(&len, rest)| {
                        // The length counts the type and length octets as well.
                        rest.split_at_checked(usize::from(len).checked_sub(2)?)
                    });
                    let Some((data, rest)) = parsed else {
                        self.0 = &[];
                        return Some(Err(ParseError::Ipv4Option));
                    };
                    self.0 = rest;
                    return Some(Ok(Ipv4Option { kind, data }));
                }
            }
        }
    }
}

/// Changes an IPv4 header in place. The checksum is only brought up to date by [`Self::fill_checksum`].
#[derive(Debug)]
pub struct Ipv4Mut<'a> {
    header: &'a mut [u8; HEADER_BYTES],
    options: &'a mut [u8],
}

impl<'a> Ipv4Mut<'a> {
    /// Takes the header at the start of `bytes`. Fails like [`Ipv4::new`], except that the total length is not looked at.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, ParseError> {
        let (header, rest) = bytes.split_first_chunk_mut::<HEADER_BYTES>().ok_or(ParseError::Ipv4Truncated)?;
        if header[0] >> 4 != 4 {
            return Err(ParseError::Ipv4Version);
        }
        let header_len = usize::from(header[0] & 0xf) * 4;
        let options_len = header_len.checked_sub(HEADER_BYTES).ok_or(ParseError::Ipv4HeaderLength)?;
        let options = rest.get_mut(..options_len).ok_or(ParseError::Ipv4Truncated)?;
        Ok(Self { header, options })
    }

    /// Sets the total length, bytes.
    #[inline]
    pub fn set_total_len(&mut self, len: u16) {
        [self.header[2], self.header[3]] = len.to_be_bytes();
    }

    /// Sets the identification.
    #[inline]
    pub fn set_identification(&mut self, id: u16) {
        [self.header[4], self.header[5]] = id.to_be_bytes();
    }

    /// Sets the time to live.
    #[inline]
    pub fn set_ttl(&mut self, ttl: u8) {
        self.header[8] = ttl;
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, addr: Ipv4Addr) {
        [self.header[12], self.header[13], self.header[14], self.header[15]] = addr.octets();
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, addr: Ipv4Addr) {
        [self.header[16], self.header[17], self.header[18], self.header[19]] = addr.octets();
    }

    /// Computes the header checksum and stores it.
    #[inline]
    pub fn fill_checksum(&mut self) {
        [self.header[10], self.header[11]] = [0, 0];
        let mut sum = Sum::new();
        sum.add_bytes(self.header);
        sum.add_bytes(self.options);
        [self.header[10], self.header[11]] = sum.finish().to_be_bytes();
    }
}

/// An IPv4 header without options as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Header {
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// Length of header and payload, bytes.
    pub total_len: u16,
    /// Identification.
    pub identification: u16,
    /// DF.
    pub dont_fragment: bool,
    /// MF.
    pub more_fragments: bool,
    /// Fragment offset, bytes; rounded down to a multiple of 8.
    pub fragment_offset: u16,
    /// Time to live.
    pub ttl: u8,
    /// Upper protocol.
    pub proto: IpProto,
    /// Source address.
    pub src: Ipv4Addr,
    /// Destination address.
    pub dst: Ipv4Addr,
}

impl From<Ipv4<'_>> for Ipv4Header {
    /// Options are not taken over.
    fn from(view: Ipv4<'_>) -> Self {
        Self {
            traffic_class: view.traffic_class(),
            total_len: view.total_len(),
            identification: view.identification(),
            dont_fragment: view.dont_fragment(),
            more_fragments: view.more_fragments(),
            fragment_offset: view.fragment_offset() as u16,
            ttl: view.ttl(),
            proto: view.proto(),
            src: view.src(),
            dst: view.dst(),
        }
    }
}

impl Ipv4Header {
    /// The header's bytes, with its checksum.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0] = 0x45;
        out[1] = self.traffic_class;
        [out[2], out[3]] = self.total_len.to_be_bytes();
        [out[4], out[5]] = self.identification.to_be_bytes();
        let mut flags = self.fragment_offset / 8;
        flags |= if self.dont_fragment { DONT_FRAGMENT } else { 0 };
        flags |= if self.more_fragments { MORE_FRAGMENTS } else { 0 };
        [out[6], out[7]] = flags.to_be_bytes();
        out[8] = self.ttl;
        out[9] = self.proto.0;
        [out[12], out[13], out[14], out[15]] = self.src.octets();
        [out[16], out[17], out[18], out[19]] = self.dst.octets();
        [out[10], out[11]] = internet_checksum(&out).to_be_bytes();
        out
    }
}
