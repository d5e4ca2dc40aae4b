//! The compute stage: forward passes of the slices this node holds.
//!
//! Steps of many requests share a forward pass (continuous batching). One pass runs at a time, on a blocking thread; while
//! it runs the stage goes on taking steps, so compute and communication overlap and the decode loop cannot
//! deadlock: what the stage could not hand on yet waits in its own outbox, and while that is long no new pass begins. All
//! it keeps is bounded: sessions by the memory budget, steps of a session by its gates, and what has to wait for a session by a share
//! for each peer.
//!
//! Invariants: an outcome is a pure function of the request; how passes were batched, chunked or interleaved never shows.

mod gate;
mod pass;
mod session;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Item, Receiver, Sender};
use butterfly_engine::shutdown::DrainHold;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{Event, Mark};
use butterfly_engine::transport::{DownReason, PeerState};
use butterfly_kernels::Pool;
use butterfly_topology::NodeId;
use butterfly_verify::NodeIndex;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::task::{JoinError, JoinHandle};

pub(crate) use crate::compute::gate::Gate;
use crate::compute::pass::{Open, Pass, Passed, Slices};
use crate::compute::session::Session;
#[cfg(feature = "adversary")]
pub(crate) use crate::compute::session::Work;
use crate::compute::waiting::Waiting;
use crate::items::{Boundary, Outcome, RequestId, Step};
use crate::model::{ModelError, SliceModel};
use crate::services::Services;

/// Steps taken from the edge before a pass is begun.
const STEPS_AT_ONCE_MAX: usize = 256;
/// Requests that wait for memory.
const OPENING_MAX: usize = 4096;
/// Ended requests that are remembered, so that late values are not taken for early ones.
const ENDED_MAX: usize = 8192;
/// Effects that may wait to be handed on before no new pass begins.
const OUTBOX_MAX: usize = 256;
/// How often expired requests are looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// The stage.
pub struct ComputeStage {
    /// Steps in.
    pub steps: Receiver<Step>,
    /// Boundary values out.
    pub boundary: Sender<Boundary>,
    /// Outcomes out.
    pub outcome: Sender<Outcome>,
    /// Threads of a forward pass.
    pub threads: usize,
    /// Requests that share a pass.
    pub micro_batch: usize,
    /// Memory for open requests, in bytes.
    pub memory_max: u64,
    /// The node's shared things.
    pub services: Services,
}

/// A request, and the gateway whose request it is. A node that learns of another's request and sends it as its own has it
/// computed apart, and takes nothing away from the other.
type Run = (RequestId, NodeIndex);

/// A request of a gateway on a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    run: Run,
    slice: u16,
}

impl Key {
    /// Where values belong.
    fn of(boundary: &Boundary) -> Self {
        Self { run: (boundary.rd, boundary.gateway), slice: boundary.slice }
    }

    /// All slices of a request.
    fn all(run: Run) -> std::ops::RangeInclusive<Self> {
        Self { run, slice: 0 }..=Self { run, slice: u16::MAX }
    }
}

/// A session, or the place of one that a pass is working on.
struct Slot {
    attempt: u32,
    expires_ms: u64,
    reserved_bytes: u64,
    session: Option<Session>,
    queued: bool,
}

/// The last requests that ended here, with their attempts.
#[derive(Default)]
struct Ended {
    order: VecDeque<Run>,
    attempts: BTreeMap<Run, u32>,
}

impl Ended {
    /// Whether values of this attempt come too late. Those of a later one come early: the gateway starts the request anew.
    fn is_late(&self, boundary: &Boundary) -> bool {
        self.attempts.get(&Key::of(boundary).run).is_some_and(|attempt| boundary.attempt <= *attempt)
    }

    fn insert(&mut self, run: Run, attempt: u32) {
        if self.attempts.insert(run, attempt).is_none() {
            self.order.push_back(run);
        }
        if self.order.len() > ENDED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.attempts.remove(&oldest);
        }
    }
}

/// Everything the stage keeps between steps.
struct State {
    slices: Arc<Slices>,
    slots: BTreeMap<Key, Slot>,
    opening: VecDeque<Open>,
    ready: VecDeque<Key>,
    waiting: Waiting,
    ended: Ended,
    reserved_bytes: u64,
    memory_max: u64,
    boundaries: VecDeque<Boundary>,
    outcomes: VecDeque<Outcome>,
    services: Services,
    hold: Option<DrainHold>,
}

