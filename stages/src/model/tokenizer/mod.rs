//! Tokenizers from `tokenizer.json`: BPE over bytes, BPE over characters that falls back to bytes, and WordPiece.
//!
//! Purpose: text to token ids and token ids to exact bytes. Both are part of the function that replicas agree on, so
//! they depend on the file alone.
//!
//! Invariants: every id the tokenizer can give is below the model's vocabulary; ids are distinct and each stands for one
//! string; in BPE the 256 bytes all have a token, so no byte of a prompt is dropped; nothing random (dropout) and nothing
//! that pads takes part, and texts are cut only where the model says so. The file is checked here before the tokenizers crate sees it, because that crate
//! indexes by what the file says and resolves repeated ids by the order of a randomly seeded map.
//!
//! It refuses to know about chat templates and stop strings. WordPiece loses spaces and capitals, so the bytes of its tokens
//! are for people to read.

mod declared;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use declared::{Affixes, Declared, Meaning};

/// Length of a text to encode, at most.
pub const TEXT_BYTES_MAX: usize = 1 << 20;

/// A tokenizer. Clones share the tables.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    /// Tokens of a text at most, those around it included; the rest is cut off.
    tokens_max: Option<usize>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    /// The bytes of every id of the model's vocabulary, one after the other.
    bytes: Vec<u8>,
    /// Where the bytes of each id end.
    ends: Vec<u32>,
    /// What goes around every text.
    affixes: Affixes,
    /// The strings of special tokens.
    specials: Vec<String>,
}

/// Why a `tokenizer.json` cannot be used. Every variant says where in the file.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Not JSON of the expected shape.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// What the parser said, with line and column.
        problem: String,
    },
    /// A part of the tokenizer is not one that this build runs.
    #[error("{file}: '{field}' = {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        file: String,
        /// Path of the field.
        field: String,
        /// What it holds.
        found: String,
        /// What could be run.
        supported: &'static str,
    },
    /// Two tokens share an id, or one token has two.
    #[error("{file}: tokens {first:?} and {second:?} have the same string or id ({id})")]
    Repeated {
        /// The file.
        file: String,
        /// The earlier token.
        first: String,
        /// The later token.
        second: String,
        /// The id.
        id: u32,
    },
    /// An id that the model has no embedding for.
    #[error("{file}: token {token:?} has id {id}; the model's vocabulary ends at {vocabulary}")]
    OutsideVocabulary {
        /// The file.
        file: String,
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// Ids of the model are below this.
        vocabulary: usize,
    },
    /// A merge names a token that is not in the vocabulary, or makes one.
    #[error("{file}: merge {merge} needs token {token:?}, which is not in the vocabulary")]
    Merge {
        /// The file.
        file: String,
        /// Index of the merge.
        merge: usize,
        /// The token.
        token: String,
    },
    /// A byte has no token, so a prompt could lose it.
    #[error("{file}: no token for byte {byte:#04x}")]
    ByteMissing {
        /// The file.
        file: String,
        /// The byte.
        byte: u8,
    },
}

/// Why a text cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The text is longer than is allowed.
    #[error("the text has {found} bytes; at most {TEXT_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// The tokenizer gave up.
    #[error("the text cannot be tokenised: {problem}")]
    Failed {
        /// What it said.
        problem: String,
    },
}

