//! `uniform`: equal numbers of layers, nodes in the order they are listed.
//!
//! The last resort, so it needs no measurement. Memory that is known must still suffice: a plan that cannot be loaded
//! helps nobody.

use crate::plan::{PlanError, PlanInput, SlicePlan};

use super::{assemble, check_memory, cut, replica_sets, replicas};

pub(super) fn slices(input: &PlanInput<'_>) -> Result<Vec<SlicePlan>, PlanError> {
    let order: Vec<usize> = (0..input.nodes.len()).collect();
    let domains = replica_sets::Domains::new(input.nodes);
    let layers = input.layers.len();
    let sets = replica_sets::form(&domains, &order, replicas(input), input.slices, layers);
    let ends = equal(layers, sets.len());
    check_memory(input, &cut::Costs::new(input), &ends, &sets)?;
    Ok(assemble(input, &ends, &sets))
}

/// Ends of slices whose sizes differ by at most one, the larger ones first.
fn equal(layers: usize, slices: usize) -> Vec<usize> {
    let (size, larger) = (layers / slices.max(1), layers % slices.max(1));
    (1..=slices).map(|slice| slice * size + slice.min(larger)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_differ_by_at_most_one() {
        assert_eq!(equal(10, 3), [4, 7, 10]);
        assert_eq!(equal(4, 4), [1, 2, 3, 4]);
        assert_eq!(equal(5, 1), [5]);
    }
}
