//! SIGBUS containment: a memory or log file that its owner truncates after it was mapped costs that port only.
//!
//! Touching a mapped page beyond the end of its file raises SIGBUS (mmap(2)), and a frontend can shrink the file
//! whenever it likes. Every shared mapping is therefore registered here. On a fault inside a registered range the
//! handler maps anonymous zero pages over the *whole* range, so that the interrupted access and all later ones succeed
//! on memory that nobody else sees, and raises the range's poison flag. PMD threads look at the flag once per burst;
//! the session thread then stops the port. Any other SIGBUS goes to the handler that was installed before this one.
//!
//! The handler runs on whichever thread faulted and does async-signal-safe work only: it reads atomics and makes one system call.
#![allow(unsafe_code)] // Its job: a signal handler, and mapping over ranges whose owners asked for it.
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// Most ranges registered at one time in a process.
pub const MAX_RANGES: usize = 8192;

/// One registered range behind a sequence lock: `version` is odd while the slot is being written.
struct Slot {
    version: AtomicU64,
    taken: AtomicBool,
    start: AtomicUsize,
    /// Exclusive; 0 when the slot is free.
    end: AtomicUsize,
    poisoned: AtomicPtr<AtomicBool>,
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            poisoned: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Replaces the contents. Callers own the slot (`taken`), so there is one writer.
    fn write(&self, start: usize, end: usize, poisoned: *mut AtomicBool) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.poisoned.store(poisoned, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The contents if `addr` lies inside. A slot that is being written is skipped: its range is not in use yet,
    /// or not any more, hence cannot be what faulted.
    fn find(&self, addr: usize) -> Option<(usize, usize, *mut AtomicBool)> {
        let before = self.version.load(Ordering::Acquire);
        if before & 1 != 0 {
            return None;
        }
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let poisoned = self.poisoned.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == before && start <= addr && addr < end && !poisoned.is_null())
            .then_some((start, end, poisoned))
    }
}

static SLOTS: [Slot; MAX_RANGES] = [const { Slot::new() }; MAX_RANGES];
/// Slots from here on were never used: the handler stops its walk here.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
/// Faults contained since the process started.
static CAUGHT: AtomicU64 = AtomicU64::new(0);
/// What was installed before; leaked once, so that the handler may read it at any time.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A range under protection; dropping it ends the protection.
///
/// Drop it before the range is unmapped, and only when no thread accesses the range any more (after the quiesce).
#[derive(Debug)]
pub struct Registration {
    slot: usize,
    poisoned: Arc<AtomicBool>,
}

impl Registration {
    /// True when a fault hit the range: its contents are zero pages of this process now.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(slot) = SLOTS.get(self.slot) {
            slot.write(0, 0, ptr::null_mut());
            slot.taken.store(false, Ordering::Release);
        }
    }
}

/// Protects the mapping `addr..addr + len_bytes`. A fault inside raises `poisoned` (several ranges may share one flag).
///
/// # Safety
/// The range is exactly one or more whole mappings that the caller owns (huge pages included: the handler maps over
/// all of it with `MAP_FIXED`), nothing holds Rust references into it, and it stays mapped until the registration is dropped.
///
/// # Errors
/// When the handler cannot be installed, or [`MAX_RANGES`] ranges are registered, or the range is empty or wraps.
pub unsafe fn register(addr: *mut u8, len_bytes: usize, poisoned: &Arc<AtomicBool>) -> io::Result<Registration> {
    install()?;
    let start = addr as usize;
    let end = match start.checked_add(len_bytes) {
        Some(end) if len_bytes != 0 => end,
        _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    for (i, slot) in SLOTS.iter().enumerate() {
        if slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            HIGH_WATER.fetch_max(i + 1, Ordering::AcqRel);
            slot.write(start, end, Arc::as_ptr(poisoned).cast_mut());
            return Ok(Registration { slot: i, poisoned: Arc::clone(poisoned) });
        }
    }
    Err(io::Error::other("too many shared mappings are registered"))
}

