//! Files under `tests/good` and what they declare.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use butterfly_topology::{
    Catalogue, Code, CollectorType, Diagnostic, KeySpec, KindSignature, NodeId, PortSpec, Severity, StageName,
    Topology, ValueSpec, WhenFull, parse, render,
};

const CLUSTER: &str = include_str!("good/cluster.toml");
const SHUFFLED: &str = include_str!("good/shuffled.toml");
const WARNINGS: &str = include_str!("good/warnings.toml");

fn good(text: &str) -> Topology {
    parse(text, "good.toml", &support::catalogue()).unwrap_or_else(|problems| panic!("{}", problems.render(false)))
}

fn node(id: &str) -> NodeId {
    NodeId::parse(id).unwrap()
}

fn stage(name: &str) -> StageName {
    StageName::parse(name).unwrap()
}

fn names(topology: &Topology) -> Vec<&str> {
    topology.graph.stages.iter().map(|stage| stage.name.as_str()).collect()
}

#[test]
fn the_documented_file_means_what_it_says() {
    let topology = good(CLUSTER);
    let cluster = &topology.cluster;
    assert_eq!((cluster.name.as_str(), cluster.model.as_str()), ("demo", "builtin:tiny-rust"));
    assert_eq!((cluster.max_byzantine, cluster.slices, cluster.replicas()), (1, Some(2), 3));
    let [n0, n1, n2] = cluster.nodes.as_slice() else { panic!("three nodes") };
    assert_eq!((n0.memory_bytes, n0.compute, n0.bandwidth), (Some(4 << 30), None, None));
    assert_eq!((n1.memory_bytes, n1.compute, n1.bandwidth), (Some(1 << 30), Some(1.5), Some(125_000_000)));
    assert_eq!(n2.adversary.as_deref(), Some("wrong-vote"));
    assert!(n2.listen_address.is_ipv6());
    assert_eq!(names(&topology), ["ingest", "partition", "assign", "transfer", "compute", "consensus", "commit"]);
    assert_eq!(topology.telemetry.collector_type, CollectorType::Json);
    assert_eq!(topology.telemetry.export_interval, Duration::from_secs(5));

    let assign = topology.graph.stage(&stage("assign")).unwrap();
    assert_eq!(assign.config.text("scheduler_type"), Some("priority"));
    assert_eq!(assign.config.integer("max_in_flight"), Some(64), "a default");
    assert_eq!(assign.config.place("max_in_flight"), None);
    let place = assign.config.place("scheduler_type").unwrap();
    assert_eq!(&CLUSTER[place], "\"priority\"");
    let ingest = topology.graph.stage(&stage("ingest")).unwrap();
    assert_eq!(ingest.on.as_deref(), Some(&[node("n0")][..]));
    assert_eq!(ingest.config.address("bind_address"), Some("127.0.0.1:8080".parse().unwrap()));
    assert_eq!(ingest.config.number("rate_limit_per_second"), Some(200.0), "a whole number is a number");
}

#[test]
fn edges_carry_the_bounds_of_the_stage_they_leave() {
    let topology = good(SHUFFLED);
    let edge = |from: &str| topology.graph.edges.iter().find(|edge| edge.from.to_string() == from).unwrap();
    let outcome = edge("run.outcome");
    assert_eq!((outcome.capacity_items, outcome.capacity_bytes), (256, 3 << 29));
    assert_eq!((outcome.to.to_string().as_str(), outcome.item, outcome.feedback), ("vote.outcome", "Outcome", false));
    assert!(edge("run.boundary").feedback);
    assert_eq!(edge("http.requests").full, WhenFull::Wait, "the file overrides the kind");
    assert_eq!(good(CLUSTER).graph.edges.first().unwrap().full, WhenFull::Reject, "ingest rejects by default");
}

#[test]
fn stages_are_ordered_upstream_first_whatever_the_file_says() {
    let topology = good(SHUFFLED);
    assert_eq!(names(&topology), ["http", "end", "plan", "queue", "move", "run", "vote", "log"]);
}

