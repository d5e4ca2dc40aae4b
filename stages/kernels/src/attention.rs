//! Attention of rows over a cache: causal, or of every row over everything.
//!
//! Invariants, for each row and head:
//! - Queries are multiplied by f32(1 / √head_dim); a score is one chain over the head's dimensions, ascending.
//! - `e = exp(score - max)` with the exact maximum of the whole row, and their sum in sixteen virtual lanes.
//! - An output is one chain over positions, ascending, of unnormalised e times values, then divided by the sum of e. It
//!   is never split over positions.
//!
//! Query heads that share a key head, and neighbouring rows, pass over the cache together; that interleaves chains and
//! changes none.

use std::ops::Range;

use crate::activation::Map;
use crate::cache::{KvCache, PAGE, Page, Pages};
use crate::element::{Format, Step};
use crate::lanes::{fold_vector, max_scalar, max_vector, sum_scalar};
use crate::math::{Exp, exp};
use crate::pool::{Disjoint, Pool};
use crate::simd::{Kernel, LANES, Simd};
use crate::tile::{TILE_ROWS, chain, chain_scalar, tiles};

/// Attention of `q` `[n, heads, head_dim]` over `cache`, to `out` of the same shape. Row i stands at position
/// `first_position + i` and attends to the positions up to and including its own, which the cache must hold. Query head
/// h reads key head `h / (heads / kv_heads)`.
///
/// # Panics
/// If the shapes do not fit, `heads` is not a multiple of the cache's heads, or the cache lacks a position.
pub fn attention(pool: &Pool, q: &[f32], cache: &KvCache, first_position: usize, heads: usize, out: &mut [f32]) {
    let rows = checked_rows(q, cache, heads, out);
    assert!(
        first_position + rows <= cache.len(),
        "{rows} rows from position {first_position} over a cache of {}",
        cache.len()
    );
    over(pool, q, cache, Reach::Causal { first_position }, heads, out);
}

/// Attention of `q` `[n, heads, head_dim]` over `cache`, to `out` of the same shape, where each row attends to every
/// position that the cache holds. Query head h reads key head `h / (heads / kv_heads)`.
///
/// # Panics
/// If the shapes do not fit, `heads` is not a multiple of the cache's heads, or there are rows and no position.
pub fn attention_bidirectional(pool: &Pool, q: &[f32], cache: &KvCache, heads: usize, out: &mut [f32]) {
    let rows = checked_rows(q, cache, heads, out);
    assert!(rows == 0 || !cache.is_empty(), "{rows} rows over an empty cache");
    over(pool, q, cache, Reach::All { positions: cache.len() }, heads, out);
}

/// The rows of `q`, if its shape and that of `out` fit the cache.
fn checked_rows(q: &[f32], cache: &KvCache, heads: usize, out: &[f32]) -> usize {
    let head_dim = cache.head_dim();
    assert!(
        heads > 0 && heads.is_multiple_of(cache.kv_heads()),
        "{heads} query heads cannot share {} key heads",
        cache.kv_heads()
    );
    let rows = q.len() / (heads * head_dim);
    assert_eq!(q.len(), rows * heads * head_dim, "q is rows of {heads} heads of {head_dim}");
    assert_eq!(q.len(), out.len(), "q and out have one shape");
    rows
}

/// Which positions a row attends to.
#[derive(Clone, Copy)]
enum Reach {
    /// Row i stands at position `first_position + i`, and attends up to there.
    Causal { first_position: usize },
    /// All of them.
    All { positions: usize },
}

impl Reach {
    /// How many positions a row attends to, from the first one on.
    fn positions(self, row: usize) -> usize {
        match self {
            Reach::Causal { first_position } => first_position + row + 1,
            Reach::All { positions } => positions,
        }
    }
}

fn over(pool: &Pool, q: &[f32], cache: &KvCache, reach: Reach, heads: usize, out: &mut [f32]) {
    match cache.pages() {
        Pages::F16(pages) => share(pool, pages, cache, q, reach, heads, out),
        Pages::F32(pages) => share(pool, pages, cache, q, reach, heads, out),
    }
}

