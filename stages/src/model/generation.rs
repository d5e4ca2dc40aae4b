//! From logits to tokens, text and the answer.
//!
//! Purpose: sampling with the request's own randomness, the stop rule, and which text may be shown so far. It is a pure
//! machine: replicas and gateways run it over the same tokens and come to the same answer.
//!
//! Invariants: after each token the rule is end of sequence, then the earliest match of a stop string in the bytes of the
//! text so far, then length, in this order. Text is released once; released pieces joined are the answer's text, with
//! U+FFFD for bytes that are no UTF-8; a released piece neither ends inside a character nor holds any part of a stop
//! string that may still become whole.
//!
//! It refuses to know slices, votes and streams.

use butterfly_kernels::sample::{self, Sampling};
use butterfly_kernels::{Numeric, log_probs};
use butterfly_verify::limits::ANSWER_TEXT_BYTES_MAX;
use butterfly_verify::{Answer, Finish, Request};

use super::manifest::Manifest;
use super::sampled::Sampled;
use super::tokenizer::Tokenizer;

/// The generation of one answer. For a request with a vector there is nothing to generate.
#[derive(Debug, Clone)]
pub struct Generation {
    tokenizer: Option<Tokenizer>,
    sampling: Sampling,
    key: [u8; 32],
    stops: Vec<Vec<u8>>,
    /// Empty if the request generates past the end of sequence.
    eos: Vec<u32>,
    prompt_tokens: usize,
    choice: u32,
    /// The request's wish for log-probabilities.
    logprobs: Option<u8>,
    tokens_max: usize,
    tokens: Vec<u32>,
    text: Vec<u8>,
    /// Bytes of the text that were released.
    released: usize,
    end: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finished(Finish),
    Numeric,
}

impl Generation {
    /// Before the first token. Without a tokenizer the answer has tokens and no text.
    #[must_use]
    pub fn new(request: &Request, manifest: &Manifest, tokenizer: Option<&Tokenizer>) -> Self {
        let params = &request.params;
        let prompt_tokens = request.input.tokens().map_or(0, <[u32]>::len);
        let room = manifest.context_length.saturating_sub(prompt_tokens).max(1);
        Self {
            tokenizer: tokenizer.cloned(),
            sampling: Sampling {
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                presence_penalty: params.presence_penalty,
                frequency_penalty: params.frequency_penalty,
                logit_bias: params.logit_bias.clone(),
            },
            key: sample::key(&params.seed, params.choice),
            stops: params.stop.iter().filter(|stop| !stop.is_empty()).map(|stop| stop.clone().into_bytes()).collect(),
            eos: if params.ignore_eos { Vec::new() } else { manifest.eos.clone() },
            prompt_tokens,
            choice: params.choice,
            logprobs: params.logprobs,
            tokens_max: usize::try_from(params.max_tokens).unwrap_or(usize::MAX).min(room),
            tokens: Vec::new(),
            text: Vec::new(),
            released: 0,
            end: None,
        }
    }

