//! AVX-512: sixteen lanes as one register, with VNNI or without.
//!
//! Every method but `detect` and `run` is `#[inline(always)]`: it takes effect inside `run`, where the instructions are
//! enabled.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Block, Kernel, LANES, Simd};
use crate::activation_blocks::{PairSums, Tile32};
use crate::blocks::FOUR;

/// Proof that this processor has AVX-512 F, BW, DQ and VL, and VNNI if so marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512<const VNNI: bool>(());

/// Evaluates vector intrinsics.
macro_rules! with_avx512 {
    ($intrinsics:expr) => {{
        // SAFETY: register-only intrinsics need nothing but their instructions, and an `Avx512` in hand, which every
        // caller has as `self`, proves that the processor has them; those of VNNI stand where `VNNI` is true.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            $intrinsics
        }
    }};
}

impl<const VNNI: bool> Avx512<VNNI> {
    /// The token, if the processor has the instructions.
    pub fn detect() -> Option<Avx512<VNNI>> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!VNNI || is_x86_feature_detected!("avx512vnni"));
        has_all.then_some(Avx512(()))
    }

    /// Runs a kernel's vector code with the instructions enabled.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn enabled<K: Kernel>(simd: Avx512<false>, kernel: K) -> K::Output {
            kernel.vector(simd)
        }
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn with_vnni<K: Kernel>(simd: Avx512<true>, kernel: K) -> K::Output {
            kernel.vector(simd)
        }
        if VNNI && K::BYTES {
            // SAFETY: `self` proves that the processor has the five features.
            unsafe { with_vnni(Avx512(()), kernel) }
        } else {
            // SAFETY: `self` proves that the processor has the four features.
            unsafe { enabled(Avx512(()), kernel) }
        }
    }
}

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const WIDE: bool = true;

    type F = __m512;
    type Mask = __mmask16;
    type Bits = __m512i;
    type Bytes = __m512i;
    /// One 32-bit sum for each output with VNNI, else two of 16 bits.
    type Small = __m512i;
    /// As [`Avx512::Small`].
    type Factors = __m512i;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        with_avx512!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &Block) -> Self::F {
        // SAFETY: `from` points at the sixteen f32 that are read, and `self` proves AVX-512.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Block) {
        // SAFETY: `to` points at the sixteen f32 that are written, borrowed mutably, and `self` proves AVX-512.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        let halves = load_32(self, bytemuck::cast_ref(from));
        with_avx512!(_mm512_cvtph_ps(halves))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        let halves = load_32(self, bytemuck::cast_ref(from));
        with_avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx512!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx512!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx512!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        with_avx512!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        with_avx512!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::Mask {
        with_avx512!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }

    #[inline(always)]
    fn is_nan(self, a: Self::F) -> Self::Mask {
        with_avx512!(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a))
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F {
        with_avx512!(_mm512_mask_blend_ps(mask, no, yes))
    }

    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::Bits {
        with_avx512!(_mm512_castps_si512(a))
    }

    #[inline(always)]
    fn float(self, a: Self::Bits) -> Self::F {
        with_avx512!(_mm512_castsi512_ps(a))
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        with_avx512!(_mm512_set1_epi32(value.cast_signed()))
    }

    #[inline(always)]
    fn and(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn sub_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_sub_epi32(a, b))
    }

    #[inline(always)]
    fn to_exponent(self, a: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_slli_epi32::<23>(a))
    }

    #[inline(always)]
    fn halve(self, a: Self::Bits) -> Self::Bits {
        with_avx512!(_mm512_srai_epi32::<1>(a))
    }

    #[inline(always)]
    fn to_f32(self, a: Self::Bits) -> Self::F {
        with_avx512!(_mm512_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, value: Self::Bits, to: &mut [i8; LANES]) {
        let bytes = with_avx512!(_mm512_cvtepi32_epi8(value));
        // SAFETY: `to` points at the sixteen bytes that are written, borrowed mutably, and SSE2 is part of x86-64.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; FOUR]) -> Self::Bytes {
        // SAFETY: `from` points at the 64 bytes that are read, and `self` proves AVX-512.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(self, a: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let mask = with_avx512!(_mm512_set1_epi8(15));
        let low = with_avx512!(_mm512_and_si512(a, mask));
        (low, with_avx512!(_mm512_and_si512(_mm512_srli_epi16::<4>(a), mask)))
    }

    #[inline(always)]
    fn raise(self, low: Self::Bytes, upper: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        with_avx512!({
            let left = _mm_cvtsi64_si128(4usize.saturating_sub(shift) as i64);
            let right = _mm_cvtsi64_si128(shift.saturating_sub(4) as i64);
            let moved = _mm512_srl_epi16(_mm512_sll_epi16(upper, left), right);
            let mask = _mm512_set1_epi8((mask << 4).cast_signed());
            _mm512_or_si512(low, _mm512_and_si512(moved, mask))
        })
    }

    /// What [`Avx512::dot`] leaves out, or takes too much.
    #[inline(always)]
    fn dot_start<const R: usize>(self, x: &Tile32<R>, row: usize) -> Self::Bits {
        let start = if VNNI { x.excess[row] } else { x.negative[row] };
        self.splat_bits(start.cast_unsigned())
    }

    /// Unsigned times signed, as the instructions have it. With VNNI weights stay plus 128, and the start takes that back.
    /// Without, the sign moves from x to the weight: for a negative x, `w · x = (!w + 1) · |x|`, of which this is
    /// `!w · |x|` and the start is the rest. A pair of products is then at most 2 · 127 · 128, which does not saturate.
    #[inline(always)]
    fn dot<const R: usize>(
        self,
        acc: Self::Bits,
        weights: Self::Bytes,
        x: &Tile32<R>,
        row: usize,
        four: usize,
    ) -> Self::Bits {
        if VNNI {
            let x = splat_four(self, x.quants[four][row].map(i8::cast_unsigned));
            with_avx512!(_mm512_dpbusd_epi32(acc, weights, x))
        } else {
            let magnitudes = splat_four(self, x.magnitudes[four][row]);
            let flips = splat_four(self, x.flips[four][row]);
            let sums = with_avx512!({
                let pairs = _mm512_maddubs_epi16(magnitudes, _mm512_xor_si512(weights, flips));
                _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            });
            in_order(self, sums)
        }
    }

    #[inline(always)]
    fn small(self, sums: PairSums, offset: i16) -> Self::Small {
        if VNNI {
            scaled(self, sums, offset)
        } else {
            // Within 16 bits: at most 8 · 16 · 127 or 32 · 8 · 127.
            let start = sums.map(|sum| sum.wrapping_mul(offset).cast_unsigned());
            self.splat_bits(u32::from(start[0]) | u32::from(start[1]) << 16)
        }
    }

    /// Without VNNI, a pair of products is at most 2 · 63 · 127. Sums wrap, so that only the last needs to fit.
    #[inline(always)]
    fn dot_small(self, acc: Self::Small, weights: Self::Bytes, x: [i8; 4]) -> Self::Small {
        let x = splat_four(self, x.map(i8::cast_unsigned));
        if VNNI {
            with_avx512!(_mm512_dpbusd_epi32(acc, weights, x))
        } else {
            in_order(self, with_avx512!(_mm512_add_epi16(acc, _mm512_maddubs_epi16(weights, x))))
        }
    }

    #[inline(always)]
    fn total(self, a: Self::Small) -> Self::Bits {
        if VNNI { a } else { with_avx512!(_mm512_madd_epi16(a, _mm512_set1_epi16(1))) }
    }

    #[inline(always)]
    fn factors(self, from: &[i8; LANES]) -> Self::Factors {
        let bytes = load_16(self, bytemuck::cast_ref(from));
        let factors = with_avx512!(_mm512_cvtepi8_epi32(bytes));
        if VNNI {
            factors
        } else {
            with_avx512!({
                let low = _mm512_and_si512(factors, _mm512_set1_epi32(0xffff));
                _mm512_or_si512(low, _mm512_slli_epi32::<16>(factors))
            })
        }
    }

    #[inline(always)]
    fn add_scaled(self, acc: Self::Bits, a: Self::Small, factors: Self::Factors) -> Self::Bits {
        if VNNI {
            with_avx512!(_mm512_add_epi32(acc, _mm512_mullo_epi32(a, factors)))
        } else {
            with_avx512!(_mm512_add_epi32(acc, _mm512_madd_epi16(a, factors)))
        }
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Self::Bits, pairs: &[[u8; 2]; LANES], x: [i16; 2]) -> Self::Bits {
        let pairs = load_32(self, bytemuck::cast_ref(pairs));
        let x = self.splat_bits(u32::from(x[0].cast_unsigned()) | u32::from(x[1].cast_unsigned()) << 16);
        with_avx512!(_mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_cvtepu8_epi16(pairs), x)))
    }
}

