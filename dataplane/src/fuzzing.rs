//! Fuzz entry points: each takes arbitrary bytes and asserts what must hold for any input. Called by the cargo-fuzz targets in
//! `dataplane/fuzz`, and by a short deterministic test below. They panic when an invariant is broken: not for the packet path.
#![allow(unsafe_code)] // Bursts over private buffers are built here, through the same unsafe door that ports use.
use crate::frame::{Body, Gso, MAX_FRAME_BYTES, Offload, RxBurst, SNAPSHOT_BYTES};
use crate::offload::checksum::{Verdict, verify_l4};
use crate::offload::{
    REWRITE_BYTES, SegmentChecksum, Segmenter, VlanAction, finish_checksum, rewrite_l2, validate, validate_parsed,
};
use crate::packet::ethernet::Ethernet;
use crate::packet::icmp::Icmp;
use crate::packet::ipv4::Ipv4;
use crate::packet::ipv6::Ipv6;
use crate::packet::sctp::Sctp;
use crate::packet::tcp::{Flags, Tcp};
use crate::packet::udp::Udp;
use crate::packet::{
    Fragment, Headers, IpProto, L3, ParseError, Tci, VlanTag, arp::Arp, flow_hash, parse as parse_headers, parse_l2,
};

/// A frame in private memory, cut into pieces as a guest's descriptors might be.
pub struct OwnedFrame {
    burst: RxBurst,
    // Pointed into by `burst`; never touched while it lives.
    _bytes: Box<[u8]>,
}

impl OwnedFrame {
    /// A frame of `bytes` whose pieces end at multiples of `piece_len` (0: one piece).
    pub fn new(bytes: &[u8], piece_len: usize) -> Self {
        let bytes: Box<[u8]> = bytes.into();
        let mut burst = RxBurst::new();
        let mark = burst.segment_mark();
        let piece_len = if piece_len == 0 { bytes.len().max(1) } else { piece_len };
        for piece in bytes.chunks(piece_len) {
            // SAFETY: the bytes live on the heap as long as this value, whose burst is dropped with it, and nobody changes them.
            unsafe { burst.push_segment(piece.as_ptr(), piece.len() as u32) };
        }
        assert!(burst.finish_frame(mark, Offload::default()));
        Self { burst, _bytes: bytes }
    }

    /// The bytes from `skip` on.
    pub fn body(&self, skip: u32) -> Body<'_> {
        self.burst.body(0, skip)
    }
}

/// The internet checksum's sum (not complemented), word by word as RFC 1071 has it.
pub fn reference_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += match *pair {
            [a, b] => u32::from(u16::from_be_bytes([a, b])),
            [a] => u32::from(u16::from_be_bytes([a, 0])),
            _ => 0,
        };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the pseudo-header, from its bytes.
pub fn reference_pseudo_sum(frame: &[u8], headers: &Headers) -> Option<u16> {
    let l4 = headers.l4?;
    let len = headers.l3_end() - u32::from(l4.offset);
    let mut bytes = match headers.l3 {
        L3::Ipv4 { offset } => frame.get(usize::from(offset) + 12..usize::from(offset) + 20)?.to_vec(),
        L3::Ipv6 { offset } => frame.get(usize::from(offset) + 8..usize::from(offset) + 40)?.to_vec(),
        _ => return None,
    };
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, l4.proto.0]);
    Some(reference_sum(&bytes))
}

/// Equal as one's complement numbers: 0 and 0xffff are the same.
fn same_sum(a: u16, b: u16) -> bool {
    a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0)
}

/// Splits `N` bytes of parameters off the input; missing ones are 0.
fn parameters<const N: usize>(data: &[u8]) -> ([u8; N], &[u8]) {
    let (taken, rest) = data.split_at(data.len().min(N));
    let mut out = [0; N];
    out.iter_mut().zip(taken).for_each(|(to, from)| *to = *from);
    (out, rest)
}

