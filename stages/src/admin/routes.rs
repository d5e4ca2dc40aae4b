//! The routes of the admin listener, and the gate before them.
//!
//! It refuses to know how the answers come about.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use butterfly_engine::telemetry::{TapRequest, TextFormat};
use serde::Deserialize;
use serde_json::json;

use super::token::Token;
use super::{views, watch};
use crate::ingest::Failure;
use crate::services::Services;

/// Entries of a list at most.
const LIST_MAX: usize = 1000;
/// Entries of a list, unless the caller asks for another number.
const LIST_DEFAULT: usize = 100;

/// What the routes share.
pub(super) struct Console {
    pub(super) services: Services,
    pub(super) readiness: Readiness,
    pub(super) shutdown: Shutdown,
    pub(super) stalled_after: Duration,
    pub(super) token: Token,
}

/// How much of a list or a stream is wanted.
#[derive(Debug, Deserialize)]
struct Limit {
    limit: Option<usize>,
}

impl Limit {
    fn of_list(limit: Result<Query<Self>, QueryRejection>) -> Result<usize, Failure> {
        Ok(Self::read(limit)?.unwrap_or(LIST_DEFAULT).min(LIST_MAX))
    }

    fn read(limit: Result<Query<Self>, QueryRejection>) -> Result<Option<usize>, Failure> {
        let limit = limit.map_err(|_| Failure::invalid_value("limit", "`limit` is a number of entries"))?;
        Ok(limit.0.limit)
    }
}

/// What a tap is to show.
#[derive(Debug, Deserialize)]
struct Tap {
    limit: Option<usize>,
    interval_ms: Option<u64>,
    payload: Option<bool>,
}

/// The router over all routes.
pub(super) fn router(console: Arc<Console>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/api/v1/graph", get(graph))
        .route("/api/v1/nodes", get(nodes))
        .route("/api/v1/stages", get(stages))
        .route("/api/v1/edges", get(edges))
        .route("/api/v1/requests", get(requests))
        .route("/api/v1/requests/{id}/timeline", get(timeline))
        .route("/api/v1/receipts", get(receipts))
        .route("/api/v1/events", get(events))
        .route("/api/v1/tap/{stage}", get(tap))
        .fallback(no_route)
        .layer(from_fn_with_state(Arc::clone(&console), gate))
        .with_state(console)
}

/// Nothing but whether the node lives and is ready is told without the secret.
async fn gate(State(console): State<Arc<Console>>, request: Request, next: Next) -> Response {
    let method = request.method().to_string();
    let is_open = matches!(request.uri().path(), "/livez" | "/readyz");
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let secret = header.and_then(|header| header.split_once(' '));
    let secret = secret.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, secret)| secret.trim());
    if !is_open && !secret.is_some_and(|secret| console.token.is(secret)) {
        let message = "send `Authorization: Bearer <secret>`; the secret is in the node's `admin_token_file`";
        return Failure::invalid_api_key(message).into_response();
    }
    let mut response = next.run(request).await;
    if response.status() == StatusCode::METHOD_NOT_ALLOWED {
        response = Failure::no_method(&method).into_response();
    }
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn no_route(method: Method, request: Request) -> Failure {
    Failure::no_route(&format!("{method} {}", request.uri().path()))
}

async fn metrics(State(console): State<Arc<Console>>, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let format = TextFormat::accepted(accept);
    let form = HeaderValue::from_static(format.content_type());
    ([(CONTENT_TYPE, form)], console.services.telemetry.render(format)).into_response()
}

/// A process that answers lives, unless its log has failed: then only a restart helps.
async fn live(State(console): State<Arc<Console>>) -> Response {
    let is_live = console.services.journal.failure().is_none();
    let status = if is_live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let unix_ms = console.services.clock.unix_ms();
    (status, Json(json!({ "live": is_live, "node": console.services.node, "unix_ms": unix_ms }))).into_response()
}

async fn ready(State(console): State<Arc<Console>>) -> Response {
    let reasons = console.services.unready(&console.readiness, &console.shutdown, console.stalled_after);
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let unix_ms = console.services.clock.unix_ms();
    let body = json!({
        "ready": reasons.is_empty(),
        "reasons": reasons,
        "node": console.services.node,
        "unix_ms": unix_ms,
    });
    (status, Json(body)).into_response()
}

async fn graph(State(console): State<Arc<Console>>) -> Response {
    Json(views::graph(&console)).into_response()
}

async fn nodes(State(console): State<Arc<Console>>) -> Response {
    Json(views::nodes(&console)).into_response()
}

async fn stages(State(console): State<Arc<Console>>) -> Response {
    Json(views::stages(&console)).into_response()
}

async fn edges(State(console): State<Arc<Console>>) -> Response {
    Json(views::edges(&console)).into_response()
}

async fn requests(
    State(console): State<Arc<Console>>,
    limit: Result<Query<Limit>, QueryRejection>,
) -> Result<Response, Failure> {
    Ok(Json(views::requests(&console, Limit::of_list(limit)?)).into_response())
}

async fn timeline(
    State(console): State<Arc<Console>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Failure> {
    let Path(id) = id.map_err(|_| Failure::invalid_value("id", "the id in the path is no text"))?;
    let found = views::timeline(&console, &id).ok_or_else(|| Failure::task_not_found(&id))?;
    Ok(Json(found).into_response())
}

async fn receipts(
    State(console): State<Arc<Console>>,
    limit: Result<Query<Limit>, QueryRejection>,
) -> Result<Response, Failure> {
    Ok(Json(views::receipts(&console, Limit::of_list(limit)?).await?).into_response())
}

async fn events(
    State(console): State<Arc<Console>>,
    limit: Result<Query<Limit>, QueryRejection>,
) -> Result<Response, Failure> {
    watch::events(&console, Limit::read(limit)?)
}

async fn tap(
    State(console): State<Arc<Console>>,
    stage: Result<Path<String>, PathRejection>,
    asked: Result<Query<Tap>, QueryRejection>,
) -> Result<Response, Failure> {
    let Path(stage) = stage.map_err(|_| Failure::invalid_value("stage", "the stage in the path is no text"))?;
    let message = "`limit` and `interval_ms` are numbers, `payload` is true or false";
    let Query(asked) = asked.map_err(|_| Failure::invalid_value("limit", message))?;
    let request = TapRequest {
        limit: asked.limit.unwrap_or(LIST_DEFAULT),
        interval: Duration::from_millis(asked.interval_ms.unwrap_or(0)),
        payload: asked.payload.unwrap_or(false),
    };
    watch::tap(&console, &stage, request)
}
