//! DPDK's environment (EAL): started at most once per process, on a thread of its own.
//!
//! `rte_eal_init` pins the thread that calls it and makes it EAL's main thread, so none of the program's threads is
//! lent for that. The thread stays and becomes the *control lane*: device set-up, statistics and tear-down run there
//! one at a time, because DPDK's control functions are not safe to call at once. EAL cannot be stopped and
//! started again; it ends with the process.
#![allow(unsafe_code)] // Its job: calling rte_eal_init and friends.
use std::ffi::{CStr, CString};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::ThreadId;

use ferry_dpdk_sys as sys;
use serde::{Deserialize, Serialize};

use crate::{log, signals};

/// Where EAL takes its memory from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// Hugepages when enough of them are free at start, otherwise ordinary memory.
    #[default]
    Auto,
    /// Hugepages, in memory only (no files, several EALs side by side). Needed for good speed with physical NICs.
    Hugepages,
    /// Ordinary memory. Needs no preparation of the host and suits virtual devices.
    NoHuge,
}

/// How much DPDK writes to the log (RTE_LOG_*).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Errors only.
    Error,
    /// Warnings and worse.
    Warning,
    /// Normal but significant conditions and worse.
    #[default]
    Notice,
    /// Informational messages too.
    Info,
    /// Everything that libraries and drivers have to say.
    Debug,
}

impl LogLevel {
    const fn number(self) -> u32 {
        match self {
            LogLevel::Error => 4,
            LogLevel::Warning => 5,
            LogLevel::Notice => 6,
            LogLevel::Info => 7,
            LogLevel::Debug => 8,
        }
    }
}

/// How to start EAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EalConfig {
    /// Kind of memory.
    pub memory: Memory,
    /// Memory reserved at start and all there is (per NUMA node with hugepages), MiB. An uplink with default
    /// settings takes 20 to 30.
    pub memory_mb: u32,
    /// Scan the PCI bus. Off, no PCI NIC can be opened later. On, nothing is taken until an uplink asks for it by address.
    pub pci: bool,
    /// Further EAL arguments as they are (dpdk "EAL parameters"); for special hardware.
    pub extra_args: Vec<String>,
    /// Log level.
    pub log_level: LogLevel,
}

impl Default for EalConfig {
    fn default() -> Self {
        Self {
            memory: Memory::Auto,
            memory_mb: 256,
            pci: false,
            extra_args: Vec::new(),
            log_level: LogLevel::default(),
        }
    }
}

/// Why EAL is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EalError {
    /// The configuration cannot be meant.
    #[error("DPDK: {0}")]
    Config(String),
    /// `rte_eal_init` failed.
    #[error("DPDK's EAL does not start: {reason}{}. {advice}", logged(.log))]
    Init {
        /// `rte_strerror` of the error.
        reason: String,
        /// What DPDK logged.
        log: Vec<String>,
        /// What to do about it.
        advice: String,
    },
    /// It failed before, and DPDK allows one attempt per process.
    #[error(
        "DPDK's EAL failed before in this process and cannot be tried twice; restart the program after the first cause is gone: {0}"
    )]
    FailedBefore(Box<EalError>),
    /// It runs with other settings.
    #[error("DPDK's EAL already runs with other settings ({0}); restart the program to change them")]
    OtherConfig(String),
    /// The control lane is gone.
    #[error("DPDK's control thread has ended; restart the program")]
    LaneGone,
}

/// `: line; line`, or nothing.
pub(crate) fn logged(lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!(" ({})", lines.join("; ")) }
}

/// `rte_strerror`'s text for an errno value (either sign).
pub(crate) fn strerror(errno: i32) -> String {
    // SAFETY: rte_strerror returns a string in static or thread-local storage, copied before any other call.
    let text = unsafe { CStr::from_ptr(sys::rte_strerror(errno.saturating_abs())) };
    text.to_string_lossy().into_owned()
}

type Job = Box<dyn FnOnce() + Send>;

struct Inner {
    jobs: mpsc::Sender<Job>,
    lane: ThreadId,
    config: EalConfig,
    memory: Memory,
}

/// The running EAL. A handle; clones are the same EAL.
#[derive(Clone)]
pub struct Eal(Arc<Inner>);

impl fmt::Debug for Eal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eal").field("config", &self.0.config).field("memory", &self.0.memory).finish_non_exhaustive()
    }
}

static EAL: Mutex<Option<Result<Eal, EalError>>> = Mutex::new(None);

