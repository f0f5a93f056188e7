//! Memory added to a running guest: the switch must map it before the guest puts buffers into it.
use anyhow::Context;
use ferry_guest::protocol::Direction;
use ferry_tests::qemu::Role;
use ferry_tests::scenario::{self, Member, v4};
use ferry_tests::{FerrydBuilder, Outcome, Scratch, wait};
use serde_json::json;
use std::time::Duration;

const ADDED_MB: u64 = 256;

#[test]
fn memory_is_added_under_traffic() -> Outcome {
    let scratch = Scratch::new()?;
    let mut members = [1, 2].map(|n| Member::new(&scratch, n, Role::Client));
    members[0].guest = members[0].guest.clone().max_memory_mb(1024);
    let running = scenario::start(&scratch, FerrydBuilder::new(), &members)?;
    let [a, b] = &running.guests;
    a.reach("10.0.0.2")?;
    let memory_kb = || -> anyhow::Result<u64> {
        let text = a.shell("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?;
        text.trim().parse().context("MemTotal")
    };
    let before = memory_kb()?;
    let ticks = b.start_ticks(v4(1), Duration::from_millis(20))?;
    let mut monitor = a.qmp(0)?;
    let backend = json!({"qom-type": "memory-backend-memfd", "id": "ram1", "size": ADDED_MB << 20, "share": true});
    monitor.execute("object-add", backend)?;
    monitor.execute("device_add", json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "ram1"}))?;
    wait::until("the added memory", Duration::from_secs(20), || {
        memory_kb().is_ok_and(|now| now > before + 200 * 1024)
    })?;
    // Fill what the guest had at first, so that new network buffers come from the new memory.
    a.shell("mount -t tmpfs -o size=200m tmpfs /tmp; dd if=/dev/zero of=/tmp/fill bs=1M count=90 2>/dev/null")?;
    a.transfer(v4(2), Direction::Receive, 50_000_000)?;
    a.transfer(v4(2), Direction::Send, 50_000_000)?;
    let report = b.ticks(ticks, true)?;
    assert!(report.error.is_none() && report.received > 50, "{report:?}");
    running.ferryd.check_ledger()?;
    Ok(())
}
