//! One request on one slice, from its opening to its outcome.
//!
//! A session is a pure machine: values go in through [`Session::offer`], [`Session::take_work`] hands out what may be
//! computed next, and [`Session::absorb`] turns what the forward pass yielded into effects. It knows no channel, no thread
//! and no clock. Its input and output roots, and so its vote, do not depend on how the work was cut into chunks.
//!
//! A NaN or an infinity ends a request with one canonical outcome. From its position on the slice computes nothing, hashes
//! the rest of its input, and passes on a marker instead of rows; bits of NaN enter no hash.

use std::sync::Arc;

use butterfly_kernels::LogProbs;
use butterfly_topology::NodeId;
use butterfly_verify::{Answer, BoundaryRoot, Digest, Input, NodeIndex, Request};

use crate::compute::Run;
use crate::compute::gate::{Gate, Offer};
use crate::compute::pass::Open;
use crate::items::{Boundary, BoundaryValues, Finished, Outcome, RequestId};
use crate::model::{
    Architecture, Generation, Messages, Model, Sampled, Scoring, Sequence, SliceModel, StepInput, StepOutput,
};

#[cfg(feature = "adversary")]
use crate::adversary::Behaviour;

/// Where a slice lies among the others, and who feeds it.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Index of the slice.
    pub(crate) slice: u16,
    /// Slices in all.
    pub(crate) slices: u16,
    /// Replicas of the slice before (for slice 0: of the last slice, which feeds tokens back).
    pub(crate) upstream: Vec<NodeId>,
    /// Replicas of the last slice, which say when the request is over.
    pub(crate) last: Vec<NodeId>,
    /// Equal values that let one pass.
    pub(crate) need: usize,
}

impl Place {
    fn is_first(&self) -> bool {
        self.slice == 0
    }

    fn is_last(&self) -> bool {
        self.slice + 1 == self.slices
    }
}

/// A row from the slice before, compared by its bits, since equality of floats is not equality of votes.
#[derive(Debug)]
enum Row {
    Values(Box<[f32]>),
    Numeric,
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Values(a), Self::Values(b)) => {
                bytemuck::cast_slice::<f32, u8>(a) == bytemuck::cast_slice::<f32, u8>(b)
            }
            (Self::Numeric, Self::Numeric) => true,
            _ => false,
        }
    }
}

/// What comes in beside the request itself.
#[derive(Debug)]
enum Feed {
    /// The request is all, or a single slice feeds its own tokens back.
    Own,
    /// First of several slices: tokens from the last.
    Tokens(Gate<u32>),
    /// A later slice: rows from the one before.
    Rows { gate: Gate<Row>, width: usize },
}

/// Input of one forward pass.
#[derive(Debug)]
pub(crate) enum Work {
    Tokens(Vec<u32>),
    Rows(Vec<f32>),
    Vector(Vec<f32>),
}

impl Work {
    pub(crate) fn as_input(&self) -> StepInput<'_> {
        match self {
            Self::Tokens(tokens) => StepInput::Tokens(tokens),
            Self::Rows(rows) => StepInput::Rows(rows),
            Self::Vector(values) => StepInput::Vector(values),
        }
    }
}

/// What a session wants done.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) boundaries: Vec<Boundary>,
    pub(crate) outcomes: Vec<Outcome>,
}

/// Why a request cannot be computed here; the node stays silent about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("the request's tokens are not what its prompt gives")]
    Tokens,
    #[error("the request does not fit the model: {0}")]
    Unfit(String),
}

/// One request on one slice.
pub(crate) struct Session {
    pub(crate) rd: RequestId,
    pub(crate) attempt: u32,
    pub(crate) gateway: NodeId,
    pub(crate) gateway_index: NodeIndex,
    place: Place,
    model: Arc<SliceModel>,
    sequence: Sequence,
    /// On the last slice of a model that generates.
    generation: Option<Generation>,
    /// The prompt, on the last slice, if the likelihood of its tokens is wanted.
    scored_prompt: Vec<u32>,
    /// How many of the likeliest tokens to name beside each of them.
    scored_top: usize,
    /// All positions are one step, since each depends on all.
    is_one_step: bool,
    feed: Feed,
    /// The total of positions, as the replicas of the last slice tell it.
    end: Gate<u32>,
    /// Total positions, once known.
    positions_total: Option<u32>,
    prompt_positions: u32,
    /// Input that may be computed now.
    tokens_ready: Vec<u32>,
    rows_ready: Vec<f32>,
    vector_ready: Option<Vec<f32>>,
    /// First position whose row from the slice before is not finite.
    input_numeric: Option<u32>,
    /// First position whose output is not finite.
    numeric: Option<u32>,
    input_root: BoundaryRoot,
    output_root: BoundaryRoot,
    answer: Option<Answer>,
    finished: bool,
    #[cfg(feature = "adversary")]
    behaviour: Option<Behaviour>,
}

