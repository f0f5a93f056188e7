//! A stream of frames in one direction, fully determined by sequence numbers, so that whoever sees one frame of it can say
//! what the frame must look like, and whoever counts can say what is missing.
//!
//! Frame `n` belongs to connection `n mod connections` (or to the one that a skewed table names) and is that connection's
//! `n div connections`-th: its *lap*. TCP numbers follow from the lap, so that there is no state per connection here.
#![allow(unsafe_code)] // Its job: frames are written in place, in guest memory.
use crate::frame::{FrameKind, IMIX, NetHeader, STAMP, Shape, Station, Transport, flags, fold, sum_words};

/// First data byte of every TCP connection.
const TCP_START: u32 = 1000;

/// Ports of a conversation's opener and answerer.
const OPENER_PORT: u16 = 1024;
/// First port of the answerer.
pub const ANSWERER_PORT: u16 = 5000;
/// Connections that differ in the opener's port alone.
const PER_ANSWERER_PORT_LOG2: u32 = 15;

/// Most connections that the scheme can tell apart.
pub const MAX_CONNECTIONS: u32 = 1 << 30;

/// How frames are spread over connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// One after the other.
    #[default]
    Uniform,
    /// Connection `k` (from 1) in proportion to `1/k`.
    Skewed,
}

/// Which part of a TCP conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Opener's SYN.
    Syn,
    /// Answerer's SYN-ACK.
    SynAck,
    /// ACK without data: the opener's, which completes the handshake, and the answerer's first one, which opens its window.
    Ack,
    /// Data in either direction, and all UDP.
    Data,
    /// FIN-ACK; the opener sends it first.
    Fin,
    /// Opener's last ACK, of the answerer's FIN.
    LastAck,
}

/// A stream's description.
#[derive(Clone, Debug)]
pub struct StreamSpec {
    /// What its data frames look like.
    pub kind: FrameKind,
    /// Who sends.
    pub from: Station,
    /// Who receives.
    pub to: Station,
    /// Whether the sender has opened the connections.
    pub opener: bool,
    /// Number of connections.
    pub connections: u32,
    /// How frames are spread over them.
    pub spread: Spread,
    /// What data frames are like besides.
    pub shape: Shape,
}

/// Bytes at the beginning of a frame that differ between lengths: headers and stamp, one cache line.
const HEAD: usize = 64;

/// What frames of one length of a mix have in common.
#[derive(Clone, Debug)]
struct Length {
    bytes: usize,
    head: [u8; HEAD],
    sum: u32,
}

/// Which frame of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Position {
    /// Sequence number.
    pub seq: u32,
    /// Connection.
    pub connection: u32,
    /// How many frames of this connection (uniform spread) went before.
    pub lap: u32,
}

/// Writes the frames of one step of a stream.
#[derive(Clone, Debug)]
pub struct Frames {
    spec: StreamSpec,
    step: Step,
    bytes: usize,
    template: Vec<u8>,
    /// Sum of the pseudo-header and the template's transport part.
    sum: u32,
    checksum_at: usize,
    ports_at: usize,
    stamp_at: usize,
    table: Vec<u32>,
    /// The lengths of a mix, in the order in which they are sent; empty when all frames have one length.
    mix: Vec<Length>,
    /// The checksum field stays as the template has it.
    partial: bool,
    next: Position,
    /// Lap of the other direction that this one acknowledges.
    pub acknowledged: u32,
}

const SKEW_TABLE: usize = 1 << 16;

/// Connections for `SKEW_TABLE` successive frames, by Zipf's law with exponent 1, in a fixed pseudo-random order.
fn skewed(connections: u32) -> Vec<u32> {
    let total = f64::from(connections).ln() + 0.577;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..SKEW_TABLE)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // The inverse of the harmonic numbers' approximation ln(k) + 0.577.
            let u = (state >> 11) as f64 / (1u64 << 53) as f64;
            let k = (u * total - 0.577).exp();
            (k as u32).min(connections - 1)
        })
        .collect()
}

