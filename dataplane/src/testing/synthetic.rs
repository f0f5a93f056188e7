//! Ports without a far end, for measuring the packet path itself: the receive side lends the same frames again and
//! again, the transmit side copies them into a private buffer, as a real port would, and forgets them.
#![allow(unsafe_code)] // Its job: lending private buffers to a burst and copying from them.
use std::cell::UnsafeCell;
use std::sync::Arc;

use crate::bridge::fdb::Fdb;
use crate::bridge::vlan::{VlanMode, VlanPolicy};
use crate::bridge::{BridgeEntry, Forwarding, PortEntry};
use crate::clock::Clock;
use crate::counters::{RxLedger, TxLedger};
use crate::frame::{BURST, Offload, RxBurst, TxFrame};
use crate::packet::ethernet::MacAddr;
use crate::pmd::{Command, IdleTuning, Kinds, PmdCounters, PolledQueue, Sleeper, mailbox};
use crate::port::{Armed, RxQueue, TxCapabilities, TxPort, TxReport, Wake};
use crate::qsbr::{Domain, Guard, Published};
use crate::testing::NapSleeper;
use crate::worker::{Parts, Worker};

/// Kinds of a synthetic switch.
pub struct SyntheticKinds;

impl Kinds for SyntheticKinds {
    type Rx = SyntheticRx;
    type Tx = SyntheticTx;
}

/// Lends `BURST` frames per poll, going round.
pub struct SyntheticRx {
    frames: Vec<Vec<u8>>,
    next: usize,
}

impl RxQueue for SyntheticRx {
    fn receive(&mut self, _guard: &Guard, burst: &mut RxBurst) {
        while !burst.is_full() {
            let Some(frame) = self.frames.get(self.next) else { return };
            self.next = if self.next + 1 == self.frames.len() { 0 } else { self.next + 1 };
            let mark = burst.segment_mark();
            // SAFETY: the frames are never changed or dropped while the queue lives, and bursts do not outlive the worker that owns it.
            unsafe { burst.push_segment(frame.as_ptr(), frame.len() as u32) };
            burst.finish_frame(mark, Offload::default());
        }
    }
    fn release(&mut self, _guard: &Guard) {}
    fn arm(&mut self, _guard: &Guard) -> Armed {
        Armed::Ready
    }
    fn disarm(&mut self, _guard: &Guard) {}
    fn set_waker(&mut self, _waker: Arc<dyn Wake>) {}
}

struct Sink(UnsafeCell<Vec<u8>>);
// SAFETY: a synthetic switch has one worker, so one thread at a time sends.
unsafe impl Sync for Sink {}
// SAFETY: it owns plain bytes.
unsafe impl Send for Sink {}

/// Copies what it is given and forgets it.
#[derive(Clone)]
pub struct SyntheticTx(Arc<Sink>);

/// Room for a jumbo frame; an odd number of cache lines, so that slots do not fall into the same cache sets.
const SLOT_BYTES: usize = 149 * 64;

impl TxPort for SyntheticTx {
    fn capabilities(&self, _guard: &Guard) -> TxCapabilities {
        TxCapabilities { csum: true, tso4: true, tso6: true, ecn: true, ..TxCapabilities::default() }
    }
    fn send(&self, _guard: &Guard, _lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        // SAFETY: see `Sink`.
        let sink = unsafe { &mut *self.0.0.get() };
        for (i, (frame, slot)) in frames.iter().zip(sink.chunks_exact_mut(SLOT_BYTES)).enumerate() {
            let Some((head, rest)) = slot.split_at_mut_checked(frame.head.len()) else { continue };
            head.copy_from_slice(frame.head);
            frame.body.read(rest);
            report.accept(i);
        }
    }
    fn flush(&self, _guard: &Guard, _lane: usize) {}
}

/// A worker that switches frames of `frame_bytes` between `stations` pairs of stations from one port to another.
/// Each `step` handles one burst of [`BURST`] frames.
pub fn l2_worker(frame_bytes: usize, stations: u64) -> Option<Worker<SyntheticKinds>> {
    let source = |n: u64| 0x0200_0000_0000 | n;
    let target = |n: u64| 0x0600_0000_0000 | n;
    let fdb = Arc::new(Fdb::new((stations * 4).try_into().ok()?, 300));
    for n in 0..stations {
        fdb.learn(0, MacAddr::from_u64(target(n)), 1, u32::MAX, 0);
        fdb.learn(0, MacAddr::from_u64(source(n)), 0, u32::MAX, 0);
    }
    let frames = (0..stations.max(BURST as u64)).map(|n| {
        let n = n % stations;
        let mut f = Vec::with_capacity(frame_bytes);
        f.extend(target(n).to_be_bytes().into_iter().skip(2));
        f.extend(source(n).to_be_bytes().into_iter().skip(2));
        f.extend([0x88, 0xb5]);
        f.resize(frame_bytes.max(14), 0x5a);
        f
    });
    let bridge = Arc::new(BridgeEntry { id: 0, fdb, members: vec![0, 1], guarded: false });
    let port = |id| {
        Some(Arc::new(PortEntry {
            id,
            bridge: Some(Arc::clone(&bridge)),
            vlan: Arc::new(VlanPolicy::new(&VlanMode::default()).ok()?),
            admin_up: true,
            fdb_limit: u32::MAX,
            max_frame_bytes: 0,
            firewall: None,
            tx: SyntheticTx(Arc::new(Sink(UnsafeCell::new(vec![0; BURST * SLOT_BYTES])))),
            tx_ledgers: Arc::new(core::array::from_fn(|_| TxLedger::default())),
        }))
    };
    let forwarding = Forwarding {
        ports: vec![Some(port(0)?), Some(port(1)?)],
        bridges: vec![Some(Arc::clone(&bridge))],
        vms: Vec::new(),
    };
    let (outbox, inbox) = mailbox(NapSleeper::default().waker());
    let rx = SyntheticRx { frames: frames.collect(), next: 0 };
    outbox.send(Command::Add(Box::new(PolledQueue { rx, port: 0, queue: 0, ledger: Arc::new(RxLedger::default()) })));
    let domain = Domain::new();
    Some(Worker::new(Parts {
        guard: domain.register()?,
        forwarding: Arc::new(Published::new(Box::new(forwarding))),
        inbox,
        injected: Arc::new(RxLedger::default()),
        clock: Clock::simulated().0,
        idle: Arc::new(IdleTuning::new(0, 0)),
        counters: Arc::new(PmdCounters::default()),
        events: Arc::default(),
    }))
}
