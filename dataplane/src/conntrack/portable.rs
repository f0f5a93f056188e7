//! A connection as it can be handed to another host: nothing in it depends on this host's clock, table or policy.
//!
//! Times are spans, state numbers are checked, and what policy and limits noted is left behind: whoever imports a connection judges its
//! next packet by its own policy. [`Portable::to_connection`] believes nothing: what comes back is a connection that tracking could have
//! made, or one that differs from such only in numbers that its own packets decide on (windows, tags, counters).
use core::net::IpAddr;

use super::config::{MAX_TIMEOUT_MS, Timeouts};
use super::entry::{Connection, Traffic};
use super::icmp;
use super::key::{Key, Toward, Way};
use super::map::VERSION_MAX;
use super::sctp::{self, Sctp, SctpState};
use super::tcp::{self, Kind, Side, Tcp, TcpState};
use super::udp::STREAM_AFTER_MS;
use crate::packet::IpProto;

/// Largest TCP window, bytes. No sender may have one beyond 2^30 (RFC 7323, 2.3), but what tracking takes for a window can grow beyond that
/// under traffic that means no good; from half of the sequence space on, comparing sequence numbers makes no sense.
pub const MAX_TCP_WINDOW: u32 = i32::MAX as u32;
/// How far ahead of what it has sent a TCP sender can be allowed to send: the largest window (RFC 7323, 2.3), rounded up.
const MAX_TCP_CREDIT: i32 = 1 << 30;
/// Highest age that is told, milliseconds; what is older has this age.
pub const MAX_AGE_MS: u16 = u16::MAX;

/// Why a [`Portable`] makes no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PortableError {
    /// One address is IPv4, the other IPv6.
    #[error("one address is IPv4, the other IPv6")]
    MixedFamilies,
    /// ICMP over IPv6 or ICMPv6 over IPv4.
    #[error("ICMP of the other IP version")]
    IcmpFamily,
    /// For ICMP: the port that stands for the question names none.
    #[error("ICMP type {0} is not a question")]
    IcmpQuestion(u8),
    /// ICMP whose key says that one side asked and whose connection says the other; or another protocol's key that says that anybody asked.
    #[error("key and connection disagree on who asked, or a protocol without questions")]
    Asker,
    /// A protocol without ports has ports; or GRE two call identifiers.
    #[error("ports that the protocol does not have")]
    Ports,
    /// Protocol state of another protocol.
    #[error("state of another protocol")]
    Protocol,
    /// State number that the protocol does not have, or that no connection can be in.
    #[error("impossible state number {0}")]
    State(u8),
    /// Assured although that takes an answer, or never happens to the protocol.
    #[error("assured without reason")]
    Assured,
    /// Flag bits that do not exist.
    #[error("unknown TCP flag bits {0:#x}")]
    Flags(u8),
    /// TCP segment kind that does not exist.
    #[error("unknown TCP segment kind {0}")]
    SegmentKind(u8),
    /// TCP window scale above 14, or without having been agreed on.
    #[error("impossible TCP window scale {0}")]
    Scale(u8),
    /// A TCP window of more than [`MAX_TCP_WINDOW`], or a sender that may send farther ahead than any window reaches.
    #[error("impossible TCP window")]
    Window,
    /// Expires later than any time-out allows.
    #[error("{0} ms to live are more than any time-out")]
    Lifetime(u32),
    /// Its time is over.
    #[error("expired")]
    Expired,
    /// Version of more than 30 bits.
    #[error("version {0:#x} has more than 30 bits")]
    Version(u32),
}

/// A connection's identity; see [`Key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortableKey {
    /// The VM's address.
    pub local: IpAddr,
    /// The other side's address.
    pub remote: IpAddr,
    /// The VM's port.
    pub local_port: u16,
    /// The other side's port.
    pub remote_port: u16,
    /// Zone: VLAN identifier, and number of the VM's port above it.
    pub zone: u16,
    /// Protocol.
    pub proto: IpProto,
    /// For ICMP and ICMPv6: the other side asked. Otherwise false.
    pub asked_by_remote: bool,
}

