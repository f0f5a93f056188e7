//! Keys of the firewall's sections.
use ferry_dataplane::firewall::limits::{MAX_PER_SOURCE, MAX_TRACKED_SOURCES};
use ferry_dataplane::firewall::policy::{
    MAX_ADDRESSES_PER_SET, MAX_DESCRIPTION_BYTES, MAX_ETHERTYPES, MAX_GROUPS_PER_PORT, MAX_NAME_BYTES,
    MAX_RANGES_PER_RULE, MAX_RULES_PER_GROUP,
};
use ferry_dataplane::firewall::spoof::MAX_ADDRESSES;
use ferry_dataplane::firewall::token_bucket::MAX_RATE;

use super::firewall::MAX_CONNECTIONS;
use super::migration_schema::VM_MIGRATION;
use super::schema::{Key, Kind, Section, Text, opt, plain, req};

/// Longest time-out, milliseconds: see `TrackConfig`.
const TIMEOUT: Kind = Kind::Int(1, i32::MAX as i64 - 1000);
const RATE: Kind = Kind::Int(0, MAX_RATE as i64);
const COUNT: Kind = Kind::Int(0, u32::MAX as i64);
const ACTION: Kind = Kind::Text(Text::OneOf(&["allow", "drop", "reject"]));
const DESCRIPTION: Kind = Kind::Text(Text::Line(MAX_DESCRIPTION_BYTES));
const RANGES: Kind = Kind::List(&Kind::Ports, MAX_RANGES_PER_RULE);

/// `[[vm]]`
pub static VM: Section = plain(
    "A VM as the firewall sees it: a name under which ports share one connection table. A port belongs to it by its key `vm`. A port with a firewall that names no VM is a VM of its own, called like the port, with the defaults of this section.",
    &[
        req(
            "name",
            Kind::Text(Text::Name),
            "Its name: 1 to 64 letters, digits, `.`, `_`, `-`, starting with a letter or digit.",
        ),
        opt(
            "connections",
            Kind::Int(1024, MAX_CONNECTIONS as i64),
            "1000000",
            "Connections its table holds. When that changes, they move to a table of the new size while traffic goes on.",
        ),
        opt("flow_log", Kind::Bool, "true", "Its new and denied connections go to the flow log, when that is enabled."),
        opt("limits", Kind::Table(&LIMITS), "", "How many connections it may have. Can be changed at any time."),
        opt(
            "tracking",
            Kind::Table(&TRACKING),
            "",
            "How its connections are tracked; names, meaning and defaults are those of Linux's `net.netfilter.nf_conntrack_*`.",
        ),
        VM_MIGRATION,
    ],
);

/// `limits` of a VM, or of a port that is a VM of its own.
pub static LIMITS: Section = plain(
    "Limits of one VM's connections. 0 means no limit. What is refused is counted by limit.",
    &[
        opt(
            "max_connections",
            Kind::Int(1, u32::MAX as i64),
            "1000000",
            "Connections of all kinds; 0 is not possible.",
        ),
        opt("max_half_open", COUNT, "0", "Connections that only one side has been heard of (TCP: not established)."),
        opt("new_per_second", RATE, "0", "New connections per second, on average."),
        opt("burst", COUNT, "0", "New connections at once; 0: as many as `new_per_second`."),
        opt("per_source", Kind::Table(&PER_SOURCE), "", "The same for each source address of the VM's connections."),
        opt(
            "tracked_sources",
            Kind::Int(0, MAX_TRACKED_SOURCES as i64),
            "4096",
            "Sources that are counted one by one, rounded up to a power of two, 16 bytes each.",
        ),
    ],
);

static PER_SOURCE: Section = plain(
    "Limits of each single source. 0 means no limit.",
    &[
        opt("max_connections", Kind::Int(0, MAX_PER_SOURCE as i64), "0", "Connections of all kinds."),
        opt("max_half_open", Kind::Int(0, MAX_PER_SOURCE as i64), "0", "Half-open connections."),
        opt("new_per_second", RATE, "0", "New connections per second, on average."),
        opt("burst", COUNT, "0", "New connections at once; 0: as many as `new_per_second`."),
    ],
);

