//! How numbers are stored in panels, and how each widens to f32.
//!
//! Invariant: widening is exact, so storage never changes what a chain computes from the stored numbers.

use crate::simd::{LANES, Simd};

/// Number format of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE-754 binary32.
    F32,
    /// IEEE-754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub const fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// One step of a panel: the sixteen stored numbers that meet the same input. The alignment keeps each half inside one
/// cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub(crate) struct Step<T>(pub(crate) [T; LANES]);

/// A number format, as a type.
pub(crate) trait Format: Send + Sync + 'static {
    type Stored: Copy + Default + Send + Sync + 'static;

    /// Reads one number from its little-endian bytes, of which there are `size_of::<Stored>()`.
    fn read(bytes: &[u8]) -> Self::Stored;

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
    fn widen(stored: u16) -> f32 {
        f32::from_bits(u32::from(stored) << 16)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, step: &Step<u16>) -> S::F {
        simd.load_bf16(&step.0)
    }
}
