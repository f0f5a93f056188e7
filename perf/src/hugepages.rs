//! Huge pages: DPDK's switches need them, and guests have them as they would under QEMU.
use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB in the kernel's pool, put back to what it was on drop.
#[derive(Debug)]
pub struct HugePages {
    before: Option<u64>,
}

fn pool() -> Result<u64> {
    fs::read_to_string(COUNT)?.trim().parse().context(COUNT)
}

fn free() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("HugePages_Free:"));
    line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
}

impl HugePages {
    /// Makes sure that `pages` are free.
    ///
    /// # Errors
    /// When the kernel has not as many, or the process may not ask.
    pub fn reserve(pages: u64) -> Result<Self> {
        let (before, free_before) = (pool()?, free());
        if free_before >= pages {
            return Ok(Self { before: None });
        }
        let wanted = before + pages - free_before;
        process::on_signal(move || {
            // Children have been told to end with this process; their pages come back a moment later.
            let _ = fs::write(COUNT, before.to_string());
        })?;
        fs::write(COUNT, wanted.to_string()).with_context(|| format!("{COUNT} (needs root)"))?;
        let this = Self { before: Some(before) };
        let now = free();
        if now < pages {
            bail!("the kernel has only {now} free huge pages of {pages}");
        }
        Ok(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = fs::write(COUNT, before.to_string());
        }
    }
}
