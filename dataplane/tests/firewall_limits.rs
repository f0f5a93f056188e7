//! Limits per VM and per source, alone and under several threads.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ferry_dataplane::firewall::limits::{Admission, LimitReason, LimitsConfig, SourceLimits, VmLimits};

const SECOND: u64 = 1_000_000_000;

fn host(i: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + i).into()
}

fn per_source(limits: SourceLimits) -> LimitsConfig {
    LimitsConfig { per_source: limits, ..LimitsConfig::default() }
}

#[test]
fn connections_are_counted_from_admission_to_release() {
    let config = LimitsConfig { max_connections: 3, max_half_open: 2, ..LimitsConfig::default() };
    let vm = VmLimits::new(&config, 1);
    let mut a = vm.admit(host(1), 0).unwrap();
    let b = vm.admit(host(1), 0).unwrap();
    assert_eq!(vm.admit(host(2), 0), Err(LimitReason::HalfOpen));
    vm.established(host(1), &mut a);
    vm.established(host(1), &mut a);
    assert!(!a.half_open);
    let mut c = vm.admit(host(2), 0).unwrap();
    vm.established(host(2), &mut c);
    assert_eq!(vm.admit(host(2), 0), Err(LimitReason::Connections));
    let status = vm.status(0);
    assert_eq!((status.connections, status.half_open, status.admitted), (3, 1, 3));
    assert_eq!((status.max_connections, status.max_half_open, status.tokens), (3, Some(2), None));
    assert_eq!(status.exhausted(), [LimitReason::Connections]);
    assert_eq!((status.refused_for(LimitReason::HalfOpen), status.refused_for(LimitReason::Connections)), (1, 1));
    for (source, admission) in [(1, a), (1, b), (2, c)] {
        vm.release(host(source), admission);
    }
    let status = vm.status(0);
    assert_eq!((status.connections, status.half_open), (0, 0));
    assert!(status.exhausted().is_empty());
    assert!(vm.admit(host(3), 0).is_ok());
}

#[test]
fn new_connections_come_at_their_rate() {
    let config = LimitsConfig { new_per_second: 100, burst: 10, ..LimitsConfig::default() };
    let vm = VmLimits::new(&config, 1);
    let admitted = |from: u64, to: u64| {
        (from..to).step_by(1_000_000).filter(|t| vm.admit(host(*t as u32 % 7), *t).is_ok()).count()
    };
    assert_eq!((0..20).filter(|_| vm.admit(host(1), 0).is_ok()).count(), 10);
    assert_eq!(vm.status(0).tokens, Some(0));
    assert_eq!(vm.status(0).exhausted(), [LimitReason::Rate]);
    assert_eq!(admitted(SECOND / 100, SECOND + SECOND / 100), 100);
    assert_eq!(vm.status(SECOND).refused_for(LimitReason::Rate), 10 + 900);
    assert_eq!(vm.status(3 * SECOND).tokens, Some(10));
}

#[test]
fn one_source_over_its_limits_takes_nothing_from_the_others() {
    let limits = SourceLimits { max_connections: 5, max_half_open: 3, new_per_second: 10, burst: 4 };
    let config = LimitsConfig { new_per_second: 1000, burst: 1000, ..per_source(limits) };
    let vm = VmLimits::new(&config, 1);
    let mut mine: Vec<Admission> = Vec::new();
    for _ in 0..3 {
        mine.push(vm.admit(host(1), 0).unwrap());
    }
    assert_eq!(vm.admit(host(1), 0), Err(LimitReason::SourceHalfOpen));
    mine.iter_mut().for_each(|a| vm.established(host(1), a));
    let mut fourth = vm.admit(host(1), 0).unwrap();
    vm.established(host(1), &mut fourth);
    // Four at once were the burst; a refusal for want of tokens is no connection.
    assert_eq!(vm.admit(host(1), 0), Err(LimitReason::SourceRate));
    let mut fifth = vm.admit(host(1), SECOND).unwrap();
    vm.established(host(1), &mut fifth);
    let before = vm.status(SECOND).tokens;
    for _ in 0..500 {
        assert_eq!(vm.admit(host(1), SECOND), Err(LimitReason::SourceConnections));
    }
    assert_eq!(vm.status(SECOND).tokens, before, "its refusals cost the VM no tokens");
    let other: Vec<_> = (2..100).map(|i| vm.admit(host(i), SECOND).unwrap()).collect();
    assert!(other.iter().all(|a| a.tracked_source));
    assert_eq!((vm.status(SECOND).sources, vm.status(SECOND).largest_source), (99, 5));
    vm.release(host(1), fifth);
    assert!(vm.admit(host(1), SECOND).is_ok());
}

