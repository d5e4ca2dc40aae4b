//! A loaded slice: a contiguous range of layers that computes.
//!
//! Purpose: one forward pass over steps of many sequences at once. The rows of all steps are concatenated for the linear
//! layers, which read each weight once; whatever looks at other positions does so per sequence.
//!
//! Invariants: what a step yields, and what it does to its sequence, is a function of the weights and of what that
//! sequence has seen. It does not depend on the neighbours in the batch, on how positions were dealt to steps, on the
//! number of threads, or on where the model was cut. A position with a NaN or an infinity ends its sequence there: the
//! positions before it count as if it had not come in the same step.
//!
//! It refuses to know where the rows came from and what the logits are for.

use std::ops::Range;

use butterfly_kernels::{CacheStorage, Pool, all_finite};

use super::bert::BertSlice;
use super::llama::LlamaSlice;
use super::mlp::MlpSlice;
use super::sequence::{Sequence, SequenceStep, Span, StepFault, StepInput, StepOutput};

/// A contiguous range of layers with packed weights.
#[derive(Debug)]
pub struct SliceModel {
    pub(super) root: [u8; 32],
    pub(super) range: Range<usize>,
    pub(super) context_length: usize,
    pub(super) layers: Layers,
}

#[derive(Debug)]
pub(super) enum Layers {
    Llama(Box<LlamaSlice>),
    Bert(Box<BertSlice>),
    Mlp(MlpSlice),
}

/// Why nothing was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// A step does not fit. No sequence was touched, so the others can be tried again without it.
    #[error("step {step}: {fault}")]
    Step {
        /// Its index.
        step: usize,
        /// What is wrong with it.
        fault: StepFault,
    },
    /// A library changed how this process rounds, so bits would differ from those of other nodes.
    #[error("the floating-point environment was changed (flush to zero, or another rounding mode)")]
    FloatEnvironment,
}

impl SliceModel {
    /// A sequence that has seen nothing. Its memory grows with its positions.
    #[must_use]
    pub fn new_sequence(&self) -> Sequence {
        self.sequence(CacheStorage::F16)
    }

    /// A sequence that keeps keys and values in f32: closer to references that do so, and **not** the profile. For tests.
    #[must_use]
    pub fn new_reference_sequence(&self) -> Sequence {
        self.sequence(CacheStorage::F32)
    }

    fn sequence(&self, storage: CacheStorage) -> Sequence {
        let caches = match &self.layers {
            Layers::Llama(slice) => slice.new_caches(storage),
            Layers::Bert(_) | Layers::Mlp(_) => Vec::new(),
        };
        let (root, layers) = (self.root, self.range.clone());
        Sequence { root, layers, caches, interior: Default::default(), position: 0, numeric: false }
    }

    /// The layers it holds, of the whole model.
    #[must_use]
    pub fn layers(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Whether tokens, or vectors, enter here.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.range.start == 0
    }

    /// Whether logits, or vectors, leave here.
    #[must_use]
    pub fn is_last(&self) -> bool {
        match &self.layers {
            Layers::Llama(slice) => slice.is_last(),
            Layers::Bert(slice) => slice.is_last(),
            Layers::Mlp(slice) => slice.is_last(),
        }
    }

