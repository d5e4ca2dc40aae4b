//! Compares what a client sent and received with what was certified, field by field: a client's body leaves out defaults, so
//! it has no digest of its own. A field that was certified and differs is a fault; a field that is not compared is listed.

use base64ct::{Base64, Encoding};
use butterfly::model::{Message, Messages};
use butterfly_verify::{Answer, Finish, Input, Mode, Request};
use serde_json::{Map, Value};

use super::{Fault, quoted};

/// Which fields were compared, and which were not: they are of neither request nor answer, or stand there in another form, as
/// the seed does.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    pub(super) compared: Vec<String>,
    pub(super) skipped: Vec<String>,
}

impl Comparison {
    /// A body of `POST /inference`, `/v1/chat/completions`, `/v1/completions` or `/v1/embeddings` against the resolved request.
    pub(super) fn request(&mut self, body: &Value, request: &Request) -> Result<(), Fault> {
        let Some(fields) = body.as_object() else { return Ok(()) };
        let params = &request.params;
        for (name, sent) in fields.iter().filter(|(_, sent)| !sent.is_null()) {
            let certified = match name.as_str() {
                "prompt" | "text" | "input" | "messages" => self.same_input(name, sent, &request.input)?,
                "model" => Some((sent.as_str() == Some(&*request.model), quoted(&request.model))),
                // The newer of two names for one thing goes before the older.
                "max_tokens" if fields.get("max_completion_tokens").is_some_and(|newer| !newer.is_null()) => None,
                "max_tokens" | "max_completion_tokens" => {
                    Some((sent.as_u64() == Some(params.max_tokens.into()), params.max_tokens.to_string()))
                }
                "temperature" => Some(same_float(sent, params.temperature)),
                "top_p" => Some(same_float(sent, params.top_p)),
                // -1 is another way to say that every token is a candidate.
                "top_k" => {
                    Some((sent.as_i64().map(|k| k.max(0)) == Some(params.top_k.into()), params.top_k.to_string()))
                }
                "presence_penalty" => Some(same_float(sent, params.presence_penalty)),
                "frequency_penalty" => Some(same_float(sent, params.frequency_penalty)),
                "logprobs" | "top_logprobs" => Some(same_logprobs(fields, params.logprobs)),
                "echo" if params.prompt_logprobs => {
                    Some((sent.as_bool() == Some(true), "the prompt's tokens".to_owned()))
                }
                "n" => Some((sent.as_u64() > Some(params.choice.into()), format!("choice {}", params.choice))),
                "ignore_eos" => Some((sent.as_bool() == Some(params.ignore_eos), params.ignore_eos.to_string())),
                "logit_bias" => Some((same_bias(sent, &params.logit_bias), format!("{:?}", params.logit_bias))),
                "stop" => Some((same_stop(sent, &params.stop), format!("{:?}", params.stop))),
                "verify" => Some(same_mode(sent, request.mode)),
                "butterfly" => sent.get("verify").map(|verify| same_mode(verify, request.mode)),
                _ => None,
            };
            self.note("request", name, sent, certified)?;
        }
        Ok(())
    }

    fn same_input(&self, name: &str, sent: &Value, input: &Input) -> Result<Option<(bool, String)>, Fault> {
        let same = match input {
            Input::Text { prompt, .. } => is_or_contains(sent, |value| value.as_str() == Some(prompt)),
            Input::Chat { messages, .. } => same_messages(sent, messages),
            Input::Tokens { tokens } => {
                same_tokens(sent, tokens)
                    || sent.as_array().is_some_and(|all| all.iter().any(|one| same_tokens(one, tokens)))
            }
            Input::Vector { values } => same_floats(sent, values),
        };
        let certified = match input {
            Input::Text { prompt, .. } => quoted(prompt),
            Input::Chat { messages, .. } => quoted(messages),
            Input::Tokens { tokens } => format!("{} tokens", tokens.len()),
            Input::Vector { values } => format!("a vector of {}", values.len()),
        };
        if self.compared.iter().any(|field| field.starts_with("request.") && is_input(&field["request.".len()..])) {
            return Err(Fault::new(format!("request: {name}"), "the body has more than one input"));
        }
        Ok(Some((same, certified)))
    }

