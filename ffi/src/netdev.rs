//! The kernel network device behind some virtual devices.
#![allow(unsafe_code)] // Its job: an ioctl.
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Sets the MTU of the kernel's network device number `if_index` (netdevice(7), SIOCSIFMTU).
pub(crate) fn set_mtu(if_index: u32, mtu: u16) -> io::Result<()> {
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    // SAFETY: ifr_name has IF_NAMESIZE bytes, which is what if_indextoname writes at most.
    if unsafe { libc::if_indextoname(if_index, request.ifr_name.as_mut_ptr()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    request.ifr_ifru.ifru_mtu = i32::from(mtu);
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to no one else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: SIOCSIFMTU reads an ifreq.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFMTU, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
