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

/// What a stream's frames are like besides their kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// All of one length, with complete checksums.
    #[default]
    Plain,
    /// Of several lengths ([`IMIX`]); the kind's length is the longest. UDP over IPv4 only.
    Imix,
    /// TCP frames longer than the MTU that are still to be segmented (virtio-net's GSO, 5.1.6.2), with partial checksums.
    Tso,
}

/// The simple IMIX: 7 frames of 64 bytes, 4 of 576, 1 of 1518, in the order in which they are sent again and again.
pub const IMIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1518, 64, 576, 64, 576, 64];

/// Average of [`IMIX`], bytes.
pub const IMIX_AVERAGE_BYTES: f64 = 4270.0 / 12.0;

/// Longest IP packet that switches are told where frames are not longer, bytes: Ethernet's with a VLAN tag's room.
pub const MTU: usize = 1504;

/// Payload of the segments that a [`Shape::Tso`] frame is to become, bytes: an MTU of 1500 with TCP timestamps, as usual.
pub const GSO_BYTES: usize = 1448;

/// Length of a [`Shape::Tso`] frame over IPv4: as many whole segments as an IP packet has room for.
pub const TSO_FRAME_BYTES: usize = 54 + 45 * GSO_BYTES;

/// The virtio-net header (5.1.6) without `num_buffers`, as it stands before a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// VIRTIO_NET_HDR_F_*.
    pub flags: u8,
    /// VIRTIO_NET_HDR_GSO_*.
    pub gso_type: u8,
    /// Bytes of headers in front of the payload that is to be segmented; a hint.
    pub hdr_len: u16,
    /// Bytes of payload per segment.
    pub gso_size: u16,
    /// Where the checksum's sum begins.
    pub csum_start: u16,
    /// Where the checksum lies, from there.
    pub csum_offset: u16,
}

impl NetHeader {
    /// The frame's checksum covers the pseudo-header only (VIRTIO_NET_HDR_F_NEEDS_CSUM).
    pub const NEEDS_CSUM: u8 = 1;
    /// The switch vouches for the checksum (VIRTIO_NET_HDR_F_DATA_VALID).
    pub const DATA_VALID: u8 = 2;

    /// As it stands in memory, `num_buffers` zero.
    pub fn to_bytes(self) -> [u8; 12] {
        let mut b = [0; 12];
        (b[0], b[1]) = (self.flags, self.gso_type);
        for (i, field) in [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset].into_iter().enumerate() {
            b[2 + 2 * i..4 + 2 * i].copy_from_slice(&field.to_le_bytes());
        }
        b
    }

    /// From memory.
    pub fn from_bytes(b: &[u8; 12]) -> Self {
        let field = |i: usize| u16::from_le_bytes([b[2 + 2 * i], b[3 + 2 * i]]);
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: field(0),
            gso_size: field(1),
            csum_start: field(2),
            csum_offset: field(3),
        }
    }
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

    /// Sum over the pseudo-header, as the words stand in memory; not complemented.
    pub fn pseudo_sum(&self, frame: &[u8]) -> u32 {
        let addresses = if self.ipv6 { 22..54 } else { 26..34 };
        let protocol = if self.ipv6 { frame[20] } else { frame[23] };
        let mut sum = sum_words(&frame[addresses], 0);
        sum += u32::from(u16::from(protocol).to_be());
        sum += u32::from(((frame.len() - self.transport_at()) as u16).to_be());
        u32::from(fold(sum))
    }

    /// Sum over the pseudo-header and everything behind the IP header, as the words stand in memory; not complemented.
    pub fn transport_sum(&self, frame: &[u8]) -> u32 {
        u32::from(fold(sum_words(&frame[self.transport_at()..], self.pseudo_sum(frame))))
    }

    /// The virtio-net header of a frame of this kind that is to be segmented.
    pub fn gso_header(&self) -> NetHeader {
        NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            gso_type: if self.ipv6 { 4 } else { 1 },
            hdr_len: self.payload_at() as u16,
            gso_size: GSO_BYTES as u16,
            csum_start: self.transport_at() as u16,
            csum_offset: (self.checksum_at() - self.transport_at()) as u16,
        }
    }

    /// End of the IP packet in a frame, by its own word; the rest is padding.
    pub fn ip_end(&self, frame: &[u8]) -> usize {
        if self.ipv6 {
            14 + 40 + usize::from(u16::from_be_bytes([frame[18], frame[19]]))
        } else {
            14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))
        }
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
