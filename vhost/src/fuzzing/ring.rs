//! A guest that writes anything into its rings, and a switch that polls them.
#![allow(unsafe_code)] // Its job includes making a file to serve as guest memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // A panic is how a fuzzer learns of a bug.
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, RxBurst, TxFrame};
use ferry_dataplane::port::{RxQueue, TxPort, TxReport};
use ferry_dataplane::qsbr::Domain;

use crate::dirty_log::DirtyLog;
use crate::memory::{GuestRegion, MemoryMap, RegionSpec};
use crate::net_header::feature;
use crate::queue::PortQueues;
use crate::ring::{Ring, RingConfig};

/// Bytes of the file that are mapped, because pages are, but are not guest memory: nothing may be written there.
const SLACK: u64 = 512;
const CANARY: u8 = 0xa5;
const GUEST_ADDR: u64 = 0x1_0000;
const GUEST_SIZE: u64 = 0x1_0000 - 2 * SLACK;
/// Where each ring's three areas lie, from the start of guest memory: receive ring, then transmit ring.
const DESC: [u64; 2] = [0, 0x1000];
const DRIVER: [u64; 2] = [0x2000, 0x2400];
const DEVICE: [u64; 2] = [0x2800, 0x3000];
/// Indirect tables and buffers.
const DATA: u64 = 0x4000;
const USER_BASE: u64 = 0x7000_0000;

/// Takes bytes from the front, zeros when there are no more.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }
    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }
}

fn memfd(len: u64) -> File {
    // SAFETY: creates a new descriptor, owned by the File from here on.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ferry-fuzz".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(len).expect("memfd");
    file
}

/// The guest as the input plays it: writes anything anywhere.
struct Guest {
    file: File,
    size: u16,
    packed: bool,
}

impl Guest {
    fn write(&self, offset: u64, data: &[u8]) {
        let offset = offset.min(GUEST_SIZE - data.len() as u64);
        self.file.write_all_at(data, SLACK + offset).expect("write");
    }
    fn read_u16(&self, offset: u64) -> u16 {
        let mut b = [0; 2];
        self.file.read_exact_at(&mut b, SLACK + offset).expect("read");
        u16::from_le_bytes(b)
    }

    /// A descriptor whose parts are mostly plausible: that leads deepest.
    fn descriptor(&self, ring: usize, at: u64, input: &mut Input<'_>) {
        let shape = input.u8();
        let addr = match shape & 7 {
            0 => GUEST_ADDR + GUEST_SIZE - u64::from(input.u8()),
            1 => u64::from(input.u32()) << 32 | u64::from(input.u32()),
            2 => u64::MAX - u64::from(input.u8()),
            _ => GUEST_ADDR + DATA + u64::from(input.u16() & 0xbfff),
        };
        let len = match shape >> 3 & 7 {
            0 => input.u32(),
            1 => 16 * u32::from(input.u8()),
            2 => u32::from(input.u8() & 31),
            _ => 64 + u32::from(input.u16() & 0x7ff),
        };
        const NEXT: u16 = 1;
        const INDIRECT: u16 = 4;
        let direction = if ring == 0 { 2 } else { 0 };
        let style = input.u8();
        let mut flags = match style & 15 {
            0 => input.u16(),
            1 | 2 => direction | NEXT,
            3 => INDIRECT,
            4 => direction ^ 2,
            _ => direction,
        };
        if self.packed {
            flags |= if style & 0x10 == 0 { 0x80 } else { 0x8000 };
        }
        let other = input.u8();
        let other = if style & 0xe0 == 0 { u16::from(other) << 8 } else { u16::from(other) % self.size };
        let (third, fourth) = if self.packed { (other, flags) } else { (flags, other) };
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &third.to_le_bytes());
        self.write(at + 14, &fourth.to_le_bytes());
    }

    /// Makes what stands in the descriptors available.
    fn offer(&self, ring: usize, input: &mut Input<'_>) {
        let n = input.u8();
        if self.packed {
            for _ in 0..n & 15 {
                let at = DESC[ring] + 16 * u64::from(input.u16() % self.size) + 14;
                let v = if input.u8() & 1 == 0 { 0x80 } else { 0x8000 };
                self.write(at, &(self.read_u16(at) & 7 | v).to_le_bytes());
            }
        } else {
            let idx = self.read_u16(DRIVER[ring] + 2);
            let outstanding = idx.wrapping_sub(self.read_u16(DEVICE[ring] + 2));
            // Rarely more than the ring holds.
            let most = if n & 0xf0 == 0 { u16::MAX } else { self.size.saturating_sub(outstanding) };
            let n = u16::from(n & 15).min(most);
            for i in 0..n {
                let slot = u64::from(idx.wrapping_add(i) & (self.size - 1));
                let head = input.u8();
                let head = if head == 0xff { input.u16() } else { u16::from(head) % self.size };
                self.write(DRIVER[ring] + 4 + 2 * slot, &head.to_le_bytes());
            }
            self.write(DRIVER[ring] + 2, &idx.wrapping_add(n).to_le_bytes());
        }
    }
}

