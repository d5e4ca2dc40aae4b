//! The gateway: takes what is asked into the graph, and gives back what waits for the answer.
//!
//! The order of admission is what makes its promises true: the request is made whole and valid; room in the graph is
//! reserved, or the client hears at once that there is none, with nothing written; the task is put on the board; it gets its
//! place in the journal; it is handed on, which cannot fail for fullness any more, and acknowledged once it is durable. It is
//! computed while it is being written, because its end is behind it in the journal and so can only be durable after it. What is
//! written together is handed on together, and so shares signatures and passes.
//!
//! Invariants: a client that goes away at any point leaves nothing behind that works for it; what was not made durable is
//! never acknowledged, nor answered; what was is never forgotten.
//!
//! It refuses to know HTTP.

use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Item, Permit, ReserveError, Sender};
use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use butterfly_verify::{Digest, Mode, Request, RequestParts};
use futures::future::try_join_all;
use tokio::sync::Semaphore;

use super::ask::{Ask, AskInput, cluster_mode};
use super::board::{Board, Completed, NewTask, TaskResult};
use super::cache::ResultCache;
use super::errors::Failure;
use super::fields::CHOICES_MAX;
use super::gate::Caller;
use super::origin;
use super::reply::{Reply, ReplyReceiver, reply};
use super::retry::{KEPT, Turns};
use crate::commit::{Accepted, Entered, Journal, JournalError, Outcome, Record, RetryKey, TaskKind};
use crate::error::TaskError;
use crate::items::{self, Priority, RequestId};
use crate::model::{ChatError, Messages, Sampled, Tokenizer};
use crate::services::Services;

/// Text up to this many bytes is tokenised where the request is handled; longer text on a thread of its own.
const INLINE_TEXT_BYTES_MAX: usize = 4 << 10;
/// Bytes that one token may stand for at least, where the vocabulary's own tokens are shorter: special tokens have a text
/// that is not among their bytes.
const TOKEN_BYTES_MIN: usize = 64;

/// The gateway of a node.
pub(super) struct Gateway {
    /// The node's shared things.
    pub services: Services,
    /// Which stages are not ready yet.
    pub readiness: Readiness,
    /// Whether the node stops.
    pub shutdown: Shutdown,
    /// What the cluster does to every answer.
    pub mode: Mode,
    output: Sender<items::Request>,
    text_bytes_max: usize,
    tokenising: Arc<Semaphore>,
    turns: Turns,
    cache: Arc<ResultCache>,
}

/// What a client asks, and how it is told.
pub(super) struct Submission {
    /// Who asks.
    pub client: Caller,
    /// The route it came by.
    pub kind: TaskKind,
    /// The client's name for it.
    pub task_id: Option<String>,
    /// What is asked.
    pub ask: Ask,
    /// Whether the client waits.
    pub wait: bool,
}

/// A task that was admitted.
pub(super) struct Admitted {
    /// The client's name for it, or the one it was given.
    pub task_id: String,
    /// What is asked, with every default resolved.
    pub request: Request,
    /// What comes back, if the client waits. When it is dropped before the task has ended, the task is cancelled on every
    /// node.
    pub reply: Option<Awaited>,
}

/// What a client waits for.
pub(super) struct Awaited {
    // Before the other, so that it is not heard any more when the board is told.
    receiver: ReplyReceiver,
    waiting: Option<Waiting>,
    /// Where the answer is kept.
    keep: Option<(Arc<ResultCache>, Digest)>,
}

impl Awaited {
    pub(super) fn new(receiver: ReplyReceiver, waiting: Waiting) -> Self {
        Self { receiver, waiting: Some(waiting), keep: None }
    }

    /// An answer that is there.
    fn ended(completed: Arc<Completed>) -> Self {
        let (sender, receiver) = reply(completed.sampled.len());
        sender.tokens(0, &completed.sampled);
        sender.end(Ok(completed));
        Self { receiver, waiting: None, keep: None }
    }

