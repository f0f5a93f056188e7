//! The firewall's decision about a packet, told step by step. For operators (`policy explain`, `trace`), not for the packet path.
use std::fmt;

use serde::Serialize;

use super::address_sets::{AddressIndex, SetKey};
use super::compile::CompiledPolicy;
use super::limits::{LimitReason, LimitsStatus};
use super::matcher::RuleId;
use super::policy::{Action, Direction, FlowKey, L4Key, Rule};
use super::reject::{self, NoAnswer};
use super::spoof::{SpoofReason, SpoofTable};
use crate::packet::{Headers, L3};

/// Most matching rules that are listed.
pub const MAX_LISTED_RULES: usize = 32;

/// What there is to ask. Parts that are not given are not considered.
#[derive(Clone, Copy, Debug)]
pub struct Explainer<'a> {
    /// The port's rules.
    pub policy: &'a CompiledPolicy,
    /// Memberships.
    pub sets: &'a AddressIndex,
    /// Anti-spoofing.
    pub spoof: Option<&'a SpoofTable>,
    /// How far limits are used.
    pub limits: Option<&'a LimitsStatus>,
}

/// A rule that matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleLine {
    /// Security group; `None`: built-in.
    pub group: Option<String>,
    /// Position in the group, from 0.
    pub index: usize,
    /// The rule's name, if it has one.
    pub name: Option<String>,
    /// The rule in one line.
    pub text: String,
}

impl RuleLine {
    /// The rule of that number.
    pub fn of(policy: &CompiledPolicy, id: RuleId) -> Option<Self> {
        let at = policy.rule(id)?;
        let (name, text) = (at.rule.name.clone(), at.rule.to_string());
        Some(Self { group: at.group.map(Into::into), index: at.index, name, text })
    }
}

impl fmt::Display for RuleLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.group {
            Some(group) => write!(f, "{group} rule {}", self.index)?,
            None => write!(f, "built-in rule {}", self.index)?,
        }
        if let Some(name) = &self.name {
            write!(f, " ({name})")?;
        }
        write!(f, ": {}", self.text)
    }
}

/// One step of the decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Stage {
    /// May the VM send with these addresses?
    AntiSpoofing {
        /// It is checked.
        enabled: bool,
        /// Why not.
        refused: Option<SpoofReason>,
    },
    /// A frame without IP: does its EtherType pass?
    Ethertype {
        /// EtherType behind the tags.
        ethertype: u16,
        /// It does.
        passes: bool,
    },
    /// In which of the sets that rules name is the remote address?
    RemoteSets {
        /// Their names.
        sets: Vec<SetKey>,
    },
    /// Which rules match?
    Rules {
        /// Rules there are, for both directions.
        total: usize,
        /// Rules that match.
        matching: usize,
        /// The first of them; the first one decides.
        matches: Vec<RuleLine>,
    },
    /// No rule matches: the port's default.
    Default {
        /// What it says.
        action: Action,
    },
    /// Would the limits admit a new connection now?
    Limits {
        /// Those that would not.
        exhausted: Vec<LimitReason>,
    },
    /// Would the sender of the rejected packet be told?
    Reject {
        /// Why not.
        unanswered: Option<NoAnswer>,
    },
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AntiSpoofing { enabled: false, .. } => f.write_str("anti-spoofing: off"),
            Self::AntiSpoofing { refused: None, .. } => f.write_str("anti-spoofing: passed"),
            Self::AntiSpoofing { refused: Some(reason), .. } => write!(f, "anti-spoofing: refused, {}", reason.name()),
            Self::Ethertype { ethertype, passes } => {
                write!(f, "ethertype: 0x{ethertype:04x} {}", if *passes { "passes" } else { "does not pass" })
            }
            Self::RemoteSets { sets } if sets.is_empty() => f.write_str("remote: in no set that rules name"),
            Self::RemoteSets { sets } => {
                f.write_str("remote: in ")?;
                for (i, set) in sets.iter().enumerate() {
                    write!(f, "{}{set}", if i == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::Rules { total, matching, matches } => {
                write!(f, "rules: {matching} of {total} match")?;
                for (i, rule) in matches.iter().enumerate() {
                    write!(f, "\n  {} {rule}", if i == 0 { "=>" } else { "  " })?;
                }
                Ok(())
            }
            Self::Default { action } => write!(f, "default: {}", action.name()),
            Self::Limits { exhausted } if exhausted.is_empty() => f.write_str("limits: a new connection is admitted"),
            Self::Limits { exhausted } => {
                f.write_str("limits: a new connection is refused,")?;
                exhausted.iter().try_for_each(|reason| write!(f, " {}", reason.name()))
            }
            Self::Reject { unanswered: None } => f.write_str("reject: the sender is told"),
            Self::Reject { unanswered: Some(reason) } => write!(f, "reject: the sender is not told, {}", reason.name()),
        }
    }
}

/// A decision and how it came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Which way.
    pub direction: Direction,
    /// What the rules look at; `None` without IP.
    pub key: Option<FlowKey>,
    /// What happens to a new connection that begins so.
    pub action: Action,
    /// It passes untracked.
    pub stateless: bool,
    /// The rule that decides; `None`: another stage, the last one but for limits and reject.
    pub rule: Option<RuleLine>,
    /// The steps, in order.
    pub stages: Vec<Stage>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for stage in &self.stages {
            writeln!(f, "{stage}")?;
        }
        write!(f, "verdict: {}{}", self.action.name(), if self.stateless { " stateless" } else { "" })
    }
}

