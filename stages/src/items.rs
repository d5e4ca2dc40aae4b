//! What flows on the ports of the seven stages.
//!
//! Items carry request ids and shared request bodies; no HTTP type and no reply channel travels through the graph. The
//! size an item reports is what it pins in memory, because edges are bounded in bytes as well as in items.

mod view;

use std::sync::Arc;

use butterfly_engine::channel::Item;
use butterfly_topology::NodeId;
use butterfly_topology::plan::Plan;
use butterfly_verify::{Answer, CheckpointCertificate, Digest, Evidence, Input, NodeIndex, Receipt};
use serde_json::Value;

use crate::error::TaskError;
use crate::model::Sampled;

/// The digest of a request, its name everywhere in the cluster (`rd` in the protocol).
pub type RequestId = Digest;

/// A valid request that was admitted: ingest → partition.
#[derive(Debug, Clone)]
pub struct Request {
    /// Digest of `body`.
    pub rd: RequestId,
    /// The request with every default resolved; cheap to clone.
    pub body: butterfly_verify::Request,
    /// How urgent it is. No part of `body`: it changes when the answer comes, not what it is.
    pub priority: Priority,
}

/// How urgent a request is among those that wait: from 0, which goes last, to 9, which goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(u8);

impl Priority {
    /// The most urgent level.
    pub const MAX: u8 = 9;

    /// A level; `None` above [`Priority::MAX`].
    #[must_use]
    pub fn new(level: u8) -> Option<Self> {
        (level <= Self::MAX).then_some(Self(level))
    }

    /// The level.
    #[must_use]
    pub fn level(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(5)
    }
}

/// A request with the plan that will run it: partition → assign.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The request.
    pub request: Request,
    /// Slices and the replica sets that hold them.
    pub plan: Arc<Plan>,
}

/// A request that was given a permit and may run now: assign → transfer.
#[derive(Debug, Clone)]
pub struct Assigned {
    /// The request.
    pub request: Request,
    /// Slices and the replica sets that hold them.
    pub plan: Arc<Plan>,
    /// Counts the times this gateway started the request; replicas drop frames of earlier attempts.
    pub attempt: u32,
}

/// What one slice hands to another: compute → transfer, a feedback edge.
#[derive(Debug, Clone)]
pub struct Boundary {
    /// The request.
    pub rd: RequestId,
    /// The node whose request it is: another that sends the same one has it computed apart.
    pub gateway: NodeIndex,
    /// The attempt the values belong to.
    pub attempt: u32,
    /// The slice that takes them: the next one, slice 0 for a token that is fed back, any for the end.
    pub slice: u16,
    /// Position of the first row.
    pub position: u32,
    /// The values.
    pub values: BoundaryValues,
}

/// The values of a boundary, one row per position.
#[derive(Debug, Clone)]
pub enum BoundaryValues {
    /// Residual rows, `[rows, width]`, f32.
    Rows {
        /// Elements of one row.
        width: u32,
        /// The rows, row-major.
        rows: Arc<[f32]>,
    },
    /// Token ids that the last slice sampled.
    Tokens(Vec<u32>),
    /// The row at the boundary's position held a NaN or an infinity, and all that would follow depends on it.
    Numeric,
    /// The request is over: no row at the boundary's position or beyond will come.
    End,
}

/// What compute is asked to do: transfer → compute.
#[derive(Debug, Clone)]
pub enum Step {
    /// A request this node holds slices for; a known request with a later attempt starts anew.
    Open {
        /// Digest of `body`.
        rd: RequestId,
        /// The request.
        body: butterfly_verify::Request,
        /// The attempt.
        attempt: u32,
        /// The node that ingested it.
        gateway: NodeId,
    },
    /// Values from a replica of the neighbouring slice.
    Values {
        /// The replica that sent them, as authenticated by its link.
        from: NodeId,
        /// The values.
        boundary: Boundary,
    },
    /// The gateway wants no answer any more.
    Cancel {
        /// The request.
        rd: RequestId,
        /// The gateway that said so.
        gateway: NodeId,
    },
}

/// What compute found out: compute → consensus.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The last slice sampled these tokens; the gateway releases them when f+1 replicas agree.
    Delta {
        /// The request.
        rd: RequestId,
        /// The node that ingested it.
        gateway: NodeId,
        /// The attempt.
        attempt: u32,
        /// Index of the first of `tokens` among the generated ones, or among those of the prompt and them, if the request
        /// wants the prompt's log-probabilities.
        index: u32,
        /// The tokens.
        tokens: Vec<Sampled>,
    },
    /// A slice has seen every position of the request.
    Finished(Box<Finished>),
}

/// The outcome of one slice for one request.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The request.
    pub rd: RequestId,
    /// The node that ingested it.
    pub gateway: NodeId,
    /// The slice.
    pub slice: u16,
    /// Positions that passed the slice.
    pub positions: u32,
    /// Root of what went in.
    pub input_root: Digest,
    /// Root of what came out; for the last slice the root of `answer`.
    pub output_root: Digest,
    /// Running digest of the layers' inner values, for work tags; it never leaves the node.
    pub interior: Digest,
    /// The answer, from the last slice.
    pub answer: Option<Answer>,
}

