//! Files that hold keys and certificates: private by permission, replaced as a whole, bounded in size.
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::PkiError;

/// Longest file that is read, bytes. A bundle of certificates takes a few kilobytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// Holds a private key: 0600, nobody but its owner.
    Private,
    /// Certificates: 0644, nobody but its owner may write.
    Public,
}

impl Secrecy {
    fn mode(self) -> u32 {
        match self {
            Self::Private => 0o600,
            Self::Public => 0o644,
        }
    }

    fn forbidden(self) -> u32 {
        match self {
            Self::Private => 0o077,
            Self::Public => 0o022,
        }
    }
}

/// The text of a file, refused when it is too long, no regular file, or open to others than its owner.
/// Permissions are those of the opened file, so that they cannot be exchanged between check and use.
pub(crate) fn read(path: &Path, secrecy: Secrecy, remedy: &str) -> Result<String, PkiError> {
    // A FIFO in the file's place must not block the opener.
    let mut file =
        OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => PkiError::Missing { path: path.to_owned(), remedy: remedy.to_owned() },
            _ => PkiError::io(path, "open", e),
        })?;
    let metadata = file.metadata().map_err(|e| PkiError::io(path, "examine", e))?;
    if !metadata.is_file() {
        return Err(PkiError::content(path, "is not a regular file"));
    }
    check_owner(path, &metadata)?;
    if metadata.mode() & secrecy.forbidden() != 0 {
        let problem = match secrecy {
            Secrecy::Private => "holds a private key but others than its owner have access",
            Secrecy::Public => "others than its owner may write it",
        };
        return Err(PkiError::Permissions {
            path: path.to_owned(),
            problem: format!("{problem} (mode {:04o})", metadata.mode() & 0o7777),
            remedy: format!("run: chmod {:04o} {}", secrecy.mode(), path.display()),
        });
    }
    let mut text = String::new();
    (&mut file).take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|e| match e.kind() {
        ErrorKind::InvalidData => PkiError::content(path, "is not text in PEM form"),
        _ => PkiError::io(path, "read", e),
    })?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(PkiError::content(path, format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// Replaces a file as a whole: after a crash it has its old or its new content. It gets the mode of `secrecy` from its first byte on.
pub(crate) fn write(path: &Path, secrecy: Secrecy, text: &str) -> Result<(), PkiError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    // Left by a crash; the directory's lock says that nobody else is writing it.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(PkiError::io(&new, "remove", e)),
        _ => {}
    }
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(secrecy.mode()).open(&new)?;
        // The umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(secrecy.mode()))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_parent(path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&new);
        PkiError::io(path, "write", e)
    })
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Makes a directory (and its parents) that only its owner can enter; an existing one is checked as [`check_directory`] does.
pub(crate) fn make_directory(path: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| PkiError::io(path, "create", e))?;
    check_directory(path, "")
}

/// Refuses a directory that others than its owner can enter.
pub(crate) fn check_directory(path: &Path, remedy: &str) -> Result<(), PkiError> {
    let metadata = fs::metadata(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => PkiError::Missing { path: path.to_owned(), remedy: remedy.to_owned() },
        _ => PkiError::io(path, "examine", e),
    })?;
    if !metadata.is_dir() {
        return Err(PkiError::content(path, "is not a directory"));
    }
    check_owner(path, &metadata)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(PkiError::Permissions {
            path: path.to_owned(),
            problem: format!("others than its owner have access (mode {:04o})", metadata.mode() & 0o7777),
            remedy: format!("run: chmod 0700 {}", path.display()),
        });
    }
    Ok(())
}

fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), PkiError> {
    let own = nix::unistd::geteuid().as_raw();
    if metadata.uid() == own || metadata.uid() == 0 {
        return Ok(());
    }
    Err(PkiError::Permissions {
        path: path.to_owned(),
        problem: format!("belongs to user {}, neither to root nor to the user of this process ({own})", metadata.uid()),
        remedy: format!("run: chown {own} {}", path.display()),
    })
}

/// Held while a command changes a directory; given back when dropped or when the process dies.
pub(crate) struct DirectoryLock(#[expect(dead_code, reason = "the lock lives as long as the descriptor")] File);

/// Takes the directory's lock, at once or not at all.
pub(crate) fn lock_directory(directory: &Path) -> Result<DirectoryLock, PkiError> {
    let path: PathBuf = directory.join(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| PkiError::io(&path, "open", e))?;
    match file.try_lock() {
        Ok(()) => Ok(DirectoryLock(file)),
        Err(fs::TryLockError::WouldBlock) => Err(PkiError::Busy { path }),
        Err(fs::TryLockError::Error(e)) => Err(PkiError::io(&path, "lock", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_command_that_corrects_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write(&path, Secrecy::Private, "secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(read(&path, Secrecy::Private, "").unwrap(), "secret");
        for mode in [0o604, 0o640, 0o660, 0o666, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path, Secrecy::Private, "").unwrap_err().to_string();
            assert!(error.contains(&format!("chmod 0600 {}", path.display())), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(matches!(read(&path, Secrecy::Public, ""), Err(PkiError::Permissions { .. })));
    }

    #[test]
    fn odd_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(
            matches!(read(&path, Secrecy::Public, "make it"), Err(PkiError::Missing { remedy, .. }) if remedy == "make it")
        );
        fs::write(&path, vec![b'a'; MAX_FILE_BYTES as usize + 1]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(read(&path, Secrecy::Public, "").unwrap_err().to_string().contains("longer than"));
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(read(&path, Secrecy::Public, "").unwrap_err().to_string().contains("PEM"));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&fifo, Secrecy::Private, "").unwrap_err().to_string().contains("regular"));
        assert!(read(dir.path(), Secrecy::Private, "").is_err());
    }

    #[test]
    fn a_replacement_is_whole_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(dir.path().join("file.new"), "left by a crash").unwrap();
        write(&path, Secrecy::Public, "one").unwrap();
        write(&path, Secrecy::Private, "two").unwrap();
        assert_eq!(read(&path, Secrecy::Private, "").unwrap(), "two");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    }

    #[test]
    fn one_command_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock_directory(dir.path()).unwrap();
        assert!(matches!(lock_directory(dir.path()), Err(PkiError::Busy { .. })));
        drop(held);
        lock_directory(dir.path()).unwrap();
    }
}
