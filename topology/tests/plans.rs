//! Plans: what the strategies promise, and why they refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use butterfly_topology::planner::{forecast, plan, plan_or_degrade};
use butterfly_topology::{Lack, LayerCost, NodeId, NodeSpec, Plan, PlanError, PlanInput, Strategy};
use proptest::prelude::*;
use proptest::strategy::Strategy as Generator;

const GIB: u64 = 1 << 30;

fn node(index: usize) -> NodeSpec {
    NodeSpec {
        id: NodeId::parse(&format!("n{index}")).unwrap(),
        listen_address: format!("127.0.0.1:{}", 9000 + index).parse().unwrap(),
        public_key: [2; 33],
        domain: None,
        memory_bytes: None,
        compute: None,
        bandwidth: None,
        admin_address: None,
        adversary: None,
    }
}

fn nodes(count: usize) -> Vec<NodeSpec> {
    (0..count).map(node).collect()
}

fn measured(index: usize, compute: f64, domain: &str) -> NodeSpec {
    let bandwidth = Some(125_000_000);
    NodeSpec { compute: Some(compute), bandwidth, domain: Some(domain.to_owned()), ..node(index) }
}

fn layer() -> LayerCost {
    LayerCost { weight_bytes: GIB / 4, kv_bytes_per_position: 4096, work: 1e8, boundary_bytes: 8192 }
}

fn input<'a>(layers: &'a [LayerCost], nodes: &'a [NodeSpec], max_byzantine: usize) -> PlanInput<'a> {
    PlanInput { layers, nodes, max_byzantine, slices: None, positions_max: 0 }
}

fn sizes(plan: &Plan) -> Vec<usize> {
    plan.slices.iter().map(|slice| slice.layers.len()).collect()
}

fn replicas(plan: &Plan) -> Vec<Vec<&str>> {
    plan.slices.iter().map(|slice| slice.replicas.iter().map(NodeId::as_str).collect()).collect()
}

fn check_shape(plan: &Plan, input: &PlanInput<'_>) {
    let mut next = 0;
    for slice in &plan.slices {
        assert_eq!(slice.layers.start, next, "slices touch");
        assert!(slice.layers.end > slice.layers.start, "no slice is empty");
        next = slice.layers.end;
        let distinct: BTreeSet<&NodeId> = slice.replicas.iter().collect();
        assert_eq!(distinct.len(), 2 * input.max_byzantine + 1, "2f+1 distinct replicas");
        assert_eq!(slice.replicas.len(), distinct.len());
        assert!(distinct.iter().all(|id| input.nodes.iter().any(|node| node.id == **id)));
    }
    assert_eq!(next, input.layers.len(), "every layer is covered");
}

#[test]
fn as_many_nodes_as_replicas_make_one_slice() {
    let layers = vec![layer(); 8];
    for strategy in Strategy::ALL {
        let nodes: Vec<NodeSpec> = (0..3).map(|i| measured(i, 1.0, &format!("d{i}"))).collect();
        let plan = plan(strategy, &input(&layers, &nodes, 1)).unwrap();
        assert_eq!((sizes(&plan), plan.slices[0].replicas.len()), (vec![8], 3));
    }
}

#[test]
fn uniform_cuts_equally_and_takes_nodes_in_order() {
    let layers = vec![layer(); 7];
    let nodes = nodes(7);
    let plan = plan(Strategy::Uniform, &input(&layers, &nodes, 1)).unwrap();
    assert_eq!(sizes(&plan), [4, 3]);
    assert_eq!(replicas(&plan), [["n0", "n1", "n2"], ["n3", "n4", "n5"]]);
}

