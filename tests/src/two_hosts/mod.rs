//! Two compute nodes and a network between them: two switches, their uplinks on a top-of-rack bridge, and a peer behind it.
//!
//! ```text
//!   guest -> ferryd A --tap--+                        (before the migration)
//!              | mgmt0       +-- bridge tor0 ---veth--- peer 10.0.0.9, fd00::9
//!   guest -> ferryd B --tap--+                        (after it)
//! ```
//! The peer's traffic reaches the guest through one of the two switches only, so neither learns of connections in passing.
//! The two switches run in namespaces of their own; `mgmt0` is the link between these, over which connections migrate.
//!
//! - [`Plan`], [`TwoHosts`]: what is built. [`channel`]: certificates and configuration of flow migration.
//! - [`moving`]: QEMU's live migration, step by step.
//! - [`status`]: what the switches say of it.
//! - [`session`]: one guest, many attempts, and what must hold after each.
//! - [`experiment`]: the whole, measured: connections, load, payload, policy, and what became of them.
pub mod channel;
pub mod experiment;
pub mod moving;
pub mod session;
pub mod status;

use crate::agent::Agent;
use crate::ferryd::{Ferryd, FerrydBuilder, Port};
use crate::netns::{Netns, ip};
use crate::qemu::{Guest, GuestBuilder, Nic, Role};
use crate::scratch::Scratch;
use crate::wait;
use anyhow::{Context, Result, ensure};
use channel::Channel;
use ferry_guest::protocol::{SECOND_ECHO_PORT, STREAM_PORT, TCP_ECHO_PORT, TICK_PORT, UDP_ECHO_PORT};
use moving::{Migrated, Move, Pace};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

/// The VM's name on both nodes.
pub const VM: &str = "vm1";
/// The peer's IPv4 address on the first network.
pub const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9));
/// UDP port of the guest that is open, for datagrams that it leaves unread.
pub const HOLD_PORT: u16 = 9000;
/// UDP port of the guest that is closed.
pub const DENIED_PORT: u16 = 9001;
/// Name of the rule that lets [`SECOND_ECHO_PORT`] in.
pub const REVOCABLE_RULE: &str = "revocable";

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest is first.
    A,
    /// Where it goes.
    B,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn letter(self) -> char {
        match self {
            Self::A => 'A',
            Self::B => 'B',
        }
    }
}

/// One compute node.
pub struct Host {
    /// Its switch.
    pub ferryd: Ferryd,
    /// Where that runs.
    pub home: Netns,
    /// Sockets of the guest's NICs.
    pub sockets: Vec<PathBuf>,
    /// Where the switch looks for a monitor of the guest's QEMU.
    monitor: PathBuf,
}

/// What is the same on both nodes: each with the guest's ports, their firewall, and an uplink.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whether connections migrate.
    pub flow_migration: bool,
    /// Further keys of `[migration]`.
    pub migration_keys: String,
    /// Further keys of the VM's `migration` table, each followed by a comma.
    pub vm_migration_keys: String,
    /// NICs of the guest, from 1.
    pub nics: u8,
    /// Queue pairs of each NIC, and CPUs of the guest.
    pub queue_pairs: u16,
    /// Packed rings.
    pub packed: bool,
    /// QEMU's role on the sockets.
    pub role: Role,
    /// The guest's memory.
    pub memory_mb: u32,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            flow_migration: false,
            migration_keys: String::new(),
            vm_migration_keys: String::new(),
            nics: 1,
            queue_pairs: 1,
            packed: false,
            role: Role::Client,
            memory_mb: 128,
        }
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
    /// Certificates, when connections migrate.
    pub channel: Option<Channel>,
    _tor: Netns,
    plan: Plan,
}

/// The guest's address on NIC n (from 1).
pub fn guest_address(nic: u8) -> IpAddr {
    IpAddr::from([10, 0, nic - 1, 1])
}

/// The guest's IPv6 address on NIC n (from 1).
pub fn guest_address6(nic: u8) -> IpAddr {
    network6(nic, 1)
}

/// The peer's IPv4 address on the network of NIC n (from 1).
pub fn peer_address(nic: u8) -> IpAddr {
    IpAddr::from([10, 0, nic - 1, 9])
}

/// The peer's IPv6 address on the network of NIC n (from 1).
pub fn peer_address6(nic: u8) -> IpAddr {
    network6(nic, 9)
}

fn network6(nic: u8, host: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0, 0, u16::from(nic - 1), 0, 0, 0, host).into()
}