/// Positions a request may come to, at most.
pub(crate) fn positions_max(body: &Request, context_length: usize) -> u32 {
    let context_length = u32::try_from(context_length).unwrap_or(u32::MAX);
    match body.input.tokens() {
        Some(prompt) => (prompt.len() as u32).saturating_add(body.params.max_tokens).min(context_length),
        None => 1,
    }
}

impl Session {
    /// Opens a request: renders and tokenises it again, because a replica vouches for that too.
    pub(crate) fn open(opened: &Open, place: Place, model: &Model, slice: Arc<SliceModel>) -> Result<Self, OpenError> {
        let body = &opened.body;
        admit(body, model)?;
        let (prompt, vector) = match &body.input {
            Input::Text { tokens, .. } | Input::Chat { tokens, .. } | Input::Tokens { tokens } => {
                (tokens.clone(), None)
            }
            Input::Vector { values } => (Vec::new(), Some(values.clone())),
        };
        let positions_max = positions_max(body, model.manifest().context_length);
        let prompt_positions = if vector.is_some() { 1 } else { prompt.len() as u32 };
        let generates = model.manifest().architecture == Architecture::Llama;
        let feed = if !place.is_first() {
            let gate = Gate::new(place.upstream.clone(), place.need, positions_max);
            Feed::Rows { gate, width: slice.input_width() }
        } else if place.is_last() || !generates {
            Feed::Own
        } else {
            let mut gate = Gate::new(place.upstream.clone(), place.need, positions_max);
            gate.skip_to(prompt_positions);
            Feed::Tokens(gate)
        };
        let is_generating = place.is_last() && generates;
        let first = place.is_first();
        Ok(Self {
            rd: opened.rd,
            attempt: opened.attempt,
            gateway: opened.gateway.clone(),
            gateway_index: opened.gateway_index,
            sequence: slice.new_sequence(),
            model: slice,
            generation: is_generating.then(|| Generation::new(body, model.manifest(), model.tokenizer())),
            scored_prompt: match is_generating && body.params.prompt_logprobs {
                true => prompt.clone(),
                false => Vec::new(),
            },
            scored_top: body.params.logprobs.unwrap_or(0).into(),
            is_one_step: model.manifest().architecture == Architecture::Bert,
            feed,
            end: Gate::new(place.last.clone(), place.need, 1),
            positions_total: (!generates).then_some(prompt_positions),
            prompt_positions,
            tokens_ready: if first { prompt } else { Vec::new() },
            rows_ready: Vec::new(),
            vector_ready: if first { vector } else { None },
            input_numeric: None,
            numeric: None,
            input_root: BoundaryRoot::new(),
            output_root: BoundaryRoot::new(),
            answer: None,
            finished: false,
            place,
            #[cfg(feature = "adversary")]
            behaviour: None,
        })
    }

    /// Makes the session lie.
    #[cfg(feature = "adversary")]
    pub(crate) fn misbehave(&mut self, behaviour: Option<Behaviour>) {
        self.behaviour = behaviour;
    }

    /// The request, and whose it is.
    pub(crate) fn run(&self) -> Run {
        (self.rd, self.gateway_index)
    }

    /// Whether the outcome has been told.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// The slice the session runs on.
    pub(crate) fn slice(&self) -> u16 {
        self.place.slice
    }

    /// Takes values from a replica of a neighbouring slice. Returns whether some differed from what others sent, which the
    /// votes will explain.
    pub(crate) fn offer(&mut self, from: &NodeId, boundary: &Boundary) -> bool {
        if boundary.slice != self.place.slice || self.finished {
            return false;
        }
        let position = boundary.position;
        let mut differs = false;
        match (&mut self.feed, &boundary.values) {
            (_, BoundaryValues::End) => {
                differs |= self.end.offer(from, 0, position) == Offer::Differs;
                if let Some(total) = self.end.take() {
                    self.positions_total = Some(total);
                }
            }
            (Feed::Tokens(gate), BoundaryValues::Tokens(tokens)) => {
                for (offset, token) in (0u32..).zip(tokens) {
                    differs |= gate.offer(from, position.saturating_add(offset), *token) == Offer::Differs;
                }
                while let Some(token) = gate.take() {
                    self.tokens_ready.push(token);
                }
            }
            (Feed::Rows { gate, width }, BoundaryValues::Rows { width: given, rows }) if *given as usize == *width => {
                for (offset, row) in (0u32..).zip(rows.chunks_exact(*width)) {
                    let offer = gate.offer(from, position.saturating_add(offset), Row::Values(row.into()));
                    differs |= offer == Offer::Differs;
                }
            }
            (Feed::Rows { gate, .. }, BoundaryValues::Numeric) => {
                differs |= gate.offer(from, position, Row::Numeric) == Offer::Differs;
            }
            _ => {}
        }
        self.take_rows();
        differs
    }

