//! Per-test folders and names, and the removal of what killed runs left behind.
use crate::process;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// First part of every name; the second is the owner's process id.
const PREFIX: &str = "ferry-e2e";
static NEXT: AtomicU32 = AtomicU32::new(0);
static JANITOR: Once = Once::new();

/// A name that no other test uses: `ferry-e2e-PID-N`. Valid for folders and network namespaces.
pub fn unique_name() -> String {
    JANITOR.call_once(sweep);
    format!("{PREFIX}-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed))
}

/// The process that owns a name made by [`unique_name`].
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.strip_prefix('-')?.split('-').next()?.parse().ok()
}

/// Removes namespaces and folders whose owner no longer runs.
fn sweep() {
    let stale = |name: &str| owner(name).is_some_and(|pid| !process::exists(pid));
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if stale(&name) {
            let mut c = Command::new("ip");
            c.args(["netns", "delete", &name]);
            let _ = process::run(c, Duration::from_secs(10));
        }
    }
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if stale(&entry.file_name().to_string_lossy()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A test's own folder, for sockets, configuration and logs. Kept when the test fails and `FERRY_TEST_KEEP` is set.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a fresh folder. Its path is short enough for Unix sockets in it.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(unique_name());
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("FERRY_TEST_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_tell_their_owner() {
        let (a, b) = (unique_name(), unique_name());
        assert_ne!(a, b);
        assert_eq!(owner(&a), Some(std::process::id()));
        assert_eq!(owner("ferry-e2e"), None);
        assert_eq!(owner("ferry-e2e-x-1"), None);
        assert_eq!(owner("other-12-1"), None);
    }

    #[test]
    fn folders_of_dead_owners_are_removed_and_others_kept() {
        // Process ids end below 2^22 on Linux.
        let dead = std::env::temp_dir().join(format!("{PREFIX}-99999999-7"));
        std::fs::create_dir_all(&dead).unwrap();
        let mine = Scratch::new().unwrap();
        sweep();
        assert!(!dead.exists());
        assert!(mine.path().exists());
        let path = mine.path().to_path_buf();
        drop(mine);
        assert!(!path.exists());
    }
}
