//! The middle way through a port's firewall: packets that open connections or move them on, whose headers have been read already.
//!
//! [`super::quick`] leaves to it what is not plain or needs more than bookkeeping; it leaves to [`super::stage`], as frames, what it would
//! have to look at more closely. Whose frame it is, what it is to its connection, the policy's and the limits' word, and what is counted and
//! stored are the same on all three ways.
use super::quick::{Prospect, Quick};
use super::stage::{End, Opening, Outcome, Ruling, Stage, tell_limits};
use crate::conntrack::{
    CtState, KeyWords, Particulars, Plain, Progress, Whole, begin, flow, next_dither, progress, stations, whole,
};
use crate::firewall::{FlowKey, L4Key};
use crate::frame::SNAPSHOT_BYTES;
use crate::packet::MacAddr;

/// A frame of which the headers have been read.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// Its source at the end that it comes from, its destination at the other.
    pub station: MacAddr,
    /// A packet of its conversation, and its own facts.
    pub packet: &'a Plain,
    pub facts: &'a Particulars,
    /// It was found plain; otherwise its connection could be named.
    pub is_plain: bool,
    /// Private copy of its beginning, of which the first so many bytes are the frame's.
    pub head: &'a [u8; SNAPSHOT_BYTES],
    pub have: usize,
    /// Its length, bytes.
    pub len: u32,
}

impl Stage {
    /// Judges a frame by what is known of it. `prospect`: where its connection probably is. `verified` tells whether its checksum is right,
    /// or vouched for; `end` where it is judged, if it is to be judged though it does more than move its connection on. `None`: not known well
    /// enough, and [`Stage::judge`] is to look at the frame; or not to be judged here.
    #[inline(always)]
    pub(crate) fn judge_known<'e, const EGRESS: bool>(
        &mut self,
        quick: &mut Quick<'_, EGRESS>,
        known: Known<'_>,
        vlan: u16,
        prospect: &Prospect,
        verified: impl FnOnce() -> bool,
        end: impl FnOnce() -> Option<End<'e>>,
    ) -> Option<Outcome> {
        let Known { station, packet, facts, is_plain, head, have, .. } = known;
        let packet_is = whole(packet, facts, is_plain, head, have)?;
        if quick.verifies() && !verified() || !quick.is_ours(station, packet) {
            return None;
        }
        let key = quick.key(packet, vlan);
        self.dither = next_dither(self.dither);
        let toward = Quick::<EGRESS>::TOWARD;
        if let Some(Progress { opened, is_reply }) =
            progress(quick.map, &quick.terms, toward, &packet_is, &key, prospect.likely, self.dither)
        {
            quick.count(CtState::Established);
            if let Some(decision) = opened {
                let [vm, other] = stations(&key);
                let opener = if EGRESS == is_reply { other } else { vm };
                tell_limits(quick.vm, decision, opener.address);
            }
            return Some(Outcome::Pass);
        }
        Some(self.judge_others(&end()?, quick, known, &packet_is, &key, prospect))
    }

    /// The part of [`Self::judge_known`] for packets that do not just move their connection on.
    #[inline(never)]
    fn judge_others<const EGRESS: bool>(
        &mut self,
        end: &End<'_>,
        quick: &mut Quick<'_, EGRESS>,
        known: Known<'_>,
        packet: &Whole<'_>,
        key: &KeyWords,
        prospect: &Prospect,
    ) -> Outcome {
        let toward = Quick::<EGRESS>::TOWARD;
        let (map, vm, thread, now_ms) = (quick.map, quick.vm, self.thread, quick.terms.now_ms);
        let Some(vacancy) = map.vacancy(prospect.whereabouts, key) else {
            return self.judge_whole(end, known, packet, key);
        };
        let Some(beginning) = begin(&quick.terms, toward, packet, key, self.dither) else {
            return self.judge_whole(end, known, packet, key);
        };
        quick.count(CtState::New);
        let [near, far] = stations(key);
        let [source, destination] = if EGRESS { [near, far] } else { [far, near] };
        let ports = L4Key::Ports { source: source.port, destination: destination.port };
        let opening = Opening {
            toward,
            key: &FlowKey { remote: far.address, protocol: known.packet.proto().0, l4: Some(ports) },
            source: source.address,
            half_open: true,
            head: known.bytes(),
        };
        let flow = || flow(key, toward);
        let ruling = self.open_as(end, &opening, flow, |_, generation, decision| {
            map.fill(&vacancy, &beginning.entry(generation, decision), now_ms, vm, thread)
        });
        match ruling {
            Ruling::Pass => Outcome::Pass,
            deny @ Ruling::Deny { .. } => self.settle(end, deny, Some(flow()), known.bytes(), known.len),
        }
    }

    /// As [`Stage::judge`] from where it knows the packet.
    #[inline(never)]
    fn judge_whole(&mut self, end: &End<'_>, known: Known<'_>, packet: &Whole<'_>, key: &KeyWords) -> Outcome {
        let judgement = self.track(end, &packet.dissected(key, end.toward));
        self.conclude(end, judgement, known.bytes(), known.len)
    }
}

