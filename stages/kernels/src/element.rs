//! How numbers are stored in panels, and how each widens to f32.
//!
//! Invariant: widening is exact, so storage never changes what a chain computes from the stored numbers.

use bytemuck::{Pod, Zeroable};

use crate::simd::{LANES, Simd};

/// Number format of stored weights. The quantised ones are those of GGUF: a row is a sequence of blocks, each with its
/// own scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE-754 binary32.
    F32,
    /// IEEE-754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// Blocks of 32: a scale in f16, eight bits a number.
    Q8_0,
    /// Blocks of 32: a scale in f16, four bits a number, less 8.
    Q4_0,
    /// Blocks of 256: a scale and a minimum in f16, both times six bits for each 32 numbers; four bits a number.
    Q4K,
    /// As [`Dtype::Q4K`], with five bits a number.
    Q5K,
    /// Blocks of 256: a scale in f16, times eight bits for each 16 numbers; six bits a number, less 32.
    Q6K,
}

impl Dtype {
    /// Every format.
    pub const ALL: [Dtype; 8] =
        [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

    /// Numbers of one block: 1 where each number stands alone.
    pub const fn block_columns(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => 1,
            Dtype::Q8_0 | Dtype::Q4_0 => 32,
            Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => 256,
        }
    }

    /// Bytes of one block, as a file holds it.
    pub const fn block_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Q8_0 => 34,
            Dtype::Q4_0 => 18,
            Dtype::Q4K => 144,
            Dtype::Q5K => 176,
            Dtype::Q6K => 210,
        }
    }

    /// Bytes of `columns` numbers, as a file holds them. `None` if they are not whole blocks, or too many.
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_columns()) {
            return None;
        }
        (columns / self.block_columns()).checked_mul(self.block_bytes())
    }
}

/// One step of a panel: the sixteen stored numbers that meet the same input. The alignment keeps each half inside one
/// cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub(crate) struct Step<T>(pub(crate) [T; LANES]);

// SAFETY: sixteen plain zeros.
unsafe impl<T: Zeroable> Zeroable for Step<T> {}

// SAFETY: sixteen numbers of two or four bytes are a multiple of 32 bytes, so there is no padding, and any bits are
// numbers.
unsafe impl<T: Stored> Pod for Step<T> {}

/// What a number is stored as: two or four bytes of any bits.
pub(crate) trait Stored: Pod + Default + Send + Sync {}

impl Stored for u16 {}
impl Stored for f32 {}

/// A number format, as a type.
pub(crate) trait Format: Send + Sync + 'static {
    type Stored: Stored;

    /// Reads one number from its little-endian bytes, of which there are `size_of::<Stored>()`.
    fn read(bytes: &[u8]) -> Self::Stored;

    /// True if it is neither a NaN nor an infinity.
    fn is_finite(stored: Self::Stored) -> bool;

    /// The number, exactly.
    fn widen(stored: Self::Stored) -> f32;

    /// Sixteen numbers, exactly.
    fn load<S: Simd>(simd: S, step: &Step<Self::Stored>) -> S::F;

    /// The steps as f32: themselves, or widened into `buffer`, which must be at least as long.
    #[inline(always)]
    fn widened<'a, S: Simd>(simd: S, steps: &'a [Step<Self::Stored>], buffer: &'a mut [Step<f32>]) -> &'a [Step<f32>] {
        let buffer = &mut buffer[..steps.len()];
        for (step, wide) in steps.iter().zip(&mut *buffer) {
            simd.store(Self::load(simd, step), &mut wide.0);
        }
        buffer
    }
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Format for F32 {
    type Stored = f32;

    fn read(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    #[inline(always)]
    fn is_finite(stored: f32) -> bool {
        stored.is_finite()
    }

    #[inline(always)]
    fn widen(stored: f32) -> f32 {
        stored
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, step: &Step<f32>) -> S::F {
        simd.load(&step.0)
    }

    #[inline(always)]
    fn widened<'a, S: Simd>(_simd: S, steps: &'a [Step<f32>], _buffer: &'a mut [Step<f32>]) -> &'a [Step<f32>] {
        steps
    }
}

impl Format for F16 {
    type Stored = u16;

    fn read(bytes: &[u8]) -> u16 {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    #[inline(always)]
    fn is_finite(stored: u16) -> bool {
        half::f16::from_bits(stored).is_finite()
    }

    #[inline(always)]
    fn widen(stored: u16) -> f32 {
        half::f16::from_bits(stored).to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, step: &Step<u16>) -> S::F {
        simd.load_f16(&step.0)
    }
}

impl Format for Bf16 {
    type Stored = u16;

    fn read(bytes: &[u8]) -> u16 {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    #[inline(always)]
    fn is_finite(stored: u16) -> bool {
        half::bf16::from_bits(stored).is_finite()
    }

    #[inline(always)]
    fn widen(stored: u16) -> f32 {
        f32::from_bits(u32::from(stored) << 16)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, step: &Step<u16>) -> S::F {
        simd.load_bf16(&step.0)
    }
}
