//! Micro-benchmarks of the firewall on the packet path, one thread, no I/O: ns per frame of 64 bytes (UDP).
//!
//! `established` is to be read beside `l2_switching` of the `dataplane` benchmark; `new_connections` at 10,000 rules beside 10.
use std::sync::atomic::Ordering;

use divan::Bencher;
use divan::counter::ItemsCount;
use ferry_dataplane::frame::BURST;
use ferry_dataplane::testing::synthetic::{FirewallLoad, firewall_worker};

fn main() {
    divan::main();
}

/// Frames of known connections: one look-up at each end that has a firewall.
#[divan::bench(min_time = 1, args = [(1, false), (10_000, false), (1_000_000, false), (1, true), (10_000, true), (1_000_000, true)])]
fn established(bencher: Bencher<'_, '_>, (connections, both_ends): (u32, bool)) {
    let load = FirewallLoad::new(connections, both_ends);
    let (mut worker, _) = firewall_worker(load).expect("memory for the tables");
    for _ in 0..=connections as usize / BURST {
        worker.step();
    }
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| worker.step());
}

/// Frames that each open a connection: policy, limits and insertion, and the removal of the expired one in its place.
#[divan::bench(min_time = 1, args = [10, 100, 1000, 10_000])]
fn new_connections(bencher: Bencher<'_, '_>, rules: u32) {
    const CONNECTIONS: u32 = 64 * 1024;
    let load = FirewallLoad { rules, ..FirewallLoad::new(CONNECTIONS, false) };
    let (mut worker, now_ns) = firewall_worker(load).expect("memory for the table");
    let mut steps = 0;
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| {
        if steps == CONNECTIONS as usize / BURST {
            steps = 0;
            // Longer than an unanswered UDP flow's time-out.
            now_ns.fetch_add(40_000_000_000, Ordering::Relaxed);
            worker.refresh_clock();
        }
        steps += 1;
        worker.step()
    });
}
