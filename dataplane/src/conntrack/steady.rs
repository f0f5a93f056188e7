//! The short way of a packet whose connection only needs its bookkeeping done.
//!
//! Most packets belong to a connection that is open, that the rules in force let pass, and in which they move nothing but windows,
//! counters and expiry. For those the entry is changed where it lies: the few words that matter are read, and what changes is written
//! under a claim that fails when anybody else has touched the entry since. What is written is what [`super::tracker`] would store, and
//! the verdict is its verdict; in every other case nothing is touched, and it is asked.
use super::config::TrackConfig;
use super::entry::{Notes, Traffic, expiry, word};
use super::key::{Toward, Way};
use super::map::{Amend, ConnMap, KeyWords, Likely, Look, Word};
use super::plain::Particulars;
use super::table::Change;
use super::tcp::TcpState;
use super::tcp_run::{Run, Words};
use super::{CtState, udp};

/// What holds for all packets that one port judges in a burst.
#[derive(Clone, Copy)]
pub(crate) struct Terms<'a> {
    /// Connections judged under another generation of the rules are to be judged again.
    pub(super) generation: u32,
    /// What is asked of most entries: [`Notes::settled`].
    settled: u64,
    /// How connections are tracked.
    pub config: &'a TrackConfig,
    pub now_ms: u64,
    /// When entries of UDP expire that are refreshed now: those that are streams, and others.
    stream_until: u32,
    pub(super) udp_until: u32,
}

impl<'a> Terms<'a> {
    /// Under a generation of the rules, at a time.
    pub fn new(generation: u32, config: &'a TrackConfig, now_ms: u64) -> Self {
        let timeouts = &config.timeouts;
        let (stream_until, udp_until) = (expiry(now_ms, timeouts.udp_stream_ms), expiry(now_ms, timeouts.udp_ms));
        Self { generation, settled: Notes::settled(generation), config, now_ms, stream_until, udp_until }
    }
}

/// Brings the connection of plain packets up to date, and says how many of them, from the first on, and what they are to it: these may
/// pass. `None`, and nothing was changed: the first is not for the short way. `UDP`: they are datagrams, else segments of TCP; `facts`:
/// the packets, of one connection and in order; `likely`: the slot where the entry with their `key` probably is; `dither`: a random number.
#[inline(always)]
pub(crate) fn steady<const UDP: bool>(
    map: &ConnMap,
    terms: &Terms<'_>,
    toward: Toward,
    facts: &[Particulars],
    key: &KeyWords,
    likely: Likely,
    dither: impl Fn() -> u32,
) -> Option<(usize, CtState)> {
    let look = map.look(likely, key)?;
    let notes = Notes(look.word::<{ word::NOTES }>());
    if look.is_expired(terms.now_ms) {
        return None;
    }
    let (way, is_settled) = (notes.way(toward), notes.is_settled(terms.settled));
    let found = Found { map, likely, look, notes, way, terms };
    match (UDP, is_settled) {
        (true, true) => {
            found.count_datagrams(terms.stream_until, facts, dither)?;
            Some((facts.len(), CtState::Established))
        }
        (true, false) => found.young_udp(facts, dither),
        (false, true) => found.segments(facts, dither),
        (false, false) => None,
    }
}

/// The word in which packets of a direction are counted, with these counted.
#[inline(always)]
fn counted(word: u64, packets: usize, bytes: u32, dither: impl Fn() -> u32) -> u64 {
    match Traffic::exactly_plus(word, packets as u32, bytes) {
        Some(sum) => sum,
        None => counted_scaled(word, packets, bytes, dither()),
    }
}

#[cold]
#[inline(never)]
fn counted_scaled(word: u64, packets: usize, bytes: u32, dither: u32) -> u64 {
    Traffic::from_word(word).plus(packets as u32, bytes, dither).to_word()
}

#[inline(never)]
fn bytes_of(facts: &[Particulars]) -> u32 {
    facts.iter().fold(0, |bytes, facts| bytes.wrapping_add(facts.ip_len))
}

/// The entry of packets that go this way, as it was looked at. Handed over by value to what is not inlined, so that its parts stay in
/// registers elsewhere.
#[derive(Clone, Copy)]
struct Found<'a, 't> {
    map: &'a ConnMap,
    likely: Likely,
    look: Look<'a>,
    notes: Notes,
    way: Way,
    terms: &'t Terms<'t>,
}

