//! What can be wrong with a policy, and where.
use std::fmt::Display;

use super::policy::{
    Action, AddressSet, BUILTIN_PRIORITY, Ethertype, MAX_ADDRESS_SETS, MAX_ADDRESSES_PER_SET, MAX_DESCRIPTION_BYTES,
    MAX_ENTRIES_PER_PORT, MAX_ETHERTYPES, MAX_GROUPS, MAX_GROUPS_PER_PORT, MAX_NAME_BYTES, MAX_RANGES_PER_RULE,
    MAX_REMOTE_SETS_PER_PORT, MAX_RULES_PER_GROUP, MAX_RULES_PER_PORT, PolicyDocument, PortPolicy, PortRange, Protocol,
    Rule, SecurityGroup,
};

/// Most errors that one validation reports.
pub const MAX_ERRORS: usize = 100;
/// Most table entries, over all rules of a port, that state source ports. Such rules need a second dimension of look-up, whose
/// tables are larger.
pub const MAX_SOURCE_PORT_ENTRIES_PER_PORT: usize = 4096;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct PolicyError {
    /// Where, in the notation of TOML keys: `security_groups.web.rules[3].ports[0]`. Indices count from 0.
    pub path: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// Collects errors, up to [`MAX_ERRORS`].
#[derive(Debug, Default)]
pub(crate) struct Errors(Vec<PolicyError>);

impl Errors {
    pub(crate) fn add(&mut self, path: impl Display, message: impl Display) {
        if self.0.len() < MAX_ERRORS {
            self.0.push(PolicyError { path: path.to_string(), message: message.to_string() });
        }
    }

    /// Complains when there are more than `most`. True when not.
    pub(crate) fn at_most(&mut self, path: impl Display, count: usize, most: usize, what: &str) -> bool {
        if count > most {
            self.add(path, format_args!("{count} {what}; at most {most} are allowed"));
        }
        count <= most
    }

    pub(crate) fn into_result(self) -> Result<(), Vec<PolicyError>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }
}

/// `name` as a TOML key: quoted when it must be.
fn key(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if bare { name.into() } else { format!("{name:?}") }
}

fn check_name(errors: &mut Errors, path: &str, name: &str) {
    if name.is_empty() {
        errors.add(path, "the name is empty");
    } else if name.len() > MAX_NAME_BYTES {
        errors.add(path, format_args!("the name has {} bytes; at most {MAX_NAME_BYTES} are allowed", name.len()));
    } else if name.chars().any(char::is_control) {
        errors.add(path, "the name has control characters");
    }
}

fn check_description(errors: &mut Errors, path: &str, description: &str) {
    errors.at_most(format_args!("{path}.description"), description.len(), MAX_DESCRIPTION_BYTES, "bytes");
}

impl PolicyDocument {
    /// Checks all groups and address sets, and that what they name exists.
    ///
    /// # Errors
    /// All mistakes, up to [`MAX_ERRORS`].
    pub fn validate(&self) -> Result<(), Vec<PolicyError>> {
        let mut errors = Errors::default();
        errors.at_most("security_groups", self.security_groups.len(), MAX_GROUPS, "groups");
        errors.at_most("address_sets", self.address_sets.len(), MAX_ADDRESS_SETS, "address sets");
        for (name, group) in &self.security_groups {
            self.check_group(&mut errors, &format!("security_groups.{}", key(name)), name, group);
        }
        for (name, AddressSet { description, addresses }) in &self.address_sets {
            let path = format!("address_sets.{}", key(name));
            check_name(&mut errors, &path, name);
            check_description(&mut errors, &path, description);
            errors.at_most(format_args!("{path}.addresses"), addresses.len(), MAX_ADDRESSES_PER_SET, "addresses");
        }
        errors.into_result()
    }

    fn check_group(&self, errors: &mut Errors, path: &str, name: &str, group: &SecurityGroup) {
        check_name(errors, path, name);
        check_description(errors, path, &group.description);
        if errors.at_most(format_args!("{path}.rules"), group.rules.len(), MAX_RULES_PER_GROUP, "rules") {
            for (i, rule) in group.rules.iter().enumerate() {
                self.check_rule(errors, &format!("{path}.rules[{i}]"), rule);
            }
        }
    }

    fn check_rule(&self, errors: &mut Errors, path: &str, rule: &Rule) {
        if let Some(name) = &rule.name {
            check_name(errors, &format!("{path}.name"), name);
        }
        check_protocol(errors, path, rule);
        check_ranges(errors, &format!("{path}.ports"), &rule.ports, rule.protocol);
        check_ranges(errors, &format!("{path}.source_ports"), &rule.source_ports, rule.protocol);
        check_icmp(errors, path, rule);
        self.check_remote(errors, path, rule);
        if rule.stateless && rule.action != Action::Allow {
            errors.add(format_args!("{path}.stateless"), "only allow rules can be stateless");
        }
    }

    fn check_remote(&self, errors: &mut Errors, path: &str, rule: &Rule) {
        let given = [rule.remote_cidr.is_some(), rule.remote_group.is_some(), rule.remote_address_set.is_some()];
        if given.iter().filter(|g| **g).count() > 1 {
            errors.add(
                path,
                "more than one of remote_cidr, remote_group and remote_address_set; write one rule for each",
            );
        }
        if let Some(cidr) = rule.remote_cidr {
            let family = if cidr.is_v4() { Ethertype::Ipv4 } else { Ethertype::Ipv6 };
            if rule.ethertype != Ethertype::Any && rule.ethertype != family {
                errors.add(format_args!("{path}.remote_cidr"), format_args!("{cidr} is not of the rule's ethertype"));
            }
        }
        if let Some(name) = rule.remote_group.as_ref().filter(|name| !self.security_groups.contains_key(*name)) {
            errors.add(format_args!("{path}.remote_group"), format_args!("there is no security group {name:?}"));
        }
        if let Some(name) = rule.remote_address_set.as_ref().filter(|name| !self.address_sets.contains_key(*name)) {
            errors.add(format_args!("{path}.remote_address_set"), format_args!("there is no address set {name:?}"));
        }
    }

