//! A guest in a box: memory over memfd, a virtio driver for both ring formats as virtio 1.3 describes it, and one turn
//! of a switch that sends every received frame on.
#![allow(dead_code, unsafe_code)] // Each test file uses a part; guest memory is raw memory here as well.
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use ferry_dataplane::frame::{BURST, RxBurst, TxFrame};
use ferry_dataplane::port::{RxQueue, TxPort, TxReport};
use ferry_dataplane::qsbr::{Domain, Guard};
use ferry_vhost::dirty_log::DirtyLog;
use ferry_vhost::memory::{GuestRegion, MemoryMap, RegionSpec};
use ferry_vhost::net_header::feature;
use ferry_vhost::queue::{PortQueues, VhostRx, VhostTx};
use ferry_vhost::ring::{Ring, RingConfig};

pub const USER_BASE: u64 = 0x7f00_0000_0000;

pub fn memfd(len: u64) -> File {
    // SAFETY: creates a new descriptor, owned by the File from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"ferry-guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

pub fn eventfd() -> OwnedFd {
    // SAFETY: creates a new descriptor, owned from here on.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
}

/// Reads and clears an eventfd's count.
pub fn take_count(fd: &OwnedFd) -> u64 {
    let mut n = 0u64;
    // SAFETY: eight bytes into a local.
    let got = unsafe { libc::read(fd.as_raw_fd(), (&raw mut n).cast(), 8) };
    if got == 8 { n } else { 0 }
}

/// Guest memory as the guest sees it: `regions` pieces of equal size, adjacent in guest physical space, each its own file
/// (and so not adjacent in the switch's address space).
pub struct GuestMem {
    pub base: u64,
    region_size: u64,
    maps: Vec<(*mut u8, File)>,
}

// SAFETY: plain shared memory; the driver uses atomics where the device looks concurrently.
unsafe impl Send for GuestMem {}
// SAFETY: as above.
unsafe impl Sync for GuestMem {}

impl GuestMem {
    pub fn new(base: u64, regions: usize, region_size: u64) -> Arc<Self> {
        let maps = (0..regions)
            .map(|_| {
                let file = memfd(region_size);
                // SAFETY: a fresh mapping of our own file.
                let p = unsafe {
                    libc::mmap(
                        std::ptr::null_mut(),
                        region_size as usize,
                        libc::PROT_READ | libc::PROT_WRITE,
                        libc::MAP_SHARED,
                        file.as_raw_fd(),
                        0,
                    )
                };
                assert_ne!(p, libc::MAP_FAILED);
                (p.cast::<u8>(), file)
            })
            .collect();
        Arc::new(Self { base, region_size, maps })
    }

    pub fn size(&self) -> u64 {
        self.region_size * self.maps.len() as u64
    }

    pub fn end(&self) -> u64 {
        self.base + self.size()
    }

    /// What the switch is told.
    pub fn memory_map(&self) -> Arc<MemoryMap> {
        let regions = self
            .maps
            .iter()
            .enumerate()
            .map(|(i, (_, file))| {
                let guest_addr = self.base + i as u64 * self.region_size;
                GuestRegion::map(RegionSpec {
                    guest_addr,
                    user_addr: USER_BASE + guest_addr,
                    size: self.region_size,
                    mmap_offset: 0,
                    file: file.try_clone().unwrap(),
                })
                .unwrap()
            })
            .collect();
        MemoryMap::new(regions).unwrap()
    }

    pub fn ptr(&self, gpa: u64) -> *mut u8 {
        let off = gpa - self.base;
        let (p, _) = &self.maps[(off / self.region_size) as usize];
        // SAFETY: inside the mapping.
        unsafe { p.add((off % self.region_size) as usize) }
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            // SAFETY: ptr checks the range.
            unsafe { self.ptr(gpa + i as u64).write_volatile(*b) };
        }
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        // SAFETY: ptr checks the range.
        (0..len).map(|i| unsafe { self.ptr(gpa + i as u64).read_volatile() }).collect()
    }

    pub fn all(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.size() as usize);
        for (p, _) in &self.maps {
            // SAFETY: the whole mapping.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(*p, self.region_size as usize) });
        }
        out
    }

    pub fn u16(&self, gpa: u64) -> &AtomicU16 {
        assert_eq!(gpa % 2, 0);
        // SAFETY: mapped and aligned.
        unsafe { AtomicU16::from_ptr(self.ptr(gpa).cast()) }
    }

    pub fn u32(&self, gpa: u64) -> &AtomicU32 {
        assert_eq!(gpa % 4, 0);
        // SAFETY: mapped and aligned.
        unsafe { AtomicU32::from_ptr(self.ptr(gpa).cast()) }
    }
}