impl PortableKey {
    /// A key's parts.
    #[inline]
    pub fn of(key: &Key) -> Self {
        Self {
            local: key.local(),
            remote: key.remote(),
            local_port: key.local_port,
            remote_port: key.remote_port,
            zone: key.zone,
            proto: key.proto(),
            asked_by_remote: key.asked_by_remote(),
        }
    }

    /// The key, if it can be one.
    ///
    /// # Errors
    /// [`PortableError`]: mixed families, ICMP of the wrong version or without a question, ports where there are none.
    #[inline]
    pub fn to_key(&self) -> Result<Key, PortableError> {
        if self.local.is_ipv6() != self.remote.is_ipv6() {
            return Err(PortableError::MixedFamilies);
        }
        let (local, remote) = ((self.local, self.local_port), (self.remote, self.remote_port));
        let key = Key::new(Toward::Ingress, self.zone, self.proto, remote, local);
        match self.proto {
            IpProto::ICMP | IpProto::ICMPV6 => return self.to_icmp_key(key),
            IpProto::TCP | IpProto::UDP | IpProto::UDP_LITE | IpProto::SCTP | IpProto::DCCP => {}
            // The call identifier of version 1 stands for the destination.
            IpProto::GRE if self.local_port == 0 || self.remote_port == 0 => {}
            _ if self.local_port == 0 && self.remote_port == 0 => {}
            _ => return Err(PortableError::Ports),
        }
        if self.asked_by_remote {
            return Err(PortableError::Asker);
        }
        Ok(key)
    }

    #[cold]
    fn to_icmp_key(self, key: Key) -> Result<Key, PortableError> {
        let ipv6 = self.local.is_ipv6();
        if ipv6 != (self.proto == IpProto::ICMPV6) {
            return Err(PortableError::IcmpFamily);
        }
        let (id, question, code) = key.icmp();
        if icmp::exchange(ipv6, question) != Some((question, true)) {
            return Err(PortableError::IcmpQuestion(question));
        }
        Ok(key.with_icmp(id, question, code, self.asked_by_remote))
    }
}

/// What one side of a TCP connection has sent and may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortableSide {
    /// Highest sequence number sent, plus one.
    pub end: u32,
    /// Up to where the other side has allowed it to send.
    pub max_end: u32,
    /// Largest window it has announced, bytes, at most [`MAX_TCP_WINDOW`]; 0: nothing has been seen from this side.
    pub max_window: u32,
    /// Highest acknowledgement it has sent; valid with [`Self::MAX_ACK_SET`].
    pub max_ack: u32,
    /// Shift of its windows (RFC 7323), 0 to 14.
    pub scale: u8,
    /// [`Self::WINDOW_SCALE`] and the others.
    pub flags: u8,
}

impl PortableSide {
    /// It has offered window scaling (RFC 7323).
    pub const WINDOW_SCALE: u8 = tcp::WINDOW_SCALE as u8;
    /// It has offered selective acknowledgements (RFC 2018), or may have.
    pub const SACK_PERMITTED: u8 = tcp::SACK_PERMITTED as u8;
    /// It was the first to send a FIN.
    pub const CLOSE_INIT: u8 = tcp::CLOSE_INIT as u8;
    /// Its windows are not enforced: the beginning was not seen.
    pub const BE_LIBERAL: u8 = tcp::BE_LIBERAL as u8;
    /// It has sent data that was not acknowledged.
    pub const UNACKNOWLEDGED: u8 = tcp::UNACKNOWLEDGED as u8;
    /// [`Self::max_ack`] is valid.
    pub const MAX_ACK_SET: u8 = tcp::MAX_ACK_SET as u8;
    /// All flags that exist.
    pub const ALL: u8 = 0x3f;

    fn of(side: &Side) -> Self {
        Self {
            end: side.end,
            max_end: side.max_end,
            max_window: side.max_window.min(MAX_TCP_WINDOW),
            max_ack: side.max_ack,
            scale: side.scale,
            flags: side.flags as u8,
        }
    }

