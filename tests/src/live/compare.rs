//! Differences between the kernel and Ferry: found, put into classes, cut down to what is needed to show them.
use super::kernel::{Kernel, Observed};
use super::own::{Own, Policy};
use super::{Conversation, Side, Step};
use anyhow::{Result, bail};
use ferry_dataplane::testing::replay::{CtLine, StepResult, hex};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A conversation that takes longer than this is compared anew: the kernel's clock runs on, Ferry's stands still, and from two
/// seconds on (UDP streams) that would show.
const LONGEST: Duration = Duration::from_secs(1);
/// Between the kernel's time-outs, which are rounded down to seconds, and Ferry's.
const TIMEOUT_SLACK_MS: u32 = 2500;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Step, from 0.
    pub step: usize,
    /// `ct_state`, `out` or `ct`.
    pub what: &'static str,
    /// What kind it is; none when it is of no known kind.
    pub class: Option<&'static str>,
    /// Both sides.
    pub detail: String,
}

/// A step as both judged it.
pub struct Judged {
    /// The kernel.
    pub kernel: Observed,
    /// Ferry.
    pub own: StepResult,
}

/// Runs a conversation through both.
///
/// # Errors
/// When the harness fails, or the machine is so busy that a conversation takes more than a second five times.
pub fn run(kernel: &mut Kernel, policy: &Policy, conversation: &Conversation) -> Result<Vec<Judged>> {
    for _ in 0..5 {
        let started = Instant::now();
        kernel.begin(conversation.profile)?;
        let mut own = Own::new(conversation.profile, policy);
        let mut judged = Vec::with_capacity(conversation.steps.len());
        for step in &conversation.steps {
            judged.push(Judged { kernel: kernel.step(step)?, own: own.step(step) });
        }
        if started.elapsed() < LONGEST {
            return Ok(judged);
        }
    }
    bail!("seed {}: {} steps take more than {LONGEST:?}", conversation.seed, conversation.steps.len())
}

/// All differences of a conversation, up to the first step at which a known cause made the two sides' tables differ: whatever comes
/// after that may differ because of it.
pub fn differences(conversation: &Conversation, judged: &[Judged]) -> Vec<Difference> {
    let mut found = Vec::new();
    for (n, (step, j)) in conversation.steps.iter().zip(judged).enumerate() {
        let (kernel, own) = (&j.kernel, &j.own);
        let cause = class_of_judgement(step, j);
        if kernel.ct_state.as_deref() != own.ct_state {
            let detail = format!("kernel {:?}, Ferry {:?}", kernel.ct_state, own.ct_state);
            found.push(Difference { step: n, what: "ct_state", class: cause, detail });
        }
        let own_out: Vec<&[u8]> = own.out.iter().map(|(_, frame)| frame.as_slice()).collect();
        let kernel_out: Vec<&[u8]> = kernel.out.iter().map(Vec::as_slice).collect();
        if own_out != kernel_out {
            let list = |frames: &[&[u8]]| frames.iter().map(|f| hex(f)).collect::<Vec<_>>().join(" ");
            let detail = format!("kernel [{}], Ferry [{}]", list(&kernel_out), list(&own_out));
            let class = cause.or_else(|| class_of_output(step, &kernel_out, &own_out));
            found.push(Difference { step: n, what: "out", class, detail });
        }
        if !same_table(&kernel.ct, &own.ct) {
            let detail = format!("kernel {:?}, Ferry {:?}", kernel.ct, own.ct);
            found.push(Difference { step: n, what: "ct", class: cause, detail });
        }
        if cause.is_some() {
            break;
        }
    }
    found
}

fn same_table(kernel: &[CtLine], own: &[CtLine]) -> bool {
    // The order of lines that differ only in their time-outs does not matter.
    let key = |l: &CtLine| (l.proto.clone(), l.orig.clone(), l.state.clone(), l.flags.clone());
    let sorted = |lines: &[CtLine]| {
        let mut lines = lines.to_vec();
        lines.sort_by_key(key);
        lines
    };
    let (kernel, own) = (sorted(kernel), sorted(own));
    kernel.len() == own.len()
        && kernel
            .iter()
            .zip(&own)
            .all(|(k, o)| key(k) == key(o) && k.timeout_ms.abs_diff(o.timeout_ms) <= TIMEOUT_SLACK_MS)
}

/// What is special about an IPv6 packet's extension headers.
#[derive(Default)]
struct Extensions {
    /// There is an authentication header.
    authentication: bool,
    /// There is the header of a first fragment whose length is no multiple of eight although more follows.
    unaligned_first_fragment: bool,
    /// Fragment headers, up to and including the first that is not a first fragment's.
    fragment_headers: usize,
}

