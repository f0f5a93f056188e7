//! The Prometheus endpoint. Values are read at each scrape; nothing is kept twice.
use std::fmt;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::core::{Core, SharedCore};
use crate::engine::{RxStats, Stats};
use crate::migration::Migration;

mod firewall;
mod migration;
use firewall::FirewallSnapshot;

type Labels = Vec<(&'static str, String)>;

/// Everything that is exported, at one moment.
#[derive(Debug)]
struct Snapshot {
    stats: Stats,
    /// `(name, type, bridge, state)`
    ports: Vec<(String, String, String, String)>,
    /// `(bridge, entries)`
    fdb: Vec<(String, u64)>,
    uptime_s: u64,
    runtime_changes: u64,
    firewall: FirewallSnapshot,
    migration: Migration,
}

impl Snapshot {
    fn of(core: &Core) -> Self {
        let stats = core.engine().stats();
        let config = core.config();
        let state = |name: &str| core.engine().port_state(name).map_or_else(|_| "unknown".into(), |s| s.state);
        let entries = |bridge: &str| {
            stats.ports.iter().filter(|p| p.bridge == bridge).map(|p| u64::from(p.fdb_entries)).sum::<u64>()
        };
        Self {
            ports: config
                .port
                .iter()
                .map(|p| (p.name.clone(), p.type_name().to_owned(), p.bridge.clone(), state(&p.name)))
                .collect(),
            fdb: config.bridge.iter().map(|b| (b.name.clone(), entries(&b.name))).collect(),
            uptime_s: core.started().elapsed().as_secs(),
            runtime_changes: core.not_in_file().len() as u64,
            firewall: FirewallSnapshot::of(core),
            migration: core.migration().clone(),
            stats,
        }
    }

    fn rx(&self) -> impl Iterator<Item = (Labels, &RxStats)> {
        self.stats
            .ports
            .iter()
            .flat_map(|p| p.rx.iter().map(|q| (vec![("port", p.port.clone()), ("queue", q.queue.to_string())], q)))
    }
}

fn counters(
    e: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels, u64)>,
) -> fmt::Result {
    let mut family = e.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        match labels.is_empty() {
            true => family.encode_counter::<NoLabelSet, _, u64>(&value, None)?,
            false => ConstCounter::new(value).encode(family.encode_family(&labels)?)?,
        }
    }
    Ok(())
}

fn gauges(
    e: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels, i64)>,
) -> fmt::Result {
    let mut family = e.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        match labels.is_empty() {
            true => family.encode_gauge(&value)?,
            false => ConstGauge::new(value).encode(family.encode_family(&labels)?)?,
        }
    }
    Ok(())
}

