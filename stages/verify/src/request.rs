//! What is asked, with every default resolved.
//!
//! A [`Request`] holds all that its answer depends on (input, parameters, seed, explicit `now`) and is valid by
//! construction: it exists only if its parts keep every bound and rule. Its digest `rd` names it in every vote. It does
//! not know who computes it, and never tokenises: that the tokens belong to the prompt is checked where a tokenizer is.

use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::{DecodeError, Reader, Writer};
use crate::digest::{Digest, Purpose, hash};
use crate::limits::{
    EXPIRY_MS_MAX, LOGIT_BIAS_MAX, LOGPROBS_MAX, NAME_BYTES_MAX, PROMPT_BYTES_MAX, REQUEST_BYTES_MAX, STOP_BYTES_MAX,
    STOPS_MAX, TOKENS_MAX, VALUES_MAX,
};
use crate::text::{self, JsonError};

/// How many votes the client wants behind its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One node's word: a single vote per slice, never called verified.
    None,
    /// One generates, f others replay: f+1 votes per slice.
    Quorum,
    /// Every replica computes: f+1 equal votes per slice.
    Full,
}

impl Mode {
    /// Votes per slice that certify in an epoch that tolerates `max_byzantine`.
    pub fn votes(self, max_byzantine: u16) -> usize {
        match self {
            Self::None => 1,
            Self::Quorum | Self::Full => usize::from(max_byzantine).saturating_add(1),
        }
    }
}

/// What the model is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Input {
    /// A prompt and the tokens the gateway made of it. Replicas tokenise again before they vote.
    Text {
        /// The prompt as given.
        prompt: String,
        /// 1 to [`TOKENS_MAX`] token ids.
        tokens: Vec<u32>,
    },
    /// Messages of a chat and the tokens the gateway made of them. Replicas render and tokenise them again before they vote.
    Chat {
        /// The messages, as JSON in the form that the replicas' chat templates take.
        messages: String,
        /// 1 to [`TOKENS_MAX`] token ids.
        tokens: Vec<u32>,
    },
    /// Token ids as given by the client.
    Tokens {
        /// 1 to [`TOKENS_MAX`] token ids.
        tokens: Vec<u32>,
    },
    /// One row of finite numbers.
    Vector {
        /// 1 to [`VALUES_MAX`] values.
        #[serde(with = "text::floats")]
        values: Vec<f32>,
    },
}

impl Input {
    /// The prompt's tokens; none for a vector.
    pub fn tokens(&self) -> Option<&[u32]> {
        match self {
            Self::Text { tokens, .. } | Self::Chat { tokens, .. } | Self::Tokens { tokens } => Some(tokens),
            Self::Vector { .. } => None,
        }
    }
}

/// How to generate. An answer that is a vector depends on none of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Tokens to generate at most. With 0 nothing is generated, and the answer is a vector (what a dense network gives, or
    /// the embedding of a text), or with `prompt_logprobs` an empty text.
    pub max_tokens: u32,
    /// 0 is greedy.
    #[serde(with = "text::float")]
    pub temperature: f32,
    /// Candidates kept by rank; 0 keeps all.
    pub top_k: u32,
    /// Candidates kept by probability mass; 1 keeps all.
    #[serde(with = "text::float")]
    pub top_p: f32,
    /// Taken from the logit of every token generated before.
    #[serde(with = "text::float")]
    pub presence_penalty: f32,
    /// Taken from the logit once for each time a token was generated before.
    #[serde(with = "text::float")]
    pub frequency_penalty: f32,
    /// Added to logits: (token, bias), tokens strictly ascending.
    #[serde(with = "text::bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Where sampling starts.
    #[serde(with = "text::hex_bytes")]
    pub seed: [u8; 32],
    /// Strings that end the answer; none empty.
    pub stop: Vec<String>,
    /// Whether to generate past the end-of-sequence token.
    pub ignore_eos: bool,
    /// Which of several choices for one prompt this is, from 0.
    pub choice: u32,
    /// Whether log-probabilities are to come beside the tokens, and of how many of the likeliest; at most
    /// [`LOGPROBS_MAX`]. Votes do not cover them.
    pub logprobs: Option<u8>,
    /// Whether those of the prompt's tokens are to come before them. Then `max_tokens` may be 0 for a text all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prompt_logprobs: bool,
}

