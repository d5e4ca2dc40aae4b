//! Dense layers on raw vectors.
//!
//! Purpose: `layers.N.weight [out, in]` and `layers.N.bias [out]`, with the activation after every layer but the last.
//!
//! Invariants: a layer's output row depends on its input row alone. It refuses to know files and requests.

use std::ops::Range;

use butterfly_kernels::{Matrix, Pool, gelu, linear, relu, tanh};

use super::config::{Activation, MlpConfig};
use super::loading::Loading;
use super::sequence::Span;
use super::weights::{Weights, WeightsError};

/// A range of dense layers.
#[derive(Debug)]
pub(super) struct MlpSlice {
    layers: Vec<Layer>,
    is_last: bool,
}

#[derive(Debug)]
struct Layer {
    matrix: Matrix,
    bias: Vec<f32>,
    /// `None` after the model's last layer.
    activation: Option<Activation>,
}

/// Names and shapes of every tensor of the model.
pub(super) fn shapes(config: &MlpConfig) -> Vec<(String, Vec<usize>)> {
    let sizes = config.layer_sizes.iter().zip(config.layer_sizes.iter().skip(1)).enumerate();
    sizes
        .flat_map(|(layer, (inputs, outputs))| {
            [(weight(layer), vec![*outputs, *inputs]), (bias(layer), vec![*outputs])]
        })
        .collect()
}

pub(super) fn weight(layer: usize) -> String {
    format!("layers.{layer}.weight")
}

pub(super) fn bias(layer: usize) -> String {
    format!("layers.{layer}.bias")
}

impl MlpSlice {
    /// Packs the layers `range` of the model, which is not empty.
    pub(super) fn load(
        config: &MlpConfig,
        weights: &Weights,
        loading: &Loading<'_>,
        range: Range<usize>,
    ) -> Result<Self, WeightsError> {
        let last = config.layer_sizes.len().saturating_sub(1);
        let is_last = range.end == last;
        let mut layers = Vec::with_capacity(range.len());
        for layer in range {
            let size = |index: usize| config.layer_sizes.get(index).copied().unwrap_or(0);
            let (inputs, outputs) = (size(layer), size(layer + 1));
            layers.push(Layer {
                matrix: weights.matrix(loading, &weight(layer), [outputs, inputs], config.dtype)?,
                bias: weights.vector(loading, &bias(layer), outputs, config.dtype)?,
                activation: (layer + 1 < last).then_some(config.activation),
            });
        }
        Ok(Self { layers, is_last })
    }

    pub(super) fn is_last(&self) -> bool {
        self.is_last
    }

    pub(super) fn input_width(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.matrix.columns())
    }

    pub(super) fn output_width(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.matrix.rows())
    }

    pub(super) fn weight_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.matrix.bytes() + size_of_val(layer.bias.as_slice())).sum()
    }

    /// Runs the layers over the rows of a batch, f32 `[rows, input_width]`; gives `[rows, output_width]`.
    pub(super) fn run(&self, pool: &Pool, mut batch: Vec<f32>, spans: &mut [Span<'_>]) -> Vec<f32> {
        for (index, layer) in self.layers.iter().enumerate() {
            let rows = batch.len() / layer.matrix.columns();
            let width = layer.matrix.rows();
            let mut out = vec![0.0; rows * width];
            linear(pool, &layer.matrix, Some(&layer.bias), &batch, &mut out);
            // Before the activation: tanh would make a number of an infinity.
            spans.iter_mut().for_each(|span| span.settle(&out, width));
            match layer.activation {
                Some(Activation::Relu) => relu(pool, &mut out),
                Some(Activation::Gelu) => gelu(pool, &mut out),
                Some(Activation::Tanh) => tanh(pool, &mut out),
                None => {}
            }
            for span in spans.iter_mut() {
                span.settle(&out, width);
                let rows = out.get(span.finite_elements(width)).unwrap_or_default();
                span.sequence.interior.push(index, rows);
            }
            batch = out;
        }
        batch
    }
}
