//! The switch's port on a DPDK device.
//!
//! Receive hands out the mbufs' own memory until the burst is released: no copy. Transmit copies a frame's header and
//! body once, into mbufs, and leaves to the device what it agreed to do (checksums, segmentation).
//!
//! Notes on drivers (DPDK 22.11, measured or read in the source):
//! * `net_tap`: signals work by its own descriptor, so an idle PMD thread sleeps; checksums are computed by the driver; its TSO is
//!   not used (see ethdev); MTU at most 1504. The driver also has the kernel send a real-time signal per packet; a
//!   thread of its own takes them.
//! * `net_af_packet`: no signal, so an idle PMD thread polls at its idle interval. The kernel hands over what the *sender's* stack made:
//!   on a veth, switch the peer's offloads off (`ethtool -K PEER tx off tso off gso off`), or frames arrive with
//!   unfinished checksums or longer than the MTU and are cut.
//! * `net_ring`, `net_null`, `net_pcap`, `net_memif`, `net_vhost`, `net_virtio_user`: polled.
//! * PCI NICs: signals by eventfd where the driver and vfio provide them.
#![allow(unsafe_code)] // Its job: handing mbuf memory to the switch, filling mbufs, sharing transmit queues.
use std::cell::UnsafeCell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::{BURST, Gso, MAX_FRAME_BYTES, RxBurst, SNAPSHOT_BYTES, TxFrame};
use ferry_dataplane::port::{Armed, RxQueue as PortRxQueue, TxCapabilities, TxPort, TxReport, Wake};
use ferry_dataplane::qsbr::Guard;
use ferry_dpdk_sys as sys;
use serde::Serialize;

use crate::eal::Eal;
use crate::ethdev::{DeviceConfig, DeviceError, DeviceStats, EthDevice, Link, OpenDevice};
use crate::mbuf::{Mbuf, MbufBurst};
use crate::mempool::Mempool;
use crate::offload::{self, DeviceOffloads, Plan, Sum};
use crate::queue::{RxQueue, RxSignal, TxQueue};
use crate::thread;

/// Shortest frame sent: an Ethernet header. Devices pad to the wire's minimum.
const MIN_FRAME_BYTES: u32 = 14;
/// Ethernet header and one tag, bytes.
const HEADER_BYTES: u32 = 18;
/// How often a lane looks at a transmit queue that another one holds before it gives up (about 50 us).
const CLAIM_SPINS: u32 = 2000;

/// How an uplink shall be.
#[derive(Clone, Debug)]
pub struct UplinkConfig {
    /// The port's name in the switch; for messages and status.
    pub name: String,
    /// Devargs (`net_af_packet0,iface=eth1`, `net_tap0,iface=up0`) or PCI address.
    pub device: String,
    /// Receive queues; 0: one. Several use RSS where the device has it.
    pub rx_queues: u16,
    /// Transmit queues; 0: as many as receive queues. PMD threads beyond share them.
    pub tx_queues: u16,
    /// Descriptors per receive queue; 0: 512.
    pub rx_descriptors: u16,
    /// Descriptors per transmit queue; 0: 512.
    pub tx_descriptors: u16,
    /// MTU, bytes, without Ethernet header and tags; 68 to 65000.
    pub mtu: u16,
    /// Packet buffers; 0: chosen by the queues.
    pub mbufs: u32,
    /// Receive frames for all addresses: a switch port needs that, unless all guests use the device's own.
    pub promiscuous: bool,
}

impl UplinkConfig {
    /// Defaults for `device`: one queue pair, MTU 1500, promiscuous.
    pub fn new(name: impl Into<String>, device: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            device: device.into(),
            rx_queues: 1,
            tx_queues: 0,
            rx_descriptors: 0,
            tx_descriptors: 0,
            mtu: 1500,
            mbufs: 0,
            promiscuous: true,
        }
    }
}

