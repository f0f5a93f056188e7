//! The switches under measurement. All listen on vhost-user sockets, so that the generator cannot tell them apart.
pub mod ferry;
pub mod ovs;
pub mod testpmd;

use crate::process::Process;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Which switch, with which job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// DPDK's testpmd: from one vhost port to the other, without looking at a packet.
    TestpmdIo,
    /// Ferry as a learning bridge.
    FerryL2,
    /// Ferry with a stateful firewall at both ends and anti-spoofing.
    FerryFirewall,
    /// OVS with DPDK, action NORMAL.
    OvsL2,
    /// OVS with DPDK, connection tracking in one zone.
    OvsCt,
    /// OVS with DPDK, connection tracking in a zone for each port, as OVN does it.
    OvsCtPerPort,
}

impl Kind {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::TestpmdIo => "testpmd-io",
            Self::FerryL2 => "ferry-l2",
            Self::FerryFirewall => "ferry-firewall",
            Self::OvsL2 => "ovs-l2",
            Self::OvsCt => "ovs-ct",
            Self::OvsCtPerPort => "ovs-ct-per-port",
        }
    }

    /// Whether it is Ferry.
    pub fn is_ferry(self) -> bool {
        matches!(self, Self::FerryL2 | Self::FerryFirewall)
    }

    /// Whether it is OVS.
    pub fn is_ovs(self) -> bool {
        matches!(self, Self::OvsL2 | Self::OvsCt | Self::OvsCtPerPort)
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub fn start(self, setup: &Setup) -> Result<Box<dyn System>> {
        Ok(match self {
            Self::TestpmdIo => Box::new(testpmd::Testpmd::start(setup)?),
            Self::FerryL2 => Box::new(ferry::Ferry::start(setup, false)?),
            Self::FerryFirewall => Box::new(ferry::Ferry::start(setup, true)?),
            Self::OvsL2 => Box::new(ovs::Ovs::start(setup, ovs::Job::Normal)?),
            Self::OvsCt => Box::new(ovs::Ovs::start(setup, ovs::Job::OneZone)?),
            Self::OvsCtPerPort => Box::new(ovs::Ovs::start(setup, ovs::Job::ZonePerPort)?),
        })
    }
}

/// What every switch is told.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Folder for sockets, configuration and logs; exists.
    pub folder: PathBuf,
    /// Number of ports.
    pub ports: usize,
    /// Core of the PMD thread.
    pub switch_core: usize,
    /// Core of the generator, where everything else of the switch has to run as well.
    pub generator_core: usize,
    /// Longest IP packet, bytes.
    pub mtu: usize,
    /// Connections that a stateful switch must be able to hold.
    pub connections: u32,
    /// Rules that do not match, in front of the one that does (Ferry and OVS).
    pub rules: usize,
}

impl Setup {
    /// A folder of this name inside the setup's.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }
}

/// A running switch.
pub trait System: Send {
    /// Which one.
    fn kind(&self) -> Kind;
    /// Sockets of its ports, on which it listens.
    fn sockets(&self) -> &[PathBuf];
    /// Its main process, which has the PMD thread.
    fn process(&mut self) -> &mut Process;
    /// Connections in its tables (of all ports), if it has any.
    ///
    /// # Errors
    /// When it does not answer.
    fn connections(&mut self) -> Result<Option<u64>>;
    /// Forgets all connections.
    ///
    /// # Errors
    /// When it does not answer.
    fn flush(&mut self) -> Result<()>;
}

/// Sockets `p0.sock`, `p1.sock` ... in a folder.
pub fn socket_paths(folder: &Path, ports: usize) -> Vec<PathBuf> {
    (0..ports).map(|i| folder.join(format!("p{i}.sock"))).collect()
}
