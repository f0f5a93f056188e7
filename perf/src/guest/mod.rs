//! A generated guest: one vhost-user port seen from the driver's side, on the same socket that QEMU would use.
pub mod logging;
pub mod memory;
pub mod packed;
pub mod pool;
pub mod ring;
pub mod session;
pub mod split;

use anyhow::{Context, Result};
use memory::GuestMemory;
use ring::{DriverRing, NET_HEADER, RingFormat, RingSpec};
use session::Session;
use std::path::Path;

/// What kind of guest to attach.
#[derive(Clone, Copy, Debug)]
pub struct GuestSpec {
    /// Ring format.
    pub format: RingFormat,
    /// Descriptors per ring.
    pub ring_size: u16,
    /// Longest frame that it sends or receives, bytes.
    pub frame_bytes: usize,
    /// Bytes of one receive buffer, header included. Longer frames take several (mergeable buffers).
    pub rx_buffer_bytes: u32,
    /// Negotiates checksum and TCP segmentation offloads; a switch without them over IPv4 is refused.
    pub offloads: bool,
    /// Listens for a switch that dials, instead of connecting to one that listens.
    pub listens: bool,
}

impl GuestSpec {
    /// Split rings of 256, one receive buffer per frame, no offloads.
    pub fn new(frame_bytes: usize) -> Self {
        Self {
            format: RingFormat::Split,
            ring_size: 256,
            frame_bytes,
            rx_buffer_bytes: if frame_bytes <= 2036 { 2048 } else { 4096 },
            offloads: false,
            listens: false,
        }
    }

    /// With this ring format.
    pub fn format(mut self, format: RingFormat) -> Self {
        self.format = format;
        self
    }

    fn tx(&self) -> RingSpec {
        let needed = NET_HEADER + self.frame_bytes;
        // Linux gives long frames as page fragments: one descriptor per 4 KiB.
        let (chain, descriptor_bytes) = if needed <= 2048 { (1, 2048) } else { (needed.div_ceil(4096), 4096) };
        let chain = chain.next_power_of_two() as u16;
        RingSpec { size: self.ring_size.max(chain * 8), chain, descriptor_bytes, device_writes: false }
    }

    fn rx(&self) -> RingSpec {
        // Room for as many frames as the transmit ring holds, within the usual 1024 descriptors.
        let per_frame = (NET_HEADER + self.frame_bytes).div_ceil(self.rx_buffer_bytes as usize).next_power_of_two();
        let size = (usize::from(self.ring_size) * per_frame).min(1024).max(usize::from(self.ring_size));
        RingSpec { size: size as u16, chain: 1, descriptor_bytes: self.rx_buffer_bytes, device_writes: true }
    }
}

/// An attached guest with its two rings. Field order is drop order: the session ends before the memory goes.
#[derive(Debug)]
pub struct Guest<R> {
    session: Option<Session>,
    /// Towards the switch.
    pub tx: R,
    /// From the switch.
    pub rx: R,
    memory: GuestMemory,
}

impl<R: DriverRing> Guest<R> {
    /// Connects to the socket on which a switch listens (or waits for it to connect) and starts both rings, all receive buffers published.
    ///
    /// # Errors
    /// When nobody listens, the switch lacks a feature, or the session breaks off.
    pub fn attach(socket: &Path, spec: &GuestSpec) -> Result<Self> {
        let mut guest = Self::detached(spec)?;
        guest.session = Some(Session::start(socket, spec, &guest.memory, [&guest.rx, &guest.tx])?);
        Ok(guest)
    }

    /// A guest whose rings nobody serves yet, all receive buffers published.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn detached(spec: &GuestSpec) -> Result<Self> {
        let (tx, rx) = (spec.tx(), spec.rx());
        let mut memory = GuestMemory::new(tx.memory() + rx.memory())?;
        let mut rx = R::new(rx, &mut memory)?;
        let tx = R::new(tx, &mut memory)?;
        rx.publish(rx.free());
        Ok(Self { session: None, tx, rx, memory })
    }

    /// Notifies the switch where it asks for that. A switch that polls does not.
    #[inline]
    pub fn kick(&self) {
        let Some(session) = &self.session else { return };
        if self.tx.wants_kick() {
            session.kick(1);
        }
        if self.rx.wants_kick() {
            session.kick(0);
        }
    }

    /// Has the switch note in `log` which pages it writes, as QEMU does when a migration begins. The rings keep running.
    ///
    /// # Errors
    /// When the switch cannot.
    pub fn start_logging(&mut self, log: &logging::PageLog) -> Result<()> {
        let used = [self.rx.areas()[2].guest_at(0), self.tx.areas()[2].guest_at(0)];
        self.session.as_mut().context("no switch")?.start_logging(log, used)
    }

    /// Ends that, as QEMU does when a migration is cancelled.
    ///
    /// # Errors
    /// When the session breaks off.
    pub fn stop_logging(&mut self) -> Result<()> {
        self.session.as_mut().context("no switch")?.stop_logging()
    }

    /// Guest address behind the last byte of its memory.
    pub fn memory_end(&self) -> u64 {
        memory::GUEST_BASE + self.memory.len() as u64
    }

    /// The features that were negotiated; none without a switch.
    pub fn features(&self) -> u64 {
        self.session.as_ref().map_or(0, Session::features)
    }

    /// Whether its memory consists of huge pages.
    pub fn huge_pages(&self) -> bool {
        self.memory.huge()
    }

    /// Whether a switch holds the connection.
    pub fn alive(&self) -> bool {
        self.session.as_ref().is_some_and(Session::alive)
    }
}
