//! Random conversations. The same seed always gives the same frames.
//!
//! Each category has a script that honest hosts would follow and departs from it now and then: what is judged differently lies
//! close to what is right, not in noise.
use super::packet::{Hosts, MTU, Segment, fix_ip_checksum, flag, proto};
use super::random::Random;
use super::{Conversation, Profile, Side, Step};
use std::net::IpAddr;

type Generator = fn(&mut Writer);

/// Categories with their weights.
const CATEGORIES: &[(&str, usize, Generator)] = &[
    ("tcp-walk", 5, tcp_walk),
    ("tcp-life", 5, tcp_life),
    ("tcp-reset", 3, tcp_reset),
    ("sctp", 2, sctp),
    ("datagrams", 3, datagrams),
    ("fragments", 2, fragments),
    ("extension-headers", 2, extension_headers),
    ("mutants", 2, mutants),
];

/// Writes one conversation down.
struct Writer {
    random: Random,
    hosts: Hosts,
    steps: Vec<Step>,
}

impl Writer {
    fn push(&mut self, from: Side, ip: &[u8]) {
        let frame = self.hosts.frame(from, ip);
        self.steps.push(Step { from, frame });
    }

    fn side(&mut self) -> Side {
        self.random.of(&[Side::A, Side::B])
    }

    /// More often the VM than the other end.
    fn opener(&mut self) -> Side {
        self.random.of(&[Side::A, Side::A, Side::B])
    }

    fn tcp(&mut self, from: Side, ports: (u16, u16), segment: &Segment, bad: bool) {
        let ip = self.hosts.tcp(from, ports, segment, bad);
        self.push(from, &ip);
    }

    /// An ICMP error about an IP packet that came from `quoted_from`.
    fn icmp_error(&mut self, quoted_from: Side, quoted: &[u8]) {
        let r = &mut self.random;
        let from = quoted_from.other();
        let (quoted_src, _) = self.hosts.ends(quoted_from);
        let src = r.of(&[self.hosts.ends(from).0, self.hosts.c]);
        let dst = if r.percent(90) { quoted_src } else { self.hosts.c };
        let header_len = if self.hosts.is_v4() { 20 } else { 40 };
        let len = [28, header_len + 8, header_len + 20, quoted.len(), header_len + r.range(0, 12)];
        let quote = &quoted[..r.of(&len).min(quoted.len()).min(MTU - 100)];
        let kind = if self.hosts.is_v4() { r.of(&[3, 3, 11, 12, 4, 5]) } else { r.of(&[1, 2, 3, 4, 100]) };
        let (code, bad) = (r.u8() % 4, r.percent(5));
        let rest = [&[0; 4], quote].concat();
        let ip = self.hosts.icmp(src, dst, self.hosts.icmp_proto(), kind, code, &rest, bad);
        self.push(from, &ip);
    }
}

/// The conversation of a seed.
pub fn conversation(seed: u64) -> Conversation {
    let mut random = Random::new(seed);
    let total: usize = CATEGORIES.iter().map(|(_, weight, _)| weight).sum();
    // Round robin, so that any stretch of seeds has all categories.
    let mut at = (seed % total as u64) as usize;
    let mut chosen = CATEGORIES[0];
    for category in CATEGORIES {
        if at < category.1 {
            chosen = *category;
            break;
        }
        at -= category.1;
    }
    let (category, _, generate) = chosen;
    let profiles =
        [Profile::Default; 4].into_iter().chain([Profile::Strict, Profile::Liberal, Profile::RstNotVerified]);
    let profile = random.of(&profiles.collect::<Vec<_>>());
    let v4 = random.percent(60);
    let mut writer = Writer { random, hosts: Hosts::new(seed, v4), steps: Vec::new() };
    generate(&mut writer);
    Conversation { seed, category, profile, steps: writer.steps }
}

/// Names of all categories.
pub fn categories() -> impl Iterator<Item = &'static str> {
    CATEGORIES.iter().map(|(name, ..)| *name)
}

/// One end's sequence numbers and windows.
#[derive(Clone, Copy)]
struct End {
    next: u32,
    window: u16,
    scale: u8,
}

fn by<T>(pair: &mut [T; 2], side: Side) -> &mut T {
    &mut pair[side as usize]
}

fn syn_options(r: &mut Random, scale: u8) -> Vec<u8> {
    let mut options = Vec::new();
    if r.percent(80) {
        options.extend([2, 4, 5, 0xb4]);
    }
    if r.percent(80) {
        options.extend([4, 2]);
    }
    if r.percent(80) {
        options.extend([3, 3, scale]);
    }
    if r.percent(40) {
        options.extend([8, 10, 0, 0, 0, 1, 0, 0, 0, 0]);
    }
    if r.percent(4) {
        // Cut short, of length zero, or unknown.
        options.extend(r.of(&[&[3, 3][..], &[5, 1], &[77, 0], &[254, 4, 1, 2], &[3, 2, 1], &[3]]));
    }
    options
}