fn extensions(frame: &[u8]) -> Option<Extensions> {
    let mut found = Extensions::default();
    if frame.get(12..14)? != [0x86, 0xdd] {
        return Some(found);
    }
    let end = 54 + usize::from(u16::from_be_bytes([*frame.get(18)?, *frame.get(19)?]));
    let (mut at, mut next) = (54, *frame.get(20)?);
    while let (Some(&following), Some(&units)) = (frame.get(at), frame.get(at + 1)) {
        at += match next {
            0 | 43 | 60 => (usize::from(units) + 1) * 8,
            51 => {
                found.authentication = true;
                (usize::from(units) + 2) * 4
            }
            44 => {
                found.fragment_headers += 1;
                let (Some(&high), Some(&low)) = (frame.get(at + 2), frame.get(at + 3)) else { break };
                let field = u16::from_be_bytes([high, low]);
                if field & 0xfff8 != 0 {
                    break;
                }
                found.unaligned_first_fragment |= field & 1 == 1 && end.saturating_sub(at + 8) % 8 != 0;
                8
            }
            _ => break,
        };
        next = following;
    }
    Some(found)
}

/// Why the two sides judge this packet differently, if the cause is a known one.
fn class_of_judgement(step: &Step, judged: &Judged) -> Option<&'static str> {
    let (kernel, own) = (&judged.kernel, &judged.own);
    let special = extensions(&step.frame)?;
    let stricter = own.out.is_empty() && own.ct_state != kernel.ct_state.as_deref();
    if special.fragment_headers > 1 && stricter {
        return Some("second-fragment-header");
    }
    if special.unaligned_first_fragment && stricter {
        return Some("unaligned-fragment");
    }
    let policy_differs = kernel.ct_state.as_deref() == Some("new")
        && own.ct_state == Some("new")
        && kernel.out.is_empty() != own.out.is_empty();
    (special.authentication && policy_differs).then_some("authentication-header")
}

/// Fields of an IP packet that are needed to compare what came out.
struct Ip<'a> {
    /// Everything before the data that a fragment carries, with what fragmentation changes taken out (ECN: reassembly merges the
    /// fragments' codepoints, RFC 3168, 5.3).
    headers: Vec<u8>,
    offset: usize,
    more: bool,
    has_fragment_header: bool,
    data: &'a [u8],
    /// Bytes of the frame behind the packet.
    padding: usize,
}

fn read(frame: &[u8]) -> Option<Ip<'_>> {
    let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    if be16(12)? == 0x0800 {
        let header_len = usize::from(*frame.get(14)? & 0xf) * 4;
        let end = 14 + usize::from(be16(16)?);
        let mut headers = frame.get(14..14 + header_len.max(20))?.to_vec();
        // Length, identification, fragment field, checksum; options after the first fragment's.
        let field = u16::from_be_bytes([headers[6], headers[7]]);
        for range in [2..4, 4..6, 6..8, 10..12] {
            headers[range].fill(0);
        }
        headers.truncate(20);
        headers[0] = 0;
        headers[1] &= !3;
        return Some(Ip {
            headers,
            offset: usize::from(field & 0x1fff) * 8,
            more: field & 0x2000 != 0,
            has_fragment_header: false,
            data: frame.get(14 + header_len..end)?,
            padding: frame.len() - end,
        });
    }
    let end = 54 + usize::from(be16(18)?);
    let mut headers = frame.get(14..54)?.to_vec();
    headers[4..6].fill(0);
    headers[1] &= !0x30;
    let (mut offset, mut more, mut has_fragment_header) = (0, false, false);
    let (mut at, mut announcer) = (54, 6);
    while offset == 0 && !more && at < end {
        match headers[announcer] {
            number @ (0 | 43 | 51 | 60) => {
                let units = usize::from(*frame.get(at + 1)?);
                let len = if number == 51 { (units + 2) * 4 } else { (units + 1) * 8 };
                announcer = headers.len();
                headers.extend(frame.get(at..at + len)?);
                at += len;
            }
            44 => {
                let field = be16(at + 2)?;
                (offset, more, has_fragment_header) = (usize::from(field & 0xfff8), field & 1 != 0, true);
                headers[announcer] = *frame.get(at)?;
                at += 8;
            }
            _ => break,
        }
    }
    Some(Ip { headers, offset, more, has_fragment_header, data: frame.get(at..end)?, padding: frame.len() - end })
}

/// The datagram that the frames make, if they make one and no more.
fn joined(frames: &[&[u8]]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut pieces = frames.iter().map(|f| read(f)).collect::<Option<Vec<_>>>()?;
    pieces.sort_by_key(|p| p.offset);
    let headers = pieces.first()?.headers.clone();
    let mut data = Vec::new();
    let last = pieces.len() - 1;
    for (n, piece) in pieces.iter().enumerate() {
        if piece.offset != data.len() || piece.more == (n == last) {
            return None;
        }
        data.extend(piece.data);
    }
    Some((headers, data))
}

