//! Running a node's stages: start, readiness, supervision, and the deadlines of the shutdown.
//!
//! One supervisor task owns the tasks of all stages. A stage that fails or panics makes the node drain and stop, with an
//! error that names the stage. A shutdown drains for at most [`DRAIN_MAX`], completes for at most [`COMPLETE_MAX`], then
//! aborts what is left and waits for at most [`FORCE_MAX`].
//!
//! Invariants: every stage ends in exactly one of four ways (done, failed, panicked, aborted) and each is noticed; the first
//! failure is the one that is reported.
//!
//! It refuses to know what stages do, and which of them matter.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use butterfly_topology::{NodeId, StageName};
use futures::FutureExt;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};

use crate::clock::Clock;
use crate::shutdown::{Phase, ShutdownController};
use crate::stage::{Accountable, Fault, Readiness, StageContext, StageError, explain};
use crate::telemetry::{Event, StageStates, Telemetry};
use crate::wiring::Unspawned;

/// How long work in flight may go on once the shutdown has begun.
pub const DRAIN_MAX: Duration = Duration::from_secs(20);

/// How long stages may take to end their loops after that.
pub const COMPLETE_MAX: Duration = Duration::from_secs(5);

/// How long aborted stages are waited for after that.
pub const FORCE_MAX: Duration = Duration::from_secs(5);

/// The stages of a node, running. Dropping it aborts them.
#[derive(Debug)]
pub struct Running {
    controller: ShutdownController,
    readiness: Readiness,
    failure: watch::Receiver<Option<RunError>>,
    outcome: watch::Receiver<Option<Result<(), RunError>>>,
}

/// Why the stages of a node did not end well.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    /// A stage gave up.
    #[error("stage `{stage}` failed")]
    Failed {
        /// The stage.
        stage: StageName,
        /// Why.
        #[source]
        source: Arc<StageError>,
    },
    /// A stage panicked.
    #[error("stage `{stage}` panicked: {message}")]
    Panicked {
        /// The stage.
        stage: StageName,
        /// What it said.
        message: String,
    },
    /// Stages did not end in time and were aborted.
    #[error("aborted, since they did not end in time: {}", list(stages))]
    Aborted {
        /// The stages.
        stages: BTreeSet<StageName>,
    },
    /// Stages could not even be aborted: they do not yield.
    #[error("still running although aborted: {}", list(stages))]
    Stuck {
        /// The stages.
        stages: BTreeSet<StageName>,
    },
    /// The runtime was stopped under the supervisor.
    #[error("the runtime stopped before the stages did")]
    Lost,
}

impl RunError {
    /// The stage that failed, if it was one.
    pub fn stage(&self) -> Option<&StageName> {
        match self {
            Self::Failed { stage, .. } | Self::Panicked { stage, .. } => Some(stage),
            Self::Aborted { .. } | Self::Stuck { .. } | Self::Lost => None,
        }
    }
}

impl Accountable for RunError {
    fn fault(&self) -> Fault {
        match self {
            Self::Failed { source, .. } => source.fault(),
            Self::Panicked { .. } | Self::Aborted { .. } | Self::Stuck { .. } => Fault::Program,
            Self::Lost => Fault::Environment,
        }
    }

    fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Failed { source, .. } => source.node(),
            Self::Panicked { .. } | Self::Aborted { .. } | Self::Stuck { .. } | Self::Lost => None,
        }
    }
}

impl Running {
    pub(crate) fn start(unspawned: Unspawned) -> Self {
        let Unspawned { node, clock, telemetry, stages } = unspawned;
        let controller = ShutdownController::new();
        let readiness = Readiness::waiting_for(stages.iter().map(|stage| stage.name.clone()));
        let mut tasks = JoinSet::new();
        let mut names = HashMap::new();
        for unspawned in stages.into_iter().rev() {
            let context = StageContext {
                node: node.clone(),
                stage: unspawned.name.clone(),
                clock: Arc::clone(&clock),
                shutdown: controller.shutdown(),
                telemetry: Arc::clone(&telemetry),
                states: unspawned.states.clone(),
                peers: unspawned.peers,
                readiness: readiness.clone(),
            };
            let (stage, account) = (unspawned.stage, unspawned.states);
            let task = tasks.spawn(async move {
                let _account = OpenAccount::new(account);
                stage.run(context).await
            });
            names.insert(task.id(), unspawned.name);
        }
        let (failure_sender, failure) = watch::channel(None);
        let (outcome_sender, outcome) = watch::channel(None);
        let supervisor = Supervisor {
            controller: controller.clone(),
            readiness: readiness.clone(),
            clock,
            telemetry,
            tasks,
            names,
            aborted: BTreeSet::new(),
            failure: failure_sender,
        };
        tokio::spawn(async move {
            let outcome = supervisor.supervise().await;
            outcome_sender.send_replace(Some(outcome));
        });
        Self { controller, readiness, failure, outcome }
    }

    /// Resolves when every stage is ready, or with the failure of one of them. Safe to cancel.
    pub async fn ready(&self) -> Result<(), RunError> {
        tokio::select! {
            biased;
            error = self.failed() => Err(error),
            () = self.readiness.ready() => Ok(()),
        }
    }

