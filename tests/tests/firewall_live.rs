//! Random conversations through the kernel's conntrack and through Ferry's: the same verdicts, states and tables after every frame.
//!
//! `FERRY_LIVE_SEEDS=FROM-TO` (or one number) runs other seeds, `FERRY_LIVE_SECONDS` allows more time than the default.
use ferry_tests::Outcome;
use ferry_tests::live::compare::{Difference, differences, document, run, shrink};
use ferry_tests::live::generate::{categories, conversation};
use ferry_tests::live::kernel::Kernel;
use ferry_tests::live::own::Policy;
use ferry_tests::paths;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Seeds of a plain run.
const SEEDS: RangeInclusive<u64> = 0..=1999;
/// After this long no further conversation begins.
const TIME: Duration = Duration::from_secs(45);
/// So many conversations are always compared: they show every listed deviation.
const LEAST: usize = 240;
/// Conversations with an unknown difference that are cut down and printed.
const SHOWN: usize = 8;

fn seeds() -> RangeInclusive<u64> {
    let Ok(text) = std::env::var("FERRY_LIVE_SEEDS") else { return SEEDS };
    let number = |s: &str| s.trim().parse::<u64>().expect("FERRY_LIVE_SEEDS: FROM-TO or a number");
    match text.split_once('-') {
        Some((from, to)) => number(from)..=number(to),
        None => number(&text)..=number(&text),
    }
}

/// The reviewed list: classes with their reasons.
fn listed() -> BTreeMap<String, String> {
    let data = paths::workspace().join("tests/data/firewall");
    let read =
        |name: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(data.join(name)).unwrap()).unwrap() };
    let (list, properties) = (read("live-deviations.json"), read("deviations.json"));
    let deviations = list["deviations"].as_array().unwrap();
    deviations
        .iter()
        .map(|d| {
            let property = d["property"].as_str().unwrap();
            assert!(properties["properties"].get(property).is_some(), "known property: {d}");
            let reason = d["reason"].as_str().unwrap();
            assert!(!reason.is_empty(), "a reason: {d}");
            (d["class"].as_str().unwrap().to_owned(), reason.to_owned())
        })
        .collect()
}

#[test]
fn the_kernel_agrees() -> Outcome {
    let policy = Policy::standard()?;
    let listed = listed();
    let seconds = std::env::var("FERRY_LIVE_SECONDS").ok().and_then(|s| s.parse().ok());
    let time = seconds.map_or(TIME, Duration::from_secs);
    let started = Instant::now();
    let mut seen = BTreeMap::<&'static str, usize>::new();
    let mut states = BTreeMap::<String, usize>::new();
    let (mut conversations, mut frames) = (0, 0);
    let mut bad = Vec::new();
    let mut done = BTreeSet::new();
    let unknown = |found: &[Difference]| found.iter().any(|d| d.class.is_none_or(|class| !listed.contains_key(class)));
    Kernel::with(|kernel| {
        for seed in seeds() {
            if started.elapsed() > time && conversations >= LEAST {
                break;
            }
            let c = conversation(seed);
            let judged = run(kernel, &policy, &c)?;
            conversations += 1;
            frames += judged.len();
            done.insert(c.category);
            for j in &judged {
                *states.entry(j.kernel.ct_state.clone().unwrap_or_else(|| "none".into())).or_default() += 1;
            }
            let found = differences(&c, &judged);
            for class in found.iter().filter_map(|d| d.class) {
                *seen.entry(class).or_default() += 1;
            }
            if unknown(&found) {
                bad.push(c);
            }
        }
        Ok(())
    })?;
    eprintln!("{conversations} conversations, {frames} frames in {:?}: {states:?}", started.elapsed());
    eprintln!("listed deviations: {seen:?}");
    for c in bad.iter().take(SHOWN) {
        let (least, judged, found) = shrink(&policy, c)?;
        eprintln!(
            "\n### seed {}, {}, profile {}: {} of {} frames",
            c.seed,
            c.category,
            c.profile.name(),
            least.steps.len(),
            c.steps.len()
        );
        if found.is_empty() {
            eprintln!("not seen again by itself");
        }
        for d in &found {
            eprintln!("step {} {} {}: {}", d.step, d.what, d.class.unwrap_or("unknown"), d.detail);
        }
        eprintln!("{}", document(&least, &judged));
    }
    let all: Vec<_> = bad.iter().map(|c| (c.seed, c.category)).collect();
    assert!(all.is_empty(), "{} of {conversations} conversations differ: {all:?}", all.len());
    if std::env::var_os("FERRY_LIVE_SEEDS").is_none() {
        assert!(categories().all(|name| done.contains(name)), "every category was compared: {done:?}");
        for state in ["none", "new", "est", "rel", "inv", "untr"] {
            assert!(states.contains_key(state), "no packet was {state}: {states:?}");
        }
        let stale: Vec<_> = listed.keys().filter(|class| !seen.contains_key(class.as_str())).collect();
        assert!(stale.is_empty(), "listed but not seen: {stale:?}");
    }
    Ok(())
}

/// The comparison notices what it is there for: a Ferry with another switch is not the kernel.
#[test]
fn a_difference_is_noticed() -> Outcome {
    use ferry_tests::live::Profile;
    use ferry_tests::live::compare::Judged;
    use ferry_tests::live::own::Own;
    let policy = Policy::standard()?;
    let noticed = Kernel::with(|kernel| {
        let mut noticed = BTreeSet::new();
        for seed in 0..60 {
            let c = conversation(seed);
            kernel.begin(Profile::Default)?;
            let mut own = Own::new(Profile::Strict, &policy);
            let mut judged = Vec::new();
            for step in &c.steps {
                judged.push(Judged { kernel: kernel.step(step)?, own: own.step(step) });
            }
            noticed.extend(differences(&c, &judged).iter().filter(|d| d.class.is_none()).map(|d| d.what));
        }
        Ok(noticed)
    })?;
    assert_eq!(noticed, BTreeSet::from(["ct", "ct_state", "out"]));
    Ok(())
}
