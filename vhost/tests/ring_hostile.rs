//! Guests that break the rules: a bad frame costs the frame, a bad ring costs the ring, nothing costs another port.
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::counters::DropReason;
use ferry_vhost::memory::MemoryMap;
use ferry_vhost::net_header::feature;
use ferry_vhost::ring::FaultKind;
use support::{AVAIL, Buf, Driver, GuestMem, INDIRECT, NEXT, Rng, Switch, USED, WRITE};

const BASE: u64 = 0x10_0000;
const REGION: u64 = 1 << 20;
const DATA: u64 = BASE + 0x8_0000;
const TABLE: u64 = BASE + 0xc_0000;
const SIZE: u16 = 16;

const KINDS: [u64; 2] = [feature::VERSION_1, feature::VERSION_1 | feature::RING_PACKED];

struct Bench {
    switch: Switch,
    d: Driver,
    map: Arc<MemoryMap>,
}

fn bench(vring: u16, features: u64) -> Bench {
    let mem = GuestMem::new(BASE, 1, REGION);
    let features = features | feature::INDIRECT_DESC;
    let d = Driver::new(&mem, vring, SIZE, features, BASE);
    let map = mem.memory_map();
    let mut switch = Switch::new(1);
    switch.start(usize::from(vring), d.config(&map, d.fresh_base(), None));
    Bench { switch, d, map }
}

fn ro(gpa: u64, len: u32) -> Buf {
    Buf { gpa, len, writable: false }
}
fn rw(gpa: u64, len: u32) -> Buf {
    Buf { gpa, len, writable: true }
}

/// A raw descriptor at slot `i` in either format; for packed rings `flags` get the availability bits of the first turn.
fn raw(d: &Driver, table: u64, i: u16, gpa: u64, len: u32, flags: u16, next_or_id: u16) {
    if d.packed() {
        d.write_packed_desc(table, i, gpa, len, next_or_id);
        let bits = if table == d.desc { AVAIL } else { 0 };
        d.mem.u16(table + 16 * u64::from(i) + 14).store(flags | bits, Ordering::SeqCst);
    } else {
        d.write_split_desc(table, i, gpa, len, flags, next_or_id);
    }
}

/// Makes descriptor 0 the head of one available chain (split only; packed descriptors are available by their flags).
fn offer(d: &Driver, heads: &[u16]) {
    if !d.packed() {
        for (i, h) in heads.iter().enumerate() {
            d.set_avail_entry(i as u16, *h);
        }
        d.set_avail_idx(heads.len() as u16);
    }
}

/// A transmit chain that is bad on its own: refused under `reason`, returned, and the next frame passes.
fn costs_a_frame(bufs: &[Buf], indirect: bool, reason: DropReason) {
    for features in KINDS {
        let Bench { mut switch, mut d, .. } = bench(1, features);
        assert!(d.add(bufs, indirect));
        d.add(&[ro(DATA, 12 + 60)], false);
        d.publish();
        assert_eq!(switch.receive(), [vec![0; 60]], "features {features:#x}");
        let mut want = [0; DropReason::COUNT];
        want[reason as usize] = 1;
        assert_eq!(switch.burst.rejected(), Some(&want), "features {features:#x}");
        switch.release();
        assert_eq!(d.poll_used(), Some((bufs.to_vec(), 0)));
        assert!(d.poll_used().is_some());
        assert_eq!(d.in_flight(), 0);
        assert_eq!(switch.queues.take_fault(), None);
        assert_eq!(switch.queues.counters(1).unwrap().bad_chains.get(), 1);
    }
}

