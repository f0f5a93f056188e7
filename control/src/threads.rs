//! Threads and cores: PMD threads are pinned, everything else keeps away from their cores, and a panic on a PMD thread
//! ends the process loudly.
use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::PanicHookInfo;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

thread_local! {
    static PMD: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Cores the process may use.
fn allowed() -> Result<BTreeSet<usize>, String> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(|e| format!("cannot read the CPU affinity: {e}"))?;
    Ok((0..CpuSet::count()).filter(|c| set.is_set(*c).unwrap_or(false)).collect())
}

/// Says why a PMD thread cannot be pinned to `core`.
///
/// # Errors
/// There is no such core, or it is not allowed to this process.
pub fn check_core(core: u32) -> Result<(), String> {
    let mut set = CpuSet::new();
    let available = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    set.set(core as usize).map_err(|_| format!("there is no CPU core {core}"))?;
    // The only sure test: pin a thread.
    let tried = std::thread::spawn(move || sched_setaffinity(Pid::from_raw(0), &set)).join();
    match tried {
        Ok(Ok(())) => Ok(()),
        _ => Err(format!("CPU core {core} cannot be used (online: {})", available.trim())),
    }
}

/// First act of a PMD thread: pins it, and marks it for [`install_panic_hook`].
pub fn enter_pmd(index: usize, core: Option<u32>) {
    PMD.set(Some(index));
    let Some(core) = core else { return };
    let mut set = CpuSet::new();
    let pinned = set.set(core as usize).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    match pinned {
        Ok(()) => tracing::debug!(pmd = index, core, "PMD thread pinned"),
        // The core was checked just before; it may have gone offline since.
        Err(e) => tracing::error!(pmd = index, core, "PMD thread could not be pinned: {e}"),
    }
}

/// Moves the calling thread, and with it the threads it starts later, off the PMD threads' cores where others are left.
pub fn avoid_cores(pmd_cores: &[u32]) {
    let Ok(all) = allowed() else { return };
    let rest: Vec<usize> = all.into_iter().filter(|c| !pmd_cores.iter().any(|p| *p as usize == *c)).collect();
    if rest.is_empty() {
        tracing::debug!("every core serves a PMD thread: control threads share them");
        return;
    }
    let mut set = CpuSet::new();
    if rest.iter().try_for_each(|c| set.set(*c)).is_ok()
        && let Err(e) = sched_setaffinity(Pid::from_raw(0), &set)
    {
        tracing::debug!("control threads stay where they are: {e}");
    }
}

/// Panics are logged with thread and place. One on a PMD thread aborts the process: queues and rings would otherwise stay
/// behind in an unknown state, with guests waiting on them; a restart brings them back.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let text = text(info);
        let name = thread.name().unwrap_or("unnamed");
        tracing::error!(thread = name, place, "panic: {text}");
        if let Some(index) = PMD.get() {
            tracing::error!("PMD thread {index} cannot go on: ferryd aborts, so that it is restarted in a known state");
            std::process::abort();
        }
    }));
}

fn text(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let s = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    s.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(no message)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Run in a process of its own by the test below.
    #[test]
    #[ignore = "ends the process"]
    fn pmd_panics() {
        install_panic_hook();
        let harmless = std::thread::spawn(|| panic!("not a PMD thread")).join();
        assert!(harmless.is_err());
        println!("still here");
        let pmd = std::thread::spawn(|| {
            enter_pmd(3, None);
            panic!("boom");
        });
        let _ = pmd.join();
        println!("never here");
    }

    #[test]
    fn a_panic_on_a_pmd_thread_aborts_the_process() {
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "threads::tests::pmd_panics", "--ignored", "--nocapture", "--test-threads=1"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{said}");
        assert!(said.contains("still here") && !said.contains("never here"), "{said}");
    }

    #[test]
    fn cores_are_checked_and_threads_pinned() {
        let core = *allowed().unwrap().first().unwrap() as u32;
        check_core(core).unwrap();
        assert!(check_core(4000).unwrap_err().contains("CPU core 4000"));
        let of_thread = std::thread::spawn(move || {
            enter_pmd(0, Some(core));
            allowed().unwrap()
        });
        assert_eq!(of_thread.join().unwrap().into_iter().collect::<Vec<_>>(), [core as usize]);
        // Where there is another core, control threads leave the PMD thread's.
        let rest = std::thread::spawn(move || {
            avoid_cores(&[core]);
            allowed().unwrap()
        });
        let rest = rest.join().unwrap();
        assert!(rest.len() == 1 || !rest.contains(&(core as usize)));
    }
}
