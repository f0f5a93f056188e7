//! Fetches Debian's cloud kernel package and takes out the uncompressed kernel and the modules that guests need.
use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Modules that guests need; those they depend on are added. Those that a kernel has built in are left out.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_net", "8021q"];

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Uncompressed kernel.
    pub vmlinux: PathBuf,
    /// Module files in loading order.
    pub modules: Vec<PathBuf>,
}

/// Gives the newest kernel known to apt, fetching and unpacking it if `dir` does not hold it yet. Without apt (or with a
/// package list that has moved on) the one that was unpacked last is used. `FERRY_GUEST_KERNEL_DEB` names a package file instead.
///
/// # Errors
/// When there is no kernel to be had, or it is not as expected.
pub fn prepare(dir: &Path) -> Result<Kernel> {
    if let Some(deb) = std::env::var_os("FERRY_GUEST_KERNEL_DEB") {
        let deb = PathBuf::from(deb);
        let name = deb.file_stem().context("package file name")?.to_string_lossy().into_owned();
        return unpack_once(dir, &name, |_| Ok(deb));
    }
    let fetched = newest().and_then(|(package, version)| {
        unpack_once(dir, &format!("{package}_{version}"), |into| download(&package, &version, into))
    });
    match (fetched, last_unpacked(dir)) {
        (Ok(k), _) => Ok(k),
        (Err(e), Some(old)) => load(&old).with_context(|| format!("also: {e:#}")),
        (Err(e), None) => Err(e),
    }
}

fn apt(program: &str, args: &[&str], dir: Option<&Path>) -> Result<String> {
    let mut c = Command::new(program);
    c.args(args).env("LC_ALL", "C");
    if let Some(dir) = dir {
        c.current_dir(dir);
    }
    process::run(c, Duration::from_secs(300))
}

/// Name and version of the package that the meta-package depends on.
fn newest() -> Result<(String, String)> {
    let depends = apt("apt-cache", &["depends", META_PACKAGE], None)?;
    let package = depends
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| p.starts_with("linux-image-"))
        .with_context(|| format!("{META_PACKAGE} is unknown to apt: run `apt-get update`"))?;
    let policy = apt("apt-cache", &["policy", package], None)?;
    let version = policy
        .lines()
        .find_map(|l| l.trim().strip_prefix("Candidate: "))
        .filter(|v| *v != "(none)")
        .with_context(|| format!("apt has no {package}"))?;
    Ok((package.to_string(), version.to_string()))
}

fn download(package: &str, version: &str, into: &Path) -> Result<PathBuf> {
    apt("apt-get", &["--quiet", "download", &format!("{package}={version}")], Some(into))?;
    let is_deb = |p: &PathBuf| p.extension().is_some_and(|e| e == "deb");
    fs::read_dir(into)?.flatten().map(|e| e.path()).find(is_deb).context("apt-get download left no package")
}

/// Unpacks into `dir/kernel-NAME`, complete or not at all.
fn unpack_once(dir: &Path, name: &str, get: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<Kernel> {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }).collect();
    let done = dir.join(format!("kernel-{name}"));
    if !done.is_dir() {
        let work = tempfile::Builder::new().prefix("unpack").tempdir_in(dir)?;
        let deb = get(work.path())?;
        let tree = work.path().join("tree");
        let mut dpkg = Command::new("dpkg-deb");
        dpkg.arg("-x").arg(&deb).arg(&tree);
        process::run(dpkg, Duration::from_secs(120))?;
        let out = work.path().join("out");
        fs::create_dir(&out)?;
        let bzimage = find(&tree.join("boot"), |n| n.starts_with("vmlinuz-"))?.context("no vmlinuz in the package")?;
        fs::write(out.join("vmlinux"), extract_vmlinux(&fs::read(bzimage)?)?)?;
        let mut order = Vec::new();
        for module in MODULES {
            add_module(&tree.join("lib/modules"), module, &out, &mut order)?;
        }
        if !order.iter().any(|m| m == "virtio_net.ko") {
            bail!("{}: no uncompressed virtio_net module", deb.display());
        }
        let order: String = order.iter().map(|m| format!("{m}\n")).collect();
        fs::write(out.join("order"), order)?;
        fs::rename(&out, &done)?;
    }
    load(&done)
}

/// Copies a module, and before it those it depends on, and notes the order.
fn add_module(tree: &Path, name: &str, out: &Path, order: &mut Vec<String>) -> Result<()> {
    let wanted = format!("{name}.ko");
    if order.contains(&wanted) {
        return Ok(());
    }
    let Some(file) = find(tree, |n| n == wanted || n == wanted.replace('_', "-"))? else { return Ok(()) };
    let content = fs::read(&file)?;
    for needed in depends(&content) {
        add_module(tree, &needed, out, order)?;
    }
    fs::write(out.join(&wanted), content)?;
    order.push(wanted);
    Ok(())
}

/// What a module depends on: the entry `depends=a,b` among the NUL-terminated strings of its `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    let entry = module.split(|b| *b == 0).find_map(|s| s.strip_prefix(b"depends=")).unwrap_or_default();
    String::from_utf8_lossy(entry).split(',').filter(|s| !s.is_empty()).map(String::from).collect()
}

fn load(done: &Path) -> Result<Kernel> {
    let order = fs::read_to_string(done.join("order"))?;
    Ok(Kernel { vmlinux: done.join("vmlinux"), modules: order.lines().map(|l| done.join(l)).collect() })
}

fn last_unpacked(dir: &Path) -> Option<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .ok()?
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("kernel-"))
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    all.sort();
    all.pop().map(|(_, p)| p)
}

