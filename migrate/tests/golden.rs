//! The format against its golden files, which another program wrote from `FORMAT.md`: this code reads and writes exactly these.
use core::net::IpAddr;
use std::path::{Path, PathBuf};

use ferry_dataplane::conntrack::{
    Portable, PortableKey, PortableSctp, PortableSide, PortableState, PortableTcp, Tally, Timeouts, Traffic, Way,
};
use ferry_dataplane::packet::IpProto;
use ferry_migrate::compress::{Codec, CompressMode, Compressor};
use ferry_migrate::encoding::{BatchHeader, BatchLimits, BatchPlace, BatchReader, BatchWriter};
use ferry_migrate::record::{PortableTombstone, Record, RecordError};

const PLACE: BatchPlace =
    BatchPlace { migration: 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff, round: 2, sequence: 3, clear: false };

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(directory().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn read(bytes: &[u8]) -> Result<(BatchHeader, Vec<Record>), RecordError> {
    let mut reader = BatchReader::new(BatchLimits::default());
    let batch = reader.read(bytes)?;
    Ok((*batch.header(), batch.records().collect::<Result<_, _>>()?))
}

fn key(local: &str, remote: &str, local_port: u16, remote_port: u16, proto: IpProto) -> PortableKey {
    let [local, remote] = [local, remote].map(|a| a.parse::<IpAddr>().unwrap());
    PortableKey { local, remote, local_port, remote_port, zone: 0, proto, asked_by_remote: false }
}

fn connection(key: PortableKey, protocol: PortableState) -> Portable {
    Portable {
        key,
        opened_by_remote: false,
        seen_reply: false,
        assured: false,
        state: 0,
        protocol,
        traffic: [Traffic::default(); 2],
        remaining_ms: 1000,
        version: 1,
    }
}

fn counted(from: (u32, u32), to: (u32, u32)) -> [Traffic; 2] {
    [from, to].map(|(packets, bytes)| Traffic {
        packets: Tally::from_raw(packets).unwrap(),
        bytes: Tally::from_raw(bytes).unwrap(),
    })
}

/// What the golden files of version 1.0 say.
fn records() -> Vec<Record> {
    let tcp4 = Portable {
        seen_reply: true,
        assured: true,
        state: 3,
        traffic: counted((1000, 70_000), (900, 5 << 27 | 1 << 26 | 77)),
        remaining_ms: 431_999_000,
        version: 0x2abb_ccdd,
        ..connection(
            key("10.0.0.5", "192.0.2.7", 49152, 443, IpProto::TCP),
            PortableState::Tcp(PortableTcp {
                sides: [
                    PortableSide {
                        end: 0x1020_3040,
                        max_end: 0x1020_f040,
                        max_window: 65535,
                        max_ack: 0xa0b0_c0d0,
                        scale: 7,
                        flags: PortableSide::WINDOW_SCALE | PortableSide::SACK_PERMITTED | PortableSide::MAX_ACK_SET,
                    },
                    PortableSide {
                        end: 0xa0b0_c0d4,
                        max_end: 0xa0b1_c0d0,
                        max_window: 8_388_480,
                        max_ack: 0x1020_3040,
                        scale: 9,
                        flags: PortableSide::WINDOW_SCALE
                            | PortableSide::SACK_PERMITTED
                            | PortableSide::UNACKNOWLEDGED
                            | PortableSide::MAX_ACK_SET,
                    },
                ],
                last_kind: 3,
                last_reply: true,
                last_end: 0xa0b0_c0d4,
                last_len: 4,
                last_ack: 0x1020_3040,
                last_window: 509,
                last_scale: 0,
                last_flags: 0,
                retrans: 2,
            }),
        )
    };
    let tcp6 = Portable {
        opened_by_remote: true,
        state: 9,
        traffic: counted((1, 80), (0, 0)),
        remaining_ms: 120_000,
        version: 0,
        ..connection(
            PortableKey { zone: 0x1064, ..key("2001:db8::5", "2001:db8:1::7", 80, 50000, IpProto::TCP) },
            PortableState::Tcp(PortableTcp {
                sides: [
                    PortableSide {
                        end: 1,
                        max_end: 1,
                        max_window: 1,
                        max_ack: 0,
                        scale: 14,
                        flags: PortableSide::WINDOW_SCALE | PortableSide::SACK_PERMITTED,
                    },
                    PortableSide::default(),
                ],
                last_kind: 0,
                last_reply: false,
                last_end: 7,
                last_len: 1,
                last_ack: 8,
                last_window: 65535,
                last_scale: 14,
                last_flags: PortableSide::WINDOW_SCALE
                    | PortableSide::SACK_PERMITTED
                    | PortableTcp::CHALLENGE_EXPECTED
                    | PortableTcp::SIMULTANEOUS_OPEN,
                retrans: 0,
            }),
        )
    };
    let udp = Portable {
        seen_reply: true,
        traffic: counted((1, 60), (1, 120)),
        remaining_ms: 30_000,
        version: 7,
        ..connection(key("10.0.0.5", "192.0.2.53", 5353, 53, IpProto::UDP), PortableState::Udp { age_ms: 1234 })
    };
    let udp_in = Portable {
        opened_by_remote: true,
        ..connection(
            PortableKey { zone: 4094, ..key("10.0.0.5", "192.0.2.54", 1, 2, IpProto::UDP) },
            PortableState::Udp { age_ms: u16::MAX },
        )
    };
    let sctp = Portable {
        seen_reply: true,
        assured: true,
        state: 4,
        remaining_ms: 210_000,
        ..connection(
            key("10.0.0.5", "192.0.2.9", 2905, 2906, IpProto::SCTP),
            PortableState::Sctp(PortableSctp {
                tags: [0xdead_beef, 0xfeed_f00d],
                init: [true, false],
                heartbeat_failed: Some(Way::Reply),
            }),
        )
    };
    let ping_key = key("10.0.0.5", "192.0.2.10", 77, 0x0800, IpProto::ICMP);
    let pinged = Portable {
        opened_by_remote: true,
        seen_reply: true,
        ..connection(PortableKey { asked_by_remote: true, ..ping_key }, PortableState::Plain)
    };
    let pings = connection(ping_key, PortableState::Plain);
    let ping6_key = key("fd00::1", "fd00::2", 9, 0x8000, IpProto::ICMPV6);
    let gre = Portable {
        seen_reply: true,
        assured: true,
        remaining_ms: 180_000,
        ..connection(key("10.0.0.5", "192.0.2.11", 0, 321, IpProto::GRE), PortableState::Plain)
    };
    let lite = connection(key("10.0.0.5", "192.0.2.11", 5, 6, IpProto::UDP_LITE), PortableState::Plain);
    let ospf = Portable {
        version: 0x3fff_ffff,
        ..connection(key("10.0.0.5", "224.0.0.5", 0, 0, IpProto(89)), PortableState::Plain)
    };
    let connections =
        [tcp4, tcp6, udp, udp_in, sctp, pinged, pings, connection(ping6_key, PortableState::Plain), gre, lite, ospf];
    let tombstones = [
        PortableTombstone { key: key("10.0.0.5", "192.0.2.7", 49153, 443, IpProto::TCP), version: 0x3fff_ffff },
        PortableTombstone { key: PortableKey { zone: 12, asked_by_remote: true, ..ping6_key }, version: 1 },
    ];
    connections.into_iter().map(Record::Connection).chain(tombstones.into_iter().map(Record::Tombstone)).collect()
}

fn write(records: &[Record], compressor: &mut Compressor) -> Vec<u8> {
    let mut writer = BatchWriter::new(BatchLimits::default());
    for record in records {
        writer.push(record).unwrap();
    }
    let mut out = Vec::new();
    writer.finish(PLACE, compressor, &mut out);
    out
}

#[test]
fn the_golden_files_are_read() {
    for (name, codec, minor) in [
        ("v1.0-plain.bin", Codec::None, 0),
        ("v1.0-lz4.bin", Codec::Lz4, 0),
        // A later minor version, with options that this reader does not know.
        ("v1.9-optional.bin", Codec::None, 9),
    ] {
        let (header, found) = read(&golden(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(found, records(), "{name}");
        assert_eq!((header.place, header.codec, header.minor), (PLACE, codec, minor), "{name}");
    }
    let (header, found) = read(&golden("v1.0-empty.bin")).unwrap();
    assert_eq!((header.records, header.raw_bytes, found.len()), (0, 0, 0));
}

#[test]
fn the_golden_files_are_written() {
    assert_eq!(write(&records(), &mut Compressor::off()), golden("v1.0-plain.bin"));
    assert_eq!(write(&[], &mut Compressor::off()), golden("v1.0-empty.bin"));
    // Compressors may differ: what counts is what comes out.
    let compressed = write(&records(), &mut Compressor::new(CompressMode::Always, None, || 0));
    assert!(compressed.len() < golden("v1.0-plain.bin").len());
    let (header, found) = read(&compressed).unwrap();
    assert_eq!((header.codec, found), (Codec::Lz4, records()));
}

#[test]
fn what_the_golden_files_say_makes_sense() {
    for record in records() {
        match record {
            Record::Connection(c) => {
                let connection = c.to_connection(12_345, &Timeouts::default()).unwrap_or_else(|e| panic!("{e}: {c:?}"));
                assert_eq!(connection.to_portable(12_345), c);
            }
            Record::Tombstone(t) => assert_eq!(PortableKey::of(&t.key.to_key().unwrap()), t.key),
        }
    }
}

/// What is mandatory and unknown is refused, and the reason names it.
#[test]
fn what_must_be_understood_is_refused_with_its_number() {
    use RecordError as E;
    for (name, error, says) in [
        ("v1.9-mandatory-kind.bin", E::Kind(5), "unknown mandatory record kind 0x5"),
        ("v1.9-mandatory-extension.bin", E::Extension(0x8123), "unknown mandatory extension 0x8123"),
        ("v1.9-mandatory-header-extension.bin", E::Extension(0x8456), "unknown mandatory extension 0x8456"),
        ("v1.9-mandatory-flag.bin", E::BatchFlags(4), "unknown batch flags 0x4"),
        ("v1.9-codec.bin", E::Codec(2), "unknown compression 2"),
        ("v2.0.bin", E::Version { major: 2, minor: 0 }, "record format 2.0, this host reads 1.x"),
    ] {
        let refused = read(&golden(name)).unwrap_err();
        assert_eq!(refused, error, "{name}");
        assert_eq!(refused.to_string(), says);
    }
}

#[test]
fn every_golden_file_is_tested() {
    let source = include_str!("golden.rs");
    let mut files = 0;
    for entry in std::fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".bin") {
            assert!(source.contains(&format!("\"{name}\"")), "{name}");
            files += 1;
        }
    }
    assert!(files >= 10);
}

/// Sets the bytes from `at` on and makes the checksums right again.
fn forged(mut bytes: Vec<u8>, changes: &[(usize, &[u8])]) -> Vec<u8> {
    for (at, with) in changes {
        bytes[*at..at + with.len()].copy_from_slice(with);
    }
    let header_bytes = usize::from(u16::from_le_bytes([bytes[6], bytes[7]])).clamp(64, bytes.len());
    let crc = crc32fast::hash(&bytes[header_bytes..]);
    bytes[52..56].copy_from_slice(&crc.to_le_bytes());
    bytes[60..64].fill(0);
    let crc = crc32fast::hash(&bytes[..header_bytes]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// One test for each thing that a hostile or broken peer may get wrong.
#[test]
fn each_violation_is_named() {
    use RecordError as E;
    let plain = || golden("v1.0-plain.bin");
    let len = plain().len();
    let raw = (len - 64) as u32;
    // Offsets within the batch: the first record is TCP, the third UDP, the fifth SCTP, the sixth ICMP; the last two are tombstones.
    let record = |n: usize| 64 + 120 * n;
    let tombstone = len - 56;
    let cases: Vec<(&str, Vec<u8>, E)> = vec![
        ("header", forged(plain(), &[(0, b"X")]), E::Magic),
        ("header", forged(plain(), &[(6, &56u16.to_le_bytes())]), E::HeaderLength(56)),
        ("header", forged(plain(), &[(6, &60u16.to_le_bytes())]), E::HeaderLength(60)),
        ("header", forged(plain(), &[(6, &520u16.to_le_bytes())]), E::HeaderLength(520)),
        ("header", forged(plain(), &[(6, &68u16.to_le_bytes())]), E::HeaderLength(68)),
        ("header", forged(plain(), &[(11, &[1])]), E::Reserved),
        ("header", forged(plain(), &[(56, &[1])]), E::Reserved),
        ("records", forged(plain(), &[(12, &14u32.to_le_bytes())]), E::Count { announced: 14, found: 13 }),
        ("records", forged(plain(), &[(12, &12u32.to_le_bytes())]), E::Count { announced: 12, found: 13 }),
        ("records", forged(plain(), &[(12, &8193u32.to_le_bytes())]), E::Records(8193)),
        ("records", forged(plain(), &[(12, &200u32.to_le_bytes())]), E::Records(200)),
        (
            "lengths",
            forged(plain(), &[(48, &(raw + 8).to_le_bytes())]),
            E::PayloadLength { payload: raw, raw: raw + 8 },
        ),
        ("lengths", forged(plain(), &[(48, &0u32.to_le_bytes())]), E::PayloadLength { payload: raw, raw: 0 }),
        (
            "lengths",
            forged(plain(), &[(44, &u32::MAX.to_le_bytes()), (48, &u32::MAX.to_le_bytes())]),
            E::PayloadLength { payload: u32::MAX, raw: u32::MAX },
        ),
        ("lengths", forged(plain(), &[(10, &[1])]), E::PayloadLength { payload: raw, raw }),
        ("lz4", forged(golden("v1.0-lz4.bin"), &[(64, &[0xff; 20])]), E::Decompress),
        ("kind", forged(plain(), &[(record(0), &[0])]), E::Kind(0)),
        ("kind", forged(plain(), &[(record(0), &[0x7f])]), E::Kind(0x7f)),
        ("length", forged(plain(), &[(record(0) + 1, &[0])]), E::Length { kind: 1, bytes: 0 }),
        ("length", forged(plain(), &[(record(0) + 1, &[33])]), E::Length { kind: 1, bytes: 264 }),
        ("length", forged(plain(), &[(record(0) + 1, &[14])]), E::Length { kind: 1, bytes: 112 }),
        ("length", forged(plain(), &[(tombstone + 1, &[8])]), E::Truncated { need: 64, have: 56 }),
        ("length", forged(plain(), &[(tombstone, &[1])]), E::Length { kind: 1, bytes: 56 }),
        ("flags", forged(plain(), &[(record(0) + 2, &[0x1c])]), E::Flags(0x10)),
        ("flags", forged(plain(), &[(tombstone + 2, &[0x07])]), E::Flags(0x04)),
        // Only ICMP's tombstones say who asked.
        ("flags", forged(plain(), &[(tombstone - 56 + 2, &[0x02])]), E::Flags(0x02)),
        ("zeros", forged(plain(), &[(record(0) + 119, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(2) + 7, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(2) + 70, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(4) + 77, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(4) + 76, &[0x10])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(4) + 76, &[0x08])]), E::Reserved),
        ("zeros", forged(plain(), &[(record(5) + 119, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(tombstone + 6, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(tombstone + 12, &[1])]), E::Reserved),
        ("zeros", forged(plain(), &[(tombstone + 55, &[1])]), E::Reserved),
        ("address", forged(plain(), &[(record(0) + 16, &[1])]), E::Address),
        ("address", forged(plain(), &[(record(0) + 42, &[0])]), E::Address),
        ("counter", forged(plain(), &[(record(0) + 52, &(1u32 << 27).to_le_bytes())]), E::Counter(1 << 27)),
    ];
    for (what, bytes, error) in cases {
        assert_eq!(read(&bytes).map(|_| ()), Err(error), "{what}");
    }
    let optional = golden("v1.9-optional.bin");
    // The first extension of the first connection: behind the header with its extensions and an optional record.
    let header_bytes = usize::from(u16::from_le_bytes([optional[6], optional[7]]));
    let extension = header_bytes + 16 + 120;
    let case = |at: usize, with: &[u8]| read(&forged(optional.clone(), &[(at, with)])).map(|_| ());
    assert_eq!(case(extension + 2, &[200]), Err(E::ExtensionLength { kind: 1, bytes: 200 }));
    assert_eq!(case(extension + 2, &[0xff, 0xff]), Err(E::ExtensionLength { kind: 1, bytes: 0xffff }));
    assert_eq!(case(extension + 11, &[1]), Err(E::Reserved), "padding");
    assert_eq!(case(extension, &[2]), Ok(()));
    // Accidents.
    let mut broken = plain();
    broken[40] ^= 1;
    assert_eq!(read(&broken).unwrap_err(), E::HeaderChecksum);
    let mut broken = plain();
    broken[700] ^= 1;
    assert_eq!(read(&broken).unwrap_err(), E::PayloadChecksum);
    let mut longer = plain();
    longer.push(0);
    assert_eq!(read(&longer).unwrap_err(), E::Surplus(1));
    assert_eq!(read(&plain()[..63]).unwrap_err(), E::Truncated { need: 64, have: 63 });
    assert_eq!(read(&plain()[..64]).unwrap_err(), E::Truncated { need: len, have: 64 });
}

/// The reader's own limits bind, whatever the format allows; and the writer keeps to the same.
#[test]
fn limits_bind_both_sides() {
    let mut small = BatchReader::new(BatchLimits { records: 12, raw_bytes: 1 << 20 });
    assert_eq!(small.read(&golden("v1.0-plain.bin")).unwrap_err(), RecordError::Records(13));
    for name in ["v1.0-plain.bin", "v1.0-lz4.bin"] {
        let mut short = BatchReader::new(BatchLimits { records: 13, raw_bytes: 1431 });
        assert!(matches!(short.read(&golden(name)), Err(RecordError::PayloadLength { raw: 1432, .. })), "{name}");
        let mut enough = BatchReader::new(BatchLimits { records: 13, raw_bytes: 1432 });
        assert!(enough.read(&golden(name)).is_ok());
    }
    for limits in
        [BatchLimits { records: 5, raw_bytes: u32::MAX }, BatchLimits { records: u32::MAX, raw_bytes: 5 * 120 + 55 }]
    {
        let mut writer = BatchWriter::new(limits);
        let tcp4 = records()[0];
        for _ in 0..5 {
            writer.push(&tcp4).unwrap();
        }
        assert!(writer.push(&tcp4).is_err() && writer.push(&records()[12]).is_err());
        assert_eq!((writer.records(), writer.raw().len()), (5, 600));
        let mut out = Vec::new();
        writer.finish(PLACE, &mut Compressor::off(), &mut out);
        assert!(writer.is_empty());
        assert_eq!(read(&out).unwrap().1.len(), 5);
    }
    // The largest batch that there is.
    let mut writer = BatchWriter::new(BatchLimits { records: u32::MAX, raw_bytes: u32::MAX });
    let memory = writer.raw().as_ptr();
    while writer.push(&records()[0]).is_ok() {}
    assert_eq!(writer.records(), 8192);
    assert_eq!(writer.raw().as_ptr(), memory, "no allocation while writing");
    let mut out = Vec::new();
    writer.finish(PLACE, &mut Compressor::new(CompressMode::Always, None, || 0), &mut out);
    let (header, found) = read(&out).unwrap();
    assert_eq!((header.codec, found.len()), (Codec::Lz4, 8192));
}
