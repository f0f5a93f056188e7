//! UDP and UDP-Lite: unreplied until answered, a stream once the exchange has lasted.
use super::Step;
use super::config::TrackConfig;
use super::entry::Connection;
use super::table::Change;

/// An exchange that goes on this long after its first packet is a stream: longer time-out, assured.
pub(super) const STREAM_AFTER_MS: u32 = 2000;

/// UDP. The first word holds from when on the exchange is a stream.
pub(super) fn track(conn: &mut Connection, fresh: bool, config: &TrackConfig, now_ms: u64) -> Step {
    let now = now_ms as u32;
    if fresh {
        let mut words = *conn.words();
        let [stream_from, ..] = &mut words;
        *stream_from = now.wrapping_add(STREAM_AFTER_MS);
        conn.set_words(words);
    }
    let &[stream_from, ..] = conn.words();
    let stream = conn.seen_reply() && (conn.assured() || has_lasted(stream_from, now));
    let was_assured = conn.assured();
    let t = &config.timeouts;
    if stream {
        conn.set_assured();
        conn.refresh(now_ms, t.udp_stream_ms);
    } else {
        conn.refresh(now_ms, t.udp_ms);
    }
    Step::Pass(if fresh || conn.assured() != was_assured { Change::Semantic } else { Change::Bookkeeping })
}

/// The exchange is a stream from now on. When the clock has gone round (an entry is never idle for that long), the difference looks
/// negative again: assured stays.
#[inline(always)]
pub(super) fn has_lasted(stream_from: u32, now: u32) -> bool {
    (now.wrapping_sub(stream_from) as i32) > 0
}

/// UDP-Lite (RFC 3828): a stream as soon as it is answered.
pub(super) fn track_lite(conn: &mut Connection, fresh: bool, config: &TrackConfig, now_ms: u64) -> Step {
    answered_is_stream(conn, fresh, config.timeouts.udp_ms, config.timeouts.udp_stream_ms, now_ms)
}

/// The rule shared with GRE: an answer, once seen, makes a stream.
pub(super) fn answered_is_stream(
    conn: &mut Connection,
    fresh: bool,
    timeout_ms: u32,
    stream_ms: u32,
    now_ms: u64,
) -> Step {
    let was_assured = conn.assured();
    if conn.seen_reply() {
        conn.set_assured();
        conn.refresh(now_ms, stream_ms);
    } else {
        conn.refresh(now_ms, timeout_ms);
    }
    Step::Pass(if fresh || conn.assured() != was_assured { Change::Semantic } else { Change::Bookkeeping })
}
