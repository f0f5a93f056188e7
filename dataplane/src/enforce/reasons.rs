//! Names: why the firewall's parts refuse a packet, as the switch counts it.
use crate::conntrack::{FragmentRefusal, Invalid};
use crate::counters::DropReason;
use crate::firewall::limits::LimitReason;
use crate::firewall::spoof::SpoofReason;

impl From<Invalid> for DropReason {
    fn from(why: Invalid) -> Self {
        match why {
            Invalid::Header => Self::CtInvalidHeader,
            Invalid::Checksum => Self::CtInvalidChecksum,
            Invalid::Flags => Self::CtInvalidFlags,
            Invalid::State => Self::CtInvalidState,
            Invalid::Window => Self::CtInvalidWindow,
            Invalid::Reset => Self::CtInvalidReset,
            Invalid::NoConnection => Self::CtNoConnection,
            Invalid::Unrelated => Self::CtUnrelated,
            Invalid::IcmpType => Self::CtIcmpType,
            Invalid::VerificationTag => Self::CtVerificationTag,
            Invalid::NoUpperProtocol => Self::CtNoUpperProtocol,
        }
    }
}

impl From<FragmentRefusal> for DropReason {
    fn from(why: FragmentRefusal) -> Self {
        match why {
            FragmentRefusal::Overlap => Self::FragmentOverlap,
            FragmentRefusal::Repeated => Self::FragmentRepeated,
            FragmentRefusal::Misfit | FragmentRefusal::Unaligned => Self::FragmentMisfit,
            FragmentRefusal::Full => Self::FragmentMemory,
        }
    }
}

impl From<LimitReason> for DropReason {
    fn from(why: LimitReason) -> Self {
        match why {
            LimitReason::Connections => Self::LimitConnections,
            LimitReason::HalfOpen => Self::LimitHalfOpen,
            LimitReason::Rate => Self::LimitRate,
            LimitReason::SourceConnections => Self::LimitSourceConnections,
            LimitReason::SourceHalfOpen => Self::LimitSourceHalfOpen,
            LimitReason::SourceRate => Self::LimitSourceRate,
        }
    }
}

impl From<SpoofReason> for DropReason {
    fn from(why: SpoofReason) -> Self {
        match why {
            SpoofReason::SourceMac => Self::SpoofSourceMac,
            SpoofReason::SourceIpv4 => Self::SpoofSourceIpv4,
            SpoofReason::SourceIpv6 => Self::SpoofSourceIpv6,
            SpoofReason::MartianSource => Self::SpoofMartianSource,
            SpoofReason::UnspecifiedIpv4 => Self::SpoofUnspecifiedIpv4,
            SpoofReason::UnspecifiedIpv6 => Self::SpoofUnspecifiedIpv6,
            SpoofReason::ArpMalformed => Self::SpoofArpMalformed,
            SpoofReason::ArpSenderMac => Self::SpoofArpSenderMac,
            SpoofReason::ArpSenderAddress => Self::SpoofArpSenderAddress,
            SpoofReason::NdMalformed => Self::SpoofNdMalformed,
            SpoofReason::NdHopLimit => Self::SpoofNdHopLimit,
            SpoofReason::NdFragmented => Self::SpoofNdFragmented,
            SpoofReason::NdTarget => Self::SpoofNdTarget,
            SpoofReason::NdLinkLayer => Self::SpoofNdLinkLayer,
            SpoofReason::RouterAdvertisement => Self::SpoofRouterAdvertisement,
            SpoofReason::Redirect => Self::SpoofRedirect,
            SpoofReason::DhcpServer => Self::SpoofDhcpServer,
            SpoofReason::Dhcpv6Server => Self::SpoofDhcpv6Server,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_the_same_name_everywhere() {
        for &why in SpoofReason::ALL {
            assert_eq!(DropReason::from(why).name(), why.name());
        }
        for &why in LimitReason::ALL {
            assert_eq!(DropReason::from(why).name(), why.name());
        }
    }

    #[test]
    fn no_two_reasons_share_a_name() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
    }
}
