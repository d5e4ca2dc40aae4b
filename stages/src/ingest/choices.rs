//! Answers in the forms that clients of chats and completions know: what concerns the response alone, and whole responses.
//!
//! Invariants: where one of several answers fails, all do, and the rest is cancelled.
//!
//! It refuses to know streams from the inside.

use axum::http::Version;
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use butterfly_verify::limits::LOGPROBS_MAX;
use butterfly_verify::{Answer, Input, Request};
use futures::future::try_join_all;

use super::ask;
use super::body::ReadBody;
use super::errors::Failure;
use super::fields::{self, Fields};
use super::gateway::{Admitted, Awaited, Gateway};
use super::logprobs::LogProbForms;
use super::render::{Choice, Form, Head, Proof, Usage, finish_reason};
use super::routes::Front;
use super::stream;
use crate::error::TaskError;
use crate::model::Tokenizer;

/// What concerns the response alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wishes {
    /// How it looks.
    pub form: Form,
    /// Whether it comes in pieces.
    pub stream: bool,
    /// A chunk with the usage.
    pub include_usage: bool,
    /// Token ids beside the text.
    pub return_token_ids: bool,
    /// The prompt before the answer.
    pub echo: bool,
}

impl Wishes {
    /// Reads them from the fields of a request that came with this version of HTTP.
    ///
    /// # Errors
    /// Names the field that cannot be kept.
    pub(super) fn new(form: Form, fields: &mut Fields, version: Version) -> Result<Self, Failure> {
        let stream = fields.flag("stream", false)?;
        if stream && version < Version::HTTP_11 {
            // Without chunks the end of a body cannot be told from its breaking off.
            return Err(Failure::unsupported_parameter("stream", "a stream needs HTTP/1.1"));
        }
        let options = std::mem::take(&mut fields.stream_options).value("stream_options")?;
        let mut options = options.map_or_else(Default::default, |options| options.0);
        let usage = options.remove("include_usage");
        let include_usage = fields::flag("stream_options.include_usage", usage.as_ref(), false)?;
        if include_usage && !stream {
            let message = "stream_options is for streams: set \"stream\": true";
            return Err(Failure::invalid_value("stream_options", message));
        }
        let return_token_ids = fields.flag("return_token_ids", false)?;
        let echo = fields.flag("echo", false)?;
        if echo && form == Form::Chat {
            return Err(fields::unsupported("echo"));
        }
        Ok(Self { form, stream, include_usage, return_token_ids, echo })
    }
}

/// Reads a request for text as far as all forms of it are alike: its fields, and what concerns the response alone. The body is
/// held until everything has been taken from it.
///
/// # Errors
/// When the node takes no requests, the model generates no text, or a field cannot be kept.
pub(super) async fn begin(
    front: &Front,
    form: Form,
    request: extract::Request,
) -> Result<(ReadBody, Fields, Wishes), Failure> {
    let version = request.version();
    let (body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    ask::must_generate(front.gateway.services.model.manifest())?;
    let wishes = Wishes::new(form, &mut fields, version)?;
    Ok((body, fields, wishes))
}

/// How many of the likeliest tokens are wanted with their log-probabilities, as a field says.
///
/// # Errors
/// When it is no number, or too large.
pub(super) fn logprobs(fields: &Fields, name: &'static str) -> Result<Option<u8>, Failure> {
    let top = fields.integer(name, 0..=LOGPROBS_MAX.into())?;
    Ok(top.and_then(|top| u8::try_from(top).ok()))
}

/// One task and what comes of it.
pub(super) struct Asked {
    /// What is asked.
    pub request: Request,
    /// What comes back.
    pub reply: Awaited,
    /// The text of its prompt, if that is wanted before the answer.
    pub echo: Option<String>,
}

/// The response to tasks that were admitted together: a stream at once, anything else when all have ended.
///
/// # Errors
/// When one of them fails before the response has begun.
pub(super) async fn respond(gateway: &Gateway, wishes: Wishes, admitted: Vec<Admitted>) -> Result<Response, Failure> {
    let tokenizer = gateway.services.model.tokenizer();
    let lost = || Failure::from(TaskError::Internal("a task was admitted that nobody waits for".to_owned()));
    let first = admitted.first().ok_or_else(lost)?;
    let head = Head {
        form: wishes.form,
        id: first.task_id.clone(),
        model: first.request.model.clone(),
        created: first.request.now_ms / 1000,
    };
    let asked = admitted.into_iter().map(|Admitted { request, reply, .. }| {
        let echo = wishes.echo.then(|| prompt_text(&request, tokenizer));
        Ok(Asked { request, reply: reply.ok_or_else(lost)?, echo })
    });
    let asked = asked.collect::<Result<Vec<_>, Failure>>()?;
    if wishes.stream {
        Ok(stream::respond(gateway, wishes, head, asked))
    } else {
        whole(gateway, wishes, &head, asked).await
    }
}

async fn whole(gateway: &Gateway, wishes: Wishes, head: &Head, asked: Vec<Asked>) -> Result<Response, Failure> {
    let tokenizer = gateway.services.model.tokenizer();
    let (echoes, replies): (Vec<_>, Vec<_>) =
        asked.into_iter().map(|asked| (asked.echo.unwrap_or_default(), asked.reply.whole())).unzip();
    let answered = try_join_all(replies).await?;
    let mut usage = Usage::default();
    let mut texts = Vec::with_capacity(answered.len());
    for ((_, completed), echo) in answered.iter().zip(echoes) {
        let Answer::Text { text, .. } = &completed.answer else { return Err(TaskError::Numeric.into()) };
        usage.add(&completed.answer);
        let proof = Proof::of(completed, &gateway.services.epoch);
        texts.push((echo + &String::from_utf8_lossy(text), proof));
    }
    let is_one = texts.len() == 1;
    let choices =
        answered.iter().zip(&texts).enumerate().filter_map(|(index, ((sampled, completed), (text, proof)))| {
            let Answer::Text { tokens, finish, .. } = &completed.answer else { return None };
            Some(Choice {
                logprobs: LogProbForms::new(wishes.form, tokenizer, &completed.request).next(sampled),
                finish_reason: Some(finish_reason(*finish)),
                prompt_token_ids: completed.request.input.tokens().filter(|_| wishes.return_token_ids),
                token_ids: wishes.return_token_ids.then_some(tokens.as_slice()),
                butterfly: Some(proof).filter(|_| !is_one),
                ..Choice::new(index, wishes.form.whole(text))
            })
        });
    let mut completion = head.whole(choices.collect());
    completion.usage = Some(Some(usage));
    completion.butterfly = texts.first().map(|(_, proof)| proof).filter(|_| is_one);
    Ok(Json(completion).into_response())
}

/// The prompt as text.
fn prompt_text(request: &Request, tokenizer: Option<&Tokenizer>) -> String {
    match (&request.input, tokenizer) {
        (Input::Text { prompt, .. }, _) => prompt.clone(),
        (Input::Tokens { tokens } | Input::Chat { tokens, .. }, Some(tokenizer)) => tokenizer.decode(tokens),
        (Input::Tokens { .. } | Input::Chat { .. }, None) | (Input::Vector { .. }, _) => String::new(),
    }
}
