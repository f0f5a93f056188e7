//! Waiting for many sockets at once (epoll(7)), level-triggered.
#![allow(unsafe_code)] // Its job: thin wrappers around libc.
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something to read, or the end.
    Read,
    /// Room to write.
    Write,
}

impl Interest {
    fn bits(self) -> u32 {
        match self {
            Self::Read => libc::EPOLLIN as u32,
            Self::Write => libc::EPOLLOUT as u32,
        }
    }
}

/// A set of watched descriptors. A descriptor leaves it by being closed.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, events: vec![libc::epoll_event { events: 0, u64: 0 }; 256] })
    }

    fn control(&self, operation: i32, watched: &impl AsRawFd, id: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: id };
        // SAFETY: valid descriptors and an event that lives across the call.
        let r = unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, watched.as_raw_fd(), &mut event) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Watches a descriptor; events carry `id`.
    pub fn add(&self, watched: &impl AsRawFd, id: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, watched, id, interest)
    }

    /// Waits for something else from now on.
    pub fn change(&self, watched: &impl AsRawFd, id: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, watched, id, interest)
    }

    /// Waits without bound; returns the ids of what is ready (or has failed).
    pub fn wait(&mut self) -> io::Result<Vec<u64>> {
        let room = self.events.len() as libc::c_int;
        // SAFETY: a valid descriptor and an array of `room` events that lives across the call.
        let n = unsafe { libc::epoll_wait(self.fd.as_raw_fd(), self.events.as_mut_ptr(), room, -1) };
        match usize::try_from(n) {
            Ok(n) => Ok(self.events.iter().take(n).map(|e| e.u64).collect()),
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}
