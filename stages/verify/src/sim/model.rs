//! A model in miniature: causal, split in slices, and with a token loop.
//!
//! A row that a slice puts out depends on everything that went in up to its position, and a token on everything that
//! reached the last slice. That is all the protocol knows of a model.

use crate::answer::{Answer, Finish};
use crate::boundary::BoundaryRoot;
use crate::digest::Digest;
use crate::request::Request;

/// Tokens are below this; 0 ends a sequence.
const VOCABULARY: u32 = 7;

/// What passes at one position of a boundary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Element {
    Token(u32),
    Row([f32; 2]),
}

/// The weights, as far as they matter here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    pub(crate) weights: u64,
}

impl Model {
    fn mix(self, slice: usize, input: &Digest) -> u32 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.weights.to_le_bytes());
        hasher.update(&(slice as u64).to_le_bytes());
        hasher.update(&input.0);
        u32::from_le_bytes(hasher.finalize().as_bytes()[..4].try_into().unwrap())
    }

    /// The row that a slice puts out at the last position of its input.
    pub(crate) fn row(self, slice: usize, input: &Digest) -> [f32; 2] {
        let mixed = self.mix(slice, input);
        [(mixed & 0xffff) as f32, (mixed >> 16) as f32]
    }

    /// The token that the last slice samples at the last position of its input.
    pub(crate) fn token(self, slice: usize, input: &Digest) -> u32 {
        self.mix(slice, input) % VOCABULARY
    }

    /// What a slice computed inside on the way to the end of its input.
    pub(crate) fn interior(self, slice: usize, input: &Digest) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"interior");
        hasher.update(&self.weights.to_le_bytes());
        hasher.update(&(slice as u64).to_le_bytes());
        hasher.update(&input.0);
        Digest(*hasher.finalize().as_bytes())
    }

    /// Everything a slice that is not the last puts out for its input.
    pub(crate) fn rows(self, slice: usize, input: &[Element]) -> Vec<Element> {
        let mut root = BoundaryRoot::new();
        let row = |element: &Element| {
            push(&mut root, element);
            Element::Row(self.row(slice, &root.root()))
        };
        input.iter().map(row).collect()
    }

    /// What the last slice answers for its input: samples again at every position from the prompt's last, and stops where
    /// the rule says. `None` if the rule has not said stop when the input ends.
    pub(crate) fn replay(self, slice: usize, request: &Request, input: &[Element]) -> Option<(usize, Answer)> {
        let prompt = request.input.tokens().unwrap().len();
        let mut root = BoundaryRoot::new();
        let mut tokens = Vec::new();
        for (position, element) in input.iter().enumerate() {
            push(&mut root, element);
            if position + 1 < prompt {
                continue;
            }
            tokens.push(self.token(slice, &root.root()));
            if let Some(finish) = finish(request, &tokens) {
                return Some((position + 1, text_answer(request, tokens, finish)));
            }
        }
        None
    }
}

pub(crate) fn push(root: &mut BoundaryRoot, element: &Element) {
    match element {
        Element::Token(token) => root.push_token(*token),
        Element::Row(row) => root.push_row(row),
    }
}

/// The root of a whole stream.
pub(crate) fn root_of(stream: &[Element]) -> Digest {
    let mut root = BoundaryRoot::new();
    stream.iter().for_each(|element| push(&mut root, element));
    root.root()
}

/// The stop rule: token 0 ends a sequence, though not one of a single token.
pub(crate) fn finish(request: &Request, tokens: &[u32]) -> Option<Finish> {
    match tokens.last() {
        Some(0) if tokens.len() > 1 => Some(Finish::Stop),
        Some(_) if tokens.len() >= request.params.max_tokens as usize => Some(Finish::Length),
        _ => None,
    }
}

/// The answer that follows from tokens.
pub(crate) fn text_answer(request: &Request, tokens: Vec<u32>, finish: Finish) -> Answer {
    let text = tokens.iter().filter(|token| **token != 0).map(|token| b'a' + *token as u8).collect();
    let prompt_tokens = request.input.tokens().unwrap().len() as u32;
    Answer::Text { tokens, text, finish, prompt_tokens, choice: request.params.choice }
}
