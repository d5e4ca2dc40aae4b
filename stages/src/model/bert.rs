//! Layers of the BERT family: texts in, one vector out.
//!
//! Purpose: which tensors a model has, and the order of operations of a layer: projections, attention of every position
//! to every other, residual and LayerNorm, MLP with GELU, residual and LayerNorm. What surrounds the layers is the sum of
//! three embeddings with a LayerNorm before, and the pooling behind. The bits of each operation are the kernels' business.
//!
//! Invariants: a text is one step, so that every position sees all others; keys and values are f32 and live no longer than
//! the step; nothing is padded, so that neighbours in a batch never meet. One NaN or infinity anywhere in a text ends the
//! whole text, since every position depends on all.
//!
//! It refuses to know files, requests and how texts are cut.

use std::ops::Range;

use butterfly_kernels::{
    CacheStorage, KvCache, Matrix, Pool, add_assign, attention_bidirectional, gelu, layer_norm, linear, sum,
};

use super::config::BertConfig;
use super::config::pooling::{Pooled, Pooling};
use super::loading::Loading;
use super::sequence::Span;
use super::weights::{Weights, WeightsError};

const WORDS: &str = "embeddings.word_embeddings.weight";
const POSITIONS: &str = "embeddings.position_embeddings.weight";
const TYPES: &str = "embeddings.token_type_embeddings.weight";
const EMBEDDING_NORM: &str = "embeddings.LayerNorm";
/// What files of a model with a head put before the names of the encoder's tensors.
const PREFIX: &str = "bert.";

/// A range of encoder layers with what surrounds them.
#[derive(Debug)]
pub(super) struct BertSlice {
    config: BertConfig,
    pooling: Pooling,
    entry: Option<Entry>,
    layers: Vec<Layer>,
    is_last: bool,
}

/// What precedes the first layer.
#[derive(Debug)]
struct Entry {
    words: Matrix,
    positions: Matrix,
    /// The row of token type 0, which every token of a single text has.
    first_type: Vec<f32>,
    norm: Norm,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention_norm: Norm,
    wide: Linear,
    narrow: Linear,
    norm: Norm,
}

#[derive(Debug)]
struct Linear {
    matrix: Matrix,
    bias: Vec<f32>,
}

#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Names (after `encoder.layer.N.`) and shapes of the tensors of one layer.
pub(super) fn layer_shapes(config: &BertConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, wide) = (config.hidden, config.intermediate);
    let mut shapes = Vec::new();
    for (name, outputs, inputs) in [
        ("attention.self.query", hidden, hidden),
        ("attention.self.key", hidden, hidden),
        ("attention.self.value", hidden, hidden),
        ("attention.output.dense", hidden, hidden),
        ("intermediate.dense", wide, hidden),
        ("output.dense", hidden, wide),
    ] {
        shapes.push((format!("{name}.weight"), vec![outputs, inputs]));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    }
    for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
        shapes.push((format!("{name}.weight"), vec![hidden]));
        shapes.push((format!("{name}.bias"), vec![hidden]));
    }
    shapes
}

/// Names and shapes of the tensors before the first layer.
fn entry_shapes(config: &BertConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden;
    vec![
        (WORDS.to_owned(), vec![config.vocabulary, hidden]),
        (POSITIONS.to_owned(), vec![config.context_length, hidden]),
        (TYPES.to_owned(), vec![config.token_types, hidden]),
        (format!("{EMBEDDING_NORM}.weight"), vec![hidden]),
        (format!("{EMBEDDING_NORM}.bias"), vec![hidden]),
    ]
}

/// Names and shapes of every tensor of the model, as its files name them.
pub(super) fn shapes(config: &BertConfig, weights: &Weights) -> Vec<(String, Vec<usize>)> {
    let entry = entry_tensors(config, weights).into_iter().zip(entry_shapes(config));
    let layers = (0..config.layers)
        .flat_map(|layer| layer_tensors(config, weights, layer).into_iter().zip(layer_shapes(config)));
    entry.chain(layers).map(|(name, (_, shape))| (name, shape)).collect()
}

/// Names of the tensors before the first layer, as the model's files name them.
pub(super) fn entry_tensors(config: &BertConfig, weights: &Weights) -> Vec<String> {
    let prefix = prefix(weights);
    entry_shapes(config).into_iter().map(|(name, _)| format!("{prefix}{name}")).collect()
}

/// Names of the tensors of one layer, as the model's files name them.
pub(super) fn layer_tensors(config: &BertConfig, weights: &Weights, layer: usize) -> Vec<String> {
    let prefix = prefix(weights);
    layer_shapes(config).into_iter().map(|(name, _)| format!("{prefix}encoder.layer.{layer}.{name}")).collect()
}

/// Tensors that files carry and that take no part: the numbers of the positions, the pooler of the training task, and the
/// heads of other tasks beside a prefixed encoder.
pub(super) fn takes_no_part(weights: &Weights, tensor: &str) -> bool {
    let prefix = prefix(weights);
    let name = tensor.strip_prefix(prefix).unwrap_or(tensor);
    name == "embeddings.position_ids"
        || name.starts_with("pooler.")
        || (!prefix.is_empty() && tensor.starts_with("cls."))
}