    fn take_rows(&mut self) {
        let Feed::Rows { gate, .. } = &mut self.feed else { return };
        while self.input_numeric.is_none() {
            let position = gate.next();
            match gate.take() {
                Some(Row::Values(row)) => self.rows_ready.extend_from_slice(&row),
                Some(Row::Numeric) => self.input_numeric = Some(position),
                None => break,
            }
        }
    }

    /// Whether there is input to compute on.
    pub(crate) fn has_work(&self) -> bool {
        let rows = self.rows_ready.len() / self.width_in();
        let is_enough = rows > 0 && (!self.is_one_step || rows as u32 == self.prompt_positions);
        !self.finished
            && self.numeric.is_none()
            && (!self.tokens_ready.is_empty() || is_enough || self.vector_ready.is_some())
    }

    /// Takes the input of the next forward pass, at most `rows_max` rows of it where it may be cut.
    pub(crate) fn take_work(&mut self, rows_max: usize) -> Option<Work> {
        if !self.has_work() {
            return None;
        }
        if let Some(vector) = self.vector_ready.take() {
            return Some(Work::Vector(vector));
        }
        let rows_max = if self.is_one_step { usize::MAX } else { rows_max };
        if !self.tokens_ready.is_empty() {
            let rest = self.tokens_ready.split_off(self.tokens_ready.len().min(rows_max));
            return Some(Work::Tokens(std::mem::replace(&mut self.tokens_ready, rest)));
        }
        let elements_max = rows_max.saturating_mul(self.width_in());
        let rest = self.rows_ready.split_off(self.rows_ready.len().min(elements_max));
        Some(Work::Rows(std::mem::replace(&mut self.rows_ready, rest)))
    }

    /// Whether the slice can take this input next.
    pub(crate) fn accepts(&self, input: StepInput<'_>) -> bool {
        self.model.check(&self.sequence, input).is_ok()
    }

