//! Q6_K: `w = scale · s · (q - 32)`, 256 numbers a block, s for each 16 of them.

use bytemuck::{Pod, Zeroable};

use super::{Blocks, FOUR, add_upper, dot, is_finite, nibbles, prefetch, set_nibbles, set_upper, stored_f16, widen};
use crate::activation_blocks::{By256, Tile256};
use crate::simd::{LANES, Simd};

/// Numbers that share one s, and how many such parts a block has.
const PART: usize = 16;
const PARTS: usize = 16;

/// Where a file's block holds its parts: the low four bits, the upper two, each s, and the scale.
const UPPER: usize = 128;
const FACTORS: usize = 192;
const SCALE: usize = 208;

/// What is taken from each stored number.
const OFFSET: i8 = 32;

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(32))]
pub(crate) struct Q6K {
    scales: [u16; LANES],
    /// s of each part.
    part_scales: [[i8; LANES]; PARTS],
    quants: [[[u8; FOUR]; 2]; PARTS],
    upper: [[u8; FOUR]; PARTS],
}

impl Blocks for Q6K {
    type Activations = By256;
    const FILE_BYTES: usize = 210;

    fn set(&mut self, lane: usize, file: &[u8]) {
        self.scales[lane] = stored_f16(&file[SCALE..]);
        let mut low = [0; PART * PARTS];
        let mut upper = [0; PART * PARTS];
        // Each half of the block: 64 bytes of low bits and 32 of upper ones, for 128 numbers in four runs of 32.
        for half in 0..2 {
            let (lows, uppers) = (&file[64 * half..][..64], &file[UPPER + 32 * half..][..32]);
            for run in 0..4 {
                for i in 0..32 {
                    let input = 128 * half + 32 * run + i;
                    low[input] = lows[32 * (run % 2) + i] >> (4 * (run / 2)) & 15;
                    upper[input] = uppers[i] >> (2 * run) & 3;
                }
            }
        }
        for part in 0..PARTS {
            self.part_scales[part][lane] = file[FACTORS + part].cast_signed();
            set_nibbles(&mut self.quants[part], lane, &low[PART * part..][..PART]);
            set_upper::<2>(&mut self.upper[part..=part], lane, &upper[PART * part..][..PART]);
        }
    }

    fn is_sound(&self, lane: usize) -> bool {
        is_finite(self.scales[lane])
    }

    fn quants(&self, lane: usize, out: &mut [i8]) {
        for (part, out) in out.chunks_exact_mut(PART).enumerate() {
            nibbles(&self.quants[part], lane, out);
            add_upper::<2>(&self.upper[part..=part], lane, out);
            for quant in out {
                *quant -= OFFSET;
            }
        }
    }

    fn dequantise(&self, lane: usize, out: &mut [f32]) {
        let mut quants = [0; PART * PARTS];
        self.quants(lane, &mut quants);
        for (part, (out, quants)) in out.chunks_exact_mut(PART).zip(quants.chunks_exact(PART)).enumerate() {
            let scale = widen(self.scales[lane]) * f32::from(self.part_scales[part][lane]);
            for (out, quant) in out.iter_mut().zip(quants) {
                *out = scale * f32::from(*quant);
            }
        }
    }

    fn advance_scalar(&self, lane: usize, x: &[i8], x_scale: f32, acc: f32) -> f32 {
        let mut quants = [0; PART * PARTS];
        self.quants(lane, &mut quants);
        let mut sum = 0;
        for (part, x) in x.chunks_exact(PART).enumerate() {
            sum += i32::from(self.part_scales[part][lane]) * dot(&quants[PART * part..][..PART], x);
        }
        (widen(self.scales[lane]) * x_scale).mul_add(sum as f32, acc)
    }

    #[inline(always)]
    fn advance<S: Simd, const R: usize>(&self, simd: S, x: &Tile256<R>, mut acc: [S::F; R]) -> [S::F; R] {
        let mut sums = [simd.splat_bits(0); R];
        for part in 0..PARTS {
            prefetch::<S, Self, PARTS>(simd, self, part);
            let mut part_sums = [simd.small([0; 2], 0); R];
            for r in 0..R {
                part_sums[r] = simd.small(x.sums[part][r], -i16::from(OFFSET));
            }
            let upper = simd.bytes(&self.upper[part]);
            for pair in 0..2 {
                let (even, odd) = simd.nibbles(simd.bytes(&self.quants[part][pair]));
                let even = simd.raise(even, upper, 4 * pair, 3);
                let odd = simd.raise(odd, upper, 4 * pair + 2, 3);
                for r in 0..R {
                    let fours = &x.quants[4 * part + 2 * pair..][..2];
                    part_sums[r] = simd.dot_small(part_sums[r], even, fours[0][r]);
                    part_sums[r] = simd.dot_small(part_sums[r], odd, fours[1][r]);
                }
            }
            let scales = simd.factors(&self.part_scales[part]);
            for r in 0..R {
                sums[r] = simd.add_scaled(sums[r], part_sums[r], scales);
            }
        }
        let scales = simd.load_f16(&self.scales);
        for r in 0..R {
            let scale = simd.mul(scales, simd.splat(x.scales[r]));
            acc[r] = simd.fma(scale, simd.to_f32(sums[r]), acc[r]);
        }
        acc
    }
}
