//! What switching from guest to guest costs, rings, lookup and copy together: nanoseconds per frame of one PMD thread, without a firewall.
//!
//!     cargo run --release -p ferry-vhost --example switch_cost [log] [alone|guest [RING [BYTES [STEPS]]]]
//!
//! `alone`: the guests' work is done between the switch's steps, by the same thread, so everything is in its caches. `guest`: another thread,
//! on a core of its own, is both guests; it touches a line of each frame. Shown is what the quietest steps (2nd percentile) and the typical
//! ones (median) take; for `guest` these are spans of 1024 frames. With STEPS, `alone` makes so many steps of 64 frames, for profilers that
//! count. With `log` first, every page that is written is marked in dirty logs, one per guest, which are taken every 1024 steps, or
//! every millisecond where the guests have a thread; shown is also how many pages were found in them per frame.
#![allow(unsafe_code)] // Its job: guest memory is raw memory here, and the time-stamp counter is an instruction.
#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::clock::cycles;
use ferry_dataplane::pmd::Kinds;
use ferry_dataplane::qsbr::Domain;
use ferry_dataplane::testing::synthetic::{frame, l2_switch};
use ferry_dataplane::worker::{Step, Worker};
use ferry_vhost::dirty_log::DirtyLog;
use ferry_vhost::net_header::feature;
use ferry_vhost::queue::{PortQueues, VhostRx, VhostTx};
use ferry_vhost::ring::Ring;
use support::{AVAIL, Driver, GuestMem, USED, WRITE, memfd};

struct Vhost;

impl Kinds for Vhost {
    type Rx = VhostRx;
    type Tx = VhostTx;
}

const SIZE: u16 = 256;
const BURST: u16 = 64;
/// Buffers a power of two apart would fall into few sets of the cache.
const STRIDE: u64 = 2048 + 192;
/// Frames of a span.
const SPAN: u32 = 1024;
/// How long each case is measured.
const TIME: Duration = Duration::from_millis(700);

/// A ring whose buffers never change and are used in order, so that a guest has next to nothing to do.
struct Light {
    mem: Arc<GuestMem>,
    packed: bool,
    desc: u64,
    driver: u64,
    device: u64,
    data: u64,
    len: u32,
    writable: bool,
    /// Chains made available and seen used, since the beginning.
    avail: u32,
    used: u32,
}

impl Light {
    fn new(driver: &Driver, data: u64, len: u32, writable: bool) -> Self {
        let Driver { mem, desc, driver: avail, device, .. } = driver;
        let light = Self {
            mem: Arc::clone(mem),
            packed: driver.packed(),
            desc: *desc,
            driver: *avail,
            device: *device,
            data,
            len,
            writable,
            avail: 0,
            used: 0,
        };
        driver.want_calls(false);
        for i in 0..SIZE {
            let gpa = data + STRIDE * u64::from(i);
            if light.packed {
                driver.write_packed_desc(light.desc, i, gpa, len, i);
            } else {
                driver.write_split_desc(light.desc, i, gpa, len, if writable { WRITE } else { 0 }, 0);
                driver.set_avail_entry(i, i);
            }
        }
        light
    }

    fn buffer(&self, n: u32) -> u64 {
        self.data + STRIDE * u64::from(n % u32::from(SIZE))
    }

    /// The wrap counter's turn of a packed ring.
    fn flags(&self, n: u32, used: bool) -> u16 {
        let wrap = (n / u32::from(SIZE)).is_multiple_of(2);
        match (used, wrap) {
            (true, true) => AVAIL | USED,
            (true, false) => 0,
            (false, true) => AVAIL,
            (false, false) => USED,
        }
    }

    /// Makes `count` more buffers available.
    fn offer(&mut self, count: u32) {
        if self.packed {
            for n in self.avail..self.avail + count {
                let at = self.desc + 16 * u64::from(n % u32::from(SIZE));
                self.mem.u32(at + 8).store(self.len, Ordering::Relaxed);
                let flags = self.flags(n, false) | if self.writable { WRITE } else { 0 };
                self.mem.u16(at + 14).store(flags, Ordering::Release);
            }
        } else {
            self.mem.u16(self.driver + 2).store((self.avail + count) as u16, Ordering::Release);
        }
        self.avail += count;
    }

