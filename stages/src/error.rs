//! Why a request or a service failed, by the service that says so.
//!
//! Every error answers three questions ([`Accountable`]): whose fault it was, whether a retry is useful, and which node.
//! HTTP statuses are ingest's business.

use std::time::Duration;

use butterfly_engine::stage::{Accountable, Fault, Retry};
use butterfly_topology::NodeId;

/// What the public interface could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request itself is wrong.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// No such task.
    #[error("there is no task '{0}' here: it never existed, or it ended so long ago that it is no longer kept")]
    TaskNotFound(String),
    /// The service cannot take requests now.
    #[error("service unavailable: {0}")]
    ServiceUnavailable(String),
}

/// What the assign stage could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchedulingError {
    /// Every place in the queue is taken.
    #[error("the queue is full ({limit} requests wait); try again in {} s", retry_after.as_secs().max(1))]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
        /// When a place is likely.
        retry_after: Duration,
    },
    /// A living task has this id.
    #[error("task '{0}' exists already; choose another task_id or poll GET /inference/{0}")]
    TaskAlreadyExists(String),
    /// Too few replicas are reachable.
    #[error("slice {slice} has {live} of the {needed} live replicas it needs")]
    CoordinationUnavailable {
        /// The slice.
        slice: usize,
        /// Live replicas.
        live: usize,
        /// f+1.
        needed: usize,
    },
}

/// What the partition stage could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// There is no node to plan for.
    #[error("too few nodes: {0}")]
    NoNodesAvailable(String),
    /// The model and the cluster do not fit together.
    #[error("no plan: {0}")]
    InvalidConfiguration(String),
    /// Memory or speed are missing.
    #[error("insufficient resources: {0}")]
    InsufficientResources(String),
}

/// What consensus could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoordinationError {
    /// Too few votes came in time.
    #[error("no quorum: {missing} of the votes needed did not come in time")]
    ConsensusTimeout {
        /// Votes that were still needed.
        missing: usize,
    },
    /// Fewer than f+1 replicas can vote.
    #[error("slice {slice} has too few nodes to certify an answer")]
    InsufficientNodes {
        /// The slice.
        slice: usize,
    },
    /// More nodes contradict each other than the cluster tolerates.
    #[error(
        "verification failed: the replicas of slice {slice} contradict each other, and no answer has f+1 equal votes"
    )]
    ByzantineViolation {
        /// The slice.
        slice: usize,
    },
}

/// What the network could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// No link could be made.
    #[error("no link to {node}: {reason}")]
    ConnectionFailed {
        /// The peer.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// A frame could not be handed over in time.
    #[error("{0} does not take frames")]
    SendTimeout(NodeId),
    /// The peer is down.
    #[error("{0} is unreachable")]
    Unreachable(NodeId),
}

/// Any of the above.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ButterflyError {
    /// The public interface.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The assign stage.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// The partition stage.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// Consensus.
    #[error(transparent)]
    Coordination(#[from] CoordinationError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The request was not answered in the time it had.
    #[error("not answered within the {} s that the request had", .0.as_secs_f64())]
    DeadlineExceeded(Duration),
    /// The request stood still.
    #[error("no progress for {} s", .0.as_secs())]
    NoProgress(Duration),
    /// The forward pass left the numbers: NaN or infinity.
    #[error("the model's arithmetic left the finite numbers for this input")]
    Numeric,
    /// The client went away or cancelled.
    #[error("cancelled")]
    Cancelled,
    /// This node stops.
    #[error("this node is draining")]
    Draining,
    /// A defect or a failing disk.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Why a task failed.
pub type TaskError = ButterflyError;

impl Accountable for ButterflyError {
    fn fault(&self) -> Fault {
        match self {
            Self::Api(ApiError::InvalidRequest(_) | ApiError::TaskNotFound(_))
            | Self::Scheduling(SchedulingError::TaskAlreadyExists(_))
            | Self::Numeric
            | Self::Cancelled => Fault::Client,
            Self::Coordination(_) | Self::Network(_) => Fault::Peer,
            Self::Partition(_) => Fault::Operator,
            Self::Api(ApiError::ServiceUnavailable(_))
            | Self::Scheduling(_)
            | Self::DeadlineExceeded(_)
            | Self::NoProgress(_)
            | Self::Draining => Fault::Environment,
            Self::Internal(_) => Fault::Program,
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Scheduling(SchedulingError::QueueFull { retry_after, .. }) => Retry::After(*retry_after),
            Self::Scheduling(SchedulingError::CoordinationUnavailable { .. })
            | Self::Coordination(
                CoordinationError::ConsensusTimeout { .. } | CoordinationError::InsufficientNodes { .. },
            )
            | Self::Network(_)
            | Self::Api(ApiError::ServiceUnavailable(_))
            | Self::Draining => Retry::After(Duration::from_secs(1)),
            _ => Retry::Never,
        }
    }

    fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Network(
                NetworkError::ConnectionFailed { node, .. }
                | NetworkError::SendTimeout(node)
                | NetworkError::Unreachable(node),
            ) => Some(node),
            _ => None,
        }
    }
}
