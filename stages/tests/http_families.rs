//! The llama family over HTTP: the tokens and the first log-probability that another implementation computed, on one slice
//! and on two, with and without replicas.
//!
//! One model with a reference is in the repository. `BUTTERFLY_LLAMA_CASES` names a folder of more of them, each a folder
//! with `config.json`, weights and `reference.json`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use butterfly::loopback::Loopback;
use serde_json::{Value, json};
use support::{call, receipt_id, token_ids, verified};

fn models() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sharded-f16");
    let more = std::env::var_os("BUTTERFLY_LLAMA_CASES").map(PathBuf::from);
    let mut models: Vec<PathBuf> = more.iter().flat_map(|folder| support::folder(folder)).collect();
    assert!(more.is_none() || !models.is_empty(), "{more:?} has no models");
    models.push(own);
    models.sort();
    models
}

/// Prompt and greedy tokens of each case, and the logits of the first choice.
fn cases(model: &Path) -> Vec<(Vec<u32>, Vec<u32>, Vec<f64>)> {
    let reference: Value = serde_json::from_slice(&std::fs::read(model.join("reference.json")).unwrap()).unwrap();
    let floats = |list: &Value| list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<f64>>();
    let tokens = |list: &Value| floats(list).into_iter().map(|token| token as u32).collect::<Vec<u32>>();
    let cases = reference["cases"].as_array().unwrap().iter();
    cases.map(|case| (tokens(&case["prompt_ids"]), tokens(&case["greedy_ids"]), floats(&case["last_logits"]))).collect()
}

fn log_probability(logits: &[f64], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits[token as usize] - max - sum.ln()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_case_has_the_references_tokens_on_any_slices_with_any_replicas() {
    for model in models() {
        for (max_byzantine, slices) in [(0, 1), (0, 2), (1, 1), (1, 2)] {
            let place = format!("{} f={max_byzantine} slices={slices}", model.display());
            let model_name = model.to_str().unwrap().to_owned();
            let loopback = Loopback { model: model_name, max_byzantine, slices, ..Loopback::default() };
            let data = tempfile::tempdir().unwrap();
            let cluster = loopback.start(data.path()).await.unwrap();
            cluster.meshed().await;
            let http = cluster.http_address().unwrap();
            let epoch = std::sync::Arc::clone(&cluster.nodes[0].services().epoch);
            for (prompt, expected, logits) in cases(&model) {
                let body = json!({"prompt": prompt, "max_tokens": expected.len(), "temperature": 0, "ignore_eos": true,
                    "logprobs": 1, "return_token_ids": true});
                let (status, response) = call(http, "POST", "/v1/completions", Some(body)).await.unwrap();
                assert_eq!(status, 200, "{place}: {response}");
                assert_eq!(token_ids(&response), expected, "{place}");
                let found = response["choices"][0]["logprobs"]["token_logprobs"][0].as_f64().unwrap();
                let difference = (found - log_probability(&logits, expected[0])).abs();
                assert!(difference < 5e-3, "{place}: {difference}");
                let (_, _, receipt) = verified(http, &receipt_id(&response), &epoch).await;
                assert_eq!(receipt.slices.len(), slices);
            }
            cluster.shutdown().await.unwrap();
        }
    }
}