impl Eal {
    /// Starts EAL, or returns the one that already runs with the same settings. Takes 0.15 to 0.3 s the first time.
    ///
    /// # Errors
    /// [`EalError::Init`] with what DPDK logged and what to do; afterwards always [`EalError::FailedBefore`].
    /// [`EalError::OtherConfig`] when it runs with different settings.
    pub fn start(config: &EalConfig) -> Result<Eal, EalError> {
        let mut slot = EAL.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(Ok(eal)) if eal.0.config == *config => return Ok(eal.clone()),
            Some(Ok(eal)) => return Err(EalError::OtherConfig(format!("{:?}", eal.0.config))),
            Some(Err(e)) => return Err(EalError::FailedBefore(Box::new(e.clone()))),
            None => {}
        }
        // A configuration error is found before rte_eal_init: it may be corrected and tried again.
        let memory = resolve_memory(config);
        let args = arguments(config, memory)?;
        let result = start_lane(config, memory, args);
        *slot = Some(result.clone());
        result
    }

    /// The running EAL, if there is one.
    pub fn running() -> Option<Eal> {
        EAL.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|r| r.as_ref().ok().cloned())
    }

    /// The settings it runs with.
    pub fn config(&self) -> &EalConfig {
        &self.0.config
    }

    /// The kind of memory in use: never [`Memory::Auto`].
    pub fn memory(&self) -> Memory {
        self.0.memory
    }

    /// Version of the DPDK libraries in use, e.g. `DPDK 22.11.11`.
    pub fn version() -> String {
        // SAFETY: returns a static string.
        unsafe { CStr::from_ptr(sys::rte_version()) }.to_string_lossy().into_owned()
    }

    /// Runs `f` on the control lane and waits for it. On the lane itself it runs at once.
    pub(crate) fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> Result<R, EalError> {
        if std::thread::current().id() == self.0.lane {
            return Ok(f());
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            let _ = reply.send(f());
        });
        self.0.jobs.send(job).map_err(|_| EalError::LaneGone)?;
        // A job that panics drops `reply`.
        answer.recv().map_err(|_| EalError::LaneGone)
    }
}

fn start_lane(config: &EalConfig, memory: Memory, args: Vec<CString>) -> Result<Eal, EalError> {
    let (jobs, queue) = mpsc::channel::<Job>();
    let (reply, answer) = mpsc::sync_channel(1);
    let spawned = std::thread::Builder::new().name("ferry-dpdk".into()).spawn(move || {
        signals::block_all();
        signals::ignore_sigio();
        let (result, log) = log::collect(|| init(args));
        let failed = result.is_err();
        let _ = reply.send(result.map_err(|errno| (errno, log)));
        if failed {
            return;
        }
        for job in queue {
            // A panic ends that job only: its caller gets an error, the lane goes on.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        }
    });
    let lane = spawned.map_err(|e| EalError::Config(format!("no thread to be had: {e}")))?.thread().id();
    match answer.recv() {
        Ok(Ok(())) => Ok(Eal(Arc::new(Inner { jobs, lane, config: config.clone(), memory }))),
        Ok(Err((errno, log))) => {
            Err(EalError::Init { reason: strerror(errno), advice: advice(errno, &log, memory), log })
        }
        Err(_) => Err(EalError::LaneGone),
    }
}

/// Calls rte_eal_init on the calling thread; the error is an errno value.
fn init(args: Vec<CString>) -> Result<(), i32> {
    log::open()?;
    // EAL keeps pointers to its arguments: they stay for good.
    let args: &'static [CString] = args.leak();
    let mut argv: Vec<*mut core::ffi::c_char> = args.iter().map(|a| a.as_ptr().cast_mut()).collect();
    argv.push(core::ptr::null_mut());
    let argc = args.len() as core::ffi::c_int;
    let argv = argv.leak();
    // SAFETY: argc strings, NULL-terminated array, both alive for ever; called once per process (EAL's mutex).
    if unsafe { sys::rte_eal_init(argc, argv.as_mut_ptr()) } < 0 {
        // SAFETY: reads the thread's rte_errno.
        return Err(unsafe { sys::ferry_errno() });
    }
    Ok(())
}

/// Free hugepages of all sizes, MiB.
fn free_hugepages_mb() -> u64 {
    let Ok(dir) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return 0 };
    dir.flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let kb: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let free: u64 = std::fs::read_to_string(entry.path().join("free_hugepages")).ok()?.trim().parse().ok()?;
            Some(kb.saturating_mul(free) / 1024)
        })
        .sum()
}

fn resolve_memory(config: &EalConfig) -> Memory {
    match config.memory {
        Memory::Auto if free_hugepages_mb() >= u64::from(config.memory_mb) => Memory::Hugepages,
        Memory::Auto => Memory::NoHuge,
        given => given,
    }
}

/// NUMA nodes of the machine, as far as EAL knows any (RTE_MAX_NUMA_NODES is 32).
fn numa_nodes() -> usize {
    let nodes = std::fs::read_dir("/sys/devices/system/node").map_or(0, |dir| {
        dir.flatten()
            .filter(|e| {
                let name = e.file_name();
                name.to_str().and_then(|n| n.strip_prefix("node")).is_some_and(|n| n.parse::<u16>().is_ok())
            })
            .count()
    });
    nodes.clamp(1, 32)
}

