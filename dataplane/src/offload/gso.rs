//! Software segmentation of large TCP frames (TSO), for outputs that cannot.
use super::checksum::Sum;
use crate::frame::{Body, Gso, Offload};
use crate::packet::ipv4::{Ipv4, Ipv4Mut};
use crate::packet::ipv6::{self, Ipv6Mut};
use crate::packet::tcp::{self, Flags, Tcp, TcpMut};
use crate::packet::{Headers, IpProto, L3, chunk_mut};

/// Most segments one frame is cut into: bounds the work that a guest can cause with one frame.
pub const MAX_GSO_SEGMENTS: usize = 128;

/// Why a frame cannot be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GsoError {
    /// No segmentation is owed, or not of what the headers show: [`validate`](super::validate()) was not asked.
    #[error("headers and offload do not describe a TCP frame to be segmented")]
    Mismatch,
    /// The headers do not lie wholly in `head`.
    #[error("headers not wholly at hand")]
    HeadTooShort,
    /// More than [`MAX_GSO_SEGMENTS`] segments.
    #[error("too many segments")]
    TooManySegments,
}

/// What becomes of the segments' TCP checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentChecksum {
    /// Computed here.
    Finish,
    /// Left to the output: the field holds the pseudo-header's sum, `needs_csum` stays set.
    Partial,
}

/// One segment: the first `head_len` bytes of the buffer given to [`Segmenter::next_segment`], then `body`.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Bytes written to the buffer: headers, and payload that lay in the frame's head.
    pub head_len: usize,
    /// What follows, in port memory.
    pub body: Body<'a>,
    /// Work still owed to this segment.
    pub offload: Offload,
}

/// Cuts one TCP/IPv4 or TCP/IPv6 frame into segments, without allocation.
///
/// IPv4 identification counts up, lengths and the IPv4 header checksum are set; sequence numbers advance; FIN and PSH stay on the
/// last segment alone and CWR on the first alone (RFC 3168, 6.1.2). TCP checksums are derived from the pseudo-header
/// sum in the frame (its length exchanged), which holds with IPv6 routing headers too.
#[derive(Debug)]
pub struct Segmenter<'a> {
    head: &'a [u8],
    body: Body<'a>,
    l3: L3,
    l4_offset: usize,
    /// All headers, bytes.
    hdr_len: usize,
    /// Payload of the whole frame, bytes.
    payload_len: u32,
    gso_size: u32,
    /// Payload bytes already given out.
    done: u32,
    index: u16,
    count: u16,
    seq: u32,
    identification: u16,
    flags: Flags,
    /// Sum of the pseudo-header without its length.
    pseudo: Sum,
    checksum: SegmentChecksum,
}

impl<'a> Segmenter<'a> {
    /// Prepares to cut the frame that consists of `head` and `body`. `headers` were parsed from `head`, which may hold the
    /// beginning of the payload as well; `offload` has passed [`validate`](super::validate()) and kept up with changes of the head.
    ///
    /// # Errors
    /// See [`GsoError`].
    pub fn new(
        head: &'a [u8],
        headers: &Headers,
        body: Body<'a>,
        offload: &Offload,
        checksum: SegmentChecksum,
    ) -> Result<Self, GsoError> {
        let l4 = headers.l4.filter(|l4| l4.proto == IpProto::TCP).ok_or(GsoError::Mismatch)?;
        let l4_offset = usize::from(l4.offset);
        if !offload.needs_csum || offload.csum_start != l4.offset || offload.csum_offset != tcp::CHECKSUM_OFFSET {
            return Err(GsoError::Mismatch);
        }
        let identification = match (offload.gso, headers.l3) {
            (Gso::TcpV4, L3::Ipv4 { offset }) => {
                let ip = head.get(usize::from(offset)..).and_then(|b| Ipv4::new(b).ok());
                ip.ok_or(GsoError::HeadTooShort)?.identification()
            }
            (Gso::TcpV6, L3::Ipv6 { .. }) => 0,
            _ => return Err(GsoError::Mismatch),
        };
        let hdr_len = l4.payload_offset() as usize;
        let tcp = head.get(l4_offset..hdr_len).and_then(|b| Tcp::new(b).ok()).ok_or(GsoError::HeadTooShort)?;
        let in_head = (head.len() - hdr_len) as u32;
        let payload_len = in_head.saturating_add(body.len());
        let l3_end = u32::try_from(hdr_len).map_or(0, |h| h.saturating_add(payload_len));
        if l3_end != headers.l3_end() || offload.gso_size == 0 {
            return Err(GsoError::Mismatch);
        }
        let gso_size = u32::from(offload.gso_size);
        // A frame without payload is still one segment.
        let count = payload_len.div_ceil(gso_size).max(1);
        if count as usize > MAX_GSO_SEGMENTS {
            return Err(GsoError::TooManySegments);
        }
        let mut pseudo = Sum::new();
        pseudo.add_u16(tcp.checksum());
        // Subtracting in one's complement is adding the complement.
        sub_len(&mut pseudo, u32::from(l4.header_len) + payload_len);
        Ok(Self {
            head,
            body,
            l3: headers.l3,
            l4_offset,
            hdr_len,
            payload_len,
            gso_size,
            done: 0,
            index: 0,
            count: count as u16,
            seq: tcp.seq(),
            identification,
            flags: tcp.flags(),
            pseudo,
            checksum,
        })
    }

