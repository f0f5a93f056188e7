//! Two compute nodes and a network between them: two switches, their uplinks on a top-of-rack bridge, and a peer behind it.
//!
//! ```text
//!   guest -> ferryd A --tap--+                        (before the migration)
//!   guest -> ferryd B --tap--+-- bridge tor0 ---veth--- peer 10.0.0.9, fd00::9
//! ```
//! The peer's traffic reaches the guest through one of the two switches only, so neither learns of connections in passing.
use crate::ferryd::{Ferryd, FerrydBuilder, Port};
use crate::netns::{Netns, ip};
use crate::qemu::{Guest, GuestBuilder, Nic};
use crate::scratch::Scratch;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Time for what QEMU does.
const PATIENCE: Duration = Duration::from_secs(60);

/// One compute node.
pub struct Host {
    /// Its switch.
    pub ferryd: Ferryd,
    /// Sockets of the guest's NICs.
    pub sockets: Vec<PathBuf>,
    _home: Netns,
}

/// What is the same on both nodes: each with the guest's ports, their firewall, and an uplink.
#[derive(Clone, Debug)]
pub struct Plan {
    /// NICs of the guest, from 1.
    pub nics: u8,
    /// Sections of both configurations.
    pub sections: String,
    /// Change of a NIC.
    pub nic: fn(Nic) -> Nic,
}

impl Default for Plan {
    fn default() -> Self {
        Self { nics: 1, sections: String::new(), nic: |nic| nic }
    }
}

/// The whole.
pub struct TwoHosts {
    /// Where the guest is first.
    pub a: Host,
    /// Where it goes.
    pub b: Host,
    /// Behind the top-of-rack bridge.
    pub peer: Netns,
    _tor: Netns,
    plan: Plan,
}

/// The VM's name on both nodes.
pub const VM: &str = "vm1";
/// The peer's IPv4 address.
pub const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 9));

/// The guest's address on NIC n (from 1).
pub fn guest_address(nic: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, nic])
}

impl Plan {
    fn port(&self, nic: u8, socket: &std::path::Path) -> Port {
        let firewall = format!(
            "{{ security_groups = [\"services\"], anti_spoofing = {{ mac = \"52:54:00:00:00:0{nic}\", \
             addresses = [\"10.0.0.{nic}\", \"fd00::{nic}\"] }} }}"
        );
        Port::vhost(&format!("{VM}-{nic}"), socket).text("vm", VM).key("firewall", &firewall)
    }

    fn host(&self, scratch: &Scratch, name: char, tor: &Netns) -> Result<Host> {
        let home = Netns::new(scratch.path())?;
        let tap = format!("ferry{name}0");
        let mut builder = FerrydBuilder::new()
            .sections(&self.sections)
            .port(Port::dpdk("up0", &format!("net_tap0,iface={tap}")))
            .namespace(&home);
        let mut sockets = Vec::new();
        for nic in 1..=self.nics {
            let socket = scratch.join(format!("{name}{nic}.sock"));
            builder = builder.port(self.port(nic, &socket));
            sockets.push(socket);
        }
        let ferryd = builder.start()?;
        wait::until("tap device", Duration::from_secs(10), || home.has_interface(&tap))?;
        home.give(&tap, tor)?;
        ip(&["-n", tor.name(), "link", "set", &tap, "master", "tor0", "up"])?;
        Ok(Host { ferryd, sockets, _home: home })
    }

    fn guest(&self, host: &Host) -> GuestBuilder {
        (1u8..)
            .zip(&host.sockets)
            .fold(GuestBuilder::new(VM), |guest, (n, socket)| guest.nic((self.nic)(Nic::new(socket, n))))
    }
}

impl TwoHosts {
    /// Builds both nodes and the network.
    ///
    /// # Errors
    /// When anything does not come up.
    pub fn new(scratch: &Scratch, plan: Plan) -> Result<Self> {
        let (tor, peer) = (Netns::new(scratch.path())?, Netns::new(scratch.path())?);
        // No spanning tree: ports forward at once.
        ip(&["-n", tor.name(), "link", "add", "tor0", "type", "bridge", "forward_delay", "0", "stp_state", "0"])?;
        ip(&["-n", tor.name(), "link", "set", "tor0", "up"])?;
        tor.veth("peer0", &peer, "eth0")?;
        ip(&["-n", tor.name(), "link", "set", "peer0", "master", "tor0"])?;
        peer.configure("eth0", &["10.0.0.9/24", "fd00::9/64"], None)?;
        let a = plan.host(scratch, 'A', &tor)?;
        let b = plan.host(scratch, 'B', &tor)?;
        Ok(Self { a, b, peer, _tor: tor, plan })
    }

    /// Boots the guest on node A and gives it its addresses: 10.0.0.n and fd00::n on NIC n.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boot(&self, scratch: &Scratch) -> Result<Guest> {
        let guest = self.plan.guest(&self.a).boot(scratch.path())?;
        for n in 1..=self.plan.nics {
            let addresses = [format!("10.0.0.{n}/24"), format!("fd00::{n}/64")];
            guest.configure(&format!("eth{}", n - 1), &[&addresses[0], &addresses[1]], None)?;
        }
        guest.reach(&PEER.to_string()).map_err(|e| guest.explain(e))?;
        Ok(guest)
    }

    /// Moves the guest live to node B, as an operator (or libvirt) would: QEMU alone is told.
    ///
    /// # Errors
    /// When QEMU's migration fails.
    pub fn migrate(&self, scratch: &Scratch, mut source: Guest) -> Result<Migrated> {
        let mut destination = self.plan.guest(&self.b).incoming().launch(scratch.path())?;
        let uri = format!("unix:{}", scratch.join("migration.sock").display());
        let mut to = destination.qmp(0)?;
        to.execute("migrate-incoming", json!({"uri": uri}))?;
        let mut from = source.qmp(0)?;
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        from.execute("migrate-set-capabilities", events)?;
        from.execute("migrate-set-parameters", json!({"max-bandwidth": 100_000_000, "downtime-limit": 20}))?;
        from.execute("migrate", json!({"uri": uri}))?;
        let end =
            wait::for_some("end of the migration", PATIENCE, || match from.execute("query-migrate", json!({})) {
                Ok(s) if matches!(s["status"].as_str(), Some("active" | "device" | "setup")) => None,
                other => Some(other),
            })??;
        if end["status"] != "completed" {
            bail!("QEMU's migration ended so: {end}");
        }
        let downtime_ms = end["downtime"].as_u64().context("QEMU tells no downtime")?;
        destination.adopt_agent(&mut source)?;
        drop(source);
        wait::until("guest on the destination", PATIENCE, || {
            to.execute("query-status", json!({})).is_ok_and(|s| s["status"] == "running")
        })?;
        Ok(Migrated { guest: destination, downtime_ms })
    }
}

/// A guest that has moved.
pub struct Migrated {
    /// The guest on node B.
    pub guest: Guest,
    /// QEMU's own figure, milliseconds.
    pub downtime_ms: u64,
}
