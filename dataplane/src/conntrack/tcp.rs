//! TCP as a middle box sees it: state machine and window tracking of both directions.
//!
//! After Guido van Rooij, "Real Stateful TCP Packet Filtering in IP Filter", with Linux's refinements: segments are judged
//! against what both sides have been seen to send and to acknowledge. In doubt the endpoint decides: a segment that may be valid
//! passes but moves nothing ("ignored"), since the endpoint's answer will tell.
use super::config::{Timeouts, TrackConfig};
use super::dissect::Segment;
use super::entry::Connection;
use super::key::Way;
use super::table::Change;
use super::{Invalid, Step};
use crate::packet::IpProto;
use crate::packet::tcp::Flags;

/// State of a TCP connection. The numbers are Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TcpState {
    /// Nothing seen.
    None = 0,
    /// SYN seen.
    SynSent = 1,
    /// SYN-ACK seen.
    SynRecv = 2,
    /// Open.
    Established = 3,
    /// FIN seen from one side.
    FinWait = 4,
    /// That FIN acknowledged.
    CloseWait = 5,
    /// FIN seen from both sides.
    LastAck = 6,
    /// Last FIN acknowledged.
    TimeWait = 7,
    /// RST seen.
    Close = 8,
    /// SYN seen from both sides: simultaneous open.
    SynSent2 = 9,
}

impl TcpState {
    /// All states by number.
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::SynSent,
        Self::SynRecv,
        Self::Established,
        Self::FinWait,
        Self::CloseWait,
        Self::LastAck,
        Self::TimeWait,
        Self::Close,
        Self::SynSent2,
    ];

    /// From a number; unknown ones are [`TcpState::None`].
    #[inline]
    pub fn from_number(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::None)
    }

    /// The name that `conntrack -L` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::SynSent => "SYN_SENT",
            Self::SynRecv => "SYN_RECV",
            Self::Established => "ESTABLISHED",
            Self::FinWait => "FIN_WAIT",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::SynSent2 => "SYN_SENT2",
        }
    }

    /// On its way out: may be evicted early, and RSTs for it are not checked (the ports may be in use again already).
    #[inline]
    pub const fn is_closing(self) -> bool {
        matches!(self, Self::FinWait | Self::CloseWait | Self::LastAck | Self::TimeWait | Self::Close)
    }
}

/// What kind of segment, by its most significant flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Syn = 0,
    SynAck = 1,
    Fin = 2,
    Ack = 3,
    Rst = 4,
    Other = 5,
}

impl Kind {
    #[inline]
    fn of(flags: Flags) -> Self {
        if flags.contains(Flags::RST) {
            Self::Rst
        } else if flags.contains(Flags::SYN) {
            if flags.contains(Flags::ACK) { Self::SynAck } else { Self::Syn }
        } else if flags.contains(Flags::FIN) {
            Self::Fin
        } else if flags.contains(Flags::ACK) {
            Self::Ack
        } else {
            Self::Other
        }
    }

    #[inline]
    pub(super) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Syn,
            1 => Self::SynAck,
            2 => Self::Fin,
            3 => Self::Ack,
            4 => Self::Rst,
            _ => Self::Other,
        }
    }
}

/// Where a segment of one kind leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    To(TcpState),
    /// May be valid or not, and the receiver will tell by its answer: passes, moves nothing.
    Ignore,
    Invalid,
}

/// The transitions: by direction, kind of segment, state.
#[rustfmt::skip]
const TRANSITIONS: [[[Next; 10]; 6]; 2] = {
    use TcpState as T;
    const SS: Next = Next::To(T::SynSent);
    const SR: Next = Next::To(T::SynRecv);
    const ES: Next = Next::To(T::Established);
    const FW: Next = Next::To(T::FinWait);
    const CW: Next = Next::To(T::CloseWait);
    const LA: Next = Next::To(T::LastAck);
    const TW: Next = Next::To(T::TimeWait);
    const CL: Next = Next::To(T::Close);
    const S2: Next = Next::To(T::SynSent2);
    const IG: Next = Next::Ignore;
    const IV: Next = Next::Invalid;
    [
        // Original direction.
        //  NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        [
            [SS, SS, IG, IG, IG, IG, IG, SS, SS, S2], // SYN: may reopen what is closed; else the peer's answer tells
            [IV, IV, SR, IV, IV, IV, IV, IV, IV, SR], // SYN-ACK: only in a simultaneous open
            [IV, IV, FW, FW, LA, LA, LA, TW, CL, IV], // FIN
            [ES, IV, ES, ES, CW, CW, TW, TW, CL, IV], // ACK: without history, picked up
            [IV, CL, CL, CL, CL, CL, CL, CL, CL, CL], // RST
            [IV, IV, IV, IV, IV, IV, IV, IV, IV, IV], // neither
        ],
        // Reply direction.
        //  NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        [
            [IV, S2, IV, IV, IV, IV, IV, SS, IV, S2], // SYN: simultaneous open; a server that became client
            [IV, SR, IG, IG, IG, IG, IG, IG, IG, SR], // SYN-ACK: may answer a SYN that was ignored
            [IV, IV, FW, FW, LA, LA, LA, TW, CL, IV], // FIN
            [IV, IG, SR, ES, CW, CW, TW, TW, CL, IG], // ACK: may be a challenge to a SYN
            [IV, CL, CL, CL, CL, CL, CL, CL, CL, CL], // RST
            [IV, IV, IV, IV, IV, IV, IV, IV, IV, IV], // neither
        ],
    ]
};

