//! The API's paths. Handlers run on blocking threads: a change may wait for grace periods and devices.
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::server::Peer;
use super::{MAX_BODY_BYTES, firewall, migration, views};
use crate::core::{ChangeError, Core, SharedCore};
use crate::migration::Migration;

/// Longest time a request may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What the handlers share.
#[derive(Clone)]
pub struct AppState {
    /// The daemon's state.
    pub core: SharedCore,
    /// Migrations.
    pub migration: Migration,
}

pub(super) type Reply = Result<Json<Value>, ApiError>;

/// All paths.
pub fn router(state: AppState) -> Router {
    let v1 = Router::new()
        .route("/status", get(|s| read(s, |c| Ok(json!(views::Status::of(c))))))
        .route("/config", get(config))
        .route("/stats", get(stats))
        .route("/pmds", get(|s| read(s, |c| Ok(json!({ "pmds": views::pmds(c) })))))
        .route("/ports", get(|s| read(s, |c| Ok(json!({ "ports": views::ports(c) })))).post(add_port))
        .route("/ports/{name}", get(port).put(put_port).patch(patch_port).delete(delete_port))
        .route("/ports/{name}/vlan", put(put_vlan))
        .route("/ports/{name}/rxqs/{queue}", put(assign))
        .route("/bridges", get(|s| read(s, |c| Ok(json!({ "bridges": views::bridges(c) })))).post(add_bridge))
        .route("/bridges/{name}", get(bridge).put(put_bridge).patch(patch_bridge).delete(delete_bridge))
        .route("/bridges/{name}/fdb", get(fdb).delete(flush_fdb))
        .route("/reload", post(reload))
        .route("/log", put(set_log))
        .merge(firewall::routes())
        .merge(migration::routes());
    Router::new()
        .nest("/v1", v1)
        .fallback(|r: Request| async move {
            let message = format!("there is no {}", r.uri().path());
            ApiError::new(StatusCode::NOT_FOUND, "not_found", message, "paths start with /v1; see docs/API.md")
        })
        .method_not_allowed_fallback(|r: Request| async move {
            let message = format!("{} is not possible on {}", r.method(), r.uri().path());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message, "see docs/API.md")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(supervise))
        .with_state(state)
}

/// Bounds each request in time and logs changes with who asked for them.
async fn supervise(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().clone());
    let peer = request.extensions().get::<Peer>().copied().unwrap_or_default();
    let begun = Instant::now();
    let response = match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(r) => r,
        Err(_) => ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            format!("{method} {path} took longer than {} s", REQUEST_TIMEOUT.as_secs()),
            "a change may still be carried out; look with `ferry status`",
        )
        .into_response(),
    };
    if method != Method::GET && method != Method::HEAD {
        let status = response.status().as_u16();
        let ms = begun.elapsed().as_millis() as u64;
        let Peer { pid, uid, gid } = peer;
        tracing::info!(%method, %path, status, ms, pid, uid, gid, "API change");
    }
    response
}

pub(super) async fn blocking<T: Send + 'static>(
    core: SharedCore,
    f: impl FnOnce(&mut Core) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(move || f(&mut core.lock())).await.unwrap_or_else(|e| {
        Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", e.to_string(), "see ferryd's log"))
    })
}

pub(super) async fn read(
    State(s): State<AppState>,
    f: impl FnOnce(&Core) -> Result<Value, ApiError> + Send + 'static,
) -> Reply {
    blocking(s.core, |core| f(core)).await.map(Json)
}

/// Query of every change.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ChangeQuery {
    /// Only say what would be done.
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn change(
    core: SharedCore,
    query: ChangeQuery,
    status: StatusCode,
    edit: impl FnOnce(&mut Value) -> Result<(), ChangeError> + Send + 'static,
) -> Result<Response, ApiError> {
    let outcome = blocking(core, move |core| Ok(core.edit(query.dry_run, edit)?)).await?;
    for c in outcome.changes.iter().filter(|_| outcome.applied) {
        tracing::info!("{c}");
    }
    let status = if outcome.applied { status } else { StatusCode::OK };
    Ok((status, Json(outcome)).into_response())
}