/// Why an uplink cannot be opened, changed or closed.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The device's side of it.
    #[error("uplink '{uplink}': {source}")]
    Device {
        /// The port's name.
        uplink: String,
        /// What happened.
        source: Box<DeviceError>,
    },
    /// Queues or transmit handles are still out; the device is closed when the last of them is dropped.
    #[error(
        "uplink '{uplink}' is still in use by {handles} queue(s) or transmit handle(s); its device is closed with the last of them"
    )]
    InUse {
        /// The port's name.
        uplink: String,
        /// How many.
        handles: usize,
    },
}

/// State of an uplink, for people and programs.
#[derive(Clone, Debug, Serialize)]
pub struct UplinkStatus {
    /// The port's name.
    pub name: String,
    /// Devargs as given to DPDK.
    pub device: String,
    /// Driver.
    pub driver: String,
    /// MAC address, colon-separated.
    pub mac: Option<String>,
    /// MTU, bytes.
    pub mtu: u16,
    /// Link; absent when the device cannot tell.
    pub link: Option<Link>,
    /// Receive queues.
    pub rx_queues: u16,
    /// Transmit queues.
    pub tx_queues: u16,
    /// Descriptors per receive queue.
    pub rx_descriptors: u16,
    /// Descriptors per transmit queue.
    pub tx_descriptors: u16,
    /// `interrupt` where an idle PMD thread can sleep on the device, else `poll`.
    pub rx_mode: &'static str,
    /// Frames for all addresses are received.
    pub promiscuous: Option<bool>,
    /// Offloads in use.
    pub offloads: OffloadStatus,
    /// Hash functions in use for RSS (RTE_ETH_RSS_* bits).
    pub rss_hash_functions: u64,
    /// Packet buffers.
    pub mbufs: MbufStatus,
    /// The device's counters; absent when it has none.
    pub stats: Option<DeviceStats>,
    /// What is less than asked for.
    pub warnings: Vec<String>,
}

/// Offloads that the device does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OffloadStatus {
    /// Verifies checksums of received frames.
    pub rx_checksum: bool,
    /// Finishes checksums of sent frames.
    pub tx_checksum: bool,
    /// Segments TCP over IPv4.
    pub tso4: bool,
    /// Segments TCP over IPv6.
    pub tso6: bool,
    /// Receives a frame into several buffers.
    pub rx_scatter: bool,
    /// Sends a frame from several buffers.
    pub tx_multi_segment: bool,
}

impl From<DeviceOffloads> for OffloadStatus {
    fn from(o: DeviceOffloads) -> Self {
        Self {
            rx_checksum: o.rx_csum,
            tx_checksum: o.tx_csum,
            tso4: o.tso4,
            tso6: o.tso6,
            rx_scatter: o.rx_scatter,
            tx_multi_segment: o.tx_multi_segment,
        }
    }
}

/// The packet buffer pool.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MbufStatus {
    /// Buffers in all.
    pub total: u32,
    /// With the device, its queues, or packets under way.
    pub in_use: u32,
    /// Room for data in one, bytes.
    pub data_bytes: u16,
}

/// An open uplink.
#[derive(Debug)]
pub struct Uplink {
    name: String,
    rx: Vec<EthRx>,
    rx_mode: &'static str,
    tx: EthTx,
    device: Arc<EthDevice>,
}

impl Uplink {
    /// Opens the device and starts it.
    ///
    /// # Errors
    /// With the step that failed, DPDK's reason and log, and what to do. Nothing is left behind.
    pub fn open(config: &UplinkConfig, eal: &Eal) -> Result<Self, UplinkError> {
        let device_config = DeviceConfig {
            device: config.device.clone(),
            rx_queues: config.rx_queues,
            tx_queues: config.tx_queues,
            rx_descriptors: config.rx_descriptors,
            tx_descriptors: config.tx_descriptors,
            mtu: config.mtu,
            mbufs: config.mbufs,
            promiscuous: config.promiscuous,
        };
        let OpenDevice { device, rx, tx } = EthDevice::open(eal, &device_config)
            .map_err(|e| UplinkError::Device { uplink: config.name.clone(), source: Box::new(e) })?;
        let signals = rx.iter().all(|q| q.signal() != RxSignal::None);
        Ok(Self {
            name: config.name.clone(),
            rx: rx.into_iter().map(EthRx::new).collect(),
            rx_mode: if signals { "interrupt" } else { "poll" },
            tx: EthTx(Arc::new(TxShared {
                offloads: device.facts().offloads,
                queues: tx.into_iter().map(TxSlot::new).collect(),
                device: Arc::clone(&device),
            })),
            device,
        })
    }

