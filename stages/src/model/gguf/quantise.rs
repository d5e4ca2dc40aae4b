//! Rows of f32 as the blocks of a GGUF file.
//!
//! Purpose: files for tests and measurements. Each block's scales follow from its extremes by one rule; there is no
//! search for better ones, which tools that prepare models for use do.
//!
//! Invariants: a function of the row alone; finite numbers within f16's range give finite blocks. Layouts as in ggml.

use half::{bf16, f16};

use super::TensorKind;

/// How the matrices of a file are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE-754 binary32.
    F32,
    /// IEEE-754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 32 numbers of 8 bits with one scale.
    Q8_0,
    /// 32 numbers of 4 bits with one scale.
    Q4_0,
    /// 256 numbers of 4 bits; eight scales and minima of 6 bits.
    Q4K,
    /// 256 numbers of 5 bits; eight scales and minima of 6 bits.
    Q5K,
    /// 256 numbers of 6 bits; sixteen scales of 8 bits.
    Q6K,
}

impl Encoding {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// As ggml spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// The encoding of this name, in either case.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.name().eq_ignore_ascii_case(name))
    }

    /// Numbers of a block: a row must be whole blocks.
    #[must_use]
    pub fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// What a whole file of it is called by, `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 32,
            Self::Q8_0 => 7,
            Self::Q4_0 => 2,
            Self::Q4K => 14,
            Self::Q5K => 16,
            Self::Q6K => 18,
        }
    }

    /// What the head is written as: the smaller K-quants keep more of it.
    pub(super) fn of_head(self) -> Self {
        match self {
            Self::Q4K | Self::Q5K => Self::Q6K,
            other => other,
        }
    }

    pub(super) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Q8_0 => 8,
            Self::Q4_0 => 2,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
        }
    }

    /// Bytes of a row of `columns` numbers; `None` if they are not whole blocks.
    #[must_use]
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let kind = TensorKind::of(self.code())?;
        columns.is_multiple_of(kind.block).then(|| columns / kind.block * kind.block_bytes)
    }

    /// Appends a row of whole blocks; what is left over is not written.
    pub fn encode(self, row: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(row.iter().flat_map(|value| value.to_le_bytes())),
            Self::F16 => out.extend(row.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
            Self::Bf16 => out.extend(row.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
            Self::Q8_0 => row.as_chunks().0.iter().for_each(|block| q8_0(block, out)),
            Self::Q4_0 => row.as_chunks().0.iter().for_each(|block| q4_0(block, out)),
            Self::Q4K => row.as_chunks().0.iter().for_each(|block| q4_k(block, out)),
            Self::Q5K => row.as_chunks().0.iter().for_each(|block| q5_k(block, out)),
            Self::Q6K => row.as_chunks().0.iter().for_each(|block| q6_k(block, out)),
        }
    }
}

/// The number of the greatest magnitude.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, value| if value.abs() > most.abs() { *value } else { most })
}

/// A ratio of which nothing is asked where there is nothing to divide by.
fn ratio(value: f32, by: f32) -> f32 {
    if by == 0.0 { 0.0 } else { value / by }
}

fn half(value: f32, out: &mut Vec<u8>) -> f32 {
    let half = f16::from_f32(value);
    out.extend(half.to_le_bytes());
    half.to_f32()
}

fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let scale = extreme(block).abs() / 127.0;
    half(scale, out);
    out.extend(block.iter().map(|value| ratio(*value, scale).round().clamp(-127.0, 127.0) as i8 as u8));
}

fn q4_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let scale = extreme(block) / -8.0;
    half(scale, out);
    let quantised = block.map(|value| (ratio(value, scale) + 8.0).round().clamp(0.0, 15.0) as u8);
    let (low, high) = quantised.split_at(16);
    out.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
}

