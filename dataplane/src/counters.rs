//! Counters and drop reasons. Every frame that enters is counted as received, and then exactly once:
//! as forwarded, as dropped under one reason, or (a fragment) as held.
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
            /// The reason of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.name() == name)
            }
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
    /// The firewall's rules, or a default, do not allow the connection.
    FwDenied = "fw_denied",
    /// The same, and the rule (or default) says to tell the sender.
    FwRejected = "fw_rejected",
    /// An established connection that the rules no longer allow.
    FwRevoked = "fw_revoked",
    /// Neither IPv4, IPv6 nor ARP, and not among the EtherTypes that the port allows.
    FwEthertype = "fw_ethertype",
    /// Unicast to a MAC address that is not the firewalled port's.
    FwNotForPort = "fw_not_for_port",
    /// Headers reach deeper than the firewall looks.
    FwHeadersTooDeep = "fw_headers_too_deep",
    /// The VM's connection table is full and nothing may be evicted.
    CtTableFull = "ct_table_full",
    /// Transport header cut short or contradictory.
    CtInvalidHeader = "ct_invalid_header",
    /// Transport checksum wrong.
    CtInvalidChecksum = "ct_invalid_checksum",
    /// TCP flags that no sender combines.
    CtInvalidFlags = "ct_invalid_flags",
    /// Not possible in the connection's state.
    CtInvalidState = "ct_invalid_state",
    /// A TCP segment outside the windows.
    CtInvalidWindow = "ct_invalid_window",
    /// A RST with a stale sequence number (RFC 5961).
    CtInvalidReset = "ct_invalid_reset",
    /// Belongs to no connection and cannot begin one.
    CtNoConnection = "ct_no_connection",
    /// An ICMP error about no known connection.
    CtUnrelated = "ct_unrelated",
    /// An ICMP type that is not tracked.
    CtIcmpType = "ct_icmp_type",
    /// SCTP verification tag mismatch.
    CtVerificationTag = "ct_verification_tag",
    /// IPv6 without an upper protocol to be found.
    CtNoUpperProtocol = "ct_no_upper_protocol",
    /// Overlapping fragments (RFC 5722).
    FragmentOverlap = "fragment_overlap",
    /// A fragment that has been received already.
    FragmentRepeated = "fragment_repeated",
    /// A fragment that does not fit its datagram.
    FragmentMisfit = "fragment_misfit",
    /// The VM's memory for fragments is used up.
    FragmentMemory = "fragment_memory",
    /// The VM's fragment memory stayed claimed by another PMD thread.
    FragmentBusy = "fragment_busy",
    /// The VM has all its connections.
    LimitConnections = "limit_connections",
    /// The VM has all its half-open connections.
    LimitHalfOpen = "limit_half_open",
    /// The VM opens connections too fast.
    LimitRate = "limit_rate",
    /// The source has all its connections with the VM.
    LimitSourceConnections = "limit_source_connections",
    /// The source has all its half-open connections with the VM.
    LimitSourceHalfOpen = "limit_source_half_open",
    /// The source opens connections with the VM too fast.
    LimitSourceRate = "limit_source_rate",
    /// Spoofed: source MAC address not the port's.
    SpoofSourceMac = "spoof_source_mac",
    /// Spoofed: source IPv4 address not allowed with this MAC address.
    SpoofSourceIpv4 = "spoof_source_ipv4",
    /// Spoofed: source IPv6 address not allowed with this MAC address.
    SpoofSourceIpv6 = "spoof_source_ipv6",
    /// Spoofed: a source address that no packet may have.
    SpoofMartianSource = "spoof_martian_source",
    /// Spoofed: source 0.0.0.0 outside DHCP.
    SpoofUnspecifiedIpv4 = "spoof_unspecified_ipv4",
    /// Spoofed: source :: where it may not be.
    SpoofUnspecifiedIpv6 = "spoof_unspecified_ipv6",
    /// Spoofed: ARP that cannot be read.
    SpoofArpMalformed = "spoof_arp_malformed",
    /// Spoofed: ARP sender's hardware address.
    SpoofArpSenderMac = "spoof_arp_sender_mac",
    /// Spoofed: ARP sender's protocol address.
    SpoofArpSenderAddress = "spoof_arp_sender_address",
    /// Neighbour discovery that cannot be read to its end.
    SpoofNdMalformed = "spoof_nd_malformed",
    /// Neighbour discovery with a hop limit other than 255.
    SpoofNdHopLimit = "spoof_nd_hop_limit",
    /// Neighbour discovery in fragments (RFC 6980).
    SpoofNdFragmented = "spoof_nd_fragmented",
    /// Spoofed: neighbour discovery about an address that is not the VM's.
    SpoofNdTarget = "spoof_nd_target",
    /// Spoofed: link-layer address option of neighbour discovery.
    SpoofNdLinkLayer = "spoof_nd_link_layer",
    /// Router advertisement from a VM that is no router (RFC 6105).
    SpoofRouterAdvertisement = "spoof_router_advertisement",
    /// IPv6 redirect from a VM that is no router.
    SpoofRedirect = "spoof_redirect",
    /// DHCP server's answer from a VM that is none.
    SpoofDhcpServer = "spoof_dhcp_server",
    /// DHCPv6 server's answer from a VM that is none.
    SpoofDhcpv6Server = "spoof_dhcpv6_server",
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
/// `frames = forwarded + held + sum(dropped)`, at every moment at which no burst is under way.
#[derive(Debug)]
#[repr(align(64))]
pub struct RxLedger {
    /// Frames received.
    pub frames: Counter,
    /// Bytes received, without virtio-net headers.
    pub bytes: Counter,
    /// Frames that reached at least one output.
    pub forwarded: Counter,
    /// Fragments kept until their datagram is complete. They are counted again, as released frames, when they go on.
    pub held: Counter,
    /// Frames dropped, by [`DropReason`].
    pub dropped: [Counter; DropReason::COUNT],
}

impl Default for RxLedger {
    fn default() -> Self {
        Self {
            frames: Counter::default(),
            bytes: Counter::default(),
            forwarded: Counter::default(),
            held: Counter::default(),
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