impl Drop for GuestMem {
    fn drop(&mut self) {
        for (p, _) in &self.maps {
            // SAFETY: mapped in `new`.
            unsafe { libc::munmap(p.cast(), self.region_size as usize) };
        }
    }
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    pub gpa: u64,
    pub len: u32,
    pub writable: bool,
}

struct InFlight {
    bufs: Vec<Buf>,
    descs: Vec<u16>,
    slots: u16,
}

/// A virtio driver's side of one ring.
pub struct Driver {
    pub mem: Arc<GuestMem>,
    pub index: u16,
    pub size: u16,
    pub features: u64,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
    /// Indirect tables, 1 KiB per chain.
    tables: u64,
    pub call: OwnedFd,
    pub kick: Arc<OwnedFd>,
    free: VecDeque<u16>,
    in_flight: Vec<Option<InFlight>>,
    // split: avail and used index; packed: slot and wrap of both.
    pub next_avail: u16,
    pub avail_wrap: bool,
    pub next_used: u16,
    pub used_wrap: bool,
    free_slots: u16,
    /// Packed: head flags not yet written.
    unpublished: Option<(u16, u16)>,
    published: (u16, bool),
}

fn align(at: u64, to: u64) -> u64 {
    at.next_multiple_of(to)
}

impl Driver {
    /// Bytes of guest memory a ring takes, tables included.
    pub fn footprint(size: u16) -> u64 {
        let n = u64::from(size);
        align(16 * n, 4096) + align(6 + 2 * n, 4096) + align(6 + 8 * n, 4096) + 1024 * n
    }

    pub fn new(mem: &Arc<GuestMem>, index: u16, size: u16, features: u64, at: u64) -> Self {
        let n = u64::from(size);
        let desc = at;
        let driver = desc + align(16 * n, 4096);
        let device = driver + align(6 + 2 * n, 4096);
        let tables = device + align(6 + 8 * n, 4096);
        Self {
            mem: Arc::clone(mem),
            index,
            size,
            features,
            desc,
            driver,
            device,
            tables,
            call: eventfd(),
            kick: Arc::new(eventfd()),
            free: (0..size).collect(),
            in_flight: (0..size).map(|_| None).collect(),
            next_avail: 0,
            avail_wrap: true,
            next_used: 0,
            used_wrap: true,
            free_slots: size,
            unpublished: None,
            published: (0, true),
        }
    }

