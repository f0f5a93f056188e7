//! Readiness for the service manager: the protocol of sd_notify(3), one datagram per message.
use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends to the service manager; does nothing where there is none.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// The manager named by `NOTIFY_SOCKET`, if any.
    pub fn from_env() -> Self {
        Self::to(std::env::var_os("NOTIFY_SOCKET").as_deref())
    }

    /// The manager at that address: a path, or an abstract name after `@`.
    pub fn to(address: Option<&OsStr>) -> Self {
        let open = || {
            let bytes = address?.as_bytes();
            let address = match bytes.strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name).ok()?,
                None => SocketAddr::from_pathname(address?).ok()?,
            };
            Some((UnixDatagram::unbound().ok()?, address))
        };
        Self { socket: open() }
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(e) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::warn!("the service manager does not listen: {e}");
        }
    }

    /// The daemon serves; `status` in a few words.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={status}\n"));
    }

    /// A reload has begun. [`Self::ready`] ends it.
    pub fn reloading(&self) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let us = now.map_or(0, |t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={us}\n"));
    }

    /// The daemon stops.
    pub fn stopping(&self) {
        self.send("STOPPING=1\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(s: &UnixDatagram) -> String {
        s.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let mut buf = [0; 256];
        let n = s.recv(&mut buf).unwrap();
        String::from_utf8(buf[..n].to_vec()).unwrap()
    }

    #[test]
    fn messages_reach_a_path_and_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let server = UnixDatagram::bind(&path).unwrap();
        let n = Notifier::to(Some(path.as_os_str()));
        n.ready("2 ports");
        assert_eq!(receive(&server), "READY=1\nSTATUS=2 ports\n");
        n.reloading();
        assert!(receive(&server).starts_with("RELOADING=1\nMONOTONIC_USEC="));
        n.stopping();
        assert_eq!(receive(&server), "STOPPING=1\n");

        let name = format!("ferry-notify-{}", std::process::id());
        let server = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::to(Some(OsStr::new(&format!("@{name}")))).ready("");
        assert_eq!(receive(&server), "READY=1\nSTATUS=\n");
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        Notifier::to(None).ready("x");
        Notifier::to(Some(OsStr::new("/nonexistent/notify"))).ready("x");
    }
}
