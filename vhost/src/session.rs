//! The state that vhost-user messages build up on one port, and the life of its rings.
//!
//! A ring runs when all of this holds, in whatever order it came: features, guest memory, SET_VRING_NUM, _ADDR, _BASE,
//! _KICK (a kick without descriptor means that the ring is to be polled, and starts it as well), and it is enabled. It
//! stops, quiesced, at GET_VRING_BASE, disable, reset, fault and disconnect; a change of memory, log, features,
//! addresses or descriptors stops it and starts it again where it was.
//!
//! Under VHOST_F_LOG_ALL a ring does not run without a log: QEMU sends SET_LOG_BASE *after* the rings when it sets
//! them up anew during a migration (`cont`, a cancelled switch-over, a reconnect), and every write until then would
//! miss the new log. Rings wait for it, up to [`LOG_WAIT`], because a frontend may also set the bit and never send a log.
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as CrateError, GpuBackend, Result as CrateResult, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use crate::base_mirror::{MirrorFile, RingIdentity, Stored};
use crate::dirty_log::DirtyLog;
use crate::eventfd;
use crate::features;
use crate::memory::{GuestRegion, MAX_REGIONS, MemoryMap, RegionSpec};
use crate::queue::PortQueues;
use crate::relay::Backend;
use crate::resume;
use crate::ring::{FaultKind, MAX_RING_SIZE, Ring, RingConfig};
use crate::signals::{PortEvent, PortObserver};
use crate::status::{MemoryStatus, RingStatus, VhostStatus};

/// How long rings wait for SET_LOG_BASE under VHOST_F_LOG_ALL. QEMU sends it within a millisecond.
pub const LOG_WAIT: Duration = Duration::from_secs(1);

/// Most guest memory mapped for one port, bytes (16 TiB): a bound on address space, not on use.
const MAX_MEMORY_BYTES: u64 = 1 << 44;

/// What a session needs to know of its port.
#[derive(Clone)]
pub(crate) struct SessionConfig {
    pub(crate) queue_pairs: u16,
    pub(crate) mtu: u16,
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    /// Keeps the positions of packed rings for the next process.
    pub(crate) mirror: Option<Arc<MirrorFile>>,
}

/// Ring areas as SET_VRING_ADDR gives them, frontend addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Areas {
    desc: u64,
    driver: u64,
    device: u64,
}

/// One vring's messages.
#[derive(Debug, Default)]
struct Vring {
    size: Option<u16>,
    areas: Option<Areas>,
    log_address: Option<u64>,
    base: Option<u32>,
    /// SET_VRING_KICK came; the inner value is its descriptor.
    kick: Option<Option<Arc<OwnedFd>>>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    running: bool,
    /// SET_VRING_KICK messages.
    kicks: u64,
    starts: u64,
    /// Where a packed ring was when its connection broke off without GET_VRING_BASE.
    left_off: Option<Stored>,
}

/// One port's protocol state. Lives as long as the port; [`Session::disconnect`] takes it back to the beginning.
pub(crate) struct Session {
    config: SessionConfig,
    queues: Arc<PortQueues>,
    observer: Arc<dyn PortObserver>,
    features: Option<u64>,
    protocol_features: u64,
    memory: Option<Arc<MemoryMap>>,
    log: Option<Arc<DirtyLog>>,
    /// All rings were stopped under the log: the frontend is done with it and will send another.
    log_stale: bool,
    /// Until when rings wait for a log; `None` when none waits or the wait is over.
    log_deadline: Option<Instant>,
    log_wait_over: bool,
    vrings: Vec<Vring>,
    mtu: Option<u16>,
    link_up: bool,
    /// What stopped the port or a ring, until it is set up again.
    fault: Option<String>,
}

fn refused(why: impl Into<String>) -> CrateError {
    CrateError::ReqHandlerError(std::io::Error::other(why.into()))
}

impl Session {
    pub(crate) fn new(config: SessionConfig, queues: Arc<PortQueues>, observer: Arc<dyn PortObserver>) -> Self {
        let vrings = (0..usize::from(config.queue_pairs) * 2)
            .map(|i| Vring { left_off: config.mirror.as_ref().and_then(|m| m.load(i)), ..Vring::default() })
            .collect();
        Self {
            config,
            queues,
            observer,
            features: None,
            protocol_features: 0,
            memory: None,
            log: None,
            log_stale: false,
            log_deadline: None,
            log_wait_over: false,
            vrings,
            mtu: None,
            link_up: false,
            fault: None,
        }
    }

