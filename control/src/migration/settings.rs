//! The configuration as migrations use it.
use std::collections::BTreeMap;
use std::net::IpAddr;

use ferry_dataplane::conntrack::Timeouts;
use ferry_migrate::announce::MacAddr;
use ferry_migrate::authz::{Authorization, AuthzError};
use ferry_migrate::destination::DestinationLimits;
use ferry_migrate::message::Name;
use ferry_migrate::source::SourceLimits;

use crate::config::{Config, MigrationConfig, PortConfig, VmMigrationConfig};

/// The fence after a hand-over that was taken back must outlast what the destination believes; see the machines' documentation.
const FENCE_MS: u64 = 45;

/// How often the channel is set up during one migration of QEMU's, half a second apart: a switch that is restarted is back by then.
const ATTEMPTS: u32 = 40;

/// What migrations need to know of the configuration.
#[derive(Default)]
pub struct Settings {
    /// `[migration]`
    pub config: MigrationConfig,
    /// This host's name.
    pub host: Name,
    /// Its rules.
    pub authorization: Authorization,
    /// VMs by name.
    pub vms: BTreeMap<String, VmSettings>,
}

/// A VM.
#[derive(Clone, Debug)]
pub struct VmSettings {
    /// How it migrates.
    pub migration: VmMigrationConfig,
    /// Nothing that arrives lives longer.
    pub timeouts: Timeouts,
    /// Connections its table holds.
    pub capacity: u32,
    /// Its ports by name.
    pub ports: BTreeMap<String, PortSettings>,
}

/// A port of a VM.
#[derive(Clone, Debug)]
pub struct PortSettings {
    /// MTU, bytes.
    pub mtu: u16,
    /// The VM's MAC address there, if it is configured.
    pub mac: Option<MacAddr>,
    /// Its addresses: those that stand for one host.
    pub addresses: Vec<IpAddr>,
    /// VLANs in which it is announced; `None`: untagged.
    pub vlans: Vec<Option<u16>>,
    /// Guest memory writes can be logged: without that QEMU does not migrate.
    pub can_log: bool,
}

impl Settings {
    /// # Errors
    /// The first rule that cannot be used.
    pub fn new(config: &Config) -> Result<Self, AuthzError> {
        let migration = &config.migration;
        let authorization = Authorization::new(&migration.rule)?;
        let vms = config.vms().into_iter().map(|(name, vm)| {
            let ports = config.ports_of(&name).map(|p| (p.name.clone(), PortSettings::new(p))).collect();
            let timeouts = vm.tracking.timeouts;
            (name, VmSettings { migration: vm.migration, timeouts, capacity: vm.connections, ports })
        });
        Ok(Self {
            host: Name::lossy(&migration.host_name()),
            config: migration.clone(),
            authorization,
            vms: vms.collect(),
        })
    }

    /// The source's bounds.
    pub fn source_limits(&self) -> SourceLimits {
        let hold_limit_ms = u64::from(self.config.hold_limit_ms);
        SourceLimits {
            hold_limit_ms,
            fence_ms: FENCE_MS.min(hold_limit_ms),
            final_lagging_ms: (hold_limit_ms * 2) / 5,
            round_interval_ms: u64::from(self.config.round_interval_ms),
            redirect_ms: u64::from(self.config.redirect_ms),
            attempts: ATTEMPTS,
            ..SourceLimits::default()
        }
    }

    /// The destination's bounds.
    pub fn destination_limits(&self) -> DestinationLimits {
        DestinationLimits {
            redirect_ms: u64::from(self.config.redirect_ms) * 2,
            // The number of the port comes before each frame.
            frame_bytes: DestinationLimits::default().frame_bytes + 1,
            ..DestinationLimits::default()
        }
    }
}

impl PortSettings {
    fn new(port: &PortConfig) -> Self {
        let spoof = port.firewall.as_ref().map(|f| &f.anti_spoofing);
        let single = |cidr: &ferry_dataplane::firewall::Cidr| cidr.is_host().then(|| cidr.network());
        let migrates = match &port.kind {
            crate::config::PortKind::VhostUser(v) => v.features.migration,
            crate::config::PortKind::Dpdk(_) => false,
        };
        Self {
            mtu: port.mtu,
            mac: spoof.and_then(|s| s.mac).map(|m| m.octets()),
            addresses: spoof.map(|s| s.addresses.iter().filter_map(single).collect()).unwrap_or_default(),
            vlans: port.vlan.announced(),
            can_log: migrates,
        }
    }
}
