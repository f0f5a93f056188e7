//! Logs that are whole, and logs that somebody or something has damaged.
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};

use super::log::Store;
use super::*;
use crate::authz::{Authorization, Role};

const NOW_MS: u64 = 1_795_000_000_123;

fn key() -> Arc<Ed25519KeyPair> {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    Arc::new(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
}

fn public(key: &Ed25519KeyPair) -> [u8; 32] {
    key.public_key().as_ref().try_into().unwrap()
}

fn config(dir: &Path) -> AuditConfig {
    AuditConfig { sync: SyncPolicy::Never, ..AuditConfig::new(dir.join("audit.log")) }
}

fn attempt(vm: &str) -> Event {
    Event { vm: Some(vm.into()), migration: Some(7), role: Some(Role::Send), ..Event::new(Kind::Attempt) }
}

/// A log of `events` events after its opening line.
fn written(dir: &Path, key: &Arc<Ed25519KeyPair>, events: usize) -> PathBuf {
    let config = config(dir);
    let (mut log, _) = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
    for i in 0..events {
        log.append(NOW_MS + i as u64, &attempt(&format!("vm-{i}"))).unwrap();
    }
    config.path
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

fn problems(path: &Path, keys: &[[u8; 32]]) -> Vec<ProblemKind> {
    verify(path, keys).unwrap().problems.into_iter().map(|p| p.kind).collect()
}

#[test]
fn a_log_is_readable_json_and_verifies() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let path = config(dir.path()).path;
    let mut log = AuditLog::open(AuditConfig::new(&path), "host-a", key.clone(), NOW_MS).unwrap().0;
    let decision = Authorization::default().decide("web \"1\"\n", "host-b", Role::Receive);
    log.append(NOW_MS, &Event { migration: Some(u128::MAX), ..Event::decision(&decision) }).unwrap();
    let head = log.head();
    log.append(NOW_MS, &Event { peer_head: Some(head), ..attempt(&"\u{1}ä".repeat(5000)) }).unwrap();
    let text = lines(&path);
    let value: serde_json::Value = serde_json::from_str(&text[1]).unwrap();
    assert_eq!(value["seq"], 2);
    assert_eq!(value["time"], "2026-11-18T11:06:40.123Z");
    assert_eq!(value["event"], "refused");
    assert_eq!(value["vm"], "web \"1\"\n");
    assert_eq!(value["migration"], "f".repeat(32));
    assert_eq!(value["role"], "receive");
    let value: serde_json::Value = serde_json::from_str(&text[2]).unwrap();
    assert!(value["vm"].as_str().unwrap().len() <= MAX_TEXT_BYTES);
    assert!(value["peer_head"].as_str().unwrap().starts_with("2:"));
    let report = verify(&path, &[public(&key)]).unwrap();
    assert!(report.is_intact(), "{:?}", report.problems);
    assert_eq!((report.lines, report.first_sequence, report.last), (3, Some(1), Some(log.head())));
}

#[test]
fn every_changed_byte_is_found() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let path = written(dir.path(), &key, 1);
    let good = fs::read(&path).unwrap();
    assert_eq!(problems(&path, &[public(&key)]), []);
    for at in 0..good.len() {
        for change in [1u8, 0x20] {
            let mut bad = good.clone();
            bad[at] ^= change;
            fs::write(&path, &bad).unwrap();
            assert!(!problems(&path, &[public(&key)]).is_empty(), "byte {at} ^ {change}");
        }
    }
}

