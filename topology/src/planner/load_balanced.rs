//! `load_balanced`: the cut whose slowest slice is fastest, within the memory of the nodes.
//!
//! Unknown speeds count as 1 and unknown memory as unlimited. Nodes of like speed form replica sets, the fastest first.

use std::cmp::Reverse;

use crate::cluster::NodeSpec;
use crate::plan::{PlanError, PlanInput, SlicePlan};

use super::{assemble, check_memory, cut, replica_sets, replicas};

pub(super) fn slices(input: &PlanInput<'_>) -> Result<Vec<SlicePlan>, PlanError> {
    let domains = replica_sets::Domains::new(input.nodes);
    let preference = by_ability(input.nodes);
    let sets = replica_sets::form(&domains, &preference, replicas(input), input.slices, input.layers.len());
    let costs = cut::Costs::new(input);
    let time = |slot: &cut::Slot, layers: std::ops::Range<usize>| costs.work(layers) / slot.speed;
    fit(input, &costs, sets, time, time)
}

/// Positions of the nodes, the fastest and then the largest first; ids decide between equals, so that the order in which
/// nodes are listed does not matter.
pub(super) fn by_ability(nodes: &[NodeSpec]) -> Vec<usize> {
    let mut order: Vec<(usize, &NodeSpec)> = nodes.iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| {
        let speed = |node: &NodeSpec| node.compute.unwrap_or(1.0);
        let memory = |node: &NodeSpec| Reverse(node.memory_bytes.unwrap_or(u64::MAX));
        speed(b).total_cmp(&speed(a)).then_with(|| (memory(a), &a.id).cmp(&(memory(b), &b.id)))
    });
    order.into_iter().map(|(index, _)| index).collect()
}

/// The best cut for these replica sets.
///
/// Where nodes hold several slices, memory is one budget for all of a node's slices, which the cut cannot see. So the best
/// cut is tried without regard to memory first, and is taken when every node can hold its slices; otherwise each slice
/// gets an equal part of the node's memory, which is safe and may refuse a model that an uneven division would fit.
pub(super) fn fit(
    input: &PlanInput<'_>,
    costs: &cut::Costs,
    sets: Vec<Vec<usize>>,
    floor: impl Fn(&cut::Slot, std::ops::Range<usize>) -> f64,
    time: impl Fn(&cut::Slot, std::ops::Range<usize>) -> f64,
) -> Result<Vec<SlicePlan>, PlanError> {
    let layers = input.layers.len();
    let slots = cut::slots(input.nodes, &sets);
    let taken: usize = sets.iter().map(Vec::len).sum();
    if taken > input.nodes.len() {
        let mut unbounded = slots.clone();
        for slot in &mut unbounded {
            slot.memory_bytes = u64::MAX;
        }
        let cuts = cut::best(costs, layers, &unbounded, &floor, &time);
        if let Some(ends) = cuts.ends(sets.len())
            && check_memory(input, costs, &ends, &sets).is_ok()
        {
            return Ok(assemble(input, &ends, &sets));
        }
    }
    let cuts = cut::best(costs, layers, &slots, floor, time);
    let slices = if input.slices.is_some() { Some(sets.len()) } else { cuts.fastest() };
    let ends = slices.and_then(|slices| cuts.ends(slices));
    let Some(ends) = ends else { return Err(cut::lack(input, costs, &slots)) };
    Ok(assemble(input, &ends, &sets))
}
