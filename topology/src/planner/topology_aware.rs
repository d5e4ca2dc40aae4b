//! `topology_aware`: like `load_balanced`, and also what crosses the network and who operates what.
//!
//! It works from measurements alone, so every node must have its compute and bandwidth, and with f > 0 its domain; the
//! nodes of a replica set are all of different domains. Computing and sending overlap, so a slice takes as long as the
//! slowest of: computing its layers, receiving the boundary in front, sending the one behind. Each replica sends its
//! boundary to, and receives it from, all replicas of the neighbouring slice.

use std::ops::Range;

use crate::cluster::NodeSpec;
use crate::name::NodeId;
use crate::plan::{Lack, PlanError, PlanInput, SlicePlan};

use super::forecast::REFERENCE_WORK_PER_SECOND;
use super::load_balanced::{by_ability, fit};
use super::{cut, replica_sets, replicas};

pub(super) fn slices(input: &PlanInput<'_>) -> Result<Vec<SlicePlan>, PlanError> {
    measured(input)?;
    let size = replicas(input);
    let domains = replica_sets::Domains::new(input.nodes);
    let sets = sets(input, &domains, size)?;
    let costs = cut::Costs::new(input);
    let compute =
        |slot: &cut::Slot, layers: Range<usize>| costs.work(layers) / (slot.speed * REFERENCE_WORK_PER_SECOND);
    let time = |slot: &cut::Slot, layers: Range<usize>| {
        let crossing = |end: usize| {
            let inner = end > 0 && end < input.layers.len();
            let boundary = end.checked_sub(1).filter(|_| inner).and_then(|last| input.layers.get(last));
            boundary.map_or(0.0, |layer| layer.boundary_bytes as f64 * size as f64 / slot.bandwidth)
        };
        compute(slot, layers.clone()).max(crossing(layers.start)).max(crossing(layers.end))
    };
    fit(input, &costs, sets, compute, time)
}

fn measured(input: &PlanInput<'_>) -> Result<(), PlanError> {
    let lacking = |what: &'static str, has: &dyn Fn(&NodeSpec) -> bool| {
        let mut nodes: Vec<NodeId> = input.nodes.iter().filter(|node| !has(node)).map(|node| node.id.clone()).collect();
        nodes.sort();
        if nodes.is_empty() { Ok(()) } else { Err(PlanError::Unmeasured { what, nodes }) }
    };
    lacking("compute", &|node| node.compute.is_some())?;
    lacking("bandwidth", &|node| node.bandwidth.is_some_and(|bandwidth| bandwidth > 0))?;
    if input.max_byzantine > 0 {
        lacking("domain", &|node| node.domain.is_some())?;
    }
    Ok(())
}

/// Replica sets in which no domain has two nodes.
fn sets(input: &PlanInput<'_>, domains: &replica_sets::Domains, size: usize) -> Result<Vec<Vec<usize>>, PlanError> {
    // With f = 0 a set is one node, and one node is always of one domain.
    let wanted = input.slices.unwrap_or(1);
    let disjoint = wanted <= input.nodes.len() / size;
    let possible = if disjoint { domains.allow(wanted, size, 1) } else { domains.count() >= size };
    if !possible {
        let lack = Lack::Domains { needed: size, available: domains.count(), slices: wanted };
        return Err(PlanError::InsufficientResources(lack));
    }
    Ok(replica_sets::form(domains, &by_ability(input.nodes), size, input.slices, input.layers.len()))
}
