//! The paths of migrations. None of them waits for the daemon's lock.
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::routes::{AppState, Body, Reply, object, only};
use crate::migration::{CheckError, MAX_EXPECT_S, Migration};

/// Migrations of the history unless the request says otherwise.
const DEFAULT_LIMIT: usize = 100;
/// How long a VM is expected unless the request says otherwise, seconds.
const DEFAULT_EXPECT_S: u64 = 600;

/// Adds the paths.
pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/migration", get(|State(s): State<AppState>| async move { Json(json!(s.migration.host())) }))
        .route("/migrations", get(|State(s): State<AppState>| async move { Json(json!(s.migration.status())) }))
        .route("/migrations/history", get(history))
        .route("/migrations/{vm}", get(latest))
        .route("/migrations/{vm}/expect", post(expect).delete(unexpect))
        .route("/migrations/{vm}/check", post(check))
        .route("/migrations/{vm}/cancel", post(cancel))
}

#[derive(Debug, Default, Deserialize)]
struct HistoryQuery {
    vm: Option<String>,
    limit: Option<usize>,
}

fn no_vm(vm: &str) -> ApiError {
    let message = format!("there is no VM {vm}, or migration is not switched on");
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message, "`ferry conntrack stats` lists VMs; see [migration]")
}

async fn history(State(s): State<AppState>, Query(q): Query<HistoryQuery>) -> Json<Value> {
    let history = s.migration.history(q.vm.as_deref(), q.limit.unwrap_or(DEFAULT_LIMIT));
    Json(json!({ "history": history }))
}

fn view(migration: &Migration, vm: &str) -> Reply {
    let view = migration.latest(vm).ok_or_else(|| {
        let message = format!("no migration of {vm} since ferryd started");
        ApiError::new(StatusCode::NOT_FOUND, "not_found", message, "`ferry migrate list` shows those that were")
    })?;
    Ok(Json(json!(view)))
}

async fn latest(State(s): State<AppState>, Path(vm): Path<String>) -> Reply {
    view(&s.migration, &vm)
}

async fn expect(State(s): State<AppState>, Path(vm): Path<String>, body: Body) -> Reply {
    let body = object(body)?;
    only(&body, &["from", "for_s"])?;
    let from = match body.get("from") {
        None | Some(Value::Null) => None,
        Some(Value::String(host)) => Some(host.clone()),
        Some(_) => return Err(ApiError::bad_request("`from` must be a host's name", "leave it out: any host")),
    };
    let for_s = match body.get("for_s") {
        None | Some(Value::Null) => DEFAULT_EXPECT_S,
        Some(n) => n.as_u64().filter(|n| (1..=MAX_EXPECT_S).contains(n)).ok_or_else(|| {
            ApiError::bad_request(format!("`for_s` must be 1 to {MAX_EXPECT_S} seconds"), "leave it out: 10 minutes")
        })?,
    };
    let expected = s.migration.expect(&vm, from, for_s).ok_or_else(|| no_vm(&vm))?;
    tracing::info!(vm, from = expected.from, for_s, "VM expected");
    Ok(Json(json!(expected)))
}

async fn unexpect(State(s): State<AppState>, Path(vm): Path<String>) -> Reply {
    match s.migration.unexpect(&vm) {
        true => Ok(Json(json!({ "vm": vm, "expected": false }))),
        false => {
            let message = format!("{vm} was not expected");
            Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message, "`ferry migrate status` lists who is"))
        }
    }
}

async fn check(State(s): State<AppState>, Path(vm): Path<String>, body: Body) -> Reply {
    let body = object(body)?;
    only(&body, &["to"])?;
    let to = body.get("to").and_then(Value::as_str);
    let to = to.ok_or_else(|| ApiError::bad_request("`to` must name a host", "send {\"to\": \"host-b\"}"))?;
    match s.migration.check(&vm, to).await {
        Ok(checked) => Ok(Json(json!(checked))),
        Err(CheckError::NoVm(vm)) => Err(no_vm(&vm)),
        Err(off @ CheckError::Off) => {
            let hint = "set migration.enabled = true";
            Err(ApiError::new(StatusCode::CONFLICT, "conflict", off.to_string(), hint))
        }
    }
}

async fn cancel(State(s): State<AppState>, Path(vm): Path<String>) -> Reply {
    if !s.migration.cancel(&vm) {
        return Err(no_vm(&vm));
    }
    tracing::info!(vm, "migration of connections given up by an operator");
    view(&s.migration, &vm)
}
