//! A vhost-user port: the public face of the crate, and its session thread.
//!
//! One thread per port does everything that is not packets: it waits for connections (or makes them), reads messages,
//! runs them through the relay (`relay.rs`) and answers, takes down rings that PMD threads reported, and quits
//! when told. PMD threads only ever see the port's queues.
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ferry_dataplane::qsbr::Domain;

use crate::base_mirror::MirrorFile;
use crate::eventfd;
use crate::fdio::{self, Wait};
use crate::features::FeatureSwitches;
use crate::message::{Progress, Reader};
use crate::queue::{PortQueues, VhostRx, VhostTx};
use crate::relay::{Relay, RelayCounters, lock};
use crate::session::{Session, SessionConfig};
use crate::signals::{PortEvent, PortObserver};
use crate::socket::{self, Backoff, Listener, Role, SocketError, SocketOwnership};
use crate::status::VhostStatus;

/// Most queue pairs of a port.
pub const MAX_QUEUE_PAIRS: u16 = 8;
/// How long a frontend may take to read a reply before the session is given up.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages taken in one go before pacing begins; QEMU sends about 20 per queue pair.
const MESSAGE_BURST: f64 = 2000.0;
/// Messages per second beyond the burst. A frontend that sends more is read more slowly.
const MESSAGES_PER_SECOND: f64 = 1000.0;
/// How long a session thread rests after a bug made it panic.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// What a new connection costs, in messages.
const CONNECTION_COST: f64 = 10.0;

/// What a port is made from.
#[derive(Clone, Debug)]
pub struct VhostPortConfig {
    /// For logs and the thread's name.
    pub name: String,
    /// Path of the Unix socket.
    pub socket: PathBuf,
    /// Who listens there.
    pub role: Role,
    /// Most queue pairs a guest may use, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Largest MTU the frontend may ask for (NET_SET_MTU), bytes, 68 to 65535; 0: any, and VIRTIO_NET_F_MTU is not offered.
    pub mtu: u16,
    /// Owner and mode of the socket's file ([`Role::Server`]).
    pub ownership: SocketOwnership,
    /// Features offered.
    pub features: FeatureSwitches,
    /// A small file, in a tmpfs such as `/run`, that keeps the positions of packed rings: with it, a guest with packed rings
    /// goes on after the switch was killed and restarted. Without it such a guest has to reset its device. Best effort: a
    /// file that cannot be used is logged and done without.
    pub state_file: Option<PathBuf>,
}

impl VhostPortConfig {
    /// A port of one queue pair with everything offered.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>, role: Role) -> Self {
        Self {
            name: name.into(),
            socket: socket.into(),
            role,
            queue_pairs: 1,
            mtu: 0,
            ownership: SocketOwnership::default(),
            features: FeatureSwitches::default(),
            state_file: None,
        }
    }
}

/// Why a port could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PortError {
    /// Not 1 to [`MAX_QUEUE_PAIRS`].
    #[error("{0} queue pairs: 1 to {MAX_QUEUE_PAIRS} are possible")]
    QueuePairs(u16),
    /// Below the least MTU.
    #[error("MTU {0}: 68 to 65535 bytes, or 0 for any")]
    Mtu(u16),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No eventfd or thread to be had.
    #[error("starting the session thread failed: {0}")]
    Resources(#[from] io::Error),
}

