//! Routing where ports of the bridge have firewalls.
//!
//! A burst is cut into trains: consecutive plain packets between the same two ends, which are judged together, at the sender's firewall
//! and at the receiver's; what is not plain is a train of its own. Three passes over the trains, so that the cache lines of the connection
//! tables are on their way while other trains are looked at: what each is ([`Passage::look_at`]), where its entries are
//! ([`Passage::locate`]), what becomes of it ([`Passage::conduct`]). Plain packets take the short way ([`crate::enforce::quick`]), all
//! others [`crate::enforce::stage`].
use super::{
    Place, Recent, Router, Source, Target, accept_checksum, action, classify_any, judge, look_up, owes_work, untagged,
};
use crate::bridge::fdb::PortId;
use crate::conntrack::{Plain, Reading, Toward, next_dither};
use crate::counters::DropReason;
use crate::enforce::quick::{Prospect, Quick};
use crate::enforce::stage::End;
use crate::frame::{BURST, RxBurst};
use crate::offload::VlanAction;
use crate::output::Sender;
use crate::packet::ethernet;
use crate::packet::{MacAddr, VlanTag};
use crate::port::TxPort;

/// Bursts of so many trains tell how many entries are not where they most probably are.
const TELLING: usize = 8;

/// Frames `first..end` of a burst.
#[derive(Clone, Copy, Default)]
pub(super) struct Train {
    first: u8,
    end: u8,
    /// They are plain packets between the same ends; otherwise it is one frame.
    is_plain: bool,
    /// Their connection can be named, so that its entries can be fetched into the cache.
    is_named: bool,
    /// Their checksums are right, or somebody vouches for them.
    verified: bool,
    /// The port they will probably go to, if that has a firewall.
    foretold: Option<PortId>,
    place: Place,
    /// The first packet.
    plain: Plain,
    /// Where their connection probably is in the table of the VM that they come from, and of that behind `foretold`.
    near: Prospect,
    far: Prospect,
}

/// The firewall of the output that was met last.
struct Far<'a> {
    output: PortId,
    quick: Quick<'a, false>,
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
    /// What is done on the way out to frames that go where `recent` says, if they have this tag.
    exit: Option<(Option<VlanTag>, VlanAction)>,
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
        let mut trains = core::mem::take(&mut self.trains);
        let near = source.port.firewall.as_ref().map(|fw| Quick::new(fw, thread, source.now_ns));
        let mut passage =
            Passage { router: self, burst, sender, source, thread, near, far: None, recent: None, exit: None };
        let count = passage.look_at(&mut trains);
        let some = trains.get_mut(..count).unwrap_or_default();
        passage.locate(some);
        for train in some {
            passage.conduct(train);
        }
        passage.settle();
        self.trains = trains;
    }

    /// An evenly distributed number for frame `i` at one end.
    #[inline(always)]
    fn dither_of(&self, i: usize, end: u32) -> u32 {
        (i as u32 * 2 + end).wrapping_mul(0x9e37_79b9) ^ self.dither
    }
}

