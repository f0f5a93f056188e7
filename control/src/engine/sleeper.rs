//! How PMD threads sleep: in `ppoll` on the kick descriptors of their queues and one eventfd of their own.
//!
//! Not epoll: guests' kick descriptors come and go, and a descriptor that another process still holds open stays registered in an epoll set after it was
//! closed here, under a number that may mean something else by then. The list given to `ppoll` is always the present one.
#![allow(unsafe_code)] // ppoll on raw descriptors that the dataplane names.
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_dataplane::pmd::Sleeper;
use ferry_dataplane::port::Wake;

/// A thread's eventfd.
struct Bell {
    fd: File,
    /// The bell was rung and not heard yet: further rings need no system call.
    rung: AtomicBool,
}

impl Wake for Bell {
    fn wake(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // An eventfd write fails only when the count would overflow: then it is readable already.
            let _ = (&self.fd).write(&1u64.to_ne_bytes());
        }
    }
}

/// Sleeps of one PMD thread.
pub struct PollSleeper {
    bell: Arc<Bell>,
    polled: Vec<libc::pollfd>,
}

impl PollSleeper {
    /// A sleeper with a waker of its own.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by no one else.
        let fd = unsafe { File::from_raw_fd(fd) };
        Ok(Self { bell: Arc::new(Bell { fd, rung: AtomicBool::new(false) }), polled: Vec::with_capacity(256) })
    }
}

impl Sleeper for PollSleeper {
    fn sleep(&mut self, fds: &[RawFd], timeout: Duration) {
        let pollfd = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        self.polled.clear();
        self.polled.push(pollfd(self.bell.fd.as_raw_fd()));
        self.polled.extend(fds.iter().copied().map(pollfd));
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
        };
        // Interrupted or failed: the thread polls its queues and comes back.
        // SAFETY: pointer and length describe the vector, which lives through the call; no signal mask is given.
        unsafe { libc::ppoll(self.polled.as_mut_ptr(), self.polled.len() as libc::nfds_t, &time, std::ptr::null()) };
        if self.bell.rung.swap(false, Ordering::AcqRel) {
            let mut count = [0; 8];
            // Nothing to read: the ring's write is still under way and ends the next sleep instead.
            let _ = (&self.bell.fd).read(&mut count);
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as Arc<dyn Wake>
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn waking_ends_the_present_or_the_next_sleep() {
        let mut s = PollSleeper::new().unwrap();
        let waker = s.waker();
        waker.wake();
        waker.wake();
        let start = Instant::now();
        s.sleep(&[], Duration::from_secs(10));
        assert!(start.elapsed() < Duration::from_secs(5));
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        s.sleep(&[], Duration::from_secs(10));
        assert!(start.elapsed() < Duration::from_secs(5));
        thread.join().unwrap();
        // Both rings were heard: this sleep runs its time.
        let start = Instant::now();
        s.sleep(&[], Duration::from_millis(30));
        assert!(start.elapsed() >= Duration::from_millis(29));
    }

    #[test]
    fn a_readable_descriptor_ends_the_sleep() {
        let mut s = PollSleeper::new().unwrap();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        (&b).write_all(b"x").unwrap();
        let start = Instant::now();
        s.sleep(&[a.as_raw_fd()], Duration::from_secs(10));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn short_sleeps_are_short() {
        let mut s = PollSleeper::new().unwrap();
        let start = Instant::now();
        for _ in 0..10 {
            s.sleep(&[], Duration::from_micros(200));
        }
        assert!(start.elapsed() >= Duration::from_micros(2000));
        assert!(start.elapsed() < Duration::from_millis(500));
    }
}
