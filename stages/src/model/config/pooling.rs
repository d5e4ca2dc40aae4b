//! How an encoder's rows become one vector: the files that sentence-transformers puts beside `config.json`.
//!
//! Invariants: a module or a mode of pooling that is not computed here is an error that names it. Where there are no such
//! files, a text's vector is the mean of its rows, scaled to length 1, and a text is cut at the model's own length.
//!
//! It refuses to know weights.

use serde_json::Value;

use super::{BertConfig, ConfigError, Fields, quote};
use crate::model::ModelError;
use crate::model::source::{Part, Sentences};

/// Where the configuration of the pooling lies, as modules.json names it.
const POOLING_PATH: &str = "1_Pooling";

/// What is done with the rows of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct Pooling {
    /// How they become one.
    pub(in crate::model) pooled: Pooled,
    /// Whether the vector is scaled to length 1.
    pub(in crate::model) normalise: bool,
    /// Tokens of a text at most, special ones included; what is beyond is cut off.
    pub(in crate::model) text_tokens_max: usize,
}

/// How many rows become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Pooled {
    /// Their mean.
    Mean,
    /// The first of them.
    First,
}

impl Pooling {
    /// Reads what lies beside an encoder.
    pub(in crate::model) fn read(config: &BertConfig, files: &Sentences) -> Result<Self, ModelError> {
        let normalise = match &files.modules {
            Some(part) => parsed(part, normalises)?,
            None => true,
        };
        let pooled = match &files.pooling {
            Some(part) => parsed(part, |value| pooled(value, config.hidden))?,
            None => Pooled::Mean,
        };
        let limit = match &files.limits {
            Some(part) => parsed(part, |value| tokens_max(value, config.context_length))?,
            None => None,
        };
        Ok(Self { pooled, normalise, text_tokens_max: limit.unwrap_or(config.context_length) })
    }
}

fn parsed<T>(part: &Part, read: impl FnOnce(&Value) -> Result<T, ConfigError>) -> Result<T, ModelError> {
    let value = serde_json::from_slice(part.bytes.as_ref()).map_err(|error| ConfigError::Json(error.to_string()));
    value.and_then(|value| read(&value)).map_err(|error| ModelError::Config { file: part.file.clone(), error })
}

/// Whether the modules end in one that scales to length 1. They must be an encoder, a pooling, and nothing else.
fn normalises(value: &Value) -> Result<bool, ConfigError> {
    let unsupported = |found: &Value| ConfigError::Unsupported {
        field: "modules".to_owned(),
        found: quote(found),
        supported: format!("Transformer, Pooling in '{POOLING_PATH}', and Normalize or nothing"),
    };
    let modules = value.as_array().ok_or_else(|| unsupported(value))?;
    let kind = |module: &Value| {
        let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
        kind.rsplit('.').next().unwrap_or_default().to_owned()
    };
    let kinds: Vec<String> = modules.iter().map(kind).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let is_there = modules.get(1).and_then(|pooling| pooling.get("path")).is_some_and(|path| path == POOLING_PATH);
    match kinds.as_slice() {
        ["Transformer", "Pooling", "Normalize"] if is_there => Ok(true),
        ["Transformer", "Pooling"] if is_there => Ok(false),
        _ => Err(unsupported(value)),
    }
}

fn pooled(value: &Value, hidden: usize) -> Result<Pooled, ConfigError> {
    let map = value.as_object().ok_or_else(|| ConfigError::Json(format!("found {}", quote(value))))?;
    let fields = Fields { prefix: "", map };
    if let Some(width) = fields.optional_size("word_embedding_dimension", usize::MAX)?.filter(|width| *width != hidden)
    {
        return Err(fields.inconsistent("word_embedding_dimension", format!("hidden_size = {hidden}, not {width}")));
    }
    let mut modes = map.iter().filter(|(name, on)| name.starts_with("pooling_mode_") && **on == true);
    let mode = modes.next().map(|(name, _)| name.as_str());
    match (mode, modes.next()) {
        (Some("pooling_mode_mean_tokens"), None) => Ok(Pooled::Mean),
        (Some("pooling_mode_cls_token"), None) => Ok(Pooled::First),
        (Some(mode), None) => Err(fields.unsupported(mode, "pooling_mode_mean_tokens or pooling_mode_cls_token")),
        (Some(_), Some((other, _))) => Err(fields.unsupported(other, "one mode of pooling")),
        (None, _) => match fields.text("pooling_mode")? {
            Some("mean") => Ok(Pooled::Mean),
            Some("cls") => Ok(Pooled::First),
            Some(_) => Err(fields.unsupported("pooling_mode", "mean, cls")),
            None => Err(fields.missing("pooling_mode_mean_tokens")),
        },
    }
}

