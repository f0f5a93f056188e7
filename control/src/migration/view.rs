//! Migrations as the API tells of them and `ferry migrate` shows them.
use serde::{Deserialize, Serialize};

/// One migration of a VM's connections as one host sees it: under way, or ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationView {
    /// The VM.
    pub vm: String,
    /// Id that both hosts share, 32 hexadecimal digits; empty before there is a channel.
    pub id: String,
    /// `source` or `destination`.
    pub role: String,
    /// Source: `active`, `pre-copy`, `frozen`, `redirecting`, `gone`. Destination: `empty`, `staging`, `committed`, `active`.
    pub state: String,
    /// The other host, by its certificate; empty while unknown.
    pub peer: String,
    /// How often the channel was set up.
    pub attempt: u32,
    /// When it began, milliseconds since 1970.
    pub began_at_ms: u64,
    /// When it ended; absent: under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    /// Connections: at the source those of the table, at the destination those staged.
    pub connections: u64,
    /// Rounds that have ended, in order.
    pub rounds: Vec<RoundView>,
    /// How far the source is; absent unless it is copying.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<EstimateView>,
    /// Bytes of records on the wire, after compression.
    pub wire_bytes: u64,
    /// The same before compression.
    pub raw_bytes: u64,
    /// Memory rounds that the dirty log showed.
    pub memory_rounds: u64,
    /// What QEMU's monitor told, where one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuView>,
    /// From the VM's stop to the destination's acknowledgement of the final delta, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_delta_ms: Option<f64>,
    /// How long QEMU's last GET_VRING_BASE was held, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_ms: Option<f64>,
    /// How the VM began at the destination: `complete`, `lagging`, `partial`, `empty`, `unconfirmed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub began: Option<String>,
    /// Connections that the destination refused: not the VM's addresses.
    pub refused_connections: u64,
    /// Connections that found no room at the destination.
    pub dropped_connections: u64,
    /// Frames that came late and were redirected (source) or delivered (destination).
    pub late_frames: u64,
    /// How it ended: `migrated`, `cancelled`, `failed`, `refused`; empty: under way.
    pub outcome: String,
    /// What happened last, in words.
    pub text: String,
}

/// One round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RoundView {
    /// Its number, from 0.
    pub round: u32,
    /// It was the final delta.
    #[serde(rename = "final")]
    pub last: bool,
    /// Records sent: new, changed and lagging connections, and deletions. At the destination: connections staged after it.
    pub entries: u64,
    /// New and changed connections among them.
    pub changed: u64,
    /// Deletions.
    pub deleted: u64,
    /// Connections of which only time, windows or counters changed.
    pub lagging: u64,
    /// Connections that changed and were held back.
    pub held_back: u64,
    /// Bytes, before compression.
    pub bytes: u64,
    /// From its beginning to its acknowledgement, milliseconds.
    pub duration_ms: u64,
}

/// How far a source is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EstimateView {
    /// Connections that round 0 has not reached yet, about.
    pub walk_left: u64,
    /// Records that a round would send now.
    pub entries_left: u64,
    /// Their bytes.
    pub bytes_left: u64,
    /// Connections that changed in meaning per second, in the last round.
    pub dirty_per_s: u64,
    /// Records of the final delta if the VM stopped now.
    pub final_entries: u64,
    /// Their bytes.
    pub final_bytes: u64,
    /// How long the final delta would take, milliseconds; 0: not known yet.
    pub final_ms: u64,
}

/// What QEMU's monitor told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QemuView {
    /// Status of QEMU's migration.
    pub status: String,
    /// Memory round.
    pub pass: u64,
    /// The rounds seen in the dirty log agree with QEMU's.
    pub agrees: bool,
    /// Memory left, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining_bytes: Option<u64>,
    /// Speed, Mbit/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mbps: Option<f64>,
    /// Downtime that it expects, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ms: Option<u64>,
    /// Downtime that is allowed, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Downtime that there was, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Why the monitor is of no use, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A VM that was announced by `ferry migrate expect`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExpectedView {
    /// The VM.
    pub vm: String,
    /// The only host it may come from; absent: any that the rules allow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Until when, milliseconds since 1970.
    pub until_ms: u64,
}

/// `GET /v1/migrations`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationsView {
    /// The latest migration of each VM that had one.
    pub migrations: Vec<MigrationView>,
    /// VMs that are expected.
    pub expected: Vec<ExpectedView>,
}

/// `GET /v1/migration`: this host's part in migrations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostView {
    /// Migrations are switched on.
    pub enabled: bool,
    /// This host's name, as its certificate says.
    pub host: String,
    /// Where it listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Whole days until its certificate expires.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_days_left: Option<i64>,
    /// Hosts that VMs may go to, with their addresses.
    pub peers: Vec<(String, String)>,
    /// Connections refused by the listener, by reason; reasons that never occurred are left out.
    pub refused: Vec<(String, u64)>,
    /// Number of the audit log's last line.
    pub audit_lines: u64,
    /// Lines of the audit log that could not be written.
    pub audit_lost_lines: u64,
    /// What is wrong, if anything.
    pub problems: Vec<String>,
}

/// `POST /v1/migrations/VM/check`: what a migration would meet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckView {
    /// The VM.
    pub vm: String,
    /// The host it is to go to.
    pub to: String,
    /// Nothing would fail.
    pub ok: bool,
    /// All that was looked at, in order.
    pub items: Vec<CheckItem>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckItem {
    /// What: e.g. `certificate`, `authorization here`, `port vm1-1`.
    pub what: String,
    /// `ok`, `warning` or `failed`.
    pub verdict: String,
    /// What was found.
    pub found: String,
    /// What to do; empty when nothing.
    pub fix: String,
}
