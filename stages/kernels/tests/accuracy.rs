//! The operations compute what they are named for: agreement with 64-bit arithmetic.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod definition;

use butterfly_kernels::{
    CacheStorage, Dtype, KvCache, Path, Pool, RopeError, RopeScaling, RopeTable, attention, gelu, layer_norm, linear,
    rms_norm, rope, silu_mul,
};
use definition::{Numbers, packed};

fn pool() -> Pool {
    Pool::new(2, Path::detect().unwrap_or(Path::Scalar))
}

fn assert_close(result: &[f32], exact: &[f64], tolerance: f64) {
    assert_eq!(result.len(), exact.len());
    for (index, (result, exact)) in result.iter().zip(exact).enumerate() {
        let error = (f64::from(*result) - exact).abs();
        assert!(error <= tolerance * exact.abs().max(1.0), "element {index}: {result} is not {exact}");
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

#[test]
fn linear_layers() {
    let mut numbers = Numbers(1);
    for (rows, columns, batch) in [(40, 500, 1), (33, 129, 9)] {
        let (matrix, weights) = packed(&numbers.tame(rows * columns), Dtype::Bf16, rows);
        let (bias, x) = (numbers.tame(rows), numbers.tame(batch * columns));
        let mut y = vec![0.0; batch * rows];
        linear(&pool(), &matrix, Some(&bias), &x, &mut y);
        let mut exact = Vec::new();
        for x in wide(&x).chunks(columns) {
            for (weights, bias) in wide(&weights).chunks(columns).zip(&bias) {
                let dot: f64 = weights.iter().zip(x).map(|(w, x)| w * x).sum();
                exact.push(dot + f64::from(*bias));
            }
        }
        assert_close(&y, &exact, 1e-5);
    }
}

#[test]
fn norms() {
    let mut numbers = Numbers(2);
    let width = 77;
    let (x, weight, bias) = (numbers.tame(width), numbers.tame(width), numbers.tame(width));
    let (wide_x, n) = (wide(&x), width as f64);
    let mut out = vec![0.0; width];

    rms_norm(&pool(), &x, &weight, 1e-5, &mut out);
    let mean = wide_x.iter().map(|x| x * x).sum::<f64>() / n;
    let scale = 1.0 / (mean + 1e-5).sqrt();
    let exact: Vec<f64> = wide_x.iter().zip(wide(&weight)).map(|(x, w)| x * scale * w).collect();
    assert_close(&out, &exact, 1e-6);

    layer_norm(&pool(), &x, &weight, &bias, 1e-5, &mut out);
    let mean = wide_x.iter().sum::<f64>() / n;
    let variance = wide_x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    let scale = 1.0 / (variance + 1e-5).sqrt();
    let affine = wide(&weight).into_iter().zip(wide(&bias));
    let exact: Vec<f64> = wide_x.iter().zip(affine).map(|(x, (w, b))| (x - mean) * scale * w + b).collect();
    assert_close(&out, &exact, 1e-6);
}

#[test]
fn gates() {
    let mut numbers = Numbers(3);
    let gate: Vec<f32> = numbers.tame(1000).iter().map(|g| g * 20.0).collect();
    let up = numbers.tame(1000);
    let mut out = vec![0.0; 1000];
    silu_mul(&pool(), &gate, &up, &mut out);
    let exact: Vec<f64> = wide(&gate).iter().zip(wide(&up)).map(|(g, u)| g / (1.0 + libm::exp(-g)) * u).collect();
    assert_close(&out, &exact, 1e-6);

    let mut values = gate.clone();
    gelu(&pool(), &mut values);
    let exact: Vec<f64> = wide(&gate).iter().map(|x| 0.5 * x * (1.0 + libm::erf(x * 0.5f64.sqrt()))).collect();
    assert_close(&values, &exact, 1e-6);
}

#[test]
fn attention_over_a_cache() {
    let mut numbers = Numbers(4);
    let (heads, kv_heads, head_dim, positions, rows) = (6, 2, 20, 50, 7);
    for (storage, tolerance) in [(CacheStorage::F32, 2e-6), (CacheStorage::F16, 2e-3)] {
        let mut cache = KvCache::with_storage(kv_heads, head_dim, positions, storage);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for _ in 0..positions {
            let (key, value) = (numbers.tame(kv_heads * head_dim), numbers.tame(kv_heads * head_dim));
            cache.push(&key, &value).unwrap();
            keys.push(wide(&key));
            values.push(wide(&value));
        }
        let q: Vec<f32> = numbers.tame(rows * heads * head_dim).iter().map(|q| q * 4.0).collect();
        let mut out = vec![0.0; q.len()];
        attention(&pool(), &q, &cache, positions - rows, heads, &mut out);
        let mut exact = Vec::new();
        for (index, q) in wide(&q).chunks(head_dim).enumerate() {
            let (row, head) = (index / heads, index % heads);
            let seen = positions - rows + row + 1;
            let at = head / (heads / kv_heads) * head_dim;
            let score = |key: &Vec<f64>| -> f64 {
                let dot: f64 = q.iter().zip(&key[at..]).map(|(q, k)| q * k).sum();
                libm::exp(dot / (head_dim as f64).sqrt())
            };
            let e: Vec<f64> = keys[..seen].iter().map(score).collect();
            let total: f64 = e.iter().sum();
            for d in 0..head_dim {
                let weighted: f64 = e.iter().zip(&values).map(|(e, v)| e * v[at + d]).sum();
                exact.push(weighted / total);
            }
        }
        assert_close(&out, &exact, tolerance);
    }
}

/// Rotating by a position turns each pair by position × frequency, so dot products depend on distances alone.
#[test]
fn rotations_depend_on_distance() {
    let table = RopeTable::new(32, 10_000.0, 1024, RopeScaling::Default).unwrap();
    assert_eq!((table.head_dim(), table.positions_max(), table.bytes()), (32, 1024, 1024 * 32 * 4));
    let mut numbers = Numbers(5);
    let (a, b) = (numbers.tame(32), numbers.tame(32));
    let dot = |shift: u32| {
        let mut rows = [a.clone(), b.clone()].concat();
        rope(&mut rows, 1, &[shift, shift + 5], &table);
        let (a, b) = rows.split_at(32);
        wide(a).iter().zip(wide(b)).map(|(a, b)| a * b).sum::<f64>()
    };
    for shift in [1, 10, 1000] {
        assert!((dot(shift) - dot(0)).abs() < 1e-5);
    }
}

/// The three ranges of Llama 3's scaling, seen through the angle at position 1.
#[test]
fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
    let (head_dim, theta, factor, original) = (128, 500_000.0, 8.0, 8192.0);
    let scaling = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };
    let table = RopeTable::new(head_dim, theta, 2, scaling).unwrap();
    let mut kinds = [0; 3];
    for i in 0..head_dim / 2 {
        let frequency = libm::pow(theta, -(2.0 * i as f64) / head_dim as f64);
        let turns = original * frequency / std::f64::consts::TAU;
        let (kind, scaled) = match turns {
            t if t > 4.0 => (0, frequency),
            t if t < 1.0 => (1, frequency / factor),
            t => {
                let smooth = (t - 1.0) / 3.0;
                (2, (1.0 - smooth) * frequency / factor + smooth * frequency)
            }
        };
        kinds[kind] += 1;
        let mut x = vec![0.0; head_dim];
        x[i] = 1.0;
        rope(&mut x, 1, &[1], &table);
        assert!((f64::from(x[i]) - scaled.cos()).abs() < 1e-7);
        assert!((f64::from(x[i + head_dim / 2]) - scaled.sin()).abs() < 1e-7);
    }
    assert!(kinds.iter().all(|count| *count > 0), "{kinds:?}");
}

#[test]
fn tables_that_make_no_sense_are_refused() {
    let table = |head_dim, theta, positions, scaling| RopeTable::new(head_dim, theta, positions, scaling).unwrap_err();
    for head_dim in [0, 7] {
        assert_eq!(table(head_dim, 1e4, 8, RopeScaling::Default), RopeError::HeadDim(head_dim));
    }
    for theta in [0.0, -1.0, f64::INFINITY] {
        assert_eq!(table(8, theta, 8, RopeScaling::Default), RopeError::Theta(theta));
    }
    for positions in [usize::MAX, RopeTable::ELEMENTS_MAX / 4 + 1] {
        assert_eq!(table(8, 1e4, positions, RopeScaling::Default), RopeError::TooLarge { positions, head_dim: 8 });
    }
    let linear = RopeScaling::Linear { factor: 0.0 };
    assert_eq!(table(8, 1e4, 8, linear), RopeError::Scaling(linear));
    let crossed =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 4.0, high_freq_factor: 4.0, original_positions: 100 };
    assert_eq!(table(8, 1e4, 8, crossed), RopeError::Scaling(crossed));
}
