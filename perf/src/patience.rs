//! How long to wait for a switch before a frame is given up.
use std::time::{Duration, Instant};

/// Of the time between two polls, no more than this counts: a thread that was kept off its core did not poll.
const BETWEEN_POLLS: Duration = Duration::from_millis(1);

/// The time that this thread has spent polling in vain. On a machine whose cores are shared, a thread that waits by the clock
/// may be off its core for all of that time and find nothing, because the switch was off its core too; counted in polls, the
/// switch has had its share of the cores meanwhile.
#[derive(Debug)]
pub struct Patience {
    polled: Duration,
    last: Instant,
}

impl Patience {
    /// Nothing waited yet.
    pub fn new() -> Self {
        Self { polled: Duration::ZERO, last: Instant::now() }
    }

    /// Something has moved: waits from now on.
    pub fn restart(&mut self) {
        *self = Self::new();
    }

    /// A poll found nothing. Returns how long that has been so.
    pub fn waited(&mut self) -> Duration {
        let now = Instant::now();
        self.polled += now.duration_since(self.last).min(BETWEEN_POLLS);
        self.last = now;
        self.polled
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_off_the_core_does_not_count() {
        let mut p = Patience::new();
        std::thread::sleep(Duration::from_millis(30));
        assert!(p.waited() <= BETWEEN_POLLS);
        std::thread::sleep(Duration::from_millis(30));
        let waited = p.waited();
        assert!(waited > BETWEEN_POLLS && waited <= 2 * BETWEEN_POLLS, "{waited:?}");
        p.restart();
        assert!(p.waited() <= BETWEEN_POLLS);
    }
}
