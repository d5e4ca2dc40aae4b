//! The body of a streamed answer: server-sent events from admission to `[DONE]`, or to a failure.
//!
//! Each piece of text is one chunk. The last chunk of a choice has the reason of its end and what backs it; when all have
//! ended the usage follows if it was asked for, then `[DONE]`. A failure of any is an `error` frame after which the body breaks off: a client takes a body
//! that ends properly for success.
//!
//! Invariants: text is released in whole characters and never with a part of a stop string that may still become whole;
//! what was streamed is the beginning of the certified text, or the stream fails; dropping the body cancels every task.
//!
//! It refuses to know how tokens are agreed on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use butterfly_engine::clock::Clock;
use butterfly_verify::{Answer, Epoch, Request};
use bytes::Bytes;
use futures::future::{Either, select};
use futures::stream::{self, BoxStream, SelectAll};
use futures::{FutureExt, StreamExt};

use super::board::{Completed, TaskResult};
use super::choices::{Asked, Wishes};
use super::errors::Failure;
use super::gateway::{Awaited, Gateway};
use super::logprobs::{LogProbForms, LogProbJson};
use super::render::{Choice, Completion, Form, Head, Proof, Usage, finish_reason};
use super::reply::Reply;
use crate::error::TaskError;
use crate::model::{Generation, Model, Sampled};

/// How often a comment shows that the connection lives.
const COMMENT_EVERY: Duration = Duration::from_secs(10);
/// How long an error frame is given to leave before the body breaks off.
const LAST_FRAME: Duration = Duration::from_millis(200);

/// The response that streams tasks.
pub(super) fn respond(gateway: &Gateway, wishes: Wishes, head: Head, asked: Vec<Asked>) -> Response {
    let services = &gateway.services;
    let (epoch, clock) = (Arc::clone(&services.epoch), Arc::clone(&services.clock));
    let stream = Stream::new(&services.model, epoch, clock, wishes, head, asked);
    let frames = stream::unfold(stream, |mut stream| async move {
        let frame = stream.next().await?;
        Some((frame, stream))
    });
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (StatusCode::OK, headers, Body::from_stream(frames)).into_response()
}

struct Stream {
    clock: Arc<dyn Clock>,
    writer: Writer,
    choices: Vec<Answering>,
    /// What comes back for each choice, by its place.
    replies: SelectAll<BoxStream<'static, (usize, Reply)>>,
    /// Choices that have not ended.
    open: usize,
    usage: Usage,
    phase: Phase,
}

/// What all chunks have in common.
struct Writer {
    head: Head,
    epoch: Arc<Epoch>,
    wishes: Wishes,
}

/// One choice while it comes.
struct Answering {
    index: usize,
    request: Request,
    generation: Generation,
    /// The text sent so far, without the prompt.
    released: String,
    /// The number of tokens it came from.
    tokens: usize,
    logprobs: LogProbForms,
    /// Tokens whose log-probabilities were not sent yet.
    unlisted: Vec<Sampled>,
    /// Tokens of the prompt that are still to come with their log-probabilities.
    prompt_left: usize,
    /// The text of the prompt, until it is sent: where its tokens come, together with them.
    echo: String,
    is_first: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Begun,
    Open,
    Failed,
    Ended,
}

impl Stream {
    fn new(
        model: &Model,
        epoch: Arc<Epoch>,
        clock: Arc<dyn Clock>,
        wishes: Wishes,
        head: Head,
        asked: Vec<Asked>,
    ) -> Self {
        let mut replies = SelectAll::new();
        let mut choices = Vec::with_capacity(asked.len());
        for (index, Asked { request, reply, echo }) in asked.into_iter().enumerate() {
            replies.push(all_of(index, reply).boxed());
            choices.push(Answering {
                index,
                generation: Generation::new(&request, model.manifest(), model.tokenizer()),
                logprobs: LogProbForms::new(head.form, model.tokenizer(), &request),
                prompt_left: request.scored_tokens(),
                request,
                released: String::new(),
                tokens: 0,
                unlisted: Vec::new(),
                echo: echo.unwrap_or_default(),
                is_first: true,
            });
        }
        let open = choices.len();
        let writer = Writer { head, epoch, wishes };
        Self { clock, writer, choices, replies, open, usage: Usage::default(), phase: Phase::Begun }
    }

