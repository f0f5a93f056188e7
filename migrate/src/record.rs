//! Records: one connection, or one that went, in a fixed little-endian layout. `FORMAT.md` says it byte by byte.
//!
//! A record begins with its kind and its length, so that a reader can pass over what it does not know, if that may be passed over: a
//! kind or an extension says itself whether it is optional. Fields that say nothing are zero, and refused if they are not: whatever is new
//! comes as an extension or as another kind.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferry_dataplane::conntrack::{
    Portable, PortableKey, PortableSctp, PortableSide, PortableState, PortableTcp, Tally, Traffic, Way,
};
use ferry_dataplane::packet::IpProto;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a connection's record without extensions.
pub const CONNECTION_BYTES: usize = 120;
/// Bytes of a tombstone without extensions.
pub const TOMBSTONE_BYTES: usize = 56;
/// Most bytes of a record, extensions included.
pub const MAX_RECORD_BYTES: usize = 256;
/// Lengths are counted in this many bytes.
pub const UNIT_BYTES: usize = 8;

/// Kind of a connection's record.
pub const KIND_CONNECTION: u8 = 1;
/// Kind of a tombstone.
pub const KIND_TOMBSTONE: u8 = 2;
/// Kinds with this bit may be passed over by who does not know them.
pub const KIND_OPTIONAL: u8 = 0x80;
/// Extensions with this bit must not be passed over.
pub const EXTENSION_MANDATORY: u16 = 0x8000;

const IPV6: u8 = 0x01;
/// For tombstones: the other side asked (ICMP).
const OPENED_BY_REMOTE: u8 = 0x02;
const SEEN_REPLY: u8 = 0x04;
const ASSURED: u8 = 0x08;

