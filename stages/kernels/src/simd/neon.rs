//! NEON: sixteen lanes as four registers.
//!
//! NEON and its fused multiply-add are part of every 64-bit Arm processor that this crate is built for, so no function
//! needs to enable them.

use std::arch::aarch64::*;
use std::array::from_fn;

use super::{Block, Kernel, LANES, Simd};
use crate::activation_blocks::{PairSums, Tile32};
use crate::blocks::{FOUR, Q8_OFFSET};

/// Proof that this processor has NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

/// Evaluates vector intrinsics.
macro_rules! with_neon {
    ($intrinsics:expr) => {{
        // SAFETY: register-only intrinsics need nothing but their instructions, and a `Neon` in hand, which every caller
        // has as `self`, proves that the processor has NEON.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            $intrinsics
        }
    }};
}

impl Neon {
    /// The token, if the processor has the instructions.
    pub fn detect() -> Option<Neon> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    /// Runs a kernel's vector code.
    #[inline(never)]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.vector(self)
    }
}

/// Lanes 0..4, 4..8, 8..12 and 12..16.
type Four<T> = [T; 4];

impl Simd for Neon {
    type F = Four<float32x4_t>;
    type Mask = Four<uint32x4_t>;
    type Bits = Four<int32x4_t>;
    type Bytes = Four<uint8x16_t>;
    type Small = Four<int32x4_t>;
    type Factors = Four<int32x4_t>;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [with_neon!(vdupq_n_f32(value)); 4]
    }

    #[inline(always)]
    fn load(self, from: &Block) -> Self::F {
        let fours: &Four<[f32; 4]> = bytemuck::cast_ref(from);
        // SAFETY: each four is what is read of it, and `self` proves NEON.
        from_fn(|i| unsafe { vld1q_f32(fours[i].as_ptr()) })
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut Block) {
        let fours: &mut Four<[f32; 4]> = bytemuck::cast_mut(to);
        for (four, value) in fours.iter_mut().zip(value) {
            // SAFETY: each four is what is written of it, and `self` proves NEON.
            unsafe { vst1q_f32(four.as_mut_ptr(), value) }
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        let fours = load_u16(self, from);
        from_fn(|i| with_neon!(vcvt_f32_f16(vreinterpret_f16_u16(fours[i]))))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::F {
        let fours = load_u16(self, from);
        from_fn(|i| with_neon!(vreinterpretq_f32_u32(vshll_n_u16::<16>(fours[i]))))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vaddq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vsubq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vmulq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vdivq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vfmaq_f32(c[i], a[i], b[i])))
    }

    #[inline(always)]
    fn less(self, a: Self::F, b: Self::F) -> Self::Mask {
        from_fn(|i| with_neon!(vcltq_f32(a[i], b[i])))
    }

    #[inline(always)]
    fn is_nan(self, a: Self::F) -> Self::Mask {
        from_fn(|i| with_neon!(vmvnq_u32(vceqq_f32(a[i], a[i]))))
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F {
        from_fn(|i| with_neon!(vbslq_f32(mask[i], yes[i], no[i])))
    }

    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::Bits {
        from_fn(|i| with_neon!(vreinterpretq_s32_f32(a[i])))
    }

    #[inline(always)]
    fn float(self, a: Self::Bits) -> Self::F {
        from_fn(|i| with_neon!(vreinterpretq_f32_s32(a[i])))
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        [with_neon!(vdupq_n_s32(value.cast_signed())); 4]
    }

    #[inline(always)]
    fn and(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vandq_s32(a[i], b[i])))
    }

    #[inline(always)]
    fn or(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vorrq_s32(a[i], b[i])))
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vaddq_s32(a[i], b[i])))
    }

    #[inline(always)]
    fn sub_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vsubq_s32(a[i], b[i])))
    }

    #[inline(always)]
    fn to_exponent(self, a: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vshlq_n_s32::<23>(a[i])))
    }

    #[inline(always)]
    fn halve(self, a: Self::Bits) -> Self::Bits {
        from_fn(|i| with_neon!(vshrq_n_s32::<1>(a[i])))
    }

    #[inline(always)]
    fn to_f32(self, a: Self::Bits) -> Self::F {
        from_fn(|i| with_neon!(vcvtq_f32_s32(a[i])))
    }

    /// Left to the processor.
    #[inline(always)]
    fn prefetch(self, _line: *const u8) {}

    #[inline(always)]
    fn store_bytes(self, value: Self::Bits, to: &mut [i8; LANES]) {
        let bytes = with_neon!({
            let low = vcombine_s16(vmovn_s32(value[0]), vmovn_s32(value[1]));
            let high = vcombine_s16(vmovn_s32(value[2]), vmovn_s32(value[3]));
            vcombine_s8(vmovn_s16(low), vmovn_s16(high))
        });
        // SAFETY: `to` points at the sixteen bytes that are written, borrowed mutably, and the proof is of NEON.
        unsafe { vst1q_s8(to.as_mut_ptr(), bytes) }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; FOUR]) -> Self::Bytes {
        let parts: &Four<[u8; 16]> = bytemuck::cast_ref(from);
        from_fn(|i| load_16(self, &parts[i]))
    }

    #[inline(always)]
    fn nibbles(self, a: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let low = from_fn(|i| with_neon!(vandq_u8(a[i], vdupq_n_u8(15))));
        (low, from_fn(|i| with_neon!(vshrq_n_u8::<4>(a[i]))))
    }

    #[inline(always)]
    fn raise(self, low: Self::Bytes, upper: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        from_fn(|i| {
            with_neon!({
                // A shift to the left by less than nothing is one to the right.
                let moved = vshlq_u8(upper[i], vdupq_n_s8(4 - shift as i8));
                vorrq_u8(low[i], vandq_u8(moved, vdupq_n_u8(mask << 4)))
            })
        })
    }

    #[inline(always)]
    fn dot_start<const R: usize>(self, _x: &Tile32<R>, _row: usize) -> Self::Bits {
        self.splat_bits(0)
    }

    #[inline(always)]
    fn dot<const R: usize>(
        self,
        acc: Self::Bits,
        weights: Self::Bytes,
        x: &Tile32<R>,
        row: usize,
        four: usize,
    ) -> Self::Bits {
        let weights = from_fn(|i| with_neon!(veorq_u8(weights[i], vdupq_n_u8(Q8_OFFSET))));
        dot_four(self, acc, weights, x.quants[four][row])
    }

    #[inline(always)]
    fn small(self, sums: PairSums, offset: i16) -> Self::Small {
        let sum = i32::from(sums[0]) + i32::from(sums[1]);
        self.splat_bits((i32::from(offset) * sum).cast_unsigned())
    }

    #[inline(always)]
    fn dot_small(self, acc: Self::Small, weights: Self::Bytes, x: [i8; 4]) -> Self::Small {
        dot_four(self, acc, weights, x)
    }

    #[inline(always)]
    fn total(self, a: Self::Small) -> Self::Bits {
        a
    }

    #[inline(always)]
    fn factors(self, from: &[i8; LANES]) -> Self::Factors {
        let bytes = load_16(self, bytemuck::cast_ref(from));
        with_neon!({
            let bytes = vreinterpretq_s8_u8(bytes);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_s16(vget_high_s16(low)),
                vmovl_s16(vget_low_s16(high)),
                vmovl_s16(vget_high_s16(high)),
            ]
        })
    }

    #[inline(always)]
    fn add_scaled(self, acc: Self::Bits, a: Self::Small, factors: Self::Factors) -> Self::Bits {
        from_fn(|i| with_neon!(vmlaq_s32(acc[i], a[i], factors[i])))
    }

    #[inline(always)]
    fn dot_pairs(self, acc: Self::Bits, pairs: &[[u8; 2]; LANES], x: [i16; 2]) -> Self::Bits {
        let halves: &[[u8; 16]; 2] = bytemuck::cast_ref(pairs);
        let x = i32::from(x[0].cast_unsigned()) | i32::from(x[1]) << 16;
        from_fn(|i| {
            let bytes = load_16(self, &halves[i / 2]);
            with_neon!({
                let x = vreinterpret_s16_s32(vdup_n_s32(x));
                let bytes = if i % 2 == 0 { vget_low_u8(bytes) } else { vget_high_u8(bytes) };
                let words = vreinterpretq_s16_u16(vmovl_u8(bytes));
                let low = vmull_s16(vget_low_s16(words), x);
                let high = vmull_s16(vget_high_s16(words), x);
                vaddq_s32(acc[i], vpaddq_s32(low, high))
            })
        })
    }
}