    /// What comes next. Safe to cancel.
    pub(super) async fn next(&mut self) -> Reply {
        let reply = self.receiver.next().await;
        if let Reply::End(Ok(completed)) = &reply
            && let Some((cache, key)) = self.keep.take()
        {
            cache.keep(key, completed);
        }
        reply
    }

    /// The end, passing over tokens. Safe to cancel.
    pub(super) async fn end(mut self) -> TaskResult {
        loop {
            if let Reply::End(result) = self.next().await {
                return result;
            }
        }
    }

    /// Every token that came, and the answer. Safe to cancel.
    pub(super) async fn whole(mut self) -> Result<(Vec<Sampled>, Arc<Completed>), TaskError> {
        let mut sampled = Vec::new();
        loop {
            match self.next().await {
                Reply::Tokens(tokens) => sampled.extend(tokens),
                Reply::End(result) => return result.map(|completed| (sampled, completed)),
            }
        }
    }
}

/// Cancels its task when it is dropped before the task has ended; one whose client may come back, after a while.
pub(super) struct Waiting {
    board: Arc<Board>,
    rd: Option<RequestId>,
    may_return: bool,
}

impl Waiting {
    pub(super) fn new(board: Arc<Board>, rd: RequestId) -> Self {
        Self { board, rd: Some(rd), may_return: false }
    }

    /// Lets the task live on without its client.
    fn forget(mut self) {
        self.rd = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        match self.rd {
            Some(rd) if self.may_return => self.board.part(&rd),
            // A task that has ended is not on the board any more.
            Some(rd) => self.board.cancel(&rd),
            None => {}
        }
    }
}

/// A request that is to be admitted.
struct Wanted {
    request: Request,
    task_id: Option<String>,
    /// The key under which its client may ask again.
    key: Option<RetryKey>,
    /// The name under which its answer is kept.
    cache_key: Option<Digest>,
}

impl Wanted {
    fn new(request: Request, task_id: Option<String>) -> Self {
        Self { request, task_id, key: None, cache_key: None }
    }
}

/// A task for which there is room.
enum Reserved {
    /// It has an answer already.
    Kept(Arc<Completed>),
    Fresh(Permit<items::Request>, items::Request, Wanted),
}

/// A task that is on the board and not handed on yet.
enum Opened {
    /// It has an answer already.
    Kept(Arc<Completed>),
    Fresh(Box<Fresh>),
}

struct Fresh {
    permit: Permit<items::Request>,
    item: items::Request,
    task_id: String,
    key: Option<RetryKey>,
    cache_key: Option<Digest>,
    receiver: Option<ReplyReceiver>,
    guard: Waiting,
}

/// A task that is on its way, and not durable yet.
struct HandedOn {
    admitted: Admitted,
    /// Cancels it when it is dropped before it is acknowledged; and whether its client may come back for it.
    guard: Option<(Waiting, bool)>,
}

impl HandedOn {
    /// It is durable: from here on its client decides.
    fn acknowledge(self) -> Admitted {
        let Self { mut admitted, guard } = self;
        if let Some((mut guard, may_return)) = guard {
            guard.may_return = may_return;
            match &mut admitted.reply {
                Some(awaited) => awaited.waiting = Some(guard),
                None => guard.forget(),
            }
        }
        admitted
    }
}

impl Gateway {
    /// A gateway that sends into `output` and keeps `cache_bytes` of answers.
    #[must_use]
    pub(super) fn new(
        services: Services,
        cache_bytes: u64,
        output: Sender<items::Request>,
        readiness: Readiness,
        shutdown: Shutdown,
    ) -> Self {
        let graph = &services.topology.graph;
        let verify = graph.of_kind("consensus").next().and_then(|stage| stage.config.text("verify"));
        let mode = cluster_mode(verify, services.topology.cluster.max_byzantine);
        let text_bytes_max = text_bytes_max(&services);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let tokenising = Arc::new(Semaphore::new(threads));
        let ratio = services.telemetry.metrics().result_cache_hit_ratio.clone();
        let cache = Arc::new(ResultCache::new(cache_bytes, ratio));
        let turns = Turns::new();
        Self { services, readiness, shutdown, mode, output, text_bytes_max, tokenising, turns, cache }
    }

