//! Ethernet devices: from devargs or a PCI address to running queues, and back.
//!
//! [`EthDevice`] is shared by everything that uses the device (queues, the uplink's handles). The last one to go stops
//! and closes it and frees its pool, on the control lane.
#![allow(unsafe_code)] // Its job: ethdev's control functions.
use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use ferry_dpdk_sys as sys;
use serde::Serialize;

use crate::eal::{Eal, EalError, logged, strerror};
use crate::log;
use crate::mempool::{CACHE_FLUSH_MBUFS, DATA_ROOM_BYTES, MAX_DATA_ROOM_BYTES, Mempool};
use crate::offload::DeviceOffloads;
use crate::queue::{RxQueue, RxSignal, TxQueue};

/// Ethernet header and up to two tags; what a frame has beyond the MTU, without FCS. Bytes.
const FRAME_OVERHEAD_BYTES: u32 = 14 + 8;
/// Smallest MTU (IPv4's least, RFC 791).
pub const MIN_MTU: u16 = 68;
/// Largest MTU: a frame of this size, with tags, still fits one of the largest mbufs.
pub const MAX_MTU: u16 = 65_000;
/// Longest devargs DPDK takes (EAL_DEV_MP_DEV_ARGS_MAX_LEN).
const MAX_DEVARGS_BYTES: usize = 127;
/// Threads whose mbuf caches a pool is sized for.
const CACHING_THREADS: u32 = 16;
/// Drivers whose `max_rx_pktlen` is only a nominal 1518 that they do not enforce: the limit is elsewhere
/// (af_packet: `framesz`, memif: none, buffers are chained).
const NOMINAL_LENGTH_DRIVERS: &[&str] = &["net_af_packet", "net_memif"];
/// Drivers whose segmentation is not to be used. net_tap (22.11) takes the segment *with headers* for the MTU, so that full-size
/// segments fail, and hands TCP over IPv6 to rte_gso, which does not know it.
const BROKEN_TSO_DRIVERS: &[&str] = &["net_tap"];

/// Why a device cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A setting that cannot be meant.
    #[error("device '{device}': {reason}")]
    Config {
        /// Device string as configured.
        device: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Another uplink has it.
    #[error("device '{device}' is already in use by another uplink")]
    AlreadyOpen {
        /// Device name.
        device: String,
    },
    /// DPDK refused.
    #[error("device '{device}': {step}: {reason}{}{}", logged(.log), advised(.advice))]
    Dpdk {
        /// Device name.
        device: String,
        /// What was being done.
        step: &'static str,
        /// `rte_strerror` of the error.
        reason: String,
        /// What DPDK logged.
        log: Vec<String>,
        /// What to do about it; empty if unknown.
        advice: String,
    },
    /// EAL is not there.
    #[error(transparent)]
    Eal(#[from] EalError),
}

fn advised(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(". {text}") }
}

/// What a device shall be. Zeros mean "choose".
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Devargs (`net_tap0,iface=up0`) or PCI address (`0000:3b:00.0[,...]`).
    pub device: String,
    /// Receive queues; 0: one.
    pub rx_queues: u16,
    /// Transmit queues; 0: as many as receive queues. More than the device has is no error.
    pub tx_queues: u16,
    /// Descriptors per receive queue; 0: 512. Rounded to what the device takes.
    pub rx_descriptors: u16,
    /// Descriptors per transmit queue; 0: 512. Rounded to what the device takes.
    pub tx_descriptors: u16,
    /// MTU, bytes, without Ethernet header and tags.
    pub mtu: u16,
    /// Size of the mbuf pool; 0: what the queues need and as much again.
    pub mbufs: u32,
    /// Receive frames for all addresses. A switch port wants that.
    pub promiscuous: bool,
}

/// Facts about an open device that do not change.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// DPDK's port number.
    pub port_id: u16,
    /// Device name, e.g. `net_tap0` or `0000:3b:00.0`.
    pub name: String,
    /// The devargs as given to DPDK (defaults added).
    pub devargs: String,
    /// Driver name, e.g. `net_tap`.
    pub driver: String,
    /// Kernel network device, for drivers that sit on one; 0 otherwise.
    pub if_index: u32,
    /// Receive queues.
    pub rx_queues: u16,
    /// Transmit queues.
    pub tx_queues: u16,
    /// Descriptors per receive queue.
    pub rx_descriptors: u16,
    /// Descriptors per transmit queue.
    pub tx_descriptors: u16,
    /// Offloads in use.
    pub offloads: DeviceOffloads,
    /// Hash functions that spread frames over the receive queues (RTE_ETH_RSS_*); 0: none, or by the device's own means.
    pub rss_hash_functions: u64,
    /// What is less than asked for.
    pub warnings: Vec<String>,
}

/// Link state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Carrier.
    pub up: bool,
    /// Speed in Mbit/s, where the device knows it.
    pub speed_mbps: Option<u32>,
    /// Full duplex.
    pub full_duplex: bool,
}

/// A device's own counters since it was opened (rte_eth_stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceStats {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames the hardware dropped because no receive descriptor was free: the switch was too slow (`imissed`).
    pub rx_missed: u64,
    /// Erroneous frames (`ierrors`).
    pub rx_errors: u64,
    /// Failed mbuf allocations: the pool is too small (`rx_nombuf`).
    pub rx_no_mbuf: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames that could not be sent (`oerrors`).
    pub tx_errors: u64,
}

