//! The short way through a port's firewall: plain packets of connections that only need their bookkeeping done.
//!
//! Over a burst it goes in steps, so that the tables' cache lines are on their way while other frames are looked at:
//! [`Quick::prepare`] for the packets of each connection, then [`Quick::locate`] for each, then [`Quick::passes`]. The last one lets packets
//! pass only where [`super::stage`] would, and leaves behind what it would; to anything else it says no and changes nothing.
use arrayvec::ArrayVec;

use super::port::{FirewallCounters, PortFirewall};
use crate::conntrack::{ConnMap, CtState, Ends, Likely, Particulars, Plain, Terms, Toward, Whereabouts, steady};
use crate::firewall::spoof::SpoofTable;
use crate::packet::MacAddr;

/// Entries whose change the table is told of together: what it takes to do so is a memory fence for all of them.
const CHANGED: usize = 16;

/// Where the entry of a connection probably is, in one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prospect {
    whereabouts: Whereabouts,
    likely: Likely,
}

impl Prospect {
    /// Not looked for.
    pub const NONE: Self = Self { whereabouts: Whereabouts::NONE, likely: Likely::NONE };
}

impl Default for Prospect {
    fn default() -> Self {
        Self::NONE
    }
}

/// What a frame says of where it comes from, or goes to.
#[derive(Clone, Copy)]
struct Claim {
    station: MacAddr,
    source: [u64; 2],
    /// Somebody's: any address at all may be claimed, so none can stand for nobody's.
    made: bool,
}

impl Claim {
    const NOBODYS: Self = Self { station: MacAddr::ZERO, source: [0; 2], made: false };

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        let ([a, b], [c, d]) = (self.source, other.source);
        self.made && (self.station.as_u64() ^ other.station.as_u64()) | (a ^ c) | (b ^ d) == 0
    }
}

/// One port's firewall in one direction, from the VM (`EGRESS`) or to it, for the time of a burst.
pub(crate) struct Quick<'a, const EGRESS: bool> {
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
    accepted: Claim,
    /// Entries that were changed, of which the table is still to be told.
    changed: ArrayVec<Likely, CHANGED>,
}

impl<'a, const EGRESS: bool> Quick<'a, EGRESS> {
    const TOWARD: Toward = if EGRESS { Toward::Egress } else { Toward::Ingress };

    pub fn new(firewall: &'a PortFirewall, thread: usize, now_ns: u64) -> Self {
        let rules = &*firewall.rules;
        Self {
            map: firewall.vm.map(),
            zone: firewall.zone(0),
            spoof: Some(&*rules.spoof).filter(|spoof| spoof.is_enabled()),
            terms: Terms { generation: rules.generation, config: &rules.track, now_ms: now_ns / 1_000_000 },
            counters: firewall.ledgers.get(thread).map(|ledger| ledger.of(Self::TOWARD)),
            new: 0,
            established: 0,
            accepted: Claim::NOBODYS,
            changed: ArrayVec::new(),
        }
    }

    /// The part of a connection's hash that is the same at both ends.
    #[inline(always)]
    pub fn ends(&self, packet: &Plain) -> Ends {
        self.map.ends(&packet.key(Self::TOWARD, 0))
    }

    /// First step: hashes, and fetches the bucket, or `both` in which the entry may be.
    #[inline(always)]
    pub fn prepare(&self, ends: Ends, packet: &Plain, vlan: u16, both: bool) -> Prospect {
        let [.., rest] = packet.key(Self::TOWARD, self.zone | vlan);
        Prospect { whereabouts: self.map.prefetch_places(ends, rest, both), likely: Likely::NONE }
    }

    /// Second step: finds the entry, and fetches it. False: it is not where it most probably would be, and [`Self::locate_again`] should
    /// follow, a little later.
    #[inline(always)]
    pub fn locate(&self, prospect: &mut Prospect) -> bool {
        prospect.likely = self.map.prefetch_likely(prospect.whereabouts);
        prospect.likely != Likely::NONE
    }

    /// Looks at the less probable place.
    pub fn locate_again(&self, prospect: &mut Prospect) {
        if prospect.likely == Likely::NONE {
            prospect.likely = self.map.prefetch_less_likely(prospect.whereabouts);
        }
    }

    /// Looks again: the entry may have been made meanwhile.
    pub fn relocate(&self, prospect: &mut Prospect) {
        prospect.likely = self.map.likely(prospect.whereabouts);
    }

    /// Whose frame it is: from the VM, or for it. `station`: its source there, its destination here.
    #[inline(always)]
    fn is_ours(&mut self, station: MacAddr, packet: &Plain) -> bool {
        let Some(spoof) = self.spoof else { return true };
        // To the VM, any address may come.
        let claim = Claim { station, source: if EGRESS { packet.source_words() } else { [0; 2] }, made: true };
        self.accepted.is(&claim) || self.accept(spoof, claim, packet)
    }

    #[inline(never)]
    fn accept(&mut self, spoof: &SpoofTable, claim: Claim, packet: &Plain) -> bool {
        let station = claim.station;
        let ours = match Self::TOWARD {
            Toward::Egress => spoof.allows_source(station, packet.source()),
            Toward::Ingress => station.is_multicast() || spoof.has_mac(station),
        };
        if ours {
            self.accepted = claim;
        }
        ours
    }

    /// Third step: how many of the packets, from the first on, pass; their connection is up to date. `packet` is one of them, `facts` are
    /// all. `verified`: their checksums are right, or somebody vouches for them.
    #[expect(clippy::too_many_arguments, reason = "facts of one connection; inlined")]
    #[inline(always)]
    pub fn passes(
        &mut self,
        station: MacAddr,
        vlan: u16,
        packet: &Plain,
        facts: &[Particulars],
        prospect: &Prospect,
        verified: bool,
        dither: u32,
    ) -> usize {
        if self.verifies() && !verified || !self.is_ours(station, packet) {
            return 0;
        }
        let key = packet.key(Self::TOWARD, self.zone | vlan);
        let likely = prospect.likely;
        match steady(self.map, &self.terms, Self::TOWARD, packet, facts, &key, likely, dither) {
            Some((packets, state)) => {
                let counted = if state == CtState::New { &mut self.new } else { &mut self.established };
                *counted += packets as u64;
                if self.changed.is_full() {
                    self.note();
                }
                let _ = self.changed.try_push(likely);
                packets
            }
            None => 0,
        }
    }

    #[inline(always)]
    fn note(&mut self) {
        if !self.changed.is_empty() {
            self.map.note_bookkeeping(&self.changed);
            self.changed.clear();
        }
    }

    /// Frames that pass have right checksums.
    #[inline(always)]
    pub fn verifies(&self) -> bool {
        self.terms.config.checksum
    }

    /// Counts what was let pass, and tells the table what was changed. To be called before the burst ends.
    pub fn settle(mut self) {
        self.note();
        if let Some(counters) = self.counters {
            counters.count_states(CtState::New, self.new);
            counters.count_states(CtState::Established, self.established);
        }
    }
}
