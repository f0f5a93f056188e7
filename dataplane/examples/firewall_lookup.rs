//! What a policy look-up and a compilation take, in time, at 10 and at 10 000 rules. Run with `--release`.
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ferry_dataplane::firewall::policy::{AddressSet, PortRange, Protocol};
use ferry_dataplane::firewall::spoof::SpoofConfig;
use ferry_dataplane::firewall::{
    AddressBook, Cidr, CompileOptions, Direction, FlowKey, L4Key, PolicyDocument, PortPolicy, Rule, SecurityGroup,
    SetKey, compile,
};

const SETS: u32 = 200;
const LOOKUPS: u32 = 2_000_000;

fn random(i: u64) -> u64 {
    let z = (i ^ (i >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

fn v4(i: u64) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 | (random(i) >> 40) as u32).into()
}

fn v6(i: u64) -> IpAddr {
    Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(random(i)) << 16).into()
}

fn rule(shape: &str, i: u64) -> Rule {
    let base = Rule { protocol: Protocol::TCP, ports: vec![PortRange::single(443)], ..Rule::allow(Direction::Ingress) };
    let port = vec![PortRange::single((random(i) >> 32) as u16)];
    match shape {
        "hosts, IPv4" => Rule { remote_cidr: Some(Cidr::host(v4(i))), ..base },
        "hosts, IPv6" => Rule { remote_cidr: Some(Cidr::host(v6(i))), ..base },
        "networks and ports" => {
            let len = [32, 28, 24, 16, 8][i as usize % 5];
            Rule { remote_cidr: Some(Cidr::containing(v4(i), len)), ports: port, ..base }
        }
        "ports" => Rule { ports: port, ..base },
        _ => Rule { remote_address_set: Some(format!("s{}", i % u64::from(SETS))), ports: port, ..base },
    }
}

/// Time this thread has been on a processor, nanoseconds: other load does not count.
fn cpu_ns() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0.0)
}

fn main() {
    println!("{:<20} {:>7} {:>12} {:>12} {:>11}", "shape", "rules", "compile ms", "memory KiB", "ns/look-up");
    for shape in ["hosts, IPv4", "hosts, IPv6", "networks and ports", "ports", "address sets"] {
        for count in [10u64, 10_000] {
            let mut document = PolicyDocument::default();
            for s in 0..SETS {
                document.address_sets.insert(format!("s{s}"), AddressSet::default());
            }
            let rules = (0..count).map(|i| rule(shape, i)).collect();
            document.security_groups.insert("g".into(), SecurityGroup { rules, ..SecurityGroup::default() });
            let port = PortPolicy {
                security_groups: vec!["g".into()],
                anti_spoofing: SpoofConfig { enabled: false, ..SpoofConfig::default() },
                ..PortPolicy::default()
            };
            let mut book = AddressBook::new();
            for s in 0..SETS {
                let hosts: Vec<Cidr> = (0..50).map(|i| Cidr::host(v4(u64::from(i * SETS + s)))).collect();
                if let Err(e) = book.set_members(&SetKey::AddressSet(format!("s{s}")), &hosts) {
                    eprintln!("{e}");
                }
            }
            let document = Arc::new(document);
            let start = cpu_ns();
            let policy = match compile(&document, &port, "port", &mut book, CompileOptions { generation: 1, seed: 42 })
            {
                Ok(policy) => policy,
                Err(errors) => {
                    errors.iter().for_each(|e| eprintln!("{e}"));
                    return;
                }
            };
            let compile_ms = (cpu_ns() - start) / 1e6;
            let index = book.snapshot(42);
            // Half of the remotes are named by rules (of the larger policy).
            let keys: Vec<FlowKey> = (0..4096u64)
                .map(|i| {
                    let n = if i % 2 == 0 { random(i + 7) % 10_000 } else { 1_000_000 + i };
                    let remote = if shape.ends_with("IPv6") { v6(n) } else { v4(n) };
                    let destination = if i % 4 < 2 { 443 } else { (random(n) >> 32) as u16 };
                    FlowKey { remote, protocol: 6, l4: Some(L4Key::Ports { source: 40_000, destination }) }
                })
                .collect();
            let start = cpu_ns();
            for i in 0..LOOKUPS {
                if let Some(key) = keys.get(i as usize % keys.len()) {
                    black_box(policy.lookup(Direction::Ingress, black_box(key), &index));
                }
            }
            let ns = (cpu_ns() - start) / f64::from(LOOKUPS);
            let kib = policy.memory_bytes() / 1024;
            println!("{shape:<20} {count:>7} {compile_ms:>12.2} {kib:>12} {ns:>11.1}");
        }
    }
}
