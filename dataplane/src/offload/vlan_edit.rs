//! Changing a frame's outermost VLAN tag on its way out.
use crate::frame::{Offload, SNAPSHOT_BYTES};
use crate::packet::vlan::TAG_BYTES;
use crate::packet::{L2, Tci, VlanTag};

/// Bytes that hold any snapshot with one more tag.
pub const REWRITE_BYTES: usize = SNAPSHOT_BYTES + TAG_BYTES;
/// Both MAC addresses: what stands in front of the tags.
const MACS_BYTES: usize = 12;

/// What becomes of the outermost tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VlanAction {
    /// The frame goes out as it came.
    Keep,
    /// A tag is put in front.
    Push(VlanTag),
    /// The outermost tag goes.
    Pop,
    /// The outermost tag's TCI is exchanged; its TPID stays.
    Replace(Tci),
}

/// Writes `snapshot`, its outermost tag changed, to `out`, and moves `offload`'s offsets along. Returns the new head's
/// length: the output frame is `out[..len]` followed by the source's bytes from `snapshot.len()` on.
///
/// `None`, when the frame has no tag to pop or replace, or `snapshot` is longer than [`SNAPSHOT_BYTES`]; `offload` is unchanged then.
#[inline]
pub fn rewrite_l2(
    snapshot: &[u8],
    l2: &L2,
    out: &mut [u8; REWRITE_BYTES],
    action: VlanAction,
    offload: &mut Offload,
) -> Option<usize> {
    let (macs, rest) = snapshot.split_first_chunk::<MACS_BYTES>()?;
    if l2.vlan.is_none() && matches!(action, VlanAction::Pop | VlanAction::Replace(_)) {
        return None;
    }
    let (to_macs, to) = out.split_first_chunk_mut::<MACS_BYTES>()?;
    // Put the tag (if any) at the place after the addresses; `rest` then begins with what follows.
    let (rest, to) = match action {
        VlanAction::Keep => (rest, to),
        VlanAction::Push(tag) => {
            let (at, to) = to.split_first_chunk_mut()?;
            *at = tag.to_bytes();
            (rest, to)
        }
        VlanAction::Pop => (rest.get(TAG_BYTES..)?, to),
        VlanAction::Replace(tci) => {
            let (at, to) = to.split_first_chunk_mut()?;
            *at = VlanTag { tpid: l2.vlan?.tpid, tci }.to_bytes();
            (rest.get(TAG_BYTES..)?, to)
        }
    };
    let mut moved = *offload;
    match action {
        VlanAction::Push(_) => shift(&mut moved, |n| n.checked_add(TAG_BYTES as u16))?,
        VlanAction::Pop => shift(&mut moved, |n| n.checked_sub(TAG_BYTES as u16))?,
        VlanAction::Keep | VlanAction::Replace(_) => {}
    }
    let to = to.get_mut(..rest.len())?;
    to.copy_from_slice(rest);
    *to_macs = *macs;
    *offload = moved;
    Some(match action {
        VlanAction::Keep | VlanAction::Replace(_) => snapshot.len(),
        VlanAction::Push(_) => snapshot.len() + TAG_BYTES,
        VlanAction::Pop => snapshot.len() - TAG_BYTES,
    })
}

/// Moves the offsets that count from the frame's start, where they mean something.
#[inline(always)]
fn shift(offload: &mut Offload, by: impl Fn(u16) -> Option<u16>) -> Option<()> {
    if offload.needs_csum {
        offload.csum_start = by(offload.csum_start)?;
    }
    if offload.hdr_len != 0 {
        offload.hdr_len = by(offload.hdr_len)?;
    }
    Some(())
}
