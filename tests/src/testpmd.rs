//! DPDK's testpmd: a second, independent implementation of the virtio driver (virtio-user), and a traffic generator.
use crate::process::Process;
use crate::scratch::unique_name;
use crate::wait;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::Path;
use std::process::{ChildStdin, Command};
use std::time::Duration;

/// A virtio-user port of testpmd's, in the driver's role on a vhost-user socket.
#[derive(Clone, Debug)]
pub struct VirtioUser {
    socket: String,
    options: Vec<String>,
    queues: u16,
}

impl VirtioUser {
    /// Split rings, one queue pair, testpmd connects. The MAC address is 52:54:00:00:01:`number`.
    pub fn new(socket: &Path, number: u8) -> Self {
        let options = vec![format!("mac=52:54:00:00:01:{number:02x}"), "queue_size=256".into()];
        Self { socket: socket.display().to_string(), options, queues: 1 }
    }

    /// Sets a further device argument (`packed_vq`, `mrg_rxbuf`, `in_order`: 0 or 1; `server=1`: testpmd listens).
    pub fn option(mut self, name: &str, value: u32) -> Self {
        self.options.push(format!("{name}={value}"));
        self
    }

    /// Number of queue pairs.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    fn device(&self, n: usize) -> String {
        format!("net_virtio_user{n},path={},queues={},{}", self.socket, self.queues, self.options.join(","))
    }
}

/// What testpmd to start.
#[derive(Clone, Debug, Default)]
pub struct TestpmdBuilder {
    devices: Vec<String>,
    queues: u16,
    arguments: Vec<String>,
}

impl TestpmdBuilder {
    /// No devices yet.
    pub fn new() -> Self {
        Self { queues: 1, ..Self::default() }
    }

    /// Adds a virtio-user port; ports are numbered in this order.
    pub fn port(mut self, port: &VirtioUser) -> Self {
        self.queues = self.queues.max(port.queues);
        self.devices.push(port.device(self.devices.len()));
        self
    }

    /// Adds any virtual device (`net_vhost0,iface=...`).
    pub fn device(mut self, device: &str) -> Self {
        self.devices.push(device.to_string());
        self
    }

    /// Adds an argument of testpmd's own (`--forward-mode=txonly`).
    pub fn arg(mut self, arg: &str) -> Self {
        self.arguments.push(arg.to_string());
        self
    }

    /// Starts testpmd and waits for its prompt. It does not forward before [`Testpmd::start`].
    ///
    /// # Errors
    /// When it ends or gives no prompt within 60 s; with its output.
    pub fn start(&self, scratch: &Path) -> Result<Testpmd> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let name = unique_name();
        // Prompts are written directly, all else through stdio: unbuffered, or the order would be lost.
        let mut c = Command::new("stdbuf");
        c.args(["-o0", "dpdk-testpmd"]);
        // Two threads, free to run on every core: pinned ones would fight over a core with the switch.
        c.arg(format!("--lcores=0@(0-{0}),1@(0-{0})", cpus - 1));
        // Ordinary memory: needs no set-up. testpmd shares it with the switch as a memfd all the same.
        c.args(["--no-pci", "--no-huge", "-m", "256", "--no-shconf", "--no-telemetry"]);
        c.arg(format!("--file-prefix={name}"));
        for d in &self.devices {
            c.arg(format!("--vdev={d}"));
        }
        c.args(["--", "-i", "--total-num-mbufs=16384", "--no-mlockall"]);
        c.arg(format!("--rxq={}", self.queues)).arg(format!("--txq={}", self.queues));
        c.args(&self.arguments);
        let log = scratch.join(format!("{name}-testpmd.log"));
        let mut process = Process::spawn_commanded(c, &log)?;
        let input = process.child().stdin.take().context("pipe")?;
        let mut t = Testpmd { process, input };
        t.prompt(0, Duration::from_secs(60)).context("testpmd does not start")?;
        Ok(t)
    }
}

/// Statistics of one testpmd port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets missed for want of buffers.
    pub rx_missed: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// A running testpmd, killed on drop.
pub struct Testpmd {
    process: Process,
    input: ChildStdin,
}

const PROMPT: &str = "testpmd> ";

impl Testpmd {
    /// Waits for the first prompt after `offset` bytes of output; returns what came in between.
    fn prompt(&mut self, offset: usize, timeout: Duration) -> Result<String> {
        let found = wait::for_some("testpmd's prompt", timeout, || {
            let log = self.process.log();
            let new = log.get(offset..).unwrap_or_default();
            match new.find(PROMPT) {
                Some(at) => Some(Ok(new[..at].to_string())),
                None => self.process.ended().map(Err),
            }
        });
        match found {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(status)) => bail!("testpmd ended with {status}:\n{}", self.process.log()),
            Err(e) => Err(e.context(self.process.log())),
        }
    }

    /// Gives a command at the prompt; returns its output.
    ///
    /// # Errors
    /// When testpmd ends or does not come back within 30 s.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let offset = self.process.log().len();
        writeln!(self.input, "{command}").context("testpmd is gone")?;
        let output = self.prompt(offset, Duration::from_secs(30))?;
        // Error messages start the line: "Bad arguments", "Command not found", "Invalid port".
        for line in output.lines() {
            if ["Bad arguments", "Command not found", "Invalid", "Error"].iter().any(|e| line.starts_with(e)) {
                bail!("testpmd: `{command}`: {line}");
            }
        }
        Ok(output)
    }

    /// Begins to forward in the mode set by `--forward-mode` or `set fwd`.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn start(&mut self) -> Result<()> {
        self.command("start").map(drop)
    }

    /// Ends forwarding.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn stop(&mut self) -> Result<()> {
        self.command("stop").map(drop)
    }

    /// Statistics of a port.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn stats(&mut self, port: u16) -> Result<PortStats> {
        let text = self.command(&format!("show port stats {port}"))?;
        parse_stats(&text).with_context(|| format!("not understood: {text}"))
    }

    /// Processor time, process id, log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn parse_stats(text: &str) -> Option<PortStats> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |name: &str, nth: usize| -> Option<u64> {
        let mut found = words.windows(2).filter(|w| w[0] == name);
        found.nth(nth)?[1].parse().ok()
    };
    Some(PortStats {
        rx_packets: after("RX-packets:", 0)?,
        rx_missed: after("RX-missed:", 0)?,
        rx_bytes: after("RX-bytes:", 0)?,
        tx_packets: after("TX-packets:", 0)?,
        tx_bytes: after("TX-bytes:", 0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_from_the_usual_table() {
        let text = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 17         RX-missed: 2          RX-bytes:  1020
  RX-errors: 0
  RX-nombuf:  0
  TX-packets: 34         TX-errors: 0          TX-bytes:  2040

  Throughput (since last show)
  Rx-pps:            0          Rx-bps:            0
";
        let expected = PortStats { rx_packets: 17, rx_missed: 2, rx_bytes: 1020, tx_packets: 34, tx_bytes: 2040 };
        assert_eq!(parse_stats(text), Some(expected));
        assert_eq!(parse_stats("Invalid port"), None);
    }
}