    fn to_side(self) -> Result<Side, PortableError> {
        if self.flags & !Self::ALL != 0 {
            return Err(PortableError::Flags(self.flags & !Self::ALL));
        }
        if self.scale > tcp::MAX_SCALE || (self.scale != 0 && self.flags & Self::WINDOW_SCALE == 0) {
            return Err(PortableError::Scale(self.scale));
        }
        let credit = self.max_end.wrapping_sub(self.end) as i32;
        if self.max_window > MAX_TCP_WINDOW || (self.max_window != 0 && credit > MAX_TCP_CREDIT) {
            return Err(PortableError::Window);
        }
        Ok(Side {
            end: self.end,
            max_end: self.max_end,
            max_window: self.max_window,
            max_ack: self.max_ack,
            scale: self.scale,
            flags: u32::from(self.flags),
        })
    }
}

/// Windows of both directions, and the last segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortableTcp {
    /// The opener and the other side.
    pub sides: [PortableSide; 2],
    /// Kind of the last segment: 0 SYN, 1 SYN-ACK, 2 FIN, 3 ACK, 4 RST, 5 none.
    pub last_kind: u8,
    /// The last segment went from the other side to the opener.
    pub last_reply: bool,
    /// Sequence number behind the last segment.
    pub last_end: u32,
    /// Length of the last segment in sequence numbers.
    pub last_len: u16,
    /// Acknowledgement of the last segment.
    pub last_ack: u32,
    /// Window field of the last segment.
    pub last_window: u16,
    /// Window scale that a SYN offered which was let through unjudged, 0 to 14.
    pub last_scale: u8,
    /// [`PortableSide::WINDOW_SCALE`] and [`PortableSide::SACK_PERMITTED`] of that SYN, [`Self::CHALLENGE_EXPECTED`],
    /// [`Self::SIMULTANEOUS_OPEN`].
    pub last_flags: u8,
    /// How often the last segment was sent again.
    pub retrans: u8,
}

impl PortableTcp {
    /// A SYN was let through that may be answered by a challenge (RFC 5961, 4).
    pub const CHALLENGE_EXPECTED: u8 = tcp::CHALLENGE_EXPECTED as u8;
    /// Both sides opened at once.
    pub const SIMULTANEOUS_OPEN: u8 = tcp::SIMULTANEOUS_OPEN as u8;
    /// All flags of [`Self::last_flags`] that exist.
    pub const LAST_FLAGS: u8 = 0xf;

    fn of(conn: &Connection) -> Self {
        let tcp = Tcp::load(conn);
        let [opener, other] = &tcp.sides;
        Self {
            sides: [PortableSide::of(opener), PortableSide::of(other)],
            last_kind: tcp.last_kind as u8,
            last_reply: tcp.last_way == Way::Reply,
            last_end: tcp.last_end,
            last_len: tcp.last_end.wrapping_sub(tcp.last_seq) as u16,
            last_ack: tcp.last_ack,
            last_window: tcp.last_window,
            last_scale: tcp.last_scale,
            last_flags: tcp.last_flags as u8,
            retrans: tcp.retrans,
        }
    }

    fn to_tcp(self) -> Result<Tcp, PortableError> {
        let [opener, other] = self.sides;
        if self.last_kind > Kind::Other as u8 {
            return Err(PortableError::SegmentKind(self.last_kind));
        }
        if self.last_scale > tcp::MAX_SCALE {
            return Err(PortableError::Scale(self.last_scale));
        }
        if self.last_flags & !Self::LAST_FLAGS != 0 {
            return Err(PortableError::Flags(self.last_flags & !Self::LAST_FLAGS));
        }
        Ok(Tcp {
            sides: [opener.to_side()?, other.to_side()?],
            last_kind: Kind::from_number(u32::from(self.last_kind)),
            last_way: if self.last_reply { Way::Reply } else { Way::Original },
            last_seq: self.last_end.wrapping_sub(u32::from(self.last_len)),
            last_ack: self.last_ack,
            last_end: self.last_end,
            last_window: self.last_window,
            last_scale: self.last_scale,
            last_flags: u32::from(self.last_flags),
            retrans: self.retrans,
        })
    }
}

