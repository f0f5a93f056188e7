//! `ferry pki`: a private certificate authority in a directory. Needs no daemon.
use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ferry_migrate::pki::{Authority, CA_DAYS, CertificateInfo, HOST_DAYS, Issued, PkiError, Role, Shown, Utc};
use serde_json::{Value, json};

use super::client::CliError;
use super::migrate_args::PkiCommand;
use super::run::{Result, pretty};
use super::table::Table;

/// Carries out the command.
///
/// # Errors
/// The library's, which name file and remedy.
pub fn run(command: &PkiCommand, as_json: bool) -> Result<String> {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    run_at(command, as_json, now_s).map_err(|e| match e {
        PkiError::Argument(_) | PkiError::HostName { .. } => {
            CliError::Usage { message: e.to_string(), hint: "`ferry pki --help` shows examples".into() }
        }
        e => CliError::Other(e.to_string()),
    })
}

fn run_at(command: &PkiCommand, as_json: bool, now_s: i64) -> std::result::Result<String, PkiError> {
    let made = |did: &str, issued: &Issued, next: &str| match as_json {
        true => pretty(&issued_json(issued)),
        false => issued_text(did, issued, next),
    };
    match command {
        PkiCommand::Init { dir, name, days, .. } => {
            let (_, issued) = Authority::init(dir, name, *days, now_s)?;
            let next = format!("next: ferry pki issue {} HOST, for each host", dir.display());
            Ok(made("made the authority", &issued, &next))
        }
        PkiCommand::Issue { dir, host, address, days } => {
            let issued = Authority::open(dir)?.issue(host, address, *days, now_s)?;
            Ok(made("made the key and certificate of", &issued, ""))
        }
        PkiCommand::Rotate { dir, host: Some(host), days, overlap_days } => {
            let days = days.unwrap_or(HOST_DAYS);
            let issued = Authority::open(dir)?.rotate_host(host, days, *overlap_days, now_s)?;
            let next = match overlap_days {
                0 => "the old certificate is revoked: install the new one before revoked.pem".to_owned(),
                n => format!("the old certificate is revoked in {n} days: install the new one before"),
            };
            Ok(made("made a new key and certificate of", &issued, &next))
        }
        PkiCommand::Rotate { dir, host: None, days, overlap_days } => {
            let issued = Authority::open(dir)?.rotate(days.unwrap_or(CA_DAYS), *overlap_days, now_s)?;
            let next = format!(
                "next: install trust.pem on every host, then, within {overlap_days} days, for each host: ferry pki rotate {} --host HOST",
                dir.display()
            );
            Ok(made("made a new generation of the authority", &issued, &next))
        }
        PkiCommand::Revoke { dir, host } => {
            let issued = Authority::open(dir)?.revoke(host, now_s)?;
            let next = "it takes effect where the new revoked.pem is installed";
            Ok(made("revoked the certificate of", &issued, next))
        }
        PkiCommand::Show { dir } => {
            let shown = Authority::open(dir)?.show(now_s)?;
            Ok(if as_json { pretty(&json!({ "certificates": shown })) } else { shown_text(dir, &shown) })
        }
    }
}

fn issued_json(issued: &Issued) -> Value {
    let files: Vec<Value> = issued.files.iter().map(|(file, who)| json!({ "file": file, "needed_by": who })).collect();
    json!({ "certificate": issued.certificate, "files": files })
}

/// Whose certificate: a host's name, or the authority's.
fn name(certificate: &CertificateInfo) -> &str {
    let common = certificate.subject.strip_prefix("CN=").unwrap_or(&certificate.subject);
    certificate.names.first().map_or(common, String::as_str)
}

fn issued_text(did: &str, issued: &Issued, next: &str) -> String {
    let c = &issued.certificate;
    let mut out = String::new();
    let _ = writeln!(out, "{did} {}", name(c));
    let _ = writeln!(out, "  valid until {}, SHA-256 {}", Utc(c.not_after_s), c.fingerprint);
    if let Some(key) = c.ed25519_public.as_ref().filter(|_| !c.is_ca) {
        let _ = writeln!(out, "  key of its audit log: {key}");
    }
    let mut t = Table::new(&["FILE", "GOES TO"]);
    for (file, who) in &issued.files {
        t.row([file.display().to_string(), (*who).to_owned()]);
    }
    out += &t.render();
    if !next.is_empty() {
        let _ = writeln!(out, "{next}");
    }
    out
}

