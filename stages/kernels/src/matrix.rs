//! Weight matrices, packed for the chain.
//!
//! Invariants:
//! - Outputs stand in panels of sixteen, and a panel steps through the inputs, so decoding streams the weights once, in
//!   order. Missing outputs of the last panel are zeros that are computed and never written.
//! - Numbers keep their stored format; they widen exactly when they are used. None of them, and none of the scales of
//!   quantised ones, is a NaN or an infinity.
//! - Packed bytes lie in memory of this crate, or in memory that the caller shares, such as a mapped file.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::blocks::{Blocks, Q4_0, Q4K, Q5K, Q6K, Q8_0};
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

/// Why weights cannot be packed, or packed bytes cannot be used.
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
    /// A row is not a whole number of blocks.
    #[error("{columns} columns are not whole blocks of {dtype:?}, which hold {} each", dtype.block_columns())]
    Blocks {
        /// Format of the numbers.
        dtype: Dtype,
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
    /// Packed bytes do not begin at a multiple of [`Matrix::PACKED_ALIGN`].
    #[error("packed weights begin at an address that is not a multiple of {}", Matrix::PACKED_ALIGN)]
    Alignment,
    /// A weight is a NaN or an infinity, or a block's scales are, or are not such as the format has.
    #[error("the weight at row {row}, column {column} is not finite")]
    NotFinite {
        /// Output of the first such weight, in row-major order.
        row: usize,
        /// Its input; of a block, the first.
        column: usize,
    },
}

/// A weight matrix `[rows, columns]`, packed. It maps `columns` inputs to `rows` outputs.
pub struct Matrix {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    memory: Memory,
}

/// Bytes that are shared, and stay where they are while they are.
type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

enum Memory {
    Own { lines: Vec<Line>, len: usize },
    Shared(SharedBytes),
}

/// One cache line.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

