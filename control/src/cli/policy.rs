//! `ferry policy`
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use ferry_dataplane::firewall::{Rule, SecurityGroup};
use hyper::Method;
use serde_json::json;

use super::client::{CliError, Client};
use super::run::{Result, load, pretty, typed};
use super::table::Table;
use crate::api::views::{PolicyView, PortPolicyView};
use crate::config::Config;
use crate::firewall::explain::{self, ExplainError};
use crate::firewall::filter::escape;
use crate::firewall::packet_text;

/// `ferry policy show`
///
/// # Errors
/// No daemon, or there is nothing of this name.
pub fn show(client: &Client, name: Option<&str>, as_json: bool) -> Result<String> {
    let value = client.get("/v1/policy")?;
    let view: PolicyView = typed(value.clone())?;
    let Some(name) = name else {
        return Ok(if as_json { pretty(&value) } else { overview(&view) });
    };
    let port = view.ports.iter().find(|p| p.port == name);
    let group = view.security_groups.get(name);
    let set = view.address_sets.get(name);
    if port.is_none() && group.is_none() && set.is_none() {
        return Err(CliError::Refused {
            status: 404,
            detail: crate::api::ErrorDetail {
                code: "not_found".into(),
                message: format!("there is no port with a firewall, security group or address set {name}"),
                hint: "`ferry policy show` lists them".into(),
                ..Default::default()
            },
        });
    }
    if as_json {
        return Ok(pretty(&json!({ "port": port, "security_group": group, "address_set": set })));
    }
    let mut out = String::new();
    if let Some(p) = port {
        out += &port_text(p, &view);
    }
    if let Some(g) = group {
        out += &group_text(name, g, &view);
    }
    if let Some(s) = set {
        let _ = writeln!(out, "address set {name}{}: {} prefix(es)", described(&s.description), s.addresses.len());
        s.addresses.iter().for_each(|a| {
            let _ = writeln!(out, "  {a}");
        });
    }
    Ok(out)
}

