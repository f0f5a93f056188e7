//! Carries out the commands of `ferry`.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};
use hyper::Method;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::args::*;
use super::client::{CliError, Client};
use super::migrate_args::MigrateCommand;
use super::table::{Table, colours, state};
use super::{conntrack, firewall, migrate, pki, policy};
use crate::api::views::{BridgeView, Origin, PmdView, PortView, Status};
use crate::config::{self, Config, PortKind, VlanConfig, VlanItem, VlanKind, VlanKind as V, schema};
use crate::core::Outcome;
use crate::engine::{FdbEntry, RxStats, Stats};
use crate::firewall::filter::escape;

pub(super) type Result<T> = std::result::Result<T, CliError>;

/// Runs `ferry` with the process's arguments; returns the exit status.
pub fn main() -> u8 {
    match run(&Cli::parse()) {
        Ok(text) => match std::io::stdout().write_all(text.as_bytes()) {
            // The reader has gone (`ferry ... | head`): nothing is wrong.
            Ok(()) | Err(_) => 0,
        },
        Err(e) => {
            let paint = std::io::stderr().is_terminal();
            let label = if paint { "\x1b[31merror:\x1b[0m" } else { "error:" };
            match &e {
                CliError::Config(text) => eprintln!("{text}"),
                _ => eprintln!("{label} {e}"),
            }
            if let CliError::Refused { detail, .. } = &e {
                detail.details.iter().for_each(|d| eprintln!("  - {d}"));
            }
            if !e.hint().is_empty() {
                eprintln!("hint: {}", e.hint());
            }
            e.exit_code()
        }
    }
}

fn run(cli: &Cli) -> Result<String> {
    let client = || Client::new(&cli.socket);
    match &cli.command {
        Command::Completions { shell, daemon } => Ok(completions(*shell, *daemon)),
        Command::Man { out } => man(out),
        Command::Config(ConfigCommand::Check { file }) => check(file, cli.json),
        Command::Config(ConfigCommand::Reference) => Ok(schema::reference_markdown()),
        Command::Config(ConfigCommand::Show) => config_show(&client()?, cli.json),
        Command::Status => show(cli, "/v1/status", |s: Status| status(&s)),
        Command::Port(c) => port(cli, &client()?, c),
        Command::Bridge(c) => bridge(cli, &client()?, c),
        Command::Fdb(c) => fdb(cli, &client()?, c),
        Command::Stats(a) => stats(cli, &client()?, a),
        Command::Pmd(PmdCommand::Show) => show(cli, "/v1/pmds", |p: Pmds| pmds(&p.pmds)),
        Command::Pmd(PmdCommand::Perf) => show(cli, "/v1/pmds", |p: Pmds| perf(&p.pmds)),
        Command::Pmd(PmdCommand::Assign { port, queue, pmd }) => {
            let path = format!("/v1/ports/{}/rxqs/{queue}", escape(port));
            outcome(cli, client()?.send(Method::PUT, &path, Some(&json!({ "pmd": pmd })))?)
        }
        Command::Conntrack(c) => conntrack::run(&client()?, c, cli.json),
        Command::Policy(PolicyCommand::Check { file }) => policy::check(file, cli.json),
        Command::Policy(PolicyCommand::Show { name }) => policy::show(&client()?, name.as_deref(), cli.json),
        Command::Policy(PolicyCommand::Explain { port, packet, file: Some(file) }) => {
            policy::explain_file(file, port, packet, cli.json)
        }
        Command::Policy(PolicyCommand::Explain { port, packet, file: None }) => {
            policy::explain(&client()?, port, packet, cli.json)
        }
        Command::Trace { vm, packet, port } => firewall::trace(&client()?, vm, packet, port.as_deref(), cli.json),
        Command::Fw(FwCommand::Drops { vm, limit, watch }) => {
            firewall::drops(&client()?, vm.as_deref(), *limit, *watch, cli.json)
        }
        Command::Migrate(MigrateCommand::Audit { file, key, config }) => {
            migrate::audit(file.as_deref(), key, config, cli.json)
        }
        Command::Migrate(c) => migrate::run(&client()?, c, cli.json),
        Command::Pki(c) => pki::run(c, cli.json),
        Command::Reload { discard_runtime, dry_run } => {
            let path = format!("/v1/reload?discard_runtime={discard_runtime}&dry_run={dry_run}");
            outcome(cli, client()?.send(Method::POST, &path, None)?)
        }
        Command::Log { level } => {
            outcome(cli, client()?.send(Method::PUT, "/v1/log", Some(&json!({ "level": level })))?)
        }
    }
}