#[inline]
fn next(way: Way, kind: Kind, state: TcpState) -> Next {
    TRANSITIONS
        .get(way.index())
        .and_then(|t| t.get(kind as usize))
        .and_then(|t| t.get(state as usize))
        .copied()
        .unwrap_or(Next::Invalid)
}

/// Flag combinations that exist; PSH, ECE and CWR go with any.
#[inline]
pub(super) fn flags_possible(flags: Flags) -> bool {
    let f = flags.difference(Flags::PSH.union(Flags::ECE).union(Flags::CWR));
    let without_urg = f.difference(Flags::URG);
    let urg = f.contains(Flags::URG);
    match without_urg {
        f if f == Flags::SYN || f == Flags::ACK || f == Flags::FIN.union(Flags::ACK) => true,
        f if f == Flags::SYN.union(Flags::ACK) || f == Flags::RST || f == Flags::RST.union(Flags::ACK) => !urg,
        _ => false,
    }
}

// Flags of one side.
pub(super) const WINDOW_SCALE: u32 = 1;
pub(super) const SACK_PERMITTED: u32 = 2;
pub(super) const CLOSE_INIT: u32 = 4;
pub(super) const BE_LIBERAL: u32 = 8;
pub(super) const UNACKNOWLEDGED: u32 = 16;
pub(super) const MAX_ACK_SET: u32 = 32;
// Flags of the last segment; the first two as above.
pub(super) const CHALLENGE_EXPECTED: u32 = 4;
pub(super) const SIMULTANEOUS_OPEN: u32 = 8;

/// Lag of acknowledgements that is always tolerated, bytes.
pub(super) const MAX_ACK_LAG: u32 = 66_000;
/// RFC 7323, 2.3.
pub(super) const MAX_SCALE: u8 = 14;

/// What one side has sent and may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Side {
    /// Highest sequence number sent, plus one.
    pub(super) end: u32,
    /// Up to where the other side has allowed it to send.
    pub(super) max_end: u32,
    /// Largest window it has announced, bytes.
    pub(super) max_window: u32,
    /// Highest acknowledgement it has sent; valid with MAX_ACK_SET.
    pub(super) max_ack: u32,
    pub(super) scale: u8,
    pub(super) flags: u32,
}

impl Side {
    #[inline]
    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Takes over scale and SACK from a SYN's options. Without any options nothing changes.
    #[inline(always)]
    fn options(&mut self, segment: &Segment<'_>) {
        if segment.options.is_empty() {
            return;
        }
        let (scale, flags) = agreed(segment.options);
        self.scale = scale;
        self.flags = self.flags & BE_LIBERAL | flags;
    }
}

/// Scale and flags that a SYN's options ask for.
fn agreed(options: &[u8]) -> (u8, u32) {
    // As Linux and others lay them out, with everything switched on: segment size, SACK, time stamp, scale.
    if let &[2, 4, _, _, 4, 2, 8, 10, _, _, _, _, _, _, _, _, 1, 3, 3, shift] = options {
        return (shift.min(MAX_SCALE), SACK_PERMITTED | WINDOW_SCALE);
    }
    let (mut scale, mut flags) = (0, 0);
    for (kind, data) in Options(options) {
        match (kind, data) {
            (4, []) => flags |= SACK_PERMITTED,
            (3, [shift]) => {
                scale = (*shift).min(MAX_SCALE);
                flags |= WINDOW_SCALE;
            }
            _ => {}
        }
    }
    (scale, flags)
}

/// TCP options as (kind, data), ending at the first that is malformed.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (&kind, rest) = self.0.split_first()?;
            match kind {
                0 => return None,
                1 => self.0 = rest,
                _ => {
                    let (&len, rest) = rest.split_first()?;
                    let (data, rest) = rest.split_at_checked(usize::from(len).checked_sub(2)?)?;
                    self.0 = rest;
                    return Some((kind, data));
                }
            }
        }
    }
}

/// The highest right edge that a segment with these options acknowledges, SACK blocks included (RFC 2018).
#[inline(always)]
fn highest_sack(options: &[u8], ack: u32) -> u32 {
    if options.is_empty() { ack } else { highest_of_sacks(options, ack) }
}

#[inline(never)]
fn highest_of_sacks(options: &[u8], ack: u32) -> u32 {
    // The usual cases: nothing but a time stamp, and a SYN-ACK's.
    if let [1, 1, 8, 10, _, _, _, _, _, _, _, _] | [2, 4, _, _, 4, 2, 8, 10, _, _, _, _, _, _, _, _, 1, 3, 3, _] =
        options
    {
        return ack;
    }
    let mut sack = ack;
    for (kind, data) in Options(options) {
        if kind == 5 && !data.is_empty() && data.len() % 8 == 0 {
            for block in data.chunks_exact(8) {
                let &[_, _, _, _, a, b, c, d] = block else { continue };
                let right = u32::from_be_bytes([a, b, c, d]);
                if after(right, sack) {
                    sack = right;
                }
            }
            break;
        }
    }
    sack
}

