//! Inputs of a linear layer, rounded to bytes to meet quantised weights.
//!
//! Invariants:
//! - A block of inputs has one scale `d = amax / 127`, with amax the greatest magnitude, and `q = x / d` rounded to
//!   nearest even. Where d is below 2^-126, d and every q are 0. So q is within ±127.
//! - Where an input is a NaN or an infinity, d is a NaN and every q is 0: each output of the row is then a NaN.
//! - The sums beside the bytes are exact, and only repeat what the bytes say.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::lanes::{all_finite, max_scalar, max_vector};
use crate::pool::{Disjoint, Pool};
use crate::simd::{Block, Kernel, LANES, ROUNDER, SIGN, Simd};

/// What rounding one input costs, in multiply-adds of a linear layer.
const INPUT_COST: usize = 4;

/// The greatest magnitude of a rounded input.
const QUANT_MAX: f32 = 127.0;

/// For each even and each odd pair of consecutive inputs, the sum: of inputs 4 f and 4 f + 1 over all fours, and of
/// inputs 4 f + 2 and 4 f + 3. Together they are the sum of all.
pub(crate) type PairSums = [i16; 2];

/// One block of inputs of one row.
pub(crate) trait ActivationBlock: Pod + Send + Sync {
    /// Inputs.
    const STEPS: usize;

    fn scale(&self) -> f32;

    fn quants(&self) -> &[[i8; 4]];

    /// Takes the block from its scale, and its numbers divided by that and rounded.
    fn set(&mut self, scale: f32, rounded: &[f32]);
}

/// 32 inputs.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
pub(crate) struct Activations32 {
    pub(crate) scale: f32,
    pub(crate) sums: PairSums,
    pub(crate) quants: [[i8; 4]; 8],
}

/// 256 inputs.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
pub(crate) struct Activations256 {
    pub(crate) scale: f32,
    /// Of each 16 inputs.
    pub(crate) sums: [PairSums; 16],
    /// The sum of each 32 inputs, two side by side.
    pub(crate) part_sums: [[i16; 2]; 4],
    pub(crate) quants: [[i8; 4]; 64],
}

impl ActivationBlock for Activations32 {
    const STEPS: usize = 32;

    fn scale(&self) -> f32 {
        self.scale
    }

    fn quants(&self) -> &[[i8; 4]] {
        &self.quants
    }

    #[inline(always)]
    fn set(&mut self, scale: f32, rounded: &[f32]) {
        self.scale = scale;
        narrow(rounded, &mut self.quants);
        self.sums = pair_sums(&self.quants);
    }
}

impl ActivationBlock for Activations256 {
    const STEPS: usize = 256;

    fn scale(&self) -> f32 {
        self.scale
    }

    fn quants(&self) -> &[[i8; 4]] {
        &self.quants
    }

    #[inline(always)]
    fn set(&mut self, scale: f32, rounded: &[f32]) {
        self.scale = scale;
        narrow(rounded, &mut self.quants);
        for (sums, fours) in self.sums.iter_mut().zip(self.quants.as_chunks::<4>().0) {
            *sums = pair_sums(fours);
        }
        for (part, sums) in self.sums.as_chunks::<2>().0.iter().enumerate() {
            self.part_sums[part / 2][part % 2] = sums.as_flattened().iter().sum();
        }
    }
}

#[inline(always)]
fn narrow(rounded: &[f32], quants: &mut [[i8; 4]]) {
    for (quant, rounded) in quants.as_flattened_mut().iter_mut().zip(rounded) {
        // Whole numbers within ±127.
        *quant = *rounded as i32 as i8;
    }
}

#[inline(always)]
fn pair_sums(fours: &[[i8; 4]]) -> PairSums {
    let mut sums = [0; 2];
    for four in fours {
        sums[0] += i16::from(four[0]) + i16::from(four[1]);
        sums[1] += i16::from(four[2]) + i16::from(four[3]);
    }
    sums
}

/// Rounds rows of inputs, whose width is a multiple of the block's, on the pool's threads.
pub(crate) fn quantise<A: ActivationBlock>(pool: &Pool, x: &[f32]) -> Vec<A> {
    let mut blocks = vec![A::zeroed(); x.len() / A::STEPS];
    let count = blocks.len();
    let out = Disjoint::new(&mut blocks);
    pool.split(count, 1, A::STEPS * INPUT_COST, &|range: Range<usize>| {
        let x = &x[range.start * A::STEPS..range.end * A::STEPS];
        // SAFETY: `split` gives out each block once, so no two parts overlap.
        let blocks = unsafe { out.part(range) };
        pool.path().run(Quantise { x, blocks });
    });
    blocks
}