impl<'a> Found<'a, '_> {
    /// The entry as the caller's alone, which expires then if no more packets come.
    #[inline(always)]
    fn claim(&self, until: u32, change: Change) -> Option<Amend<'a>> {
        self.map.claim(self.likely, self.look, until, change)
    }

    /// The word that counts these packets, and what it has after them.
    #[inline(always)]
    fn count(&self, packets: usize, bytes: u32, dither: impl Fn() -> u32) -> (Word<'a>, u64) {
        let traffic = self.look.either::<{ word::ORIGINAL }, { word::REPLY }>(self.way == Way::Reply);
        (traffic, counted(traffic.read(), packets, bytes, dither))
    }

    /// Datagrams of an entry that expires then, if no more come.
    #[inline(always)]
    fn count_datagrams(&self, until: u32, facts: &[Particulars], dither: impl Fn() -> u32) -> Option<()> {
        let bytes = match facts {
            [one] => one.ip_len,
            more => bytes_of(more),
        };
        let (traffic, sum) = self.count(facts.len(), bytes, dither);
        let entry = self.claim(until, Change::Bookkeeping)?;
        entry.put(traffic, sum);
        entry.commit();
        Some(())
    }

    /// The same of an exchange that is not known to be a stream.
    #[inline(always)]
    fn young_udp(&self, facts: &[Particulars], dither: impl Fn() -> u32) -> Option<(usize, CtState)> {
        let Self { notes, terms, .. } = self;
        if notes.policy_generation() != terms.generation || !notes.decision().allowed() {
            return None;
        }
        let state = match (notes.seen_reply(), notes.assured()) {
            (false, _) if self.way == Way::Original => CtState::New,
            // Otherwise the limits are to be told that it is open.
            (true, false) if !notes.decision().counts_half_open() => {
                let stream_from = self.look.word::<{ word::PROTOCOL }>() as u32;
                if udp::has_lasted(stream_from, terms.now_ms as u32) {
                    return self.becomes_stream(facts, dither());
                }
                CtState::Established
            }
            _ => return None,
        };
        self.count_datagrams(terms.udp_until, facts, dither)?;
        Some((facts.len(), state))
    }

    /// The exchange is a stream from these packets on: once for each, and for all at much the same time where many were opened together.
    #[cold]
    #[inline(never)]
    fn becomes_stream(self, facts: &[Particulars], dither: u32) -> Option<(usize, CtState)> {
        let (traffic, sum) = self.count(facts.len(), bytes_of(facts), || dither);
        let entry = self.claim(self.terms.stream_until, Change::Semantic)?;
        entry.put(traffic, sum);
        entry.set::<{ word::NOTES }>(self.notes.with_assured().0);
        entry.commit();
        Some((facts.len(), CtState::Established))
    }

    /// Segments of TCP.
    #[inline(always)]
    fn segments(&self, facts: &[Particulars], dither: impl Fn() -> u32) -> Option<(usize, CtState)> {
        if self.notes.state() != TcpState::Established as u8 {
            return None;
        }
        match facts {
            [_] => self.take::<true>(facts, dither),
            more => self.several_segments(more, dither()),
        }
    }

    #[inline(never)]
    fn several_segments(self, facts: &[Particulars], dither: u32) -> Option<(usize, CtState)> {
        self.take::<false>(facts, || dither)
    }

    /// `ONE`: there is one, and no loop, whose variables would lie on the stack.
    #[inline(always)]
    fn take<const ONE: bool>(&self, facts: &[Particulars], dither: impl Fn() -> u32) -> Option<(usize, CtState)> {
        const P: usize = word::PROTOCOL;
        let Self { look, notes, way, terms, .. } = self;
        let is_reply = *way == Way::Reply;
        // The words of who sends these segments, and of who receives them. Written out: iterators over them cost more than they do.
        let (ends, windows) = (look.either::<P, { P + 2 }>(is_reply), look.either::<{ P + 1 }, { P + 3 }>(is_reply));
        let (other_ends, other_windows) =
            (look.either::<{ P + 2 }, P>(is_reply), look.either::<{ P + 3 }, { P + 1 }>(is_reply));
        let words = Words {
            sender: [ends.read(), windows.read()],
            receiver: [other_ends.read(), other_windows.read()],
            last: [look.word::<{ P + 4 }>(), look.word::<{ P + 5 }>()],
        };
        let mut run = Run::new(words, notes.retrans(), *way)?;
        let (mut packets, mut bytes) = (0, 0u32);
        for facts in if ONE { facts.get(..1)? } else { facts } {
            if !run.take(facts) {
                break;
            }
            packets += 1;
            bytes = bytes.wrapping_add(facts.ip_len);
        }
        if packets == 0 {
            return None;
        }
        let (after, retrans, timeout_ms) = run.finish(terms.config);
        let (traffic, sum) = self.count(packets, bytes, dither);
        let entry = self.claim(expiry(terms.now_ms, timeout_ms), Change::Bookkeeping)?;
        let Words { sender: [a, b], receiver: [c, d], last: [e, f] } = after;
        entry.put(ends, a);
        entry.put(windows, b);
        entry.put(other_ends, c);
        entry.put(other_windows, d);
        entry.set::<{ P + 4 }>(e);
        entry.set::<{ P + 5 }>(f);
        entry.put(traffic, sum);
        if retrans != notes.retrans() {
            entry.set::<{ word::NOTES }>(notes.with_retrans(retrans).0);
        }
        entry.commit();
        Some((packets, CtState::Established))
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests {
    use super::super::PickUp;
    use super::super::dissect::{Checksum, Dissected, Packet, Transport, dissect};
    use super::super::plain::{Layout, Plain};
    use super::super::table::ConnTable;
    use super::super::tracker::{Judgement, judge};
    use super::*;
    use crate::firewall::limits::Admission;
    use crate::frame::{Offload, RxBurst, SNAPSHOT_BYTES};
    use crate::offload::checksum::{Sum, internet_checksum};
    use crate::packet::{IpProto, MacAddr, parse, parse_l2};

    pub(crate) struct Random(pub u64);

    impl Random {
        pub fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }
        pub fn below(&mut self, n: u64) -> u64 {
            (self.next() >> 20) % n
        }
        /// True once in `n` times.
        pub fn one_in(&mut self, n: u64) -> bool {
            self.below(n) == 0
        }
        pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
            from[self.below(from.len() as u64) as usize]
        }
    }

    /// A segment, or a datagram when `flags` is none.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Sent {
        pub toward: Toward,
        pub ipv6: bool,
        pub tagged: bool,
        pub port: u16,
        pub flags: Option<u8>,
        pub seq: u32,
        pub ack: u32,
        pub window: u16,
        pub payload: usize,
        pub options: &'static [u8],
    }

    pub(crate) const OPTIONS: [&[u8]; 6] = [
        &[],
        &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        &[1, 1, 5, 10, 0, 0, 3, 0, 0, 0, 4, 0],
        &[3, 3, 7, 4, 2, 0],
        &[2, 4, 5, 180, 1, 3, 3, 2],
        &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 10, 0, 0, 3, 0, 0, 0, 9, 0],
    ];

    pub(crate) fn frame(sent: &Sent) -> Vec<u8> {
        let mut options = sent.options.to_vec();
        options.resize(options.len().next_multiple_of(4), 0);
        let (vm, other) = ((5000u16, 1u8), (sent.port, 2u8));
        let (src, dst) = if sent.toward == Toward::Egress { (vm, other) } else { (other, vm) };
        let mut l4 = [src.0.to_be_bytes(), dst.0.to_be_bytes()].concat();
        let proto = match sent.flags {
            Some(flags) => {
                l4.extend(sent.seq.to_be_bytes());
                l4.extend(sent.ack.to_be_bytes());
                l4.extend([((20 + options.len()) << 2) as u8, flags]);
                l4.extend(sent.window.to_be_bytes());
                l4.extend([0; 4]);
                l4.extend(&options);
                6
            }
            None => {
                l4.extend(((8 + sent.payload) as u16).to_be_bytes());
                l4.extend([0, 0]);
                17
            }
        };
        l4.resize(l4.len() + sent.payload, 0x5a);
        let address = |n: u8| if sent.ipv6 { [&[0xfd; 15][..], &[n]].concat() } else { vec![10, 0, 0, n] };
        let addresses = [address(src.1), address(dst.1)].concat();
        let mut sum = Sum::new();
        sum.add_bytes(&addresses);
        sum.add_u16(proto);
        sum.add_u16(l4.len() as u16);
        sum.add_bytes(&l4);
        let at = if proto == 6 { 16 } else { 6 };
        // A UDP checksum may be missing.
        if proto == 6 || !sent.seq.is_multiple_of(4) {
            l4[at..at + 2].copy_from_slice(&sum.finish().to_be_bytes());
        }
        let mut f = vec![2, 0, 0, 0, 0, dst.1, 2, 0, 0, 0, 0, src.1];
        if sent.tagged {
            f.extend([0x81, 0, 0, 7]);
        }
        if sent.ipv6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend((l4.len() as u16).to_be_bytes());
            f.extend([proto as u8, 64]);
        } else {
            f.extend([8, 0]);
            let mut ip = vec![0x45, 0];
            ip.extend((20 + l4.len() as u16).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, proto as u8, 0, 0]);
            ip.extend(&addresses);
            let sum = internet_checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            f.extend(&ip[..12]);
        }
        f.extend(&addresses);
        f.extend(&l4);
        f
    }

    /// The frame, perhaps spoilt, and how much of it is at hand: padding; a frame cut short; bytes changed anywhere in the headers, the IPv4
    /// checksum put right again or not.
    pub(crate) fn spoilt(random: &mut Random, sent: &Sent, n: u32) -> (Vec<u8>, usize) {
        let mut frame = frame(sent);
        if random.one_in(3) {
            frame.resize(frame.len() + random.below(20) as usize, 0);
        }
        if random.one_in(8) {
            frame.truncate(frame.len() - random.below(frame.len() as u64 - 14) as usize);
        }
        if random.one_in(2) {
            let at = random.below(frame.len().min(90) as u64) as usize;
            frame[at] = random.pick(&[random.0 as u8, 0, 1, frame[at] ^ 1 << (n % 8)]);
            let l3 = if sent.tagged { 18 } else { 14 };
            if !sent.ipv6 && random.one_in(2) && frame.len() >= l3 + 20 {
                frame[l3 + 10..l3 + 12].fill(0);
                let sum = internet_checksum(&frame[l3..l3 + 20]);
                frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
            }
        }
        let have = if random.one_in(4) { random.below(100) as usize } else { 128 };
        (frame, have)
    }

    /// The plain packet of a frame, read as the packet path does.
    fn plain(frame: &[u8], have: usize) -> Option<(Plain, Particulars)> {
        let mut head = [0xee; SNAPSHOT_BYTES];
        let have = have.min(frame.len()).min(SNAPSHOT_BYTES);
        head[..have].copy_from_slice(&frame[..have]);
        let l2 = parse_l2(&head[..have], frame.len() as u32).ok()?;
        let (layout, mut facts) = (Layout::new(l2.len, l2.ethertype)?, Particulars::default());
        let (plain, is_plain) = Plain::read(&head, have, frame.len(), layout, &mut facts)?;
        is_plain.then_some((plain, facts))
    }

    /// The checksum of a frame of which `have` bytes are at hand.
    pub(crate) fn checksum_ok(plain: &Plain, frame: &[u8], have: usize) -> bool {
        let have = have.min(frame.len()).min(SNAPSHOT_BYTES);
        let mut head = [0xee; SNAPSHOT_BYTES];
        head[..have].copy_from_slice(&frame[..have]);
        let mut rest = frame[have..].to_vec();
        let mut burst = RxBurst::new();
        burst.load_private(&mut rest);
        let mark = burst.segment_mark();
        burst.push_private(0..frame.len() - have);
        burst.finish_frame(mark, Offload::default());
        plain.checksum_ok(&head, have, || burst.body(0, 0))
    }

    #[test]
    fn what_is_plain_is_what_a_closer_look_finds() {
        let mut random = Random(0x1234_5678_9abc_def1);
        let (mut plain_ones, mut wrong_sums) = (0, 0);
        for n in 0..if cfg!(miri) { 300 } else { 200_000 } {
            let sent = Sent {
                toward: random.pick(&[Toward::Ingress, Toward::Egress]),
                ipv6: random.one_in(2),
                tagged: random.one_in(3),
                port: random.pick(&[67, 68, 546, 547, 80, 443]),
                flags: random
                    .one_in(2)
                    .then(|| random.pick(&[0x10, 0x18, 0x10, 0x11, 0x02, 0x12, 0x14, 0xf0, 0, 0xff])),
                seq: random.next() as u32,
                ack: random.next() as u32,
                window: random.next() as u16,
                payload: random.pick(&[0, 1, 6, 18, 100, 700]),
                options: random.pick(&OPTIONS),
            };
            let (frame, have) = spoilt(&mut random, &sent, n);
            let Some((plain, seen)) = plain(&frame, have) else { continue };
            plain_ones += 1;
            let look = |checksum| {
                let packet = Packet { zone: Some(9), ..Packet::whole(&frame, sent.toward, checksum) };
                dissect(&packet, true)
            };
            let Ok(Dissected::Flow(facts)) = look(Checksum::Vouched) else {
                panic!("{:?} of {frame:x?}", look(Checksum::Vouched))
            };
            assert_eq!(facts.flow.key.words(), plain.key(sent.toward, 9), "{sent:?}");
            assert_eq!((facts.ip_len, facts.flow.key.proto()), (seen.ip_len, plain.proto()));
            assert_eq!(facts.flow.src(), plain.source());
            if let Transport::Tcp(theirs) = facts.transport {
                let ours = seen.segment();
                assert_eq!((ours.seq, ours.ack, ours.window), (theirs.seq, theirs.ack, theirs.window));
                assert_eq!((ours.payload_len, ours.end()), (theirs.payload_len, theirs.end()));
            } else {
                assert!(matches!(facts.transport, Transport::Udp));
            }
            // With all bytes at hand, and with some of them in port memory.
            let sum_ok = checksum_ok(&plain, &frame, frame.len());
            for have in [100, 101, 116, 117] {
                assert_eq!(checksum_ok(&plain, &frame, have), sum_ok, "{have} of {sent:?}");
            }
            assert_eq!(sum_ok, look(Checksum::Verify).is_ok(), "{sent:?}");
            wrong_sums += u32::from(!sum_ok);
            // The headers are such as anti-spoofing reads.
            assert!(parse(&frame, frame.len() as u32).is_ok());
        }
        assert!(cfg!(miri) || plain_ones > 20_000 && wrong_sums > 1000, "{plain_ones} {wrong_sums}");
    }

    pub(crate) const GENERATION: u32 = 7;

    pub(crate) fn likely(map: &ConnMap, key: &KeyWords) -> Likely {
        let [.., rest] = *key;
        map.likely(map.prefetch_places(map.ends(key), rest, false))
    }

    /// As [`steady`], for packets of which this is one.
    fn by_protocol(
        map: &ConnMap,
        terms: &Terms<'_>,
        toward: Toward,
        packet: &Plain,
        facts: &[Particulars],
        dither: u32,
    ) -> Option<(usize, CtState)> {
        let key = packet.key(toward, 9);
        let likely = likely(map, &key);
        if packet.proto() == IpProto::UDP {
            steady::<true>(map, terms, toward, facts, &key, likely, || dither)
        } else {
            steady::<false>(map, terms, toward, facts, &key, likely, || dither)
        }
    }

    fn handle_of(map: &ConnMap) -> super::super::ConnHandle<'_> {
        map.handle(&(), 0)
    }

    /// Judges a packet in full, and stores what is new as the packet path would.
    pub(crate) fn in_full(
        map: &ConnMap,
        config: &TrackConfig,
        sent: &Sent,
        dither: u32,
        now_ms: u64,
        half_open: bool,
    ) -> Judgement {
        let frame = frame(sent);
        let packet = Packet { zone: Some(9), ..Packet::whole(&frame, sent.toward, Checksum::Verify) };
        let Ok(dissected) = dissect(&packet, true) else { return Judgement::Held };
        let mut table = handle_of(map);
        let mut judgement = judge(&mut table, config, &PickUp::default(), dither, &dissected, now_ms);
        if let Judgement::Tracked(tracked) = &mut judgement
            && tracked.fresh
            && let Some(connection) = &mut tracked.connection
        {
            connection.policy_generation = GENERATION;
            let admission = Admission { half_open: half_open && connection.is_half_open(), tracked_source: half_open };
            connection.decision = connection.decision.with_allowed().with_admission(admission);
            let _ = table.insert(connection, now_ms);
        }
        judgement
    }

    /// Two tables see the same conversations, one of them by the short way wherever it goes: verdicts and entries are the same throughout.
    #[test]
    fn the_short_way_leads_where_the_long_way_does() {
        let mut random = Random(0x0dd_ba11);
        let (mut short_tcp, mut short_udp, mut refused_known, mut all_streams) = (0, 0, 0, 0);
        let assured = |map: &ConnMap| entries(map).iter().filter(|connection| connection.assured()).count();
        for conversation in 0..if cfg!(miri) { 5 } else { 1500u32 } {
            let config = TrackConfig {
                tcp_be_liberal: random.one_in(6),
                tcp_max_retrans: random.pick(&[1, 3]),
                ..TrackConfig::default()
            };
            let maps = [0; 2].map(|_| ConnMap::new(64, [3, 5]).unwrap());
            let [short, long] = &maps;
            let tracking = random.one_in(3);
            maps.iter().for_each(|map| map.set_tracking(tracking));
            let tcp = !random.one_in(3);
            let (ipv6, tagged) = (random.one_in(3), random.one_in(3));
            let half_open = random.one_in(2);
            // Near the clock's wrap, now and then.
            let mut now_ms = random.pick(&[1000, u64::from(u32::MAX) - 3000]);
            // What the ends have sent, by direction: VM first.
            let mut sent_to = [random.next() as u32, random.next() as u32];
            let scaled = random.pick(&OPTIONS);
            let mut streams = 0;
            for step in 0..if cfg!(miri) { 12 } else { 120u64 } {
                now_ms += random.pick(&[0, 0, 1, 40, 700, 3000]);
                if random.one_in(200) {
                    now_ms += 500_000;
                }
                let handshake = tcp && step < 3 && conversation % 8 != 0;
                let toward = match (handshake, step) {
                    (true, 1) => Toward::Ingress,
                    (true, _) => Toward::Egress,
                    _ => random.pick(&[Toward::Ingress, Toward::Egress]),
                };
                let own = usize::from(toward == Toward::Ingress);
                let mut sent = Sent {
                    toward,
                    ipv6,
                    tagged,
                    port: 53,
                    flags: tcp.then_some(0x10),
                    seq: sent_to[own],
                    ack: sent_to[1 - own],
                    window: random.pick(&[65535, 65535, 1000, 0, 300]),
                    payload: random.pick(&[0, 0, 6, 100, 400]),
                    options: random.pick(&[OPTIONS[0], OPTIONS[1], OPTIONS[1], OPTIONS[2]]),
                };
                if handshake {
                    sent.flags = Some([0x02, 0x12, 0x10][step as usize]);
                    sent.payload = 0;
                    sent.window = 65535;
                    sent.options = if step < 2 { scaled } else { &[] };
                } else if random.one_in(4) {
                    // Something else than the next: sent again, out of order, out of the window, or out of this world.
                    let jump = random.pick(&[1, 500, 70_000, 1 << 20, 1 << 31]) as u32;
                    match random.below(6) {
                        0 => sent.seq = sent.seq.wrapping_sub(jump),
                        1 => sent.seq = sent.seq.wrapping_add(jump),
                        2 => sent.ack = sent.ack.wrapping_sub(jump),
                        3 => sent.ack = sent.ack.wrapping_add(jump),
                        4 => sent.flags = sent.flags.map(|_| random.pick(&[0x18, 0x30, 0x11, 0x14, 0x04, 0x02, 0xd0])),
                        _ => sent.port = 54,
                    }
                } else if sent.flags != Some(0x10) || !random.one_in(5) {
                    sent_to[own] = sent.seq.wrapping_add(sent.payload as u32);
                }
                if handshake && step < 2 {
                    sent_to[own] = sent.seq.wrapping_add(1);
                }
                // The rules change now and then: known connections are to be judged again.
                let generation = if random.one_in(20) { GENERATION + 1 } else { GENERATION };
                let dither = random.next() as u32;
                let bytes = frame(&sent);
                let assured_before = assured(short);
                let quick = plain(&bytes, 128).and_then(|(plain, seen)| {
                    let terms = Terms::new(generation, &config, now_ms);
                    let before: Vec<_> = entries(short);
                    let found = by_protocol(short, &terms, sent.toward, &plain, &[seen], dither);
                    if found.is_none() {
                        assert_eq!(before, entries(short), "changed, and left to others");
                    }
                    found.map(|(packets, state)| {
                        assert_eq!(packets, 1);
                        state
                    })
                });
                let judgement = in_full(long, &config, &sent, dither, now_ms, half_open);
                match (quick, judgement) {
                    (Some(state), Judgement::Tracked(tracked)) => {
                        assert_eq!((state, tracked.invalid), (tracked.state, None), "{sent:?}");
                        assert!(!tracked.fresh && !tracked.opened, "{sent:?}");
                        let connection = tracked.connection.unwrap();
                        assert!(connection.policy_generation == generation && connection.decision.allowed());
                        *if tcp { &mut short_tcp } else { &mut short_udp } += 1;
                    }
                    (Some(_), other) => panic!("{other:?} for {sent:?}"),
                    (None, _) => {
                        let known = in_full(short, &config, &sent, dither, now_ms, half_open);
                        refused_known += u32::from(matches!(known, Judgement::Tracked(t) if !t.fresh));
                    }
                }
                assert_eq!(entries(short), entries(long), "after {sent:?} in step {step}");
                // An exchange that becomes a stream in the short way is told of like all that go there, and once more as it has changed.
                streams += usize::from(!tcp && quick.is_some() && assured(short) > assured_before);
                let (mut quickly, fully) = (short.uncollected(), long.uncollected());
                let more = quickly.lagging.checked_sub(fully.lagging);
                assert!(more.is_some_and(|more| more as usize <= streams), "{quickly:?} {fully:?} {streams}");
                quickly.lagging = fully.lagging;
                assert_eq!(quickly, fully, "after {sent:?} in step {step}");
            }
            all_streams += streams;
        }
        println!("{short_tcp} {short_udp} {refused_known} {all_streams}");
        assert!(cfg!(miri) || all_streams > 300);
        assert!(cfg!(miri) || short_tcp > 20_000 && short_udp > 20_000 && refused_known > 20_000);
    }

    pub(crate) fn entries(map: &ConnMap) -> Vec<super::super::Connection> {
        let mut all = Vec::new();
        while map.walk(&mut Default::default(), 1 << 20, &mut |c| all.push(*c)) {}
        all
    }

    /// A connection that the rules have cut, or whose counters are beyond what is exact, is judged alike.
    #[test]
    fn entries_of_all_kinds_are_left_alone_or_kept_right() {
        let config = TrackConfig::default();
        let datagram = |toward| Sent {
            toward,
            ipv6: false,
            tagged: false,
            port: 53,
            flags: None,
            seq: 1,
            ack: 0,
            window: 0,
            payload: 10,
            options: &[],
        };
        for (allowed, packets) in [(true, 5u32), (false, 5), (true, (1 << 27) - 1), (true, 3 << 27 | 1 << 26)] {
            let maps = [0; 2].map(|_| ConnMap::new(64, [3, 5]).unwrap());
            for map in &maps {
                in_full(map, &config, &datagram(Toward::Egress), 1, 1000, false);
                let key = entries(map)[0].key;
                let mut table = handle_of(map);
                let mut connection = table.lookup(&key, 1000).unwrap();
                if !allowed {
                    connection.decision = connection.decision.without_allowed();
                }
                let traffic = Traffic {
                    packets: super::super::Tally::from_raw(packets).unwrap(),
                    bytes: super::super::Tally::from_raw(packets).unwrap(),
                };
                connection.set_traffic([traffic, Traffic::default()]);
                table.update(&connection, Change::Semantic);
            }
            let [short, long] = &maps;
            for dither in [0x1234_5678, 0x9e37_79b9, u32::MAX, 0] {
                let sent = datagram(Toward::Egress);
                let (plain, seen) = plain(&frame(&sent), 128).unwrap();
                let terms = Terms::new(GENERATION, &config, 2000);
                let found = by_protocol(short, &terms, sent.toward, &plain, &[seen], dither);
                assert_eq!(found, allowed.then_some((1, CtState::New)));
                if allowed {
                    in_full(long, &config, &sent, dither, 2000, false);
                }
                assert_eq!(entries(short), entries(long));
            }
        }
    }

    /// Several packets at once lead where they lead one by one, up to the first that is not for the short way.
    #[test]
    fn many_at_once_are_many_one_by_one() {
        let mut random = Random(0xbeef_cafe);
        let (mut trains, mut broken) = (0, 0);
        for conversation in 0..if cfg!(miri) { 3 } else { 1000u32 } {
            let config = TrackConfig::default();
            let maps = [0; 2].map(|_| ConnMap::new(64, [3, 5]).unwrap());
            let [one_by_one, at_once] = &maps;
            maps.iter().for_each(|map| map.set_tracking(true));
            let tcp = conversation % 3 != 0;
            let mut now_ms = 1000;
            let mut next = [random.next() as u32, random.next() as u32];
            let sent = |toward, flags, seq, ack, window, payload| Sent {
                toward,
                ipv6: conversation % 2 == 0,
                tagged: false,
                port: 80,
                flags: tcp.then_some(flags),
                seq,
                ack,
                window,
                payload,
                options: &[],
            };
            let [vm, other] = next;
            for (toward, flags, seq, ack) in [
                (Toward::Egress, 0x02, vm.wrapping_sub(1), 0),
                (Toward::Ingress, 0x12, other.wrapping_sub(1), vm),
                (Toward::Egress, 0x10, vm, other),
            ] {
                let sent = sent(toward, flags, seq, ack, 60_000, 0);
                for map in &maps {
                    in_full(map, &config, &sent, 1, now_ms, false);
                }
            }
            for _ in 0..if cfg!(miri) { 3 } else { 20 } {
                now_ms += random.below(3000);
                let toward = random.pick(&[Toward::Ingress, Toward::Egress]);
                let own = usize::from(toward == Toward::Ingress);
                let (train, facts): (Vec<Plain>, Vec<Particulars>) = (0..random.below(9) + 1)
                    .map(|_| {
                        let jump = if random.one_in(12) { 1 << 30 } else { 0 };
                        let payload = random.pick(&[0, 100, 400]);
                        let ack = next[1 - own];
                        let sent = sent(toward, 0x10, next[own].wrapping_add(jump), ack, 60_000, payload);
                        next[own] = next[own].wrapping_add(payload as u32);
                        plain(&frame(&sent), 128).unwrap()
                    })
                    .unzip();
                assert!(train.iter().all(|packet| packet.same_talk(&train[0])));
                let terms = Terms::new(GENERATION, &config, now_ms);
                let ask = |map: &ConnMap, facts: &[Particulars]| by_protocol(map, &terms, toward, &train[0], facts, 7);
                let mut singly = 0;
                let mut state = None;
                for fact in &facts {
                    let Some((1, known)) = ask(one_by_one, core::slice::from_ref(fact)) else { break };
                    singly += 1;
                    state = Some(known);
                }
                assert_eq!(ask(at_once, &facts), state.map(|state| (singly, state)));
                let plainly = |map: &ConnMap| {
                    let mut all = entries(map);
                    // Each change is a version.
                    all.iter_mut().for_each(|entry| entry.version = 0);
                    all
                };
                assert_eq!(plainly(one_by_one), plainly(at_once));
                assert_eq!(one_by_one.uncollected(), at_once.uncollected());
                trains += usize::from(singly > 1);
                broken += usize::from(singly > 0 && singly < train.len());
            }
        }
        assert!(cfg!(miri) || trains > 2000 && broken > 200, "{trains} {broken}");
    }

    /// Where the addresses of plain packets are concerned, the short question has the long one's answer.
    #[test]
    fn sources_are_allowed_or_not_as_in_full() {
        use crate::firewall::spoof::{SpoofConfig, SpoofTable};
        let mut spoof = SpoofConfig { mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])), ..SpoofConfig::default() };
        spoof.addresses = ["10.0.0.1/32", "0.0.0.0/1", "224.0.0.0/4", "fd00::/8", "::/16", "ff00::/8"]
            .map(|cidr| cidr.parse().unwrap())
            .to_vec();
        let table = SpoofTable::new(&spoof, 3);
        let mut random = Random(77);
        let mut allowed = 0;
        for _ in 0..if cfg!(miri) { 100 } else { 20_000 } {
            let sent = Sent {
                toward: Toward::Egress,
                ipv6: random.one_in(2),
                tagged: random.one_in(2),
                port: 80,
                flags: random.one_in(2).then_some(0x10),
                seq: 0,
                ack: 0,
                window: 0,
                payload: 0,
                options: &[],
            };
            let mut frame = frame(&sent);
            let l3 = if sent.tagged { 18 } else { 14 };
            if sent.ipv6 {
                let sources: [[u8; 2]; 6] = [[0xfd, 0xfd], [0, 0], [0xff, 2], [0x20, 1], [0, 1], [0xfe, 0x80]];
                let source = random.pick(&sources);
                let mapped = random.one_in(3);
                frame[l3 + 8..l3 + 24].fill(0);
                frame[l3 + 8..l3 + 10].copy_from_slice(&source);
                frame[l3 + 23] = random.below(2) as u8;
                if mapped {
                    frame[l3 + 18..l3 + 20].fill(0xff);
                }
            } else {
                frame[l3 + 12] = random.pick(&[10, 0, 127, 224, 255, 192, 100]);
                frame[l3 + 13..l3 + 16].fill(random.below(2) as u8);
                frame[l3 + 10..l3 + 12].fill(0);
                let sum = internet_checksum(&frame[l3..l3 + 20]);
                frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
            }
            if random.one_in(5) {
                frame[11] = 9;
            }
            let (plain, _) = plain(&frame, 128).unwrap();
            let headers = parse(&frame, frame.len() as u32).unwrap();
            let in_full = table.check(&frame, &headers).is_ok();
            assert_eq!(table.allows_source(headers.l2.src_mac, plain.source()), in_full, "{frame:x?}");
            allowed += u32::from(in_full);
        }
        assert!(cfg!(miri) || allowed > 1000, "{allowed}");
    }
}
