//! The ports of this build: guests over vhost-user and DPDK devices, closed into one enum so that the packet path stays monomorphic.
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::PathBuf;
use std::sync::Arc;

use ferry_dataplane::frame::{RxBurst, TxFrame};
use ferry_dataplane::pmd::Kinds;
use ferry_dataplane::port::{Armed, RxQueue, TxCapabilities, TxPort, TxReport, Wake};
use ferry_dataplane::qsbr::{Domain, Guard};
use ferry_ffi::eal::{Eal, EalConfig, Memory};
use ferry_ffi::uplink::{EthRx, EthTx, Uplink, UplinkConfig};
use ferry_vhost::features::FeatureSwitches;
use ferry_vhost::port::{VhostPort, VhostPortConfig};
use ferry_vhost::queue::{VhostRx, VhostTx};
use ferry_vhost::signals::{PortEvent, PortObserver};
use ferry_vhost::socket::{Role, SocketOwnership};

use crate::api::{resolve_group, resolve_user};
use crate::config::{DpdkConfig, DpdkMemory, DpdkPortConfig, PortConfig, PortKind, VhostRole, VhostUserConfig};
use crate::engine::{EngineError, Opened, Opener, PortHandle, PortState};
use crate::events::{Event, EventSender};

/// A receive queue of any kind.
#[expect(
    clippy::large_enum_variant,
    reason = "one per queue and rarely moved; a box would be a pointer to follow per burst"
)]
pub enum AnyRx {
    /// A guest's.
    Vhost(VhostRx),
    /// A device's.
    Ethdev(EthRx),
}

/// A transmit side of any kind.
#[derive(Clone)]
pub enum AnyTx {
    /// A guest's.
    Vhost(VhostTx),
    /// A device's.
    Ethdev(EthTx),
}

/// The kinds of ports of this build.
pub struct AnyKinds;

impl Kinds for AnyKinds {
    type Rx = AnyRx;
    type Tx = AnyTx;
}

impl RxQueue for AnyRx {
    #[inline]
    fn receive(&mut self, guard: &Guard, burst: &mut RxBurst) {
        match self {
            AnyRx::Vhost(q) => q.receive(guard, burst),
            AnyRx::Ethdev(q) => q.receive(guard, burst),
        }
    }
    #[inline]
    fn release(&mut self, guard: &Guard) {
        match self {
            AnyRx::Vhost(q) => q.release(guard),
            AnyRx::Ethdev(q) => q.release(guard),
        }
    }
    fn arm(&mut self, guard: &Guard) -> Armed {
        match self {
            AnyRx::Vhost(q) => q.arm(guard),
            AnyRx::Ethdev(q) => q.arm(guard),
        }
    }
    fn disarm(&mut self, guard: &Guard) {
        match self {
            AnyRx::Vhost(q) => q.disarm(guard),
            AnyRx::Ethdev(q) => q.disarm(guard),
        }
    }
    fn set_waker(&mut self, waker: Arc<dyn Wake>) {
        match self {
            AnyRx::Vhost(q) => q.set_waker(waker),
            AnyRx::Ethdev(q) => q.set_waker(waker),
        }
    }
}

impl TxPort for AnyTx {
    #[inline]
    fn capabilities(&self, guard: &Guard) -> TxCapabilities {
        match self {
            AnyTx::Vhost(q) => q.capabilities(guard),
            AnyTx::Ethdev(q) => q.capabilities(guard),
        }
    }
    #[inline]
    fn send(&self, guard: &Guard, lane: usize, frames: &[TxFrame<'_>], report: &mut TxReport) {
        match self {
            AnyTx::Vhost(q) => q.send(guard, lane, frames, report),
            AnyTx::Ethdev(q) => q.send(guard, lane, frames, report),
        }
    }
    #[inline]
    fn send_received(&self, guard: &Guard, lane: usize, burst: &RxBurst, frames: u64, report: &mut TxReport) {
        match self {
            AnyTx::Vhost(q) => q.send_received(guard, lane, burst, frames, report),
            AnyTx::Ethdev(q) => q.send_received(guard, lane, burst, frames, report),
        }
    }
    #[inline]
    fn flush(&self, guard: &Guard, lane: usize) {
        match self {
            AnyTx::Vhost(q) => q.flush(guard, lane),
            AnyTx::Ethdev(q) => q.flush(guard, lane),
        }
    }
}

/// Opens the ports of this build. DPDK starts with the first port that needs it.
pub struct PortOpener {
    events: EventSender,
    dpdk: DpdkConfig,
    ring_state_dir: Option<PathBuf>,
    eal: Option<Eal>,
}

impl PortOpener {
    /// An opener whose ports report to `events`. Positions of packed rings are kept in files under `ring_state_dir`, so that
    /// guests with packed rings go on after a restart of the daemon: QEMU cannot restore these positions itself.
    pub fn new(events: EventSender, dpdk: DpdkConfig, ring_state_dir: Option<PathBuf>) -> Self {
        Self { events, dpdk, ring_state_dir, eal: None }
    }

