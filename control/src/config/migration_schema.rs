//! Keys of flow-state migration.
use ferry_migrate::authz::{MAX_PATTERN_BYTES, MAX_RULES};

use super::migration::MAX_PEERS;
use super::schema::{Key, Kind, Section, Text, opt, plain, req};

/// Longest time that QEMU's answer is held for the final delta, milliseconds: its monitor is blocked meanwhile.
pub const MAX_HOLD_LIMIT_MS: u32 = 10_000;
/// Longest time that late frames are redirected, milliseconds.
pub const MAX_REDIRECT_MS: u32 = 600_000;
/// Shortest and longest time between rounds that QEMU has not asked for, milliseconds.
pub const ROUND_INTERVAL_MS: (u32, u32) = (10, 60_000);
/// Highest cap of the bandwidth, Mbit/s.
pub const MAX_BANDWIDTH_MBPS: u32 = 1_000_000;

const PATTERN: Kind = Kind::Text(Text::Line(MAX_PATTERN_BYTES));
const FILE: Kind = Kind::Text(Text::FilePath);

/// `[migration]`
pub static MIGRATION: Section = plain(
    "Migration of VMs' connections along with the VMs. Changes take effect at once; migrations that are under way go on as they began.",
    &[
        opt("enabled", Kind::Bool, "false", "Connections migrate. false: a VM that migrates arrives without any."),
        opt(
            "host",
            Kind::Text(Text::HostName),
            "",
            "This host's name: that of its certificate. Absent: the machine's host name.",
        ),
        opt(
            "listen",
            Kind::Text(Text::SocketAddr),
            "",
            "Address and TCP port that hosts which send VMs connect to. Absent: VMs only leave this host.",
        ),
        opt(
            "bind",
            Kind::Text(Text::IpAddr),
            "",
            "Local address to connect from, such as that of a network for migrations alone. Absent: the system chooses.",
        ),
        opt(
            "pki",
            Kind::Text(Text::DirPath),
            "\"/etc/ferry/pki\"",
            "Directory with `trust.pem`, `revoked.pem` and `HOST.pem`, as `ferry pki` makes them.",
        ),
        opt(
            "trust",
            FILE,
            "",
            "An operator's own authority: file with the certificates of authorities (PEM). In place of `pki`, together with `certificate` and `key`.",
        ),
        opt(
            "certificate",
            FILE,
            "",
            "File with this host's certificate, then those between it and the authority (PEM). Its first DNS name is the host's name.",
        ),
        opt(
            "key",
            FILE,
            "",
            "File with the certificate's private key, not encrypted (PEM, mode 0600). An Ed25519 key: the audit log is signed with it, too.",
        ),
        opt(
            "revocations",
            FILE,
            "",
            "File with revocation lists (PEM). Only beside `trust`; absent: nothing is revoked.",
        ),
        opt(
            "audit_log",
            FILE,
            "\"/var/lib/ferry/audit.log\"",
            "Signed log of every attempt, grant, refusal and outcome; made with its directory where they are missing.",
        ),
        opt(
            "audit_on_failure",
            Kind::Text(Text::OneOf(&["refuse", "allow"])),
            "\"refuse\"",
            "When the audit log cannot be written: \"refuse\": no migration begins. \"allow\": migrations go on, missing lines are counted.",
        ),
        opt(
            "hold_limit_ms",
            Kind::Int(0, MAX_HOLD_LIMIT_MS as i64),
            "50",
            "Longest that QEMU waits for the final delta when the VM has stopped, milliseconds. Then `when_late` of the VM decides.",
        ),
        opt(
            "redirect_ms",
            Kind::Int(0, MAX_REDIRECT_MS as i64),
            "5000",
            "How long frames that still arrive here for a VM that has gone are sent after it, milliseconds.",
        ),
        opt(
            "round_interval_ms",
            Kind::Int(ROUND_INTERVAL_MS.0 as i64, ROUND_INTERVAL_MS.1 as i64),
            "1000",
            "A round begins at the latest so long after the one before, though QEMU has begun none, milliseconds.",
        ),
        opt(
            "bandwidth_mbps",
            Kind::Int(0, MAX_BANDWIDTH_MBPS as i64),
            "0",
            "Cap of all transfer of connections together, Mbit/s. 0: none. The final delta is not capped.",
        ),
        opt(
            "compression",
            Kind::Text(Text::OneOf(&["off", "adaptive", "always"])),
            "\"adaptive\"",
            "Compression of connections on their way. \"adaptive\": while it is measured to save time.",
        ),
        opt("peer", Kind::Tables(&PEER, MAX_PEERS), "", "A host that VMs may go to."),
        opt(
            "rule",
            Kind::Tables(&RULE, MAX_RULES),
            "",
            "Which VMs may go where and come from where. The first rule that fits decides; what none allows is denied.",
        ),
    ],
);

static PEER: Section = plain(
    "A host that VMs may go to. A rule must allow it, too.",
    &[
        req("host", Kind::Text(Text::HostName), "Its name: that of its certificate."),
        req("address", Kind::Text(Text::SocketAddr), "Address and TCP port where it listens."),
    ],
);

static RULE: Section = plain(
    "Which VMs may go where and come from where. Both hosts ask their own rules, in order: the first that fits VM, peer and role decides; what none allows is denied.",
    &[
        opt("name", PATTERN, "", "Name for logs and explanations. Absent: its position, \"rule 1\"."),
        req("vm", PATTERN, "VM names: `*` stands for any characters, `?` for one."),
        req("peer", PATTERN, "The other host's name, likewise."),
        req(
            "roles",
            Kind::List(&Kind::Text(Text::OneOf(&["send", "receive"])), 2),
            "\"send\": the VM may go there. \"receive\": it may come from there.",
        ),
        opt("verdict", Kind::Text(Text::OneOf(&["allow", "deny"])), "\"allow\"", "What the rule says."),
    ],
);

/// Keys of a VM that concern its migration.
pub const VM_MIGRATION: Key =
    opt("migration", Kind::Table(&VM_SECTION), "", "How its connections migrate. Can be changed at any time.");

static VM_SECTION: Section = plain(
    "How a VM's connections migrate.",
    &[
        opt(
            "when_late",
            Kind::Text(Text::OneOf(&["fail-open", "fail-closed"])),
            "\"fail-open\"",
            "What becomes of it when its connections do not all arrive within `migration.hold_limit_ms`. \"fail-open\": it begins with those that have; TCP connections that the rules allow are picked up mid-stream for a while. \"fail-closed\": it begins without any.",
        ),
        opt(
            "expect",
            Kind::Bool,
            "true",
            "It may come at any time that a rule allows. false: only after `ferry migrate expect`.",
        ),
        opt(
            "qmp",
            Kind::Text(Text::SocketPath),
            "",
            "Socket of a monitor of its QEMU (not the one that libvirt uses), by which its memory rounds are checked and shown.",
        ),
    ],
);
