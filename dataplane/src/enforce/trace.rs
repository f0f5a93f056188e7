//! One packet's judgement at one end, told step by step and without consequences. For operators, not for the packet path.
use std::fmt;

use serde::Serialize;

use super::port::PortFirewall;
use super::stage::flow_key;
use crate::conntrack::{
    Change, Checksum, ConnMap, ConnTable, Connection, CtState, Dissected, InsertError, Judgement, Key, Packet,
    SctpState, Stored, TcpState, Toward, Tracked, Way, dissect, judge, refused,
};
use crate::counters::DropReason;
use crate::firewall::explain::{Explainer, Explanation};
use crate::firewall::{Action, Direction};
use crate::packet::{self, IpProto, MacAddr, chunk};

/// An entry of a connection table, as a trace shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EntrySummary {
    /// Protocol number.
    pub protocol: u8,
    /// The VM's address and port (ICMP: identifier).
    pub local: String,
    /// The other side's.
    pub remote: String,
    /// Opened by the other side.
    pub opened_by_remote: bool,
    /// State of the protocol, as conntrack names it; empty where it has none.
    pub state: &'static str,
    /// A reply has been seen.
    pub answered: bool,
    /// It is a real connection.
    pub assured: bool,
    /// Seconds until it expires.
    pub expires_s: u32,
    /// Generation of the rules under which it was judged; 0: never.
    pub generation: u32,
    /// What they said.
    pub allowed: bool,
}

/// The protocol's state as conntrack(8) names it; empty for protocols without states.
pub fn state_name(connection: &Connection) -> &'static str {
    match connection.key.proto() {
        IpProto::TCP => TcpState::from_number(connection.state()).name(),
        IpProto::SCTP => SctpState::from_number(connection.state()).name(),
        _ => "",
    }
}

impl EntrySummary {
    /// Of a connection.
    pub fn of(connection: &Connection, now_ms: u64) -> Self {
        let key = &connection.key;
        let side = |address: core::net::IpAddr, port: u16| match key.proto() {
            proto if proto.has_ports() => core::net::SocketAddr::new(address, port).to_string(),
            _ => address.to_string(),
        };
        Self {
            protocol: key.proto().0,
            local: side(key.local(), key.local_port),
            remote: side(key.remote(), key.remote_port),
            opened_by_remote: connection.opened() == Toward::Ingress,
            state: state_name(connection),
            answered: connection.seen_reply(),
            assured: connection.assured(),
            expires_s: connection.remaining_ms(now_ms).div_ceil(1000),
            generation: connection.policy_generation,
            allowed: connection.decision.allowed(),
        }
    }
}

impl fmt::Display for EntrySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = if self.opened_by_remote { "<-" } else { "->" };
        write!(f, "{} {arrow} {} proto {}", self.local, self.remote, self.protocol)?;
        if !self.state.is_empty() {
            write!(f, " {}", self.state)?;
        }
        f.write_str(if self.answered { "" } else { " [UNREPLIED]" })?;
        f.write_str(if self.assured { " [ASSURED]" } else { "" })?;
        write!(f, " expires in {} s", self.expires_s)
    }
}

/// One step at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum EndStep {
    /// Are the addresses the VM's?
    Addresses {
        /// They are checked.
        enabled: bool,
        /// Why not.
        refused: Option<&'static str>,
    },
    /// Not IP: does its EtherType pass?
    Ethertype {
        /// EtherType.
        ethertype: u16,
        /// It does.
        passes: bool,
    },
    /// A fragment: it would be held until its datagram is complete, and judged then.
    Fragment,
    /// What connection tracking says.
    Tracking {
        /// `new`, `established`, `related`, `invalid` or `untracked`.
        state: &'static str,
        /// Why it is invalid.
        invalid: Option<String>,
        /// `original` or `reply`.
        way: Option<&'static str>,
        /// The entry that decides, before this packet; `None`: there is none.
        entry: Option<EntrySummary>,
    },
    /// The entry's verdict stands: no rule is asked.
    Cached {
        /// Generation of the rules under which it was taken.
        generation: u32,
    },
    /// The rules are asked.
    Policy {
        /// Because they have changed since the entry was judged.
        again: bool,
        /// How they decide.
        explanation: Box<Explanation>,
    },
}

