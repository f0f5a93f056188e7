//! What is told of a migration: built from the machines' reports, kept as the VM's latest and, when it has ended, in the history.
use std::time::Instant;

use ferry_migrate::destination;
use ferry_migrate::message::{Ack, Began};
use ferry_migrate::source::{self, Failure};

use super::auditor::unix_ms;
use super::view::{MigrationView, RoundView};

/// Most rounds that a view holds.
const MAX_ROUNDS: usize = 256;

/// A migration's view while it grows.
#[derive(Default)]
pub struct Record {
    /// What is told.
    pub view: MigrationView,
    stopped: Option<Instant>,
    held: Option<Instant>,
    committed: bool,
    activated: bool,
    failure: Option<Failure>,
    refused: bool,
}

/// A name as the API writes it.
pub fn began_name(began: Began) -> &'static str {
    match began {
        Began::Complete => "complete",
        Began::Lagging => "lagging",
        Began::Partial => "partial",
        Began::Empty => "empty",
        Began::Unconfirmed => "unconfirmed",
    }
}

fn source_state(state: source::State) -> &'static str {
    match state {
        source::State::Active => "active",
        source::State::PreCopy => "pre-copy",
        source::State::Frozen => "frozen",
        source::State::Redirecting => "redirecting",
        source::State::Gone => "gone",
    }
}

fn destination_state(state: destination::State) -> &'static str {
    match state {
        destination::State::Empty => "empty",
        destination::State::Staging => "staging",
        destination::State::Committed => "committed",
        destination::State::Active => "active",
    }
}

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

impl Record {
    /// A migration begins.
    pub fn begin(vm: &str, role: &str) -> Self {
        let view = MigrationView {
            vm: vm.to_owned(),
            role: role.to_owned(),
            began_at_ms: unix_ms(),
            ..MigrationView::default()
        };
        Self { view, ..Self::default() }
    }

    /// It is under way.
    pub fn is_open(&self) -> bool {
        !self.view.vm.is_empty() && self.view.ended_at_ms.is_none()
    }

    /// The destination has everything, and nobody has taken it back.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// The channel is there.
    pub fn connected(&mut self, id: u128, peer: &str) {
        self.view.id = format!("{id:032x}");
        self.view.peer = peer.to_owned();
    }

    /// The VM has stopped.
    pub fn stopped(&mut self, at: Instant) {
        self.stopped.get_or_insert(at);
    }

    /// QEMU waits.
    pub fn held(&mut self) {
        self.held = Some(Instant::now());
    }

    /// It waits no longer.
    pub fn released(&mut self) {
        if let Some(since) = self.held.take() {
            self.view.hold_ms = Some(ms(since));
        }
    }

    fn round(&mut self, round: RoundView) {
        if self.view.rounds.len() >= MAX_ROUNDS {
            self.view.rounds.remove(0);
        }
        self.view.rounds.push(round);
    }

    fn acked(&mut self, ack: &Ack) {
        self.view.connections = u64::from(ack.entries);
        self.view.refused_connections = ack.refused;
        self.view.dropped_connections = ack.dropped;
    }

    fn committed(&mut self, ack: &Ack) {
        self.acked(ack);
        self.committed = true;
        if let Some(since) = self.stopped {
            self.view.final_delta_ms.get_or_insert(ms(since));
        }
        self.view.text = format!("the destination has all {} connections", ack.entries);
    }

    fn activated(&mut self, began: Began) {
        self.activated = true;
        "migrated".clone_into(&mut self.view.outcome);
        self.view.began = Some(began_name(began).to_owned());
        self.view.text = match began {
            Began::Complete => "the VM runs at the destination with all its connections".into(),
            Began::Lagging => "the VM runs at the destination with all its connections, some with older windows".into(),
            Began::Partial => "the VM runs at the destination with the connections of the last round".into(),
            Began::Empty => "the VM runs at the destination without its connections".into(),
            Began::Unconfirmed => "the VM runs at the destination with all connections that the source had sent".into(),
        };
    }

    fn resumed(&mut self) {
        self.committed = false;
        self.stopped = None;
        self.view.final_delta_ms = None;
        self.view.text = "the VM runs on at the source".into();
    }

