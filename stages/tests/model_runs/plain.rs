//! The models once more, as plainly as possible, in f64 and without the program's kernels: what the others are compared
//! with where no other implementation's numbers are at hand.

use std::collections::BTreeMap;

/// Weights by name: shape and row-major values.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

type Rows = Vec<Vec<f64>>;

/// A llama-family model.
pub(crate) struct Llama {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) theta: f64,
    pub(crate) epsilon: f64,
}

/// A BERT encoder.
pub(crate) struct Bert {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) epsilon: f64,
}

fn vector(tensors: &Tensors, name: &str) -> Option<Vec<f64>> {
    tensors.get(name).map(|(_, values)| values.iter().map(|value| f64::from(*value)).collect())
}

fn row(tensors: &Tensors, name: &str, index: usize) -> Vec<f64> {
    let (shape, values) = &tensors[name];
    values[index * shape[1]..(index + 1) * shape[1]].iter().map(|value| f64::from(*value)).collect()
}

fn linear(tensors: &Tensors, name: &str, rows: &Rows) -> Rows {
    let (shape, weights) = &tensors[&format!("{name}.weight")];
    let bias = vector(tensors, &format!("{name}.bias"));
    let output = |row: &[f64], index: usize| {
        let weights = &weights[index * shape[1]..(index + 1) * shape[1]];
        let sum: f64 = weights.iter().zip(row).map(|(weight, x)| f64::from(*weight) * x).sum();
        sum + bias.as_ref().map_or(0.0, |bias| bias[index])
    };
    rows.iter().map(|row| (0..shape[0]).map(|index| output(row, index)).collect()).collect()
}

fn rms_norm(row: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    row.iter().zip(weight).map(|(x, weight)| x / (mean + epsilon).sqrt() * weight).collect()
}

fn layer_norm(tensors: &Tensors, name: &str, rows: &Rows, epsilon: f64) -> Rows {
    let weight = vector(tensors, &format!("{name}.weight")).unwrap();
    let bias = vector(tensors, &format!("{name}.bias")).unwrap();
    let norm = |row: &Vec<f64>| {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
        let scaled = row.iter().map(|x| (x - mean) / (variance + epsilon).sqrt());
        scaled.zip(&weight).zip(&bias).map(|((x, weight), bias)| x * weight + bias).collect()
    };
    rows.iter().map(norm).collect()
}

fn add(left: &Rows, right: &Rows) -> Rows {
    left.iter().zip(right).map(|(left, right)| left.iter().zip(right).map(|(l, r)| l + r).collect()).collect()
}

