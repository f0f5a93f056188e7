//! The authority's commands and what hosts make of their results.
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::certificate::DAY_S;
use super::*;

/// 2026-11-21, a moment like any other.
const NOW_S: i64 = 1_795_000_000;

fn authority(dir: &Path) -> Authority {
    Authority::init(&dir.join("pki"), "Ferry", CA_DAYS, NOW_S).unwrap().0
}

/// The command that renews a host's certificate, as an operator can paste it.
fn rotate(dir: &Path, host: &str) -> String {
    format!("ferry pki rotate {} --host {host}", dir.join("pki").display())
}

/// A host's files as an operator would copy them.
fn install(authority: &Authority, host: &str, to: &Path) -> CredentialFiles {
    fs::create_dir_all(to).unwrap();
    for (from, mode) in [(authority.trust(), 0o644), (authority.revoked(), 0o644), (authority.host(host), 0o600)] {
        let target = to.join(from.file_name().unwrap());
        fs::copy(&from, &target).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
    }
    CredentialFiles::in_directory(to, host)
}

#[test]
fn init_and_issue_make_what_a_host_can_load() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    let issued = authority.issue("Host-A.example", &["192.0.2.1".parse().unwrap()], HOST_DAYS, NOW_S).unwrap();
    assert_eq!(issued.certificate.names, ["host-a.example"]);
    for (path, mode) in
        [("pki", 0o700), ("pki/hosts", 0o700), ("pki/ca.pem", 0o600), ("pki/hosts/host-a.example.pem", 0o600)]
    {
        assert_eq!(fs::metadata(dir.path().join(path)).unwrap().mode() & 0o777, mode, "{path}");
    }
    let files = install(&authority, "host-a.example", &dir.path().join("host"));
    let credentials = Credentials::load(&files, NOW_S).unwrap();
    assert_eq!(credentials.host(), "host-a.example");
    assert!(credentials.audit_key().is_some());
    let key = crate::text::hex(&credentials.audit_public_key().unwrap());
    assert_eq!(read_certificates(&files.certificate).unwrap()[0].ed25519_public, Some(key));
    assert!(!format!("{credentials:?}").contains("key"));
    let shown = authority.show(NOW_S).unwrap();
    assert_eq!(shown.iter().map(|s| s.role).collect::<Vec<_>>(), [Role::Authority, Role::Host]);
    assert_eq!(shown[1].days_left, i64::from(HOST_DAYS));
    assert_eq!(shown[1].advice, None);
    let late = authority.show(NOW_S + i64::from(HOST_DAYS - 3) * DAY_S).unwrap();
    assert_eq!(late[1].advice, Some(format!("expires in 3 days: run {}", rotate(dir.path(), "host-a.example"))));
}

