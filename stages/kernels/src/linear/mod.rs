//! Linear layers: `y = W x + b`, one chain for each output.
//!
//! Invariant: a chain takes its steps in ascending order of the inputs from +0.0, then the bias is added. What a step is
//! depends on the format: one number ([`numbers`]), or a block of quantised ones ([`quantised`]). Nothing else does, so
//! the batch, the cut between threads and the instructions never reach a bit.

use crate::activation_blocks::Rounded;
use crate::blocks::Blocks;
use crate::element::{Bf16, F16, F32, Format, Step};
use crate::matrix::{Matrix, Panels};
use crate::pool::{Disjoint, Pool};
use crate::simd::{Block, LANES};
use crate::tile::TILE_ROWS;

mod numbers;
mod quantised;

/// Rows that share one pass over the weights: sixteen tiles.
const BLOCK_ROWS: usize = 16 * TILE_ROWS;

/// Panels that such rows meet together. All the inputs of the rows are more than a second-level cache holds, so they are
/// read once for so many panels.
const BLOCK_PANELS: usize = 4;

/// Writes `y = W x + bias` for each row of `x` `[n, columns]` to `y` `[n, rows]`.
///
/// # Panics
/// If the shapes do not fit the matrix, or each other.
pub fn linear(pool: &Pool, matrix: &Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    let (outputs, inputs) = (matrix.rows(), matrix.columns());
    let rows = x.len() / inputs;
    assert_eq!(x.len(), rows * inputs, "x is rows of {inputs} inputs");
    assert_eq!(y.len(), rows * outputs, "y is {rows} rows of {outputs}");
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "a bias has one number per output");
    let shape = Shape { inputs, outputs, bias };
    match matrix.panels() {
        Panels::F32(steps) => numbers::<F32>(pool, steps, &shape, x, y),
        Panels::F16(steps) => numbers::<F16>(pool, steps, &shape, x, y),
        Panels::Bf16(steps) => numbers::<Bf16>(pool, steps, &shape, x, y),
        Panels::Q8_0(blocks) => quantised(pool, blocks, &shape, x, y),
        Panels::Q4_0(blocks) => quantised(pool, blocks, &shape, x, y),
        Panels::Q4K(blocks) => quantised(pool, blocks, &shape, x, y),
        Panels::Q5K(blocks) => quantised(pool, blocks, &shape, x, y),
        Panels::Q6K(blocks) => quantised(pool, blocks, &shape, x, y),
    }
}

struct Shape<'a> {
    inputs: usize,
    outputs: usize,
    bias: Option<&'a [f32]>,
}

impl<'a> Shape<'a> {
    fn outputs(&self, y: &'a mut [f32]) -> Outputs<'a> {
        Outputs { y: Disjoint::new(y), width: self.outputs, bias: self.bias }
    }
}

fn numbers<F: Format>(pool: &Pool, steps: &[Step<F::Stored>], shape: &Shape<'_>, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks(BLOCK_ROWS * shape.inputs).zip(y.chunks_mut(BLOCK_ROWS * shape.outputs)) {
        numbers::apply::<F>(pool, steps, shape.inputs, x, &shape.outputs(y));
    }
}

fn quantised<B: Blocks>(pool: &Pool, blocks: &[B], shape: &Shape<'_>, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks(BLOCK_ROWS * shape.inputs).zip(y.chunks_mut(BLOCK_ROWS * shape.outputs)) {
        let x = Rounded::new(pool, x, shape.inputs / B::STEPS);
        quantised::apply::<B>(pool, blocks, &x, &shape.outputs(y));
    }
}

/// Where finished chains go.
struct Outputs<'a> {
    y: Disjoint<'a, f32>,
    /// Of a row.
    width: usize,
    bias: Option<&'a [f32]>,
}

impl Outputs<'_> {
    /// Adds the bias to the finished chains of a panel and writes those that are outputs of the matrix.
    ///
    /// # Safety
    /// No other thread may write outputs of this panel at the same time.
    #[inline(always)]
    unsafe fn write(&self, row: usize, panel: usize, sums: &Block) {
        let first = panel * LANES;
        let width = LANES.min(self.width - first);
        let start = row * self.width + first;
        // SAFETY: the caller promises that the panel's outputs are its own, and the part ends with this call.
        let out = unsafe { self.y.part(start..start + width) };
        match self.bias {
            Some(bias) => {
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(&bias[first..]) {
                    *out = sum + bias;
                }
            }
            None => out.copy_from_slice(&sums[..width]),
        }
    }
}
