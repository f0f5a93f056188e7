//! Finishing a transport checksum in software.
use super::checksum::Sum;
use crate::frame::{Body, Gso, Offload};
use crate::packet::{chunk_mut, udp};

/// Computes the checksum that is owed, over the frame's final bytes from `csum_start` on (`head`, then `body`), stores it in
/// `head` and clears `needs_csum`. The field holds the pseudo-header's sum already (virtio 1.3, 5.1.6.2). True when
/// nothing is owed any more; false, changing nothing, when the checksum field does not lie in `head` or the frame
/// is still to be segmented (see [`Segmenter`](super::Segmenter)).
///
/// `offload` must have passed [`validate`](super::validate()).
#[inline]
pub fn finish_checksum(head: &mut [u8], body: Body<'_>, offload: &mut Offload) -> bool {
    if !offload.needs_csum {
        return true;
    }
    if offload.gso != Gso::None {
        return false;
    }
    let start = usize::from(offload.csum_start);
    let Some(covered) = head.get_mut(start..) else { return false };
    let mut sum = Sum::new();
    sum.add_bytes(covered);
    sum.add_body(&body);
    let Some(field) = chunk_mut::<2>(covered, usize::from(offload.csum_offset)) else { return false };
    *field = stored(sum.finish(), offload.csum_offset).to_be_bytes();
    offload.needs_csum = false;
    true
}

/// The value to store: a UDP checksum of 0 would mean "none" and is sent as 0xffff (RFC 768), an equal number in one's complement.
/// UDP is recognised by the field's place, as the inner packet of a tunnel may be meant; DCCP shares it, where both values are equal.
#[inline(always)]
pub(super) fn stored(checksum: u16, csum_offset: u16) -> u16 {
    if checksum == 0 && csum_offset == udp::CHECKSUM_OFFSET { 0xffff } else { checksum }
}
