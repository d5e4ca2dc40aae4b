//! Inputs of a linear layer, rounded to bytes to meet quantised weights.
//!
//! Invariants:
//! - A block of inputs has one scale `d = amax / 127`, with amax the greatest magnitude, and `q = x / d` rounded to
//!   nearest even. Where d is below 2^-126, d and every q are 0. So q is within ±127.
//! - Where an input is a NaN or an infinity, d is a NaN and every q is 0: each output of the row is then a NaN.
//! - The sums beside the bytes are exact, and only repeat what the bytes say.

use std::ops::Range;

use crate::blocks::Q8_OFFSET;
use crate::lanes::{all_finite, max_scalar, max_vector};
use crate::pool::{Disjoint, Pool};
use crate::simd::{Block, Kernel, LANES, ROUNDER, SIGN, Simd};

/// What rounding one input costs, in multiply-adds of a linear layer.
const INPUT_COST: usize = 4;

/// The greatest magnitude of a rounded input.
const QUANT_MAX: f32 = 127.0;

/// The most inputs of a block.
pub(crate) const STEPS_MAX: usize = 256;

/// For each even and each odd pair of consecutive inputs, the sum: of inputs 4 f and 4 f + 1 over all fours, and of
/// inputs 4 f + 2 and 4 f + 3. Together they are the sum of all.
pub(crate) type PairSums = [i16; 2];

/// How inputs are rounded: how many share a scale.
pub(crate) trait Activations {
    /// Inputs of a block.
    const STEPS: usize;

    /// One block of `R` rows.
    type Tile<const R: usize>: Tile;
}

/// One block of inputs of some rows. Bytes of the rows stand side by side, in the order in which they are met.
pub(crate) trait Tile: Clone + Send + Sync {
    /// All zeros.
    const ZERO: Self;

    /// Takes the block of one row: its scale, and its numbers.
    fn set(&mut self, row: usize, scale: f32, quants: &[i8]);

    /// The scale of one row, and its numbers, which go to the start of `out`.
    fn row(&self, row: usize, out: &mut [i8; STEPS_MAX]) -> f32;
}

/// Blocks of 32 inputs.
pub(crate) struct By32;

/// Blocks of 256 inputs.
pub(crate) struct By256;

impl Activations for By32 {
    const STEPS: usize = 32;
    type Tile<const R: usize> = Tile32<R>;
}

impl Activations for By256 {
    const STEPS: usize = 256;
    type Tile<const R: usize> = Tile256<R>;
}

/// 32 inputs of each row.
#[derive(Clone)]
#[repr(C, align(16))]
pub(crate) struct Tile32<const R: usize> {
    pub(crate) quants: [[[i8; 4]; R]; 8],
    /// The magnitude of each, and what turns a weight plus 128 into the weight, or into its complement where the input is
    /// negative.
    pub(crate) magnitudes: [[[u8; 4]; R]; 8],
    pub(crate) flips: [[[u8; 4]; R]; 8],
    pub(crate) scales: [f32; R],
    pub(crate) sums: [PairSums; R],
    /// The sum of the magnitudes of the negative ones.
    pub(crate) negative: [i32; R],
    /// -128 times the sum of all: what weights plus 128 make too much.
    pub(crate) excess: [i32; R],
}

/// 256 inputs of each row.
#[derive(Clone)]
#[repr(C, align(16))]
pub(crate) struct Tile256<const R: usize> {
    pub(crate) quants: [[[i8; 4]; R]; 64],
    /// Of each 16 inputs.
    pub(crate) sums: [[PairSums; R]; 16],
    /// The sum of each 32 inputs, two side by side.
    pub(crate) part_sums: [[[i16; 2]; R]; 4],
    pub(crate) scales: [f32; R],
}

impl<const R: usize> Tile for Tile32<R> {
    const ZERO: Self = Tile32 {
        quants: [[[0; 4]; R]; 8],
        magnitudes: [[[0; 4]; R]; 8],
        flips: [[[0; 4]; R]; 8],
        scales: [0.0; R],
        sums: [[0; 2]; R],
        negative: [0; R],
        excess: [0; R],
    };

