//! ICMP and ICMPv6 questions and answers.
use super::config::TrackConfig;
use super::entry::Connection;
use super::key::Way;
use super::table::Change;
use super::{Invalid, Step};
use crate::packet::icmp::{v4, v6};

/// ICMP types above this one are not known to anyone (RFC 1122, 3.2.2: discard).
pub(super) const HIGHEST_V4: u8 = 18;

/// Type of a question's message and whether `kind` is the question itself, for kinds that belong to an exchange.
#[inline]
pub(super) fn exchange(ipv6: bool, kind: u8) -> Option<(u8, bool)> {
    // RFC 792: echo, time stamp, information; RFC 950: address mask. RFC 4443: echo; RFC 4620: node information.
    match (ipv6, kind) {
        (false, 8 | 13 | 15 | 17) | (true, 128 | 139) => Some((kind, true)),
        (false, 0) => Some((8, false)),
        (false, 14 | 16 | 18) | (true, 129 | 140) => Some((kind - 1, false)),
        _ => None,
    }
}

/// ICMP messages that report on another packet.
#[inline]
pub(super) fn is_error(ipv6: bool, kind: u8) -> bool {
    if ipv6 {
        kind < 128
    } else {
        matches!(kind, v4::UNREACHABLE | v4::SOURCE_QUENCH | v4::REDIRECT | v4::TIME_EXCEEDED | v4::PARAMETER_PROBLEM)
    }
}

/// Neighbour and listener discovery: not tracked, or IPv6 would not work under default deny.
#[inline]
pub(super) fn is_untracked(kind: u8) -> bool {
    matches!(kind, v6::MLD_QUERY..=v6::NEIGHBOUR_ADVERTISEMENT | v6::MLD2_REPORT)
}

pub(super) fn track(
    conn: &mut Connection,
    question: bool,
    way: Way,
    fresh: bool,
    config: &TrackConfig,
    now_ms: u64,
) -> Step {
    debug_assert!(fresh || question == (way == Way::Original));
    if fresh && !question {
        return Step::Invalid(Invalid::NoConnection, Change::None);
    }
    let t = &config.timeouts;
    conn.refresh(now_ms, if conn.key.is_ipv6() { t.icmpv6_ms } else { t.icmp_ms });
    Step::Pass(if fresh { Change::Semantic } else { Change::Bookkeeping })
}