fn shown_text(dir: &Path, shown: &[Shown]) -> String {
    let mut t = Table::new(&["ROLE", "NAME", "VALID UNTIL", "DAYS", "SHA-256", "ADVICE"]);
    for s in shown {
        let role = match s.role {
            Role::Authority => "authority",
            Role::PreviousAuthority => "previous authority",
            Role::Host => "host",
        };
        t.row([
            role.to_owned(),
            name(&s.certificate).to_owned(),
            Utc(s.certificate.not_after_s).to_string(),
            s.days_left.to_string(),
            s.certificate.fingerprint.chars().take(16).collect(),
            s.advice.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    let mut out = t.render();
    if shown.iter().all(|s| s.role != Role::Host) {
        let _ = writeln!(out, "no hosts yet: ferry pki issue {} HOST", dir.display());
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use clap::Parser;
    use ferry_migrate::pki::{CredentialFiles, Credentials};

    use super::super::args::{Cli, Command};
    use super::*;

    const NOW_S: i64 = 1_795_000_000;
    const DAY_S: i64 = 86_400;

    /// As typed, `DIR` replaced, at a time.
    fn typed(dir: &Path, line: &str, now_s: i64) -> std::result::Result<String, PkiError> {
        let words = line.split(' ').map(|w| if w == "DIR" { dir.to_str().unwrap() } else { w });
        let cli = Cli::parse_from(["ferry", "pki"].into_iter().chain(words));
        let Command::Pki(command) = &cli.command else { panic!("{line}") };
        run_at(command, cli.json, now_s)
    }

    /// Puts the files that a command named on a host, as an operator does who reads where they go.
    fn install(output: &str, host: &str, to: &Path) {
        let json: Value = serde_json::from_str(output).unwrap();
        for file in json["files"].as_array().unwrap() {
            let who = file["needed_by"].as_str().unwrap();
            let path = Path::new(file["file"].as_str().unwrap());
            if who.starts_with("every host") || (who == "that host" && path.ends_with(format!("{host}.pem"))) {
                let target = to.join(path.file_name().unwrap());
                std::fs::copy(path, &target).unwrap();
                let mode = if who == "that host" { 0o600 } else { 0o644 };
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(mode)).unwrap();
            }
        }
    }

    #[test]
    fn what_the_commands_make_and_name_is_what_a_host_can_load() {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, host) = (tmp.path().join("pki"), tmp.path().join("host"));
        std::fs::create_dir(&host).unwrap();
        let load = |now_s| Credentials::load(&CredentialFiles::in_directory(&host, "host-a"), now_s);
        install(&typed(&dir, "init DIR --name Test --json", NOW_S).unwrap(), "host-a", &host);
        let issued = typed(&dir, "issue DIR host-a --address 192.0.2.1 --address 2001:db8::1 --json", NOW_S).unwrap();
        install(&issued, "host-a", &host);
        let first = load(NOW_S).unwrap();
        assert_eq!(first.host(), "host-a");
        assert_eq!(first.certificate().addresses.len(), 2);

        // A new certificate; after the overlap the old one is revoked.
        let old = tmp.path().join("old");
        std::fs::create_dir(&old).unwrap();
        for file in ["trust.pem", "host-a.pem"] {
            std::fs::copy(host.join(file), old.join(file)).unwrap();
        }
        let rotated = typed(&dir, "rotate DIR --host host-a --overlap-days 3 --json", NOW_S + DAY_S).unwrap();
        install(&rotated, "host-a", &host);
        std::fs::copy(host.join("revoked.pem"), old.join("revoked.pem")).unwrap();
        let second = load(NOW_S + 5 * DAY_S).unwrap();
        assert_ne!(first.certificate().fingerprint, second.certificate().fingerprint);
        let of_old = |now_s| Credentials::load(&CredentialFiles::in_directory(&old, "host-a"), now_s);
        assert!(of_old(NOW_S + 3 * DAY_S).is_ok());
        assert!(of_old(NOW_S + 5 * DAY_S).unwrap_err().to_string().contains("is revoked"));

        // A new generation: the files of before go on for a while.
        let generation = typed(&dir, "rotate DIR --json", NOW_S + 6 * DAY_S).unwrap();
        install(&generation, "host-a", &host);
        assert!(load(NOW_S + 7 * DAY_S).is_ok());
        assert!(load(NOW_S + 30 * DAY_S).is_err());
        install(&typed(&dir, "rotate DIR --host host-a --json", NOW_S + 7 * DAY_S).unwrap(), "host-a", &host);
        assert!(load(NOW_S + 30 * DAY_S).is_ok());

        install(&typed(&dir, "revoke DIR host-a --json", NOW_S + 31 * DAY_S).unwrap(), "host-a", &host);
        assert!(load(NOW_S + 31 * DAY_S).unwrap_err().to_string().contains("is revoked"));
    }

    #[test]
    fn texts_say_where_files_go_and_what_is_next() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("pki");
        let at = dir.display();
        let text = typed(&dir, "init DIR", NOW_S).unwrap();
        assert!(text.starts_with("made the authority Ferry "), "{text}");
        assert!(text.contains(&format!("\n{at}/revoked.pem  every host\n")), "{text}");
        assert!(text.contains("stays here: the authority's private key\n"), "{text}");
        assert!(text.ends_with(&format!("next: ferry pki issue {at} HOST, for each host\n")), "{text}");
        let text = typed(&dir, "show DIR", NOW_S).unwrap();
        assert!(text.ends_with(&format!("no hosts yet: ferry pki issue {at} HOST\n")), "{text}");
        let text = typed(&dir, "issue DIR Host-A", NOW_S).unwrap();
        assert!(text.starts_with("made the key and certificate of host-a\n  valid until 20"), "{text}");
        assert!(text.contains("hosts/host-a.pem  that host\n"), "{text}");
        assert!(text.contains("\n  key of its audit log: "), "{text}");
        let text = typed(&dir, "show DIR", NOW_S + 380 * DAY_S).unwrap();
        assert!(
            text.contains(&format!("expires in 17 days: run ferry pki rotate {at} --host host-a\n")),
            "the advice can be pasted: {text}"
        );
        let shown: Value = serde_json::from_str(&typed(&dir, "show DIR --json", NOW_S).unwrap()).unwrap();
        assert_eq!(shown["certificates"][1]["role"], "host");
        assert_eq!(shown["certificates"][1]["certificate"]["ed25519_public"].as_str().unwrap().len(), 64);
        let again = typed(&dir, "issue DIR host-a", NOW_S).unwrap_err().to_string();
        assert!(again.contains(&format!("run: ferry pki rotate {at} --host host-a")), "{again}");
        let missing = typed(&dir, "revoke DIR host-b", NOW_S).unwrap_err().to_string();
        assert!(missing.contains(&format!("ferry pki issue {at} host-b")), "{missing}");
    }
}
