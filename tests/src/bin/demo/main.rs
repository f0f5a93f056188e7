//! `make demo`: a switch, two QEMU guests and a network namespace behind a DPDK uplink; data between all three under a strict
//! firewall, and the firewall at work: allowed, denied, revoked while running. Then a guest moves live between two switches.
mod migration;

use anyhow::{Context, Result, bail, ensure};
use ferry_guest::protocol::{Direction, TransferReport};
use ferry_guest::stream;
use ferry_tests::qemu::{self, GuestBuilder, Nic};
use ferry_tests::{Agent, Ferryd, FerrydBuilder, Netns, Port, Scratch, wait};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// The security groups. Nothing is let into a guest but what a rule allows.
const POLICY: &str = r#"
[[security_group.servers.rules]]
name = "stream"
direction = "ingress"
protocol = "tcp"
ports = [7001]
remote_group = "clients"
[[security_group.servers.rules]]
name = "ping"
direction = "ingress"
protocol = "icmp"
[[security_group.clients.rules]]
name = "backup"
direction = "ingress"
protocol = "tcp"
ports = [7001]
remote_cidr = "10.0.0.3/32"
"#;
/// The rule that is revoked under a running transfer.
const REVOKED_RULE: &str = "stream";
/// Time for what should happen at once.
const SOON: Duration = Duration::from_secs(20);
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
    println!(
        "Ferry demo: guest vm1 (group clients), guest vm2 (group servers) and a namespace behind the DPDK uplink up0.\n"
    );
    let scratch = Scratch::new()?;
    let (vm1_socket, vm2_socket) = (scratch.join("vm1.sock"), scratch.join("vm2.sock"));

    step("starting ferryd (its tap device is handed to the namespace)");
    let home = Netns::new(scratch.path())?;
    let outside = Netns::new(scratch.path())?;
    let mut ferryd = FerrydBuilder::new()
        .sections(POLICY)
        .port(guarded(1, "clients", &vm1_socket))
        .port(guarded(2, "servers", &vm2_socket))
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
    for (from, to) in [(&*vm1, "10.0.0.2"), (&outside, "10.0.0.2"), (&*vm2, "10.0.0.3"), (&*vm1, "10.0.0.3")] {
        from.reach(to)?;
    }
    step("what rules allow passes (vm1 -> vm2, all outwards, backup from the namespace); transferring, counters live:");

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
        "\nLedger: {} received = {} forwarded + {} held + {} dropped.\n",
        total.frames,
        total.forwarded,
        total.held,
        total.dropped_total()
    );
    show_firewall(&mut ferryd, &vm1, &vm2, &outside, &step)?;
    drop((vm1, vm2));
    ferryd.stop()?;
    migration::show(begin, &step)?;
    step("cleaned up. Demo passed.");
    Ok(())
}

/// Guest n's port, with a firewall.
fn guarded(n: u8, group: &str, socket: &Path) -> Port {
    let firewall = format!(
        "{{ security_groups = [{group:?}], anti_spoofing = {{ mac = \"52:54:00:00:00:0{n}\", addresses = [\"10.0.0.{n}\"] }} }}"
    );
    Port::vhost(&format!("vm{n}"), socket).key("firewall", &firewall)
}

/// Prints a command and what it says, and returns that.
fn show(ferryd: &Ferryd, args: &[&str]) -> Result<String> {
    let quoted: Vec<String> =
        args.iter().map(|a| if a.contains(' ') { format!("\"{a}\"") } else { (*a).to_string() }).collect();
    println!("$ ferry {}", quoted.join(" "));
    let text = ferryd.ferry(args)?;
    println!("{}\n", text.trim_end());
    Ok(text)
}

/// Denied, listed, revoked while running.
fn show_firewall(ferryd: &mut Ferryd, vm1: &Agent, vm2: &Agent, outside: &Agent, step: &dyn Fn(&str)) -> Result<()> {
    step("denied: the namespace tries vm2's stream service, which only members of group clients may use");
    ensure!(outside.open_connections("10.0.0.2".parse()?, 1).is_err(), "the namespace got through");
    let trace = show(ferryd, &["trace", "vm2", "in tcp 10.0.0.3:40000 > 10.0.0.2:7001 syn"])?;
    ensure!(trace.contains("fw_denied"), "the trace does not say so");
    let drops = show(ferryd, &["fw", "drops", "vm2"])?;
    ensure!(drops.contains("fw_denied"), "the denial is not listed");

    step("revoked while running: vm1 streams to vm2, and vm2 keeps a connection of its own to the namespace");
    let kept = vm2.open_connections("10.0.0.3".parse()?, 5)?;
    let before = ferryd.stats()?.port("vm2").tx.bytes;
    let transfer = vm1.start_transfer("10.0.0.2".parse()?, Direction::Send, 99, 4_000_000_000, 20)?;
    wait::until("the transfer runs", SOON, || {
        ferryd.stats().is_ok_and(|s| s.port("vm2").tx.bytes > before + 10_000_000)
    })?;
    let list = show(ferryd, &["conntrack", "list", "vm2", "--proto", "tcp"])?;
    ensure!(list.contains("ESTABLISHED") && list.contains("dport=7001"), "the transfer is not listed");
    let rules: Vec<&str> = POLICY.split("[[").filter(|rule| !rule.contains(REVOKED_RULE)).collect();
    ferryd.change_sections(&rules.join("[["))?;
    wait::until("the transfer is cut", SOON, || {
        ferryd.ferry(&["fw", "drops", "vm2"]).is_ok_and(|text| text.contains("fw_revoked"))
    })?;
    let cut = ferryd.stats()?.port("vm2").tx.bytes;
    step("the rule is gone, and the transfer is cut on its next packet:");
    show(ferryd, &["fw", "drops", "vm2"])?;
    thread::sleep(TICK);
    let late = ferryd.stats()?.port("vm2").tx.bytes - cut;
    ensure!(late < 100_000, "{late} bytes still reached vm2");
    ensure!(vm2.exercise_connections(kept)? == 5, "vm2's own connections were harmed");
    step("vm2's own connections never paused");
    drop(transfer);
    show(ferryd, &["conntrack", "stats", "vm2"])?;
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
