//! Packets as bytes: typed, zero-copy views of each protocol's header, and one pass that finds them all.
//!
//! [`parse`] walks a frame's private header copy once and returns a small [`Headers`]: what is where.
//! [`parse_l2`] stops after the tags, for plain switching. The protocol modules give *views* (borrowing
//! accessors over checked bytes, `XxxMut` for changes in place) and *representations* (`XxxHeader`, plain
//! values that can be written out). Nothing here panics, allocates or looks beyond the slice it was given.

pub mod arp;
mod error;
pub mod ethernet;
mod flow_hash;
mod headers;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod sctp;
pub mod tcp;
#[cfg(test)]
pub(crate) mod testdata;
#[cfg(test)]
mod tests;
pub mod udp;
pub mod vlan;

pub use error::ParseError;
pub use ethernet::{EtherType, MacAddr};
pub use flow_hash::flow_hash;
pub use headers::{Fragment, Headers, IpProto, L2, L3, L4, parse, parse_l2};
pub use vlan::{Tci, Tpid, VlanId, VlanTag};

/// The big-endian `u16` at `at`, when it is inside.
#[inline(always)]
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|b| u16::from_be_bytes(*b))
}

/// The `N` bytes at `at`, when they are inside.
#[inline(always)]
pub(crate) fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>()
}

/// The `N` bytes at `at`, to be changed, when they are inside.
#[inline(always)]
pub(crate) fn chunk_mut<const N: usize>(bytes: &mut [u8], at: usize) -> Option<&mut [u8; N]> {
    bytes.get_mut(at..)?.first_chunk_mut::<N>()
}
