//! Linear layers over quantised weights, which meet inputs rounded to bytes.
//!
//! Invariants:
//! - A step of a chain is one block of weights: its sums of whole numbers are exact, so only the scaling is rounded.
//! - Few rows keep their chains in registers through a whole panel; many rows take a stretch of a panel at a time, tile
//!   by tile, while it is in the first-level cache, then that of the next panel, while their inputs are in the
//!   second-level cache. Between stretches the chains rest in memory, which changes no bit.

use std::ops::Range;

use super::{BLOCK_PANELS, BLOCK_ROWS, Outputs};
use crate::activation_blocks::{Rounded, STEPS_MAX, Tile as _};
use crate::blocks::{Blocks, TileOf};
use crate::pool::Pool;
use crate::simd::{Block, Kernel, LANES, Simd};

/// Inputs of a stretch.
const STRETCH_STEPS: usize = 256;

/// Rows of a tile: with two registers a row, as many for weights, and a few for what is between, four fill AVX2.
const TILE_ROWS: usize = 4;

/// Panels that few rows pass together, where blocks are small. Such a pass is bound by memory, which gives more to
/// several streams than to one: half as much again to four. Blocks of 256 are streams of their own length.
const STREAMS: usize = 4;
const STREAM_STEPS_MAX: usize = 32;

/// Rows whose inputs the second-level cache holds, so that each panel can be read to its end.
const CACHED_ROWS: usize = 32;

/// At most [`BLOCK_ROWS`] rows, with the panels shared among the pool's threads.
pub(super) fn apply<B: Blocks>(pool: &Pool, blocks: &[B], x: &Rounded<B::Activations>, out: &Outputs<'_>) {
    let work = |panels: Range<usize>| {
        pool.path().run(Chunk { blocks, x, out, panels });
    };
    // Products of bytes cost a third of those of numbers.
    let cost = x.rows() * x.width * B::STEPS * LANES / 3;
    pool.split(blocks.len() / x.width, STREAMS, cost, &work);
}

/// Some panels of a matrix, applied to some rows. Whoever holds it owns the outputs of those panels.
struct Chunk<'a, B: Blocks> {
    blocks: &'a [B],
    x: &'a Rounded<B::Activations>,
    out: &'a Outputs<'a>,
    panels: Range<usize>,
}

/// How tiles are computed.
trait Run: Copy {
    fn run<K: Kernel<Output = ()>>(self, kernel: K);
}

#[derive(Clone, Copy)]
struct Scalar;

#[derive(Clone, Copy)]
struct Vector<S>(S);

impl Run for Scalar {
    fn run<K: Kernel<Output = ()>>(self, kernel: K) {
        kernel.scalar();
    }
}

impl<S: Simd> Run for Vector<S> {
    #[inline(always)]
    fn run<K: Kernel<Output = ()>>(self, kernel: K) {
        self.0.call(kernel);
    }
}

impl<B: Blocks> Kernel for Chunk<'_, B> {
    const BYTES: bool = true;

    type Output = ();

    fn scalar(self) {
        let mut sums = [[0.0; LANES]; BLOCK_ROWS];
        for panel in self.panels.clone() {
            self.panels::<1>(Scalar, panel..panel + 1, self.x.width, &mut sums);
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let (run, mut panel, end) = (Vector(simd), self.panels.start, self.panels.end);
        if self.x.rows() <= TILE_ROWS {
            let mut sums = [[0.0; LANES]; STREAMS * TILE_ROWS];
            while B::STEPS <= STREAM_STEPS_MAX && panel + STREAMS <= end {
                self.panels::<STREAMS>(run, panel..panel + STREAMS, self.x.width, &mut sums);
                panel += STREAMS;
            }
            while panel < end {
                self.panels::<1>(run, panel..panel + 1, self.x.width, &mut sums);
                panel += 1;
            }
        } else {
            let mut sums = [[0.0; LANES]; BLOCK_PANELS * BLOCK_ROWS];
            let together = if self.x.rows() <= CACHED_ROWS { 1 } else { BLOCK_PANELS };
            while panel < end {
                let next = end.min(panel + together);
                self.panels::<1>(run, panel..next, (STRETCH_STEPS / B::STEPS).max(1), &mut sums);
                panel = next;
            }
        }
    }
}

