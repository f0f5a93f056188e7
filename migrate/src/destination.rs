//! The destination's side of a VM's migration.
//!
//! ```text
//!          Offer, Accept             FinalEnd, all there              Kick
//!  Empty ────────────────> Staging ──────────────────────> Committed ───────> Active
//!    ^ <───── Abort ───────── ┘ ^ <──────── Resume ──────────── ┘ │
//!    └ <──────────────────────────── Abort, time-out ──────────── ┘
//! ```
//!
//! - Connections are staged in a table of their own, which no packet sees before the commit. [`Action::Install`] puts it in place of the VM's.
//! - The first KICK activates, whatever has arrived ([`Began`]): everything, if the source's final delta was acknowledged; else, by
//!   [`WhenLate`], what is staged if it is usable, or nothing. *Usable*: a whole round has arrived and been checked, so that no connection is
//!   missing that existed then; what came after it is newer.
//! - A channel that is lost before the commit leaves a usable table for [`DestinationLimits::orphan_timeout_ms`], since QEMU's migration may
//!   end all the same. A committed one stays for [`DestinationLimits::commit_timeout_ms`]. Then its memory is freed.
//! - A commit stands for the VM's last stop only as long as the source does not take it back. If the channel is lost without a word, that
//!   may have happened unheard. So a destination that has committed asks the source every [`DestinationLimits::confirm_interval_ms`], and the
//!   commit counts as *confirmed* for [`DestinationLimits::confirmed_ms`] after a question that was answered was sent. A source that takes a
//!   commit back lets no later stop go uncommitted for longer than that ([`crate::source::SourceLimits::fence_ms`]). An unconfirmed
//!   commit begins as [`Began::Unconfirmed`]: its table is whole, but may be of an earlier stop.
//! - Another migration of the VM by the same host takes the place of one that has not been activated: the host knows that the VM runs there.
//!   Another host's is refused.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]
use std::collections::{BTreeMap, VecDeque};

use ferry_dataplane::conntrack::{Connection, Imported, Key, newer};

use crate::batch::{Batch, Digest, Item, MAX_BATCH_ITEMS};
use crate::message::{
    Abilities, AbortReason, Ack, Agreed, Began, HelloReply, MAGIC, Mark, Message, Name, Note, Offer, Refuse,
    RefuseCode, WhenLate, capability,
};
use crate::table::TargetTable;

/// The destination's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationLimits {
    /// For the source's next step while it has one to take, milliseconds.
    pub step_timeout_ms: u64,
    /// The source is taken for gone when it was silent for so long, milliseconds.
    pub silence_timeout_ms: u64,
    /// A usable table stays for so long after the channel was lost, milliseconds.
    pub orphan_timeout_ms: u64,
    /// A committed table stays for so long after the commit or the last word of the source, milliseconds.
    pub commit_timeout_ms: u64,
    /// Between a committed destination's questions whether the commit stands, milliseconds.
    pub confirm_interval_ms: u64,
    /// How long an answer to one holds, from the question on, milliseconds. Less than the source's
    /// [`fence_ms`](crate::source::SourceLimits::fence_ms) by the time that a message may take.
    pub confirmed_ms: u64,
    /// After the start of the VM late frames are taken for so long, milliseconds.
    pub redirect_ms: u64,
    /// Most bytes of frames that wait for the VM to start.
    pub waiting_bytes: usize,
    /// Most frames that wait for the VM to start.
    pub waiting_frames: usize,
    /// Longest late frame, bytes.
    pub frame_bytes: usize,
    /// Connections that wait for room in a full table until deletions make it.
    pub crowd: usize,
}

impl Default for DestinationLimits {
    fn default() -> Self {
        Self {
            step_timeout_ms: 10_000,
            silence_timeout_ms: 5000,
            orphan_timeout_ms: 10_000,
            commit_timeout_ms: 60_000,
            confirm_interval_ms: 5,
            confirmed_ms: 30,
            redirect_ms: 10_000,
            waiting_bytes: 4 << 20,
            waiting_frames: 4096,
            frame_bytes: 65_550,
            crowd: 4096,
        }
    }
}

