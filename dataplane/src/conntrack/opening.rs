//! The middle way of packets that open connections, and of those that move them on: answers, what completes a handshake, FINs.
//!
//! They differ from plain ones in little: what [`Plain::read`] has found of them holds, if only their connection could be named,
//! and [`whole`] adds what was left out. From there the facts are those that [`super::dissect`] finds.
//!
//! A packet that moves a known connection on the usual way is dealt with as in [`super::steady`]: the few words of the entry that matter are
//! read and changed where they lie. For one that opens a connection the entry is built in words from the beginning. What is stored is what
//! [`super::tracker`] would store, and in every other case nothing is touched, and it is asked.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::dissect::{Dissected, Facts, Segment, Transport};
use super::entry::{Decision, Notes, Traffic, expiry, word};
use super::key::{Flow, Key, Toward, V6, Way};
use super::map::{ConnMap, EntryWords, KeyWords, Likely, Look};
use super::plain::{Particulars, Plain};
use super::steady::Terms;
use super::table::Change;
use super::tcp::{self, Move, TcpState};
use super::udp;
use crate::frame::SNAPSHOT_BYTES;
use crate::packet::IpProto;
use crate::packet::tcp::Flags;

/// A packet that was named, and is whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole<'a> {
    /// None for UDP.
    segment: Option<Segment<'a>>,
    ip_len: u32,
}

/// Looks at the rest of a packet that was named: at what makes it whole. `None`: something about it needs a closer look, or is wrong.
///
/// `packet` is one of its conversation and `facts` are its own; `is_plain`: it was found plain. `head`: as was read, of which the first
/// `have` bytes are the frame's.
#[inline(always)]
pub(crate) fn whole<'a>(
    packet: &Plain,
    facts: &Particulars,
    is_plain: bool,
    head: &'a [u8; SNAPSHOT_BYTES],
    have: usize,
) -> Option<Whole<'a>> {
    let ip_len = facts.ip_len;
    if packet.proto() != IpProto::TCP {
        // What is wrong with a datagram makes it not plain.
        return is_plain.then_some(Whole { segment: None, ip_len });
    }
    let at = packet.transport_at();
    let len = ip_len.saturating_sub(packet.ip_header_len()) as usize;
    let &[offset, flags] = head.get(at + 12..)?.first_chunk::<2>()?;
    let header_len = usize::from(offset >> 4) * 4;
    let flags = Flags::from_bits_retain(flags);
    if header_len < 20 || header_len > len || at + header_len > have || !tcp::flags_possible(flags) {
        return None;
    }
    let options = head.get(at + 20..at + header_len)?;
    let &Particulars { seq, ack, window, .. } = facts;
    let segment = Segment { seq, ack, flags, window, payload_len: (len - header_len) as u32, options };
    Some(Whole { segment: Some(segment), ip_len })
}

/// A packet that was named, and is not plain, is whole: its headers are such as all that look at them closely accept.
#[inline(never)]
pub(crate) fn is_whole(packet: &Plain, facts: &Particulars, head: &[u8; SNAPSHOT_BYTES], have: usize) -> bool {
    whole(packet, facts, false, head, have).is_some()
}

impl<'a> Whole<'a> {
    /// What [`super::dissect`] would find. `key`: the packet's.
    pub(crate) fn dissected(&self, key: &KeyWords, toward: Toward) -> Dissected<'a> {
        Dissected::Flow(Facts {
            flow: flow(key, toward),
            transport: self.segment.map_or(Transport::Udp, Transport::Tcp),
            ip_len: self.ip_len,
        })
    }
}

/// The flow of a packet of TCP or UDP with this key.
pub(crate) fn flow(key: &KeyWords, toward: Toward) -> Flow {
    Flow { key: Key::from_words(*key), toward, icmp: None }
}

/// What a key says of one of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Station {
    pub address: IpAddr,
    pub port: u16,
}