/// An open, running device.
#[derive(Debug)]
pub struct EthDevice {
    eal: Eal,
    facts: DeviceFacts,
    mtu: AtomicU16,
    /// Taken when the device is closed, hence always there as long as anyone can look.
    running: Option<Running>,
}

/// What closing takes: the device first, then its buffers.
#[derive(Debug)]
struct Running {
    probed: Probed,
    pool: Mempool,
}

/// A device and its queues, each of which exists once.
#[derive(Debug)]
pub struct OpenDevice {
    /// The device.
    pub device: Arc<EthDevice>,
    /// Its receive queues, by number.
    pub rx: Vec<RxQueue>,
    /// Its transmit queues, by number.
    pub tx: Vec<TxQueue>,
}

/// What the control lane remembers between jobs.
#[derive(Default)]
struct LaneState {
    /// Names of open devices.
    open: Vec<String>,
    /// Pools whose device is gone while some of their mbufs are not (in another device's ring, for instance).
    orphans: Vec<Mempool>,
}

thread_local! {
    static LANE: RefCell<LaneState> = RefCell::default();
}

/// Frees orphaned pools that have all their mbufs back.
fn sweep_orphans() {
    LANE.with_borrow_mut(|lane| lane.orphans.retain(|pool| pool.in_use() > 0));
}

fn text(p: *const core::ffi::c_char) -> String {
    if p.is_null() {
        return String::new();
    }
    // SAFETY: DPDK's names are NUL-terminated strings that live as long as the device or driver; copied at once.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}

/// Device name and full devargs for a device string.
fn parse_device(device: &str) -> Result<(String, String), String> {
    if device.is_empty() {
        return Err("no device given: write devargs such as \"net_af_packet0,iface=eth1\" or a PCI address".into());
    }
    if device.bytes().any(|b| b <= b' ' || b >= 0x7f) {
        return Err("devargs contain a blank or a character that is not ASCII".into());
    }
    let (name, args) = device.split_once(',').map_or((device, None), |(n, a)| (n, Some(a)));
    let name = name.strip_prefix("vdev:").or_else(|| name.strip_prefix("pci:")).unwrap_or(name);
    if name.is_empty() || name.len() >= sys::RTE_ETH_NAME_MAX_LEN as usize {
        return Err("the device name (before the first comma) must have 1 to 63 characters".into());
    }
    // bus:device.function without domain, as lspci prints it.
    let short_pci = name.len() == 7 && name.as_bytes().get(2) == Some(&b':') && name.as_bytes().get(5) == Some(&b'.');
    let name = if short_pci { format!("0000:{name}") } else { name.to_owned() };
    let name = if is_pci_address(&name) { name.to_ascii_lowercase() } else { name };
    let devargs = args.map_or_else(|| name.clone(), |a| format!("{name},{a}"));
    Ok((name, devargs))
}

fn is_pci_address(name: &str) -> bool {
    let mut parts = name.split([':', '.']);
    let hex = |p: Option<&str>| p.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_hexdigit()));
    hex(parts.next()) && hex(parts.next()) && hex(parts.next()) && hex(parts.next()) && parts.next().is_none()
}

fn has_argument(devargs: &str, key: &str) -> bool {
    devargs.split(',').skip(1).any(|a| a.split_once('=').map_or(a, |(k, _)| k) == key)
}

/// Adds to af_packet's arguments what queues and MTU imply, unless given: its rings have fixed frame slots.
fn complete_af_packet(devargs: &mut String, config: &DeviceConfig) {
    let queues = config.rx_queues.max(config.tx_queues);
    if queues > 1 && !has_argument(devargs, "qpairs") {
        devargs.push_str(&format!(",qpairs={queues}"));
    }
    // TPACKET2 headers are below 100 bytes; the driver's default slot is 2048 bytes, 512 of them.
    let slot = (u32::from(config.mtu) + FRAME_OVERHEAD_BYTES + 100).next_power_of_two();
    if slot > 2048 && !has_argument(devargs, "framesz") {
        devargs.push_str(&format!(",framesz={slot}"));
        if !has_argument(devargs, "blocksz") {
            devargs.push_str(&format!(",blocksz={}", slot.max(4096)));
        }
    }
}

/// The value of af_packet's framesz, where given.
fn frame_slot_bytes(devargs: &str) -> Option<u32> {
    devargs.split(',').find_map(|a| a.strip_prefix("framesz=")).and_then(|v| v.parse().ok())
}

/// Text of an errno value. Many drivers return a bare -1, which is not to be mistaken for EPERM.
fn reason(errno: i32) -> String {
    if errno.abs() == 1 { "the driver refused".into() } else { strerror(errno) }
}

/// A failed call: step, errno value, advice.
struct Failure {
    step: &'static str,
    errno: i32,
    advice: String,
}

fn check(step: &'static str, ret: i32) -> Result<(), Failure> {
    if ret >= 0 { Ok(()) } else { Err(Failure { step, errno: -ret, advice: String::new() }) }
}

/// A probed port.
#[derive(Debug)]
struct Probed {
    port_id: u16,
    bus: String,
    name: String,
}