/// What the port's owner and its session thread share.
struct Shared {
    config: VhostPortConfig,
    stop: AtomicBool,
    wake: OwnedFd,
    status: Mutex<VhostStatus>,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// A running vhost-user port. Dropping it shuts it down.
pub struct VhostPort {
    shared: Arc<Shared>,
    queues: Arc<PortQueues>,
    rx: Vec<VhostRx>,
    thread: Option<JoinHandle<()>>,
}

impl VhostPort {
    /// Opens the socket ([`Role::Server`]) and starts the session thread.
    ///
    /// # Errors
    /// For impossible settings, a socket path that is in use, or lack of descriptors or threads.
    pub fn start(
        config: VhostPortConfig,
        domain: Arc<Domain>,
        observer: Arc<dyn PortObserver>,
    ) -> Result<Self, PortError> {
        if !(1..=MAX_QUEUE_PAIRS).contains(&config.queue_pairs) {
            return Err(PortError::QueuePairs(config.queue_pairs));
        }
        if config.mtu != 0 && config.mtu < 68 {
            return Err(PortError::Mtu(config.mtu));
        }
        let listener = match config.role {
            Role::Server => Some(Listener::bind(&config.socket, config.ownership)?),
            Role::Client => None,
        };
        let queues = PortQueues::new(usize::from(config.queue_pairs), domain)?;
        for vring in 0..usize::from(config.queue_pairs) * 2 {
            // The session starts and stops rings as SET_VRING_ENABLE demands; no second switch is needed.
            queues.set_enabled(vring, true);
        }
        let rx = (0..queues.pairs()).filter_map(|pair| queues.rx(pair)).collect();
        let mirror = config.state_file.as_ref().and_then(|path| {
            MirrorFile::open(path, usize::from(config.queue_pairs) * 2)
                .inspect_err(
                    |e| tracing::warn!(port = %config.name, path = %path.display(), "state file not used: {e}"),
                )
                .ok()
        });
        let session = Session::new(
            SessionConfig {
                queue_pairs: config.queue_pairs,
                mtu: config.mtu,
                features: config.features.features(config.queue_pairs, config.mtu),
                protocol_features: config.features.protocol_features(),
                mirror,
            },
            Arc::clone(&queues),
            Arc::clone(&observer),
        );
        let mut status = VhostStatus {
            socket: config.socket.clone(),
            role: match config.role {
                Role::Server => "server",
                Role::Client => "client",
            },
            ..VhostStatus::default()
        };
        session.describe(&mut status);
        status.state = if listener.is_some() { "listening" } else { "connecting" }.into();
        let thread_name: String = format!("vhost-{}", config.name).chars().take(15).collect();
        let shared = Arc::new(Shared {
            config,
            stop: AtomicBool::new(false),
            wake: eventfd::new()?,
            status: Mutex::new(status),
        });
        let mut worker = Worker {
            shared: Arc::clone(&shared),
            queues: Arc::clone(&queues),
            session: Arc::new(Mutex::new(session)),
            observer,
            listener,
            counters: RelayCounters::default(),
            budget: Budget::new(),
        };
        let thread = thread::Builder::new().name(thread_name).spawn(move || {
            while !worker.shared.stopping() {
                // A bug that panics, here or in an observer, costs this port one connection, not the switch.
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    tracing::error!(port = %worker.shared.config.name, "internal error in the session thread; starting over");
                    // The `vhost` crate unwraps the lock.
                    worker.session.clear_poison();
                    let _ = catch_unwind(AssertUnwindSafe(|| worker.finish_connection("internal error")));
                    worker.session.clear_poison();
                    worker.pause(AFTER_PANIC);
                }
            }
            worker.close();
        })?;
        Ok(Self { shared, queues, rx, thread: Some(thread) })
    }

    /// The transmit side, towards the guest.
    pub fn tx(&self) -> VhostTx {
        self.queues.tx()
    }

    /// The receive queues, one per queue pair, the first time; nothing afterwards.
    pub fn take_rx_queues(&mut self) -> Vec<VhostRx> {
        std::mem::take(&mut self.rx)
    }

    /// The queues, for their counters.
    pub fn queues(&self) -> &Arc<PortQueues> {
        &self.queues
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.shared.config.name
    }

    /// The status as of the last message or event.
    pub fn status(&self) -> VhostStatus {
        lock(&self.shared.status).clone()
    }

    /// Ends the connection, stops the rings, removes the socket. Returns when all that is done: no PMD thread touches
    /// guest memory any more. Must not be called from a [`PortObserver`], nor by a PMD thread that is online.
    pub fn shutdown(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        eventfd::signal(self.shared.wake.as_raw_fd());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(port = %self.shared.config.name, "the session thread panicked while it shut down");
        }
    }
}