/// A guest that writes whatever `data` says into its rings, tables and buffers, while the switch receives from and sends
/// into them, and restarts them when they fault.
///
/// # Panics
/// When an invariant is broken: a segment outside guest memory, a write outside it, a frame both refused and accepted,
/// a page written but not marked.
pub fn ring(data: &[u8]) {
    let mut input = Input(data);
    let bits = input.u8();
    let mut features = 0;
    for (i, bit) in [
        feature::RING_PACKED,
        feature::INDIRECT_DESC,
        feature::MRG_RXBUF,
        feature::EVENT_IDX,
        feature::IN_ORDER,
        feature::VERSION_1,
        feature::CSUM | feature::HOST_TSO4 | feature::GUEST_CSUM | feature::GUEST_TSO4,
        feature::LOG_ALL,
    ]
    .into_iter()
    .enumerate()
    {
        if bits >> i & 1 != 0 {
            features |= bit;
        }
    }
    let packed = features & feature::RING_PACKED != 0;
    let size = if packed { 1 + input.u8() as u16 % 200 } else { 1 << (input.u8() % 8) };

    let guest = Guest { file: memfd(GUEST_SIZE + 2 * SLACK), size, packed };
    guest.file.write_all_at(&[CANARY; SLACK as usize], 0).expect("write");
    guest.file.write_all_at(&[CANARY; SLACK as usize], SLACK + GUEST_SIZE).expect("write");
    let region = GuestRegion::map(RegionSpec {
        guest_addr: GUEST_ADDR,
        user_addr: USER_BASE,
        size: GUEST_SIZE,
        mmap_offset: SLACK,
        file: guest.file.try_clone().expect("dup"),
    })
    .expect("region");
    let host = region.host_range();
    let (first, end) = (host.start + SLACK as usize, host.start + (SLACK + GUEST_SIZE) as usize);
    let memory = MemoryMap::new(vec![region]).expect("map");
    let log = DirtyLog::map(&memfd(4096), 0, 64).expect("log");
    let config = |ring: usize, base: u32| RingConfig {
        index: ring as u16,
        size,
        desc_user_addr: USER_BASE + DESC[ring],
        driver_user_addr: USER_BASE + DRIVER[ring],
        device_user_addr: USER_BASE + DEVICE[ring],
        log_guest_addr: None,
        base,
        features,
        memory: Arc::clone(&memory),
        log: Some(Arc::clone(&log)),
        call: None,
        kick: None,
        err: None,
        base_mirror: None,
    };
    let domain = Domain::new();
    let mut guard = domain.register().expect("a free slot");
    let queues = PortQueues::new(1, Arc::clone(&domain)).expect("eventfd");
    let (mut rx, tx) = (queues.rx(0).expect("first"), queues.tx());
    let mut burst = RxBurst::new();
    let mut report = TxReport::default();
    let start = |vring: usize, base: u32, guard: &mut ferry_dataplane::qsbr::Guard| {
        guard.offline();
        if let Ok(ring) = Ring::new(config(vring, base)) {
            queues.start(vring, ring).expect("was stopped");
        }
        queues.set_enabled(vring, true);
        guard.online();
    };
    for vring in 0..2 {
        start(vring, 0x8000, &mut guard);
    }
    let private = [0x5a_u8; 9000];

    for _ in 0..400 {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 12 {
            0..=3 => {
                let ring = usize::from(input.u8() & 1);
                guest.descriptor(ring, DESC[ring] + 16 * u64::from(input.u16() % size), &mut input);
            }
            4 => guest.descriptor(usize::from(input.u8() & 1), DATA + 16 * u64::from(input.u8()), &mut input),
            5 => {
                let at = u64::from(input.u16());
                guest.write(at, &input.u16().to_le_bytes());
            }
            6 | 7 => guest.offer(usize::from(input.u8() & 1), &mut input),
            8 => {
                rx.arm(&guard);
                rx.disarm(&guard);
            }
            9 => {
                let vring = usize::from(input.u8() & 1);
                guard.offline();
                let base = queues.stop(vring).map_or(0x8000, |ring| {
                    let base = ring.base();
                    assert_eq!(ring.into_config().base, base);
                    base
                });
                guard.online();
                start(vring, base, &mut guard);
            }
            op => {
                // Everything the guest writes lies before this point: what changes now, the switch has written.
                let before = snapshot(&guest, &log);
                rx.receive(&guard, &mut burst);
                burst.take_snapshots();
                for i in 0..burst.len() {
                    for (addr, len) in burst.body(i, 0).pieces() {
                        let at = addr as usize;
                        assert!(at >= first && at + len as usize <= end, "a segment outside guest memory");
                    }
                }
                let n = usize::from(input.u8());
                let frames: Vec<TxFrame<'_>> = (0..if op == 10 { burst.len() } else { n % (BURST + 1) })
                    .map(|i| {
                        let own = op == 10;
                        let head = if own { burst.snapshot(i) } else { &private[..14 + (i * n * 7) % 8900] };
                        TxFrame {
                            head,
                            body: burst.body(if own { i } else { BURST }, head.len() as u32),
                            offload: burst.meta(i).map(|m| m.offload).unwrap_or_default(),
                            flow_hash: i as u32,
                        }
                    })
                    .collect();
                report.reset(DropReason::TxNotReady);
                tx.send(&guard, 0, &frames, &mut report);
                assert!(
                    frames.len() == 64 || report.accepted >> frames.len() == 0,
                    "accepted frames that there were not"
                );
                tx.flush(&guard, 0);
                rx.release(&guard);
                burst.clear();
                if features & feature::LOG_ALL != 0 {
                    check_marks(&guest, &log, &before);
                }
                guard.quiescent();
                while let Some(fault) = queues.take_fault() {
                    let vring = usize::from(fault.vring);
                    assert!(!fault.to_string().is_empty());
                    guard.offline();
                    let base = queues.stop(vring).expect("a faulted ring is still started").base();
                    guard.online();
                    if !packed {
                        // A guest that resets its ring, or nothing would follow an index jump.
                        let used = guest.read_u16(DEVICE[vring] + 2);
                        guest.write(DRIVER[vring] + 2, &used.to_le_bytes());
                    }
                    start(vring, base, &mut guard);
                }
            }
        }
    }
    guard.offline();
    for vring in 0..2 {
        queues.stop(vring);
    }
    let mut slack = [0; SLACK as usize];
    for at in [0, SLACK + GUEST_SIZE] {
        guest.file.read_exact_at(&mut slack, at).expect("read");
        assert!(slack.iter().all(|&b| b == CANARY), "a write outside guest memory");
    }
}

