//! Routing where ports of the bridge have firewalls.
//!
//! A burst is cut into trains: consecutive plain packets between the same two ends, which are judged together, at the sender's firewall
//! and at the receiver's; what is not plain is a train of its own. Three passes over the trains, so that the cache lines of the connection
//! tables are on their way while other trains are looked at: what each is ([`Passage::look_at`]), where its entries are
//! ([`Passage::locate`]), what becomes of it ([`Passage::conduct`]). Plain packets take the short way ([`crate::enforce::quick`]), others
//! whose headers have been read the middle one ([`crate::enforce::middle`]), all others [`crate::enforce::stage`]. What trains have in common
//! that follow each other is found out once: see [`super::stretch`]. Where the entries are of connections that are in use, the flow cache
//! remembers ([`crate::enforce::flow_cache`]).
mod alone;
mod known;
mod memory;

use memory::Circumstances;
pub(super) use memory::Memories;

use super::stretch::{Stretch, Stretches};
use super::{Place, Recent, Router, Source, Target, accept_checksum, action, check_offload, judge, look_up, owes_work};
use crate::bridge::fdb::PortId;
use crate::conntrack::{Layout, Particulars, Plain, is_whole, next_dither};
use crate::counters::DropReason;
use crate::enforce::flow_cache::Between;
use crate::enforce::quick::{Quick, Train};
use crate::frame::{BURST, RxBurst, SNAPSHOT_BYTES};
use crate::offload::VlanAction;
use crate::output::Sender;
use crate::port::TxPort;

/// Bursts in which so many trains are searched for tell how many entries are not where they most probably are.
const TELLING: u32 = 8;

/// Bytes of a frame that are fetched while the one before it is summed: an Ethernet frame's.
const FETCHED_AHEAD: u32 = 1536;

/// The firewall of the output that was met last.
struct Far<'a> {
    output: PortId,
    quick: Quick<'a, false>,
}

/// What is to be looked at.
#[derive(Clone, Copy)]
struct Scan<'s> {
    stretch: &'s Stretch,
    from: usize,
    checked: bool,
}

/// A [`Plain::read`] that knows the layout.
trait Read: Fn(&[u8; SNAPSHOT_BYTES], usize, usize, &mut Particulars) -> Option<(Plain, bool)> {}
impl<F: Fn(&[u8; SNAPSHOT_BYTES], usize, usize, &mut Particulars) -> Option<(Plain, bool)>> Read for F {}

/// Where frames of a stretch go.
#[derive(Clone, Copy)]
struct Exit {
    output: PortId,
    action: VlanAction,
    /// The output has a firewall that judges: the one that was met last.
    is_guarded: bool,
}

impl Exit {
    /// No frame's.
    const NONE: Self = Self { output: PortId::MAX, action: VlanAction::Keep, is_guarded: false };
}

/// A burst on its way past the firewalls.
struct Passage<'p, 'a, T> {
    router: &'p mut Router,
    burst: &'p mut RxBurst,
    sender: &'p mut Sender,
    source: &'p Source<'a, T>,
    thread: usize,
    near: Option<Quick<'a, true>>,
    far: Option<Far<'a>>,
    recent: Option<Recent>,
    /// Trains of this burst of which the flow cache knew the connection, those that were searched for in the tables, and frames of a stretch that passed the last firewall the short way.
    guessed: u32,
    searched: u32,
    swift: u64,
    is_any_swift: bool,
    /// There are trains of which it did not.
    has_searched: bool,
}

impl Router {
    /// Decides for every frame of the burst, where firewalls are involved.
    pub(super) fn route_guarded<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        thread: usize,
        sender: &mut Sender,
    ) {
        self.dither = next_dither(self.dither);
        let near = source.port.firewall.as_ref().map(|fw| Quick::new(fw, thread, source.now_ns));
        let (mut trains, mut stretches) = (core::mem::take(&mut self.trains), core::mem::take(&mut self.stretches));
        let mut memories = core::mem::take(&mut self.memories);
        let circumstances = Circumstances::new(source);
        let way = memories.recall(&circumstances, burst.head(0));
        let mut passage = Passage {
            router: self,
            burst,
            sender,
            source,
            thread,
            near,
            far: None,
            recent: None,
            guessed: 0,
            searched: 0,
            swift: 0,
            is_any_swift: false,
            has_searched: false,
        };
        match way {
            Some(way) => {
                passage.resume(way);
                if passage.burst.len() == 1 {
                    passage.go_alone(way, &mut trains);
                } else {
                    passage.go(Some(&way.stretch), &mut stretches, &mut trains);
                }
            }
            None => {
                passage.go(None, &mut stretches, &mut trains);
                passage.remember(circumstances, &stretches, &mut memories);
            }
        }
        passage.settle();
        self.trains = trains;
        self.stretches = stretches;
        self.memories = memories;
    }
}

