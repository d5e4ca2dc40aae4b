//! The partition stage: which slices, held by whom, will run a request.
//!
//! The planners are pure and live in the topology crate; here they are asked, in the order topology_aware, load_balanced,
//! uniform, and their answers are kept. Who may vote is fixed by the epoch, so a gateway cannot choose accomplices by
//! planning anew: a plan is computed over the whole roster, and a node that is down stays in it as a silent member.

use std::sync::Arc;

use butterfly_engine::channel::{Receiver, Sender};
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::Mark;
use butterfly_topology::NodeSpec;
use butterfly_topology::plan::{LayerCost, Plan, PlanError, PlanInput, Strategy};
use butterfly_topology::planner;
use futures::FutureExt;
use futures::future::BoxFuture;
use quick_cache::sync::Cache;

use crate::error::{ButterflyError, PartitionError};
use crate::items::{Planned, Request};
use crate::services::Services;

/// What a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PlanKey {
    /// Root of the model's manifest.
    pub model: [u8; 32],
    /// The strategy tried first.
    pub strategy: Strategy,
    /// Digest of the nodes and their profiles, by [`nodes_digest`].
    pub nodes: [u8; 32],
}

/// Finds plans and keeps them: a bounded cache before the planners.
pub struct Planner {
    cache: Cache<PlanKey, Arc<Plan>>,
}

impl Planner {
    /// A planner that keeps `cache_size` plans.
    #[must_use]
    pub fn new(cache_size: usize) -> Self {
        Self { cache: Cache::new(cache_size.max(1)) }
    }

    /// The plan for `key`; `input` is asked for only when the plan is not known yet.
    ///
    /// # Errors
    /// When no strategy finds a plan.
    pub fn plan<'a>(&self, key: &PlanKey, input: impl FnOnce() -> PlanInput<'a>) -> Result<Arc<Plan>, PartitionError> {
        if let Some(plan) = self.cache.get(key) {
            return Ok(plan);
        }
        let plan = Arc::new(planner::plan_or_degrade(key.strategy, &input()).map_err(PartitionError::from)?);
        self.cache.insert(key.clone(), Arc::clone(&plan));
        Ok(plan)
    }
}

impl From<PlanError> for PartitionError {
    fn from(error: PlanError) -> Self {
        match &error {
            PlanError::NoNodesAvailable { .. } => Self::NoNodesAvailable(error.to_string()),
            PlanError::InsufficientResources(_) => Self::InsufficientResources(error.to_string()),
            _ => Self::InvalidConfiguration(error.to_string()),
        }
    }
}

/// Digest of everything about nodes that a plan depends on.
#[must_use]
pub fn nodes_digest(nodes: &[NodeSpec]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for node in nodes {
        let id: &str = node.id.as_ref();
        hasher.update(&(id.len() as u64).to_le_bytes()).update(id.as_bytes());
        let domain = node.domain.as_deref().unwrap_or("");
        hasher.update(&(domain.len() as u64).to_le_bytes()).update(domain.as_bytes());
        hasher.update(&node.memory_bytes.unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(&node.compute.unwrap_or(-1.0).to_bits().to_le_bytes());
        hasher.update(&node.bandwidth.unwrap_or(u64::MAX).to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// What the planners of a node are asked, over the whole roster.
#[derive(Debug, Clone)]
pub struct Question {
    /// The model's layers.
    pub layers: Vec<LayerCost>,
    /// The roster.
    pub nodes: Vec<NodeSpec>,
    /// f.
    pub max_byzantine: usize,
    /// Slices, when the topology fixes them.
    pub slices: Option<usize>,
    /// Longest sequence, in positions.
    pub positions_max: u64,
    /// Key of the answer.
    pub key: PlanKey,
}

impl Question {
    /// The planner's input.
    #[must_use]
    pub fn input(&self) -> PlanInput<'_> {
        PlanInput {
            layers: &self.layers,
            nodes: &self.nodes,
            max_byzantine: self.max_byzantine,
            slices: self.slices,
            positions_max: self.positions_max,
        }
    }
}

/// The stage.
pub struct PartitionStage {
    /// Requests in.
    pub input: Receiver<Request>,
    /// Planned requests out.
    pub output: Sender<Planned>,
    /// The planners and their cache.
    pub planner: Arc<Planner>,
    /// What they are asked.
    pub question: Arc<Question>,
    /// The node's shared things.
    pub services: Services,
}

impl Stage for PartitionStage {
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            while let Some(request) = self.input.recv().await {
                let metrics = context.telemetry.metrics();
                let mut computed_from = None;
                let planned = self.planner.plan(&self.question.key, || {
                    computed_from = Some(context.clock.now());
                    self.question.input()
                });
                match computed_from {
                    Some(began) => {
                        metrics.partition_cache_hit_ratio.miss();
                        let elapsed = context.clock.now().saturating_sub(began);
                        metrics.partition_computation_duration_seconds.record(elapsed);
                    }
                    None => metrics.partition_cache_hit_ratio.hit(),
                }
                match planned {
                    Ok(plan) => {
                        context.telemetry.traces().mark(&request.rd.0, Mark::new("partition", "planned"));
                        if self.output.send(Planned { request, plan }).await.is_err() {
                            break;
                        }
                    }
                    Err(error) => self.services.board.fail(&request.rd, ButterflyError::Partition(error)).await,
                }
            }
            Ok(())
        }
        .boxed()
    }
}