#[derive(serde::Deserialize)]
struct Pmds {
    pmds: Vec<PmdView>,
}
#[derive(serde::Deserialize)]
struct Ports {
    ports: Vec<PortView>,
}
#[derive(serde::Deserialize)]
struct Bridges {
    bridges: Vec<BridgeView>,
}
#[derive(serde::Deserialize)]
struct Addresses {
    bridge: String,
    fdb: Vec<FdbEntry>,
}

pub(super) fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

pub(super) fn typed<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| {
        CliError::Other(format!("this ferry does not understand ferryd's answer ({e}): are they of one version?"))
    })
}

fn show<T: DeserializeOwned>(cli: &Cli, path: &str, text: impl FnOnce(T) -> String) -> Result<String> {
    let value = Client::new(&cli.socket)?.get(path)?;
    if cli.json { Ok(pretty(&value)) } else { Ok(text(typed(value)?)) }
}

fn outcome(cli: &Cli, value: Value) -> Result<String> {
    if cli.json {
        return Ok(pretty(&value));
    }
    let o: Outcome = typed(value)?;
    let mut out = String::new();
    if o.changes.is_empty() {
        out.push_str("nothing to change\n");
    } else if !o.applied {
        out.push_str("would change:\n");
    }
    let indent = if o.applied { "" } else { "  " };
    for c in &o.changes {
        let _ = writeln!(out, "{indent}{c}");
    }
    if !o.applied && !o.steps.is_empty() {
        let _ = writeln!(out, "by these steps:\n  {}", o.steps.join("\n  "));
    }
    for p in &o.restarted_ports {
        let _ = writeln!(out, "{indent}port {p} {}", if o.applied { "was restarted" } else { "would be restarted" });
    }
    for key in &o.restart_required {
        let _ = writeln!(out, "{key} takes effect when ferryd is started again");
    }
    Ok(out)
}

fn status(s: &Status) -> String {
    let colours = colours();
    let mut out = String::new();
    let up = Duration::from_secs(s.uptime_s);
    let _ = writeln!(out, "ferryd {} (API {}, pid {}), up {}", s.version, s.api, s.pid, duration(up));
    let _ = writeln!(out, "configuration: {}", s.config_file.as_deref().unwrap_or("none"));
    let states: Vec<String> = s.ports.iter().map(|(k, n)| format!("{n} {}", state(k, colours))).collect();
    let states = if states.is_empty() { String::new() } else { format!(" ({})", states.join(", ")) };
    let _ = writeln!(
        out,
        "{} PMD thread(s), {} bridge(s), {} port(s){states}",
        s.pmds,
        s.bridges,
        s.ports.values().sum::<usize>()
    );
    let held = if s.held > 0 { format!("{} fragments held, ", s.held) } else { String::new() };
    let _ = writeln!(out, "frames: {} received, {} forwarded, {held}{} dropped", s.received, s.forwarded, s.dropped);
    let _ =
        writeln!(out, "log level: {}; DPDK: {}", s.log_level, if s.dpdk_started { "running" } else { "not started" });
    if !s.damage.is_empty() {
        let _ = writeln!(out, "damaged by a failed change: {}", s.damage);
    }
    if !s.not_in_file.is_empty() {
        out.push_str("not in the file (changed at run time, lost at the next start):\n");
        for c in &s.not_in_file {
            let _ = writeln!(out, "  {c}");
        }
    }
    if !s.restart_required.is_empty() {
        let _ = writeln!(out, "in the file, in effect after the next start: {}", s.restart_required.join(", "));
    }
    out
}

fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86400, s / 3600 % 24),
    }
}

fn vlan_text(v: &VlanConfig) -> String {
    let list = || match v.trunks.is_empty() {
        true => "all".to_owned(),
        false => v
            .trunks
            .iter()
            .map(|t| match t {
                VlanItem::Id(id) => id.to_string(),
                VlanItem::Range(r) => r.clone(),
            })
            .collect::<Vec<_>>()
            .join(","),
    };
    let tag = v.tag.unwrap_or(0);
    match v.mode {
        V::Access => format!("access {tag}"),
        V::Trunk => format!("trunk {}", list()),
        V::NativeTagged => format!("trunk {} native {tag} tagged", list()),
        V::NativeUntagged => format!("trunk {} native {tag}", list()),
    }
}

pub(super) fn origin_text(o: Origin) -> &'static str {
    match o {
        Origin::File => "file",
        Origin::Changed => "file, changed",
        Origin::Runtime => "run time",
    }
}

fn port(cli: &Cli, client: &Client, command: &PortCommand) -> Result<String> {
    match command {
        PortCommand::List => show(cli, "/v1/ports", |p: Ports| ports(&p.ports)),
        PortCommand::Show { name } => {
            let value = client.get(&format!("/v1/ports/{}", escape(name)))?;
            if cli.json { Ok(pretty(&value)) } else { Ok(port_details(&typed(value)?)) }
        }
        PortCommand::Add { name, bridge, vhost_user, client: connects, dpdk, vlan, settings } => {
            let mut body = json!({ "name": name, "bridge": bridge });
            if let Some(path) = vhost_user {
                body["type"] = "vhost-user".into();
                body["socket"] = absolute(path)?.into();
                body["role"] = if *connects { "client" } else { "server" }.into();
            }
            if let Some(device) = dpdk {
                body["type"] = "dpdk".into();
                body["device"] = device.as_str().into();
            }
            settings_into(&mut body, vlan_patch(vlan)?, &settings.set, false)?;
            let path = format!("/v1/ports?dry_run={}", settings.dry_run);
            outcome(cli, client.send(Method::POST, &path, Some(&body))?)
        }
        PortCommand::Set { name, vlan, settings } => {
            let mut body = json!({});
            settings_into(&mut body, vlan_patch(vlan)?, &settings.set, true)?;
            nothing_to_do(&body)?;
            let path = format!("/v1/ports/{}?dry_run={}", escape(name), settings.dry_run);
            outcome(cli, client.send(Method::PATCH, &path, Some(&body))?)
        }
        PortCommand::Remove { name, dry_run } => {
            let path = format!("/v1/ports/{}?dry_run={dry_run}", escape(name));
            outcome(cli, client.send(Method::DELETE, &path, None)?)
        }
    }
}

fn absolute(path: &str) -> Result<String> {
    let path = std::path::absolute(path).map_err(|e| CliError::Other(e.to_string()))?;
    Ok(path.display().to_string())
}

fn nothing_to_do(body: &Value) -> Result<()> {
    if body.as_object().is_some_and(Map::is_empty) {
        return Err(CliError::Usage {
            message: "nothing to set".into(),
            hint: "name settings as KEY=VALUE; docs/CONFIG.md and `ferry config reference` list the keys".into(),
        });
    }
    Ok(())
}

/// The `vlan` table that the options describe; all of its keys, so that none is left of a former mode.
fn vlan_patch(v: &VlanArgs) -> Result<Option<Value>> {
    let (mode, tag) = match (v.access, v.native) {
        (Some(tag), _) => (VlanKind::Access, Some(tag)),
        (None, Some(tag)) if v.native_tagged => (VlanKind::NativeTagged, Some(tag)),
        (None, Some(tag)) => (VlanKind::NativeUntagged, Some(tag)),
        (None, None) if v.trunk.is_some() => (VlanKind::Trunk, None),
        (None, None) => return Ok(None),
    };
    let list = v.trunk.as_deref().filter(|t| *t != "all").unwrap_or_default();
    let item = |t: &str| t.parse::<u16>().map_or_else(|_| json!(t), |n| json!(n));
    let trunks: Vec<Value> = list.split(',').map(str::trim).filter(|t| !t.is_empty()).map(item).collect();
    Ok(Some(json!({ "mode": mode, "tag": tag, "trunks": if trunks.is_empty() { Value::Null } else { trunks.into() } })))
}