    fn emit(&self, event: PortEvent) {
        self.observer.event(&event);
    }

    fn vring(&mut self, index: u32) -> CrateResult<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or_else(|| refused(format!("no vring {index}")))
    }

    fn has(&self, feature: u64) -> bool {
        self.features.unwrap_or_default() & feature != 0
    }

    /// True when a ring may not run yet because its writes would miss the log.
    fn waits_for_log(&mut self) -> bool {
        if !self.has(features::LOG_ALL) || self.log_wait_over || (self.log.is_some() && !self.log_stale) {
            return false;
        }
        self.log_deadline.get_or_insert_with(|| Instant::now() + LOG_WAIT);
        true
    }

    /// When [`Self::on_deadline`] wants to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.log_deadline
    }

    /// The wait for a log is over: rings run without one, or with the old one.
    pub(crate) fn on_deadline(&mut self) {
        if self.log_deadline.is_some_and(|d| d <= Instant::now()) {
            self.log_deadline = None;
            self.log_wait_over = true;
            tracing::warn!("LOG_ALL is set and no SET_LOG_BASE came: rings run without a fresh log");
            self.start_all();
            self.update_link();
        }
    }

    /// Starts ring `index` if everything is there. An error names what the frontend gave wrongly.
    fn start_ring(&mut self, index: u32) -> Result<(), String> {
        if self.waits_for_log() {
            return Ok(());
        }
        let (Some(bits), Some(memory)) = (self.features, self.memory.clone()) else { return Ok(()) };
        let log = self.log.clone();
        let Some(vring) = self.vrings.get_mut(index as usize) else { return Ok(()) };
        if vring.running || !vring.enabled {
            return Ok(());
        }
        let (Some(size), Some(areas), Some(mut base), Some(kick)) =
            (vring.size, vring.areas, vring.base, vring.kick.clone())
        else {
            return Ok(());
        };
        if memory.is_poisoned() {
            return Err("guest memory file was truncated".into());
        }
        let mut base_mirror = None;
        if bits & features::RING_PACKED != 0 {
            if let Some(ring) = identify(&memory, areas, size) {
                if let Some(left_off) = vring.left_off.take()
                    && let Some(better) = resume_packed(&memory, ring, base, left_off)
                {
                    tracing::info!(
                        vring = index,
                        given = base,
                        resumed = better,
                        "packed ring goes on where it was left"
                    );
                    base = better;
                }
                base_mirror = self.config.mirror.as_ref().and_then(|m| m.begin(index as usize, ring, base as u16));
            }
        } else if let Some(mirror) = &self.config.mirror {
            mirror.clear(index as usize);
        }
        let dup = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose().map_err(|e| e.to_string());
        let config = RingConfig {
            index: index as u16,
            size,
            desc_user_addr: areas.desc,
            driver_user_addr: areas.driver,
            device_user_addr: areas.device,
            log_guest_addr: vring.log_address,
            base,
            features: bits,
            memory,
            log,
            call: dup(&vring.call)?,
            kick,
            err: dup(&vring.err)?,
            base_mirror,
        };
        let ring = Ring::new(config).map_err(|e| e.to_string())?;
        self.queues.start(index as usize, ring).map_err(|e| e.to_string())?;
        vring.running = true;
        vring.base = Some(base);
        vring.starts += 1;
        // What was used before a stop may not have been announced: one notification too many does no harm.
        if let Some(call) = &vring.call {
            eventfd::signal(call.as_raw_fd());
        }
        self.emit(PortEvent::VringStarted { index: index as u16, base });
        Ok(())
    }

    /// [`Self::start_ring`] where nobody waits for an answer, or as a message's result.
    fn start_or_fault(&mut self, index: u32) -> Result<(), String> {
        self.start_ring(index).inspect_err(|why| {
            self.fault = Some(why.clone());
            self.emit(PortEvent::Fault { text: why.clone() });
        })
    }

    fn start_all(&mut self) {
        for index in 0..self.vrings() {
            // Reported by start_or_fault.
            let _ = self.start_or_fault(index);
        }
    }

    /// Stops ring `index`; afterwards no PMD thread touches it.
    fn halt(&mut self, index: u32) {
        let Some(vring) = self.vrings.get_mut(index as usize) else { return };
        if vring.running {
            vring.running = false;
            if let Some(ring) = self.queues.stop(index as usize) {
                vring.base = Some(ring.base());
            }
        }
    }

    fn halt_all(&mut self) {
        for index in 0..self.vrings() {
            self.halt(index);
        }
    }

    /// Stops the running rings, applies `change`, and starts them again where they were.
    fn requiesce<T>(&mut self, change: impl FnOnce(&mut Self) -> T) -> T {
        self.halt_all();
        let result = change(self);
        self.start_all();
        self.update_link();
        result
    }

    fn update_link(&mut self) {
        let up = self.vrings.chunks_exact(2).any(|pair| pair.iter().all(|v| v.running));
        if up != self.link_up {
            self.link_up = up;
            self.emit(if up { PortEvent::LinkUp } else { PortEvent::LinkDown });
        }
    }

    /// What to say when the file behind guest memory or the log was truncated.
    fn lost_file(&self) -> Option<&'static str> {
        if self.memory.as_ref().is_some_and(|m| m.is_poisoned()) {
            Some("guest memory file was truncated")
        } else if self.log.as_ref().is_some_and(|l| l.poisoned().load(Ordering::Acquire)) {
            Some("dirty log file was truncated")
        } else {
            None
        }
    }

    /// A PMD thread reported faults: the rings concerned are stopped already, here they are taken down.
    pub(crate) fn on_faults(&mut self) {
        while let Some(fault) = self.queues.take_fault() {
            let index = u32::from(fault.vring);
            // A ring may stumble over the zeroes that stand in for the lost pages before it looks at the flag.
            let lost = self.lost_file();
            let memory_lost = fault.kind == FaultKind::MemoryLost || lost.is_some();
            let text = lost.map_or_else(|| fault.to_string(), str::to_owned);
            tracing::warn!(vring = fault.vring, %text, "ring stopped");
            if memory_lost {
                // Every ring lives in that memory, or writes to that log.
                self.halt_all();
                for vring in &mut self.vrings {
                    vring.kick = None;
                }
                self.log = None;
                self.memory = None;
            } else {
                self.halt(index);
                if let Ok(vring) = self.vring(index) {
                    // Only a new SET_VRING_KICK starts it again.
                    vring.kick = None;
                }
            }
            if self.fault.as_deref() != Some(text.as_str()) {
                self.fault = Some(text.clone());
                self.emit(PortEvent::Fault { text });
            }
        }
        self.update_link();
    }

    /// The connection ended: everything that belonged to it goes, with the rings quiesced first.
    pub(crate) fn disconnect(&mut self) {
        self.halt_all();
        let packed = self.has(features::RING_PACKED);
        let memory = self.memory.take();
        for vring in &mut self.vrings {
            let left_off = if packed { leave_off(memory.as_deref(), vring) } else { None };
            *vring = Vring {
                kicks: vring.kicks,
                starts: vring.starts,
                left_off: left_off.or(vring.left_off),
                ..Vring::default()
            };
        }
        self.log = None;
        self.log_stale = false;
        self.log_deadline = None;
        self.log_wait_over = false;
        self.features = None;
        self.protocol_features = 0;
        self.mtu = None;
        self.update_link();
        while self.queues.take_fault().is_some() {}
    }

    fn reset(&mut self) {
        self.halt_all();
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            *vring = Vring { kicks: vring.kicks, starts: vring.starts, enabled: vring.enabled, ..Vring::default() };
            if let Some(mirror) = &self.config.mirror {
                mirror.clear(index);
            }
        }
        self.emit(PortEvent::Reset);
        self.update_link();
    }

    fn set_memory(&mut self, regions: Vec<Arc<GuestRegion>>) -> CrateResult<()> {
        let bytes = regions.iter().fold(0u64, |n, r| n.saturating_add(r.size()));
        if bytes > MAX_MEMORY_BYTES {
            return Err(refused(format!("{bytes} bytes of guest memory are more than {MAX_MEMORY_BYTES}")));
        }
        let count = regions.len();
        let memory = MemoryMap::new(regions).map_err(|e| refused(e.to_string()))?;
        if self.has(features::LOG_ALL)
            && let Some(log) = &self.log
            && !self.log_stale
            && !log.covers(&memory)
        {
            // QEMU enlarges the log first. Until then the rings wait, as they do without a log.
            self.log_stale = true;
            self.log_wait_over = false;
        }
        self.fault = None;
        self.requiesce(|s| s.memory = Some(memory));
        self.emit(PortEvent::Memory { regions: count, bytes });
        Ok(())
    }

    fn regions(&self) -> Vec<Arc<GuestRegion>> {
        self.memory.as_ref().map(|m| m.regions().to_vec()).unwrap_or_default()
    }

    /// Fills in the session's part of a status.
    pub(crate) fn describe(&self, status: &mut VhostStatus) {
        let bits = self.features.unwrap_or_default();
        let packed = bits & features::RING_PACKED != 0;
        status.link_up = self.link_up;
        status.features = features::feature_names(bits);
        status.protocol_features = features::protocol_feature_names(self.protocol_features);
        status.mtu = self.mtu;
        status.logging = bits & features::LOG_ALL != 0;
        status.log_bytes = self.log.as_ref().map_or(0, |l| l.size() as u64);
        status.fault.clone_from(&self.fault);
        let regions = self.memory.as_ref().map(|m| m.regions()).unwrap_or_default();
        status.memory = MemoryStatus { regions: regions.len(), bytes: regions.iter().map(|r| r.size()).sum() };
        status.rings.clear();
        status.rings.extend(self.vrings.iter().enumerate().map(|(index, v)| RingStatus {
            index: index as u16,
            kind: if packed { "packed" } else { "split" },
            running: v.running,
            enabled: v.enabled,
            polled: matches!(v.kick, Some(None)),
            size: v.size.unwrap_or_default(),
            base: v.base.unwrap_or_default(),
            kicks: v.kicks,
            starts: v.starts,
        }));
    }

    /// True while any ring runs.
    pub(crate) fn is_running(&self) -> bool {
        self.vrings.iter().any(|v| v.running)
    }
}

