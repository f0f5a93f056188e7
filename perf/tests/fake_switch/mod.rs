//! A switch of the simplest kind behind real vhost-user sockets, which commits on demand the errors that the suite must
//! notice. Slow and trusting; shares no code with the driver's side.
#![allow(unsafe_code)] // It works on guest memory through raw pointers.
use memmap2::MmapRaw;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut};

/// What goes wrong, counted over the frames of each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Each n-th frame is not forwarded.
    Drop(u64),
    /// Each n-th frame is forwarded twice.
    Duplicate(u64),
    /// One byte at the end of each n-th frame is changed.
    Corrupt(u64),
    /// Each n-th frame loses its last byte.
    Truncate(u64),
    /// Each n-th frame comes after the one that follows it.
    Swap(u64),
    /// Each n-th frame loses what its virtio-net header says about it.
    Forget(u64),
    /// Frames that are to be segmented are; no fault.
    Segment,
    /// The same, and each n-th segment of all is not forwarded.
    SegmentAndDrop(u64),
    /// From the n-th frame on, used entries name buffers that do not exist.
    WrongId(u64),
}

const HEADER: usize = 12;

#[derive(Clone, Copy, Debug, Default)]
struct Vring {
    size: u16,
    desc: u64,
    driver: u64,
    device: u64,
    base: u32,
    enabled: bool,
}

#[derive(Default)]
struct State {
    packed: bool,
    memory: Option<(MmapRaw, VhostUserMemoryRegion)>,
    vrings: [Vring; 2],
    devices: [Option<DeviceRing>; 2],
    kicks: Vec<File>,
}

// SAFETY: the mapping is used under the mutex only.
unsafe impl Send for State {}

/// The device's side of one ring.
#[derive(Debug)]
struct DeviceRing {
    packed: bool,
    size: u16,
    desc: *mut u8,
    driver: *mut u8,
    device: *mut u8,
    next: u16,
    wrap: bool,
    used: u16,
    used_wrap: bool,
}

struct Chain {
    id: u16,
    parts: Vec<(u64, u32)>,
}

impl DeviceRing {
    fn pop(&mut self) -> Option<Chain> {
        if self.packed { self.pop_packed() } else { self.pop_split() }
    }

    fn pop_split(&mut self) -> Option<Chain> {
        // SAFETY: offsets inside ring areas whose size the driver has announced.
        unsafe {
            let available = AtomicU16::from_ptr(self.driver.add(2).cast()).load(Ordering::Acquire);
            if available == self.next {
                return None;
            }
            let slot = usize::from(self.next % self.size);
            let head = self.driver.add(4 + 2 * slot).cast::<u16>().read_volatile();
            self.next = self.next.wrapping_add(1);
            let mut parts = Vec::new();
            let mut i = head;
            loop {
                let d = self.desc.add(16 * usize::from(i));
                parts.push((d.cast::<u64>().read_volatile(), d.add(8).cast::<u32>().read_volatile()));
                if d.add(12).cast::<u16>().read_volatile() & 1 == 0 {
                    return Some(Chain { id: head, parts });
                }
                i = d.add(14).cast::<u16>().read_volatile();
            }
        }
    }

    fn pop_packed(&mut self) -> Option<Chain> {
        let mut parts = Vec::new();
        loop {
            // SAFETY: offsets inside ring areas whose size the driver has announced.
            unsafe {
                let d = self.desc.add(16 * usize::from(self.next));
                let flags = AtomicU16::from_ptr(d.add(14).cast()).load(Ordering::Acquire);
                let (avail, used) = (flags & 0x80 != 0, flags & 0x8000 != 0);
                if parts.is_empty() && (avail == used || avail != self.wrap) {
                    return None;
                }
                parts.push((d.cast::<u64>().read_volatile(), d.add(8).cast::<u32>().read_volatile()));
                let id = d.add(12).cast::<u16>().read_volatile();
                self.next += 1;
                if self.next == self.size {
                    self.next = 0;
                    self.wrap = !self.wrap;
                }
                if flags & 1 == 0 {
                    return Some(Chain { id, parts });
                }
            }
        }
    }

