//! Choosing the next token.
//!
//! The steps, in this order, are part of the profile: logit bias; penalties; temperature 0 ends here with the greatest
//! logit; division by the temperature; top-k; top-p; the draw. Wherever tokens are ranked, the greater logit comes
//! first, and of equal ones the lower id; +0.0 and -0.0 are equal.
//!
//! Invariants:
//! - Weights are integers, so their sums do not depend on the order, and every comparison of sums is exact.
//! - The draw depends on the key and the position alone, so whoever replays a sequence can start anywhere in it.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::Numeric;
use crate::lanes::{all_finite, argmax};
use crate::math;
use crate::path::Path;

/// 2^32: the weight of the greatest logit, and the unit of `top_p`.
const ONE: f32 = 4_294_967_296.0;

/// How to choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the greatest logit.
    pub temperature: f32,
    /// Only so many of the greatest logits stay; 0 keeps all.
    pub top_k: u32,
    /// Only the fewest of the greatest logits stay whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Subtracted once from the logit of each token generated so far.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token as often as it was generated so far.
    pub frequency_penalty: f32,
    /// Added to logits, in this order. Ids outside the vocabulary are passed over.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Sampling {
    /// The greatest logit, unaltered.
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

/// The key of all draws of one choice: SHA-256 of the seed and the choice index as four little-endian bytes.
pub fn key(seed: &[u8; 32], choice: u32) -> [u8; 32] {
    Sha256::new().chain_update(seed).chain_update(choice.to_le_bytes()).finalize().into()
}

/// Chooses the token at `position`, given the logits `[vocabulary]` and the tokens `generated` so far. The logits are
/// altered.
///
/// # Errors
/// [`Numeric`] if a logit is or becomes a NaN or an infinity, there are no logits, or the temperature is negative or the
/// temperature or `top_p` a NaN.
pub fn sample(
    logits: &mut [f32],
    sampling: &Sampling,
    generated: &[u32],
    key: &[u8; 32],
    position: u64,
) -> Result<u32, Numeric> {
    // A bias or a penalty on a NaN or an infinity never makes it finite, so one check after them covers both.
    apply_bias(logits, &sampling.logit_bias);
    apply_penalties(logits, sampling, generated);
    let temperature = sampling.temperature;
    if !all_finite(logits) || temperature.is_nan() || temperature < 0.0 || sampling.top_p.is_nan() {
        return Err(Numeric);
    }
    let greatest = argmax(logits).ok_or(Numeric)?;
    if temperature == 0.0 {
        return Ok(greatest as u32);
    }
    for logit in logits.iter_mut() {
        *logit /= temperature;
    }
    if !all_finite(logits) {
        return Err(Numeric);
    }
    // Division keeps the order, so the greatest is still the greatest.
    let weights = weights(logits, logits[greatest]);
    let kept = keep_top_p(keep_top_k(logits, sampling.top_k), &weights, sampling.top_p);
    Ok(draw(&kept, &weights, uniform(key, position)))
}

fn apply_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for (id, bias) in bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
}

/// `(logit - count · frequency) - presence` for every token generated so far.
fn apply_penalties(logits: &mut [f32], sampling: &Sampling, generated: &[u32]) {
    if sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0 {
        return;
    }
    let mut counts = BTreeMap::<u32, u32>::new();
    for id in generated {
        *counts.entry(*id).or_default() += 1;
    }
    for (id, count) in counts {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = *logit - count as f32 * sampling.frequency_penalty - sampling.presence_penalty;
        }
    }
}

/// `floor(exp(logit - greatest) · 2^32)` for each logit.
fn weights(logits: &[f32], greatest: f32) -> Vec<u64> {
    let mut exponentials: Vec<f32> = logits.iter().map(|logit| logit - greatest).collect();
    math::exp_all(Path::detect().unwrap_or(Path::Scalar), &mut exponentials);
    // The product with a power of two is exact, and the cast drops the fraction.
    exponentials.iter().map(|e| (e * ONE) as u64).collect()
}