    /// How many segments there are in all: 1 to [`MAX_GSO_SEGMENTS`].
    #[inline]
    pub fn segments(&self) -> usize {
        usize::from(self.count)
    }

    /// Length of the longest segment, bytes.
    #[inline]
    pub fn longest(&self) -> u32 {
        self.hdr_len as u32 + self.gso_size.min(self.payload_len)
    }

    /// The same work from its beginning, with another treatment of checksums.
    #[must_use]
    pub fn clone_for(&self, checksum: SegmentChecksum) -> Self {
        Self { done: 0, index: 0, checksum, ..*self }
    }

    /// Writes the next segment's headers (and the payload that lay in the head) into `out`. `None` after the last
    /// segment, or when `out` is too short: as long as the frame's `head` is always enough.
    #[inline]
    pub fn next_segment(&mut self, out: &mut [u8]) -> Option<Segment<'a>> {
        if self.index >= self.count {
            return None;
        }
        let len = self.gso_size.min(self.payload_len - self.done);
        let first = self.index == 0;
        let last = self.index + 1 == self.count;

        // The segment's payload is done..done+len; the part in front of `body` lies in the head.
        let (headers, early) = self.head.split_at_checked(self.hdr_len)?;
        let early_end = early.len().min((self.done + len) as usize);
        let early_part = early.get((self.done as usize).min(early_end)..early_end)?;
        let body_at = (self.done).saturating_sub(early.len() as u32);
        let body = self.body.slice(body_at, len - early_part.len() as u32);
        let head_len = self.hdr_len + early_part.len();
        let head = out.get_mut(..head_len)?;
        let (to_headers, to_early) = head.split_at_mut_checked(self.hdr_len)?;
        to_headers.copy_from_slice(headers);
        to_early.copy_from_slice(early_part);

        self.edit_ip(head, len)?;
        let mut flags = self.flags;
        if !first {
            flags.remove(Flags::CWR);
        }
        if !last {
            flags.remove(Flags::FIN | Flags::PSH);
        }
        let mut sum = self.pseudo;
        sum.add_u32((self.hdr_len - self.l4_offset) as u32 + len);
        let segment = head.get_mut(self.l4_offset..)?;
        let mut tcp = TcpMut::new(segment).ok()?;
        tcp.set_seq(self.seq.wrapping_add(self.done));
        tcp.set_flags(flags);
        tcp.set_checksum(sum.partial());
        let mut offload = Offload::default();
        match self.checksum {
            SegmentChecksum::Partial => {
                offload.needs_csum = true;
                offload.csum_start = self.l4_offset as u16;
                offload.csum_offset = tcp::CHECKSUM_OFFSET;
            }
            SegmentChecksum::Finish => {
                // The field's pseudo-header sum takes part.
                let mut sum = Sum::new();
                sum.add_bytes(segment);
                sum.add_body(&body);
                *chunk_mut(segment, usize::from(tcp::CHECKSUM_OFFSET))? = sum.finish().to_be_bytes();
            }
        }
        self.done += len;
        self.index += 1;
        Some(Segment { head_len, body, offload })
    }

    /// Lengths, identification and header checksum of the network header, for `payload_len` bytes of TCP payload.
    #[inline]
    fn edit_ip(&self, head: &mut [u8], payload_len: u32) -> Option<()> {
        match self.l3 {
            L3::Ipv4 { offset } => {
                let offset = usize::from(offset);
                let mut ip = Ipv4Mut::new(head.get_mut(offset..)?).ok()?;
                ip.set_total_len(u16::try_from((self.hdr_len - offset) as u32 + payload_len).ok()?);
                ip.set_identification(self.identification.wrapping_add(self.index));
                ip.fill_checksum();
            }
            L3::Ipv6 { offset } => {
                let offset = usize::from(offset);
                let mut ip = Ipv6Mut::new(head.get_mut(offset..)?).ok()?;
                let len = (self.hdr_len - offset - ipv6::HEADER_BYTES) as u32 + payload_len;
                ip.set_payload_len(u16::try_from(len).ok()?);
            }
            L3::None | L3::Arp { .. } => return None,
        }
        Some(())
    }
}

#[inline]
fn sub_len(sum: &mut Sum, len: u32) {
    sum.add_u16(!((len >> 16) as u16));
    sum.add_u16(!(len as u16));
}