#[test]
fn a_feedback_edge_has_room_for_the_loop_unless_the_file_bounds_it() {
    let catalogue = support::catalogue();
    let topology = good(CLUSTER);
    let ids: Vec<NodeId> = topology.cluster.nodes.iter().map(|node| node.id.clone()).collect();
    let loops = topology.graph.loops(&ids, topology.cluster.max_byzantine, &catalogue);
    let [only] = loops.as_slice() else { panic!("one loop") };
    assert_eq!(only.stages, [stage("transfer"), stage("compute")]);
    // 64 permits on the one gateway, 3 replicas.
    assert_eq!((only.permits, only.window, only.frames), (Some(64), 3, Some(192)));
    assert_eq!(only.bytes_needed(1000), Some(192_000));
    assert_eq!(topology.graph.edges[only.edge].capacity_items, 192);

    // Exactly enough is enough, one item less is not.
    let bounded = |capacity: usize| CLUSTER.replace("threads = 2", &format!("capacity = {capacity}"));
    assert!(parse(&bounded(192), "good.toml", &catalogue).is_ok());
    let problems = parse(&bounded(191), "bad.toml", &catalogue).unwrap_err();
    let errors = problems.iter().filter(|problem| problem.severity == Severity::Error);
    assert_eq!(errors.map(|problem| problem.code).collect::<Vec<_>>(), [Code::LoopCapacity]);

    let frames = CLUSTER.replace("threads = 2", "frame_bytes_max = \"1 MiB\"");
    let topology = good(&frames);
    assert_eq!(topology.graph.edges[only.edge].capacity_bytes, 192 << 20);
}

#[test]
fn workers_run_what_is_networked_or_fed_and_gateways_run_all() {
    let catalogue = support::catalogue();
    let topology = good(CLUSTER);
    let all: BTreeSet<StageName> = topology.graph.stages.iter().map(|stage| stage.name.clone()).collect();
    assert_eq!(topology.graph.running_on(&node("n0"), &catalogue), all);
    let worker = ["transfer", "compute", "consensus", "commit"].map(stage).into();
    assert_eq!(topology.graph.running_on(&node("n1"), &catalogue), worker);
    assert!(!topology.graph.runs_on(&stage("assign"), &node("n2"), &catalogue));
    assert!(!topology.graph.runs_on(&stage("nothing"), &node("n0"), &catalogue));
}

#[test]
fn warnings_do_not_stop_a_file_and_can_be_shown() {
    let topology = good(WARNINGS);
    assert!(topology.warnings.iter().all(|warning| warning.severity == Severity::Warning));
    assert!(!topology.warnings.has_errors());
    insta::assert_snapshot!("warnings", topology.warnings.render(false));
    assert!(good(SHUFFLED).warnings.is_empty());
}

#[test]
fn stages_report_their_own_rules_in_the_same_words() {
    let topology = good(CLUSTER);
    let ingest = topology.graph.stage(&stage("ingest")).unwrap();
    let problem = Diagnostic::error(Code::StageRule, "`tokens_file` may be absent only on a loopback address")
        .at(ingest.config.place("bind_address").unwrap(), "reachable from outside")
        .also(topology.stage_place(&stage("ingest")).unwrap(), "");
    insta::assert_snapshot!("stage-rule", topology.diagnostics(vec![problem]).render(false));
    let place = topology.node_place(&node("n1")).unwrap();
    assert_eq!(&CLUSTER[place], "\"n1\"");
}

#[test]
fn problems_are_told_to_programs_too() {
    let text = CLUSTER.replace("max_byzantine", "max_byzantin");
    let problems = parse(&text, "bad.toml", &support::catalogue()).unwrap_err();
    assert_eq!(problems.to_string(), "bad.toml:6:1: unknown key `max_byzantin` in `[cluster]`");
    insta::assert_snapshot!("json", serde_json::to_string_pretty(&problems.to_json()).unwrap());
    assert!(problems.render(true).contains("\u{1b}["), "in colour");
    assert!(!problems.render(false).contains('\u{1b}'));
}

#[test]
fn the_graph_is_drawn() {
    insta::assert_snapshot!("cluster.dot", render::dot(&good(CLUSTER)));
    insta::assert_snapshot!("cluster.mermaid", render::mermaid(&good(CLUSTER)));
    insta::assert_snapshot!("shuffled.dot", render::dot(&good(SHUFFLED)));
    insta::assert_snapshot!("shuffled.mermaid", render::mermaid(&good(SHUFFLED)));
}

#[test]
fn signatures_are_checked_against_themselves() {
    assert_eq!(support::catalogue().faults(), Vec::<String>::new());

    let port = PortSpec { name: "in", item: "X", required: true };
    let ports = vec![port, port].leak();
    let key = |name, value, default| KeySpec { name, doc: "", value, default, required: false };
    let keys = vec![
        key("capacity", ValueSpec::Flag, None),
        key("size", ValueSpec::Bytes { min: 0, max: 1 << 20 }, Some("2 MiB")),
        key("size", ValueSpec::Choice(&["a"]), Some("b")),
    ]
    .leak();
    let full = &[WhenFull::Wait];
    let bad = KindSignature { kind: "bad", doc: "", inputs: ports, outputs: &[], keys, networked: false, full };
    assert_eq!(
        Catalogue::new(vec![bad]).faults(),
        [
            "bad: key `capacity` shadows a common key",
            "bad: the default of `size` is not a value it may take",
            "bad: key `size` is listed twice",
            "bad: the default of `size` is not a value it may take",
            "bad: port `in` is listed twice",
        ]
    );
}
