//! Virtqueues, polled from the device's side: split rings (virtio 1.3, 2.7) and packed rings (2.8).
//!
//! Everything in a ring is written by the guest, at any moment. So each field is read once into a private value and
//! then judged; what was judged is what is used. Two kinds of failure follow:
//!
//! - a *frame* is at fault (unmapped buffer, wrong direction, header cut short ...): its chain goes back to the guest,
//!   used, with length 0, the frame is counted under its reason, the ring goes on;
//! - the *ring* is at fault (index jump, loop, nested indirect table ...): nothing in it can be believed any more. It
//!   is stopped with a [`RingFault`] and not touched again until the session starts it anew.
//!
//! Chains are used in the order in which they were made available, whatever the guest negotiated. That is what
//! VIRTIO_F_IN_ORDER asks for (2.7.9, 2.8.17), and it makes the position of the used ring the resume point at any
//! moment: what was received but not yet released is simply found again.
//!
//! | module | job |
//! |---|---|
//! | `split`, `packed` | one ring format each: finding chains, returning them, suppression of notifications |
//! | `log_batch` | a burst's writes into the dirty log |
//! | `chain` | descriptors into mapped pieces, with the checks common to both formats |
//! | `stage` | chains of one buffer, made ready ahead of their use |
//! | `receive` | chains of the guest's transmit queue into frames |
//! | `transmit` | frames into chains of the guest's receive queue |
#![allow(unsafe_code)] // Its job here: vouching for the ring areas that the formats are built on.
mod chain;
mod log_batch;
mod packed;
mod receive;
mod split;
mod stage;
mod transmit;

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ferry_dataplane::counters::{Counter, DropReason};
use ferry_dataplane::frame::{RxBurst, TxFrame};
use ferry_dataplane::port::TxReport;

use crate::base_mirror::BaseMirror;
use crate::dirty_log::DirtyLog;
use crate::memory::{Cursor, MemoryMap};
use crate::net_header::{feature, header_len};
use log_batch::LogBatch;
use packed::Packed;
use split::Split;
use stage::One;
use transmit::Scratch;

/// Largest ring (virtio 1.3, 2.7 and 2.8.10.1: "maximum queue size is 32768").
pub const MAX_RING_SIZE: u16 = 32768;
/// Longest chain taken, descriptors, indirect ones included: as long as QEMU's largest ring (VIRTQUEUE_MAX_SIZE). Bounds
/// the work that one chain can cost.
pub const MAX_CHAIN_DESCRIPTORS: u16 = 1024;
/// Descriptors of multi-descriptor chains followed in one burst before the rest has to wait: a guest's contrived chains
/// may not hold up the other ports. (64 frames of 64 KiB in pages, the worst sane case, have about 1200.)
pub const MAX_BURST_DESCRIPTORS: u32 = 8192;
/// Most separate pieces of one received frame. Linux sends at most 19, of DPDK applications up to about 60 are known.
pub const MAX_FRAME_SEGMENTS: usize = 256;

/// Everything a ring is made from: what vhost-user messages said about it.
#[derive(Debug)]
pub struct RingConfig {
    /// The vring's number, for messages.
    pub index: u16,
    /// Descriptors (SET_VRING_NUM).
    pub size: u16,
    /// Descriptor table (split) or descriptor ring (packed), frontend address.
    pub desc_user_addr: u64,
    /// Available ring or driver event suppression area, frontend address.
    pub driver_user_addr: u64,
    /// Used ring or device event suppression area, frontend address.
    pub device_user_addr: u64,
    /// Guest physical address under which writes to the device area are logged (SET_VRING_ADDR with VHOST_VRING_F_LOG).
    /// Without it, the address is found from the memory map.
    pub log_guest_addr: Option<u64>,
    /// Where to go on, exactly as in SET_VRING_BASE and GET_VRING_BASE. Split: the 16-bit available index; a ring starts
    /// where its used index in guest memory stands, which is the same unless a device crashed with chains in hand (they are
    /// then found again instead of being lost). Packed: bits 0-14 available index, 15 its wrap counter, 16-30 used index, 31
    /// its wrap counter; the used half is only written, not read, because no descriptor is ever in flight while a ring is
    /// stopped and some frontends leave it zero.
    pub base: u32,
    /// Negotiated virtio feature bits (see [`feature`]).
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<MemoryMap>,
    /// Log of written pages; used when `features` has VHOST_F_LOG_ALL.
    pub log: Option<Arc<DirtyLog>>,
    /// Eventfd written to notify the guest. `None`: the guest polls.
    pub call: Option<OwnedFd>,
    /// Eventfd that the guest writes. `None`: it must be polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// Eventfd for errors (SET_VRING_ERR); written when the ring faults.
    pub err: Option<OwnedFd>,
    /// Where the positions of a packed ring are stored before each burst becomes visible.
    pub base_mirror: Option<Arc<BaseMirror>>,
}

