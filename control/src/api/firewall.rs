//! The firewall's paths: VMs and their connections, groups and address sets, explanations, traces, denials.
use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Router, routing::MethodRouter};
use serde_json::{Value, json};

use super::error::ApiError;
use super::routes::{AppState, Body, ChangeQuery, Reply, blocking, change, merge_patch, object, only, read};
use super::{routes, views};
use crate::core::{ChangeError, Core};
use crate::firewall::explain::{self, ExplainError};
use crate::firewall::filter::{Filter, FilterError, FilterText};
use crate::firewall::packet_text::{self, PacketError};

/// Connections of a page unless the request says otherwise.
const DEFAULT_PAGE: usize = 1000;
/// Most connections of a page.
const MAX_PAGE: usize = 10_000;
/// Most lines of `GET /v1/firewall/drops`.
const MAX_DROP_LINES: usize = 10_000;

/// Adds the firewall's paths.
pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/vms", get(|s| read(s, |c| Ok(json!({ "vms": views::vms(c) })))).post(add_vm))
        .route("/vms/{name}", get(vm).put(put_vm).patch(patch_vm).delete(delete_vm))
        .route("/vms/{name}/connections", get(connections).delete(flush))
        .route("/vms/{name}/trace", post(trace))
        .route("/policy", get(|s| read(s, |c| Ok(json!(views::policy(c))))))
        .route("/security-groups", get(|s| read(s, |c| Ok(json!({ "security_groups": c.config().security_group })))))
        .route("/security-groups/{name}", entries("security_group"))
        .route("/address-sets", get(|s| read(s, |c| Ok(json!({ "address_sets": c.config().address_set })))))
        .route("/address-sets/{name}", entries("address_set"))
        .route("/ports/{name}/explain", post(explain))
        .route("/firewall/drops", get(drops))
        .route("/firewall/stats", get(|s| read(s, |c| Ok(json!({ "ports": c.engine().firewall_stats() })))))
}

impl From<FilterError> for ApiError {
    fn from(e: FilterError) -> Self {
        Self::bad_request(e.to_string(), e.fix)
    }
}

impl From<PacketError> for ApiError {
    fn from(e: PacketError) -> Self {
        Self::bad_request(e.to_string(), e.fix)
    }
}

impl From<ExplainError> for ApiError {
    fn from(e: ExplainError) -> Self {
        match e {
            ExplainError::Packet(p) => p.into(),
            ExplainError::Port(m) => Self::new(StatusCode::NOT_FOUND, "not_found", m, "`ferry policy show` lists them"),
            ExplainError::Frame(m) => Self::bad_request(format!("the frame is malformed: {m}"), "describe another"),
            ExplainError::Policy(m) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", m, "see ferryd's log"),
        }
    }
}

fn need_vm(core: &Core, name: &str) -> Result<(), ChangeError> {
    match core.config().vms().contains_key(name) {
        true => Ok(()),
        false => Err(ChangeError::NotFound { what: "VM", name: name.to_owned() }),
    }
}

async fn add_vm(State(s): State<AppState>, Query(q): Query<ChangeQuery>, body: Body) -> Result<Response, ApiError> {
    routes::add(s, q, "vm", body).await
}

async fn put_vm(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    routes::put_entry(s, q, "vm", name, body).await
}

async fn patch_vm(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    routes::patch_entry(s, q, "vm", name, body).await
}

async fn delete_vm(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
) -> Result<Response, ApiError> {
    change(s.core, q, StatusCode::OK, move |tree| {
        routes::find(tree, "vm", &name)?;
        let inside = routes::list(tree, "port").iter().filter(|p| p["vm"] == name.as_str());
        let ports: Vec<_> = inside.filter_map(|p| p["name"].as_str()).collect();
        if !ports.is_empty() {
            return Err(ChangeError::Conflict {
                message: format!("VM {name} still has {} port(s): {}", ports.len(), ports.join(", ")),
                hint: "remove them, or their key `vm`, first".into(),
            });
        }
        routes::list(tree, "vm").retain(|v| v["name"] != name.as_str());
        Ok(())
    })
    .await
}

async fn vm(State(s): State<AppState>, Path(name): Path<String>) -> Reply {
    read(State(s), move |core| {
        need_vm(core, &name)?;
        Ok(json!(views::vms(core).into_iter().find(|v| v.config.name == name)))
    })
    .await
}

/// Paths of one entry of a table of named entries.
fn entries(table: &'static str) -> MethodRouter<AppState> {
    let missing = move |name: &str| ChangeError::NotFound { what: what(table), name: name.to_owned() };
    get(move |s, Path(name): Path<String>| {
        read(s, move |c| {
            let tree = crate::config::to_tree(c.config());
            tree[table].get(&name).cloned().ok_or_else(|| missing(&name).into())
        })
    })
    .put(
        move |State(s): State<AppState>, Path(name): Path<String>, Query(q): Query<ChangeQuery>, body: Body| async move {
            let entry = object(body)?;
            change(s.core, q, StatusCode::OK, move |tree| {
                tree[table][name] = Value::Object(entry);
                Ok(())
            })
            .await
        },
    )
    .patch(
        move |State(s): State<AppState>, Path(name): Path<String>, Query(q): Query<ChangeQuery>, body: Body| async move {
            let patch = object(body)?;
            change(s.core, q, StatusCode::OK, move |tree| {
                let entry = tree[table].get_mut(&name).ok_or_else(|| missing(&name))?;
                merge_patch(entry, Value::Object(patch));
                Ok(())
            })
            .await
        },
    )
    .delete(move |State(s): State<AppState>, Path(name): Path<String>, Query(q): Query<ChangeQuery>| async move {
        change(s.core, q, StatusCode::OK, move |tree| {
            let removed = tree[table].as_object_mut().and_then(|t| t.remove(&name));
            removed.map(|_| ()).ok_or_else(|| missing(&name))
        })
        .await
    })
}

