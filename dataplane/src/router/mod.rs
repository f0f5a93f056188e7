//! From received frames to one batch per output: classify each frame (source checks, VLAN), judge what comes from a VM, learn and look
//! up the output, judge what goes to a VM.
//!
//! Where no firewall is involved each frame goes straight through; `guarded` has what happens where one is.
mod guarded;
mod stretch;

use crate::bridge::fdb::{Learned, MAX_PORTS, PortId};
use crate::bridge::vlan::Egress;
use crate::bridge::{BridgeEntry, Forwarding, PortEntry};
use crate::conntrack::{Layout, Particulars, Plain, Toward};
use crate::counters::DropReason;
use crate::enforce::flow_cache::FlowCache;
use crate::enforce::pending::{Next, PendingFrame};
use crate::enforce::quick::Train;
use crate::enforce::stage::{End, Outcome, Stage};
use crate::frame::{BURST, FrameMeta, Gso, MAX_FRAME_BYTES, Offload, RxBurst, SNAPSHOT_BYTES, run};
use crate::offload::{BadOffload, VlanAction, validate};
use crate::output::{Batch, Sender};
use crate::packet::ethernet;
use crate::packet::{self, EtherType, MacAddr, Tci, Tpid, VlanId, VlanTag};
use crate::port::TxPort;
use crate::qsbr::Guard;
use guarded::Memories;
use stretch::{Stretches, place};

/// Verdicts of one burst, and the batches per output that it was sorted into.
pub(crate) struct Router {
    batches: Box<[Batch]>,
    /// Outputs with a batch that is not empty.
    active: Vec<PortId>,
    pub stage: Stage,
    /// The frames of a burst that firewalls look at, and the facts of those that are plain.
    trains: Box<[Train]>,
    stretches: Stretches,
    facts: Box<[Particulars; BURST]>,
    memories: Memories,
    flows: FlowCache,
    /// Connections in the last burst that the flow cache knew, and that were searched for.
    pub flow_cache_hits: u32,
    pub flow_cache_misses: u32,
    /// In the last burst, no connection was one that the flow cache knows, or is to know: it need not be asked.
    are_strangers: bool,
    /// Many entries have lately been in the second of their buckets: both are to be fetched.
    both_buckets: bool,
    dither: u32,
}

/// Where the frames of one source go: the last decision, because consecutive frames mostly share it.
#[derive(Clone, Copy)]
struct Recent {
    link: Link,
    vlan: u16,
    output: PortId,
    /// Where they come from was known before.
    is_known: bool,
}

/// How a frame leaves.
#[derive(Clone, Copy)]
struct Way {
    output: PortId,
    action: VlanAction,
}

/// A frame's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
#[derive(Clone, Copy, Default)]
struct Place {
    link: Link,
    /// VLAN of the bridge.
    vlan: u16,
    tag: Option<VlanTag>,
    /// Where the network header begins, bytes.
    l3: u16,
    ethertype: EtherType,
}

/// The facts that all frames of a burst share.
struct Source<'a, T> {
    forwarding: &'a Forwarding<T>,
    port: &'a PortEntry<T>,
    bridge: &'a BridgeEntry,
    now_ns: u64,
}

impl Place {
    /// No frame's.
    const NOWHERE: Self = Self {
        link: Link { dst: MacAddr::ZERO, src: MacAddr::ZERO },
        vlan: 0,
        tag: None,
        l3: 0,
        ethertype: EtherType(0),
    };
}

impl<T> Source<'_, T> {
    #[inline]
    fn now_s(&self) -> u32 {
        (self.now_ns / 1_000_000_000) as u32
    }

    /// The firewall of this port, which judges frames that the VM sends, if there is one.
    #[inline]
    fn near_end(&self, vlan: u16) -> Option<End<'_>> {
        let (firewall, id) = (self.port.firewall.as_ref()?, self.port.id);
        Some(End {
            firewall,
            port: id,
            ingress: id,
            // An answer to what the VM's own rules reject concerns no connection of the VM.
            ingress_guarded: false,
            toward: Toward::Egress,
            vlan,
            now_ns: self.now_ns,
        })
    }

    /// The firewall of a port that frames from here go to, if it has one that judges: who takes a diverted frame in judges it.
    #[inline]
    fn far_end<'p>(&self, port: &'p PortEntry<T>, vlan: u16) -> Option<End<'p>> {
        let firewall = port.firewall.as_ref().filter(|_| port.divert.is_none())?;
        Some(End {
            firewall,
            port: port.id,
            ingress: self.port.id,
            ingress_guarded: self.port.firewall.is_some(),
            toward: Toward::Ingress,
            vlan,
            now_ns: self.now_ns,
        })
    }
}

