//! The transfer stage: requests and boundary values between the nodes that hold slices.
//!
//! A gateway's assigned requests go, signed in batches, to every replica of every slice; boundary values go to every replica
//! of the slice that takes them; what comes from peers is checked and becomes a step of the own compute stage. A node that is
//! itself a replica hears itself through the same path as everybody else.
//!
//! Nothing here waits for a peer. A peer whose credits are used up loses the frame and with it its vote on that request; f+1
//! of the others decide without it, so one stalled node cannot hold up the rest. An honest node's inbox takes all that
//! permits allow to be in flight, so only a stalled one is shed. A node that is proven to lie is sent nothing.
//!
//! A peer whose link comes up, late at a start or again after a break, is sent the requests that run without it, and the boundary
//! values that were meant for it while it was expected. What more than f breaks have torn apart starts anew, as the next attempt,
//! which is in the log first.

mod held;
mod running;
pub mod wire;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Item, Receiver, Sender};
use butterfly_engine::frame::Frame;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{Mark, TraceContext};
use butterfly_engine::transport::{Delivery, PeerPort, PeerSendError, PeerSender};
use butterfly_topology::NodeId;
use butterfly_verify::{PrePrepare, Request};
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::error::{ButterflyError, CoordinationError};
use crate::ingest::CancellationReceiver;
use crate::items::{Assigned, Boundary, BoundaryValues, RequestId, Step, request_bytes};
use crate::services::Services;
use crate::transfer::held::Held;
use crate::transfer::running::{Lacking, Running};
use crate::transfer::wire::Message;

#[cfg(feature = "adversary")]
use crate::adversary::Behaviour;

/// Requests signed together.
const REQUESTS_AT_ONCE_MAX: usize = 256;
/// Boundary values taken from the edge together.
const BOUNDARIES_AT_ONCE_MAX: usize = 64;
/// What one control message weighs, about, when there is more to send.
const MESSAGE_BYTES: usize = 1 << 20;
/// When a request that too few replicas took is sent again; after the last of them it fails.
const RETRY_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(200)];
/// How far a gateway's clock may be from ours, in milliseconds.
pub(crate) const SKEW_MS: u64 = 60_000;
/// Longest life of a request, in milliseconds.
pub const LIFE_MS_MAX: u64 = 600_000;

/// The stage.
pub struct TransferStage {
    assigned: Receiver<Assigned>,
    boundary: Receiver<Boundary>,
    steps: Sender<Step>,
    services: Services,
    /// Requests that too few replicas took, to be sent again. Bounded by the permits of the requests.
    retries: VecDeque<Retry>,
    running: Running,
    held: Held,
}

/// A request to be sent to its replicas.
struct Start {
    rd: RequestId,
    request: Request,
    attempt: u32,
}

/// Requests to be sent again.
struct Retry {
    due: Duration,
    tries: usize,
    batch: Vec<Start>,
}

impl From<Assigned> for Start {
    fn from(assigned: Assigned) -> Self {
        let Assigned { request, attempt, .. } = assigned;
        Self { rd: request.rd, request: request.body, attempt }
    }
}

impl Stage for TransferStage {
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        self.run_inner(context).boxed()
    }
}

impl TransferStage {
    /// The stage: requests that may run and boundary values of the own slices in, what compute is asked to do out.
    #[must_use]
    pub fn new(
        assigned: Receiver<Assigned>,
        boundary: Receiver<Boundary>,
        steps: Sender<Step>,
        services: Services,
    ) -> Self {
        let (retries, running, held) = (VecDeque::new(), Running::default(), Held::default());
        Self { assigned, boundary, steps, services, retries, running, held }
    }