    /// A response of any of these against the answer.
    pub(super) fn response(&mut self, body: &Value, answer: &Answer, request: Option<&Request>) -> Result<(), Fault> {
        if let Some(error) = body.get("error") {
            let message = error.get("message").and_then(Value::as_str).unwrap_or("no message");
            return Err(Fault::new("response", format!("it is an error, not an answer: {message}")));
        }
        match (answer, body.get("choices")) {
            (Answer::Text { choice, .. }, Some(choices)) => {
                let rd = request.map(|request| request.digest().to_string());
                let own = |one: &&Value| {
                    rd.is_some() && one.pointer("/butterfly/receipt_id").and_then(Value::as_str) == rd.as_deref()
                };
                // Of several prompts' choices each names its receipt; those of one prompt may be told by their place.
                let placed = |one: &&Value| one.get("index").and_then(Value::as_u64).unwrap_or(0) == u64::from(*choice);
                let all = || choices.as_array().into_iter().flatten();
                let one = all().find(own).or_else(|| all().find(placed));
                let one = one.ok_or_else(|| Fault::new("response: choices", format!("there is no choice {choice}")))?;
                self.text(one, answer, request)?;
            }
            (Answer::Vector { values }, _) if body.get("data").is_some() => self.embedding(body, values, request)?,
            _ => self.text(body, answer, request)?,
        }
        if !self.compared.iter().any(|field| field.starts_with("response.")) {
            return Err(Fault::new("response", "it has nothing of the answer in it"));
        }
        let is_one = body.get("choices").and_then(Value::as_array).is_none_or(|choices| choices.len() == 1);
        if let Some(usage) = body.get("usage").filter(|_| is_one) {
            self.usage(usage, answer)?;
        }
        if let Some(request) = request {
            self.names(body, request)?;
        }
        Ok(())
    }

    /// A list of embeddings, one of which the answer is: the one whose receipt is the request's, or the only one.
    fn embedding(&mut self, body: &Value, certified: &[f32], request: Option<&Request>) -> Result<(), Fault> {
        let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
        let data = list(body.get("data"));
        let ids = list(body.get("butterfly").and_then(|butterfly| butterfly.get("receipt_ids")));
        let rd = request.map(|request| request.digest().to_string());
        let index = ids.iter().position(|id| rd.is_some() && id.as_str() == rd.as_deref());
        let wrong = |problem: &str| Fault::new("response: data", problem);
        let one = match (index, data.as_slice()) {
            (Some(index), data) => data.get(index),
            (None, [only]) => Some(only),
            (None, _) => return Err(wrong("it has several embeddings, and none of them names this request's receipt")),
        };
        let received = one.and_then(|one| one.get("embedding")).ok_or_else(|| wrong("it has no such embedding"))?;
        let same = match received.as_str() {
            Some(text) => Base64::decode_vec(text)
                .is_ok_and(|bytes| bytes.iter().copied().eq(certified.iter().flat_map(|value| value.to_le_bytes()))),
            None => same_floats(received, certified),
        };
        self.note("response", "embedding", received, Some((same, format!("a vector of {}", certified.len()))))
    }

    /// A choice of a completion, or a result that holds text or a vector itself.
    fn text(&mut self, body: &Value, answer: &Answer, request: Option<&Request>) -> Result<(), Fault> {
        let Some(fields) = body.as_object() else { return Ok(()) };
        for (name, received) in fields.iter().filter(|(_, received)| !received.is_null()) {
            let certified = match (name.as_str(), answer) {
                ("message", Answer::Text { text, .. }) => {
                    let text = String::from_utf8_lossy(text);
                    let content = received.get("content").and_then(Value::as_str);
                    Some((content == Some(&*text), quoted(&text)))
                }
                ("text", Answer::Text { text, .. }) => {
                    let text = String::from_utf8_lossy(text);
                    let prompt = match request.map(|request| &request.input) {
                        Some(Input::Text { prompt, .. }) => prompt,
                        _ => "",
                    };
                    // A prompt that is echoed comes before the answer.
                    let same = received.as_str().is_some_and(|received| {
                        received == text || received.strip_prefix(prompt).is_some_and(|received| received == text)
                    });
                    Some((same, quoted(&text)))
                }
                ("finish_reason", Answer::Text { finish, .. }) => {
                    let finish = finish_reason(*finish);
                    Some((received.as_str() == Some(finish), finish.to_owned()))
                }
                ("token_ids", Answer::Text { tokens, .. }) => {
                    Some((same_tokens(received, tokens), format!("{} tokens", tokens.len())))
                }
                ("prompt_token_ids", _) => request
                    .and_then(|request| request.input.tokens())
                    .map(|tokens| (same_tokens(received, tokens), format!("{} tokens", tokens.len()))),
                ("output", Answer::Vector { values }) => {
                    Some((same_floats(received, values), format!("a vector of {}", values.len())))
                }
                ("text" | "message" | "finish_reason" | "token_ids" | "output", _) => {
                    Some((false, "an answer of another kind".to_owned()))
                }
                // These are looked at on their own.
                ("usage" | "model" | "receipt_id", _) => continue,
                _ => None,
            };
            self.note("response", name, received, certified)?;
        }
        Ok(())
    }

    /// What a response says about the request it answers.
    fn names(&mut self, body: &Value, request: &Request) -> Result<(), Fault> {
        let rd = request.digest().to_string();
        for (name, certified) in [("model", &*request.model), ("receipt_id", &*rd)] {
            if let Some(received) = body.get(name) {
                let same = received.as_str() == Some(certified);
                self.note("response", name, received, Some((same, quoted(certified))))?;
            }
        }
        Ok(())
    }