impl Frames {
    /// The frames of one step.
    pub fn new(spec: &StreamSpec, step: Step) -> Self {
        assert!((1..=MAX_CONNECTIONS).contains(&spec.connections), "between 1 and {MAX_CONNECTIONS} connections");
        let table = match spec.spread {
            Spread::Skewed if step == Step::Data && spec.connections > 1 => skewed(spec.connections),
            _ => Vec::new(),
        };
        let kind = spec.kind;
        let mut template = kind.build(&spec.from, &spec.to);
        let stamped = step == Step::Data;
        if !stamped {
            template = control_segment(&kind, &spec.from, &spec.to, step);
        }
        let bytes = template.len();
        // Padding behind the IP packet is no part of the sum.
        let ip_end = kind.ip_end(&template);
        let sum = kind.transport_sum(&template[..ip_end]);
        let mut mix = Vec::new();
        if stamped && spec.shape == Shape::Imix {
            assert!(kind.transport == Transport::Udp && !kind.ipv6, "a mix is of UDP over IPv4");
            mix = IMIX.map(|bytes| Length::new(FrameKind { bytes, ..kind }, spec)).to_vec();
        }
        let partial = stamped && spec.shape == Shape::Tso;
        if partial {
            assert!(kind.transport == Transport::Tcp && spec.connections == 1, "segmentation is of one TCP connection");
            let sum = kind.pseudo_sum(&template) as u16;
            template[kind.checksum_at()..][..2].copy_from_slice(&sum.to_ne_bytes());
        }
        Self {
            spec: spec.clone(),
            step,
            bytes,
            template,
            sum,
            checksum_at: kind.checksum_at(),
            ports_at: kind.transport_at(),
            stamp_at: kind.payload_at(),
            table,
            mix,
            partial,
            next: Position::default(),
            acknowledged: 0,
        }
    }

    /// Goes on where another step of the same stream has stopped.
    pub fn at(mut self, next: Position) -> Self {
        self.next = next;
        self
    }

    /// Length of each frame, of a mix the longest one's, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether frames have several lengths.
    #[inline]
    pub fn mixed(&self) -> bool {
        !self.mix.is_empty()
    }

    /// Whether frames are still to be segmented.
    pub fn segmented(&self) -> bool {
        self.partial
    }

    /// Whether some frame of the stream has this length.
    #[inline]
    pub fn has_length(&self, bytes: usize) -> bool {
        if self.mix.is_empty() { bytes == self.bytes } else { self.mix.iter().any(|l| l.bytes == bytes) }
    }

    /// Length of the frame with this sequence number, bytes.
    #[inline]
    pub fn bytes_of(&self, seq: u32) -> usize {
        if self.mix.is_empty() { self.bytes } else { self.length(seq).bytes }
    }

    #[inline]
    fn length(&self, seq: u32) -> &Length {
        &self.mix[seq as usize % self.mix.len()]
    }

    /// The virtio-net header of each frame.
    pub fn net_header(&self) -> NetHeader {
        if self.partial { self.spec.kind.gso_header() } else { NetHeader::default() }
    }

    /// What never changes; to be copied to each buffer before [`Self::write_next`] is used on it.
    pub fn template(&self) -> &[u8] {
        &self.template
    }

    /// The frame that [`Self::write_next`] writes next.
    pub fn next(&self) -> Position {
        self.next
    }

    /// The description.
    pub fn spec(&self) -> &StreamSpec {
        &self.spec
    }

    /// The position of the frame with this sequence number.
    pub fn position(&self, seq: u32) -> Position {
        let n = self.spec.connections;
        let connection = if self.table.is_empty() { seq % n } else { self.table[seq as usize % SKEW_TABLE] };
        Position { seq, connection, lap: seq / n }
    }

