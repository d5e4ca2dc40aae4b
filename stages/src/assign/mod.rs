//! The assign stage: who waits, who runs.
//!
//! Requests wait in one queue and run when one of `max_in_flight` permits is free. The permit belongs to the task on the
//! board and returns when the task settles, however it ends. A request is let through only when every slice has f+1 live
//! replicas that are not excluded; otherwise it fails with what is missing, because waiting would only hide it. The one thing
//! that is waited for, for a moment, are links that just broke: they are mostly back at once. A request whose deadline has
//! passed fails and is never computed.
//!
//! How many may wait is decided where they come in: the board admits what may wait and run, and not one more. What waits
//! here is therefore bounded; those that ended while they waited are swept out before they fill the queue.

pub(crate) mod queue;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Item, Receiver, Sender};
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::transport::PeerState;
use butterfly_topology::NodeId;
use butterfly_verify::Request;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

pub use crate::assign::queue::Policy;
use crate::assign::queue::{Queue, Ticket};
use crate::error::{SchedulingError, TaskError};
use crate::items::{Assigned, Planned};
use crate::services::Services;

/// The stage.
pub struct AssignStage {
    /// Planned requests in.
    pub input: Receiver<Planned>,
    /// Requests that may run, out.
    pub output: Sender<Assigned>,
    /// Who goes next.
    pub policy: Policy,
    /// Requests that the board lets wait and run at once.
    pub admitted_max: usize,
    /// Requests that run at once.
    pub in_flight_max: usize,
    /// The node's shared things.
    pub services: Services,
}

impl Stage for AssignStage {
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let permits = Arc::new(Semaphore::new(self.in_flight_max));
            let services = self.services.clone();
            let mut queue: Queue<Planned> = Queue::new(self.policy);
            // What has a permit and waits for room below; meanwhile requests are taken in all the same.
            let mut next: Option<Assigned> = None;
            let mut open = true;
            context.ready();
            while open || !queue.is_empty() || next.is_some() {
                let bytes = next.as_ref().map_or(0, Item::size_bytes);
                tokio::select! {
                    planned = self.input.recv(), if open => match planned {
                        Some(planned) => self.wait(&mut queue, planned),
                        None => open = false,
                    },
                    permit = permit(&services, &permits), if next.is_none() && !queue.is_empty() => {
                        let Ok(permit) = permit else { break };
                        next = self.next(&mut queue, permit).await;
                    }
                    room = self.output.reserve(bytes), if next.is_some() => {
                        let (Ok(room), Some(assigned)) = (room, next.take()) else { break };
                        if room.send(assigned).is_err() {
                            break;
                        }
                    }
                    () = context.shutdown.completing() => break,
                }
            }
            Ok(())
        }
        .boxed()
    }
}

impl AssignStage {
    fn wait(&self, queue: &mut Queue<Planned>, planned: Planned) {
        // No more than `admitted_max` live, so at least half of a queue twice as long have ended.
        if queue.len() >= self.admitted_max.saturating_mul(2) {
            queue.retain(|planned| self.services.board.is_living(&planned.request.rd));
        }
        let body = &planned.request.body;
        let ticket = Ticket {
            client: body.client.clone(),
            priority: planned.request.priority,
            deadline_ms: body.expires_ms,
            work: work(body),
        };
        queue.push(ticket, planned);
    }

    /// The next request that may run, with its permit given to it.
    async fn next(&self, queue: &mut Queue<Planned>, permit: OwnedSemaphorePermit) -> Option<Assigned> {
        let board = &self.services.board;
        while let Some(Planned { request, plan }) = queue.pop() {
            if !board.is_living(&request.rd) {
                continue;
            }
            let had_ms = request.body.expires_ms.saturating_sub(request.body.now_ms);
            if self.services.clock.unix_ms() >= request.body.expires_ms {
                board.fail(&request.rd, TaskError::DeadlineExceeded(Duration::from_millis(had_ms))).await;
                continue;
            }
            let ready = readiness(&self.services, &self.services.peers.borrow());
            if let Err(error) = ready {
                board.fail(&request.rd, error.into()).await;
                continue;
            }
            board.running(&request.rd, Box::new(permit));
            let attempt = board.attempt(&request.rd);
            return Some(Assigned { request, plan, attempt });
        }
        None
    }
}

/// A permit, once there is one and enough replicas are up or given up. Safe to cancel.
async fn permit(services: &Services, permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, AcquireError> {
    services.quorum_or_none().await;
    Arc::clone(permits).acquire_owned().await
}

/// What a request costs, in tokens: those it has and those it may get.
fn work(request: &Request) -> u64 {
    match request.input.tokens() {
        Some(tokens) => (tokens.len() as u64).saturating_add(u64::from(request.params.max_tokens)),
        None => 1,
    }
}

/// Whether every slice has f+1 replicas that are live and not excluded.
///
/// # Errors
/// Names the first slice that has not.
pub fn readiness(services: &Services, peers: &BTreeMap<NodeId, PeerState>) -> Result<(), SchedulingError> {
    quorum(services, |node| services.is_useful(node, peers))
}

/// Whether every slice has f+1 replicas that count.
///
/// # Errors
/// Names the first slice that has not.
pub(crate) fn quorum(services: &Services, counts: impl Fn(&NodeId) -> bool) -> Result<(), SchedulingError> {
    let needed = services.topology.cluster.max_byzantine + 1;
    for (slice, held) in services.plan.slices.iter().enumerate() {
        let live = held.replicas.iter().filter(|node| counts(node)).count();
        if live < needed {
            return Err(SchedulingError::CoordinationUnavailable { slice, live, needed });
        }
    }
    Ok(())
}