/// Scales and minima of the eight parts of a block, and its numbers from 0 to `most`. Writes the block's head.
fn parts(block: &[f32; 256], most: f32, out: &mut Vec<u8>) -> [u8; 256] {
    let mut scales = [0.0_f32; 8];
    let mut minima = [0.0_f32; 8];
    for ((part, scale), minimum) in block.as_chunks::<32>().0.iter().zip(&mut scales).zip(&mut minima) {
        let (low, high) =
            part.iter().fold((0.0_f32, 0.0_f32), |(low, high), value| (low.min(*value), high.max(*value)));
        (*scale, *minimum) = ((high - low) / most, -low);
    }
    let (scale_max, minimum_max) = (extreme(&scales), extreme(&minima));
    let d = half(scale_max / 63.0, out);
    let d_minimum = half(minimum_max / 63.0, out);
    let six_bits = |value: f32, by: f32| ratio(value, by).round().clamp(0.0, 63.0) as u8;
    let scales = scales.map(|scale| six_bits(scale, d));
    let minima = minima.map(|minimum| six_bits(minimum, d_minimum));
    out.extend(packed_scales(&scales, &minima));
    let mut numbers = [0; 256];
    for (index, (number, value)) in numbers.iter_mut().zip(block).enumerate() {
        let part = |list: &[u8; 8]| f32::from(list.get(index / 32).copied().unwrap_or_default());
        *number = ratio(value + d_minimum * part(&minima), d * part(&scales)).round().clamp(0.0, most) as u8;
    }
    numbers
}

/// Eight scales and eight minima of six bits: the first four of each whole, the others in four bits and the two upper
/// bits of the first ones.
fn packed_scales(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    let (&[s0, s1, s2, s3, s4, s5, s6, s7], &[m0, m1, m2, m3, m4, m5, m6, m7]) = (scales, minima);
    let upper = |whole: u8, of: u8| whole | (of >> 4) << 6;
    let lower = |scale: u8, minimum: u8| (scale & 15) | (minimum & 15) << 4;
    [
        upper(s0, s4),
        upper(s1, s5),
        upper(s2, s6),
        upper(s3, s7),
        upper(m0, m4),
        upper(m1, m5),
        upper(m2, m6),
        upper(m3, m7),
        lower(s4, m4),
        lower(s5, m5),
        lower(s6, m6),
        lower(s7, m7),
    ]
}

/// Four bits of each number: 32 numbers and the 32 after them share bytes.
fn nibbles(numbers: &[u8; 256], out: &mut Vec<u8>) {
    for (low, high) in numbers.as_chunks::<64>().0.iter().map(|numbers| numbers.split_at(32)) {
        out.extend(low.iter().zip(high).map(|(low, high)| (low & 15) | (high & 15) << 4));
    }
}

fn q4_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let numbers = parts(block, 15.0, out);
    nibbles(&numbers, out);
}

fn q5_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let numbers = parts(block, 31.0, out);
    let mut fifth = [0_u8; 32];
    for (part, numbers) in numbers.as_chunks::<32>().0.iter().enumerate() {
        for (bits, number) in fifth.iter_mut().zip(numbers) {
            *bits |= (number >> 4) << part;
        }
    }
    out.extend(fifth);
    nibbles(&numbers, out);
}

