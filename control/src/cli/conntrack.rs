//! `ferry conntrack`
use std::io::Write as _;

use hyper::Method;
use serde::Deserialize;
use serde_json::Value;

use super::args::ConntrackCommand;
use super::client::{CliError, Client};
use super::run::{Result, origin_text, pretty, typed};
use super::table::Table;
use crate::api::views::VmView;
use crate::firewall::connection::ConnectionView;
use crate::firewall::filter::{FilterText, escape};

/// Connections asked for at once.
const PAGE: u64 = 5000;

#[derive(Deserialize)]
struct Vms {
    vms: Vec<VmView>,
}

#[derive(Deserialize)]
struct Page {
    connections: Vec<Value>,
    next: Option<u64>,
}

/// Carries out the command.
///
/// # Errors
/// The filter cannot be understood; no daemon, or it refuses.
pub fn run(client: &Client, command: &ConntrackCommand, as_json: bool) -> Result<String> {
    match command {
        ConntrackCommand::List { vm, filter, limit } => {
            check(filter)?;
            list(client, vm.as_deref(), filter, limit.unwrap_or(u64::MAX), as_json)
        }
        ConntrackCommand::Flush { vm, filter, all } => {
            check(filter)?;
            if vm.is_none() && filter.is_empty() && !all {
                return Err(CliError::Usage {
                    message: "this would forget all connections of all VMs".into(),
                    hint: "name a VM or a filter, or say --all".into(),
                });
            }
            flush(client, vm.as_deref(), filter, as_json)
        }
        ConntrackCommand::Stats { vm } => stats(client, vm.as_deref(), as_json),
    }
}

fn check(filter: &FilterText) -> Result<()> {
    filter.parse().map(|_| ()).map_err(|e| CliError::Usage { message: format!("--{e}"), hint: e.fix })
}

fn vm_names(client: &Client, vm: Option<&str>) -> Result<Vec<String>> {
    if let Some(vm) = vm {
        return Ok(vec![vm.to_owned()]);
    }
    let all: Vms = typed(client.get("/v1/vms")?)?;
    Ok(all.vms.into_iter().map(|v| v.config.name).collect())
}

