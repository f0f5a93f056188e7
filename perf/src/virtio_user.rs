//! The second generator: DPDK's own virtio driver (virtio-user) under testpmd's flowgen, on the same sockets. A third
//! party's word on the same switches, but a heavy one: on one core it ends at about 14 million frames per second, whatever the
//! switch could take.
use crate::affinity::{self, Urgency};
use crate::frame::Station;
use crate::guest::ring::RingFormat;
use crate::process::Process;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A testpmd with two virtio-user ports, each of which sends to the other through a switch.
pub struct VirtioUser {
    process: Process,
    core: usize,
}

impl VirtioUser {
    /// Attaches to the first two sockets and begins to send frames of this length. `log`: a file of its own.
    ///
    /// # Errors
    /// When testpmd is missing or the switch does not answer.
    pub fn start(sockets: &[PathBuf], core: usize, frame_bytes: usize, rings: RingFormat, log: &Path) -> Result<Self> {
        let mut c = Command::new("stdbuf");
        // The command line's thread must not share the sending thread's core alone: it would never get to answer.
        let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
        c.args(["-o0", "dpdk-testpmd"]).arg(format!("--lcores=0@(0-{last}),1@{core}"));
        c.args(["--in-memory", "--single-file-segments", "--no-pci", "--no-telemetry", "-m", "256"]);
        for (i, socket) in sockets.iter().take(2).enumerate() {
            let mac = Station::new(i as u8 + 1).mac_text();
            let packed = u8::from(rings == RingFormat::Packed);
            c.arg(format!(
                "--vdev=net_virtio_user{i},path={},mac={mac},queue_size=256,mrg_rxbuf=1,packed_vq={packed}",
                socket.display()
            ));
        }
        c.args([
            "--",
            "-i",
            "--nb-cores=1",
            "--forward-mode=flowgen",
            "--flowgen-flows=1",
            "--no-mlockall",
            "--burst=32",
        ]);
        c.args(["--total-num-mbufs=32768", "--auto-start"]).arg(format!("--txpkts={frame_bytes}"));
        for i in 0..2u8 {
            c.arg(format!("--eth-peer={i},{}", Station::new(2 - i).mac_text()));
        }
        let mut process = Process::start(c, log)?;
        process.wait_for("prompt", Duration::from_secs(30), |p| p.log().contains("testpmd> "))?;
        Ok(Self { process, core })
    }

    /// Frames received by both ports so far, and when that was.
    fn received(&mut self) -> Result<(u64, Instant)> {
        let before = self.process.log().len();
        self.process.write_line("show port stats all")?;
        let new = |p: &Process| p.log().get(before..).unwrap_or_default().to_owned();
        self.process.wait_for("statistics", Duration::from_secs(10), |p| new(p).contains("testpmd> "))?;
        let at = Instant::now();
        let text = new(&self.process);
        let words: Vec<&str> = text.split_whitespace().collect();
        let counts = words.windows(2).filter(|w| w[0] == "RX-packets:").map(|w| w[1].parse::<u64>());
        Ok((counts.sum::<Result<u64, _>>().context("RX-packets")?, at))
    }

    /// Million frames per second that arrive, both directions together, over about this long.
    ///
    /// # Errors
    /// When testpmd ends.
    pub fn mpps(&mut self, duration: Duration) -> Result<f64> {
        let (threads, others) = affinity::threads(self.process.id(), self.core)?;
        // This thread has to get a word in on cores that both are taken.
        affinity::set_urgency(0, Urgency::Helper);
        others.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Helper));
        threads.iter().for_each(|&t| affinity::set_urgency(t, Urgency::Measured));
        let both = (|| {
            std::thread::sleep(duration / 4);
            let first = self.received()?;
            std::thread::sleep(duration);
            anyhow::Ok((first, self.received()?))
        })();
        threads.iter().chain(&others).for_each(|&t| affinity::set_urgency(t, Urgency::Ordinary));
        affinity::set_urgency(0, Urgency::Ordinary);
        let (first, second) = both?;
        Ok((second.0 - first.0) as f64 / (second.1 - first.1).as_secs_f64() / 1e6)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
