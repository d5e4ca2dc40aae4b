//! From a topology file to running stages: wiring, backpressure, supervision, shutdown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use butterfly_engine::registry::{BuildError, Registry};
use butterfly_engine::telemetry::{StageState, Telemetry};
use butterfly_engine::wiring::Wiring;
use butterfly_topology::{KindSignature, PortSpec};
use support::{Collector, Graph, Number, SINK, SOURCE, node, ports_of, registry, signature, topology};

const NUMBERS_IN: &[PortSpec] = &[PortSpec { name: "in", item: "Number", required: true }];
const NUMBERS_OUT: &[PortSpec] = &[PortSpec { name: "out", item: "Number", required: true }];

#[tokio::test]
async fn a_user_written_map_is_wired_from_text() {
    let collector = Collector::default();
    let doubling = signature("double", NUMBERS_IN, NUMBERS_OUT);
    let registry = registry(&collector)
        .map(doubling, |_spec| Ok(|Number(number)| async move { (number % 2 == 0).then_some(Number(number * 2)) }));
    let text = r#"
        [[stage]]
        kind = "source"
        count = 5
        [[stage]]
        kind = "double"
        input = "source"
        [[stage]]
        kind = "sink"
        input = "double"
    "#;
    let running = Graph::new(text, registry).start();
    running.ready().await.unwrap();
    running.ended().await.unwrap();
    assert_eq!(collector.taken(), [0, 4, 8], "odd numbers are dropped, the source's end travels to the sink");
}

#[tokio::test]
async fn several_edges_enter_one_port_and_each_keeps_its_order() {
    let collector = Collector::default();
    let text = r#"
        [[stage]]
        kind = "source"
        name = "low"
        count = 50
        [[stage]]
        kind = "source"
        name = "high"
        first = 1000
        count = 50
        [[stage]]
        kind = "sink"
        input = ["low", "high"]
    "#;
    let graph = Graph::new(text, registry(&collector));
    let telemetry = Arc::clone(&graph.telemetry);
    graph.start().ended().await.unwrap();
    let (low, high): (Vec<u64>, Vec<u64>) = collector.taken().into_iter().partition(|number| *number < 1000);
    assert_eq!(low, (0..50).collect::<Vec<_>>());
    assert_eq!(high, (1000..1050).collect::<Vec<_>>());
    let edges: Vec<_> = telemetry.profile().edges.into_iter().map(|edge| (edge.from, edge.to, edge.items)).collect();
    assert_eq!(
        edges,
        [("low.out", "sink.in", 50), ("high.out", "sink.in", 50)].map(|(a, b, n)| (a.to_owned(), b.to_owned(), n))
    );
}

#[tokio::test]
async fn a_stage_of_another_node_is_left_out_and_its_edges_end_closed() {
    let collector = Collector::default();
    let text = r#"
        [[stage]]
        kind = "source"
        name = "here"
        on = ["n0"]
        count = 3
        [[stage]]
        kind = "source"
        name = "there"
        on = ["n1"]
        count = 3
        [[stage]]
        kind = "sink"
        input = ["here", "there"]
    "#;
    let graph = Graph::new(text, registry(&collector));
    let unspawned = graph.compile();
    assert_eq!(unspawned.stages().map(ToString::to_string).collect::<Vec<_>>(), ["here", "sink"]);
    unspawned.start().ended().await.unwrap();
    assert_eq!(collector.taken(), [0, 1, 2]);
}

/// The source may run ahead by what the edges hold and what the stages between have in hand, and by nothing more.
#[tokio::test]
async fn exactly_the_predicted_number_is_admitted() {
    for (first, second, bytes) in [(1, 1, 1 << 20), (4, 2, 1 << 20), (100, 2, 24)] {
        let collector = Collector::gated();
        let registry = registry(&collector)
            .map(signature("same", NUMBERS_IN, NUMBERS_OUT), |_spec| Ok(|number: Number| async move { Some(number) }));
        let text = format!(
            r#"
            [[stage]]
            kind = "source"
            count = 1000
            capacity = {first}
            capacity_bytes = {bytes}
            [[stage]]
            kind = "same"
            input = "source"
            capacity = {second}
            [[stage]]
            kind = "sink"
            input = "same"
            "#
        );
        let graph = Graph::new(&text, registry);
        let telemetry = Arc::clone(&graph.telemetry);
        let running = graph.start();
        // A number counts eight bytes.
        let in_first = first.min(bytes / 8);
        let expected = in_first + 1 + second + 1;
        let blocked = |name: &str| support::state(&telemetry, name) == Some(StageState::Blocked);
        support::until(|| blocked("source") && blocked("same") && collector.waiting()).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(collector.produced(), expected as u64, "{first} + {second} items, {bytes} bytes");
        collector.open();
        running.ended().await.unwrap();
        assert_eq!(collector.taken().len(), 1000);
    }
}