fn sack(ack: u32, r: &mut Random) -> Vec<u8> {
    let end = ack.wrapping_add(r.of(&[0, 100, 1400, 5000, 100_000]));
    let mut options = vec![1, 1, 5, 10];
    options.extend(end.wrapping_sub(50).to_be_bytes());
    options.extend(end.to_be_bytes());
    if r.percent(20) {
        options[3] = 18;
        options.extend(end.wrapping_add(100).to_be_bytes());
        options.extend(end.wrapping_add(200).to_be_bytes());
    }
    options
}

/// Each segment a step of a random walk around what would be right.
fn tcp_walk(w: &mut Writer) {
    let opener = w.opener();
    let ports = (w.random.u16() | 1024, w.random.of(&[80, 443, 80, 25, 22]));
    let mut ends = [Side::A, Side::B].map(|_| End {
        next: w.random.u32(),
        window: w.random.of(&[100, 1000, 29200, 65535, 0]),
        scale: w.random.of(&[0, 2, 7]),
    });
    let use_options = w.random.percent(60);
    let mut last: Option<Step> = None;
    for n in 0..w.random.range(6, 26) {
        let r = &mut w.random;
        let mut from = if n == 0 { opener } else { r.of(&[Side::A, Side::B]) };
        let scripted = n < 3 && r.percent(75);
        if scripted {
            from = [opener, opener.other(), opener][n];
        }
        let mut s = Segment {
            seq: by(&mut ends, from).next,
            ack: by(&mut ends, from.other()).next,
            flags: flag::ACK,
            ..Segment::default()
        };
        let mut advance = 0;
        let options = |r: &mut Random| {
            let scale = r.of(&[0, 2, 7, 14, 15]);
            if use_options { syn_options(r, scale) } else { Vec::new() }
        };
        if scripted {
            s.flags = [flag::SYN, flag::SYN | flag::ACK, flag::ACK][n];
            if n < 2 {
                s.options = options(r);
                advance = 1;
            }
            if n == 0 {
                s.ack = 0;
            }
        } else {
            match r.range(0, 100) {
                0..35 => {
                    s.len = r.of(&[1, 10, 500, 1400]);
                    s.flags |= flag::PSH;
                    advance = s.len as u32;
                }
                35..50 => {}
                50..58 => {
                    s.flags |= flag::FIN;
                    advance = 1;
                }
                58..66 => {
                    s.flags = flag::RST;
                    s.ack = r.of(&[0, s.ack]);
                }
                66..70 => s.flags |= flag::RST,
                70..78 => {
                    s.flags = flag::SYN;
                    s.options = options(r);
                    advance = r.of(&[0, 1]);
                    s.ack = 0;
                    s.seq = r.of(&[s.seq, s.seq.wrapping_sub(1), r.clone().u32(), s.seq.wrapping_add(100_000)]);
                }
                78..85 => {
                    s.flags |= flag::SYN;
                    s.options = options(r);
                    advance = r.of(&[0, 1]);
                }
                85..88 => s.flags = r.u8(),
                88..92 => s.seq = s.seq.wrapping_sub(1),
                _ => {}
            }
            const STEPS: [i64; 12] =
                [-1, 1, -100, 100, -1400, 5000, 66_000, -66_000, 70_000, -200_000, 1 << 20, 1 << 31];
            match r.range(0, 100) {
                0..20 => s.seq = s.seq.wrapping_add(r.of(&STEPS) as u32),
                20..25 => s.seq = r.u32(),
                25..38 => s.ack = s.ack.wrapping_add(r.of(&STEPS) as u32),
                38..40 => s.ack = s.ack.wrapping_sub(66_001),
                40..47 => s.ack = 0,
                47..50 => s.seq = 0,
                _ => {}
            }
            if use_options && r.percent(10) {
                s.options.extend(sack(s.ack, r));
            }
            if let Some(last) = last.clone().filter(|_| r.percent(15)) {
                w.steps.push(last);
                continue;
            }
        }
        s.window = by(&mut ends, from).window;
        if r.percent(20) {
            s.window = r.of(&[0, 1, 100, 65535]);
        }
        let bad = r.percent(1);
        let taken = advance != 0 && r.percent(90);
        if taken {
            by(&mut ends, from).next = s.seq.wrapping_add(advance);
        } else if s.flags == flag::SYN {
            by(&mut ends, from).next = s.seq.wrapping_add(1);
        }
        let direction = if from == opener { ports } else { (ports.1, ports.0) };
        let ip = w.hosts.tcp(from, direction, &s, bad);
        w.push(from, &ip);
        last = w.steps.last().cloned();
        if w.random.percent(5) {
            w.icmp_error(from, &ip);
        }
    }
}

