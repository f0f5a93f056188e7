//! The programs that Ferry is compared with: what is there, and how it is installed.
use crate::process;
use crate::system::ovs;
use anyhow::Result;
use std::process::Command;

/// A peer.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// What it is for.
    pub role: &'static str,
    /// Debian's package.
    pub package: &'static str,
}

/// All peers.
pub const PEERS: [Peer; 4] = [
    Peer {
        role: "testpmd: DPDK's vhost library without a switch; virtio-user as second generator",
        package: "dpdk-dev",
    },
    Peer { role: "Open vSwitch with DPDK", package: "openvswitch-switch-dpdk" },
    Peer { role: "the kernel's firewall", package: "nftables" },
    Peer { role: "empties the kernel's connection table", package: "conntrack" },
];

/// Its version, if it is installed.
pub fn version(peer: &Peer) -> Option<String> {
    let arguments = ["-W", "-f", "${db:Status-Status} ${Version}", peer.package];
    let text = process::output(Command::new("dpkg-query").args(arguments)).ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

/// Versions of all that are installed.
pub fn versions() -> Vec<String> {
    PEERS.iter().filter_map(|p| version(p).map(|v| format!("{} {v}", p.package))).collect()
}

/// Installs what is missing. OVS's service is not started: the suite runs an instance of its own.
///
/// # Errors
/// When apt fails.
pub fn install() -> Result<()> {
    let missing: Vec<&str> = PEERS.iter().filter(|p| version(p).is_none()).map(|p| p.package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let apt = |arguments: &[&str]| {
        process::output(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(arguments))
    };
    let mut install = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    install.extend(&missing);
    if apt(&install).is_err() {
        // Package lists that are missing, or older than the archive.
        apt(&["update", "--quiet"])?;
        apt(&install)?;
    }
    Ok(())
}

/// One line per peer, and what else a run needs; `Err` lines are what is missing.
pub fn check() -> Vec<Result<String, String>> {
    let mut lines: Vec<Result<String, String>> = PEERS
        .iter()
        .map(|p| match version(p) {
            Some(v) => Ok(format!("{} {v} ({})", p.package, p.role)),
            None => Err(format!("{} is not installed ({})", p.package, p.role)),
        })
        .collect();
    lines.push(match ovs::vswitchd() {
        Some(path) => Ok(path.to_string()),
        None => Err("ovs-vswitchd with DPDK is not where Debian puts it".into()),
    });
    for name in ["ferryd", "ferry"] {
        lines.push(match crate::system::ferry::binary(name) {
            Ok(path) => Ok(path.display().to_string()),
            Err(e) => Err(format!("{e:#}")),
        });
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let text = format!("{cores} cores");
    lines.push(if cores >= 2 { Ok(text) } else { Err(format!("{text}: two are needed")) });
    let root = nix::unistd::geteuid().is_root();
    lines.push(if root {
        Ok("root".into())
    } else {
        Err("not root: huge pages and real-time priority need it".into())
    });
    lines
}