    async fn run_inner(mut self: Box<Self>, mut context: StageContext) -> Result<(), StageError> {
        let mut port: PeerPort =
            context.peers.take().ok_or(StageError::Bug { invariant: "the transfer stage is networked" })?;
        let peers = port.sender();
        let mut cancellations = self.services.board.take_cancellations();
        let (mut assigned_open, mut boundary_open) = (true, true);
        context.ready();
        loop {
            let next_retry = self.retries.front().map(|retry| retry.due);
            tokio::select! {
                mut batch = self.assigned.recv_many(REQUESTS_AT_ONCE_MAX), if assigned_open => {
                    assigned_open = !batch.is_empty();
                    // A signature for many costs what one for one costs.
                    self.assigned.gather(&mut batch, REQUESTS_AT_ONCE_MAX).await;
                    for batch in by_bytes(batch, Item::size_bytes) {
                        let batch = batch.into_iter().map(Start::from).collect();
                        self.start(&peers, batch, 0, context.clock.now()).await;
                    }
                }
                batch = self.boundary.recv_many(BOUNDARIES_AT_ONCE_MAX), if boundary_open => {
                    boundary_open = !batch.is_empty();
                    self.hand_on(&peers, &batch);
                }
                delivery = port.recv() => match delivery {
                    Some(Delivery::Frame { from, frame }) => {
                        if !self.deliver(&context, from, &frame).await {
                            break;
                        }
                    }
                    Some(Delivery::Up(peer)) => self.came_up(&peers, &peer, context.clock.now()).await?,
                    Some(Delivery::Down(peer)) => self.running.down(&peer),
                    None => break,
                },
                rd = next_cancellation(&mut cancellations) => self.cancel(&peers, rd),
                () = wait_until(&context, next_retry), if next_retry.is_some() => {
                    if let Some(Retry { tries, mut batch, .. }) = self.retries.pop_front() {
                        batch.retain(|start| self.services.board.is_living(&start.rd));
                        self.start(&peers, batch, tries, context.clock.now()).await;
                    }
                }
                () = context.shutdown.completing() => break,
            }
        }
        Ok(())
    }

    /// Signs requests and sends them to everybody who holds a slice. Where fewer than f+1 replicas of a slice take them, they
    /// are sent again a little later. Replicas that had them the first time do not start anew.
    async fn start(&mut self, peers: &PeerSender, batch: Vec<Start>, tries: usize, now: Duration) {
        if batch.is_empty() {
            return;
        }
        let frame = match self.frame(&batch) {
            Ok(frame) => frame,
            Err(error) => {
                for start in &batch {
                    let error = ButterflyError::Internal(format!("a request could not be sent: {error}"));
                    self.services.board.fail(&start.rd, error).await;
                }
                return;
            }
        };
        let replicas = self.replicas();
        let reached: BTreeSet<&NodeId> =
            replicas.iter().filter(|node| peers.try_send(node, frame.clone()).is_ok()).collect();
        for start in &batch {
            self.services.telemetry.traces().mark(&start.rd.0, Mark::new("transfer", "sent").count(reached.len()));
        }
        let needed = self.needed();
        let short = self
            .services
            .plan
            .slices
            .iter()
            .position(|slice| slice.replicas.iter().filter(|node| reached.contains(node)).count() < needed);
        let requests = batch.iter().map(|start| (start.rd, start.attempt));
        let board = &self.services.board;
        self.running.sent(requests, &reached, short.is_some(), |rd| board.is_living(rd));
        let Some(slice) = short else { return };
        if let Some(pause) = RETRY_AFTER.get(tries) {
            self.retries.push_back(Retry { due: now + *pause, tries: tries + 1, batch });
        } else {
            for start in &batch {
                let error = CoordinationError::InsufficientNodes { slice };
                board.fail(&start.rd, error.into()).await;
            }
        }
    }

    /// A peer's link has come up: it is sent what runs without it, and what cannot go on without it starts anew.
    async fn came_up(&mut self, peers: &PeerSender, peer: &NodeId, now: Duration) -> Result<(), StageError> {
        if !self.replicas().contains(peer) {
            return Ok(());
        }
        for frame in self.held.take(peer) {
            // It loses its vote if it takes no frames again.
            let _ = peers.try_send(peer, frame);
        }
        let (needed, board) = (self.needed(), Arc::clone(&self.services.board));
        let slices = self.services.plan.slices.iter().map(|slice| slice.replicas.as_slice());
        let Lacking { resend, restart } = self.running.up(peer, slices, needed, |rd| board.is_living(rd));
        let living = |(rd, attempt)| Some(Start { rd, request: board.request(&rd)?, attempt });
        for batch in in_batches(resend.into_iter().filter_map(living).collect()) {
            match self.frame(&batch) {
                // It loses its vote on them if it takes no frames again.
                Ok(frame) => drop(peers.try_send(peer, frame)),
                Err(error) => tracing::error!(%peer, %error, "requests could not be sent again"),
            }
        }
        if restart.is_empty() {
            return Ok(());
        }
        tracing::info!(%peer, requests = restart.len(), "requests that lost their links start anew");
        let written = self.services.journal.restart(restart.clone()).await;
        written.map_err(|error| StageError::environment("write the log", error))?;
        let anew = |rd: RequestId| Some((rd, board.start_anew(&rd)?));
        for batch in in_batches(restart.into_iter().filter_map(anew).filter_map(living).collect()) {
            self.start(peers, batch, 0, now).await;
        }
        Ok(())
    }

