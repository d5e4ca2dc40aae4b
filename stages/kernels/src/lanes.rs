//! Sums in sixteen virtual lanes, maxima, and the check for NaN and infinity.
//!
//! Invariant: lane j of a sum takes elements j, j + 16, … in ascending order from +0.0, then lanes fold by 8, 4, 2, 1.
//! Padding the last elements with +0.0 changes no bit, since a lane that starts at +0.0 is never -0.0.

use crate::pool::Pool;
use crate::simd::{Block, Kernel, LANES, Simd, padded};

/// True if no value is a NaN or an infinity.
pub fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    /// Values between two looks at what was found.
    const STRIDE: usize = 1024;
    values.chunks(STRIDE).all(|chunk| {
        let found = chunk.iter().fold(false, |found, value| found | (value.to_bits() & EXPONENT == EXPONENT));
        !found
    })
}

/// The index of the greatest value, the lowest of equals; +0.0 and -0.0 are equal. NaNs are passed over, and `None`
/// means that there was nothing else.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (index, &value) in values.iter().enumerate() {
        let greater = match best {
            Some((_, greatest)) => greatest < value,
            None => !value.is_nan(),
        };
        if greater {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}

/// The sum of the values, in sixteen virtual lanes.
pub fn sum(pool: &Pool, values: &[f32]) -> f32 {
    pool.path().run(Sum(values))
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    fn scalar(self) -> f32 {
        sum_scalar(self.0.iter().copied())
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) -> f32 {
        let (blocks, rest) = self.0.as_chunks::<LANES>();
        let mut lanes = simd.splat(0.0);
        for block in blocks {
            lanes = simd.add(lanes, simd.load(block));
        }
        lanes = simd.add(lanes, simd.load(&padded(rest)));
        fold_vector(simd, lanes)
    }
}

/// The definition of a sum.
pub(crate) fn sum_scalar(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; LANES];
    for (index, value) in values.enumerate() {
        lanes[index % LANES] += value;
    }
    fold(lanes, |a, b| a + b)
}

/// Folds the lanes by 8, 4, 2, 1.
#[inline(always)]
fn fold(mut lanes: Block, join: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn fold_vector<S: Simd>(simd: S, lanes: S::F) -> f32 {
    let mut block = [0.0; LANES];
    simd.store(lanes, &mut block);
    fold(block, |a, b| a + b)
}

/// The greatest value. Which of two equal zeros is returned is left open, and so is the result if there is a NaN.
///
/// # Panics
/// If there are no values.
pub(crate) fn max_scalar(values: &[f32]) -> f32 {
    values.iter().copied().fold(values[0], greater)
}

/// [`max_scalar`], sixteen lanes at a time.
#[inline(always)]
pub(crate) fn max_vector<S: Simd>(simd: S, values: &[f32]) -> f32 {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let mut lanes = simd.splat(values[0]);
    for block in blocks {
        let block = simd.load(block);
        lanes = simd.select(simd.less(lanes, block), block, lanes);
    }
    let mut block = [0.0; LANES];
    simd.store(lanes, &mut block);
    rest.iter().copied().fold(fold(block, greater), greater)
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a < b { b } else { a }
}