static TRACKING: Section = plain(
    "How a VM's connections are tracked. The names are Linux's.",
    &[
        opt(
            "tcp_loose",
            Kind::Bool,
            "true",
            "Picks up TCP connections in the middle. false: a connection must begin with a SYN.",
        ),
        opt("tcp_be_liberal", Kind::Bool, "false", "Only RST segments outside the window are invalid."),
        opt(
            "tcp_ignore_invalid_rst",
            Kind::Bool,
            "false",
            "RST segments below what the receiver has acknowledged are not invalid.",
        ),
        opt(
            "tcp_max_retrans",
            Kind::Int(0, 255),
            "3",
            "From this many retransmissions in a row on, `timeouts.tcp_max_retrans_ms` applies.",
        ),
        opt("checksum", Kind::Bool, "true", "Verifies transport checksums that nobody trusted vouches for."),
        opt(
            "fragment_bytes",
            Kind::Int(0, 1 << 30),
            "4194304",
            "Most memory for fragments that wait for the rest of their datagram, bytes.",
        ),
        opt(
            "timeouts",
            Kind::Table(&TIMEOUTS),
            "",
            "After how long without a packet a connection is forgotten, milliseconds.",
        ),
    ],
);

static TIMEOUTS: Section = plain(
    "After how long without a packet a connection is forgotten, milliseconds.",
    &[
        opt("tcp_syn_sent_ms", TIMEOUT, "120000", "TCP: SYN seen."),
        opt("tcp_syn_sent2_ms", TIMEOUT, "120000", "TCP: SYN seen from both sides (simultaneous open)."),
        opt("tcp_syn_recv_ms", TIMEOUT, "60000", "TCP: SYN-ACK seen."),
        opt("tcp_established_ms", TIMEOUT, "432000000", "TCP: open."),
        opt("tcp_fin_wait_ms", TIMEOUT, "120000", "TCP: first FIN seen."),
        opt("tcp_close_wait_ms", TIMEOUT, "60000", "TCP: first FIN acknowledged."),
        opt("tcp_last_ack_ms", TIMEOUT, "30000", "TCP: FIN seen from both sides."),
        opt("tcp_time_wait_ms", TIMEOUT, "120000", "TCP: last FIN acknowledged."),
        opt("tcp_close_ms", TIMEOUT, "10000", "TCP: RST seen."),
        opt(
            "tcp_max_retrans_ms",
            TIMEOUT,
            "300000",
            "TCP: upper bound while segments are retransmitted or a window is zero.",
        ),
        opt("tcp_unacknowledged_ms", TIMEOUT, "300000", "TCP: upper bound while data is not acknowledged."),
        opt(
            "udp_ms",
            TIMEOUT,
            "30000",
            "UDP and UDP-Lite: until answered, and until the exchange has lasted two seconds.",
        ),
        opt("udp_stream_ms", TIMEOUT, "120000", "UDP and UDP-Lite: stream."),
        opt("icmp_ms", TIMEOUT, "30000", "ICMP questions."),
        opt("icmpv6_ms", TIMEOUT, "30000", "ICMPv6 questions."),
        opt("sctp_closed_ms", TIMEOUT, "10000", "SCTP: nothing agreed on, or ended."),
        opt("sctp_cookie_wait_ms", TIMEOUT, "3000", "SCTP: INIT seen."),
        opt("sctp_cookie_echoed_ms", TIMEOUT, "3000", "SCTP: COOKIE ECHO seen."),
        opt("sctp_established_ms", TIMEOUT, "210000", "SCTP: open."),
        opt("sctp_shutdown_sent_ms", TIMEOUT, "3000", "SCTP: SHUTDOWN seen from the opener."),
        opt("sctp_shutdown_recd_ms", TIMEOUT, "3000", "SCTP: SHUTDOWN seen from the other side."),
        opt("sctp_shutdown_ack_sent_ms", TIMEOUT, "3000", "SCTP: SHUTDOWN ACK seen."),
        opt("sctp_heartbeat_sent_ms", TIMEOUT, "30000", "SCTP: HEARTBEAT seen on a further path."),
        opt("gre_ms", TIMEOUT, "30000", "GRE: until answered."),
        opt("gre_stream_ms", TIMEOUT, "180000", "GRE: answered."),
        opt("generic_ms", TIMEOUT, "600000", "All other protocols."),
        opt("fragment_v4_ms", TIMEOUT, "30000", "IPv4 fragments waiting for the rest of their datagram."),
        opt("fragment_v6_ms", TIMEOUT, "60000", "IPv6 fragments waiting for the rest of their datagram."),
    ],
);

/// `[security_group.NAME]`
pub static SECURITY_GROUP: Section = plain(
    "A named set of rules, for any number of ports. All rules of all groups of a port are pooled; the first that matches decides: higher `priority` first, then drop before reject before stateful allow before stateless allow. Where none matches, the port's default decides.",
    &[
        opt("description", DESCRIPTION, "", "For people."),
        opt(
            "stateless",
            Kind::Bool,
            "false",
            "All allow rules of the group are stateless, whatever they say themselves.",
        ),
        opt("rules", Kind::Tables(&RULE, MAX_RULES_PER_GROUP), "[]", "The rules, in any order."),
    ],
);

