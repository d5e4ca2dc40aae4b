//! One small case of every operation, on fixed inputs: for the profile's digest, and for paths to prove themselves.
//!
//! The inputs come from integers alone. Shapes are chosen so that each operation meets a whole block, a partial one and
//! more than one row.

use crate::{
    CacheStorage, Dtype, KvCache, Matrix, Pool, RopeScaling, RopeTable, WeightView, activation, all_finite, attention,
    layer_norm, linear, math, rms_norm, rope, sample, sum,
};

/// What an operation computed, as bits.
pub(crate) struct Output {
    pub(crate) operation: &'static str,
    pub(crate) bits: Vec<u32>,
}

/// What the profile's digest covers: every operation, and draws.
pub(super) fn profile_outputs(pool: &Pool) -> Vec<Output> {
    let (mut source, mut outputs) = (Source(0), Outputs(Vec::new()));
    operations(pool, &mut source, &mut outputs);
    samples(&mut source, &mut outputs);
    outputs.0
}

/// What a path must compute as the definition does: every operation, with tiles of every height, always in the same
/// order and number. Draws are not among them, because they use whichever path was found.
pub(crate) fn path_outputs(pool: &Pool) -> Vec<Output> {
    let (mut source, mut outputs) = (Source(0), Outputs(Vec::new()));
    operations(pool, &mut source, &mut outputs);
    linear_layers(pool, &mut source, &mut outputs, &[5, 6, 12]);
    attentions(pool, &mut source, &mut outputs, 2, &[1, 2, 4]);
    attentions(pool, &mut source, &mut outputs, 6, &[2, 4]);
    outputs.0
}

fn operations(pool: &Pool, source: &mut Source, outputs: &mut Outputs) {
    functions(pool, outputs);
    linear_layers(pool, source, outputs, &[1, 2, 3, 4, 8, 15]);
    norms_and_activations(pool, source, outputs);
    rotations(source, outputs);
    attentions(pool, source, outputs, 6, &[1, 5]);
}

struct Outputs(Vec<Output>);

impl Outputs {
    fn add(&mut self, operation: &'static str, values: &[f32]) {
        self.0.push(Output { operation, bits: values.iter().map(|value| value.to_bits()).collect() });
    }
}

/// SplitMix64.
struct Source(u64);

