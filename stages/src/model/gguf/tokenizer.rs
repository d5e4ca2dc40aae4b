//! The tokenizer of the metadata, as the `tokenizer.json` that a folder would have.
//!
//! Purpose: byte-level BPE (`gpt2`), whose splitting of text has only a name in the metadata, and SentencePiece's BPE
//! (`llama`), whose merges follow from the scores of its tokens.
//!
//! Invariants: ids are those of the file's list. A kind or a splitting that is not known is refused by its key: another
//! one would give other ids. Whether the tokens make a tokenizer is for the parser of `tokenizer.json` to say.
//!
//! It refuses to know how text is split and merged.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value as Json, json};

use super::{Gguf, GgufError};

const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const MODEL: &str = "tokenizer.ggml.model";
const SPLIT: &str = "tokenizer.ggml.pre";

/// Splittings by name.
pub(super) const SPLITS: &str = "llama-bpe, qwen2, tekken, smollm, gpt-2, default";

/// What a token is, as the format numbers it.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
const UNUSED: f64 = 5.0;

/// What stands for a space in SentencePiece's tokens.
const SPACE: &str = "\u{2581}";

/// GPT-2's splitting, which the library knows by itself.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer; `None` where the file has none.
pub(in crate::model) fn tokenizer(gguf: &Gguf<'_>) -> Result<Option<Json>, GgufError> {
    match gguf.text(MODEL)? {
        None | Some("no_vocab" | "none") => Ok(None),
        Some("gpt2") => byte_level(gguf).map(Some),
        Some("llama") => sentence_piece(gguf).map(Some),
        Some(other) => Err(unsupported(MODEL, other, "gpt2, llama")),
    }
}

fn byte_level(gguf: &Gguf<'_>) -> Result<Json, GgufError> {
    let tokens = Tokens::new(gguf)?;
    let name = gguf.text(SPLIT)?.unwrap_or("default");
    let split = |regex: &str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let digits = json!({ "type": "Digits", "individual_digits": true });
    // Splitting, normal form, whole words looked up before merging, a beginning unless the file says otherwise.
    let (splits, form, whole, begins) = match name {
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => {
            (vec![split(LLAMA3), byte_level(false)], Json::Null, true, true)
        }
        "qwen2" | "deepseek-r1-qwen" => (vec![split(QWEN2), byte_level(false)], json!({ "type": "NFC" }), false, false),
        "tekken" => (vec![split(TEKKEN), byte_level(false)], Json::Null, true, true),
        "smollm" | "starcoder" | "refact" | "codeshell" => (vec![digits, byte_level(true)], Json::Null, false, false),
        "gpt-2" | "phi-2" | "mpt" | "olmo" => (vec![byte_level(true)], Json::Null, false, false),
        "default" => {
            let splits = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
            let splits = splits.into_iter().map(split).chain([byte_level(false)]);
            (splits.collect(), Json::Null, false, false)
        }
        other => return Err(unsupported(SPLIT, other, SPLITS)),
    };
    let merges = gguf.list(MERGES)?.ok_or_else(|| GgufError::Missing(MERGES.to_owned()))?;
    let merges = merges.texts().ok_or(GgufError::Kind { key: MERGES.to_owned(), expected: "a list of texts" })?;
    Ok(json!({
        "version": "1.0",
        "added_tokens": tokens.added(false),
        "normalizer": form,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": splits },
        "post_processor": affixes(gguf, &tokens, begins)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "ignore_merges": whole,
            "vocab": tokens.vocabulary(),
            "merges": merges.collect::<Vec<_>>(),
        },
    }))
}

/// The name of the splitting of a byte-level `tokenizer.json`, if it has one.
pub(super) fn name_of(json: &Json) -> Option<&'static str> {
    let pre = json.get("pre_tokenizer")?;
    let members = match pre.get("pretokenizers") {
        Some(members) => members.as_array()?.iter().collect(),
        None => vec![pre],
    };
    let of_type = |part: &Json, name: &str| part.get("type").and_then(Json::as_str) == Some(name);
    let plain =
        |part: &Json| of_type(part, "ByteLevel") && part.get("use_regex").and_then(Json::as_bool) != Some(false);
    match members.as_slice() {
        [one] if plain(one) => Some("gpt-2"),
        [digits, one] if of_type(digits, "Digits") && plain(one) => Some("smollm"),
        [split, one] if of_type(split, "Split") && of_type(one, "ByteLevel") => {
            let regex = split.pointer("/pattern/Regex")?.as_str()?;
            [("llama-bpe", LLAMA3), ("qwen2", QWEN2), ("tekken", TEKKEN)]
                .iter()
                .find(|(_, known)| *known == regex)
                .map(|(name, _)| *name)
        }
        _ => None,
    }
}

fn sentence_piece(gguf: &Gguf<'_>) -> Result<Json, GgufError> {
    let tokens = Tokens::new(gguf)?;
    let scores = gguf.list(SCORES)?.ok_or_else(|| GgufError::Missing(SCORES.to_owned()))?;
    let scores: Vec<f64> = scores.numbers().into_iter().flatten().collect();
    if scores.len() != tokens.texts.len() {
        return Err(GgufError::Kind { key: SCORES.to_owned(), expected: "one number for each token" });
    }
    let unknown = tokens.of_kind(UNKNOWN).next().map(|(_, text)| text);
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": tokens.added(true),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": affixes(gguf, &tokens, true)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": true,
            "byte_fallback": true,
            "vocab": tokens.vocabulary(),
            "merges": merges(&tokens, &scores),
        },
    }))
}

