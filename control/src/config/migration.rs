//! The configuration's part on flow-state migration: who this host is, whom it knows, what is allowed.
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ferry_migrate::authz::RuleConfig;
use ferry_migrate::compress::CompressMode;
use ferry_migrate::message::WhenLate;
use ferry_migrate::pki::CredentialFiles;
use serde::{Deserialize, Serialize};

/// Most hosts that one host knows.
pub const MAX_PEERS: usize = 1024;

/// `[migration]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationConfig {
    /// Whether VMs' connections migrate at all.
    pub enabled: bool,
    /// This host's name: that of its certificate. Absent: the machine's host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Where hosts that send VMs connect to. Absent: VMs only leave this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Local address to connect from, e.g. of a network for migrations alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind: Option<IpAddr>,
    /// Directory with `trust.pem`, `revoked.pem` and `HOST.pem`, as `ferry pki` names them.
    pub pki: PathBuf,
    /// An operator's own authority: certificates of authorities. Takes the place of `pki`, with the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust: Option<PathBuf>,
    /// This host's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Revocation lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revocations: Option<PathBuf>,
    /// Every attempt, grant, refusal and outcome is written here.
    pub audit_log: PathBuf,
    /// Whether migrations may begin when that cannot be written.
    pub audit_on_failure: AuditOnFailure,
    /// Longest that QEMU waits for the final delta, milliseconds.
    pub hold_limit_ms: u32,
    /// How long late frames are redirected, milliseconds.
    pub redirect_ms: u32,
    /// A round begins so long after the last one though QEMU has begun none, milliseconds.
    pub round_interval_ms: u32,
    /// Cap of all state transfer together, Mbit/s; 0: none. The final delta is not capped.
    pub bandwidth_mbps: u32,
    /// When records are compressed.
    pub compression: CompressMode,
    /// Hosts that VMs may go to.
    pub peer: Vec<PeerConfig>,
    /// Which VMs may go where and come from where; what no rule allows is denied.
    pub rule: Vec<RuleConfig>,
}

/// What to do when the audit log cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuditOnFailure {
    /// No migration begins.
    #[default]
    Refuse,
    /// Migrations go on; missing lines are counted.
    Allow,
}

/// `[[migration.peer]]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConfig {
    /// Its name: that of its certificate.
    pub host: String,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Default for MigrationConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            host: None,
            listen: None,
            bind: None,
            pki: "/etc/ferry/pki".into(),
            trust: None,
            certificate: None,
            key: None,
            revocations: None,
            audit_log: "/var/lib/ferry/audit.log".into(),
            audit_on_failure: AuditOnFailure::default(),
            hold_limit_ms: 50,
            redirect_ms: 5000,
            round_interval_ms: 1000,
            bandwidth_mbps: 0,
            compression: CompressMode::default(),
            peer: Vec::new(),
            rule: Vec::new(),
        }
    }
}

impl MigrationConfig {
    /// This host's name, in lower case as names of certificates and their files are.
    pub fn host_name(&self) -> String {
        let machine = || nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()).unwrap_or_default();
        self.host.clone().unwrap_or_else(machine).to_ascii_lowercase()
    }

    /// Where this host's credentials are.
    pub fn credentials(&self) -> CredentialFiles {
        match (&self.trust, &self.certificate, &self.key) {
            (Some(trust), Some(certificate), Some(key)) => CredentialFiles {
                trust: trust.clone(),
                certificate: certificate.clone(),
                key: key.clone(),
                revocations: self.revocations.clone(),
            },
            _ => CredentialFiles::in_directory(&self.pki, &self.host_name()),
        }
    }

    /// The peer of this name.
    pub fn peer(&self, host: &str) -> Option<&PeerConfig> {
        self.peer.iter().find(|p| p.host.eq_ignore_ascii_case(host))
    }
}

/// What a VM says about its migrations: keys of `[[vm]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmMigrationConfig {
    /// What becomes of it when its connections do not all arrive in time.
    pub when_late: WhenLateConfig,
    /// It may come at any time that a rule allows; otherwise only after `ferry migrate expect`.
    pub expect: bool,
    /// A monitor of its QEMU (not the one that libvirt uses), by which its memory rounds are checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
}

impl Default for VmMigrationConfig {
    fn default() -> Self {
        Self { when_late: WhenLateConfig::default(), expect: true, qmp: None }
    }
}

/// [`WhenLate`] as it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenLateConfig {
    /// It goes with what has arrived.
    #[default]
    FailOpen,
    /// It begins without any connection.
    FailClosed,
}

impl From<WhenLateConfig> for WhenLate {
    fn from(config: WhenLateConfig) -> Self {
        match config {
            WhenLateConfig::FailOpen => Self::FailOpen,
            WhenLateConfig::FailClosed => Self::FailClosed,
        }
    }
}