/// Deals tiles of queries that share a key head to the pool's threads.
fn share<F: Format>(
    pool: &Pool,
    pages: &[Page<F>],
    cache: &KvCache,
    q: &[f32],
    reach: Reach,
    heads: usize,
    out: &mut [f32],
) {
    let head_dim = cache.head_dim();
    let group = heads / cache.kv_heads();
    let rows = q.len() / (heads * head_dim);
    // Queries of one key head, row by row, and within a row head by head: neighbours attend to nearly the same positions.
    let tiles: Vec<(usize, usize)> = tiles(rows * group, false).collect();
    let out = Disjoint::new(out);
    let cost = TILE_ROWS * 2 * head_dim * reach.positions(rows);
    pool.split(cache.kv_heads() * tiles.len(), 1, cost, &|range: Range<usize>| {
        for index in range {
            let (first, height) = tiles[index % tiles.len()];
            pool.path().run(Tile {
                pages,
                kv_head: index / tiles.len(),
                group,
                heads,
                head_dim,
                reach,
                queries: first..first + height,
                q,
                out: &out,
            });
        }
    });
}

/// At most [`TILE_ROWS`] queries of one key head. Whoever holds it owns their outputs.
struct Tile<'a, F: Format> {
    pages: &'a [Page<F>],
    kv_head: usize,
    /// Query heads of a key head.
    group: usize,
    heads: usize,
    head_dim: usize,
    reach: Reach,
    /// Query r is head `r % group` of the key head's, in row `r / group`.
    queries: Range<usize>,
    q: &'a [f32],
    out: &'a Disjoint<'a, f32>,
}

