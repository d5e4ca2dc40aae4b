//! Linear layers over weights that are plain numbers.
//!
//! Invariants:
//! - `acc = fma(w[k], x[k], acc)` with k ascending from +0.0. One row and many rows, one thread and many, compute the
//!   same chain.
//! - Few rows read each weight once, straight from its panel; many rows widen a block of a panel once and reuse it while
//!   it is in the first-level cache, then that of the next panel, while their inputs are in the second-level cache. Between
//!   blocks the chains rest in memory, which changes no bit.

use std::ops::Range;

use super::{BLOCK_PANELS, BLOCK_ROWS, Outputs};
use crate::element::{Format, Step};
use crate::pool::{Disjoint, Pool};
use crate::simd::{Block, Kernel, LANES, Simd};
use crate::tile::{TILE_ROWS, WIDE_ROWS, chain, chain_interleaved, chain_scalar, tiles};

/// Panels that one row advances together. A single chain waits for each of its own steps, so one row needs several
/// panels to keep the arithmetic busy.
const ROW_PANELS: usize = 4;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Steps between two requests for memory, at least.
const PIECE_STEPS_MIN: usize = 4;

/// Inputs of a row that are copied at a time, so that what they are copied to stays in the first-level cache.
const COPY_STEPS: usize = 64;

/// What copying one input costs, in multiply-adds.
const COPY_COST: usize = 8;

/// Steps of a panel that are widened at a time: 16 KiB, half of a first-level cache.
const BLOCK_STEPS: usize = 256;

/// At most [`BLOCK_ROWS`] rows of `inputs` numbers, with the panels shared among the pool's threads.
pub(super) fn apply<F: Format>(pool: &Pool, steps: &[Step<F::Stored>], inputs: usize, x: &[f32], out: &Outputs<'_>) {
    let interleaved = if x.len() / inputs > TILE_ROWS { interleave(pool, x, inputs) } else { Vec::new() };
    let work = |panels: Range<usize>| {
        pool.path().run(Chunk::<F> { steps, inputs, x, interleaved: &interleaved, out, panels });
    };
    pool.split(steps.len() / inputs, ROW_PANELS, x.len() * LANES, &work);
}

/// Rows in tiles, one after the other. In a tile the numbers of its rows stand side by side, input by input: apart by the
/// length of a row, which is often a power of two, they would meet in the same few lines of a cache.
fn interleave(pool: &Pool, x: &[f32], inputs: usize) -> Vec<f32> {
    let tiles: Vec<_> = tiles(x.len() / inputs, pool.path().is_wide()).collect();
    let mut interleaved = vec![0.0; x.len()];
    let out = Disjoint::new(&mut interleaved);
    pool.split(tiles.len(), 1, TILE_ROWS * inputs * COPY_COST, &|range: Range<usize>| {
        for &(first, height) in &tiles[range] {
            let place = first * inputs..(first + height) * inputs;
            // SAFETY: tiles have their own rows, and `split` gives out each tile once.
            let out = unsafe { out.part(place.clone()) };
            for (start, out) in (0..).step_by(COPY_STEPS).zip(out.chunks_mut(COPY_STEPS * height)) {
                for (index, row) in x[place.clone()].chunks_exact(inputs).enumerate() {
                    for (out, x) in out.iter_mut().skip(index).step_by(height).zip(&row[start..]) {
                        *out = *x;
                    }
                }
            }
        }
    });
    interleaved
}

/// Some panels of a matrix, applied to some rows. Whoever holds it owns the outputs of those panels.
struct Chunk<'a, F: Format> {
    steps: &'a [Step<F::Stored>],
    inputs: usize,
    x: &'a [f32],
    /// If there are more rows than [`TILE_ROWS`].
    interleaved: &'a [f32],
    out: &'a Outputs<'a>,
    panels: Range<usize>,
}

