//! The second half of the demo: a guest with thousands of connections moves live between two switches under a strict firewall, with its
//! connections and without.
use anyhow::{Context, Result, ensure};
use ferry_tests::two_hosts::experiment::{self, Connections, Load, Report, Step, Subject};
use ferry_tests::two_hosts::status::{Asker, now_ms};
use ferry_tests::two_hosts::{Plan, TwoHosts, VM};
use ferry_tests::{Scratch, paths};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// Connections of the guest.
const CONNECTIONS: u32 = 10_000;
/// Between two looks at the migration.
const LOOK: Duration = Duration::from_millis(100);

/// `target/demo.json`
#[derive(Serialize)]
struct Figures<'a> {
    #[serde(flatten)]
    with: &'a Report,
    without_flow_migration: &'a Report,
}

/// Shows it all, and leaves the figures in `target/demo.json`.
pub fn show(begin: Instant, step: &dyn Fn(&str)) -> Result<()> {
    println!(
        "\nLive migration. Host A and host B have a ferryd each; guest vm1 is on A, its peer behind a top-of-rack bridge. Both hosts let \
         connections in only to vm1's services, and only from their beginning (SYN): what is in the middle of things is dropped.\n"
    );
    let scratch = Scratch::new()?;
    let plan = Plan { flow_migration: true, memory_mb: 192, ..Plan::default() };
    let mut hosts = TwoHosts::new(&scratch, plan)?;
    step("two hosts are up, with certificates of a private authority; booting vm1 on A");
    let load = Load::full(CONNECTIONS);
    let subject = Subject::boot(&hosts, &scratch, &load)?;
    step(&format!("{CONNECTIONS} TCP connections between vm1 and its peer are established"));
    println!("$ ferry migrate check {VM} --to host-b");
    println!("{}\n", hosts.a.ferryd.ferry(&["migrate", "check", VM, "--to", "host-b"])?.trim_end());
    step("vm1 moves to B while it rewrites its memory, its connections are used, and a rule is revoked:");
    let (subject, with) = watched(&mut hosts, &scratch, subject, &load, begin)?;
    ensure!(with.connections_after == CONNECTIONS, "connections were lost: {with:?}");
    ensure!(with.more.counter_runs && with.more.stream_intact, "the counter or the stream stopped: {with:?}");
    println!("\n$ ferry migrate list {VM}");
    println!("{}\n", hosts.a.ferryd.ferry(&["migrate", "list", VM])?.trim_end());

    step("the same back to A, with flow migration switched off on both hosts:");
    hosts.set_flow_migration(false)?;
    let (subject, without) = watched(&mut hosts, &scratch, subject, &load, begin)?;
    ensure!(
        without.connections_after == 0 && !without.more.counter_runs,
        "connections live without their state: {without:?}"
    );
    let new = Connections::open(&hosts, &subject.guest, 10, load.family)?;
    new.check_all_alive(&hosts, &subject.guest)?;
    step("new connections work at once; the old ones hang, and nobody was told.");

    table(&with, &without);
    let path = paths::target().join("demo.json");
    let figures = Figures { with: &with, without_flow_migration: &without };
    std::fs::write(&path, serde_json::to_string_pretty(&figures)? + "\n")
        .with_context(|| path.display().to_string())?;
    println!("\nFigures: {}", path.display());
    Ok(())
}

/// Moves the guest, and prints what happens while it happens.
fn watched(
    hosts: &mut TwoHosts,
    scratch: &Scratch,
    subject: Subject,
    load: &Load,
    begin: Instant,
) -> Result<(Subject, Report)> {
    let asker = Asker::new(hosts.host(subject.at));
    let since_ms = now_ms();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut shown = 0;
            while !done.load(Relaxed) {
                shown = show_rounds(&asker, since_ms, shown, begin);
                thread::sleep(LOOK);
            }
            show_rounds(&asker, since_ms, shown, begin);
        });
        let outcome = experiment::run(hosts, scratch, subject, load, &mut |step| {
            println!("[{:5.1} s] {}", begin.elapsed().as_secs_f64(), words(step));
        });
        done.store(true, Relaxed);
        outcome
    })
}

/// Prints the rounds that have ended since the last look; returns how many there are.
fn show_rounds(asker: &Asker, since_ms: u64, shown: usize, begin: Instant) -> usize {
    let Some(flow) = asker.flow(VM).ok().flatten().filter(|m| m.began_at_ms >= since_ms) else { return shown };
    for round in flow.rounds.iter().skip(shown) {
        println!(
            "[{:5.1} s]   {} {:>2}: {:>6} entries {:>9} bytes {:>4} ms",
            begin.elapsed().as_secs_f64(),
            if round.last { "final delta, round" } else { "round" },
            round.round,
            round.entries,
            round.bytes,
            round.duration_ms,
        );
    }
    flow.rounds.len()
}

fn words(step: Step) -> &'static str {
    match step {
        Step::Established => "all connections echo",
        Step::Begun => "QEMU was told to migrate",
        Step::Written => "payload was written into the guest during the rounds",
        Step::Revoked => "a rule was revoked: its connection is cut",
        Step::Arrived => "vm1 runs on the other host; all connections are tried",
    }
}

fn table(with: &Report, without: &Report) {
    let sum = |r: &Report, of: fn(&experiment::Round) -> u64| r.rounds.iter().map(of).sum::<u64>().to_string();
    let ms = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.1}"));
    let gap = |r: &Report| if r.more.counter_runs { r.peer_gap_ms.to_string() } else { "hangs".into() };
    println!("\n{:<44} {:>14} {:>22}", "", "with", "without flow migration");
    let rows: [(&str, String, String); 10] = [
        ("QEMU's memory rounds", with.more.memory_rounds.to_string(), without.more.memory_rounds.to_string()),
        ("rounds of connections", with.rounds.len().to_string(), without.rounds.len().to_string()),
        ("entries sent", sum(with, |r| r.entries), sum(without, |r| r.entries)),
        ("bytes sent", sum(with, |r| r.bytes), sum(without, |r| r.bytes)),
        ("final delta, ms", ms(with.final_delta_ms), ms(without.final_delta_ms)),
        ("hold, ms", ms(with.hold_ms), ms(without.hold_ms)),
        ("QEMU's downtime, ms", with.qemu_downtime_ms.to_string(), without.qemu_downtime_ms.to_string()),
        ("longest silence of the peer's counter, ms", gap(with), gap(without)),
        ("connections before", with.connections_before.to_string(), without.connections_before.to_string()),
        ("connections afterwards", with.connections_after.to_string(), without.connections_after.to_string()),
    ];
    for (what, with, without) in rows {
        println!("{what:<44} {with:>14} {without:>22}");
    }
    println!(
        "Checked both times: the revoked connection is dead, closed ports are closed, payload of the rounds is intact, ledgers balance."
    );
}
