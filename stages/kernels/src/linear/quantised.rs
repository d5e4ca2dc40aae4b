//! Linear layers over quantised weights, which meet inputs rounded to bytes.
//!
//! Invariants:
//! - A step of a chain is one block of weights: its sums of whole numbers are exact, so only the scaling is rounded.
//! - Few rows keep their chains in registers through a whole panel; many rows take a stretch of a panel at a time, tile
//!   by tile, while it is in the first-level cache. Between stretches the chains rest in memory, which changes no bit.

use std::ops::Range;

use super::{BLOCK_ROWS, Outputs};
use crate::blocks::Blocks;
use crate::pool::Pool;
use crate::simd::{Block, Kernel, LANES, Simd};

/// Inputs of a stretch.
const STRETCH_STEPS: usize = 256;

/// Rows of a tile: with two registers a row, as many for weights, and a few for what is between, four fill AVX2.
const TILE_ROWS: usize = 4;

/// At most [`BLOCK_ROWS`] rows of `width` blocks, with the panels shared among the pool's threads.
pub(super) fn apply<B: Blocks>(pool: &Pool, blocks: &[B], width: usize, x: &[B::Activations], out: &Outputs<'_>) {
    let work = |panels: Range<usize>| {
        pool.path().run(Chunk { blocks, width, x, out, panels });
    };
    // Products of bytes cost a third of those of numbers.
    let cost = x.len() * B::STEPS * LANES / 3;
    pool.split(blocks.len() / width, 1, cost, &work);
}

/// Some panels of a matrix, applied to some rows. Whoever holds it owns the outputs of those panels.
struct Chunk<'a, B: Blocks> {
    blocks: &'a [B],
    width: usize,
    x: &'a [B::Activations],
    out: &'a Outputs<'a>,
    panels: Range<usize>,
}

impl<B: Blocks> Kernel for Chunk<'_, B> {
    type Output = ();

    fn scalar(self) {
        for panel in self.panels.clone() {
            for row in 0..self.rows() {
                let mut sums = [[0.0; LANES]];
                self.tile(panel, 0..self.width, row, &mut sums).scalar();
                self.write(row, panel, &sums[0]);
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        // One row, or one tile of rows, passes a whole panel at once.
        let stretch = if self.rows() <= TILE_ROWS { self.width } else { (STRETCH_STEPS / B::STEPS).max(1) };
        for panel in self.panels.clone() {
            let rows = self.rows();
            let mut sums = [[0.0; LANES]; BLOCK_ROWS];
            let sums = &mut sums[..rows];
            for start in (0..self.width).step_by(stretch) {
                let blocks = start..self.width.min(start + stretch);
                let (tiles, rest) = sums.as_chunks_mut::<TILE_ROWS>();
                let mut row = 0;
                for tile in tiles {
                    simd.call(self.tile(panel, blocks.clone(), row, tile));
                    row += TILE_ROWS;
                }
                let (pairs, rest) = rest.as_chunks_mut::<2>();
                for pair in pairs {
                    simd.call(self.tile(panel, blocks.clone(), row, pair));
                    row += 2;
                }
                if let ([last], _) = rest.as_chunks_mut::<1>() {
                    simd.call(self.tile(panel, blocks, row, last));
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                self.write(row, panel, sums);
            }
        }
    }
}

impl<B: Blocks> Chunk<'_, B> {
    fn rows(&self) -> usize {
        self.x.len() / self.width
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[B::Activations] {
        &self.x[row * self.width..][..self.width]
    }

    #[inline(always)]
    fn panel(&self, panel: usize) -> &[B] {
        &self.blocks[panel * self.width..][..self.width]
    }

    #[inline(always)]
    fn write(&self, row: usize, panel: usize, sums: &Block) {
        // SAFETY: the panel's outputs belong to this chunk alone.
        unsafe { self.out.write(row, panel, sums) }
    }

    #[inline(always)]
    fn tile<'a, const R: usize>(
        &'a self,
        panel: usize,
        blocks: Range<usize>,
        row: usize,
        sums: &'a mut [Block; R],
    ) -> Tile<'a, B, R> {
        let rows = std::array::from_fn(|r| &self.row(row + r)[blocks.clone()]);
        Tile { blocks: &self.panel(panel)[blocks], rows, sums }
    }
}

/// Some blocks of a panel and the inputs of `R` rows that meet them.
struct Tile<'a, B: Blocks, const R: usize> {
    blocks: &'a [B],
    rows: [&'a [B::Activations]; R],
    sums: &'a mut [Block; R],
}

impl<B: Blocks, const R: usize> Kernel for Tile<'_, B, R> {
    type Output = ();

    fn scalar(self) {
        for (row, sums) in self.rows.into_iter().zip(self.sums) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let steps = self.blocks.iter().zip(row);
                *sum = steps.fold(*sum, |acc, (block, x)| block.advance_scalar(lane, x, acc));
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let mut acc = [simd.splat(0.0); R];
        for (acc, sum) in acc.iter_mut().zip(&*self.sums) {
            *acc = simd.load(sum);
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let x = std::array::from_fn(|r| &self.rows[r][index]);
            acc = block.advance(simd, x, acc);
        }
        for (sum, acc) in self.sums.iter_mut().zip(acc) {
            simd.store(acc, sum);
        }
    }
}