/// A connection's whole life, in one of the ways that real ones go, mostly undisturbed: open, transfer, end, perhaps open again.
fn tcp_life(w: &mut Writer) {
    let opener = w.opener();
    let ports = (w.random.u16() | 1024, w.random.of(&[80, 443, 80, 443, 22]));
    let mut life = Life {
        opener,
        ports,
        ends: [Side::A, Side::B].map(|_| End {
            next: w.random.u32(),
            window: w.random.of(&[50, 512, 8192, 29200, 65535]),
            scale: w.random.of(&[0, 1, 7, 14]),
        }),
    };
    for _ in 0..w.random.range(1, 4) {
        life.open(w);
        for _ in 0..w.random.range(0, 5) {
            life.exchange(w);
        }
        life.end(w);
        // A new incarnation has new sequence numbers, sometimes close to the old ones.
        for side in [Side::A, Side::B] {
            let end = by(&mut life.ends, side);
            end.next = match w.random.range(0, 4) {
                0 => end.next.wrapping_add(w.random.of(&[1, 1000, 70_000])),
                1 => end.next.wrapping_sub(w.random.of(&[1, 1000, 70_000])),
                _ => w.random.u32(),
            };
        }
    }
}

struct Life {
    opener: Side,
    ports: (u16, u16),
    ends: [End; 2],
}

impl Life {
    fn send(&mut self, w: &mut Writer, from: Side, flags: u8, len: usize, options: Vec<u8>) {
        let end = *by(&mut self.ends, from);
        let ack = if flags & flag::ACK != 0 { by(&mut self.ends, from.other()).next } else { 0 };
        let s = Segment { seq: end.next, ack, flags, window: end.window, options, len };
        let ports = if from == self.opener { self.ports } else { (self.ports.1, self.ports.0) };
        w.tcp(from, ports, &s, false);
        // Lost before it came here, repeated, or reported by a router.
        match w.random.range(0, 100) {
            0..4 => {
                w.steps.pop();
            }
            4..9 => {
                let again = w.steps.last().cloned();
                w.steps.extend(again);
            }
            9..11 => {
                let frame = w.steps.last().map(|s| s.frame.clone()).unwrap_or_default();
                w.icmp_error(from, &frame[14..]);
            }
            _ => {}
        }
        let moved = len as u32 + u32::from(flags & flag::SYN != 0) + u32::from(flags & flag::FIN != 0);
        by(&mut self.ends, from).next = end.next.wrapping_add(moved);
    }

    fn open(&mut self, w: &mut Writer) {
        let (o, p) = (self.opener, self.opener.other());
        let scale = |life: &mut Self, side| by(&mut life.ends, side).scale;
        let (scale_o, scale_p) = (scale(self, o), scale(self, p));
        let (options_o, options_p) = (syn_options(&mut w.random, scale_o), syn_options(&mut w.random, scale_p));
        match w.random.range(0, 10) {
            0..7 => {
                self.send(w, o, flag::SYN, 0, options_o);
                self.send(w, p, flag::SYN | flag::ACK, 0, options_p);
                self.send(w, o, flag::ACK, 0, vec![]);
            }
            7 => {
                // Simultaneous open (RFC 9293, 3.5): both SYNs, then both acknowledge, one way or the other.
                self.send(w, o, flag::SYN, 0, options_o.clone());
                self.send(w, p, flag::SYN, 0, options_p.clone());
                if w.random.percent(50) {
                    for (side, options) in [(o, options_o), (p, options_p)] {
                        let end = by(&mut self.ends, side);
                        end.next = end.next.wrapping_sub(1);
                        self.send(w, side, flag::SYN | flag::ACK, 0, options);
                    }
                } else {
                    self.send(w, o, flag::ACK, 0, vec![]);
                    self.send(w, p, flag::ACK, 0, vec![]);
                }
            }
            8 => {
                // Refused.
                self.send(w, o, flag::SYN, 0, options_o);
                let end = by(&mut self.ends, p);
                let keep = end.next;
                end.next = 0;
                self.send(w, p, flag::RST | flag::ACK, 0, vec![]);
                by(&mut self.ends, p).next = keep;
            }
            // The SYN came another way, or before this began: picked up in the middle.
            _ => self.send(w, o, flag::ACK, 0, vec![]),
        }
    }

