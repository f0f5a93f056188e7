//! Writes the guests' initramfs: a cpio archive in "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
use super::kernel::Kernel;
use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const SYMLINK: u32 = 0o120_777;
const CONSOLE: u32 = 0o020_600;

/// A cpio archive under construction.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(data.len()).context("too large for cpio")?;
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), device it stands for (2), name length, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for f in fields {
            self.bytes.extend_from_slice(format!("{f:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn add(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(name, mode, (0, 0), data)
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

/// The archive: agent as `/init`, busybox with all its names, the kernel's modules.
///
/// # Errors
/// When a file cannot be read or busybox is not a static one.
pub fn build(kernel: &Kernel, agent: &Path) -> Result<Vec<u8>> {
    let busybox = Path::new("/bin/busybox");
    let program = fs::read(busybox).context("/bin/busybox (package busybox-static)")?;
    if has_interpreter(&program) {
        bail!("/bin/busybox is dynamically linked: install the package busybox-static");
    }
    let mut list = Command::new(busybox);
    list.arg("--list");
    let applets = process::run(list, Duration::from_secs(10))?;
    let mut cpio = Cpio::default();
    for dir in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        cpio.add(dir, DIRECTORY, &[])?;
    }
    // The kernel opens it for init before anything is mounted.
    cpio.entry("dev/console", CONSOLE, (5, 1), &[])?;
    cpio.add("init", PROGRAM, &fs::read(agent).with_context(|| agent.display().to_string())?)?;
    cpio.add("bin/busybox", PROGRAM, &program)?;
    for applet in applets.lines().filter(|a| *a != "busybox") {
        cpio.add(&format!("bin/{applet}"), SYMLINK, b"busybox")?;
    }
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().context("module without a name")?.to_string_lossy();
        cpio.add(&format!("modules/{name}"), FILE, &fs::read(module)?)?;
        order += &format!("{name}\n");
    }
    cpio.add("modules/order", FILE, order.as_bytes())?;
    cpio.finish()
}

/// Whether an ELF program (64 bit, little-endian) asks for a dynamic loader, which a guest does not have: it has a program
/// header of type PT_INTERP.
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let field = |at: usize, len: usize| -> Option<u64> {
        Some(elf.get(at..at.checked_add(len)?)?.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    };
    let size = |at, len| field(at, len).and_then(|v| usize::try_from(v).ok());
    let (Some(table), Some(entry), Some(count)) = (size(32, 8), size(54, 2), size(56, 2)) else { return false };
    (0..count).any(|i| table.checked_add(i * entry).and_then(|at| field(at, 4)) == Some(PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Stdio;

    #[test]
    fn dynamic_programs_are_told_from_static_ones() {
        assert!(has_interpreter(&fs::read(std::env::current_exe().unwrap()).unwrap()));
        assert!(!has_interpreter(&fs::read("/bin/busybox").unwrap()), "busybox-static is installed");
        assert!(!has_interpreter(b"\x7fELF"));
    }

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut c = Cpio::default();
        c.add("dir", DIRECTORY, &[]).unwrap();
        c.add("dir/file", PROGRAM, b"content").unwrap();
        c.add("dir/link", SYMLINK, b"file").unwrap();
        let archive = c.finish().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["-idm", "--quiet"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("the cpio tool");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read(dir.path().join("dir/link")).unwrap(), b"content");
        assert_eq!(fs::read_link(dir.path().join("dir/link")).unwrap(), Path::new("file"));
    }
}
