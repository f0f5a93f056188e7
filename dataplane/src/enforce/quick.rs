//! The short way through a port's firewall: plain packets of connections that only need their bookkeeping done.
//!
//! Over a burst it goes in steps, so that the tables' cache lines are on their way while other frames are looked at:
//! [`Quick::prepare`] for each frame, then [`Quick::locate`] for each, then [`Quick::passes`]. The last one lets a frame pass only where
//! [`super::stage`] would, and leaves behind what it would; to anything else it says no and changes nothing.
use super::port::{FirewallCounters, PortFirewall};
use crate::conntrack::{ConnMap, CtState, Likely, Plain, Terms, Toward, Whereabouts, steady};
use crate::firewall::spoof::SpoofTable;
use crate::frame::{Offload, RxBurst};
use crate::packet::MacAddr;

/// Where the entry of a frame's connection probably is, in one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prospect {
    whereabouts: Whereabouts,
    likely: Likely,
}

impl Prospect {
    /// Not looked for.
    pub const NONE: Self = Self { whereabouts: Whereabouts::NONE, likely: Likely::NONE };
}

/// One port's firewall in one direction, for the time of a burst.
pub(crate) struct Quick<'a> {
    map: &'a ConnMap,
    terms: Terms<'a>,
    /// Zone of VLAN 0.
    zone: u16,
    /// The anti-spoofing rules, where anything is checked.
    spoof: Option<&'a SpoofTable>,
    counters: Option<&'a FirewallCounters>,
    /// Packets let pass and not yet counted.
    new: u64,
    established: u64,
    /// The last station, and for the direction from the VM its address, that the anti-spoofing rules let pass.
    accepted: Option<(MacAddr, [u64; 2])>,
}

impl<'a> Quick<'a> {
    pub fn new(firewall: &'a PortFirewall, toward: Toward, thread: usize, now_ns: u64) -> Self {
        let rules = &*firewall.rules;
        Self {
            map: firewall.vm.map(),
            zone: firewall.zone(0),
            spoof: Some(&*rules.spoof).filter(|spoof| spoof.is_enabled()),
            terms: Terms { generation: rules.generation, config: &rules.track, toward, now_ms: now_ns / 1_000_000 },
            counters: firewall.ledgers.get(thread).map(|ledger| ledger.of(toward)),
            new: 0,
            established: 0,
            accepted: None,
        }
    }

    /// First step: hashes, and fetches the buckets.
    #[inline(always)]
    pub fn prepare(&self, packet: &Plain, vlan: u16) -> Prospect {
        let key = packet.key(self.terms.toward, self.zone | vlan);
        Prospect { whereabouts: self.map.prefetch_places(key), likely: Likely::NONE }
    }

    /// Second step: finds the entry, and fetches it.
    #[inline(always)]
    pub fn locate(&self, prospect: &mut Prospect) {
        prospect.likely = self.map.prefetch_likely(&prospect.whereabouts);
    }

    /// Whose frame it is: from the VM, or for it. `station`: its source there, its destination here.
    #[inline(always)]
    fn is_ours(&mut self, station: MacAddr, packet: &Plain) -> bool {
        let Some(spoof) = self.spoof else { return true };
        let claim = match self.terms.toward {
            Toward::Egress => (station, packet.source_words()),
            Toward::Ingress => (station, [0; 2]),
        };
        if self.accepted == Some(claim) {
            return true;
        }
        self.accept(spoof, claim, packet)
    }

    fn accept(&mut self, spoof: &SpoofTable, claim: (MacAddr, [u64; 2]), packet: &Plain) -> bool {
        let (station, _) = claim;
        let ours = match self.terms.toward {
            Toward::Egress => spoof.allows_source(station, packet.source()),
            Toward::Ingress => station.is_multicast() || spoof.has_mac(station),
        };
        if ours {
            self.accepted = Some(claim);
        }
        ours
    }

    /// Third step: frame `i` passes, and its connection is up to date. `vouched`: the other end has verified its checksum.
    #[expect(clippy::too_many_arguments, reason = "facts of one frame; inlined")]
    #[inline(always)]
    pub fn passes(
        &mut self,
        burst: &RxBurst,
        i: usize,
        station: MacAddr,
        vlan: u16,
        packet: &Plain,
        prospect: &Prospect,
        vouched: bool,
        dither: u32,
    ) -> bool {
        if !self.is_ours(station, packet) {
            return false;
        }
        if self.terms.config.checksum && !vouched && !is_vouched_for(burst, i) && !checksum_ok(burst, i, packet) {
            return false;
        }
        let key = packet.key(self.terms.toward, self.zone | vlan);
        match steady(self.map, &self.terms, packet, &key, prospect.likely, dither) {
            Some(CtState::New) => self.new += 1,
            Some(_) => self.established += 1,
            None => return false,
        }
        true
    }

    /// Frames that pass have right checksums.
    #[inline(always)]
    pub fn verifies(&self) -> bool {
        self.terms.config.checksum
    }

    /// Counts what was let pass. To be called before the burst ends.
    pub fn settle(self) {
        if let Some(counters) = self.counters {
            counters.count_states(CtState::New, self.new);
            counters.count_states(CtState::Established, self.established);
        }
    }
}

/// The port that the frame came from vouches for its checksum, or it is yet to be computed.
#[inline(always)]
fn is_vouched_for(burst: &RxBurst, i: usize) -> bool {
    burst.meta(i).is_some_and(|meta| {
        let Offload { needs_csum, csum_valid, .. } = meta.offload;
        needs_csum || csum_valid
    })
}

#[inline]
fn checksum_ok(burst: &RxBurst, i: usize, packet: &Plain) -> bool {
    let head = burst.snapshot(i);
    packet.checksum_ok(head, &burst.body(i, head.len() as u32))
}