/// Ring contents that nothing sensible can follow from.
fn costs_the_ring(kinds: &[u64], vring: u16, kind: FaultKind, write: impl Fn(&Driver)) {
    for &features in kinds {
        let Bench { mut switch, d, map } = bench(vring, features);
        write(&d);
        if vring == 1 {
            assert!(switch.receive().is_empty());
        } else {
            assert_eq!(switch.send(&[&[0; 60]]), 0);
            assert_eq!(switch.report.reason[0], DropReason::TxBadDescriptor);
        }
        switch.release();
        let fault = switch.queues.take_fault().expect("a fault");
        assert_eq!((fault.vring, fault.kind), (vring, kind), "{fault}");
        assert!(fault.to_string().contains(&format!("vring {vring}")));
        assert_eq!(switch.queues.take_fault(), None);
        assert_eq!(switch.queues.counters(usize::from(vring)).unwrap().faults[kind as usize].get(), 1);
        // No further access: the memory stays as it is whatever is tried.
        let before = d.mem.all();
        switch.receive();
        switch.release();
        switch.send(&[&[0; 60]]);
        assert!(before == d.mem.all());
        assert_eq!(switch.queues.take_fault(), None, "told once");
        // A restart with a sane ring works.
        switch.stop(usize::from(vring));
        let mut fresh = Driver::new(&d.mem, vring, SIZE, d.features, BASE + 0x4_0000);
        switch.start(usize::from(vring), fresh.config(&map, fresh.fresh_base(), None));
        fresh.add(&[Buf { gpa: DATA, len: 100, writable: vring == 0 }], false);
        fresh.publish();
        if vring == 1 {
            assert_eq!(switch.receive().len(), 1);
        } else {
            assert_eq!(switch.send(&[&[0; 60]]), 1);
        }
        switch.release();
    }
}

#[test]
fn unmapped_address() {
    costs_a_frame(&[ro(BASE - 4096, 100)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 100), ro(BASE + REGION, 1)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(BASE + REGION - 50, 51)], true, DropReason::RxBadDescriptor);
    // Reaches the limit before it reaches the end of memory.
    costs_a_frame(&[ro(DATA, u32::MAX)], false, DropReason::RxTooLong);
}

#[test]
fn wrapping_address() {
    costs_a_frame(&[ro(u64::MAX - 20, 100)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 12), ro(u64::MAX, u32::MAX)], true, DropReason::RxBadDescriptor);
}

#[test]
fn writable_buffer_in_a_transmit_chain() {
    costs_a_frame(&[rw(DATA, 100)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 100), rw(DATA, 100)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 100), rw(DATA, 100)], true, DropReason::RxBadDescriptor);
}

#[test]
fn header_cut_short_or_frame_too_short() {
    costs_a_frame(&[ro(DATA, 11)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 4), ro(DATA, 7)], true, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(DATA, 12)], false, DropReason::RxTooShort);
    costs_a_frame(&[ro(DATA, 12), ro(DATA, 13)], false, DropReason::RxTooShort);
}

#[test]
fn zero_length_buffers() {
    // Alone they are no frame; their address is not looked at.
    costs_a_frame(&[ro(u64::MAX, 0)], false, DropReason::RxBadDescriptor);
    costs_a_frame(&[ro(0, 0), ro(u64::MAX, 0)], true, DropReason::RxBadDescriptor);
    // Between others they are nothing at all.
    for features in KINDS {
        for indirect in [false, true] {
            let Bench { mut switch, mut d, .. } = bench(1, features);
            d.add(&[ro(0, 0), ro(DATA, 12), ro(u64::MAX, 0), ro(DATA, 60), ro(1, 0)], indirect);
            d.publish();
            assert_eq!(switch.receive(), [vec![0; 60]]);
            assert!(switch.burst.rejected().is_none());
            switch.release();
        }
    }
}

#[test]
fn a_header_over_several_descriptors_is_fine() {
    for features in KINDS {
        let Bench { mut switch, mut d, .. } = bench(1, features);
        d.mem.write(DATA + 20, &[0xab; 60]);
        let mut bufs: Vec<Buf> = (0..11).map(|i| ro(DATA + i, 1)).collect();
        bufs.extend([ro(DATA + 19, 5), ro(DATA + 24, 56)]);
        d.add(&bufs, false);
        d.publish();
        assert_eq!(switch.receive(), [vec![0xab; 60]]);
        switch.release();
    }
}

