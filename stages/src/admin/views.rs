//! What the admin listener shows, as JSON documents.
//!
//! It refuses to judge: whoever shows the numbers says what they mean.

use std::sync::Arc;

use butterfly_engine::telemetry::{EdgeProfile, StageProfile, Timeline};
use butterfly_topology::{EdgeSpec, NodeId, StageSpec};
use serde::Serialize;
use serde_json::{Value, json};

use super::routes::Console;
use crate::error::TaskError;
use crate::ingest::{Failure, health_of_nodes};
use crate::items::RequestId;
use crate::registry;

/// The stage graph, with what of it runs on this node.
pub(super) fn graph(console: &Console) -> Value {
    let services = &console.services;
    let (graph, catalogue) = (&services.topology.graph, registry::catalogue());
    let pending = console.readiness.pending();
    let stage = |stage: &StageSpec| {
        let runs = graph.runs_on(&stage.name, &services.node, &catalogue);
        json!({
            "name": stage.name,
            "kind": stage.kind,
            "on": stage.on,
            "runs_here": runs,
            "ready": runs.then(|| !pending.contains(&stage.name)),
        })
    };
    let profile = services.telemetry.profile();
    let edge = |edge: &EdgeSpec| {
        let (from, to) = (edge.from.to_string(), edge.to.to_string());
        let live = profile.edges.iter().find(|live| live.from == from && live.to == to);
        json!({
            "from": from,
            "to": to,
            "capacity_items": edge.capacity_items,
            "capacity_bytes": edge.capacity_bytes,
            "feedback": edge.feedback,
            "items": live.map(|live| live.items),
            "bytes": live.map(|live| live.bytes),
            "queued_items": live.map(|live| live.queued_items),
        })
    };
    json!({
        "cluster": services.topology.cluster.name,
        "node": services.node,
        "stages": graph.stages.iter().map(stage).collect::<Vec<_>>(),
        "edges": graph.edges.iter().map(edge).collect::<Vec<_>>(),
    })
}

/// The roster as this node sees it.
pub(super) fn nodes(console: &Console) -> Value {
    let services = &console.services;
    let cluster = &services.topology.cluster;
    json!({
        "cluster": cluster.name,
        "epoch": services.epoch.digest(),
        "model": cluster.model,
        "max_byzantine": cluster.max_byzantine,
        "node": services.node,
        "strategy": services.plan.strategy,
        "slices": services.plan.slices,
        "nodes": health_of_nodes(services),
    })
}

/// What this node says about its own stages.
#[derive(Serialize)]
pub(super) struct Stages {
    node: NodeId,
    unix_ms: u64,
    tasks: Tasks,
    stages: Vec<StageProfile>,
}

#[derive(Serialize)]
struct Tasks {
    running: i64,
    waiting: i64,
    prompt_tokens: u64,
    generation_tokens: u64,
    receipts: u64,
}

/// Where the time of the stages of this node goes.
pub(super) fn stages(console: &Console) -> Stages {
    let services = &console.services;
    let metrics = services.telemetry.metrics();
    Stages {
        node: services.node.clone(),
        unix_ms: services.clock.unix_ms(),
        tasks: Tasks {
            running: metrics.tasks_running.get(),
            waiting: metrics.tasks_waiting.get(),
            prompt_tokens: metrics.prompt_tokens_total.get(),
            generation_tokens: metrics.generation_tokens_total.get(),
            receipts: metrics.receipts_total.get(),
        },
        stages: services.telemetry.profile().stages,
    }
}

/// What this node says about its own edges.
#[derive(Serialize)]
pub(super) struct Edges {
    node: NodeId,
    unix_ms: u64,
    edges: Vec<EdgeProfile>,
}

/// What is on the edges of this node.
pub(super) fn edges(console: &Console) -> Edges {
    let services = &console.services;
    Edges { node: services.node.clone(), unix_ms: services.clock.unix_ms(), edges: services.telemetry.profile().edges }
}

/// Recent requests that this node has to do with, the newest first.
pub(super) fn requests(console: &Console, max: usize) -> Value {
    let services = &console.services;
    let short = |timeline: Timeline| {
        let lives_here = services.board.is_living(&RequestId::from(timeline.request));
        json!({
            "request": hex::encode(timeline.request),
            "names": timeline.names,
            "request_id": timeline.context.as_ref().map(|context| &context.request_id),
            "trace_id": timeline.context.as_ref().map(|context| &context.trace_id),
            "began_unix_us": timeline.began_unix_us,
            "living_here": lives_here,
            "last": timeline.marks.last(),
        })
    };
    let data: Vec<Value> = services.telemetry.traces().newest(max).into_iter().map(short).collect();
    json!({ "node": services.node, "data": data })
}

/// A timeline, and whose claim it is.
#[derive(Serialize)]
pub(super) struct Told {
    node: NodeId,
    /// Times are this node's word about itself, by its own clock.
    times: &'static str,
    #[serde(flatten)]
    timeline: Timeline,
}

/// The timeline of a request, under any name this node knows.
pub(super) fn timeline(console: &Console, id: &str) -> Option<Told> {
    let services = &console.services;
    let timeline = services.telemetry.traces().find(id)?;
    Some(Told { node: services.node.clone(), times: "claimed by the node, by its own clock", timeline })
}

/// Receipts in this node's log, the newest first.
pub(super) async fn receipts(console: &Console, max: usize) -> Result<Value, Failure> {
    let journal = Arc::clone(&console.services.journal);
    let read = tokio::task::spawn_blocking(move || journal.newest_receipts(max)).await;
    let unreadable = || Failure::from(TaskError::Internal("the log cannot be read".to_owned()));
    let kept = read.map_err(|_| unreadable())?.map_err(|error| {
        tracing::error!(%error, "the log cannot be read");
        unreadable()
    })?;
    let entry = |(accepted, receipt): (crate::commit::Accepted, Vec<u8>)| {
        json!({
            "receipt_id": accepted.rd,
            "task_id": accepted.task_id,
            "accepted_unix_ms": accepted.accepted_ms,
            "receipt": serde_json::from_slice::<Value>(&receipt).ok(),
        })
    };
    let data: Vec<Value> = kept.into_iter().map(entry).collect();
    Ok(json!({ "node": console.services.node, "data": data }))
}
