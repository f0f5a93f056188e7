//! Uplinks on DPDK's virtual devices that need no kernel: net_ring loops back, net_null invents, net_pcap replays.
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use common::*;
use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, Body, Gso, Offload, RxBurst, TxFrame};
use ferry_dataplane::port::{Armed, RxQueue, TxPort, TxReport};
use ferry_ffi::eal::{Eal, EalConfig, EalError};
use ferry_ffi::uplink::{Uplink, UplinkError};

fn ring() -> String {
    unique("net_ring")
}

fn frame(i: usize, len: usize) -> Vec<u8> {
    (0..len).map(|k| (k * 7 + i * 13) as u8).collect()
}

#[test]
fn frames_come_back_unchanged_and_every_buffer_with_them() {
    let mut port = Port::open(&config(&ring()));
    let idle = port.in_use();
    for round in 0..50 {
        let frames: Vec<Vec<u8>> = (0..BURST).map(|i| frame(i + round, 14 + i * 23)).collect();
        let refs: Vec<_> = frames.iter().map(|f| (f.as_slice(), Offload::default())).collect();
        assert_eq!(port.send(&refs).accepted, u64::MAX);
        assert_eq!(port.in_use(), idle + BURST as u32);
        let got = port.receive();
        assert_eq!(got.iter().map(|(f, _)| f).collect::<Vec<_>>(), frames.iter().collect::<Vec<_>>());
        assert_eq!(port.in_use(), idle, "released");
    }
    port.close();
}

#[test]
fn buffers_stay_until_release_and_a_dropped_queue_gives_them_back() {
    let mut port = Port::open(&config(&ring()));
    let idle = port.in_use();
    let f = frame(1, 100);
    assert_eq!(port.send(&[(&f, Offload::default()); 3]).accepted, 0b111);
    port.burst.clear();
    port.rx.receive(&port.guard, &mut port.burst);
    assert_eq!((port.burst.len(), port.in_use()), (3, idle + 3));
    // The memory is the mbuf's own until release.
    let mut copy = vec![0; 100];
    port.burst.body(2, 0).read(&mut copy);
    assert_eq!(copy, f);
    port.burst.clear();
    let Port { uplink, rx, tx, .. } = port;
    drop(rx);
    assert_eq!(uplink.status().mbufs.in_use, idle);
    drop(tx);
    uplink.close().unwrap();
}

#[test]
fn a_burst_that_is_part_full_takes_only_what_fits() {
    let mut port = Port::open(&config(&ring()));
    let f = frame(1, 60);
    assert_eq!(port.send(&[(&f, Offload::default()); BURST]).accepted, u64::MAX);
    assert_eq!(port.send(&[(&f, Offload::default()); 10]).accepted, 0x3ff);
    // Frames of another queue are in the burst already.
    port.burst.clear();
    for _ in 0..60 {
        let mark = port.burst.segment_mark();
        port.burst.finish_frame(mark, Offload::default());
    }
    port.rx.receive(&port.guard, &mut port.burst);
    assert_eq!(port.burst.len(), BURST);
    port.rx.receive(&port.guard, &mut port.burst);
    assert_eq!(port.burst.len(), BURST, "full is full");
    port.rx.release(&port.guard);
    assert_eq!(port.receive().len(), 64);
    assert_eq!(port.receive().len(), 6);
    port.close();
}

