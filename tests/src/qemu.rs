//! QEMU guests: built, booted, driven through their agent, killed on drop.
use crate::agent::Agent;
use crate::guest;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::wait;
use anyhow::{Context, Result, anyhow};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Bound for a boot. Emulated guests need 2 s on an idle machine; this one is for machines that are anything but.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

/// QEMU's role on a vhost-user socket; the switch has the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// QEMU connects, and reconnects every second.
    Client,
    /// QEMU listens, and waits for the switch before it starts.
    Server,
}

/// One virtio-net device over vhost-user.
#[derive(Clone, Debug)]
pub struct Nic {
    /// Socket path.
    pub socket: PathBuf,
    /// Who connects.
    pub role: Role,
    /// Queue pairs.
    pub queues: u16,
    /// MAC address.
    pub mac: String,
    /// Packed rings.
    pub packed: bool,
    /// Checksum and segmentation offloads, both directions.
    pub offloads: bool,
    /// Mergeable receive buffers.
    pub mrg_rxbuf: bool,
    /// MTU told to the guest.
    pub host_mtu: Option<u16>,
    /// Further device properties (`rx_queue_size=1024`).
    pub properties: Vec<String>,
}

impl Nic {
    /// A plain NIC (split rings, one queue pair, all offloads, QEMU connects) with MAC 52:54:00:00:00:`number`.
    pub fn new(socket: impl Into<PathBuf>, number: u8) -> Self {
        Self {
            socket: socket.into(),
            role: Role::Client,
            queues: 1,
            mac: format!("52:54:00:00:00:{number:02x}"),
            packed: false,
            offloads: true,
            mrg_rxbuf: true,
            host_mtu: None,
            properties: Vec::new(),
        }
    }

    /// Adds this NIC's arguments.
    fn arguments(&self, n: usize, command: &mut Command) {
        let role = match self.role {
            Role::Client => ",reconnect=1",
            Role::Server => ",server=on",
        };
        command.arg("-chardev").arg(format!("socket,id=vc{n},path={}{role}", self.socket.display()));
        let queues = if self.queues > 1 { format!(",queues={}", self.queues) } else { String::new() };
        command.arg("-netdev").arg(format!("vhost-user,id=vn{n},chardev=vc{n}{queues}"));
        // vectors=0: with MSI-X this QEMU crashes under TCG and vhost-user when the guest's driver starts.
        let mut device = format!("virtio-net-pci,id=nic{n},netdev=vn{n},mac={},romfile=,rombar=0,vectors=0", self.mac);
        if self.packed {
            device += ",packed=on";
        }
        if self.queues > 1 {
            device += ",mq=on";
        }
        if !self.offloads {
            for feature in [
                "csum",
                "gso",
                "guest_csum",
                "guest_tso4",
                "guest_tso6",
                "guest_ecn",
                "guest_ufo",
                "host_tso4",
                "host_tso6",
                "host_ecn",
                "host_ufo",
            ] {
                device += &format!(",{feature}=off");
            }
        }
        if !self.mrg_rxbuf {
            device += ",mrg_rxbuf=off";
        }
        if let Some(mtu) = self.host_mtu {
            device += &format!(",host_mtu={mtu}");
        }
        for p in &self.properties {
            device += &format!(",{p}");
        }
        command.arg("-device").arg(device);
    }
}

/// What guest to boot.
#[derive(Clone, Debug)]
pub struct GuestBuilder {
    name: String,
    memory_mb: u32,
    max_memory_mb: Option<u32>,
    nics: Vec<Nic>,
    incoming: bool,
    extra: Vec<String>,
}

impl GuestBuilder {
    /// A guest with 128 MB and one CPU per queue pair. The name appears in messages and file names.
    pub fn new(name: &str) -> Self {
        let name = name.to_string();
        Self { name, memory_mb: 128, max_memory_mb: None, nics: Vec::new(), incoming: false, extra: Vec::new() }
    }

    /// Memory in MB; 80 is the least.
    pub fn memory_mb(mut self, mb: u32) -> Self {
        self.memory_mb = mb;
        self
    }

    /// Allows memory hot-add (two slots) up to a total in MB.
    pub fn max_memory_mb(mut self, mb: u32) -> Self {
        self.max_memory_mb = Some(mb);
        self
    }

    /// Adds a NIC; the guest calls them eth0, eth1 ... in this order.
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// Starts as the destination of a live migration (`-incoming defer`).
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// Adds an argument of QEMU's.
    pub fn arg(mut self, arg: &str) -> Self {
        self.extra.push(arg.to_string());
        self
    }

    fn command(&self, image: &guest::Image, dir: &Path) -> Command {
        let mut c = Command::new("qemu-system-x86_64");
        let accel = std::env::var("FERRY_TEST_ACCEL").unwrap_or_else(|_| "tcg".into());
        c.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35", "-accel", &accel]);
        // Not a multiple of 256 KiB: for such memory QEMU before 9.0 takes a path that forgets, under TCG, to track pages again
        // after a migration round has copied them, and the guest dies of stale memory on the destination (fixed by "system/physmem:
        // Fix migration dirty bitmap coherency with TCG memory access").
        let m = format!("{}k", u64::from(self.memory_mb) * 1024 + 8);
        match self.max_memory_mb {
            Some(max) => c.arg("-m").arg(format!("{m},slots=2,maxmem={max}M")),
            None => c.arg("-m").arg(&m),
        };
        c.arg("-object").arg(format!("memory-backend-memfd,id=ram0,size={m},share=on"));
        c.args(["-machine", "memory-backend=ram0"]);
        let cpus = self.nics.iter().map(|n| n.queues).max().unwrap_or(1).clamp(1, 8);
        c.arg("-smp").arg(cpus.to_string());
        c.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        c.args([
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check memhp_default_state=online",
        ]);
        c.arg("-chardev").arg(format!("file,id=console,path={},append=on", dir.join("console.log").display()));
        c.args(["-serial", "chardev:console"]);
        c.arg("-chardev").arg(format!("socket,id=agent,path={},server=on,wait=off", dir.join("agent.sock").display()));
        c.args(["-serial", "chardev:agent"]);
        for n in 0..2 {
            c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", dir.join(format!("qmp{n}")).display()));
        }
        for (n, nic) in self.nics.iter().enumerate() {
            nic.arguments(n, &mut c);
        }
        if self.incoming {
            c.args(["-incoming", "defer"]);
        }
        c.args(&self.extra);
        c
    }