/// A pair of products is at most 2 · 128 · 127, which 16 bits hold.
#[inline(always)]
fn dot_four(_proof: Neon, acc: Four<int32x4_t>, weights: Four<uint8x16_t>, x: [i8; 4]) -> Four<int32x4_t> {
    let x = i32::from_le_bytes(x.map(i8::cast_unsigned));
    from_fn(|i| {
        with_neon!({
            let x = vreinterpret_s8_s32(vdup_n_s32(x));
            let weights = vreinterpretq_s8_u8(weights[i]);
            let low = vmull_s8(vget_low_s8(weights), x);
            let high = vmull_s8(vget_high_s8(weights), x);
            vpadalq_s16(acc[i], vpaddq_s16(low, high))
        })
    })
}

#[inline(always)]
fn load_16(_proof: Neon, from: &[u8; 16]) -> uint8x16_t {
    // SAFETY: `from` points at the sixteen bytes that are read, and the proof is of NEON.
    unsafe { vld1q_u8(from.as_ptr()) }
}

#[inline(always)]
fn load_u16(_proof: Neon, from: &[u16; LANES]) -> Four<uint16x4_t> {
    let fours: &Four<[u16; 4]> = bytemuck::cast_ref(from);
    // SAFETY: each four is what is read of it, and the proof is of NEON.
    from_fn(|i| unsafe { vld1_u16(fours[i].as_ptr()) })
}
