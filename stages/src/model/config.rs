//! Model configuration: `config.json` parsed into a type that proves the model can be run.
//!
//! Purpose: read the families this build runs. The llama family (`model_type` llama, mistral, qwen2, qwen3) comes in the
//! spelling of transformers 5 (`rope_parameters`, `dtype`) and in the older one (`rope_theta`, `rope_scaling`,
//! `torch_dtype`). `bert` is an encoder; what else lies beside it is read by `pooling`. A dense network states `{"model_type":"mlp","layer_sizes":[in,…,out],"activation":"relu"}`.
//!
//! Invariants: every size of a [`Config`] lies within the named limits below, so that no product of two of them
//! overflows and nothing a hostile file says can make this program allocate without bound; heads divide evenly; a
//! feature that would change the function and is not implemented is an error that names its field, never ignored.
//!
//! It refuses to know where the file lies, and which tensors hold the weights.

pub(super) mod pooling;
#[cfg(test)]
mod tests;

use butterfly_kernels::{Dtype, RopeScaling};
use serde_json::{Map, Value};

/// Layers of a model, at most.
pub const LAYERS_MAX: usize = 1024;
/// Width of the residual stream or of a dense layer, at most.
pub const WIDTH_MAX: usize = 1 << 17;
/// Attention heads of a layer, at most.
pub const HEADS_MAX: usize = 1024;
/// Elements of an attention head, at most.
pub const HEAD_DIM_MAX: usize = 1024;
/// Entries of a vocabulary, at most.
pub const VOCABULARY_MAX: usize = 1 << 20;
/// Positions of a context, at most.
pub const CONTEXT_MAX: usize = 1 << 20;
/// Positions of a text that is one step, at most: its memory and its attention grow with all of them.
pub const BERT_CONTEXT_MAX: usize = 1 << 13;
/// Token types, at most.
pub const TOKEN_TYPES_MAX: usize = 1 << 10;
/// Elements of a head of Qwen3, whose configurations may leave it out.
const QWEN3_HEAD_DIM: usize = 128;
/// End-of-sequence ids, at most.
pub const EOS_MAX: usize = 64;
/// Length of a value quoted in an error, in characters.
const QUOTED_CHARS_MAX: usize = 80;

/// A model this build can run.
#[derive(Debug, Clone, PartialEq)]
pub enum Config {
    /// A decoder-only transformer of the llama family.
    Llama(LlamaConfig),
    /// An encoder of the BERT family.
    Bert(BertConfig),
    /// Dense layers on raw vectors.
    Mlp(MlpConfig),
}

/// Shape of a llama-family model.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Positions of prompt and answer together, at most.
    pub context_length: usize,
    /// Added to the mean square in every RMSNorm.
    pub norm_epsilon: f32,
    /// Base of the rotation frequencies.
    pub rope_theta: f64,
    /// How the rotation frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The head is the embedding matrix.
    pub tied_head: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases on the three matrices of the gated MLP.
    pub mlp_bias: bool,
    /// An RMSNorm over each head of queries and keys, before the rotation.
    pub head_norms: bool,
    /// What the weights are stored in, where the file says so.
    pub dtype: Option<Dtype>,
    /// Begins a sequence.
    pub bos: Option<u32>,
    /// Each ends a sequence; ascending, distinct.
    pub eos: Vec<u32>,
}

/// Shape of a BERT encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct BertConfig {
    /// Width of the rows between layers, and of the vector that comes out.
    pub hidden: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Attention heads; divides `hidden`.
    pub heads: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Rows of the table of positions: tokens of a text, at most.
    pub context_length: usize,
    /// Rows of the table of token types.
    pub token_types: usize,
    /// Added to the mean square in every LayerNorm.
    pub norm_epsilon: f32,
    /// What the weights are stored in, where the file says so.
    pub dtype: Option<Dtype>,
}

/// Shape of a dense network.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Input width, the width of each layer's output: at least two entries.
    pub layer_sizes: Vec<usize>,
    /// Applied after every layer but the last.
    pub activation: Activation,
    /// What the weights are stored in, where the file says so.
    pub dtype: Option<Dtype>,
}

/// What follows a dense layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x · Φ(x), exact through erf.
    Gelu,
    /// Hyperbolic tangent.
    Tanh,
}