#[test]
fn removed_moved_doubled_and_foreign_lines_are_found() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let path = written(dir.path(), &key, 6);
    let good = lines(&path);
    let with = |lines: &[String]| {
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        problems(&path, &[public(&key)])
    };
    for i in 0..good.len() {
        let mut removed = good.clone();
        removed.remove(i);
        let found = with(&removed);
        if i == 0 {
            assert_eq!(found, [ProblemKind::Beginning { first: 2 }]);
        } else if i == good.len() - 1 {
            assert_eq!(found, [ProblemKind::Truncated { known: 7, found: 6 }]);
        } else {
            assert_eq!(found, [ProblemKind::Chain { expected: i as u64 + 1, found: i as u64 + 2 }]);
        }
        let mut doubled = good.clone();
        doubled.insert(i, good[i].clone());
        assert!(with(&doubled).iter().any(|p| matches!(p, ProblemKind::Chain { .. })));
    }
    for i in 0..good.len() - 1 {
        let mut swapped = good.clone();
        swapped.swap(i, i + 1);
        assert!(with(&swapped).iter().any(|p| matches!(p, ProblemKind::Chain { .. })));
    }
    for keep in 0..good.len() {
        assert!(
            with(&good[..keep]).iter().any(|p| matches!(p, ProblemKind::Truncated { .. } | ProblemKind::Malformed))
        );
    }
    // A line of the same number and link, made by somebody with another key.
    let other = super::tests::key();
    let forged = line::make(
        Head { sequence: 2, hash: line::hash(good[1].as_bytes()) },
        3,
        NOW_MS,
        "host-a",
        &other,
        &attempt("x"),
    )
    .unwrap();
    let mut foreign = good.clone();
    foreign[2] = forged;
    let found = with(&foreign);
    assert!(found.iter().any(|p| matches!(p, ProblemKind::UnknownKey(_))), "{found:?}");
    assert!(found.iter().any(|p| matches!(p, ProblemKind::Chain { found: 4, .. })), "{found:?}");
    assert_eq!(with(&good), []);
    assert_eq!(problems(&path, &[public(&other)]).len(), good.len() + 1, "each line and the head have an unknown key");
}

#[test]
fn a_cut_at_any_byte_is_found_and_the_log_can_be_continued() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let path = written(dir.path(), &key, 2);
    let good = fs::read(&path).unwrap();
    let head = fs::read(dir.path().join("audit.log.head")).unwrap();
    let line_ends: Vec<usize> = good.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
    for at in (0..good.len()).step_by(7).chain(line_ends) {
        fs::write(&path, &good[..at]).unwrap();
        fs::write(dir.path().join("audit.log.head"), &head).unwrap();
        let found = problems(&path, &[public(&key)]);
        assert_eq!(found.is_empty(), at == good.len(), "{at}: {found:?}");
        let (mut log, opened) = AuditLog::open(config(dir.path()), "host-a", key.clone(), NOW_MS).unwrap();
        assert_eq!(opened.missing_lines + opened.head.sequence, 3, "{at}");
        log.append(NOW_MS, &attempt("next")).unwrap();
        assert_eq!(log.head().sequence, 5);
        // What was cut off stays missing, however long the log goes on.
        assert_eq!(problems(&path, &[public(&key)]).is_empty(), at == good.len(), "{at}");
        assert_eq!(
            problems(&path, &[public(&key)])
                .iter()
                .filter(|p| matches!(p, ProblemKind::Malformed | ProblemKind::Unfinished))
                .count(),
            0
        );
    }
}

#[test]
fn the_chain_goes_on_through_files_and_old_ones_are_removed_with_notice() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let config = AuditConfig { max_file_bytes: 2000, keep_files: Some(2), ..config(dir.path()) };
    for _ in 0..3 {
        let (mut log, opened) = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
        assert_eq!((opened.torn_bytes, opened.missing_lines, opened.head_unusable), (0, 0, false));
        for i in 0..20 {
            log.append(NOW_MS, &attempt(&format!("vm-{i}"))).unwrap();
        }
        assert_eq!(log.status().upkeep_failures, 0);
    }
    let report = verify(&config.path, &[public(&key)]).unwrap();
    assert!(report.is_intact(), "{:?}", report.problems);
    assert_eq!(report.files.len(), 3);
    assert!(report.first_sequence.unwrap() > 40);
    for file in &report.files {
        assert!(fs::metadata(file).unwrap().len() < 3000);
    }
    // A removal that was not announced.
    fs::remove_file(&report.files[0]).unwrap();
    assert!(matches!(problems(&config.path, &[public(&key)])[..], [ProblemKind::Beginning { .. }]));
    fs::rename(&report.files[1], &report.files[0]).unwrap();
    assert!(matches!(problems(&config.path, &[public(&key)])[..], [ProblemKind::Beginning { .. }]));
}

