//! Where things are: the workspace, the target directory, the switch's binaries.
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The workspace's root folder.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// Cargo's target directory (`CARGO_TARGET_DIR`, else `target` in the workspace).
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// A binary of this workspace (`ferryd`, `ferry`): in `FERRY_BIN_DIR`, else beside the running test's profile folder.
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("FERRY_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let exe = std::env::current_exe().context("own path")?;
            // target/PROFILE/deps/test-0123 or target/PROFILE/ferry-demo
            let dir = exe.parent().context("own folder")?;
            if dir.ends_with("deps") {
                dir.parent().context("profile folder")?.to_path_buf()
            } else {
                dir.to_path_buf()
            }
        }
    };
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `cargo build -p ferry-control --bins` first", path.display());
    }
    Ok(path)
}