/// Verification tags (RFC 9260, 8.5) of both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortableSctp {
    /// The tag that packets must carry from the opener, and those to it; 0: unknown.
    pub tags: [u32; 2],
    /// An INIT has been seen from the opener, and to it, and no COOKIE ACK since.
    pub init: [bool; 2],
    /// The last HEARTBEAT carried another tag, and went this way.
    pub heartbeat_failed: Option<Way>,
}

/// What tracking keeps of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortableState {
    /// TCP.
    Tcp(PortableTcp),
    /// UDP.
    Udp {
        /// Time since the first packet, milliseconds; [`MAX_AGE_MS`] stands for longer, too.
        age_ms: u16,
    },
    /// SCTP.
    Sctp(PortableSctp),
    /// Any other protocol: nothing.
    Plain,
}

/// A connection that can be handed to another host. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portable {
    /// Identity.
    pub key: PortableKey,
    /// The other side opened it, rather than the VM.
    pub opened_by_remote: bool,
    /// See [`Connection::seen_reply`].
    pub seen_reply: bool,
    /// See [`Connection::assured`].
    pub assured: bool,
    /// See [`Connection::state`].
    pub state: u8,
    /// The protocol's own.
    pub protocol: PortableState,
    /// Packets and bytes from the opener, and to it.
    pub traffic: [Traffic; 2],
    /// Milliseconds until the connection expires; 0: it has.
    pub remaining_ms: u32,
    /// See [`Connection::version`]; 30 bits.
    pub version: u32,
}

impl Connection {
    /// The connection as it can be handed to another host at this moment.
    #[inline]
    pub fn to_portable(&self, now_ms: u64) -> Portable {
        let protocol = match self.key.proto() {
            IpProto::TCP => PortableState::Tcp(PortableTcp::of(self)),
            IpProto::UDP => PortableState::Udp { age_ms: udp_age_ms(self, now_ms) },
            IpProto::SCTP => {
                let sctp = Sctp::load(self);
                PortableState::Sctp(PortableSctp {
                    tags: sctp.tags,
                    init: sctp.init,
                    heartbeat_failed: sctp.heartbeat_failed,
                })
            }
            _ => PortableState::Plain,
        };
        Portable {
            key: PortableKey::of(&self.key),
            opened_by_remote: self.opened() == Toward::Ingress,
            seen_reply: self.seen_reply(),
            assured: self.assured(),
            state: self.state(),
            protocol,
            traffic: [self.traffic(Way::Original), self.traffic(Way::Reply)],
            remaining_ms: self.remaining_ms(now_ms),
            version: self.version & VERSION_MAX,
        }
    }
}

fn udp_age_ms(conn: &Connection, now_ms: u64) -> u16 {
    let &[stream_from, ..] = conn.words();
    let age = (now_ms as u32).wrapping_sub(stream_from.wrapping_sub(STREAM_AFTER_MS)) as i32;
    // Negative: longer ago than the clock's half turn.
    u16::try_from(age).unwrap_or(MAX_AGE_MS)
}