#[test]
fn all_errors_of_building_come_at_once() {
    let collector = Collector::default();
    let registry = registry(&collector)
        .with(signature("wrong_type", NUMBERS_IN, &[]), |build| {
            build.ports.input::<support::Word>("in")?;
            panic!("not reached")
        })
        .with(signature("no_port", NUMBERS_IN, &[]), |build| {
            build.ports.output::<Number>("nowhere")?;
            panic!("not reached")
        })
        .with(signature("leaves_port", NUMBERS_IN, &[]), |_build| Ok(support::idle()))
        .with(signature("unhappy", NUMBERS_IN, &[]), |build| Err(build.configuration("colour", "is not a colour")))
        .with(KindSignature { networked: true, ..signature("lonely", NUMBERS_IN, &[]) }, |build| {
            build.ports.input::<Number>("in")?;
            Ok(support::idle())
        });
    let kinds = ["wrong_type", "no_port", "leaves_port", "unhappy", "lonely"];
    let mut text = String::new();
    for kind in kinds {
        text += &format!(
            "[[stage]]\nkind = \"source\"\nname = \"to_{kind}\"\n[[stage]]\nkind = \"{kind}\"\ninput = \"to_{kind}\"\n"
        );
    }
    let topology = topology(&text, &registry);
    let telemetry = Arc::new(Telemetry::new(node("n0")));
    let clock = butterfly_engine::clock::RealClock::shared();
    let errors = Wiring::compile(&topology, &node("n0"), &registry, telemetry, None, clock).err().unwrap();
    let mut told: Vec<String> = errors.iter().map(butterfly_engine::stage::explain).collect();
    told.sort();
    insta::assert_snapshot!(told.join("\n"), @r"
    stage `leaves_port` did not take its port `in`, which has an edge
    stage `lonely` talks to other nodes, and there is no network to do it over
    stage `no_port` has no output port `nowhere` left to take
    stage `unhappy`: key `colour`: is not a colour
    stage `wrong_type`, port `in`: carries `Number`, which is not a `graph::support::Word`
    ");
}

#[test]
fn a_registry_that_contradicts_itself_is_refused_whatever_the_graph() {
    let registry = Registry::new()
        .item::<Number>("Number")
        .item::<Number>("Number")
        .item::<support::Word>("Number")
        .with(signature("sink", &[PortSpec { name: "in", item: "Nothing", required: true }], &[]), |_| {
            Ok(support::idle())
        })
        .with(SOURCE, |_| Ok(support::idle()))
        .with(SOURCE, |_| Ok(support::idle()))
        .map(SINK, |_spec| Ok(|number: Number| async move { Some(number) }));
    let told: Vec<String> = registry.faults().iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(told.join("\n"), @r"
    kind `source` is registered twice
    item `Number` is registered twice
    kind `sink` maps items to items, so it has one input and one output
    kind `sink`, port `in`: no item `Nothing` is registered
    ");
    let topology = topology(
        "[[stage]]\nkind = \"source\"\n[[stage]]\nkind = \"drain\"\ninput = \"source\"\n",
        &support::drain_only(),
    );
    let telemetry = Arc::new(Telemetry::new(node("n9")));
    let clock = butterfly_engine::clock::RealClock::shared();
    let errors = Wiring::compile(&topology, &node("n9"), &registry, telemetry, None, clock).err().unwrap();
    assert!(errors.iter().any(|error| matches!(error, BuildError::UnknownNode { .. })));
}

#[test]
fn catalogue_and_registry_are_one_list() {
    let registry = registry(&Collector::default());
    let kinds: Vec<_> = registry.catalogue().kinds().map(|signature| signature.kind).collect();
    assert_eq!(kinds, ["sink", "source"]);
    assert_eq!(registry.catalogue().faults(), Vec::<String>::new());
    assert_eq!(ports_of(&registry, "source"), ["out"]);
}

#[tokio::test]
async fn every_stage_of_a_chain_counts_every_item() {
    let seen = Arc::new(AtomicU64::new(0));
    let collector = Collector::default();
    let counter = Arc::clone(&seen);
    let registry = registry(&collector).map(signature("count", NUMBERS_IN, NUMBERS_OUT), move |_spec| {
        let seen = Arc::clone(&counter);
        Ok(move |number: Number| {
            seen.fetch_add(1, Ordering::Relaxed);
            async move { Some(number) }
        })
    });
    let text = r#"
        [[stage]]
        kind = "source"
        count = 20
        [[stage]]
        kind = "count"
        input = "source"
        [[stage]]
        kind = "sink"
        input = "count"
    "#;
    let graph = Graph::new(text, registry);
    let telemetry = Arc::clone(&graph.telemetry);
    graph.start().ended().await.unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), 20);
    let profile = telemetry.profile();
    let items: Vec<_> =
        profile.stages.iter().map(|stage| (stage.name.as_str(), stage.items, stage.service.count)).collect();
    assert_eq!(items, [("source", 0, 0), ("count", 20, 20), ("sink", 20, 20)]);
    let round = serde_json::from_str::<butterfly_engine::telemetry::Profile>(&serde_json::to_string(&profile).unwrap());
    assert_eq!(round.unwrap().edges.len(), 2);
}
