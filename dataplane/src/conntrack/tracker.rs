//! One VM's tracking: frames in, judgements out.
use super::config::TrackConfig;
use super::dissect::{Checksum, Dissected, Facts, IcmpError, Malformed, Packet, Refusal, Transport, dissect};
use super::entry::{Connection, Decision};
use super::frag::{Accepted, Datagram, FragmentQueue, FragmentRefusal};
use super::key::{Flow, Toward, Way};
use super::pick_up::PickUp;
use super::table::{Change, ConnTable, InsertError, Stored};
use super::{CtState, Invalid, Step, generic, icmp, sctp, tcp, udp};
use crate::packet::EtherType;

/// How often a packet is judged anew because another thread changed its connection meanwhile.
const ATTEMPTS: usize = 4;

/// What is known of a frame.
#[derive(Debug)]
pub enum Judgement {
    /// Not IP, hence not for connection tracking.
    NotIp(EtherType),
    /// The header copy is too short: call again with this many bytes in it, or drop the frame.
    NeedMore {
        /// Bytes from the frame's start.
        bytes: u32,
    },
    /// To be dropped: not a packet.
    Malformed(Malformed),
    /// A fragment that was kept; the frame itself goes no further.
    Held,
    /// A fragment to be dropped.
    Refused(FragmentRefusal),
    /// A packet with its state.
    Tracked(Tracked),
}

/// A packet's state and connection.
#[derive(Debug)]
pub struct Tracked {
    /// What it is to the connections known.
    pub state: CtState,
    /// What the policy looks at; `None` for packets too broken to have it.
    pub flow: Option<Flow>,
    /// Its direction within its connection (for errors: within the connection it is about).
    pub way: Option<Way>,
    /// A copy of its connection (for errors: of the connection it is about).
    pub connection: Option<Connection>,
    /// The connection is not stored yet: [`Tracker::confirm`] stores it.
    pub fresh: bool,
    /// Why it is invalid.
    pub invalid: Option<Invalid>,
    /// With this packet the connection stopped being half-open; whoever counts such connections is to be told.
    pub opened: bool,
    /// The packet came in fragments, which wait for the verdict: see [`Tracker::fragments`].
    pub datagram: Option<Datagram>,
}

impl Tracked {
    fn invalid(why: Invalid, flow: Option<Flow>) -> Self {
        Self {
            state: CtState::Invalid,
            flow,
            way: None,
            connection: None,
            fresh: false,
            invalid: Some(why),
            opened: false,
            datagram: None,
        }
    }

    fn known(state: CtState, flow: Flow, way: Way, connection: Connection) -> Self {
        Self {
            state,
            flow: Some(flow),
            way: Some(way),
            connection: Some(connection),
            fresh: false,
            invalid: None,
            opened: false,
            datagram: None,
        }
    }
}

/// One VM's tracking over a table.
pub struct Tracker<T> {
    table: T,
    fragments: FragmentQueue,
    config: TrackConfig,
    pick_up: PickUp,
    dither: u32,
}

impl<T: ConnTable> Tracker<T> {
    /// Tracking with an empty fragment memory.
    pub fn new(table: T, config: TrackConfig) -> Self {
        Self { table, fragments: FragmentQueue::new(), config, pick_up: PickUp::default(), dither: 0x9e37_79b9 }
    }

    /// The table.
    pub fn table(&self) -> &T {
        &self.table
    }

    /// The table, to be changed.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    /// The switches and time-outs in force.
    pub fn config(&self) -> &TrackConfig {
        &self.config
    }

    /// Changes switches and time-outs. Entries keep the expiry they have until their next packet.
    pub fn set_config(&mut self, config: TrackConfig) {
        self.config = config;
    }

    /// Fragments held. A [`Tracked::datagram`] is released or discarded here once its verdict is known.
    pub fn fragments(&mut self) -> &mut FragmentQueue {
        &mut self.fragments
    }

    /// Judges a frame. Its connection, when there is one, is brought up to date; a new one is only stored by [`Self::confirm`].
    #[inline]
    pub fn track(&mut self, packet: &Packet<'_>, now_ms: u64) -> Judgement {
        let dissected = match dissect(packet, self.config.checksum) {
            Ok(dissected) => dissected,
            Err(refusal) => return refused(refusal),
        };
        if let Dissected::Fragment(facts) = &dissected {
            return match self.fragments.accept(facts, packet, &self.config, now_ms) {
                Accepted::Held => Judgement::Held,
                // Linux takes this one for a packet, and an invalid one.
                Accepted::Refused(FragmentRefusal::Unaligned) => {
                    Judgement::Tracked(Tracked::invalid(Invalid::Header, None))
                }
                Accepted::Refused(why) => Judgement::Refused(why),
                Accepted::Complete(datagram) => self.track_datagram(datagram, packet.toward, now_ms),
            };
        }
        self.dither = next_dither(self.dither);
        judge(&mut self.table, &self.config, &self.pick_up, self.dither, &dissected, now_ms)
    }

