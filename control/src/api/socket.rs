//! The API's socket in the file system: one daemon at a time, leftovers of a dead one are replaced, permissions as configured.
use std::fs::{File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Gid, Group, Uid, User};

use crate::config::{ApiConfig, Owner};

/// The bound socket. Removed from the file system when dropped; the lock beside it stays as an empty file.
pub struct ApiSocket {
    path: PathBuf,
    inode: u64,
    listener: UnixListener,
    lock: Flock<File>,
}

impl ApiSocket {
    /// Takes the lock `<socket>.lock` and binds the socket.
    ///
    /// # Errors
    /// Another daemon serves this socket, or the file system refuses.
    pub fn bind(config: &ApiConfig) -> anyhow::Result<Self> {
        let path = config.socket.clone();
        if let Some(dir) = path.parent().filter(|d| !d.exists()) {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            std::fs::set_permissions(dir, Permissions::from_mode(0o755))?;
        }
        let lock = lock(&path)?;
        remove_stale(&path)?;
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        let inode = std::fs::symlink_metadata(&path)?.ino();
        let socket = Self { path, inode, listener, lock };
        if let Some(group) = &config.group {
            let gid = resolve_group(group).context("api.group")?;
            std::os::unix::fs::chown(&socket.path, None, Some(gid))
                .with_context(|| format!("cannot give {} to group {gid} (api.group)", socket.path.display()))?;
        }
        // Last: before this nobody but the owner gets in (the daemon's umask is 077).
        std::fs::set_permissions(&socket.path, Permissions::from_mode(config.mode.0))?;
        Ok(socket)
    }

    /// The listening socket.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn listener(&self) -> std::io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        // Only what is still ours, while the lock is held.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
        // The file stays: removing it could let two daemons each lock their own.
        let _ = self.lock.set_len(0);
    }
}

fn lock(socket: &Path) -> anyhow::Result<Flock<File>> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let mut open = OpenOptions::new();
    open.read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    let file = open.open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let who = if pid.trim().is_empty() { String::new() } else { format!(" (pid {})", pid.trim()) };
            bail!("another ferryd{who} serves {}: stop it first, or give this one another api.socket", socket.display())
        }
        Err((_, e)) => bail!("cannot lock {}: {e}", path.display()),
    }
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot look at {}", path.display())),
        Ok(m) if m.file_type().is_socket() => {
            tracing::info!("replacing the socket {} of a daemon that is gone", path.display());
            std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
        }
        Ok(_) => bail!("{} exists and is not a socket: move it away, or change api.socket", path.display()),
    }
}

/// A group's number.
///
/// # Errors
/// There is no group of that name.
pub fn resolve_group(owner: &Owner) -> anyhow::Result<u32> {
    match owner {
        Owner::Id(id) => Ok(Gid::from_raw(*id).as_raw()),
        Owner::Name(name) => match Group::from_name(name)? {
            Some(g) => Ok(g.gid.as_raw()),
            None => bail!("there is no group \"{name}\""),
        },
    }
}

/// A user's number.
///
/// # Errors
/// There is no user of that name.
pub fn resolve_user(owner: &Owner) -> anyhow::Result<u32> {
    match owner {
        Owner::Id(id) => Ok(Uid::from_raw(*id).as_raw()),
        Owner::Name(name) => match User::from_name(name)? {
            Some(u) => Ok(u.uid.as_raw()),
            None => bail!("there is no user \"{name}\""),
        },
    }
}
