//! Threads: pinning, priority, and how long the kernel kept them off their core.
use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::fs;

/// Niceness of what is measured: the rest of a busy machine shall not be in the figures.
pub const NICE: i32 = -20;

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

/// Sets a thread's niceness; needs root for negative values.
///
/// # Errors
/// When that is refused.
#[allow(unsafe_code)] // One system call that nix does not wrap.
pub fn set_nice(thread: u32, nice: i32) -> Result<()> {
    // SAFETY: takes numbers only.
    let status = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).context("setpriority");
    }
    Ok(())
}

/// Makes the calling thread run before everything of ordinary priority; without root it stays as it is.
#[allow(unsafe_code)] // One system call that nix does not wrap.
pub fn real_time(on: bool) {
    let parameter = libc::sched_param { sched_priority: if on { 10 } else { 0 } };
    let policy = if on { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    // SAFETY: the parameter lives during the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}

/// Threads of a process that may run on exactly this core.
///
/// # Errors
/// When the process is gone.
pub fn threads_on(pid: u32, core: usize) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/task/{id}/status")) else { continue };
        let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).map(str::trim);
        if allowed == Some(core.to_string().as_str()) {
            found.push(id);
        }
    }
    Ok(found)
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

/// The scheduler's group of this session, in front of all others while this lives: with autogroups a thread's niceness
/// counts only inside its group. Put back on drop.
#[derive(Debug)]
pub struct GroupPriority {
    before: Option<String>,
}

const AUTOGROUP: &str = "/proc/self/autogroup";

impl GroupPriority {
    /// Raises it as far as it goes. Without root, or without autogroups, nothing changes.
    pub fn raise() -> Self {
        let text = fs::read_to_string(AUTOGROUP).unwrap_or_default();
        let before = text.split_whitespace().last().map(str::to_owned);
        let raised = before.filter(|_| fs::write(AUTOGROUP, NICE.to_string()).is_ok());
        Self { before: raised }
    }
}

impl Drop for GroupPriority {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(AUTOGROUP, before);
        }
    }
}
