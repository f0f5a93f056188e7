//! One connection, as it lies in a table.
use core::net::IpAddr;

use super::config::MAX_TIMEOUT_MS;
use super::key::{Flow, Key, Toward, Way};
use super::tcp::TcpState;
use crate::firewall::limits::Admission;
use crate::packet::IpProto;

const STATE: u8 = 0x0f;
const OPENED_BY_REMOTE: u8 = 0x10;
const SEEN_REPLY: u8 = 0x20;
const ASSURED: u8 = 0x40;

/// A connection: plain data, 120 bytes, copied in and out of a table as a whole.
///
/// The protocol's own state is 48 bytes of words which only the protocol's module reads: windows for TCP, verification tags for SCTP,
/// the time of the first packet for UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// Identity.
    pub key: Key,
    /// When the entry expires, milliseconds of a clock that wraps at 32 bits.
    expires_ms: u32,
    /// Raised by the table whenever it stores the entry; the higher one is the newer.
    pub version: u32,
    /// The policy's generation under which [`Self::decision`] was taken; 0 for never.
    pub policy_generation: u32,
    /// What policy and limits noted.
    pub decision: Decision,
    retrans: u8,
    status: u8,
    traffic: [Traffic; 2],
    words: [u32; 12],
}

const _: () = assert!(size_of::<Connection>() == 120 && align_of::<Connection>() == 4);

/// Where parts of a connection lie among its fifteen words of 64 bits: for whoever reads and changes single words in a table. What every
/// packet touches comes first, so that it lies in as few cache lines as possible.
pub(super) mod word {
    use super::Connection;
    use core::mem::offset_of;

    /// The policy's generation, the decision, retransmissions, status, from the lowest bit on.
    pub const NOTES: usize = offset_of!(Connection, policy_generation) / 8;
    /// Packets (low half) and bytes in the original direction.
    pub const ORIGINAL: usize = offset_of!(Connection, traffic) / 8;
    /// The same in the reply direction.
    pub const REPLY: usize = ORIGINAL + 1;
    /// The first of the protocol's six.
    pub const PROTOCOL: usize = offset_of!(Connection, words) / 8;

    const _: () = assert!(
        offset_of!(Connection, policy_generation) == 48
            && offset_of!(Connection, decision) == 52
            && offset_of!(Connection, retrans) == 54
            && offset_of!(Connection, status) == 55
            && offset_of!(Connection, traffic) == 56
            && offset_of!(Connection, words) == 72
    );
}

/// The word of an entry at [`word::NOTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Notes(pub u64);

impl Notes {
    #[inline(always)]
    pub const fn policy_generation(self) -> u32 {
        self.0 as u32
    }
    #[inline(always)]
    pub const fn decision(self) -> Decision {
        Decision((self.0 >> 32) as u16)
    }
    #[inline(always)]
    pub const fn retrans(self) -> u8 {
        (self.0 >> 48) as u8
    }
    #[inline(always)]
    pub const fn with_retrans(self, retrans: u8) -> Self {
        Self(self.0 & !(0xff << 48) | (retrans as u64) << 48)
    }
    #[inline(always)]
    const fn status(self) -> u8 {
        (self.0 >> 56) as u8
    }
    #[inline(always)]
    const fn with_status(self, status: u8) -> Self {
        Self(self.0 & !(0xff << 56) | (status as u64) << 56)
    }
    /// Of a connection that a packet travelling `toward` opens, in the protocol's state of that number.
    #[inline(always)]
    pub const fn begun(toward: Toward, state: u8) -> Self {
        let opened = if matches!(toward, Toward::Ingress) { OPENED_BY_REMOTE } else { 0 };
        Self(0).with_status(opened | state & STATE)
    }
    #[inline(always)]
    pub const fn with_policy(self, generation: u32, decision: Decision) -> Self {
        Self(self.0 & !0xffff_ffff | generation as u64).with_decision(decision)
    }
    #[inline(always)]
    pub const fn with_decision(self, decision: Decision) -> Self {
        Self(self.0 & !(0xffff << 32) | (decision.0 as u64) << 32)
    }
    #[inline(always)]
    pub const fn with_state(self, state: u8) -> Self {
        self.with_status(self.status() & !STATE | state & STATE)
    }
    #[inline(always)]
    pub const fn with_seen_reply(self) -> Self {
        self.with_status(self.status() | SEEN_REPLY)
    }
    #[inline(always)]
    pub const fn with_assured(self) -> Self {
        self.with_status(self.status() | ASSURED)
    }
    #[inline(always)]
    pub const fn state(self) -> u8 {
        self.status() & STATE
    }
    #[inline(always)]
    pub const fn seen_reply(self) -> bool {
        self.status() & SEEN_REPLY != 0
    }
    #[inline(always)]
    pub const fn assured(self) -> bool {
        self.status() & ASSURED != 0
    }
    /// Allowed by the rules of a generation, heard of from both sides and assured, and not half-open to the limits: what is asked of an
    /// entry by [`Self::is_settled`].
    #[inline(always)]
    pub const fn settled(generation: u32) -> u64 {
        generation as u64 | (Decision::ALLOWED as u64) << 32 | ((SEEN_REPLY | ASSURED) as u64) << 56
    }
    /// All that [`Self::settled`] asks for, in one look.
    #[inline(always)]
    pub const fn is_settled(self, settled: u64) -> bool {
        const ASKED: u64 = Notes::settled(u32::MAX) | (Decision::HALF_OPEN as u64) << 32;
        self.0 & ASKED == settled
    }
    /// As [`Connection::way`].
    #[inline(always)]
    pub const fn way(self, toward: Toward) -> Way {
        let opened_by_remote = self.status() & OPENED_BY_REMOTE != 0;
        if opened_by_remote == matches!(toward, Toward::Ingress) { Way::Original } else { Way::Reply }
    }
}

