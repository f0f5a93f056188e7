//! A VM's migrations away from this host: carries out what the source's machine decides.
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use ferry_dataplane::enforce::VmFirewall;
use ferry_migrate::audit::{self, Kind};
use ferry_migrate::authz::Role;
use ferry_migrate::compress::{CompressMode, Compressor};
use ferry_migrate::message::{self, Abilities, List, Name, Nic, Offer, capability};
use ferry_migrate::source::{Action, Event, Failure, Release, Report, Source, SourceIdentity, State};
use ferry_migrate::wire::{BatchEncoder, BulkKind};
use ferry_vhost::dirty_log::DirtyLog;
use ferry_vhost::memory_rounds::MemoryRounds;

use super::Hub;
use super::actor::Place;
use super::dial::DialError;
use super::diverts::{self, Diverts};
use super::link::{Link, Received};
use super::monitor::Told;
use super::record::Record;
use super::view::{EstimateView, QemuView};
use crate::qmp::{CrossCheck, QmpEvent};

/// Late frames taken from the ports at a time.
const LATE_AT_ONCE: usize = 64;

/// See the module.
pub struct SourceSide {
    machine: Source<Arc<VmFirewall>>,
    table: Arc<VmFirewall>,
    link: Option<Link>,
    /// Counts dials, so that the answer of one that was given up is told from another's.
    dial: u64,
    encoder: Option<BatchEncoder>,
    rounds: Option<MemoryRounds>,
    /// The log is on, and where.
    log: Option<Arc<DirtyLog>>,
    /// QEMU's thread waits here.
    held: Option<SyncSender<()>>,
    diverts: Diverts,
    /// Frames that came while the VM was stopped and that it gets here after all.
    kept: Vec<Vec<u8>>,
    redirecting: bool,
    check: CrossCheck,
    /// What is told of it.
    pub record: Record,
}

/// The offer of a VM, as the configuration and the switch know it.
pub fn offer(place: &Place<'_>) -> Offer {
    let settings = place.hub.settings();
    let vm = settings.vms.get(place.vm);
    let nic = |port: super::switch::VmPort| {
        let known = vm.and_then(|vm| vm.ports.get(&port.name));
        let addresses = known.map(|p| p.addresses.clone()).unwrap_or_default();
        Nic {
            mac: known.and_then(|p| p.mac).unwrap_or_default(),
            mtu: known.map_or(0, |p| p.mtu),
            index: port.index,
            addresses: List::new(addresses.into_iter().take(message::MAX_ADDRESSES).collect()).unwrap_or_default(),
            port: Name::lossy(&port.name),
        }
    };
    let nics = place.switch().ports(place.vm).into_iter().take(message::MAX_NICS).map(nic).collect();
    Offer {
        vm: Name::lossy(place.vm),
        nics: List::new(nics).unwrap_or_default(),
        capacity: vm.map_or(0, |vm| vm.capacity),
        entries: place.switch().vm(place.vm).map_or(0, |f| u32::try_from(f.map().len()).unwrap_or(u32::MAX)),
        when_late: vm.map(|vm| vm.migration.when_late.into()).unwrap_or_default(),
    }
}

fn identity(place: &Place<'_>) -> SourceIdentity {
    SourceIdentity { host: place.hub.settings().host.clone(), abilities: abilities(place.hub), vm: offer(place) }
}

/// What this host can do.
pub fn abilities(hub: &Hub) -> Abilities {
    let mut abilities = Abilities::default();
    if hub.settings().config.compression == CompressMode::Off {
        abilities.offered &= !capability::COMPRESSION;
    }
    abilities
}

impl SourceSide {
    /// A VM with this table.
    pub fn new(place: &Place<'_>, table: Arc<VmFirewall>) -> Self {
        let machine = Source::new(place.hub.settings().source_limits(), identity(place), Arc::clone(&table));
        Self {
            machine,
            table,
            link: None,
            dial: 0,
            encoder: None,
            rounds: None,
            log: None,
            held: None,
            diverts: Diverts::default(),
            kept: Vec::new(),
            redirecting: false,
            check: CrossCheck::default(),
            record: Record::default(),
        }
    }