    /// The state a forward pass advances.
    pub(crate) fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }

    /// Of which tokens a forward pass over `work` is to say how likely they were: those of the prompt after its positions.
    pub(crate) fn scoring(&self, work: &Work) -> Option<Scoring> {
        let rows = match work {
            Work::Tokens(tokens) => tokens.len(),
            Work::Rows(rows) => rows.len() / self.width_in(),
            Work::Vector(_) => 0,
        };
        let next = self.scored_prompt.get(self.input_root.positions() as usize..)?;
        let next: Vec<u32> = next.iter().skip(1).take(rows).copied().collect();
        (!next.is_empty()).then_some(Scoring { next, top: self.scored_top })
    }

    /// Takes what a forward pass over `work` yielded, and how likely the tokens of [`Session::scoring`] were.
    pub(crate) fn absorb(&mut self, work: &Work, output: StepOutput, scored: Vec<Option<LogProbs>>) -> Effects {
        let first_position = self.input_root.positions();
        self.hash_input(work);
        let mut effects = Effects::default();
        self.tell_prompt(first_position, scored, &mut effects);
        match output {
            StepOutput::Rows(rows) => self.pass_on(first_position, rows, &mut effects),
            StepOutput::Logits(logits) => self.sample(logits, &mut effects),
            StepOutput::Vector(values) => self.answer = Some(Answer::Vector { values }),
            StepOutput::Numeric { rows } => {
                let finite = (rows.len() / self.model.output_width().max(1)) as u32;
                if finite > 0 {
                    self.pass_on(first_position, rows, &mut effects);
                }
                self.become_numeric(first_position.saturating_add(finite), &mut effects);
            }
            StepOutput::Pending => {}
        }
        self.conclude(&mut effects);
        effects
    }

    /// Tells the outcome, if everything has been seen.
    pub(crate) fn conclude(&mut self, effects: &mut Effects) {
        if self.finished {
            return;
        }
        if self.numeric.is_none()
            && self.rows_ready.is_empty()
            && self.input_numeric.is_some_and(|position| position == self.input_root.positions())
        {
            self.become_numeric(self.input_root.positions(), effects);
        }
        if let Some(first) = self.numeric {
            self.finish_numeric(first, effects);
        }
        let positions = self.input_root.positions();
        let over = self.answer.is_some() || self.positions_total == Some(positions);
        if !over {
            return;
        }
        self.finished = true;
        let output_root = self.answer.as_ref().map_or_else(|| self.output_root.root(), Answer::root);
        effects.outcomes.push(Outcome::Finished(Box::new(Finished {
            rd: self.rd,
            gateway: self.gateway.clone(),
            slice: self.place.slice,
            positions,
            input_root: self.input_root.root(),
            output_root,
            interior: Digest(self.sequence.interior()),
            answer: self.answer.take(),
        })));
    }

    fn hash_input(&mut self, work: &Work) {
        let width = self.width_in();
        match work {
            Work::Tokens(tokens) => tokens.iter().for_each(|token| self.input_root.push_token(*token)),
            Work::Vector(values) => self.input_root.push_row(values),
            Work::Rows(rows) => rows.chunks_exact(width).for_each(|row| self.input_root.push_row(row)),
        }
    }

    fn width_in(&self) -> usize {
        match &self.feed {
            Feed::Rows { width, .. } => (*width).max(1),
            Feed::Own | Feed::Tokens(_) => 1,
        }
    }

    fn pass_on(&mut self, position: u32, rows: Vec<f32>, effects: &mut Effects) {
        let width = self.model.output_width().max(1);
        rows.chunks_exact(width).for_each(|row| self.output_root.push_row(row));
        let values = BoundaryValues::Rows { width: width as u32, rows: rows.into() };
        effects.boundaries.push(self.boundary(self.place.slice + 1, position, values));
    }

    /// Tells tokens of the prompt with how likely they were; with the first position also its own token, which follows none.
    fn tell_prompt(&mut self, position: u32, scored: Vec<Option<LogProbs>>, effects: &mut Effects) {
        let first = self.scored_prompt.first().filter(|_| position == 0).map(|first| Sampled::from(*first));
        let index = if position == 0 { 0 } else { position.saturating_add(1) };
        let next = self.scored_prompt.get((position as usize).saturating_add(1)..).unwrap_or_default();
        let next = next.iter().zip(scored);
        let next = next.map(|(token, found)| Sampled { token: *token, logprobs: found.map(Box::new) });
        let tokens: Vec<Sampled> = first.into_iter().chain(next).collect();
        if !tokens.is_empty() {
            self.tell(index, tokens, effects);
        }
    }

    fn tell(&self, index: u32, tokens: Vec<Sampled>, effects: &mut Effects) {
        let (rd, gateway, attempt) = (self.rd, self.gateway.clone(), self.attempt);
        effects.outcomes.push(Outcome::Delta { rd, gateway, attempt, index, tokens });
    }

    /// Samples the next token once every position before it has been seen, and feeds it back.
    fn sample(&mut self, mut logits: Vec<f32>, effects: &mut Effects) {
        let positions = self.input_root.positions();
        let Some(generation) = &mut self.generation else { return };
        let index = generation.tokens().len() as u32;
        if positions != self.prompt_positions.saturating_add(index) {
            return;
        }
        if generation.end_empty() {
            self.answer = generation.answer();
            self.tell_end(positions, effects);
            return;
        }
        let Ok(sampled) = generation.sample(&mut logits) else {
            self.become_numeric(positions.saturating_sub(1), effects);
            return;
        };
        let token = sampled.token;
        let is_last = generation.push(token).is_some();
        self.answer = generation.answer();
        self.tell((self.scored_prompt.len() as u32).saturating_add(index), vec![sampled], effects);
        if is_last {
            self.tell_end(positions, effects);
            return;
        }
        let fed = self.fed_back(token);
        if self.place.is_first() {
            self.tokens_ready.push(fed);
        } else {
            effects.boundaries.push(self.boundary(0, positions, BoundaryValues::Tokens(vec![fed])));
        }
    }

    /// Tells the other slices that the request is over after `positions`.
    fn tell_end(&self, positions: u32, effects: &mut Effects) {
        let others = (0..self.place.slices).filter(|slice| *slice != self.place.slice);
        effects.boundaries.extend(others.map(|slice| self.boundary(slice, positions, BoundaryValues::End)));
    }

    /// From `position` on nothing here is finite.
    fn become_numeric(&mut self, position: u32, effects: &mut Effects) {
        self.numeric = Some(position);
        if !self.place.is_last() {
            effects.boundaries.push(self.boundary(self.place.slice + 1, position, BoundaryValues::Numeric));
        }
    }

    /// Hashes the input that is left, without computing on it; when it is all there, the outcome is that there is none.
    fn finish_numeric(&mut self, first: u32, effects: &mut Effects) {
        let total = self.prompt_positions.max(first.saturating_add(1));
        let tokens = Work::Tokens(std::mem::take(&mut self.tokens_ready));
        self.hash_input(&tokens);
        let rows = Work::Rows(std::mem::take(&mut self.rows_ready));
        self.hash_input(&rows);
        if self.input_numeric.is_some() {
            while self.input_root.positions() < total {
                self.input_root.push_numeric();
            }
        }
        if self.input_root.positions() < total {
            return;
        }
        while self.output_root.positions() < total {
            self.output_root.push_numeric();
        }
        self.positions_total = Some(total);
        if self.place.is_last() {
            self.answer = match &mut self.generation {
                Some(generation) => {
                    generation.end_numeric();
                    generation.answer()
                }
                None => Some(Answer::Numeric {
                    tokens: Vec::new(),
                    prompt_tokens: if self.is_one_step { self.prompt_positions } else { 0 },
                    choice: 0,
                }),
            };
            self.tell_end(total, effects);
        }
    }

    fn boundary(&self, slice: u16, position: u32, values: BoundaryValues) -> Boundary {
        Boundary { rd: self.rd, gateway: self.gateway_index, attempt: self.attempt, slice, position, values }
    }

    #[cfg(feature = "adversary")]
    fn fed_back(&self, token: u32) -> u32 {
        self.behaviour.map_or(token, |behaviour| behaviour.feed_back(token))
    }

    #[cfg(not(feature = "adversary"))]
    fn fed_back(&self, token: u32) -> u32 {
        token
    }
}

