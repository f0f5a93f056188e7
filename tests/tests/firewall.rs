//! The firewall under real guests and a namespace behind a DPDK uplink, with a strict policy.
use anyhow::{Context, anyhow};
use ferry_guest::protocol::{Command, Direction, Reply, Vary};
use ferry_tests::frames::{self, guest_mac};
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, Running, v4, v6};
use ferry_tests::{Ferryd, FerrydBuilder, Netns, Outcome, Port, Scratch, wait};
use serde_json::Value;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Time for what should happen soon.
const SOON: Duration = Duration::from_secs(20);

/// TCP to the services of the agents is let in from members of `clients`; ping from everyone. Nothing else.
const POLICY: &str = r#"
[[security_group.servers.rules]]
name = "services"
direction = "ingress"
protocol = "tcp"
ports = [7001, 7003, 7004]
remote_group = "clients"
[[security_group.servers.rules]]
name = "ping"
direction = "ingress"
protocol = "icmp"
[security_group.clients]
description = "may use the servers"
rules = []
"#;

/// The same without the rule for TCP.
const REVOKED: &str = r#"
[[security_group.servers.rules]]
name = "ping"
direction = "ingress"
protocol = "icmp"
[security_group.clients]
description = "may use the servers"
rules = []
"#;

/// Guest n on port vmN with its own addresses, in these groups; `more` is further text of the firewall's table.
fn member(scratch: &Scratch, n: u8, groups: &[&str], more: &str) -> Member {
    let mac = guest_mac(n).map(|b| format!("{b:02x}")).join(":");
    let addresses = format!("[\"10.0.0.{n}\", \"fd00::{n}\"]");
    let spoof = format!("{{ mac = \"{mac}\", addresses = {addresses} }}");
    let firewall = format!("{{ security_groups = {groups:?}, anti_spoofing = {spoof}{more} }}");
    Member::new(scratch, n, Role::Client).with_port(|p| p.key("firewall", &firewall))
}

/// How often vm's firewall denied for a reason, both directions together.
fn denied(ferryd: &Ferryd, port: &str, reason: &str) -> anyhow::Result<u64> {
    let all = ferryd.json(&["conntrack", "stats", port])?;
    fn find(value: &Value, reason: &str) -> u64 {
        match value {
            Value::Object(map) => {
                map.iter().map(|(k, v)| if k == reason { v.as_u64().unwrap_or(0) } else { find(v, reason) }).sum()
            }
            Value::Array(list) => list.iter().map(|v| find(v, reason)).sum(),
            _ => 0,
        }
    }
    Ok(find(&all, reason))
}

struct Net {
    running: Running<2>,
    outside: Netns,
    _home: Netns,
}

/// vm1 is a client, vm2 a server, and the namespace 10.0.0.3 (fd00::3) is neither.
fn net(scratch: &Scratch, sections: &str) -> anyhow::Result<Net> {
    let members = [member(scratch, 1, &["clients"], ""), member(scratch, 2, &["servers"], "")];
    let (home, outside) = (Netns::new(scratch.path())?, Netns::new(scratch.path())?);
    let base =
        FerrydBuilder::new().sections(sections).port(Port::dpdk("up0", "net_tap0,iface=ferry0")).namespace(&home);
    let running = scenario::start(scratch, base, &members)?;
    wait::until("tap device", SOON, || home.has_interface("ferry0"))?;
    home.give("ferry0", &outside)?;
    outside.configure("ferry0", &["10.0.0.3/24", "fd00::3/64"], None)?;
    Ok(Net { running, outside, _home: home })
}

