//! AVX2, FMA and F16C: sixteen lanes as two registers.
//!
//! Every method but `detect` and `run` is `#[inline(always)]`: it takes effect inside `run`, where the instructions are
//! enabled.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Block, Kernel, LANES, Simd};
use crate::activation_blocks::{PairSums, Tile32};
use crate::blocks::FOUR;

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
        #[inline(never)]
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
    type Bytes = Pair<__m256i>;
    /// Two 16-bit sums for each output.
    type Small = Pair<__m256i>;
    /// Each factor twice, in 16 bits.
    type Factors = Pair<__m256i>;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

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

    #[inline(always)]
    fn to_f32(self, a: Self::Bits) -> Self::F {
        with_avx2!((_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)))
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, value: Self::Bits, to: &mut [i8; LANES]) {
        let bytes = with_avx2!({
            let low_bytes = _mm256_set1_epi32(0xff);
            let words = _mm256_packus_epi32(_mm256_and_si256(value.0, low_bytes), _mm256_and_si256(value.1, low_bytes));
            // Lanes 0..4, 8..12, 4..8 and 12..16.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
        });
        // SAFETY: `to` points at the sixteen bytes that are written, borrowed mutably, and AVX2 includes SSE2.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; FOUR]) -> Self::Bytes {
        let from = from.as_ptr();
        // SAFETY: `from` points at 64 bytes, the two unaligned loads read bytes 0..32 and 32..64 of them, and `self`
        // proves AVX2.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()))
        }
    }

    #[inline(always)]
    fn nibbles(self, a: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let mask = with_avx2!(_mm256_set1_epi8(15));
        let low = with_avx2!((_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask)));
        let high = with_avx2!((_mm256_srli_epi16::<4>(a.0), _mm256_srli_epi16::<4>(a.1)));
        (low, with_avx2!((_mm256_and_si256(high.0, mask), _mm256_and_si256(high.1, mask))))
    }

    #[inline(always)]
    fn raise(self, low: Self::Bytes, upper: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        let mask = with_avx2!(_mm256_set1_epi8((mask << 4).cast_signed()));
        let one = |low, upper| {
            with_avx2!({
                let left = _mm_cvtsi64_si128(4usize.saturating_sub(shift) as i64);
                let right = _mm_cvtsi64_si128(shift.saturating_sub(4) as i64);
                let moved = _mm256_srl_epi16(_mm256_sll_epi16(upper, left), right);
                _mm256_or_si256(low, _mm256_and_si256(moved, mask))
            })
        };
        (one(low.0, upper.0), one(low.1, upper.1))
    }

    /// What [`Avx2::dot`] leaves out.
    #[inline(always)]
    fn dot_start<const R: usize>(self, x: &Tile32<R>, row: usize) -> Self::Bits {
        self.splat_bits(x.negative[row].cast_unsigned())
    }

    /// Unsigned times signed, as the instruction has it, with the sign moved from x to the weight. For a negative x,
    /// `w · x = -w · |x| = (!w + 1) · |x|`: here it is `!w · |x|`, and the start is the sum of the rest. A pair of
    /// products is at most 2 · 127 · 128, which does not saturate.
    #[inline(always)]
    fn dot<const R: usize>(
        self,
        acc: Self::Bits,
        weights: Self::Bytes,
        x: &Tile32<R>,
        row: usize,
        four: usize,
    ) -> Self::Bits {
        let magnitudes = splat_four(self, x.magnitudes[four][row]);
        let flips = splat_four(self, x.flips[four][row]);
        let sums = with_avx2!({
            let one = _mm256_set1_epi16(1);
            let pairs = (
                _mm256_maddubs_epi16(magnitudes, _mm256_xor_si256(weights.0, flips)),
                _mm256_maddubs_epi16(magnitudes, _mm256_xor_si256(weights.1, flips)),
            );
            (
                _mm256_add_epi32(acc.0, _mm256_madd_epi16(pairs.0, one)),
                _mm256_add_epi32(acc.1, _mm256_madd_epi16(pairs.1, one)),
            )
        });
        in_order(self, sums)
    }

    #[inline(always)]
    fn small(self, sums: PairSums, offset: i16) -> Self::Small {
        // Within 16 bits: at most 8 · 16 · 127 or 32 · 8 · 127.
        let start = sums.map(|sum| (sum.wrapping_mul(offset)).cast_unsigned());
        self.splat_bits(u32::from(start[0]) | u32::from(start[1]) << 16)
    }

    /// A pair of products is at most 2 · 63 · 127. Sums wrap, so that only the last needs to fit.
    #[inline(always)]
    fn dot_small(self, acc: Self::Small, weights: Self::Bytes, x: [i8; 4]) -> Self::Small {
        let x = splat_four(self, x.map(i8::cast_unsigned));
        let sums = with_avx2!((
            _mm256_add_epi16(acc.0, _mm256_maddubs_epi16(weights.0, x)),
            _mm256_add_epi16(acc.1, _mm256_maddubs_epi16(weights.1, x)),
        ));
        in_order(self, sums)
    }

    #[inline(always)]
    fn total(self, a: Self::Small) -> Self::Bits {
        let one = with_avx2!(_mm256_set1_epi16(1));
        with_avx2!((_mm256_madd_epi16(a.0, one), _mm256_madd_epi16(a.1, one)))
    }

    #[inline(always)]
    fn factors(self, from: &[i8; LANES]) -> Self::Factors {
        let bytes = load_sixteen(self, bytemuck::cast_ref(from));
        with_avx2!({
            let words = _mm256_cvtepi8_epi16(bytes);
            // Lanes 0..4 and 8..12, then 4..8 and 12..16.
            let (a, b) = (_mm256_unpacklo_epi16(words, words), _mm256_unpackhi_epi16(words, words));
            (_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
        })
    }

    #[inline(always)]
    fn add_scaled(self, acc: Self::Bits, a: Self::Small, factors: Self::Factors) -> Self::Bits {
        with_avx2!((
            _mm256_add_epi32(acc.0, _mm256_madd_epi16(a.0, factors.0)),
            _mm256_add_epi32(acc.1, _mm256_madd_epi16(a.1, factors.1)),
        ))
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Self::Bits, pairs: &[[u8; 2]; LANES], x: [i16; 2]) -> Self::Bits {
        let pairs: &[[u8; 16]; 2] = bytemuck::cast_ref(pairs);
        let (low, high) = (load_sixteen(self, &pairs[0]), load_sixteen(self, &pairs[1]));
        let x = self.splat_bits(u32::from(x[0].cast_unsigned()) | u32::from(x[1].cast_unsigned()) << 16);
        with_avx2!((
            _mm256_add_epi32(acc.0, _mm256_madd_epi16(_mm256_cvtepu8_epi16(low), x.0)),
            _mm256_add_epi32(acc.1, _mm256_madd_epi16(_mm256_cvtepu8_epi16(high), x.1)),
        ))
    }
}

/// The same value. The compiler keeps these calls in the order in which they are written. Without them it reorders the
/// additions of integers, row by row, so that neither weights nor sums stay in registers.
#[inline(always)]
fn in_order(_proof: Avx2, sums: Pair<__m256i>) -> Pair<__m256i> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn fence(mut low: __m256i, mut high: __m256i) -> Pair<__m256i> {
        // SAFETY: there is no instruction, only a comment.
        unsafe {
            asm!("/* {} {} */", inout(ymm_reg) low, inout(ymm_reg) high, options(nomem, nostack, preserves_flags));
        }
        (low, high)
    }
    with_avx2!(fence(sums.0, sums.1))
}

/// The same four bytes for every output.
#[inline(always)]
fn splat_four(_proof: Avx2, four: [u8; 4]) -> __m256i {
    with_avx2!(_mm256_set1_epi32(i32::from_le_bytes(four)))
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

#[inline(always)]
fn load_sixteen(_proof: Avx2, from: &[u8; 16]) -> __m128i {
    // SAFETY: `from` points at the sixteen bytes that are read, and the proof implies SSE2.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
