//! A VM's task: it alone owns the two machines of the VM, so that everything happens to them in one order.
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use ferry_migrate::message::{Hello, Offer};
use ferry_vhost::dirty_log::DirtyLog;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};

use super::Hub;
use super::destination_side::{DestinationSide, Outcome};
use super::dial::DialError;
use super::guest::Guest;
use super::link::{Link, Received};
use super::monitor::Told;
use super::source_side::SourceSide;
use super::switch::VmSwitch;

/// At least this often the views are brought up to date while something is under way.
const VIEW_INTERVAL: Duration = Duration::from_millis(100);

/// What a VM's task is told.
pub enum Input {
    /// QEMU's dirty log is on, and where.
    LogOn(Option<Arc<DirtyLog>>),
    /// It is at another place.
    Log(Arc<DirtyLog>),
    /// It is off.
    LogOff,
    /// A ring has stopped while the log was on.
    Stopped(Instant),
    /// The last one has; QEMU waits until this is told, or dropped.
    Held(SyncSender<()>),
    /// A ring was started; whoever did it waits until this is told.
    Kick(Option<SyncSender<()>>),
    /// The rings of this port run in both directions.
    LinkUp(Arc<str>),
    /// No port has a frontend any more.
    QemuGone,
    /// A dial has ended.
    Dialled(u64, Box<Result<Link, DialError>>),
    /// A host wants to send the VM.
    Offered(Box<(Link, Hello, Offer)>),
    /// From QEMU's monitor.
    Monitor(Told),
    /// An operator gives the migration up.
    Cancel,
    /// The VM is not configured any more, or ferryd stops.
    End,
}

/// Where a VM's task hears.
pub struct Inputs {
    /// From its ports.
    pub signals: Receiver<Input>,
    /// From everybody else.
    pub others: UnboundedReceiver<Input>,
}

/// Where a machine's actions are carried out.
pub struct Place<'a> {
    /// What all VMs share.
    pub hub: &'a Arc<Hub>,
    /// The VM.
    pub vm: &'a str,
    /// Its ports' session threads.
    pub guest: &'a Arc<Guest>,
    /// For what must not wait.
    pub runtime: &'a Handle,
    /// The switch.
    pub switch: &'a dyn VmSwitch,
}

impl Place<'_> {
    /// The switch.
    pub fn switch(&self) -> &dyn VmSwitch {
        self.switch
    }
}

/// Runs until [`Input::End`].
pub async fn run(hub: Arc<Hub>, switch: Arc<dyn VmSwitch>, vm: String, guest: Arc<Guest>, inputs: Inputs) {
    let runtime = Handle::current();
    let place = Place { hub: &hub, vm: &vm, guest: &guest, runtime: &runtime, switch: switch.as_ref() };
    let destination = DestinationSide::new(&place, guest.runs());
    Actor { source: None, destination, inputs, shown: Instant::now() }.run(&place).await;
}

struct Actor {
    /// None until the VM's table is known.
    source: Option<SourceSide>,
    destination: DestinationSide,
    inputs: Inputs,
    shown: Instant,
}

/// What a turn of the loop brought.
enum Turn {
    Input(Option<Input>),
    FromDestination(Received),
    FromSource(Received),
    Time,
}

impl Actor {
    async fn run(mut self, place: &Place<'_>) {
        loop {
            let turn = self.wait(place).await;
            // The switch may let this thread wait for a grace period.
            let on = tokio::task::block_in_place(|| self.turn(place, turn));
            if !on {
                return;
            }
        }
    }