/// A source that ran out of tokens is not forgotten for want of connections while there is other room.
#[test]
fn closing_connections_does_not_refill_the_tokens() {
    let vm = VmLimits::new(&per_source(SourceLimits { new_per_second: 1, burst: 3, ..SourceLimits::default() }), 1);
    for _ in 0..3 {
        let admission = vm.admit(host(1), 0).unwrap();
        vm.release(host(1), admission);
    }
    for i in 2..200 {
        let admission = vm.admit(host(i), 0).unwrap();
        vm.release(host(i), admission);
    }
    assert_eq!(vm.admit(host(1), 0), Err(LimitReason::SourceRate));
}

/// Both families, and the addresses of one as parts of the other, are different sources.
#[test]
fn sources_are_told_apart() {
    let vm = VmLimits::new(&per_source(SourceLimits { max_connections: 1, ..SourceLimits::default() }), 9);
    let mut sources: Vec<IpAddr> = (0..64).map(host).collect();
    sources.extend((0..64u128).map(|i| IpAddr::from(Ipv6Addr::from_bits(i))));
    sources.extend((1..64u128).map(|i| IpAddr::from(Ipv6Addr::from_bits(i << 64))));
    sources.extend((0..64u128).map(|i| IpAddr::from(Ipv6Addr::from_bits(0xfe80 << 112 | 0x0a00_0000 | i))));
    let admissions: Vec<_> = sources.iter().map(|s| vm.admit(*s, 0).unwrap()).collect();
    assert!(admissions.iter().all(|a| a.tracked_source));
    assert!(sources.iter().all(|s| vm.admit(*s, 0) == Err(LimitReason::SourceConnections)));
}

/// More sources than the table holds: the VM's limits still hold, nothing is counted for the wrong source, all of it ends at zero.
#[test]
fn an_overfull_table_of_sources_stays_sound() {
    let limits = SourceLimits { max_connections: 2, ..SourceLimits::default() };
    let config = LimitsConfig { max_connections: 1000, tracked_sources: 64, ..per_source(limits) };
    let vm = VmLimits::new(&config, 3);
    let held: Vec<_> = (0..2000).filter_map(|i| vm.admit(host(i), 0).ok().map(|a| (host(i), a))).collect();
    assert_eq!(held.len(), 1000);
    let status = vm.status(0);
    assert_eq!((status.connections, status.sources, status.source_capacity), (1000, 64, 64));
    assert_eq!(status.untracked, 1000 - 64);
    assert_eq!(held.iter().filter(|(_, a)| a.tracked_source).count(), 64);
    // A tracked source is still held to its limit.
    let (tracked, _) = *held.iter().find(|(_, a)| a.tracked_source).unwrap();
    let (_, untracked) = held.iter().find(|(_, a)| !a.tracked_source).copied().unwrap();
    vm.release(held.iter().find(|(_, a)| !a.tracked_source).unwrap().0, untracked);
    let second = vm.admit(tracked, 0).unwrap();
    assert_eq!(vm.status(0).largest_source, 2);
    vm.release(tracked, second);
    let mut skipped = false;
    for (source, admission) in held {
        if !admission.tracked_source && !skipped {
            skipped = true; // already released
            continue;
        }
        vm.release(source, admission);
    }
    let status = vm.status(0);
    assert_eq!((status.connections, status.half_open, status.sources, status.largest_source), (0, 0, 0, 0));
}

#[test]
fn adopted_connections_count_but_are_never_refused() {
    let limits = SourceLimits { max_connections: 1, ..SourceLimits::default() };
    let vm = VmLimits::new(&LimitsConfig { max_connections: 2, ..per_source(limits) }, 1);
    let adopted: Vec<_> = (0..5).map(|i| vm.adopt(host(1), i == 0)).collect();
    let status = vm.status(0);
    assert_eq!((status.connections, status.half_open, status.adopted, status.largest_source), (5, 1, 5, 5));
    assert_eq!(vm.admit(host(2), 0), Err(LimitReason::Connections));
    for admission in adopted {
        vm.release(host(1), admission);
    }
    assert_eq!((vm.status(0).connections, vm.status(0).half_open, vm.status(0).largest_source), (0, 0, 0));
}