    /// Memory of its packed weights.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        match &self.layers {
            Layers::Llama(slice) => slice.weight_bytes(),
            Layers::Bert(slice) => slice.weight_bytes(),
            Layers::Mlp(slice) => slice.weight_bytes(),
        }
    }

    /// Elements of the rows inside the first of its layers; of those that enter, unless tokens do.
    #[must_use]
    pub fn input_width(&self) -> usize {
        match &self.layers {
            Layers::Llama(slice) => slice.width(),
            Layers::Bert(slice) => slice.width(),
            Layers::Mlp(slice) => slice.input_width(),
        }
    }

    /// Elements of the rows that leave the last of its layers.
    #[must_use]
    pub fn output_width(&self) -> usize {
        match &self.layers {
            Layers::Llama(slice) => slice.width(),
            Layers::Bert(slice) => slice.width(),
            Layers::Mlp(slice) => slice.output_width(),
        }
    }

    /// Checks that a step can be taken; gives its number of positions.
    ///
    /// # Errors
    ///
    /// [`StepFault`].
    pub fn check(&self, sequence: &Sequence, input: StepInput<'_>) -> Result<usize, StepFault> {
        if sequence.root != self.root || sequence.layers != self.range {
            return Err(StepFault::ForeignSequence);
        }
        let vocabulary = match &self.layers {
            Layers::Llama(slice) => slice.vocabulary(),
            Layers::Bert(slice) => slice.vocabulary(),
            Layers::Mlp(_) => 0,
        };
        let rows = match (&self.layers, input, self.is_first()) {
            (Layers::Llama(_) | Layers::Bert(_), StepInput::Tokens(tokens), true) => {
                match tokens.iter().find(|token| **token as usize >= vocabulary) {
                    Some(token) => return Err(StepFault::Token { token: *token, vocabulary }),
                    None => tokens.len(),
                }
            }
            (Layers::Mlp(_), StepInput::Vector(values), true) | (_, StepInput::Rows(values), false) => {
                whole_rows(values, self.input_width())?
            }
            (Layers::Llama(_) | Layers::Bert(_), _, true) => return Err(StepFault::Kind { expected: "tokens" }),
            (Layers::Mlp(_), _, true) => return Err(StepFault::Kind { expected: "a vector" }),
            (_, _, false) => return Err(StepFault::Kind { expected: "rows" }),
        };
        if rows == 0 {
            return Err(StepFault::Empty);
        }
        if matches!(self.layers, Layers::Bert(_)) && sequence.position > 0 {
            return Err(StepFault::Whole);
        }
        if rows > self.context_length.saturating_sub(sequence.position) {
            let (position, context_length) = (sequence.position, self.context_length);
            return Err(StepFault::Context { position, rows, context_length });
        }
        Ok(rows)
    }

    /// Takes all steps in one pass and writes their outputs.
    ///
    /// # Errors
    ///
    /// [`ForwardError`]; then no sequence has changed and no output was written.
    pub fn forward(&self, pool: &Pool, steps: &mut [SequenceStep<'_>]) -> Result<(), ForwardError> {
        if !pool.float_environment_ok() {
            return Err(ForwardError::FloatEnvironment);
        }
        let mut counts = Vec::with_capacity(steps.len());
        for (index, step) in steps.iter().enumerate() {
            match self.check(step.sequence, step.input) {
                Ok(rows) => counts.push(rows),
                Err(fault) => return Err(ForwardError::Step { step: index, fault }),
            }
        }
        let mut batch = Vec::new();
        let (mut spans, mut ends) = (Vec::new(), Vec::new());
        let mut rows = 0;
        for (step, count) in steps.iter_mut().zip(counts) {
            if step.sequence.numeric {
                (step.output, step.scored) = (StepOutput::Numeric { rows: Vec::new() }, Vec::new());
                continue;
            }
            self.enter(step.input, count, &mut batch);
            ends.push((step.input, step.sequence.interior.clone(), &mut step.output, &mut step.scored));
            let (position, scoring) = (step.sequence.position, step.scoring.as_ref());
            let (range, scored) = (rows..rows + count, Vec::new());
            spans.push(Span { sequence: step.sequence, position, rows: range, finite: count, scoring, scored });
            rows += count;
        }
        let outputs = self.pass(pool, batch, &mut spans);
        for ((span, output), (input, interior, end, scored)) in spans.into_iter().zip(outputs).zip(ends) {
            *scored = span.scored;
            if span.finite == span.rows.len() {
                span.sequence.position += span.finite;
                *end = output;
            } else {
                // Undo the step, then take it again as far as it was finite: its digests and its cache must not know
                // which positions came together with the one that was not.
                span.sequence.interior = interior;
                span.sequence.caches.iter_mut().for_each(|cache| cache.truncate(span.position));
                *end = StepOutput::Numeric { rows: self.leading_rows(pool, span.sequence, input, span.finite) };
                span.sequence.numeric = true;
            }
        }
        Ok(())
    }

    /// Takes only the first positions of a step, which are known to be finite; gives their rows unless this slice is the
    /// last.
    fn leading_rows(&self, pool: &Pool, sequence: &mut Sequence, input: StepInput<'_>, count: usize) -> Vec<f32> {
        if count == 0 {
            return Vec::new();
        }
        let mut batch = Vec::new();
        self.enter(input, count, &mut batch);
        let position = sequence.position;
        let (rows, scored) = (0..count, Vec::new());
        let mut spans = [Span { sequence, position, rows, finite: count, scoring: None, scored }];
        let output = self.pass(pool, batch, &mut spans).pop();
        let [span] = spans;
        span.sequence.position += count;
        match output {
            Some(StepOutput::Rows(rows)) => rows,
            _ => Vec::new(),
        }
    }

    /// Appends the first `count` rows of a checked input to the batch.
    fn enter(&self, input: StepInput<'_>, count: usize, batch: &mut Vec<f32>) {
        match input {
            StepInput::Tokens(tokens) => {
                let tokens = tokens.get(..count).unwrap_or(tokens);
                match &self.layers {
                    Layers::Llama(slice) => slice.embed(tokens, batch),
                    Layers::Bert(slice) => slice.embed(tokens, batch),
                    Layers::Mlp(_) => {}
                }
            }
            StepInput::Rows(values) | StepInput::Vector(values) => {
                batch.extend_from_slice(values.get(..count * self.input_width()).unwrap_or(values));
            }
        }
    }

    /// Runs the layers over a batch; gives one output per span, of meaning only where all rows stayed finite.
    fn pass(&self, pool: &Pool, batch: Vec<f32>, spans: &mut [Span<'_>]) -> Vec<StepOutput> {
        if spans.is_empty() {
            return Vec::new();
        }
        let batch = match &self.layers {
            Layers::Llama(slice) => slice.run(pool, batch, spans),
            Layers::Bert(slice) => slice.run(pool, batch, spans),
            Layers::Mlp(slice) => slice.run(pool, batch, spans),
        };
        let width = self.output_width();
        let rows = |span: &Span<'_>| {
            batch.get(span.rows.start * width..span.rows.end * width).map_or_else(Vec::new, <[f32]>::to_vec)
        };
        match &self.layers {
            Layers::Llama(slice) if slice.is_last() => {
                slice.score(pool, &batch, spans);
                slice.logits(pool, &batch, spans).into_iter().map(StepOutput::Logits).collect()
            }
            Layers::Bert(slice) if slice.is_last() => {
                slice.vectors(pool, &batch, spans).into_iter().map(StepOutput::Vector).collect()
            }
            Layers::Mlp(slice) if slice.is_last() => spans.iter().map(|span| StepOutput::Vector(rows(span))).collect(),
            _ => spans.iter().map(|span| StepOutput::Rows(rows(span))).collect(),
        }
    }
}

fn whole_rows(values: &[f32], width: usize) -> Result<usize, StepFault> {
    if !values.len().is_multiple_of(width) {
        return Err(StepFault::Width { values: values.len(), width });
    }
    if !all_finite(values) {
        return Err(StepFault::NotFinite);
    }
    Ok(values.len() / width)
}
