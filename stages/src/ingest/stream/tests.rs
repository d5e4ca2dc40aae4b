use std::path::Path;

use butterfly_engine::clock::ManualClock;
use butterfly_verify::{Digest, Finish, Input, Mode, Params, Receipt, RequestParts};
use serde_json::Value;

use super::super::fixture::{Fixture, epoch, fixture};
use super::super::gateway::Waiting;
use super::super::reply::{ReplySender, reply};
use super::*;
use crate::model::Model;

const WISHES: Wishes =
    Wishes { form: Form::Completion, stream: true, include_usage: false, return_token_ids: false, echo: false };

struct Streamed {
    fixture: Fixture,
    model: Arc<Model>,
    stream: Stream,
    requests: Vec<Request>,
    senders: Vec<Option<ReplySender>>,
    clock: ManualClock,
}

/// The tokens of a text, without what the tokenizer may add.
fn tokens(model: &Model, text: &str) -> Vec<u32> {
    model.tokenizer().unwrap().encode(text).unwrap()
}

fn streamed(wishes: Wishes, stop: &[&str]) -> Streamed {
    several(wishes, stop, 1)
}

/// The stream of so many choices for one prompt.
fn several(wishes: Wishes, stop: &[&str], choices: u32) -> Streamed {
    let fixture = fixture();
    let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
    let clock = fixture.clock.clone();
    let board = Arc::new(super::super::Board::new(
        Arc::clone(&fixture.journal),
        Arc::clone(&fixture.telemetry),
        Arc::new(clock.clone()),
        fixture.board.room(),
    ));
    let (mut requests, mut senders, mut asked) = (Vec::new(), Vec::new(), Vec::new());
    for choice in 0..choices {
        let stop = stop.iter().map(|stop| (*stop).into()).collect();
        let request = Request::new(RequestParts {
            client: String::new(),
            nonce: [1; 32],
            model: "tiny-rust".into(),
            mode: Mode::Full,
            input: Input::Tokens { tokens: vec![4, 5] },
            params: Params { max_tokens: 64, stop, choice, ..Params::default() },
            now_ms: 1_000_000,
            expires_ms: 1_600_000,
        });
        let request = request.unwrap();
        let (sender, receiver) = reply(64);
        let reply = Awaited::new(receiver, Waiting::new(Arc::clone(&board), request.digest()));
        asked.push(Asked { request: request.clone(), reply, echo: wishes.echo.then(|| "So ".to_owned()) });
        requests.push(request);
        senders.push(Some(sender));
    }
    let id = format!("cmpl-{}", requests[0].digest());
    let head = Head { form: wishes.form, id, model: "tiny-rust".into(), created: 1000 };
    let stream = Stream::new(&model, Arc::new(epoch(4096)), Arc::new(clock.clone()), wishes, head, asked);
    Streamed { fixture, model, stream, requests, senders, clock }
}

impl Streamed {
    fn tell(&self, index: usize, tokens: &[u32]) {
        self.tell_of(0, index, tokens);
    }

    fn tell_of(&self, choice: usize, index: usize, tokens: &[u32]) {
        let sampled: Vec<Sampled> = tokens.iter().copied().map(Sampled::from).collect();
        self.senders[choice].as_ref().unwrap().tokens(index, &sampled);
    }

    fn end(&mut self, tokens: &[u32], text: &str) {
        self.end_of(0, tokens, text);
    }

