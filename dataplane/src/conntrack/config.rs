//! How tracking behaves: the switches and time-outs of Linux's `net.netfilter.nf_conntrack_*`, with its defaults.
use serde::{Deserialize, Serialize};

/// Longest time-out that can be kept, milliseconds (about 24 days): expiry is a 32-bit millisecond clock that wraps.
pub const MAX_TIMEOUT_MS: u32 = i32::MAX as u32 - 1000;

/// Behaviour of one VM's tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrackConfig {
    /// Pick up TCP connections in the middle (`tcp_loose`). Off: a connection must begin with a SYN.
    pub tcp_loose: bool,
    /// Only RST segments outside the window are invalid (`tcp_be_liberal`).
    pub tcp_be_liberal: bool,
    /// RST segments below what the receiver has acknowledged are not invalid (`tcp_ignore_invalid_rst`).
    pub tcp_ignore_invalid_rst: bool,
    /// From this many retransmissions in a row on, [`Timeouts::tcp_max_retrans_ms`] applies (`tcp_max_retrans`).
    pub tcp_max_retrans: u8,
    /// Verify transport checksums (`checksum`). Those that someone trusted vouches for are never verified.
    pub checksum: bool,
    /// Most bytes of memory for fragments that wait for their datagram to be complete.
    pub fragment_bytes: u32,
    /// Time-outs.
    pub timeouts: Timeouts,
}

impl Default for TrackConfig {
    fn default() -> Self {
        Self {
            tcp_loose: true,
            tcp_be_liberal: false,
            tcp_ignore_invalid_rst: false,
            tcp_max_retrans: 3,
            checksum: true,
            fragment_bytes: 4 << 20,
            timeouts: Timeouts::default(),
        }
    }
}

macro_rules! timeouts {
    ($($(#[$doc:meta])* $field:ident = $ms:expr,)*) => {
        /// After how long without a packet an entry expires, milliseconds. The names are Linux's. Values above
        /// about 24 days count as 24 days.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Timeouts { $($(#[$doc])* pub $field: u32,)* }

        impl Default for Timeouts {
            fn default() -> Self {
                Self { $($field: $ms,)* }
            }
        }

        impl Timeouts {
            /// The field called `name` (Linux's name with `_ms` appended), to be set by name.
            pub fn get_mut(&mut self, name: &str) -> Option<&mut u32> {
                match name {
                    $(stringify!($field) => Some(&mut self.$field),)*
                    _ => None,
                }
            }
        }
    };
}

const S: u32 = 1000;

timeouts! {
    /// TCP: SYN seen.
    tcp_syn_sent_ms = 120 * S,
    /// TCP: SYN seen from both sides (simultaneous open).
    tcp_syn_sent2_ms = 120 * S,
    /// TCP: SYN-ACK seen.
    tcp_syn_recv_ms = 60 * S,
    /// TCP: open.
    tcp_established_ms = 432_000 * S,
    /// TCP: first FIN seen.
    tcp_fin_wait_ms = 120 * S,
    /// TCP: first FIN acknowledged.
    tcp_close_wait_ms = 60 * S,
    /// TCP: FIN seen from both sides.
    tcp_last_ack_ms = 30 * S,
    /// TCP: last FIN acknowledged.
    tcp_time_wait_ms = 120 * S,
    /// TCP: RST seen.
    tcp_close_ms = 10 * S,
    /// TCP: upper bound while segments are retransmitted or a window is zero.
    tcp_max_retrans_ms = 300 * S,
    /// TCP: upper bound while data is not acknowledged.
    tcp_unacknowledged_ms = 300 * S,
    /// UDP and UDP-Lite: until answered, and until the exchange has lasted two seconds.
    udp_ms = 30 * S,
    /// UDP and UDP-Lite: stream.
    udp_stream_ms = 120 * S,
    /// ICMP questions.
    icmp_ms = 30 * S,
    /// ICMPv6 questions.
    icmpv6_ms = 30 * S,
    /// SCTP: nothing agreed on, or ended.
    sctp_closed_ms = 10 * S,
    /// SCTP: INIT seen.
    sctp_cookie_wait_ms = 3 * S,
    /// SCTP: COOKIE ECHO seen.
    sctp_cookie_echoed_ms = 3 * S,
    /// SCTP: open.
    sctp_established_ms = 210 * S,
    /// SCTP: SHUTDOWN seen from the opener.
    sctp_shutdown_sent_ms = 3 * S,
    /// SCTP: SHUTDOWN seen from the other side.
    sctp_shutdown_recd_ms = 3 * S,
    /// SCTP: SHUTDOWN ACK seen.
    sctp_shutdown_ack_sent_ms = 3 * S,
    /// SCTP: HEARTBEAT seen on a further path.
    sctp_heartbeat_sent_ms = 30 * S,
    /// GRE: until answered.
    gre_ms = 30 * S,
    /// GRE: answered.
    gre_stream_ms = 180 * S,
    /// All other protocols.
    generic_ms = 600 * S,
    /// IPv4 fragments waiting for their datagram's rest.
    fragment_v4_ms = 30 * S,
    /// IPv6 fragments waiting for their datagram's rest.
    fragment_v6_ms = 60 * S,
}
