//! Models of the llama family as GGUF files.
//!
//! Purpose: the same model for other engines, so that both can be compared on one file. Matrices take the encoding that
//! is asked for, vectors stay f32; a head goes with the smaller K-quants as Q6_K.
//!
//! Invariants: what is written is read back by this program as the same model, up to the encoding. A tokenizer whose
//! splitting has no name in the format is refused.

use std::io::{self, Write};
use std::path::Path;

use butterfly_kernels::RopeScaling;
use serde_json::Value as Json;

use super::super::config::{Config, ConfigError, LlamaConfig};
use super::super::source::{Part, Source, SourceError};
use super::super::weights::{Weights, WeightsError};
use super::super::{check_tensors, llama};
use super::quantise::Encoding;
use super::tensors::{ROPE_FACTORS, native, paired_heads, paired_row};
use super::tokenizer;
use super::write::{Field, Tensor, write};

/// Why a model cannot be written as GGUF.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Its files are not there, or not readable.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its configuration is malformed or not supported.
    #[error("config.json: {0}")]
    Config(#[from] ConfigError),
    /// Its weights do not fit the configuration.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Its tokenizer is malformed, or of a kind that this does not write.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// It is no model of the llama family.
    #[error("only models of the llama family are written as GGUF")]
    Architecture,
    /// The file cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Writes the model in a folder of safetensors.
///
/// # Errors
///
/// [`ConvertError`].
pub fn folder(folder: &Path, encoding: Encoding, out: &mut impl Write) -> Result<(), ConvertError> {
    let source = Source::folder(folder)?;
    let text = source.config.bytes.as_ref();
    let config = Config::parse(text)?;
    let index = source.index.as_ref().map(Part::index).transpose()?;
    let weights = Weights::open(&source.weights, index.as_ref())?;
    check_tensors(&config, &weights)?;
    let Config::Llama(llama) = &config else { return Err(ConvertError::Architecture) };
    let tokenizer = source.tokenizer.as_ref().map(|part| part.bytes.as_ref());
    let widest = llama::shapes(llama);
    let rows = |tensor: &str, row: usize, out: &mut [f32]| {
        let shape = widest.iter().find(|(name, _)| name == tensor).map_or(&[][..], |(_, shape)| shape);
        weights.stored_row(&source.weights, tensor, shape, row, out).map_err(io::Error::other)
    };
    model(text, tokenizer, &source.name, encoding, rows, out)
}

/// Writes a model from its `config.json`, its `tokenizer.json` and its weights: `rows` is asked for each row of each
/// tensor by the name it has in safetensors; a vector is one row.
///
/// # Errors
///
/// [`ConvertError`].
pub fn model(
    config: &[u8],
    tokenizer: Option<&[u8]>,
    name: &str,
    encoding: Encoding,
    mut rows: impl FnMut(&str, usize, &mut [f32]) -> io::Result<()>,
    out: &mut impl Write,
) -> Result<(), ConvertError> {
    let Config::Llama(llama) = Config::parse(config)? else { return Err(ConvertError::Architecture) };
    let json: Json = serde_json::from_slice(config).map_err(|error| ConfigError::Json(error.to_string()))?;
    let architecture = match json.get("model_type").and_then(Json::as_str) {
        Some("llama" | "mistral") => "llama",
        Some(same @ ("qwen2" | "qwen3")) => same,
        _ => return Err(ConvertError::Architecture),
    };
    let mut metadata = shape(&llama, architecture, name, encoding);
    if let Some(text) = tokenizer {
        let json: Json = serde_json::from_slice(text).map_err(|error| ConvertError::Tokenizer(error.to_string()))?;
        metadata.extend(tokens(&json, &llama).map_err(ConvertError::Tokenizer)?);
    } else {
        metadata.push(("tokenizer.ggml.model".to_owned(), Field::Text("no_vocab".to_owned())));
    }
    let (tensors, names) = tensors(&llama, encoding);
    let factors = factors(&llama);
    write(out, &metadata, &tensors, |index, row, numbers| {
        let name: &str = names.get(index).map_or("", String::as_str);
        if name == ROPE_FACTORS {
            numbers.copy_from_slice(&factors);
            return Ok(());
        }
        let row = match paired_heads(architecture, name, llama.heads, llama.kv_heads) {
            Some(_) if name.ends_with(".weight") => paired_row(row, llama.head_dim),
            Some(_) => return paired_vector(name, llama.head_dim, &mut rows, numbers),
            None => row,
        };
        rows(name, row, numbers)
    })?;
    Ok(())
}

/// Names, as in safetensors, and shapes of the tensors of the model with this `config.json`.
///
/// # Errors
///
/// [`ConvertError`].
pub fn shapes(config: &[u8]) -> Result<Vec<(String, Vec<usize>)>, ConvertError> {
    match Config::parse(config)? {
        Config::Llama(llama) => Ok(llama::shapes(&llama)),
        Config::Bert(_) | Config::Mlp(_) => Err(ConvertError::Architecture),
    }
}

/// A bias whose numbers stand side by side by pairs.
fn paired_vector(
    name: &str,
    head_dim: usize,
    rows: &mut impl FnMut(&str, usize, &mut [f32]) -> io::Result<()>,
    numbers: &mut [f32],
) -> io::Result<()> {
    let mut plain = vec![0.0; numbers.len()];
    rows(name, 0, &mut plain)?;
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = plain.get(paired_row(index, head_dim)).copied().unwrap_or_default();
    }
    Ok(())
}