impl<'a, T: TxPort> Passage<'_, 'a, T> {
    /// First pass: what each frame is, and the buckets of the tables that it will be looked up in. Returns the number of trains.
    #[inline(never)]
    fn look_at(&mut self, trains: &mut [Train]) -> usize {
        let Self { router, burst, sender, source, thread, near, far, .. } = self;
        let untagged_vlan = source.port.vlan.ingress(None);
        let near_verifies = near.as_ref().is_some_and(Quick::verifies);
        let mut foretold: Option<(MacAddr, u16, Option<PortId>)> = None;
        let (mut verify, both) = (false, router.both_buckets);
        let mut count = 0;
        let mut free = trains.iter_mut();
        let mut open: Option<&mut Train> = None;
        for (i, facts) in (0..burst.len()).zip(router.facts.iter_mut()) {
            let seen = match see(burst, i, untagged_vlan) {
                Some(seen) => seen,
                None => match see_any(burst, i, source, sender) {
                    Some(seen) => seen,
                    None => continue,
                },
            };
            let Seen { place, plain, vouched, reading } = seen;
            let mut is_plain = reading == Reading::Plain;
            *facts = plain.facts;
            if is_plain
                && let Some(train) = &mut open
                && usize::from(train.end) == i
                && train.joins(&place, &plain)
            {
                if vouched || !verify || checksum_ok(burst, i, plain) {
                    train.end = i as u8 + 1;
                    continue;
                }
                is_plain = false;
            }
            let Some(train) = free.next() else { break };
            count += 1;
            (train.first, train.end) = (i as u8, i as u8 + 1);
            train.place = place;
            train.is_plain = is_plain;
            train.is_named = reading != Reading::Other;
            if train.is_named {
                let (dst, vlan) = (place.link.dst, place.vlan);
                let output = match foretold {
                    Some((d, v, output)) if d == dst && v == vlan => output,
                    _ => {
                        let output = source.bridge.fdb.lookup(vlan, dst, source.now_s());
                        let output = output.filter(|&output| face(far, source, output, *thread));
                        foretold = Some((dst, vlan, output));
                        output
                    }
                };
                train.plain = plain;
                train.foretold = output;
                verify = near_verifies;
                let mut ends = None;
                if let Some(near) = near {
                    let own = near.ends(&plain);
                    train.near = near.prepare(own, &plain, vlan, both);
                    ends = Some(own);
                }
                if let Some(output) = output
                    && face(far, source, output, *thread)
                    && let Some(Far { quick, .. }) = far
                {
                    let ends = ends.unwrap_or_else(|| quick.ends(&plain));
                    train.far = quick.prepare(ends, &plain, vlan, both);
                    verify |= quick.verifies();
                }
                train.verified = verify;
                train.is_plain = is_plain && (vouched || !verify || checksum_ok(burst, i, plain));
            }
            open = Some(train);
        }
        count
    }

    /// Second pass: the tables' entries.
    #[inline(never)]
    fn locate(&mut self, trains: &mut [Train]) {
        let Self { router, source, thread, near, far, .. } = self;
        let mut missing = 0u64;
        for (t, train) in trains.iter_mut().enumerate().filter(|(_, train)| train.is_named) {
            let mut found = true;
            if let Some(near) = near {
                found &= near.locate(&mut train.near);
            }
            if let Some(output) = train.foretold
                && face(far, source, output, *thread)
                && let Some(Far { quick, .. }) = far
            {
                found &= quick.locate(&mut train.far);
            }
            missing |= u64::from(!found) << (t % BURST);
        }
        // In a full table many are where they less probably are, and new ones are in neither place.
        if trains.len() >= TELLING {
            router.both_buckets = missing.count_ones() as usize * 8 > trains.len();
        }
        while missing != 0 {
            let t = missing.trailing_zeros() as usize;
            missing &= missing - 1;
            let Some(train) = trains.get_mut(t) else { break };
            if let Some(near) = near {
                near.locate_again(&mut train.near);
            }
            if let Some(output) = train.foretold
                && face(far, source, output, *thread)
                && let Some(Far { quick, .. }) = far
            {
                quick.locate_again(&mut train.far);
            }
        }
    }

    /// Third pass: past the sender's firewall, and on to [`Self::forward`].
    #[inline]
    fn conduct(&mut self, train: &mut Train) {
        let (mut i, end) = (usize::from(train.first), usize::from(train.end));
        if self.near.is_none() {
            self.forward(train, i, end, false);
            return;
        }
        while i < end {
            let passed = self.leave(train, i, end);
            if passed == 0 {
                let passes = self.leaves_slowly(i, train.place.vlan);
                // The connection may be there now.
                if i + 1 < end
                    && let Some(near) = &self.near
                {
                    near.relocate(&mut train.near);
                }
                if !passes {
                    i += 1;
                    continue;
                }
            }
            let next = i + passed.max(1);
            // What was not verified there is not vouched for at the other end.
            let vouched = self.near.as_ref().is_some_and(Quick::verifies);
            self.forward(train, i, next, vouched);
            i = next;
        }
    }

    /// How many of the frames `from..to` the source's firewall lets go at once.
    #[inline(always)]
    fn leave(&mut self, train: &Train, from: usize, to: usize) -> usize {
        let dither = self.router.dither_of(from, 0);
        let Some(facts) = self.router.facts.get(from..to).filter(|_| train.is_plain) else { return 0 };
        let Some(near) = &mut self.near else { return 0 };
        let Train { place, plain, near: prospect, verified, .. } = train;
        near.passes(place.link.src, place.vlan, plain, facts, prospect, *verified, dither)
    }

    #[inline(never)]
    fn leaves_slowly(&mut self, i: usize, vlan: u16) -> bool {
        let source = self.source;
        let Some(firewall) = &source.port.firewall else { return true };
        let end = End {
            firewall,
            port: source.port.id,
            ingress: source.port.id,
            // An answer to what the VM's own rules reject concerns no connection of the VM.
            ingress_guarded: false,
            toward: Toward::Egress,
            vlan,
            now_ns: source.now_ns,
        };
        judge(&mut self.router.stage, self.burst, i, &end, false, self.sender)
    }

    /// Finds where the frames `from..to` go, past the firewall there.
    #[inline(always)]
    fn forward(&mut self, train: &mut Train, from: usize, to: usize, vouched: bool) {
        let Place { link, vlan, tag, .. } = train.place;
        if let Some(recent) = self.recent
            && let Some((of, action)) = self.exit
            && recent.link == link
            && recent.vlan == vlan
            && of == tag
        {
            self.enter(train, from, to, recent.output, action, vouched);
        } else {
            self.forward_anew(train, from, to, vouched);
        }
    }

    /// The same, when those before went elsewhere.
    #[inline(never)]
    fn forward_anew(&mut self, train: &mut Train, from: usize, to: usize, vouched: bool) {
        let Place { vlan, tag, .. } = train.place;
        for i in from..to {
            self.exit = None;
            match look_up(self.source, &train.place, i, &mut self.recent, self.sender) {
                Target::None => {}
                Target::Flood => {
                    self.router.flood_judged(self.burst, self.source, i, &train.place, vouched, self.sender);
                }
                Target::Port(output) => {
                    let action = self.source.forwarding.port(output).and_then(|port| action(port, vlan, tag));
                    match action {
                        Some(action) => {
                            self.exit = Some((tag, action));
                            self.enter(train, i, to, output, action, vouched);
                        }
                        None => (i..to).for_each(|i| self.sender.fail(i, DropReason::NoDestination)),
                    }
                    return;
                }
            }
        }
    }

    /// Past the firewall of the output, if it has one, and into its batch.
    #[inline(always)]
    fn enter(&mut self, train: &mut Train, from: usize, to: usize, output: PortId, action: VlanAction, vouched: bool) {
        let mut i = from;
        while i < to {
            let passed = self.arrive(train, i, to, output);
            if passed == 0 {
                if self.arrives_slowly(train, i, output, vouched) {
                    self.router.push_run(output, i, i + 1, action);
                }
                if i + 1 < to
                    && let Some(Far { quick, .. }) = self.far.as_ref().filter(|far| far.output == output)
                {
                    quick.relocate(&mut train.far);
                }
                i += 1;
                continue;
            }
            self.router.push_run(output, i, i + passed, action);
            i += passed;
        }
    }

    /// How many of the frames `from..to` the output's firewall lets in at once.
    #[inline(always)]
    fn arrive(&mut self, train: &mut Train, from: usize, to: usize, output: PortId) -> usize {
        let dither = self.router.dither_of(from, 1);
        let Some(facts) = self.router.facts.get(from..to).filter(|_| train.is_plain) else { return 0 };
        if !face(&mut self.far, self.source, output, self.thread) {
            return 0;
        }
        let Some(Far { quick, .. }) = &mut self.far else { return 0 };
        if train.foretold != Some(output) {
            train.far = quick.prepare(quick.ends(&train.plain), &train.plain, train.place.vlan, false);
            quick.relocate(&mut train.far);
            train.foretold = Some(output);
        }
        let Train { place, plain, far: prospect, verified, .. } = train;
        quick.passes(place.link.dst, place.vlan, plain, facts, prospect, *verified, dither)
    }

    #[inline(never)]
    fn arrives_slowly(&mut self, train: &Train, i: usize, output: PortId, vouched: bool) -> bool {
        let source = self.source;
        let port = source.forwarding.port(output);
        port.is_none_or(|port| self.router.admit(self.burst, source, i, train.place.vlan, vouched, port, self.sender))
    }

    fn settle(self) {
        if let Some(near) = self.near {
            near.settle();
        }
        if let Some(far) = self.far {
            far.quick.settle();
        }
    }
}