impl Portable {
    /// The connection, on this host's clock. Its policy generation is 0 and its decision empty, so that the policy judges its next packet.
    ///
    /// It expires no later than an entry in its state would here: a longer [`Self::remaining_ms`] is cut to `timeouts`.
    ///
    /// # Errors
    /// [`PortableError`]: what tracking cannot have made, or has expired.
    #[inline]
    pub fn to_connection(&self, now_ms: u64, timeouts: &Timeouts) -> Result<Connection, PortableError> {
        let key = self.key.to_key()?;
        if self.version > VERSION_MAX {
            return Err(PortableError::Version(self.version));
        }
        if self.remaining_ms > MAX_TIMEOUT_MS {
            return Err(PortableError::Lifetime(self.remaining_ms));
        }
        if self.remaining_ms == 0 {
            return Err(PortableError::Expired);
        }
        let toward = if self.opened_by_remote { Toward::Ingress } else { Toward::Egress };
        let mut conn = Connection::new(key, toward);
        let longest_ms = self.restore(&mut conn, now_ms, timeouts)?;
        conn.set_state(self.state);
        if self.seen_reply {
            conn.set_seen_reply();
        }
        if self.assured {
            conn.set_assured();
        }
        conn.set_traffic(self.traffic);
        conn.version = self.version;
        conn.refresh(now_ms, self.remaining_ms.min(longest_ms));
        if conn.is_expired(now_ms) {
            // A time-out of 0 is configured.
            return Err(PortableError::Expired);
        }
        Ok(conn)
    }

    /// Checks what depends on the protocol and stores its words; returns the longest time-out of the state.
    #[inline]
    fn restore(&self, conn: &mut Connection, now_ms: u64, t: &Timeouts) -> Result<u32, PortableError> {
        let assured_in_vain = self.assured && !self.seen_reply;
        match (self.key.proto, self.protocol) {
            (IpProto::TCP, PortableState::Tcp(tcp)) => {
                let state = TcpState::from_number(self.state);
                if state == TcpState::None {
                    return Err(PortableError::State(self.state));
                }
                if assured_in_vain {
                    return Err(PortableError::Assured);
                }
                tcp.to_tcp()?.store(conn);
                // After a RST every state may have this one.
                Ok(tcp::by_state(state, t).max(t.tcp_close_ms))
            }
            (IpProto::SCTP, PortableState::Sctp(sctp)) => {
                // Without an answer an association can be assured: a COOKIE ACK is believed whoever sends it.
                if SctpState::from_number(self.state) == SctpState::None {
                    return Err(PortableError::State(self.state));
                }
                let PortableSctp { tags, init, heartbeat_failed } = sctp;
                Sctp { tags, init, heartbeat_failed }.store(conn);
                // A packet may move the state and not the time, so the states' time-outs say little.
                Ok(SctpState::ALL.iter().map(|state| sctp::timeout(*state, t)).max().unwrap_or(0))
            }
            (_, PortableState::Tcp(_) | PortableState::Sctp(_)) | (IpProto::TCP | IpProto::SCTP, _) => {
                Err(PortableError::Protocol)
            }
            _ if self.state != 0 => Err(PortableError::State(self.state)),
            _ if assured_in_vain => Err(PortableError::Assured),
            (IpProto::UDP, PortableState::Udp { age_ms }) => {
                let first_ms = (now_ms as u32).wrapping_sub(u32::from(age_ms));
                let mut words = [0; 12];
                let [stream_from, ..] = &mut words;
                *stream_from = first_ms.wrapping_add(STREAM_AFTER_MS);
                conn.set_words(words);
                Ok(if self.assured { t.udp_stream_ms } else { t.udp_ms })
            }
            (IpProto::UDP, PortableState::Plain) | (_, PortableState::Udp { .. }) => Err(PortableError::Protocol),
            (IpProto::UDP_LITE, PortableState::Plain) => Ok(if self.assured { t.udp_stream_ms } else { t.udp_ms }),
            (IpProto::GRE, PortableState::Plain) => Ok(if self.assured { t.gre_stream_ms } else { t.gre_ms }),
            // Nothing assures these.
            _ if self.assured => Err(PortableError::Assured),
            (IpProto::ICMP | IpProto::ICMPV6, PortableState::Plain) => {
                if self.key.asked_by_remote != self.opened_by_remote {
                    return Err(PortableError::Asker);
                }
                Ok(if self.key.proto == IpProto::ICMPV6 { t.icmpv6_ms } else { t.icmp_ms })
            }
            (_, PortableState::Plain) => Ok(t.generic_ms),
        }
    }
}