#[test]
fn limits_can_be_changed_under_way() {
    let vm = VmLimits::new(
        &LimitsConfig { max_connections: 2, new_per_second: 1, burst: 1_000_000, ..LimitsConfig::default() },
        1,
    );
    let _held = [vm.admit(host(1), 0).unwrap(), vm.admit(host(1), 0).unwrap()];
    assert!(vm.admit(host(1), 0).is_err());
    vm.reconfigure(&LimitsConfig { max_connections: 3, new_per_second: 10, burst: 1, ..LimitsConfig::default() });
    let _third = vm.admit(host(1), 0).expect("the bucket does not remember the slow rate's debts");
    assert_eq!(vm.status(0).connections, 3);
}

/// Four threads admit, establish and release at random; at no moment does the VM have more than it may, no source many more
/// than it may, and in the end everything is at zero.
#[test]
fn several_threads_keep_exact_count() {
    const THREADS: u64 = 4;
    const MOST: u32 = 200;
    const PER_SOURCE: u32 = 20;
    let limits = SourceLimits { max_connections: PER_SOURCE, max_half_open: PER_SOURCE, ..SourceLimits::default() };
    let config = LimitsConfig { max_connections: MOST, max_half_open: 150, tracked_sources: 64, ..per_source(limits) };
    let vm = VmLimits::new(&config, 77);
    let held = AtomicU32::new(0);
    let half_open = AtomicU32::new(0);
    let of_source: Vec<AtomicU32> = (0..40).map(|_| AtomicU32::new(0)).collect();
    let refused = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (vm, held, half_open, of_source, refused) = (&vm, &held, &half_open, &of_source, &refused);
            scope.spawn(move || {
                let mut state = thread + 1;
                let mut mine: Vec<(u32, Admission)> = Vec::new();
                for _ in 0..60_000 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let random = (state >> 33) as usize;
                    if random % 8 < 5 {
                        let source = (random / 8 % 40) as u32;
                        match vm.admit(host(source), 0) {
                            Ok(admission) => {
                                // Counted after the limits count, and uncounted before: never more than theirs.
                                assert!(half_open.fetch_add(1, Ordering::SeqCst) < 150);
                                assert!(held.fetch_add(1, Ordering::SeqCst) < MOST);
                                if admission.tracked_source {
                                    let now = of_source[source as usize].fetch_add(1, Ordering::SeqCst);
                                    assert!(now < PER_SOURCE + THREADS as u32, "{now}");
                                }
                                mine.push((source, admission));
                            }
                            Err(_) => {
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    } else if !mine.is_empty() {
                        let i = random / 8 % mine.len();
                        if random.is_multiple_of(2) && mine[i].1.half_open {
                            half_open.fetch_sub(1, Ordering::SeqCst);
                            let (source, admission) = &mut mine[i];
                            vm.established(host(*source), admission);
                        } else {
                            let (source, admission) = mine.swap_remove(i);
                            release(vm, held, half_open, of_source, source, admission);
                        }
                    }
                }
                for (source, admission) in mine {
                    release(vm, held, half_open, of_source, source, admission);
                }
            });
        }
    });
    let status = vm.status(0);
    assert_eq!((status.connections, status.half_open, status.sources, status.largest_source), (0, 0, 0, 0));
    assert_eq!(status.refused.iter().sum::<u64>(), refused.load(Ordering::Relaxed));
    assert!(status.admitted > 10_000 && refused.load(Ordering::Relaxed) > 1000);
}

fn release(
    vm: &VmLimits,
    held: &AtomicU32,
    half_open: &AtomicU32,
    of_source: &[AtomicU32],
    source: u32,
    admission: Admission,
) {
    held.fetch_sub(1, Ordering::SeqCst);
    if admission.half_open {
        half_open.fetch_sub(1, Ordering::SeqCst);
    }
    if admission.tracked_source {
        of_source[source as usize].fetch_sub(1, Ordering::SeqCst);
    }
    vm.release(host(source), admission);
}

/// Threads race for the last tokens: none is given twice.
#[test]
fn several_threads_share_the_rate_exactly() {
    let vm = VmLimits::new(&LimitsConfig { new_per_second: 1000, burst: 500, ..LimitsConfig::default() }, 1);
    let admitted: usize = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..5000).filter(|i| vm.admit(host(*i), 0).is_ok()).count())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    // A thread that loses many races may be refused although tokens are left: then they are still there.
    assert_eq!(admitted as u64 + vm.status(0).tokens.unwrap(), 500);
    assert_eq!(vm.status(0).connections as usize, admitted);
}
