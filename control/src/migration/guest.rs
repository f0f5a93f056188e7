//! A VM as its ports' session threads see it: which of its rings run, and how its migrations hear of what QEMU says.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_vhost::dirty_log::DirtyLog;
use ferry_vhost::signals::PortEvent;
use tokio::sync::mpsc::{Sender, UnboundedSender};

use super::actor::Input;

/// Beyond the configured limit, by which the task that decides may be late itself.
const HOLD_MARGIN: Duration = Duration::from_millis(500);
/// How long a KICK waits for the task that puts the VM's connections in place. Longer would only be a task that is stuck.
const KICK_LIMIT: Duration = Duration::from_millis(500);

/// Shared by the session threads of a VM's ports and the VM's task.
pub struct Guest {
    /// From the ports: bounded, so that a frontend that says much waits itself.
    signals: Sender<Input>,
    /// From our own tasks, each of which says little.
    inputs: UnboundedSender<Input>,
    rings: Mutex<Rings>,
    /// A migration is under way: a KICK decides something.
    pub(super) attentive: AtomicBool,
    /// Longest hold, milliseconds.
    pub(super) hold_limit_ms: AtomicU64,
}

#[derive(Default)]
struct Rings {
    /// Ports with a frontend.
    connected: BTreeSet<Arc<str>>,
    /// Rings that run, by port and number.
    running: BTreeSet<(Arc<str>, u16)>,
    /// Guest physical addresses of used rings, while they are logged.
    used: BTreeMap<(Arc<str>, u16), u64>,
    /// Ports whose log is on.
    logging: BTreeSet<Arc<str>>,
    log: Option<Arc<DirtyLog>>,
}

impl Rings {
    fn forget(&mut self, port: &Arc<str>) {
        self.running.retain(|(p, _)| p != port);
        self.used.retain(|(p, _), _| p != port);
    }
}

