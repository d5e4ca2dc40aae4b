//! One sequence's state in one slice, and one step of it.
//!
//! Invariants: a sequence belongs to the slice that made it; its state is a function of the positions it has seen, not of
//! the steps in which it saw them. After a NaN or an infinity it takes no further position.
//!
//! It refuses to know requests, sampling and whose rows it is given.

use std::ops::Range;

use butterfly_kernels::{KvCache, LogProbs};
use butterfly_verify::Interior;

/// The state of one sequence in one slice: keys and values of its layers, and the running digest of what went on inside.
#[derive(Debug)]
pub struct Sequence {
    /// The slice it belongs to.
    pub(super) root: [u8; 32],
    pub(super) layers: Range<usize>,
    /// One for each layer that attends.
    pub(super) caches: Vec<KvCache>,
    pub(super) interior: Interior,
    pub(super) position: usize,
    /// The position after the last one seen has a NaN or an infinity.
    pub(super) numeric: bool,
}

/// One step of one sequence: some positions in, their results out.
#[derive(Debug)]
pub struct SequenceStep<'a> {
    /// The sequence; no two steps of a call have the same.
    pub sequence: &'a mut Sequence,
    /// What enters the slice.
    pub input: StepInput<'a>,
    /// Which tokens the last slice of a model that generates is to say the likelihood of.
    pub scoring: Option<Scoring>,
    /// What leaves it; written by the forward pass.
    pub output: StepOutput,
    /// How likely each of the tokens in `scoring` was; `None` where the logits hold a NaN or an infinity. Empty from other
    /// slices, and where a position has one.
    pub scored: Vec<Option<LogProbs>>,
}

/// Tokens that are known to follow a step's positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scoring {
    /// The token after each of the step's first positions.
    pub next: Vec<u32>,
    /// How many of the likeliest tokens to name beside each.
    pub top: usize,
}

/// What enters a slice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepInput<'a> {
    /// Token ids of consecutive positions, into the first slice.
    Tokens(&'a [u32]),
    /// Rows of consecutive positions from the slice before, f32 `[positions, width]`.
    Rows(&'a [f32]),
    /// The input vector of a dense network, into the first slice.
    Vector(&'a [f32]),
}

/// What leaves a slice.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutput {
    /// Nothing yet.
    Pending,
    /// Rows for the next slice, f32 `[positions, width]`, all finite.
    Rows(Vec<f32>),
    /// From the last slice: the logits of the last of the positions, f32 `[vocabulary]`. They may hold a NaN or an
    /// infinity, which sampling refuses, so that logits nobody samples from do not end a request.
    Logits(Vec<f32>),
    /// From the last slice: the output vector of a dense network or of an encoder, all finite.
    Vector(Vec<f32>),
    /// A position has a NaN or an infinity.
    Numeric {
        /// The rows of the positions before that one, f32 `[fewer positions, width]`; empty from the last slice.
        rows: Vec<f32>,
    },
}

/// Why a step cannot be taken: the input does not fit the model or the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StepFault {
    /// The sequence belongs to another slice.
    #[error("the sequence belongs to another slice")]
    ForeignSequence,
    /// Tokens for a slice that takes rows, say.
    #[error("this slice takes {expected}")]
    Kind {
        /// What it takes.
        expected: &'static str,
    },
    /// No position.
    #[error("the step has no positions")]
    Empty,
    /// A token the model has no embedding for.
    #[error("token {token} is outside the vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Ids are below this.
        vocabulary: usize,
    },
    /// The values are not whole rows.
    #[error("{values} values are not rows of {width}")]
    Width {
        /// Values given.
        values: usize,
        /// Elements of a row.
        width: usize,
    },
    /// More positions than the model has.
    #[error("{rows} positions after {position} exceed the context of {context_length}")]
    Context {
        /// Positions seen before.
        position: usize,
        /// Positions of the step.
        rows: usize,
        /// Positions at most.
        context_length: usize,
    },
    /// A text came in parts, to an encoder.
    #[error("a text is one step of an encoder, and this sequence has had its text")]
    Whole,
    /// A value is NaN or infinite. An honest slice never sends one.
    #[error("a value is NaN or infinite")]
    NotFinite,
}

impl Sequence {
    /// Positions seen, all of them finite.
    #[must_use]
    pub fn position(&self) -> u32 {
        // At most CONTEXT_MAX.
        u32::try_from(self.position).unwrap_or(u32::MAX)
    }

    /// Digest of each layer's inner values over the positions seen: of the residual after attention, or of a dense
    /// layer's activations. It does not depend on how the positions came in steps or batches.
    #[must_use]
    pub fn interior(&self) -> [u8; 32] {
        self.interior.finish().0
    }

    /// Memory of its keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }

    /// Whether a NaN or an infinity ended it.
    #[must_use]
    pub fn is_numeric(&self) -> bool {
        self.numeric
    }
}

impl<'a> SequenceStep<'a> {
    /// A step not yet taken.
    #[must_use]
    pub fn new(sequence: &'a mut Sequence, input: StepInput<'a>) -> Self {
        Self { sequence, input, scoring: None, output: StepOutput::Pending, scored: Vec::new() }
    }

    /// The same, told which tokens follow.
    #[must_use]
    pub fn scoring(mut self, scoring: Option<Scoring>) -> Self {
        self.scoring = scoring;
        self
    }
}

/// The rows of one step within a batch.
#[derive(Debug)]
pub(super) struct Span<'a> {
    pub(super) sequence: &'a mut Sequence,
    /// Position of the first row.
    pub(super) position: usize,
    /// Where its rows lie in the batch.
    pub(super) rows: Range<usize>,
    /// Leading rows without a NaN or an infinity so far. No row depends on a later one, so these are right whatever the
    /// others hold.
    pub(super) finite: usize,
    pub(super) scoring: Option<&'a Scoring>,
    /// What came of `scoring`.
    pub(super) scored: Vec<Option<LogProbs>>,
}

impl Span<'_> {
    /// The finite rows, as a range of elements of a batch with rows of `width`.
    pub(super) fn finite_elements(&self, width: usize) -> Range<usize> {
        let first = self.rows.start * width;
        first..first + self.finite * width
    }

    /// Looks for a NaN or an infinity in the rows that were finite until now.
    pub(super) fn settle(&mut self, batch: &[f32], width: usize) {
        let rows = batch.get(self.finite_elements(width)).unwrap_or_default();
        if butterfly_kernels::all_finite(rows) {
            return;
        }
        self.finite = rows.chunks(width).take_while(|row| butterfly_kernels::all_finite(row)).count();
    }
}