/// Whether the model can run the request, and the request is what its prompt gives.
fn admit(body: &Request, model: &Model) -> Result<(), OpenError> {
    let manifest = model.manifest();
    let unfit = |why: String| Err(OpenError::Unfit(why));
    if body.model != manifest.name {
        return unfit(format!("it is for the model '{}'", body.model));
    }
    match (&body.input, manifest.architecture) {
        (Input::Vector { values }, Architecture::Mlp) if values.len() == manifest.input_width => Ok(()),
        (Input::Vector { values }, Architecture::Mlp) => {
            unfit(format!("its vector has {} values, the model takes {}", values.len(), manifest.input_width))
        }
        (
            Input::Text { tokens, .. } | Input::Chat { tokens, .. } | Input::Tokens { tokens },
            Architecture::Llama | Architecture::Bert,
        ) => {
            let generates = manifest.architecture == Architecture::Llama;
            if generates != body.generates() {
                return unfit(format!("it wants {} tokens generated", body.params.max_tokens));
            }
            let room = manifest.context_length.saturating_sub(usize::from(body.params.max_tokens > 0));
            if tokens.len() > room {
                return unfit(format!("{} tokens do not fit a context of {}", tokens.len(), manifest.context_length));
            }
            if let Some(token) = tokens.iter().find(|token| **token as usize >= manifest.vocabulary) {
                return unfit(format!("token {token} is outside the vocabulary of {}", manifest.vocabulary));
            }
            match (&body.input, model.tokenizer()) {
                (Input::Text { prompt, tokens }, Some(tokenizer)) => {
                    let again = tokenizer.encode(prompt).map_err(|error| OpenError::Unfit(error.to_string()))?;
                    if again == *tokens { Ok(()) } else { Err(OpenError::Tokens) }
                }
                (Input::Chat { messages, tokens }, _) => {
                    let again =
                        Messages::from_json(messages).and_then(|messages| model.chat_tokens(&messages, body.now_ms));
                    let again = again.map_err(|error| OpenError::Unfit(error.to_string()))?;
                    if again == *tokens { Ok(()) } else { Err(OpenError::Tokens) }
                }
                (Input::Text { .. }, None) => unfit("the model takes no text".into()),
                _ => Ok(()),
            }
        }
        (Input::Vector { .. }, Architecture::Llama | Architecture::Bert) => unfit("the model takes tokens".into()),
        (_, Architecture::Mlp) => unfit("the model takes a vector".into()),
    }
}