    fn exchange(&mut self, w: &mut Writer) {
        let from = w.side();
        let to = from.other();
        match w.random.range(0, 12) {
            0..5 => {
                for _ in 0..w.random.range(1, 4) {
                    let len = w.random.of(&[1, 100, 536, 1400]);
                    self.send(w, from, flag::ACK | flag::PSH, len, vec![]);
                }
                self.send(w, to, flag::ACK, 0, vec![]);
            }
            5 => {
                // Keep-alive (RFC 9293, 3.8.4), answered.
                let end = by(&mut self.ends, from);
                end.next = end.next.wrapping_sub(1);
                self.send(w, from, flag::ACK, 0, vec![]);
                let end = by(&mut self.ends, from);
                end.next = end.next.wrapping_add(1);
                self.send(w, to, flag::ACK, 0, vec![]);
            }
            6 => {
                // Window closed, probed, opened again.
                let window = std::mem::replace(&mut by(&mut self.ends, to).window, 0);
                self.send(w, to, flag::ACK, 0, vec![]);
                self.send(w, from, flag::ACK, 1, vec![]);
                self.send(w, to, flag::ACK, 0, vec![]);
                by(&mut self.ends, to).window = window;
                self.send(w, to, flag::ACK, 0, vec![]);
            }
            7 => {
                // A hole, selectively acknowledged, filled.
                let hole = by(&mut self.ends, from).next;
                by(&mut self.ends, from).next = hole.wrapping_add(100);
                self.send(w, from, flag::ACK, 200, vec![]);
                let after = by(&mut self.ends, from).next;
                by(&mut self.ends, from).next = hole;
                let mut options = vec![1, 1, 5, 10];
                options.extend(hole.wrapping_add(100).to_be_bytes());
                options.extend(after.to_be_bytes());
                self.send(w, to, flag::ACK, 0, options);
                self.send(w, from, flag::ACK, 100, vec![]);
                by(&mut self.ends, from).next = after;
                self.send(w, to, flag::ACK, 0, vec![]);
            }
            8 => {
                // A lost host's SYN meets a live connection: challenge, reset, SYN again (RFC 5961, 4).
                let old = by(&mut self.ends, from).next;
                let fresh = w.random.u32();
                by(&mut self.ends, from).next = fresh;
                self.send(w, from, flag::SYN, 0, vec![]);
                by(&mut self.ends, from).next = old;
                self.send(w, to, flag::ACK, 0, vec![]);
                self.send(w, from, flag::RST, 0, vec![]);
                by(&mut self.ends, from).next = fresh;
                self.send(w, from, flag::SYN, 0, vec![]);
                self.send(w, to, flag::SYN | flag::ACK, 0, vec![]);
                self.send(w, from, flag::ACK, 0, vec![]);
            }
            9 => {
                // Far outside the window: an attacker's guess.
                let end = by(&mut self.ends, from);
                let keep = end.next;
                end.next = keep.wrapping_add(w.random.of(&[1 << 16, 1 << 24, 1 << 30, 1 << 31]));
                let flags =
                    w.random.of(&[flag::RST, flag::SYN, flag::ACK, flag::ACK | flag::FIN, flag::RST | flag::ACK]);
                self.send(w, from, flags, 0, vec![]);
                by(&mut self.ends, from).next = keep;
            }
            10 => {
                // One byte is lost on the way, the rest retransmitted in other pieces.
                let start = by(&mut self.ends, from).next;
                self.send(w, from, flag::ACK, 300, vec![]);
                by(&mut self.ends, from).next = start;
                self.send(w, from, flag::ACK, 150, vec![]);
                self.send(w, from, flag::ACK | flag::PSH, 250, vec![]);
                self.send(w, to, flag::ACK, 0, vec![]);
            }
            _ => self.send(w, from, flag::ACK | 0x40 | 0x80, 10, vec![]),
        }
    }

    fn end(&mut self, w: &mut Writer) {
        let from = w.side();
        let to = from.other();
        match w.random.range(0, 8) {
            0..3 => {
                self.send(w, from, flag::FIN | flag::ACK, 0, vec![]);
                self.send(w, to, flag::ACK, 0, vec![]);
                if w.random.percent(40) {
                    // Half closed: data still comes.
                    self.send(w, to, flag::ACK | flag::PSH, 700, vec![]);
                    self.send(w, from, flag::ACK, 0, vec![]);
                }
                self.send(w, to, flag::FIN | flag::ACK, 0, vec![]);
                self.send(w, from, flag::ACK, 0, vec![]);
            }
            3 => {
                // Simultaneous close: neither FIN acknowledges the other.
                let before = by(&mut self.ends, from).next;
                self.send(w, from, flag::FIN | flag::ACK, 0, vec![]);
                let after = std::mem::replace(&mut by(&mut self.ends, from).next, before);
                self.send(w, to, flag::FIN | flag::ACK, 0, vec![]);
                by(&mut self.ends, from).next = after;
                self.send(w, to, flag::ACK, 0, vec![]);
                self.send(w, from, flag::ACK, 0, vec![]);
            }
            4 => self.send(w, from, flag::RST, 0, vec![]),
            5 => self.send(w, from, flag::RST | flag::ACK, 0, vec![]),
            6 => {
                // Three segments instead of four.
                self.send(w, from, flag::FIN | flag::ACK | flag::PSH, 20, vec![]);
                self.send(w, to, flag::FIN | flag::ACK, 0, vec![]);
                self.send(w, from, flag::ACK, 0, vec![]);
            }
            // Forgotten: the next SYN meets the old entry.
            _ => {}
        }
    }
}

