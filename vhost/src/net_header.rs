//! The virtio-net header in front of every frame (virtio 1.3, 5.1.6), and which of its claims the negotiated features allow.
//!
//! Here only the structure is judged: unknown or not negotiated kinds of work are refused. Whether the offsets fit the
//! packet's own headers is checked by the dataplane, which parses them.
use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{Gso, Offload};
use ferry_dataplane::port::TxCapabilities;

/// Feature bits as masks (virtio 1.3, 5.1.3 and 6; vhost-user for [`LOG_ALL`](feature::LOG_ALL)).
pub mod feature {
    /// VIRTIO_NET_F_CSUM: the switch takes unfinished checksums.
    pub const CSUM: u64 = 1 << 0;
    /// VIRTIO_NET_F_GUEST_CSUM: the guest takes unfinished checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_GUEST_TSO4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_GUEST_TSO6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// VIRTIO_NET_F_GUEST_ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// VIRTIO_NET_F_HOST_TSO4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_HOST_TSO6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// VIRTIO_NET_F_HOST_ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// VIRTIO_NET_F_MRG_RXBUF: a frame may fill several of the guest's buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// VHOST_F_LOG_ALL: every write to guest memory is logged.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VIRTIO_F_INDIRECT_DESC (VIRTIO_RING_F_INDIRECT_DESC).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX (VIRTIO_RING_F_EVENT_IDX).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_PACKED.
    pub const RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_IN_ORDER.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Longest header, bytes.
pub const MAX_HEADER_BYTES: usize = 12;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Bytes of the header under these features: with VERSION_1 or MRG_RXBUF it includes `num_buffers` (virtio 1.3, 5.1.6.1).
#[inline]
pub fn header_len(features: u64) -> u32 {
    if features & (feature::VERSION_1 | feature::MRG_RXBUF) != 0 { 12 } else { 10 }
}

/// What the guest takes over in frames sent to it.
pub fn capabilities(features: u64) -> TxCapabilities {
    let has = |bit| features & bit != 0;
    // GUEST_TSO4/6 and ECN require GUEST_CSUM, ECN requires one of TSO (5.1.3.1); a guest that ignores this gets the lesser.
    let csum = has(feature::GUEST_CSUM);
    let tso4 = csum && has(feature::GUEST_TSO4);
    let tso6 = csum && has(feature::GUEST_TSO6);
    TxCapabilities { csum, tso4, tso6, ecn: (tso4 || tso6) && has(feature::GUEST_ECN), ..TxCapabilities::default() }
}

/// A header as two little-endian words, so that it travels in registers: a byte array, written in one width and read in
/// another, would stall on store forwarding once per frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawHeader {
    /// `flags`, `gso_type`, `hdr_len`, `gso_size`, `csum_start`.
    pub low: u64,
    /// `csum_offset`, `num_buffers` (not present in a 10-byte header).
    pub high: u32,
}