    /// Which stages are ready.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// What drives the shutdown, for whoever needs to begin or to force it without owning this.
    pub fn controller(&self) -> &ShutdownController {
        &self.controller
    }

    /// Resolves if a stage fails, with the first failure; never otherwise. Safe to cancel.
    pub async fn failed(&self) -> RunError {
        let mut failure = self.failure.clone();
        let failed = failure.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone());
        match failed {
            Some(error) => error,
            // The supervisor ended without one.
            None => std::future::pending().await,
        }
    }

    /// Resolves when every stage has ended, whatever the reason. Safe to cancel.
    pub async fn ended(&self) -> Result<(), RunError> {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        ended.unwrap_or(Err(RunError::Lost))
    }

    /// Shuts down: drains, completes, forces, each within its deadline. Cancelling it forces.
    ///
    /// # Errors
    /// The first failure of a stage, or which stages did not end in time.
    pub async fn shutdown(self) -> Result<(), RunError> {
        self.controller.begin();
        self.ended().await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.controller.force();
    }
}

struct Supervisor {
    controller: ShutdownController,
    readiness: Readiness,
    clock: Arc<dyn Clock>,
    telemetry: Arc<Telemetry>,
    tasks: JoinSet<Result<(), StageError>>,
    names: HashMap<Id, StageName>,
    aborted: BTreeSet<StageName>,
    failure: watch::Sender<Option<RunError>>,
}

impl Supervisor {
    async fn supervise(mut self) -> Result<(), RunError> {
        self.phases().await;
        // Whoever still watches the phases sees that all is over.
        self.controller.force();
        if let Some(failure) = self.failure.borrow().clone() {
            return Err(failure);
        }
        if !self.names.is_empty() {
            return Err(RunError::Stuck { stages: self.names.into_values().collect() });
        }
        if self.aborted.is_empty() { Ok(()) } else { Err(RunError::Aborted { stages: self.aborted }) }
    }

    /// Goes through the phases until every stage has ended, or until the last deadline.
    async fn phases(&mut self) {
        let (controller, clock) = (self.controller.clone(), Arc::clone(&self.clock));
        if self.ended_before(controller.reached(Phase::Draining)).await {
            return;
        }
        self.tell(Event::new("draining"));
        let drained = async {
            tokio::select! {
                biased;
                () = controller.reached(Phase::Completing) => {}
                () = controller.released() => {}
                () = clock.sleep(DRAIN_MAX) => {
                    for (why, count) in controller.holds() {
                        tracing::warn!(why, count, "work in flight is cut short by the shutdown");
                    }
                }
            }
        };
        if self.ended_before(drained).await {
            return;
        }
        controller.complete();
        self.tell(Event::new("completing"));
        let completed = async {
            tokio::select! {
                biased;
                () = controller.reached(Phase::Forced) => {}
                () = clock.sleep(COMPLETE_MAX) => {}
            }
        };
        if self.ended_before(completed).await {
            return;
        }
        controller.force();
        self.tell(Event::new("forcing"));
        self.tasks.abort_all();
        self.ended_before(clock.sleep(FORCE_MAX)).await;
    }

    /// Takes note of stages that end, until `over` resolves. Whether all have ended.
    async fn ended_before(&mut self, over: impl Future<Output = ()>) -> bool {
        let mut over = std::pin::pin!(over.fuse());
        loop {
            tokio::select! {
                biased;
                ended = self.tasks.join_next_with_id() => match ended {
                    None => return true,
                    Some(ended) => self.note(ended),
                },
                () = &mut over => return self.tasks.is_empty(),
            }
        }
    }

    /// Takes note of how one stage ended.
    fn note(&mut self, ended: Result<(Id, Result<(), StageError>), JoinError>) {
        let id = match &ended {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(stage) = self.names.remove(&id) else { return };
        self.readiness.mark(&stage);
        match ended {
            Ok((_, Ok(()))) => {
                tracing::debug!(%stage, "stage ended");
                self.tell(Event::new("stage_ended").stage(&stage));
            }
            Ok((_, Err(source))) => self.fail(RunError::Failed { stage, source: Arc::new(source) }),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => self.fail(RunError::Panicked { stage, message: panic_message(panic.as_ref()) }),
                Err(_cancelled) => {
                    self.aborted.insert(stage);
                }
            },
        }
    }

    /// Records a failure and begins to drain.
    fn fail(&mut self, error: RunError) {
        let explained = explain(&error);
        tracing::error!(error = %explained, "the node drains and stops");
        let event = Event::new("stage_failed").with("error", explained);
        self.tell(match error.stage() {
            Some(stage) => event.stage(stage),
            None => event,
        });
        self.failure.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(error);
            }
            is_first
        });
        self.controller.begin();
    }

    fn tell(&self, event: Event) {
        self.telemetry.events().emit(event.node(self.telemetry.node()));
    }
}

/// Keeps the account of a stage open while it runs, however it ends.
struct OpenAccount(StageStates);

impl OpenAccount {
    fn new(states: StageStates) -> Self {
        states.begin();
        Self(states)
    }
}

impl Drop for OpenAccount {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What a panic said, as far as it said it in text.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

fn list(stages: &BTreeSet<StageName>) -> String {
    stages.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