impl fmt::Display for EndStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses { enabled: false, .. } => f.write_str("addresses: not checked (anti-spoofing is off)"),
            Self::Addresses { refused: None, .. } => f.write_str("addresses: the VM's"),
            Self::Addresses { refused: Some(why), .. } => write!(f, "addresses: refused, {why}"),
            Self::Ethertype { ethertype, passes: true } => write!(f, "ethertype 0x{ethertype:04x}: passes"),
            Self::Ethertype { ethertype, passes: false } => write!(f, "ethertype 0x{ethertype:04x}: not allowed"),
            Self::Fragment => f.write_str("fragment: held until its datagram is complete, then judged as a whole"),
            Self::Tracking { state, invalid, way, entry } => {
                write!(f, "tracking: {state}")?;
                if let Some(way) = way {
                    write!(f, ", {way} direction")?;
                }
                if let Some(why) = invalid {
                    write!(f, ", {why}")?;
                }
                match entry {
                    Some(entry) => write!(f, "\n  entry: {entry}"),
                    None => f.write_str("\n  entry: none"),
                }
            }
            Self::Cached { generation } => write!(f, "verdict: allowed, as judged under rules generation {generation}"),
            Self::Policy { again, explanation } => {
                f.write_str(if *again { "policy (rules have changed since):" } else { "policy:" })?;
                explanation.to_string().lines().try_for_each(|line| write!(f, "\n  {line}"))
            }
        }
    }
}

/// One end's judgement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndTrace {
    /// Which way, seen from the VM.
    pub direction: Direction,
    /// The VM.
    pub vm: String,
    /// Its rules' generation.
    pub generation: u32,
    /// What was looked at, in order.
    pub steps: Vec<EndStep>,
    /// Why the packet is dropped; `None`: it passes.
    pub dropped: Option<&'static str>,
}

/// The table as it is; changes go nowhere.
struct Peek<'a>(&'a ConnMap);