impl Tokenizer {
    /// Parses and checks a `tokenizer.json` for a model whose ids are below `vocabulary`. `file` is how errors name it.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`].
    pub fn parse(file: &str, text: &[u8], vocabulary: usize) -> Result<Self, TokenizerError> {
        let malformed = |problem: String| TokenizerError::Malformed { file: file.to_owned(), problem };
        let declared: Declared = serde_json::from_slice(text).map_err(|error| malformed(error.to_string()))?;
        let meanings = declared.check(file, vocabulary)?;
        let affixes = declared.affixes(file, vocabulary)?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(text))
            .map_err(|panic| malformed(panic.to_owned()))?
            .map_err(|error| malformed(error.to_string()))?;
        // What the file says about shortening and padding is meant for training batches.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        // The crate's template indexes by what the file says; what it adds is added in `encode`.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        for added in &declared.added_tokens {
            if inner.token_to_id(&added.content) != Some(added.id) {
                return Err(malformed(format!("added token {:?} does not keep its id {}", added.content, added.id)));
            }
        }
        let (bytes, ends) = byte_table(&meanings, vocabulary);
        let specials = declared.added_tokens.iter().filter(|token| token.special);
        let specials = specials.map(|token| token.content.clone()).collect();
        Ok(Self { shared: Arc::new(Shared { inner, bytes, ends, affixes, specials }), tokens_max: None })
    }

    /// The same tokenizer, cutting what a text has beyond so many tokens. What goes around a text stays.
    #[must_use]
    pub(super) fn cutting(self, tokens_max: Option<usize>) -> Self {
        Self { tokens_max, ..self }
    }

    /// Whether texts of any length fit, because they are cut.
    #[must_use]
    pub fn cuts(&self) -> bool {
        self.tokens_max.is_some()
    }

    /// The ids of a text, with what the file's post-processor adds (a beginning-of-sequence token, say). The text of a
    /// special token becomes that token, as transformers does.
    ///
    /// # Errors
    ///
    /// [`EncodeError`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let Affixes { before, after } = &self.shared.affixes;
        let ids = self.encode_bare(text)?;
        let room = self.tokens_max.map_or(ids.len(), |max| max.saturating_sub(before.len() + after.len()));
        Ok([before, ids.get(..room).unwrap_or(&ids), after].concat())
    }

    /// The ids of a text, with nothing around them.
    ///
    /// # Errors
    ///
    /// [`EncodeError`].
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(EncodeError::TooLong { found: text.len() });
        }
        let encoding = guarded(|| self.shared.inner.encode_fast(text, false))
            .map_err(|panic| EncodeError::Failed { problem: panic.to_owned() })?
            .map_err(|error| EncodeError::Failed { problem: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The exact bytes of a token: possibly not UTF-8 on its own, empty for special tokens and unknown ids.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let Ok(id) = usize::try_from(id) else { return &[] };
        let end = |id: usize| self.shared.ends.get(id).map(|end| *end as usize);
        let start = id.checked_sub(1).map_or(Some(0), end);
        match (start, end(id)) {
            (Some(start), Some(end)) => self.shared.bytes.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }

    /// The text of tokens, special ones written out, with U+FFFD for bytes that are no UTF-8.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut bytes = Vec::new();
        for token in tokens {
            match self.special_text(*token) {
                Some(text) => bytes.extend_from_slice(text.as_bytes()),
                None => bytes.extend_from_slice(self.token_bytes(*token)),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How the file writes its special tokens. Where a text has one of these, encoding gives that token.
    #[must_use]
    pub fn special_texts(&self) -> &[String] {
        &self.shared.specials
    }

    /// How the file writes a token that has no bytes of its own: a special one.
    #[must_use]
    pub fn special_text(&self, id: u32) -> Option<String> {
        if self.token_bytes(id).is_empty() { self.shared.inner.id_to_token(id) } else { None }
    }

    /// Ids of the model are below this.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.shared.ends.len()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocabulary", &self.vocabulary()).finish_non_exhaustive()
    }
}

/// Runs code of the tokenizers crate, which indexes freely: neither a file nor a prompt may take the node down.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, &'static str> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|_| "the tokenizer library panicked")
}

/// The character that SentencePiece puts for a space.
const SPACE: char = '▁';

/// The bytes of each id in one buffer, and where they end.
fn byte_table(meanings: &BTreeMap<u32, Meaning<'_>>, vocabulary: usize) -> (Vec<u8>, Vec<u32>) {
    let alphabet: BTreeMap<char, u8> = (0..=255_u8).map(|byte| (byte_char(byte), byte)).collect();
    let mut bytes = Vec::new();
    let mut ends = Vec::with_capacity(vocabulary);
    for id in 0..u32::try_from(vocabulary).unwrap_or(u32::MAX) {
        match meanings.get(&id) {
            Some(Meaning::Bytes(token)) => {
                match token.chars().map(|char| alphabet.get(&char).copied()).collect::<Option<Vec<u8>>>() {
                    Some(exact) => bytes.extend_from_slice(&exact),
                    // Not over the alphabet: transformers takes such a token for its own text.
                    None => bytes.extend_from_slice(token.as_bytes()),
                }
            }
            Some(Meaning::Literal(text)) => bytes.extend_from_slice(text.as_bytes()),
            Some(Meaning::Spaced(text)) => bytes.extend_from_slice(text.replace(SPACE, " ").as_bytes()),
            Some(Meaning::Word(text)) => bytes.extend([b" ", text.as_bytes()].concat()),
            Some(Meaning::Byte(byte)) => bytes.push(*byte),
            Some(Meaning::Special) | None => {}
        }
        // The file has at most 64 MiB, so the total fits.
        ends.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    }
    (bytes, ends)
}

/// The character that stands for a byte in a byte-level vocabulary: printable ones stand for themselves, the others
/// follow from U+0100 (GPT-2's `bytes_to_unicode`).
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|byte| !printable(*byte)).count();
    u32::try_from(rank).ok().and_then(|rank| char::from_u32(0x100 + rank)).unwrap_or(char::REPLACEMENT_CHARACTER)
}