static RULE: Section = plain(
    "A rule. What is not stated matches everything.",
    &[
        opt("name", Kind::Text(Text::Line(MAX_NAME_BYTES)), "", "Name for logs and explanations; need not be unique."),
        req(
            "direction",
            Kind::Text(Text::OneOf(&["ingress", "egress"])),
            "\"ingress\": towards the VM. \"egress\": from the VM.",
        ),
        opt(
            "ethertype",
            Kind::Text(Text::OneOf(&["any", "ipv4", "ipv6"])),
            "\"any\"",
            "Network protocol. A rule with `remote_cidr` is for that family alone.",
        ),
        opt(
            "protocol",
            Kind::Protocol,
            "\"any\"",
            "Transport protocol: \"tcp\", \"udp\", \"icmp\" (ICMPv6 over IPv6), \"icmpv6\", \"sctp\", \"gre\" ..., or a number.",
        ),
        opt(
            "ports",
            RANGES,
            "[]",
            "Destination ports, in both directions; ports and ranges such as \"8000-8099\". Empty: all.",
        ),
        opt("source_ports", RANGES, "[]", "Source ports, likewise."),
        opt(
            "icmp_type",
            Kind::Int(0, 255),
            "",
            "ICMP type; needs protocol \"icmp\" with an `ethertype`, or \"icmpv6\".",
        ),
        opt("icmp_code", Kind::Int(0, 255), "", "ICMP code; needs `icmp_type`."),
        opt(
            "remote_cidr",
            Kind::Text(Text::Cidr),
            "",
            "The other end is inside this prefix. At most one of the three `remote_` keys.",
        ),
        opt(
            "remote_group",
            Kind::Text(Text::Name),
            "",
            "The other end is an address of a port that is in this security group.",
        ),
        opt("remote_address_set", Kind::Text(Text::Name), "", "The other end is in this address set."),
        opt(
            "stateless",
            Kind::Bool,
            "false",
            "Packets that match are not tracked: replies need a rule of their own. Only for \"allow\".",
        ),
        opt(
            "action",
            ACTION,
            "\"allow\"",
            "\"reject\" is \"drop\" that tells the sender: a TCP reset, else ICMP unreachable.",
        ),
        opt("log", Kind::Bool, "false", "New and denied connections by this rule go to the flow log."),
        opt("priority", Kind::Int(0, 65_535), "1000", "Higher goes first. 60000 is that of the built-in rules."),
    ],
);

/// `[address_set.NAME]`
pub static ADDRESS_SET: Section = plain(
    "A named set of prefixes, for `remote_address_set` in rules. Changing it takes no recompilation of rules.",
    &[
        opt("description", DESCRIPTION, "", "For people."),
        opt(
            "addresses",
            Kind::List(&Kind::Text(Text::Cidr), MAX_ADDRESSES_PER_SET),
            "[]",
            "Addresses and prefixes, of both families.",
        ),
    ],
);

/// `[port.firewall]`
pub static FIREWALL: Section = plain(
    "The port's firewall. Without this section the port has none: for uplinks and trusted ports. Established connections that stay allowed are not touched by any change.",
    &[
        opt(
            "security_groups",
            Kind::List(&Kind::Text(Text::Name), MAX_GROUPS_PER_PORT),
            "[]",
            "Its security groups. None: the defaults and the built-in rules decide alone.",
        ),
        opt("default_ingress", ACTION, "\"drop\"", "Verdict on connections towards the VM that no rule matches."),
        opt("default_egress", ACTION, "\"allow\"", "Verdict on connections from the VM that no rule matches."),
        opt("log_default", Kind::Bool, "false", "Denials by default go to the flow log."),
        opt(
            "builtin",
            Kind::Table(&BUILTIN),
            "",
            "Built-in rules, so that a VM under default deny has an address and neighbours.",
        ),
        opt(
            "allowed_ethertypes",
            Kind::List(&Kind::Int(0x0600, 0xffff), MAX_ETHERTYPES),
            "[]",
            "EtherTypes besides IPv4, IPv6 and ARP that pass, such as 0x88cc; all others are dropped.",
        ),
        opt(
            "anti_spoofing",
            Kind::Table(&ANTI_SPOOFING),
            "",
            "Which addresses the VM may use. On unless `enabled = false`: `mac` and addresses must be given.",
        ),
        opt("reject", Kind::Table(&REJECT), "", "How senders are told that they were rejected."),
        opt(
            "limits",
            Kind::Table(&LIMITS),
            "",
            "Limits of a port that is a VM of its own. A port with `vm` has the limits of that VM.",
        ),
    ],
);

