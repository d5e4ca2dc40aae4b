//! Quantised weights: every path, batch, cut and number of threads has the bits of the definition.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod definition;

use std::sync::Arc;

use butterfly_kernels::{Dtype, Matrix, PackError, WeightView, linear};
use definition::blocks::{self, QUANTISED};
use definition::{Numbers, bits, pools};
use proptest::prelude::*;

fn pack(dtype: Dtype, bytes: &[u8], rows: usize, columns: usize) -> Result<Matrix, PackError> {
    Matrix::pack(WeightView { dtype, bytes, rows, columns })
}

/// Bits, with every NaN the same: its payload is not part of the profile. Extreme scales make infinities meet.
fn comparable(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}

proptest! {
    #![proptest_config(definition::cases(60))]

    #[test]
    fn linear_is_its_definition(
        seed: u64,
        format in 0..QUANTISED.len(),
        rows in prop_oneof![4 => 1usize..70, 1 => 70usize..150],
        width in prop_oneof![3 => 1usize..5, 1 => 5usize..20],
        batch in prop_oneof![4 => 1usize..20, 1 => 30usize..50, 1 => 90usize..110],
        biased: bool,
    ) {
        let dtype = QUANTISED[format];
        // More inputs than are taken at a time, in small blocks and in large ones.
        let columns = width.min(1280 / dtype.block_columns()) * dtype.block_columns();
        let mut numbers = Numbers(seed);
        let bytes = blocks::random(&mut numbers, dtype, rows * columns);
        let matrix = pack(dtype, &bytes, rows, columns).unwrap();
        let bias = biased.then(|| numbers.wilds(rows));
        let mut x = numbers.wilds(batch * columns);
        // One block too small for a scale, and one with the greatest inputs.
        x[..dtype.block_columns()].iter_mut().for_each(|x| *x *= 1e-41);
        if batch > 1 {
            x[columns..][..dtype.block_columns()].fill(-3.0);
        }
        let expected = comparable(&blocks::linear(dtype, &bytes, columns, bias.as_deref(), &x));
        for pool in pools() {
            let mut y = vec![f32::NAN; batch * rows];
            linear(&pool, &matrix, bias.as_deref(), &x, &mut y);
            prop_assert_eq!(comparable(&y), &expected[..], "{:?}", pool);
            let mut start = 0;
            while start < batch {
                let end = (start + 1 + numbers.below(batch)).min(batch);
                let y = &mut y[start * rows..end * rows];
                y.fill(f32::NAN);
                linear(&pool, &matrix, bias.as_deref(), &x[start * columns..end * columns], y);
                start = end;
            }
            prop_assert_eq!(comparable(&y), &expected[..], "{:?}, in pieces", pool);
        }
    }

    #[test]
    fn rows_are_those_of_the_format(seed: u64, format in 0..QUANTISED.len(), rows in 1usize..40, width in 1usize..4) {
        let dtype = QUANTISED[format];
        let columns = width * dtype.block_columns();
        let bytes = blocks::random(&mut Numbers(seed), dtype, rows * columns);
        let matrix = pack(dtype, &bytes, rows, columns).unwrap();
        let mut row = vec![0.0; columns];
        for (index, bytes) in bytes.chunks(dtype.row_bytes(columns).unwrap()).enumerate() {
            matrix.row(index, &mut row);
            prop_assert_eq!(bits(&row), bits(&blocks::row(dtype, bytes)));
        }
    }
}

/// Bytes that begin at the address packed weights need.
#[repr(align(64))]
struct Aligned([u8; 64 * 400]);

struct Shared {
    memory: Box<Aligned>,
    range: std::ops::Range<usize>,
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.memory.0[self.range.clone()]
    }
}

fn shared(bytes: &[u8], offset: usize) -> Arc<Shared> {
    let mut memory = Box::new(Aligned([0; 64 * 400]));
    memory.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    Arc::new(Shared { memory, range: offset..offset + bytes.len() })
}