impl Probed {
    /// Stops, closes and removes the device. On the control lane.
    fn remove(&self) {
        // SAFETY: the port is ours until rte_eth_dev_close; stopping a stopped port is no error. Nobody polls it any more.
        unsafe {
            sys::rte_eth_dev_stop(self.port_id);
            sys::rte_eth_dev_close(self.port_id);
        }
        if let (Ok(bus), Ok(name)) = (CString::new(self.bus.as_str()), CString::new(self.name.as_str())) {
            // SAFETY: two strings that outlive the call. A driver that removed the device on close has none to remove now.
            log::quietly(|| unsafe { sys::rte_eal_hotplug_remove(bus.as_ptr(), name.as_ptr()) });
        }
    }
}

fn ports() -> Vec<u16> {
    let mut found = Vec::new();
    let mut port = 0u16;
    loop {
        // SAFETY: plain query; ends at RTE_MAX_ETHPORTS.
        let next = unsafe { sys::rte_eth_find_next(port) };
        if u32::from(next) >= sys::RTE_MAX_ETHPORTS {
            return found;
        }
        found.push(next);
        port = next + 1;
    }
}

fn device_info(port_id: u16) -> Result<sys::rte_eth_dev_info, Failure> {
    // SAFETY: all-zero is valid for this structure of integers and pointers, and DPDK fills it.
    let mut info: sys::rte_eth_dev_info = unsafe { core::mem::zeroed() };
    // SAFETY: as above.
    check("reading its capabilities", unsafe { sys::rte_eth_dev_info_get(port_id, &mut info) })?;
    Ok(info)
}

fn probe(name: &str, devargs: &str) -> Result<Probed, Failure> {
    let step = "attaching it";
    let before = ports();
    let text_args = CString::new(devargs).map_err(|_| Failure { step, errno: libc::EINVAL, advice: String::new() })?;
    // SAFETY: a string that outlives the call, which copies it.
    let ret = unsafe { sys::rte_dev_probe(text_args.as_ptr()) };
    if ret < 0 {
        let advice = if is_pci_address(name) {
            "Check the address (lspci), that the NIC is bound to vfio-pci (dpdk-devbind.py), and that a driver for it is installed"
        } else {
            "Check the driver's name and arguments, that the interface it names exists (or, for net_tap, does not), and the process's privileges"
        };
        return Err(Failure { step, errno: -ret, advice: advice.into() });
    }
    let mut new = ports().into_iter().filter(|p| !before.contains(p));
    let Some(port_id) = new.next() else {
        return Err(Failure { step, errno: libc::ENODEV, advice: "The driver made no Ethernet port of it".into() });
    };
    let mut probed = Probed { port_id, bus: "vdev".into(), name: name.into() };
    if is_pci_address(name) {
        probed.bus = "pci".into();
    }
    if let Ok(info) = device_info(port_id)
        && !info.device.is_null()
    {
        // SAFETY: the device of a probed port and its bus are valid.
        unsafe {
            probed.bus = text(sys::rte_bus_name(sys::rte_dev_bus(info.device)));
            probed.name = text(sys::rte_dev_name(info.device));
        }
    }
    Ok(probed)
}

/// Rounds a wished number of descriptors to what the device takes.
fn descriptors(wish: u16, limits: &sys::rte_eth_desc_lim) -> u16 {
    let mut n = if wish == 0 { 512 } else { wish };
    if limits.nb_max > 0 {
        n = n.min(limits.nb_max);
    }
    n = n.max(limits.nb_min);
    if limits.nb_align > 1 {
        let down = n - n % limits.nb_align;
        n = if down < limits.nb_min.max(1) { n.div_ceil(limits.nb_align) * limits.nb_align } else { down };
    }
    n.max(1)
}

struct Opened {
    probed: Probed,
    facts: DeviceFacts,
    pool: Mempool,
    signals: Vec<RxSignal>,
}

