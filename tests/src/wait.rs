//! Waiting with a bound.
use anyhow::{Result, bail};
use std::thread;
use std::time::{Duration, Instant};

/// Polls `f` every 10 ms until it gives a value; after `timeout` fails, naming `what` was waited for.
pub fn for_some<T>(what: &str, timeout: Duration, mut f: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(v) = f() {
            return Ok(v);
        }
        if start.elapsed() > timeout {
            bail!("{what}: not within {timeout:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Polls `f` every 10 ms until it is true; after `timeout` fails, naming `what` was waited for.
pub fn until(what: &str, timeout: Duration, mut f: impl FnMut() -> bool) -> Result<()> {
    for_some(what, timeout, || f().then_some(()))
}
