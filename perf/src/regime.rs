//! The machine's regime: what makes the same program run at different speeds from one second to the next.
//!
//! On virtual machines the cores that a guest sees move between the host's: a cache line's round trip between two of them
//! takes 50 to 150 ns when they are near, more than 300 ns when they are far, and everything that passes packets from core
//! to core changes with it by a factor of two to three. So each timed window carries what was probed before and after
//! it, and only windows of the same placement are compared.
use crate::affinity::{self, Urgency};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// From this round trip on, nanoseconds, cores count as far from each other.
pub const FAR_NS: f64 = 220.0;

/// How near two cores are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// They share a cache.
    Near,
    /// They do not.
    Far,
}

impl Placement {
    /// By the round trip of a cache line, nanoseconds.
    pub fn of(round_trip_ns: f64) -> Self {
        if round_trip_ns < FAR_NS { Self::Near } else { Self::Far }
    }
}

#[repr(align(128))]
struct Line(AtomicU64);

/// Round trip of a cache line between two cores, nanoseconds: the least of several batches, so that being interrupted
/// does not count. Takes about a millisecond.
///
/// # Errors
/// When the cores do not exist.
pub fn round_trip_ns(a: usize, b: usize) -> Result<f64> {
    const BATCHES: u64 = 24;
    const TRIPS: u64 = 200;
    let ping = Line(AtomicU64::new(0));
    let pong = Line(AtomicU64::new(0));
    let stop = Line(AtomicU64::new(0));
    // Both begin on the caller's core, where the one that polls first would keep the other from getting to its own.
    let ready = Barrier::new(2);
    std::thread::scope(|s| {
        let echo = s.spawn(|| -> Result<()> {
            // In this order: on the other core it could not run beside what is being measured.
            affinity::set_urgency(0, Urgency::Probe);
            let pinned = affinity::pin_self(b);
            ready.wait();
            pinned?;
            let mut seen = 0;
            while stop.0.load(Ordering::Relaxed) == 0 {
                let now = ping.0.load(Ordering::Acquire);
                if now != seen {
                    seen = now;
                    pong.0.store(now, Ordering::Release);
                }
                std::hint::spin_loop();
            }
            Ok(())
        });
        let measure = s.spawn(|| -> Result<f64> {
            affinity::set_urgency(0, Urgency::Probe);
            let pinned = affinity::pin_self(a);
            ready.wait();
            pinned?;
            let mut best = f64::INFINITY;
            let mut n = 0;
            for _ in 0..BATCHES {
                let begin = Instant::now();
                for _ in 0..TRIPS {
                    n += 1;
                    ping.0.store(n, Ordering::Release);
                    let mut turns = 0u64;
                    while pong.0.load(Ordering::Acquire) != n {
                        turns += 1;
                        anyhow::ensure!(turns < 1 << 28, "the other core does not answer");
                        std::hint::spin_loop();
                    }
                }
                best = best.min(begin.elapsed().as_nanos() as f64 / TRIPS as f64);
            }
            Ok(best)
        });
        let result = measure.join().ok().context("the probe panicked")?;
        stop.0.store(1, Ordering::Relaxed);
        echo.join().ok().context("the probe panicked")??;
        result
    })
}

/// Speed of copying between buffers that no cache holds, gigabytes per second (read and written bytes counted once).
pub fn memory_gb_per_s(core: usize) -> Result<f64> {
    const BYTES: usize = 64 << 20;
    std::thread::spawn(move || -> Result<f64> {
        affinity::pin_self(core)?;
        let from = vec![1u8; BYTES];
        let mut to = vec![2u8; BYTES];
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let begin = Instant::now();
            to.copy_from_slice(&from);
            std::hint::black_box(&mut to);
            best = best.min(begin.elapsed().as_secs_f64());
        }
        Ok(BYTES as f64 / best / 1e9)
    })
    .join()
    .ok()
    .context("the probe panicked")?
}

/// Time that the hypervisor has kept from a core so far, milliseconds (`steal` in /proc/stat).
pub fn steal_ms(core: usize) -> u64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let name = format!("cpu{core}");
    let line = text.lines().find(|l| l.split_whitespace().next() == Some(&name));
    // Fields after the name: user nice system idle iowait irq softirq steal, in hundredths of a second.
    line.and_then(|l| l.split_whitespace().nth(8)).and_then(|w| w.parse::<u64>().ok()).unwrap_or(0) * 10
}

/// What the suite says about the machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Environment {
    /// Processor's name.
    pub processor: String,
    /// Number of cores.
    pub cores: usize,
    /// Which vector extensions it has.
    pub vectors: String,
    /// Kernel's release.
    pub kernel: String,
    /// Versions of the peers.
    pub peers: Vec<String>,
    /// Core of the generator, core of the switch.
    pub generator_core: usize,
    /// Core of the switch's PMD thread.
    pub switch_core: usize,
    /// Round trip between them, nanoseconds.
    pub round_trip_ns: f64,
    /// Copying in memory, gigabytes per second.
    pub memory_gb_per_s: f64,
    /// Seconds since 1970.
    pub time: u64,
    /// Load average over one minute at the start.
    pub load: String,
}

impl Environment {
    /// Looks around.
    ///
    /// # Errors
    /// When the cores do not exist.
    pub fn probe(generator_core: usize, switch_core: usize, peers: Vec<String>) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|l| l.starts_with(name));
            line.and_then(|l| l.split(':').nth(1)).unwrap_or("").trim().to_string()
        };
        let has = field("flags");
        let vectors = ["sse4_2", "avx2", "avx512f", "avx512vl"].into_iter().filter(|v| has.split(' ').any(|f| f == *v));
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Ok(Self {
            processor: field("model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            vectors: vectors.collect::<Vec<_>>().join(" "),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
            peers,
            generator_core,
            switch_core,
            round_trip_ns: round_trip_ns(generator_core, switch_core)?,
            memory_gb_per_s: memory_gb_per_s(generator_core)?,
            time: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg").split(' ').next().unwrap_or("").to_string(),
        })
    }
}