    /// Starts QEMU with its files in a fresh folder below `scratch`, and does not wait for the guest.
    ///
    /// # Errors
    /// When the image cannot be built or QEMU cannot be started.
    pub fn launch(&self, scratch: &Path) -> Result<Guest> {
        let image = guest::image()?;
        let dir = tempfile::Builder::new().prefix(&format!("{}-", self.name)).tempdir_in(scratch)?.keep();
        let process = Process::spawn(self.command(&image, &dir), &dir.join("qemu.log"))?;
        Ok(Guest { name: self.name.clone(), process, dir, agent: Agent::new(&self.name) })
    }

    /// Boots a guest and waits until its agent is ready. One failed boot is forgiven: it happens under heavy load.
    ///
    /// # Errors
    /// When two boots failed; tells QEMU's messages and the guest's console.
    pub fn boot(&self, scratch: &Path) -> Result<Guest> {
        let mut guest = self.launch(scratch)?;
        match guest.wait_ready(BOOT_TIMEOUT) {
            Ok(()) => Ok(guest),
            Err(first) => {
                eprintln!("{}: second attempt after: {first:#}", self.name);
                drop(guest);
                let mut guest = self.launch(scratch)?;
                guest.wait_ready(BOOT_TIMEOUT)?;
                Ok(guest)
            }
        }
    }
}

/// Boots several guests at the same time.
///
/// # Errors
/// When one of them does not boot.
pub fn boot_all<const N: usize>(guests: [GuestBuilder; N], scratch: &Path) -> Result<[Guest; N]> {
    guest::image()?;
    let booted: Result<Vec<Guest>> = std::thread::scope(|scope| {
        let threads: Vec<_> = guests.iter().map(|g| scope.spawn(|| g.boot(scratch))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| anyhow!("boot thread panicked"))?).collect()
    });
    booted?.try_into().map_err(|_| anyhow!("guest count"))
}

/// A QEMU process with a guest in it. Killed on drop; its console is shown when the test fails.
pub struct Guest {
    name: String,
    process: Process,
    dir: PathBuf,
    agent: Agent,
}

impl Deref for Guest {
    type Target = Agent;
    fn deref(&self) -> &Agent {
        &self.agent
    }
}

impl Guest {
    /// Waits until the agent reports for duty.
    ///
    /// # Errors
    /// When QEMU ends or the agent is silent for `timeout`; with console and QEMU's messages.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let start = Instant::now();
        let (sender, ready) = channel();
        self.attach_agent(timeout, Some(sender)).map_err(|e| self.explain(e))?;
        loop {
            if ready.recv_timeout(Duration::from_millis(100)).is_ok() {
                return Ok(());
            }
            if let Some(status) = self.process.ended() {
                return Err(self.explain(anyhow!("QEMU ended with {status}")));
            }
            if start.elapsed() > timeout {
                return Err(self.explain(anyhow!("agent not ready within {timeout:?}")));
            }
        }
    }

    fn attach_agent(&mut self, timeout: Duration, ready: Option<std::sync::mpsc::Sender<()>>) -> Result<()> {
        let path = self.dir.join("agent.sock");
        let mut ended = None;
        let stream = wait::for_some("agent's socket", timeout, || {
            ended = self.process.ended();
            if ended.is_some() { Some(None) } else { UnixStream::connect(&path).ok().map(Some) }
        })?
        .with_context(|| format!("QEMU ended with {ended:?}"))?;
        self.agent.attach(stream.try_clone()?, Box::new(stream), ready);
        Ok(())
    }

    /// Takes over the agent of the guest that migrated from `source` to here: commands under way go on.
    ///
    /// # Errors
    /// When this QEMU's serial port is not reachable.
    pub fn adopt_agent(&mut self, source: &mut Guest) -> Result<()> {
        source.agent.detach();
        self.agent = std::mem::replace(&mut source.agent, Agent::new("migrated away"));
        self.attach_agent(Duration::from_secs(10), None)
    }

    /// Adds QEMU's messages and the end of the guest's console to an error.
    pub fn explain(&self, e: anyhow::Error) -> anyhow::Error {
        e.context(format!("guest {}\n{}", self.name, self.logs()))
    }

    fn logs(&self) -> String {
        let console = std::fs::read(self.dir.join("console.log")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let tail: Vec<&str> = console.lines().rev().take(60).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        format!("--- qemu\n{}--- console\n{}\n---", self.process.log(), tail.join("\n"))
    }

    /// The socket of monitor 0 or 1.
    pub fn qmp_path(&self, monitor: u8) -> PathBuf {
        self.dir.join(format!("qmp{monitor}"))
    }

    /// A connection to monitor 0 or 1.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn qmp(&self, monitor: u8) -> Result<Qmp> {
        Qmp::connect(&self.qmp_path(monitor))
    }

    /// Kills QEMU at once: the guest is gone as after a power failure.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Whether QEMU still runs.
    pub fn running(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// QEMU's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("guest {}:\n{}", self.name, self.logs());
        }
    }
}