/// Page by page to standard output: a table may hold more than should be held here.
fn list(client: &Client, vm: Option<&str>, filter: &FilterText, limit: u64, as_json: bool) -> Result<String> {
    let mut out = std::io::stdout().lock();
    let mut shown = 0;
    // The reader has gone (`ferry ... | head`): nothing is wrong.
    let gone = |_: std::io::Error| String::new();
    if as_json && let Err(e) = out.write_all(b"[") {
        return Ok(gone(e));
    }
    for vm in vm_names(client, vm)? {
        let mut cursor = 0;
        while shown < limit {
            let wanted = (limit - shown).min(PAGE);
            let path = format!("/v1/vms/{}/connections?cursor={cursor}&limit={wanted}{}", escape(&vm), filter.query());
            let page: Page = typed(client.get(&path)?)?;
            let mut text = String::new();
            for connection in page.connections {
                if as_json {
                    text += if shown == 0 { "\n" } else { ",\n" };
                    text += &connection.to_string();
                } else {
                    text += &typed::<ConnectionView>(connection)?.to_string();
                    text.push('\n');
                }
                shown += 1;
            }
            if let Err(e) = out.write_all(text.as_bytes()) {
                return Ok(gone(e));
            }
            match page.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
    }
    drop(out);
    if as_json {
        return Ok("\n]\n".to_owned());
    }
    // As conntrack does: on standard error, so that lines can be counted.
    eprintln!("{shown} connection(s) shown");
    Ok(String::new())
}

fn flush(client: &Client, vm: Option<&str>, filter: &FilterText, as_json: bool) -> Result<String> {
    let mut answers = Vec::new();
    for vm in vm_names(client, vm)? {
        let query = filter.query();
        let path = format!("/v1/vms/{}/connections?{}", escape(&vm), query.trim_start_matches('&'));
        answers.push(client.send(Method::DELETE, &path, None)?);
    }
    if as_json {
        return Ok(pretty(&Value::Array(answers)));
    }
    let count: u64 = answers.iter().filter_map(|a| a["flushed"].as_u64()).sum();
    Ok(format!("{count} connection(s) forgotten\n"))
}

fn stats(client: &Client, vm: Option<&str>, as_json: bool) -> Result<String> {
    let path = match vm {
        Some(vm) => format!("/v1/vms/{}", escape(vm)),
        None => "/v1/vms".to_owned(),
    };
    let value = client.get(&path)?;
    if as_json {
        return Ok(pretty(&value));
    }
    Ok(match vm {
        Some(_) => details(&typed(value)?),
        None => table(&typed::<Vms>(value)?.vms),
    })
}

fn table(vms: &[VmView]) -> String {
    let heads =
        ["VM", "PORTS", "CONNECTIONS", "HALF-OPEN", "CAPACITY", "USED", "NEW", "DENIED", "INVALID", "MEMORY", "FROM"];
    let mut t = Table::new(&heads);
    for v in vms {
        let s = &v.stats;
        t.row([
            v.config.name.clone(),
            v.ports.join(","),
            s.connections.to_string(),
            s.half_open.to_string(),
            s.capacity.to_string(),
            percent(s.connections, s.capacity),
            s.new.to_string(),
            s.denied.values().sum::<u64>().to_string(),
            s.invalid.values().sum::<u64>().to_string(),
            mebibytes(s.memory_bytes),
            origin_text(v.origin).to_owned(),
        ]);
    }
    t.render()
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1}%", if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 })
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn details(v: &VmView) -> String {
    use std::fmt::Write as _;
    let (c, s) = (&v.config, &v.stats);
    let mut out = String::new();
    let ports = if v.ports.is_empty() { "none".to_owned() } else { v.ports.join(", ") };
    let _ = writeln!(out, "VM {} (configured by {}), ports: {ports}", c.name, origin_text(v.origin));
    let _ = writeln!(
        out,
        "connections: {} of {} ({}), {} half-open, {} new since the start, table {}",
        s.connections,
        s.capacity,
        percent(s.connections, s.capacity),
        s.half_open,
        s.new,
        mebibytes(s.memory_bytes)
    );
    let l = &c.limits;
    let limit = |n: u32| if n == 0 { "none".to_owned() } else { n.to_string() };
    let _ = writeln!(
        out,
        "limits: connections {}, half-open {}, new per second {}; per source: connections {}, half-open {}, new per second {}",
        limit(l.max_connections),
        limit(l.max_half_open),
        limit(l.new_per_second),
        limit(l.per_source.max_connections),
        limit(l.per_source.max_half_open),
        limit(l.per_source.new_per_second)
    );
    for (title, counts) in
        [("denied", &s.denied), ("invalid", &s.invalid), ("removed", &s.removed), ("fragments", &s.fragments)]
    {
        let shown: Vec<String> = counts.iter().filter(|(_, n)| **n > 0).map(|(k, n)| format!("{k} {n}")).collect();
        let _ = writeln!(out, "{title}: {}", if shown.is_empty() { "none".to_owned() } else { shown.join(", ") });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::views::Origin;
    use crate::config::VmConfig;
    use crate::engine::VmStats;

    #[test]
    fn stats_name_limits_and_reasons() {
        let mut config = VmConfig { name: "guest".into(), ..VmConfig::default() };
        config.limits.per_source.max_half_open = 7;
        let stats = VmStats {
            vm: "guest".into(),
            connections: 250,
            half_open: 3,
            capacity: 1000,
            memory_bytes: 1 << 20,
            new: 300,
            denied: [("policy".to_owned(), 4), ("limit_rate".to_owned(), 0)].into(),
            ..VmStats::default()
        };
        let v = VmView { config, origin: Origin::File, ports: vec!["p1".into(), "p2".into()], stats };
        assert_eq!(
            details(&v),
            "VM guest (configured by file), ports: p1, p2\n\
             connections: 250 of 1000 (25.0%), 3 half-open, 300 new since the start, table 1.0 MiB\n\
             limits: connections 1000000, half-open none, new per second none; per source: connections none, half-open 7, new per second none\n\
             denied: policy 4\ninvalid: none\nremoved: none\nfragments: none\n"
        );
        assert!(table(&[v]).lines().nth(1).unwrap().contains("25.0%"));
    }
}
