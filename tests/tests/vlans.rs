//! VLANs and bridges keep guests apart, and trunks bring them together.
use ferry_guest::protocol::Direction;
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, v4};
use ferry_tests::{FerrydBuilder, Outcome, Scratch};

#[test]
fn access_ports_trunks_and_bridges() -> Outcome {
    let scratch = Scratch::new()?;
    let member = |n| Member::new(&scratch, n, Role::Client);
    let members = [
        member(1).with_port(|p| p.access(10)),
        member(2).with_port(|p| p.access(10)),
        member(3).with_port(|p| p.access(20)),
        member(4).with_port(|p| p.trunk(&[10, 20])),
        member(5).with_port(|p| p.access(10).text("bridge", "br1")),
    ];
    let mut running = scenario::start(&scratch, FerrydBuilder::new().bridge("br1"), &members)?;
    let [one, two, three, trunk, elsewhere] = &running.guests;
    trunk.shell(
        "ip addr flush dev eth0
         for v in 10 20; do ip link add link eth0 name eth0.$v type vlan id $v && ip link set eth0.$v up; done
         ip addr add 10.0.0.4/24 dev eth0.10
         ip addr add 10.0.20.4/24 dev eth0.20",
    )?;
    three.configure("eth0", &["10.0.20.3/24"], None)?;

    one.reach("10.0.0.2")?;
    trunk.reach("10.0.0.1")?;
    trunk.reach("10.0.20.3")?;
    trunk.transfer(v4(1), Direction::Send, 10_000_000)?;
    three.transfer("10.0.20.4".parse().expect("address"), Direction::Send, 10_000_000)?;
    assert!(!one.can_ping("10.0.0.3", 2)?, "another VLAN");
    assert!(!one.can_ping("10.0.0.5", 2)?, "same VLAN, another bridge");
    assert!(!elsewhere.can_ping("10.0.0.1", 2)?, "same VLAN, another bridge");
    // A guest on an access port cannot choose its VLAN by tagging.
    two.shell(
        "ip link add link eth0 name eth0.20 type vlan id 20 && ip link set eth0.20 up
         ip addr add 10.0.20.2/24 dev eth0.20",
    )?;
    assert!(!two.can_ping("10.0.20.3", 2)?, "tagged frames on an access port");
    let stats = running.ferryd.check_ledger()?;
    let refused = stats.port("vm2").received().dropped.get("vlan_not_allowed").copied().unwrap_or_default();
    assert!(refused > 0, "{stats:#?}");

    // At run time: guest 3 moves to VLAN 10, and the others notice nothing.
    let ticks = one.start_ticks(v4(2), std::time::Duration::from_millis(20))?;
    running.ferryd.change_port(members[2].port.clone().access(10))?;
    running.guests[2].reach("10.0.0.1")?;
    let [one, ..] = &running.guests;
    assert!(!running.guests[3].can_ping("10.0.20.3", 2)?, "it has left VLAN 20");
    let report = one.ticks(ticks, true)?;
    assert!(report.error.is_none() && report.received > 10, "{report:?}");
    running.ferryd.check_ledger()?;
    Ok(())
}
