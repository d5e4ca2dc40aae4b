//! How likely the model found a token: log-softmax of the logits before sampling alters them.
//!
//! Invariants: like everything of the profile, a pure function with one order of operations: the greatest logit is
//! subtracted, the exponentials are summed in sixteen lanes, the logarithm is taken in f64 and rounded once.

use crate::Numeric;
use crate::lanes::{all_finite, argmax, sum_scalar};
use crate::math;
use crate::path::Path;
use crate::sample::greatest_first;

/// Natural logarithms of probabilities, of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens with theirs, likeliest first; of equals, the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// The log-probability of `chosen` and those of the `top` likeliest tokens, given the logits `[vocabulary]`.
///
/// # Errors
/// [`Numeric`] if a logit is a NaN or an infinity, or `chosen` has none.
pub fn log_probs(logits: &[f32], chosen: u32, top: usize) -> Result<LogProbs, Numeric> {
    if !all_finite(logits) {
        return Err(Numeric);
    }
    let greatest = logits[argmax(logits).ok_or(Numeric)?];
    let mut exponentials: Vec<f32> = logits.iter().map(|logit| logit - greatest).collect();
    math::exp_all(Path::detect().unwrap_or(Path::Scalar), &mut exponentials);
    // At least 1, the exponential of the greatest.
    let total = sum_scalar(exponentials.into_iter());
    let logarithm = libm::log(f64::from(total)) as f32;
    let log_prob = |id: u32| logits.get(id as usize).map(|logit| (logit - greatest) - logarithm);
    let ids = greatest_first(logits, top);
    Ok(LogProbs {
        chosen: log_prob(chosen).ok_or(Numeric)?,
        top: ids.into_iter().filter_map(|id| Some((id, log_prob(id)?))).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn log_probabilities_are_those_of_f64_and_the_top_is_in_order(
            logits in prop::collection::vec(-30.0..30.0_f32, 1..300),
            chosen in any::<prop::sample::Index>(),
            top in 0..25_usize,
        ) {
            let chosen = chosen.index(logits.len());
            let found = log_probs(&logits, chosen as u32, top).unwrap();
            let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            let exact = |id: usize| f64::from(logits[id]) - total.ln();
            prop_assert!((f64::from(found.chosen) - exact(chosen)).abs() < 2e-5);
            prop_assert_eq!(found.top.len(), top.min(logits.len()));
            for (id, log_prob) in &found.top {
                prop_assert!((f64::from(*log_prob) - exact(*id as usize)).abs() < 2e-5);
            }
            prop_assert!(found.top.windows(2).all(|pair| (pair[1].1, pair[0].0) < (pair[0].1, pair[1].0) || pair[1].1 < pair[0].1));
            if let Some((first, _)) = found.top.first() {
                prop_assert_eq!(Some(*first as usize), argmax(&logits));
            }
        }
    }

    #[test]
    fn equals_come_by_id_and_what_is_no_number_is_refused() {
        let found = log_probs(&[1.0, 2.0, 2.0, 1.0], 3, 3).unwrap();
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(log_probs(&[0.0; 4], 0, 0).unwrap(), LogProbs { chosen: -(4.0_f32.ln()), top: vec![] });
        for (logits, chosen) in [(&[f32::NAN, 1.0][..], 1), (&[f32::NEG_INFINITY, 1.0], 1), (&[1.0], 1), (&[], 0)] {
            assert_eq!(log_probs(logits, chosen, 1), Err(Numeric));
        }
    }
}