    /// The next frames, an error that breaks the body off, or the proper end.
    async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        match self.phase {
            Phase::Open => {}
            Phase::Begun => {
                self.phase = Phase::Open;
                let beginnings = self.choices.iter_mut().flat_map(|choice| choice.beginning(&self.writer));
                let beginnings: Vec<u8> = beginnings.collect();
                if !beginnings.is_empty() {
                    return Some(Ok(Bytes::from(beginnings)));
                }
            }
            Phase::Ended => return None,
            Phase::Failed => {
                // The frame before this error is written out while this waits.
                self.clock.sleep(LAST_FRAME).await;
                self.phase = Phase::Ended;
                return Some(Err(io::Error::other("the task failed")));
            }
        }
        loop {
            let comment = self.clock.sleep(COMMENT_EVERY);
            let next =
                self.replies.next().map(|reply| reply.unwrap_or((usize::MAX, Reply::End(Err(TaskError::Draining)))));
            let (index, reply) = match select(std::pin::pin!(next), comment).await {
                Either::Left((reply, _)) => reply,
                Either::Right(((), _)) => return Some(Ok(Bytes::from_static(b": waiting\n\n"))),
            };
            let frames = match (self.choices.get_mut(index), reply) {
                (Some(choice), Reply::Tokens(tokens)) => choice.piece(&self.writer, tokens),
                (None, Reply::Tokens(_)) => Vec::new(),
                (_, Reply::End(result)) => self.end(index, &result),
            };
            if !frames.is_empty() {
                return Some(Ok(Bytes::from(frames)));
            }
        }
    }

    fn end(&mut self, index: usize, result: &TaskResult) -> Vec<u8> {
        let frames = result.as_ref().map_err(Failure::from).and_then(|completed| self.last(index, completed));
        frames.unwrap_or_else(|failure| {
            self.phase = Phase::Failed;
            // What is left of the answer is of no use to anyone.
            self.replies.clear();
            data(&failure.envelope())
        })
    }

    /// The chunk that ends a choice, and what follows the last of them.
    fn last(&mut self, index: usize, completed: &Completed) -> Result<Vec<u8>, Failure> {
        let lost = || Failure::from(TaskError::Internal("an answer came to no choice".to_owned()));
        let mut frames = self.choices.get_mut(index).ok_or_else(lost)?.last(&self.writer, completed)?;
        self.usage.add(&completed.answer);
        self.open = self.open.saturating_sub(1);
        if self.open == 0 {
            self.phase = Phase::Ended;
            if self.writer.wishes.include_usage {
                let mut chunk = self.writer.head.chunk(Vec::new());
                chunk.usage = Some(Some(self.usage));
                frames.extend(self.writer.frame(chunk));
            }
            frames.extend_from_slice(b"data: [DONE]\n\n");
        }
        Ok(frames)
    }
}

/// Everything that comes back for a choice, the end included.
fn all_of(index: usize, reply: Awaited) -> impl futures::Stream<Item = (usize, Reply)> + Send {
    stream::unfold(Some(reply), move |reply| async move {
        let mut reply = reply?;
        let next = reply.next().await;
        let is_end = matches!(next, Reply::End(_));
        Some(((index, next), Some(reply).filter(|_| !is_end)))
    })
}

impl Answering {
    /// What comes before the answer: who speaks, or the prompt if that is wanted.
    fn beginning(&mut self, writer: &Writer) -> Vec<u8> {
        if self.prompt_left > 0 || (writer.head.form == Form::Completion && self.echo.is_empty()) {
            return Vec::new();
        }
        let echo = std::mem::take(&mut self.echo);
        let words = writer.head.form.beginning(&echo);
        let prompt_token_ids = self.prompt_token_ids(writer.wishes);
        let frame = writer.choice(Choice { prompt_token_ids, ..Choice::new(self.index, words) }, None);
        self.is_first = false;
        frame
    }

