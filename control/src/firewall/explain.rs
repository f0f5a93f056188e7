//! Which rule decides, from the configuration alone: for `ferry policy explain` and `ferry policy check`.
use std::sync::Arc;

use ferry_dataplane::firewall::compile::CompileOptions;
use ferry_dataplane::firewall::explain::{Explainer, Explanation};
use ferry_dataplane::firewall::limits::LimitsStatus;
use ferry_dataplane::firewall::spoof::SpoofTable;
use ferry_dataplane::firewall::{AddressBook, Cidr, CompiledPolicy, Direction, FlowKey, SetKey, compile};
use ferry_dataplane::packet::{MacAddr, parse};

use super::packet_text::{self, Described, PacketError, Surroundings};
use crate::config::{Config, FirewallConfig, PortConfig};

/// Why a packet cannot be explained.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExplainError {
    /// There is no such port, or it has no firewall.
    #[error("{0}")]
    Port(String),
    /// The description cannot be understood.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The frame cannot be read by the switch, which drops it.
    #[error("the frame is malformed: {0}")]
    Frame(String),
    /// The policy is not valid, which the configuration's checks should have found.
    #[error("{0}")]
    Policy(String),
}

/// A port's addresses, with the MAC address that goes with each.
fn addresses(firewall: &FirewallConfig) -> impl Iterator<Item = (Cidr, Option<MacAddr>)> + '_ {
    let spoof = &firewall.anti_spoofing;
    let own = spoof.addresses.iter().map(|a| (*a, spoof.mac));
    own.chain(spoof.allowed_address_pairs.iter().map(|p| (p.address, p.mac.or(spoof.mac))))
}

/// What is known of the addresses around some ports, to complete a packet's description.
pub fn surroundings<'a>(config: &'a Config, own: impl Fn(&PortConfig) -> bool + 'a) -> Surroundings {
    let mut out = Surroundings::default();
    for port in &config.port {
        let list = if own(port) { &mut out.own } else { &mut out.others };
        list.extend(port.firewall.iter().flat_map(addresses));
    }
    out
}

/// Which of a VM's ports a packet comes from or goes to: the only one, or the one that has its address.
pub fn port_of<'a>(config: &Config, ports: &[&'a str], packet: &Described) -> Option<&'a str> {
    if let [only] = ports {
        return Some(only);
    }
    let frame = &packet.frame;
    let headers = parse(frame, frame.len() as u32).ok()?;
    let (dst, src) = (frame.get(..6)?, frame.get(6..12)?);
    let own_mac = if packet.direction == Direction::Egress { src } else { dst };
    let opposite = match packet.direction {
        Direction::Egress => Direction::Ingress,
        Direction::Ingress => Direction::Egress,
    };
    // Seen from the other end, the remote address is the VM's own.
    let own = FlowKey::of(frame, &headers, opposite).map(|key| key.remote);
    let has = |p: &PortConfig| {
        let mut list = p.firewall.iter().flat_map(addresses);
        list.any(|(cidr, mac)| own.is_some_and(|a| cidr.contains(a)) || mac.is_some_and(|m| m.octets() == own_mac))
    };
    ports.iter().copied().find(|name| config.port(name).is_some_and(has))
}

/// Members of all security groups: the addresses of the ports in them.
pub fn address_book(config: &Config) -> Result<AddressBook, String> {
    let mut book = AddressBook::new();
    book.load_document(&config.policy()).map_err(|e| e.to_string())?;
    for firewall in config.port.iter().filter_map(|p| p.firewall.as_ref()) {
        for group in &firewall.security_groups {
            for (cidr, _) in addresses(firewall) {
                book.add(&SetKey::Group(group.clone()), cidr).map_err(|e| e.to_string())?;
            }
        }
    }
    Ok(book)
}

/// A port's rules, compiled as the packet path does.
pub fn compiled(config: &Config, firewall: &FirewallConfig, book: &mut AddressBook) -> Result<CompiledPolicy, String> {
    let document = Arc::new(config.policy());
    compile(&document, &firewall.policy(), "firewall", book, CompileOptions::default())
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

/// What would happen to a packet that begins a connection at `port`, and why. `limits`: how far they are used, if that is known.
///
/// # Errors
/// No such port, no firewall, or a description that cannot be understood.
pub fn explain(
    config: &Config,
    port: &str,
    packet: &str,
    limits: Option<&LimitsStatus>,
) -> Result<Explanation, ExplainError> {
    let found = config.port(port).ok_or_else(|| ExplainError::Port(format!("there is no port {port}")))?;
    let Some(firewall) = &found.firewall else {
        return Err(ExplainError::Port(format!("port {port} has no firewall: everything passes")));
    };
    let near = surroundings(config, |p| p.name == port);
    let described = packet_text::parse(packet)?.frame(&near)?;
    let mut book = address_book(config).map_err(ExplainError::Policy)?;
    let policy = compiled(config, firewall, &mut book).map_err(ExplainError::Policy)?;
    let sets = book.snapshot(0);
    let spoof = SpoofTable::new(&firewall.anti_spoofing, 0);
    let frame = &described.frame;
    let headers = parse(frame, frame.len() as u32).map_err(|e| ExplainError::Frame(e.to_string()))?;
    let explainer = Explainer { policy: &policy, sets: &sets, spoof: Some(&spoof), limits };
    Ok(explainer.frame(described.direction, frame, &headers))
}
