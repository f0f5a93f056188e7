//! Frames through both ring formats, with every layout a driver may choose, compared byte by byte.
mod support;

use std::collections::VecDeque;
use std::sync::Arc;

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::port::RxQueue;
use ferry_vhost::dirty_log::{DirtyLog, LOG_PAGE_BYTES};
use ferry_vhost::net_header::{feature, header_len};
use ferry_vhost::ring::Ring;
use proptest::prelude::*;
use support::{Buf, Driver, GuestMem, Rng, Switch, memfd};

const BASE: u64 = 0x10_0000;
const REGION: u64 = 4 << 20;

/// One guest with a pair of rings, and bookkeeping of what it sent and got.
struct Guest {
    mem: Arc<GuestMem>,
    rx: Driver,
    tx: Driver,
    header: usize,
    slot_bytes: u64,
    rx_slots: VecDeque<u64>,
    tx_slots: VecDeque<u64>,
}

impl Guest {
    fn new(features: u64, size: u16, slot_bytes: u64, first_index: u16) -> Self {
        let f = Driver::footprint(size);
        // Slots lie around the seam between the two regions, so that some buffers cross it.
        let want = 2 * u64::from(size) * slot_bytes;
        let region = (2 * f + want / 2 + 8192).next_multiple_of(4096);
        let mem = GuestMem::new(BASE, 2, region);
        let (mut rx, mut tx) =
            (Driver::new(&mem, 0, size, features, BASE), Driver::new(&mem, 1, size, features, BASE + f));
        if features & feature::RING_PACKED == 0 {
            rx.start_at(first_index);
            tx.start_at(first_index);
        }
        let slots_at = BASE + region - want / 2 + 100;
        assert!(slots_at >= BASE + 2 * f && slots_at + want <= mem.end());
        let slot = |i: u64| slots_at + i * slot_bytes;
        let n = u64::from(size);
        Self {
            header: header_len(features) as usize,
            rx_slots: (0..n).map(slot).collect(),
            tx_slots: (n..2 * n).map(slot).collect(),
            mem,
            rx,
            tx,
            slot_bytes,
        }
    }

    fn start(&self, switch: &mut Switch, log: Option<&Arc<DirtyLog>>) {
        let map = self.mem.memory_map();
        switch.start(0, self.rx.config(&map, self.rx.fresh_base(), log));
        switch.start(1, self.tx.config(&map, self.tx.fresh_base(), log));
    }

