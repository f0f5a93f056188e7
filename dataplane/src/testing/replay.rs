//! Replays recorded conversations through connection tracking, on a virtual clock.
//!
//! The documents are those of `tests/data/firewall`: `scenarios[]`, each with a profile (switches that differ from Linux's defaults)
//! and `steps[]` = frame, side it comes in (`A`: the protected VM, `B`: outside), time. Every scenario begins with an empty table.
use core::fmt::Write as _;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::conntrack::{
    Checksum, Connection, CtState, Flow, Judgement, ModelTable, Packet, SctpState, TcpState, Toward, TrackConfig,
    Tracked, Tracker,
};
use crate::packet::IpProto;

/// The document is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// Cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Not JSON.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A field is missing or of the wrong kind.
    #[error("{0}")]
    Format(String),
}

fn format_error(what: impl Into<String>) -> ReplayError {
    ReplayError::Format(what.into())
}

/// Reads a document; gzip is recognised by its first bytes.
///
/// # Errors
/// See [`ReplayError`].
pub fn read(path: &Path) -> Result<Value, ReplayError> {
    let bytes = std::fs::read(path)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut text = Vec::new();
        flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut text)?;
        return Ok(serde_json::from_slice(&text)?);
    }
    Ok(serde_json::from_slice(&bytes)?)
}

/// The policy `std`, under which the recordings were made: the VM may open anything but SMTP; from outside only web, DNS and
/// ping may be opened.
pub struct StdPolicy;

impl StdPolicy {
    /// Whether the packet may pass.
    pub fn allows(tracked: &Tracked) -> bool {
        match tracked.state {
            CtState::Invalid => false,
            CtState::Established | CtState::Related | CtState::Untracked => true,
            CtState::New => tracked.flow.as_ref().is_some_and(Self::allows_new),
        }
    }

    fn allows_new(flow: &Flow) -> bool {
        let (proto, port) = (flow.key.proto(), flow.dst_port());
        match flow.toward {
            Toward::Egress => !(proto == IpProto::TCP && port == 25),
            Toward::Ingress => match proto {
                IpProto::TCP => matches!(port, 80 | 443),
                IpProto::UDP => port == 53,
                IpProto::ICMP => matches!(flow.icmp, Some((8, _))),
                IpProto::ICMPV6 => matches!(flow.icmp, Some((128, _))),
                _ => false,
            },
        }
    }
}

/// What became of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepResult {
    /// `pass`, `drop`, or `pass-changed` when something else came out than the step's frame.
    pub verdict: &'static str,
    /// Port and frame.
    pub out: Vec<(&'static str, Vec<u8>)>,
    /// `new`, `est`, `rel`, `inv`, `untr`, or none when nothing was tracked.
    pub ct_state: Option<&'static str>,
    /// `accept`, `drop`, or `none` when no rule was asked.
    pub rule: &'static str,
    /// The table afterwards.
    pub ct: Vec<CtLine>,
}

/// One entry, in the terms of `conntrack -L`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CtLine {
    /// Protocol name, or its number.
    pub proto: String,
    /// State, for protocols that have one.
    pub state: Option<String>,
    /// `UNREPLIED`, `ASSURED`.
    pub flags: Vec<String>,
    /// The tuple of the first packet.
    pub orig: String,
    /// Milliseconds until it expires.
    pub timeout_ms: u32,
}

impl CtLine {
    fn of(conn: &Connection, now_ms: u64) -> Self {
        let key = &conn.key;
        let proto = key.proto();
        let name = match proto {
            IpProto::TCP => "tcp".to_owned(),
            IpProto::UDP => "udp".to_owned(),
            IpProto::ICMP => "icmp".to_owned(),
            IpProto::ICMPV6 => "icmpv6".to_owned(),
            IpProto::SCTP => "sctp".to_owned(),
            IpProto::GRE => "gre".to_owned(),
            IpProto::UDP_LITE => "udplite".to_owned(),
            other => other.0.to_string(),
        };
        let state = match proto {
            IpProto::TCP => Some(TcpState::from_number(conn.state()).name().to_owned()),
            IpProto::SCTP => Some(SctpState::from_number(conn.state()).name().to_owned()),
            _ => None,
        };
        let mut flags = Vec::new();
        if !conn.seen_reply() {
            flags.push("UNREPLIED".to_owned());
        }
        if conn.assured() {
            flags.push("ASSURED".to_owned());
        }
        let flow = Flow { key: *key, toward: conn.opened(), icmp: None };
        let mut orig = format!("src={} dst={}", address(flow.src()), address(flow.dst()));
        match proto {
            IpProto::TCP | IpProto::UDP | IpProto::SCTP | IpProto::UDP_LITE => {
                let _ = write!(orig, " sport={} dport={}", flow.src_port(), flow.dst_port());
            }
            IpProto::ICMP | IpProto::ICMPV6 => {
                let (id, kind, code) = key.icmp();
                let _ = write!(orig, " type={kind} code={code} id={id}");
            }
            _ => {}
        }
        Self { proto: name, state, flags, orig, timeout_ms: conn.remaining_ms(now_ms) }
    }