/// What the destination is told.
#[derive(Clone, Debug)]
pub enum Event<T> {
    /// Both connections are up. A channel that was open before is closed already.
    Connected {
        /// The peer, by its certificate.
        peer: Name,
    },
    /// One of them is lost.
    Disconnected,
    /// From the source.
    Message(Message),
    /// From the source.
    Batch(Batch),
    /// A frame for the VM that the source redirects, or that has come by the uplink before the VM started.
    LateFrame(Vec<u8>),
    /// In answer to [`Action::Judge`]: the VM may come; its connections go into this empty table.
    Admitted {
        /// The table.
        table: T,
        /// What this host's configuration says.
        when_late: WhenLate,
    },
    /// In answer to [`Action::Judge`].
    Denied(Refuse),
    /// A ring of the VM was started here: it runs, until [`Self::QemuGone`].
    Kick,
    /// QEMU has closed the connection of the VM's ports here.
    QemuGone,
    /// An operator wants the migration given up.
    Cancel,
    /// Time has passed.
    Tick,
}

/// What the destination wants done.
#[derive(Clone, Debug)]
pub enum Action<T> {
    /// Send on the control connection.
    Send(Message),
    /// Close the channel, after what was sent has gone out.
    Disconnect,
    /// May this VM come from this host (authorization, ports, MAC addresses, MTU, policy)? Then [`Event::Admitted`] or [`Event::Denied`].
    Judge {
        /// The host, by its certificate.
        peer: Name,
        /// The VM.
        offer: Offer,
    },
    /// Put this table in the place of the VM's.
    Install(T),
    /// Put an empty table in the place of the VM's.
    Withdraw,
    /// The VM runs. Announce it.
    Activate {
        /// With what.
        began: Began,
        /// Pick up unknown connections mid-stream, and take TCP windows liberally until a packet of each direction was seen. Otherwise the
        /// VM's own rules hold.
        liberal: bool,
    },
    /// Hand this frame to the VM.
    Deliver(Vec<u8>),
    /// For the history, metrics and audit.
    Report(Report),
}

/// What happened, for people.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// An offer was refused.
    Refused(Refuse),
    /// A migration was accepted.
    Accepted,
    /// A round has arrived.
    Round(Ack),
    /// Everything has arrived.
    Committed(Ack),
    /// The source's VM runs on.
    Resumed,
    /// The migration was given up, and what was staged dropped.
    Dropped(AbortReason),
    /// The VM runs here.
    Activated(Began),
}

/// Counts since the machine began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Batches that had come before.
    pub repeated_batches: u64,
    /// Connections of addresses or zones that are not the VM's, or that tracking cannot have made.
    pub refused: u64,
    /// Connections that found no room.
    pub dropped: u64,
    /// Late frames delivered.
    pub delivered_frames: u64,
    /// Late frames dropped: too many, too long, too late.
    pub dropped_frames: u64,
}

/// Where the destination is, in the words of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No migration.
    Empty,
    /// Connections arrive.
    Staging,
    /// All have arrived, the VM has not.
    Committed,
    /// The VM has come and runs; late frames may follow.
    Active,
}

/// Where the conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Talk {
    /// No channel.
    None,
    /// Nothing said yet.
    Fresh,
    /// Versions agreed on.
    Greeted(Agreed),
    /// An offer is being judged.
    Judging(Agreed),
    /// Accepted.
    Open(Agreed),
}

/// A round's end that was announced.
#[derive(Clone, Copy, Debug)]
struct End {
    mark: Mark,
    last: bool,
    lagging: u32,
}

