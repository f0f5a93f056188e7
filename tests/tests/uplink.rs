//! Guests and kernel namespaces meet over DPDK uplinks.
use ferry_guest::protocol::Direction;
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, v4, v6};
use ferry_tests::{FerrydBuilder, Netns, Outcome, Port, Scratch, wait};
use std::time::Duration;

const BYTES: u64 = 50_000_000;

#[test]
fn a_guest_and_a_namespace_behind_a_tap() -> Outcome {
    let scratch = Scratch::new()?;
    let (home, outside) = (Netns::new(scratch.path())?, Netns::new(scratch.path())?);
    let base = FerrydBuilder::new().namespace(&home).port(Port::dpdk("up0", "net_tap0,iface=ferry0"));
    let members = [
        Member::new(&scratch, 1, Role::Client),
        Member::new(&scratch, 2, Role::Server).with_nic(|nic| {
            nic.packed = true;
            nic.offloads = false;
        }),
    ];
    let mut running = scenario::start(&scratch, base, &members)?;
    wait::until("tap device", Duration::from_secs(10), || home.has_interface("ferry0"))?;
    home.give("ferry0", &outside)?;
    outside.configure("ferry0", &["10.0.0.9/24", "fd00::9/64"], None)?;
    let [a, b] = &running.guests;
    a.reach("10.0.0.9")?;
    b.reach("fd00::9")?;
    // What guest 1 leaves to be segmented and checksummed is finished before it leaves through the device.
    a.transfer(v4(9), Direction::Send, BYTES)?;
    outside.transfer(v6(1), Direction::Send, BYTES)?;
    outside.transfer(v4(2), Direction::Send, BYTES)?;
    b.transfer(v6(9), Direction::Send, BYTES)?;
    a.transfer(v4(2), Direction::Send, BYTES)?;
    let udp = outside.udp_probe(v4(1), 100, 1000, Duration::from_millis(2))?;
    assert_eq!((udp.received, udp.corrupted), (100, 0), "{udp:?}");
    let stats = running.ferryd.check_ledger()?;
    assert!(stats.port("up0").received().bytes > 2 * BYTES, "{stats:#?}");
    running.ferryd.stop()?;
    Ok(())
}

#[test]
fn a_guest_and_a_namespace_behind_af_packet() -> Outcome {
    let scratch = Scratch::new()?;
    let (home, outside) = (Netns::new(scratch.path())?, Netns::new(scratch.path())?);
    home.veth("v0", &outside, "v0")?;
    // The kernel leaves checksums of what it sends over a veth pair unfinished, and AF_PACKET's PMD does not tell.
    outside.run("ethtool", &["-K", "v0", "tx", "off"])?;
    let base = FerrydBuilder::new().namespace(&home).port(Port::dpdk("up0", "eth_af_packet0,iface=v0"));
    let running = scenario::start(&scratch, base, &[Member::new(&scratch, 1, Role::Client)])?;
    outside.configure("v0", &["10.0.0.9/24", "fd00::9/64"], None)?;
    let [a] = &running.guests;
    a.reach("10.0.0.9")?;
    a.reach("fd00::9")?;
    a.transfer(v4(9), Direction::Send, BYTES)?;
    outside.transfer(v6(1), Direction::Send, BYTES)?;
    let stats = running.ferryd.check_ledger()?;
    assert!(stats.port("up0").received().bytes > BYTES, "{stats:#?}");
    Ok(())
}