impl<F: Format> Kernel for Chunk<'_, F> {
    type Output = ();

    fn scalar(self) {
        for panel in self.panels.clone() {
            for row in 0..self.rows() {
                let mut block = [0.0; LANES];
                for (lane, sum) in block.iter_mut().enumerate() {
                    *sum = chain_scalar::<F>(self.row(row), self.panel(panel), lane, 0.0);
                }
                self.write(row, panel, &block);
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        match self.rows() {
            0 => {}
            1 => self.direct::<S, 1, ROW_PANELS>(simd),
            2 => self.direct::<S, 2, 2>(simd),
            3 => self.direct::<S, 3, 2>(simd),
            4 => self.direct::<S, 4, 1>(simd),
            5 => self.direct::<S, 5, 1>(simd),
            TILE_ROWS => self.direct::<S, TILE_ROWS, 1>(simd),
            _ => self.blocked(simd),
        }
    }
}

impl<F: Format> Chunk<'_, F> {
    fn rows(&self) -> usize {
        self.x.len() / self.inputs
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[f32] {
        &self.x[row * self.inputs..][..self.inputs]
    }

    #[inline(always)]
    fn panel(&self, panel: usize) -> &[Step<F::Stored>] {
        &self.steps[panel * self.inputs..][..self.inputs]
    }

    #[inline(always)]
    fn write(&self, row: usize, panel: usize, sums: &Block) {
        // SAFETY: the panel's outputs belong to this chunk alone.
        unsafe { self.out.write(row, panel, sums) }
    }

    /// `R` rows, all that there are, and `P` panels at a time while there are so many.
    #[inline(always)]
    fn direct<S: Simd, const R: usize, const P: usize>(&self, simd: S) {
        let mut panel = self.panels.start;
        while panel + P <= self.panels.end {
            self.direct_tile::<S, R, P>(simd, panel);
            panel += P;
        }
        while panel < self.panels.end {
            self.direct_tile::<S, R, 1>(simd, panel);
            panel += 1;
        }
    }

    #[inline(always)]
    fn direct_tile<S: Simd, const R: usize, const P: usize>(&self, simd: S, first: usize) {
        let mut rows: [&[f32]; R] = [&[]; R];
        for (index, row) in rows.iter_mut().enumerate() {
            *row = self.row(index);
        }
        let mut panels: [&[Step<F::Stored>]; P] = [&[]; P];
        for (index, panel) in panels.iter_mut().enumerate() {
            *panel = self.panel(first + index);
        }
        let zeros = [[simd.splat(0.0); P]; R];
        let sums = chain::<S, F, R, P>(simd, rows, panels, zeros);
        let mut block = [0.0; LANES];
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                simd.store(*sum, &mut block);
                self.write(row, first + panel, &block);
            }
        }
    }

    /// Any number of rows, in tiles, over blocks of widened steps.
    #[inline(always)]
    fn blocked<S: Simd>(&self, simd: S) {
        let (rows, inputs) = (self.rows(), self.inputs);
        let mut widened = [Step([0.0; LANES]); BLOCK_STEPS];
        let mut sums = [[[0.0; LANES]; BLOCK_ROWS]; BLOCK_PANELS];
        let mut panels = self.panels.start..self.panels.start;
        while panels.end < self.panels.end {
            panels = panels.end..self.panels.end.min(panels.end + BLOCK_PANELS);
            for sums in &mut sums {
                sums[..rows].fill([0.0; LANES]);
            }
            for start in (0..inputs).step_by(BLOCK_STEPS) {
                let end = inputs.min(start + BLOCK_STEPS);
                for (panel, sums) in panels.clone().zip(&mut sums) {
                    let steps = &self.panel(panel)[start..end];
                    // The tiles share in asking for what is widened next.
                    let next = match (panel + 1 < panels.end, end < inputs) {
                        (true, _) => (panel + 1) * inputs + start,
                        (false, true) => panels.start * inputs + end,
                        (false, false) => panels.end * inputs,
                    };
                    let mut ahead = self.steps.as_ptr().wrapping_add(next).cast::<u8>();
                    let share = size_of_val(steps).div_ceil(tiles(rows, S::WIDE).count());
                    let block = F::widened(simd, steps, &mut widened);
                    for (first, height) in tiles(rows, S::WIDE) {
                        let tile = BlockTile { first, start, block, ahead, ahead_bytes: share };
                        let sums = &mut sums[first..];
                        match height {
                            1 => self.block_tile::<S, 1>(simd, &tile, sums),
                            2 => self.block_tile::<S, 2>(simd, &tile, sums),
                            3 => self.block_tile::<S, 3>(simd, &tile, sums),
                            4 => self.block_tile::<S, 4>(simd, &tile, sums),
                            5 => self.block_tile::<S, 5>(simd, &tile, sums),
                            WIDE_ROWS if S::WIDE => self.block_tile::<S, WIDE_ROWS>(simd, &tile, sums),
                            _ => self.block_tile::<S, TILE_ROWS>(simd, &tile, sums),
                        }
                        ahead = ahead.wrapping_add(share);
                    }
                }
            }
            for (panel, sums) in panels.clone().zip(&sums) {
                for (row, sums) in sums[..rows].iter().enumerate() {
                    self.write(row, panel, sums);
                }
            }
        }
    }

    /// Continues the chains of `R` rows through one block of one panel.
    #[inline(always)]
    fn block_tile<S: Simd, const R: usize>(&self, simd: S, tile: &BlockTile<'_>, sums: &mut [Block]) {
        let x = self.interleaved[tile.first * self.inputs..][..R * self.inputs].as_chunks::<R>().0;
        let mut acc = [simd.splat(0.0); R];
        for (acc, sum) in acc.iter_mut().zip(&*sums) {
            *acc = simd.load(sum);
        }
        // One line of memory at a time: many at once would only be waited for.
        let pieces = tile.ahead_bytes.div_ceil(LINE).max(1);
        let piece = tile.block.len().div_ceil(pieces).max(PIECE_STEPS_MIN);
        for (index, (block, x)) in tile.block.chunks(piece).zip(x[tile.start..].chunks(piece)).enumerate() {
            simd.prefetch(tile.ahead.wrapping_add(index * LINE));
            acc = chain_interleaved(simd, x, block, acc);
        }
        for (sum, acc) in sums.iter_mut().zip(&acc) {
            simd.store(*acc, sum);
        }
    }
}

/// A block of widened steps of one panel, and the rows that meet it.
struct BlockTile<'a> {
    /// The first row.
    first: usize,
    /// The first step.
    start: usize,
    block: &'a [Step<f32>],
    /// What this tile asks for ahead of its use.
    ahead: *const u8,
    ahead_bytes: usize,
}