#[test]
fn too_long_or_too_scattered() {
    costs_a_frame(&[ro(DATA, 65_700)], false, DropReason::RxTooLong);
    let many: Vec<Buf> = (0..16).map(|_| ro(BASE, 0x8_0000)).collect();
    costs_a_frame(&many[..12], false, DropReason::RxTooLong);
    for features in KINDS {
        let Bench { mut switch, d, .. } = bench(1, features);
        let n = 300u16;
        for i in 0..n {
            let next = if d.packed() || i + 1 == n { 0 } else { NEXT };
            raw(&d, TABLE, i, DATA, 20, next, i + 1);
        }
        raw(&d, d.desc, 0, TABLE, 16 * u32::from(n), INDIRECT, 0);
        offer(&d, &[0]);
        assert!(switch.receive().is_empty());
        assert_eq!(switch.burst.rejected().unwrap()[DropReason::RxTooManySegments as usize], 1);
        assert_eq!(switch.queues.take_fault(), None);
        switch.release();
    }
}

/// Tables full of empty descriptors cost a guest nothing to post; they may not cost the other ports much either.
#[test]
fn contrived_chains_wait_for_their_turn() {
    for features in KINDS {
        let mem = GuestMem::new(BASE, 1, REGION);
        let features = features | feature::INDIRECT_DESC;
        let d = Driver::new(&mem, 1, 64, features, BASE);
        let mut switch = Switch::new(1);
        switch.start(1, d.config(&mem.memory_map(), d.fresh_base(), None));
        let n = 1024u16;
        for i in 0..n {
            raw(&d, TABLE, i, 0, 0, if d.packed() || i + 1 == n { 0 } else { NEXT }, i + 1);
        }
        for i in 0..64 {
            raw(&d, d.desc, i, TABLE, 16 * u32::from(n), INDIRECT, i);
        }
        offer(&d, &(0..64).collect::<Vec<_>>());
        let mut bursts = 0;
        let mut rejected = 0;
        while rejected < 64 {
            assert!(switch.receive().is_empty());
            rejected += switch.burst.rejected().unwrap()[DropReason::RxBadDescriptor as usize];
            switch.release();
            bursts += 1;
        }
        assert_eq!(bursts, 8, "8192 descriptors a burst, give or take a chain");
        assert_eq!(switch.queues.take_fault(), None);
    }
}

#[test]
fn malformed_indirect_tables() {
    for features in KINDS {
        // Not whole descriptors; none; not in memory; across the end of memory.
        for (gpa, len) in [(TABLE, 17), (TABLE, 0), (TABLE, 15), (8, 32), (BASE + REGION - 16, 32), (u64::MAX - 3, 32)]
        {
            let Bench { mut switch, d, .. } = bench(1, features);
            for i in 0..2 {
                raw(&d, TABLE, i, DATA, 100, 0, 0);
            }
            // Chain both entries where the format chains by a flag.
            if !d.packed() {
                raw(&d, BASE + REGION - 16, 0, DATA, 100, NEXT, 1);
            }
            raw(&d, d.desc, 0, gpa, len, INDIRECT, 0);
            offer(&d, &[0]);
            assert!(switch.receive().is_empty());
            assert_eq!(switch.burst.rejected().unwrap()[DropReason::RxBadDescriptor as usize], 1, "{gpa:#x} {len}");
            switch.release();
            assert_eq!(switch.queues.take_fault(), None);
        }
        // Not negotiated.
        let mem = GuestMem::new(BASE, 1, REGION);
        let mut d = Driver::new(&mem, 1, SIZE, features, BASE);
        let mut switch = Switch::new(1);
        switch.start(1, d.config(&mem.memory_map(), d.fresh_base(), None));
        d.add(&[ro(DATA, 100)], true);
        d.publish();
        assert!(switch.receive().is_empty());
        assert_eq!(switch.burst.rejected().unwrap()[DropReason::RxBadDescriptor as usize], 1);
        switch.release();
    }
}