#[test]
fn a_node_holds_two_slices_only_when_slices_are_asked_for_and_nodes_are_few() {
    let layers = vec![layer(); 4];
    let three = nodes(3);
    let asked = PlanInput { slices: Some(4), ..input(&layers, &three, 1) };
    for strategy in [Strategy::Uniform, Strategy::LoadBalanced] {
        let plan = plan(strategy, &asked).unwrap();
        assert_eq!(sizes(&plan), [1, 1, 1, 1]);
        check_shape(&plan, &asked);
    }
    let five = nodes(5);
    let asked = PlanInput { slices: Some(2), ..input(&layers, &five, 1) };
    let shared = plan(Strategy::Uniform, &asked).unwrap();
    // Six places on five nodes: one node holds two slices.
    assert_eq!(replicas(&shared), [["n0", "n1", "n2"], ["n3", "n4", "n0"]]);
    let free = plan(Strategy::Uniform, &input(&layers, &five, 1)).unwrap();
    assert_eq!(sizes(&free), [4], "without being asked, no node holds two");
}

#[test]
fn the_slowest_slice_is_as_fast_as_it_can_be() {
    let nodes: Vec<NodeSpec> =
        [1.0, 3.0].iter().enumerate().map(|(i, speed)| NodeSpec { compute: Some(*speed), ..node(i) }).collect();
    let layers = vec![layer(); 8];
    let balanced = plan(Strategy::LoadBalanced, &input(&layers, &nodes, 0)).unwrap();
    assert_eq!(replicas(&balanced), [["n1"], ["n0"]], "the fast node comes first");
    assert_eq!(sizes(&balanced), [6, 2]);

    // A heavy layer at the end.
    let mut layers = vec![layer(); 5];
    layers[4].work = 4e8;
    let equal = self::nodes(2);
    let balanced = plan(Strategy::LoadBalanced, &input(&layers, &equal, 0)).unwrap();
    assert_eq!(sizes(&balanced), [4, 1]);
}

/// The cut is compared with all cuts that there are.
#[test]
fn no_other_cut_has_a_faster_slowest_slice() {
    let works = [5.0, 1.0, 1.0, 9.0, 2.0, 2.0, 7.0, 1.0];
    let speeds = [4.0, 2.0, 1.0];
    let layers: Vec<LayerCost> = works.iter().map(|work| LayerCost { work: *work, ..layer() }).collect();
    let nodes: Vec<NodeSpec> =
        speeds.iter().enumerate().map(|(i, speed)| NodeSpec { compute: Some(*speed), ..node(i) }).collect();
    let asked = PlanInput { slices: Some(3), ..input(&layers, &nodes, 0) };
    let made = plan(Strategy::LoadBalanced, &asked).unwrap();
    let slowest = |ends: [usize; 3]| {
        let starts = [0, ends[0], ends[1]];
        (0..3).map(|s| works[starts[s]..ends[s]].iter().sum::<f64>() / speeds[s]).fold(0.0, f64::max)
    };
    let mut least = f64::INFINITY;
    for first in 1..7 {
        for second in first + 1..8 {
            least = least.min(slowest([first, second, 8]));
        }
    }
    let ends: Vec<usize> = made.slices.iter().map(|slice| slice.layers.end).collect();
    assert_eq!(slowest(ends.try_into().unwrap()), least);
}

#[test]
fn slow_nodes_are_left_out_when_they_would_slow_all_down() {
    let nodes: Vec<NodeSpec> =
        [1.0, 1.0, 0.001].iter().enumerate().map(|(i, speed)| NodeSpec { compute: Some(*speed), ..node(i) }).collect();
    let layers = vec![layer(); 6];
    let balanced = plan(Strategy::LoadBalanced, &input(&layers, &nodes, 0)).unwrap();
    assert_eq!(replicas(&balanced), [["n0"], ["n1"]]);
}

#[test]
fn memory_bounds_a_slice() {
    let mut nodes = nodes(2);
    nodes[0].compute = Some(10.0);
    nodes[0].memory_bytes = Some(GIB);
    let layers = vec![layer(); 8];
    let balanced = plan(Strategy::LoadBalanced, &input(&layers, &nodes, 0)).unwrap();
    assert_eq!(sizes(&balanced), [4, 4], "four layers of 256 MiB are all that the fast node holds");

    // With caches for 65,536 positions a layer takes 512 MiB.
    let cached = PlanInput { positions_max: 65_536, ..input(&layers, &nodes, 0) };
    assert_eq!(sizes(&plan(Strategy::LoadBalanced, &cached).unwrap()), [2, 6]);
}