    /// The receive queues, to be given to PMD threads; empty the second time.
    pub fn take_rx_queues(&mut self) -> Vec<EthRx> {
        std::mem::take(&mut self.rx)
    }

    /// The transmit side.
    pub fn tx(&self) -> EthTx {
        self.tx.clone()
    }

    /// The port's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// MTU, bytes.
    pub fn mtu(&self) -> u16 {
        self.device.mtu()
    }

    /// Kernel network device behind it, for drivers that sit on one.
    pub fn if_index(&self) -> Option<u32> {
        Some(self.device.facts().if_index).filter(|&i| i != 0)
    }

    /// Changes the MTU while running.
    ///
    /// # Errors
    /// When the device or its buffers do not take it: the uplink must be closed and opened anew for that.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), UplinkError> {
        self.device.set_mtu(mtu).map_err(|e| self.error(e))
    }

    /// Switches promiscuous mode.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn set_promiscuous(&self, on: bool) -> Result<(), UplinkError> {
        self.device.set_promiscuous(on).map_err(|e| self.error(e))
    }

    /// All counters the driver has, by its own names.
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn extended_stats(&self) -> Result<Vec<(String, u64)>, UplinkError> {
        self.device.extended_stats().map_err(|e| self.error(e))
    }

    fn error(&self, source: DeviceError) -> UplinkError {
        UplinkError::Device { uplink: self.name.clone(), source: Box::new(source) }
    }

    /// State now. What the device cannot tell is absent. Waits for the control lane: not for PMD threads.
    pub fn status(&self) -> UplinkStatus {
        let facts = self.device.facts();
        let pool = self.device.pool();
        UplinkStatus {
            name: self.name.clone(),
            device: facts.devargs.clone(),
            driver: facts.driver.clone(),
            mac: self.device.mac().ok().map(|m| m.map(|b| format!("{b:02x}")).join(":")),
            mtu: self.device.mtu(),
            link: self.device.link().ok(),
            rx_queues: facts.rx_queues,
            tx_queues: facts.tx_queues,
            rx_descriptors: facts.rx_descriptors,
            tx_descriptors: facts.tx_descriptors,
            rx_mode: self.rx_mode,
            promiscuous: self.device.promiscuous().ok(),
            offloads: facts.offloads.into(),
            rss_hash_functions: facts.rss_hash_functions,
            mbufs: MbufStatus {
                total: pool.map_or(0, Mempool::mbufs),
                in_use: pool.map_or(0, Mempool::in_use),
                data_bytes: pool.map_or(0, Mempool::data_room_bytes),
            },
            stats: self.device.stats().ok(),
            warnings: facts.warnings.clone(),
        }
    }

    /// Closes the uplink: when this returns `Ok`, the device is gone.
    ///
    /// # Errors
    /// [`UplinkError::InUse`] while queues or transmit handles are out.
    pub fn close(self) -> Result<(), UplinkError> {
        let Self { name, rx, tx, device, .. } = self;
        drop(rx);
        // Clones of the transmit side share one reference to the device (and one per queue inside).
        let shared = Arc::try_unwrap(tx.0).map_err(|shared| Arc::strong_count(&shared) - 1);
        let tx_handles = match shared {
            Ok(shared) => {
                drop(shared);
                0
            }
            Err(n) => n.max(1),
        };
        let held_by_tx = if tx_handles > 0 { usize::from(device.facts().tx_queues) + 1 } else { 0 };
        let handles = tx_handles + (Arc::strong_count(&device) - 1).saturating_sub(held_by_tx);
        match Arc::try_unwrap(device) {
            Ok(device) => {
                drop(device);
                Ok(())
            }
            Err(_) => Err(UplinkError::InUse { uplink: name, handles: handles.max(1) }),
        }
    }
}

