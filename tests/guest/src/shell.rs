//! Shell commands bounded in time.
use crate::system;
use ferry_guest::protocol::{MAX_OUTPUT_BYTES, ShellReport};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `sh -c command` in its own process group, which is killed when `timeout` has passed.
pub fn run(command: &str, timeout: Duration) -> Result<ShellReport, String> {
    let (mut reader, writer) = io::pipe().map_err(|e| e.to_string())?;
    let writer2 = writer.try_clone().map_err(|e| e.to_string())?;
    let mut process = Command::new("/bin/sh");
    process.arg("-c").arg(command).stdin(Stdio::null()).stdout(writer).stderr(writer2).process_group(0);
    let mut child = process.spawn().map_err(|e| format!("sh: {e}"))?;
    drop(process); // Closes our ends of the pipe, so that the reader sees the end.
    let collector = thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buf = [0; 4096];
        while let Ok(n) = reader.read(&mut buf) {
            if n == 0 {
                break;
            }
            let room = MAX_OUTPUT_BYTES.saturating_sub(kept.len());
            kept.extend_from_slice(&buf[..n.min(room)]);
        }
        kept
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status.code(),
            None if start.elapsed() > timeout => {
                system::kill_group(child.id());
                let _ = child.wait();
                break None;
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    // A command may leave a background process holding the pipe: do not wait for that one.
    let deadline = Instant::now() + Duration::from_millis(200);
    while !collector.is_finished() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
    let output = if collector.is_finished() { collector.join().unwrap_or_default() } else { Vec::new() };
    Ok(ShellReport { status, output: String::from_utf8_lossy(&output).into_owned() })
}