fn find(dir: &Path, wanted: impl Fn(&str) -> bool + Copy) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), wanted)? {
                return Ok(Some(found));
            }
        } else if wanted(&entry.file_name().to_string_lossy()) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Takes the ELF kernel out of a bzImage. The boot protocol (Documentation/arch/x86/boot.rst, 2.08 and later) tells where
/// the compressed payload lies; its compression is told by its magic number.
///
/// # Errors
/// When this is no bzImage, or the compression is unknown.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    let field = |at: usize, len: usize| -> Result<u64> {
        let bytes = bzimage.get(at..at + len).context("kernel image is too short")?;
        Ok(bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    };
    if field(0x202, 4)? != u64::from(u32::from_le_bytes(*b"HdrS")) {
        bail!("not a Linux bzImage");
    }
    let version = field(0x206, 2)?;
    if version < 0x208 {
        bail!("boot protocol {version:#x} is too old");
    }
    let setup_sectors = match field(0x1f1, 1)? {
        0 => 4,
        n => n,
    };
    let start = (setup_sectors + 1) * 512 + field(0x248, 4)?;
    let len = field(0x24c, 4)?;
    let payload = usize::try_from(start)
        .ok()
        .zip(usize::try_from(start + len).ok())
        .and_then(|(a, b)| bzimage.get(a..b))
        .context("the kernel's payload lies outside of the image")?;
    let elf = decompress(payload)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("the kernel's payload is not an ELF file");
    }
    Ok(elf)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    match payload {
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => lz4_legacy(rest),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", &["-dc"], payload),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => filter("xz", &["-dc", "--single-stream"], payload),
        [0x1f, 0x8b, ..] => filter("gzip", &["-dc"], payload),
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        other => bail!("kernel compressed in an unknown way (magic {:02x?})", &other[..other.len().min(8)]),
    }
}

/// The "legacy frame" of LZ4, which the kernel uses: blocks of up to 8 MiB, each behind its compressed length. The
/// kernel's build appends the uncompressed length (4 bytes) to the end.
fn lz4_legacy(mut rest: &[u8]) -> Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut out = Vec::new();
    while rest.len() > 4 {
        let (len, tail) = rest.split_at(4);
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        let block = tail.get(..len).context("LZ4 block is cut off")?;
        out.extend(lz4_flex::block::decompress(block, BLOCK).context("LZ4 block")?);
        rest = &tail[len..];
    }
    if let [a, b, c, d] = *rest
        && u32::from_le_bytes([a, b, c, d]) as usize != out.len()
    {
        bail!("LZ4: {} bytes came out, another number is stored", out.len());
    }
    Ok(out)
}

/// Feeds `input` to a program and returns its output. Trailing garbage after the compressed data (the length that the
/// kernel's build appends) makes some of these complain: only the output counts.
fn filter(program: &str, args: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{program} is needed to unpack this kernel"))?;
    let mut stdin = child.stdin.take().context("pipe")?;
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output()?;
    let _ = feeder.join();
    if output.stdout.is_empty() {
        bail!("{program} could not unpack the kernel");
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal bzImage around a payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut b = vec![0; 1024];
        b[0x1f1] = 1;
        b[0x202..0x206].copy_from_slice(b"HdrS");
        b[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        b[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        b[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        b.extend([0xcc; 16]);
        b.extend(payload);
        b
    }

    fn elf() -> Vec<u8> {
        let mut e = b"\x7fELF".to_vec();
        e.extend((0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()));
        e
    }

    #[test]
    fn every_compression_is_undone() {
        let elf = elf();
        let size = (elf.len() as u32).to_le_bytes();
        let block = lz4_flex::block::compress(&elf);
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(block);
        lz4.extend(size);
        assert_eq!(extract_vmlinux(&bzimage(&lz4)).unwrap(), elf, "lz4");
        for (program, args) in [("zstd", ["-c", "-q"]), ("xz", ["-c", "-q"]), ("gzip", ["-c", "-q"])] {
            let mut packed = filter(program, &args, &elf).unwrap();
            packed.extend(size);
            assert_eq!(extract_vmlinux(&bzimage(&packed)).unwrap(), elf, "{program}");
        }
        assert_eq!(extract_vmlinux(&bzimage(&elf)).unwrap(), elf, "uncompressed");
    }

    #[test]
    fn modules_come_after_those_they_depend_on() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
        fs::create_dir_all(tree.join("drivers")).unwrap();
        fs::create_dir(&out).unwrap();
        for (file, depends) in [("a", "b_x,c"), ("b-x", "c"), ("c", "")] {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            fs::write(tree.join(format!("drivers/{file}.ko")), content).unwrap();
        }
        let mut order = Vec::new();
        add_module(&tree, "a", &out, &mut order).unwrap();
        add_module(&tree, "built_in", &out, &mut order).unwrap();
        assert_eq!(order, ["c.ko", "b_x.ko", "a.ko"]);
        assert!(out.join("b_x.ko").is_file());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let why = |b: &[u8]| extract_vmlinux(b).unwrap_err().to_string();
        assert!(why(b"MZ").contains("too short"));
        assert!(why(&[0; 4096]).contains("not a Linux bzImage"));
        assert!(why(&bzimage(b"garbage!")).contains("unknown way"));
        let mut outside = bzimage(&elf());
        outside[0x24c..0x250].fill(0xff);
        assert!(why(&outside).contains("outside"));
        let mut wrong_size = vec![0x02, 0x21, 0x4c, 0x18];
        let block = lz4_flex::block::compress(b"\x7fELF");
        wrong_size.extend((block.len() as u32).to_le_bytes());
        wrong_size.extend(block);
        wrong_size.extend(99u32.to_le_bytes());
        assert!(why(&bzimage(&wrong_size)).contains("another number"));
    }
}