    /// Checks a port's settings against this document. `path` is where they stand, such as `ports.vm1.firewall`. The document
    /// itself is taken to be valid.
    ///
    /// # Errors
    /// All mistakes, up to [`MAX_ERRORS`].
    pub fn validate_port(&self, port: &PortPolicy, path: &str) -> Result<(), Vec<PolicyError>> {
        let mut errors = Errors::default();
        self.check_groups(&mut errors, &format!("{path}.security_groups"), port);
        let ethertypes = &port.allowed_ethertypes;
        errors.at_most(format_args!("{path}.allowed_ethertypes"), ethertypes.len(), MAX_ETHERTYPES, "EtherTypes");
        for (i, ethertype) in ethertypes.iter().enumerate() {
            if matches!(*ethertype, ..0x0600 | 0x0800 | 0x86dd | 0x0806) {
                errors.add(
                    format_args!("{path}.allowed_ethertypes[{i}]"),
                    format_args!(
                        "0x{ethertype:04x} cannot be allowed here: rules are for IPv4 and IPv6, ARP always passes, values \
                         below 0x0600 are lengths"
                    ),
                );
            }
        }
        port.anti_spoofing.check(&mut errors, &format!("{path}.anti_spoofing"));
        port.limits.check(&mut errors, &format!("{path}.limits"));
        port.reject.check(&mut errors, &format!("{path}.reject"));
        errors.into_result()
    }

    fn check_groups(&self, errors: &mut Errors, path: &str, port: &PortPolicy) {
        if !errors.at_most(path, port.security_groups.len(), MAX_GROUPS_PER_PORT, "groups") {
            return;
        }
        let (mut rules, mut entries, mut source_entries) = (0usize, 0usize, 0usize);
        let mut remotes = std::collections::BTreeSet::new();
        for (i, name) in port.security_groups.iter().enumerate() {
            if port.security_groups.iter().take(i).any(|earlier| earlier == name) {
                errors.add(format_args!("{path}[{i}]"), format_args!("group {name:?} is named twice"));
                continue;
            }
            let Some(group) = self.security_groups.get(name) else {
                errors.add(format_args!("{path}[{i}]"), format_args!("there is no security group {name:?}"));
                continue;
            };
            rules += group.rules.len();
            for rule in &group.rules {
                let families = usize::from(rule.covers_family(true)) + usize::from(rule.covers_family(false));
                let count = families * rule.ports.len().max(1) * rule.source_ports.len().max(1);
                entries += count;
                if !rule.source_ports.is_empty() {
                    source_entries += count;
                }
                remotes.extend(rule.remote_group.iter().map(|name| (0, name)));
                remotes.extend(rule.remote_address_set.iter().map(|name| (1, name)));
            }
        }
        errors.at_most(path, rules, MAX_RULES_PER_PORT, "rules on the port");
        errors.at_most(path, entries, MAX_ENTRIES_PER_PORT, "combinations of family and port ranges on the port");
        let what = "combinations of family and port ranges with source ports on the port";
        errors.at_most(path, source_entries, MAX_SOURCE_PORT_ENTRIES_PER_PORT, what);
        errors.at_most(path, remotes.len(), MAX_REMOTE_SETS_PER_PORT, "different remote groups and sets on the port");
    }
}

fn check_protocol(errors: &mut Errors, path: &str, rule: &Rule) {
    // By name only: who writes a number means it.
    if rule.protocol == Protocol::ICMPV6 && !rule.covers_family(false) {
        errors.add(format_args!("{path}.protocol"), "icmpv6 does not occur over IPv4; write icmp");
    }
    if rule.priority == BUILTIN_PRIORITY {
        errors.add(
            format_args!("{path}.priority"),
            format_args!("{BUILTIN_PRIORITY} is the priority of the built-in rules; choose a lower or a higher one"),
        );
    }
}

fn check_ranges(errors: &mut Errors, path: &str, ranges: &[PortRange], protocol: Protocol) {
    if ranges.is_empty() {
        return;
    }
    if !protocol.has_ports() {
        errors.add(path, format_args!("protocol {protocol} has no ports; ports need tcp, udp, sctp, dccp or udplite"));
    }
    errors.at_most(path, ranges.len(), MAX_RANGES_PER_RULE, "port ranges");
    for (i, range) in ranges.iter().enumerate() {
        if range.first > range.last {
            errors.add(format_args!("{path}[{i}]"), "the first port is above the last");
        }
    }
}

fn check_icmp(errors: &mut Errors, path: &str, rule: &Rule) {
    let Some(_) = rule.icmp_type else {
        if rule.icmp_code.is_some() {
            errors.add(format_args!("{path}.icmp_code"), "a code needs an icmp_type");
        }
        return;
    };
    let path = format!("{path}.icmp_type");
    let (v4, v6) = (rule.covers_family(true), rule.covers_family(false));
    match rule.protocol {
        Protocol::Icmp if v4 && v6 => {
            errors.add(path, "ICMP and ICMPv6 number their types differently; state ethertype ipv4 or ipv6");
        }
        Protocol::Icmp => {}
        Protocol::Number(1) if !v6 => {}
        Protocol::Number(58) => {}
        Protocol::Number(1) => errors.add(path, "protocol 1 has ICMP types over IPv4 only; state ethertype ipv4"),
        other => errors.add(path, format_args!("protocol {other} has no ICMP types; write icmp or icmpv6")),
    }
}
