//! `ferry migrate`
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferry_migrate::audit::{ProblemKind, Report, verify};
use ferry_migrate::pki::read_certificates;
use hyper::Method;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{CliError, Client};
use super::migrate_args::MigrateCommand;
use super::migrate_text::{self as text, Follower};
use super::run::{Result, load, pretty, typed};
use super::table::colours;
use crate::firewall::filter::escape;
use crate::migration::view::{CheckView, ExpectedView, HostView, MigrationView, MigrationsView};

/// How often `watch` looks.
const POLL: Duration = Duration::from_millis(250);
/// For so long `watch` bears that the daemon cannot be reached (it is being restarted), once it has been.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a log that is being written is read again because its end did not fit.
const AUDIT_TRIES: u32 = 3;
/// Length of a progress bar in its own units.
const BAR_LENGTH: u64 = 1000;

#[derive(Deserialize)]
struct History {
    history: Vec<MigrationView>,
}

/// Carries out a command that needs the daemon.
///
/// # Errors
/// No daemon, or it refuses; a migration or a check that did not end well.
pub fn run(client: &Client, command: &MigrateCommand, as_json: bool) -> Result<String> {
    match command {
        MigrateCommand::Status { vm: None } => {
            let (host, all) = (client.get("/v1/migration")?, client.get("/v1/migrations")?);
            if as_json {
                return Ok(pretty(&merged(host, all)));
            }
            let (host, all): (HostView, MigrationsView) = (typed(host)?, typed(all)?);
            Ok(text::overview(&host, &all, now_ms(), colours()))
        }
        MigrateCommand::Status { vm: Some(vm) } => {
            let value = client.get(&path(vm, ""))?;
            if as_json {
                return Ok(pretty(&value));
            }
            Ok(text::details(&typed::<MigrationView>(value)?, now_ms(), colours()))
        }
        MigrateCommand::List { vm, limit } => {
            let value = client.get(&history_path(vm.as_deref(), *limit))?;
            if as_json {
                return Ok(pretty(&value));
            }
            Ok(text::history(&typed::<History>(value)?.history, colours()))
        }
        MigrateCommand::Watch { vm, once: true } => once(client, vm.as_deref(), as_json),
        MigrateCommand::Watch { vm, once: false } => watch(client, vm.as_deref(), as_json),
        MigrateCommand::Check { vm, to } => {
            let value = client.send(Method::POST, &path(vm, "/check"), Some(&json!({ "to": to })))?;
            let view: CheckView = typed(value.clone())?;
            let shown = if as_json { pretty(&value) } else { text::check(&view, colours()) };
            if view.ok {
                return Ok(shown);
            }
            print(&shown);
            Err(CliError::Other(text::check_sum(&view)))
        }
        MigrateCommand::Expect { vm, withdraw: true, .. } => {
            let value = client.send(Method::DELETE, &path(vm, "/expect"), None)?;
            Ok(if as_json { pretty(&value) } else { format!("VM {vm} is expected no more\n") })
        }
        MigrateCommand::Expect { vm, from, for_time, withdraw: false } => {
            let body = json!({ "from": from, "for_s": for_time.as_secs() });
            let value = client.send(Method::POST, &path(vm, "/expect"), Some(&body))?;
            Ok(if as_json { pretty(&value) } else { text::expected(&typed::<ExpectedView>(value)?, now_ms()) })
        }
        MigrateCommand::Cancel { vm } => {
            let value = client.send(Method::POST, &path(vm, "/cancel"), Some(&json!({})))?;
            if as_json {
                return Ok(pretty(&value));
            }
            Ok(format!("VM {vm}: {}\n", text::end_line(&typed::<MigrationView>(value)?)))
        }
        MigrateCommand::Audit { file, key, config } => audit(file.as_deref(), key, config, as_json),
    }
}

fn path(vm: &str, what: &str) -> String {
    format!("/v1/migrations/{}{what}", escape(vm))
}

