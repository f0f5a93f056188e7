//! SCTP (RFC 9260): common header and chunks.
use super::ParseError;

/// Bytes of the common header.
pub const HEADER_BYTES: usize = 12;
/// Where the CRC32c lies in the header.
pub const CHECKSUM_OFFSET: u16 = 8;

/// View of an SCTP packet, or of as much of it as is at hand (at least the common header).
#[derive(Clone, Copy, Debug)]
pub struct Sctp<'a> {
    header: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Sctp<'a> {
    /// Views `bytes`, which begin with the common header.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk().ok_or(ParseError::SctpTruncated)?;
        Ok(Self { header, payload })
    }

    /// Source port.
    #[inline]
    pub fn src_port(&self) -> u16 {
        u16::from_be_bytes([self.header[0], self.header[1]])
    }

    /// Destination port.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Verification tag.
    #[inline]
    pub fn verification_tag(&self) -> u32 {
        u32::from_be_bytes([self.header[4], self.header[5], self.header[6], self.header[7]])
    }

    /// The CRC32c field as a number (it is sent least significant byte first: RFC 9260, appendix A).
    #[inline]
    pub fn checksum(&self) -> u32 {
        u32::from_le_bytes([self.header[8], self.header[9], self.header[10], self.header[11]])
    }

    /// The chunks at hand.
    #[inline]
    pub fn chunks(&self) -> Chunks<'a> {
        Chunks(self.payload)
    }
}

/// One SCTP chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// Chunk type.
    pub kind: ChunkType,
    /// Chunk flags.
    pub flags: u8,
    /// Chunk value, without padding.
    pub value: &'a [u8],
}

/// Chunk type (RFC 9260, 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ChunkType(pub u8);

impl ChunkType {
    /// Payload data.
    pub const DATA: Self = Self(0);
    /// Initiation.
    pub const INIT: Self = Self(1);
    /// Initiation acknowledgement.
    pub const INIT_ACK: Self = Self(2);
    /// Selective acknowledgement.
    pub const SACK: Self = Self(3);
    /// Heartbeat request.
    pub const HEARTBEAT: Self = Self(4);
    /// Heartbeat acknowledgement.
    pub const HEARTBEAT_ACK: Self = Self(5);
    /// Abort.
    pub const ABORT: Self = Self(6);
    /// Shutdown.
    pub const SHUTDOWN: Self = Self(7);
    /// Shutdown acknowledgement.
    pub const SHUTDOWN_ACK: Self = Self(8);
    /// Operation error.
    pub const ERROR: Self = Self(9);
    /// State cookie.
    pub const COOKIE_ECHO: Self = Self(10);
    /// Cookie acknowledgement.
    pub const COOKIE_ACK: Self = Self(11);
    /// Shutdown complete.
    pub const SHUTDOWN_COMPLETE: Self = Self(14);
}

/// Iterator over chunks. Ends after the first one that is malformed or not wholly at hand.
#[derive(Clone, Debug)]
pub struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = Result<Chunk<'a>, ParseError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let parsed = self.0.split_first_chunk::<4>().and_then(|(&[kind, flags, a, b], rest)| {
            // The length counts the four header bytes, not the padding to a multiple of 4.
            let len = usize::from(u16::from_be_bytes([a, b])).checked_sub(4)?;
            let (value, rest) = rest.split_at_checked(len)?;
            // The last chunk's padding may be missing.
            self.0 = rest.get(len.wrapping_neg() & 3..).unwrap_or_default();
            Some(Chunk { kind: ChunkType(kind), flags, value })
        });
        if parsed.is_none() {
            self.0 = &[];
        }
        Some(parsed.ok_or(ParseError::SctpChunk))
    }
}
