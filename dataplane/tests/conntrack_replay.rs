//! Ferry's connection tracking against conversations recorded from Linux.
#![allow(unsafe_code)] // Lends private buffers to a burst, as a port would.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ferry_dataplane::conntrack::{Checksum, Judgement, ModelTable, Packet, Toward, TrackConfig, Tracker};
use ferry_dataplane::frame::{Offload, RxBurst};
use ferry_dataplane::testing::replay::{Difference, compare, read, replay_document, unhex};
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
fn recorded_walks() {
    check("kernel-walks.json.gz");
}

#[test]
fn own_results_agree_with_themselves() {
    let doc = read(&data("kernel-expiry.json")).unwrap();
    let own: Value = replay_document(&doc).unwrap();
    assert_eq!(own["engine"], "ferry");
    assert_eq!(compare(&own).unwrap(), []);
}

/// A frame of which only the headers lie in private memory, the rest in pieces in a port's, is judged as one that is whole.
#[test]
fn split_frames_are_judged_alike() {
    let mut frames = 0;
    for file in ["kernel-vectors.json.gz", "kernel-walks.json.gz"] {
        let doc = read(&data(file)).unwrap();
        for scenario in doc["scenarios"].as_array().unwrap() {
            let mut whole = Tracker::new(ModelTable::new(100), TrackConfig::default());
            let mut split = Tracker::new(ModelTable::new(100), TrackConfig::default());
            for (n, step) in scenario["steps"].as_array().unwrap().iter().enumerate() {
                let frame = unhex(step["frame"].as_str().unwrap()).unwrap();
                let toward = if step["in"] == "A" { Toward::Egress } else { Toward::Ingress };
                let mut burst = RxBurst::new();
                for piece in frame.chunks(61 + n % 7) {
                    // SAFETY: `frame` outlives the burst.
                    unsafe { burst.push_segment(piece.as_ptr(), piece.len() as u32) };
                }
                assert!(burst.finish_frame(0, Offload::default()));
                let mut head = (n * 13) % 60;
                let mut judge_split = || loop {
                    let head_len = head.min(frame.len());
                    let body = burst.body(0, head_len as u32);
                    let packet =
                        Packet { head: &frame[..head_len], body, toward, checksum: Checksum::Verify, zone: None };
                    match split.track(&packet, 0) {
                        Judgement::NeedMore { bytes } => {
                            assert!(bytes as usize > head && bytes as usize <= frame.len(), "asks for what is there");
                            head = bytes as usize;
                        }
                        other => break other,
                    }
                };
                let (a, b) = (judge_split(), whole.track(&Packet::whole(&frame, toward, Checksum::Verify), 0));
                let state = |j: &Judgement| match j {
                    Judgement::Tracked(t) => format!("{:?} {:?}", t.state, t.invalid),
                    other => format!("{other:?}"),
                };
                assert_eq!(state(&a), state(&b), "{} step {n}", scenario["name"]);
                for (tracker, judgement) in [(&mut split, a), (&mut whole, b)] {
                    let Judgement::Tracked(t) = judgement else { continue };
                    tracker.confirm(&t, 0).unwrap();
                    if let Some(datagram) = t.datagram {
                        tracker.fragments().release(datagram, |_| {});
                    }
                }
                frames += 1;
            }
        }
    }
    assert!(frames > 6000);
}
