//! What can be asked about: tasks, receipts, models, and the epoch.
//!
//! Invariants: a client finds its own tasks only; a receipt, which holds digests and signatures alone, may be found by all.
//!
//! It refuses to know how tasks are submitted.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use butterfly_verify::{Answer, Digest, Epoch, Evidence, Receipt, Request};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::board::Completed;
use super::errors::Failure;
use super::gate::Client;
use super::render::{Proof, Task};
use super::routes::Front;
use crate::commit::{Outcome, Record, TaskKind};
use crate::error::TaskError;
use crate::model::Architecture;
use crate::standing::evidence_id;

/// Pieces of evidence in one response at most.
const EVIDENCE_SHOWN_MAX: usize = 1024;

/// A task with all that proves its answer: what `butterfly verify` takes. The epoch in it is this node's word; a reader takes
/// the epoch from whom it trusts.
#[derive(Serialize)]
struct Bundle<'a> {
    #[serde(flatten)]
    task: Task<'a>,
    request: &'a Request,
    answer: &'a Answer,
    receipt: &'a Receipt,
    epoch: &'a Epoch,
}

/// `GET /inference/{id}`, by task id, completion id or receipt id.
pub(super) async fn task(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Failure> {
    let id = path(id)?;
    if let Some(status) = front.gateway.services.board.status(&client.name, &id) {
        let mut task = Task::new(&status.task_id, if status.is_running { "running" } else { "queued" });
        task.tokens = Some(status.tokens).filter(|tokens| *tokens > 0);
        return Ok(Json(task).into_response());
    }
    let record = find(&front, client.name, id.clone()).await?.ok_or_else(|| Failure::task_not_found(&id))?;
    show(&front, &record)
}

/// `DELETE /v1/requests/{id}`: stops a task on every node.
pub(super) async fn cancel(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Failure> {
    let id = path(id)?;
    let board = &front.gateway.services.board;
    if let Some(status) = board.status(&client.name, &id) {
        board.fail(&status.rd, TaskError::Cancelled).await;
    }
    let record = find(&front, client.name, id.clone()).await?.ok_or_else(|| Failure::task_not_found(&id))?;
    show(&front, &record)
}

/// `GET /v1/receipts/{id}`.
pub(super) async fn receipt(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Failure> {
    let id = path(id)?;
    let rd: Digest = id.parse().map_err(|_| Failure::receipt_not_found(&id))?;
    let record = front.gateway.read(move |journal| journal.record(&rd)).await?;
    let Some(Outcome::Certified { receipt, .. }) = record.and_then(|record| record.outcome) else {
        return Err(Failure::receipt_not_found(&id));
    };
    let tag = format!("\"{}\"", hex::encode(Sha256::digest(&receipt)));
    let known = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let is_known = known.flat_map(|tags| tags.split(',')).any(|known| {
        let known = known.trim();
        known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag
    });
    let mut response = if is_known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], receipt).into_response()
    };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::try_from(tag) {
        headers.insert(ETAG, tag);
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=31536000, immutable"));
    Ok(response)
}

#[derive(Serialize)]
struct Kept {
    object: &'static str,
    data: Vec<Evidence>,
    /// The ids of `data`, in its order: what the operator names to set a piece aside.
    ids: Vec<Digest>,
}

/// `GET /v1/evidence`: what this node holds against others, for anyone to check.
pub(super) async fn evidence(State(front): State<Arc<Front>>) -> Result<Response, Failure> {
    let kept = front.gateway.read(|journal| journal.kept_evidence(EVIDENCE_SHOWN_MAX)).await?;
    // What was written by another version is left out.
    let read = kept.iter().filter_map(|bytes| Some((serde_json::from_slice(bytes).ok()?, evidence_id(bytes))));
    let (data, ids) = read.unzip();
    Ok(Json(Kept { object: "list", data, ids }).into_response())
}

/// `GET /v1/epoch`.
pub(super) async fn epoch(State(front): State<Arc<Front>>) -> Response {
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (
            HeaderName::from_static("x-butterfly-notice"),
            HeaderValue::from_static(
                "this is the gateway's word; compare it with the epoch file of the cluster's operator",
            ),
        ),
    ];
    (headers, front.gateway.services.epoch.to_json()).into_response()
}

