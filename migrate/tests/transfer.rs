//! Whole tables through batches: what comes out on another host is what went in, and changes and deletions follow.
use core::net::{IpAddr, Ipv4Addr};
use std::collections::BTreeMap;

use ferry_dataplane::conntrack::{
    ConnMap, ConnTable, Cursor, Dirt, Imported, Key, Portable, PortableKey, PortableSide, PortableState, PortableTcp,
    Removal, Stored, Timeouts, Traffic,
};
use ferry_dataplane::packet::IpProto;
use ferry_migrate::compress::{CompressMode, Compressor};
use ferry_migrate::encoding::{BatchLimits, BatchPlace, BatchReader, BatchWriter};
use ferry_migrate::record::{PortableTombstone, Record};

const CONNECTIONS: u32 = 20_000;
/// The clocks of both hosts have nothing in common.
const HERE_MS: u64 = 4_294_960_000;
const THERE_MS: u64 = 77;

fn portable(n: u32) -> Portable {
    let tcp = n.is_multiple_of(2);
    let side = PortableSide {
        end: n.wrapping_mul(2_654_435_761),
        max_end: n.wrapping_mul(2_654_435_761).wrapping_add(64_000),
        max_window: 64_000,
        max_ack: n,
        scale: (n % 15) as u8,
        flags: PortableSide::WINDOW_SCALE,
    };
    Portable {
        key: PortableKey {
            local: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
            remote: IpAddr::V4(Ipv4Addr::from(0xc0a8_0000 | n >> 8)),
            local_port: 443,
            remote_port: 1024 + (n & 0xff) as u16,
            zone: (n % 3) as u16,
            proto: if tcp { IpProto::TCP } else { IpProto::UDP },
            asked_by_remote: false,
        },
        opened_by_remote: !n.is_multiple_of(5),
        seen_reply: true,
        assured: tcp,
        state: if tcp { 3 } else { 0 },
        protocol: if tcp {
            PortableState::Tcp(PortableTcp { sides: [side, side], last_kind: 3, ..PortableTcp::default() })
        } else {
            PortableState::Udp { age_ms: n as u16 }
        },
        traffic: [Traffic::default(); 2],
        remaining_ms: if tcp { 1_000_000 + n } else { 10_000 + n % 10_000 },
        version: 0,
    }
}

/// What must be alike on both hosts.
fn content(map: &ConnMap, now_ms: u64) -> BTreeMap<Key, Portable> {
    let mut all = BTreeMap::new();
    let mut cursor = Cursor::default();
    while map.walk(&mut cursor, 1000, &mut |c| {
        assert!(all.insert(c.key, c.to_portable(now_ms)).is_none());
    }) {}
    all
}

/// The way: batches are written, read and applied one after the other.
struct Way<'a> {
    to: &'a ConnMap,
    writer: BatchWriter,
    compressor: Compressor,
    reader: BatchReader,
    place: BatchPlace,
    bytes: usize,
}

impl Way<'_> {
    fn send(&mut self, record: &Record) {
        if self.writer.push(record).is_err() {
            self.flush();
            self.writer.push(record).unwrap();
        }
    }

    fn flush(&mut self) {
        let mut out = Vec::new();
        let written = self.writer.finish(self.place, &mut self.compressor, &mut out);
        self.bytes += out.len();
        // Twice: applying a batch again does no harm.
        for again in [false, true] {
            let batch = self.reader.read(&out).unwrap();
            assert_eq!(*batch.header(), written);
            for record in batch.records() {
                match record.unwrap() {
                    Record::Connection(portable) => {
                        let connection = portable.to_connection(THERE_MS, &Timeouts::default()).unwrap();
                        let imported = self.to.import(&connection, THERE_MS, &());
                        assert!(imported == Imported::Older || (!again && imported != Imported::Full), "{imported:?}");
                    }
                    Record::Tombstone(PortableTombstone { key, version }) => {
                        let gone = self.to.delete_matching(&key.to_key().unwrap(), version, &());
                        assert!(!(again && gone));
                    }
                }
            }
        }
        self.place.sequence += 1;
    }
}

#[test]
fn a_table_arrives_as_it_is() {
    let timeouts = Timeouts::default();
    for mode in [CompressMode::Off, CompressMode::Always] {
        let here = ConnMap::new(CONNECTIONS * 2, [1, 2]).unwrap();
        let there = ConnMap::new(CONNECTIONS * 2, [3, 4]).unwrap();
        let mut table = here.handle(&(), 0);
        for n in 0..CONNECTIONS {
            table.insert(&portable(n).to_connection(HERE_MS, &timeouts).unwrap(), HERE_MS).unwrap();
        }
        here.set_tracking(true);
        let mut way = Way {
            to: &there,
            writer: BatchWriter::new(BatchLimits { records: 1000, ..BatchLimits::default() }),
            compressor: Compressor::new(mode, None, || 0),
            reader: BatchReader::new(BatchLimits { records: 1000, ..BatchLimits::default() }),
            place: BatchPlace { migration: 9, round: 0, sequence: 0, clear: false },
            bytes: 0,
        };
        let mut cursor = Cursor::default();
        while here.walk(&mut cursor, 512, &mut |c| way.send(&Record::Connection(c.to_portable(HERE_MS)))) {}
        way.flush();
        assert_eq!(way.place.sequence, 20);
        let before = content(&here, HERE_MS);
        assert_eq!(before.len(), CONNECTIONS as usize);
        assert_eq!(content(&there, THERE_MS), before);

        // Some change, some go, some of those come again.
        for n in (0..CONNECTIONS).step_by(11) {
            let key = portable(n).key.to_key().unwrap();
            let mut connection = here.get(&key).unwrap();
            if n.is_multiple_of(2) {
                connection.refresh(HERE_MS, 5000 + n % 1000);
                let change = ferry_dataplane::conntrack::Change::Semantic;
                assert_eq!(table.update(&connection, change), Stored::Done);
            } else {
                assert!(here.remove_if(&key, Removal::Deleted, &(), |_| true));
                if n.is_multiple_of(3) {
                    connection.refresh(HERE_MS, 9000);
                    table.insert(&connection, HERE_MS).unwrap();
                }
            }
        }
        way.place.round = 1;
        let sent = way.bytes;
        let mut cursor = Cursor::default();
        let mut tombstones = 0;
        while here.collect_dirty(&mut cursor, 512, &mut |dirt| match dirt {
            Dirt::Changed(c) => way.send(&Record::Connection(c.to_portable(HERE_MS))),
            Dirt::Deleted(t) => {
                tombstones += 1;
                let key = PortableKey::of(&t.key);
                way.send(&Record::Tombstone(PortableTombstone { key, version: t.version }));
            }
            Dirt::Overflow => panic!("too many tombstones for this test"),
        }) {}
        way.flush();
        assert!(tombstones > 800);
        assert!(way.bytes - sent < sent / 3, "changes only");
        assert_eq!(content(&there, THERE_MS), content(&here, HERE_MS));
        if mode == CompressMode::Always {
            assert!(way.compressor.stats().sent_bytes < way.compressor.stats().raw_bytes / 2);
        }
    }
}