/// What kind of difference in the output this is, if both let the same packet through.
fn class_of_output(step: &Step, kernel: &[&[u8]], own: &[&[u8]]) -> Option<&'static str> {
    let (whole_kernel, whole_own) = (joined(kernel)?, joined(own)?);
    if whole_kernel != whole_own {
        return None;
    }
    let input = read(&step.frame)?;
    if input.more || input.offset != 0 {
        return Some("refragmented");
    }
    if input.has_fragment_header {
        return Some("atomic-fragment");
    }
    (input.padding > 0 && kernel.len() == 1 && own == [step.frame.as_slice()]).then_some("padding")
}

/// The shortest part of the conversation found that still shows a difference in no class, and the differences.
///
/// # Errors
/// When the harness fails.
pub fn shrink(policy: &Policy, conversation: &Conversation) -> Result<(Conversation, Vec<Judged>, Vec<Difference>)> {
    let attempt = |c: &Conversation| {
        // A fresh namespace: pieces of datagrams left from another attempt would matter.
        let judged = Kernel::with(|kernel| run(kernel, policy, c))?;
        let found = differences(c, &judged);
        let unknown = found.iter().any(|d| d.class.is_none());
        anyhow::Ok((unknown, judged, found))
    };
    let mut best = conversation.clone();
    let (mut unknown, mut judged, mut found) = attempt(&best)?;
    let mut at = best.steps.len();
    let mut length = best.steps.len() / 2;
    while unknown && length > 0 {
        if at < length {
            length /= 2;
            at = best.steps.len();
            continue;
        }
        at -= length;
        let mut smaller = best.clone();
        smaller.steps.drain(at..(at + length).min(best.steps.len()));
        if !smaller.steps.is_empty() {
            let result = attempt(&smaller)?;
            if result.0 {
                best = smaller;
                (unknown, judged, found) = result;
                at = at.min(best.steps.len());
            }
        }
    }
    Ok((best, judged, found))
}

/// The conversation as a document that `ferry-replay` takes, with what the kernel did.
pub fn document(conversation: &Conversation, judged: &[Judged]) -> Value {
    let profile = conversation.profile;
    let switches: serde_json::Map<String, Value> =
        profile.switches().iter().map(|(name, on)| ((*name).to_owned(), json!(u8::from(*on)))).collect();
    let steps: Vec<Value> = conversation
        .steps
        .iter()
        .zip(judged)
        .enumerate()
        .map(|(n, (step, j))| {
            let port = if step.from == Side::A { "B" } else { "A" };
            let out: Vec<Value> = j.kernel.out.iter().map(|f| json!({"port": port, "frame": hex(f)})).collect();
            let verdict = match j.kernel.out.as_slice() {
                [] => "drop",
                [only] if *only == step.frame => "pass",
                _ => "pass-changed",
            };
            let mut line = json!({
                "n": n, "at_ms": 0, "in": step.from.name(), "note": "", "frame": hex(&step.frame), "verdict": verdict,
                "out": out, "ct": j.kernel.ct.iter().map(CtLine::to_json).collect::<Vec<_>>(),
            });
            if let Some(state) = &j.kernel.ct_state {
                line["ct_state"] = json!(state);
            }
            line
        })
        .collect();
    json!({
        "format": 1, "engine": "kernel", "info": {}, "policy": {"name": "std"},
        "profiles": {profile.name(): switches}, "vectors": steps.len(),
        "scenarios": [{"id": conversation.seed, "category": conversation.category, "name": format!("seed {}", conversation.seed),
            "profile": profile.name(), "steps": steps}],
    })
}

#[cfg(test)]
mod tests {
    use super::super::packet::Hosts;
    use super::*;

    #[test]
    fn outputs_are_put_into_classes() {
        let mut hosts = Hosts::new(1, true);
        let (a, b) = hosts.ends(Side::A);
        let upper = hosts.udp_upper(a, b, (1, 53), &[7; 100], false);
        let whole_ip = hosts.ip(a, b, 17, &upper);
        let whole = hosts.frame(Side::A, &whole_ip);
        let piece = |from: usize, to: usize, more| {
            hosts.frame(Side::A, &hosts.ip_piece(a, b, 17, &upper[from..to], 5, from, more, &[]))
        };
        let (one, two) = (piece(0, 64, true), piece(64, upper.len(), false));
        let step = |frame: &[u8]| Step { from: Side::A, frame: frame.to_vec() };
        assert_eq!(class_of_output(&step(&two), &[&whole], &[&two, &one]), Some("refragmented"));
        assert_eq!(class_of_output(&step(&two), &[&whole], &[&one]), None, "half of it");
        let mut padded = whole.clone();
        padded.extend([0; 9]);
        assert_eq!(class_of_output(&step(&padded), &[&whole], &[&padded]), Some("padding"));
        assert_eq!(class_of_output(&step(&padded), &[], &[&padded]), None, "dropped");
        let mut other = whole.clone();
        other[50] ^= 1;
        assert_eq!(class_of_output(&step(&padded), &[&other], &[&padded]), None, "other data");
    }
}
