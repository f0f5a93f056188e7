//! Checks of what is configured about migrations: names, files that belong together, rules.
use std::collections::HashMap;

use ferry_migrate::authz::{Authorization, AuthzError};
use ferry_migrate::pki::host_name;

use super::migration::MigrationConfig;
use super::model::{Config, PortKind};
use super::problem::Problem;

/// Adds everything wrong with what `config` says about migrations.
pub(super) fn check(config: &Config, problems: &mut Vec<Problem>) {
    let migration = &config.migration;
    check_files(config, problems);
    check_peers(migration, problems);
    check_rules(migration, problems);
    check_monitors(config, problems);
    if migration.enabled {
        check_purpose(migration, problems);
    }
}

/// An operator's own authority: what belongs together, wholly or not at all.
fn check_files(config: &Config, problems: &mut Vec<Problem>) {
    let m = &config.migration;
    let given = [("trust", &m.trust), ("certificate", &m.certificate), ("key", &m.key)];
    let together = "`trust`, `certificate` and `key` belong together";
    if let Some((present, _)) = given.iter().find(|(_, path)| path.is_some()) {
        for (missing, _) in given.iter().filter(|(_, path)| path.is_none()) {
            problems.push(
                Problem::value(
                    format!("migration.{missing}"),
                    format!("`{present}` is given, but `{missing}` is missing: {together}"),
                    format!("add `{missing}`, or remove `{present}` to use the directory `pki`"),
                )
                .with_other(format!("migration.{present}")),
            );
        }
    } else if m.revocations.is_some() {
        problems.push(Problem::key(
            "migration.revocations",
            "`revocations` is for an authority of your own; the directory `pki` has its `revoked.pem`",
            "remove it, or add `trust`, `certificate` and `key`",
        ));
    }
    if config.flow_log.file.as_ref() == Some(&m.audit_log) {
        problems.push(
            Problem::value("migration.audit_log", "the flow log goes to the same file", "give each a file of its own")
                .with_other("flow_log.file"),
        );
    }
}

fn check_peers(m: &MigrationConfig, problems: &mut Vec<Problem>) {
    let (mut hosts, mut addresses) = (HashMap::new(), HashMap::new());
    for (i, peer) in m.peer.iter().enumerate() {
        let at = format!("migration.peer[{i}]");
        if let Some(first) = hosts.insert(peer.host.to_ascii_lowercase(), i) {
            problems.push(
                Problem::value(
                    format!("{at}.host"),
                    format!("the peer \"{}\" is listed twice", peer.host),
                    "remove one of them",
                )
                .with_other(format!("migration.peer[{first}].host")),
            );
        }
        if let Some(first) = addresses.insert(peer.address, i) {
            problems.push(
                Problem::value(
                    format!("{at}.address"),
                    format!("two peers have the address {}", peer.address),
                    "give each the address where it listens",
                )
                .with_other(format!("migration.peer[{first}].address")),
            );
        }
        let (ip, port) = (peer.address.ip(), peer.address.port());
        if ip.is_unspecified() || ip.is_multicast() || port == 0 {
            problems.push(Problem::value(
                format!("{at}.address"),
                format!("nobody can connect to {}", peer.address),
                "give the address of that host, and the port of its `listen`",
            ));
        } else if let Some(bind) = m.bind.filter(|bind| bind.is_ipv4() != ip.is_ipv4()) {
            problems.push(
                Problem::value(
                    format!("{at}.address"),
                    format!("{} cannot be reached from {bind}: one is IPv4, the other IPv6", peer.address),
                    "give addresses of one family, or remove `bind`",
                )
                .with_other("migration.bind"),
            );
        }
    }
}

/// One by one, so that each wrong rule is named.
fn check_rules(m: &MigrationConfig, problems: &mut Vec<Problem>) {
    for (i, rule) in m.rule.iter().enumerate() {
        let Err(error) = Authorization::new(std::slice::from_ref(rule)) else { continue };
        problems.push(match error {
            AuthzError::Rule { field, problem, .. } => Problem::value(
                format!("migration.rule[{i}].{field}"),
                problem,
                match field {
                    "vm" => "give a VM's name or a pattern such as \"web-*\"",
                    "peer" => "give a host's name or a pattern such as \"host-*\"",
                    "roles" => "write roles = [\"send\", \"receive\"], or one of them",
                    _ => "",
                },
            ),
            other => Problem::value(format!("migration.rule[{i}]"), other.to_string(), ""),
        });
    }
}

/// A monitor serves one client, and is no vhost-user socket.
fn check_monitors(config: &Config, problems: &mut Vec<Problem>) {
    let mut taken: HashMap<_, _> = [(config.api.socket.as_path(), "api.socket".to_owned())].into();
    for (i, port) in config.port.iter().enumerate() {
        if let PortKind::VhostUser(v) = &port.kind {
            taken.entry(&v.socket).or_insert_with(|| format!("port[{i}].socket"));
        }
    }
    for (i, vm) in config.vm.iter().enumerate() {
        let Some(qmp) = &vm.migration.qmp else { continue };
        let at = format!("vm[{i}].migration.qmp");
        if let Some(first) = taken.get(qmp.as_path()) {
            problems.push(
                Problem::value(
                    &at,
                    format!("the socket {} is used twice", qmp.display()),
                    "name a monitor that only Ferry uses: QEMU's -qmp unix:PATH,server=on,wait=off",
                )
                .with_other(first),
            );
        } else {
            taken.insert(qmp, at);
        }
    }
}

/// Switched on, but nothing could ever happen.
fn check_purpose(m: &MigrationConfig, problems: &mut Vec<Problem>) {
    let own = m.host_name();
    match host_name(&own) {
        // One that is written there was checked by itself.
        Err(e) if m.host.is_none() => problems.push(Problem::value(
            "migration.host",
            format!("the machine's {e}"),
            "add `host`: the name in this host's certificate",
        )),
        _ => {}
    }
    if let Some(i) = m.peer.iter().position(|p| p.host.eq_ignore_ascii_case(&own)) {
        problems.push(Problem::value(
            format!("migration.peer[{i}].host"),
            format!("\"{own}\" is this host itself"),
            "list the other hosts only",
        ));
    }
    if m.listen.is_none() && m.peer.is_empty() {
        problems.push(Problem::value(
            "migration.enabled",
            "migrations are enabled, but VMs can neither come nor go",
            "add `listen` so that they can come, [[migration.peer]] so that they can go, or set enabled = false",
        ));
    }
    if m.rule.is_empty() {
        problems.push(Problem::value(
            "migration.rule",
            "migrations are enabled, but no rule allows any",
            "add [[migration.rule]] with vm = \"*\", peer = \"*\", roles = [\"send\", \"receive\"], or a narrower one",
        ));
    }
}