#[inline]
pub(super) fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[inline]
pub(super) fn after(a: u32, b: u32) -> bool {
    before(b, a)
}

/// A connection's TCP words, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tcp {
    pub(super) sides: [Side; 2],
    pub(super) last_kind: Kind,
    pub(super) last_way: Way,
    pub(super) last_seq: u32,
    pub(super) last_ack: u32,
    pub(super) last_end: u32,
    pub(super) last_window: u16,
    pub(super) last_scale: u8,
    pub(super) last_flags: u32,
    pub(super) retrans: u8,
}

impl Tcp {
    const EMPTY: Self = Self {
        sides: [Side { end: 0, max_end: 0, max_window: 0, max_ack: 0, scale: 0, flags: 0 }; 2],
        last_kind: Kind::Other,
        last_way: Way::Original,
        last_seq: 0,
        last_ack: 0,
        last_end: 0,
        last_window: 0,
        last_scale: 0,
        last_flags: 0,
        retrans: 0,
    };

    #[inline]
    pub(super) fn load(conn: &Connection) -> Self {
        Self::unpack(conn.words(), conn.retrans())
    }

    #[inline(always)]
    fn unpack(words: &[u32; 12], retrans: u8) -> Self {
        let &[e0, m0, w0, a0, e1, m1, w1, a1, bits, last_end, last_ack, last] = words;
        Self {
            sides: [
                Side {
                    end: e0,
                    max_end: m0,
                    max_window: w0,
                    max_ack: a0,
                    flags: bits & 0x3f,
                    scale: (bits >> 6 & 0xf) as u8,
                },
                Side {
                    end: e1,
                    max_end: m1,
                    max_window: w1,
                    max_ack: a1,
                    flags: bits >> 10 & 0x3f,
                    scale: (bits >> 16 & 0xf) as u8,
                },
            ],
            last_kind: Kind::from_number(bits >> 20 & 7),
            last_way: if bits >> 23 & 1 == 0 { Way::Original } else { Way::Reply },
            last_scale: (bits >> 24 & 0xf) as u8,
            last_flags: bits >> 28,
            last_end,
            last_ack,
            last_window: last as u16,
            // A segment is shorter than 2^16: its length says where it began.
            last_seq: last_end.wrapping_sub(last >> 16),
            retrans,
        }
    }

    #[inline]
    fn bits(&self) -> u32 {
        let [a, b] = &self.sides;
        a.flags
            | u32::from(a.scale) << 6
            | b.flags << 10
            | u32::from(b.scale) << 16
            | (self.last_kind as u32) << 20
            | (self.last_way.index() as u32) << 23
            | u32::from(self.last_scale) << 24
            | self.last_flags << 28
    }

    /// Where the flags of a side are in [`Self::bits`], by whether it is the one that answered.
    #[inline(always)]
    pub(super) const fn shift_of(is_reply: bool) -> u32 {
        if is_reply { 10 } else { 0 }
    }

    /// The scale of a side, of bits moved by [`Self::shift_of`].
    #[inline(always)]
    pub(super) const fn scale_of(bits: u32) -> u8 {
        (bits >> 6 & 0xf) as u8
    }

    /// The last segment, by the bits, went the way of replies.
    #[inline(always)]
    pub(super) const fn last_is_reply(bits: u32) -> bool {
        bits >> 23 & 1 != 0
    }

    /// The bits with another kind and way of the last segment.
    #[inline(always)]
    pub(super) const fn with_last(bits: u32, kind: Kind, is_reply: bool) -> u32 {
        bits & !(0xf << 20) | (kind as u32) << 20 | (is_reply as u32) << 23
    }

    /// What was agreed on at the beginning and what changes with the state: flags (but the transient one) and scales.
    const SEMANTIC_BITS: u32 = 0xf_ffff & !(UNACKNOWLEDGED | UNACKNOWLEDGED << 10);

    #[inline(always)]
    fn pack(&self) -> [u32; 12] {
        let [a, b] = &self.sides;
        let last = u32::from(self.last_window) | (self.last_end.wrapping_sub(self.last_seq) & 0xffff) << 16;
        [
            a.end,
            a.max_end,
            a.max_window,
            a.max_ack,
            b.end,
            b.max_end,
            b.max_window,
            b.max_ack,
            self.bits(),
            self.last_end,
            self.last_ack,
            last,
        ]
    }

    /// Stores and says how much changed, state and time aside.
    #[inline]
    pub(super) fn store(&self, conn: &mut Connection) -> Change {
        let words = self.pack();
        let [_, _, _, _, _, _, _, _, bits, ..] = words;
        let &[_, _, _, _, _, _, _, _, old_bits, ..] = conn.words();
        let change = if (old_bits ^ bits) & Self::SEMANTIC_BITS != 0 {
            Change::Semantic
        } else if *conn.words() != words || conn.retrans() != self.retrans {
            Change::Bookkeeping
        } else {
            Change::None
        };
        conn.set_words(words);
        conn.set_retrans(self.retrans);
        change
    }