    /// The table is still the VM's.
    pub fn is_of(&self, table: &Arc<VmFirewall>) -> bool {
        Arc::ptr_eq(&self.table, table)
    }

    /// Something is under way, or QEMU waits.
    pub fn is_busy(&self) -> bool {
        self.machine.is_migrating() || self.held.is_some() || self.diverts.is_on()
    }

    /// What comes from the peer.
    pub async fn next(&mut self) -> Received {
        match &mut self.link {
            Some(link) => link.next().await,
            None => std::future::pending().await,
        }
    }

    /// When it wants to be ticked, milliseconds of the switch's clock.
    pub fn next_tick_ms(&self, now_ms: u64) -> Option<u64> {
        let machine = self.machine.next_tick_ms(now_ms);
        let watch = (self.rounds.is_some() || self.log.is_some() || self.diverts.is_on()).then_some(now_ms + 1);
        [machine, watch].into_iter().flatten().min()
    }

    // ---- what QEMU says

    /// QEMU's dirty log is on: a migration begins.
    pub fn log_on(&mut self, place: &Place<'_>, log: Option<Arc<DirtyLog>>) {
        self.log = log;
        self.rounds = None;
        if !self.machine.is_migrating() {
            self.machine.reconfigure(place.hub.settings().source_limits(), identity(place));
            self.record = Record::begin(place.vm, "source");
            self.check = CrossCheck::default();
            if let Some(path) = place.hub.settings().vms.get(place.vm).and_then(|vm| vm.migration.qmp.clone()) {
                self.record.view.qemu = Some(QemuView { agrees: true, ..QemuView::default() });
                place.runtime.spawn(super::monitor::follow(path, Arc::clone(place.guest)));
            }
        }
        self.event(place, Event::LogOn);
        if !self.machine.is_migrating() {
            // A VM that is paused: nothing can be copied in rounds.
            self.record = Record::default();
        }
    }

    /// The log is at another place.
    pub fn log_moved(&mut self, log: Arc<DirtyLog>) {
        self.log = Some(log);
        self.rounds = None;
    }

    /// The log is off.
    pub fn log_off(&mut self, place: &Place<'_>) {
        (self.log, self.rounds) = (None, None);
        self.event(place, Event::LogOff);
    }

    /// The VM has stopped.
    pub fn stopped(&mut self, place: &Place<'_>, at: Instant) {
        self.record.stopped(at);
        if self.machine.is_migrating() {
            self.diverts.switch_on(place.switch());
        }
        self.event(place, Event::Stopped);
    }

    /// QEMU waits for the last ring's reply.
    pub fn held(&mut self, place: &Place<'_>, release: SyncSender<()>) {
        self.held = Some(release);
        self.record.held();
        self.event(place, Event::ReplyHeld);
    }

    /// A ring was started.
    pub fn kick(&mut self, place: &Place<'_>) {
        let committed = self.record.is_open() && self.record.is_committed();
        if self.diverts.is_on() {
            self.diverts.switch_off(place.switch());
            self.kept = self.diverts.take(usize::MAX);
        }
        self.event(place, Event::Kick);
        if committed && self.record.is_open() {
            place.hub.note(self.audit(place, Kind::Revoked));
        }
    }

    /// The rings of a port run in both directions.
    pub fn link_up(&mut self, place: &Place<'_>, port: &Arc<str>) {
        diverts::deliver(place.switch(), place.vm, &BTreeSet::from([Arc::clone(port)]), &mut self.kept);
    }

    /// QEMU has gone.
    pub fn qemu_gone(&mut self, place: &Place<'_>) {
        (self.log, self.rounds) = (None, None);
        self.held = None;
        self.event(place, Event::QemuGone);
        if !self.machine.is_migrating() && !self.redirecting {
            self.diverts.switch_off(place.switch());
            self.diverts.drop_frames();
        }
    }

