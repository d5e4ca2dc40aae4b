//! One forward pass: what runs on the blocking thread.
//!
//! A pass opens new requests, takes one chunk of input from each of its sessions, runs the slices over them, and lets the
//! sessions take in what came out. Sessions of different requests share the pass and do not see each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use butterfly_kernels::{Path, Pool};
use butterfly_topology::NodeId;
use butterfly_topology::plan::Plan;
use butterfly_verify::NodeIndex;

use crate::compute::Run;
use crate::compute::session::{self, Effects, OpenError, Place, Session, Work};
use crate::items::RequestId;
use crate::model::{ForwardError, Model, Scoring, SequenceStep, SliceModel};

#[cfg(feature = "adversary")]
use crate::adversary::Behaviour;

/// Rows one session brings into a pass, so that a long prompt does not hold up the others.
const ROWS_PER_SESSION_MAX: usize = 64;

/// A request to open.
#[derive(Debug, Clone)]
pub(crate) struct Open {
    pub(crate) rd: RequestId,
    pub(crate) body: butterfly_verify::Request,
    pub(crate) attempt: u32,
    pub(crate) gateway: NodeId,
    pub(crate) gateway_index: NodeIndex,
}

impl Open {
    pub(crate) fn run(&self) -> Run {
        (self.rd, self.gateway_index)
    }
}

/// What a pass works on.
#[derive(Default)]
pub(crate) struct Pass {
    pub(crate) opens: Vec<Open>,
    pub(crate) sessions: Vec<Session>,
}

/// What came of it.
#[derive(Default)]
pub(crate) struct Passed {
    pub(crate) sessions: Vec<Session>,
    pub(crate) effects: Effects,
    pub(crate) refused: Vec<(Run, OpenError)>,
    /// The process cannot compute any more.
    pub(crate) fault: Option<ForwardError>,
}

/// The slices a node holds, loaded.
pub(crate) struct Slices {
    pub(crate) path: Path,
    model: Arc<Model>,
    held: BTreeMap<u16, Arc<SliceModel>>,
    replicas: Vec<Vec<NodeId>>,
    need: usize,
    #[cfg(feature = "adversary")]
    behaviour: Option<Behaviour>,
}

impl Slices {
    pub(crate) fn new(model: Arc<Model>, plan: &Plan, need: usize, path: Path) -> Self {
        let replicas = plan.slices.iter().map(|slice| slice.replicas.clone()).collect();
        Self {
            path,
            model,
            held: BTreeMap::new(),
            replicas,
            need,
            #[cfg(feature = "adversary")]
            behaviour: None,
        }
    }

    #[cfg(feature = "adversary")]
    pub(crate) fn misbehave(&mut self, behaviour: Option<Behaviour>) {
        self.behaviour = behaviour;
    }

    pub(crate) fn insert(&mut self, index: u16, slice: Arc<SliceModel>) {
        self.held.insert(index, slice);
    }

    pub(crate) fn indices(&self) -> Vec<u16> {
        self.held.keys().copied().collect()
    }

    /// Memory one session of a request may come to need, at most.
    pub(crate) fn session_bytes(&self, body: &butterfly_verify::Request) -> u64 {
        let manifest = self.model.manifest();
        let positions = u64::from(session::positions_max(body, manifest.context_length));
        let senders = self.replicas.first().map_or(1, Vec::len) as u64;
        let of_slice = |slice: &Arc<SliceModel>| {
            let costs = manifest.layer_costs.get(slice.layers()).unwrap_or_default();
            let kv: u64 = costs.iter().map(|cost| cost.kv_bytes_per_position).sum();
            // Rows may wait for agreement, one from every sender.
            let waiting = if slice.is_first() { 0 } else { 4 * slice.input_width() as u64 * senders };
            positions * (kv + waiting)
        };
        self.held.values().map(of_slice).max().unwrap_or(0)
    }