impl Connection {
    /// A connection that a packet travelling `toward` opens. Expires at once unless given a time.
    pub(super) fn new(key: Key, toward: Toward) -> Self {
        Self {
            key,
            expires_ms: 0,
            version: 0,
            policy_generation: 0,
            words: [0; 12],
            traffic: [Traffic::default(); 2],
            decision: Decision::default(),
            retrans: 0,
            status: if toward == Toward::Ingress { OPENED_BY_REMOTE } else { 0 },
        }
    }

    /// The direction of the packet that opened the connection.
    #[inline]
    pub fn opened(&self) -> Toward {
        if self.status & OPENED_BY_REMOTE != 0 { Toward::Ingress } else { Toward::Egress }
    }

    /// A packet's direction within this connection.
    #[inline]
    pub fn way(&self, toward: Toward) -> Way {
        if toward == self.opened() { Way::Original } else { Way::Reply }
    }

    /// A packet in the reply direction has been seen.
    #[inline]
    pub fn seen_reply(&self) -> bool {
        self.status & SEEN_REPLY != 0
    }

    #[inline]
    pub(super) fn set_seen_reply(&mut self) {
        self.status |= SEEN_REPLY;
    }

    /// Only one side has been heard of; for TCP: the handshake is not complete.
    #[inline]
    pub fn is_half_open(&self) -> bool {
        if self.key.proto() == IpProto::TCP {
            const { assert!(TcpState::SynSent as u8 == 1 && TcpState::SynRecv as u8 == 2 && TcpState::SynSent2 as u8 == 9) };
            return matches!(self.state(), 0..=2 | 9);
        }
        !self.seen_reply()
    }

    /// The address that opened the connection.
    #[inline]
    pub fn opener(&self) -> IpAddr {
        if self.opened() == Toward::Ingress { self.key.remote() } else { self.key.local() }
    }

    /// The connection as its first packet showed it to the policy.
    #[inline]
    pub fn opening_flow(&self) -> Flow {
        let icmp = matches!(self.key.proto(), IpProto::ICMP | IpProto::ICMPV6).then(|| {
            let (_, kind, code) = self.key.icmp();
            (kind, code)
        });
        Flow { key: self.key, toward: self.opened(), icmp }
    }

    /// Known to be a real connection rather than a probe: not evicted while others can be.
    #[inline]
    pub fn assured(&self) -> bool {
        self.status & ASSURED != 0
    }

    #[inline]
    pub(super) fn set_assured(&mut self) {
        self.status |= ASSURED;
    }

    /// The protocol's state number: [`super::TcpState`] or [`super::SctpState`]; 0 for other protocols.
    #[inline]
    pub fn state(&self) -> u8 {
        self.status & STATE
    }

    #[inline]
    pub(super) fn set_state(&mut self, state: u8) {
        self.status = (self.status & !STATE) | (state & STATE);
    }

    /// State, answered, assured: what makes a change worth telling others.
    #[inline]
    pub(super) fn status(&self) -> u8 {
        self.status
    }

    #[inline]
    pub(super) fn words(&self) -> &[u32; 12] {
        &self.words
    }

    #[inline]
    pub(super) fn set_words(&mut self, words: [u32; 12]) {
        self.words = words;
    }

