//! A VM's migrations to this host: carries out what the destination's machine decides.
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_dataplane::conntrack::Connection;
use ferry_dataplane::enforce::{PortFirewall, VmFirewall};
use ferry_migrate::announce::{self, MacAddr};
use ferry_migrate::audit::{self, Kind};
use ferry_migrate::authz::Role;
use ferry_migrate::destination::{Action, Destination, Event, Report};
use ferry_migrate::message::{self, Hello, Message, Name, Offer};
use ferry_migrate::table::Staging;
use ferry_migrate::wire::{BatchDecoder, BulkKind};

use super::actor::Place;
use super::diverts::{self, Diverts};
use super::judge::{Judgement, Situation, judge};
use super::link::{Link, Received};
use super::record::Record;
use super::source_side::abilities;
use super::switch::VmPort;

/// When a VM that has come is announced, after its start: as QEMU repeats its own announcements.
const ANNOUNCE_AT_MS: [u64; 5] = [1, 50, 200, 450, 800];
/// Frames taken from the ports at a time.
const EARLY_AT_ONCE: usize = 64;
/// How long unknown connections may be picked up mid-stream by a VM that has come without all of its own.
const PICK_UP_MS: u64 = 30_000;

/// See the module.
pub struct DestinationSide {
    machine: Destination<Staging>,
    link: Option<Link>,
    decoder: Option<BatchDecoder>,
    diverts: Diverts,
    /// Frames for the VM, until its rings run.
    deliveries: Vec<Vec<u8>>,
    /// Ports whose rings run.
    link_up: BTreeSet<Arc<str>>,
    /// When to announce, the MAC addresses that the source told of, by port number.
    announcements: VecDeque<Instant>,
    macs: Vec<(u8, MacAddr)>,
    /// The greeting was answered before the VM was known.
    greeted: bool,
    /// What is told of it.
    pub record: Record,
}

/// What has to follow an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The VM's table is another one than before.
    pub table_changed: bool,
    /// The VM has begun to run here.
    pub activated: bool,
}

impl DestinationSide {
    /// Nothing has come. `running`: the VM runs here.
    pub fn new(place: &Place<'_>, running: bool) -> Self {
        let settings = place.hub.settings();
        let machine =
            Destination::new(settings.destination_limits(), settings.host.clone(), abilities(place.hub), running);
        Self {
            machine,
            link: None,
            decoder: None,
            diverts: Diverts::default(),
            deliveries: Vec::new(),
            link_up: BTreeSet::new(),
            announcements: VecDeque::new(),
            macs: Vec::new(),
            greeted: false,
            record: Record::default(),
        }
    }

    /// Something is staged, or frames wait.
    pub fn is_busy(&self) -> bool {
        self.machine.staged().is_some() || self.link.is_some()
    }

    /// A KICK decides something.
    pub fn awaits_kick(&self) -> bool {
        self.machine.staged().is_some()
    }

