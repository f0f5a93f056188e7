//! One end's judgement about one frame: anti-spoofing, tracking, policy, limits.
use core::net::IpAddr;
use std::sync::Arc;

use super::events::{EventKind, EventRing, FirewallEvent};
use super::hint;
use super::pending::{Next, Pending};
use super::port::{FirewallCounters, PortFirewall, PortRules};
use super::vm::VmFirewall;
use crate::bridge::fdb::PortId;
use crate::conntrack::{
    Accepted, Change, Checksum, ConnHandle, ConnTable, Connection, CtState, Decision, Dissected, Flow, FragmentFacts,
    InsertError, Invalid, Judgement, Packet, Refusal, Toward, Tracked, dissect, judge, next_dither, refused,
};
use crate::counters::DropReason;
use crate::firewall::reject::MAX_ANSWER_BYTES;
use crate::firewall::spoof::SpoofReason;
use crate::firewall::{Action, FlowKey, L4Key, RuleId, Verdict};
use crate::frame::{Offload, RxBurst, SNAPSHOT_BYTES};
use crate::packet::{self, EtherType, IpProto, MacAddr, chunk};

/// A connection that the rules no longer allow is remembered for so long after its last packet, so that it cannot come back as one
/// that is picked up mid-stream from the side that may open connections.
const REVOKED_TIMEOUT_MS: u32 = 120_000;

/// Where and when a frame is judged.
#[derive(Clone, Copy)]
pub(crate) struct End<'a> {
    pub firewall: &'a PortFirewall,
    /// The firewall's port.
    pub port: PortId,
    /// The port the frame came in through; answers go there.
    pub ingress: PortId,
    /// That port has a firewall, which is to judge answers.
    pub ingress_guarded: bool,
    pub toward: Toward,
    pub vlan: u16,
    pub now_ns: u64,
}

impl End<'_> {
    #[inline]
    pub(super) fn now_ms(&self) -> u64 {
        self.now_ns / 1_000_000
    }

    #[inline]
    pub(super) fn rules(&self) -> &PortRules {
        &self.firewall.rules
    }
}

/// What becomes of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Goes on.
    Pass,
    /// Dropped, and counted in the port's ledger.
    Drop(DropReason),
    /// A fragment that was kept; the complete datagram goes on by itself.
    Held,
}

/// The firewall's word on a packet.
#[derive(Clone, Copy)]
pub(super) enum Ruling {
    Pass,
    Deny { reason: DropReason, reject: bool, rule: Option<RuleId>, log: bool },
}

impl Ruling {
    fn deny(reason: DropReason) -> Self {
        Self::Deny { reason, reject: false, rule: None, log: false }
    }

    fn by_policy(verdict: Verdict, dropped: DropReason) -> Self {
        let reject = verdict.action == Action::Reject;
        let reason = if reject && dropped == DropReason::FwDenied { DropReason::FwRejected } else { dropped };
        Self::Deny { reason, reject, rule: verdict.rule, log: verdict.log }
    }
}

/// A packet that begins a connection.
pub(super) struct Opening<'a> {
    pub toward: Toward,
    /// What rules look at in it.
    pub key: &'a FlowKey,
    /// The address that opens the connection.
    pub source: IpAddr,
    /// The connection is not complete with this packet.
    pub half_open: bool,
    /// The frame's beginning.
    pub head: &'a [u8],
}

/// The snapshot ends before the headers do.
struct TooShort;

/// One PMD thread's part of the firewall.
pub(crate) struct Stage {
    pub(super) thread: usize,
    pub(super) dither: u32,
    answer: Box<[u8; MAX_ANSWER_BYTES]>,
    /// Frames that go on after the burst.
    pub pending: Pending,
    events: Arc<EventRing>,
}

impl Stage {
    pub(crate) fn new(thread: usize, events: Arc<EventRing>) -> Self {
        Self {
            thread,
            dither: 0x9e37_79b9 ^ thread as u32,
            answer: Box::new([0; MAX_ANSWER_BYTES]),
            pending: Pending::new(),
            events,
        }
    }

