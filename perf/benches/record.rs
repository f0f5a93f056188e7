//! Micro-benchmarks of the migration's record format, one thread: batches of 1024 connections, half of them TCP over IPv4, a quarter over
//! IPv6, a quarter UDP. Items are records, bytes are those of records before compression.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::hint::black_box;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ferry_dataplane::conntrack::{
    Connection, Portable, PortableKey, PortableSide, PortableState, PortableTcp, Tally, Timeouts, Traffic,
};
use ferry_dataplane::packet::IpProto;
use ferry_migrate::compress::{Codec, CompressMode, Compressor, decompress};
use ferry_migrate::encoding::{BatchLimits, BatchPlace, BatchReader, BatchWriter};
use ferry_migrate::record::{CONNECTION_BYTES, Record, encode_connection};

const BATCH: usize = 1024;
const NOW_MS: u64 = 1_000_000;

fn main() {
    let bytes = bytes();
    let mut compressor = Compressor::new(CompressMode::Always, None, || 0);
    let sent = compressor.compress(&bytes).1.len();
    println!("LZ4: {} bytes of records become {sent}, {:.0} %", bytes.len(), sent as f64 * 100.0 / bytes.len() as f64);
    divan::main();
}

fn random(n: u32, salt: u32) -> u32 {
    let mut x = u64::from(n) << 32 | u64::from(salt);
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (x ^ x >> 33) as u32
}

fn side(n: u32, salt: u32) -> PortableSide {
    let end = random(n, salt);
    let window = 64_240 + (random(n, salt + 1) & 0xff) * 128;
    PortableSide {
        end,
        max_end: end.wrapping_add(window),
        max_window: window,
        max_ack: random(n, salt + 2),
        scale: 7,
        flags: PortableSide::WINDOW_SCALE | PortableSide::SACK_PERMITTED | PortableSide::MAX_ACK_SET,
    }
}

/// The `n`-th connection of a server's table: one VM, many clients.
fn portable(n: u32) -> Portable {
    let tcp = n % 4 != 3;
    let (local, remote): (IpAddr, IpAddr) = if n % 4 == 2 {
        let suffix = u128::from(random(n, 1)) << 32 | u128::from(random(n, 2));
        (Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 5).into(), Ipv6Addr::from(0xfd00_u128 << 112 | suffix).into())
    } else {
        (Ipv4Addr::new(10, 0, 0, 5).into(), Ipv4Addr::from(0x0a01_0000 | random(n, 1) & 0xffff).into())
    };
    let count = |salt, mask| Tally::from_raw(random(n, salt) & mask).unwrap_or_default();
    Portable {
        key: PortableKey {
            local,
            remote,
            local_port: if tcp { 443 } else { 53 },
            remote_port: random(n, 3) as u16 | 0x8000,
            zone: 0,
            proto: if tcp { IpProto::TCP } else { IpProto::UDP },
            asked_by_remote: false,
        },
        opened_by_remote: true,
        seen_reply: true,
        assured: tcp,
        state: if tcp { 3 } else { 0 },
        protocol: if tcp {
            let sides = [side(n, 10), side(n, 20)];
            PortableState::Tcp(PortableTcp {
                sides,
                last_kind: 3,
                last_reply: n.is_multiple_of(2),
                last_end: sides[0].end,
                last_len: 1448,
                last_ack: sides[0].max_ack,
                last_window: 502,
                last_scale: 0,
                last_flags: 0,
                retrans: 0,
            })
        } else {
            PortableState::Udp { age_ms: 1500 }
        },
        traffic: [
            Traffic { packets: count(4, 0x3ff), bytes: count(5, 0xf_ffff) },
            Traffic { packets: count(6, 0x3ff), bytes: count(7, 0xff_ffff) },
        ],
        remaining_ms: if tcp { 432_000_000 - random(n, 8) % 600_000 } else { 20_000 },
        version: random(n, 9) & 0xff,
    }
}

