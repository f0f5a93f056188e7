//! Two hosts and one VM in virtual time: real tables, real tracking, real messages, real state machines; a hostile channel, crashes,
//! and a QEMU that changes its mind. Every seed is another story, and the same story every time.
mod network;
mod rng;
mod traffic;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Coverage, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `FERRY_SIM_SEED=n`: one seed, told in full. `FERRY_SIM_SEEDS=n`: how many, from 0 on.
#[test]
fn seeds() {
    if let Some(seed) = number("FERRY_SIM_SEED") {
        let mut world = World::new(seed, true);
        world.run();
        println!("{:?}", world.coverage);
        return;
    }
    let seeds = number("FERRY_SIM_SEEDS").unwrap_or(2000);
    let next = AtomicU64::new(0);
    let total = Mutex::new(Coverage::default());
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().unwrap().len() >= 5 {
                        return;
                    }
                    let mut world = World::new(seed, false);
                    match catch_unwind(AssertUnwindSafe(|| world.run())) {
                        Ok(()) => total.lock().unwrap().add(&world.coverage),
                        Err(_) => failed.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    for seed in &failed {
        println!("FERRY_SIM_SEED={seed} cargo test -p ferry-migrate --test simulator -- --nocapture");
    }
    assert!(failed.is_empty(), "{} seeds failed; each command above tells one story in full", failed.len());
    let total = total.into_inner().unwrap();
    println!("{total:#?}");
    if seeds >= 1000 {
        check_coverage(&total);
    }
}

/// A simulation that never gets anywhere finds nothing: what must have happened in a thousand seeds.
fn check_coverage(c: &Coverage) {
    let [complete, lagging, partial, empty, unconfirmed] = c.began;
    let seen = [
        ("commits", c.commits),
        ("commits with all windows", c.commits_with_all_windows),
        ("rounds", c.rounds),
        ("entries held back", c.held_back),
        ("lagging entries", c.lagging),
        ("tombstones", c.tombstones),
        ("rounds begun anew", c.restarts),
        ("complete", complete),
        ("lagging", lagging),
        ("partial", partial),
        ("empty", empty),
        ("unconfirmed", unconfirmed),
        ("holds expired", c.holds_expired),
        ("holds failed", c.holds_failed),
        ("resumed", c.resumed),
        ("cancelled", c.cancelled),
        ("refused", c.refused),
        ("dropped", c.dropped),
        ("withdrawn", c.withdrawn),
        ("forgotten", c.forgotten),
        ("late frames", c.late_frames),
        ("crashes", c.crashes),
        ("cuts", c.cuts),
        ("repeated batches", c.repeated),
        ("messages that cannot be decoded", c.undecodable),
        ("second attempts", c.second_attempts),
        ("quiet runs", c.quiet_runs),
    ];
    for (what, times) in seen {
        assert!(times >= 10, "{what}: {times} times");
    }
}
