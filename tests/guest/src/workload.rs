//! The built-in workloads: transfers, datagrams, tick connections, memory dirtying.
use crate::system;
use ferry_guest::protocol::{Direction, TickReport, TransferReport, UdpReport};
use ferry_guest::stream::{Stream, hex};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const CHUNK: usize = 128 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const STREAM_MAGIC: u32 = 0x4652_5931;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(what: &str) -> impl Fn(io::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

// ---- Transfers ----

/// First bytes of a connection to the stream service.
pub struct StreamHeader {
    /// Seen from the client.
    pub direction: Direction,
    /// Stream.
    pub seed: u64,
    /// Length.
    pub bytes: u64,
    /// Sender's pace.
    pub pace_mb_per_s: u32,
}

impl StreamHeader {
    const LEN: usize = 25;

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut b = Vec::with_capacity(Self::LEN);
        b.extend_from_slice(&STREAM_MAGIC.to_le_bytes());
        b.push(u8::from(self.direction == Direction::Send));
        b.extend_from_slice(&self.seed.to_le_bytes());
        b.extend_from_slice(&self.bytes.to_le_bytes());
        b.extend_from_slice(&self.pace_mb_per_s.to_le_bytes());
        to.write_all(&b)
    }

    /// Reads and checks a header.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut b = [0; Self::LEN];
        from.read_exact(&mut b)?;
        let (word, rest) = b.split_at(4);
        if word != STREAM_MAGIC.to_le_bytes() {
            return Err(io::Error::other("not a stream header"));
        }
        let u64_at = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| rest[i + k]));
        Ok(Self {
            direction: if rest[0] == 1 { Direction::Send } else { Direction::Receive },
            seed: u64_at(1),
            bytes: u64_at(9),
            pace_mb_per_s: u32::from_le_bytes(std::array::from_fn(|k| rest[17 + k])),
        })
    }
}

/// What came in.
pub struct Received {
    /// Bytes before the end or the asked-for length.
    pub bytes: u64,
    /// SHA-256 over them.
    pub digest: [u8; 32],
    /// Longest wait for a read.
    pub max_stall: Duration,
}

/// Reads `bytes` bytes, or less if the peer ends early.
pub fn receive(from: &mut impl Read, bytes: u64) -> io::Result<Received> {
    let mut hash = Sha256::new();
    let mut buf = vec![0; CHUNK];
    let mut got = 0;
    let mut max_stall = Duration::ZERO;
    while got < bytes {
        let want = buf.len().min(usize::try_from(bytes - got).unwrap_or(usize::MAX));
        let start = Instant::now();
        let n = from.read(&mut buf[..want])?;
        max_stall = max_stall.max(start.elapsed());
        if n == 0 {
            break;
        }
        hash.update(&buf[..n]);
        got += n as u64;
    }
    Ok(Received { bytes: got, digest: hash.finalize().into(), max_stall })
}

/// Sends the stream; returns the longest time that a write took.
pub fn send(to: &mut impl Write, seed: u64, bytes: u64, pace_mb_per_s: u32) -> io::Result<Duration> {
    let mut stream = Stream::new(seed);
    let mut buf = vec![0; CHUNK];
    let mut sent = 0;
    let mut max_stall = Duration::ZERO;
    let begin = Instant::now();
    while sent < bytes {
        let n = buf.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
        stream.fill(&mut buf[..n]);
        let start = Instant::now();
        to.write_all(&buf[..n])?;
        max_stall = max_stall.max(start.elapsed());
        sent += n as u64;
        if pace_mb_per_s != 0 {
            // A MB is 10^6 bytes, so bytes divided by MB/s are microseconds.
            let due = Duration::from_micros(sent / u64::from(pace_mb_per_s));
            thread::sleep(due.saturating_sub(begin.elapsed()));
        }
    }
    Ok(max_stall)
}

fn connect(to: SocketAddr) -> Result<TcpStream, String> {
    TcpStream::connect_timeout(&to, CONNECT_TIMEOUT).map_err(|e| format!("connect to {to}: {e}"))
}

