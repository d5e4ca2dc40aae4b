//! The gateway: takes what is asked into the graph, and gives back what waits for the answer.
//!
//! The order of admission is what makes its promises true: the request is made whole and valid; room in the graph is
//! reserved, or the client hears at once that there is none, with nothing written; the task is put on the board; the
//! journal makes it durable; only then is it handed on, which cannot fail for fullness any more.
//!
//! Invariants: a client that goes away at any point leaves nothing behind that works for it; what was not made durable is
//! never handed on; what was is never forgotten.
//!
//! It refuses to know HTTP.

use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Item, Permit, ReserveError, Sender};
use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use butterfly_verify::{Mode, Request};
use tokio::sync::Semaphore;

use super::ask::{Ask, AskInput, cluster_mode};
use super::board::{Board, NewTask, TaskResult};
use super::errors::Failure;
use super::reply::{Reply, ReplyReceiver, reply};
use crate::commit::{Accepted, TaskKind};
use crate::error::{SchedulingError, TaskError};
use crate::items::{self, RequestId};
use crate::model::Sampled;
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
    queue_max: usize,
    text_bytes_max: usize,
    tokenising: Arc<Semaphore>,
}

/// What a client asks, and how it is told.
pub(super) struct Submission {
    /// Who asks.
    pub client: String,
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
    receiver: ReplyReceiver,
    _waiting: Waiting,
}

impl Awaited {
    pub(super) fn new(receiver: ReplyReceiver, waiting: Waiting) -> Self {
        Self { receiver, _waiting: waiting }
    }

    /// What comes next. Safe to cancel.
    pub(super) async fn next(&mut self) -> Reply {
        self.receiver.next().await
    }

    /// The end, passing over tokens. Safe to cancel.
    pub(super) async fn end(mut self) -> TaskResult {
        self.receiver.end().await
    }

    /// Every token that came, and the end. Safe to cancel.
    pub(super) async fn all(mut self) -> (Vec<Sampled>, TaskResult) {
        let mut sampled = Vec::new();
        loop {
            match self.next().await {
                Reply::Tokens(tokens) => sampled.extend(tokens),
                Reply::End(result) => return (sampled, result),
            }
        }
    }
}

/// Cancels its task when it is dropped before the task has ended.
pub(super) struct Waiting {
    board: Arc<Board>,
    rd: Option<RequestId>,
}

impl Waiting {
    pub(super) fn new(board: Arc<Board>, rd: RequestId) -> Self {
        Self { board, rd: Some(rd) }
    }

    /// Lets the task live on without its client.
    fn forget(mut self) {
        self.rd = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(rd) = self.rd {
            // A task that has ended is not on the board any more.
            self.board.cancel(&rd);
        }
    }
}

impl Gateway {
    /// A gateway that sends into `output`.
    #[must_use]
    pub(super) fn new(
        services: Services,
        output: Sender<items::Request>,
        readiness: Readiness,
        shutdown: Shutdown,
    ) -> Self {
        let graph = &services.topology.graph;
        let verify = graph.of_kind("consensus").next().and_then(|stage| stage.config.text("verify"));
        let mode = cluster_mode(verify, services.topology.cluster.max_byzantine);
        let waiting = graph.of_kind("assign").next().and_then(|stage| stage.config.integer("max_queue_size"));
        let queue_max = waiting.and_then(|waiting| usize::try_from(waiting).ok()).unwrap_or(output.bounds().items);
        let text_bytes_max = text_bytes_max(&services);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let tokenising = Arc::new(Semaphore::new(threads));
        Self { services, readiness, shutdown, mode, output, queue_max, text_bytes_max, tokenising }
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
        self.reserve(0).map(drop)
    }