#[test]
fn strict_policy_between_guests_and_outside() -> Outcome {
    let scratch = Scratch::new()?;
    let net = net(&scratch, POLICY)?;
    let [client, server] = &net.running.guests;
    let ferryd = &net.running.ferryd;
    // Allowed, over both families: neighbour discovery works under default deny.
    client.reach("10.0.0.2")?;
    client.reach("fd00::2")?;
    net.outside.reach("10.0.0.2")?;
    net.outside.reach("fd00::2")?;
    client.transfer(v4(2), Direction::Send, 30_000_000)?;
    client.transfer(v6(2), Direction::Send, 30_000_000)?;
    let kept = client.open_connections(v4(2), 20)?;
    let kept6 = client.open_connections(v6(2), 20)?;
    // Larger than the MTU: an answer in fragments to a question in fragments.
    assert!(client.can_ping("10.0.0.2 -s 4000", 3)?);
    // The wrong port, the wrong asker, the wrong direction.
    assert_eq!(client.udp_probe(v4(2), 5, 64, Duration::from_millis(5))?.received, 0);
    assert!(net.outside.open_connections(v4(2), 1).is_err());
    assert!(net.outside.open_connections(v6(2), 1).is_err());
    assert!(server.open_connections(v4(1), 1).is_err(), "the client lets nobody in");
    assert!(denied(ferryd, "vm2", "fw_denied")? >= 7);
    assert!(denied(ferryd, "vm1", "fw_denied")? >= 1);
    // What the server asks for itself is allowed.
    server.transfer(v4(3), Direction::Send, 10_000_000)?;
    server.transfer(v6(3), Direction::Receive, 10_000_000)?;
    for handle in [kept, kept6] {
        assert_eq!(client.exercise_connections(handle)?, 20);
    }
    // Operators see it.
    let list = ferryd.ferry(&["conntrack", "list", "vm2", "--proto", "tcp", "--dport", "7004"])?;
    let lines: Vec<_> = list.lines().filter(|l| l.contains("ESTABLISHED") && l.contains("dport=7004")).collect();
    assert!(lines.len() == 40 && lines.iter().all(|l| l.contains("[ASSURED]")), "{list}");
    let drops = ferryd.ferry(&["fw", "drops", "vm2"])?;
    assert!(drops.contains("fw_denied") && drops.contains("10.0.0.3"), "{drops}");
    let trace = ferryd.ferry(&["trace", "vm2", "in tcp 10.0.0.3:40000 > 10.0.0.2:7004 syn"])?;
    assert!(trace.contains("fw_denied"), "{trace}");
    let trace = ferryd.ferry(&["trace", "vm1", "out tcp 10.0.0.1:40000 > 10.0.0.2:7004 syn"])?;
    assert!(trace.contains("services") && trace.contains("vm2"), "names rule and output:\n{trace}");
    ferryd.check_ledger()?;
    Ok(())
}

#[test]
fn a_rule_revoked_under_a_transfer_cuts_it_at_once_and_nothing_else() -> Outcome {
    let scratch = Scratch::new()?;
    let mut net = net(&scratch, POLICY)?;
    let [client, server] = &net.running.guests;
    client.reach("10.0.0.2")?;
    // The server's own connection is allowed by another rule (everything out).
    let kept = server.open_connections(v4(3), 10)?;
    let ticks = server.start_ticks(v4(3), Duration::from_millis(20))?;
    let transfer = client.start_transfer(v4(2), Direction::Send, 7, 2_000_000_000, 20)?;
    let before = net.running.ferryd.stats()?.port("vm2").tx.bytes;
    wait::until("the transfer runs", SOON, || {
        net.running.ferryd.stats().is_ok_and(|s| s.port("vm2").tx.bytes > before + 5_000_000)
    })?;
    net.running.ferryd.change_sections(REVOKED)?;
    let ferryd = &net.running.ferryd;
    wait::until("the transfer's packets are dropped", SOON, || {
        denied(ferryd, "vm2", "fw_revoked").is_ok_and(|n| n > 0)
    })?;
    // Not one byte more: the server's counter stands still but for the ticks' small frames.
    let cut = ferryd.stats()?.port("vm2").tx.bytes;
    let list = ferryd.ferry(&["conntrack", "list", "vm2", "--dport", "7001"])?;
    assert!(list.contains("dport=7001"), "remembered so that it cannot come back:\n{list}");
    let settled = denied(ferryd, "vm2", "fw_revoked")?;
    wait::until("its retransmissions are dropped, too", SOON, || {
        denied(ferryd, "vm2", "fw_revoked").is_ok_and(|n| n > settled)
    })?;
    let after = ferryd.stats()?.port("vm2").tx.bytes;
    assert!(after - cut < 1_000_000, "{} bytes still reached the server", after - cut);
    assert_eq!(server.exercise_connections(kept)?, 10, "the others never paused");
    let ticks = server.ticks(ticks, true)?;
    assert!(ticks.error.is_none(), "{ticks:?}");
    drop(transfer);
    Ok(())
}