impl<'a, T: TxPort> Passage<'_, 'a, T> {
    /// Decides for all frames. `first`: the stretch that the first of them begins, if it is known.
    #[inline(never)]
    fn go(&mut self, first: Option<&Stretch>, stretches: &mut Stretches, trains: &mut [Train]) {
        let count = self.look_at(first, stretches, trains);
        let some = trains.get_mut(..count).unwrap_or_default();
        self.locate(stretches, some);
        for (stretch, range) in stretches.with_trains(count) {
            self.conduct(stretch, some.get_mut(range).unwrap_or_default());
        }
        self.router.are_strangers = self.guessed == 0 && !self.is_any_swift;
    }

    /// First pass: what each frame is, and the buckets of the tables that it will be looked up in. Returns the number of trains. `first`:
    /// the stretch that the first frame begins, if it is known.
    fn look_at(&mut self, first: Option<&Stretch>, stretches: &mut Stretches, trains: &mut [Train]) -> usize {
        stretches.restart(first);
        let mut current = first.copied();
        let (mut i, mut count, mut checked) = (0, 0, false);
        while i < self.burst.len() {
            let (head, have) = self.burst.head(i);
            let stretch = match current {
                Some(stretch) if checked || stretch.carries(head, have) => stretch,
                _ => match self.begin_stretch(stretches, i, count) {
                    Some(stretch) => *current.insert(stretch),
                    None => {
                        i += 1;
                        continue;
                    }
                },
            };
            let first = count;
            i = self.scan(&stretch, i, checked, &mut count, trains);
            self.prepare(&stretch, trains.get_mut(first..count).unwrap_or_default());
            // Where it stopped another stretch begins, or a frame owes work.
            let (head, have) = self.burst.head(i);
            checked = self.burst.meta(i).is_some_and(owes_work) && stretch.carries(head, have);
            if checked && !check_offload(self.burst, i) {
                self.sender.fail(i, DropReason::RxBadOffload);
                checked = false;
                i += 1;
            }
        }
        count
    }

    /// Begins a stretch with frame `i` and train `train`. `None`: the frame is dropped.
    #[inline(never)]
    fn begin_stretch(&mut self, stretches: &mut Stretches, i: usize, train: usize) -> Option<Stretch> {
        let Self { burst, sender, source, thread, near, far, .. } = self;
        let near_verifies = near.as_ref().is_some_and(Quick::verifies);
        stretches.begin(burst, i, source.port, sender, train, |stretch| {
            let Place { link, vlan, .. } = stretch.place;
            stretch.output = source.bridge.fdb.lookup(vlan, link.dst, source.now_s());
            // Somebody may be learned there until the stretch's turn comes.
            let likely = match stretch.output {
                None if !link.dst.is_multicast() => source.sole_other(link.dst, vlan),
                output => output,
            };
            stretch.foretold = likely.filter(|&output| face(far, source, output, *thread));
            let far_verifies = stretch.foretold.is_some() && far.as_ref().is_some_and(|far| far.quick.verifies());
            stretch.verify = near_verifies || far_verifies;
        })
    }

    /// Looks at frames from `from`, which is the stretch's, up to the first one that is another's, or owes work that is to be checked;
    /// that of `from` has been if `checked`. Returns where it stopped.
    fn scan(
        &mut self,
        stretch: &Stretch,
        from: usize,
        checked: bool,
        count: &mut usize,
        trains: &mut [Train],
    ) -> usize {
        // Each layout has its own code, with nothing left to ask about it.
        let on = Scan { stretch, from, checked };
        match stretch.layout {
            Some(Layout::V4) => {
                self.scan_as(on, count, trains, |head, have, len, to| Plain::read(head, have, len, Layout::V4, to))
            }
            Some(Layout::V6) => {
                self.scan_as(on, count, trains, |head, have, len, to| Plain::read(head, have, len, Layout::V6, to))
            }
            Some(tagged) => {
                self.scan_as(on, count, trains, |head, have, len, to| Plain::read(head, have, len, tagged, to))
            }
            None => self.scan_as(on, count, trains, |_, _, _, _| None),
        }
    }

    /// As [`Self::scan`]; `read` is [`Plain::read`].
    #[inline(never)]
    fn scan_as(&mut self, on: Scan<'_>, count: &mut usize, trains: &mut [Train], read: impl Read) -> usize {
        let Scan { stretch, from, checked } = on;
        let (frames, segments) = self.burst.frames_mut(from);
        let all_facts = self.router.facts.get_mut(from..).unwrap_or_default();
        let mut free = trains.get_mut(*count..).unwrap_or_default().iter_mut();
        let mut open: Option<&mut Train> = None;
        let mut i = from;
        for ((meta, head), facts) in frames.zip(all_facts) {
            let have = usize::from(meta.snapshot_len);
            if !stretch.carries(head, have) && i != from {
                break;
            }
            let seen = read(head, have, meta.len as usize, facts);
            if owes_work(meta)
                && !(checked && i == from)
                && !seen.is_some_and(|(plain, is_plain)| {
                    (is_plain || is_whole(&plain, facts, head, have)) && accept_checksum(meta, &plain)
                })
            {
                break;
            }
            let at = i as u8;
            i += 1;
            let Some((plain, mut is_plain)) = seen else {
                let Some(train) = free.next() else { break };
                (train.first, train.end, train.is_plain, train.is_named) = (at, at + 1, false, false);
                open = None;
                continue;
            };
            // The port that it came from vouches for its checksum, or it has none, or it is yet to be computed.
            if stretch.verify && is_plain && plain.is_summed() && !meta.offload.needs_csum && !meta.offload.csum_valid {
                is_plain = plain.checksum_ok(head, have, || {
                    // While this one is summed.
                    segments.fetch_next(meta, FETCHED_AHEAD);
                    segments.body(meta)
                });
            }
            if is_plain
                && let Some(train) = &mut open
                && train.plain.same_talk(&plain)
            {
                train.end = at + 1;
                continue;
            }
            let Some(train) = free.next() else { break };
            (train.first, train.end, train.is_plain, train.is_named) = (at, at + 1, is_plain, true);
            train.plain = plain;
            open = Some(train).filter(|_| is_plain);
        }
        let left = free.len();
        *count = trains.len() - left;
        i
    }

    /// Fetches from the flow cache what it has of the connections of a stretch's trains; or the buckets of the tables, where nobody expects
    /// it to have anything.
    #[inline(never)]
    fn prepare(&mut self, stretch: &Stretch, trains: &mut [Train]) {
        let between = self.between(stretch);
        let (flows, near, far) = (&self.router.flows, self.near.as_ref(), foretold(&self.far, stretch));
        if self.router.are_strangers {
            let (vlan, both) = (stretch.place.vlan, self.router.both_buckets);
            return trains.iter_mut().for_each(|train| prepare(near, far, train, vlan, both));
        }
        match (near, far) {
            (Some(near), _) => trains.iter_mut().for_each(|train| {
                train.flow = flows.prepare(near.ends(&train.plain), &train.plain, between);
            }),
            (None, Some(far)) => trains.iter_mut().for_each(|train| {
                train.flow = flows.prepare(far.ends(&train.plain).turned(), &train.plain, between);
            }),
            (None, None) => {}
        }
    }

    /// The firewalls between which the frames of a stretch go; that of the port that they will probably go to is met.
    #[inline(always)]
    fn between(&mut self, stretch: &Stretch) -> Between {
        let far = stretch.foretold.filter(|&output| face(&mut self.far, self.source, output, self.thread));
        Between::new(self.near.as_ref().map(|_| self.source.port.id), far, stretch.place.vlan)
    }

    /// Second pass: the tables' entries.
    #[inline(never)]
    fn locate(&mut self, stretches: &Stretches, trains: &mut [Train]) {
        let (count, mut searched) = (trains.len(), Searched::default());
        for (stretch, range) in stretches.with_trains(count) {
            let trains = trains.get_mut(range).unwrap_or_default();
            if self.router.are_strangers {
                let named = trains.iter().enumerate().filter(|(_, train)| train.is_named);
                let which = named.fold(0, |which, (t, _)| which | 1 << (t % BURST));
                self.search(stretch, trains, which, &mut searched);
                continue;
            }
            let unknown = self.guess(stretch, trains);
            if unknown != 0 {
                self.has_searched = true;
                let (near, far) = (self.near.as_ref(), foretold(&self.far, stretch));
                let (vlan, both) = (stretch.place.vlan, self.router.both_buckets);
                for t in each(unknown) {
                    let Some(train) = trains.get_mut(t) else { break };
                    prepare(near, far, train, vlan, both);
                }
                self.search(stretch, trains, unknown, &mut searched);
            }
        }
        // In a full table many are where they less probably are, and new ones are in neither place.
        self.searched = searched.all;
        if searched.all >= TELLING {
            self.router.both_buckets = searched.elsewhere * 8 > searched.all;
        }
    }

    /// Asks the flow cache about a stretch's trains. Returns a bit for each of those that it does not know.
    #[inline(always)]
    fn guess(&mut self, stretch: &Stretch, trains: &mut [Train]) -> u64 {
        let between = self.between(stretch);
        let (flows, near, far) = (&self.router.flows, self.near.as_ref(), foretold(&self.far, stretch));
        let mut unknown = 0;
        for (t, train) in trains.iter_mut().enumerate() {
            if !train.is_named {
                continue;
            }
            let Some([near_slot, far_slot]) = flows.find(train.flow, between) else {
                unknown |= 1 << (t % BURST);
                continue;
            };
            if let Some(near) = near {
                train.near = near.guess(near_slot);
            }
            if let Some(far) = far {
                train.far = far.guess(far_slot);
            }
            self.guessed += 1;
        }
        unknown
    }

    /// Finds the entries of some trains of a stretch in the tables, of which the buckets are on their way. `which`: a bit for each.
    #[inline(never)]
    fn search(&mut self, stretch: &Stretch, trains: &mut [Train], which: u64, searched: &mut Searched) {
        let far = match stretch.foretold {
            Some(output) if face(&mut self.far, self.source, output, self.thread) => self.far.as_ref(),
            _ => None,
        };
        let (near, far) = (self.near.as_ref(), far.map(|far| &far.quick));
        let mut missing = 0;
        for t in each(which) {
            let Some(train) = trains.get_mut(t) else { break };
            let here = near.is_none_or(|near| near.locate(&mut train.near));
            let there = far.is_none_or(|far| far.locate(&mut train.far));
            missing |= u64::from(!(here && there)) << t;
        }
        for t in each(missing) {
            let Some(train) = trains.get_mut(t) else { break };
            if let Some(near) = near {
                near.locate_again(&mut train.near);
            }
            if let Some(far) = far {
                far.locate_again(&mut train.far);
            }
        }
        searched.all += which.count_ones();
        searched.elsewhere += missing.count_ones();
    }

    /// The first of these trains did not pass as known connections mostly do: was the flow cache wrong? Asked once (`checked`). True: it was
    /// about some of them, and has been put right.
    #[inline(always)]
    fn doubt(&mut self, checked: &mut bool, stretch: &Stretch, trains: &mut [Train]) -> bool {
        self.guessed != 0
            && !core::mem::replace(checked, true)
            && !trains.is_empty()
            && self.check_guesses(stretch, trains)
    }

    /// Where the flow cache was wrong about trains of a stretch, asks the tables. False: it was not.
    #[inline(never)]
    fn check_guesses(&mut self, stretch: &Stretch, trains: &mut [Train]) -> bool {
        let (near, far, vlan) = (self.near.as_ref(), foretold(&self.far, stretch), stretch.place.vlan);
        let mut wrong = 0u64;
        for (t, train) in trains.iter_mut().enumerate() {
            let is_wrong_near = near.is_some_and(|near| near.is_wrong(&train.near, &train.plain, vlan));
            let is_wrong_far = far.is_some_and(|far| far.is_wrong(&train.far, &train.plain, vlan));
            if train.is_named && (is_wrong_near || is_wrong_far) {
                wrong |= 1 << (t % BURST);
                self.router.flows.forget(train.flow);
                prepare(near, far, train, vlan, false);
            }
        }
        for t in each(wrong) {
            let Some(train) = trains.get_mut(t) else { break };
            relocate(near, far, train);
        }
        wrong != 0
    }

    /// Third pass: past the sender's firewall, and past that of the output.
    fn conduct(&mut self, stretch: &Stretch, trains: &mut [Train]) {
        let mut frames = self.leave(stretch, trains);
        let Some(exit) = self.find_exit(stretch, &mut frames) else { return };
        if exit.is_guarded {
            frames = self.arrive(stretch, exit.output, trains, frames);
        }
        if self.swift != 0 {
            self.is_any_swift = true;
            if self.has_searched {
                self.learn(stretch, trains);
            }
        }
        if frames != 0 {
            self.router.push(exit.output, frames, exit.action);
        }
    }

    /// Tells the flow cache of the connections of trains that it did not know. Only of those that are established: of others there are
    /// often few more packets, as where somebody opens one after the other.
    #[inline(never)]
    fn learn(&mut self, stretch: &Stretch, trains: &[Train]) {
        if stretch.foretold.is_some() && foretold(&self.far, stretch).is_none() {
            return;
        }
        let between = self.between(stretch);
        let (near, far) = (self.near.as_ref(), foretold(&self.far, stretch));
        for train in trains.iter().filter(|train| train.frames() & self.swift != 0) {
            let was_searched =
                near.is_some_and(|_| train.near.was_searched()) || far.is_some_and(|_| train.far.was_searched());
            if was_searched {
                let slots = [near.map_or(0, |_| train.near.slot()), far.map_or(0, |_| train.far.slot())];
                self.router.flows.learn(train.flow, between, slots);
            }
        }
    }

    /// Past the sender's firewall, if there is one. Returns a bit for each frame that may go on.
    fn leave(&mut self, stretch: &Stretch, trains: &mut [Train]) -> u64 {
        let (mut left, mut next, mut alike, mut checked) = (0, 0, false, false);
        self.swift = 0;
        let (link, vlan, verified, dither) =
            (stretch.place.link, stretch.place.vlan, stretch.verify, self.router.dither);
        while let Some(rest) = trains.get_mut(next..).filter(|rest| !rest.is_empty()) {
            if alike || rest.first().is_some_and(|first| !first.is_plain) {
                alike = false;
                self.doubt(&mut checked, stretch, rest);
                let known = self.leave_known(stretch, rest, &mut left);
                next += known;
                if known != 0 {
                    continue;
                }
            }
            let Some(near) = &mut self.near else { return trains.iter().fold(0, |all, train| all | train.frames()) };
            let (count, passed) = near.pass(link.src, vlan, verified, rest, &self.router.facts, u64::MAX, dither);
            // What follows one that does not pass so may well be of its kind.
            alike = true;
            left |= passed;
            self.swift |= passed;
            next += count + 1;
            if self.doubt(&mut checked, stretch, rest.get_mut(count..).unwrap_or_default())
                && has_not_begun(rest, count, passed)
            {
                (next, alike) = (next - 1, false);
                continue;
            }
            let Some(train) = rest.get_mut(count) else { break };
            // The first packet that does not pass so is judged by itself; those behind it may pass then.
            let end = usize::from(train.end);
            let mut i = usize::from(train.first) + (passed & train.frames()).count_ones() as usize;
            while i < end {
                left |= u64::from(self.leaves_slowly(stretch, train, i)) << i;
                i += 1;
                if i == end {
                    break;
                }
                let facts = self.router.facts.get(i..end).unwrap_or_default();
                let Some(near) = &mut self.near else { break };
                let more = near.pass_some(link.src, vlan, verified, train, facts, dither);
                (i..i + more).for_each(|i| left |= 1 << i);
                i += more;
            }
        }
        left
    }

    /// Whether the source's firewall lets frame `i` go, whatever it is.
    #[inline(never)]
    fn leaves_slowly(&mut self, stretch: &Stretch, train: &mut Train, i: usize) -> bool {
        let passes = match self.leaves_known(stretch, train, i, false) {
            Some(passes) => passes,
            None => self.leaves_unknown(stretch, i),
        };
        // The connection may be there now.
        if i + 1 < usize::from(train.end)
            && let Some(near) = &self.near
        {
            near.relocate(&mut train.near);
        }
        passes
    }

    #[inline(never)]
    fn leaves_unknown(&mut self, stretch: &Stretch, i: usize) -> bool {
        let Some(end) = self.source.near_end(stretch.place.vlan) else { return true };
        judge(&mut self.router.stage, self.burst, i, &end, false, self.sender)
    }

    /// Finds where the frames of a stretch go, of which there is a bit for each; those that go elsewhere, or nowhere, have none afterwards.
    #[inline(never)]
    fn find_exit(&mut self, stretch: &Stretch, frames: &mut u64) -> Option<Exit> {
        let (source, place) = (self.source, &stretch.place);
        while *frames != 0 {
            let i = frames.trailing_zeros() as usize;
            match look_up(source, place, stretch.output, i, &mut self.recent, self.sender) {
                Target::None => {}
                Target::Flood => {
                    let vouched = self.vouches();
                    self.router.flood_judged(self.burst, source, i, place, vouched, self.sender);
                }
                Target::Port(output) => {
                    let port = source.forwarding.port(output);
                    if let Some(action) = port.and_then(|port| action(port, place.vlan, place.tag)) {
                        let is_guarded = face(&mut self.far, source, output, self.thread);
                        return Some(Exit { output, action, is_guarded });
                    }
                    self.sender.fail(i, DropReason::NoDestination);
                }
            }
            *frames &= *frames - 1;
        }
        None
    }

    /// The source's firewall verifies checksums: what it lets go, the next one need not.
    fn vouches(&self) -> bool {
        self.near.as_ref().is_some_and(Quick::verifies)
    }

    /// Past the firewall of the output, which was met last. `frames`: a bit for each that wants to; returns those that may.
    fn arrive(&mut self, stretch: &Stretch, output: PortId, trains: &mut [Train], frames: u64) -> u64 {
        let (mut entered, mut next, mut alike, mut checked) = (0, 0, false, false);
        self.swift = 0;
        let (link, vlan, verified, dither) =
            (stretch.place.link, stretch.place.vlan, stretch.verify, self.router.dither);
        if let Some(Far { quick, .. }) = &self.far
            && stretch.foretold != Some(output)
        {
            find_anew(quick, trains, vlan);
        }
        while let Some(rest) = trains.get_mut(next..).filter(|rest| !rest.is_empty()) {
            if alike || rest.first().is_some_and(|first| !first.is_plain) {
                alike = false;
                self.doubt(&mut checked, stretch, rest);
                let known = self.arrive_known(stretch, output, rest, frames, &mut entered);
                next += known;
                if known != 0 {
                    continue;
                }
            }
            let Some(Far { quick, .. }) = &mut self.far else { break };
            let (count, passed) = quick.pass(link.dst, vlan, verified, rest, &self.router.facts, frames, dither);
            alike = true;
            entered |= passed;
            self.swift |= passed;
            next += count + 1;
            if self.doubt(&mut checked, stretch, rest.get_mut(count..).unwrap_or_default())
                && has_not_begun(rest, count, passed)
            {
                (next, alike) = (next - 1, false);
                continue;
            }
            let Some(train) = rest.get_mut(count) else { break };
            // As on the way out.
            let end = usize::from(train.end);
            let mut i = usize::from(train.first) + (passed & train.frames()).count_ones() as usize;
            while i < end {
                if frames >> i & 1 == 0 {
                    i += 1;
                    continue;
                }
                entered |= u64::from(self.arrives_slowly(stretch, train, i, output)) << i;
                i += 1;
                if i == end {
                    break;
                }
                let wanting = (frames >> (i % 64)).trailing_ones() as usize;
                let facts = self.router.facts.get(i..end.min(i + wanting)).unwrap_or_default();
                let Some(Far { quick, .. }) = &mut self.far else { break };
                let more = quick.pass_some(link.dst, vlan, verified, train, facts, dither);
                (i..i + more).for_each(|i| entered |= 1 << i);
                i += more;
            }
        }
        entered
    }

    #[inline(never)]
    fn arrives_slowly(&mut self, stretch: &Stretch, train: &mut Train, i: usize, output: PortId) -> bool {
        let (source, vlan, vouched) = (self.source, stretch.place.vlan, self.vouches());
        let passes = match self.arrives_known(stretch, train, i, output, false) {
            Some(passes) => passes,
            None => source
                .forwarding
                .port(output)
                .is_none_or(|port| self.router.admit(self.burst, source, i, vlan, vouched, port, self.sender)),
        };
        // The connection may be there now.
        if i + 1 < usize::from(train.end)
            && let Some(Far { quick, .. }) = self.far.as_ref().filter(|far| far.output == output)
        {
            quick.relocate(&mut train.far);
        }
        passes
    }

    fn settle(&mut self) {
        self.router.flows.note_known(self.guessed);
        (self.router.flow_cache_hits, self.router.flow_cache_misses) = (self.guessed, self.searched);
        if let Some(near) = &self.near {
            near.settle();
        }
        if let Some(far) = &self.far {
            far.quick.settle();
        }
    }
}

