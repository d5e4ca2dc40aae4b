//! What a plan promises: how long a step takes, what crosses each link, and why nodes were left out.
//!
//! A forecast follows from the plan and from what was declared of the nodes. It is as good as these: an unknown speed
//! counts as 1, an unknown bandwidth as unlimited, and a speed of 1 is [`REFERENCE_WORK_PER_SECOND`] unless the caller has
//! measured something better. It decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{cut, replica_sets, replicas};
use crate::cluster::NodeSpec;
use crate::name::NodeId;
use crate::plan::{Plan, PlanInput, bytes_text};

/// Multiply-adds per second of a node whose relative speed is 1: what relates work to bytes sent. About one core of a
/// laptop on weights that come from memory.
pub const REFERENCE_WORK_PER_SECOND: f64 = 4e9;

/// Bytes of a token that the last slice hands back to the first.
const TOKEN_BYTES: u64 = 4;

/// What a plan promises.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Each slice.
    pub slices: Vec<SliceForecast>,
    /// What passes from slice to slice; the last one hands tokens to the first.
    pub links: Vec<LinkForecast>,
    /// Seconds for one token of one request through every slice.
    pub step_seconds: f64,
    /// Tokens per second over all requests, when every slice is busy.
    pub tokens_per_second: f64,
    /// The slice that bounds it.
    pub slowest_slice: usize,
    /// The time of an even division of the work by speed, by the time of the slowest slice, in `(0, 1]`.
    pub quality: f64,
    /// Nodes that hold nothing, and why.
    pub rejected: Vec<Rejection>,
}

/// One slice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SliceForecast {
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of weights, and of caches for the longest sequence, on each replica.
    pub memory_bytes: u64,
    /// Seconds of computing for each position, on the slowest replica.
    pub compute_seconds: f64,
    /// Seconds of receiving and sending for each position, whichever is longer.
    pub crossing_seconds: f64,
}

/// What passes between two slices.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkForecast {
    /// The slice that sends.
    pub from_slice: usize,
    /// The slice that receives.
    pub to_slice: usize,
    /// Bytes for each position on the link from one replica to one other.
    pub bytes_per_token: u64,
    /// Links between the two replica sets; a replica of both sends itself nothing over the network.
    pub links: usize,
}

/// A node that holds nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rejection {
    /// The node.
    pub node: NodeId,
    /// Why.
    pub reason: String,
}

/// What `plan`, which was made from `input`, promises.
#[must_use]
pub fn forecast(plan: &Plan, input: &PlanInput<'_>, work_per_second: f64) -> Forecast {
    let costs = cut::Costs::new(input);
    let places: BTreeMap<&NodeId, usize> = (0..).zip(input.nodes).map(|(index, node)| (&node.id, index)).collect();
    let set = |replicas: &Vec<NodeId>| replicas.iter().filter_map(|node| places.get(node).copied()).collect();
    let sets: Vec<Vec<usize>> = plan.slices.iter().map(|slice| set(&slice.replicas)).collect();
    let slots = cut::slots(input.nodes, &sets);
    let size = replicas(input) as f64;
    let slices: Vec<SliceForecast> = plan
        .slices
        .iter()
        .zip(&slots)
        .map(|(slice, slot)| {
            let inner = slice.layers.clone().filter_map(|layer| input.layers.get(layer));
            let crossing = |bytes: u64| bytes as f64 * size / slot.bandwidth;
            let (before, behind) = (boundary(input, slice.layers.start), boundary(input, slice.layers.end));
            SliceForecast {
                weight_bytes: inner.map(|layer| layer.weight_bytes).fold(0, u64::saturating_add),
                memory_bytes: costs.memory(slice.layers.clone()),
                compute_seconds: costs.work(slice.layers.clone()) / (slot.speed * work_per_second),
                crossing_seconds: crossing(before).max(crossing(behind)),
            }
        })
        .collect();
    let paces = slices.iter().map(|slice| slice.compute_seconds.max(slice.crossing_seconds));
    let (slowest_slice, slowest) =
        (0..).zip(paces).fold((0, 0.0), |most: (usize, f64), next| if next.1 > most.1 { next } else { most });
    let speeds: f64 = slots.iter().map(|slot| slot.speed).sum();
    let even = costs.work(0..input.layers.len()) / (speeds * work_per_second);
    Forecast {
        links: links(plan, input),
        step_seconds: slices.iter().map(|slice| slice.compute_seconds + slice.crossing_seconds).sum(),
        tokens_per_second: if slowest > 0.0 { 1.0 / slowest } else { 0.0 },
        slowest_slice,
        quality: if slowest > 0.0 { (even / slowest).min(1.0) } else { 1.0 },
        rejected: rejected(plan, input, &slices),
        slices,
    }
}

