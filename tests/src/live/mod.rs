//! The firewall beside the kernel of this machine: the same frames through Linux's conntrack and through Ferry's, step by step.
//!
//! ```text
//! generate -> Conversation --+--> kernel: veth a0/a1 - bridge - b1/b0 in a network namespace, nftables ---+
//!                            |                                                                            +--> compare
//!                            +--> own: Tracker and CompiledPolicy on a virtual clock ---------------------+
//! ```
//!
//! [`compare`] puts every difference into a class, or into none; the classes that are allowed stand in a reviewed list. Of a
//! conversation with a difference in no class the shortest part that still shows it is searched for and printed.
pub mod compare;
pub mod generate;
pub mod kernel;
pub mod own;
pub mod packet;
mod random;
mod socket;

pub use random::Random;

/// Which end of the path a frame enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The protected VM.
    A,
    /// Outside.
    B,
}

impl Side {
    /// The opposite end.
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// `A` or `B`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
        }
    }
}

/// One frame of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it comes in.
    pub from: Side,
    /// Without frame check sequence.
    pub frame: Vec<u8>,
}

/// A switch that differs from Linux's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// None does.
    Default,
    /// `nf_conntrack_tcp_loose = 0`.
    Strict,
    /// `nf_conntrack_tcp_be_liberal = 1`.
    Liberal,
    /// `nf_conntrack_tcp_ignore_invalid_rst = 1`.
    RstNotVerified,
}

impl Profile {
    /// The name that recordings use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Strict => "strict",
            Self::Liberal => "liberal",
            Self::RstNotVerified => "rstnoverify",
        }
    }

    /// The switches under `net.netfilter`, in force or not.
    pub const fn switches(self) -> [(&'static str, bool); 3] {
        [
            ("nf_conntrack_tcp_loose", !matches!(self, Self::Strict)),
            ("nf_conntrack_tcp_be_liberal", matches!(self, Self::Liberal)),
            ("nf_conntrack_tcp_ignore_invalid_rst", matches!(self, Self::RstNotVerified)),
        ]
    }
}

/// Frames in their order, back to back.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// What it was generated from.
    pub seed: u64,
    /// Which generator.
    pub category: &'static str,
    /// Switches.
    pub profile: Profile,
    /// The frames.
    pub steps: Vec<Step>,
}
