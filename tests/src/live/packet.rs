//! Frames of a conversation between A and B (and a router C), made without any of Ferry's own packet code.
use super::Side;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// MAC address of A.
pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
/// MAC address of B.
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
/// Longest payload of a frame, bytes.
pub const MTU: usize = 1500;

/// TCP flags.
pub mod flag {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// PSH.
    pub const PSH: u8 = 8;
    /// ACK.
    pub const ACK: u8 = 16;
}

/// Protocol numbers.
pub mod proto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// GRE.
    pub const GRE: u8 = 47;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Sum of RFC 1071, folded, not complemented.
fn fold(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// CRC32c, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 })
    })
}

/// The hosts of one conversation.
#[derive(Clone, Debug)]
pub struct Hosts {
    /// The VM.
    pub a: IpAddr,
    /// The other end.
    pub b: IpAddr,
    /// A router between them.
    pub c: IpAddr,
    identification: u16,
}

impl Hosts {
    /// Addresses that only this conversation has, so that pieces of datagrams left over from another one do not matter.
    pub fn new(seed: u64, v4: bool) -> Self {
        let [_, _, _, _, _, x, y, z] = seed.to_be_bytes();
        let [a, b, c] = if v4 {
            [10, 11, 12].map(|net| IpAddr::V4(Ipv4Addr::new(net, x, y, z)))
        } else {
            let (high, low) = ((seed >> 16) as u16, seed as u16);
            [0xa, 0xb, 0xc].map(|net| IpAddr::V6(Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, high, low)))
        };
        Self { a, b, c, identification: 0 }
    }

    /// IPv4.
    pub fn is_v4(&self) -> bool {
        self.a.is_ipv4()
    }

    /// Source and destination of what comes from `side`.
    pub fn ends(&self, side: Side) -> (IpAddr, IpAddr) {
        match side {
            Side::A => (self.a, self.b),
            Side::B => (self.b, self.a),
        }
    }

    /// ICMP or ICMPv6.
    pub fn icmp_proto(&self) -> u8 {
        if self.is_v4() { proto::ICMP } else { proto::ICMPV6 }
    }

    /// An IP packet. IPv6: `upper` may begin with extension headers, of which `proto` is the first.
    pub fn ip(&mut self, src: IpAddr, dst: IpAddr, proto: u8, upper: &[u8]) -> Vec<u8> {
        self.identification = self.identification.wrapping_add(1);
        self.ip_piece(src, dst, proto, upper, u32::from(self.identification), 0, false, &[])
    }

    /// An IP packet, perhaps a fragment. `offset` is in bytes; `options` are IPv4's.
    #[expect(clippy::too_many_arguments, reason = "they are the header's fields")]
    pub fn ip_piece(
        &self,
        src: IpAddr,
        dst: IpAddr,
        proto: u8,
        data: &[u8],
        identification: u32,
        offset: usize,
        more: bool,
        options: &[u8],
    ) -> Vec<u8> {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header_len = 20 + options.len();
                let mut p = vec![0x40 | (header_len / 4) as u8, 0];
                p.extend(((header_len + data.len()) as u16).to_be_bytes());
                p.extend((identification as u16).to_be_bytes());
                p.extend(((offset / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
                p.extend([64, proto, 0, 0]);
                p.extend(src.octets());
                p.extend(dst.octets());
                p.extend(options);
                fix_ip_checksum(&mut p, header_len);
                p.extend(data);
                p
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let is_fragment = offset != 0 || more;
                let mut payload = Vec::new();
                if is_fragment {
                    payload.extend([proto, 0]);
                    payload.extend((offset as u16 | u16::from(more)).to_be_bytes());
                    payload.extend(identification.to_be_bytes());
                }
                payload.extend(data);
                let mut p = vec![0x60, 0, 0, 0];
                p.extend((payload.len() as u16).to_be_bytes());
                p.extend([if is_fragment { proto::FRAGMENT } else { proto }, 64]);
                p.extend(src.octets());
                p.extend(dst.octets());
                p.extend(payload);
                p
            }
            _ => unreachable!("both addresses are of one family"),
        }
    }

    /// Fills in the transport checksum at `at`; a wrong one if `bad`.
    pub fn checksum(&self, src: IpAddr, dst: IpAddr, proto: u8, upper: &mut [u8], at: usize, bad: bool) {
        let mut bytes = Vec::new();
        if proto != proto::ICMP {
            for addr in [src, dst] {
                match addr {
                    IpAddr::V4(a) => bytes.extend(a.octets()),
                    IpAddr::V6(a) => bytes.extend(a.octets()),
                }
            }
            bytes.extend((upper.len() as u32).to_be_bytes());
            bytes.extend(u32::from(proto).to_be_bytes());
        }
        upper[at..at + 2].fill(0);
        bytes.extend(&*upper);
        let mut sum = !fold(&bytes);
        if sum == 0 && proto == proto::UDP {
            sum = 0xffff;
        }
        if bad {
            sum ^= 0x55;
        }
        upper[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    /// A UDP packet.
    pub fn udp(&mut self, from: Side, ports: (u16, u16), data: &[u8], bad: bool) -> Vec<u8> {
        let (src, dst) = self.ends(from);
        let upper = self.udp_upper(src, dst, ports, data, bad);
        self.ip(src, dst, proto::UDP, &upper)
    }

    /// A UDP header with its data.
    pub fn udp_upper(&self, src: IpAddr, dst: IpAddr, ports: (u16, u16), data: &[u8], bad: bool) -> Vec<u8> {
        let mut upper = Vec::new();
        upper.extend(ports.0.to_be_bytes());
        upper.extend(ports.1.to_be_bytes());
        upper.extend((8 + data.len() as u16).to_be_bytes());
        upper.extend([0, 0]);
        upper.extend(data);
        self.checksum(src, dst, proto::UDP, &mut upper, 6, bad);
        upper
    }

    /// A TCP header with options (padded to words) and data.
    pub fn tcp_upper(&self, from: Side, ports: (u16, u16), segment: &Segment, bad: bool) -> Vec<u8> {
        let (src, dst) = self.ends(from);
        let mut options = segment.options.clone();
        options.truncate(40);
        while options.len() % 4 != 0 {
            options.push(if options.len() == 39 { 0 } else { 1 });
        }
        let mut upper = Vec::new();
        upper.extend(ports.0.to_be_bytes());
        upper.extend(ports.1.to_be_bytes());
        upper.extend(segment.seq.to_be_bytes());
        upper.extend(segment.ack.to_be_bytes());
        upper.extend([((20 + options.len()) / 4 << 4) as u8, segment.flags]);
        upper.extend(segment.window.to_be_bytes());
        upper.extend([0, 0, 0, 0]);
        upper.extend(options);
        upper.extend(std::iter::repeat_n(b'x', segment.len));
        self.checksum(src, dst, proto::TCP, &mut upper, 16, bad);
        upper
    }

    /// A TCP packet.
    pub fn tcp(&mut self, from: Side, ports: (u16, u16), segment: &Segment, bad: bool) -> Vec<u8> {
        let (src, dst) = self.ends(from);
        let upper = self.tcp_upper(from, ports, segment, bad);
        self.ip(src, dst, proto::TCP, &upper)
    }

    /// An ICMP or ICMPv6 message: type, code, then `rest`.
    #[expect(clippy::too_many_arguments, reason = "they are the header's fields")]
    pub fn icmp(&mut self, src: IpAddr, dst: IpAddr, proto: u8, kind: u8, code: u8, rest: &[u8], bad: bool) -> Vec<u8> {
        let mut upper = vec![kind, code, 0, 0];
        upper.extend(rest);
        self.checksum(src, dst, proto, &mut upper, 2, bad);
        self.ip(src, dst, proto, &upper)
    }

    /// An SCTP packet.
    pub fn sctp(&mut self, from: Side, ports: (u16, u16), tag: u32, chunks: &[u8], bad: bool) -> Vec<u8> {
        let (src, dst) = self.ends(from);
        let mut upper = Vec::new();
        upper.extend(ports.0.to_be_bytes());
        upper.extend(ports.1.to_be_bytes());
        upper.extend(tag.to_be_bytes());
        upper.extend([0; 4]);
        upper.extend(chunks);
        let crc = crc32c(&upper) ^ u32::from(bad);
        upper[8..12].copy_from_slice(&crc.to_le_bytes());
        self.ip(src, dst, proto::SCTP, &upper)
    }

    /// The frame that carries an IP packet.
    pub fn frame(&self, from: Side, ip: &[u8]) -> Vec<u8> {
        let (dst, src) = if from == Side::A { (MAC_B, MAC_A) } else { (MAC_A, MAC_B) };
        let mut frame = dst.to_vec();
        frame.extend(src);
        frame.extend(if self.is_v4() { [8, 0] } else { [0x86, 0xdd] });
        frame.extend(ip);
        frame
    }
}

/// Fills in an IPv4 header's checksum.
pub fn fix_ip_checksum(packet: &mut [u8], header_len: usize) {
    packet[10..12].fill(0);
    let sum = !fold(&packet[..header_len]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// What a TCP segment says.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Options, at most 40 bytes.
    pub options: Vec<u8>,
    /// Bytes of data.
    pub len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_known_packets() {
        // RFC 1071, 3.
        assert_eq!(fold(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
