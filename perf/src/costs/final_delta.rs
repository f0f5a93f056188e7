//! What copying a table takes: the full walk, and the final delta after some connections have changed. One thread does everything that both
//! hosts' processors have to do, one after the other: collecting, encoding, decoding, checking, importing, acknowledging. Real tables,
//! codec and state machines; no network.
use super::gauge;
use crate::results::Metric;
use crate::workload::short;
use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::conntrack::{
    Change, ConnTable, Portable, PortableKey, PortableSide, PortableState, PortableTcp, Timeouts, Traffic,
};
use ferry_dataplane::enforce::{VmFirewall, VmOptions};
use ferry_dataplane::packet::IpProto;
use ferry_migrate::compress::{CompressMode, Compressor};
use ferry_migrate::destination::{self, Destination, DestinationLimits};
use ferry_migrate::message::{Abilities, List, Name, Offer, WhenLate};
use ferry_migrate::source::{self, Source, SourceIdentity, SourceLimits};
use ferry_migrate::table::Staging;
use ferry_migrate::wire::{BatchDecoder, BatchEncoder};
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Both hosts' clock at the beginning, milliseconds.
const BEGIN_MS: u64 = 1_000_000;
/// The migration's id.
const ID: u128 = 7;

/// An established TCP connection to the VM.
fn portable(n: u32) -> Portable {
    let side = PortableSide {
        end: n.wrapping_mul(2_654_435_761),
        max_end: n.wrapping_mul(2_654_435_761).wrapping_add(64_000),
        max_window: 64_000,
        max_ack: n,
        scale: 7,
        flags: PortableSide::WINDOW_SCALE | PortableSide::MAX_ACK_SET,
    };
    Portable {
        key: PortableKey {
            local: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
            remote: IpAddr::V4(Ipv4Addr::from(0xc0a8_0000 | n >> 12)),
            local_port: 443,
            remote_port: 1024 + (n & 0xfff) as u16,
            zone: 0,
            proto: IpProto::TCP,
            asked_by_remote: false,
        },
        opened_by_remote: true,
        seen_reply: true,
        assured: true,
        state: 3,
        protocol: PortableState::Tcp(PortableTcp { sides: [side, side], last_kind: 3, ..PortableTcp::default() }),
        traffic: [Traffic::default(); 2],
        remaining_ms: 100_000_000,
        version: 0,
    }
}

fn table(capacity: u32, seed: [u64; 2]) -> Result<Arc<VmFirewall>> {
    let options = VmOptions { capacity, ..VmOptions::named("vm") };
    Ok(Arc::new(VmFirewall::new(0, &options, seed).context("no memory")?))
}

fn name(text: &str) -> Result<Name> {
    Name::new(text).context("name")
}

/// Both machines, and what is on its way between them.
struct Pair {
    source: Source<Arc<VmFirewall>>,
    destination: Destination<Staging>,
    here: Arc<VmFirewall>,
    there: Staging,
    encoder: BatchEncoder,
    decoder: BatchDecoder,
    to_source: VecDeque<source::Event>,
    to_destination: VecDeque<destination::Event<Staging>>,
    now_ms: u64,
    wire_bytes: usize,
    records: usize,
    /// Time in which the source's processor was at work.
    source_time: Duration,
    released: Option<source::Release>,
}

