//! DPDK's testpmd over its vhost library: moves frames from one port to the next without looking at them, the most that any
//! switch over that library can reach.
use super::{Kind, Setup, System, socket_paths};
use crate::process::Process;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// A running testpmd.
pub struct Testpmd {
    kind: Kind,
    process: Process,
    sockets: Vec<PathBuf>,
}

impl Testpmd {
    /// Starts it, forwarding; with `tso` also frames that are still to be segmented.
    ///
    /// # Errors
    /// When it is missing, or there are no huge pages.
    pub fn start(setup: &Setup, tso: bool) -> Result<Self> {
        if !setup.ports.is_multiple_of(2) {
            bail!("testpmd forwards between pairs of ports");
        }
        let kind = if tso { Kind::TestpmdTso } else { Kind::TestpmdIo };
        let folder = setup.folder(kind.name())?;
        let sockets = socket_paths(&folder, setup.ports);
        let mut c = Command::new("stdbuf");
        c.args(["-o0", "dpdk-testpmd"]);
        c.arg(format!("--lcores=0@{},1@{}", setup.generator_core, setup.switch_core));
        c.args(["--in-memory", "--no-pci", "--no-telemetry", "-m", "512"]);
        for (i, socket) in sockets.iter().enumerate() {
            // What is to be done to a frame (checksum, segmentation) stays with it only in the old way of saying so.
            let offloads = if tso { ",tso=1,legacy-ol-flags=1" } else { "" };
            c.arg(format!("--vdev=net_vhost{i},iface={},queues=1{offloads}", socket.display()));
        }
        c.args(["--", "-i", "--nb-cores=1", "--forward-mode=io", "--auto-start", "--no-mlockall", "--burst=32"]);
        c.args(["--total-num-mbufs=65536", "--no-lsc-interrupt"]);
        if setup.mtu > 1500 {
            c.arg(format!("--max-pkt-len={}", setup.mtu + 18));
        }
        let mut process = Process::start(c, &folder.join("log")).context("apt-get install dpdk-dev")?;
        process.wait_for("prompt", Duration::from_secs(30), |p| p.log().contains("testpmd> "))?;
        let wanted = sockets.clone();
        process.wait_for("sockets", Duration::from_secs(10), |_| wanted.iter().all(|s| s.exists()))?;
        Ok(Self { kind, process, sockets })
    }
}

impl System for Testpmd {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn connections(&mut self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
