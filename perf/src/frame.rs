//! Frames: complete, with right checksums, built once.

/// Transport protocol of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
}

/// One of the two ends of a conversation.
#[derive(Clone, Copy, Debug)]
pub struct Station {
    /// MAC address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub ipv4: [u8; 4],
    /// IPv6 address.
    pub ipv6: [u8; 16],
}

impl Station {
    /// The `n`-th station: 52:54:00:00:00:n, 10.0.0.n, fd00::n (n counts from 1).
    pub fn new(n: u8) -> Self {
        let mut ipv6 = [0; 16];
        ipv6[0] = 0xfd;
        ipv6[15] = n;
        Self { mac: [0x52, 0x54, 0, 0, 0, n], ipv4: [10, 0, 0, n], ipv6 }
    }

    /// The MAC address as text.
    pub fn mac_text(&self) -> String {
        let m = self.mac;
        format!("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
    }

    /// The IPv4 address as text.
    pub fn ipv4_text(&self) -> String {
        std::net::Ipv4Addr::from(self.ipv4).to_string()
    }

    /// The IPv6 address as text.
    pub fn ipv6_text(&self) -> String {
        std::net::Ipv6Addr::from(self.ipv6).to_string()
    }
}

/// Which kind of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameKind {
    /// Length without frame check sequence, bytes.
    pub bytes: usize,
    /// Transport protocol.
    pub transport: Transport,
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
}

/// Bytes of the stamp that begins each payload: sequence number and its complement (so that they add nothing to a checksum).
pub const STAMP: usize = 8;

impl FrameKind {
    /// Offset of the transport header.
    pub fn transport_at(&self) -> usize {
        14 + if self.ipv6 { 40 } else { 20 }
    }

    /// Offset of the payload.
    pub fn payload_at(&self) -> usize {
        self.transport_at() + self.transport_header()
    }

    fn transport_header(&self) -> usize {
        match self.transport {
            Transport::Udp => 8,
            Transport::Tcp => 20,
        }
    }

    /// Offset of the transport checksum.
    pub fn checksum_at(&self) -> usize {
        self.transport_at()
            + match self.transport {
                Transport::Udp => 6,
                Transport::Tcp => 16,
            }
    }

    /// Shortest frame of this kind that holds a stamp.
    pub fn shortest(&self) -> usize {
        self.payload_at() + STAMP
    }

    /// Bytes of payload.
    pub fn payload_bytes(&self) -> usize {
        self.bytes - self.payload_at()
    }

    /// The frame from one station to another: ports, TCP numbers, stamp and transport checksum zero, payload a fixed
    /// pattern. TCP frames are ACK segments with a full window.
    ///
    /// # Panics
    /// When the frame is shorter than [`Self::shortest`].
    pub fn build(&self, from: &Station, to: &Station) -> Vec<u8> {
        assert!(self.bytes >= self.shortest(), "a frame of {} bytes holds no stamp", self.bytes);
        let mut f = vec![0; self.bytes];
        f[..6].copy_from_slice(&to.mac);
        f[6..12].copy_from_slice(&from.mac);
        let l4 = self.transport_at();
        let ip_payload = self.bytes - l4;
        let protocol = match self.transport {
            Transport::Udp => 17,
            Transport::Tcp => 6,
        };
        if self.ipv6 {
            f[12..14].copy_from_slice(&[0x86, 0xdd]);
            f[14] = 0x60;
            f[18..20].copy_from_slice(&(ip_payload as u16).to_be_bytes());
            f[20] = protocol;
            f[21] = 64;
            f[22..38].copy_from_slice(&from.ipv6);
            f[38..54].copy_from_slice(&to.ipv6);
        } else {
            f[12..14].copy_from_slice(&[0x08, 0x00]);
            f[14] = 0x45;
            f[16..18].copy_from_slice(&((self.bytes - 14) as u16).to_be_bytes());
            f[20] = 0x40; // don't fragment
            f[22] = 64;
            f[23] = protocol;
            f[26..30].copy_from_slice(&from.ipv4);
            f[30..34].copy_from_slice(&to.ipv4);
            let sum = !fold(sum_words(&f[14..34], 0));
            f[24..26].copy_from_slice(&sum.to_ne_bytes());
        }
        match self.transport {
            Transport::Udp => f[l4 + 4..l4 + 6].copy_from_slice(&(ip_payload as u16).to_be_bytes()),
            Transport::Tcp => {
                f[l4 + 12] = 5 << 4;
                f[l4 + 13] = flags::ACK;
                f[l4 + 14..l4 + 16].copy_from_slice(&[0xff, 0xff]);
            }
        }
        for (i, b) in f[self.payload_at() + STAMP..].iter_mut().enumerate() {
            *b = (i as u8).wrapping_mul(7).wrapping_add(3);
        }
        f
    }

    /// Sum over the pseudo-header and everything behind the IP header, as the words stand in memory; not complemented.
    pub fn transport_sum(&self, frame: &[u8]) -> u32 {
        let l4 = self.transport_at();
        let addresses = if self.ipv6 { 22..54 } else { 26..34 };
        let protocol = if self.ipv6 { frame[20] } else { frame[23] };
        let mut sum = sum_words(&frame[addresses], 0);
        sum += u32::from(u16::from(protocol).to_be());
        sum += u32::from(((frame.len() - l4) as u16).to_be());
        u32::from(fold(sum_words(&frame[l4..], sum)))
    }

    /// Whether the transport checksum is right.
    pub fn checksum_right(&self, frame: &[u8]) -> bool {
        fold(self.transport_sum(frame)) == 0xffff
    }
}

/// TCP flags.
pub mod flags {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;
}

/// Adds the 16-bit words as they stand in memory: a one's complement sum does not mind the byte order (RFC 1071).
pub fn sum_words(bytes: &[u8], start: u32) -> u32 {
    let mut sum = u64::from(start);
    let (words, rest) = bytes.as_chunks::<2>();
    for w in words {
        sum += u64::from(u16::from_ne_bytes(*w));
    }
    if let [last] = rest {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u32
}

/// Folds a sum to 16 bits.
#[inline]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_right_checksums_and_lengths() {
        for ipv6 in [false, true] {
            for transport in [Transport::Udp, Transport::Tcp] {
                for bytes in [82, 83, 128, 1518] {
                    let kind = FrameKind { bytes, transport, ipv6 };
                    let mut f = kind.build(&Station::new(1), &Station::new(2));
                    assert!(!kind.checksum_right(&f), "not filled in yet");
                    let sum = !fold(kind.transport_sum(&f));
                    f[kind.checksum_at()..kind.checksum_at() + 2].copy_from_slice(&sum.to_ne_bytes());
                    assert!(kind.checksum_right(&f), "{kind:?}");
                    f[bytes - 1] ^= 1;
                    assert!(!kind.checksum_right(&f), "{kind:?}: a flipped bit goes unnoticed");
                }
            }
        }
        let kind = FrameKind { bytes: 64, transport: Transport::Udp, ipv6: false };
        let f = kind.build(&Station::new(1), &Station::new(2));
        assert_eq!(fold(sum_words(&f[14..34], 0)), 0xffff);
        assert!(ferry_dataplane::packet::parse(&f, 64).is_ok());
    }
}