    /// Judges frame `i`. `vouched`: the other end has verified its checksum.
    #[inline]
    pub(crate) fn judge(&mut self, burst: &mut RxBurst, i: usize, end: &End<'_>, vouched: bool) -> Outcome {
        if let Ok(outcome) = self.try_judge(burst, i, end, vouched) {
            return outcome;
        }
        self.judge_deeper(burst, i, end, vouched)
    }

    #[cold]
    fn judge_deeper(&mut self, burst: &mut RxBurst, i: usize, end: &End<'_>, vouched: bool) -> Outcome {
        burst.extend_snapshot(i);
        match self.try_judge(burst, i, end, vouched) {
            Ok(outcome) => outcome,
            Err(TooShort) => {
                let head = burst.snapshot(i);
                self.settle(end, Ruling::deny(DropReason::FwHeadersTooDeep), None, head, head.len() as u32)
            }
        }
    }

    #[inline]
    fn try_judge(&mut self, burst: &RxBurst, i: usize, end: &End<'_>, vouched: bool) -> Result<Outcome, TooShort> {
        let Some(meta) = burst.meta(i) else { return Ok(Outcome::Drop(DropReason::RxBadHeader)) };
        let (head, len, offload) = (burst.snapshot(i), meta.len, meta.offload);
        let rules = end.rules();
        if let Err(reason) = self.check_addresses(rules, end.toward, head, len)? {
            return Ok(self.settle(end, Ruling::deny(reason), None, head, len));
        }
        let vouched = vouched || offload.needs_csum || offload.csum_valid;
        let packet = Packet {
            head,
            body: burst.body(i, head.len() as u32),
            toward: end.toward,
            checksum: if vouched { Checksum::Vouched } else { Checksum::Verify },
            zone: Some(end.firewall.zone(end.vlan)),
        };
        let judgement = match dissect(&packet, rules.track.checksum) {
            Ok(Dissected::Fragment(facts)) => return Ok(self.fragment(&packet, &facts, &offload, end)),
            Ok(dissected) => self.track(end, &dissected),
            Err(Refusal::NeedMore { .. }) => return Err(TooShort),
            Err(refusal) => refused(refusal),
        };
        Ok(self.conclude(end, judgement, head, len))
    }

    /// Whose frame it is: from the VM, or for it. `Ok(Err)`: not.
    #[inline]
    fn check_addresses(
        &self,
        rules: &PortRules,
        toward: Toward,
        head: &[u8],
        len: u32,
    ) -> Result<Result<(), DropReason>, TooShort> {
        if !rules.spoof.is_enabled() {
            return Ok(Ok(()));
        }
        if toward == Toward::Ingress {
            let dst = chunk::<6>(head, 0).map(|mac| MacAddr::new(*mac));
            let ours = dst.is_some_and(|mac| mac.is_multicast() || rules.spoof.has_mac(mac));
            return Ok(if ours { Ok(()) } else { Err(DropReason::FwNotForPort) });
        }
        let headers = match packet::parse(head, len) {
            Ok(headers) => headers,
            Err(e) if e.is_need_more() => return Err(TooShort),
            Err(_) => return Ok(Err(DropReason::RxBadHeader)),
        };
        match rules.spoof.check(head, &headers) {
            Ok(()) => Ok(Ok(())),
            // Neighbour discovery is read to its end.
            Err(SpoofReason::NdMalformed) if head.len() < SNAPSHOT_BYTES.min(len as usize) => Err(TooShort),
            Err(why) => Ok(Err(why.into())),
        }
    }

    #[inline]
    pub(super) fn track(&mut self, end: &End<'_>, dissected: &Dissected<'_>) -> Judgement {
        self.dither = next_dither(self.dither);
        let mut table = end.firewall.vm.table(self.thread);
        judge(&mut table, &end.rules().track, end.firewall.vm.pick_up(), self.dither, dissected, end.now_ms())
    }

