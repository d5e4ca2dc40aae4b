//! The tasks of this gateway that live: from admission to the end, which comes once.
//!
//! The board knows who waits for a request, whether it runs, and when it last moved. Stages reach it by request id, so no
//! HTTP type and no reply channel flows through the graph.
//!
//! Invariants: a task ends once; its permit is given back and its waiting client told in the same step; an end that was
//! promised to be kept is in the journal first; a task whose client has gone away is dead at once for every stage, and leaves
//! the board when its end is in the journal.
//!
//! It refuses to know how a request is computed, and what a client is sent.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use butterfly_engine::clock::Clock;
use butterfly_engine::telemetry::{Event, Mark, ModelLabel, TaskLabels, TaskStatus, Telemetry};
use butterfly_topology::Topology;
use butterfly_verify::{Answer, Receipt, Request};
use tokio::sync::{Notify, mpsc, watch};

use super::errors::Failure;
use super::reply::ReplySender;
use crate::commit::{Accepted, Journal, Outcome, Settled, TaskKind};
use crate::error::{SchedulingError, TaskError};
use crate::items::{RequestId, request_bytes};
use crate::model::Sampled;

/// Clients that wait for one task at most.
const WAITING_FOR_ONE_MAX: usize = 64;
/// When to try again after there was no room: at least, and where nothing better is known.
const RETRY_SOON: Duration = Duration::from_secs(1);
/// When to try again after there was no room, at most.
const RETRY_LATE: Duration = Duration::from_secs(120);
/// Ends that say how fast tasks are served.
const ENDS_MAX: usize = 64;
/// Cancellations that wait to be sent; one more is dropped, and replicas let the request go when it expires.
const CANCELLATIONS_WAITING_MAX: usize = 4096;

/// A task that was answered.
#[derive(Debug, Clone)]
pub struct Completed {
    /// The client's name for it.
    pub task_id: String,
    /// What was asked.
    pub request: Request,
    /// What was answered.
    pub answer: Answer,
    /// The proof.
    pub receipt: Receipt,
    /// The tokens with their log-probabilities, those of the prompt first where they are wanted; empty if none were asked for.
    pub sampled: Vec<Sampled>,
    /// Whether it answered another request before.
    pub cached: bool,
}

impl Completed {
    /// What the log has of a request that was certified; `None` when it cannot be read, or is not what was certified: a record
    /// is checked when it is read, and not only when the log is opened.
    #[must_use]
    pub(super) fn recall(accepted: &Accepted, receipt: &[u8], answer: &[u8], mut sampled: &[u8]) -> Option<Self> {
        let request = Request::decode(&accepted.request).ok()?;
        let answer = Answer::decode(answer).ok()?;
        let receipt: Receipt = serde_json::from_slice(receipt).ok()?;
        let holds =
            request.digest() == accepted.rd && receipt.rd == accepted.rd && receipt.answer_root == answer.root();
        let task_id = accepted.task_id.clone();
        let mut tokens = Vec::new();
        while !sampled.is_empty() {
            tokens.push(Sampled::read(&mut sampled).ok()?);
        }
        holds.then_some(Self { task_id, request, answer, receipt, sampled: tokens, cached: false })
    }
}

/// How a task ended.
pub type TaskResult = Result<Arc<Completed>, TaskError>;

/// A task to be put on the board.
#[derive(Debug)]
pub struct NewTask {
    /// The client's name for it.
    pub task_id: String,
    /// The route it came by.
    pub kind: TaskKind,
    /// What is asked.
    pub request: Request,
    /// Times it was started, this one included.
    pub attempt: u32,
    /// Who waits, if anyone does.
    pub sink: Option<ReplySender>,
}

/// What a gateway admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Tasks that may wait for a permit when every permit is taken.
    pub waiting_max: usize,
    /// Tasks that may wait and run together.
    pub tasks_max: usize,
    /// Bytes of their requests together.
    pub bytes_max: usize,
}

impl Room {
    /// The room that a topology's assign stage gives. Without one nothing bounds the board but the graph.
    #[must_use]
    pub fn of(topology: &Topology) -> Self {
        let assign = topology.graph.of_kind("assign").next();
        let count = |key| assign.and_then(|stage| usize::try_from(stage.config.integer(key)?).ok());
        let bytes = assign.and_then(|stage| usize::try_from(stage.config.bytes("max_queue_bytes")?).ok());
        let waiting_max = count("max_queue_size").unwrap_or(usize::MAX);
        let tasks_max = waiting_max.saturating_add(count("max_in_flight").unwrap_or(0));
        Self { waiting_max, tasks_max, bytes_max: bytes.unwrap_or(usize::MAX) }
    }
}