impl Pair {
    fn new(connections: u32) -> Result<Self> {
        let (here, there) =
            (table(connections + connections / 8, [1, 2])?, table(connections + connections / 8, [3, 4])?);
        let timeouts = Timeouts::default();
        let mut handle = here.map().handle(&(), 0);
        for n in 0..connections {
            let connection = portable(n).to_connection(BEGIN_MS, &timeouts).ok().context("connection")?;
            handle.insert(&connection, BEGIN_MS).ok().context("the table is full")?;
        }
        let born = Instant::now();
        let there = Staging::new(there, Arc::new(|_| true));
        let vm = Offer {
            vm: name("vm")?,
            nics: List::default(),
            capacity: connections,
            entries: connections,
            when_late: WhenLate::FailOpen,
        };
        let identity = SourceIdentity { host: name("a")?, abilities: Abilities::default(), vm };
        // As fast as it goes: how fast round 0 is does not matter here.
        let limits = SourceLimits { bytes_per_ms: 10_000_000, ..SourceLimits::default() };
        Ok(Self {
            source: Source::new(limits, identity, Arc::clone(&here)),
            destination: Destination::new(DestinationLimits::default(), name("b")?, Abilities::default(), false),
            here,
            there,
            encoder: BatchEncoder::new(
                ID,
                Compressor::new(CompressMode::default(), None, move || born.elapsed().as_nanos() as u64),
            ),
            decoder: BatchDecoder::new(ID, timeouts),
            to_source: VecDeque::new(),
            to_destination: VecDeque::new(),
            now_ms: BEGIN_MS,
            wire_bytes: 0,
            records: 0,
            source_time: Duration::ZERO,
            released: None,
        })
    }

    /// Carries everything to and fro until nothing is under way and nobody wants to go on at once.
    fn settle(&mut self) -> Result<()> {
        loop {
            let mut wants = Vec::new();
            let begin = Instant::now();
            if let Some(event) = self.to_source.pop_front() {
                self.source.handle(event, self.now_ms, &mut wants);
            } else if self.to_destination.is_empty() {
                if self.source.next_tick_ms(self.now_ms).is_none_or(|at_ms| at_ms > self.now_ms) {
                    return Ok(());
                }
                self.source.handle(source::Event::Tick { room_bytes: usize::MAX }, self.now_ms, &mut wants);
            }
            self.source_time += begin.elapsed();
            for action in wants {
                self.carry_out_source(action)?;
            }
            let mut wants = Vec::new();
            if let Some(event) = self.to_destination.pop_front() {
                self.destination.handle(event, self.now_ms, &mut wants);
            }
            for action in wants {
                self.carry_out_destination(action)?;
            }
        }
    }

    fn carry_out_source(&mut self, action: source::Action) -> Result<()> {
        match action {
            source::Action::Track(on) => {
                self.here.map().set_tracking(on);
                if on {
                    self.to_source.push_back(source::Event::Tracking);
                }
            }
            source::Action::Connect => {
                self.to_source.push_back(source::Event::Connected);
                self.to_destination.push_back(destination::Event::Connected { peer: name("a")? });
            }
            source::Action::Send(message) => self.to_destination.push_back(destination::Event::Message(message)),
            source::Action::SendBatch(batch) => {
                let mut bytes = Vec::new();
                self.records += batch.items.len();
                let begin = Instant::now();
                self.encoder.encode(&batch, self.now_ms, &mut bytes);
                self.source_time += begin.elapsed();
                self.wire_bytes += bytes.len();
                let batch = self.decoder.decode(&bytes, self.now_ms)?;
                self.to_destination.push_back(destination::Event::Batch(batch));
            }
            source::Action::Release(why) => self.released = Some(why),
            source::Action::Disconnect => bail!("the source hung up"),
            _ => {}
        }
        Ok(())
    }

    fn carry_out_destination(&mut self, action: destination::Action<Staging>) -> Result<()> {
        match action {
            destination::Action::Send(message) => self.to_source.push_back(source::Event::Message(message)),
            destination::Action::Judge { .. } => self
                .to_destination
                .push_back(destination::Event::Admitted { table: self.there.clone(), when_late: WhenLate::FailOpen }),
            destination::Action::Disconnect => bail!("the destination hung up"),
            _ => {}
        }
        Ok(())
    }

    /// So many percent of the connections, evenly spread, change their state.
    fn change(&self, connections: u32, percent: u32) -> Result<u32> {
        let mut handle = self.here.map().handle(&(), 0);
        let mut changed = 0;
        for n in (0..connections).filter(|n| n % 100 < percent) {
            let key = portable(n).key.to_key().ok().context("key")?;
            let mut connection = handle.lookup(&key, self.now_ms).context("connection")?;
            connection.refresh(self.now_ms, 90_000_000);
            handle.update(&connection, Change::Semantic);
            changed += 1;
        }
        Ok(changed)
    }
}

