//! The source's side of a VM's migration.
//!
//! ```text
//!            LogOn, Connect ... Accept            Stopped                 FinalAck
//!  Active ───────────────────────────> PreCopy ───────────> Frozen ───────────────────> Redirecting ──> Gone
//!    ^ <──── LogOff, attempts used up ───┘ ^ <───── Kick ──────┘ <──────── Kick ────────────┘
//! ```
//!
//! The source's table is only read. So whatever happens, going back means to stop reading.
//!
//! - The reply that QEMU waits for ([`Event::ReplyHeld`]) is released by [`Action::Release`], at the commit, at
//!   [`SourceLimits::hold_limit_ms`], or when no commit can come any more, whichever is first; exactly once for each time it is held.
//! - A commit that is taken back ([`Event::Kick`]) may leave a destination that has not heard of it, if the channel broke in this moment. So
//!   a later stop is not let go uncommitted within [`SourceLimits::fence_ms`]: after that the destination knows that it knows nothing.
//! - Past the limit the final delta goes on: if it is committed before the VM starts at the destination, the VM starts with everything.
//! - A channel that is lost while the VM runs is set up again, [`SourceLimits::attempts`] times, and the migration begins anew.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use crate::batch::{BATCH_BYTES, Batch, CONNECTION_BYTES};
use crate::message::{
    Abilities, AbortReason, Ack, Agreed, Began, HelloReply, Mark, Message, Name, Note, Offer, Refuse, capability,
};
use crate::rounds::{Estimate, RoundLimits, RoundReport, Rounds};
use crate::table::SourceTable;

/// How often the table's deletions are collected, milliseconds.
const DRAIN_INTERVAL_MS: u64 = 4;

/// The source's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// Longest that QEMU's GET_VRING_BASE is held for the final delta, milliseconds.
    pub hold_limit_ms: u64,
    /// For so long after the VM ran on here, or this machine began, a reply is released for failure only at its end, milliseconds; at most
    /// [`Self::hold_limit_ms`]. More than the destination's
    /// [`confirmed_ms`](crate::destination::DestinationLimits::confirmed_ms) by the time that a message may take.
    pub fence_ms: u64,
    /// From so long after the VM's stop on, no more lagging entries are sent, milliseconds; less than [`Self::hold_limit_ms`].
    pub final_lagging_ms: u64,
    /// For the channel to come up, milliseconds.
    pub connect_timeout_ms: u64,
    /// For an answer of the destination's, milliseconds.
    pub reply_timeout_ms: u64,
    /// Between questions whether the other is there, milliseconds.
    pub ping_interval_ms: u64,
    /// The other is taken for gone when it was silent for so long, milliseconds.
    pub silence_timeout_ms: u64,
    /// How often the channel is set up for one migration of QEMU's.
    pub attempts: u32,
    /// Between attempts, milliseconds.
    pub retry_delay_ms: u64,
    /// A round begins so long after the last one though QEMU has begun none, milliseconds.
    pub round_interval_ms: u64,
    /// Slots looked at per [`Event::Tick`]: bounds the time that it takes.
    pub step_entries: usize,
    /// Bytes sent per millisecond while the VM runs. The final delta is not bounded.
    pub bytes_per_ms: u64,
    /// Late frames are redirected for so long after the commit, milliseconds.
    pub redirect_ms: u64,
    /// Most bytes of late frames.
    pub redirect_bytes: u64,
    /// How long after the VM's stop without commit the final delta is still tried, milliseconds.
    pub linger_ms: u64,
    /// Rounds reported by [`Source::history`].
    pub history: usize,
    /// The rounds' bounds.
    pub rounds: RoundLimits,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            hold_limit_ms: 50,
            fence_ms: 45,
            final_lagging_ms: 20,
            connect_timeout_ms: 5000,
            reply_timeout_ms: 10_000,
            ping_interval_ms: 1000,
            silence_timeout_ms: 5000,
            attempts: 3,
            retry_delay_ms: 500,
            round_interval_ms: 1000,
            step_entries: 16_384,
            bytes_per_ms: 125_000,
            redirect_ms: 5000,
            redirect_bytes: 16 << 20,
            linger_ms: 10_000,
            history: 256,
            rounds: RoundLimits::default(),
        }
    }
}

