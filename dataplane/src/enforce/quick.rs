//! The short way through a port's firewall: plain packets of connections that only need their bookkeeping done.
//!
//! What is judged is a [`Train`]: packets of one connection. Over a burst it goes in steps, so that the tables' cache lines are on their way
//! while other trains are looked at: [`Quick::prepare`] for each, then [`Quick::locate`] for each, then [`Quick::pass`] for all. The last one
//! lets packets pass only where [`super::stage`] would, and leaves behind what it would; at anything else it stops and changes nothing.
use super::flow_cache::FlowHash;
use super::port::{FirewallCounters, PortFirewall};
use super::vm::VmFirewall;
use crate::conntrack::{
    ConnMap, CtState, Ends, KeyWords, Likely, Particulars, Plain, Terms, Toward, Whereabouts, steady,
};
use crate::firewall::spoof::SpoofTable;
use crate::frame::{BURST, run};
use crate::packet::{IpProto, MacAddr};

/// Where the entry of a connection probably is, in one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prospect {
    pub(super) whereabouts: Whereabouts,
    pub(super) likely: Likely,
}

impl Prospect {
    /// Not looked for.
    pub const NONE: Self = Self { whereabouts: Whereabouts::NONE, likely: Likely::NONE };

    /// It was looked for in the table, not guessed.
    #[inline(always)]
    pub fn was_searched(&self) -> bool {
        !self.whereabouts.is_none()
    }

    /// The slot where it probably is; no slot's number if nobody knows.
    #[inline(always)]
    pub fn slot(&self) -> u32 {
        self.likely.slot()
    }
}

impl Default for Prospect {
    fn default() -> Self {
        Self::NONE
    }
}

/// Frames `first..end` of a burst.
#[derive(Clone, Copy, Default)]
pub(crate) struct Train {
    pub first: u8,
    pub end: u8,
    /// They are plain packets between the same ends; otherwise it is one frame.
    pub is_plain: bool,
    /// Their connection can be named, so that its entries can be fetched into the cache.
    pub is_named: bool,
    /// The first packet.
    pub plain: Plain,
    /// What their connection goes by in the flow cache.
    pub flow: FlowHash,
    /// Where their connection probably is in the table of the VM that they come from, and in that of the VM that they probably go to.
    pub near: Prospect,
    pub far: Prospect,
}

impl Train {
    /// A bit for each of its frames.
    #[inline(always)]
    pub fn frames(&self) -> u64 {
        run(self.first, self.end)
    }
}

/// A station and a source address that a port's anti-spoofing rules let pass.
#[derive(Clone, Copy)]
pub(crate) struct Accepted {
    /// A MAC address, or what is none.
    station: u64,
    source: [u64; 2],
}

impl Accepted {
    pub const NOBODY: Self = Self { station: u64::MAX, source: [0; 2] };
}

/// What trains have in common that are to pass.
struct Alike<'f> {
    station: MacAddr,
    zone: u16,
    facts: &'f [Particulars; BURST],
    only: u64,
    dither: u32,
}

/// One port's firewall in one direction, from the VM (`EGRESS`) or to it, for the time of a burst.
pub(crate) struct Quick<'a, const EGRESS: bool> {
    pub(super) vm: &'a VmFirewall,
    pub(super) map: &'a ConnMap,
    pub(super) terms: Terms<'a>,
    /// Zone of VLAN 0.
    zone: u16,
    /// The anti-spoofing rules, where anything is checked.
    spoof: Option<&'a SpoofTable>,
    counters: Option<&'a FirewallCounters>,
    /// Packets let pass and not yet counted.
    new: u64,
    established: u64,
    /// The last station, and for the direction from the VM its address, that the anti-spoofing rules let pass. May be set to what it was in
    /// another burst of the same direction, under the same rules.
    pub accepted: Accepted,
}

impl<'a, const EGRESS: bool> Quick<'a, EGRESS> {
    pub(super) const TOWARD: Toward = if EGRESS { Toward::Egress } else { Toward::Ingress };

