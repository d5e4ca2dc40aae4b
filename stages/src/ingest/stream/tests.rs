use std::path::Path;

use butterfly_engine::clock::ManualClock;
use butterfly_verify::{Digest, Finish, Input, Mode, Params, Receipt, RequestParts};
use serde_json::Value;

use super::super::fixture::{Fixture, epoch, fixture};
use super::super::gateway::Waiting;
use super::super::reply::{ReplySender, reply};
use super::*;
use crate::model::Model;

const OPTIONS: StreamOptions = StreamOptions { include_usage: false, return_token_ids: false };

struct Streamed {
    fixture: Fixture,
    model: Arc<Model>,
    stream: Stream,
    sender: Option<ReplySender>,
    clock: ManualClock,
}

/// The tokens of a text, without what the tokenizer may add.
fn tokens(model: &Model, text: &str) -> Vec<u32> {
    model.tokenizer().unwrap().encode(text).unwrap()
}

fn streamed(options: StreamOptions, stop: &[&str]) -> Streamed {
    let fixture = fixture();
    let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
    let request = Request::new(RequestParts {
        client: String::new(),
        nonce: [1; 32],
        model: "tiny-rust".into(),
        mode: Mode::Full,
        input: Input::Tokens { tokens: vec![4, 5] },
        params: Params { max_tokens: 64, stop: stop.iter().map(|stop| (*stop).into()).collect(), ..Params::default() },
        now_ms: 1_000_000,
        expires_ms: 1_600_000,
    });
    let request = request.unwrap();
    let (sender, receiver) = reply(64);
    let rd = request.digest();
    let clock = fixture.clock.clone();
    let board = Arc::new(super::super::Board::new(
        Arc::clone(&fixture.journal),
        Arc::clone(&fixture.telemetry),
        Arc::new(clock.clone()),
    ));
    let stream = Stream {
        id: format!("cmpl-{rd}"),
        generation: Generation::new(&request, model.manifest(), model.tokenizer()),
        epoch: Arc::new(epoch(4096)),
        clock: Arc::new(clock.clone()),
        options,
        reply: Awaited::new(receiver, Waiting::new(board, rd)),
        released: String::new(),
        tokens: 0,
        logprobs: LogProbForms::new(model.tokenizer(), 0),
        unlisted: Vec::new(),
        is_first: true,
        phase: Phase::Open,
        request,
    };
    Streamed { fixture, model, stream, sender: Some(sender), clock }
}

impl Streamed {
    fn tell(&self, index: usize, tokens: &[u32]) {
        let sampled: Vec<Sampled> = tokens.iter().copied().map(Sampled::from).collect();
        self.sender.as_ref().unwrap().tokens(index, &sampled);
    }

    fn end(&mut self, tokens: &[u32], text: &str) {
        let answer = Answer::Text {
            tokens: tokens.to_vec(),
            text: text.as_bytes().to_vec(),
            finish: Finish::Length,
            prompt_tokens: 2,
            choice: 0,
        };
        let request = self.stream.request.clone();
        let receipt = Receipt {
            version: 1,
            epoch: Digest::default(),
            rd: request.digest(),
            mode: Mode::Full,
            answer_root: answer.root(),
            slices: Vec::new(),
        };
        let task_id = self.stream.id.clone();
        let completed = Completed { task_id, request, answer, receipt, cached: false };
        self.sender.take().unwrap().end(Ok(Arc::new(completed)));
    }

    async fn frames(&mut self) -> String {
        String::from_utf8(self.stream.next().await.unwrap().unwrap().to_vec()).unwrap()
    }

    async fn chunk(&mut self) -> Value {
        let frames = self.frames().await;
        let json = frames.strip_prefix("data: ").and_then(|frames| frames.strip_suffix("\n\n")).unwrap();
        serde_json::from_str(json).unwrap()
    }
}