impl ConnTable for Peek<'_> {
    fn lookup(&mut self, key: &Key, now_ms: u64) -> Option<Connection> {
        self.0.get(key).filter(|c| !c.is_expired(now_ms))
    }
    fn insert(&mut self, _connection: &Connection, _now_ms: u64) -> Result<(), InsertError> {
        Ok(())
    }
    fn update(&mut self, _connection: &Connection, _change: Change) -> Stored {
        Stored::Done
    }
    fn remove(&mut self, _connection: &Connection) -> Stored {
        Stored::Done
    }
    fn expire(&mut self, _now_ms: u64, _budget: usize) -> usize {
        0
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl EndTrace {
    /// Judges `frame` as the packet path would now.
    pub(crate) fn of(firewall: &PortFirewall, toward: Toward, vlan: u16, frame: &[u8], now_ns: u64) -> Self {
        let mut trace = Self {
            direction: toward.into(),
            vm: firewall.vm.name().to_owned(),
            generation: firewall.rules.generation,
            steps: Vec::new(),
            dropped: None,
        };
        trace.dropped = trace.walk(firewall, toward, vlan, frame, now_ns).err().map(DropReason::name);
        trace
    }

    fn walk(
        &mut self,
        firewall: &PortFirewall,
        toward: Toward,
        vlan: u16,
        frame: &[u8],
        now_ns: u64,
    ) -> Result<(), DropReason> {
        let rules = &*firewall.rules;
        let headers = packet::parse(frame, frame.len() as u32).map_err(|_| DropReason::RxBadHeader)?;
        let addresses = match toward {
            _ if !rules.spoof.is_enabled() => Ok(()),
            Toward::Egress => rules.spoof.check(frame, &headers).map_err(DropReason::from),
            Toward::Ingress => {
                let dst = chunk::<6>(frame, 0).map(|mac| MacAddr::new(*mac));
                let ours = dst.is_some_and(|mac| mac.is_multicast() || rules.spoof.has_mac(mac));
                if ours { Ok(()) } else { Err(DropReason::FwNotForPort) }
            }
        };
        self.steps.push(EndStep::Addresses {
            enabled: rules.spoof.is_enabled(),
            refused: addresses.err().map(DropReason::name),
        });
        addresses?;
        let now_ms = now_ns / 1_000_000;
        let packet = Packet { zone: Some(firewall.zone(vlan)), ..Packet::whole(frame, toward, Checksum::Verify) };
        let map = firewall.vm.map();
        let judgement = match dissect(&packet, rules.track.checksum) {
            Ok(Dissected::Fragment(_)) => {
                self.steps.push(EndStep::Fragment);
                return Ok(());
            }
            Ok(dissected) => judge(&mut Peek(map), &rules.track, firewall.vm.pick_up(), 0, &dissected, now_ms),
            Err(refusal) => refused(refusal),
        };
        let tracked = match judgement {
            Judgement::Tracked(tracked) => tracked,
            Judgement::NotIp(ethertype) => {
                let passes = rules.policy.passes_ethertype(ethertype);
                self.steps.push(EndStep::Ethertype { ethertype: ethertype.0, passes });
                return if passes { Ok(()) } else { Err(DropReason::FwEthertype) };
            }
            _ => return Err(DropReason::RxBadHeader),
        };
        let before = tracked.connection.filter(|_| !tracked.fresh).and_then(|c| map.get(&c.key));
        self.steps.push(EndStep::Tracking {
            state: tracked.state.name(),
            invalid: tracked.invalid.map(|why| why.to_string()),
            way: tracked.way.map(|way| if way == Way::Original { "original" } else { "reply" }),
            entry: before.map(|c| EntrySummary::of(&c, now_ms)),
        });
        self.ask(firewall, &tracked, now_ns)
    }

    fn ask(&mut self, firewall: &PortFirewall, tracked: &Tracked, now_ns: u64) -> Result<(), DropReason> {
        let rules = &*firewall.rules;
        let (flow, again) = match (&tracked.connection, tracked.flow) {
            (Some(c), _) if !tracked.fresh && c.policy_generation == rules.generation && c.decision.allowed() => {
                self.steps.push(EndStep::Cached { generation: rules.generation });
                return Ok(());
            }
            (Some(c), _) if !tracked.fresh => (c.opening_flow(), true),
            (_, Some(flow)) => (flow, false),
            (_, None) => return Err(tracked.invalid.map_or(DropReason::CtInvalidHeader, Into::into)),
        };
        if let (CtState::Invalid, Some(why)) = (tracked.state, tracked.invalid) {
            let verdict = rules.policy.lookup(flow.toward.into(), &flow_key(&flow), &rules.sets);
            if !(rules.stateless && verdict.stateless && verdict.action == Action::Allow) {
                return Err(why.into());
            }
        }
        let limits = (tracked.fresh).then(|| firewall.vm.limits().status(now_ns));
        let explainer = Explainer { policy: &rules.policy, sets: &rules.sets, spoof: None, limits: limits.as_ref() };
        let explanation = explainer.flow(flow.toward.into(), &flow_key(&flow));
        let action = explanation.action;
        let stateless = explanation.stateless;
        self.steps.push(EndStep::Policy { again, explanation: Box::new(explanation) });
        match action {
            Action::Allow if !stateless => match limits.and_then(|limits| limits.exhausted().first().copied()) {
                Some(limit) => Err(limit.into()),
                None => Ok(()),
            },
            Action::Allow => Ok(()),
            _ if again => Err(DropReason::FwRevoked),
            Action::Reject => Err(DropReason::FwRejected),
            Action::Drop => Err(DropReason::FwDenied),
        }
    }
}

impl fmt::Display for EndTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        match self.dropped {
            None => f.write_str("=> passes"),
            Some(reason) => write!(f, "=> dropped: {reason}"),
        }
    }
}
