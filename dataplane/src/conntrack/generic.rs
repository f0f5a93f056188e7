//! GRE, and every protocol that is not looked into: known by its addresses.
use super::Step;
use super::config::TrackConfig;
use super::entry::Connection;
use super::table::Change;
use super::udp::answered_is_stream;

/// GRE (RFC 2784; version 1 of RFC 2637 is told apart by its call identifier).
pub(super) fn track_gre(conn: &mut Connection, fresh: bool, config: &TrackConfig, now_ms: u64) -> Step {
    answered_is_stream(conn, fresh, config.timeouts.gre_ms, config.timeouts.gre_stream_ms, now_ms)
}

/// Anything else.
pub(super) fn track(conn: &mut Connection, fresh: bool, config: &TrackConfig, now_ms: u64) -> Step {
    conn.refresh(now_ms, config.timeouts.generic_ms);
    Step::Pass(if fresh { Change::Semantic } else { Change::Bookkeeping })
}