static BUILTIN: Section = plain(
    "Built-in stateless rules of priority 60000.",
    &[
        opt(
            "neighbour_discovery",
            Kind::Bool,
            "true",
            "IPv6 router and neighbour solicitation and advertisement, both ways.",
        ),
        opt("multicast_listener", Kind::Bool, "true", "IPv6 multicast listener discovery, both ways."),
        opt("dhcp_client", Kind::Bool, "true", "The VM as DHCP and DHCPv6 client: requests out, answers in."),
    ],
);

static ANTI_SPOOFING: Section = plain(
    "What the VM sends must carry its own addresses: source MAC and IP addresses, those in ARP and neighbour discovery; and it offers no services that are not its own.",
    &[
        opt("enabled", Kind::Bool, "true", "Checks at all."),
        opt("mac", Kind::Text(Text::Mac), "", "The MAC address of the guest's NIC. Required when enabled."),
        opt(
            "addresses",
            Kind::List(&Kind::Text(Text::Cidr), MAX_ADDRESSES),
            "[]",
            "Addresses of the VM with that MAC address; also what `remote_group` stands for.",
        ),
        opt(
            "allowed_address_pairs",
            Kind::Tables(&ADDRESS_PAIR, MAX_ADDRESSES),
            "[]",
            "Further addresses or prefixes, perhaps with a MAC address of their own.",
        ),
        opt(
            "ipv6_link_local",
            Kind::Text(Text::OneOf(&["eui64", "any", "none"])),
            "\"eui64\"",
            "Link-local addresses that need not be listed: the one made of the MAC address, any, or none.",
        ),
        opt(
            "allow_router_advertisements",
            Kind::Bool,
            "false",
            "The VM may advertise itself as an IPv6 router, and redirect.",
        ),
        opt("allow_dhcp_server", Kind::Bool, "false", "The VM may answer DHCP requests."),
        opt("allow_dhcpv6_server", Kind::Bool, "false", "The VM may answer DHCPv6 requests."),
    ],
);

static ADDRESS_PAIR: Section = plain(
    "An address or prefix that the VM may use besides its own.",
    &[
        req("address", Kind::Text(Text::Cidr), "Address or prefix."),
        opt("mac", Kind::Text(Text::Mac), "", "The MAC address that goes with it. Absent: the port's own."),
    ],
);

static REJECT: Section = plain(
    "How senders are told that they were rejected. TCP is answered by a reset.",
    &[
        opt(
            "icmp",
            Kind::Text(Text::OneOf(&["port", "admin_prohibited"])),
            "\"port\"",
            "What ICMP says: \"port\" unreachable, or administratively prohibited.",
        ),
        opt(
            "per_second",
            RATE,
            "1000",
            "Answers per second, on average; beyond them packets are dropped silently. 0: no limit.",
        ),
        opt("burst", COUNT, "50", "Answers at once."),
    ],
);

/// `[flow_log]`
pub static FLOW_LOG: Section = plain(
    "Log of new and denied connections. Limited in rate: what goes beyond is counted, and the count written.",
    &[
        opt("enabled", Kind::Bool, "false", "Writes it."),
        opt(
            "to",
            Kind::Text(Text::OneOf(&["log", "file"])),
            "\"log\"",
            "\"log\": ferryd's own log (the journal), as target `flow` at level \"info\". \"file\": a file, one JSON object per line.",
        ),
        opt(
            "file",
            Kind::Text(Text::FilePath),
            "",
            "Path of the file, which is opened for appending, and again at each reload (for logrotate).",
        ),
        opt(
            "scope",
            Kind::Text(Text::OneOf(&["all", "marked"])),
            "\"all\"",
            "\"all\": whatever VMs with `flow_log` open and are denied. \"marked\": of that, only what rules with `log` and ports with `log_default` decide.",
        ),
        opt("new", Kind::Bool, "true", "Writes new connections."),
        opt("denied", Kind::Bool, "true", "Writes denied connections and refused frames."),
        opt("per_second", Kind::Int(1, 1_000_000), "100", "Lines per second, on average."),
        opt("burst", Kind::Int(1, 1_000_000), "200", "Lines at once."),
    ],
);

/// Keys of a port that concern the firewall.
pub const PORT_VM: Key = opt(
    "vm",
    Kind::Text(Text::Name),
    "",
    "The VM whose connection table the port's firewall uses. Absent: the port is a VM of its own, called like the port.",
);
/// The port's section.
pub const PORT_FIREWALL: Key = opt(
    "firewall",
    Kind::Table(&FIREWALL),
    "",
    "The port's firewall; none without this section. Can be changed without disturbing the guest.",
);
