//! A ferryd of one's own, configured for one of these measurements.
use crate::process::{self, Process};
use crate::system::ferry::{binary, config};
use crate::system::{Setup, socket_paths};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long anything may take that is not measured.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What it does besides switching.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// VMs have firewalls at both ends.
    pub firewall: bool,
    /// A further PMD thread on this core.
    pub second_pmd: Option<usize>,
    /// PMD threads sleep when there is nothing to do, as they do by default.
    pub sleeps: bool,
    /// Further sections of the configuration.
    pub sections: String,
}

/// A running ferryd.
#[derive(Debug)]
pub struct Switch {
    /// Its process.
    pub process: Process,
    /// Sockets of its ports.
    pub sockets: Vec<PathBuf>,
    api: PathBuf,
}

impl Switch {
    /// Starts a daemon called `name` and waits for its sockets. To be called by a thread that outlives it.
    ///
    /// # Errors
    /// When it does not come up; with its log.
    pub fn start(setup: &Setup, name: &str, extras: &Extras) -> Result<Self> {
        let folder = setup.folder.join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let (sockets, api) = (socket_paths(&folder, setup.ports), folder.join("api.sock"));
        let mut text = config(setup, extras.firewall, &api, &sockets);
        let mut change = |from: &str, to: String| {
            ensure!(text.contains(from), "the configuration has changed its form: no {from:?}");
            text = text.replacen(from, &to, 1);
            Ok(())
        };
        if extras.sleeps {
            change("idle_latency_us = 0\n", String::new())?;
        }
        if let Some(core) = extras.second_pmd {
            let pmd = "[[bridge]]\n";
            change(pmd, format!("[[switch.pmd]]\ncore = {core}\n{pmd}"))?;
        }
        text.push_str(&extras.sections);
        let file = folder.join("ferry.toml");
        fs::write(&file, text)?;
        let mut command = Command::new("taskset");
        command.args(["-c", &setup.generator_core.to_string()]);
        command.arg(binary("ferryd")?).arg("--config").arg(&file);
        let mut process = Process::start(command, &folder.join("log"))?;
        let wanted = sockets.clone();
        process.wait_for("sockets", PATIENCE, |_| wanted.iter().all(|s| s.exists()))?;
        Ok(Self { process, sockets, api })
    }

    /// What `ferry` says to this, as JSON.
    ///
    /// # Errors
    /// When it fails.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.tell(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("ferry {}: {text}", arguments.join(" ")))
    }

    /// Runs a command of `ferry`.
    ///
    /// # Errors
    /// When it fails.
    pub fn tell(&self, arguments: &[&str]) -> Result<String> {
        process::output(Command::new(binary("ferry")?).arg("--socket").arg(&self.api).args(arguments))
    }

    /// Waits until `ferry` says what is wanted.
    ///
    /// # Errors
    /// When it does not; with its last words.
    pub fn wait(&self, arguments: &[&str], what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.ask(arguments);
            match said {
                Ok(said) if is(&said) => return Ok(said),
                said => ensure!(Instant::now() < deadline, "no {what} within {PATIENCE:?}: {said:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Bytes of memory that it occupies (resident, huge pages included).
    ///
    /// # Errors
    /// When it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let kib = |key: &str| {
            let line = status.lines().find(|l| l.starts_with(key))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        let resident = kib("VmRSS:").context("VmRSS")?;
        Ok((resident + kib("HugetlbPages:").unwrap_or(0)) * 1024)
    }
}