    pub fn packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }
    pub fn event_idx(&self) -> bool {
        self.features & feature::EVENT_IDX != 0
    }

    /// Base of a ring that has never run.
    pub fn fresh_base(&self) -> u32 {
        if self.packed() { 0x8000_8000 } else { 0 }
    }

    /// Starts the indexes of a never used ring elsewhere: wraparound comes soon.
    pub fn start_at(&mut self, idx: u16) {
        assert!(!self.packed());
        self.mem.u16(self.driver + 2).store(idx, Ordering::Relaxed);
        self.mem.u16(self.device + 2).store(idx, Ordering::Relaxed);
        (self.next_avail, self.next_used, self.published) = (idx, idx, (idx, true));
    }

    pub fn config(&self, memory: &Arc<MemoryMap>, base: u32, log: Option<&Arc<DirtyLog>>) -> RingConfig {
        RingConfig {
            index: self.index,
            size: self.size,
            desc_user_addr: USER_BASE + self.desc,
            driver_user_addr: USER_BASE + self.driver,
            device_user_addr: USER_BASE + self.device,
            log_guest_addr: log.map(|_| self.device),
            base,
            features: self.features | if log.is_some() { feature::LOG_ALL } else { 0 },
            memory: Arc::clone(memory),
            log: log.cloned(),
            call: Some(self.call.try_clone().unwrap()),
            kick: Some(Arc::clone(&self.kick)),
            err: None,
            base_mirror: None,
        }
    }

    /// Writes descriptor `i` of the table or ring at `table`, as the split format lays it out.
    pub fn write_split_desc(&self, table: u64, i: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(i);
        self.mem.write(at, &gpa.to_le_bytes());
        self.mem.write(at + 8, &len.to_le_bytes());
        self.mem.write(at + 12, &flags.to_le_bytes());
        self.mem.write(at + 14, &next.to_le_bytes());
    }

    pub fn write_packed_desc(&self, table: u64, i: u16, gpa: u64, len: u32, id: u16) {
        let at = table + 16 * u64::from(i);
        self.mem.write(at, &gpa.to_le_bytes());
        self.mem.write(at + 8, &len.to_le_bytes());
        self.mem.write(at + 12, &id.to_le_bytes());
    }

    pub fn set_avail_entry(&self, idx: u16, head: u16) {
        self.mem.u16(self.driver + 4 + 2 * u64::from(idx & (self.size - 1))).store(head, Ordering::Relaxed);
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.mem.u16(self.driver + 2).store(idx, Ordering::Release);
    }

    fn write_table(&self, table: u64, bufs: &[Buf]) {
        for (i, b) in bufs.iter().enumerate() {
            let w = if b.writable { WRITE } else { 0 };
            if self.packed() {
                self.write_packed_desc(table, i as u16, b.gpa, b.len, 0);
                self.mem.u16(table + 16 * i as u64 + 14).store(w, Ordering::Relaxed);
            } else {
                let next = if i + 1 < bufs.len() { NEXT } else { 0 };
                self.write_split_desc(table, i as u16, b.gpa, b.len, w | next, i as u16 + 1);
            }
        }
    }

    /// Room for one more chain of `descs` descriptors.
    pub fn has_room(&self, descs: usize, indirect: bool) -> bool {
        let need = if indirect { 1 } else { descs };
        if self.packed() {
            usize::from(self.free_slots) >= need && !self.free.is_empty()
        } else {
            self.free.len() >= need
        }
    }

    /// Adds a chain; the device sees it after `publish`. False when the ring is full.
    pub fn add(&mut self, bufs: &[Buf], indirect: bool) -> bool {
        if !self.has_room(bufs.len(), indirect) {
            return false;
        }
        if self.packed() {
            self.add_packed(bufs, indirect)
        } else {
            self.add_split(bufs, indirect)
        }
        true
    }

    fn add_split(&mut self, bufs: &[Buf], indirect: bool) {
        let need = if indirect { 1 } else { bufs.len() };
        let descs: Vec<u16> = self.free.drain(..need).collect();
        let head = descs[0];
        if indirect {
            let table = self.tables + 1024 * u64::from(head);
            self.write_table(table, bufs);
            self.write_split_desc(self.desc, head, table, 16 * bufs.len() as u32, INDIRECT, 0xdead);
        } else {
            for (i, b) in bufs.iter().enumerate() {
                let w = if b.writable { WRITE } else { 0 };
                let (next, flag) = descs.get(i + 1).map_or((0xbeef, 0), |n| (*n, NEXT));
                self.write_split_desc(self.desc, descs[i], b.gpa, b.len, w | flag, next);
            }
        }
        self.set_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight[usize::from(head)] = Some(InFlight { bufs: bufs.to_vec(), descs, slots: 1 });
    }

    fn add_packed(&mut self, bufs: &[Buf], indirect: bool) {
        let id = self.free.pop_front().unwrap();
        let list: Vec<Buf> = if indirect {
            let table = self.tables + 1024 * u64::from(id);
            self.write_table(table, bufs);
            vec![Buf { gpa: table, len: 16 * bufs.len() as u32, writable: false }]
        } else {
            bufs.to_vec()
        };
        for (i, b) in list.iter().enumerate() {
            let last = i + 1 == list.len();
            self.write_packed_desc(self.desc, self.next_avail, b.gpa, b.len, if last { id } else { 0x5a5a });
            let mut flags = if self.avail_wrap { AVAIL } else { USED };
            flags |=
                if last { 0 } else { NEXT } | if b.writable { WRITE } else { 0 } | if indirect { INDIRECT } else { 0 };
            if self.unpublished.is_none() {
                self.unpublished = Some((self.next_avail, flags));
            } else {
                let at = self.desc + 16 * u64::from(self.next_avail) + 14;
                self.mem.u16(at).store(flags, Ordering::Release);
            }
            self.next_avail += 1;
            if self.next_avail == self.size {
                self.next_avail = 0;
                self.avail_wrap = !self.avail_wrap;
            }
        }
        self.free_slots -= list.len() as u16;
        self.in_flight[usize::from(id)] =
            Some(InFlight { bufs: bufs.to_vec(), descs: vec![id], slots: list.len() as u16 });
    }

    /// Makes everything added available. True when the device asked for a kick (2.7.10, 2.8.10).
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = (self.next_avail, self.avail_wrap);
        if old == self.published && self.unpublished.is_none() {
            return false;
        }
        if self.packed() {
            let (slot, flags) = self.unpublished.take().unwrap();
            self.mem.u16(self.desc + 16 * u64::from(slot) + 14).store(flags, Ordering::Release);
            fence(Ordering::SeqCst);
            let event = self.mem.u32(self.device).load(Ordering::SeqCst);
            match event >> 16 {
                0 => true,
                1 => false,
                2 => {
                    assert!(self.event_idx());
                    // The device wants a kick when this very descriptor is made available.
                    let (mut idx, mut wrap) = old;
                    while (idx, wrap) != self.published {
                        if event as u16 == idx | (u16::from(wrap) << 15) {
                            return true;
                        }
                        idx += 1;
                        if idx == self.size {
                            (idx, wrap) = (0, !wrap);
                        }
                    }
                    false
                }
                f => panic!("reserved event flags {f}"),
            }
        } else {
            self.set_avail_idx(self.next_avail);
            fence(Ordering::SeqCst);
            if self.event_idx() {
                assert_eq!(self.mem.u16(self.device).load(Ordering::Relaxed), 0, "2.7.10: flags are zero");
                let event = self.mem.u16(self.device + 4 + 8 * u64::from(self.size)).load(Ordering::SeqCst);
                self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old.0)
            } else {
                self.mem.u16(self.device).load(Ordering::SeqCst) & 1 == 0
            }
        }
    }

    /// The next used chain: its buffers and the length written.
    pub fn poll_used(&mut self) -> Option<(Vec<Buf>, u32)> {
        let (id, len) = if self.packed() {
            let at = self.desc + 16 * u64::from(self.next_used);
            let flags = self.mem.u16(at + 14).load(Ordering::Acquire);
            let (a, u) = (flags & AVAIL != 0, flags & USED != 0);
            if a != self.used_wrap || u != self.used_wrap {
                return None;
            }
            let id = self.mem.u16(at + 12).load(Ordering::Relaxed);
            let len = self.mem.u32(at + 8).load(Ordering::Relaxed);
            (id, if flags & WRITE != 0 { len } else { 0 })
        } else {
            if self.mem.u16(self.device + 2).load(Ordering::Acquire) == self.next_used {
                return None;
            }
            let at = self.device + 4 + 8 * u64::from(self.next_used & (self.size - 1));
            (self.mem.u32(at).load(Ordering::Relaxed) as u16, self.mem.u32(at + 4).load(Ordering::Relaxed))
        };
        let flight = self.in_flight[usize::from(id)].take().expect("the device used a chain twice");
        if self.packed() {
            self.free.push_back(id);
            self.free_slots += flight.slots;
            self.next_used += flight.slots;
            if self.next_used >= self.size {
                self.next_used -= self.size;
                self.used_wrap = !self.used_wrap;
            }
        } else {
            self.free.extend(&flight.descs);
            self.next_used = self.next_used.wrapping_add(1);
        }
        Some((flight.bufs, len))
    }

    /// Tells the device whether to notify about the next used chain.
    pub fn want_calls(&self, on: bool) {
        if self.packed() {
            let v = match (on, self.event_idx()) {
                (false, _) => 1 << 16,
                (true, false) => 0,
                (true, true) => 2 << 16 | u32::from(self.next_used) | u32::from(self.used_wrap) << 15,
            };
            self.mem.u32(self.driver).store(v, Ordering::SeqCst);
        } else if self.event_idx() {
            let event = if on { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.mem.u16(self.driver + 4 + 2 * u64::from(self.size)).store(event, Ordering::SeqCst);
        } else {
            self.mem.u16(self.driver).store(u16::from(!on), Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }
}

/// A small repeatable generator (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// The switch's side: one port and the PMD thread's state.
pub struct Switch {
    pub domain: Arc<Domain>,
    pub guard: Guard,
    pub queues: Arc<PortQueues>,
    pub rx: VhostRx,
    pub tx: VhostTx,
    pub burst: RxBurst,
    pub report: TxReport,
    /// The guest rewrites its buffers meanwhile: reading twice may give two answers.
    pub memory_moves: bool,
}

impl Switch {
    pub fn new(pairs: usize) -> Self {
        let domain = Domain::new();
        let guard = domain.register().unwrap();
        let queues = PortQueues::new(pairs, Arc::clone(&domain)).unwrap();
        for i in 0..2 * pairs {
            queues.set_enabled(i, true);
        }
        let rx = queues.rx(0).unwrap();
        let tx = queues.tx();
        Self { domain, guard, queues, rx, tx, burst: RxBurst::new(), report: TxReport::default(), memory_moves: false }
    }

    /// The session thread's calls happen while this PMD thread sleeps.
    pub fn start(&mut self, vring: usize, config: RingConfig) {
        let call = config.call.as_ref().map(|c| c.try_clone().unwrap());
        if let Some(call) = &call {
            take_count(call);
        }
        self.guard.offline();
        self.queues.start(vring, Ring::new(config).unwrap()).unwrap();
        self.guard.online();
        if let Some(call) = &call {
            assert_eq!(take_count(call), 1, "a ring that starts notifies once");
        }
    }

    pub fn stop(&mut self, vring: usize) -> Box<Ring> {
        self.guard.offline();
        let ring = self.queues.stop(vring).unwrap();
        self.guard.online();
        ring
    }

    pub fn receive_only(&mut self) {
        self.burst.clear();
        self.rx.receive(&self.guard, &mut self.burst);
    }

    /// Receives a burst; returns the frames. Their buffers are still held.
    pub fn receive(&mut self) -> Vec<Vec<u8>> {
        self.receive_only();
        self.burst.take_snapshots();
        (0..self.burst.len())
            .map(|i| {
                let body = self.burst.body(i, 0);
                let mut v = vec![0; body.len() as usize];
                assert_eq!(body.read(&mut v), v.len());
                assert!(self.memory_moves || v.starts_with(self.burst.snapshot(i)));
                v
            })
            .collect()
    }

    pub fn release(&mut self) {
        self.rx.release(&self.guard);
        self.burst.clear();
        self.guard.quiescent();
    }

    /// Sends what `receive` received back to the same guest; returns the mask of accepted frames.
    pub fn echo(&mut self) -> u64 {
        self.echo_timed(|| 0).0
    }

    /// As `echo`; also how far `clock` went while the frames were sent.
    pub fn echo_timed(&mut self, clock: impl Fn() -> u64) -> (u64, u64) {
        let frames: Vec<TxFrame<'_>> = (0..self.burst.len())
            .map(|i| {
                let head = self.burst.snapshot(i);
                TxFrame {
                    head,
                    body: self.burst.body(i, head.len() as u32),
                    offload: self.burst.meta(i).unwrap().offload,
                    flow_hash: i as u32,
                }
            })
            .collect();
        self.report.reset(ferry_dataplane::counters::DropReason::TxNotReady);
        let start = clock();
        self.tx.send(&self.guard, 0, &frames, &mut self.report);
        self.tx.flush(&self.guard, 0);
        (self.report.accepted, clock() - start)
    }

    /// Sends frames from private memory (body in one piece).
    pub fn send(&mut self, frames: &[&[u8]]) -> u64 {
        let list: Vec<TxFrame<'_>> = frames
            .iter()
            .take(BURST)
            .enumerate()
            .map(|(i, f)| TxFrame {
                head: f,
                body: ferry_dataplane::frame::Body::EMPTY,
                offload: Default::default(),
                flow_hash: i as u32,
            })
            .collect();
        self.report.reset(ferry_dataplane::counters::DropReason::TxNotReady);
        self.tx.send(&self.guard, 0, &list, &mut self.report);
        self.tx.flush(&self.guard, 0);
        self.guard.quiescent();
        self.report.accepted
    }
}