/// What the source is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// QEMU has switched the dirty log on: a migration begins (SET_LOG_BASE and VHOST_F_LOG_ALL).
    LogOn,
    /// QEMU has switched it off: cancelled or failed.
    LogOff,
    /// QEMU has begun another round of memory.
    MemoryRound,
    /// The VM has stopped: the first of its rings has (GET_VRING_BASE).
    Stopped,
    /// The reply to its last ring's GET_VRING_BASE waits for [`Action::Release`].
    ReplyHeld,
    /// A ring was started: the VM runs.
    Kick,
    /// QEMU has closed the connection of the VM's ports.
    QemuGone,
    /// [`Action::Track`] has been done, and every PMD thread knows.
    Tracking,
    /// Both connections are up.
    Connected,
    /// One of them is lost, or did not come up.
    Disconnected,
    /// From the destination.
    Message(Message),
    /// A frame for the VM, which is gone.
    LateFrame(Vec<u8>),
    /// An operator wants the migration of connections given up; QEMU's own goes on.
    Cancel,
    /// Time has passed, or the bulk connection takes more.
    Tick {
        /// Bytes that the bulk connection takes now without waiting.
        room_bytes: usize,
    },
}

/// Why the reply to GET_VRING_BASE is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Release {
    /// The destination has everything.
    Committed,
    /// It has not said so in time.
    Expired,
    /// It cannot any more.
    Failed,
    /// No migration.
    Unrelated,
}

/// What the source wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Switch the table's tracking on ([`ferry_dataplane::conntrack::ConnMap::set_tracking`]), let every PMD thread pass a quiescent
    /// state, then tell [`Event::Tracking`]; or switch it off.
    Track(bool),
    /// Set up the channel, with a new migration id; then [`Event::Connected`] or [`Event::Disconnected`].
    Connect,
    /// Close the channel, after what was sent has gone out. Nothing of it is to be told any more.
    Disconnect,
    /// Send on the control connection.
    Send(Message),
    /// Send on the bulk connection.
    SendBatch(Batch),
    /// Send on the bulk connection, behind the batches.
    SendLate(Vec<u8>),
    /// Let the reply to GET_VRING_BASE go.
    Release(Release),
    /// From now on, hand in frames for the VM as [`Event::LateFrame`]; or no more.
    Redirect(bool),
    /// The VM is gone for good: its connections are to be dropped.
    Forget,
    /// For the history, metrics and audit.
    Report(Report),
}

/// What happened, for people.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// An attempt begins.
    Attempt(u32),
    /// The destination goes along.
    Accepted(Agreed),
    /// It does not.
    Refused(Refuse),
    /// A round has ended.
    Round(RoundReport),
    /// The destination has everything. `hold_ms`: how long the reply was held.
    Committed {
        /// What the destination has.
        ack: Ack,
        /// How long the reply was held so far, milliseconds.
        hold_ms: u64,
    },
    /// The VM runs on here after its stop.
    Resumed,
    /// An attempt has failed.
    Failed(Failure),
    /// The VM runs at the destination.
    Activated(Began),
}

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Failure {
    /// The channel was lost or did not come up.
    #[error("the channel was lost, or did not come up")]
    Channel,
    /// The destination did not answer in time.
    #[error("the destination did not answer in time")]
    Timeout,
    /// The destination refused.
    #[error("the destination refused")]
    Refused,
    /// The destination gave up.
    #[error("the destination gave up")]
    Aborted,
    /// The destination did what the protocol does not allow, or has another digest.
    #[error("the destination broke the protocol")]
    Protocol,
    /// QEMU cancelled, or an operator.
    #[error("cancelled")]
    Cancelled,
    /// QEMU is gone.
    #[error("QEMU is gone")]
    VmGone,
}

/// Where the source is, in the words of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The VM runs here; nothing migrates, or nothing yet.
    Active,
    /// The VM runs here, its connections are being copied.
    PreCopy,
    /// The VM has stopped; the destination has not committed.
    Frozen,
    /// The destination has committed; late frames go there.
    Redirecting,
    /// The VM is not here any more.
    Gone,
}

/// Where the channel is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// No migration, or attempts used up.
    Idle,
    /// Until the next attempt.
    Waiting {
        until_ms: u64,
    },
    Connecting {
        until_ms: u64,
    },
    Greeting {
        until_ms: u64,
    },
    Offering {
        agreed: Agreed,
        until_ms: u64,
    },
    /// Until the table tracks.
    Preparing {
        agreed: Agreed,
        until_ms: u64,
    },
    /// A round runs, or none.
    Copying {
        agreed: Agreed,
    },
    /// A round's end has been said.
    Acking {
        agreed: Agreed,
        mark: Mark,
        until_ms: u64,
    },
    /// The final delta's end has been said.
    Ending {
        agreed: Agreed,
        mark: Mark,
        until_ms: u64,
    },
    /// The destination has everything.
    Committed {
        agreed: Agreed,
    },
}

