//! What the metadata says about the model's shape, in the words of `config.json`.
//!
//! Invariants: whatever is written here is checked by the parser of `config.json`, limits included; what would change
//! the function and has no words there is refused here, by its key.
//!
//! It refuses to know what the numbers are good for.

use serde_json::{Map, Value as Json, json};

use super::{Gguf, GgufError, Value};

/// The architectures that this build runs.
const ARCHITECTURES: &str = "llama, qwen2, qwen3";

/// Texts of control tokens that end an answer, by the families' own templates.
const ENDS: [&str; 4] = ["<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>"];

/// Architecture of the file: the prefix of its keys.
pub(in crate::model) fn architecture<'a>(gguf: &Gguf<'a>) -> Result<&'a str, GgufError> {
    const KEY: &str = "general.architecture";
    match gguf.text(KEY)?.ok_or_else(|| GgufError::Missing(KEY.to_owned()))? {
        known @ ("llama" | "qwen2" | "qwen3") => Ok(known),
        other => Err(unsupported(KEY, other, ARCHITECTURES)),
    }
}

/// The configuration, as a folder would have it.
pub(in crate::model) fn config(gguf: &Gguf<'_>) -> Result<Json, GgufError> {
    let architecture = architecture(gguf)?;
    let keys = Keys { gguf, architecture };
    keys.refuse_variants()?;
    let embedding = gguf.tensor("token_embd.weight").map(|tensor| tensor.shape.as_slice());
    let Some(&[vocabulary, _]) = embedding else {
        let problem = "it must be there, with two dimensions".to_owned();
        return Err(GgufError::Tensor { tensor: "token_embd.weight".to_owned(), problem });
    };
    let mut fields = Map::new();
    fields.insert("model_type".into(), json!(architecture));
    fields.insert("vocab_size".into(), json!(vocabulary));
    for (field, key) in [
        ("hidden_size", "embedding_length"),
        ("num_hidden_layers", "block_count"),
        ("num_attention_heads", "attention.head_count"),
        ("intermediate_size", "feed_forward_length"),
        ("max_position_embeddings", "context_length"),
    ] {
        fields.insert(field.into(), keys.required(key)?);
    }
    if let Some(heads) = keys.integer("attention.head_count_kv")? {
        fields.insert("num_key_value_heads".into(), heads);
    }
    if let Some(size) = keys.head_dim()? {
        fields.insert("head_dim".into(), size);
    }
    let epsilon = "attention.layer_norm_rms_epsilon";
    let epsilon = keys.number(epsilon)?.ok_or_else(|| GgufError::Missing(keys.name(epsilon)))?;
    fields.insert("rms_norm_eps".into(), json!(epsilon));
    fields.insert("rope_theta".into(), json!(keys.number("rope.freq_base")?.unwrap_or(10_000.0)));
    if let Some(scaling) = keys.rope_scaling()? {
        fields.insert("rope_scaling".into(), scaling);
    }
    if let Some(window) = keys.integer("attention.sliding_window")?.filter(|window| *window != 0) {
        fields.insert("sliding_window".into(), window);
    }
    let has = |tensor: &str| gguf.tensor(tensor).is_some();
    fields.insert("tie_word_embeddings".into(), json!(!has("output.weight")));
    if architecture == "llama" {
        fields.insert("attention_bias".into(), json!(has("blk.0.attn_q.bias") || has("blk.0.attn_output.bias")));
    }
    fields.insert("mlp_bias".into(), json!(has("blk.0.ffn_gate.bias")));
    if let Some(id) = gguf.integer("tokenizer.ggml.bos_token_id")? {
        fields.insert("bos_token_id".into(), integer(id));
    }
    fields.insert("eos_token_id".into(), Json::Array(ends(gguf)?));
    Ok(Json::Object(fields))
}

/// Ids that end an answer: the stated ones, and control tokens that are known to.
fn ends(gguf: &Gguf<'_>) -> Result<Vec<Json>, GgufError> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ids.extend(gguf.integer(key)?.map(integer));
    }
    let tokens = gguf.list("tokenizer.ggml.tokens")?.and_then(|list| list.texts());
    let kinds = gguf.list("tokenizer.ggml.token_type")?.and_then(|list| list.numbers());
    if let (Some(tokens), Some(kinds)) = (tokens, kinds) {
        let control = tokens.zip(kinds).enumerate().filter(|(_, (token, kind))| *kind == 3.0 && ENDS.contains(token));
        // One for each text, since a text stands once in a tokenizer that will be accepted.
        ids.extend(control.take(ENDS.len()).map(|(id, _)| json!(id)));
    }
    Ok(ids)
}

