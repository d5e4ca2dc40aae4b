//! Layers of the llama family.
//!
//! Purpose: which tensors a model has, and the order of operations of a layer: RMSNorm, projections, an RMSNorm of each
//! head where the model has one, rotation, grouped
//! attention, residual, RMSNorm, gated MLP, residual. The bits of each operation are the kernels' business.
//!
//! Invariants: the first slice holds the embedding, the last one the final norm and the head; a tied head is the
//! embedding's own packed matrix where both are in one slice. Row `i` of a batch is computed from row `i` and from what
//! its sequence saw before.
//!
//! It refuses to know files, requests and sampling.

use std::ops::Range;
use std::sync::Arc;

use butterfly_kernels::{
    CacheStorage, KvCache, Matrix, Pool, RopeTable, add_assign, attention, linear, log_probs, rms_norm, rope, silu_mul,
};

use super::ModelError;
use super::config::LlamaConfig;
use super::gguf::tensors::ROPE_FACTORS;
use super::loading::Loading;
use super::sequence::{Scoring, Span};
use super::weights::{Weights, WeightsError};

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";
/// Within a layer.
const QUERY_NORM: &str = "self_attn.q_norm.weight";
const KEY_NORM: &str = "self_attn.k_norm.weight";
/// Rows whose logits are in memory at a time, where those of a whole prompt are wanted.
const SCORED_ROWS: usize = 8;

/// A range of llama layers with what surrounds them.
#[derive(Debug)]
pub(super) struct LlamaSlice {
    config: LlamaConfig,
    embedding: Option<Arc<Matrix>>,
    layers: Vec<Layer>,
    exit: Option<Exit>,
    rope: RopeTable,
}

