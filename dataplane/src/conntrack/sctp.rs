//! SCTP associations (RFC 9260) as a middle box sees them: chunks move the state, verification tags say who belongs.
use super::config::{Timeouts, TrackConfig};
use super::dissect::SctpPacket;
use super::entry::Connection;
use super::key::Way;
use super::table::Change;
use super::{Invalid, Step};
use crate::packet::sctp::ChunkType;

/// State of an association. The numbers are Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SctpState {
    /// Nothing seen.
    None = 0,
    /// Nothing agreed on, or ended.
    Closed = 1,
    /// INIT (and perhaps its acknowledgement) seen.
    CookieWait = 2,
    /// COOKIE ECHO seen.
    CookieEchoed = 3,
    /// Open.
    Established = 4,
    /// SHUTDOWN seen from the opener.
    ShutdownSent = 5,
    /// SHUTDOWN seen from the other side.
    ShutdownRecd = 6,
    /// SHUTDOWN ACK seen.
    ShutdownAckSent = 7,
    /// HEARTBEAT seen on a path that was not known.
    HeartbeatSent = 8,
}

impl SctpState {
    /// All states by number.
    pub const ALL: [Self; 9] = [
        Self::None,
        Self::Closed,
        Self::CookieWait,
        Self::CookieEchoed,
        Self::Established,
        Self::ShutdownSent,
        Self::ShutdownRecd,
        Self::ShutdownAckSent,
        Self::HeartbeatSent,
    ];

    /// From a number; unknown ones are [`SctpState::None`].
    #[inline]
    pub fn from_number(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::None)
    }

    /// The name that `conntrack -L` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Closed => "CLOSED",
            Self::CookieWait => "COOKIE_WAIT",
            Self::CookieEchoed => "COOKIE_ECHOED",
            Self::Established => "ESTABLISHED",
            Self::ShutdownSent => "SHUTDOWN_SENT",
            Self::ShutdownRecd => "SHUTDOWN_RECD",
            Self::ShutdownAckSent => "SHUTDOWN_ACK_SENT",
            Self::HeartbeatSent => "HEARTBEAT_SENT",
        }
    }
}

/// The transitions: by direction, chunk, state. `None` is invalid.
#[rustfmt::skip]
const TRANSITIONS: [[[Option<SctpState>; 9]; 11]; 2] = {
    use SctpState as T;
    const CL: Option<T> = Some(T::Closed);
    const CW: Option<T> = Some(T::CookieWait);
    const CE: Option<T> = Some(T::CookieEchoed);
    const ES: Option<T> = Some(T::Established);
    const SS: Option<T> = Some(T::ShutdownSent);
    const SR: Option<T> = Some(T::ShutdownRecd);
    const SA: Option<T> = Some(T::ShutdownAckSent);
    const HS: Option<T> = Some(T::HeartbeatSent);
    const IV: Option<T> = None;
    [
        // Original direction.
        //  NO  CL  CW  CE  ES  SS  SR  SA  HS
        [
            [CL, CL, CW, CE, ES, CL, CL, SA, CW], // INIT
            [CL, CL, CW, CE, ES, SS, SR, SA, CL], // INIT ACK
            [CL, CL, CL, CL, CL, CL, CL, CL, CL], // ABORT
            [CL, CL, CW, CE, SS, SS, SR, SA, CL], // SHUTDOWN
            [SA, CL, CW, CE, ES, SA, SA, SA, SA], // SHUTDOWN ACK
            [CL, CL, CW, CE, ES, SS, SR, SA, CL], // ERROR
            [CL, CL, CE, CE, ES, SS, SR, SA, CL], // COOKIE ECHO
            [CL, CL, CW, ES, ES, SS, SR, SA, CL], // COOKIE ACK
            [CL, CL, CW, CE, ES, SS, SR, CL, CL], // SHUTDOWN COMPLETE
            [HS, CL, CW, CE, ES, SS, SR, SA, HS], // HEARTBEAT
            [CL, CL, CW, CE, ES, SS, SR, SA, HS], // HEARTBEAT ACK
        ],
        // Reply direction.
        //  NO  CL  CW  CE  ES  SS  SR  SA  HS
        [
            [IV, CL, CW, CE, ES, SS, SR, SA, IV], // INIT
            [IV, CW, CW, CE, ES, SS, SR, SA, IV], // INIT ACK
            [IV, CL, CL, CL, CL, CL, CL, CL, IV], // ABORT
            [IV, CL, CW, CE, SR, SS, SR, SA, IV], // SHUTDOWN
            [IV, CL, CW, CE, ES, SA, SA, SA, IV], // SHUTDOWN ACK
            [IV, CL, CW, CL, ES, SS, SR, SA, IV], // ERROR
            [IV, CL, CE, CE, ES, SS, SR, SA, IV], // COOKIE ECHO
            [IV, CL, CW, ES, ES, SS, SR, SA, IV], // COOKIE ACK
            [IV, CL, CW, CE, ES, SS, SR, CL, IV], // SHUTDOWN COMPLETE
            [IV, CL, CW, CE, ES, SS, SR, SA, HS], // HEARTBEAT
            [IV, CL, CW, CE, ES, SS, SR, SA, ES], // HEARTBEAT ACK
        ],
    ]
};