struct Quantise<'a, A> {
    x: &'a [f32],
    blocks: &'a mut [A],
}

impl<A: ActivationBlock> Kernel for Quantise<'_, A> {
    type Output = ();

    fn scalar(self) {
        let mut rounded = [0.0; STEPS_MAX];
        for (x, block) in self.x.chunks_exact(A::STEPS).zip(self.blocks) {
            let magnitudes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
            let scale = scale_for(x, max_scalar(&magnitudes));
            for (rounded, x) in rounded.iter_mut().zip(x) {
                *rounded = if is_scale(scale) { (x / scale).round_ties_even() } else { 0.0 };
            }
            block.set(scale, &rounded[..A::STEPS]);
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let mut rounded = [[0.0; LANES]; STEPS_MAX / LANES];
        let rounder = simd.splat(ROUNDER);
        let magnitude = simd.splat_bits(!SIGN);
        for (x, block) in self.x.chunks_exact(A::STEPS).zip(self.blocks) {
            let rounded: &mut [Block] = &mut rounded[..A::STEPS / LANES];
            let inputs = x.as_chunks::<LANES>().0;
            for (input, out) in inputs.iter().zip(&mut *rounded) {
                let positive = simd.and(simd.bits(simd.load(input)), magnitude);
                simd.store(simd.float(positive), out);
            }
            let scale = scale_for(x, max_vector(simd, rounded.as_flattened()));
            if is_scale(scale) {
                let divisor = simd.splat(scale);
                for (input, out) in inputs.iter().zip(&mut *rounded) {
                    // The sum rounds to a whole number, to nearest even, and the difference is exact.
                    let shifted = simd.add(simd.div(simd.load(input), divisor), rounder);
                    simd.store(simd.sub(shifted, rounder), out);
                }
            } else {
                rounded.fill([0.0; LANES]);
            }
            block.set(scale, rounded.as_flattened());
        }
    }
}

/// The most inputs of a block.
const STEPS_MAX: usize = 256;

/// The scale of a block of inputs whose greatest magnitude is given.
#[inline(always)]
fn scale_for(x: &[f32], magnitude: f32) -> f32 {
    let scale = magnitude / QUANT_MAX;
    if !all_finite(x) {
        f32::NAN
    } else if scale < f32::MIN_POSITIVE {
        0.0
    } else {
        scale
    }
}

/// True if inputs are divided by it.
#[inline(always)]
fn is_scale(scale: f32) -> bool {
    scale > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Path;

    fn one(path: Path, x: &[f32; 32]) -> Activations32 {
        quantise::<Activations32>(&Pool::new(1, path), x)[0]
    }

    #[test]
    fn ties_go_to_even_and_the_greatest_is_127() {
        for path in Path::available() {
            let mut x = [0.0; 32];
            x[..8].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]);
            let block = one(path, &x);
            assert_eq!(block.scale, 1.0);
            assert_eq!(block.quants[..2].as_flattened(), [127, 0, 2, 2, 0, -2, -2, -127]);
            assert_eq!(block.sums, [127 - 2, 4 - 2 - 127]);
        }
    }

    #[test]
    fn too_small_is_zero_and_not_finite_is_nan() {
        for path in Path::available() {
            let smallest = f32::MIN_POSITIVE * 127.0;
            let block = one(path, &[smallest; 32]);
            assert_eq!((block.scale, block.quants[7]), (f32::MIN_POSITIVE, [127; 4]));
            let block = one(path, &[smallest.next_down().next_down(); 32]);
            assert_eq!((block.scale.to_bits(), block.quants), (0, [[0; 4]; 8]));
            assert_eq!(one(path, &[-0.0; 32]).scale.to_bits(), 0);
            let largest = one(path, &[-f32::MAX; 32]);
            assert_eq!((largest.scale, largest.quants[0]), (f32::MAX / 127.0, [-127; 4]));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 32];
                x[9] = bad;
                let block = one(path, &x);
                assert!(block.scale.is_nan());
                assert_eq!(block.quants, [[0; 4]; 8]);
            }
        }
    }
}
