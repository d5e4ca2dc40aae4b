//! Reads what `verify` is given. All of it may come from whoever wants to be believed, so sizes are bounded, a part that
//! does not parse is a part that does not hold, and a bundle that lacks a part is no bundle.

use std::io::Read;
use std::path::Path;

use butterfly_verify::limits::JSON_BYTES_MAX;
use butterfly_verify::{Answer, BatchProof, Receipt, Request, SignedVote, Vote};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Fault, Stop};
use crate::exit::Failure;

/// A receipt and, from a bundle, what it is about.
pub(super) struct Bundle {
    pub(super) receipt: Receipt,
    pub(super) request: Option<Request>,
    pub(super) answer: Option<Answer>,
    /// What the bundle shows of the answer in a plainer form: worth nothing unless it is the same.
    pub(super) shown: Option<Value>,
}

/// A bundle's parts before they are read. Another member of the same name would be an error, so that no reader sees another
/// part than the one that is judged.
#[derive(Deserialize)]
struct Parts {
    receipt: Option<Value>,
    text: Option<Value>,
    token_ids: Option<Value>,
    output: Option<Value>,
    finish_reason: Option<Value>,
    usage: Option<Value>,
    request: Option<Value>,
    answer: Option<Value>,
}

pub(super) enum GivenRequest {
    /// What was certified.
    Resolved(Request),
    /// What a client sent.
    Body(Value),
}

pub(super) enum GivenResponse {
    /// What was certified.
    Answer(Answer),
    /// What a client received.
    Body(Value),
}

/// A file's text. A file that cannot be read is no verdict.
pub(super) fn read(path: &Path) -> Result<String, Stop> {
    let unreadable = |error: std::io::Error| Failure::file("read", path, &error);
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(JSON_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > JSON_BYTES_MAX {
        return Err(Fault::new(name(path), format!("larger than {} MiB", JSON_BYTES_MAX >> 20)).into());
    }
    String::from_utf8(bytes).map_err(|_| Fault::new(name(path), "the text is not UTF-8").into())
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// A bundle, or a receipt alone.
pub(super) fn bundle(text: &str) -> Result<Bundle, Fault> {
    let parts: Parts = serde_json::from_str(text).map_err(|error| Fault::new("receipt document", error))?;
    let Some(receipt) = parts.receipt else {
        let value: Value = serde_json::from_str(text).map_err(|error| Fault::new("receipt document", error))?;
        if let Some(status) = value.get("status").and_then(Value::as_str) {
            return Err(Fault::new("receipt", format!("there is none: the task is {status}")));
        }
        return Ok(Bundle { receipt: receipt_part(value)?, request: None, answer: None, shown: None });
    };
    let plain = [
        ("text", parts.text),
        ("token_ids", parts.token_ids),
        ("output", parts.output),
        ("finish_reason", parts.finish_reason),
        ("usage", parts.usage),
    ];
    let shown: Map<String, Value> =
        plain.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    let missing = |part: &'static str| Fault::new(part, "missing from the bundle");
    Ok(Bundle {
        receipt: receipt_part(receipt)?,
        request: Some(part("request", parts.request.ok_or_else(|| missing("request"))?)?),
        answer: Some(part("answer", parts.answer.ok_or_else(|| missing("answer"))?)?),
        shown: (!shown.is_empty()).then_some(Value::Object(shown)),
    })
}

/// The resolved request, or a client's body.
pub(super) fn request(text: &str) -> Result<GivenRequest, Fault> {
    let value = object("request", text)?;
    if value.get("nonce").is_some() && value.get("params").is_some() {
        return part("request", value).map(GivenRequest::Resolved);
    }
    Ok(GivenRequest::Body(value))
}

/// The answer, or a client's response.
pub(super) fn response(text: &str) -> Result<GivenResponse, Fault> {
    let value = object("response", text)?;
    if let Some(answer) = value.get("answer") {
        return part("response", answer.clone()).map(GivenResponse::Answer);
    }
    // An answer is one of three tagged objects; a client's response never has such a member.
    if ["text", "vector", "numeric"].iter().any(|tag| value.get(tag).is_some_and(Value::is_object)) {
        return part("response", value).map(GivenResponse::Answer);
    }
    Ok(GivenResponse::Body(value))
}

fn object(name: &str, text: &str) -> Result<Value, Fault> {
    let value: Value = serde_json::from_str(text).map_err(|error| Fault::new(name, error))?;
    if value.is_object() { Ok(value) } else { Err(Fault::new(name, "it is not a JSON object")) }
}

fn part<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, Fault> {
    serde_json::from_value(value).map_err(|error| Fault::new(name, error))
}

/// A receipt; what does not parse is sought down to the vote and its part.
fn receipt_part(value: Value) -> Result<Receipt, Fault> {
    serde_json::from_value(value.clone()).map_err(|error| {
        let slices = value.get("slices").and_then(Value::as_array).into_iter().flatten();
        for (slice, certificate) in slices.enumerate() {
            let votes = certificate.get("votes").and_then(Value::as_array).into_iter().flatten();
            for (index, vote) in votes.enumerate() {
                if let Some(fault) = vote_fault(&format!("slice {slice}: vote {index}"), vote) {
                    return fault;
                }
            }
        }
        Fault::new("receipt", error)
    })
}

fn vote_fault(place: &str, vote: &Value) -> Option<Fault> {
    let error = serde_json::from_value::<SignedVote>(vote.clone()).err()?;
    let inner = |name: &str| vote.get(name).cloned().unwrap_or_default();
    if let Err(error) = serde_json::from_value::<Vote>(inner("vote")) {
        return Some(Fault::new(format!("{place}: vote"), error));
    }
    let proof = inner("proof");
    if let Err(error) = serde_json::from_value::<BatchProof>(proof.clone()) {
        let is_hex = |value: Option<&Value>, digits: usize| {
            value.and_then(Value::as_str).is_some_and(|text| {
                text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            })
        };
        let path_holds = proof
            .get("path")
            .and_then(Value::as_array)
            .is_some_and(|path| path.iter().all(|digest| is_hex(Some(digest), 64)));
        let name = match () {
            () if !is_hex(proof.get("signature"), 128) => "signature",
            () if !path_holds => "path",
            () if !is_hex(proof.get("root"), 64) => "root",
            () if !is_hex(proof.get("leaf"), 64) => "leaf",
            () => "proof",
        };
        return Some(Fault::new(format!("{place}: {name}"), error));
    }
    Some(Fault::new(place, error))
}
