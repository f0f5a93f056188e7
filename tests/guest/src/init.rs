//! Process 1 of a guest.
use crate::{agent, services, shell, system};
use std::fs::{self, File, OpenOptions};
use std::io::BufReader;
use std::time::Duration;

/// Brings the guest up and serves for ever. Failures go to the console, which the harness keeps, and end the guest.
pub fn run() -> ! {
    if let Err(e) = bring_up() {
        println!("ferry-guest: {e}");
        // Let the serial port send that.
        std::thread::sleep(Duration::from_millis(200));
        system::restart();
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn bring_up() -> Result<(), String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        system::mount(kind, target).map_err(|e| format!("mount {target}: {e}"))?;
    }
    // Duplicate address detection would keep IPv6 addresses unusable for a second or two. Interfaces take these
    // settings over when they appear, so this comes before the drivers.
    for scope in ["all", "default"] {
        for key in ["accept_dad", "dad_transmits"] {
            let path = format!("/proc/sys/net/ipv6/conf/{scope}/{key}");
            fs::write(&path, "0").map_err(|e| format!("{path}: {e}"))?;
        }
    }
    let order = fs::read_to_string("/modules/order").map_err(|e| format!("/modules/order: {e}"))?;
    for name in order.lines() {
        let path = format!("/modules/{name}");
        File::open(&path).and_then(|f| system::load_module(&f)).map_err(|e| format!("load {path}: {e}"))?;
    }
    let up = shell::run("ip link set lo up", Duration::from_secs(10))?;
    if up.status != Some(0) {
        return Err(format!("lo: {}", up.output));
    }
    services::start().map_err(|e| format!("services: {e}"))?;
    let tty = OpenOptions::new().read(true).write(true).open("/dev/ttyS1").map_err(|e| format!("ttyS1: {e}"))?;
    system::make_raw(&tty).map_err(|e| format!("ttyS1: {e}"))?;
    let output = tty.try_clone().map_err(|e| format!("ttyS1: {e}"))?;
    agent::serve(BufReader::new(tty), Box::new(output));
    Err("the command channel was closed".into())
}
