//! Q4_K and Q5_K: `w = scale · s · q - minimum · m`, 256 numbers a block, s and m for each 32 of them.

use bytemuck::{Pod, Zeroable};

use super::{Blocks, FOUR, add_upper, dot, is_finite, nibbles, prefetch, set_nibbles, set_upper, stored_f16, widen};
use crate::activation_blocks::{By256, Tile256};
use crate::simd::{LANES, Simd};

/// Numbers that share one s and one m, and how many such parts a block has.
const PART: usize = 32;
const PARTS: usize = 8;

/// Where a file's block holds its parts: two f16, then twelve bytes of s and m.
const FACTORS: usize = 4;
const AFTER_FACTORS: usize = 16;

/// s and m have six bits.
const FACTOR_MAX: u8 = 63;

pub(crate) type Q4K = K<()>;
pub(crate) type Q5K = K<Fifth>;

#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct K<U> {
    scales: [u16; LANES],
    minima: [u16; LANES],
    /// s of each part.
    part_scales: [[i8; LANES]; PARTS],
    /// m of each two parts, side by side.
    part_minima: [[[u8; 2]; LANES]; PARTS / 2],
    quants: [[[u8; FOUR]; 4]; PARTS],
    upper: U,
}

/// The fifth bit of each number.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(transparent)]
pub(crate) struct Fifth([[u8; FOUR]; PARTS]);

// SAFETY: plain zeros.
unsafe impl<U: Zeroable> Zeroable for K<U> {}

// SAFETY: the fields fill 2368 bytes, a multiple of 32, without padding, and any bits are numbers.
unsafe impl Pod for K<()> {}

// SAFETY: the fields fill 2880 bytes, a multiple of 32, without padding, and any bits are numbers.
unsafe impl Pod for K<Fifth> {}

const _: () = assert!(size_of::<Q4K>() == 2368 && size_of::<Q5K>() == 2880);

/// What stands above the low four bits.
pub(crate) trait Upper: Copy + 'static {
    /// Bytes of a block in a file.
    const FILE_BYTES: usize;
    /// Where the low four bits begin.
    const LOW: usize;
    /// Pairs of fours that [`Simd::Small`] can add up.
    const PAIRS: usize;

    fn set(&mut self, lane: usize, file: &[u8]);

    /// Adds the bits of a part, times 16.
    fn add(&self, part: usize, lane: usize, out: &mut [i8]);

    /// The numbers of fours `2 * pair` and `2 * pair + 1` of a part, from their low four bits.
    fn raise<S: Simd>(&self, simd: S, part: usize, pair: usize, low: (S::Bytes, S::Bytes)) -> (S::Bytes, S::Bytes);
}

impl Upper for () {
    const FILE_BYTES: usize = 144;
    const LOW: usize = AFTER_FACTORS;
    const PAIRS: usize = 4;

    fn set(&mut self, _lane: usize, _file: &[u8]) {}

    fn add(&self, _part: usize, _lane: usize, _out: &mut [i8]) {}

    #[inline(always)]
    fn raise<S: Simd>(&self, _simd: S, _part: usize, _pair: usize, low: (S::Bytes, S::Bytes)) -> (S::Bytes, S::Bytes) {
        low
    }
}

impl Upper for Fifth {
    const FILE_BYTES: usize = 176;
    const LOW: usize = AFTER_FACTORS + PART;
    const PAIRS: usize = 2;

    fn set(&mut self, lane: usize, file: &[u8]) {
        let bits = &file[AFTER_FACTORS..][..PART];
        for part in 0..PARTS {
            let upper: [u8; PART] = std::array::from_fn(|input| bits[input] >> part & 1);
            set_upper::<1>(&mut self.0[part..=part], lane, &upper);
        }
    }

    fn add(&self, part: usize, lane: usize, out: &mut [i8]) {
        add_upper::<1>(&self.0[part..=part], lane, out);
    }

    #[inline(always)]
    fn raise<S: Simd>(&self, simd: S, part: usize, pair: usize, low: (S::Bytes, S::Bytes)) -> (S::Bytes, S::Bytes) {
        let bits = simd.bytes(&self.0[part]);
        let (even, odd) = low;
        (simd.raise(even, bits, 2 * pair, 1), simd.raise(odd, bits, 2 * pair + 1, 1))
    }
}

impl<U: Upper> K<U> {
    fn part_minimum(&self, part: usize, lane: usize) -> u8 {
        self.part_minima[part / 2][lane][part % 2]
    }
}

