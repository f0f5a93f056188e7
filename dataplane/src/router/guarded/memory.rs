//! The way of the stretch that a burst began with: mostly the next one from the same port begins with such a one, too.
//!
//! What a link header means and where it leads is remembered per ingress port, and holds as long as nothing has changed by which it was
//! found out. It is the greater part of a burst's fixed cost, which small bursts have to bear among few frames.
use super::super::stretch::{Stretch, Stretches};
use super::super::{Place, Recent, Source, action};
use super::{Exit, Far, Passage, face};
use crate::bridge::PictureId;
use crate::bridge::fdb::PortId;
use crate::enforce::quick::Accepted;
use crate::frame::SNAPSHOT_BYTES;
use crate::port::TxPort;

/// Ports that are remembered; those of which the numbers are alike modulo this take each other's place.
const PORTS: usize = 64;

/// All that a frame's way depends on, besides its headers and the tables of connections.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Circumstances {
    ingress: PortId,
    now_s: u32,
    picture: PictureId,
    /// [`crate::bridge::fdb::Fdb::changes`].
    stations: u64,
}

impl Circumstances {
    /// As they are before anything is looked up.
    #[inline(always)]
    pub fn new<T>(source: &Source<'_, T>) -> Self {
        let &Source { forwarding, port, bridge, .. } = source;
        Self { ingress: port.id, now_s: source.now_s(), picture: forwarding.id, stations: bridge.fdb.changes() }
    }
}

/// The way of a stretch, under some circumstances.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    circumstances: Circumstances,
    pub stretch: Stretch,
    pub exit: Exit,
    /// Whom the sender's firewall accepted, and whom the receiver's.
    accepted: [Accepted; 2],
}

/// What is remembered. By default there is room for nothing.
#[derive(Default)]
pub(in super::super) struct Memories(Box<[Memory]>);

impl Memories {
    /// Nothing.
    pub fn new() -> Self {
        let circumstances = Circumstances { ingress: 0, now_s: 0, picture: PictureId::NONE, stations: 0 };
        let nothing =
            Memory { circumstances, stretch: Stretch::NONE, exit: Exit::NONE, accepted: [Accepted::NOBODY; 2] };
        Self(vec![nothing; PORTS].into_boxed_slice())
    }

    /// The way of the stretch that begins with `head`, of which the first `have` bytes are there, if it is remembered.
    #[inline(always)]
    pub(super) fn recall(
        &self,
        circumstances: &Circumstances,
        (head, have): (&[u8; SNAPSHOT_BYTES], usize),
    ) -> Option<&Memory> {
        let memory = self.0.get(usize::from(circumstances.ingress) % PORTS)?;
        (memory.circumstances == *circumstances && memory.stretch.carries(head, have)).then_some(memory)
    }

    fn keep(&mut self, memory: Memory) {
        if let Some(place) = self.0.get_mut(usize::from(memory.circumstances.ingress) % PORTS) {
            *place = memory;
        }
    }
}

impl<T: TxPort> Passage<'_, '_, T> {
    /// The burst begins with a stretch that goes this way.
    #[inline(always)]
    pub(super) fn resume(&mut self, way: &Memory) {
        let &Memory { stretch: Stretch { place: Place { link, vlan, .. }, .. }, exit, accepted: [near, far], .. } = way;
        if let Some(quick) = &mut self.near {
            quick.accepted = near;
        }
        if exit.is_guarded
            && face(&mut self.far, self.source, exit.output, self.thread)
            && let Some(Far { quick, .. }) = &mut self.far
        {
            quick.accepted = far;
        }
        self.recent = Some(Recent { link, vlan, output: exit.output, is_known: true });
    }

    /// Remembers the way of the stretch that the burst began with, if it had one that others can take as well.
    #[inline(never)]
    pub(super) fn remember(&mut self, circumstances: Circumstances, stretches: &Stretches, memories: &mut Memories) {
        let source = self.source;
        let (Some(recent), Some(&stretch)) = (self.recent, stretches.first()) else { return };
        let Place { link, vlan, tag, .. } = stretch.place;
        // Frames that were dropped at their sender's have none; and where a station is yet to be learned, it is to be tried again.
        if !recent.is_known || (recent.link, recent.vlan) != (link, vlan) {
            return;
        }
        let output = recent.output;
        let Some(action) = source.forwarding.port(output).and_then(|port| action(port, vlan, tag)) else { return };
        let is_guarded = face(&mut self.far, source, output, self.thread);
        // What was expected came true: otherwise a station has been learned meanwhile.
        if stretch.output.is_some_and(|foreseen| foreseen != output)
            || stretch.foretold != Some(output).filter(|_| is_guarded)
        {
            return;
        }
        let far = self.far.as_ref().filter(|_| is_guarded).map(|far| far.quick.accepted);
        let accepted = [self.near.as_ref().map(|near| near.accepted), far].map(|one| one.unwrap_or(Accepted::NOBODY));
        let exit = Exit { output, action, is_guarded };
        memories.keep(Memory { circumstances, stretch, exit, accepted });
    }
}