    /// Buffers that the switch has used since the last call.
    fn returned(&mut self) -> u32 {
        let before = self.used;
        if self.packed {
            while self.used != self.avail {
                let at = self.desc + 16 * u64::from(self.used % u32::from(SIZE));
                let flags = self.mem.u16(at + 14).load(Ordering::Acquire) & (AVAIL | USED);
                if flags != self.flags(self.used, true) {
                    break;
                }
                self.used += 1;
            }
        } else {
            let index = self.mem.u16(self.device + 2).load(Ordering::Acquire);
            self.used += u32::from(index.wrapping_sub(self.used as u16));
        }
        self.used - before
    }
}

/// Sender and receiver, each behind a port of its own.
struct Guests {
    sender: Light,
    receiver: Light,
}

impl Guests {
    /// Sends up to `most` frames and makes received buffers available again. Returns how many were received.
    fn turn(&mut self, most: u32) -> u32 {
        let Self { sender, receiver } = self;
        let got = receiver.returned();
        for n in receiver.avail..receiver.avail + got {
            // What a receiver looks at.
            std::hint::black_box(receiver.mem.u32(receiver.buffer(n) + 24).load(Ordering::Relaxed));
        }
        receiver.offer(got);
        sender.returned();
        let room = (u32::from(SIZE) - (sender.avail - sender.used)).min(most);
        for n in sender.avail..sender.avail + room {
            sender.mem.u32(sender.buffer(n) + 12 + 16).store(n, Ordering::Relaxed);
        }
        sender.offer(room);
        got
    }
}

/// What a frontend does that copies a guest's memory: takes all bits of a log. Returns how many there were.
fn take(log: &DirtyLog) -> u64 {
    let words = log.size() / 8;
    // SAFETY: the mapping, which begins at a page, has so many words; all access to it is atomic.
    let words = unsafe { std::slice::from_raw_parts(log.base().as_ptr().cast::<AtomicU64>(), words) };
    let dirty = words.iter().filter(|word| word.load(Ordering::Relaxed) != 0);
    dirty.map(|word| u64::from(word.swap(0, Ordering::AcqRel).count_ones())).sum()
}

fn guests_and_switch(features: u64, len: u32, logs: &[Arc<DirtyLog>]) -> (Guests, Worker<Vhost>) {
    let features = features | feature::VERSION_1 | feature::MRG_RXBUF;
    let mem = GuestMem::new(0x10_0000, 1, 8 << 20);
    let map = mem.memory_map();
    let domain = Domain::new();
    let ports = [(); 2].map(|()| PortQueues::new(1, Arc::clone(&domain)).expect("an eventfd"));
    let [a, b] = &ports;
    let rings: Vec<Driver> = (0..4)
        .map(|i| Driver::new(&mem, i % 2, SIZE, features, 0x10_0000 + u64::from(i) * Driver::footprint(SIZE)))
        .collect();
    for (ring, (guest, port)) in rings.iter().zip([(0, a), (0, a), (1, b), (1, b)]) {
        let config = ring.config(&map, ring.fresh_base(), logs.get(guest));
        port.set_enabled(usize::from(ring.index), true);
        port.start(usize::from(ring.index), Ring::new(config).expect("a sound ring")).expect("nothing runs there");
    }
    let sender = Light::new(&rings[1], 0x30_0000, len + 12, false);
    let mut receiver = Light::new(&rings[2], 0x50_0000, 2048, true);
    receiver.offer(u32::from(SIZE));
    for n in 0..u32::from(SIZE) {
        mem.write(sender.buffer(n) + 12, &frame(len as usize));
    }
    let worker = l2_switch(&domain, [a.rx(0), None], &[a.tx(), b.tx()]).expect("a fresh domain has room for a reader");
    (Guests { sender, receiver }, worker)
}

/// A function of its own, for profilers to count in.
#[inline(never)]
fn step(worker: &mut Worker<Vhost>) -> Step {
    worker.step()
}