    async fn wait(&mut self, place: &Place<'_>) -> Turn {
        let now_ms = place.switch().now_ms();
        let due_ms = [self.source.as_ref().and_then(|s| s.next_tick_ms(now_ms)), self.destination.next_tick_ms(now_ms)];
        let due_ms = due_ms.into_iter().flatten().min();
        let pause = async {
            match due_ms.map(|at_ms| at_ms.saturating_sub(now_ms)) {
                // At once, but others may go first.
                Some(0) => tokio::task::yield_now().await,
                Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                None => std::future::pending().await,
            }
        };
        let source = async {
            match &mut self.source {
                Some(source) => source.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            input = self.inputs.signals.recv() => Turn::Input(input),
            input = self.inputs.others.recv() => Turn::Input(input),
            received = source => Turn::FromDestination(received),
            () = pause => Turn::Time,
            received = self.destination.next() => Turn::FromSource(received),
        }
    }

    /// False: the end.
    fn turn(&mut self, place: &Place<'_>, turn: Turn) -> bool {
        let visible = !matches!(turn, Turn::Time);
        match turn {
            Turn::Input(None | Some(Input::End)) => {
                if let Some(source) = &mut self.source {
                    source.shut_down(place);
                }
                self.destination.shut_down(place);
                self.show(place);
                return false;
            }
            Turn::Input(Some(input)) => self.input(place, input),
            Turn::FromDestination(received) => {
                if let Some(source) = &mut self.source {
                    source.received(place, received);
                }
            }
            Turn::FromSource(received) => {
                let outcome = self.destination.received(place, received);
                self.follow(place, outcome);
            }
            Turn::Time => {}
        }
        if let Some(source) = &mut self.source {
            source.tick(place);
        }
        let outcome = self.destination.tick(place);
        self.follow(place, outcome);
        let busy = self.source.as_ref().is_some_and(SourceSide::is_busy) || self.destination.is_busy();
        place.guest.attentive.store(busy || self.destination.awaits_kick(), Relaxed);
        if (visible && !busy) || self.shown.elapsed() >= VIEW_INTERVAL {
            self.show(place);
        }
        true
    }

    fn input(&mut self, place: &Place<'_>, input: Input) {
        match input {
            Input::LogOn(log) => {
                if let Some(source) = self.current_source(place) {
                    source.log_on(place, log);
                }
            }
            Input::Kick(done) => {
                let was_here = self.destination.is_running();
                let outcome = self.destination.kick(place);
                if let Some(source) = &mut self.source {
                    source.kick(place);
                }
                if !was_here || outcome.activated {
                    self.source = None;
                    self.current_source(place);
                }
                if let Some(done) = done {
                    // Whoever waited may have given up.
                    let _ = done.try_send(());
                }
            }
            Input::LinkUp(port) => {
                if let Some(source) = &mut self.source {
                    source.link_up(place, &port);
                }
                self.destination.link_up(place, port);
            }
            Input::QemuGone => {
                if let Some(source) = &mut self.source {
                    source.qemu_gone(place);
                }
                let outcome = self.destination.qemu_gone(place);
                self.follow(place, outcome);
            }
            Input::Offered(offered) => {
                let (link, hello, offer) = *offered;
                let outcome = self.destination.offered(place, link, hello, offer);
                self.follow(place, outcome);
            }
            Input::Cancel => {
                if let Some(source) = &mut self.source {
                    source.cancel(place);
                }
                let outcome = self.destination.cancel(place);
                self.follow(place, outcome);
            }
            other => self.source_input(place, other),
        }
    }

    fn source_input(&mut self, place: &Place<'_>, input: Input) {
        let Some(source) = &mut self.source else { return };
        match input {
            Input::Log(log) => source.log_moved(log),
            Input::LogOff => source.log_off(place),
            Input::Stopped(at) => source.stopped(place, at),
            Input::Held(release) => source.held(place, release),
            Input::Dialled(dial, result) => source.dialled(place, dial, *result),
            Input::Monitor(told) => source.monitor(told),
            _ => {}
        }
    }

    /// The VM's table may have been exchanged.
    fn follow(&mut self, place: &Place<'_>, outcome: Outcome) {
        if outcome.activated {
            if let Some(source) = &mut self.source {
                source.kick(place);
            }
            self.source = None;
            self.current_source(place);
        }
    }

    /// The source over the table that the VM has now.
    fn current_source(&mut self, place: &Place<'_>) -> Option<&mut SourceSide> {
        let table = place.switch().vm(place.vm)?;
        if self.source.as_ref().is_none_or(|source| !source.is_busy() && !source.is_of(&table)) {
            self.source = Some(SourceSide::new(place, table));
        }
        self.source.as_mut()
    }

    /// Brings what is told up to date.
    fn show(&mut self, place: &Place<'_>) {
        self.shown = Instant::now();
        let source = self.source.as_mut().map(|source| {
            source.estimate();
            &source.record
        });
        let destination = Some(&self.destination.record);
        for record in [source, destination].into_iter().flatten().filter(|r| r.is_open()) {
            place.hub.show(&record.view);
        }
    }
}