/// Both sums times a factor, exactly: as one instruction beside the load, where arithmetic on each row's sums would cost as
/// much as its products.
#[inline(always)]
fn scaled<const VNNI: bool>(proof: Avx512<VNNI>, sums: PairSums, factor: i16) -> __m512i {
    let sums = proof.splat_bits(bytemuck::cast(sums));
    with_avx512!(_mm512_madd_epi16(sums, _mm512_set1_epi16(factor)))
}

/// The same value. The compiler keeps these calls in the order in which they are written; without them it reorders the
/// additions of integers, so that neither weights nor sums stay in registers.
#[inline(always)]
fn in_order<const VNNI: bool>(_proof: Avx512<VNNI>, sums: __m512i) -> __m512i {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fence(mut sums: __m512i) -> __m512i {
        // SAFETY: there is no instruction, only a comment.
        unsafe {
            asm!("/* {} */", inout(zmm_reg) sums, options(nomem, nostack, preserves_flags));
        }
        sums
    }
    with_avx512!(fence(sums))
}

/// The same four bytes for every output.
#[inline(always)]
fn splat_four<const VNNI: bool>(_proof: Avx512<VNNI>, four: [u8; 4]) -> __m512i {
    with_avx512!(_mm512_set1_epi32(i32::from_le_bytes(four)))
}

#[inline(always)]
fn load_16<const VNNI: bool>(_proof: Avx512<VNNI>, from: &[u8; 16]) -> __m128i {
    // SAFETY: `from` points at the sixteen bytes that are read, and SSE2 is part of x86-64.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

#[inline(always)]
fn load_32<const VNNI: bool>(_proof: Avx512<VNNI>, from: &[u8; 32]) -> __m256i {
    // SAFETY: `from` points at the 32 bytes that are read, and AVX-512 includes AVX.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}
