//! The frontend's side of a vhost-user session, as QEMU leads it for a running guest with one queue pair.
use super::GuestSpec;
use super::memory::{GUEST_BASE, GuestMemory};
use super::ring::{DriverRing, RingFormat};
use anyhow::{Context, Result, bail};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
pub(super) const F_LOG_ALL: u64 = 1 << 26;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;

const OFFLOADS: u64 = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;

/// A session with both rings running. Ends with the connection, on drop.
#[derive(Debug)]
pub struct Session {
    probe: UnixStream,
    pub(super) frontend: FrontendHandle,
    /// The switch can log what it writes.
    pub(super) can_log: bool,
    kicks: [EventFd; 2],
    _calls: [EventFd; 2],
    features: u64,
}

/// Keeps the connection open, and how the rings were set up.
pub(super) struct FrontendHandle(pub(super) Frontend, pub(super) [VringConfigData; 2]);

impl std::fmt::Debug for FrontendHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Frontend")
    }
}

/// Connects; a switch that is just starting gets 10 s to listen.
fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("no switch listens on {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Listens until a switch connects, 20 s at most: those that dial try again every second or so.
fn accept(socket: &Path) -> Result<UnixStream> {
    // Left by an earlier guest, or not there.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("no switch connects to {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl Session {
    /// Leads the session up to both rings being enabled. `rings` are receive and transmit ring.
    pub(super) fn start<R: DriverRing>(
        socket: &Path,
        spec: &GuestSpec,
        memory: &GuestMemory,
        rings: [&R; 2],
    ) -> Result<Self> {
        let stream = if spec.listens { accept(socket)? } else { connect(socket)? };
        // A switch that stops answering must not hang the suite.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let probe = stream.try_clone()?;
        let mut frontend = Frontend::from_stream(stream, 2);
        let offered = frontend.get_features().context("GET_FEATURES")?;
        let packed = if spec.format == RingFormat::Packed { F_RING_PACKED } else { 0 };
        let offloads = if spec.offloads { F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_GUEST_TSO4 } else { 0 };
        let needed = F_VERSION_1 | F_PROTOCOL_FEATURES | F_MRG_RXBUF | packed | offloads;
        if offered & needed != needed {
            bail!("the switch offers features {offered:#x}, which lack {:#x}", needed & !offered);
        }
        let features = needed | if spec.offloads { offered & OFFLOADS } else { 0 };
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let wanted =
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::LOG_SHMFD;
        frontend.set_protocol_features(protocol & wanted).context("SET_PROTOCOL_FEATURES")?;
        frontend.set_owner().context("SET_OWNER")?;
        frontend.set_features(features).context("SET_FEATURES")?;
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: GUEST_BASE,
                memory_size: memory.len() as u64,
                userspace_addr: memory.user_address(),
                mmap_offset: 0,
                mmap_handle: memory.file().as_raw_fd(),
            }])
            .context("SET_MEM_TABLE")?;
        let event = || EventFd::new(EFD_NONBLOCK).context("eventfd");
        let kicks = [event()?, event()?];
        let calls = [event()?, event()?];
        let mut set_up = Vec::with_capacity(2);
        for (i, ring) in rings.into_iter().enumerate() {
            let [desc, driver, device] = ring.areas();
            let size = (desc.len / 16) as u16;
            frontend.set_vring_num(i, size).context("SET_VRING_NUM")?;
            frontend.set_vring_base(i, ring.base()).context("SET_VRING_BASE")?;
            let addresses = VringConfigData {
                queue_max_size: size,
                queue_size: size,
                flags: 0,
                desc_table_addr: desc.user_at(0),
                used_ring_addr: device.user_at(0),
                avail_ring_addr: driver.user_at(0),
                log_addr: None,
            };
            frontend.set_vring_addr(i, &addresses).context("SET_VRING_ADDR")?;
            set_up.push(addresses);
            frontend.set_vring_kick(i, &kicks[i]).context("SET_VRING_KICK")?;
            frontend.set_vring_call(i, &calls[i]).context("SET_VRING_CALL")?;
        }
        // Messages are handled in order: once these are answered, both rings run.
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        for i in 0..2 {
            frontend.set_vring_enable(i, true).context("SET_VRING_ENABLE")?;
        }
        Ok(Self {
            probe,
            frontend: FrontendHandle(frontend, set_up.try_into().ok().context("two rings")?),
            can_log: offered & F_LOG_ALL != 0 && protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD),
            kicks,
            _calls: calls,
            features,
        })
    }

    /// Signals ring `i`'s kick descriptor.
    pub(super) fn kick(&self, i: usize) {
        // A full counter means that a kick is pending already.
        let _ = self.kicks[i].write(1);
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn alive(&self) -> bool {
        nix::sys::socket::recv(
            self.probe.as_raw_fd(),
            &mut [0],
            nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) != Ok(0)
    }
}