/// Merges in the order in which SentencePiece makes them: the best score of what is made comes first. Every way to cut a
/// token in two tokens is a merge.
fn merges(tokens: &Tokens<'_>, scores: &[f64]) -> Vec<[String; 2]> {
    let mergeable = |kind: f64| kind != CONTROL && kind != UNKNOWN;
    let ids: BTreeMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, text)| (*text, id)).collect();
    let mut merges: Vec<(f64, usize, usize, [&str; 2])> = Vec::new();
    for (id, ((text, kind), score)) in tokens.texts.iter().zip(&tokens.kinds).zip(scores).enumerate() {
        if !mergeable(*kind) {
            continue;
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(first), Some(_)) = (ids.get(left), ids.get(right)) {
                merges.push((*score, id, *first, [left, right]));
            }
        }
    }
    merges.sort_by(|one, other| other.0.total_cmp(&one.0).then_with(|| (one.1, one.2).cmp(&(other.1, other.2))));
    merges.into_iter().map(|(.., pair)| pair.map(str::to_owned)).collect()
}

/// The tokens that go around every text.
fn affixes(gguf: &Gguf<'_>, tokens: &Tokens<'_>, begins: bool) -> Result<Json, GgufError> {
    let mut special = Map::new();
    let mut piece = |flag: &str, by_default: bool, id: &str| -> Result<Option<Json>, GgufError> {
        if !gguf.flag(flag)?.unwrap_or(by_default) {
            return Ok(None);
        }
        // A file that asks for a beginning and names none has none.
        let Some(number) = gguf.integer(id)? else { return Ok(None) };
        let text = usize::try_from(number).ok().and_then(|number| tokens.texts.get(number));
        let text = text.ok_or(GgufError::Kind { key: id.to_owned(), expected: "the id of a token" })?;
        special.insert((*text).to_owned(), json!({ "id": text, "ids": [number as i64], "tokens": [text] }));
        Ok(Some(json!({ "SpecialToken": { "id": text, "type_id": 0 } })))
    };
    let begin = piece("tokenizer.ggml.add_bos_token", begins, "tokenizer.ggml.bos_token_id")?;
    let end = piece("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id")?;
    if begin.is_none() && end.is_none() {
        return Ok(Json::Null);
    }
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let single: Vec<Json> = begin.into_iter().chain([text]).chain(end).collect();
    Ok(json!({ "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special }))
}

/// The list of tokens and what each is.
struct Tokens<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<f64>,
}

impl<'a> Tokens<'a> {
    fn new(gguf: &Gguf<'a>) -> Result<Self, GgufError> {
        let texts = gguf.list(TOKENS)?.ok_or_else(|| GgufError::Missing(TOKENS.to_owned()))?;
        if texts.count() > crate::model::config::VOCABULARY_MAX {
            let (found, max) = (texts.count() as u64, crate::model::config::VOCABULARY_MAX as u64);
            return Err(GgufError::TooLarge { what: "the list of tokens", found, max });
        }
        let texts = texts.texts().ok_or(GgufError::Kind { key: TOKENS.to_owned(), expected: "a list of texts" })?;
        let texts: Vec<&str> = texts.collect();
        let kinds: Vec<f64> = match gguf.list(KINDS)? {
            Some(kinds) => kinds.numbers().into_iter().flatten().collect(),
            None => vec![1.0; texts.len()],
        };
        if kinds.len() != texts.len() {
            return Err(GgufError::Kind { key: KINDS.to_owned(), expected: "one number for each token" });
        }
        let mut seen = BTreeSet::new();
        let used = texts.iter().zip(&kinds).filter(|(_, kind)| **kind != UNUSED);
        match used.map(|(text, _)| *text).find(|text| !seen.insert(*text)) {
            Some(text) => Err(GgufError::Repeated { what: "token", name: text.chars().take(80).collect() }),
            None => Ok(Self { texts, kinds }),
        }
    }

    fn of_kind(&self, kind: f64) -> impl Iterator<Item = (usize, &'a str)> {
        self.texts
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(move |(_, (_, found))| **found == kind)
            .map(|(id, (text, _))| (id, *text))
    }

    /// Tokens that are found in a text as they stand, before it is split.
    fn added(&self, with_unknown: bool) -> Vec<Json> {
        let with_unknown = with_unknown.then_some(UNKNOWN);
        let mut tokens: Vec<(usize, &str, bool)> =
            self.of_kind(USER_DEFINED).map(|(id, text)| (id, text, false)).collect();
        for kind in [CONTROL].into_iter().chain(with_unknown) {
            tokens.extend(self.of_kind(kind).map(|(id, text)| (id, text, true)));
        }
        tokens.sort_unstable();
        tokens
            .into_iter()
            .map(|(id, text, special)| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                })
            })
            .collect()
    }

    /// All tokens but those that only fill the list up.
    fn vocabulary(&self) -> Map<String, Json> {
        let used = self.texts.iter().zip(&self.kinds).enumerate().filter(|(_, (_, kind))| **kind != UNUSED);
        used.map(|(id, (text, _))| ((*text).to_owned(), json!(id))).collect()
    }
}

fn unsupported(key: &str, found: &str, supported: &'static str) -> GgufError {
    GgufError::Unsupported { key: key.to_owned(), found: found.chars().take(80).collect(), supported }
}
