//! VLAN membership of a port: which VLAN an incoming frame belongs to, and how a frame of a VLAN leaves
//! (IEEE 802.1Q, 8.6; the modes are those that Open vSwitch users know).
use serde::{Deserialize, Serialize};

/// How a port takes part in VLANs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VlanMode {
    /// Untagged frames belong to VLAN `tag`; tagged frames are refused.
    Access {
        /// The VLAN, 1-4094.
        tag: u16,
    },
    /// Tagged frames of the listed VLANs. An empty list is all VLANs and untagged frames (VLAN 0) too;
    /// list 0 to admit untagged frames besides others.
    Trunk {
        /// VLANs 0-4094; empty: all.
        #[serde(default)]
        trunks: Vec<u16>,
    },
    /// A trunk on which untagged frames belong to VLAN `tag`, and leave tagged.
    NativeTagged {
        /// The native VLAN, 1-4094.
        tag: u16,
        /// Further VLANs; empty: all.
        #[serde(default)]
        trunks: Vec<u16>,
    },
    /// A trunk on which untagged frames belong to VLAN `tag`, and leave untagged.
    NativeUntagged {
        /// The native VLAN, 1-4094.
        tag: u16,
        /// Further VLANs; empty: all.
        #[serde(default)]
        trunks: Vec<u16>,
    },
}

impl Default for VlanMode {
    /// A trunk of everything: the port is transparent to tags.
    fn default() -> Self {
        VlanMode::Trunk { trunks: Vec::new() }
    }
}

/// A VLAN number that cannot be used where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VLAN {vlan} is out of range: use {from}-4094")]
pub struct BadVlan {
    /// The number given.
    pub vlan: u16,
    /// Lowest number that is allowed there.
    pub from: u16,
}

/// How a frame leaves a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// With a tag of its VLAN.
    Tagged,
    /// Without a tag.
    Untagged,
}

/// A [`VlanMode`] compiled for one load and one test per frame.
#[derive(Clone, Debug)]
pub struct VlanPolicy {
    /// Bit v: VLAN v passes.
    member: Box<[u64; 64]>,
    /// VLAN of untagged frames, or none.
    untagged: Option<u16>,
    /// VLAN that leaves without a tag.
    egress_untagged: u16,
    tagged_in: bool,
}

impl VlanPolicy {
    /// Compiles a mode.
    pub fn new(mode: &VlanMode) -> Result<Self, BadVlan> {
        let mut policy = Self { member: Box::new([0; 64]), untagged: None, egress_untagged: 0, tagged_in: true };
        match mode {
            VlanMode::Access { tag } => {
                policy.admit(*tag, 1)?;
                policy.untagged = Some(*tag);
                policy.egress_untagged = *tag;
                policy.tagged_in = false;
            }
            VlanMode::Trunk { trunks } => {
                policy.admit_list(trunks, 0)?;
                policy.untagged = policy.is_member(0).then_some(0);
            }
            VlanMode::NativeTagged { tag, trunks } => {
                policy.admit_list(trunks, 1)?;
                policy.admit(*tag, 1)?;
                policy.untagged = Some(*tag);
            }
            VlanMode::NativeUntagged { tag, trunks } => {
                policy.admit_list(trunks, 1)?;
                policy.admit(*tag, 1)?;
                policy.untagged = Some(*tag);
                policy.egress_untagged = *tag;
            }
        }
        Ok(policy)
    }

    fn admit(&mut self, vlan: u16, from: u16) -> Result<(), BadVlan> {
        if vlan < from || vlan > 4094 {
            return Err(BadVlan { vlan, from });
        }
        if let Some(word) = self.member.get_mut(usize::from(vlan >> 6)) {
            *word |= 1 << (vlan & 63);
        }
        Ok(())
    }

    fn admit_list(&mut self, vlans: &[u16], from: u16) -> Result<(), BadVlan> {
        if vlans.is_empty() {
            (from..=4094).try_for_each(|v| self.admit(v, from))
        } else {
            vlans.iter().try_for_each(|&v| self.admit(v, from))
        }
    }

    #[inline]
    fn is_member(&self, vlan: u16) -> bool {
        self.member.get(usize::from(vlan >> 6)).is_some_and(|w| w >> (vlan & 63) & 1 == 1)
    }

    /// The VLAN of a frame that came in with this VLAN ID (`None`: untagged; 0: priority-tagged, the same as untagged).
    /// `None` when the port does not take it.
    #[inline]
    pub fn ingress(&self, vid: Option<u16>) -> Option<u16> {
        match vid {
            None | Some(0) => self.untagged,
            Some(v) => (self.tagged_in && self.is_member(v)).then_some(v),
        }
    }

    /// How a frame of `vlan` leaves here. `None` when the port does not carry that VLAN.
    #[inline]
    pub fn egress(&self, vlan: u16) -> Option<Egress> {
        if !self.is_member(vlan) {
            None
        } else if vlan == self.egress_untagged {
            Some(Egress::Untagged)
        } else {
            Some(Egress::Tagged)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: VlanMode) -> VlanPolicy {
        VlanPolicy::new(&mode).unwrap()
    }

    #[test]
    fn access() {
        let p = policy(VlanMode::Access { tag: 10 });
        assert_eq!(p.ingress(None), Some(10));
        assert_eq!(p.ingress(Some(0)), Some(10));
        assert_eq!(p.ingress(Some(10)), None);
        assert_eq!(p.egress(10), Some(Egress::Untagged));
        assert_eq!(p.egress(0), None);
        assert_eq!(p.egress(11), None);
    }

    #[test]
    fn trunk_of_everything_is_transparent() {
        let p = policy(VlanMode::default());
        assert_eq!(p.ingress(None), Some(0));
        assert_eq!(p.ingress(Some(4094)), Some(4094));
        assert_eq!(p.ingress(Some(4095)), None, "reserved (802.1Q table 9-2)");
        assert_eq!(p.egress(0), Some(Egress::Untagged));
        assert_eq!(p.egress(7), Some(Egress::Tagged));
    }

    #[test]
    fn trunk_list_refuses_the_rest() {
        let p = policy(VlanMode::Trunk { trunks: vec![10, 20] });
        assert_eq!(p.ingress(None), None);
        assert_eq!(p.ingress(Some(10)), Some(10));
        assert_eq!(p.ingress(Some(30)), None);
        assert_eq!(p.egress(30), None);
        let p = policy(VlanMode::Trunk { trunks: vec![0, 10] });
        assert_eq!(p.ingress(None), Some(0));
    }

    #[test]
    fn native_modes_differ_on_egress_only() {
        let t = policy(VlanMode::NativeTagged { tag: 5, trunks: vec![10] });
        let u = policy(VlanMode::NativeUntagged { tag: 5, trunks: vec![10] });
        for p in [&t, &u] {
            assert_eq!(p.ingress(None), Some(5));
            assert_eq!(p.ingress(Some(5)), Some(5));
            assert_eq!(p.ingress(Some(10)), Some(10));
            assert_eq!(p.ingress(Some(11)), None);
            assert_eq!(p.egress(10), Some(Egress::Tagged));
        }
        assert_eq!(t.egress(5), Some(Egress::Tagged));
        assert_eq!(u.egress(5), Some(Egress::Untagged));
    }

    #[test]
    fn out_of_range_is_refused() {
        assert_eq!(VlanPolicy::new(&VlanMode::Access { tag: 0 }).unwrap_err(), BadVlan { vlan: 0, from: 1 });
        assert!(VlanPolicy::new(&VlanMode::Trunk { trunks: vec![4095] }).is_err());
    }
}
