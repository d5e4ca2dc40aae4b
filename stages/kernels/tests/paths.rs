//! Every path, with any number of threads, any batch and any chunking, has the bits of the definition.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod definition;

use butterfly_kernels::{
    CacheStorage, KvCache, Matrix, Pool, RopeScaling, RopeTable, add_assign, all_finite, argmax, attention,
    attention_bidirectional, gelu, layer_norm, linear, math, relu, rms_norm, rope, sigmoid, silu, silu_mul, sum, tanh,
};
use definition::{Numbers, bits, dtypes, packed, pools};
use proptest::prelude::*;

/// Threads share these.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Pool>();
    shared::<Matrix>();
    shared::<RopeTable>();
    shared::<KvCache>();
};

/// Cuts `0..len` into random pieces.
fn pieces(numbers: &mut Numbers, len: usize) -> Vec<std::ops::Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < len {
        let end = (start + 1 + numbers.below(len)).min(len);
        pieces.push(start..end);
        start = end;
    }
    pieces
}

proptest! {
    #![proptest_config(definition::cases(40))]

    #[test]
    fn linear_is_its_definition(
        seed: u64,
        dtype in dtypes(),
        rows in 1usize..150,
        columns in 1usize..700,
        batch in prop_oneof![4 => 1usize..64, 1 => 90usize..110],
        biased: bool,
    ) {
        let mut numbers = Numbers(seed);
        let (matrix, exact) = packed(&numbers.wilds(rows * columns), dtype, rows);
        let bias = biased.then(|| numbers.wilds(rows));
        let x = numbers.wilds(batch * columns);
        let expected = bits(&definition::linear(&exact, columns, bias.as_deref(), &x));
        for pool in pools() {
            let mut y = vec![f32::NAN; batch * rows];
            linear(&pool, &matrix, bias.as_deref(), &x, &mut y);
            prop_assert_eq!(bits(&y), &expected[..], "{:?}", pool);
            for piece in pieces(&mut numbers, batch) {
                let x = &x[piece.start * columns..piece.end * columns];
                let y = &mut y[piece.start * rows..piece.end * rows];
                y.fill(f32::NAN);
                linear(&pool, &matrix, bias.as_deref(), x, y);
            }
            prop_assert_eq!(bits(&y), &expected[..], "{:?}, in pieces", pool);
        }
    }

    #[test]
    fn attention_is_its_definition(
        seed: u64,
        f32_storage: bool,
        kv_heads in 1usize..4,
        group in 1usize..5,
        head_dim in prop_oneof![Just(1usize), Just(16), Just(32), Just(64), 2usize..90],
        before in 0usize..70,
        rows in 1usize..50,
    ) {
        let mut numbers = Numbers(seed);
        let (heads, width, positions) = (kv_heads * group, kv_heads * head_dim, before + rows);
        let storage = if f32_storage { CacheStorage::F32 } else { CacheStorage::F16 };
        let mut cache = KvCache::with_storage(kv_heads, head_dim, positions, storage);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for _ in 0..positions {
            let (key, value) = (numbers.wilds(width), numbers.wilds(width));
            cache.push(&key, &value).unwrap();
            let rounded = |row: Vec<f32>| -> Vec<f32> {
                let round = |x: f32| if f32_storage { x } else { half::f16::from_f32(x).to_f32() };
                row.into_iter().map(round).collect()
            };
            keys.push(rounded(key));
            values.push(rounded(value));
        }
        let q = numbers.wilds(rows * heads * head_dim);
        let mut expected = Vec::new();
        for (index, q) in q.chunks(head_dim).enumerate() {
            let (row, head) = (index / heads, index % heads);
            let start = head / group * head_dim;
            let part = |rows: &'_ [Vec<f32>]| -> Vec<Vec<f32>> {
                let rows = rows[..=before + row].iter();
                rows.map(|row| row[start..start + head_dim].to_vec()).collect()
            };
            let (keys, values) = (part(&keys), part(&values));
            let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
            let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            expected.extend(bits(&definition::attention(q, &keys, &values)));
        }
        for pool in pools() {
            let mut out = vec![f32::NAN; q.len()];
            attention(&pool, &q, &cache, before, heads, &mut out);
            prop_assert_eq!(bits(&out), &expected[..], "{:?}", pool);
            out.fill(f32::NAN);
            for piece in pieces(&mut numbers, rows) {
                let range = piece.start * heads * head_dim..piece.end * heads * head_dim;
                attention(&pool, &q[range.clone()], &cache, before + piece.start, heads, &mut out[range]);
            }
            prop_assert_eq!(bits(&out), &expected[..], "{:?}, in pieces", pool);
        }
    }

    #[test]
    fn attention_to_everything_is_its_definition(
        seed: u64,
        kv_heads in 1usize..4,
        group in 1usize..3,
        head_dim in prop_oneof![Just(1usize), Just(32), 2usize..70],
        positions in 1usize..70,
    ) {
        let mut numbers = Numbers(seed);
        let (heads, width) = (kv_heads * group, kv_heads * head_dim);
        let mut cache = KvCache::with_storage(kv_heads, head_dim, positions, CacheStorage::F32);
        let (keys, values) = (numbers.wilds(positions * width), numbers.wilds(positions * width));
        for (key, value) in keys.chunks(width).zip(values.chunks(width)) {
            cache.push(key, value).unwrap();
        }
        let q = numbers.wilds(positions * heads * head_dim);
        let mut expected = Vec::new();
        for (index, q) in q.chunks(head_dim).enumerate() {
            let start = index % heads / group * head_dim;
            let part = |rows: &'_ [f32]| -> Vec<Vec<f32>> {
                rows.chunks(width).map(|row| row[start..start + head_dim].to_vec()).collect()
            };
            let (keys, values) = (part(&keys), part(&values));
            let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
            let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            expected.extend(bits(&definition::attention(q, &keys, &values)));
        }
        for pool in pools() {
            let mut out = vec![f32::NAN; q.len()];
            attention_bidirectional(&pool, &q, &cache, heads, &mut out);
            prop_assert_eq!(bits(&out), &expected[..], "{:?}", pool);
            out.fill(f32::NAN);
            for piece in pieces(&mut numbers, positions) {
                let range = piece.start * heads * head_dim..piece.end * heads * head_dim;
                attention_bidirectional(&pool, &q[range.clone()], &cache, heads, &mut out[range]);
            }
            prop_assert_eq!(bits(&out), &expected[..], "{:?}, in pieces", pool);
        }
    }

    #[test]
    fn a_cache_that_was_cut_back_is_as_good_as_new(
        seed: u64,
        kept in 0usize..40,
        dropped in 0usize..40,
        added in 1usize..40,
    ) {
        let mut numbers = Numbers(seed);
        let (kv_heads, head_dim) = (2, 24);
        let width = kv_heads * head_dim;
        let mut cut = KvCache::new(kv_heads, head_dim, 100);
        let mut fresh = KvCache::new(kv_heads, head_dim, 100);
        for index in 0..kept + dropped + added {
            let (key, value) = (numbers.wilds(width), numbers.wilds(width));
            if index == kept + dropped {
                cut.truncate(kept);
            }
            cut.push(&key, &value).unwrap();
            if !(kept..kept + dropped).contains(&index) {
                fresh.push(&key, &value).unwrap();
            }
        }
        prop_assert_eq!((cut.len(), cut.bytes()), (fresh.len(), fresh.bytes()));
        let q = numbers.wilds(2 * width);
        for pool in pools() {
            let mut out = [vec![0.0; q.len()], vec![0.0; q.len()]];
            attention(&pool, &q, &cut, cut.len() - 1, 2 * kv_heads, &mut out[0]);
            attention(&pool, &q, &fresh, fresh.len() - 1, 2 * kv_heads, &mut out[1]);
            prop_assert_eq!(bits(&out[0]), bits(&out[1]));
        }
    }

    #[test]
    fn norms_and_sums_are_their_definitions(
        seed: u64,
        width in 1usize..300,
        rows in prop_oneof![4 => 1usize..64, 1 => 1000usize..3000],
    ) {
        let mut numbers = Numbers(seed);
        let eps = 1e-5;
        let x = numbers.wilds(rows * width);
        let (weight, bias) = (numbers.wilds(width), numbers.wilds(width));
        let by_row = |row: &dyn Fn(&[f32]) -> Vec<f32>| bits(&x.chunks(width).flat_map(row).collect::<Vec<_>>());
        let rms = by_row(&|x| definition::rms_norm(x, &weight, eps));
        let layer = by_row(&|x| definition::layer_norm(x, &weight, &bias, eps));
        for pool in pools() {
            let mut out = vec![f32::NAN; x.len()];
            rms_norm(&pool, &x, &weight, eps, &mut out);
            prop_assert_eq!(bits(&out), &rms[..], "{:?}", pool);
            layer_norm(&pool, &x, &weight, &bias, eps, &mut out);
            prop_assert_eq!(bits(&out), &layer[..], "{:?}", pool);
            prop_assert_eq!(sum(&pool, &x).to_bits(), definition::sum(&x).to_bits());
        }
    }

    #[test]
    fn activations_are_their_definitions(seed: u64, len in prop_oneof![0usize..500, 60_000usize..150_000]) {
        let mut numbers = Numbers(seed);
        let x: Vec<f32> = numbers.wilds(len).iter().map(|x| x * 16.0).collect();
        let up = numbers.wilds(len);
        let expected = |f: &dyn Fn(f32) -> f32| bits(&x.iter().map(|x| f(*x)).collect::<Vec<_>>());
        type Activation = fn(&Pool, &mut [f32]);
        let cases: [(Activation, Vec<u32>); 5] = [
            (tanh, expected(&math::tanh)),
            (sigmoid, expected(&math::sigmoid)),
            (silu, expected(&|x| x * math::sigmoid(x))),
            (gelu, expected(&|x| 0.5 * x * (1.0 + math::erf(x * 0.5f32.sqrt())))),
            (relu, expected(&|x| if x > 0.0 { x } else { 0.0 })),
        ];
        let gated: Vec<f32> = x.iter().zip(&up).map(|(g, u)| g * math::sigmoid(*g) * u).collect();
        for pool in pools() {
            for (activation, expected) in &cases {
                let mut values = x.clone();
                activation(&pool, &mut values);
                prop_assert_eq!(bits(&values), &expected[..], "{:?}", pool);
            }
            let mut out = vec![f32::NAN; len];
            silu_mul(&pool, &x, &up, &mut out);
            prop_assert_eq!(bits(&out), bits(&gated), "{:?}", pool);
        }
    }

    #[test]
    fn rotation_is_its_definition(seed: u64, half in 1usize..40, heads in 1usize..5, rows in 0usize..20) {
        let mut numbers = Numbers(seed);
        let head_dim = 2 * half;
        let table = RopeTable::new(head_dim, 10_000.0, 512, RopeScaling::Default).unwrap();
        let positions: Vec<u32> = (0..rows).map(|_| numbers.below(512) as u32).collect();
        let mut x = numbers.wilds(rows * heads * head_dim);
        let mut expected = Vec::new();
        for (index, head) in x.chunks(head_dim).enumerate() {
            let angle = |i: usize| {
                let frequency = 1.0 / libm::pow(10_000.0, (2 * i) as f64 / head_dim as f64);
                f64::from(positions[index / heads]) * frequency
            };
            let c = |i: usize| libm::cos(angle(i)) as f32;
            let s = |i: usize| libm::sin(angle(i)) as f32;
            expected.extend((0..half).map(|i| head[i] * c(i) - head[i + half] * s(i)));
            expected.extend((0..half).map(|i| head[i] * s(i) + head[i + half] * c(i)));
        }
        rope(&mut x, heads, &positions, &table);
        prop_assert_eq!(bits(&x), bits(&expected));
    }

    #[test]
    fn one_bad_value_anywhere_is_found(seed: u64, len in 1usize..5000) {
        let mut numbers = Numbers(seed);
        let mut values = numbers.wilds(len);
        prop_assert!(all_finite(&values));
        let mut doubled = values.clone();
        add_assign(&mut doubled, &values);
        prop_assert!(doubled.iter().zip(&values).all(|(d, v)| d.to_bits() == (v + v).to_bits()));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
            let at = numbers.below(len);
            let good = std::mem::replace(&mut values[at], bad);
            prop_assert!(!all_finite(&values));
            values[at] = good;
        }
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals(values in prop::collection::vec(-3i8..3, 0..50), at in 0usize..50) {
        let mut values: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
        let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        prop_assert_eq!(argmax(&values), values.iter().position(|v| *v == greatest));
        if let Some(value) = values.get_mut(at) {
            *value = f32::NAN;
            let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(argmax(&values), values.iter().position(|v| *v == greatest));
        }
    }
}