    /// An operator gives the migration of connections up.
    pub fn cancel(&mut self, place: &Place<'_>) {
        self.event(place, Event::Cancel);
    }

    /// What QEMU's monitor told.
    pub fn monitor(&mut self, told: Told) {
        let view = self.record.view.qemu.get_or_insert_default();
        match told {
            Told::Event(QmpEvent::Pass(n)) => {
                view.pass = n;
                self.check.told = n;
            }
            Told::Event(QmpEvent::Status(status)) => view.status = status,
            Told::Event(_) => {}
            Told::Figures(f) => {
                view.status = f.status;
                view.remaining_bytes = f.remaining_bytes;
                view.mbps = f.mbps;
                view.expected_downtime_ms = f.expected_downtime_ms;
                view.downtime_limit_ms = f.downtime_limit_ms;
                view.downtime_ms = f.downtime_ms.or(view.downtime_ms);
            }
            Told::Problem(problem) => view.problem = Some(problem),
        }
        view.agrees = self.check.agrees();
    }

    // ---- the channel

    /// The dial number `dial` has ended.
    pub fn dialled(&mut self, place: &Place<'_>, dial: u64, result: Result<Link, DialError>) {
        if dial != self.dial {
            if let Ok(link) = result {
                link.close(place.runtime);
            }
            return;
        }
        match result {
            Ok(link) => {
                self.record.connected(link.id, &link.peer);
                let begun = place.hub.begin(self.audit(place, Kind::Granted));
                if let Err(why) = begun {
                    self.record.view.text = why;
                    link.close(place.runtime);
                    self.event(place, Event::Disconnected);
                    return;
                }
                self.link = Some(link);
                self.event(place, Event::Connected);
            }
            Err(error) => {
                tracing::warn!(vm = place.vm, "no channel for the VM's connections: {error}");
                self.record.view.text = error.to_string();
                let mut event = self.audit(place, Kind::Refused);
                event.reason = Some(error.to_string());
                place.hub.note(event);
                self.event(place, Event::Disconnected);
            }
        }
    }

    /// Something has come from the peer.
    pub fn received(&mut self, place: &Place<'_>, received: Received) {
        match received {
            Received::Control(bytes) => match message::decode(&bytes) {
                Ok(message) => self.event(place, Event::Message(message)),
                Err(error) => self.lost(place, &error.to_string()),
            },
            Received::Bulk(_) => self.lost(place, "the destination sent bulk data"),
            Received::Lost(why) => self.lost(place, &why),
        }
    }

    fn lost(&mut self, place: &Place<'_>, why: &str) {
        if let Some(link) = self.link.take() {
            tracing::info!(vm = place.vm, peer = link.peer, "migration channel lost: {why}");
            self.record.view.text = why.to_owned();
            link.close(place.runtime);
        }
        self.event(place, Event::Disconnected);
    }

    // ---- the machine

