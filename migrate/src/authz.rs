//! Which host may send or receive which VM. Both hosts of a migration ask their own rules: the source whether it may send the VM to that
//! peer, the destination whether it may receive the VM from that peer. What no rule allows is denied.
//!
//! Rules are tried in order; the first that fits VM, peer and direction decides.
//!
//! # Patterns
//! `*` stands for any characters, also none, and `?` for exactly one. VM names are compared exactly; host names in lower case, as certificates
//! are ([`crate::pki::host_name`]). A peer is its certificate's identity, never what it says of itself.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most rules of one host.
pub const MAX_RULES: usize = 1024;
/// Longest pattern or name of a rule, bytes.
pub const MAX_PATTERN_BYTES: usize = 255;

/// What this host does in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is the source: the VM's connections leave.
    Send,
    /// It is the destination: the VM's connections come.
    Receive,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Send => "send",
            Self::Receive => "receive",
        })
    }
}

/// What a rule says about what it fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// May go on.
    #[default]
    Allow,
    /// May not, whatever later rules say.
    Deny,
}

/// A rule as it is configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Name for logs and explanations. Default: its position, "rule 1".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Pattern of VM names.
    pub vm: String,
    /// Pattern of the peer's host name.
    pub peer: String,
    /// Directions, seen from this host; at least one.
    pub roles: Vec<Role>,
    /// What it says. Default: allow.
    #[serde(default)]
    pub verdict: Verdict,
}

/// Why a rule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthzError {
    /// Too many.
    #[error("{0} migration rules; at most {MAX_RULES} are supported")]
    TooMany(usize),
    /// A field of a rule.
    #[error("migration rule {}: {field}: {problem}", index + 1)]
    Rule {
        /// Position of the rule, from 0.
        index: usize,
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// A host's rules. The default has none and denies everything.
#[derive(Clone, Debug, Default)]
pub struct Authorization {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    name: String,
    vm: String,
    peer: String,
    send: bool,
    receive: bool,
    verdict: Verdict,
}

impl Rule {
    fn has_role(&self, role: Role) -> bool {
        match role {
            Role::Send => self.send,
            Role::Receive => self.receive,
        }
    }
}

/// The answer to one question, with the rule that decided it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// True: may go on.
    pub allowed: bool,
    /// The VM that was asked about.
    pub vm: String,
    /// The peer that was asked about.
    pub peer: String,
    /// This host's part.
    pub role: Role,
    /// Name of the rule that decided; none when no rule fits.
    pub rule: Option<String>,
    /// Why, as a sentence for operators.
    pub reason: String,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.allowed { "allowed" } else { "denied" };
        let direction = match self.role {
            Role::Send => "to",
            Role::Receive => "from",
        };
        write!(f, "{verdict}: {} VM {} {direction} {}: {}", self.role, self.vm, self.peer, self.reason)
    }
}

impl Authorization {
    /// Checks rules and makes them ready.
    ///
    /// # Errors
    /// The first rule that cannot be used, and why.
    pub fn new(rules: &[RuleConfig]) -> Result<Self, AuthzError> {
        if rules.len() > MAX_RULES {
            return Err(AuthzError::TooMany(rules.len()));
        }
        let rules = rules.iter().enumerate().map(|(index, rule)| compile(index, rule)).collect::<Result<_, _>>()?;
        Ok(Self { rules })
    }

    /// May this host, as `role`, migrate `vm` with `peer`? `peer` is the identity in the peer's certificate.
    pub fn decide(&self, vm: &str, peer: &str, role: Role) -> Decision {
        let peer = peer.to_ascii_lowercase();
        let fits = |r: &&Rule| r.has_role(role) && matches(&r.vm, vm) && matches(&r.peer, &peer);
        let (allowed, rule, reason) = match self.rules.iter().find(fits) {
            Some(rule) if rule.verdict == Verdict::Allow => {
                (true, Some(rule.name.clone()), format!("{} allows it", rule.name))
            }
            Some(rule) => (false, Some(rule.name.clone()), format!("{} denies it", rule.name)),
            None => (false, None, self.why_nothing_fits(vm, &peer, role)),
        };
        Decision { allowed, vm: vm.to_owned(), peer, role, rule, reason }
    }

    /// Could `peer` be allowed anything at all with this host as `role`? Connections of others need not be kept.
    pub fn knows(&self, peer: &str, role: Role) -> bool {
        let peer = peer.to_ascii_lowercase();
        self.rules.iter().any(|r| r.verdict == Verdict::Allow && r.has_role(role) && matches(&r.peer, &peer))
    }

