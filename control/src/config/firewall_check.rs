//! Checks of the firewall's entries against each other: VMs, groups, sets, and what ports make of them.
use std::collections::HashMap;

use ferry_dataplane::enforce::MAX_VM_PORTS;
use ferry_dataplane::firewall::{PolicyDocument, PolicyError};
use ferry_dataplane::switch::firewall::MAX_VMS;

use super::firewall::FlowLogTarget;
use super::model::{Config, PortConfig};
use super::problem::Problem;
use super::schema::did_you_mean;

/// Adds everything wrong with the firewall's part of `config`.
pub(super) fn check(config: &Config, problems: &mut Vec<Problem>) {
    check_vms(config, problems);
    check_counts(config, problems);
    if config.flow_log.to == FlowLogTarget::File && config.flow_log.file.is_none() {
        problems.push(Problem::value(
            "flow_log.file",
            "the flow log goes to a file, but its path is missing",
            "add `file`, or use to = \"log\"",
        ));
    }
    let document = config.policy();
    let faults = document.validate().err().unwrap_or_default();
    let sound = faults.is_empty();
    problems.extend(faults.into_iter().map(|e| policy_problem(document_path(&e.path), e, &document)));
    for (i, port) in config.port.iter().enumerate() {
        check_port(config, port, &format!("port[{i}]"), sound.then_some(&document), problems);
    }
}

fn check_vms(config: &Config, problems: &mut Vec<Problem>) {
    let mut names = HashMap::new();
    for (i, vm) in config.vm.iter().enumerate() {
        if let Some(first) = names.insert(vm.name.as_str(), i) {
            problems.push(
                Problem::value(
                    format!("vm[{i}].name"),
                    format!("the VM name \"{}\" is used twice", vm.name),
                    "give each VM its own name",
                )
                .with_other(format!("vm[{first}].name")),
            );
        }
        if vm.limits.tracked_sources == 0 && limits_sources(&vm.limits) {
            problems.push(untracked(&format!("vm[{i}].limits")));
        }
    }
}

/// Limits of the switch.
fn check_counts(config: &Config, problems: &mut Vec<Problem>) {
    let vms = config.vms();
    if vms.len() > MAX_VMS {
        problems.push(Problem::value(
            "vm",
            format!("{} VMs, counting ports that are VMs of their own; at most {MAX_VMS} are possible", vms.len()),
            "let ports share VMs by their key `vm`",
        ));
    }
    for (i, vm) in config.vm.iter().enumerate() {
        let ports = config.ports_of(&vm.name).count();
        if ports > usize::from(MAX_VM_PORTS) {
            problems.push(Problem::value(
                format!("vm[{i}].name"),
                format!("VM \"{}\" has {ports} ports; at most {MAX_VM_PORTS} are possible", vm.name),
                "move some to another VM",
            ));
        }
    }
}

fn limits_sources(limits: &ferry_dataplane::firewall::limits::LimitsConfig) -> bool {
    let s = &limits.per_source;
    s.max_connections != 0 || s.max_half_open != 0 || s.new_per_second != 0
}

fn untracked(at: &str) -> Problem {
    Problem::value(
        format!("{at}.tracked_sources"),
        "limits per source need tracked sources",
        "give a number above 0, or remove `per_source`",
    )
}

