//! The port's Unix socket in both roles: listening for the frontend (QEMU `reconnect=1`), or connecting to it for
//! ever (QEMU `server=on`). Nothing here blocks: the session thread polls.
#![allow(unsafe_code)] // bind and listen as separate calls, and a connect that does not block.
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Who listens on the port's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Ferry listens, the frontend connects.
    Server,
    /// The frontend listens, Ferry connects, and connects again whenever the connection ends.
    Client,
}

/// Owner and mode of a listening socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOwnership {
    /// Permission bits. Connecting needs write permission.
    pub mode: u32,
    /// Numeric user, `None` to leave it as created.
    pub uid: Option<u32>,
    /// Numeric group, `None` to leave it as created.
    pub gid: Option<u32>,
}

impl Default for SocketOwnership {
    fn default() -> Self {
        Self { mode: 0o660, uid: None, gid: None }
    }
}

/// Why a socket could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Longer than the 107 bytes of `sun_path`, empty, or with a NUL inside.
    #[error("{0}: not a usable socket path (1 to 107 bytes)")]
    BadPath(PathBuf),
    /// Something else has this name already.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// Another process listens there.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// A system call failed.
    #[error("{path}: {call} failed: {source}")]
    System {
        /// The socket.
        path: PathBuf,
        /// Which call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn system(path: &Path, call: &'static str, source: io::Error) -> SocketError {
    SocketError::System { path: path.to_owned(), call, source }
}

fn address(path: &Path) -> Result<(libc::sockaddr_un, libc::socklen_t), SocketError> {
    // SAFETY: sockaddr_un is plain data.
    let mut addr: libc::sockaddr_un = unsafe { mem::zeroed() };
    addr.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() >= addr.sun_path.len() || bytes.contains(&0) {
        return Err(SocketError::BadPath(path.to_owned()));
    }
    for (to, from) in addr.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let len = mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    Ok((addr, len as libc::socklen_t))
}

fn stream_socket(path: &Path) -> Result<OwnedFd, SocketError> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(system(path, "socket", io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A listening socket whose file is removed at the end.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file: only that one is removed.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on (left by a killed process) is replaced. Ownership and
    /// mode are in place before the first connection is possible.
    pub fn bind(path: &Path, ownership: SocketOwnership) -> Result<Self, SocketError> {
        let (addr, len) = address(path)?;
        remove_stale(path)?;
        let fd = stream_socket(path)?;
        // SAFETY: `addr` is an initialised sockaddr_un of `len` bytes.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) } != 0 {
            let e = io::Error::last_os_error();
            if e.kind() == io::ErrorKind::AddrInUse {
                return Err(SocketError::InUse(path.to_owned()));
            }
            return Err(system(path, "bind", e));
        }
        // From here on the file is ours: dropping the listener on an early return removes it.
        let identity = fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let listener = Self { inner: UnixListener::from(fd), path: path.to_owned(), identity };
        if ownership.uid.is_some() || ownership.gid.is_some() {
            std::os::unix::fs::chown(path, ownership.uid, ownership.gid).map_err(|e| system(path, "chown", e))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(ownership.mode & 0o777))
            .map_err(|e| system(path, "chmod", e))?;
        // A frontend that reconnects waits here until its predecessor's connection is closed.
        // SAFETY: plain system call.
        if unsafe { libc::listen(listener.inner.as_raw_fd(), 4) } != 0 {
            return Err(system(path, "listen", io::Error::last_os_error()));
        }
        Ok(listener)
    }

    /// The next connection, non-blocking; `None` when there is none now.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.inner.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(e),
            },
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if now.is_some() && now == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(system(path, "stat", e)),
        Ok(m) if !m.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(SocketError::System { source, .. }) if source.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| system(path, "unlink", e))
        }
        Err(SocketError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        // The listener is there, its queue is full.
        Err(SocketError::System { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse(path.to_owned()))
        }
        Err(e) => Err(e),
    }
}

/// Connects to `path` at once or not at all; the stream is non-blocking.
pub fn connect(path: &Path) -> Result<UnixStream, SocketError> {
    let (addr, len) = address(path)?;
    let fd = stream_socket(path)?;
    // SAFETY: `addr` is an initialised sockaddr_un of `len` bytes.
    if unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) } != 0 {
        return Err(system(path, "connect", io::Error::last_os_error()));
    }
    Ok(UnixStream::from(fd))
}

/// Shortest wait between two attempts to connect.
pub const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait between two attempts to connect, before jitter.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Exponential back-off with jitter, so that many ports do not come back in step.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    state: u64,
}

impl Backoff {
    /// Starts at [`BACKOFF_MIN`]; `seed` decorrelates the ports.
    pub fn new(seed: u64) -> Self {
        Self { next: BACKOFF_MIN, state: seed | 1 }
    }
    /// After a connection that worked.
    pub fn reset(&mut self) {
        self.next = BACKOFF_MIN;
    }
    /// How long to wait now: between 3/4 and 5/4 of a span that doubles up to [`BACKOFF_MAX`].
    pub fn delay(&mut self) -> Duration {
        // xorshift64: quality does not matter here.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let span = self.next;
        self.next = (span * 2).min(BACKOFF_MAX);
        span * 3 / 4 + span.mul_f64((self.state >> 40) as f64 / f64::from(1 << 24)) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        // Left by a killed process: the file exists, nobody listens.
        drop(UnixListener::bind(&path).unwrap());
        let l = Listener::bind(&path, SocketOwnership { mode: 0o600, uid: None, gid: None }).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&path, SocketOwnership::default()), Err(SocketError::InUse(_))));
        let c = connect(&path).unwrap();
        // The probe of the refused bind was queued first and has gone again.
        assert!(l.accept().unwrap().is_some());
        assert!(l.accept().unwrap().is_some());
        assert!(l.accept().unwrap().is_none());
        drop((c, l));
        assert!(!path.exists());
        fs::write(&path, b"data").unwrap();
        assert!(matches!(Listener::bind(&path, SocketOwnership::default()), Err(SocketError::NotASocket(_))));
        assert!(path.exists());
        assert!(matches!(connect(&dir.path().join("x".repeat(200))), Err(SocketError::BadPath(_))));
    }

    #[test]
    fn another_owners_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let l = Listener::bind(&path, SocketOwnership::default()).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(l);
        assert!(path.exists());
    }

    #[test]
    fn backoff_grows_to_its_bound_and_starts_over() {
        let mut b = Backoff::new(12345);
        let mut span = BACKOFF_MIN;
        for _ in 0..12 {
            let d = b.delay();
            assert!(d >= span * 3 / 4 && d <= span * 5 / 4, "{d:?} for {span:?}");
            span = (span * 2).min(BACKOFF_MAX);
        }
        b.reset();
        assert!(b.delay() <= BACKOFF_MIN * 5 / 4);
    }
}
