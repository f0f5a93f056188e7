//! The VM's connections migrate whatever its NICs are like.
use ferry_tests::qemu::Role;
use ferry_tests::two_hosts::experiment::{self, Family, Load, Subject};
use ferry_tests::two_hosts::{Plan, TwoHosts};
use ferry_tests::{Outcome, Scratch};

/// Connections of each.
const SOME: u32 = 300;

fn all_arrive(plan: Plan, family: Family) -> Outcome {
    let scratch = Scratch::new()?;
    let load = Load { family, ..Load::short(SOME) };
    let mut hosts = TwoHosts::new(&scratch, Plan { flow_migration: true, ..plan })?;
    let subject = Subject::boot(&hosts, &scratch, &load)?;
    let (_, report) = experiment::run(&mut hosts, &scratch, subject, &load, &mut |_| {})?;
    eprintln!("{report:?}");
    assert_eq!((report.connections_before, report.connections_after), (SOME, SOME));
    assert!(report.more.counter_runs && report.more.stream_intact && report.more.used_alive, "{report:?}");
    assert_eq!(report.more.destination.began.as_deref(), Some("complete"), "{report:?}");
    Ok(())
}

#[test]
fn packed_rings_over_ipv6() -> Outcome {
    all_arrive(Plan { packed: true, ..Plan::default() }, Family::V6)
}

#[test]
fn two_queue_pairs() -> Outcome {
    all_arrive(Plan { queue_pairs: 2, ..Plan::default() }, Family::V4)
}

#[test]
fn two_nics() -> Outcome {
    all_arrive(Plan { nics: 2, ..Plan::default() }, Family::V4)
}

#[test]
fn the_switch_connects_to_qemu() -> Outcome {
    all_arrive(Plan { role: Role::Server, ..Plan::default() }, Family::V4)
}