/// Everything between "probed" and "running". On the control lane. The pool is left in `pool_slot` also on failure:
/// the device may hold mbufs until it is closed.
fn set_up(
    probed: &Probed,
    devargs: &str,
    config: &DeviceConfig,
    memory_mb: u32,
    pool_slot: &mut Option<Mempool>,
) -> Result<(DeviceFacts, Vec<RxSignal>), Failure> {
    let port = probed.port_id;
    let info = device_info(port)?;
    let driver = text(info.driver_name);
    let mut warnings = Vec::new();
    let invalid = |step, advice: String| Failure { step, errno: libc::EINVAL, advice };

    // Queues.
    let rx_queues = config.rx_queues.max(1);
    if rx_queues > info.max_rx_queues {
        return Err(invalid(
            "setting up its receive queues",
            format!(
                "{rx_queues} receive queues are asked for, {} has {}: lower rx_queues",
                probed.name, info.max_rx_queues
            ),
        ));
    }
    let wished_tx = if config.tx_queues == 0 { rx_queues } else { config.tx_queues };
    // net_tap's queues are pairs.
    let tx_queues = if driver == "net_tap" { rx_queues } else { wished_tx.min(info.max_tx_queues).max(1) };
    if tx_queues < config.tx_queues {
        warnings.push(format!("{tx_queues} transmit queues instead of {}: PMD threads share them", config.tx_queues));
    }
    let rx_descriptors = descriptors(config.rx_descriptors, &info.rx_desc_lim);
    let tx_descriptors = descriptors(config.tx_descriptors, &info.tx_desc_lim);

    // MTU.
    let overhead = if info.max_mtu != u16::MAX && info.max_rx_pktlen > u32::from(info.max_mtu) {
        info.max_rx_pktlen - u32::from(info.max_mtu)
    } else {
        18
    };
    let device_mtu = info.max_mtu.min(u16::try_from(info.max_rx_pktlen.saturating_sub(overhead)).unwrap_or(u16::MAX));
    let nominal = NOMINAL_LENGTH_DRIVERS.contains(&driver.as_str());
    if config.mtu > device_mtu && !nominal || config.mtu < info.min_mtu {
        let help =
            if driver == "net_tap" { "; net_af_packet, net_memif and physical NICs take jumbo frames" } else { "" };
        return Err(invalid(
            "setting its MTU",
            format!(
                "The MTU {} is not between {} and {device_mtu}, which {driver} takes{help}",
                config.mtu, info.min_mtu
            ),
        ));
    }

    // Offloads.
    let rx_csum_needed = sys::FERRY_RX_OFFLOAD_UDP_CKSUM | sys::FERRY_RX_OFFLOAD_TCP_CKSUM;
    let rx_csum_bits = info.rx_offload_capa & (rx_csum_needed | sys::FERRY_RX_OFFLOAD_IPV4_CKSUM);
    let tx_csum_bits = sys::FERRY_TX_OFFLOAD_UDP_CKSUM | sys::FERRY_TX_OFFLOAD_TCP_CKSUM;
    let rx_has = |bits: u64| info.rx_offload_capa & bits == bits;
    let tx_has = |bits: u64| info.tx_offload_capa & bits == bits;
    let tx_multi_segment = tx_has(sys::FERRY_TX_OFFLOAD_MULTI_SEGS);
    let tx_csum = tx_has(tx_csum_bits);
    let tso_ip_csum = tx_has(sys::FERRY_TX_OFFLOAD_IPV4_CKSUM);
    // virtio segments without recomputing IPv4 header checksums of unsegmented frames; other drivers need the capability.
    let tso = tx_csum
        && tx_multi_segment
        && tx_has(sys::FERRY_TX_OFFLOAD_TCP_TSO)
        && (tso_ip_csum || driver.starts_with("net_virtio"))
        && !BROKEN_TSO_DRIVERS.contains(&driver.as_str());
    let offloads = DeviceOffloads {
        tx_csum,
        tso4: tso,
        tso6: tso,
        tso_ip_csum: tso && tso_ip_csum,
        rx_csum: rx_has(rx_csum_needed),
        tx_multi_segment,
        rx_scatter: rx_has(sys::FERRY_RX_OFFLOAD_SCATTER),
    };
    let wanted = |on: bool, bits: u64| if on { bits } else { 0 };
    let rx_offloads =
        wanted(offloads.rx_csum, rx_csum_bits) | wanted(offloads.rx_scatter, sys::FERRY_RX_OFFLOAD_SCATTER);
    let tx_offloads = wanted(tx_csum, tx_csum_bits)
        | wanted(tso, sys::FERRY_TX_OFFLOAD_TCP_TSO)
        | wanted(offloads.tso_ip_csum, sys::FERRY_TX_OFFLOAD_IPV4_CKSUM)
        | wanted(tx_multi_segment, sys::FERRY_TX_OFFLOAD_MULTI_SEGS);

    // RSS.
    let mut rss_hash_functions = 0;
    if rx_queues > 1 {
        rss_hash_functions = info.flow_type_rss_offloads
            & (sys::FERRY_RSS_IP | sys::FERRY_RSS_TCP | sys::FERRY_RSS_UDP | sys::FERRY_RSS_SCTP);
        if rss_hash_functions == 0 {
            warnings
                .push(format!("{driver} has no RSS: it spreads frames over its {rx_queues} queues by its own means"));
        }
    }

    // Pool: chains where the device does chains, otherwise buffers for the longest frame.
    let frame_bytes = u32::from(config.mtu) + FRAME_OVERHEAD_BYTES;
    let mut data_room = u32::from(DATA_ROOM_BYTES);
    if !(offloads.rx_scatter && tx_multi_segment) {
        data_room = data_room.max(frame_bytes.next_multiple_of(64));
        if driver == "net_af_packet" {
            data_room = data_room.max(frame_slot_bytes(devargs).unwrap_or(0));
        }
    }
    let Ok(data_room) = u16::try_from(data_room.min(u32::from(MAX_DATA_ROOM_BYTES))) else {
        return Err(invalid("sizing its buffers", String::new()));
    };
    let needed = u32::from(rx_queues) * u32::from(rx_descriptors)
        + u32::from(tx_queues) * u32::from(tx_descriptors)
        + CACHE_FLUSH_MBUFS;
    let mbufs = if config.mbufs == 0 { needed * 2 + CACHING_THREADS * CACHE_FLUSH_MBUFS } else { config.mbufs };
    if mbufs < needed {
        return Err(invalid(
            "creating its mbuf pool",
            format!("{mbufs} mbufs are asked for, the queues alone take {needed}: raise mbufs or leave it 0"),
        ));
    }
    // SAFETY: plain query on our port.
    let socket = unsafe { sys::rte_eth_dev_socket_id(port) };
    // An mbuf's own structure, headroom and the pool's bookkeeping come on top of the room for data.
    let pool_mb = u64::from(mbufs) * (u64::from(data_room) + 320) / (1 << 20) + 1;
    let no_memory = |errno| Failure {
        step: "creating its mbuf pool",
        errno,
        advice: format!(
            "{mbufs} mbufs take {pool_mb} MiB of DPDK's {memory_mb}: raise memory_mb, or lower mbufs or the descriptors"
        ),
    };
    // Not even tried where it cannot succeed: it would take all there is from others for a while.
    if pool_mb > u64::from(memory_mb) {
        return Err(no_memory(libc::ENOMEM));
    }
    let pool = Mempool::create(mbufs, data_room, socket).map_err(no_memory)?;
    let pool: &Mempool = pool_slot.insert(pool);

    // Configure and start; with receive interrupts if the device can, else without.
    let rx_mtu = if nominal { config.mtu.min(device_mtu) } else { config.mtu };
    let request = Request {
        port,
        rx_queues,
        tx_queues,
        rx_descriptors,
        tx_descriptors,
        rx_mtu,
        rx_offloads,
        tx_offloads,
        rss_hash_functions,
    };
    // Not with virtual devices other than net_tap: their descriptors come and go with the peer (net_vhost), and net_virtio_user
    // leaves its interrupt callback behind when it is closed, which EAL's interrupt thread then calls (seen as a crash).
    let interrupts = driver == "net_tap" || probed.bus == "pci";
    if !interrupts || log::quietly(|| request.start(&info, pool, true)).is_err() {
        request.start(&info, pool, false)?;
    }

    // A kernel device has an MTU of its own.
    if driver == "net_af_packet"
        && config.mtu > device_mtu
        && let Err(e) = crate::netdev::set_mtu(info.if_index, config.mtu)
    {
        warnings.push(format!("the MTU of the interface behind it could not be set to {}: {e}", config.mtu));
    }
    if driver == "net_tap" && log::quietly(|| set_device_mtu(port, config.mtu)).is_err() {
        warnings.push(format!("the MTU of the interface could not be set to {}", config.mtu));
    }
    if config.promiscuous {
        // SAFETY: our port.
        let ret = unsafe { sys::rte_eth_promiscuous_enable(port) };
        // Devices without the notion see everything.
        if ret < 0 && ret != -libc::ENOTSUP {
            warnings.push(format!("promiscuous mode was refused: {}", reason(ret)));
        }
    }
    let signals: Vec<RxSignal> =
        (0..rx_queues).map(|q| if interrupts { log::quietly(|| rx_signal(port, q)) } else { RxSignal::None }).collect();
    for signal in &signals {
        if let RxSignal::Level(fd) = signal {
            crate::signals::direct_to_sink(*fd);
        }
    }
    let facts = DeviceFacts {
        port_id: port,
        name: probed.name.clone(),
        devargs: devargs.to_owned(),
        driver,
        if_index: info.if_index,
        rx_queues,
        tx_queues,
        rx_descriptors,
        tx_descriptors,
        offloads,
        rss_hash_functions,
        warnings,
    };
    Ok((facts, signals))
}