/// One transfer with another agent's stream service.
pub fn transfer(
    to: SocketAddr,
    direction: Direction,
    seed: u64,
    bytes: u64,
    pace_mb_per_s: u32,
    timeout: Duration,
) -> Result<TransferReport, String> {
    let mut socket = connect(to)?;
    socket.set_read_timeout(Some(timeout)).map_err(text("socket"))?;
    socket.set_write_timeout(Some(timeout)).map_err(text("socket"))?;
    let start = Instant::now();
    StreamHeader { direction, seed, bytes, pace_mb_per_s }.write(&mut socket).map_err(text("header"))?;
    let (bytes, digest, max_stall) = match direction {
        Direction::Send => {
            let stall = send(&mut socket, seed, bytes, pace_mb_per_s).map_err(text("send"))?;
            let mut count = [0; 8];
            let mut digest = [0; 32];
            socket.read_exact(&mut count).map_err(text("receiver's count"))?;
            socket.read_exact(&mut digest).map_err(text("receiver's digest"))?;
            (u64::from_le_bytes(count), digest, stall)
        }
        Direction::Receive => {
            let got = receive(&mut socket, bytes).map_err(text("receive"))?;
            (got.bytes, got.digest, got.max_stall)
        }
    };
    Ok(TransferReport {
        bytes,
        digest: hex(&digest),
        elapsed_ms: start.elapsed().as_millis() as u64,
        max_stall_ms: max_stall.as_millis() as u64,
    })
}

// ---- Datagrams ----

fn datagram(n: u32, seed: u64, payload_bytes: usize) -> Vec<u8> {
    let mut d = vec![0; payload_bytes.clamp(8, 65_000)];
    d[..4].copy_from_slice(&n.to_le_bytes());
    Stream::new(seed.wrapping_add(u64::from(n))).fill(&mut d[4..]);
    d
}

/// The number of a datagram whose content is right.
fn check_datagram(d: &[u8], seed: u64) -> Option<u32> {
    let n = u32::from_le_bytes(d.get(..4)?.try_into().ok()?);
    (datagram(n, seed, d.len()) == d).then_some(n)
}

fn udp_socket(to: SocketAddr) -> Result<UdpSocket, String> {
    let local: SocketAddr =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(local).map_err(text("bind"))?;
    socket.connect(to).map_err(text("connect"))?;
    Ok(socket)
}

#[derive(Default)]
struct Tally {
    seen: HashMap<u32, ()>,
    report: UdpReport,
    last: Option<Instant>,
}

impl Tally {
    fn add(&mut self, d: &[u8], seed: u64) -> Option<u32> {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.report.max_gap_us = self.report.max_gap_us.max((now - last).as_micros() as u64);
        }
        match check_datagram(d, seed) {
            None => {
                self.report.corrupted += 1;
                None
            }
            Some(n) if self.seen.insert(n, ()).is_some() => {
                self.report.duplicates += 1;
                None
            }
            Some(n) => {
                self.report.received += 1;
                Some(n)
            }
        }
    }
}

/// Echo test, ended early by `end`; sender and receiver run in two threads, so that pace does not depend on answers.
pub fn udp_probe(
    to: SocketAddr,
    count: u32,
    payload_bytes: usize,
    interval: Duration,
    linger: Duration,
    end: &AtomicBool,
) -> Result<UdpReport, String> {
    const SEED: u64 = 0xec40;
    let socket = udp_socket(to)?;
    let receiver = socket.try_clone().map_err(text("socket"))?;
    receiver.set_read_timeout(Some(Duration::from_millis(20))).map_err(text("socket"))?;
    let begin = Instant::now();
    let sent_at: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let (sent_at2, done2) = (sent_at.clone(), done.clone());
    let collector = thread::spawn(move || {
        let mut tally = Tally::default();
        let mut buf = vec![0; 65536];
        let mut rtt_sum = 0;
        let mut quiet_since = Instant::now();
        while tally.report.received < u64::from(count) {
            match receiver.recv(&mut buf) {
                Ok(n) => {
                    quiet_since = Instant::now();
                    if let Some(n) = tally.add(&buf[..n], SEED)
                        && let Some(at) = sent_at2.get(n as usize)
                    {
                        rtt_sum += (begin.elapsed().as_micros() as u64).saturating_sub(at.load(Relaxed));
                    }
                }
                Err(_) if done2.load(Relaxed) && quiet_since.elapsed() > linger => break,
                Err(_) => {}
            }
        }
        tally.report.mean_rtt_us = rtt_sum / tally.report.received.max(1);
        tally.report
    });
    let mut sent = 0;
    for n in (0..count).take_while(|_| !end.load(Relaxed)) {
        let d = datagram(n, SEED, payload_bytes);
        sent_at[n as usize].store(begin.elapsed().as_micros() as u64, Relaxed);
        // Errors are ICMP messages about earlier datagrams, or a full queue: counted as not sent.
        sent += u64::from(socket.send(&d).is_ok());
        thread::sleep(interval);
    }
    done.store(true, Relaxed);
    let mut report = collector.join().map_err(|_| "collector failed".to_string())?;
    report.sent = sent;
    Ok(report)
}

