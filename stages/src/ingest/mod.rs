//! The ingest stage: requests come in over HTTP and leave as valid items; answers go back to whoever waits.
//!
//! The stage owns the public listener and looks after the tasks of this gateway: it takes up what a crash left open, fails
//! what stands still, buries what its clients left, and drains before it ends.
//!
//! | part | module |
//! | --- | --- |
//! | living tasks, their ends, and who waits for them | `board`, `reply` |
//! | admission: valid, room reserved, on the board, durable, handed on | `gateway` |
//! | what was asked before: retries under a key, repeats | `retry`, `cache` |
//! | what a body may say, and what it comes to | `fields`, `ask` |
//! | connections, bodies, rates, keys, pages, traces | `server`, `gate`, `body`, `rate`, `settings`, `cors`, `origin` |
//! | routes and what they answer | `routes`, `inference`, `chat`, `completions`, `embeddings`, `tokens`, `records`, `health` |
//! | how answers are written | `choices`, `stream`, `render`, `logprobs` |
//! | the document of routes and forms | `openapi` |
//! | failures and their statuses | `errors` |
//!
//! Invariants: nothing leaves this stage that is not a valid request; an acknowledged request is in the journal; no HTTP
//! type leaves this folder.
//!
//! It refuses to know plans, nodes' links and votes.

mod ask;
mod board;
mod body;
mod cache;
mod chat;
mod choices;
mod completions;
mod cors;
mod embeddings;
mod errors;
mod fields;
#[cfg(test)]
pub(crate) mod fixture;
mod gate;
mod gateway;
mod health;
mod inference;
mod logprobs;
mod openapi;
mod origin;
mod rate;
mod records;
mod render;
mod reply;
mod retry;
mod routes;
mod server;
mod settings;
mod stream;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use butterfly_engine::channel::Sender;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_topology::StageConfig;
use butterfly_verify::Request;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::net::TcpListener;

pub use board::{Board, CancellationReceiver, Completed, NewTask, Room, Status, TaskResult};
pub use errors::{Failure, FailureBody};
pub(crate) use health::nodes as health_of_nodes;
pub use reply::{Reply, ReplyReceiver, ReplySender, reply};
pub(crate) use server::Server;

use crate::assign::readiness;
use crate::commit::{JournalError, Open, Outcome, Settled};
use crate::error::{ApiError, TaskError};
use crate::items;
use crate::services::Services;
use gateway::Gateway;
use routes::{Front, router};
use settings::Settings;

/// How often tasks that stand still are looked for.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
/// Rest before room for a request that is taken up again is asked for once more.
const RESUBMIT_PAUSE: Duration = Duration::from_millis(50);

/// The stage.
pub struct IngestStage {
    settings: Result<Settings, StageError>,
    output: Sender<items::Request>,
    services: Services,
}

impl IngestStage {
    /// The stage with the keys of its table, sending valid requests into `output`. A table that cannot work fails the stage
    /// when it starts.
    #[must_use]
    pub fn new(config: &StageConfig, output: Sender<items::Request>, services: Services) -> Self {
        Self { settings: Settings::new(config, &services.base_dir), output, services }
    }
}

impl Stage for IngestStage {
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        self.run_inner(context).boxed()
    }
}

impl IngestStage {
    async fn run_inner(self: Box<Self>, context: StageContext) -> Result<(), StageError> {
        let Self { settings, output, services } = *self;
        let settings = settings?;
        let (request_timeout, connections_max) = (settings.request_timeout, settings.connections_max);
        let cache_bytes = settings.cache_bytes;
        let board = Arc::clone(&services.board);
        // Tasks that a crash left open keep their ids, so they are on the board before anyone can ask for one.
        let left_open = recover(&services).await?;
        let listener = TcpListener::bind(settings.bind_address).await;
        let listener = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let doing = format!("listen on {}", settings.bind_address);
        let (address, listener) = listener.map_err(|error| StageError::environment(doing, error))?;
        let gateway = Gateway::new(services, cache_bytes, output, context.readiness.clone(), context.shutdown.clone());
        let front = Arc::new(Front::new(gateway, settings));
        let mut server = Server::new(listener, router(Arc::clone(&front)), connections_max, Arc::clone(&context.clock));
        let hold = context.shutdown.hold("requests in flight");
        board.listening(address);
        tracing::info!(%address, "the gateway takes requests");
        context.ready();

        let result = tend(&front.gateway, &mut server, left_open, request_timeout).await;
        drop(hold);
        result
    }
}

/// Takes requests until the node stops, and finishes those it has.
async fn tend(
    gateway: &Gateway,
    server: &mut Server,
    left_open: Vec<items::Request>,
    request_timeout: Duration,
) -> Result<(), StageError> {
    let (board, shutdown) = (&gateway.services.board, &gateway.shutdown);
    let mut care = std::pin::pin!(care(gateway, request_timeout));
    let drained = async {
        shutdown.draining().await;
        board.drained().await;
    };
    tokio::select! {
        () = drained => {}
        () = shutdown.completing() => {}
        () = server.accept() => {}
        () = resubmit(gateway, left_open) => {}
        failed = &mut care => return Err(failed),
    }
    // A request that came in just before is finished like those before it.
    let finished = async {
        server.finish().await;
        board.drained().await;
    };
    tokio::select! {
        () = finished => Ok(()),
        () = shutdown.completing() => Ok(()),
        failed = &mut care => Err(failed),
    }
}

