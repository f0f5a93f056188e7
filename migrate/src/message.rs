//! Control messages: what the two hosts say to each other about one migration, and how they agree on a version.
//!
//! Encoded by bincode (little-endian, integers at full width), which no other module knows of. Everything that a decoder allocates is
//! bounded by [`MAX_MESSAGE_BYTES`] before it is allocated, and every string and list by its own type ([`Text`], [`List`]) afterwards.
//!
//! # Compatibility
//! - [`Hello`] and [`HelloReply`] keep their layout for ever, and so does [`Refuse`]: they come before anything is agreed on.
//! - A message's layout never changes within a protocol version. A change of layout, or of what a message means, is a new version.
//! - Messages are only added, at the end of [`Message`]. A message is sent only if it is in the agreed version or its capability
//!   was agreed on. So a message that a host does not know is an error of the other's, and ends the migration.
//! - The agreed version is the highest that both speak. Each side speaks a range without gaps. Ranges that do not meet: refused.
//! - Capabilities are bits. Agreed are those that both offer. A side may require some of those that it offers: not agreed on, refused.
//!   Unknown bits are ignored unless required.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use std::fmt;
use std::net::IpAddr;

use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::error::DecodeError;
use bincode::{Decode as DeriveDecode, Encode};

/// Longest message, bytes.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;
/// Begins every greeting: "FERRYMIG".
pub const MAGIC: u64 = u64::from_le_bytes(*b"FERRYMIG");
/// The protocol versions that this program speaks, lowest and highest.
pub const VERSIONS: (u16, u16) = (1, 1);
/// Most network interfaces of a VM.
pub const MAX_NICS: usize = 16;
/// Most addresses told of a network interface.
pub const MAX_ADDRESSES: usize = 64;

/// What hosts may be able to do; bits of [`Hello::offered`].
pub mod capability {
    /// Batches may be compressed.
    pub const COMPRESSION: u64 = 1;
    /// Frames that reach the source after the commit are redirected.
    pub const LATE_FRAMES: u64 = 1 << 1;
    /// A stopped VM that runs on at the source takes the destination back to staging, instead of ending the migration.
    pub const RESUME: u64 = 1 << 2;
    /// What this program can do.
    pub const ALL: u64 = COMPRESSION | LATE_FRAMES | RESUME;
}

/// Why a message cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than allowed.
    #[error("message of {0} bytes is longer than {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    /// Of a kind that this version does not have.
    #[error("message of unknown kind {0}")]
    Unknown(u32),
    /// Cut short, or its contents out of bounds.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// Bytes after the end.
    #[error("{0} bytes after the message's end")]
    Trailing(usize),
}

/// A string of at most `MAX` bytes without control characters.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Encode)]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// `None` when too long or with control characters (which would end up in logs and terminals).
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        (text.len() <= MAX && !text.chars().any(char::is_control)).then_some(Self(text))
    }

    /// As much of the text as goes in; control characters become spaces. For messages to people.
    pub fn lossy(text: &str) -> Self {
        let mut out = String::new();
        for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
            if out.len() + c.len_utf8() > MAX {
                break;
            }
            out.push(c);
        }
        Self(out)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const MAX: usize, C> Decode<C> for Text<MAX> {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let text = String::decode(decoder)?;
        Self::new(text).ok_or(DecodeError::Other("text too long, or with control characters"))
    }
}

impl<'de, const MAX: usize, C> BorrowDecode<'de, C> for Text<MAX> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}

/// At most `MAX` of something.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> List<T, MAX> {
    /// `None` when there are too many.
    pub fn new(items: Vec<T>) -> Option<Self> {
        (items.len() <= MAX).then_some(Self(items))
    }
}

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const MAX: usize> std::ops::Deref for List<T, MAX> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Decode<C>, const MAX: usize, C> Decode<C> for List<T, MAX> {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let len = u64::decode(decoder)?;
        if len > MAX as u64 {
            return Err(DecodeError::Other("list too long"));
        }
        // `len` is small. Elements are decoded one by one, each within the message's limit.
        (0..len).map(|_| T::decode(decoder)).collect::<Result<_, _>>().map(Self)
    }
}

impl<'de, T: Decode<C>, const MAX: usize, C> BorrowDecode<'de, C> for List<T, MAX> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}

/// A host's or VM's name.
pub type Name = Text<255>;
/// A sentence for people.
pub type Note = Text<512>;

/// First message, from the source.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u64,
    /// Lowest protocol version spoken.
    pub lowest: u16,
    /// Highest.
    pub highest: u16,
    /// [`capability`] bits that the sender has.
    pub offered: u64,
    /// Those of them without which it will not go on.
    pub required: u64,
    /// The sender's name for itself. For people: identity is the certificate's.
    pub host: Name,
}

