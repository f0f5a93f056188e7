//! Settings of the machine that a run changes and puts back, also when it is interrupted.
use crate::process;
use anyhow::{Context, Result};
use std::fs;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// File and earlier value of everything that is changed at the moment, in the order in which it was changed.
static CHANGED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
static ON_SIGNAL: Once = Once::new();

fn changed() -> MutexGuard<'static, Vec<(String, String)>> {
    // The list is whole at any moment, whatever the thread that held it came to.
    CHANGED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A changed setting; has its earlier value again on drop, or when SIGINT or SIGTERM ends the process.
#[derive(Debug)]
pub struct Setting {
    file: String,
}

/// What the file holds.
///
/// # Errors
/// When it cannot be read.
pub fn read(file: &str) -> Result<String> {
    Ok(fs::read_to_string(file).with_context(|| file.to_owned())?.trim().to_owned())
}

impl Setting {
    /// Writes `value` to a file below /proc/sys or /sys.
    ///
    /// # Errors
    /// When the kernel refuses it. Nothing is changed then.
    pub fn change(file: &str, value: &str) -> Result<Self> {
        let before = read(file)?;
        // The first setting is made before any thread is started (huge pages), so that all block the signals.
        let mut handled = Ok(());
        ON_SIGNAL.call_once(|| {
            handled = process::on_signal(|| changed().iter().rev().for_each(|(f, v)| drop(fs::write(f, v))));
        });
        handled?;
        fs::write(file, value).with_context(|| format!("{file} (needs root)"))?;
        changed().push((file.to_owned(), before));
        Ok(Self { file: file.to_owned() })
    }

    /// Raises a number to at least `least`; `None` when it is as large already.
    ///
    /// # Errors
    /// As [`Self::change`], or when it is no number.
    pub fn at_least(file: &str, least: u64) -> Result<Option<Self>> {
        let now: u64 = read(file)?.parse().with_context(|| file.to_owned())?;
        if now >= least { Ok(None) } else { Self::change(file, &least.to_string()).map(Some) }
    }

    /// Writes another value; what is put back stays what it was first.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn set(&self, value: &str) -> Result<()> {
        fs::write(&self.file, value).with_context(|| self.file.clone())
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let mut changed = changed();
        if let Some(i) = changed.iter().rposition(|(f, _)| *f == self.file) {
            let (file, before) = changed.remove(i);
            // Nothing more can be done about a refusal.
            let _ = fs::write(file, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_put_back() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let path = file.path().to_str().expect("path");
        fs::write(path, "7\n").expect("write");
        assert!(Setting::at_least(path, 7).expect("as large already").is_none());
        {
            let first = Setting::at_least(path, 9).expect("raised").expect("raised");
            assert_eq!(read(path).expect("read"), "9");
            first.set("12").expect("set");
            let _second = Setting::change(path, "20").expect("changed");
            assert_eq!(read(path).expect("read"), "20");
        }
        assert_eq!(read(path).expect("read"), "7");
        assert!(Setting::change("/proc/sys/kernel/osrelease", "x").is_err());
    }
}