/// The ends of a packet with this key: the VM, and the other.
#[inline(always)]
pub(crate) fn stations(key: &KeyWords) -> [Station; 2] {
    let &[a, b, c, d, rest] = key;
    let is_ipv6 = (rest >> 56) as u8 & V6 != 0;
    let address = |low: u64, high: u64| -> IpAddr {
        if is_ipv6 {
            Ipv6Addr::from_bits(u128::from(low.to_be()) << 64 | u128::from(high.to_be())).into()
        } else {
            Ipv4Addr::from_bits(((high >> 32) as u32).to_be()).into()
        }
    };
    [
        Station { address: address(a, b), port: rest as u16 },
        Station { address: address(c, d), port: (rest >> 16) as u16 },
    ]
}

/// What a packet did to a connection that was known, and that has been answered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// With this packet the connection stopped being half-open: the limits, which counted it so, are to be told.
    pub opened: Option<Decision>,
    /// The packet's source is not the address that opened the connection.
    pub is_reply: bool,
}

/// Brings the connection of a packet up to date that moves it on the usual way: it may pass. `None`, and nothing was changed: it is not for
/// this way. `likely`: the slot where the entry with this `key` probably is.
#[inline(always)]
pub(crate) fn progress(
    map: &ConnMap,
    terms: &Terms<'_>,
    toward: Toward,
    packet: &Whole<'_>,
    key: &KeyWords,
    likely: Likely,
    dither: u32,
) -> Option<Progress> {
    let look = map.look(likely, key)?;
    let notes = Notes(look.word::<{ word::NOTES }>());
    if look.is_expired(terms.now_ms) || notes.policy_generation() != terms.generation || !notes.decision().allowed() {
        return None;
    }
    let known = Known { map, likely, look, notes, terms, way: notes.way(toward), ip_len: packet.ip_len, dither };
    let Some(segment) = &packet.segment else { return known.first_datagram_back() };
    match (Move::of(segment.flags)?, known.way, notes.state()) {
        (Move::SynAck, Way::Reply, SYN_SENT) => known.answer(segment),
        _ if !notes.seen_reply() => None,
        (Move::Ack, Way::Original, SYN_RECV) => known.complete(segment),
        (flags, ..) => known.close(segment, flags),
    }
}

const SYN_SENT: u8 = TcpState::SynSent as u8;
const SYN_RECV: u8 = TcpState::SynRecv as u8;

#[inline(always)]
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A packet, and the entry of its connection as it is.
#[derive(Clone, Copy)]
struct Known<'a> {
    map: &'a ConnMap,
    likely: Likely,
    look: Look<'a>,
    notes: Notes,
    terms: &'a Terms<'a>,
    way: Way,
    ip_len: u32,
    dither: u32,
}