/// What can be told of a living task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The request.
    pub rd: RequestId,
    /// The client's name for it.
    pub task_id: String,
    /// Whether it has a permit.
    pub is_running: bool,
    /// Tokens released so far.
    pub tokens: usize,
}

/// The board.
pub struct Board {
    journal: Arc<Journal>,
    telemetry: Arc<Telemetry>,
    clock: Arc<dyn Clock>,
    room: Room,
    state: Mutex<State>,
    count: watch::Sender<usize>,
    abandoned: Notify,
    cancellations: mpsc::Sender<RequestId>,
    cancellation_receiver: Mutex<Option<CancellationReceiver>>,
    http_address: watch::Sender<Option<SocketAddr>>,
}

/// Requests whose work is to be stopped on every node.
#[derive(Debug)]
pub struct CancellationReceiver(mpsc::Receiver<RequestId>);

impl CancellationReceiver {
    /// The next one, waiting for it; `None` once the board is gone. Safe to cancel.
    pub async fn recv(&mut self) -> Option<RequestId> {
        self.0.recv().await
    }
}

#[derive(Default)]
struct State {
    tasks: BTreeMap<RequestId, Task>,
    /// What their requests weigh.
    bytes: usize,
    /// By client and task id: living tasks only.
    names: BTreeMap<(String, String), RequestId>,
    /// Tasks whose client has gone and whose end is not in the journal yet.
    abandoned: Vec<RequestId>,
    /// When any task last got a permit, tokens or its end.
    moved: Duration,
    /// When the last tasks that had a permit ended.
    ends: VecDeque<Duration>,
}

impl State {
    /// How long the tasks that wait will keep the places they have: as many as wait, at the rate at which the last ones ended.
    /// In whole seconds, as clients are told.
    fn until_room(&self, now: Duration) -> Duration {
        let waiting = self.tasks.values().filter(|task| task.phase == Phase::Waiting).count().max(1);
        let Some(since) = self.ends.front().map(|first| now.saturating_sub(*first)) else { return RETRY_SOON };
        let seconds = since.as_secs_f64() * waiting as f64 / self.ends.len() as f64;
        Duration::from_secs(seconds.ceil() as u64).clamp(RETRY_SOON, RETRY_LATE)
    }
}

struct Task {
    task_id: String,
    kind: TaskKind,
    request: Request,
    attempt: u32,
    sinks: Vec<ReplySender>,
    /// Since when nobody waits who may come back.
    left: Option<Duration>,
    permit: Option<Box<dyn Send>>,
    bytes: usize,
    phase: Phase,
    opened: Duration,
    moved: Duration,
    /// Tokens told so far, those of the prompt included where they are told.
    told: usize,
    /// These, if their log-probabilities belong to the answer.
    kept: Vec<Sampled>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Abandoned,
}

impl Task {
    fn name(&self) -> (String, String) {
        (self.request.client.clone(), self.task_id.clone())
    }

    fn lives(&self) -> bool {
        self.phase != Phase::Abandoned
    }

    /// Tokens generated so far, as far as they were told.
    fn generated(&self) -> usize {
        self.told.saturating_sub(self.request.scored_tokens())
    }
}

impl Board {
    /// An empty board that admits what there is room for.
    #[must_use]
    pub fn new(journal: Arc<Journal>, telemetry: Arc<Telemetry>, clock: Arc<dyn Clock>, room: Room) -> Self {
        let (cancellations, receiver) = mpsc::channel(CANCELLATIONS_WAITING_MAX);
        Self {
            journal,
            telemetry,
            clock,
            room,
            state: Mutex::default(),
            count: watch::Sender::new(0),
            abandoned: Notify::new(),
            cancellations,
            cancellation_receiver: Mutex::new(Some(CancellationReceiver(receiver))),
            http_address: watch::Sender::new(None),
        }
    }

    /// What the board admits.
    #[must_use]
    pub fn room(&self) -> Room {
        self.room
    }

    /// Whether a task whose request weighs so much would be admitted now.
    ///
    /// # Errors
    /// When it would not.
    pub fn check_room(&self, bytes: usize) -> Result<(), SchedulingError> {
        self.check_room_in(&self.lock(), bytes)
    }