    /// Splits `len` bytes at `gpa` into at most `most` buffers, some of them empty.
    fn cut(rng: &mut Rng, gpa: u64, len: u64, most: u64, writable: bool) -> Vec<Buf> {
        let n = 1 + rng.below(most);
        let mut cuts: Vec<u64> = (1..n).map(|_| rng.below(len + 1)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.windows(2).map(|w| Buf { gpa: gpa + w[0], len: (w[1] - w[0]) as u32, writable }).collect()
    }

    /// Makes receive buffers available: chains of random cut; with mergeable buffers of random size as well.
    fn post(&mut self, rng: &mut Rng, many: bool) {
        let mergeable = self.rx.features & feature::MRG_RXBUF != 0;
        while let Some(&slot) = self.rx_slots.front() {
            let len = if mergeable { 64 + rng.below(self.slot_bytes - 64) } else { self.slot_bytes };
            let bufs = Self::cut(rng, slot, len, 4, true);
            let indirect = self.rx.features & feature::INDIRECT_DESC != 0 && rng.chance(50);
            if !self.rx.add(&bufs, indirect) {
                break;
            }
            self.rx_slots.pop_front();
            if !many && rng.chance(20) {
                break;
            }
        }
        self.rx.publish();
    }

    /// Sends one frame. False when the ring is full.
    fn send(&mut self, rng: &mut Rng, payload: &[u8]) -> bool {
        let Some(&slot) = self.tx_slots.front() else { return false };
        let total = (self.header + payload.len()) as u64;
        assert!(total <= self.slot_bytes);
        let bufs = Self::cut(rng, slot, total, 5, false);
        let indirect = self.tx.features & feature::INDIRECT_DESC != 0 && rng.chance(50);
        self.mem.write(slot, &vec![0; self.header]);
        self.mem.write(slot + self.header as u64, payload);
        if !self.tx.add(&bufs, indirect) {
            return false;
        }
        self.tx_slots.pop_front();
        true
    }

    fn reclaim(&mut self) -> usize {
        let mut n = 0;
        while let Some((bufs, len)) = self.tx.poll_used() {
            assert_eq!(len, 0, "nothing is written into transmit buffers");
            self.tx_slots.push_back(bufs[0].gpa);
            n += 1;
        }
        n
    }

    /// All frames that arrived.
    fn collect(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut left = 0u16;
        let mut frame = Vec::new();
        while let Some((bufs, len)) = self.rx.poll_used() {
            assert!(u64::from(len) <= bufs.iter().map(|b| u64::from(b.len)).sum::<u64>());
            let mut bytes = Vec::new();
            for b in &bufs {
                let n = (len as usize - bytes.len()).min(b.len as usize);
                bytes.extend(self.mem.read(b.gpa, n));
            }
            self.rx_slots.push_back(bufs[0].gpa);
            if left == 0 {
                let header: Vec<u8> = bytes.drain(..self.header).collect();
                left = if self.header == 12 { u16::from_le_bytes([header[10], header[11]]) } else { 1 };
                assert!(left >= 1);
                assert!(left == 1 || self.rx.features & feature::MRG_RXBUF != 0);
            }
            frame.extend(bytes);
            left -= 1;
            if left == 0 {
                frames.push(std::mem::take(&mut frame));
            }
        }
        assert_eq!(left, 0, "a frame became visible in part");
        frames
    }
}

fn features_from(bits: u8) -> u64 {
    let mut f = 0;
    for (i, bit) in [
        feature::RING_PACKED,
        feature::INDIRECT_DESC,
        feature::MRG_RXBUF,
        feature::EVENT_IDX,
        feature::IN_ORDER,
        feature::VERSION_1,
    ]
    .into_iter()
    .enumerate()
    {
        if bits >> i & 1 != 0 {
            f |= bit;
        }
    }
    // Packed rings exist only since virtio 1.1.
    if f & feature::RING_PACKED != 0 { f | feature::VERSION_1 } else { f }
}

/// A guest that echoes to itself through the switch; rings are stopped and started in between.
fn echo_run(seed: u64, bits: u8, size: u16, first_index: u16, turns: usize) {
    let mut rng = Rng(seed);
    let features = features_from(bits);
    let mut switch = Switch::new(1);
    let mut guest = Guest::new(features, size, 2048, first_index);
    guest.start(&mut switch, None);
    // Sent and not yet seen by the switch; forwarded and not yet seen by the guest.
    let (mut on_way_in, mut on_way_out) = (VecDeque::new(), VecDeque::new());
    let (mut delivered, mut dropped) = (0, 0);
    for _ in 0..turns {
        guest.post(&mut rng, false);
        for _ in 0..rng.below(2 * u64::from(size)) {
            // A small ring may hold only a few small mergeable buffers.
            let most = if size < 64 && features & feature::MRG_RXBUF != 0 { 30 } else { 1500 };
            let len = 14 + rng.below(most) as usize;
            let payload = rng.bytes(len);
            if !guest.send(&mut rng, &payload) {
                break;
            }
            on_way_in.push_back(payload);
        }
        guest.tx.publish();
        for _ in 0..=rng.below(2) {
            let frames = switch.receive();
            assert!(switch.burst.rejected().is_none());
            let accepted = switch.echo();
            for (i, frame) in frames.into_iter().enumerate() {
                assert_eq!(Some(&frame), on_way_in.pop_front().as_ref(), "frame changed, lost or twice");
                if accepted >> i & 1 != 0 {
                    on_way_out.push_back(frame);
                } else {
                    assert_eq!(switch.report.reason[i], DropReason::TxQueueFull);
                    dropped += 1;
                }
            }
            switch.release();
        }
        guest.reclaim();
        for frame in guest.collect() {
            assert_eq!(Some(frame), on_way_out.pop_front(), "frame changed, lost or twice");
            delivered += 1;
        }
        assert!(on_way_out.is_empty());
        if rng.chance(10) {
            for (vring, driver) in [(0, &guest.rx), (1, &guest.tx)] {
                let ring = switch.stop(vring);
                // Everything is returned, so the device stands where the driver has looked.
                if driver.packed() {
                    let half = u32::from(driver.next_used) | u32::from(driver.used_wrap) << 15;
                    assert_eq!(ring.base(), half | half << 16);
                } else {
                    assert_eq!(ring.base(), u32::from(driver.next_used));
                }
                switch.start(vring, ring.into_config());
            }
        }
    }
    assert!(delivered > 0 || turns < 5, "nothing arrived, {dropped} dropped");
    assert_eq!(switch.queues.take_fault(), None);
}

#[test]
fn every_combination_of_features() {
    for bits in 0..64 {
        for (size, first_index) in [(4, 0xfffe), (64, 0xfff0), (256, 0)] {
            echo_run(u64::from(bits) << 16 | u64::from(size), bits, size, first_index, 12);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn frames_arrive_unchanged_in_order_and_once(seed: u64, bits in 0u8..64, shift in 1u32..9, odd in 0u16..7, first_index: u16) {
        // Packed rings may have any size.
        let size = if bits & 1 != 0 { (1 << shift) + odd } else { 1 << shift };
        echo_run(seed, bits, size, first_index, 25);
    }
}

#[test]
fn a_packed_ring_of_one_descriptor_works() {
    echo_run(7, 0b10_0011, 1, 0, 40);
}

#[test]
fn the_largest_rings_work() {
    for bits in [0, 1] {
        let features = features_from(bits) | feature::VERSION_1;
        let mut switch = Switch::new(1);
        let size = 32768;
        let mem = GuestMem::new(0, 1, 96 << 20);
        let mut tx = Driver::new(&mem, 1, size, features, 0);
        let at = 90 << 20;
        let map = mem.memory_map();
        switch.start(1, tx.config(&map, tx.fresh_base(), None));
        for turn in 0..3u16 {
            for i in 0..size {
                let frame: Vec<u8> = [[0; 12].as_slice(), &[i as u8, (i >> 8) as u8, turn as u8, 3], &[0; 44]].concat();
                mem.write(at + u64::from(i) * 64, &frame);
                assert!(tx.add(&[Buf { gpa: at + u64::from(i) * 64, len: 60, writable: false }], false));
            }
            tx.publish();
            let mut next = 0u16;
            loop {
                let frames = switch.receive();
                if frames.is_empty() {
                    break;
                }
                for f in &frames {
                    assert_eq!(u16::from_le_bytes([f[0], f[1]]), next);
                    next += 1;
                }
                switch.release();
            }
            assert_eq!(next, size);
            while tx.poll_used().is_some() {}
            assert_eq!(tx.in_flight(), 0);
        }
    }
}

/// Received but not released when the ring is stopped: found again by the next device, not lost.
#[test]
fn a_ring_stopped_before_release_goes_back() {
    for bits in [0b10_0000, 0b10_0001, 0b10_0010, 0b10_0011] {
        let mut rng = Rng(u64::from(bits));
        let mut switch = Switch::new(1);
        let mut guest = Guest::new(features_from(bits), 64, 2048, 0xfffa);
        guest.start(&mut switch, None);
        let payloads: Vec<Vec<u8>> = (0..9).map(|i| vec![i; 100]).collect();
        for p in &payloads {
            assert!(guest.send(&mut rng, p));
        }
        guest.tx.publish();
        assert_eq!(switch.receive(), payloads);
        switch.burst.clear();
        let ring = switch.stop(1);
        // Too late: the ring is not there any more.
        switch.rx.release(&switch.guard);
        assert_eq!(guest.reclaim(), 0);
        switch.start(1, ring.into_config());
        assert_eq!(switch.receive(), payloads);
        switch.release();
        assert_eq!(guest.reclaim(), 9);
        assert_eq!(switch.receive(), Vec::<Vec<u8>>::new());
    }
}

/// Several receives before one release, as when a burst is collected from many queues.
#[test]
fn releases_everything_since_the_last_release() {
    let mut rng = Rng(1);
    let mut switch = Switch::new(1);
    let mut guest = Guest::new(features_from(0b10_0000), 512, 2048, 0);
    guest.start(&mut switch, None);
    let mut seen = 0;
    for _ in 0..500 {
        if !guest.send(&mut rng, &[9; 60]) {
            break;
        }
    }
    guest.tx.publish();
    for _ in 0..3 {
        seen += switch.receive().len();
        assert_eq!(guest.reclaim(), 0);
    }
    assert!(seen > 64);
    switch.release();
    assert_eq!(guest.reclaim(), seen);
}

/// A guest that sends long frames in several buffers and short ones in one, mixed, to one whose buffers hold a short frame each.
#[test]
fn behind_a_long_frame_short_ones_go_the_short_way_again() {
    for (packed, indirect) in [(0, false), (0, true), (feature::RING_PACKED, false), (feature::RING_PACKED, true)] {
        let features = feature::VERSION_1 | feature::MRG_RXBUF | feature::INDIRECT_DESC | packed;
        let mut rng = Rng(packed + u64::from(indirect));
        let mut switch = Switch::new(1);
        let mut guest = Guest::new(features, 256, 2048, 0xfff0);
        guest.start(&mut switch, None);
        for round in 0..20 {
            while let Some(&gpa) = guest.rx_slots.front() {
                assert!(guest.rx.add(&[Buf { gpa, len: 256, writable: true }], false));
                guest.rx_slots.pop_front();
            }
            guest.rx.publish();
            let mut sent = Vec::new();
            for i in 0..64 {
                let is_long = i % 5 == round % 5 || i % 7 == 3;
                let len = if is_long { 900 + rng.below(200) } else { 14 + rng.below(200) };
                let payload = rng.bytes(len as usize);
                let gpa = guest.tx_slots.pop_front().unwrap();
                guest.mem.write(gpa, &vec![0; guest.header]);
                guest.mem.write(gpa + guest.header as u64, &payload);
                let buf = |from: u64, to: u64| Buf { gpa: gpa + from, len: (to - from) as u32, writable: false };
                let end = guest.header as u64 + len;
                let bufs = if is_long { vec![buf(0, 12), buf(12, 500), buf(500, end)] } else { vec![buf(0, end)] };
                assert!(guest.tx.add(&bufs, indirect && is_long));
                sent.push((is_long, payload));
            }
            guest.tx.publish();
            switch.receive_only();
            assert_eq!(switch.burst.len(), sent.len());
            for (i, (is_long, _)) in sent.iter().enumerate() {
                // On the short way the snapshot is taken at once.
                assert_eq!(switch.burst.meta(i).unwrap().snapshot_len == 0, *is_long, "frame {i}");
            }
            switch.burst.take_snapshots();
            assert_eq!(switch.echo(), u64::MAX);
            switch.release();
            assert_eq!(guest.reclaim(), sent.len());
            let got = guest.collect();
            assert!(
                got.iter().eq(sent.iter().map(|(_, payload)| payload)),
                "round {round}: other frames, or another order"
            );
        }
        assert_eq!(switch.queues.take_fault(), None);
    }
}

#[test]
fn a_frame_that_does_not_fit_leaves_the_ring_as_it_was() {
    for packed in [0, feature::RING_PACKED] {
        for mergeable in [0, feature::MRG_RXBUF] {
            let features = feature::VERSION_1 | mergeable | packed;
            let mem = GuestMem::new(BASE, 1, REGION);
            let mut rx = Driver::new(&mem, 0, 8, features, BASE);
            let map = mem.memory_map();
            let mut switch = Switch::new(1);
            switch.start(0, rx.config(&map, rx.fresh_base(), None));
            let data = BASE + (1 << 20);
            for i in 0..3 {
                assert!(rx.add(&[Buf { gpa: data + i * 4096, len: 200, writable: true }], false));
            }
            rx.publish();
            let before = mem.all();
            assert_eq!(switch.send(&[&[1; 589]]), 0, "one byte more than the ring has");
            let reason = if mergeable != 0 { DropReason::TxQueueFull } else { DropReason::TxTooLong };
            assert_eq!(switch.report.reason[0], reason);
            assert!(before == mem.all(), "the ring or its buffers were touched");
            let fits = if mergeable != 0 { 588 } else { 188 };
            assert_eq!(switch.send(&[&vec![2; fits]]), 1);
            let mut n = 0;
            while let Some((_, len)) = rx.poll_used() {
                assert_eq!(len, 200);
                n += 1;
            }
            assert_eq!(n, if mergeable != 0 { 3 } else { 1 });
        }
    }
}

/// Every page that changed is marked, and (but for writes that change nothing) no page that did not.
#[test]
fn the_dirty_log_covers_exactly_what_was_written() {
    // Used rings of one page, and of several: then the index lies in another page than the entries.
    for (bits, size) in (0..64).map(|b| (b, 64)).chain([(0, 1024), (8, 2048), (1, 1024), (9, 600)]) {
        let mut rng = Rng(0xd1e7 + u64::from(bits));
        let features = features_from(bits);
        let mut switch = Switch::new(1);
        let mut guest = Guest::new(features, size, 2048, 0xffe0);
        let log = DirtyLog::map(&memfd(4096), 0, 4096).unwrap();
        assert!(log.covers(&guest.mem.memory_map()));
        let before_start = guest.mem.all();
        guest.start(&mut switch, Some(&log));
        let mut writes = 0;
        writes += check_log(&log, &guest.mem, &before_start);
        for turn in 0..40 {
            guest.post(&mut rng, true);
            for _ in 0..rng.below(u64::from(size)) {
                let len = 14 + rng.below(1500) as usize;
                let payload = rng.bytes(len);
                if !guest.send(&mut rng, &payload) {
                    break;
                }
            }
            guest.tx.publish();
            let before = guest.mem.all();
            switch.receive();
            switch.echo();
            switch.release();
            if turn % 4 == 0 {
                switch.rx.arm(&switch.guard);
            }
            writes += check_log(&log, &guest.mem, &before);
            if turn % 4 == 0 {
                let before = guest.mem.all();
                switch.rx.disarm(&switch.guard);
                check_log(&log, &guest.mem, &before);
            }
            guest.reclaim();
            guest.collect();
        }
        assert!(writes > 40);
        assert_eq!(log.out_of_range(), 0);
    }
}

/// Compares and clears the log; returns the number of marked pages.
fn check_log(log: &DirtyLog, mem: &GuestMem, before: &[u8]) -> usize {
    let after = mem.all();
    let (mut marked, mut extra) = (0, 0);
    for page in 0..mem.size() / LOG_PAGE_BYTES {
        let range = (page * LOG_PAGE_BYTES) as usize..((page + 1) * LOG_PAGE_BYTES) as usize;
        let changed = before[range.clone()] != after[range];
        let gpa = mem.base + page * LOG_PAGE_BYTES;
        assert!(log.is_marked(gpa) || !changed, "page {gpa:#x} was written and not marked");
        marked += usize::from(log.is_marked(gpa));
        extra += usize::from(log.is_marked(gpa) && !changed);
    }
    // A few bytes at the edge of a page may be overwritten with what they were, and an entry of zeros with zeros.
    assert!(extra <= 1 + marked / 20, "{extra} of {marked} marked pages were not written");
    for byte in 0..log.size() {
        // SAFETY: inside the mapping; nobody else writes now.
        #[allow(unsafe_code)]
        unsafe {
            log.base().as_ptr().add(byte).write_volatile(0);
        }
    }
    marked
}

#[test]
fn several_pairs_keep_flows_apart_and_together() {
    let features = feature::VERSION_1;
    let mem = GuestMem::new(BASE, 1, REGION);
    let map = mem.memory_map();
    let mut switch = Switch::new(4);
    let f = Driver::footprint(64);
    let mut drivers: Vec<Driver> =
        (0..4).map(|p| Driver::new(&mem, 2 * p, 64, features, BASE + u64::from(p) * f)).collect();
    let data = BASE + (2 << 20);
    for (p, d) in drivers.iter_mut().enumerate() {
        for i in 0..64 {
            assert!(d.add(&[Buf { gpa: data + (p as u64 * 64 + i) * 2048, len: 2048, writable: true }], false));
        }
        d.publish();
        switch.start(2 * p, d.config(&map, 0, None));
    }
    let frames: Vec<Vec<u8>> = (0..64).map(|i| vec![i; 64]).collect();
    let refs: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    assert_eq!(switch.send(&refs), u64::MAX);
    // The hash of frame i is i: four rings get every fourth frame, in order.
    for (p, d) in drivers.iter_mut().enumerate() {
        for k in 0..16 {
            let (bufs, len) = d.poll_used().unwrap();
            assert_eq!(len, 76);
            assert_eq!(mem.read(bufs[0].gpa + 12, 64), frames[p + 4 * k]);
        }
        assert!(d.poll_used().is_none());
    }
    // A disabled ring's share goes to the others.
    switch.queues.set_enabled(2, false);
    assert_eq!(switch.send(&refs[..6]), 0b11_1111);
    assert!(drivers[1].poll_used().is_none());
    for v in [0, 4, 6] {
        switch.queues.set_enabled(v, false);
    }
    assert_eq!(switch.send(&refs[..2]), 0);
    assert_eq!(switch.report.reason[0], DropReason::TxNotReady);
}

#[test]
fn a_second_receive_queue_for_a_pair_is_refused() {
    let switch = Switch::new(1);
    assert!(switch.queues.rx(0).is_none());
    assert!(switch.queues.rx(1).is_none());
    let queues = Arc::clone(&switch.queues);
    drop(switch);
    assert!(queues.rx(0).is_some());
}

#[test]
fn offload_headers_pass_between_guests() {
    use ferry_dataplane::frame::{Gso, Offload};
    let all = feature::VERSION_1
        | feature::CSUM
        | feature::HOST_TSO4
        | feature::GUEST_CSUM
        | feature::GUEST_TSO4
        | feature::MRG_RXBUF;
    let mem = GuestMem::new(BASE, 1, REGION);
    let map = mem.memory_map();
    let f = Driver::footprint(8);
    let (mut rx, mut tx) = (Driver::new(&mem, 0, 8, all, BASE), Driver::new(&mem, 1, 8, all, BASE + f));
    let mut switch = Switch::new(1);
    switch.start(0, rx.config(&map, 0, None));
    switch.start(1, tx.config(&map, 0, None));
    let data = BASE + (1 << 20);
    let header = [1u8, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
    mem.write(data, &header);
    mem.write(data + 12, &[7; 1000]);
    // The header alone in the first buffer, then cut in the middle of a field.
    tx.add(&[Buf { gpa: data, len: 5, writable: false }, Buf { gpa: data + 5, len: 1007, writable: false }], false);
    tx.publish();
    rx.add(
        &[Buf { gpa: data + 4096, len: 7, writable: true }, Buf { gpa: data + 8192, len: 500, writable: true }],
        false,
    );
    rx.add(&[Buf { gpa: data + 12288, len: 2000, writable: true }], false);
    rx.publish();
    switch.receive();
    let want = Offload {
        needs_csum: true,
        gso: Gso::TcpV4,
        hdr_len: 54,
        gso_size: 100,
        csum_start: 34,
        csum_offset: 16,
        ..Offload::default()
    };
    assert_eq!(switch.burst.meta(0).unwrap().offload, want);
    assert_eq!(switch.echo(), 1);
    switch.release();
    assert_eq!(rx.poll_used().unwrap().1, 507);
    assert_eq!(rx.poll_used().unwrap().1, 505);
    let got = [mem.read(data + 4096, 7), mem.read(data + 8192, 5)].concat();
    assert_eq!(got[..10], header[..10]);
    assert_eq!(got[10..], [2, 0], "num_buffers");
    assert_eq!(mem.read(data + 8192 + 5, 495), [7; 495]);
    assert_eq!(mem.read(data + 12288, 505), [7; 505]);
}

#[test]
fn rings_are_checked_before_they_start() {
    use ferry_vhost::ring::RingError;
    let mem = GuestMem::new(BASE, 1, REGION);
    let map = mem.memory_map();
    for features in [feature::VERSION_1, feature::VERSION_1 | feature::RING_PACKED] {
        let d = Driver::new(&mem, 0, 64, features, BASE);
        let cfg = || d.config(&map, d.fresh_base(), None);
        assert!(Ring::new(cfg()).is_ok());
        let mut c = cfg();
        c.size = 0;
        assert!(matches!(Ring::new(c), Err(RingError::Size { .. })));
        let mut c = cfg();
        c.size = 32769;
        assert!(matches!(Ring::new(c), Err(RingError::Size { .. })));
        let mut c = cfg();
        c.size = 48;
        if features & feature::RING_PACKED != 0 {
            assert!(Ring::new(c).is_ok());
            let mut c = cfg();
            c.base = 64;
            assert!(matches!(Ring::new(c), Err(RingError::Base { .. })));
        } else {
            assert!(matches!(Ring::new(c), Err(RingError::Size { .. })));
        }
        let mut c = cfg();
        c.desc_user_addr += 8;
        assert!(matches!(Ring::new(c), Err(RingError::Alignment { area: "descriptor area", .. })));
        let mut c = cfg();
        c.device_user_addr += 2;
        assert!(matches!(Ring::new(c), Err(RingError::Alignment { area: "device area", .. })));
        let mut c = cfg();
        c.desc_user_addr = support::USER_BASE + mem.end() - 16;
        assert!(matches!(Ring::new(c), Err(RingError::Unmapped { area: "descriptor area", .. })));
        let mut c = cfg();
        c.driver_user_addr = u64::MAX - 3;
        assert!(matches!(Ring::new(c), Err(RingError::Unmapped { area: "driver area", .. })));
        let mut c = cfg();
        c.call = Some(memfd(0).into());
        assert!(matches!(Ring::new(c), Err(RingError::NotEventFd { which: "call", .. })));
    }
}