    /// Admits what is asked.
    ///
    /// Safe to cancel: a task that is not admitted to its end is cancelled, and nothing of it is handed on.
    ///
    /// # Errors
    /// When the request cannot be served, when there is no room, when a living task has its id, and when the journal
    /// cannot be written.
    pub(super) async fn submit(&self, submission: Submission) -> Result<Admitted, Failure> {
        self.check_open()?;
        let Submission { client, kind, task_id, ask, wait } = submission;
        let request = self.resolve(ask, &client).await?;
        let rd = request.digest();
        let item = items::Request { rd, body: request.clone() };
        let permit = self.reserve(item.size_bytes())?;
        let task_id = task_id.unwrap_or_else(|| match kind {
            TaskKind::Completion => format!("cmpl-{rd}"),
            TaskKind::Inference => rd.to_string(),
        });
        let tokens_max = usize::try_from(request.params.max_tokens).unwrap_or(usize::MAX);
        let (sink, reply) = if wait {
            let (sink, reply) = reply(tokens_max);
            (Some(sink), Some(reply))
        } else {
            (None, None)
        };
        let task = NewTask { task_id: task_id.clone(), kind, request: request.clone(), attempt: 1, sink };
        self.services.board.open(task)?;
        // From here on a client that goes away cancels the task.
        let guard = Waiting::new(Arc::clone(&self.services.board), rd);
        let accepted = Accepted {
            rd,
            kind,
            accepted_ms: request.now_ms,
            client,
            task_id: task_id.clone(),
            request: request.encode(),
        };
        if let Err(error) = self.services.journal.accept(accepted).await {
            self.services.board.withdraw(&rd);
            tracing::error!(%rd, %error, "a request could not be made durable");
            return Err(TaskError::Internal("the request could not be written to the log".to_owned()).into());
        }
        if permit.send(item).is_err() {
            self.services.board.fail(&rd, TaskError::Draining).await;
            return Err(TaskError::Draining.into());
        }
        let reply = match reply {
            Some(receiver) => Some(Awaited::new(receiver, guard)),
            None => {
                guard.forget();
                None
            }
        };
        Ok(Admitted { task_id, request, reply })
    }

    /// Hands on a request that is on the board already, waiting for room. Returns false when the graph takes no more.
    pub(super) async fn resubmit(&self, request: &Request, pause: Duration) -> bool {
        let item = items::Request { rd: request.digest(), body: request.clone() };
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

    fn reserve(&self, bytes: usize) -> Result<Permit<items::Request>, Failure> {
        self.output.try_reserve(bytes).map_err(|error| match error {
            ReserveError::Full => {
                SchedulingError::QueueFull { limit: self.queue_max, retry_after: Duration::from_secs(1) }.into()
            }
            ReserveError::Closed => TaskError::Draining.into(),
            ReserveError::TooLarge { bytes_max, .. } => Failure::request_too_large(bytes_max),
        })
    }

    async fn resolve(&self, ask: Ask, client: &str) -> Result<Request, Failure> {
        let tokens = match &ask.input {
            AskInput::Text(text) => Some(self.tokenise(ask.field, text).await?),
            AskInput::Tokens(_) | AskInput::Vector(_) => None,
        };
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce)
            .map_err(|error| TaskError::Internal(format!("the system gives no random bytes: {error}")))?;
        let now_ms = self.services.clock.unix_ms();
        ask.resolve(client, now_ms, nonce, tokens, self.services.model.manifest(), &self.services.epoch)
    }

    async fn tokenise(&self, field: &str, text: &str) -> Result<Vec<u32>, Failure> {
        let manifest = self.services.model.manifest();
        let Some(tokenizer) = self.services.model.tokenizer() else {
            let wanted = if manifest.vocabulary == 0 { "a vector in \"input\"" } else { "token ids in \"prompt\"" };
            let message = format!("'{}' has no tokenizer: send {wanted}", manifest.name);
            return Err(Failure::invalid_value(field, message));
        };
        if text.len() > self.text_bytes_max {
            let message = format!(
                "{field} has {} bytes, which is more than the model's {} tokens can stand for",
                text.len(),
                manifest.context_length
            );
            return Err(Failure::context_length_exceeded(field, message));
        }
        let encoded = if text.len() <= INLINE_TEXT_BYTES_MAX {
            tokenizer.encode(text)
        } else {
            let _turn = self.tokenising.acquire().await;
            let (tokenizer, text) = (tokenizer.clone(), text.to_owned());
            let encode = tokio::task::spawn_blocking(move || tokenizer.encode(&text));
            encode.await.map_err(|_| TaskError::Internal("the text could not be tokenised".to_owned()))?
        };
        encoded.map_err(|error| Failure::invalid_value(field, error.to_string()))
    }
}

/// Longer texts have more tokens than the model takes, so they need not be tokenised to know.
fn text_bytes_max(services: &Services) -> usize {
    let manifest = services.model.manifest();
    let Some(tokenizer) = services.model.tokenizer() else { return usize::MAX };
    let ids = 0..u32::try_from(tokenizer.vocabulary()).unwrap_or(u32::MAX);
    let longest = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0);
    manifest.context_length.saturating_mul(longest.max(TOKEN_BYTES_MIN))
}