#[test]
fn jumbo_frames_travel_in_chains() {
    let mut config = config(&ring());
    config.mtu = 9000;
    let mut port = Port::open(&config);
    let idle = port.in_use();
    assert_eq!(port.tx.capabilities(&port.guard).max_frame_bytes, 9018);
    for len in [2047, 2048, 2049, 4096, 4097, 9018] {
        let f = frame(len, len);
        // Cut anywhere between head and body, as the switch does after rewriting a header.
        for cut in [0, 14, 256, len] {
            let mut source = RxBurst::new();
            // SAFETY: `f` outlives the burst.
            #[allow(unsafe_code)]
            unsafe {
                let (a, b) = f.split_at(len / 3);
                source.push_segment(a.as_ptr(), a.len() as u32);
                source.push_segment(b.as_ptr(), b.len() as u32);
            }
            source.finish_frame(0, Offload::default());
            let frames = [TxFrame {
                head: &f[..cut],
                body: source.body(0, cut as u32),
                offload: Offload::default(),
                flow_hash: 0,
            }];
            let mut report = TxReport::default();
            port.tx.send(&port.guard, 0, &frames, &mut report);
            assert_eq!(report.accepted, 1, "{len} {cut}");
            assert_eq!(port.in_use(), idle + len.div_ceil(2048) as u32);
            port.burst.clear();
            port.rx.receive(&port.guard, &mut port.burst);
            assert_eq!(usize::from(port.burst.meta(0).unwrap().segments), len.div_ceil(2048));
            let mut got = vec![0; len];
            assert_eq!(port.burst.body(0, 0).read(&mut got), len);
            assert!(got == f, "{len} {cut}");
            port.rx.release(&port.guard);
            assert_eq!(port.in_use(), idle);
        }
    }
    port.close();
}

#[test]
fn what_cannot_be_sent_is_refused_with_its_reason_and_the_rest_goes() {
    let mut port = Port::open(&config(&ring()));
    let idle = port.in_use();
    let good = frame(1, 60);
    let long = frame(2, 1519);
    let short = frame(3, 13);
    let tso = Offload { gso: Gso::TcpV4, gso_size: 1000, needs_csum: true, ..Offload::default() };
    let wild = Offload { needs_csum: true, csum_start: 59, csum_offset: 0, ..Offload::default() };
    let none = Offload::default();
    let report = port.send(&[(&good, none), (&long, none), (&short, none), (&good, tso), (&good, wild), (&good, none)]);
    assert_eq!(report.accepted, 0b100001);
    assert_eq!(
        report.reason[1..5],
        [DropReason::TxTooLong, DropReason::RxTooShort, DropReason::OffloadFailed, DropReason::OffloadFailed]
    );
    assert_eq!(port.receive().len(), 2);
    assert_eq!(port.in_use(), idle);
    port.close();
}

#[test]
fn a_checksum_is_finished_in_software_where_the_device_does_not() {
    let mut config = config(&ring());
    config.mtu = 9000;
    let mut port = Port::open(&config);
    assert!(!port.tx.capabilities(&port.guard).csum);
    for len in [0, 1, 33, 1000, 2013, 2014, 2015, 7001] {
        let (f, owed) = udp_frame([2; 6], [10, 0, 0, 1], [10, 0, 0, 2], 9, &frame(len, len));
        assert!(!udp_sum_is_right(&f));
        assert_eq!(port.send(&[(&f, owed)]).accepted, 1);
        let (got, offload) = port.receive().remove(0);
        assert!(udp_sum_is_right(&got), "{len}");
        assert_eq!((&got[..40], &got[42..]), (&f[..40], &f[42..]));
        assert_eq!(offload, Offload::default());
    }
    port.close();
}

#[test]
fn a_full_device_refuses_and_loses_no_buffer() {
    let mut port = Port::open(&config(&ring()));
    let idle = port.in_use();
    let f = frame(1, 60);
    let mut sent = 0;
    let full = loop {
        let report = port.send(&[(&f, Offload::default()); BURST]);
        sent += report.accepted.count_ones();
        if report.accepted != u64::MAX {
            break report;
        }
        assert!(sent < 100_000, "the ring never fills");
    };
    // What was taken is the front of the burst.
    assert_eq!(full.accepted & (full.accepted + 1), 0);
    assert!(full.reason[BURST - 1] == DropReason::TxQueueFull);
    assert_eq!(port.in_use(), idle + sent);
    let mut received = 0;
    loop {
        match port.receive().len() as u32 {
            0 => break,
            n => received += n,
        }
    }
    assert_eq!((received, port.in_use()), (sent, idle));
    port.close();
}