impl Default for Params {
    /// Greedy, 16 tokens, nothing else.
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: [0; 32],
            stop: Vec::new(),
            ignore_eos: false,
            choice: 0,
            logprobs: None,
            prompt_logprobs: false,
        }
    }
}

/// The fields of a [`Request`], before they are known to be valid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestParts {
    /// Who asks, as the gateway knows them; may be empty.
    pub client: String,
    /// Makes otherwise equal requests different.
    #[serde(with = "text::hex_bytes")]
    pub nonce: [u8; 32],
    /// The model's name.
    pub model: String,
    /// How many votes stand behind the answer.
    pub mode: Mode,
    /// What the model is given.
    pub input: Input,
    /// How to generate.
    pub params: Params,
    /// The time this request takes for now, in milliseconds since 1970.
    pub now_ms: u64,
    /// When it is void: not before `now_ms`, and at most [`EXPIRY_MS_MAX`] after it.
    pub expires_ms: u64,
}

/// Which rule of a request is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The bytes are not a request.
    #[error("request: {0}")]
    Codec(#[from] DecodeError),
    /// A field is longer or larger than its limit.
    #[error("{field}: {found} is more than the {max} allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length or value.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A field is empty that must not be.
    #[error("{field} is empty")]
    Empty {
        /// The field.
        field: &'static str,
    },
    /// A number is NaN, infinite or outside its range.
    #[error("{field} is not a number in its range")]
    Range {
        /// The field.
        field: &'static str,
    },
    /// `logit_bias` is not strictly ascending by token.
    #[error("params.logit_bias is not strictly ascending by token")]
    BiasOrder,
    /// `expires_ms` is before `now_ms`.
    #[error("expires_ms is before now_ms")]
    ExpiresBeforeNow,
}

/// Set in the byte that says of how many tokens log-probabilities are wanted, if they are wanted of the prompt too.
const OF_THE_PROMPT: u8 = 0x80;

/// A valid request. Cheap to clone; reads like its [`RequestParts`].
#[derive(Clone)]
pub struct Request(Arc<Inner>);

struct Inner {
    parts: RequestParts,
    digest: Digest,
}

impl Request {
    /// Checks the parts.
    pub fn new(parts: RequestParts) -> Result<Self, RequestError> {
        check(&parts)?;
        let bytes = write(&parts);
        at_most("request", bytes.len(), REQUEST_BYTES_MAX)?;
        Ok(Self::seal(parts, &bytes))
    }

    fn seal(parts: RequestParts, bytes: &[u8]) -> Self {
        let digest = hash(Purpose::Request, &[bytes]);
        Self(Arc::new(Inner { parts, digest }))
    }

    /// `rd`: the digest of the canonical bytes.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// The fields.
    pub fn parts(&self) -> &RequestParts {
        &self.0.parts
    }

    /// Whether the answer is text, be it an empty one.
    pub fn generates(&self) -> bool {
        self.input.tokens().is_some() && (self.params.max_tokens > 0 || self.params.prompt_logprobs)
    }

    /// Tokens of the prompt that come with their log-probabilities before the generated ones: all of them, or none.
    pub fn scored_tokens(&self) -> usize {
        self.input.tokens().filter(|_| self.params.prompt_logprobs).map_or(0, <[u32]>::len)
    }

    /// Canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        write(&self.0.parts)
    }

    /// Reads canonical bytes, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, RequestError> {
        at_most("request", bytes.len(), REQUEST_BYTES_MAX)?;
        let mut reader = Reader::new(bytes);
        let parts = read(&mut reader)?;
        reader.end("request")?;
        check(&parts)?;
        Ok(Self::seal(parts, bytes))
    }

    /// Reads the JSON form.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        text::from_json(text)
    }

    /// Writes the JSON form.
    pub fn to_json(&self) -> String {
        text::to_json(self)
    }
}

impl Deref for Request {
    type Target = RequestParts;

    fn deref(&self) -> &RequestParts {
        &self.0.parts
    }
}

impl PartialEq for Request {
    fn eq(&self, other: &Self) -> bool {
        self.digest() == other.digest()
    }
}

impl Eq for Request {}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("digest", &self.0.digest).field("parts", &self.0.parts).finish()
    }
}