/// Where the VM is, as QEMU tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Running,
    Stopped {
        since_ms: u64,
    },
    /// QEMU is gone; the VM had stopped before, at this time.
    Gone {
        since_ms: u64,
    },
}

/// Who is asked for, and by whom.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceIdentity {
    /// This host's name for itself.
    pub host: Name,
    /// What this host can do.
    pub abilities: Abilities,
    /// The VM; the counts are filled in.
    pub vm: Offer,
}

/// The source of a VM's migrations, one after the other.
pub struct Source<T> {
    limits: SourceLimits,
    identity: SourceIdentity,
    table: T,
    guest: Guest,
    /// The reply waits since.
    held_ms: Option<u64>,
    /// No release for failure before; `None`: no event so far.
    fence_until_ms: Option<u64>,
    /// A release for failure waits for that.
    failed: bool,
    logging: bool,
    phase: Phase,
    tracking: bool,
    attempts: u32,
    rounds: Rounds,
    /// Memory rounds that no round of ours has followed yet.
    memory_round: bool,
    round_ended_ms: u64,
    final_begun: bool,
    activated: bool,
    /// There is nothing to be forgotten of a VM that is gone.
    forgotten: bool,
    redirect_until_ms: Option<u64>,
    redirected_bytes: u64,
    /// Bytes that may be sent.
    tokens: u64,
    tokens_ms: u64,
    ticked_ms: u64,
    /// The bulk connection took no more at the last tick.
    full: bool,
    heard_ms: u64,
    pinged_ms: u64,
    nonce: u64,
    history: Vec<RoundReport>,
}

impl<T: SourceTable> Source<T> {
    /// A VM that runs here and does not migrate.
    pub fn new(limits: SourceLimits, identity: SourceIdentity, table: T) -> Self {
        Self {
            rounds: Rounds::new(limits.rounds),
            limits,
            identity,
            table,
            guest: Guest::Running,
            held_ms: None,
            fence_until_ms: None,
            failed: false,
            logging: false,
            phase: Phase::Idle,
            tracking: false,
            attempts: 0,
            memory_round: false,
            round_ended_ms: 0,
            final_begun: false,
            activated: false,
            forgotten: false,
            redirect_until_ms: None,
            redirected_bytes: 0,
            tokens: 0,
            tokens_ms: 0,
            ticked_ms: 0,
            full: false,
            heard_ms: 0,
            pinged_ms: 0,
            nonce: 0,
            history: Vec::new(),
        }
    }

    /// Other bounds, and what the VM is now. To be called while nothing migrates.
    pub fn reconfigure(&mut self, limits: SourceLimits, identity: SourceIdentity) {
        debug_assert!(!self.is_migrating());
        self.rounds = Rounds::new(limits.rounds);
        self.limits = limits;
        self.identity = identity;
    }

    /// The final delta's end, or more, has been said, or is being prepared.
    pub fn is_final(&self) -> bool {
        self.final_begun
    }

    /// Where it is.
    pub fn state(&self) -> State {
        match (self.guest, self.phase) {
            (Guest::Running, Phase::Copying { .. } | Phase::Acking { .. }) => State::PreCopy,
            (Guest::Running, _) => State::Active,
            (_, Phase::Committed { .. }) => State::Redirecting,
            (_, _) if self.redirect_until_ms.is_some() => State::Redirecting,
            (Guest::Stopped { .. }, _) => State::Frozen,
            (Guest::Gone { .. }, Phase::Idle) => State::Gone,
            (Guest::Gone { .. }, _) => State::Frozen,
        }
    }

    /// The reply to GET_VRING_BASE waits.
    pub fn is_holding(&self) -> bool {
        self.held_ms.is_some()
    }