/// Resets and SYNs at every state, with sequence numbers near the edges.
fn tcp_reset(w: &mut Writer) {
    let opener = w.side();
    let other = opener.other();
    let client = w.random.u16() | 1024;
    let mut next = [w.random.u32(), w.random.u32()];
    let send = |w: &mut Writer, from: Side, seq: u32, ack: u32, flags: u8, len: usize| {
        let ports = if from == opener { (client, 80) } else { (80, client) };
        w.tcp(from, ports, &Segment { seq, ack, flags, window: 5000, options: vec![], len }, false);
    };
    let n = |next: &mut [u32; 2], side: Side| next[side as usize];
    let state = w.random.range(0, 7);
    send(w, opener, n(&mut next, opener), 0, flag::SYN, 0);
    next[opener as usize] = next[opener as usize].wrapping_add(1);
    // 0: SYN sent; 1: simultaneous; 2: SYN received; 3: open; 4: with data; 5: closing; 6: closed.
    if state == 1 {
        send(w, other, n(&mut next, other), 0, flag::SYN, 0);
        next[other as usize] = next[other as usize].wrapping_add(1);
    } else if state >= 2 {
        send(w, other, n(&mut next, other), n(&mut next, opener), flag::SYN | flag::ACK, 0);
        next[other as usize] = next[other as usize].wrapping_add(1);
        if state >= 3 {
            send(w, opener, n(&mut next, opener), n(&mut next, other), flag::ACK, 0);
        }
        if state >= 4 {
            for from in [opener, other] {
                send(w, from, n(&mut next, from), n(&mut next, from.other()), flag::ACK | flag::PSH, 100);
                next[from as usize] = next[from as usize].wrapping_add(100);
            }
            if w.random.percent(70) {
                send(w, opener, n(&mut next, opener), n(&mut next, other), flag::ACK, 0);
            }
        }
        if state >= 5 {
            send(w, opener, n(&mut next, opener), n(&mut next, other), flag::ACK | flag::FIN, 0);
            next[opener as usize] = next[opener as usize].wrapping_add(1);
        }
        if state == 6 {
            send(w, other, n(&mut next, other), n(&mut next, opener), flag::ACK | flag::FIN, 0);
            next[other as usize] = next[other as usize].wrapping_add(1);
            send(w, opener, n(&mut next, opener), n(&mut next, other), flag::ACK, 0);
        }
    }
    let mut last = [0u32; 2];
    for _ in 0..w.random.range(1, 6) {
        let from = w.side();
        let r = &mut w.random;
        let distance: i32 = r.of(&[0, 0, 0, -1, 1, -50, -100, -101, 50, 4999, 5000, 5001, -5000, 100_000]);
        let there = next[from.other() as usize];
        let mut ack = r.of(&[there, there, last[0], last[1], 0, there.wrapping_sub(50), there.wrapping_add(1)]);
        let flags = r.of(&[2, 2, 4, 4, 4, 0x14, 0x14, 0x10, 0x10, 0x12]);
        let seq = if r.percent(93) { next[from as usize].wrapping_add_signed(distance) } else { 0 };
        if flags == flag::SYN {
            ack = r.of(&[0, ack]);
        }
        last[from as usize] = seq.wrapping_add(u32::from(flags & flag::SYN != 0));
        send(w, from, seq, ack, flags, 0);
    }
}