/// Why a configuration cannot be run. Every variant names the field.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A required field is absent.
    #[error("field '{field}' is missing")]
    Missing {
        /// Its name.
        field: String,
    },
    /// A field holds something of another kind or outside its range.
    #[error("field '{field}' must be {expected}, found {found}")]
    Wrong {
        /// Its name.
        field: String,
        /// What it may hold.
        expected: String,
        /// What it holds, shortened.
        found: String,
    },
    /// A field asks for something that this build does not compute.
    #[error("field '{field}' = {found} is not supported; supported: {supported}")]
    Unsupported {
        /// Its name.
        field: String,
        /// What it asks for, shortened.
        found: String,
        /// What could be run.
        supported: String,
    },
    /// Two fields do not fit together.
    #[error("field '{field}' = {found} does not fit {other}")]
    Inconsistent {
        /// Its name.
        field: String,
        /// What it holds.
        found: String,
        /// The other field and what it holds.
        other: String,
    },
}

impl Config {
    /// Parses `config.json`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], naming the field.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_slice(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        let Value::Object(map) = value else {
            return Err(ConfigError::Json(format!("found {}", quote(&value))));
        };
        let fields = Fields { prefix: "", map: &map };
        match fields.text("model_type")? {
            Some(family @ ("llama" | "mistral" | "qwen2" | "qwen3")) => llama(&fields, family).map(Self::Llama),
            Some("bert") => bert(&fields).map(Self::Bert),
            Some("mlp") => mlp(&fields).map(Self::Mlp),
            Some(_) => Err(fields.unsupported("model_type", "llama, mistral, qwen2, qwen3, bert, mlp")),
            None => Err(fields.missing("model_type")),
        }
    }

    /// Layers that can be dealt to slices.
    #[must_use]
    pub fn layers(&self) -> usize {
        match self {
            Self::Llama(config) => config.layers,
            Self::Bert(config) => config.layers,
            Self::Mlp(config) => config.layer_sizes.len().saturating_sub(1),
        }
    }
}

fn llama(fields: &Fields<'_>, family: &str) -> Result<LlamaConfig, ConfigError> {
    refuse_variants(fields)?;
    let hidden = fields.size("hidden_size", WIDTH_MAX)?;
    let heads = fields.size("num_attention_heads", HEADS_MAX)?;
    let kv_heads = fields.optional_size("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        return Err(fields.inconsistent("num_key_value_heads", format!("num_attention_heads = {heads}")));
    }
    let head_dim = match fields.optional_size("head_dim", HEAD_DIM_MAX)? {
        Some(size) => size,
        None if family == "qwen3" => QWEN3_HEAD_DIM,
        None if hidden % heads == 0 && hidden / heads <= HEAD_DIM_MAX => hidden / heads,
        None => return Err(fields.inconsistent("num_attention_heads", format!("hidden_size = {hidden}"))),
    };
    if head_dim % 2 != 0 {
        let field = if fields.value("head_dim").is_some() { "head_dim" } else { "num_attention_heads" };
        return Err(fields.inconsistent(field, format!("rotation, which needs an even head size, not {head_dim}")));
    }
    let vocabulary = fields.size("vocab_size", VOCABULARY_MAX)?;
    let context_length = fields.size("max_position_embeddings", CONTEXT_MAX)?;
    refuse_sliding_window(fields, context_length)?;
    let (rope_theta, rope_scaling) = rope(fields)?;
    let attention_bias = fields.flag("attention_bias")?;
    Ok(LlamaConfig {
        hidden,
        layers: fields.size("num_hidden_layers", LAYERS_MAX)?,
        heads,
        kv_heads,
        head_dim,
        intermediate: fields.size("intermediate_size", WIDTH_MAX)?,
        vocabulary,
        context_length,
        norm_epsilon: norm_epsilon(fields, "rms_norm_eps")?,
        rope_theta,
        rope_scaling,
        tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        // Qwen2 has these three biases by definition of the architecture and no field that says so.
        qkv_bias: attention_bias.unwrap_or(family == "qwen2"),
        output_bias: attention_bias.unwrap_or(false) && family != "qwen2",
        mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
        // By definition of the architecture, as above.
        head_norms: family == "qwen3",
        dtype: dtype(fields)?,
        bos: fields.token("bos_token_id", vocabulary)?,
        eos: fields.tokens("eos_token_id", vocabulary)?,
    })
}

fn bert(fields: &Fields<'_>) -> Result<BertConfig, ConfigError> {
    for (field, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
        if fields.text(field)?.is_some_and(|value| value != only) {
            return Err(fields.unsupported(field, only));
        }
    }
    for field in ["is_decoder", "add_cross_attention"] {
        if fields.flag(field)? == Some(true) {
            return Err(fields.unsupported(field, "false"));
        }
    }
    if fields.value("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "weights in F32, F16 or BF16"));
    }
    let hidden = fields.size("hidden_size", WIDTH_MAX)?;
    let heads = fields.size("num_attention_heads", HEADS_MAX)?;
    if hidden % heads != 0 || hidden / heads > HEAD_DIM_MAX {
        return Err(fields.inconsistent("num_attention_heads", format!("hidden_size = {hidden}")));
    }
    Ok(BertConfig {
        hidden,
        layers: fields.size("num_hidden_layers", LAYERS_MAX)?,
        heads,
        intermediate: fields.size("intermediate_size", WIDTH_MAX)?,
        vocabulary: fields.size("vocab_size", VOCABULARY_MAX)?,
        context_length: fields.size("max_position_embeddings", BERT_CONTEXT_MAX)?,
        token_types: fields.size("type_vocab_size", TOKEN_TYPES_MAX)?,
        norm_epsilon: norm_epsilon(fields, "layer_norm_eps")?,
        dtype: dtype(fields)?,
    })
}