fn set_device_mtu(port: u16, mtu: u16) -> Result<(), i32> {
    // SAFETY: our port.
    match unsafe { sys::rte_eth_dev_set_mtu(port, mtu) } {
        0 => Ok(()),
        ret => Err(-ret),
    }
}

/// One attempt to configure and start.
struct Request {
    port: u16,
    rx_queues: u16,
    tx_queues: u16,
    rx_descriptors: u16,
    tx_descriptors: u16,
    rx_mtu: u16,
    rx_offloads: u64,
    tx_offloads: u64,
    rss_hash_functions: u64,
}

impl Request {
    fn start(&self, info: &sys::rte_eth_dev_info, pool: &Mempool, interrupts: bool) -> Result<(), Failure> {
        // SAFETY: all-zero is the documented default of this structure of integers and pointers.
        let mut conf: sys::rte_eth_conf = unsafe { core::mem::zeroed() };
        conf.rxmode.mtu = u32::from(self.rx_mtu);
        conf.rxmode.offloads = self.rx_offloads;
        conf.txmode.offloads = self.tx_offloads;
        conf.intr_conf.set_rxq(u32::from(interrupts));
        if self.rss_hash_functions != 0 {
            conf.rxmode.mq_mode = sys::RTE_ETH_MQ_RX_RSS;
            conf.rx_adv_conf.rss_conf.rss_hf = self.rss_hash_functions;
        }
        // SAFETY: a stopped port of ours; the structure is copied.
        let configured = unsafe { sys::rte_eth_dev_configure(self.port, self.rx_queues, self.tx_queues, &conf) };
        check("configuring it", configured).map_err(|mut f| {
            if self.rss_hash_functions != 0 {
                f.advice = format!(
                    "It was asked for {} receive queues with RSS (hash functions {:#x}): try rx_queues = 1",
                    self.rx_queues, self.rss_hash_functions
                );
            }
            f
        })?;
        // SAFETY: plain query.
        let socket = unsafe { sys::rte_eth_dev_socket_id(self.port) }.max(0) as u32;
        let mut rx_conf = info.default_rxconf;
        rx_conf.offloads = 0; // port-wide ones apply
        for queue in 0..self.rx_queues {
            // SAFETY: configured port, queue in range; the pool outlives the device (EthDevice closes it first).
            let ret = unsafe {
                sys::rte_eth_rx_queue_setup(self.port, queue, self.rx_descriptors, socket, &rx_conf, pool.as_ptr())
            };
            check("setting up a receive queue", ret)?;
        }
        let mut tx_conf = info.default_txconf;
        tx_conf.offloads = 0;
        for queue in 0..self.tx_queues {
            // SAFETY: as above.
            let ret = unsafe { sys::rte_eth_tx_queue_setup(self.port, queue, self.tx_descriptors, socket, &tx_conf) };
            check("setting up a transmit queue", ret)?;
        }
        // SAFETY: configured with all queues set up.
        check("starting it", unsafe { sys::rte_eth_dev_start(self.port) })
    }
}

