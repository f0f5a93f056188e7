//! Bursts of one frame: nothing takes turns with other trains, and whoever sends so waits for the answer.
use super::super::{check_offload, owes_work};
use super::memory::Memory;
use super::{Passage, prepare, relocate};
use crate::counters::DropReason;
use crate::enforce::quick::Train;
use crate::port::TxPort;

impl<T: TxPort> Passage<'_, '_, T> {
    /// Decides for the only frame, of which the way is known, in the steps that many take together. `trains`: room.
    #[inline(always)]
    pub(super) fn go_alone(&mut self, way: &Memory, trains: &mut [Train]) {
        let Some(trains) = trains.get_mut(..1) else { return };
        let (mut count, stretch) = (0, &way.stretch);
        if self.scan(stretch, 0, false, &mut count, trains) == 0 && !self.scan_checked(way, &mut count, trains) {
            return;
        }
        let [train] = trains else { return };
        let (near, far) = (self.near.as_ref(), self.far.as_ref().filter(|_| way.exit.is_guarded));
        if train.is_named {
            // Not by way of the flow cache: whoever has to wait for one cache line waits for no other.
            let far = far.map(|far| &far.quick);
            prepare(near, far, train, stretch.place.vlan, self.router.both_buckets);
            relocate(near, far, train);
        }
        self.conduct_alone(way, train);
    }

    /// Looks at the only frame again, which owes work that is to be checked. False: it is dropped.
    #[inline(never)]
    fn scan_checked(&mut self, way: &Memory, count: &mut usize, trains: &mut [Train]) -> bool {
        let checked = self.burst.meta(0).is_some_and(owes_work) && check_offload(self.burst, 0);
        if !checked {
            self.sender.fail(0, DropReason::RxBadOffload);
            return false;
        }
        self.scan(&way.stretch, 0, true, count, trains) == 1
    }

    /// Third pass of the only train.
    #[inline(always)]
    fn conduct_alone(&mut self, way: &Memory, train: &mut Train) {
        let Memory { stretch, exit, .. } = way;
        let (link, vlan, verified, dither) =
            (stretch.place.link, stretch.place.vlan, stretch.verify, self.router.dither);
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
}