fn events(frames: &str) -> Vec<Value> {
    let data =
        frames.split("\n\n").filter(|frame| !frame.is_empty()).map(|frame| frame.strip_prefix("data: ").unwrap());
    data.map(|data| serde_json::from_str(data).unwrap_or(Value::String(data.into()))).collect()
}

#[tokio::test]
async fn pieces_then_the_end_with_its_proof_then_done() {
    let mut streamed = streamed(OPTIONS, &[]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words[..1]);
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["object"], "text_completion");
    assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
    assert_eq!((chunk.get("usage"), chunk.get("butterfly")), (None, None));
    let first = chunk["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(!first.is_empty() && "the trait".starts_with(&first), "{first}");
    streamed.end(&words, "the trait");
    let frames = streamed.frames().await;
    let events = events(&frames);
    assert_eq!(events.len(), 2);
    assert_eq!(first + events[0]["choices"][0]["text"].as_str().unwrap(), "the trait");
    assert_eq!(events[0]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[0]["butterfly"]["receipt_id"], streamed.stream.request.digest().to_string());
    assert_eq!(events[1], "[DONE]");
    assert!(streamed.stream.next().await.is_none());
}

#[tokio::test]
async fn usage_and_token_ids_come_when_asked_for() {
    let mut streamed = streamed(StreamOptions { include_usage: true, return_token_ids: true }, &[]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words[..1]);
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["usage"], Value::Null);
    assert!(chunk.as_object().unwrap().contains_key("usage"));
    assert_eq!(chunk["choices"][0]["prompt_token_ids"], serde_json::json!([4, 5]));
    assert_eq!(chunk["choices"][0]["token_ids"], serde_json::json!(words[..1]));
    streamed.end(&words, "the trait");
    let events = events(&streamed.frames().await);
    assert_eq!(events[0]["choices"][0]["token_ids"], serde_json::json!(words[1..]));
    assert_eq!(events[0]["choices"][0].get("prompt_token_ids"), None);
    assert_eq!(events[1]["choices"], serde_json::json!([]));
    assert_eq!(events[1]["usage"]["completion_tokens"], words.len());
    assert_eq!(events[1]["usage"]["total_tokens"], words.len() + 2);
    assert_eq!(events[2], "[DONE]");
}

#[tokio::test]
async fn a_part_of_a_stop_string_is_held_back() {
    let mut streamed = streamed(OPTIONS, &["the trait"]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words[..1]);
    streamed.end(&words, "");
    let events = events(&streamed.frames().await);
    assert_eq!((events[0]["choices"][0]["text"].as_str(), &events[1]), (Some(""), &Value::from("[DONE]")));
}

#[tokio::test]
async fn a_failure_is_told_and_the_body_breaks_off() {
    let mut streamed = streamed(OPTIONS, &[]);
    streamed.tell(0, &tokens(&streamed.model, "the"));
    streamed.chunk().await;
    streamed.sender.take().unwrap().end(Err(crate::error::CoordinationError::ByzantineViolation { slice: 0 }.into()));
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["error"]["code"], "verification_failed");
    let clock = streamed.clock.clone();
    let wait = async {
        clock.sleepers(1).await;
        clock.advance(LAST_FRAME);
    };
    let (broken, ()) = futures::join!(streamed.stream.next(), wait);
    assert!(broken.unwrap().is_err(), "never a clean end");
}

#[tokio::test]
async fn text_that_was_not_certified_is_never_called_done() {
    let mut streamed = streamed(OPTIONS, &[]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words);
    streamed.chunk().await;
    streamed.end(&words, "another text");
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["error"]["code"], "internal_error");
}

#[tokio::test]
async fn comments_show_that_the_connection_lives() {
    let mut streamed = streamed(OPTIONS, &[]);
    let clock = streamed.clock.clone();
    let wait = async {
        clock.sleepers(1).await;
        clock.advance(COMMENT_EVERY);
    };
    let (frames, ()) = futures::join!(streamed.stream.next(), wait);
    assert_eq!(frames.unwrap().unwrap(), Bytes::from_static(b": waiting\n\n"));
    drop(streamed.fixture);
}