#[test]
fn a_file_missing_between_two_is_found() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let config = AuditConfig { max_file_bytes: 1500, ..config(dir.path()) };
    let (mut log, _) = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
    for _ in 0..20 {
        log.append(NOW_MS, &attempt("vm")).unwrap();
    }
    let report = verify(&config.path, &[public(&key)]).unwrap();
    assert!(report.is_intact() && report.files.len() > 3);
    fs::remove_file(&report.files[1]).unwrap();
    assert!(matches!(problems(&config.path, &[public(&key)])[..], [ProblemKind::Chain { .. }]));
}

#[test]
fn a_new_key_that_the_old_one_announces_is_trusted() {
    let (dir, old, new) = (tempfile::tempdir().unwrap(), key(), key());
    let path = config(dir.path()).path;
    let (mut log, _) = AuditLog::open(config(dir.path()), "host-a", old.clone(), NOW_MS).unwrap();
    log.change_key(NOW_MS, old.clone()).unwrap();
    assert_eq!(log.head().sequence, 1, "the same key is no change");
    log.change_key(NOW_MS, new.clone()).unwrap();
    log.append(NOW_MS, &attempt("vm")).unwrap();
    assert_eq!(problems(&path, &[public(&old)]), []);
    assert!(!problems(&path, &[public(&new)]).is_empty());
    drop(log);
    let (_, opened) = AuditLog::open(config(dir.path()), "host-a", new, NOW_MS).unwrap();
    assert!(!opened.head_unusable);
    let (_, opened) = AuditLog::open(config(dir.path()), "host-a", key(), NOW_MS).unwrap();
    assert!(opened.head_unusable);
}

/// A file on a disk with so many bytes left; may also refuse to cut and to sync.
struct FullDisk {
    file: fs::File,
    left: Arc<AtomicI64>,
    broken: Arc<AtomicI64>,
}

impl Store for FullDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = usize::try_from(self.left.load(Relaxed)).unwrap().min(bytes.len());
        self.left.fetch_sub(left as i64, Relaxed);
        Store::append(&mut self.file, &bytes[..left])?;
        if left < bytes.len() { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        if self.broken.load(Relaxed) > 0 {
            return Err(io::Error::other("broken"));
        }
        self.file.cut(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.broken.load(Relaxed) > 0 { Err(io::Error::other("broken")) } else { Ok(()) }
    }
}

#[test]
fn a_full_disk_refuses_migrations_and_the_gap_is_told_when_there_is_room_again() {
    for on_failure in [OnFailure::Refuse, OnFailure::Allow] {
        for left in [0i64, 1, 50, 300] {
            let (dir, key) = (tempfile::tempdir().unwrap(), key());
            let config = AuditConfig { on_failure, sync: SyncPolicy::EachLine, ..config(dir.path()) };
            let (mut log, _) = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
            let left = Arc::new(AtomicI64::new(left));
            let broken = Arc::new(AtomicI64::new(0));
            let file = fs::OpenOptions::new().append(true).open(&config.path).unwrap();
            log.file = Box::new(FullDisk { file, left: left.clone(), broken: broken.clone() });
            assert_eq!(log.begin(NOW_MS, &attempt("a")).is_err(), on_failure == OnFailure::Refuse);
            assert!(log.append(NOW_MS, &attempt("b")).is_err());
            // Also when not even the partial line can be removed.
            left.store(20, Relaxed);
            broken.store(1, Relaxed);
            assert!(log.append(NOW_MS, &attempt("c")).is_err());
            let status = log.status();
            assert_eq!((status.lost_lines, status.sequence), (3, 1));
            assert!(status.failing.is_some());
            left.store(1_000_000, Relaxed);
            assert!(log.append(NOW_MS, &attempt("d")).is_err());
            broken.store(0, Relaxed);
            log.begin(NOW_MS, &attempt("e")).unwrap();
            assert_eq!(log.status().failing, None);
            let report = verify(&config.path, &[public(&key)]).unwrap();
            assert!(report.is_intact(), "{:?}", report.problems);
            assert_eq!((report.lines, report.lost_lines), (3, 4));
        }
    }
}