/// Remembers where a packed ring is, for a frontend that comes back without having asked (see [`resume_packed`]).
fn leave_off(memory: Option<&MemoryMap>, vring: &Vring) -> Option<Stored> {
    // GET_VRING_BASE takes the kick away: then the frontend knows the base itself.
    vring.kick.as_ref()?;
    let (size, base, areas) = (vring.size?, vring.base?, vring.areas?);
    let memory = memory.filter(|m| !m.is_poisoned())?;
    Some(Stored { ring: identify(memory, areas, size)?, old: base as u16, new: base as u16 })
}

/// What makes a packed ring the same ring after a reconnect.
fn identify(memory: &MemoryMap, areas: Areas, size: u16) -> Option<RingIdentity> {
    use std::os::unix::fs::MetadataExt;
    let desc_gpa = memory.user_to_guest(areas.desc, u64::from(size) * 16)?;
    let region = memory.regions().iter().find(|r| desc_gpa.wrapping_sub(r.guest_addr()) < r.size())?;
    let meta = region.file().metadata().ok()?;
    Some(RingIdentity { desc_gpa, size, file: (meta.dev(), meta.ino()) })
}

/// The base from which to go on with a packed ring, where the given one is stale.
///
/// A packed ring has no index in guest memory, so when the back-end goes away without GET_VRING_BASE, QEMU
/// (`virtio_queue_packed_restore_last_avail_idx`) can only send the base of the last start. Where this process, or the one
/// before it, served the same ring of the same guest, it knows better, provided that the descriptors bear it out: the
/// guest may have reset the device meanwhile, and then the given base (the initial one) is right.
fn resume_packed(memory: &MemoryMap, ring: RingIdentity, given: u32, left_off: Stored) -> Option<u32> {
    if left_off.ring != ring {
        return None;
    }
    let at = u32::from(resume::position(memory, ring.desc_gpa, ring.size, left_off.old, left_off.new)?);
    (at != given & 0xffff).then_some(at << 16 | at)
}