type Probe = (Arc<AtomicBool>, thread::JoinHandle<Result<UdpReport, String>>);
static PROBES: LazyLock<Mutex<HashMap<u64, Probe>>> = LazyLock::new(Mutex::default);

/// Starts an echo test that lasts until it is ended.
pub fn udp_probe_begin(to: SocketAddr, payload_bytes: usize, interval: Duration) -> Result<u64, String> {
    const LONGEST: u32 = 100_000;
    const LINGER: Duration = Duration::from_millis(500);
    let end = Arc::new(AtomicBool::new(false));
    let end2 = end.clone();
    let probe = thread::spawn(move || udp_probe(to, LONGEST, payload_bytes, interval, LINGER, &end2));
    let handle = new_handle();
    lock(&PROBES).insert(handle, (end, probe));
    Ok(handle)
}

/// Ends it.
pub fn udp_probe_end(handle: u64) -> Result<UdpReport, String> {
    let (end, probe) = lock(&PROBES).remove(&handle).ok_or("no such probe")?;
    end.store(true, Relaxed);
    probe.join().map_err(|_| "probe failed".to_string())?
}

/// One-way datagrams.
pub fn udp_send(
    to: SocketAddr,
    count: u32,
    payload_bytes: usize,
    interval: Duration,
    seed: u64,
) -> Result<UdpReport, String> {
    let socket = udp_socket(to)?;
    let mut report = UdpReport::default();
    for n in 0..count {
        report.sent += u64::from(socket.send(&datagram(n, seed, payload_bytes)).is_ok());
        thread::sleep(interval);
    }
    Ok(report)
}

static HELD: LazyLock<Mutex<HashMap<u16, UdpSocket>>> = LazyLock::new(Mutex::default);

/// Opens a socket whose datagrams stay unread.
pub fn udp_hold(port: u16) -> Result<(), String> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).map_err(text("bind"))?;
    system::force_receive_buffer(&socket, 32 << 20).map_err(text("receive buffer"))?;
    lock(&HELD).insert(port, socket);
    Ok(())
}

/// Reads what was held and checks it.
pub fn udp_drain(port: u16, seed: u64) -> Result<UdpReport, String> {
    let socket = lock(&HELD).remove(&port).ok_or("no such held socket")?;
    socket.set_read_timeout(Some(Duration::from_millis(50))).map_err(text("socket"))?;
    let mut tally = Tally::default();
    let mut buf = vec![0; 65536];
    while let Ok(n) = socket.recv(&mut buf) {
        tally.add(&buf[..n], seed);
    }
    Ok(tally.report)
}

// ---- Ticks ----

static HANDLES: AtomicU64 = AtomicU64::new(1);
type TickConnection = (TcpStream, Arc<TickPeer>);
static TICKS: LazyLock<Mutex<HashMap<u64, TickConnection>>> = LazyLock::new(Mutex::default);

/// A number that no other handle has.
pub fn new_handle() -> u64 {
    HANDLES.fetch_add(1, Relaxed)
}

/// What one end of a tick connection knows.
#[derive(Default)]
pub struct TickPeer {
    report: Mutex<TickReport>,
    last: Mutex<Option<Instant>>,
    ended: AtomicBool,
}