/// Puts `KEY=VALUE` settings into a request. In a patch an empty value is null, which restores the default.
fn settings_into(body: &mut Value, vlan: Option<Value>, set: &[String], patch: bool) -> Result<()> {
    if let Some(mut v) = vlan {
        if !patch && let Some(map) = v.as_object_mut() {
            map.retain(|_, v| !v.is_null());
        }
        body["vlan"] = v;
    }
    for s in set {
        let usage =
            |message: String| CliError::Usage { message, hint: "write settings as KEY=VALUE, such as mtu=9000".into() };
        let (key, value) = s.split_once('=').ok_or_else(|| usage(format!("`{s}` is not a setting")))?;
        if key.is_empty() || key.split('.').any(str::is_empty) {
            return Err(usage(format!("`{s}` names no key")));
        }
        let mut at = &mut *body;
        for part in key.split('.') {
            if !at.is_object() {
                *at = json!({});
            }
            at = &mut at[part];
        }
        *at = setting(value);
    }
    if !patch && let Some(map) = body.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
    Ok(())
}

/// A value as in the configuration file; quotes around strings may be left out.
fn setting(text: &str) -> Value {
    if text.is_empty() {
        return Value::Null;
    }
    let parsed = format!("v = {text}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    match parsed {
        Some(v) if !matches!(v, toml::Value::Datetime(_)) => serde_json::to_value(v).unwrap_or_default(),
        _ => Value::from(text),
    }
}

fn ports(ports: &[PortView]) -> String {
    let colours = colours();
    let mut t = Table::new(&["PORT", "BRIDGE", "TYPE", "STATE", "VLAN", "MTU", "PMD", "FROM", "WHERE"]);
    for p in ports {
        let c = &p.config;
        let place = match &c.kind {
            PortKind::VhostUser(v) => v.socket.display().to_string(),
            PortKind::Dpdk(d) => d.device.clone(),
        };
        t.row([
            c.name.clone(),
            c.bridge.clone(),
            c.type_name().to_owned(),
            state(&p.state.state, colours),
            vlan_text(&c.vlan),
            c.mtu.to_string(),
            p.rxq_pmd.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            origin_text(p.origin).to_owned(),
            place,
        ]);
    }
    t.render()
}

fn port_details(p: &PortView) -> String {
    let mut out = String::new();
    let c = &p.config;
    let _ = writeln!(
        out,
        "port {} ({}) in bridge {}: {}",
        c.name,
        c.type_name(),
        c.bridge,
        state(&p.state.state, colours())
    );
    if !p.state.detail.is_empty() {
        let _ = writeln!(out, "  {}", p.state.detail);
    }
    let queues = p.rxq_pmd.iter().enumerate().map(|(q, pmd)| format!("{q} on PMD thread {pmd}"));
    let _ = writeln!(out, "  receive queues: {}", queues.collect::<Vec<_>>().join(", "));
    let _ = writeln!(out, "  configured by: {}", origin_text(p.origin));
    let mut section = |title: &str, value: Value| {
        if let Ok(text) = toml::to_string(&without_nulls(value)) {
            let _ = write!(out, "\n{title}:\n");
            text.lines().filter(|l| !l.is_empty()).for_each(|l| {
                let _ = writeln!(out, "  {l}");
            });
        }
    };
    section("configuration", serde_json::to_value(c).unwrap_or_default());
    section("status", p.state.status.clone());
    out
}

/// TOML has no null.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect()
        }
        Value::Array(items) => items.into_iter().filter(|v| !v.is_null()).map(without_nulls).collect(),
        v => v,
    }
}

