//! RMSNorm and LayerNorm.
//!
//! Invariants: means are sums in sixteen virtual lanes divided by the width; `1 / sqrt(mean + eps)` is an IEEE square
//! root and an IEEE division, never an estimate; squares are rounded before they are added.

use crate::lanes::{fold_vector, sum_scalar};
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd, padded};

/// What one element of a norm costs, in multiply-adds of a linear layer.
const ELEMENT_COST: usize = 4;

/// RMSNorm of each row of `x` `[n, width]`, to `out`: `(x · inv) · weight` with `inv = 1 / sqrt(mean(x²) + eps)`. The
/// width is that of `weight`.
///
/// # Panics
/// If the shapes do not fit.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = checked_width(x, weight, out);
    pool.split_rows(out, width, width * ELEMENT_COST, &|first, out| {
        let x = x[first * width..].chunks_exact(width);
        for (x, out) in x.zip(out.chunks_exact_mut(width)) {
            pool.path().run(RmsNorm { x, weight, eps, out });
        }
    });
}

/// LayerNorm of each row of `x` `[n, width]`, to `out`: `(d · inv) · weight + bias` with `d = x - mean(x)` and
/// `inv = 1 / sqrt(mean(d²) + eps)`. The width is that of `weight` and `bias`.
///
/// # Panics
/// If the shapes do not fit.
pub fn layer_norm(pool: &Pool, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = checked_width(x, weight, out);
    assert_eq!(bias.len(), width, "a bias has one number per column");
    pool.split_rows(out, width, 2 * width * ELEMENT_COST, &|first, out| {
        let x = x[first * width..].chunks_exact(width);
        for (x, out) in x.zip(out.chunks_exact_mut(width)) {
            pool.path().run(LayerNorm { x, weight, bias, eps, out });
        }
    });
}

fn checked_width(x: &[f32], weight: &[f32], out: &[f32]) -> usize {
    let width = weight.len();
    assert!(width > 0, "a norm has a width");
    assert_eq!(x.len() % width, 0, "x is rows of {width}");
    assert_eq!(x.len(), out.len(), "x and out have one shape");
    width
}

fn inverse_root(sum: f32, width: usize, eps: f32) -> f32 {
    1.0 / (sum / width as f32 + eps).sqrt()
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    fn scalar(self) {
        let squares = sum_scalar(self.x.iter().map(|x| x * x));
        let inv = inverse_root(squares, self.x.len(), self.eps);
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = (x * inv) * weight;
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let (blocks, rest) = self.x.as_chunks::<LANES>();
        let mut lanes = simd.splat(0.0);
        for block in blocks {
            let x = simd.load(block);
            lanes = simd.add(lanes, simd.mul(x, x));
        }
        let x = simd.load(&padded(rest));
        lanes = simd.add(lanes, simd.mul(x, x));
        let inv = inverse_root(fold_vector(simd, lanes), self.x.len(), self.eps);
        // Plain loops of rounded products have one meaning however they are compiled.
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = (x * inv) * weight;
        }
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl LayerNorm<'_> {
    /// `(d · inv) · weight + bias`, where `out` holds d.
    #[inline(always)]
    fn finish(self, squares: f32) {
        let inv = inverse_root(squares, self.x.len(), self.eps);
        for ((out, weight), bias) in self.out.iter_mut().zip(self.weight).zip(self.bias) {
            *out = (*out * inv) * weight + bias;
        }
    }

    #[inline(always)]
    fn subtract(&mut self, mean: f32) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = x - mean;
        }
    }
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    fn scalar(mut self) {
        let mean = sum_scalar(self.x.iter().copied()) / self.x.len() as f32;
        self.subtract(mean);
        let squares = sum_scalar(self.out.iter().map(|d| d * d));
        self.finish(squares);
    }

    #[inline(always)]
    fn vector<S: Simd>(mut self, simd: S) {
        let (blocks, rest) = self.x.as_chunks::<LANES>();
        let mut lanes = simd.splat(0.0);
        for block in blocks {
            lanes = simd.add(lanes, simd.load(block));
        }
        lanes = simd.add(lanes, simd.load(&padded(rest)));
        let mean = fold_vector(simd, lanes) / self.x.len() as f32;
        self.subtract(mean);

        let (blocks, rest) = self.out.as_chunks::<LANES>();
        let mut lanes = simd.splat(0.0);
        for block in blocks {
            let d = simd.load(block);
            lanes = simd.add(lanes, simd.mul(d, d));
        }
        let d = simd.load(&padded(rest));
        lanes = simd.add(lanes, simd.mul(d, d));
        let squares = fold_vector(simd, lanes);
        self.finish(squares);
    }
}