    /// Puts a new task on the board, if there is room: exactly so many wait and run as [`Room`] says.
    ///
    /// # Errors
    /// When there is no room, and when a living task of the same client has this id or this request.
    pub fn admit(&self, task: NewTask) -> Result<(), SchedulingError> {
        self.put(task, true)
    }

    /// Puts a task on the board that was promised an answer before, whether there is room or not.
    ///
    /// # Errors
    /// When a living task of the same client has this id or this request.
    pub fn open(&self, task: NewTask) -> Result<(), SchedulingError> {
        self.put(task, false)
    }

    fn check_room_in(&self, state: &State, bytes: usize) -> Result<(), SchedulingError> {
        if state.tasks.len() < self.room.tasks_max && bytes <= self.room.bytes_max.saturating_sub(state.bytes) {
            return Ok(());
        }
        Err(SchedulingError::QueueFull {
            limit: self.room.waiting_max,
            retry_after: state.until_room(self.clock.now()),
        })
    }

    /// What whoever finds no room is told.
    #[must_use]
    pub fn queue_full(&self) -> SchedulingError {
        let retry_after = self.lock().until_room(self.clock.now());
        SchedulingError::QueueFull { limit: self.room.waiting_max, retry_after }
    }

    fn put(&self, task: NewTask, is_new: bool) -> Result<(), SchedulingError> {
        let now = self.clock.now();
        let rd = task.request.digest();
        let bytes = request_bytes(&task.request);
        let mut state = self.lock();
        let NewTask { task_id, kind, request, attempt, sink } = task;
        let name = (request.client.clone(), task_id.clone());
        if state.tasks.contains_key(&rd) || state.names.contains_key(&name) {
            return Err(SchedulingError::TaskAlreadyExists(task_id));
        }
        if is_new {
            self.check_room_in(&state, bytes)?;
        }
        state.names.insert(name, rd);
        let task = Task {
            task_id,
            kind,
            request,
            attempt,
            sinks: sink.into_iter().collect(),
            left: None,
            permit: None,
            bytes,
            phase: Phase::Waiting,
            opened: now,
            moved: now,
            told: 0,
            kept: Vec::new(),
        };
        state.tasks.insert(rd, task);
        state.bytes = state.bytes.saturating_add(bytes);
        self.telemetry.metrics().tasks_waiting.inc();
        self.count.send_replace(state.tasks.len());
        drop(state);
        let traces = self.telemetry.traces();
        traces.begin(rd.0, None);
        traces.mark(&rd.0, Mark::new("ingest", "admitted"));
        self.telemetry.events().emit_with(|| Event::new("admitted").request(rd));
        Ok(())
    }

    /// Takes a task off the board that was never promised anything: it could not be journalled or handed on.
    pub fn withdraw(&self, rd: &RequestId) {
        let mut state = self.lock();
        let removed = self.remove(&mut state, rd);
        drop(state);
        drop(removed);
    }

    /// The request, while its task lives.
    #[must_use]
    pub fn request(&self, rd: &RequestId) -> Option<Request> {
        self.task(rd).map(|(_, request)| request)
    }

    /// The task's id and request, while it lives.
    #[must_use]
    pub fn task(&self, rd: &RequestId) -> Option<(String, Request)> {
        let state = self.lock();
        let task = state.tasks.get(rd).filter(|task| task.lives())?;
        Some((task.task_id.clone(), task.request.clone()))
    }

    /// Whether the task lives.
    #[must_use]
    pub fn is_living(&self, rd: &RequestId) -> bool {
        self.lock().tasks.get(rd).is_some_and(Task::lives)
    }

    /// Times the task was started, this one included; 0 if it does not live.
    #[must_use]
    pub fn attempt(&self, rd: &RequestId) -> u32 {
        self.lock().tasks.get(rd).map_or(0, |task| task.attempt)
    }

    /// A task is started once more. Returns the new number of starts, unless the task no longer lives.
    #[must_use]
    pub fn start_anew(&self, rd: &RequestId) -> Option<u32> {
        let mut state = self.lock();
        let task = state.tasks.get_mut(rd).filter(|task| task.lives())?;
        task.attempt = task.attempt.saturating_add(1);
        Some(task.attempt)
    }