/// One measurement.
#[derive(Clone, Debug)]
struct Sample {
    /// Records of the full walk per second of the source's processor: collecting and encoding.
    walk_per_s: f64,
    /// The same per second of both hosts' processors: decoding and importing as well.
    copy_per_s: f64,
    /// Bytes on the wire of a record of the full walk.
    bytes_per_record: f64,
    /// Bytes on the wire of a record of the final delta; `None`: it had no records.
    delta_bytes_per_record: Option<f64>,
    /// From the VM's stop to the release of QEMU, milliseconds.
    final_delta_ms: f64,
}

fn measure(connections: u32, percent: u32) -> Result<Sample> {
    let mut pair = Pair::new(connections)?;
    let begin = Instant::now();
    pair.to_source.push_back(source::Event::LogOn);
    while pair.source.history().is_empty() {
        pair.settle()?;
        pair.now_ms += 1;
    }
    let both = begin.elapsed();
    ensure!(pair.there.firewall().map().len() == connections as usize, "round 0 left connections behind");
    let records = pair.records as f64;
    let (walk_per_s, copy_per_s) = (records / pair.source_time.as_secs_f64(), records / both.as_secs_f64());
    let bytes_per_record = pair.wire_bytes as f64 / records;
    let changed = pair.change(connections, percent)?;
    (pair.records, pair.wire_bytes) = (0, 0);
    let begin = Instant::now();
    pair.to_source.extend([source::Event::Stopped, source::Event::ReplyHeld]);
    pair.settle()?;
    let final_delta_ms = begin.elapsed().as_secs_f64() * 1000.0;
    ensure!(pair.released == Some(source::Release::Committed), "released: {:?}", pair.released);
    ensure!(pair.records >= changed as usize, "{} records for {changed} changes", pair.records);
    let delta_bytes_per_record = (pair.records > 0).then(|| pair.wire_bytes as f64 / pair.records as f64);
    Ok(Sample { walk_per_s, copy_per_s, bytes_per_record, delta_bytes_per_record, final_delta_ms })
}

/// The full walk of tables of 10,000, 100,000 and 1 M connections, and the final delta when 0, 1 and 10 % of them have changed.
///
/// # Errors
/// When there is no memory, or connections are left behind.
pub fn final_delta(runs: usize) -> Result<Vec<Metric>> {
    let mut metrics = Vec::new();
    for connections in [10_000, 100_000, 1_000_000] {
        let n = short(connections);
        let mut walks = Vec::new();
        for percent in [0, 1, 10] {
            let samples = (0..runs.max(1)).map(|_| measure(connections, percent)).collect::<Result<Vec<_>>>()?;
            let deltas: Vec<f64> = samples.iter().map(|s| s.final_delta_ms).collect();
            metrics.extend(gauge(format!("final-delta {n} {percent}%"), "ms", false, &deltas));
            let bytes: Vec<f64> = samples.iter().filter_map(|s| s.delta_bytes_per_record).collect();
            metrics.extend(gauge(format!("final-delta {n} {percent}% record"), "B", false, &bytes));
            walks.extend(samples);
        }
        let of = |field: fn(&Sample) -> f64| walks.iter().map(field).collect::<Vec<_>>();
        metrics.extend(gauge(format!("full-walk {n}"), "records/s", true, &of(|s| s.walk_per_s)));
        metrics.extend(gauge(format!("full-copy {n}"), "records/s", true, &of(|s| s.copy_per_s)));
        metrics.extend(gauge(format!("full-walk {n} record"), "B", false, &of(|s| s.bytes_per_record)));
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is left behind, and the change is what the delta carries: checked by `measure` itself.
    #[test]
    fn a_small_table_is_copied() {
        for percent in [0, 10] {
            let sample = measure(1000, percent).unwrap();
            assert_eq!(sample.delta_bytes_per_record.is_some(), percent > 0);
            assert!(sample.bytes_per_record > 8.0 && sample.bytes_per_record < 200.0, "{sample:?}");
        }
    }
}
