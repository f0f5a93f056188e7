//! What operating a live switch costs: migrations of connections, idle ports, further PMD threads, its own counters.
//!
//! Each figure compares two states of the same switch in windows that take turns, or is read from the switch itself. `README.md` beside
//! this crate tells what they mean.
mod downtime;
mod final_delta;
mod idle;
mod live;
mod scaling;
mod stages;
mod switch;
mod window;

use crate::affinity;
use crate::hugepages::HugePages;
use crate::results::{Figure, Metric, metrics_table};
use crate::system::Kind;
use anyhow::{Context, Result};
use std::path::Path;
use std::time::Duration;

pub use window::Terms;

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    FinalDelta,
    Logging,
    Tracking(u32),
    Idle,
    Scaling,
    Stages,
    Downtime,
}

/// Names, jobs, and whether they run without being asked for by name.
const JOBS: [(&str, Job, bool); 8] = [
    ("final-delta", Job::FinalDelta, true),
    ("dirty-log", Job::Logging, true),
    ("tracking-10k", Job::Tracking(10_000), true),
    ("tracking-1M", Job::Tracking(1_000_000), true),
    ("idle", Job::Idle, true),
    ("pmd-scaling", Job::Scaling, true),
    ("stage-counters", Job::Stages, true),
    // Boots guests, and takes minutes.
    ("downtime", Job::Downtime, false),
];

impl Job {
    /// Huge pages of 2 MiB for guests, and for peers.
    fn huge_pages(self) -> u64 {
        match self {
            Self::FinalDelta | Self::Stages | Self::Downtime => 0,
            Self::Logging | Self::Tracking(_) | Self::Scaling => 64,
            Self::Idle => 1200,
        }
    }

    fn measure(self, terms: &Terms, folder: &Path) -> Result<Vec<Metric>> {
        let _pages = HugePages::reserve(self.huge_pages())?;
        match self {
            Self::FinalDelta => final_delta::final_delta(terms.rounds.min(5)),
            Self::Logging => live::logging(terms, folder),
            Self::Tracking(connections) => live::tracking(terms, folder, connections),
            Self::Idle => idle::idle(terms, folder),
            Self::Scaling => scaling::scaling(terms, folder),
            Self::Stages => Ok(stages::stages(terms.rounds)),
            Self::Downtime => downtime::downtime(terms.rounds),
        }
    }
}

/// Names of all measurements.
pub fn names() -> impl Iterator<Item = &'static str> {
    JOBS.iter().map(|job| job.0)
}

/// As many windows as tell a few percent apart; about four minutes in all.
pub fn terms(generator_core: usize, switch_core: usize, rounds: usize) -> Terms {
    Terms { generator_core, switch_core, window: Duration::from_millis(400), rounds }
}

/// Measures everything whose name contains `only` (without it all but what takes minutes), prints each, and hands it to `save`. What fails is
/// told and left out. To be called by a thread that outlives the switches. Returns whether anything failed.
///
/// # Errors
/// When there is no place for files, or `save` fails.
pub fn measure(terms: &Terms, only: Option<&str>, mut save: impl FnMut(&[Metric]) -> Result<()>) -> Result<bool> {
    // Short: the paths of Unix sockets are limited to 107 bytes.
    let folder = tempfile::Builder::new().prefix("ferry-perf.").tempdir()?;
    let wanted = |name: &str, always: bool| only.map_or(always, |only| name.contains(only));
    let mut failed = false;
    for (name, job, always) in JOBS {
        if !wanted(name, always) {
            continue;
        }
        match job.measure(terms, folder.path()) {
            Ok(metrics) => {
                print!("{}", metrics_table(&metrics));
                save(&metrics)?;
            }
            Err(e) => {
                eprintln!("{name}: {e:#}");
                failed = true;
            }
        }
    }
    Ok(failed)
}

/// A figure of Ferry's that is not compared within windows.
fn gauge(name: String, unit: &str, higher_is_better: bool, values: &[f64]) -> Option<Metric> {
    let figure = Figure::of(values)?;
    Some(Metric { name, system: Kind::FerryFirewall, unit: unit.into(), higher_is_better, figure, placement: None })
}

/// Runs `job` on a thread that is pinned to a core. What is started stays with the calling thread, which is not.
fn on_core<T: Send>(core: usize, job: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|s| {
        let thread = s.spawn(move || {
            affinity::pin_self(core)?;
            job()
        });
        thread.join().ok().context("the generator panicked")?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn jobs_have_names_of_their_own() {
        assert_eq!(names().collect::<BTreeSet<_>>().len(), JOBS.len());
    }
}