    /// As the documents have it.
    pub fn to_json(&self) -> Value {
        let mut line = Map::new();
        line.insert("proto".into(), json!(self.proto));
        line.insert("timeout".into(), json!(self.timeout_ms / 1000));
        if let Some(state) = &self.state {
            line.insert("state".into(), json!(state));
        }
        line.insert("flags".into(), json!(self.flags));
        line.insert("orig".into(), json!(self.orig));
        Value::Object(line)
    }
}

/// IPv6 addresses in full, as `/proc/net/nf_conntrack` prints them.
fn address(addr: core::net::IpAddr) -> String {
    match addr {
        core::net::IpAddr::V4(a) => a.to_string(),
        core::net::IpAddr::V6(a) => a.segments().map(|s| format!("{s:04x}")).join(":"),
    }
}

/// Applies a `net.netfilter` name and value to `config`.
fn set_sysctl(config: &mut TrackConfig, name: &str, value: u64) -> Result<(), ReplayError> {
    let short = name.strip_prefix("nf_conntrack_").unwrap_or(name);
    match short {
        "tcp_loose" => config.tcp_loose = value != 0,
        "tcp_be_liberal" => config.tcp_be_liberal = value != 0,
        "tcp_ignore_invalid_rst" => config.tcp_ignore_invalid_rst = value != 0,
        "tcp_max_retrans" => config.tcp_max_retrans = u8::try_from(value).unwrap_or(u8::MAX),
        "checksum" => config.checksum = value != 0,
        _ => {
            let field = match short {
                "frag6_timeout" => "fragment_v6_ms".to_owned(),
                other => format!("{}_ms", other.replacen("_timeout", "", 1)),
            };
            let slot =
                config.timeouts.get_mut(&field).ok_or_else(|| format_error(format!("unknown setting {name}")))?;
            *slot = u32::try_from(value.saturating_mul(1000)).unwrap_or(u32::MAX);
        }
    }
    Ok(())
}

fn config_of(doc: &Value, profile: &str) -> Result<TrackConfig, ReplayError> {
    let mut config = TrackConfig::default();
    let profile_settings = doc
        .get("profiles")
        .and_then(|p| p.get(profile))
        .ok_or_else(|| format_error(format!("no profile {profile}")))?;
    for settings in [doc.pointer("/info/sysctl"), Some(profile_settings)].into_iter().flatten() {
        for (name, value) in settings.as_object().into_iter().flatten() {
            let value = value
                .as_u64()
                .or_else(|| value.as_str()?.parse().ok())
                .ok_or_else(|| format_error(format!("{name} is not a number")))?;
            set_sysctl(&mut config, name, value)?;
        }
    }
    Ok(config)
}

