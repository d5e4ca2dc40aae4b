//! exp, tanh, sigmoid and erf: the same bits on every path, and close to the true values.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod definition;

use butterfly_kernels::{Path, math};
use definition::bits;

type Scalar = fn(f32) -> f32;
type Exact = fn(f64) -> f64;
type All = fn(Path, &mut [f32]);

/// Name, scalar definition, whole slices, 64-bit reference, allowed error in units in the last place.
const FUNCTIONS: [(&str, Scalar, All, Exact, f64); 4] = [
    ("exp", math::exp, math::exp_all, libm::exp, 1.0),
    ("tanh", math::tanh, math::tanh_all, libm::tanh, 1.5),
    ("sigmoid", math::sigmoid, math::sigmoid_all, exact_sigmoid, 2.5),
    ("erf", math::erf, math::erf_all, libm::erf, 1.0),
];

fn exact_sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

/// Every 4099th of all 2^32 inputs, and a neighbourhood of each place where a function changes branch.
fn inputs() -> Vec<f32> {
    const STRIDE: usize = 4099;
    const NEAR: u32 = 300;
    let mut inputs: Vec<f32> = (0..=u32::MAX).step_by(STRIDE).map(f32::from_bits).collect();
    let edges = [
        0.0f32,
        1.0,
        0.625,
        4.0,
        88.722_84,
        87.336_55,
        103.278_93,
        103.972_08,
        104.5,
        89.0,
        9.01,
        44.5,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::INFINITY,
    ];
    for edge in edges {
        for sign in [0, 0x8000_0000] {
            let low = edge.to_bits().saturating_sub(NEAR);
            let near = low..=edge.to_bits().saturating_add(NEAR).min(0x7fff_ffff);
            inputs.extend(near.map(|bits| f32::from_bits(bits | sign)));
        }
    }
    inputs
}

#[test]
fn every_path_has_the_scalar_bits() {
    let inputs = inputs();
    for (name, scalar, all, _, _) in FUNCTIONS {
        let expected = bits(&inputs.iter().map(|x| scalar(*x)).collect::<Vec<_>>());
        for path in Path::available() {
            let mut values = inputs.clone();
            all(path, &mut values);
            for ((input, value), expected) in inputs.iter().zip(&values).zip(&expected) {
                assert_eq!(value.to_bits(), *expected, "{name}({input:e}) on {}", path.name());
            }
        }
    }
}

#[test]
fn results_are_close_to_the_true_ones() {
    for (name, scalar, _, exact, allowed) in FUNCTIONS {
        let mut worst = (0.0, 0.0f32);
        for x in inputs().into_iter().filter(|x| !x.is_nan()) {
            let (result, exact) = (scalar(x), exact(f64::from(x)));
            if result.is_infinite() || result == 0.0 {
                // The nearest f32 of the true value, or its neighbour.
                let nearest = exact as f32;
                assert!(result == nearest || nearest.next_up() == result, "{name}({x:e}) = {result:e}");
                continue;
            }
            let error = (f64::from(result) - exact).abs() / unit_in_the_last_place(exact);
            if error > worst.0 {
                worst = (error, x);
            }
        }
        println!("{name}: {:.3} units in the last place, at {:e}", worst.0, worst.1);
        assert!(worst.0 <= allowed, "{name}({:e}) is off by {}", worst.1, worst.0);
    }
}

/// The distance of neighbouring f32 around a value.
fn unit_in_the_last_place(value: f64) -> f64 {
    let exponent = libm::frexp(value).1.max(-125);
    libm::ldexp(1.0, exponent - 24)
}

#[test]
fn special_values() {
    const CANONICAL: u32 = 0x7fc0_0000;
    let nans = [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff];
    for (name, scalar, all, _, _) in FUNCTIONS {
        for nan in nans {
            assert_eq!(scalar(f32::from_bits(nan)).to_bits(), CANONICAL, "{name}");
        }
        for path in Path::available() {
            let mut values = nans.map(f32::from_bits);
            all(path, &mut values);
            assert!(values.iter().all(|v| v.to_bits() == CANONICAL), "{name}");
        }
    }
    let inf = f32::INFINITY;
    let bits_of = |f: Scalar, x: f32| f(x).to_bits();
    for zero in [0.0f32, -0.0] {
        assert_eq!(bits_of(math::exp, zero), 1.0f32.to_bits());
        assert_eq!(bits_of(math::sigmoid, zero), 0.5f32.to_bits());
        assert_eq!(bits_of(math::tanh, zero), zero.to_bits());
        assert_eq!(bits_of(math::erf, zero), zero.to_bits());
    }
    assert_eq!(bits_of(math::exp, inf), inf.to_bits());
    assert_eq!(bits_of(math::exp, -inf), 0);
    assert_eq!(bits_of(math::sigmoid, inf), 1.0f32.to_bits());
    assert_eq!(bits_of(math::sigmoid, -inf), 0);
    for f in [math::tanh, math::erf] {
        assert_eq!((f(inf), f(-inf)), (1.0, -1.0));
    }
}

/// Sampling relies on it: no weight exceeds that of the greatest logit.
#[test]
fn exp_of_nothing_positive_exceeds_one() {
    for bits in (0x8000_0000..=0xff80_0000u32).step_by(127) {
        assert!(math::exp(f32::from_bits(bits)) <= 1.0);
    }
    for bits in 0x8000_0000..0x8010_0000u32 {
        assert!(math::exp(f32::from_bits(bits)) <= 1.0);
    }
    for bits in 0xb300_0000..0xb500_0000u32 {
        assert!(math::exp(f32::from_bits(bits)) <= 1.0);
    }
}