fn bridge(cli: &Cli, client: &Client, command: &BridgeCommand) -> Result<String> {
    match command {
        BridgeCommand::List => show(cli, "/v1/bridges", |b: Bridges| {
            let mut t = Table::new(&["BRIDGE", "PORTS", "ADDRESSES", "CAPACITY", "AGEING", "FROM", "MEMBERS"]);
            for v in &b.bridges {
                let c = &v.config;
                t.row([
                    c.name.clone(),
                    v.ports.len().to_string(),
                    v.fdb_entries.to_string(),
                    c.fdb_capacity.to_string(),
                    format!("{} s", c.fdb_ageing_s),
                    origin_text(v.origin).to_owned(),
                    v.ports.join(","),
                ]);
            }
            t.render()
        }),
        BridgeCommand::Add { name, settings } => {
            let mut body = json!({ "name": name });
            settings_into(&mut body, None, &settings.set, false)?;
            let path = format!("/v1/bridges?dry_run={}", settings.dry_run);
            outcome(cli, client.send(Method::POST, &path, Some(&body))?)
        }
        BridgeCommand::Set { name, settings } => {
            let mut body = json!({});
            settings_into(&mut body, None, &settings.set, true)?;
            nothing_to_do(&body)?;
            let path = format!("/v1/bridges/{}?dry_run={}", escape(name), settings.dry_run);
            outcome(cli, client.send(Method::PATCH, &path, Some(&body))?)
        }
        BridgeCommand::Remove { name, dry_run } => {
            let path = format!("/v1/bridges/{}?dry_run={dry_run}", escape(name));
            outcome(cli, client.send(Method::DELETE, &path, None)?)
        }
    }
}

fn fdb(cli: &Cli, client: &Client, command: &FdbCommand) -> Result<String> {
    match command {
        FdbCommand::Show { bridge, port } => {
            let names = match bridge {
                Some(b) => vec![b.clone()],
                None => {
                    let all: Bridges = typed(client.get("/v1/bridges")?)?;
                    all.bridges.into_iter().map(|b| b.config.name).collect()
                }
            };
            let mut t = Table::new(&["BRIDGE", "VLAN", "ADDRESS", "PORT", "AGE"]);
            let mut raw = Vec::new();
            for name in names {
                let mut value = client.get(&format!("/v1/bridges/{}/fdb", escape(&name)))?;
                if let (Some(p), Some(items)) = (port, value["fdb"].as_array_mut()) {
                    items.retain(|e| e["port"] == p.as_str());
                }
                if cli.json {
                    raw.push(value);
                    continue;
                }
                let a: Addresses = typed(value)?;
                for e in a.fdb {
                    t.row([a.bridge.clone(), e.vlan.to_string(), e.mac, e.port, format!("{} s", e.age_s)]);
                }
            }
            if cli.json { Ok(pretty(&Value::Array(raw))) } else { Ok(t.render()) }
        }
        FdbCommand::Flush { bridge, port } => {
            let query = port.as_ref().map(|p| format!("?port={}", escape(p))).unwrap_or_default();
            let value = client.send(Method::DELETE, &format!("/v1/bridges/{}/fdb{query}", escape(bridge)), None)?;
            if cli.json { Ok(pretty(&value)) } else { Ok(format!("{} address(es) forgotten\n", value["flushed"])) }
        }
    }
}