#[test]
fn packed_bytes_are_a_matrix_again() {
    let mut numbers = Numbers(3);
    for dtype in Dtype::ALL {
        let (rows, columns) = (19, 256);
        let bytes = match dtype.block_columns() {
            1 => definition::stored(&numbers.tame(rows * columns), dtype).0,
            _ => blocks::random(&mut numbers, dtype, rows * columns),
        };
        let matrix = pack(dtype, &bytes, rows, columns).unwrap();
        let packed = matrix.packed_bytes();
        assert_eq!(Matrix::packed_len(dtype, rows, columns), Some(packed.len()));
        if packed.len() + 64 > size_of::<Aligned>() {
            continue;
        }
        let again = Matrix::from_packed(dtype, rows, columns, shared(packed, 64)).unwrap();
        assert_eq!(again.packed_bytes(), packed);
        let x = numbers.tame(columns);
        for pool in pools() {
            let mut y = [vec![0.0; rows], vec![1.0; rows]];
            linear(&pool, &matrix, None, &x, &mut y[0]);
            linear(&pool, &again, None, &x, &mut y[1]);
            assert_eq!(comparable(&y[0]), comparable(&y[1]));
        }
        let refused = |rows, bytes| Matrix::from_packed(dtype, rows, columns, bytes).unwrap_err();
        assert_eq!(refused(rows, shared(packed, 32)), PackError::Alignment);
        assert!(matches!(refused(rows + 16, shared(packed, 0)), PackError::Length { .. }));
        assert!(matches!(refused(rows, shared(&packed[..packed.len() - 32], 0)), PackError::Length { .. }));
        assert!(matches!(refused(usize::MAX, shared(packed, 0)), PackError::Length { .. }));
        let mut bad = packed.to_vec();
        bad[..4].fill(0xff);
        assert_eq!(refused(rows, shared(&bad, 0)), PackError::NotFinite { row: 0, column: 0 }, "{dtype:?}");
    }
}

/// Paths may only assume what is checked: six bits of a part's scale and minimum.
#[test]
fn packed_scales_beyond_their_format_are_refused() {
    for dtype in [Dtype::Q4K, Dtype::Q5K] {
        let bytes = blocks::random(&mut Numbers(4), dtype, 16 * 256);
        let packed = pack(dtype, &bytes, 16, 256).unwrap().packed_bytes().to_vec();
        // After two f16 for each of sixteen outputs: scales of eight parts, then minima.
        for at in [64 + 5, 64 + 7 * 16 + 5, 192 + 10, 192 + 96 + 11] {
            for factor in [64, 128, 255] {
                let mut bad = packed.clone();
                bad[at] = factor;
                let error = Matrix::from_packed(dtype, 16, 256, shared(&bad, 0)).unwrap_err();
                assert_eq!(error, PackError::NotFinite { row: 5, column: 0 });
            }
        }
    }
}

#[test]
fn bad_blocks_name_their_place() {
    let scale_at = |dtype| if dtype == Dtype::Q6K { 208 } else { 0 };
    for dtype in QUANTISED {
        let columns = 2 * dtype.block_columns();
        let bytes = blocks::random(&mut Numbers(5), dtype, 20 * columns);
        assert_eq!(
            pack(dtype, &bytes, 20, columns - 1).unwrap_err(),
            PackError::Blocks { dtype, columns: columns - 1 }
        );
        assert!(matches!(pack(dtype, &bytes[1..], 20, columns).unwrap_err(), PackError::Length { .. }));
        assert!(matches!(pack(dtype, &bytes, usize::MAX, columns).unwrap_err(), PackError::Length { .. }));
        for bad in [half::f16::NAN, half::f16::INFINITY, half::f16::NEG_INFINITY] {
            let mut bytes = bytes.clone();
            let block = 2 * 18 + 1;
            bytes[block * dtype.block_bytes() + scale_at(dtype)..][..2].copy_from_slice(&bad.to_le_bytes());
            let error = pack(dtype, &bytes, 20, columns).unwrap_err();
            assert_eq!(error, PackError::NotFinite { row: 18, column: columns / 2 });
        }
        assert_eq!(dtype.row_bytes(columns), Some(2 * dtype.block_bytes()));
        assert_eq!(dtype.row_bytes(columns + 1), None);
    }
}

/// A NaN or an infinity makes all of its row a NaN or an infinity, and stays in it.
#[test]
fn rows_do_not_leak_into_each_other() {
    let mut numbers = Numbers(6);
    for dtype in QUANTISED {
        let (rows, columns) = (20, 512);
        let bytes = blocks::random(&mut numbers, dtype, rows * columns);
        let matrix = pack(dtype, &bytes, rows, columns).unwrap();
        let mut x = numbers.tame(9 * columns);
        let expected = blocks::linear(dtype, &bytes, columns, None, &x);
        x[3 * columns + 7] = f32::NAN;
        x[6 * columns + 300] = f32::INFINITY;
        for pool in pools() {
            let mut y = vec![0.0; 9 * rows];
            linear(&pool, &matrix, None, &x, &mut y);
            for (row, (y, expected)) in y.chunks(rows).zip(expected.chunks(rows)).enumerate() {
                match row {
                    3 | 6 => assert!(y.iter().all(|y| !y.is_finite())),
                    _ => assert_eq!(comparable(y), comparable(expected)),
                }
            }
        }
    }
}
