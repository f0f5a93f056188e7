//! The switch under test: its configuration, its process, and its command-line tool as the only way to ask it.
use crate::netns::Netns;
use crate::paths;
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Bound for the daemon's start and end, and for every command.
const PATIENCE: Duration = Duration::from_secs(30);

/// A port of the switch, as configuration text.
#[derive(Clone, Debug)]
pub struct Port {
    name: String,
    keys: BTreeMap<String, String>,
}

impl Port {
    fn new(name: &str, kind: &str) -> Self {
        Self { name: name.into(), keys: BTreeMap::new() }.text("type", kind).text("bridge", "br0")
    }

    /// A vhost-user port on bridge br0; the switch listens.
    pub fn vhost(name: &str, socket: &Path) -> Self {
        Self::new(name, "vhost-user").text("socket", &socket.display().to_string())
    }

    /// A DPDK port on bridge br0.
    pub fn dpdk(name: &str, device: &str) -> Self {
        Self::new(name, "dpdk").text("device", device)
    }

    /// The switch connects instead of listening.
    pub fn connects(self) -> Self {
        self.text("role", "client")
    }

    /// Sets a key to a text value.
    pub fn text(self, key: &str, value: &str) -> Self {
        self.key(key, &format!("{value:?}"))
    }

    /// Sets a key to a value written as in the configuration file.
    pub fn key(mut self, key: &str, value: &str) -> Self {
        self.keys.insert(key.into(), value.into());
        self
    }

    /// Untagged member of one VLAN.
    pub fn access(self, vlan: u16) -> Self {
        self.key("vlan", &format!("{{ mode = \"access\", tag = {vlan} }}"))
    }

    /// Tagged member of these VLANs.
    pub fn trunk(self, vlans: &[u16]) -> Self {
        self.key("vlan", &format!("{{ mode = \"trunk\", trunks = {vlans:?} }}"))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Which switch to start.
#[derive(Clone, Debug)]
pub struct FerrydBuilder {
    bridges: Vec<String>,
    ports: Vec<Port>,
    pmds: usize,
    namespace: Option<String>,
    sections: String,
}

impl Default for FerrydBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl FerrydBuilder {
    /// One bridge, br0; one PMD thread that is not pinned.
    pub fn new() -> Self {
        Self { bridges: vec!["br0".into()], ports: Vec::new(), pmds: 1, namespace: None, sections: String::new() }
    }

    /// Adds a bridge.
    pub fn bridge(mut self, name: &str) -> Self {
        self.bridges.push(name.into());
        self
    }

    /// Adds a port.
    pub fn port(mut self, port: Port) -> Self {
        self.ports.push(port);
        self
    }

    /// Appends sections, written as in the configuration file.
    pub fn sections(mut self, text: &str) -> Self {
        self.sections += text;
        self.sections += "\n";
        self
    }

    /// Sets the number of PMD threads.
    pub fn pmds(mut self, count: usize) -> Self {
        self.pmds = count;
        self
    }

    /// Runs the daemon in a namespace, where its DPDK devices then appear and with which they vanish.
    pub fn namespace(mut self, ns: &Netns) -> Self {
        self.namespace = Some(ns.name().into());
        self
    }

    fn config(&self, api: &Path) -> String {
        let mut t = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "[api]\nsocket = {:?}\n[log]\nlevel = \"debug\"\n[dpdk]\nmemory = \"no-huge\"\nmemory_mb = 128\npci = false",
            api.display().to_string()
        );
        for _ in 0..self.pmds {
            t += "[[switch.pmd]]\n";
        }
        for b in &self.bridges {
            let _ = writeln!(t, "[[bridge]]\nname = {b:?}");
        }
        t += &self.sections;
        for p in &self.ports {
            let _ = writeln!(t, "[[port]]\nname = {:?}", p.name);
            for (k, v) in &p.keys {
                let _ = writeln!(t, "{k} = {v}");
            }
        }
        t
    }

    /// Starts the daemon in a folder of its own and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up; with its log.
    pub fn start(self) -> Result<Ferryd> {
        let scratch = Scratch::new()?;
        let api = scratch.join("api.sock");
        let mut ferryd = Ferryd { builder: self, process: None, api, scratch };
        ferryd.write_config()?;
        ferryd.launch()?;
        Ok(ferryd)
    }
}

/// Counters of one receive queue, or of all queues together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RxStats {
    /// Frames received.
    pub frames: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Frames that reached an output.
    pub forwarded: u64,
    /// Fragments kept until their datagram was complete.
    pub held: u64,
    /// Frames dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
}

impl RxStats {
    /// Frames dropped for whatever reason.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }

    fn add(&mut self, other: &RxStats) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.forwarded += other.forwarded;
        self.held += other.held;
        for (reason, n) in &other.dropped {
            *self.dropped.entry(reason.clone()).or_default() += n;
        }
    }

    /// `received = forwarded + held + dropped`.
    pub fn balanced(&self) -> bool {
        self.frames == self.forwarded + self.held + self.dropped_total()
    }
}

/// What left through a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TxStats {
    /// Frames.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
    /// Copies refused, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// Counters of one port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PortStats {
    /// Port name.
    pub port: String,
    /// By receive queue.
    pub rx: Vec<RxStats>,
    /// Out.
    pub tx: TxStats,
}

impl PortStats {
    /// All receive queues together.
    pub fn received(&self) -> RxStats {
        let mut sum = RxStats::default();
        self.rx.iter().for_each(|q| sum.add(q));
        sum
    }
}

/// What `ferry stats --json` tells, as far as tests look at it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Stats {
    /// By port.
    pub ports: Vec<PortStats>,
    /// Frames that the switch made itself.
    #[serde(default)]
    pub originated: RxStats,
    /// Ports of the past.
    #[serde(default)]
    pub removed: RxStats,
}

impl Stats {
    /// A port's counters; all zero when there is no such port.
    pub fn port(&self, name: &str) -> PortStats {
        self.ports.iter().find(|p| p.port == name).cloned().unwrap_or_default()
    }

    /// Everything that came in.
    pub fn total(&self) -> RxStats {
        let mut sum = RxStats::default();
        self.ports.iter().flat_map(|p| &p.rx).chain([&self.originated, &self.removed]).for_each(|q| sum.add(q));
        sum
    }

    fn balanced(&self) -> bool {
        let queues = self.ports.iter().flat_map(|p| &p.rx);
        queues.chain([&self.originated, &self.removed]).all(RxStats::balanced)
    }
}

/// A running switch. Killed on drop; its log is shown when the test fails.
pub struct Ferryd {
    builder: FerrydBuilder,
    process: Option<Process>,
    api: PathBuf,
    scratch: Scratch,
}

impl Ferryd {
    /// Its folder: a place for the guests' sockets, too, but see [`FerrydBuilder::start`]: ports are named before.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// Path of the API's socket.
    pub fn api(&self) -> &Path {
        &self.api
    }