#[test]
fn indirect_in_indirect() {
    costs_the_ring(&KINDS, 1, FaultKind::NestedIndirect, |d| {
        raw(d, TABLE, 0, TABLE, 16, INDIRECT, 0);
        raw(d, d.desc, 0, TABLE, 16, INDIRECT, 0);
        offer(d, &[0]);
    });
    costs_the_ring(&KINDS, 0, FaultKind::NestedIndirect, |d| {
        raw(d, TABLE, 0, TABLE, 16, INDIRECT | WRITE, 0);
        raw(d, d.desc, 0, TABLE, 16, INDIRECT, 0);
        offer(d, &[0]);
    });
}

#[test]
fn loops_and_chains_longer_than_the_ring() {
    costs_the_ring(&KINDS[..1], 1, FaultKind::ChainTooLong, |d| {
        raw(d, d.desc, 0, DATA, 0, NEXT, 0);
        offer(d, &[0]);
    });
    costs_the_ring(&KINDS[..1], 1, FaultKind::ChainTooLong, |d| {
        raw(d, d.desc, 0, DATA, 4, NEXT, 5);
        raw(d, d.desc, 5, DATA, 4, NEXT, 0);
        offer(d, &[0]);
    });
    costs_the_ring(&KINDS[..1], 0, FaultKind::ChainTooLong, |d| {
        raw(d, d.desc, 0, DATA, 4, NEXT | WRITE, 0);
        offer(d, &[0]);
    });
    // An indirect table that loops.
    costs_the_ring(&KINDS[..1], 1, FaultKind::ChainTooLong, |d| {
        raw(d, TABLE, 0, DATA, 4, NEXT, 1);
        raw(d, TABLE, 1, DATA, 4, NEXT, 0);
        raw(d, d.desc, 0, TABLE, 32, INDIRECT, 0);
        offer(d, &[0]);
    });
    // Packed: every descriptor says that it continues.
    for vring in [0, 1] {
        costs_the_ring(&KINDS[1..], vring, FaultKind::ChainTooLong, |d| {
            let w = if vring == 0 { WRITE } else { 0 };
            for i in 0..SIZE {
                raw(d, d.desc, i, DATA, 4, NEXT | w, i);
            }
        });
    }
}

#[test]
fn descriptors_outside_the_table() {
    for vring in [0, 1] {
        costs_the_ring(&KINDS[..1], vring, FaultKind::HeadOutOfRange, |d| offer(d, &[SIZE]));
        costs_the_ring(&KINDS[..1], vring, FaultKind::HeadOutOfRange, |d| offer(d, &[0xffff]));
        costs_the_ring(&KINDS[..1], vring, FaultKind::NextOutOfRange, |d| {
            raw(d, d.desc, 0, DATA, 4, NEXT | if vring == 0 { WRITE } else { 0 }, SIZE);
            offer(d, &[0]);
        });
        costs_the_ring(&KINDS[..1], vring, FaultKind::NextOutOfRange, |d| {
            raw(d, TABLE, 0, DATA, 4, NEXT | if vring == 0 { WRITE } else { 0 }, 2);
            raw(d, d.desc, 0, TABLE, 32, INDIRECT, 0);
            offer(d, &[0]);
        });
    }
}

