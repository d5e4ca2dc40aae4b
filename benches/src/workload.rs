//! What the load asks for. Every request is distinct, so that no cache of results answers.
//!
//! It refuses to know when requests leave.

use std::str::FromStr;

use bytes::Bytes;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::draw::Draw;

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Workload {
    /// Vectors through dense layers, `POST /inference`.
    Mlp,
    /// Streamed text, `POST /v1/completions`.
    Completions,
    /// Vectors of texts, `POST /v1/embeddings`.
    Embeddings,
    /// Streamed and whole completions, and `POST /inference` with a prompt: 6 : 2 : 2.
    Mixed,
}

/// One kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// `POST /inference` with `input`.
    Vector,
    /// `POST /v1/completions`, streamed.
    Stream,
    /// `POST /v1/completions`, answered at once.
    Whole,
    /// `POST /inference` with `prompt`.
    Prompt,
    /// `POST /v1/embeddings`.
    Embedding,
}

/// A number of tokens, or the distribution it is drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Length {
    /// Always this.
    Fixed(u32),
    /// Evenly from the first to the second, both included.
    Between(u32, u32),
    /// Normal, by mean and deviation; at least 1.
    Around(u32, u32),
}

/// What the bodies are made of.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) workload: Workload,
    /// The model's name in requests.
    pub(crate) model: String,
    pub(crate) seed: u64,
    pub(crate) prompt: Length,
    pub(crate) output: Length,
    /// Prompts are drawn from these token ids: the first and the last.
    pub(crate) token_ids: (u32, u32),
    /// Numbers in a vector.
    pub(crate) input_width: u32,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    /// Tokens of the prompt; words of it where the server tokenises.
    pub(crate) prompt: u32,
    pub(crate) output: u32,
    /// What makes it distinct.
    pub(crate) number: u64,
}

const WORDS: [&str; 16] = [
    "ownership",
    "borrow",
    "trait",
    "lifetime",
    "closure",
    "iterator",
    "crate",
    "module",
    "pattern",
    "future",
    "slice",
    "thread",
    "macro",
    "vector",
    "string",
    "result",
];

impl Workload {
    /// The model of an own cluster, unless another is given.
    pub(crate) fn model(self) -> Option<&'static str> {
        match self {
            Self::Mlp => Some("builtin:mlp"),
            Self::Completions | Self::Mixed => Some("builtin:tiny-rust"),
            Self::Embeddings => None,
        }
    }

    /// Requests per second, unless a rate is given.
    pub(crate) fn rate(self) -> f64 {
        match self {
            Self::Mlp => 500.0,
            Self::Embeddings => 50.0,
            Self::Completions | Self::Mixed => 5.0,
        }
    }

    fn kind(self, draw: &mut Draw) -> Kind {
        match self {
            Self::Mlp => Kind::Vector,
            Self::Completions => Kind::Stream,
            Self::Embeddings => Kind::Embedding,
            Self::Mixed => match draw.within(0, 9) {
                0..=5 => Kind::Stream,
                6..=7 => Kind::Whole,
                _ => Kind::Prompt,
            },
        }
    }
}

impl Kind {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Vector | Self::Prompt => "/inference",
            Self::Stream | Self::Whole => "/v1/completions",
            Self::Embedding => "/v1/embeddings",
        }
    }
}

impl Recipe {
    /// The request with this number.
    pub(crate) fn ask(&self, number: u64) -> Ask {
        let mut draw = Draw::new(self.seed, number);
        let kind = self.workload.kind(&mut draw);
        Ask { kind, prompt: self.prompt.draw(&mut draw), output: self.output.draw(&mut draw), number }
    }

    /// Its body.
    pub(crate) fn body(&self, ask: &Ask) -> Bytes {
        // Another sequence than the one the lengths came from.
        let mut draw = Draw::new(!self.seed, ask.number);
        let body = match ask.kind {
            Kind::Vector => {
                let input: Vec<f32> = (0..self.input_width).map(|_| draw.unit() as f32).collect();
                json!({ "input": input })
            }
            Kind::Stream | Kind::Whole => {
                let (first, last) = self.token_ids;
                let prompt: Vec<u32> = (0..ask.prompt).map(|_| draw.within(first, last)).collect();
                let mut body = json!({
                    "model": self.model, "prompt": prompt, "max_tokens": ask.output, "ignore_eos": true,
                    "seed": draw.next() >> 12,
                });
                if ask.kind == Kind::Stream {
                    body["stream"] = true.into();
                    body["return_token_ids"] = true.into();
                    body["stream_options"] = json!({ "include_usage": true });
                }
                body
            }
            Kind::Prompt => json!({
                "prompt": words(&mut draw, ask.prompt), "max_tokens": ask.output, "ignore_eos": true,
            }),
            Kind::Embedding => json!({ "model": self.model, "input": words(&mut draw, ask.prompt) }),
        };
        Bytes::from(body.to_string())
    }
}