#[test]
fn idle_connections_live_as_long_as_their_time_out() -> Outcome {
    let scratch = Scratch::new()?;
    // A control connection that says nothing while its data connection works, as FTP's; no pick-up in the middle.
    let vms = r#"
[[vm]]
name = "patient"
tracking = { tcp_loose = false }
[[vm]]
name = "hasty"
tracking = { tcp_loose = false, timeouts = { tcp_established_ms = 1500 } }
"#;
    let members = [
        member(&scratch, 1, &["clients"], "").with_port(|p| p.text("vm", "patient")),
        member(&scratch, 2, &["servers"], "").with_port(|p| p.text("vm", "patient")),
        member(&scratch, 3, &["servers"], "").with_port(|p| p.text("vm", "hasty")),
    ];
    let running = scenario::start(&scratch, FerrydBuilder::new().sections(&format!("{POLICY}{vms}")), &members)?;
    let [client, ..] = &running.guests;
    let patient = client.open_connections(v4(2), 5)?;
    let hasty = client.open_connections(v4(3), 5)?;
    client.transfer(v4(2), Direction::Send, 60_000_000)?;
    // Longer than the hasty one's time-out.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(client.exercise_connections(patient)?, 5);
    let command = Command::ConnectionsExercise { handle: hasty, payload_bytes: 64, timeout_ms: 1500 };
    let Reply::Connections { ok, .. } = client.call(command, SOON)? else { panic!("unexpected answer") };
    assert_eq!(ok, 0, "expired connections are gone under strict tracking");
    assert!(denied(&running.ferryd, "hasty", "ct_no_connection")? > 0);
    Ok(())
}

#[test]
fn one_guests_flood_does_not_touch_the_others_new_connections() -> Outcome {
    let scratch = Scratch::new()?;
    let limits = ", limits = { max_half_open = 500, max_connections = 2000 }";
    let members = [
        member(&scratch, 1, &["clients"], limits),
        member(&scratch, 2, &["servers"], ""),
        member(&scratch, 3, &["clients"], ""),
    ];
    let running = scenario::start(&scratch, FerrydBuilder::new().sections(POLICY), &members)?;
    let [flooder, _, honest] = &running.guests;
    flooder.reach("10.0.0.2")?;
    honest.reach("10.0.0.2")?;
    let macs = (guest_mac(1), guest_mac(2));
    // To a port where nobody answers, from ever new source ports.
    let frame = frames::syn(macs, (Ipv4Addr::new(10, 0, 0, 1), 1), (Ipv4Addr::new(10, 0, 0, 2), 9999));
    let (at, checksum_at) = frames::SYN_PORT_AND_CHECKSUM;
    let (sent, opened) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| flooder.send_frames(&[frame], 60_000, Some(Vary { at, checksum_at })));
        let opened = (0..10).try_fold(0, |n, _| {
            let handle = honest.open_connections(v4(2), 20)?;
            anyhow::Ok(n + honest.exercise_connections(handle)?)
        });
        (flood.join(), opened)
    });
    let sent = sent.map_err(|_| anyhow!("the flood's thread ended badly"))?;
    assert_eq!((sent?, opened?), (60_000, 200));
    let ferryd = &running.ferryd;
    let refused = denied(ferryd, "vm1", "limit_half_open")?;
    assert!(refused > 50_000, "the flood ended at its own VM: {refused}");
    assert_eq!(denied(ferryd, "vm3", "limit_half_open")?, 0);
    let stats = ferryd.ferry(&["conntrack", "stats", "vm1"])?;
    assert!(stats.contains("limit_half_open"), "says which limit is reached:\n{stats}");
    ferryd.check_ledger()?;
    Ok(())
}