/// The policy of both nodes: connections to the guest's services begin with a SYN, or not at all; what is not in step is dropped.
pub fn policy(with_revocable_rule: bool) -> String {
    let mut text = format!(
        "[[security_group.services.rules]]\ndirection = \"ingress\"\nprotocol = \"tcp\"\nports = [{STREAM_PORT}, {TICK_PORT}, {TCP_ECHO_PORT}]\n\
         [[security_group.services.rules]]\ndirection = \"ingress\"\nprotocol = \"udp\"\nports = [{UDP_ECHO_PORT}, {HOLD_PORT}]\n\
         [[security_group.services.rules]]\ndirection = \"ingress\"\nprotocol = \"icmp\"\n\
         [[security_group.services.rules]]\ndirection = \"ingress\"\nprotocol = \"icmpv6\"\n"
    );
    if with_revocable_rule {
        text += &format!(
            "[[security_group.services.rules]]\nname = \"{REVOCABLE_RULE}\"\ndirection = \"ingress\"\nprotocol = \"tcp\"\nports = [{SECOND_ECHO_PORT}]\n"
        );
    }
    text
}

impl Plan {
    fn nic(&self, nic: u8, socket: &std::path::Path) -> Nic {
        let mut nic = Nic::new(socket, nic);
        (nic.queues, nic.packed, nic.role) = (self.queue_pairs, self.packed, self.role);
        nic
    }

    fn port(&self, nic: u8, socket: &std::path::Path) -> Port {
        let firewall = format!(
            "{{ security_groups = [\"services\"], anti_spoofing = {{ mac = \"52:54:00:00:00:0{nic}\", addresses = [\"{}\", \"{}\"] }} }}",
            guest_address(nic),
            guest_address6(nic)
        );
        let port = Port::vhost(&format!("{VM}-{nic}"), socket)
            .text("vm", VM)
            .key("firewall", &firewall)
            .key("queue_pairs", &self.queue_pairs.to_string());
        if self.role == Role::Server { port.connects() } else { port }
    }

    /// The configuration's sections of a host but for its ports.
    fn sections(&self, policy: &str, side: Side, channel: Option<&Channel>, monitor: &std::path::Path) -> String {
        let mut text = policy.to_string();
        text += &format!("[[vm]]\nname = \"{VM}\"\ntracking = {{ tcp_loose = false }}\n");
        if let Some(channel) = channel {
            text +=
                &format!("migration = {{ {} qmp = {:?} }}\n", self.vm_migration_keys, monitor.display().to_string());
            text += &channel.section(side, self.flow_migration, &self.migration_keys);
        }
        text
    }

    fn host(&self, scratch: &Scratch, side: Side, home: Netns, tor: &Netns, channel: Option<&Channel>) -> Result<Host> {
        let tap = format!("ferry{}0", side.letter());
        let monitor = scratch.join(format!("{}-monitor.sock", side.letter()));
        let mut builder = FerrydBuilder::new()
            .sections(&self.sections(&policy(true), side, channel, &monitor))
            .port(Port::dpdk("up0", &format!("net_tap0,iface={tap}")))
            .namespace(&home);
        let mut sockets = Vec::new();
        for nic in 1..=self.nics {
            let socket = scratch.join(format!("{}{nic}.sock", side.letter()));
            builder = builder.port(self.port(nic, &socket));
            sockets.push(socket);
        }
        let ferryd = builder.start()?;
        let host = Host { ferryd, sockets, home, monitor };
        host.plug_in(&tap, tor)?;
        Ok(host)
    }

    fn guest(&self, host: &Host) -> GuestBuilder {
        (1u8..)
            .zip(&host.sockets)
            .fold(GuestBuilder::new(VM).memory_mb(self.memory_mb), |guest, (n, socket)| guest.nic(self.nic(n, socket)))
    }
}

impl Host {
    fn plug_in(&self, tap: &str, tor: &Netns) -> Result<()> {
        wait::until("tap device", Duration::from_secs(10), || self.home.has_interface(tap))?;
        self.home.give(tap, tor)?;
        ip(&["-n", tor.name(), "link", "set", tap, "master", "tor0", "up"]).map(drop)
    }

    /// Lets the switch find the guest's second monitor where its configuration says.
    fn show_monitor(&self, guest: &Guest) -> Result<()> {
        let _ = std::fs::remove_file(&self.monitor);
        std::os::unix::fs::symlink(guest.qmp_path(1), &self.monitor).context("monitor")
    }

    /// Names of the guest's ports.
    pub fn ports(&self) -> Vec<String> {
        (1..=self.sockets.len()).map(|n| format!("{VM}-{n}")).collect()
    }
}