/// How queue `queue` signals work. The port must be started.
fn rx_signal(port: u16, queue: u16) -> RxSignal {
    // SAFETY: our port, queue in range.
    let fd = unsafe { sys::rte_eth_dev_rx_intr_ctl_q_get_fd(port, queue) };
    // DPDK leaves unset entries 0 or -1; 0 to 2 are the standard streams.
    if fd <= 2 {
        return RxSignal::None;
    }
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
    if target.to_string_lossy().contains("eventfd") {
        // SAFETY: our port, queue in range. Disarmed again: the queue is polled until its thread wants to sleep.
        let usable = unsafe {
            sys::rte_eth_dev_rx_intr_enable(port, queue) == 0 && sys::rte_eth_dev_rx_intr_disable(port, queue) == 0
        };
        if usable { RxSignal::Event(fd) } else { RxSignal::None }
    } else {
        RxSignal::Level(fd)
    }
}

fn open_on_lane(name: &str, devargs: &str, config: &DeviceConfig, memory_mb: u32) -> Result<Opened, DeviceError> {
    sweep_orphans();
    let taken = || DeviceError::AlreadyOpen { device: name.to_owned() };
    if LANE.with_borrow(|lane| lane.open.iter().any(|n| n == name)) {
        return Err(taken());
    }
    let (result, log) = log::collect(|| {
        let probed = probe(name, devargs)?;
        let mut pool = None;
        match set_up(&probed, devargs, config, memory_mb, &mut pool) {
            Ok((facts, signals)) => match pool {
                Some(pool) => Ok(Opened { probed, facts, pool, signals }),
                None => Err(Failure { step: "creating its mbuf pool", errno: libc::ENOMEM, advice: String::new() }),
            },
            Err(failure) => {
                probed.remove();
                pool.into_iter().for_each(retire);
                Err(failure)
            }
        }
    });
    match result {
        Ok(opened) => {
            LANE.with_borrow_mut(|lane| lane.open.push(opened.probed.name.clone()));
            Ok(opened)
        }
        Err(Failure { errno: libc::EEXIST, .. }) => Err(taken()),
        Err(Failure { step, errno, advice }) => {
            Err(DeviceError::Dpdk { device: devargs.to_owned(), step, reason: reason(errno), log, advice })
        }
    }
}

/// Frees a pool whose device is closed, as soon as all its mbufs are back.
fn retire(pool: Mempool) {
    let out = pool.in_use();
    if out > 0 {
        tracing::warn!(
            mbufs = out,
            "a closed device's packets are still elsewhere; their memory is kept until they return"
        );
        LANE.with_borrow_mut(|lane| lane.orphans.push(pool));
    }
}

impl EthDevice {
    /// Attaches, configures and starts a device. The queues come with it, each once.
    ///
    /// # Errors
    /// With the step that failed, DPDK's reason and log, and what to do. Nothing is left behind.
    pub fn open(eal: &Eal, config: &DeviceConfig) -> Result<OpenDevice, DeviceError> {
        let refuse = |reason: String| DeviceError::Config { device: config.device.clone(), reason };
        let (name, mut devargs) = parse_device(&config.device).map_err(refuse)?;
        if !(MIN_MTU..=MAX_MTU).contains(&config.mtu) {
            return Err(refuse(format!("mtu = {}: choose {MIN_MTU} to {MAX_MTU}", config.mtu)));
        }
        if is_pci_address(&name) && !eal.config().pci {
            return Err(refuse("EAL was started without PCI: switch PCI on in DPDK's settings and restart".into()));
        }
        if name.starts_with("net_af_packet") || name.starts_with("eth_af_packet") {
            complete_af_packet(&mut devargs, config);
        }
        if devargs.len() > MAX_DEVARGS_BYTES {
            return Err(refuse(format!("devargs are longer than {MAX_DEVARGS_BYTES} bytes: {devargs}")));
        }
        let wanted = config.clone();
        let memory_mb = eal.config().memory_mb;
        let Opened { probed, facts, pool, signals } =
            eal.run(move || open_on_lane(&name, &devargs, &wanted, memory_mb))??;
        let tx_queues = facts.tx_queues;
        let device = Arc::new(Self {
            eal: eal.clone(),
            facts,
            mtu: AtomicU16::new(config.mtu),
            running: Some(Running { probed, pool }),
        });
        let rx = (0..).zip(signals).map(|(queue, signal)| RxQueue::new(Arc::clone(&device), queue, signal)).collect();
        let tx = (0..tx_queues).map(|queue| TxQueue::new(Arc::clone(&device), queue)).collect();
        Ok(OpenDevice { device, rx, tx })
    }