/// Row of the table, for chunks that can move the state.
#[inline]
pub(super) fn row(chunk: ChunkType) -> Option<usize> {
    Some(match chunk {
        ChunkType::INIT => 0,
        ChunkType::INIT_ACK => 1,
        ChunkType::ABORT => 2,
        ChunkType::SHUTDOWN => 3,
        ChunkType::SHUTDOWN_ACK => 4,
        ChunkType::ERROR => 5,
        ChunkType::COOKIE_ECHO => 6,
        ChunkType::COOKIE_ACK => 7,
        ChunkType::SHUTDOWN_COMPLETE => 8,
        ChunkType::HEARTBEAT => 9,
        ChunkType::HEARTBEAT_ACK => 10,
        _ => return None,
    })
}

fn next(way: Way, chunk: ChunkType, state: SctpState) -> Option<SctpState> {
    let Some(row) = row(chunk) else { return Some(state) };
    *TRANSITIONS.get(way.index())?.get(row)?.get(state as usize)?
}

/// T bit: the sender has no association and reflects the receiver's tag (RFC 9260, 8.5.1).
const TAG_REFLECTED: u8 = 1;

/// An association's words, unpacked.
#[derive(Clone, Copy, Default)]
pub(super) struct Sctp {
    /// The tag that packets going this way must carry; 0 unknown.
    pub(super) tags: [u32; 2],
    /// An INIT has been seen this way, and no COOKIE ACK since.
    pub(super) init: [bool; 2],
    /// The last HEARTBEAT carried another tag, and went this way.
    pub(super) heartbeat_failed: Option<Way>,
}

impl Sctp {
    pub(super) fn load(conn: &Connection) -> Self {
        let &[a, b, bits, ..] = conn.words();
        let way = if bits & 8 == 0 { Way::Original } else { Way::Reply };
        Self { tags: [a, b], init: [bits & 1 != 0, bits & 2 != 0], heartbeat_failed: (bits & 4 != 0).then_some(way) }
    }

    pub(super) fn store(&self, conn: &mut Connection) {
        let [a, b] = self.tags;
        let [ia, ib] = self.init;
        let mut bits = u32::from(ia) | u32::from(ib) << 1;
        if let Some(way) = self.heartbeat_failed {
            bits |= 4 | if way == Way::Reply { 8 } else { 0 };
        }
        let mut words = [0; 12];
        let [wa, wb, wbits, ..] = &mut words;
        (*wa, *wb, *wbits) = (a, b, bits);
        conn.set_words(words);
    }