    /// Names the rules that nearly fit: that is where the operator's mistake will be.
    fn why_nothing_fits(&self, vm: &str, peer: &str, role: Role) -> String {
        const SHOWN: usize = 3;
        if self.rules.is_empty() {
            return "no migration rules are configured, and without a rule everything is denied".into();
        }
        let mut near: Vec<String> = Vec::new();
        for rule in self.rules.iter().filter(|r| r.verdict == Verdict::Allow) {
            let (for_vm, for_peer, for_role) = (matches(&rule.vm, vm), matches(&rule.peer, peer), rule.has_role(role));
            let miss = match (for_vm, for_peer, for_role) {
                (true, true, false) => format!("not to {role}"),
                (true, false, true) => format!("for peer {:?}", rule.peer),
                (false, true, true) => format!("for VM {:?}", rule.vm),
                _ => continue,
            };
            near.push(format!("{} is {miss}", rule.name));
        }
        if near.is_empty() {
            return "no rule fits".into();
        }
        let more = near.len().saturating_sub(SHOWN);
        near.truncate(SHOWN);
        let more = if more > 0 { format!("; {more} more are close") } else { String::new() };
        format!("no rule fits; {}{more}", near.join("; "))
    }
}

fn compile(index: usize, rule: &RuleConfig) -> Result<Rule, AuthzError> {
    let error = |field, problem: &str| AuthzError::Rule { index, field, problem: problem.to_owned() };
    let checked = |field, pattern: &str| {
        if pattern.is_empty() || pattern.len() > MAX_PATTERN_BYTES {
            return Err(error(field, &format!("must have 1 to {MAX_PATTERN_BYTES} bytes")));
        }
        if pattern.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(error(field, "must not contain white space or control characters"));
        }
        Ok(())
    };
    checked("vm", &rule.vm)?;
    checked("peer", &rule.peer)?;
    let peer = rule.peer.to_ascii_lowercase();
    if !peer.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.*?".contains(&b)) {
        return Err(error("peer", "is not a pattern of host names: letters, digits, hyphens, dots, * and ? only"));
    }
    if !peer.contains(['*', '?'])
        && let Err(e) = crate::pki::host_name(&peer)
    {
        return Err(error("peer", &e.to_string()));
    }
    if rule.roles.is_empty() {
        return Err(error("roles", "is empty: name \"send\", \"receive\" or both"));
    }
    let name = match &rule.name {
        Some(name) => {
            if name.is_empty() || name.len() > MAX_PATTERN_BYTES || name.chars().any(char::is_control) {
                return Err(error("name", &format!("must have 1 to {MAX_PATTERN_BYTES} printable bytes")));
            }
            format!("rule {name:?}")
        }
        None => format!("rule {}", index + 1),
    };
    Ok(Rule {
        name,
        vm: rule.vm.clone(),
        peer,
        send: rule.roles.contains(&Role::Send),
        receive: rule.roles.contains(&Role::Receive),
        verdict: rule.verdict,
    })
}