/// The request's body as a JSON object.
pub(super) fn object(body: Result<Bytes, BytesRejection>) -> Result<Map<String, Value>, ApiError> {
    let body = body.map_err(|e| match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            format!("the body has more than {MAX_BODY_BYTES} bytes"),
            "send less",
        ),
        status => ApiError::new(status, "bad_request", e.body_text(), ""),
    })?;
    match serde_json::from_slice(&body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::bad_request("the body must be a JSON object", "send { ... }")),
        Err(e) => Err(ApiError::bad_request(format!("the body is not JSON: {e}"), "send a JSON object")),
    }
}

/// Rejects keys that a small request does not have.
pub(super) fn only(map: &Map<String, Value>, known: &[&str]) -> Result<(), ApiError> {
    match map.keys().find(|k| !known.contains(&k.as_str())) {
        Some(k) => Err(ApiError::bad_request(format!("unknown key `{k}`"), format!("known: {}", known.join(", ")))),
        None => Ok(()),
    }
}

pub(super) type Body = Result<Bytes, BytesRejection>;

pub(super) fn list<'a>(tree: &'a mut Value, what: &str) -> &'a mut Vec<Value> {
    if !tree[what].is_array() {
        tree[what] = Value::Array(Vec::new());
    }
    match &mut tree[what] {
        Value::Array(items) => items,
        // Just made one.
        _ => unreachable!("not an array"),
    }
}

pub(super) fn find<'a>(tree: &'a mut Value, what: &'static str, name: &str) -> Result<&'a mut Value, ChangeError> {
    let found = list(tree, what).iter_mut().find(|v| v["name"] == name);
    found.ok_or_else(|| ChangeError::NotFound { what, name: name.to_owned() })
}

/// JSON merge patch (RFC 7396): null takes a key away, objects are merged, all else replaces.
pub(super) fn merge_patch(target: &mut Value, patch: Value) {
    match patch {
        Value::Object(patch) => {
            if !target.is_object() {
                *target = Value::Object(Map::new());
            }
            if let Value::Object(map) = target {
                for (key, v) in patch {
                    if v.is_null() {
                        map.remove(&key);
                    } else {
                        merge_patch(map.entry(key).or_insert(Value::Null), v);
                    }
                }
            }
        }
        other => *target = other,
    }
}

pub(super) async fn add(
    state: AppState,
    query: ChangeQuery,
    what: &'static str,
    body: Body,
) -> Result<Response, ApiError> {
    let entry = object(body)?;
    change(state.core, query, StatusCode::CREATED, move |tree| {
        let name = entry.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !name.is_empty() && list(tree, what).iter().any(|v| v["name"] == name.as_str()) {
            return Err(ChangeError::Exists { what, name });
        }
        list(tree, what).push(Value::Object(entry));
        Ok(())
    })
    .await
}

pub(super) async fn put_entry(
    state: AppState,
    query: ChangeQuery,
    what: &'static str,
    name: String,
    body: Body,
) -> Result<Response, ApiError> {
    let mut entry = object(body)?;
    if entry.get("name").is_some_and(|n| *n != *name) {
        return Err(ApiError::bad_request("the name in the body is not the one in the path", "leave it out"));
    }
    entry.insert("name".into(), Value::from(name.clone()));
    change(state.core, query, StatusCode::OK, move |tree| {
        match find(tree, what, &name) {
            Ok(v) => *v = Value::Object(entry),
            Err(_) => list(tree, what).push(Value::Object(entry)),
        }
        Ok(())
    })
    .await
}