    /// Signed requests in a frame.
    fn frame(&self, batch: &[Start]) -> Result<Frame, String> {
        let pre_prepares =
            batch.iter().map(|start| PrePrepare { request: start.request.clone(), attempt: start.attempt }).collect();
        let traces = self.services.telemetry.traces();
        let origins: Vec<_> = batch.iter().filter_map(|start| Some((start.rd, traces.context(&start.rd.0)?))).collect();
        let signed = self.services.signer.sign_pre_prepares(pre_prepares).map_err(|error| error.to_string())?;
        wire::requests(&signed, &origins).map_err(|error| error.to_string())
    }

    /// Replicas of a slice that must have a request.
    fn needed(&self) -> usize {
        self.services.topology.cluster.max_byzantine + 1
    }

    /// Everybody who holds a slice and is not excluded.
    fn replicas(&self) -> BTreeSet<NodeId> {
        let replicas = self.services.plan.slices.iter().flat_map(|slice| &slice.replicas);
        replicas.filter(|node| !self.services.is_excluded(node)).cloned().collect()
    }

    /// Sends boundary values to the replicas of the slice that takes them.
    fn hand_on(&mut self, peers: &PeerSender, batch: &[Boundary]) {
        #[cfg(feature = "adversary")]
        if self.services.behaviour == Some(Behaviour::Silent) {
            return;
        }
        for boundary in batch {
            let Some(slice) = self.services.plan.slices.get(usize::from(boundary.slice)) else { continue };
            let frame = match wire::boundary(boundary) {
                Ok(frame) => frame,
                Err(error) => {
                    let span = self.services.telemetry.traces().span(&boundary.rd.0);
                    span.in_scope(|| tracing::error!(rd = %boundary.rd, %error, "boundary values do not fit a frame"));
                    continue;
                }
            };
            for node in slice.replicas.iter().filter(|node| !self.services.is_excluded(node)) {
                match peers.try_send(node, frame.clone()) {
                    Ok(()) => {}
                    Err(PeerSendError::Down(_)) if self.services.is_expected(node, &self.services.peers.borrow()) => {
                        self.held.hold(node, frame.clone());
                    }
                    Err(error) => {
                        tracing::debug!(%node, %error, "boundary values were shed");
                        self.held.take(node);
                    }
                }
            }
        }
    }

    fn cancel(&self, peers: &PeerSender, rd: RequestId) {
        let Ok(frame) = wire::cancels(&[rd]) else { return };
        for node in self.replicas() {
            // A replica that misses a cancel drops the request when it expires.
            let _ = peers.try_send(&node, frame.clone());
        }
    }