    #[inline]
    fn side(&mut self, way: Way) -> &mut Side {
        let [original, reply] = &mut self.sides;
        match way {
            Way::Original => original,
            Way::Reply => reply,
        }
    }

    /// Sender and receiver of a segment that goes `way`.
    #[inline]
    fn ends(&mut self, way: Way) -> (&mut Side, &mut Side) {
        let [original, reply] = &mut self.sides;
        match way {
            Way::Original => (original, reply),
            Way::Reply => (reply, original),
        }
    }

    /// Remembers a segment that passes without moving anything.
    fn remember(&mut self, segment: &Segment<'_>, kind: Kind, way: Way) {
        self.last_kind = kind;
        self.last_way = way;
        self.last_seq = segment.seq;
        self.last_end = segment.end();
        self.last_window = segment.window;
    }
}

impl Connection {
    /// For a connection whose TCP windows are out of date, since segments passed that were not tracked: each side's window begins anew with
    /// its next segment, whatever its numbers are. What was agreed on (scales, SACK) stays, and so does the highest acknowledgement, which
    /// keeps blind RSTs from ending the connection meanwhile. Returns whether there was anything to forget: before the handshake is
    /// over, and for other protocols, there is not.
    pub fn forget_windows(&mut self) -> bool {
        let state = TcpState::from_number(self.state());
        if self.key.proto() != IpProto::TCP || !(state == TcpState::Established || state.is_closing()) {
            return false;
        }
        let mut tcp = Tcp::load(self);
        for side in &mut tcp.sides {
            side.max_window = 0;
        }
        tcp.retrans = 0;
        tcp.store(self) != Change::None
    }
}

/// What a segment that is accepted makes of a connection, its state aside.
pub(super) struct After {
    pub words: [u32; 12],
    pub retrans: u8,
    pub timeout_ms: u32,
}

/// What was agreed on at the beginning, or what goes with the state, differs between these words.
#[inline(always)]
fn is_semantic(before: &[u32; 12], after: &[u32; 12]) -> bool {
    let (&[_, _, _, _, _, _, _, _, old_bits, ..], &[_, _, _, _, _, _, _, _, bits, ..]) = (before, after);
    (old_bits ^ bits) & Tcp::SEMANTIC_BITS != 0
}

/// A segment that moves a connection on: by the flags that mean something to tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// SYN alone.
    Syn,
    /// SYN and ACK.
    SynAck,
    /// ACK alone.
    Ack,
    /// FIN and ACK.
    FinAck,
}

impl Move {
    /// `None`: a RST, or nothing of the kind.
    #[inline(always)]
    pub fn of(flags: Flags) -> Option<Self> {
        const MEANT: Flags = Flags::SYN.union(Flags::ACK).union(Flags::FIN).union(Flags::RST);
        const SYN_ACK: Flags = Flags::SYN.union(Flags::ACK);
        const FIN_ACK: Flags = Flags::FIN.union(Flags::ACK);
        match flags.intersection(MEANT) {
            Flags::SYN => Some(Self::Syn),
            SYN_ACK => Some(Self::SynAck),
            Flags::ACK => Some(Self::Ack),
            FIN_ACK => Some(Self::FinAck),
            _ => None,
        }
    }
}

/// [`track`] of a segment from `old` to `new`, where the windows let it through; inlined with what is known.
#[inline(always)]
fn accepted(
    mut tcp: Tcp,
    segment: &Segment<'_>,
    kind: Kind,
    way: Way,
    (old, new): (TcpState, TcpState),
    config: &TrackConfig,
) -> Option<After> {
    let Fit::Accept = window(&mut tcp, segment, kind, way, old, config) else { return None };
    tcp.last_kind = kind;
    tcp.last_way = way;
    if old != new && new == TcpState::FinWait {
        tcp.side(way).flags |= CLOSE_INIT;
    }
    let timeout_ms = timeout(&tcp, new, kind, config);
    Some(After { words: tcp.pack(), retrans: tcp.retrans, timeout_ms })
}

/// What [`track`] makes of a SYN that opens a connection: in [`TcpState::SynSent`] from now on. This and the next three are for segments
/// whose [`Move`] is known; `None`: something else is to be done, and [`track`] knows what.
#[inline(always)]
pub(super) fn begun(segment: &Segment<'_>, config: &TrackConfig) -> Option<After> {
    let segment = Segment { flags: Flags::SYN, ..*segment };
    let tcp = open(&segment, Kind::Syn, config).ok()?;
    accepted(tcp, &segment, Kind::Syn, Way::Original, (TcpState::None, TcpState::SynSent), config)
}

/// What [`track`] makes of a SYN-ACK that answers a SYN: [`TcpState::SynRecv`].
#[inline(always)]
pub(super) fn answered(words: &[u32; 12], retrans: u8, segment: &Segment<'_>, config: &TrackConfig) -> Option<After> {
    let mut tcp = Tcp::unpack(words, retrans);
    let [_, reply] = &mut tcp.sides;
    // Nothing has been seen of this side; how far the SYN lets it go is overwritten.
    let untouched = reply.max_window == 0 && reply.max_ack == 0 && reply.flags == 0 && reply.scale == 0;
    if !untouched {
        return None;
    }
    *reply = Side::default();
    let segment = Segment { flags: Flags::SYN.union(Flags::ACK), ..*segment };
    let states = (TcpState::SynSent, TcpState::SynRecv);
    accepted(tcp, &segment, Kind::SynAck, Way::Reply, states, config)
}