#[test]
fn zeros_of_both_signs_are_equal() {
    assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    assert_eq!(argmax(&[0.0, -0.0]), Some(0));
    assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
    assert_eq!(argmax(&[f32::NAN]), None);
}

/// A NaN or an infinity stays in its row, whoever shares its tile.
#[test]
fn rows_do_not_leak_into_each_other() {
    let mut numbers = Numbers(5);
    let (matrix, exact) = packed(&numbers.tame(20 * 40), butterfly_kernels::Dtype::F16, 20);
    let mut x = numbers.tame(9 * 40);
    let expected = bits(&definition::linear(&exact, 40, None, &x));
    x[3 * 40 + 7] = f32::NAN;
    x[6 * 40 + 1] = f32::INFINITY;
    for pool in pools() {
        let mut y = vec![0.0; 9 * 20];
        linear(&pool, &matrix, None, &x, &mut y);
        for (row, (y, expected)) in y.chunks(20).zip(expected.chunks(20)).enumerate() {
            match row {
                3 | 6 => assert!(y.iter().all(|y| !y.is_finite())),
                _ => assert_eq!(bits(y), expected),
            }
        }
    }
}

/// Operations on no rows do nothing.
#[test]
fn no_rows_are_fine() {
    let (matrix, _) = packed(&[1.0; 6], butterfly_kernels::Dtype::F32, 2);
    let cache = KvCache::new(1, 4, 8);
    for pool in pools() {
        linear(&pool, &matrix, None, &[], &mut []);
        attention(&pool, &[], &cache, 0, 3, &mut []);
        attention_bidirectional(&pool, &[], &cache, 3, &mut []);
        rms_norm(&pool, &[], &[1.0], 1e-5, &mut []);
        silu_mul(&pool, &[], &[], &mut []);
        assert_eq!(sum(&pool, &[]).to_bits(), 0);
    }
}