fn stats(cli: &Cli, client: &Client, args: &StatsArgs) -> Result<String> {
    let path = match &args.port {
        Some(p) => format!("/v1/stats?port={}", escape(p)),
        None => "/v1/stats".to_owned(),
    };
    let Some(seconds) = args.watch else {
        let value = client.get(&path)?;
        let s: Stats = typed(value.clone())?;
        let text = if cli.json { pretty(&value) } else { stats_text(&s, None) };
        if args.check
            && let Some(e) = unbalanced(client, &path, s)?
        {
            print!("{text}");
            return Err(e);
        }
        return Ok(text);
    };
    let mut before: Option<(Instant, Stats)> = None;
    let screen = std::io::stdout().is_terminal() && !cli.json;
    loop {
        let value = client.get(&path)?;
        let now = Instant::now();
        let s: Stats = typed(value.clone())?;
        let text = if cli.json {
            value.to_string() + "\n"
        } else {
            stats_text(&s, before.as_ref().map(|(at, old)| (now.duration_since(*at), old)))
        };
        let clear = if screen { "\x1b[H\x1b[2J" } else { "" };
        let mut out = std::io::stdout().lock();
        if out.write_all(format!("{clear}{text}").as_bytes()).and_then(|()| out.flush()).is_err() {
            return Ok(String::new());
        }
        before = Some((now, s));
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

/// Looks a few times: counters are read while frames are on their way.
fn unbalanced(client: &Client, path: &str, mut stats: Stats) -> Result<Option<CliError>> {
    let mut wrong = imbalances(&stats);
    for _ in 0..20 {
        if wrong.is_empty() {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
        stats = typed(client.get(path)?)?;
        wrong = imbalances(&stats);
    }
    let message = format!("received is not forwarded + held + dropped: {}", wrong.join("; "));
    Ok((!wrong.is_empty()).then_some(CliError::Unbalanced(message)))
}

fn imbalances(s: &Stats) -> Vec<String> {
    let queues = s.ports.iter().flat_map(|p| p.rx.iter().map(|q| (format!("port {} queue {}", p.port, q.queue), q)));
    queues
        .chain([("originated".to_owned(), &s.originated), ("removed ports".to_owned(), &s.removed)])
        .filter(|(_, q)| q.imbalance() != 0)
        .map(|(name, q)| {
            format!(
                "{name}: {} received, {} forwarded, {} held, {} dropped",
                q.frames,
                q.forwarded,
                q.held,
                q.dropped_total()
            )
        })
        .collect()
}

fn rate(now: u64, before: Option<u64>, seconds: f64) -> String {
    before.map_or_else(|| "-".to_owned(), |b| format!("{:.0}", now.saturating_sub(b) as f64 / seconds.max(0.001)))
}

fn reasons(map: &BTreeMap<String, u64>) -> String {
    map.iter().map(|(r, n)| format!("{r}={n}")).collect::<Vec<_>>().join(" ")
}

fn stats_text(s: &Stats, before: Option<(Duration, &Stats)>) -> String {
    let seconds = before.map_or(0.0, |(d, _)| d.as_secs_f64());
    let old = |port: &str| before.and_then(|(_, b)| b.ports.iter().find(|p| p.port == port));
    let watch = before.is_some();
    let colours = colours();
    let verdict = |q: &RxStats| match q.imbalance() {
        0 => state("OK", colours),
        n => format!("{n:+}"),
    };

    let mut heads = vec!["PORT", "QUEUE", "PMD", "RECEIVED", "FORWARDED", "HELD", "DROPPED", "CHECK"];
    if watch {
        heads.push("RX/s");
    }
    heads.push("DROP REASONS");
    let mut rx = Table::new(&heads);
    let mut tx_heads = vec!["PORT", "SENT", "BYTES", "REFUSED"];
    if watch {
        tx_heads.push("TX/s");
    }
    tx_heads.push("REFUSAL REASONS");
    let mut tx = Table::new(&tx_heads);
    for p in &s.ports {
        let was = old(&p.port);
        for q in &p.rx {
            let mut cells = vec![
                p.port.clone(),
                q.queue.to_string(),
                q.pmd.map_or("-".into(), |n| n.to_string()),
                q.frames.to_string(),
                q.forwarded.to_string(),
                q.held.to_string(),
                q.dropped_total().to_string(),
                verdict(q),
            ];
            if watch {
                let b = was.and_then(|w| w.rx.iter().find(|r| r.queue == q.queue)).map(|r| r.frames);
                cells.push(rate(q.frames, b, seconds));
            }
            cells.push(reasons(&q.dropped));
            rx.row(cells);
        }
        let refused: u64 = p.tx.refused.values().sum();
        let mut cells = vec![p.port.clone(), p.tx.frames.to_string(), p.tx.bytes.to_string(), refused.to_string()];
        if watch {
            cells.push(rate(p.tx.frames, was.map(|w| w.tx.frames), seconds));
        }
        cells.push(reasons(&p.tx.refused));
        tx.row(cells);
    }
    for (name, q) in [("(originated)", &s.originated), ("(removed)", &s.removed)] {
        if q.frames > 0 {
            let mut cells = vec![
                name.to_owned(),
                "-".into(),
                "-".into(),
                q.frames.to_string(),
                q.forwarded.to_string(),
                q.held.to_string(),
                q.dropped_total().to_string(),
                verdict(q),
            ];
            if watch {
                cells.push("-".into());
            }
            cells.push(reasons(&q.dropped));
            rx.row(cells);
        }
    }
    let sum = |f: fn(&RxStats) -> u64| s.inputs().map(f).sum::<u64>();
    let (received, forwarded, dropped) = (sum(|q| q.frames), sum(|q| q.forwarded), sum(RxStats::dropped_total));
    let held = sum(|q| q.held);
    let difference = s.inputs().map(RxStats::imbalance).sum::<i128>();
    let check = match difference {
        0 => state("OK", colours),
        n => format!("{n:+} (frames on their way while the counters were read)"),
    };
    format!(
        "{}\n{}\nreceived = forwarded + held + dropped: {received} = {forwarded} + {held} + {dropped}  {check}\n",
        rx.render(),
        tx.render()
    )
}

fn pmds(pmds: &[PmdView]) -> String {
    let mut t =
        Table::new(&["PMD", "CORE", "BUSY", "FRAMES", "PER BURST", "SLEEPS", "SPIN us", "LATENCY us", "QUEUES"]);
    for p in pmds {
        let s = &p.stats;
        let cycles = s.busy_cycles + s.idle_cycles;
        let busy = if cycles == 0 { 0.0 } else { s.busy_cycles as f64 * 100.0 / cycles as f64 };
        let burst = if s.bursts == 0 { 0.0 } else { s.frames as f64 / s.bursts as f64 };
        t.row([
            s.pmd.to_string(),
            p.spec.core.map_or("-".into(), |c| c.to_string()),
            format!("{busy:.1}%"),
            s.frames.to_string(),
            format!("{burst:.1}"),
            s.sleeps.to_string(),
            p.spec.idle_spin_us.to_string(),
            p.spec.idle_latency_us.to_string(),
            s.queues.join(","),
        ]);
    }
    t.render()
}

/// Time-stamp counter cycles per frame since the threads began.
fn perf(pmds: &[PmdView]) -> String {
    let mut t = Table::new(&[
        "PMD",
        "FRAMES",
        "PER BURST",
        "RECEIVE",
        "ROUTE",
        "SEND",
        "RELEASE",
        "SUM",
        "FLOWS CACHED",
        "HOUSEKEEPING",
    ]);
    let ratio = |n: u64, of: u64| if of == 0 { "-".into() } else { format!("{:.1}", n as f64 / of as f64) };
    for p in pmds {
        let (s, c) = (&p.stats, &p.stats.stages);
        let busy = s.busy_cycles + s.idle_cycles;
        let share = if busy == 0 { 0.0 } else { c.housekeeping as f64 * 100.0 / busy as f64 };
        t.row([
            s.pmd.to_string(),
            s.frames.to_string(),
            ratio(s.frames, s.bursts),
            ratio(c.receive, c.frames),
            ratio(c.route, c.frames),
            ratio(c.send, c.frames),
            ratio(c.release, c.frames),
            ratio(c.receive + c.route + c.send + c.release, c.frames),
            match s.flow_cache_hits + s.flow_cache_misses {
                0 => "-".into(),
                all => format!("{:.1}%", s.flow_cache_hits as f64 * 100.0 / all as f64),
            },
            format!("{share:.2}%"),
        ]);
    }
    format!(
        "{}\nCycles per frame; flows cached: connections in bursts whose entries needed no search; housekeeping as a share of all cycles.\n",
        t.render()
    )
}

fn config_show(client: &Client, as_json: bool) -> Result<String> {
    if as_json {
        return Ok(pretty(&client.get("/v1/config")?));
    }
    let text = client.text(Method::GET, "/v1/config?format=toml", None)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Reads a configuration file; what is wrong with it also goes to standard output, as JSON.
pub(super) fn load(file: &Path, as_json: bool) -> Result<Config> {
    config::load(file).map_err(|e| {
        if as_json {
            let problem = |p: &config::Problem| {
                let (line, column) = e.position(p);
                json!({ "line": line, "column": column, "key": p.path, "message": p.message, "fix": p.fix })
            };
            let problems: Vec<Value> = e.problems.iter().map(problem).collect();
            print!("{}", pretty(&json!({ "ok": false, "file": file, "problems": problems })));
        }
        CliError::Config(e.to_string())
    })
}

fn check(file: &Path, as_json: bool) -> Result<String> {
    let c = load(file, as_json)?;
    if as_json {
        return Ok(pretty(&json!({ "ok": true, "bridges": c.bridge.len(), "ports": c.port.len() })));
    }
    Ok(format!("{}: OK: {} bridge(s), {} port(s)\n", file.display(), c.bridge.len(), c.port.len()))
}

fn completions(shell: clap_complete::Shell, daemon: bool) -> String {
    let (mut command, name) = if daemon { (DaemonArgs::command(), "ferryd") } else { (Cli::command(), "ferry") };
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

fn man(out: &Path) -> Result<String> {
    let fail = |e: std::io::Error| CliError::Other(format!("cannot write man pages to {}: {e}", out.display()));
    std::fs::create_dir_all(out).map_err(fail)?;
    let mut pages = Vec::new();
    let mut daemon = Vec::new();
    clap_mangen::Man::new(DaemonArgs::command()).section("8").render(&mut daemon).map_err(fail)?;
    pages.push(("ferryd.8".to_owned(), daemon));
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    collect_pages(&cli, "ferry", &mut pages).map_err(fail)?;
    let mut text = String::new();
    for (name, page) in pages {
        std::fs::write(out.join(&name), page).map_err(fail)?;
        let _ = writeln!(text, "{}", out.join(name).display());
    }
    Ok(text)
}

/// `ferry.1`, `ferry-port.1`, `ferry-port-add.1` ...
fn collect_pages(command: &clap::Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) -> std::io::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.to_owned())).render(&mut page)?;
    pages.push((format!("{name}.1"), page));
    for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
        collect_pages(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        DaemonArgs::command().debug_assert();
    }

    #[test]
    fn settings_are_read_as_in_the_file() {
        let mut body = json!({});
        let set = [
            "mtu=9000",
            "features.packed=false",
            "rxq_affinity=[0, 1]",
            "socket=/run/x",
            "socket_mode=\"0600\"",
            "fdb_limit=",
        ];
        settings_into(&mut body, None, &set.map(String::from), true).unwrap();
        assert_eq!(
            body,
            json!({"mtu": 9000, "features": {"packed": false}, "rxq_affinity": [0, 1], "socket": "/run/x", "socket_mode": "0600", "fdb_limit": null})
        );
        for bad in ["mtu", "=3", "a..b=1"] {
            assert!(settings_into(&mut json!({}), None, &[bad.to_owned()], true).is_err(), "{bad}");
        }
    }

    #[test]
    fn vlan_options_describe_the_whole_table() {
        let v = |access, trunk: Option<&str>, native, native_tagged| {
            vlan_patch(&VlanArgs { access, trunk: trunk.map(Into::into), native, native_tagged }).unwrap()
        };
        assert_eq!(v(None, None, None, false), None);
        assert_eq!(v(Some(5), None, None, false), Some(json!({"mode": "access", "tag": 5, "trunks": null})));
        assert_eq!(v(None, Some("all"), None, false), Some(json!({"mode": "trunk", "tag": null, "trunks": null})));
        assert_eq!(
            v(None, Some("10-20, 30"), Some(7), true),
            Some(json!({"mode": "native-tagged", "tag": 7, "trunks": ["10-20", 30]}))
        );
    }
}