fn check_port(
    config: &Config,
    port: &PortConfig,
    at: &str,
    document: Option<&PolicyDocument>,
    problems: &mut Vec<Problem>,
) {
    if let Some(vm) = port.vm.as_ref().filter(|vm| config.vm.iter().all(|v| v.name != **vm)) {
        let fix = match did_you_mean(vm, config.vm.iter().map(|v| v.name.as_str())) {
            Some(v) => format!("did you mean \"{v}\"?"),
            None => format!("add it: [[vm]] with name = \"{vm}\""),
        };
        let what = format!("port \"{}\" belongs to VM \"{vm}\", which does not exist", port.name);
        problems.push(Problem::value(format!("{at}.vm"), what, fix));
    }
    let Some(firewall) = &port.firewall else {
        if port.vm.is_some() {
            problems.push(Problem::value(
                format!("{at}.vm"),
                format!("port \"{}\" has no firewall, so that it needs no VM", port.name),
                "add [port.firewall], or remove `vm`",
            ));
        }
        return;
    };
    let at = format!("{at}.firewall");
    if port.vm.is_some() && firewall.limits.is_some() {
        problems.push(Problem::key(
            format!("{at}.limits"),
            "limits are the VM's: its ports share them",
            "move them to the [[vm]] section",
        ));
    }
    if port.vm.is_none()
        && let Some(i) = config.vm.iter().position(|v| v.name == port.name)
    {
        problems.push(
            Problem::value(
                &at,
                format!("port \"{}\" is a VM of its own, but a VM of this name is configured", port.name),
                format!("add vm = \"{}\" to the port if it belongs to that VM, or rename one of them", port.name),
            )
            .with_other(format!("vm[{i}].name")),
        );
    }
    if firewall.limits.is_some_and(|l| l.tracked_sources == 0 && limits_sources(&l)) {
        problems.push(untracked(&format!("{at}.limits")));
    }
    let spoof = &firewall.anti_spoofing;
    if spoof.enabled && spoof.addresses.is_empty() && spoof.allowed_address_pairs.is_empty() {
        problems.push(Problem::value(
            format!("{at}.anti_spoofing.addresses"),
            format!("the addresses of port \"{}\" are missing: without them the VM may send nothing", port.name),
            "add `addresses` to anti_spoofing, such as addresses = [\"192.0.2.7\"], or set its enabled = false",
        ));
    }
    let Some(document) = document else { return };
    let faults = document.validate_port(&firewall.policy(), &at).err().unwrap_or_default();
    problems.extend(faults.into_iter().map(|e| policy_problem(e.path.clone(), e, document)));
}

/// `security_groups."a.b".rules[0]` as this file's keys have it: `security_group.a.b.rules[0]`.
fn document_path(path: &str) -> String {
    for (list, section) in [("security_groups", "security_group"), ("address_sets", "address_set")] {
        let Some(rest) = path.strip_prefix(list) else { continue };
        let Some(rest) = rest.strip_prefix('.') else { return format!("{section}{rest}") };
        // Names are letters, digits, '.', '_' and '-': between quotes there is nothing escaped.
        return match rest.strip_prefix('"').and_then(|r| r.split_once('"')) {
            Some((name, rest)) => format!("{section}.{name}{rest}"),
            None => format!("{section}.{rest}"),
        };
    }
    path.to_owned()
}

fn policy_problem(path: String, e: PolicyError, document: &PolicyDocument) -> Problem {
    let missing = |what: &str| e.message.strip_prefix(what).map(|n| n.trim_matches('"').to_owned());
    let fix = if let Some(name) = missing("there is no security group ") {
        named_fix(&name, document.security_groups.keys(), "security_group")
    } else if let Some(name) = missing("there is no address set ") {
        named_fix(&name, document.address_sets.keys(), "address_set")
    } else if path.ends_with("anti_spoofing.mac") {
        "add mac = \"52:54:00:12:34:56\" (the address of the guest's NIC), or set enabled = false".to_owned()
    } else {
        String::new()
    };
    Problem::value(path, e.message, fix)
}

fn named_fix<'a>(name: &str, known: impl Iterator<Item = &'a String>, section: &str) -> String {
    match did_you_mean(name, known.map(String::as_str)) {
        Some(k) => format!("did you mean \"{k}\"?"),
        None => format!("add it: [{section}.{name}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::document_path;

    #[test]
    fn paths_of_the_policy_become_those_of_the_file() {
        assert_eq!(document_path("security_groups.web.rules[3].ports[0]"), "security_group.web.rules[3].ports[0]");
        assert_eq!(document_path("security_groups.\"a.b\".rules[3]"), "security_group.a.b.rules[3]");
        assert_eq!(document_path("address_sets.\"x.y\""), "address_set.x.y");
        assert_eq!(document_path("security_groups"), "security_group");
    }
}