    #[inline(always)]
    fn set(&mut self, row: usize, scale: f32, quants: &[i8]) {
        let (mut sums, mut negative) = ([0; 2], 0);
        let (mut magnitudes, mut flips) = ([0; 32], [0; 32]);
        for (i, quant) in quants.iter().enumerate() {
            let sign = (quant >> 7).cast_unsigned();
            magnitudes[i] = quant.unsigned_abs();
            flips[i] = sign ^ Q8_OFFSET;
            negative += i32::from(magnitudes[i] & sign);
        }
        let fours = magnitudes.as_chunks::<4>().0.iter().zip(flips.as_chunks::<4>().0);
        for (four, (quants, (magnitudes, flips))) in quants.as_chunks::<4>().0.iter().zip(fours).enumerate() {
            self.quants[four][row] = *quants;
            self.magnitudes[four][row] = *magnitudes;
            self.flips[four][row] = *flips;
            add_pairs(&mut sums, *quants);
        }
        self.scales[row] = scale;
        self.sums[row] = sums;
        self.negative[row] = negative;
        self.excess[row] = -i32::from(Q8_OFFSET) * (i32::from(sums[0]) + i32::from(sums[1]));
    }

    fn row(&self, row: usize, out: &mut [i8; STEPS_MAX]) -> f32 {
        for (out, fours) in out.as_chunks_mut::<4>().0.iter_mut().zip(&self.quants) {
            *out = fours[row];
        }
        self.scales[row]
    }
}

impl<const R: usize> Tile for Tile256<R> {
    const ZERO: Self =
        Tile256 { quants: [[[0; 4]; R]; 64], sums: [[[0; 2]; R]; 16], part_sums: [[[0; 2]; R]; 4], scales: [0.0; R] };

    #[inline(always)]
    fn set(&mut self, row: usize, scale: f32, quants: &[i8]) {
        self.scales[row] = scale;
        for (part, quants) in quants.as_chunks::<16>().0.iter().enumerate() {
            let mut sums = [0; 2];
            for (four, quants) in quants.as_chunks::<4>().0.iter().enumerate() {
                self.quants[4 * part + four][row] = *quants;
                add_pairs(&mut sums, *quants);
            }
            self.sums[part][row] = sums;
            let part_sum = &mut self.part_sums[part / 4][row][part / 2 % 2];
            *part_sum = sums[0] + sums[1] + if part % 2 == 0 { 0 } else { *part_sum };
        }
    }

    fn row(&self, row: usize, out: &mut [i8; STEPS_MAX]) -> f32 {
        for (out, fours) in out.as_chunks_mut::<4>().0.iter_mut().zip(&self.quants) {
            *out = fours[row];
        }
        self.scales[row]
    }
}

#[inline(always)]
fn add_pairs(sums: &mut PairSums, four: [i8; 4]) {
    sums[0] += i16::from(four[0]) + i16::from(four[1]);
    sums[1] += i16::from(four[2]) + i16::from(four[3]);
}

/// Rows of inputs, rounded: as many tiles of eight rows as there are, where an instruction set has registers for them
/// ([`Simd::WIDE`]), then as many of four, a pair, and one. The blocks of a tile follow each other.
pub(crate) struct Rounded<A: Activations> {
    /// Blocks of a row.
    pub(crate) width: usize,
    pub(crate) eights: Vec<A::Tile<8>>,
    pub(crate) fours: Vec<A::Tile<4>>,
    pub(crate) pair: Vec<A::Tile<2>>,
    pub(crate) one: Vec<A::Tile<1>>,
}

impl<A: Activations> Rounded<A> {
    /// Rounds rows of `width` blocks on the pool's threads.
    pub(crate) fn new(pool: &Pool, x: &[f32], width: usize) -> Rounded<A> {
        let row = width * A::STEPS;
        let rows = x.len() / row;
        let eights = if pool.path().is_wide() { rows / 8 } else { 0 };
        let (eights, rest) = x.split_at(eights * 8 * row);
        let (fours, rest) = rest.split_at(rest.len() / row / 4 * 4 * row);
        let (pair, one) = rest.split_at(rows % 4 / 2 * 2 * row);
        Rounded {
            width,
            eights: round::<A, 8>(pool, eights, width),
            fours: round::<A, 4>(pool, fours, width),
            pair: round::<A, 2>(pool, pair, width),
            one: round::<A, 1>(pool, one, width),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        (8 * self.eights.len() + 4 * self.fours.len() + 2 * self.pair.len() + self.one.len()) / self.width
    }
}

fn round<A: Activations, const R: usize>(pool: &Pool, x: &[f32], width: usize) -> Vec<A::Tile<R>> {
    let count = x.len() / (A::STEPS * R);
    let mut tiles = vec![A::Tile::<R>::ZERO; count];
    let out = Disjoint::new(&mut tiles);
    pool.split(count, 1, R * A::STEPS * INPUT_COST, &|range: Range<usize>| {
        // SAFETY: `split` gives out each tile once, so no two parts overlap.
        let tiles = unsafe { out.part(range.clone()) };
        pool.path().run(Round::<A, R> { x, width, first: range.start, tiles });
    });
    tiles
}

/// Some consecutive blocks of rows that stand `R` to a tile.
struct Round<'a, A: Activations, const R: usize> {
    x: &'a [f32],
    width: usize,
    /// The first block.
    first: usize,
    tiles: &'a mut [A::Tile<R>],
}