    /// The chunk for further tokens; empty while all of their text is held back.
    fn piece(&mut self, writer: &Writer, sampled: Vec<Sampled>) -> Vec<u8> {
        let of_prompt = self.prompt_left.min(sampled.len());
        self.prompt_left -= of_prompt;
        let tokens: Vec<u32> = sampled.iter().skip(of_prompt).map(|sampled| sampled.token).collect();
        for token in &tokens {
            self.generation.push(*token);
        }
        self.tokens += tokens.len();
        self.unlisted.extend(sampled);
        if self.prompt_left > 0 {
            return Vec::new();
        }
        let fresh = self.generation.take_text();
        self.released.push_str(&fresh);
        let text = std::mem::take(&mut self.echo) + &fresh;
        let with_ids = writer.wishes.return_token_ids && !tokens.is_empty();
        if text.is_empty() && !with_ids {
            return Vec::new();
        }
        let logprobs = self.listed();
        let choice = Choice {
            logprobs,
            token_ids: with_ids.then_some(tokens.as_slice()),
            prompt_token_ids: self.prompt_token_ids(writer.wishes),
            ..Choice::new(self.index, writer.head.form.piece(&text))
        };
        let frame = writer.choice(choice, None);
        self.is_first = false;
        frame
    }

    /// The chunk that ends the answer.
    fn last(&mut self, writer: &Writer, completed: &Completed) -> Result<Vec<u8>, Failure> {
        let Answer::Text { tokens, text, finish, .. } = &completed.answer else {
            return Err(TaskError::Numeric.into());
        };
        let text = String::from_utf8_lossy(text);
        let (Some(text), Some(tokens)) = (text.strip_prefix(&self.released), tokens.get(self.tokens..)) else {
            let message = "what was streamed is not what was certified; discard it";
            return Err(TaskError::Internal(message.to_owned()).into());
        };
        let text = std::mem::take(&mut self.echo) + text;
        let proof = Proof::of(completed, &writer.epoch);
        let logprobs = self.listed();
        let choice = Choice {
            logprobs,
            finish_reason: Some(finish_reason(*finish)),
            token_ids: writer.wishes.return_token_ids.then_some(tokens),
            prompt_token_ids: self.prompt_token_ids(writer.wishes),
            ..Choice::new(self.index, writer.head.form.piece(&text))
        };
        Ok(writer.choice(choice, Some(&proof)))
    }

    /// The log-probabilities that were not sent yet.
    fn listed(&mut self) -> Option<LogProbJson> {
        self.logprobs.next(&std::mem::take(&mut self.unlisted))
    }

    /// The prompt's tokens, in the first chunk, if asked for.
    fn prompt_token_ids(&self, wishes: Wishes) -> Option<&[u32]> {
        if self.is_first && wishes.return_token_ids { self.request.input.tokens() } else { None }
    }
}

impl Writer {
    fn choice<'a>(&'a self, choice: Choice<'a>, proof: Option<&'a Proof>) -> Vec<u8> {
        let mut chunk = self.head.chunk(vec![choice]);
        chunk.butterfly = proof;
        self.frame(chunk)
    }

    fn frame(&self, mut chunk: Completion<'_>) -> Vec<u8> {
        if self.wishes.include_usage {
            // With usage asked for, every other chunk says that it has none.
            chunk.usage = chunk.usage.or(Some(None));
        }
        data(&serde_json::to_vec(&chunk).unwrap_or_default())
    }
}

/// One event. JSON has no line breaks outside of strings, and escapes them inside.
fn data(json: &[u8]) -> Vec<u8> {
    [b"data: ", json, b"\n\n"].concat()
}

#[cfg(test)]
mod tests;