    #[cold]
    fn track_datagram(&mut self, datagram: Datagram, toward: Toward, now_ms: u64) -> Judgement {
        self.dither = next_dither(self.dither);
        let frame = self.fragments.assemble(&datagram);
        // Nobody can have vouched for the checksum of what was not yet a packet.
        let whole = Packet::whole(frame, toward, Checksum::Verify);
        let judgement = match dissect(&whole, self.config.checksum) {
            Ok(dissected) => judge(&mut self.table, &self.config, &self.pick_up, self.dither, &dissected, now_ms),
            Err(refusal) => refused(refusal),
        };
        match judgement {
            Judgement::Tracked(tracked) => Judgement::Tracked(Tracked { datagram: Some(datagram), ..tracked }),
            other => {
                self.fragments.discard(datagram);
                other
            }
        }
    }

    /// Stores the connection of a packet that the policy lets through, if it is new; otherwise does nothing.
    ///
    /// # Errors
    /// [`InsertError::Full`]: the packet should be dropped. [`InsertError::Exists`]: another thread opened the same connection
    /// in this moment; the packet should be judged again, or let through as the policy said.
    #[inline]
    pub fn confirm(&mut self, tracked: &Tracked, now_ms: u64) -> Result<(), InsertError> {
        match &tracked.connection {
            Some(connection) if tracked.fresh => self.table.insert(connection, now_ms),
            _ => Ok(()),
        }
    }

    /// Notes the policy's decision in the packet's connection, so that its next packets need not ask again while `generation` is the
    /// policy's. For a new connection: before [`Self::confirm`].
    #[inline]
    pub fn decide(&mut self, tracked: &mut Tracked, generation: u32, decision: Decision) {
        let Some(connection) = &mut tracked.connection else { return };
        connection.policy_generation = generation;
        connection.decision = decision;
        if !tracked.fresh {
            // Lost when the entry has changed meanwhile: the next packet will decide again.
            let _ = self.table.update(connection, Change::Semantic);
        }
    }

    /// Deletes what is overdue, looking at `budget` entries and a few fragments. Returns how many entries went.
    pub fn expire(&mut self, now_ms: u64, budget: usize) -> usize {
        self.fragments.expire(now_ms, budget.min(16));
        self.table.expire(now_ms, budget)
    }
}

#[inline]
pub(crate) fn next_dither(mut x: u32) -> u32 {
    x ^= x << 13;
    x ^= x >> 17;
    x ^ x << 5
}

#[cold]
pub(crate) fn refused(refusal: Refusal) -> Judgement {
    match refusal {
        Refusal::NeedMore { bytes } => Judgement::NeedMore { bytes },
        Refusal::Malformed(why) => Judgement::Malformed(why),
        Refusal::Invalid(why) => Judgement::Tracked(Tracked::invalid(why, None)),
    }
}

/// Judges a packet that is not a fragment. Shared by [`Tracker`] and the packet path, whose tables and fragment queues belong to several
/// threads. `dither`: any evenly distributed number.
pub(crate) fn judge<T: ConnTable>(
    table: &mut T,
    config: &TrackConfig,
    pick_up: &PickUp,
    dither: u32,
    dissected: &Dissected<'_>,
    now_ms: u64,
) -> Judgement {
    Judgement::Tracked(match dissected {
        Dissected::Flow(facts) => follow(table, config, pick_up, dither, facts, now_ms),
        Dissected::Error(error) => relate(table, error, now_ms),
        Dissected::Untracked(flow) => Tracked {
            state: CtState::Untracked,
            flow: Some(*flow),
            way: None,
            connection: None,
            fresh: false,
            invalid: None,
            opened: false,
            datagram: None,
        },
        Dissected::NotIp(ethertype) => return Judgement::NotIp(*ethertype),
        // A whole packet that is a fragment again.
        Dissected::Fragment(_) => return Judgement::Malformed(Malformed::Fragment),
    })
}