impl<'a> Known<'a> {
    /// The frame's snapshot.
    #[inline]
    fn bytes(&self) -> &'a [u8] {
        self.head.get(..self.have).unwrap_or_default()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::super::events::EventRing;
    use super::super::port::{FirewallLedger, PortFirewall, PortRules};
    use super::super::quick::Train;
    use super::super::vm::{VmFirewall, VmOptions};
    use super::*;
    use crate::conntrack::sent::{OPTIONS, Random, Sent, entries, frame};
    use crate::conntrack::{Layout, Toward, TrackConfig};
    use crate::firewall::limits::{LimitsConfig, SourceLimits};
    use crate::firewall::policy::{
        Action, Direction, PolicyDocument, PortPolicy, PortRange, Protocol, Rule, SecurityGroup,
    };
    use crate::firewall::spoof::SpoofTable;
    use crate::firewall::{AddressBook, CompileOptions, compile};
    use crate::frame::{Offload, RxBurst};
    use crate::packet::parse_l2;

    const VLAN: u16 = 3;
    const SYN_OPTIONS: &[u8] = &[2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7];

    /// What becomes of a connection depends on the far end's port.
    fn rules() -> Vec<Rule> {
        let at = |direction, port, rule: fn(&mut Rule)| {
            let ports = vec![PortRange::single(port)];
            let mut new = Rule { protocol: Protocol::TCP, ..Rule::allow(direction) };
            *(if direction == Direction::Egress { &mut new.ports } else { &mut new.source_ports }) = ports;
            rule(&mut new);
            new
        };
        let mut rules = Vec::new();
        for direction in [Direction::Egress, Direction::Ingress] {
            rules.push(at(direction, 80, |_| ()));
            rules.push(at(direction, 81, |rule| rule.action = Action::Reject));
            rules.push(at(direction, 82, |rule| rule.log = true));
            rules.push(at(direction, 83, |rule| rule.stateless = true));
            rules.push(at(direction, 84, |rule| rule.protocol = Protocol::UDP));
            rules.push(at(direction, 85, |rule| rule.protocol = Protocol::UDP));
        }
        rules
    }