/// Why a ring cannot be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// Zero, too large, or (split) not a power of two.
    #[error("vring {vring}: {size} is not a possible ring size")]
    Size {
        /// Which ring.
        vring: u16,
        /// What was asked for.
        size: u16,
    },
    /// A ring area is not aligned as virtio 1.3, 2.7 and 2.8 demand.
    #[error("vring {vring}: {area} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which ring.
        vring: u16,
        /// Which area.
        area: &'static str,
        /// Its frontend address.
        addr: u64,
        /// Bytes.
        align: u64,
    },
    /// A ring area lies outside guest memory.
    #[error("vring {vring}: {area} at {addr:#x} ({len} bytes) is not in guest memory")]
    Unmapped {
        /// Which ring.
        vring: u16,
        /// Which area.
        area: &'static str,
        /// Its frontend address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The position given to start from lies outside the ring (packed).
    #[error("vring {vring}: base {base:#x} is outside the ring of {size}")]
    Base {
        /// Which ring.
        vring: u16,
        /// What was asked for.
        base: u32,
        /// Ring size.
        size: u16,
    },
    /// A notification descriptor is not an eventfd.
    #[error("vring {vring}: the {which} descriptor is not an eventfd")]
    NotEventFd {
        /// Which ring.
        vring: u16,
        /// "call", "kick" or "err".
        which: &'static str,
    },
    /// The port has no such ring.
    #[error("vring {vring} does not exist: the port has {vrings}")]
    NoSuchRing {
        /// Which ring.
        vring: usize,
        /// Rings of the port.
        vrings: usize,
    },
    /// The ring runs already; stop it first.
    #[error("vring {vring} is running already")]
    AlreadyRunning {
        /// Which ring.
        vring: usize,
    },
}

macro_rules! fault_kinds {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $text:literal;)*) => {
        /// What stopped a ring.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum FaultKind { $($(#[$doc])* $variant,)* }
        impl FaultKind {
            /// All kinds, in the order of their numbers.
            pub const ALL: &'static [FaultKind] = &[$(FaultKind::$variant,)*];
            /// How many kinds there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in stats.
            pub const fn name(self) -> &'static str {
                match self { $(FaultKind::$variant => $name,)* }
            }
            const fn text(self) -> &'static str {
                match self { $(FaultKind::$variant => $text,)* }
            }
        }
    };
}

fault_kinds! {
    /// The available index moved by more than the ring holds.
    AvailJump = "avail_jump", "the available index jumped ahead by more than the ring holds; distance";
    /// The available ring names a descriptor that the table does not have.
    HeadOutOfRange = "head_out_of_range", "the available ring names a descriptor outside the table; number";
    /// A descriptor's `next` points outside its table.
    NextOutOfRange = "next_out_of_range", "a descriptor chain continues outside its table; number";
    /// A chain does not end: a loop, or longer than the ring or than [`MAX_CHAIN_DESCRIPTORS`].
    ChainTooLong = "chain_too_long", "a descriptor chain loops or is longer than the ring; descriptors followed";
    /// An indirect table holds a descriptor that is indirect itself.
    NestedIndirect = "nested_indirect", "an indirect table contains an indirect descriptor; entry";
    /// The file behind guest memory or the dirty log was truncated.
    MemoryLost = "memory_lost", "the file behind guest memory was truncated; detail";
}

/// A ring was stopped because what it holds cannot be believed, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFault {
    /// Which ring.
    pub vring: u16,
    /// What happened.
    pub kind: FaultKind,
    /// The number that was out of order, as `kind` says.
    pub detail: u32,
}