/// The keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.gguf.number(&self.name(key))
    }

    fn integer(&self, key: &str) -> Result<Option<Json>, GgufError> {
        let name = self.name(key);
        // Some files have one number for each layer; this build wants them all the same.
        if let Some(Value::List(list)) = self.gguf.value(&name) {
            let mut numbers = list.numbers().into_iter().flatten();
            let first = numbers.next();
            return match first {
                Some(first) if numbers.all(|number| number == first) => Ok(Some(integer(first as i128))),
                _ => Err(unsupported(&name, "a list", "one number for all layers")),
            };
        }
        Ok(self.gguf.integer(&name)?.map(integer))
    }

    fn required(&self, key: &str) -> Result<Json, GgufError> {
        self.integer(key)?.ok_or_else(|| GgufError::Missing(self.name(key)))
    }

    /// Elements of a head: keys, values and the rotated part must agree.
    fn head_dim(&self) -> Result<Option<Json>, GgufError> {
        let (key, value) = (self.integer("attention.key_length")?, self.integer("attention.value_length")?);
        if let (Some(key), Some(value)) = (&key, &value)
            && key != value
        {
            let name = self.name("attention.value_length");
            return Err(unsupported(&name, value, "as attention.key_length"));
        }
        let size = key.or(value);
        let by_heads = || {
            let (hidden, heads) = (
                self.required("embedding_length").ok()?.as_u64()?,
                self.required("attention.head_count").ok()?.as_u64()?,
            );
            hidden.checked_div(heads)
        };
        if let Some(rotated) = self.integer("rope.dimension_count")? {
            let expected = size.as_ref().and_then(Json::as_u64).or_else(by_heads);
            if rotated.as_u64() != expected {
                return Err(unsupported(&self.name("rope.dimension_count"), rotated, "the size of a head"));
            }
        }
        Ok(size)
    }

    /// Llama 3's stretching comes as a tensor of factors instead.
    fn rope_scaling(&self) -> Result<Option<Json>, GgufError> {
        let (name, factor) = (self.name("rope.scaling.type"), self.number("rope.scaling.factor")?);
        let factor = factor.or(self.number("rope.scale_linear")?).filter(|factor| *factor != 0.0 && *factor != 1.0);
        match (self.gguf.text(&name)?, factor) {
            (Some("none"), _) | (None | Some("linear"), None) => Ok(None),
            (None | Some("linear"), Some(factor)) => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
            (Some(other), _) => Err(unsupported(&name, other, "none, linear")),
        }
    }

    fn refuse_variants(&self) -> Result<(), GgufError> {
        for (key, harmless) in [
            ("expert_count", 0.0),
            ("attention.causal", 1.0),
            ("rope.scaling.attn_factor", 1.0),
            ("logit_scale", 1.0),
            ("residual_scale", 1.0),
            ("embedding_scale", 1.0),
            ("attention.scale", 0.0),
        ] {
            let name = self.name(key);
            let found = match self.gguf.value(&name) {
                None => continue,
                Some(Value::Flag(flag)) => f64::from(u8::from(flag)),
                Some(_) => self.gguf.number(&name)?.unwrap_or(harmless),
            };
            if found != harmless {
                return Err(unsupported(&name, found, "leaving it out"));
            }
        }
        if self.gguf.number("split.count")?.is_some_and(|parts| parts > 1.0) {
            return Err(unsupported(
                "split.count",
                "several files",
                "one file: join them with `llama-gguf-split --merge`",
            ));
        }
        Ok(())
    }
}

/// An integer as JSON; one that JSON has no room for is none that any field allows.
fn integer(value: i128) -> Json {
    i64::try_from(value).map_or(json!(-1), |value| json!(value))
}

fn unsupported(key: &str, found: impl std::fmt::Display, supported: &'static str) -> GgufError {
    let found = found.to_string().chars().take(80).collect();
    GgufError::Unsupported { key: key.to_owned(), found, supported }
}