    fn push(&mut self, id: u16, len: u32, descriptors: u16) {
        // SAFETY: offsets inside ring areas whose size the driver has announced.
        unsafe {
            if self.packed {
                let d = self.desc.add(16 * usize::from(self.used));
                d.add(8).cast::<u32>().write_volatile(len);
                d.add(12).cast::<u16>().write_volatile(id);
                let flags = if self.used_wrap { 0x8080 } else { 0 };
                AtomicU16::from_ptr(d.add(14).cast()).store(flags, Ordering::Release);
                self.used += descriptors;
                if self.used >= self.size {
                    self.used -= self.size;
                    self.used_wrap = !self.used_wrap;
                }
            } else {
                let slot = usize::from(self.used % self.size);
                let entry = self.device.add(4 + 8 * slot).cast::<u32>();
                entry.write_volatile(u32::from(id));
                entry.add(1).write_volatile(len);
                self.used = self.used.wrapping_add(1);
                AtomicU16::from_ptr(self.device.add(2).cast()).store(self.used, Ordering::Release);
            }
        }
    }
}

impl State {
    fn guest(&self, address: u64, len: u32) -> *mut u8 {
        let (map, region) = self.memory.as_ref().expect("memory");
        let offset = address.checked_sub(region.guest_phys_addr).expect("below the region");
        assert!(offset + u64::from(len) <= region.memory_size, "beyond the region");
        // SAFETY: inside the mapping, checked.
        unsafe { map.as_mut_ptr().add(offset as usize) }
    }

    fn user(&self, address: u64) -> *mut u8 {
        let (map, region) = self.memory.as_ref().expect("memory");
        let offset = address.checked_sub(region.user_addr).expect("below the region");
        assert!(offset < region.memory_size, "beyond the region");
        // SAFETY: inside the mapping, checked.
        unsafe { map.as_mut_ptr().add(offset as usize) }
    }

    fn start_rings(&mut self) {
        for i in 0..2 {
            let v = self.vrings[i];
            if self.devices[i].is_some() || !v.enabled || v.size == 0 || self.memory.is_none() {
                continue;
            }
            let (next, wrap) = ((v.base & 0x7fff) as u16, v.base & 0x8000 != 0);
            let (desc, driver, device) = (self.user(v.desc), self.user(v.driver), self.user(v.device));
            if self.packed {
                // SAFETY: the device event suppression area has four bytes. No notifications, please.
                unsafe { device.add(2).cast::<u16>().write_volatile(1) };
            } else {
                // SAFETY: the used ring's flags. No notifications, please.
                unsafe { device.cast::<u16>().write_volatile(1) };
            }
            let packed = self.packed;
            self.devices[i] = Some(DeviceRing {
                packed,
                size: v.size,
                desc,
                driver,
                device,
                next,
                wrap,
                used: next,
                used_wrap: wrap,
            });
        }
    }

    /// Takes one frame, header included.
    fn take(&mut self, wrong_id: bool) -> Option<Vec<u8>> {
        let mut ring = self.devices[1].take()?;
        let chain = ring.pop();
        let frame = chain.map(|chain| {
            let mut frame = Vec::new();
            for &(address, len) in &chain.parts {
                // SAFETY: `guest` has checked the range.
                frame.extend_from_slice(unsafe { std::slice::from_raw_parts(self.guest(address, len), len as usize) });
            }
            let id = if wrong_id { 5000 } else { chain.id };
            ring.push(id, 0, chain.parts.len() as u16);
            frame
        });
        self.devices[1] = Some(ring);
        frame
    }