#[test]
fn what_lacks_is_named() {
    let mut nodes = nodes(3);
    for node in &mut nodes {
        node.memory_bytes = Some(GIB);
    }
    let mut layers = vec![layer(); 13];
    let asked = input(&layers, &nodes, 0);
    let error = plan(Strategy::LoadBalanced, &asked).unwrap_err();
    assert_eq!(
        error,
        PlanError::InsufficientResources(Lack::TotalMemory {
            needed_bytes: 13 * GIB / 4,
            available_bytes: 3 * GIB,
            slices: 3
        })
    );
    assert_eq!(error.to_string(), "the model needs 3.2 GiB of memory, and 3 replica sets have 3 GiB in all");

    layers[5].weight_bytes = 2 * GIB;
    let asked = input(&layers, &nodes, 0);
    let error = plan(Strategy::LoadBalanced, &asked).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer 5 needs 2 GiB of memory, and no replica set has more than 1 GiB (bounded by node n2)"
    );

    let layers = vec![LayerCost { weight_bytes: 2 * GIB / 3, ..layer() }; 4];
    let asked = input(&layers, &nodes, 0);
    let error = plan(Strategy::LoadBalanced, &asked).unwrap_err();
    assert!(matches!(error, PlanError::InsufficientResources(Lack::Fragmented { .. })), "{error}");

    let exhausted = plan_or_degrade(Strategy::TopologyAware, &asked).unwrap_err();
    let PlanError::Exhausted(reasons) = &exhausted else { panic!("{exhausted}") };
    assert_eq!(reasons.iter().map(|(strategy, _)| *strategy).collect::<Vec<_>>(), Strategy::ALL);
}

#[test]
fn degradation_goes_step_by_step_and_keeps_the_reasons() {
    let layers = vec![layer(); 4];
    let plain = nodes(3);
    let made = plan_or_degrade(Strategy::TopologyAware, &input(&layers, &plain, 1)).unwrap();
    assert_eq!(made.strategy, Strategy::LoadBalanced);
    let [(strategy, reason)] = made.fallbacks.as_slice() else { panic!("{:?}", made.fallbacks) };
    assert_eq!((*strategy, reason.as_str()), (Strategy::TopologyAware, "compute of nodes n0, n1, n2 is not known"));

    // Even shares of memory do not hold the uneven layers, and equal numbers of layers do.
    let mut uneven = vec![layer(); 4];
    uneven[0].work = 1e9;
    let mut small = nodes(2);
    small[0].memory_bytes = Some(GIB / 2);
    small[1].memory_bytes = Some(GIB / 2);
    let asked = PlanInput { slices: Some(2), ..input(&uneven, &small, 0) };
    assert_eq!(plan_or_degrade(Strategy::LoadBalanced, &asked).unwrap().fallbacks, []);
    assert_eq!(plan_or_degrade(Strategy::Uniform, &asked).unwrap().strategy, Strategy::Uniform);
}