fn with(mut labels: Labels, name: &'static str, value: &str) -> Labels {
    labels.push((name, value.to_owned()));
    labels
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        counters(e, "ferry_port_rx_frames", "Frames received", self.rx().map(|(l, q)| (l, q.frames)))?;
        counters(e, "ferry_port_rx_bytes", "Bytes received", self.rx().map(|(l, q)| (l, q.bytes)))?;
        counters(
            e,
            "ferry_port_rx_forwarded_frames",
            "Received frames that reached at least one output",
            self.rx().map(|(l, q)| (l, q.forwarded)),
        )?;
        counters(
            e,
            "ferry_port_rx_held_frames",
            "Received fragments that were kept until their datagram is complete",
            self.rx().map(|(l, q)| (l, q.held)),
        )?;
        counters(
            e,
            "ferry_port_rx_dropped_frames",
            "Received frames that were dropped, by reason; reasons that never occurred are left out",
            self.rx()
                .flat_map(|(l, q)| q.dropped.iter().map(move |(reason, n)| (with(l.clone(), "reason", reason), *n))),
        )?;
        let tx = || self.stats.ports.iter().map(|p| (vec![("port", p.port.clone())], &p.tx));
        counters(e, "ferry_port_tx_frames", "Frames sent", tx().map(|(l, t)| (l, t.frames)))?;
        counters(e, "ferry_port_tx_bytes", "Bytes sent", tx().map(|(l, t)| (l, t.bytes)))?;
        counters(
            e,
            "ferry_port_tx_refused_frames",
            "Copies of frames that the port did not take, by reason; reasons that never occurred are left out",
            tx().flat_map(|(l, t)| t.refused.iter().map(move |(r, n)| (with(l.clone(), "reason", r), *n))),
        )?;
        for (name, what, s) in [
            ("originated", "that the switch originated itself", &self.stats.originated),
            ("removed_ports", "of ports that were removed", &self.stats.removed),
        ] {
            let one = |n| std::iter::once((Labels::new(), n));
            counters(e, &format!("ferry_{name}_rx_frames"), &format!("Frames {what}"), one(s.frames))?;
            counters(
                e,
                &format!("ferry_{name}_rx_forwarded_frames"),
                &format!("Forwarded frames {what}"),
                one(s.forwarded),
            )?;
            counters(e, &format!("ferry_{name}_rx_held_frames"), &format!("Held fragments {what}"), one(s.held))?;
            counters(
                e,
                &format!("ferry_{name}_rx_dropped_frames"),
                &format!("Dropped frames {what}"),
                s.dropped.iter().map(|(reason, n)| (with(Labels::new(), "reason", reason), *n)),
            )?;
        }
        gauges(
            e,
            "ferry_port_state",
            "1 for the state that the port is in",
            self.ports.iter().map(|(name, kind, bridge, state)| {
                let labels =
                    [("port", name), ("type", kind), ("bridge", bridge), ("state", state)].map(|(k, v)| (k, v.clone()));
                (labels.to_vec(), 1)
            }),
        )?;
        gauges(
            e,
            "ferry_bridge_fdb_entries",
            "Addresses learned",
            self.fdb.iter().map(|(b, n)| (vec![("bridge", b.clone())], *n as i64)),
        )?;
        let pmds = || self.stats.pmds.iter().map(|p| (vec![("pmd", p.pmd.to_string())], p));
        counters(
            e,
            "ferry_pmd_busy_cycles",
            "Cycles of rounds that moved frames",
            pmds().map(|(l, p)| (l, p.busy_cycles)),
        )?;
        counters(
            e,
            "ferry_pmd_idle_cycles",
            "Cycles of rounds that found nothing",
            pmds().map(|(l, p)| (l, p.idle_cycles)),
        )?;
        counters(e, "ferry_pmd_iterations", "Rounds over all queues", pmds().map(|(l, p)| (l, p.iterations)))?;
        counters(e, "ferry_pmd_bursts", "Bursts with at least one frame", pmds().map(|(l, p)| (l, p.bursts)))?;
        counters(e, "ferry_pmd_frames", "Frames received", pmds().map(|(l, p)| (l, p.frames)))?;
        counters(
            e,
            "ferry_pmd_flow_cache_hits",
            "Connections in bursts that the flow cache knew",
            pmds().map(|(l, p)| (l, p.flow_cache_hits)),
        )?;
        counters(
            e,
            "ferry_pmd_flow_cache_misses",
            "Connections in bursts that were searched for in the tables",
            pmds().map(|(l, p)| (l, p.flow_cache_misses)),
        )?;
        counters(e, "ferry_pmd_sleeps", "Sleeps", pmds().map(|(l, p)| (l, p.sleeps)))?;
        counters(e, "ferry_pmd_sleep_nanoseconds", "Time slept", pmds().map(|(l, p)| (l, p.sleep_ns)))?;
        self.firewall.encode(e)?;
        migration::encode(&self.migration, e)?;
        let one = |v: i64| std::iter::once((Labels::new(), v));
        gauges(e, "ferry_uptime_seconds", "Time since the start", one(self.uptime_s as i64))?;
        gauges(e, "ferry_runtime_changes", "Differences to the configuration file", one(self.runtime_changes as i64))?;
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        gauges(e, "ferry_build", "1, with the version as label", std::iter::once((version, 1)))
    }
}

/// The metrics in the text format of OpenMetrics.
///
/// # Errors
/// A value could not be written as text.
pub fn render(core: &Core) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot::of(core)));
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

async fn scrape(State(core): State<SharedCore>) -> Response {
    match tokio::task::spawn_blocking(move || render(&core.lock())).await {
        Ok(Ok(text)) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Binds the endpoint.
///
/// # Errors
/// The address is not to be had.
pub async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(listen).await
}

/// Serves `/metrics` until `stop` turns true.
pub async fn serve(listener: TcpListener, core: SharedCore, mut stop: watch::Receiver<bool>) {
    let router = Router::new().route("/metrics", get(scrape)).with_state(core);
    let stopped = async move {
        // An error means that the daemon is gone.
        let _ = stop.wait_for(|s| *s).await;
    };
    if let Err(e) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
        tracing::error!("the metrics endpoint failed: {e}");
    }
}
