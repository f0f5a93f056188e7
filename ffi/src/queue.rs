//! Receive and transmit queues of an open device: the data path proper.
//!
//! Queues are tokens, each of which exists once: DPDK allows one thread at a time on a queue, and `&mut` says so. Each keeps
//! its device open.
#![allow(unsafe_code)] // Its job: calling a driver's burst functions.
use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::sync::Arc;

use ferry_dataplane::frame::BURST;
use ferry_dpdk_sys as sys;

use crate::ethdev::EthDevice;
use crate::mbuf::MbufBurst;

/// How a receive queue signals work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxSignal {
    /// Not at all: poll.
    None,
    /// The descriptor is the data's own (net_tap): readable while frames wait.
    Level(RawFd),
    /// An eventfd that the device's interrupt signals once armed; to be drained.
    Event(RawFd),
}

/// A device's receive queue. One thread at a time.
#[derive(Debug)]
pub struct RxQueue {
    device: Arc<EthDevice>,
    port: u16,
    queue: u16,
    signal: RxSignal,
    armed: bool,
    not_sync: PhantomData<Cell<()>>,
}

impl RxQueue {
    /// The token of queue `queue`; made once per queue of an open device.
    pub(crate) fn new(device: Arc<EthDevice>, queue: u16, signal: RxSignal) -> Self {
        Self { port: device.facts().port_id, device, queue, signal, armed: false, not_sync: PhantomData }
    }

    /// Queue number.
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// How the queue signals work.
    pub fn signal(&self) -> RxSignal {
        self.signal
    }

    /// Receives at most `max` frames into `burst`. Returns where the new ones begin; `views` describes their first
    /// segments from its own beginning on.
    #[inline]
    pub(crate) fn receive(
        &mut self,
        burst: &mut MbufBurst,
        views: &mut [sys::ferry_segment; BURST],
        max: usize,
    ) -> usize {
        let spare = burst.spare();
        let n = max.min(spare.len()).min(BURST) as u16;
        // SAFETY: this is the queue's only user (`&mut` on its only token); the port runs as long as `device` lives; both
        // arrays have room for n. What arrives is owned by nobody else.
        unsafe {
            let got = sys::ferry_eth_rx_burst(self.port, self.queue, spare.as_mut_ptr(), views.as_mut_ptr(), n);
            burst.grow(usize::from(got));
            usize::from(got)
        }
    }

    /// Frames that wait, where the driver can tell.
    pub(crate) fn waiting(&self) -> Option<u32> {
        // SAFETY: the port runs; a driver without the function returns an error.
        u32::try_from(unsafe { sys::ferry_eth_rx_queue_count(self.port, self.queue) }).ok()
    }

    /// Arms the interrupt of an [`RxSignal::Event`] queue.
    pub(crate) fn arm_interrupt(&mut self) -> bool {
        // SAFETY: our port and queue.
        self.armed = unsafe { sys::rte_eth_dev_rx_intr_enable(self.port, self.queue) } == 0;
        self.armed
    }

    /// Disarms it and drains the eventfd. Does nothing unless armed.
    pub(crate) fn disarm_interrupt(&mut self) {
        if !self.armed {
            return;
        }
        self.armed = false;
        // SAFETY: our port and queue.
        unsafe { sys::rte_eth_dev_rx_intr_disable(self.port, self.queue) };
        if let RxSignal::Event(fd) = self.signal {
            let mut count = 0u64;
            // SAFETY: eight bytes into a u64. The descriptor is non-blocking (EAL creates it so) and lives with the device.
            unsafe { libc::read(fd, (&raw mut count).cast(), size_of::<u64>()) };
        }
    }

    /// The device.
    pub fn device(&self) -> &Arc<EthDevice> {
        &self.device
    }
}

/// A device's transmit queue. One thread at a time.
#[derive(Debug)]
pub struct TxQueue {
    device: Arc<EthDevice>,
    port: u16,
    queue: u16,
    not_sync: PhantomData<Cell<()>>,
}

impl TxQueue {
    /// The token of queue `queue`; made once per queue of an open device.
    pub(crate) fn new(device: Arc<EthDevice>, queue: u16) -> Self {
        Self { port: device.facts().port_id, device, queue, not_sync: PhantomData }
    }

    /// Queue number.
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// Lets the driver check and adapt packets with offload requests. Returns how many, from the front, it takes.
    ///
    /// # Safety
    /// `packets` must be owned packets.
    #[inline]
    pub(crate) unsafe fn prepare(&mut self, packets: &mut [*mut sys::rte_mbuf]) -> usize {
        // SAFETY: as the caller promises; the only user of the queue; the port runs as long as `device` lives.
        usize::from(unsafe {
            sys::ferry_eth_tx_prepare(self.port, self.queue, packets.as_mut_ptr(), packets.len() as u16)
        })
    }

    /// Offers packets to the device. Returns how many, from the front, it took over. Drivers that work in smaller bursts are
    /// called again as long as they make progress.
    ///
    /// # Safety
    /// `packets` must be owned packets; those taken are not the caller's any more.
    #[inline]
    pub(crate) unsafe fn send(&mut self, packets: &mut [*mut sys::rte_mbuf]) -> usize {
        let mut sent = 0;
        while let Some(rest) = packets.get_mut(sent..)
            && !rest.is_empty()
        {
            // SAFETY: as the caller promises; the only user of the queue; the port runs as long as `device` lives.
            let n = unsafe { sys::ferry_eth_tx_burst(self.port, self.queue, rest.as_mut_ptr(), rest.len() as u16) };
            if n == 0 {
                break;
            }
            sent += usize::from(n);
        }
        sent
    }

    /// The device.
    pub fn device(&self) -> &Arc<EthDevice> {
        &self.device
    }
}
