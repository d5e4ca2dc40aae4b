//! The body of a streamed completion: server-sent events from admission to `[DONE]`, or to a failure.
//!
//! Each piece of text is one chunk. The last chunk has the reason of the end and what backs the answer; the usage follows if
//! it was asked for, then `[DONE]`. A failure is an `error` frame after which the body breaks off: a client takes a body
//! that ends properly for success.
//!
//! Invariants: text is released in whole characters and never with a part of a stop string that may still become whole;
//! what was streamed is the beginning of the certified text, or the stream fails; dropping the body cancels the task.
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
use futures::stream;

use super::board::{Completed, TaskResult};
use super::errors::Failure;
use super::gateway::{Awaited, Gateway};
use super::logprobs::{Listed, LogProbForms};
use super::render::{Choice, Completion, Proof, Usage, finish_reason};
use super::reply::Reply;
use crate::error::TaskError;
use crate::model::{Generation, Sampled};

/// How often a comment shows that the connection lives.
const COMMENT_EVERY: Duration = Duration::from_secs(10);
/// How long an error frame is given to leave before the body breaks off.
const LAST_FRAME: Duration = Duration::from_millis(200);

/// What a client wants in its stream besides text.
#[derive(Debug, Clone, Copy)]
pub(super) struct StreamOptions {
    /// A chunk with the usage.
    pub include_usage: bool,
    /// Token ids beside the text.
    pub return_token_ids: bool,
}

/// The response that streams a task.
pub(super) fn respond(gateway: &Gateway, request: Request, reply: Awaited, options: StreamOptions) -> Response {
    let model = &gateway.services.model;
    let stream = Stream {
        id: format!("cmpl-{}", request.digest()),
        generation: Generation::new(&request, model.manifest(), model.tokenizer()),
        request,
        epoch: Arc::clone(&gateway.services.epoch),
        clock: Arc::clone(&gateway.services.clock),
        options,
        reply,
        released: String::new(),
        tokens: 0,
        logprobs: LogProbForms::new(model.tokenizer(), 0),
        unlisted: Vec::new(),
        is_first: true,
        phase: Phase::Open,
    };
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
    id: String,
    request: Request,
    epoch: Arc<Epoch>,
    clock: Arc<dyn Clock>,
    options: StreamOptions,
    reply: Awaited,
    generation: Generation,
    /// The text sent so far.
    released: String,
    /// The number of tokens it came from.
    tokens: usize,
    logprobs: LogProbForms,
    /// Tokens whose log-probabilities were not sent yet.
    unlisted: Vec<Sampled>,
    is_first: bool,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Failed,
    Ended,
}

impl Stream {
    /// The next frames, an error that breaks the body off, or the proper end.
    async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        match self.phase {
            Phase::Open => {}
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
            let reply = match select(std::pin::pin!(self.reply.next()), comment).await {
                Either::Left((reply, _)) => reply,
                Either::Right(((), _)) => return Some(Ok(Bytes::from_static(b": waiting\n\n"))),
            };
            let frames = match reply {
                Reply::Tokens(tokens) => self.piece(tokens),
                Reply::End(result) => self.end(&result),
            };
            if !frames.is_empty() {
                return Some(Ok(Bytes::from(frames)));
            }
        }
    }

    /// The chunk for further tokens; empty while all of their text is held back.
    fn piece(&mut self, sampled: Vec<Sampled>) -> Vec<u8> {
        let tokens: Vec<u32> = sampled.iter().map(|sampled| sampled.token).collect();
        for token in &tokens {
            self.generation.push(*token);
        }
        self.tokens += tokens.len();
        self.unlisted.extend(sampled);
        let text = self.generation.take_text();
        if text.is_empty() && !self.options.return_token_ids {
            return Vec::new();
        }
        self.released.push_str(&text);
        let token_ids = self.options.return_token_ids.then_some(tokens.as_slice());
        let logprobs = self.listed();
        let choice = Choice { logprobs, token_ids, prompt_token_ids: self.prompt_token_ids(), ..Choice::piece(&text) };
        let chunk = self.frame(&self.chunk(choice));
        self.is_first = false;
        chunk
    }

    fn end(&mut self, result: &TaskResult) -> Vec<u8> {
        let frames = result.as_ref().map_err(Failure::from).and_then(|completed| self.last(completed));
        match frames {
            Ok(frames) => {
                self.phase = Phase::Ended;
                frames
            }
            Err(failure) => {
                self.phase = Phase::Failed;
                data(&failure.envelope())
            }
        }
    }

    /// The chunk that ends the answer, and what follows it.
    fn last(&mut self, completed: &Completed) -> Result<Vec<u8>, Failure> {
        let Answer::Text { tokens, text, finish, .. } = &completed.answer else {
            return Err(TaskError::Numeric.into());
        };
        let text = String::from_utf8_lossy(text);
        let (Some(text), Some(tokens)) = (text.strip_prefix(&self.released), tokens.get(self.tokens..)) else {
            let message = "what was streamed is not what was certified; discard it";
            return Err(TaskError::Internal(message.to_owned()).into());
        };
        let proof = Proof::of(completed, &self.epoch);
        let logprobs = self.listed();
        let choice = Choice {
            logprobs,
            finish_reason: Some(finish_reason(*finish)),
            token_ids: self.options.return_token_ids.then_some(tokens),
            prompt_token_ids: self.prompt_token_ids(),
            ..Choice::piece(text)
        };
        let mut chunk = self.chunk(choice);
        chunk.butterfly = Some(&proof);
        let mut frames = self.frame(&chunk);
        if self.options.include_usage {
            let usage = Some(Usage::of(&completed.answer));
            frames.extend(self.frame(&Completion { choices: Vec::new(), usage, butterfly: None, ..chunk }));
        }
        frames.extend_from_slice(b"data: [DONE]\n\n");
        Ok(frames)
    }

    /// The log-probabilities that were not sent yet.
    fn listed(&mut self) -> Option<Listed> {
        self.logprobs.listed(&std::mem::take(&mut self.unlisted))
    }

    fn chunk<'a>(&'a self, choice: Choice<'a>) -> Completion<'a> {
        let mut chunk = Completion::new(&self.id, &self.request, choice);
        // With usage asked for, every other chunk says that it has none.
        chunk.usage = self.options.include_usage.then_some(None);
        chunk
    }

    /// The prompt's tokens, in the first chunk, if asked for.
    fn prompt_token_ids(&self) -> Option<&[u32]> {
        if self.is_first && self.options.return_token_ids { self.request.input.tokens() } else { None }
    }

    fn frame(&self, chunk: &Completion<'_>) -> Vec<u8> {
        data(&serde_json::to_vec(chunk).unwrap_or_default())
    }
}

/// One event. JSON has no line breaks outside of strings, and escapes them inside.
fn data(json: &[u8]) -> Vec<u8> {
    [b"data: ", json, b"\n\n"].concat()
}

#[cfg(test)]
mod tests;
