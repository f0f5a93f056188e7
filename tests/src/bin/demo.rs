//! `make demo`: a switch, two QEMU guests and a network namespace behind a DPDK uplink, and data between all three.
use anyhow::{Context, Result, bail};
use ferry_guest::protocol::{Direction, TransferReport};
use ferry_guest::stream;
use ferry_tests::qemu::{self, GuestBuilder, Nic};
use ferry_tests::{Agent, Ferryd, FerrydBuilder, Netns, Port, Scratch, wait};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes per transfer.
const BYTES: u64 = 60_000_000;
/// Time between two lines of live counters.
const TICK: Duration = Duration::from_secs(1);

struct Transfer<'a> {
    from: &'static str,
    to: &'static str,
    sender: &'a Agent,
    address: &'static str,
}

fn main() -> Result<()> {
    let begin = Instant::now();
    let step = |text: &str| println!("[{:5.1} s] {text}", begin.elapsed().as_secs_f64());
    println!("Ferry demo: guest vm1, guest vm2 and a namespace behind the DPDK uplink up0, all on bridge br0.\n");
    let scratch = Scratch::new()?;
    let (vm1_socket, vm2_socket) = (scratch.join("vm1.sock"), scratch.join("vm2.sock"));

    step("starting ferryd (its tap device is handed to the namespace)");
    let home = Netns::new(scratch.path())?;
    let outside = Netns::new(scratch.path())?;
    let mut ferryd = FerrydBuilder::new()
        .port(Port::vhost("vm1", &vm1_socket))
        .port(Port::vhost("vm2", &vm2_socket))
        .port(Port::dpdk("up0", "net_tap0,iface=ferry0"))
        .namespace(&home)
        .start()?;
    wait::until("tap device", Duration::from_secs(10), || home.has_interface("ferry0"))?;
    home.give("ferry0", &outside)?;
    outside.configure("ferry0", &["10.0.0.3/24"], None)?;

    step("booting two guests");
    let [vm1, vm2] = qemu::boot_all(
        [
            GuestBuilder::new("vm1").nic(Nic::new(&vm1_socket, 1)),
            GuestBuilder::new("vm2").nic(Nic::new(&vm2_socket, 2)),
        ],
        scratch.path(),
    )?;
    vm1.configure("eth0", &["10.0.0.1/24"], None)?;
    vm2.configure("eth0", &["10.0.0.2/24"], None)?;
    for (from, to) in [(&*vm1, "10.0.0.2"), (&*vm1, "10.0.0.3"), (&*vm2, "10.0.0.3")] {
        from.reach(to)?;
    }
    step("everyone reaches everyone; transferring, counters live:");

    let transfers = [
        Transfer { from: "vm1", to: "vm2", sender: &vm1, address: "10.0.0.2" },
        Transfer { from: "vm2", to: "namespace", sender: &vm2, address: "10.0.0.3" },
        Transfer { from: "namespace", to: "vm1", sender: &outside, address: "10.0.0.1" },
    ];
    let done = AtomicBool::new(false);
    let reports = thread::scope(|scope| -> Result<Vec<TransferReport>> {
        let display = scope.spawn(|| show_live(&ferryd, begin, &done));
        let reports = run(&transfers);
        done.store(true, Relaxed);
        display.join().ok().context("display failed")?;
        reports
    })?;

    let stats = ferryd.check_ledger()?;
    println!("\n{:<22} {:>12} {:>9} {:>11}  digest", "transfer", "bytes", "seconds", "Mbit/s");
    for (t, r) in transfers.iter().zip(&reports) {
        let seconds = r.elapsed_ms as f64 / 1000.0;
        println!(
            "{:<22} {:>12} {:>9.2} {:>11.0}  {}... verified",
            format!("{} -> {}", t.from, t.to),
            r.bytes,
            seconds,
            r.bytes as f64 * 8e-6 / seconds,
            r.digest.get(..12).unwrap_or_default(),
        );
    }
    println!(
        "\n{:<10} {:>10} {:>10} {:>10} {:>10}  dropped by reason",
        "port", "received", "forwarded", "dropped", "sent"
    );
    for p in &stats.ports {
        let rx = p.received();
        let reasons: Vec<String> =
            rx.dropped.iter().filter(|(_, n)| **n > 0).map(|(r, n)| format!("{r} {n}")).collect();
        println!(
            "{:<10} {:>10} {:>10} {:>10} {:>10}  {}",
            p.port,
            rx.frames,
            rx.forwarded,
            rx.dropped_total(),
            p.tx.frames,
            reasons.join(", ")
        );
    }
    let total = stats.total();
    println!(
        "\nLedger: {} received = {} forwarded + {} dropped.",
        total.frames,
        total.forwarded,
        total.dropped_total()
    );
    drop((vm1, vm2));
    ferryd.stop()?;
    step("cleaned up. Demo passed.");
    Ok(())
}

/// Runs all transfers at the same time and verifies them.
fn run(transfers: &[Transfer]) -> Result<Vec<TransferReport>> {
    let mut pending = Vec::new();
    for (seed, t) in (1u64..).zip(transfers) {
        let address: IpAddr = t.address.parse()?;
        pending.push((seed, t, t.sender.start_transfer(address, Direction::Send, seed, BYTES, 0)?));
    }
    let mut reports = Vec::new();
    for (seed, t, p) in pending {
        let report = p.wait_transfer(Duration::from_secs(120)).with_context(|| format!("{} -> {}", t.from, t.to))?;
        if report.bytes != BYTES || report.digest != stream::digest(seed, BYTES) {
            bail!("{} -> {}: what arrived is not what was sent: {report:?}", t.from, t.to);
        }
        reports.push(report);
    }
    Ok(reports)
}

/// Prints what every port received since the last line.
fn show_live(ferryd: &Ferryd, begin: Instant, done: &AtomicBool) {
    let mut last: Option<(Instant, ferry_tests::ferryd::Stats)> = None;
    while !done.load(Relaxed) {
        let Ok(now) = ferryd.stats() else { return };
        let at = Instant::now();
        if let Some((then, before)) = &last {
            let seconds = (at - *then).as_secs_f64();
            let mut line = format!("[{:5.1} s]", begin.elapsed().as_secs_f64());
            for p in &now.ports {
                let (new, old) = (p.received(), before.port(&p.port).received());
                let frames = new.frames.saturating_sub(old.frames) as f64 / seconds;
                let mbit = new.bytes.saturating_sub(old.bytes) as f64 * 8e-6 / seconds;
                line += &format!("  {}: {frames:>7.0} frames/s {mbit:>6.0} Mbit/s", p.port);
            }
            let total = now.total();
            println!("{line}  dropped {}", total.dropped_total());
        }
        last = Some((at, now));
        let slept = Instant::now();
        while slept.elapsed() < TICK && !done.load(Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    }
}
