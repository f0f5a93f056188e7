//! Ferry's connection tracking against conversations recorded from Linux.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ferry_dataplane::testing::replay::{Difference, compare, read, replay_document};
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/firewall").join(name)
}

fn print(differences: &[Difference]) {
    for d in differences.iter().take(60) {
        eprintln!("{} {} \"{}\" step {}: {}: {}", d.id, d.category, d.name, d.step, d.what, d.detail);
    }
    let mut by_category: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for d in differences {
        *by_category.entry((d.category.as_str(), d.what)).or_default() += 1;
    }
    eprintln!("{by_category:?}");
}

/// Every difference is in the reviewed list, and everything in the list is needed.
fn check(file: &str) {
    let doc = read(&data(file)).unwrap();
    let vectors: usize =
        doc["scenarios"].as_array().unwrap().iter().map(|s| s["steps"].as_array().unwrap().len()).sum();
    assert_eq!(vectors as u64, doc["vectors"].as_u64().unwrap(), "the recording is whole");
    let list = read(&data("deviations.json")).unwrap();
    let listed: Vec<(u64, u64, &str)> = list["deviations"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|d| d["file"] == file)
        .map(|d| {
            let properties = list["properties"].as_object().unwrap();
            assert!(properties.contains_key(d["property"].as_str().unwrap()), "known property: {d}");
            assert!(!d["reason"].as_str().unwrap().is_empty(), "a reason: {d}");
            (d["id"].as_u64().unwrap(), d["step"].as_u64().unwrap(), d["what"].as_str().unwrap())
        })
        .collect();
    let differences = compare(&doc).unwrap();
    let unlisted: Vec<Difference> =
        differences.iter().filter(|d| !listed.contains(&(d.id, d.step, d.what))).cloned().collect();
    print(&unlisted);
    let stale: Vec<_> = listed.iter().filter(|l| !differences.iter().any(|d| (d.id, d.step, d.what) == **l)).collect();
    assert!(stale.is_empty(), "listed but no longer different: {stale:?}");
    assert_eq!(unlisted.len(), 0, "differences that are not in the reviewed list");
}

#[test]
fn recorded_conversations() {
    check("kernel-vectors.json.gz");
}

#[test]
fn recorded_expiry() {
    check("kernel-expiry.json");
}

#[test]
fn own_results_agree_with_themselves() {
    let doc = read(&data("kernel-expiry.json")).unwrap();
    let own: Value = replay_document(&doc).unwrap();
    assert_eq!(own["engine"], "ferry");
    assert_eq!(compare(&own).unwrap(), []);
}
