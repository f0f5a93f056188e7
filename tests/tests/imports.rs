//! Imports between the workspace's crates run one way: control -> migrate, vhost, ffi -> dataplane; tests may see everything,
//! perf the tests as well, and nobody sees them. Development and build dependencies count as well.
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// A crate and the workspace crates that it may use.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("ferry-dataplane", &[]),
    ("ferry-vhost", &["ferry-dataplane"]),
    ("ferry-dpdk-sys", &[]),
    ("ferry-ffi", &["ferry-dataplane", "ferry-dpdk-sys"]),
    ("ferry-migrate", &["ferry-dataplane"]),
    ("ferry-control", &["ferry-dataplane", "ferry-vhost", "ferry-ffi", "ferry-migrate"]),
    ("ferry-guest", &[]),
];
/// Crates that may use every other one but those before them: measurements may use the tests' guests.
const CONSUMERS: [&str; 2] = ["ferry-perf", "ferry-tests"];

/// Every import that the rule forbids, and every crate that it does not know.
fn violations(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().expect("packages");
    let name_of = |v: &Value| v["name"].as_str().expect("a name").to_string();
    let members: BTreeSet<String> = packages.iter().map(name_of).collect();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into();
    let mut found = Vec::new();
    for package in packages {
        let name = name_of(package);
        let place = |name: &str| CONSUMERS.iter().position(|c| *c == name);
        let consumer = place(&name).is_some();
        if !consumer && !allowed.contains_key(name.as_str()) {
            found.push(format!("{name} is not in the rule: say what it may import"));
            continue;
        }
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let used = name_of(dependency);
            let fine = match allowed.get(name.as_str()) {
                // A crate's tests may depend on itself with other features.
                Some(list) => list.contains(&used.as_str()) || used == name,
                None => place(&used).is_none_or(|used| Some(used) >= place(&name)),
            };
            if members.contains(&used) && !fine {
                found.push(format!("{name} must not import {used}"));
            }
        }
    }
    found
}

#[test]
fn imports_run_one_way() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(ferry_tests::paths::workspace())
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(violations(&metadata), Vec::<String>::new());
}

#[test]
fn the_check_finds_what_it_looks_for() {
    let package = |name: &str, uses: &[&str]| {
        let uses: Vec<Value> = uses.iter().map(|u| serde_json::json!({"name": u, "kind": "dev"})).collect();
        serde_json::json!({"name": name, "dependencies": uses})
    };
    let metadata = serde_json::json!({"packages": [
        package("ferry-dataplane", &["ferry-vhost", "libc"]),
        package("ferry-vhost", &["ferry-dataplane", "vhost"]),
        package("ferry-migrate", &["ferry-vhost"]),
        package("ferry-control", &["ferry-vhost", "ferry-migrate", "ferry-tests"]),
        package("ferry-perf", &["ferry-control", "ferry-tests"]),
        package("ferry-tests", &["ferry-control", "ferry-perf"]),
        package("ferry-new", &[]),
    ]});
    assert_eq!(
        violations(&metadata),
        [
            "ferry-dataplane must not import ferry-vhost",
            "ferry-migrate must not import ferry-vhost",
            "ferry-control must not import ferry-tests",
            "ferry-tests must not import ferry-perf",
            "ferry-new is not in the rule: say what it may import",
        ]
    );
}