/// What [`track`] makes of the ACK that follows, in an answered connection: [`TcpState::Established`], and assured.
#[inline(always)]
pub(super) fn completed(words: &[u32; 12], retrans: u8, segment: &Segment<'_>, config: &TrackConfig) -> Option<After> {
    let tcp = Tcp::unpack(words, retrans);
    let segment = Segment { flags: Flags::ACK, ..*segment };
    let states = (TcpState::SynRecv, TcpState::Established);
    accepted(tcp, &segment, Kind::Ack, Way::Original, states, config)
}

/// What [`track`] makes of the FINs of an answered connection and of the ACKs that follow them. The last: what others must know has
/// changed, the state aside.
#[inline(always)]
pub(super) fn closed(
    words: &[u32; 12],
    retrans: u8,
    old: u8,
    segment: &Segment<'_>,
    flags: Move,
    way: Way,
    config: &TrackConfig,
) -> Option<(TcpState, After, bool)> {
    let (old, kind) = match flags {
        Move::FinAck => (TcpState::from_number(old), Kind::Fin),
        Move::Ack => (TcpState::from_number(old), Kind::Ack),
        Move::Syn | Move::SynAck => return None,
    };
    let tcp = Tcp::unpack(words, retrans);
    let usual = old == TcpState::Established && kind == Kind::Fin || old.is_closing() && old != TcpState::Close;
    // After a SYN that was let through, an ACK may be a challenge to it.
    if !usual || tcp.last_kind == Kind::Syn {
        return None;
    }
    let Next::To(new) = next(way, kind, old) else { return None };
    let after = accepted(tcp, segment, kind, way, (old, new), config)?;
    let semantic = is_semantic(words, &after.words);
    Some((new, after, semantic))
}

/// Begins a connection with `segment`, or says why it cannot.
#[inline(always)]
fn open(segment: &Segment<'_>, kind: Kind, config: &TrackConfig) -> Result<Tcp, Invalid> {
    let mut tcp = Tcp::EMPTY;
    let end = segment.end();
    let window = u32::from(segment.window).max(1);
    let [original, reply] = &mut tcp.sides;
    *original = Side { end, max_end: end, max_window: window, ..Side::default() };
    match next(Way::Original, kind, TcpState::None) {
        Next::To(TcpState::SynSent) => original.options(segment),
        Next::To(_) if config.tcp_loose => {
            // Its history is lost: window scaling is unknown, so windows cannot be enforced; SACK is assumed.
            original.max_end = end.wrapping_add(window);
            original.flags = SACK_PERMITTED | BE_LIBERAL;
            reply.flags = SACK_PERMITTED | BE_LIBERAL;
        }
        _ => return Err(Invalid::NoConnection),
    }
    Ok(tcp)
}