#[derive(Serialize)]
struct Models<'a> {
    object: &'static str,
    data: [Model<'a>; 1],
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
    context_length: usize,
    capabilities: &'static [&'static str],
    #[serde(skip_serializing_if = "Option::is_none")]
    input_width: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_width: Option<usize>,
    weights_digest: String,
    epoch: String,
}

/// `GET /v1/models`.
pub(super) async fn models(State(front): State<Arc<Front>>) -> Response {
    Json(Models { object: "list", data: [served(&front)] }).into_response()
}

/// `GET /v1/models/{id}`.
pub(super) async fn model(
    State(front): State<Arc<Front>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Failure> {
    let (id, model) = (path(id)?, served(&front));
    if id != model.id {
        return Err(Failure::model_not_found(&id, model.id));
    }
    Ok(Json(model).into_response())
}

fn served(front: &Front) -> Model<'_> {
    let services = &front.gateway.services;
    let manifest = services.model.manifest();
    let width = |width: usize| Some(width).filter(|width| *width > 0);
    Model {
        id: &manifest.name,
        object: "model",
        created: front.started_s,
        owned_by: &services.topology.cluster.name,
        context_length: manifest.context_length,
        capabilities: match (manifest.architecture, services.model.check_chat()) {
            (Architecture::Llama, Ok(())) => &["chat", "completions", "inference"],
            (Architecture::Llama, Err(_)) => &["completions", "inference"],
            (Architecture::Bert, _) => &["embeddings", "inference"],
            (Architecture::Mlp, _) => &["inference"],
        },
        input_width: width(manifest.input_width),
        output_width: width(manifest.output_width),
        weights_digest: hex::encode(manifest.root),
        epoch: services.epoch.digest().to_string(),
    }
}

/// A record that is in the log.
fn show(front: &Front, record: &Record) -> Result<Response, Failure> {
    let task_id = &record.accepted.task_id;
    let (receipt, answer, sampled) = match &record.outcome {
        // Accepted, and not on the board: it is being taken up again after a restart.
        None => return Ok(Json(Task::new(task_id, "queued")).into_response()),
        Some(Outcome::Failed { error }) => {
            let mut task = Task::new(task_id, "failed");
            task.error = serde_json::from_slice(error).ok();
            return Ok(Json(task).into_response());
        }
        Some(Outcome::Certified { receipt, answer, sampled }) => (receipt, answer, sampled),
    };
    let damaged = || Failure::from(TaskError::Internal("a record of the log cannot be read".to_owned()));
    let completed = Completed::recall(&record.accepted, receipt, answer, sampled).ok_or_else(damaged)?;
    let Completed { request, answer, receipt, .. } = completed;
    let epoch = &front.gateway.services.epoch;
    let mut task = Task::answered(task_id, &request.model, &answer, Proof::new(&receipt, epoch));
    if matches!(answer, Answer::Numeric { .. }) {
        task.status = "failed";
        task.error = serde_json::to_value(&Failure::from(TaskError::Numeric).body).ok();
    }
    Ok(Json(Bundle { task, request: &request, answer: &answer, receipt: &receipt, epoch }).into_response())
}

/// The record of a client under any of the names that it may know.
async fn find(front: &Front, client: String, id: String) -> Result<Option<Record>, Failure> {
    front
        .gateway
        .read(move |journal| {
            if let Some(record) = journal.task(&client, &id)? {
                return Ok(Some(record));
            }
            let bare = [TaskKind::Completion, TaskKind::Chat].iter().find_map(|kind| id.strip_prefix(kind.id_prefix()));
            let Ok(rd) = bare.unwrap_or(&id).parse::<Digest>() else { return Ok(None) };
            Ok(journal.record(&rd)?.filter(|record| record.accepted.client == client))
        })
        .await
}

fn path(id: Result<Path<String>, PathRejection>) -> Result<String, Failure> {
    id.map(|Path(id)| id).map_err(|_| Failure::invalid_value("id", "the id in the path is no text"))
}