fn described(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

fn overview(view: &PolicyView) -> String {
    let mut groups = Table::new(&["GROUP", "RULES", "PORTS", "DESCRIPTION"]);
    for (name, g) in &view.security_groups {
        let ports = members(name, view).count();
        groups.row([name.clone(), g.rules.len().to_string(), ports.to_string(), g.description.clone()]);
    }
    let mut sets = Table::new(&["ADDRESS SET", "PREFIXES", "DESCRIPTION"]);
    for (name, s) in &view.address_sets {
        sets.row([name.clone(), s.addresses.len().to_string(), s.description.clone()]);
    }
    let mut ports = Table::new(&["PORT", "VM", "GROUPS", "INGRESS", "EGRESS", "ANTI-SPOOFING", "ADDRESSES"]);
    for p in &view.ports {
        let f = &p.firewall;
        let addresses: Vec<String> = f.anti_spoofing.addresses.iter().map(|a| plain(&a.to_string())).collect();
        ports.row([
            p.port.clone(),
            p.vm.clone(),
            if f.security_groups.is_empty() { "-".to_owned() } else { f.security_groups.join(",") },
            f.default_ingress.name().to_owned(),
            f.default_egress.name().to_owned(),
            if f.anti_spoofing.enabled { "on" } else { "off" }.to_owned(),
            addresses.join(","),
        ]);
    }
    format!("{}\n{}\n{}", groups.render(), sets.render(), ports.render())
}

/// Without the length of a prefix that is a single address.
fn plain(cidr: &str) -> String {
    let host = if cidr.contains(':') { "/128" } else { "/32" };
    cidr.strip_suffix(host).unwrap_or(cidr).to_owned()
}

fn members<'a>(group: &'a str, view: &'a PolicyView) -> impl Iterator<Item = &'a PortPolicyView> {
    view.ports.iter().filter(move |p| p.firewall.security_groups.iter().any(|g| g == group))
}

fn rule_text(index: usize, rule: &Rule) -> String {
    match &rule.name {
        Some(name) => format!("  {index:>4}  {rule}  ({name})\n"),
        None => format!("  {index:>4}  {rule}\n"),
    }
}

fn group_text(name: &str, group: &SecurityGroup, view: &PolicyView) -> String {
    let mut out = String::new();
    let stateless = if group.stateless { ", stateless" } else { "" };
    let _ = writeln!(
        out,
        "security group {name}{}{stateless}: {} rule(s)",
        described(&group.description),
        group.rules.len()
    );
    group.rules.iter().enumerate().for_each(|(i, r)| out += &rule_text(i, r));
    let members: Vec<String> = members(name, view)
        .map(|p| {
            let spoof = &p.firewall.anti_spoofing;
            let pairs = spoof.allowed_address_pairs.iter().map(|p| p.address);
            let all: Vec<String> =
                spoof.addresses.iter().copied().chain(pairs).map(|a| plain(&a.to_string())).collect();
            format!("{} ({})", p.port, if all.is_empty() { "no address".to_owned() } else { all.join(", ") })
        })
        .collect();
    let _ = writeln!(out, "members: {}", if members.is_empty() { "none".to_owned() } else { members.join(", ") });
    out
}

fn port_text(p: &PortPolicyView, view: &PolicyView) -> String {
    let f = &p.firewall;
    let mut out = String::new();
    let _ = writeln!(out, "port {} of VM {}", p.port, p.vm);
    let _ = writeln!(
        out,
        "  where no rule matches: ingress {}, egress {}{}",
        f.default_ingress.name(),
        f.default_egress.name(),
        if f.log_default { ", logged" } else { "" }
    );
    let spoof = &f.anti_spoofing;
    let mac = spoof.mac.map_or("any MAC".to_owned(), |m| m.to_string());
    let own: Vec<String> = spoof.addresses.iter().map(|a| plain(&a.to_string())).collect();
    let pairs = spoof.allowed_address_pairs.iter().map(|p| match p.mac {
        Some(mac) => format!("{} with {mac}", plain(&p.address.to_string())),
        None => plain(&p.address.to_string()),
    });
    let all: Vec<String> = own.into_iter().chain(pairs).collect();
    let state = if spoof.enabled { "on" } else { "off" };
    let _ = writeln!(out, "  anti-spoofing {state}: {mac}, {}", all.join(", "));
    let services = [
        (f.builtin.neighbour_discovery, "neighbour discovery"),
        (f.builtin.multicast_listener, "multicast listener discovery"),
        (f.builtin.dhcp_client, "DHCP client"),
    ];
    let services: Vec<&str> = services.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect();
    let _ =
        writeln!(out, "  built in: {}", if services.is_empty() { "nothing".to_owned() } else { services.join(", ") });
    for name in &f.security_groups {
        if let Some(g) = view.security_groups.get(name) {
            let _ = writeln!(out, "security group {name}{}:", described(&g.description));
            g.rules.iter().enumerate().for_each(|(i, r)| out += &rule_text(i, r));
        }
    }
    out
}

/// `ferry policy check`
///
/// # Errors
/// Everything that is wrong with the file.
pub fn check(file: &Path, as_json: bool) -> Result<String> {
    let config = load(file, as_json)?;
    let rules = compile_all(&config).map_err(|e| CliError::Config(format!("{}: error: {e}", file.display())))?;
    let unused = unused(&config);
    let groups = config.security_group.len();
    let group_rules: usize = config.security_group.values().map(|g| g.rules.len()).sum();
    if as_json {
        return Ok(pretty(&json!({
            "ok": true, "security_groups": groups, "rules": group_rules, "address_sets": config.address_set.len(),
            "vms": config.vms().len(), "ports": rules, "unused": unused,
        })));
    }
    let mut out = format!(
        "{}: OK: {groups} security group(s) with {group_rules} rule(s), {} address set(s), {} VM(s), {} port(s) with a firewall\n",
        file.display(),
        config.address_set.len(),
        config.vms().len(),
        rules.len()
    );
    for (what, names) in unused {
        if !names.is_empty() {
            let _ = writeln!(out, "note: {what} that nothing uses: {}", names.join(", "));
        }
    }
    let open: Vec<&str> = config
        .port
        .iter()
        .filter(|p| p.firewall.is_none() && p.type_name() == "vhost-user")
        .map(|p| p.name.as_str())
        .collect();
    if !open.is_empty() {
        let _ = writeln!(out, "note: guests' ports without a firewall: {}", open.join(", "));
    }
    Ok(out)
}

/// Compiles every port's rules, as the switch will. Number of rules by port, built-in ones included.
fn compile_all(config: &Config) -> std::result::Result<BTreeMap<String, usize>, String> {
    let mut book = explain::address_book(config)?;
    let mut out = BTreeMap::new();
    for port in &config.port {
        let Some(firewall) = &port.firewall else { continue };
        let compiled =
            explain::compiled(config, firewall, &mut book).map_err(|e| format!("port {}: {e}", port.name))?;
        out.insert(port.name.clone(), compiled.rule_count());
    }
    Ok(out)
}

fn unused(config: &Config) -> BTreeMap<&'static str, Vec<&str>> {
    let rules = || config.security_group.values().flat_map(|g| &g.rules);
    let firewalls = || config.port.iter().filter_map(|p| p.firewall.as_ref());
    let group = |name: &&String| {
        !firewalls().any(|f| f.security_groups.contains(name))
            && !rules().any(|r| r.remote_group.as_ref() == Some(*name))
    };
    let set = |name: &&String| !rules().any(|r| r.remote_address_set.as_ref() == Some(*name));
    let vm = |name: &&str| config.ports_of(name).next().is_none();
    BTreeMap::from([
        ("security groups", config.security_group.keys().filter(group).map(String::as_str).collect()),
        ("address sets", config.address_set.keys().filter(set).map(String::as_str).collect()),
        ("VMs", config.vm.iter().map(|v| v.name.as_str()).filter(vm).collect()),
    ])
}

/// Checks a description before anybody is asked.
pub(super) fn check_packet(packet: &str) -> Result<()> {
    packet_text::parse(packet).map(|_| ()).map_err(|e| CliError::Usage { message: e.to_string(), hint: e.fix })
}

/// `ferry policy explain`
///
/// # Errors
/// The description cannot be understood; no daemon, or it refuses.
pub fn explain(client: &Client, port: &str, packet: &str, as_json: bool) -> Result<String> {
    check_packet(packet)?;
    let path = format!("/v1/ports/{}/explain", escape(port));
    let value = client.send(Method::POST, &path, Some(&json!({ "packet": packet })))?;
    if as_json {
        return Ok(pretty(&value["explanation"]));
    }
    Ok(value["text"].as_str().unwrap_or_default().to_owned() + "\n")
}

/// `ferry policy explain --file`
///
/// # Errors
/// The file or the description is wrong.
pub fn explain_file(file: &Path, port: &str, packet: &str, as_json: bool) -> Result<String> {
    check_packet(packet)?;
    let config = load(file, as_json)?;
    let explanation = explain::explain(&config, port, packet, None).map_err(|e| match e {
        ExplainError::Packet(p) => CliError::Usage { message: p.to_string(), hint: p.fix },
        ExplainError::Port(m) => CliError::Usage { message: m, hint: "`ferry policy check` lists the ports".into() },
        other => CliError::Other(other.to_string()),
    })?;
    if as_json {
        return Ok(pretty(&json!(explanation)));
    }
    Ok(format!("{explanation}\n"))
}