/// Runs one end of a tick connection: sends a counter every `interval`, expects the peer's in order.
pub fn tick_run(socket: TcpStream, interval: Duration, peer: Arc<TickPeer>) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut writer = socket.try_clone()?;
    let mut reader = socket;
    let peer2 = peer.clone();
    *lock(&peer.last) = Some(Instant::now());
    let sender = thread::spawn(move || {
        while !peer2.ended.load(Relaxed) {
            let mut tick = [0; 16];
            {
                let mut r = lock(&peer2.report);
                r.sent += 1;
                tick[..8].copy_from_slice(&r.sent.to_le_bytes());
                tick[8..].copy_from_slice(&r.max_gap_ms.to_le_bytes());
            }
            if writer.write_all(&tick).is_err() {
                break;
            }
            thread::sleep(interval);
        }
    });
    let outcome = loop {
        let mut tick = [0; 16];
        if let Err(e) = reader.read_exact(&mut tick) {
            break Err(e);
        }
        let number = u64::from_le_bytes(std::array::from_fn(|i| tick[i]));
        let now = Instant::now();
        let gap = lock(&peer.last).replace(now).map_or(Duration::ZERO, |l| now - l);
        let mut r = lock(&peer.report);
        r.max_gap_ms = r.max_gap_ms.max(gap.as_millis() as u64);
        r.peer_max_gap_ms = u64::from_le_bytes(std::array::from_fn(|i| tick[8 + i]));
        if number != r.received + 1 {
            break Err(io::Error::other(format!("tick {number} after {}", r.received)));
        }
        r.received = number;
    };
    peer.ended.store(true, Relaxed);
    if let Err(e) = &outcome {
        lock(&peer.report).error = Some(e.to_string());
    }
    let _ = reader.shutdown(Shutdown::Both);
    let _ = sender.join();
    outcome
}

/// Opens a tick connection.
pub fn tick_start(to: SocketAddr, interval: Duration) -> Result<u64, String> {
    let mut socket = connect(to)?;
    let ms = interval.as_millis() as u64;
    socket.write_all(&ms.to_le_bytes()).map_err(text("header"))?;
    let peer = Arc::new(TickPeer::default());
    let kept = socket.try_clone().map_err(text("socket"))?;
    let peer2 = peer.clone();
    thread::spawn(move || drop(tick_run(socket, interval, peer2)));
    let handle = new_handle();
    lock(&TICKS).insert(handle, (kept, peer));
    Ok(handle)
}

/// Reports on a tick connection, closing it on demand.
pub fn tick_report(handle: u64, stop: bool) -> Result<TickReport, String> {
    let mut ticks = lock(&TICKS);
    let (socket, peer) = ticks.get(&handle).ok_or("no such tick connection")?;
    let mut report = lock(&peer.report).clone();
    report.silent_ms = lock(&peer.last).map_or(0, |l| l.elapsed().as_millis() as u64);
    if stop {
        peer.ended.store(true, Relaxed);
        let _ = socket.shutdown(Shutdown::Both);
        ticks.remove(&handle);
    }
    Ok(report)
}

// ---- Memory ----

static DIRTY: LazyLock<Mutex<HashMap<u64, Arc<AtomicBool>>>> = LazyLock::new(Mutex::default);

/// Starts rewriting memory, page by page.
pub fn dirty_start(size_mb: u32, mb_per_s: u32) -> u64 {
    const PAGE: usize = 4096;
    let stop = Arc::new(AtomicBool::new(false));
    let stop2 = stop.clone();
    thread::spawn(move || {
        let mut memory = vec![0u8; (size_mb.max(1) as usize) << 20];
        let begin = Instant::now();
        let mut written = 0u64;
        while !stop2.load(Relaxed) {
            for page in memory.chunks_mut(PAGE) {
                let stamp = written.to_le_bytes();
                page[..8].copy_from_slice(&stamp);
                std::hint::black_box(&mut *page);
                written += PAGE as u64;
                if written.is_multiple_of(256 << 10) {
                    let due = Duration::from_micros(written / u64::from(mb_per_s.max(1)));
                    thread::sleep(due.saturating_sub(begin.elapsed()));
                    if stop2.load(Relaxed) {
                        break;
                    }
                }
            }
        }
    });
    let handle = new_handle();
    lock(&DIRTY).insert(handle, stop);
    handle
}

/// Stops rewriting memory.
pub fn dirty_stop(handle: u64) -> Result<(), String> {
    lock(&DIRTY).remove(&handle).map(|s| s.store(true, Relaxed)).ok_or_else(|| "no such handle".into())
}