    fn end_of(&mut self, choice: usize, tokens: &[u32], text: &str) {
        let answer = Answer::Text {
            tokens: tokens.to_vec(),
            text: text.as_bytes().to_vec(),
            finish: Finish::Length,
            prompt_tokens: 2,
            choice: choice as u32,
        };
        let request = self.requests[choice].clone();
        let receipt = Receipt {
            version: 1,
            epoch: Digest::default(),
            rd: request.digest(),
            mode: Mode::Full,
            answer_root: answer.root(),
            slices: Vec::new(),
        };
        let task_id = self.stream.writer.head.id.clone();
        let completed = Completed { task_id, request, answer, receipt, sampled: Vec::new(), cached: false };
        self.senders[choice].take().unwrap().end(Ok(Arc::new(completed)));
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
    let mut streamed = streamed(WISHES, &[]);
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
    assert_eq!(events[0]["butterfly"]["receipt_id"], streamed.requests[0].digest().to_string());
    assert_eq!(events[1], "[DONE]");
    assert!(streamed.stream.next().await.is_none());
}

#[tokio::test]
async fn usage_and_token_ids_come_when_asked_for() {
    let mut streamed = streamed(Wishes { include_usage: true, return_token_ids: true, ..WISHES }, &[]);
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
    let mut streamed = streamed(WISHES, &["the trait"]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words[..1]);
    streamed.end(&words, "");
    let events = events(&streamed.frames().await);
    assert_eq!((events[0]["choices"][0]["text"].as_str(), &events[1]), (Some(""), &Value::from("[DONE]")));
}

#[tokio::test]
async fn a_failure_is_told_and_the_body_breaks_off() {
    let mut streamed = streamed(WISHES, &[]);
    streamed.tell(0, &tokens(&streamed.model, "the"));
    streamed.chunk().await;
    streamed.senders[0]
        .take()
        .unwrap()
        .end(Err(crate::error::CoordinationError::ByzantineViolation { slice: 0 }.into()));
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
    let mut streamed = streamed(WISHES, &[]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words);
    streamed.chunk().await;
    streamed.end(&words, "another text");
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["error"]["code"], "internal_error");
}

#[tokio::test]
async fn comments_show_that_the_connection_lives() {
    let mut streamed = streamed(WISHES, &[]);
    let clock = streamed.clock.clone();
    let wait = async {
        clock.sleepers(1).await;
        clock.advance(COMMENT_EVERY);
    };
    let (frames, ()) = futures::join!(streamed.stream.next(), wait);
    assert_eq!(frames.unwrap().unwrap(), Bytes::from_static(b": waiting\n\n"));
    drop(streamed.fixture);
}

#[tokio::test]
async fn a_chat_begins_with_who_speaks() {
    let mut streamed = streamed(Wishes { form: Form::Chat, ..WISHES }, &[]);
    let chunk = streamed.chunk().await;
    assert_eq!(chunk["object"], "chat.completion.chunk");
    assert_eq!(chunk["choices"][0]["delta"], serde_json::json!({ "role": "assistant", "content": "" }));
    let words = tokens(&streamed.model, "the trait");
    streamed.tell(0, &words);
    assert_eq!(streamed.chunk().await["choices"][0]["delta"], serde_json::json!({ "content": "the trait" }));
    streamed.end(&words, "the trait");
    let events = events(&streamed.frames().await);
    assert_eq!(events[0]["choices"][0]["delta"], serde_json::json!({}));
    assert_eq!((&events[0]["choices"][0]["finish_reason"], &events[1]), (&"length".into(), &"[DONE]".into()));
}

#[tokio::test]
async fn choices_come_side_by_side_and_done_comes_after_the_last() {
    let wishes = Wishes { include_usage: true, echo: true, ..WISHES };
    let mut streamed = several(wishes, &[], 2);
    let echoes = events(&streamed.frames().await);
    let of = |event: &Value| (event["choices"][0]["index"].as_u64(), event["choices"][0]["text"].clone());
    assert_eq!(echoes.iter().map(of).collect::<Vec<_>>(), [(Some(0), "So ".into()), (Some(1), "So ".into())]);
    let words = tokens(&streamed.model, "the trait");
    streamed.tell_of(1, 0, &words);
    assert_eq!(of(&streamed.chunk().await), (Some(1), "the trait".into()));
    streamed.end_of(1, &words, "the trait");
    let ended = streamed.chunk().await;
    assert_eq!(ended["butterfly"]["receipt_id"], streamed.requests[1].digest().to_string());
    streamed.end_of(0, &words, "the trait");
    let events = events(&streamed.frames().await);
    assert_eq!(of(&events[0]), (Some(0), "the trait".into()));
    let usage = &events[1]["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&2.into(), &(2 * words.len()).into()));
    assert_eq!(events[2], "[DONE]");
}

#[tokio::test]
async fn one_choice_that_fails_ends_them_all() {
    let mut streamed = several(WISHES, &[], 2);
    streamed.senders[1].take().unwrap().end(Err(TaskError::Numeric));
    assert_eq!(streamed.chunk().await["error"]["code"], "numeric_failure");
    assert!(streamed.stream.replies.is_empty(), "nobody waits for the other any more");
}