#[test]
fn topology_aware_wants_measurements_and_domains() {
    let layers = vec![layer(); 6];
    let mut six: Vec<NodeSpec> = (0..6).map(|i| measured(i, 1.0, ["a", "b", "c"][i % 3])).collect();
    let made = plan(Strategy::TopologyAware, &input(&layers, &six, 1)).unwrap();
    check_shape(&made, &input(&layers, &six, 1));
    assert_eq!(sizes(&made), [3, 3]);

    six[4].bandwidth = None;
    let error = plan(Strategy::TopologyAware, &input(&layers, &six, 1)).unwrap_err();
    assert_eq!(error.to_string(), "bandwidth of node n4 is not known");

    let two: Vec<NodeSpec> = (0..6).map(|i| measured(i, 1.0, ["a", "b"][i % 2])).collect();
    let error = plan(Strategy::TopologyAware, &input(&layers, &two, 1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 replica set of 3 nodes in 3 different domains is not possible with the 2 domains there are"
    );
    let made = plan_or_degrade(Strategy::TopologyAware, &input(&layers, &two, 1)).unwrap();
    assert_eq!(made.strategy, Strategy::LoadBalanced);
}

#[test]
fn topology_aware_cuts_where_little_crosses() {
    // Only behind layer 2 is the boundary small enough for a slow network.
    let mut layers = vec![LayerCost { boundary_bytes: 1 << 20, ..layer() }; 6];
    layers[1].boundary_bytes = 64;
    let nodes: Vec<NodeSpec> =
        (0..2).map(|i| NodeSpec { bandwidth: Some(1_000_000), ..measured(i, 1.0, "a") }).collect();
    let made = plan(Strategy::TopologyAware, &input(&layers, &nodes, 0)).unwrap();
    assert_eq!(sizes(&made), [2, 4]);
    // With no such place, one slice is faster than two.
    layers[1].boundary_bytes = 1 << 20;
    let made = plan(Strategy::TopologyAware, &input(&layers, &nodes, 0)).unwrap();
    assert_eq!(sizes(&made), [6]);
}

#[test]
fn replicas_of_a_slice_avoid_each_others_domains() {
    let layers = vec![layer(); 4];
    // By order alone the first set would be a, a, a.
    let domains = ["a", "a", "a", "b", "b", "c", "c"];
    let nodes: Vec<NodeSpec> =
        domains.iter().enumerate().map(|(i, d)| NodeSpec { domain: Some((*d).to_owned()), ..node(i) }).collect();
    let made = plan(Strategy::Uniform, &input(&layers, &nodes, 1)).unwrap();
    assert_eq!(replicas(&made), [["n0", "n3", "n5"], ["n1", "n4", "n6"]]);

    // Two sets would need two nodes of a in one of them; one set does not.
    let domains = ["a", "a", "a", "a", "b", "c"];
    let nodes: Vec<NodeSpec> =
        domains.iter().enumerate().map(|(i, d)| NodeSpec { domain: Some((*d).to_owned()), ..node(i) }).collect();
    let made = plan(Strategy::Uniform, &input(&layers, &nodes, 1)).unwrap();
    assert_eq!(replicas(&made), [["n0", "n4", "n5"]], "spread is not traded for slices");
    let asked = PlanInput { slices: Some(2), ..input(&layers, &nodes, 1) };
    let made = plan(Strategy::Uniform, &asked).unwrap();
    assert_eq!(replicas(&made), [["n0", "n1", "n4"], ["n2", "n3", "n5"]]);
}

#[test]
fn a_forecast_adds_up() {
    // Two slices of two and four layers, 1e8 multiply-adds each; 64 bytes cross at 1 MB/s.
    let mut layers = vec![LayerCost { boundary_bytes: 1 << 20, ..layer() }; 6];
    layers[1].boundary_bytes = 64;
    let nodes: Vec<NodeSpec> =
        (0..3).map(|i| NodeSpec { bandwidth: Some(1_000_000), ..measured(i, 1.0, "a") }).collect();
    let input = PlanInput { slices: Some(2), ..input(&layers, &nodes, 0) };
    let made = plan(Strategy::TopologyAware, &input).unwrap();
    assert_eq!(sizes(&made), [2, 4]);
    let told = forecast(&made, &input, 1e9);
    let near = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-9, "{value} is not {expected}");
    near(told.slices[0].compute_seconds, 0.2);
    near(told.slices[1].compute_seconds, 0.4);
    near(told.slices[1].crossing_seconds, 64e-6);
    near(told.step_seconds, 0.6 + 2.0 * 64e-6);
    near(told.tokens_per_second, 2.5);
    near(told.quality, 0.75);
    assert_eq!((told.slowest_slice, told.slices[0].weight_bytes), (1, GIB / 2));
    let links: Vec<_> = told.links.iter().map(|link| (link.from_slice, link.to_slice, link.bytes_per_token)).collect();
    assert_eq!(links, [(0, 1, 64), (1, 0, 4)]);
    assert_eq!(told.rejected.len(), 1);
    assert!(told.rejected[0].reason.contains("asks for 2 slices"), "{:?}", told.rejected);
}

