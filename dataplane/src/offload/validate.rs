//! Checks what a virtio-net header claims about a frame (virtio 1.3, 5.1.6.2), before anything relies on it.
//!
//! A guest's claims are hostile until checked: whoever finishes a checksum later, in this switch or in the receiving guest,
//! stores two bytes at `csum_start + csum_offset`. So that place must never lie in headers on which a decision was
//! taken (addresses, ports): it is the transport header's own checksum field, or lies in the payload.
use super::checksum::checksum_offset;
use crate::frame::{Gso, MAX_FRAME_BYTES, Offload};
use crate::packet::{Fragment, Headers, IpProto, L3, ParseError, ethernet, parse, tcp};

/// Why a frame's offload claims were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadOffload {
    /// The snapshot is too short to tell: enlarge it to `bytes` and ask again (give up when it cannot hold as many).
    #[error("header copy too short: {bytes} bytes needed")]
    NeedMore {
        /// Least snapshot length needed.
        bytes: u32,
    },
    /// The frame is longer than [`MAX_FRAME_BYTES`].
    #[error("frame longer than any can be")]
    TooLong,
    /// Work is owed on a frame with malformed headers.
    #[error("offload on malformed headers: {0}")]
    Headers(ParseError),
    /// `csum_start` lies in the Ethernet header, or the checksum beyond the frame.
    #[error("checksum outside the frame")]
    ChecksumOutside,
    /// The checksum would overwrite a header field, or is not where the protocol has it.
    #[error("checksum is not at the transport header's checksum field")]
    ChecksumMisplaced,
    /// A checksum is owed on a fragment: it would cover another packet's bytes.
    #[error("checksum owed on a fragment")]
    ChecksumOnFragment,
    /// Segmentation without NEEDS_CSUM (virtio 1.3, 5.1.6.2.1).
    #[error("segmentation without checksum offload")]
    GsoWithoutChecksum,
    /// The frame is not what the segmentation type says.
    #[error("segmentation type does not match the headers")]
    GsoMismatch,
    /// The segment size is zero or larger than a packet.
    #[error("segment size out of range")]
    GsoSize,
    /// The IP length does not match the frame's length.
    #[error("packet to be segmented has padding")]
    GsoLength,
}

impl From<ParseError> for BadOffload {
    fn from(error: ParseError) -> Self {
        match error {
            ParseError::NeedMore { bytes } => Self::NeedMore { bytes },
            other => Self::Headers(other),
        }
    }
}

/// Checks `offload`, claimed for the frame of `frame_len` bytes that begins with `snapshot`, and returns what holds:
/// `hdr_len` recomputed for frames to be segmented (0 otherwise), segmentation dropped when the frame is one segment
/// anyway, unused fields zeroed, and `csum_valid` cleared, since a sender's word about its own checksum is worth nothing.
///
/// Headers are only parsed when work is owed. The result's fields are in bounds of frame and snapshot: with `needs_csum`,
/// `csum_start + csum_offset + 2 <= snapshot.len()`.
///
/// # Errors
/// See [`BadOffload`]; a frame refused must be dropped.
#[inline]
pub fn validate(offload: &Offload, snapshot: &[u8], frame_len: u32) -> Result<Offload, BadOffload> {
    if frame_len > MAX_FRAME_BYTES {
        return Err(BadOffload::TooLong);
    }
    if !offload.needs_csum {
        return if offload.gso == Gso::None { Ok(Offload::default()) } else { Err(BadOffload::GsoWithoutChecksum) };
    }
    let headers = parse(snapshot, frame_len)?;
    validate_parsed(offload, &headers, snapshot.len(), frame_len)
}

/// [`validate`] for a frame whose headers were parsed already, from a snapshot of `snapshot_len` bytes.
///
/// # Errors
/// As [`validate`].
#[inline]
pub fn validate_parsed(
    offload: &Offload,
    headers: &Headers,
    snapshot_len: usize,
    frame_len: u32,
) -> Result<Offload, BadOffload> {
    if frame_len > MAX_FRAME_BYTES {
        return Err(BadOffload::TooLong);
    }
    if !offload.needs_csum {
        return if offload.gso == Gso::None { Ok(Offload::default()) } else { Err(BadOffload::GsoWithoutChecksum) };
    }
    check_checksum(offload, headers, snapshot_len, frame_len)?;
    let plain = Offload {
        needs_csum: true,
        csum_start: offload.csum_start,
        csum_offset: offload.csum_offset,
        ..Offload::default()
    };
    if offload.gso == Gso::None { Ok(plain) } else { check_gso(offload, headers, frame_len, plain) }
}

fn check_checksum(offload: &Offload, headers: &Headers, snapshot_len: usize, frame_len: u32) -> Result<(), BadOffload> {
    let start = u32::from(offload.csum_start);
    let field = start + u32::from(offload.csum_offset);
    if start < ethernet::HEADER_BYTES as u32 || field + 2 > frame_len {
        return Err(BadOffload::ChecksumOutside);
    }
    // Where bytes begin that the switch never looks at.
    let opaque = match headers.l3 {
        L3::Arp { .. } => return Err(BadOffload::ChecksumMisplaced),
        L3::None => u32::from(headers.l2.len),
        L3::Ipv4 { .. } | L3::Ipv6 { .. } => {
            if headers.fragment != Fragment::None {
                return Err(BadOffload::ChecksumOnFragment);
            }
            // A whole packet always has an L4.
            let l4 = headers.l4.ok_or(BadOffload::ChecksumMisplaced)?;
            if offload.csum_start == l4.offset && checksum_offset(l4.proto) == Some(offload.csum_offset) {
                return Ok(());
            }
            // The inner packet of a guest's own tunnel (VXLAN, Geneve, GRE, IP in IP) may be meant. Other protocols carry none,
            // and ICMP's payload is looked at: neighbour discovery targets, inner packets of errors.
            if l4.proto != IpProto::UDP && l4.header_len != 0 {
                return Err(BadOffload::ChecksumMisplaced);
            }
            l4.payload_offset()
        }
    };
    if start < opaque {
        return Err(BadOffload::ChecksumMisplaced);
    }
    if field as usize + 2 > snapshot_len {
        return Err(BadOffload::NeedMore { bytes: field + 2 });
    }
    Ok(())
}

fn check_gso(offload: &Offload, headers: &Headers, frame_len: u32, plain: Offload) -> Result<Offload, BadOffload> {
    let l4 = headers.l4.filter(|l4| l4.proto == IpProto::TCP).ok_or(BadOffload::GsoMismatch)?;
    match (offload.gso, headers.l3) {
        (Gso::TcpV4, L3::Ipv4 { .. }) | (Gso::TcpV6, L3::Ipv6 { .. }) => {}
        _ => return Err(BadOffload::GsoMismatch),
    }
    if offload.csum_start != l4.offset || offload.csum_offset != tcp::CHECKSUM_OFFSET {
        return Err(BadOffload::ChecksumMisplaced);
    }
    if headers.l3_end() != frame_len {
        return Err(BadOffload::GsoLength);
    }
    let hdr_len = l4.payload_offset();
    // A segment must be a packet: its IP length fits its field.
    let l3_headers_len = hdr_len - u32::from(headers.l2.len);
    if offload.gso_size == 0 || l3_headers_len + u32::from(offload.gso_size) > 65_535 {
        return Err(BadOffload::GsoSize);
    }
    if frame_len - hdr_len <= u32::from(offload.gso_size) {
        return Ok(plain);
    }
    Ok(Offload { gso: offload.gso, ecn: offload.ecn, hdr_len: hdr_len as u16, gso_size: offload.gso_size, ..plain })
}