    /// Path of the configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.scratch.join("ferry.toml")
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.join("ferryd.log")
    }

    fn write_config(&self) -> Result<()> {
        fs::write(self.config_path(), self.builder.config(&self.api)).context("configuration file")
    }

    fn launch(&mut self) -> Result<()> {
        let program = paths::binary("ferryd")?;
        let mut c = match &self.builder.namespace {
            Some(ns) => {
                let mut c = Command::new("ip");
                c.args(["netns", "exec", ns]).arg(program);
                c
            }
            None => Command::new(program),
        };
        c.arg("--config").arg(self.config_path());
        let mut process = Process::spawn(c, &self.log_path())?;
        let up = wait::until("ferryd's API", PATIENCE, || process.ended().is_some() || self.stats().is_ok());
        let ended = process.ended();
        self.process = Some(process);
        up.with_context(|| self.log())?;
        if let Some(status) = ended {
            bail!("ferryd ended with {status}:\n{}", self.log());
        }
        Ok(())
    }

    /// What it logged so far, all starts together.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// The daemon's process.
    ///
    /// # Errors
    /// When it was stopped.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("ferryd was stopped")
    }

    /// Kills it at once, as a crash would (SIGKILL).
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again with the same configuration.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.launch()
    }

    /// Asks it to end (SIGTERM) and waits for a clean end.
    ///
    /// # Errors
    /// When it does not end in time, or not with status 0.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("ferryd was stopped")?;
        process.signal(libc::SIGTERM);
        let status = process.wait(PATIENCE).with_context(|| self.log())?;
        if !status.success() {
            bail!("ferryd ended with {status}:\n{}", self.log());
        }
        Ok(())
    }

    /// Runs `ferry ARGS...`; returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn ferry(&self, args: &[&str]) -> Result<String> {
        let mut c = Command::new(paths::binary("ferry")?);
        c.arg("--socket").arg(&self.api).args(args);
        process::run(c, PATIENCE)
    }

    /// Runs `ferry ARGS... --json`; returns the JSON it printed.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.ferry(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("ferry {args:?}: no JSON: {text}"))
    }

    /// All counters.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn stats(&self) -> Result<Stats> {
        let value = self.json(&["stats"])?;
        serde_json::from_value(value.clone()).with_context(|| format!("unknown form of statistics: {value}"))
    }

    /// A port's state (`up`, `down`, `waiting`, `connected`, `fault`).
    ///
    /// # Errors
    /// When there is no such port.
    pub fn port_state(&self, name: &str) -> Result<String> {
        let ports = self.json(&["port", "list"])?;
        let list = ports.as_array().or_else(|| ports.get("ports")?.as_array()).context("no list of ports")?;
        let port = list.iter().find(|p| p["name"] == name).with_context(|| format!("no port {name}"))?;
        let state = port.get("state").with_context(|| format!("no state: {port}"))?;
        Ok(state.as_str().or_else(|| state.get("state")?.as_str()).context("state is no text")?.to_string())
    }

    /// Waits until ports are in a state.
    ///
    /// # Errors
    /// When one is not within 30 s.
    pub fn wait_state(&self, ports: &[&str], state: &str) -> Result<()> {
        for p in ports {
            let mut last = String::new();
            wait::until(&format!("port {p} {state}"), PATIENCE, || {
                last = self.port_state(p).unwrap_or_else(|e| format!("{e:#}"));
                last == state
            })
            .with_context(|| format!("last seen: {last}"))?;
        }
        Ok(())
    }

    /// Adds a port at run time: the configuration file is changed and reloaded.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn add_port(&mut self, port: Port) -> Result<()> {
        self.builder.ports.push(port);
        self.reload()
    }

    /// Removes a port at run time.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn remove_port(&mut self, name: &str) -> Result<()> {
        self.builder.ports.retain(|p| p.name != name);
        self.reload()
    }

    /// Replaces a port's configuration at run time.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn change_port(&mut self, port: Port) -> Result<()> {
        for p in &mut self.builder.ports {
            if p.name == port.name {
                *p = port.clone();
            }
        }
        self.reload()
    }

    /// Replaces the sections given to [`FerrydBuilder::sections`] at run time.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn change_sections(&mut self, text: &str) -> Result<()> {
        self.builder.sections = format!("{text}\n");
        self.reload()
    }

    fn reload(&self) -> Result<()> {
        self.write_config()?;
        self.ferry(&["reload"]).map(drop)
    }

    /// Checks that the switch accounts for every frame: on every queue, received = forwarded + dropped by reason. Returns the
    /// counters. Frames that are just on their way are given 10 s to arrive.
    ///
    /// # Errors
    /// When the ledger does not balance.
    pub fn check_ledger(&self) -> Result<Stats> {
        let mut last = Stats::default();
        let balanced = wait::until("balanced ledger", Duration::from_secs(10), || match self.stats() {
            Ok(s) => {
                last = s;
                last.balanced()
            }
            Err(_) => false,
        });
        balanced.with_context(|| format!("{last:#?}"))?;
        Ok(last)
    }
}

impl Drop for Ferryd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(80).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            eprintln!("--- ferryd\n{}\n---", tail.join("\n"));
        }
        self.process = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_text() {
        let b = FerrydBuilder::new()
            .pmds(2)
            .bridge("br1")
            .port(Port::vhost("vm1", Path::new("/x/vm1.sock")).connects().access(7).key("queue_pairs", "2"))
            .port(Port::dpdk("up", "net_tap0,iface=f0").trunk(&[7, 9]).text("bridge", "br1"));
        let expected = r#"[api]
socket = "/x/api"
[log]
level = "debug"
[dpdk]
memory = "no-huge"
memory_mb = 128
pci = false
[[switch.pmd]]
[[switch.pmd]]
[[bridge]]
name = "br0"
[[bridge]]
name = "br1"
[[port]]
name = "vm1"
bridge = "br0"
queue_pairs = 2
role = "client"
socket = "/x/vm1.sock"
type = "vhost-user"
vlan = { mode = "access", tag = 7 }
[[port]]
name = "up"
bridge = "br1"
device = "net_tap0,iface=f0"
type = "dpdk"
vlan = { mode = "trunk", trunks = [7, 9] }
"#;
        assert_eq!(b.config(Path::new("/x/api")), expected);
    }

    #[test]
    fn a_ledger_balances_only_when_every_frame_has_one_fate() {
        let q = |frames, forwarded, dropped| RxStats {
            frames,
            forwarded,
            dropped: [("same_port".to_string(), dropped)].into(),
            ..RxStats::default()
        };
        let stats = |rx| Stats { ports: vec![PortStats { rx, ..PortStats::default() }], ..Stats::default() };
        assert!(stats(vec![q(5, 4, 1), q(0, 0, 0)]).balanced());
        assert!(!stats(vec![q(5, 4, 0), q(4, 4, 1)]).balanced(), "errors of two queues do not cancel out");
        assert_eq!(stats(vec![q(5, 4, 1), q(2, 1, 1)]).total(), q(7, 5, 2));
    }
}
