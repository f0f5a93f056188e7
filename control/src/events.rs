//! What ports report while they run: logged, and VMs that have arrived are announced.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::core::WeakCore;
use crate::migration::Migration;

/// Most events waiting to be handled.
const CAPACITY: usize = 4096;

/// Something happened to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A peer connected to its socket.
    Connected,
    /// The peer has gone: why.
    Disconnected(String),
    /// Frames can pass.
    LinkUp,
    /// Frames cannot pass any more.
    LinkDown,
    /// The port was stopped because of its peer or its device.
    Fault(String),
    /// QEMU asks to announce that this address is here now (VHOST_USER_SEND_RARP).
    Announce([u8; 6]),
    /// Anything else worth a line in the log.
    Note(String),
}

/// Where ports report to. Never blocks: it is called from threads that a change may be waiting for.
#[derive(Clone)]
pub struct EventSender {
    sender: SyncSender<(Arc<str>, Event)>,
    lost: Arc<AtomicU64>,
    migration: Migration,
}

/// A sender and the queue to be handled by [`run`].
pub fn channel(migration: Migration) -> (EventSender, EventQueue) {
    let (sender, receiver) = sync_channel(CAPACITY);
    let lost = Arc::new(AtomicU64::new(0));
    (EventSender { sender, lost: Arc::clone(&lost), migration }, EventQueue { receiver, lost })
}

impl EventSender {
    /// Which hears of ports' signals, too.
    pub fn migration(&self) -> &Migration {
        &self.migration
    }

    /// Reports an event of `port`.
    pub fn send(&self, port: &Arc<str>, event: Event) {
        if let Err(TrySendError::Full(_)) = self.sender.try_send((Arc::clone(port), event)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Events waiting to be handled.
pub struct EventQueue {
    receiver: Receiver<(Arc<str>, Event)>,
    lost: Arc<AtomicU64>,
}

/// Handles events until all senders are gone or `core` is.
pub fn run(queue: EventQueue, core: WeakCore) {
    while let Ok((port, event)) = queue.receiver.recv() {
        let lost = queue.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!("{lost} port events were lost: they came faster than they could be handled");
        }
        match event {
            Event::Connected => tracing::info!(port = &*port, "peer connected"),
            Event::Disconnected(why) => tracing::info!(port = &*port, "peer disconnected: {why}"),
            Event::LinkUp => tracing::info!(port = &*port, "link up"),
            Event::LinkDown => tracing::info!(port = &*port, "link down"),
            Event::Fault(why) => tracing::error!(port = &*port, "port stopped: {why}"),
            Event::Note(text) => tracing::info!(port = &*port, "{text}"),
            Event::Announce(mac) => {
                let Some(core) = core.upgrade() else { return };
                let text = mac.map(|b| format!("{b:02x}")).join(":");
                match core.lock().announce(&port, mac) {
                    Ok(frames) => tracing::info!(port = &*port, mac = text, frames, "VM announced"),
                    Err(e) => tracing::warn!(port = &*port, mac = text, "VM not announced: {e}"),
                }
            }
        }
    }
}
