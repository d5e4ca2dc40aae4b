//! Quantised formats and their linear layers a second time, straight from the bytes of a file.

use butterfly_kernels::Dtype;

use super::Numbers;

/// One block of one row: `scale * s * w - minimum * m` for each part.
pub struct Block {
    pub scale: f32,
    pub minimum: f32,
    pub parts: Vec<Part>,
}

pub struct Part {
    pub s: i32,
    pub m: i32,
    pub weights: Vec<i32>,
}

pub const QUANTISED: [Dtype; 5] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

/// Offsets of the f16 of a block.
fn halves(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::Q4K | Dtype::Q5K => &[0, 2],
        Dtype::Q6K => &[208],
        _ => &[0],
    }
}

/// Rows of blocks of any bits but finite scales, a few of which are extreme.
pub fn random(numbers: &mut Numbers, dtype: Dtype, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count / dtype.block_columns() {
        let start = bytes.len();
        let fill = numbers.word();
        bytes.extend((0..dtype.block_bytes()).map(|_| match fill % 16 {
            // The extremes of every number.
            0 => 0x80,
            1 => 0xff,
            2 => 0,
            _ => numbers.word() as u8,
        }));
        for half in halves(dtype) {
            let scale = match numbers.word() % 8 {
                0 => half::f16::MAX,
                1 => half::f16::MIN_POSITIVE_SUBNORMAL,
                2 => half::f16::NEG_ZERO,
                _ => half::f16::from_f32(numbers.tame(1)[0]),
            };
            bytes[start + half..][..2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

fn f16(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

pub fn decode(dtype: Dtype, bytes: &[u8]) -> Block {
    let word = |byte: u8| i32::from(byte);
    match dtype {
        Dtype::Q8_0 => {
            let weights = bytes[2..].iter().map(|b| i32::from(*b as i8)).collect();
            Block { scale: f16(bytes, 0), minimum: 0.0, parts: vec![Part { s: 1, m: 0, weights }] }
        }
        Dtype::Q4_0 => {
            let weights = (0..32).map(|i| word(bytes[2 + i % 16] >> (i / 16 * 4) & 15) - 8).collect();
            Block { scale: f16(bytes, 0), minimum: 0.0, parts: vec![Part { s: 1, m: 0, weights }] }
        }
        Dtype::Q4K | Dtype::Q5K => {
            let low = if dtype == Dtype::Q4K { 16 } else { 48 };
            let part = |j: usize| {
                let f = &bytes[4..16];
                let (s, m) = if j < 4 {
                    (f[j] & 63, f[j + 4] & 63)
                } else {
                    (f[j + 4] & 15 | (f[j - 4] & 0xc0) >> 2, f[j + 4] >> 4 | (f[j] & 0xc0) >> 2)
                };
                let weight = |i: usize| {
                    let nibble = bytes[low + j / 2 * 32 + i] >> (j % 2 * 4) & 15;
                    let fifth = if dtype == Dtype::Q5K { bytes[16 + i] >> j & 1 } else { 0 };
                    word(nibble + 16 * fifth)
                };
                Part { s: word(s), m: word(m), weights: (0..32).map(weight).collect() }
            };
            Block { scale: f16(bytes, 0), minimum: f16(bytes, 2), parts: (0..8).map(part).collect() }
        }
        Dtype::Q6K => {
            let weight = |k: usize| {
                let (half, run, i) = (k / 128, k % 128 / 32, k % 32);
                let nibble = bytes[64 * half + 32 * (run % 2) + i] >> (run / 2 * 4) & 15;
                let upper = bytes[128 + 32 * half + i] >> (2 * run) & 3;
                word(nibble + 16 * upper) - 32
            };
            let part = |j: usize| Part {
                s: i32::from(bytes[192 + j] as i8),
                m: 0,
                weights: (16 * j..16 * j + 16).map(weight).collect(),
            };
            Block { scale: f16(bytes, 208), minimum: 0.0, parts: (0..16).map(part).collect() }
        }
        _ => unreachable!("a quantised format"),
    }
}

/// The numbers of a row.
pub fn row(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    for bytes in bytes.chunks(dtype.block_bytes()) {
        let block = decode(dtype, bytes);
        for part in &block.parts {
            let (scale, minimum) = (block.scale * part.s as f32, block.minimum * part.m as f32);
            let has_minimum = matches!(dtype, Dtype::Q4K | Dtype::Q5K);
            out.extend(part.weights.iter().map(|w| {
                let product = scale * *w as f32;
                if has_minimum { product - minimum } else { product }
            }));
        }
    }
    out
}

fn quantise(x: &[f32]) -> (f32, Vec<i32>) {
    let scale = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
    if scale < f32::MIN_POSITIVE {
        return (0.0, vec![0; x.len()]);
    }
    (scale, x.iter().map(|x| (x / scale).round_ties_even() as i32).collect())
}

/// `x` and `bytes` are rows of `columns` finite numbers.
pub fn linear(dtype: Dtype, bytes: &[u8], columns: usize, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    let row_bytes = dtype.row_bytes(columns).unwrap();
    for x in x.chunks(columns) {
        for (output, bytes) in bytes.chunks(row_bytes).enumerate() {
            let mut acc = 0.0f32;
            for (bytes, x) in bytes.chunks(dtype.block_bytes()).zip(x.chunks(dtype.block_columns())) {
                let block = decode(dtype, bytes);
                let (d, q) = quantise(x);
                let (mut sum, mut below, mut start) = (0, 0, 0);
                for part in &block.parts {
                    let q = &q[start..start + part.weights.len()];
                    start += q.len();
                    sum += part.s * part.weights.iter().zip(q).map(|(w, q)| w * q).sum::<i32>();
                    below += part.m * q.iter().sum::<i32>();
                }
                acc = (block.scale * d).mul_add(sum as f32, acc);
                if matches!(dtype, Dtype::Q4K | Dtype::Q5K) {
                    acc = (-(block.minimum * d)).mul_add(below as f32, acc);
                }
            }
            y.push(bias.map_or(acc, |bias| acc + bias[output]));
        }
    }
    y
}