fn q6_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let (parts, _) = block.as_chunks::<16>();
    let scales: Vec<f32> = parts.iter().map(|part| extreme(part) / -32.0).collect();
    let d = f16::from_f32(extreme(&scales) / -128.0);
    let scales: Vec<i8> =
        scales.iter().map(|scale| ratio(*scale, d.to_f32()).round().clamp(-128.0, 127.0) as i8).collect();
    let numbers: Vec<u8> = parts
        .iter()
        .zip(&scales)
        .flat_map(|(part, scale)| {
            let scale = d.to_f32() * f32::from(*scale);
            part.iter().map(move |value| (ratio(*value, scale).round().clamp(-32.0, 31.0) + 32.0) as u8)
        })
        .collect();
    let (halves, _) = numbers.as_chunks::<128>();
    let quarters = |half: &[u8; 128]| {
        let (quarters, _) = half.as_chunks::<32>();
        <[[u8; 32]; 4]>::try_from(quarters).unwrap_or([[0; 32]; 4])
    };
    for [one, two, three, four] in halves.iter().map(quarters) {
        let low = |a: &[u8; 32], b: &[u8; 32]| -> Vec<u8> {
            a.iter().zip(b).map(|(a, b)| (a & 15) | (b & 15) << 4).collect()
        };
        out.extend(low(&one, &three));
        out.extend(low(&two, &four));
    }
    for [one, two, three, four] in halves.iter().map(quarters) {
        let upper = one.iter().zip(&two).zip(three.iter().zip(&four));
        out.extend(upper.map(|((a, b), (c, d))| a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6));
    }
    out.extend(scales.iter().map(|scale| *scale as u8));
    out.extend(d.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_block_sizes_are_those_of_the_format() {
        for encoding in Encoding::ALL {
            assert_eq!(Encoding::parse(&encoding.name().to_lowercase()), Some(encoding));
            let kind = TensorKind::of(encoding.code()).unwrap();
            assert_eq!((kind.name, kind.block), (encoding.name(), encoding.block()));
            let mut out = Vec::new();
            encoding.encode(&[0.25; 512], &mut out);
            assert_eq!(Some(out.len()), encoding.row_bytes(512), "{}", encoding.name());
        }
        assert_eq!(Encoding::Q4K.row_bytes(320), None);
    }

    /// The kernels read what is written here, and what they read is near what was meant.
    #[test]
    fn packed_rows_are_near_the_rows_that_were_written() {
        let mut state = 1_u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // Sums of three are nearly normal; each part of a block has a scale and an offset of its own.
        let part = |index: usize| ((index / 16 % 5 + 1) as f32, (index / 32 % 3) as f32 - 1.0);
        let values: Vec<f32> =
            (0..19 * 512).map(|index| (number() + number() + number()) * part(index).0 + part(index).1).collect();
        let energy: f32 = values.iter().map(|value| value * value).sum();
        let bounds = [0.0, 1e-3, 4e-3, 0.01, 0.13, 0.08, 0.04, 0.03];
        for (encoding, bound) in Encoding::ALL.into_iter().zip(bounds) {
            let mut bytes = Vec::new();
            values.chunks(512).for_each(|row| encoding.encode(row, &mut bytes));
            let dtype = TensorKind::of(encoding.code()).unwrap().dtype().unwrap();
            let view = butterfly_kernels::WeightView { dtype, bytes: &bytes, rows: 19, columns: 512 };
            let matrix = butterfly_kernels::Matrix::pack(view).unwrap();
            let mut row = vec![0.0; 512];
            let mut fault = 0.0;
            for (index, values) in values.chunks(512).enumerate() {
                matrix.row(index, &mut row);
                fault += values.iter().zip(&row).map(|(one, other)| (one - other) * (one - other)).sum::<f32>();
            }
            let relative = (fault / energy).sqrt();
            assert!(relative <= bound, "{}: {relative}", encoding.name());
            assert!(relative > bound / 20.0 || bound == 0.0, "{}: {relative}, the bound says nothing", encoding.name());
        }
    }

    #[test]
    fn extremes_of_a_block_are_kept() {
        let mut block = [0.0_f32; 32];
        (block[3], block[17]) = (-8.0, 7.0);
        let mut out = Vec::new();
        Encoding::Q4_0.encode(&block, &mut out);
        assert_eq!(out[..2], f16::from_f32(1.0).to_le_bytes());
        // -8 is 0, zero is 8, 7 is 15.
        assert_eq!((out[2 + 3], out[2 + 1], out[2]), (0x80, 0xf8, 0x88));
        out.clear();
        (block[3], block[17]) = (-127.0, 64.0);
        Encoding::Q8_0.encode(&block, &mut out);
        assert_eq!(out[..2], f16::from_f32(1.0).to_le_bytes());
        assert_eq!((out[2 + 3] as i8, out[2 + 17] as i8, out[2]), (-127, 64, 0));
    }
}
