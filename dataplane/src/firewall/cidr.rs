//! Address prefixes: `10.0.0.0/8`, `2001:db8::/32`, or a single address.
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An IPv4 or IPv6 prefix whose host bits are zero. Written `ADDRESS/LENGTH`; a bare address is a prefix of full length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cidr {
    /// IPv4: network and prefix length (0 to 32).
    V4(u32, u8),
    /// IPv6: network and prefix length (0 to 128).
    V6(u128, u8),
}

/// Why a text or pair is no [`Cidr`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// The part before the slash is no address.
    #[error("\"{0}\" is not an IPv4 or IPv6 address")]
    Address(String),
    /// The part after the slash is no number, or larger than the family allows.
    #[error("prefix length \"{length}\" is not a number from 0 to {most}")]
    Length {
        /// As written.
        length: String,
        /// 32 or 128.
        most: u8,
    },
    /// Bits behind the prefix are set: most likely a typing error.
    #[error("{address}/{length} has bits set behind the prefix; the network is {network}")]
    HostBits {
        /// As written.
        address: IpAddr,
        /// As written.
        length: u8,
        /// What was probably meant.
        network: Cidr,
    },
}

/// Mask of the first `len` bits; `len` above 32 counts as 32.
#[inline]
pub(crate) const fn mask4(len: u8) -> u32 {
    if len >= 32 { u32::MAX } else { !(u32::MAX >> len) }
}

/// Mask of the first `len` bits; `len` above 128 counts as 128.
#[inline]
pub(crate) const fn mask6(len: u8) -> u128 {
    if len >= 128 { u128::MAX } else { !(u128::MAX >> len) }
}

impl Cidr {
    /// All of IPv4.
    pub const ANY_V4: Self = Self::V4(0, 0);
    /// All of IPv6.
    pub const ANY_V6: Self = Self::V6(0, 0);

    /// # Errors
    /// [`CidrError::Length`] and [`CidrError::HostBits`].
    pub fn new(address: IpAddr, length: u8) -> Result<Self, CidrError> {
        let most = if address.is_ipv4() { 32 } else { 128 };
        if length > most {
            return Err(CidrError::Length { length: length.to_string(), most });
        }
        let network = Self::containing(address, length);
        if network.network() != address {
            return Err(CidrError::HostBits { address, length, network });
        }
        Ok(network)
    }

    /// The prefix of `length` bits that contains `address`; a length beyond the family's is cut.
    pub fn containing(address: IpAddr, length: u8) -> Self {
        match address {
            IpAddr::V4(a) => Self::V4(a.to_bits() & mask4(length), length.min(32)),
            IpAddr::V6(a) => Self::V6(a.to_bits() & mask6(length), length.min(128)),
        }
    }

    /// `address` alone.
    pub fn host(address: IpAddr) -> Self {
        Self::containing(address, 128)
    }

    /// First address.
    pub fn network(&self) -> IpAddr {
        match *self {
            Self::V4(bits, _) => Ipv4Addr::from_bits(bits).into(),
            Self::V6(bits, _) => Ipv6Addr::from_bits(bits).into(),
        }
    }

    /// Prefix length, bits.
    pub const fn length(&self) -> u8 {
        match *self {
            Self::V4(_, len) | Self::V6(_, len) => len,
        }
    }

    /// An IPv4 prefix.
    pub const fn is_v4(&self) -> bool {
        matches!(self, Self::V4(..))
    }

    /// A single address.
    pub const fn is_host(&self) -> bool {
        matches!(self, Self::V4(_, 32) | Self::V6(_, 128))
    }

    /// `address` is inside; never for the other family.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (*self, address) {
            (Self::V4(bits, len), IpAddr::V4(a)) => a.to_bits() & mask4(len) == bits,
            (Self::V6(bits, len), IpAddr::V6(a)) => a.to_bits() & mask6(len) == bits,
            _ => false,
        }
    }
}

impl From<IpAddr> for Cidr {
    fn from(address: IpAddr) -> Self {
        Self::host(address)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
        let address: IpAddr = address.parse().map_err(|_| CidrError::Address(address.into()))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let Some(length) = length else { return Ok(Self::host(address)) };
        // u8::from_str would accept a sign.
        let number = length.bytes().all(|b| b.is_ascii_digit()).then(|| length.parse().ok()).flatten();
        let number = number.filter(|n| *n <= most).ok_or(CidrError::Length { length: length.into(), most })?;
        Self::new(address, number)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length())
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = Cidr;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address or prefix such as 192.0.2.0/24 or 2001:db8::1")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Cidr, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn reads_and_writes() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32", "::/0", "2001:db8::/32", "2001:db8::1/128"] {
            assert_eq!(cidr(text).to_string(), text);
        }
        assert_eq!(cidr("192.0.2.1"), Cidr::V4(0xc000_0201, 32));
        assert!(cidr("::1").is_host());
        assert_eq!(
            "10.0.0.1/8".parse::<Cidr>().unwrap_err().to_string(),
            "10.0.0.1/8 has bits set behind the prefix; the network is 10.0.0.0/8"
        );
        assert_eq!("x/8".parse::<Cidr>().unwrap_err().to_string(), "\"x\" is not an IPv4 or IPv6 address");
        for bad in ["10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/", "::/129", "::/300", "10.0.0.0/8/8", ""] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn contains_its_addresses_and_no_others() {
        assert!(cidr("10.0.0.0/8").contains("10.255.0.1".parse().unwrap()));
        assert!(!cidr("10.0.0.0/8").contains("11.0.0.0".parse().unwrap()));
        assert!(!cidr("0.0.0.0/0").contains("::".parse().unwrap()));
        assert!(!cidr("::/0").contains("0.0.0.0".parse().unwrap()));
        assert!(cidr("2001:db8::/33").contains("2001:db8:7fff::".parse().unwrap()));
        assert!(!cidr("2001:db8::/33").contains("2001:db8:8000::".parse().unwrap()));
    }
}
