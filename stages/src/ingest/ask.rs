//! From the fields of a body to what is asked: every default resolved, every limit of model and cluster kept.
//!
//! Invariants: a field that cannot be kept fails by name before anything is queued; what passes makes a valid request.
//!
//! It refuses to know queues, and where fields come from.

use butterfly_verify::limits::EXPIRY_MS_MAX;
use butterfly_verify::{Epoch, Input, Mode, Params, Request, RequestError, RequestParts};
use sha2::{Digest as _, Sha256};

use super::errors::Failure;
use super::fields::{self, Fields, List, Options, Prompt, Prompts, Setting, unsupported};
use crate::items::Priority;
use crate::model::{Architecture, Manifest, Messages};

/// Tokens that a completion has at most when the client does not say.
pub(super) const COMPLETION_TOKENS: u32 = 16;
/// Temperatures between 0 and this make every logit infinite.
const TEMPERATURE_MIN: f32 = 1e-3;
/// Longest task id a client may choose, in bytes.
const TASK_ID_BYTES_MAX: usize = 128;

/// What a client wants computed.
#[derive(Debug, Clone)]
pub(super) enum AskInput {
    /// Text, to be tokenised.
    Text(String),
    /// Messages, to be rendered and tokenised.
    Chat(Messages),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A vector.
    Vector(Vec<f32>),
}

/// What a client asks, before tokens are counted.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// The name of the field that `input` came from.
    pub field: &'static str,
    /// What is to be computed.
    pub input: AskInput,
    /// Tokens at most, if the client says so.
    pub max_tokens: Option<u32>,
    /// Tokens at most if it does not, as far as there is room.
    pub tokens_default: u32,
    /// Everything else of [`Params`]; its `max_tokens` and `seed` are not resolved.
    pub params: Params,
    /// The client's seed.
    pub seed: Option<i64>,
    /// Votes behind the answer.
    pub mode: Mode,
    /// How long the answer may take.
    pub deadline_ms: u64,
    /// What makes the request another one than those like it, if the client says so.
    pub nonce: Option<[u8; 32]>,
    /// How urgent it is, if the client says so.
    pub priority: Option<Priority>,
}

/// What a route lays down for its fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// The least verification a request may ask for, which is the cluster's.
    pub mode: Mode,
    /// Temperature where none is given.
    pub temperature: f32,
    /// Tokens at most where the client does not say, as far as there is room.
    pub tokens_default: u32,
    /// The fewest that a client may ask for.
    pub tokens_min: u32,
}

/// The name and value of the field that says how to verify.
struct Verify {
    field: &'static str,
    asked: Option<String>,
}

impl Ask {
    /// Reads what is common to the routes. `input` is what the route found.
    ///
    /// # Errors
    /// Names the first field that cannot be kept.
    pub(super) fn new(
        fields: &mut Fields,
        field: &'static str,
        input: AskInput,
        rules: Rules,
    ) -> Result<Self, Failure> {
        fields.refuse_unsupported()?;
        let format = take(&mut fields.response_format).value("response_format")?;
        let kind = format.and_then(|mut format| format.0.remove("type"));
        if fields::text("response_format.type", kind)?.is_some_and(|kind| kind != "text") {
            return Err(unsupported("response_format"));
        }
        let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(rules.temperature);
        if temperature > 0.0 && temperature < TEMPERATURE_MIN {
            let message = format!("temperature must be 0 (always the likeliest token) or at least {TEMPERATURE_MIN}");
            return Err(Failure::invalid_value("temperature", message));
        }
        let params = Params {
            max_tokens: 0,
            temperature,
            // -1 is how vLLM's clients say that all tokens are candidates.
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map_or(0, |k| u32::try_from(k).unwrap_or(0)),
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: take(&mut fields.logit_bias).value("logit_bias")?.map_or_else(Vec::new, |bias| bias.0),
            seed: [0; 32],
            stop: take(&mut fields.stop).value("stop")?.map_or_else(Vec::new, |stops| stops.0),
            ignore_eos: fields.flag("ignore_eos", false)?,
            choice: 0,
            logprobs: None,
            prompt_logprobs: false,
        };
        let counts = i64::from(rules.tokens_min)..=i64::from(u32::MAX);
        let max_tokens =
            fields.integer("max_completion_tokens", counts.clone())?.or(fields.integer("max_tokens", counts)?);
        let own = take(&mut fields.butterfly).value("butterfly")?;
        let Own { verify, deadline_ms, nonce, priority } = own_options(own, fields.text("verify")?)?;
        Ok(Self {
            field,
            input,
            max_tokens: max_tokens.and_then(|tokens| u32::try_from(tokens).ok()),
            tokens_default: rules.tokens_default,
            params,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            mode: mode(&verify, rules.mode)?,
            deadline_ms,
            nonce,
            priority,
        })
    }

