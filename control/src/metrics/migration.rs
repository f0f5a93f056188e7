//! Metrics of migrations.
use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::{Labels, counters, gauges};
use crate::migration::Migration;

/// Everything about migrations that is exported.
pub(super) fn encode(migration: &Migration, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let host = migration.host();
    if !host.enabled {
        return Ok(());
    }
    let totals = migration.totals();
    let status = migration.status();
    let one = |n: u64| std::iter::once((Labels::new(), n));
    let label = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    let under_way = ["source", "destination"].map(|role| {
        let n = status.migrations.iter().filter(|m| m.role == role && m.ended_at_ms.is_none()).count();
        (label("role", role), n as i64)
    });
    gauges(
        e,
        "ferry_migrations_under_way",
        "Migrations of VMs' connections that are under way",
        under_way.into_iter(),
    )?;
    let ended = totals.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let ended =
        ended.iter().map(|((role, outcome), n)| (vec![("role", role.clone()), ("outcome", outcome.clone())], *n));
    counters(e, "ferry_migrations", "Migrations of VMs' connections that have ended, by outcome", ended)?;
    counters(e, "ferry_migration_rounds", "Rounds sent, final deltas included", one(totals.rounds.get()))?;
    let bytes = [("sent", &totals.sent_bytes), ("received", &totals.received_bytes)];
    let bytes = bytes.map(|(direction, n)| (label("direction", direction), n.get()));
    counters(e, "ferry_migration_record_bytes", "Bytes of records on the wire", bytes.into_iter())?;
    counters(
        e,
        "ferry_migration_late_frames",
        "Frames redirected, or delivered after that",
        one(totals.late_frames.get()),
    )?;
    counters(
        e,
        "ferry_migration_holds_exceeded",
        "Times that QEMU was let go before the destination had everything",
        one(totals.holds_exceeded.get()),
    )?;
    let (us, n) = (&totals.hold_us.0, &totals.hold_us.1);
    counters(e, "ferry_migration_hold_microseconds", "How long QEMU was held, summed up", one(us.get()))?;
    counters(e, "ferry_migration_holds", "Holds that this is the sum of", one(n.get()))?;
    let (us, n) = (&totals.final_delta_us.0, &totals.final_delta_us.1);
    counters(
        e,
        "ferry_migration_final_delta_microseconds",
        "From the VM's stop to the acknowledgement, summed up",
        one(us.get()),
    )?;
    counters(e, "ferry_migration_final_deltas", "Final deltas that this is the sum of", one(n.get()))?;
    let refused = host.refused.iter().map(|(why, n)| (label("reason", why), *n));
    counters(e, "ferry_migration_refused_connections", "Connections that the listener refused, by reason", refused)?;
    counters(e, "ferry_migration_audit_lost_lines", "Lines of the audit log not written", one(host.audit_lost_lines))?;
    let days = host.certificate_days_left.map(|d| (Labels::new(), d));
    gauges(e, "ferry_migration_certificate_days_left", "Whole days until the certificate expires", days.into_iter())
}