/// Header parsing. Input: two bytes of parameters (bytes of the frame beyond the snapshot; where to cut it), then the snapshot.
pub fn parse(data: &[u8]) {
    let ([beyond, cut], snapshot) = parameters::<2>(data);
    let frame_len = snapshot.len() as u32 + u32::from(beyond);
    let l2 = parse_l2(snapshot, frame_len);
    let parsed = parse_headers(snapshot, frame_len);
    let hash = flow_hash(snapshot);
    match parsed {
        Ok(headers) => {
            check_headers(snapshot, frame_len, &headers);
            assert_eq!(l2, Ok(headers.l2));
            assert_eq!(headers.flow_hash(snapshot), hash);
            // Asked with the same bytes and a longer frame, the answer differs only by what padding means: not at all.
            assert_eq!(parse_headers(snapshot, frame_len + 1), parsed);
        }
        Err(ParseError::NeedMore { bytes }) => {
            assert!(bytes as usize > snapshot.len(), "asks for what it has");
            assert!(bytes <= frame_len, "asks for more than there is");
        }
        Err(_) => {}
    }
    // Fewer bytes never change the answer: they only postpone it.
    let cut = usize::from(cut) * snapshot.len() / 256;
    let prefix = snapshot.get(..cut).unwrap_or_default();
    match parse_headers(prefix, frame_len) {
        Err(ParseError::NeedMore { bytes }) => assert!(bytes as usize > cut && bytes <= frame_len),
        other => assert_eq!(other, parsed),
    }
    // A frame that ends there is another one, but must not be waited for.
    if let Err(error) = parse_headers(prefix, cut as u32) {
        assert!(!error.is_need_more());
    }
    views(snapshot);
}

fn check_headers(snapshot: &[u8], frame_len: u32, headers: &Headers) {
    assert!(matches!(headers.l2.len, 14 | 18 | 22));
    assert!(headers.l3_end() <= frame_len);
    let at = |offset: u16| snapshot.get(usize::from(offset)..).unwrap_or_default();
    match headers.l3 {
        L3::None => assert!(headers.l4.is_none() && headers.l3_total_len == 0),
        L3::Arp { offset } => assert!(Arp::new(at(offset)).is_ok()),
        L3::Ipv4 { offset } => {
            let ip = Ipv4::new(at(offset));
            assert!(ip.is_ok());
            if let Ok(ip) = ip {
                assert_eq!(u32::from(ip.total_len()), headers.l3_total_len);
                assert_eq!(ip.proto(), headers.ip_proto);
                assert_eq!(ip.is_fragment(), headers.fragment != Fragment::None);
                if let Some(l4) = headers.l4 {
                    assert_eq!(usize::from(l4.offset), usize::from(offset) + ip.header_len());
                }
            }
        }
        L3::Ipv6 { offset } => {
            let upper = Ipv6::new(at(offset)).and_then(|ip| ip.walk());
            assert!(upper.is_ok());
            if let Ok(upper) = upper {
                assert_eq!(upper.proto, headers.ip_proto);
                assert_eq!(upper.fragment.map_or(Fragment::None, |f| f.kind()), headers.fragment);
                if let Some(l4) = headers.l4 {
                    assert_eq!(u32::from(l4.offset), u32::from(offset) + upper.offset);
                }
            }
        }
    }
    assert_eq!(headers.l4.is_none(), headers.fragment == Fragment::Later || headers.ip_proto_absent());
    let Some(l4) = headers.l4 else { return };
    assert_eq!(l4.proto, headers.ip_proto);
    assert!(l4.payload_offset() <= headers.l3_end());
    assert!(l4.payload_offset() as usize <= snapshot.len());
    let header_len = usize::from(l4.header_len);
    match l4.proto {
        IpProto::TCP => assert_eq!(Tcp::new(at(l4.offset)).map(|t| t.header_len()), Ok(header_len)),
        IpProto::UDP => assert!(Udp::new(at(l4.offset)).is_ok()),
        IpProto::ICMP | IpProto::ICMPV6 => assert!(Icmp::new(at(l4.offset)).is_ok()),
        IpProto::SCTP => assert!(Sctp::new(at(l4.offset)).is_ok()),
        _ => assert_eq!(header_len, 0),
    }
}

