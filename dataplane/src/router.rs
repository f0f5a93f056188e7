//! From received frames to one batch per output: classify each frame (source checks, VLAN), judge what comes from a VM, learn and look
//! up the output, judge what goes to a VM.
//!
//! Where no firewall is involved each frame goes straight through. Otherwise a burst is worked on in three passes, so that the cache
//! lines of the connection tables are on their way while other frames are looked at; plain packets take the short way
//! ([`crate::enforce::quick`]), all others [`crate::enforce::stage`].
use crate::bridge::fdb::{MAX_PORTS, PortId};
use crate::bridge::vlan::Egress;
use crate::bridge::{BridgeEntry, Forwarding, PortEntry};
use crate::conntrack::{Plain, Toward, next_dither};
use crate::counters::DropReason;
use crate::enforce::pending::{Next, PendingFrame};
use crate::enforce::quick::{Prospect, Quick};
use crate::enforce::stage::{End, Outcome, Stage};
use crate::frame::{BURST, FrameMeta, Gso, MAX_FRAME_BYTES, Offload, RxBurst, SNAPSHOT_BYTES};
use crate::offload::{BadOffload, VlanAction, validate};
use crate::output::{Batch, Sender};
use crate::packet::ethernet;
use crate::packet::{self, EtherType, MacAddr, ParseError, Tci, Tpid, VlanId, VlanTag};
use crate::port::TxPort;
use crate::qsbr::Guard;

/// Verdicts of one burst, and the batches per output that it was sorted into.
pub(crate) struct Router {
    batches: Box<[Batch]>,
    /// Outputs with a batch that is not empty.
    active: Vec<PortId>,
    pub stage: Stage,
    /// What is known of each frame of the burst.
    places: Box<[Place; BURST]>,
    dither: u32,
}

/// Where the frames of one source go: the last decision, because consecutive frames mostly share it.
#[derive(Clone, Copy)]
struct Recent {
    src: MacAddr,
    dst: MacAddr,
    vlan: u16,
    output: PortId,
}

impl Recent {
    #[inline(always)]
    fn is_of(&self, src: MacAddr, dst: MacAddr, vlan: u16) -> bool {
        self.src == src && self.dst == dst && self.vlan == vlan
    }
}

/// How a frame leaves.
#[derive(Clone, Copy)]
struct Way {
    output: PortId,
    action: VlanAction,
}

/// An untagged frame's addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Link {
    dst: MacAddr,
    src: MacAddr,
}

/// Where a frame is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Target {
    /// Nowhere (any more).
    #[default]
    None,
    /// To one port.
    Port(PortId),
    /// To all other ports of its VLAN.
    Flood,
}

/// What is known of a frame on its way.
#[derive(Clone, Copy)]
struct Place {
    src: MacAddr,
    dst: MacAddr,
    /// VLAN of the bridge.
    vlan: u16,
    tag: Option<VlanTag>,
    /// Where the network header begins, bytes.
    l3: u16,
    ethertype: EtherType,
    /// The packet, if it is plain and a firewall will ask.
    plain: Plain,
    is_plain: bool,
    /// Where its connection probably is in the table of the VM that it comes from, and of that behind `foretold`.
    near: Prospect,
    far: Prospect,
    /// The port it will probably go to, if that has a firewall.
    foretold: Option<PortId>,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            src: MacAddr::ZERO,
            dst: MacAddr::ZERO,
            vlan: 0,
            tag: None,
            l3: 0,
            ethertype: EtherType(0),
            plain: Plain::default(),
            is_plain: false,
            near: Prospect::NONE,
            far: Prospect::NONE,
            foretold: None,
        }
    }
}

/// The firewall of the output that was met last.
struct Far<'a> {
    output: PortId,
    quick: Quick<'a>,
}

/// The facts that all frames of a burst share.
struct Source<'a, T> {
    forwarding: &'a Forwarding<T>,
    port: &'a PortEntry<T>,
    bridge: &'a BridgeEntry,
    now_ns: u64,
}