impl Serialize for Request {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.parts.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Request {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(RequestParts::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn check(parts: &RequestParts) -> Result<(), RequestError> {
    at_most("client", parts.client.len(), NAME_BYTES_MAX)?;
    at_most("model", parts.model.len(), NAME_BYTES_MAX)?;
    match &parts.input {
        Input::Text { prompt, tokens } => {
            at_most("input.prompt", prompt.len(), PROMPT_BYTES_MAX)?;
            some_at_most("input.tokens", tokens.len(), TOKENS_MAX)?;
        }
        Input::Chat { messages, tokens } => {
            at_most("input.messages", messages.len(), PROMPT_BYTES_MAX)?;
            some_at_most("input.tokens", tokens.len(), TOKENS_MAX)?;
        }
        Input::Tokens { tokens } => some_at_most("input.tokens", tokens.len(), TOKENS_MAX)?,
        Input::Vector { values } => {
            some_at_most("input.values", values.len(), VALUES_MAX)?;
            in_range("input.values", values.iter().all(|value| value.is_finite()))?;
        }
    }
    check_params(&parts.params)?;
    match parts.expires_ms.checked_sub(parts.now_ms) {
        None => Err(RequestError::ExpiresBeforeNow),
        Some(ahead) if ahead > EXPIRY_MS_MAX => {
            Err(RequestError::TooLong { field: "expires_ms - now_ms", found: ahead, max: EXPIRY_MS_MAX })
        }
        Some(_) => Ok(()),
    }
}

fn check_params(params: &Params) -> Result<(), RequestError> {
    let max_tokens = usize::try_from(params.max_tokens).unwrap_or(usize::MAX);
    at_most("params.max_tokens", max_tokens, TOKENS_MAX)?;
    in_range("params.temperature", params.temperature.is_finite() && params.temperature >= 0.0)?;
    in_range("params.top_p", (0.0..=1.0).contains(&params.top_p))?;
    in_range("params.presence_penalty", params.presence_penalty.is_finite())?;
    in_range("params.frequency_penalty", params.frequency_penalty.is_finite())?;
    at_most("params.logit_bias", params.logit_bias.len(), LOGIT_BIAS_MAX)?;
    in_range("params.logit_bias", params.logit_bias.iter().all(|(_, bias)| bias.is_finite()))?;
    if !params.logit_bias.iter().is_sorted_by(|(left, _), (right, _)| left < right) {
        return Err(RequestError::BiasOrder);
    }
    at_most("params.logprobs", params.logprobs.unwrap_or(0).into(), LOGPROBS_MAX.into())?;
    in_range("params.prompt_logprobs", params.logprobs.is_some() || !params.prompt_logprobs)?;
    at_most("params.stop", params.stop.len(), STOPS_MAX)?;
    params.stop.iter().try_for_each(|stop| some_at_most("params.stop", stop.len(), STOP_BYTES_MAX))
}

fn at_most(field: &'static str, found: usize, max: usize) -> Result<(), RequestError> {
    if found > max {
        let wide = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
        return Err(RequestError::TooLong { field, found: wide(found), max: wide(max) });
    }
    Ok(())
}

fn some_at_most(field: &'static str, found: usize, max: usize) -> Result<(), RequestError> {
    if found == 0 {
        return Err(RequestError::Empty { field });
    }
    at_most(field, found, max)
}

fn in_range(field: &'static str, holds: bool) -> Result<(), RequestError> {
    if holds { Ok(()) } else { Err(RequestError::Range { field }) }
}

fn write(parts: &RequestParts) -> Vec<u8> {
    let mut writer = Writer::with_capacity(256);
    writer.bytes(parts.client.as_bytes());
    writer.raw(&parts.nonce);
    writer.bytes(parts.model.as_bytes());
    writer.u8(match parts.mode {
        Mode::None => 0,
        Mode::Quorum => 1,
        Mode::Full => 2,
    });
    match &parts.input {
        Input::Text { prompt, tokens } => {
            writer.u8(0);
            writer.bytes(prompt.as_bytes());
            writer.tokens(tokens);
        }
        Input::Tokens { tokens } => {
            writer.u8(1);
            writer.tokens(tokens);
        }
        Input::Vector { values } => {
            writer.u8(2);
            writer.floats(values);
        }
        Input::Chat { messages, tokens } => {
            writer.u8(3);
            writer.bytes(messages.as_bytes());
            writer.tokens(tokens);
        }
    }
    let params = &parts.params;
    writer.u32(params.max_tokens);
    writer.f32(params.temperature);
    writer.u32(params.top_k);
    writer.f32(params.top_p);
    writer.f32(params.presence_penalty);
    writer.f32(params.frequency_penalty);
    writer.length(params.logit_bias.len());
    for (token, bias) in &params.logit_bias {
        writer.u32(*token);
        writer.f32(*bias);
    }
    writer.raw(&params.seed);
    writer.length(params.stop.len());
    for stop in &params.stop {
        writer.bytes(stop.as_bytes());
    }
    writer.flag(params.ignore_eos);
    writer.u32(params.choice);
    writer.u8(params.logprobs.map_or(0, |top| (top + 1) | if params.prompt_logprobs { OF_THE_PROMPT } else { 0 }));
    writer.u64(parts.now_ms);
    writer.u64(parts.expires_ms);
    writer.finish()
}

fn read(reader: &mut Reader<'_>) -> Result<RequestParts, DecodeError> {
    Ok(RequestParts {
        client: reader.string("client", NAME_BYTES_MAX)?,
        nonce: reader.array("nonce")?,
        model: reader.string("model", NAME_BYTES_MAX)?,
        mode: reader.choice("mode", |byte| match byte {
            0 => Some(Mode::None),
            1 => Some(Mode::Quorum),
            2 => Some(Mode::Full),
            _ => None,
        })?,
        input: read_input(reader)?,
        params: read_params(reader)?,
        now_ms: reader.u64("now_ms")?,
        expires_ms: reader.u64("expires_ms")?,
    })
}

fn read_input(reader: &mut Reader<'_>) -> Result<Input, DecodeError> {
    enum Kind {
        Text,
        Tokens,
        Vector,
        Chat,
    }
    let kind = reader.choice("input", |byte| match byte {
        0 => Some(Kind::Text),
        1 => Some(Kind::Tokens),
        2 => Some(Kind::Vector),
        3 => Some(Kind::Chat),
        _ => None,
    })?;
    Ok(match kind {
        Kind::Chat => Input::Chat {
            messages: reader.string("input.messages", PROMPT_BYTES_MAX)?,
            tokens: reader.tokens("input.tokens", TOKENS_MAX)?,
        },
        Kind::Text => Input::Text {
            prompt: reader.string("input.prompt", PROMPT_BYTES_MAX)?,
            tokens: reader.tokens("input.tokens", TOKENS_MAX)?,
        },
        Kind::Tokens => Input::Tokens { tokens: reader.tokens("input.tokens", TOKENS_MAX)? },
        Kind::Vector => Input::Vector { values: reader.floats("input.values", VALUES_MAX)? },
    })
}

fn read_params(reader: &mut Reader<'_>) -> Result<Params, DecodeError> {
    let mut params = Params {
        max_tokens: reader.u32("params.max_tokens")?,
        temperature: reader.f32("params.temperature")?,
        top_k: reader.u32("params.top_k")?,
        top_p: reader.f32("params.top_p")?,
        presence_penalty: reader.f32("params.presence_penalty")?,
        frequency_penalty: reader.f32("params.frequency_penalty")?,
        logit_bias: read_bias(reader)?,
        seed: reader.array("params.seed")?,
        stop: read_stops(reader)?,
        ignore_eos: reader.flag("params.ignore_eos")?,
        choice: reader.u32("params.choice")?,
        logprobs: None,
        prompt_logprobs: false,
    };
    (params.logprobs, params.prompt_logprobs) = reader.choice("params.logprobs", |byte| match byte {
        0 => Some((None, false)),
        byte => {
            let top = (byte & !OF_THE_PROMPT).checked_sub(1).filter(|top| *top <= LOGPROBS_MAX)?;
            Some((Some(top), byte & OF_THE_PROMPT != 0))
        }
    })?;
    Ok(params)
}

fn read_bias(reader: &mut Reader<'_>) -> Result<Vec<(u32, f32)>, DecodeError> {
    let count = reader.length("params.logit_bias", LOGIT_BIAS_MAX, 8)?;
    (0..count).map(|_| Ok((reader.u32("params.logit_bias")?, reader.f32("params.logit_bias")?))).collect()
}

fn read_stops(reader: &mut Reader<'_>) -> Result<Vec<String>, DecodeError> {
    let count = reader.length("params.stop", STOPS_MAX, 4)?;
    (0..count).map(|_| reader.string("params.stop", STOP_BYTES_MAX)).collect()
}
