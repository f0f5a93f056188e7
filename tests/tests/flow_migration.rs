//! Live migration between two switches under a strict firewall on both.
use anyhow::anyhow;
use ferry_guest::protocol::{Command, Reply};
use ferry_tests::two_hosts::{Plan, TwoHosts, VM, guest_address};
use ferry_tests::{Agent, Outcome, Scratch};
use std::time::Duration;

/// The services of the guest may be used; connections begin with a SYN, or not at all.
const STRICT: &str = r#"
[[security_group.services.rules]]
direction = "ingress"
protocol = "tcp"
ports = ["7001-7004"]
[[security_group.services.rules]]
direction = "ingress"
protocol = "icmp"
[[vm]]
name = "vm1"
tracking = { tcp_loose = false }
"#;

/// How many of the connections behind a handle still echo.
fn alive(agent: &Agent, handle: u64) -> anyhow::Result<(u32, u32)> {
    let command = Command::ConnectionsExercise { handle, payload_bytes: 64, timeout_ms: 2000 };
    match agent.call(command, Duration::from_secs(60))? {
        Reply::Connections { ok, failed, .. } => Ok((ok, failed)),
        other => Err(anyhow!("unexpected answer {other:?}")),
    }
}

/// The reason for flow migration: everything works, and what was established hangs for good.
#[test]
fn without_flow_state_established_connections_hang() -> Outcome {
    let scratch = Scratch::new()?;
    let hosts = TwoHosts::new(&scratch, Plan { sections: STRICT.into(), ..Plan::default() })?;
    let guest = hosts.boot(&scratch)?;
    let from_peer = hosts.peer.open_connections(guest_address(1), 3)?;
    let from_guest = guest.open_connections(ferry_tests::two_hosts::PEER, 3)?;
    assert_eq!(alive(&hosts.peer, from_peer)?, (3, 0));
    let moved = hosts.migrate(&scratch, guest)?;
    hosts.b.ferryd.wait_state(&["vm1-1"], "up")?;
    // New connections work at once ...
    moved.guest.reach("10.0.0.9")?;
    let new = hosts.peer.open_connections(guest_address(1), 3)?;
    assert_eq!(alive(&hosts.peer, new)?, (3, 0));
    // ... and the old ones are dead, without anybody being told.
    assert_eq!(alive(&hosts.peer, from_peer)?.0, 0);
    assert_eq!(alive(&moved.guest, from_guest)?.0, 0);
    let stats = hosts.b.ferryd.ferry(&["conntrack", "stats", VM])?;
    assert!(stats.contains("ct_no_connection"), "{stats}");
    hosts.b.ferryd.check_ledger()?;
    Ok(())
}