    pub fn new(firewall: &'a PortFirewall, thread: usize, now_ns: u64) -> Self {
        let rules = &*firewall.rules;
        Self {
            vm: &firewall.vm,
            map: firewall.vm.map(),
            zone: firewall.zone(0),
            spoof: Some(&*rules.spoof).filter(|spoof| spoof.is_enabled()),
            terms: Terms::new(rules.generation, &rules.track, now_ns / 1_000_000),
            counters: firewall.ledgers.get(thread).map(|ledger| ledger.of(Self::TOWARD)),
            new: 0,
            established: 0,
            accepted: Accepted::NOBODY,
        }
    }

    /// The parts of a connection's hash that are about its ends; at the other firewall they are [`Ends::turned`].
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

    /// Looks again: the entry may have been made meanwhile. A guess stays what it is.
    pub fn relocate(&self, prospect: &mut Prospect) {
        if !prospect.whereabouts.is_none() {
            prospect.likely = self.map.likely(prospect.whereabouts);
        }
    }

    /// In place of the first and second step, where somebody remembers the slot: fetches the entry.
    #[inline(always)]
    pub fn guess(&self, slot: u32) -> Prospect {
        Prospect { whereabouts: Whereabouts::NONE, likely: self.map.prefetch_entry(slot) }
    }

    /// It is a guess where the entry is, and not a right one.
    #[inline(always)]
    pub fn is_wrong(&self, prospect: &Prospect, packet: &Plain, vlan: u16) -> bool {
        prospect.whereabouts.is_none() && !self.map.is_there(prospect.likely, &self.key(packet, vlan))
    }

    /// The key of a packet.
    #[inline(always)]
    pub(super) fn key(&self, packet: &Plain, vlan: u16) -> KeyWords {
        packet.key(Self::TOWARD, self.zone | vlan)
    }

    /// A packet was let pass by other means, and is to be counted.
    #[inline(always)]
    pub(super) fn count(&mut self, state: CtState) {
        *(if state == CtState::New { &mut self.new } else { &mut self.established }) += 1;
    }

    /// Whose frame it is: from the VM, or for it. `station`: its source there, its destination here.
    #[inline(always)]
    pub(super) fn is_ours(&mut self, station: MacAddr, packet: &Plain) -> bool {
        let Some(spoof) = self.spoof else { return true };
        let Accepted { station: known, source: [a, b] } = self.accepted;
        // To the VM, any address may come.
        let [c, d] = if EGRESS { packet.source_words() } else { [a, b] };
        (known ^ station.as_u64()) | (a ^ c) | (b ^ d) == 0 || self.accept(spoof, station, packet)
    }

    #[inline(never)]
    fn accept(&mut self, spoof: &SpoofTable, station: MacAddr, packet: &Plain) -> bool {
        let ours = match Self::TOWARD {
            Toward::Egress => spoof.allows_source(station, packet.source()),
            Toward::Ingress => station.is_multicast() || spoof.has_mac(station),
        };
        if ours {
            self.accepted = Accepted { station: station.as_u64(), source: packet.source_words() };
        }
        ours
    }