/// A receive queue of an uplink. Returned to whoever took it from the [`Uplink`] by dropping it: packets it still holds
/// are freed, and the device is closed if this was its last handle (which waits some milliseconds: drop queues on a control thread).
pub struct EthRx {
    // Before `queue`, whose drop may free the pool.
    held: MbufBurst,
    views: Views,
    queue: RxQueue,
}

/// Where the driver's answer is written; kept to save clearing it per burst.
struct Views(Box<[sys::ferry_segment; BURST]>);

// SAFETY: plain addresses, only followed right after `receive` filled them, while the packets are in `held`.
unsafe impl Send for Views {}

impl fmt::Debug for EthRx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EthRx").field("queue", &self.queue).field("held", &self.held.len()).finish_non_exhaustive()
    }
}

impl EthRx {
    fn new(queue: RxQueue) -> Self {
        Self { held: MbufBurst::new(), views: Views(Box::new([sys::ferry_segment::default(); BURST])), queue }
    }

    /// Queue number on its device.
    pub fn index(&self) -> u16 {
        self.queue.index()
    }
}

/// Puts one received packet into the burst.
///
/// # Safety
/// `view` must describe the first segment of a packet that stays alive and unchanged until the burst is cleared.
#[inline]
unsafe fn hand_over(view: &sys::ferry_segment, burst: &mut RxBurst) {
    // Stripping is off. A tag that was stripped all the same (af_packet without an mbuf headroom to put it back) must
    // not make a frame of one VLAN appear in another.
    if view.ol_flags & sys::FERRY_RX_VLAN_STRIPPED != 0 {
        return burst.reject(DropReason::RxBadHeader);
    }
    if view.pkt_len > MAX_FRAME_BYTES {
        return burst.reject(DropReason::RxTooLong);
    }
    if view.pkt_len < MIN_FRAME_BYTES {
        return burst.reject(DropReason::RxTooShort);
    }
    if usize::from(view.nb_segs) > burst.segment_room() {
        return burst.reject(DropReason::RxTooManySegments);
    }
    let mark = burst.segment_mark();
    let mut segment = *view;
    for _ in 0..view.nb_segs {
        // SAFETY: data_len bytes of a live mbuf.
        unsafe { burst.push_segment(segment.data, u32::from(segment.data_len)) };
        if segment.next.is_null() {
            break;
        }
        // SAFETY: the next segment of the same live packet.
        unsafe { sys::ferry_mbuf_view(segment.next, &mut segment) };
    }
    // SAFETY: the first segment's bytes; mbufs are private memory, which nobody writes while the burst is held.
    let first = unsafe { core::slice::from_raw_parts(view.data, usize::from(view.data_len).min(SNAPSHOT_BYTES)) };
    if !burst.finish_frame(mark, offload::received(view.ol_flags, view.tso_segsz, first)) {
        burst.reject(DropReason::RxTooManySegments);
    }
}

impl PortRxQueue for EthRx {
    fn receive(&mut self, _guard: &Guard, burst: &mut RxBurst) {
        thread::ensure_registered();
        // A burst may hold frames of other queues, and this queue frames of an earlier receive.
        let got = self.queue.receive(&mut self.held, &mut self.views.0, BURST - burst.len().min(BURST));
        for view in self.views.0.iter().take(got) {
            // SAFETY: the packet is in `held` until `release`, which follows after the burst was dealt with.
            unsafe { hand_over(view, burst) };
        }
    }