    #[inline]
    fn advance(&mut self) -> Position {
        let mut p = self.next;
        self.next.seq = p.seq.wrapping_add(1);
        self.next.connection += 1;
        if self.next.connection == self.spec.connections {
            self.next.connection = 0;
            self.next.lap = self.next.lap.wrapping_add(1);
        }
        if !self.table.is_empty() {
            p.connection = self.table[p.seq as usize % SKEW_TABLE];
        }
        p
    }

    /// Writes the next frame's own parts into a buffer that holds the template. Returns the frame's length.
    ///
    /// # Safety
    /// `frame` must be valid for writes of [`Self::bytes`] bytes.
    #[inline]
    pub unsafe fn write_next(&mut self, frame: *mut u8) -> usize {
        let position = self.advance();
        // SAFETY: as this function's.
        unsafe { self.write(frame, position, self.acknowledged) }
    }

    /// Writes a whole frame of this step for a connection, template included.
    ///
    /// # Safety
    /// `frame` must be valid for writes of [`Self::bytes`] bytes.
    #[inline]
    pub unsafe fn write_connection(&self, frame: *mut u8, connection: u32) {
        // SAFETY: as this function's.
        unsafe {
            std::ptr::copy_nonoverlapping(self.template.as_ptr(), frame, self.template.len());
            self.write(frame, Position { seq: 0, connection, lap: 0 }, 0);
        }
    }

    /// TCP sequence number of this step's first frame.
    pub fn sequence_number(&self) -> u32 {
        self.tcp_numbers(0, 0).0
    }

    /// Ports of a connection as (source, destination).
    #[inline]
    fn ports(&self, connection: u32) -> (u16, u16) {
        let opener = OPENER_PORT + (connection & ((1 << PER_ANSWERER_PORT_LOG2) - 1)) as u16;
        let answerer = ANSWERER_PORT.wrapping_add((connection >> PER_ANSWERER_PORT_LOG2) as u16);
        if self.spec.opener { (opener, answerer) } else { (answerer, opener) }
    }

    /// Writes what frames of a mix have by their length, and tells its sum and its bytes.
    ///
    /// # Safety
    /// `frame` must be valid for writes of [`Self::bytes`] bytes.
    #[inline(never)]
    unsafe fn write_head(&self, frame: *mut u8, seq: u32) -> (u32, usize) {
        let length = self.length(seq);
        // SAFETY: no frame is shorter than its head.
        unsafe { std::ptr::copy_nonoverlapping(length.head.as_ptr(), frame, HEAD) };
        (length.sum, length.bytes)
    }

    /// Writes a frame's own parts.
    ///
    /// # Safety
    /// `frame` must be valid for writes of [`Self::bytes`] bytes.
    #[inline(always)]
    unsafe fn write(&self, frame: *mut u8, p: Position, acknowledged: u32) -> usize {
        let (source, destination) = self.ports(p.connection);
        let ports = u32::from(source.to_be()) | u32::from(destination.to_be()) << 16;
        let (mut sum, mut bytes) = (self.sum, self.bytes);
        if self.mixed() {
            // SAFETY: as this function's.
            (sum, bytes) = unsafe { self.write_head(frame, p.seq) };
        }
        sum += (ports & 0xffff) + (ports >> 16);
        // SAFETY: the offsets lie inside the frame: the template was built with them.
        unsafe {
            frame.add(self.ports_at).cast::<u32>().write_unaligned(ports);
            if self.spec.kind.transport == Transport::Tcp {
                let (seq, ack) = self.tcp_numbers(p.lap, acknowledged);
                let (seq, ack) = (seq.to_be(), ack.to_be());
                frame.add(self.ports_at + 4).cast::<u32>().write_unaligned(seq);
                frame.add(self.ports_at + 8).cast::<u32>().write_unaligned(ack);
                sum += (seq & 0xffff) + (seq >> 16) + (ack & 0xffff) + (ack >> 16);
            }
            let mut checksum = !fold(sum);
            if checksum == 0 {
                checksum = 0xffff; // in UDP zero means "none"; in TCP both mean zero
            }
            if !self.partial {
                frame.add(self.checksum_at).cast::<u16>().write_unaligned(checksum);
            }
            if self.step == Step::Data {
                let stamp = u64::from(p.seq.to_be()) | u64::from(!p.seq.to_be()) << 32;
                frame.add(self.stamp_at).cast::<u64>().write_unaligned(stamp);
            }
        }
        bytes
    }