    /// What can be told of a living task of a client, by its task id or its request id.
    #[must_use]
    pub fn status(&self, client: &str, id: &str) -> Option<Status> {
        let state = self.lock();
        let named = state.names.get(&(client.to_owned(), id.to_owned())).copied();
        let rd = named.or_else(|| id.parse().ok())?;
        let task = state.tasks.get(&rd).filter(|task| task.lives() && task.request.client == client)?;
        let is_running = task.phase == Phase::Running;
        Some(Status { rd, task_id: task.task_id.clone(), is_running, tokens: task.generated() })
    }

    /// The task has a permit, which it keeps until it ends.
    pub fn running(&self, rd: &RequestId, permit: Box<dyn Send>) {
        let now = self.clock.now();
        let mut state = self.lock();
        let Some(task) = state.tasks.get_mut(rd).filter(|task| task.phase == Phase::Waiting) else {
            // Not under the lock: a permit may wake whoever waits for it.
            drop(state);
            drop(permit);
            return;
        };
        task.phase = Phase::Running;
        task.permit = Some(permit);
        task.moved = now;
        let queued = now.saturating_sub(task.opened);
        let label = ModelLabel { model: task.request.model.clone() };
        state.moved = now;
        drop(state);
        let metrics = self.telemetry.metrics();
        metrics.tasks_waiting.dec();
        metrics.tasks_running.inc();
        metrics.task_queue_seconds.of(&label).record(queued);
        self.telemetry.traces().mark(&rd.0, Mark::new("assign", "running").took(queued));
        self.telemetry.events().emit_with(|| Event::new("running").request(rd));
    }

    /// The tokens of a living task with their log-probabilities, if it asks for these.
    #[must_use]
    pub fn sampled(&self, rd: &RequestId) -> Vec<Sampled> {
        self.lock().tasks.get(rd).map_or_else(Vec::new, |task| task.kept.clone())
    }

    /// f+1 replicas agree on these tokens, the first of which is number `index` of those told. Never waits.
    pub fn progress(&self, rd: &RequestId, index: u32, tokens: &[Sampled]) {
        let now = self.clock.now();
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let mut state = self.lock();
        let Some(task) = state.tasks.get_mut(rd).filter(|task| task.lives()) else { return };
        let fresh = index.saturating_add(tokens.len()).saturating_sub(task.told);
        if fresh == 0 || index > task.told {
            return;
        }
        let before = task.generated();
        let is_first = before == 0;
        let since = now.saturating_sub(if is_first { task.opened } else { task.moved });
        if task.request.params.logprobs.is_some() {
            task.kept.extend_from_slice(tokens.get(tokens.len() - fresh..).unwrap_or_default());
        }
        task.told += fresh;
        task.moved = now;
        let fresh = task.generated() - before;
        for sink in &task.sinks {
            sink.tokens(index, tokens);
        }
        let label = ModelLabel { model: task.request.model.clone() };
        state.moved = now;
        drop(state);
        if fresh == 0 {
            return;
        }
        self.telemetry.traces().mark(&rd.0, Mark::new("commit", "released").count(fresh));
        let metrics = self.telemetry.metrics();
        let (first, between) = if is_first { (1, fresh - 1) } else { (0, fresh) };
        if first > 0 {
            metrics.time_to_first_token_seconds.of(&label).record(since);
        }
        if between > 0 {
            // For each token, not for each group in which they came; those that came with the first waited for nothing.
            let each = if is_first { Duration::ZERO } else { since / u32::try_from(between).unwrap_or(u32::MAX) };
            metrics.inter_token_latency_seconds.of(&label).record_many(each, between as u64);
        }
    }

    /// The end of a task whose end is in the journal. Later ends change nothing.
    pub fn settle(&self, rd: &RequestId, result: TaskResult) {
        let now = self.clock.now();
        let mut state = self.lock();
        if !state.tasks.get(rd).is_some_and(Task::lives) {
            return;
        }
        let Some(mut task) = self.remove(&mut state, rd) else { return };
        state.moved = now;
        if task.phase == Phase::Running {
            state.ends.push_back(now);
            if state.ends.len() > ENDS_MAX {
                state.ends.pop_front();
            }
        }
        drop(state);
        drop(task.permit.take());
        self.count_end(&task, &result, now);
        let what = if result.is_ok() { "answered" } else { "failed" };
        self.telemetry.traces().mark_last(&rd.0, Mark::new("commit", what));
        self.telemetry.events().emit_with(|| {
            let outcome = result.as_ref().map_or_else(|error| Failure::from(error).body.code, |_| "completed");
            Event::new("settled").request(rd).with("outcome", outcome)
        });
        for sink in std::mem::take(&mut task.sinks) {
            sink.end(result.clone());
        }
    }

