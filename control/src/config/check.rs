//! Checks of entries against each other, after each was found well-formed by itself.
use std::collections::HashMap;

use super::firewall_check;
use super::migration_check;
use super::model::*;
use super::problem::Problem;
use super::schema::did_you_mean;

/// EAL arguments that Ferry sets itself; giving them again would break its start-up.
const RESERVED_EAL_ARGS: &[&str] = &[
    "-l",
    "-c",
    "--lcores",
    "--main-lcore",
    "--in-memory",
    "--no-huge",
    "--no-shconf",
    "-m",
    "--vdev",
    "-a",
    "--allow",
];

/// Adds everything wrong among the entries of `config`.
pub(super) fn check(config: &Config, problems: &mut Vec<Problem>) {
    check_pmds(config, problems);
    check_services(config, problems);
    check_bridges(config, problems);
    firewall_check::check(config, problems);
    migration_check::check(config, problems);
    let mut names = HashMap::new();
    let mut resources = HashMap::new();
    resources.insert(format!("socket {}", config.api.socket.display()), "api.socket".to_owned());
    for (i, port) in config.port.iter().enumerate() {
        let at = format!("port[{i}]");
        if let Some(first) = names.insert(port.name.as_str(), format!("{at}.name")) {
            problems.push(
                Problem::value(
                    format!("{at}.name"),
                    format!("the port name \"{}\" is used twice", port.name),
                    "give each port its own name",
                )
                .with_other(first),
            );
        }
        let key = match port.kind {
            PortKind::VhostUser(_) => format!("{at}.socket"),
            PortKind::Dpdk(_) => format!("{at}.device"),
        };
        if let Some(first) = resources.insert(port.resource(), key.clone()) {
            problems.push(
                Problem::value(key, format!("the {} is used twice", port.resource()), "give each port its own")
                    .with_other(first),
            );
        }
        check_port(config, port, &at, problems);
    }
}

fn check_pmds(config: &Config, problems: &mut Vec<Problem>) {
    let mut cores = HashMap::new();
    for (i, pmd) in config.switch.pmd.iter().enumerate() {
        let Some(core) = pmd.core else { continue };
        if let Some(first) = cores.insert(core, i) {
            problems.push(
                Problem::value(
                    format!("switch.pmd[{i}].core"),
                    format!("core {core} is used by two PMD threads"),
                    "pin each PMD thread to a core of its own",
                )
                .with_other(format!("switch.pmd[{first}].core")),
            );
        }
    }
}

fn check_services(config: &Config, problems: &mut Vec<Problem>) {
    let m = &config.metrics;
    if !m.listen.ip().is_loopback() && !m.allow_remote {
        problems.push(Problem::value(
            "metrics.listen",
            format!("{} can be reached from other hosts", m.listen),
            "listen on 127.0.0.1 or [::1], or set metrics.allow_remote = true",
        ));
    }
    if !is_log_filter(&config.log.level) {
        let words = ["error", "warn", "info", "debug", "trace", "off"];
        problems.push(Problem::value(
            "log.level",
            format!("\"{}\" is not a level or filter", config.log.level),
            match did_you_mean(&config.log.level, words.into_iter()) {
                Some(w) => format!("did you mean \"{w}\"?"),
                None => "use \"error\", \"warn\", \"info\", \"debug\" or \"trace\", or a filter such as \"info,ferry_vhost=debug\"".into(),
            },
        ));
    }
    for (i, arg) in config.dpdk.extra_args.iter().enumerate() {
        let name = arg.split('=').next().unwrap_or_default();
        if RESERVED_EAL_ARGS.contains(&name) {
            problems.push(Problem::value(
                format!("dpdk.extra_args[{i}]"),
                format!("Ferry sets {name} itself"),
                "remove it; devices are named by ports of type \"dpdk\", memory by dpdk.memory_mb",
            ));
        }
    }
}

/// True for a level, or a list of `level` and `target=level`. (A lone target, which the filter's own parser takes, would
/// turn a misspelt level into silence.)
fn is_log_filter(text: &str) -> bool {
    text.split(',').all(|part| {
        let level = part.split_once('=').map_or(part, |(target, level)| if target.is_empty() { "" } else { level });
        level.trim().parse::<tracing_subscriber::filter::LevelFilter>().is_ok() && level.trim().parse::<u8>().is_err()
    }) && text.parse::<tracing_subscriber::filter::Targets>().is_ok()
}