    /// Sequence and acknowledgement numbers of a frame.
    #[inline]
    fn tcp_numbers(&self, lap: u32, acknowledged: u32) -> (u32, u32) {
        let payload = self.spec.kind.payload_bytes() as u32;
        let data = TCP_START.wrapping_add(lap.wrapping_mul(payload));
        let other = TCP_START.wrapping_add(acknowledged.wrapping_mul(payload));
        match self.step {
            Step::Syn => (TCP_START - 1, 0),
            Step::SynAck => (TCP_START - 1, TCP_START),
            Step::Ack => (TCP_START, TCP_START),
            Step::Data => (data, other),
            // The opener ends first; the answerer's FIN acknowledges it.
            Step::Fin if self.spec.opener => (TCP_START, TCP_START),
            Step::Fin => (TCP_START, TCP_START + 1),
            Step::LastAck => (TCP_START + 1, TCP_START + 1),
        }
    }

    /// The sequence number that a data frame carries; `None` when it is not intact.
    pub fn stamp(&self, frame: &[u8]) -> Option<u32> {
        let (seq, rest) = frame.get(self.stamp_at..)?.split_first_chunk::<4>()?;
        let (complement, _) = rest.split_first_chunk::<4>()?;
        let (seq, complement) = (u32::from_be_bytes(*seq), u32::from_be_bytes(*complement));
        (seq == !complement).then_some(seq)
    }