impl Known<'_> {
    #[inline(never)]
    fn answer(&self, segment: &Segment<'_>) -> Option<Progress> {
        let after = tcp::answered(&self.tcp(), self.notes.retrans(), segment, self.terms.config)?;
        self.amend::<{ word::REPLY }>(TcpState::SynRecv, self.notes.with_seen_reply(), &after, true)
    }

    #[inline(never)]
    fn complete(&self, segment: &Segment<'_>) -> Option<Progress> {
        let after = tcp::completed(&self.tcp(), self.notes.retrans(), segment, self.terms.config)?;
        self.amend::<{ word::ORIGINAL }>(TcpState::Established, self.notes.with_assured(), &after, true)
    }

    #[inline(never)]
    fn close(&self, segment: &Segment<'_>, flags: Move) -> Option<Progress> {
        let Self { notes, way, .. } = *self;
        let config = self.terms.config;
        let (state, after, semantic) =
            tcp::closed(&self.tcp(), notes.retrans(), notes.state(), segment, flags, way, config)?;
        let semantic = semantic || state as u8 != notes.state();
        match way {
            Way::Original => self.amend::<{ word::ORIGINAL }>(state, notes, &after, semantic),
            Way::Reply => self.amend::<{ word::REPLY }>(state, notes, &after, semantic),
        }
    }

    /// TCP's words.
    #[inline(always)]
    fn tcp(&self) -> [u32; 12] {
        const P: usize = word::PROTOCOL;
        let [a, b, c, d, e, f] = [
            self.look.word::<P>(),
            self.look.word::<{ P + 1 }>(),
            self.look.word::<{ P + 2 }>(),
            self.look.word::<{ P + 3 }>(),
            self.look.word::<{ P + 4 }>(),
            self.look.word::<{ P + 5 }>(),
        ];
        let (low, high) = (|word: u64| word as u32, |word: u64| (word >> 32) as u32);
        [low(a), high(a), low(b), high(b), low(c), high(c), low(d), high(d), low(e), high(e), low(f), high(f)]
    }

    /// The word in which packets and bytes are counted, with one packet more.
    #[inline(always)]
    fn counted<const TRAFFIC: usize>(&self) -> u64 {
        Traffic::from_word(self.look.word::<TRAFFIC>()).plus(1, self.ip_len, self.dither).to_word()
    }

    /// If the limits count the connection as half-open, and it no longer is: they are to be told.
    #[inline(always)]
    fn opened(&self, half_open: bool) -> Option<Decision> {
        let decision = self.notes.decision();
        (decision.counts_half_open() && !half_open).then_some(decision)
    }

    /// Makes the entry one in `state`, with what else is noted and changes, if nobody has touched it. `TRAFFIC`: where its packet counts.
    #[inline(always)]
    fn amend<const TRAFFIC: usize>(
        &self,
        state: TcpState,
        notes: Notes,
        after: &tcp::After,
        semantic: bool,
    ) -> Option<Progress> {
        const P: usize = word::PROTOCOL;
        let opened = self.opened(state == TcpState::SynRecv);
        let mut notes = notes.with_state(state as u8).with_retrans(after.retrans);
        if opened.is_some() {
            notes = notes.with_decision(notes.decision().opened());
        }
        let traffic = self.counted::<TRAFFIC>();
        let change = if semantic || opened.is_some() { Change::Semantic } else { Change::Bookkeeping };
        let until = expiry(self.terms.now_ms, after.timeout_ms);
        let entry = self.map.claim(self.likely, self.look, until, change)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = after.words;
        entry.set::<P>(pair(a, b));
        entry.set::<{ P + 1 }>(pair(c, d));
        entry.set::<{ P + 2 }>(pair(e, f));
        entry.set::<{ P + 3 }>(pair(g, h));
        entry.set::<{ P + 4 }>(pair(i, j));
        entry.set::<{ P + 5 }>(pair(k, l));
        entry.set::<TRAFFIC>(traffic);
        entry.set::<{ word::NOTES }>(notes.0);
        entry.commit();
        Some(Progress { opened, is_reply: self.way == Way::Reply })
    }

    /// The first answer to a datagram.
    #[inline(never)]
    fn first_datagram_back(&self) -> Option<Progress> {
        if self.notes.seen_reply() || self.way == Way::Original {
            return None;
        }
        let opened = self.opened(false);
        let notes = self.notes.with_seen_reply().with_decision(self.notes.decision().opened());
        let traffic = self.counted::<{ word::REPLY }>();
        let entry = self.map.claim(self.likely, self.look, self.terms.udp_until, Change::Semantic)?;
        entry.set::<{ word::REPLY }>(traffic);
        entry.set::<{ word::NOTES }>(notes.0);
        entry.commit();
        Some(Progress { opened, is_reply: true })
    }
}

/// A connection that a packet begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beginning {
    key: KeyWords,
    expires_ms: u32,
    notes: Notes,
    traffic: Traffic,
    protocol: [u64; 6],
}