    /// Fails a task: writes the failure in the journal, then tells it, and stops its work on every node. If the journal has
    /// another end of it already, that one stays and is told by whoever wrote it.
    pub async fn fail(&self, rd: &RequestId, error: TaskError) {
        if !self.is_living(rd) {
            return;
        }
        let outcome = Outcome::Failed { error: Failure::from(&error).to_json() };
        let written = self.journal.settle(vec![Settled { rd: *rd, outcome }]).await;
        match written.as_deref() {
            Ok([true]) => self.stop(rd),
            Ok(_) => return,
            // Nothing can be promised any more; the commit stage stops the node over it.
            Err(failure) => tracing::error!(%rd, %failure, "a failure could not be written"),
        }
        self.settle(rd, Err(error));
    }

    /// One more client waits for a living task: it hears what comes from now on (with log-probabilities also what came before),
    /// and the whole answer at the end. False when the task does not live.
    ///
    /// # Errors
    /// When too many wait for this task.
    pub fn join(&self, rd: &RequestId, sink: ReplySender) -> Result<bool, SchedulingError> {
        let mut state = self.lock();
        let Some(task) = state.tasks.get_mut(rd).filter(|task| task.lives()) else { return Ok(false) };
        if task.sinks.len() >= WAITING_FOR_ONE_MAX {
            return Err(SchedulingError::QueueFull { limit: WAITING_FOR_ONE_MAX, retry_after: RETRY_SOON });
        }
        sink.tokens(0, &task.kept);
        task.sinks.push(sink);
        task.left = None;
        Ok(true)
    }

    /// A client that may come back has gone away. Where nobody else waits, the task is [`deserted`](Self::deserted) after
    /// a while.
    pub fn part(&self, rd: &RequestId) {
        let now = self.clock.now();
        let mut state = self.lock();
        let Some(task) = state.tasks.get_mut(rd).filter(|task| task.lives()) else { return };
        task.sinks.retain(ReplySender::is_heard);
        if task.sinks.is_empty() {
            task.left = Some(now);
        }
    }

    /// Living tasks whose clients have gone away for so long that they are not expected back.
    #[must_use]
    pub fn deserted(&self, patience: Duration) -> Vec<RequestId> {
        let now = self.clock.now();
        let is_deserted =
            |task: &Task| task.lives() && task.left.is_some_and(|left| now.saturating_sub(left) >= patience);
        self.lock().tasks.iter().filter(|(_, task)| is_deserted(task)).map(|(rd, _)| *rd).collect()
    }

    /// The client has gone away: the task is dead at once. Its end is written by [`Board::bury`].
    pub fn cancel(&self, rd: &RequestId) {
        let mut state = self.lock();
        let Some(task) = state.tasks.get_mut(rd).filter(|task| task.lives()) else { return };
        let was = std::mem::replace(&mut task.phase, Phase::Abandoned);
        let (sinks, permit) = (std::mem::take(&mut task.sinks), task.permit.take());
        let name = task.name();
        state.names.remove(&name);
        state.abandoned.push(*rd);
        drop(state);
        self.leave(was);
        drop(permit);
        for sink in sinks {
            sink.end(Err(TaskError::Cancelled));
        }
        if was == Phase::Running {
            self.stop(rd);
        }
        self.telemetry.traces().mark_last(&rd.0, Mark::new("ingest", "cancelled"));
        self.telemetry.events().emit_with(|| Event::new("cancelled").request(rd));
        self.abandoned.notify_one();
    }

    /// Waits for abandoned tasks, writes their ends in the journal and takes them off the board. Returns when some were;
    /// called in a loop by one task.
    ///
    /// A cancelled call leaves the tasks for the next one.
    pub async fn bury(&self) {
        let dead = loop {
            let dead = self.lock().abandoned.clone();
            if !dead.is_empty() {
                break dead;
            }
            self.abandoned.notified().await;
        };
        let error = Failure::from(&TaskError::Cancelled).to_json();
        let end = |rd: &RequestId| Settled { rd: *rd, outcome: Outcome::Failed { error: error.clone() } };
        if let Err(failure) = self.journal.settle(dead.iter().map(end).collect()).await {
            tracing::error!(%failure, "cancellations could not be written");
        }
        let now = self.clock.now();
        let mut state = self.lock();
        state.abandoned.drain(..dead.len());
        let buried: Vec<Task> = dead.iter().filter_map(|rd| self.remove(&mut state, rd)).collect();
        drop(state);
        for task in &buried {
            self.count_end(task, &Err(TaskError::Cancelled), now);
        }
    }