    fn ring_state_file(&self, port: &PortConfig, v: &VhostUserConfig) -> Option<PathBuf> {
        let dir = self.ring_state_dir.as_ref().filter(|_| v.features.packed)?;
        if let Err(e) = DirBuilder::new().recursive(true).mode(0o700).create(dir) {
            tracing::warn!(
                "{} cannot be made, so guests with packed rings will not survive a restart of ferryd: {e}",
                dir.display()
            );
            return None;
        }
        Some(dir.join(&port.name))
    }

    fn eal(&mut self) -> Result<&Eal, EngineError> {
        if self.eal.is_none() {
            let config = EalConfig {
                memory: match self.dpdk.memory {
                    DpdkMemory::Auto => Memory::Auto,
                    DpdkMemory::Hugepages => Memory::Hugepages,
                    DpdkMemory::NoHuge => Memory::NoHuge,
                },
                memory_mb: self.dpdk.memory_mb,
                pci: self.dpdk.pci,
                extra_args: self.dpdk.extra_args.clone(),
                ..EalConfig::default()
            };
            tracing::info!(memory_mb = config.memory_mb, "starting {}", Eal::version());
            let eal = Eal::start(&config).map_err(|e| {
                EngineError::new(format!("DPDK does not start: {e}"), "see the section [dpdk] of the configuration")
            })?;
            self.eal = Some(eal);
        }
        self.eal.as_ref().ok_or_else(|| EngineError::new("DPDK is not there", ""))
    }
}

impl Opener for PortOpener {
    type K = AnyKinds;

    fn open(&mut self, port: &PortConfig, domain: &Arc<Domain>) -> Result<Opened<AnyKinds>, EngineError> {
        match &port.kind {
            PortKind::VhostUser(v) => open_vhost(port, v, domain, self.events.clone(), self.ring_state_file(port, v)),
            PortKind::Dpdk(d) => open_dpdk(port, d, self.eal()?),
        }
    }

    fn set_dpdk(&mut self, dpdk: &DpdkConfig) -> Result<(), EngineError> {
        if self.dpdk_started() {
            return Err(EngineError::new("DPDK runs already with other settings", "restart ferryd"));
        }
        self.dpdk = dpdk.clone();
        Ok(())
    }

