//! JSON of log-probabilities: the older form that completions have, and the one of chats.
//!
//! Tokens are shown by their text; one whose bytes are no text of their own as `bytes:\\xe2\\x80`, one that stands for no
//! text by its name in the tokenizer, and where there is no tokenizer as `token_id:7`.
//!
//! It refuses to know where log-probabilities come from.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use butterfly_kernels::LogProbs;
use butterfly_verify::Request;
use serde::{Serialize, Serializer};

use super::render::Form;
use crate::model::{Sampled, Tokenizer};

/// Log-probabilities of some tokens, in the form of completions.
#[derive(Debug, Default, Serialize)]
pub(super) struct Listed {
    /// The tokens.
    tokens: Vec<String>,
    /// Of each token that was chosen, or stands in the prompt; null for the first of a prompt, which follows nothing.
    token_logprobs: Vec<Option<f32>>,
    /// For each position the likeliest tokens, and the one that is there.
    top_logprobs: Vec<Option<Ranked>>,
    /// Where each token begins in the text, in characters.
    text_offset: Vec<usize>,
}

/// Log-probabilities of some tokens, in the form of chats.
#[derive(Debug, Serialize)]
pub(super) struct Detailed {
    content: Vec<Detail>,
    refusal: Option<()>,
}

/// One position.
#[derive(Debug, Serialize)]
struct Detail {
    #[serde(flatten)]
    chosen: Candidate,
    top_logprobs: Vec<Candidate>,
}

/// A token that was chosen, or might have been.
#[derive(Debug, Serialize)]
struct Candidate {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

/// Either form.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum LogProbJson {
    /// That of completions.
    Listed(Listed),
    /// That of chats.
    Detailed(Detailed),
}

/// From tokens to log-probabilities, likeliest first.
#[derive(Debug)]
struct Ranked(Vec<(String, f32)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, log_prob)| (token, log_prob)))
    }
}

/// Turns sampled tokens into JSON, one group after the other.
#[derive(Debug)]
pub(super) struct LogProbForms {
    form: Form,
    tokenizer: Option<Tokenizer>,
    /// Whether the request asks for any.
    are_wanted: bool,
    /// Characters of the text so far.
    offset: usize,
}

impl LogProbForms {
    /// For tokens of this tokenizer that answer a request, the first of which begins the text.
    #[must_use]
    pub(super) fn new(form: Form, tokenizer: Option<&Tokenizer>, request: &Request) -> Self {
        Self { form, tokenizer: tokenizer.cloned(), are_wanted: request.params.logprobs.is_some(), offset: 0 }
    }

    /// The next tokens; `None` if there are none, or nobody asked.
    pub(super) fn next(&mut self, sampled: &[Sampled]) -> Option<LogProbJson> {
        if !self.are_wanted || sampled.is_empty() {
            return None;
        }
        match self.form {
            Form::Completion => Some(LogProbJson::Listed(self.listed(sampled))),
            Form::Chat => self.detailed(sampled).map(LogProbJson::Detailed),
        }
    }

    fn detailed(&self, sampled: &[Sampled]) -> Option<Detailed> {
        let candidate = |id: u32, logprob: f32| {
            let tokenizer = self.tokenizer.as_ref();
            let bytes = tokenizer.map(|tokenizer| match tokenizer.special_text(id) {
                Some(text) => text.into_bytes(),
                None => tokenizer.token_bytes(id).to_vec(),
            });
            Candidate { token: self.name(id), logprob, bytes }
        };
        let details = sampled.iter().filter_map(|Sampled { token, logprobs }| {
            let logprobs = logprobs.as_deref()?;
            let top_logprobs = logprobs.top.iter().map(|(id, logprob)| candidate(*id, *logprob)).collect();
            Some(Detail { chosen: candidate(*token, logprobs.chosen), top_logprobs })
        });
        let content: Vec<Detail> = details.collect();
        (!content.is_empty()).then_some(Detailed { content, refusal: None })
    }

