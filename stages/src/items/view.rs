//! What items show of themselves to a tap: what they are about, and with the payload what is in them.
//!
//! Invariants: without the payload nothing of a client's input or of an answer is shown, only digests and counts; a payload is
//! cut after [`NUMBERS_MAX`] numbers.
//!
//! It refuses to know who looks.

use butterfly_verify::{Answer, Input};
use serde_json::{Value, json};

use super::{Boundary, BoundaryValues, Decided, Finished, Outcome, Priority, Request, Step};
use crate::model::Sampled;

/// Numbers of a payload that are shown.
const NUMBERS_MAX: usize = 1024;

pub(super) fn request(item: &'static str, request: &Request, payload: bool) -> Value {
    let body = &request.body;
    let mut view = json!({ "item": item, "request": request.rd, "model": body.model });
    let (kind, count) = match &body.input {
        Input::Text { tokens, .. } => ("text", tokens.len()),
        Input::Chat { tokens, .. } => ("chat", tokens.len()),
        Input::Tokens { tokens } => ("tokens", tokens.len()),
        Input::Vector { values } => ("vector", values.len()),
    };
    view["input"] = json!({ "kind": kind, "count": count });
    if payload {
        view["payload"] = match &body.input {
            Input::Text { prompt, .. } => json!(prompt),
            Input::Chat { messages, .. } => json!(messages),
            Input::Tokens { tokens } => json!(first(tokens)),
            Input::Vector { values } => json!(first(values)),
        };
    }
    view
}

pub(super) fn boundary(item: &'static str, boundary: &Boundary, payload: bool) -> Value {
    let mut view = json!({
        "item": item,
        "request": boundary.rd,
        "attempt": boundary.attempt,
        "slice": boundary.slice,
        "position": boundary.position,
    });
    match &boundary.values {
        BoundaryValues::Rows { width, rows } => {
            view["rows"] = json!({ "count": rows.len() / (*width).max(1) as usize, "width": width });
            view["digest"] = json!(blake3::hash(bytemuck::cast_slice(rows)).to_hex().as_str());
            if payload {
                view["payload"] = json!(first(rows));
            }
        }
        BoundaryValues::Tokens(tokens) => {
            view["tokens"] = json!(tokens.len());
            view["digest"] = json!(blake3::hash(bytemuck::cast_slice(tokens)).to_hex().as_str());
            if payload {
                view["payload"] = json!(first(tokens));
            }
        }
        BoundaryValues::Numeric => view["content"] = json!("not finite"),
        BoundaryValues::End => view["content"] = json!("end"),
    }
    view
}

pub(super) fn step(step: &Step, payload: bool) -> Value {
    match step {
        Step::Open { rd, body, attempt, gateway } => {
            let mut view =
                request("open", &Request { rd: *rd, body: body.clone(), priority: Priority::default() }, payload);
            view["attempt"] = json!(attempt);
            view["gateway"] = json!(gateway);
            view
        }
        Step::Values { from, boundary: values } => {
            let mut view = boundary("values", values, payload);
            view["from"] = json!(from);
            view
        }
        Step::Cancel { rd, gateway } => json!({ "item": "cancel", "request": rd, "gateway": gateway }),
    }
}

pub(super) fn outcome(outcome: &Outcome, payload: bool) -> Value {
    match outcome {
        Outcome::Delta { rd, attempt, index, tokens, .. } => {
            let mut view = json!({
                "item": "delta", "request": rd, "attempt": attempt, "index": index, "tokens": tokens.len(),
            });
            if payload {
                view["payload"] = ids(tokens);
            }
            view
        }
        Outcome::Finished(finished) => {
            let Finished { rd, slice, positions, input_root, output_root, answer: of, .. } = &**finished;
            let mut view = json!({
                "item": "finished", "request": rd, "slice": slice, "positions": positions,
                "input_root": input_root, "output_root": output_root,
            });
            if let Some(of) = of.as_ref().filter(|_| payload) {
                view["payload"] = answer(of);
            }
            view
        }
    }
}

pub(super) fn decided(decided: &Decided, payload: bool) -> Value {
    match decided {
        Decided::Progress { rd, index, tokens } => {
            let mut view = json!({ "item": "progress", "request": rd, "index": index, "tokens": tokens.len() });
            if payload {
                view["payload"] = ids(tokens);
            }
            view
        }
        Decided::Certified { rd, receipt, answer: of } => {
            let mut view = json!({ "item": "certified", "request": rd, "answer_root": receipt.answer_root });
            if payload {
                view["payload"] = answer(of);
            }
            view
        }
        Decided::Failed { rd, error } => json!({ "item": "failed", "request": rd, "error": error.to_string() }),
        Decided::Checkpoint { certificate, through, is_certified } => json!({
            "item": "checkpoint",
            "sequence": certificate.checkpoint.sequence,
            "through": through,
            "certified": is_certified,
        }),
        Decided::Accused { evidence } => json!({ "item": "accused", "accused": evidence.accused.0 }),
    }
}

fn answer(answer: &Answer) -> Value {
    match answer {
        Answer::Text { tokens, text, .. } => {
            json!({ "tokens": first(tokens), "text": String::from_utf8_lossy(text) })
        }
        Answer::Vector { values } => json!(first(values)),
        Answer::Numeric { tokens, .. } => json!({ "tokens": first(tokens), "numeric": true }),
    }
}

fn ids(tokens: &[Sampled]) -> Value {
    json!(first(tokens).iter().map(|sampled| sampled.token).collect::<Vec<u32>>())
}

fn first<T>(numbers: &[T]) -> &[T] {
    numbers.get(..NUMBERS_MAX).unwrap_or(numbers)
}