/// What follows the last layer.
#[derive(Debug)]
struct Exit {
    norm: Vec<f32>,
    head: Arc<Matrix>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Weights of the norms of each head of queries and of keys, `[head_dim]`.
    head_norms: Option<[Vec<f32>; 2]>,
    mlp_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

/// Names (after `model.layers.N.`) and shapes of the tensors of one layer.
pub(super) fn layer_shapes(config: &LlamaConfig) -> Vec<(&'static str, Vec<usize>)> {
    let (hidden, wide) = (config.hidden, config.intermediate);
    let (query, key) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut shapes = vec![
        ("input_layernorm.weight", vec![hidden]),
        ("self_attn.q_proj.weight", vec![query, hidden]),
        ("self_attn.k_proj.weight", vec![key, hidden]),
        ("self_attn.v_proj.weight", vec![key, hidden]),
        ("self_attn.o_proj.weight", vec![hidden, query]),
        ("post_attention_layernorm.weight", vec![hidden]),
        ("mlp.gate_proj.weight", vec![wide, hidden]),
        ("mlp.up_proj.weight", vec![wide, hidden]),
        ("mlp.down_proj.weight", vec![hidden, wide]),
    ];
    if config.qkv_bias {
        shapes.push(("self_attn.q_proj.bias", vec![query]));
        shapes.push(("self_attn.k_proj.bias", vec![key]));
        shapes.push(("self_attn.v_proj.bias", vec![key]));
    }
    if config.head_norms {
        shapes.push((QUERY_NORM, vec![config.head_dim]));
        shapes.push((KEY_NORM, vec![config.head_dim]));
    }
    if config.output_bias {
        shapes.push(("self_attn.o_proj.bias", vec![hidden]));
    }
    if config.mlp_bias {
        shapes.push(("mlp.gate_proj.bias", vec![wide]));
        shapes.push(("mlp.up_proj.bias", vec![wide]));
        shapes.push(("mlp.down_proj.bias", vec![hidden]));
    }
    shapes
}

/// Names and shapes of every tensor of the model.
pub(super) fn shapes(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let matrix = vec![config.vocabulary, config.hidden];
    let mut shapes = vec![(EMBEDDING.to_owned(), matrix.clone()), (FINAL_NORM.to_owned(), vec![config.hidden])];
    if !config.tied_head {
        shapes.push((HEAD.to_owned(), matrix));
    }
    for layer in 0..config.layers {
        for (name, shape) in layer_shapes(config) {
            shapes.push((layer_tensor(layer, name), shape));
        }
    }
    shapes
}

/// Tensors that files carry and that take no part: a stored copy of the rotation frequencies, and of a tied head.
pub(super) fn takes_no_part(config: &LlamaConfig, tensor: &str) -> bool {
    tensor.ends_with("rotary_emb.inv_freq") || (config.tied_head && tensor == HEAD)
}

pub(super) fn layer_tensor(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

impl LlamaSlice {
    /// Packs the layers `range` of the model.
    pub(super) fn load(
        config: &LlamaConfig,
        weights: &Weights,
        loading: &Loading<'_>,
        range: Range<usize>,
    ) -> Result<Self, ModelError> {
        let vocabulary = [config.vocabulary, config.hidden];
        let embedding = if range.start == 0 {
            Some(Arc::new(weights.matrix(loading, EMBEDDING, vocabulary, config.dtype)?))
        } else {
            None
        };
        let exit = if range.end == config.layers {
            let head = match &embedding {
                Some(embedding) if config.tied_head => Arc::clone(embedding),
                _ => {
                    let tensor = if config.tied_head { EMBEDDING } else { HEAD };
                    Arc::new(weights.matrix(loading, tensor, vocabulary, config.dtype)?)
                }
            };
            Some(Exit { norm: weights.vector(loading, FINAL_NORM, config.hidden, config.dtype)?, head })
        } else {
            None
        };
        let layers = Loading::layers(range, |layer| Layer::load(config, weights, loading, layer))?;
        let (theta, positions) = (config.rope_theta, config.context_length);
        let half = config.head_dim / 2;
        let factors =
            weights.has(ROPE_FACTORS).then(|| weights.vector(loading, ROPE_FACTORS, half, None)).transpose()?;
        let rope = RopeTable::with_factors(config.head_dim, theta, positions, config.rope_scaling, factors.as_deref())
            .map_err(ModelError::Rotation)?;
        Ok(Self { config: config.clone(), embedding, layers, exit, rope })
    }

    pub(super) fn is_last(&self) -> bool {
        self.exit.is_some()
    }

    pub(super) fn width(&self) -> usize {
        self.config.hidden
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    pub(super) fn new_caches(&self, storage: CacheStorage) -> Vec<KvCache> {
        let LlamaConfig { kv_heads, head_dim, context_length, .. } = self.config;
        self.layers.iter().map(|_| KvCache::with_storage(kv_heads, head_dim, context_length, storage)).collect()
    }

    pub(super) fn weight_bytes(&self) -> usize {
        let embedding = self.embedding.as_ref().map_or(0, |matrix| matrix.bytes());
        let exit = self.exit.as_ref().map_or(0, |exit| {
            let shared = self.embedding.as_ref().is_some_and(|embedding| Arc::ptr_eq(embedding, &exit.head));
            size_of_val(exit.norm.as_slice()) + if shared { 0 } else { exit.head.bytes() }
        });
        embedding + exit + self.layers.iter().map(Layer::bytes).sum::<usize>()
    }

    /// Appends the embeddings of checked tokens to a batch.
    pub(super) fn embed(&self, tokens: &[u32], batch: &mut Vec<f32>) {
        let Some(embedding) = &self.embedding else { return };
        let start = batch.len();
        batch.resize(start + tokens.len() * self.config.hidden, 0.0);
        let rows = batch.get_mut(start..).unwrap_or_default().chunks_exact_mut(self.config.hidden);
        for (row, token) in rows.zip(tokens) {
            embedding.row(*token as usize, row);
        }
    }

    /// Runs the layers over the residual rows of a batch, f32 `[rows, hidden]`; gives the rows that leave.
    pub(super) fn run(&self, pool: &Pool, mut residual: Vec<f32>, spans: &mut [Span<'_>]) -> Vec<f32> {
        let config = &self.config;
        let rows = residual.len() / config.hidden;
        let positions: Vec<u32> = spans
            .iter()
            .flat_map(|span| span.position..span.position + span.rows.len())
            .map(|position| u32::try_from(position).unwrap_or(u32::MAX))
            .collect();
        let mut scratch = Scratch::new(config, rows);
        for (index, layer) in self.layers.iter().enumerate() {
            rms_norm(pool, &residual, &layer.input_norm, config.norm_epsilon, &mut scratch.normed);
            layer.query.apply(pool, &scratch.normed, &mut scratch.query);
            layer.key.apply(pool, &scratch.normed, &mut scratch.key);
            layer.value.apply(pool, &scratch.normed, &mut scratch.value);
            if let Some([query, key]) = &layer.head_norms {
                rms_norm(pool, &scratch.query, query, config.norm_epsilon, &mut scratch.attended);
                std::mem::swap(&mut scratch.query, &mut scratch.attended);
                rms_norm(pool, &scratch.key, key, config.norm_epsilon, &mut scratch.normed_key);
                std::mem::swap(&mut scratch.key, &mut scratch.normed_key);
            }
            rope(&mut scratch.query, config.heads, &positions, &self.rope);
            rope(&mut scratch.key, config.kv_heads, &positions, &self.rope);
            for span in spans.iter_mut() {
                self.attend(pool, index, span, &mut scratch);
            }
            layer.output.apply(pool, &scratch.attended, &mut scratch.normed);
            add_assign(&mut residual, &scratch.normed);
            for span in spans.iter_mut() {
                span.settle(&residual, config.hidden);
                let rows = residual.get(span.finite_elements(config.hidden)).unwrap_or_default();
                span.sequence.interior.push(index, rows);
            }
            rms_norm(pool, &residual, &layer.mlp_norm, config.norm_epsilon, &mut scratch.normed);
            layer.gate.apply(pool, &scratch.normed, &mut scratch.gate);
            layer.up.apply(pool, &scratch.normed, &mut scratch.up);
            silu_mul(pool, &scratch.gate, &scratch.up, &mut scratch.gated);
            layer.down.apply(pool, &scratch.gated, &mut scratch.normed);
            add_assign(&mut residual, &scratch.normed);
            for span in spans.iter_mut() {
                span.settle(&residual, config.hidden);
            }
        }
        residual
    }

    /// Adds one step's keys and values to its cache and attends over it. Rows after the first one that is not finite get
    /// zeros; nothing reads what becomes of them.
    fn attend(&self, pool: &Pool, layer: usize, span: &mut Span<'_>, scratch: &mut Scratch) {
        let LlamaConfig { heads, kv_heads, head_dim, .. } = self.config;
        let (kv_width, width) = (kv_heads * head_dim, heads * head_dim);
        let elements = span.finite_elements(kv_width);
        let keys = scratch.key.get(elements.clone()).unwrap_or_default().chunks_exact(kv_width);
        let values = scratch.value.get(elements).unwrap_or_default().chunks_exact(kv_width);
        let Some(cache) = span.sequence.caches.get_mut(layer) else { return };
        span.finite = keys.zip(values).take_while(|(key, value)| cache.push(key, value).is_ok()).count();
        let whole = span.rows.start * width..span.rows.end * width;
        scratch.attended.get_mut(whole).unwrap_or_default().fill(0.0);
        let finite = span.finite_elements(width);
        let (query, out) = (scratch.query.get(finite.clone()), scratch.attended.get_mut(finite));
        if let (1.., Some(query), Some(out), Some(cache)) = (span.finite, query, out, span.sequence.caches.get(layer)) {
            attention(pool, query, cache, span.position, heads, out);
        }
    }

    /// The logits of each span's last row.
    pub(super) fn logits(&self, pool: &Pool, residual: &[f32], spans: &[Span<'_>]) -> Vec<Vec<f32>> {
        let Some(exit) = &self.exit else { return Vec::new() };
        let hidden = self.config.hidden;
        let mut last = Vec::with_capacity(spans.len() * hidden);
        for span in spans {
            let end = span.rows.end * hidden;
            last.extend_from_slice(residual.get(end - hidden..end).unwrap_or_default());
        }
        exit.logits(pool, &self.config, &last).chunks_exact(self.config.vocabulary).map(<[f32]>::to_vec).collect()
    }

    /// Says how likely the tokens were that are known to follow, a few rows at a time, since logits are wide.
    pub(super) fn score(&self, pool: &Pool, residual: &[f32], spans: &mut [Span<'_>]) {
        let Some(exit) = &self.exit else { return };
        let LlamaConfig { hidden, vocabulary, .. } = self.config;
        for span in spans.iter_mut().filter(|span| span.finite == span.rows.len()) {
            let Some(Scoring { next, top }) = span.scoring else { continue };
            let rows = residual.get(span.rows.start * hidden..span.rows.end * hidden).unwrap_or_default();
            for (rows, next) in rows.chunks(SCORED_ROWS * hidden).zip(next.chunks(SCORED_ROWS)) {
                let rows = rows.get(..next.len() * hidden).unwrap_or(rows);
                let logits = exit.logits(pool, &self.config, rows);
                let each = logits.chunks_exact(vocabulary).zip(next);
                span.scored.extend(each.map(|(logits, token)| log_probs(logits, *token, *top).ok()));
            }
        }
    }
}

impl Exit {
    /// f32 `[rows, vocabulary]` from the residual, f32 `[rows, hidden]`.
    fn logits(&self, pool: &Pool, config: &LlamaConfig, residual: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; residual.len()];
        rms_norm(pool, residual, &self.norm, config.norm_epsilon, &mut normed);
        let mut logits = vec![0.0; residual.len() / config.hidden * config.vocabulary];
        linear(pool, &self.head, None, &normed, &mut logits);
        logits
    }
}

impl Layer {
    fn load(
        config: &LlamaConfig,
        weights: &Weights,
        loading: &Loading<'_>,
        layer: usize,
    ) -> Result<Self, WeightsError> {
        let shapes = layer_shapes(config);
        let shape = |name: &str| shapes.iter().find(|(known, _)| *known == name).map(|(_, shape)| shape.as_slice());
        let norm = |name: &str| weights.vector(loading, &layer_tensor(layer, name), config.hidden, config.dtype);
        let head_norm = |name: &str| weights.vector(loading, &layer_tensor(layer, name), config.head_dim, config.dtype);
        let linear = |name: &str| -> Result<Linear, WeightsError> {
            let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
            let matrix = match shape(&weight) {
                Some(&[rows, columns]) => [rows, columns],
                _ => [0, 0],
            };
            let matrix = weights.matrix(loading, &layer_tensor(layer, &weight), matrix, config.dtype)?;
            let bias = match shape(&bias) {
                Some(&[length]) => Some(weights.vector(loading, &layer_tensor(layer, &bias), length, config.dtype)?),
                _ => None,
            };
            Ok(Linear { matrix, bias })
        };
        Ok(Self {
            input_norm: norm("input_layernorm.weight")?,
            query: linear("self_attn.q_proj")?,
            key: linear("self_attn.k_proj")?,
            value: linear("self_attn.v_proj")?,
            output: linear("self_attn.o_proj")?,
            head_norms: match config.head_norms {
                true => Some([head_norm(QUERY_NORM)?, head_norm(KEY_NORM)?]),
                false => None,
            },
            mlp_norm: norm("post_attention_layernorm.weight")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    fn bytes(&self) -> usize {
        let linears = [&self.query, &self.key, &self.value, &self.output, &self.gate, &self.up, &self.down].into_iter();
        let vectors = [&self.input_norm, &self.mlp_norm].into_iter();
        let vectors = vectors.chain(self.head_norms.iter().flatten());
        let vectors = vectors.chain(linears.clone().filter_map(|linear| linear.bias.as_ref()));
        linears.map(|linear| linear.matrix.bytes()).sum::<usize>()
            + vectors.map(|vector| size_of_val(vector.as_slice())).sum::<usize>()
    }
}

impl Linear {
    fn apply(&self, pool: &Pool, x: &[f32], y: &mut [f32]) {
        linear(pool, &self.matrix, self.bias.as_deref(), x, y);
    }
}

/// Rows between the operations of a layer, reused by all layers of a pass.
struct Scratch {
    /// `[rows, hidden]`: the normed residual, then what is added to it.
    normed: Vec<f32>,
    /// `[rows, heads, head_dim]`
    query: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`
    key: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`, where heads are normed
    normed_key: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`
    value: Vec<f32>,
    /// `[rows, heads, head_dim]`
    attended: Vec<f32>,
    /// `[rows, intermediate]`
    gate: Vec<f32>,
    /// `[rows, intermediate]`
    up: Vec<f32>,
    /// `[rows, intermediate]`
    gated: Vec<f32>,
}

impl Scratch {
    fn new(config: &LlamaConfig, rows: usize) -> Self {
        let buffer = |width: usize| vec![0.0; rows * width];
        Self {
            normed: buffer(config.hidden),
            query: buffer(config.heads * config.head_dim),
            key: buffer(config.kv_heads * config.head_dim),
            normed_key: buffer(if config.head_norms { config.kv_heads * config.head_dim } else { 0 }),
            value: buffer(config.kv_heads * config.head_dim),
            attended: buffer(config.heads * config.head_dim),
            gate: buffer(config.intermediate),
            up: buffer(config.intermediate),
            gated: buffer(config.intermediate),
        }
    }
}