impl Headers {
    fn ip_proto_absent(&self) -> bool {
        matches!(self.l3, L3::None | L3::Arp { .. })
    }
}

/// All views over the same bytes: iterators end, and never yield more than there is.
fn views(bytes: &[u8]) {
    let _ = Ethernet::new(bytes).map(|e| (e.dst(), e.src(), e.ethertype(), e.payload().len()));
    if let Ok(ip) = Ipv4::new(bytes) {
        assert!(ip.options_iter().count() <= ip.options().len());
        let _ = ip.checksum_ok();
    }
    if let Ok(tcp) = Tcp::new(bytes) {
        assert!(tcp.options_iter().count() <= tcp.options().len());
    }
    if let Ok(sctp) = Sctp::new(bytes) {
        assert!(sctp.chunks().count() <= bytes.len());
    }
    if let Ok(ip) = Ipv6::new(bytes) {
        let _ = ip.walk();
    }
    if let Ok(icmp) = Icmp::new(bytes) {
        for inner in [icmp.inner_v4(), icmp.inner_v6()].into_iter().flatten().flatten() {
            assert!(inner.l4.len() <= bytes.len());
            let _ = inner.ports();
        }
        if let Some(Ok(nd)) = icmp.nd() {
            assert!(nd.options().count() <= bytes.len());
            let _ = (nd.target(), nd.link_layer_address());
        }
    }
}

/// Offload claims, their software completion and VLAN edits. Input: eight bytes of claims, two of parameters (length of the pieces in
/// port memory, length of the snapshot), then the frame.
pub fn offload(data: &[u8]) {
    check_offload(data);
}

/// How far a claim got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// Refused, or longer than any frame.
    Refused,
    /// Nothing was owed.
    Plain,
    /// The checksum was finished.
    Finished,
    /// Refused by the segmenter.
    NotSegmented,
    /// Segmented; `true`: the pseudo-header's sum was right, so that the segments' checksums could be verified.
    Segmented(bool),
}

fn check_offload(data: &[u8]) -> Reached {
    let ([flags, kind, size_hi, size_lo, start, offset, start_hi, piece_len, taken, fix], frame) =
        parameters::<10>(data);
    if frame.len() > MAX_FRAME_BYTES as usize {
        return Reached::Refused;
    }
    let claim = Offload {
        needs_csum: flags & 1 != 0,
        csum_valid: flags & 2 != 0,
        ecn: flags & 4 != 0,
        gso: match kind & 3 {
            1 => Gso::TcpV4,
            2 => Gso::TcpV6,
            _ => Gso::None,
        },
        hdr_len: u16::from(flags) << 4,
        gso_size: u16::from_be_bytes([size_hi, size_lo]),
        csum_start: u16::from_be_bytes([start_hi & 1, start]),
        csum_offset: u16::from(offset),
    };
    let mut frame = frame.to_vec();
    let frame_len = frame.len() as u32;
    let mut claim = claim;
    if fix & 3 != 0
        && let Ok(headers) = parse_headers(&frame, frame_len)
        && let Some(l4) = headers.l4
        && let Some(at) = crate::offload::checksum::checksum_offset(l4.proto)
    {
        // What an honest sender would claim, so that the deeper half is reached.
        claim.needs_csum = true;
        claim.csum_start = l4.offset;
        claim.csum_offset = at;
        let field = usize::from(l4.offset + at);
        if fix & 1 != 0
            && let (Some(sum), Some(to)) = (reference_pseudo_sum(&frame, &headers), frame.get_mut(field..field + 2))
        {
            // ICMP has no pseudo-header.
            let sum = if l4.proto == IpProto::ICMP { 0 } else { sum };
            to.copy_from_slice(&sum.to_be_bytes());
        }
    }
    let snapshot_len = usize::from(taken).clamp(64, SNAPSHOT_BYTES).min(frame.len());
    let (snapshot, _) = frame.split_at(snapshot_len);
    let result = validate(&claim, snapshot, frame_len);
    if let Ok(headers) = parse_headers(snapshot, frame_len) {
        assert_eq!(result, validate_parsed(&claim, &headers, snapshot.len(), frame_len));
        vlan_round_trip(snapshot, &headers, result.unwrap_or_default());
    }
    let Ok(sound) = result else { return Reached::Refused };
    assert!(!sound.csum_valid);
    if !sound.needs_csum {
        assert_eq!(sound, Offload::default());
        return Reached::Plain;
    }
    let field = usize::from(sound.csum_start) + usize::from(sound.csum_offset);
    assert!(sound.csum_start >= 14 && field + 2 <= snapshot.len());
    let owned = OwnedFrame::new(&frame, usize::from(piece_len));
    let body = owned.body(snapshot.len() as u32);
    if sound.gso == Gso::None {
        check_finish(&frame, snapshot, body, sound);
        Reached::Finished
    } else {
        check_segments(&frame, snapshot, body, &sound)
    }
}