impl fmt::Display for RingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vring {} stopped: {} {}", self.vring, self.kind.text(), self.detail)
    }
}

impl std::error::Error for RingFault {}

/// What a ring did; lives as long as the port, across restarts of the ring. Written by the PMD thread that polls the
/// ring (or holds its claim).
#[derive(Debug)]
#[repr(align(64))]
pub struct VringCounters {
    /// Chains returned to the guest, bad ones included.
    pub chains: Counter,
    /// Chains returned unused because they were malformed.
    pub bad_chains: Counter,
    /// Notifications (calls) sent to the guest.
    pub calls_sent: Counter,
    /// Notifications the guest did not want, or that were merged into one already due.
    pub calls_suppressed: Counter,
    /// Times the guest was asked to kick.
    pub kicks_armed: Counter,
    /// Faults, by [`FaultKind`].
    pub faults: [Counter; FaultKind::COUNT],
}

impl Default for VringCounters {
    fn default() -> Self {
        Self {
            chains: Counter::default(),
            bad_chains: Counter::default(),
            calls_sent: Counter::default(),
            calls_suppressed: Counter::default(),
            kicks_armed: Counter::default(),
            faults: core::array::from_fn(|_| Counter::default()),
        }
    }
}

/// A fault without the ring's number.
pub(crate) type Fault = (FaultKind, u32);

/// One chain of descriptors, named as its ring format names it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chain {
    /// Split: number of the head descriptor. Packed: buffer id.
    id: u16,
    /// Packed: ring slots that the chain occupies. Split: 1.
    slots: u16,
}

/// A chain that was found: `Ok` when all its pieces went to the sink, or why it has to go back unused.
pub(crate) type Found = (Chain, Result<(), DropReason>);

/// Where the pieces of a chain go.
pub(crate) trait Sink {
    /// Whether descriptors must be device-writable (the guest's receive queue) or device-readable.
    const WRITABLE: bool;
    /// Reason for a descriptor that is invalid.
    const BAD: DropReason;
    /// Takes the next mapped piece, `len` > 0 bytes at guest address `gpa`.
    fn piece(&mut self, addr: *mut u8, gpa: u64, len: u32) -> Result<(), DropReason>;
}

/// What both ring formats do.
pub(crate) trait Format {
    /// A place among the available chains.
    type Position: Copy;
    /// Where the next chain is taken.
    fn position(&self) -> Self::Position;
    /// Moves on: the chains before `to` are taken.
    fn advance(&mut self, to: Self::Position);
    /// Looks at the chain at `at`, gives its pieces to `sink` and moves `at` behind it. `None`: nothing available.
    fn peek<S: Sink>(&mut self, core: &mut Core, at: &mut Self::Position, sink: &mut S)
    -> Result<Option<Found>, Fault>;
    /// Makes the next `count` chains ready, as far as each has but one buffer in one piece of memory, and fetches into the cache what they
    /// need first; with `beyond` also what those need that are not so simple. Takes nothing, and reports nothing: what is wrong is found by
    /// [`Self::peek`]. True: it has looked, and there are no others than those that are ready.
    fn stage<S: Sink>(&mut self, core: &mut Core, count: u16, beyond: bool) -> bool;
    /// Fetches into the cache, to be written, where the next `count` chains will be returned.
    fn prefetch_used(&self, count: u16);
    /// The next chains that were staged.
    fn staged(&mut self) -> &mut [One];
    /// Takes the first `chains` of them and enters them into the used ring; [`One::len`] says how many bytes, at least one, were written into
    /// each. They are logged with the rest.
    fn use_staged(&mut self, core: &mut Core, chains: u16);
    /// Enters a chain into the used ring, not yet visible. `len`: bytes written into it.
    fn put_used(&mut self, core: &mut Core, chain: Chain, len: u32);
    /// Makes the entries visible to the guest and logs all writes of the burst. True when the guest wants to be notified.
    fn publish(&mut self, core: &mut Core) -> bool;
    /// How many more chains can be held.
    fn room_to_hold(&self) -> usize;
    /// Holds a chain that was taken until [`Self::release`].
    fn hold(&mut self, core: &mut Core, chain: Chain);
    /// Takes the first `chains` staged ones and holds them.
    fn hold_staged(&mut self, chains: u16);
    /// Chains held.
    fn held(&self) -> usize;
    /// Returns the chains held, and makes it visible. True when the guest wants to be notified.
    fn release(&mut self, core: &mut Core) -> bool;
    /// Asks the guest to kick when it makes the next chain available. True when there is one already.
    fn arm(&mut self, core: &mut Core) -> bool;
    /// Tells the guest not to kick.
    fn disarm(&mut self, core: &mut Core);
    /// Resume point, as in GET_VRING_BASE.
    fn base(&self) -> u32;
}

