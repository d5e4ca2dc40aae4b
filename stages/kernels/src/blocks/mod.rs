//! Quantised weights in panels: blocks of sixteen outputs by 32 or 256 inputs.
//!
//! Invariants:
//! - A packed block holds the numbers of sixteen of the file's blocks, without loss. Inputs stand in fours: four
//!   consecutive inputs of each of the sixteen outputs are 64 bytes, output by output, because every instruction set
//!   multiplies bytes and adds them up by fours.
//! - Formats of four bits keep two fours in one 64-byte vector: the even one in the low half of each byte, the odd one in
//!   the high half. Further bits stand in vectors of their own.
//! - Sums of products of bytes are exact in i32, in any order; only the steps of the chain are rounded.

// A row is an index into several arrays, and closures have no place in vector code.
#![allow(clippy::needless_range_loop)]

use bytemuck::Pod;

use crate::activation_blocks::Activations;
use crate::simd::{LANES, Simd};

mod k4;
mod k6;
mod q4_0;
mod q8_0;

pub(crate) use k4::{Q4K, Q5K};
pub(crate) use k6::Q6K;
pub(crate) use q4_0::Q4_0;
pub(crate) use q8_0::{Q8_0, Q8_OFFSET};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of four inputs of sixteen outputs.
pub(crate) const FOUR: usize = 4 * LANES;

/// One packed block: sixteen outputs by [`Blocks::STEPS`] inputs of a format.
pub(crate) trait Blocks: Pod + Send + Sync {
    /// The inputs that meet it.
    type Activations: Activations;

    /// Inputs.
    const STEPS: usize = Self::Activations::STEPS;

    /// Bytes of one output's block in a file.
    const FILE_BYTES: usize;

    /// Takes output `lane` from its block in a file, which is [`Blocks::FILE_BYTES`] long.
    fn set(&mut self, lane: usize, file: &[u8]);

    /// True if the scales of output `lane` are finite and such as [`Blocks::set`] writes them.
    fn is_sound(&self, lane: usize) -> bool;

    /// The whole numbers of output `lane`, which are [`Blocks::STEPS`].
    fn quants(&self, lane: usize, out: &mut [i8]);

    /// The numbers of output `lane`, with the roundings that the format fixes.
    fn dequantise(&self, lane: usize, out: &mut [f32]);

    /// One step of the chain of output `lane`, with the numbers of a row and their scale: the definition.
    fn advance_scalar(&self, lane: usize, x: &[i8], x_scale: f32, acc: f32) -> f32;

    /// One step of sixteen chains for each of `R` rows. Must be `#[inline(always)]`.
    fn advance<S: Simd, const R: usize>(&self, simd: S, x: &TileOf<Self, R>, acc: [S::F; R]) -> [S::F; R];
}

/// The inputs of `R` rows that meet a block.
pub(crate) type TileOf<B, const R: usize> = <<B as Blocks>::Activations as Activations>::Tile<R>;

/// Asks for part `part` of `PARTS` of the block 256 inputs further on, whether there is one or not. The processor reads
/// ahead too little on its own.
#[inline(always)]
fn prefetch<S: Simd, B: Blocks, const PARTS: usize>(simd: S, block: &B, part: usize) {
    let lines = size_of::<B>().div_ceil(LINE).div_ceil(PARTS);
    let ahead = std::ptr::from_ref(block).wrapping_add(256 / B::STEPS);
    let start = ahead.cast::<u8>().wrapping_add(part * lines * LINE);
    for line in 0..lines {
        simd.prefetch(start.wrapping_add(line * LINE));
    }
}

/// The f16 at the start of `bytes`, as stored.
fn stored_f16(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn widen(stored: u16) -> f32 {
    half::f16::from_bits(stored).to_f32()
}

fn is_finite(stored: u16) -> bool {
    half::f16::from_bits(stored).is_finite()
}

/// Stores the low four bits of `quants` of one output.
fn set_nibbles(vectors: &mut [[u8; FOUR]], lane: usize, quants: &[u8]) {
    let (eights, _) = quants.as_chunks::<8>();
    for (vector, eight) in vectors.iter_mut().zip(eights) {
        for i in 0..4 {
            vector[4 * lane + i] = (eight[i] & 15) | eight[i + 4] << 4;
        }
    }
}

/// What [`set_nibbles`] stored.
fn nibbles(vectors: &[[u8; FOUR]], lane: usize, out: &mut [i8]) {
    let (eights, _) = out.as_chunks_mut::<8>();
    for (vector, eight) in vectors.iter().zip(eights) {
        for i in 0..4 {
            let byte = vector[4 * lane + i];
            eight[i] = (byte & 15).cast_signed();
            eight[i + 4] = (byte >> 4).cast_signed();
        }
    }
}

/// Stores further bits of one output: bits `BITS * f` and up of byte `i` are those of input `4 f + i`.
fn set_upper<const BITS: usize>(vectors: &mut [[u8; FOUR]], lane: usize, upper: &[u8]) {
    for (vector, upper) in vectors.iter_mut().zip(upper.chunks(32 / BITS)) {
        for i in 0..4 {
            let fours = upper.iter().skip(i).step_by(4).enumerate();
            vector[4 * lane + i] = fours.fold(0, |byte, (four, bits)| byte | bits << (BITS * four));
        }
    }
}

/// Adds what [`set_upper`] stored, times 16.
fn add_upper<const BITS: usize>(vectors: &[[u8; FOUR]], lane: usize, out: &mut [i8]) {
    let mask = (1u8 << BITS) - 1;
    for (vector, out) in vectors.iter().zip(out.chunks_mut(32 / BITS)) {
        for (input, out) in out.iter_mut().enumerate() {
            let byte = vector[4 * lane + input % 4];
            *out += (byte >> (BITS * (input / 4)) & mask).cast_signed() << 4;
        }
    }
}

/// The exact sum of products, each with one scale.
fn dot(quants: &[i8], x: &[i8]) -> i32 {
    quants.iter().zip(x).map(|(q, x)| i32::from(*q) * i32::from(*x)).sum()
}