/// Trains whose connections the flow cache did not know.
#[derive(Default)]
struct Searched {
    /// All that were searched.
    all: u32,
    /// Those of which an entry is not where it most probably would be, or nowhere.
    elsewhere: u32,
}

/// The bits that are set.
fn each(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let next = bits.trailing_zeros() as usize;
        (bits != 0).then(|| bits &= bits - 1).map(|()| next)
    })
}

/// The firewall of the port that the frames of a stretch will probably go to, if it is the one that was met last.
#[inline(always)]
fn foretold<'f, 'a>(far: &'f Option<Far<'a>>, stretch: &Stretch) -> Option<&'f Quick<'a, false>> {
    far.as_ref().filter(|far| stretch.foretold == Some(far.output)).map(|far| &far.quick)
}

/// First step of a search for a train's entries in the tables: fetches the buckets.
#[inline(always)]
fn prepare(near: Option<&Quick<'_, true>>, far: Option<&Quick<'_, false>>, train: &mut Train, vlan: u16, both: bool) {
    match (near, far) {
        (Some(near), Some(far)) => {
            let ends = near.ends(&train.plain);
            train.near = near.prepare(ends, &train.plain, vlan, both);
            train.far = far.prepare(ends.turned(), &train.plain, vlan, both);
        }
        (Some(near), None) => train.near = near.prepare(near.ends(&train.plain), &train.plain, vlan, both),
        (None, Some(far)) => train.far = far.prepare(far.ends(&train.plain), &train.plain, vlan, both),
        (None, None) => {}
    }
}