/// The same with a real file system that is full.
#[test]
fn a_real_full_disk() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(dir.path()).output();
    if !mount.is_ok_and(|o| o.status.success()) {
        eprintln!("mounting needs root: skipped");
        return;
    }
    let config = config(dir.path());
    let (mut log, _) = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
    let ballast = dir.path().join("ballast");
    let written = (1..=16u64).rev().find(|pages| fs::write(&ballast, vec![0; (pages * 4096) as usize]).is_ok());
    let failed = (0..200).filter(|_| log.append(NOW_MS, &attempt("a")).is_err()).count() as u64;
    let during = verify(&config.path, &[public(&key)]);
    fs::remove_file(&ballast).unwrap();
    let last = log.append(NOW_MS, &attempt("b"));
    let after = verify(&config.path, &[public(&key)]);
    drop(log);
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    assert!(written.is_some() && failed > 0, "the disk was never full: {written:?} {failed}");
    assert!(during.unwrap().problems.iter().all(|p| p.kind == ProblemKind::HeadUnusable), "no partial line");
    last.unwrap();
    let after = after.unwrap();
    assert_eq!(after.lost_lines, failed);
    assert_eq!(after.lines + failed, 1 + 200 + 1 + 1);
}

#[test]
fn files_that_are_no_logs_are_left_alone() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let config = config(dir.path());
    for content in ["precious", "precious\n", "{}\n", "{\"seq\":1}\nx"] {
        fs::write(&config.path, content).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&config.path, mode).unwrap();
        let error = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).err().unwrap();
        assert!(matches!(error, AuditError::Content { .. }), "{error}");
        assert_eq!(fs::read_to_string(&config.path).unwrap(), content);
    }
    fs::remove_file(&config.path).unwrap();
    let path = written(dir.path(), &key, 1);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.clone() + "precious").unwrap();
    assert!(AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).is_err());
    fs::write(&path, text).unwrap();
    let held = AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS).unwrap();
    assert!(matches!(AuditLog::open(config.clone(), "host-a", key.clone(), NOW_MS), Err(AuditError::Busy { .. })));
    drop(held);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o622)).unwrap();
    assert!(AuditLog::open(config, "host-a", key, NOW_MS).is_err());
}

/// Verification reads what an attacker has written: any bytes.
#[test]
fn any_bytes_can_be_verified() {
    let (dir, key) = (tempfile::tempdir().unwrap(), key());
    let path = written(dir.path(), &key, 3);
    let good = fs::read(&path).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    for _ in 0..300 {
        let mut bad = good.clone();
        for _ in 0..=random(5) {
            let at = random(bad.len());
            match random(4) {
                0 => bad[at] = random(256) as u8,
                1 => bad.truncate(at.max(1)),
                2 => drop(bad.drain(at..(at + random(300)).min(bad.len()))),
                _ => {
                    let piece = bad[at..(at + random(300)).min(bad.len())].to_vec();
                    let to = random(bad.len());
                    bad.splice(to..to, piece);
                }
            }
            if bad.is_empty() {
                bad.push(b'{');
            }
        }
        fs::write(&path, &bad).unwrap();
        let report = verify(&path, &[public(&key)]).unwrap();
        assert_eq!(report.is_intact(), bad == good);
    }
    fs::write(&path, vec![b'x'; 5 * MAX_LINE_BYTES]).unwrap();
    assert!(!verify(&path, &[public(&key)]).unwrap().is_intact());
}