/// What the replicas decided: consensus → commit.
#[derive(Debug, Clone)]
pub enum Decided {
    /// f+1 replicas of the last slice agree on these tokens.
    Progress {
        /// The request.
        rd: RequestId,
        /// Index of the first of `tokens` among the generated ones, or among those of the prompt and them, if the request
        /// wants the prompt's log-probabilities.
        index: u32,
        /// The tokens.
        tokens: Vec<Sampled>,
    },
    /// Every slice is certified.
    Certified {
        /// The request.
        rd: RequestId,
        /// The proof.
        receipt: Box<Receipt>,
        /// The answer it proves.
        answer: Box<Answer>,
    },
    /// No answer can be certified.
    Failed {
        /// The request.
        rd: RequestId,
        /// Why.
        error: TaskError,
    },
    /// A checkpoint of this gateway is to be kept.
    Checkpoint {
        /// The checkpoint, and who vouches for it.
        certificate: Box<CheckpointCertificate>,
        /// The number of its last receipt in the log.
        through: u64,
        /// Whether enough vouch for it.
        is_certified: bool,
    },
    /// A node was caught; kept beside the receipts.
    Accused {
        /// The signed votes that show it.
        evidence: Box<Evidence>,
    },
}

/// A request without its input, about.
const REQUEST_BYTES: usize = 512;

/// What a request weighs.
pub(crate) fn request_bytes(request: &butterfly_verify::Request) -> usize {
    let input = match &request.input {
        Input::Text { prompt: text, tokens } | Input::Chat { messages: text, tokens } => {
            text.len() + size_of_val(tokens.as_slice())
        }
        Input::Tokens { tokens } => size_of_val(tokens.as_slice()),
        Input::Vector { values } => size_of_val(values.as_slice()),
    };
    REQUEST_BYTES + input + size_of_val(request.params.logit_bias.as_slice())
}

impl Item for Request {
    fn size_bytes(&self) -> usize {
        request_bytes(&self.body)
    }

    fn view(&self, payload: bool) -> Value {
        view::request("request", self, payload)
    }
}

impl Item for Planned {
    fn size_bytes(&self) -> usize {
        self.request.size_bytes()
    }

    fn view(&self, payload: bool) -> Value {
        view::request("planned", &self.request, payload)
    }
}

impl Item for Assigned {
    fn size_bytes(&self) -> usize {
        self.request.size_bytes()
    }

    fn view(&self, payload: bool) -> Value {
        view::request("assigned", &self.request, payload)
    }
}

impl Item for Boundary {
    fn size_bytes(&self) -> usize {
        let values = match &self.values {
            BoundaryValues::Rows { rows, .. } => size_of_val::<[f32]>(rows),
            BoundaryValues::Tokens(tokens) => size_of_val(tokens.as_slice()),
            BoundaryValues::Numeric | BoundaryValues::End => 0,
        };
        size_of::<Self>() + values
    }

    fn view(&self, payload: bool) -> Value {
        view::boundary("boundary", self, payload)
    }
}

impl Item for Step {
    fn size_bytes(&self) -> usize {
        match self {
            Self::Open { body, .. } => request_bytes(body),
            Self::Values { boundary, .. } => boundary.size_bytes(),
            Self::Cancel { .. } => size_of::<Self>(),
        }
    }

    fn view(&self, payload: bool) -> Value {
        view::step(self, payload)
    }
}

impl Item for Outcome {
    fn size_bytes(&self) -> usize {
        match self {
            Self::Delta { tokens, .. } => size_of::<Self>() + sampled_bytes(tokens),
            Self::Finished(finished) => size_of::<Finished>() + finished.answer.as_ref().map_or(0, answer_bytes),
        }
    }

    fn view(&self, payload: bool) -> Value {
        view::outcome(self, payload)
    }
}

impl Item for Decided {
    fn size_bytes(&self) -> usize {
        match self {
            Self::Progress { tokens, .. } => size_of::<Self>() + sampled_bytes(tokens),
            Self::Certified { answer, receipt, .. } => {
                answer_bytes(answer) + receipt.slices.len() * SLICE_CERTIFICATE_BYTES
            }
            Self::Failed { .. } | Self::Checkpoint { .. } => size_of::<Self>(),
            Self::Accused { .. } => size_of::<Self>() + 2 * SLICE_CERTIFICATE_BYTES,
        }
    }

    fn view(&self, payload: bool) -> Value {
        view::decided(self, payload)
    }
}

fn sampled_bytes(tokens: &[Sampled]) -> usize {
    tokens.iter().map(Sampled::size_bytes).sum()
}

/// What an answer weighs.
pub(crate) fn answer_bytes(answer: &Answer) -> usize {
    size_of::<Answer>()
        + match answer {
            Answer::Text { tokens, text, .. } => size_of_val(tokens.as_slice()) + text.len(),
            Answer::Vector { values } => size_of_val(values.as_slice()),
            Answer::Numeric { tokens, .. } => size_of_val(tokens.as_slice()),
        }
}

/// What one slice's certificate weighs, about: a few votes of 200 bytes with paths of ten digests.
const SLICE_CERTIFICATE_BYTES: usize = 2048;