impl<U: Upper> Blocks for K<U>
where
    K<U>: Pod + Send + Sync,
{
    type Activations = By256;
    const FILE_BYTES: usize = U::FILE_BYTES;

    fn set(&mut self, lane: usize, file: &[u8]) {
        self.scales[lane] = stored_f16(file);
        self.minima[lane] = stored_f16(&file[2..]);
        let factors = &file[FACTORS..AFTER_FACTORS];
        for part in 0..PARTS {
            let (scale, minimum) = part_factors(factors, part);
            self.part_scales[part][lane] = scale.cast_signed();
            self.part_minima[part / 2][lane][part % 2] = minimum;
        }
        // Each 32 bytes hold two parts: one in the low halves, one in the high halves.
        for (bytes, parts) in file[U::LOW..].chunks_exact(PART).zip(self.quants.chunks_exact_mut(2)) {
            let low: [u8; PART] = std::array::from_fn(|input| bytes[input] & 15);
            let high: [u8; PART] = std::array::from_fn(|input| bytes[input] >> 4);
            set_nibbles(&mut parts[0], lane, &low);
            set_nibbles(&mut parts[1], lane, &high);
        }
        self.upper.set(lane, file);
    }

    fn is_sound(&self, lane: usize) -> bool {
        let factors_fit = (0..PARTS).all(|part| {
            self.part_scales[part][lane].cast_unsigned() <= FACTOR_MAX && self.part_minimum(part, lane) <= FACTOR_MAX
        });
        is_finite(self.scales[lane]) && is_finite(self.minima[lane]) && factors_fit
    }

    fn quants(&self, lane: usize, out: &mut [i8]) {
        for (part, out) in out.chunks_exact_mut(PART).enumerate() {
            nibbles(&self.quants[part], lane, out);
            self.upper.add(part, lane, out);
        }
    }

    fn dequantise(&self, lane: usize, out: &mut [f32]) {
        let mut quants = [0; PART * PARTS];
        self.quants(lane, &mut quants);
        let (scale, minimum) = (widen(self.scales[lane]), widen(self.minima[lane]));
        for (part, (out, quants)) in out.chunks_exact_mut(PART).zip(quants.chunks_exact(PART)).enumerate() {
            let scale = scale * f32::from(self.part_scales[part][lane]);
            let minimum = minimum * f32::from(self.part_minimum(part, lane));
            for (out, quant) in out.iter_mut().zip(quants) {
                *out = scale * f32::from(*quant) - minimum;
            }
        }
    }

    fn advance_scalar(&self, lane: usize, x: &[i8], x_scale: f32, acc: f32) -> f32 {
        let mut quants = [0; PART * PARTS];
        self.quants(lane, &mut quants);
        let (mut sum, mut below) = (0, 0);
        for (part, x) in x.chunks_exact(PART).enumerate() {
            let quants = &quants[part * PART..][..PART];
            sum += i32::from(self.part_scales[part][lane]) * dot(quants, x);
            below += i32::from(self.part_minimum(part, lane)) * dot(&[1; PART], x);
        }
        let acc = (widen(self.scales[lane]) * x_scale).mul_add(sum as f32, acc);
        (-(widen(self.minima[lane]) * x_scale)).mul_add(below as f32, acc)
    }

    #[inline(always)]
    fn advance<S: Simd, const R: usize>(&self, simd: S, x: &Tile256<R>, mut acc: [S::F; R]) -> [S::F; R] {
        let mut sums = [simd.splat_bits(0); R];
        for part in 0..PARTS {
            prefetch::<S, Self, PARTS>(simd, self, part);
            let scales = simd.factors(&self.part_scales[part]);
            let mut part_sums = [simd.small([0; 2], 0); R];
            for pair in 0..4 {
                let low = simd.nibbles(simd.bytes(&self.quants[part][pair]));
                let (even, odd) = self.upper.raise(simd, part, pair, low);
                for r in 0..R {
                    let fours = &x.quants[8 * part + 2 * pair..][..2];
                    part_sums[r] = simd.dot_small(part_sums[r], even, fours[0][r]);
                    part_sums[r] = simd.dot_small(part_sums[r], odd, fours[1][r]);
                }
                if (pair + 1) % U::PAIRS == 0 {
                    for r in 0..R {
                        sums[r] = simd.add_scaled(sums[r], part_sums[r], scales);
                        part_sums[r] = simd.small([0; 2], 0);
                    }
                }
            }
        }
        let mut below = [simd.splat_bits(0); R];
        for (pair, minima) in self.part_minima.iter().enumerate() {
            for r in 0..R {
                below[r] = simd.dot_pairs(below[r], minima, x.part_sums[pair][r]);
            }
        }
        let (scales, minima) = (simd.load_f16(&self.scales), simd.load_f16(&self.minima));
        for r in 0..R {
            acc[r] = simd.fma(simd.mul(scales, simd.splat(x.scales[r])), simd.to_f32(sums[r]), acc[r]);
            // The sign of a product is exact, so the negation may stand on either side of it.
            let minus = simd.mul(minima, simd.splat(-x.scales[r]));
            acc[r] = simd.fma(minus, simd.to_f32(below[r]), acc[r]);
        }
        acc
    }
}

/// s and m of a part, from the twelve bytes that hold them: six bits each, the upper two of the last four parts in the
/// bytes of the first four.
fn part_factors(bytes: &[u8], part: usize) -> (u8, u8) {
    match part.checked_sub(4) {
        None => (bytes[part] & FACTOR_MAX, bytes[part + 4] & FACTOR_MAX),
        Some(first) => {
            ((bytes[part + 4] & 15) | bytes[first] >> 6 << 4, (bytes[part + 4] >> 4) | bytes[part] >> 6 << 4)
        }
    }
}
