//! DPDK's log, routed to `tracing` (target `dpdk`) with a rate limit, and remembered for error messages.
//!
//! DPDK reports *that* something failed by return value and *why* only in its log. The control lane therefore
//! collects what was logged at warning level or worse while an operation ran, and puts it into the error.
#![allow(unsafe_code)] // Its job: a callback from C.
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ferry_dpdk_sys as sys;

/// Lines passed on per second; a broken driver must not fill the disk.
const LINES_PER_SECOND: u32 = 50;
/// Lines kept for an error message.
const KEPT_LINES: usize = 8;
/// Longest line kept or passed on, bytes.
const LINE_BYTES: usize = 512;
/// RTE_LOG_ERR and RTE_LOG_WARNING (rte_log.h).
const RTE_LOG_ERR: u32 = 4;
const RTE_LOG_WARNING: u32 = 5;
const RTE_LOG_NOTICE: u32 = 6;
const RTE_LOG_INFO: u32 = 7;

struct State {
    kept: Vec<String>,
    second: Option<Instant>,
    lines: u32,
    suppressed: u32,
}

static STATE: Mutex<State> = Mutex::new(State { kept: Vec::new(), second: None, lines: 0, suppressed: 0 });
/// Set while failure is an expected answer: everything is passed on at debug level.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Directs DPDK's log here. To be called before `rte_eal_init`.
pub(crate) fn open() -> Result<(), i32> {
    // SAFETY: the callback is a plain function and lives as long as the program.
    match unsafe { sys::ferry_log_open(Some(sink)) } {
        0 => Ok(()),
        errno => Err(-errno),
    }
}

/// Runs `f` and returns what was logged at warning level or worse meanwhile.
pub(crate) fn collect<R>(f: impl FnOnce() -> R) -> (R, Vec<String>) {
    with_state(|s| s.kept.clear());
    let r = f();
    (r, with_state(|s| std::mem::take(&mut s.kept)))
}

/// Runs `f`, whose failure is an expected answer and should not alarm anyone who reads the log.
pub(crate) fn quietly<R>(f: impl FnOnce() -> R) -> R {
    QUIET.store(true, Relaxed);
    let r = f();
    QUIET.store(false, Relaxed);
    r
}

fn with_state<R>(f: impl FnOnce(&mut State) -> R) -> R {
    f(&mut STATE.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

unsafe extern "C" fn sink(level: u32, text: *const core::ffi::c_char, len: usize) {
    if text.is_null() {
        return;
    }
    // SAFETY: the shim passes the buffer that stdio hands to the stream's write function: `len` readable bytes.
    let bytes = unsafe { core::slice::from_raw_parts(text.cast::<u8>(), len) };
    // An unwinding panic must not cross into C.
    let _ = std::panic::catch_unwind(|| {
        for line in String::from_utf8_lossy(bytes).lines() {
            deliver(level, clip(line.trim_end()));
        }
    });
}

fn clip(line: &str) -> &str {
    let mut end = line.len().min(LINE_BYTES);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.get(..end).unwrap_or_default()
}

fn deliver(level: u32, line: &str) {
    if line.is_empty() {
        return;
    }
    let quiet = QUIET.load(Relaxed);
    let (pass, suppressed) = with_state(|s| {
        if level <= RTE_LOG_WARNING && !quiet {
            if s.kept.len() >= KEPT_LINES {
                s.kept.remove(0);
            }
            s.kept.push(line.to_owned());
        }
        let now = Instant::now();
        let fresh = s.second.is_none_or(|t| now.duration_since(t) >= Duration::from_secs(1));
        let mut suppressed = 0;
        if fresh {
            suppressed = std::mem::take(&mut s.suppressed);
            s.second = Some(now);
            s.lines = 0;
        }
        s.lines += 1;
        let pass = s.lines <= LINES_PER_SECOND;
        if !pass {
            s.suppressed = s.suppressed.saturating_add(1);
        }
        (pass, suppressed)
    });
    if suppressed > 0 {
        tracing::warn!(target: "dpdk", lines = suppressed, "log lines suppressed");
    }
    if !pass {
        return;
    }
    match level {
        _ if quiet => tracing::debug!(target: "dpdk", "{line}"),
        0..=RTE_LOG_ERR => tracing::error!(target: "dpdk", "{line}"),
        RTE_LOG_WARNING => tracing::warn!(target: "dpdk", "{line}"),
        RTE_LOG_NOTICE | RTE_LOG_INFO => tracing::info!(target: "dpdk", "{line}"),
        _ => tracing::debug!(target: "dpdk", "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let line = "ä".repeat(LINE_BYTES);
        let cut = clip(&line);
        assert_eq!(cut.len(), LINE_BYTES);
        assert!(line.starts_with(cut));
    }

    #[test]
    fn warnings_are_kept_for_the_error_message_and_bounded() {
        let ((), kept) = collect(|| {
            deliver(RTE_LOG_INFO, "not of interest");
            for i in 0..20 {
                deliver(RTE_LOG_ERR, &format!("line {i}"));
            }
        });
        assert_eq!(kept.len(), KEPT_LINES);
        assert_eq!(kept.last().map(String::as_str), Some("line 19"));
    }
}