#[test]
fn commands_refuse_what_would_lose_or_confuse_keys() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    assert!(matches!(Authority::init(&dir.path().join("pki"), "Ferry", 1, NOW_S), Err(PkiError::Exists { .. })));
    authority.issue("a", &[], HOST_DAYS, NOW_S).unwrap();
    let error = authority.issue("a", &[], HOST_DAYS, NOW_S).unwrap_err().to_string();
    assert!(error.contains(&rotate(dir.path(), "a")), "{error}");
    assert!(matches!(authority.rotate_host("b", 1, 1, NOW_S), Err(PkiError::Missing { .. })));
    assert!(matches!(authority.revoke("b", NOW_S), Err(PkiError::Missing { .. })));
    assert!(matches!(authority.issue("c", &[], 0, NOW_S), Err(PkiError::Argument(_))));
    assert!(matches!(authority.rotate(CA_DAYS, 0, NOW_S), Err(PkiError::Argument(_))));
    assert!(matches!(Authority::init(&dir.path().join("x"), "a\nb", 1, NOW_S), Err(PkiError::Argument(_))));
    assert!(matches!(Authority::open(&dir.path().join("none")), Err(PkiError::Missing { .. })));
    fs::set_permissions(dir.path().join("pki"), fs::Permissions::from_mode(0o750)).unwrap();
    assert!(matches!(Authority::open(&dir.path().join("pki")), Err(PkiError::Permissions { .. })));
    let expired = NOW_S + i64::from(CA_DAYS + 1) * DAY_S;
    fs::set_permissions(dir.path().join("pki"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(matches!(authority.issue("d", &[], 1, expired), Err(PkiError::Validity { .. })));
}

#[test]
fn host_names() {
    for good in ["a", "host-1", "Host.Example.ORG", "1a", "x.y-z"] {
        assert_eq!(host_name(good).unwrap(), good.to_ascii_lowercase());
    }
    let long = "a".repeat(64);
    for bad in [
        "", ".", "a.", ".a", "a..b", "*", "*.a", "a/b", "../a", "-a", "a-", "a_b", "10.0.0.1", "::1", "1", "a.1",
        &long, "ä", "a b",
    ] {
        assert!(host_name(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_rotated_host_has_two_valid_certificates_for_the_overlap_and_then_one() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    let old = authority.issue("a", &["192.0.2.1".parse().unwrap()], HOST_DAYS, NOW_S).unwrap().certificate;
    authority.issue("b", &[], HOST_DAYS, NOW_S).unwrap();
    let new = authority.rotate_host("a", HOST_DAYS, 10, NOW_S).unwrap().certificate;
    assert_ne!(old.serial, new.serial);
    assert_eq!((&old.names, &old.addresses), (&new.names, &new.addresses));
    let b = Credentials::load(&install(&authority, "b", &dir.path().join("b")), NOW_S).unwrap();
    let end = NOW_S + 10 * DAY_S;
    assert!(!b.is_revoked(&old, end - 1));
    assert!(b.is_revoked(&old, end));
    assert!(!b.is_revoked(&new, end));
    // A later rotation keeps earlier entries; revoking again does not postpone.
    let newer = authority.rotate_host("a", HOST_DAYS, 0, NOW_S).unwrap().certificate;
    authority.revoke("a", NOW_S + 5).unwrap();
    let b = Credentials::load(&install(&authority, "b", &dir.path().join("b")), NOW_S).unwrap();
    assert!(b.is_revoked(&old, end) && !b.is_revoked(&old, end - 1));
    assert!(b.is_revoked(&new, NOW_S));
    assert!(b.is_revoked(&newer, NOW_S + 5) && !b.is_revoked(&newer, NOW_S + 4));
    assert!(!authority.host("a").exists());
}

#[test]
fn a_new_generation_of_the_authority_and_the_old_one_are_trusted_together_until_the_overlap_ends() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    authority.issue("a", &[], HOST_DAYS, NOW_S).unwrap();
    authority.issue("b", &[], HOST_DAYS, NOW_S).unwrap();
    authority.rotate(CA_DAYS, 7, NOW_S).unwrap();
    // Nobody has a new certificate yet: all goes on.
    let files = install(&authority, "a", &dir.path().join("a"));
    Credentials::load(&files, NOW_S).unwrap();
    let advice =
        authority.show(NOW_S).unwrap().into_iter().find_map(|s| (s.role == Role::Host).then_some(s.advice)).unwrap();
    assert!(advice.unwrap().contains(&rotate(dir.path(), "a")));
    // After the overlap the old certificate is worth nothing though its own time runs on.
    let after = NOW_S + 7 * DAY_S + 1;
    let error = Credentials::load(&files, after).unwrap_err().to_string();
    assert!(error.contains("does not lead to an authority"), "{error}");
    // A second rotation must wait for the first one's overlap.
    assert!(authority.rotate(CA_DAYS, 7, NOW_S + DAY_S).is_err());
    // Old certificates can be revoked by the old key, new ones come from the new.
    let old_b = authority.show(NOW_S).unwrap().pop().unwrap().certificate;
    authority.rotate_host("b", HOST_DAYS, 1, NOW_S).unwrap();
    authority.rotate_host("a", HOST_DAYS, 1, NOW_S).unwrap();
    let a = Credentials::load(&install(&authority, "a", &dir.path().join("a")), NOW_S).unwrap();
    assert!(a.is_revoked(&old_b, NOW_S + DAY_S));
    // A crash that left the list of authorities behind is made good by the next command.
    let trust = fs::read_to_string(authority.trust()).unwrap();
    fs::write(authority.trust(), &trust[..trust.len() / 2]).unwrap();
    authority.issue("late", &[], HOST_DAYS, NOW_S).unwrap();
    assert_eq!(fs::read_to_string(authority.trust()).unwrap(), trust);
    let a = Credentials::load(&install(&authority, "a", &dir.path().join("a")), after).unwrap();
    assert_eq!(a.roots(after).0.len(), 1);
    assert_eq!(a.roots(NOW_S).1, after, "the set of authorities changes when the overlap ends");
    authority.rotate(CA_DAYS, 7, after).unwrap();
    Credentials::load(&install(&authority, "a", &dir.path().join("a")), after).unwrap();
}

#[test]
fn credentials_that_a_peer_would_refuse_are_refused_when_they_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    authority.issue("a", &[], 30, NOW_S).unwrap();
    authority.issue("b", &[], 30, NOW_S).unwrap();
    let (other, _) = Authority::init(&dir.path().join("other"), "Other", CA_DAYS, NOW_S).unwrap();
    let files = install(&authority, "a", &dir.path().join("a"));
    let says = |files: &CredentialFiles, now_s: i64, what: &str| {
        let error = Credentials::load(files, now_s).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(&files, NOW_S + 31 * DAY_S, "expired on 2026-12-");
    says(&files, NOW_S - DAY_S, "is not valid before");
    let open = dir.path().join("a.crt");
    let text = fs::read_to_string(authority.host("a")).unwrap();
    fs::write(&open, &text[text.find("-----BEGIN CERT").unwrap()..]).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
    says(
        &CredentialFiles { key: authority.host("b"), certificate: open.clone(), ..files.clone() },
        NOW_S,
        "does not belong to the certificate",
    );
    Credentials::load(&CredentialFiles { key: authority.host("a"), certificate: open.clone(), ..files.clone() }, NOW_S)
        .unwrap();
    says(&CredentialFiles { key: open.clone(), ..files.clone() }, NOW_S, "others than its owner have access");
    says(&CredentialFiles { trust: other.trust(), ..files.clone() }, NOW_S, "does not lead to an authority");
    says(&CredentialFiles { trust: open.clone(), ..files.clone() }, NOW_S, "is no authority's");
    says(&CredentialFiles { trust: dir.path().join("none"), ..files.clone() }, NOW_S, "copy it from");
    says(&CredentialFiles { trust: authority.revoked(), ..files.clone() }, NOW_S, "holds no certificate");
    authority.rotate_host("a", 30, 0, NOW_S).unwrap();
    fs::copy(authority.revoked(), files.revocations.as_ref().unwrap()).unwrap();
    says(&files, NOW_S, "is revoked");
    // A list with one changed byte.
    let path = files.revocations.as_ref().unwrap();
    let mut lines: Vec<String> = fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect();
    let last = lines.len() - 2;
    let first = if lines[last].starts_with('A') { "B" } else { "A" };
    lines[last].replace_range(..1, first);
    fs::write(path, lines.join("\n") + "\n").unwrap();
    says(&files, NOW_S, "wrong signature");
}

/// Another implementation agrees about what was made.
#[test]
fn openssl_accepts_the_certificates() {
    if Command::new("openssl").arg("version").output().is_err() {
        eprintln!("openssl is not installed: not cross-checked");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let authority = authority(dir.path());
    authority.issue("a.example", &["2001:db8::1".parse().unwrap()], HOST_DAYS, NOW_S).unwrap();
    let at = NOW_S.to_string();
    let verify = |purpose: &str| {
        let out = Command::new("openssl")
            .args([
                "verify",
                "-x509_strict",
                "-crl_check",
                "-attime",
                &at,
                "-purpose",
                purpose,
                "-verify_hostname",
                "a.example",
            ])
            .args([
                "-CAfile".as_ref(),
                authority.trust().as_os_str(),
                "-CRLfile".as_ref(),
                authority.revoked().as_os_str(),
            ])
            .arg(authority.host("a.example"))
            .output()
            .unwrap();
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    for purpose in ["sslserver", "sslclient"] {
        let (ok, text) = verify(purpose);
        assert!(ok, "{text}");
    }
    let kept = fs::read(authority.host("a.example")).unwrap();
    authority.revoke("a.example", NOW_S).unwrap();
    fs::write(authority.host("a.example"), kept).unwrap();
    let (ok, text) = verify("sslserver");
    assert!(!ok && text.contains("revoked"), "{text}");
}