/// None of the frames of train `t` is among those that passed.
#[inline(always)]
fn has_not_begun(trains: &[Train], t: usize, passed: u64) -> bool {
    trains.get(t).is_some_and(|train| train.frames() & passed == 0)
}

/// All other steps of it, for a train.
#[inline(always)]
fn relocate(near: Option<&Quick<'_, true>>, far: Option<&Quick<'_, false>>, train: &mut Train) {
    if let Some(near) = near {
        near.relocate(&mut train.near);
    }
    if let Some(far) = far {
        far.relocate(&mut train.far);
    }
}

/// Looks for the entries of trains' connections behind an output that was not foretold.
#[inline(never)]
fn find_anew(quick: &Quick<'_, false>, trains: &mut [Train], vlan: u16) {
    for train in trains.iter_mut().filter(|train| train.is_named) {
        train.far = quick.prepare(quick.ends(&train.plain), &train.plain, vlan, false);
    }
    for train in trains.iter_mut().filter(|train| train.is_named) {
        quick.relocate(&mut train.far);
    }
}

/// Makes `far` the firewall of `output`. False when there is none that judges: who takes a diverted frame in judges it.
#[inline(always)]
fn face<'a, T>(far: &mut Option<Far<'a>>, source: &Source<'a, T>, output: PortId, thread: usize) -> bool {
    match far {
        Some(far) if far.output == output => true,
        _ => face_another(far, source, output, thread),
    }
}

#[inline(never)]
fn face_another<'a, T>(far: &mut Option<Far<'a>>, source: &Source<'a, T>, output: PortId, thread: usize) -> bool {
    let Some(port) = source.forwarding.port(output).filter(|port| port.divert.is_none()) else { return false };
    let Some(firewall) = &port.firewall else { return false };
    let quick = Quick::new(firewall, thread, source.now_ns);
    if let Some(former) = far.replace(Far { output, quick }) {
        former.quick.settle();
    }
    true
}
