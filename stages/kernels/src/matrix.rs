//! Weight matrices, packed for the chain.
//!
//! Invariants:
//! - Outputs stand in panels of sixteen, and a panel steps through the inputs, so decoding streams the weights once, in
//!   order. Missing outputs of the last panel are zeros that are computed and never written.
//! - Numbers keep their stored format; they widen exactly when they are used. None of them is a NaN or an infinity.

use crate::element::{Bf16, Dtype, F16, F32, Format, Step};
use crate::simd::LANES;

/// A matrix as a weight file holds it: row-major, one row for each output, little-endian. Alignment does not matter.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// Format of the numbers.
    pub dtype: Dtype,
    /// `rows * columns` numbers.
    pub bytes: &'a [u8],
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
}

/// Why weights cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// The shape has no elements.
    #[error("a matrix of {rows} rows and {columns} columns is empty")]
    Empty {
        /// Outputs.
        rows: usize,
        /// Inputs.
        columns: usize,
    },
    /// The bytes are not those of the shape.
    #[error("a {rows} x {columns} matrix of {dtype:?} is not {found} bytes long")]
    Length {
        /// Format of the numbers.
        dtype: Dtype,
        /// Outputs.
        rows: usize,
        /// Inputs.
        columns: usize,
        /// Bytes given.
        found: usize,
    },
    /// A weight is a NaN or an infinity.
    #[error("the weight at row {row}, column {column} is not finite")]
    NotFinite {
        /// Output of the first such weight, in row-major order.
        row: usize,
        /// Its input.
        column: usize,
    },
}

/// A weight matrix `[rows, columns]`, packed. It maps `columns` inputs to `rows` outputs.
pub struct Matrix {
    rows: usize,
    columns: usize,
    panels: Panels,
}

pub(crate) enum Panels {
    F32(Vec<Step<f32>>),
    F16(Vec<Step<u16>>),
    Bf16(Vec<Step<u16>>),
}

impl Matrix {
    /// Packs weights, copying them once.
    ///
    /// # Errors
    /// If the shape is empty, does not fit the bytes, or a weight is not finite.
    pub fn pack(view: WeightView<'_>) -> Result<Matrix, PackError> {
        let WeightView { dtype, bytes, rows, columns } = view;
        if rows == 0 || columns == 0 {
            return Err(PackError::Empty { rows, columns });
        }
        let length = rows.checked_mul(columns).and_then(|numbers| numbers.checked_mul(dtype.size_bytes()));
        if length != Some(bytes.len()) {
            return Err(PackError::Length { dtype, rows, columns, found: bytes.len() });
        }
        let panels = match dtype {
            Dtype::F32 => Panels::F32(pack::<F32>(bytes, columns)?),
            Dtype::F16 => Panels::F16(pack::<F16>(bytes, columns)?),
            Dtype::Bf16 => Panels::Bf16(pack::<Bf16>(bytes, columns)?),
        };
        Ok(Matrix { rows, columns, panels })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Format of the stored numbers.
    pub fn dtype(&self) -> Dtype {
        match self.panels {
            Panels::F32(_) => Dtype::F32,
            Panels::F16(_) => Dtype::F16,
            Panels::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Memory that the weights take, padding included.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(steps) => size_of_val(steps.as_slice()),
            Panels::F16(steps) | Panels::Bf16(steps) => size_of_val(steps.as_slice()),
        }
    }

    /// Writes row `index`, exactly, to `out` `[columns]`: the embedding of a token.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not one row long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.rows, "row {index} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.columns, "a row has one number per column");
        match &self.panels {
            Panels::F32(steps) => copy_row::<F32>(steps, index, out),
            Panels::F16(steps) => copy_row::<F16>(steps, index, out),
            Panels::Bf16(steps) => copy_row::<Bf16>(steps, index, out),
        }
    }

    pub(crate) fn panels(&self) -> &Panels {
        &self.panels
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Matrix {} x {} {:?}", self.rows, self.columns, self.dtype())
    }
}

/// Numbers are transposed this many steps at a time, so that sixteen source rows and the target stay in the cache.
const PACK_STEPS: usize = 64;

