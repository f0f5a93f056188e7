//! The switches under measurement. All listen on vhost-user sockets, so that the generator cannot tell them apart.
pub mod ferry;
pub mod kernel;
pub mod ovs;
pub mod testpmd;

use crate::process::Process;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Which switch, with which job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// DPDK's testpmd: from one vhost port to the other, without looking at a packet.
    TestpmdIo,
    /// The same with segmentation offload, so that frames longer than the MTU pass.
    TestpmdTso,
    /// Ferry as a learning bridge.
    FerryL2,
    /// Ferry with a stateful firewall at both ends and anti-spoofing.
    FerryFirewall,
    /// The same with rules that let all UDP pass and no anti-spoofing, for a generator that chooses addresses of its own.
    FerryFirewallOpen,
    /// OVS with DPDK, action NORMAL.
    OvsL2,
    /// OVS with DPDK, connection tracking in one zone.
    OvsCt,
    /// OVS with DPDK, connection tracking in a zone for each port, as OVN does it.
    OvsCtPerPort,
    /// OVS with DPDK, action NORMAL, with segmentation offload (`userspace-tso-enable`).
    OvsL2Tso,
    /// OVS with DPDK, connection tracking in one zone, with segmentation offload.
    OvsCtTso,
    /// The kernel's bridge.
    KernelL2,
    /// The kernel's bridge with connection tracking and nftables.
    KernelFirewall,
    /// No switch: a thread that hands the generator's buffers back ([`crate::ceiling`]).
    Turnaround,
}

impl Kind {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::TestpmdIo => "testpmd-io",
            Self::TestpmdTso => "testpmd-io-tso",
            Self::FerryL2 => "ferry-l2",
            Self::FerryFirewall => "ferry-firewall",
            Self::FerryFirewallOpen => "ferry-firewall-open",
            Self::OvsL2 => "ovs-l2",
            Self::OvsCt => "ovs-ct",
            Self::OvsCtPerPort => "ovs-ct-per-port",
            Self::OvsL2Tso => "ovs-l2-tso",
            Self::OvsCtTso => "ovs-ct-tso",
            Self::KernelL2 => "kernel-l2",
            Self::KernelFirewall => "kernel-firewall",
            Self::Turnaround => "no-switch",
        }
    }

    /// Whether it is Ferry.
    pub fn is_ferry(self) -> bool {
        matches!(self, Self::FerryL2 | Self::FerryFirewall | Self::FerryFirewallOpen)
    }

    /// Whether it is OVS.
    pub fn is_ovs(self) -> bool {
        matches!(self, Self::OvsL2 | Self::OvsCt | Self::OvsCtPerPort | Self::OvsL2Tso | Self::OvsCtTso)
    }

    /// Whether it is testpmd.
    pub fn is_testpmd(self) -> bool {
        matches!(self, Self::TestpmdIo | Self::TestpmdTso)
    }

    /// Whether it tracks connections.
    pub fn stateful(self) -> bool {
        matches!(
            self,
            Self::FerryFirewall
                | Self::FerryFirewallOpen
                | Self::OvsCt
                | Self::OvsCtPerPort
                | Self::OvsCtTso
                | Self::KernelFirewall
        )
    }

    /// What other systems' figures are divided by in the column of testpmd, the first that was measured.
    pub const TESTPMD: [Self; 2] = [Self::TestpmdIo, Self::TestpmdTso];

    /// The same of OVS, in the form that does the same job; with connections, one zone is its fastest.
    pub const OVS: [Self; 4] = [Self::OvsCt, Self::OvsCtTso, Self::OvsL2, Self::OvsL2Tso];

    /// Starts it.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub fn start(self, setup: &Setup) -> Result<Box<dyn System>> {
        use {ferry::Ferry, kernel::Kernel, ovs::Job, ovs::Ovs, testpmd::Testpmd};
        Ok(match self {
            Self::TestpmdIo => Box::new(Testpmd::start(setup, false)?),
            Self::TestpmdTso => Box::new(Testpmd::start(setup, true)?),
            Self::FerryL2 => Box::new(Ferry::start(setup, self)?),
            Self::FerryFirewall => Box::new(Ferry::start(setup, self)?),
            Self::FerryFirewallOpen => Box::new(Ferry::start(setup, self)?),
            Self::OvsL2 => Box::new(Ovs::start(setup, self, Job::Normal)?),
            Self::OvsCt => Box::new(Ovs::start(setup, self, Job::OneZone)?),
            Self::OvsCtPerPort => Box::new(Ovs::start(setup, self, Job::ZonePerPort)?),
            Self::OvsL2Tso => Box::new(Ovs::start(setup, self, Job::Normal)?),
            Self::OvsCtTso => Box::new(Ovs::start(setup, self, Job::OneZone)?),
            Self::KernelL2 => Box::new(Kernel::start(setup, false)?),
            Self::KernelFirewall => Box::new(Kernel::start(setup, true)?),
            Self::Turnaround => bail!("it has no sockets: use `ferry-perf ceiling`"),
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
    /// Whether the guests have to listen on those sockets, and it connects.
    fn dials(&self) -> bool {
        false
    }
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