/// Refuses whatever would make the model another function than the one computed here.
fn refuse_variants(fields: &Fields<'_>) -> Result<(), ConfigError> {
    if !matches!(fields.text("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(fields.unsupported("hidden_act", "silu"));
    }
    if fields.value("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "weights in F32, F16 or BF16"));
    }
    if fields.optional_size("pretraining_tp", usize::MAX)?.is_some_and(|parts| parts != 1) {
        return Err(fields.unsupported("pretraining_tp", "1"));
    }
    if fields.optional_number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(fields.unsupported("partial_rotary_factor", "1"));
    }
    match fields.value("layer_types") {
        None => {}
        Some(Value::Array(types)) if types.iter().all(|kind| kind == "full_attention") => {}
        Some(_) => return Err(fields.unsupported("layer_types", "full_attention in every layer")),
    }
    Ok(())
}

/// A window that covers the whole context is no window.
fn refuse_sliding_window(fields: &Fields<'_>, context_length: usize) -> Result<(), ConfigError> {
    if fields.flag("use_sliding_window")? == Some(false) {
        return Ok(());
    }
    match fields.optional_size("sliding_window", usize::MAX)? {
        Some(window) if window < context_length => {
            Err(fields.unsupported("sliding_window", "null, or at least max_position_embeddings"))
        }
        _ => Ok(()),
    }
}

fn norm_epsilon(fields: &Fields<'_>, field: &str) -> Result<f32, ConfigError> {
    let epsilon = fields.number(field)?;
    if !(1e-12..=1.0).contains(&epsilon) {
        return Err(fields.wrong(field, "a number from 1e-12 to 1"));
    }
    Ok(epsilon as f32)
}

/// Base and scaling of the rotation, in either spelling.
fn rope(fields: &Fields<'_>) -> Result<(f64, RopeScaling), ConfigError> {
    const THETA_DEFAULT: f64 = 10_000.0;
    if let Some(parameters) = fields.object("rope_parameters", "rope_parameters.")? {
        for old in ["rope_theta", "rope_scaling"] {
            if fields.value(old).is_some_and(|value| parameters.map.get(old).is_some_and(|new| new != value)) {
                return Err(fields.inconsistent(old, "rope_parameters".to_owned()));
            }
        }
        return Ok((theta(&parameters)?.unwrap_or(THETA_DEFAULT), rope_scaling(&parameters)?));
    }
    let scaling = match fields.object("rope_scaling", "rope_scaling.")? {
        Some(parameters) => rope_scaling(&parameters)?,
        None => RopeScaling::Default,
    };
    Ok((theta(fields)?.unwrap_or(THETA_DEFAULT), scaling))
}

fn theta(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    match fields.optional_number("rope_theta")? {
        Some(theta) if !(1.0..=1e12).contains(&theta) => Err(fields.wrong("rope_theta", "a number from 1 to 1e12")),
        theta => Ok(theta),
    }
}

fn rope_scaling(fields: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    if fields.optional_number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(fields.unsupported("partial_rotary_factor", "1"));
    }
    let key = if fields.value("rope_type").is_some() { "rope_type" } else { "type" };
    match fields.text(key)? {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: rope_factor(fields, "factor")? }),
        Some("llama3") => {
            let low_freq_factor = rope_factor(fields, "low_freq_factor")?;
            let high_freq_factor = rope_factor(fields, "high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let low = format!("low_freq_factor = {low_freq_factor}, which must be below it");
                return Err(fields.inconsistent("high_freq_factor", low));
            }
            let original = fields.size("original_max_position_embeddings", CONTEXT_MAX)?;
            Ok(RopeScaling::Llama3 {
                factor: rope_factor(fields, "factor")?,
                low_freq_factor,
                high_freq_factor,
                // CONTEXT_MAX is far below the type's limit.
                original_positions: u32::try_from(original).unwrap_or(u32::MAX),
            })
        }
        Some(_) => Err(fields.unsupported(key, "default, linear, llama3")),
    }
}

fn rope_factor(fields: &Fields<'_>, field: &str) -> Result<f64, ConfigError> {
    let factor = fields.number(field)?;
    if !(1.0..=1e6).contains(&factor) {
        return Err(fields.wrong(field, "a number from 1 to 1e6"));
    }
    Ok(factor)
}

