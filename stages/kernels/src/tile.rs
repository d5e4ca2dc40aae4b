//! The chain at the heart of the profile: `acc = fma(w[k], x[k], acc)`, k ascending.
//!
//! Panels hold sixteen outputs side by side and step through k, so a vector path advances sixteen chains at once and
//! never splits one. A tile of several rows and panels only interleaves more chains. Linear layers use it with weights,
//! attention with keys (sixteen positions side by side) and values (sixteen dimensions side by side).

use crate::element::{Format, Step};
use crate::simd::Simd;

/// The most rows that share one pass over a panel: with two registers a row, two for weights and one for the input, six
/// rows fill the sixteen registers of AVX2.
pub(crate) const TILE_ROWS: usize = 6;

/// Rows of a tile where there are registers for more ([`Simd::WIDE`]).
pub(crate) const WIDE_ROWS: usize = 2 * TILE_ROWS;

/// Continues one chain through the steps of a panel, in one lane: the definition.
#[inline(always)]
pub(crate) fn chain_scalar<F: Format>(row: &[f32], panel: &[Step<F::Stored>], lane: usize, start: f32) -> f32 {
    let mut acc = start;
    for (x, step) in row.iter().zip(panel) {
        acc = F::widen(step.0[lane]).mul_add(*x, acc);
    }
    acc
}

/// Continues the chains of `R` rows through `P` panels of equal length, sixteen lanes each. Rows must be as long.
#[inline(always)]
pub(crate) fn chain<S: Simd, F: Format, const R: usize, const P: usize>(
    simd: S,
    rows: [&[f32]; R],
    panels: [&[Step<F::Stored>]; P],
    start: [[S::F; P]; R],
) -> [[S::F; P]; R] {
    // Slices of one visible length, so that no bounds check is left in the loop.
    let steps = panels[0].len();
    let mut rows = rows;
    for row in &mut rows {
        *row = &row[..steps];
    }
    let mut panels = panels;
    for panel in &mut panels {
        *panel = &panel[..steps];
    }

    let mut acc = start;
    for k in 0..steps {
        let mut weights = [simd.splat(0.0); P];
        for p in 0..P {
            weights[p] = F::load(simd, &panels[p][k]);
        }
        for r in 0..R {
            let x = simd.splat(rows[r][k]);
            for p in 0..P {
                acc[r][p] = simd.fma(weights[p], x, acc[r][p]);
            }
        }
    }
    acc
}

/// [`chain`] for one panel, with the inputs of the rows side by side.
#[inline(always)]
pub(crate) fn chain_interleaved<S: Simd, const R: usize>(
    simd: S,
    x: &[[f32; R]],
    panel: &[Step<f32>],
    start: [S::F; R],
) -> [S::F; R] {
    let mut acc = start;
    for (x, step) in x.iter().zip(panel) {
        let weights = simd.load(&step.0);
        for r in 0..R {
            acc[r] = simd.fma(weights, simd.splat(x[r]), acc[r]);
        }
    }
    acc
}

/// Cuts `rows` into tiles, and names each by its first row and its height: as many of [`WIDE_ROWS`] as there are, if
/// `wide`, and the rest into the fewest of at most [`TILE_ROWS`], as equal as can be.
pub(crate) fn tiles(rows: usize, wide: bool) -> impl Iterator<Item = (usize, usize)> {
    let tall = if wide { rows / WIDE_ROWS } else { 0 };
    let rest = rows - tall * WIDE_ROWS;
    let count = rest.div_ceil(TILE_ROWS);
    let talls = (0..tall).map(|tile| (tile * WIDE_ROWS, WIDE_ROWS));
    talls.chain((0..count).map(move |tile| {
        let first = tile * rest / count;
        (rows - rest + first, (tile + 1) * rest / count - first)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once() {
        for (rows, wide) in (0..100).flat_map(|rows| [(rows, false), (rows, true)]) {
            let mut next = 0;
            for (first, height) in tiles(rows, wide) {
                assert_eq!(first, next);
                assert!((1..=TILE_ROWS).contains(&height) || wide && height == WIDE_ROWS);
                next += height;
            }
            assert_eq!(next, rows);
        }
    }
}