    /// Whether a data frame is, byte for byte, what was sent as number `seq`. TCP's acknowledgement may be any.
    pub fn intact(&self, frame: &[u8], seq: u32, scratch: &mut Vec<u8>) -> bool {
        if frame.len() != self.bytes_of(seq) {
            return false;
        }
        scratch.clear();
        scratch.extend_from_slice(&self.template);
        let acknowledged = match self.spec.kind.transport {
            Transport::Udp => 0,
            Transport::Tcp => {
                let at = self.ports_at + 8;
                let bytes = [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
                let data = u32::from_be_bytes(bytes).wrapping_sub(TCP_START);
                data / (self.spec.kind.payload_bytes() as u32)
            }
        };
        // SAFETY: the scratch holds the template: `bytes` bytes.
        let bytes = unsafe { self.write(scratch.as_mut_ptr(), self.position(seq), acknowledged) };
        frame == &scratch[..bytes]
    }

    /// TCP sequence number of the stream's byte at `offset`.
    pub fn number_at(offset: u64) -> u32 {
        TCP_START.wrapping_add(offset as u32)
    }

    /// Whether a frame is, byte for byte, the part of the (segmented) stream that begins at `offset`: of the whole frame that
    /// was sent, or of one segment of it. Identification, length and checksum of IP, and the acknowledgement may be any that
    /// a segment may have; what `header` says about the rest of the work must be true.
    pub fn segment_intact(&self, header: NetHeader, frame: &[u8], offset: u64) -> bool {
        let kind = &self.spec.kind;
        let (transport, payload) = (kind.transport_at(), kind.payload_at());
        if frame.len() <= payload || kind.ip_end(frame) != frame.len() {
            return false;
        }
        let addresses = if kind.ipv6 { 22..54 } else { 26..34 };
        let (source, destination) = self.ports(0);
        let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        let same = |range: std::ops::Range<usize>| frame[range.clone()] == self.template[range];
        if !same(0..14) || !same(addresses) || frame[transport..transport + 4] != ports {
            return false;
        }
        let per_frame = kind.payload_bytes() as u64;
        let (number, within) = ((offset / per_frame) as u32, (offset % per_frame) as usize);
        let data = &frame[payload..];
        let Some(expected) = self.template[payload..].get(within..within + data.len()) else { return false };
        let stamp = [number.to_be_bytes(), (!number).to_be_bytes()].concat();
        let stamped = STAMP.saturating_sub(within).min(data.len());
        if data[..stamped] != stamp[within.min(STAMP)..][..stamped] || data[stamped..] != expected[stamped..] {
            return false;
        }
        let whole = kind.gso_header();
        let long = data.len() > usize::from(whole.gso_size);
        // OVS replaces the size by what its port's MTU has room for.
        let sizes = 1..=crate::frame::MTU + 14 - payload;
        if long && (header.gso_type != whole.gso_type || !sizes.contains(&usize::from(header.gso_size))) {
            return false;
        }
        if header.flags & NetHeader::NEEDS_CSUM != 0 {
            let places = (header.csum_start, header.csum_offset) == (whole.csum_start, whole.csum_offset);
            let sum = frame[kind.checksum_at()..][..2] == (kind.pseudo_sum(frame) as u16).to_ne_bytes();
            places && (sum || (long && frame[kind.checksum_at()..][..2] == self.sum_without_length()))
        } else {
            !long && (header.flags & NetHeader::DATA_VALID != 0 || kind.checksum_right(frame))
        }
    }

    /// Partial checksum of a frame to be segmented as DPDK writes it: the length, which differs between segments anyway, is
    /// left out, as Intel's NICs want it. Receivers that take the frame whole do not look at it.
    fn sum_without_length(&self) -> [u8; 2] {
        let kind = &self.spec.kind;
        // In a one's complement sum, what is added with all bits inverted is taken away.
        let length = ((self.bytes - kind.transport_at()) as u16).to_be();
        fold(kind.pseudo_sum(&self.template) + u32::from(!length)).to_ne_bytes()
    }

    /// TCP sequence number of a frame; `None` when it is too short to have one.
    pub fn number_of(&self, frame: &[u8]) -> Option<u32> {
        let bytes = frame.get(self.ports_at + 4..)?.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*bytes))
    }

    /// The connection that a frame belongs to, by its ports.
    #[inline]
    pub fn connection_of(source: u16, destination: u16, from_opener: bool) -> u32 {
        let (opener, answerer) = if from_opener { (source, destination) } else { (destination, source) };
        u32::from(answerer.wrapping_sub(ANSWERER_PORT)) << PER_ANSWERER_PORT_LOG2
            | u32::from(opener.wrapping_sub(OPENER_PORT))
    }
}

impl Length {
    fn new(kind: FrameKind, spec: &StreamSpec) -> Self {
        let template = kind.build(&spec.from, &spec.to);
        let head = *template.first_chunk().expect("no frame is shorter than its head");
        Self { bytes: kind.bytes, head, sum: kind.transport_sum(&template) }
    }
}

/// A TCP segment without data, padded to Ethernet's 60 bytes. SYN segments scale windows by 2^14, so that any number of
/// frames may be under way.
fn control_segment(kind: &FrameKind, from: &Station, to: &Station, step: Step) -> Vec<u8> {
    let options: &[u8] = match step {
        Step::Syn | Step::SynAck => &[1, 3, 3, 14],
        _ => &[],
    };
    let mut f = FrameKind { bytes: kind.shortest(), ..*kind }.build(from, to);
    let l4 = kind.transport_at();
    f.truncate(kind.payload_at());
    f.extend_from_slice(options);
    f[l4 + 12] = (((20 + options.len()) / 4) << 4) as u8;
    f[l4 + 13] = match step {
        Step::Syn => flags::SYN,
        Step::SynAck => flags::SYN | flags::ACK,
        Step::Fin => flags::FIN | flags::ACK,
        _ => flags::ACK,
    };
    if kind.ipv6 {
        let length = (f.len() - l4) as u16;
        f[18..20].copy_from_slice(&length.to_be_bytes());
    } else {
        let length = (f.len() - 14) as u16;
        f[16..18].copy_from_slice(&length.to_be_bytes());
        f[24..26].fill(0);
        let sum = !fold(sum_words(&f[14..34], 0));
        f[24..26].copy_from_slice(&sum.to_ne_bytes());
    }
    f.resize(f.len().max(60), 0);
    f
}