impl Stage for ComputeStage {
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        self.run_inner(context).boxed()
    }
}

impl ComputeStage {
    async fn run_inner(mut self: Box<Self>, context: StageContext) -> Result<(), StageError> {
        let slices = Arc::new(self.load().await?);
        let pool = Arc::new(Pool::new(self.threads, slices.path));
        let mut state = State::new(slices, self.memory_max, self.services.clone());
        let mut running: Option<JoinHandle<Passed>> = None;
        let mut began = context.clock.now();
        let mut next_sweep = context.clock.now() + SWEEP;
        context.ready();
        loop {
            if running.is_none() && !state.is_congested() {
                began = context.clock.now();
                running = state.next_pass(self.micro_batch).map(|pass| {
                    let (slices, pool) = (Arc::clone(&state.slices), Arc::clone(&pool));
                    tokio::task::spawn_blocking(move || pass.run(&slices, &pool))
                });
            }
            let _busy = running.is_some().then(|| context.states.busy());
            tokio::select! {
                passed = join(&mut running) => {
                    running = None;
                    let passed = passed.map_err(|error| StageError::environment("run a forward pass", error))?;
                    if let Some(fault) = passed.fault {
                        return Err(StageError::environment("run a forward pass", fault));
                    }
                    state.take_back(passed, context.clock.now().saturating_sub(began));
                }
                step = self.steps.recv() => match step {
                    Some(step) => {
                        let mut steps = vec![step];
                        self.steps.gather(&mut steps, STEPS_AT_ONCE_MAX).await;
                        steps.into_iter().for_each(|step| state.take(step));
                    }
                    None => break,
                },
                permit = self.boundary.reserve(state.boundary_bytes()), if !state.boundaries.is_empty() => {
                    let (Ok(permit), Some(boundary)) = (permit, state.boundaries.pop_front()) else { break };
                    if permit.send(boundary).is_err() {
                        break;
                    }
                }
                permit = self.outcome.reserve(state.outcome_bytes()), if !state.outcomes.is_empty() => {
                    let (Ok(permit), Some(outcome)) = (permit, state.outcomes.pop_front()) else { break };
                    if permit.send(outcome).is_err() {
                        break;
                    }
                }
                () = context.clock.sleep(next_sweep.saturating_sub(context.clock.now())) => {
                    next_sweep = context.clock.now() + SWEEP;
                    state.sweep(context.clock.unix_ms());
                }
                () = context.shutdown.completing() => break,
            }
            state.update_hold(&context);
        }
        Ok(())
    }

    /// Loads the slices this node holds, off the runtime.
    async fn load(&self) -> Result<Slices, StageError> {
        let (model, plan) = (Arc::clone(&self.services.model), Arc::clone(&self.services.plan));
        let node = self.services.node.clone();
        let need = usize::from(self.services.epoch.parts().max_byzantine) + 1;
        for refused in butterfly_kernels::Path::refused() {
            tracing::warn!("{refused}");
        }
        let path = butterfly_kernels::Path::detect()
            .map_err(|error| StageError::environment("join a verifying cluster on this processor", error))?;
        #[cfg(feature = "adversary")]
        let behaviour = self.services.behaviour;
        tokio::task::spawn_blocking(move || {
            let mut slices = Slices::new(Arc::clone(&model), &plan, need, path);
            #[cfg(feature = "adversary")]
            slices.misbehave(behaviour);
            for (index, held) in plan.slices.iter().enumerate() {
                if held.replicas.contains(&node) {
                    let loaded: Arc<SliceModel> = model.load(held.layers.clone())?;
                    slices.insert(index as u16, loaded);
                }
            }
            Ok(slices)
        })
        .await
        .map_err(|error| StageError::environment("load the model", error))?
        .map_err(|error: ModelError| StageError::environment("load the model", error))
    }
}