#[test]
fn available_index_jumps() {
    for vring in [0, 1] {
        for idx in [SIZE + 1, 1000, 0x8000, 0xffff] {
            costs_the_ring(&KINDS[..1], vring, FaultKind::AvailJump, |d| d.set_avail_idx(idx));
        }
    }
    // Backwards, after some traffic.
    let Bench { mut switch, mut d, .. } = bench(1, feature::VERSION_1);
    for _ in 0..5 {
        d.add(&[ro(DATA, 100)], false);
    }
    d.publish();
    assert_eq!(switch.receive().len(), 5);
    d.set_avail_idx(3);
    switch.release();
    assert!(switch.receive().is_empty());
    assert_eq!(switch.queues.take_fault().unwrap().kind, FaultKind::AvailJump);
}

#[test]
fn valid_frames_before_a_fault_are_delivered_and_returned() {
    let Bench { mut switch, mut d, .. } = bench(1, feature::VERSION_1);
    d.add(&[ro(DATA, 100)], false);
    d.add(&[ro(DATA, 110)], false);
    d.add(&[ro(DATA, 100)], false);
    d.set_avail_entry(2, 99);
    d.publish();
    assert_eq!(switch.receive().len(), 2);
    switch.release();
    assert!(d.poll_used().is_some() && d.poll_used().is_some() && d.poll_used().is_none());
    assert_eq!(switch.queues.take_fault().unwrap().kind, FaultKind::HeadOutOfRange);
    assert_eq!(switch.stop(1).base(), 2);
}

#[test]
fn bad_receive_buffers() {
    for features in KINDS {
        for bad in [ro(DATA, 2000), rw(4, 2000), rw(u64::MAX - 5, 2000), rw(DATA, 0)] {
            for mergeable in [0, feature::MRG_RXBUF] {
                let Bench { mut switch, mut d, .. } = bench(0, features | mergeable);
                // With mergeable buffers the bad one comes second in the frame.
                if mergeable != 0 {
                    d.add(&[rw(DATA, 50)], false);
                }
                d.add(&[bad], false);
                d.add(&[rw(DATA + 4096, 2000)], false);
                d.publish();
                assert_eq!(switch.send(&[&[1; 100], &[2; 100]]), 0b10);
                assert_eq!(switch.report.reason[0], DropReason::TxBadDescriptor);
                if mergeable != 0 {
                    assert_eq!(d.poll_used().unwrap().1, 0);
                }
                assert_eq!(d.poll_used(), Some((vec![bad], 0)));
                let (bufs, len) = d.poll_used().unwrap();
                assert_eq!(len, 112);
                assert_eq!(d.mem.read(bufs[0].gpa + 12, 100), [2; 100]);
                assert_eq!(switch.queues.take_fault(), None);
            }
        }
    }
}

#[test]
fn truncated_memory_stops_the_ring() {
    for vring in [0, 1] {
        let Bench { mut switch, mut d, map } = bench(vring, feature::VERSION_1);
        d.add(&[Buf { gpa: DATA, len: 100, writable: vring == 0 }], false);
        d.publish();
        // What the SIGBUS handler does.
        map.regions()[0].poisoned().store(true, Ordering::Relaxed);
        assert!(switch.receive().is_empty());
        if vring == 0 {
            assert_eq!(switch.send(&[&[0; 60]]), 0);
            assert_eq!(switch.report.reason[0], DropReason::MemoryFault);
        }
        assert_eq!(switch.queues.take_fault().unwrap().kind, FaultKind::MemoryLost);
        assert!(d.poll_used().is_none());
    }
}

