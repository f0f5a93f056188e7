//! Doing something inside a network namespace.
#![allow(unsafe_code)] // Its job: setns.
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Runs `f` in a thread of its own inside the network namespace called `name`. Sockets made there stay there, whoever uses them.
///
/// # Errors
/// When there is no such namespace, or `f` fails.
pub fn enter<T: Send>(name: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(format!("/run/netns/{name}")).with_context(|| name.to_string())?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            // SAFETY: a valid descriptor; only this thread changes its namespace, and it ends below.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error()).context("setns");
            }
            f()
        });
        inside.join().map_err(|_| anyhow!("thread in the namespace panicked"))?
    })
}