    /// Delivers a frame into as many buffers as it needs; `false` when there are not enough.
    fn give(&mut self, frame: &[u8]) -> bool {
        let Some(mut ring) = self.devices[0].take() else { return false };
        let mut left = frame;
        let mut used = Vec::new();
        let mut first = None;
        while !left.is_empty() {
            let Some(chain) = ring.pop() else {
                // The test's rings are large enough; a frame that does not fit is lost together with its buffers.
                self.devices[0] = Some(ring);
                return false;
            };
            let (address, len) = chain.parts[0];
            let n = left.len().min(len as usize);
            let to = self.guest(address, len);
            first.get_or_insert(to);
            // SAFETY: `guest` has checked the range.
            unsafe { std::ptr::copy_nonoverlapping(left.as_ptr(), to, n) };
            used.push((chain.id, n as u32));
            left = &left[n..];
        }
        // SAFETY: the header's last field, inside the first buffer.
        unsafe { first.expect("a buffer").add(HEADER - 2).cast::<u16>().write_volatile(used.len() as u16) };
        fence(Ordering::Release);
        for (id, len) in used {
            ring.push(id, len, 1);
        }
        self.devices[0] = Some(ring);
        true
    }
}

impl VhostUserBackendReqHandlerMut for State {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }
    fn reset_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }
    fn reset_device(&mut self) -> VhostResult<()> {
        Ok(())
    }
    fn get_features(&mut self) -> VhostResult<u64> {
        // CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, PROTOCOL_FEATURES, VERSION_1, RING_PACKED.
        Ok(1 | 1 << 1 | 1 << 7 | 1 << 11 | 1 << 15 | 1 << 30 | 1 << 32 | 1 << 34)
    }
    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.packed = features & 1 << 34 != 0;
        Ok(())
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        let map = MmapRaw::map_raw(&files[0]).map_err(Error::ReqHandlerError)?;
        self.memory = Some((map, regions[0]));
        Ok(None)
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        self.vrings[index as usize].size = num as u16;
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let v = &mut self.vrings[index as usize];
        (v.desc, v.device, v.driver) = (descriptor, used, available);
        Ok(())
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        self.vrings[index as usize].base = base;
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 0))
    }
    fn set_vring_kick(&mut self, _index: u8, fd: Option<File>) -> VhostResult<()> {
        self.kicks.extend(fd);
        Ok(())
    }
    fn set_vring_call(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }
    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }
    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ)
    }
    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }
    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(2)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.vrings[index as usize].enabled = enable;
        self.start_rings();
        Ok(())
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> VhostResult<File> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(1)
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> VhostResult<Option<File>> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("not offered"))
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> VhostResult<()> {
        Err(Error::InvalidOperation("not offered"))
    }
}

/// The next guest's session, if there is one.
type Sessions = Box<dyn FnMut() -> Option<UnixStream> + Send>;

/// A running switch with two ports; what comes in at one goes out at the other.
pub struct FakeSwitch {
    folder: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl FakeSwitch {
    /// Listens on both sockets.
    pub fn start(fault: Fault) -> Self {
        Self::with(fault, |path| {
            let listener = UnixListener::bind(path).expect("bind");
            listener.set_nonblocking(true).expect("listener");
            Box::new(move || listener.accept().ok().map(|(stream, _)| stream))
        })
    }

    /// Connects to both sockets, again and again.
    pub fn dialing(fault: Fault) -> Self {
        Self::with(fault, |path| {
            let path = path.to_path_buf();
            Box::new(move || UnixStream::connect(&path).ok())
        })
    }

    fn with(fault: Fault, sessions: impl Fn(&Path) -> Sessions) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let stop = Arc::new(AtomicBool::new(false));
        let ports: Vec<Arc<Mutex<State>>> = (0..2).map(|_| Arc::new(Mutex::new(State::default()))).collect();
        let mut threads = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            let next = sessions(&socket(folder.path(), i));
            let (port, stop) = (port.clone(), stop.clone());
            threads.push(std::thread::spawn(move || serve(next, &port, &stop)));
        }
        let stopped = stop.clone();
        threads.push(std::thread::spawn(move || forward(&ports, fault, &stopped)));
        Self { folder, stop, threads }
    }

    /// Its sockets.
    pub fn sockets(&self) -> Vec<PathBuf> {
        (0..2).map(|i| socket(self.folder.path(), i)).collect()
    }
}

impl Drop for FakeSwitch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            let ended = t.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the fake switch panicked");
        }
    }
}