pub(super) async fn patch_entry(
    state: AppState,
    query: ChangeQuery,
    what: &'static str,
    name: String,
    body: Body,
) -> Result<Response, ApiError> {
    let patch = object(body)?;
    if patch.get("name").is_some_and(|n| *n != *name) {
        return Err(ApiError::bad_request(
            format!("a {what} cannot be renamed"),
            "remove it and add it under the new name",
        ));
    }
    change(state.core, query, StatusCode::OK, move |tree| {
        merge_patch(find(tree, what, &name)?, Value::Object(patch));
        Ok(())
    })
    .await
}

async fn add_port(State(s): State<AppState>, Query(q): Query<ChangeQuery>, body: Body) -> Result<Response, ApiError> {
    add(s, q, "port", body).await
}

async fn add_bridge(State(s): State<AppState>, Query(q): Query<ChangeQuery>, body: Body) -> Result<Response, ApiError> {
    add(s, q, "bridge", body).await
}

async fn put_port(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    put_entry(s, q, "port", name, body).await
}

async fn put_bridge(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    put_entry(s, q, "bridge", name, body).await
}

async fn patch_port(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    patch_entry(s, q, "port", name, body).await
}

async fn patch_bridge(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    patch_entry(s, q, "bridge", name, body).await
}

async fn delete_port(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
) -> Result<Response, ApiError> {
    change(s.core, q, StatusCode::OK, move |tree| {
        find(tree, "port", &name)?;
        list(tree, "port").retain(|v| v["name"] != name.as_str());
        Ok(())
    })
    .await
}

async fn delete_bridge(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
) -> Result<Response, ApiError> {
    change(s.core, q, StatusCode::OK, move |tree| {
        find(tree, "bridge", &name)?;
        let inside = list(tree, "port").iter().filter(|p| p["bridge"] == name.as_str());
        let ports: Vec<_> = inside.filter_map(|p| p["name"].as_str()).collect();
        if !ports.is_empty() {
            return Err(ChangeError::Conflict {
                message: format!("bridge {name} still has {} port(s): {}", ports.len(), ports.join(", ")),
                hint: "remove or move them first".into(),
            });
        }
        list(tree, "bridge").retain(|v| v["name"] != name.as_str());
        Ok(())
    })
    .await
}

async fn put_vlan(
    State(s): State<AppState>,
    Path(name): Path<String>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    let vlan = object(body)?;
    change(s.core, q, StatusCode::OK, move |tree| {
        find(tree, "port", &name)?["vlan"] = Value::Object(vlan);
        Ok(())
    })
    .await
}

async fn assign(
    State(s): State<AppState>,
    Path((name, queue)): Path<(String, usize)>,
    Query(q): Query<ChangeQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    let body = object(body)?;
    only(&body, &["pmd"])?;
    let Some(pmd) = body.get("pmd").and_then(Value::as_u64) else {
        return Err(ApiError::bad_request("`pmd` must be the number of a PMD thread", "send {\"pmd\": 0}"));
    };
    let core = s.core.clone();
    let wanted = name.clone();
    // Queues keep their places, so that this one alone moves.
    let mut places = blocking(core, move |core| {
        let port = core.config().port(&wanted);
        let port = port.ok_or(ChangeError::NotFound { what: "port", name: wanted.clone() })?;
        let place = |q| core.state().placement.get(&(wanted.clone(), q)).copied().unwrap_or_default();
        Ok((0..port.rx_queues()).map(place).map(Value::from).collect::<Vec<_>>())
    })
    .await?;
    let count = places.len();
    match places.get_mut(queue) {
        Some(place) => *place = Value::from(pmd),
        None => {
            let message = format!("port {name} has no receive queue {queue}");
            let hint = format!("its queues are numbered 0 to {}", count.saturating_sub(1));
            return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message, hint));
        }
    }
    change(s.core, q, StatusCode::OK, move |tree| {
        find(tree, "port", &name)?["rxq_affinity"] = Value::Array(places);
        Ok(())
    })
    .await
}