    fn tag(&mut self, way: Way) -> &mut u32 {
        let [original, reply] = &mut self.tags;
        match way {
            Way::Original => original,
            Way::Reply => reply,
        }
    }

    fn init(&mut self, way: Way) -> &mut bool {
        let [original, reply] = &mut self.init;
        match way {
            Way::Original => original,
            Way::Reply => reply,
        }
    }
}

/// Begins an association with `packet`, or says that it cannot.
fn open(packet: &SctpPacket) -> Option<Sctp> {
    // Out of the blue (RFC 9260, 8.4): nothing to answer, nothing to track.
    if [ChunkType::ABORT, ChunkType::SHUTDOWN_COMPLETE, ChunkType::COOKIE_ACK].iter().any(|c| packet.has(*c))
        || packet.has_others
    {
        return None;
    }
    let mut sctp = Sctp::default();
    for (chunk, _) in &packet.chunks {
        next(Way::Original, *chunk, SctpState::None)?;
        match *chunk {
            ChunkType::INIT => {
                if packet.tag != 0 {
                    return None;
                }
                *sctp.tag(Way::Reply) = packet.init_tag?;
            }
            ChunkType::HEARTBEAT => *sctp.tag(Way::Original) = packet.tag,
            // It is answered by a SHUTDOWN COMPLETE with the same tag (RFC 9260, 8.4, 5).
            ChunkType::SHUTDOWN_ACK => *sctp.tag(Way::Reply) = packet.tag,
            _ => {}
        }
    }
    Some(sctp)
}

pub(super) fn track(
    conn: &mut Connection,
    packet: &SctpPacket,
    way: Way,
    fresh: bool,
    config: &TrackConfig,
    now_ms: u64,
) -> Step {
    let mut sctp = if fresh {
        match open(packet) {
            Some(sctp) => sctp,
            None => return Step::Invalid(Invalid::NoConnection, Change::None),
        }
    } else {
        Sctp::load(conn)
    };
    let before = *conn;
    // Chunks with rules of their own about tags; anything else needs the right one.
    const OWN_RULES: [ChunkType; 7] = [
        ChunkType::INIT,
        ChunkType::SHUTDOWN_COMPLETE,
        ChunkType::COOKIE_ECHO,
        ChunkType::ABORT,
        ChunkType::SHUTDOWN_ACK,
        ChunkType::HEARTBEAT,
        ChunkType::HEARTBEAT_ACK,
    ];
    if !OWN_RULES.iter().any(|c| packet.has(*c)) && packet.tag != *sctp.tag(way) {
        return Step::Invalid(Invalid::VerificationTag, Change::None);
    }
    let mut new = SctpState::None;
    let mut prolong = true;
    let mut why = None;
    for (chunk, flags) in &packet.chunks {
        let old = SctpState::from_number(conn.state());
        match check(&mut sctp, packet, *chunk, *flags, way, prolong) {
            Check::Go => {}
            Check::Skip => {
                prolong = false;
                continue;
            }
            Check::Wrong => {
                why = Some(Invalid::VerificationTag);
                break;
            }
        }
        let Some(to) = next(way, *chunk, old) else {
            why = Some(Invalid::State);
            break;
        };
        new = to;
        if !agree(&mut sctp, packet, *chunk, way, old) {
            why = Some(Invalid::VerificationTag);
            break;
        }
        // An INIT sent again does not prolong the entry, or reuse of its ports could keep it for ever.
        if *chunk == ChunkType::INIT && old == SctpState::Closed && new == SctpState::Closed && !fresh {
            prolong = false;
        }
        conn.set_state(new as u8);
        if old != new && new == SctpState::Established {
            conn.set_assured();
        }
    }
    // Chunks without influence keep the state (Linux gives the packet the time-out of the last chunk's state).
    if packet.last_is_other && why.is_none() {
        new = SctpState::from_number(conn.state());
    }
    sctp.store(conn);
    let semantic = before.status() != conn.status() || before.words() != conn.words() || fresh;
    let change = if semantic { Change::Semantic } else { Change::None };
    if let Some(why) = why {
        return Step::Invalid(why, change);
    }
    if prolong {
        conn.refresh(now_ms, timeout(new, &config.timeouts));
    }
    Step::Pass(change.max(Change::Bookkeeping))
}

