//! exp, tanh, sigmoid and erf, by the project's own polynomials.
//!
//! Invariants:
//! - Each function is defined for all 2^32 inputs, and its vector twin gives the same bits for each of them. A NaN gives
//!   the one canonical NaN, `0x7fc00000`.
//! - Every step is one rounded operation in a fixed order; nothing is taken from the platform's libm.
//!
//! The coefficients are minimax fits (Remez exchange in 40 digits, then rounded to f32): exp within 2^-28 on
//! [-ln 2 / 2, ln 2 / 2], tanh within 2^-32 on [0, 0.625], erf within 2^-29 on [0, 1] and 2^-31 above, all relative. In
//! units in the last place, results are within 1 (exp, erf), 1.5 (tanh) and 2.5 (sigmoid) of the true ones; tests
//! compare them with 64-bit libm.

use crate::activation::{Map, map};
use crate::path::Path;
use crate::simd::{ROUNDER, SIGN, Simd};

/// The only NaN these functions return.
const NAN_BITS: u32 = 0x7fc0_0000;
const MAGNITUDE: u32 = !SIGN;

const EXPONENT_BIAS: u32 = 127;

/// Below, exp rounds to zero; above, to infinity. Clamping keeps the exponent arithmetic in range.
const EXP_LOW: f32 = -104.5;
const EXP_HIGH: f32 = 89.0;
const LN_2_HIGH: f32 = std::f32::consts::LN_2;
/// ln 2 - `LN_2_HIGH`.
const LN_2_LOW: f32 = -1.904_654_3e-9;
/// exp(r) = 1 + r + r² · this, highest power first.
const EXP: [f32; 5] = [1.381_459_9e-3, 8.368_717e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1];

/// Below, tanh is a polynomial; above, it comes from exp.
const TANH_POLYNOMIAL_END: f32 = 0.625;
/// tanh(x) = x + x³ · this in x², highest power first.
const TANH: [f32; 6] = [2.143_018_9e-3, -8.177_472e-3, 2.170_073_8e-2, -5.394_677e-2, 1.333_320_6e-1, -3.333_333e-1];

/// Below, erf is a polynomial; above, it comes from exp.
const ERF_POLYNOMIAL_END: f32 = 1.0;
/// From here on erf rounds to 1.
const ERF_END: f32 = 4.0;
/// erf(x) = x + x · this in x², highest power first.
const ERF: [f32; 7] =
    [7.853_85e-5, -8.010_202e-4, 5.188_330_5e-3, -2.685_381_5e-2, 1.128_358_54e-1, -3.761_262_6e-1, 1.283_791_7e-1];
/// -ln(1 - erf(x)) = x + x · this in x, highest power first.
const ERFC: [f32; 7] =
    [1.365_905_9e-5, -3.474_545_7e-4, 3.744_262_3e-3, -2.398_104e-2, 1.064_957_7e-1, 6.349_917e-1, 1.286_886_3e-1];

/// e^x.
#[inline]
pub fn exp(x: f32) -> f32 {
    let clamped = if x < EXP_LOW { EXP_LOW } else { x };
    let clamped = if EXP_HIGH < clamped { EXP_HIGH } else { clamped };
    let rounded = clamped.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = rounded - ROUNDER;
    let r = n.mul_add(-LN_2_HIGH, clamped);
    let r = n.mul_add(-LN_2_LOW, r);
    let p = polynomial(&EXP, r).mul_add(r, 1.0).mul_add(r, 1.0);
    // 2^n in two factors, so that a subnormal result is rounded once, by the last product.
    let n = rounded.to_bits().wrapping_sub(ROUNDER.to_bits());
    let half = (n.cast_signed() >> 1).cast_unsigned();
    let rest = n.wrapping_sub(half);
    let result = p * power_of_two(half) * power_of_two(rest);
    if x.is_nan() { canonical_nan() } else { result }
}

/// The hyperbolic tangent.
#[inline]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let s = a * a;
    let near = (a * s).mul_add(polynomial(&TANH, s), a);
    let far = 1.0 - 2.0 / (exp(a + a) + 1.0);
    let result = if a < TANH_POLYNOMIAL_END { near } else { far };
    with_sign_of(result, x)
}

/// 1 / (1 + e^-x), as e^x / (1 + e^x) for negative x, so that small results keep their precision.
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let result = if x < 0.0 { e } else { 1.0 } / (1.0 + e);
    if x.is_nan() { canonical_nan() } else { result }
}

/// The error function.
#[inline]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    let s = a * a;
    let near = a.mul_add(polynomial(&ERF, s), a);
    let clamped = if ERF_END < a { ERF_END } else { a };
    let far = 1.0 - exp(-clamped.mul_add(polynomial(&ERFC, clamped), clamped));
    let result = if a < ERF_POLYNOMIAL_END { near } else { far };
    with_sign_of(result, x)
}

/// [`exp`] of each value, in place.
pub fn exp_all(path: Path, values: &mut [f32]) {
    map::<Exp>(path, values);
}

/// [`tanh`] of each value, in place.
pub fn tanh_all(path: Path, values: &mut [f32]) {
    map::<Tanh>(path, values);
}

/// [`sigmoid`] of each value, in place.
pub fn sigmoid_all(path: Path, values: &mut [f32]) {
    map::<Sigmoid>(path, values);
}

/// [`erf`] of each value, in place.
pub fn erf_all(path: Path, values: &mut [f32]) {
    map::<Erf>(path, values);
}