    /// Third step: lets trains pass, whose connections are then up to date, up to the first that cannot as a whole. Returns how many passed,
    /// and a bit for each frame that did; some of the one where it stopped may be among them. `station`: whose they are: from the VM their
    /// source, to the VM their destination. `verified`: their checksums are right, or somebody vouches for them. `only`: the frames that
    /// are to pass.
    #[expect(clippy::too_many_arguments, reason = "facts of all trains")]
    #[inline(never)]
    pub fn pass(
        &mut self,
        station: MacAddr,
        vlan: u16,
        verified: bool,
        trains: &[Train],
        facts: &[Particulars; BURST],
        only: u64,
        dither: u32,
    ) -> (usize, u64) {
        let (mut count, mut passed) = (0, 0);
        if self.verifies() && !verified {
            return (count, passed);
        }
        // To the VM, whose frames they are does not depend on the packet.
        if !EGRESS && trains.first().is_some_and(|first| !self.is_ours(station, &first.plain)) {
            return (count, passed);
        }
        let alike = Alike { station, zone: self.zone | vlan, facts, only, dither };
        let mut go_on = true;
        while go_on && let Some(rest @ [first, ..]) = trains.get(count..) {
            let (more, frames);
            (more, frames, go_on) = match first.plain.proto() {
                IpProto::UDP => self.pass_as::<true>(rest, &alike),
                _ => self.pass_as::<false>(rest, &alike),
            };
            count += more;
            passed |= frames;
        }
        (count, passed)
    }

    /// As [`Self::pass`], up to the first train that is of the other protocol, too: datagrams if `UDP`, else segments. Each has a loop of its
    /// own, in which nothing else wants registers. Returns as well whether that is why it stopped.
    #[inline(never)]
    fn pass_as<const UDP: bool>(&mut self, trains: &[Train], alike: &Alike<'_>) -> (usize, u64, bool) {
        let Alike { station, zone, facts, only, dither } = *alike;
        let (mut count, mut passed) = (0, 0);
        for train in trains {
            let frames = train.frames();
            if (train.plain.proto() == IpProto::UDP) != UDP {
                return (count, passed, true);
            }
            if !train.is_plain || frames & !only != 0 || EGRESS && !self.is_ours(station, &train.plain) {
                break;
            }
            let Some(facts) = facts.get(usize::from(train.first)..usize::from(train.end)) else { break };
            let packets = self.pass_train::<UDP>(zone, train, facts, dither);
            if packets != facts.len() {
                if packets != 0 {
                    passed |= run(train.first, train.first + packets as u8);
                }
                break;
            }
            passed |= frames;
            count += 1;
        }
        (count, passed, false)
    }

    #[inline(always)]
    fn likely(train: &Train) -> Likely {
        if EGRESS { train.near.likely } else { train.far.likely }
    }

    /// As [`Self::pass`], for those packets of one train whose facts are given. Returns how many of them, from the first on, pass.
    pub fn pass_some(
        &mut self,
        station: MacAddr,
        vlan: u16,
        verified: bool,
        train: &Train,
        facts: &[Particulars],
        dither: u32,
    ) -> usize {
        let may = train.is_plain && (verified || !self.verifies()) && self.is_ours(station, &train.plain);
        if facts.is_empty() || !may {
            return 0;
        }
        let zone = self.zone | vlan;
        match train.plain.proto() {
            IpProto::UDP => self.pass_train::<true>(zone, train, facts, dither),
            _ => self.pass_train::<false>(zone, train, facts, dither),
        }
    }

    #[inline(always)]
    fn pass_train<const UDP: bool>(&mut self, zone: u16, train: &Train, facts: &[Particulars], dither: u32) -> usize {
        // Evenly distributed, another number for each train and end.
        let dither = || (u32::from(train.first) << 1 | u32::from(EGRESS)).wrapping_mul(0x9e37_79b9) ^ dither;
        let key = train.plain.key(Self::TOWARD, zone);
        let likely = Self::likely(train);
        match steady::<UDP>(self.map, &self.terms, Self::TOWARD, facts, &key, likely, dither) {
            Some((packets, state)) => {
                let counted = if state == CtState::New { &mut self.new } else { &mut self.established };
                *counted += packets as u64;
                packets
            }
            None => 0,
        }
    }

    /// Frames that pass have right checksums.
    #[inline(always)]
    pub fn verifies(&self) -> bool {
        self.terms.config.checksum
    }

    /// Counts what was let pass. To be called at the end.
    pub fn settle(&self) {
        if let Some(counters) = self.counters {
            counters.count_states(CtState::New, self.new);
            counters.count_states(CtState::Established, self.established);
        }
    }
}