impl Backend for Session {
    fn offered_features(&self) -> u64 {
        self.config.features
    }
    fn offered_protocol_features(&self) -> u64 {
        self.config.protocol_features
    }
    fn vrings(&self) -> u32 {
        self.vrings.len() as u32
    }
    fn memory_slots(&self) -> u64 {
        MAX_REGIONS as u64
    }

    fn enable_vring(&mut self, index: u32, enable: bool) {
        if let Ok(vring) = self.vring(index) {
            vring.enabled = enable;
            if enable {
                // Reported by start_or_fault.
                let _ = self.start_or_fault(index);
            } else {
                self.halt(index);
            }
            self.update_link();
        }
    }

    fn stop_vring(&mut self, index: u32) -> u32 {
        self.halt(index);
        let Ok(vring) = self.vring(index) else { return 0 };
        // Whatever was remembered of an earlier connection: from now on the frontend knows the base.
        vring.left_off = None;
        vring.kick = None;
        let base = vring.base.unwrap_or_default();
        if let Some(mirror) = &self.config.mirror {
            mirror.clear(index as usize);
        }
        let last = !self.is_running();
        let logging = self.has(features::LOG_ALL);
        if last && logging {
            self.log_stale = true;
            self.log_wait_over = false;
            self.log_deadline = None;
        }
        self.update_link();
        self.emit(PortEvent::VringStopped { index: index as u16, base, logging, last });
        base
    }

