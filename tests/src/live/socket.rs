//! Packet sockets and nfnetlink.
#![allow(unsafe_code)] // Addresses and options of socket kinds for which there is no safe interface.
use anyhow::{Context, Result, bail};
use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

fn checked(result: impl TryInto<i64>) -> io::Result<i64> {
    match result.try_into() {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = checked(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) })?;
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn set_option(fd: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let pointer = (&raw const value).cast();
    // SAFETY: `pointer` is to an int of the stated size.
    checked(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, pointer, size_of::<i32>() as u32) })?;
    Ok(())
}

fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the buffer is as long as stated.
    match checked(unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) }) {
        Ok(n) => Ok(Some(n as usize)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

fn send(fd: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the buffer is as long as stated.
    checked(unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) })?;
    Ok(())
}

fn wait_readable(fd: &OwnedFd, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    let n = checked(unsafe { libc::poll(&raw mut poll, 1, timeout.as_millis() as i32) })?;
    Ok(n > 0)
}

/// A network namespace of its own for this thread and the processes it starts; it ends with them.
pub fn own_network_namespace() -> io::Result<()> {
    // SAFETY: no pointers; affects this thread only.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Keeps this thread on the processor it runs on: frames sent one after the other then stay in order, since each processor has a queue
/// of its own.
pub fn stay_on_this_cpu() -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the empty set; CPU_SET is bounded by the set's size; the pointer is to a whole set.
    unsafe {
        let cpu = checked(libc::sched_getcpu())? as usize;
        let mut set: libc::cpu_set_t = zeroed();
        libc::CPU_SET(cpu, &mut set);
        checked(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set))?;
    }
    Ok(())
}

/// A socket that sends frames out of an interface and sees those that arrive there.
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// On the interface of that name.
    pub fn open(interface: &str) -> Result<Self> {
        let name = CString::new(interface)?;
        // SAFETY: a C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            bail!("{interface}: {}", io::Error::last_os_error());
        }
        let all = (libc::ETH_P_ALL as u16).to_be();
        let fd = open(libc::AF_PACKET, libc::SOCK_RAW, i32::from(all)).context("packet socket")?;
        const PACKET_IGNORE_OUTGOING: i32 = 23;
        set_option(&fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1).context("PACKET_IGNORE_OUTGOING")?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 4 << 20).context("SO_RCVBUFFORCE")?;
        // SAFETY: all-zero is a valid sockaddr_ll; the pointer is to one.
        unsafe {
            let mut address: libc::sockaddr_ll = zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all;
            address.sll_ifindex = index as i32;
            let len = size_of::<libc::sockaddr_ll>() as u32;
            checked(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len)).context(interface.to_owned())?;
        }
        Ok(Self(fd))
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(&self.0, frame)
    }

    /// A frame that has arrived, if one has.
    pub fn try_receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 1 << 16];
        Ok(receive(&self.0, &mut buffer)?.map(|n| buffer[..n].to_vec()))
    }

    /// The frames that arrive before `sentinel` does.
    pub fn until(&self, sentinel: &[u8], timeout: Duration) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(frame) = self.try_receive()? {
                if frame == sentinel {
                    return Ok(frames);
                }
                frames.push(frame);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("a frame that must pass did not arrive within {timeout:?}");
            }
            wait_readable(&self.0, left)?;
        }
    }
}

/// A netlink socket of netfilter's.
pub struct Nfnetlink {
    fd: OwnedFd,
    sequence: u32,
}

const SUBSYS_CTNETLINK: u16 = 1;
const SUBSYS_ULOG: u16 = 4;

impl Nfnetlink {
    /// A socket in this thread's namespace.
    pub fn open() -> Result<Self> {
        const NETLINK_NETFILTER: i32 = 12;
        let fd = open(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_NETFILTER).context("netlink socket of netfilter")?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request (nfgenmsg and attributes follow the netlink header) and waits for its acknowledgement.
    fn request(&mut self, subsystem: u16, message: u16, resource: u16, attributes: &[u8]) -> Result<()> {
        const REQUEST_ACK: u16 = 1 | 4;
        self.sequence += 1;
        let mut bytes = Vec::new();
        bytes.extend((20 + attributes.len() as u32).to_ne_bytes());
        bytes.extend((subsystem << 8 | message).to_ne_bytes());
        bytes.extend(REQUEST_ACK.to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([libc::AF_UNSPEC as u8, 0]);
        bytes.extend(resource.to_be_bytes());
        bytes.extend(attributes);
        send(&self.fd, &bytes)?;
        let mut buffer = [0; 8192];
        loop {
            if !wait_readable(&self.fd, Duration::from_secs(5))? {
                bail!("netfilter does not answer");
            }
            let Some(n) = receive(&self.fd, &mut buffer)? else { continue };
            const NLMSG_ERROR: u16 = 2;
            let u32_at = |at: usize| u32::from_ne_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]]);
            let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
            if n >= 20 && kind == NLMSG_ERROR && u32_at(8) == self.sequence {
                return match u32_at(16) as i32 {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error).into()),
                };
            }
        }
    }

    /// Empties the namespace's connection table.
    pub fn flush_connections(&mut self) -> Result<()> {
        const DELETE: u16 = 2;
        self.request(SUBSYS_CTNETLINK, DELETE, 0, &[]).context("flushing the kernel's connections")
    }

    /// Subscribes to what nftables logs to `group`.
    pub fn subscribe_log(&mut self, group: u16) -> Result<()> {
        const CONFIG: u16 = 1;
        // Attribute 1: command 1, bind.
        self.request(SUBSYS_ULOG, CONFIG, group, &[5, 0, 1, 0, 1, 0, 0, 0]).context("binding to the log group")?;
        // Attribute 2: copy range 0, mode 1 (no payload).
        self.request(SUBSYS_ULOG, CONFIG, group, &[10, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0]).context("log mode")
    }

    /// Prefixes of the packets logged since the last call.
    pub fn logged(&mut self) -> Result<Vec<String>> {
        const PACKET: u16 = 0;
        const PREFIX: u16 = 10;
        const DONE: u16 = 3;
        let mut buffer = [0; 1 << 16];
        let mut prefixes = Vec::new();
        while let Some(n) = receive(&self.fd, &mut buffer).context("log")? {
            let mut messages = &buffer[..n];
            while messages.len() >= 20 {
                let len = u32::from_ne_bytes([messages[0], messages[1], messages[2], messages[3]]) as usize;
                let kind = u16::from_ne_bytes([messages[4], messages[5]]);
                let (message, rest) = messages.split_at_checked(len.max(20)).context("netlink message cut short")?;
                if kind == SUBSYS_ULOG << 8 | PACKET {
                    let mut attributes = &message[20..];
                    while attributes.len() >= 4 {
                        let len = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]])).max(4);
                        let (attribute, _) = attributes.split_at_checked(len).context("attribute cut short")?;
                        if u16::from_ne_bytes([attribute[2], attribute[3]]) & 0x3fff == PREFIX {
                            let text = attribute[4..].split(|b| *b == 0).next().unwrap_or_default();
                            prefixes.push(String::from_utf8_lossy(text).into_owned());
                        }
                        attributes = attributes.get((len + 3) & !3..).unwrap_or_default();
                    }
                } else if kind != DONE {
                    bail!("unexpected netlink message {kind}");
                }
                messages = rest.get((message.len() + 3 & !3) - message.len()..).unwrap_or_default();
            }
        }
        Ok(prefixes)
    }
}