impl Drop for VhostPort {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A token bucket over messages and connections.
struct Budget {
    tokens: f64,
    at: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { tokens: MESSAGE_BURST, at: Instant::now() }
    }
    fn spend(&mut self, cost: f64) {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * MESSAGES_PER_SECOND;
        self.at = now;
        self.tokens = (self.tokens + earned).min(MESSAGE_BURST) - cost;
    }
    /// How long to wait before the next one; zero when there are tokens.
    fn wait(&mut self) -> Duration {
        self.spend(0.0);
        if self.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.tokens / MESSAGES_PER_SECOND) }
    }
}

/// The session thread.
struct Worker {
    shared: Arc<Shared>,
    queues: Arc<PortQueues>,
    session: Arc<Mutex<Session>>,
    observer: Arc<dyn PortObserver>,
    listener: Option<Listener>,
    counters: RelayCounters,
    budget: Budget,
}

impl Worker {
    fn run(&mut self) {
        let mut backoff = Backoff::new(seed(&self.shared.config.name));
        while let Some(stream) = self.next_connection(&mut backoff) {
            self.budget.spend(CONNECTION_COST);
            {
                let mut status = lock(&self.shared.status);
                status.connections += 1;
                status.reconnects = status.connections - 1;
                status.connected = true;
                status.state = "connected".into();
            }
            self.observer.event(&PortEvent::Connected);
            tracing::info!(port = %self.shared.config.name, "connected");
            let before = self.counters.messages.values().sum::<u64>();
            let reason = self.serve(stream);
            if self.counters.messages.values().sum::<u64>() > before {
                backoff.reset();
            }
            self.finish_connection(&reason);
        }
    }

    /// The next connection; `None` when the port shuts down.
    fn next_connection(&mut self, backoff: &mut Backoff) -> Option<UnixStream> {
        while !self.shared.stopping() {
            let pace = self.budget.wait();
            if !pace.is_zero() {
                self.pause(pace);
                continue;
            }
            let Some(listener) = &self.listener else {
                match socket::connect(&self.shared.config.socket) {
                    Ok(stream) => return Some(stream),
                    Err(e) => {
                        lock(&self.shared.status).last_error = Some(e.to_string());
                        self.pause(backoff.delay());
                        continue;
                    }
                }
            };
            match listener.accept() {
                Ok(Some(stream)) => return Some(stream),
                Ok(None) => {
                    let fd = listener.as_raw_fd();
                    self.wait(&mut [Wait::readable(fd)], None);
                }
                Err(e) => {
                    // Out of descriptors, most likely.
                    lock(&self.shared.status).last_error = Some(format!("accept: {e}"));
                    self.pause(backoff.delay());
                }
            }
        }
        None
    }

    /// Waits for `waits` or the end of the port.
    fn wait(&self, waits: &mut [Wait], timeout: Option<Duration>) {
        let mut all = Vec::with_capacity(waits.len() + 1);
        all.push(Wait::readable(self.shared.wake.as_raw_fd()));
        all.extend_from_slice(waits);
        if let Err(e) = fdio::poll(&mut all, timeout) {
            tracing::error!(port = %self.shared.config.name, "poll: {e}");
            thread::sleep(socket::BACKOFF_MIN);
        }
        for (w, a) in waits.iter_mut().zip(all.iter().skip(1)) {
            *w = *a;
        }
    }

    fn pause(&self, time: Duration) {
        self.wait(&mut [], Some(time));
    }

