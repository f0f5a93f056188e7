//! How long the final delta takes: a table of 1 M connections of which 1 % have changed since the last round; one thread does everything
//! that both hosts' processors have to do, one after the other: collecting, encoding, decoding, checking, importing, acknowledging. Real
//! tables, codec and state machines; no network. Run it in the release profile.
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
use serde::Serialize;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

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
            released: None,
        })
    }

    /// Carries everything to and fro until nothing is under way and nobody wants to go on at once.
    fn settle(&mut self) -> Result<()> {
        loop {
            let mut wants = Vec::new();
            if let Some(event) = self.to_source.pop_front() {
                self.source.handle(event, self.now_ms, &mut wants);
            } else if self.to_destination.is_empty() {
                if self.source.next_tick_ms(self.now_ms).is_none_or(|at_ms| at_ms > self.now_ms) {
                    return Ok(());
                }
                self.source.handle(source::Event::Tick { room_bytes: usize::MAX }, self.now_ms, &mut wants);
            }
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
                self.encoder.encode(&batch, self.now_ms, &mut bytes);
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

    /// One connection in `every` changes its state.
    fn change(&self, connections: u32, every: u32) -> Result<u32> {
        let mut handle = self.here.map().handle(&(), 0);
        let mut changed = 0;
        for n in (0..connections).step_by(every as usize) {
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
#[derive(Clone, Debug, Serialize)]
struct Sample {
    /// From the VM's stop to the release of QEMU, milliseconds.
    final_delta_ms: f64,
    /// Records in it.
    records: usize,
    /// Their bytes on the wire.
    wire_bytes: usize,
}

#[derive(Debug, Serialize)]
struct Results {
    connections: u32,
    changed: u32,
    samples: Vec<Sample>,
    median_ms: f64,
    least_ms: f64,
}

fn measure(connections: u32) -> Result<(u32, Sample)> {
    let mut pair = Pair::new(connections)?;
    pair.to_source.push_back(source::Event::LogOn);
    while pair.source.history().is_empty() {
        pair.settle()?;
        pair.now_ms += 1;
    }
    ensure!(pair.there.firewall().map().len() == connections as usize, "round 0 left connections behind");
    let changed = pair.change(connections, 100)?;
    (pair.records, pair.wire_bytes) = (0, 0);
    let begin = Instant::now();
    pair.to_source.extend([source::Event::Stopped, source::Event::ReplyHeld]);
    pair.settle()?;
    let final_delta_ms = begin.elapsed().as_secs_f64() * 1000.0;
    ensure!(pair.released == Some(source::Release::Committed), "released: {:?}", pair.released);
    ensure!(pair.records >= changed as usize, "{} records for {changed} changes", pair.records);
    Ok((changed, Sample { final_delta_ms, records: pair.records, wire_bytes: pair.wire_bytes }))
}

fn main() -> Result<()> {
    let (mut connections, mut runs, mut json) = (1_000_000, 5, None::<PathBuf>);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word}: a value is missing"));
        match word.as_str() {
            "--connections" => connections = value()?.parse()?,
            "--runs" => runs = value()?.parse()?,
            "--json" => json = Some(value()?.into()),
            _ => bail!("usage: final-delta [--connections N] [--runs N] [--json FILE]"),
        }
    }
    ensure!((1000..=8_000_000).contains(&connections) && runs > 0, "1000 to 8,000,000 connections, 1 run or more");
    if cfg!(debug_assertions) {
        println!("not the release profile: figures are too high");
    }
    let (mut samples, mut changed) = (Vec::new(), 0);
    for _ in 0..runs {
        let (count, sample) = measure(connections)?;
        println!("{:>8.2} ms   {} records, {} bytes", sample.final_delta_ms, sample.records, sample.wire_bytes);
        changed = count;
        samples.push(sample);
    }
    let mut all: Vec<f64> = samples.iter().map(|s| s.final_delta_ms).collect();
    all.sort_by(f64::total_cmp);
    let (median_ms, least_ms) = (all[all.len() / 2], all[0]);
    println!(
        "final delta, {connections} connections, {changed} changed: median {median_ms:.2} ms, least {least_ms:.2} ms"
    );
    if let Some(path) = json {
        let results = Results { connections, changed, samples, median_ms, least_ms };
        std::fs::write(&path, serde_json::to_string_pretty(&results)? + "\n")
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}