impl Guest {
    /// Ports' signals go to `signals`, all else to `inputs`.
    pub fn new(signals: Sender<Input>, inputs: UnboundedSender<Input>) -> Self {
        Self {
            signals,
            inputs,
            rings: Mutex::default(),
            attentive: AtomicBool::new(false),
            hold_limit_ms: AtomicU64::new(0),
        }
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Any ring runs.
    pub fn runs(&self) -> bool {
        !self.rings().running.is_empty()
    }

    /// A frontend is connected to any port.
    pub fn is_connected(&self) -> bool {
        !self.rings().connected.is_empty()
    }

    /// To the VM's task. When that is gone, nobody wants to know.
    pub fn send(&self, input: Input) {
        let _ = self.inputs.send(input);
    }

    /// The same from a session thread, which waits while too much is waiting.
    fn signal(&self, input: Input) {
        let _ = self.signals.blocking_send(input);
    }

    /// What a port reports, in order. Holds the caller, and with it QEMU, where the migration's protocol says so; bounded.
    pub fn observe(&self, port: &Arc<str>, event: &PortEvent) {
        let mut rings = self.rings();
        match event {
            PortEvent::Connected => {
                rings.connected.insert(Arc::clone(port));
            }
            PortEvent::Disconnected { .. } => {
                rings.connected.remove(port);
                rings.forget(port);
                rings.logging.remove(port);
                if rings.connected.is_empty() {
                    *rings = Rings::default();
                    self.signal(Input::QemuGone);
                }
            }
            PortEvent::LogBase { log } => {
                let moved = !rings.logging.is_empty();
                rings.log = Some(Arc::clone(log));
                if moved {
                    self.signal(Input::Log(Arc::clone(log)));
                }
            }
            PortEvent::LogStarted => {
                let first = rings.logging.is_empty();
                rings.logging.insert(Arc::clone(port));
                if first {
                    self.signal(Input::LogOn(rings.log.clone()));
                }
            }
            PortEvent::LogStopped => {
                rings.logging.remove(port);
                rings.used.retain(|(p, _), _| p != port);
                if rings.logging.is_empty() {
                    rings.log = None;
                    self.signal(Input::LogOff);
                }
            }
            PortEvent::VringLogAddress { index, address } => match address {
                Some(address) => {
                    rings.used.insert((Arc::clone(port), *index), *address);
                }
                None => {
                    rings.used.remove(&(Arc::clone(port), *index));
                }
            },
            PortEvent::VringStarted { index, .. } => {
                rings.running.insert((Arc::clone(port), *index));
            }
            PortEvent::VringStopped { index, logging, .. } => {
                let ran = rings.running.remove(&(Arc::clone(port), *index));
                let last = ran && rings.running.is_empty();
                drop(rings);
                if *logging && ran {
                    self.signal(Input::Stopped(Instant::now()));
                }
                if *logging && last {
                    self.hold();
                }
            }
            PortEvent::Reset => rings.forget(port),
            PortEvent::Kicked { .. } => {
                drop(rings);
                self.kick();
            }
            PortEvent::LinkUp => self.signal(Input::LinkUp(Arc::clone(port))),
            _ => {}
        }
    }

    /// Addresses of the used rings that QEMU logs itself.
    pub fn used_rings(&self) -> Vec<u64> {
        self.rings().used.values().copied().collect()
    }

    fn hold(&self) {
        let (release, released) = sync_channel(1);
        self.signal(Input::Held(release));
        let limit = Duration::from_millis(self.hold_limit_ms.load(Relaxed)) + HOLD_MARGIN;
        // An error: released, or nobody there to do it, or too late.
        let _ = released.recv_timeout(limit);
    }

    /// On the destination the VM's connections are put in place before its first ring runs.
    fn kick(&self) {
        if !self.attentive.load(Relaxed) {
            self.signal(Input::Kick(None));
            return;
        }
        let (done, is_done): (SyncSender<()>, _) = sync_channel(1);
        self.signal(Input::Kick(Some(done)));
        let _ = is_done.recv_timeout(KICK_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::{Receiver, channel, unbounded_channel};

    fn guest() -> (Arc<Guest>, Receiver<Input>) {
        let (signals, received) = channel(64);
        (Arc::new(Guest::new(signals, unbounded_channel().0)), received)
    }

    fn started(index: u16) -> PortEvent {
        PortEvent::VringStarted { index, base: 0 }
    }

    fn stopped(index: u16, logging: bool) -> PortEvent {
        PortEvent::VringStopped { index, base: 0, logging, last: false }
    }

    #[test]
    fn the_last_ring_of_all_ports_is_held_until_it_is_released() {
        let (guest, mut inputs) = guest();
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        for port in [&a, &b] {
            guest.observe(port, &PortEvent::Connected);
            guest.observe(port, &started(0));
            guest.observe(port, &started(1));
        }
        guest.observe(&b, &PortEvent::LogStarted);
        guest.observe(&a, &PortEvent::LogStarted);
        assert!(matches!(inputs.try_recv(), Ok(Input::LogOn(None))));
        for (port, index) in [(&b, 0), (&b, 1), (&a, 0)] {
            guest.observe(port, &stopped(index, true));
            assert!(matches!(inputs.try_recv(), Ok(Input::Stopped(_))));
        }
        assert!(inputs.try_recv().is_err() && guest.runs());
        guest.hold_limit_ms.store(60_000, Relaxed);
        let session = {
            let guest = Arc::clone(&guest);
            std::thread::spawn(move || guest.observe(&a, &stopped(1, true)))
        };
        assert!(matches!(inputs.blocking_recv(), Some(Input::Stopped(_))));
        let Some(Input::Held(release)) = inputs.blocking_recv() else { panic!() };
        assert!(!session.is_finished());
        release.send(()).unwrap();
        session.join().unwrap();
        // A ring that did not run holds nothing.
        guest.observe(&b, &stopped(3, true));
        assert!(inputs.try_recv().is_err() && !guest.runs());
    }

    #[test]
    fn a_stop_outside_a_migration_waits_for_nobody_and_the_last_connection_is_the_end() {
        let (guest, mut inputs) = guest();
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        guest.observe(&a, &PortEvent::Connected);
        guest.observe(&b, &PortEvent::Connected);
        guest.observe(&a, &started(0));
        guest.observe(&a, &stopped(0, false));
        assert!(inputs.try_recv().is_err());
        guest.observe(&a, &PortEvent::Kicked { index: 0 });
        assert!(matches!(inputs.try_recv(), Ok(Input::Kick(None))));
        let gone = PortEvent::Disconnected { reason: String::new() };
        guest.observe(&a, &gone);
        assert!(inputs.try_recv().is_err() && guest.is_connected());
        guest.observe(&b, &gone);
        assert!(matches!(inputs.try_recv(), Ok(Input::QemuGone)) && !guest.is_connected());
    }
}
