//! `POST /inference`: vectors and text in a plain form, with task ids that can be polled.
//!
//! Text is generated greedily unless the request says otherwise.
//!
//! It refuses to know how tasks are found again; that is [`records`](super::records).

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use butterfly_verify::Answer;

use super::ask::{self, Ask, AskInput, COMPLETION_TOKENS, Rules};
use super::errors::Failure;
use super::fields::{Fields, Inputs, Setting};
use super::gate::{Caller, Client};
use super::gateway::{Admitted, Submission};
use super::render::{Proof, Task};
use super::routes::Front;
use crate::commit::TaskKind;
use crate::error::TaskError;

/// The handler.
pub(super) async fn submit(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
) -> Result<Response, Failure> {
    let admitted = admit(&front, client, request).await;
    let (with_tokens, admitted) = admitted.inspect_err(|_| front.count_rejected(TaskKind::Inference))?;
    let Admitted { task_id, reply, .. } = admitted;
    let Some(reply) = reply else { return Ok(accepted(&task_id)) };
    let completed = reply.end().await?;
    if matches!(completed.answer, Answer::Numeric { .. }) {
        return Err(TaskError::Numeric.into());
    }
    let proof = Proof::of(&completed, &front.gateway.services.epoch);
    let mut task = Task::answered(&task_id, &completed.request.model, &completed.answer, proof);
    if !with_tokens {
        task.token_ids = None;
    }
    Ok(Json(task).into_response())
}

async fn admit(front: &Front, client: Caller, request: Request) -> Result<(bool, Admitted), Failure> {
    let (body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    fields.refuse("stream", Setting::Flag(false))?;
    fields.refuse("logprobs", Setting::Flag(false))?;
    let wait = fields.flag("wait", true)?;
    let task_id = fields.text("task_id")?.map(ask::task_id).transpose()?;
    let with_tokens = fields.flag("return_token_ids", front.gateway.services.model.tokenizer().is_none())?;
    let (field, input) = input(&mut fields)?;
    fields.refuse("n", Setting::Integer(1))?;
    fields.refuse("echo", Setting::Flag(false))?;
    let priority = fields.take("priority");
    let priority = ask::priority("priority", priority.as_ref())?;
    let rules = Rules { mode: front.gateway.mode, temperature: 0.0, tokens_default: COMPLETION_TOKENS, tokens_min: 1 };
    let mut ask = Ask::new(&mut fields, field, input, rules)?;
    ask.priority = ask.priority.or(priority);
    drop(body);
    let submission = Submission { client, kind: TaskKind::Inference, task_id, ask, wait };
    Ok((with_tokens, front.gateway.submit(submission).await?))
}

/// The one input of a body.
fn input(fields: &mut Fields) -> Result<(&'static str, AskInput), Failure> {
    let vector = match std::mem::take(&mut fields.input).value("input")? {
        None => None,
        Some(Inputs::Numbers { values, .. }) => Some(AskInput::Vector(values)),
        Some(_) => return Err(Failure::invalid_value("input", "input must be a list of numbers")),
    };
    let text = fields.text("text")?.map(AskInput::Text);
    let prompt = std::mem::take(&mut fields.prompt).value("prompt")?;
    let prompt = prompt.map(|prompt| ask::prompt("prompt", prompt)).transpose()?;
    let mut given = [("input", vector), ("prompt", prompt), ("text", text)]
        .into_iter()
        .filter_map(|(field, input)| input.map(|input| (field, input)));
    let missing = || Failure::invalid_value("input", "send one of \"input\" (numbers), \"prompt\" and \"text\"");
    let first = given.next().ok_or_else(missing)?;
    match given.next() {
        Some((field, _)) => {
            let message = format!("{field} and {} are both there; send one of them", first.0);
            Err(Failure::invalid_value(field, message))
        }
        None => Ok(first),
    }
}

fn accepted(task_id: &str) -> Response {
    let mut response = (StatusCode::ACCEPTED, Json(Task::new(task_id, "queued"))).into_response();
    // Task ids have no character that a path or a header would not take.
    if let Ok(location) = HeaderValue::try_from(format!("/inference/{task_id}")) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}