fn check_finish(frame: &[u8], snapshot: &[u8], body: Body<'_>, sound: Offload) {
    let field = usize::from(sound.csum_start) + usize::from(sound.csum_offset);
    let mut head = snapshot.to_vec();
    let mut owed = sound;
    assert!(finish_checksum(&mut head, body, &mut owed));
    assert!(!owed.needs_csum);
    // Only the field changed, and the checksum is the complement of the sum with the field's former value.
    let mut expected = frame.to_vec();
    let sum = reference_sum(expected.get(usize::from(sound.csum_start)..).unwrap_or_default());
    let stored = expected.get_mut(field..field + 2);
    assert!(stored.is_some());
    if let Some(stored) = stored {
        let checksum = match !sum {
            0 if sound.csum_offset == 6 => 0xffff,
            other => other,
        };
        stored.copy_from_slice(&checksum.to_be_bytes());
    }
    assert_eq!(expected.get(..head.len()), Some(head.as_slice()));
}

fn check_segments(frame: &[u8], snapshot: &[u8], body: Body<'_>, sound: &Offload) -> Reached {
    let Ok(headers) = parse_headers(snapshot, frame.len() as u32) else { return Reached::NotSegmented };
    let Ok(mut finished) = Segmenter::new(snapshot, &headers, body, sound, SegmentChecksum::Finish) else {
        return Reached::NotSegmented;
    };
    let mut partial = finished.clone_for(SegmentChecksum::Partial);
    let pseudo_true = match (headers.l4, reference_pseudo_sum(frame, &headers)) {
        (Some(l4), Some(sum)) => {
            let at = usize::from(l4.offset) + 16;
            frame.get(at..at + 2).is_some_and(|f| same_sum(reference_sum(f), sum))
        }
        _ => false,
    };
    let hdr_len = usize::from(sound.hdr_len);
    let whole = Tcp::new(frame.get(usize::from(sound.csum_start)..).unwrap_or_default());
    assert!(whole.is_ok());
    let Ok(whole) = whole else { return Reached::NotSegmented };
    let mut payload = Vec::new();
    let mut count = 0;
    let mut buffer = [0u8; SNAPSHOT_BYTES];
    let mut second = [0u8; SNAPSHOT_BYTES];
    while let Some(segment) = finished.next_segment(&mut buffer) {
        let mut bytes = buffer.get(..segment.head_len).unwrap_or_default().to_vec();
        let head_len = bytes.len();
        bytes.resize(head_len + segment.body.len() as usize, 0);
        let copied = segment.body.read(bytes.get_mut(head_len..).unwrap_or_default());
        assert_eq!(copied, segment.body.len() as usize);
        assert_eq!(segment.offload, Offload::default());

        let parsed = parse_headers(&bytes, bytes.len() as u32);
        assert!(parsed.is_ok(), "segment {count}: {parsed:?}");
        let Ok(parsed) = parsed else { return Reached::NotSegmented };
        assert_eq!(parsed.l2, headers.l2);
        assert_eq!(parsed.l4, headers.l4);
        assert_eq!(parsed.l3_end() as usize, bytes.len());
        if let L3::Ipv4 { offset } = parsed.l3 {
            let ip = Ipv4::new(bytes.get(usize::from(offset)..).unwrap_or_default());
            let first = Ipv4::new(frame.get(usize::from(offset)..).unwrap_or_default());
            assert!(ip.is_ok_and(|ip| ip.checksum_ok()));
            if let (Ok(ip), Ok(first)) = (ip, first) {
                assert_eq!(ip.identification(), first.identification().wrapping_add(count));
            }
        }
        let tcp_bytes = bytes.get(usize::from(sound.csum_start)..).unwrap_or_default();
        let Ok(tcp) = Tcp::new(tcp_bytes) else { return Reached::NotSegmented };
        assert_eq!(tcp.seq(), whole.seq().wrapping_add(payload.len() as u32));
        let last = usize::from(count) + 1 == finished.segments();
        let mut flags = whole.flags();
        if count != 0 {
            flags.remove(Flags::CWR);
        }
        if !last {
            flags.remove(Flags::FIN | Flags::PSH);
            assert_eq!(tcp.payload().len(), usize::from(sound.gso_size));
        }
        assert_eq!(tcp.flags(), flags);
        if pseudo_true {
            let pseudo = reference_pseudo_sum(&bytes, &parsed).unwrap_or_default();
            let sum = u32::from(pseudo) + u32::from(reference_sum(tcp_bytes));
            assert!(sum == 0xffff || (sum & 0xffff) + (sum >> 16) == 0xffff, "segment {count}: checksum");
            let verdict = verify_l4(&parsed, &bytes, &Body::EMPTY);
            assert_ne!(verdict, Verdict::Invalid);
        }
        payload.extend_from_slice(tcp.payload());

        // With the checksum left to the output, finishing it there gives the same bytes.
        let owed = partial.next_segment(&mut second);
        assert!(owed.is_some());
        if let Some(mut owed) = owed {
            let head = second.get_mut(..owed.head_len).unwrap_or_default();
            assert!(owed.offload.needs_csum);
            assert!(finish_checksum(head, owed.body, &mut owed.offload));
            assert_eq!(Some(&*head), bytes.get(..head_len));
        }
        count += 1;
    }
    assert_eq!(usize::from(count), finished.segments());
    assert!(partial.next_segment(&mut second).is_none());
    assert_eq!(Some(payload.as_slice()), frame.get(hdr_len..));
    Reached::Segmented(pseudo_true)
}