impl RawHeader {
    /// From the bytes in guest memory.
    pub fn from_bytes(bytes: [u8; MAX_HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Self { low: u64::from_le_bytes([a, b, c, d, e, f, g, h]), high: u32::from_le_bytes([i, j, k, l]) }
    }
    /// As in guest memory.
    pub fn to_bytes(self) -> [u8; MAX_HEADER_BYTES] {
        let [a, b, c, d, e, f, g, h] = self.low.to_le_bytes();
        let [i, j, k, l] = self.high.to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }
}

/// What [`RawHeader::low`] says is owed: 0 is nothing, [`OWED_CHECKSUM`] a checksum, what is above that segmentation of any kind.
#[inline(always)]
pub fn owed(low: u64) -> u64 {
    // NEEDS_CSUM in the first byte, any gso_type in the second.
    low & (u64::from(FLAG_NEEDS_CSUM) | 0xff00)
}
/// See [`owed`]. Whether the guest may ask for it is another question.
pub const OWED_CHECKSUM: u64 = FLAG_NEEDS_CSUM as u64;

/// What [`decode`] makes of a header that owes only a checksum.
#[inline(always)]
pub fn owed_checksum(raw: RawHeader) -> Offload {
    Offload { needs_csum: true, csum_start: (raw.low >> 48) as u16, csum_offset: raw.high as u16, ..Offload::default() }
}

/// Judges the header of a frame from the guest. With a 10-byte header `num_buffers` is not looked at (nor is it with 12 bytes:
/// it means nothing in this direction).
///
/// Refuses ([`DropReason::RxBadOffload`]) work whose feature was not negotiated, and segmentation kinds that are never
/// offered (UFO, UDP_L4). Flags that are not meant for this direction are ignored, as 5.1.6.2.2 demands for unknown ones.
#[inline]
pub fn decode(raw: RawHeader, features: u64) -> Result<Offload, DropReason> {
    if owed(raw.low) == 0 {
        return Ok(Offload::default());
    }
    decode_work(raw, features)
}

#[inline(never)]
fn decode_work(raw: RawHeader, features: u64) -> Result<Offload, DropReason> {
    let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = raw.to_bytes();
    let has = |bit| features & bit != 0;
    let needs_csum = flags & FLAG_NEEDS_CSUM != 0;
    let ecn = gso_type & GSO_ECN != 0;
    let gso = match gso_type & !GSO_ECN {
        GSO_NONE => Gso::None,
        GSO_TCPV4 if has(feature::HOST_TSO4) => Gso::TcpV4,
        GSO_TCPV6 if has(feature::HOST_TSO6) => Gso::TcpV6,
        _ => return Err(DropReason::RxBadOffload),
    };
    let gso_size = u16::from_le_bytes([s0, s1]);
    if (needs_csum && !has(feature::CSUM))
        || (ecn && (gso == Gso::None || !has(feature::HOST_ECN)))
        || (gso != Gso::None && gso_size == 0)
    {
        return Err(DropReason::RxBadOffload);
    }
    let mut offload = Offload { needs_csum, gso, ecn, ..Offload::default() };
    if gso != Gso::None {
        offload.hdr_len = u16::from_le_bytes([h0, h1]);
        offload.gso_size = gso_size;
    }
    if needs_csum {
        offload.csum_start = u16::from_le_bytes([c0, c1]);
        offload.csum_offset = u16::from_le_bytes([o0, o1]);
    }
    Ok(offload)
}

/// What [`encode`] makes of frames without segmentation owed that fill one buffer; `None` of others, and of work that the guest has not agreed
/// to take. `csum`: it takes unfinished checksums.
#[inline(always)]
pub fn encode_simple(offload: &Offload, csum: bool) -> Option<RawHeader> {
    let high = 1 << 16;
    if owes_no_work(offload) {
        return Some(RawHeader { low: 0, high });
    }
    if offload.gso != Gso::None || offload.needs_csum && !csum {
        return None;
    }
    if offload.needs_csum {
        let low = u64::from(FLAG_NEEDS_CSUM) | u64::from(offload.csum_start) << 48;
        return Some(RawHeader { low, high: high | u32::from(offload.csum_offset) });
    }
    Some(RawHeader { low: if csum { u64::from(FLAG_DATA_VALID) } else { 0 }, high })
}

/// The header of a frame with this offload says nothing.
#[inline(always)]
fn owes_no_work(offload: &Offload) -> bool {
    !offload.needs_csum && !offload.csum_valid && offload.gso == Gso::None
}

/// Makes the header of a frame to the guest, which fills `num_buffers` of its buffers. The caller writes as many bytes as
/// [`header_len`] says.
///
/// Refuses ([`DropReason::OffloadFailed`]) work that the guest has not agreed to take: it is finished before, in software.
pub fn encode(offload: &Offload, num_buffers: u16, features: u64) -> Result<RawHeader, DropReason> {
    let high = u32::from(num_buffers) << 16;
    if owes_no_work(offload) {
        return Ok(RawHeader { low: 0, high });
    }
    let mut raw = RawHeader { low: 0, high };
    let can = capabilities(features);
    if offload.needs_csum {
        if !can.csum {
            return Err(DropReason::OffloadFailed);
        }
        raw.low |= u64::from(FLAG_NEEDS_CSUM) | u64::from(offload.csum_start) << 48;
        raw.high |= u32::from(offload.csum_offset);
    } else if offload.csum_valid && can.csum {
        // 5.1.6.4.1: without GUEST_CSUM the flags are zero, and the guest verifies for itself.
        raw.low |= u64::from(FLAG_DATA_VALID);
    }
    let kind = match offload.gso {
        Gso::None => return Ok(raw),
        Gso::TcpV4 if can.tso4 => GSO_TCPV4,
        Gso::TcpV6 if can.tso6 => GSO_TCPV6,
        Gso::TcpV4 | Gso::TcpV6 => return Err(DropReason::OffloadFailed),
    };
    // 5.1.6.4.1: with a segmentation kind NEEDS_CSUM must be set as well.
    if (offload.ecn && !can.ecn) || !offload.needs_csum {
        return Err(DropReason::OffloadFailed);
    }
    let kind = if offload.ecn { kind | GSO_ECN } else { kind };
    raw.low |= u64::from(kind) << 8 | u64::from(offload.hdr_len) << 16 | u64::from(offload.gso_size) << 32;
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use feature::*;

    const ALL_HOST: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | VERSION_1;
    const ALL_GUEST: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | VERSION_1;

    #[test]
    fn header_length_follows_the_features() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(MRG_RXBUF), 12);
        assert_eq!(header_len(VERSION_1), 12);
    }

    #[test]
    fn a_tso_frame_survives_the_way_through() {
        for (gso, ecn) in [(Gso::TcpV4, false), (Gso::TcpV6, true)] {
            let offload = Offload {
                needs_csum: true,
                csum_valid: false,
                gso,
                ecn,
                hdr_len: 66,
                gso_size: 1448,
                csum_start: 34,
                csum_offset: 16,
            };
            let raw = encode(&offload, 3, ALL_GUEST).unwrap();
            assert_eq!(raw.to_bytes(), [1, if ecn { 0x84 } else { 1 }, 66, 0, 0xa8, 5, 34, 0, 16, 0, 3, 0]);
            assert_eq!(RawHeader::from_bytes(raw.to_bytes()), raw);
            assert_eq!(decode(raw, ALL_HOST).unwrap(), offload);
        }
    }

    #[test]
    fn nothing_passes_that_was_not_negotiated() {
        let bad = Err(DropReason::RxBadOffload);
        let with = |flags, gso, size| RawHeader::from_bytes([flags, gso, 0, 0, size, 0, 14, 0, 16, 0, 0, 0]);
        assert_eq!(decode(with(1, 0, 0), ALL_HOST & !CSUM), bad);
        assert_eq!(decode(with(1, 1, 9), ALL_HOST & !HOST_TSO4), bad);
        assert_eq!(decode(with(1, 4, 9), ALL_HOST & !HOST_TSO6), bad);
        assert_eq!(decode(with(1, 0x81, 9), ALL_HOST & !HOST_ECN), bad);
        assert_eq!(decode(with(1, 0x80, 9), ALL_HOST), bad, "ECN without TCP");
        assert_eq!(decode(with(1, 1, 0), ALL_HOST), bad, "segments of no bytes");
        for kind in [2, 3, 5, 6, 0x7f] {
            assert_eq!(decode(with(1, kind, 9), ALL_HOST), bad, "kind {kind}");
        }
        assert_eq!(
            decode(with(2, 0, 9), ALL_HOST),
            Ok(Offload::default()),
            "DATA_VALID from a guest vouches for nothing"
        );

        let csum = Offload { needs_csum: true, ..Offload::default() };
        assert_eq!(encode(&csum, 1, ALL_GUEST & !GUEST_CSUM), Err(DropReason::OffloadFailed));
        let tso = Offload { needs_csum: true, gso: Gso::TcpV4, gso_size: 9, ..Offload::default() };
        assert_eq!(encode(&tso, 1, ALL_GUEST & !GUEST_TSO4), Err(DropReason::OffloadFailed));
        assert_eq!(encode(&tso, 1, ALL_GUEST & !GUEST_CSUM), Err(DropReason::OffloadFailed));
        assert_eq!(encode(&Offload { ecn: true, ..tso }, 1, ALL_GUEST & !GUEST_ECN), Err(DropReason::OffloadFailed));
        let valid = Offload { csum_valid: true, ..Offload::default() };
        assert_eq!(encode(&valid, 1, VERSION_1).unwrap().to_bytes()[0], 0);
        assert_eq!(encode(&valid, 1, ALL_GUEST).unwrap().to_bytes()[0], FLAG_DATA_VALID);
    }

    #[test]
    fn the_short_ways_agree_with_the_long_ones() {
        let some = [false, true];
        for (needs_csum, csum_valid, gso, csum) in some
            .iter()
            .flat_map(|&n| some.map(|v| (n, v)))
            .flat_map(|(n, v)| [Gso::None, Gso::TcpV4].map(|g| (n, v, g)))
            .flat_map(|(n, v, g)| some.map(|c| (n, v, g, c)))
        {
            let offload = Offload {
                needs_csum,
                csum_valid,
                gso,
                gso_size: 1,
                csum_start: 14,
                csum_offset: 6,
                ..Offload::default()
            };
            let features = if csum { ALL_GUEST } else { ALL_GUEST & !GUEST_CSUM };
            let want = encode(&offload, 1, features).ok().filter(|_| gso == Gso::None);
            assert_eq!(encode_simple(&offload, csum), want, "{offload:?} {csum}");
        }
        for flags in 0..=255 {
            for gso in [0, 1, 4, 0x80, 0xff] {
                let raw = RawHeader::from_bytes([flags, gso, 9, 9, 9, 9, 14, 1, 16, 2, 7, 7]);
                let long = decode(raw, ALL_HOST);
                assert_eq!(owed(raw.low) == 0, long == Ok(Offload::default()), "{flags} {gso}");
                let only_checksum = flags & FLAG_NEEDS_CSUM != 0 && gso == 0;
                assert_eq!(owed(raw.low) == OWED_CHECKSUM, only_checksum, "{flags} {gso}");
                assert!(!only_checksum || long == Ok(owed_checksum(raw)), "{flags} {gso}");
                assert_eq!(owed(raw.low) > OWED_CHECKSUM, gso != 0, "{flags} {gso}");
            }
        }
    }

    #[test]
    fn capabilities_need_the_checksum_feature() {
        assert_eq!(capabilities(GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN), TxCapabilities::default());
        let all = capabilities(ALL_GUEST);
        assert!(all.csum && all.tso4 && all.tso6 && all.ecn);
    }
}