impl<T> Source<'_, T> {
    #[inline]
    fn now_s(&self) -> u32 {
        (self.now_ns / 1_000_000_000) as u32
    }
}

fn source<T>(forwarding: Option<&Forwarding<T>>, ingress: PortId, now_ns: u64) -> Option<Source<'_, T>> {
    let forwarding = forwarding?;
    let port = forwarding.port(ingress).filter(|port| port.admin_up)?;
    Some(Source { forwarding, port, bridge: port.bridge.as_deref()?, now_ns })
}

impl Router {
    pub fn new(stage: Stage) -> Self {
        Self {
            batches: (0..MAX_PORTS).map(|_| Batch::default()).collect(),
            active: Vec::with_capacity(MAX_PORTS),
            stage,
            places: Box::new([Place::default(); BURST]),
            dither: 0x9e37_79b9,
        }
    }

    /// Takes the burst from snapshot to batches; what is left is to send them ([`Self::send`], by the picture that is returned, if any),
    /// to release and to settle. `thread`: this thread's number.
    #[inline]
    pub fn decide<'f, T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        forwarding: Option<&'f Forwarding<T>>,
        ingress: PortId,
        thread: usize,
        now_ns: u64,
        sender: &mut Sender,
    ) -> Option<&'f Forwarding<T>> {
        sender.begin();
        let Some(source) = source(forwarding, ingress, now_ns) else {
            sender.fail_all(DropReason::RxDisabled);
            return None;
        };
        burst.take_snapshots();
        if source.bridge.guarded {
            self.route_guarded(burst, &source, thread, sender);
        } else {
            self.route(burst, &source, sender);
        }
        Some(source.forwarding)
    }

    /// Sends the batches.
    #[inline]
    pub fn send<T: TxPort>(&mut self, guard: &Guard, burst: &RxBurst, forwarding: &Forwarding<T>, sender: &mut Sender) {
        sender.send_all(guard, burst, forwarding, &mut self.batches, &mut self.active);
    }

    /// Decides for every frame of the burst where no firewall is involved: each goes straight through.
    fn route<T: TxPort>(&mut self, burst: &mut RxBurst, source: &Source<'_, T>, sender: &mut Sender) {
        let mut recent = None;
        let frames = burst.len().min(BURST);
        let mut i = 0;
        while i < frames {
            let (head, have) = burst.head(i);
            let link = untagged(head, have);
            let mut way = None;
            if let Some(place) = classify(burst, i, source.port, sender) {
                way = self.route_one(burst, source, &place, i, &mut recent, sender);
            }
            i += 1;
            // Those behind it that go the same way.
            if let (Some(Way { output, action }), Some((link, _))) = (way, link) {
                let first = i;
                while i < frames && follows(burst, i, link) {
                    i += 1;
                }
                if let Some(batch) = self.batches.get_mut(usize::from(output)) {
                    batch.push_run(first, i, action);
                }
            }
        }
    }

    /// Decides for one frame, whatever it is. Returns where frames with the same link header go as well.
    #[inline(never)]
    fn route_one<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        place: &Place,
        i: usize,
        recent: &mut Option<Recent>,
        sender: &mut Sender,
    ) -> Option<Way> {
        match look_up(source, place, i, recent, sender) {
            Target::None => None,
            Target::Flood => {
                self.flood(burst, source, i, place, sender);
                None
            }
            Target::Port(output) => {
                let action = self.output(source.forwarding, i, output, place.vlan, place.tag, sender)?;
                Some(Way { output, action })
            }
        }
    }

    /// The same where ports of the bridge have firewalls.
    fn route_guarded<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        thread: usize,
        sender: &mut Sender,
    ) {
        let mut near = source.port.firewall.as_ref().map(|fw| Quick::new(fw, Toward::Egress, thread, source.now_ns));
        let mut far: Option<Far<'_>> = None;
        self.dither = next_dither(self.dither);
        let alive = self.look_at(burst, source, near.as_ref(), &mut far, thread, sender);
        self.locate(source, alive, near.as_ref(), &mut far, thread);
        let mut recent: Option<Recent> = None;
        let mut exit: Option<(VlanAction, Option<VlanTag>)> = None;
        for i in bits(alive) {
            let mut vouched = false;
            if let Some(near) = &mut near {
                if !self.leaves(burst, source, i, near, sender) {
                    continue;
                }
                // What was not verified there is not vouched for here.
                vouched = near.verifies();
            }
            let Some(place) = self.places.get(i) else { continue };
            let (src, dst, vlan, tag) = (place.src, place.dst, place.vlan, place.tag);
            if let (Some(recent), Some((action, of))) = (recent, exit)
                && recent.is_of(src, dst, vlan)
                && of == tag
            {
                if self.enters(burst, source, i, recent.output, vouched, &mut far, thread, sender) {
                    self.push(recent.output, i, action);
                }
                continue;
            }
            exit = None;
            match look_up(source, place, i, &mut recent, sender) {
                Target::None => {}
                Target::Flood => {
                    let place = *place;
                    self.flood_judged(burst, source, i, &place, vouched, sender);
                }
                Target::Port(output) => {
                    if self.enters(burst, source, i, output, vouched, &mut far, thread, sender) {
                        let action = self.output(source.forwarding, i, output, vlan, tag, sender);
                        exit = action.map(|action| (action, tag));
                    }
                }
            }
        }
        if let Some(near) = near {
            near.settle();
        }
        if let Some(far) = far {
            far.quick.settle();
        }
    }

    /// First pass: what each frame is, and the buckets of the tables that it will be looked up in. Returns which frames go on.
    #[inline(never)]
    fn look_at<'a, T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'a, T>,
        near: Option<&Quick<'a>>,
        far: &mut Option<Far<'a>>,
        thread: usize,
        sender: &mut Sender,
    ) -> u64 {
        let mut alive = 0u64;
        let mut foretold: Option<(MacAddr, u16, Option<PortId>)> = None;
        let untagged_vlan = source.port.vlan.ingress(None);
        for (i, place) in self.places.iter_mut().enumerate().take(burst.len()) {
            if !see(burst, i, untagged_vlan, place) {
                let Some(classified) = classify_any(burst, i, source.port, sender) else { continue };
                let (l3, ethertype) = (usize::from(classified.l3), classified.ethertype);
                *place = classified;
                let (head, have) = burst.head(i);
                let len = burst.meta(i).map_or(0, |meta| meta.len);
                place.is_plain = place.plain.read(head, have, len as usize, l3, ethertype);
            }
            alive |= 1 << i;
            if !place.is_plain {
                continue;
            }
            let (dst, vlan) = (place.dst, place.vlan);
            if let Some(near) = near {
                place.near = near.prepare(&place.plain, vlan);
            }
            let output = match foretold {
                Some((d, v, output)) if d == dst && v == vlan => output,
                _ => {
                    let output = source.bridge.fdb.lookup(vlan, dst, source.now_s());
                    let output = output.filter(|&output| face(far, source, output, thread));
                    foretold = Some((dst, vlan, output));
                    output
                }
            };
            place.foretold = output;
            if let Some(far) = far
                && output == Some(far.output)
            {
                place.far = far.quick.prepare(&place.plain, vlan);
            }
        }
        alive
    }

    /// Second pass: the tables' entries.
    #[inline(never)]
    fn locate<'a, T: TxPort>(
        &mut self,
        source: &Source<'a, T>,
        alive: u64,
        near: Option<&Quick<'a>>,
        far: &mut Option<Far<'a>>,
        thread: usize,
    ) {
        for i in bits(alive) {
            let Some(place) = self.places.get_mut(i).filter(|place| place.is_plain) else { continue };
            if let Some(near) = near {
                near.locate(&mut place.near);
            }
            if let Some(output) = place.foretold
                && face(far, source, output, thread)
                && let Some(far) = far
            {
                far.quick.locate(&mut place.far);
            }
        }
    }

    /// An evenly distributed number for frame `i` at one end.
    #[inline(always)]
    fn dither_of(&self, i: usize, end: u32) -> u32 {
        (i as u32 * 2 + end).wrapping_mul(0x9e37_79b9) ^ self.dither
    }

    /// The source's firewall lets frame `i` go.
    #[inline(always)]
    fn leaves<T>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        near: &mut Quick<'_>,
        sender: &mut Sender,
    ) -> bool {
        let dither = self.dither_of(i, 0);
        let Some(place) = self.places.get(i) else { return false };
        if place.is_plain && near.passes(burst, i, place.src, place.vlan, &place.plain, &place.near, false, dither) {
            return true;
        }
        let vlan = place.vlan;
        self.leaves_slowly(burst, source, i, vlan, sender)
    }

    #[inline(never)]
    fn leaves_slowly<T>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        vlan: u16,
        sender: &mut Sender,
    ) -> bool {
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
        judge(&mut self.stage, burst, i, &end, false, sender)
    }

    /// The firewall of the output, if it has one, lets frame `i` in.
    #[expect(clippy::too_many_arguments, reason = "facts of one frame; inlined")]
    #[inline(always)]
    fn enters<'a, T>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'a, T>,
        i: usize,
        output: PortId,
        vouched: bool,
        far: &mut Option<Far<'a>>,
        thread: usize,
        sender: &mut Sender,
    ) -> bool {
        let dither = self.dither_of(i, 1);
        let Some(place) = self.places.get_mut(i) else { return false };
        if place.is_plain
            && face(far, source, output, thread)
            && let Some(Far { quick, .. }) = far
        {
            if place.foretold != Some(output) {
                place.far = quick.prepare(&place.plain, place.vlan);
                quick.locate(&mut place.far);
            }
            if quick.passes(burst, i, place.dst, place.vlan, &place.plain, &place.far, vouched, dither) {
                return true;
            }
        }
        let (vlan, port) = (place.vlan, source.forwarding.port(output));
        port.is_none_or(|port| self.admit(burst, source, i, vlan, vouched, port, sender))
    }

    /// The second half of [`Self::route_guarded`] for one frame that no firewall is to judge at its source.
    #[cold]
    fn route_judged<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        sender: &mut Sender,
    ) {
        match look_up(source, place, i, &mut None, sender) {
            Target::None => {}
            Target::Flood => self.flood(burst, source, i, place, sender),
            Target::Port(output) => {
                let port = source.forwarding.port(output);
                if port.is_none_or(|port| self.admit(burst, source, i, place.vlan, false, port, sender)) {
                    self.output(source.forwarding, i, output, place.vlan, place.tag, sender);
                }
            }
        }
    }

    /// The firewall of an output port, if it has one, lets frame `i` in, whatever it is.
    #[expect(clippy::too_many_arguments, reason = "facts of one frame")]
    #[inline(never)]
    fn admit<T>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        vlan: u16,
        vouched: bool,
        port: &PortEntry<T>,
        sender: &mut Sender,
    ) -> bool {
        // Who takes a diverted frame in judges it.
        let Some(firewall) = port.firewall.as_ref().filter(|_| port.divert.is_none()) else { return true };
        let end = End {
            firewall,
            port: port.id,
            ingress: source.port.id,
            ingress_guarded: source.port.firewall.is_some(),
            toward: Toward::Ingress,
            vlan,
            now_ns: source.now_ns,
        };
        judge(&mut self.stage, burst, i, &end, vouched, sender)
    }

    /// Goes on with frames that are not in a port's memory, each where [`PendingFrame::next`] says.
    #[cold]
    pub fn resume<T: TxPort>(
        &mut self,
        guard: &Guard,
        burst: &mut RxBurst,
        frames: &[PendingFrame],
        forwarding: Option<&Forwarding<T>>,
        now_ns: u64,
        sender: &mut Sender,
    ) {
        sender.begin();
        sender.fail_all(DropReason::RxDisabled);
        burst.take_snapshots();
        for (i, frame) in frames.iter().enumerate().take(burst.len().min(BURST)) {
            match frame.next {
                Next::Forward { ingress } => {
                    if let Some(source) = source(forwarding, ingress, now_ns)
                        && let Some(place) = classify(burst, i, source.port, sender)
                    {
                        self.route_judged(burst, &source, i, &place, sender);
                    }
                }
                Next::ToPort { output, vlan, judge } => {
                    // The port itself stands for the source: an answer has none.
                    if let Some(source) = source(forwarding, output, now_ns) {
                        let tag = packet::parse_l2(burst.snapshot(i), burst.snapshot(i).len() as u32).ok();
                        let tag = tag.and_then(|l2| l2.vlan);
                        if !judge || self.admit(burst, &source, i, vlan, false, source.port, sender) {
                            self.output(source.forwarding, i, output, vlan, tag, sender);
                        }
                    }
                }
            }
        }
        if let Some(forwarding) = forwarding {
            sender.send_all(guard, burst, forwarding, &mut self.batches, &mut self.active);
        }
    }

    /// Puts frame `i` into the batch of a port that has one already.
    #[inline(always)]
    fn push(&mut self, output: PortId, i: usize, action: VlanAction) {
        if let Some(batch) = self.batches.get_mut(usize::from(output)) {
            batch.push(i, action);
        }
    }

    /// Puts frame `i` into the batch of one port. `None`, when the port does not carry the VLAN.
    #[inline]
    fn output<T: TxPort>(
        &mut self,
        forwarding: &Forwarding<T>,
        i: usize,
        output: PortId,
        vlan: u16,
        tag: Option<VlanTag>,
        sender: &mut Sender,
    ) -> Option<VlanAction> {
        let sent = forwarding.port(output).and_then(|port| self.enqueue(port, i, vlan, tag));
        if sent.is_none() {
            sender.fail(i, DropReason::NoDestination);
        }
        sent
    }

    /// Puts frame `i` into the batch of every other port of its VLAN that lets it in.
    fn flood<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        sender: &mut Sender,
    ) {
        self.flood_judged(burst, source, i, place, false, sender);
    }

    /// As [`Self::flood`]. `vouched`: the source's firewall has verified the frame's checksum.
    fn flood_judged<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        vouched: bool,
        sender: &mut Sender,
    ) {
        let mut any = false;
        let mut refused = false;
        for &member in &source.bridge.members {
            let Some(port) = source.forwarding.port(member).filter(|_| member != source.port.id) else { continue };
            if let Some(firewall) = &port.firewall {
                // A frame for someone else is no business of this VM's, and no denial.
                let foreign = !place.dst.is_multicast()
                    && firewall.rules.spoof.is_enabled()
                    && !firewall.rules.spoof.has_mac(place.dst);
                if foreign || port.vlan.egress(place.vlan).is_none() {
                    continue;
                }
                if !self.admit(burst, source, i, place.vlan, vouched, port, sender) {
                    refused = true;
                    continue;
                }
            }
            any |= self.enqueue(port, i, place.vlan, place.tag).is_some();
        }
        if !any && !refused {
            sender.fail(i, DropReason::NoDestination);
        }
    }

    /// `None` when the port does not carry the VLAN.
    #[inline]
    fn enqueue<T>(&mut self, port: &PortEntry<T>, i: usize, vlan: u16, tag: Option<VlanTag>) -> Option<VlanAction> {
        let egress = port.vlan.egress(vlan)?;
        let action = match (egress, tag) {
            (Egress::Untagged, None) => VlanAction::Keep,
            (Egress::Untagged, Some(_)) => VlanAction::Pop,
            (Egress::Tagged, None) => {
                let vid = VlanId::new(vlan).unwrap_or_default();
                VlanAction::Push(VlanTag { tpid: Tpid::Customer, tci: Tci::new(0, false, vid) })
            }
            (Egress::Tagged, Some(tag)) if tag.tci.vid().get() == vlan => VlanAction::Keep,
            // A priority tag keeps its priority under the VLAN it now belongs to.
            (Egress::Tagged, Some(tag)) => VlanAction::Replace(tag.tci.with_vid(VlanId::new(vlan).unwrap_or_default())),
        };
        if let Some(batch) = self.batches.get_mut(usize::from(port.id)) {
            if batch.is_empty() {
                self.active.push(port.id);
            }
            batch.push(i, action);
        }
        Some(action)
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
    let quick = Quick::new(firewall, Toward::Ingress, thread, source.now_ns);
    if let Some(former) = far.replace(Far { output, quick }) {
        former.quick.settle();
    }
    true
}

