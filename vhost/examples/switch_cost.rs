//! What switching from guest to guest costs, rings, lookup and copy together: nanoseconds per frame of one PMD thread, without a firewall.
//!
//!     cargo run --release -p ferry-vhost --example switch_cost [log] [alone|guest [RING [BYTES [STEPS]]]]
//!     cargo run --release -p ferry-vhost --example switch_cost compare
//!
//! `compare` tells what dirty-page logging and the tracking of connections' changes take, as `alone`, with and without firewalls at both ends: spans of
//! some milliseconds without and with it take turns, so that the machine's moods meet both. Pairs of them are compared; shown is what is
//! lost of the throughput, the median of all pairs and, in brackets, their quartiles.
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
use ferry_dataplane::testing::synthetic::{FirewallLoad, Vms, datagram, firewall_switch, frame, l2_switch};
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
    /// Connections to send on; 0: what is sent is no datagram.
    connections: u32,
}

impl Guests {
    /// Sends up to `most` frames and makes received buffers available again. Returns how many were received.
    fn turn(&mut self, most: u32) -> u32 {
        let Self { sender, receiver, connections } = self;
        let got = receiver.returned();
        for n in receiver.avail..receiver.avail + got {
            // What a receiver looks at.
            std::hint::black_box(receiver.mem.u32(receiver.buffer(n) + 24).load(Ordering::Relaxed));
        }
        receiver.offer(got);
        sender.returned();
        let room = (u32::from(SIZE) - (sender.avail - sender.used)).min(most);
        for n in sender.avail..sender.avail + room {
            match n.checked_rem(*connections) {
                Some(_) if *connections == 1 => {}
                None => sender.mem.u32(sender.buffer(n) + 12 + 16).store(n, Ordering::Relaxed),
                Some(connection) => name(&sender.mem, sender.buffer(n) + 12, connection),
            }
        }
        sender.offer(room);
        got
    }
}

/// Makes the datagram at `at` one of a connection of its own. The sum of the IPv4 header stays what it is.
fn name(mem: &GuestMem, at: u64, connection: u32) {
    const PORTS: u32 = 62_500;
    let (high, low) = ((connection / PORTS) as u16, (connection % PORTS) as u16);
    mem.u16(at + 30).store((0x0a00 + high).to_be(), Ordering::Relaxed);
    mem.u16(at + 32).store((!high).to_be(), Ordering::Relaxed);
    mem.u16(at + 34).store((1024 + low).to_be(), Ordering::Relaxed);
}

/// What a frontend does that copies a guest's memory: takes all bits of a log. Returns how many there were.
fn take(log: &DirtyLog) -> u64 {
    let words = log.size() / 8;
    // SAFETY: the mapping, which begins at a page, has so many words; all access to it is atomic.
    let words = unsafe { std::slice::from_raw_parts(log.base().as_ptr().cast::<AtomicU64>(), words) };
    let dirty = words.iter().filter(|word| word.load(Ordering::Relaxed) != 0);
    dirty.map(|word| u64::from(word.swap(0, Ordering::AcqRel).count_ones())).sum()
}