enum Check {
    Go,
    /// Tolerated once, without effect.
    Skip,
    Wrong,
}

/// The chunks' own rules about the packet's tag (RFC 9260, 8.5.1), and heartbeats of further paths.
fn check(sctp: &mut Sctp, packet: &SctpPacket, chunk: ChunkType, flags: u8, way: Way, prolong: bool) -> Check {
    let right = |ok: bool| if ok { Check::Go } else { Check::Wrong };
    let own = *sctp.tag(way);
    let peers = *sctp.tag(way.reverse());
    match chunk {
        ChunkType::INIT => right(packet.tag == 0),
        ChunkType::ABORT | ChunkType::SHUTDOWN_COMPLETE => {
            right(packet.tag == if flags & TAG_REFLECTED == 0 { own } else { peers })
        }
        ChunkType::COOKIE_ECHO => right(packet.tag == own),
        ChunkType::COOKIE_ACK => {
            sctp.init = [false, false];
            Check::Go
        }
        ChunkType::HEARTBEAT | ChunkType::HEARTBEAT_ACK => {
            if own == 0 {
                *sctp.tag(way) = packet.tag;
                return Check::Go;
            }
            if packet.tag == own {
                sctp.heartbeat_failed = None;
                return Check::Go;
            }
            if packet.has_data || !prolong {
                return Check::Wrong;
            }
            if chunk == ChunkType::HEARTBEAT {
                sctp.heartbeat_failed = Some(way);
                return Check::Skip;
            }
            // The peer answers with the tag that the heartbeat had: the association has restarted.
            if sctp.heartbeat_failed != Some(way.reverse()) {
                return Check::Wrong;
            }
            sctp.heartbeat_failed = None;
            *sctp.tag(way) = packet.tag;
            *sctp.tag(way.reverse()) = 0;
            Check::Go
        }
        _ => Check::Go,
    }
}

/// Notes the tags that INIT and INIT ACK announce; false when they contradict what is known.
fn agree(sctp: &mut Sctp, packet: &SctpPacket, chunk: ChunkType, way: Way, old: SctpState) -> bool {
    if chunk != ChunkType::INIT && chunk != ChunkType::INIT_ACK {
        return true;
    }
    let Some(announced) = packet.init_tag else { return false };
    let other = way.reverse();
    let (own_init, other_init, known) = (*sctp.init(way), *sctp.init(other), *sctp.tag(other));
    if chunk == ChunkType::INIT {
        // One that announces what is known already is late or repeated: no new handshake.
        if old == SctpState::None || known != announced {
            if own_init && other_init {
                *sctp.init(other) = false;
            }
            *sctp.init(way) = true;
        }
    } else {
        // An INIT ACK must repeat what was agreed on, and in a collision of INITs what the other INIT announced.
        let bound = if other_init { own_init } else { known != 0 };
        if bound && known != announced {
            return false;
        }
    }
    *sctp.tag(other) = announced;
    true
}

/// A state's time-out.
pub(super) fn timeout(state: SctpState, t: &Timeouts) -> u32 {
    match state {
        SctpState::None | SctpState::Closed => t.sctp_closed_ms,
        SctpState::CookieWait => t.sctp_cookie_wait_ms,
        SctpState::CookieEchoed => t.sctp_cookie_echoed_ms,
        SctpState::Established => t.sctp_established_ms,
        SctpState::ShutdownSent => t.sctp_shutdown_sent_ms,
        SctpState::ShutdownRecd => t.sctp_shutdown_recd_ms,
        SctpState::ShutdownAckSent => t.sctp_shutdown_ack_sent_ms,
        SctpState::HeartbeatSent => t.sctp_heartbeat_sent_ms,
    }
}
