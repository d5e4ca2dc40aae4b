//! `POST /v1/completions`: the older form that the clients of such services speak.
//!
//! Several prompts and several choices of each are as many tasks, each with an answer and a receipt of its own.
//!
//! It refuses to know how answers are written.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use super::ask::{Ask, AskInput, COMPLETION_TOKENS, Rules};
use super::choices::{self, Wishes};
use super::errors::Failure;
use super::fields::Fields;
use super::gate::{Caller, Client};
use super::gateway::{Admitted, Submission};
use super::render::Form;
use super::routes::Front;
use crate::commit::TaskKind;

/// What clients of this form mean when they give no temperature.
pub(super) const TEMPERATURE_DEFAULT: f32 = 1.0;

/// The handler.
pub(super) async fn submit(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
) -> Result<Response, Failure> {
    let admitted = admit(&front, client, request).await;
    let (wishes, admitted) = admitted.inspect_err(|_| front.count_rejected(TaskKind::Completion))?;
    choices::respond(&front.gateway, wishes, admitted).await
}

async fn admit(front: &Front, client: Caller, request: Request) -> Result<(Wishes, Vec<Admitted>), Failure> {
    let (body, mut fields, wishes) = choices::begin(front, Form::Completion, request).await?;
    let prompts = std::mem::take(&mut fields.prompt).value("prompt")?;
    let prompts =
        prompts.ok_or_else(|| Failure::invalid_value("prompt", "prompt is missing: a string or token ids"))?;
    let logprobs = logprobs(&fields)?;
    // What is shown with log-probabilities has them.
    let prompt_logprobs = wishes.echo && logprobs.is_some();
    let count = fields.choices()?;
    let rules = Rules {
        mode: front.gateway.mode,
        temperature: TEMPERATURE_DEFAULT,
        tokens_default: COMPLETION_TOKENS,
        tokens_min: if prompt_logprobs { 0 } else { 1 },
    };
    let mut base = Ask::new(&mut fields, "prompt", AskInput::Tokens(Vec::new()), rules)?;
    (base.params.logprobs, base.params.prompt_logprobs) = (logprobs, prompt_logprobs);
    let mut asks = prompts.0.into_iter().map(|prompt| base.about(prompt.into()));
    let ask = asks.next().ok_or_else(|| Failure::invalid_value("prompt", "prompt is empty"))?;
    let others: Vec<Ask> = asks.collect();
    drop(body);
    let submission = Submission { client, kind: TaskKind::Completion, task_id: None, ask, wait: true };
    Ok((wishes, front.gateway.submit_choices(submission, others, count).await?))
}

/// How many of the likeliest tokens are wanted with their log-probabilities. `false` is what other interfaces say for none.
fn logprobs(fields: &Fields) -> Result<Option<u8>, Failure> {
    if fields.flag("logprobs", false) == Ok(false) {
        return Ok(None);
    }
    choices::logprobs(fields, "logprobs")
}