fn dtype(fields: &Fields<'_>) -> Result<Option<Dtype>, ConfigError> {
    let key = if fields.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match fields.text(key)? {
        None => Ok(None),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some("bfloat16") => Ok(Some(Dtype::Bf16)),
        Some(_) => Err(fields.unsupported(key, "float32, float16, bfloat16")),
    }
}

fn mlp(fields: &Fields<'_>) -> Result<MlpConfig, ConfigError> {
    let expected = || format!("2 to {} integers from 1 to {WIDTH_MAX}", LAYERS_MAX + 1);
    let layer_sizes = match fields.value("layer_sizes") {
        None => return Err(fields.missing("layer_sizes")),
        Some(Value::Array(sizes)) if (2..=LAYERS_MAX + 1).contains(&sizes.len()) => sizes
            .iter()
            .map(|size| integer(size, 1, WIDTH_MAX))
            .collect::<Option<Vec<usize>>>()
            .ok_or_else(|| fields.wrong("layer_sizes", &expected()))?,
        Some(_) => return Err(fields.wrong("layer_sizes", &expected())),
    };
    let activation = match fields.text("activation")? {
        Some("relu") => Activation::Relu,
        Some("gelu") => Activation::Gelu,
        Some("tanh") => Activation::Tanh,
        Some(_) => return Err(fields.unsupported("activation", "relu, gelu, tanh")),
        None => return Err(fields.missing("activation")),
    };
    Ok(MlpConfig { layer_sizes, activation, dtype: dtype(fields)? })
}

/// The fields of one JSON object, with the path that leads to it.
struct Fields<'a> {
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value of a field; `null` counts as absent, as transformers writes it.
    fn value(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(field, "a string")),
        }
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    fn object(&self, field: &str, prefix: &'static str) -> Result<Option<Self>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { prefix, map })),
            Some(_) => Err(self.wrong(field, "an object")),
        }
    }

    fn optional_number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(field, "a number")),
            },
        }
    }

    fn number(&self, field: &str) -> Result<f64, ConfigError> {
        self.optional_number(field)?.ok_or_else(|| self.missing(field))
    }

    /// An integer from 1 to `max`.
    fn optional_size(&self, field: &str, max: usize) -> Result<Option<usize>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => match integer(value, 1, max) {
                Some(size) => Ok(Some(size)),
                None if max == usize::MAX => Err(self.wrong(field, "a positive integer")),
                None => Err(self.wrong(field, &format!("an integer from 1 to {max}"))),
            },
        }
    }

    fn size(&self, field: &str, max: usize) -> Result<usize, ConfigError> {
        self.optional_size(field, max)?.ok_or_else(|| self.missing(field))
    }

    fn token(&self, field: &str, vocabulary: usize) -> Result<Option<u32>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => match token(value, vocabulary) {
                Some(id) => Ok(Some(id)),
                None => Err(self.wrong(field, &format!("a token id below vocab_size = {vocabulary}"))),
            },
        }
    }

    /// One token id or a list of them.
    fn tokens(&self, field: &str, vocabulary: usize) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(Vec::new()) };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = values
            .iter()
            .map(|value| token(value, vocabulary))
            .collect::<Option<Vec<u32>>>()
            .filter(|ids| ids.len() <= EOS_MAX)
            .ok_or_else(|| {
                self.wrong(field, &format!("at most {EOS_MAX} token ids below vocab_size = {vocabulary}"))
            })?;
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn found(&self, field: &str) -> String {
        self.map.get(field).map_or_else(|| "nothing".to_owned(), quote)
    }

    fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { field: self.name(field) }
    }

    fn wrong(&self, field: &str, expected: &str) -> ConfigError {
        ConfigError::Wrong { field: self.name(field), expected: expected.to_owned(), found: self.found(field) }
    }

    fn unsupported(&self, field: &str, supported: &str) -> ConfigError {
        ConfigError::Unsupported { field: self.name(field), found: self.found(field), supported: supported.to_owned() }
    }

    fn inconsistent(&self, field: &str, other: String) -> ConfigError {
        ConfigError::Inconsistent { field: self.name(field), found: self.found(field), other }
    }
}

fn integer(value: &Value, min: usize, max: usize) -> Option<usize> {
    let number = usize::try_from(value.as_u64()?).ok()?;
    (min..=max).contains(&number).then_some(number)
}

fn token(value: &Value, vocabulary: usize) -> Option<u32> {
    u32::try_from(integer(value, 0, vocabulary.checked_sub(1)?)?).ok()
}

/// A value as it may appear in an error: JSON, shortened.
fn quote(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