    fn listed(&mut self, sampled: &[Sampled]) -> Listed {
        let mut listed = Listed::default();
        for Sampled { token, logprobs } in sampled {
            let offset = self.offset;
            let bytes = self.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.token_bytes(*token));
            self.offset += bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
            let name = self.name(*token);
            listed.token_logprobs.push(logprobs.as_ref().map(|logprobs| logprobs.chosen));
            listed.top_logprobs.push(logprobs.as_ref().map(|logprobs| self.ranked(&name, logprobs)));
            listed.tokens.push(name);
            listed.text_offset.push(offset);
        }
        listed
    }

    fn ranked(&self, name: &str, logprobs: &LogProbs) -> Ranked {
        let mut seen = BTreeSet::new();
        let all = logprobs.top.iter().map(|(id, log_prob)| (self.name(*id), *log_prob));
        let all = all.chain([(name.to_owned(), logprobs.chosen)]);
        Ranked(all.filter(|(name, _)| seen.insert(name.clone())).collect())
    }

    fn name(&self, token: u32) -> String {
        let number = || format!("token_id:{token}");
        let Some(tokenizer) = &self.tokenizer else { return number() };
        let bytes = tokenizer.token_bytes(token);
        match std::str::from_utf8(bytes) {
            Ok("") => tokenizer.special_text(token).unwrap_or_else(number),
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut name, byte| {
                // Writing to a string cannot fail.
                let _ = write!(name, "\\x{byte:02x}");
                name
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::ingest::fixture::request;
    use crate::model::Model;

    fn sampled(token: u32, chosen: f32, top: &[(u32, f32)]) -> Sampled {
        Sampled { token, logprobs: Some(Box::new(LogProbs { chosen, top: top.to_vec() })) }
    }

    #[test]
    fn tokens_have_offsets_in_characters_and_names_without_losing_a_byte() {
        let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
        let tokenizer = model.tokenizer().unwrap();
        let crab = tokenizer.encode("🦀").unwrap();
        assert!(crab.len() > 1, "the crab is several tokens");
        let a = tokenizer.encode("a").unwrap()[0];
        let mut forms =
            LogProbForms { form: Form::Completion, tokenizer: Some(tokenizer.clone()), are_wanted: true, offset: 5 };
        let tokens: Vec<Sampled> = crab.iter().chain([&a]).map(|id| sampled(*id, -1.0, &[(a, -0.5)])).collect();
        let listed = json!(forms.next(&tokens).unwrap());
        assert_eq!(listed["tokens"].as_array().unwrap().last().unwrap(), "a");
        assert!(listed["tokens"][0].as_str().unwrap().starts_with("bytes:\\xf0"));
        assert_eq!(listed["text_offset"].as_array().unwrap().last().unwrap(), 6, "one character after five");
        assert_eq!(listed["top_logprobs"][0].as_object().unwrap().len(), 2, "the chosen token comes on top");
        let last = listed["top_logprobs"].as_array().unwrap().last().unwrap();
        assert_eq!(last, &json!({ "a": -0.5 }), "the chosen token is among the likeliest");
        let first = json!(forms.next(&[a.into()]).unwrap());
        assert_eq!(
            (&first["token_logprobs"], &first["top_logprobs"]),
            (&json!([null]), &json!([null])),
            "it follows none"
        );
        forms.are_wanted = false;
        assert!(forms.next(&[a.into()]).is_none(), "nobody asks");
    }

    #[test]
    fn in_chats_tokens_come_with_their_bytes() {
        let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
        let tokenizer = model.tokenizer().unwrap();
        let (crab, a) = (tokenizer.encode("🦀").unwrap()[0], tokenizer.encode("a").unwrap()[0]);
        let mut forms =
            LogProbForms { are_wanted: true, ..LogProbForms::new(Form::Chat, Some(tokenizer), &request(1, "")) };
        let detailed = json!(forms.next(&[sampled(a, -0.5, &[(a, -0.5), (crab, -1.5)])]).unwrap());
        let top = &detailed["content"][0]["top_logprobs"];
        assert_eq!((&detailed["content"][0]["token"], &top[0]["bytes"]), (&json!("a"), &json!([97])));
        assert_eq!((&top[1]["bytes"][0], &top[1]["logprob"]), (&json!(0xf0), &json!(-1.5)));
    }

    #[test]
    fn without_a_tokenizer_tokens_have_numbers() {
        let mut forms = LogProbForms { are_wanted: true, ..LogProbForms::new(Form::Completion, None, &request(1, "")) };
        let listed = json!(forms.next(&[sampled(7, -0.25, &[])]).unwrap());
        let expected = json!({
            "tokens": ["token_id:7"], "token_logprobs": [-0.25], "top_logprobs": [{ "token_id:7": -0.25 }], "text_offset": [0],
        });
        assert_eq!(listed, expected);
    }
}