/// One thread scribbles over rings, tables and buffers at full speed while the switch polls them; a second guest's
/// frames pass undisturbed all the while.
#[test]
fn a_ring_rewritten_while_it_is_polled() {
    for features in KINDS {
        let mem = GuestMem::new(BASE, 1, REGION);
        let features = features | feature::INDIRECT_DESC | feature::MRG_RXBUF | feature::EVENT_IDX;
        let f = Driver::footprint(SIZE);
        let (rx, tx) = (Driver::new(&mem, 0, SIZE, features, BASE), Driver::new(&mem, 1, SIZE, features, BASE + f));
        let map = mem.memory_map();
        let mut switch = Switch::new(1);
        switch.memory_moves = true;
        switch.start(0, rx.config(&map, rx.fresh_base(), None));
        switch.start(1, tx.config(&map, tx.fresh_base(), None));

        let good_mem = GuestMem::new(BASE, 1, REGION);
        let mut good = Driver::new(&good_mem, 1, SIZE, feature::VERSION_1, BASE);
        let mut good_switch = Switch::new(1);
        good_switch.start(1, good.config(&good_mem.memory_map(), 0, None));

        let stop = Arc::new(AtomicBool::new(false));
        let scribbler = {
            let (mem, stop) = (Arc::clone(&mem), Arc::clone(&stop));
            let areas = [rx.desc, rx.driver, rx.device, tx.desc, tx.driver, tx.device];
            let packed = rx.packed();
            std::thread::spawn(move || {
                let mut rng = Rng(3);
                let mut turns = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    turns += 1;
                    let at = areas[rng.below(6) as usize] + 2 * rng.below(136);
                    // Mostly plausible values: those get furthest.
                    let v = match rng.below(8) {
                        0..=2 => rng.below(u64::from(SIZE)) as u16,
                        3 => [NEXT, WRITE, INDIRECT, NEXT | WRITE][rng.below(4) as usize],
                        4 if packed => AVAIL | rng.below(8) as u16,
                        5 if packed => USED | rng.below(8) as u16,
                        _ => rng.next() as u16,
                    };
                    mem.u16(at).store(v, Ordering::Relaxed);
                    // Addresses inside memory, so that chains lead somewhere.
                    if rng.chance(20) {
                        let (ring, direction) = if rng.chance(50) { (0, WRITE) } else { (3, 0) };
                        let desc = areas[ring] + 16 * rng.below(u64::from(SIZE));
                        mem.write(desc, &(BASE + rng.below(REGION)).to_le_bytes());
                        mem.write(desc + 8, &(rng.below(3000) as u32).to_le_bytes());
                        // And available, so that the switch looks at them.
                        if packed {
                            let turn = if rng.chance(50) { AVAIL } else { USED };
                            mem.u16(desc + 14).store(turn | direction, Ordering::Relaxed);
                        } else {
                            let used = mem.u16(areas[ring + 2] + 2).load(Ordering::Relaxed);
                            mem.u16(areas[ring + 1] + 2)
                                .store(used.wrapping_add(rng.below(17) as u16), Ordering::Relaxed);
                        }
                    }
                }
                turns
            })
        };
        let end = Instant::now() + Duration::from_secs(1);
        let (mut frames, mut faults, mut sent, mut good_frames) = (0u64, 0, 0u64, 0);
        while Instant::now() < end {
            frames += switch.receive().len() as u64;
            switch.echo();
            switch.release();
            sent += u64::from(switch.send(&[&[1; 60], &[2; 1500]]).count_ones());
            while let Some(fault) = switch.queues.take_fault() {
                faults += 1;
                let ring = switch.stop(usize::from(fault.vring));
                let mut config = ring.into_config();
                config.base = rx.fresh_base();
                switch.start(usize::from(fault.vring), config);
            }
            good.add(&[ro(DATA, 72)], false);
            good.publish();
            assert_eq!(good_switch.receive(), [vec![0; 60]]);
            good_switch.release();
            assert!(good.poll_used().is_some());
            good_frames += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let turns = scribbler.join().unwrap();
        let chains: u64 = (0..2).map(|v| switch.queues.counters(v).unwrap().chains.get()).sum();
        // Packed rings have no indexes that could jump: hardly anything the scribbler does stops them.
        assert!(faults > 0 || features & feature::RING_PACKED != 0);
        assert!(turns > 1000 && chains > 20 && good_frames > 100, "{turns} {frames} {sent} {chains} {good_frames}");
    }
}
