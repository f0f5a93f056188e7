//! A cheap hash of a frame's flow, to spread flows over queues.
use super::{Fragment, Headers, L3, chunk, parse};

/// Hash of the frame's flow: addresses, protocol and ports where there are any; addresses and protocol for fragments, so
/// that all fragments of a packet meet; MAC addresses for everything else. Direction matters; VLANs do not.
///
/// Not keyed: whoever can choose addresses can choose the hash. Only ever a choice among queues depends on it.
#[inline]
pub fn flow_hash(snapshot: &[u8]) -> u32 {
    // The frame's real length does not matter here.
    match parse(snapshot, u32::MAX) {
        Ok(headers) => headers.flow_hash(snapshot),
        Err(_) => hash_macs(snapshot),
    }
}

impl Headers {
    /// [`flow_hash`] for a snapshot that was parsed already.
    #[inline]
    pub fn flow_hash(&self, snapshot: &[u8]) -> u32 {
        let addresses = match self.l3 {
            L3::Ipv4 { offset } => chunk::<8>(snapshot, usize::from(offset) + 12).map(|b| u64::from_ne_bytes(*b)),
            L3::Ipv6 { offset } => chunk::<32>(snapshot, usize::from(offset) + 8).map(|addresses| {
                [0, 8, 16, 24]
                    .iter()
                    .filter_map(|at| chunk::<8>(addresses, *at))
                    .fold(0, |hash, word| mix(hash ^ u64::from_ne_bytes(*word)))
            }),
            _ => None,
        };
        let Some(addresses) = addresses else { return hash_macs(snapshot) };
        let mut rest = u64::from(self.ip_proto.0) << 32;
        if let Some(l4) = self.l4
            && l4.proto.has_ports()
            && self.fragment == Fragment::None
            && let Some(ports) = chunk::<4>(snapshot, usize::from(l4.offset))
        {
            rest |= u64::from(u32::from_ne_bytes(*ports));
        }
        fold(mix(addresses) ^ rest)
    }
}

#[inline]
fn hash_macs(snapshot: &[u8]) -> u32 {
    let Some(&[a, b, c, d, e, f, g, h, i, j, k, l]) = snapshot.first_chunk::<12>() else { return 0 };
    let first = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    fold(mix(first) ^ u64::from(u32::from_ne_bytes([i, j, k, l])))
}

/// Multiply and fold the 128-bit product: every input bit reaches every output bit.
#[inline(always)]
fn mix(x: u64) -> u64 {
    let product = u128::from(x ^ 0x9e37_79b9_7f4a_7c15) * 0xa076_1d64_78bd_642f;
    (product as u64) ^ (product >> 64) as u64
}

#[inline(always)]
fn fold(x: u64) -> u32 {
    let x = mix(x);
    (x ^ (x >> 32)) as u32
}