/// What a packet begins that belongs to no connection: half-open, and yet to be asked about and stored. `None`: it is not for this way.
#[inline(always)]
pub(crate) fn begin(
    terms: &Terms<'_>,
    toward: Toward,
    packet: &Whole<'_>,
    key: &KeyWords,
    dither: u32,
) -> Option<Beginning> {
    let (state, expires_ms, protocol) = match &packet.segment {
        Some(segment) => {
            let Some(Move::Syn) = Move::of(segment.flags) else { return None };
            let tcp::After { words, timeout_ms, .. } = tcp::begun(segment, terms.config)?;
            let [a, b, c, d, e, f, g, h, i, j, k, l] = words;
            let words = [pair(a, b), pair(c, d), pair(e, f), pair(g, h), pair(i, j), pair(k, l)];
            (TcpState::SynSent as u8, expiry(terms.now_ms, timeout_ms), words)
        }
        None => {
            let stream_from = (terms.now_ms as u32).wrapping_add(udp::STREAM_AFTER_MS);
            (0, terms.udp_until, [u64::from(stream_from), 0, 0, 0, 0, 0])
        }
    };
    Some(Beginning {
        key: *key,
        expires_ms,
        notes: Notes::begun(toward, state),
        traffic: Traffic::default().plus(1, packet.ip_len, dither),
        protocol,
    })
}