/// Answer to [`Hello`]: what was agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct HelloReply {
    /// [`MAGIC`].
    pub magic: u64,
    /// Version of all that follows.
    pub version: u16,
    /// Capabilities of all that follows.
    pub capabilities: u64,
    /// The sender's name for itself.
    pub host: Name,
}

/// What a host brings to a negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Lowest and highest protocol version.
    pub versions: (u16, u16),
    /// [`capability`] bits.
    pub offered: u64,
    /// Those that it insists on.
    pub required: u64,
}

impl Default for Abilities {
    fn default() -> Self {
        Self { versions: VERSIONS, offered: capability::ALL, required: 0 }
    }
}

/// What two hosts agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Protocol version.
    pub version: u16,
    /// [`capability`] bits.
    pub capabilities: u64,
}

/// Why two hosts cannot talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Not this protocol.
    #[error("the other side does not speak this protocol")]
    Magic,
    /// No version in common.
    #[error("no protocol version in common: {ours:?} here, {theirs:?} there")]
    Version {
        /// Ours, lowest and highest.
        ours: (u16, u16),
        /// Theirs.
        theirs: (u16, u16),
    },
    /// The other lacks what is required here.
    #[error("the other host lacks capabilities {0:#x} that are required here")]
    Lacking(u64),
    /// The other requires what is not to be had here.
    #[error("the other host requires capabilities {0:#x} that are not available here")]
    Required(u64),
}

impl Abilities {
    /// The greeting of a host with these.
    pub fn hello(&self, host: Name) -> Hello {
        let (lowest, highest) = self.versions;
        Hello { magic: MAGIC, lowest, highest, offered: self.offered, required: self.required & self.offered, host }
    }

    /// What to agree on with the sender of `hello`; the rules are this module's.
    ///
    /// # Errors
    /// See [`Mismatch`].
    pub fn negotiate(&self, hello: &Hello) -> Result<Agreed, Mismatch> {
        if hello.magic != MAGIC {
            return Err(Mismatch::Magic);
        }
        let (lowest, highest) = self.versions;
        let version = highest.min(hello.highest);
        if version < lowest.max(hello.lowest) || hello.lowest > hello.highest {
            return Err(Mismatch::Version { ours: self.versions, theirs: (hello.lowest, hello.highest) });
        }
        let capabilities = self.offered & hello.offered;
        match (self.required & !capabilities, hello.required & !capabilities) {
            (0, 0) => Ok(Agreed { version, capabilities }),
            (0, theirs) => Err(Mismatch::Required(theirs)),
            (ours, _) => Err(Mismatch::Lacking(ours)),
        }
    }

    /// Checks the answer to our own greeting: what was agreed on must be within what was offered.
    ///
    /// # Errors
    /// See [`Mismatch`].
    pub fn check_reply(&self, reply: &HelloReply) -> Result<Agreed, Mismatch> {
        let (lowest, highest) = self.versions;
        if reply.magic != MAGIC {
            return Err(Mismatch::Magic);
        }
        if !(lowest..=highest).contains(&reply.version) {
            return Err(Mismatch::Version { ours: self.versions, theirs: (reply.version, reply.version) });
        }
        if reply.capabilities & !self.offered != 0 {
            return Err(Mismatch::Required(reply.capabilities & !self.offered));
        }
        if self.required & !reply.capabilities != 0 {
            return Err(Mismatch::Lacking(self.required & !reply.capabilities));
        }
        Ok(Agreed { version: reply.version, capabilities: reply.capabilities })
    }
}

/// What becomes of a VM whose connections did not all arrive in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, DeriveDecode)]
pub enum WhenLate {
    /// It goes with what has arrived; connections that did not are picked up mid-stream as far as policy lets them.
    #[default]
    FailOpen,
    /// It begins without any connection.
    FailClosed,
}

/// One network interface of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Nic {
    /// Name of the switch's port.
    pub port: Name,
    /// MAC address.
    pub mac: [u8; 6],
    /// Number of the port within the VM: part of its connections' zones.
    pub index: u8,
    /// MTU, bytes; 0 unknown.
    pub mtu: u16,
    /// Addresses that the VM may use there.
    pub addresses: List<IpAddr, MAX_ADDRESSES>,
}

/// A VM is to come.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Offer {
    /// Its name.
    pub vm: Name,
    /// Its network interfaces.
    pub nics: List<Nic, MAX_NICS>,
    /// Connections its table holds at most.
    pub capacity: u32,
    /// Connections it has now.
    pub entries: u32,
    /// What the source's configuration says; the destination's may be stricter.
    pub when_late: WhenLate,
}