fn portables() -> Vec<Portable> {
    (0..BATCH as u32).map(portable).collect()
}

fn connections() -> Vec<Connection> {
    let timeouts = Timeouts::default();
    portables().iter().map(|p| p.to_connection(NOW_MS, &timeouts).expect("a connection")).collect()
}

fn bytes() -> Vec<u8> {
    portables().iter().flat_map(encode_connection).collect()
}

fn place() -> BatchPlace {
    BatchPlace { migration: 1, round: 0, sequence: 0, clear: false }
}

fn counters<'a, 'b>(bencher: Bencher<'a, 'b>) -> Bencher<'a, 'b> {
    bencher.counter(ItemsCount::new(BATCH))
}

/// From the table's form to a finished batch, uncompressed, checksums included.
#[divan::bench(min_time = 1)]
fn write(bencher: Bencher<'_, '_>) {
    let connections = connections();
    let mut writer = BatchWriter::new(BatchLimits::default());
    let mut compressor = Compressor::off();
    let mut out = Vec::with_capacity(BATCH * CONNECTION_BYTES + 64);
    counters(bencher).bench_local(|| {
        out.clear();
        for connection in &connections {
            writer.connection(&black_box(connection).to_portable(NOW_MS)).expect("room");
        }
        writer.finish(place(), &mut compressor, &mut out)
    });
}

/// From a batch's bytes to records, checksums included.
#[divan::bench(min_time = 1)]
fn read(bencher: Bencher<'_, '_>) {
    let batch = written(&mut Compressor::off());
    let mut reader = BatchReader::new(BatchLimits::default());
    counters(bencher).bench_local(|| {
        let batch = reader.read(black_box(&batch)).expect("a batch");
        for record in batch.records() {
            black_box(record.expect("a record"));
        }
    });
}

/// From a batch's bytes to the table's form, all that is checked included.
#[divan::bench(min_time = 1)]
fn read_and_import(bencher: Bencher<'_, '_>) {
    let batch = written(&mut Compressor::off());
    let mut reader = BatchReader::new(BatchLimits::default());
    let timeouts = Timeouts::default();
    counters(bencher).bench_local(|| {
        let batch = reader.read(black_box(&batch)).expect("a batch");
        for record in batch.records() {
            let Ok(Record::Connection(portable)) = record else { panic!("not a connection") };
            black_box(portable.to_connection(NOW_MS, &timeouts).expect("a connection"));
        }
    });
}

/// One record's layout alone.
#[divan::bench(min_time = 1)]
fn encode(bencher: Bencher<'_, '_>) {
    let portables = portables();
    counters(bencher).bench_local(|| {
        for portable in &portables {
            black_box(encode_connection(black_box(portable)));
        }
    });
}

/// LZ4, compression.
#[divan::bench(min_time = 1)]
fn lz4_compress(bencher: Bencher<'_, '_>) {
    let bytes = bytes();
    let mut compressor = Compressor::new(CompressMode::Always, None, || 0);
    bencher.counter(BytesCount::new(bytes.len())).bench_local(|| compressor.compress(black_box(&bytes)).1.len());
}

/// LZ4, decompression.
#[divan::bench(min_time = 1)]
fn lz4_decompress(bencher: Bencher<'_, '_>) {
    let bytes = bytes();
    let mut compressor = Compressor::new(CompressMode::Always, None, || 0);
    let (codec, payload) = compressor.compress(&bytes);
    assert_eq!(codec, Codec::Lz4);
    let mut out = vec![0; bytes.len()];
    bencher.counter(BytesCount::new(bytes.len())).bench_local(|| decompress(codec, black_box(payload), &mut out));
}

fn written(compressor: &mut Compressor) -> Vec<u8> {
    let mut writer = BatchWriter::new(BatchLimits::default());
    for portable in portables() {
        writer.connection(&portable).expect("room");
    }
    let mut out = Vec::new();
    writer.finish(place(), compressor, &mut out);
    out
}