impl Train {
    /// A plain packet is one more of it.
    #[inline(always)]
    fn joins(&self, place: &Place, plain: &Plain) -> bool {
        let (own, other) = (&self.place, place);
        self.is_plain
            && own.link == other.link
            && own.vlan == other.vlan
            && own.tag == other.tag
            && self.plain.same_talk(plain)
    }
}

/// What is seen of a frame.
struct Seen {
    place: Place,
    /// As far as `reading` says.
    plain: Plain,
    reading: Reading,
    /// The port that it came from vouches for its checksum, or it has none, or it is yet to be computed.
    vouched: bool,
}

/// What an untagged frame without special wishes is, and its packet if it is plain. `None`: to be classified.
#[inline(always)]
fn see(burst: &mut RxBurst, i: usize, untagged_vlan: Option<u16>) -> Option<Seen> {
    let (head, meta) = burst.frame_mut(i)?;
    let have = usize::from(meta.snapshot_len);
    let (link, ethertype) = untagged(head, have)?;
    let vlan = untagged_vlan?;
    // In registers: copied from memory, it would be waited for.
    let mut plain = Plain::default();
    let reading = plain.read(head, have, meta.len as usize, ethernet::HEADER_BYTES, ethertype);
    if owes_work(meta) && !(reading == Reading::Plain && accept_checksum(meta, &plain)) {
        return None;
    }
    let vouched = meta.offload.needs_csum || meta.offload.csum_valid || !plain.is_summed();
    let l3 = ethernet::HEADER_BYTES as u16;
    Some(Seen { place: Place { link, vlan, tag: None, l3, ethertype }, plain, reading, vouched })
}

/// As [`see`], of any frame. `None`: dropped.
#[inline(never)]
fn see_any<T>(burst: &mut RxBurst, i: usize, source: &Source<'_, T>, sender: &mut Sender) -> Option<Seen> {
    let place = classify_any(burst, i, source.port, sender)?;
    let (head, have) = burst.head(i);
    let meta = burst.meta(i)?;
    let mut plain = Plain::default();
    let reading = plain.read(head, have, meta.len as usize, usize::from(place.l3), place.ethertype);
    let vouched = meta.offload.needs_csum || meta.offload.csum_valid || !plain.is_summed();
    Some(Seen { place, plain, reading, vouched })
}

#[inline(never)]
fn checksum_ok(burst: &RxBurst, i: usize, packet: Plain) -> bool {
    let (head, have) = burst.head(i);
    let Some((_, _, body)) = burst.parts(i) else { return false };
    packet.checksum_ok(head, have, &body)
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
