//! Builds what test guests boot: Debian's cloud kernel, uncompressed, and an initramfs of busybox and our agent.
//! Built once and kept in `target/guest/`, keyed by kernel version and content.
pub mod initramfs;
pub mod kernel;

use crate::{paths, process};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The files that a guest boots from.
#[derive(Clone, Debug)]
pub struct Image {
    /// Uncompressed kernel (PVH ELF): boots faster than the bzImage.
    pub kernel: PathBuf,
    /// initramfs, a cpio archive.
    pub initrd: PathBuf,
    /// The agent, statically linked: also runs in namespaces.
    pub agent: PathBuf,
}

static IMAGE: Mutex<Option<Image>> = Mutex::new(None);

/// The image, built now if it is not there yet. Other test processes wait for the one that builds.
///
/// # Errors
/// When the kernel package cannot be had, busybox is missing, or the agent does not build.
pub fn image() -> Result<Image> {
    let mut cached = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(image) = &*cached {
        return Ok(image.clone());
    }
    let dir = paths::target().join("guest");
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    // Held until the file is closed at the end of this function.
    let lock = File::create(dir.join("lock")).context("lock file")?;
    lock.lock().context("lock file")?;
    let image = build(&dir).context("cannot build the test guest")?;
    *cached = Some(image.clone());
    Ok(image)
}

fn build(dir: &Path) -> Result<Image> {
    let kernel = kernel::prepare(dir)?;
    let agent = build_agent(dir)?;
    let initrd = dir.join("initrd.cpio");
    let content = initramfs::build(&kernel, &agent)?;
    // A running guest may be reading the present file: replace it only when it differs, and then at once.
    if fs::read(&initrd).ok().as_deref() != Some(content.as_slice()) {
        let fresh = dir.join("initrd.new");
        fs::write(&fresh, &content)?;
        fs::rename(&fresh, &initrd)?;
    }
    Ok(Image { kernel: kernel.vmlinux, initrd, agent })
}

/// Builds the agent as a static binary. Cargo decides whether there is anything to do.
fn build_agent(dir: &Path) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    if let Some(agent) = std::env::var_os("FERRY_GUEST_AGENT") {
        return Ok(agent.into());
    }
    let target_dir = dir.join("cargo");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(paths::workspace())
        .args([
            "build",
            "--quiet",
            "--package",
            "ferry-guest",
            "--profile",
            "guest",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target_dir)
        // Explicit target: proc macros and build scripts are built without these flags.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    process::run(cargo, Duration::from_secs(600))?;
    let agent = target_dir.join(TARGET).join("guest/ferry-guest");
    if !agent.is_file() {
        bail!("{} was not built", agent.display());
    }
    Ok(agent)
}