/// `connections`: of datagrams, past firewalls at both ends; 0: none. The datagrams of one connection have checksums.
fn guests_and_switch(
    features: u64,
    len: u32,
    connections: u32,
    logs: &[Arc<DirtyLog>],
) -> (Guests, Worker<Vhost>, Option<Vms>) {
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
    let content = if connections == 0 { frame(len as usize) } else { datagram(len as usize, connections == 1) };
    for n in 0..u32::from(SIZE) {
        mem.write(sender.buffer(n) + 12, &content);
    }
    let (rx, tx) = ([a.rx(0), None], [a.tx(), b.tx()]);
    let (worker, vms) = if connections == 0 {
        (l2_switch(&domain, rx, &tx), None)
    } else {
        firewall_switch(&domain, rx, &tx, &FirewallLoad::new(connections, true))
            .map(|(w, vms)| (Some(w), Some(vms)))
            .unwrap_or_default()
    };
    (Guests { sender, receiver, connections }, worker.expect("a fresh domain has room for a reader"), vms)
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

/// Cycles per frame of so many steps, of the switch alone.
fn span(guests: &mut Guests, worker: &mut Worker<Vhost>, steps: u32, logs: &[Arc<DirtyLog>]) -> f64 {
    let mut taken = 0;
    for _ in 0..steps {
        let got = guests.turn(u32::from(BURST));
        std::hint::black_box(got);
        let from = cycles();
        step(worker);
        taken += cycles() - from;
    }
    for log in logs {
        std::hint::black_box(take(log));
    }
    taken as f64 / f64::from(steps) / f64::from(BURST)
}

/// Pairs of spans without and with something.
#[derive(Default)]
struct Pairs(Vec<[f64; 2]>);

impl Pairs {
    /// `span`: cycles per frame without it, or with it. Which comes first alternates.
    fn take_turns(&mut self, time: Duration, mut span: impl FnMut(bool) -> f64) {
        let began = Instant::now();
        while began.elapsed() < time {
            let first = self.0.len() % 2 == 1;
            let one = span(first);
            let other = span(!first);
            self.0.push(if first { [other, one] } else { [one, other] });
        }
    }

    fn print(&self, name: &str, per_ns: f64) {
        let sorted = |of: &dyn Fn(&[f64; 2]) -> f64| {
            let mut all: Vec<f64> = self.0.iter().map(of).collect();
            all.sort_unstable_by(f64::total_cmp);
            [25, 50, 75].map(|percent| all[all.len() * percent / 100])
        };
        let [_, without, _] = sorted(&|pair| pair[0] / per_ns);
        let [_, with, _] = sorted(&|pair| pair[1] / per_ns);
        let [low, lost, high] = sorted(&|[without, with]| 100.0 * (1.0 - without / with));
        println!("{name:<48} {without:>8.1} {with:>8.1} {lost:>7.1} [{low:.1}, {high:.1}] {:>6}", self.0.len());
    }
}

/// Memory lies elsewhere in each.
const SWITCHES: usize = 6;

fn compare(per_ns: f64) {
    println!("{:<48} {:>8} {:>8} {:>7}", "", "without", "with", "lost %");
    let cases = [(60u32, 0u32), (1514, 0), (60, 1), (1514, 1), (60, 10_000), (60, 1_000_000)];
    for (ring, features) in [("split", 0), ("packed", feature::RING_PACKED)] {
        for (len, connections) in cases {
            // In each span every connection has packets.
            let steps = (connections / 50).clamp(2000, 20_000);
            let time = TIME * if steps > 2000 { 4 } else { 1 };
            let what = if connections == 0 { "bridge".into() } else { format!("firewalls, {connections} connections") };
            let (mut logging, mut tracking) = (Pairs::default(), Pairs::default());
            for _ in 0..SWITCHES {
                let logs: Vec<_> = (0..2).map(|_| DirtyLog::map(&memfd(4096), 0, 4096).expect("a log")).collect();
                let mut silent = guests_and_switch(features, len, connections, &[]);
                let mut logged = guests_and_switch(features, len, connections, &logs);
                let warm_up = 2 * connections / u32::from(BURST) + 2000;
                for (guests, worker, _) in [&mut silent, &mut logged] {
                    span(guests, worker, warm_up, &logs);
                }
                logging.take_turns(time, |on| {
                    let (guests, worker, _) = if on { &mut logged } else { &mut silent };
                    span(guests, worker, steps, &logs)
                });
                let (guests, worker, Some(vms)) = &mut silent else { continue };
                assert_eq!(vms.connections(), [connections as usize; 2]);
                tracking.take_turns(time, |on| {
                    vms.set_tracking(on);
                    span(guests, worker, steps, &logs)
                });
                vms.set_tracking(false);
            }
            logging.print(&format!("logging, {ring}, {} B, {what}", len + 4), per_ns);
            if connections != 0 {
                tracking.print(&format!("tracking, {ring}, {} B, {what}", len + 4), per_ns);
            }
        }
    }
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
    if mode == "compare" {
        return compare(per_ns);
    }
    let pages = if logged { "    pages" } else { "" };
    println!("{:<8} {:>6} {:>7} {:>7}{pages}", "ring", "bytes", "quiet", "typical");
    for (name, features) in [("split", 0), ("packed", feature::RING_PACKED)] {
        for len in [60u32, 128, 508, 1514] {
            if ring.as_ref().is_some_and(|r| r != name) || bytes.as_ref().is_some_and(|b| *b != len.to_string()) {
                continue;
            }
            let logs = if logged { 2 } else { 0 };
            let logs = (0..logs).map(|_| DirtyLog::map(&memfd(4096), 0, 4096).expect("a log")).collect::<Vec<_>>();
            let (guests, worker, _) = guests_and_switch(features, len, 0, &logs);
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