    /// Requests whose work is to be stopped on every node. Taken once.
    #[must_use]
    pub fn take_cancellations(&self) -> Option<CancellationReceiver> {
        self.cancellation_receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tasks on the board.
    #[must_use]
    pub fn living(&self) -> usize {
        *self.count.borrow()
    }

    /// Resolves when no task is on the board. Safe to cancel.
    pub async fn drained(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Living tasks that are out of time, each with the error that says so: those that expired, those that run and did not move
    /// for `timeout`, and those that wait while nothing on the board moved for as long.
    #[must_use]
    pub fn stalled(&self, timeout: Duration) -> Vec<(RequestId, TaskError)> {
        let (now, unix_ms) = (self.clock.now(), self.clock.unix_ms());
        let state = self.lock();
        let out_of_time = |task: &Task| {
            let moved = match task.phase {
                Phase::Waiting => task.moved.max(state.moved),
                Phase::Running => task.moved,
                Phase::Abandoned => return None,
            };
            let still = now.saturating_sub(moved);
            if unix_ms >= task.request.expires_ms {
                let had_ms = task.request.expires_ms.saturating_sub(task.request.now_ms);
                return Some(TaskError::DeadlineExceeded(Duration::from_millis(had_ms)));
            }
            (still >= timeout).then_some(TaskError::NoProgress(still))
        };
        state.tasks.iter().filter_map(|(rd, task)| Some((*rd, out_of_time(task)?))).collect()
    }

    /// How long nothing has moved although tasks run; zero when none does.
    #[must_use]
    pub fn still_for(&self) -> Duration {
        let now = self.clock.now();
        let state = self.lock();
        let runs = state.tasks.values().any(|task| task.phase == Phase::Running);
        if runs { now.saturating_sub(state.moved) } else { Duration::ZERO }
    }

    /// Records where clients reach this gateway.
    pub fn listening(&self, address: SocketAddr) {
        self.http_address.send_replace(Some(address));
    }

    /// Where clients reach this gateway, once its listener is bound.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        *self.http_address.borrow()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a task off the board, and out of the gauges if it lived. The caller drops it outside the lock.
    fn remove(&self, state: &mut State, rd: &RequestId) -> Option<Task> {
        let task = state.tasks.remove(rd)?;
        state.bytes = state.bytes.saturating_sub(task.bytes);
        if task.lives() {
            state.names.remove(&task.name());
            self.leave(task.phase);
        }
        self.count.send_replace(state.tasks.len());
        Some(task)
    }

    fn leave(&self, phase: Phase) {
        match phase {
            Phase::Waiting => self.telemetry.metrics().tasks_waiting.dec(),
            Phase::Running => self.telemetry.metrics().tasks_running.dec(),
            Phase::Abandoned => return,
        };
    }

    /// Has the work on a request stopped on every node.
    pub fn stop(&self, rd: &RequestId) {
        if self.cancellations.try_send(*rd).is_err() {
            tracing::debug!(%rd, "a cancellation was dropped; replicas let the request go when it expires");
        }
    }

    fn count_end(&self, task: &Task, result: &TaskResult, now: Duration) {
        let metrics = self.telemetry.metrics();
        let model = task.request.model.clone();
        let status = match result {
            Ok(_) => TaskStatus::Completed,
            Err(TaskError::Cancelled) => TaskStatus::Cancelled,
            Err(_) => TaskStatus::Failed,
        };
        if let Ok(completed) = result {
            let label = ModelLabel { model: model.clone() };
            metrics.task_latency_seconds.of(&label).record(now.saturating_sub(task.opened));
            let prompt_tokens = completed.request.input.tokens().map_or(0, <[u32]>::len);
            metrics.prompt_tokens_total.inc_by(prompt_tokens as u64);
            if let Answer::Text { tokens, .. } = &completed.answer {
                metrics.generation_tokens_total.inc_by(tokens.len() as u64);
                if task.generated() == 0 && !tokens.is_empty() {
                    metrics.time_to_first_token_seconds.of(&label).record(now.saturating_sub(task.opened));
                }
            }
        }
        metrics.tasks_total.of(&TaskLabels { model, kind: task.kind.label(), status }).inc();
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("living", &self.living()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