/// Does `text` fit `pattern`? Time is bounded by the product of their lengths, whatever the pattern: only the last `*` is ever taken back.
fn matches(pattern: &str, text: &str) -> bool {
    let (mut pattern, mut text) = (pattern.chars(), text.chars());
    // After the last `*`: the pattern behind it, and the text that it has not swallowed.
    let mut retry: Option<(std::str::Chars<'_>, std::str::Chars<'_>)> = None;
    loop {
        let before = text.clone();
        match (pattern.next(), text.next()) {
            (None, None) => return true,
            (Some('*'), _) => {
                text = before;
                retry = Some((pattern.clone(), text.clone()));
                continue;
            }
            (Some('?'), Some(_)) => continue,
            (Some(p), Some(t)) if p == t => continue,
            _ => {}
        }
        // The last `*` swallows one character more.
        let Some((behind, from)) = &mut retry else { return false };
        if from.next().is_none() {
            return false;
        }
        pattern = behind.clone();
        text = from.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(vm: &str, peer: &str, roles: &[Role], verdict: Verdict) -> RuleConfig {
        RuleConfig { name: None, vm: vm.into(), peer: peer.into(), roles: roles.to_vec(), verdict }
    }

    #[test]
    fn patterns() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("*", "anything", true),
            ("a*", "a", true),
            ("a*", "ba", false),
            ("*a", "cba", true),
            ("*a", "ab", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("?", "", false),
            ("?", "ä", true),
            ("web-??", "web-12", true),
            ("web-??", "web-1", false),
            ("**", "x", true),
            ("*?", "", false),
            ("*?", "x", true),
            ("a.c", "abc", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern:?} {text:?}");
        }
        // A pattern that takes exponential time where every star may be taken back.
        let start = std::time::Instant::now();
        assert!(!matches(&("*a".repeat(100) + "z"), &"a".repeat(10_000)));
        assert!(start.elapsed().as_secs() < 5);
    }

    #[test]
    fn patterns_agree_with_a_plain_definition() {
        fn plain(p: &[char], t: &[char]) -> bool {
            match (p.split_first(), t.split_first()) {
                (None, None) => true,
                (Some(('*', p)), None) => plain(p, t),
                (Some(('*', rest)), Some((_, tail))) => plain(rest, t) || plain(p, tail),
                (Some(('?', p)), Some((_, t))) => plain(p, t),
                (Some((a, p)), Some((b, t))) if a == b => plain(p, t),
                _ => false,
            }
        }
        let all = |letters: &[char], up_to: usize| {
            let mut words = vec![String::new()];
            let mut last = words.clone();
            for _ in 0..up_to {
                last = last.iter().flat_map(|w| letters.iter().map(move |l| format!("{w}{l}"))).collect();
                words.extend(last.clone());
            }
            words
        };
        for p in all(&['a', 'b', '*', '?'], 5) {
            for t in all(&['a', 'b'], 5) {
                let (pc, tc): (Vec<char>, Vec<char>) = (p.chars().collect(), t.chars().collect());
                assert_eq!(matches(&p, &t), plain(&pc, &tc), "{p:?} {t:?}");
            }
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides_and_nothing_is_allowed_without_one() {
        use Role::{Receive, Send};
        use Verdict::{Allow, Deny};
        let rules = [
            rule("secret-*", "*", &[Send, Receive], Deny),
            rule("web-*", "host-b", &[Send], Allow),
            rule("web-*", "host-?.example.org", &[Send, Receive], Allow),
            rule("secret-1", "host-b", &[Send], Allow),
        ];
        let authorization = Authorization::new(&rules).unwrap();
        for (vm, peer, role, allowed, by) in [
            ("web-1", "host-b", Send, true, Some("rule 2")),
            ("web-1", "HOST-B", Send, true, Some("rule 2")),
            ("web-1", "host-b", Receive, false, None),
            ("web-1", "host-bb", Send, false, None),
            ("web-1", "host-c.example.org", Receive, true, Some("rule 3")),
            ("web-1", "host-c.example.org.evil", Receive, false, None),
            ("WEB-1", "host-b", Send, false, None),
            ("secret-1", "host-b", Send, false, Some("rule 1")),
            ("", "host-b", Send, false, None),
            ("db", "", Send, false, None),
        ] {
            let decision = authorization.decide(vm, peer, role);
            assert_eq!((decision.allowed, decision.rule.as_deref()), (allowed, by), "{decision}");
        }
        assert!(authorization.knows("host-b", Send) && !authorization.knows("host-b", Receive));
        assert!(!authorization.knows("host-z", Send));
        let denied = Authorization::default().decide("web-1", "host-b", Send);
        assert!(!denied.allowed && denied.reason.contains("no migration rules"), "{denied}");
    }

    #[test]
    fn a_refusal_names_the_rules_that_nearly_fit() {
        let rules = [
            rule("web-*", "host-b", &[Role::Send], Verdict::Allow),
            rule("db", "host-a", &[Role::Receive], Verdict::Allow),
        ];
        let authorization = Authorization::new(&rules).unwrap();
        let text = |vm, peer, role| authorization.decide(vm, peer, role).to_string();
        assert_eq!(
            text("web-1", "host-b", Role::Receive),
            "denied: receive VM web-1 from host-b: no rule fits; rule 1 is not to receive"
        );
        assert_eq!(
            text("web-1", "host-c", Role::Send),
            "denied: send VM web-1 to host-c: no rule fits; rule 1 is for peer \"host-b\""
        );
        assert_eq!(
            text("x", "host-a", Role::Receive),
            "denied: receive VM x from host-a: no rule fits; rule 2 is for VM \"db\""
        );
        assert_eq!(text("x", "host-c", Role::Send), "denied: send VM x to host-c: no rule fits");
    }

    #[test]
    fn configuration_text() {
        #[derive(Deserialize)]
        struct File {
            allow: Vec<RuleConfig>,
        }
        let text = "[[allow]]\nname = \"web\"\nvm = \"web-*\"\npeer = \"host-b\"\nroles = [\"send\", \"receive\"]\n";
        let file: File = toml::from_str(text).unwrap();
        let decision = Authorization::new(&file.allow).unwrap().decide("web-1", "host-b", Role::Receive);
        assert_eq!(decision.to_string(), "allowed: receive VM web-1 from host-b: rule \"web\" allows it");
        assert!(toml::from_str::<File>(&text.replace("name", "nmae")).is_err());
        assert!(toml::from_str::<File>(&text.replace("send", "both")).is_err());
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        let good = rule("*", "*", &[Role::Send], Verdict::Allow);
        let long = "a".repeat(MAX_PATTERN_BYTES + 1);
        for (bad, field) in [
            (RuleConfig { vm: String::new(), ..good.clone() }, "vm"),
            (RuleConfig { vm: "a b".into(), ..good.clone() }, "vm"),
            (RuleConfig { vm: long, ..good.clone() }, "vm"),
            (RuleConfig { peer: "a_b".into(), ..good.clone() }, "peer"),
            (RuleConfig { peer: "10.0.0.1".into(), ..good.clone() }, "peer"),
            (RuleConfig { peer: "a..b".into(), ..good.clone() }, "peer"),
            (RuleConfig { roles: vec![], ..good.clone() }, "roles"),
            (RuleConfig { name: Some("a\n".into()), ..good.clone() }, "name"),
        ] {
            let error = Authorization::new(&[good.clone(), bad]).unwrap_err();
            assert!(matches!(&error, AuthzError::Rule { index: 1, field: f, .. } if *f == field), "{error}");
        }
        assert_eq!(Authorization::new(&vec![good; MAX_RULES + 1]).unwrap_err(), AuthzError::TooMany(MAX_RULES + 1));
    }
}