fn history_path(vm: Option<&str>, limit: Option<u64>) -> String {
    let vm = vm.map(|vm| format!("vm={}", escape(vm)));
    let query: Vec<String> = vm.into_iter().chain(limit.map(|n| format!("limit={n}"))).collect();
    let mark = if query.is_empty() { "" } else { "?" };
    format!("/v1/migrations/history{mark}{}", query.join("&"))
}

/// Both answers as one object.
fn merged(host: Value, all: Value) -> Value {
    let mut out = json!({ "host": host });
    if let (Some(out), Value::Object(all)) = (out.as_object_mut(), all) {
        out.extend(all);
    }
    out
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Whoever reads has gone (`ferry ... | head`) when it fails: nothing is wrong.
fn print(shown: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(shown.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// The latest migrations that are asked for.
fn fetch(client: &Client, vm: Option<&str>) -> Result<Vec<MigrationView>> {
    match vm {
        Some(vm) => Ok(vec![typed(client.get(&path(vm, ""))?)?]),
        None => Ok(typed::<MigrationsView>(client.get("/v1/migrations")?)?.migrations),
    }
}

/// What has not migrated is an error.
fn verdict<'a>(ended: impl Iterator<Item = &'a MigrationView>) -> Result<String> {
    let failed: Vec<String> = ended
        .filter(|v| !matches!(v.outcome.as_str(), "" | "migrated"))
        .map(|v| format!("VM {}: {}", v.vm, text::end_line(v)))
        .collect();
    if failed.is_empty() { Ok(String::new()) } else { Err(CliError::Other(failed.join("; "))) }
}

fn once(client: &Client, vm: Option<&str>, as_json: bool) -> Result<String> {
    let views = fetch(client, vm)?;
    let mut shown = String::new();
    for v in &views {
        if as_json {
            shown += &(serde_json::to_string(v).unwrap_or_default() + "\n");
            continue;
        }
        for line in Follower::default().news(v) {
            shown += &format!("{line}\n");
        }
        if v.outcome.is_empty() {
            shown += &format!("{}\n", text::progress(v, now_ms()).text);
        }
    }
    if views.is_empty() && !as_json {
        shown += "no VM has migrated here yet\n";
    }
    print(&shown);
    verdict(views.iter())
}

/// What `watch` has to do with each view, apart from showing it.
#[derive(Default)]
struct Watched {
    /// Those that are, or have been, under way since the beginning; by VM.
    followed: BTreeMap<String, Follower>,
    /// When those began that had ended by then; by VM. Absent: nothing has been seen yet.
    ended_before: Option<BTreeMap<String, u64>>,
}

impl Watched {
    /// Lines about what is new, with the VM that they are about.
    fn update(&mut self, views: &[MigrationView]) -> Vec<(String, Vec<String>)> {
        let mut news = Vec::new();
        let ended = || views.iter().filter(|v| !v.outcome.is_empty()).map(|v| (v.vm.clone(), v.began_at_ms)).collect();
        let ended_before = self.ended_before.get_or_insert_with(ended);
        for v in views {
            if ended_before.get(&v.vm) == Some(&v.began_at_ms) {
                continue;
            }
            let follower = self.followed.entry(v.vm.clone()).or_default();
            if follower.seen() != Some(v) {
                news.push((v.vm.clone(), follower.news(v)));
            }
        }
        news
    }

    fn views(&self) -> impl Iterator<Item = &MigrationView> {
        self.followed.values().filter_map(Follower::seen)
    }

    /// Something was followed, and all of it has ended.
    fn is_over(&self) -> bool {
        !self.followed.is_empty() && self.views().all(|v| !v.outcome.is_empty())
    }
}

fn watch(client: &Client, vm: Option<&str>, as_json: bool) -> Result<String> {
    let mut screen = Screen::new(as_json, vm.is_none());
    let mut watched = Watched::default();
    let mut reached = Instant::now();
    let mut first = true;
    while !watched.is_over() {
        let views = match fetch(client, vm) {
            Ok(views) => views,
            // None yet: it may come.
            Err(CliError::Refused { detail, .. }) if detail.code == "not_found" && may_come(client, vm)? => Vec::new(),
            Err(CliError::Unreachable { .. }) if !first && reached.elapsed() < PATIENCE => {
                std::thread::sleep(POLL);
                continue;
            }
            Err(e) => return Err(e),
        };
        reached = Instant::now();
        let news = watched.update(&views);
        if first && watched.followed.is_empty() {
            screen.waiting(vm);
        }
        first = false;
        if !screen.show(&watched, &news) {
            return Ok(String::new());
        }
        if !watched.is_over() {
            std::thread::sleep(POLL);
        }
    }
    screen.finish();
    verdict(watched.views())
}

/// "Not found" is said of a VM without migrations and of one that does not exist; the latter is a mistake to be told.
fn may_come(client: &Client, vm: Option<&str>) -> Result<bool> {
    let Some(vm) = vm else { return Ok(true) };
    client.get(&format!("/v1/vms/{}", escape(vm))).map(|_| true)
}

/// Where `watch` shows what it sees: bars below lines on a terminal, lines alone elsewhere, objects for programs.
enum Screen {
    Json,
    Lines { name_vms: bool },
    Bars { name_vms: bool, all: MultiProgress, bars: BTreeMap<String, ProgressBar> },
}

impl Screen {
    fn new(as_json: bool, name_vms: bool) -> Self {
        if as_json {
            return Self::Json;
        }
        if !std::io::stdout().is_terminal() {
            return Self::Lines { name_vms };
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        Self::Bars { name_vms, all, bars: BTreeMap::new() }
    }

    fn waiting(&self, vm: Option<&str>) {
        let what = vm.map_or_else(|| "a VM".to_owned(), |vm| format!("VM {vm}"));
        if !matches!(self, Self::Json) {
            eprintln!("no migration is under way; waiting for {what}");
        }
    }

    /// False when nobody reads any more.
    fn show(&mut self, watched: &Watched, news: &[(String, Vec<String>)]) -> bool {
        let line = |name_vms: bool, vm: &str, text: &str| match name_vms {
            true => format!("{vm}: {text}"),
            false => text.to_owned(),
        };
        match self {
            Self::Json => watched.views().filter(|v| news.iter().any(|(vm, _)| *vm == v.vm)).all(|v| {
                // Plain data cannot fail.
                print(&(serde_json::to_string(v).unwrap_or_default() + "\n"))
            }),
            Self::Lines { name_vms } => {
                let lines = news.iter().flat_map(|(vm, lines)| lines.iter().map(move |l| (vm, l)));
                print(&lines.map(|(vm, l)| line(*name_vms, vm, l) + "\n").collect::<String>())
            }
            Self::Bars { name_vms, all, bars } => {
                for (vm, lines) in news {
                    for l in lines {
                        if all.println(line(*name_vms, vm, l)).is_err() {
                            return false;
                        }
                    }
                }
                for v in watched.views() {
                    let bar = bars.entry(v.vm.clone()).or_insert_with(|| all.add(ProgressBar::new(BAR_LENGTH)));
                    draw(bar, v);
                }
                true
            }
        }
    }

    fn finish(&self) {
        if let Self::Bars { bars, .. } = self {
            bars.values().for_each(ProgressBar::finish_and_clear);
        }
    }
}

fn draw(bar: &ProgressBar, v: &MigrationView) {
    if !v.outcome.is_empty() {
        return bar.finish_and_clear();
    }
    let progress = text::progress(v, now_ms());
    let template = match progress.share {
        Some(_) => "{prefix} [{bar:30}] {percent:>3}% {wide_msg}",
        None => "{prefix} {spinner} {wide_msg}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(v.vm.clone());
    bar.set_message(progress.text);
    bar.set_position((progress.share.unwrap_or(0.0) * BAR_LENGTH as f64) as u64);
    bar.tick();
}

/// `ferry migrate audit`: needs no daemon.
///
/// # Errors
/// The log, a key or the configuration cannot be read; the log is not as it was written.
pub fn audit(file: Option<&Path>, keys: &[String], config: &Path, as_json: bool) -> Result<String> {
    let configured = if file.is_none() || keys.is_empty() { Some(load(config, false)?.migration) } else { None };
    let other = |e: &dyn std::fmt::Display| CliError::Other(e.to_string());
    let own = configured.as_ref().filter(|_| keys.is_empty()).map(|m| m.credentials().certificate);
    let keys: Vec<[u8; 32]> = match own {
        Some(certificate) => vec![key_of(&certificate)?],
        None => keys.iter().map(|k| key(k)).collect::<Result<_>>()?,
    };
    let log = match (file, &configured) {
        (Some(file), _) => file,
        (None, Some(migration)) => &migration.audit_log,
        (None, None) => return Err(CliError::Other("no log is named".into())),
    };
    let mut report = verify(log, &keys).map_err(|e| other(&e))?;
    for _ in 1..AUDIT_TRIES {
        if !only_the_end_differs(&report) {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        report = verify(log, &keys).map_err(|e| other(&e))?;
    }
    let shown = match as_json {
        true => {
            let mut value = serde_json::to_value(&report).unwrap_or_default();
            value["intact"] = report.is_intact().into();
            pretty(&value)
        }
        false => text::audit(&report),
    };
    if report.is_intact() {
        return Ok(shown);
    }
    print(&shown);
    let count = report.problems.len() as u64 + report.more_problems;
    Err(CliError::Other(format!("{} is not as it was written: {count} problem(s)", log.display())))
}

/// As when a line is being written in this moment.
fn only_the_end_differs(report: &Report) -> bool {
    !report.problems.is_empty()
        && report.problems.iter().all(|p| {
            matches!(p.kind, ProblemKind::Unfinished | ProblemKind::Truncated { .. } | ProblemKind::HeadDiffers)
        })
}

/// A key as it is typed: 64 hexadecimal digits, or a file with the certificate.
fn key(text: &str) -> Result<[u8; 32]> {
    match unhex(text) {
        Some(key) => Ok(key),
        None => key_of(Path::new(text)),
    }
}

fn key_of(certificate: &Path) -> Result<[u8; 32]> {
    let certificates = read_certificates(certificate).map_err(|e| CliError::Other(e.to_string()))?;
    let own = certificates.first().and_then(|c| c.ed25519_public.as_deref()).and_then(unhex);
    own.ok_or_else(|| CliError::Usage {
        message: format!("{}: the certificate's key is not an Ed25519 key", certificate.display()),
        hint: "give the public key that the log is signed with as 64 hexadecimal digits: --key KEY".into(),
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use ferry_migrate::audit::{AuditConfig, AuditLog, Event, Kind};
    use ferry_migrate::pki::{Authority, CA_DAYS, CredentialFiles, Credentials, HOST_DAYS};

    use super::*;
    use crate::migration::view::RoundView;

    fn view(vm: &str, began_at_ms: u64, outcome: &str) -> MigrationView {
        MigrationView {
            vm: vm.into(),
            role: "source".into(),
            state: if outcome.is_empty() { "pre-copy" } else { "gone" }.into(),
            began_at_ms,
            outcome: outcome.into(),
            ..MigrationView::default()
        }
    }

    #[test]
    fn what_had_ended_before_is_not_followed_and_what_began_since_is() {
        let mut watched = Watched::default();
        let old = view("web1", 1000, "failed");
        assert!(watched.update(std::slice::from_ref(&old)).is_empty());
        assert!(!watched.is_over());
        // Over before it could be seen under way.
        let news = watched.update(&[view("web1", 2000, "refused"), view("web2", 1500, "")]);
        assert_eq!(news.iter().map(|(vm, _)| vm.as_str()).collect::<Vec<_>>(), ["web1", "web2"]);
        assert!(!watched.is_over(), "web2 is under way");
        assert!(watched.update(&[view("web1", 2000, "refused"), view("web2", 1500, "")]).is_empty(), "nothing is new");
        let news = watched.update(&[view("web1", 2000, "refused"), view("web2", 1500, "migrated")]);
        assert_eq!(news.len(), 1);
        assert!(watched.is_over());
        let failed = verdict(watched.views()).unwrap_err();
        assert_eq!((failed.exit_code(), failed.to_string()), (1, "VM web1: refused: no reason given".to_owned()));
        assert!(verdict([&view("web2", 1500, "migrated")].into_iter()).is_ok());
    }

    #[test]
    fn lines_and_objects_are_what_is_new() {
        let mut watched = Watched::default();
        let mut v = view("web1", 1000, "");
        v.rounds.push(RoundView { entries: 5, ..RoundView::default() });
        let news = watched.update(&[v]);
        assert_eq!(news[0].1[1], "round 0: 5 records, 0 B in 0 ms");
        assert_eq!(history_path(Some("a b"), Some(3)), "/v1/migrations/history?vm=a%20b&limit=3");
        assert_eq!(history_path(None, None), "/v1/migrations/history");
        assert_eq!(
            merged(json!({"enabled": true}), json!({"migrations": [], "expected": []})),
            json!({"host": {"enabled": true}, "migrations": [], "expected": []})
        );
    }

    #[test]
    fn a_log_is_verified_by_certificate_by_digits_and_by_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let now_s = (now_ms() / 1000) as i64;
        let (authority, _) = Authority::init(&at("pki"), "Ferry", CA_DAYS, now_s).unwrap();
        authority.issue("host-a", &[], HOST_DAYS, now_s).unwrap();
        authority.issue("host-b", &[], HOST_DAYS, now_s).unwrap();
        for (from, to) in [(authority.trust(), "trust.pem"), (authority.revoked(), "revoked.pem")] {
            std::fs::copy(from, at(to)).unwrap();
        }
        std::fs::copy(authority.host("host-a"), at("host-a.pem")).unwrap();
        let credentials = Credentials::load(&CredentialFiles::in_directory(dir.path(), "host-a"), now_s).unwrap();
        let path = at("audit.log");
        let (mut log, _) =
            AuditLog::open(AuditConfig::new(&path), "host-a", credentials.audit_key().unwrap(), now_ms()).unwrap();
        for _ in 0..3 {
            log.append(now_ms(), &Event::new(Kind::Attempt)).unwrap();
        }
        drop(log);

        let nowhere = at("none.toml");
        let key = at("host-a.pem").display().to_string();
        let text = audit(Some(&path), std::slice::from_ref(&key), &nowhere, false).unwrap();
        assert_eq!(text, "intact: 4 line(s) in 1 file(s), numbers 1 to 4\n");
        let digits = read_certificates(&at("host-a.pem")).unwrap()[0].ed25519_public.clone().unwrap();
        audit(Some(&path), &[digits.to_uppercase()], &nowhere, false).unwrap();
        let config = at("ferry.toml");
        let text = format!(
            "[migration]\nhost = \"host-a\"\npki = \"{0}\"\naudit_log = \"{0}/audit.log\"\n",
            dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let json: Value = serde_json::from_str(&audit(None, &[], &config, true).unwrap()).unwrap();
        assert_eq!((&json["intact"], &json["lines"]), (&true.into(), &4.into()));

        // Another host's key, a missing configuration, a changed line.
        let other = authority.host("host-b").display().to_string();
        assert_eq!(audit(Some(&path), &[other], &nowhere, false).unwrap_err().exit_code(), 1);
        assert_eq!(audit(None, &[], &nowhere, false).unwrap_err().exit_code(), 2);
        assert!(audit(Some(&path), &["no-such-file".into()], &nowhere, false).is_err());
        let changed = std::fs::read_to_string(&path).unwrap().replacen("attempt", "granted", 1);
        std::fs::write(&path, changed).unwrap();
        let e = audit(Some(&path), &[key], &nowhere, false).unwrap_err();
        assert_eq!(e.exit_code(), 1);
        assert!(e.to_string().ends_with("audit.log is not as it was written: 2 problem(s)"), "{e}");
    }
}