    fn release(&mut self, _guard: &Guard) {
        self.held.free();
    }

    fn arm(&mut self, _guard: &Guard) -> Armed {
        match self.queue.signal() {
            RxSignal::None => Armed::Poll,
            RxSignal::Level(fd) => Armed::Fd(fd),
            RxSignal::Event(fd) => {
                if !self.queue.arm_interrupt() {
                    return Armed::Poll;
                }
                // A frame that came between the last poll and arming raises no interrupt on some devices.
                match self.queue.waiting() {
                    Some(0) | None => Armed::Fd(fd),
                    Some(_) => Armed::Ready,
                }
            }
        }
    }

    fn disarm(&mut self, _guard: &Guard) {
        self.queue.disarm_interrupt();
    }

    /// An uplink runs from opening to closing: there is nobody to wake.
    fn set_waker(&mut self, _waker: Arc<dyn Wake>) {}
}

/// A transmit queue, and who has it.
#[repr(align(64))]
struct TxSlot {
    claimed: AtomicBool,
    queue: UnsafeCell<TxQueue>,
}

// SAFETY: the queue is reached only through a Claim, of which there is one at a time.
unsafe impl Sync for TxSlot {}

impl TxSlot {
    fn new(queue: TxQueue) -> Self {
        Self { claimed: AtomicBool::new(false), queue: UnsafeCell::new(queue) }
    }

    /// Takes the queue for a burst; `None` when another lane keeps it for long.
    #[inline]
    fn claim(&self) -> Option<Claim<'_>> {
        for _ in 0..CLAIM_SPINS {
            if !self.claimed.load(Ordering::Relaxed) && !self.claimed.swap(true, Ordering::Acquire) {
                return Some(Claim(self));
            }
            core::hint::spin_loop();
        }
        None
    }
}

struct Claim<'a>(&'a TxSlot);

impl Claim<'_> {
    #[inline]
    fn queue(&mut self) -> &mut TxQueue {
        // SAFETY: claims exclude each other (`claimed`), and this one is borrowed exclusively.
        unsafe { &mut *self.0.queue.get() }
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.claimed.store(false, Ordering::Release);
    }
}

struct TxShared {
    offloads: DeviceOffloads,
    queues: Box<[TxSlot]>,
    device: Arc<EthDevice>,
}

impl TxShared {
    #[inline]
    fn max_frame_bytes(&self) -> u32 {
        u32::from(self.device.mtu()) + HEADER_BYTES
    }
}

/// The transmit side of an uplink; clones share it.
#[derive(Clone)]
pub struct EthTx(Arc<TxShared>);

impl fmt::Debug for EthTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EthTx").field("queues", &self.0.queues.len()).finish_non_exhaustive()
    }
}

/// Fills a packet piece by piece, taking further mbufs as needed.
struct Writer<'p> {
    pool: &'p Mempool,
    chains: bool,
    head: Mbuf,
    /// Last segment linked to the head; null while the head itself is being filled.
    tail: *mut sys::rte_mbuf,
    /// Segment being filled, not linked yet; `None` while that is the head.
    segment: Option<Mbuf>,
    data: *mut u8,
    used: u16,
    room: u16,
}

impl<'p> Writer<'p> {
    fn new(head: Mbuf, pool: &'p Mempool, chains: bool) -> Self {
        // SAFETY: an owned, fresh mbuf.
        let (data, room) = unsafe { (sys::ferry_mbuf_data(head.as_ptr()), sys::ferry_mbuf_tailroom(head.as_ptr())) };
        Self { pool, chains, head, tail: core::ptr::null_mut(), segment: None, data, used: 0, room }
    }

