//! Linear layers over quantised weights, which meet inputs rounded to bytes.
//!
//! Invariants:
//! - A step of a chain is one block of weights: its sums of whole numbers are exact, so only the scaling is rounded.
//! - Few rows keep their chains in registers through a whole panel; many rows take a stretch of a panel at a time, tile
//!   by tile, while it is in the first-level cache. Between stretches the chains rest in memory, which changes no bit.

use std::ops::Range;

use super::{BLOCK_ROWS, Outputs};
use crate::activation_blocks::{Rounded, STEPS_MAX, Tile as _};
use crate::blocks::{Blocks, TileOf};
use crate::pool::Pool;
use crate::simd::{Block, Kernel, LANES, Simd};

/// Inputs of a stretch.
const STRETCH_STEPS: usize = 256;

/// Rows of a tile: with two registers a row, as many for weights, and a few for what is between, four fill AVX2.
const TILE_ROWS: usize = 4;

/// At most [`BLOCK_ROWS`] rows, with the panels shared among the pool's threads.
pub(super) fn apply<B: Blocks>(pool: &Pool, blocks: &[B], x: &Rounded<B::Activations>, out: &Outputs<'_>) {
    let work = |panels: Range<usize>| {
        pool.path().run(Chunk { blocks, x, out, panels });
    };
    // Products of bytes cost a third of those of numbers.
    let cost = x.rows() * x.width * B::STEPS * LANES / 3;
    pool.split(blocks.len() / x.width, 1, cost, &work);
}

/// Some panels of a matrix, applied to some rows. Whoever holds it owns the outputs of those panels.
struct Chunk<'a, B: Blocks> {
    blocks: &'a [B],
    x: &'a Rounded<B::Activations>,
    out: &'a Outputs<'a>,
    panels: Range<usize>,
}

/// Chains that are not finished, in whole cache lines.
#[repr(align(64))]
struct Sums([Block; BLOCK_ROWS]);

impl<B: Blocks> Kernel for Chunk<'_, B> {
    type Output = ();

    fn scalar(self) {
        for panel in self.panels.clone() {
            self.panel(panel, self.x.width, |tile| tile.scalar(), |tile| tile.scalar(), |tile| tile.scalar());
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        // One row, or one tile of rows, passes a whole panel at once.
        let stretch = if self.x.rows() <= TILE_ROWS { self.x.width } else { (STRETCH_STEPS / B::STEPS).max(1) };
        for panel in self.panels.clone() {
            self.panel(panel, stretch, |tile| simd.call(tile), |tile| simd.call(tile), |tile| simd.call(tile));
        }
    }
}

impl<B: Blocks> Chunk<'_, B> {
    /// All rows through one panel, `stretch` blocks at a time.
    #[inline(always)]
    fn panel(
        &self,
        panel: usize,
        stretch: usize,
        four: impl Fn(Tile<'_, B, 4>),
        pair: impl Fn(Tile<'_, B, 2>),
        one: impl Fn(Tile<'_, B, 1>),
    ) {
        let width = self.x.width;
        let weights = &self.blocks[panel * width..][..width];
        let mut sums = Sums([[0.0; LANES]; BLOCK_ROWS]);
        let sums = &mut sums.0[..self.x.rows()];
        for start in (0..width).step_by(stretch) {
            let stretch = start..width.min(start + stretch);
            let blocks = &weights[stretch.clone()];
            let (fours, rest) = sums.as_chunks_mut::<4>();
            for (x, sums) in self.x.fours.chunks_exact(width).zip(fours) {
                four(Tile { blocks, x: &x[stretch.clone()], sums });
            }
            let (pairs, rest) = rest.as_chunks_mut::<2>();
            for (x, sums) in self.x.pair.chunks_exact(width).zip(pairs) {
                pair(Tile { blocks, x: &x[stretch.clone()], sums });
            }
            for (x, sums) in self.x.one.chunks_exact(width).zip(rest.as_chunks_mut::<1>().0) {
                one(Tile { blocks, x: &x[stretch.clone()], sums });
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: the panel's outputs belong to this chunk alone.
            unsafe { self.out.write(row, panel, sums) }
        }
    }
}

/// Some blocks of a panel and the inputs of `R` rows that meet them.
struct Tile<'a, B: Blocks, const R: usize> {
    blocks: &'a [B],
    x: &'a [TileOf<B, R>],
    sums: &'a mut [Block; R],
}

impl<B: Blocks, const R: usize> Kernel for Tile<'_, B, R> {
    type Output = ();

    fn scalar(self) {
        let mut quants = [0; STEPS_MAX];
        for (block, x) in self.blocks.iter().zip(self.x) {
            for (row, sums) in self.sums.iter_mut().enumerate() {
                let scale = x.row(row, &mut quants);
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = block.advance_scalar(lane, &quants[..B::STEPS], scale, *sum);
                }
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let mut acc = [simd.splat(0.0); R];
        for (acc, sum) in acc.iter_mut().zip(&*self.sums) {
            *acc = simd.load(sum);
        }
        for (block, x) in self.blocks.iter().zip(self.x) {
            acc = block.advance(simd, x, acc);
        }
        for (sum, acc) in self.sums.iter_mut().zip(acc) {
            simd.store(acc, sum);
        }
    }
}