fn snapshot(guest: &Guest, log: &DirtyLog) -> Vec<u8> {
    for byte in 0..log.size() {
        // SAFETY: inside the log's mapping; the rings do not run at this moment.
        unsafe { log.base().as_ptr().add(byte).write_volatile(0) };
    }
    let mut all = vec![0; GUEST_SIZE as usize];
    guest.file.read_exact_at(&mut all, SLACK).expect("read");
    all
}

fn check_marks(guest: &Guest, log: &DirtyLog, before: &[u8]) {
    let mut after = vec![0; GUEST_SIZE as usize];
    guest.file.read_exact_at(&mut after, SLACK).expect("read");
    for (page, (old, new)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
        assert!(old == new || log.is_marked(GUEST_ADDR + 4096 * page as u64), "page {page} was written and not marked");
    }
}

#[cfg(test)]
mod tests {
    /// Repeatable: a failing seed is printed and stays failing.
    #[test]
    fn rings_survive_a_thousand_seeds() {
        for seed in 0..1000u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let data: Vec<u8> = (0..1500)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 32) as u8
                })
                .collect();
            if let Err(panic) = std::panic::catch_unwind(|| super::ring(&data)) {
                eprintln!("seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }

    #[test]
    fn rings_survive_little_input() {
        super::ring(&[]);
        for a in 0..=255 {
            super::ring(&[a]);
            super::ring(&[a, a, a, 10, 11, 0]);
        }
    }
}
