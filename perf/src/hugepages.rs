//! Huge pages: DPDK's switches need them, and guests have them as they would under QEMU.
use crate::settings::{self, Setting};
use anyhow::{Context, Result, bail};
use std::fs;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB in the kernel's pool, put back to what it was on drop.
#[derive(Debug)]
pub struct HugePages {
    _pool: Option<Setting>,
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
        let free_before = free();
        if free_before >= pages {
            return Ok(Self { _pool: None });
        }
        let before: u64 = settings::read(COUNT)?.parse().context(COUNT)?;
        let wanted = (before + pages - free_before).to_string();
        let pool = Setting::change(COUNT, &wanted)?;
        // Memory may be too scattered for as many at once; each attempt finds more.
        for _ in 0..5 {
            if free() >= pages {
                break;
            }
            let _ = fs::write("/proc/sys/vm/compact_memory", "1");
            pool.set(&wanted)?;
        }
        let now = free();
        if now < pages {
            bail!("the kernel has only {now} free huge pages of {pages}");
        }
        Ok(Self { _pool: Some(pool) })
    }
}