    /// What the source reports.
    pub fn source(&mut self, report: &source::Report, state: source::State) {
        use source::Report;
        match report {
            Report::Attempt(n) => {
                self.view.attempt = *n;
                self.view.rounds.clear();
                self.failure = None;
                self.view.text = format!("setting up the channel, attempt {n}");
            }
            Report::Accepted(_) => self.view.text = "the destination goes along".into(),
            Report::Refused(refuse) => {
                self.refused = true;
                self.view.text = format!("refused: {}", refuse.note);
            }
            Report::Round(r) => self.round(RoundView {
                round: r.round,
                last: r.last,
                entries: r.changed + r.deleted + r.lagging,
                changed: r.changed,
                deleted: r.deleted,
                lagging: r.lagging,
                held_back: r.held,
                bytes: r.bytes,
                duration_ms: r.duration_ms,
            }),
            Report::Committed { ack, .. } => self.committed(ack),
            Report::Resumed => self.resumed(),
            Report::Failed(failure) => {
                self.failure = Some(*failure);
                if *failure != Failure::Refused && self.view.text.is_empty() {
                    self.view.text = failure.to_string();
                } else if *failure != Failure::Refused {
                    self.view.text = format!("{failure}: {}", self.view.text);
                }
            }
            Report::Activated(began) => self.activated(*began),
        }
        self.view.state = source_state(state).to_owned();
    }

    /// What the destination reports.
    pub fn destination(&mut self, report: &destination::Report, state: destination::State) {
        use destination::Report;
        match report {
            Report::Refused(refuse) => {
                self.refused = true;
                self.view.text = format!("refused: {}", refuse.note);
            }
            Report::Accepted => self.view.text = "accepted".into(),
            Report::Round(ack) => {
                self.acked(ack);
                self.round(RoundView { round: ack.round, entries: u64::from(ack.entries), ..RoundView::default() });
            }
            Report::Committed(ack) => {
                self.committed(ack);
                let entries = u64::from(ack.entries);
                self.round(RoundView { round: ack.round, last: true, entries, ..RoundView::default() });
            }
            Report::Resumed => self.resumed(),
            Report::Dropped(reason) => self.view.text = format!("given up: {reason:?}"),
            Report::Activated(began) => self.activated(*began),
        }
        self.view.state = destination_state(state).to_owned();
    }

    /// The state has changed without a report.
    pub fn set_source_state(&mut self, state: source::State) {
        self.view.state = source_state(state).to_owned();
    }

    /// As above.
    pub fn set_destination_state(&mut self, state: destination::State) {
        self.view.state = destination_state(state).to_owned();
    }

    /// It is over. `gone`: the VM has left this host.
    pub fn end(&mut self, gone: bool) {
        self.released();
        self.view.ended_at_ms = Some(unix_ms());
        if self.view.role == "source" && !gone && !self.activated {
            // Whatever it was at: the VM stays.
            self.set_source_state(source::State::Active);
        }
        self.view.estimate = None;
        self.view.outcome = if self.activated || (self.committed && gone) {
            "migrated"
        } else if self.refused {
            "refused"
        } else if self.failure == Some(Failure::Cancelled) || (self.view.role == "destination" && !gone) {
            "cancelled"
        } else {
            "failed"
        }
        .to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migrate::rounds::RoundReport;
    use ferry_migrate::source::Report;

    fn ack(entries: u32) -> Ack {
        Ack { round: 2, digest: 1, entries, refused: 3, dropped: 4 }
    }

    #[test]
    fn a_migration_that_went_well() {
        let mut r = Record::begin("vm1", "source");
        r.connected(0xab, "host-b");
        r.source(&Report::Attempt(1), source::State::Active);
        let round = RoundReport { round: 0, changed: 10, deleted: 1, lagging: 2, bytes: 99, ..RoundReport::default() };
        r.source(&Report::Round(round), source::State::PreCopy);
        r.stopped(Instant::now());
        r.held();
        r.source(&Report::Committed { ack: ack(10), hold_ms: 1 }, source::State::Redirecting);
        r.released();
        assert!(r.is_open() && r.is_committed());
        r.source(&Report::Activated(Began::Complete), source::State::Redirecting);
        r.end(true);
        let v = &r.view;
        assert_eq!((v.outcome.as_str(), v.rounds[0].entries, v.connections), ("migrated", 13, 10));
        assert_eq!((v.began.as_deref(), v.refused_connections), (Some("complete"), 3));
        assert!(v.final_delta_ms.is_some() && v.hold_ms.is_some() && !r.is_open());
        assert_eq!(v.id, "000000000000000000000000000000ab");
    }

    #[test]
    fn how_it_can_end_otherwise() {
        let end = |reports: &[Report], gone| {
            let mut r = Record::begin("vm1", "source");
            reports.iter().for_each(|report| r.source(report, source::State::Active));
            r.end(gone);
            r.view.outcome
        };
        let committed = || Report::Committed { ack: ack(1), hold_ms: 0 };
        assert_eq!(end(&[Report::Failed(Failure::Cancelled)], false), "cancelled");
        assert_eq!(end(&[Report::Failed(Failure::Channel)], false), "failed");
        assert_eq!(end(&[committed()], true), "migrated");
        assert_eq!(end(&[committed(), Report::Resumed, Report::Failed(Failure::Cancelled)], false), "cancelled");
    }
}