impl TwoHosts {
    /// Builds both nodes and the network.
    ///
    /// # Errors
    /// When anything does not come up.
    pub fn new(scratch: &Scratch, plan: Plan) -> Result<Self> {
        let namespace = || Netns::new(scratch.path());
        let (tor, peer, home_a, home_b) = (namespace()?, namespace()?, namespace()?, namespace()?);
        // No spanning tree: ports forward at once.
        ip(&["-n", tor.name(), "link", "add", "tor0", "type", "bridge", "forward_delay", "0", "stp_state", "0"])?;
        ip(&["-n", tor.name(), "link", "set", "tor0", "up"])?;
        tor.veth("peer0", &peer, "eth0")?;
        ip(&["-n", tor.name(), "link", "set", "peer0", "master", "tor0"])?;
        for n in 1..=plan.nics {
            let addresses = [format!("{}/24", peer_address(n)), format!("{}/64", peer_address6(n))];
            peer.configure("eth0", &[&addresses[0], &addresses[1]], None)?;
        }
        let channel = if plan.flow_migration { Some(Channel::new(scratch, &home_a, &home_b)?) } else { None };
        let a = plan.host(scratch, Side::A, home_a, &tor, channel.as_ref())?;
        let b = plan.host(scratch, Side::B, home_b, &tor, channel.as_ref())?;
        Ok(Self { a, b, peer, channel, _tor: tor, plan })
    }

    /// A node.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// A node.
    pub fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        }
    }

    /// Gives a node's policy another text ([`policy`]) at run time.
    ///
    /// # Errors
    /// When the switch refuses.
    pub fn change_policy(&mut self, side: Side, policy: &str) -> Result<()> {
        let host = self.host(side);
        let sections = self.plan.sections(policy, side, self.channel.as_ref(), &host.monitor);
        self.host_mut(side).ferryd.change_sections(&sections)
    }

    /// Takes the link down over which connections migrate.
    ///
    /// # Errors
    /// When there is none.
    pub fn cut_channel(&self) -> Result<()> {
        self.channel.as_ref().context("no channel")?.cut()
    }

    /// Brings it up again.
    ///
    /// # Errors
    /// When there is none.
    pub fn mend_channel(&self) -> Result<()> {
        self.channel.as_ref().context("no channel")?.mend()
    }

    /// Switches the migration of connections on or off on both nodes, at run time. It is on from the beginning if the plan says so.
    ///
    /// # Errors
    /// When a switch refuses, or there are no certificates.
    pub fn set_flow_migration(&mut self, on: bool) -> Result<()> {
        ensure!(self.channel.is_some(), "no certificates");
        self.plan.flow_migration = on;
        self.change_policy(Side::A, &policy(true))?;
        self.change_policy(Side::B, &policy(true))
    }

    /// Waits until the guest's ports on a node are up.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn wait_up(&self, side: Side) -> Result<()> {
        let host = self.host(side);
        let ports = host.ports();
        host.ferryd.wait_state(&ports.iter().map(String::as_str).collect::<Vec<_>>(), "up")
    }

    /// Starts a node's switch again after it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self, side: Side) -> Result<()> {
        self.host_mut(side).ferryd.restart()?;
        self.host(side).plug_in(&format!("ferry{}0", side.letter()), &self._tor)
    }

    /// Boots the guest on node A and gives it its addresses ([`guest_address`], [`guest_address6`]).
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boot(&self, scratch: &Scratch) -> Result<Guest> {
        let guest = self.plan.guest(&self.a).boot(scratch.path())?;
        self.a.show_monitor(&guest)?;
        self.configure(&guest).map_err(|e| guest.explain(e))?;
        Ok(guest)
    }

    /// Gives a guest that has just booted its addresses.
    ///
    /// # Errors
    /// When the network does not come up.
    pub fn configure(&self, guest: &Agent) -> Result<()> {
        for n in 1..=self.plan.nics {
            let addresses = [format!("{}/24", guest_address(n)), format!("{}/64", guest_address6(n))];
            guest.configure(&format!("eth{}", n - 1), &[&addresses[0], &addresses[1]], None)?;
        }
        for n in 1..=self.plan.nics {
            guest.reach(&peer_address(n).to_string())?;
            guest.reach(&peer_address6(n).to_string())?;
        }
        Ok(())
    }

    /// Begins to move the guest live to node `to`, as an operator (or libvirt) would: QEMU alone is told.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn begin(&self, scratch: &Scratch, source: Guest, to: Side, pace: Pace) -> Result<Move> {
        let host = self.host(to);
        let destination = self.plan.guest(host).incoming().launch(scratch.path())?;
        let moving = Move::begin(source, destination, &scratch.join("migration.sock"), pace)?;
        host.show_monitor(&moving.destination)?;
        Ok(moving)
    }

    /// Moves the guest live to node `to`.
    ///
    /// # Errors
    /// When QEMU's migration fails.
    pub fn migrate(&self, scratch: &Scratch, source: Guest, to: Side) -> Result<Migrated> {
        self.begin(scratch, source, to, Pace::default())?.finish()
    }
}