/// What both ring formats need besides their own indexes.
pub(crate) struct Core {
    cursor: Cursor,
    log: Option<LogBatch>,
    features: u64,
    /// Bytes of the virtio-net header.
    header_len: u32,
    /// Longest chain, descriptors.
    chain_limit: u16,
    /// Descriptors followed in this burst, single ones not counted (see [`MAX_BURST_DESCRIPTORS`]).
    followed: u32,
    indirect: bool,
    event_idx: bool,
    base_mirror: Option<Arc<BaseMirror>>,
}

impl Core {
    /// Remembers a write into a guest buffer.
    #[inline]
    fn log_data(&mut self, gpa: u64, len: u32) {
        if let Some(log) = &mut self.log {
            log.add(gpa, len);
        }
    }
    /// Remembers what was written into chains, mostly none: [`One::len`] bytes each.
    #[inline(always)]
    fn log_chains(&mut self, chains: &[One]) {
        if !chains.is_empty() {
            self.log_some_chains(chains);
        }
    }
    #[cold]
    #[inline(never)]
    fn log_some_chains(&mut self, chains: &[One]) {
        if let Some(log) = &mut self.log {
            chains.iter().for_each(|one| log.add(one.gpa, one.len));
        }
    }
    /// Marks what was written into chains, and what was remembered, after a sequentially consistent fence. Directly: to write down first what
    /// is to be marked would take as long as to mark it.
    #[inline(never)]
    fn log_commit_with(&mut self, chains: &[One]) {
        if let Some(log) = &mut self.log {
            log.mark_chains(chains);
            log.mark();
        }
    }
    /// Marks writes into the device area, of so many bytes at these offsets, after a sequentially consistent fence.
    #[inline(always)]
    fn log_device_fenced(&self, writes: [(u64, u32); 3]) {
        if let Some(log) = &self.log {
            log.mark_device(writes);
        }
    }
    /// Remembers a write into the device area at `offset`.
    #[inline]
    fn log_device(&mut self, offset: u64, len: u32) {
        if let Some(log) = &mut self.log {
            log.add_device(offset, len);
        }
    }
    /// Remembers a write into the descriptor area at `offset`.
    #[inline]
    fn log_desc(&mut self, offset: u64, len: u32) {
        if let Some(log) = &mut self.log {
            log.add_desc(offset, len);
        }
    }
    /// Marks what was remembered, after a sequentially consistent fence.
    #[inline]
    fn log_commit(&mut self) {
        if let Some(log) = &mut self.log {
            log.mark();
        }
    }

    #[inline]
    fn check_memory(&self) -> Result<(), Fault> {
        if self.cursor.map().is_poisoned() || self.log.as_ref().is_some_and(|log| log.is_poisoned()) {
            return Err((FaultKind::MemoryLost, 0));
        }
        Ok(())
    }
}

enum Kind {
    Split(Split),
    Packed(Packed),
}

macro_rules! with_format {
    ($ring:expr, $format:ident => $body:expr) => {
        match &mut $ring.kind {
            Kind::Split($format) => $body,
            Kind::Packed($format) => $body,
        }
    };
}

/// A ring that is checked and ready to be polled. Give it to [`crate::queue::PortQueues::start`].
pub struct Ring {
    config: RingConfig,
    core: Core,
    kind: Kind,
    scratch: Scratch,
    faulted: bool,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("index", &self.config.index)
            .field("size", &self.config.size)
            .field("base", &self.base())
            .field("faulted", &self.faulted)
            .finish_non_exhaustive()
    }
}

/// A ring area: where its frontend address must lie and how it is aligned.
struct Area {
    name: &'static str,
    addr: u64,
    len: u64,
    align: u64,
}

