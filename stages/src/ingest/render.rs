//! JSON of answers: what a client is given besides failures.
//!
//! Invariants: whatever says that an answer is verified comes from its receipt.
//!
//! It refuses to know where answers come from.

use butterfly_verify::{Answer, Epoch, Finish, Mode, Receipt};
use serde::Serialize;

use super::board::Completed;
use super::logprobs::LogProbJson;

/// What backs an answer: the `butterfly` object of a response.
#[derive(Debug, Serialize)]
pub(super) struct Proof {
    /// The name of the receipt, which is the request's digest.
    pub receipt_id: String,
    /// What the receipt shows.
    pub verification: Verification,
    /// For each slice, the nodes whose votes are in the receipt.
    pub replicas: Vec<Voters>,
    /// Whether the answer was given to the same question before, and is given again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
}

/// What a receipt shows.
#[derive(Debug, Serialize)]
pub(super) struct Verification {
    /// How many votes the request asked for.
    pub mode: Mode,
    /// `certified`, or `unverified` when one node's word is all there is.
    pub status: &'static str,
    /// Digest of the epoch whose keys signed.
    pub epoch: String,
    /// How many nodes of a slice may lie without the answer being wrong.
    pub max_byzantine: u16,
}

/// The nodes that voted for what a slice gave.
#[derive(Debug, Serialize)]
pub(super) struct Voters {
    /// The slice.
    pub slice: usize,
    /// Ids of the nodes.
    pub nodes: Vec<String>,
}

impl Proof {
    /// Of an answer of this epoch.
    #[must_use]
    pub(super) fn of(completed: &Completed, epoch: &Epoch) -> Self {
        Self { cached: completed.cached, ..Self::new(&completed.receipt, epoch) }
    }

    /// Of a receipt of this epoch.
    #[must_use]
    pub(super) fn new(receipt: &Receipt, epoch: &Epoch) -> Self {
        let is_verified = receipt.mode != Mode::None && epoch.parts().max_byzantine > 0;
        let voters = |(slice, certificate): (usize, &butterfly_verify::SliceCertificate)| Voters {
            slice,
            nodes: certificate
                .votes
                .iter()
                .filter_map(|vote| epoch.member(vote.signer).map(|member| member.id.clone()))
                .collect(),
        };
        Self {
            receipt_id: receipt.rd.to_string(),
            verification: Verification {
                mode: receipt.mode,
                status: if is_verified { "certified" } else { "unverified" },
                epoch: receipt.epoch.to_string(),
                max_byzantine: if is_verified { epoch.parts().max_byzantine } else { 0 },
            },
            replicas: receipt.slices.iter().enumerate().map(voters).collect(),
            cached: false,
        }
    }
}

/// Tokens counted.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    /// Of an answer with text; none of another.
    #[must_use]
    pub(super) fn of(answer: &Answer) -> Option<Self> {
        match answer {
            Answer::Text { tokens, prompt_tokens, .. } => {
                let prompt_tokens = usize::try_from(*prompt_tokens).unwrap_or(usize::MAX);
                let completion_tokens = tokens.len();
                let total_tokens = prompt_tokens.saturating_add(completion_tokens);
                Some(Self { prompt_tokens, completion_tokens, total_tokens })
            }
            Answer::Vector { .. } | Answer::Numeric { .. } => None,
        }
    }
}

impl Usage {
    /// Takes in what an answer counts. A prompt counts once, however many choices there are for it.
    pub(super) fn add(&mut self, answer: &Answer) {
        let Some(other) = Self::of(answer) else { return };
        if matches!(answer, Answer::Text { choice: 0, .. }) {
            self.prompt_tokens = self.prompt_tokens.saturating_add(other.prompt_tokens);
        }
        self.completion_tokens = self.completion_tokens.saturating_add(other.completion_tokens);
        self.total_tokens = self.prompt_tokens.saturating_add(self.completion_tokens);
    }
}

/// Why an answer ended, as clients know it.
#[must_use]
pub(super) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// How answers to a route look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Text that goes on.
    Completion,
    /// Messages.
    Chat,
}

/// What is the same in all chunks of a response.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// How it looks.
    pub form: Form,
    /// The id of the first task.
    pub id: String,
    /// The model.
    pub model: String,
    /// When it was asked for, in seconds since 1970.
    pub created: u64,
}

/// A whole response with choices, or one chunk of a streamed one.
#[derive(Debug, Serialize)]
pub(super) struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    /// The choices, or none in the chunk that counts tokens.
    pub choices: Vec<Choice<'a>>,
    /// Tokens counted; `null` in chunks of a stream that will count them at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    /// What backs the one answer that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub butterfly: Option<&'a Proof>,
}

