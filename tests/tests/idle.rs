//! Idle costs next to nothing: the stated bound is 2 % of a core for 20 ports attached and idle.
use ferry_tests::{FerrydBuilder, Outcome, Port, Scratch, TestpmdBuilder, VirtioUser};
use std::thread;
use std::time::{Duration, Instant};

const PORTS: u8 = 20;
/// Most of a core that may be used.
const SHARE: f64 = 0.02;

#[test]
fn twenty_idle_ports_use_less_than_two_percent_of_a_core() -> Outcome {
    let scratch = Scratch::new()?;
    let mut builder = FerrydBuilder::new();
    let mut clients = TestpmdBuilder::new().arg("--total-num-mbufs=32768").arg("--forward-mode=rxonly");
    let names: Vec<String> = (0..PORTS).map(|n| format!("p{n}")).collect();
    for (n, name) in (0..PORTS).zip(&names) {
        let socket = scratch.join(format!("{name}.sock"));
        builder = builder.port(Port::vhost(name, &socket));
        clients = clients.port(&VirtioUser::new(&socket, n).option("packed_vq", u32::from(n % 2)));
    }
    let mut ferryd = builder.start()?;
    // Attached with running rings, and silent: testpmd only polls once it is told to forward.
    let mut clients = clients.start(scratch.path())?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    ferryd.wait_state(&names, "up")?;
    thread::sleep(Duration::from_secs(2));
    let (before, start) = (ferryd.process()?.cpu_time()?, Instant::now());
    // /proc counts in ticks of 10 ms: 5 s make that 0.2 %.
    thread::sleep(Duration::from_secs(5));
    let used = ferryd.process()?.cpu_time()?.saturating_sub(before);
    let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
    eprintln!("{:.2} % of a core", share * 100.0);
    assert!(share < SHARE, "{used:?} of processor time within {:?}", start.elapsed());
    // They were really attached: frames pass at once.
    clients.command("set fwd txonly")?;
    clients.start()?;
    ferry_tests::wait::until("frames", Duration::from_secs(10), || {
        ferryd.stats().is_ok_and(|s| s.total().frames > 1000)
    })?;
    clients.stop()?;
    let busy = ferryd.process()?.cpu_time()?;
    assert!(busy > before + used, "the right process was measured");
    ferryd.check_ledger()?;
    Ok(())
}
