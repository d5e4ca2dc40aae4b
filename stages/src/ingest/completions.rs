//! `POST /v1/completions`: the form that the clients of such services speak.
//!
//! It refuses to know streams from the inside.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use butterfly_verify::Answer;
use butterfly_verify::limits::LOGPROBS_MAX;

use super::ask::{self, Ask, Rules};
use super::board::Completed;
use super::errors::Failure;
use super::fields::{self, Fields};
use super::gate::{Caller, Client};
use super::gateway::{Admitted, Submission};
use super::logprobs::LogProbForms;
use super::render::{Choice, Completion, Proof, Usage, finish_reason};
use super::routes::Front;
use super::stream::{self, StreamOptions};
use crate::commit::TaskKind;
use crate::error::TaskError;
use crate::model::Sampled;

/// What clients of this form mean when they give no temperature.
const TEMPERATURE_DEFAULT: f32 = 1.0;

/// What concerns the response alone.
struct Wishes {
    stream: bool,
    options: StreamOptions,
}

/// The handler.
pub(super) async fn submit(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
) -> Result<Response, Failure> {
    let admitted = admit(&front, client, request).await;
    let (wishes, admitted) = admitted.inspect_err(|_| front.count_rejected(TaskKind::Completion))?;
    let Admitted { request, reply: Some(reply), .. } = admitted else {
        return Err(TaskError::Internal("a completion was admitted that nobody waits for".to_owned()).into());
    };
    if wishes.stream {
        return Ok(stream::respond(&front.gateway, request, reply, wishes.options));
    }
    let (sampled, end) = reply.all().await;
    whole(&front, &*end?, &sampled, wishes.options.return_token_ids)
}

async fn admit(front: &Front, client: Caller, request: Request) -> Result<(Wishes, Admitted), Failure> {
    let version = request.version();
    let (body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    ask::must_generate(front.gateway.services.model.manifest())?;
    let wishes = wishes(&mut fields)?;
    if wishes.stream && version < axum::http::Version::HTTP_11 {
        // Without chunks the end of a body cannot be told from its breaking off.
        return Err(Failure::unsupported_parameter("stream", "a stream needs HTTP/1.1"));
    }
    let prompt = std::mem::take(&mut fields.prompt).value("prompt")?;
    let prompt = prompt.ok_or_else(|| Failure::invalid_value("prompt", "prompt is missing: a string or token ids"))?;
    let rules = Rules { mode: front.gateway.mode, temperature: TEMPERATURE_DEFAULT };
    let logprobs = logprobs(&mut fields)?;
    let mut ask = Ask::new(&mut fields, "prompt", ask::prompt("prompt", prompt)?, rules)?;
    ask.params.logprobs = logprobs;
    drop(body);
    let submission = Submission { client, kind: TaskKind::Completion, task_id: None, ask, wait: true };
    Ok((wishes, front.gateway.submit(submission).await?))
}

fn wishes(fields: &mut Fields) -> Result<Wishes, Failure> {
    let stream = fields.flag("stream", false)?;
    let options = std::mem::take(&mut fields.stream_options).value("stream_options")?;
    let mut options = options.map_or_else(Default::default, |options| options.0);
    let usage = options.remove("include_usage");
    let include_usage = fields::flag("stream_options.include_usage", usage.as_ref(), false)?;
    if include_usage && !stream {
        let message = "stream_options is for streams: set \"stream\": true";
        return Err(Failure::invalid_value("stream_options", message));
    }
    let return_token_ids = fields.flag("return_token_ids", false)?;
    Ok(Wishes { stream, options: StreamOptions { include_usage, return_token_ids } })
}

/// How many of the likeliest tokens are wanted with their log-probabilities.
fn logprobs(fields: &mut Fields) -> Result<Option<u8>, Failure> {
    if fields.flag("logprobs", false) == Ok(false) {
        return Ok(None);
    }
    let top = fields.integer("logprobs", 0..=LOGPROBS_MAX.into())?;
    Ok(top.and_then(|top| u8::try_from(top).ok()))
}

fn whole(
    front: &Front,
    completed: &Completed,
    sampled: &[Sampled],
    return_token_ids: bool,
) -> Result<Response, Failure> {
    let Answer::Text { tokens, text, finish, .. } = &completed.answer else {
        return Err(TaskError::Numeric.into());
    };
    let proof = Proof::of(completed, &front.gateway.services.epoch);
    let text = String::from_utf8_lossy(text);
    let choice = Choice {
        logprobs: LogProbForms::new(front.gateway.services.model.tokenizer(), 0).listed(sampled),
        finish_reason: Some(finish_reason(*finish)),
        prompt_token_ids: completed.request.input.tokens().filter(|_| return_token_ids),
        token_ids: return_token_ids.then_some(tokens),
        ..Choice::piece(&text)
    };
    let mut completion = Completion::new(&completed.task_id, &completed.request, choice);
    completion.usage = Some(Usage::of(&completed.answer));
    completion.butterfly = Some(&proof);
    Ok(Json(completion).into_response())
}