/// How a table's entries are called in messages.
fn what(table: &'static str) -> &'static str {
    if table == "address_set" { "address set" } else { "security group" }
}

/// Takes a number out of a query.
fn number(query: &mut BTreeMap<String, String>, key: &str, default: u64, most: u64) -> Result<u64, ApiError> {
    let Some(text) = query.remove(key) else { return Ok(default) };
    text.parse().ok().filter(|n| *n <= most).ok_or_else(|| {
        ApiError::bad_request(format!("{key}: \"{text}\" is not a number up to {most}"), "give a number")
    })
}

fn filter(query: BTreeMap<String, String>) -> Result<(FilterText, Filter), ApiError> {
    let map = query.into_iter().map(|(k, v)| (k, Value::from(v))).collect();
    let text: FilterText = serde_json::from_value(Value::Object(map))
        .map_err(|e| ApiError::bad_request(e.to_string(), "see docs/API.md for the filters"))?;
    let parsed = text.parse()?;
    Ok((text, parsed))
}

async fn connections(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(mut query): Query<BTreeMap<String, String>>,
) -> Reply {
    let cursor = number(&mut query, "cursor", 0, u64::MAX)?;
    let limit = number(&mut query, "limit", DEFAULT_PAGE as u64, MAX_PAGE as u64)?.max(1) as usize;
    let (_, filter) = filter(query)?;
    read(State(s), move |core| {
        need_vm(core, &name)?;
        let page = core.engine().connections(&name, &filter, cursor, limit)?;
        Ok(json!({ "vm": name, "connections": page.connections, "next": page.next }))
    })
    .await
}

async fn flush(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Reply {
    let (text, filter) = filter(query)?;
    blocking(s.core, move |core| {
        need_vm(core, &name)?;
        let flushed = core.engine_mut().flush_connections(&name, &filter)?;
        tracing::info!(vm = name, flushed, filter = text.query(), "connections flushed");
        Ok(json!({ "vm": name, "flushed": flushed }))
    })
    .await
    .map(Json)
}

/// The description in a request's body, and the port it names.
fn packet(body: Body, known: &[&str]) -> Result<(String, Option<String>), ApiError> {
    let body = object(body)?;
    only(&body, known)?;
    let text = |key: &str| body.get(key).and_then(Value::as_str).map(str::to_owned);
    let packet = text("packet").ok_or_else(|| {
        ApiError::bad_request(
            "`packet` must describe a packet",
            "send {\"packet\": \"tcp 10.0.0.1:40000 > 10.0.0.2:22 syn\"}",
        )
    })?;
    Ok((packet, text("port")))
}

async fn explain(State(s): State<AppState>, Path(name): Path<String>, body: Body) -> Reply {
    let (packet, _) = packet(body, &["packet"])?;
    let config = blocking(s.core, |core| Ok(core.config().clone())).await?;
    // Compiling a large policy takes a while: not under the daemon's lock.
    let explained = tokio::task::spawn_blocking(move || explain::explain(&config, &name, &packet, None));
    let explanation = explained.await.map_err(|e| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", e.to_string(), "see ferryd's log")
    })??;
    Ok(Json(json!({ "text": explanation.to_string(), "explanation": explanation })))
}

async fn trace(State(s): State<AppState>, Path(name): Path<String>, body: Body) -> Reply {
    let (text, port) = packet(body, &["packet", "port"])?;
    read(State(s), move |core| {
        let config = core.config();
        // A port without a firewall has no VM; it can be traced by its own name all the same.
        let mut ports: Vec<&str> = config.ports_of(&name).map(|p| p.name.as_str()).collect();
        if ports.is_empty() {
            ports.extend(config.port(&name).map(|p| p.name.as_str()));
        }
        if ports.is_empty() {
            need_vm(core, &name)?;
        }
        let parsed = packet_text::parse(&text)?;
        let near = explain::surroundings(config, |p| ports.contains(&p.name.as_str()));
        let described = parsed.frame(&near)?;
        let chosen = match &port {
            Some(p) => ports.iter().copied().find(|name| *name == p.as_str()),
            None => explain::port_of(config, &ports, &described),
        };
        let Some(chosen) = chosen else {
            let message = match &port {
                Some(p) => format!("{name} has no port {p}"),
                None => format!("{name} has several ports, and none is known to have the packet's address"),
            };
            return Err(ApiError::bad_request(message, format!("name one of its ports: {}", ports.join(", "))));
        };
        let trace = core.engine().trace(chosen, &described)?;
        Ok(json!({ "vm": name, "port": chosen, "text": trace.text, "report": trace.report }))
    })
    .await
}

async fn drops(State(s): State<AppState>, Query(mut query): Query<BTreeMap<String, String>>) -> Reply {
    let limit = number(&mut query, "limit", 100, MAX_DROP_LINES as u64)? as usize;
    let vm = query.remove("vm");
    if let Some(key) = query.keys().next() {
        return Err(ApiError::bad_request(format!("unknown key `{key}`"), "known: vm, limit"));
    }
    read(State(s), move |core| {
        if let Some(vm) = &vm {
            need_vm(core, vm)?;
        }
        let observer = core.observer();
        let mut lines = observer.drops(vm.as_deref());
        lines.truncate(limit);
        Ok(json!({ "drops": lines, "lost_reports": observer.lost() }))
    })
    .await
}
