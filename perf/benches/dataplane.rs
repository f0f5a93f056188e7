//! Micro-benchmarks of the packet path, one thread, no I/O. Figures are per item: ns per frame, lookup, checksum.
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use ferry_dataplane::bridge::fdb::Fdb;
use ferry_dataplane::frame::BURST;
use ferry_dataplane::packet::ethernet::MacAddr;
use ferry_dataplane::testing::synthetic::l2_worker;

fn main() {
    divan::main();
}

/// Receive, snapshot, learn, look up, copy out, count: everything but the rings.
#[divan::bench(args = [(64, 1), (64, 1000), (64, 100_000), (512, 1), (1518, 1)])]
fn l2_switching(bencher: Bencher<'_, '_>, (frame_bytes, stations): (usize, u64)) {
    let mut worker = l2_worker(frame_bytes, stations).expect("a fresh domain has room for a reader");
    bencher.counter(ItemsCount::new(BURST)).bench_local(|| worker.step());
}

#[divan::bench(args = [1, 1000, 100_000])]
fn fdb_lookup(bencher: Bencher<'_, '_>, stations: u64) {
    let fdb = Fdb::new((stations * 2) as u32, 300);
    for n in 0..stations {
        fdb.learn(0, MacAddr::from_u64(0x0200_0000_0000 | n), (n % 64) as u16, u32::MAX, 0);
    }
    let mut n = 0;
    bencher.counter(ItemsCount::new(64u32)).bench_local(|| {
        for _ in 0..64 {
            n = (n + 7919) % stations;
            black_box(fdb.lookup(0, MacAddr::from_u64(0x0200_0000_0000 | n), 1));
        }
    });
}
