//! libvirt's daemon, with everything of its own: files, host name, processes. Several of them on one machine are like several hosts.
use crate::process::{self, Process};
use crate::wait;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Bound for the daemon's start, which asks QEMU what it can do, and for every command.
const PATIENCE: Duration = Duration::from_secs(60);

/// Configuration of its QEMU driver: nothing that needs a whole system around it.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nsecurity_driver = \"none\"\ncgroup_controllers = []\n\
                         namespaces = []\nstdio_handler = \"file\"\nremember_owner = 0\n";

/// What it does before it becomes the daemon: its own view of the places where libvirt keeps things.
const SET_UP: &str = r#"set -e
hostname "$1"
for place in /run /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do
    mkdir -p "$place"
    mount -t tmpfs tmpfs "$place"
done
# The user that Debian's libvirt looks for, and does not use here.
for file in passwd group; do
    { grep -v '^libvirt-qemu:' "/etc/$file"; [ $file = passwd ] && echo 'libvirt-qemu:x:64055:64055::/:/bin/false' || echo 'libvirt-qemu:x:64055:'; } > "$2/$file"
    mount --bind "$2/$file" "/etc/$file"
done
cp "$2/qemu.conf" /etc/libvirt/qemu.conf
# Not in this process's place: the first process of a namespace must reap those that lose their parent, and QEMU does.
libvirtd -f "$2/libvirtd.conf" &
wait $!
"#;

/// A running daemon. It and its guests are killed on drop.
pub struct Libvirt {
    process: Process,
    dir: PathBuf,
}

impl Libvirt {
    /// Starts a daemon with its files in a new folder `host` below `scratch`. `uuid`: the host's. Needs root.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(scratch: &Path, host: &str, uuid: &str) -> Result<Self> {
        let dir = scratch.join(host);
        fs::create_dir(&dir)?;
        fs::write(dir.join("qemu.conf"), QEMU_CONF)?;
        let conf = format!(
            "unix_sock_dir = {dir:?}\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nhost_uuid = \"{uuid}\"\nlog_outputs = \"3:stderr\"\n"
        );
        fs::write(dir.join("libvirtd.conf"), conf)?;
        let mut c = Command::new("unshare");
        // Its processes end with the first one, and that one with this process.
        c.args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SET_UP, "sh", host]);
        c.arg(&dir);
        let process = Process::spawn(c, &dir.join("libvirtd.log"))?;
        let libvirt = Self { process, dir };
        // Listing guests asks the QEMU driver, which comes up last.
        wait::until("libvirtd", PATIENCE, || libvirt.virsh(&["list"]).is_ok()).with_context(|| libvirt.log())?;
        Ok(libvirt)
    }

    /// How clients reach it.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.dir.join("libvirt-sock").display())
    }

    /// Runs `virsh ARGS...`.
    ///
    /// # Errors
    /// When it fails.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let mut c = Command::new("virsh");
        c.args(["--connect", &self.uri()]).args(args);
        process::run(c, PATIENCE)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }
}
