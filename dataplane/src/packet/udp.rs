//! UDP (RFC 768).
use super::ParseError;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 8;
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: u16 = 6;

/// View of a UDP datagram, or of as much of it as is at hand (at least the header).
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    header: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Udp<'a> {
    /// Views `bytes`, which begin with the UDP header. A length field below 8 is refused; bytes beyond it are cut off.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ParseError::UdpTruncated)?;
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let payload_len = len.checked_sub(HEADER_BYTES).ok_or(ParseError::UdpLength)?;
        Ok(Self { header, payload: payload.get(..payload_len).unwrap_or(payload) })
    }

    /// Source port; 0 when unused.
    #[inline]
    pub fn src_port(&self) -> u16 {
        u16::from_be_bytes([self.header[0], self.header[1]])
    }

    /// Destination port.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Length of header and payload, bytes, as the header says.
    #[inline]
    pub fn length(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    /// Checksum field; 0 means none (IPv4 only).
    #[inline]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes([self.header[6], self.header[7]])
    }

    /// Payload at hand.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// Changes a UDP header in place. The checksum is the caller's business.
#[derive(Debug)]
pub struct UdpMut<'a>(&'a mut [u8; HEADER_BYTES]);

impl<'a> UdpMut<'a> {
    /// Takes the header at the start of `bytes`.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, ParseError> {
        bytes.first_chunk_mut().map(Self).ok_or(ParseError::UdpTruncated)
    }

    /// Sets the source port.
    #[inline]
    pub fn set_src_port(&mut self, port: u16) {
        [self.0[0], self.0[1]] = port.to_be_bytes();
    }

    /// Sets the destination port.
    #[inline]
    pub fn set_dst_port(&mut self, port: u16) {
        [self.0[2], self.0[3]] = port.to_be_bytes();
    }

    /// Sets the length field, bytes of header and payload.
    #[inline]
    pub fn set_length(&mut self, len: u16) {
        [self.0[4], self.0[5]] = len.to_be_bytes();
    }

    /// Sets the checksum field.
    #[inline]
    pub fn set_checksum(&mut self, checksum: u16) {
        [self.0[6], self.0[7]] = checksum.to_be_bytes();
    }
}

/// A UDP header as a value; the checksum is written as 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Length of header and payload, bytes.
    pub length: u16,
}

impl From<Udp<'_>> for UdpHeader {
    fn from(view: Udp<'_>) -> Self {
        Self { src_port: view.src_port(), dst_port: view.dst_port(), length: view.length() }
    }
}

impl UdpHeader {
    /// The header's bytes, checksum 0.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut view = UdpMut(&mut out);
        view.set_src_port(self.src_port);
        view.set_dst_port(self.dst_port);
        view.set_length(self.length);
        out
    }
}