fn socket(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("p{i}.sock"))
}

/// One session after the other.
fn serve(mut next: Sessions, port: &Arc<Mutex<State>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Some(stream) = next() else {
            std::thread::sleep(std::time::Duration::from_millis(2));
            continue;
        };
        stream.set_nonblocking(false).expect("stream");
        let mut session = BackendReqHandler::from_stream(stream, port.clone());
        // Ends when the guest goes; guests go before the switch does.
        while session.handle_request().is_ok() {}
        *port.lock().expect("port") = State::default();
    }
}

fn forward(ports: &[Arc<Mutex<State>>], fault: Fault, stop: &AtomicBool) {
    let mut counts = [0u64; 2];
    let mut segments = 0;
    let mut held: [VecDeque<Vec<u8>>; 2] = Default::default();
    while !stop.load(Ordering::Relaxed) {
        let mut work = false;
        for from in 0..2 {
            let n = counts[from] + 1;
            let every = |every: u64| n.is_multiple_of(every);
            let wrong_id = matches!(fault, Fault::WrongId(from) if n >= from);
            let Some(mut frame) = ports[from].lock().expect("port").take(wrong_id) else { continue };
            counts[from] = n;
            work = true;
            let mut out = Vec::new();
            match fault {
                Fault::Drop(e) if every(e) => {}
                Fault::Duplicate(e) if every(e) => out.extend([frame.clone(), frame]),
                Fault::Corrupt(e) if every(e) => {
                    if let Some(b) = frame.last_mut() {
                        *b ^= 0x10;
                    }
                    out.push(frame);
                }
                Fault::Truncate(e) if every(e) => {
                    frame.pop();
                    out.push(frame);
                }
                Fault::Forget(e) if every(e) => {
                    frame[..HEADER].fill(0);
                    out.push(frame);
                }
                Fault::Segment => out.extend(segment(&frame)),
                Fault::SegmentAndDrop(e) => out.extend(segment(&frame).into_iter().filter(|_| {
                    segments += 1;
                    segments % e != 0
                })),
                Fault::Swap(e) if every(e) => held[from].push_back(frame),
                _ => {
                    out.push(frame);
                    out.extend(held[from].drain(..));
                }
            }
            let mut to = ports[1 - from].lock().expect("port");
            for frame in out {
                to.give(&frame);
            }
        }
        if !work {
            std::thread::yield_now();
        }
    }
}

/// The one's complement sum of 16-bit words.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words =
        parts.iter().flat_map(|p| p.chunks(2)).map(|w| u64::from(w[0]) << 8 | w.get(1).map_or(0, |&b| b.into()));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Segments of a TCP frame over IPv4, header included, as a NIC would make them (virtio 1.3, section 5.1.6.2).
fn segment(frame: &[u8]) -> Vec<Vec<u8>> {
    let size = usize::from(u16::from_le_bytes([frame[4], frame[5]]));
    if frame[1] != 1 {
        return vec![frame.to_vec()];
    }
    let (ip, tcp, payload) = (HEADER + 14, HEADER + 34, HEADER + 54);
    let first = u32::from_be_bytes([frame[tcp + 4], frame[tcp + 5], frame[tcp + 6], frame[tcp + 7]]);
    let segment = |(i, data): (usize, &[u8])| {
        let mut s = [&frame[..payload], data].concat();
        s[..HEADER].fill(0);
        let total = (s.len() - ip) as u16;
        s[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
        s[ip + 10..ip + 12].fill(0);
        let sum = checksum(&[&s[ip..tcp]]);
        s[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        s[tcp + 4..tcp + 8].copy_from_slice(&first.wrapping_add((i * size) as u32).to_be_bytes());
        s[tcp + 16..tcp + 18].fill(0);
        let length = (s.len() - tcp) as u16;
        let sum = checksum(&[&s[ip + 12..ip + 20], &[0, 6], &length.to_be_bytes(), &s[tcp..]]);
        s[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        s
    };
    frame[payload..].chunks(size).enumerate().map(segment).collect()
}
