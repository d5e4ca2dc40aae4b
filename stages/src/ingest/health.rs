//! Whether this node can answer now, and what it knows of the others.
//!
//! Ready means: every stage has started, nothing is stopping, the log takes entries, every slice has f+1 live replicas, and
//! what runs has moved lately. A process that answers and computes nothing is not healthy.
//!
//! Whoever has no API key, where keys are needed, is told whether and why not, and nothing about nodes.
//!
//! It refuses to know clients and tasks one by one.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use butterfly_engine::transport::PeerState;
use serde::Serialize;

use super::gateway::Gateway;
use crate::services::Conduct;

#[derive(Serialize)]
struct Health {
    healthy: bool,
    /// Why not.
    reasons: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    services: Option<Services>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<Vec<Node>>,
}

#[derive(Serialize)]
struct Services {
    /// `ready` or `starting`, of each stage of this node.
    #[serde(flatten)]
    stages: BTreeMap<String, &'static str>,
    /// `ready` or `failed`.
    log: &'static str,
    /// Tasks of this gateway that live.
    tasks: usize,
}

/// A member of the roster.
#[derive(Serialize)]
pub(crate) struct Node {
    id: String,
    /// Whether it is the node that answers.
    #[serde(rename = "self")]
    is_self: bool,
    /// `up` or `down`.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Slices it holds.
    slices: Vec<usize>,
    /// `good`; `quarantined`: f+1 others contradict it, look into it; `excluded`: proven to lie, gets no work.
    standing: &'static str,
    conduct: Record,
}

/// What this node holds against another.
#[derive(Serialize)]
struct Record {
    /// Votes that agreed with a certificate.
    agreed: u64,
    /// Requests for which no vote came in time.
    silent: u64,
    /// Pieces of evidence against it, by kind.
    accused: BTreeMap<String, u64>,
}

/// The answer to `GET /health`.
pub(super) fn respond(gateway: &Gateway, request_timeout: Duration, with_details: bool) -> Response {
    let reasons = gateway.services.unready(&gateway.readiness, &gateway.shutdown, request_timeout);
    let healthy = reasons.is_empty();
    let health = Health {
        healthy,
        reasons,
        services: with_details.then(|| services(gateway)),
        nodes: with_details.then(|| nodes(&gateway.services)),
    };
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health)).into_response()
}

fn services(gateway: &Gateway) -> Services {
    let services = &gateway.services;
    let graph = &services.topology.graph;
    let pending = gateway.readiness.pending();
    let catalogue = crate::registry::catalogue();
    let own = graph.stages.iter().filter(|stage| graph.runs_on(&stage.name, &services.node, &catalogue));
    let state = |is_ready| if is_ready { "ready" } else { "starting" };
    Services {
        stages: own.map(|stage| (stage.name.to_string(), state(!pending.contains(&stage.name)))).collect(),
        log: if services.journal.failure().is_some() { "failed" } else { "ready" },
        tasks: services.board.living(),
    }
}

/// The roster as this node sees it.
pub(crate) fn nodes(services: &crate::services::Services) -> Vec<Node> {
    let peers = services.peers.borrow();
    let conduct = services.standing.conduct();
    let node = |spec: &butterfly_topology::NodeSpec| {
        let (state, rtt_ms, reason) = match peers.get(&spec.id) {
            _ if spec.id == services.node => ("up", None, None),
            Some(PeerState::Up { rtt }) => ("up", Some(rtt.as_secs_f64() * 1000.0), None),
            Some(PeerState::Down { reason, .. }) => ("down", None, Some(reason.to_string())),
            None => ("down", None, None),
        };
        let holds = |(slice, plan): (usize, &butterfly_topology::plan::SlicePlan)| {
            plan.replicas.contains(&spec.id).then_some(slice)
        };
        let index = services.epoch.index_of(spec.id.as_ref());
        let conduct = index.and_then(|index| conduct.get(&index).cloned()).unwrap_or_default();
        let standing = conduct.standing();
        let Conduct { agreed, accused, silent, .. } = conduct;
        Node {
            id: spec.id.to_string(),
            is_self: spec.id == services.node,
            state,
            rtt_ms,
            reason,
            slices: services.plan.slices.iter().enumerate().filter_map(holds).collect(),
            standing,
            conduct: Record { agreed, silent, accused },
        }
    };
    services.topology.cluster.nodes.iter().map(node).collect()
}