const _: () = assert!(STAMP == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_dataplane::packet::{IpProto, parse};

    fn spec(transport: Transport, bytes: usize, ipv6: bool, connections: u32, opener: bool) -> StreamSpec {
        let kind = FrameKind { bytes, transport, ipv6 };
        let (from, to) = (Station::new(1), Station::new(2));
        StreamSpec { kind, from, to, opener, connections, spread: Spread::Uniform, shape: Shape::Plain }
    }

    fn frame(frames: &mut Frames) -> Vec<u8> {
        let mut f = frames.template().to_vec();
        // SAFETY: a whole frame.
        unsafe { frames.write_next(f.as_mut_ptr()) };
        f
    }

    #[test]
    fn every_frame_is_valid_and_recognised() {
        for (transport, ipv6) in
            [(Transport::Udp, false), (Transport::Tcp, false), (Transport::Udp, true), (Transport::Tcp, true)]
        {
            for bytes in [82, 1518] {
                for connections in [1, 7, 100_000] {
                    let spec = spec(transport, bytes, ipv6, connections, true);
                    let mut frames =
                        Frames::new(&spec, Step::Data).at(Position { seq: 5 * connections, connection: 0, lap: 5 });
                    frames.acknowledged = 3;
                    let mut scratch = Vec::new();
                    for i in 0..20 {
                        let mut f = frame(&mut frames);
                        assert!(spec.kind.checksum_right(&f), "{spec:?}");
                        assert_eq!(frames.stamp(&f), Some(5 * connections + i));
                        assert!(frames.intact(&f, 5 * connections + i, &mut scratch));
                        assert!(!frames.intact(&f, 5 * connections + i + 1, &mut scratch));
                        let last = f.len() - 1;
                        f[last] ^= 4;
                        assert!(!frames.intact(&f, 5 * connections + i, &mut scratch));
                    }
                }
            }
        }
    }

    #[test]
    fn handshake_frames_parse_and_have_right_checksums() {
        for ipv6 in [false, true] {
            for step in [Step::Syn, Step::SynAck, Step::Ack, Step::Fin, Step::LastAck] {
                for (connection, opener) in [(33_000, true), (33_000, false), (10_000, true), (10_000, false)] {
                    let spec = spec(Transport::Tcp, 128, ipv6, 40_000, opener);
                    let mut frames = Frames::new(&spec, step).at(Position { seq: 0, connection, lap: 0 });
                    let f = frame(&mut frames);
                    let end = spec.kind.ip_end(&f);
                    assert!(f.len() >= 60 && spec.kind.checksum_right(&f[..end]), "{step:?}");
                    let headers = parse(&f, f.len() as u32).expect("parses");
                    assert_eq!(headers.l4.map(|l4| l4.proto), Some(IpProto::TCP));
                    let at = spec.kind.transport_at();
                    let ports = [0, 2].map(|i| u16::from_be_bytes([f[at + i], f[at + i + 1]]));
                    assert_eq!(Frames::connection_of(ports[0], ports[1], opener), connection);
                }
            }
        }
    }

    #[test]
    fn skewed_streams_prefer_few_connections() {
        let spec = StreamSpec { spread: Spread::Skewed, ..spec(Transport::Udp, 64, false, 100_000, true) };
        let mut frames = Frames::new(&spec, Step::Data);
        let mut first_hundred = 0;
        for _ in 0..10_000 {
            let p = frames.advance();
            assert_eq!(p, Position { lap: p.lap, ..frames.position(p.seq) });
            first_hundred += u32::from(p.connection < 100);
        }
        // ln(100) / ln(100,000) = 40 %
        assert!((3000..5500).contains(&first_hundred), "{first_hundred}");
    }

    #[test]
    fn a_mix_has_its_lengths_in_their_shares() {
        let spec = StreamSpec { shape: Shape::Imix, ..spec(Transport::Udp, 1518, false, 5, true) };
        let mut frames = Frames::new(&spec, Step::Data);
        let mut buffer = frames.template().to_vec();
        let (mut count, mut sum, mut scratch) = ([0; 3], 0, Vec::new());
        for seq in 0..120 {
            // SAFETY: room for the longest frame.
            let bytes = unsafe { frames.write_next(buffer.as_mut_ptr()) };
            let mut f = buffer[..bytes].to_vec();
            count[[64, 576, 1518].iter().position(|&b| b == bytes).expect("a length of the mix")] += 1;
            sum += bytes;
            assert!(FrameKind { bytes, ..spec.kind }.checksum_right(&f) && parse(&f, bytes as u32).is_ok());
            assert_eq!((frames.stamp(&f), frames.bytes_of(seq)), (Some(seq), bytes));
            assert!(frames.intact(&f, seq, &mut scratch));
            f[bytes - 1] ^= 1;
            assert!(!frames.intact(&f, seq, &mut scratch));
            assert!(!frames.intact(&f[..bytes - 1], seq, &mut scratch));
        }
        assert_eq!(count, [70, 40, 10]);
        assert!((sum as f64 / 120.0 - crate::frame::IMIX_AVERAGE_BYTES).abs() < 1e-9);
    }

    #[test]
    fn a_frame_to_be_segmented_is_known_whole_and_in_segments() {
        use crate::frame::{GSO_BYTES, TSO_FRAME_BYTES};
        let spec = StreamSpec { shape: Shape::Tso, ..spec(Transport::Tcp, TSO_FRAME_BYTES, false, 1, true) };
        let kind = spec.kind;
        let mut frames = Frames::new(&spec, Step::Data).at(Position { seq: 9, connection: 0, lap: 9 });
        let f = frame(&mut frames);
        let (at, header) = (9 * kind.payload_bytes() as u64, frames.net_header());
        assert_eq!(NetHeader::from_bytes(&header.to_bytes()), header);
        assert_eq!(frames.number_of(&f), Some(Frames::number_at(at)));
        assert!(frames.segment_intact(header, &f, at));
        assert!(!frames.segment_intact(header, &f, at + GSO_BYTES as u64));
        assert!(!frames.segment_intact(NetHeader::default(), &f, at), "it still is to be segmented");
        let mut by_dpdk = f.clone();
        // 10.0.0.1, 10.0.0.2, TCP.
        by_dpdk[50..52].copy_from_slice(&[0x14, 0x09]);
        assert!(frames.segment_intact(header, &by_dpdk, at));
        for byte in [3, 28, 36, 51, 60, 30_000, f.len() - 1] {
            let mut bad = f.clone();
            bad[byte] ^= 1;
            assert!(!frames.segment_intact(header, &bad, at), "byte {byte}");
        }
        for i in 0..45 {
            let part = i * GSO_BYTES..(i + 1) * GSO_BYTES;
            let mut s = f[..54].to_vec();
            s.extend_from_slice(&f[54..][part.clone()]);
            let total = (s.len() - 14) as u16;
            s[16..18].copy_from_slice(&total.to_be_bytes());
            let offset = at + part.start as u64;
            s[38..42].copy_from_slice(&Frames::number_at(offset).to_be_bytes());
            s[50..52].fill(0);
            let sum = !fold(kind.transport_sum(&s));
            s[50..52].copy_from_slice(&sum.to_ne_bytes());
            assert!(frames.segment_intact(NetHeader::default(), &s, offset), "segment {i}");
            s[54] ^= 1;
            assert!(!frames.segment_intact(NetHeader::default(), &s, offset), "segment {i}");
        }
    }
}