    /// What does not change.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// The device's packet memory.
    pub(crate) fn pool(&self) -> Option<&Mempool> {
        self.running.as_ref().map(|r| &r.pool)
    }

    /// MTU, bytes, without Ethernet header and tags.
    pub fn mtu(&self) -> u16 {
        self.mtu.load(Relaxed)
    }

    /// Changes the MTU of the running device. Larger than at opening only where the buffers of that time suffice.
    ///
    /// # Errors
    /// When the device refuses; it may want to be opened anew for that.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), DeviceError> {
        let error = |reason: String, log, advice: &str| DeviceError::Dpdk {
            device: self.facts.name.clone(),
            step: "setting its MTU",
            reason,
            log,
            advice: advice.into(),
        };
        let chains = self.facts.offloads.rx_scatter && self.facts.offloads.tx_multi_segment;
        let room = self.pool().map_or(0, |p| u32::from(p.data_room_bytes()));
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) || (!chains && u32::from(mtu) + FRAME_OVERHEAD_BYTES > room) {
            return Err(error(
                format!("{mtu} bytes do not fit its buffers"),
                Vec::new(),
                "Close the uplink and open it with the new MTU",
            ));
        }
        let port = self.facts.port_id;
        let if_index = self.facts.if_index;
        let by_kernel = NOMINAL_LENGTH_DRIVERS.contains(&self.facts.driver.as_str());
        let (result, log) = self.eal.run(move || {
            log::collect(|| {
                if by_kernel && if_index != 0 {
                    crate::netdev::set_mtu(if_index, mtu).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
                } else if by_kernel {
                    Ok(())
                } else {
                    set_device_mtu(port, mtu)
                }
            })
        })?;
        result.map_err(|errno| {
            error(
                reason(errno),
                log,
                "If the device must be stopped for it, close the uplink and open it with the new MTU",
            )
        })?;
        self.mtu.store(mtu, Relaxed);
        Ok(())
    }

    fn refused(&self, step: &'static str, errno: i32) -> DeviceError {
        DeviceError::Dpdk {
            device: self.facts.name.clone(),
            step,
            reason: reason(errno),
            log: Vec::new(),
            advice: String::new(),
        }
    }

    /// Link state now; does not wait for auto-negotiation.
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn link(&self) -> Result<Link, DeviceError> {
        let port = self.facts.port_id;
        let (ret, link) = self.eal.run(move || {
            let mut link = sys::rte_eth_link::default();
            // SAFETY: our port; the structure is filled.
            let ret = unsafe { sys::rte_eth_link_get_nowait(port, &mut link) };
            (ret, link)
        })?;
        if ret < 0 {
            return Err(self.refused("reading its link state", ret));
        }
        let known = link.link_speed != 0 && link.link_speed != sys::FERRY_SPEED_UNKNOWN;
        Ok(Link {
            up: link.link_status() != 0,
            speed_mbps: known.then_some(link.link_speed),
            full_duplex: link.link_duplex() != 0,
        })
    }

    /// The MAC address.
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn mac(&self) -> Result<[u8; 6], DeviceError> {
        let port = self.facts.port_id;
        let (ret, mac) = self.eal.run(move || {
            let mut mac = sys::rte_ether_addr::default();
            // SAFETY: our port; the structure is filled.
            let ret = unsafe { sys::rte_eth_macaddr_get(port, &mut mac) };
            (ret, mac)
        })?;
        if ret < 0 { Err(self.refused("reading its MAC address", ret)) } else { Ok(mac.addr_bytes) }
    }

    /// Whether it receives frames for all addresses.
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn promiscuous(&self) -> Result<bool, DeviceError> {
        let port = self.facts.port_id;
        // SAFETY: our port.
        let ret = self.eal.run(move || unsafe { sys::rte_eth_promiscuous_get(port) })?;
        if ret < 0 { Err(self.refused("reading its promiscuous mode", ret)) } else { Ok(ret == 1) }
    }

    /// Switches promiscuous mode.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError> {
        let port = self.facts.port_id;
        let ret = self.eal.run(move || {
            // SAFETY: our port.
            unsafe { if on { sys::rte_eth_promiscuous_enable(port) } else { sys::rte_eth_promiscuous_disable(port) } }
        })?;
        if ret < 0 { Err(self.refused("setting its promiscuous mode", ret)) } else { Ok(()) }
    }

    /// The device's counters.
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn stats(&self) -> Result<DeviceStats, DeviceError> {
        let port = self.facts.port_id;
        let (ret, s) = self.eal.run(move || {
            let mut stats = sys::rte_eth_stats::default();
            // SAFETY: our port; the structure is filled.
            let ret = unsafe { sys::rte_eth_stats_get(port, &mut stats) };
            (ret, stats)
        })?;
        if ret < 0 {
            return Err(self.refused("reading its counters", ret));
        }
        Ok(DeviceStats {
            rx_frames: s.ipackets,
            rx_bytes: s.ibytes,
            rx_missed: s.imissed,
            rx_errors: s.ierrors,
            rx_no_mbuf: s.rx_nombuf,
            tx_frames: s.opackets,
            tx_bytes: s.obytes,
            tx_errors: s.oerrors,
        })
    }

    /// All counters the driver has, by its own names (rte_eth_xstats).
    ///
    /// # Errors
    /// When the device cannot be asked.
    pub fn extended_stats(&self) -> Result<Vec<(String, u64)>, DeviceError> {
        let port = self.facts.port_id;
        self.eal
            .run(move || extended_stats(port))?
            .map_err(|errno| self.refused("reading its extended counters", errno))
    }
}