/// Why a migration is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, DeriveDecode)]
pub enum RefuseCode {
    /// No version or capability in common.
    Version,
    /// The other host may not do this with this VM.
    Unauthorized,
    /// No such VM is expected.
    UnknownVm,
    /// The VM runs at the destination.
    Running,
    /// Another host's migration of the VM is under way.
    Busy,
    /// Ports, MAC addresses or MTU differ.
    Mismatch,
    /// Not enough room.
    Capacity,
    /// Anything else; the note says what.
    Other,
}

/// A migration is refused.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Refuse {
    /// Why.
    pub code: RefuseCode,
    /// Why, for people, with what to do about it.
    pub note: Note,
}

/// Why a migration is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, DeriveDecode)]
pub enum AbortReason {
    /// QEMU's migration was cancelled or failed.
    Cancelled,
    /// The VM went away.
    VmGone,
    /// What arrived is not what was sent.
    Digest,
    /// The other did what the protocol does not allow.
    Protocol,
    /// The other was silent, or too slow.
    Timeout,
    /// The VM runs at the destination already.
    Running,
    /// The switch shuts down, or an operator said so.
    Operator,
}

/// Most findings of a check.
pub const MAX_FINDINGS: usize = 24;

/// What a migration would meet at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Finding {
    /// The migration would be refused with this; none: it would go on.
    pub refusal: Option<RefuseCode>,
    /// What was looked at.
    pub what: Text<64>,
    /// What was found.
    pub found: Note,
    /// What to do about it; empty: nothing.
    pub fix: Note,
}

/// All that was sent up to a point of the bulk stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Mark {
    /// The round that ends here.
    pub round: u32,
    /// Batches sent since the migration began.
    pub batches: u64,
    /// Items in them.
    pub items: u64,
    /// [`crate::batch::Digest`] over them.
    pub digest: u128,
}

/// What the destination has, after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub struct Ack {
    /// The round.
    pub round: u32,
    /// The digest that the destination found, equal to [`Mark::digest`].
    pub digest: u128,
    /// Connections staged.
    pub entries: u32,
    /// Connections refused since the beginning: not the VM's addresses.
    pub refused: u64,
    /// Connections that found no room.
    pub dropped: u64,
}

/// How a VM began at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, DeriveDecode)]
pub enum Began {
    /// With everything.
    Complete,
    /// With all connections; windows and counters of some are not the last ones.
    Lagging,
    /// With what the last complete round and whatever came after it brought.
    Partial,
    /// With no connection.
    Empty,
    /// With everything that the source had at an earlier stop; whether the VM ran on there afterwards cannot be told, because the source
    /// has not been heard since.
    Unconfirmed,
}

/// What is said on the control connection. The order of the variants is part of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Encode, DeriveDecode)]
pub enum Message {
    /// From the source, first.
    Hello(Hello),
    /// From the destination: goes on.
    HelloReply(HelloReply),
    /// From the destination: goes no further, in answer to [`Self::Hello`] or [`Self::Offer`].
    Refuse(Refuse),
    /// From the source.
    Offer(Offer),
    /// From the destination: batches may come.
    Accept {
        /// Connections that the table there holds.
        capacity: u32,
    },
    /// From the source: batches of this round follow.
    RoundBegin {
        /// Its number, one more than the last one's.
        round: u32,
    },
    /// From the source: the round's batches have been sent.
    RoundEnd(Mark),
    /// From the destination: they have arrived.
    RoundAck(Ack),
    /// From the source: the VM has stopped. Ends the round under way, if any.
    FinalBegin {
        /// The final round's number.
        round: u32,
    },
    /// From the source: all has been sent.
    FinalEnd {
        /// All of it.
        mark: Mark,
        /// Connections whose windows and counters were left as they had been sent before, for want of time.
        lagging: u32,
    },
    /// From the destination: everything is there. The point of commitment.
    FinalAck(Ack),
    /// From the source: the VM runs on there, and migrates still. Committed becomes staging again.
    Resume,
    /// From either: the migration is given up. What was staged is dropped.
    Abort {
        /// Why.
        reason: AbortReason,
        /// Why, for people.
        note: Note,
    },
    /// From the destination: the VM runs there.
    Activated {
        /// With what.
        began: Began,
    },
    /// From either: to be answered.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// In answer.
    Pong {
        /// The question's.
        nonce: u64,
    },
    /// From the source: nothing more follows.
    Bye,
    /// From the destination, in answer to [`Self::Offer`] on a connection that was opened for a check: nothing is staged.
    Findings {
        /// Everything that was looked at.
        findings: List<Finding, MAX_FINDINGS>,
        /// Connections that the VM's table there holds; 0: unknown VM.
        capacity: u32,
    },
}