/// The point of commitment has passed.
#[derive(Clone, Copy, Debug)]
struct Committed {
    /// Entries whose windows are not the last ones.
    lagging: u32,
    /// When the last question that was answered was sent; at first, the commit.
    confirmed_ms: u64,
    /// When the last question was sent.
    asked_ms: u64,
}

/// The connections that have arrived.
struct Stage<T> {
    table: T,
    /// Whose they are.
    peer: Name,
    when_late: WhenLate,
    digest: Digest,
    batches: u64,
    items: u64,
    round: u32,
    /// The round under way is the final one.
    last: bool,
    end: Option<End>,
    usable: bool,
    entries: u32,
    /// No room yet.
    crowd: BTreeMap<Key, Connection>,
    refused: u64,
    dropped: u64,
    /// All have arrived.
    committed: Option<Committed>,
    /// Is dropped then, if nobody is there to speak for it.
    until_ms: u64,
}

/// The destination of a VM's migrations, one after the other.
pub struct Destination<T> {
    limits: DestinationLimits,
    host: Name,
    abilities: Abilities,
    peer: Name,
    talk: Talk,
    stage: Option<Stage<T>>,
    offered: Option<WhenLate>,
    /// The VM runs here.
    running: bool,
    /// It has come by the migration whose channel may still be open; until when frames are taken.
    active_until_ms: Option<u64>,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    heard_ms: u64,
    step_ms: u64,
    counts: Counts,
}

impl<T: TargetTable> Destination<T> {
    /// No migration. `running`: the VM runs here.
    pub fn new(limits: DestinationLimits, host: Name, abilities: Abilities, running: bool) -> Self {
        Self {
            limits,
            host,
            abilities,
            peer: Name::default(),
            talk: Talk::None,
            stage: None,
            offered: None,
            running,
            active_until_ms: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            heard_ms: 0,
            step_ms: 0,
            counts: Counts::default(),
        }
    }

    /// Other bounds, from now on.
    pub fn reconfigure(&mut self, limits: DestinationLimits, host: Name) {
        self.limits = limits;
        self.host = host;
    }

    /// The VM runs here.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Where it is.
    pub fn state(&self) -> State {
        match &self.stage {
            Some(stage) if stage.committed.is_some() => State::Committed,
            Some(_) => State::Staging,
            None if self.active_until_ms.is_some() => State::Active,
            None => State::Empty,
        }
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Connections staged, and whether they are usable.
    pub fn staged(&self) -> Option<(u32, bool)> {
        self.stage.as_ref().map(|stage| (stage.entries, stage.usable))
    }

    /// Bytes of memory that grow with what happens, the staged table's own left out.
    pub fn memory_bytes(&self) -> usize {
        let crowd = self.stage.as_ref().map_or(0, |stage| stage.crowd.len());
        crowd * (size_of::<Key>() + size_of::<Connection>()) + self.waiting_bytes
    }

    /// When [`Event::Tick`] is wanted at the latest; `None`: not at all.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let silence = (self.talk != Talk::None).then(|| self.heard_ms + self.limits.silence_timeout_ms);
        let step = self.awaits_step().then(|| self.step_ms + self.limits.step_timeout_ms);
        let stage = self.stage.as_ref().filter(|_| !self.is_spoken_for()).map(|stage| stage.until_ms);
        let committed = self.stage.as_ref().filter(|_| self.is_spoken_for()).and_then(|stage| stage.committed);
        let confirm = committed.map(|committed| committed.asked_ms + self.limits.confirm_interval_ms);
        [silence, step, stage, confirm, self.active_until_ms].into_iter().flatten().min()
    }

    fn awaits_step(&self) -> bool {
        match self.talk {
            Talk::None | Talk::Judging(_) => false,
            Talk::Fresh | Talk::Greeted(_) => true,
            // Between rounds and after the commit the source has its time.
            Talk::Open(_) => self.stage.as_ref().is_some_and(|stage| stage.end.is_some()),
        }
    }