fn check_bridges(config: &Config, problems: &mut Vec<Problem>) {
    let mut names = HashMap::new();
    for (i, bridge) in config.bridge.iter().enumerate() {
        if let Some(first) = names.insert(bridge.name.as_str(), i) {
            problems.push(
                Problem::value(
                    format!("bridge[{i}].name"),
                    format!("the bridge name \"{}\" is used twice", bridge.name),
                    "give each bridge its own name",
                )
                .with_other(format!("bridge[{first}].name")),
            );
        }
    }
}

fn check_port(config: &Config, port: &PortConfig, at: &str, problems: &mut Vec<Problem>) {
    if config.bridge(&port.bridge).is_none() {
        let fix = match did_you_mean(&port.bridge, config.bridge.iter().map(|b| b.name.as_str())) {
            Some(b) => format!("did you mean \"{b}\"?"),
            None if config.bridge.is_empty() => {
                format!("add a bridge: [[bridge]] with name = \"{}\"", port.bridge)
            }
            None => {
                let names: Vec<_> = config.bridge.iter().take(8).map(|b| format!("\"{}\"", b.name)).collect();
                format!("name one that exists ({}), or add it", names.join(", "))
            }
        };
        problems.push(Problem::value(
            format!("{at}.bridge"),
            format!("port \"{}\" is in bridge \"{}\", which does not exist", port.name, port.bridge),
            fix,
        ));
    }
    let pmds = config.pmds().len();
    for (i, pmd) in port.rxq_affinity.iter().enumerate() {
        if *pmd as usize >= pmds {
            problems.push(Problem::value(
                format!("{at}.rxq_affinity[{i}]"),
                format!("there is no PMD thread {pmd}"),
                format!("the {pmds} configured in switch.pmd are numbered 0 to {}", pmds - 1),
            ));
        }
    }
    check_vlan(&port.vlan, &format!("{at}.vlan"), problems);
    match &port.kind {
        PortKind::VhostUser(v) => {
            if v.features.tso && !v.features.csum {
                problems.push(Problem::value(
                    format!("{at}.features.tso"),
                    "segmentation offload needs checksum offload (virtio 1.3, 5.1.3.1)",
                    "set features.csum = true, or features.tso = false",
                ));
            }
        }
        PortKind::Dpdk(d) => {
            for (name, n) in [("rx_descriptors", d.rx_descriptors), ("tx_descriptors", d.tx_descriptors)] {
                if !n.is_power_of_two() {
                    problems.push(Problem::value(
                        format!("{at}.{name}"),
                        format!("must be a power of two, is {n}"),
                        format!("use {}", n.next_power_of_two().min(32_768)),
                    ));
                }
            }
            let least = d.rx_queues * d.rx_descriptors;
            if d.mbufs != 0 && d.mbufs <= least {
                problems.push(Problem::value(
                    format!("{at}.mbufs"),
                    format!("{} buffers do not fill the {least} receive descriptors", d.mbufs),
                    format!("use at least {}, or 0", (least * 2).next_power_of_two()),
                ));
            }
        }
    }
}

fn check_vlan(vlan: &VlanConfig, at: &str, problems: &mut Vec<Problem>) {
    let fault = |key: &str, what: &str, fix: &str| Problem::value(format!("{at}.{key}"), what, fix);
    match vlan.mode {
        VlanKind::Access if vlan.tag.is_none() => {
            problems.push(fault("tag", "the access VLAN is missing", "add `tag`"));
        }
        VlanKind::Access if !vlan.trunks.is_empty() => problems.push(fault(
            "trunks",
            "an access port carries one VLAN only",
            "remove `trunks`, or use mode \"trunk\" or \"native-untagged\"",
        )),
        VlanKind::Trunk if vlan.tag.is_some() => problems.push(fault(
            "tag",
            "a port of mode \"trunk\" has no VLAN for untagged frames",
            "remove `tag`, or use mode \"access\", \"native-tagged\" or \"native-untagged\"",
        )),
        VlanKind::NativeTagged | VlanKind::NativeUntagged if vlan.tag.is_none() => {
            problems.push(fault("tag", "the native VLAN is missing", "add `tag`, or use mode \"trunk\""));
        }
        _ => {}
    }
    let native = matches!(vlan.mode, VlanKind::NativeTagged | VlanKind::NativeUntagged);
    if let Some(i) = vlan.trunks.iter().position(|t| t.bounds().is_some_and(|(lo, _)| lo == 0)).filter(|_| native) {
        problems.push(fault(
            &format!("trunks[{i}]"),
            "VLAN 0 stands for untagged frames, which belong to the native VLAN here",
            "remove it",
        ));
    }
}