    /// Something migrates, or is tried again.
    pub fn is_migrating(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// The rounds that have ended, in order; the latest [`SourceLimits::history`].
    pub fn history(&self) -> &[RoundReport] {
        &self.history
    }

    /// How far it is; looks at the table's bitmaps.
    pub fn estimate(&self) -> Estimate {
        self.rounds.estimate(&self.table)
    }

    /// Bytes of memory that grow with what happens, the table's own left out.
    pub fn memory_bytes(&self) -> usize {
        self.rounds.memory_bytes() + self.history.len() * size_of::<RoundReport>()
    }

    /// When [`Event::Tick`] is wanted at the latest, on the clock of `now_ms`; `None`: not at all. To be asked again after every event.
    /// While the VM waits for its final delta that is at once, and as soon as a full bulk connection takes more.
    pub fn next_tick_ms(&self, now_ms: u64) -> Option<u64> {
        let phase = match self.phase {
            Phase::Idle | Phase::Committed { .. } => None,
            // The VM waits: on with it, unless the connection is full.
            Phase::Copying { .. } if self.rounds.is_running() && self.final_begun && !self.full => Some(now_ms),
            Phase::Copying { .. } if self.rounds.is_running() => Some(self.ticked_ms + 1),
            Phase::Copying { .. } if self.memory_round => Some(now_ms),
            Phase::Copying { .. } => Some(self.round_ended_ms + self.limits.round_interval_ms),
            Phase::Waiting { until_ms }
            | Phase::Connecting { until_ms }
            | Phase::Greeting { until_ms }
            | Phase::Offering { until_ms, .. }
            | Phase::Preparing { until_ms, .. }
            | Phase::Acking { until_ms, .. }
            | Phase::Ending { until_ms, .. } => Some(until_ms),
        };
        let hold = self.held_ms.map(|since_ms| {
            let limit_ms = since_ms + self.limits.hold_limit_ms;
            self.fence_until_ms.filter(|_| self.failed).map_or(limit_ms, |until_ms| until_ms.min(limit_ms))
        });
        let linger = match self.guest {
            Guest::Stopped { since_ms } | Guest::Gone { since_ms } if self.is_migrating() && !self.is_committed() => {
                Some(since_ms + self.limits.linger_ms)
            }
            _ => None,
        };
        // Deletions are drained all the time.
        let drain = self.tracking.then_some(self.ticked_ms + DRAIN_INTERVAL_MS);
        let alive = self.is_talking().then_some(
            (self.pinged_ms + self.limits.ping_interval_ms).min(self.heard_ms + self.limits.silence_timeout_ms),
        );
        let due = [phase, hold, linger, drain, alive, self.redirect_until_ms];
        due.into_iter().flatten().min().map(|at_ms| at_ms.max(now_ms))
    }

    /// Takes note of an event; what is to be done is added to `out`, in order.
    pub fn handle(&mut self, event: Event, now_ms: u64, out: &mut Vec<Action>) {
        // A switch that was restarted does not know what its predecessor took back.
        self.fence_until_ms.get_or_insert(now_ms + self.limits.fence_ms);
        match event {
            Event::LogOn => self.log_on(now_ms, out),
            Event::LogOff => {
                self.logging = false;
                self.memory_round = false;
                if self.is_migrating() {
                    self.give_up(AbortReason::Cancelled, Failure::Cancelled, now_ms, out);
                }
            }
            Event::Cancel => {
                if self.is_migrating() {
                    self.give_up(AbortReason::Operator, Failure::Cancelled, now_ms, out);
                }
            }
            Event::MemoryRound => self.memory_round = true,
            Event::Stopped => self.stopped(now_ms, out),
            Event::ReplyHeld => self.reply_held(now_ms, out),
            Event::Kick => self.kick(now_ms, out),
            Event::QemuGone => self.qemu_gone(now_ms, out),
            Event::Tracking => {
                if let Phase::Preparing { agreed, .. } = self.phase {
                    self.begin_copying(agreed, now_ms, out);
                }
            }
            Event::Connected => {
                if let Phase::Connecting { .. } = self.phase {
                    self.heard_ms = now_ms;
                    self.pinged_ms = now_ms;
                    self.phase = Phase::Greeting { until_ms: now_ms + self.limits.reply_timeout_ms };
                    let hello = self.identity.abilities.hello(self.identity.host.clone());
                    out.push(Action::Send(Message::Hello(hello)));
                } else {
                    out.push(Action::Disconnect);
                }
            }
            Event::Disconnected => {
                if !matches!(self.phase, Phase::Idle | Phase::Waiting { .. }) {
                    self.lost(Failure::Channel, now_ms, out);
                }
            }
            Event::Message(message) => {
                if self.is_talking() {
                    self.heard_ms = now_ms;
                    self.message(message, now_ms, out);
                }
            }
            Event::LateFrame(frame) => self.late_frame(frame, out),
            Event::Tick { room_bytes } => self.tick(room_bytes, now_ms, out),
        }
    }

    fn is_talking(&self) -> bool {
        !matches!(self.phase, Phase::Idle | Phase::Waiting { .. } | Phase::Connecting { .. })
    }

    // ---- what QEMU tells

    fn log_on(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.logging, true) || self.is_migrating() {
            // The log was moved.
            return;
        }
        if self.guest != Guest::Running {
            return;
        }
        self.attempts = 0;
        self.history.clear();
        self.activated = false;
        self.connect(now_ms, out);
    }

