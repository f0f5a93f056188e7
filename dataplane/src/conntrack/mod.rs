//! Connection tracking: what is new, established, related and invalid, as Linux's conntrack (6.x) judges it.
//!
//! Pure logic: no I/O, no clock (`now_ms` is passed in), no lock. The view is one VM's: a packet comes *towards* the VM or
//! *from* it ([`Toward`]), and both directions of a connection have one [`Key`], so one lookup finds it.
//!
//! ```text
//! Packet -> dissect -> Facts -> Tracker::track: one lookup, then the protocol's rules on a private Connection
//!                      |                        (tcp, udp, icmp, sctp, generic) -> Judgement
//!                      `-> fragment -> frag: held until its datagram is complete, judged whole, then released
//! ```
//!
//! The protocol modules take a private copy of an entry and change it; the table ([`ConnTable`]) stores the result. New
//! connections are stored only by [`Tracker::confirm`], after the policy has let their first packet through. Entries that exist
//! are brought up to date before any policy is asked, as in Linux.
//!
//! Where this differs from Linux on purpose: fragments and padding are forwarded as they came (an IPv4 fragment's odd bytes cut
//! off, which nobody judged); IPv6 fragments of odd length, and within fragments, are invalid; frames are judged inside their
//! VLAN tags, each VLAN having connections of its own; a packet belongs to a connection only in the direction it really travels
//! (an address that is spoofed from the other side does not match); UDP-Lite checksums are computed as RFC 3828 says; IPv6 extension
//! headers and ICMP's inner headers are looked at as far as a header copy reaches ([`crate::frame::SNAPSHOT_BYTES`]).

mod config;
mod dissect;
mod entry;
mod frag;
mod generic;
mod icmp;
mod key;
mod map;
mod opening;
mod pick_up;
mod plain;
mod portable;
mod sctp;
mod steady;
mod table;
mod tcp;
mod tcp_run;
mod tracker;
mod udp;

pub use config::{Timeouts, TrackConfig};
pub use dissect::{
    Checksum, Dissected, Facts, FragmentFacts, IcmpError, Malformed, Packet, Refusal, SctpPacket, Segment, Transport,
    dissect,
};
pub use entry::{Connection, Decision, Tally, Traffic};
pub use frag::{Accepted, Datagram, DatagramId, FragmentQueue, FragmentRefusal, FragmentStats};
pub use key::{Flow, Key, Toward, Way};
#[cfg(any(test, feature = "testing"))]
pub use map::sample;
pub use map::{
    ConnHandle, ConnMap, Cursor, DEFAULT_CAPACITY, Dirt, Imported, MAX_CAPACITY, MapError, MapStats, Observer, Removal,
    Tombstone, Uncollected, VERSION_BITS, VERSION_MAX, newer,
};
pub(crate) use map::{Ends, KeyWords, Likely, Whereabouts};
pub(crate) use opening::{Progress, Whole, begin, flow, is_whole, progress, stations, whole};
pub use pick_up::PickUp;
pub(crate) use plain::{Layout, Particulars, Plain};
pub use portable::{
    MAX_AGE_MS, MAX_TCP_WINDOW, Portable, PortableError, PortableKey, PortableSctp, PortableSide, PortableState,
    PortableTcp,
};
pub use sctp::SctpState;
#[cfg(all(test, not(loom)))]
pub(crate) use steady::tests as sent;
pub(crate) use steady::{Terms, steady};
pub use table::{Change, ConnTable, InsertError, ModelTable, Stored};
pub use tcp::TcpState;
pub use tracker::{Judgement, Tracked, Tracker};
pub(crate) use tracker::{judge, next_dither, refused};

/// What a packet is to the connections known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CtState {
    /// Opens a connection, or belongs to one that has not been answered yet. The policy decides.
    New,
    /// Belongs to a connection that has been answered.
    Established,
    /// An ICMP error about a known connection.
    Related,
    /// Fits nothing: to be dropped.
    Invalid,
    /// Not tracked at all: IPv6 neighbour and multicast listener discovery.
    Untracked,
}

const _: () = assert!(CtState::New as u8 == 0 && CtState::Untracked as u8 == 4);

impl CtState {
    /// `new`, `established`, `related`, `invalid` or `untracked`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Established => "established",
            Self::Related => "related",
            Self::Invalid => "invalid",
            Self::Untracked => "untracked",
        }
    }
}

/// Why a packet is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Invalid {
    /// The transport header is cut short or its length fields contradict the packet.
    #[error("transport header truncated or malformed")]
    Header,
    /// The transport checksum is wrong.
    #[error("transport checksum wrong")]
    Checksum,
    /// TCP flags that no sender combines.
    #[error("impossible TCP flags")]
    Flags,
    /// The protocol state does not allow it.
    #[error("not possible in the connection's state")]
    State,
    /// A TCP segment outside the windows.
    #[error("outside the TCP window")]
    Window,
    /// A RST below what its receiver has acknowledged (RFC 5961).
    #[error("RST with a stale sequence number")]
    Reset,
    /// Cannot begin a connection: an answer without a question, a TCP segment mid-stream under strict tracking.
    #[error("belongs to no connection and cannot begin one")]
    NoConnection,
    /// An ICMP error about no known connection, or sent to the wrong host.
    #[error("ICMP error about no known connection")]
    Unrelated,
    /// An ICMP type that is neither a known question nor an answer nor an error.
    #[error("ICMP type not tracked")]
    IcmpType,
    /// SCTP verification tag does not match (RFC 9260, 8.5).
    #[error("SCTP verification tag mismatch")]
    VerificationTag,
    /// IPv6 without an upper protocol, or with headers too deep to be judged.
    #[error("no upper protocol to be found")]
    NoUpperProtocol,
}

/// What a protocol module found about one packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Belongs to the connection; the entry was brought up to date.
    Pass(Change),
    /// Invalid; the entry may have changed all the same.
    Invalid(Invalid, Change),
    /// Belongs to the connection and ends it: delete the entry.
    Finish,
    /// The entry is of a finished connection; delete it and look again.
    Reopen,
}
