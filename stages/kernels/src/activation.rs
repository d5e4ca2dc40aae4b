//! Element by element: activation functions, the gate of a gated MLP, the residual addition.
//!
//! Invariant: an element's result depends on that element's operands alone, so nothing about its neighbours, the padding
//! of a vector or the cut between threads can reach it.

use crate::math::{Erf, Sigmoid, Tanh, erf};
use crate::path::Path;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd, padded};

/// What one element of an activation costs, in multiply-adds of a linear layer.
const ELEMENT_COST: usize = 16;

/// Elements of a chunk are dealt in stretches of this many, so that threads do not write the same cache line.
const STRETCH: usize = 64;

/// A function of one number, as scalar definition and vector code.
pub(crate) trait Map: Sync {
    fn scalar(x: f32) -> f32;

    /// Must be `#[inline(always)]`.
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F;
}

/// Applies a function to each value, on the calling thread.
pub(crate) fn map<M: Map>(path: Path, values: &mut [f32]) {
    struct Each<'a, M>(&'a mut [f32], std::marker::PhantomData<M>);

    impl<M: Map> Kernel for Each<'_, M> {
        type Output = ();

        fn scalar(self) {
            for value in self.0 {
                *value = M::scalar(*value);
            }
        }

        #[inline(always)]
        fn vector<S: Simd>(self, simd: S) {
            let (blocks, rest) = self.0.as_chunks_mut::<LANES>();
            for block in blocks {
                let result = M::vector(simd, simd.load(block));
                simd.store(result, block);
            }
            if !rest.is_empty() {
                let mut block = padded(rest);
                let result = M::vector(simd, simd.load(&block));
                simd.store(result, &mut block);
                rest.copy_from_slice(&block[..rest.len()]);
            }
        }
    }

    path.run(Each::<M>(values, std::marker::PhantomData));
}

/// [`map`], shared among the pool's threads.
fn map_shared<M: Map>(pool: &Pool, values: &mut [f32]) {
    let whole = values.len() / STRETCH * STRETCH;
    let (stretches, rest) = values.split_at_mut(whole);
    pool.split_rows(stretches, STRETCH, STRETCH * ELEMENT_COST, &|_, part| {
        map::<M>(pool.path(), part);
    });
    map::<M>(pool.path(), rest);
}

/// `tanh(x)` ([`math::tanh`](crate::math::tanh)), in place.
pub fn tanh(pool: &Pool, x: &mut [f32]) {
    map_shared::<Tanh>(pool, x);
}

/// `1 / (1 + e^-x)` ([`math::sigmoid`](crate::math::sigmoid)), in place.
pub fn sigmoid(pool: &Pool, x: &mut [f32]) {
    map_shared::<Sigmoid>(pool, x);
}

/// `x · sigmoid(x)`, in place.
pub fn silu(pool: &Pool, x: &mut [f32]) {
    map_shared::<Silu>(pool, x);
}

/// `(0.5 · x) · (1 + erf(x · √½))`, in place.
pub fn gelu(pool: &Pool, x: &mut [f32]) {
    map_shared::<Gelu>(pool, x);
}

/// `x` where it is positive, else +0.0; a NaN stays one. In place.
pub fn relu(pool: &Pool, x: &mut [f32]) {
    map_shared::<Relu>(pool, x);
}

/// `(gate · sigmoid(gate)) · up`, to `out`. All three have one shape.
///
/// # Panics
/// If the shapes differ.
pub fn silu_mul(pool: &Pool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up have one shape");
    assert_eq!(gate.len(), out.len(), "gate and out have one shape");
    let whole = out.len() / STRETCH * STRETCH;
    let (stretches, rest) = out.split_at_mut(whole);
    pool.split_rows(stretches, STRETCH, STRETCH * ELEMENT_COST, &|first, out| {
        let range = first * STRETCH..first * STRETCH + out.len();
        let (gate, up) = (&gate[range.clone()], &up[range]);
        pool.path().run(SiluMul { gate, up, out });
    });
    pool.path().run(SiluMul { gate: &gate[whole..], up: &up[whole..], out: rest });
}

/// `x + y`, to `x`.
///
/// # Panics
/// If the shapes differ.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "both operands have one shape");
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

struct Silu;
struct Gelu;
struct Relu;

impl Map for Silu {
    fn scalar(x: f32) -> f32 {
        x * crate::math::sigmoid(x)
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        simd.mul(x, Sigmoid::vector(simd, x))
    }
}

impl Map for Gelu {
    fn scalar(x: f32) -> f32 {
        (0.5 * x) * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let scaled = simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
        let gate = simd.add(simd.splat(1.0), Erf::vector(simd, scaled));
        simd.mul(simd.mul(simd.splat(0.5), x), gate)
    }
}

impl Map for Relu {
    fn scalar(x: f32) -> f32 {
        if x > 0.0 || x.is_nan() { x } else { 0.0 }
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, x: S::F) -> S::F {
        let zero = simd.splat(0.0);
        let positive = simd.select(simd.less(zero, x), x, zero);
        simd.select(simd.is_nan(x), x, positive)
    }
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    fn scalar(self) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = Silu::scalar(*gate) * up;
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let (gates, gate_rest) = self.gate.as_chunks::<LANES>();
        let (ups, up_rest) = self.up.as_chunks::<LANES>();
        let (outs, out_rest) = self.out.as_chunks_mut::<LANES>();
        for ((out, gate), up) in outs.iter_mut().zip(gates).zip(ups) {
            let gated = Silu::vector(simd, simd.load(gate));
            simd.store(simd.mul(gated, simd.load(up)), out);
        }
        if !out_rest.is_empty() {
            let gated = Silu::vector(simd, simd.load(&padded(gate_rest)));
            let mut block = padded(out_rest);
            simd.store(simd.mul(gated, simd.load(&padded(up_rest))), &mut block);
            out_rest.copy_from_slice(&block[..out_rest.len()]);
        }
    }
}