fn prefix(weights: &Weights) -> &'static str {
    if weights.has(&format!("{PREFIX}{WORDS}")) { PREFIX } else { "" }
}

/// The tensors of a model, by the names they would have without a prefix.
struct Tensors<'a> {
    config: &'a BertConfig,
    weights: &'a Weights,
    loading: &'a Loading<'a>,
    prefix: &'static str,
}

impl Tensors<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, WeightsError> {
        self.weights.matrix(self.loading, &format!("{}{name}", self.prefix), shape, self.config.dtype)
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, WeightsError> {
        self.weights.vector(self.loading, &format!("{}{name}", self.prefix), length, self.config.dtype)
    }

    fn linear(&self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, WeightsError> {
        let matrix = self.matrix(&format!("{name}.weight"), [outputs, inputs])?;
        Ok(Linear { matrix, bias: self.vector(&format!("{name}.bias"), outputs)? })
    }

    fn norm(&self, name: &str) -> Result<Norm, WeightsError> {
        let weight = self.vector(&format!("{name}.weight"), self.config.hidden)?;
        Ok(Norm { weight, bias: self.vector(&format!("{name}.bias"), self.config.hidden)? })
    }

    fn entry(&self) -> Result<Entry, WeightsError> {
        let hidden = self.config.hidden;
        let mut first_type = vec![0.0; hidden];
        self.matrix(TYPES, [self.config.token_types, hidden])?.row(0, &mut first_type);
        Ok(Entry {
            words: self.matrix(WORDS, [self.config.vocabulary, hidden])?,
            positions: self.matrix(POSITIONS, [self.config.context_length, hidden])?,
            first_type,
            norm: self.norm(EMBEDDING_NORM)?,
        })
    }

    fn layer(&self, layer: usize) -> Result<Layer, WeightsError> {
        let (hidden, wide) = (self.config.hidden, self.config.intermediate);
        let name = |name: &str| format!("encoder.layer.{layer}.{name}");
        Ok(Layer {
            query: self.linear(&name("attention.self.query"), hidden, hidden)?,
            key: self.linear(&name("attention.self.key"), hidden, hidden)?,
            value: self.linear(&name("attention.self.value"), hidden, hidden)?,
            output: self.linear(&name("attention.output.dense"), hidden, hidden)?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"))?,
            wide: self.linear(&name("intermediate.dense"), wide, hidden)?,
            narrow: self.linear(&name("output.dense"), hidden, wide)?,
            norm: self.norm(&name("output.LayerNorm"))?,
        })
    }
}

impl BertSlice {
    /// Packs the layers `range` of the model.
    pub(super) fn load(
        config: &BertConfig,
        pooling: Pooling,
        weights: &Weights,
        loading: &Loading<'_>,
        range: Range<usize>,
    ) -> Result<Self, WeightsError> {
        let tensors = Tensors { config, weights, loading, prefix: prefix(weights) };
        let entry = if range.start == 0 { Some(tensors.entry()?) } else { None };
        let is_last = range.end == config.layers;
        let layers = Loading::layers(range, |layer| tensors.layer(layer))?;
        Ok(Self { config: config.clone(), pooling, entry, layers, is_last })
    }

    pub(super) fn is_last(&self) -> bool {
        self.is_last
    }

