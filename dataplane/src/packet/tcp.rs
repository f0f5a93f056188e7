//! TCP (RFC 9293).
use super::ParseError;

/// Bytes of a header without options.
pub const HEADER_BYTES: usize = 20;
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: u16 = 16;

bitflags::bitflags! {
    /// The control bits (RFC 9293, 3.1; ECN: RFC 3168).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Flags: u8 {
        /// No more data from the sender.
        const FIN = 0x01;
        /// Synchronise sequence numbers.
        const SYN = 0x02;
        /// Reset the connection.
        const RST = 0x04;
        /// Push.
        const PSH = 0x08;
        /// The acknowledgement field counts.
        const ACK = 0x10;
        /// The urgent pointer counts.
        const URG = 0x20;
        /// ECN echo.
        const ECE = 0x40;
        /// Congestion window reduced.
        const CWR = 0x80;
    }
}

/// View of a TCP segment, or of as much of it as is at hand (at least the whole header).
#[derive(Clone, Copy, Debug)]
pub struct Tcp<'a> {
    header: &'a [u8; HEADER_BYTES],
    options: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Tcp<'a> {
    /// Views `bytes`, which begin with the TCP header.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ParseError::TcpTruncated)?;
        let header_len = usize::from(header[12] >> 4) * 4;
        let options_len = header_len.checked_sub(HEADER_BYTES).ok_or(ParseError::TcpDataOffset)?;
        let (options, payload) = rest.split_at_checked(options_len).ok_or(ParseError::TcpTruncated)?;
        Ok(Self { header, options, payload })
    }

    /// Header length with options, bytes: 20 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        HEADER_BYTES + self.options.len()
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

    /// Sequence number of the first payload byte (or of SYN).
    #[inline]
    pub fn seq(&self) -> u32 {
        u32::from_be_bytes([self.header[4], self.header[5], self.header[6], self.header[7]])
    }

    /// Acknowledgement number.
    #[inline]
    pub fn ack(&self) -> u32 {
        u32::from_be_bytes([self.header[8], self.header[9], self.header[10], self.header[11]])
    }

    /// Control bits.
    #[inline]
    pub fn flags(&self) -> Flags {
        Flags::from_bits_retain(self.header[13])
    }

    /// Window, unscaled.
    #[inline]
    pub fn window(&self) -> u16 {
        u16::from_be_bytes([self.header[14], self.header[15]])
    }

    /// Checksum field.
    #[inline]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes([self.header[16], self.header[17]])
    }

    /// Urgent pointer.
    #[inline]
    pub fn urgent(&self) -> u16 {
        u16::from_be_bytes([self.header[18], self.header[19]])
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

    /// Payload at hand.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// One TCP option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpOption<'a> {
    /// Maximum segment size, bytes (RFC 9293, 3.7.1).
    Mss(u16),
    /// Window scale shift (RFC 7323, 2); values above 14 are to be taken as 14.
    WindowScale(u8),
    /// Selective acknowledgement is permitted (RFC 2018, 2).
    SackPermitted,
    /// Selective acknowledgement blocks, 8 bytes each (RFC 2018, 3).
    Sack(&'a [u8]),
    /// Timestamps (RFC 7323, 3).
    Timestamps {
        /// TSval.
        value: u32,
        /// TSecr.
        echo: u32,
    },
    /// Any other option.
    Other {
        /// Option kind.
        kind: u8,
        /// Data after the length octet.
        data: &'a [u8],
    },
}

/// Iterator over TCP options. Ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = Result<TcpOption<'a>, ParseError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (&kind, rest) = self.0.split_first()?;
            match kind {
                0 => return None,
                1 => self.0 = rest,
                _ => {
                    let option = split(rest).and_then(|(data, rest)| {
                        self.0 = rest;
                        interpret(kind, data)
                    });
                    if option.is_none() {
                        self.0 = &[];
                    }
                    return Some(option.ok_or(ParseError::TcpOption));
                }
            }
        }
    }
}

/// Splits off an option's data; `rest` begins with the length octet, which counts kind and length as well.
fn split(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&len, rest) = rest.split_first()?;
    rest.split_at_checked(usize::from(len).checked_sub(2)?)
}

fn interpret(kind: u8, data: &[u8]) -> Option<TcpOption<'_>> {
    Some(match (kind, data) {
        (2, &[a, b]) => TcpOption::Mss(u16::from_be_bytes([a, b])),
        (3, &[shift]) => TcpOption::WindowScale(shift),
        (4, &[]) => TcpOption::SackPermitted,
        (5, blocks) if blocks.len() % 8 == 0 => TcpOption::Sack(blocks),
        (8, &[a, b, c, d, e, f, g, h]) => {
            TcpOption::Timestamps { value: u32::from_be_bytes([a, b, c, d]), echo: u32::from_be_bytes([e, f, g, h]) }
        }
        // A known kind of the wrong length.
        (2..=5 | 8, _) => return None,
        (kind, data) => TcpOption::Other { kind, data },
    })
}

/// Changes a TCP header in place. The checksum is the caller's business.
#[derive(Debug)]
pub struct TcpMut<'a>(&'a mut [u8; HEADER_BYTES]);

impl<'a> TcpMut<'a> {
    /// Takes the header at the start of `bytes`.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, ParseError> {
        bytes.first_chunk_mut().map(Self).ok_or(ParseError::TcpTruncated)
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

    /// Sets the sequence number.
    #[inline]
    pub fn set_seq(&mut self, seq: u32) {
        [self.0[4], self.0[5], self.0[6], self.0[7]] = seq.to_be_bytes();
    }

    /// Sets the acknowledgement number.
    #[inline]
    pub fn set_ack(&mut self, ack: u32) {
        [self.0[8], self.0[9], self.0[10], self.0[11]] = ack.to_be_bytes();
    }

    /// Sets the control bits.
    #[inline]
    pub fn set_flags(&mut self, flags: Flags) {
        self.0[13] = flags.bits();
    }

    /// Sets the window.
    #[inline]
    pub fn set_window(&mut self, window: u16) {
        [self.0[14], self.0[15]] = window.to_be_bytes();
    }

    /// Sets the checksum field.
    #[inline]
    pub fn set_checksum(&mut self, checksum: u16) {
        [self.0[16], self.0[17]] = checksum.to_be_bytes();
    }
}

/// A TCP header without options as a value; checksum and urgent pointer are written as 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Control bits.
    pub flags: Flags,
    /// Window, unscaled.
    pub window: u16,
}

impl From<Tcp<'_>> for TcpHeader {
    /// Options are not taken over.
    fn from(view: Tcp<'_>) -> Self {
        Self {
            src_port: view.src_port(),
            dst_port: view.dst_port(),
            seq: view.seq(),
            ack: view.ack(),
            flags: view.flags(),
            window: view.window(),
        }
    }
}

impl TcpHeader {
    /// The header's bytes, checksum 0.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[12] = 5 << 4;
        let mut view = TcpMut(&mut out);
        view.set_src_port(self.src_port);
        view.set_dst_port(self.dst_port);
        view.set_seq(self.seq);
        view.set_ack(self.ack);
        view.set_flags(self.flags);
        view.set_window(self.window);
        out
    }
}
