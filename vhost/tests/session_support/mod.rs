//! A frontend made of raw bytes, a guest memory, and a thread that polls like a PMD thread.
#![allow(unsafe_code, dead_code)] // memfd_create and eventfd; each test file uses its part.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_dataplane::frame::RxBurst;
use ferry_dataplane::port::RxQueue;
use ferry_dataplane::qsbr::Domain;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::signals::{PortEvent, PortObserver};
use ferry_vhost::socket::Role;
use ferry_vhost::status::VhostStatus;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const RESET_OWNER: u32 = 4;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SEND_RARP: u32 = 19;
pub const NET_SET_MTU: u32 = 20;
pub const GET_CONFIG: u32 = 24;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 8;

pub const LOG_ALL: u64 = 1 << 26;
pub const PROTOCOL: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;
pub const PACKED: u64 = 1 << 34;

pub const MEMORY_BYTES: u64 = 2 << 20;
pub const GUEST_BASE: u64 = 0x10_0000;
pub const USER_BASE: u64 = 0x7f12_0000_0000;
pub const RING_SIZE: u32 = 256;
/// Each ring's areas lie in 64 KiB of their own.
pub const RING_STRIDE: u64 = 0x1_0000;

pub fn memfd(len: u64) -> File {
    // SAFETY: a new descriptor, owned by the File.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

pub fn eventfd() -> OwnedFd {
    // SAFETY: a new descriptor, owned by the result.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits for `condition`, failing after twenty seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[derive(Default)]
pub struct Recorder(pub Mutex<Vec<PortEvent>>);

impl PortObserver for Recorder {
    fn event(&self, event: &PortEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Recorder {
    pub fn names(&self) -> Vec<String> {
        let name = |e: &PortEvent| format!("{e:?}").split([' ', '{', '(']).next().unwrap().to_owned();
        self.0.lock().unwrap().iter().map(name).collect()
    }
    pub fn any(&self, f: impl Fn(&PortEvent) -> bool) -> bool {
        self.0.lock().unwrap().iter().any(f)
    }
    pub fn count(&self, f: impl Fn(&PortEvent) -> bool) -> usize {
        self.0.lock().unwrap().iter().filter(|e| f(e)).count()
    }
}

/// A port with its socket in a directory of its own and a thread that polls its receive queues.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
    pub domain: Arc<Domain>,
    pub events: Arc<Recorder>,
    pub pmd: Pmd,
    pub port: VhostPort,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut VhostPortConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.sock");
        let mut config = VhostPortConfig::new("test", &path, Role::Server);
        change(&mut config);
        let domain = Domain::new();
        let events = Arc::new(Recorder::default());
        let mut port = VhostPort::start(config, Arc::clone(&domain), Arc::clone(&events) as _).unwrap();
        let pmd = Pmd::start(&domain, &mut port);
        Self { dir, path, domain, events, pmd, port }
    }

    pub fn status(&self) -> VhostStatus {
        self.port.status()
    }

    pub fn peer(&self) -> Peer {
        Peer::connect(&self.path)
    }

    pub fn running(&self) -> usize {
        self.status().rings.iter().filter(|r| r.running).count()
    }

    pub fn wait_running(&self, rings: usize) {
        eventually(&format!("{rings} rings running; {:?}", self.status()), || self.running() == rings);
    }
}

/// Polls receive queues until dropped.
pub struct Pmd {
    stop: Arc<AtomicBool>,
    pub frames: Arc<AtomicU64>,
    pub rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Pmd {
    pub fn start(domain: &Arc<Domain>, port: &mut VhostPort) -> Self {
        let (stop, frames, rounds) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut queues = port.take_rx_queues();
        let domain = Arc::clone(domain);
        let (stop2, frames2, rounds2) = (Arc::clone(&stop), Arc::clone(&frames), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let mut guard = domain.register().unwrap();
            let mut burst = RxBurst::new();
            while !stop2.load(Ordering::Relaxed) {
                for queue in &mut queues {
                    queue.receive(&guard, &mut burst);
                    burst.take_snapshots();
                    frames2.fetch_add(burst.len() as u64, Ordering::Relaxed);
                    queue.release(&guard);
                    burst.clear();
                }
                rounds2.fetch_add(1, Ordering::Relaxed);
                guard.quiescent();
                // Tests run many of these on few processors.
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self { stop, frames, rounds, thread: Some(thread) }
    }
}

impl Drop for Pmd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

pub struct Reply {
    pub code: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
}

impl Reply {
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.payload[..8].try_into().unwrap())
    }
    pub fn state(&self) -> (u32, u32) {
        let word = |at: usize| u32::from_ne_bytes(self.payload[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

pub fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [&code.to_ne_bytes(), &flags.to_ne_bytes(), &(payload.len() as u32).to_ne_bytes(), payload].concat()
}

/// A frontend.
pub struct Peer {
    pub stream: UnixStream,
    pub calls: Vec<OwnedFd>,
}

impl Peer {
    pub fn connect(path: &Path) -> Self {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::on(stream),
                Err(e) => assert!(Instant::now() < end, "connect: {e}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn accept(listener: &UnixListener) -> Self {
        Self::on(listener.accept().unwrap().0)
    }

    fn on(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { stream, calls: Vec::new() }
    }

    pub fn raw(&mut self, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
        self.stream.send_with_fds(&[bytes], fds).map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    pub fn send_fds(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let bytes = encode(code, VERSION | flags, payload);
        assert_eq!(self.raw(&bytes, fds).unwrap(), bytes.len());
    }

    pub fn send(&mut self, code: u32, payload: &[u8]) {
        self.send_fds(code, 0, payload, &[]);
    }

    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0u8; 12];
        self.stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Reply { code: word(0), flags: word(4), payload })
    }

    /// Sends a request that always has a reply.
    pub fn ask(&mut self, code: u32, payload: &[u8]) -> Reply {
        self.send(code, payload);
        let reply = self.receive().unwrap();
        assert_eq!((reply.code, reply.flags), (code, VERSION | 4));
        reply
    }

    /// Sends a request with NEED_REPLY and returns the acknowledgement: 0 is success.
    pub fn ack_fds(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) -> u64 {
        self.send_fds(code, NEED_REPLY, payload, fds);
        let reply = self.receive().unwrap();
        assert_eq!((reply.code, reply.flags, reply.payload.len()), (code, VERSION | 4, 8));
        reply.u64()
    }

    pub fn ack(&mut self, code: u32, payload: &[u8]) -> u64 {
        self.ack_fds(code, payload, &[])
    }

    /// True when the other side has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0u8; 256];
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return true,
                Err(_) => return false,
            }
        }
    }

    /// QEMU's messages at device realize: features, protocol features with REPLY_ACK and all else that is offered.
    pub fn greet(&mut self) -> (u64, u64) {
        let features = self.ask(GET_FEATURES, &[]).u64();
        let protocol = self.ask(GET_PROTOCOL_FEATURES, &[]).u64();
        self.send(SET_PROTOCOL_FEATURES, &words(&[protocol]));
        self.ask(GET_QUEUE_NUM, &[]);
        self.send(SET_OWNER, &[]);
        (features, protocol)
    }

    pub fn set_memory(&mut self, memory: &File) -> u64 {
        self.ack_fds(SET_MEM_TABLE, &memory_table(&[region(0, MEMORY_BYTES, 0)]), &[memory.as_raw_fd()])
    }

    pub fn set_up_ring(&mut self, index: u32, base: u32) {
        self.send(SET_VRING_NUM, &state(index, RING_SIZE));
        self.send(SET_VRING_BASE, &state(index, base));
        self.send(SET_VRING_ADDR, &ring_address(index, None));
        let (kick, call) = (eventfd(), eventfd());
        self.send_fds(SET_VRING_KICK, 0, &words(&[u64::from(index)]), &[kick.as_raw_fd()]);
        self.send_fds(SET_VRING_CALL, 0, &words(&[u64::from(index)]), &[call.as_raw_fd()]);
        self.calls.push(call);
    }

    /// Everything until `pairs` queue pairs run.
    pub fn start(&mut self, features: u64, memory: &File, pairs: u32) {
        self.greet();
        assert_eq!(self.ack(SET_FEATURES, &words(&[features])), 0);
        assert_eq!(self.set_memory(memory), 0);
        for index in 0..pairs * 2 {
            self.set_up_ring(index, if features & PACKED != 0 { 0x8000_8000 } else { 0 });
            assert_eq!(self.ack(SET_VRING_ENABLE, &state(index, 1)), 0);
        }
    }

    /// Waits until everything sent so far was handled.
    pub fn sync(&mut self) {
        self.ask(GET_FEATURES, &[]);
    }
}

pub fn region(offset: u64, size: u64, mmap_offset: u64) -> [u64; 4] {
    [GUEST_BASE + offset, size, USER_BASE + offset, mmap_offset]
}

pub fn memory_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = words(&[regions.len() as u64]);
    for r in regions {
        payload.extend(words(r));
    }
    payload
}

pub fn single_region(region: [u64; 4]) -> Vec<u8> {
    [words(&[0]), words(&region)].concat()
}

pub fn ring_address(index: u32, log: Option<u64>) -> Vec<u8> {
    let base = USER_BASE + u64::from(index) * RING_STRIDE;
    let flags = u32::from(log.is_some());
    [state(index, flags), words(&[base, base + 0x8000, base + 0x4000, log.unwrap_or(0)])].concat()
}

/// Makes one 60-byte frame available in split ring `index` of `memory`, as number `n` since the ring's start.
pub fn offer_frame(memory: &File, index: u32, n: u16) {
    let at = u64::from(index) * RING_STRIDE;
    let slot = u64::from(n % RING_SIZE as u16);
    let buffer = 0x10_0000 + slot * 256;
    memory.write_all_at(&[0x02; 72], buffer).unwrap();
    memory.write_all_at(&[0; 12], buffer).unwrap();
    let descriptor = [&(GUEST_BASE + buffer).to_le_bytes()[..], &72u32.to_le_bytes(), &[0; 4]].concat();
    memory.write_all_at(&descriptor, at + slot * 16).unwrap();
    memory.write_all_at(&(slot as u16).to_le_bytes(), at + 0x4000 + 4 + slot * 2).unwrap();
    memory.write_all_at(&n.wrapping_add(1).to_le_bytes(), at + 0x4000 + 2).unwrap();
}

pub fn used_index(memory: &File, index: u32) -> u16 {
    let mut b = [0u8; 2];
    memory.read_exact_at(&mut b, u64::from(index) * RING_STRIDE + 0x8000 + 2).unwrap();
    u16::from_le_bytes(b)
}
