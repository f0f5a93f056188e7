//! The usual set-up: guests on one switch.
use crate::ferryd::{Ferryd, FerrydBuilder, Port};
use crate::qemu::{self, Guest, GuestBuilder, Nic, Role};
use crate::scratch::Scratch;
use anyhow::Result;
use std::net::IpAddr;

/// A guest and the switch port it is plugged into.
#[derive(Clone, Debug)]
pub struct Member {
    /// The switch's side.
    pub port: Port,
    /// The guest's side.
    pub nic: Nic,
    /// The guest.
    pub guest: GuestBuilder,
}

impl Member {
    /// Guest vm`number` on port vm`number`, with roles that fit.
    pub fn new(scratch: &Scratch, number: u8, qemu: Role) -> Self {
        let name = format!("vm{number}");
        let socket = scratch.join(format!("{name}.sock"));
        let mut nic = Nic::new(&socket, number);
        nic.role = qemu;
        let port = Port::vhost(&name, &socket);
        let port = if qemu == Role::Server { port.connects() } else { port };
        Self { port, nic, guest: GuestBuilder::new(&name) }
    }

    /// Gives both sides this many queue pairs.
    pub fn queues(mut self, pairs: u16) -> Self {
        self.nic.queues = pairs;
        self.port = self.port.key("queue_pairs", &pairs.to_string());
        self
    }

    /// Gives both sides this MTU.
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.nic.host_mtu = Some(bytes);
        self.port = self.port.key("mtu", &bytes.to_string());
        self
    }

    /// Changes the NIC.
    pub fn with_nic(mut self, change: impl FnOnce(&mut Nic)) -> Self {
        change(&mut self.nic);
        self
    }

    /// Changes the port.
    pub fn with_port(mut self, change: impl FnOnce(Port) -> Port) -> Self {
        self.port = change(self.port);
        self
    }

    /// The guest with its NIC.
    pub fn builder(&self) -> GuestBuilder {
        self.guest.clone().nic(self.nic.clone())
    }
}

/// Guests that run, and their switch.
pub struct Running<const N: usize> {
    /// In the order of the members. Guest n (from 1) has the addresses 10.0.0.n/24 and fd00::n/64.
    pub guests: [Guest; N],
    /// The switch.
    pub ferryd: Ferryd,
}

/// Starts the switch (on top of what `base` holds) with all members, and gives eth0 of guest n the addresses 10.0.0.n/24 and
/// fd00::n/64 and, if its NIC has one, the host's MTU.
///
/// # Errors
/// When anything does not come up.
pub fn start<const N: usize>(scratch: &Scratch, base: FerrydBuilder, members: &[Member; N]) -> Result<Running<N>> {
    let base = members.iter().fold(base, |b, m| b.port(m.port.clone()));
    let ferryd = base.start()?;
    let guests = qemu::boot_all(members.each_ref().map(Member::builder), scratch.path())?;
    for (n, (guest, member)) in (1u8..).zip(guests.iter().zip(members)) {
        let addresses = [format!("10.0.0.{n}/24"), format!("fd00::{n}/64")];
        let mtu = member.nic.host_mtu.map(u32::from);
        guest.configure("eth0", &[&addresses[0], &addresses[1]], mtu).map_err(|e| guest.explain(e))?;
    }
    Ok(Running { guests, ferryd })
}

/// Guest n's IPv4 address (n from 1).
pub fn v4(n: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, n])
}

/// Guest n's IPv6 address (n from 1).
pub fn v6(n: u8) -> IpAddr {
    IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)])
}
