//! Planners: from what a model costs and what the nodes have to a [`Plan`].
//!
//! How many slices, when the input does not say: as many as there are disjoint replica sets, n / (2f+1), at most one for
//! each layer, and never so many that a replica set would hold more nodes of one trust domain than a single replica set
//! has to; `load_balanced` and `topology_aware` take fewer when that makes the slowest slice faster. A node holds several
//! slices only when the number of slices is given and there are too few nodes for each replica to have its own.
//!
//! Planners refuse to know which nodes are alive: they plan with the nodes they are given.

mod cut;
mod forecast;
mod load_balanced;
mod replica_sets;
mod topology_aware;
mod uniform;

use std::collections::BTreeSet;

pub use forecast::{Forecast, LinkForecast, REFERENCE_WORK_PER_SECOND, Rejection, SliceForecast, forecast};
pub(crate) use replica_sets::Domains;

use crate::plan::{LAYERS_MAX, Lack, Plan, PlanError, PlanInput, SlicePlan, Strategy};

/// Plans with one strategy.
///
/// # Errors
/// [`PlanError`] when the input contradicts itself, or the strategy lacks something it needs.
pub fn plan(strategy: Strategy, input: &PlanInput<'_>) -> Result<Plan, PlanError> {
    check(input)?;
    let slices = match strategy {
        Strategy::TopologyAware => topology_aware::slices(input)?,
        Strategy::LoadBalanced => load_balanced::slices(input)?,
        Strategy::Uniform => uniform::slices(input)?,
    };
    Ok(Plan { slices, strategy, fallbacks: Vec::new() })
}

/// Plans with the first strategy that gives a plan, from `first` on in the order topology_aware, load_balanced, uniform.
/// The plan names the strategies that were passed over, and why.
///
/// # Errors
/// The error of the input when it contradicts itself; otherwise all reasons, when no strategy gives a plan.
pub fn plan_or_degrade(first: Strategy, input: &PlanInput<'_>) -> Result<Plan, PlanError> {
    check(input)?;
    let mut failures: Vec<(Strategy, PlanError)> = Vec::new();
    for strategy in Strategy::ALL.into_iter().filter(|strategy| *strategy >= first) {
        match plan(strategy, input) {
            Ok(plan) => {
                let fallbacks = failures.into_iter().map(|(strategy, error)| (strategy, error.to_string())).collect();
                return Ok(Plan { fallbacks, ..plan });
            }
            Err(error) => failures.push((strategy, error)),
        }
    }
    Err(PlanError::Exhausted(failures))
}

/// What no strategy can work from.
fn check(input: &PlanInput<'_>) -> Result<(), PlanError> {
    let invalid = |reason: String| Err(PlanError::InvalidConfiguration { reason });
    let layers = input.layers.len();
    if layers == 0 || layers > LAYERS_MAX {
        return invalid(format!("a model has from 1 to {LAYERS_MAX} layers, not {layers}"));
    }
    if let Some(index) = input.layers.iter().position(|layer| !(layer.work.is_finite() && layer.work >= 0.0)) {
        return invalid(format!("the work of layer {index} is not a number of multiply-adds"));
    }
    let replicas = replicas(input);
    if input.nodes.len() < replicas {
        return Err(PlanError::NoNodesAvailable { needed: replicas, available: input.nodes.len() });
    }
    let mut ids = BTreeSet::new();
    for node in input.nodes {
        if !ids.insert(&node.id) {
            return invalid(format!("node {} is listed twice", node.id));
        }
        if node.compute.is_some_and(|speed| !(speed.is_finite() && speed > 0.0)) {
            return invalid(format!("the compute of node {} is not a speed", node.id));
        }
    }
    match input.slices {
        Some(0) => invalid("a model is cut into at least one slice".to_owned()),
        Some(slices) if slices > layers => invalid(format!("{layers} layers cannot be cut into {slices} slices")),
        _ => Ok(()),
    }
}

/// Nodes of a replica set: 2f+1.
fn replicas(input: &PlanInput<'_>) -> usize {
    input.max_byzantine.saturating_mul(2).saturating_add(1)
}

/// Slices from the ends of their layers and their replica sets, given as positions in the input.
fn assemble(input: &PlanInput<'_>, ends: &[usize], sets: &[Vec<usize>]) -> Vec<SlicePlan> {
    let mut first = 0;
    ends.iter()
        .zip(sets)
        .map(|(&end, set)| {
            let layers = std::mem::replace(&mut first, end)..end;
            let replicas = set.iter().filter_map(|node| input.nodes.get(*node)).map(|node| node.id.clone()).collect();
            SlicePlan { layers, replicas }
        })
        .collect()
}

/// Whether every node can hold all of its slices; the first that cannot is named.
fn check_memory(
    input: &PlanInput<'_>,
    costs: &cut::Costs,
    ends: &[usize],
    sets: &[Vec<usize>],
) -> Result<(), PlanError> {
    let mut needed = vec![0_u64; input.nodes.len()];
    let mut first = 0;
    for (&end, set) in ends.iter().zip(sets) {
        let bytes = costs.memory(first..end);
        for node in set {
            if let Some(needed) = needed.get_mut(*node) {
                *needed = needed.saturating_add(bytes);
            }
        }
        first = end;
    }
    for (node, needed_bytes) in input.nodes.iter().zip(needed) {
        if let Some(available_bytes) = node.memory_bytes.filter(|memory| *memory < needed_bytes) {
            let node = node.id.clone();
            return Err(PlanError::InsufficientResources(Lack::NodeMemory { node, needed_bytes, available_bytes }));
        }
    }
    Ok(())
}