/// Horner's scheme with fma.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[f32; N], x: f32) -> f32 {
    let mut p = coefficients[0];
    for &coefficient in &coefficients[1..] {
        p = p.mul_add(x, coefficient);
    }
    p
}

/// 2^n for a two's complement n of a normal result.
#[inline(always)]
fn power_of_two(n: u32) -> f32 {
    f32::from_bits(n.wrapping_add(EXPONENT_BIAS) << 23)
}

#[inline(always)]
fn with_sign_of(magnitude: f32, x: f32) -> f32 {
    if x.is_nan() { canonical_nan() } else { f32::from_bits(magnitude.to_bits() | (x.to_bits() & SIGN)) }
}

#[inline(always)]
fn canonical_nan() -> f32 {
    f32::from_bits(NAN_BITS)
}

pub(crate) struct Exp;
pub(crate) struct Tanh;
pub(crate) struct Sigmoid;
pub(crate) struct Erf;

impl Map for Exp {
    fn scalar(x: f32) -> f32 {
        exp(x)
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let low = simd.splat(EXP_LOW);
        let high = simd.splat(EXP_HIGH);
        let rounder = simd.splat(ROUNDER);
        let one = simd.splat(1.0);
        let clamped = simd.select(simd.less(x, low), low, x);
        let clamped = simd.select(simd.less(high, clamped), high, clamped);
        let rounded = simd.fma(clamped, simd.splat(std::f32::consts::LOG2_E), rounder);
        let n = simd.sub(rounded, rounder);
        let r = simd.fma(n, simd.splat(-LN_2_HIGH), clamped);
        let r = simd.fma(n, simd.splat(-LN_2_LOW), r);
        let p = polynomial_vector(simd, &EXP, r);
        let p = simd.fma(p, r, one);
        let p = simd.fma(p, r, one);
        let n = simd.sub_bits(simd.bits(rounded), simd.bits(rounder));
        let half = simd.halve(n);
        let rest = simd.sub_bits(n, half);
        let result = simd.mul(p, power_of_two_vector(simd, half));
        let result = simd.mul(result, power_of_two_vector(simd, rest));
        canonical(simd, x, result)
    }
}

impl Map for Tanh {
    fn scalar(x: f32) -> f32 {
        tanh(x)
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let one = simd.splat(1.0);
        let a = magnitude(simd, x);
        let s = simd.mul(a, a);
        let near = simd.fma(simd.mul(a, s), polynomial_vector(simd, &TANH, s), a);
        let e = Exp::vector(simd, simd.add(a, a));
        let far = simd.sub(one, simd.div(simd.splat(2.0), simd.add(e, one)));
        let is_near = simd.less(a, simd.splat(TANH_POLYNOMIAL_END));
        with_sign_of_vector(simd, simd.select(is_near, near, far), x)
    }
}

impl Map for Sigmoid {
    fn scalar(x: f32) -> f32 {
        sigmoid(x)
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let one = simd.splat(1.0);
        let negated = simd.or(simd.bits(x), simd.splat_bits(SIGN));
        let e = Exp::vector(simd, simd.float(negated));
        let numerator = simd.select(simd.less(x, simd.splat(0.0)), e, one);
        canonical(simd, x, simd.div(numerator, simd.add(one, e)))
    }
}

impl Map for Erf {
    fn scalar(x: f32) -> f32 {
        erf(x)
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let end = simd.splat(ERF_END);
        let a = magnitude(simd, x);
        let s = simd.mul(a, a);
        let near = simd.fma(a, polynomial_vector(simd, &ERF, s), a);
        let clamped = simd.select(simd.less(end, a), end, a);
        let exponent = simd.fma(clamped, polynomial_vector(simd, &ERFC, clamped), clamped);
        let negated = simd.or(simd.bits(exponent), simd.splat_bits(SIGN));
        let far = simd.sub(simd.splat(1.0), Exp::vector(simd, simd.float(negated)));
        let is_near = simd.less(a, simd.splat(ERF_POLYNOMIAL_END));
        with_sign_of_vector(simd, simd.select(is_near, near, far), x)
    }
}

#[inline(always)]
fn polynomial_vector<S: Simd, const N: usize>(simd: S, coefficients: &[f32; N], x: S::F) -> S::F {
    let mut p = simd.splat(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        p = simd.fma(p, x, simd.splat(coefficient));
    }
    p
}

#[inline(always)]
fn power_of_two_vector<S: Simd>(simd: S, n: S::Bits) -> S::F {
    simd.float(simd.to_exponent(simd.add_bits(n, simd.splat_bits(EXPONENT_BIAS))))
}

#[inline(always)]
fn magnitude<S: Simd>(simd: S, x: S::F) -> S::F {
    simd.float(simd.and(simd.bits(x), simd.splat_bits(MAGNITUDE)))
}

#[inline(always)]
fn with_sign_of_vector<S: Simd>(simd: S, magnitude: S::F, x: S::F) -> S::F {
    let sign = simd.and(simd.bits(x), simd.splat_bits(SIGN));
    canonical(simd, x, simd.float(simd.or(simd.bits(magnitude), sign)))
}

/// The result, or the canonical NaN where `x` is a NaN.
#[inline(always)]
fn canonical<S: Simd>(simd: S, x: S::F, result: S::F) -> S::F {
    let nan = simd.float(simd.splat_bits(NAN_BITS));
    simd.select(simd.is_nan(x), nan, result)
}