impl Source {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A multiple of 2^-23 in [-1, 1).
    fn number(&mut self) -> f32 {
        const UNIT: f32 = 1.0 / (1 << 23) as f32;
        (self.next() >> 40) as f32 * UNIT - 1.0
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

/// All signs and exponents, and mantissas that differ from one to the next.
fn functions(pool: &Pool, outputs: &mut Outputs) {
    const STEP: u32 = 0x000f_fedc;
    let inputs: Vec<f32> = (0..u32::MAX / STEP).map(|i| f32::from_bits(i * STEP)).collect();
    type Function = (&'static str, fn(crate::Path, &mut [f32]));
    let functions: [Function; 4] =
        [("exp", math::exp_all), ("tanh", math::tanh_all), ("sigmoid", math::sigmoid_all), ("erf", math::erf_all)];
    for (name, function) in functions {
        let mut values = inputs.clone();
        function(pool.path(), &mut values);
        outputs.add(name, &values);
    }
}

fn linear_layers(pool: &Pool, source: &mut Source, outputs: &mut Outputs, batches: &[usize]) {
    for dtype in Dtype::ALL {
        // Two panels and a part of one, and more than one block of the format.
        let (rows, columns) = (35, if dtype.block_columns() == 1 { 300 } else { 512 });
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => numbers(source, rows * columns, |weight| weight.to_le_bytes().to_vec()),
            // The leading bits of these small multiples of a power of two, in both formats.
            Dtype::F16 => {
                numbers(source, rows * columns, |weight| half::f16::from_f32_const(weight).to_le_bytes().to_vec())
            }
            Dtype::Bf16 => {
                numbers(source, rows * columns, |weight| half::bf16::from_f32_const(weight).to_le_bytes().to_vec())
            }
            Dtype::Q8_0 | Dtype::Q4_0 => blocks(source, dtype, rows * columns, &[0]),
            Dtype::Q4K | Dtype::Q5K => blocks(source, dtype, rows * columns, &[0, 2]),
            Dtype::Q6K => blocks(source, dtype, rows * columns, &[208]),
        };
        let view = WeightView { dtype, bytes: &bytes, rows, columns };
        // Finite weights that fill the shape always pack.
        let Ok(matrix) = Matrix::pack(view) else {
            continue;
        };
        let mut row = vec![0.0; columns];
        matrix.row(rows - 1, &mut row);
        outputs.add("row", &row);
        let bias = source.numbers(rows);
        for &n in batches {
            let x = source.numbers(n * columns);
            let mut y = vec![0.0; n * rows];
            linear(pool, &matrix, Some(&bias), &x, &mut y);
            outputs.add("linear", &y);
        }
    }
}

fn numbers(source: &mut Source, count: usize, store: impl Fn(f32) -> Vec<u8>) -> Vec<u8> {
    source.numbers(count).into_iter().flat_map(store).collect()
}

/// Blocks of any bits, but for the f16 at the offsets given.
fn blocks(source: &mut Source, dtype: Dtype, count: usize, halves: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count / dtype.block_columns() {
        let start = bytes.len();
        bytes.extend((0..dtype.block_bytes()).map(|_| source.next() as u8));
        for half in halves {
            let number = half::f16::from_f32_const(source.number() / 64.0);
            bytes[start + half..][..2].copy_from_slice(&number.to_le_bytes());
        }
    }
    bytes
}

fn norms_and_activations(pool: &Pool, source: &mut Source, outputs: &mut Outputs) {
    let (rows, width, eps) = (2, 75, 1e-5);
    let x = source.numbers(rows * width);
    let weight = source.numbers(width);
    let bias = source.numbers(width);
    let mut out = vec![0.0; x.len()];
    outputs.add("sum", &[sum(pool, &x)]);
    rms_norm(pool, &x, &weight, eps, &mut out);
    outputs.add("rms norm", &out);
    layer_norm(pool, &x, &weight, &bias, eps, &mut out);
    outputs.add("layer norm", &out);

    let gate: Vec<f32> = x.iter().map(|x| x * 8.0).collect();
    let up = source.numbers(gate.len());
    activation::silu_mul(pool, &gate, &up, &mut out);
    outputs.add("silu mul", &out);
    type Activation = (&'static str, fn(&Pool, &mut [f32]));
    let activations: [Activation; 3] =
        [("silu", activation::silu), ("gelu", activation::gelu), ("relu", activation::relu)];
    for (name, activation) in activations {
        let mut values = gate.clone();
        activation(pool, &mut values);
        outputs.add(name, &values);
    }
}

fn rotations(source: &mut Source, outputs: &mut Outputs) {
    let scalings = [
        RopeScaling::Default,
        RopeScaling::Linear { factor: 4.0 },
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 },
    ];
    for scaling in scalings {
        let Ok(table) = RopeTable::new(64, 500_000.0, 4096, scaling) else {
            continue;
        };
        let positions = [0, 1, 2, 3, 77, 1000, 4095];
        let mut x = source.numbers(positions.len() * 2 * 64);
        rope(&mut x, 2, &positions, &table);
        outputs.add("rotation", &x);
    }
}

fn attentions(pool: &Pool, source: &mut Source, outputs: &mut Outputs, heads: usize, batches: &[usize]) {
    let (kv_heads, head_dim, positions) = (2, 24, 45);
    for storage in [CacheStorage::F16, CacheStorage::F32] {
        let mut cache = KvCache::with_storage(kv_heads, head_dim, positions, storage);
        for _ in 0..positions {
            let width = kv_heads * head_dim;
            let pushed = cache.push(&source.numbers(width), &source.numbers(width));
            debug_assert!(pushed.is_ok(), "numbers below 1 are stored");
        }
        for &rows in batches {
            let q: Vec<f32> = source.numbers(rows * heads * head_dim);
            let q: Vec<f32> = q.iter().map(|q| q * 16.0).collect();
            let mut out = vec![0.0; q.len()];
            attention(pool, &q, &cache, positions - rows, heads, &mut out);
            debug_assert!(all_finite(&out));
            outputs.add("attention", &out);
        }
    }
}

fn samples(source: &mut Source, outputs: &mut Outputs) {
    let logits: Vec<f32> = source.numbers(100).iter().map(|l| l * 4.0).collect();
    let mut samplings = vec![sample::Sampling::default()];
    for (top_k, top_p) in [(0, 1.0), (10, 1.0), (0, 0.9), (20, 0.75)] {
        samplings.push(sample::Sampling {
            temperature: 0.8,
            top_k,
            top_p,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(3, 2.5), (99, -1.0)],
        });
    }
    for (choice, sampling) in samplings.iter().enumerate() {
        let key = sample::key(&[7; 32], choice as u32);
        for position in 0..20 {
            let token = sample::sample(&mut logits.clone(), sampling, &[3, 5, 3], &key, position);
            outputs.add("sample", &[token.map_or(-1.0, |token| token as f32)]);
        }
    }
}