/// Attention of one query over some keys and values.
fn attend(query: &[f64], keys: &[&[f64]], values: &[&[f64]]) -> Vec<f64> {
    let dot = |key: &&[f64]| query.iter().zip(*key).map(|(q, k)| q * k).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (query.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let column = |index: usize| values.iter().zip(&weights).map(|(value, weight)| value[index] * weight).sum::<f64>();
    (0..query.len()).map(|index| column(index) / sum).collect()
}

/// Erf by its series, or its continued fraction far out.
fn erf(x: f64) -> f64 {
    if x.abs() > 3.0 {
        let tail = (1..60).rev().fold(x.abs(), |below, n| x.abs() + f64::from(n) / 2.0 / below);
        return x.signum() * (1.0 - (-x * x).exp() / tail / std::f64::consts::PI.sqrt());
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..80 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

impl Llama {
    /// The logits of the last token.
    pub(crate) fn logits(&self, tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
        const EMBEDDING: &str = "model.embed_tokens.weight";
        let norm = |name: &str, rows: &Rows| -> Rows {
            let weight = vector(tensors, name).unwrap();
            rows.iter().map(|row| rms_norm(row, &weight, self.epsilon)).collect()
        };
        let mut residual: Rows = tokens.iter().map(|token| row(tensors, EMBEDDING, *token as usize)).collect();
        for layer in 0..self.layers {
            let name = |name: &str| format!("model.layers.{layer}.{name}");
            let normed = norm(&name("input_layernorm.weight"), &residual);
            let heads = |projection: &str, norm: &str| -> Rows {
                let mut rows = linear(tensors, &name(projection), &normed);
                for (position, row) in rows.iter_mut().enumerate() {
                    let weight = vector(tensors, &name(norm));
                    let heads = row.chunks(self.head_dim).flat_map(|head| {
                        let normed = weight.as_ref().map(|weight| rms_norm(head, weight, self.epsilon));
                        self.turned(&normed.unwrap_or_else(|| head.to_vec()), position)
                    });
                    *row = heads.collect();
                }
                rows
            };
            let query = heads("self_attn.q_proj", "self_attn.q_norm.weight");
            let key = heads("self_attn.k_proj", "self_attn.k_norm.weight");
            let value = linear(tensors, &name("self_attn.v_proj"), &normed);
            let attended: Rows = (0..tokens.len())
                .map(|position| {
                    let head = |head: usize| {
                        let shared = head / (self.heads / self.kv_heads);
                        let part = |row: &'_ [f64], head: usize| row[head * self.head_dim..][..self.head_dim].to_vec();
                        let keys: Rows = key[..=position].iter().map(|row| part(row, shared)).collect();
                        let values: Rows = value[..=position].iter().map(|row| part(row, shared)).collect();
                        let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
                        let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
                        attend(&part(&query[position], head), &keys, &values)
                    };
                    (0..self.heads).flat_map(head).collect()
                })
                .collect();
            residual = add(&residual, &linear(tensors, &name("self_attn.o_proj"), &attended));
            let normed = norm(&name("post_attention_layernorm.weight"), &residual);
            let gate = linear(tensors, &name("mlp.gate_proj"), &normed);
            let up = linear(tensors, &name("mlp.up_proj"), &normed);
            let gated = |(gate, up): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
                gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
            };
            let gated: Rows = gate.iter().zip(&up).map(gated).collect();
            residual = add(&residual, &linear(tensors, &name("mlp.down_proj"), &gated));
        }
        let last = norm("model.norm.weight", &vec![residual.pop().unwrap()]);
        let is_tied = !tensors.contains_key("lm_head.weight");
        linear(tensors, if is_tied { "model.embed_tokens" } else { "lm_head" }, &last).remove(0)
    }

    fn turned(&self, head: &[f64], position: usize) -> Vec<f64> {
        let half = self.head_dim / 2;
        let angle = |index: usize| position as f64 / self.theta.powf((2 * index) as f64 / self.head_dim as f64);
        let first = (0..half).map(|i| head[i] * angle(i).cos() - head[i + half] * angle(i).sin());
        let second = (0..half).map(|i| head[i] * angle(i).sin() + head[i + half] * angle(i).cos());
        first.chain(second).collect()
    }
}

impl Bert {
    /// The mean of the last layer's rows, scaled to length 1.
    pub(crate) fn embedding(&self, tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
        let at = |name: &str, index: usize| row(tensors, &format!("embeddings.{name}_embeddings.weight"), index);
        let sums: Rows = tokens
            .iter()
            .enumerate()
            .map(|(position, token)| {
                let (word, place, kind) = (at("word", *token as usize), at("position", position), at("token_type", 0));
                word.iter().zip(place).zip(kind).map(|((word, place), kind)| word + place + kind).collect()
            })
            .collect();
        let mut rows = layer_norm(tensors, "embeddings.LayerNorm", &sums, self.epsilon);
        for layer in 0..self.layers {
            let name = |name: &str| format!("encoder.layer.{layer}.{name}");
            let [query, key, value] =
                ["query", "key", "value"].map(|part| linear(tensors, &name(&format!("attention.self.{part}")), &rows));
            let width = rows[0].len() / self.heads;
            let attended: Rows = query
                .iter()
                .map(|query| {
                    let head = |head: usize| {
                        let range = head * width..(head + 1) * width;
                        let keys: Vec<&[f64]> = key.iter().map(|row| &row[range.clone()]).collect();
                        let values: Vec<&[f64]> = value.iter().map(|row| &row[range.clone()]).collect();
                        attend(&query[range.clone()], &keys, &values)
                    };
                    (0..self.heads).flat_map(head).collect()
                })
                .collect();
            let sums = add(&linear(tensors, &name("attention.output.dense"), &attended), &rows);
            rows = layer_norm(tensors, &name("attention.output.LayerNorm"), &sums, self.epsilon);
            let mut wide = linear(tensors, &name("intermediate.dense"), &rows);
            wide.iter_mut().flatten().for_each(|x| *x = 0.5 * *x * (1.0 + erf(*x / 2f64.sqrt())));
            let sums = add(&linear(tensors, &name("output.dense"), &wide), &rows);
            rows = layer_norm(tensors, &name("output.LayerNorm"), &sums, self.epsilon);
        }
        let mean: Vec<f64> = (0..rows[0].len())
            .map(|column| rows.iter().map(|row| row[column]).sum::<f64>() / rows.len() as f64)
            .collect();
        let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
        mean.iter().map(|x| x / length).collect()
    }
}