    fn connect(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.attempts += 1;
        self.phase = Phase::Connecting { until_ms: now_ms + self.limits.connect_timeout_ms };
        out.push(Action::Report(Report::Attempt(self.attempts)));
        out.push(Action::Connect);
    }

    fn stopped(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.guest != Guest::Running {
            return;
        }
        self.guest = Guest::Stopped { since_ms: now_ms };
        match self.phase {
            Phase::Copying { agreed } | Phase::Acking { agreed, .. } => self.begin_final(agreed, now_ms, out),
            // No time for another attempt.
            Phase::Waiting { .. } => self.phase = Phase::Idle,
            _ => {}
        }
    }

    fn reply_held(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.held_ms = Some(now_ms);
        match self.phase {
            Phase::Committed { .. } => self.release(Release::Committed, out),
            Phase::Idle if self.logging => self.release_failed(now_ms, out),
            Phase::Idle => self.release(Release::Unrelated, out),
            _ => {}
        }
    }

    fn release_failed(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.fence_until_ms.is_some_and(|until_ms| now_ms < until_ms) {
            self.failed = self.held_ms.is_some();
        } else {
            self.release(Release::Failed, out);
        }
    }

    fn release(&mut self, why: Release, out: &mut Vec<Action>) {
        self.failed = false;
        if self.held_ms.take().is_some() {
            out.push(Action::Release(why));
        }
    }

    fn kick(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let before = std::mem::replace(&mut self.guest, Guest::Running);
        if before == Guest::Running {
            return;
        }
        self.fence_until_ms = Some(now_ms + self.limits.fence_ms);
        // Nobody waits for a reply any more, if anybody did.
        self.release(Release::Unrelated, out);
        self.end_redirect(out);
        if let Guest::Gone { .. } = before {
            // Another QEMU: the VM has come back, or is another one.
            self.forgotten = false;
            if self.is_talking() {
                out.push(Action::Send(Message::Bye));
            }
            self.end_attempt(None, out);
            return;
        }
        out.push(Action::Report(Report::Resumed));
        let agreed = match self.phase {
            Phase::Copying { agreed } | Phase::Ending { agreed, .. } | Phase::Committed { agreed }
                if self.final_begun =>
            {
                agreed
            }
            _ if self.logging && self.phase == Phase::Idle => {
                // It was given up because the VM stopped.
                self.retry(now_ms, out);
                return;
            }
            _ => return,
        };
        self.final_begun = false;
        if agreed.capabilities & capability::RESUME == 0 || self.activated {
            self.send_abort(AbortReason::Cancelled, "the VM runs on", out);
            self.end_attempt(Some(Failure::Cancelled), out);
            self.retry(now_ms, out);
            return;
        }
        out.push(Action::Send(Message::Resume));
        self.phase = Phase::Copying { agreed };
        self.begin_round(now_ms, out);
    }

    fn qemu_gone(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.held_ms = None;
        let logging = std::mem::take(&mut self.logging);
        let since_ms = match self.guest {
            Guest::Running => {
                self.guest = Guest::Gone { since_ms: now_ms };
                self.forgotten = true;
                if self.is_migrating() {
                    self.give_up(AbortReason::VmGone, Failure::VmGone, now_ms, out);
                }
                return;
            }
            Guest::Stopped { since_ms } => since_ms,
            Guest::Gone { .. } => return,
        };
        self.guest = Guest::Gone { since_ms };
        // Moved away, as far as anybody can tell here; or it ended as any VM does. QEMU leaves when the VM runs elsewhere: what was not
        // committed by now is of no use. No word of it to the destination, which makes the best of what it has.
        self.forgotten = !logging;
        if self.is_committed() || !self.is_migrating() {
            self.forget(out);
        } else {
            self.end_attempt(Some(Failure::VmGone), out);
        }
    }

    fn is_committed(&self) -> bool {
        matches!(self.phase, Phase::Committed { .. })
    }

    /// Of a VM that has moved away nothing is kept.
    fn forget(&mut self, out: &mut Vec<Action>) {
        if matches!(self.guest, Guest::Gone { .. }) && !std::mem::replace(&mut self.forgotten, true) {
            out.push(Action::Forget);
        }
    }

    // ---- ends of an attempt

    /// Ends the attempt, and tries again or not.
    fn lost(&mut self, failure: Failure, now_ms: u64, out: &mut Vec<Action>) {
        let committed = self.is_committed();
        self.end_attempt(Some(failure), out);
        if !committed {
            self.retry(now_ms, out);
        }
    }

    fn retry(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.guest == Guest::Running && self.logging && self.attempts < self.limits.attempts {
            self.phase = Phase::Waiting { until_ms: now_ms + self.limits.retry_delay_ms };
        } else {
            self.release_failed(now_ms, out);
        }
    }