fn extended_stats(port: u16) -> Result<Vec<(String, u64)>, i32> {
    // SAFETY: with no room given, the call returns how many there are.
    let count = unsafe { sys::rte_eth_xstats_get_names(port, core::ptr::null_mut(), 0) };
    let len = usize::try_from(count).map_err(|_| -count)?;
    let mut names = vec![sys::rte_eth_xstat_name { name: [0; sys::RTE_ETH_XSTATS_NAME_SIZE as usize] }; len];
    let mut values = vec![sys::rte_eth_xstat::default(); len];
    // SAFETY: room for `len` entries each.
    let (n, m) = unsafe {
        (
            sys::rte_eth_xstats_get_names(port, names.as_mut_ptr(), len as u32),
            sys::rte_eth_xstats_get(port, values.as_mut_ptr(), len as u32),
        )
    };
    if n < 0 || m < 0 {
        return Err(-n.min(m));
    }
    // Where the set changed in between, the calls return more than there was room for and fill nothing.
    if n as usize > len || m as usize > len {
        return Ok(Vec::new());
    }
    Ok(values
        .iter()
        .take(m as usize)
        .filter_map(|v| {
            let name: Vec<u8> =
                names.get(usize::try_from(v.id).ok()?)?.name.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
            Some((String::from_utf8_lossy(&name).into_owned(), v.value))
        })
        .collect())
}

impl Drop for EthDevice {
    /// Stops, closes and removes the device and waits for that: no queue is left, since each holds the device.
    fn drop(&mut self) {
        let Some(Running { probed, pool }) = self.running.take() else { return };
        let _ = self.eal.run(move || {
            probed.remove();
            LANE.with_borrow_mut(|lane| lane.open.retain(|n| *n != probed.name));
            retire(pool);
            sweep_orphans();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mtu: u16, queues: u16) -> DeviceConfig {
        DeviceConfig {
            device: String::new(),
            rx_queues: queues,
            tx_queues: 0,
            rx_descriptors: 0,
            tx_descriptors: 0,
            mtu,
            mbufs: 0,
            promiscuous: true,
        }
    }

    #[test]
    fn device_strings() {
        let ok = |s: &str| parse_device(s).unwrap();
        assert_eq!(ok("net_tap0,iface=x"), ("net_tap0".into(), "net_tap0,iface=x".into()));
        assert_eq!(ok("vdev:net_null0").0, "net_null0");
        assert_eq!(ok("3b:00.1"), ("0000:3b:00.1".into(), "0000:3b:00.1".into()));
        assert_eq!(ok("0000:3b:00.1,a=b").1, "0000:3b:00.1,a=b");
        for bad in ["", ",iface=x", "net tap", "net_tap0,iface=x\0", "net_tap0\n", &"x".repeat(64)] {
            assert!(parse_device(bad).is_err(), "{bad:?}");
        }
        assert!(is_pci_address("0000:3b:00.0") && !is_pci_address("net_tap0") && !is_pci_address("0000:3b:00"));
    }

    #[test]
    fn af_packet_gets_slots_for_its_frames() {
        let complete = |given: &str, mtu, queues| {
            let mut devargs = given.to_owned();
            complete_af_packet(&mut devargs, &config(mtu, queues));
            devargs
        };
        assert_eq!(complete("net_af_packet0,iface=e", 1500, 1), "net_af_packet0,iface=e");
        assert_eq!(complete("net_af_packet0,iface=e", 1500, 2), "net_af_packet0,iface=e,qpairs=2");
        assert_eq!(complete("net_af_packet0,iface=e", 9000, 1), "net_af_packet0,iface=e,framesz=16384,blocksz=16384");
        let own = "net_af_packet0,iface=e,framesz=65536,blocksz=65536";
        assert_eq!(complete(own, 9000, 1), own);
        assert_eq!(frame_slot_bytes(own), Some(65536));
    }

    #[test]
    fn descriptors_stay_within_what_the_device_takes() {
        let lim = |nb_max, nb_min, nb_align| sys::rte_eth_desc_lim { nb_max, nb_min, nb_align, ..Default::default() };
        assert_eq!(descriptors(0, &lim(4096, 64, 32)), 512);
        assert_eq!(descriptors(100, &lim(4096, 64, 32)), 96);
        assert_eq!(descriptors(9000, &lim(4096, 64, 32)), 4096);
        assert_eq!(descriptors(1, &lim(4096, 64, 32)), 64);
        assert_eq!(descriptors(10, &lim(4096, 0, 32)), 32);
        assert_eq!(descriptors(7, &lim(0, 0, 0)), 7);
    }
}