    fn place(&self, slice: u16) -> Place {
        let slices = self.replicas.len() as u16;
        let last = self.replicas.last().cloned().unwrap_or_default();
        let upstream = match slice.checked_sub(1) {
            Some(before) => self.replicas.get(usize::from(before)).cloned().unwrap_or_default(),
            None => last.clone(),
        };
        Place { slice, slices, upstream, last, need: self.need }
    }

    fn open(&self, open: &Open) -> Result<Vec<Session>, OpenError> {
        self.held
            .iter()
            .map(|(index, slice)| {
                let session = Session::open(open, self.place(*index), &self.model, Arc::clone(slice));
                #[cfg(feature = "adversary")]
                let session = session.map(|mut session| {
                    session.misbehave(self.behaviour);
                    session
                });
                session
            })
            .collect()
    }
}

impl Pass {
    /// Runs the pass. Blocks for as long as the arithmetic takes.
    pub(crate) fn run(self, slices: &Slices, pool: &Pool) -> Passed {
        let mut passed = Passed::default();
        let mut sessions = self.sessions;
        for open in &self.opens {
            #[cfg(feature = "adversary")]
            slices.behaviour.iter().for_each(|behaviour| behaviour.at_open());
            match slices.open(open) {
                Ok(opened) => sessions.extend(opened),
                Err(error) => passed.refused.push((open.run(), error)),
            }
        }
        for (index, slice) in &slices.held {
            let mut batch = Vec::new();
            for session in sessions.iter_mut().filter(|session| session.slice() == *index) {
                let work = session.take_work(ROWS_PER_SESSION_MAX);
                batch.extend(work.map(|work| (session, work)));
            }
            forward(slices, slice, pool, batch, &mut passed);
        }
        passed.sessions = sessions;
        passed
    }
}

fn forward(slices: &Slices, slice: &SliceModel, pool: &Pool, batch: Vec<(&mut Session, Work)>, passed: &mut Passed) {
    let (mut batch, unfit): (Vec<_>, Vec<_>) =
        batch.into_iter().partition(|(session, work)| session.accepts(work.as_input()));
    for (session, _) in unfit {
        passed.refused.push((session.run(), OpenError::Unfit("its values do not fit the slice".into())));
    }
    if batch.is_empty() {
        return;
    }
    let scoring: Vec<Option<Scoring>> = batch.iter().map(|(session, work)| session.scoring(work)).collect();
    let lies = lies(slices, &batch);
    let mut steps: Vec<SequenceStep<'_>> = batch
        .iter_mut()
        .zip(&lies)
        .zip(scoring)
        .map(|(((session, work), lie), scoring)| {
            let input = lie.as_ref().unwrap_or(work).as_input();
            SequenceStep::new(session.sequence_mut(), input).scoring(scoring)
        })
        .collect();
    if let Err(error) = slice.forward(pool, &mut steps) {
        // Every step has been checked, so what is left concerns the whole process.
        passed.fault = Some(error);
        return;
    }
    let outputs: Vec<_> = steps.into_iter().map(|step| (step.output, step.scored)).collect();
    for ((session, work), (output, scored)) in batch.into_iter().zip(outputs) {
        let did = session.absorb(&work, output, scored);
        passed.effects.boundaries.extend(did.boundaries);
        passed.effects.outcomes.extend(did.outcomes);
    }
}

/// The inputs a lying node really runs on.
#[cfg(feature = "adversary")]
fn lies(slices: &Slices, batch: &[(&mut Session, Work)]) -> Vec<Option<Work>> {
    batch.iter().map(|(_, work)| slices.behaviour.and_then(|behaviour| behaviour.other_input(work))).collect()
}

#[cfg(not(feature = "adversary"))]
fn lies(_: &Slices, batch: &[(&mut Session, Work)]) -> Vec<Option<Work>> {
    batch.iter().map(|_| None).collect()
}