    /// The source is there and may decide what becomes of the stage.
    fn is_spoken_for(&self) -> bool {
        matches!(self.talk, Talk::Open(_))
    }

    /// Takes note of an event; what is to be done is added to `out`, in order.
    pub fn handle(&mut self, event: Event<T>, now_ms: u64, out: &mut Vec<Action<T>>) {
        match event {
            Event::Connected { peer } => {
                self.hang_up(now_ms);
                self.peer = peer;
                self.talk = Talk::Fresh;
                self.heard_ms = now_ms;
                self.step_ms = now_ms;
            }
            Event::Disconnected => self.hang_up(now_ms),
            Event::Message(message) => {
                if self.talk != Talk::None {
                    self.heard_ms = now_ms;
                    self.message(message, now_ms, out);
                }
            }
            Event::Batch(batch) => {
                if self.talk != Talk::None {
                    self.heard_ms = now_ms;
                    self.batch(batch, now_ms, out);
                }
            }
            Event::LateFrame(frame) => self.late_frame(frame, out),
            Event::Admitted { table, when_late } => self.admitted(table, when_late, now_ms, out),
            Event::Denied(refuse) => {
                if let Talk::Judging(_) = self.talk {
                    self.refuse(refuse, out);
                }
            }
            Event::Kick => self.kick(now_ms, out),
            Event::QemuGone => {
                self.running = false;
                if self.stage.is_some() {
                    self.abort(AbortReason::VmGone, "QEMU is gone at the destination", out);
                    self.discard(AbortReason::VmGone, out);
                }
                self.end_active(out);
            }
            Event::Cancel => {
                if self.stage.is_some() {
                    self.abort(AbortReason::Operator, "an operator at the destination gave it up", out);
                    self.discard(AbortReason::Operator, out);
                }
            }
            Event::Tick => self.tick(now_ms, out),
        }
    }

    // ---- conversation

    fn message(&mut self, message: Message, now_ms: u64, out: &mut Vec<Action<T>>) {
        self.step_ms = now_ms;
        match (message, self.talk) {
            (Message::Ping { nonce }, _) => out.push(Action::Send(Message::Pong { nonce })),
            (Message::Pong { nonce }, _) => {
                // The question's nonce is when it was asked.
                if let Some(committed) = self.stage.as_mut().and_then(|stage| stage.committed.as_mut())
                    && nonce <= committed.asked_ms
                {
                    committed.confirmed_ms = committed.confirmed_ms.max(nonce);
                }
            }
            (Message::Hello(hello), Talk::Fresh) => match self.abilities.negotiate(&hello) {
                Ok(agreed) => {
                    self.talk = Talk::Greeted(agreed);
                    out.push(Action::Send(Message::HelloReply(HelloReply {
                        magic: MAGIC,
                        version: agreed.version,
                        capabilities: agreed.capabilities,
                        host: self.host.clone(),
                    })));
                }
                Err(mismatch) => {
                    let note = Note::lossy(&mismatch.to_string());
                    self.refuse(Refuse { code: RefuseCode::Version, note }, out);
                }
            },
            (Message::Offer(offer), Talk::Greeted(agreed)) => self.offer(offer, agreed, out),
            (Message::Abort { reason, .. }, talk) => {
                if let Talk::Open(_) = talk {
                    self.discard(reason, out);
                }
                self.close(out);
            }
            (Message::Bye, Talk::Open(_)) => {
                // Said once the VM is gone from the source: a committed table waits for it.
                self.close(out);
                if let Some(stage) = &mut self.stage {
                    stage.until_ms = now_ms + self.limits.commit_timeout_ms;
                }
            }
            // The VM runs here: what was on its way is of no use.
            (
                Message::RoundBegin { .. }
                | Message::RoundEnd(_)
                | Message::FinalBegin { .. }
                | Message::FinalEnd { .. },
                Talk::Open(_),
            ) if self.running => {}
            (message, Talk::Open(agreed)) => self.round_message(message, agreed, now_ms, out),
            _ => self.broken("unexpected message", out),
        }
    }

