//! What a node exports: the closed catalogue, in a stable order, with every known label set at zero.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::Bounds;
use butterfly_engine::clock::ManualClock;
use butterfly_engine::telemetry::{EdgeLabel, LABEL_SETS_MAX, ModelLabel, NodeLabel, PhaseLabels, Telemetry};
use butterfly_topology::{NodeId, StageName};

fn declared() -> (ManualClock, Telemetry) {
    let clock = ManualClock::new(0);
    let telemetry = Telemetry::with_clock(NodeId::parse("n0").unwrap(), Arc::new(clock.clone()));
    let peer = NodeId::parse("n1").unwrap();
    let metrics = telemetry.metrics();
    metrics.declare_model("tiny", &["completion", "inference"]);
    metrics.declare_member(&peer);
    let phase = [PhaseLabels { phase: "vote", result: "decided" }];
    metrics.declare_phases(&phase, &phase, &phase);
    telemetry.peer(&peer);
    telemetry.open_stage(&StageName::parse("ingest").unwrap()).begin();
    telemetry.open_edge(EdgeLabel::new("ingest.request", "partition.request"), Bounds { items: 8, bytes: 100 });
    (clock, telemetry)
}

#[test]
fn every_known_label_set_starts_at_zero() {
    let (_clock, telemetry) = declared();
    let text = telemetry.render();
    // Buckets are the same for every histogram, so one of them stands for all.
    let shown = text.lines().filter(|line| !line.contains("_bucket{") || line.contains("inter_token"));
    let shown = shown.map(|line| line.replace(env!("CARGO_PKG_VERSION"), "[version]"));
    insta::assert_snapshot!(shown.collect::<Vec<_>>().join("\n"));
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    for sample in samples.filter(|line| !line.contains("capacity_items") && !line.contains("build_info")) {
        let value: f64 = sample.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(value, 0.0, "{sample}");
        assert!(sample.starts_with("butterfly_"), "{sample}");
    }
    assert_eq!(text, telemetry.render(), "the same state is the same text");
}

#[test]
fn states_and_latencies_are_exported_in_seconds() {
    let (clock, telemetry) = declared();
    clock.advance(Duration::from_millis(1500));
    let label = ModelLabel { model: "tiny".to_owned() };
    let latency = telemetry.metrics().task_latency_seconds.of(&label);
    for ms in [10, 20, 30, 40] {
        latency.record(Duration::from_millis(ms));
    }
    let text = telemetry.render();
    for expected in [
        r#"butterfly_stage_state_seconds_total{stage="ingest",node="n0",state="busy"} 1.5"#,
        r#"butterfly_task_latency_seconds_sum{model="tiny"} 0.1"#,
        r#"butterfly_task_latency_seconds_count{model="tiny"} 4"#,
        r#"butterfly_task_latency_seconds_bucket{le="0.025",model="tiny"} 2"#,
        r#"butterfly_task_latency_seconds_bucket{le="+Inf",model="tiny"} 4"#,
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected}\n{text}");
    }
    let quantile = r#"butterfly_task_latency_quantile_seconds{model="tiny",quantile="0.5"} 0.0"#;
    assert!(text.lines().any(|line| line.starts_with(quantile)), "{text}");
}

#[test]
fn label_sets_are_bounded_whatever_a_caller_does() {
    let telemetry = Telemetry::new(NodeId::parse("n0").unwrap());
    let evidence = &telemetry.metrics().evidence_total;
    for number in 0..LABEL_SETS_MAX + 10 {
        evidence.of(&NodeLabel { node: format!("n{number}") }).inc();
    }
    assert_eq!(evidence.all().len(), LABEL_SETS_MAX);
}