    /// Takes a frame from a peer. Returns false when compute is gone.
    async fn deliver(&self, context: &StageContext, from: NodeId, frame: &Frame) -> bool {
        let steps = match wire::read(frame) {
            Ok(Message::Requests { batch, origins }) => self.opened(context, &from, &batch, &origins),
            Ok(Message::Cancels(requests)) => {
                requests.into_iter().map(|rd| Step::Cancel { rd, gateway: from.clone() }).collect()
            }
            Ok(Message::Boundary(boundary)) => {
                let rows = match &boundary.values {
                    BoundaryValues::Rows { width, rows } => rows.len() / (*width).max(1) as usize,
                    BoundaryValues::Tokens(tokens) => tokens.len(),
                    BoundaryValues::Numeric | BoundaryValues::End => 0,
                };
                let hop = Mark::new("transfer", "hop").peer(&from).slice(boundary.slice).count(rows);
                self.services.telemetry.traces().mark(&boundary.rd.0, hop);
                vec![Step::Values { from, boundary }]
            }
            Err(error) => {
                tracing::warn!(%from, %error, "a peer sent what is no message");
                Vec::new()
            }
        };
        for step in steps {
            if self.steps.send(step).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Opens a signed batch of requests from a gateway.
    fn opened(
        &self,
        context: &StageContext,
        from: &NodeId,
        batch: &[u8],
        origins: &[(RequestId, TraceContext)],
    ) -> Vec<Step> {
        let _verifying = context.states.verifying();
        if !self.is_gateway(from) {
            tracing::warn!(%from, "a node that runs no ingest stage sent requests");
            return Vec::new();
        }
        let Some(sender) = self.services.epoch.index_of(from.as_ref()) else { return Vec::new() };
        let opened = match self.services.epoch.open_pre_prepares(batch, sender) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::warn!(%from, %error, "a batch of requests does not hold");
                return Vec::new();
            }
        };
        let now_ms = context.clock.unix_ms();
        opened
            .into_iter()
            .filter(|pre_prepare| {
                let expires_ms = pre_prepare.request.expires_ms;
                expires_ms.saturating_add(SKEW_MS) > now_ms && expires_ms <= now_ms + LIFE_MS_MAX + SKEW_MS
            })
            .map(|pre_prepare| {
                let rd = pre_prepare.request.digest();
                let traces = self.services.telemetry.traces();
                traces.begin(rd.0, origins.iter().find(|(of, _)| *of == rd).map(|(_, origin)| origin));
                traces.mark(&rd.0, Mark::new("transfer", "opened").peer(from));
                let (body, attempt) = (pre_prepare.request, pre_prepare.attempt);
                Step::Open { rd, body, attempt, gateway: from.clone() }
            })
            .collect()
    }

    fn is_gateway(&self, node: &NodeId) -> bool {
        let stages = &self.services.topology.graph.stages;
        stages.iter().any(|stage| stage.kind == "ingest" && stage.on.as_ref().is_none_or(|on| on.contains(node)))
    }
}

/// Cuts requests so that each part fits a message.
fn in_batches(requests: Vec<Start>) -> Vec<Vec<Start>> {
    let parts = by_bytes(requests, |start| request_bytes(&start.request));
    let mut batches = Vec::new();
    for mut part in parts {
        while part.len() > REQUESTS_AT_ONCE_MAX {
            let rest = part.split_off(REQUESTS_AT_ONCE_MAX);
            batches.push(std::mem::replace(&mut part, rest));
        }
        batches.push(part);
    }
    batches
}

/// Cuts a batch so that no part weighs more than one message should, unless it is a single item.
pub(crate) fn by_bytes<T>(items: Vec<T>, bytes_of: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut parts: Vec<Vec<T>> = Vec::new();
    let mut bytes = MESSAGE_BYTES;
    for item in items {
        let weight = bytes_of(&item);
        match parts.last_mut().filter(|_| bytes + weight <= MESSAGE_BYTES) {
            Some(part) => part.push(item),
            None => {
                bytes = 0;
                parts.push(vec![item]);
            }
        }
        bytes += weight;
    }
    parts
}

async fn wait_until(context: &StageContext, due: Option<Duration>) {
    let now = context.clock.now();
    context.clock.sleep(due.map_or(Duration::ZERO, |due| due.saturating_sub(now))).await;
}

async fn next_cancellation(cancellations: &mut Option<CancellationReceiver>) -> RequestId {
    match cancellations {
        Some(receiver) => match receiver.recv().await {
            Some(rd) => rd,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_cut_by_weight_and_keep_their_order() {
        let half = MESSAGE_BYTES / 2;
        let parts = by_bytes(vec![half, half, 1, 3 * MESSAGE_BYTES, 2, half], |weight| *weight);
        assert_eq!(parts, vec![vec![half, half], vec![1], vec![3 * MESSAGE_BYTES], vec![2, half]]);
        assert!(by_bytes(Vec::<usize>::new(), |weight| *weight).is_empty());
    }
}
