//! What the load asks for. Every request is distinct, so that no cache answers.

use bytes::Bytes;
use clap::ValueEnum;
use serde_json::json;

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Vectors through the built-in dense layers, `POST /inference`.
    Mlp,
    /// Streamed text, `POST /v1/completions`.
    Completions,
}

const PROMPTS: [&str; 6] = [
    "Ownership is",
    "A trait object",
    "The borrow checker",
    "fn main() {\n    let",
    "Cargo is the package manager",
    "Unsafe code can",
];

impl Workload {
    /// The model that answers it.
    pub(crate) fn model(self) -> &'static str {
        match self {
            Self::Mlp => "builtin:mlp",
            Self::Completions => "builtin:tiny-rust",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Completions => "completions",
        }
    }

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Mlp => "/inference",
            Self::Completions => "/v1/completions",
        }
    }

    pub(crate) fn is_stream(self) -> bool {
        self == Self::Completions
    }

    /// The body of the request with this index.
    pub(crate) fn body(self, index: u64, max_tokens: u32) -> Bytes {
        let body = match self {
            Self::Mlp => {
                let input: Vec<f32> = (0..INPUT_WIDTH).map(|i| (index * 31 + i) as f32 % 97.0 / 97.0).collect();
                json!({ "input": input })
            }
            Self::Completions => {
                let prompt = PROMPTS[index as usize % PROMPTS.len()];
                json!({ "model": "tiny-rust", "prompt": format!("{prompt} {index}"), "max_tokens": max_tokens, "stream": true, "ignore_eos": true })
            }
        };
        Bytes::from(body.to_string())
    }
}

/// Inputs of the built-in dense layers.
const INPUT_WIDTH: u64 = 64;