impl Message {
    /// What it is called, for logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::HelloReply(_) => "hello_reply",
            Self::Refuse(_) => "refuse",
            Self::Offer(_) => "offer",
            Self::Accept { .. } => "accept",
            Self::RoundBegin { .. } => "round_begin",
            Self::RoundEnd(_) => "round_end",
            Self::RoundAck(_) => "round_ack",
            Self::FinalBegin { .. } => "final_begin",
            Self::FinalEnd { .. } => "final_end",
            Self::FinalAck(_) => "final_ack",
            Self::Resume => "resume",
            Self::Abort { .. } => "abort",
            Self::Activated { .. } => "activated",
            Self::Ping { .. } => "ping",
            Self::Pong { .. } => "pong",
            Self::Bye => "bye",
            Self::Findings { .. } => "findings",
        }
    }
}

const fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<MAX_MESSAGE_BYTES>()
}

/// The message's bytes.
///
/// # Errors
/// [`MessageError::TooLong`]: an [`Offer`] with too many addresses; no other message can be.
pub fn encode(message: &Message) -> Result<Vec<u8>, MessageError> {
    let bytes =
        bincode::encode_to_vec(message, config()).map_err(|error| MessageError::Malformed(error.to_string()))?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// The message in `bytes`, which must hold it and nothing else.
///
/// # Errors
/// See [`MessageError`].
pub fn decode(bytes: &[u8]) -> Result<Message, MessageError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::TooLong(bytes.len()));
    }
    match bincode::decode_from_slice(bytes, config()) {
        Ok((message, used)) if used == bytes.len() => Ok(message),
        Ok((_, used)) => Err(MessageError::Trailing(bytes.len().saturating_sub(used))),
        Err(DecodeError::UnexpectedVariant { type_name, found, .. }) if type_name.ends_with("Message") => {
            Err(MessageError::Unknown(found))
        }
        Err(error) => Err(MessageError::Malformed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Message {
        let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let nic = Nic {
            port: Name::new("tap-1").unwrap(),
            mac: [2, 0, 0, 0, 0, 1],
            index: 0,
            mtu: 1500,
            addresses: List::new(addresses).unwrap(),
        };
        Message::Offer(Offer {
            vm: Name::new("web-1").unwrap(),
            nics: List::new(vec![nic]).unwrap(),
            capacity: 1_000_000,
            entries: 10_000,
            when_late: WhenLate::FailClosed,
        })
    }

    fn all() -> Vec<Message> {
        let mark = Mark { round: 3, batches: 9, items: 1000, digest: u128::MAX / 3 };
        let ack = Ack { round: 3, digest: 1 << 100, entries: 77, refused: 1, dropped: 2 };
        let finding = Finding {
            refusal: Some(RefuseCode::Capacity),
            what: Text::lossy("table"),
            found: Note::lossy("too small"),
            fix: Note::default(),
        };
        vec![
            Message::Hello(Abilities::default().hello(Name::new("host-a").unwrap())),
            Message::HelloReply(HelloReply { magic: MAGIC, version: 1, capabilities: 3, host: Name::default() }),
            Message::Refuse(Refuse { code: RefuseCode::Busy, note: Note::lossy("busy\nwith ä") }),
            offer(),
            Message::Accept { capacity: 5 },
            Message::RoundBegin { round: 1 },
            Message::RoundEnd(mark),
            Message::RoundAck(ack),
            Message::FinalBegin { round: 2 },
            Message::FinalEnd { mark, lagging: 4 },
            Message::FinalAck(ack),
            Message::Resume,
            Message::Abort { reason: AbortReason::Operator, note: Note::default() },
            Message::Activated { began: Began::Partial },
            Message::Ping { nonce: 1 },
            Message::Pong { nonce: u64::MAX },
            Message::Bye,
            Message::Findings { findings: List::new(vec![finding]).unwrap(), capacity: 9 },
        ]
    }

    #[test]
    fn messages_come_back_and_every_cut_and_addition_is_noticed() {
        for (number, message) in all().into_iter().enumerate() {
            let bytes = encode(&message).unwrap();
            assert_eq!(
                bytes[..4],
                (number as u32).to_le_bytes(),
                "{}: its number is part of the protocol",
                message.name()
            );
            assert_eq!(decode(&bytes), Ok(message));
            for cut in 0..bytes.len() {
                assert!(matches!(decode(&bytes[..cut]), Err(MessageError::Malformed(_))));
            }
            let mut longer = bytes.clone();
            longer.push(0);
            assert_eq!(decode(&longer), Err(MessageError::Trailing(1)));
        }
        let unknown = (all().len() as u32).to_le_bytes();
        assert_eq!(decode(&unknown), Err(MessageError::Unknown(all().len() as u32)));
    }

    /// The greeting's bytes: they must stay the same for ever.
    #[test]
    fn the_greeting_never_changes() {
        let hello =
            Hello { magic: MAGIC, lowest: 1, highest: 0x0203, offered: 7, required: 4, host: Name::new("ab").unwrap() };
        let mut expected = vec![0, 0, 0, 0];
        expected.extend(b"FERRYMIG");
        expected.extend([1, 0, 3, 2]);
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b']);
        assert_eq!(encode(&Message::Hello(hello)).unwrap(), expected);
        let refuse = Refuse { code: RefuseCode::Version, note: Note::default() };
        assert_eq!(encode(&Message::Refuse(refuse)).unwrap(), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_before_it_is_believed() {
        let bytes = encode(&offer()).unwrap();
        // The name's length.
        let mut huge = bytes.clone();
        huge[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(decode(&huge), Err(MessageError::Malformed(_))));
        // The number of interfaces: after the kind, the length and the name.
        let mut many = bytes.clone();
        many[17..25].copy_from_slice(&(MAX_NICS as u64 + 1).to_le_bytes());
        assert!(matches!(decode(&many), Err(MessageError::Malformed(_))));
        // A control character in a name.
        let mut control = bytes;
        control[12] = 0x1b;
        assert!(matches!(decode(&control), Err(MessageError::Malformed(_))));
        assert_eq!(decode(&vec![0; MAX_MESSAGE_BYTES + 1]), Err(MessageError::TooLong(MAX_MESSAGE_BYTES + 1)));
        assert!(Text::<3>::new("abcd").is_none() && Text::<3>::new("a\n").is_none());
        assert_eq!(Text::<3>::lossy("a\nää").as_str(), "a ");
        assert!(List::<u8, 2>::new(vec![0; 3]).is_none());
    }

    #[test]
    fn versions_and_capabilities_are_negotiated() {
        let us = Abilities { versions: (2, 4), offered: 0b111, required: 0b001 };
        let them = |versions, offered, required| Abilities { versions, offered, required }.hello(Name::default());
        let agreed = |version, capabilities| Ok(Agreed { version, capabilities });
        assert_eq!(us.negotiate(&them((1, 3), 0b1011, 0b0010)), agreed(3, 0b011));
        assert_eq!(us.negotiate(&them((4, 9), 0b001, 0)), agreed(4, 1));
        let version = |theirs| Err(Mismatch::Version { ours: (2, 4), theirs });
        assert_eq!(us.negotiate(&them((5, 6), 1, 0)), version((5, 6)));
        assert_eq!(us.negotiate(&them((0, 1), 1, 0)), version((0, 1)));
        assert_eq!(us.negotiate(&them((4, 3), 1, 0)), version((4, 3)));
        assert_eq!(us.negotiate(&them((2, 2), 0b110, 0)), Err(Mismatch::Lacking(1)));
        assert_eq!(us.negotiate(&them((2, 2), 0b1001, 0b1000)), Err(Mismatch::Required(8)));
        let mut hello = them((2, 2), 1, 0);
        hello.magic += 1;
        assert_eq!(us.negotiate(&hello), Err(Mismatch::Magic));
        let reply = |version, capabilities| HelloReply { magic: MAGIC, version, capabilities, host: Name::default() };
        assert_eq!(us.check_reply(&reply(3, 0b011)), agreed(3, 0b011));
        assert_eq!(us.check_reply(&reply(5, 1)), version((5, 5)));
        assert_eq!(us.check_reply(&reply(3, 0b1001)), Err(Mismatch::Required(8)));
        assert_eq!(us.check_reply(&reply(3, 0b110)), Err(Mismatch::Lacking(1)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever comes: an error, or a message that encodes to the same bytes.
        #[test]
        fn any_bytes(kind in 0..21u8, mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            bytes.splice(0..0, [kind, 0, 0, 0]);
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(encode(&message), Ok(bytes));
            }
        }

        /// Damage to real messages.
        #[test]
        fn any_change(number in 0..18usize, at in any::<proptest::sample::Index>(), to in any::<u8>()) {
            let mut bytes = encode(&all()[number]).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(encode(&message), Ok(bytes));
            }
        }
    }
}
