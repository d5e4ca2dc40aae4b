//! Sixteen lanes of f32, as one type per instruction set.
//!
//! Invariants:
//! - Every arithmetic method is one correctly rounded IEEE-754 operation in each lane, so a kernel written against
//!   [`Simd`] gives the same bits on each implementation.
//! - Lane operations never mix lanes; folds are written out by the kernels in the order the profile fixes.
//! - There is no min, max or estimate: instruction sets disagree on those. Compare and select instead.

use crate::activation_blocks::{PairSums, Tile32};
use crate::blocks::FOUR;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

/// Outputs computed side by side: the width of a panel, and the number of virtual lanes of a sum.
pub(crate) const LANES: usize = 16;

/// Sixteen f32, as they lie in memory.
pub(crate) type Block = [f32; LANES];

/// The sign of an f32.
pub(crate) const SIGN: u32 = 0x8000_0000;

/// Adding it to a small f32 rounds that to an integer, to nearest even; the integer is then in the low bits. 1.5 · 2^23.
pub(crate) const ROUNDER: f32 = 12_582_912.0;

/// One operation, as its scalar definition and as vector code.
///
/// `vector` must be `#[inline(always)]`, as must everything generic that it calls, so that the body is compiled inside
/// a function that has the instructions enabled. A closure given to the standard library is not: what it runs on vectors
/// becomes a call for each instruction, ten times as slow. Vector code is written as plain loops.
pub(crate) trait Kernel {
    /// True if it adds up products of bytes, for which some instruction sets have a variant of their own. All else is
    /// then not compiled for that variant too.
    const BYTES: bool = false;

    type Output;

    /// The definition.
    fn scalar(self) -> Self::Output;

    /// The same bits, sixteen lanes at a time.
    fn vector<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set. A value of the type is proof that this processor has it.
pub(crate) trait Simd: Copy {
    /// True if there are registers for twice the rows that fill AVX2.
    const WIDE: bool = false;

    /// Sixteen f32.
    type F: Copy;
    /// Sixteen truth values.
    type Mask: Copy;
    /// Sixteen 32-bit patterns, or integers.
    type Bits: Copy;
    /// Four bytes for each of sixteen outputs.
    type Bytes: Copy;
    /// Sixteen sums of products of few bits.
    type Small: Copy;
    /// What multiplies [`Simd::Small`].
    type Factors: Copy;

    /// Runs a kernel's vector code as a function of its own, which keeps generic code from being compiled into each
    /// of its callers.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &Block) -> Self::F;
    fn store(self, value: Self::F, to: &mut Block);
    /// Widens f16 exactly.
    fn load_f16(self, from: &[u16; LANES]) -> Self::F;
    /// Widens bf16 exactly.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// `a < b`; false where either is NaN.
    fn less(self, a: Self::F, b: Self::F) -> Self::Mask;
    fn is_nan(self, a: Self::F) -> Self::Mask;
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F;

    fn bits(self, a: Self::F) -> Self::Bits;
    fn float(self, a: Self::Bits) -> Self::F;
    fn splat_bits(self, value: u32) -> Self::Bits;
    fn and(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    fn or(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Wraps.
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Wraps.
    fn sub_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// `a << 23`: an integer into the exponent field.
    fn to_exponent(self, a: Self::Bits) -> Self::Bits;
    /// `a >> 1`, arithmetic.
    fn halve(self, a: Self::Bits) -> Self::Bits;
    /// Integers to f32, to nearest even.
    fn to_f32(self, a: Self::Bits) -> Self::F;

    /// Says that a line of memory will be read soon. Any address may be given.
    fn prefetch(self, line: *const u8);

    /// The low byte of each integer.
    fn store_bytes(self, value: Self::Bits, to: &mut [i8; LANES]);

    fn bytes(self, from: &[u8; FOUR]) -> Self::Bytes;
    /// The low four bits of each byte, and the high four.
    fn nibbles(self, a: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    /// `low | (upper >> shift & mask) << 4` in each byte. `shift` is below 8.
    fn raise(self, low: Self::Bytes, upper: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes;

    /// The start of the sums of products with the inputs of a row. They are exact once every [`Simd::dot`] is added.
    fn dot_start<const R: usize>(self, x: &Tile32<R>, row: usize) -> Self::Bits;
    /// Adds four products in each lane. Weights are signed bytes, given plus 128.
    fn dot<const R: usize>(
        self,
        acc: Self::Bits,
        weights: Self::Bytes,
        x: &Tile32<R>,
        row: usize,
        four: usize,
    ) -> Self::Bits;

    /// `offset` times all x, given their sums: what turns sums of products with w into those with w + `offset`.
    fn small(self, sums: PairSums, offset: i16) -> Self::Small;
    /// Adds four products in each lane. Weights are in 0..64 and x within ±127. The sum is exact after at most eight
    /// calls if the weights, with the offset, are within ±16, and after at most four if they are within ±32.
    fn dot_small(self, acc: Self::Small, weights: Self::Bytes, x: [i8; 4]) -> Self::Small;
    fn total(self, a: Self::Small) -> Self::Bits;
    fn factors(self, from: &[i8; LANES]) -> Self::Factors;
    /// `acc + a * factors`, exactly.
    fn add_scaled(self, acc: Self::Bits, a: Self::Small, factors: Self::Factors) -> Self::Bits;
    /// Adds two products of unsigned bytes with x in each lane, exactly.
    fn dot_pairs(self, acc: Self::Bits, pairs: &[[u8; 2]; LANES], x: [i16; 2]) -> Self::Bits;
}

/// The lanes of `from`, which may be fewer than sixteen; the rest are +0.0.
#[inline(always)]
pub(crate) fn padded(from: &[f32]) -> Block {
    let mut block = [0.0; LANES];
    block[..from.len()].copy_from_slice(from);
    block
}