/// A frame's bytes.
///
/// # Errors
/// [`ReplayError::Format`] for anything but hexadecimal digits in pairs.
pub fn unhex(text: &str) -> Result<Vec<u8>, ReplayError> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return Err(format_error("frame is not hexadecimal"));
    }
    (0..text.len() / 2)
        .map(|i| text.get(i * 2..i * 2 + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect::<Option<Vec<u8>>>()
        .ok_or_else(|| format_error("frame is not hexadecimal"))
}

/// Hexadecimal digits in pairs, as [`unhex`] reads them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// A member that must be there.
fn member<'a, T>(value: &'a Value, name: &str, get: impl FnOnce(&'a Value) -> Option<T>) -> Result<T, ReplayError> {
    value.get(name).and_then(get).ok_or_else(|| format_error(format!("{name} missing or of the wrong kind")))
}

/// Runs one scenario of `doc`.
///
/// # Errors
/// [`ReplayError::Format`].
pub fn replay_scenario(doc: &Value, scenario: &Value) -> Result<Vec<StepResult>, ReplayError> {
    replay_scenario_with(doc, scenario, |_, _, _| 0)
}

/// As [`replay_scenario`]; before each step `between` is called with the step's number from 0, the tracker and the tracker's time. By what
/// it returns the tracker's clock goes forward, milliseconds, as if it had become another host's.
///
/// # Errors
/// [`ReplayError::Format`].
pub fn replay_scenario_with(
    doc: &Value,
    scenario: &Value,
    mut between: impl FnMut(usize, &mut Tracker<ModelTable>, u64) -> u64,
) -> Result<Vec<StepResult>, ReplayError> {
    let policy = doc.pointer("/policy/name").and_then(Value::as_str).unwrap_or("std");
    if policy != "std" {
        return Err(format_error(format!("unknown policy {policy}")));
    }
    let config = config_of(doc, scenario.get("profile").and_then(Value::as_str).unwrap_or("default"))?;
    let mut tracker = Tracker::new(ModelTable::new(1 << 16), config);
    let mut results = Vec::new();
    // The clock begins anywhere, here just before its 32 bits wrap.
    let mut start_ms = u64::from(u32::MAX) - 1000;
    for (number, step) in member(scenario, "steps", Value::as_array)?.iter().enumerate() {
        let frame = unhex(member(step, "frame", Value::as_str)?)?;
        let at_ms = member(step, "at_ms", Value::as_u64)?;
        start_ms = start_ms.wrapping_add(between(number, &mut tracker, start_ms.wrapping_add(at_ms)));
        let now_ms = start_ms.wrapping_add(at_ms);
        let toward = match member(step, "in", Value::as_str)? {
            "A" => Toward::Egress,
            "B" => Toward::Ingress,
            other => return Err(format_error(format!("unknown port {other}"))),
        };
        results.push(run_step(&mut tracker, &frame, toward, now_ms, StdPolicy::allows));
    }
    Ok(results)
}

/// Runs one frame through `tracker`; `allows` is the policy.
pub fn run_step(
    tracker: &mut Tracker<ModelTable>,
    frame: &[u8],
    toward: Toward,
    now_ms: u64,
    allows: impl Fn(&Tracked) -> bool,
) -> StepResult {
    let port = if toward == Toward::Egress { "B" } else { "A" };
    let (mut out, mut ct_state, mut rule) = (Vec::new(), None, "none");
    match tracker.track(&Packet::whole(frame, toward, Checksum::Verify), now_ms) {
        Judgement::NotIp(_) => out.push((port, frame.to_vec())),
        Judgement::NeedMore { .. } | Judgement::Malformed(_) | Judgement::Held | Judgement::Refused(_) => {}
        Judgement::Tracked(tracked) => {
            ct_state = Some(match tracked.state {
                CtState::New => "new",
                CtState::Established => "est",
                CtState::Related => "rel",
                CtState::Invalid => "inv",
                CtState::Untracked => "untr",
            });
            let pass = allows(&tracked) && tracker.confirm(&tracked, now_ms).is_ok();
            rule = if pass { "accept" } else { "drop" };
            match (tracked.datagram, pass) {
                (Some(datagram), true) => {
                    tracker.fragments().release(datagram, |fragment| out.push((port, fragment.to_vec())));
                }
                (Some(datagram), false) => tracker.fragments().discard(datagram),
                (None, true) => out.push((port, frame.to_vec())),
                (None, false) => {}
            }
        }
    }
    let verdict = match out.as_slice() {
        [] => "drop",
        [(_, only)] if only == frame => "pass",
        _ => "pass-changed",
    };
    let mut ct: Vec<CtLine> =
        tracker.table().iter().filter(|c| !c.is_expired(now_ms)).map(|c| CtLine::of(c, now_ms)).collect();
    ct.sort();
    StepResult { verdict, out, ct_state, rule, ct }
}

/// The document with Ferry's own results in place of the recorded ones.
///
/// # Errors
/// [`ReplayError::Format`].
pub fn replay_document(doc: &Value) -> Result<Value, ReplayError> {
    let mut result = doc.clone();
    let scenarios = member(doc, "scenarios", Value::as_array)?;
    let own = result.get_mut("scenarios").and_then(Value::as_array_mut);
    for (scenario, own) in scenarios.iter().zip(own.into_iter().flatten()) {
        let steps = own.get_mut("steps").and_then(Value::as_array_mut);
        for (step, r) in steps.into_iter().flatten().zip(replay_scenario(doc, scenario)?) {
            let Some(step) = step.as_object_mut() else { continue };
            let frame = step.get("frame").and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
            let out = r.out.iter().map(|(port, bytes)| {
                let text = hex(bytes);
                if text == frame { json!({"port": port}) } else { json!({"port": port, "frame": text}) }
            });
            step.insert("out".into(), Value::Array(out.collect()));
            step.insert("verdict".into(), json!(r.verdict));
            step.insert("rule".into(), json!(r.rule));
            match r.ct_state {
                Some(state) => step.insert("ct_state".into(), json!(state)),
                None => step.remove("ct_state"),
            };
            step.insert("ct".into(), Value::Array(r.ct.iter().map(CtLine::to_json).collect()));
        }
    }
    if let Some(map) = result.as_object_mut() {
        map.insert("engine".into(), json!("ferry"));
    }
    Ok(result)
}

/// One difference between a recording and Ferry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Scenario.
    pub id: u64,
    /// Its category.
    pub category: String,
    /// Its name.
    pub name: String,
    /// Step.
    pub step: u64,
    /// `verdict`, `out`, `ct_state` or `ct`.
    pub what: &'static str,
    /// Both sides.
    pub detail: String,
}

