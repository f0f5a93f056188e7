//! Which connection a frame probably belongs to: to tell operators whose a frame was that was dropped before anybody looked closer.
//! Nothing is checked, and nothing may be decided by it.
use core::net::{Ipv4Addr, Ipv6Addr};

use crate::conntrack::{Flow, Key, Toward};
use crate::packet::{EtherType, IpProto, be16, chunk};

/// Who sends to whom in a packet of any kind.
pub(crate) fn flow(head: &[u8], ethertype: EtherType, l3: usize, toward: Toward, zone: u16) -> Option<Flow> {
    let key = key(head, ethertype, l3, toward, zone)?;
    Some(Flow { key, toward, icmp: None })
}

fn key(head: &[u8], ethertype: EtherType, l3: usize, toward: Toward, zone: u16) -> Option<Key> {
    let (proto, src, dst, l4): (u8, core::net::IpAddr, core::net::IpAddr, usize) = match ethertype {
        EtherType::IPV4 => {
            let [first, _, _, _, _, _, _, _, _, proto, _, _, a, b, c, d, e, f, g, h] = *chunk::<20>(head, l3)?;
            let header = usize::from(first & 0xf) * 4;
            (proto, Ipv4Addr::new(a, b, c, d).into(), Ipv4Addr::new(e, f, g, h).into(), l3 + header)
        }
        EtherType::IPV6 => {
            let proto = *head.get(l3 + 6)?;
            let src = Ipv6Addr::from(*chunk::<16>(head, l3 + 8)?);
            let dst = Ipv6Addr::from(*chunk::<16>(head, l3 + 24)?);
            (proto, src.into(), dst.into(), l3 + 40)
        }
        _ => return None,
    };
    let proto = IpProto(proto);
    let (source, destination) = match proto {
        IpProto::TCP | IpProto::UDP => (be16(head, l4)?, be16(head, l4 + 2)?),
        _ => (0, 0),
    };
    Some(Key::new(toward, zone, proto, (src, source), (dst, destination)))
}