/// Learns where frame `i` came from and finds where it goes.
#[inline]
fn look_up<T>(
    source: &Source<'_, T>,
    place: &Place,
    i: usize,
    recent: &mut Option<Recent>,
    sender: &mut Sender,
) -> Target {
    let &Place { src, dst, vlan, .. } = place;
    if let Some(r) = *recent
        && r.is_of(src, dst, vlan)
    {
        return Target::Port(r.output);
    }
    if !src.is_valid_source() {
        sender.fail(i, DropReason::BadSourceMac);
        return Target::None;
    }
    let (fdb, ingress) = (&source.bridge.fdb, source.port.id);
    fdb.learn(vlan, src, ingress, source.port.fdb_limit, source.now_s());
    if dst.is_multicast() {
        if dst.is_link_local() {
            sender.fail(i, DropReason::LinkLocal);
            return Target::None;
        }
        return Target::Flood;
    }
    match fdb.lookup(vlan, dst, source.now_s()) {
        Some(output) if output == ingress => {
            sender.fail(i, DropReason::SamePort);
            Target::None
        }
        Some(output) => {
            *recent = Some(Recent { src, dst, vlan, output });
            Target::Port(output)
        }
        None => Target::Flood,
    }
}

/// Addresses and EtherType of a frame of which `head` has the first `have` bytes, if it is an untagged one.
#[inline(always)]
fn untagged(head: &[u8; SNAPSHOT_BYTES], have: usize) -> Option<(Link, EtherType)> {
    let &[a, b, c, d, e, f, g, h, s, t, u, v, x, y, ..] = head;
    let first = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    let ethertype = EtherType(u16::from_be_bytes([x, y]));
    let src = first << 32 | u64::from(u32::from_be_bytes([s, t, u, v]));
    let link = Link { dst: MacAddr::from_u64(first >> 16), src: MacAddr::from_u64(src) };
    (have >= ethernet::HEADER_BYTES && Tpid::from_ethertype(ethertype).is_none()).then_some((link, ethertype))
}

