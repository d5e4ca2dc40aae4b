//! `POST /v1/embeddings`: each text is a request of its own, with a receipt of its own.
//!
//! Texts of one body are computed together, a few at a time, so that one client with many does not fill the queue that all
//! clients share. When one of them fails the whole answer is that failure, and the others are cancelled.
//!
//! It refuses to know how a text becomes a vector.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use base64ct::{Base64, Encoding};
use butterfly_verify::Answer;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::ask::{Ask, AskInput, Rules, must_embed};
use super::board::Completed;
use super::errors::Failure;
use super::fields::{Fields, Inputs, Setting};
use super::gate::{Caller, Client};
use super::gateway::{Admitted, Gateway, Submission};
use super::render::{Proof, Verification};
use super::routes::Front;
use crate::commit::TaskKind;
use crate::error::TaskError;

/// Texts of one body in the graph at the same time.
const AT_ONCE_MAX: usize = 32;

/// What a body asks for.
struct Asked {
    /// Everything but the text.
    ask: Ask,
    inputs: Vec<AskInput>,
    is_base64: bool,
}

/// The handler.
pub(super) async fn submit(
    State(front): State<Arc<Front>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
) -> Result<Response, Failure> {
    let asked = read(&front, request).await.inspect_err(|_| front.count_rejected(TaskKind::Embedding))?;
    let Asked { ask, inputs, is_base64 } = asked;
    let answers = inputs.into_iter().map(|input| embed(&front, client.clone(), ask.about(input)));
    // In the order of the inputs. Dropping it at the first failure cancels the rest.
    let answers: Vec<Arc<Completed>> = stream::iter(answers).buffered(AT_ONCE_MAX).try_collect().await?;
    render(&front.gateway, &answers, is_base64)
}

async fn read(front: &Front, request: Request) -> Result<Asked, Failure> {
    let (body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    let manifest = front.gateway.services.model.manifest();
    must_embed(manifest)?;
    fields.refuse("stream", Setting::Flag(false))?;
    let is_base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            let message = "encoding_format must be \"float\" or \"base64\"";
            return Err(Failure::invalid_value("encoding_format", message));
        }
    };
    let dimensions = fields.integer("dimensions", 1..=i64::MAX)?;
    if dimensions.is_some_and(|wanted| usize::try_from(wanted) != Ok(manifest.output_width)) {
        let message = format!("'{}' gives {} dimensions and no others", manifest.name, manifest.output_width);
        return Err(Failure::unsupported_parameter("dimensions", message));
    }
    let inputs = inputs(&mut fields)?;
    let rules = Rules { mode: front.gateway.mode, temperature: 0.0, tokens_default: 0, tokens_min: 1 };
    let ask = Ask::new(&mut fields, "input", AskInput::Tokens(Vec::new()), rules)?;
    drop(body);
    Ok(Asked { ask, inputs, is_base64 })
}

fn inputs(fields: &mut Fields) -> Result<Vec<AskInput>, Failure> {
    let wrong = |message: &str| Failure::invalid_value("input", format!("input {message}"));
    match std::mem::take(&mut fields.input).value("input")? {
        None => Err(wrong("is missing: a string, a list of strings, token ids, or a list of lists of token ids")),
        Some(Inputs::Texts(texts)) => Ok(texts.into_iter().map(AskInput::Text).collect()),
        Some(Inputs::Lists(lists)) => Ok(lists.into_iter().map(AskInput::Tokens).collect()),
        Some(Inputs::Numbers { values, .. }) if values.is_empty() => Err(wrong("is empty")),
        Some(Inputs::Numbers { are_ids: false, .. }) => Err(wrong("has numbers that are no token ids")),
        Some(Inputs::Numbers { values, .. }) => {
            // Ids above 2^24 may have been rounded, and are beyond every vocabulary before and after.
            Ok(vec![AskInput::Tokens(values.into_iter().map(|value| value as u32).collect())])
        }
    }
}

/// Asks for one text, and waits for its vector.
async fn embed(front: &Front, client: Caller, ask: Ask) -> Result<Arc<Completed>, Failure> {
    let submission = Submission { client, kind: TaskKind::Embedding, task_id: None, ask, wait: true };
    let admitted = front.gateway.submit(submission).await;
    let Admitted { reply, .. } = admitted.inspect_err(|_| front.count_rejected(TaskKind::Embedding))?;
    let reply =
        reply.ok_or_else(|| TaskError::Internal("an embedding was admitted that nobody waits for".to_owned()))?;
    Ok(reply.end().await?)
}

