//! Checksum and segmentation work that frames carry along (virtio 1.3, 5.1.6): checked when a frame comes
//! in ([`validate`]), kept true when its headers change ([`rewrite_l2`]), and finished in software where the
//! output cannot ([`finish_checksum`], [`Segmenter`]).

pub mod checksum;
mod finish;
mod gso;
mod sum;
#[cfg(test)]
mod tests;
mod validate;
mod vlan_edit;

pub use finish::finish_checksum;
pub use gso::{GsoError, MAX_GSO_SEGMENTS, Segment, SegmentChecksum, Segmenter};
pub use validate::{BadOffload, validate, validate_parsed};
pub use vlan_edit::{REWRITE_BYTES, VlanAction, rewrite_l2};