    /// Whether requests are taken at all now.
    ///
    /// # Errors
    /// While the node starts or stops.
    pub(super) fn check_open(&self) -> Result<(), Failure> {
        if !self.shutdown.is_running() {
            return Err(TaskError::Draining.into());
        }
        if !self.readiness.is_ready() {
            let pending: Vec<String> = self.readiness.pending().iter().map(ToString::to_string).collect();
            return Err(Failure::loading(&pending.join(", ")));
        }
        Ok(())
    }

    /// Whether there is room for one more request. Asked before a large body is read.
    ///
    /// # Errors
    /// When the queue is full.
    pub(super) fn check_room(&self) -> Result<(), Failure> {
        Ok(self.services.board.check_room(0)?)
    }

    /// Admits what is asked, or finds what was admitted under the same key before.
    ///
    /// Safe to cancel: a task that is not admitted to its end is cancelled, and nothing of it is handed on.
    ///
    /// # Errors
    /// When the request cannot be served, when there is no room, when a living task has its id, and when the journal
    /// cannot be written. Under a key also the failure that it led to before, and that it was used for another request.
    pub(super) async fn submit(&self, submission: Submission) -> Result<Admitted, Failure> {
        let mut admitted = self.submit_choices(submission, Vec::new(), 1).await?;
        admitted.pop().ok_or_else(|| TaskError::Internal("a task was admitted and is not there".to_owned()).into())
    }

    /// Admits so many choices for each of what is asked, further `asks` included, all of them or none: in the order of the
    /// asks, and for each of them by choice. Safe to cancel, as above.
    ///
    /// # Errors
    /// As above; when there are too many.
    pub(super) async fn submit_choices(
        &self,
        submission: Submission,
        others: Vec<Ask>,
        choices: u32,
    ) -> Result<Vec<Admitted>, Failure> {
        self.check_open()?;
        let Submission { client, kind, task_id, ask, wait } = submission;
        let asks: Vec<Ask> = [ask].into_iter().chain(others).collect();
        let count = asks.len().saturating_mul(choices as usize);
        let count_max = self.output.bounds().items.min(CHOICES_MAX as usize);
        if count > count_max {
            let message =
                format!("{} prompts with {choices} choices each are more than {count_max} answers", asks.len());
            return Err(Failure::invalid_value("n", message));
        }
        let priority = asks.first().and_then(|ask| ask.priority).unwrap_or_default();
        let Some(retry) = client.retry else {
            let may_repeat = wait && task_id.is_none() && asks.iter().all(Ask::has_one_answer);
            let requests = self.resolve_choices(asks, &client.name, choices).await?;
            let wanted = requests.into_iter().map(|request| Wanted {
                cache_key: if may_repeat { self.cache.key(&request) } else { None },
                ..Wanted::new(request, task_id.clone())
            });
            return self.admit(kind, priority, wanted.collect(), wait).await;
        };
        let keys: Vec<RetryKey> = (0..count).map(|_| retry.next()).collect();
        let _turn = match keys.first() {
            Some(first) => self.turns.of(first).await,
            None => None,
        };
        let mut earlier = Vec::with_capacity(count);
        for key in &keys {
            earlier.push(self.earlier(key, wait).await.inspect_err(|_| retry.set_replayed())?);
        }
        if earlier.iter().any(Option::is_some) {
            retry.set_replayed();
        }
        if earlier.iter().all(Option::is_some) {
            return Ok(earlier.into_iter().flatten().collect());
        }
        // After a crash only some may be there.
        let requests = self.resolve_choices(asks, &client.name, choices).await?;
        let missing = requests.into_iter().zip(keys).zip(&earlier).filter(|(_, found)| found.is_none());
        let missing =
            missing.map(|((request, key), _)| Wanted { key: Some(key), ..Wanted::new(request, task_id.clone()) });
        let mut fresh = self.admit(kind, priority, missing.collect(), wait).await?.into_iter();
        Ok(earlier.into_iter().filter_map(|found| found.or_else(|| fresh.next())).collect())
    }

