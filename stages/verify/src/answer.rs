//! What is answered: the last boundary.
//!
//! An answer is a pure function of its request. It covers the token ids, the text's exact bytes, the reason it ended, the
//! usage and the choice; log-probabilities are not covered. Refusals, timeouts and overload are not answers.

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, DecodeProblem, Reader, Writer};
use crate::digest::{Digest, Purpose, hash};
use crate::limits::{ANSWER_BYTES_MAX, ANSWER_TEXT_BYTES_MAX, TOKENS_MAX, VALUES_MAX};
use crate::request::Request;
use crate::text::{self, JsonError};

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// End of sequence, or a stop string.
    Stop,
    /// The most tokens the request or the model's context allows.
    Length,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// Generated text.
    Text {
        /// Every token sampled, in order, **the one that ended the answer included**: all but the last were fed back. Empty
        /// only where none was asked for.
        tokens: Vec<u32>,
        /// The bytes shown to the client: without end-of-sequence, cut before a stop string.
        #[serde(with = "text::text_or_hex")]
        text: Vec<u8>,
        /// Why it ended.
        finish: Finish,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// The choice the request asked for.
        choice: u32,
    },
    /// An output row of finite numbers.
    Vector {
        /// The values.
        #[serde(with = "text::floats")]
        values: Vec<f32>,
    },
    /// A NaN or an infinity came up, so there is no answer; that there is none is certified like one.
    Numeric {
        /// The tokens sampled before, every one of them fed back; empty for a vector.
        tokens: Vec<u32>,
        /// Tokens of the prompt; 0 for a vector.
        prompt_tokens: u32,
        /// The choice the request asked for.
        choice: u32,
    },
}

/// How an answer cannot be one to a request, whatever the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Text for a vector, or a vector for text.
    #[error("the answer is of another kind than the request")]
    Kind,
    /// Another choice than the request's.
    #[error("the answer is another choice than the request's")]
    Choice,
    /// Another number of prompt tokens than the request's.
    #[error("the answer counts another number of prompt tokens than the request")]
    PromptTokens,
    /// Too few tokens, or more than the request allows.
    #[error("the answer's number of tokens is none the request allows")]
    Tokens,
}

impl Answer {
    /// The root of the last boundary: the digest of the canonical bytes.
    pub fn root(&self) -> Digest {
        hash(Purpose::Answer, &[&self.encode()])
    }

    /// The root of the answer whose canonical bytes these are.
    pub fn root_of(encoded: &[u8]) -> Digest {
        hash(Purpose::Answer, &[encoded])
    }

    /// Canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(64);
        match self {
            Self::Text { tokens, text, finish, prompt_tokens, choice } => {
                writer.u8(0);
                writer.tokens(tokens);
                writer.bytes(text);
                writer.u8(match finish {
                    Finish::Stop => 0,
                    Finish::Length => 1,
                });
                writer.u32(*prompt_tokens);
                writer.u32(*choice);
            }
            Self::Vector { values } => {
                writer.u8(1);
                writer.floats(values);
            }
            Self::Numeric { tokens, prompt_tokens, choice } => {
                writer.u8(2);
                writer.tokens(tokens);
                writer.u32(*prompt_tokens);
                writer.u32(*choice);
            }
        }
        writer.finish()
    }

    /// Reads canonical bytes, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let answer = read(&mut reader)?;
        reader.end("answer")?;
        Ok(answer)
    }

    /// Reads the JSON form.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        text::from_json(text)
    }

    /// Writes the JSON form.
    pub fn to_json(&self) -> String {
        text::to_json(self)
    }

    /// Whether this could be an answer to the request, by everything that can be said without the model.
    pub fn fits(&self, request: &Request) -> Result<(), Misfit> {
        let Some(prompt) = request.input.tokens() else {
            return match self {
                Self::Vector { .. } => Ok(()),
                Self::Numeric { tokens, prompt_tokens: 0, choice: 0 } if tokens.is_empty() => Ok(()),
                Self::Numeric { .. } | Self::Text { .. } => Err(Misfit::Kind),
            };
        };
        let is_embedding = !request.generates();
        let least = usize::from(request.params.max_tokens > 0);
        let (tokens, prompt_tokens, choice, least, spare) = match self {
            Self::Vector { .. } if is_embedding => return Ok(()),
            Self::Text { .. } if is_embedding => return Err(Misfit::Kind),
            Self::Text { tokens, prompt_tokens, choice, .. } => (tokens, prompt_tokens, choice, least, 0),
            // Each token was sampled and fed back, and did not end the answer: one more was wanted.
            Self::Numeric { tokens, prompt_tokens, choice } => (tokens, prompt_tokens, choice, 0, 1),
            Self::Vector { .. } => return Err(Misfit::Kind),
        };
        if *choice != request.params.choice {
            return Err(Misfit::Choice);
        }
        if usize::try_from(*prompt_tokens) != Ok(prompt.len()) {
            return Err(Misfit::PromptTokens);
        }
        let most = usize::try_from(request.params.max_tokens).unwrap_or(usize::MAX).saturating_sub(spare);
        if tokens.len() < least || tokens.len() > most {
            return Err(Misfit::Tokens);
        }
        Ok(())
    }

    /// Whether the encoding would be read again: lengths within their limits, numbers finite.
    pub(crate) fn is_readable(&self) -> bool {
        match self {
            Self::Text { tokens, text, .. } => tokens.len() <= TOKENS_MAX && text.len() <= ANSWER_TEXT_BYTES_MAX,
            Self::Vector { values } => values.len() <= VALUES_MAX && values.iter().all(|value| value.is_finite()),
            Self::Numeric { tokens, .. } => tokens.len() <= TOKENS_MAX,
        }
    }
}

fn read(reader: &mut Reader<'_>) -> Result<Answer, DecodeError> {
    enum Kind {
        Text,
        Vector,
        Numeric,
    }
    let kind = reader.choice("answer", |byte| match byte {
        0 => Some(Kind::Text),
        1 => Some(Kind::Vector),
        2 => Some(Kind::Numeric),
        _ => None,
    })?;
    Ok(match kind {
        Kind::Text => Answer::Text {
            tokens: reader.tokens("answer.tokens", TOKENS_MAX)?,
            text: reader.bytes("answer.text", ANSWER_TEXT_BYTES_MAX)?.to_vec(),
            finish: reader.choice("answer.finish", |byte| match byte {
                0 => Some(Finish::Stop),
                1 => Some(Finish::Length),
                _ => None,
            })?,
            prompt_tokens: reader.u32("answer.prompt_tokens")?,
            choice: reader.u32("answer.choice")?,
        },
        Kind::Vector => {
            let before = reader.clone();
            let values = reader.floats("answer.values", VALUES_MAX)?;
            if !values.iter().all(|value| value.is_finite()) {
                before.error("answer.values", DecodeProblem::NotFinite)?;
            }
            Answer::Vector { values }
        }
        Kind::Numeric => Answer::Numeric {
            tokens: reader.tokens("answer.tokens", TOKENS_MAX)?,
            prompt_tokens: reader.u32("answer.prompt_tokens")?,
            choice: reader.u32("answer.choice")?,
        },
    })
}

// The longest answer of each kind fits its byte limit.
const _: () = assert!(4 * TOKENS_MAX + ANSWER_TEXT_BYTES_MAX + 64 <= ANSWER_BYTES_MAX);
const _: () = assert!(4 * VALUES_MAX + 64 <= ANSWER_BYTES_MAX);