impl Area {
    fn locate(&self, vring: u16, memory: &MemoryMap) -> Result<*mut u8, RingError> {
        let misaligned = RingError::Alignment { vring, area: self.name, addr: self.addr, align: self.align };
        if !self.addr.is_multiple_of(self.align) {
            return Err(misaligned);
        }
        let p = memory.translate_user(self.addr, self.len).ok_or(RingError::Unmapped {
            vring,
            area: self.name,
            addr: self.addr,
            len: self.len,
        })?;
        // A region at an odd offset of its file could shift an aligned frontend address.
        if !(p.as_ptr() as u64).is_multiple_of(self.align) {
            return Err(misaligned);
        }
        Ok(p.as_ptr())
    }
}

impl Ring {
    /// Checks everything about the ring that can be checked before it runs. Guest memory is read (the used index of a
    /// split ring), not written.
    pub fn new(config: RingConfig) -> Result<Self, RingError> {
        let RingConfig { index: vring, size, features, ref memory, .. } = config;
        let is_packed = features & feature::RING_PACKED != 0;
        let event_idx = features & feature::EVENT_IDX != 0;
        // 2.7: "Queue Size value is always a power of 2"; 2.8.10.1: packed rings need not be.
        if size == 0 || size > MAX_RING_SIZE || (!is_packed && !size.is_power_of_two()) {
            return Err(RingError::Size { vring, size });
        }
        check_eventfd(vring, "call", config.call.as_ref())?;
        check_eventfd(vring, "kick", config.kick.as_deref())?;
        check_eventfd(vring, "err", config.err.as_ref())?;

        let n = u64::from(size);
        let event = if event_idx { 2 } else { 0 };
        // 2.7 and 2.8.10.1: alignment and size of the parts.
        let (driver_len, device_len, driver_align) =
            if is_packed { (4, 4, 4) } else { (4 + 2 * n + event, 4 + 8 * n + event, 2) };
        let desc = Area { name: "descriptor area", addr: config.desc_user_addr, len: 16 * n, align: 16 };
        let driver = Area { name: "driver area", addr: config.driver_user_addr, len: driver_len, align: driver_align };
        let device = Area { name: "device area", addr: config.device_user_addr, len: device_len, align: 4 };
        let desc_ptr = desc.locate(vring, memory)?;
        let driver_ptr = driver.locate(vring, memory)?;
        let device_ptr = device.locate(vring, memory)?;

        let device_gpa =
            config.log_guest_addr.or_else(|| memory.user_to_guest(device.addr, device.len)).unwrap_or(u64::MAX);
        let log = match &config.log {
            Some(log) if features & feature::LOG_ALL != 0 => Some(LogBatch::new(
                Arc::clone(log),
                (device_gpa, device.len),
                memory.user_to_guest(desc.addr, desc.len).unwrap_or(u64::MAX),
            )),
            _ => None,
        };
        let core = Core {
            cursor: Cursor::new(Arc::clone(memory)),
            log,
            features,
            header_len: header_len(features),
            chain_limit: size.min(MAX_CHAIN_DESCRIPTORS),
            followed: 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx,
            base_mirror: config.base_mirror.clone(),
        };
        let kind = if is_packed {
            let position = packed::Position::from_base(config.base);
            if !position.is_inside(size) {
                return Err(RingError::Base { vring, base: config.base, size });
            }
            // SAFETY: the three areas were located in guest memory with the sizes and alignments of a packed ring of
            // `size`; `config.memory` keeps the mapping alive as long as the ring.
            Kind::Packed(unsafe { Packed::new(desc_ptr, driver_ptr, device_ptr, size, position) })
        } else {
            // SAFETY: as above, for a split ring with the event fields that `event_idx` says.
            Kind::Split(unsafe { Split::new(desc_ptr, driver_ptr, device_ptr, size) })
        };
        Ok(Self { config, core, kind, scratch: Scratch::new(), faulted: false })
    }

    /// The vring's number.
    pub fn index(&self) -> u16 {
        self.config.index
    }

    /// Where another device would have to go on, as in the reply to GET_VRING_BASE (see [`RingConfig::base`]).
    /// Received chains that were not released are found again.
    pub fn base(&self) -> u32 {
        match &self.kind {
            Kind::Split(q) => q.base(),
            Kind::Packed(q) => q.base(),
        }
    }

