//! What a `tokenizer.json` declares, checked before anything runs on it.
//!
//! Invariants: what passes here can be given to the tokenizers crate without an index out of range, and means the same
//! in every process. It refuses to know how text is split and merged.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

use super::{SPACE, TokenizerError, byte_char};

/// Nesting of normalizers and pre-tokenizers in sequences, at most.
const NESTING_MAX: usize = 4;
/// Tokens that a post-processor may put on either side of a text.
const AFFIX_TOKENS_MAX: usize = 16;
/// Length of a value quoted in an error, in characters.
const QUOTED_CHARS_MAX: usize = 80;
const AFFIXES: &str =
    "null, ByteLevel, BertProcessing, a TemplateProcessing of special tokens around one $A, or a Sequence of them";
/// Forms of Unicode and the like, which change no boundary of tokens by themselves.
const FORMS: [&str; 6] = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"];

/// The parts of `tokenizer.json` that are checked here.
#[derive(Deserialize)]
pub(super) struct Declared {
    #[serde(default)]
    pub(super) added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Tokens,
}

/// How a text becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// BPE over an alphabet of 256 characters that stand for bytes.
    ByteLevel,
    /// BPE over characters, with a token for each byte of what has none.
    ByteFallback,
    /// Longest matches within words.
    WordPiece,
}

#[derive(Deserialize)]
pub(super) struct Added {
    pub(super) id: u32,
    pub(super) content: String,
    pub(super) special: bool,
}

#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    r#type: Value,
    #[serde(default)]
    unk_token: Value,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    byte_fallback: Value,
    vocab: Vocabulary,
    #[serde(default)]
    merges: Vec<Merge>,
}

