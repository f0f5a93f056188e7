//! Threads: pinning, priority, and how long the kernel kept them off their core.
use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::fs;

/// Pins the calling thread to a core.
///
/// # Errors
/// When there is no such core.
pub fn pin_self(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("pinning to core {core}"))
}

/// The calling thread's id.
pub fn own_id() -> u32 {
    nix::unistd::gettid().as_raw().unsigned_abs()
}

/// How urgent a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// As everything else.
    Ordinary,
    /// Before everything ordinary: what is measured. The kernel gives the rest 50 ms of each second all the same.
    Measured,
    /// Before what is measured: a switch's other threads, which seldom run, but may hold a lock that its PMD thread waits for.
    Helper,
    /// Before all of these: the probe.
    Probe,
}

/// Sets how urgent a thread is (0: the calling one). Needs root; without it the figures are noisier, no more, so a refusal
/// is no error. What such a thread starts is ordinary again.
#[allow(unsafe_code)] // One system call that nix does not wrap.
pub fn set_urgency(thread: u32, urgency: Urgency) {
    let (policy, priority) = match urgency {
        Urgency::Ordinary => (libc::SCHED_OTHER, 0),
        Urgency::Measured => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1),
        Urgency::Helper => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 2),
        Urgency::Probe => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 10),
    };
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter lives during the call.
    unsafe { libc::sched_setscheduler(thread.cast_signed(), policy, &raw const parameter) };
}

/// Threads of a process: those that may run on exactly this core, and the others.
///
/// # Errors
/// When the process is gone.
pub fn threads(pid: u32, core: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut on, mut others) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/task/{id}/status")) else { continue };
        let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).map(str::trim);
        let list = if allowed == Some(core.to_string().as_str()) { &mut on } else { &mut others };
        list.push(id);
    }
    Ok((on, others))
}

/// Time on the core and time spent waiting for it, nanoseconds (`/proc/*/schedstat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedStat {
    /// On the core.
    pub ran_ns: u64,
    /// Ready, but not on the core.
    pub waited_ns: u64,
}

impl SchedStat {
    /// Of one thread; zero when it is gone.
    pub fn of(thread: u32) -> Self {
        let text = fs::read_to_string(format!("/proc/{thread}/schedstat")).unwrap_or_default();
        let mut words = text.split_whitespace().map(|w| w.parse().unwrap_or(0));
        Self { ran_ns: words.next().unwrap_or(0), waited_ns: words.next().unwrap_or(0) }
    }

    /// Sum over threads.
    pub fn sum(threads: &[u32]) -> Self {
        threads
            .iter()
            .map(|&t| Self::of(t))
            .fold(Self::default(), |a, b| Self { ran_ns: a.ran_ns + b.ran_ns, waited_ns: a.waited_ns + b.waited_ns })
    }

    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            ran_ns: self.ran_ns.saturating_sub(before.ran_ns),
            waited_ns: self.waited_ns.saturating_sub(before.waited_ns),
        }
    }
}