#[test]
fn an_empty_pool_refuses_with_its_reason_and_recovers() {
    let mut config = config(&ring());
    config.mtu = 9000;
    config.rx_descriptors = 64;
    config.tx_descriptors = 64;
    config.mbufs = 64 + 64 + 384;
    let mut port = Port::open(&config);
    let idle = port.in_use();
    let f = frame(1, 9000);
    let mut sent = 0;
    let mut no_buffer = 0;
    for _ in 0..4 {
        let report = port.send(&[(&f, Offload::default()); BURST]);
        sent += report.accepted.count_ones();
        for i in (0..BURST).filter(|i| report.accepted >> i & 1 == 0) {
            assert_eq!(report.reason[i], DropReason::TxNoBuffer);
            no_buffer += 1;
        }
    }
    assert!(sent > 50 && no_buffer > 50, "{sent} {no_buffer}");
    assert_eq!(port.in_use(), idle + sent * 5);
    while !port.receive().is_empty() {}
    assert_eq!(port.in_use(), idle);
    assert_eq!(port.send(&[(&f, Offload::default())]).accepted, 1);
    assert_eq!(port.receive().len(), 1);
    port.close();
}

#[test]
fn packets_left_in_a_device_do_not_outlive_their_memory() {
    // Closed with frames in its ring; opened again and again: neither crash nor exhaustion.
    for _ in 0..3 {
        let port = Port::open(&config(&ring()));
        let f = frame(1, 60);
        assert_eq!(port.send(&[(&f, Offload::default()); BURST]).accepted, u64::MAX);
        port.close();
    }
    let name = ring();
    for _ in 0..5 {
        Port::open(&config(&name)).close();
    }
}