async fn join(running: &mut Option<JoinHandle<Passed>>) -> Result<Passed, JoinError> {
    match running {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

impl State {
    fn new(slices: Arc<Slices>, memory_max: u64, services: Services) -> Self {
        Self {
            slices,
            slots: BTreeMap::new(),
            opening: VecDeque::new(),
            ready: VecDeque::new(),
            waiting: Waiting::default(),
            ended: Ended::default(),
            reserved_bytes: 0,
            memory_max,
            boundaries: VecDeque::new(),
            outcomes: VecDeque::new(),
            services,
            hold: None,
        }
    }

    fn is_congested(&self) -> bool {
        self.boundaries.len() + self.outcomes.len() > OUTBOX_MAX
    }

    fn boundary_bytes(&self) -> usize {
        self.boundaries.front().map_or(0, Item::size_bytes)
    }

    fn outcome_bytes(&self) -> usize {
        self.outcomes.front().map_or(0, Item::size_bytes)
    }

    /// Draining waits while requests are open here that a gateway elsewhere may still want: a replica whose peers were
    /// quicker to leave lacks their rows for good. What this node's own gateway waits for, it holds itself.
    fn update_hold(&mut self, context: &StageContext) {
        let idle = self.slots.is_empty() && self.opening.is_empty();
        let held = !idle && (context.shutdown.is_running() || self.is_awaited());
        match (&self.hold, held) {
            (Some(_), false) => self.hold = None,
            (None, true) => self.hold = Some(context.shutdown.hold("compute has open requests")),
            _ => {}
        }
    }

    /// Whether a gateway on another node may still take what comes out of an open request.
    fn is_awaited(&self) -> bool {
        let peers = self.services.peers.borrow();
        let runs = self.slots.keys().map(|key| key.run).chain(self.opening.iter().map(Open::run));
        let gateways: BTreeSet<NodeIndex> = runs.map(|(_, gateway)| gateway).collect();
        let mut gateways = gateways.into_iter().filter_map(|index| self.services.epoch.member(index)?.id.parse().ok());
        gateways.any(|id: NodeId| id != self.services.node && self.services.is_expected(&id, &peers))
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Open { rd, body, attempt, gateway } => {
                let Some(gateway_index) = self.services.epoch.index_of(gateway.as_ref()) else { return };
                self.open(Open { rd, body, attempt, gateway, gateway_index });
            }
            Step::Values { from, boundary } => self.values(from, boundary),
            Step::Cancel { rd, gateway } => self.cancel(&rd, &gateway),
        }
    }

    fn open(&mut self, open: Open) {
        let mut living = self.slots.range(Key::all(open.run())).map(|(_, slot)| slot);
        if living.any(|slot| slot.attempt >= open.attempt) {
            return;
        }
        if let Some(waiting) = self.opening.iter_mut().find(|waiting| waiting.run() == open.run()) {
            waiting.attempt = waiting.attempt.max(open.attempt);
            return;
        }
        if self.opening.len() >= OPENING_MAX {
            tracing::warn!(rd = %open.rd, "too many requests wait for memory; this one is not computed here");
            return;
        }
        self.opening.push_back(open);
    }

    fn values(&mut self, from: NodeId, boundary: Boundary) {
        let key = Key::of(&boundary);
        let Some(slot) = self.slots.get_mut(&key) else {
            if !self.ended.is_late(&boundary) {
                self.waiting.keep(from, boundary);
            }
            return;
        };
        if boundary.attempt > slot.attempt {
            self.waiting.keep(from, boundary);
        } else if boundary.attempt == slot.attempt {
            match &mut slot.session {
                Some(session) => {
                    if session.offer(&from, &boundary) {
                        let rd = boundary.rd;
                        let event = || Event::new("boundary_differs").node(&from).request(rd);
                        self.services.telemetry.events().emit_with(event);
                    }
                    self.wake(key);
                }
                None => self.waiting.keep(from, boundary),
            }
        }
    }

    fn cancel(&mut self, rd: &RequestId, gateway: &NodeId) {
        let Some(gateway) = self.services.epoch.index_of(gateway.as_ref()) else { return };
        let run = (*rd, gateway);
        self.opening.retain(|open| open.run() != run);
        let keys: Vec<Key> = self.slots.range(Key::all(run)).map(|(key, _)| *key).collect();
        for key in keys {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(slot) = self.slots.remove(key) {
            self.reserved_bytes = self.reserved_bytes.saturating_sub(slot.reserved_bytes);
            self.waiting.take(key);
            self.ended.insert(key.run, slot.attempt);
        }
    }

    /// Queues a session that has input, or tells its outcome when its last input was the end.
    fn wake(&mut self, key: Key) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        let Some(session) = &mut slot.session else { return };
        if session.has_work() {
            if !slot.queued {
                slot.queued = true;
                self.ready.push_back(key);
            }
            return;
        }
        let mut effects = session::Effects::default();
        session.conclude(&mut effects);
        let finished = session.is_finished();
        self.boundaries.extend(effects.boundaries);
        self.outcomes.extend(effects.outcomes);
        if finished {
            self.remove(&key);
        }
    }

    /// Gathers the next pass: requests to open as far as memory reaches, then sessions that have input, in turn.
    fn next_pass(&mut self, micro_batch: usize) -> Option<Pass> {
        let mut pass = Pass::default();
        while pass.opens.len() < micro_batch {
            let Some(open) = self.opening.front() else { break };
            let bytes = self.slices.session_bytes(&open.body);
            if self.reserved_bytes > 0 && self.reserved_bytes + bytes > self.memory_max {
                break;
            }
            let Some(open) = self.opening.pop_front() else { break };
            self.place(&open, bytes);
            pass.opens.push(open);
        }
        while pass.sessions.len() + pass.opens.len() < micro_batch {
            let Some(key) = self.ready.pop_front() else { break };
            let Some(slot) = self.slots.get_mut(&key) else { continue };
            slot.queued = false;
            pass.sessions.extend(slot.session.take());
        }
        (!pass.opens.is_empty() || !pass.sessions.is_empty()).then_some(pass)
    }

    /// Makes room for the sessions of a request; they come back from the pass.
    fn place(&mut self, open: &Open, bytes: u64) {
        for slice in self.slices.indices() {
            let key = Key { run: open.run(), slice };
            if let Some(old) = self.slots.remove(&key) {
                self.reserved_bytes = self.reserved_bytes.saturating_sub(old.reserved_bytes);
            }
            self.reserved_bytes += bytes;
            self.slots.insert(
                key,
                Slot {
                    attempt: open.attempt,
                    expires_ms: open.body.expires_ms,
                    reserved_bytes: bytes,
                    session: None,
                    queued: false,
                },
            );
        }
    }

    /// Takes sessions back from a pass, gives them what came meanwhile, and queues them again.
    fn take_back(&mut self, passed: Passed, took: Duration) {
        let traces = self.services.telemetry.traces();
        for session in &passed.sessions {
            traces.mark(&session.rd.0, Mark::new("compute", "pass").slice(session.slice()).took(took));
        }
        self.boundaries.extend(passed.effects.boundaries);
        self.outcomes.extend(passed.effects.outcomes);
        for (run, error) in passed.refused {
            let rd = run.0;
            let span = self.services.telemetry.traces().span(&rd.0);
            span.in_scope(|| tracing::warn!(%rd, %error, "a request was refused"));
            for slice in self.slices.indices() {
                self.remove(&Key { run, slice });
            }
        }
        for session in passed.sessions {
            let key = Key { run: session.run(), slice: session.slice() };
            // The slot is gone if the request was cancelled meanwhile, and newer if it was started anew.
            let Some(slot) = self.slots.get_mut(&key).filter(|slot| slot.attempt == session.attempt) else { continue };
            if session.is_finished() {
                self.remove(&key);
                continue;
            }
            slot.session = Some(session);
            for (from, boundary) in self.waiting.take(&key) {
                self.values(from, boundary);
            }
            self.wake(key);
        }
    }

    /// Drops requests that nobody waits for any more: their time is over, or their gateway has left. Should that one still
    /// want an answer after its restart, it starts the request anew.
    fn sweep(&mut self, now_ms: u64) {
        let has_left = |(id, state): (&NodeId, &PeerState)| {
            let left = matches!(state, PeerState::Down { reason: DownReason::Left, .. });
            left.then(|| self.services.epoch.index_of(id.as_ref())).flatten()
        };
        let left: BTreeSet<NodeIndex> = self.services.peers.borrow().iter().filter_map(has_left).collect();
        let is_over = |(_, gateway): Run, expires_ms: u64| expires_ms <= now_ms || left.contains(&gateway);
        self.opening.retain(|open| !is_over(open.run(), open.body.expires_ms));
        let over = self.slots.iter().filter(|(key, slot)| is_over(key.run, slot.expires_ms));
        let expired: Vec<Key> = over.map(|(key, _)| *key).collect();
        for key in expired {
            self.remove(&key);
        }
        let budget = self.memory_max.max(1) as f64;
        let usage = &self.services.telemetry.metrics().kv_cache_usage_ratio;
        usage.of(&(&self.services.node).into()).set(self.reserved_bytes as f64 / budget);
    }
}

#[cfg(test)]
mod tests {
    use butterfly_verify::{Digest, Input, Mode, Params, Request, RequestParts};
    use tokio::sync::watch;

    use super::*;
    use crate::items::BoundaryValues;

    fn end_of(request: u32, attempt: u32) -> Boundary {
        let mut rd = Digest([0; 32]);
        rd.0[..4].copy_from_slice(&request.to_le_bytes());
        Boundary { rd, gateway: NodeIndex(0), attempt, slice: 0, position: 0, values: BoundaryValues::End }
    }

    #[test]
    fn values_of_an_ended_attempt_are_late_and_those_of_the_next_are_not() {
        let mut ended = Ended::default();
        ended.insert(Key::of(&end_of(1, 0)).run, 2);
        assert!(ended.is_late(&end_of(1, 1)) && ended.is_late(&end_of(1, 2)));
        assert!(!ended.is_late(&end_of(1, 3)) && !ended.is_late(&end_of(2, 1)));
        assert!(!ended.is_late(&Boundary { gateway: NodeIndex(1), ..end_of(1, 1) }), "of another gateway");
    }

    fn request(services: &Services, number: u8, input: Input, params: Params) -> Request {
        let parts = RequestParts {
            client: String::new(),
            nonce: [number; 32],
            model: services.model.manifest().name.clone(),
            mode: Mode::Full,
            input,
            params,
            now_ms: 1,
            expires_ms: 2,
        };
        Request::new(parts).unwrap()
    }

    fn vector(services: &Services, number: u8) -> Request {
        let values = vec![0.5; services.model.manifest().input_width];
        request(services, number, Input::Vector { values }, Params::default())
    }

    /// Where memory reaches for one request, another waits until that one has ended, and is answered then.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_waits_while_memory_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = crate::loopback::Loopback::default().start(folder.path()).await.unwrap();
        let services = cluster.nodes[2].services().clone();
        let path = butterfly_kernels::Path::detect().unwrap();
        let mut slices = Slices::new(Arc::clone(&services.model), &services.plan, 2, path);
        slices.insert(0, services.model.load(services.plan.slices[0].layers.clone()).unwrap());
        let (slices, pool) = (Arc::new(slices), Pool::new(1, path));
        let text = |number: u8| {
            let params = Params { max_tokens: 4, ignore_eos: true, ..Default::default() };
            request(&services, number, Input::Tokens { tokens: vec![number.into(), 2, 3] }, params)
        };
        let bytes = slices.session_bytes(&text(0));
        let mut state = State::new(Arc::clone(&slices), bytes + bytes / 2, services.clone());
        for number in 0..3 {
            let (body, gateway) = (text(number), "n0".parse().unwrap());
            state.take(Step::Open { rd: body.digest(), body, attempt: 1, gateway });
        }
        let mut waited = Vec::new();
        while let Some(pass) = state.next_pass(16) {
            assert!(state.slots.len() == 1 && state.reserved_bytes == bytes, "one at a time");
            waited.push(state.opening.len());
            let passed = pass.run(&slices, &pool);
            state.take_back(passed, Duration::ZERO);
        }
        waited.dedup();
        assert_eq!(waited, [2, 1, 0], "each waited for the one before");
        let finished = state.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Finished(_))).count();
        assert_eq!((finished, state.reserved_bytes), (3, 0));
        cluster.shutdown().await.unwrap();
    }

    /// Whoever learns of a request can send it too, even before its gateway is heard: its gateway gets its votes all the same.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_that_another_gateway_sends_first_is_still_computed_for_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let loopback = crate::loopback::Loopback { model: "builtin:mlp".into(), ..Default::default() };
        let cluster = loopback.start(folder.path()).await.unwrap();
        let services = cluster.nodes[2].services().clone();
        let path = butterfly_kernels::Path::detect().unwrap();
        let mut slices = Slices::new(Arc::clone(&services.model), &services.plan, 2, path);
        slices.insert(0, services.model.load(services.plan.slices[0].layers.clone()).unwrap());
        let (slices, pool) = (Arc::new(slices), Pool::new(1, path));
        let mut state = State::new(Arc::clone(&slices), 1 << 30, services.clone());
        let body = vector(&services, 1);
        let rd = body.digest();
        let open =
            |gateway: &str, attempt| Step::Open { rd, body: body.clone(), attempt, gateway: gateway.parse().unwrap() };
        state.take(open("n1", u32::MAX));
        state.take(open("n0", 1));
        // Nor can the other cancel what is not its own.
        state.take(Step::Cancel { rd, gateway: "n2".parse().unwrap() });
        while let Some(pass) = state.next_pass(16) {
            let passed = pass.run(&slices, &pool);
            state.take_back(passed, Duration::ZERO);
        }
        let voted_for: std::collections::BTreeSet<String> = state
            .outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Outcome::Finished(finished) => Some(finished.gateway.to_string()),
                Outcome::Delta { .. } => None,
            })
            .collect();
        assert_eq!(voted_for.into_iter().collect::<Vec<_>>(), ["n0", "n1"]);
        cluster.shutdown().await.unwrap();
    }

    /// A replica whose peers were quicker to leave neither keeps its node for a gateway that has left, nor computes for it.
    #[tokio::test(flavor = "multi_thread")]
    async fn requests_of_a_gateway_that_has_left_are_waited_for_no_longer() {
        let folder = tempfile::tempdir().unwrap();
        let loopback = crate::loopback::Loopback { model: "builtin:mlp".into(), ..Default::default() };
        let cluster = loopback.start(folder.path()).await.unwrap();
        let mut services = cluster.nodes[2].services().clone();
        let is_up = |peers: &BTreeMap<NodeId, PeerState>| matches!(peers.get("n0"), Some(PeerState::Up { .. }));
        let (peers, seen) = watch::channel(services.peers.wait_for(is_up).await.unwrap().clone());
        services.peers = seen;
        let path = butterfly_kernels::Path::detect().unwrap();
        let mut slices = Slices::new(Arc::clone(&services.model), &services.plan, 2, path);
        slices.insert(0, services.model.load(services.plan.slices[0].layers.clone()).unwrap());
        let mut state = State::new(Arc::new(slices), 1 << 30, services.clone());
        let open = |gateway: &str, number| {
            let body = vector(&services, number);
            Step::Open { rd: body.digest(), body, attempt: 1, gateway: gateway.parse().unwrap() }
        };
        state.take(open("n2", 1));
        assert!(!state.is_awaited(), "its own gateway holds for itself");
        state.take(open("n0", 1));
        assert!(state.next_pass(16).is_some(), "both are being computed");
        state.take(open("n0", 2));
        state.sweep(0);
        assert_eq!((state.slots.len(), state.opening.len(), state.is_awaited()), (2, 1, true));
        let left = PeerState::Down { since: Duration::ZERO, reason: DownReason::Left };
        peers.send_modify(|peers| drop(peers.insert("n0".parse().unwrap(), left)));
        assert!(!state.is_awaited());
        state.sweep(0);
        let own = services.epoch.index_of("n2").unwrap();
        assert_eq!(state.slots.keys().map(|key| key.run.1).collect::<Vec<_>>(), [own]);
        assert!(state.opening.is_empty());
        cluster.shutdown().await.unwrap();
    }

    #[test]
    fn what_is_remembered_of_ended_requests_is_bounded() {
        let mut ended = Ended::default();
        let many = ENDED_MAX as u32 + 5;
        (0..many).for_each(|request| ended.insert(Key::of(&end_of(request, 0)).run, 1));
        assert_eq!((ended.order.len(), ended.attempts.len()), (ENDED_MAX, ENDED_MAX));
        assert!(!ended.is_late(&end_of(0, 1)) && ended.is_late(&end_of(many - 1, 1)));
    }
}