    fn usage(&mut self, usage: &Value, answer: &Answer) -> Result<(), Fault> {
        let Answer::Text { tokens, prompt_tokens, .. } = answer else { return Ok(()) };
        let generated = tokens.len() as u64;
        let prompt = u64::from(*prompt_tokens);
        for (name, certified) in
            [("prompt_tokens", prompt), ("completion_tokens", generated), ("total_tokens", prompt + generated)]
        {
            if let Some(received) = usage.get(name) {
                let same = received.as_u64() == Some(certified);
                self.note("response", &format!("usage.{name}"), received, Some((same, certified.to_string())))?;
            }
        }
        Ok(())
    }

    /// Notes a field as compared or skipped, or faults it. `certified` is whether it agrees, and with what.
    fn note(&mut self, side: &str, name: &str, given: &Value, certified: Option<(bool, String)>) -> Result<(), Fault> {
        match certified {
            None => self.skipped.push(format!("{side}.{name}")),
            Some((true, _)) => self.compared.push(format!("{side}.{name}")),
            Some((false, certified)) => {
                let given = match given {
                    Value::String(text) => quoted(text),
                    Value::Array(values) if values.len() > 8 => format!("a list of {}", values.len()),
                    other => other.to_string(),
                };
                return Err(Fault::new(
                    format!("{side}: {name}"),
                    format!("{given} was given, {certified} was certified"),
                ));
            }
        }
        Ok(())
    }
}

fn is_input(field: &str) -> bool {
    matches!(field, "prompt" | "text" | "input" | "messages")
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

fn same_mode(sent: &Value, mode: Mode) -> (bool, String) {
    let mode = match mode {
        Mode::None => "none",
        Mode::Quorum => "quorum",
        Mode::Full => "full",
    };
    (sent.as_str() == Some(mode), mode.to_owned())
}

/// A JSON number means the nearest f32, as it did to the gateway.
fn same_float(sent: &Value, certified: f32) -> (bool, String) {
    (sent.as_f64().is_some_and(|sent| sent as f32 == certified), certified.to_string())
}

fn same_floats(given: &Value, certified: &[f32]) -> bool {
    given.as_array().is_some_and(|given| {
        given.len() == certified.len()
            && given.iter().zip(certified).all(|(given, certified)| same_float(given, *certified).0)
    })
}

fn same_tokens(given: &Value, certified: &[u32]) -> bool {
    given.as_array().is_some_and(|given| {
        given.len() == certified.len()
            && given.iter().zip(certified).all(|(given, certified)| given.as_u64() == Some(u64::from(*certified)))
    })
}

/// The client's messages as the gateway understood them: parts of text joined, nothing said for null.
fn same_messages(sent: &Value, certified: &str) -> bool {
    let Ok(certified) = Messages::from_json(certified) else { return false };
    let Some(sent) = sent.as_array() else { return false };
    let content = |message: &Value| -> Option<String> {
        match message.get("content") {
            None | Some(Value::Null) => Some(String::new()),
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(parts)) => {
                parts.iter().map(|part| part.as_str().or_else(|| part.get("text")?.as_str())).collect()
            }
            Some(_) => None,
        }
    };
    let text = |message: &Value, name: &str| message.get(name).and_then(Value::as_str).map(str::to_owned);
    let plain = sent.iter().map(|message| {
        Some(Message {
            role: serde_json::from_value(message.get("role")?.clone()).ok()?,
            content: content(message)?,
            name: text(message, "name"),
            tool_call_id: text(message, "tool_call_id"),
        })
    });
    plain.collect::<Option<Vec<_>>>().and_then(|plain| Messages::new(plain).ok()) == Some(certified)
}

/// Chats say whether, and of how many; completions say of how many.
fn same_logprobs(fields: &Map<String, Value>, certified: Option<u8>) -> (bool, String) {
    let top = fields.get("top_logprobs").and_then(Value::as_u64);
    let wanted = match fields.get("logprobs") {
        Some(Value::Bool(true)) => Some(top.unwrap_or(0)),
        Some(count) => count.as_u64(),
        None => None,
    };
    (wanted == certified.map(u64::from), format!("{certified:?}"))
}

fn same_bias(sent: &Value, certified: &[(u32, f32)]) -> bool {
    sent.as_object().is_some_and(|sent| {
        sent.len() == certified.len()
            && certified
                .iter()
                .all(|(token, bias)| sent.get(&token.to_string()).is_some_and(|sent| same_float(sent, *bias).0))
    })
}

fn same_stop(sent: &Value, certified: &[String]) -> bool {
    match sent {
        Value::String(one) => certified == [one.as_str()],
        Value::Array(all) => {
            all.len() == certified.len()
                && all.iter().zip(certified).all(|(sent, certified)| sent.as_str() == Some(certified))
        }
        _ => false,
    }
}

fn is_or_contains(value: &Value, holds: impl Fn(&Value) -> bool) -> bool {
    holds(value) || value.as_array().is_some_and(|all| all.iter().any(holds))
}
