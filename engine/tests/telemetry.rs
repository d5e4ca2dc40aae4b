//! What a node exports: the closed catalogue, in a stable order, with every known label set at zero.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::Bounds;
use butterfly_engine::clock::ManualClock;
use butterfly_engine::telemetry::{
    EdgeLabel, LABEL_SETS_MAX, ModelLabel, NodeLabel, PhaseLabels, ReportForm, Telemetry, TextFormat, samples,
};
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
    let text = telemetry.render(TextFormat::OpenMetrics);
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
    assert_eq!(text, telemetry.render(TextFormat::OpenMetrics), "the same state is the same text");
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
    let text = telemetry.render(TextFormat::OpenMetrics);
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

/// Every name of the catalogue, as a scraper knows it.
const CATALOGUE: [&str; 41] = [
    "tasks_total",
    "task_latency_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "task_queue_seconds",
    "task_latency_quantile_seconds",
    "time_to_first_token_quantile_seconds",
    "inter_token_latency_quantile_seconds",
    "task_queue_quantile_seconds",
    "tasks_running",
    "tasks_waiting",
    "prompt_tokens_total",
    "generation_tokens_total",
    "kv_cache_usage_ratio",
    "stage_state_seconds_total",
    "stage_duration_seconds",
    "edge_queue_items",
    "edge_queue_capacity_items",
    "edge_send_seconds",
    "edge_bytes_total",
    "bytes_transferred_total",
    "messages_sent_total",
    "messages_received_total",
    "retries_total",
    "peer_rtt_seconds",
    "circuit_state",
    "partition_computation_duration_seconds",
    "partition_cache_hit_ratio",
    "partition_quality_ratio",
    "result_cache_hit_ratio",
    "consensus_rounds_total",
    "phase_transitions_total",
    "node_failures_total",
    "verifications_total",
    "verification_seconds",
    "evidence_total",
    "commit_seconds",
    "receipts_total",
    "checkpoints_total",
    "events_dropped_total",
    "build_info",
];

#[test]
fn every_name_of_the_catalogue_is_there_from_the_start() {
    let (_clock, telemetry) = declared();
    let text = telemetry.render(TextFormat::Classic);
    let families: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE butterfly_")?.split_once(' '))
        .map(|(name, _)| name)
        .collect();
    let mut expected = CATALOGUE.to_vec();
    expected.sort_unstable();
    let mut sorted = families.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
    for family in families {
        let name = format!("butterfly_{family}");
        assert!(samples(&text).any(|sample| sample.name.starts_with(&name)), "{name} has no sample");
    }
}

#[test]
fn reports_tell_the_node_and_its_numbers() {
    let (clock, telemetry) = declared();
    clock.advance(Duration::from_millis(1500));
    telemetry.metrics().prompt_tokens_total.inc_by(7);
    let line = telemetry.report(ReportForm::Json);
    assert_eq!(line.matches('\n').count(), 1, "one line");
    let document: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&document["node"], &document["unix_ms"]), (&"n0".into(), &1500.into()));
    let metrics = document["metrics"].as_array().unwrap();
    let value = |name: &str| metrics.iter().find(|metric| metric["name"] == name).unwrap()["value"].as_f64().unwrap();
    assert_eq!(value("butterfly_prompt_tokens_total"), 7.0);
    let block = telemetry.report(ReportForm::Console);
    for expected in ["node n0 at 1", "7 of prompts", "stage    ingest", "busy 100 %", "peer     n1"] {
        assert!(block.contains(expected), "{expected}\n{block}");
    }
}

/// Debian's `prometheus` has the program; where it is not installed there is nothing to ask, and CI has it.
#[test]
fn promtool_finds_nothing_to_criticise() {
    let (_clock, telemetry) = declared();
    let child = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        assert!(std::env::var_os("BUTTERFLY_REQUIRE_PROMTOOL").is_none(), "promtool is required and not installed");
        return;
    };
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, telemetry.render(TextFormat::Classic).as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}