    /// Ends the attempt and tells the destination.
    fn give_up(&mut self, reason: AbortReason, failure: Failure, now_ms: u64, out: &mut Vec<Action>) {
        self.send_abort(reason, "", out);
        self.end_attempt(Some(failure), out);
        self.release_failed(now_ms, out);
    }

    fn send_abort(&self, reason: AbortReason, note: &str, out: &mut Vec<Action>) {
        if self.is_talking() {
            out.push(Action::Send(Message::Abort { reason, note: Note::lossy(note) }));
        }
    }

    /// As if there had been no attempt. `failure`: none if all went as it should.
    fn end_attempt(&mut self, failure: Option<Failure>, out: &mut Vec<Action>) {
        let phase = std::mem::replace(&mut self.phase, Phase::Idle);
        if !matches!(phase, Phase::Idle | Phase::Waiting { .. }) {
            out.push(Action::Disconnect);
        }
        if phase != Phase::Idle
            && let Some(failure) = failure
        {
            out.push(Action::Report(Report::Failed(failure)));
        }
        self.track(false, out);
        self.rounds = Rounds::new(self.limits.rounds);
        self.final_begun = false;
        self.end_redirect(out);
        self.forget(out);
    }

    fn track(&mut self, on: bool, out: &mut Vec<Action>) {
        if on || self.tracking {
            self.tracking = on;
            out.push(Action::Track(on));
        }
    }

    fn end_redirect(&mut self, out: &mut Vec<Action>) {
        if self.redirect_until_ms.take().is_some() {
            out.push(Action::Redirect(false));
        }
    }

    // ---- what the destination says

    fn message(&mut self, message: Message, now_ms: u64, out: &mut Vec<Action>) {
        let until_ms = now_ms + self.limits.reply_timeout_ms;
        match (message, self.phase) {
            (Message::Ping { nonce }, _) => out.push(Action::Send(Message::Pong { nonce })),
            (Message::Pong { .. }, _) => {}
            (Message::HelloReply(reply), Phase::Greeting { .. }) => self.greeted(&reply, now_ms, until_ms, out),
            (Message::Refuse(refuse), Phase::Greeting { .. } | Phase::Offering { .. }) => {
                out.push(Action::Report(Report::Refused(refuse)));
                // It would say the same again.
                self.attempts = self.limits.attempts;
                self.lost(Failure::Refused, now_ms, out);
            }
            (Message::Accept { .. }, Phase::Offering { agreed, .. }) => {
                out.push(Action::Report(Report::Accepted(agreed)));
                self.phase = Phase::Preparing { agreed, until_ms };
                self.rounds = Rounds::new(self.limits.rounds);
                self.final_begun = false;
                self.track(true, out);
            }
            (Message::RoundAck(ack), Phase::Acking { agreed, mark, .. }) if ack.round == mark.round => {
                if ack.digest != mark.digest {
                    self.broken(AbortReason::Digest, now_ms, out);
                    return;
                }
                self.round_done(now_ms, out);
                self.phase = Phase::Copying { agreed };
                self.round_ended_ms = now_ms;
            }
            (Message::FinalAck(ack), Phase::Ending { agreed, mark, .. }) if ack.round == mark.round => {
                if ack.digest != mark.digest {
                    self.broken(AbortReason::Digest, now_ms, out);
                    return;
                }
                self.committed(agreed, ack, now_ms, out);
            }
            // Of a round that the VM's stop, or its running on, has overtaken.
            (
                Message::RoundAck(ack) | Message::FinalAck(ack),
                Phase::Copying { .. } | Phase::Acking { .. } | Phase::Ending { .. },
            ) if ack.round <= self.rounds.round() => {}
            (Message::Activated { began }, Phase::Copying { .. } | Phase::Ending { .. } | Phase::Committed { .. })
                if self.guest != Guest::Running =>
            {
                self.activated(began, now_ms, out);
            }
            // What cannot be used any more; a destination that has just begun may cross with a VM that runs on here.
            (Message::Abort { .. } | Message::Activated { .. }, _) => self.lost(Failure::Aborted, now_ms, out),
            _ => self.broken(AbortReason::Protocol, now_ms, out),
        }
    }

    fn broken(&mut self, reason: AbortReason, now_ms: u64, out: &mut Vec<Action>) {
        self.send_abort(reason, "", out);
        self.lost(Failure::Protocol, now_ms, out);
    }