    fn firewall(random: u64) -> PortFirewall {
        let mut random = Random(random);
        let limits = LimitsConfig {
            max_connections: random.pick(&[3, 100]),
            max_half_open: random.pick(&[0, 2]),
            new_per_second: random.pick(&[0, 50]),
            burst: 4,
            per_source: SourceLimits { max_half_open: random.pick(&[0, 2]), ..SourceLimits::default() },
            ..LimitsConfig::default()
        };
        let options = VmOptions {
            capacity: random.pick(&[4, 64]),
            limits,
            log_new: random.one_in(3),
            ..VmOptions::named("tested")
        };
        let mut document = PolicyDocument::default();
        document.security_groups.insert("group".into(), SecurityGroup { rules: rules(), ..SecurityGroup::default() });
        let mut policy = PortPolicy { security_groups: vec!["group".into()], ..PortPolicy::default() };
        policy.default_egress = Action::Drop;
        policy.anti_spoofing.enabled = !random.one_in(4);
        policy.anti_spoofing.mac = Some(MacAddr::new([2, 0, 0, 0, 0, 1]));
        policy.anti_spoofing.addresses = ["10.0.0.1/32", "fd00::/8"].map(|cidr| cidr.parse().unwrap()).to_vec();
        let mut book = AddressBook::new();
        let options_of_rules = CompileOptions { generation: 0, seed: 3 };
        let compiled = compile(&Arc::new(document), &policy, "tested", &mut book, options_of_rules).unwrap();
        PortFirewall {
            vm: Arc::new(VmFirewall::new(1, &options, [7, 11]).unwrap()),
            index: 2,
            rules: Arc::new(PortRules {
                generation: 1,
                stateless: compiled.any_stateless(),
                policy: Arc::new(compiled),
                sets: Arc::new(book.snapshot(5)),
                spoof: Arc::new(SpoofTable::new(&policy.anti_spoofing, 3)),
                track: TrackConfig {
                    checksum: !random.one_in(4),
                    tcp_loose: random.one_in(2),
                    ..TrackConfig::default()
                },
                reject: policy.reject,
            }),
            ledgers: Arc::new(core::array::from_fn(|_| FirewallLedger::default())),
            rejector: Arc::default(),
        }
    }

    fn burst_of(frame: &[u8], offload: Offload) -> RxBurst {
        let mut burst = RxBurst::new();
        burst.load_private(&mut frame.to_vec());
        let mark = burst.segment_mark();
        burst.push_private(0..frame.len());
        burst.finish_frame(mark, offload);
        burst.take_snapshots();
        burst
    }