fn vlan_round_trip(snapshot: &[u8], headers: &Headers, before: Offload) {
    let mut offload = before;
    let mut tagged = [0u8; REWRITE_BYTES];
    let tag = VlanTag::customer(Tci(0xa00f));
    let len = rewrite_l2(snapshot, &headers.l2, &mut tagged, VlanAction::Push(tag), &mut offload);
    assert_eq!(len, Some(snapshot.len() + 4));
    let tagged = tagged.get(..len.unwrap_or_default()).unwrap_or_default();
    let l2 = parse_l2(tagged, tagged.len() as u32 + 1);
    assert!(l2.is_ok());
    let Ok(l2) = l2 else { return };
    assert_eq!(l2.vlan, Some(tag));
    if before.needs_csum {
        assert_eq!(offload.csum_start, before.csum_start + 4);
    }
    // Popping needs a snapshot's length: nothing is lost when there is room.
    if tagged.len() <= SNAPSHOT_BYTES {
        let mut back = [0u8; REWRITE_BYTES];
        let len = rewrite_l2(tagged, &l2, &mut back, VlanAction::Pop, &mut offload);
        assert_eq!(back.get(..len.unwrap_or_default()), Some(snapshot));
        assert_eq!(offload, before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testdata::{SAMPLES, TCP4_GSO, TCP6_GSO, hex};

    struct XorShift(u64);
    impl XorShift {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
        fn below(&mut self, n: usize) -> usize {
            (self.next() % n.max(1) as u64) as usize
        }
    }

    /// A valid frame with a few changes: the kind of input that gets past the first checks.
    fn mutate(rng: &mut XorShift, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut frame = seeds[rng.below(seeds.len())].clone();
        for _ in 0..rng.below(4) {
            // Headers are where it matters.
            let at = rng.below(frame.len().min(90));
            frame[at] = match rng.below(3) {
                0 => rng.next() as u8,
                1 => frame[at] ^ (1 << rng.below(8)),
                _ => [0, 1, 0x0f, 0x45, 0x7f, 0x80, 0xff, 6, 17, 44, 60][rng.below(11)],
            };
        }
        match rng.below(8) {
            0 => frame.truncate(1 + rng.below(frame.len())),
            1 => frame.extend(std::iter::repeat_n(0x5a, rng.below(40))),
            _ => {}
        }
        frame
    }

    #[test]
    fn mutated_frames_keep_every_invariant() {
        let mut seeds: Vec<Vec<u8>> = SAMPLES.iter().map(|s| s.bytes()).collect();
        seeds.extend([TCP4_GSO, TCP6_GSO].map(hex));
        // Long enough for more segments than allowed.
        let mut long = hex(TCP4_GSO);
        long.extend([3; 300]);
        let total = (long.len() - 18) as u16;
        long[20..22].copy_from_slice(&total.to_be_bytes());
        seeds.push(long);
        let gso_at = seeds.len() - 3;
        let mut rng = XorShift(0x5eed_f00d_1234_5678);
        for _ in 0..100_000 {
            let frame = mutate(&mut rng, &seeds);
            let mut data = vec![rng.next() as u8, rng.next() as u8];
            data.extend(&frame);
            parse(&data);
        }
        let mut reached = std::collections::BTreeMap::<String, u32>::new();
        for i in 0..100_000u32 {
            let gso = i % 2 == 0;
            let frame = mutate(&mut rng, if gso { &seeds[gso_at..] } else { &seeds });
            let mut data: Vec<u8> = (0..10).map(|_| rng.next() as u8).collect();
            data[1] = if gso { 1 + (rng.next() & 1) as u8 } else { (rng.next() & 7 == 0) as u8 };
            data[2] = 0;
            data[3] &= 0x3f;
            data[9] = [0, 1, 1, 2][rng.below(4)];
            data.extend(&frame);
            *reached.entry(format!("{:?}", check_offload(&data))).or_default() += 1;
        }
        // The run is worth something only when every branch is reached often.
        for (kind, least) in [
            ("Refused", 1000),
            ("Plain", 1000),
            ("Finished", 1000),
            ("NotSegmented", 100),
            ("Segmented(true)", 1000),
            ("Segmented(false)", 1000),
        ] {
            assert!(reached.get(kind).is_some_and(|n| *n >= least), "{kind}: {reached:?}");
        }
    }

    #[test]
    fn arbitrary_bytes_keep_every_invariant() {
        let mut rng = XorShift(42);
        for _ in 0..20_000 {
            let data: Vec<u8> = (0..rng.below(300)).map(|_| rng.next() as u8).collect();
            parse(&data);
            offload(&data);
        }
    }
}