/// Judges `segment` and brings `conn` up to date. `fresh`: the entry was just made for this segment.
pub(super) fn track(
    conn: &mut Connection,
    segment: &Segment<'_>,
    way: Way,
    fresh: bool,
    config: &TrackConfig,
    now_ms: u64,
) -> Step {
    let kind = Kind::of(segment.flags);
    let mut tcp = if fresh {
        match open(segment, kind, config) {
            Ok(tcp) => tcp,
            Err(why) => return Step::Invalid(why, Change::None),
        }
    } else {
        Tcp::load(conn)
    };
    let mut old = TcpState::from_number(conn.state());
    let mut skip_window = false;
    let new = match next(way, kind, old) {
        Next::Invalid => return Step::Invalid(Invalid::State, Change::None),
        Next::To(TcpState::SynSent) if old >= TcpState::TimeWait => {
            // RFC 9293, 3.6.1: TIME-WAIT may be reopened by a SYN; so may what a RST or the same side's RST has ended.
            if tcp.sides.iter().any(|s| s.has(CLOSE_INIT)) || (tcp.last_way == way && tcp.last_kind == Kind::Rst) {
                return Step::Reopen;
            }
            match ignore(&mut tcp, segment, kind, way, old) {
                None => return Step::Pass(tcp.store(conn)),
                Some((from, to)) => {
                    old = from;
                    to
                }
            }
        }
        Next::Ignore => match ignore(&mut tcp, segment, kind, way, old) {
            None => return Step::Pass(tcp.store(conn)),
            Some((from, to)) => {
                old = from;
                to
            }
        },
        Next::To(TcpState::TimeWait)
            if old == TcpState::LastAck
                && kind == Kind::Ack
                && tcp.last_way != way
                && tcp.last_kind == Kind::Syn
                && tcp.last_flags & CHALLENGE_EXPECTED != 0 =>
        {
            // RFC 5961, 4: an ACK that challenges the SYN we let through; it does not acknowledge the FIN.
            tcp.last_flags &= !CHALLENGE_EXPECTED;
            return Step::Pass(tcp.store(conn));
        }
        Next::To(TcpState::SynSent2) => {
            tcp.last_flags |= SIMULTANEOUS_OPEN;
            TcpState::SynSent2
        }
        Next::To(TcpState::SynRecv)
            if way == Way::Reply && kind == Kind::Ack && tcp.last_flags & SIMULTANEOUS_OPEN != 0 =>
        {
            TcpState::Established
        }
        Next::To(TcpState::Close) if kind == Kind::Rst => match reset(&mut tcp, segment, way, old, conn, config) {
            Reset::Stale => return Step::Invalid(Invalid::Reset, Change::None),
            Reset::Take => {
                skip_window = true;
                TcpState::Close
            }
            Reset::CheckWindow => TcpState::Close,
            Reset::Doubtful => old,
        },
        Next::To(state) => state,
    };

    if !skip_window {
        match window(&mut tcp, segment, kind, way, TcpState::from_number(conn.state()), config) {
            Fit::Accept => {}
            Fit::Ignore => return Step::Pass(tcp.store(conn)),
            Fit::Invalid => {
                let before = *conn;
                distrust(&mut tcp, conn, kind, way, config, now_ms);
                let change = tcp.store(conn);
                let timed = if before == *conn { Change::None } else { Change::Bookkeeping };
                return Step::Invalid(Invalid::Window, change.max(timed));
            }
        }
    }

    // From here on the segment is in the window.
    tcp.last_kind = kind;
    tcp.last_way = way;
    let status = conn.status();
    conn.set_state(new as u8);
    if old != new && new == TcpState::FinWait {
        tcp.side(way).flags |= CLOSE_INIT;
    }
    let mut timeout_ms = timeout(&tcp, new, kind, config);
    let stored = tcp.store(conn);

    if !conn.seen_reply() {
        // A RST is the only answer: nothing was opened.
        if kind == Kind::Rst {
            return Step::Finish;
        }
        // A SYN sent again does not prolong the entry, or reuse of its ports could keep it for ever.
        if kind == Kind::Syn && old == TcpState::SynSent {
            return Step::Pass(if conn.status() != status { Change::Semantic } else { stored });
        }
        // Picked up, not answered.
        if new == TcpState::Established {
            timeout_ms = timeout_ms.min(config.timeouts.tcp_unacknowledged_ms);
        }
    } else if matches!(old, TcpState::SynRecv | TcpState::Established) && new == TcpState::Established {
        conn.set_assured();
    }
    conn.refresh(now_ms, timeout_ms);
    Step::Pass(if conn.status() != status || fresh { Change::Semantic } else { stored.max(Change::Bookkeeping) })
}

/// A segment that fits nothing we know but may well fit what the endpoints know. Remembered, passed. When a SYN-ACK answers a
/// SYN remembered so, the endpoints are in step and we are not: take over from them, and say from which state to which.
fn ignore(tcp: &mut Tcp, segment: &Segment<'_>, kind: Kind, way: Way, old: TcpState) -> Option<(TcpState, TcpState)> {
    if kind == Kind::SynAck && tcp.last_kind == Kind::Syn && tcp.last_way != way && segment.ack == tcp.last_end {
        tcp.last_flags &= !CHALLENGE_EXPECTED;
        let (end, window, scale) = (tcp.last_end, u32::from(tcp.last_window).max(1), tcp.last_scale);
        let flags = tcp.last_flags & (WINDOW_SCALE | SACK_PERMITTED);
        let opener = tcp.side(tcp.last_way);
        *opener = Side { end, max_end: end, max_window: window, max_ack: opener.max_ack, scale, flags };
        let answerer = tcp.side(way);
        *answerer = Side { flags: answerer.flags & BE_LIBERAL, ..Side::default() };
        return Some((TcpState::SynSent, TcpState::SynRecv));
    }
    tcp.remember(segment, kind, way);
    if kind == Kind::Syn && way == Way::Original {
        let mut seen = Side::default();
        seen.options(segment);
        tcp.last_flags = seen.flags & (WINDOW_SCALE | SACK_PERMITTED);
        tcp.last_scale = seen.scale;
        // Its answer may be a challenge ACK, which in LAST-ACK looks as if it acknowledged the last FIN.
        if old == TcpState::LastAck {
            tcp.last_flags |= CHALLENGE_EXPECTED;
        }
    }
    if old == TcpState::SynSent && kind == Kind::Ack && way == Way::Reply {
        // A challenge to our SYN; a RST that answers it will carry this number.
        tcp.last_ack = segment.ack;
    }
    None
}

/// What to do with a RST.
enum Reset {
    /// Below what its receiver has acknowledged: the receiver will not take it (RFC 5961, 3.2).
    Stale,
    /// Believe it, whatever the window.
    Take,
    /// Believe it if it is in the window.
    CheckWindow,
    /// In the window perhaps, but not exact: the receiver will challenge it. Stay in the state.
    Doubtful,
}