impl Explainer<'_> {
    /// A frame, as the packet path would judge it if it began a connection.
    pub fn frame(&self, direction: Direction, head: &[u8], headers: &Headers) -> Explanation {
        let mut stages = Vec::new();
        let denied =
            |stages, key| Explanation { direction, key, action: Action::Drop, stateless: false, rule: None, stages };
        let key = FlowKey::of(head, headers, direction);
        if let Some(spoof) = self.spoof.filter(|_| direction == Direction::Egress) {
            let refused = spoof.check(head, headers).err();
            stages.push(Stage::AntiSpoofing { enabled: spoof.is_enabled(), refused });
            if refused.is_some() {
                return denied(stages, key);
            }
        }
        let Some(key) = key else {
            let passes = self.policy.passes_ethertype(headers.l2.ethertype);
            stages.push(Stage::Ethertype { ethertype: headers.l2.ethertype.0, passes });
            let mut explanation = denied(stages, None);
            if passes {
                explanation.action = Action::Allow;
                explanation.stateless = true;
            }
            return explanation;
        };
        debug_assert!(!matches!(headers.l3, L3::None | L3::Arp { .. }));
        let mut explanation = self.flow_after(direction, &key, stages);
        if explanation.action == Action::Reject {
            explanation.stages.push(Stage::Reject { unanswered: reject::check(head, headers).err() });
        }
        explanation
    }

    /// A connection, known by what rules look at. Ports or types that the protocol does not have are ignored.
    pub fn flow(&self, direction: Direction, key: &FlowKey) -> Explanation {
        self.flow_after(direction, &key.consistent(), Vec::new())
    }

    fn flow_after(&self, direction: Direction, key: &FlowKey, mut stages: Vec<Stage>) -> Explanation {
        let policy = self.policy;
        let named = policy.sets.iter().filter(|(_, id)| self.sets.contains(**id, key.remote));
        stages.push(Stage::RemoteSets { sets: named.map(|(name, _)| name.clone()).collect() });
        let all = (0..policy.rules.len() as u32).map(RuleId);
        let mut matching = all.filter(|id| policy.rule(*id).is_some_and(|at| self.matches(at.rule, direction, key)));
        let matches: Vec<RuleId> = matching.by_ref().take(MAX_LISTED_RULES).collect();
        let count = matches.len() + matching.count();
        let verdict = policy.lookup(direction, key, self.sets);
        // The packet path's word counts; that rule by rule gives the same is what the tests are for.
        debug_assert_eq!(matches.first().copied(), verdict.rule);
        stages.push(Stage::Rules {
            total: policy.rules.len(),
            matching: count,
            matches: matches.iter().filter_map(|id| self.line(*id)).collect(),
        });
        if verdict.rule.is_none() {
            stages.push(Stage::Default { action: verdict.action });
        }
        if let Some(limits) = self.limits.filter(|_| verdict.action == Action::Allow && !verdict.stateless) {
            stages.push(Stage::Limits { exhausted: limits.exhausted() });
        }
        Explanation {
            direction,
            key: Some(*key),
            action: verdict.action,
            stateless: verdict.stateless,
            rule: verdict.rule.and_then(|id| self.line(id)),
            stages,
        }
    }

    fn line(&self, id: RuleId) -> Option<RuleLine> {
        RuleLine::of(self.policy, id)
    }

    /// The rule matches, field by field.
    fn matches(&self, rule: &Rule, direction: Direction, key: &FlowKey) -> bool {
        let v4 = key.remote.is_ipv4();
        let in_set = |set: SetKey| self.policy.sets.get(&set).is_some_and(|id| self.sets.contains(*id, key.remote));
        rule.direction == direction
            && rule.covers_family(v4)
            && rule.protocol.number(v4).is_none_or(|number| number == key.protocol)
            && rule.remote_cidr.is_none_or(|cidr| cidr.contains(key.remote))
            && rule.remote_group.as_ref().is_none_or(|name| in_set(SetKey::Group(name.clone())))
            && rule.remote_address_set.as_ref().is_none_or(|name| in_set(SetKey::AddressSet(name.clone())))
            && matches_l4(rule, key.l4)
    }
}

fn matches_l4(rule: &Rule, l4: Option<L4Key>) -> bool {
    let wanted_ports = !rule.ports.is_empty() || !rule.source_ports.is_empty();
    match l4 {
        Some(L4Key::Ports { source, destination }) => {
            (rule.ports.is_empty() || rule.ports.iter().any(|range| range.contains(destination)))
                && (rule.source_ports.is_empty() || rule.source_ports.iter().any(|range| range.contains(source)))
                && rule.icmp_type.is_none()
        }
        Some(L4Key::Icmp { kind, code }) => {
            !wanted_ports
                && rule.icmp_type.is_none_or(|wanted| wanted == kind)
                && rule.icmp_code.is_none_or(|wanted| wanted == code)
        }
        None => !wanted_ports && rule.icmp_type.is_none(),
    }
}
