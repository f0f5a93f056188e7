//! Why a packet could not be parsed.

/// What [`parse`](super::parse) and the views object to.
///
/// [`ParseError::NeedMore`] says nothing against the packet: the snapshot ends before the headers do. All other
/// values mean that no amount of further bytes makes the packet valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ParseError {
    /// The snapshot is too short; at least `bytes` from the frame's (or view's) start are needed to go on.
    #[error("header copy too short: {bytes} bytes needed")]
    NeedMore {
        /// Least length with which parsing gets further.
        bytes: u32,
    },
    /// Shorter than an Ethernet header.
    #[error("frame shorter than an Ethernet header")]
    FrameTooShort,
    /// The frame ends inside a VLAN tag.
    #[error("frame ends inside a VLAN tag")]
    VlanTruncated,
    /// The frame ends inside an ARP packet.
    #[error("ARP packet truncated")]
    ArpTruncated,
    /// Not ARP for IPv4 over Ethernet (RFC 826: hardware 1, protocol 0x0800, lengths 6 and 4).
    #[error("ARP is not for IPv4 over Ethernet")]
    ArpFormat,
    /// The frame ends inside the IPv4 header.
    #[error("IPv4 header truncated")]
    Ipv4Truncated,
    /// The version field is not 4.
    #[error("IPv4 version field is not 4")]
    Ipv4Version,
    /// IHL below 5, or the header is longer than the packet.
    #[error("IPv4 header length invalid")]
    Ipv4HeaderLength,
    /// Total length shorter than the header or longer than the frame.
    #[error("IPv4 total length invalid")]
    Ipv4TotalLength,
    /// An IPv4 option's length is impossible.
    #[error("IPv4 option malformed")]
    Ipv4Option,
    /// The frame ends inside the IPv6 header.
    #[error("IPv6 header truncated")]
    Ipv6Truncated,
    /// The version field is not 6.
    #[error("IPv6 version field is not 6")]
    Ipv6Version,
    /// The payload length is longer than the frame.
    #[error("IPv6 payload length invalid")]
    Ipv6PayloadLength,
    /// An extension header reaches beyond the packet.
    #[error("IPv6 extension header truncated")]
    Ipv6ExtensionTruncated,
    /// More extension headers than [`MAX_EXTENSION_HEADERS`](super::ipv6::MAX_EXTENSION_HEADERS).
    #[error("too many IPv6 extension headers")]
    Ipv6TooManyExtensions,
    /// A hop-by-hop header that is not the first one (RFC 8200, 4.1), or a second fragment header.
    #[error("IPv6 extension headers out of order")]
    Ipv6ExtensionOrder,
    /// A fragment that would reach beyond 65 535 bytes.
    #[error("fragment reaches beyond the longest packet")]
    FragmentOffset,
    /// A later fragment that would overwrite the TCP header of the first one (RFC 1858, RFC 3128).
    #[error("fragment overlaps the TCP header")]
    FragmentOverlap,
    /// The packet (or first fragment: RFC 7112) ends inside the TCP header.
    #[error("TCP header truncated")]
    TcpTruncated,
    /// The data offset is below 5 or reaches beyond the packet.
    #[error("TCP data offset invalid")]
    TcpDataOffset,
    /// A TCP option's length is impossible.
    #[error("TCP option malformed")]
    TcpOption,
    /// The packet ends inside the UDP header.
    #[error("UDP header truncated")]
    UdpTruncated,
    /// The UDP length is below 8 or longer than the IP payload.
    #[error("UDP length invalid")]
    UdpLength,
    /// The packet ends inside the ICMP or ICMPv6 header.
    #[error("ICMP header truncated")]
    IcmpTruncated,
    /// A neighbour discovery message or option is too short (RFC 4861).
    #[error("neighbour discovery message malformed")]
    NdMalformed,
    /// The packet ends inside the SCTP common header.
    #[error("SCTP header truncated")]
    SctpTruncated,
    /// An SCTP chunk's length is below 4 or reaches beyond the packet.
    #[error("SCTP chunk length invalid")]
    SctpChunk,
}

impl ParseError {
    /// True when more snapshot bytes may help.
    #[inline]
    pub fn is_need_more(self) -> bool {
        matches!(self, Self::NeedMore { .. })
    }

    /// `need` bytes are needed but missing: [`ParseError::NeedMore`] when the layer reaches that far (`end`), else `malformed`.
    #[cold]
    pub(crate) fn short(need: usize, end: usize, malformed: Self) -> Self {
        if need <= end { Self::NeedMore { bytes: need as u32 } } else { malformed }
    }
}
