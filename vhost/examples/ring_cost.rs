//! What the rings themselves cost: time-stamp-counter cycles per frame for receive, snapshot, send and release, with guest
//! and switch on one core and everything in its caches. Cache misses between cores come on top and are not measured here.
//!
//!     cargo run --release -p ferry-vhost --example ring_cost [RING [BYTES]]
#[path = "../tests/support/mod.rs"]
mod support;

use ferry_vhost::net_header::feature;
use support::{Buf, Driver, GuestMem, Switch};

#[allow(unsafe_code)]
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: rdtsc reads a counter.
    return unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    };
    #[cfg(not(target_arch = "x86_64"))]
    return std::time::Instant::now().elapsed().as_nanos() as u64;
}

/// Of a machine with noisy neighbours: what the quietest moments (5th percentile) show.
fn quiet(mut v: Vec<u64>) -> f64 {
    v.sort_unstable();
    v[v.len() / 20] as f64
}

fn main() {
    const BURST: u64 = 64;
    const TURNS: usize = 3000;
    // Buffers a power of two apart would fall into few sets of the cache.
    const STRIDE: u64 = 2048 + 192;
    println!(
        "{:<26} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "ring", "bytes", "receive", "snapshot", "send", "release", "sum"
    );
    for (name, features, log) in [
        ("split", 0, false),
        ("split, event index", feature::EVENT_IDX, false),
        ("split, dirty log", 0, true),
        ("packed", feature::RING_PACKED, false),
        ("packed, dirty log", feature::RING_PACKED, true),
    ] {
        for len in [60usize, 508, 1514] {
            let mut wanted = std::env::args().skip(1);
            if wanted.next().is_some_and(|w| w != name) || wanted.next().is_some_and(|w| w != len.to_string()) {
                continue;
            }
            let features = features | feature::VERSION_1 | feature::MRG_RXBUF;
            let mem = GuestMem::new(0x10_0000, 1, 8 << 20);
            let map = mem.memory_map();
            let f = Driver::footprint(256);
            let mut rx = Driver::new(&mem, 0, 256, features, 0x10_0000);
            let mut tx = Driver::new(&mem, 1, 256, features, 0x10_0000 + f);
            let log = log.then(|| ferry_vhost::dirty_log::DirtyLog::map(&support::memfd(4096), 0, 4096).unwrap());
            let mut switch = Switch::new(1);
            switch.start(0, rx.config(&map, rx.fresh_base(), log.as_ref()));
            switch.start(1, tx.config(&map, tx.fresh_base(), log.as_ref()));
            // Without notifications, as a polling guest: a system call would hide the rest.
            rx.want_calls(false);
            tx.want_calls(false);
            let (rx_data, tx_data) = (0x20_0000, 0x30_0000);
            let (mut rx_slot, mut tx_slot) = (0, 0);
            let mut parts: [Vec<u64>; 4] = Default::default();
            for _ in 0..TURNS {
                while rx.add(&[Buf { gpa: rx_data + rx_slot % 256 * STRIDE, len: 1600, writable: true }], false) {
                    rx_slot += 1;
                }
                rx.publish();
                for _ in 0..BURST {
                    let gpa = tx_data + tx_slot % 256 * STRIDE;
                    assert!(tx.add(&[Buf { gpa, len: len as u32 + 12, writable: false }], false));
                    tx_slot += 1;
                }
                tx.publish();
                let t0 = cycles();
                switch.receive_only();
                let t1 = cycles();
                switch.burst.take_snapshots();
                let t2 = cycles();
                let (sent, sending) = switch.echo_timed(cycles);
                let t3 = cycles();
                switch.release();
                let t4 = cycles();
                assert_eq!(sent, u64::MAX);
                for (part, d) in parts.iter_mut().zip([t1 - t0, t2 - t1, sending, t4 - t3]) {
                    part.push(d);
                }
                while rx.poll_used().is_some() {}
                while tx.poll_used().is_some() {}
            }
            let per: Vec<f64> = parts.into_iter().map(|p| quiet(p) / BURST as f64).collect();
            println!(
                "{name:<26} {len:>6} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                per[0],
                per[1],
                per[2],
                per[3],
                per.iter().sum::<f64>()
            );
        }
    }
}