    /// Links the segment under way.
    fn close_segment(&mut self) {
        match self.segment.take() {
            // SAFETY: the head is owned, and `used` bytes of it were written.
            None => unsafe {
                sys::ferry_mbuf_set_len(self.head.as_ptr(), self.used);
                self.tail = self.head.as_ptr();
            },
            // SAFETY: a fresh segment of which `used` bytes were written becomes part of the owned chain.
            Some(segment) => unsafe {
                let raw = segment.into_raw();
                sys::ferry_mbuf_chain(self.head.as_ptr(), self.tail, raw, self.used);
                self.tail = raw;
            },
        }
    }

    /// Appends `len` bytes.
    ///
    /// # Safety
    /// `src..src+len` must be readable.
    #[inline]
    unsafe fn put(&mut self, src: *const u8, len: u32) -> Result<(), DropReason> {
        let (mut src, mut left) = (src, len);
        while left > 0 {
            if self.used == self.room {
                if !self.chains {
                    return Err(DropReason::TxTooLong);
                }
                // SAFETY: the pool outlives the device's packets.
                let Some(next) = (unsafe { Mbuf::alloc(self.pool) }) else { return Err(DropReason::TxNoBuffer) };
                self.close_segment();
                // SAFETY: an owned, fresh mbuf.
                unsafe {
                    self.data = sys::ferry_mbuf_data(next.as_ptr());
                    self.room = sys::ferry_mbuf_tailroom(next.as_ptr());
                }
                self.used = 0;
                self.segment = Some(next);
            }
            let n = left.min(u32::from(self.room - self.used));
            // SAFETY: n bytes are readable at src (caller) and free in the segment; they do not overlap, since the
            // segment is nobody else's.
            unsafe {
                core::ptr::copy_nonoverlapping(src, self.data.add(usize::from(self.used)), n as usize);
                src = src.add(n as usize);
            }
            self.used += n as u16;
            left -= n;
        }
        Ok(())
    }

    fn finish(mut self) -> Mbuf {
        self.close_segment();
        self.head
    }
}

impl TxShared {
    /// Copies `frame` into mbufs starting with `head` and sets its offload requests. The flag tells whether there are any.
    fn build(
        &self,
        head: Mbuf,
        pool: &Mempool,
        frame: &TxFrame<'_>,
        max_frame: u32,
    ) -> Result<(Mbuf, bool), DropReason> {
        let len = frame.len();
        if len < MIN_FRAME_BYTES {
            return Err(DropReason::RxTooShort);
        }
        if len > MAX_FRAME_BYTES || (frame.offload.gso == Gso::None && len > max_frame) {
            return Err(DropReason::TxTooLong);
        }
        let mut writer = Writer::new(head, pool, self.offloads.tx_multi_segment);
        // SAFETY: a slice is readable.
        unsafe { writer.put(frame.head.as_ptr(), frame.head.len() as u32)? };
        for (addr, n) in frame.body.pieces() {
            // SAFETY: pieces stay mapped while the burst they belong to is borrowed (RxBurst::push_segment).
            unsafe { writer.put(addr, n)? };
        }
        let mut packet = writer.finish();
        let request = match offload::plan(packet.first_segment_mut(), len, &frame.offload, &self.offloads, max_frame) {
            Plan::None => false,
            Plan::Device(request) => {
                // SAFETY: `plan` found the headers it names in the first segment.
                unsafe { sys::ferry_mbuf_request(packet.as_ptr(), &request) };
                true
            }
            Plan::Software { start, offset } => {
                finish_checksum(&mut packet, usize::from(start), usize::from(offset))
                    .ok_or(DropReason::OffloadFailed)?;
                false
            }
            Plan::Impossible => return Err(DropReason::OffloadFailed),
        };
        Ok((packet, request))
    }
}

/// Finishes a checksum in software: the field holds the pseudo-header's sum, everything from `start` on is summed.
fn finish_checksum(packet: &mut Mbuf, start: usize, offset: usize) -> Option<()> {
    let mut sum = Sum::default();
    let mut skip = start;
    packet.for_each_segment(|bytes| {
        sum.add(bytes.get(skip.min(bytes.len())..).unwrap_or_default());
        skip = skip.saturating_sub(bytes.len());
    });
    let field = packet.first_segment_mut().get_mut(start + offset..)?.first_chunk_mut::<2>()?;
    *field = offload::finish(sum);
    Some(())
}