impl<B: Blocks> Chunk<'_, B> {
    /// All rows through some panels: `stretch` blocks at a time, of `P` panels at a time. `sums` has room for as many.
    #[inline(always)]
    fn panels<const P: usize>(&self, run: impl Run, panels: Range<usize>, stretch: usize, sums: &mut [Block]) {
        let (width, rows) = (self.x.width, self.x.rows());
        let sums = &mut sums.as_chunks_mut().0[..panels.len() / P * rows];
        sums.fill([[0.0; LANES]; P]);
        for start in (0..width).step_by(stretch) {
            let range = start..width.min(start + stretch);
            for (first, sums) in panels.clone().step_by(P).zip(sums.chunks_exact_mut(rows)) {
                let mut blocks: [&[B]; P] = [&[]; P];
                for (blocks, panel) in blocks.iter_mut().zip(first..) {
                    *blocks = &self.blocks[panel * width..][range.clone()];
                }
                let stretch = Stretch { blocks, width, range: range.clone() };
                let rest = stretch.apply(run, &self.x.eights, sums);
                let rest = stretch.apply(run, &self.x.fours, rest);
                let rest = stretch.apply(run, &self.x.pair, rest);
                stretch.apply(run, &self.x.one, rest);
            }
        }
        for (first, sums) in panels.step_by(P).zip(sums.chunks_exact(rows)) {
            for (row, sums) in sums.iter().enumerate() {
                for (panel, sums) in (first..).zip(sums) {
                    // SAFETY: the panel's outputs belong to this chunk alone.
                    unsafe { self.out.write(row, panel, sums) }
                }
            }
        }
    }
}

/// Some blocks of `P` panels.
struct Stretch<'a, B: Blocks, const P: usize> {
    blocks: [&'a [B]; P],
    /// Blocks of a row, and which of them these are.
    width: usize,
    range: Range<usize>,
}

impl<B: Blocks, const P: usize> Stretch<'_, B, P> {
    /// Meets the tiles of `R` rows whose inputs are `x` and whose chains are the first of `sums`. The rest is returned.
    #[inline(always)]
    fn apply<'s, const R: usize>(
        &self,
        run: impl Run,
        x: &[TileOf<B, R>],
        sums: &'s mut [[Block; P]],
    ) -> &'s mut [[Block; P]] {
        let (tiles, rest) = sums.split_at_mut(x.len() / self.width * R);
        for (x, sums) in x.chunks_exact(self.width).zip(tiles.as_chunks_mut().0) {
            run.run(Tile { blocks: self.blocks, x: &x[self.range.clone()], sums });
        }
        rest
    }
}

/// Some blocks of `P` panels and the inputs of `R` rows that meet them.
struct Tile<'a, B: Blocks, const R: usize, const P: usize> {
    blocks: [&'a [B]; P],
    x: &'a [TileOf<B, R>],
    sums: &'a mut [[Block; P]; R],
}

impl<B: Blocks, const R: usize, const P: usize> Kernel for Tile<'_, B, R, P> {
    const BYTES: bool = true;

    type Output = ();

    fn scalar(self) {
        let mut quants = [0; STEPS_MAX];
        for (index, x) in self.x.iter().enumerate() {
            for (row, sums) in self.sums.iter_mut().enumerate() {
                let scale = x.row(row, &mut quants);
                for (blocks, sums) in self.blocks.iter().zip(sums) {
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        *sum = blocks[index].advance_scalar(lane, &quants[..B::STEPS], scale, *sum);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        let mut acc = [[simd.splat(0.0); R]; P];
        for (p, acc) in acc.iter_mut().enumerate() {
            for (acc, sums) in acc.iter_mut().zip(&*self.sums) {
                *acc = simd.load(&sums[p]);
            }
        }
        for (index, x) in self.x.iter().enumerate() {
            for (acc, blocks) in acc.iter_mut().zip(self.blocks) {
                *acc = blocks[index].advance(simd, x, *acc);
            }
        }
        for (p, acc) in acc.iter().enumerate() {
            for (acc, sums) in acc.iter().zip(&mut *self.sums) {
                simd.store(*acc, &mut sums[p]);
            }
        }
    }
}