#[test]
fn contradictions_are_refused() {
    let layers = vec![layer(); 2];
    let three = nodes(3);
    let refuse = |input: &PlanInput<'_>| plan_or_degrade(Strategy::TopologyAware, input).unwrap_err();
    assert_eq!(refuse(&input(&layers, &three[..2], 1)), PlanError::NoNodesAvailable { needed: 3, available: 2 });
    assert_eq!(refuse(&input(&layers, &[], 0)), PlanError::NoNodesAvailable { needed: 1, available: 0 });
    let invalid = |input: &PlanInput<'_>| assert!(matches!(refuse(input), PlanError::InvalidConfiguration { .. }));
    invalid(&input(&[], &three, 1));
    invalid(&PlanInput { slices: Some(3), ..input(&layers, &three, 1) });
    invalid(&PlanInput { slices: Some(0), ..input(&layers, &three, 1) });
    invalid(&input(&[LayerCost { work: f64::NAN, ..layer() }], &three, 1));
    let mut bad = nodes(3);
    bad[1].compute = Some(f64::INFINITY);
    invalid(&input(&layers, &bad, 1));
    let twice = [node(0), node(0), node(1)];
    invalid(&input(&layers, &twice, 1));
    assert!(plan_or_degrade(Strategy::Uniform, &input(&layers, &three, usize::MAX)).is_err());
}

prop_compose! {
    fn any_layer()(
        weight_bytes in 0..4 * GIB,
        kv_bytes_per_position in 0..10_000_u64,
        work in 0..1_000_000_u32,
        boundary_bytes in 0..100_000_u64,
    ) -> LayerCost {
        LayerCost { weight_bytes, kv_bytes_per_position, work: f64::from(work), boundary_bytes }
    }
}

fn any_nodes() -> impl Generator<Value = Vec<NodeSpec>> {
    let one = (
        prop::option::of(0..5_u8),
        prop::option::of(1..64 * GIB),
        prop::option::of(1..100_u32),
        prop::option::of(1..1_000_000_000_u64),
    );
    prop::collection::vec(one, 1..16).prop_map(|nodes| {
        let build = |(index, (domain, memory_bytes, compute, bandwidth)): (usize, (Option<u8>, _, Option<u32>, _))| {
            let (domain, compute) = (domain.map(|d| format!("d{d}")), compute.map(|c| f64::from(c) / 10.0));
            NodeSpec { domain, memory_bytes, compute, bandwidth, ..node(index) }
        };
        nodes.into_iter().enumerate().map(build).collect()
    })
}

/// The most nodes of one domain in one replica set.
fn share(plan: &Plan, nodes: &[NodeSpec]) -> usize {
    let domain = |id: &NodeId| {
        let node = nodes.iter().find(|node| node.id == *id).unwrap();
        node.domain.clone().unwrap_or_else(|| format!("of {id}"))
    };
    let most = plan.slices.iter().map(|slice| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for id in &slice.replicas {
            *counts.entry(domain(id)).or_default() += 1;
        }
        counts.into_values().max().unwrap()
    });
    most.max().unwrap()
}

