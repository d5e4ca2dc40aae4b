//! Sampling agrees with a straightforward second implementation, and with hand-made cases.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use butterfly_kernels::sample::{Sampling, key, sample};
use butterfly_kernels::{Numeric, math};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

/// The rules, step by step, over the whole vocabulary every time.
fn straightforward(
    logits: &[f32],
    sampling: &Sampling,
    generated: &[u32],
    key: &[u8; 32],
    position: u64,
) -> Option<u32> {
    let mut logits = logits.to_vec();
    for (id, bias) in &sampling.logit_bias {
        if (*id as usize) < logits.len() {
            logits[*id as usize] += bias;
        }
    }
    for (id, logit) in logits.iter_mut().enumerate() {
        let count = generated.iter().filter(|g| **g as usize == id).count();
        if count > 0 {
            *logit = *logit - count as f32 * sampling.frequency_penalty - sampling.presence_penalty;
        }
    }
    let fine = |logits: &[f32]| logits.iter().all(|l| l.is_finite()) && !logits.is_empty();
    if !fine(&logits) {
        return None;
    }
    if sampling.temperature != 0.0 {
        logits.iter_mut().for_each(|l| *l /= sampling.temperature);
    }
    if !fine(&logits) {
        return None;
    }
    let mut ranking: Vec<usize> = (0..logits.len()).collect();
    ranking.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
    if sampling.temperature == 0.0 {
        return Some(ranking[0] as u32);
    }
    let max = logits[ranking[0]];
    let weight = |id: usize| (f64::from(math::exp(logits[id] - max)) * 4_294_967_296.0).floor() as u128;
    if sampling.top_k > 0 {
        ranking.truncate(sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        let total: u128 = ranking.iter().map(|id| weight(*id)).sum();
        let share = (f64::from(sampling.top_p) * 4_294_967_296.0).round().max(0.0) as u128;
        let mut cumulative = 0;
        let enough = ranking.iter().position(|id| {
            cumulative += weight(*id);
            cumulative * (1 << 32) >= share * total
        });
        ranking.truncate(enough.unwrap() + 1);
    }
    ranking.sort();
    let total: u128 = ranking.iter().map(|id| weight(*id)).sum();
    let digest = Sha256::digest([&key[..], &position.to_le_bytes()].concat());
    let r = u64::from_le_bytes(digest[..8].try_into().unwrap());
    let target = (u128::from(r) * total) >> 64;
    let mut cumulative = 0;
    let chosen = ranking.iter().find(|id| {
        cumulative += weight(**id);
        cumulative > target
    });
    Some(*chosen.unwrap() as u32)
}

fn samplings(vocabulary: u32) -> impl Strategy<Value = Sampling> {
    (
        prop_oneof![Just(0.0f32), Just(1.0), 0.05f32..3.0],
        prop_oneof![Just(0u32), 1..2 * vocabulary],
        prop_oneof![Just(1.0f32), Just(0.0), 0.0f32..1.0, 0.99f32..1.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop::collection::vec((0..2 * vocabulary, -9.0f32..9.0), 0..4),
    )
        .prop_map(|(temperature, top_k, top_p, presence_penalty, frequency_penalty, logit_bias)| Sampling {
            temperature,
            top_k,
            top_p,
            presence_penalty,
            frequency_penalty,
            logit_bias,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Logits are coarse, so that many are equal and ties matter.
    #[test]
    fn agrees_with_the_straightforward_rules(
        coarse in prop::collection::vec(-20i8..20, 1..400),
        scale in prop_oneof![Just(0.25f32), Just(0.0), 0.01f32..2.0],
        sampling in samplings(400),
        generated in prop::collection::vec(0u32..500, 0..30),
        seed: [u8; 32],
        choice: u32,
        position: u64,
    ) {
        let logits: Vec<f32> = coarse.iter().map(|l| f32::from(*l) * scale).collect();
        let key = key(&seed, choice);
        let expected = straightforward(&logits, &sampling, &generated, &key, position);
        let chosen = sample(&mut logits.clone(), &sampling, &generated, &key, position);
        prop_assert_eq!(chosen.ok(), expected);
    }

    /// Large vocabularies take the path that ranks only as many ids as it needs.
    #[test]
    fn agrees_on_flat_distributions(
        seed: [u8; 32],
        vocabulary in 500u32..3000,
        top_p in 0.3f32..1.0,
        top_k in prop_oneof![Just(0u32), 100u32..2000],
    ) {
        let logits: Vec<f32> = (0..vocabulary).map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 * 1e-4).collect();
        let sampling = Sampling { temperature: 1.0, top_k, top_p, ..Sampling::default() };
        for position in 0..4 {
            let expected = straightforward(&logits, &sampling, &[], &seed, position);
            prop_assert_eq!(sample(&mut logits.clone(), &sampling, &[], &seed, position).ok(), expected);
        }
    }
}

fn warm() -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::default() }
}

#[test]
fn a_key_is_the_hash_of_seed_and_choice() {
    let seed = [3; 32];
    let expected = Sha256::digest([&seed[..], &258u32.to_le_bytes()].concat());
    assert_eq!(key(&seed, 258), <[u8; 32]>::from(expected));
    assert_ne!(key(&seed, 0), key(&seed, 1));
}

#[test]
fn temperature_zero_takes_the_first_of_the_greatest_after_bias_and_penalties() {
    let greedy = Sampling::default();
    let pick = |logits: &[f32], sampling: &Sampling, generated: &[u32]| {
        sample(&mut logits.to_vec(), sampling, generated, &[0; 32], 0)
    };
    assert_eq!(pick(&[1.0, 3.0, 3.0], &greedy, &[]), Ok(1));
    assert_eq!(pick(&[-0.0, 0.0], &greedy, &[]), Ok(0));
    let biased = Sampling { logit_bias: vec![(2, 0.5), (9, 100.0)], ..greedy.clone() };
    assert_eq!(pick(&[1.0, 3.0, 3.0], &biased, &[]), Ok(2));
    let penalised = Sampling { frequency_penalty: 0.5, presence_penalty: 0.25, ..greedy };
    assert_eq!(pick(&[2.0, 3.0], &penalised, &[1]), Ok(1));
    assert_eq!(pick(&[2.0, 3.0], &penalised, &[1, 1]), Ok(0));
    assert_eq!(pick(&[2.0, 3.0], &penalised, &[1, 1, 0, 7]), Ok(1));
}

#[test]
fn what_is_not_a_number_is_numeric() {
    let outcome = |logits: &[f32], sampling: &Sampling| sample(&mut logits.to_vec(), sampling, &[0], &[0; 32], 0);
    let sane = warm();
    assert_eq!(outcome(&[], &sane), Err(Numeric));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(outcome(&[0.0, bad], &sane), Err(Numeric));
        assert_eq!(outcome(&[0.0, bad], &Sampling::default()), Err(Numeric));
        assert_eq!(outcome(&[0.0, 1.0], &Sampling { logit_bias: vec![(1, bad)], ..sane.clone() }), Err(Numeric));
        assert_eq!(outcome(&[0.0, 1.0], &Sampling { presence_penalty: bad, ..sane.clone() }), Err(Numeric));
        assert_eq!(outcome(&[0.0, bad], &Sampling { logit_bias: vec![(1, -bad)], ..sane.clone() }), Err(Numeric));
    }
    for temperature in [f32::NAN, -1.0, 1e-40] {
        assert_eq!(outcome(&[0.0, 1.0], &Sampling { temperature, ..sane.clone() }), Err(Numeric));
    }
    assert_eq!(outcome(&[0.0], &Sampling { top_p: f32::NAN, ..sane }), Err(Numeric));
}