    fn dpdk_started(&self) -> bool {
        self.eal.is_some()
    }
}

fn open_vhost(
    port: &PortConfig,
    v: &VhostUserConfig,
    domain: &Arc<Domain>,
    events: EventSender,
    state_file: Option<PathBuf>,
) -> Result<Opened<AnyKinds>, EngineError> {
    let owner = |e: anyhow::Error| EngineError::new(e.to_string(), "correct socket_user or socket_group");
    let f = &v.features;
    let config = VhostPortConfig {
        queue_pairs: v.queue_pairs as u16,
        mtu: port.mtu,
        state_file,
        ownership: SocketOwnership {
            mode: v.socket_mode.0,
            uid: v.socket_user.as_ref().map(resolve_user).transpose().map_err(owner)?,
            gid: v.socket_group.as_ref().map(resolve_group).transpose().map_err(owner)?,
        },
        features: FeatureSwitches {
            mrg_rxbuf: f.mrg_rxbuf,
            indirect_desc: f.indirect,
            event_idx: f.event_idx,
            packed: f.packed,
            in_order: f.in_order,
            csum: f.csum,
            tso: f.tso,
            guest_announce: f.guest_announce,
            migration: f.migration,
            mem_slots: f.mem_slots,
        },
        ..VhostPortConfig::new(
            port.name.clone(),
            v.socket.clone(),
            match v.role {
                VhostRole::Server => Role::Server,
                VhostRole::Client => Role::Client,
            },
        )
    };
    if v.role == VhostRole::Server && std::fs::symlink_metadata(&v.socket).is_ok_and(|m| !m.file_type().is_socket()) {
        let message = format!("{} exists and is not a socket", v.socket.display());
        return Err(EngineError::new(message, "move it away, or change the port's socket"));
    }
    let observer = Arc::new(Reporter { port: port.name.as_str().into(), events });
    let mut opened = VhostPort::start(config, Arc::clone(domain), observer)
        .map_err(|e| EngineError::new(e.to_string(), "check the path, its directory and its permissions"))?;
    Ok(Opened {
        tx: AnyTx::Vhost(opened.tx()),
        rx: opened.take_rx_queues().into_iter().map(AnyRx::Vhost).collect(),
        handle: Box::new(VhostHandle(opened)),
    })
}

fn open_dpdk(port: &PortConfig, d: &DpdkPortConfig, eal: &Eal) -> Result<Opened<AnyKinds>, EngineError> {
    let config = UplinkConfig {
        rx_queues: d.rx_queues as u16,
        tx_queues: d.tx_queues as u16,
        rx_descriptors: d.rx_descriptors as u16,
        tx_descriptors: d.tx_descriptors as u16,
        mtu: port.mtu,
        mbufs: d.mbufs,
        promiscuous: d.promiscuous,
        ..UplinkConfig::new(port.name.clone(), d.device.clone())
    };
    let mut uplink = Uplink::open(&config, eal)
        .map_err(|e| EngineError::new(e.to_string(), "check `device` and that it is bound to a driver DPDK can use"))?;
    let rx: Vec<AnyRx> = uplink.take_rx_queues().into_iter().map(AnyRx::Ethdev).collect();
    if rx.len() != d.rx_queues as usize {
        let message = format!("the device has {} receive queue(s), not {}", rx.len(), d.rx_queues);
        let hint = format!("set rx_queues = {}", rx.len());
        drop(rx);
        close_uplink(uplink);
        return Err(EngineError::new(message, hint));
    }
    Ok(Opened { tx: AnyTx::Ethdev(uplink.tx()), rx, handle: Box::new(UplinkHandle(uplink)) })
}

/// Passes a guest port's events on.
struct Reporter {
    port: Arc<str>,
    events: EventSender,
}

impl PortObserver for Reporter {
    fn event(&self, event: &PortEvent) {
        // May hold the frontend.
        self.events.migration().observe(&self.port, event);
        let event = match event {
            PortEvent::Connected => Event::Connected,
            PortEvent::Disconnected { reason } => Event::Disconnected(reason.clone()),
            PortEvent::LinkUp => Event::LinkUp,
            PortEvent::LinkDown => Event::LinkDown,
            PortEvent::Fault { text } => Event::Fault(text.clone()),
            PortEvent::Rarp { mac } => Event::Announce(*mac),
            PortEvent::Mtu { mtu } => Event::Note(format!("the guest's MTU is {mtu}")),
            PortEvent::LogStarted => Event::Note("migration away: dirty-page logging on".into()),
            PortEvent::LogStopped => Event::Note("migration away given up: dirty-page logging off".into()),
            _ => return,
        };
        self.events.send(&self.port, event);
    }
}

struct VhostHandle(VhostPort);

impl PortHandle for VhostHandle {
    fn state(&self) -> PortState {
        let s = self.0.status();
        let (state, detail) = match &s.fault {
            Some(fault) => ("fault", fault.clone()),
            None if s.link_up => ("up", String::new()),
            None if s.connected => ("connected", "the guest's driver has not started the rings".into()),
            None if s.state == "closed" => ("down", String::new()),
            None => ("waiting", format!("{} on {}", s.state, s.socket.display())),
        };
        PortState { state: state.into(), detail, status: serde_json::to_value(&s).unwrap_or_default() }
    }

    fn update(&mut self, _: &PortConfig) -> Result<(), EngineError> {
        Ok(())
    }

    fn close(mut self: Box<Self>) {
        self.0.shutdown();
    }
}

struct UplinkHandle(Uplink);

impl PortHandle for UplinkHandle {
    fn state(&self) -> PortState {
        let s = self.0.status();
        let (state, detail) = match &s.link {
            Some(link) if !link.up => ("down", "no link".to_owned()),
            Some(_) => ("up", String::new()),
            None => ("up", "the device does not tell its link state".to_owned()),
        };
        PortState { state: state.into(), detail, status: serde_json::to_value(&s).unwrap_or_default() }
    }

    fn update(&mut self, port: &PortConfig) -> Result<(), EngineError> {
        let PortKind::Dpdk(d) = &port.kind else { return Ok(()) };
        if self.0.status().promiscuous == Some(d.promiscuous) {
            return Ok(());
        }
        self.0.set_promiscuous(d.promiscuous).map_err(|e| EngineError::new(e.to_string(), ""))
    }

    fn close(self: Box<Self>) {
        close_uplink(self.0);
    }
}

fn close_uplink(uplink: Uplink) {
    if let Err(e) = uplink.close() {
        tracing::warn!("{e}");
    }
}