/// Frame `i` is an untagged one with these addresses, and nothing else about it matters to a plain switch.
#[inline(always)]
fn follows(burst: &mut RxBurst, i: usize, link: Link) -> bool {
    let Some((head, meta)) = burst.frame_mut(i) else { return false };
    let Some((own, ethertype)) = untagged(head, usize::from(meta.snapshot_len)) else { return false };
    own == link && (!owes_work(meta) || owes_only_checksum(head, meta, ethertype))
}

/// All that an untagged frame is owed is the checksum of a plain packet.
fn owes_only_checksum(head: &[u8; SNAPSHOT_BYTES], meta: &mut FrameMeta, ethertype: EtherType) -> bool {
    let mut plain = Plain::default();
    let (have, len) = (usize::from(meta.snapshot_len), meta.len as usize);
    plain.read(head, have, len, ethernet::HEADER_BYTES, ethertype) && accept_checksum(meta, &plain)
}

/// All that a frame is owed is the checksum of its plain packet.
#[inline]
fn accept_checksum(meta: &mut FrameMeta, plain: &Plain) -> bool {
    if meta.len > MAX_FRAME_BYTES || !plain.owes_checksum(&meta.offload) {
        return false;
    }
    let Offload { csum_start, csum_offset, .. } = meta.offload;
    // As `validate` leaves it.
    meta.offload = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
    true
}

