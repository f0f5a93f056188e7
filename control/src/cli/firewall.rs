//! `ferry trace` and `ferry fw`
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::Method;
use serde::Deserialize;
use serde_json::json;

use super::client::Client;
use super::policy::check_packet;
use super::run::{Result, pretty, typed};
use super::table::Table;
use crate::firewall::filter::escape;
use crate::firewall::history::DropLine;

#[derive(Deserialize)]
struct Drops {
    drops: Vec<DropLine>,
    lost_reports: u64,
}

/// `ferry trace`
///
/// # Errors
/// The description cannot be understood; no daemon, or it refuses.
pub fn trace(client: &Client, vm: &str, packet: &str, port: Option<&str>, as_json: bool) -> Result<String> {
    check_packet(packet)?;
    let mut body = json!({ "packet": packet });
    if let Some(port) = port {
        body["port"] = port.into();
    }
    let value = client.send(Method::POST, &format!("/v1/vms/{}/trace", escape(vm)), Some(&body))?;
    if as_json {
        return Ok(pretty(&value["report"]));
    }
    let mut text = value["text"].as_str().unwrap_or_default().to_owned();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// `ferry fw drops`
///
/// # Errors
/// No daemon, or it refuses.
pub fn drops(client: &Client, vm: Option<&str>, limit: u64, watch: Option<u64>, as_json: bool) -> Result<String> {
    let mut path = format!("/v1/firewall/drops?limit={limit}");
    if let Some(vm) = vm {
        path += &format!("&vm={}", escape(vm));
    }
    let Some(seconds) = watch else {
        let value = client.get(&path)?;
        return if as_json { Ok(pretty(&value)) } else { Ok(text(&typed(value)?, now_ms())) };
    };
    let screen = std::io::stdout().is_terminal() && !as_json;
    loop {
        let value = client.get(&path)?;
        let text = if as_json { value.to_string() + "\n" } else { text(&typed(value)?, now_ms()) };
        let clear = if screen { "\x1b[H\x1b[2J" } else { "" };
        let mut out = std::io::stdout().lock();
        if out.write_all(format!("{clear}{text}").as_bytes()).and_then(|()| out.flush()).is_err() {
            return Ok(String::new());
        }
        drop(out);
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn text(d: &Drops, now_ms: u64) -> String {
    let mut t = Table::new(&["AGO", "COUNT", "VM", "PORT", "DIRECTION", "WHY", "PACKET", "RULE"]);
    for l in &d.drops {
        t.row([
            ago(now_ms.saturating_sub(l.last_unix_ms)),
            l.count.to_string(),
            l.vm.clone(),
            l.port.clone(),
            l.direction.clone(),
            if l.reason.is_empty() { l.kind.clone() } else { l.reason.clone() },
            packet(l),
            l.rule.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let mut out = t.render();
    if d.lost_reports > 0 {
        out += &format!("{} report(s) were lost: they came faster than they could be kept\n", d.lost_reports);
    }
    out
}

/// Whose packet it was: what is known of IP and, where it matters, of the link.
fn packet(line: &DropLine) -> String {
    match (&line.flow, &line.link) {
        (Some(flow), Some(link)) => format!("{flow} ({link})"),
        (Some(flow), None) => flow.to_string(),
        (None, Some(link)) => link.clone(),
        (None, None) => "-".to_owned(),
    }
}

/// A time span, rounded.
pub(super) fn ago(ms: u64) -> String {
    match ms {
        0..60_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{}min", ms / 60_000),
        3_600_000..86_400_000 => format!("{}h", ms / 3_600_000),
        _ => format!("{}d", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::record::FlowView;

    #[test]
    fn drops_are_a_table_with_the_latest_first() {
        let line = DropLine {
            vm: "web1".into(),
            port: "web1".into(),
            direction: "ingress".into(),
            kind: "denied".into(),
            reason: "policy".into(),
            rule: None,
            link: None,
            flow: Some(FlowView {
                protocol_number: 6,
                src: [10, 0, 0, 1].into(),
                dst: [10, 0, 0, 2].into(),
                sport: None,
                dport: Some(23),
                icmp: None,
                zone: 0,
            }),
            count: 17,
            first_unix_ms: 0,
            last_unix_ms: 58_800,
            last_sport: Some(5),
        };
        let d = Drops { drops: vec![line], lost_reports: 3 };
        assert_eq!(
            text(&d, 60_000),
            " AGO  COUNT  VM    PORT  DIRECTION  WHY     PACKET                      RULE\n\
             1.2s     17  web1  web1  ingress    policy  tcp 10.0.0.1 > 10.0.0.2:23  -\n\
             3 report(s) were lost: they came faster than they could be kept\n"
        );
        assert_eq!([ago(59_999), ago(61_000), ago(7_200_000), ago(200_000_000)], ["59.9s", "1min", "2h", "2d"]);
    }
}