    /// Whether nothing is left to chance, and the client wants no answer of its own.
    #[must_use]
    pub(super) fn has_one_answer(&self) -> bool {
        let is_certain = matches!(self.input, AskInput::Vector(_)) || self.params.temperature == 0.0;
        // Log-probabilities are no part of an answer that is kept.
        self.nonce.is_none() && self.params.logprobs.is_none() && (is_certain || self.seed.is_some())
    }

    /// The same of another input.
    #[must_use]
    pub(super) fn about(&self, input: AskInput) -> Self {
        Self { input, ..self.clone() }
    }

    /// The request of `client` at `now_ms`. `tokens` are those of the text or the messages, where there are such.
    ///
    /// # Errors
    /// When the model or the epoch does not take it.
    pub(super) fn resolve(
        self,
        client: &str,
        now_ms: u64,
        nonce: [u8; 32],
        tokens: Option<Vec<u32>>,
        manifest: &Manifest,
        epoch: &Epoch,
    ) -> Result<Request, Failure> {
        let field = self.field;
        let input = match self.input {
            AskInput::Text(prompt) => Input::Text { prompt, tokens: tokens.unwrap_or_default() },
            AskInput::Chat(messages) => {
                Input::Chat { messages: messages.to_json(), tokens: tokens.unwrap_or_default() }
            }
            AskInput::Tokens(tokens) => Input::Tokens { tokens },
            AskInput::Vector(values) => Input::Vector { values },
        };
        let mut params = self.params;
        params.seed = seed(&nonce, self.seed);
        match &input {
            Input::Vector { values } => {
                params = Params { max_tokens: 0, seed: params.seed, ..Params::default() };
                check_vector(field, values, manifest)?;
            }
            Input::Text { tokens, .. } | Input::Tokens { tokens } if manifest.architecture == Architecture::Bert => {
                params = Params { max_tokens: 0, seed: params.seed, ..Params::default() };
                check_text(field, tokens, manifest)?;
            }
            Input::Text { tokens, .. } | Input::Chat { tokens, .. } | Input::Tokens { tokens } => {
                params.max_tokens = check_tokens(field, tokens, self.max_tokens, self.tokens_default, manifest)?;
                let beyond = params.logit_bias.iter().find(|(token, _)| !below(*token, manifest.vocabulary));
                if let Some((token, _)) = beyond {
                    let message =
                        format!("logit_bias: the model's tokens are below {}, not {token}", manifest.vocabulary);
                    return Err(Failure::invalid_value("logit_bias", message));
                }
            }
        }
        let parts = RequestParts {
            client: client.to_owned(),
            nonce,
            model: manifest.name.clone(),
            mode: self.mode,
            input,
            params,
            now_ms,
            expires_ms: now_ms.saturating_add(self.deadline_ms.min(EXPIRY_MS_MAX)),
        };
        let request = Request::new(parts).map_err(|error| refused(field, &error))?;
        epoch.admits(&request).map_err(|over| Failure::context_length_exceeded(field, over.to_string()))?;
        Ok(request)
    }
}

impl From<Prompt> for AskInput {
    fn from(prompt: Prompt) -> Self {
        match prompt {
            Prompt::Text(text) => Self::Text(text),
            Prompt::Tokens(tokens) => Self::Tokens(tokens),
        }
    }
}

/// The one prompt of a body, under the name of its field.
///
/// # Errors
/// When there are several.
pub(super) fn prompt(field: &'static str, Prompts(mut prompts): Prompts) -> Result<AskInput, Failure> {
    match (prompts.pop(), prompts.is_empty()) {
        (Some(prompt), true) => Ok(prompt.into()),
        _ => {
            let message = "a list of several prompts is not supported here; send one request for each";
            Err(Failure::unsupported_parameter(field, message))
        }
    }
}

