//! Eventfds: how guests are notified, notify, and how PMD threads report faults.
#![allow(unsafe_code)] // Its job: four system calls that std does not offer.
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A new non-blocking eventfd with count 0.
pub(crate) fn new() -> io::Result<OwnedFd> {
    // SAFETY: creates a descriptor; no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds one. Failure means that the counter is full: it will be read as set all the same.
#[inline]
pub(crate) fn signal(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes eight bytes from a local array.
    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}

/// Sets the count to zero. Never blocks, whatever flags the other side sets on the shared file description.
pub(crate) fn drain(fd: RawFd) {
    let mut count = [0u8; 8];
    let iov = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
    // SAFETY: reads at most eight bytes into a local array. Offset -1 is a plain read(2); RWF_NOWAIT fails rather than waits.
    unsafe { libc::preadv2(fd, &raw const iov, 1, -1, libc::RWF_NOWAIT) };
}

/// Sets O_NONBLOCK.
pub(crate) fn set_nonblocking(fd: RawFd) {
    // SAFETY: fcntl on file status flags; no memory is involved.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags >= 0 && flags & libc::O_NONBLOCK == 0 {
            libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn drains_without_blocking() {
        // SAFETY: creates a blocking eventfd, owned from here on.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        drain(fd.as_raw_fd()); // would hang here if it could block
        signal(fd.as_raw_fd());
        signal(fd.as_raw_fd());
        drain(fd.as_raw_fd());
        let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut p, 1, 0) }, 0);
    }
}