proptest! {
    #[test]
    fn every_plan_covers_all_layers_once_with_distinct_replicas_and_is_repeatable(
        layers in prop::collection::vec(any_layer(), 1..24),
        nodes in any_nodes(),
        max_byzantine in 0..3_usize,
        slices in prop::option::of(1..6_usize),
        positions_max in 0..100_000_u64,
    ) {
        let input = PlanInput { layers: &layers, nodes: &nodes, max_byzantine, slices, positions_max };
        for strategy in Strategy::ALL {
            let made = plan(strategy, &input);
            prop_assert_eq!(&made, &plan(strategy, &input));
            let Ok(made) = made else { continue };
            check_shape(&made, &input);
            prop_assert_eq!(made.strategy, strategy);
            if let Some(slices) = slices {
                prop_assert_eq!(made.slices.len(), slices);
            } else {
                let held: Vec<&NodeId> = made.slices.iter().flat_map(|slice| &slice.replicas).collect();
                let distinct: BTreeSet<&NodeId> = held.iter().copied().collect();
                prop_assert_eq!(held.len(), distinct.len(), "no node holds two slices unasked");
            }
            // Memory that is known suffices.
            for node in &nodes {
                let held = made.slices.iter().filter(|slice| slice.replicas.contains(&node.id));
                let bytes: u64 = held.flat_map(|slice| &layers[slice.layers.clone()])
                    .map(|layer| layer.weight_bytes + layer.kv_bytes_per_position * positions_max).sum();
                prop_assert!(node.memory_bytes.is_none_or(|memory| bytes <= memory), "{} is overfull", node.id);
            }
            if strategy == Strategy::TopologyAware {
                prop_assert_eq!(share(&made, &nodes), 1);
            }
        }
        if let Ok(made) = plan_or_degrade(Strategy::TopologyAware, &input) {
            check_shape(&made, &input);
            let tried: Vec<Strategy> = made.fallbacks.iter().map(|(strategy, _)| *strategy).collect();
            prop_assert!(Strategy::ALL.starts_with(&tried));
            prop_assert_eq!(Some(&made.strategy), Strategy::ALL.get(tried.len()));
        }
    }

    #[test]
    fn unlimited_memory_always_gives_a_plan_with_the_least_sharing_of_domains(
        nodes in any_nodes(),
        max_byzantine in 0..3_usize,
        slices in prop::option::of(1..6_usize),
    ) {
        let nodes: Vec<NodeSpec> = nodes.into_iter().map(|node| NodeSpec { memory_bytes: None, ..node }).collect();
        let layers = vec![layer(); 6];
        let input = PlanInput { slices, ..input(&layers, &nodes, max_byzantine) };
        let size = 2 * max_byzantine + 1;
        prop_assume!(nodes.len() >= size);
        for strategy in [Strategy::Uniform, Strategy::LoadBalanced] {
            let made = plan(strategy, &input).unwrap();
            check_shape(&made, &input);
            // One set alone, or slices that may share nodes: each domain gives at most `share` nodes to each.
            let mut domains: BTreeMap<String, usize> = BTreeMap::new();
            for node in &nodes {
                *domains.entry(node.domain.clone().unwrap_or_else(|| format!("of {}", node.id))).or_default() += 1;
            }
            let sets = match slices {
                Some(slices) if slices * size <= nodes.len() => slices,
                _ => 1,
            };
            let least = (1..=size)
                .find(|share| domains.values().map(|count| (*count).min(share * sets)).sum::<usize>() >= sets * size)
                .unwrap();
            prop_assert_eq!(share(&made, &nodes), least);
        }
    }

    #[test]
    fn the_order_in_which_nodes_are_listed_does_not_matter_to_balanced_plans(
        layers in prop::collection::vec(any_layer(), 1..12),
        nodes in any_nodes(),
        turn in 0..16_usize,
    ) {
        let mut turned = nodes.clone();
        turned.rotate_left(turn % nodes.len());
        for strategy in [Strategy::LoadBalanced, Strategy::TopologyAware] {
            prop_assert_eq!(plan(strategy, &input(&layers, &nodes, 1)), plan(strategy, &input(&layers, &turned, 1)));
        }
    }
}
