//! File descriptors over Unix sockets, event descriptors and polling: the system calls that the session needs and `std` lacks.
#![allow(unsafe_code)] // Its job: system calls.
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

/// Descriptors that one receive call takes; the kernel closes what does not fit (`MSG_CTRUNC`).
pub const MAX_RECEIVED_FDS: usize = 32;

const CONTROL_BYTES: usize = 256;
// CMSG_SPACE of 32 descriptors is 16 + 128 bytes.
const _: () = assert!(mem::size_of::<libc::cmsghdr>() + MAX_RECEIVED_FDS * 4 + 8 <= CONTROL_BYTES);

/// Room for one control message, aligned as `cmsghdr` wants it.
#[repr(C, align(16))]
struct Control([u8; CONTROL_BYTES]);

/// Result of one [`receive`].
#[derive(Debug)]
pub struct Received {
    /// Bytes read; 0 is the end of the stream.
    pub bytes: usize,
    /// The peer sent more descriptors than one call takes; the surplus is closed already.
    pub truncated: bool,
}

/// Reads at most `buffer.len()` bytes without blocking; descriptors that came along are appended to `fds`, close-on-exec.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<Received> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is a C struct for which all zeroes is the empty message.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE only computes.
    msg.msg_controllen = unsafe { libc::CMSG_SPACE((MAX_RECEIVED_FDS * mem::size_of::<RawFd>()) as u32) } as _;
    let bytes = loop {
        // SAFETY: all pointers in `msg` are to live buffers of the stated lengths.
        let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut msg, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
        if n >= 0 {
            break n as usize;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    // SAFETY: the CMSG functions walk the control buffer within msg_controllen, as the kernel filled it.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    while !header.is_null() {
        // SAFETY: `header` is a valid control message header inside the buffer.
        unsafe {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let payload = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..payload / mem::size_of::<RawFd>() {
                    // Each descriptor was installed for this process by the kernel just now; it is owned from here on.
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const msg, header);
        }
    }
    Ok(Received { bytes, truncated: msg.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Writes from `bytes` with `fds` attached to the first of them, without blocking and without SIGPIPE. Returns how many bytes went.
///
/// # Errors
/// Those of sendmsg(2); `InvalidInput` for more than [`MAX_RECEIVED_FDS`] descriptors.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    if fds.len() > MAX_RECEIVED_FDS {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: as in `receive`.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let payload = mem::size_of_val(fds) as u32;
        msg.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer has room for MAX_RECEIVED_FDS descriptors (asserted above); CMSG_FIRSTHDR then
        // points to its start, and CMSG_DATA to `payload` bytes inside.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(payload) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
            ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), payload as usize);
        }
    }
    loop {
        // SAFETY: all pointers in `msg` are to live buffers of the stated lengths.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// What [`poll`] waits for on one descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    fd: RawFd,
    events: i16,
    revents: i16,
}

impl Wait {
    /// Readable, or hung up.
    pub fn readable(fd: RawFd) -> Self {
        Self { fd, events: libc::POLLIN, revents: 0 }
    }
    /// Writable, or hung up.
    pub fn writable(fd: RawFd) -> Self {
        Self { fd, events: libc::POLLOUT, revents: 0 }
    }
    /// Only hung up.
    pub fn hangup(fd: RawFd) -> Self {
        Self { fd, events: libc::POLLRDHUP, revents: 0 }
    }
    /// True when something happened.
    pub fn fired(&self) -> bool {
        self.revents != 0
    }
}

/// Waits until one of `waits` fires or `timeout` is over (`None`: for ever). An interrupting signal ends the wait early.
pub fn poll(waits: &mut [Wait], timeout: Option<Duration>) -> io::Result<()> {
    let ms = timeout.map_or(-1, |t| t.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
    let mut raw: Vec<libc::pollfd> =
        waits.iter().map(|w| libc::pollfd { fd: w.fd, events: w.events, revents: 0 }).collect();
    // SAFETY: `raw` is a live array of the stated length.
    let n = unsafe { libc::poll(raw.as_mut_ptr(), raw.len() as libc::nfds_t, ms) };
    if n < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
        return Ok(());
    }
    for (w, r) in waits.iter_mut().zip(&raw) {
        w.revents = r.revents;
    }
    Ok(())
}