#[derive(Serialize)]
struct Embeddings<'a> {
    object: &'static str,
    data: Vec<Embedding<'a>>,
    model: &'a str,
    usage: Usage,
    butterfly: Proofs,
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Values<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values<'a> {
    Floats(&'a [f32]),
    /// Of the values as f32, little-endian.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// What backs the vectors.
#[derive(Serialize)]
struct Proofs {
    /// The name of the receipt of each vector, in order.
    receipt_ids: Vec<String>,
    /// What every one of them shows.
    verification: Option<Verification>,
    /// Whether all of them were given to the same texts before.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    cached: bool,
}

fn render(gateway: &Gateway, answers: &[Arc<Completed>], is_base64: bool) -> Result<Response, Failure> {
    let mut data = Vec::with_capacity(answers.len());
    for (index, completed) in answers.iter().enumerate() {
        let Answer::Vector { values } = &completed.answer else { return Err(TaskError::Numeric.into()) };
        let embedding = if is_base64 { Values::Base64(base64(values)) } else { Values::Floats(values) };
        data.push(Embedding { object: "embedding", index, embedding });
    }
    let tokens = answers.iter().map(|completed| completed.request.input.tokens().map_or(0, <[u32]>::len)).sum();
    let proof = answers.first().map(|completed| Proof::new(&completed.receipt, &gateway.services.epoch));
    let embeddings = Embeddings {
        object: "list",
        data,
        model: &gateway.services.model.manifest().name,
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
        butterfly: Proofs {
            receipt_ids: answers.iter().map(|completed| completed.receipt.rd.to_string()).collect(),
            verification: proof.map(|proof| proof.verification),
            cached: answers.iter().all(|completed| completed.cached),
        },
    };
    Ok(Json(embeddings).into_response())
}

fn base64(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Base64::encode_string(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs_of(body: &str) -> Result<Vec<AskInput>, Failure> {
        inputs(&mut Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn an_input_is_a_text_or_tokens_or_a_list_of_either() {
        let shown = |body: &str| format!("{:?}", inputs_of(body).unwrap());
        assert_eq!(shown(r#"{"input": ""}"#), r#"[Text("")]"#);
        assert_eq!(shown(r#"{"input": ["a", ""]}"#), r#"[Text("a"), Text("")]"#);
        assert_eq!(shown(r#"{"input": [1, 16777217]}"#), "[Tokens([1, 16777216])]");
        assert_eq!(
            shown(r#"{"input": [[1], [2, 4294967295], []]}"#),
            "[Tokens([1]), Tokens([2, 4294967295]), Tokens([])]"
        );
    }

    #[test]
    fn what_is_no_input_is_refused_by_name() {
        for body in [
            "{}",
            r#"{"input": null}"#,
            r#"{"input": []}"#,
            r#"{"input": 3}"#,
            r#"{"input": {}}"#,
            r#"{"input": [1, 2.5]}"#,
            r#"{"input": [-1]}"#,
            r#"{"input": ["a", 1]}"#,
            r#"{"input": [1, "a"]}"#,
            r#"{"input": [[1], "a"]}"#,
            r#"{"input": [[1], [1.5]]}"#,
            r#"{"input": [["a"]]}"#,
            r#"{"input": [null]}"#,
            r#"{"input": [[4294967296]]}"#,
        ] {
            let failure = inputs_of(body).unwrap_err();
            assert_eq!((failure.body.code, failure.body.param.as_deref()), ("invalid_value", Some("input")), "{body}");
        }
        let texts = |count: usize| format!(r#"{{"input": [{}]}}"#, vec!["\"a\""; count].join(","));
        assert_eq!(inputs_of(&texts(2048)).unwrap().len(), 2048);
        assert!(inputs_of(&texts(2049)).unwrap_err().body.message.contains("more than 2048"));
    }

    #[test]
    fn base64_is_of_little_endian_floats() {
        assert_eq!(base64(&[1.0, -2.0]), "AACAPwAAAMA=");
    }
}