impl<A: Activations, const R: usize> Round<'_, A, R> {
    /// The inputs of one row of a block.
    #[inline(always)]
    fn inputs(x: &[f32], width: usize, index: usize, row: usize) -> &[f32] {
        let (tile, block) = (index / width, index % width);
        &x[((tile * R + row) * width + block) * A::STEPS..][..A::STEPS]
    }
}

impl<A: Activations, const R: usize> Kernel for Round<'_, A, R> {
    type Output = ();

    fn scalar(self) {
        let mut quants = [0; STEPS_MAX];
        for (index, tile) in (self.first..).zip(self.tiles) {
            for row in 0..R {
                let x = Self::inputs(self.x, self.width, index, row);
                let magnitudes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
                let scale = scale_for(x, max_scalar(&magnitudes));
                for (quant, x) in quants.iter_mut().zip(x) {
                    *quant = if is_scale(scale) { (x / scale).round_ties_even() as i8 } else { 0 };
                }
                tile.set(row, scale, &quants[..A::STEPS]);
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let mut positive = [[0.0; LANES]; STEPS_MAX / LANES];
        let positive: &mut [Block] = &mut positive[..A::STEPS / LANES];
        let mut quants = [[0; LANES]; STEPS_MAX / LANES];
        let quants = &mut quants[..A::STEPS / LANES];
        let rounder = simd.splat(ROUNDER);
        let magnitude = simd.splat_bits(!SIGN);
        for (index, tile) in (self.first..).zip(self.tiles) {
            for row in 0..R {
                let x = Self::inputs(self.x, self.width, index, row);
                let inputs = x.as_chunks::<LANES>().0;
                for (input, out) in inputs.iter().zip(&mut *positive) {
                    simd.store(simd.float(simd.and(simd.bits(simd.load(input)), magnitude)), out);
                }
                let scale = scale_for(x, max_vector(simd, positive.as_flattened()));
                if is_scale(scale) {
                    let divisor = simd.splat(scale);
                    for (input, out) in inputs.iter().zip(&mut *quants) {
                        // The sum rounds to a whole number, to nearest even, which is then in its low bits.
                        let rounded = simd.bits(simd.add(simd.div(simd.load(input), divisor), rounder));
                        simd.store_bytes(simd.sub_bits(rounded, simd.bits(rounder)), out);
                    }
                } else {
                    quants.fill([0; LANES]);
                }
                tile.set(row, scale, quants.as_flattened());
            }
        }
    }
}

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

    fn one(path: Path, x: &[f32; 32]) -> Tile32<1> {
        Rounded::<By32>::new(&Pool::new(1, path), x, 1).one[0].clone()
    }

    #[test]
    fn ties_go_to_even_and_the_greatest_is_127() {
        for path in Path::available() {
            let mut x = [0.0; 32];
            x[..8].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]);
            let block = one(path, &x);
            assert_eq!(block.scales[0], 1.0);
            assert_eq!(block.quants[..2].as_flattened().as_flattened(), [127, 0, 2, 2, 0, -2, -2, -127]);
            assert_eq!(block.negative[0], 2 + 2 + 127);
            assert_eq!(block.sums[0], [127 - 2, 4 - 2 - 127]);
        }
    }

    #[test]
    fn too_small_is_zero_and_not_finite_is_nan() {
        for path in Path::available() {
            let smallest = f32::MIN_POSITIVE * 127.0;
            let block = one(path, &[smallest; 32]);
            assert_eq!((block.scales[0], block.quants[7]), (f32::MIN_POSITIVE, [[127; 4]]));
            let block = one(path, &[smallest.next_down().next_down(); 32]);
            assert_eq!((block.scales[0].to_bits(), block.quants), (0, [[[0; 4]]; 8]));
            assert_eq!(one(path, &[-0.0; 32]).scales[0].to_bits(), 0);
            let largest = one(path, &[-f32::MAX; 32]);
            assert_eq!((largest.scales[0], largest.quants[0]), (f32::MAX / 127.0, [[-127; 4]]));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 32];
                x[9] = bad;
                let block = one(path, &x);
                assert!(block.scales[0].is_nan());
                assert_eq!(block.quants, [[[0; 4]]; 8]);
            }
        }
    }
}