#[test]
fn spoofed_frames_are_dropped_and_named() -> Outcome {
    let scratch = Scratch::new()?;
    let members = [member(&scratch, 1, &["clients"], ""), member(&scratch, 2, &["servers"], "")];
    let running = scenario::start(&scratch, FerrydBuilder::new().sections(POLICY), &members)?;
    let [guest, victim] = &running.guests;
    guest.reach("10.0.0.2")?;
    guest.reach("fd00::2")?;
    let (own, other, to) = (guest_mac(1), guest_mac(9), guest_mac(2));
    let (a, b) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let own6 = |n| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n);
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe00, 1);
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let nodes_mac = [0x33, 0x33, 0, 0, 0, 1];
    let advert = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &own6(2).octets(), &[2, 1], &own].concat();
    let router = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let spoofed: [(&str, Vec<u8>); 9] = [
        ("spoof_source_mac", frames::udp((other, to), (a, 7), (b, 7), b"")),
        ("spoof_source_ipv4", frames::udp((own, to), (Ipv4Addr::new(10, 0, 0, 77), 7), (b, 7), b"")),
        ("spoof_source_ipv6", frames::icmpv6((own, to), own6(0x77), own6(2), 64, &[128, 0, 0, 0, 0, 1, 0, 1])),
        ("spoof_martian_source", frames::udp((own, to), (Ipv4Addr::LOCALHOST, 7), (b, 7), b"")),
        ("spoof_arp_sender_address", frames::arp_reply(own, own, b)),
        ("spoof_arp_sender_mac", frames::arp_reply(own, other, a)),
        ("spoof_nd_target", frames::icmpv6((own, nodes_mac), own6(1), all_nodes, 255, &advert)),
        ("spoof_router_advertisement", frames::icmpv6((own, nodes_mac), link_local, all_nodes, 255, &router)),
        ("spoof_dhcp_server", frames::udp((own, to), (a, 67), (b, 68), b"offer")),
    ];
    let before = running.ferryd.stats()?.port("vm2").tx.frames;
    for (_, frame) in &spoofed {
        assert_eq!(guest.send_frames(std::slice::from_ref(frame), 10, None)?, 10);
    }
    for (reason, _) in &spoofed {
        wait::until(reason, SOON, || denied(&running.ferryd, "vm1", reason).is_ok_and(|n| n >= 10))
            .with_context(|| running.ferryd.ferry(&["fw", "drops", "vm1"]).unwrap_or_default())?;
    }
    let drops = running.ferryd.ferry(&["fw", "drops", "vm1"])?;
    for (reason, _) in &spoofed {
        assert!(drops.contains(reason), "{reason} is not named:\n{drops}");
    }
    let arrived = running.ferryd.stats()?.port("vm2").tx.frames - before;
    assert!(arrived < 20, "{arrived} frames arrived while 90 spoofed ones were sent");
    // The victim's idea of its neighbours is what it was.
    let neighbours = victim.shell("ip neigh show; cat /proc/net/arp")?;
    assert!(!neighbours.contains("52:54:00:00:00:09"), "{neighbours}");
    guest.reach("10.0.0.2")?;
    running.ferryd.check_ledger()?;
    Ok(())
}