/// What is to be written, and the names in safetensors.
fn tensors(config: &LlamaConfig, encoding: Encoding) -> (Vec<Tensor>, Vec<String>) {
    let head = if config.tied_head { llama::EMBEDDING } else { llama::HEAD };
    let mut tensors = Vec::new();
    let mut names = Vec::new();
    for (name, shape) in llama::shapes(config) {
        let (rows, columns, encoding) = match *shape.as_slice() {
            [rows, columns] if name == head => (Some(rows), columns, encoding.of_head()),
            [rows, columns] => (Some(rows), columns, encoding),
            _ => (None, shape.iter().product(), Encoding::F32),
        };
        tensors.push(Tensor { name: native(&name).unwrap_or_else(|| name.clone()), rows, columns, encoding });
        names.push(name);
    }
    if matches!(config.rope_scaling, RopeScaling::Llama3 { .. }) {
        let columns = config.head_dim / 2;
        tensors.push(Tensor { name: ROPE_FACTORS.to_owned(), rows: None, columns, encoding: Encoding::F32 });
        names.push(ROPE_FACTORS.to_owned());
    }
    (tensors, names)
}

/// What each frequency of the rotation is divided by.
fn factors(config: &LlamaConfig) -> Vec<f32> {
    let half = config.head_dim / 2;
    let frequency = |index: usize| config.rope_theta.powf(-(index as f64) / half as f64);
    (0..half).map(|index| (frequency(index) / config.rope_scaling.apply(frequency(index))) as f32).collect()
}

fn shape(config: &LlamaConfig, architecture: &str, name: &str, encoding: Encoding) -> Vec<(String, Field)> {
    let unsigned = |value: usize| Field::Unsigned(u32::try_from(value).unwrap_or(u32::MAX));
    let mut fields = vec![
        ("general.architecture".to_owned(), Field::Text(architecture.to_owned())),
        ("general.name".to_owned(), Field::Text(name.to_owned())),
        ("general.file_type".to_owned(), Field::Unsigned(encoding.file_type())),
        ("general.quantization_version".to_owned(), Field::Unsigned(2)),
    ];
    let mut field = |key: &str, field: Field| fields.push((format!("{architecture}.{key}"), field));
    field("context_length", unsigned(config.context_length));
    field("embedding_length", unsigned(config.hidden));
    field("block_count", unsigned(config.layers));
    field("feed_forward_length", unsigned(config.intermediate));
    field("attention.head_count", unsigned(config.heads));
    field("attention.head_count_kv", unsigned(config.kv_heads));
    field("attention.key_length", unsigned(config.head_dim));
    field("attention.value_length", unsigned(config.head_dim));
    field("attention.layer_norm_rms_epsilon", Field::Float(config.norm_epsilon));
    field("rope.dimension_count", unsigned(config.head_dim));
    field("rope.freq_base", Field::Float(config.rope_theta as f32));
    field("vocab_size", unsigned(config.vocabulary));
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        field("rope.scaling.type", Field::Text("linear".to_owned()));
        field("rope.scaling.factor", Field::Float(factor as f32));
    }
    fields
}

/// A byte-level tokenizer as metadata.
fn tokens(json: &Json, config: &LlamaConfig) -> Result<Vec<(String, Field)>, String> {
    let vocabulary = json.pointer("/model/vocab").and_then(Json::as_object).ok_or("model.vocab must be an object")?;
    let added = json.get("added_tokens").and_then(Json::as_array).map_or(&[][..], Vec::as_slice);
    let mut texts: Vec<String> = (0..config.vocabulary).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![5; config.vocabulary];
    let mut put = |text: &str, id: Option<u64>, kind: i32| {
        let id = id.and_then(|id| usize::try_from(id).ok());
        match id.and_then(|id| texts.get_mut(id).zip(kinds.get_mut(id))) {
            Some(place) => {
                *place.0 = text.to_owned();
                *place.1 = kind;
                Ok(())
            }
            None => Err(format!("token {text:?} has no id below the model's vocabulary")),
        }
    };
    for (text, id) in vocabulary {
        put(text, id.as_u64(), 1)?;
    }
    for token in added {
        let kind = if token.get("special").and_then(Json::as_bool) == Some(true) { 3 } else { 4 };
        let text = token.get("content").and_then(Json::as_str).ok_or("an added token has no content")?;
        put(text, token.get("id").and_then(Json::as_u64), kind)?;
    }
    let merges = json.pointer("/model/merges").and_then(Json::as_array).ok_or("model.merges must be a list")?;
    let merges = merges.iter().map(|merge| match merge {
        Json::String(merge) => Some(merge.clone()),
        pair => Some(format!("{} {}", pair.get(0)?.as_str()?, pair.get(1)?.as_str()?)),
    });
    let merges = merges.collect::<Option<Vec<String>>>().ok_or("a merge is neither a text nor two")?;
    let split = tokenizer::name_of(json).ok_or("its splitting has no name in GGUF that this program knows")?;
    let begins = json.pointer("/post_processor/single/0/SpecialToken").is_some();
    let mut fields = vec![
        ("tokenizer.ggml.model".to_owned(), Field::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre".to_owned(), Field::Text(split.to_owned())),
        ("tokenizer.ggml.tokens".to_owned(), Field::Texts(texts)),
        ("tokenizer.ggml.token_type".to_owned(), Field::Integers(kinds)),
        ("tokenizer.ggml.merges".to_owned(), Field::Texts(merges)),
        ("tokenizer.ggml.add_bos_token".to_owned(), Field::Flag(begins)),
    ];
    for (key, id) in [("bos", config.bos), ("eos", config.eos.first().copied())] {
        fields.extend(id.map(|id| (format!("tokenizer.ggml.{key}_token_id"), Field::Unsigned(id))));
    }
    Ok(fields)
}