    fn greeted(&mut self, reply: &HelloReply, now_ms: u64, until_ms: u64, out: &mut Vec<Action>) {
        match self.identity.abilities.check_reply(reply) {
            Ok(agreed) => {
                let mut offer = self.identity.vm.clone();
                offer.capacity = self.table.capacity();
                offer.entries = self.table.len().try_into().unwrap_or(u32::MAX);
                out.push(Action::Send(Message::Offer(offer)));
                self.phase = Phase::Offering { agreed, until_ms };
            }
            Err(mismatch) => {
                self.attempts = self.limits.attempts;
                self.send_abort(AbortReason::Protocol, &mismatch.to_string(), out);
                self.end_attempt(Some(Failure::Protocol), out);
                self.release_failed(now_ms, out);
            }
        }
    }

    // ---- rounds

    fn begin_copying(&mut self, agreed: Agreed, now_ms: u64, out: &mut Vec<Action>) {
        self.phase = Phase::Copying { agreed };
        self.tokens = 0;
        self.tokens_ms = now_ms;
        if self.guest == Guest::Running {
            self.begin_round(now_ms, out);
        } else {
            // It has stopped meanwhile: all at once.
            self.begin_final(agreed, now_ms, out);
        }
    }

    fn begin_round(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.memory_round = false;
        self.rounds.begin(false, now_ms);
        out.push(Action::Send(Message::RoundBegin { round: self.rounds.round() }));
    }

    fn begin_final(&mut self, agreed: Agreed, now_ms: u64, out: &mut Vec<Action>) {
        self.final_begun = true;
        self.full = false;
        self.phase = Phase::Copying { agreed };
        self.rounds.begin(true, now_ms);
        out.push(Action::Send(Message::FinalBegin { round: self.rounds.round() }));
    }

    fn round_done(&mut self, now_ms: u64, out: &mut Vec<Action>) -> RoundReport {
        let report = self.rounds.acknowledged(now_ms);
        if self.history.len() >= self.limits.history && !self.history.is_empty() {
            self.history.remove(0);
        }
        if self.limits.history > 0 {
            self.history.push(report);
        }
        out.push(Action::Report(Report::Round(report)));
        report
    }

    fn committed(&mut self, agreed: Agreed, ack: Ack, now_ms: u64, out: &mut Vec<Action>) {
        self.round_done(now_ms, out);
        let hold_ms = self.held_ms.map_or(0, |since_ms| now_ms.saturating_sub(since_ms));
        self.phase = Phase::Committed { agreed };
        out.push(Action::Report(Report::Committed { ack, hold_ms }));
        self.release(Release::Committed, out);
        self.begin_redirect(agreed, now_ms, out);
        self.forget(out);
    }

    fn activated(&mut self, began: Began, now_ms: u64, out: &mut Vec<Action>) {
        self.activated = true;
        out.push(Action::Report(Report::Activated(began)));
        match self.phase {
            Phase::Committed { .. } => {}
            Phase::Copying { agreed } | Phase::Ending { agreed, .. } => {
                // Nothing that is sent now is of use.
                self.phase = Phase::Committed { agreed };
                self.release_failed(now_ms, out);
                self.begin_redirect(agreed, now_ms, out);
                self.forget(out);
            }
            _ => {}
        }
        self.track(false, out);
    }

    // ---- late frames

    fn begin_redirect(&mut self, agreed: Agreed, now_ms: u64, out: &mut Vec<Action>) {
        self.redirect_until_ms = Some(now_ms + self.limits.redirect_ms);
        self.redirected_bytes = 0;
        if agreed.capabilities & capability::LATE_FRAMES != 0 {
            out.push(Action::Redirect(true));
        }
    }

    fn late_frame(&mut self, frame: Vec<u8>, out: &mut Vec<Action>) {
        let Phase::Committed { agreed } = self.phase else { return };
        let bytes = self.redirected_bytes + frame.len() as u64;
        if self.redirect_until_ms.is_some()
            && self.guest != Guest::Running
            && agreed.capabilities & capability::LATE_FRAMES != 0
            && bytes <= self.limits.redirect_bytes
        {
            self.redirected_bytes = bytes;
            out.push(Action::SendLate(frame));
        }
    }

    // ---- time

