//! Bursts of one frame: the fixed cost of a burst is all theirs, and whoever sends so waits for the answer.
//!
//! A frame that comes alone is mostly one of a conversation. What its link header means and where it leads is remembered per ingress
//! port, and holds as long as nothing has changed by which it was found out; nor does anything take turns with other trains.
use super::super::stretch::{Stretch, Stretches};
use super::super::{Source, action};
use super::{Exit, Far, Passage, face};
use crate::bridge::PictureId;
use crate::bridge::fdb::PortId;
use crate::enforce::quick::{Accepted, Train};
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

/// The way of a lone frame, under some circumstances.
#[derive(Clone, Copy)]
struct Memory {
    circumstances: Circumstances,
    stretch: Stretch,
    exit: Exit,
    /// Whom the sender's firewall accepted, and whom the receiver's.
    accepted: [Accepted; 2],
}

/// What is remembered of lone frames.
pub(in super::super) struct Memories(Box<[Memory; PORTS]>);

impl Memories {
    /// Of none.
    pub fn new() -> Self {
        let circumstances = Circumstances { ingress: 0, now_s: 0, picture: PictureId::NONE, stations: 0 };
        let nothing =
            Memory { circumstances, stretch: Stretch::NONE, exit: Exit::NONE, accepted: [Accepted::NOBODY; 2] };
        Self(Box::new([nothing; PORTS]))
    }

    #[inline(always)]
    fn of(&self, circumstances: &Circumstances) -> Option<&Memory> {
        let memory = self.0.get(usize::from(circumstances.ingress) % PORTS)?;
        (memory.circumstances == *circumstances).then_some(memory)
    }

    fn keep(&mut self, memory: Memory) {
        if let Some(place) = self.0.get_mut(usize::from(memory.circumstances.ingress) % PORTS) {
            *place = memory;
        }
    }
}

impl<T: TxPort> Passage<'_, '_, T> {
    /// Decides for the only frame, if the way of such frames is remembered. False, and nothing was done: it is not.
    #[inline(always)]
    pub(super) fn go_alone(
        &mut self,
        circumstances: &Circumstances,
        stretches: &mut Stretches,
        trains: &mut [Train],
    ) -> bool {
        let (head, have) = self.burst.head(0);
        let memory = self.router.memories.of(circumstances).filter(|memory| memory.stretch.carries(head, have));
        let Some(&Memory { stretch, exit, accepted: [near, far], .. }) = memory else { return false };
        if let Some(quick) = &mut self.near {
            quick.accepted = near;
        }
        if exit.is_guarded
            && face(&mut self.far, self.source, exit.output, self.thread)
            && let Some(Far { quick, .. }) = &mut self.far
        {
            quick.accepted = far;
        }
        let count = self.look_at(stretches, Some(stretch), trains);
        if let Some([train]) = trains.get_mut(..count) {
            self.conduct_alone(&stretch, exit, train);
        }
        true
    }

    /// Second and third pass of the only train.
    #[inline(always)]
    fn conduct_alone(&mut self, stretch: &Stretch, exit: Exit, train: &mut Train) {
        let (link, vlan, verified, dither) =
            (stretch.place.link, stretch.place.vlan, stretch.verify, self.router.dither);
        if train.is_named {
            if let Some(near) = &self.near {
                near.relocate(&mut train.near);
            }
            if let Some(far) = &self.far {
                far.quick.relocate(&mut train.far);
            }
        }
        let facts = self.router.facts.get(..1).unwrap_or_default();
        if let Some(near) = &mut self.near
            && near.pass_some(link.src, vlan, verified, train, facts, dither) == 0
        {
            return self.conduct(stretch, core::slice::from_mut(train));
        }
        let enters = match &mut self.far {
            Some(far) if exit.is_guarded => far.quick.pass_some(link.dst, vlan, verified, train, facts, dither) != 0,
            _ => !exit.is_guarded,
        };
        let mut frames = 1;
        if !enters {
            frames = self.arrive(stretch, exit.output, core::slice::from_mut(train), frames);
        }
        if frames != 0 {
            self.router.push(exit.output, frames, exit.action);
        }
    }

    /// Remembers the way of the only frame, if it had one that the next one can take as well.
    #[inline(never)]
    pub(super) fn remember(&mut self, circumstances: Circumstances, stretches: &Stretches) {
        // A frame that was dropped at its sender's has none; and where a station has to be learned, it has to be tried again.
        let (Some(recent), Some(&stretch)) = (self.recent.filter(|recent| recent.is_known), stretches.first()) else {
            return;
        };
        let output = recent.output;
        let Some(port) = self.source.forwarding.port(output).filter(|_| stretch.output == Some(output)) else { return };
        let Some(action) = action(port, stretch.place.vlan, stretch.place.tag) else { return };
        let far = self.far.as_ref().filter(|far| far.output == output).map(|far| far.quick.accepted);
        self.router.memories.keep(Memory {
            circumstances,
            stretch,
            exit: Exit { output, action, is_guarded: far.is_some() },
            accepted: [self.near.as_ref().map(|near| near.accepted), far].map(|one| one.unwrap_or(Accepted::NOBODY)),
        });
    }
}