impl Beginning {
    /// The entry to be stored, with the policy's and the limits' word.
    #[inline(always)]
    pub(crate) fn entry(&self, generation: u32, decision: Decision) -> EntryWords {
        let [a, b, c, d, e] = self.key;
        let [u, v, w, x, y, z] = self.protocol;
        let notes = self.notes.with_policy(generation, decision).0;
        [a, b, c, d, e, u64::from(self.expires_ms), notes, self.traffic.to_word(), 0, u, v, w, x, y, z]
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::CtState;
    use super::super::config::TrackConfig;
    use super::super::dissect::{Checksum, Packet, dissect};
    use super::super::plain::Layout;
    use super::super::steady::tests::{
        GENERATION, OPTIONS, Random, Sent, checksum_ok, entries, frame, in_full, likely, spoilt,
    };
    use super::super::tracker::Judgement;
    use super::*;
    use crate::firewall::limits::Admission;
    use crate::frame::Offload;
    use crate::offload::validate;
    use crate::packet::{MacAddr, parse, parse_l2};

    /// What Linux, Windows and others put into SYNs, and what nobody should.
    const SYN_OPTIONS: [&[u8]; 9] = [
        &[2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7],
        &[2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 200],
        &[2, 4, 5, 180, 1, 3, 3, 8, 1, 1, 4, 2],
        &[2, 4, 5, 180],
        &[2, 4, 5, 180, 1, 3, 3, 2],
        &[3, 3, 7, 4, 2, 0],
        &[3, 4, 7, 1, 4, 2, 1, 1],
        &[4, 1, 3, 3, 7, 1, 1, 1],
        &[2, 4, 5, 180, 4, 2, 5, 10, 0, 0, 0, 9, 255, 0, 0, 0, 1, 3, 3, 7],
    ];

    /// What is known of a frame of which `have` bytes are at hand: the packet, and what makes it whole.
    fn known<T>(frame: &[u8], have: usize, f: impl FnOnce(&Plain, Option<Whole<'_>>) -> T) -> Option<T> {
        let mut head = [0xee; SNAPSHOT_BYTES];
        let have = have.min(frame.len()).min(SNAPSHOT_BYTES);
        head[..have].copy_from_slice(&frame[..have]);
        let l2 = parse_l2(&head[..have], frame.len() as u32).ok()?;
        let (layout, mut facts) = (Layout::new(l2.len, l2.ethertype)?, Particulars::default());
        let (plain, is_plain) = Plain::read(&head, have, frame.len(), layout, &mut facts)?;
        let whole = whole(&plain, &facts, is_plain, &head, have);
        assert!(!is_plain || whole.is_some(), "what is plain is whole: {frame:x?}");
        Some(f(&plain, whole))
    }

    #[test]
    fn what_is_whole_is_what_a_closer_look_finds() {
        use crate::firewall::spoof::{SpoofConfig, SpoofTable};
        let spoof = SpoofConfig {
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
            addresses: ["10.0.0.0/8", "fd00::/8"].map(|cidr| cidr.parse().unwrap()).to_vec(),
            ..SpoofConfig::default()
        };
        let spoof = SpoofTable::new(&spoof, 3);
        let mut random = Random(0x1234_5678_9abc_def1);
        let (mut whole_ones, mut wrong_sums, mut left, mut ours) = (0, 0, 0, 0);
        for n in 0..if cfg!(miri) { 300 } else { 200_000 } {
            let sent = Sent {
                toward: random.pick(&[Toward::Ingress, Toward::Egress]),
                ipv6: random.one_in(2),
                tagged: random.one_in(3),
                port: random.pick(&[67, 68, 546, 547, 80, 443]),
                flags: (!random.one_in(4)).then(|| {
                    random
                        .pick(&[0x02, 0x02, 0x12, 0x12, 0x10, 0x11, 0x04, 0x14, 0xc2, 0x42, 0x52, 0x22, 0, 0x3f, 0x06])
                }),
                seq: random.next() as u32,
                ack: random.next() as u32,
                window: random.next() as u16,
                payload: random.pick(&[0, 0, 0, 1, 18, 700]),
                options: if random.one_in(3) { random.pick(&OPTIONS) } else { random.pick(&SYN_OPTIONS) },
            };
            let (frame, have) = spoilt(&mut random, &sent, n);
            known(&frame, have, |plain, whole| {
                let Some(whole) = whole else {
                    left += 1;
                    return;
                };
                whole_ones += 1;
                let look = |checksum| {
                    let packet = Packet { zone: Some(9), ..Packet::whole(&frame, sent.toward, checksum) };
                    dissect(&packet, true)
                };
                let Ok(Dissected::Flow(theirs)) = look(Checksum::Vouched) else {
                    panic!("{:?} of {frame:x?}", look(Checksum::Vouched))
                };
                let Dissected::Flow(facts) = whole.dissected(&plain.key(sent.toward, 9), sent.toward) else {
                    panic!("no flow")
                };
                assert_eq!(format!("{facts:?}"), format!("{theirs:?}"), "{sent:?}");
                let [vm, other] = stations(&plain.key(sent.toward, 9));
                let key = theirs.flow.key;
                assert_eq!(vm, Station { address: key.local(), port: key.local_port });
                assert_eq!(other, Station { address: key.remote(), port: key.remote_port });
                let sum_ok = checksum_ok(plain, &frame, frame.len());
                assert_eq!(sum_ok, look(Checksum::Verify).is_ok(), "{sent:?}");
                wrong_sums += u32::from(!sum_ok);
                // A checksum that is owed is what a guest may leave to others.
                let owed = |csum_start, csum_offset| Offload {
                    needs_csum: true,
                    csum_start,
                    csum_offset,
                    ..Offload::default()
                };
                let field = if matches!(theirs.transport, Transport::Tcp(_)) { 16 } else { 6 };
                let offload = owed(plain.transport_at() as u16, field);
                assert!(plain.owes_checksum(&offload) && !plain.owes_checksum(&owed(30, field)));
                let snapshot = &frame[..have.min(frame.len()).min(SNAPSHOT_BYTES)];
                assert_eq!(validate(&offload, snapshot, frame.len() as u32), Ok(offload), "{sent:?}");
                // Anti-spoofing reads it, and asks nothing of it but its addresses.
                let headers = parse(&frame, frame.len() as u32).unwrap();
                let is_ours = spoof.check(&frame, &headers).is_ok();
                assert_eq!(spoof.allows_source(headers.l2.src_mac, plain.source()), is_ours, "{sent:?}");
                ours += u32::from(is_ours);
            });
        }
        let counts = [whole_ones, wrong_sums, left, ours];
        assert!(
            cfg!(miri) || counts.iter().zip([80_000, 5000, 5000, 10_000]).all(|(n, least)| *n > least),
            "{counts:?}"
        );
    }

    /// Stores what a packet begins as [`in_full`] does.
    fn store(map: &ConnMap, key: &KeyWords, beginning: &Beginning, now_ms: u64, half_open: bool) {
        let [.., rest] = *key;
        let whereabouts = map.prefetch_places(map.ends(key), rest, false);
        let admission = Admission { half_open, tracked_source: half_open };
        let entry = beginning.entry(GENERATION, Decision::default().with_allowed().with_admission(admission));
        let vacancy = map.vacancy(whereabouts, key).unwrap();
        assert_eq!(map.fill(&vacancy, &entry, now_ms, &(), 0), Ok(()));
        assert!(map.vacancy(whereabouts, key).is_none());
    }

    /// What happened by the middle way.
    #[derive(Debug)]
    enum Taken {
        Progress(Progress),
        Begun,
    }

    /// The middle way of one packet, if it takes it.
    fn taken(
        map: &ConnMap,
        config: &TrackConfig,
        sent: &Sent,
        dither: u32,
        now_ms: u64,
        generation: u32,
        half_open: bool,
    ) -> Option<Taken> {
        let before: Vec<_> = entries(map);
        let taken = known(&frame(sent), 128, |plain, whole| {
            let (key, whole) = (plain.key(sent.toward, 9), whole?);
            let terms = Terms::new(generation, config, now_ms);
            if let Some(done) = progress(map, &terms, sent.toward, &whole, &key, likely(map, &key), dither) {
                return Some(Taken::Progress(done));
            }
            let [.., rest] = key;
            map.vacancy(map.prefetch_places(map.ends(&key), rest, false), &key)?;
            let beginning = begin(&terms, sent.toward, &whole, &key, dither)?;
            store(map, &key, &beginning, now_ms, half_open);
            Some(Taken::Begun)
        });
        let taken = taken.flatten();
        if taken.is_none() {
            assert_eq!(before, entries(map), "changed, and left to others");
        }
        taken
    }

    /// Two tables see the same conversations, one of them by the middle way wherever it goes: verdicts and entries are the same throughout.
    #[test]
    fn the_middle_way_leads_where_the_long_way_does() {
        let mut random = Random(0x0dd_ba11);
        let mut counts = [0u32; 5];
        for _ in 0..if cfg!(miri) { 8 } else { 6000u32 } {
            let config = TrackConfig {
                tcp_be_liberal: random.one_in(6),
                tcp_loose: random.one_in(2),
                tcp_max_retrans: random.pick(&[1, 3]),
                ..TrackConfig::default()
            };
            let maps = [0; 2].map(|_| ConnMap::new(64, [3, 5]).unwrap());
            let [middle, long] = &maps;
            let tracking = random.one_in(3);
            maps.iter().for_each(|map| map.set_tracking(tracking));
            let tcp = !random.one_in(4);
            let (ipv6, tagged) = (random.one_in(3), random.one_in(3));
            let half_open = random.one_in(2);
            let mut now_ms = random.pick(&[1000, u64::from(u32::MAX) - 3000]);
            // Who opens the connection.
            let opener = random.pick(&[Toward::Egress, Toward::Ingress]);
            let mut sent_to = [random.next() as u32, random.next() as u32];
            // The usual course, with what it may be mixed up with.
            let script: &[(bool, u8, usize)] = random.pick(&[
                &[(false, 0x02, 0), (true, 0x12, 0), (false, 0x10, 0), (false, 0x18, 100), (true, 0x10, 0)][..],
                &[
                    (false, 0x02, 0),
                    (true, 0x12, 0),
                    (false, 0x10, 0),
                    (false, 0x11, 0),
                    (true, 0x11, 0),
                    (false, 0x10, 0),
                ],
                &[
                    (false, 0x02, 0),
                    (true, 0x12, 0),
                    (false, 0x10, 0),
                    (true, 0x19, 9),
                    (false, 0x10, 0),
                    (false, 0x11, 0),
                    (true, 0x10, 0),
                    (false, 0x02, 0),
                    (true, 0x12, 0),
                ],
                &[(false, 0xc2, 0), (true, 0x52, 0), (false, 0x18, 10), (false, 0x14, 0), (false, 0x02, 0)],
                &[
                    (false, 0x02, 0),
                    (true, 0x02, 0),
                    (false, 0x12, 0),
                    (true, 0x12, 0),
                    (true, 0x10, 0),
                    (false, 0x10, 0),
                ],
                &[
                    (false, 0x02, 5),
                    (true, 0x10, 0),
                    (false, 0x04, 0),
                    (false, 0x02, 0),
                    (true, 0x12, 0),
                    (false, 0x10, 0),
                ],
            ]);
            let mut at = 0;
            for step in 0..if cfg!(miri) { 12 } else { 24u64 } {
                now_ms += random.pick(&[0, 0, 0, 1, 40, 700, 3000]);
                if random.one_in(60) {
                    now_ms += random.pick(&[130_000, 500_000_000]);
                }
                let (answer, flags, payload) = match script.get(at) {
                    Some(&next) if !random.one_in(5) => {
                        at += 1;
                        next
                    }
                    _ => (
                        random.one_in(2),
                        random.pick(&[0x10, 0x18, 0x11, 0x02, 0x12, 0x14, 0x04, 0x31, 0x01, 0x22]),
                        random.pick(&[0, 0, 1, 100]),
                    ),
                };
                let toward = if answer { opener.reverse() } else { opener };
                let own = usize::from(answer);
                let mut sent = Sent {
                    toward,
                    ipv6,
                    tagged,
                    port: 53,
                    flags: tcp.then_some(flags),
                    seq: sent_to[own],
                    ack: sent_to[1 - own],
                    window: random.pick(&[65535, 65535, 1000, 0, 300]),
                    payload,
                    options: if flags & 2 != 0 { random.pick(&SYN_OPTIONS) } else { random.pick(&OPTIONS) },
                };
                if random.one_in(8) {
                    let jump = random.pick(&[1, 500, 70_000, 1 << 20, 1 << 31]) as u32;
                    match random.below(5) {
                        0 => sent.seq = sent.seq.wrapping_sub(jump),
                        1 => sent.seq = sent.seq.wrapping_add(jump),
                        2 => sent.ack = sent.ack.wrapping_sub(jump),
                        3 => sent.ack = sent.ack.wrapping_add(jump),
                        _ => sent.port = 54,
                    }
                } else {
                    let length = payload as u32 + u32::from(flags >> 1 & 1) + u32::from(flags & 1);
                    sent_to[own] = sent.seq.wrapping_add(length);
                }
                let generation = if random.one_in(20) { GENERATION + 1 } else { GENERATION };
                let dither = random.next() as u32;
                let brief = taken(middle, &config, &sent, dither, now_ms, generation, half_open);
                let judgement = in_full(long, &config, &sent, dither, now_ms, half_open);
                match (brief, judgement) {
                    (Some(brief), Judgement::Tracked(tracked)) => {
                        assert_eq!(tracked.invalid, None, "{brief:?} of {sent:?}");
                        let connection = tracked.connection.unwrap();
                        match brief {
                            Taken::Begun => {
                                assert!(tracked.fresh && connection.is_half_open(), "{sent:?}");
                                assert_eq!(tracked.state, CtState::New);
                                counts[0] += 1;
                            }
                            Taken::Progress(Progress { opened, is_reply }) => {
                                assert!(!tracked.fresh && tracked.state == CtState::Established, "{sent:?}");
                                assert_eq!(opened.is_some(), tracked.opened, "{sent:?}");
                                if let Some(decision) = opened {
                                    assert_eq!(decision.opened(), connection.decision);
                                }
                                assert_eq!(is_reply, tracked.way == Some(Way::Reply));
                                assert!(connection.policy_generation == generation && connection.decision.allowed());
                                counts[if !tcp {
                                    1
                                } else if flags & 1 != 0 {
                                    2
                                } else {
                                    3
                                }] += 1;
                            }
                        }
                    }
                    (Some(brief), other) => panic!("{brief:?}, {other:?} for {sent:?}"),
                    (None, _) => {
                        counts[4] += 1;
                        in_full(middle, &config, &sent, dither, now_ms, half_open);
                    }
                }
                assert_eq!(entries(middle), entries(long), "after {sent:?} in step {step}");
                assert_eq!(middle.uncollected(), long.uncollected(), "after {sent:?} in step {step}");
            }
        }
        let least = [5000, 500, 1000, 5000, 5000];
        assert!(cfg!(miri) || counts.iter().zip(least).all(|(n, least)| *n > least), "{counts:?}");
    }
}