/// What an untagged frame without special wishes is, and its packet if it is plain. False: to be classified.
#[inline(always)]
fn see(burst: &mut RxBurst, i: usize, untagged_vlan: Option<u16>, place: &mut Place) -> bool {
    let Some((head, meta)) = burst.frame_mut(i) else { return false };
    let have = usize::from(meta.snapshot_len);
    let (Some((Link { dst, src }, ethertype)), Some(vlan)) = (untagged(head, have), untagged_vlan) else {
        return false;
    };
    place.src = src;
    place.dst = dst;
    place.vlan = vlan;
    place.tag = None;
    place.is_plain = place.plain.read(head, have, meta.len as usize, ethernet::HEADER_BYTES, ethertype);
    !owes_work(meta) || place.is_plain && accept_checksum(meta, &place.plain)
}

/// Reads frame `i`'s link header; checks VLAN and offload. `None`: dropped.
#[inline(always)]
fn classify<T>(burst: &mut RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let (head, have) = burst.head(i);
    if let Some((Link { dst, src }, ethertype)) = untagged(head, have)
        && let Some(vlan) = port.vlan.ingress(None)
        && !burst.meta(i).is_none_or(owes_work)
    {
        return Some(Place { src, dst, vlan, l3: 14, ethertype, ..Place::default() });
    }
    classify_any(burst, i, port, sender)
}

