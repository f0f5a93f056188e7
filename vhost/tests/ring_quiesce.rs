//! Rings started and stopped under traffic, by a session thread, while a PMD thread polls: nothing is lost, nothing comes
//! twice, and no memory is touched after it is gone.
mod support;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{RxBurst, TxFrame};
use ferry_dataplane::port::{RxQueue, TxPort, TxReport};
use ferry_dataplane::qsbr::Domain;
use ferry_vhost::net_header::feature;
use ferry_vhost::queue::PortQueues;
use ferry_vhost::ring::Ring;
use support::{Buf, Driver, GuestMem};

const BASE: u64 = 0x10_0000;
const REGION: u64 = 1 << 20;
const RX_DATA: u64 = BASE + 0x8_0000;
const TX_DATA: u64 = BASE + 0xc_0000;
const SIZE: u16 = 64;

fn run(features: u64) {
    let domain = Domain::new();
    let queues = PortQueues::new(1, Arc::clone(&domain)).unwrap();
    let (mut rx_queue, tx_queue) = (queues.rx(0).unwrap(), queues.tx());
    let stop = Arc::new(AtomicBool::new(false));
    // The PMD thread: every frame goes back where it came from.
    let pmd = {
        let (domain, stop) = (Arc::clone(&domain), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut guard = domain.register().unwrap();
            let (mut burst, mut report) = (RxBurst::new(), TxReport::default());
            let mut dropped = 0u64;
            while !stop.load(Ordering::Relaxed) {
                rx_queue.receive(&guard, &mut burst);
                burst.take_snapshots();
                let frames: Vec<TxFrame<'_>> = (0..burst.len())
                    .map(|i| TxFrame {
                        head: burst.snapshot(i),
                        body: burst.body(i, burst.snapshot(i).len() as u32),
                        offload: Default::default(),
                        flow_hash: 0,
                    })
                    .collect();
                report.reset(DropReason::TxNotReady);
                tx_queue.send(&guard, 0, &frames, &mut report);
                tx_queue.flush(&guard, 0);
                dropped += frames.len() as u64 - u64::from(report.accepted.count_ones());
                let idle = frames.is_empty();
                rx_queue.release(&guard);
                burst.clear();
                guard.quiescent();
                if idle {
                    std::thread::yield_now();
                }
            }
            dropped
        })
    };

    let mem = GuestMem::new(BASE, 1, REGION);
    let mut rx = Driver::new(&mem, 0, SIZE, features, BASE);
    let mut tx = Driver::new(&mem, 1, SIZE, features, BASE + Driver::footprint(SIZE));
    queues.set_enabled(0, true);
    queues.set_enabled(1, true);
    let (mut bases, mut restarts) = ([rx.fresh_base(), tx.fresh_base()], 0);
    let (mut next, mut sent, mut got, mut posted) = (0u32, 0u64, 0u64, 0u64);
    let mut free: VecDeque<u64> = (0..u64::from(SIZE)).collect();
    let mut last_seen = None;
    let end = Instant::now() + Duration::from_millis(1500);
    let limit = Instant::now() + Duration::from_secs(60);
    let mut running = false;
    let mut drain_turns = 0;
    loop {
        // On a busy machine until enough has happened.
        let sending = Instant::now() < end || (drain_turns == 0 && (restarts <= 20 || got <= 100));
        if !sending {
            drain_turns += 1;
        }
        // The session: restart both rings over a new mapping of the memory; the old one is unmapped when they are dropped.
        if !running || (sending && next % 7 == 0) {
            if running {
                bases = [0, 1].map(|vring| queues.stop(vring).unwrap().base());
                restarts += 1;
            }
            let map = mem.memory_map();
            queues.start(0, Ring::new(rx.config(&map, bases[0], None)).unwrap()).unwrap();
            queues.start(1, Ring::new(tx.config(&map, bases[1], None)).unwrap()).unwrap();
            running = true;
        }
        // The guest.
        while rx.add(&[Buf { gpa: RX_DATA + posted % 256 * 256, len: 256, writable: true }], false) {
            posted += 1;
        }
        rx.publish();
        if sending {
            for _ in 0..5 {
                let Some(slot) = free.pop_front() else { break };
                let gpa = TX_DATA + slot * 256;
                let frame: Vec<u8> = [[0; 12].as_slice(), &next.to_le_bytes(), &[next as u8; 150]].concat();
                mem.write(gpa, &frame);
                assert!(tx.add(&[Buf { gpa, len: frame.len() as u32, writable: false }], false));
                next += 1;
                sent += 1;
            }
            tx.publish();
        }
        while let Some((bufs, _)) = tx.poll_used() {
            free.push_back((bufs[0].gpa - TX_DATA) / 256);
        }
        while let Some((bufs, len)) = rx.poll_used() {
            assert_eq!(len, 12 + 154);
            let bytes = mem.read(bufs[0].gpa + 12, 154);
            let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            assert!(bytes[4..].iter().all(|&b| b == number as u8), "frame {number} is damaged");
            assert!(last_seen < Some(number), "frame {number} twice or out of order");
            last_seen = Some(number);
            got += 1;
        }
        std::thread::yield_now();
        if !sending && free.len() == usize::from(SIZE) && drain_turns > 100 {
            break;
        }
        assert!(Instant::now() < limit, "the guest's frames never came back: {restarts} restarts, {got} frames");
    }
    stop.store(true, Ordering::Relaxed);
    let dropped = pmd.join().unwrap();
    // What the PMD thread sent before its end.
    while rx.poll_used().is_some() {
        got += 1;
    }
    assert_eq!(sent, got + dropped, "every frame arrived or was counted as dropped");
    assert!(restarts > 20 && got > 100, "{restarts} {got} {dropped}");
    assert_eq!(queues.take_fault(), None);
    for vring in 0..2 {
        queues.stop(vring).unwrap();
    }
}

#[test]
fn split_rings_restart_under_traffic() {
    run(feature::VERSION_1);
}

#[test]
fn packed_rings_restart_under_traffic() {
    run(feature::VERSION_1 | feature::RING_PACKED);
}
