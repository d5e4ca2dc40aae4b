//! AVX2, FMA and F16C: sixteen lanes as two registers.
//!
//! Every method but `detect` and `run` is `#[inline(always)]`: it takes effect inside `run`, where the instructions are
//! enabled.

use std::arch::x86_64::*;

use super::{Block, Kernel, LANES, Simd};

/// Proof that this processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Evaluates vector intrinsics.
macro_rules! with_avx2 {
    ($intrinsics:expr) => {{
        // SAFETY: register-only intrinsics need nothing but their instructions, and an `Avx2` in hand, which every
        // caller has as `self`, proves that the processor has AVX2, FMA and F16C.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            $intrinsics
        }
    }};
}

impl Avx2 {
    /// The token, if the processor has the instructions.
    pub fn detect() -> Option<Avx2> {
        let has_all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has_all.then_some(Avx2(()))
    }

    /// Runs a kernel's vector code with the instructions enabled.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enabled<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.vector(simd)
        }
        // SAFETY: `self` proves that the processor has the three features that `enabled` is compiled for.
        unsafe { enabled(self, kernel) }
    }
}

/// Lanes 0..8 and 8..16.
type Pair<T> = (T, T);

impl Simd for Avx2 {
    type F = Pair<__m256>;
    type Mask = Pair<__m256>;
    type Bits = Pair<__m256i>;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        let all = with_avx2!(_mm256_set1_ps(value));
        (all, all)
    }

    #[inline(always)]
    fn load(self, from: &Block) -> Self::F {
        let from = from.as_ptr();
        // SAFETY: `from` points at sixteen f32, the two unaligned loads read lanes 0..8 and 8..16 of them, and `self`
        // proves AVX2.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
        }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Block) {
        let to = to.as_mut_ptr();
        // SAFETY: `to` points at sixteen f32 borrowed mutably, the two unaligned stores write lanes 0..8 and 8..16 of
        // them, and `self` proves AVX2.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        let (low, high) = load_halves(self, from);
        with_avx2!((_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        let (low, high) = load_halves(self, from);
        with_avx2!((
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high))),
        ))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx2!((_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx2!((_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx2!((_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx2!((_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        with_avx2!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::Mask {
        with_avx2!((_mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)))
    }

    #[inline(always)]
    fn is_nan(self, a: Self::F) -> Self::Mask {
        with_avx2!((_mm256_cmp_ps::<_CMP_UNORD_Q>(a.0, a.0), _mm256_cmp_ps::<_CMP_UNORD_Q>(a.1, a.1)))
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F {
        with_avx2!((_mm256_blendv_ps(no.0, yes.0, mask.0), _mm256_blendv_ps(no.1, yes.1, mask.1)))
    }

    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::Bits {
        with_avx2!((_mm256_castps_si256(a.0), _mm256_castps_si256(a.1)))
    }

    #[inline(always)]
    fn float(self, a: Self::Bits) -> Self::F {
        with_avx2!((_mm256_castsi256_ps(a.0), _mm256_castsi256_ps(a.1)))
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        let all = with_avx2!(_mm256_set1_epi32(value.cast_signed()));
        (all, all)
    }

    #[inline(always)]
    fn and(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_and_si256(a.0, b.0), _mm256_and_si256(a.1, b.1)))
    }

    #[inline(always)]
    fn or(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)))
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)))
    }

    #[inline(always)]
    fn sub_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_sub_epi32(a.0, b.0), _mm256_sub_epi32(a.1, b.1)))
    }

    #[inline(always)]
    fn to_exponent(self, a: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_slli_epi32::<23>(a.0), _mm256_slli_epi32::<23>(a.1)))
    }

    #[inline(always)]
    fn halve(self, a: Self::Bits) -> Self::Bits {
        with_avx2!((_mm256_srai_epi32::<1>(a.0), _mm256_srai_epi32::<1>(a.1)))
    }
}

/// Sixteen 16-bit patterns as two registers of eight.
#[inline(always)]
fn load_halves(_proof: Avx2, from: &[u16; LANES]) -> Pair<__m128i> {
    let from = from.as_ptr();
    // SAFETY: `from` points at sixteen u16, the two unaligned loads read 0..8 and 8..16 of them, and the proof implies
    // SSE2.
    #[allow(clippy::multiple_unsafe_ops_per_block)]
    unsafe {
        (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()))
    }
}