    fn offer(&mut self, offer: Offer, agreed: Agreed, out: &mut Vec<Action<T>>) {
        let refusal = |code, note: &str| Refuse { code, note: Note::lossy(note) };
        if self.running {
            self.refuse(refusal(RefuseCode::Running, "the VM runs at the destination"), out);
            return;
        }
        if self.stage.as_ref().is_some_and(|stage| stage.peer != self.peer) {
            self.refuse(refusal(RefuseCode::Busy, "another host's migration of the VM is under way"), out);
            return;
        }
        self.offered = Some(offer.when_late);
        self.talk = Talk::Judging(agreed);
        out.push(Action::Judge { peer: self.peer.clone(), offer });
    }

    fn admitted(&mut self, table: T, when_late: WhenLate, now_ms: u64, out: &mut Vec<Action<T>>) {
        let (Talk::Judging(agreed), Some(offered)) = (self.talk, self.offered.take()) else { return };
        if self.running {
            let note = Note::lossy("the VM runs at the destination");
            self.refuse(Refuse { code: RefuseCode::Running, note }, out);
            return;
        }
        // The same host's former one: it has forgotten it.
        self.discard(AbortReason::Cancelled, out);
        let capacity = table.capacity();
        let strictest = match (offered, when_late) {
            (WhenLate::FailOpen, WhenLate::FailOpen) => WhenLate::FailOpen,
            _ => WhenLate::FailClosed,
        };
        self.stage = Some(Stage {
            table,
            peer: self.peer.clone(),
            when_late: strictest,
            digest: Digest::default(),
            batches: 0,
            items: 0,
            round: 0,
            last: false,
            end: None,
            usable: false,
            entries: 0,
            crowd: BTreeMap::new(),
            refused: 0,
            dropped: 0,
            committed: None,
            until_ms: now_ms,
        });
        self.talk = Talk::Open(agreed);
        self.active_until_ms = None;
        out.push(Action::Report(Report::Accepted));
        out.push(Action::Send(Message::Accept { capacity }));
    }

    fn refuse(&mut self, refuse: Refuse, out: &mut Vec<Action<T>>) {
        self.offered = None;
        out.push(Action::Report(Report::Refused(refuse.clone())));
        out.push(Action::Send(Message::Refuse(refuse)));
        self.close(out);
    }

    /// The channel is gone, or another takes its place.
    fn hang_up(&mut self, now_ms: u64) {
        if let (Talk::Open(_), Some(stage)) = (self.talk, &mut self.stage) {
            let patience_ms = match (stage.committed, stage.usable, stage.when_late) {
                (Some(_), ..) => self.limits.commit_timeout_ms,
                (None, true, WhenLate::FailOpen) => self.limits.orphan_timeout_ms,
                _ => 0,
            };
            stage.until_ms = now_ms + patience_ms;
            stage.end = None;
        }
        self.offered = None;
        self.talk = Talk::None;
    }

    fn close(&mut self, out: &mut Vec<Action<T>>) {
        if self.talk != Talk::None {
            self.talk = Talk::None;
            out.push(Action::Disconnect);
        }
    }

    fn abort(&mut self, reason: AbortReason, note: &str, out: &mut Vec<Action<T>>) {
        if self.talk != Talk::None {
            out.push(Action::Send(Message::Abort { reason, note: Note::lossy(note) }));
        }
        if self.is_spoken_for() || self.talk == Talk::None {
            self.discard(reason, out);
        }
        self.close(out);
    }

    fn broken(&mut self, note: &str, out: &mut Vec<Action<T>>) {
        self.abort(AbortReason::Protocol, note, out);
    }

