//! Connections made up for tests and benchmarks.
use core::net::{IpAddr, Ipv4Addr};

use super::super::entry::Connection;
use super::super::key::{Key, Toward};
use crate::packet::IpProto;

/// The `n`-th UDP connection: another for each `n`. It expires an hour after time 0.
pub fn sample(n: u32) -> Connection {
    let [a, b, c, d] = n.to_be_bytes();
    let vm = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    // The low bits are the port, so that the model checker, which keeps no addresses, tells small numbers apart.
    let remote = IpAddr::V4(Ipv4Addr::new(192, 168, a, b));
    let key = Key::new(Toward::Ingress, 0, IpProto::UDP, (remote, u16::from_be_bytes([c, d])), (vm, 53));
    let mut connection = Connection::new(key, Toward::Ingress);
    connection.refresh(0, 3_600_000);
    connection
}
