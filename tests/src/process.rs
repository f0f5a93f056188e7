//! Child processes that cannot outlive the test, whatever way it ends.
#![allow(unsafe_code)] // Its job: prctl and kill.
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

type Order = (Command, Sender<io::Result<Child>>);
static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();

/// Spawns so that the kernel kills the child when this process dies.
///
/// The kernel's rule is "when the *thread* that forked ends", so that all children are forked by one thread that
/// lives as long as the process.
fn spawn_bound(mut command: Command) -> Result<Child> {
    // SAFETY: between fork and exec only the async-signal-safe prctl and getppid are called.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the request took effect.
            if libc::getppid() == 1 { Err(io::Error::other("parent is gone")) } else { Ok(()) }
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let name = command.get_program().to_string_lossy().into_owned();
    let (reply, result) = channel();
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| anyhow!("spawner thread is gone"))?;
    result.recv().context("spawner thread is gone")?.with_context(|| format!("cannot start {name}"))
}

/// A child process, killed (SIGKILL) and reaped on drop, with its output in a log file.
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with standard input from nowhere and both outputs appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn spawn(command: Command, log: &Path) -> Result<Self> {
        Self::spawn_with(command, log, |c| {
            c.stdin(Stdio::null());
            Ok(())
        })
    }

    /// Like [`Self::spawn`], with pipes for standard input and output: take them from [`Self::child`].
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_piped(command: Command, log: &Path) -> Result<Self> {
        Self::spawn_with(command, log, |c| {
            c.stdin(Stdio::piped()).stdout(Stdio::piped());
            Ok(())
        })
    }

    /// Like [`Self::spawn`], with a pipe for standard input only.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_commanded(command: Command, log: &Path) -> Result<Self> {
        Self::spawn_with(command, log, |c| {
            c.stdin(Stdio::piped());
            Ok(())
        })
    }

    fn spawn_with(mut command: Command, log: &Path, wire: impl FnOnce(&mut Command) -> Result<()>) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        command.stdout(file.try_clone()?).stderr(file);
        wire(&mut command)?;
        let child = spawn_bound(command)?;
        Ok(Self { child, name, log: log.to_path_buf() })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Its exit status, once it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal. One to a process that has ended is ignored.
    pub fn signal(&mut self, signal: i32) {
        if self.ended().is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            // SAFETY: no memory is involved; the child is not reaped yet, so that the id is its own.
            unsafe { libc::kill(pid, signal) };
        }
    }

    /// Kills it at once (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it is still running after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        crate::wait::for_some(&format!("end of {}", self.name), timeout, || self.ended())
    }

    /// Sum of its anonymous writable mappings of at least `least` bytes each: large tables, but neither heaps nor stacks.
    ///
    /// # Errors
    /// When it has ended.
    pub fn large_memory(&self, least: u64) -> Result<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        Ok(maps.lines().filter_map(anonymous_bytes).filter(|bytes| *bytes >= least).sum())
    }

    /// Processor time (user and system) used so far by all its threads.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // The name in parentheses may contain anything; the fields after it are numbered from 3 (proc(5)).
        let (_, rest) = stat.rsplit_once(')').context("malformed stat")?;
        let field = |n: usize| rest.split_whitespace().nth(n - 3).and_then(|v| v.parse::<u64>().ok());
        let ticks = field(14).zip(field(15)).map(|(u, s)| u + s).context("malformed stat")?;
        // SAFETY: sysconf has no preconditions.
        let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
        Ok(Duration::from_millis(ticks * 1000 / per_second))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Size of a mapping, from its line in `maps` (proc(5)), if it is anonymous and writable.
fn anonymous_bytes(line: &str) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (range, mode) = (fields.next()?, fields.next()?);
    let (start, end) = range.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let anonymous = fields.nth(2)? == "0" && fields.next().is_none();
    (anonymous && mode == "rw-p").then_some(hex(end)?.checked_sub(hex(start)?)?)
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started, fails, or is still running after `timeout` (it is killed then).
pub fn run(mut command: Command, timeout: Duration) -> Result<String> {
    let text = format!("{command:?}");
    let mut output = tempfile::tempfile()?;
    let mut errors = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(errors.try_clone()?);
    let mut child = spawn_bound(command)?;
    let start = Instant::now();
    let mut nap = Duration::from_micros(500);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > timeout {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(10));
    };
    let (output, errors) = (slurp(&mut output)?, slurp(&mut errors)?);
    match status {
        Some(s) if s.success() => Ok(output),
        Some(s) => Err(anyhow!("{text}: {s}\n{output}{errors}")),
        None => Err(anyhow!("{text}: still running after {timeout:?}\n{output}{errors}")),
    }
}

fn slurp(file: &mut File) -> Result<String> {
    use std::io::{Read, Seek};
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a process with this id exists.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut c = Command::new("sh");
        c.arg("-c").arg(script);
        c
    }

    #[test]
    fn run_reports_output_failure_and_time_out() {
        let ten = Duration::from_secs(10);
        assert_eq!(run(sh("echo hello"), ten).unwrap(), "hello\n");
        let e = run(sh("echo oops >&2; exit 3"), ten).unwrap_err().to_string();
        assert!(e.contains("oops") && e.contains('3'), "{e}");
        let e = run(sh("sleep 60"), Duration::from_millis(100)).unwrap_err().to_string();
        assert!(e.contains("still running"), "{e}");
    }

    #[test]
    fn children_die_with_their_owner_and_outlive_the_thread_that_asked_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let p = thread::spawn(move || Process::spawn(sh("exec sleep 60"), &log).unwrap()).join().unwrap();
        let pid = p.pid();
        thread::sleep(Duration::from_millis(100));
        assert!(exists(pid));
        drop(p);
        assert!(!exists(pid));
    }

    #[test]
    fn only_large_anonymous_mappings_count() {
        assert_eq!(anonymous_bytes("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 "), Some(4096));
        assert_eq!(anonymous_bytes("7f0000000000-7f0000001000 r--p 00000000 00:00 0"), None);
        assert_eq!(anonymous_bytes("7f0000000000-7f0000001000 rw-p 00000000 08:01 77 /usr/lib/x.so"), None);
        let dir = tempfile::tempdir().unwrap();
        let p = Process::spawn(sh("exec sleep 60"), &dir.path().join("log")).unwrap();
        assert_eq!(p.large_memory(1 << 30).unwrap(), 0);
    }

    #[test]
    fn cpu_time_counts_work_but_not_sleep() {
        let dir = tempfile::tempdir().unwrap();
        let lazy = Process::spawn(sh("exec sleep 60"), &dir.path().join("a")).unwrap();
        let busy = Process::spawn(sh("while :; do :; done"), &dir.path().join("b")).unwrap();
        crate::wait::until("busy loop's time", Duration::from_secs(30), || {
            busy.cpu_time().unwrap() > Duration::from_millis(200)
        })
        .unwrap();
        assert!(lazy.cpu_time().unwrap() < Duration::from_millis(100));
    }
}
