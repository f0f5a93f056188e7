//! Processes of the switches: started with a log, stopped and continued between windows, ended with their owner.
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A child process. Ended on drop: SIGTERM, after two seconds SIGKILL.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    name: String,
}

impl Process {
    /// Starts a command with its output going to `log`. Its standard input stays open, empty.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output);
        die_with_parent(&mut command);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, log: log.to_path_buf(), name })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Fails when it has ended.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("{} ended with {status}:\n{}", self.name, tail.join("\n"));
        }
        Ok(())
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// When it ends before, or is not ready within `patience`.
    pub fn wait_for(&mut self, what: &str, patience: Duration, mut ready: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !ready(self) {
            self.check()?;
            if Instant::now() > deadline {
                bail!("{}: no {what} within {patience:?}:\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Takes it off the processor.
    pub fn pause(&self) {
        let _ = kill(self.pid(), Signal::SIGSTOP);
    }

    /// Lets it run again.
    pub fn resume(&self) {
        let _ = kill(self.pid(), Signal::SIGCONT);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.resume();
        let _ = kill(self.pid(), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets the child end with the thread that starts it, however that ends, and take signals that this process has blocked.
#[allow(unsafe_code)] // What runs between fork and exec.
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: both calls are async-signal-safe and touch nothing of the parent's.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            nix::sys::signal::SigSet::all().thread_unblock().map_err(Into::into)
        });
    }
}

/// From now on SIGINT and SIGTERM end the process after `last` has run. To be called before any thread is started.
///
/// # Errors
/// When the signals cannot be blocked.
pub fn on_signal(last: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    std::thread::spawn(move || {
        let _ = set.wait();
        last();
        std::process::exit(130);
    });
    Ok(())
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it fails, with what it printed to standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let done = command.stdin(Stdio::null()).output().with_context(|| name.clone())?;
    if !done.status.success() {
        let text = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
        bail!("{name}: {}: {}", done.status, text.trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
