//! What the counters behind `ferry pmd perf` cost. They cannot be switched off, so what they do per burst is timed by itself.
use super::gauge;
use crate::results::Metric;
use ferry_dataplane::clock::cycles;
use ferry_dataplane::frame::BURST;
use ferry_dataplane::pmd::StageCounters;
use std::hint::black_box;
use std::time::Instant;

/// Bursts in one sample.
const BURSTS: u32 = 200_000;

/// What a PMD thread does for them in a burst that it times: as in `Worker::poll`.
#[inline(always)]
fn count(stages: &StageCounters, mark: u64) -> u64 {
    let received = cycles();
    let routed = black_box(cycles());
    let sent = black_box(cycles());
    stages.frames.add(BURST as u64);
    stages.receive.add(received.wrapping_sub(mark));
    stages.route.add(routed.wrapping_sub(received));
    stages.send.add(sent.wrapping_sub(routed));
    let released = cycles();
    stages.release.add(released.wrapping_sub(sent));
    released
}

/// Nanoseconds per frame in full bursts, in which each is timed. Smaller bursts are sampled, so that it is not more there.
pub fn stages(samples: usize) -> Vec<Metric> {
    let stages = black_box(StageCounters::default());
    let mut values = Vec::new();
    for _ in 0..samples.max(3) {
        let begin = Instant::now();
        let mut mark = cycles();
        for _ in 0..BURSTS {
            mark = count(black_box(&stages), mark);
        }
        black_box(mark);
        values.push(begin.elapsed().as_nanos() as f64 / f64::from(BURSTS) / BURST as f64);
    }
    gauge(format!("stage-counters per frame, bursts of {BURST}"), "ns", false, &values).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_to_the_time_between_two_marks() {
        let stages = StageCounters::default();
        let begin = cycles();
        let end = count(&stages, begin);
        let sum = stages.receive.get() + stages.route.get() + stages.send.get() + stages.release.get();
        assert_eq!(sum, end - begin);
        assert_eq!(stages.frames.get(), BURST as u64);
    }
}