#[test]
fn top_k_and_top_p_of_almost_nothing_leave_the_greatest() {
    let logits = [0.0, 2.0, 1.0, 2.0];
    for sampling in [
        Sampling { top_k: 1, ..warm() },
        Sampling { top_p: 0.0, ..warm() },
        Sampling { top_p: -1.0, ..warm() },
        Sampling { temperature: 1e-3, top_p: 0.5, ..warm() },
    ] {
        for position in 0..50 {
            assert_eq!(sample(&mut logits.to_vec(), &sampling, &[], &[0; 32], position), Ok(1));
        }
    }
}

/// Four standard errors around the true probabilities.
#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u64 = 20_000;
    let logits = [0.0f32, 1.0, 2.0, -1.0];
    let total: f64 = logits.iter().map(|l| libm::exp(f64::from(*l))).sum();
    let mut counts = [0u64; 4];
    let key = key(&[9; 32], 0);
    for position in 0..DRAWS {
        let token = sample(&mut logits.to_vec(), &warm(), &[], &key, position).unwrap();
        counts[token as usize] += 1;
    }
    for (logit, count) in logits.iter().zip(counts) {
        let p = libm::exp(f64::from(*logit)) / total;
        let expected = p * DRAWS as f64;
        let deviation = (DRAWS as f64 * p * (1.0 - p)).sqrt();
        assert!((count as f64 - expected).abs() < 4.0 * deviation, "{counts:?}");
    }
}