#[test]
fn lanes_share_a_queue_without_losing_or_doubling_frames() {
    let port = Port::open(&config(&ring()));
    let idle = port.in_use();
    let Port { uplink, rx, tx, .. } = port;
    let (sent, busy, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let received = std::thread::scope(|s| {
        let (sent, busy, done) = (&sent, &busy, &done);
        let senders: Vec<_> = (0..4)
            .map(|lane| {
                let tx = tx.clone();
                s.spawn(move || {
                    let guard = guard();
                    let f = frame(lane, 60 + lane * 100);
                    for _ in 0..500 {
                        let report = send_lane(&tx, &guard, lane, &[(&f, Offload::default()); 32]);
                        sent.fetch_add(u64::from(report.accepted.count_ones()), Relaxed);
                        for i in (0..32).filter(|i| report.accepted >> i & 1 == 0) {
                            assert!(matches!(
                                report.reason[i],
                                DropReason::TxQueueFull | DropReason::TxBusy | DropReason::TxNoBuffer
                            ));
                            busy.fetch_add(1, Relaxed);
                        }
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        let receiver = s.spawn(move || {
            let (mut rx, guard, mut burst) = (rx, guard(), RxBurst::new());
            let mut lens = [0u64; 4];
            loop {
                let last = done.load(Relaxed);
                burst.clear();
                rx.receive(&guard, &mut burst);
                for i in 0..burst.len() {
                    let lane = (burst.meta(i).unwrap().len as usize - 60) / 100;
                    let mut bytes = vec![0; 60 + lane * 100];
                    burst.body(i, 0).read(&mut bytes);
                    assert_eq!(bytes, frame(lane, 60 + lane * 100));
                    lens[lane] += 1;
                }
                rx.release(&guard);
                if last && burst.is_empty() {
                    return lens;
                }
                if burst.is_empty() {
                    std::thread::yield_now();
                }
            }
        });
        senders.into_iter().for_each(|t| t.join().unwrap());
        done.store(true, Relaxed);
        receiver.join().unwrap()
    });
    assert_eq!(received.iter().sum::<u64>(), sent.load(Relaxed));
    assert_eq!(sent.load(Relaxed) + busy.load(Relaxed), 4 * 500 * 32);
    assert!(received.iter().all(|&n| n > 0));
    // Threads ended and took their buffer caches along: nothing is lost with them.
    assert_eq!(uplink.status().mbufs.in_use, idle);
    drop(tx);
    uplink.close().unwrap();
}

#[test]
fn many_threads_come_and_go_without_draining_the_pool() {
    let port = Port::open(&config(&ring()));
    let idle = port.in_use();
    let Port { uplink, rx, tx, .. } = port;
    let mut rx = Some(rx);
    // More threads over time than EAL has ids (128).
    for _ in 0..150 {
        let (tx, mut queue) = (tx.clone(), rx.take().unwrap());
        rx = std::thread::spawn(move || {
            let (guard, mut burst) = (guard(), RxBurst::new());
            let f = frame(1, 60);
            assert_eq!(send_lane(&tx, &guard, 0, &[(&f, Offload::default()); BURST]).accepted, u64::MAX);
            queue.receive(&guard, &mut burst);
            assert_eq!(burst.len(), BURST);
            queue.release(&guard);
            Some(queue)
        })
        .join()
        .unwrap();
    }
    assert_eq!(uplink.status().mbufs.in_use, idle);
    drop((rx, tx));
    uplink.close().unwrap();
}

#[test]
fn a_null_device_counts() {
    let mut port = Port::open(&config(&unique("net_null")));
    // It delivers empty frames of 64 bytes for ever.
    let got = port.receive();
    assert_eq!(got.len(), BURST);
    assert!(got.iter().all(|(f, _)| f.len() == 64));
    assert_eq!(port.rx.arm(&port.guard), Armed::Poll);
    port.rx.disarm(&port.guard);
    let f = frame(0, 200);
    assert_eq!(port.send(&[(&f, Offload::default()); 5]).accepted, 0b11111);
    let status = port.uplink.status();
    let stats = status.stats.unwrap();
    assert_eq!((stats.rx_frames, stats.tx_frames), (BURST as u64, 5));
    assert_eq!((status.driver.as_str(), status.rx_mode), ("net_null", "poll"));
    let extended = port.uplink.extended_stats().unwrap();
    assert!(extended.contains(&("rx_good_packets".to_owned(), BURST as u64)), "{extended:?}");
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["stats"]["rx_no_mbuf"], 0);
    assert_eq!(json["mtu"], 1500);
    port.close();
}

#[test]
fn a_capture_is_replayed_and_written() {
    let dir = std::env::temp_dir().join(unique("ferry-pcap"));
    std::fs::create_dir(&dir).unwrap();
    let (input, output) = (dir.join("in.pcap"), dir.join("out.pcap"));
    let frames: Vec<Vec<u8>> = [60, 1500, 3000].iter().map(|&n| frame(n, n)).collect();
    // libpcap file format: magic, version 2.4, zone, accuracy, snap length, link type 1 (Ethernet).
    let mut file = Vec::new();
    for v in [0xa1b2c3d4u32, 0x0004_0002, 0, 0, 65535, 1] {
        file.extend(v.to_le_bytes());
    }
    for f in &frames {
        for v in [0, 0, f.len() as u32, f.len() as u32] {
            file.extend(v.to_le_bytes());
        }
        file.extend(f);
    }
    std::fs::write(&input, &file).unwrap();
    let device = format!("{},rx_pcap={},tx_pcap={}", unique("net_pcap"), input.display(), output.display());
    let mut config = config(&device);
    config.mtu = 3000;
    let mut port = Port::open(&config);
    let got = port.receive();
    assert_eq!(got.iter().map(|(f, _)| f.clone()).collect::<Vec<_>>(), frames);
    let refs: Vec<_> = got.iter().map(|(f, o)| (f.as_slice(), *o)).collect();
    assert_eq!(port.send(&refs).accepted, 0b111);
    port.close();
    let written = std::fs::read(&output).unwrap();
    for f in &frames {
        assert!(written.windows(f.len()).any(|w| w == f), "{} bytes long", f.len());
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn error(device: &str, change: impl FnOnce(&mut ferry_ffi::uplink::UplinkConfig)) -> String {
    let mut config = config(device);
    change(&mut config);
    match Uplink::open(&config, &eal()) {
        Ok(_) => panic!("{device} opened"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn errors_name_the_step_the_reason_and_the_remedy() {
    let e = error("net_nonsense0", |_| ());
    assert!(e.contains("net_nonsense0") && e.contains("attaching") && e.contains("driver"), "{e}");
    let missing = unique("nope");
    let e = error(&format!("{},iface={missing}", unique("net_af_packet")), |_| ());
    assert!(e.contains("attaching") && e.contains(&missing), "{e}");
    let e = error("net_null with blanks", |_| ());
    assert!(e.contains("blank"), "{e}");
    let e = error("0000:3b:00.0", |_| ());
    assert!(e.contains("without PCI"), "{e}");
    let e = error(&unique("net_null"), |c| c.mtu = 20);
    assert!(e.contains("mtu = 20") && e.contains("68"), "{e}");
    let e = error(&ring(), |c| c.rx_queues = 200);
    assert!(e.contains("200") && e.contains("lower rx_queues"), "{e}");
    let e = error(&unique("net_null"), |c| c.mbufs = 10);
    assert!(e.contains("10 mbufs") && e.contains("raise mbufs"), "{e}");
    let e = error(&unique("net_null"), |c| c.mbufs = 50_000_000);
    assert!(e.contains("memory_mb"), "{e}");
    // After all that EAL is as good as new.
    Port::open(&config(&ring())).close();
}

#[test]
fn a_device_is_opened_once_at_a_time() {
    let name = ring();
    let port = Port::open(&config(&name));
    let e = error(&name, |_| ());
    assert!(e.contains("already in use"), "{e}");
    port.close();
    Port::open(&config(&name)).close();
}

#[test]
fn closing_waits_for_nobody_and_says_who_is_left() {
    let name = ring();
    let mut port = Port::open(&config(&name));
    let Port { uplink, .. } = port;
    let Err(UplinkError::InUse { handles, .. }) = uplink.close() else { panic!() };
    assert_eq!(handles, 2, "a receive queue and a transmit handle");
    // They still work, and the last one closes the device.
    let f = frame(1, 60);
    assert_eq!(send_lane(&port.tx, &port.guard, 3, &[(&f, Offload::default())]).accepted, 1);
    port.rx.receive(&port.guard, &mut port.burst);
    assert_eq!(port.burst.len(), 1);
    port.rx.release(&port.guard);
    drop(port.tx);
    assert!(error(&name, |_| ()).contains("already in use"));
    drop(port.rx);
    Port::open(&config(&name)).close();
}

#[test]
fn several_queues_and_rss_where_the_device_has_them() {
    let mut config = config(&unique("net_null"));
    config.rx_queues = 4;
    let mut uplink = Uplink::open(&config, &eal()).unwrap();
    let status = uplink.status();
    assert_eq!((status.rx_queues, status.tx_queues), (4, 4));
    assert_ne!(status.rss_hash_functions, 0, "net_null has RSS");
    let queues = uplink.take_rx_queues();
    assert_eq!(queues.iter().map(|q| q.index()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    drop(queues);
    uplink.close().unwrap();
}

#[test]
fn the_environment_is_one_per_process() {
    let eal = eal();
    assert!(Eal::start(eal.config()).is_ok(), "the same again");
    let other = EalConfig { memory_mb: 17, ..eal.config().clone() };
    let e = Eal::start(&other).unwrap_err();
    assert!(matches!(e, EalError::OtherConfig(_)) && e.to_string().contains("restart"), "{e}");
    assert!(Eal::running().is_some());
    assert!(Eal::version().starts_with("DPDK "));
}

#[test]
fn an_empty_body_and_no_frames_are_no_trouble() {
    let port = Port::open(&config(&ring()));
    let idle = port.in_use();
    assert_eq!(port.send::<&[u8]>(&[]).accepted, 0);
    let empty = [TxFrame { head: &[], body: Body::EMPTY, offload: Offload::default(), flow_hash: 0 }];
    let mut report = TxReport::default();
    port.tx.send(&port.guard, usize::MAX, &empty, &mut report);
    assert_eq!((report.accepted, port.in_use()), (0, idle));
    port.close();
}

/// Ethernet/IPv4/TCP with an unfinished checksum and segmentation owed.
fn tso_frame(payload: usize, segment: u16) -> (Vec<u8>, Offload) {
    let (udp, _) = udp_frame([2; 6], [10, 0, 0, 1], [10, 0, 0, 2], 9, &[]);
    let mut f = udp[..34].to_vec();
    f[23] = 6;
    f[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    f[24..26].fill(0);
    let ip_sum = !fold(sum16(&f[14..34]));
    f[24..26].copy_from_slice(&ip_sum.to_be_bytes());
    let pseudo = fold(sum16(&f[26..34]) + 6 + 20 + payload as u32);
    f.extend([15, 160, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0x20, 0]);
    f.extend(pseudo.to_be_bytes());
    f.extend([0, 0]);
    f.extend(frame(3, payload));
    let owed = Offload {
        needs_csum: true,
        csum_start: 34,
        csum_offset: 16,
        gso: Gso::TcpV4,
        gso_size: segment,
        hdr_len: 54,
        ..Offload::default()
    };
    (f, owed)
}

#[test]
fn offload_requests_cross_a_virtio_device() {
    // virtio-user sends to a vhost device in the same process: both ends are ours, the wire is virtio's.
    let socket = std::env::temp_dir().join(unique("ferry-vhost"));
    let mut near = Port::open(&config(&format!("{},iface={},tso=1", unique("net_vhost"), socket.display())));
    let device = format!("{},path={},queue_size=256", unique("net_virtio_user"), socket.display());
    let mut far = Port::open(&config(&device));
    let end = std::time::Instant::now() + DEADLINE;
    while !near.uplink.status().link.unwrap().up {
        assert!(std::time::Instant::now() < end, "the devices do not connect");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let idle = far.in_use();
    let caps = far.tx.capabilities(&far.guard);
    assert!(caps.csum && caps.tso4 && caps.tso6, "{caps:?}");

    let (udp, owed) = udp_frame([2; 6], [10, 0, 0, 1], [10, 0, 0, 2], 9, &frame(1, 600));
    assert_eq!(far.send(&[(&udp, owed)]).accepted, 1);
    let (got, offload) = near.receive_where(|f| f.len() == udp.len());
    assert_eq!((&got, offload), (&udp, owed), "the request arrives as it was made");

    let (tcp, owed) = tso_frame(20_000, 1400);
    assert_eq!(far.send(&[(&tcp, owed)]).accepted, 1);
    let (got, offload) = near.receive_where(|f| f.len() == tcp.len());
    assert_eq!(offload, owed);
    // The pseudo-header's sum may leave the length out under segmentation; everything else is untouched.
    assert_eq!((&got[..50], &got[52..]), (&tcp[..50], &tcp[52..]));

    // And back.
    assert_eq!(
        near.send(&[(&udp, Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() })])
            .accepted,
        1
    );
    let (got, offload) = far.receive_where(|f| f.len() == udp.len());
    assert!(offload.needs_csum || udp_sum_is_right(&got), "{offload:?}");
    assert!(far.in_use() <= idle + 256, "what is out is in the transmit ring");
    far.close();
    near.close();
    let _ = std::fs::remove_file(socket);
}