/// A merge in the newer spelling or the older one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// Token strings and ids as the file lists them, repeats included.
struct Vocabulary(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocabulary(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// Tokens that the post-processor puts around every text.
#[derive(Debug, Default)]
pub(super) struct Affixes {
    pub(super) before: Vec<u32>,
    pub(super) after: Vec<u32>,
}

/// What an id stands for.
pub(super) enum Meaning<'a> {
    /// A string over the byte-level alphabet.
    Bytes(&'a str),
    /// Text as it is.
    Literal(&'a str),
    /// Text with [`SPACE`] for spaces.
    Spaced(&'a str),
    /// Text after a space.
    Word(&'a str),
    /// One byte.
    Byte(u8),
    /// No text at all.
    Special,
}

impl Declared {
    /// Checks everything the module promises; gives what each id stands for.
    pub(super) fn check(&self, file: &str, vocabulary: usize) -> Result<BTreeMap<u32, Meaning<'_>>, TokenizerError> {
        let kind = self.kind();
        self.check_parts(file, kind)?;
        let mut ids = self.check_vocabulary(file, vocabulary)?;
        self.check_merges(file, &ids)?;
        self.check_every_text(file, kind, &ids)?;
        let mut strings: BTreeMap<u32, &str> = ids.iter().map(|(token, id)| (*id, *token)).collect();
        let mut meanings: BTreeMap<u32, Meaning<'_>> =
            ids.iter().map(|(token, id)| (*id, self.meaning(kind, token))).collect();
        let mut added: BTreeSet<u32> = BTreeSet::new();
        for token in &self.added_tokens {
            let (content, id) = (token.content.as_str(), token.id);
            outside(file, content, id, vocabulary)?;
            // An added token is either new, or one of the model's own with the same id.
            let (same_string, same_id) = (ids.insert(content, id), strings.insert(id, content));
            let agree = same_string.is_none_or(|known| known == id) && same_id.is_none_or(|known| known == content);
            if !agree || !added.insert(id) {
                let first = same_id.unwrap_or(content).to_owned();
                return Err(TokenizerError::Repeated { file: file.to_owned(), first, second: content.to_owned(), id });
            }
            meanings.insert(id, if token.special { Meaning::Special } else { Meaning::Literal(content) });
        }
        Ok(meanings)
    }

    fn kind(&self) -> Kind {
        match &self.model {
            model if model.r#type == "WordPiece" => Kind::WordPiece,
            model if model.byte_fallback == true => Kind::ByteFallback,
            _ => Kind::ByteLevel,
        }
    }

    /// What precedes a piece that continues a word.
    fn continuing_prefix(&self) -> &str {
        self.model.continuing_subword_prefix.as_str().unwrap_or("##")
    }

    fn meaning<'a>(&self, kind: Kind, token: &'a str) -> Meaning<'a> {
        match kind {
            Kind::ByteLevel => Meaning::Bytes(token),
            Kind::ByteFallback => byte_of(token).map_or(Meaning::Spaced(token), Meaning::Byte),
            Kind::WordPiece => {
                token.strip_prefix(self.continuing_prefix()).map_or(Meaning::Word(token), Meaning::Literal)
            }
        }
    }

    /// Whether every text comes to tokens: each byte has one, or what has none becomes the unknown token.
    fn check_every_text(&self, file: &str, kind: Kind, ids: &BTreeMap<&str, u32>) -> Result<(), TokenizerError> {
        let missing = |byte: u8| match kind {
            Kind::ByteLevel => !ids.contains_key(byte_char(byte).encode_utf8(&mut [0; 4]) as &str),
            Kind::ByteFallback => !ids.contains_key(format!("<0x{byte:02X}>").as_str()),
            Kind::WordPiece => false,
        };
        if let Some(byte) = (0..=255_u8).find(|byte| missing(*byte)) {
            return Err(TokenizerError::ByteMissing { file: file.to_owned(), byte });
        }
        let unknown = &self.model.unk_token;
        if kind == Kind::WordPiece && !unknown.as_str().is_some_and(|token| ids.contains_key(token)) {
            return Err(unsupported(file, "model.unk_token", unknown, "a token of the vocabulary"));
        }
        Ok(())
    }

    fn check_parts(&self, file: &str, kind: Kind) -> Result<(), TokenizerError> {
        let refuse = |field: &str, found: &Value, supported: &'static str| unsupported(file, field, found, supported);
        let model = &self.model;
        if !(model.r#type.is_null() || model.r#type == "BPE" || model.r#type == "WordPiece") {
            return Err(refuse("model.type", &model.r#type, "BPE, WordPiece"));
        }
        if kind == Kind::WordPiece {
            return self.check_word_pieces(&refuse);
        }
        if !(model.dropout.is_null() || model.dropout.as_f64() == Some(0.0)) {
            return Err(refuse("model.dropout", &model.dropout, "null"));
        }
        for (field, value) in [
            ("model.continuing_subword_prefix", &model.continuing_subword_prefix),
            ("model.end_of_word_suffix", &model.end_of_word_suffix),
        ] {
            if !(value.is_null() || value == "") {
                return Err(refuse(field, value, "null"));
            }
        }
        if !(model.byte_fallback.is_null() || model.byte_fallback.is_boolean()) {
            return Err(refuse("model.byte_fallback", &model.byte_fallback, "true, false"));
        }
        if kind == Kind::ByteFallback {
            return self.check_fallback(&refuse);
        }
        if !nothing_or_made_of(&self.normalizer, "normalizers", &FORMS) {
            return Err(refuse("normalizer", &self.normalizer, "null, NFC, NFD, NFKC, NFKD, Lowercase, StripAccents"));
        }
        let splits = &["ByteLevel", "Split", "Digits"];
        let byte_level = holds(&self.pre_tokenizer, "pretokenizers", "ByteLevel");
        if !byte_level || !made_of(&self.pre_tokenizer, "pretokenizers", splits, NESTING_MAX) {
            let supported = "ByteLevel, alone or in a Sequence with Split and Digits";
            return Err(refuse("pre_tokenizer", &self.pre_tokenizer, supported));
        }
        if !made_of(&self.decoder, "decoders", &["ByteLevel"], NESTING_MAX) {
            return Err(refuse("decoder", &self.decoder, "ByteLevel"));
        }
        Ok(())
    }

    /// The parts around BPE that SentencePiece models are converted to: spaces become [`SPACE`], and back.
    fn check_fallback(&self, refuse: &Refuse<'_>) -> Result<(), TokenizerError> {
        let normalizers: Vec<&str> = FORMS.into_iter().chain(["Prepend", "Replace"]).collect();
        if !nothing_or_made_of(&self.normalizer, "normalizers", &normalizers) {
            return Err(refuse("normalizer", &self.normalizer, "null, Prepend, Replace, NFC, NFD, NFKC, NFKD"));
        }
        if !nothing_or_made_of(&self.pre_tokenizer, "pretokenizers", &["Metaspace", "Split", "Digits"]) {
            return Err(refuse("pre_tokenizer", &self.pre_tokenizer, "null, Metaspace, Split, Digits"));
        }
        let decoders = ["Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"];
        if !nothing_or_made_of(&self.decoder, "decoders", &decoders) {
            return Err(refuse("decoder", &self.decoder, "null, Replace, ByteFallback, Fuse, Strip, Metaspace"));
        }
        let spaces = [&self.normalizer, &self.pre_tokenizer];
        for (field, part) in ["normalizer", "pre_tokenizer"].into_iter().zip(spaces) {
            if !part.is_null() && !only_spaces(part) {
                return Err(refuse(field, part, "\"▁\" for a space, and nothing else replaced or put before"));
            }
        }
        Ok(())
    }

    fn check_word_pieces(&self, refuse: &Refuse<'_>) -> Result<(), TokenizerError> {
        let prefix = &self.model.continuing_subword_prefix;
        if !(prefix.is_null() || prefix.as_str().is_some_and(|prefix| !prefix.is_empty())) {
            return Err(refuse("model.continuing_subword_prefix", prefix, "null, \"##\" or another text"));
        }
        let normalizers: Vec<&str> = FORMS.into_iter().chain(["BertNormalizer"]).collect();
        if !nothing_or_made_of(&self.normalizer, "normalizers", &normalizers) {
            return Err(refuse(
                "normalizer",
                &self.normalizer,
                "null, BertNormalizer, NFC, NFD, NFKC, NFKD, Lowercase",
            ));
        }
        let splits = ["BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"];
        if !made_of(&self.pre_tokenizer, "pretokenizers", &splits, NESTING_MAX) {
            return Err(refuse(
                "pre_tokenizer",
                &self.pre_tokenizer,
                "BertPreTokenizer, Whitespace, Punctuation, Digits",
            ));
        }
        if !nothing_or_made_of(&self.decoder, "decoders", &["WordPiece"]) {
            return Err(refuse("decoder", &self.decoder, "null, WordPiece"));
        }
        Ok(())
    }

    fn check_vocabulary(&self, file: &str, vocabulary: usize) -> Result<BTreeMap<&str, u32>, TokenizerError> {
        let mut ids: BTreeMap<&str, u32> = BTreeMap::new();
        let mut tokens: BTreeMap<u32, &str> = BTreeMap::new();
        for (token, id) in &self.model.vocab.0 {
            outside(file, token, *id, vocabulary)?;
            let same_string = ids.insert(token, *id).map(|_| token.as_str());
            if let Some(first) = tokens.insert(*id, token).or(same_string) {
                let (first, second) = (first.to_owned(), token.clone());
                return Err(TokenizerError::Repeated { file: file.to_owned(), first, second, id: *id });
            }
        }
        Ok(ids)
    }

    /// What the post-processor puts around a text. One that only trims offsets changes no id.
    pub(super) fn affixes(&self, file: &str, vocabulary: usize) -> Result<Affixes, TokenizerError> {
        let refuse = || unsupported(file, "post_processor", &self.post_processor, AFFIXES);
        let mut parts = Vec::new();
        match self.post_processor.get("processors").and_then(Value::as_array) {
            Some(members) => parts.extend(members),
            None if self.post_processor.is_null() => {}
            None => parts.push(&self.post_processor),
        }
        let mut affixes = Affixes::default();
        let mut templates = 0;
        for part in parts {
            match part.get("type").and_then(Value::as_str) {
                Some("ByteLevel") => {}
                Some(kind @ ("TemplateProcessing" | "BertProcessing")) if templates == 0 => {
                    templates = 1;
                    let read = if kind == "BertProcessing" { first_and_last(part) } else { template(part) };
                    affixes = read.ok_or_else(refuse)?;
                }
                _ => return Err(refuse()),
            }
        }
        for id in affixes.before.iter().chain(&affixes.after) {
            outside(file, "in post_processor", *id, vocabulary)?;
        }
        Ok(affixes)
    }

    /// Both sides of every merge and what they make must be tokens.
    fn check_merges(&self, file: &str, ids: &BTreeMap<&str, u32>) -> Result<(), TokenizerError> {
        for (index, merge) in self.model.merges.iter().enumerate() {
            let (left, right) = match merge {
                Merge::Pair(left, right) => (left.as_str(), right.as_str()),
                // The older files begin with a line that names their version; the crate skips it as well.
                Merge::Joined(text) if text.starts_with("#version") => continue,
                Merge::Joined(text) => text.split_once(' ').unwrap_or((text, "")),
            };
            let made = format!("{left}{right}");
            if let Some(token) = [left, right, &made].into_iter().find(|token| !ids.contains_key(token)) {
                let token = token.to_owned();
                return Err(TokenizerError::Merge { file: file.to_owned(), merge: index, token });
            }
        }
        Ok(())
    }
}

fn outside(file: &str, token: &str, id: u32, vocabulary: usize) -> Result<(), TokenizerError> {
    if (id as usize) < vocabulary {
        return Ok(());
    }
    Err(TokenizerError::OutsideVocabulary { file: file.to_owned(), token: token.to_owned(), id, vocabulary })
}

fn unsupported(file: &str, field: &str, found: &Value, supported: &'static str) -> TokenizerError {
    let found = found.to_string().chars().take(QUOTED_CHARS_MAX).collect();
    TokenizerError::Unsupported { file: file.to_owned(), field: field.to_owned(), found, supported }
}

/// How a part is refused: field, what it holds, what could be run.
type Refuse<'a> = dyn Fn(&str, &Value, &'static str) -> TokenizerError + 'a;

/// The byte that a token of a fallback vocabulary stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| is_plain)
}

/// Whether every part that replaces or puts something before a text does so for spaces alone.
fn only_spaces(part: &Value) -> bool {
    let is = |field: &str, wanted: &str| part.get(field).and_then(Value::as_str) == Some(wanted);
    let space = SPACE.to_string();
    match part.get("type").and_then(Value::as_str) {
        Some("Prepend") => is("prepend", &space),
        Some("Metaspace") => is("replacement", &space),
        Some("Replace") => {
            is("content", &space)
                && part.get("pattern").is_some_and(|pattern| pattern.get("String") == Some(&" ".into()))
        }
        Some("Sequence") => {
            let members = part.get("normalizers").or_else(|| part.get("pretokenizers")).and_then(Value::as_array);
            members.is_some_and(|members| members.iter().all(only_spaces))
        }
        _ => true,
    }
}

/// Reads the tokens that BERT's own post-processor puts around one text.
fn first_and_last(part: &Value) -> Option<Affixes> {
    let id = |field: &str| u32::try_from(part.get(field)?.get(1)?.as_u64()?).ok();
    Some(Affixes { before: vec![id("cls")?], after: vec![id("sep")?] })
}

/// Reads a template for one text: special tokens, the text once, special tokens.
fn template(part: &Value) -> Option<Affixes> {
    let mut affixes = Affixes::default();
    let mut text_seen = false;
    for piece in part.get("single")?.as_array()? {
        if let Some(sequence) = piece.get("Sequence") {
            if text_seen || sequence.get("id")? != "A" {
                return None;
            }
            text_seen = true;
            continue;
        }
        let name = piece.get("SpecialToken")?.get("id")?.as_str()?;
        let ids = part.get("special_tokens")?.get(name)?.get("ids")?.as_array()?;
        let side = if text_seen { &mut affixes.after } else { &mut affixes.before };
        for id in ids {
            side.push(u32::try_from(id.as_u64()?).ok()?);
        }
        if side.len() > AFFIX_TOKENS_MAX {
            return None;
        }
    }
    text_seen.then_some(affixes)
}

/// Whether a part is of one of these types, or a sequence (whose members are under `list`) of such parts.
fn made_of(part: &Value, list: &str, types: &[&str], nesting: usize) -> bool {
    match part.get("type").and_then(Value::as_str) {
        Some("Sequence") if nesting > 0 => part
            .get(list)
            .and_then(Value::as_array)
            .is_some_and(|members| members.iter().all(|member| made_of(member, list, types, nesting - 1))),
        Some(kind) => types.contains(&kind),
        None => false,
    }
}

fn nothing_or_made_of(part: &Value, list: &str, types: &[&str]) -> bool {
    part.is_null() || made_of(part, list, types, NESTING_MAX)
}

/// Whether a part is of this type or a sequence with one that is.
fn holds(part: &Value, list: &str, kind: &str) -> bool {
    part.get("type").is_some_and(|found| found == kind)
        || part
            .get(list)
            .and_then(Value::as_array)
            .is_some_and(|members| members.iter().any(|member| member.get("type").is_some_and(|found| found == kind)))
}
