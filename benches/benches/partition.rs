//! Plans: uncached for 100 layers on 100 nodes by each planner, and from the cache.
//!
//! `cargo bench -p butterfly-bench --bench partition`

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;

use butterfly::partition::{PlanKey, Planner, Question, nodes_digest};
use butterfly_topology::NodeSpec;
use butterfly_topology::plan::{LayerCost, Strategy};
use butterfly_topology::planner;
use criterion::{Criterion, criterion_group, criterion_main};

fn question(strategy: Strategy) -> Question {
    let layers = (0..100)
        .map(|layer| LayerCost {
            weight_bytes: (200 + layer % 7) << 20,
            kv_bytes_per_position: 8192,
            work: 2e8 + layer as f64,
            boundary_bytes: 16_384,
        })
        .collect();
    let nodes: Vec<NodeSpec> = (0..100)
        .map(|index| NodeSpec {
            id: format!("n{index}").parse().unwrap(),
            listen_address: format!("10.0.{}.{}:9000", index / 250, index % 250 + 1).parse().unwrap(),
            public_key: [2; 33],
            domain: Some(format!("lab-{}", index % 20)),
            memory_bytes: Some((8 + index as u64 % 5) << 30),
            compute: Some(1.0 + f64::from(index % 9) * 0.25),
            bandwidth: Some(125_000_000 + index as u64 * 1_000_000),
            admin_address: None,
            adversary: None,
        })
        .collect();
    let key = PlanKey { model: [7; 32], strategy, nodes: nodes_digest(&nodes) };
    Question { layers, nodes, max_byzantine: 1, slices: None, positions_max: 8192, key }
}

fn plans(criterion: &mut Criterion) {
    for strategy in Strategy::ALL {
        let question = question(strategy);
        criterion.bench_function(&format!("uncached {strategy}"), |bencher| {
            bencher.iter(|| planner::plan(strategy, black_box(&question.input())).unwrap());
        });
    }
    let question = question(Strategy::TopologyAware);
    let planner = Planner::new(100);
    planner.plan(&question.key, || question.input()).unwrap();
    criterion.bench_function("cached", |bencher| {
        bencher.iter(|| planner.plan(black_box(&question.key), || question.input()).unwrap());
    });
}

criterion_group!(benches, plans);
criterion_main!(benches);