    #[inline]
    pub(super) fn retrans(&self) -> u8 {
        self.retrans
    }

    #[inline]
    pub(super) fn set_retrans(&mut self, retrans: u8) {
        self.retrans = retrans;
    }

    /// Makes the entry expire `timeout_ms` from now.
    #[inline]
    pub fn refresh(&mut self, now_ms: u64, timeout_ms: u32) {
        self.expires_ms = expiry(now_ms, timeout_ms);
    }

    /// Milliseconds until the entry expires; 0 when it has.
    #[inline]
    pub fn remaining_ms(&self, now_ms: u64) -> u32 {
        let left = self.expires_ms.wrapping_sub(now_ms as u32) as i32;
        if left > 0 { left as u32 } else { 0 }
    }

    /// The time is over: to be treated as if it were not there.
    #[inline]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.remaining_ms(now_ms) == 0
    }

    /// Packets and bytes seen in one direction.
    #[inline]
    pub fn traffic(&self, way: Way) -> Traffic {
        let [original, reply] = self.traffic;
        match way {
            Way::Original => original,
            Way::Reply => reply,
        }
    }

    #[inline]
    pub(super) fn set_traffic(&mut self, traffic: [Traffic; 2]) {
        self.traffic = traffic;
    }

    #[inline]
    pub(super) fn account(&mut self, way: Way, bytes: u32, dither: u32) {
        let [original, reply] = &mut self.traffic;
        let traffic = match way {
            Way::Original => original,
            Way::Reply => reply,
        };
        *traffic = traffic.plus(1, bytes, dither);
    }
}

/// When an entry that is refreshed at `now_ms` expires, on the 32-bit clock.
#[inline(always)]
pub(super) fn expiry(now_ms: u64, timeout_ms: u32) -> u32 {
    (now_ms as u32).wrapping_add(timeout_ms.min(MAX_TIMEOUT_MS))
}

/// Packets and bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Traffic {
    /// Packets.
    pub packets: Tally,
    /// Bytes of IP packets.
    pub bytes: Tally,
}

impl Traffic {
    /// As a word of an entry.
    #[inline(always)]
    pub(super) const fn to_word(self) -> u64 {
        self.packets.0 as u64 | (self.bytes.0 as u64) << 32
    }

    #[inline(always)]
    pub(super) const fn from_word(word: u64) -> Self {
        Self { packets: Tally(word as u32), bytes: Tally((word >> 32) as u32) }
    }

    /// A word with packets more that have `bytes` together, if all four numbers are exact.
    #[inline(always)]
    pub(super) const fn exactly_plus(word: u64, packets: u32, bytes: u32) -> Option<u64> {
        const INEXACT: u64 = !(Tally::MANTISSA as u64 | (Tally::MANTISSA as u64) << 32);
        let more = packets as u64 | (bytes as u64) << 32;
        // With no bits there, neither half of the sum can reach into what is not its own.
        let sum = word.wrapping_add(more);
        if (word | more | sum) & INEXACT == 0 { Some(sum) } else { None }
    }

    /// With packets more that have `bytes` together.
    #[inline(always)]
    pub(super) fn plus(self, packets: u32, bytes: u32, dither: u32) -> Self {
        Self { packets: self.packets.plus(packets, dither), bytes: self.bytes.plus(bytes, dither) }
    }
}

/// A counter in 32 bits: exact up to 2^27 (134 million), from then on a floating-point number of 27 bits that is right on average
/// (what falls below its unit is added with the probability of its share), with a relative error below 1e-6. Goes up to 2^58.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Tally(u32);

impl Tally {
    const MANTISSA_BITS: u32 = 27;
    const MANTISSA: u32 = (1 << Self::MANTISSA_BITS) - 1;