fn reset(
    tcp: &mut Tcp,
    segment: &Segment<'_>,
    way: Way,
    old: TcpState,
    conn: &Connection,
    config: &TrackConfig,
) -> Reset {
    if old.is_closing() {
        return Reset::Take;
    }
    let established = old == TcpState::Established && conn.assured();
    let receiver = tcp.side(way.reverse());
    let (max_ack, acked) = (receiver.max_ack, receiver.has(MAX_ACK_SET));
    // After a SYN that was let through, the highest acknowledgement may be another connection's.
    if acked && tcp.last_kind != Kind::Syn {
        let seq = segment.seq;
        // Most likely the answer to a SYN that was let through.
        if seq == 0 && !established {
            return Reset::CheckWindow;
        }
        if before(seq, max_ack) && !config.tcp_ignore_invalid_rst {
            return Reset::Stale;
        }
        if !established || seq == max_ack {
            return Reset::CheckWindow;
        }
        // Right behind data of the same sender.
        if tcp.last_kind == Kind::Ack && tcp.last_way == way && seq == tcp.last_end {
            return Reset::CheckWindow;
        }
        return Reset::Doubtful;
    }
    // It answers a segment that was let through unjudged: the windows know nothing of it.
    let answers_ignored = ((conn.seen_reply() && tcp.last_kind == Kind::Syn && tcp.last_way != way)
        || (!conn.assured() && tcp.last_kind == Kind::Ack))
        && segment.ack == tcp.last_end;
    let answers_challenge = old == TcpState::SynSent
        && tcp.last_kind == Kind::Ack
        && tcp.last_way == Way::Reply
        && segment.seq == tcp.last_ack;
    if answers_ignored || answers_challenge { Reset::Take } else { Reset::CheckWindow }
}

/// What the windows say.
enum Fit {
    Accept,
    /// Passes, moves no state and no time.
    Ignore,
    Invalid,
}

#[inline(always)]
fn window(tcp: &mut Tcp, segment: &Segment<'_>, kind: Kind, way: Way, state: TcpState, config: &TrackConfig) -> Fit {
    let syn = segment.flags.contains(Flags::SYN);
    let has_ack = segment.flags.contains(Flags::ACK);
    let rst = segment.flags.contains(Flags::RST);
    let mut seq = segment.seq;
    let mut ack = segment.ack;
    let mut win = u32::from(segment.window);
    let mut end = segment.end();
    let (sender, receiver) = tcp.ends(way);
    let mut sack = if receiver.has(SACK_PERMITTED) { highest_sack(segment.options, ack) } else { ack };

    if sender.max_window == 0 {
        // Nothing seen from this side yet.
        if syn {
            init_sender(sender, receiver, segment, end, win, way);
            if !has_ack {
                // Simultaneous open.
                return Fit::Accept;
            }
        } else {
            // Picked up in the middle: begin with what the segment says.
            sender.end = end;
            sender.max_window = (win << sender.scale).max(1);
            sender.max_end = end.wrapping_add(sender.max_window);
            if receiver.max_window == 0 {
                receiver.end = sack;
                receiver.max_end = sack;
            } else if sack == receiver.end.wrapping_add(1) {
                // Likely the answer to a keep-alive.
                receiver.end = receiver.end.wrapping_add(1);
            }
        }
    } else if syn && after(end, sender.end) && matches!(state, TcpState::SynSent | TcpState::SynRecv) {
        // A new attempt with another initial sequence number, perhaps other options.
        init_sender(sender, receiver, segment, end, win, way);
        if way == Way::Reply && !has_ack {
            return Fit::Accept;
        }
    }

    if !has_ack || (rst && ack == 0) {
        // No acknowledgement, or that of a stack which sets ACK in RSTs without one: as if it were right.
        ack = receiver.end;
        sack = ack;
    }
    if rst && seq == 0 && state == TcpState::SynSent {
        // The answer to a SYN.
        seq = sender.end;
        end = seq;
    }

    let liberal = config.tcp_be_liberal || sender.has(BE_LIBERAL);
    let ack_lag = sender.max_window.max(MAX_ACK_LAG);
    let ack_low = receiver.end.wrapping_sub(ack_lag).wrapping_sub(1);
    let data_low = sender.end.wrapping_sub(receiver.max_window).wrapping_sub(1);
    let sack_seen = before(sack, receiver.end.wrapping_add(1));
    let fit = if !before(seq, sender.max_end.wrapping_add(1)) {
        // Beyond what the receiver allowed.
        let overshot = end.wrapping_sub(sender.max_end).wrapping_add(1);
        if receiver.max_window != 0
            && after(end, data_low)
            && after(sack, ack_low)
            && overshot <= receiver.max_window
            && sack_seen
        {
            // Some stacks send more than they may. Should the receiver take it, its acknowledgement must fit.
            sender.end = end;
            sender.flags |= UNACKNOWLEDGED;
            Fit::Ignore
        } else {
            Fit::Invalid
        }
    } else if !sack_seen {
        // Acknowledges what has not been sent.
        Fit::Invalid
    } else if (receiver.max_window != 0 && !after(end, data_low)) || !after(sack, ack_low) {
        // Sent again although acknowledged, or an acknowledgement that took long.
        Fit::Ignore
    } else {
        Fit::Accept
    };
    if !matches!(fit, Fit::Accept) && !liberal {
        return fit;
    }
    if !matches!(fit, Fit::Accept) {
        return Fit::Accept;
    }

    if !syn {
        win <<= sender.scale;
    }
    let swin = win.wrapping_add(sack.wrapping_sub(ack));
    sender.max_window = sender.max_window.max(swin);
    if after(end, sender.end) {
        sender.end = end;
        sender.flags |= UNACKNOWLEDGED;
    }
    if has_ack && (!sender.has(MAX_ACK_SET) || after(ack, sender.max_ack)) {
        sender.max_ack = ack;
        sender.flags |= MAX_ACK_SET;
    }
    if receiver.max_window != 0 && after(end, sender.max_end) {
        receiver.max_window = receiver.max_window.wrapping_add(end.wrapping_sub(sender.max_end));
    }
    if after(sack.wrapping_add(win), receiver.max_end.wrapping_sub(1)) {
        receiver.max_end = sack.wrapping_add(win);
        if win == 0 {
            receiver.max_end = receiver.max_end.wrapping_add(1);
        }
    }
    if ack == receiver.end {
        receiver.flags &= !UNACKNOWLEDGED;
    }

    if kind == Kind::Ack {
        let again = tcp.last_way == way
            && tcp.last_seq == seq
            && tcp.last_ack == ack
            && tcp.last_end == end
            && tcp.last_window == segment.window;
        if again {
            tcp.retrans = tcp.retrans.saturating_add(1);
        } else {
            tcp.last_way = way;
            tcp.last_seq = seq;
            tcp.last_ack = ack;
            tcp.last_end = end;
            tcp.last_window = segment.window;
            tcp.retrans = 0;
        }
    }
    Fit::Accept
}