    /// Takes the ring apart, with [`RingConfig::base`] where it stands now: change what has to change (memory, features,
    /// log, notification descriptors) and make a new one.
    pub fn into_config(mut self) -> RingConfig {
        self.config.base = self.base();
        self.config
    }

    /// What the ring was made from.
    pub fn config(&self) -> &RingConfig {
        &self.config
    }

    /// The call eventfd's number.
    pub(crate) fn call_fd(&self) -> Option<RawFd> {
        self.config.call.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// True after a [`RingFault`]: the ring does nothing any more.
    pub fn is_faulted(&self) -> bool {
        self.faulted
    }

    #[cold]
    fn fault(&mut self, (kind, detail): Fault, counters: &VringCounters) -> RingFault {
        self.faulted = true;
        if let Some(c) = counters.faults.get(kind as usize) {
            c.add(1);
        }
        if let Some(err) = &self.config.err {
            crate::eventfd::signal(err.as_raw_fd());
        }
        RingFault { vring: self.config.index, kind, detail }
    }

    /// Takes available chains as frames (the guest's transmit queue).
    pub(crate) fn receive(&mut self, burst: &mut RxBurst, counters: &VringCounters) -> Result<(), RingFault> {
        if self.faulted {
            return Ok(());
        }
        let result = match self.core.check_memory() {
            Ok(()) => {
                with_format!(self, q => receive::receive(q, &mut self.core, burst, counters))
            }
            Err(fault) => Err(fault),
        };
        result.map_err(|f| self.fault(f, counters))
    }

    /// True while received chains wait for [`Self::release`].
    pub(crate) fn has_pending(&self) -> bool {
        match &self.kind {
            Kind::Split(q) => q.held() > 0,
            Kind::Packed(q) => q.held() > 0,
        }
    }

    /// Returns what was received. True when the guest wants to be notified.
    pub(crate) fn release(&mut self, counters: &VringCounters) -> bool {
        with_format!(self, q => receive::release(q, &mut self.core, counters))
    }

    /// Writes the frames whose bit in `chosen` is set into available chains (the guest's receive queue) and makes them
    /// visible. Returns whether the guest wants to be notified, and the fault that ended the burst.
    pub(crate) fn send<'f>(
        &mut self,
        frames: impl Fn(usize) -> Option<TxFrame<'f>> + Copy,
        chosen: u64,
        report: &mut TxReport,
        counters: &VringCounters,
    ) -> (bool, Option<RingFault>) {
        let result = match self.core.check_memory() {
            Ok(()) => {
                with_format!(self, q => Ok(transmit::send(q, &mut self.core, &mut self.scratch, frames, chosen, report, counters)))
            }
            Err(fault) => {
                report.refuse_all(chosen, DropReason::MemoryFault);
                Err(fault)
            }
        };
        match result {
            Ok((notify, fault)) => (notify, fault.map(|f| self.fault(f, counters))),
            Err(fault) => (false, Some(self.fault(fault, counters))),
        }
    }

    /// Asks for kicks. True when work is there already.
    pub(crate) fn arm(&mut self, counters: &VringCounters) -> bool {
        counters.kicks_armed.add(1);
        with_format!(self, q => q.arm(&mut self.core))
    }

    /// Asks the guest not to kick: also the first thing done to a ring that starts.
    pub(crate) fn disarm(&mut self) {
        with_format!(self, q => q.disarm(&mut self.core));
    }
}

/// A descriptor from the frontend that is no eventfd could block the PMD thread that writes it, or be something that
/// should not be written to. Eventfds are made non-blocking: only a full counter can block, and then the guest has not
/// yet noticed the last 2^64-2 notifications.
fn check_eventfd(vring: u16, which: &'static str, fd: Option<&OwnedFd>) -> Result<(), RingError> {
    let Some(fd) = fd else { return Ok(()) };
    // Where /proc is missing there is nothing to check against.
    if let Ok(target) = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        && !target.as_os_str().as_encoded_bytes().starts_with(b"anon_inode:[eventfd")
    {
        return Err(RingError::NotEventFd { vring, which });
    }
    crate::eventfd::set_nonblocking(fd.as_raw_fd());
    Ok(())
}
