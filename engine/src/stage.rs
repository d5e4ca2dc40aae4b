//! What a stage is, what it is given, and how it fails.
//!
//! A stage is built with its typed ports and then run once, as one task, with a [`StageContext`]. It says when it is ready,
//! loops until its inputs end or the shutdown completes, and returns. Dropping its ports is how it tells its neighbours.
//!
//! Invariants: a stage that is aborted must leave nothing running: tasks of its own belong in a `JoinSet` it owns, threads
//! of its own end when their channels close.
//!
//! It refuses to know what any stage does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use butterfly_topology::{NodeId, StageName};
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::channel::{Item, ReserveError, SendError, Sender};
use crate::clock::Clock;
use crate::shutdown::{Shutdown, ShutdownController};
use crate::telemetry::{StageStates, Telemetry};
use crate::transport::PeerPort;

/// A vertex of the graph, built and not yet running.
pub trait Stage: Send + 'static {
    /// Runs until the inputs end or the shutdown completes.
    ///
    /// `Ok` before a shutdown means that there is nothing more to do; an error, or a panic, drains and stops the node.
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>>;
}

/// What a running stage has beside its ports.
#[derive(Debug)]
pub struct StageContext {
    /// The node it runs on.
    pub node: NodeId,
    /// Its name.
    pub stage: StageName,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// When to stop.
    pub shutdown: Shutdown,
    /// Where to count.
    pub telemetry: Arc<Telemetry>,
    /// Its account of time.
    pub states: StageStates,
    /// Its port to its counterparts on other nodes, if its kind is networked.
    pub peers: Option<PeerPort>,
    /// Which stages of the node are ready.
    pub readiness: Readiness,
}

impl StageContext {
    /// Says that the stage is ready for work. Saying it again changes nothing.
    pub fn ready(&self) {
        self.readiness.mark(&self.stage);
    }

    /// The context of a stage that runs alone, with no peers, for tests of one stage.
    pub fn alone(node: NodeId, stage: StageName, clock: Arc<dyn Clock>) -> (Self, ShutdownController) {
        let controller = ShutdownController::new();
        let telemetry = Arc::new(Telemetry::with_clock(node.clone(), Arc::clone(&clock)));
        let states = telemetry.open_stage(&stage);
        states.begin();
        let readiness = Readiness::waiting_for([stage.clone()]);
        let shutdown = controller.shutdown();
        (Self { node, stage, clock, shutdown, telemetry, states, peers: None, readiness }, controller)
    }
}

/// Which stages of a node are not ready yet. Clones share it.
#[derive(Debug, Clone)]
pub struct Readiness {
    pending: Arc<watch::Sender<BTreeSet<StageName>>>,
}

impl Readiness {
    /// Nothing is ready yet.
    pub fn waiting_for(stages: impl IntoIterator<Item = StageName>) -> Self {
        Self { pending: Arc::new(watch::Sender::new(stages.into_iter().collect())) }
    }

    /// Whether every stage is ready.
    pub fn is_ready(&self) -> bool {
        self.pending.borrow().is_empty()
    }

    /// The stages that are not ready.
    pub fn pending(&self) -> BTreeSet<StageName> {
        self.pending.borrow().clone()
    }

    /// Resolves when every stage is ready. Safe to cancel.
    pub async fn ready(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.pending.subscribe().wait_for(BTreeSet::is_empty).await;
    }

    /// A stage is ready.
    pub(crate) fn mark(&self, stage: &StageName) {
        self.pending.send_if_modified(|pending| pending.remove(stage));
    }
}

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Whoever sent the request.
    Client,
    /// Whoever wrote the topology or deployed the node.
    Operator,
    /// Another node.
    Peer,
    /// The machine or the network: disk, memory, addresses.
    Environment,
    /// This program.
    Program,
}

/// Whether trying again helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// The same attempt fails again.
    Never,
    /// It may succeed, not earlier than after this time.
    After(Duration),
}

/// What every error of the system can answer.
pub trait Accountable: std::error::Error {
    /// Whose fault it is.
    fn fault(&self) -> Fault;

    /// Whether a retry is useful.
    fn retry(&self) -> Retry {
        Retry::Never
    }

    /// Which node it concerns.
    fn node(&self) -> Option<&NodeId> {
        None
    }
}

/// An error with its causes, in one line.
pub fn explain<E: std::error::Error>(error: &E) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// An error of any type, kept as the cause of another.
pub type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why a stage gave up. It ends the node, so what concerns one request does not belong here.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The configuration cannot work.
    #[error("key `{key}`: {problem}")]
    Configuration {
        /// The key of the stage's table.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The machine failed the stage.
    #[error("could not {doing}")]
    Environment {
        /// What the stage was doing, as in "open the log".
        doing: String,
        /// What went wrong.
        #[source]
        source: Cause,
    },
    /// An item does not fit the edge it must go along, whose capacity is too small.
    #[error("an item of {bytes} bytes does not fit the edge {edge}, which holds {bytes_max}")]
    ItemTooLarge {
        /// The two ends of the edge.
        edge: String,
        /// Size of the item.
        bytes: usize,
        /// Room of the edge.
        bytes_max: usize,
    },
    /// Another node makes going on impossible.
    #[error("because of node {node}")]
    Peer {
        /// The node.
        node: NodeId,
        /// What went wrong.
        #[source]
        source: Cause,
    },
    /// The program contradicts itself.
    #[error("bug: {invariant} does not hold")]
    Bug {
        /// What should have been true.
        invariant: &'static str,
    },
}

impl StageError {
    /// The machine failed the stage while it was `doing` something, as in "open the log".
    pub fn environment(doing: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Environment { doing: doing.into(), source: source.into() }
    }

    /// An item could not be sent although the edge is not closed: it does not fit.
    pub fn unsendable<T: Item>(sender: &Sender<T>, error: &SendError<T>) -> Self {
        match error.reason() {
            ReserveError::TooLarge { bytes, bytes_max } => {
                Self::ItemTooLarge { edge: sender.label().to_string(), bytes, bytes_max }
            }
            ReserveError::Full | ReserveError::Closed => {
                Self::Bug { invariant: "an edge that is full or closed is handled" }
            }
        }
    }

    /// The value of a key cannot work.
    pub fn configuration(key: &'static str, problem: impl Into<String>) -> Self {
        Self::Configuration { key, problem: problem.into() }
    }
}

impl Accountable for StageError {
    fn fault(&self) -> Fault {
        match self {
            Self::Configuration { .. } | Self::ItemTooLarge { .. } => Fault::Operator,
            Self::Environment { .. } => Fault::Environment,
            Self::Peer { .. } => Fault::Peer,
            Self::Bug { .. } => Fault::Program,
        }
    }

    fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Peer { node, .. } => Some(node),
            Self::Configuration { .. } | Self::Environment { .. } | Self::ItemTooLarge { .. } | Self::Bug { .. } => {
                None
            }
        }
    }
}