impl<F: Format> Kernel for Tile<'_, F> {
    type Output = ();

    fn scalar(self) {
        for query in self.queries.clone() {
            let scaled = self.scaled(query);
            let mut weights: Vec<f32> = (0..self.positions(query))
                .map(|position| {
                    let keys = self.pages[position / PAGE].keys(self.kv_head, self.head_dim);
                    chain_scalar::<F>(&scaled, keys, position % PAGE, 0.0)
                })
                .collect();
            let max = max_scalar(&weights);
            for weight in &mut weights {
                *weight = exp(*weight - max);
            }
            let sum = sum_scalar(weights.iter().copied());
            for (dimension, out) in self.out(query).iter_mut().enumerate() {
                let (group, lane) = (dimension / LANES, dimension % LANES);
                let mut acc = 0.0;
                for (page, weights) in self.pages.iter().zip(weights.chunks(PAGE)) {
                    let values = page.values(self.kv_head, self.head_dim, group);
                    acc = chain_scalar::<F>(weights, values, lane, acc);
                }
                *out = acc / sum;
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S) {
        match self.queries.len() {
            1 => self.tile::<S, 1, 4>(simd),
            2 => self.tile::<S, 2, 2>(simd),
            3 => self.tile::<S, 3, 2>(simd),
            4 => self.tile::<S, 4, 1>(simd),
            5 => self.tile::<S, 5, 1>(simd),
            _ => self.tile::<S, TILE_ROWS, 1>(simd),
        }
    }
}

impl<F: Format> Tile<'_, F> {
    /// Where a query's head lies in `q` and `out`.
    fn range(&self, query: usize) -> Range<usize> {
        let row = query / self.group;
        let head = self.kv_head * self.group + query % self.group;
        let start = (row * self.heads + head) * self.head_dim;
        start..start + self.head_dim
    }

    fn scaled(&self, query: usize) -> Vec<f32> {
        let scale = (1.0 / (self.head_dim as f64).sqrt()) as f32;
        let q = &self.q[self.range(query)];
        q.iter().map(|element| element * scale).collect()
    }

    /// Positions a query attends to.
    fn positions(&self, query: usize) -> usize {
        self.reach.positions(query / self.group)
    }

    // The outputs are disjoint even though the tile is shared with the kernel's helpers.
    #[allow(clippy::mut_from_ref)]
    fn out(&self, query: usize) -> &mut [f32] {
        // SAFETY: a query belongs to this tile alone, and the tile holds one part at a time.
        unsafe { self.out.part(self.range(query)) }
    }

    /// `R` queries, all of the tile, with `P` panels at a time while there are so many.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const P: usize>(self, simd: S) {
        let first = self.queries.start;
        let longest = self.positions(first + R - 1);
        let stride = longest.next_multiple_of(PAGE);
        let mut weights = vec![0.0; R * stride];
        self.scores::<S, R, P>(simd, &mut weights, stride);

        let mut sums = [0.0; R];
        for (index, sum) in sums.iter_mut().enumerate() {
            let positions = self.positions(first + index);
            let row = &mut weights[index * stride..][..positions.next_multiple_of(PAGE)];
            *sum = exponentials(simd, row, positions);
        }

        let groups = self.head_dim.div_ceil(LANES);
        let mut group = 0;
        while group + P <= groups {
            self.values::<S, R, P>(simd, &weights, stride, group, &sums);
            group += P;
        }
        while group < groups {
            self.values::<S, R, 1>(simd, &weights, stride, group, &sums);
            group += 1;
        }
    }

    /// Scores of all positions in the pages that the longest query attends to.
    #[inline(always)]
    fn scores<S: Simd, const R: usize, const P: usize>(&self, simd: S, scores: &mut [f32], stride: usize) {
        let queries: [Vec<f32>; R] = std::array::from_fn(|index| self.scaled(self.queries.start + index));
        let pages = stride / PAGE;
        let mut page = 0;
        while page + P <= pages {
            self.score_pages::<S, R, P>(simd, &queries, page, scores, stride);
            page += P;
        }
        while page < pages {
            self.score_pages::<S, R, 1>(simd, &queries, page, scores, stride);
            page += 1;
        }
    }

    #[inline(always)]
    fn score_pages<S: Simd, const R: usize, const P: usize>(
        &self,
        simd: S,
        queries: &[Vec<f32>; R],
        page: usize,
        scores: &mut [f32],
        stride: usize,
    ) {
        let mut rows: [&[f32]; R] = [&[]; R];
        for (row, query) in rows.iter_mut().zip(queries) {
            *row = query;
        }
        let mut panels: [&[Step<F::Stored>]; P] = [&[]; P];
        for (index, panel) in panels.iter_mut().enumerate() {
            *panel = self.pages[page + index].keys(self.kv_head, self.head_dim);
        }
        let zeros = [[simd.splat(0.0); P]; R];
        let acc = chain::<S, F, R, P>(simd, rows, panels, zeros);
        for (row, acc) in scores.chunks_exact_mut(stride).zip(&acc) {
            let blocks = row[page * PAGE..].as_chunks_mut::<LANES>().0;
            for (block, acc) in blocks.iter_mut().zip(acc) {
                simd.store(*acc, block);
            }
        }
    }

    /// Outputs of `P` groups of sixteen dimensions, from `group` on.
    #[inline(always)]
    fn values<S: Simd, const R: usize, const P: usize>(
        &self,
        simd: S,
        weights: &[f32],
        stride: usize,
        group: usize,
        sums: &[f32; R],
    ) {
        let first = self.queries.start;
        // The first query attends to the fewest positions. Up to the last whole page of those all go together.
        let shared_pages = self.positions(first) / PAGE;
        let mut acc = [[simd.splat(0.0); P]; R];
        for page in 0..shared_pages {
            let mut rows: [&[f32]; R] = [&[]; R];
            for (index, row) in rows.iter_mut().enumerate() {
                *row = &weights[index * stride + page * PAGE..][..PAGE];
            }
            acc = chain::<S, F, R, P>(simd, rows, self.value_panels(page, group, PAGE), acc);
        }
        for index in 0..R {
            let positions = self.positions(first + index);
            let row = &weights[index * stride..][..positions];
            let mut own = [acc[index]];
            for page in shared_pages..positions.div_ceil(PAGE) {
                let start = page * PAGE;
                let steps = PAGE.min(positions - start);
                let panels = self.value_panels::<P>(page, group, steps);
                own = chain::<S, F, 1, P>(simd, [&row[start..]], panels, own);
            }
            let sum = simd.splat(sums[index]);
            let out = &mut self.out(first + index)[group * LANES..];
            for (out, acc) in out.chunks_mut(LANES).zip(own[0]) {
                let mut block = [0.0; LANES];
                simd.store(simd.div(acc, sum), &mut block);
                out.copy_from_slice(&block[..out.len()]);
            }
        }
    }

    #[inline(always)]
    fn value_panels<const P: usize>(&self, page: usize, group: usize, steps: usize) -> [&[Step<F::Stored>]; P] {
        let mut panels: [&[Step<F::Stored>]; P] = [&[]; P];
        for (index, panel) in panels.iter_mut().enumerate() {
            let values = self.pages[page].values(self.kv_head, self.head_dim, group + index);
            *panel = &values[..steps];
        }
        panels
    }
}

/// Turns scores into exp(score - max) and returns their sum. Only the first `positions` count; the rest of the last
/// block becomes +0.0.
#[inline(always)]
fn exponentials<S: Simd>(simd: S, scores: &mut [f32], positions: usize) -> f32 {
    let max = simd.splat(max_vector(simd, &scores[..positions]));
    for block in scores.as_chunks_mut::<LANES>().0 {
        let e = Exp::vector(simd, simd.sub(simd.load(block), max));
        simd.store(e, block);
    }
    scores[positions..].fill(0.0);
    let mut lanes = simd.splat(0.0);
    for block in scores.as_chunks::<LANES>().0 {
        lanes = simd.add(lanes, simd.load(block));
    }
    fold_vector(simd, lanes)
}
