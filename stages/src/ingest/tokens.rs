//! `POST /tokenize` and `POST /detokenize`: what the model makes of text, and text of tokens.
//!
//! It refuses to know tasks: nothing is queued for these.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::chat;
use super::errors::Failure;
use super::fields::{Prompt, Prompts};
use super::routes::Front;

#[derive(Serialize)]
struct Tokenised {
    tokens: Vec<u32>,
    count: usize,
    max_model_len: usize,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenised {
    prompt: String,
}

/// The handler of `/tokenize`: `prompt`, with what goes around it unless `add_special_tokens` is false, or `messages`.
pub(super) async fn tokenize(State(front): State<Arc<Front>>, request: Request) -> Result<Response, Failure> {
    let (_body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    fields.refuse_unsupported()?;
    let with_affixes = fields.flag("add_special_tokens", true)?;
    let with_strings = fields.flag("return_token_strs", false)?;
    let prompt = std::mem::take(&mut fields.prompt).value("prompt")?;
    let said = std::mem::take(&mut fields.messages).value("messages")?;
    let services = &front.gateway.services;
    let tokens = match (prompt.map(|Prompts(prompts)| prompts), said) {
        (Some(prompts), None) => match prompts.as_slice() {
            [Prompt::Text(text)] => front.gateway.tokenise("prompt", text, with_affixes).await?,
            _ => return Err(Failure::invalid_value("prompt", "prompt must be one string")),
        },
        (None, Some(said)) => {
            let now_ms = services.clock.unix_ms();
            front.gateway.render("messages", &chat::messages(said)?, now_ms).await?
        }
        (None, None) => return Err(Failure::invalid_value("prompt", "send \"prompt\" or \"messages\"")),
        (Some(_), Some(_)) => {
            return Err(Failure::invalid_value("messages", "prompt and messages are both there; send one of them"));
        }
    };
    let text =
        |token: &u32| services.model.tokenizer().map(|tokenizer| tokenizer.decode(&[*token])).unwrap_or_default();
    let token_strs = with_strings.then(|| tokens.iter().map(text).collect());
    let (count, max_model_len) = (tokens.len(), services.model.manifest().context_length);
    Ok(Json(Tokenised { tokens, count, max_model_len, token_strs }).into_response())
}

/// The handler of `/detokenize`. Special tokens are written out; bytes that are no UTF-8 become U+FFFD.
pub(super) async fn detokenize(State(front): State<Arc<Front>>, request: Request) -> Result<Response, Failure> {
    let (_body, mut fields) = front.fields(request).await?;
    front.check_model(&mut fields)?;
    let invalid = |message: String| Failure::invalid_value("tokens", message);
    let tokens = std::mem::take(&mut fields.tokens).value("tokens")?.map(|Prompts(prompts)| prompts);
    let Some([Prompt::Tokens(tokens)]) = tokens.as_deref() else {
        return Err(invalid("tokens must be a list of token ids".to_owned()));
    };
    let model = &front.gateway.services.model;
    let tokenizer =
        model.tokenizer().ok_or_else(|| invalid(format!("'{}' has no tokenizer", model.manifest().name)))?;
    if let Some(beyond) = tokens.iter().find(|token| **token as usize >= tokenizer.vocabulary()) {
        return Err(invalid(format!("the model's tokens are below {}, not {beyond}", tokenizer.vocabulary())));
    }
    Ok(Json(Detokenised { prompt: tokenizer.decode(tokens) }).into_response())
}
