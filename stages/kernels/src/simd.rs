//! Sixteen lanes of f32, as one type per instruction set.
//!
//! Invariants:
//! - Every arithmetic method is one correctly rounded IEEE-754 operation in each lane, so a kernel written against
//!   [`Simd`] gives the same bits on each implementation.
//! - Lane operations never mix lanes; folds are written out by the kernels in the order the profile fixes.
//! - There is no min, max or estimate: instruction sets disagree on those. Compare and select instead.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;

/// Outputs computed side by side: the width of a panel, and the number of virtual lanes of a sum.
pub(crate) const LANES: usize = 16;

/// Sixteen f32, as they lie in memory.
pub(crate) type Block = [f32; LANES];

/// One operation, as its scalar definition and as vector code.
///
/// `vector` must be `#[inline(always)]`, as must everything generic that it calls, so that the body is compiled inside
/// a function that has the instructions enabled.
pub(crate) trait Kernel {
    type Output;

    /// The definition.
    fn scalar(self) -> Self::Output;

    /// The same bits, sixteen lanes at a time.
    fn vector<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set. A value of the type is proof that this processor has it.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen truth values.
    type Mask: Copy;
    /// Sixteen 32-bit patterns.
    type Bits: Copy;

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
}

/// The lanes of `from`, which may be fewer than sixteen; the rest are +0.0.
#[inline(always)]
pub(crate) fn padded(from: &[f32]) -> Block {
    let mut block = [0.0; LANES];
    block[..from.len()].copy_from_slice(from);
    block
}
