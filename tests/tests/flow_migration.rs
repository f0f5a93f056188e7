//! Live migration between two switches under a strict firewall on both.
use ferry_tests::two_hosts::experiment::{self, Connections, Family, Load, Subject};
use ferry_tests::two_hosts::{Plan, Side, TwoHosts, VM};
use ferry_tests::{Outcome, Scratch};

/// Both nodes, the guest on A, and its connections.
fn subject(scratch: &Scratch, plan: Plan, load: &Load) -> anyhow::Result<(TwoHosts, Subject)> {
    let hosts = TwoHosts::new(scratch, plan)?;
    let guest = hosts.boot(scratch)?;
    let connections = Connections::open(&hosts, &guest, load.connections, load.family)?;
    Ok((hosts, Subject { guest, at: Side::A, connections }))
}

/// The reason for flow migration: everything works, and what was established hangs for good, without anybody being told.
#[test]
fn without_flow_state_established_connections_hang() -> Outcome {
    let scratch = Scratch::new()?;
    let load = Load::short(100);
    let (mut hosts, subject) = subject(&scratch, Plan::default(), &load)?;
    let (subject, report) = experiment::run(&mut hosts, &scratch, subject, &load, &mut |_| {})?;
    eprintln!("{report:?}");
    assert_eq!((report.connections_before, report.connections_after), (100, 0));
    assert!(!report.more.counter_runs && !report.more.stream_intact, "{report:?}");
    // New connections work at once.
    let new = Connections::open(&hosts, &subject.guest, 10, Family::V4)?;
    new.check_all_alive(&hosts, &subject.guest)?;
    let stats = hosts.b.ferryd.ferry(&["conntrack", "stats", VM])?;
    assert!(stats.contains("ct_no_connection"), "{stats}");
    Ok(())
}
