//! Q4_0: `w = scale · (q - 8)`, 32 numbers a block.

use bytemuck::{Pod, Zeroable};

use super::{Blocks, FOUR, dot, is_finite, nibbles, prefetch, set_nibbles, stored_f16, widen};
use crate::activation_blocks::{By32, Tile32};
use crate::simd::{LANES, Simd};

/// Bytes of the scale in a file.
const HEAD: usize = 2;

/// What is taken from each stored number.
const OFFSET: i8 = 8;

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(32))]
pub(crate) struct Q4_0 {
    scales: [u16; LANES],
    quants: [[u8; FOUR]; 4],
}

impl Blocks for Q4_0 {
    type Activations = By32;
    const FILE_BYTES: usize = HEAD + 16;

    fn set(&mut self, lane: usize, file: &[u8]) {
        self.scales[lane] = stored_f16(file);
        let bytes = &file[HEAD..][..16];
        let mut quants = [0; 32];
        for (i, byte) in bytes.iter().enumerate() {
            quants[i] = byte & 15;
            quants[i + 16] = byte >> 4;
        }
        set_nibbles(&mut self.quants, lane, &quants);
    }

    fn is_sound(&self, lane: usize) -> bool {
        is_finite(self.scales[lane])
    }

    fn quants(&self, lane: usize, out: &mut [i8]) {
        nibbles(&self.quants, lane, out);
        for quant in out {
            *quant -= OFFSET;
        }
    }

    fn dequantise(&self, lane: usize, out: &mut [f32]) {
        let mut quants = [0; 32];
        self.quants(lane, &mut quants);
        for (out, quant) in out.iter_mut().zip(quants) {
            *out = widen(self.scales[lane]) * f32::from(quant);
        }
    }

    fn advance_scalar(&self, lane: usize, x: &[i8], x_scale: f32, acc: f32) -> f32 {
        let mut quants = [0; 32];
        self.quants(lane, &mut quants);
        let sum = dot(&quants, x);
        (widen(self.scales[lane]) * x_scale).mul_add(sum as f32, acc)
    }

    #[inline(always)]
    fn advance<S: Simd, const R: usize>(&self, simd: S, x: &Tile32<R>, mut acc: [S::F; R]) -> [S::F; R] {
        let mut sums = [simd.small([0; 2], 0); R];
        for r in 0..R {
            sums[r] = simd.small(x.sums[r], -i16::from(OFFSET));
        }
        prefetch::<S, Self, 1>(simd, self, 0);
        for vector in 0..4 {
            let (even, odd) = simd.nibbles(simd.bytes(&self.quants[vector]));
            for r in 0..R {
                sums[r] = simd.dot_small(sums[r], even, x.quants[2 * vector][r]);
                sums[r] = simd.dot_small(sums[r], odd, x.quants[2 * vector + 1][r]);
            }
        }
        let scales = simd.load_f16(&self.scales);
        for r in 0..R {
            let scale = simd.mul(scales, simd.splat(x.scales[r]));
            acc[r] = simd.fma(scale, simd.to_f32(simd.total(sums[r])), acc[r]);
        }
        acc
    }
}
