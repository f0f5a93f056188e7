//! What two hosts need so that connections migrate between them: certificates, a link, and configuration.
use super::{Side, VM};
use crate::netns::{Netns, ip};
use crate::scratch::Scratch;
use anyhow::{Context, Result};
use ferry_migrate::pki::Authority;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// TCP port on which both hosts listen.
const PORT: u16 = 9478;

/// Certificates and the link.
pub struct Channel {
    a: PathBuf,
    b: PathBuf,
    home_a: String,
}

/// A host's name, as its certificate says.
pub fn host_name(side: Side) -> &'static str {
    match side {
        Side::A => "host-a",
        Side::B => "host-b",
    }
}

/// Where a host listens.
pub fn listener(side: Side) -> SocketAddr {
    let address = match side {
        Side::A => Ipv4Addr::new(192, 0, 2, 1),
        Side::B => Ipv4Addr::new(192, 0, 2, 2),
    };
    (address, PORT).into()
}

/// Makes an authority in `authority` and, for each of `hosts`, a directory with what this host needs of it, as an operator would
/// copy it there.
///
/// # Errors
/// When a file cannot be written.
pub fn issue(authority: &Path, hosts: &[(&str, PathBuf)]) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let now_s = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
    let (ca, _) = Authority::init(authority, "ferry tests", 30, now_s)?;
    for (host, directory) in hosts {
        ca.issue(host, &[], 10, now_s)?;
        fs::DirBuilder::new().mode(0o700).create(directory).with_context(|| directory.display().to_string())?;
        for file in [ca.trust(), ca.revoked(), ca.host(host)] {
            let name = file.file_name().context("file name")?;
            // Copies the mode, too: keys stay private.
            fs::copy(&file, directory.join(name)).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

impl Channel {
    /// Makes certificates, and joins the hosts' namespaces.
    ///
    /// # Errors
    /// When that fails.
    pub fn new(scratch: &Scratch, home_a: &Netns, home_b: &Netns) -> Result<Self> {
        let directory = |side| scratch.join(format!("{}-pki", host_name(side)));
        let (a, b) = (directory(Side::A), directory(Side::B));
        issue(&scratch.join("authority"), &[(host_name(Side::A), a.clone()), (host_name(Side::B), b.clone())])?;
        home_a.veth("mgmt0", home_b, "mgmt0")?;
        home_a.configure("mgmt0", &[&format!("{}/24", listener(Side::A).ip())], None)?;
        home_b.configure("mgmt0", &[&format!("{}/24", listener(Side::B).ip())], None)?;
        Ok(Self { a, b, home_a: home_a.name().into() })
    }

    /// A host's certificates.
    pub fn pki(&self, side: Side) -> &Path {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// A host's audit log.
    pub fn audit_log(&self, side: Side) -> PathBuf {
        self.pki(side).with_extension("audit.log")
    }

    /// The configuration's section of a host.
    pub(super) fn section(&self, side: Side, enabled: bool, keys: &str) -> String {
        let peer = side.other();
        format!(
            "[migration]\nenabled = {enabled}\nhost = \"{}\"\nlisten = \"{}\"\npki = {:?}\naudit_log = {:?}\n{keys}\n\
             [[migration.peer]]\nhost = \"{}\"\naddress = \"{}\"\n\
             [[migration.rule]]\nname = \"both ways\"\nvm = \"{VM}\"\npeer = \"{}\"\nroles = [\"send\", \"receive\"]\n",
            host_name(side),
            listener(side),
            self.pki(side).display().to_string(),
            self.audit_log(side).display().to_string(),
            host_name(peer),
            listener(peer),
            host_name(peer),
        )
    }

    /// Takes the link between the hosts down.
    ///
    /// # Errors
    /// When that fails.
    pub fn cut(&self) -> Result<()> {
        ip(&["-n", &self.home_a, "link", "set", "mgmt0", "down"]).map(drop)
    }

    /// Brings it up again.
    ///
    /// # Errors
    /// When that fails.
    pub fn mend(&self) -> Result<()> {
        ip(&["-n", &self.home_a, "link", "set", "mgmt0", "up"]).map(drop)
    }
}
