//! Ferry itself: the daemon as it is shipped, told what to do by a configuration file.
use super::{Kind, Setup, System, socket_paths};
use crate::frame::Station;
use crate::process::{self, Process};
use crate::stream::ANSWERER_PORT;
use anyhow::{Context, Result, bail};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A running ferryd.
pub struct Ferry {
    kind: Kind,
    process: Process,
    sockets: Vec<PathBuf>,
    api: PathBuf,
    ports: usize,
}

/// A binary of Ferry's: in `FERRY_BIN_DIR`, else beside this program.
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("FERRY_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe()?.parent().context("own folder")?.to_path_buf(),
    };
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `cargo build --release -p ferry-control` (or set FERRY_BIN_DIR)", path.display());
    }
    Ok(path)
}

/// What the ports' firewalls let pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firewall {
    /// There are none.
    Off,
    /// Connections from station to station, to the answerer's ports.
    On,
    /// Connections from any address to any port.
    Open,
}

impl From<bool> for Firewall {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

/// The configuration: port `n` belongs to station `n`.
pub fn config(setup: &Setup, firewall: impl Into<Firewall>, api: &Path, sockets: &[PathBuf]) -> String {
    let firewall = firewall.into();
    let (firewall, open) = (firewall != Firewall::Off, firewall == Firewall::Open);
    let mut t = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        t,
        "[api]\nsocket = {api:?}\n[log]\nlevel = \"warn\"\n[switch]\nidle_latency_us = 0\n\
         [[switch.pmd]]\ncore = {}\n[[bridge]]\nname = \"br0\"\n",
        setup.switch_core
    );
    if firewall {
        // Rules that match nothing that is sent come first.
        for i in 0..setup.rules {
            let _ = write!(
                t,
                "[[security_group.perf.rules]]\ndirection = \"ingress\"\nprotocol = \"tcp\"\nports = [{}]\n\
                 remote_cidr = \"172.{}.{}.0/24\"\npriority = 2000\n",
                1 + i % 4000,
                16 + i / 256 % 16,
                i % 256
            );
        }
        let first = if open { 1 } else { ANSWERER_PORT };
        for protocol in ["udp", "tcp"] {
            let _ = write!(
                t,
                "[[security_group.perf.rules]]\ndirection = \"ingress\"\nprotocol = \"{protocol}\"\n\
                 ports = [\"{first}-65535\"]\n"
            );
        }
    }
    for (i, socket) in sockets.iter().enumerate() {
        let station = Station::new(i as u8 + 1);
        if firewall {
            let _ = write!(
                t,
                "[[vm]]\nname = \"vm{i}\"\nconnections = {0}\nlimits = {{ max_connections = {0} }}\n\
                 tracking = {{ tcp_loose = false }}\n",
                (setup.connections + setup.connections / 4).max(4096)
            );
        }
        let _ = write!(
            t,
            "[[port]]\nname = \"p{i}\"\ntype = \"vhost-user\"\nbridge = \"br0\"\nsocket = {socket:?}\nmtu = {}\n",
            setup.mtu
        );
        if open {
            let _ = write!(
                t,
                "vm = \"vm{i}\"\n[port.firewall]\nsecurity_groups = [\"perf\"]\nanti_spoofing = {{ enabled = false }}\n"
            );
        } else if firewall {
            let _ = write!(
                t,
                "vm = \"vm{i}\"\n[port.firewall]\nsecurity_groups = [\"perf\"]\n\
                 anti_spoofing = {{ mac = \"{}\", addresses = [\"{}\", \"{}\"] }}\n",
                station.mac_text(),
                station.ipv4_text(),
                station.ipv6_text()
            );
        }
    }
    t
}

impl Ferry {
    /// Starts the daemon and waits for its sockets.
    ///
    /// # Errors
    /// When it does not come up; with its log.
    pub fn start(setup: &Setup, kind: Kind) -> Result<Self> {
        let folder = setup.folder(kind.name())?;
        let sockets = socket_paths(&folder, setup.ports);
        let api = folder.join("api.sock");
        let file = folder.join("ferry.toml");
        let firewall = match kind {
            Kind::FerryFirewallOpen => Firewall::Open,
            _ => kind.stateful().into(),
        };
        std::fs::write(&file, config(setup, firewall, &api, &sockets))?;
        let mut command = Command::new("taskset");
        // Everything but the PMD thread, which pins itself, stays with the generator's core.
        command.args(["-c", &setup.generator_core.to_string()]);
        command.arg(binary("ferryd")?).arg("--config").arg(&file);
        let mut process = Process::start(command, &folder.join("log"))?;
        let wanted = sockets.clone();
        process.wait_for("sockets", Duration::from_secs(30), |_| wanted.iter().all(|s| s.exists()))?;
        Ok(Self { kind, process, sockets, api, ports: setup.ports })
    }

    fn cli(&self, arguments: &[&str]) -> Result<String> {
        process::output(Command::new(binary("ferry")?).arg("--socket").arg(&self.api).args(arguments))
    }
}

impl System for Ferry {
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
        if !self.kind.stateful() {
            return Ok(None);
        }
        let text = self.cli(&["conntrack", "stats", "--json"])?;
        let value: serde_json::Value = serde_json::from_str(&text).context("ferry conntrack stats --json")?;
        let vms = value["vms"].as_array().context("no list of VMs")?;
        Ok(Some(vms.iter().filter_map(|v| v["stats"]["connections"].as_u64()).sum()))
    }

    fn flush(&mut self) -> Result<()> {
        if self.kind.stateful() {
            for i in 0..self.ports {
                self.cli(&["conntrack", "flush", &format!("vm{i}")])?;
            }
        }
        Ok(())
    }
}
