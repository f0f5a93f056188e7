//! What the packet path costs without rings: nanoseconds per frame of 64 bytes, one thread, ports in private memory.
//!
//!     cargo run --release -p ferry-dataplane --features testing --example packet_path [NAME ...]
//!
//! Shown is what the quietest bursts (2nd percentile) and the typical ones (median) take. TCP sends in both directions. `new` is
//! nanoseconds per handshake (SYN, SYN-ACK, ACK) at both ends while the tables fill up to the named number of connections, without their
//! removal; `syn`, `syn-ack` and `ack` are its parts. Bursts are of 64 frames, `alone` of one.
use std::time::{Duration, Instant};

use ferry_dataplane::clock::cycles;
use ferry_dataplane::frame::BURST;
use ferry_dataplane::testing::synthetic::tcp::{Phase, TcpSwitch};
use ferry_dataplane::testing::synthetic::{FirewallLoad, SyntheticKinds, firewall_worker, l2_worker};
use ferry_dataplane::worker::Worker;

/// How long each case is measured.
const TIME: Duration = Duration::from_millis(800);

/// Time-stamp counter ticks per nanosecond.
fn ticks_per_ns() -> f64 {
    let (began, from) = (Instant::now(), cycles());
    while began.elapsed() < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
    (cycles() - from) as f64 / began.elapsed().as_nanos() as f64
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let per_ns = ticks_per_ns();
    let measure = |name: &str, burst: usize, warm_up: usize, make: &dyn Fn() -> Worker<SyntheticKinds>| {
        if !wanted.is_empty() && !wanted.iter().any(|w| name == w) {
            return;
        }
        let mut worker = make();
        for _ in 0..warm_up {
            worker.step();
        }
        let mut samples = Vec::with_capacity(1 << 20);
        let began = Instant::now();
        while began.elapsed() < TIME {
            for _ in 0..64 {
                let from = cycles();
                worker.step();
                samples.push(cycles() - from);
            }
        }
        print(name, per_ns, samples, burst);
    };
    println!("{:<32} {:>7} {:>7}", "", "quiet", "typical");
    for (bytes, stations) in [(64, 1), (64, 1000), (1518, 1)] {
        measure(&format!("l2 {bytes} B, {stations} pairs"), BURST, 2000, &|| {
            l2_worker(bytes, stations).expect("a fresh domain has room for a reader")
        });
    }
    // The last ones: frames that come alone.
    let loads = |burst: usize| {
        let ends = if burst == 1 { &[true][..] } else { &[false, true] };
        ends.iter().flat_map(move |&both_ends| {
            let loads = [1, 10_000, 1_000_000].map(|connections| {
                let alone = if burst == 1 { ", alone" } else { "" };
                let name = format!("{} {connections}{alone}", if both_ends { "both ends" } else { "one end" });
                (name, FirewallLoad { frame_bytes: 64, connections, rules: 10, both_ends, burst })
            });
            loads.into_iter().take(if burst == 1 { 2 } else { 3 })
        })
    };
    let loads = || loads(BURST).chain(loads(1));
    for (name, load) in loads() {
        measure(&name, load.burst, 2 * load.connections as usize / load.burst + 2000, &|| {
            firewall_worker(load).expect("memory for the tables").0
        });
    }
    for (name, load) in loads() {
        tcp(&format!("tcp {name}"), &wanted, per_ns, load);
    }
}

/// Opens the connections of a load, then sends on them, unless only the former is wanted.
fn tcp(name: &str, wanted: &[String], per_ns: f64, load: FirewallLoad) {
    let name_of_new = format!("{name} new");
    let (all, new) = [name, &name_of_new].map(|name| wanted.iter().any(|w| name == w)).into();
    if !wanted.is_empty() && !all && !new {
        return;
    }
    let mut switch = TcpSwitch::new(load).expect("memory for the tables");
    let mut offered = 0;
    let mut step = |switch: &mut TcpSwitch| {
        let phase = switch.lay_out();
        offered +=
            if phase == Phase::Data { 2 * load.burst } else { load.burst.min(switch.connections() as usize) } as u64;
        let from = cycles();
        switch.step();
        (phase, cycles() - from)
    };
    let mut opening: [Vec<u64>; 3] = Default::default();
    loop {
        let (phase, taken) = step(&mut switch);
        match phase {
            Phase::Syn => opening[0].push(taken),
            Phase::SynAck => opening[1].push(taken),
            Phase::Ack => opening[2].push(taken),
            Phase::Data => break,
        }
    }
    if all || !new {
        for _ in 0..2 * switch.connections() as usize / load.burst + 2000 {
            step(&mut switch);
        }
        let mut samples = Vec::with_capacity(1 << 20);
        let began = Instant::now();
        while began.elapsed() < TIME {
            for _ in 0..64 {
                samples.push(step(&mut switch).1);
            }
        }
        print(name, per_ns, samples, 2 * load.burst);
    }
    let delivered: u64 = switch.delivered().iter().sum();
    assert_eq!(delivered, offered, "{name}: segments were dropped");
    if opening[0].len() > 1 {
        let [syn, syn_ack, ack] = &opening;
        let whole = syn.iter().zip(syn_ack).zip(ack).map(|((a, b), c)| a + b + c).collect();
        print(&name_of_new, per_ns, whole, load.burst);
        for (part, samples) in ["syn", "syn-ack", "ack"].into_iter().zip(opening) {
            print(&format!("  {part}"), per_ns, samples, load.burst);
        }
    }
}

/// A row of the table: nanoseconds per frame of steps that took so many ticks and held `frames` each.
fn print(name: &str, per_ns: f64, mut samples: Vec<u64>, frames: usize) {
    samples.sort_unstable();
    let at =
        |percent: usize| samples.get(samples.len() * percent / 100).map_or(0.0, |&t| t as f64 / per_ns / frames as f64);
    println!("{name:<32} {:>7.1} {:>7.1}", at(2), at(50));
}