    fn rarp(&mut self, mac: [u8; 6]) {
        self.emit(PortEvent::Rarp { mac });
    }

    fn mtu(&mut self, mtu: u64) -> Result<(), String> {
        let limit = if self.config.mtu == 0 { u16::MAX } else { self.config.mtu };
        match u16::try_from(mtu) {
            // 68: the least that IPv4 works over (RFC 791), and virtio's lower bound (1.3, 5.1.4.1).
            Ok(m) if (68..=limit).contains(&m) => {
                self.mtu = Some(m);
                self.emit(PortEvent::Mtu { mtu: m });
                Ok(())
            }
            _ => Err(format!("MTU {mtu} is not within 68 to {limit}")),
        }
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> CrateResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> CrateResult<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> CrateResult<()> {
        self.reset();
        for vring in &mut self.vrings {
            vring.enabled = false;
        }
        Ok(())
    }

    fn get_features(&mut self) -> CrateResult<u64> {
        Ok(self.config.features)
    }

    fn set_features(&mut self, bits: u64) -> CrateResult<()> {
        let before = self.features.replace(bits);
        if before == Some(bits) {
            return Ok(());
        }
        let logged = before.unwrap_or_default() & features::LOG_ALL != 0;
        let logs = bits & features::LOG_ALL != 0;
        self.emit(PortEvent::Features { bits });
        self.log_wait_over = false;
        self.log_deadline = None;
        self.requiesce(|s| {
            if bits & features::PROTOCOL_FEATURES == 0 {
                // "the ring starts directly in the enabled state" (vhost-user, "Ring states").
                for vring in &mut s.vrings {
                    vring.enabled = true;
                }
            }
            if !logs && logged {
                s.log = None;
                s.log_stale = false;
            }
        });
        match (logged, logs) {
            (false, true) => self.emit(PortEvent::LogStarted),
            (true, false) => self.emit(PortEvent::LogStopped),
            _ => {}
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> CrateResult<Option<Vec<u64>>> {
        let mut regions = Vec::with_capacity(table.len());
        for (entry, file) in table.iter().zip(files) {
            regions.push(map_region(entry, file)?);
        }
        self.set_memory(regions)?;
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> CrateResult<Option<u64>> {
        let mut regions = self.regions();
        // With several queue pairs QEMU (before 8.0) tells of each region once per pair.
        if regions.iter().any(|known| is_same_region(known, region, &file)) {
            return Ok(None);
        }
        if regions.len() >= MAX_REGIONS {
            return Err(refused(format!("{MAX_REGIONS} memory regions are mapped already")));
        }
        regions.push(map_region(region, file)?);
        self.set_memory(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> CrateResult<()> {
        let mut regions = self.regions();
        let before = regions.len();
        let (gpa, uva, size) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        regions.retain(|r| (r.guest_addr(), r.user_addr(), r.size()) != (gpa, uva, size));
        if regions.len() == before {
            // Removed already, for another queue pair (see `add_mem_region`): what is asked for holds. A frontend
            // without several pairs has no reason to ask twice.
            if self.config.queue_pairs > 1 {
                return Ok(());
            }
            return Err(refused(format!("no memory region of {size:#x} bytes at {gpa:#x}")));
        }
        self.set_memory(regions)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> CrateResult<()> {
        let packed = self.has(features::RING_PACKED);
        let vring = self.vring(index)?;
        if vring.running {
            return Err(refused(format!("vring {index} is running")));
        }
        match u16::try_from(size) {
            Ok(n) if n != 0 && n <= MAX_RING_SIZE && (packed || n.is_power_of_two()) => {
                vring.size = Some(n);
                Ok(())
            }
            _ => Err(refused(format!("vring {index}: {size} is not a possible ring size"))),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> CrateResult<()> {
        let areas = Areas { desc: descriptor, driver: available, device: used };
        let log_address = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let vring = self.vring(index)?;
        let changed_log = vring.log_address != log_address;
        if vring.areas != Some(areas) || changed_log {
            self.halt(index);
            let vring = self.vring(index)?;
            vring.areas = Some(areas);
            vring.log_address = log_address;
        }
        if changed_log {
            self.emit(PortEvent::VringLogAddress { index: index as u16, address: log_address });
        }
        let started = self.start_or_fault(index);
        self.update_link();
        started.map_err(refused)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> CrateResult<()> {
        let packed = self.has(features::RING_PACKED);
        let vring = self.vring(index)?;
        if vring.running {
            return Err(refused(format!("vring {index} is running")));
        }
        if !packed && base > 0xffff {
            return Err(refused(format!("vring {index}: base {base:#x} of a split ring")));
        }
        vring.base = Some(base);
        let started = self.start_or_fault(index);
        self.update_link();
        started.map_err(refused)
    }

    fn get_vring_base(&mut self, index: u32) -> CrateResult<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, self.stop_vring(index)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> CrateResult<()> {
        let index = u32::from(index);
        self.halt(index);
        let vring = self.vring(index)?;
        vring.kick = Some(fd.map(|f| Arc::new(OwnedFd::from(f))));
        vring.kicks += 1;
        self.emit(PortEvent::Kicked { index: index as u16 });
        let started = self.start_or_fault(index);
        if started.is_ok() && self.vrings.iter().all(|v| v.kick.is_none() || v.running) {
            self.fault = None;
        }
        self.update_link();
        started.map_err(refused)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> CrateResult<()> {
        let index = u32::from(index);
        self.halt(index);
        self.vring(index)?.call = fd.map(OwnedFd::from);
        let started = self.start_or_fault(index);
        self.update_link();
        started.map_err(refused)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> CrateResult<()> {
        let index = u32::from(index);
        self.halt(index);
        self.vring(index)?.err = fd.map(OwnedFd::from);
        let started = self.start_or_fault(index);
        self.update_link();
        started.map_err(refused)
    }

    fn get_protocol_features(&mut self) -> CrateResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(self.config.protocol_features))
    }

    fn set_protocol_features(&mut self, bits: u64) -> CrateResult<()> {
        self.protocol_features = bits;
        Ok(())
    }

    fn get_queue_num(&mut self) -> CrateResult<u64> {
        Ok(u64::from(self.config.queue_pairs))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> CrateResult<()> {
        self.vring(index)?;
        self.enable_vring(index, enable);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> CrateResult<u64> {
        Ok(self.memory_slots())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> CrateResult<()> {
        let log = DirtyLog::map(&file, log.mmap_offset, log.mmap_size).map_err(|e| refused(e.to_string()))?;
        if let Some(memory) = &self.memory
            && !log.covers(memory)
        {
            return Err(refused(format!("a log of {} bytes does not cover guest memory", log.size())));
        }
        self.log_stale = false;
        self.log_deadline = None;
        self.log_wait_over = false;
        if self.has(features::LOG_ALL) {
            self.requiesce(|s| s.log = Some(Arc::clone(&log)));
        } else {
            self.log = Some(Arc::clone(&log));
        }
        self.emit(PortEvent::LogBase { log });
        Ok(())
    }

    // None of what follows is offered; the relay does not let these messages through.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> CrateResult<Vec<u8>> {
        Err(refused("not offered"))
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> CrateResult<()> {
        Err(refused("not offered"))
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> CrateResult<()> {
        Err(refused("not offered"))
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> CrateResult<File> {
        Err(refused("not offered"))
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> CrateResult<(VhostUserInflight, File)> {
        Err(refused("not offered"))
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> CrateResult<()> {
        Err(refused("not offered"))
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> CrateResult<Option<File>> {
        Err(refused("not offered"))
    }
    fn check_device_state(&mut self) -> CrateResult<()> {
        Err(refused("not offered"))
    }
    fn get_shmem_config(&mut self) -> CrateResult<VhostUserShMemConfig> {
        Err(refused("not offered"))
    }
}

/// True when `region` with `file` describes the mapped region `known`: the same addresses, and the same bytes of the same file.
fn is_same_region(known: &GuestRegion, region: &VhostUserSingleMemoryRegion, file: &File) -> bool {
    let place = (region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
    let inode = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
    (known.guest_addr(), known.user_addr(), known.size(), known.mmap_offset()) == place
        && inode(file).is_some_and(|i| inode(known.file()) == Some(i))
}

fn map_region(entry: &VhostUserMemoryRegion, file: File) -> CrateResult<Arc<GuestRegion>> {
    GuestRegion::map(RegionSpec {
        guest_addr: entry.guest_phys_addr,
        user_addr: entry.user_addr,
        size: entry.memory_size,
        mmap_offset: entry.mmap_offset,
        file,
    })
    .map_err(|e| refused(e.to_string()))
}