fn pack<F: Format>(bytes: &[u8], columns: usize) -> Result<Vec<Step<F::Stored>>, PackError> {
    let size = size_of::<F::Stored>();
    let rows = bytes.len() / size / columns;
    let mut steps = vec![Step::<F::Stored>::default(); rows.div_ceil(LANES) * columns];
    let row_bytes = columns * size;
    for (panel, sources) in steps.chunks_exact_mut(columns).zip(bytes.chunks(row_bytes * LANES)) {
        for (block, target) in panel.chunks_mut(PACK_STEPS).enumerate() {
            let start = block * PACK_STEPS * size;
            for (lane, source) in sources.chunks_exact(row_bytes).enumerate() {
                let numbers = source[start..].chunks_exact(size);
                for (step, number) in target.iter_mut().zip(numbers) {
                    step.0[lane] = F::read(number);
                }
            }
        }
    }
    match first_not_finite::<F>(&steps, columns) {
        Some((row, column)) => Err(PackError::NotFinite { row, column }),
        None => Ok(steps),
    }
}

/// The row and column of the first NaN or infinity, in row-major order.
fn first_not_finite<F: Format>(steps: &[Step<F::Stored>], columns: usize) -> Option<(usize, usize)> {
    for (panel, steps) in steps.chunks_exact(columns).enumerate() {
        let faults = steps.iter().enumerate().flat_map(|(column, step)| {
            let fault = |lane: &usize| !F::widen(step.0[*lane]).is_finite();
            let lane = (0..LANES).find(fault);
            lane.map(|lane| (panel * LANES + lane, column))
        });
        if let Some(first) = faults.min() {
            return Some(first);
        }
    }
    None
}

fn copy_row<F: Format>(steps: &[Step<F::Stored>], index: usize, out: &mut [f32]) {
    let panel = &steps[index / LANES * out.len()..][..out.len()];
    for (number, step) in out.iter_mut().zip(panel) {
        *number = F::widen(step.0[index % LANES]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn le(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn rows_come_back_exactly() {
        let (rows, columns) = (37, 70);
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32 - 900.0).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let (bytes, expected): (Vec<u8>, Vec<f32>) = match dtype {
                Dtype::F32 => (le(&values), values.clone()),
                Dtype::F16 => {
                    let stored = values.iter().map(|v| half::f16::from_f32(*v));
                    (stored.clone().flat_map(|v| v.to_le_bytes()).collect(), stored.map(|v| v.to_f32()).collect())
                }
                Dtype::Bf16 => {
                    let stored = values.iter().map(|v| half::bf16::from_f32(*v));
                    (stored.clone().flat_map(|v| v.to_le_bytes()).collect(), stored.map(|v| v.to_f32()).collect())
                }
            };
            // One byte off, so that the source is not aligned.
            let mut shifted = vec![0];
            shifted.extend(&bytes);
            let matrix = Matrix::pack(WeightView { dtype, bytes: &shifted[1..], rows, columns }).unwrap();
            assert_eq!((matrix.rows(), matrix.columns(), matrix.dtype()), (rows, columns, dtype));
            assert_eq!(matrix.bytes(), 48 * columns * dtype.size_bytes());
            let mut row = vec![0.0; columns];
            for (index, expected) in expected.chunks_exact(columns).enumerate() {
                matrix.row(index, &mut row);
                assert_eq!(row, expected);
            }
        }
    }

    #[test]
    fn bad_weights_name_their_place() {
        let view = |bytes: &'static [u8], rows, columns| WeightView { dtype: Dtype::F16, bytes, rows, columns };
        let error = |view| Matrix::pack(view).unwrap_err();
        assert_eq!(error(view(&[], 0, 4)), PackError::Empty { rows: 0, columns: 4 });
        assert!(matches!(error(view(&[0; 7], 2, 2)), PackError::Length { found: 7, .. }));
        assert!(matches!(error(view(&[0; 8], usize::MAX, 2)), PackError::Length { .. }));

        let mut values = vec![1.0f32; 20 * 3];
        values[18 * 3 + 1] = f32::NAN;
        values[19 * 3] = f32::INFINITY;
        let error = Matrix::pack(WeightView { dtype: Dtype::F32, bytes: &le(&values), rows: 20, columns: 3 });
        assert_eq!(error.unwrap_err(), PackError::NotFinite { row: 18, column: 1 });
    }
}