/// Ids that stay, those of the `top_k` greatest logits, greatest first.
struct Ranked<'a> {
    logits: &'a [f32],
    ids: Vec<u32>,
    /// So many ids, from the front, are in order; the rest only come after them.
    ordered: usize,
}

impl Ranked<'_> {
    fn compare(logits: &[f32], a: u32, b: u32) -> Ordering {
        // Logits are finite here, so they always compare.
        let by_value = logits[b as usize].partial_cmp(&logits[a as usize]);
        by_value.unwrap_or(Ordering::Equal).then(a.cmp(&b))
    }

    /// Puts the first `count` ids in order.
    fn order(&mut self, count: usize) {
        let count = count.min(self.ids.len());
        if count <= self.ordered {
            return;
        }
        let logits = self.logits;
        let compare = |a: &u32, b: &u32| Self::compare(logits, *a, *b);
        let rest = &mut self.ids[self.ordered..];
        let wanted = count - self.ordered;
        if wanted < rest.len() {
            rest.select_nth_unstable_by(wanted, compare);
        }
        rest[..wanted].sort_unstable_by(compare);
        self.ordered = count;
    }
}

/// The ids of the `count` greatest logits, which are finite, greatest first.
pub(crate) fn greatest_first(logits: &[f32], count: usize) -> Vec<u32> {
    let mut ranked = Ranked { logits, ids: (0..logits.len() as u32).collect(), ordered: 0 };
    ranked.order(count);
    ranked.ids.truncate(count);
    ranked.ids
}

fn keep_top_k(logits: &[f32], top_k: u32) -> Ranked<'_> {
    let mut ranked = Ranked { logits, ids: (0..logits.len() as u32).collect(), ordered: 0 };
    let keep = top_k as usize;
    if keep > 0 && keep < ranked.ids.len() {
        ranked.order(keep);
        ranked.ids.truncate(keep);
    }
    ranked
}

/// Keeps the shortest prefix, of at least one id, with `cumulative · 2^32 ≥ round(top_p · 2^32) · total`, where round
/// takes ties away from zero.
fn keep_top_p(mut ranked: Ranked<'_>, weights: &[u64], top_p: f32) -> Vec<u32> {
    /// Ids put in order at a time, at first: few are needed as a rule, and ordering a whole vocabulary is slow.
    const FIRST_ORDERED: usize = 64;
    if top_p >= 1.0 {
        return ranked.ids;
    }
    let total: u64 = ranked.ids.iter().map(|id| weights[*id as usize]).sum();
    let target = (f64::from(top_p) * f64::from(ONE)).round() as u128 * u128::from(total);
    let mut cumulative = 0u64;
    let mut kept = 0;
    while kept < ranked.ids.len() {
        if kept == ranked.ordered {
            ranked.order((kept * 4).max(FIRST_ORDERED));
        }
        cumulative += weights[ranked.ids[kept] as usize];
        kept += 1;
        if u128::from(cumulative) << 32 >= target {
            break;
        }
    }
    ranked.ids.truncate(kept);
    ranked.ids
}

/// The first eight bytes, little-endian, of SHA-256 of the key and the position as eight little-endian bytes.
fn uniform(key: &[u8; 32], position: u64) -> u64 {
    let digest = Sha256::new().chain_update(key).chain_update(position.to_le_bytes()).finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

/// The token where the cumulative weight, walking ids in ascending order, exceeds `(uniform · total) >> 64`.
fn draw(kept: &[u32], weights: &[u64], uniform: u64) -> u32 {
    let mut ids = kept.to_vec();
    ids.sort_unstable();
    let total: u64 = ids.iter().map(|id| weights[*id as usize]).sum();
    let target = (u128::from(uniform) * u128::from(total)) >> 64;
    let mut cumulative = 0u64;
    for id in &ids {
        cumulative += weights[*id as usize];
        if u128::from(cumulative) > target {
            return *id;
        }
    }
    // Not reached: the greatest logit is always kept, so the total is positive and exceeds the target.
    kept[0]
}
