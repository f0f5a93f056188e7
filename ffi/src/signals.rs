//! Keeping DPDK's signals away from the program's threads, and the program's away from DPDK's.
//!
//! net_tap has the kernel send a real-time signal per packet, to the process: any thread may be taken out of a system
//! call by it. The signals of a tap's descriptor are therefore directed to one thread that does nothing else (fcntl(2),
//! F_SETOWN_EX); the driver's handler, which only counts, runs there.
#![allow(unsafe_code)] // Its job: signal masks and descriptor owners.
use std::os::fd::RawFd;
use std::sync::{OnceLock, mpsc};

/// fcntl(2), not in every libc binding: `struct f_owner_ex`.
#[repr(C)]
struct OwnerEx {
    kind: core::ffi::c_int,
    pid: libc::pid_t,
}
const F_SETOWN_EX: core::ffi::c_int = 15;
const F_OWNER_TID: core::ffi::c_int = 0;

/// Signals are for the program's threads: neither the calling thread nor those that start from it take any.
pub(crate) fn block_all() {
    // SAFETY: a local set is filled and applied to the calling thread only.
    unsafe {
        let mut set: libc::sigset_t = core::mem::zeroed();
        libc::sigfillset(&mut set);
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            libc::sigdelset(&mut set, fault);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, core::ptr::null_mut());
    }
}

/// When more real-time signals are pending than RLIMIT_SIGPENDING allows, the kernel falls back to SIGIO (fcntl(2),
/// F_SETSIG), whose default action ends the process.
pub(crate) fn ignore_sigio() {
    // SAFETY: queries and sets the disposition of one signal, and only replaces the default.
    unsafe {
        let mut now: libc::sigaction = core::mem::zeroed();
        if libc::sigaction(libc::SIGIO, core::ptr::null(), &mut now) == 0 && now.sa_sigaction == libc::SIG_DFL {
            libc::signal(libc::SIGIO, libc::SIG_IGN);
        }
    }
}

/// Directs the signals of `fd` to the thread that is there for them. Without that thread they go on to the process.
pub(crate) fn direct_to_sink(fd: RawFd) {
    let Some(tid) = sink() else { return };
    let owner = OwnerEx { kind: F_OWNER_TID, pid: tid };
    // SAFETY: F_SETOWN_EX reads a struct f_owner_ex.
    if unsafe { libc::fcntl(fd, F_SETOWN_EX, &raw const owner) } != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "signals of a tap device stay with the process");
    }
}

/// The thread's number; started on first use, for the life of the process.
fn sink() -> Option<libc::pid_t> {
    static SINK: OnceLock<Option<libc::pid_t>> = OnceLock::new();
    *SINK.get_or_init(|| {
        let (reply, answer) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("ferry-dpdk-sig".into())
            .spawn(move || {
                // SAFETY: as in `block_all`, without the real-time signals, which drivers choose from; then waits for them.
                unsafe {
                    block_all();
                    let mut set: libc::sigset_t = core::mem::zeroed();
                    libc::sigemptyset(&mut set);
                    for signal in libc::SIGRTMIN()..=libc::SIGRTMAX() {
                        libc::sigaddset(&mut set, signal);
                    }
                    libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, core::ptr::null_mut());
                    let _ = reply.send(libc::gettid());
                    loop {
                        libc::pause();
                    }
                }
            })
            .ok()?;
        answer.recv().ok()
    })
}