fn tokens_max(value: &Value, context_length: usize) -> Result<Option<usize>, ConfigError> {
    let map = value.as_object().ok_or_else(|| ConfigError::Json(format!("found {}", quote(value))))?;
    let fields = Fields { prefix: "", map };
    if fields.flag("do_lower_case")? == Some(true) {
        return Err(fields.unsupported("do_lower_case", "false: the tokenizer says what becomes of capitals"));
    }
    fields.optional_size("max_seq_length", context_length)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::source::Bytes;

    fn read(modules: Value, pooling: Value, limits: Value) -> Result<Pooling, String> {
        let config = br#"{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 32, "type_vocab_size": 2,
            "layer_norm_eps": 1e-12}"#;
        let super::super::Config::Bert(config) = super::super::Config::parse(config).unwrap() else { panic!() };
        let part = |name: &str, value: Value| {
            let bytes = Bytes::Owned(value.to_string().into_bytes());
            (!value.is_null()).then(|| Part { file: name.to_owned(), name: name.to_owned(), bytes })
        };
        let files = Sentences {
            modules: part("modules.json", modules),
            pooling: part("pooling.json", pooling),
            limits: part("limits.json", limits),
        };
        Pooling::read(&config, &files).map_err(|error| error.to_string())
    }

    fn modules(kinds: &[&str]) -> Value {
        let module = |(index, kind): (usize, &&str)| {
            let path = if index == 1 { "1_Pooling" } else { "" };
            json!({"idx": index, "name": index.to_string(), "path": path, "type": format!("some.where.{kind}")})
        };
        Value::Array(kinds.iter().enumerate().map(module).collect())
    }

    #[test]
    fn a_folder_without_such_files_has_the_mean_and_length_one() {
        let expected = Pooling { pooled: Pooled::Mean, normalise: true, text_tokens_max: 32 };
        assert_eq!(read(Value::Null, Value::Null, Value::Null), Ok(expected));
    }

    #[test]
    fn the_files_decide() {
        let mean =
            json!({"word_embedding_dimension": 8, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true});
        let first = json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false});
        let limits = json!({"max_seq_length": 16, "do_lower_case": false});
        let whole = modules(&["Transformer", "Pooling", "Normalize"]);
        let short = modules(&["Transformer", "Pooling"]);
        let expected = Pooling { pooled: Pooled::Mean, normalise: true, text_tokens_max: 16 };
        assert_eq!(read(whole, mean, limits), Ok(expected));
        let expected = Pooling { pooled: Pooled::First, normalise: false, text_tokens_max: 32 };
        assert_eq!(read(short, first, json!({"max_seq_length": null})), Ok(expected));
    }

    #[test]
    fn what_is_not_computed_is_named() {
        let mean = || json!({"pooling_mode_mean_tokens": true});
        let plain = || modules(&["Transformer", "Pooling"]);
        let moved = json!([{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "../../etc"}]);
        for (modules, pooling, limits, expected) in [
            (
                modules(&["Transformer", "Pooling", "Dense", "Normalize"]),
                mean(),
                Value::Null,
                "modules.json: field 'modules'",
            ),
            (modules(&["Transformer"]), mean(), Value::Null, "modules"),
            (moved, mean(), Value::Null, "1_Pooling"),
            (json!({}), mean(), Value::Null, "modules"),
            (plain(), json!({"pooling_mode_max_tokens": true}), Value::Null, "'pooling_mode_max_tokens'"),
            (
                plain(),
                json!({"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}),
                Value::Null,
                "one mode",
            ),
            (plain(), json!({"pooling_mode_mean_tokens": false}), Value::Null, "is missing"),
            (plain(), json!({"pooling_mode": "lasttoken"}), Value::Null, "'pooling_mode'"),
            (
                plain(),
                json!({"pooling_mode_mean_tokens": true, "word_embedding_dimension": 9}),
                Value::Null,
                "dimension",
            ),
            (plain(), json!([]), Value::Null, "pooling.json: not a JSON object"),
            (plain(), mean(), json!({"max_seq_length": 33}), "from 1 to 32"),
            (plain(), mean(), json!({"do_lower_case": true}), "'do_lower_case'"),
        ] {
            let error = read(modules, pooling, limits).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
