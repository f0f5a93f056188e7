//! Network namespaces with an agent inside.
use crate::agent::Agent;
use crate::guest;
use crate::process::{self, Process};
use crate::scratch::unique_name;
use anyhow::{Context, Result};
use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

/// Bound for configuration commands.
const QUICK: Duration = Duration::from_secs(20);

/// A network namespace, removed on drop together with the interfaces in it. Needs root.
pub struct Netns {
    name: String,
    agent: Agent,
    agent_process: Option<Process>,
}

impl Deref for Netns {
    type Target = Agent;
    fn deref(&self) -> &Agent {
        &self.agent
    }
}

/// Runs `ip` with these arguments.
///
/// # Errors
/// When it fails.
pub fn ip(args: &[&str]) -> Result<String> {
    let mut c = Command::new("ip");
    c.args(args);
    process::run(c, QUICK)
}

impl Netns {
    /// Makes a namespace with `lo` up, and starts an agent in it whose messages go to a file in `scratch`.
    ///
    /// # Errors
    /// When this is not allowed, or the agent does not start.
    pub fn new(scratch: &Path) -> Result<Self> {
        let name = unique_name();
        ip(&["netns", "add", &name]).context("network namespaces need root")?;
        let mut ns = Self { agent: Agent::new(&name), name, agent_process: None };
        ip(&["-n", &ns.name, "link", "set", "lo", "up"])?;
        // As in the guests: addresses are usable at once.
        ns.run("sh", &["-c", "for s in all default; do for k in accept_dad dad_transmits; do echo 0 > /proc/sys/net/ipv6/conf/$s/$k; done; done"])?;
        let image = guest::image()?;
        let agent = ns.command(&image.agent.to_string_lossy());
        let mut process = Process::spawn_piped(agent, &scratch.join(format!("{}.log", ns.name)))?;
        let input = process.child().stdin.take().context("pipe")?;
        let output = process.child().stdout.take().context("pipe")?;
        let (sender, ready) = channel();
        ns.agent.attach(output, Box::new(input), Some(sender));
        ns.agent_process = Some(process);
        ready.recv_timeout(QUICK).context("namespace's agent does not answer")?;
        Ok(ns)
    }

    /// The namespace's name, for `ip -n`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.name, program]);
        c
    }

    /// Runs a command in the namespace to its end, at most 20 s.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut c = self.command(program);
        c.args(args);
        process::run(c, QUICK)
    }

    /// Moves an interface from here into another namespace.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn give(&self, interface: &str, to: &Netns) -> Result<()> {
        ip(&["-n", &self.name, "link", "set", interface, "netns", &to.name]).map(drop)
    }

    /// Makes a veth pair: `here` in this namespace, `there` in the other; both up.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn veth(&self, here: &str, to: &Netns, there: &str) -> Result<()> {
        ip(&["-n", &self.name, "link", "add", here, "type", "veth", "peer", "name", there, "netns", &to.name])?;
        ip(&["-n", &self.name, "link", "set", here, "up"])?;
        ip(&["-n", &to.name, "link", "set", there, "up"]).map(drop)
    }

    /// Whether an interface exists here.
    pub fn has_interface(&self, name: &str) -> bool {
        ip(&["-n", &self.name, "link", "show", "dev", name]).is_ok()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.agent_process = None;
        if let Err(e) = ip(&["netns", "delete", &self.name]) {
            eprintln!("{e:#}");
        }
    }
}
