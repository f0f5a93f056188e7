//! `ferry pmd perf` on a live switch under traffic: the stages account for the cycles that PMD threads are busy.
use anyhow::Context;
use ferry_tests::{FerrydBuilder, Outcome, Port, Scratch, TestpmdBuilder, VirtioUser, wait};
use std::time::Duration;

const FRAMES: u64 = 200_000;

/// What `ferry pmd perf --json` says of the only PMD thread.
#[derive(Clone, Copy, Debug)]
struct Cycles {
    busy: u64,
    frames: u64,
    timed_frames: u64,
    /// Receive, route, send, release.
    stages: [u64; 4],
    housekeeping: u64,
}

impl Cycles {
    fn read(said: &serde_json::Value) -> anyhow::Result<Self> {
        let pmds = said["pmds"].as_array().context("pmds")?;
        assert_eq!(pmds.len(), 1, "{said}");
        let stats = &pmds[0]["stats"];
        let field = |v: &serde_json::Value, name: &str| v[name].as_u64().with_context(|| format!("{name}: {said}"));
        let stages = &stats["stages"];
        Ok(Self {
            busy: field(stats, "busy_cycles")?,
            frames: field(stats, "frames")?,
            timed_frames: field(stages, "frames")?,
            stages: [
                field(stages, "receive")?,
                field(stages, "route")?,
                field(stages, "send")?,
                field(stages, "release")?,
            ],
            housekeeping: field(stages, "housekeeping")?,
        })
    }

    fn sum(&self) -> u64 {
        self.stages.iter().sum()
    }
}

#[test]
fn stages_account_for_the_busy_cycles() -> Outcome {
    let scratch = Scratch::new()?;
    let (tx_socket, rx_socket) = (scratch.join("tx.sock"), scratch.join("rx.sock"));
    let ferryd =
        FerrydBuilder::new().port(Port::vhost("tx", &tx_socket)).port(Port::vhost("rx", &rx_socket)).start()?;
    let mut receiver = TestpmdBuilder::new()
        .port(&VirtioUser::new(&rx_socket, 2))
        .arg("--forward-mode=rxonly")
        .start(scratch.path())?;
    let mut sender = TestpmdBuilder::new()
        .port(&VirtioUser::new(&tx_socket, 1))
        .arg("--forward-mode=txonly")
        .arg("--eth-peer=0,52:54:00:00:01:02")
        .start(scratch.path())?;
    ferryd.wait_state(&["tx", "rx"], "up")?;
    receiver.start()?;
    sender.start()?;
    let read = || Cycles::read(&ferryd.json(&["pmd", "perf"])?);
    // Under traffic: figures of one moment, but for what changes while they are read.
    let mut before = read()?;
    wait::until("frames", Duration::from_secs(20), || {
        let Ok(now) = read() else { return false };
        assert!(
            now.frames >= before.frames && now.sum() >= before.sum() && now.busy >= before.busy,
            "{before:?} {now:?}"
        );
        before = now;
        now.frames > FRAMES
    })?;
    sender.stop()?;
    receiver.stop()?;
    ferryd.check_ledger()?;
    let cycles = read()?;
    assert!(cycles.stages.iter().all(|&c| c > 0), "{cycles:?}");
    assert!(cycles.timed_frames <= cycles.frames && cycles.timed_frames * 2 > cycles.frames, "{cycles:?}");
    // No cycle is counted twice, and what a busy round does besides its bursts is little. Housekeeping may fall into idle rounds.
    assert!(cycles.sum() <= cycles.busy, "{cycles:?}");
    assert!((cycles.sum() + cycles.housekeeping) * 2 > cycles.busy, "{cycles:?}");

    // For people: cycles per frame of each stage, and their sum.
    let text = ferryd.ferry(&["pmd", "perf"])?;
    let mut lines = text.lines();
    let heading: Vec<&str> =
        lines.next().context("heading")?.split("  ").map(str::trim).filter(|w| !w.is_empty()).collect();
    let row: Vec<&str> = lines.next().context("row")?.split_whitespace().collect();
    let column = |name: &str| {
        let at = heading.iter().position(|h| *h == name).with_context(|| format!("no column {name}: {text}"))?;
        row[at].parse::<f64>().with_context(|| text.clone())
    };
    let mut sum = 0.0;
    for (name, stage) in ["RECEIVE", "ROUTE", "SEND", "RELEASE"].into_iter().zip(cycles.stages) {
        let shown = column(name)?;
        assert!((shown - stage as f64 / cycles.timed_frames as f64).abs() < 0.1, "{name}: {text}\n{cycles:?}");
        sum += shown;
    }
    assert!((column("SUM")? - sum).abs() < 0.5, "{text}");
    Ok(())
}
