//! The harness's end of the agent protocol ([`ferry_guest::protocol`]).
use anyhow::{Context, Result, anyhow, bail};
use ferry_guest::protocol::{
    Command, Direction, READY_ID, Reply, Request, Response, STREAM_PORT, ShellReport, TCP_ECHO_PORT, TICK_PORT,
    TickReport, TransferReport, UDP_ECHO_PORT, UdpReport, Vary,
};
use ferry_guest::stream;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bound for commands that answer at once; generous, since guests are emulated on busy machines.
const QUICK: Duration = Duration::from_secs(30);

type Outcome = Result<Reply, String>;

struct Waiting {
    request: String,
    reply: Sender<Outcome>,
}

#[derive(Default)]
struct Shared {
    writer: Option<Box<dyn Write + Send>>,
    waiting: HashMap<u64, Waiting>,
    /// Readers of earlier attachments stop counting.
    attachment: u64,
}

fn lock(m: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to an agent in a guest or namespace. All calls may be made from several threads at once.
pub struct Agent {
    name: String,
    shared: Arc<Mutex<Shared>>,
    next: AtomicU64,
}

/// A command under way.
pub struct Pending {
    what: String,
    reply: Receiver<Outcome>,
}

impl Pending {
    /// Waits for the answer.
    ///
    /// # Errors
    /// When the agent reports an error, is gone, or takes longer than `timeout`.
    pub fn wait(self, timeout: Duration) -> Result<Reply> {
        match self.reply.recv_timeout(timeout) {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(e)) => Err(anyhow!("{}: {e}", self.what)),
            Err(RecvTimeoutError::Timeout) => Err(anyhow!("{}: no answer within {timeout:?}", self.what)),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("{}: the agent is gone", self.what)),
        }
    }

    /// Waits for the end of [`Agent::start_counting_alive`].
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_alive(self) -> Result<(u32, u32)> {
        match self.wait(Duration::from_secs(180))? {
            Reply::Connections { ok, failed, .. } => Ok((ok, failed)),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Waits for the end of a transfer.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_transfer(self, timeout: Duration) -> Result<TransferReport> {
        match self.wait(timeout)? {
            Reply::Transfer(r) => Ok(r),
            other => bail!("unexpected answer {other:?}"),
        }
    }
}

impl Agent {
    /// An agent called `name` (in messages), not attached yet.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_string(), shared: Arc::default(), next: AtomicU64::new(READY_ID + 1) }
    }

    /// Attaches to a connection, instead of an earlier one. Commands under way are asked for again, so that this may be the same
    /// agent behind another connection (after live migration). `ready` is told when the agent reports for duty.
    pub fn attach(&self, reader: impl Read + Send + 'static, writer: Box<dyn Write + Send>, ready: Option<Sender<()>>) {
        let mut s = lock(&self.shared);
        s.writer = Some(writer);
        s.attachment += 1;
        let mine = s.attachment;
        let repeats: String = s.waiting.values().map(|w| w.request.as_str()).collect();
        if let Some(w) = &mut s.writer
            && !repeats.is_empty()
        {
            // A failure shows as the reader's end.
            let _ = w.write_all(repeats.as_bytes()).and_then(|()| w.flush());
        }
        drop(s);
        let shared = self.shared.clone();
        let name = self.name.clone();
        thread::spawn(move || {
            for line in BufReader::new(reader).lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str::<Response>(&line) {
                    Ok(r) if r.id == READY_ID => match (r.result, &ready) {
                        (Ok(_), Some(ready)) => drop(ready.send(())),
                        (Ok(_), None) => {}
                        (Err(e), _) => eprintln!("{name}: {e}"),
                    },
                    Ok(r) => {
                        if let Some(w) = lock(&shared).waiting.remove(&r.id) {
                            let _ = w.reply.send(r.result);
                        }
                    }
                    // Half a line from before this attachment.
                    Err(_) => {}
                }
            }
            let mut s = lock(&shared);
            if s.attachment == mine {
                // Nobody will answer any more: waiting ends with "gone".
                s.waiting.clear();
                s.writer = None;
            }
        });
    }

    /// Moves to another connection on purpose: commands under way survive the end of the present one.
    pub fn detach(&self) {
        let mut s = lock(&self.shared);
        s.attachment += 1;
        s.writer = None;
    }

    /// Sends a command without waiting for its answer.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn start(&self, command: Command) -> Result<Pending> {
        let what = format!("{}: {command:?}", self.name);
        let id = self.next.fetch_add(1, Relaxed);
        let mut request = serde_json::to_string(&Request { id, command })?;
        request.push('\n');
        let (sender, reply) = channel();
        let mut s = lock(&self.shared);
        let writer = s.writer.as_mut().with_context(|| format!("{what}: the agent is gone"))?;
        writer.write_all(request.as_bytes()).and_then(|()| writer.flush()).with_context(|| what.clone())?;
        s.waiting.insert(id, Waiting { request, reply: sender });
        drop(s);
        Ok(Pending { what, reply })
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn call(&self, command: Command, timeout: Duration) -> Result<Reply> {
        self.start(command)?.wait(timeout)
    }

    /// Checks that the agent answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn ping_agent(&self) -> Result<()> {
        self.call(Command::Ping, QUICK).map(drop)
    }

    /// Runs a shell command, bounded by 30 s, whatever its exit status.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn shell_status(&self, command: &str) -> Result<ShellReport> {
        let bound = Command::Shell { command: command.into(), timeout_ms: QUICK.as_millis() as u64 };
        match self.call(bound, QUICK * 2)? {
            Reply::Shell(r) => Ok(r),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Runs a shell command and returns its output.
    ///
    /// # Errors
    /// When it fails.
    pub fn shell(&self, command: &str) -> Result<String> {
        let r = self.shell_status(command)?;
        if r.status != Some(0) {
            bail!("{}: `{command}` ended with {:?}: {}", self.name, r.status, r.output);
        }
        Ok(r.output)
    }

    /// Gives an interface addresses (`10.0.0.1/24`, `fd00::1/64`) and an MTU, and brings it up.
    ///
    /// # Errors
    /// When the interface does not exist or refuses.
    pub fn configure(&self, interface: &str, addresses: &[&str], mtu: Option<u32>) -> Result<()> {
        let mut script = String::from("set -e\n");
        if let Some(mtu) = mtu {
            script += &format!("ip link set {interface} mtu {mtu}\n");
        }
        script += &format!("ip link set {interface} up\n");
        for a in addresses {
            script += &format!("ip addr add {a} dev {interface}\n");
        }
        self.shell(&script).map(drop)
    }

    /// Pings until the first answer, at most 10 s: the path is up, MAC addresses are resolved.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn reach(&self, to: &str) -> Result<()> {
        self.shell(&format!(
            "for i in 1 2 3 4 5 6 7 8 9 10; do busybox ping -c 1 -W 1 {to} && exit 0; done; ip addr; ip neigh; exit 1"
        ))
        .map(drop)
    }

    /// Whether a single ping out of `tries` (1 s each) is answered.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn can_ping(&self, to: &str, tries: u32) -> Result<bool> {
        let script = format!("for i in $(seq {tries}); do busybox ping -c 1 -W 1 {to} && exit 0; done; exit 1");
        Ok(self.shell_status(&script)?.status == Some(0))
    }

    /// Starts a bulk transfer with the stream service of the agent at `to`.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn start_transfer(
        &self,
        to: IpAddr,
        direction: Direction,
        seed: u64,
        bytes: u64,
        pace: u32,
    ) -> Result<Pending> {
        let to = SocketAddr::new(to, STREAM_PORT);
        self.start(Command::Transfer { to, direction, seed, bytes, pace_mb_per_s: pace, timeout_ms: 60_000 })
    }

    /// Transfers `bytes` over TCP and verifies count and digest.
    ///
    /// # Errors
    /// When the transfer fails, or what arrived is not what was sent.
    pub fn transfer(&self, to: IpAddr, direction: Direction, bytes: u64) -> Result<TransferReport> {
        let seed = self.next.load(Relaxed) ^ u64::from(std::process::id()) << 20;
        let pending = self.start_transfer(to, direction, seed, bytes, 0)?;
        let expected = stream::digest(seed, bytes);
        let report = pending.wait_transfer(Duration::from_secs(180))?;
        verify(&report, bytes, &expected)?;
        Ok(report)
    }

    /// Echoes datagrams off the agent at `to`.
    ///
    /// # Errors
    /// When the agent reports an error.
    pub fn udp_probe(&self, to: IpAddr, count: u32, payload_bytes: usize, interval: Duration) -> Result<UdpReport> {
        let to = SocketAddr::new(to, UDP_ECHO_PORT);
        let interval_us = interval.as_micros() as u64;
        let command = Command::UdpProbe { to, count, payload_bytes, interval_us, linger_ms: 1000 };
        match self.call(command, interval * count + QUICK)? {
            Reply::Udp(r) => Ok(r),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Opens a tick connection to the agent at `to`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn start_ticks(&self, to: IpAddr, interval: Duration) -> Result<u64> {
        let to = SocketAddr::new(to, TICK_PORT);
        let command = Command::TickStart { to, interval_ms: interval.as_millis() as u64 };
        handle(self.call(command, QUICK)?)
    }

    /// The state of a tick connection; `stop` closes it.
    ///
    /// # Errors
    /// When there is none of this handle.
    pub fn ticks(&self, handle: u64, stop: bool) -> Result<TickReport> {
        match self.call(Command::TickReport { handle, stop }, QUICK)? {
            Reply::Tick(r) => Ok(r),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Opens `count` TCP connections to the agent at `to` and keeps them.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open_connections(&self, to: IpAddr, count: u32) -> Result<u64> {
        self.open_connections_to(SocketAddr::new(to, TCP_ECHO_PORT), count)
    }

    /// Opens `count` TCP connections to one of the ports of an agent's echo service and keeps them.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open_connections_to(&self, to: SocketAddr, count: u32) -> Result<u64> {
        let command = Command::ConnectionsOpen { to, count, timeout_ms: 15_000 };
        handle(self.call(command, QUICK + Duration::from_millis(10) * count)?)
    }

    /// How many of the connections behind a handle echo 64 bytes within `timeout`, and how many do not. The bound holds for
    /// each 256 connections.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn count_alive(&self, handle: u64, timeout: Duration) -> Result<(u32, u32)> {
        self.start_counting_alive(handle, timeout)?.wait_alive()
    }

    /// Begins what [`Self::count_alive`] does.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn start_counting_alive(&self, handle: u64, timeout: Duration) -> Result<Pending> {
        let timeout_ms = timeout.as_millis() as u64;
        self.start(Command::ConnectionsExercise { handle, payload_bytes: 64, timeout_ms })
    }

    /// Closes kept connections.
    ///
    /// # Errors
    /// When the agent does not answer, or there is no such handle.
    pub fn close_connections(&self, handle: u64) -> Result<()> {
        self.call(Command::ConnectionsClose { handle }, QUICK).map(drop)
    }

    /// Sends frames as they are, past the network stack, `rounds` times; returns how many were sent.
    ///
    /// # Errors
    /// When the agent reports an error.
    pub fn send_frames(&self, frames: &[Vec<u8>], rounds: u32, vary: Option<Vary>) -> Result<u64> {
        let hex = |f: &Vec<u8>| f.iter().map(|b| format!("{b:02x}")).collect();
        let frames = frames.iter().map(hex).collect();
        let command = Command::SendFrames { interface: "eth0".into(), frames, rounds, vary };
        match self.call(command, Duration::from_secs(120))? {
            Reply::Count(n) => Ok(n),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Echoes 64 bytes over every kept connection.
    ///
    /// # Errors
    /// When any connection fails; names the first one.
    pub fn exercise_connections(&self, handle: u64) -> Result<u32> {
        let command = Command::ConnectionsExercise { handle, payload_bytes: 64, timeout_ms: 10_000 };
        match self.call(command, Duration::from_secs(120))? {
            Reply::Connections { ok, failed: 0, .. } => Ok(ok),
            other => bail!("{}: {other:?}", self.name),
        }
    }
}

/// Checks a finished transfer.
///
/// # Errors
/// When count or digest differ.
pub fn verify(report: &TransferReport, bytes: u64, digest: &str) -> Result<()> {
    if report.bytes != bytes || report.digest != digest {
        bail!("{} of {bytes} bytes arrived, digest {} instead of {digest}", report.bytes, report.digest);
    }
    Ok(())
}

fn handle(reply: Reply) -> Result<u64> {
    match reply {
        Reply::Handle(h) => Ok(h),
        other => bail!("unexpected answer {other:?}"),
    }
}
