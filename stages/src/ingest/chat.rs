//! `POST /v1/chat/completions`: the form that nearly every client of such services speaks.
//!
//! The messages travel with the request as they are; each replica renders them with the model's own template before it
//! votes.
//!
//! It refuses to know templates, and how answers are written.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use super::ask::{Ask, AskInput, Rules};
use super::choices::{self, Wishes};
use super::completions::TEMPERATURE_DEFAULT;
use super::errors::Failure;
use super::fields::{self, Content, Fields, Said, SaidOnce};
use super::gate::{Caller, Client};
use super::gateway::{Admitted, Submission};
use super::render::Form;
use super::routes::Front;
use crate::commit::TaskKind;
use crate::model::{Message, Messages, Role};

/// The handler.
pub(super) async fn submit(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
) -> Result<Response, Failure> {
    let admitted = admit(&front, client, request).await;
    let (wishes, admitted) = admitted.inspect_err(|_| front.count_rejected(TaskKind::Chat))?;
    choices::respond(&front.gateway, wishes, admitted).await
}

async fn admit(front: &Front, client: Caller, request: Request) -> Result<(Wishes, Vec<Admitted>), Failure> {
    let (body, mut fields, wishes) = choices::begin(front, Form::Chat, request).await?;
    let said = std::mem::take(&mut fields.messages).value("messages")?;
    let said = said.ok_or_else(|| Failure::invalid_value("messages", "messages is missing: a list of messages"))?;
    let logprobs = logprobs(&fields)?;
    let count = fields.choices()?;
    // Where nothing is said a message may be as long as the model can make it.
    let rules =
        Rules { mode: front.gateway.mode, temperature: TEMPERATURE_DEFAULT, tokens_default: u32::MAX, tokens_min: 1 };
    let mut ask = Ask::new(&mut fields, "messages", AskInput::Chat(messages(said)?), rules)?;
    ask.params.logprobs = logprobs;
    drop(body);
    let submission = Submission { client, kind: TaskKind::Chat, task_id: None, ask, wait: true };
    Ok((wishes, front.gateway.submit_choices(submission, Vec::new(), count).await?))
}

/// How many of the likeliest tokens are wanted with their log-probabilities, if any are.
fn logprobs(fields: &Fields) -> Result<Option<u8>, Failure> {
    let top = choices::logprobs(fields, "top_logprobs")?;
    match (fields.flag("logprobs", false)?, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            let message = "top_logprobs is for log-probabilities: set \"logprobs\": true";
            Err(Failure::invalid_value("top_logprobs", message))
        }
    }
}

/// The messages of a body.
///
/// # Errors
/// Names the message, and what of it cannot be kept.
pub(super) fn messages(Said(said): Said) -> Result<Messages, Failure> {
    let messages = said.into_iter().enumerate().map(|(number, said)| message(number, said));
    Messages::new(messages.collect::<Result<_, _>>()?)
        .map_err(|error| Failure::invalid_value("messages", error.to_string()))
}

fn message(number: usize, said: SaidOnce) -> Result<Message, Failure> {
    let field = |name: &str| format!("messages[{number}].{name}");
    if let Some(name) = said.unsupported {
        return Err(fields::unsupported(&field(name)));
    }
    let role = fields::text(&field("role"), said.role)?;
    let role = match role.as_deref() {
        Some("system") => Role::System,
        Some("developer") => Role::Developer,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        _ => {
            let message = format!("{} must be system, developer, user, assistant or tool", field("role"));
            return Err(Failure::invalid_value(field("role"), message));
        }
    };
    let content = match said.content.value(&field("content"))? {
        Some(Content::Text(text)) => text,
        Some(Content::Other(kind)) => {
            let message = format!("{}: parts of type '{kind}' are not supported; send text", field("content"));
            return Err(Failure::unsupported_parameter(field("content"), message));
        }
        // Only a model may have said nothing.
        None if role == Role::Assistant => String::new(),
        None => return Err(Failure::invalid_value(field("content"), format!("{} is missing", field("content")))),
    };
    let name = fields::text(&field("name"), said.name)?;
    let tool_call_id = fields::text(&field("tool_call_id"), said.tool_call_id)?;
    Ok(Message { role, content, name, tool_call_id })
}
