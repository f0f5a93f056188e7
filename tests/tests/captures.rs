//! Public captures through the parser, the spoofing checks, tracking and the policy: nothing panics, every frame is accounted for, and
//! what became of them is what was reviewed.
use ferry_tests::captures::{Account, Capture, Frame, Pipeline, View, archive};
use ferry_tests::live::Random;
use ferry_tests::live::own::Policy;
use ferry_tests::paths;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    paths::workspace().join("tests/data/captures").join(name)
}

fn captures() -> Vec<Capture> {
    let captures = archive(&data("tcpdump-4.99.3.tar.gz")).unwrap();
    assert_eq!(captures.len(), 667, "the archive is whole");
    captures
}

/// Replays `frames`; checks the books.
fn replay<'f>(capture: &Capture, frames: impl Iterator<Item = &'f Frame>, view: View, policy: &Policy) -> Account {
    let mut pipeline = Pipeline::new(capture, view, policy);
    let mut count = 0;
    for frame in frames {
        pipeline.frame(frame);
        count += 1;
    }
    let account = pipeline.account().clone();
    assert_eq!((account.frames, account.sum()), (count, count), "{}: every frame under one heading", capture.name);
    assert_eq!(pipeline.fragment_bytes_in_the_end(), 0, "{}: fragments' memory comes back", capture.name);
    account
}

fn line(capture: &Capture, view: View, account: &Account) -> String {
    let Account { frames, connections, headings } = account;
    let mut text = format!("{} {} frames={frames} connections={connections}", capture.name, view.name());
    for (heading, n) in headings {
        write!(text, " {heading}={n}").unwrap();
    }
    text
}

#[test]
fn totals_are_as_reviewed() {
    let policy = Policy::standard().unwrap();
    let mut text = String::new();
    let mut all = BTreeMap::<String, u64>::new();
    for capture in captures() {
        for view in View::ALL {
            let account = replay(&capture, capture.frames.iter(), view, &policy);
            for (heading, n) in &account.headings {
                *all.entry(heading.clone()).or_default() += n;
            }
            writeln!(text, "{}", line(&capture, view, &account)).unwrap();
        }
    }
    eprintln!("{all:#?}");
    // The captures show what they are there for.
    for heading in ["new:allowed", "new:denied", "established:allowed", "related:allowed", "untracked:allowed", "held"]
    {
        assert!(all.contains_key(heading), "nothing was {heading}");
    }
    let path = data("totals.txt");
    if std::env::var_os("FERRY_CAPTURES_WRITE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let reviewed = std::fs::read_to_string(&path).unwrap();
    let changed: Vec<_> = reviewed.lines().zip(text.lines()).filter(|(a, b)| a != b).take(20).collect();
    assert!(changed.is_empty(), "reviewed, and now: {changed:#?}");
    assert_eq!(reviewed.lines().count(), text.lines().count());
}

/// Whatever is cut off, each frame is still accounted for, and a frame that lacks the end of its IP packet gets nowhere.
#[test]
fn frames_cut_short_are_accounted_for() {
    let policy = Policy::standard().unwrap();
    for capture in captures() {
        let mut random = Random::new(7);
        for view in View::ALL {
            let cut: Vec<Frame> = capture
                .frames
                .iter()
                .map(|f| Frame { at_ms: f.at_ms, bytes: f.bytes[..random.range(0, f.bytes.len())].to_vec() })
                .collect();
            replay(&capture, cut.iter(), view, &policy);
        }
    }
}

/// Bits flipped anywhere, mostly in the headers.
#[test]
fn damaged_frames_are_accounted_for() {
    let policy = Policy::standard().unwrap();
    let mut frames = 0;
    for capture in captures() {
        let mut random = Random::new(11);
        for round in 0..6 {
            let damaged: Vec<Frame> = capture
                .frames
                .iter()
                .map(|f| {
                    let mut f = f.clone();
                    for _ in 0..random.range(1, 5) {
                        let end = if random.percent(80) { f.bytes.len().min(100) } else { f.bytes.len() };
                        if end > 12 {
                            let at = random.range(12, end);
                            f.bytes[at] ^= 1 << random.range(0, 8);
                        }
                    }
                    f
                })
                .collect();
            let view = View::ALL[round % View::ALL.len()];
            frames += replay(&capture, damaged.iter(), view, &policy).frames;
        }
    }
    assert!(frames > 50_000, "{frames}");
}