    /// The requests for so many choices of each of what is asked.
    async fn resolve_choices(&self, asks: Vec<Ask>, client: &str, choices: u32) -> Result<Vec<Request>, Failure> {
        let bytes_max = self.output.bounds().bytes;
        let mut requests = Vec::new();
        let mut bytes = 0_usize;
        for ask in asks {
            let field = ask.field;
            let first = self.resolve(ask, client).await?;
            let item = items::Request { rd: first.digest(), body: first, priority: Priority::default() };
            bytes = bytes.saturating_add(item.size_bytes().saturating_mul(choices as usize));
            if bytes > bytes_max {
                return Err(Failure::request_too_large(bytes_max));
            }
            requests.push(item.body.clone());
            for choice in 1..choices {
                let mut parts = RequestParts::clone(item.body.parts());
                parts.params.choice = choice;
                let request = Request::new(parts).map_err(|error| Failure::invalid_value(field, error.to_string()))?;
                requests.push(request);
            }
        }
        Ok(requests)
    }

    /// Admits requests that are whole and valid, all of them or none.
    async fn admit(
        &self,
        kind: TaskKind,
        priority: Priority,
        wanted: Vec<Wanted>,
        wait: bool,
    ) -> Result<Vec<Admitted>, Failure> {
        let is_alone = wanted.len() == 1;
        let mut reserved = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let kept = wanted.cache_key.and_then(|key| self.cache.get(&key));
            let task = match kept {
                Some(completed) => Reserved::Kept(completed),
                None => {
                    let item = items::Request { rd: wanted.request.digest(), body: wanted.request.clone(), priority };
                    self.services.board.check_room(item.size_bytes())?;
                    let permit = self.reserve(item.size_bytes(), is_alone).await?;
                    Reserved::Fresh(permit, item, wanted)
                }
            };
            reserved.push(task);
        }
        let opened = reserved.into_iter().map(|reserved| match reserved {
            Reserved::Kept(completed) => Ok(Opened::Kept(completed)),
            Reserved::Fresh(permit, item, wanted) => self.open(kind, permit, item, wanted, wait),
        });
        let opened: Vec<Opened> = opened.collect::<Result<_, _>>()?;
        let mut entered = try_join_all(opened.iter().map(|opened| self.enter(kind, opened))).await?;
        for (_, entered) in entered.iter_mut().flatten() {
            entered.begun().await;
        }
        let handed_on = try_join_all(opened.into_iter().map(|opened| self.hand_on(opened))).await?;
        try_join_all(entered.into_iter().flatten().map(|(rd, entered)| self.accepted(rd, entered))).await?;
        Ok(handed_on.into_iter().map(HandedOn::acknowledge).collect())
    }

    /// Puts a task on the board, from where a client that goes away cancels it.
    fn open(
        &self,
        kind: TaskKind,
        permit: Permit<items::Request>,
        item: items::Request,
        wanted: Wanted,
        wait: bool,
    ) -> Result<Opened, Failure> {
        let Wanted { request, task_id, key, cache_key } = wanted;
        let task_id = task_id.unwrap_or_else(|| format!("{}{}", kind.id_prefix(), item.rd));
        let (sink, receiver) = if wait {
            let (sink, receiver) = reply(tokens_max(&request));
            (Some(sink), Some(receiver))
        } else {
            (None, None)
        };
        let traces = self.services.telemetry.traces();
        traces.begin(item.rd.0, origin::current().as_ref());
        traces.name(&item.rd.0, &task_id);
        let task = NewTask { task_id: task_id.clone(), kind, request, attempt: 1, sink };
        self.services.board.admit(task)?;
        let guard = Waiting::new(Arc::clone(&self.services.board), item.rd);
        Ok(Opened::Fresh(Box::new(Fresh { permit, item, task_id, key, cache_key, receiver, guard })))
    }

    /// Gives a task its place in the log.
    async fn enter(&self, kind: TaskKind, opened: &Opened) -> Result<Option<(RequestId, Entered)>, Failure> {
        let Opened::Fresh(fresh) = opened else { return Ok(None) };
        let (rd, request) = (fresh.item.rd, &fresh.item.body);
        let accepted = Accepted {
            rd,
            kind,
            priority: fresh.item.priority,
            accepted_ms: request.now_ms,
            client: request.client.clone(),
            task_id: fresh.task_id.clone(),
            origin: origin::current(),
            request: request.encode(),
        };
        let entered = self.services.journal.enter(accepted, fresh.key).await;
        entered.map(|entered| Some((rd, entered))).map_err(|error| self.not_durable(&rd, &error))
    }

    /// Waits until a task is durable: from here on it may be acknowledged.
    async fn accepted(&self, rd: RequestId, entered: Entered) -> Result<(), Failure> {
        match entered.durable().await.as_deref() {
            Ok([true, ..]) => Ok(()),
            Ok(_) => Err(self.not_durable(&rd, &JournalError::Known(rd))),
            Err(error) => Err(self.not_durable(&rd, error)),
        }
    }

    /// Takes a task back that is not in the log, and so was promised nothing.
    fn not_durable(&self, rd: &RequestId, error: &JournalError) -> Failure {
        self.services.board.withdraw(rd);
        self.services.board.stop(rd);
        tracing::error!(%rd, %error, "a request could not be made durable");
        TaskError::Internal("the request could not be written to the log".to_owned()).into()
    }

    /// Hands on a task that has its place in the log.
    async fn hand_on(&self, opened: Opened) -> Result<HandedOn, Failure> {
        let fresh = match opened {
            Opened::Fresh(fresh) => fresh,
            Opened::Kept(completed) => {
                let (task_id, request) = (completed.task_id.clone(), completed.request.clone());
                let reply = Some(Awaited::ended(completed));
                return Ok(HandedOn { admitted: Admitted { task_id, request, reply }, guard: None });
            }
        };
        let Fresh { permit, item, task_id, key, cache_key, receiver, guard } = *fresh;
        let (rd, request) = (item.rd, item.body.clone());
        if permit.send(item).is_err() {
            self.services.board.fail(&rd, TaskError::Draining).await;
            return Err(TaskError::Draining.into());
        }
        let keep = cache_key.map(|key| (Arc::clone(&self.cache), key));
        let reply = receiver.map(|receiver| Awaited { receiver, waiting: None, keep });
        Ok(HandedOn { admitted: Admitted { task_id, request, reply }, guard: Some((guard, key.is_some())) })
    }

    /// What was admitted under a key, if it lives or has ended in a way that asking again does not better.
    async fn earlier(&self, key: &RetryKey, wait: bool) -> Result<Option<Admitted>, Failure> {
        // What ends between the log and the board is found in the log the second time.
        for _ in 0..2 {
            let key_bytes = key.key;
            let Some((fingerprint, record)) = self.read(move |journal| journal.keyed(&key_bytes)).await? else {
                return Ok(None);
            };
            let Record { accepted, outcome } = record;
            let kept_ms = u64::try_from(KEPT.as_millis()).unwrap_or(u64::MAX);
            if self.services.clock.unix_ms().saturating_sub(accepted.accepted_ms) >= kept_ms {
                return Ok(None);
            }
            if fingerprint != key.fingerprint {
                return Err(Failure::idempotency_key_reused());
            }
            let damaged = || Failure::from(TaskError::Internal("a record of the log cannot be read".to_owned()));
            match outcome {
                None => {
                    let request = Request::decode(&accepted.request).map_err(|_| damaged())?;
                    let rd = accepted.rd;
                    let Accepted { task_id, .. } = accepted;
                    if !wait && self.services.board.is_living(&rd) {
                        return Ok(Some(Admitted { task_id, request, reply: None }));
                    }
                    let (sink, receiver) = reply(tokens_max(&request));
                    if wait && self.services.board.join(&rd, sink)? {
                        let mut guard = Waiting::new(Arc::clone(&self.services.board), rd);
                        guard.may_return = true;
                        return Ok(Some(Admitted { task_id, request, reply: Some(Awaited::new(receiver, guard)) }));
                    }
                }
                Some(Outcome::Failed { error }) => match Failure::recall(&error) {
                    Some(failure) if wait => return Err(failure),
                    Some(_) => {
                        let request = Request::decode(&accepted.request).map_err(|_| damaged())?;
                        return Ok(Some(Admitted { task_id: accepted.task_id, request, reply: None }));
                    }
                    None => return Ok(None),
                },
                Some(Outcome::Certified { receipt, answer, sampled }) => {
                    let completed = Completed::recall(&accepted, &receipt, &answer, &sampled).ok_or_else(damaged)?;
                    let (task_id, request) = (completed.task_id.clone(), completed.request.clone());
                    let reply = wait.then(|| Awaited::ended(Arc::new(completed)));
                    return Ok(Some(Admitted { task_id, request, reply }));
                }
            }
        }
        // It is on its way off the board, and not with an answer.
        Ok(None)
    }

    /// Reads the log on a thread that may wait for the disk.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        reader: impl FnOnce(&Journal) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, Failure> {
        let journal = Arc::clone(&self.services.journal);
        let read = tokio::task::spawn_blocking(move || reader(&journal)).await;
        let failed = || Failure::from(TaskError::Internal("the log cannot be read".to_owned()));
        match read {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                tracing::error!(%error, "the log cannot be read");
                Err(failed())
            }
            Err(_) => Err(failed()),
        }
    }

    /// Hands on a request that is on the board already, waiting for room. Returns false when the graph takes no more.
    pub(super) async fn resubmit(&self, request: &items::Request, pause: Duration) -> bool {
        let item = request.clone();
        loop {
            if !self.services.board.is_living(&item.rd) {
                return true;
            }
            match self.output.try_reserve(item.size_bytes()) {
                Ok(permit) => return permit.send(item).is_ok(),
                // The edge rejects instead of making anyone wait, so room is asked for again.
                Err(ReserveError::Full) => self.services.clock.sleep(pause).await,
                Err(ReserveError::Closed) => return false,
                Err(error @ ReserveError::TooLarge { .. }) => {
                    let error = TaskError::Internal(format!("the request does not fit the graph any more: {error}"));
                    self.services.board.fail(&item.rd, error).await;
                    return true;
                }
            }
        }
    }

    /// Room in the graph. One request alone waits for it, unless the topology says that this edge rejects; of several that wait
    /// with room in their hands each could hold up the others.
    async fn reserve(&self, bytes: usize, is_alone: bool) -> Result<Permit<items::Request>, Failure> {
        let room = if is_alone { self.output.reserve(bytes).await } else { self.output.try_reserve(bytes) };
        room.map_err(|error| match error {
            ReserveError::Full => self.services.board.queue_full().into(),
            ReserveError::Closed => TaskError::Draining.into(),
            ReserveError::TooLarge { bytes_max, .. } => Failure::request_too_large(bytes_max),
        })
    }

    async fn resolve(&self, ask: Ask, client: &str) -> Result<Request, Failure> {
        let now_ms = self.services.clock.unix_ms();
        let tokens = match &ask.input {
            AskInput::Text(text) => Some(self.tokenise(ask.field, text, true).await?),
            AskInput::Chat(messages) => Some(self.render(ask.field, messages, now_ms).await?),
            AskInput::Tokens(_) | AskInput::Vector(_) => None,
        };
        let mut nonce = ask.nonce.unwrap_or_default();
        if ask.nonce.is_none() {
            getrandom::fill(&mut nonce)
                .map_err(|error| TaskError::Internal(format!("the system gives no random bytes: {error}")))?;
        }
        ask.resolve(client, now_ms, nonce, tokens, self.services.model.manifest(), &self.services.epoch)
    }

    /// The tokens of the prompt that messages make at `now_ms`.
    ///
    /// # Errors
    /// Names `field` when they make none.
    pub(super) async fn render(&self, field: &str, messages: &Messages, now_ms: u64) -> Result<Vec<u32>, Failure> {
        self.check_length(field, messages.text_bytes())?;
        let _turn = self.tokenising.acquire().await;
        let (model, messages) = (Arc::clone(&self.services.model), messages.clone());
        let render = tokio::task::spawn_blocking(move || model.chat_tokens(&messages, now_ms));
        let tokens = render.await.map_err(|_| TaskError::Internal("the messages could not be rendered".to_owned()))?;
        tokens.map_err(|error| match &error {
            ChatError::NoTemplate | ChatError::NoTokenizer | ChatError::Template(_) => {
                Failure::unsupported_parameter(field, error.to_string())
            }
            ChatError::TooLong => Failure::context_length_exceeded(field, error.to_string()),
            ChatError::Count(_)
            | ChatError::Form
            | ChatError::Refused(_)
            | ChatError::Control(_)
            | ChatError::Encode(_) => Failure::invalid_value(field, error.to_string()),
        })
    }

    /// The tokens of a text; `with_affixes` as they are put around a prompt.
    ///
    /// # Errors
    /// Names `field` when it has none.
    pub(super) async fn tokenise(&self, field: &str, text: &str, with_affixes: bool) -> Result<Vec<u32>, Failure> {
        let manifest = self.services.model.manifest();
        let Some(tokenizer) = self.services.model.tokenizer() else {
            let wanted = if manifest.vocabulary == 0 { "a vector in \"input\"" } else { "token ids in \"prompt\"" };
            let message = format!("'{}' has no tokenizer: send {wanted}", manifest.name);
            return Err(Failure::invalid_value(field, message));
        };
        self.check_length(field, text.len())?;
        let encode = move |tokenizer: &Tokenizer, text: &str| {
            if with_affixes { tokenizer.encode(text) } else { tokenizer.encode_bare(text) }
        };
        let encoded = if text.len() <= INLINE_TEXT_BYTES_MAX {
            encode(tokenizer, text)
        } else {
            let _turn = self.tokenising.acquire().await;
            let (tokenizer, text) = (tokenizer.clone(), text.to_owned());
            let encoded = tokio::task::spawn_blocking(move || encode(&tokenizer, &text));
            encoded.await.map_err(|_| TaskError::Internal("the text could not be tokenised".to_owned()))?
        };
        encoded.map_err(|error| Failure::invalid_value(field, error.to_string()))
    }

    /// Text that cannot fit is not tokenised to find out.
    fn check_length(&self, field: &str, bytes: usize) -> Result<(), Failure> {
        if bytes <= self.text_bytes_max {
            return Ok(());
        }
        let context_length = self.services.model.manifest().context_length;
        let message =
            format!("{field} has {bytes} bytes, which is more than the model's {context_length} tokens can stand for");
        Err(Failure::context_length_exceeded(field, message))
    }
}

/// Tokens that may come back: those of the prompt, if they are wanted, and the generated ones.
fn tokens_max(request: &Request) -> usize {
    usize::try_from(request.params.max_tokens).unwrap_or(usize::MAX).saturating_add(request.scored_tokens())
}

/// Longer texts have more tokens than the model takes, so they need not be tokenised to know.
fn text_bytes_max(services: &Services) -> usize {
    let manifest = services.model.manifest();
    let Some(tokenizer) = services.model.tokenizer().filter(|tokenizer| !tokenizer.cuts()) else { return usize::MAX };
    let ids = 0..u32::try_from(tokenizer.vocabulary()).unwrap_or(u32::MAX);
    let longest = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0);
    manifest.context_length.saturating_mul(longest.max(TOKEN_BYTES_MIN))
}