/// An SCTP chunk, padded to words.
fn chunk(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let len = (4 + body.len()) as u16;
    let mut bytes = vec![kind, flags];
    bytes.extend(len.to_be_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// SCTP: the four-way handshake, then any chunk at any time.
fn sctp(w: &mut Writer) {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    let ports = (w.random.u16() | 1024, w.random.of(&[80, 3868]));
    let opener = if w.random.percent(90) { Side::A } else { Side::B };
    let mut tags = [w.random.u32(), w.random.u32()];
    let script = [(opener, INIT), (opener.other(), INIT_ACK), (opener, 10), (opener.other(), 11)];
    let mut at = 0;
    for _ in 0..w.random.range(5, 22) {
        let r = &mut w.random;
        let (from, kind) = if at < script.len() && r.percent(75) {
            at += 1;
            script[at - 1]
        } else {
            let kinds = [0, 0, INIT, INIT_ACK, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10, 11, 14, 192, 0];
            (r.of(&[Side::A, Side::B]), r.of(&kinds))
        };
        let mut tag = if kind == INIT { 0 } else { tags[from.other() as usize] };
        if r.percent(10) {
            tag = r.of(&[0, tags[from as usize], r.clone().u32()]);
        }
        // Abort and shutdown complete may reflect the sender's own tag (RFC 9260, 8.5.1).
        let reflected = matches!(kind, 6 | 14) && r.percent(40);
        if reflected && r.percent(80) {
            tag = tags[from as usize];
        }
        let body = match kind {
            INIT | INIT_ACK => {
                if r.percent(10) {
                    tags[from as usize] = r.u32();
                }
                let mut body = tags[from as usize].to_be_bytes().to_vec();
                body.extend([0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 5]);
                if r.percent(5) {
                    body.truncate(r.range(0, 16));
                }
                body
            }
            0 => vec![0; 16],
            4 | 5 => b"\0\x01\0\x08abcd".to_vec(),
            _ => b"xyz"[..r.range(0, 4)].to_vec(),
        };
        let mut chunks = chunk(kind, u8::from(reflected), &body);
        if r.percent(15) {
            chunks.extend(chunk(r.of(&[0, 3, 4, 5, 7, 11, 10, 6, 14]), 0, b"dddd"));
        }
        if r.percent(2) {
            chunks.extend([0; 4]);
        }
        if r.percent(2) {
            chunks.truncate(r.range(1, chunks.len()));
        }
        let bad = r.percent(1);
        let direction = if from == opener { ports } else { (ports.1, ports.0) };
        let ip = w.hosts.sctp(from, direction, tag, &chunks, bad);
        w.push(from, &ip);
        if w.random.percent(4) {
            w.icmp_error(from, &ip);
        }
    }
}

/// UDP, ICMP questions and answers, GRE, protocols that nobody looks into, and errors about all of them.
fn datagrams(w: &mut Writer) {
    let ids = [w.random.u16(), w.random.u16()];
    let clients = [w.random.u16() | 1024, w.random.u16() | 1024];
    let mut sent: Vec<(Side, Vec<u8>)> = Vec::new();
    for n in 0..w.random.range(5, 20) {
        let from = w.side();
        let (src, dst) = w.hosts.ends(from);
        let r = &mut w.random;
        let v4 = w.hosts.is_v4();
        let ip = match r.range(0, 100) {
            0..30 => {
                let (client, server) = (r.of(&clients), r.of(&[53, 99]));
                let ports = if r.percent(50) { (client, server) } else { (server, client) };
                let (bad, none, len) = (r.percent(3), r.percent(3), r.percent(3));
                let mut upper = w.hosts.udp_upper(src, dst, ports, b"hello", bad);
                if none {
                    upper[6..8].fill(0);
                }
                if len {
                    upper[5] = r.of(&[0, 7, 8, 9, 12, 14, 200]);
                    w.hosts.checksum(src, dst, proto::UDP, &mut upper, 6, false);
                }
                w.hosts.ip(src, dst, proto::UDP, &upper)
            }
            30..60 => {
                let kinds: &[u8] = if v4 {
                    &[8, 0, 8, 0, 13, 14, 15, 16, 17, 18, 9, 10, 19, 30, 40]
                } else {
                    &[128, 129, 128, 129, 139, 140, 133, 134, 135, 136, 130, 131, 132, 143, 137, 141, 200, 255]
                };
                let (kind, code, id) = (r.of(kinds), r.of(&[0, 0, 0, 1]), r.of(&ids).to_be_bytes());
                let mut number = w.hosts.icmp_proto();
                if r.percent(4) {
                    number = proto::ICMP + proto::ICMPV6 - number;
                }
                let rest = [id[0], id[1], 0, n as u8, b'd', b'a', b't', b'a'];
                let rest = &rest[..if r.percent(3) { r.range(0, 5) } else { rest.len() }];
                let bad = r.percent(3);
                w.hosts.icmp(src, dst, number, kind, code, rest, bad)
            }
            60..72 => {
                let header: [u8; 4] = r.of(&[
                    [0, 0, 8, 0],
                    [0x20, 1, 0x88, 0x0b],
                    [0x30, 0x81, 0x88, 0x0b],
                    [0x20, 1, 8, 0],
                    [0x20, 0, 0x65, 0x58],
                ]);
                let id = r.of(&ids).to_be_bytes();
                let mut upper = [&header[..], &[0, 4], &id, b"payload"].concat();
                if r.percent(10) {
                    upper.truncate(r.range(0, 8));
                }
                w.hosts.ip(src, dst, proto::GRE, &upper)
            }
            72..80 => {
                let number = r.of(&[50, 4, 41, 2, 103, 253]);
                let data = vec![b'q'; r.range(0, 20)];
                w.hosts.ip(src, dst, number, &data)
            }
            _ => {
                if !sent.is_empty() {
                    let (side, about) = sent[r.range(0, sent.len())].clone();
                    w.icmp_error(side, &about);
                }
                continue;
            }
        };
        sent.push((from, ip.clone()));
        w.push(from, &ip);
    }
}

/// Datagrams in pieces: in any order, repeated, missing, overlapping, too long.
fn fragments(w: &mut Writer) {
    for _ in 0..w.random.range(1, 4) {
        let from = w.opener();
        let (src, dst) = w.hosts.ends(from);
        let len = w.random.range(20, 1400);
        let (number, upper) = match w.random.range(0, 10) {
            0..6 => {
                let ports = (77, w.random.of(&[53, 53, 54]));
                let data: Vec<u8> = (0..len).map(|_| w.random.u8()).collect();
                (proto::UDP, w.hosts.udp_upper(src, dst, ports, &data, w.random.percent(5)))
            }
            6 | 7 => {
                let segment = Segment { seq: 1, flags: flag::SYN, window: 1000, len, ..Segment::default() };
                (proto::TCP, w.hosts.tcp_upper(from, (7000, 80), &segment, false))
            }
            _ => {
                let number = w.hosts.icmp_proto();
                let mut upper = vec![if w.hosts.is_v4() { 8 } else { 128 }, 0, 0, 0, 0, 9, 0, 1];
                upper.extend(std::iter::repeat_n(b'p', len));
                w.hosts.checksum(src, dst, number, &mut upper, 2, false);
                (number, upper)
            }
        };
        pieces(w, from, number, &upper);
    }
}

fn pieces(w: &mut Writer, from: Side, number: u8, upper: &[u8]) {
    let (src, dst) = w.hosts.ends(from);
    let r = &mut w.random;
    let mut cuts: Vec<usize> = (0..r.range(1, 5)).map(|_| 8 * r.range(1, upper.len() / 8 + 1)).collect();
    cuts.extend([0, upper.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut list: Vec<(usize, usize)> = cuts.windows(2).map(|c| (c[0], c[1])).collect();
    for (start, end) in &mut list {
        match r.range(0, 100) {
            // Overlaps its neighbour.
            0..4 if *start >= 8 => *start -= 8,
            4..7 => *end = (*end + 8).min(upper.len()),
            // Odd length, though more follows.
            7..9 if *end > *start + 4 => *end -= 3,
            _ => {}
        }
    }
    if r.percent(15) {
        list.push(list[r.range(0, list.len())]);
    }
    if r.percent(8) && list.len() > 1 {
        list.push((list[0].0, list[1].1));
    }
    if r.percent(8) {
        list.remove(r.range(0, list.len()));
    }
    if r.percent(50) {
        r.shuffle(&mut list);
    }
    let identification = r.u32();
    let ecn = r.of(&[0, 0, 0, 1, 2, 3]);
    for (start, end) in list {
        let more = end < upper.len() || w.random.percent(1);
        let mut ip = w.hosts.ip_piece(src, dst, number, &upper[start..end], identification, start, more, &[]);
        let codepoint = if w.random.percent(90) { ecn } else { w.random.of(&[0, 1, 2, 3]) };
        if w.hosts.is_v4() {
            ip[1] |= codepoint;
            fix_ip_checksum(&mut ip, 20);
        } else {
            ip[1] |= codepoint << 4;
        }
        w.push(from, &ip);
    }
}

/// IPv4 options, IPv6 extension headers in all orders, with and without fragments, right and wrong.
fn extension_headers(w: &mut Writer) {
    for _ in 0..w.random.range(2, 8) {
        let from = w.side();
        let (src, dst) = w.hosts.ends(from);
        let ports = w.random.of(&[(4000, 53), (53, 4000), (4000, 80), (9, 9)]);
        let (number, upper) = if w.random.percent(60) {
            (proto::UDP, w.hosts.udp_upper(src, dst, ports, b"options", false))
        } else {
            let segment = Segment { seq: 1, flags: flag::SYN, window: 1000, ..Segment::default() };
            (proto::TCP, w.hosts.tcp_upper(from, ports, &segment, false))
        };
        let ip = if w.hosts.is_v4() {
            ipv4_options(w, src, dst, number, &upper)
        } else {
            let (first, bytes) = ipv6_headers(w, number, upper);
            w.hosts.ip(src, dst, first, &bytes)
        };
        w.push(from, &ip);
        if w.random.percent(20) {
            w.icmp_error(from, &ip);
        }
    }
}

fn ipv4_options(w: &mut Writer, src: IpAddr, dst: IpAddr, number: u8, upper: &[u8]) -> Vec<u8> {
    let r = &mut w.random;
    let mut options = Vec::new();
    for _ in 0..r.range(0, 4) {
        let option: &[u8] = r.of(&[
            &[1][..],
            &[7, 7, 4, 0, 0, 0, 0],
            &[148, 4, 0, 0],
            &[131, 7, 4, 10, 0, 0, 9],
            &[68, 8, 5, 0, 0, 0, 0, 0],
            // Wrong: no length, too long, pointer too small.
            &[7],
            &[7, 40, 4],
            &[131, 7, 1, 10, 0, 0, 9],
        ]);
        options.extend(option);
    }
    options.truncate(40);
    options.resize(options.len().next_multiple_of(4), 0);
    let mut ip = w.hosts.ip_piece(src, dst, number, upper, 1, 0, false, &options);
    let header_len = 20 + options.len();
    let r = &mut w.random;
    match r.range(0, 20) {
        0 => ip[10] ^= 1,
        1 => {
            ip[0] = r.of(&[0x44, 0x4f, 0x55, 0x46, 0x05]);
            fix_ip_checksum(&mut ip, header_len);
        }
        2 => {
            let len = (ip.len() as u16).wrapping_add_signed(r.of(&[-1, 1, -30, 100]));
            ip[2..4].copy_from_slice(&len.to_be_bytes());
            fix_ip_checksum(&mut ip, header_len);
        }
        3 => ip.extend(vec![0; r.range(1, 30)]),
        4 => {
            // DF, or the reserved bit, or time to live 0: none of a bridge's business.
            ip[6] |= r.of(&[0x40, 0x80]);
            ip[8] = r.of(&[0, 1, 255]);
            fix_ip_checksum(&mut ip, header_len);
        }
        _ => {}
    }
    ip
}

/// Puts headers in front of `upper`; returns the first one's number.
fn ipv6_headers(w: &mut Writer, number: u8, upper: Vec<u8>) -> (u8, Vec<u8>) {
    let r = &mut w.random;
    let (mut first, mut bytes) = (number, upper);
    if r.percent(5) {
        (first, bytes) = (59, Vec::new());
    }
    for _ in 0..r.range(0, 4) {
        // Written from the inside out: hop-by-hop mostly comes first, which here is last.
        let kind = r.of(&[0, 0, 43, 44, 51, 60, 60, 135]);
        let mut header = match kind {
            0 | 60 => {
                let options: &[u8] = r.of(&[
                    &[1, 4, 0, 0, 0, 0][..],
                    &[0, 0, 0, 0, 0, 0],
                    &[5, 2, 0, 0, 1, 0],
                    &[0x1e, 4, 1, 2, 3, 4],
                    &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                    // Wrong: beyond the header, a jumbo payload, a length missing.
                    &[1, 9, 0, 0, 0, 0],
                    &[0xc2, 4, 0, 1, 0, 0],
                    &[0, 0, 0, 0, 0, 1],
                ]);
                [&[first, ((options.len() + 2) / 8 - 1) as u8], options].concat()
            }
            43 => vec![first, 0, r.of(&[0, 3, 4, 200]), 0, 0, 0, 0, 0],
            // An atomic fragment, mostly.
            44 => {
                // With an identification of its own: the kernel keeps those of whole datagrams and of fragments apart no
                // more than others, though RFC 6946 wants it.
                let [i, j, k, l] = r.u32().to_be_bytes();
                vec![first, 0, 0, r.of(&[0, 0, 0, 0, 1, 8]), i, j, k, l]
            }
            51 => vec![first, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2],
            _ => vec![first, 0, 0, 0, 0, 0, 0, 0],
        };
        if r.percent(3) {
            header[1] = r.of(&[1, 3, 31, 255]);
        }
        header.extend(bytes);
        (first, bytes) = (kind, header);
    }
    (first, bytes)
}

/// Frames of another category's conversation, some of them damaged: bits flipped, cut short, padded.
fn mutants(w: &mut Writer) {
    let parents: [Generator; 6] = [tcp_walk, tcp_life, sctp, datagrams, fragments, extension_headers];
    w.random.of(&parents)(w);
    for step in &mut w.steps {
        if !w.random.percent(30) {
            continue;
        }
        let r = &mut w.random;
        match r.range(0, 10) {
            0..7 => {
                for _ in 0..r.range(1, 4) {
                    // Behind the Ethernet header, and where headers are rather than data.
                    let at = r.range(14, step.frame.len().min(14 + 80));
                    step.frame[at] ^= 1 << r.range(0, 8);
                }
                // Else most go no further than the header's checksum.
                let header_len = usize::from(step.frame[14] & 0xf) * 4;
                if step.frame[14] >> 4 == 4 && step.frame.len() >= 14 + header_len && header_len >= 20 && r.percent(70)
                {
                    fix_ip_checksum(&mut step.frame[14..], header_len);
                }
            }
            7 | 8 => step.frame.truncate(r.range(15, step.frame.len())),
            _ => {
                let room = (14 + MTU).saturating_sub(step.frame.len());
                step.frame.extend(vec![0; r.range(0, 20).min(room)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_mean_the_same_always() {
        for seed in 0..200 {
            let (one, two) = (conversation(seed), conversation(seed));
            assert_eq!(one.steps, two.steps);
            assert!(one.steps.iter().all(|s| (15..=14 + MTU).contains(&s.frame.len())), "{seed} {}", one.category);
        }
        let names: Vec<_> = (0..24).map(|seed| conversation(seed).category).collect();
        assert!(categories().all(|name| names.contains(&name)), "{names:?}");
    }
}