    fn end(firewall: &PortFirewall, toward: Toward, now_ns: u64) -> End<'_> {
        End { firewall, port: 5, ingress: 6, ingress_guarded: true, toward, vlan: VLAN, now_ns }
    }

    /// Judges frame 0 as the packet path does. The second: by which way.
    fn as_the_path_does<const EGRESS: bool>(
        stage: &mut Stage,
        burst: &mut RxBurst,
        firewall: &PortFirewall,
        now_ns: u64,
        vouched: bool,
    ) -> (Outcome, usize) {
        let end = end(firewall, Quick::<EGRESS>::TOWARD, now_ns);
        let mut known = || {
            let ((head, have), len) = (burst.head(0), burst.meta(0).unwrap().len);
            let l2 = parse_l2(&head[..have], len).unwrap();
            let (layout, mut facts) = (Layout::new(l2.len, l2.ethertype)?, Particulars::default());
            let (plain, is_plain) = Plain::read(head, have, len as usize, layout, &mut facts)?;
            let station = if EGRESS { l2.src_mac } else { l2.dst_mac };
            let mut quick = Quick::<EGRESS>::new(firewall, stage.thread, now_ns);
            let mut prospect = quick.prepare(quick.ends(&plain), &plain, VLAN, false);
            quick.relocate(&mut prospect);
            let meta = burst.meta(0).unwrap();
            let sure = vouched || meta.offload.needs_csum || meta.offload.csum_valid;
            let sure = sure || plain.checksum_ok(head, have, || burst.body(0, have as u32));
            let (near, far) = (prospect, prospect);
            let train = Train { first: 0, end: 1, is_plain, is_named: true, plain, near, far, ..Train::default() };
            let outcome = if quick.pass_some(station, VLAN, sure, &train, &[facts], 1) == 1 {
                Some((Outcome::Pass, 0))
            } else {
                let known = Known { station, packet: &plain, facts: &facts, is_plain, head, have, len };
                let outcome = stage.judge_known(&mut quick, known, VLAN, &prospect, || sure, || Some(end));
                outcome.map(|outcome| (outcome, 1))
            };
            quick.settle();
            outcome
        };
        known().unwrap_or_else(|| (stage.judge(burst, 0, &end, vouched), 2))
    }

    /// Two VMs see the same frames, one of them by the ways of the packet path, one of them frame by frame from the beginning: what happens
    /// to each frame, what is counted, stored, answered and reported is the same.
    #[test]
    fn all_ways_say_and_do_the_same() {
        let mut random = Random(0xfeed_beef);
        let (mut ways, mut outcomes) = ([0u32; 3], std::collections::BTreeMap::<String, u32>::new());
        for _ in 0..if cfg!(miri) { 3 } else { 400u32 } {
            let seed = random.next();
            let firewalls = [(); 2].map(|()| firewall(seed));
            let [briefly, in_full] = &firewalls;
            let events = [(); 2].map(|()| Arc::new(EventRing::default()));
            let [mut stage, mut stage_in_full] = events.each_ref().map(|ring| Stage::new(0, Arc::clone(ring)));
            let mut now_ns = 1_000_000_000u64;
            let mut sent_to = [[0u32; 2]; 16];
            for step in 0..if cfg!(miri) { 6 } else { 150 } {
                now_ns += random.pick(&[0, 0, 1000, 2_000_000, 40_000_000]);
                if random.one_in(100) {
                    now_ns += 130_000_000_000;
                }
                let n = random.below(16) as usize;
                let (port, toward) = (80 + n as u16 % 7, random.pick(&[Toward::Egress, Toward::Ingress]));
                let own = usize::from(toward == Toward::Ingress);
                let flags = match step % 4 {
                    0 => 0x02,
                    1 => 0x12,
                    _ => random.pick(&[0x10, 0x18, 0x11, 0x02, 0x14, 0x10, 0x10, 0x3f]),
                };
                let [mine, theirs] = [sent_to[n][own], sent_to[n][1 - own]];
                let payload = random.pick(&[0, 0, 0, 100]);
                let sent = Sent {
                    toward,
                    ipv6: n >= 8,
                    tagged: random.one_in(5),
                    port,
                    flags: (n % 7 < 4).then_some(flags),
                    seq: if random.one_in(20) { mine.wrapping_add(1 << 30) } else { mine },
                    ack: theirs,
                    window: 60_000,
                    payload,
                    options: if flags & 2 != 0 { SYN_OPTIONS } else { random.pick(&OPTIONS) },
                };
                sent_to[n][own] = mine.wrapping_add(payload as u32 + u32::from(flags >> 1 & 1) + u32::from(flags & 1));
                let mut frame = frame(&sent);
                if random.one_in(8) {
                    let at = random.below(frame.len() as u64) as usize;
                    frame[at] ^= 1 << random.below(8);
                }
                if parse_l2(&frame, frame.len() as u32).is_err() {
                    continue;
                }
                let offload = Offload { csum_valid: random.one_in(6), ..Offload::default() };
                let vouched = random.one_in(10);
                let [mut one, mut other] = [(); 2].map(|()| burst_of(&frame, offload));
                let (outcome, way) = match toward {
                    Toward::Egress => as_the_path_does::<true>(&mut stage, &mut one, briefly, now_ns, vouched),
                    Toward::Ingress => as_the_path_does::<false>(&mut stage, &mut one, briefly, now_ns, vouched),
                };
                let theirs = stage_in_full.judge(&mut other, 0, &end(in_full, toward, now_ns), vouched);
                assert_eq!(outcome, theirs, "{sent:?} by way {way}: {frame:x?}");
                ways[way] += 1;
                *outcomes.entry(format!("{way} {outcome:?}")).or_default() += 1;
                assert_eq!(entries(briefly.vm.map()), entries(in_full.vm.map()), "{sent:?} by way {way}");
            }
            let seen = |firewall: &PortFirewall| format!("{:?} {:?}", firewall.stats(), firewall.vm.status(now_ns));
            assert_eq!(seen(briefly), seen(in_full));
            let [ours, theirs] = events.each_ref().map(|ring| {
                let mut all = Vec::new();
                ring.drain(&mut all);
                (format!("{all:?}"), ring.lost())
            });
            assert_eq!(ours, theirs);
            let pending = |stage: &Stage| (stage.pending.bytes.clone(), stage.pending.frames.len(), stage.pending.lost);
            assert_eq!(pending(&stage), pending(&stage_in_full));
        }
        let all_ways = ways.iter().all(|&n| n > 1000);
        assert!(cfg!(miri) || all_ways && outcomes.len() > 20, "{ways:?} {outcomes:#?}");
    }
}
