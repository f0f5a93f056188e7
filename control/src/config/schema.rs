//! Every key of the configuration: its type, limits, default and meaning. One table serves the checks
//! of files and API requests, the reference `docs/CONFIG.md` and the test that the example is complete.
use ferry_dataplane::firewall::Cidr;
use ferry_dataplane::firewall::policy::{MAX_ADDRESS_SETS, MAX_GROUPS, PortRange, Protocol};
use ferry_dataplane::packet::MacAddr;
use serde_json::{Map, Value};

use super::firewall_schema::{ADDRESS_SET, FLOW_LOG, PORT_FIREWALL, PORT_VM, SECURITY_GROUP, VM};
use super::migration_schema::MIGRATION;
use super::model::{self, MAX_BRIDGES, MAX_NAME_CHARS, MAX_PMDS, MAX_PORTS};
use super::problem::Problem;

/// What a value must look like.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// An integer within bounds, both included.
    Int(i64, i64),
    /// A string.
    Text(Text),
    /// A user or group: name or number.
    Owner,
    /// A VLAN or a range of VLANs.
    Vlan,
    /// A port or a range of ports.
    Ports,
    /// A transport protocol: name or number.
    Protocol,
    /// A list of at most so many values.
    List(&'static Kind, usize),
    /// A table.
    Table(&'static Section),
    /// An array of at most so many tables.
    Tables(&'static Section, usize),
    /// A table of at most so many tables, each under a name of its own.
    Named(&'static Section, usize),
}

/// What a string must look like.
#[derive(Clone, Copy, Debug)]
pub enum Text {
    /// Name of a bridge, port, VM, group or set.
    Name,
    /// Absolute path of a Unix socket.
    SocketPath,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// File permissions.
    Mode,
    /// Address and TCP port.
    SocketAddr,
    /// An IP address.
    IpAddr,
    /// A host's name, as in its certificate.
    HostName,
    /// Absolute path of a file.
    FilePath,
    /// Absolute path of a directory.
    DirPath,
    /// A MAC address.
    Mac,
    /// An address, or a prefix without host bits.
    Cidr,
    /// Non-empty text of at most so many bytes, without control characters.
    Line(usize),
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name within its table.
    pub name: &'static str,
    /// What its value must look like.
    pub kind: Kind,
    /// Whether it must be given.
    pub required: bool,
    /// The default as written in TOML; empty: none.
    pub default: &'static str,
    /// What it means.
    pub doc: &'static str,
}

/// A table of the configuration.
#[derive(Debug)]
pub struct Section {
    /// What the table is for.
    pub doc: &'static str,
    /// Its keys.
    pub keys: &'static [Key],
    /// Further keys, depending on the value of the key `type`.
    pub variants: &'static [(&'static str, &'static [Key])],
}

pub(super) const fn opt(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    Key { name, kind, required: false, default, doc }
}
pub(super) const fn req(name: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { name, kind, required: true, default: "", doc }
}
pub(super) const fn plain(doc: &'static str, keys: &'static [Key]) -> Section {
    Section { doc, keys, variants: &[] }
}

const SPIN: Kind = Kind::Int(0, 1_000_000);
const LATENCY: Kind = Kind::Int(0, 100_000);
const DESCRIPTORS: Kind = Kind::Int(64, 32_768);

/// The whole file.
pub static ROOT: Section = plain(
    "Configuration of ferryd.",
    &[
        opt("switch", Kind::Table(&SWITCH), "", "PMD threads: the threads that move frames."),
        opt("api", Kind::Table(&API), "", "The local API, which the command `ferry` uses."),
        opt("metrics", Kind::Table(&METRICS), "", "Prometheus endpoint."),
        opt("log", Kind::Table(&LOG), "", "Logging, to standard error."),
        opt("dpdk", Kind::Table(&DPDK), "", "DPDK's environment. Used only when a port of type \"dpdk\" exists."),
        opt(
            "bridge",
            Kind::Tables(&BRIDGE, MAX_BRIDGES),
            "",
            "A learning bridge; bridges are isolated from each other.",
        ),
        opt("vm", Kind::Tables(&VM, MAX_PORTS), "", "A name under which ports share one connection table."),
        opt("security_group", Kind::Named(&SECURITY_GROUP, MAX_GROUPS), "", "A named set of firewall rules."),
        opt("address_set", Kind::Named(&ADDRESS_SET, MAX_ADDRESS_SETS), "", "A named set of prefixes."),
        opt("flow_log", Kind::Table(&FLOW_LOG), "", "Log of new and denied connections."),
        opt("migration", Kind::Table(&MIGRATION), "", "Migration of VMs' connections along with the VMs."),
        opt("port", Kind::Tables(&PORT, MAX_PORTS), "", "A port of a bridge."),
    ],
);

static SWITCH: Section = plain(
    "PMD threads: the threads that move frames.",
    &[
        opt(
            "idle_spin_us",
            SPIN,
            "50",
            "How long a PMD thread without work keeps polling before it sleeps, microseconds.",
        ),
        opt(
            "idle_latency_us",
            LATENCY,
            "1000",
            "Longest delay that a sleeping PMD thread may add to a frame, microseconds. 0: it never sleeps (lowest latency, a whole core).",
        ),
        opt(
            "pmd",
            Kind::Tables(&PMD, MAX_PMDS),
            "",
            "One PMD thread. Ports refer to it by its position, from 0. None listed: one thread, not pinned.",
        ),
    ],
);

static PMD: Section = plain(
    "One PMD thread.",
    &[
        opt("core", Kind::Int(0, 4095), "", "CPU core the thread is pinned to. Absent: not pinned."),
        opt("idle_spin_us", SPIN, "", "This thread's `switch.idle_spin_us`."),
        opt("idle_latency_us", LATENCY, "", "This thread's `switch.idle_latency_us`."),
    ],
);

static API: Section = plain(
    "The local API, which the command `ferry` uses. Changes take effect at the next start.",
    &[
        opt("socket", Kind::Text(Text::SocketPath), "\"/run/ferry/ferry.sock\"", "Path of the Unix socket."),
        opt(
            "mode",
            Kind::Text(Text::Mode),
            "\"0660\"",
            "Permissions of the socket, octal. Whoever may write to it controls the switch.",
        ),
        opt("group", Kind::Owner, "", "Group of the socket, name or number. Absent: the daemon's."),
    ],
);

static METRICS: Section = plain(
    "Prometheus endpoint. Changes take effect at the next start.",
    &[
        opt("enabled", Kind::Bool, "false", "Serves `/metrics`."),
        opt("listen", Kind::Text(Text::SocketAddr), "\"127.0.0.1:9477\"", "Address and TCP port."),
        opt(
            "allow_remote",
            Kind::Bool,
            "false",
            "Allows `listen` to be an address that other hosts reach. The endpoint has no access control of its own.",
        ),
    ],
);

static LOG: Section = plain(
    "Logging, to standard error.",
    &[
        opt(
            "level",
            Kind::Text(Text::Line(256)),
            "\"info\"",
            "Least severity that is logged: \"error\", \"warn\", \"info\", \"debug\" or \"trace\"; or a filter such as \"info,ferry_vhost=debug\".",
        ),
        opt(
            "format",
            Kind::Text(Text::OneOf(&["text", "json"])),
            "\"text\"",
            "Form of the lines. Changes take effect at the next start.",
        ),
    ],
);

static DPDK: Section = plain(
    "DPDK's environment. Used only when a port of type \"dpdk\" exists. Changes take effect at the next start.",
    &[
        opt(
            "memory",
            Kind::Text(Text::OneOf(&["auto", "hugepages", "no-huge"])),
            "\"auto\"",
            "\"hugepages\": needed for good speed with physical NICs. \"no-huge\": ordinary memory, for virtual devices and trials. \"auto\": hugepages when enough are free at the start, else ordinary memory.",
        ),
        opt(
            "memory_mb",
            Kind::Int(16, 1_048_576),
            "256",
            "Memory reserved for DPDK, MiB. A port with default settings takes 20 to 30.",
        ),
        opt(
            "pci",
            Kind::Bool,
            "true",
            "Looks for PCI devices, so that ports can name them. None is touched before a port does.",
        ),
        opt(
            "extra_args",
            Kind::List(&Kind::Text(Text::Line(256)), 64),
            "[]",
            "Further arguments for DPDK's EAL, one list entry per argument.",
        ),
    ],
);

static BRIDGE: Section = plain(
    "A learning bridge; bridges are isolated from each other.",
    &[
        req(
            "name",
            Kind::Text(Text::Name),
            "Its name: 1 to 64 letters, digits, `.`, `_`, `-`, starting with a letter or digit.",
        ),
        opt(
            "fdb_capacity",
            Kind::Int(16, 1_048_576),
            "8192",
            "Most MAC addresses learned. Beyond it frames are flooded.",
        ),
        opt(
            "fdb_ageing_s",
            Kind::Int(1, 1_000_000),
            "300",
            "After how many seconds without a frame from it a MAC address is forgotten.",
        ),
    ],
);

/// Keys of a port.
pub static PORT: Section = Section {
    doc: "A port of a bridge.",
    keys: &[
        req(
            "name",
            Kind::Text(Text::Name),
            "Its name: 1 to 64 letters, digits, `.`, `_`, `-`, starting with a letter or digit.",
        ),
        req(
            "type",
            Kind::Text(Text::OneOf(&["vhost-user", "dpdk"])),
            "\"vhost-user\": a guest's NIC. \"dpdk\": an Ethernet device, usually the uplink.",
        ),
        req("bridge", Kind::Text(Text::Name), "The bridge it belongs to. Can be changed without disturbing the guest."),
        opt("vlan", Kind::Table(&VLAN), "", "VLAN membership. Can be changed without disturbing the guest."),
        opt("admin_up", Kind::Bool, "true", "false: no frame passes in either direction."),
        opt(
            "mtu",
            Kind::Int(68, 9000),
            "1500",
            "Longest IP packet, bytes; longer frames are dropped and counted. Changing it restarts the port.",
        ),
        opt(
            "fdb_limit",
            Kind::Int(0, 1_048_576),
            "256",
            "Most MAC addresses learned behind this port, so that it cannot use up the bridge's.",
        ),
        opt(
            "rxq_affinity",
            Kind::List(&Kind::Int(0, MAX_PMDS as i64 - 1), 64),
            "[]",
            "Which PMD thread serves receive queue i: entry i, counted round again when the list is shorter. Empty: chosen by load.",
        ),
        PORT_VM,
        PORT_FIREWALL,
    ],
    variants: &[
        (
            "vhost-user",
            &[
                req("socket", Kind::Text(Text::SocketPath), "Path of the vhost-user socket."),
                opt(
                    "role",
                    Kind::Text(Text::OneOf(&["server", "client"])),
                    "\"server\"",
                    "\"server\": Ferry listens (give QEMU `reconnect=1`). \"client\": QEMU listens (`server=on`) and Ferry connects, again after every loss.",
                ),
                opt(
                    "queue_pairs",
                    Kind::Int(1, model::MAX_QUEUE_PAIRS as i64),
                    "1",
                    "Most queue pairs the guest may use.",
                ),
                opt(
                    "socket_mode",
                    Kind::Text(Text::Mode),
                    "\"0660\"",
                    "Permissions of the socket, octal. Role \"server\".",
                ),
                opt(
                    "socket_user",
                    Kind::Owner,
                    "",
                    "Owner of the socket, name or number. Role \"server\". Absent: the daemon's user.",
                ),
                opt(
                    "socket_group",
                    Kind::Owner,
                    "",
                    "Group of the socket, name or number. Role \"server\". Absent: the daemon's group.",
                ),
                opt("features", Kind::Table(&FEATURES), "", "Virtio features that are offered to the guest."),
            ],
        ),
        (
            "dpdk",
            &[
                req(
                    "device",
                    Kind::Text(Text::Line(256)),
                    "PCI address such as \"0000:3b:00.0\", or a virtual device with its arguments such as \"net_tap0,iface=ferry0\".",
                ),
                opt("rx_queues", Kind::Int(1, 64), "1", "Receive queues; frames are spread over them by RSS."),
                opt(
                    "tx_queues",
                    Kind::Int(0, 64),
                    "0",
                    "Transmit queues. 0: as many as receive queues. PMD threads share them where there are too few.",
                ),
                opt("rx_descriptors", DESCRIPTORS, "512", "Descriptors per receive queue."),
                opt("tx_descriptors", DESCRIPTORS, "512", "Descriptors per transmit queue."),
                opt(
                    "mbufs",
                    Kind::Int(0, 4_194_304),
                    "0",
                    "Packet buffers in the port's pool. 0: chosen by the queues.",
                ),
                opt("promiscuous", Kind::Bool, "true", "Receives frames for every address: a bridge needs that."),
            ],
        ),
    ],
};

/// Keys of `vlan`.
pub static VLAN: Section = plain(
    "VLAN membership. Can be changed without disturbing the guest.",
    &[
        opt(
            "mode",
            Kind::Text(Text::OneOf(&["access", "trunk", "native-tagged", "native-untagged"])),
            "\"trunk\"",
            "\"access\": untagged frames, all of VLAN `tag`. \"trunk\": frames of the VLANs in `trunks`; with none listed the port is transparent to tags. \"native-tagged\" and \"native-untagged\": a trunk whose untagged frames belong to VLAN `tag`, sent tagged or untagged.",
        ),
        opt("tag", Kind::Int(1, 4094), "", "Access or native VLAN. Required for every mode but \"trunk\"."),
        opt(
            "trunks",
            Kind::List(&Kind::Vlan, 4094),
            "[]",
            "VLANs that a trunk carries: numbers and ranges such as \"100-199\". In mode \"trunk\" 0 stands for untagged frames. Empty: all.",
        ),
    ],
);

static FEATURES: Section = plain(
    "Virtio features that are offered to the guest; the guest decides which of them it uses.",
    &[
        opt("packed", Kind::Bool, "true", "Packed virtqueues (VIRTIO_F_RING_PACKED)."),
        opt("mrg_rxbuf", Kind::Bool, "true", "Mergeable receive buffers (VIRTIO_NET_F_MRG_RXBUF)."),
        opt("indirect", Kind::Bool, "true", "Indirect descriptors (VIRTIO_F_INDIRECT_DESC)."),
        opt("event_idx", Kind::Bool, "true", "Notification suppression by event index (VIRTIO_F_EVENT_IDX)."),
        opt("in_order", Kind::Bool, "true", "Descriptors used in order (VIRTIO_F_IN_ORDER)."),
        opt("csum", Kind::Bool, "true", "Unfinished L4 checksums in both directions (VIRTIO_NET_F_CSUM, GUEST_CSUM)."),
        opt(
            "tso",
            Kind::Bool,
            "true",
            "TCP segmentation offload in both directions (VIRTIO_NET_F_HOST_TSO4/6, GUEST_TSO4/6). Needs `csum`.",
        ),
        opt(
            "guest_announce",
            Kind::Bool,
            "true",
            "The guest announces itself after a migration (VIRTIO_NET_F_GUEST_ANNOUNCE). false: Ferry announces it when QEMU asks for that.",
        ),
        opt(
            "migration",
            Kind::Bool,
            "true",
            "Dirty-page logging (VHOST_F_LOG_ALL): without it QEMU refuses to migrate the guest.",
        ),
        opt(
            "mem_slots",
            Kind::Bool,
            "true",
            "Memory hot-plug region by region (VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS).",
        ),
    ],
);

/// The name that was probably meant: one that differs in few letters, or that `wrong` begins.
pub fn did_you_mean<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |s: &str| s.to_ascii_lowercase().replace('-', "_");
    let wrong = plain(wrong);
    let (distance, best) = known
        .map(|k| {
            let begun = wrong.len() >= 3 && plain(k).starts_with(&wrong);
            (if begun { 1 } else { strsim::damerau_levenshtein(&wrong, &plain(k)) }, k)
        })
        .min()?;
    (distance <= (best.len() / 3).clamp(1, 3)).then_some(best)
}

/// Checks a value tree against a table of the schema and adds what is wrong with it.
pub fn check_section(section: &'static Section, value: &Map<String, Value>, path: &str, problems: &mut Vec<Problem>) {
    let chosen = value.get("type").and_then(Value::as_str);
    let variant = section.variants.iter().find(|(name, _)| Some(*name) == chosen).map(|(_, keys)| *keys);
    let known = || section.keys.iter().chain(variant.unwrap_or_default());
    for (name, v) in value {
        let at = join(path, name);
        if let Some(key) = known().find(|k| k.name == name) {
            check_value(&key.kind, v, &at, problems);
            continue;
        }
        let elsewhere =
            section.variants.iter().find(|(_, keys)| keys.iter().any(|k| k.name == name)).map(|(variant, _)| *variant);
        problems.push(match (elsewhere, chosen) {
            (Some(_), None) => continue, // the missing or wrong `type` is reported instead
            (Some(other), Some(own)) if variant.is_some() => Problem::key(
                at,
                format!("`{name}` is a key of ports of type \"{other}\", this one is of type \"{own}\""),
                "remove the key, or change `type`",
            ),
            (Some(_), Some(_)) => continue,
            _ => {
                let fix = match did_you_mean(name, known().map(|k| k.name)) {
                    Some(k) => format!("did you mean `{k}`?"),
                    None => format!("known here: {}", known().map(|k| k.name).collect::<Vec<_>>().join(", ")),
                };
                Problem::key(at, format!("unknown key `{name}`"), fix)
            }
        });
    }
    for key in known().filter(|k| k.required && !value.contains_key(k.name)) {
        problems.push(Problem::value(
            join(path, key.name),
            format!("the key `{}` is missing", key.name),
            format!("add it: {}", key.doc),
        ));
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn describe(value: &Value) -> String {
    let text = match value {
        Value::Null => "null".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a table".to_owned(),
        v => v.to_string(),
    };
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

/// Checks one value.
pub fn check_value(kind: &Kind, value: &Value, path: &str, problems: &mut Vec<Problem>) {
    let mut wrong = |what: String, fix: &str| problems.push(Problem::value(path, what, fix));
    match (kind, value) {
        (Kind::Bool, Value::Bool(_)) => {}
        (Kind::Bool, v) => {
            wrong(format!("must be true or false, is {}", describe(v)), "write true or false, without quotes")
        }
        (Kind::Int(min, max), v) => match v.as_i64() {
            Some(n) if (*min..=*max).contains(&n) => {}
            _ if v.is_i64() || v.is_u64() => wrong(
                format!("must be {min} to {max}, is {}", describe(v)),
                &format!("give a number from {min} to {max}"),
            ),
            _ => wrong(
                format!("must be a whole number, is {}", describe(v)),
                &format!("give a number from {min} to {max}, without quotes"),
            ),
        },
        (Kind::Text(text), Value::String(s)) => {
            if let Some((what, fix)) = check_text(text, s) {
                wrong(what, &fix);
            }
        }
        (Kind::Text(_), v) => wrong(format!("must be a string, is {}", describe(v)), "put it in quotes"),
        (Kind::Owner, Value::String(s)) => {
            if s.is_empty() || s.len() > 64 || s.contains(|c: char| c.is_control() || c == ':' || c == '/') {
                wrong(format!("{} is not a user or group name", describe(value)), "give a name or a number");
            }
        }
        (Kind::Owner, v) if v.as_u64().is_some_and(|n| n < u64::from(u32::MAX)) => {}
        (Kind::Owner, v) => {
            wrong(format!("must be a name or a number, is {}", describe(v)), "give a name in quotes or a number")
        }
        (Kind::Vlan, v) => {
            let item: Option<model::VlanItem> = serde_json::from_value(v.clone()).ok();
            if item.and_then(|i| i.bounds()).is_none() {
                wrong(
                    format!("{} is not a VLAN or a range of VLANs", describe(v)),
                    "give a number from 0 to 4094, or a range such as \"100-199\"",
                );
            }
        }
        (Kind::Ports, v) => {
            if serde_json::from_value::<PortRange>(v.clone()).is_err() {
                wrong(
                    format!("{} is not a port or a range of ports", describe(v)),
                    "give a number from 0 to 65535, or a range such as \"8000-8099\", the lower end first",
                );
            }
        }
        (Kind::Protocol, v) => {
            if serde_json::from_value::<Protocol>(v.clone()).is_err() {
                wrong(
                    format!("{} is not a protocol", describe(v)),
                    "give \"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"sctp\", \"gre\", \"any\" ..., or a number from 0 to 255",
                );
            }
        }
        (Kind::List(of, max), Value::Array(items)) => {
            if items.len() > *max {
                wrong(format!("has {} entries, at most {max} are allowed", items.len()), "shorten the list");
                return;
            }
            for (i, item) in items.iter().enumerate() {
                check_value(of, item, &format!("{path}[{i}]"), problems);
            }
        }
        (Kind::List(..), v) => wrong(format!("must be a list, is {}", describe(v)), "put it in square brackets"),
        (Kind::Table(section), Value::Object(map)) => check_section(section, map, path, problems),
        (Kind::Table(_), v) => {
            wrong(format!("must be a table, is {}", describe(v)), &format!("write [{path}] or {{ ... }}"))
        }
        (Kind::Tables(section, max), Value::Array(items)) => {
            if items.len() > *max {
                wrong(format!("has {} entries, at most {max} are allowed", items.len()), "remove some");
                return;
            }
            for (i, item) in items.iter().enumerate() {
                let at = format!("{path}[{i}]");
                match item {
                    Value::Object(map) => check_section(section, map, &at, problems),
                    v => problems.push(Problem::value(
                        at,
                        format!("must be a table, is {}", describe(v)),
                        format!("write [[{path}]]"),
                    )),
                }
            }
        }
        (Kind::Named(section, max), Value::Object(map)) => {
            if map.len() > *max {
                wrong(format!("has {} entries, at most {max} are allowed", map.len()), "remove some");
                return;
            }
            for (name, item) in map {
                let at = format!("{path}.{name}");
                if let Some((what, fix)) = check_text(&Text::Name, name) {
                    problems.push(Problem::key(&at, what, fix));
                }
                match item {
                    Value::Object(map) => check_section(section, map, &at, problems),
                    v => problems.push(Problem::value(
                        at,
                        format!("must be a table, is {}", describe(v)),
                        format!("write [{path}.NAME]"),
                    )),
                }
            }
        }
        (Kind::Named(..), v) => wrong(
            format!("must be a table of tables, is {}", describe(v)),
            &format!("write [{path}.NAME], with single brackets, once per entry"),
        ),
        (Kind::Tables(..), v) => wrong(
            format!("must be an array of tables, is {}", describe(v)),
            &format!("write [[{path}]], with double brackets, once per entry"),
        ),
    }
}

fn check_text(text: &Text, s: &str) -> Option<(String, String)> {
    let shown = describe(&Value::from(s));
    match text {
        Text::Name => (!is_name(s)).then(|| {
            let what = format!("{shown} is not a valid name");
            let fix =
                format!("use 1 to {MAX_NAME_CHARS} letters, digits, '.', '_' or '-', starting with a letter or digit");
            (what, fix)
        }),
        Text::SocketPath => {
            // sockaddr_un.sun_path: 108 bytes with the terminating zero.
            let fix = |t: &str| t.to_owned();
            if !s.starts_with('/') {
                Some((format!("{shown} is not an absolute path"), fix("start it with '/'")))
            } else if s.len() > 107 {
                let what = format!("the path has {} bytes, a Unix socket's has at most 107", s.len());
                Some((what, fix("choose a shorter path")))
            } else if s.ends_with('/') || s.contains(char::is_control) || s.split('/').any(|c| c == "..") {
                Some((format!("{shown} is not the path of a socket"), fix("name a file, without '..' in its path")))
            } else {
                None
            }
        }
        Text::FilePath => {
            let bad = !s.starts_with('/') || s.ends_with('/') || s.len() > 4095 || s.contains(char::is_control);
            bad.then(|| (format!("{shown} is not the absolute path of a file"), "start it with '/'".to_owned()))
        }
        Text::DirPath => {
            let bad = !s.starts_with('/') || s.len() > 4000 || s.contains(char::is_control);
            bad.then(|| (format!("{shown} is not the absolute path of a directory"), "start it with '/'".to_owned()))
        }
        Text::IpAddr => s
            .parse::<std::net::IpAddr>()
            .is_err()
            .then(|| (format!("{shown} is not an address"), "write it as \"192.0.2.1\" or \"2001:db8::1\"".to_owned())),
        Text::HostName => ferry_migrate::pki::host_name(s)
            .err()
            .map(|e| (e.to_string(), "write a name as certificates have it, such as \"host-a\"".to_owned())),
        Text::Mac => s
            .parse::<MacAddr>()
            .is_err()
            .then(|| (format!("{shown} is not a MAC address"), "write it as \"52:54:00:12:34:56\"".to_owned())),
        Text::Cidr => s.parse::<Cidr>().err().map(|e| {
            let fix = "write an address or a prefix, such as \"192.0.2.7\", \"192.0.2.0/24\" or \"2001:db8::/32\"";
            (e.to_string(), fix.to_owned())
        }),
        Text::OneOf(words) => (!words.contains(&s)).then(|| {
            let list = words.iter().map(|w| format!("\"{w}\"")).collect::<Vec<_>>().join(", ");
            let fix = match did_you_mean(s, words.iter().copied()) {
                Some(w) => format!("did you mean \"{w}\"?"),
                None => format!("use one of {list}"),
            };
            (format!("must be one of {list}, is {shown}"), fix)
        }),
        Text::Mode => model::FileMode::parse(s)
            .is_none()
            .then(|| (format!("{shown} is not an octal mode"), "write it as \"0660\"".to_owned())),
        Text::SocketAddr => s
            .parse::<std::net::SocketAddr>()
            .is_err()
            .then(|| (format!("{shown} is not an address with port"), "write it as \"127.0.0.1:9477\"".to_owned())),
        Text::Line(max) => (s.is_empty() || s.len() > *max || s.contains(char::is_control)).then(|| {
            (format!("must be 1 to {max} bytes without control characters, is {shown}"), "change the text".to_owned())
        }),
    }
}

/// True for a valid name of a bridge, port, VM, security group or address set.
pub fn is_name(s: &str) -> bool {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    s.len() <= MAX_NAME_CHARS && s.starts_with(|c: char| c.is_ascii_alphanumeric()) && s.chars().all(safe)
}

/// Stands in [`all_keys`] for the name that an entry of a [`Kind::Named`] has.
pub const ANY_NAME: &str = "NAME";

/// Every key as `(path, key)`, tables before their keys. Paths look like `port.vlan.tag`.
pub fn all_keys() -> Vec<(String, &'static Key, Option<&'static str>)> {
    let mut out = Vec::new();
    walk(&ROOT, "", None, &mut out);
    out
}

fn walk(
    section: &'static Section,
    path: &str,
    variant: Option<&'static str>,
    out: &mut Vec<(String, &'static Key, Option<&'static str>)>,
) {
    let own = section.keys.iter().map(|k| (k, variant));
    let more = section.variants.iter().flat_map(|(name, keys)| keys.iter().map(|k| (k, Some(*name))));
    for (key, variant) in own.chain(more) {
        let at = join(path, key.name);
        out.push((at.clone(), key, variant));
        match key.kind {
            Kind::Table(s) | Kind::Tables(s, _) => walk(s, &at, variant, out),
            Kind::Named(s, _) => walk(s, &format!("{at}.{ANY_NAME}"), variant, out),
            _ => {}
        }
    }
}

/// The reference of all keys as Markdown (`docs/CONFIG.md`).
pub fn reference_markdown() -> String {
    use std::fmt::Write as _;
    let mut out = String::from(
        "# Configuration reference\n\n\
         Generated by `ferry config reference`. An annotated example is `etc/ferry.toml.example`.\n\
         Check a file with `ferry config check FILE`.\n",
    );
    let mut tables: Vec<(String, &'static Section, bool)> = Vec::new();
    for key in ROOT.keys {
        match key.kind {
            Kind::Table(s) => tables.push((key.name.to_owned(), s, false)),
            Kind::Tables(s, _) => tables.push((key.name.to_owned(), s, true)),
            Kind::Named(s, _) => tables.push((format!("{}.{ANY_NAME}", key.name), s, false)),
            _ => {}
        }
    }
    while !tables.is_empty() {
        let (path, section, array) = tables.remove(0);
        let head = if array { format!("[[{path}]]") } else { format!("[{path}]") };
        let _ = write!(out, "\n## `{head}`\n\n{}\n", section.doc);
        let mut nested = Vec::new();
        let mut table = |title: Option<&str>, keys: &'static [Key]| {
            if let Some(t) = title {
                let _ = write!(out, "\nFor `type = \"{t}\"`:\n");
            }
            out.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
            for key in keys {
                let default = match (key.required, key.default) {
                    (true, _) => "required".to_owned(),
                    (false, "") => "-".to_owned(),
                    (false, d) => format!("`{d}`"),
                };
                let _ = writeln!(out, "| `{}` | {} | {default} | {} |", key.name, kind_text(&key.kind), key.doc);
                match key.kind {
                    Kind::Table(s) => nested.push((format!("{path}.{}", key.name), s, false)),
                    Kind::Tables(s, _) => nested.push((format!("{path}.{}", key.name), s, true)),
                    Kind::Named(s, _) => nested.push((format!("{path}.{}.{ANY_NAME}", key.name), s, false)),
                    _ => {}
                }
            }
        };
        table(None, section.keys);
        for (name, keys) in section.variants {
            table(Some(name), keys);
        }
        tables.splice(0..0, nested);
    }
    out
}

fn kind_text(kind: &Kind) -> String {
    match kind {
        Kind::Bool => "true, false".to_owned(),
        Kind::Int(min, max) => format!("{min} to {max}"),
        Kind::Text(Text::Name) => "name".to_owned(),
        Kind::Text(Text::SocketPath) => "absolute path".to_owned(),
        Kind::Text(Text::OneOf(words)) => words.iter().map(|w| format!("`\"{w}\"`")).collect::<Vec<_>>().join(", "),
        Kind::Text(Text::Mode) => "octal string".to_owned(),
        Kind::Text(Text::SocketAddr) => "address:port".to_owned(),
        Kind::Text(Text::Line(_)) => "string".to_owned(),
        Kind::Text(Text::FilePath | Text::DirPath) => "absolute path".to_owned(),
        Kind::Text(Text::IpAddr) => "address".to_owned(),
        Kind::Text(Text::HostName) => "host name".to_owned(),
        Kind::Text(Text::Mac) => "MAC address".to_owned(),
        Kind::Text(Text::Cidr) => "address or prefix".to_owned(),
        Kind::Owner => "name or number".to_owned(),
        Kind::Ports => "port or range".to_owned(),
        Kind::Protocol => "protocol name or number".to_owned(),
        Kind::Named(_, max) => format!("up to {max} tables"),
        Kind::Vlan => "VLAN or range".to_owned(),
        Kind::List(of, max) => format!("list of up to {max}: {}", kind_text(of)),
        Kind::Table(_) => "table".to_owned(),
        Kind::Tables(_, max) => format!("up to {max} tables"),
    }
}