/// How far a recorded time-out may be from the virtual clock's: the kernel's runs while it is being asked, and rounds down.
const TIMEOUT_SLACK_MS: u64 = 2500;

/// Replays `doc` and reports every difference to what it records. Packets' states are not compared where the document's
/// `info.ct_state` is false.
///
/// # Errors
/// [`ReplayError::Format`].
pub fn compare(doc: &Value) -> Result<Vec<Difference>, ReplayError> {
    let mut differences = Vec::new();
    let has_ct_state = doc.pointer("/info/ct_state") != Some(&Value::Bool(false));
    for scenario in member(doc, "scenarios", Value::as_array)? {
        let id = member(scenario, "id", Value::as_u64)?;
        let text = |name| scenario.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let results = replay_scenario(doc, scenario)?;
        for (step, own) in member(scenario, "steps", Value::as_array)?.iter().zip(&results) {
            let n = member(step, "n", Value::as_u64)?;
            let mut report = |what, detail| {
                let (category, name) = (text("category"), text("name"));
                differences.push(Difference { id, category, name, step: n, what, detail });
            };
            let verdict = member(step, "verdict", Value::as_str)?;
            if verdict != own.verdict {
                report("verdict", format!("recorded {verdict}, own {}", own.verdict));
            }
            let frame = member(step, "frame", Value::as_str)?;
            let mut recorded = Vec::new();
            for out in member(step, "out", Value::as_array)? {
                let bytes = unhex(out.get("frame").and_then(Value::as_str).unwrap_or(frame))?;
                recorded.push((member(out, "port", Value::as_str)?, bytes));
            }
            if recorded != own.out {
                report("out", format!("recorded {} frames, own {}", recorded.len(), own.out.len()));
            }
            let ct_state = step.get("ct_state").and_then(Value::as_str);
            if has_ct_state && ct_state != own.ct_state {
                report("ct_state", format!("recorded {ct_state:?}, own {:?}", own.ct_state));
            }
            if let Some(detail) = compare_table(step, &own.ct) {
                report("ct", detail);
            }
        }
    }
    Ok(differences)
}

fn compare_table(step: &Value, own: &[CtLine]) -> Option<String> {
    let recorded = step.get("ct").and_then(Value::as_array)?;
    let mut lines: Vec<CtLine> = recorded
        .iter()
        .map(|line| {
            let text = |name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let flags = line.get("flags").and_then(Value::as_array).into_iter().flatten();
            CtLine {
                proto: text("proto"),
                state: line.get("state").and_then(Value::as_str).map(str::to_owned),
                flags: flags.filter_map(Value::as_str).map(str::to_owned).collect(),
                orig: text("orig"),
                timeout_ms: line.get("timeout").and_then(Value::as_u64).unwrap_or(0) as u32 * 1000,
            }
        })
        .collect();
    lines.sort();
    let key = |l: &CtLine| (l.proto.clone(), l.state.clone(), l.flags.clone(), l.orig.clone());
    let same = lines.len() == own.len()
        && lines.iter().zip(own).all(|(a, b)| {
            key(a) == key(b) && u64::from(a.timeout_ms).abs_diff(u64::from(b.timeout_ms)) <= TIMEOUT_SLACK_MS
        });
    (!same).then(|| format!("recorded {lines:?}, own {own:?}"))
}