/// Prepares a kick, call or error descriptor of a frontend: it must be an eventfd, and writing to it must not block a PMD thread.
/// (The flag belongs to the open file that both sides share, so a frontend that is bent on it can still take it off again
/// and fill the counter; Linux has no write to an eventfd that is non-blocking by itself.)
///
/// # Errors
/// When it is something else (a full pipe, say, would block the writer), or fcntl fails.
pub fn prepare_event(fd: BorrowedFd<'_>) -> io::Result<()> {
    if let Ok(target) = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        && target.as_os_str() != "anon_inode:[eventfd]"
    {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not an eventfd", target.display())));
    }
    // SAFETY: plain system calls on a borrowed descriptor.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(any(test, fuzzing, feature = "fuzzing"))]
/// An unnamed file of `len_bytes` zero bytes in memory.
pub fn anonymous_file(len_bytes: u64) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"ferry".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(len_bytes)?;
    Ok(file.into())
}

/// Refuses files whose pages another process or machine supplies on demand: a page fault there may never end, and would hang a PMD thread.
///
/// # Errors
/// For FUSE and network file systems, and when fstatfs fails.
pub fn check_pages_are_local(fd: BorrowedFd<'_>) -> io::Result<()> {
    const REMOTE: [(i64, &str); 5] =
        [(0x6573_5546, "FUSE"), (0x6969, "NFS"), (0xff53_4d42, "CIFS"), (0x0102_1997, "9p"), (0x00c3_6400, "Ceph")];
    // SAFETY: statfs is a C struct of integers; fstatfs fills it.
    let kind = unsafe {
        let mut s: libc::statfs = mem::zeroed();
        if libc::fstatfs(fd.as_raw_fd(), &raw mut s) != 0 {
            return Err(io::Error::last_os_error());
        }
        s.f_type as i64 & 0xffff_ffff
    };
    match REMOTE.iter().find(|(magic, _)| *magic == kind) {
        Some((_, name)) => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("shared memory on {name}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventfd;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_travel_and_a_surplus_is_reported() {
        let (a, b) = UnixStream::pair().unwrap();
        let event = eventfd::new().unwrap();
        assert_eq!(send(a.as_fd(), b"abc", &[event.as_raw_fd(); 3]).unwrap(), 3);
        let (mut buf, mut fds) = ([0u8; 8], Vec::new());
        let r = receive(b.as_fd(), &mut buf, &mut fds).unwrap();
        assert_eq!((r.bytes, r.truncated, fds.len()), (3, false, 3));
        eventfd::signal(fds[2].as_raw_fd());
        let mut w = [Wait::readable(event.as_raw_fd())];
        poll(&mut w, Some(Duration::ZERO)).unwrap();
        assert!(w[0].fired());
        assert!(send(a.as_fd(), b"x", &[event.as_raw_fd(); 33]).is_err());
        let e = receive(b.as_fd(), &mut buf, &mut fds).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buf, &mut fds).unwrap().bytes, 0);
    }

    #[test]
    fn only_eventfds_are_taken_for_events_and_they_are_made_nonblocking() {
        let (pipe, _other) = UnixStream::pair().unwrap();
        assert!(prepare_event(pipe.as_fd()).is_err());
        // SAFETY: plain system calls; the descriptor is owned at once.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        prepare_event(fd.as_fd()).unwrap();
        // SAFETY: as above.
        assert_ne!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn local_files_pass() {
        check_pages_are_local(anonymous_file(4096).unwrap().as_fd()).unwrap();
    }
}
