//! Agreement with references that another implementation computed in f32 from the same weights.

use butterfly::model::{StepInput, Tokenizer};
use butterfly_kernels::{Path, Pool, argmax};
use serde::Deserialize;

use super::{data, logits, open, step, whole};

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Option<String>,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: Option<String>,
    last_logits: Vec<f32>,
}

/// Models of the repository that have a reference, and where it is.
const MODELS: [(&str, &str); 2] =
    [("builtin:tiny-rust", "tiny-rust-reference.json"), ("sharded-f16", "sharded-f16/reference.json")];

fn cases(file: &str) -> Vec<Case> {
    let reference: Reference = serde_json::from_slice(&std::fs::read(data(file)).unwrap()).unwrap();
    assert!(!reference.cases.is_empty());
    reference.cases
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect()
}

#[test]
fn the_tokenizer_gives_the_references_ids_and_their_bytes_give_back_the_text() {
    let model = open("builtin:tiny-rust");
    let tokenizer = model.tokenizer().unwrap();
    for case in cases("tiny-rust-reference.json") {
        let prompt = case.prompt.unwrap();
        assert_eq!(tokenizer.encode(&prompt).unwrap(), case.prompt_ids);
        assert_eq!(text(tokenizer, &case.prompt_ids), prompt.as_bytes());
        assert_eq!(text(tokenizer, &case.greedy_ids), case.greedy_text.unwrap().as_bytes());
    }
}

#[test]
fn greedy_tokens_of_every_prompt_are_the_references() {
    let pool = Pool::new(2, Path::detect().unwrap());
    for (model, reference) in MODELS {
        let slice = whole(&open(model));
        for (index, case) in cases(reference).into_iter().enumerate() {
            let mut sequence = slice.new_sequence();
            let mut next = logits(step(&slice, &pool, &mut sequence, StepInput::Tokens(&case.prompt_ids)));
            let mut tokens = Vec::new();
            while tokens.len() < case.greedy_ids.len() {
                let token = argmax(&next).unwrap() as u32;
                tokens.push(token);
                next = logits(step(&slice, &pool, &mut sequence, StepInput::Tokens(&[token])));
            }
            assert_eq!(tokens, case.greedy_ids, "{model}, case {index}");
        }
    }
}

#[test]
fn the_scalar_path_with_f32_keys_and_values_is_within_1e_4_of_the_reference() {
    // The definition computes fma in software unless the build assumes the instruction. A long prompt takes the vector
    // path, which has the definition's bits.
    const SCALAR_TOKENS_MAX: usize = 24;
    let pools = [Path::Scalar, Path::detect().unwrap()].map(|path| Pool::new(2, path));
    for (model, reference) in MODELS {
        let slice = whole(&open(model));
        for (index, case) in cases(reference).into_iter().enumerate() {
            let pool = &pools[usize::from(case.prompt_ids.len() > SCALAR_TOKENS_MAX)];
            let mut sequence = slice.new_reference_sequence();
            let found = logits(step(&slice, pool, &mut sequence, StepInput::Tokens(&case.prompt_ids)));
            let difference = difference(&found, &case.last_logits);
            assert!(difference <= 1e-4, "{model}, case {index}: {difference}");
        }
    }
}

#[test]
fn the_profile_is_within_two_thousandths_of_the_greatest_logit_of_the_reference() {
    let pool = Pool::new(2, Path::detect().unwrap());
    for (model, reference) in MODELS {
        let slice = whole(&open(model));
        for (index, case) in cases(reference).into_iter().enumerate() {
            let mut sequence = slice.new_sequence();
            let found = logits(step(&slice, &pool, &mut sequence, StepInput::Tokens(&case.prompt_ids)));
            let difference = difference(&found, &case.last_logits);
            let greatest = case.last_logits.iter().fold(0.0_f32, |max, logit| max.max(logit.abs()));
            assert!(difference <= 2e-3 * greatest, "{model}, case {index}: {difference} of {greatest}");
        }
    }
}

/// The greatest absolute difference.
fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).fold(0.0, |max, (left, right)| (left - right).abs().max(max))
}