/// Bytes that pass the cut before layer `at`; none at the ends of the model.
fn boundary(input: &PlanInput<'_>, at: usize) -> u64 {
    let is_inner = at > 0 && at < input.layers.len();
    let last = at.checked_sub(1).filter(|_| is_inner).and_then(|last| input.layers.get(last));
    last.map_or(0, |layer| layer.boundary_bytes)
}

fn links(plan: &Plan, input: &PlanInput<'_>) -> Vec<LinkForecast> {
    let count = plan.slices.len();
    let between = |from_slice: usize, to_slice: usize| {
        let (from, to) = (plan.slices.get(from_slice)?, plan.slices.get(to_slice)?);
        let pairs = from.replicas.iter().flat_map(|one| to.replicas.iter().filter(move |other| one != *other));
        let bytes_per_token = if to_slice == 0 { TOKEN_BYTES } else { boundary(input, from.layers.end) };
        Some(LinkForecast { from_slice, to_slice, bytes_per_token, links: pairs.count() })
    };
    (0..count).filter_map(|slice| between(slice, if slice + 1 == count { 0 } else { slice + 1 })).collect()
}

/// Why each node that holds nothing does not: in the order of what its owner could change.
fn rejected(plan: &Plan, input: &PlanInput<'_>, slices: &[SliceForecast]) -> Vec<Rejection> {
    let held: BTreeSet<&NodeId> = plan.slices.iter().flat_map(|slice| &slice.replicas).collect();
    let size = replicas(input);
    let least = slices.iter().map(|slice| slice.memory_bytes).min().unwrap_or(0);
    let domains = replica_sets::Domains::new(input.nodes);
    let disjoint = input.nodes.len() / size;
    let of_domain = |node: &NodeSpec, replicas: &[NodeId]| {
        let is_same = |other: &&NodeSpec| other.domain.is_some() && other.domain == node.domain;
        input.nodes.iter().filter(|other| replicas.contains(&other.id)).any(|other| is_same(&other))
    };
    let reason = |node: &NodeSpec| {
        if let Some(memory) = node.memory_bytes.filter(|memory| *memory < least) {
            let (memory, least) = (bytes_text(memory), bytes_text(least));
            return format!("it has {memory} of memory, and the smallest slice needs {least}");
        }
        if plan.slices.len() >= disjoint {
            let left = input.nodes.len() - held.len().min(input.nodes.len());
            let speed = node.compute.map_or_else(|| "of unknown speed".to_owned(), |speed| format!("of speed {speed}"));
            return format!(
                "{} nodes make {} replica set{} of {size}; {left} {} over, and this one, {speed}, comes last",
                input.nodes.len(),
                plan.slices.len(),
                if plan.slices.len() == 1 { "" } else { "s" },
                if left == 1 { "is" } else { "are" },
            );
        }
        let in_each = plan.slices.iter().all(|slice| of_domain(node, &slice.replicas));
        let more = plan.slices.len() + 1;
        let share = domains.least_share(1, size).unwrap_or(size);
        if let Some(domain) = node.domain.as_deref().filter(|_| in_each && !domains.allow(more, size, share)) {
            return format!(
                "every replica set has a node of {domain:?} already, and {more} sets do not go round the domains there are"
            );
        }
        if input.slices.is_some() {
            return format!("the topology asks for {} slices, which others hold", plan.slices.len());
        }
        if plan.slices.len() >= input.layers.len() {
            return format!("the model has no more than {} layers to divide", input.layers.len());
        }
        format!("cutting the model into {more} slices would not make the slowest one faster")
    };
    let left_out = input.nodes.iter().filter(|node| !held.contains(&node.id));
    left_out.map(|node| Rejection { node: node.id.clone(), reason: reason(node) }).collect()
}