/// CPUs that the process may use, as EAL writes sets: `0,1,5`.
fn allowed_cpus() -> String {
    // SAFETY: an all-zero set is valid; sched_getaffinity writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = core::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            libc::CPU_SET(0, &mut set);
        }
        set
    };
    let cpus: Vec<String> = (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .map(|cpu| cpu.to_string())
        .collect();
    cpus.join(",")
}

fn arguments(config: &EalConfig, memory: Memory) -> Result<Vec<CString>, EalError> {
    if !(16..=1 << 20).contains(&config.memory_mb) {
        return Err(EalError::Config(format!("memory_mb = {}: choose 16 to 1048576", config.memory_mb)));
    }
    let mut args = vec!["ferry".to_owned()];
    // One lcore that floats over all CPUs of the process: the lane needs no CPU of its own.
    args.push(format!("--lcores=0@({})", allowed_cpus()));
    args.push("--no-telemetry".into());
    args.push(format!("--log-level={}", config.log_level.number()));
    if config.log_level == LogLevel::Debug {
        args.push("--log-level=*:8".into());
    }
    match memory {
        Memory::NoHuge => args.extend(["--no-huge".into(), "--no-shconf".into()]),
        Memory::Hugepages | Memory::Auto => {
            args.push("--in-memory".into());
            // No growth beyond what is there at start, so that memory has a bound, and because EAL takes over SIGBUS for
            // the process while it maps further pages.
            let limits = vec![config.memory_mb.to_string(); numa_nodes()];
            args.push(format!("--socket-limit={}", limits.join(",")));
        }
    }
    args.extend(["-m".into(), config.memory_mb.to_string()]);
    if config.pci {
        // An allow-list with an address that does not exist: EAL takes no device by itself at start.
        args.extend(["-a".into(), "ffff:ff:1f.7".into()]);
    } else {
        args.extend(["--no-pci".into(), "--iova-mode=va".into()]);
    }
    args.extend(config.extra_args.iter().cloned());
    args.into_iter()
        .map(|a| CString::new(a).map_err(|_| EalError::Config("an EAL argument contains a NUL byte".into())))
        .collect()
}

fn advice(errno: i32, log: &[String], memory: Memory) -> String {
    let all = log.join("\n").to_lowercase();
    if all.contains("hugepage") || (memory == Memory::Hugepages && errno == libc::ENOMEM) {
        "Reserve hugepages (for example: echo 256 > /proc/sys/vm/nr_hugepages), ask for less memory_mb, or run without (memory = \"no-huge\")".into()
    } else if errno == libc::EACCES || errno == libc::EPERM || all.contains("permission") {
        "The process lacks the privilege: run it with the capabilities its unit file grants".into()
    } else if errno == libc::ENOMEM {
        "Ask for less memory_mb".into()
    } else if all.contains("unrecognized option") || all.contains("unknown option") || all.contains("invalid option") {
        "Check extra_args".into()
    } else {
        "Start again with log_level = \"debug\" for details".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(config: &EalConfig) -> Vec<String> {
        arguments(config, resolve_memory(config)).unwrap().into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    #[test]
    fn no_huge_never_comes_with_in_memory() {
        let args = text(&EalConfig { memory: Memory::NoHuge, ..Default::default() });
        assert!(args.contains(&"--no-huge".to_owned()) && args.contains(&"--no-shconf".to_owned()));
        assert!(!args.contains(&"--in-memory".to_owned()), "EAL refuses the combination");
        assert!(args.contains(&"--no-pci".to_owned()));
    }

    #[test]
    fn the_bus_is_scanned_only_on_demand_and_takes_nothing_by_itself() {
        let args = text(&EalConfig { memory: Memory::Hugepages, pci: true, ..Default::default() });
        assert!(args.contains(&"--in-memory".to_owned()) && !args.contains(&"--no-pci".to_owned()));
        assert!(args.windows(2).any(|w| w == ["-a", "ffff:ff:1f.7"]));
    }

    #[test]
    fn impossible_settings_are_refused_before_eal_sees_them() {
        assert!(matches!(
            arguments(&EalConfig { memory_mb: 0, ..Default::default() }, Memory::NoHuge),
            Err(EalError::Config(_))
        ));
        let nul = EalConfig { extra_args: vec!["a\0b".into()], ..Default::default() };
        assert!(matches!(arguments(&nul, Memory::NoHuge), Err(EalError::Config(_))));
    }

    #[test]
    fn the_process_has_cpus() {
        assert!(allowed_cpus().split(',').all(|c| c.parse::<u16>().is_ok()));
    }
}