    /// Drops what was staged.
    fn discard(&mut self, reason: AbortReason, out: &mut Vec<Action<T>>) {
        if let Some(stage) = self.stage.take() {
            if stage.committed.is_some() {
                out.push(Action::Withdraw);
            }
            out.push(Action::Report(Report::Dropped(reason)));
            self.drop_waiting();
        }
    }

    // ---- rounds

    fn round_message(&mut self, message: Message, agreed: Agreed, now_ms: u64, out: &mut Vec<Action<T>>) {
        let Some(stage) = &mut self.stage else {
            self.broken("unexpected message", out);
            return;
        };
        let next = stage.round.saturating_add(1);
        match message {
            Message::RoundBegin { round } if stage.committed.is_none() && stage.end.is_none() && !stage.last => {
                // The first round has no predecessor.
                if round != next && (round != 0 || stage.usable) {
                    self.broken("round out of order", out);
                    return;
                }
                stage.round = round;
            }
            Message::FinalBegin { round } if stage.committed.is_none() && !stage.last => {
                if round != next && (round != 0 || stage.usable) {
                    self.broken("round out of order", out);
                    return;
                }
                stage.round = round;
                stage.last = true;
                // The VM has stopped before the last round was acknowledged: nobody waits for that any more.
                stage.end = None;
            }
            Message::RoundEnd(mark) if !stage.last && stage.end.is_none() && mark.round == stage.round => {
                stage.end = Some(End { mark, last: false, lagging: 0 });
                self.round_end(now_ms, out);
            }
            Message::FinalEnd { mark, lagging }
                if stage.last && stage.committed.is_none() && stage.end.is_none() && mark.round == stage.round =>
            {
                stage.end = Some(End { mark, last: true, lagging });
                self.round_end(now_ms, out);
            }
            Message::Resume if stage.last && agreed.capabilities & capability::RESUME != 0 => {
                stage.last = false;
                stage.end = None;
                stage.uncommit(out);
                out.push(Action::Report(Report::Resumed));
                self.drop_waiting();
            }
            _ => self.broken("unexpected message", out),
        }
    }

    fn batch(&mut self, batch: Batch, now_ms: u64, out: &mut Vec<Action<T>>) {
        if self.running && self.is_spoken_for() {
            return;
        }
        let (Some(stage), Talk::Open(_)) = (&mut self.stage, self.talk) else {
            self.broken("batch before its time", out);
            return;
        };
        if batch.sequence < stage.batches {
            // Harmless: all of it is known.
            self.counts.repeated_batches += 1;
            return;
        }
        // The control connection may be behind, so the batch's own round may be ahead.
        if batch.sequence > stage.batches || batch.items.len() > MAX_BATCH_ITEMS {
            self.broken("batch out of order", out);
            return;
        }
        // More after the commit: the VM runs on at the source. The bulk connection was faster than the word of it.
        stage.uncommit(out);
        stage.digest.add(&batch);
        stage.batches += 1;
        stage.items += batch.items.len() as u64;
        self.step_ms = now_ms;
        let before = (stage.refused, stage.dropped);
        stage.apply(batch, now_ms, self.limits.crowd);
        self.counts.refused += stage.refused - before.0;
        self.counts.dropped += stage.dropped - before.1;
        self.round_end(now_ms, out);
    }

