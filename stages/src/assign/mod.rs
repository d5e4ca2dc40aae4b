//! The assign stage: who waits, who runs.
//!
//! Requests wait in one bounded queue, first in, first out, and run when one of `max_in_flight` permits is free. The permit
//! belongs to the task on the board and returns when the task settles, however it ends. A request is let through only
//! when every slice has f+1 live replicas; otherwise it fails at once with what is missing, because waiting would only
//! hide it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use butterfly_engine::channel::{Receiver, Sender};
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::transport::PeerState;
use butterfly_topology::NodeId;
use butterfly_topology::plan::Plan;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::SchedulingError;
use crate::items::{Assigned, Planned};
use crate::services::Services;

/// The stage.
pub struct AssignStage {
    /// Planned requests in.
    pub input: Receiver<Planned>,
    /// Requests that may run, out.
    pub output: Sender<Assigned>,
    /// Requests that may wait here.
    pub queue_max: usize,
    /// Requests that run at once.
    pub in_flight_max: usize,
    /// The node's shared things.
    pub services: Services,
}

impl Stage for AssignStage {
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let permits = Arc::new(Semaphore::new(self.in_flight_max));
            let mut queue: VecDeque<Planned> = VecDeque::new();
            let mut open = true;
            context.ready();
            while open || !queue.is_empty() {
                tokio::select! {
                    planned = self.input.recv(), if open && queue.len() < self.queue_max => match planned {
                        Some(planned) => queue.push_back(planned),
                        None => open = false,
                    },
                    permit = Arc::clone(&permits).acquire_owned(), if !queue.is_empty() => {
                        let (Ok(permit), Some(planned)) = (permit, queue.pop_front()) else { break };
                        if !self.admit(planned, permit).await {
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
    /// Lets one request run. Returns false when the stage below is gone.
    async fn admit(&self, planned: Planned, permit: OwnedSemaphorePermit) -> bool {
        let Planned { request, plan } = planned;
        if !self.services.board.is_living(&request.rd) {
            return true;
        }
        let live = self.services.peers.borrow().clone();
        if let Err(error) = readiness(&plan, &live, &self.services.node, self.services.topology.cluster.max_byzantine) {
            self.services.board.fail(&request.rd, error.into()).await;
            return true;
        }
        self.services.board.running(&request.rd, Box::new(permit));
        let attempt = self.services.board.attempt(&request.rd);
        self.output.send(Assigned { request, plan, attempt }).await.is_ok()
    }
}

/// Whether every slice has f+1 live replicas.
///
/// # Errors
/// Names the first slice that has not.
pub fn readiness(
    plan: &Plan,
    peers: &BTreeMap<NodeId, PeerState>,
    own: &NodeId,
    max_byzantine: usize,
) -> Result<(), SchedulingError> {
    let needed = max_byzantine + 1;
    for (slice, held) in plan.slices.iter().enumerate() {
        let is_live = |node: &&NodeId| *node == own || matches!(peers.get(*node), Some(PeerState::Up { .. }));
        let live = held.replicas.iter().filter(is_live).count();
        if live < needed {
            return Err(SchedulingError::CoordinationUnavailable { slice, live, needed });
        }
    }
    Ok(())
}