    /// From what tracking found to what happens.
    #[inline]
    pub(super) fn conclude(&mut self, end: &End<'_>, judgement: Judgement, head: &[u8], len: u32) -> Outcome {
        let (ruling, flow) = match judgement {
            Judgement::Tracked(mut tracked) => {
                let ruling = self.rule(end, &mut tracked, head);
                // The usual end of the road.
                if matches!(ruling, Ruling::Pass) {
                    return Outcome::Pass;
                }
                (ruling, tracked.flow)
            }
            Judgement::NotIp(ethertype) if end.rules().policy.passes_ethertype(ethertype) => return Outcome::Pass,
            Judgement::NotIp(_) => (Ruling::deny(DropReason::FwEthertype), None),
            Judgement::Malformed(_) => (Ruling::deny(DropReason::RxBadHeader), None),
            // Whole packets are neither; a reassembled one is complete.
            Judgement::NeedMore { .. } | Judgement::Held | Judgement::Refused(_) => {
                (Ruling::deny(DropReason::FwHeadersTooDeep), None)
            }
        };
        self.settle(end, ruling, flow, head, len)
    }

    #[inline]
    fn counters<'a>(&self, end: &End<'a>) -> Option<&'a FirewallCounters> {
        end.firewall.ledgers.get(self.thread).map(|ledger| ledger.of(end.toward))
    }

    /// The policy's part. The usual case, a connection that was judged under the rules in force, asks nothing more.
    #[inline]
    fn rule(&mut self, end: &End<'_>, tracked: &mut Tracked, head: &[u8]) -> Ruling {
        if let Some(counters) = self.counters(end) {
            counters.count_state(tracked.state);
        }
        if tracked.opened
            && let Some(connection) = &tracked.connection
        {
            no_longer_half_open(end, connection);
        }
        match &mut tracked.connection {
            Some(connection) if tracked.fresh => match &tracked.flow {
                Some(flow) => self.open(end, connection, flow, head),
                None => Ruling::deny(DropReason::CtInvalidState),
            },
            Some(connection)
                if connection.policy_generation == end.rules().generation && connection.decision.allowed() =>
            {
                Ruling::Pass
            }
            Some(connection) => self.reevaluate(end, connection),
            None => self.without_connection(end, tracked),
        }
    }

    fn ask(&self, end: &End<'_>, flow: &Flow) -> Verdict {
        self.ask_about(end, flow.toward, &flow_key(flow))
    }

    #[inline(always)]
    fn ask_about(&self, end: &End<'_>, toward: Toward, key: &FlowKey) -> Verdict {
        if let Some(counters) = self.counters(end) {
            counters.policy_lookups.add(1);
        }
        let rules = end.rules();
        rules.policy.lookup(toward.into(), key, &rules.sets)
    }

    /// A connection's first packet.
    fn open(&mut self, end: &End<'_>, connection: &mut Connection, flow: &Flow, head: &[u8]) -> Ruling {
        let opening = Opening {
            toward: flow.toward,
            key: &flow_key(flow),
            source: connection.opener(),
            half_open: connection.is_half_open(),
            head,
        };
        self.open_as(
            end,
            &opening,
            || *flow,
            |table, generation, decision| {
                connection.policy_generation = generation;
                connection.decision = decision;
                table.insert(connection, end.now_ms())
            },
        )
    }

    /// A connection's first packet: asks the policy and the limits, and has the connection stored with what they say. `flow`: as it is
    /// reported.
    #[inline(always)]
    pub(super) fn open_as(
        &mut self,
        end: &End<'_>,
        opening: &Opening<'_>,
        flow: impl FnOnce() -> Flow,
        store: impl FnOnce(&mut ConnHandle<'_>, u32, Decision) -> Result<(), InsertError>,
    ) -> Ruling {
        let &Opening { toward, key, source, half_open, head } = opening;
        let verdict = self.ask_about(end, toward, key);
        if verdict.action != Action::Allow {
            return Ruling::by_policy(verdict, DropReason::FwDenied);
        }
        if verdict.stateless {
            return Ruling::Pass;
        }
        let vm = &*end.firewall.vm;
        let mut table = vm.table(self.thread);
        if vm.limits().wants_room(end.now_ns) {
            // As with a full table: who may go makes room, so that half-open connections do not shut out new ones.
            table.make_room(end.now_ms());
        }
        let mut admission = match vm.limits().admit(source, end.now_ns) {
            Ok(admission) => admission,
            Err(why) => {
                return Ruling::Deny { reason: why.into(), reject: false, rule: verdict.rule, log: verdict.log };
            }
        };
        if !half_open {
            vm.limits().established(source, &mut admission);
        }
        let decision = Decision::default().with_allowed().with_admission(admission);
        match store(&mut table, end.rules().generation, decision) {
            Ok(()) => {
                if let Some(counters) = self.counters(end) {
                    counters.opened.add(1);
                }
                if verdict.log || vm.logs_new() {
                    self.report(end, EventKind::New, verdict.rule, true, Some(flow()), head);
                }
                Ruling::Pass
            }
            Err(InsertError::Exists) => {
                // Another thread opened the same connection in this moment; the policy has spoken for both.
                vm.limits().release(source, admission);
                Ruling::Pass
            }
            Err(InsertError::Full) => {
                vm.limits().release(source, admission);
                Ruling::Deny { reason: DropReason::CtTableFull, reject: false, rule: verdict.rule, log: verdict.log }
            }
        }
    }

    /// A connection that was judged under other rules, or that the rules in force refuse.
    #[cold]
    fn reevaluate(&mut self, end: &End<'_>, connection: &mut Connection) -> Ruling {
        let verdict = self.ask(end, &connection.opening_flow());
        let generation = end.rules().generation;
        let mut table: ConnHandle<'_> = end.firewall.vm.table(self.thread);
        if let Some(counters) = self.counters(end)
            && connection.policy_generation != generation
        {
            counters.reevaluated.add(1);
        }
        let allowed = verdict.action == Action::Allow;
        connection.decision =
            if allowed { connection.decision.with_allowed() } else { connection.decision.without_allowed() };
        connection.policy_generation = generation;
        if !allowed {
            connection.refresh(end.now_ms(), REVOKED_TIMEOUT_MS.min(connection.remaining_ms(end.now_ms())));
        }
        // Lost when the entry has changed meanwhile: then the next packet does it again.
        let _ = table.update(connection, Change::Semantic);
        if allowed { Ruling::Pass } else { Ruling::by_policy(verdict, DropReason::FwRevoked) }
    }

    /// Untracked, or invalid: only a stateless rule can let it pass.
    #[cold]
    fn without_connection(&mut self, end: &End<'_>, tracked: &Tracked) -> Ruling {
        match (tracked.state, tracked.flow, tracked.invalid) {
            (CtState::Untracked, Some(flow), _) => {
                let verdict = self.ask(end, &flow);
                match verdict.action {
                    Action::Allow => Ruling::Pass,
                    _ => Ruling::by_policy(verdict, DropReason::FwDenied),
                }
            }
            // What tracking objects to need not concern a rule that does without; a broken packet stays broken.
            (_, Some(flow), Some(why))
                if end.rules().stateless
                    && matches!(
                        why,
                        Invalid::NoConnection | Invalid::State | Invalid::Unrelated | Invalid::IcmpType
                    ) =>
            {
                let verdict = self.ask(end, &flow);
                match (verdict.action, verdict.stateless) {
                    (Action::Allow, true) => Ruling::Pass,
                    _ => Ruling::deny(why.into()),
                }
            }
            (_, _, Some(why)) => Ruling::deny(why.into()),
            _ => Ruling::deny(DropReason::CtInvalidHeader),
        }
    }

    #[cold]
    fn fragment(&mut self, packet: &Packet<'_>, facts: &FragmentFacts, offload: &Offload, end: &End<'_>) -> Outcome {
        let (head, len) = (packet.head, packet.len() as u32);
        if offload.needs_csum || offload.gso != crate::frame::Gso::None {
            return self.settle(end, Ruling::deny(DropReason::RxBadOffload), None, head, len);
        }
        let vm = &*end.firewall.vm;
        let Some(mut queue) = vm.try_fragments() else {
            return self.settle(end, Ruling::deny(DropReason::FragmentBusy), None, head, len);
        };
        let datagram = match queue.accept(facts, packet, &end.rules().track, end.now_ms()) {
            Accepted::Held => return Outcome::Held,
            Accepted::Refused(why) => {
                drop(queue);
                return self.settle(end, Ruling::deny(why.into()), None, head, len);
            }
            Accepted::Complete(datagram) => datagram,
        };
        let frame = queue.assemble(&datagram);
        // Nobody can have vouched for the checksum of what was not yet a packet.
        let whole = Packet { zone: packet.zone, ..Packet::whole(frame, end.toward, Checksum::Verify) };
        let judgement = match dissect(&whole, end.rules().track.checksum) {
            Ok(dissected) => self.track(end, &dissected),
            Err(refusal) => refused(refusal),
        };
        match self.conclude(end, judgement, frame, frame.len() as u32) {
            Outcome::Pass => {
                let next = match end.toward {
                    Toward::Egress => Next::Forward { ingress: end.port },
                    Toward::Ingress => Next::ToPort { output: end.port, vlan: end.vlan, judge: false },
                };
                queue.release(datagram, |fragment| self.pending.push(fragment, next));
                Outcome::Held
            }
            other => {
                queue.discard(datagram);
                other
            }
        }
    }

    /// Counts a denial, answers it, tells of it.
    #[cold]
    pub(super) fn settle(
        &mut self,
        end: &End<'_>,
        ruling: Ruling,
        flow: Option<Flow>,
        head: &[u8],
        len: u32,
    ) -> Outcome {
        let Ruling::Deny { reason, reject, rule, log } = ruling else { return Outcome::Pass };
        if let Some(counters) = self.counters(end) {
            counters.deny(reason);
        }
        if reject && let Ok(headers) = packet::parse(head, len) {
            let rules = end.rules();
            let built = end.firewall.rejector.reject(&rules.reject, head, &headers, &mut self.answer[..], end.now_ns);
            if let Some(answer) = built.ok().and_then(|n| self.answer.get(..n)) {
                let judge = end.toward == Toward::Ingress && end.ingress_guarded;
                self.pending.push(answer, Next::ToPort { output: end.ingress, vlan: end.vlan, judge });
            }
        }
        self.report(end, EventKind::Denied(reason), rule, log, flow, head);
        Outcome::Drop(reason)
    }

    #[cold]
    fn report(
        &mut self,
        end: &End<'_>,
        kind: EventKind,
        rule: Option<RuleId>,
        log: bool,
        flow: Option<Flow>,
        head: &[u8],
    ) {
        if !end.firewall.vm.may_report(end.now_ns) {
            return self.events.lose();
        }
        let l2 = packet::parse_l2(head, head.len() as u32).ok();
        let guess = || {
            let l2 = l2?;
            hint::flow(head, l2.ethertype, usize::from(l2.len), end.toward, end.firewall.zone(end.vlan))
        };
        self.events.push(FirewallEvent {
            time_ns: end.now_ns,
            port: end.port,
            toward: end.toward,
            vlan: end.vlan,
            kind,
            rule,
            log,
            generation: end.rules().generation,
            flow: flow.or_else(guess),
            macs: l2.map_or((MacAddr::default(), MacAddr::default()), |l2| (l2.src_mac, l2.dst_mac)),
            ethertype: l2.map_or(EtherType(0), |l2| l2.ethertype),
        });
    }
}

#[cold]
fn no_longer_half_open(end: &End<'_>, connection: &Connection) {
    tell_limits(&end.firewall.vm, connection.decision, connection.opener());
}

/// A connection that `opener` opened is no longer half-open.
pub(super) fn tell_limits(vm: &VmFirewall, decision: Decision, opener: IpAddr) {
    if let Some(mut admission) = decision.admission() {
        // The entry does not say so any more; this is the packet that ended it.
        admission.half_open = true;
        vm.limits().established(opener, &mut admission);
    }
}

/// What rules look at in a flow.
pub(crate) fn flow_key(flow: &Flow) -> FlowKey {
    let proto = flow.key.proto();
    let l4 = match flow.icmp {
        Some((kind, code)) => Some(L4Key::Icmp { kind, code }),
        None if proto.has_ports() => Some(L4Key::Ports { source: flow.src_port(), destination: flow.dst_port() }),
        None => None,
    };
    debug_assert!(flow.icmp.is_none() || matches!(proto, IpProto::ICMP | IpProto::ICMPV6));
    FlowKey { remote: flow.key.remote(), protocol: proto.0, l4 }
}