/// Faults contained since the process started.
pub fn faults_caught() -> u64 {
    CAUGHT.load(Ordering::Relaxed)
}

/// Installs the handler, once per process.
fn install() -> io::Result<()> {
    let result = INSTALLED.get_or_init(|| {
        let previous = Box::into_raw(Box::new(empty_action()));
        // SAFETY: querying into a live, exclusively owned struct.
        let rc = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous) };
        if rc != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
        }
        // Published before the handler can run; never freed.
        PREVIOUS.store(previous, Ordering::Release);
        let mut action = empty_action();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: `action` is fully initialised; `on_sigbus` has the SA_SIGINFO signature.
        let rc = unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
        }
        Ok(())
    });
    result.map_err(io::Error::from_raw_os_error)
}

fn empty_action() -> libc::sigaction {
    // SAFETY: sigaction is a C struct of integers, an empty signal set and a nullable pointer: all zeroes is SIG_DFL.
    unsafe { std::mem::zeroed() }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: __errno_location is async-signal-safe and returns this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; the pointer is valid for the thread's life.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO. Codes above 0 are faults, for which si_addr is set.
    let addr = unsafe { if (*info).si_code > 0 { Some((*info).si_addr() as usize) } else { None } };
    if !addr.is_some_and(contain) {
        forward(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Maps zero pages over the registered range around `addr`. False when there is none, or when the kernel refuses.
fn contain(addr: usize) -> bool {
    let high = HIGH_WATER.load(Ordering::Acquire).min(MAX_RANGES);
    for slot in SLOTS.iter().take(high) {
        let Some((start, end, poisoned)) = slot.find(addr) else { continue };
        // SAFETY: `register`'s caller gave the range up for exactly this. The raw call, because libc's wrapper is
        // not promised to be async-signal-safe. MAP_NORESERVE: the range may be larger than free memory.
        let mapped = unsafe {
            libc::syscall(
                libc::SYS_mmap,
                start,
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped as usize != start {
            return false;
        }
        // SAFETY: the Registration holds the Arc, and cannot be dropped while a thread (this one) accesses the range.
        unsafe { (*poisoned).store(true, Ordering::Release) };
        CAUGHT.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}

/// Hands the signal to whoever was there before.
fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: stored before the handler was installed, and leaked.
    let (handler, flags) = unsafe {
        match previous.as_ref() {
            Some(p) => (p.sa_sigaction, p.sa_flags),
            None => (libc::SIG_DFL, 0),
        }
    };
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // A fault cannot be ignored. With the default action back in place the faulting instruction runs again and
        // ends the process; a SIGBUS sent by kill(2) is sent again.
        // SAFETY: signal, raise and pointer reads of the kernel's siginfo are async-signal-safe.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        }
    } else if flags & libc::SA_SIGINFO != 0 {
        // SAFETY: installed with SA_SIGINFO, the address is a handler of this signature.
        let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(handler) };
        call(signal, info, context);
    } else {
        // SAFETY: installed without SA_SIGINFO, the address is a handler of one argument.
        let call: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
        call(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    const LEN: usize = 16 * 4096;

    struct Mapping {
        addr: *mut u8,
        file: OwnedFd,
    }

    impl Mapping {
        fn new() -> Self {
            // SAFETY: plain system calls; the results are checked.
            unsafe {
                let fd = libc::memfd_create(c"sigbus-test".as_ptr(), libc::MFD_CLOEXEC);
                assert!(fd >= 0);
                let file = OwnedFd::from_raw_fd(fd);
                assert_eq!(libc::ftruncate(fd, LEN as i64), 0);
                let addr =
                    libc::mmap(ptr::null_mut(), LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0);
                assert_ne!(addr, libc::MAP_FAILED);
                Self { addr: addr.cast(), file }
            }
        }
        fn truncate(&self, len: i64) {
            // SAFETY: plain system call.
            assert_eq!(unsafe { libc::ftruncate(self.file.as_raw_fd(), len) }, 0);
        }
        fn touch(&self, page: usize) -> u8 {
            // SAFETY: inside the mapping; a fault is what the test is about.
            unsafe { self.addr.add(page * 4096).read_volatile() }
        }
        fn put(&self, page: usize, value: u8) {
            // SAFETY: as above.
            unsafe { self.addr.add(page * 4096).write_volatile(value) }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: unmaps what `new` mapped.
            unsafe { libc::munmap(self.addr.cast(), LEN) };
        }
    }

    fn guard(m: &Mapping, flag: &Arc<AtomicBool>) -> Registration {
        // SAFETY: the mapping outlives the registration in every test here (declared earlier, dropped later).
        unsafe { register(m.addr, LEN, flag) }.unwrap()
    }

    #[test]
    fn truncated_range_reads_zero_and_is_poisoned_while_others_keep_their_data() {
        let (bad, good) = (Mapping::new(), Mapping::new());
        let (bad_flag, good_flag) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let _a = guard(&good, &good_flag);
        let b = guard(&bad, &bad_flag);
        bad.put(0, 7);
        bad.put(5, 7);
        good.put(5, 9);
        bad.truncate(4096);
        assert_eq!(bad.touch(0), 7, "pages before the new end stay valid until a fault");
        assert!(!b.is_poisoned());
        assert_eq!(bad.touch(5), 0);
        assert!(b.is_poisoned());
        assert_eq!(bad.touch(0), 0, "the whole range is replaced");
        bad.put(15, 3);
        assert_eq!(bad.touch(15), 3);
        assert_eq!(good.touch(5), 9);
        assert!(!good_flag.load(Ordering::Acquire));
    }

    #[test]
    fn many_threads_fault_at_once() {
        let m = Mapping::new();
        let flag = Arc::new(AtomicBool::new(false));
        let _r = guard(&m, &flag);
        m.truncate(0);
        let base = m.addr as usize;
        std::thread::scope(|s| {
            for t in 0..8 {
                s.spawn(move || {
                    for page in 0..16 {
                        let p = (base + ((page + t) % 16) * 4096) as *mut u8;
                        // SAFETY: inside the mapping, which outlives the scope.
                        unsafe { p.write_volatile(t as u8) };
                    }
                });
            }
        });
        assert!(flag.load(Ordering::Acquire));
    }

    #[test]
    fn registering_and_unregistering_under_faults_never_hits_the_wrong_range() {
        let bystander = Mapping::new();
        let flag = Arc::new(AtomicBool::new(false));
        let _r = guard(&bystander, &flag);
        bystander.put(3, 42);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let m = Mapping::new();
                        let f = Arc::new(AtomicBool::new(false));
                        let r = guard(&m, &f);
                        m.truncate(0);
                        assert_eq!(m.touch(9), 0);
                        assert!(r.is_poisoned());
                    }
                });
            }
        });
        assert!(!flag.load(Ordering::Acquire));
        assert_eq!(bystander.touch(3), 42);
    }

    #[test]
    fn a_fault_outside_every_range_still_ends_the_process() {
        // In a child, whose death by SIGBUS is the expected result.
        let m = Mapping::new();
        let flag = Arc::new(AtomicBool::new(false));
        drop(guard(&m, &flag));
        m.truncate(0);
        // SAFETY: the child only touches memory and exits; it takes no lock of this multi-threaded process.
        unsafe {
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &no_core);
                m.addr.read_volatile();
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "status {status:#x}");
        }
    }

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        let flag = Arc::new(AtomicBool::new(false));
        // SAFETY: refused before anything is registered.
        unsafe {
            assert!(register(4096 as *mut u8, 0, &flag).is_err());
            assert!(register(4096 as *mut u8, usize::MAX, &flag).is_err());
        }
    }
}
