//! The system calls that std has no wrapper for.
#![allow(unsafe_code)] // Its job: thin wrappers around libc.
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts a pseudo file system.
pub fn mount(kind: &str, target: &str) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let (kind, target) = (CString::new(kind)?, CString::new(target)?);
    // SAFETY: all pointers are NUL-terminated strings that live across the call; no data argument.
    let r = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    check(r.into())
}

/// Loads a kernel module from an open file.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: a valid descriptor, an empty NUL-terminated parameter string, no flags.
    check(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) })
}

/// Switches a terminal to raw mode: no echo, no line editing, no translation.
pub fn make_raw(tty: &File) -> io::Result<()> {
    // SAFETY: termios is plain data for which zeroes are a valid value.
    let mut t: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: valid descriptor and a termios to write to.
    check(unsafe { libc::tcgetattr(tty.as_raw_fd(), &mut t) }.into())?;
    // SAFETY: a termios initialised by tcgetattr.
    unsafe { libc::cfmakeraw(&mut t) };
    // SAFETY: valid descriptor, initialised termios.
    check(unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, &t) }.into())
}

/// Restarts the machine; under `-no-reboot` QEMU ends. Does nothing outside of process 1's machine: needs the privilege.
pub fn restart() {
    // SAFETY: no memory is involved.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

/// Kills a process group.
pub fn kill_group(leader: u32) {
    if let Ok(pid) = i32::try_from(leader) {
        // SAFETY: no memory is involved; a group that is gone only yields an error.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
}

/// Enlarges a socket's receive buffer beyond the system-wide limit (needs root).
pub fn force_receive_buffer(socket: &impl AsRawFd, bytes: i32) -> io::Result<()> {
    // SAFETY: option value is an int that lives across the call and its size is given.
    let r = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    check(r.into())
}

/// Raises this process's limit of open descriptors (needs root).
pub fn allow_descriptors(count: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
    // SAFETY: a limit that lives across the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }.into())
}

/// A socket that sends whole frames through one interface.
pub fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let name = CString::new(interface)?;
    // SAFETY: a NUL-terminated string that lives across the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made and that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is plain data for which zeroes are a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index as i32;
    let size = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address of the given size that lives across the call.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), size) }.into())?;
    Ok(socket)
}

/// Sends one frame.
pub fn send(socket: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    // SAFETY: a valid descriptor and a buffer of the given length.
    let n = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