async fn port(State(s): State<AppState>, Path(name): Path<String>) -> Reply {
    read(State(s), move |core| {
        let view = views::ports(core).into_iter().find(|p| p.config.name == name);
        Ok(json!(view.ok_or(ChangeError::NotFound { what: "port", name })?))
    })
    .await
}

async fn bridge(State(s): State<AppState>, Path(name): Path<String>) -> Reply {
    read(State(s), move |core| {
        let view = views::bridges(core).into_iter().find(|b| b.config.name == name);
        Ok(json!(view.ok_or(ChangeError::NotFound { what: "bridge", name })?))
    })
    .await
}

fn need(core: &Core, what: &'static str, name: &str) -> Result<(), ChangeError> {
    let exists = match what {
        "bridge" => core.config().bridge(name).is_some(),
        _ => core.config().port(name).is_some(),
    };
    if exists { Ok(()) } else { Err(ChangeError::NotFound { what, name: name.to_owned() }) }
}

async fn fdb(State(s): State<AppState>, Path(name): Path<String>) -> Reply {
    read(State(s), move |core| {
        need(core, "bridge", &name)?;
        Ok(json!({ "bridge": name, "fdb": core.engine().fdb(&name)? }))
    })
    .await
}

#[derive(Debug, Default, Deserialize)]
struct PortQuery {
    port: Option<String>,
}

async fn flush_fdb(State(s): State<AppState>, Path(name): Path<String>, Query(q): Query<PortQuery>) -> Reply {
    blocking(s.core, move |core| {
        need(core, "bridge", &name)?;
        if let Some(p) = &q.port {
            need(core, "port", p)?;
        }
        Ok(json!({ "flushed": core.engine_mut().fdb_flush(&name, q.port.as_deref())? }))
    })
    .await
    .map(Json)
}

async fn stats(State(s): State<AppState>, Query(q): Query<PortQuery>) -> Reply {
    read(State(s), move |core| {
        let mut stats = core.engine().stats();
        if let Some(port) = q.port {
            need(core, "port", &port)?;
            stats.ports.retain(|p| p.port == port);
        }
        Ok(json!(stats))
    })
    .await
}

#[derive(Debug, Default, Deserialize)]
struct FormatQuery {
    format: Option<String>,
}

async fn config(State(s): State<AppState>, Query(q): Query<FormatQuery>) -> Result<Response, ApiError> {
    let toml = match q.format.as_deref() {
        None | Some("json") => false,
        Some("toml") => true,
        Some(other) => {
            return Err(ApiError::bad_request(format!("there is no format \"{other}\""), "use json or toml"));
        }
    };
    let config = blocking(s.core, |core| Ok(core.config().clone())).await?;
    if !toml {
        return Ok(Json(config).into_response());
    }
    let kind = HeaderValue::from_static("application/toml");
    Ok(([(header::CONTENT_TYPE, kind)], config.to_toml()).into_response())
}

#[derive(Debug, Default, Deserialize)]
struct ReloadQuery {
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    discard_runtime: bool,
}

async fn reload(State(s): State<AppState>, Query(q): Query<ReloadQuery>) -> Result<Response, ApiError> {
    let outcome = blocking(s.core, move |core| Ok(core.reload(q.discard_runtime, q.dry_run)?)).await?;
    for c in outcome.changes.iter().filter(|_| outcome.applied) {
        tracing::info!("reload: {c}");
    }
    Ok(Json(outcome).into_response())
}

async fn set_log(State(s): State<AppState>, Query(q): Query<ChangeQuery>, body: Body) -> Result<Response, ApiError> {
    let body = object(body)?;
    only(&body, &["level"])?;
    let Some(level) = body.get("level").cloned() else {
        return Err(ApiError::bad_request("`level` is missing", "send {\"level\": \"debug\"}"));
    };
    change(s.core, q, StatusCode::OK, move |tree| {
        tree["log"]["level"] = level;
        Ok(())
    })
    .await
}