impl<'a, T> Source<'a, T> {
    /// A member of the bridge, if frames from here with this destination are flooded to it in this VLAN.
    fn flooded(&self, member: PortId, dst: MacAddr, vlan: u16) -> Option<&'a PortEntry<T>> {
        let port = self.forwarding.port(member).filter(|_| member != self.port.id)?;
        port.vlan.egress(vlan)?;
        // A frame for someone else is no business of this VM's, and no denial.
        let is_foreign = !dst.is_multicast()
            && port
                .firewall
                .as_ref()
                .is_some_and(|firewall| firewall.rules.spoof.is_enabled() && !firewall.rules.spoof.has_mac(dst));
        (!is_foreign).then_some(port)
    }

    /// The one port that frames with this destination, which nobody has learned, are flooded to, if it is one: between two ports, and
    /// for all that VMs whose addresses are known send into a network that they share with one uplink.
    #[cold]
    fn sole_other(&self, dst: MacAddr, vlan: u16) -> Option<PortId> {
        let mut all = self.bridge.members.iter().filter_map(|&member| self.flooded(member, dst, vlan));
        let first = all.next()?;
        all.next().is_none().then_some(first.id)
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
            trains: vec![Train::default(); BURST].into_boxed_slice(),
            stretches: Stretches::new(),
            facts: Box::new([Particulars::default(); BURST]),
            memories: Memories::new(),
            flows: FlowCache::new(),
            flow_cache_hits: 0,
            flow_cache_misses: 0,
            are_strangers: false,
            both_buckets: false,
            dither: 0x9e37_79b9,
        }
    }

    /// Backs with memory what no packet is to wait for.
    pub fn provide(&self) {
        self.flows.provide();
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
            if let Some(Way { output, action }) = way
                && link.is_some()
            {
                let first = i;
                i = followers(burst, i);
                if first < i {
                    self.push(output, run(first as u8, i as u8), action);
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
        match look_up(source, place, None, i, recent, sender) {
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

    #[cold]
    fn route_judged<T: TxPort>(
        &mut self,
        burst: &mut RxBurst,
        source: &Source<'_, T>,
        i: usize,
        place: &Place,
        sender: &mut Sender,
    ) {
        match look_up(source, place, None, i, &mut None, sender) {
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
        let Some(end) = source.far_end(port, vlan) else { return true };
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

    /// Puts the frames whose bits are set into the batch of a port.
    #[inline(always)]
    fn push(&mut self, output: PortId, frames: u64, action: VlanAction) {
        if let Some(batch) = self.batches.get_mut(usize::from(output)) {
            if batch.is_empty() {
                self.active.push(output);
            }
            batch.push(frames, action);
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
            let Some(port) = source.flooded(member, place.link.dst, place.vlan) else { continue };
            if port.firewall.is_some() && !self.admit(burst, source, i, place.vlan, vouched, port, sender) {
                refused = true;
                continue;
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
        let action = action(port, vlan, tag)?;
        self.push(port.id, 1 << (i % BURST), action);
        Some(action)
    }
}

/// What is done to a frame on its way out. `None` when the port does not carry the VLAN.
#[inline]
fn action<T>(port: &PortEntry<T>, vlan: u16, tag: Option<VlanTag>) -> Option<VlanAction> {
    Some(match (port.vlan.egress(vlan)?, tag) {
        (Egress::Untagged, None) => VlanAction::Keep,
        (Egress::Untagged, Some(_)) => VlanAction::Pop,
        (Egress::Tagged, None) => {
            let vid = VlanId::new(vlan).unwrap_or_default();
            VlanAction::Push(VlanTag { tpid: Tpid::Customer, tci: Tci::new(0, false, vid) })
        }
        (Egress::Tagged, Some(tag)) if tag.tci.vid().get() == vlan => VlanAction::Keep,
        // A priority tag keeps its priority under the VLAN it now belongs to.
        (Egress::Tagged, Some(tag)) => VlanAction::Replace(tag.tci.with_vid(VlanId::new(vlan).unwrap_or_default())),
    })
}

/// Learns where frame `i` came from and finds where it goes. `found`: where that is, if somebody has just looked.
#[inline]
fn look_up<T>(
    source: &Source<'_, T>,
    place: &Place,
    found: Option<PortId>,
    i: usize,
    recent: &mut Option<Recent>,
    sender: &mut Sender,
) -> Target {
    let &Place { link, vlan, .. } = place;
    let Link { dst, src } = link;
    if let Some(r) = *recent
        && r.link == link
        && r.vlan == vlan
    {
        return Target::Port(r.output);
    }
    if !src.is_valid_source() {
        sender.fail(i, DropReason::BadSourceMac);
        return Target::None;
    }
    let (fdb, ingress) = (&source.bridge.fdb, source.port.id);
    let is_known = fdb.learn(vlan, src, ingress, source.port.fdb_limit, source.now_s()) == Learned::Known;
    if dst.is_multicast() {
        if dst.is_link_local() {
            sender.fail(i, DropReason::LinkLocal);
            return Target::None;
        }
        return Target::Flood;
    }
    let output = match found.or_else(|| fdb.lookup(vlan, dst, source.now_s())) {
        Some(output) if output == ingress => {
            sender.fail(i, DropReason::SamePort);
            return Target::None;
        }
        None => source.sole_other(dst, vlan),
        output => output,
    };
    let Some(output) = output else { return Target::Flood };
    *recent = Some(Recent { link, vlan, output, is_known });
    Target::Port(output)
}

/// Addresses and EtherType of a frame of which `head` has the first `have` bytes, if it is an untagged one.
#[inline(always)]
fn untagged(head: &[u8; SNAPSHOT_BYTES], have: usize) -> Option<(Link, EtherType)> {
    let (first, second) = start(head);
    let (first, second) = (u64::from_be(first), u64::from_be(second));
    let ethertype = EtherType(second as u16);
    let link = Link { dst: MacAddr::from_u64(first >> 16), src: MacAddr::from_u64(second >> 16) };
    (have >= ethernet::HEADER_BYTES && Tpid::from_ethertype(ethertype).is_none()).then_some((link, ethertype))
}

/// Number of the first frame from `from` on that is no untagged one with the addresses of the untagged one before it, or about which
/// something else matters to a plain switch.
#[inline(always)]
fn followers(burst: &mut RxBurst, from: usize) -> usize {
    let frames = burst.len().min(BURST);
    let Some(before) = from.checked_sub(1) else { return from };
    let (leader, _) = burst.head(before);
    let leader = start(leader);
    let mut i = from;
    if !burst.is_owing() {
        while i < frames && {
            let (head, have) = burst.head(i);
            follows(leader, head, have)
        } {
            i += 1;
        }
        return i;
    }
    while i < frames
        && let Some((head, meta)) = burst.frame_mut(i)
        && follows(leader, head, usize::from(meta.snapshot_len))
        && (!owes_work(meta) || owes_only_checksum(head, meta))
    {
        i += 1;
    }
    i
}

/// Addresses and EtherType, in two words that overlap: bytes 0 to 7 and 6 to 13.
type Start = (u64, u64);

#[inline(always)]
fn start(head: &[u8; SNAPSHOT_BYTES]) -> Start {
    // Taken byte by byte, they would also be loaded so.
    let word = |at: usize| head.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u64::from_ne_bytes(*word));
    (word(0), word(6))
}

/// The frame that begins with these bytes is untagged, and its addresses are those of the leader, which is untagged as well.
#[inline(always)]
fn follows(leader: Start, head: &[u8; SNAPSHOT_BYTES], have: usize) -> bool {
    if start(head) == leader {
        // What makes the leader an untagged frame is the same.
        return have >= ethernet::HEADER_BYTES;
    }
    start(head).0 == leader.0 && untagged_alike(leader, head, have)
}

/// As [`follows`], where the EtherType, or the second half of the source address, is another.
#[inline(never)]
fn untagged_alike(leader: Start, head: &[u8; SNAPSHOT_BYTES], have: usize) -> bool {
    // Without the EtherType.
    let source = |(_, word): Start| u64::from_be(word) >> 16;
    untagged(head, have).is_some() && source(start(head)) == source(leader)
}

/// All that an untagged frame is owed is the checksum of a plain packet.
fn owes_only_checksum(head: &[u8; SNAPSHOT_BYTES], meta: &mut FrameMeta) -> bool {
    let ethertype = EtherType(u64::from_be(start(head).1) as u16);
    let Some(layout) = Layout::new(ethernet::HEADER_BYTES as u16, ethertype) else { return false };
    let (have, len) = (usize::from(meta.snapshot_len), meta.len as usize);
    match Plain::read(head, have, len, layout, &mut Particulars::default()) {
        Some((plain, true)) => accept_checksum(meta, &plain),
        _ => false,
    }
}

/// All that a frame is owed is the checksum of its packet, which is plain, or whole.
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

/// Reads frame `i`'s link header; checks VLAN and offload. `None`: dropped.
#[inline(always)]
fn classify<T>(burst: &mut RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let (head, have) = burst.head(i);
    if let Some((link, ethertype)) = untagged(head, have)
        && let Some(vlan) = port.vlan.ingress(None)
        && !burst.meta(i).is_none_or(owes_work)
    {
        return Some(Place { link, vlan, tag: None, l3: 14, ethertype });
    }
    classify_any(burst, i, port, sender)
}

/// As [`classify`], for any frame.
#[inline(never)]
fn classify_any<T>(burst: &mut RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let place = place(burst, i, port, sender)?;
    if burst.meta(i).is_some_and(owes_work) && !check_offload(burst, i) {
        sender.fail(i, DropReason::RxBadOffload);
        return None;
    }
    Some(place)
}

/// One end judges frame `i`. True: it goes on.
#[inline]
fn judge(stage: &mut Stage, burst: &mut RxBurst, i: usize, end: &End<'_>, vouched: bool, sender: &mut Sender) -> bool {
    let outcome = stage.judge(burst, i, end, vouched);
    heed(outcome, i, sender)
}

/// Frame `i` is dropped or held if that is what becomes of it. True: it goes on.
#[inline]
fn heed(outcome: Outcome, i: usize, sender: &mut Sender) -> bool {
    match outcome {
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