pub(crate) enum Panels<'a> {
    F32(&'a [Step<f32>]),
    F16(&'a [Step<u16>]),
    Bf16(&'a [Step<u16>]),
    Q8_0(&'a [Q8_0]),
    Q4_0(&'a [Q4_0]),
    Q4K(&'a [Q4K]),
    Q5K(&'a [Q5K]),
    Q6K(&'a [Q6K]),
}

impl Matrix {
    /// What the address of packed bytes is a multiple of.
    pub const PACKED_ALIGN: usize = align_of::<Line>();

    /// Packs weights, copying them once.
    ///
    /// # Errors
    /// If the shape is empty or not whole blocks, does not fit the bytes, or a weight or a scale is not finite.
    pub fn pack(view: WeightView<'_>) -> Result<Matrix, PackError> {
        let WeightView { dtype, bytes, rows, columns } = view;
        let len = packed_len(dtype, rows, columns, bytes.len())?;
        let row_bytes = dtype.row_bytes(columns).ok_or(PackError::Blocks { dtype, columns })?;
        if rows.checked_mul(row_bytes) != Some(bytes.len()) {
            return Err(PackError::Length { dtype, rows, columns, found: bytes.len() });
        }
        let mut lines = vec![Line::zeroed(); len.div_ceil(size_of::<Line>())];
        let packed = &mut bytemuck::cast_slice_mut(&mut lines)[..len];
        match dtype {
            Dtype::F32 => pack_numbers::<F32>(bytes, columns, packed),
            Dtype::F16 => pack_numbers::<F16>(bytes, columns, packed),
            Dtype::Bf16 => pack_numbers::<Bf16>(bytes, columns, packed),
            Dtype::Q8_0 => pack_blocks::<Q8_0>(bytes, columns, packed),
            Dtype::Q4_0 => pack_blocks::<Q4_0>(bytes, columns, packed),
            Dtype::Q4K => pack_blocks::<Q4K>(bytes, columns, packed),
            Dtype::Q5K => pack_blocks::<Q5K>(bytes, columns, packed),
            Dtype::Q6K => pack_blocks::<Q6K>(bytes, columns, packed),
        }
        Matrix { dtype, rows, columns, memory: Memory::Own { lines, len } }.checked()
    }

    /// The matrix whose [`Matrix::packed_bytes`] these are, without a copy.
    ///
    /// Length, alignment, and every weight or scale are looked at, which reads the bytes once: a NaN, an infinity or a
    /// scale beyond its format is refused. Whether they are the right weights is for the caller to know. Bytes that
    /// change while the matrix lives change what it computes, and nothing worse.
    ///
    /// # Errors
    /// If the shape is empty or not whole blocks, the bytes do not fit it or begin at a wrong address, or hold what
    /// [`Matrix::pack`] would have refused.
    pub fn from_packed(
        dtype: Dtype,
        rows: usize,
        columns: usize,
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    ) -> Result<Matrix, PackError> {
        let packed: &[u8] = (*bytes).as_ref();
        let found = packed.len();
        if packed_len(dtype, rows, columns, found)? != found {
            return Err(PackError::Length { dtype, rows, columns, found });
        }
        if !packed.as_ptr().addr().is_multiple_of(Matrix::PACKED_ALIGN) {
            return Err(PackError::Alignment);
        }
        Matrix { dtype, rows, columns, memory: Memory::Shared(bytes) }.checked()
    }

    /// Length of [`Matrix::packed_bytes`] of a shape. `None` if there is no such matrix.
    pub fn packed_len(dtype: Dtype, rows: usize, columns: usize) -> Option<usize> {
        packed_len(dtype, rows, columns, 0).ok()
    }

    /// The weights as they lie in memory, which [`Matrix::from_packed`] takes: panels of sixteen rows, padding included,
    /// in the byte order of this machine. The layout is part of a build, not of the profile.
    pub fn packed_bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Own { lines, len } => &bytemuck::cast_slice(lines)[..*len],
            Memory::Shared(bytes) => (**bytes).as_ref(),
        }
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
        self.dtype
    }

    /// Memory that the weights take, padding included.
    pub fn bytes(&self) -> usize {
        self.packed_bytes().len()
    }

    /// Writes row `index` to `out` `[columns]`: the embedding of a token. It is exact, or rounded as the format has it:
    /// in Q4_K and Q5_K the difference of two products is rounded once.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not one row long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.rows, "row {index} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.columns, "a row has one number per column");
        match self.panels() {
            Panels::F32(steps) => copy_row::<F32>(steps, index, out),
            Panels::F16(steps) => copy_row::<F16>(steps, index, out),
            Panels::Bf16(steps) => copy_row::<Bf16>(steps, index, out),
            Panels::Q8_0(blocks) => copy_blocks(blocks, index, out),
            Panels::Q4_0(blocks) => copy_blocks(blocks, index, out),
            Panels::Q4K(blocks) => copy_blocks(blocks, index, out),
            Panels::Q5K(blocks) => copy_blocks(blocks, index, out),
            Panels::Q6K(blocks) => copy_blocks(blocks, index, out),
        }
    }

    /// The casts check length and alignment each time, since shared bytes may be others than they were.
    pub(crate) fn panels(&self) -> Panels<'_> {
        let bytes = self.packed_bytes();
        match self.dtype {
            Dtype::F32 => Panels::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Panels::F16(bytemuck::cast_slice(bytes)),
            Dtype::Bf16 => Panels::Bf16(bytemuck::cast_slice(bytes)),
            Dtype::Q8_0 => Panels::Q8_0(bytemuck::cast_slice(bytes)),
            Dtype::Q4_0 => Panels::Q4_0(bytemuck::cast_slice(bytes)),
            Dtype::Q4K => Panels::Q4K(bytemuck::cast_slice(bytes)),
            Dtype::Q5K => Panels::Q5K(bytemuck::cast_slice(bytes)),
            Dtype::Q6K => Panels::Q6K(bytemuck::cast_slice(bytes)),
        }
    }

    /// The matrix, if its weights can be computed with.
    fn checked(self) -> Result<Matrix, PackError> {
        let columns = self.columns;
        let fault = match self.panels() {
            Panels::F32(steps) => first_not_finite::<F32>(steps, columns),
            Panels::F16(steps) => first_not_finite::<F16>(steps, columns),
            Panels::Bf16(steps) => first_not_finite::<Bf16>(steps, columns),
            Panels::Q8_0(blocks) => first_unsound(blocks, columns),
            Panels::Q4_0(blocks) => first_unsound(blocks, columns),
            Panels::Q4K(blocks) => first_unsound(blocks, columns),
            Panels::Q5K(blocks) => first_unsound(blocks, columns),
            Panels::Q6K(blocks) => first_unsound(blocks, columns),
        };
        match fault {
            Some((row, column)) => Err(PackError::NotFinite { row, column }),
            None => Ok(self),
        }
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Matrix {} x {} {:?}", self.rows, self.columns, self.dtype())
    }
}

/// Bytes of a packed matrix. `found` is only for the error's text.
fn packed_len(dtype: Dtype, rows: usize, columns: usize, found: usize) -> Result<usize, PackError> {
    if rows == 0 || columns == 0 {
        return Err(PackError::Empty { rows, columns });
    }
    if !columns.is_multiple_of(dtype.block_columns()) {
        return Err(PackError::Blocks { dtype, columns });
    }
    let block = match dtype {
        Dtype::F32 => size_of::<Step<f32>>(),
        Dtype::F16 | Dtype::Bf16 => size_of::<Step<u16>>(),
        Dtype::Q8_0 => size_of::<Q8_0>(),
        Dtype::Q4_0 => size_of::<Q4_0>(),
        Dtype::Q4K => size_of::<Q4K>(),
        Dtype::Q5K => size_of::<Q5K>(),
        Dtype::Q6K => size_of::<Q6K>(),
    };
    let blocks = rows.div_ceil(LANES).checked_mul(columns / dtype.block_columns());
    let len = blocks.and_then(|blocks| blocks.checked_mul(block)).filter(|len| isize::try_from(*len).is_ok());
    len.ok_or(PackError::Length { dtype, rows, columns, found })
}

/// Numbers are transposed this many steps at a time, so that sixteen source rows and the target stay in the cache.
const PACK_STEPS: usize = 64;

fn pack_numbers<F: Format>(bytes: &[u8], columns: usize, packed: &mut [u8]) {
    let steps: &mut [Step<F::Stored>] = bytemuck::cast_slice_mut(packed);
    let size = size_of::<F::Stored>();
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
}

fn pack_blocks<B: Blocks>(bytes: &[u8], columns: usize, packed: &mut [u8]) {
    let width = columns / B::STEPS;
    let row_bytes = width * B::FILE_BYTES;
    let panels = bytemuck::cast_slice_mut::<u8, B>(packed).chunks_exact_mut(width);
    for (panel, sources) in panels.zip(bytes.chunks(row_bytes * LANES)) {
        for (index, block) in panel.iter_mut().enumerate() {
            for (lane, source) in sources.chunks_exact(row_bytes).enumerate() {
                block.set(lane, &source[index * B::FILE_BYTES..][..B::FILE_BYTES]);
            }
        }
    }
}

/// The row and column of the first NaN or infinity, in row-major order.
fn first_not_finite<F: Format>(steps: &[Step<F::Stored>], columns: usize) -> Option<(usize, usize)> {
    first_fault(steps, columns, |step, lane| !F::is_finite(step.0[lane]))
}

/// The row and the first column of the first block that cannot be computed with, in row-major order.
fn first_unsound<B: Blocks>(blocks: &[B], columns: usize) -> Option<(usize, usize)> {
    let fault = first_fault(blocks, columns / B::STEPS, |block, lane| !block.is_sound(lane));
    fault.map(|(row, index)| (row, index * B::STEPS))
}

fn first_fault<T>(steps: &[T], width: usize, is_fault: impl Fn(&T, usize) -> bool) -> Option<(usize, usize)> {
    let has_fault = |step: &T| (0..LANES).fold(false, |found, lane| found | is_fault(step, lane));
    for (panel, steps) in steps.chunks_exact(width).enumerate() {
        if !steps.iter().any(has_fault) {
            continue;
        }
        for lane in 0..LANES {
            if let Some(index) = steps.iter().position(|step| is_fault(step, lane)) {
                return Some((panel * LANES + lane, index));
            }
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

fn copy_blocks<B: Blocks>(blocks: &[B], index: usize, out: &mut [f32]) {
    let width = out.len() / B::STEPS;
    let panel = &blocks[index / LANES * width..][..width];
    for (out, block) in out.chunks_exact_mut(B::STEPS).zip(panel) {
        block.dequantise(index % LANES, out);
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
                _ => unreachable!(),
            };
            // One byte off, so that the source is not aligned.
            let mut shifted = vec![0];
            shifted.extend(&bytes);
            let matrix = Matrix::pack(WeightView { dtype, bytes: &shifted[1..], rows, columns }).unwrap();
            assert_eq!((matrix.rows(), matrix.columns(), matrix.dtype()), (rows, columns, dtype));
            assert_eq!(matrix.bytes(), 48 * columns * dtype.block_bytes());
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