/// Puts every open request of the log on the board, and fails those that cannot be answered any more.
async fn recover(services: &Services) -> Result<Vec<items::Request>, StageError> {
    let journal = Arc::clone(&services.journal);
    let read = tokio::task::spawn_blocking(move || journal.open_requests()).await;
    let unreadable = |error: &dyn std::fmt::Display| StageError::environment("read the log", error.to_string());
    let open = read.map_err(|error| unreadable(&error))?.map_err(|error| unreadable(&error))?;
    let (mut left_open, mut over) = (Vec::new(), Vec::new());
    for entry in open {
        match take_up(services, &entry) {
            Ok(request) => left_open.push(request),
            Err(error) => {
                let error = Failure::from(&error).to_json();
                over.push(Settled { rd: entry.accepted.rd, outcome: Outcome::Failed { error } });
            }
        }
    }
    if !left_open.is_empty() || !over.is_empty() {
        tracing::info!(resumed = left_open.len(), failed = over.len(), "requests that were open are taken up again");
    }
    let written = services.journal.settle(over).await;
    let restarted = services.journal.restart(left_open.iter().map(|request| request.rd).collect());
    written.map(drop).and(restarted.await).map_err(|error| StageError::environment("write the log", error))?;
    Ok(left_open)
}

/// Puts one open request on the board.
fn take_up(services: &Services, entry: &Open) -> Result<items::Request, TaskError> {
    let Open { accepted, starts } = entry;
    let gone = |why: &str| TaskError::from(ApiError::ServiceUnavailable(format!("the node was restarted {why}")));
    let request = Request::decode(&accepted.request)
        .map_err(|error| TaskError::Internal(format!("the log has no valid request: {error}")))?;
    if request.model != services.model.manifest().name || services.epoch.admits(&request).is_err() {
        return Err(gone("with another model"));
    }
    if services.clock.unix_ms() >= request.expires_ms {
        let life_ms = request.expires_ms.saturating_sub(request.now_ms);
        return Err(TaskError::DeadlineExceeded(Duration::from_millis(life_ms)));
    }
    let traces = services.telemetry.traces();
    traces.begin(accepted.rd.0, accepted.origin.as_ref());
    traces.name(&accepted.rd.0, &accepted.task_id);
    let task = NewTask {
        task_id: accepted.task_id.clone(),
        kind: accepted.kind,
        request: request.clone(),
        attempt: starts.saturating_add(1),
        sink: None,
    };
    services.board.open(task)?;
    Ok(items::Request { rd: accepted.rd, body: request, priority: accepted.priority })
}

/// Hands requests on that a crash left open, once enough nodes are there to answer them. Those that are still here when the
/// node stops stay in the log for the next start. Then does nothing for ever.
async fn resubmit(gateway: &Gateway, left_open: Vec<items::Request>) {
    let services = &gateway.services;
    let handed_on = AtomicUsize::new(0);
    let hand_on = async {
        let mut peers = services.peers.clone();
        let is_quorum = |peers: &_| readiness(services, peers).is_ok();
        // The watch ends only with the node.
        let _ = peers.wait_for(is_quorum).await;
        gateway.readiness.ready().await;
        for request in &left_open {
            if !gateway.resubmit(request, RESUBMIT_PAUSE).await {
                break;
            }
            handed_on.fetch_add(1, Ordering::Relaxed);
        }
    };
    if !left_open.is_empty() {
        tokio::select! {
            () = hand_on => {}
            () = gateway.shutdown.draining() => {}
        }
        let rest = left_open.get(handed_on.load(Ordering::Relaxed)..).unwrap_or_default();
        rest.iter().for_each(|request| services.board.withdraw(&request.rd));
    }
    std::future::pending().await
}

/// Looks after living tasks, for ever: fails those that are out of time, and buries those whose clients have gone. Gives the
/// error after which nothing can be promised any more.
async fn care(gateway: &Gateway, request_timeout: Duration) -> StageError {
    let services = &gateway.services;
    let sweep = async {
        loop {
            services.clock.sleep(SWEEP_EVERY).await;
            // Together, so that they share transactions.
            let stalled = services.board.stalled(request_timeout).into_iter();
            join_all(stalled.map(|(rd, error)| async move {
                services.board.fail(&rd, error).await;
            }))
            .await;
            services.board.deserted(retry::PATIENCE).iter().for_each(|rd| services.board.cancel(rd));
        }
    };
    let bury = async {
        loop {
            services.board.bury().await;
        }
    };
    let failure = tokio::select! {
        failure = services.journal.failed() => failure,
        () = sweep => JournalError::Closed,
        () = bury => JournalError::Closed,
    };
    StageError::environment("write the log", failure)
}