    /// Serves one connection to its end; returns why it ended.
    fn serve(&mut self, stream: UnixStream) -> String {
        let mut relay = match Relay::new(Arc::clone(&self.session)) {
            Ok(relay) => relay,
            Err(e) => return format!("no resources for the session: {e}"),
        };
        let mut reader = Reader::default();
        let socket = stream.as_raw_fd();
        let faults = self.queues.fault_event_fd();
        loop {
            if self.shared.stopping() {
                return "the port is shut down".into();
            }
            let pace = self.budget.wait();
            let input = if pace.is_zero() { Wait::readable(socket) } else { Wait::hangup(socket) };
            let deadline = lock(&self.session).deadline().map(|d| d.saturating_duration_since(Instant::now()));
            let timeout = [deadline, Some(pace).filter(|p| !p.is_zero())].into_iter().flatten().min();
            let mut waits = [input, Wait::readable(faults)];
            self.wait(&mut waits, timeout);
            let [input, fault] = waits;
            if fault.fired() {
                lock(&self.session).on_faults();
                self.publish(None);
            }
            if lock(&self.session).deadline().is_some_and(|d| d <= Instant::now()) {
                lock(&self.session).on_deadline();
                self.publish(None);
            }
            if !input.fired() {
                continue;
            }
            match reader.read(stream.as_fd()) {
                Ok(Progress::Message(message)) => {
                    self.budget.spend(1.0);
                    let handled = relay.handle(message, &mut self.counters);
                    if let Some(why) = &handled.refused {
                        tracing::debug!(port = %self.shared.config.name, "{why}");
                    }
                    self.publish(handled.refused.as_ref().or(handled.end.as_ref()));
                    if let Some((bytes, fds)) = handled.reply {
                        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
                        if let Err(e) = self.answer(&stream, &bytes, &raw) {
                            return format!("sending a reply failed: {e}");
                        }
                    }
                    if let Some(why) = handled.end {
                        return why;
                    }
                }
                Ok(Progress::Pending) => {}
                Ok(Progress::Closed) => return "the frontend closed the connection".into(),
                Err(e) => return e.to_string(),
            }
        }
    }

    /// Sends a reply, waiting up to [`SEND_TIMEOUT`] for the frontend to make room.
    fn answer(&self, stream: &UnixStream, mut bytes: &[u8], mut fds: &[RawFd]) -> io::Result<()> {
        let deadline = Instant::now() + SEND_TIMEOUT;
        while !bytes.is_empty() {
            match fdio::send(stream.as_fd(), bytes, fds) {
                Ok(n) => {
                    bytes = bytes.get(n..).unwrap_or_default();
                    fds = &[];
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || self.shared.stopping() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "the frontend does not read its replies"));
                    }
                    self.wait(&mut [Wait::writable(stream.as_raw_fd())], Some(left));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Everything that ends with a connection.
    fn finish_connection(&mut self, reason: &str) {
        lock(&self.session).disconnect();
        self.observer.event(&PortEvent::Disconnected { reason: reason.into() });
        tracing::info!(port = %self.shared.config.name, reason, "disconnected");
        lock(&self.shared.status).connected = false;
        let reason = reason.to_owned();
        self.publish(Some(&reason));
    }

    /// Brings the status up to date.
    fn publish(&self, error: Option<&String>) {
        let session = lock(&self.session);
        let mut status = lock(&self.shared.status);
        session.describe(&mut status);
        status.relay.clone_from(&self.counters);
        if let Some(error) = error {
            status.last_error = Some(error.clone());
        }
        status.state = match (&status.fault, status.connected) {
            (Some(fault), true) => format!("stopped: {fault}"),
            (_, true) if session.is_running() => "running".into(),
            (_, true) => "connected".into(),
            _ if self.listener.is_some() => "listening".into(),
            _ => "connecting".into(),
        };
    }

    /// The port is over: the socket's file goes, the status stays.
    fn close(&mut self) {
        self.listener = None;
        lock(&self.shared.status).state = "closed".into();
    }
}

/// A seed for the back-off: different for every port and process.
fn seed(name: &str) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write(name.as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_paced() {
        let mut b = Budget::new();
        assert!(b.wait().is_zero());
        for _ in 0..3000 {
            b.spend(1.0);
        }
        let wait = b.wait();
        assert!(wait > Duration::from_millis(500) && wait < Duration::from_millis(1100), "{wait:?}");
    }
}