impl TxPort for EthTx {
    fn capabilities(&self, _guard: &Guard) -> TxCapabilities {
        let o = self.0.offloads;
        TxCapabilities {
            csum: o.tx_csum,
            tso4: o.tso4,
            tso6: o.tso6,
            // DPDK does not say what a device does with CWR.
            ecn: false,
            // Spread by lane, not by flow.
            multiqueue: false,
            max_frame_bytes: self.0.max_frame_bytes(),
        }
    }

    fn send(&self, _guard: &Guard, lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        thread::ensure_registered();
        let shared = &*self.0;
        let frames = frames.get(..frames.len().min(BURST)).unwrap_or_default();
        let Some(pool) = shared.device.pool() else { return };
        let max_frame = shared.max_frame_bytes();

        // Copies are made before a queue is claimed, so that lanes that share one hold it for the hand-over only.
        let mut fresh = MbufBurst::new();
        // SAFETY: the pool lives as long as the device, which `self` holds; the packets do not leave this function but to the device.
        unsafe { fresh.alloc(pool, frames.len()) };
        let mut packets = MbufBurst::new();
        let mut origin = [0u8; BURST];
        let mut requests = false;
        for (i, frame) in frames.iter().enumerate() {
            let Some(head) = fresh.pop() else {
                report.refuse(i, DropReason::TxNoBuffer);
                continue;
            };
            match shared.build(head, pool, frame, max_frame) {
                Ok((packet, request)) => {
                    if let Some(slot) = origin.get_mut(packets.len()) {
                        *slot = i as u8;
                    }
                    requests |= request;
                    // As many as frames, hence never full.
                    let _ = packets.push(packet);
                }
                Err(reason) => report.refuse(i, reason),
            }
        }
        fresh.free();

        let origin = |k: usize| origin.get(k).map_or(BURST, |&i| usize::from(i));
        let slot = shared.queues.get(lane % shared.queues.len().max(1));
        let Some(mut claim) = slot.and_then(TxSlot::claim) else {
            (0..packets.len()).for_each(|k| report.refuse(origin(k), DropReason::TxBusy));
            return;
        };
        let count = packets.len();
        let pointers = packets.pointers();
        let mut next = 0;
        while next < count {
            let Some(rest) = pointers.get_mut(next..) else { break };
            // SAFETY: `rest` are owned packets. Those that the device takes are skipped below.
            let ready = if requests { unsafe { claim.queue().prepare(rest) } } else { rest.len() };
            let sent = match rest.get_mut(..ready) {
                // SAFETY: as above.
                Some(ready) => unsafe { claim.queue().send(ready) },
                None => 0,
            };
            (next..next + sent).for_each(|k| report.accept(origin(k)));
            next += sent;
            if sent < ready {
                (next..count).for_each(|k| report.refuse(origin(k), DropReason::TxQueueFull));
                break;
            }
            if next < count {
                // The driver found a packet it cannot send as requested: leave that one out.
                report.refuse(origin(next), DropReason::OffloadFailed);
                if let Some(&bad) = pointers.get(next) {
                    // SAFETY: an owned packet, passed over from here on.
                    drop(unsafe { Mbuf::from_raw(bad) });
                }
                next += 1;
            }
        }
        drop(claim);
        if let Some(unsent) = pointers.get_mut(next..)
            && !unsent.is_empty()
        {
            // SAFETY: the packets from `next` on are still owned: neither taken by the device nor freed above.
            unsafe { sys::ferry_pktmbuf_free_bulk(unsent.as_mut_ptr(), unsent.len() as u16) };
        }
        packets.forget();
    }

    /// The device was told with each burst.
    fn flush(&self, _guard: &Guard, _lane: usize) {}
}
