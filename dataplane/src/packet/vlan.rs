//! VLAN tags: IEEE 802.1Q customer tags and IEEE 802.1ad service tags.
use core::fmt;

use serde::{Deserialize, Serialize};

use super::{EtherType, ParseError};

/// Bytes one tag adds to a frame (TPID and TCI).
pub const TAG_BYTES: usize = 4;

/// A 12-bit VLAN identifier, 0 to 4095. 0 means "priority only", 4095 is reserved (IEEE 802.1Q, table 9-2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
#[repr(transparent)]
pub struct VlanId(u16);

impl VlanId {
    /// No VLAN: a priority tag.
    pub const NONE: Self = Self(0);

    /// `None` above 4095.
    #[inline]
    pub const fn new(id: u16) -> Option<Self> {
        if id < 4096 { Some(Self(id)) } else { None }
    }

    /// The identifier, 0 to 4095.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Identifies a VLAN: 1 to 4094.
    #[inline]
    pub const fn is_usable(self) -> bool {
        self.0 != 0 && self.0 != 4095
    }
}

/// A VLAN identifier above 4095.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VLAN id {0} is above 4095")]
pub struct VlanIdRange(pub u16);

impl TryFrom<u16> for VlanId {
    type Error = VlanIdRange;
    fn try_from(id: u16) -> Result<Self, VlanIdRange> {
        Self::new(id).ok_or(VlanIdRange(id))
    }
}

impl From<VlanId> for u16 {
    fn from(id: VlanId) -> Self {
        id.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Tag control information: PCP (3 bits), DEI (1 bit), VID (12 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Tci(pub u16);

impl Tci {
    /// From its parts; `pcp` above 7 is clipped to its low three bits.
    #[inline]
    pub const fn new(pcp: u8, dei: bool, vid: VlanId) -> Self {
        Self(((pcp as u16 & 7) << 13) | ((dei as u16) << 12) | vid.0)
    }

    /// Priority code point, 0 to 7.
    #[inline]
    pub const fn pcp(self) -> u8 {
        (self.0 >> 13) as u8
    }

    /// Drop eligible indicator.
    #[inline]
    pub const fn dei(self) -> bool {
        self.0 & 0x1000 != 0
    }

    /// VLAN identifier.
    #[inline]
    pub const fn vid(self) -> VlanId {
        VlanId(self.0 & 0xfff)
    }

    /// The same priority with another VLAN.
    #[inline]
    pub const fn with_vid(self, vid: VlanId) -> Self {
        Self(self.0 & 0xf000 | vid.0)
    }
}

impl fmt::Debug for Tci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tci").field("pcp", &self.pcp()).field("dei", &self.dei()).field("vid", &self.vid()).finish()
    }
}

/// Tag protocol identifier: which kind of tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u16)]
pub enum Tpid {
    /// Customer tag, IEEE 802.1Q.
    #[default]
    Customer = 0x8100,
    /// Service tag, IEEE 802.1ad.
    Service = 0x88a8,
}

impl Tpid {
    /// The tag kind that `ethertype` announces, if any.
    #[inline(always)]
    pub const fn from_ethertype(ethertype: EtherType) -> Option<Self> {
        match ethertype {
            EtherType::VLAN => Some(Self::Customer),
            EtherType::SVLAN => Some(Self::Service),
            _ => None,
        }
    }

    /// The value on the wire.
    #[inline(always)]
    pub const fn ethertype(self) -> EtherType {
        EtherType(self as u16)
    }
}

/// One VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct VlanTag {
    /// Kind of tag.
    pub tpid: Tpid,
    /// Priority and VLAN.
    pub tci: Tci,
}

impl VlanTag {
    /// An IEEE 802.1Q customer tag.
    #[inline]
    pub const fn customer(tci: Tci) -> Self {
        Self { tpid: Tpid::Customer, tci }
    }

    /// The four bytes as they stand after the MAC addresses.
    #[inline]
    pub const fn to_bytes(self) -> [u8; TAG_BYTES] {
        let [a, b] = (self.tpid as u16).to_be_bytes();
        let [c, d] = self.tci.0.to_be_bytes();
        [a, b, c, d]
    }
}

/// View of what follows a TPID: TCI and the next EtherType.
#[derive(Clone, Copy, Debug)]
pub struct Vlan<'a> {
    header: &'a [u8; TAG_BYTES],
    payload: &'a [u8],
}

impl<'a> Vlan<'a> {
    /// Views `bytes`, which begin after the TPID. Fails below 4 bytes.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (header, payload) = bytes.split_first_chunk().ok_or(ParseError::VlanTruncated)?;
        Ok(Self { header, payload })
    }

    /// Tag control information.
    #[inline]
    pub fn tci(&self) -> Tci {
        Tci(u16::from_be_bytes([self.header[0], self.header[1]]))
    }

    /// EtherType (or TPID of a further tag) behind this tag.
    #[inline]
    pub fn ethertype(&self) -> EtherType {
        EtherType(u16::from_be_bytes([self.header[2], self.header[3]]))
    }

    /// Everything after the tag and its EtherType.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}