/// This many words, the first of which no other request has.
fn words(draw: &mut Draw, count: u32) -> String {
    let mut text = format!("{:x}", draw.next());
    for _ in 1..count {
        text.push(' ');
        text.push_str(WORDS[(draw.next() % WORDS.len() as u64) as usize]);
    }
    text
}

impl Length {
    fn draw(self, draw: &mut Draw) -> u32 {
        match self {
            Self::Fixed(length) => length,
            Self::Between(from, to) => draw.within(from, to),
            Self::Around(mean, deviation) => {
                (f64::from(mean) + draw.normal() * f64::from(deviation)).round().max(1.0) as u32
            }
        }
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|length| *length > 0);
        let parsed = if let Some((from, to)) = text.split_once("..") {
            number(from).zip(number(to)).filter(|(from, to)| from <= to).map(|(from, to)| Self::Between(from, to))
        } else if let Some((mean, deviation)) = text.split_once('~') {
            number(mean).zip(number(deviation)).map(|(mean, deviation)| Self::Around(mean, deviation))
        } else {
            number(text).map(Self::Fixed)
        };
        parsed.ok_or_else(|| "a length is `128`, `16..256` (evenly), or `128~32` (mean and deviation)".into())
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(length) => write!(f, "{length}"),
            Self::Between(from, to) => write!(f, "{from}..{to}"),
            Self::Around(mean, deviation) => write!(f, "{mean}~{deviation}"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;

    pub(crate) fn recipe(workload: Workload) -> Recipe {
        Recipe {
            workload,
            model: "m".into(),
            seed: 3,
            prompt: Length::Between(4, 9),
            output: Length::Fixed(8),
            token_ids: (100, 110),
            input_width: 64,
        }
    }

    #[test]
    fn no_two_requests_are_the_same_and_each_can_be_made_again() {
        for workload in [Workload::Mlp, Workload::Completions, Workload::Embeddings, Workload::Mixed] {
            let recipe = recipe(workload);
            let body = |number| recipe.body(&recipe.ask(number));
            let bodies: BTreeSet<Bytes> = (0..500).map(body).collect();
            assert_eq!(bodies.len(), 500, "{workload:?}");
            assert_eq!(body(17), body(17));
        }
    }

    #[test]
    fn a_prompt_has_the_length_and_the_ids_it_should_have() {
        let recipe = recipe(Workload::Completions);
        let ask = recipe.ask(5);
        let body: serde_json::Value = serde_json::from_slice(&recipe.body(&ask)).unwrap();
        let prompt: Vec<u64> = body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        assert_eq!(prompt.len(), ask.prompt as usize);
        assert!(prompt.iter().all(|id| (100..=110).contains(id)));
        assert_eq!(body["max_tokens"], 8);
    }

    #[test]
    fn the_mixture_has_every_kind() {
        let recipe = recipe(Workload::Mixed);
        let kinds: Vec<Kind> = (0..1000).map(|number| recipe.ask(number).kind).collect();
        let share = |of| kinds.iter().filter(|kind| **kind == of).count();
        assert!((550..650).contains(&share(Kind::Stream)), "{}", share(Kind::Stream));
        assert!((150..250).contains(&share(Kind::Whole)) && (150..250).contains(&share(Kind::Prompt)));
    }

    #[test]
    fn lengths_are_read_and_drawn() {
        for (text, from, to) in [("7", 7, 7), ("3..5", 3, 5), ("20~4", 1, 60)] {
            let length: Length = text.parse().unwrap();
            assert_eq!(length.to_string(), text);
            let mut draw = Draw::new(1, 1);
            assert!((0..500).all(|_| (from..=to).contains(&length.draw(&mut draw))), "{text}");
        }
        for text in ["", "0", "5..3", "x", "1..", "~3", "-4"] {
            assert!(text.parse::<Length>().is_err(), "{text}");
        }
    }
}