    /// As it is kept: exponent in the upper 5 bits, mantissa in the lower 27.
    #[inline]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// From what [`Self::raw`] gave; `None` for a number that counting cannot lead to (its mantissa has room left).
    #[inline]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        let normalised = raw >> Self::MANTISSA_BITS == 0 || raw & Self::MANTISSA > Self::MANTISSA / 2;
        if normalised { Some(Self(raw)) } else { None }
    }

    /// The count.
    #[inline]
    pub fn get(self) -> u64 {
        u64::from(self.0 & Self::MANTISSA) << (self.0 >> Self::MANTISSA_BITS)
    }

    /// Adds `n`; `dither` is any number that is evenly distributed.
    #[inline(always)]
    pub fn add(&mut self, n: u32, dither: u32) {
        *self = self.plus(n, dither);
    }

    /// The sum with `n`.
    #[inline(always)]
    fn plus(self, n: u32, dither: u32) -> Self {
        // The usual case: exact before and after.
        match self.0.checked_add(n) {
            Some(sum) if sum <= Self::MANTISSA => Self(sum),
            _ => self.plus_scaled(n, dither),
        }
    }

    #[cold]
    fn plus_scaled(self, n: u32, dither: u32) -> Self {
        let mut exponent = self.0 >> Self::MANTISSA_BITS;
        let below = (1u64 << exponent) - 1;
        let units = (u64::from(n) + (u64::from(dither) & below)) >> exponent;
        let mut mantissa = u64::from(self.0 & Self::MANTISSA) + units;
        while mantissa > u64::from(Self::MANTISSA) {
            if exponent == 31 {
                return Self(u32::MAX);
            }
            mantissa >>= 1;
            exponent += 1;
        }
        Self((exponent << Self::MANTISSA_BITS) | mantissa as u32)
    }
}

/// What the policy and the VM's limits noted about a connection, in 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Decision(u16);

impl Decision {
    const ALLOWED: u16 = 1 << 15;
    const HALF_OPEN: u16 = 1 << 14;
    const SOURCE_COUNTED: u16 = 1 << 13;
    const ADMITTED: u16 = 1 << 12;

    /// All of it as a number.
    #[inline]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// From a number of [`Self::bits`].
    #[inline]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The policy of [`Connection::policy_generation`] lets the connection's packets pass.
    #[inline]
    pub const fn allowed(self) -> bool {
        self.0 & Self::ALLOWED != 0
    }

    /// Notes that the policy lets the connection's packets pass.
    #[inline]
    pub const fn with_allowed(self) -> Self {
        Self(self.0 | Self::ALLOWED)
    }

    /// Notes that the policy drops them.
    #[inline]
    pub const fn without_allowed(self) -> Self {
        Self(self.0 & !Self::ALLOWED)
    }

    /// How the VM's limits count the connection; `None`: not at all.
    #[inline]
    pub const fn admission(self) -> Option<Admission> {
        if self.0 & Self::ADMITTED == 0 {
            return None;
        }
        Some(Admission { tracked_source: self.0 & Self::SOURCE_COUNTED != 0, half_open: self.0 & Self::HALF_OPEN != 0 })
    }

    /// Notes how the VM's limits count the connection.
    #[inline]
    pub const fn with_admission(self, admission: Admission) -> Self {
        let mut bits = self.0 & Self::ALLOWED | Self::ADMITTED;
        if admission.half_open {
            bits |= Self::HALF_OPEN;
        }
        if admission.tracked_source {
            bits |= Self::SOURCE_COUNTED;
        }
        Self(bits)
    }

    /// The limits count the connection as half-open.
    #[inline]
    pub const fn counts_half_open(self) -> bool {
        self.0 & Self::HALF_OPEN != 0
    }

    /// No longer counted as half-open.
    #[inline]
    pub(super) const fn opened(self) -> Self {
        Self(self.0 & !Self::HALF_OPEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tally_is_exact_then_right_on_average() {
        let mut t = Tally::default();
        for i in 0..1000u64 {
            assert_eq!(t.get(), i * 1500);
            t.add(1500, u32::MAX);
        }
        let mut t = Tally::default();
        let mut x = 1u32;
        let mut exact = 0u64;
        for _ in 0..3_000_000 {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            t.add(1500, x);
            exact += 1500;
        }
        assert!(t.get().abs_diff(exact) < exact / 100_000, "{} for {exact}", t.get());
        let mut t = Tally(u32::MAX - 1);
        for _ in 0..100 {
            t.add(u32::MAX, u32::MAX);
        }
        assert_eq!(t.get(), u64::from(Tally::MANTISSA) << 31);
    }

    #[test]
    fn expiry_survives_the_wrap_of_its_clock() {
        use crate::packet::IpProto;
        use core::net::{IpAddr, Ipv4Addr};
        let a = (IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
        let mut c = Connection::new(Key::new(Toward::Ingress, 0, IpProto::UDP, a, a), Toward::Ingress);
        let now = u64::from(u32::MAX) - 500;
        c.refresh(now, 1000);
        assert_eq!(c.remaining_ms(now), 1000);
        assert_eq!(c.remaining_ms(now + 999), 1);
        assert!(!c.is_expired(now + 999));
        assert!(c.is_expired(now + 1000));
        c.refresh(now, u32::MAX);
        assert!(!c.is_expired(now + 20 * 86_400_000));
    }
}