    /// If a round's end was announced and all of it is there: acknowledges it.
    fn round_end(&mut self, now_ms: u64, out: &mut Vec<Action<T>>) {
        let Some(stage) = &mut self.stage else { return };
        let Some(end) = stage.end else { return };
        if stage.batches < end.mark.batches {
            return;
        }
        if stage.batches > end.mark.batches {
            // The source has gone on without waiting for the answer: the VM has stopped, or runs on. The word of it is on its way.
            stage.end = None;
            return;
        }
        let found =
            Mark { round: stage.round, batches: stage.batches, items: stage.items, digest: stage.digest.value() };
        if found != end.mark {
            self.abort(AbortReason::Digest, "what arrived is not what was sent", out);
            return;
        }
        stage.end = None;
        stage.usable = true;
        let dropped = stage.dropped;
        stage.seat_crowd(now_ms, end.last);
        self.counts.dropped += stage.dropped - dropped;
        let ack = Ack {
            round: end.mark.round,
            digest: end.mark.digest,
            entries: stage.entries,
            refused: stage.refused,
            dropped: stage.dropped,
        };
        if end.last {
            stage.committed = Some(Committed { lagging: end.lagging, confirmed_ms: now_ms, asked_ms: now_ms });
            stage.until_ms = now_ms + self.limits.commit_timeout_ms;
            out.push(Action::Install(stage.table.clone()));
            out.push(Action::Send(Message::FinalAck(ack)));
            out.push(Action::Report(Report::Committed(ack)));
        } else {
            out.push(Action::Send(Message::RoundAck(ack)));
            out.push(Action::Report(Report::Round(ack)));
        }
    }

    // ---- the VM

    fn kick(&mut self, now_ms: u64, out: &mut Vec<Action<T>>) {
        if std::mem::replace(&mut self.running, true) {
            return;
        }
        let Some(mut stage) = self.stage.take() else {
            if let Talk::Judging(_) | Talk::Greeted(_) | Talk::Fresh = self.talk {
                self.abort(AbortReason::Running, "the VM has started at the destination", out);
            }
            return;
        };
        let (began, liberal) = match (stage.committed, stage.usable, stage.when_late) {
            (Some(committed), ..)
                if !self.is_spoken_for() || now_ms > committed.confirmed_ms + self.limits.confirmed_ms =>
            {
                (Began::Unconfirmed, stage.when_late == WhenLate::FailOpen)
            }
            (Some(Committed { lagging: 0, .. }), ..) => (Began::Complete, false),
            (Some(_), ..) => (Began::Lagging, true),
            (None, true, WhenLate::FailOpen) => {
                stage.seat_crowd(now_ms, true);
                out.push(Action::Install(stage.table.clone()));
                (Began::Partial, true)
            }
            (None, _, WhenLate::FailOpen) => (Began::Empty, true),
            (None, _, WhenLate::FailClosed) => (Began::Empty, false),
        };
        if began == Began::Empty {
            // Whatever an earlier stay of the VM has left.
            out.push(Action::Withdraw);
        }
        self.active_until_ms = Some(now_ms + self.limits.redirect_ms);
        out.push(Action::Activate { began, liberal });
        if self.is_spoken_for() {
            out.push(Action::Send(Message::Activated { began }));
        } else {
            // Another channel, which has not come far.
            self.close(out);
        }
        out.push(Action::Report(Report::Activated(began)));
        self.waiting_bytes = 0;
        for frame in self.waiting.drain(..) {
            self.counts.delivered_frames += 1;
            out.push(Action::Deliver(frame));
        }
    }

    fn late_frame(&mut self, frame: Vec<u8>, out: &mut Vec<Action<T>>) {
        let fits = !frame.is_empty() && frame.len() <= self.limits.frame_bytes;
        match self.state() {
            State::Active if fits => {
                self.counts.delivered_frames += 1;
                out.push(Action::Deliver(frame));
            }
            State::Committed | State::Staging
                if fits
                    && self.waiting.len() < self.limits.waiting_frames
                    && self.waiting_bytes + frame.len() <= self.limits.waiting_bytes =>
            {
                self.waiting_bytes += frame.len();
                self.waiting.push_back(frame);
            }
            _ => self.counts.dropped_frames += 1,
        }
    }

    fn drop_waiting(&mut self) {
        self.counts.dropped_frames += self.waiting.len() as u64;
        self.waiting = VecDeque::new();
        self.waiting_bytes = 0;
    }

    fn end_active(&mut self, out: &mut Vec<Action<T>>) {
        if self.active_until_ms.take().is_some() && self.is_spoken_for() {
            self.close(out);
        }
    }

