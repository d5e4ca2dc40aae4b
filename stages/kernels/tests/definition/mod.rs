//! The profile written a second time, as plainly as possible and without the crate's internals, for tests to compare
//! with; and the shapes and numbers they compare on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub, dead_code)]

pub mod blocks;

use butterfly_kernels::{Dtype, Matrix, Path, Pool, WeightView, math};
use proptest::prelude::*;

/// `usual` random cases of each property, or as many as `PROPTEST_CASES` says, for where instructions are emulated.
pub fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Pools of every path of this machine with 1, 2 and 3 threads.
pub fn pools() -> Vec<Pool> {
    let paths = Path::available().into_iter();
    paths.flat_map(|path| (1..4).map(move |threads| Pool::new(threads, path))).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A generator of test numbers from a seed (SplitMix64): proptest draws shapes and seeds, not millions of numbers.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.word() % limit as u64) as usize
    }

    /// Mostly ordinary numbers, with zeros of both signs, subnormals and a wide spread of exponents among them.
    pub fn wild(&mut self) -> f32 {
        let sign = if self.word().is_multiple_of(2) { 1.0 } else { -1.0 };
        let unit = (self.word() >> 40) as f32 / (1u64 << 24) as f32;
        match self.word() % 16 {
            0 => 0.0 * sign,
            1 => f32::from_bits(self.word() as u32 & 0x007f_ffff) * sign,
            2 => unit * 1e-30 * sign,
            3 => unit * 1e4 * sign,
            _ => unit * sign,
        }
    }

    pub fn wilds(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.wild()).collect()
    }

    /// In [-1, 1).
    pub fn tame(&mut self, count: usize) -> Vec<f32> {
        let unit = |word: u64| (word >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..count).map(|_| unit(self.word())).collect()
    }
}

/// Formats of plain numbers.
pub fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)]
}

/// Stores numbers in a format, and says what the stored numbers are.
pub fn stored(values: &[f32], dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut exact = Vec::new();
    for value in values {
        match dtype {
            Dtype::F32 => {
                bytes.extend(value.to_le_bytes());
                exact.push(*value);
            }
            Dtype::F16 => {
                let stored = half::f16::from_f32(*value);
                bytes.extend(stored.to_le_bytes());
                exact.push(stored.to_f32());
            }
            Dtype::Bf16 => {
                let stored = half::bf16::from_f32(*value);
                bytes.extend(stored.to_le_bytes());
                exact.push(stored.to_f32());
            }
            _ => unreachable!("a format of plain numbers"),
        }
    }
    (bytes, exact)
}

pub fn packed(values: &[f32], dtype: Dtype, rows: usize) -> (Matrix, Vec<f32>) {
    let (bytes, exact) = stored(values, dtype);
    let matrix = Matrix::pack(WeightView { dtype, bytes: &bytes, rows, columns: values.len() / rows });
    (matrix.unwrap(), exact)
}

/// `acc = fma(a, b, acc)` from +0.0.
pub fn chain(pairs: impl Iterator<Item = (f32, f32)>) -> f32 {
    pairs.fold(0.0, |acc, (a, b)| a.mul_add(b, acc))
}

pub fn linear(weights: &[f32], columns: usize, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks(columns) {
        for (output, weights) in weights.chunks(columns).enumerate() {
            let acc = chain(weights.iter().copied().zip(x.iter().copied()));
            y.push(bias.map_or(acc, |bias| acc + bias[output]));
        }
    }
    y
}

pub fn sum(values: &[f32]) -> f32 {
    let lane = |j: usize| values.iter().skip(j).step_by(16).fold(0.0, |a, b| a + b);
    let sixteen: Vec<f32> = (0..16).map(lane).collect();
    let halve = |lanes: Vec<f32>| -> Vec<f32> {
        let (low, high) = lanes.split_at(lanes.len() / 2);
        low.iter().zip(high).map(|(a, b)| a + b).collect()
    };
    halve(halve(halve(halve(sixteen))))[0]
}

pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let squares: Vec<f32> = x.iter().map(|x| x * x).collect();
    let inv = 1.0 / (sum(&squares) / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inv * w).collect()
}

pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mean = sum(x) / x.len() as f32;
    let squares: Vec<f32> = x.iter().map(|x| (x - mean) * (x - mean)).collect();
    let inv = 1.0 / (sum(&squares) / x.len() as f32 + eps).sqrt();
    let scaled = x.iter().zip(weight).map(|(x, w)| (x - mean) * inv * w);
    scaled.zip(bias).map(|(x, b)| x + b).collect()
}

/// One query head over `keys` and `values`, which are rows of `q.len()` numbers, one for each position attended to.
pub fn attention(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f32> {
    let scale = (1.0 / (q.len() as f64).sqrt()) as f32;
    let scores: Vec<f32> = keys.iter().map(|key| chain(key.iter().zip(q).map(|(k, q)| (*k, q * scale)))).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f32> = scores.iter().map(|score| math::exp(score - max)).collect();
    let total = sum(&e);
    (0..q.len()).map(|d| chain(values.iter().zip(&e).map(|(v, e)| (v[d], *e))) / total).collect()
}