/// What is wrong with a record, a batch or its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Ends too early.
    #[error("{have} bytes where {need} are needed")]
    Truncated {
        /// Bytes needed at least.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// Does not begin as a batch does.
    #[error("not a batch of records")]
    Magic,
    /// Another major version of the format: the peer must be configured or upgraded to speak this one.
    #[error("record format {major}.{minor}, this host reads {}.x", crate::encoding::MAJOR)]
    Version {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// Header length that no header has.
    #[error("header of {0} bytes")]
    HeaderLength(u16),
    /// Header flags that must be understood and are not.
    #[error("unknown batch flags {0:#x}")]
    BatchFlags(u16),
    /// Compression that this host does not know.
    #[error("unknown compression {0}")]
    Codec(u8),
    /// More records than allowed, or than there is room for.
    #[error("{0} records in a batch")]
    Records(u32),
    /// More bytes than allowed, or lengths that contradict each other.
    #[error("payload of {payload} bytes for {raw} bytes of records")]
    PayloadLength {
        /// Bytes as transported.
        payload: u32,
        /// Bytes of records.
        raw: u32,
    },
    /// The header was changed on the way.
    #[error("header checksum wrong")]
    HeaderChecksum,
    /// The records were changed on the way.
    #[error("payload checksum wrong")]
    PayloadChecksum,
    /// Bytes behind the end of a batch.
    #[error("{0} bytes behind the end of the batch")]
    Surplus(usize),
    /// Cannot be decompressed to the length that the header says.
    #[error("payload cannot be decompressed")]
    Decompress,
    /// A record of a length that its kind does not have.
    #[error("record of kind {kind:#x} with {bytes} bytes")]
    Length {
        /// The record's kind.
        kind: u8,
        /// Its length.
        bytes: usize,
    },
    /// A kind of record that must be understood and is not: the peer has a feature that this host lacks.
    #[error("unknown mandatory record kind {0:#x}")]
    Kind(u8),
    /// An extension that must be understood and is not: the peer has a feature that this host lacks.
    #[error("unknown mandatory extension {0:#x}")]
    Extension(u16),
    /// An extension reaches beyond its record or header.
    #[error("extension {kind:#x} of {bytes} bytes reaches too far")]
    ExtensionLength {
        /// The extension's type.
        kind: u16,
        /// Bytes of its data.
        bytes: u16,
    },
    /// Flags that a record of this kind does not have.
    #[error("unknown record flags {0:#x}")]
    Flags(u8),
    /// A field that must be zero is not.
    #[error("reserved field is not zero")]
    Reserved,
    /// An IPv4 address without its prefix.
    #[error("not an IPv4-mapped address")]
    Address,
    /// A counter that counting cannot lead to.
    #[error("impossible counter {0:#x}")]
    Counter(u32),
    /// The header announced another number of records.
    #[error("{found} records where {announced} were announced")]
    Count {
        /// As the header says.
        announced: u32,
        /// As they were, or one more than announced.
        found: u32,
    },
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A connection as it is.
    Connection(Portable),
    /// A connection that went.
    Tombstone(PortableTombstone),
}

/// A connection that went: a holder of this version or an older one deletes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortableTombstone {
    /// Identity.
    pub key: PortableKey,
    /// Its last version; 30 bits.
    pub version: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    kind: u8,
    units: u8,
    flags: u8,
    proto: u8,
    zone: U16,
    state: u8,
    retrans: u8,
    version: U32,
    remaining_ms: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireKey {
    local: [u8; 16],
    remote: [u8; 16],
    local_port: U16,
    remote_port: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireSide {
    end: U32,
    max_end: U32,
    max_window: U32,
    max_ack: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireTcp {
    sides: [WireSide; 2],
    last_end: U32,
    last_ack: U32,
    last_window: U16,
    last_len: U16,
    flags: [u8; 2],
    scales: [u8; 2],
    last_kind: u8,
    last_scale: u8,
    last_flags: u8,
    zero: u8,
}

/// In `WireTcp::last_kind`.
const LAST_REPLY: u8 = 0x08;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireUdp {
    age_ms: U16,
    zero: [u8; 50],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireSctp {
    tags: [U32; 2],
    bits: u8,
    zero: [u8; 43],
}

// In `WireSctp::bits`.
const INIT_FROM_OPENER: u8 = 1;
const INIT_TO_OPENER: u8 = 2;
const HEARTBEAT_FAILED: u8 = 4;
const HEARTBEAT_REPLY: u8 = 8;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireConnection {
    head: Head,
    key: WireKey,
    traffic: [U32; 4],
    protocol: [u8; 52],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireTombstone {
    head: Head,
    key: WireKey,
    zero: [u8; 4],
}

/// Head of an extension; its data follow, padded with zeros to a multiple of [`UNIT_BYTES`] together with this.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtensionHead {
    kind: U16,
    bytes: U16,
}

const _: () = assert!(size_of::<WireConnection>() == CONNECTION_BYTES && size_of::<WireTombstone>() == TOMBSTONE_BYTES);
const _: () = assert!(CONNECTION_BYTES.is_multiple_of(UNIT_BYTES) && TOMBSTONE_BYTES.is_multiple_of(UNIT_BYTES));
const _: () = assert!(size_of::<WireTcp>() == 52 && size_of::<WireUdp>() == 52 && size_of::<WireSctp>() == 52);

// ---- writing

#[inline]
fn octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

#[inline]
fn wire_key(key: &PortableKey) -> WireKey {
    WireKey {
        local: octets(key.local),
        remote: octets(key.remote),
        local_port: key.local_port.into(),
        remote_port: key.remote_port.into(),
    }
}

#[inline]
fn wire_side(side: &PortableSide) -> WireSide {
    WireSide {
        end: side.end.into(),
        max_end: side.max_end.into(),
        max_window: side.max_window.into(),
        max_ack: side.max_ack.into(),
    }
}

#[inline]
fn wire_tcp(tcp: &PortableTcp) -> WireTcp {
    let [opener, other] = &tcp.sides;
    WireTcp {
        sides: [wire_side(opener), wire_side(other)],
        last_end: tcp.last_end.into(),
        last_ack: tcp.last_ack.into(),
        last_window: tcp.last_window.into(),
        last_len: tcp.last_len.into(),
        flags: [opener.flags, other.flags],
        scales: [opener.scale, other.scale],
        last_kind: tcp.last_kind | if tcp.last_reply { LAST_REPLY } else { 0 },
        last_scale: tcp.last_scale,
        last_flags: tcp.last_flags,
        zero: 0,
    }
}

#[inline]
fn wire_sctp(sctp: &PortableSctp) -> WireSctp {
    let [from, to] = sctp.init;
    let mut bits = if from { INIT_FROM_OPENER } else { 0 } | if to { INIT_TO_OPENER } else { 0 };
    match sctp.heartbeat_failed {
        None => {}
        Some(Way::Original) => bits |= HEARTBEAT_FAILED,
        Some(Way::Reply) => bits |= HEARTBEAT_FAILED | HEARTBEAT_REPLY,
    }
    let [a, b] = sctp.tags;
    WireSctp { tags: [a.into(), b.into()], bits, zero: [0; 43] }
}

#[inline]
fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// A connection's record.
///
/// The connection is written as it is: what a reader would refuse ([`Portable::to_connection`]) is not looked at here.
#[inline]
pub fn encode_connection(p: &Portable) -> [u8; CONNECTION_BYTES] {
    let mut retrans = 0;
    let protocol: [u8; 52] = match &p.protocol {
        PortableState::Tcp(tcp) => {
            retrans = tcp.retrans;
            zerocopy::transmute!(wire_tcp(tcp))
        }
        PortableState::Udp { age_ms } => zerocopy::transmute!(WireUdp { age_ms: (*age_ms).into(), zero: [0; 50] }),
        PortableState::Sctp(sctp) => zerocopy::transmute!(wire_sctp(sctp)),
        PortableState::Plain => [0; 52],
    };
    let [original, reply] = p.traffic;
    zerocopy::transmute!(WireConnection {
        head: Head {
            kind: KIND_CONNECTION,
            units: (CONNECTION_BYTES / UNIT_BYTES) as u8,
            flags: flag(p.key.local.is_ipv6(), IPV6)
                | flag(p.opened_by_remote, OPENED_BY_REMOTE)
                | flag(p.seen_reply, SEEN_REPLY)
                | flag(p.assured, ASSURED),
            proto: p.key.proto.0,
            zone: p.key.zone.into(),
            state: p.state,
            retrans,
            version: p.version.into(),
            remaining_ms: p.remaining_ms.into(),
        },
        key: wire_key(&p.key),
        traffic: [
            original.packets.raw().into(),
            original.bytes.raw().into(),
            reply.packets.raw().into(),
            reply.bytes.raw().into(),
        ],
        protocol,
    })
}

/// A tombstone's record.
#[inline]
pub fn encode_tombstone(tombstone: &PortableTombstone) -> [u8; TOMBSTONE_BYTES] {
    let key = &tombstone.key;
    zerocopy::transmute!(WireTombstone {
        head: Head {
            kind: KIND_TOMBSTONE,
            units: (TOMBSTONE_BYTES / UNIT_BYTES) as u8,
            flags: flag(key.local.is_ipv6(), IPV6) | flag(key.asked_by_remote, OPENED_BY_REMOTE),
            proto: key.proto.0,
            zone: key.zone.into(),
            state: 0,
            retrans: 0,
            version: tombstone.version.into(),
            remaining_ms: 0.into(),
        },
        key: wire_key(key),
        zero: [0; 4],
    })
}

// ---- reading

#[inline]
fn address(octets: [u8; 16], ipv6: bool) -> Result<IpAddr, RecordError> {
    if ipv6 {
        return Ok(IpAddr::V6(Ipv6Addr::from(octets)));
    }
    match octets {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Ok(IpAddr::V4(Ipv4Addr::new(a, b, c, d))),
        _ => Err(RecordError::Address),
    }
}

#[inline]
fn is_icmp(proto: u8) -> bool {
    matches!(IpProto(proto), IpProto::ICMP | IpProto::ICMPV6)
}

#[inline]
fn read_key(head: &Head, key: &WireKey) -> Result<PortableKey, RecordError> {
    let ipv6 = head.flags & IPV6 != 0;
    Ok(PortableKey {
        local: address(key.local, ipv6)?,
        remote: address(key.remote, ipv6)?,
        local_port: key.local_port.get(),
        remote_port: key.remote_port.get(),
        zone: head.zone.get(),
        proto: IpProto(head.proto),
        asked_by_remote: head.flags & OPENED_BY_REMOTE != 0 && is_icmp(head.proto),
    })
}

#[inline]
fn read_tally(raw: U32) -> Result<Tally, RecordError> {
    Tally::from_raw(raw.get()).ok_or(RecordError::Counter(raw.get()))
}

#[inline]
fn zero(bytes: &[u8]) -> Result<(), RecordError> {
    if bytes.iter().fold(0, |all, b| all | b) == 0 { Ok(()) } else { Err(RecordError::Reserved) }
}

#[inline]
fn read_side(side: &WireSide, flags: u8, scale: u8) -> PortableSide {
    PortableSide {
        end: side.end.get(),
        max_end: side.max_end.get(),
        max_window: side.max_window.get(),
        max_ack: side.max_ack.get(),
        scale,
        flags,
    }
}

#[inline]
fn read_protocol(head: &Head, bytes: [u8; 52]) -> Result<PortableState, RecordError> {
    let proto = IpProto(head.proto);
    if proto != IpProto::TCP && head.retrans != 0 {
        return Err(RecordError::Reserved);
    }
    Ok(match proto {
        IpProto::TCP => {
            let tcp: WireTcp = zerocopy::transmute!(bytes);
            zero(&[tcp.zero])?;
            let [opener, other] = &tcp.sides;
            let ([f0, f1], [s0, s1]) = (tcp.flags, tcp.scales);
            PortableState::Tcp(PortableTcp {
                sides: [read_side(opener, f0, s0), read_side(other, f1, s1)],
                last_kind: tcp.last_kind & !LAST_REPLY,
                last_reply: tcp.last_kind & LAST_REPLY != 0,
                last_end: tcp.last_end.get(),
                last_len: tcp.last_len.get(),
                last_ack: tcp.last_ack.get(),
                last_window: tcp.last_window.get(),
                last_scale: tcp.last_scale,
                last_flags: tcp.last_flags,
                retrans: head.retrans,
            })
        }
        IpProto::UDP => {
            let udp: WireUdp = zerocopy::transmute!(bytes);
            zero(&udp.zero)?;
            PortableState::Udp { age_ms: udp.age_ms.get() }
        }
        IpProto::SCTP => {
            let sctp: WireSctp = zerocopy::transmute!(bytes);
            zero(&sctp.zero)?;
            let heartbeat_failed = match sctp.bits & !(INIT_FROM_OPENER | INIT_TO_OPENER) {
                0 => None,
                HEARTBEAT_FAILED => Some(Way::Original),
                bits if bits == HEARTBEAT_FAILED | HEARTBEAT_REPLY => Some(Way::Reply),
                _ => return Err(RecordError::Reserved),
            };
            let [a, b] = sctp.tags;
            PortableState::Sctp(PortableSctp {
                tags: [a.get(), b.get()],
                init: [sctp.bits & INIT_FROM_OPENER != 0, sctp.bits & INIT_TO_OPENER != 0],
                heartbeat_failed,
            })
        }
        _ => {
            zero(&bytes)?;
            PortableState::Plain
        }
    })
}

#[inline]
fn read_connection(wire: &WireConnection) -> Result<Portable, RecordError> {
    let head = &wire.head;
    let unknown = head.flags & !(IPV6 | OPENED_BY_REMOTE | SEEN_REPLY | ASSURED);
    if unknown != 0 {
        return Err(RecordError::Flags(unknown));
    }
    let [original_packets, original_bytes, reply_packets, reply_bytes] = wire.traffic;
    Ok(Portable {
        key: read_key(head, &wire.key)?,
        opened_by_remote: head.flags & OPENED_BY_REMOTE != 0,
        seen_reply: head.flags & SEEN_REPLY != 0,
        assured: head.flags & ASSURED != 0,
        state: head.state,
        protocol: read_protocol(head, wire.protocol)?,
        traffic: [
            Traffic { packets: read_tally(original_packets)?, bytes: read_tally(original_bytes)? },
            Traffic { packets: read_tally(reply_packets)?, bytes: read_tally(reply_bytes)? },
        ],
        remaining_ms: head.remaining_ms.get(),
        version: head.version.get(),
    })
}

fn read_tombstone(wire: &WireTombstone) -> Result<PortableTombstone, RecordError> {
    let head = &wire.head;
    // Who asked is part of an ICMP key and of no other.
    let known = if is_icmp(head.proto) { IPV6 | OPENED_BY_REMOTE } else { IPV6 };
    if head.flags & !known != 0 {
        return Err(RecordError::Flags(head.flags & !known));
    }
    if (head.state, head.retrans, head.remaining_ms.get()) != (0, 0, 0) {
        return Err(RecordError::Reserved);
    }
    zero(&wire.zero)?;
    Ok(PortableTombstone { key: read_key(head, &wire.key)?, version: head.version.get() })
}

/// Goes through an area of extensions: none is known, so optional ones are passed over.
///
/// # Errors
/// [`RecordError::Extension`] for a mandatory one, [`RecordError::ExtensionLength`], [`RecordError::Reserved`] for padding that is not
/// zero.
pub(crate) fn skip_extensions(mut area: &[u8]) -> Result<(), RecordError> {
    while !area.is_empty() {
        let (head, rest) = ExtensionHead::ref_from_prefix(area)
            .map_err(|_| RecordError::Truncated { need: size_of::<ExtensionHead>(), have: area.len() })?;
        let (kind, bytes) = (head.kind.get(), head.bytes.get());
        let data = usize::from(bytes);
        let padded = (size_of::<ExtensionHead>() + data).next_multiple_of(UNIT_BYTES) - size_of::<ExtensionHead>();
        let (content, rest) = rest.split_at_checked(padded).ok_or(RecordError::ExtensionLength { kind, bytes })?;
        if kind & EXTENSION_MANDATORY != 0 {
            return Err(RecordError::Extension(kind));
        }
        zero(content.split_at_checked(data).map_or(&[], |(_, padding)| padding))?;
        area = rest;
    }
    Ok(())
}

/// Splits the fixed part off a record.
#[inline]
fn fixed<T: FromBytes + KnownLayout + Immutable + Unaligned>(record: &[u8], kind: u8) -> Result<&T, RecordError> {
    let (fixed, extensions) =
        T::ref_from_prefix(record).map_err(|_| RecordError::Length { kind, bytes: record.len() })?;
    if !extensions.is_empty() {
        skip_extensions(extensions)?;
    }
    Ok(fixed)
}

/// The first record in `bytes` (`None`: an optional one of unknown kind), and what follows it. Empty `bytes` are an error.
///
/// What it says has the right form and need not make sense: [`Portable::to_connection`] and [`PortableKey::to_key`] find out.
///
/// # Errors
/// [`RecordError`].
#[inline]
pub fn decode(bytes: &[u8]) -> Result<(Option<Record>, &[u8]), RecordError> {
    let &[kind, units, ..] = bytes else { return Err(RecordError::Truncated { need: 2, have: bytes.len() }) };
    let length = usize::from(units) * UNIT_BYTES;
    if length == 0 || length > MAX_RECORD_BYTES {
        return Err(RecordError::Length { kind, bytes: length });
    }
    let (record, rest) =
        bytes.split_at_checked(length).ok_or(RecordError::Truncated { need: length, have: bytes.len() })?;
    let record = match kind {
        KIND_CONNECTION => Some(Record::Connection(read_connection(fixed(record, kind)?)?)),
        KIND_TOMBSTONE => Some(Record::Tombstone(read_tombstone(fixed(record, kind)?)?)),
        _ if kind & KIND_OPTIONAL != 0 => None,
        _ => return Err(RecordError::Kind(kind)),
    };
    Ok((record, rest))
}