    fn tick(&mut self, room_bytes: usize, now_ms: u64, out: &mut Vec<Action>) {
        self.ticked_ms = now_ms;
        if self.tracking && !matches!(self.phase, Phase::Preparing { .. }) {
            self.rounds.drain(&self.table);
        }
        if let Phase::Copying { agreed } = self.phase {
            self.copy(agreed, room_bytes, now_ms, out);
        }
        if self.held_ms.is_some_and(|since_ms| now_ms >= since_ms + self.limits.hold_limit_ms) {
            self.release(Release::Expired, out);
        } else if self.failed {
            self.release_failed(now_ms, out);
        }
        match self.phase {
            Phase::Waiting { until_ms } if now_ms >= until_ms => self.connect(now_ms, out),
            Phase::Connecting { until_ms }
            | Phase::Greeting { until_ms }
            | Phase::Offering { until_ms, .. }
            | Phase::Preparing { until_ms, .. }
            | Phase::Acking { until_ms, .. }
            | Phase::Ending { until_ms, .. }
                if now_ms >= until_ms =>
            {
                self.send_abort(AbortReason::Timeout, "no answer", out);
                self.lost(Failure::Timeout, now_ms, out);
            }
            _ => {}
        }
        if self.is_talking() {
            if now_ms >= self.heard_ms + self.limits.silence_timeout_ms {
                self.send_abort(AbortReason::Timeout, "silence", out);
                self.lost(Failure::Timeout, now_ms, out);
            } else if now_ms >= self.pinged_ms + self.limits.ping_interval_ms {
                self.pinged_ms = now_ms;
                self.nonce += 1;
                out.push(Action::Send(Message::Ping { nonce: self.nonce }));
            }
        }
        // Far too late for the final delta.
        if let Guest::Stopped { since_ms } | Guest::Gone { since_ms } = self.guest
            && self.is_migrating()
            && !self.is_committed()
            && now_ms >= since_ms + self.limits.linger_ms
        {
            self.give_up(AbortReason::Timeout, Failure::Timeout, now_ms, out);
        }
        self.tick_redirect(now_ms, out);
    }

    fn tick_redirect(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.redirect_until_ms.is_some_and(|until_ms| now_ms >= until_ms) {
            self.end_redirect(out);
        }
        // The channel stays open as long as the VM may run on here: it is what tells the destination.
        let moved = self.activated || matches!(self.guest, Guest::Gone { .. });
        if self.is_committed() && self.redirect_until_ms.is_none() && moved {
            out.push(Action::Send(Message::Bye));
            self.end_attempt(None, out);
        }
    }

    fn copy(&mut self, agreed: Agreed, room_bytes: usize, now_ms: u64, out: &mut Vec<Action>) {
        if !self.rounds.is_running() {
            let due = now_ms >= self.round_ended_ms + self.limits.round_interval_ms;
            if !(self.memory_round || due || self.rounds.is_pressed() || !self.rounds.is_complete()) {
                return;
            }
            self.begin_round(now_ms, out);
        }
        if let (true, Guest::Stopped { since_ms } | Guest::Gone { since_ms }) = (self.final_begun, self.guest)
            && now_ms >= since_ms + self.limits.final_lagging_ms
        {
            self.rounds.cut_lagging();
        }
        let per_ms = self.limits.bytes_per_ms;
        // A hundredth of a second's worth may be saved up, and at least a batch.
        let burst = (per_ms * 10).max((self.limits.rounds.batch_items.min(1024) * CONNECTION_BYTES * 2) as u64);
        let earned = now_ms.saturating_sub(self.tokens_ms).saturating_mul(per_ms);
        self.tokens = self.tokens.saturating_add(earned).min(burst);
        self.tokens_ms = now_ms;
        let mut room = room_bytes;
        if !self.final_begun {
            room = room.min(usize::try_from(self.tokens).unwrap_or(usize::MAX));
        }
        let batches = self.limits.step_entries.div_ceil(self.limits.rounds.batch_items.max(1)).max(1);
        for _ in 0..batches {
            if self.rounds.is_done() || room < BATCH_BYTES + CONNECTION_BYTES {
                break;
            }
            let batch = self.rounds.next_batch(&self.table, self.limits.step_entries / batches, room);
            // Nothing among these slots.
            let Some(batch) = batch else { continue };
            let bytes = batch.wire_bytes();
            room = room.saturating_sub(bytes);
            self.tokens = self.tokens.saturating_sub(bytes as u64);
            out.push(Action::SendBatch(batch));
        }
        self.full = room < BATCH_BYTES + CONNECTION_BYTES;
        if !self.rounds.is_done() {
            return;
        }
        let until_ms = now_ms + self.limits.reply_timeout_ms;
        let mark = self.rounds.end();
        if self.final_begun {
            let lagging = self.table.uncollected().lagging;
            out.push(Action::Send(Message::FinalEnd { mark, lagging }));
            self.phase = Phase::Ending { agreed, mark, until_ms };
        } else {
            out.push(Action::Send(Message::RoundEnd(mark)));
            self.phase = Phase::Acking { agreed, mark, until_ms };
        }
    }
}