/// A SYN or SYN-ACK says where its sender begins and what it can do.
#[inline(always)]
fn init_sender(sender: &mut Side, receiver: &mut Side, segment: &Segment<'_>, end: u32, win: u32, way: Way) {
    sender.end = end;
    sender.max_end = end;
    sender.max_window = win.max(1);
    sender.options(segment);
    // RFC 7323, 2.2: scaling takes both.
    if way == Way::Reply && !(sender.has(WINDOW_SCALE) && receiver.has(WINDOW_SCALE)) {
        sender.scale = 0;
        receiver.scale = 0;
    }
}

/// A FIN or RST out of the window: perhaps we are out of step. When both sides try to close so, do not keep the entry for days.
fn distrust(tcp: &mut Tcp, conn: &mut Connection, kind: Kind, way: Way, config: &TrackConfig, now_ms: u64) {
    if !conn.assured() || !matches!(kind, Kind::Rst | Kind::Fin) {
        return;
    }
    if tcp.last_way != way && matches!(tcp.last_kind, Kind::Fin | Kind::Rst) {
        let left_ms = conn.remaining_ms(now_ms);
        let timeout_ms = config.timeouts.tcp_unacknowledged_ms;
        if left_ms >= 120_000 && left_ms > timeout_ms {
            conn.refresh(now_ms, timeout_ms);
        }
    } else {
        tcp.last_kind = kind;
        tcp.last_way = way;
    }
}

/// A state's own time-out.
#[inline]
pub(super) fn by_state(state: TcpState, t: &Timeouts) -> u32 {
    match state {
        TcpState::None | TcpState::SynSent => t.tcp_syn_sent_ms,
        TcpState::SynSent2 => t.tcp_syn_sent2_ms,
        TcpState::SynRecv => t.tcp_syn_recv_ms,
        TcpState::Established => t.tcp_established_ms,
        TcpState::FinWait => t.tcp_fin_wait_ms,
        TcpState::CloseWait => t.tcp_close_wait_ms,
        TcpState::LastAck => t.tcp_last_ack_ms,
        TcpState::TimeWait => t.tcp_time_wait_ms,
        TcpState::Close => t.tcp_close_ms,
    }
}

#[inline(always)]
fn timeout(tcp: &Tcp, state: TcpState, kind: Kind, config: &TrackConfig) -> u32 {
    let t = &config.timeouts;
    let by_state = by_state(state, t);
    let unacknowledged = tcp.sides.iter().any(|s| s.has(UNACKNOWLEDGED));
    if kind == Kind::Rst && !(tcp.retrans >= config.tcp_max_retrans && by_state > t.tcp_max_retrans_ms) {
        t.tcp_close_ms
    } else {
        shortened(by_state, tcp.retrans, unacknowledged, tcp.last_window == 0, config)
    }
}

/// The time-out of a state, shorter where the connection hangs.
#[inline(always)]
fn shortened(by_state: u32, retrans: u8, unacknowledged: bool, is_closed: bool, config: &TrackConfig) -> u32 {
    let t = &config.timeouts;
    if retrans >= config.tcp_max_retrans && by_state > t.tcp_max_retrans_ms {
        t.tcp_max_retrans_ms
    } else if unacknowledged && by_state > t.tcp_unacknowledged_ms {
        t.tcp_unacknowledged_ms
    } else if is_closed && by_state > t.tcp_max_retrans_ms {
        t.tcp_max_retrans_ms
    } else {
        by_state
    }
}

/// The time-out of an open connection after an acknowledgement, milliseconds. `is_closed`: it announced no window.
#[inline(always)]
pub(super) fn open_timeout(retrans: u8, unacknowledged: bool, is_closed: bool, config: &TrackConfig) -> u32 {
    shortened(config.timeouts.tcp_established_ms, retrans, unacknowledged, is_closed, config)
}