/// A task id that a client chose.
///
/// # Errors
/// When it is empty, too long, or would not fit a path.
pub(super) fn task_id(chosen: String) -> Result<String, Failure> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    if chosen.is_empty() || chosen.len() > TASK_ID_BYTES_MAX || !chosen.bytes().all(fits) {
        let message = format!("task_id must have 1 to {TASK_ID_BYTES_MAX} of the characters A-Z a-z 0-9 . _ : -");
        return Err(Failure::invalid_value("task_id", message));
    }
    Ok(chosen)
}

/// The mode of the cluster: what its consensus stage says, else full as soon as a node may lie.
#[must_use]
pub(super) fn cluster_mode(verify: Option<&str>, max_byzantine: usize) -> Mode {
    match verify {
        Some("none") => Mode::None,
        Some(_) => Mode::Full,
        None if max_byzantine == 0 => Mode::None,
        None => Mode::Full,
    }
}

fn take<T>(list: &mut List<T>) -> List<T> {
    std::mem::take(list)
}

/// An integer that says how urgent a request is.
///
/// # Errors
/// When it is no level.
pub(super) fn priority(name: &str, value: Option<&Setting>) -> Result<Option<Priority>, Failure> {
    let level = fields::integer(name, value, 0..=i64::from(Priority::MAX))?;
    Ok(level.and_then(|level| Priority::new(u8::try_from(level).ok()?)))
}

/// The fields of `butterfly`.
struct Own {
    verify: Verify,
    deadline_ms: u64,
    nonce: Option<[u8; 32]>,
    priority: Option<Priority>,
}

fn own_options(own: Option<Options>, verify: Option<String>) -> Result<Own, Failure> {
    let mut options = own.map_or_else(Default::default, |own| own.0);
    let deadline =
        fields::integer("butterfly.deadline_ms", options.remove("deadline_ms").as_ref(), 1..=EXPIRY_MS_MAX as i64)?;
    let priority = priority("butterfly.priority", options.remove("priority").as_ref())?;
    let inner = fields::text("butterfly.verify", options.remove("verify"))?;
    let nonce = fields::text("butterfly.nonce", options.remove("nonce"))?.map(|text| {
        let mut nonce = [0; 32];
        hex::decode_to_slice(&text, &mut nonce)
            .map(|()| nonce)
            .map_err(|_| Failure::invalid_value("butterfly.nonce", "butterfly.nonce must be 64 hex digits"))
    });
    let nonce = nonce.transpose()?;
    // Of our own options none is ignored: a misspelt `verify` must not pass for verification.
    if let Some((name, _)) = options.iter().find(|(_, value)| **value != Setting::Null) {
        let name: String = name.chars().take(64).collect();
        let message =
            format!("butterfly.{name} is not known; there are verify, deadline_ms, nonce and priority in butterfly");
        return Err(Failure::unsupported_parameter(format!("butterfly.{name}"), message));
    }
    let verify = match inner {
        Some(asked) => Verify { field: "butterfly.verify", asked: Some(asked) },
        None => Verify { field: "verify", asked: verify },
    };
    let deadline_ms = deadline.and_then(|ms| u64::try_from(ms).ok()).unwrap_or(EXPIRY_MS_MAX);
    Ok(Own { verify, deadline_ms, nonce, priority })
}

fn mode(verify: &Verify, least: Mode) -> Result<Mode, Failure> {
    let field = verify.field;
    let asked = match verify.asked.as_deref() {
        None => return Ok(least),
        Some("none") => Mode::None,
        Some("full") => Mode::Full,
        Some("quorum") => {
            let message = format!("{field}: quorum is not supported by this version; ask for full");
            return Err(Failure::unsupported_parameter(field, message));
        }
        Some(_) => return Err(Failure::invalid_value(field, format!("{field} must be \"none\" or \"full\""))),
    };
    if asked == Mode::None && least != Mode::None {
        let message =
            format!("{field}: this cluster verifies every answer; a request may ask for more, never for less");
        return Err(Failure::invalid_value(field, message));
    }
    Ok(asked)
}

/// Where sampling starts: from the client's number, else from the nonce.
fn seed(nonce: &[u8; 32], chosen: Option<i64>) -> [u8; 32] {
    let hasher = Sha256::new_with_prefix(b"butterfly/1 seed\0");
    match chosen {
        Some(number) => hasher.chain_update([1]).chain_update(number.to_le_bytes()),
        None => hasher.chain_update([0]).chain_update(nonce),
    }
    .finalize()
    .into()
}

