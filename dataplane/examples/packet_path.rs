//! What the packet path costs without rings: nanoseconds per frame, of 64 bytes unless said otherwise, one thread, ports in private memory.
//!
//!     cargo run --release -p ferry-dataplane --features testing --example packet_path [tracked] [steps=N] [NAME ...]
//!
//! Shown is what the quietest bursts (2nd percentile) and the typical ones (median) take. TCP sends in both directions. `new` is
//! nanoseconds per handshake (SYN, SYN-ACK, ACK) at both ends while the tables fill up to the named number of connections, without their
//! removal; `syn`, `syn-ack` and `ack` are its parts. Bursts are of 64 frames, `alone` of one. With `tracked` first, changes to the
//! connections are tracked, as during a migration. With `steps=N`, so many steps are made of each case after those that warm it up, for
//! profilers that count.
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
    let mut args = std::env::args().skip(1).peekable();
    let tracked = args.next_if(|arg| arg == "tracked").is_some();
    let steps = args.next_if(|arg| arg.starts_with("steps="));
    let steps = steps.map(|arg| arg.trim_start_matches("steps=").parse::<usize>().expect("a number of steps"));
    let goes_on = |done: usize, began: Instant| steps.map_or(began.elapsed() < TIME, |steps| done < steps);
    let wanted: Vec<String> = args.collect();
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
        while goes_on(samples.len(), began) {
            for _ in 0..64 {
                let from = cycles();
                measured(|| worker.step());
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
    for (name, load) in loads(tracked) {
        measure(&name, load.burst, 2 * load.connections as usize / load.burst + 2000, &|| {
            firewall_worker(load).expect("memory for the tables").0
        });
    }
    for (name, load) in loads(tracked) {
        tcp(&format!("tcp {name}"), &wanted, per_ns, &goes_on, load);
    }
}

/// What firewalls are measured with, and its name.
fn loads(tracked: bool) -> Vec<(String, FirewallLoad)> {
    let mut loads = Vec::new();
    let mut add = |name: String, load| loads.push((name, FirewallLoad { tracked, ..load }));
    for both_ends in [false, true] {
        let ends = if both_ends { "both ends" } else { "one end" };
        for connections in [1, 10_000, 1_000_000] {
            add(format!("{ends} {connections}"), FirewallLoad::new(connections, both_ends));
        }
        let long = FirewallLoad { frame_bytes: 1518, summed: true, ..FirewallLoad::new(1000, both_ends) };
        add(format!("{ends} 1000, 1518 B"), long);
    }
    for connections in [1, 10_000] {
        add(
            format!("both ends {connections}, alone"),
            FirewallLoad { burst: 1, ..FirewallLoad::new(connections, true) },
        );
    }
    loads
}

/// A function of its own, for profilers to count in: of the steps that are measured.
#[inline(never)]
fn measured<T>(f: impl FnOnce() -> T) -> T {
    f()
}

/// Opens the connections of a load, then sends on them, unless only the former is wanted.
fn tcp(name: &str, wanted: &[String], per_ns: f64, goes_on: &dyn Fn(usize, Instant) -> bool, load: FirewallLoad) {
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
        while goes_on(samples.len(), began) {
            for _ in 0..64 {
                samples.push(measured(|| step(&mut switch).1));
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