    /// The VM runs here.
    pub fn is_running(&self) -> bool {
        self.machine.is_running()
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
        let announce = self.announcements.front().map(|at| {
            now_ms + u64::try_from(at.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(0) + 1
        });
        let watch = self.diverts.is_on().then_some(now_ms + 2);
        [self.machine.next_tick_ms(), announce, watch].into_iter().flatten().min()
    }

    /// A host wants to send the VM; its greeting has been answered.
    pub fn offered(&mut self, place: &Place<'_>, link: Link, hello: Hello, offer: Offer) -> Outcome {
        if let Some(old) = self.link.take() {
            old.close(place.runtime);
        }
        self.machine.reconfigure(place.hub.settings().destination_limits(), place.hub.settings().host.clone());
        if !self.record.is_open() {
            self.record = Record::begin(place.vm, "destination");
        }
        self.record.connected(link.id, &link.peer);
        self.macs = offer.nics.iter().map(|n| (n.index, n.mac)).collect();
        let peer = Name::lossy(&link.peer);
        self.link = Some(link);
        self.greeted = true;
        let mut outcome = self.event(place, Event::Connected { peer });
        for message in [Message::Hello(hello), Message::Offer(offer)] {
            outcome = outcome.and(self.event(place, Event::Message(message)));
        }
        self.greeted = false;
        outcome
    }

    /// Something has come from the peer.
    pub fn received(&mut self, place: &Place<'_>, received: Received) -> Outcome {
        match received {
            Received::Control(bytes) => match message::decode(&bytes) {
                Ok(message) => self.event(place, Event::Message(message)),
                Err(error) => self.lost(place, &error.to_string()),
            },
            Received::Bulk(bytes) => match BulkKind::split(&bytes) {
                Some((BulkKind::Batch, bytes)) => self.batch(place, bytes),
                Some((BulkKind::LateFrame, frame)) => {
                    self.record.view.late_frames += 1;
                    self.event(place, Event::LateFrame(frame.to_vec()))
                }
                None => self.lost(place, "a bulk message of unknown kind"),
            },
            Received::Lost(why) => self.lost(place, &why),
        }
    }

    fn batch(&mut self, place: &Place<'_>, bytes: &[u8]) -> Outcome {
        let Some(decoder) = &mut self.decoder else { return self.lost(place, "a batch before its time") };
        self.record.view.wire_bytes += bytes.len() as u64;
        match decoder.decode(bytes, place.switch().now_ms()) {
            Ok(batch) => {
                self.record.view.raw_bytes += batch.wire_bytes() as u64;
                self.event(place, Event::Batch(batch))
            }
            Err(error) => self.lost(place, &error.to_string()),
        }
    }

    fn lost(&mut self, place: &Place<'_>, why: &str) -> Outcome {
        if let Some(link) = self.link.take() {
            tracing::info!(vm = place.vm, peer = link.peer, "migration channel lost: {why}");
            link.close(place.runtime);
        }
        self.decoder = None;
        self.event(place, Event::Disconnected)
    }

    /// A ring was started.
    pub fn kick(&mut self, place: &Place<'_>) -> Outcome {
        self.event(place, Event::Kick)
    }

    /// QEMU has gone.
    pub fn qemu_gone(&mut self, place: &Place<'_>) -> Outcome {
        self.link_up.clear();
        self.deliveries.clear();
        self.announcements.clear();
        self.event(place, Event::QemuGone)
    }

    /// An operator gives it up.
    pub fn cancel(&mut self, place: &Place<'_>) -> Outcome {
        self.event(place, Event::Cancel)
    }

    /// The rings of a port run in both directions: frames reach the VM.
    pub fn link_up(&mut self, place: &Place<'_>, port: Arc<str>) {
        self.link_up.insert(port);
        self.diverts.switch_off(place.switch());
        self.deliveries.extend(self.diverts.take(usize::MAX));
        diverts::deliver(place.switch(), place.vm, &self.link_up, &mut self.deliveries);
        self.diverts.drop_frames();
    }

    /// Time has passed.
    pub fn tick(&mut self, place: &Place<'_>) -> Outcome {
        let mut outcome = Outcome::default();
        for frame in self.diverts.take(EARLY_AT_ONCE) {
            outcome = outcome.and(self.event(place, Event::LateFrame(frame)));
        }
        if self.announcements.front().is_some_and(|at| *at <= Instant::now()) {
            self.announcements.pop_front();
            self.announce(place);
        }
        let now_ms = place.switch().now_ms();
        if self.machine.next_tick_ms().is_some_and(|at_ms| at_ms <= now_ms) {
            outcome = outcome.and(self.event(place, Event::Tick));
        }
        outcome
    }

    fn event(&mut self, place: &Place<'_>, event: Event<Staging>) -> Outcome {
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        let mut outcome = Outcome::default();
        while let Some(event) = events.pop_front() {
            self.machine.handle(event, place.switch().now_ms(), &mut actions);
            for action in actions.drain(..) {
                events.extend(self.carry_out(place, action, &mut outcome));
            }
        }
        self.record.set_destination_state(self.machine.state());
        if self.record.is_open() && self.machine.staged().is_none() && self.link.is_none() {
            self.finish(place);
        }
        outcome
    }

    fn carry_out(
        &mut self,
        place: &Place<'_>,
        action: Action<Staging>,
        outcome: &mut Outcome,
    ) -> Option<Event<Staging>> {
        match action {
            Action::Send(Message::HelloReply(_)) if self.greeted => {}
            Action::Send(message) => {
                if let Some(Err(why)) = self.link.as_ref().map(|link| link.send(&message)) {
                    self.link = None;
                    self.record.view.text = why;
                    return Some(Event::Disconnected);
                }
            }
            Action::Disconnect => {
                self.decoder = None;
                if let Some(link) = self.link.take() {
                    link.close(place.runtime);
                }
            }
            Action::Judge { peer, offer } => return Some(self.judge(place, peer.as_str(), &offer)),
            Action::Install(staging) => {
                outcome.table_changed = true;
                if let Err(error) = place.switch().activate(place.vm, Arc::clone(staging.firewall())) {
                    tracing::error!(vm = place.vm, "the VM's connections could not be put in place: {error}");
                }
            }
            Action::Withdraw => {
                outcome.table_changed = true;
                let emptied = place.switch().stage(place.vm).and_then(|empty| place.switch().activate(place.vm, empty));
                if let Err(error) = emptied {
                    tracing::error!(vm = place.vm, "the VM's connections could not be withdrawn: {error}");
                }
            }
            Action::Activate { began: _, liberal } => {
                outcome.activated = true;
                if liberal && let Some(firewall) = place.switch().vm(place.vm) {
                    be_liberal(&firewall, place.switch().now_ms());
                }
                let now = Instant::now();
                self.announcements = ANNOUNCE_AT_MS.iter().map(|ms| now + Duration::from_millis(*ms)).collect();
            }
            Action::Deliver(frame) => {
                self.deliveries.push(frame);
                diverts::deliver(place.switch(), place.vm, &self.link_up, &mut self.deliveries);
            }
            Action::Report(report) => self.report(place, &report),
        }
        None
    }

    fn judge(&mut self, place: &Place<'_>, peer: &str, offer: &Offer) -> Event<Staging> {
        let settings = place.hub.settings();
        let ports = place.switch().ports(place.vm);
        let mut attempt = self.audit(place, Kind::Attempt);
        attempt.reason = Some(format!("{} connections offered", offer.entries));
        let stopped = place.hub.begin(attempt).err();
        let expected = place.hub.is_expected(place.vm, peer);
        // A VM that runs here has been refused by the machine.
        let situation = Situation { peer, running: false, expected, ports: &ports, stopped };
        let judgement = judge(&settings, offer, &situation);
        place.hub.note(audit::Event {
            migration: self.link.as_ref().map(|link| link.id),
            certificate: self.link.as_ref().map(|link| link.certificate.clone()),
            ..audit::Event::decision(&judgement.decision)
        });
        match (judgement.refusal(), self.admit(place, &judgement, ports)) {
            (Some(refuse), _) => Event::Denied(refuse),
            (None, Ok(admitted)) => admitted,
            (None, Err(why)) => {
                Event::Denied(message::Refuse { code: message::RefuseCode::Other, note: message::Note::lossy(&why) })
            }
        }
    }

    fn admit(
        &mut self,
        place: &Place<'_>,
        judgement: &Judgement,
        ports: Vec<VmPort>,
    ) -> Result<Event<Staging>, String> {
        if judgement.refusal().is_some() {
            return Err(String::new());
        }
        let settings = place.hub.settings();
        let vm = settings.vms.get(place.vm).ok_or("the VM is not configured any more")?;
        let firewall = place.switch().stage(place.vm).map_err(|e| e.to_string())?;
        let id = self.link.as_ref().map_or(0, |link| link.id);
        self.decoder = Some(BatchDecoder::new(id, vm.timeouts));
        let mtu = |port: &str| vm.ports.get(port).map_or(1500, |p| p.mtu);
        self.diverts.prepare(ports.iter().map(|p| (p.name.clone(), p.index, mtu(&p.name))));
        let owns = move |c: &Connection| {
            let (index, _) = PortFirewall::split_zone(c.key.zone);
            let port = ports.iter().find(|p| p.index == index);
            port.is_some_and(|p| !p.spoof.is_enabled() || p.spoof.owns(c.key.local()))
        };
        let table = Staging::new(firewall, Arc::new(owns));
        Ok(Event::Admitted { table, when_late: vm.migration.when_late.into() })
    }

    fn report(&mut self, place: &Place<'_>, report: &Report) {
        self.record.destination(report, self.machine.state());
        let vm = place.vm;
        match report {
            Report::Refused(refuse) => tracing::warn!(vm, "a VM's connections were refused: {}", refuse.note),
            Report::Accepted => tracing::info!(vm, peer = self.record.view.peer, "a VM's connections arrive"),
            Report::Round(ack) => tracing::debug!(vm, ?ack, "round"),
            Report::Committed(ack) => {
                tracing::info!(vm, connections = ack.entries, "all of the VM's connections have arrived");
                let mut event = self.audit(place, Kind::Committed);
                event.connections = Some(u64::from(ack.entries));
                event.digest = Some(format!("{:032x}", ack.digest));
                place.hub.note(event);
                // From now on frames for the VM may come here.
                self.diverts.switch_on(place.switch());
            }
            Report::Resumed => {
                tracing::info!(vm, "the VM runs on at the source");
                self.stop_early_frames(place);
                place.hub.note(self.audit(place, Kind::Revoked));
            }
            Report::Dropped(reason) => {
                tracing::info!(vm, "the migration was given up: {reason:?}");
                self.stop_early_frames(place);
                let mut event = self.audit(place, Kind::Aborted);
                event.reason = Some(format!("{reason:?}"));
                place.hub.note(event);
            }
            Report::Activated(began) => {
                let began = super::record::began_name(*began);
                tracing::info!(vm, began, connections = self.record.view.connections, "the VM runs here");
                let mut event = self.audit(place, Kind::Completed);
                event.reason = Some(began.to_owned());
                event.connections = Some(self.record.view.connections);
                place.hub.note(event);
                self.record.end(false);
                place.hub.ended(&self.record.view);
            }
        }
    }

    fn stop_early_frames(&mut self, place: &Place<'_>) {
        self.diverts.switch_off(place.switch());
        self.diverts.take(usize::MAX);
    }

    fn finish(&mut self, place: &Place<'_>) {
        self.stop_early_frames(place);
        self.diverts.drop_frames();
        self.record.end(false);
        place.hub.ended(&self.record.view);
    }

    fn audit(&self, place: &Place<'_>, kind: Kind) -> audit::Event {
        audit::Event {
            migration: self.link.as_ref().map(|link| link.id),
            vm: Some(place.vm.to_owned()),
            peer: Some(self.record.view.peer.clone()).filter(|p| !p.is_empty()),
            certificate: self.link.as_ref().map(|link| link.certificate.clone()),
            role: Some(Role::Receive),
            ..audit::Event::new(kind)
        }
    }

    /// Tells the network where the VM is now.
    fn announce(&self, place: &Place<'_>) {
        let settings = place.hub.settings();
        let Some(vm) = settings.vms.get(place.vm) else { return };
        for port in place.switch().ports(place.vm) {
            let Some(known) = vm.ports.get(&port.name) else { continue };
            let told = self.macs.iter().find(|(index, _)| *index == port.index).map(|(_, mac)| *mac);
            let Some(mac) = known.mac.or(told).filter(announce::is_station) else { continue };
            for vlan in &known.vlans {
                let addresses = known.addresses.iter().map(|address| match address {
                    std::net::IpAddr::V4(ip) => announce::gratuitous_arp(mac, *ip, *vlan),
                    std::net::IpAddr::V6(ip) => announce::unsolicited_na(mac, *ip, *vlan),
                });
                for frame in std::iter::once(announce::rarp(mac, *vlan)).chain(addresses) {
                    // A port that has just gone needs none.
                    let _ = place.switch().inject(&port.name, &frame);
                }
            }
        }
    }

    /// Ends whatever is under way: ferryd stops.
    pub fn shut_down(&mut self, place: &Place<'_>) {
        self.event(place, Event::Cancel);
        self.diverts.switch_off(place.switch());
    }
}

impl Outcome {
    fn and(self, other: Self) -> Self {
        Self { table_changed: self.table_changed || other.table_changed, activated: self.activated || other.activated }
    }
}

/// The VM has come without all that the source knew: windows are learned anew, and connections that are missing may be picked up where
/// policy allows.
fn be_liberal(firewall: &VmFirewall, now_ms: u64) {
    // First, since it takes no time and what is missing is missing from the first packet on.
    firewall.pick_up_until(now_ms + PICK_UP_MS);
    firewall.forget_windows();
}