    /// Chooses the next token from the logits of the position before it, f32 `[vocabulary]`, which are altered. It is not
    /// taken yet: give it to [`Generation::push`].
    ///
    /// # Errors
    ///
    /// [`Numeric`] if the logits hold a NaN or an infinity; the generation has then ended.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled, Numeric> {
        let sampled = self.try_sample(logits);
        if sampled.is_err() {
            self.end_numeric();
        }
        sampled
    }

    fn try_sample(&self, logits: &mut [f32]) -> Result<Sampled, Numeric> {
        let position = (self.prompt_tokens as u64).saturating_add(self.tokens.len() as u64);
        let unaltered = self.logprobs.map(|top| (logits.to_vec(), usize::from(top)));
        let token = sample::sample(logits, &self.sampling, &self.tokens, &self.key, position)?;
        let logprobs = unaltered.map(|(logits, top)| log_probs(&logits, token, top)).transpose()?;
        Ok(Sampled { token, logprobs: logprobs.map(Box::new) })
    }

    /// Ends the answer before its first token, if none is wanted. Says whether it did.
    pub fn end_empty(&mut self) -> bool {
        if self.tokens_max == 0 {
            self.end.get_or_insert(End::Finished(Finish::Length));
        }
        self.tokens_max == 0
    }

    /// Takes the next token; gives the reason if the answer ends with it. After the end nothing is taken.
    pub fn push(&mut self, token: u32) -> Option<Finish> {
        if self.end.is_none() {
            self.tokens.push(token);
            self.end = self.end_after(token).map(End::Finished);
        }
        self.finish()
    }

    /// Ends the answer because the forward pass met a NaN or an infinity.
    pub fn end_numeric(&mut self) {
        self.end.get_or_insert(End::Numeric);
    }

    fn end_after(&mut self, token: u32) -> Option<Finish> {
        if self.eos.contains(&token) {
            return Some(Finish::Stop);
        }
        let before = self.text.len();
        self.text.extend_from_slice(self.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.token_bytes(token)));
        if let Some(start) = self.stop_since(before) {
            self.text.truncate(start);
            return Some(Finish::Stop);
        }
        if self.text.len() > ANSWER_TEXT_BYTES_MAX {
            self.text.truncate(before);
            return Some(Finish::Length);
        }
        (self.tokens.len() >= self.tokens_max).then_some(Finish::Length)
    }

    /// Where the earliest stop string begins that ends after `before`.
    fn stop_since(&self, before: usize) -> Option<usize> {
        let starts = self.stops.iter().filter_map(|stop| {
            let from = before.saturating_sub(stop.len() - 1);
            let place = self.text.get(from..)?.windows(stop.len()).position(|window| window == stop)?;
            Some(from + place)
        });
        starts.min()
    }

    /// Text that may be shown and was not yet. At the end all that remains.
    pub fn take_text(&mut self) -> String {
        let end = if self.end.is_some() { self.text.len() } else { self.safe_end() };
        let fresh = self.text.get(self.released..end).unwrap_or_default();
        let text = String::from_utf8_lossy(fresh).into_owned();
        self.released = self.released.max(end);
        text
    }

    /// Up to where the text may be shown: not into what may become a stop string, and not into a character.
    fn safe_end(&self) -> usize {
        let mut end = self.text.len();
        for stop in &self.stops {
            // The longest end of the text that begins the stop string.
            let longest = (1..stop.len().min(self.text.len() + 1)).rev();
            let held =
                longest.into_iter().find(|length| stop.get(..*length).is_some_and(|begin| self.text.ends_with(begin)));
            end = end.min(self.text.len() - held.unwrap_or(0));
        }
        let fresh = self.text.get(self.released..end).unwrap_or_default();
        end - unfinished_character(fresh)
    }

    /// Why the answer ended; `None` while it goes on, and if it ended without one.
    #[must_use]
    pub fn finish(&self) -> Option<Finish> {
        match self.end {
            Some(End::Finished(finish)) => Some(finish),
            Some(End::Numeric) | None => None,
        }
    }

    /// The tokens so far, the last one included.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The answer; `None` while it goes on.
    #[must_use]
    pub fn answer(&self) -> Option<Answer> {
        let tokens = self.tokens.clone();
        let prompt_tokens = u32::try_from(self.prompt_tokens).unwrap_or(u32::MAX);
        let choice = self.choice;
        self.end.map(|end| match end {
            End::Finished(finish) => Answer::Text { tokens, text: self.text.clone(), finish, prompt_tokens, choice },
            End::Numeric => Answer::Numeric { tokens, prompt_tokens, choice },
        })
    }
}

/// Bytes at the end that begin a character and lack its rest: 0 to 3.
fn unfinished_character(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    // From the last byte back to the one that begins a character.
    let start = (tail..bytes.len()).rev().find(|at| bytes.get(*at).is_some_and(|byte| byte & 0xc0 != 0x80));
    let Some(last) = start.and_then(|start| bytes.get(start..)) else { return 0 };
    match std::str::from_utf8(last) {
        Err(error) if error.error_len().is_none() => last.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