    pub(super) fn width(&self) -> usize {
        self.config.hidden
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    pub(super) fn weight_bytes(&self) -> usize {
        let entry = self.entry.as_ref().map_or(0, |entry| {
            entry.words.bytes()
                + entry.positions.bytes()
                + size_of_val(entry.first_type.as_slice())
                + entry.norm.bytes()
        });
        entry + self.layers.iter().map(Layer::bytes).sum::<usize>()
    }

    /// Appends the sums of the embeddings of checked tokens, which begin a text, to a batch. They are not normed yet.
    pub(super) fn embed(&self, tokens: &[u32], batch: &mut Vec<f32>) {
        let Some(entry) = &self.entry else { return };
        let hidden = self.config.hidden;
        let start = batch.len();
        batch.resize(start + tokens.len() * hidden, 0.0);
        let rows = batch.get_mut(start..).unwrap_or_default().chunks_exact_mut(hidden);
        let mut position_row = vec![0.0; hidden];
        for (position, (row, token)) in rows.zip(tokens).enumerate() {
            entry.words.row(*token as usize, row);
            add_assign(row, &entry.first_type);
            entry.positions.row(position, &mut position_row);
            add_assign(row, &position_row);
        }
    }

    /// Runs the layers over the rows of a batch, f32 `[rows, hidden]`; gives the rows that leave the last of them.
    pub(super) fn run(&self, pool: &Pool, mut batch: Vec<f32>, spans: &mut [Span<'_>]) -> Vec<f32> {
        let BertConfig { hidden, intermediate, norm_epsilon: epsilon, .. } = self.config;
        let rows = batch.len() / hidden;
        let buffer = |width: usize| vec![0.0; rows * width];
        let (mut query, mut key, mut value) = (buffer(hidden), buffer(hidden), buffer(hidden));
        let (mut attended, mut sums, mut wide) = (buffer(hidden), buffer(hidden), buffer(intermediate));
        if let Some(entry) = &self.entry {
            entry.norm.apply(pool, &batch, epsilon, &mut sums);
            std::mem::swap(&mut batch, &mut sums);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.query.apply(pool, &batch, &mut query);
            layer.key.apply(pool, &batch, &mut key);
            layer.value.apply(pool, &batch, &mut value);
            for span in spans.iter_mut() {
                self.attend(pool, span, [&query, &key, &value], &mut attended);
            }
            layer.output.apply(pool, &attended, &mut sums);
            add_assign(&mut sums, &batch);
            layer.attention_norm.apply(pool, &sums, epsilon, &mut batch);
            for span in spans.iter_mut() {
                settle(span, &batch, hidden);
                let rows = batch.get(span.finite_elements(hidden)).unwrap_or_default();
                span.sequence.interior.push(index, rows);
            }
            layer.wide.apply(pool, &batch, &mut wide);
            gelu(pool, &mut wide);
            layer.narrow.apply(pool, &wide, &mut sums);
            add_assign(&mut sums, &batch);
            layer.norm.apply(pool, &sums, epsilon, &mut batch);
            for span in spans.iter_mut() {
                settle(span, &batch, hidden);
            }
        }
        batch
    }

    /// Attention of all rows of one text to each other. A text that is not finite gets zeros, and nothing reads what
    /// becomes of them.
    fn attend(&self, pool: &Pool, span: &mut Span<'_>, [query, key, value]: [&[f32]; 3], attended: &mut [f32]) {
        let BertConfig { hidden, heads, .. } = self.config;
        let elements = span.rows.start * hidden..span.rows.end * hidden;
        let (Some(out), Some(query), Some(key), Some(value)) = (
            attended.get_mut(elements.clone()),
            query.get(elements.clone()),
            key.get(elements.clone()),
            value.get(elements),
        ) else {
            return;
        };
        out.fill(0.0);
        if span.finite == 0 {
            return;
        }
        let mut cache = KvCache::with_storage(heads, hidden / heads, span.rows.len(), CacheStorage::F32);
        let mut pairs = key.chunks_exact(hidden).zip(value.chunks_exact(hidden));
        if pairs.all(|(key, value)| cache.push(key, value).is_ok()) {
            attention_bidirectional(pool, query, &cache, heads, out);
        } else {
            span.finite = 0;
        }
    }

    /// The vector of each text, from the rows that left the last layer.
    pub(super) fn vectors(&self, pool: &Pool, batch: &[f32], spans: &mut [Span<'_>]) -> Vec<Vec<f32>> {
        let hidden = self.config.hidden;
        let vector = |span: &mut Span<'_>| {
            let rows = batch.get(span.rows.start * hidden..span.rows.end * hidden).unwrap_or_default();
            let mut vector = pooled(pool, self.pooling.pooled, rows, hidden);
            if self.pooling.normalise {
                let squares: Vec<f32> = vector.iter().map(|value| value * value).collect();
                let length = sum(pool, &squares).sqrt();
                vector.iter_mut().for_each(|value| *value /= length);
            }
            if !butterfly_kernels::all_finite(&vector) {
                span.finite = 0;
            }
            vector
        };
        spans.iter_mut().map(vector).collect()
    }
}

/// One row of the rows of a text.
fn pooled(pool: &Pool, how: Pooled, rows: &[f32], hidden: usize) -> Vec<f32> {
    match how {
        Pooled::First => rows.get(..hidden).unwrap_or_default().to_vec(),
        Pooled::Mean => {
            let count = (rows.len() / hidden) as f32;
            let column = |column: usize| rows.iter().skip(column).step_by(hidden).copied().collect::<Vec<f32>>();
            (0..hidden).map(|index| sum(pool, &column(index)) / count).collect()
        }
    }
}

/// Ends a text if any of its rows has a NaN or an infinity.
fn settle(span: &mut Span<'_>, batch: &[f32], hidden: usize) {
    span.settle(batch, hidden);
    if span.finite < span.rows.len() {
        span.finite = 0;
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let linears = [&self.query, &self.key, &self.value, &self.output, &self.wide, &self.narrow].into_iter();
        let linears = linears.map(|linear| linear.matrix.bytes() + size_of_val(linear.bias.as_slice()));
        linears.sum::<usize>() + self.attention_norm.bytes() + self.norm.bytes()
    }
}

impl Linear {
    fn apply(&self, pool: &Pool, x: &[f32], y: &mut [f32]) {
        linear(pool, &self.matrix, Some(&self.bias), x, y);
    }
}

impl Norm {
    fn apply(&self, pool: &Pool, x: &[f32], epsilon: f32, y: &mut [f32]) {
        layer_norm(pool, x, &self.weight, &self.bias, epsilon, y);
    }

    fn bytes(&self) -> usize {
        size_of_val(self.weight.as_slice()) + size_of_val(self.bias.as_slice())
    }
}