/// A choice, or a piece of one.
#[derive(Debug, Serialize)]
pub(super) struct Choice<'a> {
    /// Its place among the choices to all prompts.
    pub index: usize,
    /// What it says.
    #[serde(flatten)]
    pub words: Words<'a>,
    /// Log-probabilities, if asked for. Votes do not cover them.
    pub logprobs: Option<LogProbJson>,
    /// Why it ended, once it has.
    pub finish_reason: Option<&'static str>,
    /// The prompt's tokens, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
    /// The generated tokens, or the next of them, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
    /// What backs it, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub butterfly: Option<&'a Proof>,
}

/// What a choice says, as its form has it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Words<'a> {
    /// Text, or a piece of it.
    Text(&'a str),
    /// A message of the model.
    Message {
        /// Who speaks.
        role: &'static str,
        /// What is said.
        content: &'a str,
        /// A model says what it says.
        refusal: Option<()>,
    },
    /// A piece of a message.
    Delta {
        /// Who speaks, in the first piece.
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        /// What is said.
        #[serde(skip_serializing_if = "Option::is_none")]
        content: Option<&'a str>,
    },
}

/// The role of whatever the model says.
const ASSISTANT: &str = "assistant";

impl Form {
    /// A whole answer.
    #[must_use]
    pub(super) fn whole(self, text: &str) -> Words<'_> {
        match self {
            Self::Completion => Words::Text(text),
            Self::Chat => Words::Message { role: ASSISTANT, content: text, refusal: None },
        }
    }

    /// A piece of an answer, which may be empty.
    #[must_use]
    pub(super) fn piece(self, text: &str) -> Words<'_> {
        match self {
            Self::Completion => Words::Text(text),
            Self::Chat => Words::Delta { role: None, content: Some(text).filter(|text| !text.is_empty()) },
        }
    }

    /// What comes before the first piece.
    #[must_use]
    pub(super) fn beginning(self, text: &str) -> Words<'_> {
        match self {
            Self::Completion => Words::Text(text),
            Self::Chat => Words::Delta { role: Some(ASSISTANT), content: Some(text) },
        }
    }
}

impl Head {
    /// A whole response.
    #[must_use]
    pub(super) fn whole<'a>(&'a self, choices: Vec<Choice<'a>>) -> Completion<'a> {
        let object = match self.form {
            Form::Completion => "text_completion",
            Form::Chat => "chat.completion",
        };
        self.completion(object, choices)
    }

    /// A chunk of a stream.
    #[must_use]
    pub(super) fn chunk<'a>(&'a self, choices: Vec<Choice<'a>>) -> Completion<'a> {
        let object = match self.form {
            Form::Completion => "text_completion",
            Form::Chat => "chat.completion.chunk",
        };
        self.completion(object, choices)
    }

    fn completion<'a>(&'a self, object: &'static str, choices: Vec<Choice<'a>>) -> Completion<'a> {
        let Self { id, model, created, .. } = self;
        Completion { id, object, created: *created, model, choices, usage: None, butterfly: None }
    }
}

impl<'a> Choice<'a> {
    /// Words and nothing else.
    #[must_use]
    pub(super) fn new(index: usize, words: Words<'a>) -> Self {
        Self {
            index,
            words,
            logprobs: None,
            finish_reason: None,
            prompt_token_ids: None,
            token_ids: None,
            butterfly: None,
        }
    }
}

/// A task, as `/inference` shows it.
#[derive(Debug, Serialize)]
pub(super) struct Task<'a> {
    /// The client's name for it.
    pub task_id: &'a str,
    /// `queued`, `running`, `completed` or `failed`.
    pub status: &'static str,
    /// The model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<&'a str>,
    /// Tokens released so far, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// The vector.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<&'a [f32]>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Why the text ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<&'static str>,
    /// The generated tokens, if asked for or where there is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
    /// Tokens counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// The name of the receipt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt_id: Option<String>,
    /// What backs the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub butterfly: Option<Proof>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<serde_json::Value>,
}

impl<'a> Task<'a> {
    /// A task without an answer.
    #[must_use]
    pub(super) fn new(task_id: &'a str, status: &'static str) -> Self {
        Self {
            task_id,
            status,
            model: None,
            tokens: None,
            output: None,
            text: None,
            finish_reason: None,
            token_ids: None,
            usage: None,
            receipt_id: None,
            butterfly: None,
            error: None,
        }
    }

    /// A task with its answer. One that came to no number has none.
    #[must_use]
    pub(super) fn answered(task_id: &'a str, model: &'a str, answer: &'a Answer, proof: Proof) -> Self {
        let mut task = Self::new(task_id, "completed");
        task.model = Some(model);
        task.usage = Usage::of(answer);
        task.receipt_id = Some(proof.receipt_id.clone());
        task.butterfly = Some(proof);
        match answer {
            Answer::Text { tokens, text, finish, .. } => {
                task.text = Some(String::from_utf8_lossy(text).into_owned());
                task.finish_reason = Some(finish_reason(*finish));
                task.token_ids = Some(tokens);
            }
            Answer::Vector { values } => task.output = Some(values),
            Answer::Numeric { .. } => {}
        }
        task
    }
}