/// As [`classify`], for any frame.
#[inline(never)]
fn classify_any<T>(burst: &mut RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let len = burst.meta(i).map_or(0, |m| m.len);
    let l2 = match packet::parse_l2(burst.snapshot(i), len) {
        Ok(l2) => l2,
        Err(ParseError::FrameTooShort) => {
            sender.fail(i, DropReason::RxTooShort);
            return None;
        }
        Err(_) => {
            sender.fail(i, DropReason::RxBadHeader);
            return None;
        }
    };
    let Some(vlan) = port.vlan.ingress(l2.vlan.map(|t| t.tci.vid().get())) else {
        sender.fail(i, DropReason::VlanNotAllowed);
        return None;
    };
    if burst.meta(i).is_some_and(owes_work) && !check_offload(burst, i) {
        sender.fail(i, DropReason::RxBadOffload);
        return None;
    }
    Some(Place {
        src: l2.src_mac,
        dst: l2.dst_mac,
        vlan,
        tag: l2.vlan,
        l3: l2.len,
        ethertype: l2.ethertype,
        ..Place::default()
    })
}

/// One end judges frame `i`. True: it goes on.
#[inline]
fn judge(stage: &mut Stage, burst: &mut RxBurst, i: usize, end: &End<'_>, vouched: bool, sender: &mut Sender) -> bool {
    match stage.judge(burst, i, end, vouched) {
        Outcome::Pass => true,
        Outcome::Drop(reason) => {
            sender.fail(i, reason);
            false
        }
        Outcome::Held => {
            sender.hold(i);
            false
        }
    }
}

/// The numbers of the bits that are set.
#[inline]
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let i = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(i)
    })
}

#[inline(always)]
fn owes_work(meta: &FrameMeta) -> bool {
    meta.offload.needs_csum || meta.offload.gso != Gso::None
}

/// Checks what the sender claims about checksum and segmentation against the real headers, once, on the snapshot.
#[inline]
fn check_offload(burst: &mut RxBurst, i: usize) -> bool {
    let Some(&meta) = burst.meta(i) else { return false };
    let mut checked = validate(&meta.offload, burst.snapshot(i), meta.len);
    if matches!(checked, Err(BadOffload::NeedMore { .. })) {
        burst.extend_snapshot(i);
        checked = validate(&meta.offload, burst.snapshot(i), meta.len);
    }
    match (checked, burst.meta_mut(i)) {
        (Ok(offload), Some(m)) => {
            m.offload = offload;
            true
        }
        _ => false,
    }
}