    fn tick(&mut self, now_ms: u64, out: &mut Vec<Action<T>>) {
        let silent = self.talk != Talk::None && now_ms >= self.heard_ms + self.limits.silence_timeout_ms;
        let stuck = self.awaits_step() && now_ms >= self.step_ms + self.limits.step_timeout_ms;
        if silent || stuck {
            out.push(Action::Send(Message::Abort { reason: AbortReason::Timeout, note: Note::lossy("silence") }));
            self.hang_up(now_ms);
            out.push(Action::Disconnect);
        }
        if let (Talk::Open(_), Some(committed)) =
            (self.talk, self.stage.as_mut().and_then(|stage| stage.committed.as_mut()))
            && now_ms >= committed.asked_ms + self.limits.confirm_interval_ms
        {
            committed.asked_ms = now_ms;
            out.push(Action::Send(Message::Ping { nonce: now_ms }));
        }
        if !self.is_spoken_for() && self.stage.as_ref().is_some_and(|stage| now_ms >= stage.until_ms) {
            self.discard(AbortReason::Timeout, out);
        }
        if self.active_until_ms.is_some_and(|until_ms| now_ms >= until_ms) {
            self.end_active(out);
        }
    }
}

impl<T: TargetTable> Stage<T> {
    fn uncommit(&mut self, out: &mut Vec<Action<T>>) {
        if self.committed.take().is_some() {
            out.push(Action::Withdraw);
            // What expired meanwhile has been deleted.
            self.entries = self.table.len().try_into().unwrap_or(u32::MAX);
        }
    }

    fn apply(&mut self, batch: Batch, now_ms: u64, crowd: usize) {
        if batch.clear {
            self.table.clear();
            self.entries = 0;
            self.crowd.clear();
            self.usable = false;
        }
        for item in batch.items {
            match item {
                Item::Connection(connection) if self.table.accepts(&connection) => {
                    self.bring(connection, now_ms, crowd);
                }
                Item::Connection(_) => self.refused += 1,
                Item::Tombstone { key, version } | Item::Lapsed { key, version, .. } => {
                    self.refused += u64::from(matches!(item, Item::Lapsed { expired: false, .. }));
                    if self.crowd.get(&key).is_some_and(|c| !newer(c.version, version)) {
                        self.crowd.remove(&key);
                    }
                    if self.table.delete(&key, version) {
                        self.entries = self.entries.saturating_sub(1);
                    }
                }
            }
        }
    }

    fn bring(&mut self, connection: Connection, now_ms: u64, crowd: usize) {
        let key = connection.key;
        // A table that is full makes room by evicting, which here would lose what the source still has: such a newcomer waits.
        if self.crowd.contains_key(&key) || (self.entries >= self.table.capacity() && !self.table.has(&key)) {
            if self.crowd.len() < crowd || self.crowd.contains_key(&key) {
                self.crowd.insert(key, connection);
            } else {
                self.dropped += 1;
            }
            return;
        }
        match self.table.import(&connection, now_ms) {
            Imported::Added => self.entries += 1,
            Imported::Replaced | Imported::Older => {}
            Imported::Full => self.dropped += 1,
        }
    }

    /// Those that found no room try again; with `last` for the last time.
    fn seat_crowd(&mut self, now_ms: u64, last: bool) {
        for (key, connection) in std::mem::take(&mut self.crowd) {
            // Replaces an entry, or there is room.
            if self.entries >= self.table.capacity() && !self.table.has(&key) {
                if last {
                    self.dropped += 1;
                } else {
                    self.crowd.insert(key, connection);
                }
                continue;
            }
            match self.table.import(&connection, now_ms) {
                Imported::Added => self.entries += 1,
                Imported::Replaced | Imported::Older => {}
                Imported::Full => self.dropped += 1,
            }
        }
    }
}