fn check_vector(field: &str, values: &[f32], manifest: &Manifest) -> Result<(), Failure> {
    if manifest.input_width == 0 {
        let message = format!("'{}' takes text or tokens, not a vector: send \"prompt\"", manifest.name);
        return Err(Failure::invalid_value(field, message));
    }
    if values.len() != manifest.input_width {
        let message = format!("{field} must have {} numbers, not {}", manifest.input_width, values.len());
        return Err(Failure::invalid_value(field, message));
    }
    Ok(())
}

/// Refuses a model that generates no text.
///
/// # Errors
/// Says what the model does.
pub(super) fn must_generate(manifest: &Manifest) -> Result<(), Failure> {
    match manifest.architecture {
        Architecture::Llama | Architecture::Mlp => Ok(()),
        Architecture::Bert => {
            let message =
                format!("'{}' gives embeddings, not text: send \"input\" to POST /v1/embeddings", manifest.name);
            Err(Failure::invalid_value("model", message))
        }
    }
}

/// Refuses a model that embeds no text.
///
/// # Errors
/// Says what the model does.
pub(super) fn must_embed(manifest: &Manifest) -> Result<(), Failure> {
    let does = match manifest.architecture {
        Architecture::Bert => return Ok(()),
        Architecture::Llama => "generates text and gives no embeddings: send \"prompt\" to POST /v1/completions",
        Architecture::Mlp => "takes a vector and embeds no text: send \"input\" to POST /inference",
    };
    Err(Failure::invalid_value("model", format!("'{}' {does}", manifest.name)))
}

/// Checks a text that nothing is generated from.
fn check_text(field: &str, tokens: &[u32], manifest: &Manifest) -> Result<(), Failure> {
    check_ids(field, tokens, manifest)?;
    if tokens.len() > manifest.context_length {
        let message = format!("the model takes {} tokens, but {field} has {}", manifest.context_length, tokens.len());
        return Err(Failure::context_length_exceeded(field, message));
    }
    Ok(())
}

/// Checks tokens against the vocabulary.
fn check_ids(field: &str, tokens: &[u32], manifest: &Manifest) -> Result<(), Failure> {
    if manifest.vocabulary == 0 {
        let message = format!("'{}' takes a vector: send \"input\" to POST /inference", manifest.name);
        return Err(Failure::invalid_value(field, message));
    }
    if tokens.is_empty() {
        return Err(Failure::invalid_value(field, format!("{field} is empty")));
    }
    if let Some((at, token)) = tokens.iter().enumerate().find(|(_, token)| !below(**token, manifest.vocabulary)) {
        let message =
            format!("{field}: the model's tokens are below {}, but token {at} is {token}", manifest.vocabulary);
        return Err(Failure::invalid_value(field, message));
    }
    Ok(())
}

/// Checks a prompt against the model; gives the tokens to generate at most.
fn check_tokens(
    field: &str,
    tokens: &[u32],
    max_tokens: Option<u32>,
    tokens_default: u32,
    manifest: &Manifest,
) -> Result<u32, Failure> {
    check_ids(field, tokens, manifest)?;
    let room = manifest.context_length.saturating_sub(tokens.len());
    let room = u32::try_from(room).unwrap_or(u32::MAX);
    let wanted = max_tokens.unwrap_or_else(|| tokens_default.min(room.max(1)));
    if wanted > room {
        let message = format!(
            "the model takes {} tokens in all, but the prompt has {} and the answer may have {wanted}",
            manifest.context_length,
            tokens.len()
        );
        return Err(Failure::context_length_exceeded(field, message));
    }
    Ok(wanted)
}

fn below(token: u32, vocabulary: usize) -> bool {
    usize::try_from(token).is_ok_and(|token| token < vocabulary)
}

/// A rule of requests that the checks before do not cover.
fn refused(field: &'static str, error: &RequestError) -> Failure {
    let param = match error {
        RequestError::TooLong { field, .. } | RequestError::Empty { field } | RequestError::Range { field } => field,
        RequestError::Codec(_) | RequestError::BiasOrder | RequestError::ExpiresBeforeNow => field,
    };
    Failure::invalid_value(param, error.to_string())
}

#[cfg(test)]
mod tests;
