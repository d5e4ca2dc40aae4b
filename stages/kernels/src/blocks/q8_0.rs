//! Q8_0: `w = scale · q`, 32 numbers a block. Packed, q is stored plus 128: some instructions take only unsigned bytes on
//! this side, and for the others a turned bit costs nothing, since they turn bits of weights already.

use bytemuck::{Pod, Zeroable};

use super::{Blocks, FOUR, dot, is_finite, prefetch, stored_f16, widen};
use crate::activation_blocks::{By32, Tile32};
use crate::simd::{LANES, Simd};

/// Bytes of the scale in a file.
const HEAD: usize = 2;

/// What each number is packed plus, to be unsigned: its first bit is turned.
pub(crate) const Q8_OFFSET: u8 = 128;

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(32))]
pub(crate) struct Q8_0 {
    scales: [u16; LANES],
    quants: [[u8; FOUR]; 8],
}

impl Blocks for Q8_0 {
    type Activations = By32;
    const FILE_BYTES: usize = HEAD + 32;

    fn set(&mut self, lane: usize, file: &[u8]) {
        self.scales[lane] = stored_f16(file);
        let (fours, _) = file[HEAD..].as_chunks::<4>();
        for (vector, four) in self.quants.iter_mut().zip(fours) {
            vector[4 * lane..][..4].copy_from_slice(&four.map(|quant| quant ^ Q8_OFFSET));
        }
    }

    fn is_sound(&self, lane: usize) -> bool {
        is_finite(self.scales[lane])
    }

    fn quants(&self, lane: usize, out: &mut [i8]) {
        let (fours, _) = out.as_chunks_mut::<4>();
        for (vector, four) in self.quants.iter().zip(fours) {
            for (i, out) in four.iter_mut().enumerate() {
                *out = (vector[4 * lane + i] ^ Q8_OFFSET).cast_signed();
            }
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
        let mut sums = [simd.splat_bits(0); R];
        for r in 0..R {
            sums[r] = simd.dot_start(x, r);
        }
        // One row has several streams instead.
        if R > 1 {
            prefetch::<S, Self, 1>(simd, self, 0);
        }
        for four in 0..8 {
            let weights = simd.bytes(&self.quants[four]);
            for r in 0..R {
                sums[r] = simd.dot(sums[r], weights, x, r, four);
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