/// Pages found in the logs.
type Pages = u64;

fn alone(
    mut guests: Guests,
    mut worker: Worker<Vhost>,
    steps: Option<usize>,
    logs: &[Arc<DirtyLog>],
) -> (Vec<f64>, Pages) {
    let mut pages = 0;
    let mut spans = Vec::with_capacity(1 << 20);
    let began = Instant::now();
    while steps.map_or(began.elapsed() < TIME, |steps| spans.len() < steps) {
        for _ in 0..100 {
            let got = guests.turn(u32::from(BURST));
            assert!(spans.is_empty() || got == u32::from(BURST), "frames were lost");
            let from = cycles();
            step(&mut worker);
            spans.push((cycles() - from) as f64 / f64::from(BURST));
            if spans.len().is_multiple_of(1024) {
                pages += logs.iter().map(|log| take(log)).sum::<u64>();
            }
        }
    }
    (spans, pages)
}

fn pin(core: usize) {
    // SAFETY: a zeroed set is an empty one; the call reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

fn with_guest(mut guests: Guests, mut worker: Worker<Vhost>, logs: &[Arc<DirtyLog>]) -> (Vec<f64>, Pages) {
    let stop = Arc::new(AtomicBool::new(false));
    let other = Arc::clone(&stop);
    let logs = logs.to_vec();
    let guest = std::thread::spawn(move || {
        pin(1);
        let mut spans = Vec::with_capacity(1 << 20);
        let (mut from, mut count) = (cycles(), 0);
        let (mut taken, mut pages) = (Instant::now(), 0);
        while !other.load(Ordering::Relaxed) {
            count += guests.turn(u32::from(SIZE));
            if count >= SPAN {
                let now = cycles();
                spans.push((now - from) as f64 / f64::from(count));
                (from, count) = (now, 0);
                if taken.elapsed() > Duration::from_millis(1) {
                    pages += logs.iter().map(|log| take(log)).sum::<u64>();
                    taken = Instant::now();
                }
            }
        }
        (spans, pages)
    });
    pin(0);
    let began = Instant::now();
    while began.elapsed() < TIME {
        for _ in 0..1000 {
            step(&mut worker);
        }
    }
    stop.store(true, Ordering::Relaxed);
    guest.join().expect("it does not panic")
}

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    let logged = args.next_if(|arg| arg == "log").is_some();
    let mode = args.next().unwrap_or_else(|| "alone".into());
    let (ring, bytes) = (args.next(), args.next());
    let steps = args.next().map(|steps| steps.parse().expect("a number of steps"));
    let (began, from) = (Instant::now(), cycles());
    while began.elapsed() < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
    let per_ns = (cycles() - from) as f64 / began.elapsed().as_nanos() as f64;
    let pages = if logged { "    pages" } else { "" };
    println!("{:<8} {:>6} {:>7} {:>7}{pages}", "ring", "bytes", "quiet", "typical");
    for (name, features) in [("split", 0), ("packed", feature::RING_PACKED)] {
        for len in [60u32, 128, 508, 1514] {
            if ring.as_ref().is_some_and(|r| r != name) || bytes.as_ref().is_some_and(|b| *b != len.to_string()) {
                continue;
            }
            let logs = if logged { 2 } else { 0 };
            let logs = (0..logs).map(|_| DirtyLog::map(&memfd(4096), 0, 4096).expect("a log")).collect::<Vec<_>>();
            let (guests, worker) = guests_and_switch(features, len, &logs);
            let (mut spans, pages) =
                if mode == "guest" { with_guest(guests, worker, &logs) } else { alone(guests, worker, steps, &logs) };
            let frames = spans.len() * if mode == "guest" { SPAN as usize } else { usize::from(BURST) };
            let pages = if logged { format!("{:>9.4}", pages as f64 / frames as f64) } else { String::new() };
            spans.sort_unstable_by(f64::total_cmp);
            let at = |percent: usize| spans[spans.len() * percent / 100] / per_ns;
            println!("{name:<8} {len:>6} {:>7.1} {:>7.1}{pages}", at(2), at(50));
        }
    }
}
