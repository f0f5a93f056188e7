//! Counters and drop reasons. Every frame that enters is counted as received, and then exactly once:
//! as forwarded, or as dropped under one reason.
//!
//! All counters have a single writer at a time (the PMD thread that owns the queue, or that holds the
//! transmit claim), so an increment is a plain load and store: no locked instruction on the hot path.
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame was dropped. The names are part of the API (stats, metrics).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $variant,)* }
        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in stats and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }
        }
    };
}

drop_reasons! {
    /// A guest's descriptor chain was invalid (unmapped, looping, wrong direction ...).
    RxBadDescriptor = "rx_bad_descriptor",
    /// A frame of more segments than the switch takes.
    RxTooManySegments = "rx_too_many_segments",
    /// Longer than any frame can be.
    RxTooLong = "rx_too_long",
    /// Shorter than an Ethernet header.
    RxTooShort = "rx_too_short",
    /// The virtio-net header asks for the impossible (csum_start outside the frame ...).
    RxBadOffload = "rx_bad_offload",
    /// Headers are malformed.
    RxBadHeader = "rx_bad_header",
    /// The source address is multicast or zero.
    BadSourceMac = "bad_source_mac",
    /// Reserved for the link itself (IEEE 802.1Q, 01-80-C2-00-00-0X), not forwarded by bridges.
    LinkLocal = "link_local",
    /// The VLAN is not one that the ingress port carries.
    VlanNotAllowed = "vlan_not_allowed",
    /// The destination is behind the port the frame came from.
    SamePort = "same_port",
    /// Nowhere to go: no other port carries this VLAN.
    NoDestination = "no_destination",
    /// The output port is not connected or not ready.
    TxNotReady = "tx_not_ready",
    /// The output port is administratively down.
    TxAdminDown = "tx_admin_down",
    /// The output's queue was full.
    TxQueueFull = "tx_queue_full",
    /// The output queue stayed claimed by another PMD thread.
    TxBusy = "tx_busy",
    /// Longer than the output's MTU or than the guest's buffers.
    TxTooLong = "tx_too_long",
    /// The receiving guest's descriptors were invalid.
    TxBadDescriptor = "tx_bad_descriptor",
    /// No mbuf to be had.
    TxNoBuffer = "tx_no_buffer",
    /// Checksum or segmentation could not be finished in software.
    OffloadFailed = "offload_failed",
    /// Guest memory went away under the port (file truncated).
    MemoryFault = "memory_fault",
    /// The ingress port is administratively down or in no bridge.
    RxDisabled = "rx_disabled",
}

/// A single-writer counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only one thread at a time may do so.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What happened to the frames that came in through one receive queue:
/// `frames = forwarded + sum(dropped)`, at every moment at which no burst is under way.
#[derive(Debug)]
#[repr(align(64))]
pub struct RxLedger {
    /// Frames received.
    pub frames: Counter,
    /// Bytes received, without virtio-net headers.
    pub bytes: Counter,
    /// Frames that reached at least one output.
    pub forwarded: Counter,
    /// Frames dropped, by [`DropReason`].
    pub dropped: [Counter; DropReason::COUNT],
}

impl Default for RxLedger {
    fn default() -> Self {
        Self {
            frames: Counter::default(),
            bytes: Counter::default(),
            forwarded: Counter::default(),
            dropped: core::array::from_fn(|_| Counter::default()),
        }
    }
}

impl RxLedger {
    /// Counts `n` frames dropped for `reason`.
    #[inline]
    pub fn drop_frames(&self, reason: DropReason, n: u64) {
        if let Some(c) = self.dropped.get(reason as usize) {
            c.add(n);
        }
    }
}

/// What one PMD thread sent to one port.
#[derive(Debug)]
#[repr(align(64))]
pub struct TxLedger {
    /// Frames accepted by the port (segments, where segmentation was finished in software).
    pub frames: Counter,
    /// Bytes accepted.
    pub bytes: Counter,
    /// Copies that the port refused, by [`DropReason`] (of a flooded frame one copy may fail while others arrive).
    pub refused: [Counter; DropReason::COUNT],
}

impl Default for TxLedger {
    fn default() -> Self {
        Self {
            frames: Counter::default(),
            bytes: Counter::default(),
            refused: core::array::from_fn(|_| Counter::default()),
        }
    }
}