/// An error belongs to the connection whose packet it quotes. It moves nothing there.
#[cold]
fn relate<T: ConnTable>(table: &mut T, error: &IcmpError, now_ms: u64) -> Tracked {
    match table.lookup(&error.about, now_ms) {
        Some(conn) => Tracked::known(CtState::Related, error.flow, conn.way(error.flow.toward), conn),
        None => Tracked::invalid(Invalid::Unrelated, Some(error.flow)),
    }
}

#[inline]
fn apply(conn: &mut Connection, facts: &Facts<'_>, way: Way, fresh: bool, config: &TrackConfig, now_ms: u64) -> Step {
    match &facts.transport {
        Transport::Tcp(segment) => tcp::track(conn, segment, way, fresh, config, now_ms),
        Transport::Udp => udp::track(conn, fresh, config, now_ms),
        Transport::UdpLite => udp::track_lite(conn, fresh, config, now_ms),
        Transport::Icmp { question } => icmp::track(conn, *question, way, fresh, config, now_ms),
        Transport::Sctp(packet) => sctp::track(conn, packet, way, fresh, config, now_ms),
        Transport::Gre => generic::track_gre(conn, fresh, config, now_ms),
        Transport::Other => generic::track(conn, fresh, config, now_ms),
    }
}

fn follow<T: ConnTable>(
    table: &mut T,
    config: &TrackConfig,
    pick_up: &PickUp,
    dither: u32,
    facts: &Facts<'_>,
    now_ms: u64,
) -> Tracked {
    let flow = facts.flow;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let last = attempt >= ATTEMPTS;
        let Some(mut conn) = table.lookup(&flow.key, now_ms) else {
            return begin(config, pick_up, dither, facts, now_ms);
        };
        let way = conn.way(flow.toward);
        let answered = conn.seen_reply() || way == Way::Reply;
        let state = if answered { CtState::Established } else { CtState::New };
        let (stored, tracked) = match apply(&mut conn, facts, way, false, config, now_ms) {
            Step::Pass(mut change) => {
                if answered && !conn.seen_reply() {
                    conn.set_seen_reply();
                    change = Change::Semantic;
                }
                conn.account(way, facts.ip_len, dither);
                let opened = conn.decision.counts_half_open() && !conn.is_half_open();
                if opened {
                    conn.decision = conn.decision.opened();
                    change = Change::Semantic;
                }
                let stored = table.update(&conn, change.max(Change::Bookkeeping));
                if stored == Stored::Done {
                    conn.version = conn.version.wrapping_add(1);
                }
                let opened = opened && stored == Stored::Done;
                (stored, Tracked { opened, ..Tracked::known(state, flow, way, conn) })
            }
            Step::Invalid(why, change) => {
                let stored = if change == Change::None { Stored::Done } else { table.update(&conn, change) };
                let mut tracked = Tracked::invalid(why, Some(flow));
                tracked.way = Some(way);
                (stored, tracked)
            }
            Step::Finish => (table.remove(&conn), Tracked::known(state, flow, way, conn)),
            Step::Reopen => {
                // Looks again whether or not it was this thread that deleted it.
                let _ = table.remove(&conn);
                if last {
                    return Tracked::invalid(Invalid::State, Some(flow));
                }
                continue;
            }
        };
        if stored == Stored::Done || last {
            return tracked;
        }
    }
}

/// A connection's first packet, if it can be one.
fn begin(config: &TrackConfig, pick_up: &PickUp, dither: u32, facts: &Facts<'_>, now_ms: u64) -> Tracked {
    let flow = facts.flow;
    let mut conn = Connection::new(flow.key, flow.toward);
    match apply(&mut conn, facts, Way::Original, true, config, now_ms) {
        Step::Pass(_) => {
            conn.account(Way::Original, facts.ip_len, dither);
            Tracked { fresh: true, ..Tracked::known(CtState::New, flow, Way::Original, conn) }
        }
        Step::Invalid(Invalid::NoConnection, _)
            if !config.tcp_loose && matches!(facts.transport, Transport::Tcp(_)) && pick_up.is_on(now_ms) =>
        {
            begin_midstream(config, dither, facts, now_ms)
        }
        Step::Invalid(why, _) => Tracked::invalid(why, Some(flow)),
        Step::Finish | Step::Reopen => Tracked::invalid(Invalid::NoConnection, Some(flow)),
    }
}

/// As [`begin`], with connections picked up in the middle.
#[cold]
fn begin_midstream(config: &TrackConfig, dither: u32, facts: &Facts<'_>, now_ms: u64) -> Tracked {
    begin(&TrackConfig { tcp_loose: true, ..*config }, &PickUp::default(), dither, facts, now_ms)
}