    fn event(&mut self, place: &Place<'_>, event: Event) {
        let was_migrating = self.machine.is_migrating();
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.machine.handle(event, place.switch().now_ms(), &mut actions);
            for action in actions.drain(..) {
                events.extend(self.carry_out(place, action));
            }
        }
        self.record.set_source_state(self.machine.state());
        if was_migrating && !self.machine.is_migrating() && self.record.is_open() {
            self.finish(place);
        }
    }

    fn carry_out(&mut self, place: &Place<'_>, action: Action) -> Option<Event> {
        match action {
            Action::Track(on) => {
                self.table.map().set_tracking(on);
                if on {
                    place.switch().synchronize();
                    return Some(Event::Tracking);
                }
            }
            Action::Connect => {
                self.dial += 1;
                place.hub.dial(place, self.dial, offer(place));
            }
            Action::Disconnect => {
                self.dial += 1;
                if let Some(link) = self.link.take() {
                    link.close(place.runtime);
                }
            }
            Action::Send(message) => {
                if let Some(Err(why)) = self.link.as_ref().map(|link| link.send(&message)) {
                    self.link = None;
                    self.record.view.text = why;
                    return Some(Event::Disconnected);
                }
            }
            Action::SendBatch(batch) => {
                let mut bytes = vec![0];
                let encoder = self.encoder.as_mut()?;
                encoder.encode(&batch, place.switch().now_ms(), &mut bytes);
                self.record.view.wire_bytes += bytes.len() as u64;
                self.record.view.raw_bytes += batch.wire_bytes() as u64;
                if let Some(Err(why)) = self.link.as_ref().map(|link| link.send_bulk(BulkKind::Batch, bytes)) {
                    self.link = None;
                    self.record.view.text = why.to_string();
                    return Some(Event::Disconnected);
                }
            }
            Action::SendLate(frame) => {
                let mut bytes = vec![0];
                bytes.extend(frame);
                // A frame that finds no room is one that the network lost.
                if let Some(Ok(())) = self.link.as_ref().map(|link| link.send_bulk(BulkKind::LateFrame, bytes)) {
                    self.record.view.late_frames += 1;
                }
            }
            Action::Release(why) => self.release(place, why),
            Action::Redirect(on) => {
                self.redirecting = on;
                if on {
                    self.diverts.switch_on(place.switch());
                } else {
                    self.diverts.switch_off(place.switch());
                    self.diverts.drop_frames();
                }
            }
            Action::Forget => {
                let table = Arc::clone(&self.table);
                place.runtime.spawn_blocking(move || table.flush(&|_| true));
            }
            Action::Report(report) => self.report(place, &report),
        }
        None
    }

    fn release(&mut self, place: &Place<'_>, why: Release) {
        if let Some(release) = self.held.take() {
            self.record.released();
            // The session thread may have given up waiting.
            let _ = release.try_send(());
        }
        match why {
            Release::Expired => {
                let mut event = self.audit(place, Kind::HoldExceeded);
                let late = place.hub.settings().vms.get(place.vm).map(|vm| vm.migration.when_late).unwrap_or_default();
                let reason = format!("{} ms; the VM goes {late:?}", place.hub.settings().config.hold_limit_ms);
                tracing::warn!(vm = place.vm, "the final delta was not acknowledged within {reason}");
                event.reason = Some(reason);
                place.hub.note(event);
                place.hub.totals.holds_exceeded.add(1);
            }
            Release::Failed => tracing::warn!(vm = place.vm, "the VM leaves without its connections"),
            Release::Committed | Release::Unrelated => {}
        }
    }

    fn report(&mut self, place: &Place<'_>, report: &Report) {
        self.record.source(report, self.machine.state());
        match report {
            Report::Attempt(n) => {
                tracing::info!(vm = place.vm, attempt = n, "migration away has begun");
                place.hub.note(self.audit(place, Kind::Attempt));
            }
            Report::Accepted(agreed) => {
                let mode = match agreed.capabilities & capability::COMPRESSION {
                    0 => CompressMode::Off,
                    _ => place.hub.settings().config.compression,
                };
                let bandwidth = match place.hub.settings().config.bandwidth_mbps {
                    0 => None,
                    mbps => Some(u64::from(mbps) * 125_000),
                };
                let clock = Instant::now();
                let clock_ns = move || u64::try_from(clock.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let id = self.link.as_ref().map_or(0, |link| link.id);
                self.encoder = Some(BatchEncoder::new(id, Compressor::new(mode, bandwidth, clock_ns)));
                let settings = place.hub.settings();
                let mtu = |port: &str| {
                    let vm = settings.vms.get(place.vm);
                    vm.and_then(|vm| vm.ports.get(port)).map_or(1500, |p| p.mtu)
                };
                let ports = place.switch().ports(place.vm).into_iter();
                self.diverts.prepare(ports.map(|p| (p.name.clone(), p.index, mtu(&p.name))));
            }
            Report::Refused(refuse) => {
                tracing::warn!(vm = place.vm, "the destination refuses the VM's connections: {}", refuse.note);
                let mut event = self.audit(place, Kind::Refused);
                event.reason = Some(refuse.note.to_string());
                place.hub.note(event);
            }
            Report::Round(round) => {
                tracing::debug!(vm = place.vm, ?round, "round");
                place.hub.totals.rounds.add(1);
            }
            Report::Committed { ack, .. } => {
                let mut event = self.audit(place, Kind::Committed);
                event.connections = Some(u64::from(ack.entries));
                event.digest = Some(format!("{:032x}", ack.digest));
                place.hub.note(event);
            }
            Report::Resumed => {}
            Report::Failed(failure) => {
                tracing::info!(vm = place.vm, "migration of connections: {failure}");
                let kind = match failure {
                    Failure::Cancelled | Failure::VmGone => Kind::Aborted,
                    _ => Kind::Failed,
                };
                let mut event = self.audit(place, kind);
                event.reason = Some(failure.to_string());
                place.hub.note(event);
            }
            Report::Activated(began) => {
                let mut event = self.audit(place, Kind::Completed);
                event.reason = Some(super::record::began_name(*began).to_owned());
                event.connections = Some(self.record.view.connections);
                place.hub.note(event);
            }
        }
    }

    fn finish(&mut self, place: &Place<'_>) {
        let gone = self.machine.state() == State::Gone || !place.guest.is_connected();
        self.record.end(gone);
        self.encoder = None;
        if self.diverts.is_on() && gone {
            self.diverts.switch_off(place.switch());
        }
        self.diverts.drop_frames();
        place.hub.ended(&self.record.view);
    }

    fn audit(&self, place: &Place<'_>, kind: Kind) -> audit::Event {
        audit::Event {
            migration: self.link.as_ref().map(|link| link.id),
            vm: Some(place.vm.to_owned()),
            peer: Some(self.record.view.peer.clone()).filter(|p| !p.is_empty()),
            certificate: self.link.as_ref().map(|link| link.certificate.clone()),
            role: Some(Role::Send),
            ..audit::Event::new(kind)
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, place: &Place<'_>) {
        self.watch_rounds(place);
        if self.redirecting {
            for frame in self.diverts.take(LATE_AT_ONCE) {
                self.event(place, Event::LateFrame(frame));
            }
        }
        let now_ms = place.switch().now_ms();
        if self.machine.next_tick_ms(now_ms).is_some_and(|at_ms| at_ms <= now_ms) {
            let room_bytes = self.link.as_ref().map_or(0, Link::room_bytes);
            self.event(place, Event::Tick { room_bytes });
        }
    }

    fn watch_rounds(&mut self, place: &Place<'_>) {
        let Some(log) = &self.log else { return };
        if self.machine.state() != State::PreCopy && self.machine.state() != State::Active {
            return;
        }
        // Where the rings are is known by now: QEMU tells it right after it has switched the log on.
        let rounds = self.rounds.get_or_insert_with(|| MemoryRounds::new(Arc::clone(log), &place.guest.used_rings()));
        if rounds.poll() {
            self.record.view.memory_rounds += 1;
            self.check.seen += 1;
            if let Some(view) = &mut self.record.view.qemu {
                view.agrees = self.check.agrees();
            }
            self.event(place, Event::MemoryRound);
        }
    }

    /// How far it is, for those who look.
    pub fn estimate(&mut self) {
        if self.machine.state() != State::PreCopy {
            self.record.view.estimate = None;
            return;
        }
        let e = self.machine.estimate();
        self.record.view.connections = self.table.map().len() as u64;
        self.record.view.estimate = Some(EstimateView {
            walk_left: e.walk_left,
            entries_left: e.entries_left,
            bytes_left: e.bytes_left,
            dirty_per_s: e.dirty_per_s,
            final_entries: e.final_entries,
            final_bytes: e.final_bytes,
            final_ms: e.final_ms,
        });
    }

    /// Ends whatever is under way: ferryd stops.
    pub fn shut_down(&mut self, place: &Place<'_>) {
        self.event(place, Event::Cancel);
        self.held = None;
        self.diverts.switch_off(place.switch());
        self.table.map().set_tracking(false);
    }
}
